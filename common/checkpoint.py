"""Checkpoints that are whole or do not exist.

A folder is written under a hidden name beside its final one, flushed to disk, listed with sizes and SHA-256 in
`manifest.json` (written last), and renamed. A folder without a matching manifest is no checkpoint; `latest` is the
newest that matches. Inside are Accelerate's file names, a diffusers folder per model, and `trainer_state.json`.
"""

import errno
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from common.optim import EMA
from common.pretrained import weight_differences
from common.sharding import is_sharded, load_weights, whole

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
TRAINER_STATE = "trainer_state.json"
STAGING_SUFFIX, DOOMED_SUFFIX = ".partial", ".deleting"
NAME = re.compile(r"checkpoint-(\d+)")


class CheckpointError(RuntimeError):
    """A checkpoint could not be written, found or read; the text says which and what to do."""


# Whole folders --------------------------------------------------------------------------------------------------------


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def seal(directory: Path) -> None:
    """Flushes every file below `directory` to disk and writes the manifest, last."""
    files = sorted(path for path in directory.rglob("*") if path.is_file() and path != directory / MANIFEST)
    with ThreadPoolExecutor(max_workers=8) as pool:  # hashing and flushing release the interpreter lock
        digests = list(pool.map(_sha256, files))
        list(pool.map(_fsync, files))
    listing = {
        str(path.relative_to(directory)): {"size": path.stat().st_size, "sha256": digest}
        for path, digest in zip(files, digests, strict=True)
    }
    manifest = directory / MANIFEST
    manifest.write_text(json.dumps({"format": 1, "files": listing}, indent=1) + "\n")
    for path in (manifest, *(p for p in directory.rglob("*") if p.is_dir()), directory):
        _fsync(path)


def problems_of(directory: Path, *, compare_content: bool = True) -> list[str]:
    """Why `directory` is not a whole checkpoint; an empty list if it is one.

    Without `compare_content` only the presence and size of the files are checked, which reads none of them.
    """
    try:
        listing = json.loads((directory / MANIFEST).read_text())["files"]
        expected = {name: (entry["size"], entry["sha256"]) for name, entry in listing.items()}
        if not expected:
            return [f"its {MANIFEST} lists no files"]
    except FileNotFoundError:
        return [f"it has no {MANIFEST}, so it was never finished or was not written by these trainers"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return [f"its {MANIFEST} cannot be read ({type(error).__name__})"]

    def check(name: str) -> str | None:
        try:
            return compare(name)
        except (OSError, ValueError, RuntimeError) as error:  # a name that no file system takes, a link to itself
            return f"{name[:80]!r} cannot be read ({type(error).__name__})"

    def compare(name: str) -> str | None:
        path = directory / name
        if not path.resolve().is_relative_to(directory.resolve()):
            return f"{name} lies outside the folder"
        if not path.is_file():
            return f"{name} is missing"
        size, digest = expected[name]
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes instead of {size}"
        changed = compare_content and _sha256(path) != digest
        return f"the content of {name} has changed" if changed else None

    with ThreadPoolExecutor(max_workers=8) as pool:
        return [problem for problem in pool.map(check, expected) if problem]


def publish(accelerator: Accelerator, final: Path, write: Callable[[Path], None]) -> None:
    """Makes `final` appear with all that `write(folder)` puts into it, or not at all. Called on all processes.

    An older folder of that name is replaced once the new one is whole. What a failure leaves unfinished is deleted.
    """
    staging = final.with_name(f".{final.name}{STAGING_SUFFIX}")
    try:
        if accelerator.is_main_process:
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir(parents=True)
        accelerator.wait_for_everyone()
        write(staging)
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            seal(staging)
            _replace(staging, final)
        accelerator.wait_for_everyone()
    except Exception as error:
        shutil.rmtree(staging, ignore_errors=True)
        if not _is_full_disk(error):
            raise
        free_mib = shutil.disk_usage(final.parent).free >> 20
        raise CheckpointError(
            f"the disk of {final.parent} is full ({free_mib} MiB free): {final.name} was not written, older "
            "checkpoints are untouched. Free some space or lower checkpoints_total_limit, then resume with "
            "--resume_from_checkpoint latest"
        ) from error


def _is_full_disk(error: BaseException) -> bool:
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    texts = ("No space left on device", "Disk quota exceeded", "unexpected pos")  # safetensors, torch.save
    return any(text in str(error) for text in texts)


def _replace(staging: Path, final: Path) -> None:
    """Puts a sealed folder in its place; an older one of that name is deleted only after that."""
    doomed = _doom(final)
    try:
        os.rename(staging, final)  # a kill between the two: `clean_up` finishes this
    except OSError:
        if doomed.exists():
            os.rename(doomed, final)
        raise
    _fsync(final.parent)
    shutil.rmtree(doomed, ignore_errors=True)


def _doom(directory: Path) -> Path:
    """Renames a folder, if it is there, so that a kill while it is deleted leaves nothing like a checkpoint."""
    doomed = directory.with_name(f".{directory.name}{DOOMED_SUFFIX}")
    if directory.exists():
        shutil.rmtree(doomed, ignore_errors=True)
        os.rename(directory, doomed)
    return doomed


def clean_up(output_dir: Path) -> None:
    """Finishes what a kill interrupted: a sealed folder gets its name, unfinished and doomed ones are deleted."""
    for leftover in output_dir.glob(f".*{STAGING_SUFFIX}"):
        final = leftover.with_name(leftover.name[1 : -len(STAGING_SUFFIX)])
        if leftover.is_dir() and not final.exists() and not problems_of(leftover):
            os.rename(leftover, final)
        else:
            shutil.rmtree(leftover, ignore_errors=True)
    for leftover in output_dir.glob(f".*{DOOMED_SUFFIX}"):
        shutil.rmtree(leftover, ignore_errors=True)


def listed(output_dir: Path) -> list[Path]:
    """Folders named `checkpoint-<step>`, newest first, whole or not; other names are not ours."""
    found = [path for path in output_dir.glob("checkpoint-*") if path.is_dir() and NAME.fullmatch(path.name)]
    return sorted(found, key=step_of, reverse=True)


def step_of(checkpoint: Path) -> int:
    """The optimizer step in a checkpoint's name."""
    return int(NAME.fullmatch(checkpoint.name)[1])  # type: ignore[index]


def newest_valid(output_dir: Path) -> Path | None:
    """The newest whole checkpoint; the damaged ones that are passed over are named in the log."""
    for checkpoint in listed(output_dir):
        problems = problems_of(checkpoint)
        if not problems:
            return checkpoint
        logger.warning("%s is passed over: %s", checkpoint, "; ".join(problems[:3]))
    return None


# Finding one ----------------------------------------------------------------------------------------------------------


def find(accelerator: Accelerator, output_dir: Path, wanted: str | None) -> Path | None:
    """The checkpoint to resume from, agreed over all processes; None is a fresh start.

    Args:
        wanted: None, `latest` (the newest whole one, if any), a folder, or the name of one in `output_dir`, which a
            path that has since moved may end in.

    Raises:
        CheckpointError: what was named is not there or not whole, or a fresh start would mix with an earlier run.
    """
    answer: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            answer[0] = _find(output_dir, wanted)
        except CheckpointError as error:
            answer[1] = str(error)
        except Exception as error:  # the other processes wait for an answer, whatever it is
            answer[1] = f"the checkpoints in {output_dir} cannot be listed: {error}"
    broadcast_object_list(answer)
    if answer[1]:
        raise CheckpointError(answer[1])
    return answer[0]


def _find(output_dir: Path, wanted: str | None) -> Path | None:
    clean_up(output_dir)
    if not wanted:
        existing = listed(output_dir)
        if existing:
            raise CheckpointError(
                f"{output_dir} already holds {existing[0].name} of an earlier run: continue it with "
                "--resume_from_checkpoint latest, or start afresh with another --output_dir"
            )
        return None
    if wanted == "latest":
        found = newest_valid(output_dir)
        if found is None and listed(output_dir):
            raise CheckpointError(
                f"every checkpoint in {output_dir} is damaged (they are named above): restore one, or start afresh "
                "with another --output_dir"
            )
        return found
    candidates = dict.fromkeys((Path(wanted), output_dir / wanted, output_dir / Path(wanted).name))
    chosen = next((path for path in candidates if path.is_dir()), None)
    if chosen is None:
        known = ", ".join(path.name for path in listed(output_dir)) or "none"
        tried = f"; tried {', '.join(map(str, candidates))}" if len(candidates) > 1 else ""
        raise CheckpointError(f"there is no checkpoint {wanted!r}{tried}. Checkpoints in {output_dir}: {known}")
    if chosen not in (Path(wanted), output_dir / wanted):
        logger.warning("%s is not there; its namesake %s is resumed from", wanted, chosen)
    problems = problems_of(chosen)
    if problems:
        raise CheckpointError(f"{chosen} cannot be resumed from: {'; '.join(problems[:3])}")
    return chosen


def read_state(checkpoint: Path) -> dict[str, Any]:
    """`trainer_state.json` of a checkpoint."""
    return json.loads((checkpoint / TRAINER_STATE).read_text())


# Weights --------------------------------------------------------------------------------------------------------------


def save_weights(module: nn.Module, directory: Path, is_main: bool = True) -> None:
    """A diffusers folder where the module can write one, else `model.safetensors`.

    Called on all processes where the module may be sharded; the main one writes.
    """
    with whole(module, torch.device("cpu"), is_needed=is_main):
        save_pretrained = getattr(module, "save_pretrained", None)
        if is_main and callable(save_pretrained):
            save_pretrained(directory)
        elif is_main:
            directory.mkdir(parents=True, exist_ok=True)
            weights = {name: tensor.contiguous() for name, tensor in module.state_dict().items()}
            save_file(weights, directory / "model.safetensors")


def read_weights(directory: Path) -> dict[str, Tensor]:
    """All tensors of the safetensors files in a folder, one file or shards."""
    weights: dict[str, Tensor] = {}
    for path in sorted(directory.glob("*.safetensors")):
        try:
            weights |= load_file(path)
        except SafetensorError as error:
            raise CheckpointError(f"{path} is damaged, or no safetensors file: {error}") from error
    if not weights:
        raise CheckpointError(f"{directory} holds no safetensors weights")
    return weights


class TrainedWeights(nn.Module):
    """Of a network that is mostly frozen what is trained, under the same names: all that a checkpoint of it must hold.

    It takes the network's place in `Checkpoints` and `EMA`, and nowhere else. Not for sharded networks.
    """

    network: nn.Module

    def __init__(self, network: nn.Module):
        super().__init__()
        self.__dict__["network"] = network  # no submodule, which would prefix the names

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """The trained ones."""
        return ((n, p) for n, p in self.network.named_parameters(*args, **kwargs) if p.requires_grad)

    def named_modules(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Module]]:
        """Those of the network."""
        return self.network.named_modules(*args, **kwargs)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        return {name: parameter.detach() for name, parameter in self.named_parameters()}

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> None:
        for name, tensor in self.state_dict().items():
            tensor.copy_(state_dict[name])


def save_average(ema: EMA, directory: Path, is_main: bool = True) -> None:
    """The averaged model, with its counters in config.json: diffusers' `EMAModel.from_pretrained` reads the folder.

    Called as `save_weights` is.
    """
    with ema.swapped():
        save_weights(ema.module, directory, is_main)
    if not is_main:
        return
    path = directory / "config.json"
    config = json.loads(path.read_text()) if path.exists() else {}
    min_decay = 0.0 if ema.warmup else ema.decay
    config |= {"decay": ema.decay, "min_decay": min_decay, "optimization_step": ema.updates, "update_after_step": 0}
    config |= {"use_ema_warmup": False, "inv_gamma": 1.0, "power": 2 / 3}
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def load_average(ema: EMA, directory: Path) -> None:
    """The state that `save_average` wrote."""
    config = json.loads((directory / "config.json").read_text())
    ema.restore(read_weights(directory), config["optimization_step"])


# The checkpoints of a run ---------------------------------------------------------------------------------------------


class Checkpoints:
    """Saves and restores a run. Every method is called on all processes.

    Args:
        accelerator: after `prepare`.
        output_dir: folder of the checkpoints.
        models: unwrapped trained models in the order in which they were prepared, by folder name.
        emas: moving averages, by the name of their model.
        total_limit: how many are kept; None is all.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        output_dir: Path,
        models: Mapping[str, nn.Module],
        emas: Mapping[str, EMA],
        total_limit: int | None,
    ):
        self.accelerator, self.output_dir = accelerator, output_dir
        self.models, self.emas, self.total_limit = dict(models), dict(emas), total_limit
        self.resumed_from: Path | None = None
        accelerator.register_save_state_pre_hook(self._save_models)
        accelerator.register_load_state_pre_hook(self._load_models)

    def save(self, step: int, trainer_state: Mapping[str, Any]) -> Path:
        """Writes `checkpoint-<step>` and then rotates."""
        final = self.output_dir / f"checkpoint-{step}"

        def write(staging: Path) -> None:
            self.accelerator.save_state(str(staging))
            if self.accelerator.is_main_process:
                (staging / TRAINER_STATE).write_text(json.dumps(trainer_state, indent=1) + "\n")

        publish(self.accelerator, final, write)
        if self.accelerator.is_main_process:
            self._rotate(final)
        self.accelerator.wait_for_everyone()
        return final

    def load(self, checkpoint: Path) -> None:
        """Models, optimizers, EMA, scaler and generators as they were saved.

        Newer checkpoints in `output_dir` belong to a course that is now left: they are renamed to `abandoned-...`.

        Raises:
            CheckpointError: weights are of another network, or an optimizer's state is of other parameters.
        """
        # A whole optimizer has no place on the device of a shard, nor once per process in the memory of the host.
        is_any_sharded = any(map(is_sharded, self.models.values()))
        how: dict[str, Any] = {"map_location": "cpu", "load_kwargs": {"mmap": True}} if is_any_sharded else {}
        try:
            self.accelerator.load_state(str(checkpoint), **how)
        except ValueError as error:
            if "parameter group" not in str(error):
                raise
            raise CheckpointError(
                f"{checkpoint} cannot be resumed: its optimizer trained other parameters than this run does ({error}). "
                "Set back what decides on them"
            ) from error
        self.accelerator.step = 0  # accumulation starts anew at every optimizer step, whatever it was before
        self.resumed_from = checkpoint
        if self.accelerator.is_main_process and checkpoint.resolve().parent == self.output_dir.resolve():
            step = read_state(checkpoint)["step"]  # its name may be another one: `best`, `abandoned-0-checkpoint-5`
            for newer in listed(self.output_dir):
                if step_of(newer) > step:
                    self._abandon(newer)
        self.accelerator.wait_for_everyone()

    def _abandon(self, newer: Path) -> None:
        number = 0
        while (aside := newer.with_name(f"abandoned-{number}-{newer.name}")).exists():
            number += 1
        os.rename(newer, aside)
        logger.warning("%s is newer than what is resumed from: it is now %s", newer.name, aside)

    def _rotate(self, newest: Path) -> None:
        """Deletes the oldest whole ones beyond the limit, but not the newest nor the one this run was resumed from."""
        if self.total_limit is None:
            return
        kept = {path.resolve() for path in (newest, self.resumed_from) if path}
        whole = [path for path in listed(self.output_dir) if not problems_of(path, compare_content=False)]
        for old in whole[self.total_limit :]:
            if old.resolve() not in kept:
                shutil.rmtree(_doom(old), ignore_errors=True)

    def _save_models(self, models: list[nn.Module], weights: list[dict[str, Tensor]], output_dir: str) -> None:
        weights.clear()  # Accelerate writes no model.safetensors: each model has its own folder
        is_main = self.accelerator.is_main_process
        for name, model in self.models.items():
            save_weights(model, Path(output_dir) / name, is_main)
        for name, ema in self.emas.items():
            save_average(ema, Path(output_dir) / f"{name}_ema", is_main)

    def _load_models(self, models: list[nn.Module], input_dir: str) -> None:
        models.clear()
        for name, model in self.models.items():
            weights = read_weights(Path(input_dir) / name)
            if differences := weight_differences(model, weights):
                raise CheckpointError(
                    f"{input_dir} cannot be resumed: its {name} is another network than this run's "
                    f"({'; '.join(differences)}). Set back what decides on it"
                )
            load_weights(model, weights)
        for name, ema in self.emas.items():
            load_average(ema, Path(input_dir) / f"{name}_ema")
