"""The parts of a NOVA pipeline, loaded from a folder as diffusers lays it out."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from transformers import AutoTokenizer

from common.pretrained import CONFIG_FILE, find_weights, load_exactly, read_config, read_tensors
from diffnext.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffnext.models.autoencoders.autoencoder_kl_cogvideox import AutoencoderKLCogVideoX
from diffnext.models.autoencoders.autoencoder_kl_ltx_video import AutoencoderKLLTXVideo
from diffnext.models.autoencoders.autoencoder_kl_opensora import AutoencoderKLOpenSora
from diffnext.models.autoencoders.base import Autoencoder
from diffnext.models.text_encoders.phi import PhiEncoderModel
from diffnext.models.transformers.transformer_nova import NOVATransformer3DModel

MODEL_INDEX = "model_index.json"
SCHEDULER_CONFIG = "scheduler_config.json"
NAMES = ("transformer", "scheduler", "vae", "text_encoder", "tokenizer")
VAES = (AutoencoderKL, AutoencoderKLOpenSora, AutoencoderKLCogVideoX, AutoencoderKLLTXVideo)
SCHEDULERS = (FlowMatchEulerDiscreteScheduler, DDPMScheduler)
Scheduler = FlowMatchEulerDiscreteScheduler | DDPMScheduler


@dataclass
class Components:
    """What was loaded; None for what is left out.

    Attributes:
        scheduler_config: scheduler_config.json, with `_class_name`.
        vae_config: has scaling_factor and shift_factor, also where the weights are not loaded.
    """

    transformer: NOVATransformer3DModel
    scheduler: Scheduler
    scheduler_config: dict[str, Any]
    vae: Autoencoder | None = None
    vae_config: Any = None
    text_encoder: PhiEncoderModel | None = None
    tokenizer: Any = None


def load_components(
    pretrained_path: str | Path,
    module_dict: Mapping[str, str | None] | None = None,
    module_config: Mapping[str, Mapping[str, Any]] | None = None,
    *,
    text_encoder: bool = True,
    vae: bool = True,
    random_transformer: bool = False,
    dtype: torch.dtype = torch.float32,
    text_dtype: torch.dtype | None = None,
) -> Components:
    """Loads a pipeline's parts. Classes follow from their names; no code in the folder is run.

    Args:
        pretrained_path: folder with `transformer`, `scheduler`, `vae`, `text_encoder`, `tokenizer` and, if there,
            model_index.json; or the id of one on the Hugging Face hub.
        module_dict: other folders for single parts, or another file for `model_index`; an empty one leaves out.
        module_config: `transformer`: settings that take the place of those in its config.json; others are kept.
        text_encoder: also load this and the tokenizer.
        vae: also load its weights; its settings, which say how latents are scaled, are loaded in any case.
        random_transformer: new weights instead of those in the folder, which may be absent.
        dtype: of transformer and VAE.
        text_dtype: of the text encoder; None keeps that of its files.

    Raises:
        FileNotFoundError: a part is not there.
        ValueError: a class that is not known, settings or weights that do not fit.
    """
    folders = _Folders(find_folder(pretrained_path), dict(module_dict or {}))
    unknown = sorted({*(module_dict or {})} - {*NAMES, "model_index"}) + sorted(
        {*(module_config or {})} - {"transformer"}
    )
    if unknown:
        raise ValueError(
            f"module_dict or module_config names {', '.join(unknown)}; the first may hold {', '.join(NAMES)} and "
            "model_index, the second transformer"
        )
    overrides = (module_config or {}).get("transformer") or {}
    folder = folders.find("transformer", optional=random_transformer)
    left_out = {
        "scheduler": folders.find("scheduler") is None,
        "transformer": folder is None and not random_transformer,
    }
    if any(left_out.values()):
        names = " and ".join(name for name, is_out in left_out.items() if is_out)
        raise ValueError(
            f"module_dict or {MODEL_INDEX} leaves out the {names}, which is always needed: name its folder"
        )
    scheduler, scheduler_config = _load_scheduler(folders)
    parts = Components(_load_transformer(folder, overrides, dtype, random_transformer), scheduler, scheduler_config)
    if (folder := folders.find("vae")) is not None:
        vae_class = folders.class_of("vae", VAES)
        parts.vae_config = vae_class.parse_config(read_config(folder))
        parts.vae = vae_class.from_pretrained(folder, dtype=dtype) if vae else None
    if text_encoder and (folder := folders.find("text_encoder")) is not None:
        parts.text_encoder = PhiEncoderModel.from_pretrained(folder, dtype=text_dtype)
    if text_encoder and (folder := folders.find("tokenizer")) is not None:
        try:
            parts.tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError) as error:
            raise ValueError(f"the tokenizer in {folder} cannot be loaded: {error}") from error
    return parts


def find_folder(pretrained_path: str | Path) -> Path:
    """A folder, or the download of a hub id; FileNotFoundError if it is neither."""
    if Path(pretrained_path).is_dir():
        return Path(pretrained_path)
    try:
        return Path(
            snapshot_download(str(pretrained_path), allow_patterns=["*.json", "*.safetensors", "*.txt", "*.bin"])
        )
    except (
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        OSError,
    ) as error:
        reason = str(error).strip().splitlines()[0]
        raise FileNotFoundError(
            f"{pretrained_path} is neither a folder nor a model that can be had from the Hugging Face hub ({reason})"
        ) from error


class _Folders:
    """Where the parts lie, and of which classes they are."""

    def __init__(self, root: Path, module_dict: dict[str, str | None]) -> None:
        self.root, self.module_dict = root, module_dict
        path = Path(module_dict.get("model_index") or root / MODEL_INDEX)
        self.index: dict[str, Any] = {}
        if path.is_file():
            try:
                self.index = json.loads(path.read_text("utf-8"))
            except ValueError as error:
                raise ValueError(f"{path} is no valid JSON: {error}") from error
        elif module_dict.get("model_index"):
            raise FileNotFoundError(f"no {path}, which module_dict names as model_index")

    def find(self, name: str, optional: bool = False) -> Path | None:
        """A part's folder; None if it is left out, or optional and absent."""
        if name in self.module_dict:
            if not self.module_dict[name]:
                return None
            folder = Path(str(self.module_dict[name]))
        elif name in self.index and not any(self.index[name]):  # [null, null]
            return None
        else:
            folder = self.root / name
        if folder.is_dir():
            return folder
        if optional:
            return None
        raise FileNotFoundError(
            f"no {name} at {folder}: a NOVA pipeline has the folders {', '.join(NAMES)}; module_dict may name another"
        )

    def class_of(self, name: str, known: tuple[type, ...], config_file: str = CONFIG_FILE) -> Any:
        """As model_index.json says, or as the part's own configuration does if it comes from elsewhere."""
        folder = self.find(name)
        assert folder is not None, f"{name} is left out"
        indexed = (self.index.get(name) or [None, None])[1]
        path = folder / config_file
        own = json.loads(path.read_text("utf-8")).get("_class_name") if path.is_file() else None
        class_name = (own or indexed) if name in self.module_dict else (indexed or own)
        for each in known:
            if each.__name__ == class_name:
                return each
        names = ", ".join(each.__name__ for each in known)
        raise ValueError(f"the class of {folder} is {class_name!r}, but must be one of {names}: see {MODEL_INDEX}")


def _load_scheduler(folders: _Folders) -> tuple[Scheduler, dict[str, Any]]:
    scheduler_class = folders.class_of("scheduler", SCHEDULERS, SCHEDULER_CONFIG)
    path = (folders.find("scheduler") or Path()) / SCHEDULER_CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"no {path}")
    config = json.loads(path.read_text("utf-8")) | {"_class_name": scheduler_class.__name__}
    return scheduler_class.from_config(config), config


def _load_transformer(
    folder: Path | None, overrides: Mapping[str, Any], dtype: torch.dtype, is_random: bool
) -> NOVATransformer3DModel:
    """Settings given in addition do not drop those of the checkpoint, say its mixer."""
    stored = read_config(folder) if folder is not None and (folder / CONFIG_FILE).is_file() else {}
    settings = {**stored, **overrides}
    if folder is not None and not is_random and settings == stored:
        return NOVATransformer3DModel.from_pretrained(folder, dtype=dtype)
    if not settings:
        raise ValueError("new weights for a transformer need its settings: give module_config.transformer")
    model = NOVATransformer3DModel.from_config(settings)
    if folder is not None and not is_random:
        path = find_weights([folder])
        load_exactly(model, read_tensors(path), path)
    return model.to(dtype).eval()
