"""How fast a run is: throughput, time per phase, memory, counted FLOPs against what the device can do, torch traces."""

import re
import resource
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

# Dense bf16/fp16 peaks in FLOP/s by a part of the device's name, as their makers state them.
PEAK_FLOPS = {
    "B200": 2.25e15,
    "H200": 989e12,
    "GH200": 989e12,
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "A6000": 155e12,
    "L40S": 362e12,
    "A40": 150e12,
    "A10": 125e12,
    "V100": 125e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}
GIB = 2**30
MAX_COUNTS = 10  # micro-batches whose FLOPs are counted: a kind of step that starts later is not


def peak_flops(device_name: str) -> float | None:
    """Dense half-precision FLOP/s of a device; None where it is not in the table."""
    return next((peak for name, peak in PEAK_FLOPS.items() if re.search(rf"\b{name}\b", device_name)), None)


class _FlopCount(TorchDispatchMode):
    """Counts like torch's own counter, but runs every operation as it is: that one decomposes, and so rounds anew."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        formula = flop_registry.get(function._overloadpacket)
        if formula is not None:
            self.total += formula(*args, **(kwargs or {}), out_val=result)
        return result


class Meter:
    """Measures of one process, a set per optimizer step.

    FLOPs are those of a micro-batch's forward and backward pass, frozen networks included, by torch's formulas; a
    recomputation for gradient checkpointing counts, so this is hardware utilisation. They are counted once for every
    kind of step (generator, discriminator) that comes among the first few.

    Args:
        device: whose memory is read.
        micro_batches: of this process in an optimizer step.
        num_kinds: of steps that there may be.
        profile_steps: first and last optimizer step of which a torch trace is written; None writes none.
        trace_path: where the trace goes.
    """

    def __init__(
        self,
        device: torch.device,
        micro_batches: int,
        profile_steps: tuple[int, int] | None,
        trace_path: Path,
        num_kinds: int = 1,
    ):
        self.device, self.micro_batches = device, micro_batches
        self.profile_steps, self.trace_path = profile_steps, trace_path
        self.peak = peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
        self.num_kinds, self.counts_left = num_kinds, MAX_COUNTS
        self.flops_per_step: dict[str, int] = {}  # by kind of step
        self._last_count = 0
        self._profiler: Any = None

    def counting(self) -> AbstractContextManager:
        """Around the passes of a micro-batch: counts their FLOPs the first times, costs nothing afterwards."""
        done = len(self.flops_per_step) == self.num_kinds or self._last_count or not self.counts_left
        return nullcontext() if done else self._counting()

    @contextmanager
    def _counting(self) -> Iterator[None]:
        with _FlopCount() as count:
            yield
        self._last_count, self.counts_left = count.total * self.micro_batches, self.counts_left - 1

    def of_step(
        self, step_s: float, phases: dict[str, float], num_samples: int, kind: str = "model"
    ) -> dict[str, float]:
        """What is reported of a step, the one whose passes were last counted if any were.

        Args:
            kind: which learner the step trained.
            step_s: seconds from its first batch to its report.
            phases: seconds in each phase.
            num_samples: of all processes.
        """
        measures = {"step_s": step_s, "samples_per_s": num_samples / step_s}
        measures["data_wait_percent"] = 100 * phases.get("data", 0.0) / step_s
        measures |= {f"time/{name}_s": seconds for name, seconds in phases.items()}
        if self._last_count:
            self.flops_per_step[kind], self._last_count = self._last_count, 0
        if flops := self.flops_per_step.get(kind):
            measures["tflops_per_s"] = flops / step_s / 1e12
            if self.peak:
                measures["mfu_percent"] = 100 * flops / step_s / self.peak
        return measures | self.memory()

    def memory(self) -> dict[str, float]:
        """Peaks since the start: of the GPU where there is one, else of this process."""
        if self.device.type == "cuda":
            allocated, reserved = torch.cuda.max_memory_allocated, torch.cuda.max_memory_reserved
            return {
                "memory_peak_gib": allocated(self.device) / GIB,
                "memory_reserved_gib": reserved(self.device) / GIB,
            }
        unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB elsewhere
        return {"memory_peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB}

    def profile(self, step: int) -> None:
        """Called at the start of optimizer step `step`: starts or ends the trace."""
        if self.profile_steps is None:
            return
        first, last = self.profile_steps
        if step == first:
            self._profiler = torch.profiler.profile(profile_memory=True, record_shapes=True)
            self._profiler.start()
        if step == last + 1:
            self.end_profile()

    def end_profile(self) -> None:
        """Writes the trace if one is being recorded."""
        if self._profiler is not None:
            self._profiler.stop()
            self.trace_path.parent.mkdir(parents=True, exist_ok=True)
            self._profiler.export_chrome_trace(str(self.trace_path))
            self._profiler = None


def parse_steps(text: str | None) -> tuple[int, int] | None:
    """`5` or `5:8` as first and last optimizer step; ValueError for anything else."""
    if text is None:
        return None
    first, _, last = text.partition(":")
    if not first.isdecimal() or not (last or first).isdecimal() or int(last or first) < int(first):
        raise ValueError(f"profile {text!r} must be a step or FIRST:LAST, e.g. 5:8")
    return int(first), int(last or first)
