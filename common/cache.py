"""Encoded items on disk, each a safetensors file, usable only under the fingerprint they were made with."""

import hashlib
import json
import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

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
    """Changes when a path, its size or its modification time does; OSError for a file that is not there."""
    facts = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


class Cache:
    """A folder of entries.

    Args:
        folder: made if absent.
        fingerprint: everything that the entries' values follow from, as plain JSON values.

    Raises:
        CacheError: the folder holds entries with another fingerprint; the message lists what differs.
    """

    def __init__(self, folder: str | Path, fingerprint: Mapping[str, Any]):
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
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


def _write_atomically(path: Path, write: Any) -> None:
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
    write(temporary)
    os.replace(temporary, path)
