"""Makes `vectors.py` importable: test folders are not on the path with `--import-mode=importlib`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
