"""The VAE's vectors: every file holds cases, each with a configuration, inputs, weights, results and tolerances."""

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import vectors as golden
from torch import Tensor, nn

FIXED = ("num_batches_tracked", "shift", "scale")  # what a recipe leaves at its constants, beside the wavelet filters
WAVELETS = {"aa", "ad", "da", "dd", "h", "g", "hh", "gh", "h_v", "g_v", "hh_v", "gh_v"}
WAVELET_CONVS = {f"{name}_conv" for name in WAVELETS}


@dataclass(frozen=True)
class Case:
    """One case of one file.

    Attributes:
        config: of the case.
        inputs, state, expected: tensors by name; `state` is empty where the weights follow a recipe.
        tolerance: {name: {"atol", "rtol"}}.
    """

    file: str
    id: str
    config: Any
    inputs: Mapping[str, Tensor]
    state: Mapping[str, Tensor]
    expected: Mapping[str, Tensor]
    tolerance: Mapping[str, Mapping[str, float]]

    def check(self, name: str, actual: Tensor | float) -> None:
        """Compare with result `name`: |actual - expected| <= atol + rtol |expected|."""
        limits = {kind: float(self.tolerance[name][kind]) for kind in ("atol", "rtol")}
        golden.compare(f"{self.file}: {self.id}/{name}", actual, self.expected[name], **limits, check_dtype=False)

    def load_weights(self, module: nn.Module, prefix: str = "", seed: int | None = None) -> nn.Module:
        """Fills a module with the stored weights, else by the recipe; `prefix` is dropped from names before hashing."""
        if self.state:
            module.load_state_dict({f"{prefix}{key}": value for key, value in self.state.items()})
        else:
            seed = self.config["weights_seed"] if seed is None else seed
            module.load_state_dict(recipe_state(module, seed, prefix), strict=False)
        return module


def recipe_state(module: nn.Module, seed: int, prefix: str = "") -> dict[str, Tensor]:
    """Weights as functions of their names and shapes; constants (wavelet filters, counters, scaling) are left out."""
    state = {}
    for key, value in module.state_dict().items():
        name = key.removeprefix(prefix)
        parts = name.split(".")
        if parts[-1] in FIXED or parts[-1] in WAVELETS or WAVELET_CONVS & set(parts):
            continue
        state[key] = torch.from_numpy(recipe(name, tuple(value.shape), seed)).to(value.dtype)
    return state


def recipe(name: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """The recipe of the vectors' own description: float32 of that shape."""
    generator = np.random.RandomState((zlib.crc32(name.encode()) + 1000003 * seed) % 2**32)
    normal = generator.standard_normal(shape)
    leaf = name.rsplit(".", 1)[-1]
    if leaf == "running_var":
        values = 1 + 0.25 * np.abs(normal)
    elif leaf == "running_mean":
        values = 0.1 * normal
    elif len(shape) >= 2:
        values = normal / np.sqrt(np.prod(shape[1:]))
    else:
        values = 1 + 0.1 * normal if leaf == "weight" else 0.1 * normal
    if name[:3] == "lin" and name[3:4].isdigit():
        values = np.abs(values)
    return np.asarray(values, np.float32)


def by_case(pattern: str) -> Any:
    """Parametrise a test's `case` over the cases of the files of one kind; skip where there are none, and say so."""
    found = []
    for path in golden.files("vae", pattern):
        vectors = golden.load(path)
        for case in vectors.header["cases"]:
            parts = {part: vectors.under(f"{case['id']}/{part}/") for part in ("in", "sd", "out")}
            value = Case(
                path.name, case["id"], case["config"], parts["in"], parts["sd"], parts["out"], case["tolerance"]
            )
            found.append(pytest.param(value, id=f"{path.stem}-{case['id']}"))
    reason = f"no vectors {pattern} in {golden.GOLDEN_DIR / 'vae'}: set GOLDEN_DIR"
    absent = pytest.param(None, marks=pytest.mark.skip(reason=reason), id="absent")
    return pytest.mark.parametrize("case", found or [absent])
