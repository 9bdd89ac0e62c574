"""Configuration: layers, spellings, conversion, every problem's text, and what is written and compared."""

import dataclasses
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from common.config import (
    CheckpointConfig,
    ConfigError,
    DataConfig,
    LogConfig,
    OptimConfig,
    Parser,
    RunConfig,
    ValidationConfig,
    changes,
    convert,
    find_file,
    option,
    to_dict,
    to_yaml,
)


@dataclass(frozen=True, kw_only=True)
class ToyData(DataConfig):
    sizes_px: tuple[int, ...] = option((64, 32), "edge lengths")
    crop: tuple[int, float] = option((8, 0.5), "size and chance")
    folders: tuple[str, ...] = option((), "folders")
    parts: tuple[int, ...] | None = option(None, "numbers of parts; null is all")
    extras: dict | None = option(None, "free mapping")


@dataclass(frozen=True, kw_only=True)
class ToyModel:
    name: str | None = option(None, "a folder or a hub id")
    token: str | None = option(None, "password of the hub", secret=True)
    kind: Literal["small", "large"] = option("small", "size", state=True)
    noise_offset: float = option(0.0, "strength; 0 is off", minimum=0)
    power: float = option(1.0, "exponent", above=0)
    width: int = option(8, "channels", minimum=1, maximum=512, state=True)
    seed: int = option(3, "seed of the weights")  # run.seed has the same name: neither may be called `seed` alone

    def __post_init__(self) -> None:
        if self.width % 2:
            raise ValueError(f"width {self.width} must be even")


@dataclass(frozen=True, kw_only=True)
class ToyConfig:
    run: RunConfig = field(default_factory=RunConfig)
    data: ToyData = field(default_factory=ToyData)
    model: ToyModel = field(default_factory=ToyModel)
    optim: OptimConfig = field(default_factory=OptimConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)


ALIASES = {"train_batch_size": "data.batch_size", "model.hub_token": "model.token", "train.lr": "optim.learning_rate"}
IGNORED = {"local_rank": "the launcher sets it", "legacy.prompts": "nothing reads them", "push_to_hub": "no uploads"}


def check(config: ToyConfig) -> list[str]:
    if config.optim.lr_warmup_steps > (config.run.max_train_steps or 10**9):
        return ["optim.lr_warmup_steps is longer than the run"]
    return []


PARSER = Parser(ToyConfig, aliases=ALIASES, ignored=IGNORED, check=check, program="toy.py", description="A toy.")


def parse(*argv: str) -> ToyConfig:
    return PARSER.parse(argv)[0]


def problems(*argv: str, parser: Parser = PARSER) -> list[str]:
    with pytest.raises(ConfigError) as raised:
        parser.parse(argv)
    assert str(raised.value) == "\n".join(f"  - {problem}" for problem in raised.value.problems)
    return raised.value.problems


@pytest.fixture
def in_yaml(tmp_path: Path) -> Callable[[str | bytes], str]:
    def write(text: str | bytes) -> str:
        path = tmp_path / "c.yaml"
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        return f"--config={path}"

    return write


# Layers ---------------------------------------------------------------------------------------------------------------


def test_without_arguments_the_defaults_hold() -> None:
    assert parse() == ToyConfig()


def test_precedence_whatever_the_order_of_tokens(in_yaml) -> None:
    file = in_yaml("data: {batch_size: 2, num_workers: 2, max_bad_fraction: 0.2}\nrun: {output_dir: from_yaml}")
    tokens = [["--batch_size", "4"], ["data.batch_size=3"], ["data.num_workers=3"], [file]]
    for order in ([0, 1, 2, 3], [3, 2, 1, 0], [1, 3, 0, 2], [2, 0, 3, 1]):
        config = parse(*(token for i in order for token in tokens[i]))
        data = config.data
        assert (data.batch_size, data.num_workers, data.max_bad_fraction) == (4, 3, 0.2)
        assert (config.run.output_dir, config.run.seed) == ("from_yaml", 0)


@pytest.mark.parametrize(
    "spelled", ["train_batch_size: 2", "batch_size: 2", "data.batch_size: 2", "data: {batch_size: 2}"]
)
@pytest.mark.parametrize(
    "tokens", [["--batch_size", "4"], ["--train_batch_size=4"], ["train_batch_size=4"], ["--data.batch_size", "4"]]
)
def test_an_old_yaml_key_does_not_beat_the_command_line(in_yaml, spelled: str, tokens: list[str]) -> None:
    assert parse(in_yaml(spelled)).data.batch_size == 2
    assert parse(in_yaml(spelled), *tokens).data.batch_size == 4
    assert parse(*tokens, in_yaml(spelled)).data.batch_size == 4


def test_dashes_stand_for_underscores_in_flags() -> None:
    assert parse("--train-batch-size", "4", "--max-train-steps=7").run.max_train_steps == 7


def test_nested_and_dotted_spellings(in_yaml) -> None:
    config = parse(in_yaml("train: {lr: 1e-3}\nmodel: {hub_token: t}\nmodel.width: 6\nkind: LARGE"))
    assert (config.optim.learning_rate, config.model) == (1e-3, ToyModel(token="t", width=6, kind="large"))


def test_interpolations_are_resolved(in_yaml, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOY_DIR", "there")
    config = parse(in_yaml("run: {seed: 7, output_dir: 'runs/${run.seed}/${oc.env:TOY_DIR}'}"))
    assert config.run.output_dir == "runs/7/there"
    assert parse("--output_dir", "${run.seed}").run.output_dir == "${run.seed}"  # the command line is taken literally


def test_default_yaml_is_read_unless_another_is_named(in_yaml, tmp_path: Path) -> None:
    (tmp_path / "default.yaml").write_text("data: {batch_size: 9, num_workers: 9}")
    parser = Parser(ToyConfig, default_yaml=str(tmp_path / "default.yaml"))
    assert parser.parse([])[0].data.batch_size == 9
    assert parser.parse(["--batch_size", "2"])[0].data == ToyData(batch_size=2, num_workers=9)
    assert parser.parse([in_yaml("batch_size: 3")])[0].data == ToyData(batch_size=3)
    gone = Parser(ToyConfig, default_yaml=str(tmp_path / "gone.yaml"))
    assert "gone.yaml cannot be read" in problems(parser=gone)[0]


@pytest.mark.parametrize("spelling", ["config={}", "--config={}"])
def test_config_may_be_given_in_three_ways(tmp_path: Path, spelling: str) -> None:
    path = tmp_path / "a=b.yaml"  # an equals sign in a path does not make it an override
    path.write_text("batch_size: 5")
    assert parse(spelling.format(path)).data.batch_size == 5
    assert parse("--config", str(path)).data.batch_size == 5


@pytest.mark.parametrize(
    ("tokens", "problem"),
    [
        (
            ["--train_batch_size", "4", "--batch_size", "5"],
            "--train_batch_size and --batch_size (flag) both set data.batch_size, to '4' and '5'",
        ),
        (
            ["data.batch_size=4", "batch_size=5"],
            "data.batch_size and batch_size (override) both set data.batch_size, to '4' and '5'",
        ),
    ],
)
def test_one_field_twice_in_one_layer(tokens: list[str], problem: str) -> None:
    assert problems(*tokens) == [problem]


def test_one_field_twice_in_one_file(in_yaml) -> None:
    token = in_yaml("train_batch_size: 4\ndata: {batch_size: 5}")
    (problem,) = problems(token)
    assert problem.startswith("train_batch_size and data.batch_size (/") and problem.endswith("to 4 and 5")
    (problem,) = problems(in_yaml("batch_size: 4\nbatch_size: 5"))
    assert "duplicate key" in problem


def test_one_field_twice_with_one_value_or_one_spelling_is_fine() -> None:
    assert parse("--train_batch_size", "4", "--batch_size", "4").data.batch_size == 4
    assert parse("--batch_size", "4", "--batch_size", "5").data.batch_size == 5  # the last one counts, as everywhere


def test_nested_and_dotted_key_in_one_file(in_yaml) -> None:
    (problem,) = problems(in_yaml("run: {seed: 1}\nrun.seed: 2"))
    assert "both set run.seed, to 1 and 2" in problem


@pytest.mark.parametrize(
    "tokens", [["--train_batch_size", "4", "--batch_size", "4.0"], ["--use_ema", "--optim.use_ema", "True"]]
)
def test_one_value_written_in_two_ways_is_one_value(tokens: list[str]) -> None:
    parse(*tokens)


# Spellings ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokens", "problem"),
    [
        (["--batchsize", "4"], "--batchsize (flag) is unknown; did you mean batch_size"),
        (["--learning-rat", "4"], "--learning_rat (flag) is unknown; did you mean learning_rate"),
        (["data.batchsize=4"], "data.batchsize (override) is unknown; did you mean data.batch_size"),
        (["--no_use_ema"], "--no_use_ema (flag) is unknown; did you mean use_ema"),
        (["--local_rnk", "1"], "--local_rnk (flag) is unknown; did you mean local_rank"),
        (["--qqqq", "4", "5"], "--qqqq (flag) is unknown"),
        (["--kind", "smal"], "--kind: 'smal' is none of small, large; did you mean small?"),
        (["--kind", "huge"], "--kind: 'huge' is none of small, large"),
        (["stray"], "'stray' is neither a --flag nor a key=value override"),
        (["-b=1"], "-b (override) is unknown"),
        (["--"], "-- (flag) is unknown"),
        (["--batch_size"], "--batch_size needs a value (integer)"),
        (["--batch_size", "--num_workers", "2"], "--batch_size needs a value (integer)"),
        (["--sizes_px"], "--sizes_px needs a value (list of integer)"),
        (["--kind"], "--kind needs a value (small|large)"),
        (["--config"], "--config needs the path of a YAML file"),
        (["--config="], "--config needs the path of a YAML file"),
    ],
)
def test_what_cannot_be_understood_is_named(tokens: list[str], problem: str) -> None:
    (found,) = problems(*tokens)
    assert found.startswith(problem)
    assert ("did you mean" in found) == ("did you mean" in problem)


def test_the_full_names_of_an_ambiguous_name_are_told() -> None:
    (problem,) = problems("--seed", "1")
    assert "run.seed" in problem and "model.seed" in problem


def test_a_name_of_two_sections_must_be_written_in_full() -> None:
    (problem,) = problems("--seed", "1")
    assert problem.startswith("--seed (flag) is unknown; did you mean run.seed")
    config = parse("--run.seed", "1", "model.seed=2")
    assert (config.run.seed, config.model.seed) == (1, 2)


def test_config_without_its_path_before_another_flag() -> None:
    assert problems("--config", "--batch_size", "4") == ["--config needs the path of a YAML file"]


def test_config_override_without_its_path() -> None:
    assert problems("config=") == ["--config needs the path of a YAML file"]


def test_a_flag_does_not_swallow_an_override() -> None:
    assert problems("--output_dir", "data.batch_size=4") == ["--output_dir needs a value (text)"]


def test_aliases_must_name_fields() -> None:
    with pytest.raises(AssertionError, match=r"aliases of fields that do not exist: \['data.nope'\]"):
        Parser(ToyConfig, aliases={"old": "data.nope"})


@pytest.mark.parametrize(
    ("tokens", "warning"),
    [
        (["--local_rank", "-1"], "--local_rank has no effect: the launcher sets it"),
        (["--local_rank=-1"], "--local_rank has no effect: the launcher sets it"),
        (["--local-rank", "0"], "--local_rank has no effect: the launcher sets it"),
        (["local_rank=0"], "local_rank has no effect: the launcher sets it"),
        (["--push_to_hub"], "--push_to_hub has no effect: no uploads"),
        (["--legacy.prompts", "a cat", "a dog"], "--legacy.prompts has no effect: nothing reads them"),
        (["legacy.prompts=a cat"], "legacy.prompts has no effect: nothing reads them"),
    ],
)
def test_ignored_flags_warn_and_swallow_their_values(tokens: list[str], warning: str) -> None:
    for argv in (
        tokens,
        [*tokens, "--batch_size", "4"],
        ["data.batch_size=4", *tokens],
        [*tokens, "data.batch_size=4"],
    ):
        config, warnings = PARSER.parse(argv)
        assert warnings == [warning]
        assert config.data.batch_size == (4 if len(argv) > len(tokens) else 1)


def test_ignored_keys_of_a_file_warn(in_yaml) -> None:
    config, warnings = PARSER.parse([in_yaml("legacy: {prompts: [a, b]}\nlocal_rank: 0\nbatch_size: 2")])
    assert config.data.batch_size == 2
    assert sorted(warnings) == [
        "legacy.prompts has no effect: nothing reads them",
        "local_rank has no effect: the launcher sets it",
    ]


@pytest.mark.parametrize("nothing", ["null", "No", "false", "-1"])
def test_an_ignored_key_that_asks_for_nothing_does_not(in_yaml, nothing: str) -> None:
    assert PARSER.parse([in_yaml(f"local_rank: {nothing}")])[1] == []


def test_all_problems_come_at_once(in_yaml) -> None:
    found = problems(
        in_yaml("data: {batch_size: many, nope: 1}\nrun: {max_train_steps: 0}"),
        "stray",
        "--kind",
        "huge",
        "model.noise_offset=-1",
        "--width=513",
    )
    assert len(found) == 8
    assert found[0] == "'stray' is neither a --flag nor a key=value override"
    assert found[1].startswith("data.nope (/") and found[1].split("; ")[0].endswith(") is unknown")
    assert found[2:] == [
        "data.batch_size: expected integer, got 'many'",
        "run.max_train_steps: 0 is below the least value 1",
        "model.noise_offset: -1.0 is below the least value 0",
        "--kind: 'huge' is none of small, large",
        "--width: 513 is above the greatest value 512",
        "model: width 513 must be even",
    ]


def test_checks_between_sections() -> None:
    argv = ("--lr_warmup_steps", "20", "--max_train_steps", "10")
    assert problems(*argv) == ["optim.lr_warmup_steps is longer than the run"]
    assert problems("--width", "7") == ["model: width 7 must be even"]


# Values ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [("No", "no"), ("no", "no"), ("'no'", "no"), ("FP16", "fp16"), ("Bf16", "bf16"), ("fp32", "no"), ("null", None)],
)
def test_mixed_precision_in_yaml(in_yaml, text: str, value: str | None) -> None:
    assert parse(in_yaml(f"mixed_precision: {text}")).run.mixed_precision == value
    assert parse(in_yaml(f"run:\n  mixed_precision: {text}")).run.mixed_precision == value


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("mixed_precision: yes", "mixed_precision: True is none of no, fp32, fp16, bf16"),
        ("batch_size: null", "batch_size: expected integer, got null"),
        ("batch_size:", "batch_size: expected integer, got null"),
        ("batch_size: true", "batch_size: expected integer, got True"),
        ("batch_size: 1.5", "batch_size: expected an integer, got 1.5"),
        ("batch_size: [1]", "batch_size: expected integer, got [1]"),
        ("batch_size: .inf", "batch_size: expected an integer, got inf"),
        ("batch_size: .nan", "batch_size: expected an integer, got nan"),
        ("learning_rate: fast", "learning_rate: expected number, got 'fast'"),
        ("learning_rate: .nan", "learning_rate: nan is below the least value 0"),
        ("output_dir: off", "output_dir: expected text, got False; put it in quotes"),
        ("output_dir: [a]", "output_dir: expected text, got ['a']; put it in quotes"),
        ("use_ema: 2", "use_ema: expected true or false, got 2"),
        ("use_ema: null", "use_ema: expected true|false, got null"),
        ("crop: [1, 2, 3]", "crop: expected 2 values, got 3"),
        ("sizes_px: [1, a]", "sizes_px: expected integer, got 'a'"),
        ("sizes_px: [1, null]", "sizes_px: expected integer, got null"),
        ("data: {extras: 3}", "data.extras: expected a mapping such as {key: value}, got 3"),
    ],
)
def test_values_of_the_wrong_type(in_yaml, text: str, problem: str) -> None:
    assert problems(in_yaml(text)) == [problem]


@pytest.mark.parametrize(
    ("text", "field_", "value"),
    [
        ("learning_rate: 1e-4", "learning_rate", 1e-4),  # text to YAML 1.1
        ("learning_rate: '1e-4'", "learning_rate", 1e-4),
        ("learning_rate: 3", "learning_rate", 3.0),
        ("lr_warmup_steps: 1e3", "lr_warmup_steps", 1000),
        ("lr_warmup_steps: '7'", "lr_warmup_steps", 7),
        ("use_ema: on", "use_ema", True),
        ("use_ema: 'False'", "use_ema", False),
        ("use_ema: 1", "use_ema", True),
        ("lr_step_rules: 1:10,0.1", "lr_step_rules", "1:10,0.1"),
        ("lr_step_rules: ~", "lr_step_rules", None),
        ("lr_step_rules: 'None'", "lr_step_rules", None),
    ],
)
def test_values_of_a_file(in_yaml, text: str, field_: str, value: Any) -> None:
    found = getattr(parse(in_yaml(text)).optim, field_)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize("make", [lambda n: f"run: {{seed: {n}}}", lambda n: f"run: {{seed: '{n}'}}"])
def test_large_integers_are_exact(in_yaml, make: Callable[[int], str]) -> None:
    assert parse("--run.seed", str(2**53 + 1)).run.seed == 2**53 + 1
    assert parse(in_yaml(make(2**53 + 1))).run.seed == 2**53 + 1


@pytest.mark.parametrize(
    ("tokens", "value"),
    [
        (["--use_ema"], True),
        (["--use_ema", "False"], False),
        (["--use_ema=false"], False),
        (["--use_ema", "0"], False),
        (["--use_ema", "--batch_size", "2"], True),
        (["--use_ema", "data.batch_size=2"], True),
        (["optim.use_ema=yes"], True),
        (["use_ema=off"], False),
    ],
)
def test_booleans_on_the_command_line(tokens: list[str], value: bool) -> None:
    assert parse(*tokens).optim.use_ema is value


@pytest.mark.parametrize(
    ("tokens", "sizes_px"),
    [
        (["--sizes_px", "1", "2", "3"], (1, 2, 3)),
        (["--sizes_px", "1,2"], (1, 2)),
        (["--sizes_px", "[1, 2]"], (1, 2)),
        (["--sizes_px=4"], (4,)),
        (["--sizes_px="], ()),
        (["--sizes_px", "-1", "-2"], (-1, -2)),
        (["data.sizes_px=[]"], ()),
        (["data.sizes_px=1, 2"], (1, 2)),
        (["--sizes_px", "1", "data.batch_size=3"], (1,)),
        (["--sizes_px", "1", "--batch_size=3"], (1,)),
    ],
)
def test_lists_on_the_command_line(tokens: list[str], sizes_px: tuple[int, ...]) -> None:
    assert parse(*tokens).data.sizes_px == sizes_px


@pytest.mark.parametrize(
    ("tokens", "parts"),
    [
        (["--parts", "1", "2"], (1, 2)),
        (["--parts", "1,2", "--batch_size", "2"], (1, 2)),
        (["--parts", "null"], None),
        (["--parts", "3", "data.batch_size=2"], (3,)),
    ],
)
def test_lists_that_may_be_null(tokens: list[str], parts: tuple[int, ...] | None) -> None:
    assert parse(*tokens).data.parts == parts


def test_lists_of_text_may_hold_equals_signs() -> None:
    assert parse("--folders", "a=b", "c").data.folders == ("a=b", "c")
    assert parse("--folders", "a.b=c").data.folders == ("a.b=c",)


def test_a_list_does_not_swallow_a_mistaken_override() -> None:
    assert problems("--folders", "a", "data.batchsize=4") == [
        "data.batchsize (override) is unknown; did you mean data.batch_size or batch_size or train_batch_size?"
    ]


def test_fixed_tuples_and_mappings(in_yaml) -> None:
    assert parse("--crop", "4", "0.25").data.crop == (4, 0.25)
    assert problems("--crop", "4") == ["--crop: expected 2 values, got 1"]
    assert problems("--crop", "0.5", "4") == ["--crop: expected an integer, got '0.5'"]
    assert parse("data.extras={a: 1, b: [2]}").data.extras == {"a": 1, "b": [2]}
    assert parse(in_yaml("data: {extras: {a: {b: 1}}}")).data.extras == {"a": {"b": 1}}
    assert parse(in_yaml("extras: {batch_size: 1}")).data == ToyData(extras={"batch_size": 1})


@pytest.mark.parametrize(
    ("tokens", "problem"),
    [
        (["--noise_offset", "-1"], "--noise_offset: -1.0 is below the least value 0"),
        (["--noise_offset", "nan"], "--noise_offset: nan is below the least value 0"),
        (["--power", "0"], "--power: 0.0 must be above 0"),
        (["--width", "1024"], "--width: 1024 is above the greatest value 512"),
        (["--max_train_steps", "0"], "--max_train_steps: 0 is below the least value 1"),
        (["--sizes_px", "[1,"], "--sizes_px: while parsing a flow node"),
        (["--extras", "{a"], "--extras: while parsing a flow mapping"),
    ],
)
def test_limits_and_syntax(tokens: list[str], problem: str) -> None:
    (found,) = problems(*tokens)
    assert found.startswith(problem) and "\n" not in found


def test_a_limit_is_inside() -> None:
    config = parse("--noise_offset", "0", "--width", "512", "--max_train_steps", "1", "--max_bad_fraction", "1")
    assert (config.model.noise_offset, config.model.width, config.run.max_train_steps) == (0.0, 512, 1)


def test_choices_may_have_capitals() -> None:
    assert convert("wfvae", Literal["WFVAE", "CausalVAE"]) == "WFVAE"


def test_none_of_an_optional_field_and_of_a_text() -> None:
    assert parse("--name", "None", "--max_train_steps", "null").model.name is None
    assert parse("--report_to", "none").log.report_to == "none"


@pytest.mark.parametrize("text", ["1.10", "010", "1e3"])
def test_numbers_where_text_is_wanted(in_yaml, text: str) -> None:
    """Either the text as it was written, or a problem that asks for quotes; never another text in silence."""
    try:
        assert parse(in_yaml(f"model: {{name: {text}}}")).model.name == text
    except ConfigError as error:
        assert "quotes" in str(error)


# Settings that another one makes pointless ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokens", "warnings"),
    [
        (["--ema_decay", "0.9"], ["--ema_decay has no effect: use_ema is False"]),
        (["--ema_decay", "0.9", "--use_ema"], []),
        (["optim.ema_decay=0.9"], ["optim.ema_decay has no effect: use_ema is False"]),
        (
            ["--lr_warmup_steps", "5"],
            [
                "--lr_warmup_steps has no effect: lr_scheduler is constant, not linear or cosine or "
                "cosine_with_restarts or polynomial or constant_with_warmup"
            ],
        ),
        (["--lr_warmup_steps", "5", "--lr_scheduler", "linear"], []),
        (
            ["--lr_num_cycles", "2"],
            ["--lr_num_cycles has no effect: lr_scheduler is constant, not cosine_with_restarts"],
        ),
        (["--lr_power", "2", "--lr_scheduler", "polynomial"], []),
        (
            ["--num_train_epochs", "2", "--max_train_steps", "9"],
            ["--num_train_epochs has no effect: max_train_steps is 9, not null"],
        ),
        (["--num_train_epochs", "2"], []),
        (
            ["--validation_epochs", "2", "--validation_steps", "9"],
            ["--validation_epochs has no effect: validation_steps is 9, not null"],
        ),
    ],
)
def test_settings_without_effect_warn(tokens: list[str], warnings: list[str]) -> None:
    assert PARSER.parse(tokens)[1] == warnings
    assert PARSER.parse([*tokens, "--local_rank", "0"])[1] == [
        "--local_rank has no effect: the launcher sets it",
        *warnings,
    ]


def test_settings_without_effect_of_a_file_warn(in_yaml) -> None:
    token = in_yaml("optim: {use_ema: false, offload_ema: true}")
    assert PARSER.parse([token])[1] == ["optim.offload_ema has no effect: use_ema is False"]
    assert PARSER.parse([token, "--use_ema"])[1] == []


# Sections that extend others, and what follows from settings ----------------------------------------------------------


def test_another_default_keeps_help_limits_and_all_else() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Mine(RunConfig):
        max_train_steps: int | None = option(9)
        seed: int = option(5, "seed of everything")

    found, known = ({f.name: f for f in dataclasses.fields(c)} for c in (Mine, RunConfig))
    assert Mine().max_train_steps == 9 and found["max_train_steps"].metadata == known["max_train_steps"].metadata
    assert Mine().seed == 5 and found["seed"].metadata["help"] == "seed of everything"
    assert not found["seed"].metadata["state"] and list(found) == list(known)  # a field with a help text is a new one


def test_a_new_field_needs_a_help_text() -> None:
    with pytest.raises(AssertionError, match="Mine.colour needs a help text: no base section has the field"):

        class Mine(RunConfig):
            colour: str = option("red")


def filled(config: ToyConfig) -> ToyConfig:
    data = dataclasses.replace(config.data, folders=config.data.folders or (config.run.output_dir,))
    return dataclasses.replace(config, data=data)


def test_what_follows_from_other_settings(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    parser = Parser(ToyConfig, resolve=filled)
    assert parser.parse(["--output_dir", "here"])[0].data.folders == ("here",)
    assert parser.parse(["--folders", "there"])[0].data.folders == ("there",)
    monkeypatch.setattr(sys, "argv", ["toy.py", "--output_dir", "here"])
    assert parser.parse_or_exit()[0].data.folders == ("here",)
    with pytest.raises(SystemExit):
        parser.parse_or_exit(["--output_dir", "here", "--print_config"])
    assert yaml.safe_load(capsys.readouterr().out)["data"]["folders"] == []  # so that it may be combined with others


# Files ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["", "# nothing", "null", "run: {}"])
def test_empty_files_leave_the_defaults(in_yaml, text: str) -> None:
    assert parse(in_yaml(text)) == ToyConfig()


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[1, 2]", "must hold a mapping, it holds a list"),
        ("- seed: 1", "must hold a mapping, it holds a list"),
        ("5", "cannot be read: Invalid loaded object type: int"),
        ("a: [", "cannot be read: while parsing a flow node"),
        ("a: b: c", "cannot be read: mapping values are not allowed"),
        ("\tseed: 1", "cannot be read: while scanning for the next token"),
        (b"\xff\xfe\x00\x01", "cannot be read: 'utf-8' codec can't decode byte 0xff"),
        (b"\x00\x01\x02", "cannot be read: unacceptable character"),
        ("run: {output_dir: '${nowhere}'}", "cannot be read: Interpolation key 'nowhere' not found"),
        ("run: {output_dir: '${oc.env:TOY_UNSET}'}", "Environment variable 'TOY_UNSET' not found"),
        ("run: {output_dir: '${run.output_dir}'}", "cannot be read: Recursive interpolation detected"),
        ("run: {output_dir: '${'}", "cannot be read: "),
        ("run: {seed: !!timestamp 2024-01-01}", "cannot be read: Value 'date' is not a supported primitive type"),
    ],
)
def test_files_that_cannot_be_read(in_yaml, text: str | bytes, problem: str) -> None:
    token = in_yaml(text)
    (found,) = problems(token)
    assert found.startswith(f"the YAML file {token.removeprefix('--config=')} ") and problem in found
    assert "\n" not in found


def test_objects_of_a_file_are_not_made(in_yaml, tmp_path: Path) -> None:
    made = tmp_path / "made"
    for tag in (f"!!python/object/apply:os.mkdir [{made}]", f"!!python/object/new:os.mkdir [{made}]"):
        (problem,) = problems(in_yaml(f"run: {{output_dir: {tag}}}"))
        assert "could not determine a constructor for the tag" in problem
        (problem,) = problems("--folders", f"[{tag}]")
        assert "could not determine a constructor for the tag" in problem
    assert not made.exists()


@pytest.mark.parametrize(
    "text",
    [
        "0b_",  # ValueError
        "!!int abc",
        "!!bool abc",  # KeyError
        "!!timestamp abc",  # AttributeError
        "!!int ''",  # IndexError
        pytest.param("1" * 5000, id="ValueError: too many digits"),
        "!!python/object/apply:pathlib.Path [/tmp]",  # omegaconf makes paths: TypeError
    ],
)
def test_scalars_that_trip_pyyaml(in_yaml, text: str) -> None:
    assert len(problems(in_yaml(f"run: {{seed: {text}}}"))) == 1


def test_integers_beyond_all_floats(in_yaml) -> None:
    (problem,) = problems(in_yaml(f"learning_rate: 1{'0' * 400}"))
    assert problem.startswith("learning_rate: expected number, got 1000")
    assert parse(in_yaml(f"run: {{seed: 1{'0' * 400}}}")).run.seed == 10**400


@pytest.mark.parametrize("text", ["[!!bool x]", "[!!timestamp x]", pytest.param("[" * 5000, id="RecursionError")])
def test_lists_that_trip_pyyaml(text: str) -> None:
    assert len(problems("--sizes_px", text)) == 1


def test_files_that_are_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    repository = Path(__file__).parents[2]
    assert problems("--config", "gone.yaml") == [
        "the YAML file gone.yaml cannot be read: gone.yaml was not found; tried "
        f"{tmp_path / 'gone.yaml'}, {repository / 'gone.yaml'}"
    ]
    assert problems(f"--config={tmp_path}/gone.yaml") == [
        f"the YAML file {tmp_path}/gone.yaml cannot be read: {tmp_path}/gone.yaml was not found"
    ]
    (problem,) = problems("--config", str(tmp_path))
    assert problem.startswith(f"the YAML file {tmp_path} cannot be read: ") and "Is a directory" in problem


def test_where_files_are_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    repository = Path(__file__).parents[2]
    assert find_file("pyproject.toml") == repository / "pyproject.toml"
    (tmp_path / "pyproject.toml").touch()
    assert find_file("pyproject.toml") == tmp_path / "pyproject.toml"  # the working directory comes first
    assert find_file(str(repository / "pyproject.toml")) == repository / "pyproject.toml"
    (tmp_path / "folder").mkdir()
    assert find_file("folder") == tmp_path / "folder"


def test_every_place_that_was_tried_is_named_once(monkeypatch: pytest.MonkeyPatch) -> None:
    repository = Path(__file__).parents[2]
    monkeypatch.chdir(repository)
    with pytest.raises(FileNotFoundError) as caught:
        find_file("gone", "--input")
    assert str(caught.value) == f"gone was not found; tried {repository}/gone; set --input to where it is"
    with pytest.raises(FileNotFoundError) as caught:
        find_file("/nowhere/gone", "--input")
    assert str(caught.value) == "/nowhere/gone was not found; set --input to where it is"


# What comes out -------------------------------------------------------------------------------------------------------


def test_configurations_are_frozen() -> None:
    config = parse()
    for target, name in [(config, "run"), *((getattr(config, f.name), "x") for f in dataclasses.fields(config))]:
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(target, name, 1)


def test_secrets_are_not_shown() -> None:
    config = parse("--token", "hunter2")
    assert config.model.token == "hunter2"
    assert to_dict(config)["model"]["token"] == "***"
    assert "hunter2" not in to_yaml(config)
    assert to_dict(parse())["model"]["token"] is None
    saved = to_dict(config)
    assert changes(saved, parse("--token", "other")) == changes(saved, parse()) == []
    assert changes({"model": {"token": "plain"}}, config) == []


def test_secrets_are_not_shown_in_messages() -> None:
    assert "hunter2" not in repr(parse("--token", "hunter2"))
    (problem,) = problems("--token", "hunter2", "--model.hub_token", "hunter3")
    assert "both set model.token" in problem and "hunter" not in problem


def test_dictionaries_are_plain() -> None:
    tree = to_dict(parse("--extras", "{a: 1}", "--crop", "2", "1"))
    assert list(tree) == ["run", "data", "model", "optim", "checkpoint", "log", "validation"]
    assert tree["data"]["crop"] == [2, 1.0] and tree["data"]["extras"] == {"a": 1}
    assert yaml.safe_load(yaml.safe_dump(tree)) == tree


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["--mixed_precision", "no", "--report_to", "none", "--name", "true", "--learning_rate", "1e-8"],
        ["--sizes_px=", "--extras", "{a: {b: null}}", "--output_dir", "a: b # c", "--run.seed", "123456789"],
        ["--name", "1.10", "--folders", "1", "null", "--lr_step_rules", "1:10,0.1", "--adam_epsilon", "1e-08"],
        ["--crop", "1", "0.1", "--use_ema", "--max_train_steps", "3", "--output_dir", "ünï 雪"],
    ],
)
def test_a_printed_configuration_can_be_fed_back(in_yaml, capsys: pytest.CaptureFixture, argv: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        PARSER.parse_or_exit([*argv, "--print_config"])
    assert ended.value.code == 0
    assert parse(in_yaml(capsys.readouterr().out)) == parse(*argv)


@pytest.mark.parametrize(
    "text",
    [
        "${x}",
        "a${x}b${y}",
        "$x",
        "\\${x}",
    ],
)
def test_a_printed_dollar_can_be_fed_back(in_yaml, text: str) -> None:
    config = parse("--output_dir", text, "--folders", text)
    assert parse(in_yaml(to_yaml(config))) == config


def test_a_printed_configuration_fed_back_warns_of_nothing(in_yaml) -> None:
    assert PARSER.parse([in_yaml(to_yaml(parse()))])[1] == []


def test_problems_end_the_program(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as ended:
        PARSER.parse_or_exit(["--kind", "huge", "stray", "--print_config"])
    assert ended.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == (
        "toy.py: the configuration cannot be used:\n"
        "  - 'stray' is neither a --flag nor a key=value override\n"
        "  - --kind: 'huge' is none of small, large\n"
    )


def test_parse_or_exit_returns_warnings() -> None:
    config, warnings = PARSER.parse_or_exit(["--push_to_hub", "--batch_size", "4"])
    assert (config.data.batch_size, warnings) == (4, ["--push_to_hub has no effect: no uploads"])


@pytest.mark.parametrize("argv", [["--help"], ["-h"], ["--kind", "huge", "--help"]])
def test_help_names_everything(capsys: pytest.CaptureFixture, argv: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        PARSER.parse_or_exit(argv)
    assert ended.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("usage: toy.py [--config FILE.yaml]") and "A toy." in lines
    for section in dataclasses.fields(ToyConfig):
        assert f"{section.name}:" in lines
        for f in dataclasses.fields(section.default_factory):
            (index,) = [i for i, line in enumerate(lines) if line.split(",")[0].strip() == f"{section.name}.{f.name}"]
            assert lines[index + 1].endswith(f": {f.metadata['help']}")
            assert f"default {'null' if f.default is None else f.default}: " in lines[index + 1]
            assert (f"--{f.name}" in lines[index].split(", ")) == (f.name != "seed")
    for alias, path in ALIASES.items():
        (line,) = [line for line in lines if line.startswith(f"  {path},") or line == f"  {path}"]
        is_former_place = (
            alias.split(".")[0] in {section.name for section in dataclasses.fields(ToyConfig)} and "." in alias
        )
        assert (f"--{alias}" in line.split(", ")) != is_former_place
    for name, reason in IGNORED.items():
        assert f"  --{name}: {reason}" in lines
    assert "      fp16" not in lines and any("no|fp32|fp16|bf16 or null, default null" in line for line in lines)


def test_help_is_quick() -> None:
    """Nothing heavy is imported to read a configuration."""
    code = "import sys; import common.config; print(sorted({'torch', 'accelerate', 'diffusers'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "[]\n", done.stderr


# What changed ---------------------------------------------------------------------------------------------------------


def test_changes_between_a_checkpoint_and_now() -> None:
    saved = yaml.safe_load(to_yaml(parse("--width", "16", "--learning_rate", "1e-3", "--sizes_px", "1", "2")))
    found = changes(saved, parse("--width", "32", "--sizes_px", "1", "3"))
    assert [(c.path, c.old, c.new, c.breaks_state) for c in found] == [
        ("data.sizes_px", [1, 2], [1, 3], False),
        ("model.width", 16, 32, True),
        ("optim.learning_rate", 1e-3, 1e-4, False),
    ]
    assert str(found[1]) == "model.width: 16 in the checkpoint, 32 now"
    assert changes(saved, parse("--width", "16", "--learning_rate", "1e-3", "--sizes_px", "1", "2")) == []


def test_fields_that_one_side_lacks_are_no_change() -> None:
    assert changes({}, parse()) == []
    assert changes({"gone": {"x": 1}, "model": {"gone": 2, "width": 8}}, parse()) == []


# Whatever comes in ----------------------------------------------------------------------------------------------------

WORDS = st.one_of(
    st.sampled_from([s for name in PARSER.names for s in (f"--{name}", f"{name}=", f"--{name}=", name)]),
    st.sampled_from(
        ["--config", "--local_rank", "-1", "1", "1e-4", "true", "null", "[1, 2]", "{a: 1}", "--", "", "x=y"]
    ),
    st.text(max_size=8),
    st.builds("{}{}".format, st.sampled_from([f"--{name}=" for name in PARSER.names]), st.text(max_size=6)),
)
SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(-(10**20), 10**20), st.floats(), st.text(max_size=8), st.binary(max_size=4)
)
KEYS = st.one_of(
    st.sampled_from([*PARSER.names, *IGNORED, *(f.name for f in dataclasses.fields(ToyConfig))]),
    st.text(max_size=5),
    st.integers(-3, 3),
    st.none(),
)
TREES = st.dictionaries(
    KEYS, st.recursive(SCALARS, lambda t: st.lists(t, max_size=3) | st.dictionaries(KEYS, t, max_size=3)), max_size=4
)
ANY = settings(max_examples=200, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


def assert_parses_or_refuses(argv: list[str]) -> None:
    try:
        config, warnings = PARSER.parse(argv)
    except ConfigError as error:
        assert error.problems and all(isinstance(problem, str) and problem for problem in error.problems)
        return
    assert isinstance(config, ToyConfig) and isinstance(warnings, list)
    assert yaml.safe_load(to_yaml(config)).keys() == to_dict(config).keys()


@ANY
@given(st.lists(WORDS, max_size=6))
def test_any_tokens(tokens: list[str]) -> None:
    assert_parses_or_refuses(tokens)


@ANY
@given(tree=TREES)
def test_any_yaml_tree(tmp_path_factory: pytest.TempPathFactory, tree: dict) -> None:
    path = tmp_path_factory.getbasetemp() / "tree.yaml"
    path.write_text(yaml.safe_dump(tree, allow_unicode=True))
    assert_parses_or_refuses(["--config", str(path)])


@ANY
@given(st.lists(st.sampled_from("abcdz:{}[]&*!|>'\"%@`#-?,~ \n\t0123.eE_x=<$"), max_size=20).map("".join))
def test_any_yaml_text(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = tmp_path_factory.getbasetemp() / "text.yaml"
    path.write_text(f"run: {{seed: 1}}\n{text}")
    assert_parses_or_refuses(["--config", str(path)])


# Interpolations and mappings ------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Places:
    root: str = option("here", "a folder")
    parts: dict | None = option(None, "folders by name")


@dataclass(frozen=True, kw_only=True)
class PlacesConfig:
    places: Places = field(default_factory=Places)


def test_interpolations_see_the_overrides_and_keys_of_mappings_can_be_overridden(tmp_path: Path) -> None:
    path = tmp_path / "places.yaml"
    path.write_text("a:\n  root: there\n  parts: {one: '${a.root}/one', two: {three: 3, four: [4]}}\n")
    parser = Parser(PlacesConfig, aliases={"a.root": "places.root", "a.parts": "places.parts"})
    config, warnings = parser.parse([f"config={path}", "a.root=elsewhere", "a.parts.two.four=[5,6]"])
    assert warnings == [] and config.places.root == "elsewhere"
    assert config.places.parts == {"one": "elsewhere/one", "two": {"three": 3, "four": [5, 6]}}
    config, _ = parser.parse([f"config={path}"])
    assert config.places.parts == {"one": "there/one", "two": {"three": 3, "four": [4]}}
