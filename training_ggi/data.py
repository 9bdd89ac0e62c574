"""DL3DV-10K: which scenes there are, their captions, and clips cut out of them.

Below the data root: `DL3DV-10K/<batch>/<scene>/images_2/frame_00001.png`, ...; `seeds.txt`, the scenes to use, a line
`DL3DV-10K/<batch>/<scene>` each; and `captions.json`, an object of captions by scene id, the last part of such a line.
"""

import hashlib
import json
import logging
import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from common.video import IMAGE_SUFFIXES, MediaError, image_size, load_image
from training_ggi.models.frames import Size, crop_clip, resize_frame, resized_size

logger = logging.getLogger(__name__)

DATASET_FOLDER = "DL3DV-10K"
IMAGE_FOLDER = "images_2"  # 1920x1080, half of what was filmed
CAPTIONS = "captions.json"
NUM_FRAMES = 46  # read of a scene; the last one is repeated up to 49
IO_THREADS = 16
SHOWN_PROBLEMS = 5
# Steps of a sequence that fills the unit cube evenly, however long it is (Roberts 2018, "The unreasonable effectiveness
# of quasirandom sequences"): 1 / g, 1 / g^2, 1 / g^3 with g^4 = g + 1.
SPREAD = (0.8191725133961645, 0.6710436067037893, 0.5497004779019703)


# Scenes


@dataclass(frozen=True)
class Scene:
    """One scene. `name` is its path from the data root, `folder` holds its images."""

    name: str
    folder: Path
    prompt: str = ""

    @property
    def scene_id(self) -> str:
        return PurePosixPath(self.name).name

    def images(self) -> list[Path]:
        """The frames, `frame_2` before `frame_10`. Raises OSError for a folder that cannot be read."""
        names = [name for name in os.listdir(self.folder) if name[0] != "." and name.lower().endswith(IMAGE_SUFFIXES)]
        return [self.folder / name for name in sorted(names, key=_natural)]


@dataclass(frozen=True)
class Scenes:
    """The scenes to train on and those held out, which training never sees."""

    train: tuple[Scene, ...]
    validation: tuple[Scene, ...]


def read_scenes(
    data_root: str | Path,
    dataset_file: str | Path | None = "seeds.txt",
    prompt_file: str | Path | None = CAPTIONS,
    *,
    image_folder: str = IMAGE_FOLDER,
    num_validation_scenes: int = 0,
    num_scenes: int | None = None,
) -> Scenes:
    """The scenes of a list, in its order: the last ones are held out, the others trained on.

    Both files are looked for in `data_root`, then in the working directory. Scenes without images are left out, as the
    list is of more than most people download; those without a caption get the empty prompt. One warning counts each.

    Args:
        dataset_file: None takes every scene of the folder, in alphabetic order.
        prompt_file: None gives every scene the empty prompt.
        image_folder: of each scene; one without it that has a single other `images*` is read from there.
        num_validation_scenes: how many are held out.
        num_scenes: train on the first so many of the rest.

    Raises:
        FileNotFoundError: the folder or a file is not there.
        ValueError: a file is unusable, or too few scenes have images.
    """
    if num_validation_scenes < 0:
        raise ValueError(f"data.num_validation_scenes is {num_validation_scenes}, but must be at least 0")
    if num_scenes is not None and num_scenes < 1:
        raise ValueError(f"data.max_train_samples is {num_scenes}, but must be at least 1, or unset for all scenes")
    root = Path(data_root)
    names = list_scene_names(root, dataset_file, image_folder)
    prompts = {} if prompt_file is None else read_captions(root, prompt_file)
    with ThreadPoolExecutor(IO_THREADS) as pool:  # on network file systems the latency of each look-up adds up
        found = list(pool.map(lambda name: find_image_folder(root / name, image_folder), names))
    missing = _describe_missing(names, found)
    scenes = [Scene(name, each) for name, each in zip(names, found, strict=True) if isinstance(each, Path)]
    if len(scenes) <= num_validation_scenes:
        raise ValueError(
            f"{root.absolute()}: {len(scenes)} scenes have images, and the last {num_validation_scenes} are held out "
            f"for validation (data.num_validation_scenes), which leaves none to train on{missing and f'; {missing}'}"
        )
    if missing:
        logger.warning("%s: these are left out: %s", root.absolute(), missing)
    scenes = [Scene(scene.name, scene.folder, prompts.get(scene.scene_id, "")) for scene in scenes]
    lacking = [scene for scene in scenes if not scene.prompt]
    if prompt_file is not None and lacking:
        logger.warning(
            "%d of %d scenes have no caption in %s and get the empty prompt; scripts/caption_dl3dv.py adds them",
            len(lacking), len(scenes), prompt_file,
        )  # fmt: skip
    num_train = len(scenes) - num_validation_scenes
    return Scenes(tuple(scenes[:num_train][:num_scenes]), tuple(scenes[num_train:]))


def list_scene_names(root: Path, dataset_file: str | Path | None, image_folder: str | None = IMAGE_FOLDER) -> list[str]:
    """Scenes of a list, each once, or of the folder `DL3DV-10K` in `root`, as paths from `root`.

    Without a list, only scenes with images count, or all folders where `image_folder` is None. Raises what
    `read_scenes` raises.
    """
    if not root.is_dir():
        raise FileNotFoundError(
            f"{root} (from {Path.cwd()}) is not a folder; set data.data_root to what holds the data"
        )
    if dataset_file is None:
        names = _scan_scene_names(root)
        if image_folder is not None:
            names = [name for name in names if isinstance(find_image_folder(root / name, image_folder), Path)]
        if not names:
            raise ValueError(
                f"{root.absolute()} holds no scenes; their images must be in {DATASET_FOLDER}/<batch>/<scene>/"
                f"{IMAGE_FOLDER} below it"
            )
        return names
    remedy = "set it to null to take every scene of the folder, or data.data_root to what holds the data"
    path = _locate(root, dataset_file, "data.dataset_file", remedy)
    lines = [line.strip().rstrip("/") for line in _read_text(path, "data.dataset_file").splitlines()]
    names = list(dict.fromkeys(line for line in lines if line))
    outside = [name for name in names if os.path.isabs(name) or ".." in PurePosixPath(name).parts]
    if outside or not names:
        fault = f"{outside[0]!r} is no path from data.data_root" if outside else "it is empty"
        raise ValueError(f"data.dataset_file is {path}: {fault}; expected lines {DATASET_FOLDER}/<batch>/<scene>")
    return names


def _scan_scene_names(root: Path) -> list[str]:
    dataset = root / DATASET_FOLDER
    batches = [dataset / name for name in _subfolders(dataset)]
    with ThreadPoolExecutor(IO_THREADS) as pool:
        scenes = pool.map(_subfolders, batches)
        return [
            f"{DATASET_FOLDER}/{batch.name}/{scene}"
            for batch, names in zip(batches, scenes, strict=True)
            for scene in names
        ]


def _subfolders(folder: Path) -> list[str]:
    if not folder.is_dir():
        return []
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if entry.name[0] != "." and entry.is_dir())


def find_image_folder(scene_folder: Path, image_folder: str = IMAGE_FOLDER) -> Path | str:
    """`image_folder` of a scene, or its only folder `images*`; otherwise why there is none to choose."""
    if not scene_folder.is_dir():
        return "no such folder"
    folders = [name for name in _subfolders(scene_folder) if name.startswith("images") or name == image_folder]
    if image_folder in folders or len(folders) == 1:
        return scene_folder / (image_folder if image_folder in folders else folders[0])
    if not folders:
        return f"holds no folder {image_folder}"
    return f"holds no folder {image_folder}, but {' and '.join(folders)}: choose one with data.image_folder"


def _describe_missing(names: Sequence[str], found: Sequence[Path | str]) -> str:
    missing = [(name, reason) for name, reason in zip(names, found, strict=True) if isinstance(reason, str)]
    if not missing:
        return ""
    lines = "".join(f"\n      {name}: {reason}" for name, reason in missing[:SHOWN_PROBLEMS])
    more = len(missing) - SHOWN_PROBLEMS
    return (
        f"{len(missing)} of {len(names)} scenes have no images (`python scripts/doctor.py scenes DATA_ROOT` lists "
        f"those that can be used, for data.dataset_file):{lines}"
        + (f"\n      ... and {more} more like these" if more > 0 else "")
    )


def read_captions(root: Path, prompt_file: str | Path) -> dict[str, str]:
    """Captions by scene id. Raises FileNotFoundError, or ValueError for a file that is no object of texts.

    The original's settings name `prompts.json`, which it never read: where there is none, `captions.json` is meant.
    """
    remedy = "scripts/caption_dl3dv.py writes one, and data.use_captions=false trains without"
    if str(prompt_file) == "prompts.json" and not any((place / prompt_file).is_file() for place in (root, Path.cwd())):
        logger.warning("data.prompt_file is prompts.json, which does not exist: %s is read instead", CAPTIONS)
        prompt_file = CAPTIONS
    path = _locate(root, prompt_file, "data.prompt_file", remedy)
    try:
        captions = json.loads(_read_text(path, "data.prompt_file"))
    except ValueError as error:
        raise ValueError(f"data.prompt_file is {path}, which is not json: {error}") from error
    if not isinstance(captions, dict) or not all(isinstance(caption, str) for caption in captions.values()):
        raise ValueError(f"data.prompt_file is {path}, which is no json object of captions by scene id")
    return captions


def _locate(root: Path, name: str | Path, setting: str, remedy: str) -> Path:
    tried = list(dict.fromkeys((root / name, Path.cwd() / name)))
    for path in tried:
        if path.is_file():
            return path
    raise FileNotFoundError(f"{setting} is {name}, but there is no file {' or '.join(map(str, tried))}; {remedy}")


def _read_text(path: Path, setting: str) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{setting} is {path}, which is no UTF-8 text: {error}") from error


def _natural(name: str) -> list[Any]:
    parts = re.split(r"(\d+)", name)
    return [int(part) if index % 2 else part for index, part in enumerate(parts)]


# Clips


@dataclass(frozen=True)
class Cut:
    """Where a clip lies in its scene: frames `start`, `start + interval`, ..., and its corner in the resized frames."""

    interval: int
    start: int
    top: int
    left: int


@dataclass(frozen=True)
class _Extent:
    """What there is to cut from: the frames, their size in pixels, and that after resizing."""

    images: list[Path]
    size_hw: Size
    resized_hw: Size


class SceneDataset:
    """Clips of scenes, as functions of (index, rng) or (index, cut).

    Args:
        num_frames: of a clip.
        frame_intervals: steps between its frames to choose from; those that do not fit into a scene are passed over.
        random_start: begin anywhere in the scene, not always at its first frame.
        height_px, width_px: of a clip.
        edge_folder: beside the images' folder of each scene, with an edge image per frame, of the same name and size;
            None leaves edges out.
        num_threads: frames of a clip that are decoded at a time.
    """

    def __init__(
        self,
        scenes: Sequence[Scene],
        *,
        num_frames: int = NUM_FRAMES,
        frame_intervals: Sequence[int] = (1,),
        random_start: bool = True,
        height_px: int = 480,
        width_px: int = 720,
        edge_folder: str | None = None,
        num_threads: int = 4,
    ) -> None:
        if not scenes:
            raise ValueError("a data set needs at least one scene")
        counts = {"num_frames": num_frames, "height_px": height_px, "width_px": width_px, "num_threads": num_threads}
        low = [f"{name} is {value}, but must be at least 1" for name, value in counts.items() if value < 1]
        if not frame_intervals or min(frame_intervals) < 1:
            low.append(f"frame_intervals is {list(frame_intervals)}, but must hold numbers that are at least 1")
        if low:
            raise ValueError("; ".join(low))
        self.scenes, self.num_frames, self.random_start = tuple(scenes), num_frames, random_start
        self.frame_intervals = sorted(set(frame_intervals))
        self._crop_hw, self.edge_folder, self.num_threads = (height_px, width_px), edge_folder, num_threads

    def __len__(self) -> int:
        return len(self.scenes)

    def files_of(self, index: int) -> list[Path]:
        """The folder that sample `index` is read from."""
        return [self.scenes[index].folder]

    def images_of(self, index: int) -> list[Path]:
        """All images of a scene, and their edges where those are read. Raises OSError for a missing folder."""
        images = self.scenes[index].images()
        return images + ([self._edges_of(index, image) for image in images] if self.edge_folder else [])

    def _edges_of(self, index: int, image: Path) -> Path:
        return self.scenes[index].folder.parent / str(self.edge_folder) / image.name

    def sample(self, index: int, rng: np.random.Generator) -> dict[str, Any]:
        """`item` of a cut drawn with `rng`."""
        return self.item(index, self.draw_cut(index, rng))

    def draw_cut(self, index: int, rng: np.random.Generator) -> Cut:
        """Draws the interval, the start, top and left of a clip, in this order, each uniformly.

        Raises MediaError for a scene that is too short or whose first frame cannot be read.
        """
        extent = self._extent(index)
        intervals = self._fitting_intervals(extent)
        interval = intervals[int(rng.integers(len(intervals)))]
        room = self._room(extent, interval)
        start, top, left = (int(rng.integers(spare + 1)) for spare in room)
        return Cut(interval, start, top, left)

    def cuts(self, index: int, count: int) -> list[Cut]:
        """`count` fixed cuts, spread evenly over the scene; the first is in the middle.

        More of them begin with the same ones. The intervals take turns. Raises what `draw_cut` raises.
        """
        extent = self._extent(index)
        intervals = self._fitting_intervals(extent)
        cuts = []
        for number in range(count):
            interval = intervals[number % len(intervals)]
            shares = [(0.5 + number * step) % 1 for step in SPREAD]
            room = self._room(extent, interval)
            start, top, left = (int(share * (spare + 1)) for share, spare in zip(shares, room, strict=True))
            cuts.append(Cut(interval, start, top, left))
        return cuts

    def item(self, index: int, cut: Cut) -> dict[str, Any]:
        """One clip.

        Returns `frames`, uint8 (F, H, W, 3); `edges`, uint8 (F, H, W), where they are read; `prompt`; `scene`, its id;
        `indices`, int64 (F,), which frames of the scene these are, from 0. Raises MediaError with the path of an
        unreadable image, or one of another size than the first, and ValueError for a cut that is not inside the scene.
        """
        scene, extent = self.scenes[index], self._extent(index)
        indices = cut.start + cut.interval * np.arange(self.num_frames)  # (F,)
        lengths = (len(extent.images), *extent.resized_hw)
        first = (cut.start, cut.top, cut.left)
        last = (indices[-1], cut.top + self._crop_hw[0] - 1, cut.left + self._crop_hw[1] - 1)
        if min(first) < 0 or any(place >= length for place, length in zip(last, lengths, strict=True)):
            raise ValueError(
                f"{scene.folder}: {cut} leads out of its {len(extent.images)} frames, which are "
                f"{extent.resized_hw[1]}x{extent.resized_hw[0]} px after resizing"
            )
        with ThreadPoolExecutor(self.num_threads) as pool:
            frames = list(pool.map(lambda i: self._load(extent, extent.images[i], cut), indices))
            sources = [self._edges_of(index, extent.images[i]) for i in indices] if self.edge_folder else []
            edges = list(pool.map(lambda path: self._load(extent, path, cut)[..., 0], sources))
        found = {"edges": np.stack(edges)} if edges else {}
        return {
            "frames": np.stack(frames),
            **found,
            "prompt": scene.prompt,
            "scene": scene.scene_id,
            "indices": indices,
        }

    def fingerprint(self) -> dict[str, Any]:
        """What decides the clips, but for the files' content; the same after the folder has moved."""
        names = [(scene.name, scene.folder.name, scene.prompt) for scene in self.scenes]
        return {
            "num_items": len(self),
            "scenes_sha256": hashlib.sha256(json.dumps(names).encode()).hexdigest(),
            "num_frames": self.num_frames,
            "frame_intervals": self.frame_intervals,
            "random_start": self.random_start,
            "height_px": self._crop_hw[0],
            "width_px": self._crop_hw[1],
            "edge_folder": self.edge_folder,
        }

    def _extent(self, index: int) -> _Extent:
        images = self.scenes[index].images()
        needed = (self.num_frames - 1) * self.frame_intervals[0] + 1
        if len(images) < needed:
            raise MediaError(
                self.scenes[index].folder,
                f"the scene has {len(images)} frames, but a clip of {self.num_frames} frames at an interval of "
                f"{self.frame_intervals[0]} needs {needed}",
            )
        width, height = image_size(images[0])
        return _Extent(images, (height, width), resized_size((height, width), self._crop_hw))

    def _fitting_intervals(self, extent: _Extent) -> list[int]:
        return [i for i in self.frame_intervals if (self.num_frames - 1) * i < len(extent.images)]

    def _room(self, extent: _Extent, interval: int) -> tuple[int, int, int]:
        """The largest start, top and left."""
        last_start = len(extent.images) - 1 - (self.num_frames - 1) * interval
        return (
            last_start if self.random_start else 0,
            extent.resized_hw[0] - self._crop_hw[0],
            extent.resized_hw[1] - self._crop_hw[1],
        )

    def _load(self, extent: _Extent, path: Path, cut: Cut) -> np.ndarray:
        frame = np.array(load_image(path))  # (h, w, 3)
        if frame.shape[:2] != extent.size_hw:
            raise MediaError(
                path,
                f"is {frame.shape[1]}x{frame.shape[0]} px, but the first frame of its scene is "
                f"{extent.size_hw[1]}x{extent.size_hw[0]} px",
            )
        return crop_clip(resize_frame(frame, self._crop_hw), cut.top, cut.left, self._crop_hw)  # (H, W, 3)
