"""metrics.jsonl as it is read by others, and trackers that may fail without ending a run."""

import json
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from accelerate import Accelerator
from accelerate import tracking as accelerate_tracking
from accelerate.state import AcceleratorState
from PIL import Image

from common import log as subject
from common.config import LogConfig, OptimConfig, RunConfig
from common.log import RunLog

CONFIG = {
    "run": {"seed": 1, "max_train_steps": None, "allow_changed": []},
    "optim": {"learning_rate": 0.5, "use_ema": True},
}


@pytest.fixture(autouse=True)
def processes() -> Iterator[None]:
    """accelerate's trackers ask for the rank; it leaves no state for other tests."""
    environment = dict(os.environ)
    AcceleratorState._reset_state(reset_partial_state=True)
    Accelerator(cpu=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    os.environ.clear()
    os.environ.update(environment)


def run_log(folder: Path, report_to: str = "none", is_main: bool = True, **settings: Any) -> RunLog:
    folder.mkdir(exist_ok=True)
    arguments = settings.pop("tracker_arguments", None)
    return RunLog(
        folder, LogConfig(report_to=report_to, **settings), CONFIG, is_main=is_main, tracker_arguments=arguments
    )


def lines(folder: Path) -> list[str]:
    return (folder / "metrics.jsonl").read_text().splitlines()


# metrics.jsonl --------------------------------------------------------------------------------------------------------


def test_lines_of_metrics(tmp_path: Path) -> None:
    log = run_log(tmp_path)
    log.metrics(1, "train", {"loss": 0.5, "lr": 1e-4})
    log.metrics(2, "train", {"loss": float("nan"), "grad_norm": float("inf"), "lr": -float("inf")})
    log.metrics(2, "validation", {"psnr": 20})
    log.close()
    assert lines(tmp_path) == [
        '{"step": 1, "kind": "train", "loss": 0.5, "lr": 0.0001}',
        '{"step": 2, "kind": "train", "loss": null, "grad_norm": null, "lr": null}',
        '{"step": 2, "kind": "validation", "psnr": 20}',
    ]
    assert (tmp_path / "metrics.jsonl").read_text().endswith("}\n")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl"]


def test_every_line_is_on_disk_at_once(tmp_path: Path) -> None:
    log = run_log(tmp_path)
    for step in range(1, 4):
        log.metrics(step, "train", {"loss": 1.0})
        assert len(lines(tmp_path)) == step


def test_numbers_of_numpy(tmp_path: Path) -> None:
    log = run_log(tmp_path)
    log.metrics(1, "validation", {"psnr": np.float32(20.5), "count": np.int64(3)})  # type: ignore[dict-item]
    assert lines(tmp_path) == ['{"step": 1, "kind": "validation", "psnr": 20.5, "count": 3}']


def test_other_processes_write_nothing(tmp_path: Path) -> None:
    log = run_log(tmp_path, report_to="tensorboard", is_main=False)
    (tmp_path / "metrics.jsonl").write_text("untouched")
    log.begin(0)
    log.begin(3)
    log.metrics(1, "train", {"loss": 1.0})
    log.close()
    assert lines(tmp_path) == ["untouched"] and len(list(tmp_path.iterdir())) == 1


def recorded(folder: Path, steps: range) -> list[str]:
    log = run_log(folder)
    for step in steps:
        log.metrics(step, "train", {"loss": float(step)})
        if step % 2 == 0:
            log.metrics(step, "validation", {"error": 1.0})
    return lines(folder)


@pytest.mark.parametrize(
    "torn", ["", '{"step": 1, "kind": "tr', "{", '{"step": 2', "3", "[]", "{}", '{"kind": "train"}']
)
def test_a_resumed_file_reads_as_if_never_interrupted(tmp_path: Path, torn: str) -> None:
    whole = recorded(tmp_path, range(1, 6))
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write(torn)  # the process was killed in the middle of a line
    log = run_log(tmp_path)
    log.begin(3)
    assert lines(tmp_path) == [line for line in whole if json.loads(line)["step"] <= 3]
    assert len(lines(tmp_path)) == 4
    assert recorded(tmp_path, range(4, 6)) == whole
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl"]


def test_resuming_at_the_last_step_keeps_everything(tmp_path: Path) -> None:
    whole = recorded(tmp_path, range(1, 6))
    run_log(tmp_path).begin(5)
    assert lines(tmp_path) == whole


def test_resuming_without_metrics(tmp_path: Path) -> None:
    run_log(tmp_path).begin(3)
    run_log(tmp_path).begin(0)
    assert list(tmp_path.iterdir()) == []


def test_a_fresh_start_moves_metrics_aside(tmp_path: Path) -> None:
    for number in range(3):
        recorded(tmp_path, range(number, number + 1))
        run_log(tmp_path).begin(0)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"metrics-{i}.jsonl" for i in range(3)]
    for number in range(3):
        assert json.loads((tmp_path / f"metrics-{number}.jsonl").read_text().splitlines()[0])["step"] == number


def test_moving_aside_overwrites_nothing(tmp_path: Path) -> None:
    for _ in range(2):
        recorded(tmp_path, range(1))
        run_log(tmp_path).begin(0)
    (tmp_path / "metrics-0.jsonl").unlink()
    (tmp_path / "metrics-1.jsonl").write_text("precious")
    recorded(tmp_path, range(1))
    run_log(tmp_path).begin(0)
    assert (tmp_path / "metrics-1.jsonl").read_text() == "precious"


# Pictures -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_main", [True, False])
def test_pictures_are_written_by_any_process(tmp_path: Path, is_main: bool) -> None:
    image = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)
    log = run_log(tmp_path, is_main=is_main)
    log.image(1200, "views/sample-3", image)
    path = tmp_path / "validation" / "step-001200" / "views" / "sample-3.png"
    np.testing.assert_array_equal(np.asarray(Image.open(path)), image)
    assert log.image_folder(7) == tmp_path / "validation" / "step-000007"


# Trackers -------------------------------------------------------------------------------------------------------------


def events(folder: Path) -> Any:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    found = accumulator.EventAccumulator(str(folder))
    found.Reload()
    return found


def test_tensorboard_events(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    log = run_log(tmp_path, "tensorboard", tracker_project_name="project", logging_dir="events")
    for step in (5, 10):
        log.metrics(step, "train", {"loss": 1.0 / step})
    log.metrics(10, "validation", {"psnr": 30.0})
    log.image(10, "sample", np.full((4, 6, 3), 200, np.uint8))
    log.image(10, "not tracked", np.zeros((4, 6, 3), np.uint8), track=False)
    log.close()
    found = events(tmp_path / "events" / "project")
    assert [(e.step, pytest.approx(e.value)) for e in found.Scalars("train/loss")] == [(5, 0.2), (10, 0.1)]
    assert [(e.step, e.value) for e in found.Scalars("validation/psnr")] == [(10, 30.0)]
    (picture,) = found.Images("sample")
    assert (picture.step, picture.width, picture.height) == (10, 6, 4)
    assert found.Tags()["images"] == ["sample"]
    (hparams,) = (tmp_path / "events").rglob("hparams.yml")
    assert "optim.learning_rate: 0.5" in hparams.read_text() and "run.max_train_steps: None" in hparams.read_text()
    assert caplog.records == [] and len(lines(tmp_path)) == 3


def test_an_absolute_logging_dir(tmp_path: Path) -> None:
    log = run_log(
        tmp_path / "run", "tensorboard", tracker_project_name="project", logging_dir=str(tmp_path / "elsewhere")
    )
    log.close()
    assert list((tmp_path / "elsewhere" / "project").glob("events.*")) and not (tmp_path / "run" / "logs").exists()


@pytest.mark.parametrize(
    ("name", "hint"), [("tensorboard", " (pip install 'visual-trainers[tensorboard]')"), ("comet_ml", "")]
)
def test_a_missing_tracker_is_warned_about(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, name: str, hint: str
) -> None:
    monkeypatch.setattr(subject, "get_available_trackers", lambda: [])
    log = run_log(tmp_path, name)
    log.metrics(1, "train", {"loss": 1.0})
    log.image(1, "sample", np.zeros((4, 4, 3), np.uint8))
    log.close()
    assert caplog.messages == [f"tracker {name} is not installed{hint}: metrics go to metrics.jsonl alone"]
    assert len(lines(tmp_path)) == 1


class FailingTracker:
    """Fails in the methods named in `fails`; notes what it was asked."""

    name, requires_logging_directory = "wandb", False
    fails: tuple[str, ...] = ()
    calls: list[str] = []

    def __init__(self, run_name: str, **arguments: Any):
        self._called("__init__")
        self.run_name, self.arguments = run_name, arguments

    def _called(self, method: str) -> None:
        FailingTracker.calls.append(method)
        if method in FailingTracker.fails:
            raise ConnectionError(f"no route\n  to {'a very long host name ' * 20}")

    def start(self) -> None:
        self._called("start")

    def store_init_configuration(self, values: dict) -> None:
        self._called("store_init_configuration")
        FailingTracker.configuration = values

    def log(self, values: dict, step: int) -> None:
        self._called("log")
        FailingTracker.values = (values, step)

    def log_images(self, values: dict, step: int) -> None:
        self._called("log_images")
        FailingTracker.images = (values, step)

    def finish(self) -> None:
        self._called("finish")


@pytest.fixture
def fake_wandb(monkeypatch: pytest.MonkeyPatch) -> type[FailingTracker]:
    monkeypatch.setattr(subject, "get_available_trackers", lambda: ["wandb"])
    monkeypatch.setitem(subject.LOGGER_TYPE_TO_CLASS, "wandb", FailingTracker)
    monkeypatch.setattr(FailingTracker, "calls", [])
    monkeypatch.setattr(FailingTracker, "fails", ())
    return FailingTracker


def follow(log: RunLog) -> None:
    for step in (1, 2):
        log.metrics(step, "train", {"loss": float("nan") if step == 2 else 1.0})
    log.image(2, "sample", np.zeros((4, 4, 3), np.uint8))
    log.close()


def test_what_a_tracker_is_told(tmp_path: Path, fake_wandb: type[FailingTracker]) -> None:
    log = run_log(
        tmp_path, "wandb", tracker_project_name="p", tracker_arguments={"wandb": {"id": "x"}, "clearml": {"y": 1}}
    )
    follow(log)
    assert fake_wandb.calls == ["__init__", "start", "store_init_configuration", "log", "log", "log_images", "finish"]
    assert fake_wandb.configuration == {
        "run.seed": 1,
        "run.max_train_steps": "None",
        "run.allow_changed": "[]",
        "optim.learning_rate": 0.5,
        "optim.use_ema": True,
    }
    assert list(fake_wandb.values[0]) == ["train/loss"] and fake_wandb.values[1] == 2
    assert list(fake_wandb.images[0]) == ["sample"] and fake_wandb.images[0]["sample"][0].shape == (4, 4, 3)


def test_a_resumed_run_goes_on_in_the_same_charts(tmp_path: Path, fake_wandb: type[FailingTracker]) -> None:
    def told(resumes: bool) -> dict:
        log = RunLog(tmp_path, LogConfig(report_to="wandb"), CONFIG, is_main=True, resumes=resumes)
        return {key: log.trackers["wandb"].arguments[key] for key in ("id", "resume")}

    first = told(resumes=False)
    assert len(first["id"]) == 12 and first["resume"] == "allow"
    assert told(resumes=True) == first
    assert told(resumes=False)["id"] != first["id"]


@pytest.mark.parametrize("method", ["__init__", "start", "store_init_configuration"])
def test_a_tracker_that_does_not_start(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, fake_wandb: type[FailingTracker], method: str
) -> None:
    fake_wandb.fails = (method,)
    follow(run_log(tmp_path, "wandb"))
    (message,) = caplog.messages
    assert message.startswith("tracker wandb did not start (ConnectionError: no route to a very long host name a very")
    assert message.endswith("): the run goes on without it; WANDB_MODE=offline logs to disk") and len(message) < 330
    assert fake_wandb.calls[-1] == method and len(lines(tmp_path)) == 2


@pytest.mark.parametrize(
    ("method", "calls_after"), [("log", ["log"]), ("log_images", ["log_images"]), ("finish", ["finish"])]
)
def test_a_tracker_that_fails_is_left_out(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    fake_wandb: type[FailingTracker],
    method: str,
    calls_after: list[str],
) -> None:
    fake_wandb.fails = (method,)
    follow(run_log(tmp_path, "wandb"))
    (message,) = caplog.messages
    assert message.startswith("tracker wandb failed (ConnectionError: no route to a very long host")
    assert message.endswith("): it is left out from now on")
    assert fake_wandb.calls[-1:] == calls_after and fake_wandb.calls.count(method) == 1
    assert len(lines(tmp_path)) == 2 and (tmp_path / "validation" / "step-000002" / "sample.png").exists()


def test_one_failing_tracker_leaves_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fake_wandb: type[FailingTracker]
) -> None:
    pytest.importorskip("tensorboard")
    monkeypatch.setattr(subject, "get_available_trackers", lambda: ["wandb", "tensorboard"])
    fake_wandb.fails = ("log",)
    follow(run_log(tmp_path, "wandb, tensorboard", tracker_project_name="project"))
    assert [e.step for e in events(tmp_path / "logs" / "project").Scalars("train/loss")] == [1, 2]


def test_an_interruption_is_not_swallowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fake_wandb) -> None:
    def interrupted(self: Any, values: dict, step: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(fake_wandb, "log", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_log(tmp_path, "wandb").metrics(1, "train", {"loss": 1.0})


def test_unknown_trackers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError) as raised:
        run_log(tmp_path, "tensorbord,none,visdom")
    known = ", ".join(str(name) for name in accelerate_tracking.LOGGER_TYPE_TO_CLASS)
    assert str(raised.value) == f"log.report_to: tensorbord, visdom is none of all, none, {known}"
    assert "tensorboard" in known and "wandb" in known


@pytest.mark.parametrize(
    ("report_to", "names"),
    [
        ("none", []),
        ("", []),
        (" tensorboard , wandb ", ["tensorboard", "wandb"]),
        ("none,tensorboard", ["tensorboard"]),
        ("all", ["fake"]),
    ],
)
def test_which_trackers(monkeypatch: pytest.MonkeyPatch, report_to: str, names: list[str]) -> None:
    monkeypatch.setattr(subject, "get_available_trackers", lambda: ["fake"])
    assert subject._tracker_names(report_to) == names


def test_a_tracker_named_twice_starts_once(tmp_path: Path, fake_wandb: type[FailingTracker]) -> None:
    run_log(tmp_path, "wandb,wandb")
    assert fake_wandb.calls.count("start") == 1


@pytest.fixture(scope="module")
def offline_wandb(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a log with the real wandb has been, offline."""
    pytest.importorskip("wandb")
    folder = tmp_path_factory.mktemp("wandb")
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(folder)
        for name, value in {"MODE": "offline", "SILENT": "true"}.items():
            patched.setenv(f"WANDB_{name}", value)
        for name in ("CONFIG", "CACHE", "DATA"):
            patched.setenv(f"WANDB_{name}_DIR", str(folder / name))
        Accelerator(cpu=True)
        log = run_log(folder / "run", "wandb", tracker_project_name="project")
        assert list(log.trackers) == ["wandb"]
        follow(log)
    return folder


def test_wandb_works_offline(offline_wandb: Path) -> None:
    (run,) = offline_wandb.rglob("offline-run-*")
    assert list(run.glob("run-*.wandb")) and list((run / "files").rglob("sample_*.png"))
    assert len(lines(offline_wandb / "run")) == 2


def test_wandb_writes_to_logging_dir(offline_wandb: Path) -> None:
    (run,) = offline_wandb.rglob("offline-run-*")
    assert run.is_relative_to(offline_wandb / "run" / "logs")


def test_sections_that_trackers_show_are_those_of_the_configuration() -> None:
    """What `_plain` lets through is what tensorboard takes: no field of the common sections makes it fail."""
    for section in (RunConfig(), OptimConfig(), LogConfig()):
        values = [subject._plain(value) for value in vars(section).values()]
        assert all(isinstance(value, (bool, int, float, str)) for value in values)


def test_logging_is_left_to_the_program() -> None:
    assert logging.getLogger("common.log").handlers == [] and "wandb" not in vars(sys.modules["common.log"])
