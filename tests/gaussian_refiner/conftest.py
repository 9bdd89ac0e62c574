"""One tiny checkpoint and one small data set for all tests of the refiner."""

import signal
from collections.abc import Iterator
from pathlib import Path

import make_demo_data
import make_tiny_checkpoints
import pytest
from accelerate.state import AcceleratorState, GradientState


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder structurally identical to stable-diffusion-2-1-unclip."""
    return make_tiny_checkpoints.make_refiner_checkpoint(tmp_path_factory.mktemp("ckpt") / "tiny-unclip")


@pytest.fixture(scope="session")
def data_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with example_kitti.json: 16 items, of which the last 10 are held out."""
    return make_demo_data.make_refiner_data(tmp_path_factory.mktemp("data") / "pairs", items=16).parent


@pytest.fixture
def in_data_folder(data_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Works in the data folder, as users do, and lets training start anew in this process afterwards."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    monkeypatch.chdir(data_folder)
    yield data_folder
    for number, handler in handlers.items():
        signal.signal(number, handler)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
