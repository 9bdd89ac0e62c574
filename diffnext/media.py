"""Images and clips with captions: what a table or a folder lists, and their pixels as an autoencoder takes them."""

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from common.config import find_file, option
from common.data import BAD_SAMPLE_ERRORS
from common.video import IMAGE_SUFFIXES, VIDEO_SUFFIXES, find_files, load_image, probe_video, read_frames

TABLES = (".csv", ".json", ".jsonl")
VIDEO_FRAMES, VIDEO_SIDE_PX, VIDEO_CROP_PX = "0:65:2", 480, (480, 768)
SHOWN = 5


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    source: str | None = option(None, "table of media and captions, or folder of media with captions beside; required")
    media_dir: str | None = option(None, "folder that a table's paths start from; null is the table's own")
    path_column: str = option("path", "column of paths")
    caption_column: str = option("caption", "column of long captions")
    text_column: str = option("text", "column of short captions; may be absent")
    flow_column: str = option("flow", "column of motion scores; may be absent")
    kind: Literal["auto", "image", "video"] = option("auto", "auto follows the suffixes, which must agree")
    frame_ids: str = option(VIDEO_FRAMES, "frames of each clip, as start:stop:step")
    resize: int | None = option(
        None, "short side in pixels; null is 480 for clips and keeps images, unless crop_size is given", minimum=8
    )
    crop_size: tuple[int, ...] = option(
        (), "height and width of the centre that is kept; none is 480 768 for clips, unless resize is given"
    )
    flow: Literal["auto", "column", "measure", "constant"] = option(
        "auto", "motion score of clips: of the column (auto: if there is one), measured, or flow_value"
    )
    flow_value: float = option(5.0, "the constant motion score", minimum=0)
    max_items: int | None = option(None, "only the first so many items", minimum=1)
    batch_size: int = option(1, "images or clips of one size that are encoded together, per process", minimum=1)
    num_workers: int = option(4, "processes that read media, per process; 0 reads in the process itself", minimum=0)

    def __post_init__(self) -> None:
        if len(self.crop_size) not in (0, 2) or any(size < 1 for size in self.crop_size):
            raise ValueError(f"crop_size is {list(self.crop_size)}, but must be a height and a width, e.g. 480,768")
        parse_frame_ids(self.frame_ids)


def parse_frame_ids(text: str) -> range:
    """`start:stop:step` (or `start:stop`, or `stop`) as a range; ValueError if it is none, or empty."""
    try:
        numbers = [int(part) for part in text.split(":")]
        frames = range(*numbers)
    except (ValueError, TypeError):
        frames = range(0)
    if len(frames) == 0 or frames[0] < 0 or frames[-1] < 0:
        raise ValueError(f"frame_ids is {text!r}, but must be start:stop:step with at least one frame, e.g. 0:65:2")
    return frames


# What to encode -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Item:
    """One image or clip: its path as the source has it, its file, captions, motion score."""

    path: str
    file: Path
    caption: str
    text: str
    flow: float | None


def read_items(data: SourceConfig) -> list[Item]:
    """All items of the source, in its order.

    Raises:
        FileNotFoundError: no source, or media of a table that are not there.
        ValueError: not a source, columns that are absent, rows without a caption; names the first few.
    """
    source = find_file(str(data.source), "--source")
    rows = _rows_of_folder(source, data) if source.is_dir() else _rows_of_table(source, data)
    media_dir = (
        source if source.is_dir() else find_file(data.media_dir, "--media_dir") if data.media_dir else source.parent
    )
    items, problems = [], []
    for name, row in rows[: data.max_items]:
        try:
            items.append(_item(row, media_dir, data))
        except ValueError as error:
            problems.append(f"{name}: {error}")
    if problems:
        raise ValueError(
            f"{len(problems)} of {len(rows)} items of {source} cannot be used: {listed(problems)}; mend or remove them"
        )
    if not items:
        raise ValueError(f"{source} has no items")
    missing = [str(item.file) for item in items if not item.file.is_file()]
    if missing:
        raise FileNotFoundError(
            f"{len(missing)} of the {len(items)} media of {source} are not there: {listed(missing)}; "
            "change --media_dir, or remove their rows"
        )
    return items


def listed(lines: Sequence[str]) -> str:
    """The first few of them."""
    return "; ".join(lines[:SHOWN]) + (f"; and {len(lines) - SHOWN} more" if len(lines) > SHOWN else "")


def _rows_of_table(path: Path, data: SourceConfig) -> list[tuple[str, dict[str, Any]]]:
    """(where it is, values by column) of each row."""
    if path.suffix.lower() not in TABLES:
        raise ValueError(f"--source {path} is neither a folder nor a table ({', '.join(TABLES)})")
    try:
        if path.suffix.lower() == ".csv":
            with open(path, encoding="utf-8-sig", newline="") as file:
                rows = list(csv.DictReader(file))
        elif path.suffix.lower() == ".jsonl":
            rows = [json.loads(line) for line in path.read_text("utf-8-sig").splitlines() if line.strip()]
        else:
            rows = json.loads(path.read_text("utf-8-sig"))
    except (ValueError, csv.Error) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path} must hold a list of objects, one for each image or clip")
    columns = list(dict.fromkeys(column for row in rows for column in row))
    wanted = {"path_column": data.path_column, "caption_column": data.caption_column}
    wanted |= {"flow_column": data.flow_column} if data.flow == "column" else {}
    absent = [f"{name!r} (--{setting})" for setting, name in wanted.items() if rows and name not in columns]
    if absent:
        raise ValueError(f"{path} has no column {', '.join(absent)}; it has {', '.join(map(str, columns))}")
    return [(f"row {n}", row) for n, row in enumerate(rows, start=1)]


def _rows_of_folder(folder: Path, data: SourceConfig) -> list[tuple[str, dict[str, Any]]]:
    suffixes = {"image": IMAGE_SUFFIXES, "video": VIDEO_SUFFIXES, "auto": IMAGE_SUFFIXES + VIDEO_SUFFIXES}[data.kind]
    rows = []
    for media in find_files(folder, suffixes):
        name = media.relative_to(folder).as_posix()
        values: Any = {}
        if media.with_suffix(".json").is_file():
            try:
                values = json.loads(media.with_suffix(".json").read_text("utf-8-sig"))
            except ValueError as error:
                raise ValueError(f"{media.with_suffix('.json')} is no valid JSON: {error}") from error
            if not isinstance(values, dict):
                raise ValueError(f"{media.with_suffix('.json')} must hold an object of names and values")
        if media.with_suffix(".txt").is_file():
            values = {data.caption_column: media.with_suffix(".txt").read_text("utf-8-sig").strip()} | values
        rows.append((name, values | {data.path_column: name}))
    return rows


def _item(row: Mapping[str, Any], media_dir: Path, data: SourceConfig) -> Item:
    path, caption, text = (row.get(name) for name in (data.path_column, data.caption_column, data.text_column))
    for name, value in ((data.path_column, path), (data.caption_column, caption)):
        if not isinstance(value, str) or not value.strip():
            raise ValueError(f"no {name}" if value in (None, "") else f"{name} is {value!r}, but must be text")
    if not isinstance(text, str | None):
        raise ValueError(f"{data.text_column} is {text!r}, but must be text")
    flow = row.get(data.flow_column) if data.flow in ("auto", "column") else None
    try:
        score = None if flow in (None, "") else float(flow)
    except (TypeError, ValueError):
        raise ValueError(f"{data.flow_column} is {flow!r}, but must be a number") from None
    if data.flow == "column" and score is None:
        raise ValueError(f"no {data.flow_column}")
    return Item(str(path), media_dir / str(path), str(caption), text or "", score)


# Pixels ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Preprocessing:
    """How a medium becomes pixels. Frames of clips are counted in presentation order."""

    is_video: bool
    frame_ids: tuple[int, ...]  # (0,) for images
    resize: int | None
    crop_size: tuple[int, ...]

    def read(self, file: Path) -> np.ndarray:
        """uint8 (T, H, W, 3); a short side of `resize`, then the centre of `crop_size`.

        Raises:
            ValueError: damaged, too short or too small.
        """
        if not self.is_video:
            image = load_image(file)
            height, width = self.scaled(image.height, image.width)
            if (width, height) != image.size:
                image = image.resize((width, height), Image.Resampling.BICUBIC)
            return self._centre(np.asarray(image)[None])  # (1, H, W, 3)
        info = probe_video(file)
        if info.num_frames <= max(self.frame_ids):
            raise ValueError(f"has {info.num_frames} frames, but frame {max(self.frame_ids)} (from 0) is in frame_ids")
        height, width = self.scaled(info.height_px, info.width_px)
        return self._centre(read_frames(file, self.frame_ids, height_px=height, width_px=width))  # (T, H, W, 3)

    def scaled(self, height: int, width: int) -> tuple[int, int]:
        """The size in pixels before the crop."""
        if self.resize is None:
            return height, width
        scale = float(self.resize) / float(min(height, width))
        return int(height * scale + 0.5), int(width * scale + 0.5)

    def _centre(self, pixels: np.ndarray) -> np.ndarray:
        height, width = pixels.shape[1:3]
        crop_height, crop_width = self.crop_size or (height, width)
        if height < crop_height or width < crop_width:
            raise ValueError(
                f"is {height} x {width} px (height x width) where {crop_height} x {crop_width} are cut out: "
                "raise resize, lower crop_size"
            )
        y, x = (height - crop_height) // 2, (width - crop_width) // 2
        return pixels[:, y : y + crop_height, x : x + crop_width]


def preprocessing_of(data: SourceConfig, items: Sequence[Item]) -> Preprocessing:
    """How the items are read; ValueError where some are images and some are clips."""
    suffixes = {"image": IMAGE_SUFFIXES, "video": VIDEO_SUFFIXES}
    kinds = {data.kind: items[0]}
    if data.kind == "auto":
        kinds = {
            kind: item for item in items for kind, ends in suffixes.items() if item.file.suffix.lower() in ends
        } or {"": items[0]}
    if len(kinds) > 1 or "" in kinds:
        names = " and ".join(item.path for item in kinds.values())
        problem = "neither an image nor a clip" if "" in kinds else "an image and a clip; a cache holds one kind"
        raise ValueError(f"{names}: {problem}; choose with --kind image or video")
    if "image" in kinds:
        return Preprocessing(False, (0,), data.resize, data.crop_size)
    frame_ids = tuple(parse_frame_ids(data.frame_ids))
    if data.resize is None and not data.crop_size:
        return Preprocessing(True, frame_ids, VIDEO_SIDE_PX, VIDEO_CROP_PX)
    return Preprocessing(True, frame_ids, data.resize, data.crop_size)


class _Media(Dataset):
    def __init__(self, items: Sequence[Item], indices: Sequence[int], preprocessing: Preprocessing) -> None:
        self.items, self.indices, self.preprocessing = items, indices, preprocessing

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, place: int) -> tuple[int, Tensor | None, str]:
        index = self.indices[place]
        item = self.items[index]
        try:
            return index, torch.from_numpy(self.preprocessing.read(item.file).copy()), ""  # (T, H, W, 3)
        except BAD_SAMPLE_ERRORS as error:
            return index, None, str(error).removeprefix(f"{item.file}: ")


Sample = tuple[int, Tensor | None, str]  # index, uint8 (T, H, W, 3) or None, why not


def read_media(
    items: Sequence[Item], indices: Sequence[int], preprocessing: Preprocessing, num_workers: int
) -> Iterator[Sample]:
    """The items of `indices`, in order, read ahead by loader processes."""
    workers = min(num_workers, len(indices))
    media = _Media(items, indices, preprocessing)
    return iter(DataLoader(media, batch_size=None, num_workers=workers, collate_fn=_as_it_is))


def _as_it_is(sample: Sample) -> Sample:
    return sample
