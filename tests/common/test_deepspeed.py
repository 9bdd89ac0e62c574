"""The loop under DeepSpeed ZeRO-2, on the CPU (extra `deepspeed`)."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from processes import BASE, TINY, metrics, weights
from processes import run as run_plain

ROOT = Path(__file__).parents[2]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not importlib.util.find_spec("deepspeed"), reason="needs the extra deepspeed"),
]


def run(output_dir: Path, *flags: str, processes: int) -> str:
    """Runs the tiny trainer as the documented launcher file says, and returns what it printed."""
    launch = [str(Path(sys.executable).with_name("accelerate")), "launch", "--num_processes", str(processes)]
    launch += ["--config_file", str(ROOT / "accelerate_configs" / "1_gpus_zero2.yaml"), "--main_process_port", "0"]
    command = [*launch, str(TINY), "--output_dir", str(output_dir), *BASE, *flags]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, cwd=output_dir.parent, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.mark.parametrize(("processes", "precision"), [(1, "bf16"), (2, "no")])
def test_resume_is_bit_exact_under_zero_2(tmp_path: Path, processes: int, precision: str) -> None:
    flags = ["--batch_size", "2", "--gradient_accumulation_steps", "2", "--use_ema", "--checkpointing_steps", "3"]
    flags += ["--mixed_precision", precision, "--max_train_steps", "6"]
    run(tmp_path / "whole", *flags, processes=processes)
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    for name in ("checkpoint-6", "export"):
        shutil.rmtree(tmp_path / "cut" / name)
    output = run(tmp_path / "cut", *flags, "--resume_from_checkpoint", "latest", processes=processes)
    assert "at step 3" in output
    assert metrics(tmp_path / "cut") == metrics(tmp_path / "whole")
    expected = weights(tmp_path / "whole", 6)
    assert all(torch.equal(value, expected[key]) for key, value in weights(tmp_path / "cut", 6).items())


def test_zero_2_computes_what_plain_training_does(tmp_path: Path) -> None:
    flags = ["--batch_size", "2", "--max_train_steps", "5", "--mixed_precision", "no", "--max_grad_norm", "0"]
    run(tmp_path / "zero", *flags, processes=2)
    run_plain(tmp_path / "plain", *flags, processes=2)
    for ours, reference in zip(metrics(tmp_path / "zero"), metrics(tmp_path / "plain"), strict=True):
        for name in ("loss", "lr", "error"):
            if name in reference:
                assert ours[name] == pytest.approx(reference[name], rel=1e-4), (ours["step"], name)
    for key, value in weights(tmp_path / "plain", 5).items():
        torch.testing.assert_close(weights(tmp_path / "zero", 5)[key], value, rtol=1e-4, atol=1e-5)


def test_a_step_whose_gradient_is_not_finite_changes_nothing(tmp_path: Path) -> None:
    flags = ["--batch_size", "2", "--max_train_steps", "4", "--checkpointing_steps", "1", "data.nan_samples=[3]"]
    run(tmp_path / "run", *flags, processes=1)
    trained = [record for record in metrics(tmp_path / "run") if record["kind"] == "train"]
    assert [record["loss"] is None for record in trained] == [False, True, False, False]
    steps = [weights(tmp_path / "run", step) for step in (1, 2, 3)]
    assert [all(torch.equal(a[key], b[key]) for key in a) for a, b in zip(steps, steps[1:], strict=False)] == [
        True,
        False,
    ]


def test_another_number_of_processes_is_refused(tmp_path: Path) -> None:
    flags = ["--batch_size", "1", "--max_train_steps", "2"]
    run(tmp_path / "run", *flags, processes=2)
    command = [sys.executable, str(TINY), "--output_dir", str(tmp_path / "run"), *BASE, *flags]
    command += ["--gradient_accumulation_steps", "2", "--resume_from_checkpoint", "latest"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "made by 2 processes with DeepSpeed, and this run is 1 processes without DeepSpeed" in done.stderr
