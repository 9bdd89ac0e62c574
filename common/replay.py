"""`--replay`: one step that was not finite, run again from the weights it started from, to say where that begins."""

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import nn

from common import config as configs
from common.checkpoint import read_weights
from common.data import HOST_KEYS, SampleLoader
from common.loop import Run, Task
from common.runtime import seed_model_randomness
from common.sharding import load_weights, whole

logger = logging.getLogger(__name__)


def replay(run: Run, task: Task, loader: SampleLoader, record_path: Path) -> list[str]:
    """What was found, one sentence per micro-batch of this process; also logged. Trains nothing, writes nothing.

    Raises:
        FileNotFoundError: there is no such record, or the weights beside it are gone.
        ValueError: the file is no record of a non-finite step.
    """
    record = read_record(record_path)
    for change in configs.changes(record.get("config", {}), run.config):
        if not change.path.startswith(("run.output_dir", "run.replay", "checkpoint.", "log.", "validation.")):
            logger.warning("not as when it was recorded: %s", change)
    for name, model in run.checkpoints.models.items():
        load_weights(model, read_weights(record_path.parent / name))
    findings = []
    count = run.accelerator.gradient_accumulation_steps
    with ExitStack() as stack:
        for model in run.checkpoints.models.values():
            stack.enter_context(whole(model))
        for number, batch in enumerate(loader.batches(record["first_sample"], 1), 1):
            batch: Any = send_to_device(batch, run.accelerator.device, skip_keys=HOST_KEYS)
            samples, items = batch["sample_number"].tolist(), batch["item"].tolist()
            seed_model_randomness(record["seed"], samples[0])
            what = f"micro-batch {number} of {count} (samples {samples}, items {items})"
            findings.append(f"{what}: {_examine(run, task, batch, record['step'])}")
            logger.warning("%s", findings[-1])  # of every process
    return findings


def read_record(path: Path) -> dict[str, Any]:
    """The record of a non-finite step; see `replay` for the errors."""
    if not path.is_file():
        raise FileNotFoundError(f"--replay {path}: there is no such file; records are in nonfinite/step-*/record.json")
    try:
        record = json.loads(path.read_text())
        if not {"step", "first_sample", "seed"} <= set(record):
            raise ValueError
    except (ValueError, TypeError):
        raise ValueError(f"--replay {path}: this is no record of a non-finite step") from None
    if "config" not in record:
        raise ValueError(
            f"--replay {path}: only the first step of a row is kept with its weights; name an earlier step's record"
        )
    return record


def _examine(run: Run, task: Task, batch: dict[str, Any], step: int) -> str:
    models = run.checkpoints.models
    with _first_nonfinite_output(models) as found:
        output = task.training_step(batch, step)
    is_finite = bool(torch.isfinite(output.loss))
    is_any_not = run.stop.agreed(not is_finite)  # else some would wait for the others in the backward pass
    if not is_finite:
        where = found[0] if found else "in the loss itself: every module's output is finite"
        return f"loss {output.loss.item()}; it begins {where}"
    if is_any_not:
        return f"loss {output.loss.item():.6g} is finite, that of another process is not"
    run.accelerator.backward(output.loss)
    broken = [
        f"{model_name}.{name}"
        for model_name, model in models.items()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None and not torch.isfinite(parameter.grad).all()
    ]
    for model in models.values():
        model.zero_grad(set_to_none=True)
    if broken:
        return (
            f"loss {output.loss.item():.6g} is finite, {len(broken)} gradients are not, the last layer's {broken[-1]}"
        )
    return f"loss {output.loss.item():.6g} and all gradients are finite"


@contextmanager
def _first_nonfinite_output(models: Mapping[str, nn.Module]) -> Iterator[list[str]]:
    """Fills a list with the first module, in order of execution, whose output is not finite though its input is."""
    found: list[str] = []

    def examine(name: str):
        def hook(module: nn.Module, inputs: Any, outputs: Any) -> None:
            if not found and not _all_finite(outputs):
                kind = "whose input is finite" if _all_finite(inputs) else "whose input is not finite either"
                found.append(f"in {name} ({type(module).__name__}), {kind}")

        return hook

    handles = [
        module.register_forward_hook(examine(f"{model_name}.{name}" if name else model_name))
        for model_name, model in models.items()
        for name, module in model.named_modules()
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()  # what autograd saved here would be missing when a checkpointed block is computed again
def _all_finite(values: Any) -> bool:
    if isinstance(values, torch.Tensor):
        return not values.is_floating_point() or bool(torch.isfinite(values).all())
    if isinstance(values, Mapping):
        return all(map(_all_finite, values.values()))
    if isinstance(values, (list, tuple)):
        return all(map(_all_finite, values))
    return True
