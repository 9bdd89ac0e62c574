"""Objects whose views are known exactly: a coloured sphere beside the origin, seen by orthographic cameras."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from mvdiffusion.data.mvds import RenderedObject
from mvdiffusion.data.poses import MIRROR_X
from mvdiffusion.data.preparation import encode_normals

FRAME_WIDTH = 1.25
# Colours follow the normals without any symmetry.
COLOUR_OF_NORMAL = np.array([[0.5, 0.2, -0.3], [-0.1, 0.4, 0.35], [0.3, -0.25, 0.45]])


@dataclass(frozen=True)
class Sphere:
    """Centre and radius in the world, whose frame is 1.25 wide; `paint` (3, 3) gives a surface its colour."""

    centre: tuple[float, float, float] = (0.12, -0.08, 0.1)
    radius: float = 0.3
    paint: tuple = tuple(map(tuple, COLOUR_OF_NORMAL))

    def mirrored(self, pose: np.ndarray) -> "Sphere":
        """As seen left-right reversed by that camera (3, 4)."""
        mirror = pose[:, :3].T @ MIRROR_X @ pose[:, :3]  # (3, 3), in the world
        paint = np.array(self.paint) @ mirror
        return replace(self, centre=tuple(mirror @ self.centre), paint=tuple(map(tuple, paint)))

    def normals(self, pose: np.ndarray, size_px: int) -> tuple[np.ndarray, np.ndarray]:
        """World normals float64 (H, W, 3), and where the sphere is: bool (H, W)."""
        rotation, steps = pose[:, :3], ((np.arange(size_px) + 0.5) / size_px - 0.5) * FRAME_WIDTH
        centre = rotation @ self.centre
        x, y = np.meshgrid(steps - centre[0], -steps - centre[1])
        depth_squared = self.radius**2 - x**2 - y**2
        z = np.sqrt(depth_squared.clip(0))
        normals = np.stack([x, y, z], axis=-1) / self.radius  # (H, W, 3), of the camera
        return normals @ rotation, depth_squared > 0

    def render(self, pose: np.ndarray, size_px: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Colour and camera-frame normals uint8 (H, W, 3), mask uint8 (H, W) of 0 and 255."""
        normals, is_hit = self.normals(pose, size_px)
        colour = np.round((0.5 + normals @ np.array(self.paint).T / 2).clip(0, 1) * 255).astype(np.uint8)
        own = encode_normals(normals @ pose[:, :3].T)
        return colour * is_hit[..., None], own * is_hit[..., None], (is_hit * 255).astype(np.uint8)


def write_object(
    root: Path,
    uid: str,
    views: Sequence[str],
    poses: np.ndarray,
    sphere: Sphere = Sphere(),
    *,
    size_px: int = 32,
    tag: int = 2,
    suffix: str = "png",
    masks: bool = False,
    pose_files: bool = False,
) -> RenderedObject:
    """Renders an object in one of the layouts: with mask files and RGB images, or with RGBA images."""
    found = RenderedObject(uid, root / uid[:tag] / uid, suffix, masks)
    found.folder.mkdir(parents=True)
    for view, pose in zip(views, poses, strict=True):
        colour, normals, mask = sphere.render(pose, size_px)
        for kind, image in (("rgb", colour), ("normals", normals)):
            pixels = image if masks else np.dstack([image, mask])
            Image.fromarray(pixels).save(found.image(kind, view), **({"lossless": True} if suffix == "webp" else {}))
        if masks:
            Image.fromarray(mask).save(found.image("mask", view))
        if pose_files:
            np.savetxt(found.pose(view), pose)
    return found
