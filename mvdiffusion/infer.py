"""Makes views of objects from photographs; `--help` lists all settings.

    python -m mvdiffusion.infer --model run/export --input photos --output_dir views
    accelerate launch -m mvdiffusion.infer --model wonder3d-v1.0 --unet run/checkpoint-5000 --poses upright \\
        --input photos --output_dir views

Photographs should be cut out (PNG or WebP with transparency). For photos/owl.png the folder views/owl then holds, for
each view, `normals_000_front.png` and `rgb_000_front.png`; besides `input.png`, `sheet.png` and `turntable.mp4`. Where
the photograph is cut out, the views' background is known to be plain: it is made transparent in the normal maps and in
copies of the colours under `masked_colors`. `views.json`, written last, says how they were made. The same command again
makes what is missing. Results follow from the seed and the photograph's name: not from batch size, other photographs or
number of processes.
"""

import json
import logging
import os
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from common import runtime
from common.config import Parser, find_file, folder_or_id, option
from common.data import BAD_SAMPLE_ERRORS, rng_for
from common.runtime import Processes
from common.video import IMAGE_SUFFIXES, save_image, to_uint8, write_video
from mvdiffusion.data.poses import FIXED_VIEWS, choose_views
from mvdiffusion.media import object_mask, prepare_photo, read_photo, turntable, view_sheet
from mvdiffusion.models.initialise import read_json
from mvdiffusion.pipelines.mvdiffusion_image import (
    MVDiffusionImagePipeline,
    ddim_schedule,
    fixed_cameras,
    load_pipeline,
    released_cameras,
)

logger = logging.getLogger(__name__)

RAW, AVERAGED = "unet", "unet_ema"
RECORD = "views.json"


# Settings -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class InferData:
    input: str | None = option(None, "a photograph or a folder of them; required")
    output_dir: str | None = option(None, "folder for results, one folder per photograph in it; required")
    crop_size: int | None = option(
        None,
        "pixels that the object's longer side gets; null is 3/4 of the resolution, -1 keeps the photograph's framing",
        minimum=-1,
    )
    background: Literal["white", "gray", "black"] = option("white", "background behind cut-out photographs")
    masks: bool = option(True, "of cut-out photographs, make the background of the views transparent")
    sheet: bool = option(True, "write a sheet of all views")
    turntable: bool = option(True, "write a clip of the views in order of azimuth, colour over normals")
    fps: float = option(2.0, "views per second of that clip", above=0, needs="turntable")
    overwrite: bool = option(False, "make again what is there already; otherwise existing results are kept")


@dataclass(frozen=True, kw_only=True)
class InferModel:
    model: str | None = option(None, "folder of a pipeline (`export` of a run, or a released one), or hub id; required")
    unet: str | None = option(None, "folder of another UNet: checkpoint-500 of a run, or its unet or unet_ema")
    use_ema: bool = option(False, "of a checkpoint take the averaged weights", needs="unet")
    poses: Literal["tilted", "upright"] | None = option(
        None, "cameras that the UNet was trained with; null is what the pipeline says, else tilted as in released ones"
    )
    views: tuple[str, ...] = option((), "names of the views in the order of training; none is what the pipeline says")
    revision: str | None = option(None, "revision of a hub id")
    cache_dir: str | None = option(None, "folder of hub downloads")


@dataclass(frozen=True, kw_only=True)
class InferSampling:
    num_inference_steps: int = option(50, "steps of DDIM", minimum=1)
    guidance_scale: float = option(3.0, "classifier-free guidance; 1 is off and takes half the time", minimum=0)
    eta: float = option(1.0, "noise in every step: 0 is deterministic DDIM, 1 is DDPM", minimum=0, maximum=1)
    resolution: int | None = option(None, "sides of the views in pixels; null is that of training", minimum=8)


@dataclass(frozen=True, kw_only=True)
class InferRun:
    seed: int = option(42, "an object's noise follows from the seed and its name", minimum=0)
    batch_size: int = option(1, "objects made at once, per process", minimum=1)
    device: Literal["auto", "cpu", "cuda"] = option("auto", "auto takes the GPUs if there are any")
    mixed_precision: Literal["no", "fp32", "fp16", "bf16"] | None = option(
        None, "type of weights and activations; null is the launcher's, and without one bf16 on a GPU, fp32 on a CPU"
    )


@dataclass(frozen=True, kw_only=True)
class InferConfig:
    data: InferData = field(default_factory=InferData)
    model: InferModel = field(default_factory=InferModel)
    sampling: InferSampling = field(default_factory=InferSampling)
    run: InferRun = field(default_factory=InferRun)


def check(config: InferConfig) -> list[str]:
    """Problems between sections, one sentence each."""
    required = {
        "--input is required: a photograph or a folder of them": config.data.input,
        "--output_dir is required: a folder for results": config.data.output_dir,
        "--model is required: the folder `export` of a run, or another pipeline": config.model.model,
    }
    problems = [sentence for sentence, value in required.items() if not value]
    if config.data.crop_size == 0:
        problems.append("crop_size 0 leaves nothing of the object: give pixels, or -1 for the photograph's framing")
    return problems


PARSER = Parser(
    InferConfig,
    aliases={
        "pretrained_model_name_or_path": "model.model",
        "output": "data.output_dir",
        "validation_guidance_scale": "sampling.guidance_scale",
    },
    check=check,
    program="infer.py",
    description="Makes views of objects, in colour and normals, from photographs.",
)


# What to make ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """One object: its photograph and the folder of its results, which has its name."""

    photo: Path
    output: Path

    @property
    def name(self) -> str:
        return self.output.name


def find_jobs(data: InferData) -> list[Job]:
    """All photographs, by name.

    Raises:
        FileNotFoundError: the input does not exist.
        ValueError: no photographs, two of one name, or an output that is a file.
    """
    source, output = find_file(str(data.input), "--input"), Path(str(data.output_dir))
    photos = [source]
    if source.is_dir():
        photos = sorted(p for p in source.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES and p.name[0] != ".")
    if not photos:
        raise ValueError(f"--input {source} holds no photographs: files ending in {', '.join(IMAGE_SUFFIXES)} count")
    if output.is_file():
        raise ValueError(f"--output_dir {output} is a file, but must be a folder")
    twice = [name for name, count in Counter(photo.stem for photo in photos).items() if count > 1]
    if twice:
        files = " and ".join(str(photo) for photo in photos if photo.stem == twice[0])
        raise ValueError(f"{files} would both be written to {output / twice[0]}: rename one")
    return [Job(photo, output / photo.stem) for photo in photos]


def recipe(job: Job, config: InferConfig) -> dict[str, Any]:
    """What a result follows from; written beside it."""
    data = {name: getattr(config.data, name) for name in ("crop_size", "background")}
    model = {name: value for name, value in asdict(config.model).items() if name != "cache_dir"}
    settings = data | model | asdict(config.sampling) | {"seed": config.run.seed}
    return {"input": str(job.photo)} | json.loads(json.dumps(settings))  # tuples as they are read back


def missing(jobs: Sequence[Job], config: InferConfig) -> list[Job]:
    """Those without a result; ValueError if there is one that was made otherwise."""
    todo = []
    for job in jobs:
        path = job.output / RECORD
        if config.data.overwrite or not path.is_file():
            todo.append(job)
            continue
        made = read_json(path)
        differing = [name for name, value in recipe(job, config).items() if made.get(name) != value]
        if differing:
            raise ValueError(
                f"{path} was made with another {', '.join(differing)}: give another --output_dir, or --overwrite true"
            )
    return todo


# Generation -----------------------------------------------------------------------------------------------------------


def load_model(config: InferConfig, processes: Processes, dtype: torch.dtype) -> MVDiffusionImagePipeline:
    """The pipeline on the process's device; FileNotFoundError or ValueError name what is wrong with it."""
    model = config.model
    pipeline = load_pipeline(
        folder_or_id(str(model.model)),
        unet=model.unet and folder_or_id(model.unet),
        unet_subfolder=AVERAGED if model.use_ema else RAW,
        revision=model.revision,
        cache_dir=model.cache_dir,
    )
    if model.poses or model.views:
        poses = model.poses or _poses_of(pipeline)
        views = choose_views(pipeline.config.num_views, model.views or pipeline.views, poses)
        pipeline.register_to_config(cameras=fixed_cameras(views, poses))
    elif model.unet and pipeline.config.cameras == released_cameras(pipeline.views):
        logger.warning(
            "%s is taken to be trained with tilted poses, as released weights are: if it is not, give --poses upright, "
            "or as --model the run's export, which says it",
            model.unet,
        )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(processes.device, dtype)


def _poses_of(pipeline: MVDiffusionImagePipeline) -> str:
    upright = set(pipeline.views) <= set(FIXED_VIEWS) and fixed_cameras(pipeline.views, "upright")
    return "upright" if pipeline.config.cameras == upright else "tilted"


def resolution_of(config: InferConfig, pipeline: MVDiffusionImagePipeline) -> int:
    """Sides of the views in pixels."""
    return config.sampling.resolution or pipeline.unet.config.sample_size * pipeline.vae_scale_factor


def require_possible(config: InferConfig, pipeline: MVDiffusionImagePipeline) -> None:
    """ValueError for sizes or steps that no photograph could be made with."""
    size_px, factor, crop_size = resolution_of(config, pipeline), pipeline.vae_scale_factor, config.data.crop_size
    if size_px % factor:
        raise ValueError(f"resolution {size_px} must be a multiple of {factor}, the VAE's pixels per latent")
    if crop_size and crop_size > size_px:
        raise ValueError(f"crop_size {crop_size} is above the resolution, {size_px}: the object would not fit")
    ddim_schedule(pipeline.scheduler, config.sampling.num_inference_steps)


def make_batch(jobs: Sequence[Job], pipeline: MVDiffusionImagePipeline, config: InferConfig) -> None:
    """Makes and writes the views of some objects; ValueError or OSError if that fails."""
    size_px = resolution_of(config, pipeline)
    photos = [read_photo(job.photo) for job in jobs]
    prepared = [prepare_photo(photo, size_px, config.data.crop_size, config.data.background) for photo in photos]
    seeds = [int(rng_for(config.run.seed, f"views of {job.name}").integers(2**62)) for job in jobs]
    sampling = asdict(config.sampling)
    sampling.pop("resolution")
    output = pipeline(
        prepared,
        height=size_px,
        width=size_px,
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        output_type="pt",
        **sampling,
    )
    for number, job in enumerate(jobs):
        views = {"normal": output.normals[number].cpu(), "colour": output.colours[number].cpu()}  # (V, 3, H, W)
        is_cut_out = photos[number].mode == "RGBA"
        if not is_cut_out:
            logger.warning(
                "%s has no transparency: its background is taken as it is, where training knows plain ones; cut the "
                "object out for better views",
                job.photo,
            )
        write_views(job, prepared[number], views, pipeline, config.data, masked=is_cut_out and config.data.masks)
        record = recipe(job, config) | {"cameras": pipeline.config.cameras}
        # Written last and at once: an object counts as made when this is there.
        unfinished = job.output / f"{RECORD}.tmp"
        unfinished.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", "utf-8")
        os.replace(unfinished, job.output / RECORD)


def write_views(
    job: Job,
    photo: Image.Image,
    views: dict[str, Tensor],
    pipeline: MVDiffusionImagePipeline,
    data: InferData,
    masked: bool,
) -> None:
    """Pictures of one object; `views` as `sample_views` returns them, without the object axis."""
    (job.output / RECORD).unlink(missing_ok=True)
    alphas = object_mask(views["normal"]).numpy().astype(np.uint8)[..., None] * 255  # (V, H, W, 1)
    for name, normal, colour, alpha in zip(pipeline.views, views["normal"], views["colour"], alphas, strict=True):
        normals, colours = to_uint8(normal), to_uint8(colour)  # (H, W, 3)
        save_image(job.output / f"rgb_000_{name}.png", colours)
        if masked:  # what is transparent keeps its colour, so the files are good for readers of RGB too
            normals, colours = (np.concatenate([each, alpha], axis=-1) for each in (normals, colours))  # (H, W, 4)
            save_image(job.output / "masked_colors" / f"rgb_000_{name}.png", colours)
        save_image(job.output / f"normals_000_{name}.png", normals)
    save_image(job.output / "input.png", np.asarray(photo))
    if data.sheet:
        save_image(job.output / "sheet.png", view_sheet(np.asarray(photo), views, pipeline.views))
    if data.turntable:
        write_video(job.output / "turntable.mp4", turntable(views, pipeline.azimuths), data.fps)


def attempt(jobs: Sequence[Job], pipeline: MVDiffusionImagePipeline, config: InferConfig) -> dict[Job, str]:
    """Makes some objects; one that cannot be made does not take the others with it. Returns why each failed."""
    try:
        make_batch(jobs, pipeline, config)
    except BAD_SAMPLE_ERRORS as error:
        if len(jobs) == 1:
            tqdm.write(f"not made: {jobs[0].photo}: {error}", file=sys.stderr)
            return {jobs[0]: str(error)}
        return {job: reason for one in jobs for job, reason in attempt([one], pipeline, config).items()}
    return {}


def infer(config: InferConfig, processes: Processes, dtype: torch.dtype) -> dict[Job, str]:
    """Makes what is missing; returns why objects of this process went wrong."""
    jobs = find_jobs(config.data)
    todo = missing(jobs, config)
    processes.wait_for_everyone()  # nobody writes before all have looked
    if len(todo) < len(jobs) and processes.is_main_process:
        print(f"{len(jobs) - len(todo)} of {len(jobs)} objects exist and are kept; --overwrite true makes them again")
    share = todo[processes.process_index :: processes.num_processes]
    failures: dict[Job, str] = {}
    if share:
        pipeline = load_model(config, processes, dtype)
        require_possible(config, pipeline)
        batch_size = config.run.batch_size
        with tqdm(total=len(share), unit="object", disable=not processes.is_main_process) as bar:
            for batch in (share[start : start + batch_size] for start in range(0, len(share), batch_size)):
                failures |= attempt(batch, pipeline, config)
                bar.update(len(batch))
    processes.wait_for_everyone()
    if processes.is_main_process:
        done = sum((job.output / RECORD).is_file() for job in jobs)
        print(f"{done} of {len(jobs)} objects are there: {config.data.output_dir}")
    return failures


def main(argv: Sequence[str] | None = None) -> None:
    """Makes views as the command line says; see `--help`. Ends with status 1 if an object went wrong."""
    config, warnings = PARSER.parse_or_exit(sys.argv[1:] if argv is None else argv)
    with runtime.clear_errors():
        accelerator, dtype = runtime.start_tool(config.run.device, config.run.mixed_precision)
        for warning in warnings if accelerator.is_main_process else ():
            logger.warning("%s", warning)
        failures = infer(config, accelerator, dtype)
    if failures:
        lines = "".join(f"\n  {job.photo}: {reason}" for job, reason in failures.items())
        print(f"{len(failures)} objects went wrong:{lines}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
