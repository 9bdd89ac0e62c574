"""Recorded vectors: where they lie, their headers, and comparison at their own tolerance.

A set of vectors lies in `$GOLDEN_DIR/<trainer>` (default: `shared/golden` beside the repository). Every file is a
safetensors file whose header metadata are JSON strings: config, tolerance, notes, ...
"""

import json
import os
import re
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

GOLDEN_DIR = Path(os.environ.get("GOLDEN_DIR") or Path(__file__).resolve().parents[3] / "shared" / "golden")


@dataclass(frozen=True)
class Vectors:
    """One file: tensors by name, and the decoded header."""

    path: Path
    tensors: dict[str, torch.Tensor]
    header: dict[str, Any]

    @property
    def config(self) -> Any:
        return self.header["config"]

    def __getitem__(self, key: str) -> torch.Tensor:
        return self.tensors[key]

    def __contains__(self, key: str) -> bool:
        return key in self.tensors

    def under(self, prefix: str) -> dict[str, torch.Tensor]:
        """Tensors whose name starts with `prefix`, by the rest of their name."""
        return {key.removeprefix(prefix): value for key, value in self.tensors.items() if key.startswith(prefix)}

    def tolerance(self, name: str) -> dict[str, Any]:
        """The header's tolerance for a tensor (with or without its case's name), or for one of its labels.

        The longest pattern that fits wins.
        """
        names = {name, name.partition(".")[2]}
        rules = self.header["tolerance"]
        fitting = [pattern for pattern in rules if any(fnmatchcase(each, pattern) for each in names)]
        if not fitting:
            raise KeyError(f"{self.path.name} states no tolerance for {name}; it has {list(rules)}")
        rule = rules[max(fitting, key=len)]
        return {"exact": True} if rule == "exact" else rule

    def check(self, name: str, actual: torch.Tensor | float, label: str | None = None) -> None:
        """Compare with tensor `name` at the header's tolerance for it, or for `label`."""
        expected = self.tensors[name]
        actual = torch.as_tensor(actual).detach().to("cpu")
        rule = self.tolerance(label or name)
        if rule.get("exact"):
            limits = {"atol": 0.0, "rtol": 0.0}
        elif "max_abs" in rule:
            limits = {"atol": float(rule["max_abs"]), "rtol": 0.0}
        else:
            limits = {"atol": float(rule.get("atol", 0.0)), "rtol": float(rule.get("rtol", 0.0))}
        if expected.dtype == torch.uint8:
            expected, actual = expected.int(), actual.int()  # differences of unsigned integers would wrap
        torch.testing.assert_close(
            actual.reshape(expected.shape) if actual.numel() == expected.numel() == 1 else actual,
            expected,
            **limits,
            check_dtype=expected.is_floating_point(),
            msg=lambda text: f"{self.path.name}: {name}: {text}",
        )


def _decoded(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


@cache
def load(path: Path) -> Vectors:
    """Read one file."""
    with safe_open(path, framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}
        header = {key: _decoded(value) for key, value in (file.metadata() or {}).items()}
    return Vectors(path, tensors, header)


def files(trainer: str, pattern: str, having: str | None = None) -> list[Path]:
    """Files of one kind, sorted; with `having`, those that hold a tensor of that name."""
    paths = sorted((GOLDEN_DIR / trainer).glob(pattern))
    return [path for path in paths if having is None or having in load(path)]


def by_file(trainer: str, pattern: str, having: str | None = None) -> Any:
    """Parametrise a test's `vectors` over the files of one kind; skip with the reason where there are none."""
    found = [pytest.param(load(path), id=path.stem) for path in files(trainer, pattern, having)]
    return pytest.mark.parametrize("vectors", found or [_absent(trainer, pattern)])


def by_case(trainer: str, pattern: str, key: str, having: str | None = None) -> Any:
    """Parametrise a test's `vectors` and `case` over the cases of the files of one kind.

    Args:
        key: regular expression that a tensor's whole name must match; its first group is the case.
    """
    found = []
    for path in files(trainer, pattern, having):
        names = (re.fullmatch(key, name) for name in load(path).tensors)
        cases = sorted({match[1] for match in names if match})
        found += [pytest.param(load(path), case, id=f"{path.stem}-{case}") for case in cases]
    return pytest.mark.parametrize(("vectors", "case"), found or [_absent(trainer, pattern, values=2)])


def _absent(trainer: str, pattern: str, values: int = 1) -> Any:
    reason = f"no vectors {pattern} in {GOLDEN_DIR / trainer}: set GOLDEN_DIR"
    return pytest.param(*[None] * values, marks=pytest.mark.skip(reason=reason), id="absent")
