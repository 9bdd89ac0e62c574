"""Weights that training left behind: where they are in a run's folder, what they belong on, and loading them."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from diffusers import CogVideoXTransformer3DModel
from safetensors import safe_open

from common.checkpoint import TRAINER_STATE, TrainedWeights, newest_valid, read_state, read_weights
from common.config import find_file, folder_or_id
from common.loop import EXPORT
from training_ggi.config import GGIModel
from training_ggi.models.base_lora import LoraFile, TrainMode, read_lora_file, set_up_training
from training_ggi.models.results import LORA_NAME, PROJECTION_NAME, WEIGHTS_STEM, load_result, load_upstream
from training_ggi.models.transformer import load_transformer

RAW, AVERAGED = "transformer", "transformer_ema"
TRAINED_NAME, CONFIG_NAME = "model.safetensors", "config.yaml"

# small: the two files of an export; trained: a checkpoint's trained weights alone; whole: the original's folder.
Kind = Literal["small", "trained", "whole"]


@dataclass(frozen=True)
class Trained:
    """Weights of a run, and the settings that they were trained with, as far as they are known."""

    folder: Path
    kind: Kind
    model: GGIModel
    data: dict[str, Any] = field(default_factory=dict)

    @property
    def mode(self) -> TrainMode:
        """How they were trained; a whole folder counts as `full`, as it does not say."""
        if self.kind == "small":
            with safe_open(self.folder / PROJECTION_NAME, framework="pt") as file:
                return (file.metadata() or {}).get("train_mode", "lora")
        return self.model.train_mode if self.kind == "trained" else "full"


def find_trained(path: str, *, use_ema: bool = False, base: str | None = None, base_lora: str | None = None) -> Trained:
    """The weights that `path` means: of a run's folder its export, or without one its newest whole checkpoint.

    Args:
        path: a run's folder, its export, one of its checkpoints, or a checkpoint of the original's form.
        use_ema: take the averaged weights of a checkpoint; an export has them already.
        base, base_lora: in place of what the run's settings say.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it holds no weights, or no averaged ones.
    """
    given = folder = find_file(path)
    if (folder / EXPORT).is_dir():
        folder = folder / EXPORT
    elif (newest := newest_valid(folder)) is not None:
        folder = newest
    model, data = _settings(folder)
    # A run's settings may hold fields of another version: those that matter here are known, the rest has defaults.
    known = {name: model[name] for name in vars(GGIModel()) if name in model}
    known |= {"pretrained_model_name_or_path": base} if base else {}
    known |= {"base_lora_path": base_lora} if base_lora else {}
    settings = GGIModel(**known)
    if use_ema and not (folder / AVERAGED).is_dir():
        raise ValueError(
            f"{folder} holds no averaged weights ({AVERAGED}): leave use_ema out; an export has them already"
        )
    inside = folder / (AVERAGED if use_ema else RAW)
    for candidate in (folder, inside):
        kind = _kind(candidate)
        if kind:
            return Trained(candidate, kind, settings, data)
    there = (
        "is a file" if given.is_file() else f"holds {', '.join(sorted(p.name for p in given.iterdir())) or 'nothing'}"
    )
    raise ValueError(
        f"{given} {there}, but no trained weights: give a run's folder, its export, one of its checkpoints, or a "
        "checkpoint of the original"
    )


def _kind(folder: Path) -> Kind | None:
    if (folder / LORA_NAME).is_file() or (folder / PROJECTION_NAME).is_file():
        return "small"
    if (folder / TRAINED_NAME).is_file():
        return "trained"
    if any(folder.glob(f"{WEIGHTS_STEM}*.safetensors")):
        return "whole"
    return None


def _settings(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Sections `model` and `data` of what a checkpoint says of its run, or what lies in the run's folder."""
    if (folder / TRAINER_STATE).is_file():
        config = read_state(folder)["config"]
    else:
        places = [place / CONFIG_NAME for place in (folder, *folder.resolve().parents[:2])]
        path = next((place for place in places if place.is_file()), None)
        config = (yaml.safe_load(path.read_text("utf-8")) or {}) if path else {}
    return dict(config.get("model") or {}), dict(config.get("data") or {})


def load_trained(trained: Trained, dtype: torch.dtype, *, fuse_lora: bool = False) -> CogVideoXTransformer3DModel:
    """The transformer with the trained weights, frozen, in eval mode, on the CPU.

    Args:
        dtype: of all weights; those of a checkpoint that are float32 beside others stay so.
        fuse_lora: of a whole folder, add the base LoRA to the weights: the same result in less time.

    Raises:
        FileNotFoundError: the base model or the base LoRA is missing.
        ValueError, CheckpointError: weights do not fit together.
    """
    if trained.kind == "whole":
        return load_upstream(trained.folder, torch_dtype=dtype, fuse_lora=fuse_lora)
    model = trained.model
    transformer = load_transformer(
        folder_or_id(model.pretrained_model_name_or_path),
        torch_dtype=dtype,
        ignore_learned_positional_embeddings=model.ignore_learned_positional_embeddings,
        revision=model.revision,
        variant=model.variant,
        cache_dir=model.cache_dir,
    )
    if trained.kind == "small":
        load_result(transformer, trained.folder, base_lora_of(trained, transformer) if trained.mode == "lora" else None)
    else:
        lora = base_lora_of(trained, transformer)
        set_up_training(transformer, model.train_mode, lora, rank=model.rank, alpha=model.lora_alpha)
        TrainedWeights(transformer).load_state_dict(read_weights(trained.folder))
    return transformer.requires_grad_(False).eval()


def base_lora_of(trained: Trained, transformer: CogVideoXTransformer3DModel) -> LoraFile:
    """The base LoRA that the weights were trained on; errors as of `find_file` and `read_lora_file`."""
    return read_lora_file(find_file(trained.model.base_lora_path, "base_lora"), transformer)
