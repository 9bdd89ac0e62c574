"""Reconstructs an image, a video of any length, or a folder of both; `--help` lists all settings.

    python infer.py --model ckpt --input a.mp4 --output_dir b.mp4
    python infer.py --model ckpt --input test_video --latent_stats --height 256 --width 256

Videos are read, reconstructed and written piece by piece, in memory that does not grow with their length, where the
model allows it (WFVAE with layer norm); other models take a video whole. `--latent_stats` measures the latents' mean
and standard deviation instead, by which a diffusion model normalises them.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from common import tools
from common.config import Parser, find_file, option
from common.data import draw_normal
from common.runtime import Processes
from common.video import IMAGE_SUFFIXES, clip_writer, load_image, probe_video, read_frames, save_image
from vae.data import center_crop_resize, is_image, list_videos, resize_and_crop, to_uint8_frames
from vae.models.posterior import DiagonalGaussian
from vae.reconstruct import WEIGHTS_ALIASES, WeightsConfig, autocast, load_vae, output_names

CLIP_SUFFIXES = (".mp4", ".mov", ".mkv")  # that can hold H.264


# Settings -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class InferData:
    input: str | None = option(None, "an image, a video, or a folder of them, searched recursively; required")
    output_dir: str | None = option(
        None, "a folder, or for one input a file; required. With latent_stats: a .json file, optional"
    )
    num_frames: int | None = option(None, "only the first so many frames of a video; null is all", minimum=1)
    sample_rate: int = option(1, "take every so-manieth frame", minimum=1)
    height: int | None = option(
        None, "height in pixels of the central square after resizing, with width; null keeps the size", minimum=8
    )
    width: int | None = option(None, "width in pixels, with height", minimum=8)
    short_size: int | None = option(None, "short side in pixels after resizing; null keeps the size", minimum=8)
    fps: float | None = option(None, "frames per second of the output; null is the input's / sample_rate", above=0)
    crf: int = option(10, "quality of H.264, 0 (best) ... 51", minimum=0, maximum=51, needs="lossless=False")
    lossless: bool = option(False, "keep every pixel (H.264 in RGB: large files that not all players show)")
    overwrite: bool = option(False, "make again what is there already; otherwise existing results are kept")
    latent_stats: bool = option(False, "measure the latents' mean and standard deviation per channel, write no videos")

    def __post_init__(self) -> None:
        if (self.height is None) != (self.width is None):
            raise ValueError("height and width must be given together; short_size keeps the aspect")
        if self.height is not None and self.short_size is not None:
            raise ValueError("short_size excludes height and width")


@dataclass(frozen=True, kw_only=True)
class InferRun(tools.ToolConfig):
    chunk_frames: int = option(16, "frames read and passed on at once; the result does not depend on it", minimum=1)
    sample_posterior: bool = option(False, "decode a sample of the posterior, as the original did, not its mode")
    seed: int = option(0, "of that sample", minimum=0, needs="sample_posterior")


@dataclass(frozen=True, kw_only=True)
class InferConfig:
    data: InferData = InferData()
    model: WeightsConfig = WeightsConfig()
    run: InferRun = InferRun()


def check(config: InferConfig) -> list[str]:
    """Problems between sections, one sentence each."""
    data = config.data
    required = {
        "data.input": "an image, a video, or a folder of them",
        "model.model": "a folder with weights, or a .ckpt file",
    }
    if not data.latent_stats:
        required["data.output_dir"] = "a folder, or for one input a file"
    problems = tools.required(config, required)
    if data.latent_stats and data.output_dir and not data.output_dir.endswith(".json"):
        problems.append(f"--output_dir {data.output_dir} must end in .json with --latent_stats")
    return problems


PARSER = Parser(
    InferConfig,
    aliases={
        **WEIGHTS_ALIASES,
        "video_path": "data.input",
        "image_path": "data.input",
        "rec_path": "data.output_dir",
        "output": "data.output_dir",
        "data.output": "data.output_dir",
    },
    check=check,
    program="infer.py",
    description="Reconstructs images and videos with a video autoencoder.",
)


# What to reconstruct --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """One input; `number` is its place among all, whatever outputs exist already."""

    number: int
    source: Path
    output: Path

    def __str__(self) -> str:
        return str(self.source)


def find_jobs(data: InferData) -> list[Job]:
    """The inputs, in order, and where their results go.

    Raises:
        FileNotFoundError: the input does not exist.
        ValueError: no inputs, or outputs that cannot be.
    """
    source, output = find_file(str(data.input), "--input"), Path(str(data.output_dir))
    if data.latent_stats:
        paths = list_videos(source, images=True) if source.is_dir() else [source]
        return [Job(number, path, output) for number, path in enumerate(paths)]
    if not source.is_dir():
        if output.is_dir() or not output.suffix:
            output = output / output_names([source.name])[0]
        suffixes = IMAGE_SUFFIXES if is_image(source) else CLIP_SUFFIXES
        if output.suffix.lower() not in suffixes:
            raise ValueError(f"--output_dir {output} must end in one of {', '.join(suffixes)}, or be a folder")
        if output.resolve() == source.resolve():
            raise ValueError(f"--output_dir {output} would overwrite the input: choose another name")
        return [Job(0, source, output)]
    if output.is_file() or output.suffix.lower() in (*IMAGE_SUFFIXES, *CLIP_SUFFIXES):
        raise ValueError(f"--output_dir {output} must be a folder, because --input {source} is one")
    if output.resolve().is_relative_to(source.resolve()):
        raise ValueError(f"--output_dir {output} lies in --input {source}: choose a folder beside it")
    paths = list_videos(source, images=True)
    names = output_names([path.relative_to(source).as_posix() for path in paths])
    return [Job(number, path, output / name) for number, (path, name) in enumerate(zip(paths, names, strict=True))]


@dataclass(frozen=True)
class Clip:
    """What is read of one input.

    Attributes:
        indices: of the frames in the file.
        fps: of the output.
        size_px: (height, width) of frames after resizing, before they are padded to whole latents.
    """

    path: Path
    indices: range
    fps: float
    size_px: tuple[int, int]


def open_clip(path: Path, data: InferData) -> Clip:
    """Which frames of a file are read; MediaError if it cannot be read."""
    if is_image(path):
        indices, fps = range(1), 1.0
    else:
        info = probe_video(path)
        indices = range(0, info.num_frames, data.sample_rate)[: data.num_frames]
        fps = data.fps or (info.fps or 30.0) / data.sample_rate
    height, width = read_pixels(path, indices[:1], data).shape[2:]
    return Clip(path, indices, fps, (height, width))


def read_pixels(path: Path, indices: Sequence[int], data: InferData) -> Tensor:
    """(3, T, H, W) in [-1, 1], resized as the settings say."""
    frames = np.array(load_image(path))[None] if is_image(path) else read_frames(path, indices)  # (T, H, W, 3)
    frames = torch.from_numpy(frames).permute(0, 3, 1, 2)  # (T, 3, H, W)
    if data.height is not None and data.width is not None:
        return center_crop_resize(frames, data.height, data.width)
    if data.short_size is not None:
        return resize_and_crop(frames, data.short_size)
    return frames.transpose(0, 1).float() / 127.5 - 1


def missing(jobs: Sequence[Job], config: InferConfig) -> list[Job]:
    """Those without a result; with latent_stats all."""
    makes_all = config.data.latent_stats or config.data.overwrite
    return [job for job in jobs if makes_all or not job.output.exists()]


# Through the model, piece by piece ------------------------------------------------------------------------------------


def can_stream(model: Any) -> bool:
    """Whether pieces of a video give the result of the whole."""
    if not hasattr(model, "encode_chunks"):
        return False
    try:
        model.enable_tiling()  # refuses models whose norm or attention sees all frames
    except ValueError:
        return False
    return True


def padded(chunks: Iterator[Tensor], spatial_factor: int, temporal_factor: int) -> Iterator[Tensor]:
    """Pieces (1, 3, T_i, H, W), edges and the last frame repeated up to whole latents: T = temporal_factor n + 1."""
    num_frames = 0
    last = None
    for chunk in chunks:
        num_frames += chunk.shape[2]
        height, width = chunk.shape[3:]
        pad = (0, -width % spatial_factor, 0, -height % spatial_factor)
        chunk = F.pad(chunk[0], pad, mode="replicate")[None]  # (1, 3, T_i, H', W')
        last = chunk[:, :, -1:]
        yield chunk
    missing = -(num_frames - 1) % temporal_factor
    if last is not None and missing:
        yield last.expand(-1, -1, missing, -1, -1)


class Reconstructor:
    """An autoencoder that takes inputs of any size and length.

    Args:
        model: on `device`.
    """

    def __init__(self, config: InferConfig, model: Any, device: torch.device) -> None:
        self.config, self.model, self.device = config, model, device
        self.streams = can_stream(model)

    def frames(self, clip: Clip, number: int) -> Iterator[np.ndarray]:
        """The reconstruction, uint8 (T_i, H, W, 3) piece by piece: the clip's size and number of frames.

        Raises:
            ValueError: values that are not finite.
        """
        left, (height, width) = len(clip.indices), clip.size_px
        for chunk in self._decode(self._latents(clip, number)):
            chunk = chunk[0, :, :left, :height, :width].float()  # (3, T_i, H, W)
            if not chunk.isfinite().all():
                raise ValueError("the result is not finite: use --mixed_precision bf16 or no, or other weights")
            left -= chunk.shape[1]
            if chunk.shape[1]:
                yield to_uint8_frames(chunk).cpu().numpy()

    def moments(self, clip: Clip, pad: bool = True) -> Iterator[Tensor]:
        """Moments (1, 2z, t_i, h, w), piece by piece; without `pad` what fills no latent is dropped."""
        spatial, temporal = self.model.spatial_factor, self.model.temporal_factor
        indices, (height, width) = clip.indices, clip.size_px
        if not pad:
            indices = indices[: (len(indices) - 1) // temporal * temporal + 1]
            height, width = height // spatial * spatial, width // spatial * spatial
        step = self.config.run.chunk_frames
        parts = (indices[first : first + step] for first in range(0, len(indices), step))
        pixels = (read_pixels(clip.path, part, self.config.data)[None, ..., :height, :width] for part in parts)
        chunks = padded((part.to(self.device) for part in pixels), spatial, temporal)
        if self.streams:
            yield from self.model.encode_chunks(chunks)
        else:
            yield self.model.encode(torch.cat(list(chunks), dim=2)).moments

    def _latents(self, clip: Clip, number: int) -> Iterator[Tensor]:
        run, place = self.config.run, 0
        for moments in self.moments(clip):
            posterior = DiagonalGaussian(moments.float())
            if run.sample_posterior:
                _, channels, count, height, width = posterior.mean.shape
                places = range(place, place + count)
                noise = draw_normal(run.seed, f"posterior of input {number}", places, (channels, height, width))
                yield posterior.sample(noise.transpose(0, 1)[None].to(moments.device))  # (1, z, t_i, h, w)
                place += count
            else:
                yield posterior.mode()

    def _decode(self, latents: Iterator[Tensor]) -> Iterator[Tensor]:
        if self.streams:
            yield from self.model.decode_chunks(latents)
        else:
            yield self.model.decode(torch.cat(list(latents), dim=2))


def reconstruct(job: Job, reconstructor: Reconstructor) -> None:
    """Reads, reconstructs and writes one input; ValueError or OSError if that fails."""
    data = reconstructor.config.data
    clip = open_clip(job.source, data)
    pieces = reconstructor.frames(clip, job.number)
    if is_image(job.output):
        save_image(job.output, next(pieces)[0])
        return
    with clip_writer(job.output, clip.fps, crf=data.crf, lossless=data.lossless) as write:
        for piece in pieces:
            write(piece)


# Latents' statistics --------------------------------------------------------------------------------------------------


def latent_sums(job: Job, reconstructor: Reconstructor) -> Tensor:
    """float64 (4, z), over the latents of one input: their number, sums of means, of squared means and of variances."""
    sums = torch.zeros(4, reconstructor.model.latent_channels, dtype=torch.float64)
    for moments in reconstructor.moments(open_clip(job.source, reconstructor.config.data), pad=False):
        posterior = DiagonalGaussian(moments.double().cpu())  # (1, z, t_i, h, w)
        terms = (torch.ones_like(posterior.mean), posterior.mean, posterior.mean.square(), posterior.var)
        sums += torch.stack([term.sum(dim=(0, 2, 3, 4)) for term in terms])  # (4, z)
    return sums


def stats_of(sums: Tensor) -> dict[str, list[float]]:
    """Per channel; the variance of a posterior sample is that of the means plus the mean of the variances."""
    mean, square, var = sums[1:] / sums[0]  # (z,) each
    std = (square - mean.square() + var).clamp(min=0).sqrt()
    return {"mean": mean.tolist(), "std": std.tolist(), "scale": (1 / std).tolist(), "shift": mean.tolist()}


def stats_table(stats: dict[str, list[float]]) -> str:
    """Mean, standard deviation and its inverse of each channel as text."""
    lines = [f"{'channel':>7}  {'mean':>10}  {'std':>10}  {'1 / std':>10}"]
    rows = zip(stats["mean"], stats["std"], stats["scale"], strict=True)
    return "\n".join([*lines, *(f"{n:7d}  {m:10.5f}  {s:10.5f}  {i:10.5f}" for n, (m, s, i) in enumerate(rows))])


# The job --------------------------------------------------------------------------------------------------------------


def infer(config: InferConfig, processes: Processes, dtype: torch.dtype) -> dict[Job, str]:
    """Reconstructs what is missing, or measures the latents; returns why inputs of this process went wrong."""
    data = config.data
    jobs = find_jobs(data)
    todo = missing(jobs, config)
    tools.say_kept(len(jobs) - len(todo), len(jobs), "input", processes)
    share = tools.share_of(todo, processes)
    failures: dict[Job, str] = {}
    if data.latent_stats or share:
        model, _ = load_vae(config.model, processes.device)
        reconstructor = Reconstructor(config, model, processes.device)
        sums = torch.zeros(4, model.latent_channels, dtype=torch.float64)

        def make(jobs: Sequence[Job]) -> None:
            with torch.inference_mode(), autocast(processes.device, dtype):
                for job in jobs:
                    if data.latent_stats:
                        sums.add_(latent_sums(job, reconstructor))
                    else:
                        reconstruct(job, reconstructor)

        failures = tools.attempt_all(tools.in_batches(share, 1), make, "input", processes)
        if data.latent_stats:
            conclude_stats(sums, config, len(jobs), failures, processes)
            return failures
    tools.conclude([job.output for job in jobs], data.output_dir, failures, "input", processes)
    return failures


def conclude_stats(
    sums: Tensor, config: InferConfig, num_jobs: int, failures: Mapping[Job, str], processes: Processes
) -> None:
    """Prints and writes the statistics of all processes; ValueError if there are none."""
    tools.say_failures(failures, "input", processes)
    sums = processes.reduce(sums.to(processes.device), "sum").cpu()
    if not sums[0].any():
        raise ValueError(f"none of the {num_jobs} inputs can be used: {next(iter(failures.values()), 'see above')}")
    stats = {"num_latents": int(sums[0, 0]), **stats_of(sums)}
    if processes.is_main_process:
        shown = json.dumps({name: stats[name] for name in ("scale", "shift")})
        print(f"{stats_table(stats)}\na diffusion model takes (latent - shift) * scale: {shown}")
        if config.data.output_dir:
            settings = vars(config.data) | vars(config.model)
            for name, first_name in (("output_dir", "output"), ("model", "from_pretrained")):
                settings[first_name] = settings.pop(name)  # the file's names, which flags have outgrown
            tools.write_json(Path(config.data.output_dir), stats | {"settings": settings})


def main(argv: Sequence[str] | None = None) -> None:
    """Reconstructs as the command line says; see `--help`. Ends with status 1 if an input went wrong."""
    with tools.started(PARSER, argv) as (config, accelerator, dtype):
        failures = infer(config, accelerator, dtype)
    tools.exit_if(failures)


if __name__ == "__main__":
    main()
