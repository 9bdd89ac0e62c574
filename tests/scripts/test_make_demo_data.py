import json
import re
import sys
from pathlib import Path

import make_demo_data
import numpy as np
import pytest
from PIL import Image

from common.video import probe_video, read_frames
from diffnext.media import SourceConfig, read_items
from training_ggi.data import SceneDataset, read_scenes

pytest.importorskip("skimage", reason="the photographs come with scikit-image")

KINDS = ("render", "gt", "cond")


@pytest.fixture(scope="module")
def json_path(tmp_path_factory) -> Path:
    return make_demo_data.make_refiner_data(tmp_path_factory.mktemp("data"), items=24, wide=True)


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path), dtype=np.int16)


def test_lists_are_parallel_and_files_exist(json_path):
    lists = json.loads(json_path.read_text())
    assert list(lists) == list(KINDS)
    assert json_path.name == "example_kitti.json"
    for kind in KINDS:
        assert lists[kind] == [f"{kind}/{index:04d}.png" for index in range(24)]
        assert all((json_path.parent / path).is_file() for path in lists[kind])


def test_images_of_an_item_are_rgb_of_one_size(json_path):
    wide = []
    for index in range(24):
        images = [Image.open(json_path.parent / kind / f"{index:04d}.png") for kind in KINDS]
        assert {image.mode for image in images} == {"RGB"}
        assert len({image.size for image in images}) == 1
        if images[0].size != (320, 240):
            assert images[0].size == (704, 188)
            wide.append(index)
    assert wide == [0, 12]


def test_render_and_cond_differ_from_gt_but_show_the_same(json_path):
    for index in range(24):
        render, gt, cond = (pixels(json_path.parent / kind / f"{index:04d}.png") for kind in KINDS)
        assert 2 < np.abs(render - gt).mean() < 40, index
        assert np.abs(cond - gt).mean() > 2, index


def test_same_arguments_give_the_same_pixels(json_path, tmp_path):
    again = make_demo_data.make_refiner_data(tmp_path / "same", items=24, wide=True)
    other = make_demo_data.make_refiner_data(tmp_path / "other", items=4, seed=1)
    for index in range(24):
        for kind in KINDS:
            path = f"{kind}/{index:04d}.png"
            expected = pixels(json_path.parent / path)
            assert np.array_equal(pixels(again.parent / path), expected)
            if index in (1, 2):
                assert not np.array_equal(pixels(other.parent / path), expected)


def test_held_out_items_come_from_other_places(tmp_path, monkeypatch):
    used = []
    monkeypatch.setattr(
        make_demo_data, "_cut", lambda image, box, size_px: used.append(box) or Image.new("RGB", size_px)
    )
    names = []
    read_photograph = make_demo_data.read_photograph
    monkeypatch.setattr(make_demo_data, "read_photograph", lambda name: names.append(name) or read_photograph(name))
    monkeypatch.setattr(make_demo_data, "degrade", lambda image, rng: image)
    make_demo_data.make_refiner_data(tmp_path, items=48)

    stereo = [index for index in range(48) if index % 3 != 2]
    training_boxes = [used[2 * index + view] for index in stereo if index < 38 for view in (0, 1)]
    held_out_boxes = [used[2 * index + view] for index in stereo if index >= 38 for view in (0, 1)]
    assert len(held_out_boxes) == 12
    assert max(box[2] for box in training_boxes) + 60 <= min(box[0] for box in held_out_boxes)

    singles = [name for name in names if name not in make_demo_data.STEREO_PAIR]
    assert singles[-4:] == ["coffee.png"] * 4
    assert "coffee.png" not in singles[:-4] and len(singles) == 16


def test_windows_lie_inside_the_photographs(tmp_path, monkeypatch):
    def checked_cut(image, box, size_px):
        assert min(box[:2]) > -1e-6 and box[2] < image.width + 1e-6 and box[3] < image.height + 1e-6
        assert (box[2] - box[0]) / (box[3] - box[1]) == pytest.approx(size_px[0] / size_px[1])
        return Image.new("RGB", size_px)

    monkeypatch.setattr(make_demo_data, "_cut", checked_cut)
    monkeypatch.setattr(make_demo_data, "degrade", lambda image, rng: image)
    make_demo_data.make_refiner_data(tmp_path, items=60, seed=3, wide=True)


def test_two_items_are_the_least(tmp_path):
    make_demo_data.make_refiner_data(tmp_path, items=2)
    with pytest.raises(ValueError, match="items is 1; at least 2 are needed, one to train on and one to hold out"):
        make_demo_data.make_refiner_data(tmp_path, items=1)


def test_missing_package_and_photograph_are_named(monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"unicorn\.png does not exist: scikit-image .* comes without"):
        make_demo_data.read_photograph("unicorn.png")
    monkeypatch.setitem(sys.modules, "skimage", None)
    with pytest.raises(ModuleNotFoundError, match=r"scikit-image: pip install -e '\.\[demo\]'"):
        make_demo_data.read_photograph("coffee.png")


def test_command_line_writes_the_named_trainers(tmp_path, capsys):
    make_demo_data.main(["--output", str(tmp_path), "--only", "gaussian_refiner", "--items", "3"])
    assert capsys.readouterr().out == f"{tmp_path / 'gaussian_refiner' / 'example_kitti.json'}\n"
    assert len(json.loads((tmp_path / "gaussian_refiner" / "example_kitti.json").read_text())["gt"]) == 3


# vae ------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def vae_folder(tmp_path_factory) -> Path:
    videos = make_demo_data.make_vae_data(tmp_path_factory.mktemp("data") / "vae")
    assert videos.name == "videos"
    return videos.parent


def clips_in(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize(
    ("folder", "clips"), [("videos", make_demo_data.TRAINING_CLIPS), ("test_video", make_demo_data.TEST_CLIPS)]
)
def test_clips_are_as_announced_and_their_motion_is_smooth(vae_folder, folder, clips):
    assert clips_in(vae_folder / folder) == sorted(row[0] for row in clips)
    for name, _, _, size_px, num_frames, fps in clips:
        info = probe_video(vae_folder / folder / name)
        assert ((info.width_px, info.height_px), info.num_frames) == (size_px, num_frames), name
        assert info.fps == pytest.approx(float(fps)) and 40 <= num_frames <= 60, name
        frames = read_frames(vae_folder / folder / name, range(num_frames)).astype(np.int16)  # (T, H, W, 3)
        assert frames.std() > 10, name
        steps = np.abs(np.diff(frames, axis=0)).mean((1, 2, 3))  # (T - 1,)
        assert np.abs(frames[0] - frames[-1]).mean() > 10, name
        assert np.abs(np.diff(steps)).max() < 0.5 * steps.max(), name  # no cut


def test_test_clips_show_other_photographs():
    training, test = ({row[1] for row in clips} for clips in (make_demo_data.TRAINING_CLIPS, make_demo_data.TEST_CLIPS))
    assert not training & test
    assert len({Path(row[0]).name for row in make_demo_data.TEST_CLIPS}) == len(make_demo_data.TEST_CLIPS)


def test_views_of_the_camera_lie_inside_the_photographs(monkeypatch, tmp_path):
    def checked_window(image, centre, scale, angle, size_px):
        half = scale / 2 * np.array(size_px)
        turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
        corners = centre + np.array([(x, y) for x in (-1, 1) for y in (-1, 1)]) * half @ turn.T
        assert corners.min() > -1e-6 and (corners < np.array(image.size) + 1e-6).all()
        return np.zeros((size_px[1], size_px[0], 3), np.uint8)

    monkeypatch.setattr(make_demo_data, "_window", checked_window)
    monkeypatch.setattr(make_demo_data, "write_video", lambda *arguments, **options: None)
    monkeypatch.setattr(make_demo_data, "_view_between", lambda left, disparity, place: left)
    for seed in range(3):
        make_demo_data.make_vae_data(tmp_path, seed)


def test_the_stereo_pairs_other_view_is_reproduced():
    left, right = (make_demo_data.read_photograph(name).reduce(2) for name in make_demo_data.STEREO_PAIR)
    disparity = make_demo_data._disparity_px(2)
    assert disparity.shape == (left.height, left.width) and 3 < disparity.min() < disparity.max() < 30
    assert np.array_equal(np.asarray(make_demo_data._view_between(left, disparity, 0.0)), np.asarray(left))
    made = np.asarray(make_demo_data._view_between(left, disparity, 1.0), np.float64)
    shown = slice(0, 330)  # what lies further right is beyond the left view's edge
    errors = [np.square(image - np.asarray(right, np.float64))[:, shown].mean() for image in (left, made)]
    assert errors[1] < errors[0] / 6


def test_same_seed_gives_the_same_clips(vae_folder, monkeypatch, tmp_path):
    monkeypatch.setattr(make_demo_data, "TRAINING_CLIPS", make_demo_data.TRAINING_CLIPS[:3])
    monkeypatch.setattr(make_demo_data, "TEST_CLIPS", make_demo_data.TEST_CLIPS[:3])
    again, other = (make_demo_data.make_vae_data(tmp_path / str(seed), seed).parent for seed in (0, 1))
    for name in clips_in(again):
        frames = [read_frames(folder / name, [0, 15, 39]) for folder in (vae_folder, again, other)]
        assert np.array_equal(frames[0], frames[1]) and not np.array_equal(frames[0], frames[2])


def test_command_line_makes_the_vaes_clips(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(make_demo_data, "TRAINING_CLIPS", ())
    monkeypatch.setattr(make_demo_data, "TEST_CLIPS", make_demo_data.TEST_CLIPS[:1])
    make_demo_data.main(["--output", str(tmp_path), "--only", "vae"])
    assert capsys.readouterr().out == f"{tmp_path / 'vae' / 'videos'}\n"
    assert clips_in(tmp_path) == ["vae/test_video/coffee_pan.mp4"]


# diffnext -------------------------------------------------------------------------------------------------------------


def test_captioned_images_are_a_source_of_the_cache(tmp_path):
    table = make_demo_data.make_nova_image_data(tmp_path / "a")
    items = read_items(SourceConfig(source=str(table)))
    assert len(items) == make_demo_data.NOVA_IMAGES
    assert {Image.open(item.file).size for item in items} == {make_demo_data.NOVA_IMAGE_PX}
    prompts = (tmp_path / "a" / "prompts.txt").read_text().splitlines()
    assert [item.caption for item in items[:6]] == prompts == list(make_demo_data.CAPTIONS.values())
    assert len({prompt[:16] for prompt in prompts}) == 6
    again, other = (make_demo_data.make_nova_image_data(tmp_path / str(seed), seed).parent for seed in (0, 1))
    assert np.array_equal(pixels(again / items[0].path), pixels(items[0].file))
    assert not np.array_equal(pixels(other / items[0].path), pixels(items[0].file))


def test_captioned_clips_are_a_source_of_the_cache(monkeypatch, tmp_path):
    monkeypatch.setattr(make_demo_data, "TRAINING_CLIPS", make_demo_data.TRAINING_CLIPS[:1])
    monkeypatch.setattr(make_demo_data, "TEST_CLIPS", ())
    make_demo_data.main(["--output", str(tmp_path), "--only", "diffnext_t2v"])
    (item,) = read_items(SourceConfig(source=str(tmp_path / "diffnext_t2v" / "clips.jsonl")))
    assert item.caption == "a motorcycle" and probe_video(item.file).num_frames == 60
    assert (tmp_path / "diffnext_t2v" / "prompts.txt").read_text() == "a motorcycle\n"


# mvdiffusion ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def views(tmp_path_factory) -> Path:
    pytest.importorskip("pyvista", reason="views are rendered with pyvista")
    try:
        return make_demo_data.make_mvdiffusion_data(tmp_path_factory.mktemp("data") / "mvdiffusion")
    except RuntimeError as error:
        pytest.skip(str(error))


def test_objects_are_seen_from_six_sides(views):
    uids = json.loads((views / "objects.json").read_text())
    assert len(uids) == make_demo_data.NUM_OBJECTS == 32 and len({uid[4:] for uid in uids}) == 15
    assert {uid[4:] for uid in uids[-8:]} == {uid[4:] for uid in uids[8:16]}  # what is held out occurs in the rest
    for uid in uids:
        colours = []
        for view in make_demo_data.VIEWS:
            paths = [views / uid[:2] / uid / f"{kind}_000_{view}.png" for kind in ("rgb", "normals")]
            rgb, normals = (np.asarray(Image.open(path), dtype=np.float32) for path in paths)  # (64, 64, 4)
            assert rgb.shape == normals.shape == (64, 64, 4)
            alpha = rgb[..., 3]
            assert np.array_equal(alpha, normals[..., 3])
            assert 0.01 < (alpha > 0).mean() < 0.7 and not alpha[0].any() and not alpha[:, 0].any(), (uid, view)
            inside = alpha == 255
            lengths = np.linalg.norm(normals[inside][:, :3] / 127.5 - 1, axis=-1)
            assert np.abs(lengths - 1).max() < 0.02
            colours.append(rgb[inside][:, :3])
        assert np.concatenate(colours).std() > 8, uid  # a texture


def test_same_seed_gives_the_same_meshes(views, tmp_path):
    first, again, other = (
        make_demo_data._textured_body("tower", np.random.default_rng([seed, 15])).export(file_type="glb")
        for seed in (0, 0, 1)
    )
    assert first == again != other
    assert (views.parent / "meshes" / "015_tower.glb").read_bytes() == first


def test_photos_show_one_object_each(tmp_path):
    make_demo_data.make_photos(tmp_path)
    assert sorted(path.stem for path in tmp_path.iterdir()) == ["astronaut", "coin", "cup", "rocket"]
    for path in tmp_path.iterdir():
        image = Image.open(path)
        alpha = np.asarray(image)[..., 3]
        assert image.mode == "RGBA" and 40 < max(image.size) <= 256
        assert 0.4 < (alpha > 127).mean() < 0.95 and alpha.any(0).all() and alpha.any(1).all(), path.stem


def test_missing_renderer_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "pyvista", None)
    monkeypatch.setitem(sys.modules, "pyvista.plotting", None)
    with pytest.raises(
        ModuleNotFoundError, match=r"rendering needs pyvista(\.plotting)?: pip install -e '\.\[render\]'"
    ):
        make_demo_data.make_mvdiffusion_data(tmp_path)


# training_ggi ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ggi_root(tmp_path_factory) -> Path:
    return make_demo_data.make_ggi_data(tmp_path_factory.mktemp("data") / "ggi")


def test_scenes_are_read_by_the_trainer(ggi_root):
    scenes = read_scenes(ggi_root, num_validation_scenes=1)
    everything = [*scenes.train, *scenes.validation]
    assert [len(scene.images()) for scene in everything] == [row[2] for row in make_demo_data.GGI_SCENES]
    assert all(re.fullmatch(r"DL3DV-10K/1K/[0-9a-f]{64}", scene.name) for scene in everything)
    assert scenes.validation[0].prompt == "a cup of coffee" and scenes.train[0].prompt == "a motorcycle"
    sample = SceneDataset(scenes.train, height_px=128, width_px=192).sample(3, np.random.default_rng(0))
    assert sample["frames"].shape == (46, 128, 192, 3) and sample["frames"].std() > 20


@pytest.mark.parametrize("index", range(len(make_demo_data.GGI_SCENES)))
def test_the_flow_leads_from_each_frame_to_the_next(ggi_root, index):
    scene = read_scenes(ggi_root).train[index]
    flow = np.load(ggi_root / "flow" / f"{scene.scene_id}.npy").astype(np.float32)
    frames = [pixels(path).astype(np.float32) for path in scene.images()]
    width, height = make_demo_data.GGI_SIZE_PX
    assert flow.shape == (len(frames) - 1, 2, height, width) and 1 < np.abs(flow).max() < 12
    rows, columns = np.mgrid[:height, :width]
    for number in range(0, len(flow), 6):
        x, y = columns + flow[number, 0], rows + flow[number, 1]
        inside = (x >= 0) & (y >= 0) & (x < width - 1) & (y < height - 1)
        assert inside.mean() > 0.9
        x, y = x.clip(0, width - 1.001), y.clip(0, height - 1.001)
        left, top = x.astype(int), y.astype(int)
        (right_share, lower_share), following = ((x - left)[..., None], (y - top)[..., None]), frames[number + 1]
        upper = following[top, left] * (1 - right_share) + following[top, left + 1] * right_share
        lower = following[top + 1, left] * (1 - right_share) + following[top + 1, left + 1] * right_share
        moved = upper * (1 - lower_share) + lower * lower_share  # (H, W, 3)
        errors = np.abs(moved - frames[number]).mean(2)[inside]
        still = np.abs(following - frames[number]).mean(2)[inside]
        assert np.median(errors) < 4 and (errors.mean() < 0.3 * still.mean() or still.mean() < 8), number


def test_the_same_seed_gives_the_same_scenes(ggi_root, monkeypatch, tmp_path):
    monkeypatch.setattr(make_demo_data, "GGI_SCENES", make_demo_data.GGI_SCENES[:1])
    again, other = (make_demo_data.make_ggi_data(tmp_path / str(seed), seed) for seed in (0, 1))
    path = read_scenes(again).train[0].images()[20].relative_to(again)
    assert np.array_equal(pixels(again / path), pixels(ggi_root / path))
    assert not np.array_equal(pixels(other / path), pixels(ggi_root / path))
    make_demo_data.main(["--output", str(tmp_path), "--only", "training_ggi"])
    assert np.array_equal(pixels(tmp_path / "training_ggi" / path), pixels(ggi_root / path))
