"""Generates the frames between two images, along edges and motion; `--help` lists all settings.

    python -m training_ggi.infer --model log --input segments --output_dir clips
    accelerate launch -m training_ggi.infer --model log/checkpoint-5000 --input segments --output_dir clips
    python -m training_ggi.infer --model log --first a.png --last b.png --edges edges.mp4 --flow flow.npy \\
        --output_dir clips

`training_ggi.segments` says what a folder of segments holds. A segment starts from the last generated frame of the one
before, so several processes share whole scenes; with --chain false they share segments.

For segments/arc0 the folder clips/arc0 then holds `clip.mp4`, the last frame `last.png`, and `clip.json`, written last,
which says how they were made. The same command again makes what is missing. Results follow from the seed and the
segment's name, and in a chain from the segments before; not from the number of processes.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXTransformer3DModel
from torch import Tensor

from common import tools
from common.config import Parser, find_file, folder_or_id, option
from common.data import rng_for
from common.runtime import Processes
from common.video import save_image, to_uint8, write_video
from training_ggi.config import SamplerConfig
from training_ggi.models.components import (
    encode_prompts,
    load_scheduler_config,
    load_text_encoder,
    load_tokenizer,
    load_vae,
    video_moments,
)
from training_ggi.models.frames import STILL_FRAMES, normalise, normalise_edges, pad_last
from training_ggi.models.noise_warp import mix_noise, resize_list, warp_clip
from training_ggi.models.transformer import LATENT_FRAMES, LATENT_PX, check_video_size
from training_ggi.sampling import generate_clip
from training_ggi.segments import (
    NOISE,
    Segment,
    read_edges,
    read_end_image,
    read_flow,
    read_noise,
    read_segments,
)
from training_ggi.trained import Trained, find_trained, load_trained

logger = logging.getLogger(__name__)

RECORD, CLIP, LAST = "clip.json", "clip.mp4", "last.png"
BY_FLAGS = ("first", "last", "edges", "flow", "noise")


# Settings -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class InferData:
    input: str | None = option(None, "folder of segments arc0, arc1, ..., or of folders of such; or one segment")
    first: str | None = option(None, "first image of the one segment that is given by flags")
    last: str | None = option(None, "its last image")
    edges: str | None = option(None, "its edges, white on black: a folder of images, or a clip")
    flow: str | None = option(
        None,
        "its motion: .npy (T, 2, h, w), (dx, dy) in pixels from each frame to the next, a folder of .npy (2, h, w), or "
        "of 16-bit correspondences",
    )
    noise: str | None = option(
        None, "in place of flow: .npy (frames, h, w, 16) of warped noise, as --write_noise gives"
    )
    prompt: str = option("", "what the clips show; without it there is no guidance, which varies the prompt")
    prompts: str | None = option(None, "json file of prompts by segment; others get --prompt")
    output_dir: str | None = option(None, "folder for results, one folder per segment in it; required")
    chain: bool = option(True, "start each arc from the last generated frame of the one before", needs="input")
    correspondence_offset_px: float = option(
        0.0, "position, beyond its index, of a pixel that stays: 0.5 where positions count from the image's edge"
    )
    frames: bool = option(False, "write the frames as images too")
    write_noise: bool = option(False, f"write {NOISE}, the warped noise before it is degraded")
    fps: float = option(8.0, "frames per second of the clips", above=0)
    overwrite: bool = option(False, "make again what is there already; otherwise existing results are kept")


@dataclass(frozen=True, kw_only=True)
class InferModel:
    model: str | None = option(
        None,
        "a run's folder (its export, else its newest checkpoint), its export, a checkpoint, or one of the "
        "original; required",
    )
    base: str | None = option(None, "base model, folder or hub id; null is what the run was trained on")
    base_lora: str | None = option(None, "LoRA of Go-with-the-Flow; null is what the run was trained on")
    use_ema: bool = option(False, "of a checkpoint take the averaged weights")
    enable_tiling: bool = option(True, "run the VAE in overlapping tiles: less memory, slightly other results")


@dataclass(frozen=True, kw_only=True)
class InferSampling(SamplerConfig):
    height: int | None = option(None, "height of the clips in pixels; null is that of training", minimum=16)
    width: int | None = option(None, "width of the clips in pixels; null is that of training", minimum=16)
    max_num_frames: int | None = option(
        None, f"frames that are generated, 4 k + 1; the last {STILL_FRAMES} are dropped; null is that of training"
    )
    flow_scale: int = option(8, "pixels of the warp's grid per pixel of the flow", minimum=1)
    oob: Literal["keep", "drop"] = option(
        "keep", "noise that leaves the frame: its place gets fresh noise, or is filled"
    )


@dataclass(frozen=True, kw_only=True)
class InferRun(tools.ToolConfig):
    seed: int = option(42, "all random numbers of a segment follow from the seed and its name", minimum=0)


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
        "data.output_dir": "a folder for results",
        "model.model": "the folder of a run, its export or one of its checkpoints",
    }
    problems = tools.required(config, required)
    by_flags = {name: getattr(data, name) for name in BY_FLAGS}
    given = [f"--{name}" for name, value in by_flags.items() if value]
    if data.input and given:
        problems.append(f"--input names the files of its segments: leave {', '.join(given)} out")
    elif not data.input:
        missing = [f"--{name}" for name in ("first", "last", "edges") if not by_flags[name]]
        if missing or (data.flow is None) == (data.noise is None):
            problems.append(
                "either --input (a folder of segments), or --first, --last, --edges and one of --flow and --noise are "
                f"required; given are {', '.join(given) or 'none of them'}"
            )
    return problems


PARSER = Parser(
    InferConfig,
    aliases={
        "result": "model.model",
        "model.result": "model.model",
        "pretrained_model_name_or_path": "model.base",
        "base_lora_path": "model.base_lora",
        "output": "data.output_dir",
    },
    check=check,
    program="infer.py",
    description="Generates the frames between two images, along edges and motion.",
)


# What to generate -----------------------------------------------------------------------------------------------------


def find_jobs(data: InferData) -> list[list[Segment]]:
    """All segments, those together that must be generated one after another; errors as of `read_segments`."""
    output = tools.output_folder(data.output_dir)
    if data.input:
        return read_segments(find_file(data.input, "--input"), output, data.chain)
    paths = {name: getattr(data, name) for name in BY_FLAGS}
    files: dict[str, Any] = {name: find_file(path, f"--{name}") if path else None for name, path in paths.items()}
    return [[Segment(name="clip", output=output / "clip", **files)]]


def read_prompts(data: InferData, segments: Sequence[Segment]) -> dict[str, str]:
    """The prompt of every segment, by name.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: it holds something else, or names a segment that is not there.
    """
    prompts = {segment.name: data.prompt for segment in segments}
    if not data.prompts:
        return prompts
    path = find_file(data.prompts, "--prompts")
    try:
        own = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"--prompts {path} is no valid json: {error}") from error
    if not isinstance(own, dict) or not all(isinstance(text, str) for text in own.values()):
        raise ValueError(f"--prompts {path} must be an object of texts by segment")
    if unknown := sorted(own.keys() - prompts.keys()):
        raise ValueError(f"--prompts {path} names {unknown[0]}, but the segments are {', '.join(prompts)}")
    return prompts | own


def recipe(segment: Segment, prompt: str, config: InferConfig) -> dict[str, Any]:
    """What a result follows from; written beside it."""
    files = {name: getattr(segment, name) for name in BY_FLAGS}
    inputs = {name: path and str(path) for name, path in (files | {"first": first_image(segment)}).items()}
    data = {name: getattr(config.data, name) for name in ("correspondence_offset_px", "fps")}
    model = asdict(config.model)
    model = {"result": model.pop("model")} | model  # its name in the records that are there already
    settings = data | model | asdict(config.sampling)
    return inputs | {"prompt": prompt, "seed": config.run.seed} | settings


def missing(segments: Sequence[Segment], prompts: Mapping[str, str], config: InferConfig) -> set[str]:
    """Names of those without a result; ValueError if there is one that was made otherwise."""
    overwrite = config.data.overwrite
    return {
        each.name
        for each in segments
        if overwrite or not tools.is_made(each.output / RECORD, recipe(each, prompts[each.name], config))
    }


# Generation -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Generator:
    """The networks on their device, and what is the same for all segments."""

    transformer: CogVideoXTransformer3DModel
    vae: AutoencoderKLCogVideoX
    scheduler_config: Mapping[str, Any]
    prompt_embeds: Mapping[str, Tensor]  # (1, tokens, D) by prompt
    size: tuple[int, int, int]  # frames, height and width in pixels
    device: torch.device


def load_model(config: InferConfig, prompts: Sequence[str], device: torch.device, dtype: torch.dtype) -> Generator:
    """All networks on their device, the text encoder for as long as prompts need it.

    Raises:
        FileNotFoundError, ValueError, CheckpointError: weights are missing or do not fit, or the clips' size does not.
    """
    model = config.model
    trained = find_trained(str(model.model), use_ema=model.use_ema, base=model.base, base_lora=model.base_lora)
    settings = trained.model
    base, revision, cache_dir = (
        folder_or_id(settings.pretrained_model_name_or_path),
        settings.revision,
        settings.cache_dir,
    )
    hub = {"revision": revision, "variant": settings.variant, "cache_dir": cache_dir}
    tokenizer = load_tokenizer(base, revision, cache_dir)
    text_encoder = load_text_encoder(base, **hub, dtype=dtype).to(device)
    prompt_embeds = {each: encode_prompts(tokenizer, text_encoder, [each]) for each in {"", *prompts}}
    del text_encoder
    transformer = load_trained(trained, dtype, fuse_lora=True).to(device, dtype)
    size = size_of(config.sampling, trained, transformer)
    vae = load_vae(base, **hub, tiling=model.enable_tiling).to(device, dtype)
    return Generator(transformer, vae, load_scheduler_config(base, revision, cache_dir), prompt_embeds, size, device)


def size_of(
    sampling: InferSampling, trained: Trained, transformer: CogVideoXTransformer3DModel
) -> tuple[int, int, int]:
    """Frames, height and width of the clips: as asked for, as in training, or as the transformer says."""
    stock = transformer.config
    default = {
        "max_num_frames": stock.sample_frames,
        "height": stock.sample_height * LATENT_PX,
        "width": stock.sample_width * LATENT_PX,
    }
    size = [getattr(sampling, name) or trained.data.get(name) or value for name, value in default.items()]
    check_video_size(transformer, *size)
    return size[0], size[1], size[2]


def generate(segment: Segment, prompt: str, generator: Generator, config: InferConfig) -> None:
    """Makes and writes one clip; ValueError or OSError if that fails."""
    if segment.before and not (segment.before / RECORD).is_file():
        raise ValueError(f"it goes on from {segment.before.name}, which was not made")
    (num_frames, height, width), device = generator.size, generator.device
    sampling, data = config.sampling, config.data
    latent_size = (num_frames - 1) // LATENT_FRAMES + 1, height // LATENT_PX, width // LATENT_PX

    def rng(purpose: str) -> torch.Generator:  # on the CPU, so that all devices draw the same
        return torch.Generator().manual_seed(
            int(rng_for(config.run.seed, f"{purpose} of {segment.name}").integers(2**62))
        )

    images = [read_end_image(path, height, width) for path in (first_image(segment), segment.last)]
    edges = normalise_edges(read_edges(segment.edges, num_frames - STILL_FRAMES, height, width))  # (F, 3, H, W)
    if segment.noise:
        warped = read_noise(segment.noise, latent_size).to(device)
    else:
        flow = read_flow(segment.flow, height, width, data.correspondence_offset_px).to(device)  # type: ignore[arg-type]
        keep = resize_list(range(flow.shape[1] + 1), latent_size[0])
        warped = warp_clip(flow, [rng("warp")], keep=keep, flow_scale=sampling.flow_scale, oob=sampling.oob)
    fresh = torch.randn(warped.shape, generator=rng("noise")).to(device)  # (1, F', 16, h, w)
    clip = generate_clip(
        generator.transformer,
        generator.vae,
        normalise(np.stack(images))[None].to(device),
        video_moments(generator.vae, pad_last(edges)[None]),
        generator.prompt_embeds[prompt],
        generator.prompt_embeds[""],
        mix_noise(warped, fresh, sampling.degradation),
        num_inference_steps=sampling.num_inference_steps,
        guidance_scale=sampling.guidance_scale,
        use_dynamic_cfg=sampling.use_dynamic_cfg,
        scheduler_config=generator.scheduler_config,
        generators=[rng("sampling")],
    )[0]  # (F, 3, H, W)
    write(segment, np.stack([to_uint8(frame) for frame in clip]), warped[0], recipe(segment, prompt, config), data)


def first_image(segment: Segment) -> Path:
    """That of the input, or the last frame of the result before."""
    if segment.first:
        return segment.first
    assert segment.before, "a segment without a first image goes on from another"
    return segment.before / LAST


def write(segment: Segment, frames: np.ndarray, warped: Tensor, record: dict[str, Any], data: InferData) -> None:
    """The files of one result: frames are uint8 (F, H, W, 3), the noise is (F', 16, h, w)."""
    output = segment.output
    (output / RECORD).unlink(missing_ok=True)
    write_video(output / CLIP, frames, data.fps)
    save_image(output / LAST, frames[-1])
    for number, frame in enumerate(frames if data.frames else ()):
        save_image(output / "frames" / f"{number:03d}.png", frame)
    if data.write_noise:
        np.save(output / NOISE, warped.permute(0, 2, 3, 1).float().cpu().numpy())  # (F', h, w, 16)
    tools.write_json(output / RECORD, record)


def infer(config: InferConfig, processes: Processes, dtype: torch.dtype) -> dict[str, str]:
    """Makes what is missing; returns why segments of this process went wrong, by name."""
    chains = find_jobs(config.data)
    segments = [segment for chain in chains for segment in chain]
    prompts = read_prompts(config.data, segments)
    todo = missing(segments, prompts, config)
    silent = sum(not prompts[name] for name in todo)
    if silent and processes.is_main_process:
        logger.warning(
            "%d of %d segments have no prompt, so that guidance changes nothing and is left out: describe what they "
            "show by --prompt or --prompts (the original asked BLIP-2 for a caption of the first image)",
            silent,
            len(todo),
        )
    tools.say_kept(len(segments) - len(todo), len(segments), "segment", processes)
    unfinished = [chain for chain in chains if any(segment.name in todo for segment in chain)]
    mine = {each.name: each for chain in tools.share_of(unfinished, processes) for each in chain if each.name in todo}
    failures: dict[str, str] = {}
    if mine:
        generator = load_model(config, [prompts[name] for name in mine], processes.device, dtype)

        def make(names: Sequence[str]) -> None:
            for name in names:
                generate(mine[name], prompts[name], generator, config)

        failures = tools.attempt_all(tools.in_batches(list(mine), 1), make, "segment", processes)
    records = [segment.output / RECORD for segment in segments]
    tools.conclude(records, config.data.output_dir, failures, "segment", processes)
    return failures


def main(argv: Sequence[str] | None = None) -> None:
    """Generates as the command line says; see `--help`. Ends with status 1 if a segment went wrong."""
    with tools.started(PARSER, argv) as (config, accelerator, dtype):
        failures = infer(config, accelerator, dtype)
    tools.exit_if(failures)


if __name__ == "__main__":
    main()
