"""Repairs an image, a folder of images or a json list with a trained refiner; `--help` lists all settings.

    python -m gaussian_refiner.infer --pretrained_model_name_or_path run/export --input renders --output repaired

Every image is resized to the bucket of its aspect, as in training, repaired over its full width and resized back.
"""

import json
import re
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from common import runtime
from common.config import Parser, find_file, folder_or_id, option
from common.metrics import SSIM_WINDOW_PX, Lpips, LpipsUnavailable, psnr, ssim
from common.video import MediaError, contact_sheet, image_size, load_image, save_image, to_uint8
from gaussian_refiner.config import SamplerConfig
from gaussian_refiner.data import BUCKETS, bucket_batches, choose_bucket, normalise, read_pairs
from gaussian_refiner.models.components import PARITY_PROMPTS, Components, embed_text, load_components
from gaussian_refiner.models.self_mutual_attention import CondCache, install_self_mutual_attention
from gaussian_refiner.models.unet import LATENT_CHANNELS
from gaussian_refiner.repair import Frame, Sampling, encode_frames, frame_of, repair_frames, sampling

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
METRICS = ("psnr", "ssim", "lpips")
TABLE_ROWS = 30  # of the printed table; metrics.json has all
SHOWN_NAMES = 5


@dataclass(frozen=True, kw_only=True)
class InferData:
    input: str | None = option(None, "an image, a folder of images, or a json list as for training; required")
    output: str | None = option(None, "a .png file (for one image) or a folder; required")
    reference: str | None = option(
        None, "conditioning image for all, or a folder with one for each input (same names, or same number)"
    )
    gt: str | None = option(None, "target image or folder, for metrics")
    split: Literal["validation", "train", "all"] = option("validation", "which items of a json list")
    data_root: str | None = option(None, "folder that a json's paths are relative to; null is the working directory")
    holdout_items: int = option(10, "last items of a json without a test split that are `validation`", minimum=1)
    overwrite: bool = option(False, "repair again what is there already; otherwise existing outputs are kept")
    side_by_side: bool = option(False, "also write sheets: render, repaired, reference, target")


@dataclass(frozen=True, kw_only=True)
class InferModel:
    pretrained_model_name_or_path: str | None = option(
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
class InferFrame:
    height_px: int | None = option(None, "height of the resized images, a multiple of 8; null is 480 (4:3) or 512")
    full_frame: bool = option(False, "the whole width in one piece instead of overlapping square windows")
    window_overlap_px: int | None = option(
        None, "least overlap of windows; null is a quarter of the height", minimum=0, needs="full_frame=False"
    )

    def __post_init__(self) -> None:
        if self.height_px is not None and (self.height_px < 64 or self.height_px % 8):
            raise ValueError(f"height_px {self.height_px} must be a multiple of 8 and at least 64")


@dataclass(frozen=True, kw_only=True)
class InferRun:
    seed: int = option(12345, "an image's noise follows from the seed and its place in the input", minimum=0)
    batch_size: int = option(1, "images repaired at once; wide ones count once per window", minimum=1)
    cond_cache: bool = option(True, "run the conditioning image once instead of in every step; same result")
    mixed_precision: Literal["no", "fp16", "bf16"] | None = option(
        None, "type of weights and activations; null is fp16 on a CUDA GPU, else no"
    )
    device: str = option("auto", "auto, cpu, cuda, cuda:1, ...")
    lpips_weights: str | None = option(
        None, "AlexNet weights of torchvision for LPIPS; null looks in torch hub's cache"
    )


@dataclass(frozen=True, kw_only=True)
class InferConfig:
    data: InferData = field(default_factory=InferData)
    model: InferModel = field(default_factory=InferModel)
    frame: InferFrame = field(default_factory=InferFrame)
    sampling: SamplerConfig = field(default_factory=SamplerConfig)
    run: InferRun = field(default_factory=InferRun)


def check(config: InferConfig) -> list[str]:
    """Problems between sections, one sentence each."""
    data = config.data
    problems = []
    if not data.input:
        problems.append("--input is required: an image, a folder of images, or a json list as for training")
    if not data.output:
        problems.append("--output is required: a .png file (for one image) or a folder")
    if not config.model.pretrained_model_name_or_path:
        problems.append(
            "--pretrained_model_name_or_path is required: the folder `export` of a run, or the original checkpoint"
        )
    if data.input and _is_json(data.input):
        problems += [
            f"--{name} cannot go with the json list {data.input}, which names its own; leave it out"
            for name in ("reference", "gt")
            if getattr(data, name)
        ]
    return problems


PARSER = Parser(
    InferConfig,
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
        renders = _list_images("--input", source)
        names = [path.stem for path in renders]
        references = _match(renders, "--reference", data.reference, one_for_all=True)
        gts = _match(renders, "--gt", data.gt, one_for_all=False)
    outputs = _outputs(Path(str(data.output)), names, renders)
    inputs = {path.resolve() for path in (*renders, *references, *gts) if path is not None}
    for output in outputs:
        if output.resolve() in inputs:
            raise ValueError(f"--output {data.output} would overwrite the input {output}: choose another folder")
    rows = zip(renders, references, gts, outputs, strict=True)
    return [Job(number, *row, _sheet_path(Path(str(data.output)), row[-1])) for number, row in enumerate(rows)]


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


def _list_images(flag: str, source: Path) -> list[Path]:
    """The images of a folder by name, or the one image."""
    if not source.is_dir():
        return [source]
    images = sorted(p for p in source.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES and not p.name.startswith("."))
    if not images:
        raise ValueError(f"{flag} {source} holds no images: files ending in {', '.join(IMAGE_SUFFIXES)} are looked for")
    return images


def _match(renders: Sequence[Path], flag: str, path: str | None, one_for_all: bool) -> list[Path | None]:
    """An image of `path` for every render: of the same name, or of the same place where no name agrees."""
    if path is None:
        return [None] * len(renders)
    source = find_file(path, flag)
    images = _list_images(flag, source)
    if not source.is_dir():
        if len(renders) > 1 and not one_for_all:
            raise ValueError(f"{flag} {source} is one image, but --input gives {len(renders)}: give a folder")
        return [images[0]] * len(renders)
    by_stem = {path.stem: path for path in images}
    missing = [path.stem for path in renders if path.stem not in by_stem]
    if not missing:
        return [by_stem[path.stem] for path in renders]
    if len(missing) == len(renders) == len(images):
        print(
            f"{flag} {source}: no name agrees with those of --input, so images are paired in order of their names, "
            f"{renders[0].name} with {images[0].name} first",
            file=sys.stderr,
        )
        return list(images)
    raise ValueError(
        f"{flag} {source} holds {len(images)} images, but none for {len(missing)} of {len(renders)} inputs: "
        f"{_some(missing)}. Give every input one of the same name, or equally many under other names"
    )


def _outputs(output: Path, names: Sequence[str], renders: Sequence[Path]) -> list[Path]:
    if not names:
        raise ValueError("the chosen split of the json list has no items; choose another --split")
    if _is_png(output):
        if len(names) > 1:
            raise ValueError(f"--output {output} is one file, but --input gives {len(names)} images: give a folder")
        return [output]
    if output.is_file() or output.suffix.lower() in IMAGE_SUFFIXES:
        raise ValueError(f"--output {output} must be a folder, or a file that ends in .png")
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        files = [str(path) for path, name in zip(renders, names, strict=True) if name == twice[0]]
        raise ValueError(f"{' and '.join(files)} would both be written to {output / twice[0]}.png: rename one")
    return [output / f"{name}.png" for name in names]


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:SHOWN_NAMES]) + (", ..." if len(names) > SHOWN_NAMES else "")


# The weights ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Refiner:
    """A trained refiner on its device, and how it samples."""

    components: Components
    cond_cache: CondCache
    how: Sampling
    use_cond_cache: bool
    seed: int


def load_refiner(config: InferConfig) -> Refiner:
    """Loads the weights as the configuration says; FileNotFoundError or ValueError name what is wrong with them."""
    device = choose_device(config.run.device)
    dtype = choose_dtype(config.run.mixed_precision, device)
    components = load_components(
        folder_or_id(str(config.model.pretrained_model_name_or_path)),
        revision=config.model.revision,
        variant=config.model.variant,
        cache_dir=config.model.cache_dir,
        unet_source=config.model.unet and folder_or_id(config.model.unet),
    )
    if config.model.prediction_type:
        components.prediction_type = config.model.prediction_type
    if not components.unet.conv_in.weight[:, LATENT_CHANNELS:].any():
        print(
            f"the UNet of {config.model.unet or config.model.pretrained_model_name_or_path} does not look at the "
            "render: these are the weights that training starts from. Give the folder of a trained one as --unet",
            file=sys.stderr,
        )
    how = sampling(
        config.sampling,
        null_text=embed_text(components, [""]).to(device),  # (1, 77, C)
        parity_text=embed_text(components, PARITY_PROMPTS).to(device),  # (2, 77, C)
    )
    for module in (components.vae, components.image_encoder, components.unet):
        module.requires_grad_(False).to(device, dtype)
    cond_cache = install_self_mutual_attention(components.unet)
    return Refiner(components, cond_cache, how, config.run.cond_cache, config.run.seed)


def choose_device(name: str) -> torch.device:
    """The named device, or for "auto" the accelerator if there is one; ValueError if it cannot be used."""
    if name == "auto":
        name = str(torch.accelerator.current_accelerator()) if torch.accelerator.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device {name!r} is unknown: use auto, cpu, cuda or cuda:N") from error
    if device.type == "cuda" and not (device.index or 0) < torch.cuda.device_count():
        raise ValueError(f"device {name} is not there: PyTorch sees {torch.cuda.device_count()} CUDA GPUs; use auto")
    return device


def choose_dtype(wanted: str | None, device: torch.device) -> torch.dtype:
    """The type of weights and activations; fp16 without a GPU becomes float32, as in training, and says so."""
    if wanted == "fp16" and device.type == "cpu":
        print("mixed_precision fp16 needs a GPU: float32 is used on the CPU", file=sys.stderr)
        return torch.float32
    wanted = wanted or ("fp16" if device.type == "cuda" else "no")
    return {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[wanted]


# The job, from files to files -----------------------------------------------------------------------------------------


def repair_jobs(jobs: Sequence[Job], config: InferConfig) -> dict[Job, str]:
    """Repairs and saves; returns why for each image that was not repaired."""
    failures: dict[Job, str] = {}
    frames = {bucket: frame_of(bucket, **asdict(config.frame)) for bucket in BUCKETS}
    buckets = []
    for job in jobs:
        try:
            buckets.append(choose_bucket(*image_size(job.render)))
        except MediaError as error:
            buckets.append("")
            _fail(failures, job, error)
    readable = [index for index, bucket in enumerate(buckets) if bucket]
    if not readable:
        return failures
    refiner = load_refiner(config)
    with tqdm(total=len(jobs), initial=len(failures), unit="image", desc="repair") as bar:
        for batch in bucket_batches(readable, buckets, config.run.batch_size, drop_last=False):
            _repair_batch([jobs[index] for index in batch], frames[buckets[batch[0]]], refiner, failures)
            bar.update(len(batch))
    return failures


def _repair_batch(jobs: Sequence[Job], frame: Frame, refiner: Refiner, failures: dict[Job, str]) -> None:
    """Reads, repairs and saves images of one bucket."""
    loaded = []
    for job in jobs:
        try:
            render = load_image(job.render)
            reference = None if job.reference is None else _fit(load_image(job.reference), frame)
            loaded.append((job, _fit(render, frame), reference, render.size))
        except MediaError as error:
            _fail(failures, job, error)
    if not loaded:
        return
    encoded = encode_frames(
        refiner.components, [render for _, render, _, _ in loaded], [ref for _, _, ref, _ in loaded], frame
    )
    images = repair_frames(
        refiner.components,
        refiner.cond_cache,
        refiner.how,
        encoded,
        seed=refiner.seed,
        numbers=[job.number for job, *_ in loaded],
        window_px=frame.window_px,
        window_overlap_px=frame.window_overlap_px,
        use_cond_cache=refiner.use_cond_cache,
    )  # (B, 3, H, W)
    for (job, _, _, size_px), image in zip(loaded, images, strict=True):
        if not image.isfinite().all():
            _fail(failures, job, "the result is not finite: use --mixed_precision bf16 or no, or other weights")
            continue
        repaired = Image.fromarray(to_uint8(image))
        save_image(job.output, np.asarray(repaired.resize(size_px, Image.Resampling.LANCZOS)))  # (H, W, 3) of the input


def _fit(image: Image.Image, frame: Frame) -> np.ndarray:
    """uint8 (H, W, 3) of the frame's size; the aspect is not kept, as in training."""
    return np.array(image.resize((frame.width_px, frame.height_px), Image.Resampling.LANCZOS))


def _fail(failures: dict[Job, str], job: Job, reason: object) -> None:
    failures[job] = str(reason)
    tqdm.write(f"not repaired: {job.render}: {reason}", file=sys.stderr)


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


def load_lpips(weights: str | None, device: torch.device) -> Lpips | None:
    """LPIPS with AlexNet features, or None with the reason on stderr; LpipsUnavailable where `weights` are given."""
    try:
        return Lpips.load("alex", weights, device)
    except LpipsUnavailable as error:
        if weights:
            raise
        print(f"metrics go without LPIPS: {error}", file=sys.stderr)
        return None


def write_metrics(path: Path, rows: dict[str, dict[str, float]]) -> dict[str, float]:
    """Writes the metrics of each image, by the name of its output, and their means; returns the means."""
    means = {name: float(np.mean([row[name] for row in rows.values()])) for name in next(iter(rows.values()))}
    images = [{"name": name, **row} for name, row in rows.items()]
    content = {"num_images": len(rows), "mean": means, "images": images}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
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


def review(jobs: Sequence[Job], config: InferConfig) -> dict[Job, str]:
    """Sheets and metrics of all outputs, old and new; returns why for each image whose files could not be read."""
    failures: dict[Job, str] = {}
    wants_metrics = any(job.gt for job in jobs)
    if not (config.data.side_by_side or wants_metrics):
        return failures
    lpips = load_lpips(config.run.lpips_weights, choose_device(config.run.device)) if wants_metrics else None
    rows = {}
    for job in tqdm(jobs, unit="image", desc="metrics" if wants_metrics else "sheets"):
        try:
            if config.data.side_by_side:
                write_sheet(job)
            if job.gt:
                rows[job.output.name] = measure(job, lpips)
        except MediaError as error:
            failures[job] = str(error)
            tqdm.write(f"not measured: {error}", file=sys.stderr)
    if rows:
        path = metrics_path(Path(str(config.data.output)))
        means = write_metrics(path, rows)
        print(f"{table(rows, means)}\nmetrics of {len(rows)} images: {path}")
    return failures


def infer(config: InferConfig) -> dict[Job, str]:
    """Repairs what is not repaired yet and reviews all; returns why for each image that went wrong."""
    jobs = find_jobs(config.data)
    todo = [job for job in jobs if config.data.overwrite or not job.output.exists()]
    if len(todo) < len(jobs):
        print(f"{len(jobs) - len(todo)} of {len(jobs)} outputs exist and are kept; --overwrite repairs them again")
    failures = repair_jobs(todo, config) if todo else {}
    print(f"repaired {len(todo) - len(failures)} of {len(jobs)} images: {config.data.output}")
    reviewed = [job for job in jobs if job not in failures]
    return failures | review(reviewed, config)


def main(argv: Sequence[str] | None = None) -> None:
    """Repairs as the command line says; see `--help`. Ends with status 1 if an image could not be read or repaired."""
    config, warnings = PARSER.parse_or_exit(sys.argv[1:] if argv is None else argv)
    for warning in warnings:
        print(warning, file=sys.stderr)
    runtime.quiet_libraries()
    with runtime.clear_errors():
        failures = infer(config)
    if failures:
        lines = "".join(f"\n  {job.render}: {reason}" for job, reason in failures.items())
        print(f"{len(failures)} images went wrong:{lines}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
