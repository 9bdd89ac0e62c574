"""What is generated: segments as they lie on disk, and reading their edges, motion and noise.

A scene's folder holds `arc0`, `arc1`, ... An arc has its edge images in `hed/`; its motion as 16-bit images of
correspondences between key frames, or as `noises.npy`; and its end images `image_*.png`, unless the scene's folder has
one more of them than there are arcs.
"""

import logging
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from av.error import FFmpegError
from PIL import Image
from torch import Tensor

from common.video import IMAGE_SUFFIXES, MediaError, load_image, probe_video, read_frames
from training_ggi.models.noise_warp import resize_flow, resize_list
from training_ggi.models.transformer import LATENT_CHANNELS

logger = logging.getLogger(__name__)

EDGES, ENDS, NOISE = "hed", "image_*", "noises.npy"
LEVELS = 2**16
ASPECT_TOLERANCE = 0.02
VALID_FROM = 100  # of a correspondence's third channel
UNKNOWN_PX = -10000.0  # leads out of any frame, so that fresh noise comes in


@dataclass(frozen=True, kw_only=True)
class Segment:
    """One clip. Either `flow` or `noise` is there."""

    name: str
    first: Path | None  # None is the last frame of `before`
    last: Path
    edges: Path
    flow: Path | None
    noise: Path | None
    output: Path
    before: Path | None = None  # output of the segment that this one goes on from


def read_segments(source: Path, output: Path, chain: bool = True) -> list[list[Segment]]:
    """The segments of a scene, a folder of scenes, or of one arc; those together that must be made one after another.

    Args:
        output: folder of results, in which a segment's has the name of the segment.
        chain: start each arc from the last generated frame of the one before, not from its own first image.

    Raises:
        FileNotFoundError: an arc lacks something; says what.
        ValueError: there are no arcs, or no end images that fit them.
    """
    if _is_arc(source):
        return [[_read_arc(source, source.name, output / source.name)]]
    scenes = [each for each in [source, *_folders(source)] if any(map(_is_arc, _folders(each)))]
    if not scenes:
        raise ValueError(f"{source} holds no segments: folders arc0, arc1, ..., or folders that hold those")
    chains = []
    for scene in scenes:
        segments: list[Segment] = []
        for arc in filter(_is_arc, _folders(scene)):
            name = arc.relative_to(source).as_posix()
            before = segments[-1].output if chain and segments else None
            segments.append(_read_arc(arc, name, output / name, before))
        chains += [segments] if chain else [[each] for each in segments]
    return chains


def _read_arc(arc: Path, name: str, output: Path, before: Path | None = None) -> Segment:
    if not images_of(arc / EDGES):
        raise FileNotFoundError(f"{arc} has no edge images: they are looked for in {EDGES}/")
    noise = arc / NOISE if (arc / NOISE).is_file() else None
    flow = None if noise else arc
    if flow and not correspondences_of(arc):
        raise FileNotFoundError(f"{arc} has no motion: neither 16-bit .png images of correspondences nor {NOISE}")
    first, last = _ends(arc)
    first = None if before else first
    return Segment(
        name=name, first=first, last=last, edges=arc / EDGES, flow=flow, noise=noise, output=output, before=before
    )


def _ends(arc: Path) -> tuple[Path, Path]:
    arcs = list(filter(_is_arc, _folders(arc.parent)))
    own, shared = images_of(arc, ENDS), images_of(arc.parent, ENDS)
    if len(own) >= 2:
        return own[0], own[-1]
    if len(shared) != len(arcs) + 1:
        raise ValueError(
            f"{arc} holds {len(own)} end images ({ENDS}) and {arc.parent} {len(shared)} for {len(arcs)} arcs: expected "
            f"2 in each arc, or {len(arcs) + 1} beside the arcs"
        )
    number = arcs.index(arc)
    return shared[number], shared[number + 1]


def _is_arc(folder: Path) -> bool:
    return re.fullmatch(r"arc_?\d+", folder.name) is not None


def _folders(folder: Path) -> list[Path]:
    return sorted((path for path in folder.iterdir() if path.is_dir()), key=natural) if folder.is_dir() else []


def natural(path: Path) -> list[Any]:
    """Sorts image_10 behind image_9."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", path.name)]


def images_of(folder: Path, pattern: str = "*") -> list[Path]:
    """Images in a folder, in the order of their numbers."""
    found = (path for path in folder.glob(pattern) if path.suffix.lower() in IMAGE_SUFFIXES and path.name[0] != ".")
    return sorted(found, key=natural)


def correspondences_of(folder: Path) -> list[Path]:
    """Images in a folder that are no end images."""
    ends = set(images_of(folder, ENDS))
    return [path for path in images_of(folder, "*.png") if path not in ends]


# Reading --------------------------------------------------------------------------------------------------------------


def read_end_image(path: Path, height_px: int, width_px: int) -> np.ndarray:
    """uint8 (H, W, 3), stretched to this size; MediaError if it cannot be read."""
    image = load_image(path)
    if abs(image.width * height_px / (image.height * width_px) - 1) > ASPECT_TOLERANCE:
        logger.warning("%s of %d x %d px is stretched to %d x %d", path, *image.size, width_px, height_px)
    return _resized(image, height_px, width_px, Image.Resampling.LANCZOS)


def read_edges(source: Path, num_frames: int, height_px: int, width_px: int) -> np.ndarray:
    """So many of a segment's edge images, the nearest ones of all: uint8 (F, H, W), white on black.

    Args:
        source: folder of images, or a clip.

    Raises:
        MediaError, ValueError: there are none, or one cannot be read.
    """
    if source.is_dir():
        paths = images_of(source)
        if not paths:
            raise ValueError(f"{source} holds no edge images: files ending in {', '.join(IMAGE_SUFFIXES)} count")
        images = (load_image(path) for path in resize_list(paths, num_frames))
    else:
        wanted = resize_list(range(probe_video(source).num_frames), num_frames)
        images = (Image.fromarray(frame) for frame in read_frames(source, wanted))
    grey = (image.convert("L") for image in images)
    return np.stack([_resized(image, height_px, width_px, Image.Resampling.BICUBIC) for image in grey])  # (F, H, W)


def _resized(image: Image.Image, height_px: int, width_px: int, how: Image.Resampling) -> np.ndarray:
    return np.asarray(image if image.size == (width_px, height_px) else image.resize((width_px, height_px), how))


def read_flow(source: Path, height_px: int, width_px: int, offset_px: float = 0.0) -> Tensor:
    """Motion from each key frame to the next, at half the size of the clip.

    Args:
        source: .npy (T, 2, h, w), (dx, dy) in pixels of its own grid, of any size; a folder of .npy (2, h, w); or one
            of correspondences, see `read_correspondences`.
        height_px, width_px: of the clip.
        offset_px: of correspondences.

    Returns:
        (1, T, 2, H / 2, W / 2) float32.

    Raises:
        MediaError, ValueError: there is none, or it has another form.
    """
    if source.is_dir():
        arrays, images = sorted(source.glob("*.npy"), key=natural), correspondences_of(source)
        if not arrays and not images:
            raise ValueError(f"{source} holds no motion: neither .npy files nor 16-bit .png images of correspondences")
        flows = [read_array(p, "(2, h, w)", lambda s: len(s) == 3 and s[0] == 2) for p in arrays]
        flows = flows or [read_correspondences(path, offset_px) for path in images]
    else:
        flows = list(read_array(source, "(T, 2, h, w)", lambda s: len(s) == 4 and s[1] == 2 and s[0] > 0))
    halves = [resize_flow(torch.from_numpy(flow).float(), (height_px // 2, width_px // 2)) for flow in flows]
    return torch.stack(halves)[None]  # (1, T, 2, H / 2, W / 2)


def read_correspondences(path: Path, offset_px: float = 0.0) -> np.ndarray:
    """Motion from a key frame to the next: float32 (2, h, w), (dx, dy) in pixels; out of the frame where unknown.

    A pixel's place in the next key frame is x = R / 65536 * w from the left and y = (65535 - G) / 65536 * h from the
    top, known where B is 100 or more.

    Args:
        path: 16-bit RGB .png.
        offset_px: x of a pixel in column 0 that stays where it is: 0, or 0.5 where x counts from the image's edge.

    Raises:
        MediaError: it cannot be read, or has not 16 bits.
    """
    try:
        with av.open(str(path)) as container:
            frame = next(container.decode(video=0))
            depth = frame.format.name
            values = frame.to_ndarray(format="rgb48le").astype(np.float64)  # (h, w, 3)
    except (FFmpegError, StopIteration, ValueError, OSError) as error:
        raise MediaError(path, f"cannot be read as an image ({type(error).__name__}: {error})") from error
    if not depth.startswith(("rgb48", "rgba64")):
        raise MediaError(path, f"is an image of type {depth}: correspondences are 16-bit RGB")
    red, green, blue = values.transpose(2, 0, 1)  # (h, w) each
    height, width = red.shape
    dx = red / LEVELS * width - np.arange(width) - offset_px
    dy = (LEVELS - 1 - green) / LEVELS * height - np.arange(height)[:, None] - offset_px
    return np.where(blue >= VALID_FROM, np.stack([dx, dy]), UNKNOWN_PX).astype(np.float32)  # (2, h, w)


def read_noise(path: Path, latent_size: tuple[int, int, int]) -> Tensor:
    """Warped noise, the nearest ones of all its frames: .npy (frames, h, w, 16) -> float32 (1, F', 16, h, w).

    Args:
        latent_size: F', h, w.

    Raises:
        ValueError: it cannot be read or has another form.
    """
    num_frames, height, width = latent_size
    size = height, width, LATENT_CHANNELS
    noise = read_array(path, f"(frames, {height}, {width}, {LATENT_CHANNELS})", lambda s: s[0] > 0 and s[1:] == size)
    picked = np.stack(resize_list(list(noise), num_frames))  # (F', h, w, 16)
    return torch.from_numpy(picked).float().permute(0, 3, 1, 2)[None]  # (1, F', 16, h, w)


def read_array(path: Path, form: str, fits: Callable[[tuple[int, ...]], bool]) -> np.ndarray:
    """A finite float array of an .npy file; ValueError if it has not the `form`."""
    try:
        array = np.load(path, allow_pickle=False)
        shape, kind = array.shape, array.dtype
    except (ValueError, EOFError, OSError, AttributeError) as error:
        raise ValueError(f"{path} cannot be read as an .npy file: {error}") from error
    if not shape or not fits(shape) or not np.issubdtype(kind, np.floating):
        raise ValueError(f"{path} holds {kind} of shape {shape}: expected floating-point {form}")
    if not np.isfinite(array).all():
        raise ValueError(f"{path} holds values that are not finite; mark unknown motion by {UNKNOWN_PX:g}")
    return array
