"""Starting the trainer in miniature (`tiny_trainer.py`) as real processes, and reading what it left."""

import subprocess
import sys
from pathlib import Path

import torch
from running import assert_same_checkpoint, metrics
from safetensors.torch import load_file

__all__ = ["assert_same_state", "command", "metrics", "run", "seen", "weights"]

TINY = Path(__file__).with_name("tiny_trainer.py")
BASE = ("--report_to", "none", "--learning_rate", "1e-2", "--lr_scheduler", "cosine", "--lr_warmup_steps", "3")


def command(output_dir: Path, *flags: str, processes: int = 1) -> list[str]:
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return [*launcher, str(TINY), "--output_dir", str(output_dir), *BASE, *flags]


def run(output_dir: Path, *flags: str, processes: int = 1, status: int = 0) -> str:
    """Runs the tiny trainer to its end; returns what it printed."""
    done = subprocess.run(
        command(output_dir, *flags, processes=processes),
        capture_output=True,
        text=True,
        timeout=240,
        cwd=output_dir.parent,
    )
    assert (done.returncode == 0) == (status == 0), done.stdout + done.stderr
    return done.stdout + done.stderr


def seen(output_dir: Path) -> list[tuple]:
    """(sample, step, item, data, noise) of all processes, in the order of the sample numbers."""
    lines = [line.split() for path in output_dir.glob("seen-*.txt") for line in path.read_text().splitlines()]
    return sorted((int(number), int(step), int(item), x, noise) for step, number, item, x, noise in lines)


def weights(output_dir: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(output_dir / f"checkpoint-{step}" / "model" / "model.safetensors")


def assert_same_state(left: Path, right: Path, step: int) -> None:
    """Weights, moving average and optimizer of two runs are equal bit for bit."""
    assert_same_checkpoint(left / f"checkpoint-{step}", right / f"checkpoint-{step}")
