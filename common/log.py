"""metrics.jsonl always, trackers if they work, pictures on disk; one axis, the optimizer step.

Only the main process writes metrics. A tracker that is missing or fails is named once and left out; the run goes on.
"""

import json
import logging
import math
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

from common.config import LogConfig
from common.video import save_image, write_video

logger = logging.getLogger(__name__)

METRICS, WANDB_ID = "metrics.jsonl", "wandb-id.txt"


class RunLog:
    """What a run reports.

    Args:
        output_dir: `metrics.jsonl` and pictures go here.
        settings: which trackers, and where their files go.
        config: the resolved configuration, secrets masked, for the trackers.
        is_main: on other processes every method returns at once.
        tracker_arguments: extra arguments of a tracker's constructor, by its name.
        resumes: the run goes on from a checkpoint, and so does its run in wandb.
    """

    def __init__(
        self,
        output_dir: Path,
        settings: LogConfig,
        config: Mapping[str, Mapping[str, Any]],
        *,
        is_main: bool,
        tracker_arguments: Mapping[str, Mapping[str, Any]] | None = None,
        resumes: bool = False,
    ):
        self.output_dir, self.is_main, self.resumes = output_dir, is_main, resumes
        self.trackers: dict[str, Any] = {}
        names = _tracker_names(settings.report_to)  # on all processes: a wrong name ends them all
        if is_main:
            logging_dir = output_dir / settings.logging_dir
            flat = {f"{section}.{k}": _plain(v) for section, values in config.items() for k, v in values.items()}
            for name in names:
                self._start(name, settings.tracker_project_name, logging_dir, flat, (tracker_arguments or {}).get(name))

    def _start(self, name: str, project: str, logging_dir: Path, config: dict, arguments: Mapping | None) -> None:
        if name not in [str(available) for available in get_available_trackers()]:
            extra = " (pip install 'visual-trainers[tensorboard]')" if name == "tensorboard" else ""
            logger.warning("tracker %s is not installed%s: metrics go to %s alone", name, extra, METRICS)
            return
        tracker_class = LOGGER_TYPE_TO_CLASS[name]
        try:
            places = (project, str(logging_dir)) if tracker_class.requires_logging_directory else (project,)
            logging_dir.mkdir(parents=True, exist_ok=True)
            own = {"dir": str(logging_dir), **self._wandb_run(logging_dir)} if name == "wandb" else {}
            tracker = tracker_class(*places, **(own | dict(arguments or {})))
            tracker.start()
            tracker.store_init_configuration(config)
        except Exception as error:  # whatever a tracker raises, training is worth more
            hint = "; WANDB_MODE=offline logs to disk" if name == "wandb" else ""
            logger.warning("tracker %s did not start (%s): the run goes on without it%s", name, _line(error), hint)
            return
        self.trackers[name] = tracker

    def _wandb_run(self, logging_dir: Path) -> dict[str, str]:
        """Its id: a resumed run goes on in the same charts, where steps that come again, and are equal, are dropped."""
        path = logging_dir / WANDB_ID
        if not (self.resumes and path.exists()):
            path.write_text(f"{uuid.uuid4().hex[:12]}\n")
        return {"id": path.read_text().strip(), "resume": "allow"}

    def begin(self, step: int) -> None:
        """Removes what a former run recorded after `step`, so that a resumed file reads as if never interrupted.

        A fresh start (step 0) in a folder that holds metrics moves them aside.
        """
        path = self.output_dir / METRICS
        if not self.is_main or not path.exists():
            return
        if step == 0:
            number = 0
            while (aside := self.output_dir / f"metrics-{number}.jsonl").exists():
                number += 1
            path.rename(aside)
            return
        kept = [line for line in path.read_text().splitlines() if _step_of(line) <= step]
        temporary = path.with_suffix(".jsonl.partial")
        temporary.write_text("".join(f"{line}\n" for line in kept))
        temporary.replace(path)

    def metrics(self, step: int, kind: str, values: Mapping[str, float]) -> None:
        """One line of metrics.jsonl, and the same numbers in every tracker under `kind/name`.

        Args:
            step: optimizer steps done.
            kind: `train` or `validation`.
            values: numbers, of Python or numpy; a non-finite one is written as null, since JSON has no NaN.
        """
        if not self.is_main:
            return
        values = {name: getattr(value, "item", lambda value=value: value)() for name, value in values.items()}
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        with open(self.output_dir / METRICS, "a") as file:
            file.write(json.dumps({"step": step, "kind": kind, **finite}) + "\n")
        self._each(lambda tracker: tracker.log({f"{kind}/{name}": v for name, v in values.items()}, step=step))

    def holds(self, step: int, kind: str) -> bool:
        """Whether metrics.jsonl has a line of this step and kind; False on other processes than the main one."""
        path = self.output_dir / METRICS
        if not self.is_main or not path.exists():
            return False
        lines = path.read_text().splitlines()
        return any(_step_of(line) == step and json.loads(line).get("kind") == kind for line in lines)

    def image_folder(self, step: int) -> Path:
        """Where the pictures of a validation go."""
        return self.output_dir / "validation" / f"step-{step:06d}"

    def image(self, step: int, name: str, image: np.ndarray, *, track: bool = True) -> None:
        """Writes a picture, uint8 (H, W, 3), as `<image_folder>/<name>.png`; the main process shows it in the trackers.

        Any process may call it, each with names of its own.
        """
        save_image(self.image_folder(step) / f"{name}.png", image)
        if track:
            self._each(lambda tracker: _track_image(tracker, name, image, step))

    def video(self, step: int, name: str, frames: np.ndarray, fps: float) -> None:
        """Writes a clip, uint8 (T, H, W, 3), as `<image_folder>/<name>.mp4`; the main process shows it in wandb.

        Any process may call it, each with names of its own.
        """
        path = self.image_folder(step) / f"{name}.mp4"
        write_video(path, frames, fps)
        self._each(lambda tracker: _track_video(tracker, name, path, step))

    def close(self) -> None:
        """Flushes and ends the trackers."""
        self._each(lambda tracker: tracker.finish())

    def _each(self, action: Callable[[Any], None]) -> None:
        for name, tracker in list(self.trackers.items()):
            try:
                action(tracker)
            except Exception as error:  # see _start
                logger.warning("tracker %s failed (%s): it is left out from now on", name, _line(error))
                del self.trackers[name]


def _tracker_names(report_to: str) -> list[str]:
    """The names in `report_to`; ValueError for one that does not exist."""
    names = list(dict.fromkeys(name.strip() for name in report_to.split(",") if name.strip()))
    if "all" in names:
        return [str(name) for name in get_available_trackers()]
    known = [str(name) for name in LOGGER_TYPE_TO_CLASS]
    unknown = [name for name in names if name not in [*known, "none"]]
    if unknown:
        raise ValueError(f"log.report_to: {', '.join(unknown)} is none of all, none, {', '.join(known)}")
    return [name for name in names if name != "none"]


def _track_image(tracker: Any, name: str, image: np.ndarray, step: int) -> None:
    if tracker.name == "tensorboard":
        tracker.log_images({name: image[None]}, step=step, dataformats="NHWC")  # (1, H, W, 3)
    elif hasattr(tracker, "log_images"):
        tracker.log_images({name: [image]}, step=step)


def _track_video(tracker: Any, name: str, path: Path, step: int) -> None:
    if tracker.name == "wandb":
        import wandb

        tracker.log({name: wandb.Video(str(path))}, step=step)


def _plain(value: Any) -> Any:
    """What tensorboard takes as a hyperparameter."""
    return value if isinstance(value, (bool, int, float, str)) else str(value)


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf  # a line cut short by a crash goes
