"""Repairs an image, a folder of images or a json list with a trained refiner; `--help` lists all settings.

    python -m gaussian_refiner.infer --model run/export --input renders --output_dir repaired
    accelerate launch -m gaussian_refiner.infer --model run/export --input example_kitti.json --output_dir repaired

Every image is resized to the bucket of its aspect, as in training, repaired over its full width and resized back. The
same command again makes what is missing. An image's noise follows from the seed and its place in the input: not from
batch size or number of processes.
"""

import logging
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from common import tools
from common.config import Parser, Section, find_file, folder_or_id, option
from common.metrics import SSIM_WINDOW_PX, Lpips, lpips_for_all, psnr, ssim
from common.pretrained import first_line, named
from common.runtime import Processes
from common.video import MediaError, contact_sheet, image_size, load_image, save_image, to_uint8
from gaussian_refiner.config import SamplerConfig
from gaussian_refiner.data import BUCKETS, bucket_batches, choose_bucket, normalise, read_pairs
from gaussian_refiner.models.components import PARITY_PROMPTS, Components, embed_text, load_components
from gaussian_refiner.models.self_mutual_attention import CondCache, install_self_mutual_attention
from gaussian_refiner.models.unet import LATENT_CHANNELS
from gaussian_refiner.repair import Frame, Sampling, encode_frames, frame_of, repair_frames, sampling

logger = logging.getLogger(__name__)

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
METRICS = ("psnr", "ssim", "lpips")
TABLE_ROWS = 30  # of the printed table; metrics.json has all


@dataclass(frozen=True, kw_only=True)
class InferData(Section):
    input: str | None = option(None, "an image, a folder of images, or a json list as for training; required")
    output_dir: str | None = option(None, "a folder, or for one image a .png file; required")
    reference: str | None = option(
        None, "conditioning image for all, or a folder with one for each input (same names, or same number)"
    )
    gt: str | None = option(None, "target image or folder, for metrics")
    split: Literal["validation", "train", "all"] = option("validation", "which items of a json list")
    data_root: str | None = option(None, "folder that a json's paths are relative to; null is the working directory")
    holdout_items: int | None = option(
        None, "last items of a json without test split that are `validation`; null is 10, or all but one", minimum=1
    )
    overwrite: bool = option(False, "make again what is there already; otherwise existing results are kept")
    side_by_side: bool = option(False, "also write sheets: render, repaired, reference, target")


@dataclass(frozen=True, kw_only=True)
class InferModel(Section):
    model: str | None = option(
        None, "the folder `export` of a run, or the original checkpoint (folder or hub id) with --unet; required"
    )
    unet: str | None = option(None, "folder of another UNet: checkpoint-500, its unet or its unet_ema")
    prediction_type: Literal["epsilon", "v_prediction"] | None = option(
        None, "what that UNet was trained to predict; null is what the checkpoint says"
    )
    revision: str | None = option(None, "revision of a hub id")
    variant: str | None = option(None, "weight variant of all components, e.g. fp16")
    cache_dir: str | None = option(None, "folder of hub downloads")


@dataclass(frozen=True, kw_only=True)
class InferSampling(SamplerConfig):
    height_px: int | None = option(None, "height of the resized images, a multiple of 8; null is 480 (4:3) or 512")
    full_frame: bool = option(False, "the whole width in one piece instead of overlapping square windows")
    window_overlap_px: int | None = option(
        None, "least overlap of windows; null is a quarter of the height", minimum=0, needs="full_frame=False"
    )

    def __post_init__(self) -> None:
        if self.height_px is not None and (self.height_px < 64 or self.height_px % 8):
            raise ValueError(f"height_px {self.height_px} must be a multiple of 8 and at least 64")


@dataclass(frozen=True, kw_only=True)
class InferRun(tools.ToolConfig):
    mixed_precision: Literal["no", "fp32", "fp16", "bf16"] | None = option(
        None, "type of weights and activations; null is the launcher's, and without one fp16 on a GPU, fp32 on a CPU"
    )
    seed: int = option(12345, "an image's noise follows from the seed and its place in the input", minimum=0)
    batch_size: int = option(1, "images repaired at once, per process, with all windows of each", minimum=1)
    cond_cache: bool = option(True, "run the conditioning image once instead of in every step; same result")
    lpips_weights: str | None = option(
        None, "AlexNet weights of torchvision for LPIPS; null looks in torch hub's cache"
    )


@dataclass(frozen=True, kw_only=True)
class InferConfig:
    data: InferData = InferData()
    model: InferModel = InferModel()
    sampling: InferSampling = InferSampling()
    run: InferRun = InferRun()


def check(config: InferConfig) -> list[str]:
    """Problems between sections, one sentence each."""
    data = config.data
    required = {
        "data.input": "an image, a folder of images, or a json list as for training",
        "data.output_dir": "a folder, or for one image a .png file",
        "model.model": "the folder `export` of a run, or the original checkpoint",
    }
    problems = tools.required(config, required)
    if data.input and _is_json(data.input):
        problems += [
            f"--{name} cannot go with the json list {data.input}, which names its own; leave it out"
            for name in ("reference", "gt")
            if getattr(data, name)
        ]
    return problems


PARSER = Parser(
    InferConfig,
    aliases={
        "pretrained_model_name_or_path": "model.model",
        "model.pretrained_model_name_or_path": "model.model",
        "output": "data.output_dir",
        "data.output": "data.output_dir",
        **{f"frame.{name}": f"sampling.{name}" for name in ("height_px", "full_frame", "window_overlap_px")},
    },
    check=check,
    program="infer.py",
    description="Repairs renders of 3D-Gaussian scenes with a trained refiner.",
)


# What to repair -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """One image to repair. `number` is its place in the whole input, whatever outputs exist already."""

    number: int
    render: Path
    reference: Path | None
    gt: Path | None
    output: Path
    sheet: Path

    def __str__(self) -> str:
        return str(self.render)


def find_jobs(data: InferData) -> list[Job]:
    """The images to repair, in order, with what goes with them and where results go.

    Raises:
        FileNotFoundError: an input, reference or target path does not exist.
        ValueError: nothing to repair, references or targets that cannot be matched, outputs that would collide with
            each other or with inputs.
    """
    source = find_file(str(data.input), "--input")
    if _is_json(source):
        names, renders, references, gts = _read_json(source, data)
    else:
        renders = tools.list_images(source, "--input", IMAGE_SUFFIXES)
        names = [path.stem for path in renders]
        references = _match(renders, "--reference", data.reference, one_for_all=True)
        gts = _match(renders, "--gt", data.gt, one_for_all=False)
    output_dir = Path(str(data.output_dir))
    outputs = _outputs(output_dir, names, renders)
    inputs = {path.resolve() for path in (*renders, *references, *gts) if path is not None}
    for output in outputs:
        if output.resolve() in inputs:
            raise ValueError(f"--output_dir {output_dir} would overwrite the input {output}: choose another folder")
    rows = zip(renders, references, gts, outputs, strict=True)
    return [Job(number, *row, _sheet_path(output_dir, row[-1])) for number, row in enumerate(rows)]


def metrics_path(output: Path) -> Path:
    """Where the metrics go: into the output folder, or beside the one output file."""
    return output.with_name(f"{output.stem}_metrics.json") if _is_png(output) else output / "metrics.json"


def _sheet_path(output: Path, image: Path) -> Path:
    return (
        image.with_name(f"{image.stem}_side_by_side.png") if _is_png(output) else output / "side_by_side" / image.name
    )


def _is_json(path: str | Path) -> bool:
    return Path(path).suffix.lower() == ".json"


def _is_png(output: Path) -> bool:
    return output.suffix.lower() == ".png" and not output.is_dir()


def _read_json(source: Path, data: InferData) -> tuple[list[str], list[Path], list[Path | None], list[Path | None]]:
    """Names, renders, conditioning images and targets of the chosen split."""
    pairs = read_pairs(source, data.data_root, 0 if data.split == "all" else data.holdout_items)
    chosen = {"train": pairs.train, "validation": pairs.validation, "all": pairs.train + pairs.validation}[data.split]
    names = [re.sub(r"[^\w.-]+", "_", pair.name) for pair in chosen]  # Difix ids may hold slashes
    return names, [pair.render for pair in chosen], [pair.cond for pair in chosen], [pair.gt for pair in chosen]


def _match(renders: Sequence[Path], flag: str, path: str | None, one_for_all: bool) -> list[Path | None]:
    """An image of `path` for every render: of the same name, or of the same place where no name agrees."""
    if path is None:
        return [None] * len(renders)
    source = find_file(path, flag)
    images = tools.list_images(source, flag, IMAGE_SUFFIXES)
    if not source.is_dir():
        if len(renders) > 1 and not one_for_all:
            raise ValueError(f"{flag} {source} is one image, but --input gives {len(renders)}: give a folder")
        return [images[0]] * len(renders)
    by_stem = {path.stem: path for path in images}
    unmatched = [path.stem for path in renders if path.stem not in by_stem]
    if not unmatched:
        return [by_stem[path.stem] for path in renders]
    if len(unmatched) == len(renders) == len(images):
        logger.warning(
            "%s %s: no name agrees with those of --input, so images are paired in order of their names, "
            "%s with %s first",
            flag,
            source,
            renders[0].name,
            images[0].name,
        )
        return list(images)
    raise ValueError(
        f"{flag} {source} holds {len(images)} images, but none for {len(unmatched)} of {len(renders)} inputs: "
        f"{named(unmatched)}. Give every input one of the same name, or equally many under other names"
    )


def _outputs(output: Path, names: Sequence[str], renders: Sequence[Path]) -> list[Path]:
    if not names:
        raise ValueError("the chosen split of the json list has no items; choose another --split")
    if _is_png(output):
        if len(names) > 1:
            raise ValueError(f"--output_dir {output} is one file, but --input gives {len(names)} images: give a folder")
        return [output]
    if output.is_file() or output.suffix.lower() in IMAGE_SUFFIXES:
        raise ValueError(f"--output_dir {output} must be a folder, or a file that ends in .png")
    outputs = [output / f"{name}.png" for name in names]
    tools.require_distinct(renders, outputs)
    return outputs


def missing(jobs: Sequence[Job], config: InferConfig) -> list[Job]:
    """Those without a result."""
    return [job for job in jobs if config.data.overwrite or not job.output.exists()]


# The weights ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Refiner:
    """A trained refiner on its device, and how it samples."""

    components: Components
    cond_cache: CondCache
    how: Sampling
    use_cond_cache: bool
    seed: int


def load_model(config: InferConfig, processes: Processes, dtype: torch.dtype) -> Refiner:
    """The refiner on the process's device; FileNotFoundError or ValueError name what is wrong with its weights."""
    device = processes.device
    components = load_components(
        folder_or_id(str(config.model.model)),
        revision=config.model.revision,
        variant=config.model.variant,
        cache_dir=config.model.cache_dir,
        unet_source=config.model.unet and folder_or_id(config.model.unet),
    )
    if config.model.prediction_type:
        components.prediction_type = config.model.prediction_type
    if not components.unet.conv_in.weight[:, LATENT_CHANNELS:].any():
        logger.warning(
            "the UNet of %s does not look at the render: these are the weights that training starts from. Give the "
            "folder of a trained one as --unet",
            config.model.unet or config.model.model,
        )
    how = sampling(
        config.sampling,
        null_text=embed_text(components, [""]).to(device),  # (1, 77, C)
        parity_text=embed_text(components, PARITY_PROMPTS).to(device),  # (2, 77, C)
    )
    del components.text_encoder  # all texts are embedded
    for module in (components.vae, components.image_encoder, components.unet):
        module.requires_grad_(False).to(device, dtype)
    cond_cache = install_self_mutual_attention(components.unet)
    return Refiner(components, cond_cache, how, config.run.cond_cache, config.run.seed)


# The job, from files to files -----------------------------------------------------------------------------------------


def frames_of(settings: InferSampling) -> dict[str, Frame]:
    """The frame of each bucket; ValueError for windows that cannot be."""
    size = {name: getattr(settings, name) for name in ("height_px", "full_frame", "window_overlap_px")}
    return {bucket: frame_of(bucket, **size) for bucket in BUCKETS}


def batches_of(jobs: Sequence[Job], batch_size: int) -> list[list[Job]]:
    """Images of one bucket together; those that cannot be read among themselves."""

    def bucket_of(job: Job) -> str:
        try:
            return choose_bucket(*image_size(job.render))
        except MediaError:
            return ""

    batches = bucket_batches(range(len(jobs)), [bucket_of(job) for job in jobs], batch_size, drop_last=False)
    return [[jobs[index] for index in batch] for batch in batches]


def make_batch(jobs: Sequence[Job], refiner: Refiner, frames: Mapping[str, Frame]) -> None:
    """Reads, repairs and saves images of one bucket; ValueError or OSError if that fails."""
    frame = frames[choose_bucket(*image_size(jobs[0].render))]
    renders = [load_image(job.render) for job in jobs]
    references = [None if job.reference is None else _fit(load_image(job.reference), frame) for job in jobs]
    encoded = encode_frames(refiner.components, [_fit(render, frame) for render in renders], references, frame)
    images = repair_frames(
        refiner.components,
        refiner.cond_cache,
        refiner.how,
        encoded,
        seed=refiner.seed,
        numbers=[job.number for job in jobs],
        window_px=frame.window_px,
        window_overlap_px=frame.window_overlap_px,
        use_cond_cache=refiner.use_cond_cache,
    )  # (B, 3, H, W)
    if not images.isfinite().all():
        raise ValueError("the result is not finite: use --mixed_precision bf16 or no, or other weights")
    for job, render, image in zip(jobs, renders, images, strict=True):
        repaired = Image.fromarray(to_uint8(image)).resize(render.size, Image.Resampling.LANCZOS)
        save_image(job.output, np.asarray(repaired))  # (H, W, 3) of the input


def _fit(image: Image.Image, frame: Frame) -> np.ndarray:
    """uint8 (H, W, 3) of the frame's size; the aspect is not kept, as in training."""
    return np.array(image.resize((frame.width_px, frame.height_px), Image.Resampling.LANCZOS))


# What came of it ------------------------------------------------------------------------------------------------------


def measure(job: Job, lpips: Lpips | None) -> dict[str, float]:
    """Metrics of the saved file against the target, and of the untouched render (`_render`).

    A target of another size is resized to the render's. Raises MediaError for a file that is unreadable, too small, or
    no repair of this render.
    """
    render = load_image(job.render)
    images = {"": load_image(job.output), "_render": render}
    gt = load_image(job.gt).resize(render.size, Image.Resampling.LANCZOS)
    if images[""].size != render.size:
        raise MediaError(
            job.output, f"is {_by(images[''])} px, its render {_by(render)} px: repair it again with --overwrite"
        )
    if min(render.size) < SSIM_WINDOW_PX:
        raise MediaError(job.render, f"is {_by(render)} px: metrics need at least {SSIM_WINDOW_PX} px")
    metrics = {"psnr": psnr, "ssim": ssim} | ({"lpips": lpips} if lpips else {})
    return {
        f"{name}{suffix}": metric(_to_tensor(image), _to_tensor(gt)).item()
        for name, metric in metrics.items()
        for suffix, image in images.items()
    }


def _to_tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(normalise(np.asarray(image)))[None] / 2 + 0.5  # (1, 3, H, W) in [0, 1]


def _by(image: Image.Image) -> str:
    return f"{image.width} x {image.height}"


def write_sheet(job: Job) -> None:
    """Render, repaired image, reference and target in a row, as far as they exist."""
    paths = {"render": job.render, "repaired": job.output, "reference": job.reference, "gt": job.gt}
    images = {name: np.asarray(load_image(path)) for name, path in paths.items() if path is not None}
    save_image(job.sheet, contact_sheet([list(images.values())], list(images), cell_height_px=len(images["render"])))


def write_metrics(path: Path, rows: dict[str, dict[str, float]]) -> dict[str, float]:
    """Writes the metrics of each image, by the name of its output, and their means; returns the means."""
    means = {name: float(np.mean([row[name] for row in rows.values()])) for name in next(iter(rows.values()))}
    images = [{"name": name, **row} for name, row in rows.items()]
    content = {"num_images": len(rows), "mean": means, "images": images}
    tools.write_json(path, content)
    return means


def table(rows: dict[str, dict[str, float]], means: dict[str, float]) -> str:
    """The metrics as text, `render -> repaired`, the means last."""
    shown = dict(list(rows.items())[:TABLE_ROWS])
    width = max(len(name) for name in (*shown, "mean"))
    names = [name for name in METRICS if name in means]
    titles = {"psnr": "PSNR (dB)", "ssim": "SSIM", "lpips": "LPIPS"}
    lines = [" " * width + "".join(f"  {titles[name] + ' render -> repaired':>28}" for name in names)]
    for label, row in (*shown.items(), ("mean", means)):
        cells = [f"{row[f'{name}_render']:.4f} -> {row[name]:.4f}" for name in names]
        lines.append(f"{label:<{width}}" + "".join(f"  {cell:>28}" for cell in cells))
    if len(rows) > len(shown):
        lines.insert(-1, f"... and {len(rows) - len(shown)} more")
    return "\n".join(lines)


def review(
    jobs: Sequence[Job], failures: Mapping[Job, str], config: InferConfig, processes: Processes
) -> dict[Job, str]:
    """Sheets and metrics of all results, old and new, once all processes have finished; called on all of them.

    Args:
        failures: of this process, which no process reviews.

    Returns:
        why files could not be read, of those that this process has reviewed.
    """
    wants_metrics = any(job.gt for job in jobs)
    if not (config.data.side_by_side or wants_metrics):
        return {}
    device, problems = processes.device, {}
    has_failed = processes.reduce(torch.tensor([float(job in failures) for job in jobs], device=device), "sum").tolist()
    weights = config.run.lpips_weights
    lpips = lpips_for_all("alex", weights, processes, place="the metrics") if wants_metrics else None
    names = [f"{name}{suffix}" for name in METRICS if lpips or name != "lpips" for suffix in ("", "_render")]
    values = torch.zeros(len(jobs), 1 + len(names), dtype=torch.float64)  # the first column: measured
    share = tools.share_of([job for job, failed in zip(jobs, has_failed, strict=True) if not failed], processes)
    desc = "metrics" if wants_metrics else "sheets"
    for job in tqdm(share, unit="image", desc=desc, disable=not processes.is_main_process):
        try:
            if config.data.side_by_side:
                write_sheet(job)
            if job.gt:
                row = measure(job, lpips)
                values[job.number] = torch.tensor([1.0, *(row[name] for name in names)], dtype=torch.float64)
        except MediaError as error:
            problems[job] = str(error)
            tqdm.write(f"not measured: {error}", file=sys.stderr)
    # Every row is zero on all processes but one, so that their sum is the table, whatever the number of processes.
    values = processes.reduce(values.to(device), "sum").tolist()
    rows = {
        job.output.name: dict(zip(names, row, strict=True))
        for job, (is_measured, *row) in zip(jobs, values, strict=True)
        if is_measured
    }
    if rows and processes.is_main_process:
        path = metrics_path(Path(str(config.data.output_dir)))
        means = write_metrics(path, rows)
        print(f"{table(rows, means)}\nmetrics of {len(rows)} images: {path}")
    return problems


def infer(config: InferConfig, processes: Processes, dtype: torch.dtype) -> dict[Job, str]:
    """Repairs what is missing and reviews all; returns why images of this process went wrong.

    Raises:
        RuntimeError: a batch does not fit into the memory; what is repaired stays.
    """
    jobs, frames = find_jobs(config.data), frames_of(config.sampling)
    todo = missing(jobs, config)
    tools.say_kept(len(jobs) - len(todo), len(jobs), "image", processes)
    share = tools.share_of(todo, processes)
    failures: dict[Job, str] = {}
    if share:
        try:
            make = partial(make_batch, refiner=load_model(config, processes, dtype), frames=frames)
            failures = tools.attempt_all(batches_of(share, config.run.batch_size), make, "image", processes)
        except torch.OutOfMemoryError as error:
            raise RuntimeError(
                f"{processes.device} ran out of memory with a batch_size of {config.run.batch_size}: lower it or "
                f"height_px, leave out --full_frame, or use a half --mixed_precision. torch says: {first_line(error)}"
            ) from error
    failures |= review(jobs, failures, config, processes)
    tools.conclude([job.output for job in jobs], config.data.output_dir, failures, "image", processes)
    return failures


def main(argv: Sequence[str] | None = None) -> None:
    """Repairs as the command line says; see `--help`. Ends with status 1 if an image went wrong."""
    with tools.started(PARSER, argv, default_half="fp16") as (config, accelerator, dtype):
        failures = infer(config, accelerator, dtype)
    tools.exit_if(failures)


if __name__ == "__main__":
    main()
