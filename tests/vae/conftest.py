"""A folder of small clips, a miniature network's json, random VGG16 weights, and a clean process for training in it."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from common.video import write_video

TINY_WFVAE = {
    "_class_name": "WFVAEModel",
    "latent_dim": 4,
    "base_channels": 4,
    "encoder_energy_flow_hidden_size": 4,
    "decoder_energy_flow_hidden_size": 4,
    "norm_type": "layernorm",
    "t_interpolation": "trilinear",
}
VGG16_WIDTHS = [64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512, 0]  # 0 is a pooling layer


@pytest.fixture(scope="session")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight moving clips of 24 to 31 frames, 48 x 40 px, in two folders."""
    root = tmp_path_factory.mktemp("videos")
    y, x = np.mgrid[:40, :48]
    for number in range(8):
        rng = np.random.default_rng(number)
        time = np.arange(24 + number)[:, None, None, None]
        speed, phase = rng.uniform(0.1, 0.4, 3), rng.uniform(0, 6, 3)
        waves = np.sin(x[None, ..., None] * speed + time * 0.3 + phase) + np.cos(y[None, ..., None] * speed[::-1])
        write_video(root / f"part{number % 2}" / f"{number}.mp4", (waves * 60 + 127).clip(0, 255).astype(np.uint8), 24)
    return root


@pytest.fixture(scope="session")
def tiny_json(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The configuration of a WFVAE of some 20,000 weights."""
    path = tmp_path_factory.mktemp("config") / "wfvae-tiny.json"
    path.write_text(json.dumps(TINY_WFVAE))
    return path


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
