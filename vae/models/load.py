"""The autoencoders by the names that command lines and configuration files have for them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vae.models.causalvae import CausalVAE
from vae.models.pretrained import PretrainedModel, json_class_name, read_config
from vae.models.wfvae import WFVAE
from vae.models.wfvae2 import WFVAE2

MODELS: dict[str, type[PretrainedModel]] = {"WFVAE": WFVAE, "WFVAE2": WFVAE2, "CausalVAE": CausalVAE}


def find_class(model_name: str | None, config: Mapping[str, Any]) -> type[PretrainedModel]:
    """The class of a name (or, if that is None, of the configuration's `_class_name`); ValueError if there is none."""
    by_json_name = {json_class_name(each): each for each in MODELS.values()}
    name = config.get("_class_name") if model_name is None else model_name
    found = MODELS.get(name) or by_json_name.get(name)
    if found is None:
        what = f"there is no model {name!r}" if name else "the configuration has no _class_name"
        raise ValueError(f"{what}: give a model name, one of {', '.join(MODELS)}")
    return found


def build_model(model_name: str | None, config: Mapping[str, Any]) -> PretrainedModel:
    """A new model; see `PretrainedModel.from_config`.

    Args:
        model_name: "WFVAE", "WFVAE2" or "CausalVAE"; None: what the configuration's `_class_name` says.
        config: as in `config.json`.
    """
    return find_class(model_name, config).from_config(config)


def load_model(folder: str | Path, model_name: str | None = None) -> PretrainedModel:
    """The model in a folder, with its weights; see `PretrainedModel.from_pretrained` and `build_model`."""
    return find_class(model_name, read_config(Path(folder))).from_pretrained(folder)
