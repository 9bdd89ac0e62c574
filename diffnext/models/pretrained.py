"""What all networks share: configurations as JSON, folders of weights."""

import difflib
import json
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

CONFIG_FILE = "config.json"
WEIGHTS_STEM = "diffusion_pytorch_model"
# diffusers' name first, then the two of transformers.
WEIGHTS_STEMS = (WEIGHTS_STEM, "model", "pytorch_model")
# What diffusers writes beside a network's own settings; those of the second line come with averaged weights.
IGNORED_KEYS = ("_class_name", "_diffusers_version", "_name_or_path")
IGNORED_KEYS += ("decay", "inv_gamma", "min_decay", "optimization_step", "power", "update_after_step", "use_ema_warmup")


class PretrainedModel(nn.Module):
    """A network with a frozen dataclass as its configuration, stored as diffusers stores it.

    Args:
        config: an instance of the class's `config_class`.
    """

    config_class: ClassVar[type]
    ignored_keys: ClassVar[tuple[str, ...]] = ()  # of config.json, accepted without effect

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config

    @classmethod
    def adapt_config(cls, config: dict[str, Any]) -> dict[str, Any]:
        """Override to translate the values of a config.json that is spelled otherwise."""
        return config

    @classmethod
    def adapt_state(cls, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Override to translate the names of weights that are spelled otherwise, or to leave some out."""
        return state

    @classmethod
    def parse_config(cls, config: Mapping[str, Any]) -> Any:
        """The configuration out of JSON values; absent keys have the class's defaults.

        Raises:
            ValueError: unknown keys, values of another type, or a configuration of another class; all in one.
        """
        found = config.get("_class_name")
        if isinstance(found, str) and found != cls.__name__:
            raise ValueError(f"this configuration is of {found}, not of {cls.__name__}")
        defaults = {each.name: each.default for each in fields(cls.config_class)}
        problems, values = [], {}
        for key, value in cls.adapt_config(dict(config)).items():
            if key in defaults:
                values[key] = _tuples(value)
                if not _fits(value, defaults[key]):
                    problems.append(f"{key} is {value!r}, but must be like {defaults[key]!r}")
            elif key not in IGNORED_KEYS and key not in cls.ignored_keys:
                close = difflib.get_close_matches(key, defaults, n=1)
                problems.append(f"unknown key {key!r}" + (f", did you mean {close[0]!r}?" if close else ""))
        if problems:
            raise ValueError(f"configuration of {cls.__name__}: " + "; ".join(problems))
        return cls.config_class(**values)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """A new model with random weights; ValueError as in `parse_config`."""
        return cls(cls.parse_config(config))

    @classmethod
    def from_pretrained(cls, folder: str | Path, dtype: torch.dtype = torch.float32) -> Self:
        """The model in a folder (config.json; weights as safetensors or .bin, whole or in shards), in eval mode.

        Args:
            dtype: of floating-point weights, whatever the files hold.

        Raises:
            FileNotFoundError: no folder, configuration or weights there.
            ValueError: weights that cannot be read, or are not exactly those of the configuration.
        """
        folder = Path(folder)
        try:
            config = cls.parse_config(read_config(folder))
        except ValueError as error:
            raise ValueError(f"{folder}: {error}") from error
        with _WithoutRandomInitialization():
            model = cls(config)
        state, path = read_weights(folder)
        state = {
            name: value.to(dtype) if value.is_floating_point() else value
            for name, value in cls.adapt_state(state).items()
        }
        load_exactly(model, state, str(path))
        return model.eval()

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `config.json` and `diffusion_pytorch_model.safetensors`."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config = {"_class_name": type(self).__name__, **asdict(self.config)}
        (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", "utf-8")
        state = {name: value.detach().cpu().contiguous() for name, value in self.state_dict().items()}
        save_file(state, folder / f"{WEIGHTS_STEM}.safetensors", metadata={"format": "pt"})


def read_config(folder: str | Path) -> dict[str, Any]:
    """A folder's `config.json`; FileNotFoundError or ValueError if it is absent or no JSON object."""
    path = Path(folder) / CONFIG_FILE
    if not path.is_file():
        raise FileNotFoundError(f"no {path}: give the folder of a model, with {CONFIG_FILE} and weights")
    try:
        config = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} holds a {type(config).__name__}, but must hold an object of names and values")
    return config


def read_weights(folder: str | Path) -> tuple[dict[str, Tensor], Path]:
    """All weights in a folder and the file that they, or the list of their shards, are in; safetensors before .bin.

    Raises:
        FileNotFoundError: none, or a shard is missing.
        ValueError: a file is damaged, or a .bin holds more than tensors.
    """
    folder = Path(folder)
    names = [f"{stem}.{kind}{end}" for kind in ("safetensors", "bin") for stem in WEIGHTS_STEMS for end in _ENDS]
    path = next((folder / name for name in names if (folder / name).is_file()), None)
    if path is None:
        there = ", ".join(sorted(each.name for each in folder.iterdir())) or "nothing"
        raise FileNotFoundError(f"no weights {folder / names[0]} (or .bin, or shards); the folder holds {there}")
    if path.suffix != ".json":
        return _read_file(path), path
    try:
        shards = sorted(set(json.loads(path.read_text("utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"{path} is no index of shards: {error!r}") from error
    missing = [name for name in shards if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(f"{folder} lacks {_some(missing)}, which {path.name} names")
    state: dict[str, Tensor] = {}
    for name in shards:
        state |= _read_file(folder / name)
    return state, path


_ENDS = ("", ".index.json")


def _read_file(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(f"{path} cannot be read as weights: {str(error).splitlines()[0]}") from error


def load_exactly(model: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Load weights whose names and shapes are the model's; ValueError lists what differs."""
    own = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    found = {name: tuple(value.shape) for name, value in state.items()}
    lists = {
        "missing": [name for name in own if name not in found],
        "unknown": [name for name in found if name not in own],
        "of another shape": [
            f"{name} {found[name]} instead of {own[name]}" for name in own if found.get(name, own[name]) != own[name]
        ],
    }
    problems = [f"{len(names)} {kind}: {_some(names)}" for kind, names in lists.items() if names]
    if problems:
        raise ValueError(f"{source} does not fit the configuration of {type(model).__name__}: " + "; ".join(problems))
    model.load_state_dict(state, assign=True)


class _WithoutRandomInitialization(TorchFunctionMode):
    """In this block, and this thread, memory of new parameters stays as it was found: it will be overwritten."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__module__", None) == "torch.nn.init" or func in (Tensor.uniform_, Tensor.normal_):
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


def _tuples(value: Any) -> Any:
    return tuple(_tuples(each) for each in value) if isinstance(value, list | tuple) else value


def _fits(value: Any, default: Any) -> bool:
    """Whether a JSON value is of the default's kind; a default None says nothing."""
    if default is None:
        return True
    if isinstance(default, bool) or isinstance(value, bool):
        return isinstance(default, bool) and isinstance(value, bool)
    if isinstance(default, float):
        return isinstance(value, int | float)
    return isinstance(value, list | tuple if isinstance(default, tuple) else type(default))


def _some(names: Sequence[str], limit: int = 4) -> str:
    return ", ".join(names[:limit]) + (", ..." if len(names) > limit else "")
