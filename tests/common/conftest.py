"""Makes the helpers beside the tests importable by them, and keeps a test's signal handlers from the next one."""

import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True)
def restored_handlers() -> Iterator[None]:
    """Processes that later tests fork would inherit a handler that only takes note."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
