"""Cameras, image preparation and a whole item of the multi-view data against recorded vectors."""

import re
from pathlib import Path

import numpy as np
import torch
import vectors as golden
from PIL import Image
from vectors import Vectors

from mvdiffusion.data.mvds import MultiViewDataset, Variant, find_objects
from mvdiffusion.data.poses import (
    FIXED_POSES_DIR,
    class_labels,
    fixed_poses,
    label_rows,
    read_pose,
    relative_angles,
    sin_cos,
)
from mvdiffusion.data.preparation import (
    ClipTransform,
    decode_normals,
    encode_normals,
    on_background,
    prepare_colour,
    prepare_mask,
    prepare_normals,
    recentre,
    rotate_normals,
    unit_normals,
    vae_pixels,
)
from mvdiffusion.views import VIEW_LISTS, Colour, colours_of

TRAINER = "mvdiffusion"


def near(vectors: Vectors, name: str, actual: np.ndarray, atol: float) -> None:
    """Compare with tensor `name`; the limit is the header's, which names no tensors in these files."""
    expected = vectors[name].numpy()
    assert actual.shape == expected.shape, name
    np.testing.assert_allclose(actual.astype(np.float64), expected, rtol=0, atol=atol, err_msg=name)


def colour_of(background: str | float, levels: dict[str, float]) -> Colour:
    """A header's background: a name whose level the header tells, one of ours, or a level."""
    (colour,) = colours_of(levels.get(str(background), background)) or ()  # random ones follow no vector
    return colour


def numbers(vectors: Vectors, name: str) -> np.ndarray:
    return vectors[name].numpy()


def picture(pixels_chw: np.ndarray) -> Image.Image:
    return Image.fromarray(np.ascontiguousarray(pixels_chw.transpose(1, 2, 0)))


def rotation_between(vectors: Vectors, view: str, condition: str) -> np.ndarray:
    rotations = {name: numbers(vectors, f"pose.{name}")[:, :3] for name in (view, condition)}
    return rotations[condition] @ np.linalg.inv(rotations[view])


# Cameras


@golden.by_case(TRAINER, "01_camera_embedding*", r"pose\.(.+)")
def test_shipped_poses(vectors: Vectors, case: str) -> None:
    assert (read_pose(FIXED_POSES_DIR / f"000_{case}_RT.txt") == numbers(vectors, f"pose.{case}")).all()


@golden.by_case(TRAINER, "01_camera_embedding*", r"(.+\..+)\.azimuth")
def test_class_labels(vectors: Vectors, case: str) -> None:
    condition, view_list = case.split(".")
    views = vectors.config["view_lists"][view_list]
    assert condition in vectors.config["cond"]
    poses = np.stack([numbers(vectors, f"pose.{view}") for view in [condition, *views]])
    atol = vectors.header["tolerance"]["atol"]
    angles = relative_angles(poses, 0)[1:]  # (V, 2)
    near(vectors, f"{case}.elevation", angles[:, 0], atol)
    near(vectors, f"{case}.azimuth", angles[:, 1], atol)
    labels = class_labels(poses, 0)
    near(vectors, f"{case}.embed10_normal", labels["normal"][1:], atol)
    near(vectors, f"{case}.embed10_color", labels["colour"][1:], atol)


@golden.by_file(TRAINER, "01_camera_embedding*", having="pipeline_table_fp16")
def test_built_in_table_of_the_pipeline(vectors: Vectors) -> None:
    """Its rows are ours of the tilted poses in half precision: the normal half, then the colour half."""
    table = numbers(vectors, "pipeline_table_fp16")
    views = VIEW_LISTS[len(table) // 2]
    angles = relative_angles(fixed_poses(views, "tilted"), views.index("front"))
    rows = np.concatenate([label_rows(angles, "normal"), label_rows(angles, "colour")])
    np.testing.assert_array_equal(rows.astype(np.float16), table)
    atol = vectors.header["tolerance"]["atol"]
    near(vectors, "pipeline_embed10_fp32", sin_cos(table.astype(np.float32)), atol)


# Normals


@golden.by_file(TRAINER, "02_normal_transform*")
def test_normals(vectors: Vectors) -> None:
    atol = vectors.header["tolerance"]["atol"]
    normals = decode_normals(numbers(vectors, "img_u8"))
    near(vectors, "img2normal", normals, atol)
    near(vectors, "norm_normalize", unit_normals(normals), atol)
    assert (encode_normals(normals) == numbers(vectors, "normal2img_u8")).all()
    for name, view, inverse in _single_rotations(vectors):
        rotation = numbers(vectors, f"pose.{view}")[:, :3]
        near(vectors, name, rotate_normals(normals, np.linalg.inv(rotation) if inverse else rotation), atol)
    for view, condition in vectors.config["pairs"]:
        rotated = rotate_normals(normals, rotation_between(vectors, view, condition))
        near(vectors, f"trans.{view}.{condition}", rotated, atol)


def _single_rotations(vectors: Vectors) -> list[tuple[str, str, bool]]:
    """(tensor, view, inverse): the header says "rot = inv(R_right)" or "rot = R_front"."""
    found = []
    for name in ("cam2world", "world2cam"):
        match = re.fullmatch(r"rot = (inv\()?R_(\w+)\)?", vectors.config[name])
        found.append((name, match[2], match[1] is not None))
    return found


# Images


@golden.by_case(TRAINER, "03_image_preparation*", r"(.+)\.mask")
def test_masks_colours_and_normals(vectors: Vectors, case: str) -> None:
    size_wh = tuple(vectors.config["cases"][case])
    rgba, normals = numbers(vectors, "rgba_u8"), numbers(vectors, "normal_u8")
    tolerance = vectors.header["tolerance"]
    atol = tolerance["same" if size_wh == rgba.shape[1::-1] else "resized"]["atol"]
    mask = prepare_mask(Image.fromarray(rgba[..., 3]), size_wh)
    assert (mask[..., 0] == numbers(vectors, f"{case}.mask")).all()
    rotations = {}
    for name in ("normal_rgba", "normal_with_mask"):
        view, condition = re.fullmatch(r"view=(\w+) cond=(\w+)", vectors.config[name]).groups()
        rotations[name] = rotation_between(vectors, view, condition)
    normals_rgba = Image.fromarray(np.dstack([normals, rgba[..., 3]]))
    rgb = Image.fromarray(np.ascontiguousarray(rgba[..., :3]))
    for background, level in vectors.config["bg"].items():
        rest = size_wh, (level,) * 3
        actual = {
            "rgba": prepare_colour(Image.fromarray(rgba), *rest),
            "rgb_with_mask": prepare_colour(rgb, *rest, mask),
            "normal_rgba": prepare_normals(normals_rgba, *rest, rotations["normal_rgba"]),
            "normal_with_mask": prepare_normals(
                Image.fromarray(normals), *rest, rotations["normal_with_mask"], mask
            ),
        }  # fmt: skip
        for name, image in actual.items():
            near(vectors, f"{case}.{background}.{name}", image, atol)


@golden.by_case(TRAINER, "03_image_preparation*", r"crop(\d+)\.img")
def test_recentring(vectors: Vectors, case: str) -> None:
    settings = vectors.config["crop"][int(case)]
    image = Image.fromarray(numbers(vectors, f"crop{case}.rgba_u8"))
    centred = recentre(image, settings["crop_size"], settings["img_wh"], exclusive_bound=True)
    atol = vectors.header["tolerance"]["crop"]["atol"]
    background = colour_of(vectors.config["crop_bg"], vectors.config["bg"])
    near(vectors, f"crop{case}.img", on_background(centred, background), atol)
    near(vectors, f"crop{case}.alpha", np.asarray(centred)[..., 3:] / 255, atol)


# What the frozen networks take


@golden.by_case(TRAINER, "04_mvds_transforms*", r"(.+)\.image_u8_chw")
def test_vae_and_clip_transforms(vectors: Vectors, case: str) -> None:
    image, settings = picture(numbers(vectors, f"{case}.image_u8_chw")), vectors.config["cases"][case]
    assert settings["center_crop"] or image.width == image.height, "random crops follow no vector"
    near(vectors, f"{case}.vae", vae_pixels(image, settings["resolution"]), vectors.header["tolerance"]["vae"]["atol"])
    clip = ClipTransform(mean=tuple(vectors.config["clip_mean"]), std=tuple(vectors.config["clip_std"]))
    assert clip == ClipTransform()
    atol = vectors.header["tolerance"]["clip"]["atol"]
    for name in (name for name in vectors.tensors if re.fullmatch(rf"{re.escape(case)}\.clip\d+", name)):
        size_px = int(name.rpartition("clip")[2])
        _near_clip(vectors, name, ClipTransform(size_px, size_px)(image), atol)
    pixels = clip(image)
    for name in (name for name in vectors.tensors if name.startswith(f"{case}.clip224_stride")):
        stride = int(name.rpartition("stride")[2])
        _near_clip(vectors, name, pixels[:, ::stride, ::stride], atol)
    mean_std = torch.stack([torch.from_numpy(pixels).mean(), torch.from_numpy(pixels).std()]).numpy()
    near(vectors, f"{case}.clip224_mean_std", mean_std, atol)


def _near_clip(vectors: Vectors, name: str, actual: np.ndarray, atol: float) -> None:
    near(vectors, name, actual, atol)
    assert (np.abs(actual - numbers(vectors, name)) > 1e-3).mean() < 0.01, "a level of 255 on under 1% of the pixels"


@golden.by_case(TRAINER, "04_mvds_transforms*", r"(.+)\.images_u8")
def test_vae_transform_of_a_list(vectors: Vectors, case: str) -> None:
    images = [picture(pixels) for pixels in numbers(vectors, f"{case}.images_u8")]
    resolution_px = vectors[f"{case}.vae"].shape[-1]
    pixels = np.stack([vae_pixels(image, resolution_px) for image in images])
    near(vectors, f"{case}.vae", pixels, vectors.header["tolerance"]["vae"]["atol"])


# A whole item


@golden.by_file(TRAINER, "03b_dataset_item*")
def test_dataset_item(vectors: Vectors, tmp_path: Path) -> None:
    config, atol = vectors.config, vectors.header["tolerance"]["atol"]
    folder = tmp_path / "abc" / "abcdef"
    folder.mkdir(parents=True)
    for view in config["view_order"]:
        for key, kind in (("rgb", "rgb"), ("mask", "mask"), ("normal", "normals")):
            if f"in.{key}.{view}" not in vectors:  # RGBA images need no mask
                continue
            Image.fromarray(numbers(vectors, f"in.{key}.{view}")).save(folder / f"{kind}_000_{view}.png")
    width, height = config["img_wh"]
    assert width == height, "the contract's images are square"
    objects = find_objects(tmp_path, views=config["view_order"]).train
    dataset = MultiViewDataset(
        objects,
        views=config["view_order"],
        resolution_px=width,
        background=config["bg"],
        condition_view=config["cond_view"],
    )
    (variant,) = dataset.variants()
    assert variant == Variant(colour_of(config["bg"], {}), config["view_order"].index(config["cond_view"]))
    item = dataset.item(0, variant)

    assert (item["image_cond_vae"] == item["image_target_vae"][variant.condition_view]).all()
    condition = np.broadcast_to(item["image_cond_vae"], item["image_target_vae"].shape)
    near(vectors, "out.imgs_in", condition / 2 + 0.5, atol)
    near(vectors, "out.imgs_out", item["image_target_vae"] / 2 + 0.5, atol)
    near(vectors, "out.normals_out", item["normal_target_vae"] / 2 + 0.5, atol)
    for key, name in (("image_target", "out.imgs_out"), ("normal_target", "out.normals_out")):
        assert np.abs(item[key] / 255.0 - numbers(vectors, name).clip(0, 1)).max() <= 0.5 / 255 + atol

    angles = relative_angles(fixed_poses(config["view_order"], "tilted"), variant.condition_view)
    near(vectors, "out.elevations", angles[:, 0], atol)
    near(vectors, "out.azimuths", angles[:, 1], atol)
    for name, radians in (("elevations", angles[:, 0]), ("azimuths", angles[:, 1])):  # float32 degrees are coarser
        np.testing.assert_allclose(np.deg2rad(numbers(vectors, f"out.{name}_deg")), radians, rtol=0, atol=atol)
    for name in ("elevations_cond", "elevations_cond_deg"):
        near(vectors, f"out.{name}", label_rows(angles, "normal")[:, 0], atol)
    near(vectors, "out.camera_embeddings", label_rows(angles, "normal", width=6), atol)
    for domain, key, name in (("normal", "camera_embed_normal", "normal"), ("colour", "camera_embed_image", "color")):
        codes = numbers(vectors, f"out.{name}_task_embeddings")
        assert (label_rows(angles, domain)[:, 3:] == codes).all()
        rows = np.concatenate([numbers(vectors, "out.camera_embeddings"), codes], axis=1)
        np.testing.assert_allclose(item[key], sin_cos(rows), rtol=0, atol=atol)
