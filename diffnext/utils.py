"""Write generated images and videos to files."""

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from common.video import to_uint8, write_video


def export_to_image(
    image: Image.Image | np.ndarray | Tensor,
    output_image_path: str | os.PathLike | None = None,
    suffix: str = ".webp",
    quality: int = 100,
) -> str:
    """Write an image: PIL, uint8 (H, W, 3), or float (3, H, W) in [0, 1]. Returns the path.

    Args:
        output_image_path: its suffix selects the format; None makes a temporary file with `suffix`.
        quality: 1 ... 100, of .webp and .jpg.
    """
    path = Path(output_image_path or _temporary_file(suffix))
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = image if isinstance(image, Image.Image) else Image.fromarray(to_uint8(image))
    picture.save(path, quality=quality)
    return str(path)


def export_to_video(
    video_frames: np.ndarray | Tensor | Sequence[np.ndarray | Image.Image],
    output_video_path: str | os.PathLike | None = None,
    fps: float = 12,
) -> str:
    """Write frames, uint8 (T, H, W, 3) or a list of images of one size, as H.264. Returns the path.

    Args:
        output_video_path: ends in .mp4; None makes a temporary file.
    """
    path = output_video_path or _temporary_file(".mp4")
    if not isinstance(video_frames, Tensor | np.ndarray):
        video_frames = np.stack([to_uint8(np.asarray(frame)) for frame in video_frames])  # (T, H, W, 3)
    write_video(path, video_frames, fps)
    return str(path)


def _temporary_file(suffix: str) -> Path:
    handle, name = tempfile.mkstemp(suffix=suffix)
    os.close(handle)
    return Path(name)
