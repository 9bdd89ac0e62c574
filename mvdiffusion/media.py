"""Photographs as the network takes them; pictures and numbers of generated views."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor

from common.video import MediaError, contact_sheet, image_size, load_image, to_uint8
from mvdiffusion.data.preparation import on_background, recentre
from mvdiffusion.models.layout import DOMAINS

# Unit normals have length 1 where a white or black background decodes to sqrt(3) and a grey one to 0.
LENGTHS_OF_NORMALS = (0.5, (1 + math.sqrt(3)) / 2)
GREY_LEVELS = {"white": 1.0, "gray": 0.5, "black": 0.0}
CROP_SHARE = 3 / 4  # 192 of 256 pixels, as Wonder3D does


# Photographs ----------------------------------------------------------------------------------------------------------


def read_photo(path: Path) -> Image.Image:
    """An upright photograph, RGBA if any of it is transparent, else RGB; MediaError if it cannot be read."""
    image_size(path)  # raises what `load_image` would for a file without an image
    try:
        with Image.open(path) as image:
            if image.has_transparency_data:
                image.load()
                rgba = ImageOps.exif_transpose(image).convert("RGBA")
                if rgba.getextrema()[3][0] < 255:
                    return rgba
    except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, struct.error, zlib.error, ...
        raise MediaError(path, f"cannot be read as an image ({type(error).__name__}: {error})") from error
    return load_image(path)


def prepare_photo(photo: Image.Image, size_px: int, crop_size: int | None, background: str) -> Image.Image:
    """RGB of size_px x size_px: a cut-out object centred on the background, another photograph padded to a square.

    Args:
        crop_size: pixels of the object's longer side; None is 3/4 of size_px, -1 keeps the photograph's framing.
        background: one of `GREY_LEVELS`.

    Raises:
        ValueError: as of `recentre`.
    """
    if photo.mode != "RGBA":
        crop_size = -1
    elif crop_size is None:
        crop_size = round(size_px * CROP_SHARE)
    grey = GREY_LEVELS[background]
    pixels = on_background(recentre(photo, crop_size, size_px), (grey, grey, grey))  # (H, W, 3)
    return Image.fromarray(to_uint8(pixels.transpose(2, 0, 1)))


# Views ----------------------------------------------------------------------------------------------------------------


def image_grid(images: Tensor, num_per_row: int) -> Tensor:
    """Images side by side without gaps: (N, 3, H, W) -> (3, rows * H, num_per_row * W); what is left over is black.

    Rows of the pipeline with `num_per_row` = V are the original's validation grid: all normals, then all colours.
    """
    num_rows = math.ceil(len(images) / num_per_row)
    blank = images.new_zeros(num_rows * num_per_row - len(images), *images.shape[1:])
    cells = torch.cat([images, blank]).unflatten(0, (num_rows, num_per_row))  # (rows, columns, 3, H, W)
    return cells.permute(2, 0, 3, 1, 4).flatten(3).flatten(1, 2)  # (3, rows * H, columns * W)


def interleave_halves(rows: Tensor) -> Tensor:
    """(2BV, ...) in the pipeline's order -> normal, colour, normal, colour, ..., as in Wonder3D's grids."""
    return torch.stack(rows.chunk(2), dim=1).flatten(0, 1)  # (2BV, ...)


def view_sheet(
    condition: Tensor | np.ndarray,
    views: Mapping[str, Tensor],
    names: Sequence[str],
    targets: Mapping[str, Tensor] | None = None,
    cell_height_px: int = 256,
) -> np.ndarray:
    """One object's views with captions, uint8 (H, W, 3): the photo first, a row per domain, targets below each.

    Args:
        condition: the conditioning image, as `common.video.to_uint8` takes it.
        views, targets: {"normal": (V, 3, H, W), "colour": ...} in [0, 1].
        names: of the V views.
    """
    photo = to_uint8(condition)
    rows, labels = [], []
    for domain in reversed(DOMAINS):
        for kind, images in (("", views), (" target", targets)):
            if images is not None:
                rows.append([np.full_like(photo, 255) if rows else photo, *images[domain]])
                labels.append(f"{domain}{kind}")
    return contact_sheet(rows, ["input", *names], labels, cell_height_px=cell_height_px)


def turntable(views: Mapping[str, Tensor], azimuths: Sequence[float]) -> np.ndarray:
    """One object's views in order of azimuth, colour over normal: uint8 (V, 2H, W, 3).

    Args:
        views: {"normal": (V, 3, H, W), "colour": ...} in [0, 1].
        azimuths: of the V views in radians; taken modulo 2 pi.
    """
    order = sorted(range(len(azimuths)), key=lambda view: azimuths[view] % math.tau)
    stacked = torch.cat([views["colour"], views["normal"]], dim=-2)[order]  # (V, 3, 2H, W)
    return np.stack([to_uint8(frame) for frame in stacked])  # (V, 2H, W, 3)


def object_mask(normals: Tensor) -> Tensor:
    """Where a normal map on a white, black or middle grey background shows the object: (..., 3, H, W) -> (..., H, W).

    There the decoded vector's length is near 1; the background's is sqrt(3) or 0.
    """
    low, high = LENGTHS_OF_NORMALS
    length = torch.linalg.vector_norm(normals.float() * 2 - 1, dim=-3)  # (..., H, W)
    return (length > low) & (length < high)


def normal_angular_error(predicted: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Mean angle in degrees between two normal maps over the object's pixels.

    Args:
        predicted, target: (..., 3, H, W) in [0, 1]; n = 2 x - 1, taken to length 1.
        mask: (..., H, W), true on the object.

    Returns:
        (...) float64; NaN for images whose mask is empty.

    Raises:
        ValueError: shapes that do not fit.
    """
    if predicted.shape != target.shape or mask.shape != predicted.shape[:-3] + predicted.shape[-2:]:
        raise ValueError(
            f"predicted and target must be (..., 3, H, W) and mask (..., H, W), got {tuple(predicted.shape)}, "
            f"{tuple(target.shape)} and {tuple(mask.shape)}"
        )
    a, b = (F.normalize(x.double() * 2 - 1, dim=-3) for x in (predicted, target))
    # atan2 keeps its precision where acos of the dot product loses it, at small angles.
    sine = torch.linalg.vector_norm(torch.linalg.cross(a, b, dim=-3), dim=-3)  # (..., H, W)
    degrees = torch.atan2(sine, (a * b).sum(dim=-3)).rad2deg()  # (..., H, W)
    counted = mask.to(degrees.dtype)
    return (degrees * counted).sum(dim=(-2, -1)) / counted.sum(dim=(-2, -1))
