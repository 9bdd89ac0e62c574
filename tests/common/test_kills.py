"""SIGKILL at random instants: the run goes on from a whole checkpoint and ends as if nothing had happened."""

import random
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from processes import assert_same_state, command, metrics, run

from common.cache import Cache

STEPS = 600
FLAGS = ("--batch_size", "2", "--use_ema", "--max_train_steps", str(STEPS), "--checkpointing_steps", "3")
FLAGS += ("--checkpoints_total_limit", "2", "--validation_steps", "5", "--resume_from_checkpoint", "latest")


def steps_done(output_dir: Path) -> int:
    path = output_dir / "metrics.jsonl"
    return path.read_bytes().count(b'"kind": "train"') if path.exists() else 0


def start_and_kill(output_dir: Path, processes: int, rng: random.Random) -> bool:
    """Starts the run, kills all its processes some steps later; False if it ended before that."""
    before = steps_done(output_dir)
    goal = before + rng.randint(1, STEPS // 12)
    process = subprocess.Popen(
        command(output_dir, *FLAGS, processes=processes),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 120
    while process.poll() is None and steps_done(output_dir) < goal and time.monotonic() < deadline:
        time.sleep(0.002)
    time.sleep(rng.random() * 0.05)  # anywhere in a step, a save or a rotation
    ended = process.poll() is not None
    if not ended:
        tree = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        for member in tree:  # launchers give their processes sessions of their own
            member.kill()
        psutil.wait_procs(tree)
    process.wait()
    return not ended


def check_kills(tmp_path: Path, processes: int, kills: int) -> None:
    run(tmp_path / "whole", *FLAGS, processes=processes)
    killed, rng = 0, random.Random(kills)
    for _ in range(kills):
        killed += start_and_kill(tmp_path / "killed", processes, rng)
    assert killed >= min(kills, 2)
    run(tmp_path / "killed", *FLAGS, processes=processes)
    assert metrics(tmp_path / "killed") == metrics(tmp_path / "whole")
    assert_same_state(tmp_path / "killed", tmp_path / "whole", STEPS)
    assert not [path for path in (tmp_path / "killed").iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize(("processes", "kills"), [(1, 2), pytest.param(2, 1, marks=pytest.mark.slow)])
def test_kills(tmp_path: Path, processes: int, kills: int) -> None:
    check_kills(tmp_path, processes, kills)


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "kills"), [(1, 60), (2, 40)])
def test_many_kills(tmp_path: Path, processes: int, kills: int) -> None:
    check_kills(tmp_path, processes, kills)


BUILDER = """
import sys
import torch
from common.cache import Cache
cache = Cache(sys.argv[1], {"weights": "abc"})
for number in range(100_000):
    key = f"{number:08d}"
    if key not in cache:
        cache.save(key, {"number": torch.full((256,), number)})
"""


def test_kills_while_a_cache_is_built(tmp_path: Path) -> None:
    folder, rng = tmp_path / "cache", random.Random(0)
    built = 0
    for _ in range(3):
        process = subprocess.Popen([sys.executable, "-c", BUILDER, str(folder)], cwd=tmp_path)
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and len(list(folder.rglob("0*.safetensors"))) <= built:
            time.sleep(0.01)
        time.sleep(rng.random() * 0.2)
        process.kill()
        process.wait()
        entries = sorted(path.stem for path in folder.rglob("0*.safetensors"))
        assert len(entries) > built and entries == [f"{number:08d}" for number in range(len(entries))]
        built = len(entries)
    cache = Cache(folder, {"weights": "abc"})
    assert all(cache.load(f"{number:08d}")["number"].eq(number).all() for number in range(built))
