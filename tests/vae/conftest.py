"""A folder of small clips, a miniature network's json, and random VGG16 weights."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

VGG16_WIDTHS = [64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512, 0]  # 0 is a pooling layer


@pytest.fixture(scope="session")
def videos(tiny: Callable[[str], Path]) -> Path:
    """Eight moving clips of 24 to 31 frames, 48 x 40 px, in two folders."""
    return tiny("vae") / "data"


@pytest.fixture(scope="session")
def tiny_json(tiny: Callable[[str], Path]) -> Path:
    """The configuration of a WFVAE of some 20,000 weights."""
    return tiny("vae") / "model" / "wfvae-tiny.json"


@pytest.fixture(scope="session")
def vgg_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights with the names and shapes of torchvision's VGG16, convolutions only."""
    generator, state, index, width = torch.Generator().manual_seed(0), {}, 0, 3
    for wanted in VGG16_WIDTHS:
        if wanted:
            weight = torch.randn(wanted, width, 3, 3, generator=generator) * (2 / (9 * width)) ** 0.5
            state |= {f"features.{index}.weight": weight, f"features.{index}.bias": torch.zeros(wanted)}
            width, index = wanted, index + 1  # its ReLU
        index += 1
    path = tmp_path_factory.mktemp("vgg") / "vgg16.safetensors"
    save_file(state, path)
    return path
