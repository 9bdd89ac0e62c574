"""One tiny checkpoint and one small data set for all tests of the refiner."""

from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def checkpoint(tiny: Callable[[str], Path]) -> Path:
    """A folder structurally identical to stable-diffusion-2-1-unclip."""
    return tiny("gaussian_refiner") / "model"


@pytest.fixture(scope="session")
def data_folder(tiny: Callable[[str], Path]) -> Path:
    """A folder with example_kitti.json: 16 items, of which the last 10 are held out."""
    return tiny("gaussian_refiner") / "data"


@pytest.fixture
def in_data_folder(data_folder: Path, monkeypatch: pytest.MonkeyPatch, clean_process: None) -> Path:
    """Works in the data folder, as users do."""
    monkeypatch.chdir(data_folder)
    return data_folder
