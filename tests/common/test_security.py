"""Nothing that is read may run code, and no secret may leave the process."""

import ast
import json
import os
from collections.abc import Iterator
from pathlib import Path

import processes
import pytest
import torch
from processes import TINY, run

from common.checkpoint import problems_of, seal
from gaussian_refiner.config import PARSER

REPOSITORY = Path(__file__).parents[2]
FOLDERS = ("common", "scripts", "bench", "gaussian_refiner", "diffnext", "mvdiffusion", "training_ggi", "vae")
SOURCES = sorted(path for folder in FOLDERS for path in (REPOSITORY / folder).rglob("*.py"))
UNSAFE = {
    "eval",
    "exec",
    "compile",
    "__import__",
    "os.system",
    "os.popen",
    "pickle.load",
    "pickle.loads",
    "pickle.Unpickler",
    "marshal.loads",
    "shelve.open",
    "joblib.load",
    "dill.load",
    "yaml.load_all",
    "yaml.full_load",
    "yaml.unsafe_load",
    "yaml.unsafe_load_all",
}
SECRET = "hunter2-is-a-secret"


def unsafe_calls(source: str) -> Iterator[str]:
    """`line: what` of every call by which data could become code."""
    for call in (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)):
        name, given = ast.unparse(call.func), {word.arg: ast.unparse(word.value) for word in call.keywords}
        loader = given.get("Loader", ast.unparse(call.args[1]) if len(call.args) > 1 else "")
        unsafe = (
            name in UNSAFE
            or (name in ("torch.load", "torch.hub.load_state_dict_from_url") and given.get("weights_only") != "True")
            or (name in ("np.load", "numpy.load") and given.get("allow_pickle", "False") != "False")
            or (name == "yaml.load" and loader not in ("yaml.SafeLoader", "yaml.CSafeLoader", "SafeLoader"))
            or (given.get("shell", "False") != "False")
            or given.get("trust_remote_code", "False") != "False"
        )
        if unsafe:
            yield f"{call.lineno}: {ast.unparse(call)}"


@pytest.mark.parametrize(
    "line",
    [
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "pickle.load(file)",
        "yaml.load(text, Loader=yaml.Loader)",
        "yaml.load(text)",
        "np.load(path, allow_pickle=True)",
        "eval(text)",
        "subprocess.run(command, shell=True)",
        "load(name, trust_remote_code=True)",
    ],
)
def test_the_scan_finds(line: str) -> None:
    assert list(unsafe_calls(f"x = 1\n{line}")) == [f"2: {line}"]


@pytest.mark.parametrize(
    "line", ["torch.load(p, weights_only=True)", "yaml.safe_load(t)", "yaml.load(t, yaml.SafeLoader)", "model.eval()"]
)
def test_the_scan_passes(line: str) -> None:
    assert list(unsafe_calls(line)) == []


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_no_data_becomes_code(path: Path) -> None:
    source = path.read_text()
    assert list(unsafe_calls(source)) == []
    imported = {
        f"{node.module}.{name.name}"
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.ImportFrom)
        for name in node.names
    }
    assert not imported & (UNSAFE | {"torch.load", "yaml.load"})  # by such a name the scan would not see the call


def test_there_are_sources_to_scan() -> None:
    assert {"common/checkpoint.py", "gaussian_refiner/train.py", "scripts/demo.py"} <= {
        str(path.relative_to(REPOSITORY)) for path in SOURCES
    }


# Hostile checkpoints --------------------------------------------------------------------------------------------------


class Hostile:
    """Creates a file when it is unpickled."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.marker),)


FLAGS = ("--batch_size", "2", "--checkpointing_steps", "2", "--validate_at_start", "no")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with checkpoint-2."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    run(folder, *FLAGS, "--max_train_steps", "2")
    return folder


def poison(trained: Path, folder: Path, name: str) -> Path:
    """A copy of checkpoint-2 whose file `name` is a pickle with code, under a manifest that fits; and the marker."""
    marker, checkpoint = folder / "marker", folder / "run" / "checkpoint-2"
    for source in (path for path in (trained / "checkpoint-2").rglob("*") if path.is_file()):
        target = checkpoint / source.relative_to(trained / "checkpoint-2")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(source.read_bytes())
    assert (checkpoint / name).is_file()
    torch.save({"state": {}, "param_groups": [], "x": Hostile(marker)}, checkpoint / name)
    seal(checkpoint)
    assert problems_of(checkpoint) == []
    return marker


def test_the_poison_works(trained: Path, tmp_path: Path) -> None:
    marker = poison(trained, tmp_path, "optimizer.bin")
    torch.load(tmp_path / "run" / "checkpoint-2" / "optimizer.bin", weights_only=False)
    assert marker.exists()


def test_code_in_the_optimizer_is_refused(trained: Path, tmp_path: Path) -> None:
    marker = poison(trained, tmp_path, "optimizer.bin")
    output = run(
        tmp_path / "run", *FLAGS, "--max_train_steps", "4", "--resume_from_checkpoint", "checkpoint-2", status=1
    )
    assert not marker.exists()
    assert "weights_only" in output.lower() or "mkdir" in output
    assert not (tmp_path / "run" / "checkpoint-4").exists()


def test_code_in_the_generators_is_not_run(trained: Path, tmp_path: Path) -> None:
    marker = poison(trained, tmp_path, "random_states_0.pkl")
    run(tmp_path / "run", *FLAGS, "--max_train_steps", "4", "--resume_from_checkpoint", "checkpoint-2")
    assert not marker.exists()  # Accelerate does without them; every step is seeded anew


# Secrets --------------------------------------------------------------------------------------------------------------

WITH_SECRET = f"""
import sys
sys.path.insert(0, {str(TINY.parent)!r})
import tiny_trainer
from dataclasses import dataclass, field
from common import config, runtime

@dataclass(frozen=True, kw_only=True)
class Log(config.LogConfig):
    api_key: str | None = config.option(None, "key of the tracker", secret=True)

@dataclass(frozen=True, kw_only=True)
class Config(tiny_trainer.TinyConfig):
    log: Log = field(default_factory=Log)

resolved, warnings = config.Parser(Config, program="x").parse_or_exit(sys.argv[1:])
print(resolved, warnings)
with runtime.clear_errors():
    tiny_trainer.train(resolved)
"""


def assert_nowhere(secret: str, folder: Path, output: str) -> None:
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert files and secret not in output
    for path in files:
        assert secret.encode() not in path.read_bytes(), path


def test_a_secret_is_written_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program, folder = tmp_path / "with_secret.py", tmp_path / "run"
    program.write_text(WITH_SECRET)
    monkeypatch.setattr(processes, "TINY", program)
    flags = (*FLAGS, "--report_to", "tensorboard", "data.nan_samples=[5]", "--api_key")
    output = run(folder, *flags, SECRET, "--max_train_steps", "4")
    assert "api_key: '***'" in (folder / "config.yaml").read_text()
    state = json.loads((folder / "checkpoint-4" / "trainer_state.json").read_text())
    assert state["config"]["log"]["api_key"] == "***"
    assert (folder / "nonfinite" / "step-2" / "record.json").is_file()
    (events,) = (path for path in folder.rglob("events.out.tfevents*") if path.parent.name == "training")
    assert b"train/loss" in events.read_bytes()
    assert_nowhere(SECRET, folder, output)
    more = ("--max_train_steps", "6", "--resume_from_checkpoint", "latest")
    output = run(folder, *flags, f"{SECRET}-changed", *more)
    assert "changed since checkpoint-4: run.max_train_steps: 4 in the checkpoint, 6 now" in output
    assert_nowhere(SECRET, folder, output)


def test_a_token_that_is_ignored_is_not_repeated(capsys: pytest.CaptureFixture[str]) -> None:
    config, warnings = PARSER.parse_or_exit(["--pretrained_model_name_or_path", "x", "--hub_token", SECRET])
    assert any("hub_token" in warning for warning in warnings)
    assert SECRET not in f"{config} {warnings} {capsys.readouterr()}"
    with pytest.raises(SystemExit):
        PARSER.parse_or_exit(["--hub_tokn", SECRET])
    printed = capsys.readouterr()
    assert "did you mean" in printed.err and SECRET not in printed.out + printed.err
