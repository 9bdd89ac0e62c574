"""The refiner's UNet: Stable Diffusion 2.1 unCLIP with four more input channels for the render's latents."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel

from common.pretrained import (
    CONFIG_FILE,
    WEIGHTS_STEM,
    find_weights,
    is_local,
    load_exactly,
    read_json,
    read_tensors,
    widen_conv,
)

LATENT_CHANNELS = 4
REFINER_IN_CHANNELS = 8  # noisy latents, then the render's latents


def widen_conv_in(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """Widen the first convolution from 4 to 8 inputs, in place; the new weights start at zero.

    Right after widening, the output does not depend on the added channels. A UNet that already has them keeps its
    weights. The config follows, so that a saved folder reloads with `from_pretrained`.

    Args:
        unet: a UNet with 4 or 8 input channels, on any device (meta included), in any dtype.

    Returns:
        the same object.

    Raises:
        ValueError: the UNet has another number of input channels.
    """
    narrow = unet.conv_in
    if narrow.in_channels not in (LATENT_CHANNELS, REFINER_IN_CHANNELS):
        raise ValueError(
            f"the UNet's conv_in takes {narrow.in_channels} channels: expected {LATENT_CHANNELS} (a stock checkpoint) "
            f"or {REFINER_IN_CHANNELS} (a trained refiner)"
        )
    if narrow.in_channels != REFINER_IN_CHANNELS:
        unet.conv_in = widen_conv(narrow, REFINER_IN_CHANNELS)
    unet.register_to_config(in_channels=REFINER_IN_CHANNELS)
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
        unet = _build_unet(config, read_tensors(weights), weights)
    else:
        unet = _from_hub(str(folder_or_id), subfolder, hub_options)
    return widen_conv_in(unet).to(torch_dtype).eval()


def _find_weights(
    path: Path, subfolder: str | None, variant: str | None, base_config: Mapping[str, Any] | None
) -> tuple[Path, Mapping[str, Any]]:
    """The weights file (or shard index) and the config to build the UNet from."""
    if path.is_file():
        return path, _read_config(path.parent, base_config)
    stems = [f"{WEIGHTS_STEM}.{variant}", WEIGHTS_STEM] if variant else [WEIGHTS_STEM]
    weights = find_weights([path / subfolder, path] if subfolder else [path], stems)
    return weights, _read_config(weights.parent, base_config)


def _read_config(folder: Path, base_config: Mapping[str, Any] | None) -> Mapping[str, Any]:
    path = folder / CONFIG_FILE
    if path.is_file():
        config = read_json(path)
    elif base_config is not None:
        config = dict(base_config)
    else:
        raise FileNotFoundError(f"no config at {path}: put the UNet's config.json there, or pass base_config")
    class_name = config.get("_class_name", UNet2DConditionModel.__name__)
    if class_name != UNet2DConditionModel.__name__:
        raise ValueError(f"{path} describes a {class_name}; expected a {UNet2DConditionModel.__name__}")
    return config


def _build_unet(config: Mapping[str, Any], state: dict[str, torch.Tensor], source: Path) -> UNet2DConditionModel:
    if state.get("conv_in.weight") is None or state["conv_in.weight"].ndim != 4:
        raise ValueError(f"{source} holds no UNet: it has no conv_in.weight of shape (out, in, kernel, kernel)")
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config({**config, "in_channels": state["conv_in.weight"].shape[1]})
    load_exactly(unet, state, source, "the UNet of its config.json", assign=True)
    return unet


def _from_hub(model_id: str, subfolder: str | None, hub_options: Mapping[str, Any]) -> UNet2DConditionModel:
    if is_local(model_id):
        raise FileNotFoundError(f"no such file or folder: {model_id}")
    try:
        return UNet2DConditionModel.from_pretrained(model_id, subfolder=subfolder, **hub_options)
    except OSError as error:
        raise FileNotFoundError(
            f"{model_id} is neither a local folder nor a model id that could be loaded ({error}). Stability AI has "
            "withdrawn its Stable Diffusion 2 repositories: give a local copy of the stable-diffusion-2-1-unclip "
            "folder, or the id of a mirror"
        ) from error
