"""The autoencoders by the names that command lines and configuration files have for them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common.pretrained import read_config
from vae.models.base import Autoencoder
from vae.models.causalvae import CausalVAE
from vae.models.wfvae import WFVAE
from vae.models.wfvae2 import WFVAE2

MODELS: dict[str, type[Autoencoder]] = {"WFVAE": WFVAE, "WFVAE2": WFVAE2, "CausalVAE": CausalVAE}


def find_class(model_name: str | None, config: Mapping[str, Any]) -> type[Autoencoder]:
    """The class of a name (or, if that is None, of the configuration's `_class_name`); ValueError if there is none."""
    by_json_name = {each.json_class_name(): each for each in MODELS.values()}
    name = config.get("_class_name") if model_name is None else model_name
    found = MODELS.get(name) or by_json_name.get(name)
    if found is None:
        if model_name is None and name:
            raise ValueError(f"the configuration is that of {name!r}: give a folder of {', '.join(MODELS)}")
        what = f"there is no model {name!r}" if name else "the configuration has no _class_name"
        raise ValueError(f"{what}: give a model name, one of {', '.join(MODELS)}")
    return found


def build_model(model_name: str | None, config: Mapping[str, Any]) -> Autoencoder:
    """A new model; see `Autoencoder.from_config`.

    Args:
        model_name: "WFVAE", "WFVAE2" or "CausalVAE"; None: what the configuration's `_class_name` says.
        config: as in `config.json`.
    """
    return find_class(model_name, config).from_config(config)


def load_model(folder: str | Path, model_name: str | None = None) -> Autoencoder:
    """The model in a folder, with its weights; see `Autoencoder.from_pretrained` and `build_model`."""
    return find_class(model_name, read_config(folder)).from_pretrained(folder)
