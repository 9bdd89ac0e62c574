"""One tiny checkpoint and one small folder of rendered objects for all tests of the multi-view trainer."""

from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def checkpoint(tiny: Callable[[str], Path]) -> Path:
    """A folder structurally identical to sd-image-variations-diffusers."""
    return tiny("mvdiffusion") / "model"


@pytest.fixture(scope="session")
def renders(tiny: Callable[[str], Path]) -> Path:
    """Eight coloured spheres of different size and place, in six upright views."""
    return tiny("mvdiffusion") / "data"
