"""Start weights of the multi-view UNet, and which of its parameters a stage trains."""

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError
from torch import nn

from common.pretrained import (
    CONFIG_FILE,
    WEIGHTS_STEM,
    check_keys,
    find_weights,
    named,
    read_json,
    read_tensors,
    shards_of,
    weights_names,
)
from mvdiffusion.models.attention import MVTransformerBlock
from mvdiffusion.models.unet_mv2d import UNetMV2DConditionModel, supported_config

ConvInInit = Literal["copy_zero", "copy_random", "random"]
CONV_IN_INITS: tuple[ConvInInit, ...] = ("copy_zero", "copy_random", "random")
LATENT_CHANNELS = 4  # of the VAE: the input of a 2-D UNet
BLOCK_NAMES = {
    "CrossAttnDownBlock2D": "CrossAttnDownBlockMV2D",
    "CrossAttnUpBlock2D": "CrossAttnUpBlockMV2D",
    "UNetMidBlock2DCrossAttn": "UNetMidBlockMV2DCrossAttn",
}
BLOCK_LISTS = ("down_block_types", "up_block_types")
LEGACY_NAMES = {
    "attn_joint.": "attn_joint_last.",
    "norm_joint.": "norm_joint_last.",
    "attn_joint_twice.": "attn_joint_mid.",
    "norm_joint_twice.": "norm_joint_mid.",
}
# What a 2-D config lacks; `unet_config` says otherwise where needed.
OVER_2D = {"in_channels": 8, "class_embed_type": "projection", "projection_class_embeddings_input_dim": 10}


@dataclass(frozen=True)
class LoadReport:
    """What became of each tensor; names are the network's, but for `left_out` and the keys of `renamed`.

    copied: taken from the source as they are.
    widened: `conv_in.weight` with the source's weights in its first input channels.
    new: not in the source, initialised.
    left_out: in the source, for layers that the config turns off.
    renamed: source name to network name, for names of older versions.
    """

    copied: tuple[str, ...]
    widened: tuple[str, ...]
    new: tuple[str, ...]
    left_out: tuple[str, ...]
    renamed: dict[str, str]

    def __str__(self) -> str:
        parts = [f"{len(self.copied)} tensors copied"]
        parts += [f"{len(self.renamed)} of them under an older name"] if self.renamed else []
        parts += [f"{', '.join(self.widened)} widened"] if self.widened else []
        parts += [f"{len(self.new)} new ({named(self.new)})"] if self.new else []
        parts += [f"{len(self.left_out)} left out ({named(self.left_out)})"] if self.left_out else []
        return "; ".join(parts)


def load_unet(
    path: str | Path,
    subfolder: str | None = "unet",
    *,
    unet_config: Mapping[str, Any] | None = None,
    num_views: int,
    conv_in_init: ConvInInit = "copy_zero",
    zero_init_joint_bias: bool = True,
    revision: str | None = None,
    cache_dir: str | None = None,
) -> tuple[UNetMV2DConditionModel, LoadReport]:
    """Loads any start of a run: a 2-D image-variation UNet, Wonder3D's, or one of ours, of any stage.

    Tensors of one name and shape are copied. New may be: joint attention layers (they add nothing at first),
    and from a 2-D UNet (4 input channels) the class embedding and `conv_in`'s further input channels. Left out may be
    joint attention layers that the config turns off. Names of older versions are translated. New weights are drawn from
    torch's global generator, with the default initialisation of their layers. Without a word in either config, there
    are those joint layers that the weights hold.

    Args:
        path: a folder that holds `subfolder`, the UNet's folder itself, or a hub id.
        subfolder: where the UNet lies under it; None for the folder itself.
        unet_config: config keys over those of the source's config.json; all of them if it has none.
        num_views: V.
        conv_in_init: for a 2-D source: its weights for the noisy latents and zero or random ones for the condition
            (Wonder3D), or all random (the original).
        zero_init_joint_bias: False leaves new joint layers' output bias at random, as in the original: these layers
            then add a constant from the start.
        revision, cache_dir: for a hub id.

    Returns:
        the UNet, float32, on the CPU, in evaluation mode; and what was done.

    Raises:
        FileNotFoundError: no config or weights; the places tried are listed.
        ValueError: a file is damaged, the config is not supported, or tensors are missing, unknown or of other sizes.
    """
    if conv_in_init not in CONV_IN_INITS:
        raise ValueError(f"conv_in_init={conv_in_init!r}: expected one of {list(CONV_IN_INITS)}")
    weights, source_config = _find_source(path, subfolder, revision, cache_dir)
    if source_config is None and unet_config is None:
        raise FileNotFoundError(f"{weights} has no config.json beside it: put it there, or give unet_config")
    state, renamed = _rename_legacy({key: tensor.float() for key, tensor in read_tensors(weights).items()})
    if "conv_in.weight" not in state or state["conv_in.weight"].ndim != 4:
        raise ValueError(f"{weights} holds no UNet: it has no conv_in.weight of shape (out, in, kernel, kernel)")
    from_2d = state["conv_in.weight"].shape[1] == LATENT_CHANNELS
    # Where no config says it, as those of older versions do not, the weights tell which joint layers there are.
    held = {f"cd_attention_{place}": any(f"_joint_{place}." in key for key in state) for place in ("mid", "last")}
    given = {**(source_config or {}), **(OVER_2D if from_2d else {}), **(unet_config or {})}
    config = {**held, **given, "num_views": num_views}
    with torch.device("meta"):
        unet = UNetMV2DConditionModel.from_config(_with_mv_names(supported_config(config)))
    expected = {key: tensor.shape for key, tensor in unet.state_dict().items()}
    left_out = [key for key in state if _joint_part(key) and _part(key) not in map(_part, expected)]
    state = {key: tensor for key, tensor in state.items() if key not in left_out}
    new = _check_fit(expected, state, from_2d, weights)
    widened = ["conv_in.weight"] if "conv_in.weight" in new and conv_in_init != "random" else []
    if "conv_in.weight" in new:
        state["conv_in.weight"] = _conv_in_weight(state["conv_in.weight"], expected["conv_in.weight"], conv_in_init)
    unet.load_state_dict(state, strict=False, assign=True)
    _initialise_missing(unet, zero_init_joint_bias)
    return unet.eval(), LoadReport(
        copied=tuple(key for key in expected if key not in new),
        widened=tuple(widened),
        new=tuple(key for key in new if key not in widened),
        left_out=tuple(left_out),
        renamed=renamed,
    )


def from_pretrained_2d(
    path: str | Path,
    camera_embedding_type: str = "e_de_da_sincos",
    num_views: int = 6,
    *,
    zero_init_conv_in: bool = True,
    zero_init_camera_projection: bool = False,
    zero_init_joint_bias: bool = True,
    projection_class_embeddings_input_dim: int = 6,
    subfolder: str | None = None,
    revision: str | None = None,
    cache_dir: str | None = None,
    **unet_config: Any,
) -> UNetMV2DConditionModel:
    """Wonder3D's way from a 2-D image-variation checkpoint; `load_unet` does the work and says more.

    Args:
        camera_embedding_type: "e_de_da_sincos", the only one.
        zero_init_conv_in: weights of the condition's input channels are zero, else random.
        zero_init_camera_projection: has no effect, as in Wonder3D: zeros would cut off camera and domain.
        zero_init_joint_bias: False = the default of nn.Linear, as in Wonder3D.
        projection_class_embeddings_input_dim: 6 = camera alone; the documented datasets need 10.
        unet_config: further config keys, e.g. sample_size, cd_attention_mid.
    """
    if camera_embedding_type != "e_de_da_sincos":
        raise ValueError(f"camera_embedding_type={camera_embedding_type!r}: only 'e_de_da_sincos' is known")
    if zero_init_camera_projection:
        warnings.warn("zero_init_camera_projection has no effect (nor has it in Wonder3D)", stacklevel=2)
    labels = {"projection_class_embeddings_input_dim": projection_class_embeddings_input_dim}
    unet, _ = load_unet(
        path,
        subfolder,
        unet_config={**labels, **unet_config},
        num_views=num_views,
        conv_in_init="copy_zero" if zero_init_conv_in else "copy_random",
        zero_init_joint_bias=zero_init_joint_bias,
        revision=revision,
        cache_dir=cache_dir,
    )
    return unet


def trainable_parameters(unet: nn.Module, suffixes: Sequence[str] | None = None) -> dict[str, nn.Parameter]:
    """Selects what to train, in place: everything else stops requiring gradients.

    Parameters that get no gradient where the condition is one token (`MVTransformerBlock.unused`) are never selected.

    Args:
        suffixes: modules whose dotted names end with one of these, e.g. "joint_mid" for `attn_joint_mid` and
            `norm_joint_mid`; None = the whole network.

    Returns:
        the selected parameters by name, in the network's order.

    Raises:
        ValueError: a suffix selects nothing; the message names modules that could be meant.
    """
    modules = dict(unet.named_modules())
    blocks = [module for module in modules.values() if isinstance(module, MVTransformerBlock)]
    unused = _parameter_ids(layer for block in blocks for layer in block.unused)
    chosen = set()
    for suffix in [""] if suffixes is None else suffixes:
        found = _parameter_ids(module for name, module in modules.items() if name.endswith(suffix)) - unused
        if not found:
            endings = sorted({name.rpartition(".")[2] for name in modules if name and not name[-1].isdigit()})
            raise ValueError(
                f"trainable_modules: no module that is trained has a name that ends with {suffix!r}; names end with "
                f"{', '.join(endings)}"
            )
        chosen |= found
    for parameter in unet.parameters():
        parameter.requires_grad_(id(parameter) in chosen)
    return {name: parameter for name, parameter in unet.named_parameters() if parameter.requires_grad}


def _parameter_ids(modules: Iterable[nn.Module]) -> set[int]:
    return {id(parameter) for module in modules for parameter in module.parameters()}


def _find_source(
    path: str | Path, subfolder: str | None, revision: str | None, cache_dir: str | None
) -> tuple[Path, dict[str, Any] | None]:
    """The weights file (or shard index) and the config beside it."""
    root = Path(path).expanduser()
    if root.exists():
        folders = [root / subfolder, root] if subfolder else [root]
        weights = find_weights(folders, [WEIGHTS_STEM])
        config = weights.with_name(CONFIG_FILE)
        return weights, read_json(config) if config.is_file() else None
    if root.is_absolute() or str(path).startswith((".", "~")) or str(path).count("/") != 1:
        raise FileNotFoundError(
            f"the UNet is looked for in {path}, which is no folder: set pretrained_unet_path to one"
        )

    names = weights_names([WEIGHTS_STEM])

    def fetch(name: str) -> Path | None:
        try:
            return Path(hf_hub_download(str(path), name, subfolder=subfolder, revision=revision, cache_dir=cache_dir))
        except EntryNotFoundError:
            return None

    try:
        config = fetch(CONFIG_FILE)
        weights = next((file for file in map(fetch, names) if file is not None), None)
        if weights is not None and weights.name.endswith(".index.json"):
            for shard in shards_of(weights):
                fetch(shard.name)
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise FileNotFoundError(
            f"{path} is neither a local folder nor a hub id that can be reached ({error})"
        ) from error
    if weights is None:
        raise FileNotFoundError(
            f"{path} is no local folder, and the hub gives no {subfolder or 'UNet'} weights for it (no connection, or "
            f"none of {', '.join(names)})"
        )
    return weights, read_json(config) if config is not None else None


def _rename_legacy(state: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The state with today's names, and which names changed."""
    renamed = {
        key: key.replace(f".{old}", f".{new}") for key in state for old, new in LEGACY_NAMES.items() if f".{old}" in key
    }
    return {renamed.get(key, key): tensor for key, tensor in state.items()}, renamed


def _with_mv_names(config: dict[str, Any]) -> dict[str, Any]:
    """A config in which the block types of 2-D UNets have become the multi-view ones."""
    lists = {key: [BLOCK_NAMES.get(kind, kind) for kind in config[key]] for key in BLOCK_LISTS if key in config}
    mid = {key: BLOCK_NAMES.get(config[key], config[key]) for key in ("mid_block_type",) if key in config}
    return {**config, **lists, **mid}


def _part(key: str) -> str:
    """What a tensor comes and goes with: joint attention at one place, the class embedding, or the UNet itself."""
    return _joint_part(key) or ("class_embedding" if key.startswith("class_embedding.") else "unet")


def _joint_part(key: str) -> str:
    return next((part for part in ("joint_mid", "joint_last") if f"_{part}." in key), "")


def _check_fit(
    expected: Mapping[str, torch.Size], state: Mapping[str, torch.Tensor], from_2d: bool, source: Path
) -> list[str]:
    """Names of tensors to initialise; everything that cannot be explained is an error."""
    may_be_new = {"joint_mid", "joint_last"} | ({"class_embedding"} if from_2d else set())
    may_be_new -= set(map(_part, state))
    new = [key for key in expected if key not in state and _part(key) in may_be_new]
    odd_sizes = [key for key in expected if key in state and state[key].shape != expected[key]]
    if from_2d and "conv_in.weight" in odd_sizes and _fits_widened(state["conv_in.weight"].shape, expected):
        odd_sizes.remove("conv_in.weight")
        new.append("conv_in.weight")
    check_keys(
        f"{source} does not fit the UNet's config (its own, with pretrained_config_path_unet and flags over it)",
        [key for key in expected if key not in state and key not in new],
        [key for key in state if key not in expected],
        [f"{key} {tuple(state[key].shape)} instead of {tuple(expected[key])}" for key in odd_sizes],
    )
    return new


def _fits_widened(narrow: torch.Size, expected: Mapping[str, torch.Size]) -> bool:
    wide = expected["conv_in.weight"]
    return narrow[1] < wide[1] and (narrow[0], *narrow[2:]) == (wide[0], *wide[2:])


def _conv_in_weight(narrow: torch.Tensor, shape: torch.Size, init: ConvInInit) -> torch.Tensor:
    """conv_in.weight of a wider UNet, (out, in, 3, 3)."""
    weight = torch.zeros(shape)
    if init != "copy_zero":
        nn.init.kaiming_uniform_(weight, a=math.sqrt(5))  # as nn.Conv2d begins
    if init != "random":
        weight[:, : narrow.shape[1]] = narrow
    return weight


def _initialise_missing(unet: nn.Module, zero_init_joint_bias: bool) -> None:
    """Gives layers whose weights were not loaded (they are on the meta device) their first weights."""
    for name, module in unet.named_modules():
        if any(parameter.is_meta for parameter in module.parameters(recurse=False)):
            module.to_empty(device="cpu", recurse=False)
            module.reset_parameters()
            if _joint_part(f"{name}.") and name.endswith(".to_out.0"):
                nn.init.zeros_(module.weight)
                if zero_init_joint_bias:
                    nn.init.zeros_(module.bias)
