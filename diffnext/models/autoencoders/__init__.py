"""Autoencoders, and the choice of one by what a folder says."""

from pathlib import Path

import torch

from common.pretrained import CONFIG_FILE, read_config
from diffnext.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffnext.models.autoencoders.autoencoder_kl_cogvideox import AutoencoderKLCogVideoX
from diffnext.models.autoencoders.autoencoder_kl_ltx_video import AutoencoderKLLTXVideo
from diffnext.models.autoencoders.autoencoder_kl_opensora import AutoencoderKLOpenSora
from diffnext.models.autoencoders.base import Autoencoder

CLASSES = {
    each.__name__: each
    for each in (AutoencoderKL, AutoencoderKLOpenSora, AutoencoderKLCogVideoX, AutoencoderKLLTXVideo)
}


def autoencoder_class(folder: str | Path) -> type[Autoencoder]:
    """The class that a folder's config.json names in `_class_name`.

    Raises:
        FileNotFoundError: no config.json.
        ValueError: no such class.
    """
    name = read_config(folder).get("_class_name")
    if name not in CLASSES:
        raise ValueError(
            f"{Path(folder) / CONFIG_FILE}: _class_name is {name!r}, but must be one of {', '.join(CLASSES)}"
        )
    return CLASSES[name]


def load_autoencoder(folder: str | Path, dtype: torch.dtype = torch.float32) -> Autoencoder:
    """The autoencoder in a folder, in eval mode; errors as in `from_pretrained` and `autoencoder_class`."""
    return autoencoder_class(folder).from_pretrained(folder, dtype)


def latent_scale(folder: str | Path) -> Autoencoder:
    """The autoencoder in a folder without its weights (on the meta device): for `scale_` and `unscale_` alone."""
    model_class = autoencoder_class(folder)
    with torch.device("meta"):
        return model_class.from_config(read_config(folder))
