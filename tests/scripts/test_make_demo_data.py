import json
import sys
from pathlib import Path

import make_demo_data
import numpy as np
import pytest
from PIL import Image

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
