"""The noise warp against the same rules written plainly (`plain_noise_warp.py`): time of a step and peak memory.

    python bench/noise_warp.py [--size tiny|small|full] [--turns 3] [--threads 1]

They take turns within one run; what counts is the ratio, taken within each turn. A step must read and write each row of
noise once: copying all of them, in the same turn, shows how near a step comes to that. Processor time is taken with one
thread, else the clock; peak memory is that of a process which does nothing else.
"""

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from plain_noise_warp import PlainNoiseWarper
from torch import Tensor

from training_ggi.models.noise_warp import NoiseWarper

SIZES = {"tiny": (24, 36), "small": (120, 180), "full": (240, 360)}  # of the flow
CHANNELS, FLOW_SCALE = 16, 8
Step = Callable[[], object]


def flows(height: int, width: int) -> dict[str, Tensor]:
    """{kind: (2, height, width)}"""
    y, x = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij")
    camera = torch.stack([0.01 * width / 2 * x + 2.0, 0.01 * height / 2 * y - 1.0])  # 1 % nearer, and panning
    near = ((x + 0.3).square() + (y - 0.1).square() < 0.15) | (y > 0.7)  # 18 % of the frame move twice as fast
    generator = torch.Generator().manual_seed(0)
    bumps = torch.randn(1, 2, height // 8, width // 8, generator=generator)
    return {
        "still": torch.zeros(2, height, width),
        "camera": torch.where(near, 2 * camera, camera),
        "rough": F.interpolate(bumps, size=(height, width), mode="bicubic")[0],
    }


def initial_noise(flow: Tensor) -> Tensor:
    """(C, H, W), of which no two values of channel 0 are the same if there are few."""
    _, height, width = flow.shape
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(CHANNELS, FLOW_SCALE * height, FLOW_SCALE * width, generator=generator)
    ranks = torch.randperm(noise[0].numel(), generator=generator).view_as(noise[0]).double()
    noise[0] = torch.special.ndtri((ranks + 0.5) / ranks.numel())
    return noise


def steps(flow: Tensor) -> dict[str, Step]:
    """One step of each, from where the one before ended, and a copy of all noise."""
    noise = initial_noise(flow)
    plain, ours, generator = PlainNoiseWarper(noise), NoiseWarper(noise), torch.Generator().manual_seed(1)
    rows = noise.view(-1, CHANNELS)
    copy = rows.clone()
    return {
        "plain": lambda: plain.step(flow),
        "ours": lambda: ours.step(flow, generator),
        "copy": lambda: copy.copy_(rows),
    }


def check(flow: Tensor) -> None:
    """Raises ValueError where a step of both, with the same draw, differs."""
    noise = initial_noise(flow)
    draw = torch.randn(CHANNELS, noise.shape[1], 2 * noise.shape[2], generator=torch.Generator().manual_seed(1))
    plain, ours = PlainNoiseWarper(noise), NoiseWarper(noise)
    plain.step(flow, draw)
    ours.step(flow, draw)
    for name in ("noise", "weight"):
        error = (getattr(plain, name) - getattr(ours, name)).abs().max().item()
        if not error < 1e-4:
            raise ValueError(f"{name} of both differs by {error:.2g} after a step, more than 1e-4")


def peak_mib(variant: str, flow: Tensor) -> float:
    """Of the noise and two steps, beyond what Python and torch take."""
    Path("/proc/self/clear_refs").write_text("5", "ascii")  # makes the peak begin anew
    before = _kib("VmRSS")
    shape = CHANNELS, FLOW_SCALE * flow.shape[1], FLOW_SCALE * flow.shape[2]
    warper = (PlainNoiseWarper if variant == "plain" else NoiseWarper)(torch.randn(shape))
    generator = torch.Generator()
    for _ in range(2):
        warper.step(flow) if variant == "plain" else warper.step(flow, generator)
    return (_kib("VmHWM") - before) / 2**10


def _kib(name: str) -> int:
    lines = Path("/proc/self/status").read_text("ascii").splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1])


def peak_alone_mib(arguments: argparse.Namespace, kind: str, variant: str) -> float:
    """`peak_mib` of a process of its own."""
    options = ["--size", arguments.size, "--threads", str(arguments.threads), "--alone", kind, variant]
    command = [sys.executable, __file__, *options]
    return float(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def measure(kind: str, flow: Tensor, arguments: argparse.Namespace) -> None:
    """Prints the ratio of times, the share of a mere copy, and the ratio of memories."""
    clock = time.process_time if arguments.threads == 1 else time.perf_counter
    work = steps(flow)
    for name in ("ours", "copy"):  # their buffers are taken from the system once
        work[name]()
    turns = []
    for turn in range(arguments.turns):
        order = ("plain", "ours", "copy") if turn % 2 == 0 else ("copy", "ours", "plain")
        seconds = {}
        for name in order:
            started = clock()
            work[name]()
            seconds[name] = clock() - started
        turns.append(seconds)
    del work
    median = {name: statistics.median(turn[name] for turn in turns) for name in turns[0]}
    ratios = sorted(turn["plain"] / turn["ours"] for turn in turns)
    share = statistics.median(turn["copy"] / turn["ours"] for turn in turns)
    peaks = {name: peak_alone_mib(arguments, kind, name) for name in ("plain", "ours")}
    print(
        f"{kind}: x{statistics.median(ratios):.1f} (x{ratios[0]:.1f} to x{ratios[-1]:.1f} in {len(turns)} turns;"
        f" medians {median['plain']:.3f} s and {median['ours']:.3f} s);"
        f" a copy takes {share:.0%} of ours ({median['copy']:.3f} s);"
        f" memory x{peaks['plain'] / peaks['ours']:.1f} ({peaks['plain']:.0f} MiB and {peaks['ours']:.0f} MiB)",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="full")
    parser.add_argument("--only", nargs="+", metavar="KIND", help="kinds of flow: still, camera, rough")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--alone", nargs=2, metavar=("KIND", "VARIANT"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    kinds = flows(*SIZES[arguments.size])
    if arguments.alone:
        kind, variant = arguments.alone
        print(peak_mib(variant, kinds[kind]))
        return
    for flow in flows(*SIZES["tiny"]).values():
        check(flow)
    for kind in arguments.only or kinds:
        measure(kind, kinds[kind], arguments)


if __name__ == "__main__":
    main()
