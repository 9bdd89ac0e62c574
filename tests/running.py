"""What tests of all trainers share: starting a run in this process or as a command, and comparing what runs left."""

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier, BrokenBarrierError, Lock
from typing import Any, TypeVar

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState

from common.checkpoint import read_weights

Result = TypeVar("Result")
ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent  # of accelerate and torchrun
# Columns of metrics.jsonl that tell of the clock and the machine, not of the training.
CLOCK_STARTS, CLOCK_ENDS = ("time/", "memory_", "fastest_", "slowest_"), ("_s", "_percent")


def train(trainer: str, *words: object, **options: object) -> None:
    """One training command of a trainer in this process; the test needs the fixture `clean_process`.

    Args:
        options: further arguments of the trainer's `main`.
    """
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    importlib.import_module(f"{trainer}.__main__").main([str(word) for word in words], **options)


def refused(capsys: pytest.CaptureFixture[str], trainer: str, *words: object, **options: object) -> str:
    """What a run that cannot start prints; it must be one message and no traceback."""
    with pytest.raises(SystemExit) as ended:
        train(trainer, *words, **options)
    assert ended.value.code in (1, 2)
    message = capsys.readouterr().err
    assert "Traceback" not in message
    return message


def launch(
    *words: object, folder: Path = ROOT, environment: Mapping[str, str] | None = None, timeout_s: float = 400
) -> str:
    """Runs a command, which must succeed, from a folder; returns what it printed.

    Programs and scripts are found as in a shell whose virtual environment is active.
    """
    paths = {"PATH": f"{BIN}:{os.environ['PATH']}"}
    done = subprocess.run(
        [str(word) for word in words],
        cwd=folder,
        env={**os.environ, **paths, **(environment or {})},
        capture_output=True,
        text=True,
        timeout=timeout_s,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


class Rank:
    """One of several processes, played by a thread."""

    def __init__(self, process_index: int, everyone: Barrier, turn: Lock) -> None:
        self.process_index, self.num_processes, self.device = process_index, everyone.parties, torch.device("cpu")
        self.is_main_process, self._everyone, self._turn = process_index == 0, everyone, turn

    def wait_for_everyone(self) -> None:
        self._turn.release()
        try:
            self._everyone.wait()
        finally:
            self._turn.acquire()


def on_ranks(num_processes: int, work: Callable[[Any], Result]) -> list[Result]:
    """What `work` returns to each of so many ranks.

    One rank works at a time, until it waits for the others: libraries patch torch and themselves while they load a
    model, so that two loads at once leave a patch behind for all tests that follow.
    """
    everyone, turn = Barrier(num_processes, timeout=60), Lock()

    def run(process_index: int) -> Result:
        with turn:
            try:
                return work(Rank(process_index, everyone, turn))
            except BaseException:
                everyone.abort()
                raise

    with ThreadPoolExecutor(num_processes) as pool:
        ranks = [pool.submit(run, process_index) for process_index in range(num_processes)]
        failures = [failure for rank in ranks if (failure := rank.exception())]
    if failures:  # of the ranks that waited for the one that failed, a broken barrier
        raise min(failures, key=lambda failure: isinstance(failure, BrokenBarrierError))
    return [rank.result() for rank in ranks]


def metrics(output_dir: Path) -> list[dict]:
    """metrics.jsonl without the clock's readings."""
    records = [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]
    return [
        {k: v for k, v in r.items() if not k.startswith(CLOCK_STARTS) and not k.endswith(CLOCK_ENDS)} for r in records
    ]


def assert_close(ours: Path, reference: Path, tolerance: float) -> None:
    """Two runs reported the same numbers, but for a relative error."""
    for one, other in zip(metrics(ours), metrics(reference), strict=True):
        assert one.keys() == other.keys() and (one["kind"], one["step"]) == (other["kind"], other["step"])
        for name in other.keys() - {"kind"}:
            assert one[name] == pytest.approx(other[name], rel=tolerance, abs=1e-6), (other["step"], name)


def assert_same_checkpoint(ours: Path, theirs: Path, *, but_for: tuple[str, ...] = ()) -> None:
    """Models, averages and optimizers of two checkpoint folders are equal bit for bit.

    Args:
        but_for: ends of the names of tensors, and of an optimizer's settings, that may differ.
    """
    models = {path.parent.name for path in theirs.glob("*/*.safetensors")}
    assert models and {path.parent.name for path in ours.glob("*/*.safetensors")} == models
    for name in models:
        found, expected = read_weights(ours / name), read_weights(theirs / name)
        assert found.keys() == expected.keys(), name
        compared = [key for key in expected if not key.endswith(but_for)]
        assert all(torch.equal(found[key], expected[key]) for key in compared), name
    optimizers = {path.name for path in theirs.glob("optimizer*.bin")}
    assert optimizers and {path.name for path in ours.glob("optimizer*.bin")} == optimizers
    for name in optimizers:
        found, expected = (torch.load(folder / name, weights_only=True) for folder in (ours, theirs))
        for ours_group, theirs_group in zip(found["param_groups"], expected["param_groups"], strict=True):
            assert all(ours_group[key] == value for key, value in theirs_group.items() if not key.endswith(but_for)), (
                name
            )
        assert found["state"].keys() == expected["state"].keys(), name
        for index, state in expected["state"].items():
            assert all(
                torch.equal(torch.as_tensor(found["state"][index][key]), torch.as_tensor(value))
                for key, value in state.items()
            ), f"{name} {index}"


def entries(cache: Path) -> dict[Path, int]:
    """The entries of a cache, and when each was written."""
    return {path: path.stat().st_mtime_ns for path in cache.rglob("*.safetensors")}


def steps_of(output_dir: Path) -> list[int]:
    """Optimizer steps of which there is a whole checkpoint."""
    return sorted(int(path.parent.name.split("-")[1]) for path in output_dir.glob("checkpoint-*/manifest.json"))
