"""Clips from two end images, edges and warped noise: the diffusion sampler around the trained transformer."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import (
    AutoencoderKLCogVideoX,
    CogVideoXDDIMScheduler,
    CogVideoXDPMScheduler,
    CogVideoXTransformer3DModel,
)
from torch import Tensor

from training_ggi.models.components import decode_video, video_moments
from training_ggi.models.frames import STILL_FRAMES
from training_ggi.models.objective import end_image_latents, sample_posterior
from training_ggi.models.transformer import RotaryTables, model_input, predict_velocity, rotary_for

SCHEDULERS = (CogVideoXDDIMScheduler, CogVideoXDPMScheduler)
DYNAMIC_CFG_POWER = 5  # of CogVideoX


@torch.no_grad()
def generate_clip(
    transformer: CogVideoXTransformer3DModel,
    vae: AutoencoderKLCogVideoX,
    ends: Tensor,
    cond_moments: Tensor,
    prompt_embeds: Tensor,
    empty_prompt_embeds: Tensor,
    noise: Tensor,
    *,
    num_inference_steps: int = 30,
    guidance_scale: float = 6.0,
    use_dynamic_cfg: bool = False,
    scheduler_config: Mapping[str, Any],
    generators: Sequence[torch.Generator] | None = None,
) -> Tensor:
    """Generates clips. Latents are float32; the transformer runs under autocast in the VAE's precision, as in training.

    A clip follows from its row of the arguments and its generator, whichever clips are made with it.

    Args:
        transformer: the widened model with its LoRAs.
        ends: (B, 2, 3, H, W) in [-1, 1], first and last image; clean, unlike in training.
        cond_moments: (B, 2 C, F', h, w), moments of the padded edge clip, see `video_moments`.
        prompt_embeds: (B, tokens, D).
        empty_prompt_embeds: (1, tokens, D), for guidance.
        noise: (B, F', C, h, w) of unit variance: what sampling starts from.
        guidance_scale: classifier-free guidance, which varies the prompt alone; 1 is off and takes half the time, as do
            empty prompts, for which guidance changes nothing.
        use_dynamic_cfg: raise guidance from 1 to 1 + guidance_scale over the steps, most of it late.
        scheduler_config: of the base pipeline, with `_class_name`.
        generators: one per clip, for the latents of images and edges and what a stochastic sampler draws; None takes
            generators of seed 0.

    Returns:
        (B, F, 3, H, W) float32 in [0, 1], without the last frames that are stills: F = 4 (F' - 1) + 1 - 3.

    Raises:
        ValueError: the scheduler is not CogVideoX's, or shapes do not belong together.
    """
    device, scale = noise.device, vae.config.scaling_factor
    generators = generators or [torch.Generator().manual_seed(0) for _ in noise]
    first, last, cond = (
        sample_posterior(moments.to(device), _draw(moments, generators, device), scale)
        for moments in (video_moments(vae, ends[:, :1]), video_moments(vae, ends[:, 1:]), cond_moments)
    )  # (B, 1, C, h, w) twice, (B, F', C, h, w)
    conditions = end_image_latents(first, last, noise.shape[1]), cond  # (B, F', C, h, w) each
    empty = empty_prompt_embeds.to(prompt_embeds).expand_as(prompt_embeds)  # (B, tokens, D)
    is_guided = (guidance_scale != 1 or use_dynamic_cfg) and not torch.equal(empty, prompt_embeds)
    prompts = [empty, prompt_embeds] if is_guided else [prompt_embeds]
    scheduler = _scheduler(scheduler_config)
    scheduler.set_timesteps(num_inference_steps, device=device)
    rotary = rotary_for(transformer, noise)
    latents, clean, before = noise.float() * scheduler.init_noise_sigma, None, None  # (B, F', C, h, w)
    for number, t in enumerate(scheduler.timesteps):
        with torch.autocast(device.type, vae.dtype, enabled=vae.dtype != torch.float32):
            v = [_velocity(transformer, latents, conditions, each, t, rotary) for each in prompts]
        guided = v[-1]
        if len(v) > 1:
            strength = _dynamic(guidance_scale, number, num_inference_steps) if use_dynamic_cfg else guidance_scale
            guided = v[0] + strength * (v[1] - v[0])  # (B, F', C, h, w)
        latents, clean = _step(scheduler, guided, clean, t, before, latents, generators)
        before = t
    return decode_video(vae, latents)[:, :-STILL_FRAMES]  # (B, F, 3, H, W)


def _draw(moments: Tensor, generators: Sequence[torch.Generator], device: torch.device) -> Tensor:
    """Normal numbers for latents of moments (B, 2 C, F', h, w): (B, F', C, h, w), each clip's from its generator."""
    _, channels, frames, height, width = moments.shape
    shape = frames, channels // 2, height, width
    draws = [torch.randn(shape, generator=each, device=each.device).to(device) for each in generators]
    return torch.stack(draws)  # (B, F', C, h, w)


def _scheduler(config: Mapping[str, Any]) -> Any:
    for kind in SCHEDULERS:
        if kind.__name__ == config.get("_class_name"):
            return kind.from_config(dict(config))
    raise ValueError(
        f"the base model's scheduler is {config.get('_class_name')}: expected "
        f"{' or '.join(kind.__name__ for kind in SCHEDULERS)}"
    )


def _velocity(
    transformer: CogVideoXTransformer3DModel,
    latents: Tensor,
    conditions: tuple[Tensor, Tensor],
    prompt_embeds: Tensor,
    t: Tensor,
    rotary: RotaryTables,
) -> Tensor:
    """One half of the guidance at a time, for half the memory."""
    inputs = model_input(latents, *conditions)  # (B, F', 3 C, h, w)
    return predict_velocity(transformer, inputs, prompt_embeds, t.expand(len(latents)), rotary)  # (B, F', C, h, w)


def _dynamic(scale: float, step: int, num_steps: int) -> float:
    """Guidance at a step, as the authors of CogVideoX raise it.

    The pipelines of diffusers put the timestep, up to 999, in the place of the step, which makes it jump.
    """
    return 1 + scale * (1 - math.cos(math.pi * (step / num_steps) ** DYNAMIC_CFG_POWER)) / 2


def _step(
    scheduler: Any,
    v: Tensor,
    clean: Tensor | None,
    t: Tensor,
    before: Tensor | None,
    latents: Tensor,
    generators: Sequence[torch.Generator],
) -> tuple[Tensor, Tensor]:
    """Latents of the next step, and the estimate of the clean ones."""
    if isinstance(scheduler, CogVideoXDPMScheduler):
        return scheduler.step(v, clean, t, before, latents, generator=list(generators), return_dict=False)
    return scheduler.step(v, t, latents, return_dict=False)
