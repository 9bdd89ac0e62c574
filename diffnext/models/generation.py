"""Generation of images and videos: frame by frame, and within a frame one set of tokens after the other.

B samples, T latent frames of C x H x W values, N tokens of p * p * C values per frame, Nv video tokens, width D; with
guidance the networks see G branches, G * B rows, see `Guidance`.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from diffnext.models.attention import KVCache, rotary_angles
from diffnext.models.embeddings import DEFAULT_FLOW, grid_positions, patchify, unpatchify
from diffnext.models.guidance import Guidance
from diffnext.models.masking import gather_tokens
from diffnext.models.transformers.transformer_nova import NOVATransformer3DModel


class Draws(Protocol):
    """Random numbers, asked for in an order that depends on the settings alone: rows may have their own generators."""

    def uniform(self, shape: Sequence[int]) -> Tensor:
        """(B, *shape) in [0, 1), float32."""
        ...

    def normal(self, shape: Sequence[int]) -> Tensor:
        """(B, *shape) standard normal, float32."""
        ...


@dataclass(frozen=True)
class GenerationSettings:
    """Numbers of steps and frames; the defaults are the original's.

    Attributes:
        num_inference_steps: sets of tokens per frame.
        num_diffusion_steps: of the head, per set.
        max_latent_length: T.
        flow_shift: shift of the flow-matching times instead of the scheduler's.
    """

    num_inference_steps: int = 64
    num_diffusion_steps: int = 25
    max_latent_length: int = 1
    guidance: Guidance = field(default_factory=lambda: Guidance(scale=5.0))
    flow_shift: float | None = None

    def __post_init__(self) -> None:
        for name in ("num_inference_steps", "num_diffusion_steps", "max_latent_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, but must be at least 1")


# Sampling schedules ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class EulerStep:
    """x + (sigma' - sigma) v, Lipman et al. 2023."""

    timestep: float
    sigma_change: float
    draws_noise: bool = False

    def __call__(self, x: Tensor, pred: Tensor, noise: Tensor | None) -> Tensor:
        return x + self.sigma_change * pred


@dataclass(frozen=True)
class AncestralStep:
    """x0 = clip(x0_from_x x + x0_from_pred pred), then x_weight x + x0_weight x0 + std noise (Ho et al. 2020, 7)."""

    timestep: float
    x0_from_x: float
    x0_from_pred: float
    x_weight: float
    x0_weight: float
    std: float
    clip: float
    draws_noise: bool

    def __call__(self, x: Tensor, pred: Tensor, noise: Tensor | None) -> Tensor:
        x0 = (self.x0_from_x * x + self.x0_from_pred * pred).clamp(-self.clip, self.clip)
        mean = self.x0_weight * x0 + self.x_weight * x
        return mean if noise is None else mean + self.std * noise


def sampler_steps(
    scheduler: Any, num_steps: int, flow_shift: float | None = None
) -> list[EulerStep] | list[AncestralStep]:
    """The steps of a diffusers scheduler, which stays as it is, in float32.

    They do what its `step` does, but take the noise as an argument.

    Args:
        scheduler: FlowMatchEulerDiscreteScheduler or DDPMScheduler.
        flow_shift: as in `GenerationSettings`.

    Raises:
        ValueError: another class, or options of it that are not supported.
    """
    scheduler = type(scheduler).from_config(scheduler.config)
    if isinstance(scheduler, DDPMScheduler):
        if flow_shift is not None:
            raise ValueError(f"flow_shift={flow_shift} has no meaning for DDPMScheduler: leave it out")
        scheduler.set_timesteps(num_steps)
        timesteps = scheduler.timesteps.tolist()
        return [_ancestral_step(scheduler, *pair) for pair in zip(timesteps, [*timesteps[1:], -1], strict=True)]
    if not isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        raise ValueError(
            f"the scheduler is {type(scheduler).__name__}; use FlowMatchEulerDiscreteScheduler or DDPMScheduler"
        )
    if scheduler.config.get("stochastic_sampling"):
        raise ValueError("the scheduler's stochastic_sampling is not supported: set it to false")
    if flow_shift is not None:
        scheduler.set_shift(flow_shift)
    scheduler.set_timesteps(num_steps)
    changes = scheduler.sigmas.float().diff()
    return [EulerStep(*pair) for pair in zip(scheduler.timesteps.tolist(), changes.tolist(), strict=True)]


def _ancestral_step(scheduler: DDPMScheduler, timestep: int, next_timestep: int) -> AncestralStep:
    options = scheduler.config
    alpha = scheduler.alphas_cumprod[timestep]
    next_alpha = scheduler.alphas_cumprod[next_timestep] if next_timestep >= 0 else scheduler.one
    beta, next_beta, step_alpha = 1 - alpha, 1 - next_alpha, alpha / next_alpha
    variances = {"fixed_small": (next_beta / beta * (1 - step_alpha)).clamp(min=1e-20), "fixed_large": 1 - step_alpha}
    variances["fixed_small_log"] = variances["fixed_small"]
    x0_from = {
        "epsilon": (1 / alpha.sqrt(), -beta.sqrt() / alpha.sqrt()),
        "sample": (0 * alpha, 1 + 0 * alpha),
        "v_prediction": (alpha.sqrt(), -beta.sqrt()),
    }
    for name, known in (("variance_type", variances), ("prediction_type", x0_from)):
        if options[name] not in known:
            raise ValueError(f"the scheduler's {name} {options[name]!r} is not supported: use one of {list(known)}")
    if options["thresholding"]:
        raise ValueError("the scheduler's thresholding is not supported for latents: set it to false")
    from_x, from_pred = x0_from[options["prediction_type"]]
    return AncestralStep(
        timestep=timestep,
        x0_from_x=from_x.item(),
        x0_from_pred=from_pred.item(),
        x_weight=(step_alpha.sqrt() * next_beta / beta).item(),
        x0_weight=(next_alpha.sqrt() * (1 - step_alpha) / beta).item(),
        std=variances[options["variance_type"]].sqrt().item(),
        clip=options["clip_sample_range"] if options["clip_sample"] else math.inf,
        draws_noise=timestep > 0,
    )


# The order of tokens --------------------------------------------------------------------------------------------------


def num_tokens_per_set(num_tokens: int, num_steps: int) -> list[int]:
    """How many tokens each set has: few at first. Steps without any are left out.

    After step i of S, round(N cos(pi i / 2S)) tokens remain (Chang et al. 2022; halves round to even).
    """
    remaining = [round(num_tokens * math.cos(math.pi * step / (2 * num_steps))) for step in range(num_steps + 1)]
    counts = [before - after for before, after in zip(remaining, remaining[1:], strict=False)]
    return [count for count in counts if count > 0]


def token_sets(uniform: Tensor, counts: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
    """Known and next tokens of each set: (B, all before) and (B, count) of int64.

    Args:
        uniform: (B, N); tokens come in the order of these numbers.
        counts: of `num_tokens_per_set`.
    """
    order = uniform.argsort(dim=1)  # (B, N)
    ends = torch.tensor([0, *counts]).cumsum(0).tolist()
    return [(order[:, :start], order[:, start:end]) for start, end in zip(ends, ends[1:], strict=False)]


# Generation -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def generate(
    model: NOVATransformer3DModel,
    scheduler: Any,
    text: Tensor,
    negative_text: Tensor,
    draws: Draws,
    settings: GenerationSettings,
    motion_flow: float | Sequence[float] = DEFAULT_FLOW,
    given_frames: Sequence[Tensor] = (),
    on_step: Callable[[], None] | None = None,
) -> Tensor:
    """Latents of images or videos.

    Args:
        scheduler: as in `sampler_steps`.
        text, negative_text: (B, L, token_dim) of `model.text_embed.pad`; the second without prompt, or with what the
            result should not be.
        draws: on any device.
        motion_flow: how much a video moves, one number or one per sample; without effect in a model of images.
        given_frames: latents (B, C, H, W) of the first frames, which are copied: image-to-video.
        on_step: called after every set of tokens.

    Returns:
        (B, C, T, H, W) float32; more frames than the model was made for are possible, but seldom good.
    """
    config, guidance, num_frames = model.config, settings.guidance, settings.max_latent_length
    height, width = (length // config.image_stride for length in config.image_size)
    steps = sampler_steps(scheduler, settings.num_diffusion_steps, settings.flow_shift)
    device, batch = text.device, len(text)
    flow = torch.as_tensor(motion_flow, dtype=torch.float32, device=device).expand(batch)  # (B,)
    prefix = model.prefix(guidance.expand_text(text, negative_text), flow=guidance.expand(flow))  # (G * B, P, D)
    bos = model.bos_frames(batch, math.prod(model.frame_size(height, width)))[:, 0]  # (B, Nv, D)
    num_tokens = height * width // config.patch**2
    counts = num_tokens_per_set(num_tokens, settings.num_inference_steps)
    # One order for all frames, drawn even if all frames are given.
    sets = token_sets(draws.uniform((num_tokens, 1))[..., 0].to(device), counts)
    caches = model.new_caches() if num_frames > 1 else None
    frames: list[Tensor] = []
    first = None
    for t in range(num_frames):
        tokens = model.embed_frames(frames[-1]) if t else bos  # (B, Nv, D)
        features = _encode_frame(
            model, tokens, None if t else prefix, t, num_frames, caches, guidance
        )  # (G * B, Nv, D)
        first = features if first is None else first
        if t < len(given_frames):
            frames.append(given_frames[t].float().to(device).expand(batch, -1, -1, -1))
            continue
        conditions = model.mix(first, features) if t else features  # (G * B, Nv, D)
        frames.append(
            _generate_frame(model, conditions, sets, steps, draws, guidance, (height, width), on_step)
        )  # (B, C, H, W)
    return torch.stack(frames, dim=2)  # (B, C, T, H, W)


def _encode_frame(
    model: NOVATransformer3DModel,
    tokens: Tensor,
    prefix: Tensor | None,
    t: int,
    num_frames: int,
    caches: Sequence[KVCache] | None,
    guidance: Guidance,
) -> Tensor:
    """Conditioning tokens (G * B, Nv, D) of frame t from tokens (B, Nv, D) of the frame before."""
    height, width = (length // model.config.image_stride for length in model.config.image_size)
    angles = None
    if model.video_pos_embed is None:
        positions = grid_positions(1, model.frame_size(height, width), t, tokens.device)  # (Nv, 3)
        angles = rotary_angles(positions, model.video_encoder.head_dim)[None]  # (1, Nv, head_dim / 2)
    else:
        tokens = model.video_pos_embed(tokens[:, None], num_frames, t)[:, 0]  # (B, Nv, D)
    # A frame that is not to be seen has no positions, as in the original, so they come first.
    tokens = guidance.expand_frames(tokens, model.mask_embed.bos_token)  # (G * B, Nv, D)
    return model.video_encoder(tokens, prefix, angles=angles, caches=caches)


def check_length(model: NOVATransformer3DModel, num_frames: int) -> None:
    """Raises ValueError for more latent frames than the model is made for."""
    limit = model.config.video_base_size[0]
    if num_frames > limit:
        what = "makes single images" if limit == 1 else f"makes videos of at most {limit} latent frames"
        raise ValueError(
            f"max_latent_length is {num_frames}, but this model {what} (its video_base_size[0] is {limit})"
        )


def _generate_frame(
    model: NOVATransformer3DModel,
    conditions: Tensor,
    sets: Sequence[tuple[Tensor, Tensor]],
    steps: Sequence[EulerStep | AncestralStep],
    draws: Draws,
    guidance: Guidance,
    size: tuple[int, int],
    on_step: Callable[[], None] | None,
) -> Tensor:
    """One frame (B, C, H, W) from its conditioning tokens (G * B, Nv, D)."""
    patch, channels, device = model.config.patch, model.config.image_dim, conditions.device

    def draw() -> Tensor:
        return patchify(draws.normal((channels, *size)).to(device), patch)  # (B, N, p * p * C)

    batch, num_tokens = len(sets[0][0]), size[0] * size[1] // patch**2
    tokens = torch.zeros(batch, num_tokens, channels * patch**2, device=device)  # (B, N, p * p * C)
    for known_ids, next_ids in sets:
        frames = guidance.expand(unpatchify(tokens, patch, size))  # (G * B, C, H, W)
        z = model.image_features(frames, conditions, guidance.expand(known_ids))  # (G * B, N, D)
        z = gather_tokens(z, guidance.expand(next_ids))  # (G * B, count, D)
        x = _denoise(model, z, next_ids, draw, steps, guidance)  # (B, count, p * p * C)
        tokens = tokens.scatter(1, next_ids[..., None].expand_as(x), x)
        if on_step is not None:
            on_step()
    return unpatchify(tokens, patch, size)


def _denoise(
    model: NOVATransformer3DModel,
    z: Tensor,
    ids: Tensor,
    draw: Callable[[], Tensor],
    steps: Sequence[EulerStep | AncestralStep],
    guidance: Guidance,
) -> Tensor:
    """Sample the tokens at ids (B, count) from their features (G * B, count, D): (B, count, p * p * C) float32."""
    x = draw()  # (B, N, p * p * C)
    for step in steps:
        inputs, features = (x, z[: len(x)]) if step.timestep < guidance.trunc else (guidance.expand(x), z)
        rows = ids.repeat(len(inputs) // len(ids), 1)  # (B or G * B, count)
        timestep = torch.full((len(inputs),), step.timestep, device=x.device)
        pred = model.image_decoder(gather_tokens(inputs, rows), timestep, features).float()
        # The other tokens count in the norms of renormalised guidance, with their noise as the prediction.
        pred = inputs.scatter(1, rows[..., None].expand_as(pred), pred)  # (B or G * B, N, p * p * C)
        x = step(x, guidance.combine(pred, step.timestep), draw() if step.draws_noise else None)
    return gather_tokens(x, ids)


# Where random numbers come from ---------------------------------------------------------------------------------------


class SampleDraws:
    """One NumPy generator per sample: what a sample gets does not depend on the others in its batch."""

    def __init__(self, rngs: Sequence[np.random.Generator]) -> None:
        self.rngs = rngs

    def uniform(self, shape: Sequence[int]) -> Tensor:
        return torch.from_numpy(np.stack([rng.random(tuple(shape), dtype=np.float32) for rng in self.rngs]))

    def normal(self, shape: Sequence[int]) -> Tensor:
        return torch.from_numpy(np.stack([rng.standard_normal(tuple(shape), dtype=np.float32) for rng in self.rngs]))


class GeneratorDraws:
    """A torch generator for the whole batch, or none for the global one."""

    def __init__(self, batch: int, generator: torch.Generator | None = None) -> None:
        self.batch, self.generator = batch, generator
        self.device = generator.device if generator else torch.device("cpu")

    def uniform(self, shape: Sequence[int]) -> Tensor:
        return torch.rand(self.batch, *shape, generator=self.generator, device=self.device)

    def normal(self, shape: Sequence[int]) -> Tensor:
        return torch.randn(self.batch, *shape, generator=self.generator, device=self.device)
