"""Step 2 of the evaluation: compares the videos of two folders; `--help` lists all settings.

    accelerate launch evaluate.py --metric psnr,ssim,lpips --real_video_dir out/origin --generated_video_dir out

A generated video is compared with the real one of the same path from its folder, or with the one that step 1 made it
from, or with the one of the same path but for the suffix. Every video counts the same. Metrics see frames in [0, 1]:

    psnr      dB; mean over frames of 10 log10(1 / MSE), at most 100
    ssim      mean over frames; 11 x 11 px Gaussian window
    lpips     AlexNet, version 0.1; spatial maps, mean over pixels and frames
    flicker   mean |change of the generated from frame to frame - that of the real|
    fvd       Frechet distance of the I3D features of all videos; needs --i3d_weights
"""

import logging
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from common import runtime, tools
from common.config import Parser, option
from common.metrics import SSIM_WINDOW_PX, Lpips, flicker, lpips_for_all, psnr, ssim
from common.pretrained import named
from common.runtime import Processes
from common.video import (
    IMAGE_SUFFIXES,
    VIDEO_SUFFIXES,
    MediaError,
    find_files,
    load_image,
    probe_video,
    read_frames,
)
from vae import fvd
from vae.data import eval_transform, is_image, valid_frame_indices
from vae.fvd import FvdMethod
from vae.reconstruct import METRICS_FILE, ORIGIN, SETTINGS, SIDE_BY_SIDE, read_ahead, read_rows

logger = logging.getLogger(__name__)

METRICS = ("psnr", "ssim", "lpips", "flicker", "fvd")
LPIPS_FRAMES = 16  # frames that pass through AlexNet together
TABLE_ROWS = 30  # of the printed table; the json has all


# Settings -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class PairsConfig:
    real_video_dir: str | None = option(None, "folder of the real videos; required")
    generated_video_dir: str | None = option(None, "folder of the generated videos, which step 1 wrote; required")
    num_frames: int = option(100, "first frames of each clip", minimum=1)
    sample_rate: int = option(
        1, "interval between the frames of a real video; those in the origin/ of step 1 have it behind them", minimum=1
    )
    resolution: int = option(336, "short side of the resized frames in pixels", minimum=1)
    crop_size: int | None = option(None, "side of a square that is cut from the centre; null keeps all", minimum=1)
    subset_size: int | None = option(None, "only the first so many pairs; 0 or null is all", minimum=0)
    num_workers: int = option(8, "processes that read videos, per process; 0 reads in the process itself", minimum=0)


@dataclass(frozen=True, kw_only=True)
class MetricConfig:
    metric: tuple[str, ...] = option(("fvd",), f"one or several, comma-separated, of {', '.join(METRICS)}; or all")
    fvd_method: FvdMethod = option("styleganv", "which I3D: that of StyleGAN-V or that of VideoGPT")
    i3d_weights: str | None = option(
        None,
        "weights of that I3D. styleganv: a TorchScript file, whose code is run, so take it from a source you trust; "
        "videogpt: a state dict (.pt, .safetensors)",
    )
    lpips_weights: str | None = option(
        None, "AlexNet weights of torchvision for LPIPS; null looks in torch hub's cache"
    )

    def __post_init__(self) -> None:
        unknown = [name for name in self.metric if name.lower() not in (*METRICS, "all")]
        if "flolpips" in unknown:
            raise ValueError("flolpips is not there: the original computed lpips under that name; use --metric lpips")
        if unknown or not self.metric:
            raise ValueError(
                f"{', '.join(unknown) or 'nothing'} is no metric: choose among {', '.join(METRICS)}, or all"
            )

    @property
    def names(self) -> tuple[str, ...]:
        """The metrics in their fixed order."""
        wanted = {name.lower() for name in self.metric}
        return METRICS if "all" in wanted else tuple(name for name in METRICS if name in wanted)


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    data: PairsConfig = PairsConfig()
    metric: MetricConfig = MetricConfig()
    run: tools.DeviceConfig = tools.DeviceConfig()


def check(config: EvaluateConfig) -> list[str]:
    """Problems between sections, one sentence each."""
    required = {
        "data.real_video_dir": "folder of the real videos",
        "data.generated_video_dir": "folder of the generated videos",
    }
    return tools.required(config, required)


PARSER = Parser(
    EvaluateConfig,
    ignored={
        "mp": "every process takes its share of the videos whatever the metric; start several with `accelerate launch`",
        "batch_size": "videos are measured one by one, so that the result depends on no batch",
        "sample_fps": "no metric depends on the frame rate; the original did not read it either",
    },
    check=check,
    program="evaluate.py",
    description="Compares generated videos with real ones.",
)


# Pairs ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pair:
    """Two videos of one name."""

    name: str
    real: Path
    generated: Path


def find_pairs(data: PairsConfig) -> list[Pair]:
    """Every generated video with its real one, sorted by name.

    Raises:
        FileNotFoundError: a folder is not there, or real videos are missing.
        ValueError: there are no generated videos.
    """
    root, real_root = Path(str(data.generated_video_dir)), Path(str(data.real_video_dir))
    suffixes = VIDEO_SUFFIXES + (IMAGE_SUFFIXES if data.num_frames == 1 else ())
    generated = [path.relative_to(root) for path in find_files(root, suffixes)]
    names = [path for path in generated if path.parts[0] not in (ORIGIN, SIDE_BY_SIDE)]
    if not names:
        raise ValueError(f"--generated_video_dir {root} holds no videos: run step 1 (gen_video.sh) first")
    inputs = {path.relative_to(real_root) for path in find_files(real_root, suffixes)}
    by_stem: dict[Path, list[Path]] = {}
    for path in inputs:
        by_stem.setdefault(path.with_suffix(""), []).append(path)
    sources = {Path(name): Path(row["source"]) for name, row in read_rows([root / METRICS_FILE]).items()}
    pairs, missing = [], []
    for name in names[: data.subset_size or None]:
        same_stem = by_stem.get(name.with_suffix(""), [])
        choices = [name, sources.get(name), same_stem[0] if len(same_stem) == 1 else None]
        found = next((path for path in choices if path in inputs), None)
        if found is None:
            missing.append(name.as_posix())
        else:
            pairs.append(Pair(name.as_posix(), real_root / found, root / name))
    if missing:
        raise FileNotFoundError(
            f"{len(missing)} of {len(missing) + len(pairs)} videos of {root} have no counterpart of the same path in "
            f"--real_video_dir {real_root}: {named(missing)}"
        )
    return pairs


def real_sample_rate(data: PairsConfig) -> int:
    """The interval at which to read real videos: 1 in the `origin/` of step 1, whose clips are sampled already."""
    folder = Path(str(data.real_video_dir)).resolve()
    return 1 if folder.name == ORIGIN and (folder.parent / SETTINGS).is_file() else data.sample_rate


def read_pair(data: PairsConfig, rate: int, pairs: Sequence[Pair], index: int) -> tuple[Tensor, Tensor]:
    """The generated and the real clip of a pair, (3, T, H, W) in [0, 1]; MediaError for one that cannot be used."""
    pair = pairs[index]
    generated, real = _read(pair.generated, data, 1), _read(pair.real, data, rate)
    if generated.shape != real.shape:
        sizes = [f"{clip.shape[3]}x{clip.shape[2]}" for clip in (generated, real)]
        raise MediaError(
            pair.generated,
            f"is {sizes[0]} px after resizing, {pair.real} {sizes[1]} px: use --crop_size, or the origin/ of step 1 as "
            "--real_video_dir",
        )
    return generated, real


def _read(path: Path, data: PairsConfig, sample_rate: int) -> Tensor:
    if is_image(path):
        pixels = np.array(load_image(path))[None]  # (1, H, W, 3)
    else:
        have, needed = probe_video(path).num_frames, data.num_frames * sample_rate
        if have < needed:
            raise MediaError(
                path, f"clip has {have} frames, num_frames x sample_rate needs {needed}: lower --num_frames"
            )
        pixels = read_frames(path, valid_frame_indices(data.num_frames, sample_rate))  # (T, H, W, 3)
    frames = torch.from_numpy(pixels).permute(0, 3, 1, 2)  # (T, 3, H, W)
    crop = None if data.crop_size is None else (data.crop_size, data.crop_size)
    return eval_transform(frames, data.resolution, crop) / 2 + 0.5  # (3, T, H, W)


# Metrics --------------------------------------------------------------------------------------------------------------


class Measuring:
    """The metrics of one pair of clips.

    Args:
        names: of `METRICS`.
        lpips, features: needed for "lpips" and "fvd".
    """

    def __init__(self, names: Sequence[str], lpips: Lpips | None, features: fvd.Features | None) -> None:
        self.names = [name for name in names if name != "fvd"]
        self.lpips, self.features = lpips, features
        self.width = len(self.names) + (2 * fvd.NUM_FEATURES if features else 0)

    def __call__(self, generated: Tensor, real: Tensor) -> Tensor:
        """(3, T, H, W) in [0, 1] -> float64 (width,): the metrics, then the features of FVD, generated before real."""
        frames = generated.transpose(0, 1), real.transpose(0, 1)  # (T, 3, H, W)
        values = []
        for name in self.names:
            if name == "lpips":
                parts = zip(frames[0].split(LPIPS_FRAMES), frames[1].split(LPIPS_FRAMES), strict=True)
                values.append(torch.cat([self.lpips(*part) for part in parts]).double().mean())  # type: ignore[misc]
            elif name == "flicker":
                values.append(flicker(generated[None], real[None])[0])
            else:
                values.append({"psnr": psnr, "ssim": ssim}[name](*frames).mean())
        row = torch.stack(values).double() if values else torch.empty(0, dtype=torch.float64, device=real.device)
        if not self.features:
            return row
        return torch.cat([row, *(self.features(clip[None])[0].double() for clip in (generated, real))])


def measuring(config: EvaluateConfig, num_pairs: int, processes: Processes) -> Measuring:
    """Loads what the metrics need; FvdUnavailable or LpipsUnavailable say what is missing."""
    names, metric = config.metric.names, config.metric
    smallest = min(config.data.resolution, config.data.crop_size or config.data.resolution)
    if "ssim" in names and smallest < SSIM_WINDOW_PX:
        raise ValueError(f"ssim needs frames of at least {SSIM_WINDOW_PX} px, got {smallest}: raise --resolution")
    lpips, features = None, None
    if "lpips" in names:
        lpips = lpips_for_all("alex", metric.lpips_weights, processes, spatial=True, required=True)
    if "fvd" in names:
        fvd.check_set(num_pairs, config.data.num_frames)
        features = fvd.load_features(metric.fvd_method, metric.i3d_weights, processes.device)
    return Measuring(names, lpips, features)


# The work -------------------------------------------------------------------------------------------------------------


def measure_all(
    config: EvaluateConfig, pairs: Sequence[Pair], measure: Measuring, processes: Processes
) -> tuple[np.ndarray, np.ndarray]:
    """Measures all pairs, shared over the processes.

    Returns, on all of them, float64 (N, width) and bool (N,): whether a pair could be read.
    """
    table = torch.zeros(len(pairs), measure.width + 1, dtype=torch.float64)  # the last column: measured
    read = partial(read_pair, config.data, real_sample_rate(config.data), pairs)
    share = tools.share_of(range(len(pairs)), processes)
    samples = read_ahead(read, share, config.data.num_workers)
    for index, clips, reason in tqdm(samples, total=len(share), unit="pair", disable=not processes.is_main_process):
        if clips is None:
            tqdm.write(f"skipped {pairs[index].name}: {reason}", file=sys.stderr)
            continue
        row = measure(*(clip.to(processes.device) for clip in clips))
        table[index] = torch.cat([row.cpu(), torch.ones(1, dtype=torch.float64)])
    # Every row is zero on all processes but one, so that their sum is the table, whatever the number of processes.
    table = processes.reduce(table.to(processes.device), "sum").cpu()
    return table[:, :-1].numpy(), table[:, -1].numpy() > 0


def evaluate(config: EvaluateConfig, processes: Processes) -> dict[str, Any]:
    """The metrics of a folder, on all processes; the main one writes them into it.

    Raises:
        ValueError, FileNotFoundError, FvdUnavailable, LpipsUnavailable: something is missing; says what.
    """
    pairs = find_pairs(config.data)
    measure = measuring(config, len(pairs), processes)
    if config.data.sample_rate != real_sample_rate(config.data) and processes.is_main_process:
        logger.info("%s is read frame by frame: step 1 has sampled it already", config.data.real_video_dir)
    table, is_read = measure_all(config, pairs, measure, processes)
    if not is_read.any():
        raise ValueError(f"none of the {len(pairs)} pairs can be measured; the reasons are above")
    means = dict(zip(measure.names, table[is_read].mean(axis=0).tolist(), strict=False))
    if measure.features:
        generated, real = np.split(table[is_read, len(measure.names) :], 2, axis=1)  # (N, 400) each
        fvd.check_set(len(real), config.data.num_frames)
        means["fvd"] = fvd.frechet_distance(torch.from_numpy(real), torch.from_numpy(generated))
    videos = [
        {"name": pair.name, **dict(zip(measure.names, row.tolist(), strict=False))}
        for pair, row, read in zip(pairs, table, is_read, strict=True)
        if read
    ]
    skipped = [pair.name for pair, read in zip(pairs, is_read, strict=True) if not read]
    result = {"num_videos": len(videos), "skipped": skipped, "mean": means, "videos": videos}
    settings = {**asdict(config.data), **asdict(config.metric), "real_sample_rate": real_sample_rate(config.data)}
    result |= {"settings": settings, "versions": runtime.versions()}
    if processes.is_main_process:
        tools.write_json(result_path(config), result)
    return result


def result_path(config: EvaluateConfig) -> Path:
    """Where the metrics of a configuration go; another configuration of the same metrics replaces them."""
    names = [f"fvd_{config.metric.fvd_method}" if name == "fvd" else name for name in config.metric.names]
    return Path(str(config.data.generated_video_dir)) / f"metrics-{'-'.join(names)}.json"


def table(result: dict[str, Any]) -> str:
    """The metrics of each video as text, the means last, one `metric value` in a line."""
    videos, means = result["videos"], result["mean"]
    names = [name for name in means if name != "fvd"]
    width = max(len(row["name"]) for row in videos[:TABLE_ROWS])
    lines = [" " * width + "".join(f"  {name:>9}" for name in names)] if names else []
    for row in videos[:TABLE_ROWS] if names else ():
        lines.append(f"{row['name']:<{width}}" + "".join(f"  {row[name]:9.4f}" for name in names))
    if names and len(videos) > TABLE_ROWS:
        lines.append(f"... and {len(videos) - TABLE_ROWS} more")
    return "\n".join([*lines, *(f"{name} {value:.6g}" for name, value in means.items())])


def main(argv: Sequence[str] | None = None) -> None:
    """Compares as the command line says; see `--help`."""
    with tools.started(PARSER, argv) as (config, accelerator, _):
        result = evaluate(config, accelerator)
        if accelerator.is_main_process:
            skipped = result["skipped"]
            if skipped:
                print(f"{len(skipped)} pairs could not be measured and do not count", file=sys.stderr)
            if "fvd" in result["mean"] and result["num_videos"] < fvd.UNBIASED_VIDEOS:
                logger.warning(
                    "FVD of %d videos is biased upwards: take at least %d to compare with other work",
                    result["num_videos"],
                    fvd.UNBIASED_VIDEOS,
                )
            print(f"{result['num_videos']} videos: {result_path(config)}\n{table(result)}")


if __name__ == "__main__":
    main()
