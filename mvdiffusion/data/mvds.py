"""Rendered objects: where their files are, which are held out, and samples of one condition image and V views.

Files are `<root>/<first letters of the uid>/<uid>/{rgb,normals,mask}_000_{view}.{suffix}`, with `000_{view}_RT.txt` for
poses. Two layouts are common, and both are found by themselves: Wonder3D's training data (3 letters, png, masks) and
what its renderer and ours write (2 letters, webp or png with alpha, no masks).
"""

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from PIL import Image

from common.data import rng_for
from mvdiffusion.data.poses import (
    MIRROR_X,
    class_labels,
    fixed_poses,
    mirror_order,
    read_pose,
    require_label_width,
)
from mvdiffusion.data.preparation import (
    ClipTransform,
    prepare_colour,
    prepare_mask,
    prepare_normals,
    read_image,
    vae_pixels,
)
from mvdiffusion.views import VIEW_LISTS, Colour, choose_views, colours_of, require_condition_view, require_countable

SUBSCENE_TAGS = (3, 2)
SUFFIXES = ("png", "webp", "jpg")
WHITE: Colour = (1.0, 1.0, 1.0)
IO_THREADS = 16
SHOWN_PROBLEMS = 5
DEBUG_SAMPLES = 300


# Objects


@dataclass(frozen=True)
class Layout:
    """How the files are named; None is found out, object by object.

    `subscene_tag`: letters of the uid that name the folder above the object's, 0 for no such folder. `read_mask`: there
    are mask files, which images without an alpha channel need.
    """

    subscene_tag: int | None = None
    suffix: str | None = None
    read_mask: bool | None = None

    @property
    def tags(self) -> tuple[int, ...]:
        return SUBSCENE_TAGS if self.subscene_tag is None else (self.subscene_tag,)

    @property
    def suffixes(self) -> tuple[str, ...]:
        return SUFFIXES if self.suffix is None else (self.suffix.lstrip("."),)


@dataclass(frozen=True)
class RenderedObject:
    """One object and how its files are named."""

    uid: str
    folder: Path
    suffix: str
    has_masks: bool

    def image(self, kind: str, view: str) -> Path:
        """The file of a view; `kind` is "rgb", "normals" or "mask"."""
        return self.folder / f"{kind}_000_{view}.{self.suffix}"

    def pose(self, view: str) -> Path:
        return self.folder / f"000_{view}_RT.txt"

    def files(self, views: Iterable[str], with_poses: bool = False) -> list[Path]:
        """All files that these views are read from."""
        kinds = ("rgb", "normals", "mask") if self.has_masks else ("rgb", "normals")
        images = [self.image(kind, view) for view in views for kind in kinds]
        return images + ([self.pose(view) for view in views] if with_poses else [])


@dataclass(frozen=True)
class Objects:
    """The objects to train on and those held out, which training never sees."""

    train: tuple[RenderedObject, ...]
    validation: tuple[RenderedObject, ...]


def find_objects(
    root: str | Path,
    layout: Layout = Layout(),  # noqa: B008 (frozen)
    *,
    views: Sequence[str] = VIEW_LISTS[6],
    rendered_poses: bool = False,
    object_list: str | Path | None = None,
    invalid_list: str | Path | None = None,
    num_validation_samples: int = 0,
    num_samples: int | None = None,
) -> Objects:
    """The objects of a folder in alphabetic order of their uids: the last ones are held out, the others trained on.

    Args:
        rendered_poses: every object must have the pose files of its views.
        object_list: see `read_uids`; None takes every object of the folder.
        invalid_list: the same, of objects to leave out.
        num_validation_samples: how many are held out.
        num_samples: train on the first so many of the rest.

    Raises:
        FileNotFoundError: the folder or a list is not there.
        ValueError: all problems of the objects together: unusable lists, missing files, too few objects.
    """
    if num_validation_samples < 0:
        raise ValueError(f"data.num_validation_samples is {num_validation_samples}, but must be at least 0")
    if num_samples is not None and num_samples < 1:
        raise ValueError(f"data.max_train_samples is {num_samples}, but must be at least 1, or unset for all objects")
    root = Path(root)
    uids = list_uids(root, layout, object_list, invalid_list)
    problems = []
    if len(uids) <= num_validation_samples:
        problems.append(
            f"there are {len(uids)} objects, but the last {num_validation_samples} are held out for validation "
            "(data.num_validation_samples), which leaves none to train on"
        )
    with ThreadPoolExecutor(IO_THREADS) as pool:  # on network file systems the latency of each look-up adds up
        located = list(pool.map(lambda uid: locate(root, uid, layout, views, rendered_poses), uids))
    problems += _describe_incomplete(located)
    if problems:
        raise ValueError(f"{root.absolute()}:" + "".join(f"\n  - {problem}" for problem in problems))
    objects = tuple(found for found, _ in located)
    num_train = len(objects) - num_validation_samples
    return Objects(objects[:num_train][:num_samples], objects[num_train:])


def list_uids(
    root: Path,
    layout: Layout = Layout(),  # noqa: B008 (frozen)
    object_list: str | Path | None = None,
    invalid_list: str | Path | None = None,
) -> list[str]:
    """uids in alphabetic order, each once. Raises what `find_objects` raises for the folder and the lists."""
    if not root.is_dir():
        raise FileNotFoundError(
            f"{root} (from {Path.cwd()}) is not a folder; set data.train_data_dir to where the renders are"
        )
    uids = _scan_uids(root, layout) if object_list is None else read_uids(object_list, "data.object_list")
    if invalid_list is not None:
        uids -= read_uids(invalid_list, "data.invalid_list")
    if not uids:
        where = "data.object_list" if object_list is not None else root.absolute()
        left = " that data.invalid_list leaves" if invalid_list is not None else ""
        expected = " or ".join(f"<first {tag} letters of uid>/<uid>" if tag else "<uid>" for tag in layout.tags)
        raise ValueError(
            f"{where} holds no rendered objects{left}; their folders must be named {expected}, as "
            "scripts/render_multiview.py writes them"
        )
    return sorted(uids)


def read_uids(path: str | Path, setting: str) -> set[str]:
    """uids of a list: a JSON array, or a text file with one per line, as scripts/doctor.py writes.

    An entry may be a path: its last part counts, without ".glb". Raises FileNotFoundError, or ValueError for a file
    that is no list of names; both name the `setting`.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{setting} is {path} (from {Path.cwd()}), which is not a file")
    try:
        text = path.read_text(encoding="utf-8")
        entries = json.loads(text) if path.suffix.lower() == ".json" else text.splitlines()
    except ValueError as error:
        raise ValueError(f"{setting} is {path}, which cannot be read ({error})") from error
    if not isinstance(entries, list):
        raise ValueError(f"{setting} is {path}, which holds a {type(entries).__name__}, expected an array of uids")
    names = [PurePosixPath(entry).name.removesuffix(".glb") if isinstance(entry, str) else "" for entry in entries]
    wrong = [entry for entry, name in zip(entries, names, strict=True) if name in ("", "..")]
    if wrong:
        raise ValueError(
            f"{setting} is {path}, in which {len(wrong)} of {len(entries)} entries are no uid and no path, "
            f"the first: {', '.join(map(repr, wrong[:SHOWN_PROBLEMS]))}"
        )
    return set(names)


def _scan_uids(root: Path, layout: Layout) -> set[str]:
    if layout.tags == (0,):
        return set(_subfolders(root))
    prefixes = _subfolders(root)
    with ThreadPoolExecutor(IO_THREADS) as pool:
        uids_of = pool.map(lambda prefix: _subfolders(root / prefix), prefixes)
        return {
            uid
            for prefix, uids in zip(prefixes, uids_of, strict=True)
            for uid in uids
            if any(uid[:tag] == prefix for tag in layout.tags)
        }


def _subfolders(folder: Path) -> list[str]:
    with os.scandir(folder) as entries:
        return [entry.name for entry in entries if entry.name[0] != "." and entry.is_dir()]


def locate(
    root: Path, uid: str, layout: Layout, views: Sequence[str], with_poses: bool = False
) -> tuple[RenderedObject, list[Path]]:
    """An object under the names for which fewest of its files are missing, and those files."""
    best: tuple[RenderedObject, list[Path]] | None = None
    for folder in dict.fromkeys(root / uid[:tag] / uid for tag in layout.tags):
        present = _file_names(folder)
        for suffix in layout.suffixes:
            masks = any(f"mask_000_{view}.{suffix}" in present for view in views)
            found = RenderedObject(uid, folder, suffix, masks if layout.read_mask is None else layout.read_mask)
            missing = [path for path in found.files(views, with_poses) if path.name not in present]
            if best is None or len(missing) < len(best[1]):
                best = found, missing
    assert best is not None, "a layout has at least one tag and one suffix"
    return best


def _file_names(folder: Path) -> set[str]:
    try:
        return set(os.listdir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return set()


def _describe_incomplete(located: Sequence[tuple[RenderedObject, list[Path]]]) -> list[str]:
    incomplete = [(found, missing) for found, missing in located if missing]
    if not incomplete:
        return []
    lines = [
        f"\n      {found.uid}: {len(missing)} missing, the first is {missing[0]}"
        for found, missing in incomplete[:SHOWN_PROBLEMS]
    ]
    more = len(incomplete) - SHOWN_PROBLEMS
    remedy = "name them in data.invalid_list, or take as data.object_list the allow-list of scripts/doctor.py"
    if len(incomplete) == len(located):
        remedy = "set data.num_views and data.views to what is rendered, or render these views"
    return [
        f"{len(incomplete)} of {len(located)} objects lack files ({remedy}):" + "".join(lines)
        + (f"\n      ... and {more} more like these" if more > 0 else "")
    ]  # fmt: skip


# Samples


@dataclass(frozen=True)
class Variant:
    """What is drawn for a sample: the background behind all its images, and how the object is looked at.

    `condition_view` is a position in the list of views; `flipped` mirrors the object as that view sees it.
    """

    background: Colour = WHITE
    condition_view: int = 0
    flipped: bool = False


class MultiViewDataset:
    """Condition image, V views in colour and normals, and class labels of rendered objects.

    Args:
        views: names in the order of the rows.
        resolution_px: height and width R of all images but CLIP's.
        poses: "tilted" or "upright" (see `fixed_poses`), or "rendered": the pose files beside each object's images.
        background: "white", "black", "gray", "three_choices" of them, "random", or a grey level in [0, 1].
        condition_view: the name of the view that is the condition.
        augment_data: draw the condition view from all views instead.
        random_flip: mirror half of the objects left-right, as the condition view sees them: images, normals, and which
            view is which. Condition views without mirror views among `views` are not flipped.
        label_width: of the class labels, see `label_rows`.
    """

    def __init__(
        self,
        objects: Sequence[RenderedObject],
        *,
        views: Sequence[str] = VIEW_LISTS[6],
        resolution_px: int = 256,
        poses: str = "tilted",
        background: str | float = "white",
        condition_view: str = "front",
        augment_data: bool = False,
        random_flip: bool = False,
        label_width: int = 10,
        clip: ClipTransform = ClipTransform(),  # noqa: B008 (frozen)
    ) -> None:
        if not objects:
            raise ValueError("a data set needs at least one object")
        require_condition_view(condition_view, views)
        if resolution_px < 1:
            raise ValueError(f"data.resolution is {resolution_px}, but must be at least 1")
        require_label_width(label_width)
        self.objects, self.resolution_px = tuple(objects), resolution_px
        self.views, self.condition_view = choose_views(len(views), views, poses), condition_view
        self.poses, self.label_width, self.clip = poses, label_width, clip
        self.backgrounds = colours_of(background)
        self.condition_views = list(range(len(views))) if augment_data else [self.views.index(condition_view)]
        self._fixed_poses = None if poses == "rendered" else fixed_poses(self.views, poses)
        self.flippable = self._find_flippable() if random_flip else set()

    def __len__(self) -> int:
        return len(self.objects)

    def files_of(self, index: int) -> list[Path]:
        """The files that sample `index` reads."""
        return self.objects[index].files(self.views, with_poses=self.poses == "rendered")

    def variants(self) -> list[Variant]:
        """All that `variant` can draw. Raises ValueError where they cannot be counted."""
        require_countable(self.backgrounds)
        return [
            Variant(background, view, flipped)
            for view in self.condition_views
            for flipped in ([False, True] if view in self.flippable else [False])
            for background in self.backgrounds
        ]

    def variant(self, rng: np.random.Generator) -> Variant:
        """Draws the background, the condition view and the flip, in this order, where there is a choice."""
        if self.backgrounds is None:
            red, green, blue = rng.random(3).tolist()
            background = (red, green, blue)
        else:
            background = _choice(rng, self.backgrounds)
        view = _choice(rng, self.condition_views)
        return Variant(background, view, view in self.flippable and bool(rng.random() < 0.5))

    def sample(self, index: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """`item` in a variant drawn with `rng`."""
        return self.item(index, self.variant(rng))

    def item(self, index: int, variant: Variant) -> dict[str, np.ndarray]:
        """One object's arrays; a batch has one axis more in front.

        Returns uint8 `image_cond` (3, R, R), `image_target` and `normal_target` (V, 3, R, R); float32 in [-1, 1]
        `image_cond_vae` (3, R, R), `image_target_vae` and `normal_target_vae` (V, 3, R, R), of which normals may pass
        the limits by a rounding error; float32 `image_cond_CLIP` (3, 224, 224), normalised; and what `camera` returns.
        Normals are in the camera frame of the condition view.

        Raises MediaError with the path of an unreadable file, and ValueError for an object whose own poses cannot be
        flipped.
        """
        poses = self.poses_of(index)
        rotations, condition = poses[:, :, :3], variant.condition_view
        sources = mirror_order(poses, condition, self.views) if variant.flipped else range(len(self.views))
        colours, normals = [], []
        for source in sources:
            rotation = rotations[condition] @ np.linalg.inv(rotations[source])  # (3, 3)
            rotation = MIRROR_X @ rotation if variant.flipped else rotation
            images = self._load_view(self.objects[index], self.views[source], variant.background, rotation)
            colour, normal = (image[:, ::-1] if variant.flipped else image for image in images)
            colours.append(colour.transpose(2, 0, 1))  # (3, R, R)
            normals.append(normal.transpose(2, 0, 1))  # (3, R, R)
        colour, normal = np.stack(colours), np.stack(normals).astype(np.float32)  # (V, 3, R, R)
        colour_u8, colour_vae = _to_uint8(colour), 2 * colour - 1
        return {
            "image_cond": colour_u8[condition],
            "image_target": colour_u8,
            "normal_target": _to_uint8(normal),
            "image_cond_vae": colour_vae[condition],
            "image_cond_CLIP": self.clip.of_pixels(colour[condition]),
            "image_target_vae": colour_vae,
            "normal_target_vae": 2 * normal - 1,
            **self._labels(poses, condition),
        }

    def camera(self, index: int, variant: Variant) -> dict[str, np.ndarray]:
        """The class labels alone, `camera_embed_image` and `camera_embed_normal`: float32 (V, label_width)."""
        return self._labels(self.poses_of(index), variant.condition_view)

    def held_out(self, objects: Sequence[RenderedObject], background: str | float = "white") -> "MultiViewDataset":
        """Other objects in the same form, with the fixed condition view, no flips, and CLIP's input as in inference."""
        return MultiViewDataset(
            objects,
            views=self.views,
            resolution_px=self.resolution_px,
            poses=self.poses,
            background=background,
            condition_view=self.condition_view,
            label_width=self.label_width,
            clip=replace(self.clip, resize="pil"),
        )

    def fingerprint(self) -> dict[str, Any]:
        """What decides the items of given variants, but for the files' content; the same after the folder has moved."""
        names = [(found.uid, found.suffix, found.has_masks) for found in self.objects]
        clip = json.loads(json.dumps(asdict(self.clip)))
        resize = clip.pop("resize")
        return {
            "num_items": len(self),
            "objects_sha256": hashlib.sha256(json.dumps(names).encode()).hexdigest(),
            "views": list(self.views),
            "resolution_px": self.resolution_px,
            "poses": self.poses,
            "label_width": self.label_width,
            "clip": clip,
            **({} if resize == "pil" else {"clip_resize": resize}),  # "pil" was once the only one
        }

    def poses_of(self, index: int) -> np.ndarray:
        if self._fixed_poses is not None:
            return self._fixed_poses
        return np.stack([read_pose(self.objects[index].pose(view)) for view in self.views])  # (V, 3, 4)

    def _find_flippable(self) -> set[int]:
        """Condition views that have all mirror views, by the first object: one rig renders them all."""
        poses, flippable, reason = self.poses_of(0), set(), None
        for view in self.condition_views:
            try:
                mirror_order(poses, view, self.views)
                flippable.add(view)
            except ValueError as error:
                reason = error
        if reason is not None and not flippable:
            raise reason
        return flippable

    def _load_view(
        self, found: RenderedObject, view: str, background: Colour, rotation: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Colour float32 and normals float64 (R, R, 3)."""
        size_wh = (self.resolution_px, self.resolution_px)
        mask = prepare_mask(read_image(found.image("mask", view)), size_wh) if found.has_masks else None
        colour = read_image(found.image("rgb", view), needs_alpha=mask is None)
        normals = read_image(found.image("normals", view), needs_alpha=mask is None)
        return (
            prepare_colour(colour, size_wh, background, mask),
            prepare_normals(normals, size_wh, background, rotation, mask),
        )

    def _labels(self, poses: np.ndarray, condition: int) -> dict[str, np.ndarray]:
        labels = class_labels(poses, condition, self.label_width)
        return {"camera_embed_image": labels["colour"], "camera_embed_normal": labels["normal"]}


class RandomViews:
    """Noise in the form of `MultiViewDataset`'s samples, for smoke tests: pixels uniform in 0..254, labels Gaussian.

    An item is a function of its index, the same in all variants.
    """

    def __init__(
        self,
        num_views: int = 6,
        resolution_px: int = 256,
        label_width: int = 10,
        clip: ClipTransform = ClipTransform(),  # noqa: B008 (frozen)
        num_items: int = DEBUG_SAMPLES,
    ) -> None:
        self.num_views, self.resolution_px, self.label_width = num_views, resolution_px, label_width
        self.clip, self.num_items = clip, num_items

    def __len__(self) -> int:
        return self.num_items

    def files_of(self, index: int) -> list[Path]:
        return []

    def variants(self) -> list[Variant]:
        return [Variant()]

    def variant(self, rng: np.random.Generator) -> Variant:
        return Variant()

    def sample(self, index: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """See `item`."""
        return self.item(index, Variant())

    def item(self, index: int, variant: Variant) -> dict[str, np.ndarray]:
        """Keys, shapes and types as of `MultiViewDataset.item`; the condition image is noise of its own."""
        shape = (1 + 2 * self.num_views, 3, self.resolution_px, self.resolution_px)
        images = rng_for(0, "debug images", index).integers(0, 255, shape, dtype=np.uint8)  # (1 + 2 V, 3, R, R)
        pixels = np.stack(
            [vae_pixels(_to_picture(image), self.resolution_px) for image in images]
        )  # (1 + 2 V, 3, R, R)
        colours, normals = slice(1, 1 + self.num_views), slice(1 + self.num_views, None)
        return {
            "image_cond": images[0],
            "image_target": images[colours],
            "normal_target": images[normals],
            "image_cond_vae": pixels[0],
            "image_cond_CLIP": self.clip.of_pixels(images[0].astype(np.float32) / 255),
            "image_target_vae": pixels[colours],
            "normal_target_vae": pixels[normals],
            **self.camera(index, variant),
        }

    def camera(self, index: int, variant: Variant) -> dict[str, np.ndarray]:
        """The class labels alone, as of `MultiViewDataset.camera`."""
        shape = (2, self.num_views, self.label_width)
        colour, normal = rng_for(0, "debug labels", index).standard_normal(shape, dtype=np.float32)  # (V, label_width)
        return {"camera_embed_image": colour, "camera_embed_normal": normal}

    def fingerprint(self) -> dict[str, Any]:
        return {
            "num_items": len(self),
            "num_views": self.num_views,
            "resolution_px": self.resolution_px,
            "label_width": self.label_width,
        }


class WithoutRawImages:
    """A data set as training steps read it: the raw images would be a fifth of what goes to the device, for nothing."""

    def __init__(self, dataset: MultiViewDataset | RandomViews) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def files_of(self, index: int) -> list[Path]:
        return self.dataset.files_of(index)

    def sample(self, index: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """`dataset.sample` without its uint8 arrays."""
        return {name: array for name, array in self.dataset.sample(index, rng).items() if array.dtype != np.uint8}


def _choice(rng: np.random.Generator, options: Sequence[Any]) -> Any:
    return options[0] if len(options) == 1 else options[int(rng.integers(len(options)))]


def _to_uint8(images: np.ndarray) -> np.ndarray:
    return np.rint(images.clip(0, 1) * 255).astype(np.uint8)


def _to_picture(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)))  # (H, W, 3)
