"""What the commands beside training share: how they start, share their work, keep what is there already, and end.

A tool makes one result for each of its jobs. What a job is and how its result is made is the tool's own; a job's text
(`str`) is how messages name it.
"""

import json
import logging
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from tqdm.auto import tqdm

from common import runtime
from common.config import Parser, Section, option
from common.data import BAD_SAMPLE_ERRORS
from common.pretrained import read_json
from common.runtime import Processes
from common.video import IMAGE_SUFFIXES

logger = logging.getLogger(__name__)

T = TypeVar("T")


# Settings -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class DeviceConfig(Section):
    device: str | None = option("auto", "auto (or null) takes the GPUs if there are any; cpu, cuda, or cuda:1 for one")

    def __post_init__(self) -> None:
        if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", (self.device or "auto").lower()):
            raise ValueError(f"device {self.device!r} is unknown: use auto, cpu, cuda or cuda:N")


@dataclass(frozen=True, kw_only=True)
class ToolConfig(DeviceConfig):
    mixed_precision: Literal["no", "fp32", "fp16", "bf16"] | None = option(
        None, "type of the computation; null is the launcher's, and without one bf16 on a GPU, fp32 on a CPU"
    )


def required(config: Any, settings: Mapping[str, str]) -> list[str]:
    """A sentence for each of the `settings`, `section.field` -> what it takes, that is not given."""
    problems = []
    for path, meaning in settings.items():
        section, name = path.split(".")
        if not getattr(getattr(config, section), name):
            problems.append(f"--{name} is required: {meaning}")
    return problems


# Start and end --------------------------------------------------------------------------------------------------------


@contextmanager
def started(
    parser: Parser, argv: Sequence[str] | None, default_half: str = "bf16"
) -> Iterator[tuple[Any, Any, torch.dtype]]:
    """The configuration of the command line, the Accelerator, and the type of the computation; errors end it clearly.

    Args:
        parser: of a configuration whose section `run` is a `DeviceConfig`, or a `ToolConfig`.
        argv: None is the process's own.
        default_half: type on a GPU where neither the configuration nor the launcher names one.
    """
    config, warnings = parser.parse_or_exit(argv)
    with runtime.clear_errors():
        precision = config.run.mixed_precision if isinstance(config.run, ToolConfig) else "no"
        accelerator, dtype = runtime.start_tool(config.run.device, precision, default_half)
        for warning in warnings if accelerator.is_main_process else ():
            logger.warning("%s", warning)
        yield config, accelerator, dtype


def exit_if(failures: Mapping[Any, str]) -> None:
    """Ends the process with status 1 if something went wrong."""
    if failures:
        sys.exit(1)


# Inputs and outputs ---------------------------------------------------------------------------------------------------


def list_images(source: Path, flag: str, suffixes: Sequence[str] = IMAGE_SUFFIXES) -> list[Path]:
    """The images of a folder by name, or the one image; ValueError for a folder without any names the `flag`."""
    if not source.is_dir():
        return [source]
    images = sorted(p for p in source.iterdir() if p.suffix.lower() in suffixes and not p.name.startswith("."))
    if not images:
        raise ValueError(f"{flag} {source} holds no images: files ending in {', '.join(suffixes)} are looked for")
    return images


def require_distinct(inputs: Sequence[Path], outputs: Sequence[Path]) -> None:
    """ValueError if several inputs would be written to one output."""
    twice = [output for output, count in Counter(outputs).items() if count > 1]
    if twice:
        files = " and ".join(str(path) for path, output in zip(inputs, outputs, strict=True) if output == twice[0])
        raise ValueError(f"{files} would both be written to {twice[0]}: rename one")


def output_folder(output_dir: str | None) -> Path:
    """The folder for results; ValueError if it is a file."""
    folder = Path(str(output_dir))
    if folder.is_file():
        raise ValueError(f"--output_dir {folder} is a file, but must be a folder")
    return folder


# What is there already ------------------------------------------------------------------------------------------------


def write_text(path: Path, text: str) -> None:
    """Writes a file that appears whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.tmp")
    # Of the names that JSON may hold, those that are no valid text become JSON's own escapes.
    unfinished.write_text(text, encoding="utf-8", errors="backslashreplace")
    os.replace(unfinished, path)


def write_json(path: Path, content: Any) -> None:
    """Writes a JSON file that appears whole."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def is_made(record: Path, recipe: Mapping[str, Any]) -> bool:
    """Whether a result is there: its record is written last, and says what the result was made with.

    Raises:
        ValueError: it was made with something else than `recipe` says, or the record is damaged.
    """
    if not record.is_file():
        return False
    differing = _differing(read_json(record), json.loads(json.dumps(recipe)))  # tuples as they are read back
    if differing:
        raise ValueError(
            f"{record} was made with another {', '.join(differing)}: give another --output_dir, or --overwrite true"
        )
    return True


def _differing(made: Any, wanted: Mapping[str, Any]) -> list[str]:
    found, made = [], made if isinstance(made, dict) else {}
    for name, value in wanted.items():
        if isinstance(value, dict):
            found += _differing(made.get(name), value)
        elif made.get(name) != value:
            found.append(name)
    return found


# The work -------------------------------------------------------------------------------------------------------------


def say_kept(num_kept: int, num_jobs: int, noun: str, processes: Processes, has_overwrite: bool = True) -> None:
    """Says how many results are there already; called on all processes, once each has looked what is missing."""
    processes.wait_for_everyone()  # nobody writes before all have looked
    if num_kept and processes.is_main_process:
        remedy = "; --overwrite true makes them again" if has_overwrite else ""
        print(f"{num_kept} of {num_jobs} {noun}s exist and are kept{remedy}")


def share_of(jobs: Sequence[T], processes: Processes) -> Sequence[T]:
    """This process's part."""
    return jobs[processes.process_index :: processes.num_processes]


def in_batches(jobs: Sequence[T], batch_size: int) -> list[Sequence[T]]:
    """Neighbours, at most `batch_size` of them."""
    return [jobs[first : first + batch_size] for first in range(0, len(jobs), batch_size)]


def attempt(jobs: Sequence[T], make: Callable[[Sequence[T]], None]) -> dict[T, str]:
    """Makes some results; one that cannot be made does not take the others with it. Returns why each failed."""
    try:
        make(jobs)
    except BAD_SAMPLE_ERRORS as error:
        if len(jobs) == 1:
            reason = str(error).removeprefix(f"{jobs[0]}: ")
            tqdm.write(f"not made: {jobs[0]}: {reason}", file=sys.stderr)
            return {jobs[0]: reason}
        return {job: reason for one in jobs for job, reason in attempt([one], make).items()}
    return {}


def attempt_all(
    batches: Sequence[Sequence[T]], make: Callable[[Sequence[T]], None], noun: str, processes: Processes
) -> dict[T, str]:
    """Makes this process's results, batch by batch; returns why each failed."""
    failures: dict[T, str] = {}
    with tqdm(total=sum(map(len, batches)), unit=noun, disable=not processes.is_main_process) as bar:
        for batch in batches:
            failures |= attempt(batch, make)
            bar.update(len(batch))
    return failures


def say_failures(failures: Mapping[Any, str], noun: str, processes: Processes) -> None:
    """Says what went wrong; called on all processes, each with failures of its own."""
    if failures:
        lines = "".join(f"\n  {job}: {reason}" for job, reason in failures.items())
        print(f"{len(failures)} {noun}s went wrong:{lines}", file=sys.stderr)
    processes.wait_for_everyone()  # a launcher ends all as soon as one has failed


def conclude(
    written_last: Sequence[Path], output: str | None, failures: Mapping[Any, str], noun: str, processes: Processes
) -> None:
    """Says what came of it; called on all processes, each with failures of its own.

    Args:
        written_last: of each job the file that is there once its result is.
    """
    say_failures(failures, noun, processes)
    if processes.is_main_process:
        print(f"{sum(path.is_file() for path in written_last)} of {len(written_last)} {noun}s are there: {output}")
