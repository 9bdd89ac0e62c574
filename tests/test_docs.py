"""The documents hold: commands parse as they stand, files, links and tests that are named exist, `--help` names all."""

import re
import runpy
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser

from common.config import ConfigError, Parser
from diffnext import build_cache as diffnext_build_cache
from diffnext import config as diffnext_config
from diffnext import infer as diffnext_infer
from gaussian_refiner import config as refiner_config
from gaussian_refiner import infer as refiner_infer
from mvdiffusion import config as mv_config
from mvdiffusion import infer as mv_infer
from training_ggi import config as ggi_config
from training_ggi import export as ggi_export
from training_ggi import infer as ggi_infer
from vae import config as vae_config
from vae import evaluate as vae_evaluate
from vae import infer as vae_infer
from vae import reconstruct as vae_reconstruct

ROOT = Path(__file__).parents[1]
# Every documented entry script, and what reads its flags.
PARSERS: dict[str, Parser] = {
    "vae/train_ddp.py": vae_config.PARSER,
    "vae/reconstruct.py": vae_reconstruct.PARSER,
    "vae/evaluate.py": vae_evaluate.PARSER,
    "vae/infer.py": vae_infer.PARSER,
    "gaussian_refiner/train_repair_cross_attn_version.py": refiner_config.PARSER,
    "gaussian_refiner/infer.py": refiner_infer.PARSER,
    "scripts/train.py": diffnext_config.PARSER,
    "diffnext/build_cache.py": diffnext_build_cache.PARSER,
    "diffnext/infer.py": diffnext_infer.PARSER,
    "mvdiffusion/train_image_variation.py": mv_config.PARSER,
    "mvdiffusion/infer.py": mv_infer.PARSER,
    "training_ggi/exps/T073-000.py": ggi_config.PARSER,
    "training_ggi/prepare.py": ggi_config.PARSER,
    "training_ggi/infer.py": ggi_infer.PARSER,
    "training_ggi/export.py": ggi_export.PARSER,
}
FROM_THE_ROOT = "Commands are run from the repository root"  # of a guide that lies elsewhere
GUIDES = sorted(
    path
    for path in [*ROOT.glob("*.md"), *ROOT.glob("*/README.md")]
    if not path.relative_to(ROOT).parts[0].startswith(".")
)
ACCELERATE_CONFIGS = sorted((ROOT / "accelerate_configs").rglob("*.yaml"))


@dataclass(frozen=True)
class Documented:
    """A command of a guide, and the folder in which it is meant to be typed."""

    guide: Path
    folder: Path
    words: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.guide.relative_to(ROOT)}: {' '.join(self.words)[:60]}"


def commands_of(guide: Path) -> list[Documented]:
    """Every command of the fenced bash blocks of a guide; `cd` holds within its block."""
    found, text = [], guide.read_text(encoding="utf-8")
    for block in re.findall(r"^```(?:bash|sh)\n(.*?)^```", text, re.M | re.S):
        folder = ROOT if FROM_THE_ROOT in text else guide.parent
        block = re.sub(r"\$\{NUM_GPU\}", "2", block)
        for line in block.replace("\\\n", " ").splitlines():
            for command in line.split("&&"):
                words = shlex.split(command, comments=True)
                while words and re.match(r"[A-Z_]+=", words[0]):  # variables of the environment
                    words = words[1:]
                if words[:1] == ["cd"]:
                    folder = folder / words[1]
                elif words:
                    found.append(Documented(guide, folder, tuple(words)))
    return found


COMMANDS = [command for guide in GUIDES for command in commands_of(guide)]


def problems_of(command: Documented) -> list[str]:
    """What is wrong with a documented command, without running it."""
    if not command.folder.is_dir():
        return [f"the folder {command.folder} does not exist"]
    program, *rest = command.words
    checks: dict[str, Callable[[Documented, list[str]], list[str]]] = {
        "accelerate": _problems_of_launch,
        "python": _problems_of_python,
        "bash": _problems_of_script,
        "pip": _problems_of_pip,
    }
    if program not in checks:
        return [f"{program} is no command that this test understands: teach it, or leave the command out"]
    return checks[program](command, rest)


def _problems_of_launch(command: Documented, rest: list[str]) -> list[str]:
    if rest[0] != "launch":
        return [f"accelerate {rest[0]} is not `accelerate launch`"]
    try:
        launched = launch_command_parser().parse_args(rest[1:])
    except SystemExit:
        return ["accelerate launch does not take these flags"]
    missing = []
    if launched.config_file and not (command.folder / launched.config_file).is_file():
        missing = [f"{launched.config_file} does not exist in {command.folder}"]
    module = ["-m"] if launched.module else []
    return missing + _problems_of_python(command, [*module, launched.training_script, *launched.training_script_args])


def _problems_of_python(command: Documented, rest: list[str]) -> list[str]:
    if rest[0] == "-m":
        rest = rest[1:]
        script = ROOT / f"{rest[0].replace('.', '/')}.py"
    else:
        script = (command.folder / rest[0]).resolve()
    if not script.is_file():
        return [f"{script} does not exist"]
    parser = PARSERS.get(script.relative_to(ROOT).as_posix())
    return _problems_of_flags(parser, rest[1:]) if parser else []


def _problems_of_flags(parser: Parser, flags: list[str]) -> list[str]:
    try:
        _, warnings = parser.parse([flag for flag in flags if flag not in ("--help", "--print_config")])
    except ConfigError as error:
        return error.problems
    return warnings  # a guide has no business showing settings without effect


def _problems_of_script(command: Documented, rest: list[str]) -> list[str]:
    return [] if (command.folder / rest[0]).is_file() else [f"{rest[0]} does not exist in {command.folder}"]


def _problems_of_pip(command: Documented, rest: list[str]) -> list[str]:
    """`pip install -e .`, with extras that pyproject.toml has."""
    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    named = re.fullmatch(r"\.(?:\[([\w,]+)\])?", rest[-1])
    if rest[:-1] != ["install", "-e"] or not named:
        return [f"pip {' '.join(rest)} is not `pip install -e .` with or without extras"]
    return [f"there is no extra {name}" for name in (named[1] or "").split(",") if name and name not in known]


# Commands -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS, ids=str)
def test_documented_commands_parse(command: Documented, monkeypatch: pytest.MonkeyPatch) -> None:
    if command.folder.is_dir():
        monkeypatch.chdir(command.folder)
    assert problems_of(command) == []


def test_the_commands_that_users_know_are_documented() -> None:
    shown = [" ".join(command.words) for command in COMMANDS if command.guide.parent.name == "gaussian_refiner"]
    script = "train_repair_cross_attn_version.py --pretrained_model_name_or_path"
    hub_id = "stabilityai/stable-diffusion-2-1-unclip"
    assert (
        f"accelerate launch --num_processes 1 --mixed_precision fp16 {script} {hub_id} --output_dir outputs/run_single "
        "--train_batch_size 1 --gradient_accumulation_steps 20 --num_train_epochs 1 --validation_epochs 1"
    ) in shown
    assert (
        f"accelerate launch --multi_gpu --num_processes 4 --mixed_precision fp16 {script} {hub_id} "
        "--output_dir outputs/run_multi --train_batch_size 1 --gradient_accumulation_steps 10"
    ) in shown
    nova = [" ".join(command.words) for command in COMMANDS if command.guide.parent.name == "diffnext"]
    for gpus, name, dataset in ((1, "sdxl1024", "img_dataset"), (8, "osp480", "vid_dataset")):
        assert (
            f"accelerate launch --config_file accelerate_configs/{gpus}_gpus_zero2.yaml scripts/train.py "
            f"config=./configs/nova_d48w1024_{name}.yaml pipeline.paths.pretrained_path=/path/to/nova-d48w1024-{name} "
            f"experiment.output_dir=./experiments/nova_d48w1024_{name} "
            f"train_dataloader.params.dataset=./{dataset} model.gradient_checkpointing=3 training.batch_size=1"
        ) in nova
    readme = [" ".join(command.words) for command in COMMANDS if command.guide == ROOT / "README.md"]
    assert "bash scripts/test.sh" in readme and "bash scripts/demo.sh" in readme


@pytest.mark.parametrize(
    ("block", "problem"),
    [
        ("accelerate launch --num_process 1 train_repair_cross_attn_version.py", "does not take these flags"),
        ("accelerate launch train_repair.py --seed 1", "train_repair.py does not exist"),
        ("accelerate launch --config_file none.yaml infer.py --help", "none.yaml does not exist"),
        (
            "accelerate launch train_repair_cross_attn_version.py \\\n  --train_batchsize 1",
            "did you mean train_batch_size",
        ),
        ("python infer.py --input a --output_dir b", "--model is required"),
        ("python -m gaussian_refiner.infers --input a", "infers.py does not exist"),
        ("cd nowhere && python infer.py", "nowhere does not exist"),
        ("bash scripts/nothing.sh", "scripts/nothing.sh does not exist"),
        ("pip install -e '.[nothing]'", "there is no extra nothing"),
        ("conda install x", "conda is no command"),
    ],
)
def test_commands_that_would_fail_are_found(tmp_path: Path, block: str, problem: str) -> None:
    guide = tmp_path / "README.md"
    guide.write_text(f"text\n\n```bash\n{block}\n```\n")
    (command,) = commands_of(guide)
    moved = Documented(guide, ROOT / "gaussian_refiner" / command.folder.relative_to(tmp_path), command.words)
    assert problem in "; ".join(problems_of(moved))


# Files, links, tests and flags that are named -------------------------------------------------------------------------


@pytest.mark.parametrize("guide", GUIDES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(guide: Path) -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", guide.read_text(encoding="utf-8"))
    local = [link.split("#")[0] for link in links if not link.startswith(("http://", "https://", "#"))]
    assert [link for link in local if not (guide.parent / link).exists()] == []


def missing_tests(text: str) -> list[str]:
    """Test files and functions (`test_x.py::test_y`) that a text names and that do not exist."""
    missing = []
    for path, _, function in re.findall(r"((?:tests/)?[\w/]*test_\w+\.py)(::(\w+))?", text):
        files = [ROOT / path] if path.startswith("tests/") else list((ROOT / "tests").rglob(path))
        found = [file.read_text() for file in files if file.is_file()]
        if not any(not function or f"def {function}(" in source for source in found):
            missing.append(f"{path}::{function}" if function else path)
    return missing


@pytest.mark.parametrize("guide", GUIDES, ids=lambda path: str(path.relative_to(ROOT)))
def test_tests_that_are_named_exist(guide: Path) -> None:
    assert missing_tests(guide.read_text(encoding="utf-8")) == []


def test_missing_tests_are_found() -> None:
    text = (
        "`tests/test_docs.py::test_missing_tests_are_found`, `test_docs.py::test_nothing`, `tests/common/test_docs.py`"
    )
    assert missing_tests(text) == ["test_docs.py::test_nothing", "tests/common/test_docs.py"]


@pytest.mark.parametrize("guide", GUIDES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_that_are_named_exist(guide: Path) -> None:
    """Paths in backticks that start with a folder of ours."""
    tops = "|".join(path.name for path in ROOT.iterdir() if path.is_dir() and not path.name.startswith((".", "runs")))
    paths = re.findall(rf"`((?:{tops})/[\w./-]+)", guide.read_text(encoding="utf-8"))
    assert [path for path in paths if not (ROOT / path).exists()] == []


def flags_of(parser: Parser) -> set[str]:
    return {*parser.names, *parser.ignored, "help", "print_config", *parser.yaml_flags}


@pytest.mark.parametrize("guide", GUIDES, ids=lambda path: str(path.relative_to(ROOT)))
def test_flags_in_the_text_exist(guide: Path) -> None:
    text = re.sub(r"^```.*?^```", "", guide.read_text(encoding="utf-8"), flags=re.M | re.S)
    named = set(re.findall(r"`(?:[^`\n]* )?--([a-z]\w+)", text))
    launcher = {option.lstrip("-") for action in launch_command_parser()._actions for option in action.option_strings}
    known = launcher.union(*(flags_of(parser) for parser in PARSERS.values()))
    known |= {"check", "device", "size", "only", "vgg_weights", "turns", "repeats", "threads"}  # of ruff, and of bench/
    assert sorted(named - known) == []


# Help and launcher files ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("entry", PARSERS)
def test_help_names_every_field(
    entry: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [entry, "--help"])
    monkeypatch.setattr(sys, "path", [str((ROOT / entry).parent), *sys.path])  # as of a script
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / entry), run_name="__main__")
    assert ended.value.code == 0
    done, parser = capsys.readouterr(), PARSERS[entry]
    for knob in parser.knobs.values():
        assert f"  {', '.join([knob.path, *(f'--{name}' for name in parser.shown_spellings(knob))])}\n" in done.out
        assert knob.metadata["help"] in done.out
    for flag, reason in parser.ignored.items():
        assert f"--{flag}: {reason}" in done.out


@pytest.mark.parametrize("path", ACCELERATE_CONFIGS, ids=lambda path: path.name)
def test_launcher_files_are_read(path: Path) -> None:
    config = load_config_from_file(str(path))  # it refuses unknown keys
    written = yaml.safe_load(path.read_text())
    assert config.num_processes == written["num_processes"] and config.distributed_type == written["distributed_type"]


def test_the_file_for_two_cpu_processes_starts_two(tmp_path: Path) -> None:
    script = tmp_path / "say_rank.py"
    script.write_text(
        "from accelerate import Accelerator\n"
        "a = Accelerator(cpu=True)\n"
        "open(f'rank-{a.process_index}', 'w').write(f'{a.num_processes} {a.device.type}')\n"
        "a.end_training()\n"
    )
    config = str(ROOT / "accelerate_configs" / "cpu_2_processes.yaml")
    command = [str(Path(sys.executable).with_name("accelerate")), "launch", "--config_file", config, str(script)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert done.returncode == 0, done.stderr
    assert {path.name: path.read_text() for path in tmp_path.glob("rank-*")} == {"rank-0": "2 cpu", "rank-1": "2 cpu"}
