"""How images of any width go through the refiner: resized to a bucket's frame, cut into windows, sampled, decoded."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from common.data import draw_normal
from gaussian_refiner.config import SamplerConfig
from gaussian_refiner.data import BUCKETS, normalise, window_places
from gaussian_refiner.models.components import Components, embed_images
from gaussian_refiner.models.denoise import WINDOW_STEP_PX, NullKind, decode, denoise, encode, window_offsets
from gaussian_refiner.models.objective import class_labels
from gaussian_refiner.models.self_mutual_attention import CondCache

logger = logging.getLogger(__name__)

PARITY_GUIDANCE_SCALE = 10.0
PARITY_STEPS = 20


@dataclass(frozen=True)
class Sampling:
    """How images are repaired."""

    num_inference_steps: int
    guidance_scale: float
    guidance_rescale: float
    strength: float
    null_kinds: tuple[NullKind, ...]
    text: tuple[Tensor, Tensor]  # unconditional and conditional embeddings, (1, tokens, C) each
    label_rows: int = 1  # class vectors of an image: 1 for both rows of its pair, 2 with noise of their own


def sampling(sampler: SamplerConfig, null_text: Tensor, parity_text: Tensor) -> Sampling:
    """The sampler of a configuration: guidance over the trained nulls, or the original's between two prompts."""
    if sampler.parity:
        negative, positive = parity_text.chunk(2)  # (1, tokens, C) each
        return Sampling(PARITY_STEPS, PARITY_GUIDANCE_SCALE, 0.0, 1.0, ("text", "clip"), (negative, positive), 2)
    if sampler.guidance_scale == 1 and sampler.guidance_rescale != type(sampler).guidance_rescale:
        logger.warning("guidance_rescale %g has no effect: guidance_scale is 1", sampler.guidance_rescale)
    return Sampling(
        sampler.num_inference_steps,
        sampler.guidance_scale,
        sampler.guidance_rescale,
        sampler.strength,
        ("clip", "render", "cond"),
        (null_text, null_text),
    )


@dataclass(frozen=True)
class Frame:
    """The size of the images of one bucket, and how their width is cut."""

    width_px: int
    height_px: int
    window_px: int | None  # None: the whole width in one piece
    window_overlap_px: int
    embedded_px: tuple[int, ...]  # left edges of the squares that CLIP sees: one per window, or the centre


def frame_of(
    bucket: str, *, height_px: int | None = None, full_frame: bool = False, window_overlap_px: int | None = None
) -> Frame:
    """The frame of a bucket's images.

    Windows are squares of the full height, as in training. Widths are multiples of 64 px (1920 for the bucket of 1917),
    which the UNet halves without remainder.

    Args:
        bucket: a key of `BUCKETS`.
        height_px: a multiple of 8; None is the bucket's own.
        full_frame: one piece instead of windows.
        window_overlap_px: least overlap of windows; None is a quarter of the height.

    Raises:
        ValueError: the overlap leaves no room.
    """
    bucket_width_px, bucket_height_px = BUCKETS[bucket]
    height_px = height_px or bucket_height_px
    wanted_px = bucket_width_px * height_px / bucket_height_px
    width_px = max(1, round(wanted_px / WINDOW_STEP_PX)) * WINDOW_STEP_PX
    if full_frame:
        return Frame(width_px, height_px, None, 0, tuple(window_places(width_px, height_px, 1)))
    overlap_px = height_px // 4 if window_overlap_px is None else window_overlap_px
    offsets_px = window_offsets(width_px, height_px, overlap_px)
    return Frame(width_px, height_px, height_px, overlap_px, tuple(offsets_px))


def encode_frames(
    components: Components, renders: Sequence[np.ndarray], references: Sequence[np.ndarray | None], frame: Frame
) -> dict[str, Tensor]:
    """Latents and image embeddings of B frames.

    Args:
        renders, references: uint8 (H, W, 3) of the frame's size; None where there is no reference.

    Returns:
        `render_latents`, `cond_latents` (B, 4, h, w); `image_embeds` (windows, B, D), of the reference's squares
        `frame.embedded_px`; `has_cond` (B,) bool. What belongs to an absent reference is arbitrary.
    """
    device = components.vae.device
    present = [render if image is None else image for render, image in zip(renders, references, strict=True)]
    pixels = np.stack([normalise(image) for image in (*renders, *present)])  # (2B, 3, H, W)
    render, cond = encode(components.vae, torch.from_numpy(pixels).to(device)).chunk(2)  # (B, 4, h, w) each
    squares = [image[:, left : left + frame.height_px] for left in frame.embedded_px for image in present]
    embeds = embed_images(components, squares).unflatten(0, (len(frame.embedded_px), -1))  # (windows, B, D)
    has_cond = torch.tensor([image is not None for image in references], device=device)  # (B,)
    return {"render_latents": render, "cond_latents": cond, "image_embeds": embeds, "has_cond": has_cond}


def repair_frames(
    components: Components,
    cond_cache: CondCache,
    how: Sampling,
    encoded: dict[str, Tensor],
    *,
    seed: int,
    numbers: Sequence[int],
    window_px: int | None = None,
    window_overlap_px: int = 0,
    use_cond_cache: bool = True,
) -> Tensor:
    """Repaired images (B, 3, H, W) in [0, 1], float32.

    Args:
        encoded: as `encode_frames` returns; one image embedding per window, or one for all.
        seed, numbers: each image's noise follows from the seed and its number (B,).
        window_px, window_overlap_px, use_cond_cache: as in `denoise`.
    """
    render, embeds = encoded["render_latents"], encoded["image_embeds"]  # (B, 4, h, w), (windows, B, D)
    device, keep = render.device, encoded["has_cond"].float()  # (B,)
    constants = components.constants(device)
    rows = how.label_rows
    noise = draw_normal(seed, "validation image embedding noise", numbers, (rows, embeds.shape[2])).flatten(0, 1)
    noise, embeds = noise.to(device), embeds.repeat_interleave(rows, dim=1)  # (rows B, D), (windows, rows B, D)
    labels = [
        keep.repeat_interleave(rows)[:, None]
        * class_labels(window, noise, constants.embed_mean, constants.embed_std, constants.image_alphas_cumprod)
        for window in embeds
    ]  # (rows B, 2 D) each
    latents = denoise(
        components.unet,
        cond_cache,
        components.scheduler,
        cond_latents=encoded["cond_latents"] * keep[:, None, None, None],
        render_latents=render,
        text=how.text,
        class_labels=labels if len(labels) > 1 else labels[0],
        init_noise=draw_normal(seed, "validation noise", numbers, render.shape[1:]).to(device),
        num_inference_steps=how.num_inference_steps,
        guidance_scale=how.guidance_scale,
        guidance_rescale=how.guidance_rescale,
        strength=how.strength,
        use_cond_cache=use_cond_cache,
        null_kinds=how.null_kinds,
        window_px=window_px,
        window_overlap_px=window_overlap_px,
    )  # (B, 4, h, w)
    return decode(components.vae, latents)
