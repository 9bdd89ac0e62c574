"""Networks as folders: `config.json`, weights read and written, and errors that say what differs.

Of third-party packages this module knows torch and safetensors alone. Pickled files are read with `weights_only=True`,
which runs no code.
"""

import difflib
import json
import pickle
from collections.abc import Callable, Iterable, Mapping, Sequence
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
NAMED_KEYS = 5  # how many offending keys an error lists


# Networks -------------------------------------------------------------------------------------------------------------


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
    def json_class_name(cls) -> str:
        """How `config.json` calls the class in `_class_name`; override where the original has another name."""
        return cls.__name__

    @classmethod
    def adapt_config(cls, config: dict[str, Any]) -> dict[str, Any]:
        """Override to translate the values of a config.json that is spelled otherwise."""
        return config

    @classmethod
    def adapt_state(cls, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Override to translate the names of weights that are spelled otherwise, or to leave some out."""
        return state

    @classmethod
    def problem_of(cls, key: str, value: Any, default: Any) -> str | None:
        """What is wrong with a value of config.json, if anything; override to ask for more than the default's kind."""
        return None if _fits(value, default) else f"{key} is {value!r}, but must be like {default!r}"

    @classmethod
    def parse_config(cls, config: Mapping[str, Any]) -> Any:
        """The configuration out of JSON values; absent keys have the class's defaults.

        Raises:
            ValueError: unknown keys, values of another type, or a configuration of another class; all in one.
        """
        expected, found = cls.json_class_name(), config.get("_class_name")
        if found not in (None, expected, cls.__name__):
            raise ValueError(f"this configuration is of {found}, not of {expected}: choose the one that fits")
        defaults = {each.name: each.default for each in fields(cls.config_class)}
        problems, values = [], {}
        for key, value in cls.adapt_config(dict(config)).items():
            if key in defaults:
                values[key] = _tuples(value)
                problems.append(cls.problem_of(key, value, defaults[key]))
            elif key not in IGNORED_KEYS and key not in cls.ignored_keys:
                close = difflib.get_close_matches(key, defaults, n=1)
                problems.append(f"unknown key {key!r}" + (f", did you mean {close[0]!r}?" if close else ""))
        if any(problems):
            raise ValueError(f"configuration of {cls.__name__}: " + "; ".join(filter(None, problems)))
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
        path = find_weights([folder])
        with _WithoutRandomInitialization():
            model = cls(config)
        state = {
            name: value.to(dtype) if value.is_floating_point() else value
            for name, value in cls.adapt_state(read_tensors(path)).items()
        }
        load_exactly(model, state, path, assign=True)
        return model.eval()

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `config.json` and `diffusion_pytorch_model.safetensors`."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config = {"_class_name": self.json_class_name(), **asdict(self.config)}
        (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", "utf-8")
        state = {name: value.detach().cpu().contiguous() for name, value in self.state_dict().items()}
        save_file(state, folder / f"{WEIGHTS_STEM}.safetensors", metadata={"format": "pt"})


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


def parameter_dtype(network: Any) -> torch.dtype:
    """The dtype of a network's weights, wrapped or not; float32 for a callable without weights."""
    parameters = network.parameters() if isinstance(network, nn.Module) else iter(())
    first = next(parameters, None)
    return torch.float32 if first is None else first.dtype


def widen_conv(narrow: nn.Conv2d, in_channels: int) -> nn.Conv2d:
    """A copy of a convolution with more input channels, behind the old ones; their weights are zero."""
    # skip_init draws no random numbers, so widening leaves the run's random state alone.
    wide: Any = nn.utils.skip_init(
        nn.Conv2d,
        in_channels,
        narrow.out_channels,
        narrow.kernel_size,
        narrow.stride,
        narrow.padding,
        bias=narrow.bias is not None,
        device=narrow.weight.device,
        dtype=narrow.weight.dtype,
    )
    with torch.no_grad():
        wide.weight.zero_()
        wide.weight[:, : narrow.in_channels] = narrow.weight
        if narrow.bias is not None:
            wide.bias.copy_(narrow.bias)
    return wide.requires_grad_(narrow.weight.requires_grad)


# Files ----------------------------------------------------------------------------------------------------------------


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; ValueError if it holds something else."""
    try:
        content = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:  # no JSON, or no text
        raise ValueError(f"{path} is no valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a mapping in braces, it holds a {type(content).__name__}")
    return content


def read_config(folder: str | Path) -> dict[str, Any]:
    """A folder's `config.json`; FileNotFoundError or ValueError if it is absent or no JSON object."""
    path = Path(folder) / CONFIG_FILE
    if not path.is_file():
        raise FileNotFoundError(f"no {path}: give the folder of a model, with {CONFIG_FILE} and weights")
    return read_json(path)


def weights_names(stems: Iterable[str] = WEIGHTS_STEMS) -> list[str]:
    """Names that a folder's weights, or the list of their shards, may have: safetensors before .bin."""
    endings = [f".{kind}{end}" for kind in ("safetensors", "bin") for end in ("", ".index.json")]
    return [stem + ending for stem in stems for ending in endings]


def find_weights(folders: Sequence[Path], stems: Iterable[str] = WEIGHTS_STEMS) -> Path:
    """The first of `weights_names` in the first folder that has one, for `read_tensors`; FileNotFoundError if none."""
    names = weights_names(stems)
    found = next((folder / name for folder in folders for name in names if (folder / name).is_file()), None)
    if found is None:
        places, last = " or ".join(map(str, folders)), folders[-1]
        there = ", ".join(sorted(each.name for each in last.iterdir())) if last.is_dir() else ""
        raise FileNotFoundError(f"no weights in {places}; tried: {', '.join(names)}; {last} holds {there or 'nothing'}")
    return found


def shards_of(index: Path) -> list[Path]:
    """The files that a list of shards (`*.index.json`) names; ValueError if it is none."""
    try:
        return [index.parent / name for name in sorted(set(read_json(index)["weight_map"].values()))]
    except (KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"{index} is no list of shards: {error!r}") from error


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Tensors by name, on the CPU, of a .safetensors or pickled file, or of all shards that an `*.index.json` names.

    Raises:
        FileNotFoundError: there is no such file, or a shard is missing.
        ValueError: a file is damaged, or holds more than tensors by name.
    """
    if not path.name.endswith(".index.json"):
        return _read_file(path)
    shards = shards_of(path)
    missing = [shard.name for shard in shards if not shard.is_file()]
    if missing:
        raise FileNotFoundError(f"{path.parent} lacks {named(missing)}, which {path.name} names: copy it again, whole")
    state: dict[str, Tensor] = {}
    for shard in shards:
        state |= _read_file(shard)
    return state


def _read_file(path: Path) -> dict[str, Tensor]:
    try:
        state = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # truncated archives, pickles with code and other formats raise a dozen types
        # The text of an UnpicklingError advises to run the code; those of the others say nothing.
        is_no_pickle = isinstance(error, pickle.UnpicklingError | LookupError | EOFError)
        reason = "no plain tensors" if is_no_pickle else first_line(error)
        raise ValueError(
            f"{path} was refused: it is damaged, or holds more than tensors ({reason}). Copy it again, or use a plain "
            "state dict of tensors, best as safetensors"
        ) from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path} does not hold a plain state dict: expected parameter names mapped to tensors")
    return dict(state)


# What fits ------------------------------------------------------------------------------------------------------------


def load_exactly(
    model: nn.Module, state: Mapping[str, Tensor], source: str | Path, what: str | None = None, *, assign: bool = False
) -> None:
    """Load weights whose names and shapes are the model's.

    Args:
        source: where they come from, for the error.
        what: whose weights they should be, for the error; None is the model's class.
        assign: take the tensors themselves, with their dtype, instead of copying their values.

    Raises:
        ValueError: what differs.
    """
    if differences := weight_differences(model, state):
        what = what or f"this {type(model).__name__}"
        raise ValueError(f"{source} does not hold the weights of {what}; {'; '.join(differences)}")
    try:
        model.load_state_dict(state, assign=assign)
    except RuntimeError as error:  # of a module with an opinion on values
        raise ValueError(f"{source}: {error}") from error


def weight_differences(model: nn.Module, state: Mapping[str, Tensor]) -> list[str]:
    """Which names and shapes are not the model's, in short; empty if all are."""
    own = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    found = {name: tuple(value.shape) for name, value in state.items()}
    return _differences(
        [name for name in own if name not in found],
        [name for name in found if name not in own],
        [f"{name} {found[name]} instead of {own[name]}" for name in own if found.get(name, own[name]) != own[name]],
    )


def check_keys(what: str, missing: Iterable[str], unexpected: Iterable[str], others: Iterable[str] = ()) -> None:
    """Raise a ValueError that counts the keys that differ and names the first ones; nothing if there are none.

    Args:
        what: how the error starts, e.g. that a file is not of a network.
        others: keys of another shape, perhaps with their shapes.
    """
    if differences := _differences(sorted(missing), sorted(unexpected), sorted(others)):
        raise ValueError(f"{what}; {'; '.join(differences)}")


def _differences(missing: Sequence[str], unexpected: Sequence[str], others: Sequence[str]) -> list[str]:
    kinds = {"missing": missing, "unexpected": unexpected, "of another shape": others}
    return [f"{len(keys)} {kind}: {named(keys)}" for kind, keys in kinds.items() if keys]


def named(keys: Sequence[str]) -> str:
    """The first few of some names, for a message."""
    return ", ".join(keys[:NAMED_KEYS]) + (", ..." if len(keys) > NAMED_KEYS else "")


# Parts of a checkpoint, by the loaders of other packages --------------------------------------------------------------


def load_part(
    load: Callable[..., Any],
    what: str,
    path_or_id: str,
    subfolder: str | None,
    revision: str | None = None,
    cache_dir: str | None = None,
    **options: Any,
) -> Any:
    """One part of a diffusers checkpoint, with errors that name it.

    Args:
        load: a `from_pretrained` or `load_config`.
        what: what the error calls the part.
        path_or_id: folder of the checkpoint, or its id on the hub.
        subfolder: of the part; None is the folder itself.
        revision, cache_dir: for a hub id.
        options: for `load`.

    Raises:
        FileNotFoundError: it is not there.
        ValueError: it is a part of another kind, or its weights are damaged or incomplete.
    """
    root = Path(path_or_id)
    folder = root / (subfolder or "")
    if root.is_dir() and not folder.is_dir():
        found = ", ".join(sorted(path.name for path in root.iterdir() if path.is_dir())) or "no folders"
        hint = f"; the folder of a run is no checkpoint: give {root / 'export'}" if (root / "export").is_dir() else ""
        raise FileNotFoundError(
            f"the {what} is looked for in {folder}, but {root} has no {subfolder}; it has {found}{hint}"
        )
    if not root.is_dir() and is_local(path_or_id):
        raise FileNotFoundError(f"the folder {path_or_id}, where the {what} is looked for, does not exist")
    hub = {} if root.is_dir() else {"revision": revision, "cache_dir": cache_dir, "subfolder": subfolder or ""}
    where = folder if root.is_dir() else path_or_id
    # Both libraries fill what a file lacks with random numbers, and say so in a warning at most.
    owner = getattr(load, "__self__", object)
    is_network = issubclass(owner, nn.Module) and load.__name__ == "from_pretrained"
    told = {"output_loading_info": True} if is_network else {}
    try:
        loaded = load(str(folder) if root.is_dir() else path_or_id, **hub, **told, **options)
    except (TypeError, ValueError) as error:  # settings of another network
        reason = first_line(error).rstrip(".")
        raise ValueError(
            f"{path_or_id} holds no {what} of the kind needed ({reason}): name another checkpoint"
        ) from error
    except (SafetensorError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(
            f"the weights of the {what} in {where} are damaged, or of another network ({first_line(error)}): copy them "
            "again, whole"
        ) from error
    except OSError as error:
        absent = "" if root.is_dir() else ", which is no folder, and no hub id within reach"
        raise FileNotFoundError(
            f"the {what} cannot be loaded from {where}{absent} ({first_line(error)}): name a folder that holds it"
        ) from error
    if not is_network:
        return loaded
    network, report = loaded
    check_keys(f"the weights in {where} are not those of the {what}", report["missing_keys"], ())
    return network


def is_local(path_or_id: str) -> bool:
    """Whether a name can be a path alone, and no id on the hub (`name` or `owner/name`)."""
    return Path(path_or_id).is_absolute() or path_or_id.startswith((".", "~")) or path_or_id.count("/") > 1


def first_line(error: BaseException) -> str:
    """What an error of another package says, in short."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
