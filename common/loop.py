"""The loop. It knows optimizer steps, accumulation, learning rates, checkpoints and validation; it knows no trainer."""

import json
import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from torch import Tensor
from tqdm.auto import tqdm

from common import checkpoint as checkpoints
from common import config as configs
from common.checkpoint import Checkpoints, publish
from common.config import CheckpointConfig, DataConfig, LogConfig, RunConfig, ValidationConfig
from common.data import HOST_KEYS, Fetcher, SampleLoader, SamplePlan
from common.log import METRICS, RunLog
from common.measure import Meter
from common.optim import Learner, settings_kept
from common.runtime import StopRequested, StopSignal, seed_model_randomness, uses_deepspeed, versions
from common.sharding import is_sharded, whole, whole_of
from common.watch import Watch

logger = logging.getLogger(__name__)

EXPORT, NONFINITE, RECORD = "export", "nonfinite", "record.json"


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
    def data(self) -> DataConfig: ...
    @property
    def checkpoint(self) -> CheckpointConfig: ...
    @property
    def log(self) -> LogConfig: ...
    @property
    def validation(self) -> ValidationConfig: ...


class OutOfMemory(RuntimeError):
    """The device's memory is too small for the settings; the text says in which phase and what to change."""


class NonFiniteError(RuntimeError):
    """Too many steps in a row whose loss or gradient was not finite."""


@dataclass
class Run:
    """Where a run stands and what it writes to.

    Attributes:
        step: optimizer steps done.
        sample: samples consumed, so the number of the next one.
        total_steps: optimizer steps at which the run is complete.
        plan: items by sample number; `num_items` of them are an epoch, `global_batch` an optimizer step.
        validation_is_owed: a validation at this very step is still to be done.
        saved_step: that of the newest checkpoint.
        fingerprint: of the data set; a checkpoint of another one is refused.
        memory_knobs: settings that lower the need of memory, for the message when there is too little.
    """

    accelerator: Accelerator
    config: Settings
    learners: Mapping[str, Learner]
    log: RunLog
    checkpoints: Checkpoints
    stop: StopSignal
    watch: Watch
    meter: Meter
    output_dir: Path
    plan: SamplePlan
    total_steps: int
    step: int = 0
    sample: int = 0
    validation_is_owed: bool = False
    saved_step: int | None = None
    fingerprint: Mapping[str, Any] = field(default_factory=dict)
    memory_knobs: str = "train_batch_size (with gradient_accumulation_steps raised to match)"

    def validation_is_due(self) -> bool:
        """Every `validation_steps`, else after every `validation_epochs` epochs; always after the last step."""
        if self.step == self.total_steps:
            return True
        validation = self.config.validation
        if validation.validation_steps:
            return self.step % validation.validation_steps == 0
        samples = self.plan.num_items * validation.validation_epochs
        return self.sample // samples > (self.sample - self.plan.global_batch) // samples

    def begin(self, resume_point: Path | None) -> None:
        """Restores models, optimizers, averages and position from `resume_point`, if any; reports what will happen."""
        if resume_point:
            with settings_kept(learner.optimizer for learner in self.learners.values()):
                self.checkpoints.load(resume_point)
            state = checkpoints.read_state(resume_point)
            self.step, self.sample = state["step"], state["sample"]
            is_done = self.log.holds(self.step, "validation")
            self.validation_is_owed = self.stop.agreed(state["validation_is_owed"] and not is_done)
            self.saved_step = self.step
            if state["global_batch"] != self.plan.global_batch:
                logger.warning(
                    "the global batch was %d and is now %d: the data go on from sample %d, but steps hold other "
                    "samples than in a run never stopped",
                    state["global_batch"],
                    self.plan.global_batch,
                    self.sample,
                )
        if self.step > self.total_steps:
            raise ValueError(
                f"the checkpoint is of step {self.step}, but the run ends after step {self.total_steps}: raise "
                "max_train_steps (or num_train_epochs), which count from the very first step"
            )
        self.log.begin(self.step)
        if self.accelerator.is_main_process:
            (self.output_dir / "config.yaml").write_text(configs.to_yaml(self.config))
        for fact in self.facts(resume_point):
            logger.info("%s", fact)

    def facts(self, resume_point: Path | None) -> list[str]:
        """What the user should see before the first step, one line each."""
        accelerator = self.accelerator
        per_process = self.plan.global_batch // (accelerator.num_processes * accelerator.gradient_accumulation_steps)
        lines = []
        for name, learner in self.learners.items():
            sizes = [(p.numel(), p.requires_grad) for p in learner.model.parameters()]
            trained, frozen = (sum(size for size, grad in sizes if grad is wanted) for wanted in (True, False))
            rate = learner.learning_rate(self.step)
            lines.append(f"{name}: {trained:,} parameters are trained, {frozen:,} frozen; learning rate {rate:.3g}")
            if is_sharded(learner.model):
                lines.append(f"{name}: sharded over the processes (FSDP2), whole on each for validation and export")
        epochs = self.total_steps * self.plan.global_batch / self.plan.num_items
        return [
            *lines,
            f"global batch {self.plan.global_batch} = {accelerator.num_processes} processes x "
            f"{accelerator.gradient_accumulation_steps} accumulated x {per_process}; {self.plan.num_items} items",
            f"{self.total_steps} optimizer steps ({epochs:.1f} epochs), precision {accelerator.mixed_precision}, "
            f"device {accelerator.device}",
            self._beginning(resume_point),
            f"checkpoints, {METRICS}, pictures and export go to {self.output_dir.resolve()}",
        ]

    def _beginning(self, resume_point: Path | None) -> str:
        if not resume_point:
            is_absent = self.config.checkpoint.resume_from_checkpoint == "latest"  # any other one would be an error
            absent = f": latest asks for a checkpoint, and {self.output_dir} holds none yet" if is_absent else ""
            return f"fresh start at step {self.step}{absent}"
        done = ", the last one: raise max_train_steps or num_train_epochs to train on" * (self.step == self.total_steps)
        return f"resumed from {resume_point} at step {self.step}{done}"

    def end(self) -> None:
        """Closes what was opened, on every process, after a run that ended well."""
        self.log.close()
        self.accelerator.wait_for_everyone()
        self.watch.end()
        self.accelerator.wait_for_everyone()  # the folder may be deleted from here on: nobody writes into it any more

    def save(self) -> None:
        """A checkpoint of this step, unless there is one."""
        if self.saved_step == self.step:
            return
        state = {"step": self.step, "sample": self.sample, "validation_is_owed": self.validation_is_owed}
        state |= {"world_size": self.accelerator.num_processes, "global_batch": self.plan.global_batch}
        state |= {"fingerprint": dict(self.fingerprint), "versions": versions(), "config": configs.to_dict(self.config)}
        state |= {"precision": self.accelerator.mixed_precision, "uses_deepspeed": uses_deepspeed(self.accelerator)}
        with self.watch.phase("save", step=self.step):
            self.checkpoints.save(self.step, state)
        self.saved_step = self.step


def fit(run: Run, task: Task, loader: SampleLoader) -> bool:
    """Trains from `run.step` to `run.total_steps`, then exports. Returns False if it was asked to stop before.

    A checkpoint is written every `checkpointing_steps`, at the end, and when the run is asked to stop.

    Raises:
        NonFiniteError, PeerLost, OutOfMemory, RuntimeError: see their texts; the last checkpoint is whole.
    """
    config, log, learners = run.config, run.log, run.learners
    fetcher = Fetcher(loader.batches(run.sample, run.total_steps - run.step))
    bar = tqdm(total=run.total_steps, initial=run.step, disable=not run.accelerator.is_main_process, unit="step")
    first_step, skipped = run.step, {name: [] for name in learners}  # steps in a row that were not finite
    stopped, shown = False, {}
    with run.watch.naming_lost_peers(), naming_memory(run), closing(fetcher), closing(bar):
        try:
            if run.validation_is_owed:
                validate(run, task)
            while run.step < run.total_steps and not stopped:
                # Pass forward and backward over the micro-batches of one optimizer step.
                started = time.perf_counter()
                run.meter.profile(run.step + 1)
                output, sums = accumulate(run, task, fetcher)
                learner = learners[output.optimizer]

                # Agree over processes on the means and on whether to stop; step, unless something is not finite.
                with run.watch.phase("collective"):
                    grad_norm = clip_gradients(run.accelerator, learner)
                    means = _agree(run, sums, grad_norm=grad_norm, too_many_bad=loader.too_many_bad)
                stopped, too_many_bad = means.pop("_stop") > 0, means.pop("_too_many_bad") > 0
                finite = math.isfinite(means["loss"]) and math.isfinite(means["grad_norm"])
                with run.watch.phase("optimizer"):
                    if finite:
                        skipped[output.optimizer] = []
                    elif not is_overflow(run.accelerator, means["loss"]):
                        skipped[output.optimizer].append(run.step)
                        report_nonfinite(run, output.optimizer, means, skipped[output.optimizer])
                    take_step(run, learner, finite)
                run.step += 1
                run.sample += run.plan.global_batch

                # Report.
                step_s = time.perf_counter() - started
                means |= {"lr": learner.learning_rate(run.step - 1), "epoch": run.sample / run.plan.num_items}
                means |= run.meter.of_step(step_s, run.watch.take_seconds(), run.plan.global_batch, output.optimizer)
                kind = "train" if output.optimizer == "model" else f"train_{output.optimizer}"
                if run.step % config.log.log_every_steps < len(learners) or run.step == run.total_steps:
                    log.metrics(run.step, kind, means | _spread(run, means))
                shown |= {kind.replace("train", "loss"): f"{means['loss']:.4g}", "lr": f"{means['lr']:.3g}"}
                bar.set_postfix(shown, refresh=False)
                bar.update()

                # Save, validate: in this order, so that a validation that fails costs no work.
                run.validation_is_owed = run.validation_is_due()
                if stopped or run.step == run.total_steps or run.step % config.checkpoint.checkpointing_steps == 0:
                    run.save()
                if run.validation_is_owed and not stopped:
                    validate(run, task)
                if too_many_bad:
                    raise _too_many_bad(loader)
        except StopRequested:
            stopped = True
            run.save()
        run.meter.end_profile()
        if run.step == run.total_steps and not run.validation_is_owed:
            _require_finite_steps(run, run.step - first_step, skipped)
            with run.watch.phase("export"), averaged(learners):
                publish(run.accelerator, run.output_dir / EXPORT, task.export)
            logger.info("done after step %d: the trained weights are in %s", run.step, run.output_dir / EXPORT)
            return True
    logger.info("stopped after step %d; continue with --resume_from_checkpoint latest", run.step)
    return False


def accumulate(run: Run, task: Task, fetcher: Fetcher) -> tuple[StepOutput, dict[str, Tensor]]:
    """Gradients of the micro-batches of one optimizer step; its last output, and the sums of loss and metrics.

    Raises:
        StopRequested: on all processes, if one of them was asked to stop while it waited for data.
    """
    accelerator, learners = run.accelerator, run.learners.values()
    for learner in learners:
        learner.set_learning_rate(run.step)
    sums: dict[str, Tensor] = {}
    for _ in range(accelerator.gradient_accumulation_steps):
        with run.watch.phase("data", step=run.step, samples=[run.sample, run.sample + run.plan.global_batch - 1]):
            batch: Any = fetcher.next(give_up=lambda: run.stop.is_wanted)
        with run.watch.phase("collective"):
            if run.stop.agreed(batch is None):
                for learner in learners:
                    learner.optimizer.zero_grad(set_to_none=True)
                raise StopRequested
        numbers = batch["sample_number"].tolist()
        seed_model_randomness(run.config.run.seed, numbers[0])
        batch = send_to_device(batch, accelerator.device, non_blocking=True, skip_keys=HOST_KEYS)
        with accelerator.accumulate(*(learner.model for learner in learners)), run.meter.counting():
            with run.watch.phase("forward", samples=numbers):
                output = task.training_step(batch, run.step)
            with run.watch.phase("backward"):
                loss = output.loss
                if uses_deepspeed(accelerator):  # it steps in here, unless the gradient is not finite
                    loss = loss * torch.where(loss.detach().isfinite(), 1.0, torch.nan)
                accelerator.backward(loss)
        for name, value in {"loss": output.loss, **output.metrics}.items():
            value = value.detach().float()
            sums[name] = sums[name] + value if name in sums else value
    return output, sums


def take_step(run: Run, learner: Learner, finite: bool) -> None:
    """One optimizer step and one update of the average, unless loss or gradient are not finite."""
    if not finite:
        learner.optimizer.zero_grad(set_to_none=True)
    if finite or run.accelerator.scaler is not None:  # the fp16 scaler learns from what it saw when it unscaled
        learner.optimizer.step()
    learner.optimizer.zero_grad(set_to_none=True)
    if finite and learner.ema:
        learner.ema.update(is_last=run.step + 1 == run.total_steps)


def validate(run: Run, task: Task) -> None:
    """Validates the averaged weights where there are any, else the weights themselves, and reports the metrics."""
    started = time.perf_counter()
    try:
        for learner in run.learners.values():
            learner.model.eval()
        with run.watch.phase("validation", step=run.step), averaged(run.learners), torch.no_grad():
            metrics = task.validate(run.step)
    finally:
        for learner in run.learners.values():
            learner.model.train()
    run.validation_is_owed = False
    if metrics:
        run.log.metrics(run.step, "validation", {**metrics, "validation_s": time.perf_counter() - started})
        shown = ", ".join(f"{name} {value:.4g}" for name, value in metrics.items())
        logger.info("validation after step %d: %s", run.step, shown)


@contextmanager
def averaged(learners: Mapping[str, Learner]) -> Iterator[None]:
    """Inside the block the moving averages stand in place of the weights, for the models that have one.

    Sharded models are whole there, on every process.
    """
    with ExitStack() as stack:
        for learner in learners.values():
            if learner.ema:
                stack.enter_context(learner.ema.swapped())
            stack.enter_context(whole(learner.model))
        yield


def clip_gradients(accelerator: Accelerator, learner: Learner) -> Tensor:
    """Scales the learner's gradients down to `max_grad_norm` (0 is off); returns their norm before that, ()."""
    if uses_deepspeed(accelerator):  # its engine clips while it steps
        return torch.as_tensor(float(accelerator.clip_grad_norm_([], 0.0) or 0.0), device=accelerator.device)
    accelerator.unscale_gradients(learner.optimizer)
    parameters = [p for p in learner.model.parameters() if p.grad is not None]
    return whole_of(torch.nn.utils.clip_grad_norm_(parameters, learner.max_grad_norm or math.inf))


def _agree(run: Run, sums: Mapping[str, Tensor], *, grad_norm: Tensor, too_many_bad: bool) -> dict[str, float]:
    """Means over accumulation and processes, in one reduction and one transfer to the host."""
    accelerator = run.accelerator
    names = sorted(sums)
    values = torch.stack([sums[name] / accelerator.gradient_accumulation_steps for name in names])
    flags = torch.tensor([float(run.stop.is_wanted), float(too_many_bad)], device=values.device)
    values: Any = accelerator.reduce(torch.cat([values, flags]), "mean")
    numbers = torch.cat([values, grad_norm.detach().float().reshape(1).to(values.device)]).tolist()
    return dict(zip([*names, "_stop", "_too_many_bad", "grad_norm"], numbers, strict=True))


def _spread(run: Run, measures: Mapping[str, float]) -> dict[str, float]:
    """Seconds that the fastest and the slowest process computed in this step, and which was the slowest."""
    if run.accelerator.num_processes == 1:
        return {}
    busy = run.stop.gathered(measures["time/forward_s"] + measures["time/backward_s"] + measures["time/data_s"])
    return {"fastest_rank_s": min(busy), "slowest_rank_s": max(busy), "slowest_rank": busy.index(max(busy))}


def is_overflow(accelerator: Accelerator, loss: float) -> bool:
    """Whether gradients are not finite for fp16's scale alone, which the scaler lowers until it finds one that fits.

    Args:
        loss: of the step, over all processes.
    """
    return accelerator.scaler is not None and math.isfinite(loss) and accelerator.scaler.get_scale() > 1


def report_nonfinite(run: Run, optimizer: str, means: Mapping[str, float], in_a_row: Sequence[int]) -> None:
    """Records a step whose loss or gradient is not finite, so that it can be replayed; ends the run after too many.

    Steps of different learners are counted apart: of a GAN, one may diverge while the other goes on.

    The first of a row is kept whole in `nonfinite/step-<n>`: sample numbers, seed, configuration and the weights that
    it started from. `--replay` runs it again.
    """
    accelerator, limit = run.accelerator, run.config.run.max_nonfinite_steps
    record = {"step": run.step, "optimizer": optimizer, "seed": run.config.run.seed}
    record |= {"first_sample": run.sample, "last_sample": run.sample + run.plan.global_batch - 1}
    record |= {"loss": str(means["loss"]), "grad_norm": str(means["grad_norm"])}
    folder = run.output_dir / NONFINITE / f"step-{run.step}"
    if len(in_a_row) == 1:
        record |= {"num_processes": accelerator.num_processes, "config": configs.to_dict(run.config)}

        def write(staging: Path) -> None:
            if accelerator.is_main_process:
                (staging / RECORD).write_text(json.dumps(record, indent=1) + "\n")
            for name, model in run.checkpoints.models.items():
                checkpoints.save_weights(model, staging / name, accelerator.is_main_process)

        publish(accelerator, folder, write)
    elif accelerator.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / RECORD).write_text(json.dumps(record, indent=1) + "\n")
    what = f"step {run.step} of the {optimizer} (samples {record['first_sample']} to {record['last_sample']})"
    numbers = f"loss {means['loss']}, gradient norm {means['grad_norm']}"
    if len(in_a_row) > limit:
        first = run.output_dir / NONFINITE / f"step-{in_a_row[0]}" / RECORD
        raise NonFiniteError(
            f"{numbers} at {what}: {len(in_a_row)} steps in a row were not finite, run.max_nonfinite_steps is {limit}. "
            f"--replay {first} shows where it begins. Lower the learning rate, train in bf16 or fp32, or look at those "
            "samples, then continue with --resume_from_checkpoint latest"
        )
    logger.warning("%s was skipped: %s", what, numbers)


def _require_finite_steps(run: Run, num_steps: int, skipped: Mapping[str, Sequence[int]]) -> None:
    """NonFiniteError if no step of this start changed a weight; the fp16 scaler may need a few to find its scale."""
    if num_steps and sum(map(len, skipped.values())) == num_steps and run.accelerator.scaler is None:
        raise NonFiniteError(
            f"none of the {num_steps} steps was finite, so nothing was learned and nothing is exported; see "
            f"{run.output_dir / NONFINITE}. Lower the learning rate, train in bf16 or fp32, or look at the samples"
        )


@contextmanager
def naming_memory(run: Run) -> Iterator[None]:
    """An out-of-memory error tells the phase, the samples and what to change."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        device = f"{run.accelerator.device}"
        raise OutOfMemory(
            f"{device} ran out of memory in phase {run.watch.failed_phase} of step {run.step}, with micro-batches of "
            f"{run.config.data.batch_size}: lower {run.memory_knobs}. torch says: {str(error).splitlines()[0]}"
        ) from error


def _too_many_bad(loader: SampleLoader) -> RuntimeError:
    return RuntimeError(
        f"{len(loader.bad_items)} of {loader.plan.num_items} items could not be read, more than data.max_bad_fraction "
        f"allows ({loader.max_bad_items:g}); see {loader.bad_samples_path}. Repair them and delete that file, or raise "
        "the limit"
    )
