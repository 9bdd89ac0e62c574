"""LoRAs of the transformer: strict reading, fusing, installing as an adapter; and what each way of training trains.

A LoRA adds scale * B @ A to the weights of the four attention projections of every block.
"""

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import CogVideoXTransformer3DModel
from peft import LoraConfig
from safetensors import SafetensorError, safe_open

from common.pretrained import check_keys
from training_ggi.models.transformer import GGI_IN_CHANNELS

logger = logging.getLogger(__name__)

TrainMode = Literal["lora", "full", "base_lora"]
TRAIN_MODES: tuple[TrainMode, ...] = ("lora", "full", "base_lora")
PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0")
PREFIX = "transformer."  # of every key in a LoRA file, as diffusers writes them
BASE_ADAPTER = "default"  # the name that the original's checkpoints carry in their keys
NEW_ADAPTER = "ggi"
METADATA = "lora_adapter_metadata"  # where diffusers keeps a LoRA's alpha in a file's header
PLAIN_TYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def lora_targets(transformer: CogVideoXTransformer3DModel) -> list[str]:
    """Names of the layers that a LoRA changes."""
    blocks = range(len(transformer.transformer_blocks))
    return [f"transformer_blocks.{block}.attn1.{name}" for block in blocks for name in PROJECTIONS]


@dataclass(frozen=True)
class LoraFile:
    """A LoRA file that fits the transformer; its tensors are read when asked for."""

    path: Path
    rank: int
    alpha: float
    dtype: torch.dtype

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def pair(self, target: str, device: torch.device | str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
        """A (rank, in) and B (out, rank) of one layer, in the file's dtype."""
        with safe_open(self.path, framework="pt") as file:
            down, up = (file.get_tensor(f"{PREFIX}{target}.lora_{name}.weight") for name in "AB")
        return down.to(device), up.to(device)

    def delta(self, target: str, device: torch.device | str = "cpu") -> torch.Tensor:
        """What is added to the weight of one layer: (out, in) float32."""
        down, up = self.pair(target, device)
        return (up.float() @ down.float()) * self.scale  # (out, in)


def read_lora_file(path: str | Path, transformer: CogVideoXTransformer3DModel) -> LoraFile:
    """Check a LoRA file against the transformer, from its header alone: a file that does not fit must not pass as zero.

    The released base LoRA has rank 2048, bfloat16 and no alpha, which means alpha = rank. Alphas may stand in the file
    as `transformer.<layer>.alpha` entries, or in the header as diffusers writes them.

    Args:
        path: `I2V5B_final_i38800_nearest_lora_weights.safetensors` of Go-with-the-Flow, or one that was trained here.
        transformer: on any device (meta included), with or without adapters.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: keys, shapes, ranks, dtypes or alphas are not those of one LoRA on all attention projections.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"the LoRA file {path} does not exist; the base LoRA is Go-with-the-Flow's, on the Hub at "
            "Eyeline-Labs/Go-with-the-Flow: put I2V5B_final_i38800_nearest_lora_weights.safetensors into "
            "training_ggi/lora_models/"
        )
    try:
        with safe_open(path, framework="pt") as file:
            header = {key: file.get_slice(key) for key in file.keys()}
            types = {key: entry.get_dtype() for key, entry in header.items()}
            shapes = {key: tuple(entry.get_shape()) for key, entry in header.items()}
            alphas = {key: file.get_tensor(key).float() for key in header if key.endswith(".alpha")}
            metadata = json.loads((file.metadata() or {}).get(METADATA, "{}"))
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged, or no safetensors file ({error}): download it again") from error
    targets = lora_targets(transformer)
    weights = {key: shape for key, shape in shapes.items() if key not in alphas}
    rank = _check_weights(path, weights, targets, transformer)
    kinds = sorted({types[key] for key in weights})
    if len(kinds) > 1 or kinds[0] not in PLAIN_TYPES:
        raise ValueError(f"{path} holds {', '.join(kinds)}: expected one of {', '.join(PLAIN_TYPES)} throughout")
    return LoraFile(path, rank, _alpha(path, rank, alphas, metadata, targets), PLAIN_TYPES[kinds[0]])


def _check_weights(
    path: Path, shapes: Mapping[str, tuple[int, ...]], targets: list[str], transformer: CogVideoXTransformer3DModel
) -> int:
    """The rank, if the keys and shapes are those of all targets."""
    names = {f"{PREFIX}{target}.lora_{name}.weight": (target, name) for target in targets for name in "AB"}
    check_keys(
        f"{path} is no LoRA of this transformer's {len(targets)} attention projections",
        names.keys() - shapes.keys(),
        shapes.keys() - names.keys(),
    )
    first = f"{PREFIX}{targets[0]}.lora_A.weight"
    rank = shapes[first][0]
    wrong = []
    for key, (target, name) in names.items():
        features_out, features_in = transformer.get_submodule(target).weight.shape
        expected = (rank, features_in) if name == "A" else (features_out, rank)
        if shapes[key] != expected:
            wrong.append(f"{key} {shapes[key]} instead of {expected}")
    check_keys(f"{path} does not fit the transformer at rank {rank}, that of {first}", (), (), wrong)
    return rank


def _alpha(
    path: Path, rank: int, alphas: Mapping[str, torch.Tensor], metadata: Mapping[str, Any], targets: list[str]
) -> float:
    """The one alpha of a file: its entries, else its header, else the rank."""
    special = ("rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "fan_in_fan_out")
    unsupported = [name for name in special if metadata.get(f"{PREFIX}{name}")]
    if unsupported:
        raise ValueError(f"{path} sets {', '.join(unsupported)} in its header: only plain LoRAs are supported")
    values = {float(alpha) for alpha in alphas.values() if alpha.numel() == 1}
    if alphas and (len(values) != 1 or alphas.keys() != {f"{PREFIX}{target}.alpha" for target in targets}):
        raise ValueError(
            f"{path} holds {len(alphas)} alpha entries of values {sorted(values)} for {len(targets)} projections: "
            "expected the same one for each, or none"
        )
    stated = values | {float(metadata[key]) for key in (f"{PREFIX}lora_alpha",) if key in metadata}
    if len(stated) > 1 or not all(value > 0 for value in stated):
        raise ValueError(f"{path} states the alphas {sorted(stated)}: expected one, above 0")
    return stated.pop() if stated else float(rank)


@torch.no_grad()
def fuse(transformer: CogVideoXTransformer3DModel, lora: LoraFile) -> None:
    """Add a LoRA to the weights, in place: W + scale B A in float32, layer by layer, rounded once to the dtype of W.

    Nothing keeps the old weights; fusing twice adds twice.

    Raises:
        ValueError: the LoRA changes nothing or is not finite.
    """
    largest = torch.zeros(())
    for target in lora_targets(transformer):
        weight = transformer.get_submodule(target).weight
        delta = lora.delta(target, weight.device)  # (out, in)
        largest = torch.maximum(largest.to(delta), delta.abs().max())  # NaN stays NaN
        weight.copy_(weight.float() + delta)
    _check_effect(lora, "change of a weight", largest)


def _check_effect(lora: LoraFile, what: str, largest: torch.Tensor) -> None:
    if not (largest > 0 and largest.isfinite()):
        raise ValueError(f"{lora.path}: its largest {what} is {largest.item()}: the file is empty or damaged")


def add_new_lora(transformer: CogVideoXTransformer3DModel, rank: int, alpha: float, adapter: str = NEW_ADAPTER) -> None:
    """Install a LoRA that starts as zero: A random from torch's generator, B zero.

    Raises:
        ValueError: the rank or alpha is not above 0.
    """
    if rank <= 0 or alpha <= 0:
        raise ValueError(f"rank={rank} and lora_alpha={alpha} must be above 0")
    transformer.add_adapter(_lora_config(rank, alpha), adapter)


@torch.no_grad()
def install(transformer: CogVideoXTransformer3DModel, lora: LoraFile, adapter: str, dtype: torch.dtype) -> None:
    """Install a LoRA file as an adapter, frozen, in `dtype`, beside the unchanged weights.

    Raises:
        ValueError: an adapter of that name is there already.
    """
    with torch.device("meta"):  # no random numbers for weights that are replaced
        transformer.add_adapter(_lora_config(lora.rank, lora.alpha), adapter)
    if lora.dtype != dtype:
        logger.info("%s: converted from %s to %s", lora.path, lora.dtype, dtype)
    for target in lora_targets(transformer):
        layer = transformer.get_submodule(target)
        for slot, tensor in zip((layer.lora_A, layer.lora_B), lora.pair(target, layer.weight.device), strict=True):
            slot[adapter].weight = torch.nn.Parameter(tensor.to(dtype), requires_grad=False)


def _lora_config(rank: int, alpha: float) -> LoraConfig:
    return LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(PROJECTIONS))


def lora_parameters(transformer: CogVideoXTransformer3DModel, adapter: str) -> dict[str, torch.nn.Parameter]:
    """Parameters of an adapter, as `<layer>.lora_A.weight` (rank, in) and `<layer>.lora_B.weight` (out, rank)."""
    found = {}
    for target in lora_targets(transformer):
        layer = transformer.get_submodule(target)
        found[f"{target}.lora_A.weight"] = layer.lora_A[adapter].weight
        found[f"{target}.lora_B.weight"] = layer.lora_B[adapter].weight
    return found


def has_adapter(transformer: CogVideoXTransformer3DModel, adapter: str) -> bool:
    return adapter in getattr(transformer, "peft_config", {})


def set_up_training(
    transformer: CogVideoXTransformer3DModel,
    mode: TrainMode,
    base_lora: LoraFile,
    *,
    rank: int = 64,
    alpha: float = 64,
    frozen_dtype: torch.dtype | None = None,
) -> list[str]:
    """Bring in the base LoRA and decide what trains.

    lora: the base LoRA is fused into the frozen weights; a new LoRA (adapter `ggi`) and the patch embedding train.
    full: the base LoRA is a frozen adapter (`default`); all other weights train, in the dtype they were loaded in.
    base_lora: the base LoRA (adapter `default`) and the patch embedding train.

    Except in `full`, what trains is float32 beside weights that may be bfloat16; the model then runs under autocast,
    where products are bfloat16 while parameters, their gradients and the optimizer's state stay float32.

    Args:
        transformer: the widened model, as loaded.
        base_lora: see `read_lora_file`.
        rank, alpha: of the new LoRA; the other modes do without.
        frozen_dtype: of the base LoRA in `full`; None is that of the weights. That of autocast gives the same numbers
            in half the memory.

    Returns:
        names of the trained parameters.

    Raises:
        ValueError: the mode is unknown, the model is not widened or has adapters already, or the base LoRA is empty.
    """
    if mode not in TRAIN_MODES:
        raise ValueError(f"train_mode {mode!r} is unknown: use {', '.join(TRAIN_MODES)}")
    projection = transformer.patch_embed.proj
    if projection.in_channels != GGI_IN_CHANNELS:
        raise ValueError(
            f"the transformer takes {projection.in_channels} channels, not {GGI_IN_CHANNELS}: widen it before training"
        )
    if base_lora.scale != 1:
        logger.warning(
            "%s: its alpha, %g, scales the base LoRA by %g", base_lora.path, base_lora.alpha, base_lora.scale
        )
    dtype = projection.weight.dtype
    if mode == "lora":
        fuse(transformer, base_lora)
        add_new_lora(transformer, rank, alpha)
    else:
        install(transformer, base_lora, BASE_ADAPTER, torch.float32 if mode == "base_lora" else frozen_dtype or dtype)
        ups = [p for key, p in lora_parameters(transformer, BASE_ADAPTER).items() if "lora_B" in key]
        _check_effect(base_lora, "entry of B", torch.stack([up.detach().abs().max() for up in ups]).max())
    adapter = NEW_ADAPTER if mode == "lora" else BASE_ADAPTER
    transformer.requires_grad_(mode == "full")
    for parameter in lora_parameters(transformer, adapter).values():
        parameter.requires_grad_(mode != "full")
    projection.requires_grad_()
    trained = {name: parameter for name, parameter in transformer.named_parameters() if parameter.requires_grad}
    if mode != "full":
        for parameter in trained.values():
            parameter.data = parameter.data.float()
    elif dtype != torch.float32:
        logger.warning(
            "train_mode full trains %s weights without a float32 copy: at a learning rate of 5e-5 about half of them "
            "are too coarse ever to move. Load the model in float32, sharded if it must be",
            dtype,
        )
    return list(trained)
