"""Two variants of one piece of work that take turns within one run: the ratio of their times."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode


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


def seconds(work: Callable[[], Any], device: torch.device) -> float:
    """Processor time of one call on a CPU, else its duration with what it left for the device to do."""
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    start = clock()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return clock() - start


def compare(
    title: str,
    baseline: Callable[[], Any],
    cached: Callable[[], Any],
    counter: RowCounter,
    repeats: int,
    device: torch.device,
) -> None:
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
    pairs = []
    for turn in range(repeats):
        order = (baseline, cached) if turn % 2 == 0 else (cached, baseline)
        times = {work: seconds(work, device) for work in order}
        pairs.append((times[baseline], times[cached]))
    ratios = [slow / fast for slow, fast in pairs]
    slow, fast = (statistics.median(column) for column in zip(*pairs, strict=True))
    print(
        f"{title}: x{statistics.median(ratios):.2f} (x{min(ratios):.2f} to x{max(ratios):.2f} in {repeats} turns; "
        f"medians {slow:.2f} s and {fast:.2f} s; operations {flops[0] / 1e9:.3g} G and {flops[1] / 1e9:.3g} G, "
        f"x{flops[0] / flops[1]:.2f}; UNet rows {rows[0]} and {rows[1]})",
        flush=True,
    )
