"""Clips for the VAE: which files and frames, resizing and cropping, samples for training and for evaluation.

Frames come as uint8 (T, 3, H, W) and leave as float32 (3, T, h, w) in [-1, 1], which is what models take.
"""

import hashlib
import json
import logging
import os
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from common.data import BAD_SAMPLE_ERRORS, read_ahead
from common.video import IMAGE_SUFFIXES, VIDEO_SUFFIXES, MediaError, find_files, load_image, probe_video, read_frames

IO_THREADS = 16
T = TypeVar("T")

logger = logging.getLogger(__name__)

# Files


def list_videos(root: str | Path, allow_list: str | Path | None = None, *, images: bool = False) -> list[Path]:
    """The clips in a folder and the folders in it, also linked ones, sorted by their paths from there.

    Clips end in one of `common.video.VIDEO_SUFFIXES`, in lower or upper case. Hidden files and folders do not count.

    Args:
        allow_list: a file with one path per line, relative to `root`, as `scripts/doctor.py videos` writes it: only
            these clips are listed.
        images: list images, too: clips of one frame, of use where `num_frames` is 1. Without it a log line tells how
            many were left out.

    Raises:
        FileNotFoundError: `root` is not a folder, or there is no such allow-list.
        ValueError: nothing is left, or the allow-list names files that are not there.
    """
    root = Path(root)
    found = find_files(root, VIDEO_SUFFIXES + IMAGE_SUFFIXES)
    if allow_list is not None:
        allowed = _read_allow_list(Path(allow_list))
        found = [path for path in found if _name(path, root) in allowed]
        absent = sorted(allowed - {_name(path, root) for path in found})
        if absent:
            raise ValueError(
                f"{allow_list} names {len(absent)} files that are not in {root}, the first: {absent[0]}; "
                f"make it anew: python scripts/doctor.py videos {root}"
            )
    clips = [path for path in found if images or not is_image(path)]
    left_out = len(found) - len(clips)
    if not clips:
        suffixes = VIDEO_SUFFIXES + (IMAGE_SUFFIXES if images else ())
        hint = f"; its {left_out} images can be used with num_frames 1" if left_out else ""
        raise ValueError(f"{root} holds no clip; looked for *{', *'.join(suffixes)} in it and the folders in it{hint}")
    if left_out:
        logger.info("%s: %d images are left out, which can be used with num_frames 1 alone", root, left_out)
    return clips


def is_image(path: Path) -> bool:
    return path.name.lower().endswith(IMAGE_SUFFIXES)


def _name(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix()


def _read_allow_list(path: Path) -> set[str]:
    if not path.is_file():
        raise FileNotFoundError(f"the allow-list {path} (from {Path.cwd()}) is not a file")
    # Names need not be UTF-8, and may hold characters that `splitlines` takes for the end of a line.
    lines = path.read_bytes().decode("utf-8", "surrogateescape").split("\n")
    names = {line.removesuffix("\r") for line in lines} - {""}
    if not names:
        raise ValueError(f"the allow-list {path} is empty: there is nothing to read")
    return names


# Frames


def train_begin_range(num_frames_in_file: int, num_frames: int, sample_rate: int) -> tuple[int, int]:
    """The first and the last frame at which a training clip may begin, both included.

    As in the original the last possible begin is never drawn.
    """
    return 0, max(0, num_frames_in_file - num_frames * sample_rate - 1)


def train_frame_indices(num_frames_in_file: int, num_frames: int, sample_rate: int, begin: int) -> np.ndarray:
    """Frames of a training clip, int64 (num_frames,): spread over the `num_frames * sample_rate` frames from `begin`.

    The spacing is (span - 1) / (num_frames - 1), a little above `sample_rate`. A file with fewer frames is stretched:
    its frames lie closer, or repeat.
    """
    end = min(begin + num_frames * sample_rate, num_frames_in_file)
    return np.linspace(begin, end - 1, num_frames, dtype=np.int64)


def valid_frame_indices(num_frames: int, sample_rate: int) -> np.ndarray:
    """Frames of an evaluation clip, int64 (num_frames,): spread over the first `num_frames * sample_rate` frames."""
    return np.linspace(0, num_frames * sample_rate - 1, num_frames, dtype=np.int64)


# Pixels. Frames: uint8, which becomes [-1, 1], or floating point, which keeps its range.


def resize_and_crop(frames: Tensor, resolution: int, crop_px: tuple[int, int] | None = None) -> Tensor:
    """Resize the short side to `resolution` (bilinear, antialiased), then cut (height, width) from the centre.

    Args:
        frames: (T, C, H, W).
        crop_px: None keeps the whole frame, whose long side is int(resolution * long / short).

    Returns:
        float32 (C, T, h, w). Raises ValueError for a crop that is larger than the resized frames.
    """
    height, width = frames.shape[2:]
    short = min(height, width)
    size = (int(resolution * height / short), int(resolution * width / short))
    return _resample(frames, size, crop_px or size, align_corners=False)


def eval_transform(frames: Tensor, resolution: int, crop_px: tuple[int, int] | None = None) -> Tensor:
    """As `resize_and_crop`, but with aligned corners: what the original's metrics see."""
    height, width = frames.shape[2:]
    aspect = max(height, width) / min(height, width)
    long = int(resolution * aspect)
    size = (resolution, long) if height <= width else (long, resolution)
    return _resample(frames, size, crop_px or size, align_corners=True)


def center_crop_resize(frames: Tensor, height_px: int, width_px: int) -> Tensor:
    """Cut the central square, then resize it with aligned corners: (T, C, H, W) -> float32 (C, T, height, width).

    The aspect changes unless the result is square: what the original's single-video tool does.
    """
    square = min(frames.shape[2:])
    return _resample(_center_crop(frames, square, square), (height_px, width_px), (height_px, width_px), True)


def _resample(frames: Tensor, size_px: tuple[int, int], crop_px: tuple[int, int], align_corners: bool) -> Tensor:
    if crop_px[0] > size_px[0] or crop_px[1] > size_px[1]:
        raise ValueError(
            f"a crop of {crop_px[1]}x{crop_px[0]} px does not fit into frames of {size_px[1]}x{size_px[0]} px; "
            "lower the crop or raise the resolution"
        )
    result = torch.empty(frames.shape[1], len(frames), *crop_px)  # (C, T, h, w)
    for t, frame in enumerate(frames):  # one by one: in float32 and full size all of them can take gigabytes
        pixels = frame[None].float() if frame.is_floating_point() else frame[None].float().div_(255)  # (1, C, H, W)
        pixels = functional.interpolate(
            pixels, size_px, mode="bilinear", align_corners=align_corners, antialias=True
        )  # (1, C, h', w')
        result[:, t] = _center_crop(pixels[0], *crop_px)
    return result if frames.is_floating_point() else result.mul_(2).sub_(1)


def _center_crop(frames: Tensor, height_px: int, width_px: int) -> Tensor:
    """(..., H, W) -> (..., height, width); an odd remainder is split as Python rounds, half to even."""
    top, left = round((frames.shape[-2] - height_px) / 2), round((frames.shape[-1] - width_px) / 2)
    return frames[..., top : top + height_px, left : left + width_px]


def to_uint8_frames(video: Tensor, rounding: Literal["round", "truncate"] = "round", low: float = -1.0) -> Tensor:
    """(C, T, H, W) in [low, 1] -> uint8 (T, H, W, C); values outside are clamped.

    The original truncates, which darkens by half a level on average.
    """
    if rounding not in ("round", "truncate"):
        raise ValueError(f"rounding is {rounding!r}, but must be round or truncate")
    levels = (video.detach().float().clamp(low, 1) - low) / (1 - low) * 255
    levels = levels.round() if rounding == "round" else levels
    return levels.to(torch.uint8).permute(1, 2, 3, 0).contiguous()  # (T, H, W, C)


def _count_frames(path: Path) -> int:
    return 1 if is_image(path) else probe_video(path).num_frames


def _read(path: Path, indices: np.ndarray) -> Tensor:
    """uint8 (T, 3, H, W)."""
    if is_image(path):
        frames = np.array(load_image(path))[None]  # (1, H, W, 3)
    else:
        # PyAV was the faster one for short clips, and notices damage that decord conceals.
        frames = read_frames(path, indices.tolist(), backend="pyav")  # (T, H, W, 3)
    return torch.from_numpy(frames).permute(0, 3, 1, 2)  # (T, 3, H, W)


# Samples


class Clips:
    """Random clips of videos, as functions of (index, rng).

    Args:
        paths: as `list_videos` returns them; images only where `num_frames` is 1.
        root: the folder that names in `fingerprint` start from.
        num_frames: frames of a clip.
        resolution: height and width of a clip in pixels.
        sample_rate: a clip spans `num_frames * sample_rate` frames of its file.
        dynamic_sample: draw the rate for every sample, uniformly from 1 .. `sample_rate`.
        short_clips: what to do with files of fewer than `num_frames * sample_rate` frames. "stretch", as the original,
            spreads the frames that there are; "reject" raises ValueError, so that the loader replaces them.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        root: str | Path,
        num_frames: int,
        resolution: int,
        sample_rate: int,
        dynamic_sample: bool = False,
        *,
        short_clips: Literal["stretch", "reject"] = "stretch",
    ) -> None:
        _check_clips(paths, num_frames, resolution, sample_rate)
        if short_clips not in ("stretch", "reject"):
            raise ValueError(f"short_clips is {short_clips!r}, but must be stretch or reject")
        self.paths, self.root = tuple(paths), Path(root)
        self.num_frames, self.resolution, self.sample_rate = num_frames, resolution, sample_rate
        self.dynamic_sample, self.short_clips = dynamic_sample, short_clips

    def __len__(self) -> int:
        return len(self.paths)

    def files_of(self, index: int) -> list[Path]:
        """The file that sample `index` reads."""
        return [self.paths[index]]

    def sample(self, index: int, rng: np.random.Generator) -> dict[str, Tensor]:
        """A random clip of file `index`.

        Returns `video`: float32 (3, num_frames, resolution, resolution) in [-1, 1]. Draws from `rng`: the rate if
        `dynamic_sample`, then the first frame. Raises MediaError, a ValueError, with the path of an unreadable file.
        """
        path = self.paths[index]
        total = _count_frames(path)
        if self.short_clips == "reject":
            _refuse_short(path, total, self.num_frames, self.sample_rate)
        rate = int(rng.integers(1, self.sample_rate, endpoint=True)) if self.dynamic_sample else self.sample_rate
        begin = int(rng.integers(*train_begin_range(total, self.num_frames, rate), endpoint=True))
        frames = _read(path, train_frame_indices(total, self.num_frames, rate, begin))  # (T, 3, H, W)
        return {"video": resize_and_crop(frames, self.resolution, (self.resolution, self.resolution))}  # (3, T, R, R)

    def fingerprint(self) -> dict[str, Any]:
        """What identifies the data set, also after its folder has moved: compared when a run is resumed.

        Follows from the names and sizes of the files; no content is read.
        """
        with ThreadPoolExecutor(IO_THREADS) as pool:  # on network file systems the latency of each look-up adds up
            sizes = list(pool.map(_size_bytes, self.paths))
        listing = [[_name(path, self.root), size] for path, size in zip(self.paths, sizes, strict=True)]
        return {"num_items": len(self), "files_sha256": hashlib.sha256(json.dumps(listing).encode()).hexdigest()}


class EvalClips:
    """The beginning of every video, always the same frames.

    Args:
        paths, root: as for `Clips`.
        num_frames, sample_rate: the first `num_frames * sample_rate` frames are needed.
        resolution: of the short side, in pixels.
        crop_px: (height, width) cut from the centre; "square" is (resolution, resolution), None the whole frame.
        subset_size: only the first so many files; 0, or more than there are, is all.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        root: str | Path,
        num_frames: int,
        resolution: int,
        sample_rate: int = 1,
        *,
        crop_px: tuple[int, int] | Literal["square"] | None = "square",
        subset_size: int = 0,
    ) -> None:
        _check_clips(paths, num_frames, resolution, sample_rate)
        if subset_size < 0:
            raise ValueError(f"subset_size is {subset_size}, but must be at least 0 (0 is all)")
        self.paths, self.root = tuple(paths[: subset_size or None]), Path(root)
        self.num_frames, self.resolution, self.sample_rate = num_frames, resolution, sample_rate
        self.crop_px = (resolution, resolution) if crop_px == "square" else crop_px

    def __len__(self) -> int:
        return len(self.paths)

    def files_of(self, index: int) -> list[Path]:
        """The file that sample `index` reads."""
        return [self.paths[index]]

    def sample(self, index: int, rng: np.random.Generator | None = None) -> dict[str, Any]:
        """`video`: float32 (3, num_frames, H, W) in [-1, 1], and `name`: its path from `root`. Nothing is drawn.

        Raises MediaError, a ValueError, for a file that is unreadable or too short.
        """
        path = self.paths[index]
        _refuse_short(path, _count_frames(path), self.num_frames, self.sample_rate)
        frames = _read(path, valid_frame_indices(self.num_frames, self.sample_rate))  # (T, 3, H, W)
        return {"video": resize_and_crop(frames, self.resolution, self.crop_px), "name": _name(path, self.root)}


def read_in_threads(
    read: Callable[[int], T], indices: Iterable[int], num_threads: int
) -> Generator[tuple[int, T | None, str]]:
    """(index, read(index), "") for each index in order, read ahead by threads; (index, None, why) if it failed."""
    with closing(read_ahead(read, indices, num_threads)) as readings:
        for index, reading in readings:
            try:
                yield index, reading.result(), ""
            except BAD_SAMPLE_ERRORS as error:
                yield index, None, str(error)


def _check_clips(paths: Sequence[Path], num_frames: int, resolution: int, sample_rate: int) -> None:
    if not paths:
        raise ValueError("a data set needs at least one clip")
    for name, value in (("num_frames", num_frames), ("resolution", resolution), ("sample_rate", sample_rate)):
        if value < 1:
            raise ValueError(f"{name} is {value}, but must be at least 1")
    image = next((path for path in paths if is_image(path)), None)
    if num_frames > 1 and image is not None:
        raise ValueError(f"num_frames is {num_frames}, but {image} is an image: list the clips with images=False")


def _refuse_short(path: Path, total: int, num_frames: int, sample_rate: int) -> None:
    if total < num_frames * sample_rate and not is_image(path):
        raise MediaError(path, f"clip has {total} frames, num_frames x sample_rate needs {num_frames * sample_rate}")


def _size_bytes(path: Path) -> int | None:
    try:
        return os.path.getsize(path)
    except OSError:
        return None
