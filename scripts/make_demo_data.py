"""Makes small data sets out of real photographs, for the demo: no download is needed.

The photographs come with scikit-image (`pip install -e '.[demo]'`); mvdiffusion's views are rendered with pyvista
(`pip install -e '.[render]'`).

    python scripts/make_demo_data.py
    python scripts/make_demo_data.py --output runs/demo/data --only gaussian_refiner --items 48
    python scripts/make_demo_data.py --output runs/demo/data --only vae
"""

import argparse
import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from common.video import write_video

# Files in the data folder of scikit-image.
STEREO_PAIR = ("motorcycle_left.png", "motorcycle_right.png")
STEREO_DISPARITY = "motorcycle_disp.npz"
PHOTOGRAPHS = ("astronaut.png", "chelsea.png", "hubble_deep_field.jpg", "rocket.jpg", "coffee.png")

# Left, top, right, bottom in pixels; may lie between pixels.
Box = tuple[float, float, float, float]


def read_photograph(name: str) -> Image.Image:
    """The RGB photograph `name` of the scikit-image package."""
    return Image.open(_data_file(name)).convert("RGB")


def _data_file(name: str) -> Path:
    try:
        import skimage
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "the demo's photographs come with scikit-image: pip install -e '.[demo]'", name="skimage"
        ) from None
    path = Path(skimage.__file__).parent / "data" / name
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist: scikit-image {skimage.__version__} comes without this photograph; "
            "install the version named in pyproject.toml"
        )
    return path


# ----------------------------------------------------------------------------------------------------------------------
# gaussian_refiner: triples of a flawed render, the photograph of that view and a photograph of a view nearby

HELD_OUT_ITEMS = 10  # the trainer holds out the last ten entries of the lists
# Columns of the stereo pair. A point lies up to 60 px further left in the right view than in the left one, so with a
# gap of 60 px nothing that a held-out gt shows occurs in a training item.
TRAINING_COLUMNS_PX = (0, 440)
HELD_OUT_COLUMNS_PX = (500, 741)
TRAINING_PHOTOGRAPHS = PHOTOGRAPHS[:-1]
HELD_OUT_PHOTOGRAPH = PHOTOGRAPHS[-1]
SIZE_PX = (320, 240)
WIDE_SIZE_PX = (704, 188)  # half of KITTI-360's 1408x376
LARGEST_ZOOM = 1.15


def make_refiner_data(directory: Path, items: int = 48, seed: int = 0, wide: bool = False) -> Path:
    """Writes `items` triples of 320x240 PNG files and example_kitti.json; returns the path of the latter.

    `gt` is a window of a photograph. `cond` is the same window of the other view of a stereo pair (two items of three)
    or a slightly shifted and scaled window of the same photograph. `render` is `gt` with the flaws of a 3D-Gaussian
    scene. The last min(10, items - 1) items, which the trainer holds out, show other things than the rest. With `wide`
    every twelfth training item has KITTI-360's aspect ratio (704x188). Paths in the file are relative to `directory`.
    The same arguments give the same pixels. Raises ValueError for fewer than two items.
    """
    if items < 2:
        raise ValueError(f"items is {items}; at least 2 are needed, one to train on and one to hold out")
    directory = Path(directory)
    held_out_from = items - min(HELD_OUT_ITEMS, items - 1)
    lists: dict[str, list[str]] = {"render": [], "gt": [], "cond": []}
    for kind in lists:
        (directory / kind).mkdir(parents=True, exist_ok=True)
    for index in range(items):
        rng = np.random.default_rng([seed, index])
        held_out = index >= held_out_from
        if index % 3 == 2:
            gt, cond = _photograph_views(rng, HELD_OUT_PHOTOGRAPH if held_out else rng.choice(TRAINING_PHOTOGRAPHS))
        elif wide and not held_out and index % 12 == 0:
            gt, cond = _stereo_views(rng, TRAINING_COLUMNS_PX, WIDE_SIZE_PX)
        else:
            gt, cond = _stereo_views(rng, HELD_OUT_COLUMNS_PX if held_out else TRAINING_COLUMNS_PX, SIZE_PX)
        for kind, image in (("render", degrade(gt, rng)), ("gt", gt), ("cond", cond)):
            path = f"{kind}/{index:04d}.png"
            image.save(directory / path)
            lists[kind].append(path)
    json_path = directory / "example_kitti.json"
    json_path.write_text(json.dumps(lists, indent=2) + "\n", encoding="utf-8")
    return json_path


def _stereo_views(
    rng: np.random.Generator, columns_px: tuple[int, int], size_px: tuple[int, int]
) -> tuple[Image.Image, Image.Image]:
    """The same window of the left and of the right view, within the given columns."""
    left, right = (read_photograph(name) for name in STEREO_PAIR)
    box = _random_window(rng, (columns_px[0], 0, columns_px[1], left.height), size_px, smallest=0.75)
    return _cut(left, box, size_px), _cut(right, box, size_px)


def _photograph_views(rng: np.random.Generator, name: str) -> tuple[Image.Image, Image.Image]:
    """A window of a photograph, and one that is shifted by up to 8 % and up to 15 % larger."""
    photograph = read_photograph(name)
    box = _random_window(rng, (0, 0, *photograph.size), SIZE_PX, smallest=0.6, largest=1 / LARGEST_ZOOM)
    width, height = box[2] - box[0], box[3] - box[1]
    zoom = rng.uniform(1, LARGEST_ZOOM)
    centre_x = (box[0] + box[2]) / 2 + rng.uniform(-0.08, 0.08) * width
    centre_y = (box[1] + box[3]) / 2 + rng.uniform(-0.08, 0.08) * height
    left = np.clip(centre_x - zoom * width / 2, 0, photograph.width - zoom * width)
    top = np.clip(centre_y - zoom * height / 2, 0, photograph.height - zoom * height)
    other = (left, top, left + zoom * width, top + zoom * height)
    return _cut(photograph, box, SIZE_PX), _cut(photograph, other, SIZE_PX)


def _random_window(
    rng: np.random.Generator, bounds: Box, size_px: tuple[int, int], smallest: float, largest: float = 1.0
) -> Box:
    """A window of the shape of `size_px`, `smallest` to `largest` times the largest one that fits into `bounds`."""
    aspect = size_px[0] / size_px[1]
    bounds_width, bounds_height = bounds[2] - bounds[0], bounds[3] - bounds[1]
    width = rng.uniform(smallest, largest) * min(bounds_width, bounds_height * aspect)
    height = width / aspect
    left = bounds[0] + rng.uniform(0, bounds_width - width)
    top = bounds[1] + rng.uniform(0, bounds_height - height)
    return left, top, left + width, top + height


def _cut(image: Image.Image, box: Box, size_px: tuple[int, int]) -> Image.Image:
    right, bottom = min(box[2], image.width), min(box[3], image.height)  # against rounding
    return image.resize(size_px, Image.Resampling.LANCZOS, box=(max(box[0], 0), max(box[1], 0), right, bottom))


def degrade(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """The photograph as a 3D-Gaussian scene fitted to few views would render it: blurred in part, floaters, holes."""
    pixels = np.asarray(image, dtype=np.float32)  # (H, W, 3)
    blurred = np.asarray(image.filter(ImageFilter.GaussianBlur(rng.uniform(1.5, 3.5))), dtype=np.float32)
    how_blurred = 0.3 + 0.7 * _soft_patches(rng, pixels.shape[:2], coverage=rng.uniform(0.3, 0.7), scale_px=60)
    result = pixels + how_blurred[..., None] * (blurred - pixels)
    for _ in range(rng.integers(60, 140)):  # needles: Gaussians that fit no training view of the scene
        _splat(result, pixels, rng, length_px=rng.uniform(4, 16), thinness=rng.uniform(0.1, 0.4))
    for _ in range(rng.integers(3, 8)):  # floaters: big ones near the camera
        _splat(result, pixels, rng, length_px=rng.uniform(15, 45), thinness=rng.uniform(0.2, 0.7))
    hole = _soft_patches(rng, pixels.shape[:2], coverage=rng.uniform(0.01, 0.08), scale_px=35)[..., None]  # (H, W, 1)
    background = rng.uniform(0, 70)
    result += hole * (background - result)
    return Image.fromarray(result.clip(0, 255).round().astype(np.uint8))


def _splat(canvas: np.ndarray, pixels: np.ndarray, rng: np.random.Generator, length_px: float, thinness: float) -> None:
    """Blends an elongated Gaussian over `canvas`, in the colour of a pixel nearby. Images: (H, W, 3), [0, 255]."""
    height, width = canvas.shape[:2]
    centre_x, centre_y = rng.uniform(0, width), rng.uniform(0, height)
    angle = rng.uniform(0, np.pi)
    opacity = rng.uniform(0.25, 0.8)
    source_x, source_y = rng.normal((centre_x, centre_y), 20).astype(int)
    colour = pixels[np.clip(source_y, 0, height - 1), np.clip(source_x, 0, width - 1)]  # (3,)
    reach_px = int(3.5 * length_px)  # beyond it the Gaussian is below 1/255
    rows = slice(max(0, int(centre_y) - reach_px), int(centre_y) + reach_px)
    columns = slice(max(0, int(centre_x) - reach_px), int(centre_x) + reach_px)
    x, y = np.arange(width)[None, columns] - centre_x, np.arange(height)[rows, None] - centre_y
    along = np.cos(angle) * x + np.sin(angle) * y  # (h, w)
    across = (np.cos(angle) * y - np.sin(angle) * x) / thinness  # (h, w)
    alpha = opacity * np.exp(-(along**2 + across**2) / (2 * length_px**2))  # (h, w)
    canvas[rows, columns] += alpha[..., None].astype(np.float32) * (colour - canvas[rows, columns])


def _soft_patches(rng: np.random.Generator, shape: tuple[int, int], coverage: float, scale_px: float) -> np.ndarray:
    """A mask in [0, 1], (H, W), with irregular soft-edged patches over about the share `coverage` of the image."""
    height, width = shape
    coarse = rng.normal(size=(3 + int(height / scale_px), 3 + int(width / scale_px))).astype(np.float32)
    field = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))  # (H, W)
    above = field - np.quantile(field, 1 - coverage)
    return 1 / (1 + np.exp(-8 * above.clip(-5, 5)))


# ----------------------------------------------------------------------------------------------------------------------
# vae: a folder of clips to train on, and one of clips to reconstruct, in different containers, codecs, sizes and rates

NTSC = Fraction(30000, 1001)
# File, photograph (the stereo pair is seen by a camera that moves sideways), motion, (width, height) in pixels, frames,
# rate in frames per second.
TRAINING_CLIPS = (
    ("parallax/motorcycle_wide.mp4", STEREO_PAIR[0], "parallax", (160, 96), 60, 30),
    ("parallax/motorcycle_close.webm", STEREO_PAIR[0], "parallax", (128, 128), 48, 24),
    ("parallax/upright/motorcycle.mov", STEREO_PAIR[0], "parallax", (96, 128), 48, NTSC),
    ("pan/astronaut.mp4", "astronaut.png", "pan", (128, 96), 48, 24),
    ("pan/rocket.avi", "rocket.jpg", "pan", (144, 112), 50, 25),
    ("pan/stars.webm", "hubble_deep_field.jpg", "pan", (128, 96), 40, 30),
    ("zoom/chelsea.mkv", "chelsea.png", "zoom", (160, 120), 50, 25),
    ("zoom/astronaut.avi", "astronaut.png", "zoom", (112, 112), 40, 30),
    ("turn/rocket.mp4", "rocket.jpg", "turn", (128, 128), 60, 60),
    ("turn/stars.MP4", "hubble_deep_field.jpg", "turn", (128, 96), 48, NTSC),
)
TEST_CLIPS = (
    ("coffee_pan.mp4", "coffee.png", "pan", (128, 96), 48, 24),
    ("coffee_zoom.webm", "coffee.png", "zoom", (128, 128), 40, 30),
    ("camera_turn.avi", "camera.png", "turn", (144, 112), 40, 25),
    ("coins_pan.mp4", "coins.png", "pan", (128, 96), 40, 30),
)
# Codec and its options. x264's macroblock tree does not give the same bits every time, MPEG-4 shows blocks at its usual
# bit rate, and VP9 at its usual speed takes a second per clip.
X264 = ("libx264", {"x264-params": "mbtree=0"})
ENCODERS: dict[str, tuple[str, dict[str, str]]] = {
    ".mp4": X264,
    ".mkv": X264,
    ".mov": X264,
    ".avi": ("mpeg4", {"b": "4000000"}),
    ".webm": ("libvpx-vp9", {"cpu-used": "5"}),
}
SUPERSAMPLING = 2
STEREO_REDUCTION = 2  # the views are still larger than the clips, and made four times faster


def make_vae_data(directory: Path, seed: int = 0) -> Path:
    """Writes `videos/`, ten clips in nested folders, and `test_video/`, four of other photographs; returns the former.

    The camera moves over photographs, and past the motorcycle with its true parallax. All clips have 40 to 60 frames
    with sides of 96 to 160 px. The same arguments give the same pixels.
    """
    for number, (folder, clips) in enumerate((("videos", TRAINING_CLIPS), ("test_video", TEST_CLIPS))):
        for index, (name, photograph, motion, size_px, num_frames, fps) in enumerate(clips):
            rng = np.random.default_rng([seed, number, index])
            path = Path(directory, folder, name)
            frames = np.stack(list(_filmed(rng, photograph, motion, size_px, num_frames)))  # (T, H, W, 3)
            codec, options = ENCODERS[path.suffix.lower()]
            write_video(path, frames, fps, codec=codec, options=options)
    return Path(directory, "videos")


@dataclass(frozen=True)
class _Pose:
    """The camera at one moment: the middle of its window in pixels of the photograph, how many of these a pixel of the
    clip spans, the angle it is turned by, and its place between the two views of the stereo pair."""

    centre: np.ndarray
    scale: float
    angle: float
    place: float


def _filmed(
    rng: np.random.Generator, name: str, motion: str, size_px: tuple[int, int], num_frames: int
) -> Iterator[np.ndarray]:
    """Frames uint8 (H, W, 3) of a camera that speeds up, slows down and never shows anything beyond the photograph."""
    photograph, disparity = _set(name, motion)
    for pose in _camera_path(rng, photograph, motion, size_px, num_frames):
        view = photograph if disparity is None else _view_between(photograph, disparity, pose.place)
        yield _window(view, pose.centre, pose.scale, pose.angle, size_px)


def _set(name: str, motion: str) -> tuple[Image.Image, np.ndarray | None]:
    """What is filmed, and, for parallax, its disparity (H, W)."""
    photograph = read_photograph(name)
    if motion != "parallax":
        return photograph, None
    return photograph.reduce(STEREO_REDUCTION), _disparity_px(STEREO_REDUCTION)


def _camera_path(
    rng: np.random.Generator, photograph: Image.Image, motion: str, size_px: tuple[int, int], num_frames: int
) -> Iterator[_Pose]:
    # The largest window that fits at any angle that is reached.
    largest_angle = rng.uniform(0.15, 0.4) * rng.choice((-1, 1)) if motion == "turn" else 0.0
    cos, sin = np.cos(largest_angle), abs(np.sin(largest_angle))
    width, height = size_px
    fitting = min(photograph.width / (width * cos + height * sin), photograph.height / (width * sin + height * cos))
    start, end = (0.6, 0.6) if motion in ("pan", "parallax") else (0.95, rng.uniform(0.4, 0.55))
    towards = rng.uniform(0.25, 1, 2) * rng.choice((-1, 1), 2)  # share of the free way to the edges
    for t in np.linspace(0, 1, num_frames):
        eased = t * t * (3 - 2 * t)
        scale = fitting * (start * (1 - eased) + end * eased)  # photograph's pixels per pixel of the clip
        angle = largest_angle * (2 * eased - 1)
        reach = (scale / fitting) * np.array(photograph.size) / 2
        centre = np.array(photograph.size) / 2 + (2 * eased - 1) * towards * (np.array(photograph.size) / 2 - reach)
        yield _Pose(centre, scale, angle, eased)


def _window(image: Image.Image, centre: np.ndarray, scale: float, angle: float, size_px: tuple[int, int]) -> np.ndarray:
    """A window of an image, turned by `angle` and `scale` times as large as the result: uint8 (H, W, 3)."""
    large = (size_px[0] * SUPERSAMPLING, size_px[1] * SUPERSAMPLING)
    a, b = scale / SUPERSAMPLING * np.cos(angle), scale / SUPERSAMPLING * np.sin(angle)
    x = centre[0] - a * large[0] / 2 - b * large[1] / 2
    y = centre[1] + b * large[0] / 2 - a * large[1] / 2
    window = image.transform(large, Image.Transform.AFFINE, (a, b, x, -b, a, y), Image.Resampling.BICUBIC)
    return np.asarray(window.resize(size_px, Image.Resampling.BOX))


def _disparity_px(reduction: int) -> np.ndarray:
    """How much further left each pixel of the left view is in the right one, both reduced: (H, W), without gaps."""
    disparity = np.load(_data_file(STEREO_DISPARITY))["arr_0"][::reduction, ::reduction] / reduction
    return _filled_from_the_sides(np.where(np.isfinite(disparity), disparity, np.nan))


def _filled_from_the_sides(disparity: np.ndarray) -> np.ndarray:
    """NaN becomes the lesser of the nearest values on its left and on its right: what lies behind."""
    columns = np.arange(disparity.shape[1])
    known = ~np.isnan(disparity)
    left = np.maximum.accumulate(np.where(known, columns, -1), axis=1)
    right = np.minimum.accumulate(np.where(known, columns, len(columns))[:, ::-1], axis=1)[:, ::-1]
    padded = np.pad(disparity, ((0, 0), (1, 1)), constant_values=np.inf)
    sides = np.minimum(np.take_along_axis(padded, left + 1, 1), np.take_along_axis(padded, right + 1, 1))
    return np.where(np.isfinite(sides), sides, 0.0)


def _view_between(left: Image.Image, disparity: np.ndarray, place: float) -> Image.Image:
    """What a camera between the left (0) and the right view (1) of the stereo pair sees, out of the left view."""
    width = left.width
    rows, columns = np.indices(disparity.shape)
    source = np.clip(columns + place * _disparity_between(disparity, place), 0, width - 1.001)  # (H, W)
    whole = source.astype(int)
    share = (source - whole)[..., None]  # (H, W, 1)
    pixels = np.asarray(left, np.float32)
    between = pixels[rows, whole] * (1 - share) + pixels[rows, whole + 1] * share  # (H, W, 3)
    return Image.fromarray(between.round().astype(np.uint8))


def _disparity_between(disparity: np.ndarray, place: float) -> np.ndarray:
    """The disparity of what that camera sees at each pixel: (H, W)."""
    width = disparity.shape[1]
    rows, columns = np.indices(disparity.shape)
    order = np.argsort(disparity, axis=None, kind="stable")  # near points last: they hide what is behind them
    target = np.round(columns - place * disparity).astype(int).ravel()[order]
    inside = (target >= 0) & (target < width)
    seen = np.full(disparity.shape, np.nan)
    seen[rows.ravel()[order][inside], target[inside]] = disparity.ravel()[order][inside]
    return _filled_from_the_sides(seen)


# ----------------------------------------------------------------------------------------------------------------------
# diffnext: tables of captioned images and clips, and the prompts to generate; sixteen bytes tell captions apart

CAPTIONS = {
    "astronaut.png": "an astronaut",
    "chelsea.png": "a cat",
    "hubble_deep_field.jpg": "stars",
    "rocket.jpg": "a rocket",
    "coffee.png": "a cup of coffee",
    STEREO_PAIR[0]: "a motorcycle",
}
NOVA_IMAGE_PX = (64, 64)
NOVA_IMAGES = 48


def make_nova_image_data(directory: Path, seed: int = 0) -> Path:
    """Writes 48 windows of 64 px of six photographs, `prompts.txt`, and `images.csv`, whose path it returns."""
    rows = ["path,caption"]
    for index in range(NOVA_IMAGES):
        name = list(CAPTIONS)[index % len(CAPTIONS)]
        photograph, rng = read_photograph(name), np.random.default_rng([seed, index])
        path = Path("images", f"{index:03d}.png")
        (directory / path).parent.mkdir(parents=True, exist_ok=True)
        box = _random_window(rng, (0, 0, *photograph.size), NOVA_IMAGE_PX, smallest=0.9)
        _cut(photograph, box, NOVA_IMAGE_PX).save(directory / path)
        rows.append(f"{path.as_posix()},{CAPTIONS[name]}")
    return _write_lines(directory / "images.csv", rows, list(CAPTIONS.values()))


def make_nova_clip_data(directory: Path, seed: int = 0) -> Path:
    """Writes the clips of `vae`, `prompts.txt`, and `clips.jsonl`, whose path it returns."""
    make_vae_data(directory, seed)
    captions = [CAPTIONS[photograph] for _, photograph, *_ in TRAINING_CLIPS]
    rows = [
        json.dumps({"path": f"videos/{name}", "caption": caption})
        for (name, *_), caption in zip(TRAINING_CLIPS, captions, strict=True)
    ]
    return _write_lines(directory / "clips.jsonl", rows, list(dict.fromkeys(captions)))


def _write_lines(table: Path, rows: list[str], prompts: list[str]) -> Path:
    """Writes a table and, beside it, prompts.txt."""
    for path, lines in ((table, rows), (table.with_name("prompts.txt"), prompts)):
        path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return table


# ----------------------------------------------------------------------------------------------------------------------
# mvdiffusion: textured meshes, their views as `render_multiview.py` makes them, and photographs of single objects

VIEWS = ("front", "front_right", "right", "back", "left", "front_left")
VIEW_PX, VIEW_SCALE = 64, 1.0
TEXTURES = ("astronaut.png", "chelsea.png", "coffee.png", STEREO_PAIR[0])  # the others are too dark
TEXTURE_PX = (96, 96)
NUM_OBJECTS = 32
BODIES = (
    "sphere",
    "box",
    "cylinder",
    "cone",
    "torus",
    "capsule",
    "superquadric",
    "ant",
    "superquadric",
    "snowman",
    "table",
    "airplane",
    "mushroom",
    "dumbbell",
    "nut",
    "tower",
)
PACKAGE_MESHES = ("ant", "airplane", "nut")  # in the examples of pyvista
# What is cut out of a photograph: ellipses (centre x, y, half width, half height) and polygons, in pixels.
PHOTOGRAPHED: dict[str, tuple[str, list[tuple[float, ...]]]] = {
    "cup": ("coffee.png", [(277, 236, 202, 150), (290, 112, 118, 97)]),
    "coin": ("coins.png", [(347, 186, 32, 32)]),
    "rocket": ("rocket.jpg", [(311, 407, 311, 170, 315, 140, 321, 128, 327, 140, 331, 170, 331, 407)]),
    "astronaut": (
        "astronaut.png",
        [
            (22, 512, 26, 390, 70, 265, 120, 220, 135, 160, 160, 120, 152, 60, 200, 18, 240, 14, 292, 40, 302, 85, 285)
            + (130, 276, 155, 304, 225, 350, 300, 364, 345, 420, 345, 480, 385, 508, 450, 511, 512)
        ],
    ),
}
PHOTO_PX = 256


def make_mvdiffusion_data(directory: Path, seed: int = 0, jobs: int = 2) -> Path:
    """Writes `meshes/`, 32 .glb files, `views/`, six views of each in RGB and normals, and `photos/`.

    The meshes are simple bodies and some that come with pyvista, of random proportions and orientation, with windows
    of photographs as textures. `photos` holds PNG files with alpha, each of one object. The same arguments give the
    same pixels on the same machine. Returns `views`. Raises ModuleNotFoundError without pyvista or trimesh,
    RuntimeError where VTK cannot draw.

    Args:
        jobs: objects rendered at a time.
    """
    from render_multiview import Settings, render_folder, require_renderer

    require_renderer()
    meshes, views = Path(directory, "meshes"), Path(directory, "views")
    meshes.mkdir(parents=True, exist_ok=True)
    for index in range(NUM_OBJECTS):
        body = BODIES[index % len(BODIES)]
        _textured_body(body, np.random.default_rng([seed, index])).export(meshes / f"{index:03d}_{body}.glb")
    if views.exists():
        shutil.rmtree(views)
    settings = Settings(views=VIEWS, resolution_px=VIEW_PX, ortho_scale=VIEW_SCALE, supersampling=3)
    bad = render_folder(meshes, views, settings, jobs)
    if bad:
        raise RuntimeError(f"some meshes could not be rendered: {bad}")
    make_photos(Path(directory, "photos"))
    return views


def _textured_body(body: str, rng: np.random.Generator) -> Any:
    """A trimesh of random proportions and orientation; its texture is projected along the nearest axis."""
    import trimesh

    mesh = _body(body, rng)
    corners = mesh.vertices[mesh.faces] * rng.uniform(0.6, 1.4, 3)  # (T, 3, 3)
    corners -= (corners.min((0, 1)) + corners.max((0, 1))) / 2
    corners /= np.abs(corners).max()
    normals = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])  # (T, 3)
    axis = np.abs(normals).argmax(1)  # (T,)
    others = np.array([(1, 2), (0, 2), (0, 1)])[axis][:, None]  # (T, 1, 2)
    uv = np.take_along_axis(corners, np.broadcast_to(others, (len(corners), 3, 2)), axis=2) / 2 + 0.5  # (T, 3, 2)
    photograph = read_photograph(rng.choice(TEXTURES))
    window = _random_window(rng, (0, 0, *photograph.size), TEXTURE_PX, smallest=0.3)
    material = trimesh.visual.material.PBRMaterial(baseColorTexture=_cut(photograph, window, TEXTURE_PX))
    rotation = trimesh.transformations.random_rotation_matrix(rng.uniform(size=3))[:3, :3]
    return trimesh.Trimesh(
        corners.reshape(-1, 3) @ rotation.T,
        np.arange(3 * len(corners)).reshape(-1, 3),
        visual=trimesh.visual.TextureVisuals(uv.reshape(-1, 2), material),
        process=False,
    )


def _body(body: str, rng: np.random.Generator) -> Any:
    """A trimesh without a texture, about 1 to 3 units large."""
    import pyvista.examples
    import trimesh
    from trimesh.creation import box, capsule, cone, cylinder, icosphere, torus

    if body in PACKAGE_MESHES:
        return trimesh.load_mesh(Path(pyvista.examples.__file__).parent / f"{body}.ply")
    if body == "superquadric":
        mesh = icosphere(4)
        mesh.vertices = np.sign(mesh.vertices) * np.abs(mesh.vertices) ** rng.uniform(0.3, 1.8)
        return mesh

    def at(part: Any, x: float, y: float, z: float) -> Any:
        return part.apply_translation((x, y, z))

    thin = rng.uniform(0.1, 0.3)
    legs = [at(box((0.15, 0.15, 0.8)), x, y, -0.4) for x in (-0.5, 0.5) for y in (-0.5, 0.5)]
    parts = {
        "sphere": [icosphere(4)],
        "box": [box((1, 1, 1))],
        "cylinder": [cylinder(0.5, 1, sections=64)],
        "cone": [cone(0.6, 1, sections=64)],
        "torus": [torus(0.7, thin, major_sections=64, minor_sections=32)],
        "capsule": [capsule(1, 0.2 + thin)],
        "snowman": [icosphere(3), at(icosphere(3, 0.7), 0, 0, 1.2), at(icosphere(3, 0.45), 0, 0, 2)],
        "table": [box((1.2, 1.2, thin)), *legs],
        "mushroom": [cylinder(thin, 1.2, sections=48), at(cone(0.7, 0.6, sections=48), 0, 0, 0.4)],
        "dumbbell": [cylinder(thin, 1.6, sections=48), *(at(icosphere(3, 0.5), 0, 0, z) for z in (-0.8, 0.8))],
        "tower": [box((1, 1, 0.8)), at(cylinder(0.4, 1, sections=48), 0, 0, 0.9), at(icosphere(3, 0.4), 0, 0, 1.4)],
    }
    return trimesh.util.concatenate(parts[body])


def make_photos(directory: Path) -> Path:
    """Writes photographs of single objects, RGBA PNG files with sides of up to 256 px; returns `directory`."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, (photograph, shapes) in PHOTOGRAPHED.items():
        image = read_photograph(photograph)
        mask = Image.new("L", image.size)
        for shape in shapes:
            if len(shape) == 4:
                x, y, half_width, half_height = shape
                box = (x - half_width, y - half_height, x + half_width, y + half_height)
                ImageDraw.Draw(mask).ellipse(box, fill=255)
            else:
                ImageDraw.Draw(mask).polygon(shape, fill=255)
        image.putalpha(mask.filter(ImageFilter.GaussianBlur(0.7)))
        image = image.crop(mask.getbbox())
        image.thumbnail((PHOTO_PX, PHOTO_PX), Image.Resampling.LANCZOS)
        image.save(directory / f"{name}.png")
    return directory


# ----------------------------------------------------------------------------------------------------------------------
# training_ggi: scenes in the form of DL3DV-10K, filmed in the same ways as the clips of vae

# Photograph, motion, frames. The last one is what the trainer holds out.
GGI_SCENES = (
    (STEREO_PAIR[0], "parallax", 56),
    ("astronaut.png", "pan", 52),
    ("chelsea.png", "zoom", 54),
    (STEREO_PAIR[0], "parallax", 60),
    ("rocket.jpg", "turn", 50),
    ("coffee.png", "pan", 56),
)
GGI_SIZE_PX = (240, 160)
GGI_SEGMENT = range(10, 16)


def make_ggi_data(directory: Path, seed: int = 0) -> Path:
    """Writes six scenes of 50 to 60 frames, `seeds.txt`, `captions.json`, `flow/` and `segment/`; returns `directory`.

    Frames are 240x160 px; each scene has `edges` beside them. `flow/<scene>.npy` holds the true optical flow from each
    to the next, (dx, dy) in pixels, for what is visible in the first of the two: float16 (F - 1, 2, H, W). `segment` is
    a piece of the last scene as inference takes it. The same arguments give the same pixels.
    """
    directory = Path(directory)
    names, captions = [], {}
    for index, (photograph, motion, num_frames) in enumerate(GGI_SCENES):
        scene = f"{index:02x}" + hashlib.sha256(f"demo scene {index}".encode()).hexdigest()[2:]
        names.append(f"DL3DV-10K/1K/{scene}")
        captions[scene] = CAPTIONS[photograph]
        frames, flow = _film_with_flow(np.random.default_rng([seed, index]), photograph, motion, num_frames)
        images = directory / names[-1] / "images_2"
        _write_images(images, map(Image.fromarray, frames))
        _write_images(directory / names[-1] / "edges", map(_edges, frames))
        (directory / "flow").mkdir(exist_ok=True)
        np.save(directory / "flow" / f"{scene}.npy", flow.astype(np.float16))
    _write_images(
        directory / "segment" / "ends", (Image.fromarray(frames[i]) for i in (GGI_SEGMENT[0], GGI_SEGMENT[-1]))
    )
    _write_images(directory / "segment" / "edges", (_edges(frames[i]) for i in GGI_SEGMENT))
    np.save(directory / "segment" / "flow.npy", flow[GGI_SEGMENT[0] : GGI_SEGMENT[-1]].astype(np.float32))
    (directory / "seeds.txt").write_text("".join(f"{name}\n" for name in names), encoding="utf-8")
    (directory / "captions.json").write_text(json.dumps(captions) + "\n", encoding="utf-8")
    return directory


def _write_images(folder: Path, images: Iterable[Image.Image]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number, image in enumerate(images, start=1):
        image.save(folder / f"frame_{number:05d}.png", compress_level=1)


def _edges(frame: np.ndarray) -> Image.Image:
    """White on black."""
    return Image.fromarray(frame).convert("L").filter(ImageFilter.GaussianBlur(1)).filter(ImageFilter.FIND_EDGES)


def _film_with_flow(rng: np.random.Generator, name: str, motion: str, num_frames: int) -> tuple[np.ndarray, np.ndarray]:
    """Frames uint8 (F, H, W, 3), and the flow between them (F - 1, 2, H, W) in pixels."""
    photograph, disparity = _set(name, motion)
    path = list(_camera_path(rng, photograph, motion, GGI_SIZE_PX, num_frames))
    frames, flows = [], []
    for number, pose in enumerate(path):
        view = photograph if disparity is None else _view_between(photograph, disparity, pose.place)
        frames.append(_window(view, pose.centre, pose.scale, pose.angle, GGI_SIZE_PX))
        if number + 1 < num_frames:
            flows.append(_true_flow(pose, path[number + 1], disparity))
    return np.stack(frames), np.stack(flows)


def _true_flow(pose: _Pose, following: _Pose, disparity: np.ndarray | None) -> np.ndarray:
    """(2, H, W): to where in the following frame the camera's motion brings what is at each pixel of this one."""
    width, height = GGI_SIZE_PX
    place = np.stack(np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5), axis=-1)  # (H, W, 2): x, y
    middle = np.array(GGI_SIZE_PX) / 2
    seen = pose.centre + pose.scale * (place - middle) @ _turn(pose.angle)  # (H, W, 2), in the photograph
    if disparity is not None:
        column, row = (np.clip(seen[..., i].astype(int), 0, disparity.shape[1 - i] - 1) for i in (0, 1))
        shift_px = (following.place - pose.place) * _disparity_between(disparity, pose.place)[row, column]  # (H, W)
        seen = seen - np.stack([shift_px, np.zeros_like(shift_px)], axis=-1)
    there = middle + (seen - following.centre) @ _turn(following.angle).T / following.scale  # (H, W, 2)
    return (there - place).transpose(2, 0, 1)  # (2, H, W)


def _turn(angle: float) -> np.ndarray:
    """What `_window` turns by, for rows (x, y)."""
    return np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])


# ----------------------------------------------------------------------------------------------------------------------

# One row per trainer; `arguments` are those of the command line.
MAKERS: dict[str, Callable[[Path, argparse.Namespace], Path]] = {
    "gaussian_refiner": lambda directory, arguments: make_refiner_data(
        directory, arguments.items, arguments.seed, arguments.wide
    ),
    "vae": lambda directory, arguments: make_vae_data(directory, arguments.seed),
    "diffnext_t2i": lambda directory, arguments: make_nova_image_data(directory, arguments.seed),
    "diffnext_t2v": lambda directory, arguments: make_nova_clip_data(directory, arguments.seed),
    "mvdiffusion": lambda directory, arguments: make_mvdiffusion_data(directory, arguments.seed),
    "training_ggi": lambda directory, arguments: make_ggi_data(directory, arguments.seed),
}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/demo/data"), help="one folder per trainer in it")
    parser.add_argument("--only", nargs="+", choices=MAKERS, default=list(MAKERS), metavar="TRAINER")
    parser.add_argument("--items", type=int, default=48, help="gaussian_refiner: how many triples")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--wide", action="store_true", help="gaussian_refiner: every twelfth item in KITTI-360's aspect"
    )
    arguments = parser.parse_args(argv)
    for trainer in arguments.only:
        print(MAKERS[trainer](arguments.output / trainer, arguments))


if __name__ == "__main__":
    main()
