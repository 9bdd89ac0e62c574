"""The frozen parts of CogVideoX-5B-I2V beside its transformer: VAE, T5 with its tokenizer, noise schedule.

They are loaded one by one, as not all of them are needed at once.
"""

import logging
from collections.abc import Sequence
from typing import Any, Literal

import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXDDIMScheduler
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase, T5EncoderModel

from common.pretrained import first_line, load_part
from training_ggi.models.transformer import LATENT_PX

logger = logging.getLogger(__name__)

PROMPT_TOKENS = 226


def load_vae(
    path_or_id: str,
    revision: str | None = None,
    variant: str | None = None,
    cache_dir: str | None = None,
    *,
    tiling: bool = False,
    slicing: bool = False,
) -> AutoencoderKLCogVideoX:
    """The VAE in float32, frozen, in eval mode.

    Args:
        path_or_id: folder of the base model, or its id on the hub; so in all functions of this kind.
        tiling: work in overlapping tiles of half the size: a fraction of the memory, slightly other results.
        slicing: work on one clip at a time.

    Raises:
        FileNotFoundError: it is not there.
    """
    load = AutoencoderKLCogVideoX.from_pretrained
    vae = load_part(load, "VAE", path_or_id, "vae", revision, cache_dir, variant=variant)
    if tiling and _tiles_fit(vae):
        vae.enable_tiling()
    elif tiling:
        logger.warning(
            "the VAE of %s is made for small frames, which do not divide into tiles: none are used", path_or_id
        )
    if slicing:
        vae.enable_slicing()
    return vae.eval().requires_grad_(False)


def _tiles_fit(vae: AutoencoderKLCogVideoX) -> bool:
    """Whether tiles begin at whole latents; diffusers puts others together wrongly. In the released VAE they do."""
    strides = (
        int(vae.tile_sample_min_height * (1 - vae.tile_overlap_factor_height)),
        int(vae.tile_sample_min_width * (1 - vae.tile_overlap_factor_width)),
    )
    return all(stride % LATENT_PX == 0 for stride in strides)


def load_text_encoder(
    path_or_id: str,
    revision: str | None = None,
    variant: str | None = None,
    cache_dir: str | None = None,
    *,
    dtype: torch.dtype | Literal["auto"] = "auto",
) -> T5EncoderModel:
    """T5, frozen, in eval mode; FileNotFoundError if it is not there.

    Args:
        dtype: of its weights, "auto" being that of the file. In float16 the projections `wo`, which would overflow, are
            float32: move the network to a device, but not to another type.
    """
    load, options = T5EncoderModel.from_pretrained, {"variant": variant, "dtype": dtype}
    encoder = load_part(load, "text encoder", path_or_id, "text_encoder", revision, cache_dir, **options)
    return encoder.eval().requires_grad_(False)


def load_tokenizer(
    path_or_id: str, revision: str | None = None, cache_dir: str | None = None
) -> PreTrainedTokenizerBase:
    """T5's tokenizer.

    Raises:
        FileNotFoundError: it is not there.
        ValueError: it cannot be read, e.g. for want of the package sentencepiece.
    """
    try:
        return load_part(AutoTokenizer.from_pretrained, "tokenizer", path_or_id, "tokenizer", revision, cache_dir)
    except (ValueError, ImportError) as error:
        reason = first_line(error.__cause__ or error)
        raise ValueError(
            f"the tokenizer of {path_or_id} cannot be read ({reason}): a spiece.model needs the package sentencepiece "
            "(extra t5)"
        ) from error


def load_scheduler_config(path_or_id: str, revision: str | None = None, cache_dir: str | None = None) -> dict[str, Any]:
    """The checkpoint's `scheduler_config.json`; FileNotFoundError if it is not there."""
    load = CogVideoXDDIMScheduler.load_config  # of any scheduler's file
    return dict(load_part(load, "scheduler", path_or_id, "scheduler", revision, cache_dir))


@torch.no_grad()
def encode_prompts(
    tokenizer: PreTrainedTokenizerBase,
    text_encoder: T5EncoderModel,
    prompts: Sequence[str],
    max_tokens: int = PROMPT_TOKENS,
) -> Tensor:
    """T5's answers, (B, max_tokens, D) in its precision and on its device.

    Prompts are padded or cut to `max_tokens`. There is no attention mask: padding is attended to, as CogVideoX does.
    """
    tokens = tokenizer(
        list(prompts), padding="max_length", max_length=max_tokens, truncation=True, return_tensors="pt"
    ).input_ids  # (B, max_tokens)
    return text_encoder(tokens.to(text_encoder.device)).last_hidden_state  # (B, max_tokens, D)


@torch.no_grad()
def video_moments(vae: AutoencoderKLCogVideoX, clip: Tensor) -> Tensor:
    """Moments of the posterior, mean then log variance, unscaled and not clamped.

    Args:
        clip: (B, F, 3, H, W) in [-1, 1], F = 1 or 4 k + 1.

    Returns:
        (B, 2 C, F', H / 8, W / 8) float32, F' = (F - 1) / 4 + 1.
    """
    videos = clip.transpose(1, 2).to(vae.device, vae.dtype)  # (B, 3, F, H, W)
    return vae.encode(videos).latent_dist.parameters.float()  # (B, 2 C, F', h, w)


@torch.no_grad()
def decode_video(vae: AutoencoderKLCogVideoX, latents: Tensor) -> Tensor:
    """Clips of scaled latents: (B, F', C, h, w) -> (B, F, 3, H, W) float32 in [0, 1], F = 4 (F' - 1) + 1."""
    unscaled = (latents.float() / vae.config.scaling_factor).transpose(1, 2)  # (B, C, F', h, w)
    videos = vae.decode(unscaled.to(vae.device, vae.dtype), return_dict=False)[0]  # (B, 3, F, H, W)
    # Of an even number of latent frames, the VAE makes four frames of the first one instead of one.
    num_frames = 4 * (latents.shape[1] - 1) + 1
    return (videos[:, :, -num_frames:].float() / 2 + 0.5).clamp(0, 1).transpose(1, 2)  # (B, F, 3, H, W)
