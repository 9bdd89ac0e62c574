"""Views of an object: their names, their cameras, and the class labels that tell the network what a row shows.

A pose is a 3x4 matrix [R | t] from the world (z up) to the camera: x right, y up, z towards the viewer. An object's
front faces -y; its right side is the one at +x.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from common.video import MediaError
from mvdiffusion.views import AZIMUTHS_DEG

FIXED_POSES_DIR = Path(__file__).parent / "fixed_poses" / "nine_views"
DOMAIN_CODES = {"normal": (1.0, 0.0), "colour": (0.0, 1.0)}
CAMERA_CODES = {"ortho": (1.0, 0.0), "perspective": (0.0, 1.0)}
LABEL_WIDTHS = (6, 10, 14)
CAMERA_DISTANCE = 2.0  # of the upright cameras; angles and orthographic images do not depend on it
MIRROR_X = np.diag([-1.0, 1.0, 1.0])
ROTATION_TOLERANCE = 1e-3


def read_pose(path: str | Path) -> np.ndarray:
    """A pose from its text file: float64 (3, 4). Raises MediaError if it is missing, not 3x4, or not a rotation."""
    try:
        pose = np.loadtxt(path, ndmin=2)
    except (OSError, ValueError) as error:
        raise MediaError(path, f"cannot be read as a pose ({type(error).__name__}: {error})") from error
    if pose.shape != (3, 4):
        raise MediaError(path, f"a pose must be a 3x4 matrix, but this one is {'x'.join(map(str, pose.shape))}")
    rotation = pose[:, :3]
    deviation = np.abs(rotation @ rotation.T - np.eye(3)).max()
    if not (deviation < ROTATION_TOLERANCE and np.linalg.det(rotation) > 0 and np.isfinite(pose).all()):
        raise MediaError(path, "the left 3x3 part of a pose must be a rotation")
    return pose


def fixed_poses(views: Sequence[str], poses: str) -> np.ndarray:
    """Poses shared by all objects: float64 (V, 3, 4).

    "tilted": the shipped files, of a rig that was turned as a whole. Labels from them have elevations that differ
    between views, a slip that the released weights have learned. "upright": all side views on the horizon.
    """
    if poses == "upright":
        return np.stack([upright_pose(view) for view in views])
    return np.stack([read_pose(FIXED_POSES_DIR / f"000_{view}_RT.txt") for view in views])


def upright_pose(view: str) -> np.ndarray:
    """float64 (3, 4) of a view in `FIXED_VIEWS`. The top view has the object's right side to the right."""
    if view == "top":
        rotation = np.eye(3)
    else:
        azimuth = np.deg2rad(AZIMUTHS_DEG[view] - 90)  # from +x
        sine, cosine = np.sin(azimuth), np.cos(azimuth)
        rotation = np.array([[-sine, cosine, 0.0], [0.0, 0.0, 1.0], [cosine, sine, 0.0]])
    return np.column_stack([rotation, (0.0, 0.0, -CAMERA_DISTANCE)])


def relative_angles(poses: np.ndarray, condition: int) -> np.ndarray:
    """(elevation, azimuth) of the cameras relative to that of the condition view, in radians: (V, 3, 4) -> (V, 2).

    From the spherical angles of the camera centres -R^T t: the polar angle is measured from +z downwards, so a camera
    above the condition's has a negative elevation. Azimuths are in [0, 2 pi).
    """
    centre = -np.einsum("vij,vi->vj", poses[:, :, :3], poses[:, :, 3]) + 0.0  # (V, 3); no negative zeros
    polar = np.arctan2(np.hypot(centre[:, 0], centre[:, 1]), centre[:, 2])  # (V,)
    azimuth = np.arctan2(centre[:, 1], centre[:, 0])  # (V,)
    return np.stack([polar - polar[condition], (azimuth - azimuth[condition]) % (2 * np.pi)], axis=1)


def require_label_width(width: int) -> None:
    """Raises ValueError for a width that no label has."""
    if width not in LABEL_WIDTHS:
        raise ValueError(f"the width of the class labels is {width}, but must be one of {LABEL_WIDTHS}")


def label_rows(angles: np.ndarray, domain: str, width: int = 10, camera: str = "ortho") -> np.ndarray:
    """What a label encodes, (V, 2) -> (V, width / 2): 0, elevation, azimuth, and codes.

    The 0 stands for the condition's own elevation, which is unknown at inference. Width 6 has no code, 10 that of the
    domain ("normal", "colour"), 14 that of the camera ("ortho", "perspective") and then that of the domain.
    """
    require_label_width(width)
    codes = {6: (), 10: DOMAIN_CODES[domain], 14: CAMERA_CODES[camera] + DOMAIN_CODES[domain]}[width]
    elevation, azimuth = angles.T
    return np.column_stack([np.zeros(len(angles)), elevation, azimuth, np.tile(codes, (len(angles), 1))])


def sin_cos(rows: np.ndarray) -> np.ndarray:
    """[sin of all, cos of all] along the last axis: (..., n) -> (..., 2 n). Wonder3D's "e_de_da_sincos"."""
    return np.concatenate([np.sin(rows), np.cos(rows)], axis=-1)


def class_labels(poses: np.ndarray, condition: int, width: int = 10, camera: str = "ortho") -> dict[str, np.ndarray]:
    """Class labels of all views by domain: float32 (V, width)."""
    angles = relative_angles(poses, condition)
    return {domain: sin_cos(label_rows(angles, domain, width, camera)).astype(np.float32) for domain in DOMAIN_CODES}


def mirror_order(poses: np.ndarray, condition: int, views: Sequence[str]) -> list[int]:
    """Which view shows what each view would show, mirrored, of the object mirrored left-right as the condition sees it.

    Raises ValueError naming a view that has no such counterpart.
    """
    # From the condition's camera frame to each view's.
    relative = poses[:, :, :3] @ np.linalg.inv(poses[condition, :, :3])  # (V, 3, 3)
    order = []
    for view, mirrored in zip(views, MIRROR_X @ relative @ MIRROR_X, strict=True):
        errors = np.abs(relative - mirrored).max(axis=(1, 2))  # (V,)
        if errors.min() > ROTATION_TOLERANCE:
            raise ValueError(
                f"images cannot be flipped: no view among {', '.join(views)} is the mirror view of {view!r} for the "
                f"condition view {views[condition]!r}; add it, or switch random_flip off"
            )
        order.append(int(errors.argmin()))
    return order
