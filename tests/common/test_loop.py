"""What the loop promises, proved on a trainer in miniature (`tiny_trainer.py`) that runs as real processes."""

import json
import math
import signal
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from processes import assert_same_state, command, metrics, run, seen, weights

from common.loop import is_overflow, take_step
from common.optim import Learner


@pytest.fixture(scope="module")
def layouts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same global batch of 4 in four ways."""
    root = tmp_path_factory.mktemp("layouts")
    ways = {"1x4": (1, 4, 1), "1x1x4": (1, 1, 4), "2x2": (2, 2, 1), "2x1x2": (2, 1, 2)}
    for name, (processes, batch_size, accumulation) in ways.items():
        flags = ("--batch_size", str(batch_size), "--gradient_accumulation_steps", str(accumulation))
        run(root / name, *flags, "--max_train_steps", "8", "--use_ema", "true", processes=processes)
    return {name: root / name for name in ways}


@pytest.mark.parametrize("way", ["1x1x4", "2x2", "2x1x2"])
def test_processes_and_accumulation_change_nothing(layouts: dict[str, Path], way: str) -> None:
    one, other = layouts["1x4"], layouts[way]
    assert [number for number, *_ in seen(one)] == list(range(32))
    assert seen(other) == seen(one)  # sample ids, augmentation and draws bit for bit
    for ours, reference in zip(metrics(other), metrics(one), strict=True):
        assert ours.get("lr") == reference.get("lr")
        for name in ("loss", "grad_norm", "error"):
            if name in reference:
                assert ours[name] == pytest.approx(reference[name], rel=1e-5), (ours["step"], name)
    for key, value in weights(one, 8).items():
        torch.testing.assert_close(weights(other, 8)[key], value, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("processes", "precision"),
    [
        (1, "bf16"),
        (2, "no"),
        pytest.param(1, "no", marks=pytest.mark.slow),
        pytest.param(2, "bf16", marks=pytest.mark.slow),
    ],
)
def test_resume_is_bit_exact(tmp_path: Path, processes: int, precision: str) -> None:
    flags = ("--batch_size", "2", "--use_ema", "--checkpointing_steps", "5", "--mixed_precision", precision)
    run(tmp_path / "whole", *flags, "--max_train_steps", "11", processes=processes)
    # The interrupted run: the process is killed right after step 7 of the same schedule, beyond its checkpoint.
    run(tmp_path / "cut", *flags, "--max_train_steps", "11", "data.nan_samples=[]", processes=processes)
    for step in (10, 11):
        (tmp_path / "cut" / f"checkpoint-{step}" / "manifest.json").unlink()
    output = run(
        tmp_path / "cut", *flags, "--max_train_steps", "11", "--resume_from_checkpoint", "latest", processes=processes
    )
    assert "checkpoint-11 is passed over" in output and "checkpoint-10 is passed over" in output
    assert "at step 5" in output
    assert metrics(tmp_path / "cut") == metrics(tmp_path / "whole")
    assert_same_state(tmp_path / "cut", tmp_path / "whole", 11)


def test_the_number_of_processes_may_change_on_resume(tmp_path: Path) -> None:
    base = ("--checkpointing_steps", "3", "--max_train_steps", "9", "--resume_from_checkpoint", "latest", "--use_ema")
    run(tmp_path / "whole", *base, "--batch_size", "2", "--gradient_accumulation_steps", "2")
    changing = tmp_path / "changing"
    for processes, accumulation, stop_at in ((1, 2, 3), (2, 1, 6), (1, 2, 9)):
        flags = ("--batch_size", "2", "--gradient_accumulation_steps", str(accumulation))
        run(changing, *base, *flags, processes=processes)
        for checkpoint in changing.glob("checkpoint-*"):
            if int(checkpoint.name.split("-")[1]) > stop_at:
                (checkpoint / "manifest.json").unlink()
    assert [r["lr"] for r in metrics(changing) if r["kind"] == "train"] == [
        r["lr"] for r in metrics(tmp_path / "whole") if r["kind"] == "train"
    ]
    for key, value in weights(tmp_path / "whole", 9).items():
        torch.testing.assert_close(weights(changing, 9)[key], value, rtol=1e-5, atol=1e-5)


def test_a_signal_saves_and_ends_with_status_0(tmp_path: Path) -> None:
    flags = ("--batch_size", "2", "--use_ema", "--max_train_steps", "100000", "--checkpointing_steps", "100000")
    process = subprocess.Popen(command(tmp_path / "run", *flags), stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (tmp_path / "run" / "metrics.jsonl").exists():
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=60)[1]
    assert process.returncode == 0, output
    assert "SIGTERM: saving, then stopping" in output
    (checkpoint,) = (tmp_path / "run").glob("checkpoint-*")
    step = int(checkpoint.name.split("-")[1])
    assert metrics(tmp_path / "run")[-1]["step"] == step
    assert not (tmp_path / "run" / "export").exists()


def test_too_many_bad_items_stop_the_run(tmp_path: Path) -> None:
    flags = ("--batch_size", "3", "--max_train_steps", "30", "data.bad_items=[4,5,7]", "--max_bad_fraction", "0.1")
    output = run(tmp_path / "run", *flags, status=1)
    assert "3 of 21 items could not be read, more than data.max_bad_fraction allows (2.1)" in output
    assert "Traceback" not in output
    records = [json.loads(line) for line in (tmp_path / "run" / "bad_samples.jsonl").read_text().splitlines()]
    assert sorted(record["item"] for record in records) == [4, 5, 7]
    assert records[0]["reason"].endswith("is damaged") and records[0]["files"][0].endswith(".bin")


@pytest.mark.parametrize("processes", [1, 2])
def test_bad_items_are_replaced_alike(tmp_path: Path, processes: int) -> None:
    flags = ("--max_train_steps", "6", "data.bad_items=[4,5]", "--max_bad_fraction", "0.2")
    run(tmp_path / "run", *flags, "--batch_size", str(4 // processes), processes=processes)
    items = [item for _, _, item, *_ in seen(tmp_path / "run")]
    assert len(items) == 24 and not {4, 5} & set(items)
    run(tmp_path / "again", *flags, "--batch_size", "4", "--num_workers", "2")
    assert seen(tmp_path / "again") == seen(tmp_path / "run")


def test_nonfinite_steps_are_skipped_then_stop_the_run(tmp_path: Path) -> None:
    flags = ("--batch_size", "2", "--max_train_steps", "8", "--max_nonfinite_steps", "2")
    run(tmp_path / "skips", *flags, "data.nan_samples=[3,5]")
    records = [r for r in metrics(tmp_path / "skips") if r["kind"] == "train"]
    assert [r["loss"] is None for r in records] == [False, True, True, False, False, False, False, False]
    assert all(torch.isfinite(tensor).all() for tensor in weights(tmp_path / "skips", 8).values())
    output = run(tmp_path / "stops", *flags, "data.nan_samples=[3,5,7]", status=1)
    assert "3 steps in a row were not finite, run.max_nonfinite_steps is 2" in output
    assert "Traceback" not in output
    records = [json.loads(path.read_text()) for path in sorted((tmp_path / "stops").glob("nonfinite/*/record.json"))]
    assert [(r["step"], r["first_sample"], r["last_sample"]) for r in records] == [(1, 2, 3), (2, 4, 5), (3, 6, 7)]


@pytest.mark.parametrize(
    ("loss", "gradient", "weight", "is_scale_to_blame", "scale"),
    [(1.0, 1.0, 0.5, False, 8.0), (1.0, math.inf, 1.0, True, 4.0), (math.nan, 1.0, 1.0, False, 8.0)],
)
def test_a_step_in_fp16(
    clean_process: None, loss: float, gradient: float, weight: float, is_scale_to_blame: bool, scale: float
) -> None:
    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.ones_(model.weight)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(torch.zeros(()))  # which is when it begins
    Accelerator(cpu=True)
    optimizer: Any = AcceleratedOptimizer(torch.optim.SGD(model.parameters(), lr=0.5), scaler=scaler)
    run: Any = SimpleNamespace(accelerator=SimpleNamespace(scaler=scaler), step=0, total_steps=9)
    model.weight.grad = torch.full((1, 1), 8.0 * gradient)
    scaler.unscale_(optimizer.optimizer)
    finite = math.isfinite(loss) and math.isfinite(gradient)
    assert (not finite and is_overflow(run.accelerator, loss)) == is_scale_to_blame
    take_step(run, Learner(model, optimizer, lambda step: 0.5, 0.0), finite)
    assert (model.weight.item(), scaler.get_scale(), model.weight.grad) == (weight, scale, None)
    scaler.unscale_(optimizer.optimizer)  # the next step can begin


def test_a_used_folder_and_a_missing_checkpoint_are_refused(tmp_path: Path) -> None:
    flags = ("--batch_size", "2", "--max_train_steps", "2")
    run(tmp_path / "run", *flags)
    output = run(tmp_path / "run", *flags, status=1)
    assert "already holds checkpoint-2 of an earlier run: continue it with --resume_from_checkpoint latest" in output
    output = run(tmp_path / "run", *flags, "--resume_from_checkpoint", "checkpoint-7", status=1)
    assert "there is no checkpoint 'checkpoint-7'" in output and "checkpoint-2" in output
    output = run(tmp_path / "run", *flags, "--resume_from_checkpoint", "checkpoint-2/", "--seed", "5", status=1)
    assert "run.seed: 0 in the checkpoint, 5 now" in output and "--allow_changed run.seed" in output
    more = ("--resume_from_checkpoint", "latest", "--seed", "5", "--allow_changed", "run.seed")
    more += ("--max_train_steps", "3", "--adam_weight_decay", "0.5")
    output = run(tmp_path / "run", "--batch_size", "2", *more)
    assert "changed since checkpoint-2: run.max_train_steps: 2 in the checkpoint, 3 now" in output
    assert "changed since checkpoint-2: optim.adam_weight_decay: 0.01 in the checkpoint, 0.5 now" in output
    optimizer = torch.load(tmp_path / "run" / "checkpoint-3" / "optimizer.bin", weights_only=True)
    assert [group["weight_decay"] for group in optimizer["param_groups"]] == [0.5]


def test_rotation_keeps_the_newest(tmp_path: Path) -> None:
    flags = ("--batch_size", "2", "--checkpointing_steps", "2", "--checkpoints_total_limit", "2")
    run(tmp_path / "run", *flags, "--max_train_steps", "9")
    assert sorted(p.name for p in (tmp_path / "run").glob("checkpoint-*")) == ["checkpoint-8", "checkpoint-9"]


def test_a_batch_larger_than_the_data_is_refused(tmp_path: Path) -> None:
    output = run(tmp_path / "run", "--batch_size", "22", "--max_train_steps", "1", status=1)
    assert "data.batch_size 22 x 1 processes is 22, the training items are 21" in output
    assert not (tmp_path / "run").exists()
