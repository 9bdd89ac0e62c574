"""One tiny checkpoint and a few small scenes for all tests of the GGI trainer."""

from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def checkpoint(tiny: Callable[[str], Path]) -> Path:
    """CogVideoX, its base LoRA and the annotators in small, for the smallest clips that RAFT takes."""
    return tiny("training_ggi") / "model"


@pytest.fixture(scope="session")
def scenes(tiny: Callable[[str], Path]) -> Path:
    """A data root: walls of random texture that move past, each with its caption."""
    return tiny("training_ggi") / "data"
