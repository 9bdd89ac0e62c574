"""One tiny checkpoint and one small data set for all tests of the refiner."""

from pathlib import Path

import make_demo_data
import make_tiny_checkpoints
import pytest


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder structurally identical to stable-diffusion-2-1-unclip."""
    return make_tiny_checkpoints.make_refiner_checkpoint(tmp_path_factory.mktemp("ckpt") / "tiny-unclip")


@pytest.fixture(scope="session")
def data_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with example_kitti.json: 16 items, of which the last 10 are held out."""
    return make_demo_data.make_refiner_data(tmp_path_factory.mktemp("data") / "pairs", items=16).parent


@pytest.fixture
def in_data_folder(data_folder: Path, monkeypatch: pytest.MonkeyPatch, clean_process: None) -> Path:
    """Works in the data folder, as users do."""
    monkeypatch.chdir(data_folder)
    return data_folder
