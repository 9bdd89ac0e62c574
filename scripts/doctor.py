"""Tries every item of a data set before it is trained on, and lists the usable ones and what is wrong with the others.

    python scripts/doctor.py pairs data/example_kitti.json --data_root data
    python scripts/doctor.py videos clips --processes 8 --timeout_s 20 --min_frames 34 --min_side_px 256
    python scripts/doctor.py views renders --num_views 6
    python scripts/doctor.py scenes datasets --output datasets/checked

The last one writes a list for `data.dataset_file` of training_ggi.

Items are read in processes of their own, so one that crashes or hangs its decoder is found and named like any other.
Writes to the output folder: results.jsonl (one line per item; a second run only looks at files that are new or have
changed), allow-list.txt (names of the usable items) and report.json. Exit status: 0 if all items are usable, 1 if some
are not, 2 for wrong usage, 130 after Ctrl-C.
"""

import argparse
import functools
import json
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm.auto import tqdm

from common.doctor import Check, Item, Result, scan
from common.video import (
    IMAGE_SUFFIXES,
    VIDEO_SUFFIXES,
    MediaError,
    find_files,
    image_size,
    load_image,
    probe_video,
    read_frames,
)
from gaussian_refiner.data import BUCKETS, IMAGE_KEYS, Pair, choose_bucket, load_crops, read_pairs, window_places
from mvdiffusion.data.mvds import Layout, RenderedObject, list_uids, locate
from mvdiffusion.data.poses import read_pose
from mvdiffusion.data.preparation import decode_normals, prepare_mask, read_image
from mvdiffusion.views import choose_views
from training_ggi.data import NUM_FRAMES, Scene, find_image_folder, list_scene_names, read_captions

SMALLEST_SIDE_PX = 64
LARGEST_ASPECT_DIFFERENCE = 0.05
NORMAL_LENGTHS = (0.8, 1.2)  # of the median normal
SMALLEST_FACING_SHARE = 0.75  # of the normals; half of them in a world frame, nearly all in the camera's
DEFAULT_NUM_VIEWS = 6
DEFAULT_MIN_FRAMES = {"videos": 1, "scenes": NUM_FRAMES}
CAPTIONS = "captions.json"
SHOWN_REASONS = 10

# ----------------------------------------------------------------------------------------------------------------------
# pairs: the list of gaussian_refiner


def list_pairs(path: Path, data_root: Path | None) -> list[Item]:
    """Every item of both splits; a name that both use gets its split in front. Raises what `read_pairs` raises."""
    pairs = read_pairs(path, data_root, holdout=0)
    splits = {"train": pairs.train, "test": pairs.validation}
    in_both = {pair.name for pair in pairs.train} & {pair.name for pair in pairs.validation}
    return [
        Item(f"{split}/{pair.name}" if pair.name in in_both else pair.name, tuple(pair.files), pair)
        for split, members in splits.items()
        for pair in members
    ]


def check_pair(pair: Pair) -> None:
    """Raises ValueError for small or unreadable images, and for a render and a gt that cannot show the same."""
    paths = {key: getattr(pair, key) for key in IMAGE_KEYS if getattr(pair, key) is not None}
    sizes_px = {key: image_size(path) for key, path in paths.items()}
    for key, (width, height) in sizes_px.items():
        if min(width, height) < SMALLEST_SIDE_PX:
            raise ValueError(
                f"{paths[key]}: {key} is {width}x{height} px, but its sides must be at least {SMALLEST_SIDE_PX} px"
            )
    render_wh, gt_wh = sizes_px["render"], sizes_px["gt"]
    render_aspect, gt_aspect = render_wh[0] / render_wh[1], gt_wh[0] / gt_wh[1]
    difference = max(render_aspect, gt_aspect) / min(render_aspect, gt_aspect) - 1
    if difference > LARGEST_ASPECT_DIFFERENCE:
        raise ValueError(
            f"{paths['gt']}: the aspects of render ({render_wh[0]}x{render_wh[1]} px) and gt ({gt_wh[0]}x{gt_wh[1]} px)"
            f" differ by {difference:.1%}, but may differ by {LARGEST_ASPECT_DIFFERENCE:.0%} at most"
        )
    bucket_wh = BUCKETS[choose_bucket(*render_wh)]
    load_crops(pair, bucket_wh, window_places(*bucket_wh, 1)[0])


# ----------------------------------------------------------------------------------------------------------------------
# videos: a folder of clips


def list_videos(path: Path, data_root: Path | None) -> list[Item]:
    """Every clip and image in a folder and the folders in it, also linked ones, by its path from there.

    Hidden files and folders do not count. Raises ValueError or FileNotFoundError if there is none, and for a
    `data_root`, which would mean nothing.
    """
    if data_root is not None:
        raise ValueError("--data_root is for pairs, views and scenes; the clips of videos are searched in PATH itself")
    if not path.is_dir():
        raise FileNotFoundError(f"{path} is not a folder; videos needs the folder that the clips are in")
    suffixes = VIDEO_SUFFIXES + IMAGE_SUFFIXES
    found = find_files(path, suffixes)
    if not found:
        raise ValueError(f"{path} holds no clip; looked for *{', *'.join(suffixes)} in it and the folders in it")
    return [Item(clip.relative_to(path).as_posix(), (clip,), clip) for clip in found]


def check_video(path: Path, min_frames: int = 1, min_side_px: int = 1) -> None:
    """Raises ValueError for a clip that is too short or too small, that cannot be probed, or whose first, middle or
    last frame cannot be read. An image is a clip of one frame."""
    if "\n" in path.as_posix():
        raise ValueError(f"{path}: the name holds a line break, which a list of names cannot hold; rename it")
    if path.name.lower().endswith(IMAGE_SUFFIXES):
        num_frames, (width, height) = 1, load_image(path).size
    else:
        info = probe_video(path)
        num_frames, width, height = info.num_frames, info.width_px, info.height_px
        read_frames(path, sorted({0, (num_frames - 1) // 2, num_frames - 1}), backend="pyav")  # decord conceals damage
    if num_frames < min_frames:
        raise ValueError(f"{path}: the number of its frames is {num_frames}, but --min_frames is {min_frames}")
    if min(width, height) < min_side_px:
        raise ValueError(f"{path}: is {width}x{height} px, but --min_side_px is {min_side_px}")


# ----------------------------------------------------------------------------------------------------------------------
# views: rendered objects of mvdiffusion

Views = tuple[RenderedObject, tuple[str, ...]]


def list_views(path: Path, data_root: Path | None, num_views: int = DEFAULT_NUM_VIEWS) -> list[Item]:
    """Every object in a folder of renders, or, with `data_root` being that folder, in a list (see `read_uids`).

    An item is the object's usual `num_views` views, complete or not. Raises what `list_uids` and `choose_views` raise.
    """
    views, layout = choose_views(num_views), Layout()
    root, object_list = (path, None) if data_root is None else (data_root, path)
    items = []
    for uid in list_uids(root, layout, object_list):
        found, _ = locate(root, uid, layout, views)
        files = found.files(views, with_poses=any(found.pose(view).is_file() for view in views))
        items.append(Item(uid, tuple(files), (found, views)))
    return items


def check_views(content: Views) -> None:
    """Raises ValueError for a missing, unreadable or damaged file, for images of one view that differ in size, for a
    view without object or without background, and for normals that are none or not in the view's own camera frame."""
    found, views = content
    has_poses = any(found.pose(view).is_file() for view in views)
    for view in views:
        colour_path, normal_path = found.image("rgb", view), found.image("normals", view)
        mask = read_image(found.image("mask", view)) if found.has_masks else None
        colour = read_image(colour_path, needs_alpha=mask is None)
        normals = read_image(normal_path, needs_alpha=mask is None)
        mask = colour.getchannel("A") if mask is None else mask
        if not colour.size == normals.size == mask.size:
            sides = ", ".join(f"{name} {image.width}" for name, image in (("normals", normals), ("mask", mask)))
            raise ValueError(f"{colour_path}: is {colour.width} px wide, but of the same view are: {sides} px")
        opaque = prepare_mask(mask, mask.size)[..., 0] > 0  # (H, W)
        if opaque.all() or not opaque.any():
            share = "all" if opaque.all() else "none"
            raise ValueError(f"{colour_path}: {share} of the image is the object, as its mask or alpha says")
        _check_normals(normal_path, decode_normals(np.asarray(normals)[opaque][:, :3]))
        if has_poses:
            read_pose(found.pose(view))


def _check_normals(path: Path, normals: np.ndarray) -> None:
    """normals: (N, 3), of the object's pixels."""
    length = float(np.median(np.linalg.norm(normals, axis=1)))
    if not NORMAL_LENGTHS[0] <= length <= NORMAL_LENGTHS[1]:
        raise ValueError(f"{path}: the median length of the normals is {length:.2f}, but normals have length 1")
    facing = float((normals[:, 2] > 0).mean())
    if facing < SMALLEST_FACING_SHARE:
        raise ValueError(
            f"{path}: {facing:.0%} of the visible normals face the camera (blue above 127), but nearly all do in the "
            "view's own camera frame"
        )


# ----------------------------------------------------------------------------------------------------------------------
# scenes: DL3DV-10K of training_ggi


def list_scenes(path: Path, data_root: Path | None) -> list[Item]:
    """Every scene folder of a data root, or, with `data_root` being that, every scene of a list like seeds.txt.

    Names are those of the list. A scene has hundreds of files, so changes are noticed by its folder of images, in which
    files appear, vanish or are replaced. Raises what `list_scene_names` raises.
    """
    root, dataset_file = (path, None) if data_root is None else (data_root, path)
    names = list_scene_names(root, dataset_file, image_folder=None)
    folders = [find_image_folder(root / name) for name in names]
    return [
        Item(name, (folder if isinstance(folder, Path) else root / name,), root / name)
        for name, folder in zip(names, folders, strict=True)
    ]


def check_scene(folder: Path, min_frames: int = NUM_FRAMES) -> None:
    """Raises ValueError for a scene without images or with too few, and for images that are damaged or differ in size.

    Three frames are decoded; of the others a PNG file is read and its checksums are compared, which takes a tenth of
    the time.
    """
    images_folder = find_image_folder(folder)
    if isinstance(images_folder, str):
        raise ValueError(f"{folder}: {images_folder}")
    images = Scene(folder.name, images_folder).images()
    if len(images) < min_frames:
        raise ValueError(
            f"{images_folder}: the number of its frames is {len(images)}, but --min_frames is {min_frames}"
        )
    width, height = image_size(images[0])
    for number, image in enumerate(images):
        size_px = image_size(image)
        if size_px != (width, height):
            raise MediaError(image, f"is {size_px[0]}x{size_px[1]} px, but {images[0].name} is {width}x{height} px")
        if number in (0, len(images) // 2, len(images) - 1):
            load_image(image)
        else:
            _check_whole(image)


def _check_whole(path: Path) -> None:
    try:
        with Image.open(path) as image:
            if image.format == "PNG":
                image.verify()
            else:
                image.load()
    except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, struct.error, zlib.error, ...
        raise MediaError(path, f"cannot be read as an image ({type(error).__name__}: {error})") from error


def caption_note(path: Path, data_root: Path | None, results: Sequence[Result]) -> str:
    """How many of the usable scenes have no caption in captions.json; "" if all have one, or there is no such file."""
    root = path if data_root is None else data_root
    if not (root / CAPTIONS).is_file():
        return ""
    try:
        captions = read_captions(root, root / CAPTIONS)
    except ValueError as error:
        return str(error)
    lacking = [result.name for result in results if result.ok and not captions.get(result.name.rpartition("/")[2])]
    if not lacking:
        return ""
    return (
        f"{len(lacking)} of the usable scenes have no caption in {root / CAPTIONS}, the first is {lacking[0]}: "
        "scripts/caption_dl3dv.py adds them"
    )


# ----------------------------------------------------------------------------------------------------------------------

# One row per kind of data set: what lists its items, (path, data_root) -> items, and what tries one.
KINDS: dict[str, tuple[Callable[[Path, Path | None], list[Item]], Check]] = {
    "pairs": (list_pairs, check_pair),
    "videos": (list_videos, check_video),
    "views": (list_views, check_views),
    "scenes": (list_scenes, check_scene),
}

Stamp = list[list[Any]]


def stamp_of(files: Iterable[Path]) -> Stamp:
    """[path, size in bytes, time of change in ns] of each file, or [path] for one that is not there."""
    stamp: Stamp = []
    for path in files:
        try:
            stat = path.stat()
            stamp.append([str(path.absolute()), stat.st_size, stat.st_mtime_ns])
        except OSError:
            stamp.append([str(path.absolute())])
    return stamp


def read_records(path: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """The last record of each (kind, name) in results.jsonl. A line that a crash has torn is passed over."""
    records = {}
    for line in path.read_bytes().splitlines() if path.exists() else []:
        try:
            record = json.loads(line)
            records[record["kind"], record["name"]] = record
        except (ValueError, KeyError, TypeError):
            continue
    return records


def append_record(path: Path, record: dict[str, Any]) -> None:
    with open(path, "ab+") as file:
        is_torn = file.tell() > 0 and (file.seek(-1, os.SEEK_END), file.read(1))[1] != b"\n"
        file.write((b"\n" if is_torn else b"") + json.dumps(record).encode() + b"\n")


def examine(kind: str, items: Sequence[Item], check: Check, arguments: argparse.Namespace) -> list[Result]:
    """Results in the order of the items: those that an earlier run has left, and new ones, which are written at once.

    A failed item is tried again where it may now take longer than before, and all are where other limits hold.
    """
    path, timeout_s = arguments.output / "results.jsonl", arguments.timeout_s
    limits = [arguments.min_frames, arguments.min_side_px]
    stamps = [stamp_of(item.files) for item in items]
    records = {} if arguments.again else read_records(path)
    results: dict[int, Result] = {}
    for index, item in enumerate(items):
        record = records.get((kind, item.name))
        if record is None or record["files"] != stamps[index] or record.get("limits") != limits:
            continue
        if record["ok"] or record["timeout_s"] >= timeout_s:
            results[index] = Result(item.name, record["ok"], record["reason"], record["seconds"])
    todo = [index for index in range(len(items)) if index not in results]
    tqdm.monitor_interval = 0  # no thread beside those that fork
    with tqdm(total=len(items), initial=len(results), unit="item", desc=kind) as bar:

        def note(position: int, result: Result) -> None:
            index = todo[position]
            results[index] = result
            record = {"kind": kind, **vars(result), "timeout_s": timeout_s, "limits": limits, "files": stamps[index]}
            append_record(path, record)
            bar.update()
            bar.set_postfix(unusable=sum(not r.ok for r in results.values()), refresh=False)

        scan([items[index] for index in todo], check, arguments.processes, timeout_s, note)
    return [results[index] for index in range(len(items))]


def grouped_reasons(items: Sequence[Item], results: Sequence[Result]) -> list[tuple[str, int]]:
    """[(reason, how many items)], the commonest first, FILE for an item's own files, N for numbers and sizes."""
    counts: Counter[str] = Counter()
    for item, result in zip(items, results, strict=True):
        if not result.ok:
            reason = result.reason
            for path in sorted(map(str, item.files), key=len, reverse=True):
                reason = re.sub(rf"{re.escape(path)}(/[^/:]+)?", "FILE", reason)  # or one in a folder
            counts[re.sub(r"\b\d+(\.\d+)?(x\d+)?", "N", reason)] += 1
    return counts.most_common()


def write_report(kind: str, items: Sequence[Item], results: Sequence[Result], output: Path) -> dict[str, Any]:
    """Writes allow-list.txt and report.json into `output`; returns what the latter holds."""
    usable = [result.name for result in results if result.ok]
    bad = [result for result in results if not result.ok]
    report = {
        "kind": kind,
        "items": len(results),
        "usable": len(usable),
        "unusable": len(bad),
        "reasons": [{"reason": reason, "items": count} for reason, count in grouped_reasons(items, results)],
        "unusable_items": [{"name": result.name, "reason": result.reason} for result in bad],
    }
    # File names need not be UTF-8: their bytes are kept.
    _write_whole(output / "allow-list.txt", "".join(f"{name}\n" for name in usable))
    _write_whole(output / "report.json", json.dumps(report, indent=2) + "\n")
    return report


def _write_whole(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8", errors="surrogateescape")
    os.replace(temporary, path)


def table(report: dict[str, Any], output: Path) -> str:
    """What the terminal shows at the end."""
    lines = [f"{report['usable']} of {report['items']} items are usable: {output / 'allow-list.txt'}"]
    if report["unusable"]:
        lines.append(f"{report['unusable']} are not: {output / 'report.json'}")
        lines += [f"{group['items']:>8}  {group['reason']}" for group in report["reasons"][:SHOWN_REASONS]]
        more = len(report["reasons"]) - SHOWN_REASONS
        lines += [f"{'':>8}  and {more} more reasons"] if more > 0 else []
    return "\n".join(lines).encode(errors="backslashreplace").decode()


def check_arguments(arguments: argparse.Namespace) -> None:
    if arguments.min_frames is None:
        arguments.min_frames = DEFAULT_MIN_FRAMES.get(arguments.kind, 1)
    for name in ("processes", "min_frames", "min_side_px"):
        value = getattr(arguments, name)
        if value < 1:
            raise ValueError(f"--{name} is {value}, but must be at least 1")
        kinds = {"min_frames": tuple(DEFAULT_MIN_FRAMES), "min_side_px": ("videos",)}.get(name)
        if value > 1 and kinds and arguments.kind not in kinds:
            raise ValueError(f"--{name} is for {' and '.join(kinds)}")
    if arguments.num_views != DEFAULT_NUM_VIEWS and arguments.kind != "views":
        raise ValueError("--num_views is for views")
    if not 0 < arguments.timeout_s < float("inf"):
        raise ValueError(f"--timeout_s is {arguments.timeout_s:g}, but must be above 0 and finite")
    if arguments.output.exists() and not arguments.output.is_dir():
        raise ValueError(f"--output is {arguments.output}, which is a file; name a folder")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=KINDS, metavar="KIND", help=", ".join(KINDS))
    parser.add_argument(
        "path",
        type=Path,
        metavar="PATH",
        help="pairs: the json list; videos: a folder of clips; views: a folder of renders, or a list of objects; "
        "scenes: the folder that DL3DV-10K is in, or a list of scenes",
    )
    parser.add_argument("--output", type=Path, default=Path("runs/doctor"), help="folder of the results")
    parser.add_argument("--processes", type=int, default=2, help="items read at a time")
    parser.add_argument("--timeout_s", type=float, default=60.0, help="how long reading one item may take")
    parser.add_argument(
        "--data_root",
        type=Path,
        help="pairs, scenes: where the relative paths of the list start; views: the renders",
    )
    parser.add_argument(
        "--min_frames", type=int, help=f"the least that a clip (1 unless given) or a scene ({NUM_FRAMES}) must have"
    )
    parser.add_argument("--min_side_px", type=int, default=1, help="videos: the least width and height")
    parser.add_argument("--num_views", type=int, default=DEFAULT_NUM_VIEWS, help="views: how many of each object")
    parser.add_argument("--again", action="store_true", help="look also at files that have not changed")
    arguments = parser.parse_args(argv)
    list_items, check = KINDS[arguments.kind]
    try:
        check_arguments(arguments)
        if arguments.kind == "videos":
            limits = {"min_frames": arguments.min_frames, "min_side_px": arguments.min_side_px}
            check = functools.partial(check, **limits)
        if arguments.kind == "scenes":
            check = functools.partial(check, min_frames=arguments.min_frames)
        if arguments.kind == "views":
            list_items = functools.partial(list_items, num_views=arguments.num_views)
        items = list_items(arguments.path, arguments.data_root)
        arguments.output.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as error:
        print(f"doctor: {error}", file=sys.stderr)
        return 2
    try:
        results = examine(arguments.kind, items, check, arguments)
    except KeyboardInterrupt:
        print(f"stopped; what is done is kept in {arguments.output}: run it again to go on", file=sys.stderr)
        return 130
    report = write_report(arguments.kind, items, results, arguments.output)
    print(table(report, arguments.output))
    if arguments.kind == "scenes" and (note := caption_note(arguments.path, arguments.data_root, results)):
        print(note)
    return 1 if report["unusable"] else 0


if __name__ == "__main__":
    sys.exit(main())
