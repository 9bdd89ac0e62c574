"""What guards a run: time limits, the watchdog, loader processes that die or hang, replay of a non-finite step."""

import json
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from processes import command, metrics, run, seen
from torch.utils.checkpoint import checkpoint

from common.replay import _first_nonfinite_output
from common.runtime import StopSignal, seconds_of
from common.watch import Watch


def test_the_time_limit_saves_and_ends_with_status_0(tmp_path: Path) -> None:
    flags = ("--batch_size", "2", "--max_train_steps", "1000000", "--checkpointing_steps", "1000000")
    output = run(tmp_path / "run", *flags, "--max_train_time", "2")
    (checkpoint,) = (tmp_path / "run").glob("checkpoint-*")
    step = int(checkpoint.name.split("-")[1])
    assert metrics(tmp_path / "run")[-1]["step"] == step > 0
    assert f"stopped after step {step}; continue with --resume_from_checkpoint latest" in output


@pytest.mark.parametrize(
    ("text", "seconds"), [("90", 90), ("1:30", 90), ("0:01:30.5", 90.5), ("1-00:00:01", 86401), ("2-00:00:03", 172803)]
)
def test_durations(text: str, seconds: float) -> None:
    assert seconds_of(text) == seconds


@pytest.mark.parametrize("text", ["", "soon", "1:2:3:4", "-5", "x-1:00", "1:-2", "2-3"])
def test_durations_that_cannot_be_read(text: str) -> None:
    with pytest.raises(ValueError, match="is no duration: write seconds, MM:SS, HH:MM:SS or D-HH:MM:SS"):
        seconds_of(text)


def test_a_dead_process_is_named_by_the_others(tmp_path: Path) -> None:
    started = time.monotonic()
    flags = ("--batch_size", "1", "--max_train_steps", "1000", "--fatal_step", "30")
    output = run(tmp_path / "run", *flags, processes=2, status=1)
    assert time.monotonic() - started < 60
    dead = [line for line in output.splitlines() if " is gone (last heard of " in line]
    assert dead and dead[0].startswith("[rank 0] error: rank 1 (process "), output
    assert "in phase forward of step 30, samples 61 to 61 is gone" in dead[0]
    assert "continue with --resume_from_checkpoint latest" in dead[0]


@pytest.mark.parametrize("processes", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_process_that_hangs_is_named(tmp_path: Path, processes: int) -> None:
    flags = ("--batch_size", "1", "--max_train_steps", "1000", "data.hanging_items=[4]", "--hang_timeout_s", "2")
    output = run(tmp_path / "run", *flags, processes=processes, status=1)
    stuck = [line for line in output.splitlines() if "has not moved for" in line]
    assert stuck and "in phase data of step" in stuck[0] and "run.hang_timeout_s is 2" in stuck[0], output


def test_long_shared_work_is_no_hang(tmp_path: Path) -> None:
    alone: Any = SimpleNamespace(process_index=0, num_processes=1)
    stop, watch = StopSignal(alone), Watch(tmp_path, "token", 0, 1, hang_timeout_s=0.3)
    stop.on_progress = watch.moved
    try:
        with watch.phase("validation", step=1):
            for _ in stop.share(3):
                time.sleep(0.2)
                assert watch.lost_peer() is None
            time.sleep(0.4)
            assert "in phase validation of step 1 has not moved for" in str(watch.lost_peer())
    finally:
        watch.end()


@pytest.mark.parametrize("processes", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_signal_is_heard_while_a_process_waits_for_data(tmp_path: Path, processes: int) -> None:
    flags = ("--batch_size", "1", "--max_train_steps", "1000", "data.hanging_items=[4]")
    line = command(tmp_path / "run", *flags, processes=processes)
    launched = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    path, done, deadline = tmp_path / "run" / "metrics.jsonl", -1, time.monotonic() + 120
    while time.monotonic() < deadline and (not path.exists() or path.stat().st_size != done):
        done = path.stat().st_size if path.exists() else -1  # until no step is added any more
        time.sleep(1.5)
    tree = [psutil.Process(launched.pid), *psutil.Process(launched.pid).children(recursive=True)]
    for process in tree[-processes:]:
        process.send_signal(signal.SIGUSR1)
    assert launched.wait(timeout=60) == 0
    (manifest,) = (tmp_path / "run").glob("checkpoint-*/manifest.json")
    assert manifest.parent.name == f"checkpoint-{metrics(tmp_path / 'run')[-1]['step']}"


def test_a_launcher_that_is_stopped_takes_the_run_along(tmp_path: Path) -> None:
    flags = ("--batch_size", "2", "--max_train_steps", "1000000", "--checkpointing_steps", "1000000")
    launcher = [str(Path(sys.executable).with_name("accelerate")), "launch", "--num_processes", "1"]
    process = subprocess.Popen([*launcher, *command(tmp_path / "run", *flags)[1:]], stderr=subprocess.DEVNULL)
    metrics_path, deadline = tmp_path / "run" / "metrics.jsonl", time.monotonic() + 120
    while time.monotonic() < deadline and not metrics_path.exists():
        time.sleep(0.1)
    (child,) = psutil.Process(process.pid).children()
    process.terminate()  # the launcher itself keeps it to itself
    process.wait()
    psutil.wait_procs([child], timeout=60)
    assert not child.is_running()
    assert len(list((tmp_path / "run").glob("checkpoint-*/manifest.json"))) == 1


def test_a_watch_knows_who_is_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ahead = Watch(tmp_path, "token", 0, 2, hang_timeout_s=0.2)
    behind = Watch(tmp_path, "token", 1, 2, hang_timeout_s=0.2)
    other_start = Watch(tmp_path / "else", "token", 1, 2, hang_timeout_s=0.2)
    try:
        with behind.phase("backward", step=7, samples=[14, 15]):
            behind._write()
            with ahead.phase("collective", step=7), ahead.phase("collective"):
                assert ahead.lost_peer() is None
                time.sleep(0.3)
                lost = ahead.lost_peer()
        assert lost is not None and lost.startswith("rank 1 (process ")
        assert "in phase backward of step 7, samples 14 to 15 has not moved for 0 s" in lost
        assert ahead.take_seconds().keys() == {"collective"} and ahead.take_seconds() == {}
    finally:
        for watch in (ahead, behind, other_start):
            watch.end()
    assert ahead.lost_peer() is None


def test_two_threads_may_write_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    watch = Watch(tmp_path, "token", 0, 1, hang_timeout_s=0)
    threads = [threading.Thread(target=lambda: [watch._write() for _ in range(100)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    watch.end()
    assert capsys.readouterr().err == "" and watch.pulse.beats >= 402
    assert json.loads((tmp_path / "rank-0.json").read_text())["phase"] == "end"
    assert [path.name for path in tmp_path.iterdir()] == ["rank-0.json"]


def test_a_watch_ends_with_its_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_folder = tmp_path / "scratch"
    watch = Watch(run_folder / "watch", "token", 0, 1, hang_timeout_s=0)
    shutil.rmtree(run_folder)
    watch._thread.join(timeout=10)
    assert not watch._thread.is_alive() and capsys.readouterr().err == "" and not run_folder.exists()
    watch = Watch(run_folder / "watch", "token", 0, 1, hang_timeout_s=0)
    shutil.rmtree(run_folder / "watch")
    watch._thread.join(timeout=10)
    assert (
        capsys.readouterr().err == f"watch: {run_folder / 'watch'} was deleted: who dies or hangs is no longer told\n"
    )


@pytest.mark.parametrize(
    ("option", "reason"),
    [("data.fatal_items=[4]", "ends the process with SIGKILL"), ("data.hanging_items=[4]", "takes more than")],
)
def test_items_that_kill_or_hang_a_loader_process_are_replaced(tmp_path: Path, option: str, reason: str) -> None:
    flags = ("--max_train_steps", "6", "--max_bad_fraction", "0.2", "--batch_size", "4")
    workers = ("--num_workers", "1", "--sample_timeout_s", "1")
    run(tmp_path / "run", *flags, *workers, option)
    (record,) = [json.loads(line) for line in (tmp_path / "run" / "bad_samples.jsonl").read_text().splitlines()]
    assert record["item"] == 4 and reason in record["reason"] and record["files"] == ["item-4.bin"]
    run(tmp_path / "plain", *flags, "data.bad_items=[4]")
    assert seen(tmp_path / "run") == seen(tmp_path / "plain")  # replaced as an unreadable one is


def test_a_nonfinite_step_can_be_replayed(tmp_path: Path) -> None:
    flags = ("--batch_size", "2", "--max_train_steps", "4", "--max_nonfinite_steps", "0", "data.nan_samples=[5]")
    output = run(tmp_path / "run", *flags, status=1)
    record = tmp_path / "run" / "nonfinite" / "step-2" / "record.json"
    assert f"--replay {record} shows where it begins" in output
    before = sorted(path.name for path in (tmp_path / "run").iterdir())
    output = run(tmp_path / "run", *flags, "--replay", str(record))
    assert "samples [4, 5]" in output and "it begins in the loss itself: every module's output is finite" in output
    assert sorted(p.name for p in (tmp_path / "run").iterdir() if p.name != "replay") == before
    output = run(tmp_path / "run", *flags, "--replay", str(tmp_path / "nothing.json"), status=1)
    assert "there is no such file; records are in nonfinite/step-*/record.json" in output


def test_looking_for_what_is_not_finite_leaves_checkpointed_blocks_as_they_are() -> None:
    block = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.GELU())
    x = torch.ones(2, 4, requires_grad=True)
    with _first_nonfinite_output({"model": block}) as found:
        loss = checkpoint(block, x, use_reentrant=False).sum()
    loss.backward()  # computes the block again, without the hooks
    assert found == [] and torch.isfinite(block[0].weight.grad).all()
