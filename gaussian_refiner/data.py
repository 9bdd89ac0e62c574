"""Pairs of flawed renders and photographs: the list files, aspect buckets, shared random windows, and samples.

An item is a render of a 3-D Gaussian scene (`render`), the photograph at its pose (`gt`) and, optionally, a photograph
from another camera or moment (`cond`). All three are resized to the bucket of the render's aspect, whatever their own
sizes, and cut to one square window.
"""

import difflib
import hashlib
import json
import logging
import os
from collections.abc import Hashable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from common.video import MediaError, image_size, load_image

# (width_px, height_px) by label. The label serves as an aspect in `choose_bucket` and is not the aspect of the size.
BUCKETS = {"1.5": (640, 480), "3.66": (1917, 512)}
IMAGE_KEYS = ("render", "gt", "cond")
DIFIX_KEYS = {"render": "image", "gt": "target_image", "cond": "ref_image"}
IO_THREADS = 16
SHOWN_PROBLEMS = 5
HOLDOUT_ITEMS = 10

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Pair:
    """One item. `name` is unique in its list; `cond` is None without a conditioning photograph."""

    name: str
    render: Path
    gt: Path
    cond: Path | None = None
    prompt: str = ""

    @property
    def files(self) -> list[Path]:
        return [path for path in (self.render, self.gt, self.cond) if path is not None]


@dataclass(frozen=True)
class Pairs:
    """The items to train on and those held out, which training never sees."""

    train: tuple[Pair, ...]
    validation: tuple[Pair, ...]


# List files


def read_pairs(json_path: str | Path, data_root: str | Path | None = None, holdout: int | None = None) -> Pairs:
    """Read and check a list of pairs.

    Two formats: three parallel lists `{"render": [...], "gt": [...], "cond": [...]}` (null in `cond` where there is
    none), or Difix3D's `{"train": {id: {"image", "target_image", "ref_image"?, "prompt"?}}, "test": {...}}`. The `test`
    items are the validation set; without them it is the last `holdout` items of the list. None holds out the last 10,
    and of a shorter list all but one.

    Relative paths start at `data_root` and must stay inside it. Without `data_root` they start at the working
    directory, or, decided once for all of them, at the folder of the json file if some file is missing in the former
    and found in the latter. Absolute paths are taken as they are.

    Raises:
        FileNotFoundError: there is no such list file.
        ValueError: all problems of the list together: format, missing keys, unequal lengths, empty paths, paths outside
            `data_root`, missing files, too few items for the hold-out.
    """
    json_path = Path(json_path)
    if not json_path.is_file():
        raise FileNotFoundError(
            f"the list of pairs {json_path} (from {Path.cwd()}) is not a file; set data.data_json to where it is"
        )
    if holdout is not None and holdout < 0:
        raise ValueError(f"data.holdout_items is {holdout}, but must be at least 0")
    try:
        content = json.loads(json_path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{json_path} is not json: {error}") from error
    problems: list[str] = []
    splits = _parse(content, problems)
    records = [record for split in splits.values() for record in split]
    root = _choose_root(records, json_path, data_root)
    if data_root is not None:
        problems += _outside_root(records, root)
    problems += _missing_files(records, root)
    num_items = len(splits["train"])
    num_held_out = 0 if "test" in splits else _num_held_out(num_items, holdout)
    if not problems and num_items <= num_held_out:
        remedy = f"add items or set data.holdout_items to at most {num_items - 1}" if num_items > 1 else "add items"
        problems.append(
            f"it lists {num_items} items, but the last {num_held_out} are held out for validation (data.holdout_items),"
            f" which leaves none to train on: {remedy}"
        )
    if problems:
        raise ValueError(f"{json_path}:" + "".join(f"\n  - {problem}" for problem in problems))
    if "test" not in splits and holdout is None and num_held_out < HOLDOUT_ITEMS:
        logger.warning(
            "%s lists %d items: all but one are held out for validation; set data.holdout_items", json_path, num_items
        )
    if num_prompts := sum(bool(record["prompt"]) for record in records):
        logger.warning("%s: prompts (%d) are not used, the refiner takes no text", json_path, num_prompts)
    pairs = {name: tuple(_pair(record, root) for record in split) for name, split in splits.items()}
    num_train = num_items - num_held_out
    return Pairs(pairs["train"][:num_train], pairs.get("test") or pairs["train"][num_train:])


def _num_held_out(num_items: int, wanted: int | None) -> int:
    return max(1, min(HOLDOUT_ITEMS, num_items - 1)) if wanted is None else wanted


def _pair(record: dict[str, Any], root: Path) -> Pair:
    cond = None if record["cond"] is None else root / record["cond"]
    return Pair(record["name"], root / record["render"], root / record["gt"], cond, record["prompt"])


def _parse(content: Any, problems: list[str]) -> dict[str, list[dict[str, Any]]]:
    """Records {name, render, gt, cond, prompt} per split, paths as written; what is wrong goes to `problems`."""
    if isinstance(content, dict) and isinstance(content.get("train"), dict):
        splits = {"train": _parse_difix("train", content["train"], problems)}
        if not content["train"]:
            problems.append("its train split has no items")
        if content.get("test"):
            splits["test"] = _parse_difix("test", content["test"], problems)
        return splits
    if not isinstance(content, dict):
        problems.append(
            f"it holds a {type(content).__name__}, expected an object with the lists {', '.join(IMAGE_KEYS)}"
        )
        return {"train": []}
    missing = [key for key in IMAGE_KEYS if key not in content]
    problems += [f"missing key {key!r}{_similar(key, content)}" for key in missing]
    wrong = [key for key in IMAGE_KEYS if key in content and not isinstance(content[key], list)]
    problems += [f"{key!r} is a {type(content[key]).__name__}, expected a list of paths" for key in wrong]
    if missing or wrong:
        return {"train": []}
    lengths = [len(content[key]) for key in IMAGE_KEYS]
    if len(set(lengths)) != 1:
        numbers = ", ".join(f"{key} {length}" for key, length in zip(IMAGE_KEYS, lengths, strict=True))
        problems.append(f"the lists must be equally long, but have: {numbers}")
    return {"train": _check_records(_parallel_records(content), problems)}


def _parallel_records(content: dict[str, list]) -> list[tuple[str, dict[str, Any]]]:
    rows = zip(*(content[key] for key in IMAGE_KEYS), strict=False)  # unequal lengths are reported already
    records = []
    for number, row in enumerate(rows):
        stem = Path(row[0]).stem if isinstance(row[0], str) else ""
        record = {"name": f"{number:06d}_{stem}", **dict(zip(IMAGE_KEYS, row, strict=True)), "prompt": ""}
        records.append((f"item {number}", record))
    return records


def _parse_difix(split: str, items: Any, problems: list[str]) -> list[dict[str, Any]]:
    if not isinstance(items, dict):
        problems.append(f"{split!r} is a {type(items).__name__}, expected an object of items by id")
        return []
    records, lacking = [], []
    for name, item in items.items():
        if not isinstance(item, dict):
            lacking.append(f"{split} item {name!r} is a {type(item).__name__}, expected an object")
            continue
        missing = [key for key in ("image", "target_image") if key not in item]
        lacking += [f"{split} item {name!r} lacks the key {key!r}{_similar(key, item)}" for key in missing]
        if not missing:
            images = {key: item.get(DIFIX_KEYS[key]) for key in IMAGE_KEYS}
            record = {"name": name, **images, "prompt": str(item.get("prompt") or "")}
            records.append((f"{split} item {name!r}", record))
    problems += _abridge(lacking)
    return _check_records(records, problems)


def _check_records(records: list[tuple[str, dict[str, Any]]], problems: list[str]) -> list[dict[str, Any]]:
    """The records whose paths are non-empty strings (`cond` may be None)."""
    good, bad = [], []
    for where, record in records:
        faults = [
            f"{where}: {key} is {record[key]!r}, expected a path"
            for key in IMAGE_KEYS
            if not (isinstance(record[key], str) and record[key].strip())
            and not (key == "cond" and record[key] is None)
        ]
        bad += faults
        if not faults:
            good.append(record)
    problems += _abridge(bad)
    return good


def _similar(key: str, candidates: Iterable[str]) -> str:
    close = difflib.get_close_matches(key, list(candidates), n=1)
    return f" (did you mean {key!r} by {close[0]!r}?)" if close else f" (found: {', '.join(candidates) or 'nothing'})"


def _abridge(lines: list[str]) -> list[str]:
    more = len(lines) - SHOWN_PROBLEMS
    return lines[:SHOWN_PROBLEMS] + ([f"... and {more} more like these"] if more > 0 else [])


def _paths(records: list[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(record[key] for record in records for key in IMAGE_KEYS if record[key] is not None))


def _absent(paths: Sequence[str], root: Path) -> list[str]:
    with ThreadPoolExecutor(IO_THREADS) as pool:  # on network file systems the latency of each look-up adds up
        return [
            path
            for path, found in zip(paths, pool.map(lambda p: (root / p).is_file(), paths), strict=True)
            if not found
        ]


def _choose_root(records: list[dict[str, Any]], json_path: Path, data_root: str | Path | None) -> Path:
    if data_root is not None:
        return Path(data_root).absolute()
    root, beside_json = Path.cwd(), json_path.absolute().parent
    absent = [path for path in _absent(_paths(records), root) if not os.path.isabs(path)]
    return beside_json if len(_absent(absent, beside_json)) < len(absent) else root


def _outside_root(records: list[dict[str, Any]], root: Path) -> list[str]:
    outside = [p for p in _paths(records) if not os.path.isabs(p) and os.path.normpath(p).split(os.sep)[0] == ".."]
    return _abridge(
        [
            f"{path} leads out of data.data_root ({root}); write it as an absolute path if it is meant"
            for path in outside
        ]
    )


def _missing_files(records: list[dict[str, Any]], root: Path) -> list[str]:
    absent = _absent(_paths(records), root)
    if not absent:
        return []
    shown = "".join(f"\n      {root / path}" for path in absent[:SHOWN_PROBLEMS])
    return [
        f"{len(absent)} files are missing (relative paths start at {root}; data.data_root sets it), the first:{shown}"
    ]


# Buckets, windows


def choose_bucket(width_px: int, height_px: int) -> str:
    """The key of the bucket whose label is nearest to width / height; the earlier one in a tie."""
    return min(BUCKETS, key=lambda key: abs(float(key) - width_px / height_px))


def window_offset(rng: np.random.Generator, width_px: int, height_px: int, inclusive: bool = False) -> int:
    """Left edge of a square window of the full height, uniform in [0, width - height).

    The right-most window is never drawn, as upstream; `inclusive` allows it. 0 where only one window fits.
    """
    if width_px < height_px:
        raise ValueError(f"a window of {height_px} px does not fit into a width of {width_px} px")
    return int(rng.integers(0, max(1, width_px - height_px + int(inclusive))))


def window_places(width_px: int, height_px: int, count: int) -> list[int]:
    """Left edges of `count` windows spread evenly from edge to edge; one window lies in the centre."""
    spare_px = width_px - height_px
    return [spare_px // 2] if count == 1 else [round(spare_px * place / (count - 1)) for place in range(count)]


def load_crops(pair: Pair, bucket_wh: tuple[int, int], offset: int) -> dict[str, np.ndarray]:
    """{"render", "gt", "cond"}: uint8 (H, H, 3), each resized to the bucket (W, H) with LANCZOS, then columns
    offset .. offset + H - 1. Without a `cond` its crop is zeros. Raises MediaError with the path of an unreadable file.
    """
    width, height = bucket_wh
    crops = {key: np.zeros((height, height, 3), np.uint8) for key in IMAGE_KEYS}
    for key in IMAGE_KEYS:
        path = getattr(pair, key)
        if path is not None:
            image = load_image(path).resize((width, height), Image.Resampling.LANCZOS)
            crops[key] = np.asarray(image.crop((offset, 0, offset + height, height)))  # (H, H, 3)
    return crops


def normalise(image: np.ndarray) -> np.ndarray:
    """uint8 (H, W, C) in 0..255 -> float32 (C, H, W) in [-1, 1]."""
    return np.ascontiguousarray((image.astype(np.float32) / 127.5 - 1).transpose(2, 0, 1))


def bucket_batches(
    order: Sequence[int], bucket_of_index: Sequence[Hashable], batch_size: int, drop_last: bool
) -> list[list[int]]:
    """One pass over `order` in batches of one bucket each, for validation and inference.

    Indices join the open batch of their bucket in the given order; a batch is emitted when it is full. The partial ones
    follow at the end in ascending order of bucket, unless `drop_last`. Nothing is kept between calls.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}, but must be at least 1")
    batches: list[list[int]] = []
    open_batches: dict[Any, list[int]] = {}
    for index in order:
        batch = open_batches.setdefault(bucket_of_index[index], [])
        batch.append(int(index))
        if len(batch) == batch_size:
            batches.append(open_batches.pop(bucket_of_index[index]))
    return batches + ([] if drop_last else [open_batches[bucket] for bucket in sorted(open_batches)])


# Samples


class RefinerDataset:
    """Random square windows of pairs, as functions of (index, rng).

    Args:
        random_flip: mirror all three images of half of the samples.
        height_px: window size for small experiments, a multiple of 8: both buckets are scaled to this height. None
            keeps 480 and 512.
        windows_per_item: draw from so many fixed windows (see `window_places`); None draws from all offsets.
    """

    def __init__(
        self,
        pairs: Sequence[Pair],
        *,
        random_flip: bool = False,
        height_px: int | None = None,
        windows_per_item: int | None = None,
    ) -> None:
        if not pairs:
            raise ValueError("a data set needs at least one pair")
        if height_px is not None and (height_px < 8 or height_px % 8):
            raise ValueError(f"height_px is {height_px}, but must be a multiple of 8 (the VAE's downsampling)")
        if windows_per_item is not None and windows_per_item < 1:
            raise ValueError(f"windows_per_item is {windows_per_item}, but must be at least 1")
        self.pairs = tuple(pairs)
        self.random_flip, self.windows_per_item = random_flip, windows_per_item
        self.buckets = {
            key: (w, h) if height_px is None else (round(w * height_px / h), height_px)
            for key, (w, h) in BUCKETS.items()
        }
        self._bucket_keys: list[str] | None = None

    def __len__(self) -> int:
        return len(self.pairs)

    def files_of(self, index: int) -> list[Path]:
        """The files that sample `index` reads."""
        return self.pairs[index].files

    def bucket_of(self, index: int) -> str:
        """The bucket of an item by its render's size. The first call reads the headers of all renders.

        An unreadable header counts as the first bucket: `sample` then reports the file.
        """
        if self._bucket_keys is None:
            with ThreadPoolExecutor(IO_THREADS) as pool:
                self._bucket_keys = list(pool.map(_bucket_or_first, self.pairs))
        return self._bucket_keys[index]

    def sample(self, index: int, rng: np.random.Generator) -> dict[str, Any]:
        """A random window of item `index`.

        Returns `render`, `gt`, `prompt_img`: float32 (3, H, H) in [-1, 1]; `cond_u8`: the conditioning crop for CLIP,
        an image, since a batch keeps those as a list on the CPU; `has_cond`: bool (). Without a conditioning image
        `prompt_img` and `cond_u8` are zeros. Draws from `rng`: the window, then the flip if `random_flip`. Raises
        MediaError with the path of an unreadable file.
        """
        bucket_wh = self._bucket_wh(index)
        if self.windows_per_item is None:
            offset = window_offset(rng, *bucket_wh)
        else:
            offset = window_places(*bucket_wh, self.windows_per_item)[self.draw_place(rng)]
        flip = self.random_flip and bool(rng.random() < 0.5)
        return _to_sample(self.pairs[index], load_crops(self.pairs[index], bucket_wh, offset), flip)

    def draw_place(self, rng: np.random.Generator) -> int:
        """Which of its `windows_per_item` fixed windows a sample shows."""
        return int(rng.integers(self.windows_per_item))

    def window(self, index: int, place: int) -> dict[str, Any]:
        """One of the fixed windows of item `index`, never flipped; keys as in `sample`."""
        bucket_wh = self._bucket_wh(index)
        offset = window_places(*bucket_wh, self.windows_per_item)[place]
        return _to_sample(self.pairs[index], load_crops(self.pairs[index], bucket_wh, offset), flip=False)

    def validation_sample(self, index: int) -> dict[str, Any]:
        """The centre window of item `index`, never flipped; keys as in `sample`."""
        bucket_wh = self._bucket_wh(index)
        crops = load_crops(self.pairs[index], bucket_wh, window_places(*bucket_wh, 1)[0])
        return _to_sample(self.pairs[index], crops, flip=False)

    def fingerprint(self) -> dict[str, Any]:
        """What identifies the data set, also after its folder has moved: compared when a run is resumed."""
        base = os.path.commonpath([path.parent for pair in self.pairs for path in pair.files])
        names = [(p.name, p.prompt, [os.path.relpath(f, base) for f in p.files]) for p in self.pairs]
        digest = hashlib.sha256(json.dumps(names).encode()).hexdigest()
        return {
            "num_items": len(self),
            "pairs_sha256": digest,
            "buckets": {k: list(v) for k, v in self.buckets.items()},
        }

    def _bucket_wh(self, index: int) -> tuple[int, int]:
        # Reads one header at most: a loader process must not scan all files for one sample.
        key = self._bucket_keys[index] if self._bucket_keys else choose_bucket(*image_size(self.pairs[index].render))
        return self.buckets[key]


def _bucket_or_first(pair: Pair) -> str:
    try:
        return choose_bucket(*image_size(pair.render))
    except MediaError:
        return next(iter(BUCKETS))


def _to_sample(pair: Pair, crops: dict[str, np.ndarray], flip: bool) -> dict[str, Any]:
    if flip:
        crops = {key: crop[:, ::-1] for key, crop in crops.items()}
    has_cond = pair.cond is not None
    prompt_img = normalise(crops["cond"])  # (3, H, H)
    return {
        "render": normalise(crops["render"]),
        "gt": normalise(crops["gt"]),
        "prompt_img": prompt_img if has_cond else np.zeros_like(prompt_img),
        "cond_u8": Image.fromarray(np.ascontiguousarray(crops["cond"])),
        "has_cond": np.array(has_cond),
    }
