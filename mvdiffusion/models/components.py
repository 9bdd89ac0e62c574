"""The frozen parts: VAE, CLIP image encoder with its preprocessing, and the noise schedule.

They are loaded one by one, as each may come from another folder or hub id. A Stable-Diffusion image-variation
checkpoint holds all of them.
"""

import torch
from diffusers import AutoencoderKL, DDIMScheduler
from torch import Tensor
from transformers import CLIPImageProcessor, CLIPVisionModelWithProjection

from common.pretrained import load_part

ENCODED_AT_ONCE_ROWS = 32  # bounds the memory


def load_vae(
    path_or_id: str, subfolder: str | None = "vae", revision: str | None = None, cache_dir: str | None = None
) -> AutoencoderKL:
    """The VAE in float32, frozen, in eval mode; FileNotFoundError if it is not there."""
    vae = load_part(AutoencoderKL.from_pretrained, "VAE", path_or_id, subfolder, revision, cache_dir)
    return vae.eval().requires_grad_(False)


def load_image_encoder(
    path_or_id: str, subfolder: str | None = "image_encoder", revision: str | None = None, cache_dir: str | None = None
) -> CLIPVisionModelWithProjection:
    """CLIP's vision tower with its projection, in float32, frozen, in eval mode; FileNotFoundError if not there."""
    load = CLIPVisionModelWithProjection.from_pretrained
    encoder = load_part(load, "image encoder", path_or_id, subfolder, revision, cache_dir, dtype=torch.float32)
    return encoder.eval().requires_grad_(False)


def load_feature_extractor(
    path_or_id: str,
    subfolder: str | None = "feature_extractor",
    revision: str | None = None,
    cache_dir: str | None = None,
) -> CLIPImageProcessor:
    """CLIP's preprocessing of PIL images; FileNotFoundError if it is not there."""
    load = CLIPImageProcessor.from_pretrained
    return load_part(load, "feature extractor", path_or_id, subfolder, revision, cache_dir)


def load_scheduler(
    path_or_id: str, subfolder: str | None = "scheduler", revision: str | None = None, cache_dir: str | None = None
) -> DDIMScheduler:
    """A DDIM scheduler with the checkpoint's schedule, whichever scheduler that names; FileNotFoundError if not there.

    Predicted clean latents are not clipped unless the checkpoint says so: DDIM's own default is made for pixels.
    """
    config = dict(load_part(DDIMScheduler.load_config, "scheduler", path_or_id, subfolder, revision, cache_dir))
    return DDIMScheduler.from_config({"clip_sample": False} | config)


@torch.no_grad()
def posterior_moments(vae: AutoencoderKL, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the scaled latents' posterior, each (R, 4, h, w) float32.

    Args:
        pixels: (R, 3, H, W) in [-1, 1].
    """
    scale = vae.config.scaling_factor
    posteriors = [vae.encode(rows.to(vae.dtype)).latent_dist for rows in pixels.split(ENCODED_AT_ONCE_ROWS)]
    mean, logvar = (torch.cat([getattr(each, name) for each in posteriors]).float() for name in ("mean", "logvar"))
    return mean * scale, torch.exp(logvar / 2) * scale


def encode_images(vae: AutoencoderKL, pixels: Tensor, noise: Tensor | None = None) -> Tensor:
    """Scaled latents of images: (R, 3, H, W) in [-1, 1] -> (R, 4, h, w) float32.

    Args:
        noise: (R, 4, h, w) standard normal, with which the posterior is sampled; None takes its mode.
    """
    mean, std = posterior_moments(vae, pixels)
    return mean if noise is None else mean + std * noise


@torch.no_grad()
def decode_latents(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    """Images of scaled latents: (R, 4, h, w) -> (R, 3, H, W) float32 in [0, 1]."""
    pixels = vae.decode((latents.float() / vae.config.scaling_factor).to(vae.dtype), return_dict=False)[0]
    return (pixels.float() / 2 + 0.5).clamp(0, 1)  # (R, 3, H, W)


@torch.no_grad()
def embed_images(image_encoder: CLIPVisionModelWithProjection, clip_pixels: Tensor) -> Tensor:
    """Projected CLIP embeddings, not normalised: (R, 3, 224, 224) of CLIP's statistics -> (R, D) float32."""
    return image_encoder(clip_pixels.to(image_encoder.dtype)).image_embeds.float()
