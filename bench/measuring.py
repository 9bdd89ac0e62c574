"""What measuring costs: the loop's own bookkeeping of a step against the step, `python bench/measuring.py`.

The bookkeeping is what `common.loop.fit` does for phases, throughput, memory and FLOPs; the step is forward, backward
and AdamW of a small convolutional network, far shorter than any real one, so the share is an upper bound.
"""

import statistics
import tempfile
import time
from pathlib import Path

import torch
from torch import nn

from common.measure import Meter
from common.watch import Watch

STEPS, MICRO_BATCHES, TURNS = 40, 4, 5


def bookkeeping(watch: Watch, meter: Meter) -> None:
    """What is measured in one optimizer step."""
    meter.profile(1)
    for _ in range(MICRO_BATCHES):
        with watch.phase("data", step=1, samples=[0, 1]):
            pass
        with watch.phase("collective"), meter.counting(), watch.phase("forward", samples=[0, 1]):
            pass
        with watch.phase("backward"):
            pass
    with watch.phase("collective"):
        pass
    with watch.phase("optimizer"):
        pass
    meter.of_step(1.0, watch.take_seconds(), 4)


def main() -> None:
    """Prints the share of a step that measuring takes: the median of some turns, and their range."""
    torch.set_num_threads(1)
    model = nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), nn.SiLU(), nn.Conv2d(32, 3, 3, padding=1))
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    x = torch.randn(1, 3, 128, 128)  # (B, 3, H, W)
    shares = []
    with tempfile.TemporaryDirectory() as folder:
        watch = Watch(Path(folder), "bench", 0, 1, hang_timeout_s=0)
        meter = Meter(x.device, MICRO_BATCHES, None, Path(folder) / "trace.json")
        meter.flops_per_step = {"model": 1}  # as after the first step
        for _ in range(TURNS):
            measured_s = step_s = 0.0
            for _ in range(STEPS):
                started = time.perf_counter()
                bookkeeping(watch, meter)
                measured_s += time.perf_counter() - started
                started = time.perf_counter()
                for _ in range(MICRO_BATCHES):
                    (model(x) - x).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
                step_s += time.perf_counter() - started
            shares.append(100 * measured_s / step_s)
        watch.end()
    print(f"measuring takes {statistics.median(shares):.2f} % of a step ({min(shares):.2f} to {max(shares):.2f})")


if __name__ == "__main__":
    main()
