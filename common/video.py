"""Images and video clips: read them as RGB uint8, write them so that a file is whole or does not exist.

`decord` and `av` (PyAV) are imported where they are used, so that images can be read without either.

Frame n of a clip is the n-th frame in presentation order, whichever library decodes it. decord counts from the keyframe
that it seeks to, which is off where frames shown before a keyframe follow it in the file (open GOPs, usual in HEVC),
after edit lists, in AVI with B-frames and in intra-refresh streams; its own converter also treats odd sizes and 10 bit
differently. Such clips are recognised from their packets and left to PyAV, whose frames are matched by timestamp. On
the rest both libraries return the same bytes.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageOps

EXIF_ORIENTATION = 0x0112
BACKENDS = ("auto", "decord", "pyav")
VIDEO_SUFFIXES = (".mp4", ".avi", ".webm", ".mkv", ".mov", ".m4v")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
HEADER_SHORTFALL = 0.95  # a clip with less than this share of the frames that its header announces is called truncated


class MediaError(ValueError):
    """An image or a clip cannot be read: `path` says which file, `reason` why."""

    def __init__(self, path: str | os.PathLike, reason: str = "") -> None:
        super().__init__(str(path), reason)

    # The two arguments stay apart so that the error survives pickling between loader processes.
    @property
    def path(self) -> str:
        return self.args[0]

    @property
    def reason(self) -> str:
        return self.args[1]

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}" if self.reason else self.path


def _require_file(path: str | os.PathLike) -> None:
    if not os.path.isfile(path):
        raise MediaError(path, "is not a file" if os.path.exists(path) else "no such file")
    if os.path.getsize(path) == 0:
        raise MediaError(path, "the file is empty (0 bytes)")


def find_files(folder: str | os.PathLike, suffixes: Sequence[str]) -> list[Path]:
    """Files with one of the `suffixes`, in lower or upper case, in `folder` and the folders in it, also linked ones.

    Sorted by their paths from there. Hidden files and folders are passed over; a folder with several links to it counts
    once. Raises FileNotFoundError if there is no such folder, and OSError for one that cannot be read.
    """

    def refuse(error: OSError) -> None:
        raise error

    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} (from {Path.cwd()}) is not a folder")
    found, visited = [], set()
    for place, subfolders, files in os.walk(folder, onerror=refuse, followlinks=True):
        real = os.path.realpath(place)
        if real in visited:
            subfolders.clear()
            continue
        visited.add(real)
        # Sorted, so that it is the same one of several links everywhere. Every ext4 disk has a lost+found.
        subfolders[:] = sorted(name for name in subfolders if name[0] != "." and name != "lost+found")
        found += [Path(place, name) for name in files if name[0] != "." and name.lower().endswith(tuple(suffixes))]
    return sorted(found, key=lambda path: path.relative_to(folder).as_posix())


@contextmanager
def _atomic(path: Path) -> Iterator[Path]:
    """A temporary name beside `path` that replaces it when the block succeeds, and is removed when it fails."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")  # the suffix selects the format
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


# Images


def load_image(path: str | os.PathLike, background: tuple[int, int, int] | None = None) -> Image.Image:
    """Read an image as 8-bit RGB, upright as its EXIF orientation says.

    Alpha is dropped, or composited on `background` (R, G, B in 0..255) when given. Grey becomes RGB; 16-bit grey is
    scaled from 0..65535 to 0..255. Raises MediaError for a file that is missing, empty, damaged or cut short.
    """
    _require_file(path)
    try:
        with Image.open(path) as image:
            image.load()
            return _to_rgb(ImageOps.exif_transpose(image), background)
    except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, struct.error, zlib.error, ...
        raise MediaError(path, f"cannot be read as an image ({type(error).__name__}: {error})") from error


def _to_rgb(image: Image.Image, background: tuple[int, int, int] | None) -> Image.Image:
    if image.mode == "F":
        raise ValueError("floating-point pixels have no known range")
    if image.mode.startswith("I"):  # convert("RGB") would clip at 255
        grey = np.asarray(image, dtype=np.int64).clip(0, 65535)  # (H, W)
        return Image.fromarray(np.round(grey / 257).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        if background is not None:
            canvas = Image.new("RGBA", image.size, (*background, 255))
            image = Image.alpha_composite(canvas, image)
    return image.convert("RGB")


def image_size(path: str | os.PathLike) -> tuple[int, int]:
    """(width_px, height_px) of the upright image, from the header alone. Raises MediaError as `load_image` does."""
    _require_file(path)
    try:
        with Image.open(path) as image:
            width, height = image.size
            # PNG looks for EXIF behind the pixels, so asking for it there would decode the file.
            has_exif = image.format != "PNG" or "exif" in image.info
            turned = has_exif and image.getexif().get(EXIF_ORIENTATION, 1) in (5, 6, 7, 8)
            return (height, width) if turned else (width, height)
    except Exception as error:
        raise MediaError(path, f"has no readable image header ({type(error).__name__}: {error})") from error


def to_uint8(image: np.ndarray | torch.Tensor) -> np.ndarray:
    """uint8 (H, W, C) or (H, W) is kept; float (C, H, W) in [0, 1] is clamped and rounded -> uint8 (H, W, 3)."""
    if isinstance(image, torch.Tensor):
        image = image.detach().cpu()
        image = (image.float() if image.is_floating_point() else image).numpy()
    if image.dtype == np.uint8 and (image.ndim == 2 or (image.ndim == 3 and image.shape[2] in (1, 3, 4))):
        return image[..., 0] if image.ndim == 3 and image.shape[2] == 1 else image
    if not (np.issubdtype(image.dtype, np.floating) and image.ndim == 3 and image.shape[0] in (1, 3)):
        raise ValueError(
            f"an image must be uint8 (H, W, C) or float (1 or 3, H, W) in [0, 1], got {image.dtype} {image.shape}"
        )
    if not np.isfinite(image).all():
        raise ValueError(f"the image holds {int((~np.isfinite(image)).sum())} values that are not finite")
    channels_last = image.transpose(1, 2, 0).clip(0, 1).repeat(3 // image.shape[0], axis=2)  # (H, W, 3)
    return np.round(channels_last * 255).astype(np.uint8)


def save_image(path: str | os.PathLike, image: np.ndarray | torch.Tensor) -> None:
    """Write an image (see `to_uint8`); the suffix selects the format. Makes parent folders; the file appears whole."""
    picture = Image.fromarray(to_uint8(image))
    options: dict[str, Any] = {"quality": 95} if Path(path).suffix.lower() in (".jpg", ".jpeg", ".webp") else {}
    with _atomic(Path(path)) as temporary:
        picture.save(temporary, **options)


def contact_sheet(
    rows: Sequence[Sequence[np.ndarray | torch.Tensor]],
    labels: Sequence[str] | None = None,
    row_labels: Sequence[str] | None = None,
    *,
    cell_height_px: int = 256,
    gap_px: int = 4,
) -> np.ndarray:
    """Images in a grid on white, with captions above the columns and before the rows -> uint8 (H, W, 3).

    Cells (see `to_uint8`) may differ in size: all are resized, aspect kept, to one height, that of the tallest cell but
    at most `cell_height_px`. Short rows leave blanks.
    """
    cells = [[Image.fromarray(to_uint8(image)).convert("RGB") for image in row] for row in rows]
    if not any(cells):
        raise ValueError("a contact sheet needs at least one image")
    for name, texts, count in (("labels", labels, max(map(len, cells))), ("row_labels", row_labels, len(cells))):
        if texts is not None and len(texts) != count:
            raise ValueError(f"{name} has {len(texts)} entries for {count} {'columns' if name == 'labels' else 'rows'}")
    height = min(cell_height_px, max(cell.height for row in cells for cell in row))
    cells = [[cell.resize((max(1, round(cell.width * height / cell.height)), height)) for cell in row] for row in cells]
    columns = range(max(map(len, cells)))
    text_width = ImageDraw.Draw(Image.new("RGB", (1, 1))).textlength
    widths = [max(row[c].width for row in cells if c < len(row)) for c in columns]
    widths = [max(w, round(text_width(labels[c]))) if labels else w for c, w in enumerate(widths)]
    left = gap_px + (gap_px + max(round(text_width(text)) for text in row_labels) if row_labels else 0)
    top = gap_px + (12 + gap_px if labels else 0)  # the default font is 11 px high
    lefts = [left + sum(widths[:c]) + gap_px * c for c in columns]

    sheet = Image.new("RGB", (lefts[-1] + widths[-1] + gap_px, top + len(cells) * (height + gap_px)), "white")
    draw = ImageDraw.Draw(sheet)
    for c, text in enumerate(labels or ()):
        draw.text((lefts[c], gap_px), text, fill="black")
    for r, row in enumerate(cells):
        y = top + r * (height + gap_px)
        if row_labels:
            draw.text((gap_px, y + height // 2 - 6), row_labels[r], fill="black")
        for c, cell in enumerate(row):
            sheet.paste(cell, (lefts[c], y))
    return np.asarray(sheet)


# Reading clips


@dataclass(frozen=True)
class VideoInfo:
    """Length, average rate (0.0 if unknown) and upright size of a clip, and the library that reads it."""

    num_frames: int
    fps: float
    width_px: int
    height_px: int
    backend: str


@dataclass(frozen=True)
class _ClipIndex:
    """What the packets of a clip tell. Where timestamps cannot be trusted `pts` is None: then frames are counted."""

    num_frames: int
    fps: float
    width_px: int
    height_px: int
    pts: np.ndarray | None  # (N,) timestamps in presentation order
    key_pts: np.ndarray  # (K,) timestamps of the keyframes
    decord_obstacle: str  # why decord would not return exactly these frames; "" where it does


def probe_video(path: str | os.PathLike) -> VideoInfo:
    """Describe a clip: its packets are listed and one frame is decoded (all, to count them, without usable timestamps).

    `backend` is the library that `read_frames(..., backend="auto")` uses. Raises MediaError for a file that is missing,
    empty, cut short or without video.
    """
    index = _index(path)
    usable = not index.decord_obstacle and _decord() is not None
    return VideoInfo(index.num_frames, index.fps, index.width_px, index.height_px, "decord" if usable else "pyav")


def read_frames(
    path: str | os.PathLike,
    indices: Iterable[int],
    *,
    height_px: int | None = None,
    width_px: int | None = None,
    backend: str = "auto",
    num_threads: int = 1,
) -> np.ndarray:
    """Read the frames `indices` (any order, repeats allowed) of a clip -> uint8 RGB (T, H, W, 3).

    Frames are decoded at their own size and then resized (antialiased bilinear) to `height_px` x `width_px`; if only
    one is given, the other follows from the aspect. `backend` is "auto" (decord where it is installed and exact, else
    PyAV), "decord" or "pyav": the frames are the same. Raises MediaError as `probe_video` does, and IndexError for an
    index outside 0 .. num_frames - 1. Damage inside a clip is a MediaError from PyAV; decord conceals most of it.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}, but must be one of {', '.join(BACKENDS)}")
    indices = [int(i) for i in indices]
    index = _index(path)
    outside = [i for i in indices if not 0 <= i < index.num_frames]
    if outside:
        raise IndexError(
            f"{path}: frame {outside[0]} was asked for, but the clip has {index.num_frames} frames (from 0)"
        )
    size = _output_size(index, width_px, height_px)
    if not indices:
        return np.empty((0, size[1], size[0], 3), np.uint8)
    wanted = sorted(set(indices))
    frames = None if backend == "pyav" else _read_with_decord(path, index, wanted, num_threads, backend == "decord")
    if frames is None:
        frames = _read_with_pyav(path, index, wanted, num_threads)
    if size != (index.width_px, index.height_px):
        resized = (Image.fromarray(frame).resize(size, Image.Resampling.BILINEAR) for frame in frames)
        frames = [np.asarray(frame) for frame in resized]
    position = {number: k for k, number in enumerate(wanted)}
    return np.stack([frames[position[i]] for i in indices])  # (T, H, W, 3)


def _output_size(index: _ClipIndex, width_px: int | None, height_px: int | None) -> tuple[int, int]:
    for name, value in (("width_px", width_px), ("height_px", height_px)):
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value}, but must be at least 1")
    if width_px is not None:
        return width_px, height_px or max(1, round(index.height_px * width_px / index.width_px))
    if height_px is not None:
        return max(1, round(index.width_px * height_px / index.height_px)), height_px
    return index.width_px, index.height_px


@lru_cache(maxsize=1)
def _decord() -> Any:
    """The decord module, or None where it is not installed or its libraries do not load."""
    try:
        import decord
    except (ImportError, OSError):
        return None
    return decord


@contextmanager
def _open(path: str | os.PathLike, num_threads: int = 1) -> Iterator[tuple[Any, Any]]:
    """(container, video stream) of PyAV; every error of FFmpeg inside the block becomes a MediaError."""
    import av
    from av.error import FFmpegError

    _require_file(path)
    try:
        with av.open(os.fspath(path), metadata_errors="replace") as container:
            stream = container.streams.best("video")
            if stream is None:
                raise MediaError(path, "holds no video stream")
            if stream.codec_context is None:
                raise MediaError(path, "its codec is unknown")
            stream.codec_context.options = {"err_detect": "explode"}  # otherwise damaged frames are patched up silently
            stream.codec_context.thread_count = num_threads
            if num_threads > 1:
                stream.codec_context.thread_type = "AUTO"
            yield container, stream
    except FFmpegError as error:
        raise MediaError(path, f"cannot be read as video ({type(error).__name__}: {error.strerror})") from error


def _index(path: str | os.PathLike) -> _ClipIndex:
    _require_file(path)
    stat = os.stat(path)
    return _cached_index(os.fspath(path), stat.st_mtime_ns, stat.st_size)


@lru_cache(maxsize=1024)
def _cached_index(path: str, mtime_ns: int, size_bytes: int) -> _ClipIndex:
    with _open(path) as (container, stream):
        first = next(container.decode(stream), None)
        if first is None:
            raise MediaError(path, "no frame can be decoded")
        height, width = _upright(first).shape[:2]
    with _open(path) as (container, stream):
        packets, end_seconds = _list_packets(container, stream)
        _refuse_truncated(path, container, stream, len(packets), end_seconds)
        header_fps = float(stream.average_rate or 0)
        pts, key_pts = _presentation_order(container, stream, packets)
        fps = _average_fps(pts, stream.time_base, header_fps) if pts is not None else header_fps
        obstacle = _decord_obstacle(container, stream, packets, pts)
    num_frames = len(pts) if pts is not None else _count_frames(path)
    return _ClipIndex(num_frames, fps, width, height, pts, key_pts, obstacle)


@dataclass(frozen=True)
class _Packet:
    pts: int | None
    is_key: bool
    is_discard: bool  # cut away by an edit list
    is_idr: bool  # H.264 only: nothing after it in the file needs anything before it


def _list_packets(container, stream) -> tuple[list[_Packet], float]:
    """The video packets in file order, and the end of the last packet of any stream in seconds."""
    is_h264, extradata = stream.codec_context.name == "h264", stream.codec_context.extradata or b""
    packets, end_seconds = [], 0.0
    for packet in container.demux():
        if packet.size == 0:  # the flush packet of the end
            continue
        if packet.pts is not None:
            end_seconds = max(end_seconds, float((packet.pts + (packet.duration or 0)) * packet.time_base))
        if packet.stream_index == stream.index:
            is_idr = is_h264 and packet.is_keyframe and _holds_idr(bytes(packet), extradata)
            packets.append(_Packet(packet.pts, packet.is_keyframe, packet.is_discard, is_idr))
    return packets, end_seconds


def _holds_idr(data: bytes, extradata: bytes) -> bool:
    """Does an H.264 packet hold an IDR slice, NAL unit type 5 (ITU-T H.264 7.3.1 and annex B; ISO/IEC 14496-15 5.3)?"""
    if extradata[:1] != b"\x01":  # start codes
        return any(part and part[0] & 31 == 5 for part in data.split(b"\x00\x00\x01")[1:])
    length_bytes, start = (extradata[4] & 3) + 1, 0
    while start + length_bytes < len(data):
        if data[start + length_bytes] & 31 == 5:
            return True
        start += length_bytes + int.from_bytes(data[start : start + length_bytes], "big")
    return False


def _refuse_truncated(path: str, container, stream, num_packets: int, end_seconds: float) -> None:
    formats = container.format.name.split(",")
    if stream.frames and num_packets < HEADER_SHORTFALL * stream.frames - 1:
        raise MediaError(path, f"truncated: the header announces {stream.frames} frames, {num_packets} are in the file")
    # Only Matroska's duration is written by the muxer; others are estimated from what the file holds.
    duration_seconds = (container.duration or 0) / 1e6
    if "matroska" in formats and end_seconds < HEADER_SHORTFALL * duration_seconds - 0.1:
        raise MediaError(
            path, f"truncated: the header announces {duration_seconds:.2f} s, the file ends at {end_seconds:.2f} s"
        )


def _presentation_order(container, stream, packets: list[_Packet]) -> tuple[np.ndarray | None, np.ndarray]:
    """Sorted timestamps of the shown frames (None if frames must be counted) and those of the keyframes."""
    codec = stream.codec_context
    # AVI stores no presentation times: those that FFmpeg derives are right only where frames are not reordered.
    reordered_avi = container.format.name == "avi" and (codec.has_b_frames or codec.name == "h264")
    key_pts = np.array(sorted(p.pts for p in packets if p.is_key and p.pts is not None), np.int64)
    shown = [p.pts for p in packets if not p.is_discard]
    distinct = {value for value in shown if value is not None}
    if reordered_avi or len(distinct) != len(shown) or len(key_pts) == 0:
        return None, key_pts
    pts = np.array(sorted(distinct), np.int64)  # (N,)
    return pts[pts >= key_pts[0]], key_pts  # frames before the first keyframe refer to frames that the file lacks


def _average_fps(pts: np.ndarray, time_base: Fraction, header_fps: float) -> float:
    if len(pts) < 2:
        return header_fps
    measured = (len(pts) - 1) / float((int(pts[-1]) - int(pts[0])) * time_base)
    # Timestamps are rounded (Matroska: to 1 ms), so the header is the finer source where the two agree.
    return header_fps if abs(measured - header_fps) < 0.01 * measured else measured


def _decord_obstacle(container, stream, packets: list[_Packet], pts: np.ndarray | None) -> str:
    """Why decord would not return exactly the frames of this clip ("" if it does)."""
    codec = stream.codec_context
    if pts is None:
        return "the file has no usable timestamps"
    if not {"mov", "matroska"} & set(container.format.name.split(",")):
        return f"seeking in {container.format.name} is inexact"
    if codec.pix_fmt not in ("yuv420p", "yuvj420p") or codec.width % 2 or codec.height % 2:
        return f"its colour conversion differs for {codec.pix_fmt} at {codec.width}x{codec.height}"
    if len(pts) != len(packets):
        return "the file holds packets that are not shown"
    if codec.name == "h264" and not all(p.is_idr for p in packets if p.is_key):
        return "not every keyframe is an IDR picture, as in open GOPs"
    # The standards fix the decoded pixels of these to the bit, and decord's FFmpeg is an old one.
    return "" if codec.name in ("h264", "vp8", "vp9") else f"its {codec.name} decoder is not known to be exact"


def _count_frames(path: str) -> int:
    with _open(path) as (container, stream):
        return sum(1 for _ in container.decode(stream))


def _upright(frame) -> np.ndarray:
    """RGB uint8 (H, W, 3) of a PyAV frame, turned as its display matrix says."""
    return np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90))


def _read_with_decord(
    path: str | os.PathLike, index: _ClipIndex, wanted: list[int], num_threads: int, required: bool
) -> list[np.ndarray] | None:
    """The frames `wanted`, or None where decord is absent or fails: an error instead if `required`."""
    decord = _decord()
    reason = index.decord_obstacle if decord else "decord is not installed"
    if not reason:
        try:
            reader = decord.VideoReader(os.fspath(path), num_threads=num_threads, fault_tol=1e-9)
            frames = reader.get_batch(wanted).asnumpy()  # (T, H, W, 3)
            if len(reader) == index.num_frames and frames.shape[1:3] == (index.height_px, index.width_px):
                return list(frames)
            reason = f"decord sees {len(reader)} frames of {frames.shape[2]}x{frames.shape[1]}"
        except (RuntimeError, IndexError, decord.DECORDError, decord.DECORDLimitReachedError) as error:
            reason = str(error).strip().splitlines()[0]
    if required:
        raise MediaError(path, f"cannot be read exactly with decord ({reason}); use backend 'auto' or 'pyav'")
    return None


def _read_with_pyav(
    path: str | os.PathLike, index: _ClipIndex, wanted: list[int], num_threads: int
) -> list[np.ndarray]:
    """The frames `wanted` (sorted, no repeats), from the keyframes before them if that works, else from the start."""
    found: dict[int, np.ndarray] = {}
    if index.pts is not None:
        # A seek may land late, and what follows a keyframe of an open GOP or intra-refresh stream may not decode alone.
        with suppress(MediaError), _open(path, num_threads) as (container, stream):
            for key_pts, numbers in _group_by_keyframe(index.key_pts, index.pts, wanted):
                if key_pts != index.key_pts[0]:
                    container.seek(key_pts, stream=stream)
                found |= _decode_until(path, container.decode(stream), index, numbers)
    missing = [n for n in wanted if n not in found]
    if missing:
        with _open(path, num_threads) as (container, stream):
            found |= _decode_until(path, container.decode(stream), index, missing)
    missing = [n for n in wanted if n not in found]
    if missing:
        raise MediaError(path, f"frame {missing[0]} of {index.num_frames} is damaged or cannot be decoded")
    return [found[n] for n in wanted]


def _group_by_keyframe(key_pts: np.ndarray, pts: np.ndarray, wanted: list[int]) -> list[tuple[int, list[int]]]:
    """[(timestamp of a keyframe, the frames among `wanted` from it up to the next keyframe)]"""
    keys = key_pts[np.searchsorted(key_pts, pts[wanted], side="right") - 1]  # (T,)
    return [(int(key), [n for n, k in zip(wanted, keys, strict=True) if k == key]) for key in np.unique(keys)]


def _decode_until(
    path: str | os.PathLike, decoded: Iterator[Any], index: _ClipIndex, numbers: list[int]
) -> dict[int, np.ndarray]:
    """Decode until the last of `numbers` is past; the frames among them that came out undamaged."""
    found: dict[int, np.ndarray] = {}
    number_at = {n if index.pts is None else int(index.pts[n]): n for n in numbers}
    last = max(number_at)
    for count, frame in enumerate(decoded):
        position = count if index.pts is None else frame.pts
        if position in number_at and not frame.is_corrupt:
            image = _upright(frame)
            if image.shape[:2] != (index.height_px, index.width_px):
                raise MediaError(path, f"its frames change size at frame {number_at[position]}, which is not supported")
            found[number_at[position]] = image
        if position is not None and position >= last:
            break
    return found


# Writing clips


@contextmanager
def clip_writer(
    path: str | os.PathLike,
    fps: float | Fraction,
    *,
    codec: str = "libx264",
    crf: int = 18,
    lossless: bool = False,
    options: Mapping[str, str] | None = None,
) -> Iterator[Callable[[np.ndarray], None]]:
    """A function that appends uint8 RGB frames (T, H, W, 3) of one size to a new clip, which appears whole, at the end.

    Args:
        path: the suffix selects the container (.mp4); parent folders are made.
        codec: writes yuv420p, which needs even sizes: with an odd one the last column or row is repeated once.
        crf: constant quality; 0 is the best, 18 is hard to tell from the source.
        lossless: keep sizes and pixels, by H.264 in RGB, which not all players show; `codec` and `crf` do not count.
        options: more of FFmpeg's options for the codec.
    """
    import av
    from av.video.reformatter import ColorRange, Colorspace

    if not fps > 0:
        raise ValueError(f"fps is {fps}, but must be above 0")
    path = Path(path)
    codec, pixel_format, crf = ("libx264rgb", "rgb24", 0) if lossless else (codec, "yuv420p", crf)
    settings = {"crf": str(crf), **(options or {})}
    if codec.startswith("libx264"):  # with its macroblock tree, x264 gives another file at every run for some widths
        settings.setdefault("x264-params", "no-mbtree=1")
    movflags = {"movflags": "faststart"} if path.suffix.lower() in (".mp4", ".mov") else {}
    with _atomic(path) as temporary, av.open(str(temporary), "w", container_options=movflags) as container:
        stream: Any = container.add_stream(codec, rate=Fraction(fps).limit_denominator(1001), options=settings)
        stream.pix_fmt = pixel_format
        if not lossless:  # FFmpeg converts RGB with the BT.601 matrix; players would guess BT.709 for large frames
            stream.codec_context.colorspace, stream.codec_context.color_range = Colorspace.ITU601, ColorRange.MPEG

        def write(frames: np.ndarray) -> None:
            odd = (0, 0) if lossless else (frames.shape[1] % 2, frames.shape[2] % 2)
            frames = np.pad(frames, ((0, 0), (0, odd[0]), (0, odd[1]), (0, 0)), mode="edge")
            if not stream.codec_context.is_open:
                stream.height, stream.width = frames.shape[1:3]
            for frame in frames:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))

        yield write
        container.mux(stream.encode())


def write_video(
    path: str | os.PathLike, frames: np.ndarray | torch.Tensor, fps: float | Fraction, **settings: Any
) -> None:
    """Write uint8 RGB frames (T, H, W, 3) as a clip; see `clip_writer` for path and settings.

    Raises ValueError for other arrays and for no frames.
    """
    frames = frames.detach().cpu().numpy() if isinstance(frames, torch.Tensor) else np.asarray(frames)
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or 0 in frames.shape:
        raise ValueError(f"frames must be uint8 (T, H, W, 3) with T >= 1, got {frames.dtype} {frames.shape}")
    with clip_writer(path, fps, **settings) as write:
        write(frames)
