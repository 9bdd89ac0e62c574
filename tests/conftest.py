"""What holds for all tests."""

import os
import signal
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest

# Set before torch is imported, and inherited by the processes that tests start. The number of threads decides the order
# in which floats are summed: runs can be equal bit for bit only if all of them have the same.
os.environ["OMP_NUM_THREADS"] = "1"


@pytest.fixture
def clean_process() -> Iterator[None]:
    """Lets training start anew in this process afterwards."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """By the name of a trainer, a folder with its tiny `model` and a little `data`; made once for all tests."""
    from trainers import TRAINERS

    @cache
    def folder_of(name: str) -> Path:
        folder = tmp_path_factory.mktemp(name)
        TRAINERS[name].make(folder)
        return folder

    return folder_of
