"""Encoded items on disk, each a safetensors file, usable only under the fingerprint they were made with."""

import hashlib
import json
import logging
import os
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from common.data import BAD_SAMPLE_ERRORS, SampleSource, read_ahead
from common.runtime import Processes, StopSignal, require_shared_folder

logger = logging.getLogger(__name__)

Source = TypeVar("Source", bound=SampleSource)
Part = TypeVar("Part")
Item = TypeVar("Item")

FINGERPRINT = "fingerprint.json"


class CacheError(ValueError):
    """A cache was made with other weights or other preprocessing than this run uses, or an entry is damaged."""


def digest_of_weights(module: nn.Module) -> str:
    """SHA-256 over names, types, shapes and values of a module's tensors."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def digest_of_files(*paths: Path) -> str:
    """Changes when a path, its size or its modification time does; OSError for a file that is not there.

    The content is not read. So a copy of the data whose files have new times, or that lies elsewhere, is encoded anew.
    """
    facts = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


class Cache:
    """A folder of entries.

    Args:
        folder: made if absent.
        fingerprint: everything that the entries' values follow from, as plain JSON values.

    Raises:
        CacheError: the folder holds entries with another fingerprint (the message lists what differs), or is a file.
    """

    def __init__(self, folder: str | Path, fingerprint: Mapping[str, Any]):
        self.folder = Path(folder)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError):
            raise CacheError(f"the cache {self.folder} cannot be made, there is a file: name a folder") from None
        wanted = json.loads(json.dumps(fingerprint))  # tuples as lists, as they will be read back
        path = self.folder / FINGERPRINT
        if not path.exists():
            _write_atomically(path, lambda temporary: temporary.write_text(json.dumps(wanted, indent=1) + "\n"))
        try:
            found = json.loads(path.read_text())
            if not isinstance(found, dict):
                raise ValueError
        except ValueError:
            raise CacheError(f"{path} is damaged: delete the folder {self.folder}, it will be made again") from None
        differing = [key for key in {**found, **wanted} if found.get(key) != wanted.get(key)]
        if differing:
            details = "; ".join(f"{key} was {found.get(key)!r}, is {wanted.get(key)!r}" for key in differing)
            raise CacheError(
                f"the cache {self.folder} does not belong to this run: {details}. Name another folder, or delete this "
                "one to have it made again"
            )

    def path(self, key: str) -> Path:
        """Where an entry is; two levels, so that no folder grows large."""
        return self.folder / key[:2] / f"{key}.safetensors"

    def __contains__(self, key: str) -> bool:
        return self.path(key).exists()

    def save(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        """Writes an entry; it appears whole or not at all."""
        path = self.path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        _write_atomically(path, lambda temporary: save_file(contiguous, temporary))

    def load(self, key: str) -> dict[str, Tensor]:
        """The tensors of an entry; CacheError if it is missing or damaged."""
        try:
            return load_file(self.path(key))
        except FileNotFoundError:
            raise CacheError(f"{self.path(key)} is missing from the cache") from None
        except SafetensorError as error:
            raise CacheError(f"{self.path(key)} is damaged ({error}): delete it, it will be made again") from None


def open_cache(folder: str, fingerprint: Mapping[str, Any], processes: Processes) -> Cache:
    """The cache of `data.cache_latents`; called on all processes.

    Raises:
        OSError: they do not share the folder, or it is a file.
        CacheError: see `Cache`.
    """
    require_shared_folder(processes, Path(folder), "data.cache_latents")
    return Cache(folder, fingerprint)


class CachedItems(Generic[Source]):
    """A data set that reads entries of a cache where `dataset` reads files; trainers add `sample`."""

    def __init__(self, dataset: Source, cache: Cache):
        self.dataset, self.cache = dataset, cache

    def __len__(self) -> int:
        return len(self.dataset)

    def files_of(self, index: int) -> Sequence[Path]:
        """The files that an item was encoded from."""
        return self.dataset.files_of(index)

    def entry(self, key: str, read: Callable[[], object]) -> dict[str, Tensor]:
        """The tensors of an entry.

        Args:
            read: reads the item's files; where there is no entry, it raises what kept them from being encoded.

        Raises:
            CacheError: the entry is damaged, or missing though the files can be read.
        """
        if key not in self.cache:
            read()
        return self.cache.load(key)


def encode_items(
    cache: Cache,
    num_items: int,
    parts: Sequence[Part],
    *,
    key_of: Callable[[int, Part], str],
    read: Callable[[int, Part], Item],
    encode: Callable[[int, Part, Item], Mapping[str, Tensor]],
    unit: str,
    processes: Processes,
    stop: StopSignal,
) -> None:
    """Saves an entry for every part of every item that is not in the cache yet, the items split over the processes.

    An item is read while the one before it is encoded. One of which a part cannot be read is left out from there on,
    with a warning.

    Args:
        parts: what an item has entries of, the same for all items.
        key_of, read: of (item, part), called in another thread; OSError or ValueError where files cannot be read.
        encode: of (item, part, what `read` returned), without gradients.
        unit: what an item is called in messages.

    Raises:
        StopRequested: the run was asked to stop; what is encoded stays.
    """

    def read_missing(index: int) -> list[tuple[Part, str, Item]]:
        found: list[tuple[Part, str, Item]] = []
        try:
            for part in parts:
                if (key := key_of(index, part)) not in cache:
                    found.append((part, key, read(index, part)))
        except BAD_SAMPLE_ERRORS as error:
            logger.warning("%s %d is not encoded: %s", unit, index, error)
        return found

    own_items = -(-(num_items - processes.process_index) // processes.num_processes)
    bar = {"desc": f"encoding {unit}s", "unit": unit, "disable": not processes.is_main_process}
    for index, found in read_ahead(read_missing, tqdm(stop.share(num_items), total=own_items, **bar), num_threads=1):
        for part, key, item in found.result():
            with torch.no_grad():
                cache.save(key, encode(index, part, item))
    processes.wait_for_everyone()


def _write_atomically(path: Path, write: Any) -> None:
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
    write(temporary)
    os.replace(temporary, path)
