"""From frames as they lie on disk to clips as the networks take them.

Enlarging by a margin, cropping and cutting to 8 bit act on each pixel or each frame alone, so that the expensive part,
`resize_frame`, yields 8-bit frames to be kept, of which every visit crops another part: the result is the same.
"""

from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

Clip = TypeVar("Clip", np.ndarray, Tensor)
Size = tuple[int, int]  # height, width in pixels

CROP_MARGIN = 1.1  # the resized frame over the smallest one that holds the crop
STILL_FRAMES = 3  # how often the last frame is repeated, so that it has a latent of its own


def resized_size(source: Size, crop: Size) -> Size:
    """Height and width to which frames of size `source` are resized before a part of size `crop` is cut out."""
    ratio = max(crop[0] / source[0], crop[1] / source[1])
    height, width = (int(ratio * side * CROP_MARGIN) for side in source)
    return height, width


def resize_antialiased(images: Tensor, size: Size) -> Tensor:
    """Bilinear, with antialiasing where it shrinks: float (N, C, H, W) to (N, C, *size)."""
    return F.interpolate(images, size=size, mode="bilinear", align_corners=False, antialias=True)


def resize_frame(frame: np.ndarray, crop: Size) -> np.ndarray:
    """A frame of any size, ready to be cropped: uint8 (h, w, 3) to uint8 (*resized_size, 3).

    As in the original, 8 bit are reached by truncation, which darkens by half a level on average.

    Raises:
        ValueError: the frame is not uint8 (h, w, 3).
    """
    if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3:
        raise ValueError(f"a frame is {frame.dtype} of shape {frame.shape}: expected uint8 (height, width, 3)")
    values = torch.from_numpy(frame).permute(2, 0, 1)[None].float() / 255  # (1, 3, h, w)
    values = resize_antialiased(values, resized_size(frame.shape[:2], crop))  # (1, 3, H, W)
    return (255 * values[0]).to(torch.uint8).permute(1, 2, 0).contiguous().numpy()  # (H, W, 3)


def crop_choices(size: Size, crop: Size) -> tuple[int, int]:
    """How many different top and left offsets of a crop there are in frames of this size.

    Raises:
        ValueError: the frames are smaller than the crop.
    """
    if size[0] < crop[0] or size[1] < crop[1]:
        raise ValueError(
            f"frames of {size[0]}x{size[1]} (height x width) hold no crop of {crop[0]}x{crop[1]}: "
            "resize them for this crop first"
        )
    return size[0] - crop[0] + 1, size[1] - crop[1] + 1


def crop_clip(clip: Clip, top_px: int, left_px: int, crop: Size) -> Clip:
    """The same part of all frames: a view (F, *crop, 3) of (F, H, W, 3).

    Raises:
        ValueError: the offset is none of `crop_choices`.
    """
    rows, columns = crop_choices((clip.shape[-3], clip.shape[-2]), crop)
    if not (0 <= top_px < rows and 0 <= left_px < columns):
        raise ValueError(
            f"the crop offset ({top_px}, {left_px}) (top, left) leaves the frame: "
            f"the limits are ({rows - 1}, {columns - 1})"
        )
    return clip[..., top_px : top_px + crop[0], left_px : left_px + crop[1], :]


def normalise(clip: np.ndarray | Tensor) -> Tensor:
    """From uint8 (..., F, H, W, 3) to float32 (..., F, 3, H, W) in [-1, 1]."""
    return (torch.as_tensor(clip).movedim(-1, -3) / 127.5 - 1).contiguous()


def normalise_edges(edges: np.ndarray | Tensor) -> Tensor:
    """From grey uint8 (..., F, H, W) to float32 (..., F, 3, H, W) in [-1, 1], the three channels equal (a view)."""
    grey = torch.as_tensor(edges) / 127.5 - 1  # (..., F, H, W)
    return grey.unsqueeze(-3).expand(*grey.shape[:-2], 3, *grey.shape[-2:])


def pad_last(clip: Tensor, repeats: int = STILL_FRAMES) -> Tensor:
    """Append the last frame `repeats` times: (..., F, C, H, W) to (..., F + repeats, C, H, W).

    A latent holds frames 4 k - 3 to 4 k of the clip. From 46 frames, 49 make the last latent that of a still image, as
    the end image's is.
    """
    return torch.cat([clip, *[clip[..., -1:, :, :, :]] * repeats], dim=-4)
