import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from spheres import Sphere, write_object
from transformers import CLIPImageProcessor, CLIPImageProcessorPil

from common.data import SampleLoader, SamplePlan
from common.video import MediaError
from mvdiffusion.data.mvds import (
    Layout,
    MultiViewDataset,
    RandomViews,
    Variant,
    WithoutRawImages,
    find_objects,
    read_uids,
)
from mvdiffusion.data.poses import (
    class_labels,
    fixed_poses,
    label_rows,
    mirror_order,
    read_pose,
    relative_angles,
)
from mvdiffusion.data.preparation import (
    ClipTransform,
    on_background,
    prepare_colour,
    prepare_mask,
    prepare_normals,
    read_image,
    recentre,
    vae_pixels,
)
from mvdiffusion.views import AZIMUTHS_DEG, FIXED_VIEWS, VIEW_LISTS, choose_views

SIX = VIEW_LISTS[6]
UPRIGHT = fixed_poses(SIX, "upright")
SHAPES = {
    "image_cond": (3, 32, 32),
    "image_target": (6, 3, 32, 32),
    "normal_target": (6, 3, 32, 32),
    "image_cond_vae": (3, 32, 32),
    "image_cond_CLIP": (3, 224, 224),
    "image_target_vae": (6, 3, 32, 32),
    "normal_target_vae": (6, 3, 32, 32),
    "camera_embed_image": (6, 10),
    "camera_embed_normal": (6, 10),
}
RAW = ("image_cond", "image_target", "normal_target")


def dataset_of(root: Path, views=SIX, rendered_poses=False, **options) -> MultiViewDataset:
    objects = find_objects(root, views=views, rendered_poses=rendered_poses).train
    poses = "rendered" if rendered_poses else options.pop("poses", "upright")
    return MultiViewDataset(objects, **{"views": views, "resolution_px": 32, "poses": poses, **options})


def save(path: Path, pixels: np.ndarray) -> Path:
    Image.fromarray(pixels).save(path)
    return path


def rotation(degrees: float, axis: int) -> np.ndarray:
    sine, cosine = np.sin(np.deg2rad(degrees)), np.cos(np.deg2rad(degrees))
    return np.roll([[1, 0, 0], [0, cosine, -sine], [0, sine, cosine]], (axis, axis), (0, 1))


# Views and poses


def test_view_lists():
    assert choose_views(1) == ("front",)
    assert choose_views(2) == ("front", "back")
    assert choose_views(3) == ("front", "right", "left")
    assert choose_views(4) == ("front", "right", "back", "left")
    assert choose_views(5) == ("front", "front_right", "right", "back", "left")
    assert choose_views(6) == ("front", "front_right", "right", "back", "left", "front_left")
    assert choose_views(8) == tuple(AZIMUTHS_DEG)
    assert choose_views(2, ["front", "front_top"], "rendered") == ("front", "front_top")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((7,), "num_views is 7, which has no list of its own (only 1, 2, 3, 4, 5, 6, 8 have): set views"),
        ((6, None, "flat"), "poses is 'flat', but must be one of tilted, upright, rendered"),
        ((3, ["front", "back"]), "views names 2 views (front, back), but num_views is 3"),
        ((2, ["back", "back"]), "views names a view twice: back, back"),
        (
            (2, ["front", "up"]),
            "'up' in views has no tilted pose (there are front, front_right, right, back_right, back, back_left, left, "
            "front_left, top); set poses to 'rendered' to read each object's own",
        ),
    ],
)
def test_wrong_views(arguments, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        choose_views(*arguments)


def test_upright_cameras_stand_around_the_object():
    poses = fixed_poses(FIXED_VIEWS, "upright")
    centres = dict(zip(FIXED_VIEWS, -np.einsum("vij,vi->vj", poses[:, :, :3], poses[:, :, 3]), strict=True))
    for view, centre in {"front": (0, -2, 0), "right": (2, 0, 0), "back": (0, 2, 0), "top": (0, 0, 2)}.items():
        np.testing.assert_allclose(centres[view], centre, atol=1e-12)
    np.testing.assert_allclose(centres["front_left"], (-(2**0.5), -(2**0.5), 0), atol=1e-12)
    for pose in poses[:-1]:
        np.testing.assert_allclose(pose[:, :3] @ (0, 0, 1), (0, 1, 0), atol=1e-12)  # up is up
    np.testing.assert_allclose(np.linalg.det(poses[:, :, :3]), 1, atol=1e-12)
    angles = np.rad2deg(relative_angles(poses, 0))
    np.testing.assert_allclose(angles[:-1, 0], 0, atol=1e-12)
    np.testing.assert_allclose(angles[:-1, 1], range(0, 360, 45), atol=1e-9)
    assert angles[-1, 0] == pytest.approx(-90)


def test_tilted_and_upright_rigs_are_the_same_but_for_how_they_stand():
    """The top view is not: the shipped one is rolled."""
    tilted, upright = (fixed_poses(FIXED_VIEWS[:-1], poses)[:, :, :3] for poses in ("tilted", "upright"))
    between = [rotations @ rotations[0].T for rotations in (tilted, upright)]
    np.testing.assert_allclose(*between, atol=1e-6)
    np.testing.assert_allclose(relative_angles(fixed_poses(SIX, "tilted"), 0)[3], (0.5220, 3.1416), atol=1e-4)


def test_label_widths():
    angles = np.array([[0.1, 0.2]])
    assert label_rows(angles, "normal", 6).tolist() == [[0, 0.1, 0.2]]
    assert label_rows(angles, "normal").tolist() == [[0, 0.1, 0.2, 1, 0]]
    assert label_rows(angles, "colour", 14).tolist() == [[0, 0.1, 0.2, 1, 0, 0, 1]]
    assert label_rows(angles, "colour", 14, "perspective").tolist() == [[0, 0.1, 0.2, 0, 1, 0, 1]]
    for width in (6, 10, 14):
        labels = class_labels(UPRIGHT, 0, width)
        assert {labels[domain].shape for domain in ("normal", "colour")} == {(6, width)}
        assert labels["normal"].dtype == np.float32
        assert (labels["normal"] == labels["colour"]).all() == (width == 6)
    with pytest.raises(ValueError, match=r"^the width of the class labels is 12, but must be one of \(6, 10, 14\)$"):
        label_rows(angles, "colour", 12)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (None, "cannot be read as a pose (FileNotFoundError: "),
        ("", "a pose must be a 3x4 matrix, but this one is 0x1"),
        ("1 0 0 0\n0 1 0 0\n", "a pose must be a 3x4 matrix, but this one is 2x4"),
        ("1 0 0 0\n0 1 0\n0 0 1 0\n", "cannot be read as a pose (ValueError: "),
        ("1 0 0 0\n0 2 0 0\n0 0 1 0\n", "the left 3x3 part of a pose must be a rotation"),
        ("-1 0 0 0\n0 1 0 0\n0 0 1 0\n", "the left 3x3 part of a pose must be a rotation"),
        ("1 0 0 nan\n0 1 0 0\n0 0 1 0\n", "the left 3x3 part of a pose must be a rotation"),
    ],
)
@pytest.mark.filterwarnings("ignore:loadtxt")
def test_wrong_pose_files(text, reason, tmp_path):
    path = tmp_path / "000_front_RT.txt"
    if text is not None:
        path.write_text(text)
    with pytest.raises(MediaError) as caught:
        read_pose(path)
    assert caught.value.path == str(path) and caught.value.reason.startswith(reason)


def test_mirror_views():
    assert [SIX[i] for i in mirror_order(UPRIGHT, 0, SIX)] == [
        "front",
        "front_left",
        "left",
        "back",
        "right",
        "front_right",
    ]
    eight = VIEW_LISTS[8]
    order = mirror_order(fixed_poses(eight, "tilted"), eight.index("front_right"), eight)
    assert eight[order[eight.index("front")]] == "right"
    assert mirror_order(fixed_poses(FIXED_VIEWS, "upright"), 0, FIXED_VIEWS)[-1] == 8
    message = (
        f"images cannot be flipped: no view among {', '.join(SIX)} is the mirror view of 'front_right' for the "
        "condition view 'right'; add it, or switch random_flip off"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        mirror_order(UPRIGHT, SIX.index("right"), SIX)


# Images


def test_read_image_keeps_transparency(tmp_path):
    rgba = np.random.default_rng(0).integers(0, 256, (8, 8, 4), dtype=np.uint8)
    assert (np.asarray(read_image(save(tmp_path / "a.png", rgba), needs_alpha=True)) == rgba).all()
    assert read_image(save(tmp_path / "b.png", rgba[..., :3])).mode == "RGB"
    assert read_image(save(tmp_path / "c.png", rgba[..., :2].copy())).mode == "RGBA"
    assert read_image(save(tmp_path / "d.png", rgba[..., 0])).mode == "RGB"


def test_wrong_images(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 4), dtype=np.uint8)
    whole = save(tmp_path / "whole.png", pixels).read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "zero.png").touch()
    save(tmp_path / "wide.png", pixels[:24])
    save(tmp_path / "deep.png", np.zeros((8, 8), np.uint16))
    save(tmp_path / "opaque.png", pixels[..., :3])
    reasons = {
        "cut": "cannot be read as an image (OSError: ",
        "zero": "the file is empty (0 bytes)",
        "absent": "no such file",
        "wide": "is 32x24 px, but views must be square",
        "deep": "has pixels of mode I;16, but must be of 8 bits per channel",
        "opaque": "has no transparency, and no mask file tells the object from the background",
    }
    for name, reason in reasons.items():
        with pytest.raises(MediaError) as caught:
            read_image(tmp_path / f"{name}.png", needs_alpha=True)
        assert caught.value.reason.startswith(reason)


def test_a_mask_is_whatever_the_resampler_touches():
    mask = np.zeros((8, 8), np.uint8)
    mask[2:4, 4] = 1  # the least there is
    assert prepare_mask(Image.fromarray(mask), (8, 8))[..., 0].tolist() == mask.tolist()


def test_a_mask_replaces_an_images_own_transparency():
    pixels = np.full((8, 8, 4), 255, np.uint8)
    pixels[..., :3], pixels[:, :2, 3], pixels[:, 2:4, 3] = (200, 100, 0), 0, 51
    mask = np.ones((8, 8, 1), np.float32)
    mask[:, 6:] = 0
    image, rest = Image.fromarray(pixels), ((8, 8), (1.0, 1.0, 1.0))
    half_seen = 0.2 * 200 / 255 + 0.8
    for given, expected in (
        (mask, [200 / 255] * 6 + [1, 1]),
        (None, [1, 1, half_seen, half_seen] + [200 / 255] * 4),
    ):
        np.testing.assert_allclose(prepare_colour(image, *rest, given)[0, :, 0], expected, atol=1e-6)
    normals = prepare_normals(image, *rest, np.eye(3), mask)
    np.testing.assert_allclose(normals[0, :, 0], [200 / 255] * 6 + [1, 1], atol=1e-12)
    with pytest.raises(ValueError, match="^an image without transparency needs a mask$"):
        prepare_colour(Image.new("RGB", (8, 8)), (8, 8), (1.0, 1.0, 1.0))


def test_recentring():
    pixels = np.zeros((20, 30, 4), np.uint8)
    pixels[5:10, 8:18] = (10, 200, 30, 255)  # 10 x 5 px
    centred = np.asarray(recentre(Image.fromarray(pixels), 20, 32))
    rows, columns = np.nonzero(centred[..., 3])
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (11, 20, 6, 25)
    assert (centred[11:21, 6:26] == (10, 200, 30, 255)).all()
    assert (on_background(Image.fromarray(centred), (1, 0.5, 0))[0, 0] == (1, 0.5, 0)).all()
    upstream = np.asarray(recentre(Image.fromarray(pixels), 20, 32, exclusive_bound=True))
    assert (upstream[..., 3] > 0).sum() == 20 * int(20 / 9 * 4)
    framed = np.asarray(recentre(Image.fromarray(pixels), -1, 30))
    assert (framed[5:25] == pixels).all() and not framed[:5].any()
    assert np.asarray(recentre(Image.new("RGB", (4, 8), "red"), 8, 8))[:, 2:6, 0].all()  # opaque: all is object
    large = np.asarray(recentre(Image.fromarray(pixels), 20, 16))  # 20 x 10 px, of which the square shows 16
    assert (large[3:13] == (10, 200, 30, 255)).all() and not large[:3].any() and not large[13:].any()
    dot = np.zeros((4, 4, 4), np.uint8)
    dot[1, 1] = 255
    assert recentre(Image.fromarray(dot), 8, 16, exclusive_bound=True).size == (16, 16)


def test_what_cannot_be_recentred():
    image = Image.new("RGBA", (4, 4))
    with pytest.raises(ValueError, match="^the photograph is transparent everywhere: there is no object to centre$"):
        recentre(image, 8, 16)
    for crop_size in (0, -2):
        message = f"^crop_size is {crop_size}, but must be -1 or at least 1$"
        with pytest.raises(ValueError, match=message):
            recentre(image, crop_size, 16)


@pytest.mark.parametrize("size_wh", [(256, 256), (300, 200), (65, 91), (224, 224)])
def test_clip_transform_is_that_of_transformers(size_wh):
    pixels = np.random.default_rng(0).integers(0, 256, (size_wh[1], size_wh[0], 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    small = {"size": {"shortest_edge": 32}, "crop_size": {"height": 28, "width": 28}, "image_mean": [0.1, 0.2, 0.3]}
    for processor in (CLIPImageProcessorPil(), CLIPImageProcessorPil(**small)):
        expected = processor(image, return_tensors="np")["pixel_values"][0]
        actual = ClipTransform.of(processor)(image)
        assert actual.dtype == np.float32
        np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-6)
    assert ClipTransform.of(CLIPImageProcessor()) == ClipTransform()


def test_a_clip_processor_of_another_kind_is_refused():
    processor = CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 32, "width": 32})
    with pytest.raises(ValueError, match="it must have a shortest_edge that is at least the crop"):
        ClipTransform.of(processor)


def test_vae_pixels_cut_the_centre():
    pixels = np.zeros((4, 10, 3), np.uint8)
    pixels[:, 3:7] = 255
    assert (vae_pixels(Image.fromarray(pixels), 4) == 1).all()


# Objects


def uids_of(objects) -> list[str]:
    return [found.uid for found in objects]


def test_both_layouts_are_found_in_one_folder(tmp_path):
    write_object(tmp_path, "bbb2", SIX, UPRIGHT, tag=3, masks=True)
    write_object(tmp_path, "aaa1", SIX, UPRIGHT, tag=2, suffix="webp")
    (tmp_path / ".cache" / ".cached").mkdir(parents=True)
    (tmp_path / "zzz" / "other").mkdir(parents=True)
    (tmp_path / "notes.txt").touch()
    first, second = find_objects(tmp_path).train
    assert (first.uid, first.folder, first.suffix, first.has_masks) == ("aaa1", tmp_path / "aa/aaa1", "webp", False)
    assert (second.uid, second.folder, second.suffix, second.has_masks) == ("bbb2", tmp_path / "bbb/bbb2", "png", True)
    assert first.files(["left"]) == [first.folder / "rgb_000_left.webp", first.folder / "normals_000_left.webp"]
    names = ["rgb_000_left.png", "normals_000_left.png", "mask_000_left.png", "000_left_RT.txt"]
    assert second.files(["left"], with_poses=True) == [second.folder / name for name in names]
    assert uids_of(find_objects(tmp_path, Layout(subscene_tag=3)).train) == ["bbb2"]
    assert find_objects(tmp_path, Layout(3, read_mask=False)).train[0].has_masks is False
    with pytest.raises(ValueError, match="1 of 1 objects lack files") as caught:
        find_objects(tmp_path, Layout(3, "webp"))
    assert "12 missing, the first is " in str(caught.value)  # no masks: there are none of that suffix
    assert "(set data.num_views and data.views to what is rendered, or render these views)" in str(caught.value)


def test_objects_may_lie_in_the_folder_itself(tmp_path):
    write_object(tmp_path, "chair", SIX, UPRIGHT, tag=0)
    assert uids_of(find_objects(tmp_path, Layout(subscene_tag=0)).train) == ["chair"]


@pytest.fixture(scope="module")
def five(tmp_path_factory) -> Path:
    """Objects aaa0 ... aaa4 in one view."""
    root = tmp_path_factory.mktemp("five")
    for number in range(5):
        write_object(root, f"aaa{number}", ["front"], UPRIGHT[:1], size_px=8)
    return root


def test_lists_and_splits(five, tmp_path):
    listed = tmp_path / "objects.json"
    listed.write_text(json.dumps(["aaa3", "some/where/aaa1.glb", "aaa0", "aaa1", "aaa4.glb"]))
    (tmp_path / "invalid.json").write_text('["aaa3", "not_there"]')
    (tmp_path / "allow-list.txt").write_text("aaa4\naaa2\n")

    def found(**options) -> tuple[list[str], list[str]]:
        objects = find_objects(five, views=["front"], **options)
        return uids_of(objects.train), uids_of(objects.validation)

    every = [f"aaa{number}" for number in range(5)]
    assert found() == (every, [])
    assert found(num_validation_samples=2) == (every[:3], every[3:])
    assert found(num_validation_samples=2, num_samples=1) == (every[:1], every[3:])
    assert found(num_samples=99) == (every, [])
    assert found(object_list=listed) == (["aaa0", "aaa1", "aaa3", "aaa4"], [])
    assert found(object_list=listed, invalid_list=tmp_path / "invalid.json") == (["aaa0", "aaa1", "aaa4"], [])
    assert found(object_list=tmp_path / "allow-list.txt", num_validation_samples=1) == (["aaa2"], ["aaa4"])


def test_wrong_numbers_and_folders(five, tmp_path):
    for options, message in {
        ("num_validation_samples", -1): "data.num_validation_samples is -1, but must be at least 0",
        ("num_samples", 0): "data.max_train_samples is 0, but must be at least 1, or unset for all objects",
        ("num_validation_samples", 5): (
            f"{five}:\n  - there are 5 objects, but the last 5 are held out for validation "
            "(data.num_validation_samples), which leaves none to train on"
        ),
    }.items():
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            find_objects(five, views=["front"], **dict([options]))
    with pytest.raises(FileNotFoundError, match=r"is not a folder; set data.train_data_dir to where the renders are$"):
        find_objects(tmp_path / "absent")
    with pytest.raises(ValueError, match="holds no rendered objects; their folders must be named "):
        find_objects(tmp_path)
    with pytest.raises(ValueError, match=r"<first 3 letters of uid>/<uid> or <first 2 letters of uid>/<uid>, as "):
        find_objects(tmp_path)


def test_wrong_lists(tmp_path):
    path = tmp_path / "list.json"
    with pytest.raises(FileNotFoundError, match=rf"^data.object_list is {path} \(from .+\), which is not a file$"):
        read_uids(path, "data.object_list")
    for text, message in {
        '["a",': "which cannot be read (",
        '{"a": 1}': "which holds a dict, expected an array of uids",
        '["a", 3, "..", "x/.glb"]': "in which 3 of 4 entries are no uid and no path, the first: 3, '..', 'x/.glb'",
    }.items():
        path.write_text(text)
        with pytest.raises(ValueError, match=f"^{re.escape(f'data.object_list is {path}, {message}')}"):
            read_uids(path, "data.object_list")


def test_incomplete_objects_are_named_together(five, tmp_path):
    root = tmp_path / "renders"
    shutil.copytree(five, root)
    for number in (1, 3):
        (root / f"aa/aaa{number}/normals_000_front.png").unlink()
    (tmp_path / "list.json").write_text(json.dumps([f"aaa{number}" for number in range(9)]))
    message = (
        f"{root}:\n"
        "  - 6 of 9 objects lack files (name them in data.invalid_list, or take as data.object_list the allow-list of "
        "scripts/doctor.py):\n"
        f"      aaa1: 1 missing, the first is {root}/aa/aaa1/normals_000_front.png\n"
        f"      aaa3: 1 missing, the first is {root}/aa/aaa3/normals_000_front.png\n"
        f"      aaa5: 2 missing, the first is {root}/aaa/aaa5/rgb_000_front.png\n"
        f"      aaa6: 2 missing, the first is {root}/aaa/aaa6/rgb_000_front.png\n"
        f"      aaa7: 2 missing, the first is {root}/aaa/aaa7/rgb_000_front.png\n"
        "      ... and 1 more like these"
    )
    with pytest.raises(ValueError) as caught:
        find_objects(root, views=["front"], object_list=tmp_path / "list.json")
    assert str(caught.value) == message
    with pytest.raises(ValueError, match="aaa0: 1 missing, the first is .+/000_front_RT.txt"):
        find_objects(five, views=["front"], rendered_poses=True)


def test_a_mask_of_some_views_only_is_a_missing_file(tmp_path):
    found = write_object(tmp_path, "abc", SIX, UPRIGHT, tag=3, masks=True)
    found.image("mask", "left").unlink()
    with pytest.raises(ValueError, match="abc: 1 missing, the first is .+/mask_000_left.png"):
        find_objects(tmp_path)


# Items


@pytest.fixture(scope="module")
def renders(tmp_path_factory) -> Path:
    """One object in both layouts, without and with mask files."""
    root = tmp_path_factory.mktemp("renders")
    write_object(root, "aaa0", SIX, UPRIGHT)
    write_object(root, "aab1", SIX, UPRIGHT, tag=3, masks=True)
    return root


def test_item_keys_shapes_and_ranges(renders):
    dataset = dataset_of(renders)
    item = dataset.sample(0, np.random.default_rng(0))
    assert {key: value.shape for key, value in item.items()} == SHAPES
    for key, value in item.items():
        assert value.dtype == (np.uint8 if key in RAW else np.float32), key
    for key in RAW:
        scaled = item[f"{key}_vae"] if f"{key}_vae" in item else item["normal_target_vae"]
        assert np.abs(scaled).max() <= 1 + 1e-6
        np.testing.assert_allclose(item[key] / 127.5 - 1, scaled, atol=1 / 255 + 1e-6)
    assert (item["image_cond"] == item["image_target"][0]).all()
    np.testing.assert_array_equal(
        item["image_cond_CLIP"], ClipTransform()(Image.fromarray(item["image_cond"].transpose(1, 2, 0)))
    )
    labels = class_labels(UPRIGHT, 0)
    assert (item["camera_embed_image"] == labels["colour"]).all()
    assert (item["camera_embed_normal"] == labels["normal"]).all()
    for key, value in dataset.camera(0, Variant()).items():
        assert (value == item[key]).all()


def test_both_layouts_give_the_same_item(renders):
    dataset = dataset_of(renders)
    items = [dataset.item(index, Variant((0.2, 0.4, 0.6))) for index in range(2)]
    for key in SHAPES:
        np.testing.assert_allclose(items[0][key], items[1][key], atol=1e-6)


@pytest.mark.parametrize("poses", ["tilted", "upright"])
@pytest.mark.parametrize("condition", ["front", "left"])
def test_colours_masks_and_normals_are_those_of_the_sphere(poses, condition, tmp_path):
    matrices, sphere = fixed_poses(SIX, poses), Sphere()
    write_object(tmp_path, "abc", SIX, matrices, sphere)
    item = dataset_of(tmp_path, poses=poses, background="black", condition_view=condition).sample(
        0, np.random.default_rng(0)
    )
    to_condition = matrices[SIX.index(condition), :, :3]
    for row, pose in enumerate(matrices):
        colour, _, mask = sphere.render(pose, 32)
        assert (item["image_target"][row].transpose(1, 2, 0) == colour).all()
        normals, is_hit = sphere.normals(pose, 32)
        expected = (normals @ to_condition.T) * is_hit[..., None]
        actual = item["normal_target_vae"][row].transpose(1, 2, 0)
        np.testing.assert_allclose(actual[is_hit], expected[is_hit], atol=0.02)
        assert (actual[~is_hit] == -1).all()
    assert (item["image_cond"] == item["image_target"][SIX.index(condition)]).all()


def test_images_are_resized_to_the_resolution(renders):
    small = dataset_of(renders, resolution_px=16).item(0, Variant())
    assert small["image_target"].shape == (6, 3, 16, 16) and small["image_cond_CLIP"].shape == (3, 224, 224)


@pytest.mark.parametrize(
    ("background", "colours"),
    [
        ("white", [(1.0,) * 3]),
        ("black", [(0.0,) * 3]),
        ("gray", [(0.5,) * 3]),
        (0.25, [(0.25,) * 3]),
        (1, [(1.0,) * 3]),
        ("three_choices", [(1.0,) * 3, (0.0,) * 3, (0.5,) * 3]),
    ],
)
def test_backgrounds(renders, background, colours):
    dataset = dataset_of(renders, background=background)
    assert dataset.variants() == [Variant(colour) for colour in colours]
    rng = np.random.default_rng(0)
    assert {dataset.variant(rng) for _ in range(50)} == set(dataset.variants())
    for variant in dataset.variants():
        item = dataset.item(1, variant)
        for key in ("image_cond_vae", "image_target_vae", "normal_target_vae"):
            corner = item[key].reshape(-1, 3, 32, 32)[..., 0, 0]
            np.testing.assert_allclose(corner, np.broadcast_to(2 * np.array(variant.background) - 1, corner.shape))


def test_a_random_background_is_one_draw_per_item(renders):
    dataset = dataset_of(renders, background="random")
    item = dataset.sample(0, np.random.default_rng(3))
    expected = np.random.default_rng(3).random(3)
    corners = np.concatenate([item[key][..., 0, 0].reshape(-1, 3) for key in ("image_target_vae", "normal_target_vae")])
    np.testing.assert_allclose(corners, np.broadcast_to(2 * expected - 1, (12, 3)), atol=1e-6)
    again = dataset.sample(0, np.random.default_rng(3))
    assert all((item[key] == again[key]).all() for key in SHAPES)
    with pytest.raises(ValueError, match="its variants cannot be listed; choose 'three_choices' or one colour$"):
        dataset.variants()


def test_condition_views_are_drawn_with_augment_data(renders):
    dataset = dataset_of(renders, augment_data=True)
    assert [variant.condition_view for variant in dataset.variants()] == list(range(6))
    rng = np.random.default_rng(0)
    assert {dataset.variant(rng) for _ in range(100)} == set(dataset.variants())
    item = dataset.item(0, Variant(condition_view=4))
    assert (item["image_cond"] == item["image_target"][4]).all()
    assert (item["camera_embed_image"] == class_labels(UPRIGHT, 4)["colour"]).all()


# Flips


@pytest.mark.parametrize(
    ("views", "condition", "poses"),
    [
        (SIX, "front", "upright"),
        (SIX, "front", "tilted"),
        (SIX, "back", "upright"),
        (VIEW_LISTS[8], "front_right", "tilted"),
        (("front", "top"), "front", "upright"),
        (("front", "back"), "front", "tilted"),
        (("left", "right", "front"), "front", "rendered"),
    ],
)
def test_a_flipped_object_is_the_mirrored_object(views, condition, poses, tmp_path):
    matrices = fixed_poses(views, "upright" if poses == "rendered" else poses)
    if poses == "rendered":
        matrices[:, :, :3] = matrices[:, :, :3] @ rotation(25, 2) @ rotation(15, 0)
    sphere = Sphere()
    options = {"pose_files": poses == "rendered"}
    write_object(tmp_path, "aaa0", views, matrices, sphere, **options)
    write_object(tmp_path, "aaa1", views, matrices, sphere.mirrored(matrices[views.index(condition)]), **options)
    dataset = dataset_of(
        tmp_path, views, poses == "rendered", poses=poses, condition_view=condition, random_flip=True
    )  # fmt: skip
    plain, flipped = dataset.variants()
    assert (plain.flipped, flipped.flipped) == (False, True)
    actual, expected, other = dataset.item(0, flipped), dataset.item(1, plain), dataset.item(0, plain)
    for key in ("image_target", "normal_target", "image_cond"):
        difference = np.abs(actual[key].astype(int) - expected[key])
        assert difference.max() <= 2 and (np.abs(other[key].astype(int) - expected[key]) > 2).mean() > 0.05, key
    for key in ("camera_embed_image", "camera_embed_normal"):
        assert (actual[key] == expected[key]).all()
    np.testing.assert_allclose(actual["image_cond_vae"], expected["image_cond_vae"], atol=0.01)


def test_half_of_the_samples_are_flipped(renders):
    dataset = dataset_of(renders, random_flip=True)
    rng = np.random.default_rng(0)
    assert 70 < sum(dataset.variant(rng).flipped for _ in range(200)) < 130


def test_only_condition_views_on_a_mirror_axis_are_flipped(renders, tmp_path):
    dataset = dataset_of(renders, random_flip=True, augment_data=True)
    assert [dataset.views[view] for view in sorted(dataset.flippable)] == ["front", "back"]
    assert len(dataset.variants()) == 8
    rng = np.random.default_rng(0)
    assert {dataset.variant(rng) for _ in range(200)} == set(dataset.variants())
    with pytest.raises(ValueError, match="no view among .+ is the mirror view of 'front_right' for .+ view 'right'"):
        dataset_of(renders, random_flip=True, condition_view="right")
    write_object(tmp_path, "abc", ("front", "right"), UPRIGHT[[0, 2]])
    with pytest.raises(ValueError, match="no view among front, right is the mirror view of 'right' for the condition"):
        dataset_of(tmp_path, ("front", "right"), random_flip=True)


# Poses of the objects themselves, held-out objects, identity


def test_rendered_poses(tmp_path):
    for uid, yaw_deg in (("aaa0", 0), ("aaa1", 40)):
        poses = UPRIGHT.copy()
        poses[:, :, :3] = UPRIGHT[:, :, :3] @ rotation(yaw_deg, 2) @ rotation(yaw_deg / 2, 0)
        write_object(tmp_path, uid, SIX, poses, pose_files=True)
    dataset = dataset_of(tmp_path, rendered_poses=True)
    for index in range(2):
        own = np.stack([read_pose(dataset.objects[index].pose(view)) for view in SIX])
        item = dataset.item(index, Variant())
        assert (item["camera_embed_image"] == class_labels(own, 0)["colour"]).all()
        assert (item["camera_embed_image"] == dataset.camera(index, Variant())["camera_embed_image"]).all()
    np.testing.assert_allclose(
        dataset.camera(0, Variant())["camera_embed_image"], class_labels(UPRIGHT, 0)["colour"], atol=1e-6
    )
    assert np.abs(class_labels(UPRIGHT, 0)["colour"] - dataset.camera(1, Variant())["camera_embed_image"]).max() > 0.1
    assert dataset.files_of(0)[-1] == tmp_path / "aa/aaa0/000_front_left_RT.txt"
    dataset.objects[1].pose("left").write_text("1 2 3")
    with pytest.raises(MediaError, match="000_left_RT.txt"):
        dataset.item(1, Variant())


def test_held_out_objects_are_seen_in_one_way(renders):
    dataset = dataset_of(renders, background="random", augment_data=True, random_flip=True)
    held_out = dataset.held_out(dataset.objects[1:])
    assert held_out.variants() == [Variant((1.0, 1.0, 1.0), 0, False)]
    assert (len(held_out), held_out.views, held_out.resolution_px, held_out.poses) == (1, SIX, 32, "upright")
    assert dataset.held_out(dataset.objects, background=0.5).variants() == [Variant((0.5, 0.5, 0.5))]


def test_clip_input_resized_as_a_tensor(renders):
    plain, tensor = dataset_of(renders), dataset_of(renders, clip=ClipTransform(resize="tensor"))
    variant = Variant()
    ours, theirs = (each.item(0, variant) for each in (plain, tensor))
    pixels = torch.from_numpy(ours["image_cond_vae"]) / 2 + 0.5
    resized = torch.nn.functional.interpolate(pixels[None], (224, 224), mode="bicubic", align_corners=False)[0]
    mean, std = (np.array(values)[:, None, None] for values in (ClipTransform.mean, ClipTransform.std))
    np.testing.assert_allclose(theirs["image_cond_CLIP"], (resized.numpy() - mean) / std, atol=1e-5)
    assert theirs["image_cond_CLIP"].dtype == np.float32 and theirs["image_cond_CLIP"].shape == (3, 224, 224)
    difference = np.abs(theirs["image_cond_CLIP"] - ours["image_cond_CLIP"])
    assert difference.max() > 0.1 and difference.mean() < 0.02  # overshoots at edges
    assert all((theirs[key] == ours[key]).all() for key in SHAPES if key != "image_cond_CLIP")
    assert tensor.held_out(tensor.objects).clip == plain.clip
    assert tensor.fingerprint() == plain.fingerprint() | {"clip_resize": "tensor"}


def test_training_reads_no_raw_images(renders):
    dataset = dataset_of(renders)
    light = WithoutRawImages(dataset)
    whole, sample = (each.sample(0, np.random.default_rng(0)) for each in (dataset, light))
    assert sample.keys() == whole.keys() - set(RAW)
    assert all((sample[key] == whole[key]).all() for key in sample)
    assert (len(light), light.files_of(1)) == (len(dataset), dataset.files_of(1))


def test_fingerprint_follows_names_and_settings_not_the_place(renders, tmp_path):
    shutil.copytree(renders, tmp_path / "moved")
    original = dataset_of(renders).fingerprint()
    assert dataset_of(tmp_path / "moved").fingerprint() == original == json.loads(json.dumps(original))
    changed = {"poses": "tilted", "resolution_px": 16, "clip": ClipTransform(28, 28)}
    for name, value in changed.items():
        assert dataset_of(renders, **{name: value}).fingerprint() != original, name
    assert dataset_of(renders).held_out(dataset_of(renders).objects[:1]).fingerprint() != original


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"condition_view": "top"}, "the condition view 'top' is not among the views front, front_right, right"),
        ({"resolution_px": 0}, "data.resolution is 0, but must be at least 1"),
        ({"poses": "flat"}, "poses is 'flat', but must be one of tilted, upright, rendered"),
        ({"label_width": 12}, "the width of the class labels is 12, but must be one of (6, 10, 14)"),
        ({"background": 1.5}, "the background is 1.5, but must be one of 'white', 'black', 'gray', 'three_choices'"),
        ({"background": "pink"}, "the background is 'pink', but must be one of 'white', "),
    ],
)
def test_wrong_settings(renders, options, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        dataset_of(renders, **options)


def test_no_objects():
    with pytest.raises(ValueError, match="^a data set needs at least one object$"):
        MultiViewDataset([])


# Broken files


def test_what_breaks_after_the_start_is_a_bad_sample(tmp_path):
    found = write_object(tmp_path, "abc", SIX, UPRIGHT, tag=3, masks=True)
    dataset = dataset_of(tmp_path)
    colour = found.image("rgb", "back")
    whole = colour.read_bytes()

    def reason_of() -> tuple[str, str]:
        with pytest.raises(MediaError) as caught:
            dataset.sample(0, np.random.default_rng(0))
        return Path(caught.value.path).name, caught.value.reason

    colour.write_bytes(whole[: len(whole) // 2])
    name, reason = reason_of()
    assert name == "rgb_000_back.png" and reason.startswith("cannot be read as an image (")
    colour.write_bytes(b"")
    assert reason_of() == ("rgb_000_back.png", "the file is empty (0 bytes)")
    save(colour, np.zeros((32, 24, 3), np.uint8))
    assert reason_of() == ("rgb_000_back.png", "is 24x32 px, but views must be square")
    colour.unlink()
    assert reason_of() == ("rgb_000_back.png", "no such file")
    found.image("mask", "front").unlink()
    assert reason_of() == ("mask_000_front.png", "no such file")


def test_images_without_alpha_and_mask(tmp_path):
    found = write_object(tmp_path, "abc", SIX, UPRIGHT, tag=3, masks=True)
    for view in SIX:
        found.image("mask", view).unlink()
    with pytest.raises(MediaError, match="rgb_000_front.png.+no transparency, and no mask file tells the object"):
        dataset_of(tmp_path).item(0, Variant())


def test_the_loader_replaces_broken_objects(tmp_path):
    for number in range(4):
        write_object(tmp_path, f"aaa{number}", SIX, UPRIGHT, size_px=8)
    dataset = dataset_of(tmp_path, resolution_px=8)
    dataset.objects[2].image("normals", "right").write_bytes(b"")
    bad_samples = tmp_path / "bad.jsonl"
    loader = SampleLoader(
        dataset, SamplePlan(4, 0, 4), micro_batch=4, rank=0, world_size=1, num_workers=0,
        bad_samples_path=bad_samples, max_bad_fraction=1.0,
    )  # fmt: skip
    (batch,) = loader.batches(0, 1)
    assert {key: tuple(batch[key].shape) for key in ("image_cond", "camera_embed_image")} == {
        "image_cond": (4, 3, 8, 8),
        "camera_embed_image": (4, 6, 10),
    }
    assert 2 not in batch["item"].tolist()
    record = json.loads(bad_samples.read_text())
    assert record["item"] == 2 and "normals_000_right.png" in record["reason"] and len(record["files"]) == 12


# Noise instead of data


def test_random_views():
    dataset = RandomViews(resolution_px=32)
    assert len(dataset) == 300 and dataset.variants() == [Variant()] and dataset.files_of(0) == []
    item = dataset.sample(7, np.random.default_rng(0))
    assert {key: value.shape for key, value in item.items()} == SHAPES
    assert item["image_target"].dtype == np.uint8 and item["image_target"].max() == 254 and not item["image_cond"].all()
    np.testing.assert_allclose(item["normal_target_vae"], item["normal_target"] / 127.5 - 1, atol=1e-6)
    assert {value.dtype for key, value in item.items() if key not in RAW} == {np.dtype(np.float32)}
    again = RandomViews(resolution_px=32).item(7, dataset.variant(np.random.default_rng(1)))
    assert all((item[key] == again[key]).all() for key in SHAPES)
    assert (dataset.item(8, Variant())["image_cond"] != item["image_cond"]).any()
    assert (dataset.camera(7, Variant())["camera_embed_normal"] == item["camera_embed_normal"]).all()
    assert RandomViews(2, 8, 6).camera(0, Variant())["camera_embed_image"].shape == (2, 6)
    assert RandomViews(2).fingerprint() != RandomViews(3).fingerprint()
