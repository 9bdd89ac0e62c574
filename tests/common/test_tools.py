"""What all tools share: devices, required settings, what is there already, shares, failures."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from common import runtime, tools
from common.config import ConfigError, Parser, Section, option


@dataclass(frozen=True, kw_only=True)
class Data(Section):
    input: str | None = option(None, "what is read")
    output_dir: str | None = option(None, "what is written")


@dataclass(frozen=True, kw_only=True)
class Config:
    data: Data = Data()
    run: tools.ToolConfig = tools.ToolConfig()


PARSER = Parser(Config, ignored={"old": "it is gone"}, program="tool.py")


@dataclass
class Process:
    """One of several."""

    process_index: int = 0
    num_processes: int = 1
    waits: int = 0

    @property
    def is_main_process(self) -> bool:
        return self.process_index == 0

    def wait_for_everyone(self) -> None:
        self.waits += 1


# Start and end --------------------------------------------------------------------------------------------------------


@pytest.fixture
def on_cpu(clean_process: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


@pytest.mark.parametrize(("asked", "dtype"), [(None, "float32"), ("fp32", "float32"), ("bf16", "bfloat16")])
def test_a_tool_starts(on_cpu: None, asked: str | None, dtype: str, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--device", "cpu", "--old", *(["--mixed_precision", asked] if asked else [])]
    with tools.started(PARSER, flags, default_half="fp16") as (config, accelerator, found):
        assert config.run.device == accelerator.device.type == "cpu"
        assert str(found) == f"torch.{dtype}"
    assert "WARNING --old has no effect: it is gone" in capsys.readouterr().err


def test_the_launcher_chooses_the_type(on_cpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert runtime.start_tool("cpu", None)[1] == torch.bfloat16
    assert runtime.start_tool("cpu", "no")[1] == torch.float32


def test_fp16_without_a_gpu_is_float32_and_that_is_said(on_cpu: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert runtime.start_tool("cpu", "fp16")[1] == torch.float32
    assert "mixed_precision fp16 needs a GPU and there is none: this run uses float32" in capsys.readouterr().err


def test_errors_end_a_tool_with_one_sentence(on_cpu: None, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped, tools.started(PARSER, ["--device", "cpu"]):
        raise ValueError("no such thing")
    assert stopped.value.code == 1 and capsys.readouterr().err.endswith("error: no such thing\n")
    with pytest.raises(SystemExit) as stopped:
        tools.exit_if({"a": "it is broken"})
    assert stopped.value.code == 1
    tools.exit_if({})


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    for device in ("auto", "cpu", "CUDA", "cuda:1", None):
        tools.DeviceConfig(device=device)
    with pytest.raises(ConfigError, match="run: device 'gpu' is unknown: use auto, cpu, cuda or cuda:N"):
        PARSER.parse(["--device", "gpu"])
    chosen: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    for device in ("cuda", "auto", None, "cuda:1"):
        runtime.choose_device(device)
    assert chosen == [1]
    with pytest.raises(ValueError, match="--device cuda:2: PyTorch sees 2 CUDA GPUs; use --device auto"):
        runtime.choose_device("cuda:2")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="cuda:1 is one GPU, but several processes were started: use --device cuda, "):
        runtime.choose_device("cuda:1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="--device cuda: PyTorch sees no CUDA GPU here; use --device auto or cpu"):
        runtime.choose_device("cuda")


def test_required_settings_are_named() -> None:
    settings = {"data.input": "a picture", "data.output_dir": "a folder"}
    assert tools.required(Config(data=Data(input="a")), settings) == ["--output_dir is required: a folder"]


# Inputs and outputs ---------------------------------------------------------------------------------------------------


def test_images_of_a_folder(tmp_path: Path) -> None:
    for name in ("b.PNG", "a.jpg", ".c.png", "notes.txt"):
        (tmp_path / name).touch()
    assert tools.list_images(tmp_path, "--input") == [tmp_path / "a.jpg", tmp_path / "b.PNG"]
    assert tools.list_images(tmp_path / "notes.txt", "--input") == [tmp_path / "notes.txt"]
    with pytest.raises(ValueError, match=f"^--gt {tmp_path} holds no images: files ending in .tif are looked for$"):
        tools.list_images(tmp_path, "--gt", (".tif",))


def test_outputs_that_would_collide(tmp_path: Path) -> None:
    inputs = [Path("a.png"), Path("a.jpg"), Path("b.png")]
    tools.require_distinct(inputs, [Path("x"), Path("y"), Path("z")])
    with pytest.raises(ValueError, match="^a.png and a.jpg would both be written to x: rename one$"):
        tools.require_distinct(inputs, [Path("x"), Path("x"), Path("z")])
    (tmp_path / "file").touch()
    assert tools.output_folder(str(tmp_path / "new")) == tmp_path / "new"
    with pytest.raises(ValueError, match="^--output_dir .*file is a file, but must be a folder$"):
        tools.output_folder(str(tmp_path / "file"))


# What is there already ------------------------------------------------------------------------------------------------


def test_records_say_how_a_result_was_made(tmp_path: Path) -> None:
    record, recipe = tmp_path / "new" / "a.json", {"prompt": "Fuchs, rot: ü", "views": ("x",), "settings": {"steps": 2}}
    assert not tools.is_made(record, recipe)
    tools.write_json(record, recipe | {"more": 1})
    assert tools.is_made(record, recipe)
    assert "ü" in record.read_text("utf-8") and [path.name for path in record.parent.iterdir()] == ["a.json"]
    changed = recipe | {"prompt": "", "settings": {"steps": 3, "eta": 0}}
    expected = f"^{record} was made with another prompt, steps, eta: give another --output_dir, or --overwrite true$"
    with pytest.raises(ValueError, match=expected):
        tools.is_made(record, changed)
    with pytest.raises(ValueError, match="was made with another en: give"):
        tools.is_made(record, {"prompt": {"en": "fox"}})
    record.write_text("{")
    with pytest.raises(ValueError, match="a.json is no valid JSON"):
        tools.is_made(record, recipe)


def test_names_that_are_no_text_are_written_all_the_same(tmp_path: Path) -> None:
    name = os.fsdecode(b"a\xff.png")
    tools.write_json(tmp_path / "a.json", {"input": name})
    assert json.loads((tmp_path / "a.json").read_text("utf-8")) == {"input": name}
    assert tools.is_made(tmp_path / "a.json", {"input": name})


def test_a_file_appears_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tools.write_text(tmp_path / "a", "old")

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        tools.write_text(tmp_path / "a", "new")
    assert (tmp_path / "a").read_text() == "old"


# The work -------------------------------------------------------------------------------------------------------------


def test_jobs_are_split_over_processes_and_batches() -> None:
    shares = [tools.share_of(range(7), Process(n, 3)) for n in range(3)]
    assert [list(share) for share in shares] == [[0, 3, 6], [1, 4], [2, 5]]
    assert tools.in_batches([0, 1, 2, 3, 4], 2) == [[0, 1], [2, 3], [4]] and tools.in_batches([], 2) == []


def test_what_is_kept_is_said_once(capsys: pytest.CaptureFixture[str]) -> None:
    main, other = Process(0, 2), Process(1, 2)
    for process in (main, other):
        tools.say_kept(2, 3, "view", process)
        tools.say_kept(1, 4, "shard", process, has_overwrite=False)
        tools.say_kept(0, 3, "view", process)
    assert capsys.readouterr().out.splitlines() == [
        "2 of 3 views exist and are kept; --overwrite true makes them again",
        "1 of 4 shards exist and are kept",
    ]
    assert main.waits == other.waits == 3


def test_one_failure_does_not_take_others_with_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made: list[str] = []

    def make(jobs: Sequence[str]) -> None:
        if "bad" in jobs:
            raise ValueError("bad: it cannot be read")
        made.extend(jobs)

    process = Process()
    failures = tools.attempt_all([["a", "bad", "b"], ["c"]], make, "view", process)
    assert failures == {"bad": "it cannot be read"} and made == ["a", "b", "c"]
    assert "not made: bad: it cannot be read\n" in capsys.readouterr().err
    (tmp_path / "a").touch()
    tools.conclude([tmp_path / "a", tmp_path / "bad"], "out", failures, "view", process)
    printed = capsys.readouterr()
    assert printed.err == "1 views went wrong:\n  bad: it cannot be read\n"
    assert printed.out == "1 of 2 views are there: out\n" and process.waits == 1


def test_mistakes_of_the_program_are_no_failures_of_a_job() -> None:
    def make(jobs: Sequence[str]) -> None:
        raise KeyError(jobs[0])

    with pytest.raises(KeyError):
        tools.attempt(["a", "b"], make)
