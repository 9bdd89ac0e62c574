"""Two machines: the documented launch trains as two processes of one machine do, and what may go wrong is named."""

import importlib.util
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hosts import WITHOUT_GPU, Host, Launched, two_hosts, why_not
from processes import BASE, TINY, weights
from running import ROOT, assert_close, assert_same_checkpoint, launch, metrics
from trainers import TRAINERS

from common.watch import Watch

TINY_FLAGS = ["--batch_size", "2", "--use_ema", "--max_train_steps", "4", "--checkpointing_steps", "2", *BASE]
TWO_STEPS = ("run.max_train_steps=2", "validation.validation_steps=100", "optim.gradient_accumulation_steps=1")
LATEST = "checkpoint.resume_from_checkpoint=latest"
NEEDS_DEEPSPEED = pytest.mark.skipif(not importlib.util.find_spec("deepspeed"), reason="needs the extra deepspeed")
CPU = ("accelerate", "launch", "--config_file", str(ROOT / "accelerate_configs" / "cpu_2_processes.yaml"))


@pytest.fixture(scope="module")
def may_make_hosts() -> None:
    if reason := why_not():
        pytest.skip(reason)


@pytest.fixture
def hosts(may_make_hosts: None) -> Iterator[tuple[Host, Host]]:
    """Two machines for a test."""
    with two_hosts() as made:
        yield made


def left_after_half(run: Path, copy: Path) -> Path:
    """A copy of a finished run with its first checkpoint only."""
    shutil.copytree(run, copy)
    shutil.rmtree(copy / "export")
    shutil.rmtree(max(copy.glob("checkpoint-*")))
    return copy


def assert_went_well(launched: Launched) -> None:
    assert launched.wait() == [0, 0], launched.output(0) + launched.output(1)


# As on one machine ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("of_two", "of_one"),
    [
        ("multi_node.yaml", "cpu_2_processes.yaml"),
        ("fsdp2.yaml", "fsdp2.yaml"),
        pytest.param("multi_nodes/8_gpus_node_{rank}.yaml", "8_gpus_zero2.yaml", marks=NEEDS_DEEPSPEED),
    ],
)
def test_two_machines_compute_what_one_does(hosts: tuple[Host, Host], of_two: str, of_one: str, tmp_path: Path) -> None:
    two, one, again = (tmp_path / name for name in ("two", "one", "again"))
    assert_went_well(Launched(hosts, [TINY, "--output_dir", two, *TINY_FLAGS], tmp_path, tmp_path, config=of_two))
    words = ["accelerate", "launch", "--config_file", ROOT / "accelerate_configs" / of_one, "--num_processes", "2"]
    words += ["--main_process_port", "0", "--mixed_precision", "no", TINY, *TINY_FLAGS]
    launch(*words, "--output_dir", one, environment=WITHOUT_GPU)
    # What a stopped run left goes on where there is but one machine.
    left_after_half(two, again)
    launch(*words, "--output_dir", again, "--resume_from_checkpoint", "latest", environment=WITHOUT_GPU)
    expected = weights(one, 4)
    for run in (two, again):
        assert metrics(run) == metrics(one)
        assert all(torch.equal(value, expected[name]) for name, value in weights(run, 4).items())


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAINERS)
def test_every_trainer_on_two_machines(
    hosts: tuple[Host, Host], name: str, tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    trainer, (two, one, again) = TRAINERS[name], (tmp_path / word for word in ("two", "one", "again"))
    folder, words = ROOT / trainer.folder, [trainer.script, *trainer.command(tiny(name)), *TWO_STEPS]
    assert_went_well(Launched(hosts, [*words, f"run.output_dir={two}"], folder, tmp_path))
    launch(*CPU, *words, f"run.output_dir={one}", folder=folder)
    assert metrics(two) == metrics(one)
    assert_same_checkpoint(two / "checkpoint-2", one / "checkpoint-2")
    left_after_half(two, again)
    alone = ["accelerate", "launch", "--num_processes", "1", *words, "optim.gradient_accumulation_steps=2"]
    output = launch(*alone, LATEST, f"run.output_dir={again}", folder=folder)
    assert "at step 1" in output
    assert_close(again, one, trainer.tolerance)


# What may go wrong ----------------------------------------------------------------------------------------------------


def started(hosts: tuple[Host, Host], folder: Path) -> Launched:
    """An endless run of the trainer in miniature that has done some steps."""
    flags = ["--batch_size", "1", "--max_train_steps", "1000000", "--checkpointing_steps", "1000000", *BASE]
    launched = Launched(hosts, [TINY, "--output_dir", folder / "run", *flags], folder, folder)
    deadline, written = time.monotonic() + 120, folder / "run" / "metrics.jsonl"
    while time.monotonic() < deadline and not (written.exists() and written.read_text().count("\n") > 20):
        time.sleep(0.1)
    return launched


@pytest.mark.slow
@pytest.mark.parametrize("unplugged", [False, True])
def test_a_machine_that_disappears_is_named_by_the_other(
    hosts: tuple[Host, Host], unplugged: bool, tmp_path: Path
) -> None:
    launched = started(hosts, tmp_path)
    if unplugged:  # a machine without power tells nobody that its connections have ended
        hosts[1].unplug()
    hosts[1].kill()
    began = time.monotonic()
    assert launched.wait()[0] == 1
    assert time.monotonic() - began < 90  # a machine that is silent for 30 s is gone
    (told,) = [line for line in launched.output(0).splitlines() if " is gone (last heard of " in line]
    assert "[rank 0] error: rank 1 (process " in told and " on second) in phase " in told
    assert "stops. Look at the last output of that process, then continue with --resume_from_checkpoint latest" in told


@pytest.mark.slow
def test_a_folder_that_machines_do_not_share_is_refused_by_all(hosts: tuple[Host, Host], tmp_path: Path) -> None:
    output_dir = tmp_path / "run"
    output_dir.mkdir()
    words = [TINY, "--output_dir", output_dir, *TINY_FLAGS]
    launched = Launched(hosts, words, tmp_path, tmp_path, unshared=output_dir)
    assert launched.wait() == [1, 1]
    for rank in range(2):
        (told,) = [
            line for line in launched.output(rank).splitlines() if "error: " in line and "run.output_dir" in line
        ]
        assert told == (
            f"[rank {rank}] error: process 1 does not see run.output_dir {output_dir} of the main process: all nodes "
            "save into it, so it must be on a file system that they share"
        )
    assert list(output_dir.iterdir()) == []


@pytest.mark.slow
def test_a_cache_that_machines_do_not_share_is_refused_by_all(
    hosts: tuple[Host, Host], tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    trainer, cache = TRAINERS["gaussian_refiner"], tmp_path / "cache"
    cache.mkdir()
    words = [*trainer.command(tiny(trainer.name), cache=cache), f"run.output_dir={tmp_path / 'run'}"]
    launched = Launched(hosts, [trainer.script, *words], ROOT / trainer.folder, tmp_path, unshared=cache)
    assert launched.wait() == [1, 1]
    for rank in range(2):
        told = f"[rank {rank}] error: process 1 does not see data.cache_latents {cache} of the main process: "
        assert told in launched.output(rank)


def test_machines_of_one_name_are_told_apart(tmp_path: Path) -> None:
    here, other = (Watch(tmp_path, "token", rank, 2, hang_timeout_s=0) for rank in range(2))
    try:
        other.pulse.pid = 2**22  # none here: the largest process id is one less
        other.pulse.machine += " of another kernel"
        other._write()
        assert other.pulse.host == here.pulse.host and here.lost_peer() is None
        other.pulse.machine = here.pulse.machine
        other._write()
        assert str(here.lost_peer()).startswith(f"rank 1 (process {2**22} on ")
    finally:
        for watch in (here, other):
            watch.end()
