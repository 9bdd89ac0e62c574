"""Errors as people see them, precision, seeds, signals and the shared folder."""

import json
import logging
import os
import random
import signal
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState

from common import runtime as subject
from common.checkpoint import CheckpointError
from common.config import RunConfig
from common.data import SamplePlan, collate
from common.optim import lr_factor
from common.runtime import (
    StopSignal,
    clear_errors,
    quiet_libraries,
    require_shared_folder,
    seconds_of,
    seed_model_randomness,
    start,
    stop_signal,
    versions,
    weight_dtype,
)

NO_GPU = pytest.mark.skipif(torch.accelerator.is_available(), reason="says what happens where there is no GPU")

ALONE: Any = SimpleNamespace(process_index=0, num_processes=1)  # a run of one process


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    """Environment, logging, signal handlers, TF32 and accelerate's state are what they were, for other tests."""
    environment, root = dict(os.environ), logging.getLogger()
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    handlers, level, signals = list(root.handlers), root.level, {number: signal.getsignal(number) for number in numbers}
    levels = {
        name: logging.getLogger(name).level for name in ("httpx", "httpcore", "PIL", "accelerate", "absl", "diffusers")
    }
    tf32 = (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32)
    for name in ("RANK", "WORLD_SIZE", "ACCELERATE_MIXED_PRECISION"):
        os.environ.pop(name, None)
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    os.environ.clear()
    os.environ.update(environment)
    root.handlers[:] = handlers
    root.setLevel(level)
    for name, value in levels.items():
        logging.getLogger(name).setLevel(value)
    for number, handler in signals.items():
        signal.signal(number, handler)
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = tf32


# Errors ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("action", "text"),
    [
        (lambda: SamplePlan(0, 0, 1), "the data set is empty: there is nothing to train on"),
        (lambda: lr_factor("sine", 0), "lr_scheduler 'sine' is unknown"),
    ],
)
def test_our_errors_are_one_line(action: Callable, text: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as ended, clear_errors():
        action()
    assert ended.value.code == 1
    assert capsys.readouterr() == ("", f"error: {text}\n")


@pytest.mark.parametrize("kind", [ValueError, FileNotFoundError, RuntimeError, CheckpointError, OSError])
def test_kinds_of_our_errors(kind: type[Exception], capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit), clear_errors():
        raise kind("what to change")  # this file belongs to the repository
    assert capsys.readouterr().err == "error: what to change\n"


def test_errors_of_one_of_many_processes_bear_its_rank(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit), clear_errors():
        raise ValueError("what to change")
    assert capsys.readouterr().err == "[rank 1] error: what to change\n"


def test_errors_where_the_rank_is_unknown(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit), clear_errors():
        raise ValueError("what to change")
    assert "error: what to change\n" in capsys.readouterr().err


@pytest.mark.parametrize(
    "kind", [KeyError, TypeError, AssertionError, KeyboardInterrupt, SystemExit, NotImplementedError]
)
def test_mistakes_of_the_program_keep_their_traceback(kind: type[BaseException], capsys: pytest.CaptureFixture) -> None:
    error = kind("mistake")
    with pytest.raises(kind) as raised, clear_errors():
        raise error
    assert raised.value is error and capsys.readouterr().err == ""


def test_errors_of_the_standard_library_keep_their_traceback(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(ValueError, match="Expecting property name") as raised, clear_errors():
        json.loads("{")
    assert "decoder.py" in str(raised.traceback[-1].path) and capsys.readouterr().err == ""


def test_errors_of_libraries_inside_the_repository_keep_their_traceback(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    site_packages = Path(torch.__file__).parents[1]
    monkeypatch.setattr(subject, "CODE", site_packages.parents[2])  # the usual place: .venv in the checkout
    with pytest.raises(ValueError, match="empty parameter list") as raised, clear_errors():
        torch.optim.AdamW([])
    assert Path(raised.traceback[-1].path).is_relative_to(site_packages) and capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "action",
    [
        lambda: collate([{"x": torch.zeros(2)}, {"x": torch.zeros(3)}]),  # torch.stack fails
        lambda: torch.zeros(2) + torch.zeros(3),
        lambda: int("many"),
        lambda: open("/nowhere/at all"),
    ],
)
def test_errors_that_nobody_raised_on_purpose_keep_their_traceback(
    action: Callable, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises((RuntimeError, ValueError, OSError)), clear_errors():
        action()
    assert capsys.readouterr().err == ""


def test_without_an_error_nothing_happens(capsys: pytest.CaptureFixture) -> None:
    with clear_errors():
        pass
    assert capsys.readouterr() == ("", "")


# The accelerator ------------------------------------------------------------------------------------------------------


@NO_GPU
@pytest.mark.parametrize(
    ("wanted", "launcher", "precision", "says_so"),
    [
        (None, None, "no", False),
        ("no", None, "no", False),
        ("fp16", None, "no", True),
        ("bf16", None, "bf16", False),
        (None, "fp16", "no", True),
        (None, "bf16", "bf16", False),  # null obeys the launcher
        (None, "no", "no", False),
        ("no", "fp16", "no", False),
        ("no", "bf16", "no", False),
        ("bf16", "fp16", "bf16", False),
        ("fp16", "bf16", "no", True),
    ],
)
def test_precision(
    wanted: Any,
    launcher: str | None,
    precision: str,
    says_so: bool,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if launcher:
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launcher)
    accelerator = start(RunConfig(mixed_precision=wanted), 1)
    assert accelerator.mixed_precision == precision
    assert accelerator.scaler is None
    assert weight_dtype(accelerator) == {"no": torch.float32, "bf16": torch.bfloat16}[precision]
    message = "mixed_precision fp16 needs a GPU and there is none: this run uses float32\n"
    assert (message in capsys.readouterr().err) == says_so


@NO_GPU
def test_only_one_process_speaks_of_the_precision(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    assert subject._precision("fp16") == "no"
    assert capsys.readouterr().err == ""


def test_weight_dtype() -> None:
    kinds = {"fp16": torch.float16, "bf16": torch.bfloat16, "no": torch.float32}
    for name, dtype in kinds.items():
        assert weight_dtype(SimpleNamespace(mixed_precision=name)) == dtype  # type: ignore[arg-type]


def test_the_accelerator_obeys_the_configuration() -> None:
    accelerator = start(RunConfig(process_group_timeout_s=77, allow_tf32=True), 6, find_unused_parameters=True)
    assert accelerator.gradient_accumulation_steps == 6
    assert not accelerator.gradient_state.sync_with_dataloader
    assert not accelerator.step_scheduler_with_optimizer
    assert accelerator.init_handler.timeout == timedelta(seconds=77)
    assert accelerator.ddp_handler.find_unused_parameters is True
    assert torch.backends.cuda.matmul.allow_tf32 and torch.backends.cudnn.allow_tf32


def test_tf32_is_left_alone() -> None:
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    start(RunConfig(), 1)
    assert not torch.backends.cuda.matmul.allow_tf32 and not torch.backends.cudnn.allow_tf32


def test_messages_go_to_stderr(capsys: pytest.CaptureFixture) -> None:
    start(RunConfig(), 1)
    for name, level in (("common.x", logging.INFO), ("httpx", logging.INFO), ("httpx", logging.WARNING)):
        logging.getLogger(name).log(level, "hello from %s", name)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert [line.split(" ", 1)[1] for line in captured.err.splitlines() if "hello" in line] == [
        "INFO hello from common.x",
        "WARNING hello from httpx",
    ]


@pytest.mark.parametrize(("is_main", "levels"), [(True, ["INFO", "WARNING"]), (False, ["WARNING"])])
def test_messages_of_many_processes_bear_their_rank(
    is_main: bool, levels: list[str], capsys: pytest.CaptureFixture
) -> None:
    subject._set_up_logging(
        SimpleNamespace(num_processes=2, process_index=0 if is_main else 1, is_main_process=is_main)  # type: ignore[arg-type]
    )
    for level in (logging.INFO, logging.WARNING):
        logging.getLogger("common.x").log(level, "hello")
    lines = [line.split(" ", 1)[1] for line in capsys.readouterr().err.splitlines()]
    assert lines == [f"[rank {0 if is_main else 1}] {level} hello" for level in levels]


def test_libraries_are_quiet() -> None:
    quiet_libraries()
    assert logging.getLogger("httpx").getEffectiveLevel() == logging.WARNING
    assert logging.getLogger("diffusers").getEffectiveLevel() == logging.ERROR


def test_versions() -> None:
    found = versions()
    assert list(found) == ["python", "torch", "accelerate", "diffusers", "transformers", "numpy"]
    assert found["numpy"] == np.__version__ and found["torch"].split("+")[0] == torch.__version__.split("+")[0]


# Seeds ----------------------------------------------------------------------------------------------------------------


def draws() -> tuple[float, float, float]:
    return torch.rand(()).item(), float(np.random.rand()), random.random()


def test_model_randomness_differs_between_samples() -> None:
    states = (torch.get_rng_state(), np.random.get_state(), random.getstate())
    keys = [(seed, sample) for seed in (0, 1) for sample in range(80)]
    found = {}
    for key in keys:
        seed_model_randomness(*key)
        found[key] = draws()
    for position in range(3):  # torch, numpy and Python each
        assert len({values[position] for values in found.values()}) == len(keys)
    seed_model_randomness(1, 23)
    assert draws() == found[1, 23]
    torch.set_rng_state(states[0])
    np.random.set_state(states[1])
    random.setstate(states[2])


# Signals --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_asks_for_an_end_and_a_second_one_ends(
    number: signal.Signals, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    stop = StopSignal(ALONE)
    assert stop.received == "" and not stop.is_wanted
    signal.raise_signal(number)
    assert stop.received == number.name
    message = f"{number.name}: saving, then stopping; once more stops at once\n"
    assert capsys.readouterr().err == message

    class Ended(BaseException):
        """What the operating system would do."""

    def kill(pid: int, sent: int) -> None:
        assert (pid, sent) == (os.getpid(), number) and signal.getsignal(number) is signal.SIG_DFL
        raise Ended

    monkeypatch.setattr(subject.os, "kill", kill)
    with pytest.raises(Ended):
        signal.raise_signal(number)


def test_a_second_signal_may_be_another_one(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[int] = []
    monkeypatch.setattr(subject.os, "kill", lambda pid, number: sent.append(number))
    StopSignal(ALONE)
    signal.raise_signal(signal.SIGUSR1)
    signal.raise_signal(signal.SIGTERM)
    assert sent == [signal.SIGTERM]


def test_the_time_of_a_run_may_be_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(subject, "time", SimpleNamespace(monotonic=lambda: now[0]))
    stop, unlimited = stop_signal(ALONE, RunConfig(max_train_time="1:30")), stop_signal(ALONE, RunConfig())
    now[0] = 190.0
    assert not stop.is_wanted
    now[0] = 190.1
    assert stop.is_wanted and stop.received == "max_train_time" and not unlimited.is_wanted
    assert stop.agreed(True) and not stop.agreed(False) and stop.gathered(2.5) == [2.5]


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90", 90),
        ("0.5", 0.5),
        ("1:30", 90),
        ("01:02:03", 3723),
        ("2-01:02:03", 2 * 86400 + 3723),
        ("1-00:00:00", 86400),
        ("0", 0),
    ],
)
def test_durations(text: str, seconds: float) -> None:
    assert seconds_of(text) == seconds


@pytest.mark.parametrize(
    "text",
    [
        "",
        "soon",
        "1:2:3:4",
        "-5",
        "1:-5",
        "a-00:00:01",
        "1-",
        "1h",
        "nan",
        "1-12",
        "1-12:30",
    ],
)
def test_durations_that_are_none(text: str) -> None:
    with pytest.raises(ValueError) as raised:
        seconds_of(text)
    assert str(raised.value) == f"{text!r} is no duration: write seconds, MM:SS, HH:MM:SS or D-HH:MM:SS"


@pytest.mark.parametrize(("count", "num_processes"), [(0, 1), (5, 1), (7, 3), (6, 3), (2, 4)])
def test_work_is_shared(count: int, num_processes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    parts, rounds = [], []
    monkeypatch.setattr(torch.distributed, "new_group", lambda backend, timeout: "group")
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda flags, operation, group: rounds.append(len(parts)))
    for rank in range(num_processes):
        stop = StopSignal(SimpleNamespace(process_index=rank, num_processes=num_processes))  # type: ignore[arg-type]
        parts.append(list(stop.share(count)))
    assert parts == [list(range(rank, count, num_processes)) for rank in range(num_processes)]
    if num_processes > 1:  # all take part in as many reductions, or they would wait for each other for ever
        assert {rounds.count(rank) for rank in range(num_processes)} == {-(-count // num_processes)}


def test_shared_work_stops_where_it_is(capsys: pytest.CaptureFixture) -> None:
    stop, done = StopSignal(ALONE), []
    with pytest.raises(SystemExit) as ended, clear_errors():
        for index in stop.share(10):
            done.append(index)
            if index == 3:
                signal.raise_signal(signal.SIGTERM)
    assert ended.value.code == 0 and done == [0, 1, 2, 3]
    assert capsys.readouterr().err.splitlines()[-1] == "stopped before the first step: SIGTERM"


# The shared folder ----------------------------------------------------------------------------------------------------


def test_the_output_folder_is_made(tmp_path: Path) -> None:
    accelerator = start(RunConfig(), 1)
    for _ in range(2):
        require_shared_folder(accelerator, tmp_path / "a" / "b")
    assert list((tmp_path / "a" / "b").iterdir()) == []


def test_all_processes_say_who_sees_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subject, "broadcast_object_list", lambda token: token)
    monkeypatch.setattr(subject, "gather_object", lambda seen: [True, True, *seen, False])
    other = SimpleNamespace(is_main_process=False, process_index=2, wait_for_everyone=lambda: None)
    with pytest.raises(OSError) as raised:
        require_shared_folder(other, tmp_path)  # type: ignore[arg-type]
    assert str(raised.value) == (
        f"processes 2, 3 do not see run.output_dir {tmp_path} of the main process: all nodes save into it, so it must "
        "be on a file system that they share"
    )


def test_the_marker_of_the_main_process_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def receive(token: list[str]) -> None:
        token[0] = "of the main process"
        (tmp_path / ".shared-of the main process").touch()

    monkeypatch.setattr(subject, "broadcast_object_list", receive)
    monkeypatch.setattr(subject, "gather_object", lambda seen: [True, *seen])
    other = SimpleNamespace(is_main_process=False, process_index=1, wait_for_everyone=lambda: None)
    require_shared_folder(other, tmp_path)  # type: ignore[arg-type]
