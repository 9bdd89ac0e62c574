"""Helpers beside the tests, and those of the trainer in miniature, can be imported."""

import sys
from pathlib import Path

sys.path += [str(Path(__file__).parent), str(Path(__file__).parents[1] / "common")]
