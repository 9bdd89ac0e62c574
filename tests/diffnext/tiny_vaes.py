"""Folders of autoencoders as they are released, with tiny networks of random weights."""

from pathlib import Path
from typing import Any

import torch

from diffnext.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffnext.models.autoencoders.autoencoder_kl_opensora import AutoencoderKLOpenSora
from diffnext.models.autoencoders.base import Autoencoder

TINY = {"block_out_channels": [32, 32, 32, 32], "layers_per_block": 1, "latent_channels": 4}


def write_vae(folder: Path, model_class: type[Autoencoder], seed: int = 0, **config: Any) -> Autoencoder:
    """Saves a new model, and returns it in eval mode."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = model_class.from_config(config or TINY).eval()
    model.save_pretrained(folder)
    return model


def write_image_vae(folder: Path, seed: int = 0) -> Autoencoder:
    """8 x 8 px to 4 channels, as the one of sdxl1024."""
    return write_vae(folder, AutoencoderKL, seed, **TINY, scaling_factor=0.13025)


def write_video_vae(folder: Path, seed: int = 0) -> Autoencoder:
    """4 x 8 x 8 px to 4 channels, as the one of osp480."""
    return write_vae(folder, AutoencoderKLOpenSora, seed, **TINY)
