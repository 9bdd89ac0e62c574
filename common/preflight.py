"""`--preflight`: everything that could end a run hours later, tried now in a scratch folder."""

import dataclasses
import json
import logging
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from common.loop import EXPORT
from common.measure import GIB
from common.runtime import Processes, free_memory
from common.video import save_image

logger = logging.getLogger(__name__)

SCRATCH = ".preflight"
STEPS_BEFORE_RESUME, STEPS = 2, 3


def preflight(
    config: Any, train: Callable[[Any], None], draw_samples: Callable[[Any], np.ndarray], processes: Processes
) -> bool:
    """Draws data, trains two steps, validates, saves, resumes, trains one more, exports, and says what it found.

    Args:
        config: the trainer's configuration.
        train: the trainer's training function; it is called twice, with a scratch output folder.
        draw_samples: a contact sheet of a few training samples, uint8 (H, W, 3).
        processes: the Accelerator.

    Returns:
        True if the run can start. Errors are raised as they would be in the run itself.
    """
    output_dir = Path(config.run.output_dir).resolve()
    was_there, scratch = output_dir.exists(), output_dir / SCRATCH
    sheet = output_dir.with_name(f"{output_dir.name}-preflight-samples.png")
    lines = []
    try:
        if processes.is_main_process:
            shutil.rmtree(scratch, ignore_errors=True)
            save_image(sheet, draw_samples(config))
            lines.append(f"data        samples are drawn in {sheet}: look at them")
        processes.wait_for_everyone()
        started = time.perf_counter()
        train(scratch_config(config, scratch, STEPS_BEFORE_RESUME, None))
        free_memory()  # the first network goes before the second comes
        train(scratch_config(config, scratch, STEPS, "latest"))
        lines.append(
            f"micro-run   trained, validated, saved, resumed, exported in {time.perf_counter() - started:.1f} s"
        )
        ready = True
        if processes.is_main_process:
            lines += _timings(scratch)
            ready, disk = _disk(config, scratch)
            lines.append(disk)
    finally:  # without waiting: after an error the others may be in a collective, which would not answer
        if processes.is_main_process:
            shutil.rmtree(scratch, ignore_errors=True)
            if not was_there and output_dir.exists():
                output_dir.rmdir()
    if processes.is_main_process:
        print("\n".join(["", "preflight", *lines, f"verdict     {'ready to train' if ready else 'NOT ready'}"]))
    return ready


def scratch_config(config: Any, scratch: Path, steps: int, resume: str | None) -> Any:
    """The configuration with a folder of its own, a few steps, and every phase taken once."""
    changes = {
        "run": {"output_dir": str(scratch), "max_train_steps": steps, "preflight": False},
        "checkpoint": {"checkpointing_steps": STEPS_BEFORE_RESUME, "resume_from_checkpoint": resume},
        "log": {"report_to": "none", "log_every_steps": 1, "profile": None},
        "validation": {"validation_steps": STEPS, "validate_at_start": False},
    }
    if hasattr(config.validation, "max_validation_items"):
        changes["validation"]["max_validation_items"] = 1
    sections = {name: dataclasses.replace(getattr(config, name), **values) for name, values in changes.items()}
    return dataclasses.replace(config, **sections)


def _timings(scratch: Path) -> list[str]:
    """Seconds per phase and peak memory of the micro-run."""
    records = [json.loads(line) for line in (scratch / "metrics.jsonl").read_text().splitlines()]
    trained = [record for record in records if record["kind"] == "train"]
    phases = {key[5:-2]: trained[-1][key] for key in trained[-1] if key.startswith("time/")}
    validation_s = [record["validation_s"] for record in records if record["kind"] == "validation"]
    phases |= {"validation (1 item)": validation_s[-1]} if validation_s else {}
    seconds = ", ".join(f"{name} {value:.3g}" for name, value in phases.items())
    peak = max(record["memory_peak_gib"] for record in trained)
    return [
        f"step        {trained[-1]['step_s']:.3g} s, {trained[-1]['samples_per_s']:.3g} samples/s",
        f"phases (s)  {seconds}",
        f"memory      peak {peak:.2f} GiB",
    ]


def _disk(config: Any, scratch: Path) -> tuple[bool, str]:
    """Whether the checkpoints that the run plans will fit."""
    checkpoint_bytes = _size(next(scratch.glob("checkpoint-*")))
    export_bytes = _size(scratch / EXPORT)
    limit = config.checkpoint.checkpoints_total_limit
    if limit is None and config.run.max_train_steps:
        limit = -(-config.run.max_train_steps // config.checkpoint.checkpointing_steps)
    kept = (limit or 1) + 1  # a new one is written before the oldest goes
    needed, free = kept * checkpoint_bytes + export_bytes, shutil.disk_usage(scratch).free
    text = (
        f"disk        {kept} checkpoints of {checkpoint_bytes / GIB:.2f} GiB and the export need {needed / GIB:.2f} GiB"
    )
    if needed > free:
        return False, f"{text}, but only {free / GIB:.2f} GiB are free: set --checkpoints_total_limit, or free some"
    more = "" if limit else "; without --checkpoints_total_limit they will be more and more"
    return True, f"{text}, {free / GIB:.2f} GiB are free{more}"


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
