"""One frozen, typed dataclass out of defaults < YAML < dotted overrides < flags.

A trainer's configuration is a frozen dataclass of sections (`run, data, model, loss, optim, checkpoint, log,
validation`), each a frozen dataclass of fields declared with `option`. A field is written in one of three ways, on the
command line and in YAML alike:

    section.field        its full name            data.batch_size=4   --data.batch_size 4
    field                where the name is unique  --seed 1
    alias                a historic spelling       --train_batch_size 4   (one table per trainer)

Every spelling is renamed to the full name within its own layer, before the layers are merged. All problems are
collected and raised together as one `ConfigError`.
"""

import dataclasses
import difflib
import re
import sys
import sysconfig
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import yaml
from omegaconf import OmegaConf

TRUE_WORDS, FALSE_WORDS = ("true", "yes", "on", "1"), ("false", "no", "off", "0", "")
NULL_WORDS = ("none", "null", "~")
CODE = Path(__file__).resolve().parents[1]  # the repository, or where an installation put the packages
SHARE = Path(sysconfig.get_path("data")) / "share" / "visual-trainers"  # configs/ of an installation
MASK = "***"
Schedule = Literal[
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "constant",
    "constant_with_warmup",
    "piecewise_constant",
]


class ConfigError(ValueError):
    """All that is wrong with a configuration; `problems` holds one sentence each."""

    def __init__(self, problems: Sequence[str]):
        self.problems = list(problems)
        super().__init__("\n".join(f"  - {problem}" for problem in self.problems))


def option(
    default: Any,
    help: str | None = None,
    *,
    minimum: float | None = None,
    above: float | None = None,
    maximum: float | None = None,
    secret: bool = False,
    state: bool = False,
    needs: str | None = None,
) -> Any:
    """A configuration field.

    Args:
        default: the value, immutable.
        help: one sentence with the unit; it becomes the `--help` text. Without it this is another default of a field
            that a base of the section has (see `Section`), which keeps its help, its limits and all else.
        minimum, above, maximum: inclusive lower, exclusive lower and inclusive upper limit of a number.
        secret: never written to a file, a log or a tracker.
        state: a change between save and resume would break the saved state, so it is refused.
        needs: without this the field has no effect, and giving it is warned about: `other_field` (set and not false) or
            `other_field=value|value`, of the same section.
    """
    limits = {"minimum": minimum, "above": above, "maximum": maximum}
    return field(
        default=default,
        repr=not secret,
        metadata={"help": help, "secret": secret, "state": state, "needs": needs, **limits},
    )


class Section:
    """Base of the sections below; fields of theirs can be declared again with nothing but another default."""

    def __init_subclass__(cls) -> None:
        for name, given in list(vars(cls).items()):
            if isinstance(given, dataclasses.Field) and given.metadata["help"] is None:
                known = (getattr(base, "__dataclass_fields__", {}).get(name) for base in cls.__mro__[1:])
                inherited = next(filter(None, known), None)
                assert inherited is not None, f"{cls.__name__}.{name} needs a help text: no base section has the field"
                again = field(default=given.default, repr=inherited.repr, metadata=inherited.metadata)
                setattr(cls, name, again)


# The sections that every trainer has ----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class RunConfig(Section):
    output_dir: str = option("runs/run", "folder of checkpoints, metrics and images; shared by all nodes")
    seed: int = option(0, "seed of data order, augmentation and every draw of the loss", minimum=0, state=True)
    max_train_steps: int | None = option(None, "optimizer steps to train; null counts epochs", minimum=1)
    num_train_epochs: int = option(
        100, "passes over the data, where max_train_steps is not given", minimum=1, needs="max_train_steps=null"
    )
    mixed_precision: Literal["no", "fp32", "fp16", "bf16"] | None = option(
        None, "autocast type, no or fp32 for none; null obeys the launcher"
    )
    allow_tf32: bool = option(False, "TF32 matrix products on Ampere and newer GPUs")
    process_group_timeout_s: int = option(1800, "seconds a collective may take before the run is ended", minimum=1)
    hang_timeout_s: float = option(1800.0, "seconds without any progress after which a run ends; 0 is never", minimum=0)
    max_train_time: str | None = option(None, "stop cleanly after this time: seconds, HH:MM:SS or D-HH:MM:SS")
    max_nonfinite_steps: int = option(5, "non-finite steps in a row that are skipped before the run stops", minimum=0)
    replay: str | None = option(None, "record.json of a non-finite step: run that step again and say where it begins")
    preflight: bool = option(False, "try data, disk, weights and two steps in a scratch folder, give a verdict, stop")
    allow_changed: tuple[str, ...] = option((), "settings that may change on resume though they break the state")

    def __post_init__(self) -> None:
        if self.mixed_precision == "fp32":
            object.__setattr__(self, "mixed_precision", "no")  # as the launcher and Accelerate spell it


@dataclass(frozen=True, kw_only=True)
class DataConfig(Section):
    batch_size: int = option(1, "samples per process and micro-batch", minimum=1)
    num_workers: int = option(0, "loader processes per process; 0 loads in the training process", minimum=0)
    sample_timeout_s: float = option(
        120.0, "seconds one item may take a loader process before it is given up; 0 waits for ever", minimum=0
    )
    max_bad_fraction: float = option(0.05, "share of unreadable items above which the run stops", minimum=0, maximum=1)


@dataclass(frozen=True, kw_only=True)
class AdamWConfig(Section):
    learning_rate: float = option(1e-4, "base learning rate", minimum=0)
    gradient_accumulation_steps: int = option(1, "micro-batches per optimizer step", minimum=1)
    adam_beta1: float = option(0.9, "AdamW beta 1", minimum=0, maximum=1)
    adam_beta2: float = option(0.999, "AdamW beta 2", minimum=0, maximum=1)
    adam_weight_decay: float = option(1e-2, "AdamW weight decay", minimum=0)
    adam_epsilon: float = option(1e-8, "AdamW epsilon", above=0)
    max_grad_norm: float = option(1.0, "gradients are scaled down to this global norm; 0 is off", minimum=0)
    use_8bit_adam: bool = option(False, "8-bit AdamW of bitsandbytes (extra `bnb`)", state=True)


@dataclass(frozen=True, kw_only=True)
class OptimConfig(AdamWConfig):
    """With the learning rates and the moving average of diffusers' scripts."""

    scale_lr: bool = option(False, "multiply the learning rate by accumulation x batch size x processes")
    lr_scheduler: Schedule = option("constant", "learning-rate schedule, over optimizer steps")
    lr_warmup_steps: int = option(
        0,
        "optimizer steps of linear warm-up; none with `constant`",
        minimum=0,
        needs="lr_scheduler=linear|cosine|cosine_with_restarts|polynomial|constant_with_warmup",
    )
    lr_num_cycles: int = option(1, "hard restarts", minimum=1, needs="lr_scheduler=cosine_with_restarts")
    lr_power: float = option(1.0, "power of polynomial", above=0, needs="lr_scheduler=polynomial")
    lr_step_rules: str | None = option(
        None, "`factor:until_step,...,last_factor`, e.g. 1:1000,0.1", needs="lr_scheduler=piecewise_constant"
    )
    use_ema: bool = option(False, "average the weights (EMA); the average is validated and exported", state=True)
    ema_decay: float = option(
        0.9999, "upper bound of the EMA decay (1 + n) / (10 + n)", minimum=0, maximum=1, needs="use_ema"
    )
    offload_ema: bool = option(False, "keep the EMA weights in host memory", needs="use_ema")


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig(Section):
    checkpointing_steps: int = option(500, "optimizer steps between checkpoints", minimum=1)
    checkpoints_total_limit: int | None = option(None, "checkpoints kept; older ones go after a save", minimum=1)
    resume_from_checkpoint: str | None = option(None, "`latest`, a checkpoint folder, or its name under output_dir")


@dataclass(frozen=True, kw_only=True)
class LogConfig(Section):
    report_to: str = option("tensorboard", "tracker(s), comma-separated: tensorboard, wandb, ..., all or none")
    logging_dir: str = option("logs", "folder of tracker files, under output_dir unless absolute")
    tracker_project_name: str = option("training", "project name in the tracker")
    profile: str | None = option(None, "optimizer step, or FIRST:LAST, of which a torch trace is written")
    log_every_steps: int = option(1, "optimizer steps between lines of metrics.jsonl", minimum=1)


@dataclass(frozen=True, kw_only=True)
class ValidationConfig(Section):
    validation_steps: int | None = option(None, "optimizer steps between validations; null counts epochs", minimum=1)
    validation_epochs: int = option(1, "epochs between validations", minimum=1, needs="validation_steps=null")
    validate_at_start: bool = option(True, "validate once before the first step")


# What some trainers have in common ------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class HubModelConfig(Section):
    """A base model of the hub, or a copy of it on disk."""

    pretrained_model_name_or_path: str | None = option(None, "base model: a folder or a hub id; required")
    revision: str | None = option(None, "revision of hub ids")
    cache_dir: str | None = option(None, "folder of hub downloads")
    gradient_checkpointing: bool = option(False, "recompute activations in the backward pass: less memory, slower")


@dataclass(frozen=True, kw_only=True)
class DenoisingLossConfig(Section):
    """The loss of the Stable Diffusion family, with diffusers' extras."""

    prediction_type: Literal["epsilon", "v_prediction"] | None = option(
        None, "what the UNet predicts; null is what the scheduler's file says", state=True
    )
    use_classifier_free_guidance: bool = option(True, "drop conditions at random, so that guidance works")
    noise_offset: float = option(0.0, "strength of the noise offset; 0 is off", minimum=0)
    input_perturbation: float = option(0.0, "extra noise of the input that the target lacks; 0 is off", minimum=0)
    snr_gamma: float | None = option(None, "cap of min-SNR loss weights, recommended 5; null is off", above=0)


@dataclass(frozen=True, kw_only=True)
class HeldOutConfig(ValidationConfig):
    """Validation on items that training never sees."""

    max_validation_items: int | None = option(None, "held-out items per validation; null is all", minimum=1)


@dataclass(frozen=True, kw_only=True)
class PicturesConfig(HeldOutConfig):
    """The same, with results that are compared with pictures."""

    lpips_weights: str | None = option(
        None, "AlexNet weights of torchvision for LPIPS; null looks in torch hub's cache"
    )


@dataclass(frozen=True, kw_only=True)
class GuidedSamplerConfig(Section):
    """How results are sampled, in validation and in inference."""

    num_inference_steps: int = option(20, "sampler steps", minimum=1)
    guidance_scale: float = option(1.0, "classifier-free guidance; 1 is off and halves the cost", above=0)


# The table of fields --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Knob:
    """One field of a configuration: where it is, what it takes, how it may be spelled."""

    path: str  # section.field
    annotation: Any
    default: Any
    metadata: Mapping[str, Any]
    spellings: tuple[str, ...]  # besides `path`


def knobs(config_class: type, aliases: Mapping[str, str]) -> dict[str, Knob]:
    """Every field of a configuration class by its full name, in order of declaration."""
    declared = []
    for section in fields(config_class):
        section_class = typing.get_type_hints(config_class)[section.name]
        hints = typing.get_type_hints(section_class)
        declared += [(section.name, f, hints[f.name]) for f in fields(section_class)]
    names = [f.name for _, f, _ in declared]
    unknown = sorted(set(aliases.values()) - {f"{section}.{f.name}" for section, f, _ in declared})
    assert not unknown, f"aliases of fields that do not exist: {unknown}"
    table = {}
    for section, f, annotation in declared:
        path = f"{section}.{f.name}"
        bare = (f.name,) if names.count(f.name) == 1 and f.name not in aliases else ()
        spellings = bare + tuple(alias for alias, target in aliases.items() if target == path)
        table[path] = Knob(path, annotation, f.default, f.metadata, spellings)
    return table


def convert(value: Any, annotation: Any) -> Any:
    """`value`, from YAML or the command line, as the annotated type; ValueError says what was expected."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        if type(None) in arguments and (value is None or (isinstance(value, str) and value.lower() in NULL_WORDS)):
            return None
        kinds = [kind for kind in arguments if kind is not type(None)]
        return convert(value, float if float in kinds and isinstance(value, int | float) else kinds[0])
    if value is None:
        raise ValueError(f"expected {describe_type(annotation)}, got null")
    if origin is Literal:
        word = {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)  # YAML reads `No` as false
        for choice in arguments:
            if word.lower() == choice.lower():
                return choice
        raise ValueError(f"{value!r} is none of {', '.join(arguments)}{_did_you_mean(word, arguments)}")
    if origin is tuple:
        items = _from_yaml(value) if isinstance(value, str) and value.lstrip().startswith("[") else value
        if isinstance(items, str):
            items = [part.strip() for part in items.split(",") if part.strip()]
        if not isinstance(items, (list, tuple)):
            items = [items]
        if arguments[-1] is not Ellipsis and len(items) != len(arguments):
            raise ValueError(f"expected {len(arguments)} values, got {len(items)}")
        kinds = [arguments[0]] * len(items) if arguments[-1] is Ellipsis else arguments
        return tuple(convert(item, kind) for item, kind in zip(items, kinds, strict=True))
    if origin is dict or annotation is dict:
        mapping = _from_yaml(value) if isinstance(value, str) else value
        if not isinstance(mapping, dict):
            raise ValueError(f"expected a mapping such as {{key: value}}, got {value!r}")
        return mapping
    return _convert_scalar(value, annotation)


def _convert_scalar(value: Any, kind: type) -> Any:
    if kind is bool:
        word = str(value).strip().lower()
        if word in TRUE_WORDS or word in FALSE_WORDS:
            return word in TRUE_WORDS
        raise ValueError(f"expected true or false, got {value!r}")
    shown = repr(value) if len(repr(value)) <= 80 else f"{repr(value)[:80]}..."
    if kind is str:
        if not isinstance(value, str):
            raise ValueError(f"expected text, got {shown}; put it in quotes")  # YAML has read 1.10 as 1.1
        return value
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise ValueError(f"expected {describe_type(kind)}, got {shown}")
    if kind is int and isinstance(value, int):
        return value
    try:
        if kind is int and isinstance(value, str) and value.lstrip("+-").isdigit():
            return int(value)
        number = float(value)  # YAML reads 1e-4 as text
    except (ValueError, OverflowError):
        raise ValueError(f"expected {describe_type(kind)}, got {shown}") from None
    if kind is int and not number.is_integer():
        raise ValueError(f"expected an integer, got {shown}")
    return int(number) if kind is int else number


def _from_yaml(text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except Exception as error:  # malformed scalars make PyYAML raise almost anything
        raise ValueError(" ".join(str(error).split()) or f"cannot be read ({type(error).__name__})") from None


def describe_type(annotation: Any) -> str:
    """How a type is called in `--help` and in messages."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        return " or ".join("null" if kind is type(None) else describe_type(kind) for kind in arguments)
    if origin is Literal:
        return "|".join(arguments)
    if origin is tuple:
        return f"list of {describe_type(arguments[0])}"
    return {int: "integer", float: "number", bool: "true|false", str: "text"}.get(annotation, "mapping")


def _limit_problem(value: Any, metadata: Mapping[str, Any]) -> str | None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    minimum, above, maximum = metadata.get("minimum"), metadata.get("above"), metadata.get("maximum")
    if minimum is not None and not value >= minimum:
        return f"{value} is below the least value {minimum}"
    if above is not None and not value > above:
        return f"{value} must be above {above}"
    if maximum is not None and not value <= maximum:
        return f"{value} is above the greatest value {maximum}"
    return None


def _did_you_mean(word: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(known), n=3, cutoff=0.6)
    return f"; did you mean {' or '.join(close)}?" if close else ""


# Layers ---------------------------------------------------------------------------------------------------------------


@dataclass
class _Layer:
    """Values of one source under full names, with the spelling that the user wrote."""

    source: str
    values: dict[str, tuple[Any, str]] = dataclasses.field(default_factory=dict)


class Parser:
    """Reads one trainer's configuration.

    Args:
        config_class: a frozen dataclass of sections.
        aliases: historic spelling -> `section.field`.
        ignored: historic spelling -> why it has no effect; accepted with a warning.
        check: cross-section checks; returns one sentence per problem.
        resolve: fills in what follows from other settings, once all are known to be good.
        program, description: for `--help`.
        default_yaml: YAML file that is read where none is named.
        yaml_flags: spellings of `--config`.
    """

    def __init__(
        self,
        config_class: type,
        *,
        aliases: Mapping[str, str] | None = None,
        ignored: Mapping[str, str] | None = None,
        check: Callable[[Any], list[str]] = lambda config: [],
        resolve: Callable[[Any], Any] = lambda config: config,
        program: str = "train",
        description: str = "",
        default_yaml: str | None = None,
        yaml_flags: Sequence[str] = ("config",),
    ):
        self.config_class, self.ignored = config_class, dict(ignored or {})
        self.check, self.resolve = check, resolve
        self.program, self.description = program, description
        self.default_yaml, self.yaml_flags = default_yaml, yaml_flags
        self.knobs = knobs(config_class, aliases or {})
        self.names = {s: knob.path for knob in self.knobs.values() for s in (knob.path, *knob.spellings)}

    def parse(self, argv: Sequence[str]) -> tuple[Any, list[str]]:
        """The configuration and the warnings; raises ConfigError with every problem found."""
        config, warnings = self._read(argv)
        return self.resolve(config), warnings

    def _read(self, argv: Sequence[str]) -> tuple[Any, list[str]]:
        """As `parse`, with what follows from other settings left open."""
        problems: list[str] = []
        warnings: list[str] = []
        dotted, flags, yaml_path = self._split(argv, problems)
        layers = []
        if yaml_path or self.default_yaml:
            layers.append(self._file_layer(str(yaml_path or self.default_yaml), dotted, problems, warnings))
            dotted = [(name, value) for name, value in dotted if not self._is_inside_mapping(name)]
        layers.append(self._layer("override", dotted, problems, warnings))
        layers.append(self._layer("flag", flags, problems, warnings))
        merged: dict[str, tuple[Any, str]] = {}
        for layer in layers:
            merged |= layer.values
        config = self._build(merged, problems)
        if config is not None and not problems:
            problems += self.check(config)
        if problems:
            raise ConfigError(problems)
        return config, warnings + self._without_effect(config, merged)

    def parse_or_exit(self, argv: Sequence[str] | None = None) -> tuple[Any, list[str]]:
        """As `parse`; prints `--help` or `--print_config` and exits 0, prints problems and exits 2.

        Args:
            argv: None is the process's own.
        """
        argv = sys.argv[1:] if argv is None else argv
        rest = [token for token in argv if token not in ("--help", "-h", "--print_config")]
        if "--help" in argv or "-h" in argv:
            with suppress(BrokenPipeError):  # of `--help | head`
                print(self.help(), flush=True)
            sys.exit(0)
        try:
            config, warnings = self._read(rest)
        except ConfigError as error:
            print(f"{self.program}: the configuration cannot be used:\n{error}", file=sys.stderr)
            sys.exit(2)
        if "--print_config" in argv:
            print(to_yaml(config), end="")  # not resolved: on another machine, or with other flags, more may follow
            sys.exit(0)
        return self.resolve(config), warnings

    def _split(self, argv: Sequence[str], problems: list[str]) -> tuple[list, list, str | None]:
        """Tokens into dotted overrides, flags (lists of (spelling, value)) and the YAML path."""
        dotted, flags, yaml_path = [], [], None
        tokens = list(argv)
        while tokens:
            token = tokens.pop(0)
            if not token.startswith("--"):
                name, equals, value = token.partition("=")
                if not equals:
                    problems.append(f"{token!r} is neither a --flag nor a key=value override")
                elif name in self.yaml_flags:
                    yaml_path = value
                    if not value:
                        problems.append(f"--{name} needs the path of a YAML file")
                else:
                    dotted.append((name, value))
                continue
            name, equals, value = token[2:].partition("=")
            name = name if name in self.names or name in self.ignored else name.replace("-", "_")
            values = [value] if equals else self._take_values(name, tokens)
            if name in self.yaml_flags:
                yaml_path = values[0] if values else None
                if not yaml_path:
                    problems.append(f"--{name} needs the path of a YAML file")
            elif not values and name in self.names:
                problems.append(f"--{name} needs a value ({describe_type(self.knobs[self.names[name]].annotation)})")
            else:
                flags.append((name, values[0] if len(values) == 1 else values))
        return dotted, flags, yaml_path

    def _take_values(self, name: str, tokens: list[str]) -> list[str]:
        """The values that belong to a flag, taken off the front of `tokens`."""
        knob = self.knobs.get(self.names.get(name, ""))
        if name in self.yaml_flags:
            return [tokens.pop(0)] if tokens and not tokens[0].startswith("--") else []
        if knob is None:  # ignored or unknown: what follows up to the next flag or override is its value
            taken = [tokens.pop(0)] if tokens and not tokens[0].startswith("--") and "=" not in tokens[0] else []
            while taken and tokens and not tokens[0].startswith("--") and "=" not in tokens[0]:
                taken.append(tokens.pop(0))
            return taken
        if knob.annotation is bool:
            is_word = tokens and tokens[0].lower() in (*TRUE_WORDS, *FALSE_WORDS)
            return [tokens.pop(0)] if is_word else ["true"]
        if any(typing.get_origin(kind) is tuple for kind in (knob.annotation, *typing.get_args(knob.annotation))):
            taken = []
            while tokens and not tokens[0].startswith("--") and not self._is_override(tokens[0]):
                taken.append(tokens.pop(0))
            return taken
        is_flag = tokens and tokens[0].startswith("--") and tokens[0][2:3].isalpha()
        is_value = tokens and not is_flag and not self._is_override(tokens[0])
        return [tokens.pop(0)] if is_value else []

    def _is_override(self, token: str) -> bool:
        """Whether it is `key=value`, be it with a mistake in the key: `optim.nope=1`, but not `a=b`."""
        name, equals, _ = token.partition("=")
        section, dot, _ = name.partition(".")
        is_dotted = bool(dot) and any(known.startswith(f"{section}.") for known in self.names)
        return bool(equals) and (name in self.names or is_dotted)

    def _file_layer(self, path: str, dotted: list[tuple[str, str]], problems: list[str], warnings: list[str]) -> _Layer:
        """The values of a YAML file, whose interpolations see the overrides of the command line."""
        try:
            tree = OmegaConf.load(find_file(path))
            for name, value in dotted:
                if self._is_inside_mapping(name) or OmegaConf.select(tree, name) is not None:
                    OmegaConf.update(tree, name, _from_yaml(value), force_add=True)
            loaded = OmegaConf.to_container(tree, resolve=True)
        except Exception as error:  # malformed scalars make PyYAML raise almost anything
            problems.append(f"the YAML file {path} cannot be read: {' '.join(str(error).split())}")
            return _Layer(path)
        if not isinstance(loaded, dict):
            problems.append(f"the YAML file {path} must hold a mapping, it holds a {type(loaded).__name__}")
            return _Layer(path)
        return self._layer(path, self._flatten(loaded), problems, warnings)

    def _takes_mapping(self, name: str) -> bool:
        return name in self.names and describe_type(self.knobs[self.names[name]].annotation).startswith("mapping")

    def _is_inside_mapping(self, name: str) -> bool:
        """`field.key.more` of a field that itself takes a mapping."""
        parts = name.split(".")
        return any(self._takes_mapping(".".join(parts[:count])) for count in range(1, len(parts)))

    def _flatten(self, tree: Mapping, prefix: str = "") -> list[tuple[str, Any]]:
        """Nested mappings as dotted keys; a field that itself takes a mapping is left whole."""
        flat = []
        for key, value in tree.items():
            name = f"{prefix}{key}"
            if isinstance(value, dict) and not self._takes_mapping(name) and name not in self.ignored:
                flat += self._flatten(value, f"{name}.")
            else:
                flat.append((name, value))
        return flat

    def _layer(self, source: str, pairs: list[tuple[str, Any]], problems: list[str], warnings: list[str]) -> _Layer:
        layer = _Layer(source)
        prefix = "--" if source == "flag" else ""
        for name, value in pairs:
            if name in self.ignored:
                if not (value is None or value is False or value == -1):  # `push_to_hub: No` asks for nothing
                    warnings.append(f"{prefix}{name} has no effect: {self.ignored[name]}")
            elif name not in self.names:
                exact = [path for path in self.knobs if path.endswith(f".{name}")]
                hint = _did_you_mean(name, [*self.names, *self.ignored])
                hint = f"; did you mean {' or '.join(exact)}?" if exact else hint
                problems.append(f"{prefix}{name} ({source}) is unknown{hint}")
            else:
                path = self.names[name]
                before = layer.values.get(path)
                repeated = before and before[1] == f"{prefix}{name}" and source in ("override", "flag")  # last one wins
                if before and not repeated and not self._same(path, before[0], value):
                    secret = self.knobs[path].metadata.get("secret")
                    both = "different values" if secret else f"{before[0]!r} and {value!r}"
                    problems.append(f"{before[1]} and {prefix}{name} ({source}) both set {path}, to {both}")
                layer.values[path] = (value, f"{prefix}{name}")
        return layer

    def _same(self, path: str, one: Any, other: Any) -> bool:
        """Two ways to write one value."""
        annotation = self.knobs[path].annotation
        try:
            return convert(one, annotation) == convert(other, annotation)
        except ValueError:
            return one == other

    def _build(self, merged: Mapping[str, tuple[Any, str]], problems: list[str]) -> Any:
        values: dict[str, dict[str, Any]] = {section.name: {} for section in fields(self.config_class)}
        for path, (raw, spelling) in merged.items():
            knob, (section, name) = self.knobs[path], path.split(".", 1)
            try:
                value = convert(raw, knob.annotation)
            except ValueError as error:
                problems.append(f"{spelling}: {' '.join(str(error).split())}")
                continue
            problem = _limit_problem(value, knob.metadata)
            if problem:
                problems.append(f"{spelling}: {problem}")
            values[section][name] = value
        sections = {}
        for section, section_class in typing.get_type_hints(self.config_class).items():
            try:
                sections[section] = section_class(**values[section])
            except ValueError as error:
                problems.append(f"{section}: {error}")
        return self.config_class(**sections) if len(sections) == len(values) else None

    def _without_effect(self, config: Any, given: Mapping[str, tuple[Any, str]]) -> list[str]:
        """One sentence for every setting that was given but that another setting makes pointless."""
        warnings = []
        for path, (_, spelling) in given.items():
            name, _, values = (self.knobs[path].metadata.get("needs") or "").partition("=")
            value = getattr(getattr(config, path.split(".")[0]), path.split(".")[1])
            if not name or value == self.knobs[path].default:
                continue
            needed = getattr(getattr(config, path.split(".")[0]), name)
            word = "null" if needed is None else str(needed)
            if (word not in values.split("|")) if values else not needed:
                wanted = f"{name} is {word}" + (f", not {values.replace('|', ' or ')}" if values else "")
                warnings.append(f"{spelling} has no effect: {wanted}")
        return warnings

    def shown_spellings(self, knob: Knob) -> list[str]:
        """Without former places of a field, such as `data.output`: they are there for old files, not to be typed."""
        sections = {path.split(".")[0] for path in self.knobs}
        return [
            spelling for spelling in knob.spellings if "." not in spelling or spelling.split(".")[0] not in sections
        ]

    def help(self) -> str:
        """The `--help` text, generated from the fields: full name, spellings, type, default, meaning."""
        lines = [f"usage: {self.program} [--config FILE.yaml] [section.field=value ...] [--flag value ...]", ""]
        lines += [self.description.strip(), ""] if self.description else []
        flag = " ".join(f"--{name}" for name in self.yaml_flags)
        lines += [f"  {flag} FILE        YAML file; later layers win: defaults < YAML < section.field=value < --flags"]
        lines += ["  --print_config       print the merged configuration and stop"]
        lines += ["  --help               this text"]
        section = ""
        for knob in self.knobs.values():
            if knob.path.split(".")[0] != section:
                section = knob.path.split(".")[0]
                lines += ["", f"{section}:"]
            spelled = ", ".join([knob.path, *(f"--{s}" for s in self.shown_spellings(knob))])
            default = "null" if knob.default is None else knob.default
            kind = describe_type(knob.annotation)
            lines += [f"  {spelled}", f"      {kind}, default {default}: {knob.metadata['help']}"]
        if self.ignored:
            lines += ["", "accepted without effect:"]
            lines += [f"  --{name}: {reason}" for name, reason in self.ignored.items()]
        return "\n".join(lines)


def find_file(path: str, setting: str = "") -> Path:
    """`path` if absolute, else under the working directory, else in the repository or what an installation brought.

    Raises:
        FileNotFoundError: it is in none of them; names the places tried, and the `setting` to change.
    """
    candidates = dict.fromkeys(folder / path for folder in (Path.cwd(), CODE, *([SHARE] if SHARE.is_dir() else [])))
    for candidate in candidates:
        if candidate.exists():
            return candidate
    tried = "" if Path(path).is_absolute() else f"; tried {', '.join(map(str, candidates))}"
    remedy = f"; set {setting} to where it is" if setting else ""
    raise FileNotFoundError(f"{path} was not found{tried}{remedy}")


def folder_or_id(name: str) -> str:
    """A folder found as `find_file` does, else the name itself: a hub id, or a path that is not there."""
    try:
        return str(find_file(name))
    except FileNotFoundError:
        return name


# What is written and compared -----------------------------------------------------------------------------------------


def to_dict(config: Any) -> dict[str, dict[str, Any]]:
    """The configuration as nested plain values; secrets are masked."""
    tree: dict[str, dict[str, Any]] = {}
    for section in fields(config):
        values = getattr(config, section.name)
        tree[section.name] = {}
        for f in fields(values):
            value = getattr(values, f.name)
            if f.metadata.get("secret") and value is not None:
                value = MASK
            tree[section.name][f.name] = list(value) if isinstance(value, tuple) else value
    return tree


def to_yaml(config: Any) -> str:
    """A configuration as YAML; it can be passed back with `--config`, except for masked secrets."""
    return yaml.safe_dump(_escaped(to_dict(config)), sort_keys=False)


def _escaped(value: Any) -> Any:
    """`${...}` as text, which would otherwise be resolved when the file is read."""
    if isinstance(value, dict):
        return {key: _escaped(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_escaped(item) for item in value]
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", value) if isinstance(value, str) else value


@dataclass(frozen=True)
class Change:
    """A setting that differs between a checkpoint and the present run."""

    path: str
    old: Any
    new: Any
    breaks_state: bool

    def __str__(self) -> str:
        return f"{self.path}: {self.old!r} in the checkpoint, {self.new!r} now"


def changes(saved: Mapping[str, Mapping[str, Any]], config: Any) -> list[Change]:
    """Settings that differ from those saved in a checkpoint; fields that one side lacks are left out."""
    now, found = to_dict(config), []
    for section in fields(config):
        for f in fields(getattr(config, section.name)):
            old = saved.get(section.name, {}).get(f.name, dataclasses.MISSING)
            new = now[section.name][f.name]
            if old is not dataclasses.MISSING and old != new and not f.metadata.get("secret"):
                found.append(Change(f"{section.name}.{f.name}", old, new, bool(f.metadata.get("state"))))
    return found
