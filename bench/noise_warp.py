"""The noise warp against the same rules written plainly (`plain_noise_warp.py`): time of a step and peak memory.

    python bench/noise_warp.py [--size tiny|small|full] [--turns 3] [--threads 1]

They take turns within one run; what counts is the ratio, taken within each turn. A step must read and write each row of
noise once: copying all of them, in the same turn, shows how near a step comes to that. Processor time is taken with one
thread, else the clock; peak memory is that of a process which does nothing else.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from plain_noise_warp import PlainNoiseWarper
from torch import Tensor
from turns import alone_mib, memory_text, peak_mib, ratio_text, take_turns

from training_ggi.models.noise_warp import NoiseWarper

SIZES = {"tiny": (24, 36), "small": (120, 180), "full": (240, 360)}  # of the flow
CHANNELS, FLOW_SCALE = 16, 8
CPU = torch.device("cpu")
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


def two_steps(variant: str, flow: Tensor) -> None:
    """From the noise on, which counts too where memory is measured."""
    shape = CHANNELS, FLOW_SCALE * flow.shape[1], FLOW_SCALE * flow.shape[2]
    warper = (PlainNoiseWarper if variant == "plain" else NoiseWarper)(torch.randn(shape))
    generator = torch.Generator()
    for _ in range(2):
        warper.step(flow) if variant == "plain" else warper.step(flow, generator)


def measure(kind: str, flow: Tensor, arguments: argparse.Namespace) -> None:
    """Prints the ratio of times, the share of a mere copy, and the ratio of memories."""
    clock = time.process_time if arguments.threads == 1 else time.perf_counter
    work = steps(flow)
    for name in ("ours", "copy"):  # their buffers are taken from the system once
        work[name]()
    turns = take_turns(work, arguments.turns, CPU, clock)
    del work
    copy_s = statistics.median(turn["copy"] for turn in turns)
    share = statistics.median(turn["copy"] / turn["ours"] for turn in turns)
    options = ["--size", arguments.size, "--threads", str(arguments.threads), "--alone", kind]
    peaks = {name: alone_mib(__file__, *options, name) for name in ("plain", "ours")}
    print(
        f"{kind}: {ratio_text(turns, 'plain', 'ours')}; a copy takes {share:.0%} of ours ({copy_s:.3f} s);"
        f" {memory_text(peaks['plain'], peaks['ours'])}",
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
        print(peak_mib(lambda: two_steps(variant, kinds[kind]), CPU))
        return
    for flow in flows(*SIZES["tiny"]).values():
        check(flow)
    for kind in arguments.only or kinds:
        measure(kind, kinds[kind], arguments)


if __name__ == "__main__":
    main()
