"""The refiner's UNet: Stable Diffusion 2.1 unCLIP with four more input channels for the render's latents."""

import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from safetensors import SafetensorError
from safetensors.torch import load_file

LATENT_CHANNELS = 4
REFINER_IN_CHANNELS = 8  # noisy latents, then the render's latents
WEIGHTS_STEM = "diffusion_pytorch_model"
NAMED_KEYS = 5  # how many offending keys an error lists


def widen_conv_in(unet: UNet2DConditionModel, in_channels: int = REFINER_IN_CHANNELS) -> UNet2DConditionModel:
    """Widen the first convolution from 4 to `in_channels` inputs, in place; the new weights start at zero.

    Right after widening, the output does not depend on the added channels. A UNet that already has `in_channels`
    inputs keeps its weights. The config follows, so that a saved folder reloads with `from_pretrained`.

    Args:
        unet: a UNet with 4 or `in_channels` input channels, on any device (meta included), in any dtype.

    Returns:
        the same object.

    Raises:
        ValueError: the UNet has another number of input channels, or `in_channels` is below 4.
    """
    narrow = unet.conv_in
    if narrow.in_channels not in (LATENT_CHANNELS, in_channels):
        raise ValueError(
            f"the UNet's conv_in takes {narrow.in_channels} channels: expected {LATENT_CHANNELS} (a stock checkpoint) "
            f"or {in_channels} (a trained refiner)"
        )
    if in_channels < LATENT_CHANNELS:
        raise ValueError(f"in_channels={in_channels} is below the {LATENT_CHANNELS} channels of the noisy latents")
    if narrow.in_channels != in_channels:
        # skip_init draws no random numbers, so widening leaves the run's random state alone.
        wide = torch.nn.utils.skip_init(
            torch.nn.Conv2d,
            in_channels,
            narrow.out_channels,
            narrow.kernel_size,
            narrow.stride,
            narrow.padding,
            device=narrow.weight.device,
            dtype=narrow.weight.dtype,
        )
        with torch.no_grad():
            wide.weight.zero_()
            wide.weight[:, :LATENT_CHANNELS] = narrow.weight
            wide.bias.copy_(narrow.bias)
        wide.requires_grad_(narrow.weight.requires_grad)
        unet.conv_in = wide
    unet.register_to_config(in_channels=in_channels)
    return unet


def load_unet(
    folder_or_id: str | Path,
    subfolder: str | None = "unet",
    *,
    torch_dtype: torch.dtype = torch.float32,
    base_config: Mapping[str, Any] | None = None,
    **hub_options: Any,
) -> UNet2DConditionModel:
    """Load a UNet with 8 input channels from a stock checkpoint or from a trained refiner.

    The number of input channels is read from the weights, because trained folders exist whose config says 4 while
    their `conv_in` has 8.

    Args:
        folder_or_id: a folder that holds `subfolder`, the UNet's folder itself, one weights file (.safetensors or
            .bin), or a model id on the Hub.
        subfolder: where the UNet lies under the folder or model id; None for the folder itself.
        torch_dtype: dtype of the weights.
        base_config: the UNet config to use where the weights have no config.json beside them.
        hub_options: passed to `UNet2DConditionModel.from_pretrained` for a model id (`revision`, `variant`,
            `cache_dir`, ...); of these a local folder uses `variant` alone.

    Returns:
        the UNet in evaluation mode, its config saying 8 input channels.

    Raises:
        FileNotFoundError: no such folder, config or weights; the places tried are listed.
        ValueError: the file is not a plain weights file, or its keys or shapes do not fit the config.
    """
    path = Path(folder_or_id).expanduser()
    if path.exists():
        weights, config = _find_weights(path, subfolder, hub_options.get("variant"), base_config)
        unet = _build_unet(config, _read_weights(weights), weights)
    else:
        unet = _from_hub(str(folder_or_id), subfolder, hub_options)
    return widen_conv_in(unet).to(torch_dtype).eval()


def parameter_dtype(unet: Any) -> torch.dtype:
    """The dtype of a network's weights, wrapped or not; float32 for a callable without weights."""
    parameters = unet.parameters() if isinstance(unet, torch.nn.Module) else iter(())
    first = next(parameters, None)
    return torch.float32 if first is None else first.dtype


def _find_weights(
    path: Path, subfolder: str | None, variant: str | None, base_config: Mapping[str, Any] | None
) -> tuple[Path, Mapping[str, Any]]:
    """The weights file (or shard index) and the config to build the UNet from."""
    if path.is_file():
        return path, _read_config(path.parent, base_config)
    stems = [f"{WEIGHTS_STEM}.{variant}", WEIGHTS_STEM] if variant else [WEIGHTS_STEM]
    names = [f"{stem}{suffix}" for stem in stems for suffix in (".safetensors", ".safetensors.index.json", ".bin")]
    folders = [path / subfolder, path] if subfolder else [path]
    tried = [folder / name for folder in folders for name in names]
    for weights in tried:
        if weights.is_file():
            return weights, _read_config(weights.parent, base_config)
    raise FileNotFoundError(f"no UNet weights under {path}; tried: {', '.join(map(str, tried))}")


def _read_config(folder: Path, base_config: Mapping[str, Any] | None) -> Mapping[str, Any]:
    path = folder / "config.json"
    if path.is_file():
        config = json.loads(path.read_text())
    elif base_config is not None:
        config = dict(base_config)
    else:
        raise FileNotFoundError(f"no config at {path}: put the UNet's config.json there, or pass base_config")
    class_name = config.get("_class_name", UNet2DConditionModel.__name__)
    if class_name != UNet2DConditionModel.__name__:
        raise ValueError(f"{path} describes a {class_name}; expected a {UNet2DConditionModel.__name__}")
    return config


def _read_weights(path: Path) -> dict[str, torch.Tensor]:
    """Tensors by name, on the CPU. Pickle files are read with `weights_only=True`, which runs no code."""
    if path.name.endswith(".index.json"):
        shards = sorted(set(json.loads(path.read_text())["weight_map"].values()))
        return {key: tensor for shard in shards for key, tensor in _read_weights(path.parent / shard).items()}
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: the checkpoint is incomplete, copy it again")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"{path} was refused: it is damaged, or holds more than tensors ({reason}). Use a plain state dict of "
            "tensors, best as safetensors"
        ) from error
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise ValueError(f"{path} does not hold a plain state dict: expected parameter names mapped to tensors")
    return state


def _build_unet(config: Mapping[str, Any], state: dict[str, torch.Tensor], source: Path) -> UNet2DConditionModel:
    if state.get("conv_in.weight") is None or state["conv_in.weight"].ndim != 4:
        raise ValueError(f"{source} holds no UNet: it has no conv_in.weight of shape (out, in, kernel, kernel)")
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config({**config, "in_channels": state["conv_in.weight"].shape[1]})
    _check_fit({key: tensor.shape for key, tensor in unet.state_dict().items()}, state, source)
    unet.load_state_dict(state, assign=True)
    return unet


def _check_fit(expected: Mapping[str, torch.Size], state: Mapping[str, torch.Tensor], source: Path) -> None:
    shared = [key for key in expected if key in state]
    problems = {
        "missing": [key for key in expected if key not in state],
        "unexpected": [key for key in state if key not in expected],
        "of another shape": [
            f"{key} {tuple(state[key].shape)} instead of {tuple(expected[key])}"
            for key in shared
            if state[key].shape != expected[key]
        ],
    }
    lines = [
        f"{len(keys)} {kind}: {', '.join(keys[:NAMED_KEYS])}{', ...' if len(keys) > NAMED_KEYS else ''}"
        for kind, keys in problems.items()
        if keys
    ]
    if lines:
        raise ValueError(f"{source} does not fit its UNet config; " + "; ".join(lines))


def _from_hub(model_id: str, subfolder: str | None, hub_options: Mapping[str, Any]) -> UNet2DConditionModel:
    if model_id.startswith(("/", ".", "~")) or model_id.count("/") > 1:
        raise FileNotFoundError(f"no such file or folder: {model_id}")
    try:
        return UNet2DConditionModel.from_pretrained(model_id, subfolder=subfolder, **hub_options)
    except OSError as error:
        raise FileNotFoundError(
            f"{model_id} is neither a local folder nor a model id that could be loaded ({error}). Stability AI has "
            "withdrawn its Stable Diffusion 2 repositories: give a local copy of the stable-diffusion-2-1-unclip "
            "folder, or the id of a mirror"
        ) from error
