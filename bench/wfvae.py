"""WF-VAE against the same maths written plainly (`plain_wfvae.py`): time and peak memory of coding and training.

    python bench/wfvae.py [--size tiny|small|large] [--device cpu|cuda] [--only encode decode ...]

Both have the same weights and, checked first, the same results up to rounding. They take turns within one run; what
counts is the ratio, taken within each turn. On a CPU one thread runs, its processor time is taken, and peak memory is
that of a process which does nothing else.
"""

import argparse
import json
import statistics
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from plain_wfvae import PlainTraining, PlainWFVAE
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from turns import add_device, alone_mib, difference, memory_text, peak_mib, ratio_text, seconds, take_turns

from common.optim import EMA
from vae.models.discriminator import NLayerDiscriminator3D, RealAndFake
from vae.models.objective import ObjectiveSettings, discriminator_loss, generator_loss
from vae.models.perceptual import PerceptualLoss
from vae.models.wfvae import WFVAE

CONFIG = Path(__file__).parents[1] / "vae" / "examples" / "wfvae-large-16chn.json"
LEARNING_RATE = 1e-5
CODING = ("encode", "decode", "encode in chunks", "decode in chunks")
TRAINING = ("generator step", "discriminator step")
SETTINGS = ObjectiveSettings(disc_start=0)
Clip = tuple[int, int]  # frames, height and width in px
Phase = Callable[[], Mapping[str, Tensor]]


@dataclass(frozen=True)
class Size:
    """What is measured: clips and widths of networks."""

    whole: Clip
    chunked: Clip
    trained: Clip
    base_channels: int
    trained_base_channels: int
    compiled: bool = False  # our encoder and decoder


SIZES = {
    "tiny": Size((9, 32), (17, 32), (9, 32), 32, 32),
    "small": Size((17, 128), (33, 64), (9, 64), 192, 96),
    "large": Size((17, 256), (65, 128), (9, 128), 192, 96),
}
SIZE_ON_A_GPU = Size((33, 512), (65, 512), (25, 256), 192, 192)


def build_vae(base_channels: int, device: torch.device, compiled: bool = False) -> tuple[WFVAE, PlainWFVAE]:
    """Both networks with the same random weights, not only equal ones."""
    torch.manual_seed(0)
    vae = WFVAE.from_config(json.loads(CONFIG.read_text("utf-8")) | {"base_channels": base_channels}).to(device)
    with torch.device("meta"):
        plain = PlainWFVAE(vae.config)
    plain.load_state_dict(vae.state_dict(), assign=True)
    if compiled:
        vae.encoder.compile()
        vae.decoder.compile()
    return vae, plain


def coding_phases(size: Size, device: torch.device) -> dict[str, dict[str, Phase]]:
    """{phase: {"plain" or "ours": call}}, for whole clips and for long ones in chunks."""
    vae, plain = build_vae(size.base_channels, device, size.compiled)
    phases: dict[str, dict[str, Phase]] = {}
    for suffix, (num_frames, height_px) in (("", size.whole), (" in chunks", size.chunked)):
        x = torch.rand(1, 3, num_frames, height_px, height_px, device=device) * 2 - 1  # (B, 3, T, H, W)
        z = torch.randn(1, *vae.latent_shape(*x.shape[2:]), device=device)  # (B, z, t, h, w)

        def coder(chunked: bool, work: Callable[..., Tensor], *inputs: Tensor) -> Phase:
            def phase() -> Mapping[str, Tensor]:
                if chunked:
                    vae.enable_tiling()
                with torch.inference_mode():
                    result = work(*inputs)
                vae.disable_tiling()
                return {"result": result}

            return phase

        chunked = bool(suffix)
        plain_work = (plain.encode_chunks, plain.decode_chunks) if chunked else (plain.encode, plain.decode)
        phases[f"encode{suffix}"] = {
            "plain": coder(False, plain_work[0], x),
            "ours": coder(chunked, lambda x: vae.encode(x).moments, x),
        }
        phases[f"decode{suffix}"] = {"plain": coder(False, plain_work[1], z), "ours": coder(chunked, vae.decode, z)}
    return phases


class Training:
    """Alternating steps as the trainer makes them."""

    def __init__(self, vae: WFVAE, discriminator: NLayerDiscriminator3D, perceptual: PerceptualLoss):
        self.vae, self.adversary, self.perceptual = vae, RealAndFake(discriminator), perceptual
        trained = [each for each in vae.parameters() if each.requires_grad]
        self.vae_optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=1e-4, fused=True)
        parameters = discriminator.parameters()
        self.disc_optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=1e-4, fused=True)
        self.ema = EMA(vae, 0.999, warmup=False)

    def generator_loss(self, x: Tensor, noise: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        output = self.vae(x, noise)
        networks = self.vae.last_layer, self.adversary.discriminator, self.perceptual
        return generator_loss(x, output, *networks, SETTINGS, step=0)

    def generator_step(self, x: Tensor, noise: Tensor) -> Mapping[str, Tensor]:
        loss, metrics = self.generator_loss(x, noise)
        self.vae_optimizer.zero_grad()
        loss.backward()
        self.vae_optimizer.step()
        self.ema.update()
        return metrics

    def discriminator_step(self, x: Tensor, noise: Tensor) -> Mapping[str, Tensor]:
        with torch.no_grad():
            fake = self.vae(x, noise).sample
        loss, metrics = discriminator_loss(*self.adversary(x, fake), SETTINGS, step=0)
        self.disc_optimizer.zero_grad()
        loss.backward()
        self.disc_optimizer.step()
        return metrics


def build_training(
    size: Size, device: torch.device, variants: tuple[str, ...] = ("plain", "ours")
) -> tuple[dict[str, Training | PlainTraining], Tensor, Tensor]:
    """Trainers that begin with equal weights, each with its own; a clip (1, 3, T, H, W), noise (1, z, t, h, w)."""
    trainings: dict[str, Training | PlainTraining] = {}
    for name in variants:
        vae, plain = build_vae(size.trained_base_channels, device, size.compiled)
        discriminator = NLayerDiscriminator3D(dropout=0.0).to(device)  # the same masks would not fall on both
        perceptual = PerceptualLoss().to(device)
        for head in (getattr(perceptual, f"lin{k}") for k in range(5)):
            head.model[1].weight.abs_()
        trainings[name] = (
            Training(vae, discriminator, perceptual)
            if name == "ours"
            else PlainTraining(plain, discriminator, perceptual, LEARNING_RATE)
        )
    num_frames, height_px = size.trained
    x = torch.rand(1, 3, num_frames, height_px, height_px, device=device) * 2 - 1
    return trainings, x, torch.randn(1, *vae.latent_shape(*x.shape[2:]), device=device)


def training_phases(
    size: Size, device: torch.device, variants: tuple[str, ...] = ("plain", "ours")
) -> dict[str, dict[str, Phase]]:
    """As `coding_phases`, for optimizer steps on one clip."""
    trainings, x, noise = build_training(size, device, variants)
    return {
        phase: {
            name: partial(getattr(training, phase.replace(" ", "_")), x, noise) for name, training in trainings.items()
        }
        for phase in TRAINING
    }


def check_gradients(size: Size, device: torch.device, limit: float) -> None:
    """Raises ValueError where metrics or gradients of both trainings differ by more than `limit` of themselves."""
    trainings, x, noise = build_training(size, device)
    results: dict[str, dict[str, Tensor]] = {}
    for name, training in trainings.items():
        loss, metrics = training.generator_loss(x, noise)
        loss.backward()
        parameters = sorted(training.vae.named_parameters(), key=lambda pair: pair[0])
        grads = [each.grad.flatten() for _, each in parameters if each.grad is not None]
        results[name] = metrics | {"gradient": torch.cat(grads)}
    compare_results("generator step", results["plain"], results["ours"], limit)


def compare_results(phase: str, plain: Mapping[str, Tensor], ours: Mapping[str, Tensor], limit: float) -> float:
    """The largest relative difference; ValueError if it exceeds `limit`."""
    if missing := {name for name in plain if name not in ours}:
        raise ValueError(f"{phase}: ours lacks {', '.join(sorted(missing))}")
    name, worst = max(((name, difference(ours[name], plain[name])) for name in plain), key=lambda pair: pair[1])
    if not worst <= limit:
        raise ValueError(f"{phase}: {name} of both differs by {worst:.2g} of itself, more than {limit:g}")
    return worst


def peak_alone_mib(arguments: argparse.Namespace, phase: str, variant: str) -> float:
    """`peak_mib` of a phase in a process of its own."""
    options = ["--size", arguments.size, "--threads", str(arguments.threads), "--alone", phase, variant]
    options += ["--compile"] if arguments.compile else []
    return alone_mib(__file__, *options)


def main_alone(size: Size, phase: str, variant: str) -> None:
    """Prints the peak of the second of two calls, which is higher where the first one makes an optimizer's state."""
    device = torch.device("cpu")
    if phase in TRAINING:
        work = training_phases(size, device, (variant,))[phase][variant]
    else:
        work = coding_phases(size, device)[phase][variant]

    def calls() -> None:
        for _ in range(2 if phase in TRAINING else 1):
            work()

    print(peak_mib(calls, device))


def reachable_gflops(device: torch.device) -> tuple[float, float]:
    """What a large matrix product and a large convolution reach, in 10^9 operations per second."""
    a = torch.randn(2048, 2048, device=device)
    x = torch.randn(8, 384, 66, 66, device=device).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(384, 384, 3, 3, device=device)
    operations = (2 * 2048**3, 2 * 8 * 64 * 64 * 384 * 384 * 9)
    works = (lambda: {"": a @ a}, lambda: {"": torch.conv2d(x, weight)})
    times = [min(seconds(work, device) for _ in range(5)) for work in works]
    matrix, convolution = (count / time_s / 1e9 for count, time_s in zip(operations, times, strict=True))
    return matrix, convolution


def convolution_share(work: Phase) -> float:
    """Of a call's processor time, the part inside convolutions."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        work()
    times = {event.key: event.self_cpu_time_total for event in profile.key_averages()}
    return sum(time_us for name, time_us in times.items() if "conv" in name.lower()) / sum(times.values())


class _NoModules(nullcontext):
    """Operations by module are not wanted, and what counts them does not suffer gradients of leaves."""

    parents = frozenset({"Global"})


def checked(phase: str, variants: Mapping[str, Phase], limit: float) -> dict[str, float]:
    """Operations of each variant's call, of whose results it is made sure that they agree."""
    results, operations = {}, {}
    for name, work in variants.items():
        counter = FlopCounterMode(display=False)
        counter.mod_tracker = _NoModules()
        with counter:
            results[name] = work()
        operations[name] = counter.get_total_flops() / 1e9
    shared = {name: value for name, value in results["plain"].items() if name in results["ours"]}
    worst = compare_results(phase, shared, results["ours"], limit)
    print(f"{phase}: results differ by {worst:.1g} of themselves", flush=True)
    return operations


def report(
    phase: str,
    variants: Mapping[str, Phase],
    operations: Mapping[str, float],
    arguments: argparse.Namespace,
    device: torch.device,
) -> None:
    """Prints the ratios plain / ours of time and of memory; who begins alternates."""
    turns = take_turns(variants, arguments.repeats, device)
    median_s = {name: statistics.median(turn[name] for turn in turns) for name in variants}
    if device.type == "cuda":
        peaks = {name: peak_mib(work, device) for name, work in variants.items()}
    else:
        peaks = {name: peak_alone_mib(arguments, phase, name) for name in variants}
    reached = " and ".join(f"{operations[name] / median_s[name]:.0f}" for name in variants)
    counted = f"operations {operations['plain']:.4g} G and {operations['ours']:.4g} G, per second {reached} G"
    times, memory = ratio_text(turns, "plain", "ours", counted), memory_text(peaks["plain"], peaks["ours"])
    print(f"{phase}: {times}; {memory}", flush=True)
    if arguments.profile:
        shares = " and ".join(f"{convolution_share(work):.0%}" for work in variants.values())
        print(f"{phase}: in convolutions {shares}", flush=True)


def with_autocast(work: Phase, device: torch.device) -> Phase:
    def phase() -> Mapping[str, Tensor]:
        with torch.autocast(device.type, torch.bfloat16):
            return work()

    return phase


def measure(size: Size, arguments: argparse.Namespace, device: torch.device) -> None:
    for names, build in ((CODING, coding_phases), (TRAINING, training_phases)):
        chosen = [name for name in names if name in arguments.only]
        if not chosen:
            continue
        if build is training_phases:
            check_gradients(size, device, limit=1e-2)
        phases = build(size, device)
        operations = {name: checked(name, phases[name], limit=1e-3) for name in chosen}
        for name in chosen:
            variants = phases[name]
            if device.type == "cuda":
                variants = {each: with_autocast(work, device) for each, work in variants.items()}
                for work in variants.values():
                    work()
            report(name, variants, operations[name], arguments, device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="large", help="tiny shows that it runs, and measures nothing")
    add_device(parser)
    parser.add_argument("--repeats", type=int, default=5, help="timed turns per comparison")
    parser.add_argument(
        "--threads", type=int, default=1, help="of a CPU, whose processor time is taken: more are faster by the clock"
    )
    parser.add_argument("--only", nargs="+", choices=CODING + TRAINING, default=CODING + TRAINING, metavar="PHASE")
    parser.add_argument("--compile", action="store_true", help="compile our encoder and decoder; the plain ones stay")
    parser.add_argument("--profile", action="store_true", help="also the share of convolutions")
    parser.add_argument("--alone", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    size = SIZE_ON_A_GPU if device.type == "cuda" and arguments.size == "large" else SIZES[arguments.size]
    size = replace(size, compiled=arguments.compile)
    if arguments.alone:
        main_alone(size, *arguments.alone)
        return
    matrix, convolution = reachable_gflops(device)
    print(
        f"size {arguments.size}, {device}, {arguments.threads} threads, torch {torch.__version__}; per second, a matrix"
        f" product does {matrix:.0f} G operations, a convolution {convolution:.0f} G",
        flush=True,
    )
    measure(size, arguments, device)


if __name__ == "__main__":
    main()
