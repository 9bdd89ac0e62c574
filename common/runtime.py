"""Accelerator set-up: processes, precision, seeds, process-group timeout, stop signals."""

import ctypes
import logging
import math
import os
import platform
import random
import signal
import sys
import time
import traceback
import uuid
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from importlib import metadata
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import numpy as np
import torch
from accelerate import Accelerator, DistributedType
from accelerate.utils import (
    DeepSpeedPlugin,
    DistributedDataParallelKwargs,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
    broadcast_object_list,
    gather_object,
    patch_environment,
)
from accelerate.utils.memory import clear_device_cache
from torch import Tensor

from common.config import CODE, RunConfig
from common.data import rng_for
from common.sharding import Sharding, shard, sharding_of_launcher

logger = logging.getLogger(__name__)

TOOL_WAIT_S = 7 * 24 * 3600

PR_SET_PDEATHSIG = 1  # of linux/prctl.h
LAUNCHERS = (b"accelerate", b"torchrun", b"torch.distributed.run")


class Processes(Protocol):
    """What a task needs to know of the processes that it shares its work with; `accelerate.Accelerator` has it."""

    @property
    def process_index(self) -> int: ...
    @property
    def num_processes(self) -> int: ...
    @property
    def is_main_process(self) -> bool: ...
    @property
    def device(self) -> torch.device: ...
    def reduce(self, tensor: Tensor, reduction: str = "sum") -> Tensor: ...
    def wait_for_everyone(self) -> None: ...


class ShardingAccelerator(Accelerator):
    """An Accelerator whose `prepare` shards a network and its optimizer (FSDP2).

    Accelerate itself shards on GPUs only, and saves in another format. Here it sees plain data-parallel processes, with
    or without a GPU, and its checkpoints are those of such a run.
    """

    def __init__(self, sharding: Sharding, **settings: Any):
        with patch_environment(accelerate_use_fsdp="false"):
            super().__init__(**settings)
        self.sharding = sharding

    def prepare(self, *objects: Any, **_: Any) -> Any:
        """The one network of a run and its optimizer."""
        model, optimizer = objects
        shard(model, optimizer, self.sharding, self.device, self.mixed_precision)
        # Evaluation mode adds autocast alone, and no DDP.
        return self.prepare_model(model, evaluation_mode=True), self.prepare_optimizer(optimizer, False)


def start(
    run: RunConfig,
    gradient_accumulation_steps: int,
    *,
    max_grad_norm: float = 0.0,
    num_networks: int = 1,
    find_unused_parameters: bool = False,
) -> Accelerator:
    """The Accelerator of a run, for any launcher: plain python, torchrun, `accelerate launch`.

    Accumulation windows never end early, loaders and schedules are ours, `mixed_precision` null obeys the launcher.

    Args:
        max_grad_norm: for DeepSpeed, which clips by itself; 0 is off.
        num_networks: how many the trainer trains, in turns.

    Raises:
        ValueError: the launcher was told of a way to train that does not work here.
    """
    _end_with_launcher()
    sharding = sharding_of_launcher()
    if num_networks > 1 and (sharding or _launched_with_deepspeed()):
        name = "FSDP" if sharding else "DeepSpeed"
        raise ValueError(
            f"{name} shards one network per run, and this trainer trains two in turns: launch it without {name}, e.g. "
            "with accelerate_configs/ddp.yaml"
        )
    if _launched_with_deepspeed():
        require_deepspeed_settings(DeepSpeedPlugin(), gradient_accumulation_steps, max_grad_norm)
    if sharding is not None:
        os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"  # transformers would load on the main process alone
    accelerator = (partial(ShardingAccelerator, sharding) if sharding else Accelerator)(
        cpu=_runs_on_cpu(),
        mixed_precision=_precision(run.mixed_precision),
        gradient_accumulation_plugin=GradientAccumulationPlugin(
            num_steps=gradient_accumulation_steps, adjust_scheduler=False, sync_with_dataloader=False
        ),
        step_scheduler_with_optimizer=False,
        kwargs_handlers=[
            # Accelerate chooses no backend for DeepSpeed without a GPU, and would then see separate runs.
            InitProcessGroupKwargs(
                backend=None if torch.accelerator.is_available() or not _launched_with_deepspeed() else "gloo",
                timeout=timedelta(seconds=run.process_group_timeout_s),
            ),
            DistributedDataParallelKwargs(find_unused_parameters=find_unused_parameters, gradient_as_bucket_view=True),
        ],
    )
    if accelerator.state.deepspeed_plugin is not None:
        config = accelerator.state.deepspeed_plugin.deepspeed_config
        _set_up_deepspeed(config, accelerator.mixed_precision, max_grad_norm)
    _set_up_logging(accelerator)
    if run.allow_tf32:
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True
    return accelerator


def choose_device(wanted: str | None) -> None:
    """Keeps to `wanted` (auto, cpu, cuda, cuda:N or None); called before the first look at the GPUs.

    Raises:
        ValueError: for a GPU that is not there, or one GPU for several processes.
    """
    kind, _, number = (wanted or "auto").lower().partition(":")
    if kind == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    elif kind == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {wanted}: PyTorch sees no CUDA GPU here; use --device auto or cpu")
    elif number and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError(
            f"--device {wanted} is one GPU, but several processes were started: use --device cuda, and "
            "CUDA_VISIBLE_DEVICES to choose among the GPUs"
        )
    elif number and int(number) >= torch.cuda.device_count():
        raise ValueError(f"--device {wanted}: PyTorch sees {torch.cuda.device_count()} CUDA GPUs; use --device auto")
    elif number:
        torch.cuda.set_device(int(number))  # what Accelerate calls "cuda" is then this one


def half_by_default(wanted: str | None, half: str = "bf16") -> str | None:
    """`wanted` as Accelerate spells it; None is the launcher's choice, and where it made none `half` on a GPU."""
    # `accelerate launch` sets "no" where nobody has asked for anything.
    if wanted is None and os.environ.get("ACCELERATE_MIXED_PRECISION", "no") == "no":
        return half if torch.accelerator.is_available() else "no"
    return "no" if wanted == "fp32" else wanted


def start_tool(
    device: str | None, mixed_precision: str | None, default_half: str = "bf16"
) -> tuple[Accelerator, torch.dtype]:
    """The Accelerator of a tool that only runs networks, for any launcher, and the type of the computation.

    Args:
        device: as `choose_device` takes it.
        mixed_precision, default_half: as `half_by_default` takes them; fp16 becomes float32 where there is no GPU, and
            that is said.

    Raises:
        ValueError: for a GPU that is not there.
    """
    choose_device(device)
    precision = _precision(half_by_default(mixed_precision, default_half) or os.environ["ACCELERATE_MIXED_PRECISION"])
    # Those who are done first wait for the others, which takes as long as their results do.
    accelerator = start(RunConfig(mixed_precision="no", process_group_timeout_s=TOOL_WAIT_S), 1)
    return accelerator, {"fp16": torch.float16, "bf16": torch.bfloat16}.get(str(precision), torch.float32)


def require_deepspeed_settings(plugin: Any, gradient_accumulation_steps: int, max_grad_norm: float) -> None:
    """ValueError for settings of the launcher that do not work here, or contradict the trainer's."""
    config, problems = plugin.deepspeed_config, []
    if plugin.zero_stage == 3:
        problems.append(
            "zero_stage must be 2 at most: 3 spreads frozen networks too, which are read whole here; where the trained "
            "network does not fit one GPU, launch with accelerate_configs/fsdp2.yaml"
        )
    for name in ("offload_optimizer_device", "offload_param_device"):
        if getattr(plugin, name) not in (None, "none"):
            problems.append(f"{name} must be none: DeepSpeed would replace the optimizer by another")
    of_trainer = {"gradient_accumulation_steps": gradient_accumulation_steps, "gradient_clipping": max_grad_norm}
    for name, value in of_trainer.items():
        if config.get(name, "auto") not in ("auto", 0, value):
            problems.append(f"{name} must be left out, not {config[name]}: the trainer's own setting says {value:g}")
    if problems:
        raise ValueError(f"launcher settings: {'; '.join(problems)}. See accelerate_configs/1_gpus_zero2.yaml")


def _set_up_deepspeed(config: dict[str, Any], precision: str, max_grad_norm: float) -> None:
    """Weights stay in float32 and compute under autocast, as without DeepSpeed, which would halve their precision.

    Raises:
        ValueError: for fp16.
    """
    if precision == "fp16":
        raise ValueError(
            "mixed_precision fp16 does not work with DeepSpeed here, which would clip gradients before it undoes their "
            "scaling, and save no scale: use bf16, or launch with accelerate_configs/ddp.yaml"
        )
    config["train_micro_batch_size_per_gpu"] = 1  # DeepSpeed's own count of throughput alone uses it
    config["gradient_clipping"] = max_grad_norm
    if precision == "bf16":
        config["bf16"] = {"enabled": False}
        config["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}


def _end_with_launcher() -> None:
    """A launcher that ends takes its processes along: they get SIGTERM, save and stop, instead of going on alone.

    Only for launchers: a shell may well end before what was started from it.
    """
    if sys.platform != "linux":
        return
    command = Path(f"/proc/{os.getppid()}/cmdline").read_bytes()
    if any(launcher in command for launcher in LAUNCHERS):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _runs_on_cpu() -> bool:
    """Without saying so, Accelerate takes the processes of a machine without a GPU for so many separate runs."""
    return not torch.accelerator.is_available() and not _launched_with_deepspeed()


def _launched_with_deepspeed() -> bool:
    """Whether `accelerate launch` was told so."""
    return os.environ.get("ACCELERATE_USE_DEEPSPEED", "false") == "true"


def _precision(wanted: str | None) -> str | None:
    """fp16 needs a GPU: on a machine without one the run goes on in float32, and says so."""
    asked = wanted or os.environ.get("ACCELERATE_MIXED_PRECISION")
    if asked == "fp16" and not torch.accelerator.is_available():
        if int(os.environ.get("RANK", 0)) == 0:
            print("mixed_precision fp16 needs a GPU and there is none: this run uses float32", file=sys.stderr)
        return "no"
    return wanted


def _set_up_logging(accelerator: Accelerator) -> None:
    """Messages of the main process on stderr; warnings and errors of every process, with its rank."""
    prefix = f"[rank {accelerator.process_index}] " if accelerator.num_processes > 1 else ""
    logging.basicConfig(
        level=logging.INFO if accelerator.is_main_process else logging.WARNING,
        format=f"%(asctime)s {prefix}%(levelname)s %(message)s",
        datefmt="%H:%M:%S",
        stream=sys.stderr,
        force=True,
    )
    quiet_libraries()


def quiet_libraries() -> None:
    """Keeps libraries' chatter and loading bars out of a run's output; their warnings stay, diffusers' errors too."""
    warnings.filterwarnings("ignore", message="This DataLoader will create")  # the user's num_workers is a wish
    for name in ("httpx", "httpcore", "PIL", "accelerate", "absl"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    for name in ("diffusers", "transformers"):
        if name in sys.modules:
            sys.modules[name].utils.logging.disable_progress_bar()


def weight_dtype(accelerator: Accelerator) -> torch.dtype:
    """The type in which frozen modules are held: that of autocast, else float32."""
    return {"fp16": torch.float16, "bf16": torch.bfloat16}.get(accelerator.mixed_precision, torch.float32)


def uses_deepspeed(accelerator: Accelerator) -> bool:
    """Whether a DeepSpeed engine steps the optimizer."""
    return accelerator.distributed_type == DistributedType.DEEPSPEED


def seed_model_randomness(seed: int, first_sample: int) -> None:
    """Seeds the global generators, from which dropout layers draw, by the number of a micro-batch's first sample.

    A micro-batch then meets the same masks whatever the number of processes and of accumulated micro-batches.
    """
    value = int(rng_for(seed, "model randomness", first_sample).integers(2**32))
    random.seed(value)
    np.random.seed(value)
    torch.manual_seed(value)


def free_memory() -> None:
    """Gives back what nothing refers to any more, on the host and on the GPU."""
    clear_device_cache(garbage_collection=True)


def versions() -> dict[str, str]:
    """Versions of what a run's numbers depend on, for the record."""
    packages = ("torch", "accelerate", "diffusers", "transformers", "numpy")
    return {"python": platform.python_version(), **{name: metadata.version(name) for name in packages}}


@contextmanager
def clear_errors() -> Iterator[None]:
    """Errors that this project raises on purpose are printed as one sentence and end the process with status 1.

    Everything else keeps its traceback: it is a mistake of the program, or of a library.
    """
    try:
        yield
    except StopRequested as stop:
        print(f"stopped before the first step: {stop}", file=sys.stderr)
        sys.exit(0)
    except (ValueError, OSError, RuntimeError) as error:
        frames = traceback.extract_tb(error.__traceback__)
        source, line = Path(frames[-1].filename), frames[-1].line or ""
        if not _is_ours(source) or not line.startswith("raise ") or isinstance(error, NotImplementedError):
            raise
        rank = f"[rank {os.environ.get('RANK', '?')}] " if int(os.environ.get("WORLD_SIZE", 1)) > 1 else ""
        print(f"{rank}error: {error}", file=sys.stderr, flush=True)
        sys.exit(1)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _is_ours(source: Path) -> bool:
    """Whether a source file is this project's: of the repository, in which .venv may lie, or of an installation."""
    if not source.is_relative_to(CODE):
        return False
    inside = source.relative_to(CODE).parts
    if "site-packages" in CODE.parts:
        return "visual-trainers" in metadata.packages_distributions().get(inside[0], ())
    return "site-packages" not in inside


def require_shared_folder(processes: Processes, folder: Path, setting: str = "run.output_dir") -> None:
    """Makes `folder` and checks that every process sees the same one.

    Raises:
        OSError: it is a file, or some do not; on all of them, since people read the main process's output.
    """
    if folder.is_file():
        raise OSError(f"{setting} {folder} is a file, but must be a folder")
    token = [uuid.uuid4().hex]
    broadcast_object_list(token)
    marker = folder / f".shared-{token[0]}"
    if processes.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        marker.touch()
    processes.wait_for_everyone()
    blind = [rank for rank, sees in enumerate(gather_object([marker.exists()])) if not sees]
    if processes.is_main_process:
        marker.unlink()
    if blind:
        who = f"process {blind[0]} does" if len(blind) == 1 else f"processes {', '.join(map(str, blind))} do"
        raise OSError(
            f"{who} not see {setting} {folder.resolve()} of the main process: "
            "all nodes save into it, so it must be on a file system that they share"
        )


class StopRequested(Exception):
    """Raised on all processes at once, in the middle of long work, when one of them was asked to stop."""


class StopSignal:
    """SIGTERM, SIGINT, SIGUSR1 or the end of the allowed time ask for a checkpoint and a clean end.

    A second signal ends the process at once. The processes agree before any of them acts.

    Args:
        processes: the Accelerator.
        max_train_time_s: seconds after which the run stops as if signalled; None is no limit.
        timeout_s: how long one process may wait for another.
    """

    def __init__(self, processes: Processes, max_train_time_s: float | None = None, timeout_s: float = 1800.0):
        # Numbers alone: the signal handlers outlive a run, and would keep its networks in memory with the Accelerator.
        self.process_index, self.num_processes, self.received = processes.process_index, processes.num_processes, ""
        self.on_progress: Callable[[], None] = lambda: None  # called between the items of shared work
        self.deadline = None if max_train_time_s is None else time.monotonic() + max_train_time_s
        # Flags travel over gloo: that neither waits for the GPU nor makes the GPU wait.
        waits = timedelta(seconds=timeout_s)
        self.group: Any = torch.distributed.new_group(backend="gloo", timeout=waits) if self.num_processes > 1 else None
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, self._receive)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.received:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.received = signal.Signals(number).name
        print(f"{self.received}: saving, then stopping; once more stops at once", file=sys.stderr, flush=True)

    @property
    def is_wanted(self) -> bool:
        """This process was asked to stop, or its time is up."""
        if not self.received and self.deadline is not None and time.monotonic() > self.deadline:
            self.received = "max_train_time"
        return bool(self.received)

    def agreed(self, flag: bool) -> bool:
        """True on all processes if `flag` is on any; called on all of them."""
        if self.group is None:
            return flag
        flags = torch.tensor([float(flag)])
        torch.distributed.all_reduce(flags, torch.distributed.ReduceOp.MAX, group=self.group)
        return bool(flags.item())

    def gathered(self, value: float) -> list[float]:
        """A number of every process, by rank; called on all of them."""
        if self.group is None:
            return [value]
        values = [torch.zeros(1, dtype=torch.float64) for _ in range(self.num_processes)]
        torch.distributed.all_gather(values, torch.tensor([value], dtype=torch.float64), group=self.group)
        return [number.item() for number in values]

    def share(self, count: int) -> Iterator[int]:
        """This process's part of the indices 0 ... count - 1, one at a time, called on all processes.

        Raises:
            StopRequested: on all processes in the same round, when one of them was asked to stop.
        """
        for first in range(0, count, self.num_processes):
            if self.agreed(self.is_wanted):
                raise StopRequested(self.received or "another process was asked to stop")
            self.on_progress()
            if first + self.process_index < count:
                yield first + self.process_index


def stop_signal(processes: Processes, run: RunConfig) -> StopSignal:
    """The stop signal of a run; ValueError for a `max_train_time` that cannot be read."""
    max_train_time_s = seconds_of(run.max_train_time) if run.max_train_time else None
    return StopSignal(processes, max_train_time_s, run.process_group_timeout_s)


def seconds_of(duration: str) -> float:
    """`90`, `1:30` or `0:01:30` (days may come first: `1-00:00:00`, as Slurm writes them) in seconds.

    Raises:
        ValueError: it is none of these.
    """
    days, dash, clock = duration.rpartition("-")
    try:
        parts = [float(part) for part in clock.split(":")]
        has_days = bool(dash)  # Slurm reads D-HH as days and hours: not to be taken for seconds
        is_count_right = len(parts) == 3 if has_days else 1 <= len(parts) <= 3
        if not is_count_right or (has_days and not days.isdigit()) or not all(0 <= part < math.inf for part in parts):
            raise ValueError
    except ValueError:
        raise ValueError(f"{duration!r} is no duration: write seconds, MM:SS, HH:MM:SS or D-HH:MM:SS") from None
    return float(days or 0) * 86400 + sum(part * 60**place for place, part in enumerate(reversed(parts)))
