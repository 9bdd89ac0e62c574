"""Recorded vectors: where they lie, their headers, and comparison at their own tolerance.

A set of vectors lies in `$GOLDEN_DIR/<trainer>` (default: `shared/golden` beside the repository). Every file is a
safetensors file whose header metadata are JSON strings: config, tolerance, notes, ...
"""

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import nn

GOLDEN_DIR = Path(os.environ.get("GOLDEN_DIR") or Path(__file__).resolve().parents[3] / "shared" / "golden")
KEYS_DIR = GOLDEN_DIR.parent / "specs" / "keys"  # names and shapes of released weights


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

        The longest pattern that fits wins. A header may state one tolerance for all tensors instead.
        """
        rule = self.header["tolerance"]
        if rule != "exact" and not {"atol", "rtol"} & rule.keys():
            names = {name, name.partition(".")[2]}
            fitting = [pattern for pattern in rule if any(fnmatchcase(each, pattern) for each in names)]
            if not fitting:
                raise KeyError(f"{self.path.name} states no tolerance for {name}; it has {list(rule)}")
            rule = rule[max(fitting, key=len)]
        return {} if rule == "exact" else rule

    def check(
        self,
        name: str,
        actual: torch.Tensor | float,
        label: str | None = None,
        *,
        expected: torch.Tensor | None = None,
    ) -> None:
        """Compare with tensor `name`, or with `expected` instead, at the header's tolerance for `name` or `label`."""
        expected = self.tensors[name] if expected is None else expected
        rule = self.tolerance(label or name)
        limits = {kind: float(rule.get(kind, 0.0)) for kind in ("atol", "rtol")}
        if "max_abs" in rule:
            limits = {"atol": float(rule["max_abs"]), "rtol": 0.0}
        is_float = expected.is_floating_point()
        compare(f"{self.path.name}: {name}", actual, expected, **limits, check_dtype=is_float)

    def check_within(self, name: str, actual: torch.Tensor, limit: float) -> None:
        """Compare with tensor `name`, of whatever type, at a largest difference that the header states in words."""
        expected = self.tensors[name]
        compare(f"{self.path.name}: {name}", actual.double(), expected.double(), atol=limit, rtol=0.0, check_dtype=True)


def compare(
    where: str, actual: torch.Tensor | float, expected: torch.Tensor, *, atol: float, rtol: float, check_dtype: bool
) -> None:
    """|actual - expected| <= atol + rtol |expected|, or an error that starts with `where`; one number has any shape."""
    actual = torch.as_tensor(actual).detach().to("cpu")
    if actual.numel() == expected.numel() == 1:
        actual = actual.reshape(expected.shape)
    if expected.dtype == torch.uint8:
        expected, actual = expected.int(), actual.int()  # differences of unsigned integers would wrap
    torch.testing.assert_close(
        actual, expected, atol=atol, rtol=rtol, check_dtype=check_dtype, msg=lambda text: f"{where}: {text}"
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


def filled(module: nn.Module, config: Mapping[str, Any]) -> nn.Module:
    """A module with the weights that an entry of a header tells by `weights_seed` and, for comparison, their sums."""
    state, sums = rule_weights(module, config["weights_seed"]), config["weights_check"]
    assert {name: value.double().sum().item() for name, value in state.items()} == pytest.approx(sums, abs=1e-9)
    module.load_state_dict(state)
    return module.eval()


def rule_weights(module: nn.Module, seed: int) -> dict[str, torch.Tensor]:
    """Weights that follow from a seed and the sorted names, by the rule of NOVA's files: halves, as float32."""
    state = {}
    for number, (name, value) in enumerate(sorted(module.state_dict().items())):
        n = np.random.RandomState(seed * 100_003 + number).standard_normal(tuple(value.shape)).astype(np.float32)
        if n.ndim > 1:
            n = n / np.sqrt(n.size / n.shape[0])
        else:
            n = 1 + 0.1 * n if n.ndim == 1 and name.endswith(".weight") else 0.1 * n
        state[name] = torch.as_tensor(n).half().float()
    return state
