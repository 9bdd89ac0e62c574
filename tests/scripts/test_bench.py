"""The benchmarks run: at their smallest size, where their ratios mean nothing."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [
        "refiner.py --size tiny --repeats 1 --steps 2",
        "mv_training.py --size tiny --repeats 1",
        "mv_attention.py --side 8 --repeats 2 --device cpu",
        "noise_warp.py --size tiny --turns 1",
        "measuring.py",
    ],
)
def test_it_runs(command: str) -> None:
    done = subprocess.run([sys.executable, *command.split()], cwd=ROOT / "bench", capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
