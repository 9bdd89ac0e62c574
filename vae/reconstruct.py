"""Step 1 of the evaluation: reconstructs the beginning of every video in a folder; `--help` lists all settings.

    accelerate launch reconstruct.py --from_pretrained ckpt --real_video_dir test_video --generated_video_dir out

The output folder then holds

    <path of the video>.mp4   the reconstruction, under the video's path from its folder
    origin/, side_by_side/    what the model saw, and both next to each other (--output_origin, --side_by_side)
    metrics.jsonl             per video PSNR, SSIM and flicker, measured before the codec
    summary.json              their means, the settings, the versions
    skipped.jsonl             videos that could not be read, and why
    settings.json             what makes a second run in this folder continue the first, or refuse

Files appear whole. The same command again continues where it was interrupted, with any number of processes.
"""

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from itertools import chain, count
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from common import runtime, tools
from common.checkpoint import MANIFEST, listed, newest_valid
from common.config import Parser, find_file, option
from common.data import BAD_SAMPLE_ERRORS
from common.metrics import flicker, psnr, ssim
from common.runtime import Processes
from common.video import IMAGE_SUFFIXES, VIDEO_SUFFIXES, clip_writer, find_files, save_image
from vae import upstream
from vae.data import EvalClips, is_image, list_videos, to_uint8_frames
from vae.models.load import load_model

ORIGIN, SIDE_BY_SIDE = "origin", "side_by_side"
SETTINGS, METRICS_FILE, SKIPPED_FILE, SUMMARY = "settings.json", "metrics.jsonl", "skipped.jsonl", "summary.json"
METRICS = ("psnr", "ssim", "flicker")
SHOWN_NAMES = 5
T = TypeVar("T")


# Settings -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class ClipsConfig:
    real_video_dir: str | None = option(None, "folder of the videos, searched recursively; required")
    generated_video_dir: str | None = option(None, "folder for the reconstructions; required")
    num_frames: int = option(17, "first frames of each clip, 4 n + 1 (8 n + 1 for the 8x models)", minimum=1)
    sample_rate: int = option(1, "interval between the frames of a clip, in frames of the file", minimum=1)
    resolution: int = option(336, "short side of the resized frames in pixels, a multiple of 8", minimum=16)
    crop_size: int | None = option(None, "side of a square that is cut from the centre; null keeps all", minimum=16)
    crop_size_height: int | None = option(None, "height that is cut from the centre, with crop_size_width", minimum=16)
    crop_size_width: int | None = option(None, "width that is cut from the centre, with crop_size_height", minimum=16)
    subset_size: int | None = option(None, "only the first so many videos; 0 or null is all", minimum=0)
    batch_size: int = option(1, "clips of one size that pass together, per process", minimum=1)
    num_workers: int = option(8, "processes that read videos, per process; 0 reads in the process itself", minimum=0)

    def __post_init__(self) -> None:
        if (self.crop_size_height is None) != (self.crop_size_width is None):
            raise ValueError("crop_size_height and crop_size_width must be given together; crop_size cuts a square")
        if self.crop_size is not None and self.crop_size_height is not None:
            raise ValueError("crop_size excludes crop_size_height and crop_size_width")

    @property
    def crop_px(self) -> tuple[int, int] | None:
        """(height, width), or None for whole frames."""
        if self.crop_size is not None:
            return self.crop_size, self.crop_size
        return None if self.crop_size_height is None else (self.crop_size_height, int(self.crop_size_width or 0))


@dataclass(frozen=True, kw_only=True)
class WeightsConfig:
    model: str | None = option(
        None, "folder with config.json and weights, a training run or one of its checkpoints, or a .ckpt file; required"
    )
    model_name: Literal["WFVAE", "CausalVAE", "WFVAE2"] | None = option(None, "network; null is what config.json says")
    model_config: str | None = option(None, "json of the network, for a .ckpt file without config.json beside it")
    enable_tiling: bool = option(False, "pass through the network in pieces: less memory")


@dataclass(frozen=True, kw_only=True)
class FilesConfig:
    sample_fps: float = option(
        30.0, "frames per second of the videos; clips are written at sample_fps / sample_rate", above=0
    )
    output_origin: bool = option(False, f"also write what the model saw, to {ORIGIN}/")
    side_by_side: bool = option(False, f"also write original and reconstruction next to each other, to {SIDE_BY_SIDE}/")
    crf: int = option(10, "quality of H.264, 0 (best) ... 51", minimum=0, maximum=51, needs="lossless=False")
    lossless: bool = option(False, "keep every pixel (H.264 in RGB: large files that not all players show)")


@dataclass(frozen=True, kw_only=True)
class ReconstructConfig:
    data: ClipsConfig = ClipsConfig()
    model: WeightsConfig = WeightsConfig()
    files: FilesConfig = FilesConfig()
    run: tools.ToolConfig = tools.ToolConfig()


def check(config: ReconstructConfig) -> list[str]:
    """Problems between sections, one sentence each."""
    required = {
        "data.real_video_dir": "folder of the videos",
        "data.generated_video_dir": "folder for the reconstructions",
        "model.model": "folder with weights, or a .ckpt file",
    }
    return tools.required(config, required)


WEIGHTS_ALIASES = {"from_pretrained": "model.model", "model.from_pretrained": "model.model"}
PARSER = Parser(
    ReconstructConfig,
    aliases=WEIGHTS_ALIASES,
    ignored={"tile_overlap_factor": "tiles overlap by an eighth, as in the original, which did not read it either"},
    check=check,
    program="reconstruct.py",
    description="Reconstructs the beginning of every video in a folder with a video autoencoder.",
)


# What the three tools share -------------------------------------------------------------------------------------------


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager:
    """In which the autoencoder, whose weights are float32, computes in `dtype`."""
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)


def load_vae(weights: WeightsConfig, device: torch.device) -> tuple[Any, Path]:
    """The autoencoder in eval mode on `device`, in float32, and the folder or file that its weights are from.

    Raises:
        FileNotFoundError, ValueError, CheckpointError: there are no weights, or they do not fit; says why.
    """
    source = find_weights(find_file(str(weights.model), "--model"))
    model: Any
    if source.is_file() or upstream.find_ckpt(source):
        model = upstream.load_ckpt_model(source, weights.model_name, weights.model_config)
    else:
        model = load_model(source, weights.model_name)
    model.eval().requires_grad_(False).to(device)
    if weights.enable_tiling:
        model.enable_tiling()
    return model, source


def find_weights(path: Path) -> Path:
    """Where the weights are: the path itself, or the average (else the weights) of a training run's newest state.

    Raises:
        FileNotFoundError: `path` is a folder without weights.
    """
    if path.is_file():
        return path.parent if path.suffix == ".safetensors" else path
    if (path / "config.json").is_file() or upstream.find_ckpt(path):
        return path
    states = [path / "export"] if (path / "export" / MANIFEST).is_file() else []
    states += [newest] if listed(path) and (newest := newest_valid(path)) else []
    for state in [path, *sorted(states, key=lambda folder: (folder / MANIFEST).stat().st_mtime, reverse=True)]:
        for folder in (state / "vae_ema", state / "vae", state):
            if (folder / "config.json").is_file():
                return folder
    raise FileNotFoundError(
        f"{path} holds no weights: --model takes a folder with config.json and .safetensors, the folder of a "
        "training run or of one of its checkpoints, or a .ckpt file"
    )


class _Reading(Dataset):
    def __init__(self, read: Callable[[int], Any], indices: Sequence[int]) -> None:
        self.read, self.indices = read, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, place: int) -> tuple[int, Any, str]:
        try:
            return self.indices[place], self.read(self.indices[place]), ""
        except BAD_SAMPLE_ERRORS as error:
            return self.indices[place], None, str(error)


def read_ahead(
    read: Callable[[int], T], indices: Sequence[int], num_workers: int
) -> Iterator[tuple[int, T | None, str]]:
    """(index, read(index), "") for each index in order, read by loader processes; (index, None, why) if it failed."""
    workers = min(num_workers, len(indices))
    return iter(DataLoader(_Reading(read, indices), batch_size=None, num_workers=workers, collate_fn=_as_it_is))


def _as_it_is(sample: T) -> T:
    return sample


# What to reconstruct --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """One video: its place among the inputs, its path from their folder, and the output's from the output folder."""

    index: int
    source: str
    name: str


def output_names(sources: Sequence[str]) -> list[str]:
    """A name for the result of each relative path: .png for images, else .mp4.

    a.webm becomes a.mp4, or a.webm.mp4 beside an a.mp4; names do not collide.
    """
    suffixes = {source: ".png" if is_image(Path(source)) else ".mp4" for source in sources}
    taken = {source for source, suffix in suffixes.items() if source.endswith(suffix)}
    names = []
    for source, suffix in suffixes.items():
        stem = source.rpartition(".")[0]
        others = chain([f"{stem}{suffix}", f"{source}{suffix}"], (f"{source}.{n}{suffix}" for n in count(2)))
        name = source if source in taken else next(name for name in others if name not in taken)
        names.append(name)
        taken.add(name)
    return names


def find_jobs(data: ClipsConfig, paths: Sequence[Path]) -> list[Job]:
    """The videos to reconstruct; a name does not depend on how many of them are chosen.

    Raises:
        ValueError: outputs would mix with inputs.
    """
    real, generated = Path(str(data.real_video_dir)), Path(str(data.generated_video_dir))
    if generated.resolve().is_relative_to(real.resolve()):
        raise ValueError(
            f"--generated_video_dir {generated} lies in --real_video_dir {real}, so its videos would be inputs of the "
            "next run: choose a folder beside it"
        )
    sources = [path.relative_to(real).as_posix() for path in paths]
    taken = [source for source in sources if source.split("/")[0] in (ORIGIN, SIDE_BY_SIDE)]
    if taken:
        raise ValueError(f"{real / taken[0]}: the folder's name is kept for outputs; rename it")
    jobs = [Job(n, source, name) for n, (source, name) in enumerate(zip(sources, output_names(sources), strict=True))]
    return jobs[: data.subset_size or None]


def claim_folder(folder: Path, settings: dict[str, Any], processes: Processes) -> None:
    """Makes the output folder, or finds one of the same settings; called on all processes.

    Raises:
        ValueError: it holds reconstructions of other settings, or other videos.
    """
    path = folder / SETTINGS
    if processes.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        found = find_files(folder, VIDEO_SUFFIXES + IMAGE_SUFFIXES)
        if found and not path.exists():
            raise ValueError(
                f"--generated_video_dir {folder} holds other videos ({found[0].name}): choose an empty folder"
            )
        if not found:  # also where a run with wrong settings has come to nothing
            tools.write_json(path, settings)
        for leftover in folder.rglob(".*.tmp.*"):
            leftover.unlink()
    processes.wait_for_everyone()
    before = json.loads(path.read_text(encoding="utf-8"))
    differing = [
        f"{key} {before.get(key)!r} there, {value!r} now" for key, value in settings.items() if before.get(key) != value
    ]
    if differing:
        raise ValueError(
            f"{folder} holds reconstructions of other settings ({'; '.join(differing)}): choose another "
            f"--generated_video_dir, or delete the folder. If these are the same in truth, correct {path}"
        )


def settings_of(config: ReconstructConfig, weights: Path, dtype: torch.dtype) -> dict[str, Any]:
    """Everything that the pixels of an output depend on."""
    data, files = config.data, config.files
    changed = max(path.stat().st_mtime for path in ([weights] if weights.is_file() else weights.iterdir()))
    return {
        "real_video_dir": str(Path(str(data.real_video_dir)).resolve()),
        "weights": str(weights.resolve()),
        "weights_changed": datetime.fromtimestamp(changed).isoformat(timespec="seconds"),
        "num_frames": data.num_frames,
        "sample_rate": data.sample_rate,
        "resolution": data.resolution,
        "crop_px": data.crop_px and list(data.crop_px),
        "sample_fps": files.sample_fps,
        "quality": "lossless" if files.lossless else f"crf {files.crf}",
        "enable_tiling": config.model.enable_tiling,
        "mixed_precision": {torch.float16: "fp16", torch.bfloat16: "bf16"}.get(dtype, "no"),
    }


# The records of a folder ----------------------------------------------------------------------------------------------


class Records:
    """Lines of metrics.jsonl and skipped.jsonl: each process appends to a file of its own, the main one merges them."""

    def __init__(self, folder: Path, processes: Processes) -> None:
        self.folder, self.processes = folder, processes
        self.merge(METRICS_FILE)
        if processes.is_main_process:
            for stale in (*self._parts(SKIPPED_FILE), folder / SKIPPED_FILE):
                stale.unlink(missing_ok=True)
        processes.wait_for_everyone()

    def append(self, file: str, row: dict[str, Any]) -> None:
        with open(self.folder / f".{self.processes.process_index}.{file}", "a", encoding="utf-8") as lines:
            lines.write(json.dumps(row) + "\n")

    def merge(self, file: str) -> dict[str, dict[str, Any]]:
        """All rows by name; called on all processes."""
        self.processes.wait_for_everyone()
        if self.processes.is_main_process:
            parts = self._parts(file)
            rows = read_rows([self.folder / file, *parts])
            if rows:
                lines = "".join(json.dumps(rows[name]) + "\n" for name in sorted(rows))
                tools.write_text(self.folder / file, lines)
            for part in parts:
                part.unlink()
        self.processes.wait_for_everyone()
        return read_rows([self.folder / file])

    def _parts(self, file: str) -> list[Path]:
        return sorted(self.folder.glob(f".*.{file}"))


def read_rows(paths: Iterable[Path]) -> dict[str, dict[str, Any]]:
    """Lines of metrics.jsonl or skipped.jsonl by name; files need not exist, later ones win."""
    rows = {}
    for path in paths:
        for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
            with suppress(ValueError):  # the last line of a process that was killed
                row = json.loads(line)
                rows[row["name"]] = row
    return rows


# The work -------------------------------------------------------------------------------------------------------------


class Reconstruction:
    """Reconstructs and writes videos of one folder.

    Args:
        model: on its device.
        processes: which share the work.
        dtype: of the computation.
    """

    def __init__(
        self, config: ReconstructConfig, model: Any, processes: Processes, dtype: torch.dtype, records: Records
    ) -> None:
        self.config, self.model, self.processes, self.dtype, self.records = config, model, processes, dtype, records
        self.folder = Path(str(config.data.generated_video_dir))

    def run(self, jobs: Sequence[Job], clips: EvalClips) -> None:
        """Reconstructs all `jobs` of this process; one thread writes files while the model goes on."""
        by_index = {job.index: job for job in jobs}
        samples = read_ahead(
            partial(_sample, clips, self.model.spatial_factor), list(by_index), self.config.data.num_workers
        )
        written: Future | None = None
        main = self.processes.is_main_process
        with ThreadPoolExecutor(1) as writer, tqdm(total=len(jobs), unit="clip", disable=not main) as bar:
            for indices, videos in batches(self._readable(samples, by_index), self.config.data.batch_size):
                real, fake, rows = self._reconstruct(torch.stack(videos))
                if written is not None:
                    written.result()
                written = writer.submit(self._write, [by_index[index] for index in indices], real, fake, rows)
                bar.update(len(indices))
            if written is not None:
                written.result()

    def _readable(
        self, samples: Iterable[tuple[int, Tensor | None, str]], jobs: dict[int, Job]
    ) -> Iterator[tuple[int, Tensor]]:
        for index, video, reason in samples:
            if video is None:
                self._skip(jobs[index], reason)
            else:
                yield index, video

    def _skip(self, job: Job, reason: str) -> None:
        reason = reason.removeprefix(f"{Path(str(self.config.data.real_video_dir)) / job.source}: ")
        self.records.append(SKIPPED_FILE, {"name": job.name, "source": job.source, "reason": reason})

    @torch.no_grad()
    def _reconstruct(self, videos: Tensor) -> tuple[Tensor, Tensor, dict[str, list[float]]]:
        """(B, 3, T, H, W) in [-1, 1] -> the same and its reconstruction on the CPU, and metrics by name."""
        real = videos.to(self.processes.device)
        with autocast(self.processes.device, self.dtype):
            fake = self.model(real).sample.float()  # (B, 3, T, H, W)
        metrics = measure(fake.clamp(-1, 1) / 2 + 0.5, real / 2 + 0.5)
        return videos, fake.cpu(), {name: values.tolist() for name, values in metrics.items()}

    def _write(self, jobs: Sequence[Job], real: Tensor, fake: Tensor, metrics: dict[str, list[float]]) -> None:
        for n, job in enumerate(jobs):
            if not fake[n].isfinite().all():
                self._skip(job, "the reconstruction is not finite: use --mixed_precision bf16 or no, or other weights")
                continue
            frames = {ORIGIN: to_uint8_frames(real[n]).numpy(), "": to_uint8_frames(fake[n]).numpy()}  # (T, H, W, 3)
            frames[SIDE_BY_SIDE] = np.concatenate(list(frames.values()), axis=2)  # (T, H, 2 W, 3)
            for kind, path in outputs(job, self.config, self.folder).items():
                self._write_clip(path, frames[kind])
            row = {"name": job.name, "source": job.source}
            self.records.append(METRICS_FILE, row | {name: values[n] for name, values in metrics.items()})

    def _write_clip(self, path: Path, frames: np.ndarray) -> None:
        if is_image(path):
            save_image(path, frames[0])
            return
        files = self.config.files
        fps = files.sample_fps / self.config.data.sample_rate
        with clip_writer(path, fps, crf=files.crf, lossless=files.lossless) as write:
            write(frames)


def outputs(job: Job, config: ReconstructConfig, folder: Path) -> dict[str, Path]:
    """Which files belong to a video, by kind; "" is the reconstruction."""
    kinds = [ORIGIN] * config.files.output_origin + [SIDE_BY_SIDE] * config.files.side_by_side + [""]
    return {kind: folder / kind / job.name for kind in kinds}


def is_done(job: Job, config: ReconstructConfig, folder: Path, rows: dict[str, dict[str, Any]]) -> bool:
    """All files of a video are there, and its metrics."""
    is_measured = rows.get(job.name, {}).get("source") == job.source
    return is_measured and all(path.is_file() for path in outputs(job, config, folder).values())


def measure(fake: Tensor, real: Tensor) -> dict[str, Tensor]:
    """PSNR, SSIM (means over frames) and flicker of each clip: (B, 3, T, H, W) in [0, 1] -> (B,) each."""
    frames = [video.transpose(1, 2).flatten(0, 1) for video in (fake, real)]  # (B T, 3, H, W)
    metrics = {name: metric(*frames).view(len(real), -1).mean(1) for name, metric in (("psnr", psnr), ("ssim", ssim))}
    return metrics | {"flicker": flicker(fake, real)}


def batches(samples: Iterable[tuple[int, Tensor]], batch_size: int) -> Iterator[tuple[list[int], list[Tensor]]]:
    """Neighbours of one shape, at most `batch_size` of them: (indices, videos)."""
    indices: list[int] = []
    videos: list[Tensor] = []
    for index, video in samples:
        if videos and (len(videos) == batch_size or video.shape != videos[0].shape):
            yield indices, videos
            indices, videos = [], []
        indices.append(index)
        videos.append(video)
    if videos:
        yield indices, videos


def _sample(clips: EvalClips, factor: int, index: int) -> Tensor:
    """(3, T, H, W) of a video; whole frames are cut to multiples of `factor` about their centre."""
    video = clips.sample(index)["video"]
    height, width = (size // factor * factor for size in video.shape[2:])
    top, left = (video.shape[2] - height) // 2, (video.shape[3] - width) // 2
    return video[:, :, top : top + height, left : left + width]


def reconstruct(config: ReconstructConfig, processes: Processes, dtype: torch.dtype) -> dict[str, Any]:
    """Reconstructs what is not there yet, on all processes; returns what summary.json says."""
    data = config.data
    root, folder = Path(str(data.real_video_dir)), Path(str(data.generated_video_dir))
    paths = list_videos(root, images=data.num_frames == 1)
    jobs = find_jobs(data, paths)
    model, weights = load_vae(config.model, processes.device)
    model.check_size(data.num_frames, *(data.crop_px or (data.resolution, data.resolution)))
    settings = settings_of(config, weights, dtype)
    claim_folder(folder, settings, processes)
    records = Records(folder, processes)
    rows = records.merge(METRICS_FILE)
    todo = [job for job in jobs if not is_done(job, config, folder, rows)]
    tools.say_kept(len(jobs) - len(todo), len(jobs), "video", processes, has_overwrite=False)
    clips = EvalClips(paths, root, data.num_frames, data.resolution, data.sample_rate, crop_px=data.crop_px)
    Reconstruction(config, model, processes, dtype, records).run(tools.share_of(todo, processes), clips)
    rows, skipped = records.merge(METRICS_FILE), records.merge(SKIPPED_FILE)
    done = [rows[job.name] for job in jobs if job.name in rows and job.name not in skipped]
    means = {name: float(np.mean([row[name] for row in done])) if done else None for name in METRICS}
    summary = {"num_videos": len(done), "num_skipped": len(skipped), "mean": means, "settings": settings}
    summary |= {"versions": runtime.versions()}
    if processes.is_main_process:
        tools.write_json(folder / SUMMARY, summary)
    if not done:
        reason = next((f"{row['source']}: {row['reason']}" for row in skipped.values()), "there are none")
        raise ValueError(f"none of the {len(jobs)} videos of {root} can be reconstructed; the first is {reason}")
    return summary


def report(summary: dict[str, Any], folder: Path) -> None:
    """Says what came of it."""
    means = summary["mean"]
    print(
        f"reconstructed {summary['num_videos']} videos: {folder}\nbefore the codec: PSNR {means['psnr']:.3f} dB, "
        f"SSIM {means['ssim']:.4f}, flicker {means['flicker']:.5f}"
    )
    if summary["num_skipped"]:
        rows = list(read_rows([folder / SKIPPED_FILE]).values())
        lines = "".join(f"\n  {row['source']}: {row['reason']}" for row in rows[:SHOWN_NAMES])
        more = f"\n  ... and {len(rows) - SHOWN_NAMES} more" if len(rows) > SHOWN_NAMES else ""
        print(f"{len(rows)} videos were skipped ({folder / SKIPPED_FILE}):{lines}{more}", file=sys.stderr)


def main(argv: Sequence[str] | None = None) -> None:
    """Reconstructs as the command line says; see `--help`."""
    with tools.started(PARSER, argv) as (config, accelerator, dtype):
        summary = reconstruct(config, accelerator, dtype)
        if accelerator.is_main_process:
            report(summary, Path(str(config.data.generated_video_dir)))


if __name__ == "__main__":
    main()
