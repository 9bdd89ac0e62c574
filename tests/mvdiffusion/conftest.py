"""One tiny checkpoint and one small folder of rendered objects for all tests of the multi-view trainer."""

import sys
from pathlib import Path

import make_tiny_checkpoints
import numpy as np
import pytest

from mvdiffusion.data.poses import VIEW_LISTS, fixed_poses

sys.path.append(str(Path(__file__).parent))
from spheres import Sphere, write_object  # noqa: E402

NUM_OBJECTS = 8


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder structurally identical to sd-image-variations-diffusers."""
    return make_tiny_checkpoints.make_mvdiffusion_checkpoint(tmp_path_factory.mktemp("ckpt") / "tiny-variations")


@pytest.fixture(scope="session")
def renders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight coloured spheres of different size and place, in six upright views."""
    root, views = tmp_path_factory.mktemp("renders"), VIEW_LISTS[6]
    for number in range(NUM_OBJECTS):
        rng = np.random.default_rng(number)
        x, y, z = rng.uniform(-0.15, 0.15, 3)
        sphere = Sphere((x, y, z), float(rng.uniform(0.2, 0.4)))
        write_object(root, f"{number:02d}sphere", views, fixed_poses(views, "upright"), sphere)
    return root
