"""Generates images and videos from prompts; `--help` lists all settings.

    python -m diffnext.infer --model nova-d48w1024-sdxl1024 --prompt "a red fox in snow" --output_dir out
    accelerate launch -m diffnext.infer --model nova-d48w1024-osp480 --prompts prompts.txt --output_dir out \\
        --transformer experiments/run/checkpoint-5000 --max_latent_length 9

The output folder then holds `00000.png` or `00000.mp4` for the first prompt (`00000_1.png` for its second result), and
beside each a .json that says how it was made. The same command again makes what is missing. A result follows from the
seed, the prompt's number and the result's: not from the batch size or the number of processes.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common import tools
from common.config import Parser, find_file, option
from common.data import rng_for
from common.runtime import Processes
from common.video import load_image, save_image, write_video
from diffnext.config import SamplerConfig
from diffnext.models.generation import GenerationSettings, SampleDraws
from diffnext.models.guidance import Guidance
from diffnext.pipelines import NOVAPipeline
from diffnext.pipelines.components import find_folder

RAW, AVERAGED = "transformer", "transformer_ema"
PROMPT_KEYS = ("prompt", "negative_prompt", "image", "motion_flow", "embedding")


# Settings -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class InferData:
    prompt: str | None = option(None, "one prompt")
    prompts: str | None = option(
        None,
        f"file of prompts: text with one per line, or a json list of texts or of objects of {', '.join(PROMPT_KEYS)}",
    )
    negative_prompt: str = option("", "what results should not be; a prompt's own in a json list comes first")
    image: str | None = option(
        None, "first frame of the videos, in any size; a prompt's own in a json list comes first"
    )
    output_dir: str | None = option(None, "folder for results; required")
    num_images_per_prompt: int = option(1, "results per prompt", minimum=1)
    fps: float = option(12.0, "frames per second of the videos", above=0)
    overwrite: bool = option(False, "make again what is there already; otherwise existing results are kept")


@dataclass(frozen=True, kw_only=True)
class InferModel:
    model: str | None = option(None, "folder, or hub id, of a NOVA pipeline; required")
    transformer: str | None = option(
        None,
        "folder of other weights: checkpoint-5000 of a run, or its transformer or transformer_ema; null is its own",
    )
    use_ema: bool = option(False, "of a checkpoint take the averaged weights", needs="transformer")


@dataclass(frozen=True, kw_only=True)
class InferSampling(SamplerConfig):
    max_latent_length: int = option(1, "latent frames; 9 are 33 frames, 5 are 17", minimum=1)
    guidance_trunc: float = option(0.0, "below this timestep (of 1000 ... 0) there is no guidance", minimum=0)
    guidance_renorm: float = option(
        1.0,
        "least factor by which the guided prediction is shrunk to the norm of the unguided; 1 is off",
        minimum=0,
        maximum=1,
    )
    image_guidance_scale: float = option(0.0, "additional guidance by the frames before; 0 is off", minimum=0)
    flow_shift: float | None = option(None, "shift of flow-matching times; null is the scheduler's", above=0)


@dataclass(frozen=True, kw_only=True)
class InferRun(tools.ToolConfig):
    seed: int = option(0, "seed of all random numbers", minimum=0)
    batch_size: int = option(1, "results made at once, per process", minimum=1)


@dataclass(frozen=True, kw_only=True)
class InferConfig:
    data: InferData = InferData()
    model: InferModel = InferModel()
    sampling: InferSampling = InferSampling()
    run: InferRun = InferRun()


def check(config: InferConfig) -> list[str]:
    """Problems between sections, one sentence each."""
    data, sampling = config.data, config.sampling
    required = {
        "data.output_dir": "a folder for results",
        "model.model": "the folder, or hub id, of a NOVA pipeline",
    }
    problems = tools.required(config, required)
    if (data.prompt is None) == (data.prompts is None):
        problems.append("either --prompt (text) or --prompts (file of prompts) is required")
    if sampling.image_guidance_scale and sampling.guidance_scale <= 1:
        problems.append(
            f"image_guidance_scale {sampling.image_guidance_scale} needs a guidance_scale above 1, but that is "
            f"{sampling.guidance_scale}"
        )
    return problems


PARSER = Parser(
    InferConfig,
    aliases={
        "pretrained_path": "model.model",
        "model.pretrained_path": "model.model",
        "model_id": "model.model",
        "output": "data.output_dir",
        "data.output": "data.output_dir",
        "num_frames": "sampling.max_latent_length",
    },
    ignored={
        "spatiotemporal_guidance_scale": "it compares with perturbed blocks, which this model does not have",
        "vae_batch_size": "results are decoded one at a time",
    },
    check=check,
    program="infer.py",
    description="Generates images and videos with NOVA.",
)


# What to generate -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Request:
    """A line of the prompts. `embedding` is an .npy file of (tokens, width) that stands for the prompt."""

    prompt: str
    negative_prompt: str
    image: Path | None
    motion_flow: float
    embedding: Path | None


@dataclass(frozen=True)
class Job:
    """One result: the prompt's number, the result's among those of that prompt, where it goes without suffix."""

    prompt_number: int
    result_number: int
    request: Request
    output: Path

    def __str__(self) -> str:
        return f"prompt {self.prompt_number}"


def read_requests(config: InferConfig) -> list[Request]:
    """All prompts, in order.

    Raises:
        FileNotFoundError: the file, or an image or embedding that it names, does not exist.
        ValueError: the file holds no prompts, or something else; names the entry.
    """
    data = config.data
    if data.prompts is None:
        return [_request({"prompt": data.prompt}, config, Path.cwd())]
    path = find_file(data.prompts, "--prompts")
    text = path.read_text("utf-8-sig")
    if path.suffix.lower() != ".json":
        entries: Any = [line.strip() for line in text.splitlines() if line.strip()]
    else:
        try:
            entries = json.loads(text)
        except ValueError as error:
            raise ValueError(f"--prompts {path} is no valid JSON: {error}") from error
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"--prompts {path} holds no prompts: give one per line, or a json list")
    requests = []
    for number, entry in enumerate(entries):
        try:
            requests.append(_request({"prompt": entry} if isinstance(entry, str) else entry, config, path.parent))
        except ValueError as error:
            raise ValueError(f"--prompts {path}, entry {number} (from 0): {error}") from error
    return requests


def _request(entry: Any, config: InferConfig, folder: Path) -> Request:
    if not isinstance(entry, dict) or not ({"prompt", "embedding"} & set(entry)):
        raise ValueError(f"must be a text, or an object with prompt or embedding, but is {entry!r}")
    unknown = sorted(set(entry) - set(PROMPT_KEYS))
    if unknown:
        raise ValueError(f"has unknown keys {', '.join(unknown)}; it may have {', '.join(PROMPT_KEYS)}")
    values = {name: entry.get(name, "") for name in ("prompt", "negative_prompt", "image", "embedding")}
    wrong = [name for name, value in values.items() if not isinstance(value, str)]
    flow = entry.get("motion_flow", config.sampling.motion_flow)
    if wrong or isinstance(flow, bool) or not isinstance(flow, int | float):
        raise ValueError(f"{', '.join(wrong) or 'motion_flow'} must be {'text' if wrong else 'a number'}")
    files = {name: find_file(str(folder / values[name])) if values[name] else None for name in ("image", "embedding")}
    image = files["image"] or (find_file(config.data.image, "--image") if config.data.image else None)
    negative = values["negative_prompt"] or config.data.negative_prompt
    return Request(values["prompt"], negative, image, float(flow), files["embedding"])


def find_jobs(requests: Sequence[Request], data: InferData) -> list[Job]:
    """All results, in order."""
    output, several = tools.output_folder(data.output_dir), data.num_images_per_prompt > 1
    if output.suffix.lower() in (".png", ".mp4"):
        raise ValueError(f"--output_dir {output} must be a folder; results are named by the prompts' numbers")
    return [
        Job(prompt, result, request, output / (f"{prompt:05d}_{result}" if several else f"{prompt:05d}"))
        for prompt, request in enumerate(requests)
        for result in range(data.num_images_per_prompt)
    ]


def recipe(job: Job, config: InferConfig) -> dict[str, Any]:
    """What a result follows from; written beside it."""
    request = {name: str(value) if isinstance(value, Path) else value for name, value in asdict(job.request).items()}
    # Averaged or not, another folder, other numbers of steps: all change the result, batch size and device do not.
    settings = asdict(config.sampling) | asdict(config.model) | {"seed": config.run.seed, "fps": config.data.fps}
    settings["pretrained_path"] = settings.pop("model")  # its name in the records that are there already
    settings.pop("motion_flow")
    return request | {"prompt_number": job.prompt_number, "result_number": job.result_number, "settings": settings}


def missing(jobs: Sequence[Job], config: InferConfig) -> list[Job]:
    """Those without a result; ValueError if there is one that was made otherwise."""
    overwrite = config.data.overwrite
    return [job for job in jobs if overwrite or not is_made(job, config)]


def is_made(job: Job, config: InferConfig) -> bool:
    """Whether there are a picture or a clip, and their record; ValueError if they were made otherwise."""
    has_media = any(job.output.with_suffix(suffix).is_file() for suffix in (".png", ".mp4"))
    return has_media and tools.is_made(job.output.with_suffix(".json"), recipe(job, config))


# The weights ----------------------------------------------------------------------------------------------------------


def find_transformer(model: InferModel) -> Path | None:
    """The folder of --transformer's weights; FileNotFoundError lists what a checkpoint holds."""
    if model.transformer is None:
        return None
    folder = find_file(model.transformer, "--transformer")
    if (folder / "config.json").is_file():
        return folder
    inside = folder / (AVERAGED if model.use_ema else RAW)
    if (inside / "config.json").is_file():
        return inside
    there = ", ".join(sorted(each.name for each in folder.iterdir())) if folder.is_dir() else "nothing: it is a file"
    raise FileNotFoundError(
        f"--transformer {folder} has no {inside.name}/config.json; it holds {there}. Give a checkpoint of a run, or a "
        "folder with config.json and weights"
    )


def load_model(config: InferConfig, processes: Processes, dtype: torch.dtype, needs_text: bool) -> NOVAPipeline:
    """The pipeline on the process's device; errors as of `load_components`."""
    folder = find_transformer(config.model)
    pipeline = NOVAPipeline.from_pretrained(
        find_folder(str(config.model.model)),
        torch_dtype=dtype,
        module_dict={RAW: str(folder)} if folder else None,
        text_encoder=needs_text,
    )
    return pipeline.to(processes.device)


def settings_of(sampling: InferSampling) -> GenerationSettings:
    """What the model is asked for."""
    return GenerationSettings(
        sampling.num_inference_steps,
        sampling.num_diffusion_steps,
        sampling.max_latent_length,
        Guidance(
            sampling.guidance_scale, sampling.guidance_trunc, sampling.guidance_renorm, sampling.image_guidance_scale
        ),
        sampling.flow_shift,
    )


# The job --------------------------------------------------------------------------------------------------------------


def make_batch(jobs: Sequence[Job], pipeline: NOVAPipeline, config: InferConfig) -> None:
    """Makes and writes some results; ValueError or OSError if that fails."""
    sampling, requests = config.sampling, [job.request for job in jobs]
    rngs = [rng_for(config.run.seed, "generate", job.prompt_number, job.result_number) for job in jobs]
    result = pipeline(
        prompt=[_read_embedding(each.embedding) if each.embedding else each.prompt for each in requests],
        negative_prompt=[each.negative_prompt for each in requests],
        image=[load_image(each.image) for each in requests] if requests[0].image else None,
        motion_flow=[each.motion_flow for each in requests],
        **{name: value for name, value in asdict(sampling).items() if name != "motion_flow"},
        draws=SampleDraws(rngs),
        output_type="np",
        disable_progress_bar=True,
    )
    for number, job in enumerate(jobs):
        pixels = result.images[number][None] if result.frames is None else result.frames[number]  # (T, H, W, 3)
        png, mp4 = (job.output.with_suffix(suffix) for suffix in (".png", ".mp4"))
        if len(pixels) == 1:
            save_image(png, pixels[0])
            mp4.unlink(missing_ok=True)
        else:
            write_video(mp4, pixels, config.data.fps)
            png.unlink(missing_ok=True)
        tools.write_json(job.output.with_suffix(".json"), recipe(job, config))


def _read_embedding(path: Path) -> np.ndarray:
    try:
        return np.load(path, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{path} cannot be read as an .npy file: {error}") from error


def batches_of(jobs: Sequence[Job], batch_size: int) -> list[Sequence[Job]]:
    """Neighbours, all with a first frame or all without."""
    alike = [[job for job in jobs if (job.request.image is not None) == has_image] for has_image in (False, True)]
    return [batch for same in alike for batch in tools.in_batches(same, batch_size)]


def infer(config: InferConfig, processes: Processes, dtype: torch.dtype) -> dict[Job, str]:
    """Makes what is missing; returns why results of this process went wrong."""
    jobs = find_jobs(read_requests(config), config.data)
    todo = missing(jobs, config)
    tools.say_kept(len(jobs) - len(todo), len(jobs), "result", processes)
    share = tools.share_of(todo, processes)
    failures: dict[Job, str] = {}
    if share:
        needs_text = any(
            each.negative_prompt or (each.prompt and not each.embedding) for each in (job.request for job in share)
        )
        pipeline = load_model(config, processes, dtype, needs_text)
        pipeline.check(settings_of(config.sampling))
        batches = batches_of(share, config.run.batch_size)
        make = partial(make_batch, pipeline=pipeline, config=config)
        failures = tools.attempt_all(batches, make, "result", processes)
    records = [job.output.with_suffix(".json") for job in jobs]
    tools.conclude(records, config.data.output_dir, failures, "result", processes)
    return failures


def main(argv: Sequence[str] | None = None) -> None:
    """Generates as the command line says; see `--help`. Ends with status 1 if a result went wrong."""
    with tools.started(PARSER, argv) as (config, accelerator, dtype):
        failures = infer(config, accelerator, dtype)
    tools.exit_if(failures)


if __name__ == "__main__":
    main()
