"""What stands around the loop in every trainer: from a configuration to a run, and from a run to its end."""

import dataclasses
import json
import logging
import math
import sys
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from torch import nn

from common import checkpoint as checkpoints
from common import config as configs
from common import runtime
from common.checkpoint import CheckpointError, Checkpoints
from common.data import SampleLoader, SamplePlan, SampleSource
from common.log import RunLog
from common.loop import Run, Task, fit
from common.measure import Meter, parse_steps
from common.optim import Learner
from common.preflight import preflight
from common.replay import replay
from common.runtime import StopSignal
from common.watch import Watch

logger = logging.getLogger(__name__)


class DataSet(Protocol):
    """The training items, and what a checkpoint remembers of them."""

    def __len__(self) -> int: ...
    def fingerprint(self) -> Mapping[str, Any]: ...


@dataclass(frozen=True)
class Session:
    """A configuration on its processes.

    Attributes:
        config: sections as in `common.config`, and the trainer's own.
        accelerator: the Accelerator.
        stop: by which the processes stop together.
    """

    config: Any
    accelerator: Any
    stop: StopSignal

    @property
    def device(self) -> torch.device:
        """Of this process."""
        return self.accelerator.device


@dataclass(frozen=True)
class Course:
    """Which samples a run sees, in which order, and where it begins.

    Attributes:
        plan: items by sample number, and the global batch.
        total_steps: optimizer steps at which the run is complete.
        fingerprint: of the data set; a checkpoint of another one is refused.
        resume_point: the checkpoint to go on from; None is a fresh start.
    """

    plan: SamplePlan
    total_steps: int
    fingerprint: Mapping[str, Any]
    resume_point: Path | None


def command(
    config: Any,
    warnings: Sequence[str],
    train: Callable[..., None],
    draw_samples: Callable[[Any], np.ndarray],
    as_tried: Callable[[Any], Any] = lambda config: config,
) -> None:
    """Trains, or with `run.preflight` tries it; errors made for people end the process with status 1.

    Args:
        warnings: of the command line, for the log.
        train: `train(config, warnings)` of a trainer.
        draw_samples: a contact sheet of a few training samples, uint8 (H, W, 3).
        as_tried: what else changes in a configuration of which only a few steps are tried.
    """
    with runtime.clear_errors():
        if config.run.preflight:
            sys.exit(0 if preflight(as_tried(config), train, draw_samples, _accelerator_of(config)) else 1)
        train(config, warnings)


def start(
    config: Any, warnings: Sequence[str] = (), *, num_networks: int = 1, find_unused_parameters: bool = False
) -> Session:
    """The processes of a run, which from here on stop together; `warnings` are logged once."""
    config = _aside_if_replaying(config)
    accelerator = _accelerator_of(config, num_networks=num_networks, find_unused_parameters=find_unused_parameters)
    stop = runtime.stop_signal(accelerator, config.run)
    for warning in warnings if accelerator.is_main_process else ():
        logger.warning("%s", warning)
    return Session(config, accelerator, stop)


def _accelerator_of(config: Any, **of_trainer: Any) -> Any:
    optim = config.optim
    return runtime.start(config.run, optim.gradient_accumulation_steps, max_grad_norm=optim.max_grad_norm, **of_trainer)


def _aside_if_replaying(config: Any) -> Any:
    """With `replay` the run writes into a folder of its own, so that nothing of the recorded run is touched."""
    if not config.run.replay:
        return config
    folder = Path(config.run.output_dir) / "replay"
    return dataclasses.replace(
        config,
        run=dataclasses.replace(config.run, output_dir=str(folder)),
        checkpoint=dataclasses.replace(config.checkpoint, resume_from_checkpoint=None),
        log=dataclasses.replace(config.log, report_to="none"),
    )


def course_of(session: Session, training_set: DataSet, groups: Sequence[Any] | None = None) -> Course:
    """The course of a run over its data; makes the run's folder.

    Args:
        groups: of each item; batches hold items of one group.

    Raises:
        ValueError: the batch is larger than the data, or processes see different data.
        OSError: the processes do not share the run's folder.
        CheckpointError: see `find_resume_point`; the folder is left as it was.
    """
    config, accelerator, num_items = session.config, session.accelerator, len(training_set)
    micro_batch, num_processes = config.data.batch_size, accelerator.num_processes
    fingerprint = training_set.fingerprint()
    _require_same_data(num_items, fingerprint)
    if micro_batch * num_processes > num_items:
        raise ValueError(
            f"the batch is larger than the data: data.batch_size {micro_batch} x {num_processes} processes is "
            f"{micro_batch * num_processes}, the training items are {num_items}; lower the batch size or add data"
        )
    global_batch = micro_batch * accelerator.gradient_accumulation_steps * num_processes
    total_steps = config.run.max_train_steps or math.ceil(config.run.num_train_epochs * num_items / global_batch)
    plan = SamplePlan(num_items, config.run.seed, global_batch, groups)
    output_dir = Path(config.run.output_dir)
    # Asked by the main process alone: a network file system would let the others go on seeing no folder for a while.
    was_there = accelerator.is_main_process and output_dir.exists()
    runtime.require_shared_folder(accelerator, output_dir)
    try:
        resume_point = find_resume_point(accelerator, config, output_dir, fingerprint)
    except CheckpointError:
        if accelerator.is_main_process and not was_there:
            output_dir.rmdir()
        raise
    return Course(plan, total_steps, fingerprint, resume_point)


def _require_same_data(num_items: int, fingerprint: Mapping[str, Any]) -> None:
    """ValueError on all processes if they found different items, which would end in a hang."""
    found = f"{num_items} items, {json.dumps(fingerprint, sort_keys=True)}"
    others = [(rank, other) for rank, other in enumerate(gather_object([found])) if other != found]
    if others:
        rank, other = others[0]
        raise ValueError(
            f"processes see different training data: this one {found}, process {rank} {other}. Start again when "
            "nothing writes into the data any more and all nodes see the same files"
        )


def find_resume_point(
    accelerator: Accelerator, config: Any, output_dir: Path, fingerprint: Mapping[str, Any]
) -> Path | None:
    """The checkpoint that `resume_from_checkpoint` means, or None for a fresh start; called before weights are loaded.

    Settings that differ from the checkpoint's are named in the log.

    Raises:
        CheckpointError: there is no such checkpoint, or a changed setting would break the saved state.
    """
    found = checkpoints.find(accelerator, output_dir, config.checkpoint.resume_from_checkpoint)
    if found is None:
        return None
    saved = checkpoints.read_state(found)
    changed = configs.changes(saved["config"], config)
    changed += [
        configs.Change(f"data.{key}", saved["fingerprint"].get(key), value, breaks_state=True)
        for key, value in json.loads(json.dumps(fingerprint)).items()
        if saved["fingerprint"].get(key) != value
    ]
    harmless = ("checkpoint.resume_from_checkpoint", "run.allow_changed")
    changed += _changed_launch(found, saved, accelerator)
    broken = [c for c in changed if c.breaks_state and c.path not in config.run.allow_changed]
    if broken:
        raise CheckpointError(
            f"{found} was made with other settings, on which its state depends: {'; '.join(map(str, broken))}. "
            f"Set them back, or insist with --allow_changed {' '.join(c.path for c in broken)}"
        )
    for change in changed:
        if accelerator.is_main_process and change.path not in harmless:
            logger.warning("changed since %s: %s", found.name, change)
    return found


def _changed_launch(found: Path, saved: Mapping[str, Any], accelerator: Accelerator) -> list[configs.Change]:
    """What the launcher decided otherwise than for the checkpoint; CheckpointError if it cannot be read that way."""
    then, now = saved.get("uses_deepspeed"), runtime.uses_deepspeed(accelerator)
    processes_then, processes_now = saved["world_size"], accelerator.num_processes
    if then is not None and (then != now or (now and processes_then != processes_now)):
        how_then, how_now = (
            f"{count} processes {'with' if deepspeed else 'without'} DeepSpeed"
            for count, deepspeed in ((processes_then, then), (processes_now, now))
        )
        raise CheckpointError(
            f"{found} was made by {how_then}, and this run is {how_now}: DeepSpeed saves each process's share of the "
            "optimizer in its own form. Launch as before, or start anew from the weights in the checkpoint"
        )
    precision = saved.get("precision", accelerator.mixed_precision)
    if precision == accelerator.mixed_precision:
        return []
    if accelerator.mixed_precision == "fp16":
        raise CheckpointError(
            f"{found} was made in precision {precision}, so it lacks the loss scale of fp16: go on in {precision}"
        )
    return [configs.Change("the precision", precision, accelerator.mixed_precision, breaks_state=False)]


def open_run(
    session: Session,
    course: Course,
    *,
    models: Mapping[str, nn.Module],
    learners: Mapping[str, Learner],
    tracker_arguments: Mapping[str, Mapping[str, Any]] | None = None,
    **more: Any,
) -> Run:
    """A run, restored from its resume point if there is one, with what is about to happen reported.

    Args:
        models: unwrapped trained models by the name of their folder in a checkpoint, in the order of `prepare`.
        learners: what trains them; averages are saved under the names of the models they belong to.
        tracker_arguments: by tracker, for its start.
        more: further fields of `Run`.
    """
    config, accelerator = session.config, session.accelerator
    output_dir, is_main = Path(config.run.output_dir), accelerator.is_main_process
    token = [uuid.uuid4().hex]
    broadcast_object_list(token)
    rank, num_processes = accelerator.process_index, accelerator.num_processes
    averages = [learner.ema for learner in learners.values() if learner.ema]
    emas = {name: ema for name, model in models.items() for ema in averages if ema.module is model}
    run = Run(
        accelerator=accelerator,
        config=config,
        learners=learners,
        log=RunLog(
            output_dir,
            config.log,
            configs.to_dict(config),
            is_main=is_main,
            tracker_arguments=tracker_arguments,
            resumes=course.resume_point is not None,
        ),
        checkpoints=Checkpoints(accelerator, output_dir, models, emas, config.checkpoint.checkpoints_total_limit),
        stop=session.stop,
        watch=Watch(output_dir / "watch", token[0], rank, num_processes, config.run.hang_timeout_s),
        meter=Meter(
            accelerator.device,
            accelerator.gradient_accumulation_steps,
            parse_steps(config.log.profile),
            output_dir / "profile" / f"rank-{rank}.json",
            num_kinds=len(learners),
        ),
        output_dir=output_dir,
        plan=course.plan,
        total_steps=course.total_steps,
        validation_is_owed=config.validation.validate_at_start,
        fingerprint=course.fingerprint,
        **more,
    )
    session.stop.on_progress = run.watch.moved
    run.begin(course.resume_point)
    return run


def run_to_end(run: Run, task: Task, source: SampleSource) -> None:
    """Trains to the end, or with `run.replay` runs one step again; closes the run.

    Args:
        source: the training items, as they are or encoded.
    """
    data, accelerator = run.config.data, run.accelerator
    loader = SampleLoader(
        source,
        run.plan,
        micro_batch=data.batch_size,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        num_workers=data.num_workers,
        bad_samples_path=run.output_dir / "bad_samples.jsonl",
        max_bad_fraction=data.max_bad_fraction,
        sample_timeout_s=data.sample_timeout_s,
    )
    if run.config.run.replay:
        replay(run, task, loader, Path(run.config.run.replay))
    else:
        fit(run, task, loader)
    run.end()
