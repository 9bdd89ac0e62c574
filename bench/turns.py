"""Variants of one piece of work that take turns within one run: ratios of their times, and of their peak memory."""

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from common.runtime import quiet_libraries

Work = Callable[[], Any]


def seconds(work: Work, device: torch.device, clock: Callable[[], float] | None = None) -> float:
    """Processor time of one call on a CPU, else its duration with what it left for the device to do.

    Args:
        clock: another clock than that, in seconds.
    """
    clock = clock or (time.process_time if device.type == "cpu" else time.perf_counter)
    start = clock()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return clock() - start


def take_turns(
    works: Mapping[str, Work], count: int, device: torch.device, clock: Callable[[], float] | None = None
) -> list[dict[str, float]]:
    """The `seconds` of each work by its name, `count` times; the order is reversed from turn to turn."""
    order, turns = list(works), []
    for _ in range(count):
        turns.append({name: seconds(works[name], device, clock) for name in order})
        order.reverse()
    return turns


def ratio_text(turns: Sequence[Mapping[str, float]], slow: str, fast: str, *more: str) -> str:
    """Median and range of the ratios slow / fast, each taken within a turn; both medians and `more` in brackets."""
    ratios = [turn[slow] / turn[fast] for turn in turns]
    slow_s, fast_s = (statistics.median(turn[name] for turn in turns) for name in (slow, fast))
    least_to_most = f"x{min(ratios):.3g} to x{max(ratios):.3g} in {len(turns)} turns"
    details = "; ".join((least_to_most, f"medians {slow_s:.3g} s and {fast_s:.3g} s", *more))
    return f"x{statistics.median(ratios):.3g} ({details})"


def difference(one: Tensor, other: Tensor) -> float:
    """|one - other| over |other|."""
    return ((one.double() - other.double()).norm() / other.double().norm().clamp_min(1e-30)).item()


# ----------------------------------------------------------------------------------------------------------------------
# Memory


def peak_mib(work: Work, device: torch.device) -> float:
    """Memory beyond what is held now, at its most during a call; on a CPU right only in a process that freed little."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    Path("/proc/self/clear_refs").write_text("5", "ascii")  # makes the peak begin anew
    before = _status_kib("VmRSS")
    work()
    return (_status_kib("VmHWM") - before) / 2**10


def _status_kib(name: str) -> int:
    lines = Path("/proc/self/status").read_text("ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))


def alone_mib(script: str, *arguments: str) -> float:
    """What `script` prints with these arguments: `peak_mib` in a process that does nothing else."""
    command = [sys.executable, script, *arguments]
    return float(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def memory_text(slow_mib: float, fast_mib: float) -> str:
    return f"memory x{slow_mib / fast_mib:.3g} ({slow_mib:.0f} MiB and {fast_mib:.0f} MiB)"


# ----------------------------------------------------------------------------------------------------------------------
# With a cache and without


class RowCounter:
    """Counts the rows that a UNet is called with."""

    def __init__(self, unet: torch.nn.Module):
        self.rows = 0
        unet.register_forward_pre_hook(self._count)

    def _count(self, module: torch.nn.Module, inputs: tuple[Any, ...]) -> None:
        self.rows += inputs[0].shape[0]

    def take(self) -> int:
        """The rows since the last call."""
        rows, self.rows = self.rows, 0
        return rows


def compare(title: str, baseline: Work, cached: Work, counter: RowCounter, repeats: int, device: torch.device) -> None:
    """Prints median and range of the ratios baseline / cached; who begins alternates.

    One warm-up each is not timed: it counts floating-point operations of products and convolutions, and UNet rows.
    """
    rows, flops = [], []
    for work in (baseline, cached):
        counter.take()
        with FlopCounterMode(display=False) as flop_counter:
            work()
        rows.append(counter.take())
        flops.append(flop_counter.get_total_flops())
    turns = take_turns({"baseline": baseline, "cached": cached}, repeats, device)
    operations = f"operations {flops[0] / 1e9:.3g} G and {flops[1] / 1e9:.3g} G, x{flops[0] / flops[1]:.2f}"
    counted = operations, f"UNet rows {rows[0]} and {rows[1]}"
    print(f"{title}: {ratio_text(turns, 'baseline', 'cached', *counted)}", flush=True)


def training_step(
    loss: Callable[[dict[str, Any]], Tensor], optimizer: torch.optim.Optimizer, device: torch.device, dtype: torch.dtype
) -> Callable[[dict[str, Any]], None]:
    """One optimizer step on a batch: forward under autocast unless float32, backward, step."""

    def step(batch: dict[str, Any]) -> None:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            value = loss(batch)
        value.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def arguments_of(description: str | None, sizes: Iterable[str], *more: tuple[str, int, str]) -> argparse.Namespace:
    """--size, --device, --repeats and `more` whole numbers (flag, default, help); prepares torch for measuring.

    `dtype` is added to what is returned: bfloat16 on a GPU, else float32. On a CPU one thread runs.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=sizes, default="medium", help="tiny shows that it runs, and measures nothing")
    add_device(parser)
    for flag, default, meaning in (("--repeats", 5, "timed turns per comparison"), *more):
        parser.add_argument(flag, type=int, default=default, help=meaning)
    arguments = parser.parse_args()
    quiet_libraries()
    torch.manual_seed(0)
    arguments.device = torch.device(arguments.device)
    arguments.dtype = torch.bfloat16 if arguments.device.type == "cuda" else torch.float32
    if arguments.device.type == "cpu":
        torch.set_num_threads(1)
    print(f"size {arguments.size}, {arguments.device}, {arguments.dtype}, torch {torch.__version__}", flush=True)
    return arguments


def add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
