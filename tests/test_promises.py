"""What is promised holds for every trainer: one test for each promise, run for each trainer on a tiny checkpoint.

Promises that need no training of their own have their tests elsewhere; README.md has the whole table.
"""

import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from running import ROOT, assert_close, assert_same_checkpoint, entries, launch, metrics, refused, steps_of, train
from trainers import STEPS, TRAINERS, Trainer, with_other_weights

ACCUMULATED, SPLIT = (f"optim.gradient_accumulation_steps={count}" for count in (2, 1))  # one global batch in two ways
LATEST = "checkpoint.resume_from_checkpoint=latest"
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")  # of a BatchNorm that nothing reads in training

pytestmark = pytest.mark.usefixtures("clean_process")


@pytest.fixture(params=TRAINERS.values(), ids=TRAINERS.keys())
def trainer(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Trainer:
    """Each of the five; the test works in the folder where its users do."""
    monkeypatch.chdir(ROOT / request.param.folder)
    return request.param


@pytest.fixture
def words(trainer: Trainer, tiny: Callable[[str], Path]) -> list[str]:
    """The command of a small run of the trainer."""
    return trainer.command(tiny(trainer.name))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where runs are kept that several tests look at."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture
def whole(trainer: Trainer, words: list[str], runs: Path) -> Path:
    """A run of one process that was never stopped."""
    folder = runs / f"{trainer.name}-whole"
    if not folder.exists():
        train(trainer.name, *words, ACCUMULATED, f"run.output_dir={folder}")
    return folder


@pytest.fixture
def two(trainer: Trainer, words: list[str], runs: Path) -> Path:
    """The same of two processes, as documented."""
    folder = runs / f"{trainer.name}-two"
    if not folder.exists():
        launch(*documented(trainer), *words, SPLIT, f"run.output_dir={folder}", folder=ROOT / trainer.folder)
    return folder


def documented(trainer: Trainer) -> list[str]:
    """The documented command for two processes, up to its settings."""
    return [*trainer.launcher.split(), trainer.script]


def left_after(run: Path, step: int, copy: Path) -> Path:
    """A copy of a finished run as a kill after `step` would have left it."""
    shutil.copytree(run, copy)
    shutil.rmtree(copy / "export")
    for newer in range(step + 1, STEPS + 1):
        shutil.rmtree(copy / f"checkpoint-{newer}")
    return copy


def during_step(trainer: Trainer, monkeypatch: pytest.MonkeyPatch, step: int, action: Callable) -> None:
    """Has `action` look at, and replace, what the task returns in one optimizer step."""
    task = getattr(importlib.import_module(f"{trainer.name}.task"), trainer.task)
    original = task.training_step

    def training_step(self, batch: dict, at: int):
        output = original(self, batch, at)
        return action(output) if at == step else output

    monkeypatch.setattr(task, "training_step", training_step)


# Going on -------------------------------------------------------------------------------------------------------------


def test_a_killed_run_resumes(trainer: Trainer, words: list[str], whole: Path, tmp_path: Path) -> None:
    """SIGKILL to the documented script; the same words again end as if nothing had happened."""
    words = [*words, ACCUMULATED, f"run.output_dir={tmp_path / 'run'}"]
    with open(tmp_path / "output", "wb") as output:
        process = subprocess.Popen([sys.executable, trainer.script, *words], stdout=output, stderr=output)
        deadline = time.monotonic() + 120
        while process.poll() is None and not steps_of(tmp_path / "run") and time.monotonic() < deadline:
            time.sleep(0.002)
        assert process.poll() is None, (tmp_path / "output").read_text()
        process.kill()
        process.wait()
    assert steps_of(tmp_path / "run") and not (tmp_path / "run" / "export").exists()
    train(trainer.name, *words, LATEST)
    assert metrics(tmp_path / "run") == metrics(whole)
    assert_same_checkpoint(tmp_path / "run" / f"checkpoint-{STEPS}", whole / f"checkpoint-{STEPS}")


def test_the_stop_signal_saves(
    trainer: Trainer, words: list[str], whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGTERM ends the command with status 0 after a checkpoint, from which it goes on bit for bit."""

    asked = []

    def ask_to_stop(output: object) -> object:
        if not asked:  # a second signal would stop at once
            asked.append(True)
            os.kill(os.getpid(), signal.SIGTERM)
        return output

    words = [*words, ACCUMULATED, f"run.output_dir={tmp_path / 'run'}", "checkpoint.checkpointing_steps=100"]
    with monkeypatch.context() as patch:
        during_step(trainer, patch, 1, ask_to_stop)
        train(trainer.name, *words)  # raises SystemExit for any status but 0
    assert steps_of(tmp_path / "run") == [2] and not (tmp_path / "run" / "export").exists()
    train(trainer.name, *words, LATEST)
    assert metrics(tmp_path / "run") == metrics(whole)
    assert_same_checkpoint(tmp_path / "run" / f"checkpoint-{STEPS}", whole / f"checkpoint-{STEPS}")


def test_two_processes_match_one(trainer: Trainer, whole: Path, two: Path) -> None:
    """The documented command with two processes trains what one does that accumulates two micro-batches."""
    assert_close(two, whole, trainer.tolerance)
    assert (two / f"checkpoint-{STEPS}" / "random_states_1.pkl").exists()  # every process saves
    assert {path.name for path in (two / "export").iterdir()} == {path.name for path in (whole / "export").iterdir()}


def test_one_process_continues_a_run_of_two(
    trainer: Trainer, words: list[str], whole: Path, two: Path, tmp_path: Path
) -> None:
    run = left_after(two, 2, tmp_path / "run")
    train(trainer.name, *words, ACCUMULATED, f"run.output_dir={run}", LATEST)
    assert_close(run, whole, trainer.tolerance)
    assert steps_of(run) == [1, 2, 3, 4]


@pytest.mark.slow
def test_two_processes_continue_a_run_of_one(trainer: Trainer, words: list[str], whole: Path, tmp_path: Path) -> None:
    run = left_after(whole, 2, tmp_path / "run")
    launch(*documented(trainer), *words, SPLIT, f"run.output_dir={run}", LATEST, folder=ROOT / trainer.folder)
    assert_close(run, whole, trainer.tolerance)


def test_settings_that_break_the_state_are_refused_on_resume(
    trainer: Trainer, words: list[str], whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    message = refused(capsys, trainer.name, *words, ACCUMULATED, f"run.output_dir={whole}", LATEST, "run.seed=7")
    seed = json.loads((whole / "checkpoint-1" / "trainer_state.json").read_text())["config"]["run"]["seed"]
    assert f"run.seed: {seed} in the checkpoint, 7 now" in message and "--allow_changed run.seed" in message
    assert steps_of(whole) == [1, 2, 3, 4]


# What may go wrong ----------------------------------------------------------------------------------------------------


def test_a_nonfinite_step_is_skipped_recorded_and_replayed(
    trainer: Trainer,
    words: list[str],
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def poison(output):
        output.loss = output.loss * torch.nan
        return output

    run, steps = tmp_path / "run", (1, 2)  # two in a row, so that the networks of a GAN are both met
    words = [*words, f"run.output_dir={run}", "run.max_train_steps=3"]
    with monkeypatch.context() as patch:
        for step in steps:
            during_step(trainer, patch, step, poison)
        train(trainer.name, *words, ACCUMULATED)
        records = [record for record in metrics(run) if record["kind"] != "validation"]
        assert [record["loss"] is None for record in records] == [False, True, True]
        assert records[0] == metrics(whole)[0]
        assert_same_checkpoint(run / "checkpoint-3", run / "checkpoint-1", but_for=(*STATISTICS, "lr"))
        capsys.readouterr()
        train(trainer.name, *words, ACCUMULATED, f"run.replay={run}/nonfinite/step-1/record.json")
        found = capsys.readouterr().err
    assert "micro-batch 1 of 2 (samples [2]" in found and "micro-batch 2 of 2 (samples [3]" in found
    assert found.count("it begins in the loss itself: every module's output is finite") == 2
    # Without what spoilt it, it is the step that a run without it took.
    train(trainer.name, *words, ACCUMULATED, f"run.replay={run}/nonfinite/step-1/record.json")
    found = capsys.readouterr().err
    losses = [float(line.split("loss ")[1].split()[0]) for line in found.splitlines() if "all gradients are" in line]
    assert len(losses) == 2 and sum(losses) / 2 == pytest.approx(metrics(whole)[1]["loss"], rel=1e-5)


def test_unreadable_files_are_replaced_and_recorded(
    trainer: Trainer, tiny: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # So few records are all looked at before the start, and refused.
    monkeypatch.setattr("diffnext.data.dataset.NUM_CHECKED", 2)
    shutil.copytree(tiny(trainer.name) / "data", tmp_path / "data")
    damaged = trainer.damage(tmp_path / "data")
    words = trainer.command(tiny(trainer.name), data=tmp_path / "data", cache=tmp_path / "cache")
    train(trainer.name, *words, ACCUMULATED, f"run.output_dir={tmp_path / 'run'}", "data.max_bad_fraction=0.5")
    records = [json.loads(line) for line in (tmp_path / "run" / "bad_samples.jsonl").read_text().splitlines()]
    assert records and all(damaged.name in record["reason"] for record in records)
    assert all(any(damaged.is_relative_to(path) for path in record["files"]) for record in records)
    assert metrics(tmp_path / "run")[-1]["step"] == STEPS and (tmp_path / "run" / "export").exists()


CACHING = [trainer for trainer in TRAINERS.values() if trainer.cached]


@pytest.mark.parametrize("trainer", CACHING, ids=lambda trainer: trainer.name, indirect=True)
def test_a_cache_of_other_weights_or_settings_is_refused(
    trainer: Trainer, whole: Path, tiny: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, more = tiny(trainer.name), [ACCUMULATED, f"run.output_dir={tmp_path / 'run'}"]
    before = entries(folder / "cache")  # of `whole`
    setting, difference = trainer.cached
    other_model = with_other_weights(folder / "model", "vae", tmp_path / "model")
    for words, text in (
        (trainer.command(folder, model=other_model), "vae_sha256 was '"),
        ([*trainer.command(folder), *setting.split()], difference),
    ):
        message = refused(capsys, trainer.name, *words, *more)
        assert f"the cache {folder / 'cache'} does not belong to this run: " in message and text in message
        assert "Name another folder, or delete this one to have it made again" in message
    assert before and entries(folder / "cache") == before


def test_preflight_tries_everything_and_leaves_nothing(
    trainer: Trainer, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        train(trainer.name, *words, SPLIT, f"run.output_dir={tmp_path / 'run'}", "run.preflight=true")
    printed = capsys.readouterr()
    assert ended.value.code == 0, printed.err
    assert "trained, validated, saved, resumed, exported in" in printed.out and "ready to train" in printed.out
    assert [path.name for path in tmp_path.iterdir()] == ["run-preflight-samples.png"]


# The table in README.md -----------------------------------------------------------------------------------------------


def missing_cells(text: str) -> list[str]:
    """Tests that tables name and that are not there.

    A cell names a test in full (`path::function`), or as `[trainer]`: then the row begins with the path and function.
    """
    missing = []
    for line in text.splitlines():
        row = re.match(r"\|[^|]*?`((?:tests/)?[\w/]+\.py)::(\w+)`", line)
        short = re.findall(r"`\[(\w+)\]`", line) if line.startswith("|") else []
        named = [(row[1], row[2], trainer) for trainer in short] if row else [("no file", "no test", t) for t in short]
        named += re.findall(r"`((?:tests/)?[\w/]*test_\w+\.py)::(\w+)(?:\[([\w-]+)\])?`", line)
        for path, function, trainer in named:
            files = [ROOT / path] if path.startswith("tests/") else list((ROOT / "tests").rglob(path))
            found = any(f"def {function}(" in file.read_text() for file in files if file.is_file())
            is_of_all = path.endswith("test_promises.py")
            if not found or (is_of_all and trainer and trainer not in TRAINERS):
                missing.append(f"{path}::{function}" + (f"[{trainer}]" if trainer else ""))
    return missing


def test_the_table_of_promises_names_tests_that_are_there() -> None:
    assert missing_cells((ROOT / "README.md").read_text(encoding="utf-8")) == []


def test_cells_without_a_test_are_found() -> None:
    table = """
    | killed `tests/test_promises.py::test_a_killed_run_resumes` | `[vae]` | `[nova]` |
    | signals | `[vae]` | `tests/common/test_loop.py::test_nothing` |
    | caches | `test_cache.py::test_a_missing_entry_is_named` | `test_promises.py::test_preflight[vae]` |
    """
    assert missing_cells(table.replace("    |", "|")) == [
        "tests/test_promises.py::test_a_killed_run_resumes[nova]",
        "no file::no test[vae]",
        "tests/common/test_loop.py::test_nothing",
        "test_promises.py::test_preflight[vae]",
    ]
