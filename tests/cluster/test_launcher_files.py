"""Each launcher file is accepted by the installed `accelerate launch`, headed by its command, and used."""

import os
import re
import shlex
from pathlib import Path

import pytest
from accelerate.commands import launch
from running import ROOT

FOLDER = ROOT / "accelerate_configs"
FILES = sorted(FOLDER.rglob("*.yaml"))
# How many processes on how many machines, by which of accelerate's launchers, in which precision ("" is not said).
EXPECTED = {
    "1_gpus_zero2.yaml": (1, 1, "deepspeed_launcher", ""),
    "4_gpus_fp16.yaml": (4, 1, "multi_gpu_launcher", "fp16"),
    "8_gpus_zero2.yaml": (8, 1, "deepspeed_launcher", ""),
    "cpu_2_processes.yaml": (2, 1, "multi_gpu_launcher", "no"),
    "ddp.yaml": (8, 1, "multi_gpu_launcher", "bf16"),
    "fsdp2.yaml": (8, 1, "multi_gpu_launcher", "bf16"),
    "multi_node.yaml": (16, 2, "multi_gpu_launcher", "bf16"),
    "multi_nodes/8_gpus_node_0.yaml": (16, 2, "deepspeed_launcher", ""),
    "multi_nodes/8_gpus_node_1.yaml": (16, 2, "deepspeed_launcher", ""),
}


def commands_of(path: Path) -> list[list[str]]:
    """The commands in a file's head, without the dots for a trainer's own settings."""
    lines = re.findall(r"^#   accelerate launch (.*) \.\.\.$", path.read_text(), re.M)
    return [shlex.split(line) for line in lines]


def launched(words: list[str], monkeypatch: pytest.MonkeyPatch) -> tuple[str, object]:
    """Which launcher `accelerate launch` would start, with what."""
    seen = []
    for name in ("simple_launcher", "multi_gpu_launcher", "deepspeed_launcher"):
        monkeypatch.setattr(launch, name, lambda arguments, name=name: seen.append((name, arguments)))
    monkeypatch.setattr(launch, "is_deepspeed_available", lambda: True)
    launch.launch_command(launch.launch_command_parser().parse_args(words))
    (found,) = seen
    return found


def test_every_file_is_listed_here() -> None:
    assert {path.relative_to(FOLDER).as_posix() for path in FILES} == set(EXPECTED)


@pytest.mark.parametrize("name", EXPECTED)
def test_it_starts_what_it_says(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    processes, machines, launcher, precision = EXPECTED[name]
    monkeypatch.setattr(os, "environ", dict(os.environ))  # the launcher sets some
    found, arguments = launched(["--config_file", str(FOLDER / name), "script.py"], monkeypatch)
    assert (arguments.num_processes, arguments.num_machines, found) == (processes, machines, launcher)
    assert not precision or arguments.mixed_precision == precision


@pytest.mark.parametrize("name", EXPECTED)
def test_its_head_shows_commands_that_are_accepted(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    commands = commands_of(FOLDER / name)
    assert commands
    for words in commands:
        _, arguments = launched(words, monkeypatch)
        assert arguments.config_file == f"accelerate_configs/{name}"
        named = [arguments.training_script, *arguments.training_script_args]
        assert all(Path(word.removeprefix("config=")).is_file() for word in named)


@pytest.mark.parametrize("name", EXPECTED)
def test_it_is_used_by_a_guide_or_a_script(name: str) -> None:
    texts = [*ROOT.glob("*.md"), *ROOT.glob("*/README.md"), *ROOT.glob("*/examples/*.sh"), *ROOT.glob("scripts/*.sh")]
    last = name.rpartition("/")[2]
    assert any(last in path.read_text() for path in texts)
