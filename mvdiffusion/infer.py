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

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from common import tools
from common.config import Parser, find_file, folder_or_id, option
from common.data import rng_for
from common.runtime import Processes
from common.video import save_image, to_uint8, write_video
from mvdiffusion.media import object_mask, prepare_photo, read_photo, turntable, view_sheet
from mvdiffusion.pipelines.mvdiffusion_image import (
    MVDiffusionImagePipeline,
    ddim_schedule,
    fixed_cameras,
    load_pipeline,
    released_cameras,
)
from mvdiffusion.views import FIXED_VIEWS, choose_views

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
class InferRun(tools.ToolConfig):
    seed: int = option(42, "an object's noise follows from the seed and its name", minimum=0)
    batch_size: int = option(1, "objects made at once, per process", minimum=1)


@dataclass(frozen=True, kw_only=True)
class InferConfig:
    data: InferData = InferData()
    model: InferModel = InferModel()
    sampling: InferSampling = InferSampling()
    run: InferRun = InferRun()


def check(config: InferConfig) -> list[str]:
    """Problems between sections, one sentence each."""
    required = {
        "data.input": "a photograph or a folder of them",
        "data.output_dir": "a folder for results",
        "model.model": "the folder `export` of a run, or another pipeline",
    }
    problems = tools.required(config, required)
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

    def __str__(self) -> str:
        return str(self.photo)


def find_jobs(data: InferData) -> list[Job]:
    """All photographs, by name.

    Raises:
        FileNotFoundError: the input does not exist.
        ValueError: no photographs, two of one name, or an output that is a file.
    """
    photos = tools.list_images(find_file(str(data.input), "--input"), "--input")
    output = tools.output_folder(data.output_dir)
    tools.require_distinct(photos, [output / photo.stem for photo in photos])
    return [Job(photo, output / photo.stem) for photo in photos]


def recipe(job: Job, config: InferConfig) -> dict[str, Any]:
    """What a result follows from; written beside it."""
    data = {name: getattr(config.data, name) for name in ("crop_size", "background")}
    model = {name: value for name, value in asdict(config.model).items() if name != "cache_dir"}
    settings = data | model | asdict(config.sampling) | {"seed": config.run.seed}
    return {"input": str(job.photo)} | settings


def missing(jobs: Sequence[Job], config: InferConfig) -> list[Job]:
    """Those without a result; ValueError if there is one that was made otherwise."""
    overwrite = config.data.overwrite
    return [job for job in jobs if overwrite or not tools.is_made(job.output / RECORD, recipe(job, config))]


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
        tools.write_json(job.output / RECORD, recipe(job, config) | {"cameras": pipeline.config.cameras})


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


def infer(config: InferConfig, processes: Processes, dtype: torch.dtype) -> dict[Job, str]:
    """Makes what is missing; returns why objects of this process went wrong."""
    jobs = find_jobs(config.data)
    todo = missing(jobs, config)
    tools.say_kept(len(jobs) - len(todo), len(jobs), "object", processes)
    share = tools.share_of(todo, processes)
    failures: dict[Job, str] = {}
    if share:
        pipeline = load_model(config, processes, dtype)
        require_possible(config, pipeline)
        batches = tools.in_batches(share, config.run.batch_size)
        make = partial(make_batch, pipeline=pipeline, config=config)
        failures = tools.attempt_all(batches, make, "object", processes)
    records = [job.output / RECORD for job in jobs]
    tools.conclude(records, config.data.output_dir, failures, "object", processes)
    return failures


def main(argv: Sequence[str] | None = None) -> None:
    """Makes views as the command line says; see `--help`. Ends with status 1 if an object went wrong."""
    with tools.started(PARSER, argv) as (config, accelerator, dtype):
        failures = infer(config, accelerator, dtype)
    tools.exit_if(failures)


if __name__ == "__main__":
    main()
