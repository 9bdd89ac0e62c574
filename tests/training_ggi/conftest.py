"""One tiny checkpoint, a few small scenes and what is prepared of them, for all tests of the GGI trainer."""

import json
from pathlib import Path

import make_tiny_checkpoints
import numpy as np
import pytest
from PIL import Image

NUM_SCENES, NUM_IMAGES, SIDE_PX = 2, 12, 64


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """CogVideoX, its base LoRA and the annotators in small, for the smallest clips that RAFT takes."""
    folder = tmp_path_factory.mktemp("ckpt") / "tiny-cogvideox"
    with pytest.MonkeyPatch.context() as patch:  # a VAE of fewer layers, as it would take most of the time
        patch.setattr(make_tiny_checkpoints, "GGI_VAE", make_tiny_checkpoints.GGI_VAE | {"layers_per_block": 1})
        return make_tiny_checkpoints.make_ggi_checkpoint(folder, num_frames=9, height_px=256, width_px=256)


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data root: walls of random texture that move past, each with its caption."""
    root = tmp_path_factory.mktemp("scenes")
    for number in range(NUM_SCENES):
        folder = root / f"DL3DV-10K/1K/wall{number}/images_2"
        folder.mkdir(parents=True)
        coarse = np.random.default_rng(number).integers(0, 256, (24, 24, 3), dtype=np.uint8)
        wall = Image.fromarray(coarse).resize((96, 96), Image.Resampling.BICUBIC)
        for i in range(NUM_IMAGES):
            corner = 2 * i, i * number
            wall.crop((*corner, corner[0] + SIDE_PX, corner[1] + SIDE_PX)).save(folder / f"frame_{i + 1:05d}.png")
    names = [f"wall{number}" for number in range(NUM_SCENES)]
    (root / "seeds.txt").write_text("".join(f"DL3DV-10K/1K/{name}\n" for name in names))
    (root / "captions.json").write_text(json.dumps({name: f"a photograph of {name}" for name in names}))
    return root
