"""The loop. It knows optimizer steps, accumulation, learning rates, checkpoints and validation; it knows no trainer."""

import json
import logging
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator, DistributedType
from accelerate.utils import send_to_device
from torch import Tensor
from tqdm.auto import tqdm

from common import checkpoint as checkpoints
from common import config as configs
from common.checkpoint import Checkpoints, publish
from common.config import CheckpointConfig, LogConfig, RunConfig, ValidationConfig
from common.data import SampleLoader
from common.log import METRICS, RunLog
from common.optim import Learner
from common.runtime import StopSignal, seed_model_randomness, versions

logger = logging.getLogger(__name__)

EXPORT = "export"


@dataclass
class StepOutput:
    """What a task makes of one micro-batch.

    Attributes:
        loss: scalar mean over the micro-batch, with its graph.
        metrics: further scalars to report, averaged like the loss; the same names on every process.
        optimizer: which learner this step trains; the same for all micro-batches of a step.
    """

    loss: Tensor
    metrics: Mapping[str, Tensor] = field(default_factory=dict)
    optimizer: str = "model"


class Task(Protocol):
    """What a trainer supplies."""

    def training_step(self, batch: dict[str, Any], step: int) -> StepOutput:
        """The loss of one micro-batch of optimizer step `step`."""
        ...

    def validate(self, step: int) -> dict[str, float]:
        """Metrics after `step` optimizer steps; called on all processes, the work split over them."""
        ...

    def export(self, directory: Path) -> None:
        """Writes the final weights in the layout that others read; called on all processes."""
        ...


class Settings(Protocol):
    """The sections that the loop reads of any trainer's configuration."""

    @property
    def run(self) -> RunConfig: ...
    @property
    def checkpoint(self) -> CheckpointConfig: ...
    @property
    def log(self) -> LogConfig: ...
    @property
    def validation(self) -> ValidationConfig: ...


class NonFiniteError(RuntimeError):
    """Too many steps in a row whose loss or gradient was not finite."""


@dataclass
class Run:
    """Where a run stands and what it writes to.

    Attributes:
        step: optimizer steps done.
        sample: samples consumed, so the number of the next one.
        total_steps: optimizer steps at which the run is complete.
        global_batch: samples per optimizer step, over all processes.
        num_items: of the training set; an epoch is that many samples.
        validation_is_owed: a validation at this very step is still to be done.
    """

    accelerator: Accelerator
    config: Settings
    log: RunLog
    checkpoints: Checkpoints
    stop: StopSignal
    output_dir: Path
    total_steps: int
    global_batch: int
    num_items: int
    step: int = 0
    sample: int = 0
    validation_is_owed: bool = False

    def validation_is_due(self) -> bool:
        """Every `validation_steps`, else after every `validation_epochs` epochs; always after the last step."""
        if self.step == self.total_steps:
            return True
        validation = self.config.validation
        if validation.validation_steps:
            return self.step % validation.validation_steps == 0
        samples = self.num_items * validation.validation_epochs
        return self.sample // samples > (self.sample - self.global_batch) // samples

    def begin(self, resume_point: Path | None, learners: Mapping[str, Learner]) -> None:
        """Restores models, optimizers, averages and position from `resume_point`, if any; reports what will happen."""
        if resume_point:
            self.checkpoints.load(resume_point)
            state = checkpoints.read_state(resume_point)
            self.step, self.sample = state["step"], state["sample"]
            self.validation_is_owed = state["validation_is_owed"]
            if state["global_batch"] != self.global_batch:
                logger.warning(
                    "the global batch was %d and is now %d: the data go on from sample %d, but steps hold other "
                    "samples than in a run never stopped",
                    state["global_batch"],
                    self.global_batch,
                    self.sample,
                )
        self.log.begin(self.step)
        if self.accelerator.is_main_process:
            (self.output_dir / "config.yaml").write_text(configs.to_yaml(self.config))
        for fact in self.facts(resume_point, learners):
            logger.info("%s", fact)

    def facts(self, resume_point: Path | None, learners: Mapping[str, Learner]) -> list[str]:
        """What the user should see before the first step, one line each."""
        accelerator = self.accelerator
        per_process = self.global_batch // (accelerator.num_processes * accelerator.gradient_accumulation_steps)
        lines = []
        for name, learner in learners.items():
            sizes = [(p.numel(), p.requires_grad) for p in learner.model.parameters()]
            trained, frozen = (sum(size for size, grad in sizes if grad is wanted) for wanted in (True, False))
            rate = learner.learning_rate(self.step)
            lines.append(f"{name}: {trained:,} parameters are trained, {frozen:,} frozen; learning rate {rate:.3g}")
        epochs = self.total_steps * self.global_batch / self.num_items
        return [
            *lines,
            f"global batch {self.global_batch} = {accelerator.num_processes} processes x "
            f"{accelerator.gradient_accumulation_steps} accumulated x {per_process}; {self.num_items} items",
            f"{self.total_steps} optimizer steps ({epochs:.1f} epochs), precision {accelerator.mixed_precision}, "
            f"device {accelerator.device}",
            f"resumed from {resume_point} at step {self.step}" if resume_point else "fresh start",
            f"checkpoints, {METRICS}, pictures and export go to {self.output_dir.resolve()}",
        ]

    def save(self) -> None:
        """A checkpoint of this moment."""
        state = {"step": self.step, "sample": self.sample, "validation_is_owed": self.validation_is_owed}
        state |= {"world_size": self.accelerator.num_processes, "global_batch": self.global_batch}
        self.checkpoints.save(self.step, {**state, "versions": versions(), "config": configs.to_dict(self.config)})


def total_steps(run: RunConfig, num_items: int, global_batch: int) -> int:
    """Optimizer steps of a run: `max_train_steps`, or enough for `num_train_epochs` x `num_items` samples."""
    return run.max_train_steps or math.ceil(run.num_train_epochs * num_items / global_batch)


def require_enough_items(num_items: int, batch_size: int, num_processes: int) -> None:
    """ValueError if not even the micro-batches of all processes can hold different items."""
    if batch_size * num_processes > num_items:
        raise ValueError(
            f"the batch is larger than the data: train_batch_size {batch_size} x {num_processes} processes is "
            f"{batch_size * num_processes}, the training items are {num_items}; lower train_batch_size or add data"
        )


def find_resume_point(accelerator: Accelerator, config: Any, output_dir: Path) -> Path | None:
    """The checkpoint that `resume_from_checkpoint` means, or None for a fresh start; called before weights are loaded.

    Settings that differ from the checkpoint's are named in the log.

    Raises:
        CheckpointError: there is no such checkpoint, or a changed setting would break the saved state.
    """
    found = checkpoints.find(accelerator, output_dir, config.checkpoint.resume_from_checkpoint)
    if found is None:
        return None
    changed = configs.changes(checkpoints.read_state(found).get("config", {}), config)
    harmless = ("checkpoint.resume_from_checkpoint", "run.allow_changed")
    broken = [c for c in changed if c.breaks_state and c.path not in config.run.allow_changed]
    if broken:
        raise checkpoints.CheckpointError(
            f"{found} was made with other settings, on which its state depends: {'; '.join(map(str, broken))}. "
            f"Set them back, or insist with --allow_changed {' '.join(c.path for c in broken)}"
        )
    for change in changed:
        if change.path not in harmless:
            logger.warning("changed since %s: %s", found.name, change)
    return found


def fit(run: Run, task: Task, loader: SampleLoader, learners: Mapping[str, Learner]) -> bool:
    """Trains from `run.step` to `run.total_steps`, then exports. Returns False if a signal ended it early.

    A checkpoint is written every `checkpointing_steps`, at the end, and when a signal asks the run to stop.
    """
    accelerator, config = run.accelerator, run.config
    models = [learner.model for learner in learners.values()]
    if run.validation_is_owed:
        validate(run, task, learners)
    batches = loader.batches(run.sample, run.total_steps - run.step)
    bar = tqdm(total=run.total_steps, initial=run.step, disable=not accelerator.is_main_process, unit="step")
    skipped_in_a_row = 0
    while run.step < run.total_steps:
        started, data_wait_s = time.perf_counter(), 0.0

        # Run the micro-batches of one optimizer step.
        seed_model_randomness(config.run.seed, accelerator.process_index, run.step)
        for learner in learners.values():
            learner.set_learning_rate(run.step)
        sums: dict[str, Tensor] = {}
        for _ in range(accelerator.gradient_accumulation_steps):
            waiting = time.perf_counter()
            batch: Any = send_to_device(next(batches), accelerator.device, non_blocking=True)
            data_wait_s += time.perf_counter() - waiting
            with accelerator.accumulate(*models):
                output = task.training_step(batch, run.step)
                accelerator.backward(output.loss)
            _add(sums, {"loss": output.loss, **output.metrics})

        # Agree over processes on the means, and on whether anyone was asked to stop.
        learner = learners[output.optimizer]
        grad_norm = clip_gradients(accelerator, learner)
        means = _agree(run, sums, stop=bool(run.stop.received), too_many_bad=loader.too_many_bad, grad_norm=grad_norm)
        stopping, too_many_bad = means.pop("_stop") > 0, means.pop("_too_many_bad") > 0

        # Step, unless something is not finite.
        finite = math.isfinite(means["loss"]) and math.isfinite(means["grad_norm"])
        if finite or accelerator.scaler is not None:  # the fp16 scaler skips by itself, and learns from it
            learner.optimizer.step()
        learner.optimizer.zero_grad(set_to_none=True)
        if finite and learner.ema:
            learner.ema.update()
        skipped_in_a_row = 0 if finite else skipped_in_a_row + 1
        if not finite:
            _report_nonfinite(run, means, skipped_in_a_row)
        run.step += 1
        run.sample += run.global_batch

        # Report.
        step_s = time.perf_counter() - started
        means |= {"lr": learner.learning_rate(run.step - 1), "epoch": run.sample / run.num_items, "step_s": step_s}
        means |= {"samples_per_s": run.global_batch / step_s, "data_wait_s": data_wait_s}
        if run.step % config.log.log_every_steps == 0 or run.step == run.total_steps:
            run.log.metrics(run.step, "train", means)
        bar.set_postfix(loss=f"{means['loss']:.4g}", lr=f"{means['lr']:.3g}", refresh=False)
        bar.update()

        # Validate, save, stop.
        run.validation_is_owed = run.validation_is_due()
        if run.validation_is_owed and not stopping:
            validate(run, task, learners)
        if stopping or run.step == run.total_steps or run.step % config.checkpoint.checkpointing_steps == 0:
            run.save()
        if too_many_bad:
            raise _too_many_bad(loader)
        if stopping:
            break
    bar.close()
    finished = run.step >= run.total_steps
    if finished:
        with averaged(learners):
            publish(accelerator, run.output_dir / EXPORT, task.export)
    else:
        logger.info("stopped after step %d; continue with --resume_from_checkpoint latest", run.step)
    return finished


def validate(run: Run, task: Task, learners: Mapping[str, Learner]) -> None:
    """Validates the averaged weights where there are any, else the weights themselves, and reports the metrics."""
    started = time.perf_counter()
    for learner in learners.values():
        learner.model.eval()
    with averaged(learners), torch.no_grad():
        metrics = task.validate(run.step)
    for learner in learners.values():
        learner.model.train()
    run.validation_is_owed = False
    if metrics:
        run.log.metrics(run.step, "validation", {**metrics, "validation_s": time.perf_counter() - started})
        shown = ", ".join(f"{name} {value:.4g}" for name, value in metrics.items())
        logger.info("validation after step %d: %s", run.step, shown)


@contextmanager
def averaged(learners: Mapping[str, Learner]) -> Iterator[None]:
    """Inside the block the moving averages stand in place of the weights, for the models that have one."""
    with ExitStack() as stack:
        for learner in learners.values():
            if learner.ema:
                stack.enter_context(learner.ema.swapped())
        yield


def clip_gradients(accelerator: Accelerator, learner: Learner) -> Tensor:
    """Scales the learner's gradients down to `max_grad_norm` (0 is off); returns their norm before that, ()."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:  # its engine clips while it steps
        return torch.as_tensor(float(accelerator.clip_grad_norm_([], 0.0) or 0.0), device=accelerator.device)
    accelerator.unscale_gradients(learner.optimizer)
    parameters = [p for p in learner.model.parameters() if p.grad is not None]
    return torch.nn.utils.clip_grad_norm_(parameters, learner.max_grad_norm or math.inf)


def _add(sums: dict[str, Tensor], values: Mapping[str, Tensor]) -> None:
    for name, value in values.items():
        value = value.detach().float()
        sums[name] = sums[name] + value if name in sums else value


def _agree(
    run: Run, sums: Mapping[str, Tensor], *, stop: bool, too_many_bad: bool, grad_norm: Tensor
) -> dict[str, float]:
    """Means over accumulation and processes, in one reduction and one transfer to the host."""
    accelerator = run.accelerator
    names = sorted(sums)
    values = torch.stack([sums[name] / accelerator.gradient_accumulation_steps for name in names])
    flags = torch.tensor([float(stop), float(too_many_bad)], device=values.device)
    values: Any = accelerator.reduce(torch.cat([values, flags]), "mean")
    numbers = torch.cat([values, grad_norm.detach().float().reshape(1).to(values.device)]).tolist()
    return dict(zip([*names, "_stop", "_too_many_bad", "grad_norm"], numbers, strict=True))


def _report_nonfinite(run: Run, means: Mapping[str, float], skipped_in_a_row: int) -> None:
    """Records which samples made a step non-finite; ends the run after too many in a row."""
    accelerator, limit = run.accelerator, run.config.run.max_nonfinite_steps
    scaler = accelerator.scaler
    if scaler is not None and math.isfinite(means["loss"]) and scaler.get_scale() > 1:
        return  # fp16 gradients overflowed: the scaler has lowered its scale and will find one that fits
    record = {"step": run.step, "first_sample": run.sample, "last_sample": run.sample + run.global_batch - 1}
    record |= {"seed": run.config.run.seed, "loss": str(means["loss"]), "grad_norm": str(means["grad_norm"])}
    path = run.output_dir / "nonfinite.jsonl"
    if accelerator.is_main_process:
        with open(path, "a") as file:
            file.write(json.dumps(record) + "\n")
    what = f"step {run.step} (samples {record['first_sample']} to {record['last_sample']})"
    if skipped_in_a_row > limit:
        raise NonFiniteError(
            f"loss {means['loss']} and gradient norm {means['grad_norm']} at {what}: {skipped_in_a_row} steps in a row "
            f"were not finite, run.max_nonfinite_steps is {limit}. They are listed in {path}; lower the learning rate, "
            "train in bf16 or fp32, or look at those samples, then resume with --resume_from_checkpoint latest"
        )
    logger.warning("%s was skipped: loss %s, gradient norm %s", what, means["loss"], means["grad_norm"])


def _too_many_bad(loader: SampleLoader) -> RuntimeError:
    return RuntimeError(
        f"{len(loader.bad_items)} of {loader.plan.num_items} items could not be read, more than data.max_bad_fraction "
        f"allows ({loader.max_bad_items:g}); see {loader.bad_samples_path}. Repair or remove them, or raise the limit"
    )
