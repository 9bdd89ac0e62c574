"""What the video autoencoders share: sizes that they take, configurations as JSON, folders of weights."""

import difflib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"
# What diffusers writes beside a network's own settings; those of the second line come with averaged weights.
IGNORED_KEYS = ("_class_name", "_diffusers_version", "_name_or_path")
IGNORED_KEYS += ("decay", "inv_gamma", "min_decay", "optimization_step", "power", "update_after_step", "use_ema_warmup")


class VaeOutput(NamedTuple):
    """Of a forward pass.

    Attributes:
        sample: reconstruction (B, 3, T, H, W), about [-1, 1].
        moments: (B, 2z, t, h, w), see `posterior.DiagonalGaussian`.
        coefficients: of wavelets, which a loss compares in pairs: (encoder's, decoder's, encoder's, decoder's, ...).
    """

    sample: Tensor
    moments: Tensor
    coefficients: tuple[Tensor, ...]


class PretrainedModel(nn.Module):
    """An autoencoder of clips (B, 3, T, H, W), T = temporal_factor * n + 1, H and W multiples of spatial_factor."""

    config_class: ClassVar[type]
    config: Any
    temporal_factor: int
    spatial_factor: int
    latent_channels: int

    def check_size(self, num_frames: int, height_px: int, width_px: int) -> None:
        """Raises ValueError, which names the nearest sizes that do, for clips that are not whole latents."""
        problems = []
        factor = self.temporal_factor
        if num_frames < 1 or (num_frames - 1) % factor:
            below = (num_frames - 1) // factor * factor + 1
            problems.append(f"{num_frames} frames are not {factor} n + 1: use {_either(below, below + factor)}")
        for name, size_px in (("height", height_px), ("width", width_px)):
            if size_px < 1 or size_px % self.spatial_factor:
                below = size_px // self.spatial_factor * self.spatial_factor
                choice = _either(below, below + self.spatial_factor)
                problems.append(f"a {name} of {size_px} px is no multiple of {self.spatial_factor}: use {choice}")
        if problems:
            raise ValueError(f"{type(self).__name__} cannot take these clips: " + "; ".join(problems))

    def latent_shape(self, num_frames: int, height_px: int, width_px: int) -> tuple[int, int, int, int]:
        """(z, t, h, w) of the latents of such a clip; ValueError as in `check_size`."""
        self.check_size(num_frames, height_px, width_px)
        latent_frames = (num_frames - 1) // self.temporal_factor + 1
        return self.latent_channels, latent_frames, height_px // self.spatial_factor, width_px // self.spatial_factor

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """A new model of a configuration as `config.json` holds it; absent keys have the class's defaults.

        Raises:
            ValueError: unknown keys, values of another type, or a configuration of another class.
        """
        return cls(parse_config(cls, config))

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        """The model in a folder of `save_pretrained`, in eval mode and float32.

        Raises:
            FileNotFoundError: no configuration or no weights there.
            ValueError: weights that are not exactly those of the configuration.
        """
        folder = Path(folder)
        config = read_config(folder)
        path = folder / WEIGHTS_FILE
        if not path.is_file():
            there = ", ".join(sorted(each.name for each in folder.iterdir()))
            raise FileNotFoundError(f"no weights {path}; the folder holds {there}")
        with torch.device("meta"):  # no time for an initialization that is overwritten
            model = cls.from_config(config)
        try:
            state = load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged, or no safetensors file: {error}") from error
        load_exactly(model, {name: value.float() for name, value in state.items()}, str(path))
        return model.eval()

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `config.json` and `diffusion_pytorch_model.safetensors` in the original's names."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config = {"_class_name": json_class_name(type(self)), **asdict(self.config)}
        (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", "utf-8")
        state = {name: value.detach().cpu().contiguous() for name, value in self.state_dict().items()}
        save_file(state, folder / WEIGHTS_FILE, metadata={"format": "pt"})


def _either(below: int, above: int) -> str:
    return f"{below} or {above}" if below > 0 else f"{above}"


def json_class_name(model_class: type[PretrainedModel]) -> str:
    """How a `config.json` calls a class: the original's name."""
    return f"{model_class.__name__}Model"


def read_config(folder: Path) -> dict[str, Any]:
    """A folder's `config.json`; FileNotFoundError or ValueError if it is absent or no JSON object."""
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise FileNotFoundError(f"no {path}: give the folder of a model, with {CONFIG_FILE} and {WEIGHTS_FILE}")
    return read_json(path)


def read_json(path: Path) -> dict[str, Any]:
    """A configuration's file; ValueError if it holds no JSON object."""
    try:
        config = json.loads(path.read_text("utf-8"))
    except ValueError as error:  # no JSON, or no text
        raise ValueError(f"{path} is no valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} holds a {type(config).__name__}, but must hold an object of names and values")
    return config


def parse_config(model_class: type[PretrainedModel], config: Mapping[str, Any]) -> Any:
    """The class's configuration out of JSON values; all problems in one ValueError."""
    expected, found = json_class_name(model_class), config.get("_class_name")
    if found not in (None, expected, model_class.__name__):
        raise ValueError(f"this configuration is of a {found}, not of a {expected}: choose the fitting model name")
    defaults = {each.name: each.default for each in fields(model_class.config_class)}
    problems, values = [], {}
    for key, value in config.items():
        if key in IGNORED_KEYS:
            continue
        if key not in defaults:
            close = difflib.get_close_matches(key, defaults, n=1)
            problems.append(f"unknown key {key!r}" + (f", did you mean {close[0]!r}?" if close else ""))
        elif not _fits(value, defaults[key]):
            problems.append(f"{key} is {value!r}, but must be like {defaults[key]!r}")
        elif key not in ("scale", "shift") and _is_negative(value):
            problems.append(f"{key} is {value!r}, but must not be negative")
        else:
            values[key] = tuple(value) if isinstance(value, list) else value
    if problems:
        raise ValueError(f"configuration of {model_class.__name__}: " + "; ".join(problems))
    return model_class.config_class(**values)


def _is_negative(value: Any) -> bool:
    return any(map(_is_negative, value)) if isinstance(value, list | tuple) else isinstance(value, int) and value < 0


def _fits(value: Any, default: Any) -> bool:
    """Whether a JSON value is of the default's kind; a default None says nothing."""
    if default is None or value is None:
        return default is None
    if isinstance(default, bool) or isinstance(value, bool):
        return isinstance(default, bool) and isinstance(value, bool)
    if isinstance(default, float):
        return isinstance(value, int | float)
    return isinstance(value, list | tuple if isinstance(default, tuple) else type(default))


def load_exactly(model: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Load weights whose names and shapes are the model's; ValueError lists what differs."""
    problems = weight_differences(model, state)
    if problems:
        raise ValueError(f"{source} does not fit the configuration: " + "; ".join(problems))
    try:
        model.load_state_dict(state, assign=True)
    except RuntimeError as error:
        raise ValueError(f"{source}: {error}") from error


def weight_differences(model: nn.Module, state: Mapping[str, Tensor]) -> list[str]:
    """Which names and shapes are not the model's, in short; empty if all are."""
    own = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    found = {name: tuple(value.shape) for name, value in state.items()}
    differing = [
        f"{name} {found[name]} instead of {own[name]}" for name in own if found.get(name, own[name]) != own[name]
    ]
    lists = {
        "missing": [name for name in own if name not in found],
        "unknown": [name for name in found if name not in own],
        "of another shape": differing,
    }
    return [f"{len(names)} {kind}: {_some(names)}" for kind, names in lists.items() if names]


def _some(names: Sequence[str], limit: int = 4) -> str:
    return ", ".join(names[:limit]) + (", ..." if len(names) > limit else "")
