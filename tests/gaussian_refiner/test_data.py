"""The refiner's lists, buckets, windows and samples."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from skimage import data

from common.data import collate
from common.video import MediaError
from gaussian_refiner.data import (
    BUCKETS,
    Pair,
    RefinerDataset,
    bucket_batches,
    choose_bucket,
    load_crops,
    normalise,
    read_pairs,
    window_offset,
    window_places,
)

# Lists ----------------------------------------------------------------------------------------------------------------


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def write_json(path: Path, content) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def parallel(count: int) -> dict[str, list[str]]:
    return {key: [f"{key}/{number:04d}.png" for number in range(count)] for key in ("render", "gt", "cond")}


def touch_all(folder: Path, lists: dict[str, list[str]]) -> None:
    touch(folder, *(path for paths in lists.values() for path in paths if path))


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """The working directory, empty."""
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def problems_of(path: Path, **options) -> str:
    with pytest.raises(ValueError) as raised:
        read_pairs(path, **options)
    text = str(raised.value)
    assert text.startswith(str(path))
    return text


def test_parallel_lists_hold_out_the_last_ten(here):
    lists = parallel(13)
    lists["cond"][1] = None
    touch_all(here, lists)
    pairs = read_pairs(write_json(here / "example_kitti.json", lists))
    assert pairs.train == (
        Pair("000000_0000", here / "render/0000.png", here / "gt/0000.png", here / "cond/0000.png"),
        Pair("000001_0001", here / "render/0001.png", here / "gt/0001.png", None),
        Pair("000002_0002", here / "render/0002.png", here / "gt/0002.png", here / "cond/0002.png"),
    )
    assert [pair.render.name for pair in pairs.validation] == [f"{n:04d}.png" for n in range(3, 13)]
    assert len(read_pairs(here / "example_kitti.json", holdout=0).train) == 13


def test_relative_paths_start_here_or_else_beside_the_json(here, tmp_path):
    lists, elsewhere = parallel(2), tmp_path / "set"
    json_path = write_json(elsewhere / "list.json", lists)
    touch_all(elsewhere, lists)
    assert read_pairs(json_path, holdout=1).train[0].render == elsewhere / "render/0000.png"
    touch(here, "render/0000.png")  # one file here does not mix the folders
    assert read_pairs(json_path, holdout=1).train[0].render == elsewhere / "render/0000.png"
    touch_all(here, lists)
    assert read_pairs(json_path, holdout=1).train[0].render == here / "render/0000.png"
    with pytest.raises(ValueError, match=f"6 files are missing .relative paths start at {tmp_path}; data.data_root"):
        read_pairs(json_path, data_root=tmp_path, holdout=1)


def test_absolute_paths_need_no_root(here, tmp_path):
    touch(tmp_path, "a.png", "b.png")
    a, b = str(tmp_path / "a.png"), str(tmp_path / "b.png")
    path = write_json(here / "list.json", {"render": [a, b], "gt": [b, a], "cond": [None, None]})
    assert read_pairs(path, data_root=here, holdout=1).train[0] == Pair("000000_a", Path(a), Path(b))


def test_relative_paths_stay_inside_a_given_root(here, tmp_path):
    touch(tmp_path, "secret.png", "root/in.png")
    lists = {"render": ["in.png", "sub/../../secret.png"], "gt": ["in.png"] * 2, "cond": ["in.png"] * 2}
    path = write_json(tmp_path / "root/list.json", lists)
    text = problems_of(path, data_root=tmp_path / "root", holdout=1)
    assert f"sub/../../secret.png leads out of data.data_root ({tmp_path / 'root'})" in text
    # Without a root, paths are the user's own business.
    lists["render"][1] = "../secret.png"
    write_json(path, lists)
    assert read_pairs(path, holdout=1).validation[0].render.resolve() == tmp_path / "secret.png"


def test_difix_lists_with_a_test_split(here, caplog):
    touch(here, "r.png", "t.png", "c.png")
    item = {"image": "r.png", "target_image": "t.png"}
    splits = {"train": {"a": item | {"ref_image": "c.png", "prompt": "a street"}}, "test": {"b": item, "c": item}}
    pairs = read_pairs(write_json(here / "list.json", splits))
    assert pairs.train == (Pair("a", here / "r.png", here / "t.png", here / "c.png", "a street"),)
    assert pairs.validation == (Pair("b", here / "r.png", here / "t.png"), Pair("c", here / "r.png", here / "t.png"))
    assert caplog.messages == [f"{here}/list.json: prompts (1) are not used, the refiner takes no text"]


def test_difix_lists_without_a_test_split_hold_out_the_last(here):
    touch(here, "r.png")
    items = {name: {"image": "r.png", "target_image": "r.png"} for name in "abcd"}
    for splits in ({"train": items}, {"train": items, "test": {}}):
        pairs = read_pairs(write_json(here / "list.json", splits), holdout=3)
        assert [p.name for p in pairs.train] == ["a"] and [p.name for p in pairs.validation] == ["b", "c", "d"]


def test_too_few_items_for_the_hold_out(here):
    lists = parallel(10)
    touch_all(here, lists)
    text = problems_of(write_json(here / "list.json", lists), holdout=10)
    assert "it lists 10 items, but the last 10 are held out for validation (data.holdout_items)" in text
    assert "set data.holdout_items to at most 9" in text
    assert "it lists 0 items" in problems_of(write_json(here / "list.json", parallel(0)))
    text = problems_of(write_json(here / "list.json", {key: paths[:1] for key, paths in lists.items()}))
    assert "it lists 1 items, but the last 1 are held out" in text and text.endswith("none to train on: add items")
    with pytest.raises(ValueError, match="data.holdout_items is -1, but must be at least 0"):
        read_pairs(here / "list.json", holdout=-1)


@pytest.mark.parametrize(("num_items", "num_train"), [(2, 1), (5, 1), (10, 1), (11, 1), (12, 2)])
def test_of_short_lists_one_item_is_left(here, caplog, num_items, num_train):
    lists = parallel(num_items)
    touch_all(here, lists)
    path = write_json(here / "list.json", lists)
    pairs = read_pairs(path)
    assert [pair.render.name for pair in pairs.train] == [f"{n:04d}.png" for n in range(num_train)]
    assert [pair.render.name for pair in pairs.validation] == [f"{n:04d}.png" for n in range(num_train, num_items)]
    warning = f"{path} lists {num_items} items: all but one are held out for validation; set data.holdout_items"
    assert caplog.messages == ([warning] if num_items <= 10 else [])


def test_missing_list_names_the_working_directory_and_the_key(here):
    with pytest.raises(FileNotFoundError, match=f"example_kitti.json .from {here}. is not a file; set data.data_json"):
        read_pairs("example_kitti.json")


def test_broken_json(here):
    (here / "list.json").write_text('{"render": [1, 2')
    assert "is not json: Expecting ',' delimiter: line 1 column 17" in problems_of(here / "list.json")
    assert "it holds a list, expected an object" in problems_of(write_json(here / "list.json", [1]))


def test_missing_keys_are_suggested(here):
    text = problems_of(write_json(here / "list.json", {"renders": [], "gt": [], "target": []}))
    assert "missing key 'render' (did you mean 'render' by 'renders'?)" in text
    assert "missing key 'cond' (found: renders, gt, target)" in text
    text = problems_of(write_json(here / "list.json", {"train": {"a": {"image": "r.png", "target": "t.png"}}}))
    assert "train item 'a' lacks the key 'target_image' (did you mean 'target_image' by 'target'?)" in text


def test_all_problems_come_together(here):
    lists = parallel(3)
    touch(here, *lists["gt"])
    lists["render"] += ["render/more.png"]
    lists["gt"][1] = " "
    lists["cond"][2] = 7
    text = problems_of(write_json(here / "list.json", lists), holdout=1)
    assert "the lists must be equally long, but have: render 4, gt 3, cond 3" in text
    assert "item 1: gt is ' ', expected a path" in text
    assert "item 2: cond is 7, expected a path" in text
    assert "2 files are missing (relative paths start at" in text
    assert str(here / "render/0000.png") in text and str(here / "cond/0000.png") in text


def test_many_missing_files_are_counted_and_the_first_shown(here):
    text = problems_of(write_json(here / "list.json", parallel(20)))
    assert "60 files are missing" in text
    assert text.count(".png") == 5
    lists = parallel(20)
    lists["gt"] = [""] * 20
    text = problems_of(write_json(here / "list.json", lists))
    assert text.count("gt is ''") == 5 and "... and 15 more like these" in text


@pytest.mark.parametrize("value", ["render.png", {"0": "render.png"}, None])
def test_lists_must_be_lists(here, value):
    text = problems_of(write_json(here / "list.json", parallel(2) | {"gt": value}))
    assert f"'gt' is a {type(value).__name__}, expected a list of paths" in text


# Buckets and windows --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "bucket"),
    [((1408, 376), "3.66"), ((640, 480), "1.5"), ((258, 100), "1.5"), ((2581, 1000), "3.66"), ((100, 300), "1.5")],
)
def test_choose_bucket(size, bucket):
    assert choose_bucket(*size) == bucket


def test_window_offsets_reach_every_place_but_the_last():
    rng = np.random.default_rng(0)
    assert {window_offset(rng, 12, 8) for _ in range(200)} == {0, 1, 2, 3}
    assert {window_offset(rng, 12, 8, inclusive=True) for _ in range(200)} == {0, 1, 2, 3, 4}
    assert window_offset(rng, 8, 8) == 0
    with pytest.raises(ValueError, match="window of 9 px does not fit into a width of 8 px"):
        window_offset(rng, 8, 9)


def test_window_places():
    assert window_places(640, 480, 1) == [80]
    assert window_places(640, 480, 3) == [0, 80, 160]
    assert window_places(480, 480, 2) == [0, 0]


def test_normalise():
    image = np.array([[[0, 51, 255]]], np.uint8)
    actual = normalise(image)
    assert actual.shape == (3, 1, 1) and actual.dtype == np.float32 and actual.flags.c_contiguous
    np.testing.assert_array_equal(actual.ravel(), np.float32([-1, np.float32(51) / np.float32(127.5) - 1, 1]))


def test_bucket_batches():
    order, buckets = [4, 0, 3, 1, 5, 2, 6], ["b", "a", "b", "a", "b", "b", "a"]
    expected = [[4, 0], [3, 1], [5, 2]]
    assert bucket_batches(order, buckets, 2, drop_last=True) == expected
    assert bucket_batches(order, buckets, 2, drop_last=False) == [*expected, [6]]
    assert bucket_batches(order, buckets, 5, drop_last=False) == [[3, 1, 6], [4, 0, 5, 2]]
    assert bucket_batches([], [], 2, drop_last=False) == []
    with pytest.raises(ValueError, match="batch_size is 0"):
        bucket_batches(order, buckets, 0, drop_last=False)


# Samples --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    return Image.fromarray(data.astronaut())


@pytest.fixture
def pairs(photo, tmp_path) -> tuple[Pair, ...]:
    """A wide item, a 4:3 item without cond, and one whose three images have other sizes and modes."""
    wide, narrow = photo.crop((0, 100, 480, 228)), photo.crop((0, 0, 160, 120))
    wide.save(tmp_path / "wide.png")
    wide.transpose(Image.Transpose.ROTATE_180).save(tmp_path / "wide_gt.png")
    narrow.save(tmp_path / "narrow.png")
    narrow.convert("L").save(tmp_path / "grey.png")
    narrow.convert("RGBA").save(tmp_path / "alpha.png")
    Image.fromarray(np.asarray(narrow.convert("L")).astype(np.uint16) * 257).save(tmp_path / "grey16.png")
    return (
        Pair("wide", tmp_path / "wide.png", tmp_path / "wide_gt.png", tmp_path / "narrow.png"),
        Pair("narrow", tmp_path / "narrow.png", tmp_path / "alpha.png"),
        Pair("mixed", tmp_path / "grey16.png", tmp_path / "grey.png", tmp_path / "wide.png"),
    )


def resized(path: Path, bucket: str) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB").resize(BUCKETS[bucket], Image.Resampling.LANCZOS))


def test_load_crops_takes_one_window_of_all(pairs):
    crops = load_crops(pairs[0], BUCKETS["3.66"], 700)
    for key, path in (("render", pairs[0].render), ("gt", pairs[0].gt), ("cond", pairs[0].cond)):
        np.testing.assert_array_equal(crops[key], resized(path, "3.66")[:, 700:1212])


def test_sample_is_a_function_of_index_and_generator(pairs):
    dataset = RefinerDataset(pairs)
    assert len(dataset) == 3 and [dataset.bucket_of(i) for i in range(3)] == ["3.66", "1.5", "1.5"]
    sample, again = (dataset.sample(0, np.random.default_rng(5)) for _ in range(2))
    for key in sample:
        np.testing.assert_array_equal(sample[key], again[key])
    offset = window_offset(np.random.default_rng(5), *BUCKETS["3.66"])
    crops = load_crops(pairs[0], BUCKETS["3.66"], offset)
    np.testing.assert_array_equal(sample["render"], normalise(crops["render"]))
    np.testing.assert_array_equal(sample["gt"], normalise(crops["gt"]))
    np.testing.assert_array_equal(sample["prompt_img"], normalise(crops["cond"]))
    np.testing.assert_array_equal(sample["cond_u8"], crops["cond"])
    assert sample["has_cond"] and sample["render"].shape == (3, 512, 512) and sample["render"].dtype == np.float32


def test_sample_without_cond_is_zeros(pairs):
    sample = RefinerDataset(pairs).sample(1, np.random.default_rng(0))
    assert not sample["has_cond"] and sample["prompt_img"].shape == (3, 480, 480)
    assert not sample["prompt_img"].any() and not np.any(sample["cond_u8"])
    np.testing.assert_array_equal(sample["render"], sample["gt"])  # the target is the render with an alpha channel


def test_grey_and_sixteen_bit_images_become_rgb(pairs):
    sample = RefinerDataset(pairs).sample(2, np.random.default_rng(0))
    np.testing.assert_array_equal(sample["render"], sample["gt"])
    np.testing.assert_array_equal(sample["gt"][0], sample["gt"][2])
    assert sample["gt"].std() > 0.1


def test_flip_mirrors_all_three_images(pairs):
    plain, flipped = RefinerDataset(pairs), RefinerDataset(pairs, random_flip=True)
    states = set()
    for seed in range(8):
        expected = plain.sample(0, np.random.default_rng(seed))
        actual = flipped.sample(0, np.random.default_rng(seed))
        rng = np.random.default_rng(seed)
        window_offset(rng, *BUCKETS["3.66"])
        mirrored = rng.random() < 0.5
        states.add(mirrored)
        for key in ("render", "gt", "prompt_img"):
            np.testing.assert_array_equal(actual[key], expected[key][:, :, ::-1] if mirrored else expected[key])
        crop = np.asarray(expected["cond_u8"])
        np.testing.assert_array_equal(actual["cond_u8"], crop[:, ::-1] if mirrored else crop)
    assert states == {True, False}


def test_validation_sample_is_the_centre(pairs):
    dataset = RefinerDataset(pairs, random_flip=True)
    expected = normalise(load_crops(pairs[0], BUCKETS["3.66"], (1917 - 512) // 2)["render"])
    np.testing.assert_array_equal(dataset.validation_sample(0)["render"], expected)
    centred = RefinerDataset(pairs, windows_per_item=1).sample(0, np.random.default_rng(3))
    np.testing.assert_array_equal(centred["render"], expected)


def test_few_windows_per_item(pairs):
    dataset = RefinerDataset(pairs, windows_per_item=2)
    edges = [normalise(load_crops(pairs[1], BUCKETS["1.5"], offset)["render"]) for offset in (0, 160)]
    seen = {
        [np.array_equal(dataset.sample(1, np.random.default_rng(seed))["render"], edge) for edge in edges].index(True)
        for seed in range(8)
    }
    assert seen == {0, 1}


def test_small_windows(pairs):
    dataset = RefinerDataset(pairs, height_px=64)
    assert dataset.buckets == {"1.5": (85, 64), "3.66": (240, 64)}
    assert dataset.sample(0, np.random.default_rng(0))["gt"].shape == (3, 64, 64)
    batch = collate([dataset.sample(i, np.random.default_rng(0)) for i in (0, 1)])  # one size in both buckets
    assert batch["render"].shape == (2, 3, 64, 64) and batch["has_cond"].tolist() == [True, False]
    assert [image.size for image in batch["cond_u8"]] == [(64, 64)] * 2


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"height_px": 100}, "height_px is 100, but must be a multiple of 8"),
        ({"height_px": 0}, "height_px is 0"),
        ({"windows_per_item": 0}, "windows_per_item is 0, but must be at least 1"),
    ],
)
def test_options_are_checked(pairs, options, text):
    with pytest.raises(ValueError, match=text):
        RefinerDataset(pairs, **options)


def test_empty_data_set():
    with pytest.raises(ValueError, match="at least one pair"):
        RefinerDataset([])


@pytest.mark.parametrize("damage", ["empty", "half", "header"])
@pytest.mark.parametrize("which", ["render", "gt", "cond"])
def test_unreadable_image_is_named_by_sample_not_by_bucket(pairs, damage, which):
    path = getattr(pairs[0], which)
    whole = path.read_bytes()
    path.write_bytes({"empty": b"", "half": whole[: len(whole) // 2], "header": b"xxxx" + whole[4:]}[damage])
    for warm in (False, True):
        dataset = RefinerDataset(pairs[:1])
        if warm:
            assert dataset.bucket_of(0) == ("1.5" if which == "render" and damage != "half" else "3.66")
        with pytest.raises(MediaError, match=f"^{path}: "):
            dataset.sample(0, np.random.default_rng(0))


def test_vanished_image(pairs):
    pairs[0].gt.unlink()
    with pytest.raises(MediaError, match=f"^{pairs[0].gt}: no such file"):
        RefinerDataset(pairs).validation_sample(0)


def test_files_of(pairs):
    dataset = RefinerDataset(pairs)
    assert dataset.files_of(0) == [pairs[0].render, pairs[0].gt, pairs[0].cond]
    assert dataset.files_of(1) == [pairs[1].render, pairs[1].gt]


def test_fingerprint_follows_the_content_not_the_place(pairs, tmp_path):
    first = RefinerDataset(pairs).fingerprint()
    assert first["num_items"] == 3 and first["buckets"] == {"1.5": [640, 480], "3.66": [1917, 512]}
    moved = [
        Pair(p.name, *(f and Path("/elsewhere") / f.relative_to(tmp_path) for f in (p.render, p.gt, p.cond)))
        for p in pairs
    ]
    assert RefinerDataset(moved).fingerprint() == first
    assert RefinerDataset(moved[::-1]).fingerprint() != first
    assert RefinerDataset(pairs, height_px=64).fingerprint()["buckets"] == {"1.5": [85, 64], "3.66": [240, 64]}
