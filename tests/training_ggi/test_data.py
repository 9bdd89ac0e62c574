import json
import logging
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from common.data import SampleLoader, SamplePlan
from common.video import MediaError
from training_ggi.data import Cut, Scene, SceneDataset, Scenes, find_image_folder, list_scene_names, read_scenes

SIZE_WH = (60, 40)
NAMES = [f"DL3DV-10K/1K/{digit * 64}" for digit in "abcd"]


def write_scene(root: Path, name: str, num_frames: int, size_wh=SIZE_WH, folder: str = "images_2") -> Path:
    """Frames of which blue tells the number; red grows along x, green along y."""
    images = root / name / folder
    images.mkdir(parents=True)
    width, height = size_wh
    for number in range(num_frames):
        frame = np.empty((height, width, 3), np.uint8)
        frame[..., 0] = np.arange(width) * 2
        frame[..., 1] = np.arange(height)[:, None] * 2
        frame[..., 2] = 10 * number + 5
        Image.fromarray(frame).save(images / f"frame_{number + 1:05d}.png")
    return images


def write_lists(root: Path, names: list[str], captions: dict[str, str] | None = None) -> None:
    root.mkdir(exist_ok=True, parents=True)
    (root / "seeds.txt").write_text("".join(f"{name}\n" for name in names))
    if captions is not None:
        (root / "captions.json").write_text(json.dumps(captions))


@pytest.fixture
def root(tmp_path) -> Path:
    for number, name in enumerate(NAMES):
        write_scene(tmp_path, name, 5 + number)
    write_lists(tmp_path, NAMES, {name[-64:]: f"scene {name[-1]}" for name in NAMES})
    return tmp_path


def small(scenes, **settings) -> SceneDataset:
    return SceneDataset(scenes, **{"num_frames": 5, "height_px": 16, "width_px": 24, "num_threads": 2} | settings)


# Scenes


def test_scenes_of_a_list_and_those_held_out(root):
    scenes = read_scenes(root, num_validation_scenes=1)
    assert [scene.name for scene in scenes.train] == NAMES[:3]
    assert [scene.scene_id for scene in scenes.validation] == ["d" * 64]
    assert scenes.train[1].folder == root / NAMES[1] / "images_2"
    assert [scene.prompt for scene in scenes.train] == ["scene a", "scene b", "scene c"]
    assert len(scenes.train[1].images()) == 6
    first = read_scenes(root, num_validation_scenes=1, num_scenes=2)
    assert first == Scenes(scenes.train[:2], scenes.validation)


def test_a_list_keeps_its_order_and_names_each_scene_once(root):
    (root / "seeds.txt").write_bytes(f"\ufeff{NAMES[2]}/\r\n\r\n{NAMES[0]}\r\n{NAMES[2]}".encode())
    assert [scene.name for scene in read_scenes(root).train] == [NAMES[2], NAMES[0]]


def test_without_a_list_the_folder_is_searched(root):
    (root / "DL3DV-10K/2K/empty/images_2").mkdir(parents=True)
    (root / "DL3DV-10K/2K/none").mkdir()
    (root / "DL3DV-10K/.cache/x/images_2").mkdir(parents=True)
    (root / "DL3DV-10K/README.md").touch()
    names = [scene.name for scene in read_scenes(root, None).train]
    assert names == [*NAMES, "DL3DV-10K/2K/empty"]
    assert list_scene_names(root, None, None) == [*names, "DL3DV-10K/2K/none"]
    with pytest.raises(
        ValueError, match=r"holds no scenes; their images must be in DL3DV-10K/<batch>/<scene>/images_2"
    ):
        read_scenes(root / "DL3DV-10K", None)


def test_the_list_may_lie_in_the_working_directory(root, tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    (root / "seeds.txt").rename(tmp_path / "elsewhere" / "allow-list.txt")
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert len(read_scenes(root, "allow-list.txt").train) == 4
    assert len(read_scenes(root, tmp_path / "elsewhere" / "allow-list.txt").train) == 4


def test_images_of_another_size_are_taken_where_there_is_no_choice(tmp_path):
    write_scene(tmp_path, "s", 1, folder="images_4")
    assert find_image_folder(tmp_path / "s") == tmp_path / "s" / "images_4"
    write_scene(tmp_path, "s", 1, folder="images_8")
    reason = "holds no folder images_2, but images_4 and images_8: choose one with data.image_folder"
    assert find_image_folder(tmp_path / "s") == reason
    assert find_image_folder(tmp_path / "s", "images_8") == tmp_path / "s" / "images_8"
    write_scene(tmp_path, "s", 1)
    assert find_image_folder(tmp_path / "s") == tmp_path / "s" / "images_2"


def test_frames_are_in_natural_order_and_nothing_else_counts(tmp_path):
    for name in ("frame_10.png", "frame_9.JPG", "frame_2.png", "._frame_2.png", "transforms.json", "Thumbs.db"):
        (tmp_path / name).touch()
    assert [path.name for path in Scene("x", tmp_path).images()] == ["frame_2.png", "frame_9.JPG", "frame_10.png"]


def test_missing_captions_are_counted_once(root, caplog):
    write_lists(root, NAMES, {"a" * 64: "one", "b" * 64: "", "e" * 64: "of no scene"})
    with caplog.at_level(logging.WARNING):
        scenes = read_scenes(root).train
    assert [scene.prompt for scene in scenes] == ["one", "", "", ""]
    assert [record.getMessage() for record in caplog.records] == [
        "3 of 4 scenes have no caption in captions.json and get the empty prompt; scripts/caption_dl3dv.py adds them"
    ]


def test_captions_can_be_left_out(root, caplog):
    (root / "captions.json").unlink()
    assert {scene.prompt for scene in read_scenes(root, prompt_file=None).train} == {""}
    assert not caplog.records
    with pytest.raises(
        FileNotFoundError, match="captions.json; scripts/caption_dl3dv.py writes one, and data.use_captions=f"
    ):
        read_scenes(root)


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "captions.json, which is not json: Expecting"), ('{"a": 1}', "no json object of captions by scene id")],
)
def test_unusable_captions_are_refused(root, text, message):
    (root / "captions.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_scenes(root)


@pytest.mark.parametrize("line", ["/data/x", "DL3DV-10K/../../x"])
def test_lines_that_lead_out_of_the_root_are_refused(root, line):
    (root / "seeds.txt").write_text(f"{NAMES[0]}\n{line}\n")
    with pytest.raises(ValueError, match=rf"seeds.txt: '{line}' is no path from data.data_root; expected lines DL3DV"):
        read_scenes(root)


def test_an_empty_list_is_refused(root):
    (root / "seeds.txt").write_text("\n")
    with pytest.raises(ValueError, match="seeds.txt: it is empty; expected lines DL3DV-10K/<batch>/<scene>"):
        read_scenes(root)


def test_scenes_that_are_not_there_are_left_out(root, caplog):
    """As after a download of a part of the data."""
    (root / NAMES[1] / "images_2").rename(root / NAMES[1] / "pictures")
    write_lists(root, [*NAMES, *(f"DL3DV-10K/9K/{number}" for number in range(7))], {})
    with caplog.at_level(logging.WARNING):
        scenes = read_scenes(root, prompt_file=None, num_validation_scenes=1)
    assert [scene.name for scene in (*scenes.train, *scenes.validation)] == [NAMES[0], NAMES[2], NAMES[3]]
    (record,) = caplog.records
    lines = record.getMessage().splitlines()
    assert lines[0] == (
        f"{root}: these are left out: 8 of 11 scenes have no images (`python scripts/doctor.py scenes DATA_ROOT` lists "
        "those that can be used, for data.dataset_file):"
    )
    assert lines[1] == f"      {NAMES[1]}: holds no folder images_2"
    assert lines[2] == "      DL3DV-10K/9K/0: no such folder"
    assert lines[6:] == ["      ... and 3 more like these"]
    with pytest.raises(ValueError) as caught:
        read_scenes(root, num_validation_scenes=3)
    assert str(caught.value).startswith(
        f"{root}: 3 scenes have images, and the last 3 are held out for validation (data.num_validation_scenes), which "
        "leaves none to train on; 8 of 11 scenes have no images"
    )


def test_the_name_in_the_originals_settings_means_the_captions(root, caplog):
    assert read_scenes(root, prompt_file="prompts.json") == read_scenes(root)
    expected = "data.prompt_file is prompts.json, which does not exist: captions.json is read instead"
    assert [record.getMessage() for record in caplog.records] == [expected]
    (root / "prompts.json").write_text(json.dumps({"a" * 64: "its own"}))
    assert read_scenes(root, prompt_file="prompts.json").train[0].prompt == "its own"


def test_wrong_numbers_and_places_are_named(root):
    with pytest.raises(ValueError, match="data.num_validation_scenes is -1, but must be at least 0"):
        read_scenes(root, num_validation_scenes=-1)
    with pytest.raises(
        ValueError, match="data.max_train_samples is 0, but must be at least 1, or unset for all scenes"
    ):
        read_scenes(root, num_scenes=0)
    with pytest.raises(FileNotFoundError, match="none .from .* is not a folder; set data.data_root to what holds the"):
        read_scenes(root / "none")
    with pytest.raises(
        FileNotFoundError, match="data.dataset_file is no.txt, but there is no file .* or .*; set it to n"
    ):
        read_scenes(root, "no.txt")


# Clips


def test_a_sample_is_a_clip_of_its_scene(root):
    dataset = small(read_scenes(root).train)
    sample = dataset.sample(3, np.random.default_rng(0))
    assert sample["frames"].shape == (5, 16, 24, 3) and sample["frames"].dtype == np.uint8
    assert (sample["prompt"], sample["scene"]) == ("scene d", "d" * 64)
    assert sample["indices"].dtype == np.int64 and np.array_equal(np.diff(sample["indices"]), [1, 1, 1, 1])
    assert np.array_equal(sample["frames"][:, 8, 12, 2] // 10, sample["indices"])
    assert dataset.files_of(3) == [root / NAMES[3] / "images_2"]
    again = dataset.sample(3, np.random.default_rng(0))
    assert np.array_equal(sample["frames"], again["frames"])


def test_every_start_interval_and_corner_is_drawn(root):
    dataset = small(read_scenes(root).train, num_frames=4, frame_intervals=(2, 1, 9))
    rng = np.random.default_rng(0)
    drawn = [dataset.draw_cut(3, rng) for _ in range(400)]  # 8 frames, resized from 60x40 to 26x17 px
    assert {(cut.interval, cut.start) for cut in drawn} == {(1, start) for start in range(5)} | {(2, 0), (2, 1)}
    assert ({cut.top for cut in drawn}, {cut.left for cut in drawn}) == ({0, 1}, {0, 1, 2})
    assert {dataset.draw_cut(0, rng).interval for _ in range(20)} == {1}  # of 5 frames
    fixed = small(read_scenes(root).train, random_start=False)
    assert {fixed.draw_cut(3, rng).start for _ in range(20)} == {0}


def test_a_cut_is_a_window_of_the_resized_frames(root):
    dataset = small(read_scenes(root).train, num_frames=3)
    whole = small(read_scenes(root).train, num_frames=3).item(3, Cut(2, 1, 0, 0))
    moved = dataset.item(3, Cut(2, 1, 1, 2))
    assert whole["indices"].tolist() == moved["indices"].tolist() == [1, 3, 5]
    assert np.array_equal(moved["frames"][:, :-1, :-2], whole["frames"][:, 1:, 2:])
    red = whole["frames"][0, 0, :, 0]  # 2 x of the original pixel, at 60 / 26 times the distance
    assert np.abs(red - (2 * ((np.arange(24) + 0.5) * 60 / 26 - 0.5))).max() < 2
    assert (whole["frames"][:, 0, 0, 2] // 10).tolist() == [1, 3, 5]


def test_fixed_cuts_are_spread_and_extend_each_other(root):
    dataset = small(read_scenes(root).train, num_frames=2, frame_intervals=(1, 2))
    cuts = dataset.cuts(3, 24)
    assert dataset.cuts(3, 24) == cuts and dataset.cuts(3, 5) == cuts[:5]
    assert cuts[0] == Cut(1, 3, 1, 1)
    assert {cut.start for cut in cuts} == set(range(7)) and {cut.interval for cut in cuts} == {1, 2}
    assert {cut.top for cut in cuts} == {0, 1} and {cut.left for cut in cuts} == {0, 1, 2}
    for cut in cuts:
        assert dataset.item(3, cut)["frames"].shape == (2, 16, 24, 3)


@pytest.mark.parametrize("cut", [Cut(1, 4, 0, 0), Cut(1, -1, 0, 0), Cut(1, 0, 2, 0), Cut(1, 0, 0, 3), Cut(2, 0, 0, 0)])
def test_cuts_outside_the_scene_are_refused(root, cut):
    dataset = small(read_scenes(root).train)
    with pytest.raises(
        ValueError, match=r"images_2: Cut\(.*\) leads out of its 8 frames, which are 26x17 px after resizi"
    ):
        dataset.item(3, cut)


def test_upright_scenes_are_resized_to_the_width(tmp_path):
    write_scene(tmp_path, "x", 2, size_wh=(40, 60))
    dataset = small([Scene("x", tmp_path / "x" / "images_2")], num_frames=2)
    rng = np.random.default_rng(0)
    assert {dataset.draw_cut(0, rng).left for _ in range(50)} == {0, 1, 2}  # 26 of 24 px
    assert max(dataset.draw_cut(0, rng).top for _ in range(200)) == 39 - 16  # 1.1 * 24 / 40 * 60 px
    assert dataset.sample(0, rng)["frames"].shape == (2, 16, 24, 3)


# Bad scenes


def test_a_short_scene_is_named(root):
    dataset = small(read_scenes(root).train, num_frames=46, frame_intervals=(2, 3))
    message = "images_2: the scene has 5 frames, but a clip of 46 frames at an interval of 2 needs 91"
    for act in (lambda: dataset.sample(0, np.random.default_rng(0)), lambda: dataset.cuts(0, 1)):
        with pytest.raises(MediaError, match=message):
            act()


def test_a_damaged_and_an_odd_frame_are_named(root):
    dataset = small(read_scenes(root).train)
    damaged, odd = (dataset.scenes[index].images()[3] for index in (0, 1))
    damaged.write_bytes(damaged.read_bytes()[:60])
    Image.new("RGB", (30, 20)).save(odd)
    with pytest.raises(MediaError, match=f"{damaged}: cannot be read as an image"):
        dataset.sample(0, np.random.default_rng(0))
    with pytest.raises(MediaError, match=f"{odd}: is 30x20 px, but the first frame of its scene is 60x40 px"):
        dataset.sample(1, np.random.default_rng(0))


def load(scenes, tmp_path, **settings) -> tuple[list[dict], SampleLoader]:
    plan = SamplePlan(len(scenes), seed=0, global_batch=2)
    loader = SampleLoader(
        small(scenes, **settings), plan, micro_batch=2, rank=0, world_size=1, num_workers=0,
        bad_samples_path=tmp_path / "bad.jsonl", max_bad_fraction=0.5,
    )  # fmt: skip
    return list(loader.batches(0, 4)), loader


def test_bad_scenes_do_not_end_the_job(root, tmp_path):
    batches, loader = load(read_scenes(root).train, tmp_path, num_frames=6)
    assert [tuple(batch["frames"].shape) for batch in batches] == [(2, 6, 16, 24, 3)] * 4
    assert {scene for batch in batches for scene in batch["scene"]} == {"b" * 64, "c" * 64, "d" * 64}
    assert all(prompt.startswith("scene ") for batch in batches for prompt in batch["prompt"])
    (record,) = map(json.loads, (tmp_path / "bad.jsonl").read_text().splitlines())
    assert record["files"] == [str(root / NAMES[0] / "images_2")] and not loader.too_many_bad
    assert record["reason"].endswith("the scene has 5 frames, but a clip of 6 frames at an interval of 1 needs 6")


def test_nothing_but_bad_scenes_is_one_clear_message(root, tmp_path):
    with pytest.raises(RuntimeError, match="20 items in a row could not be read .* a clip of 46 frames at an interval"):
        load(read_scenes(root).train, tmp_path, num_frames=46)


def test_wrong_settings_are_named_together(root):
    scenes = read_scenes(root).train
    with pytest.raises(ValueError) as caught:
        small(scenes, num_frames=0, frame_intervals=(0, 1), height_px=-8)
    assert str(caught.value) == (
        "num_frames is 0, but must be at least 1; height_px is -8, but must be at least 1; "
        "frame_intervals is [0, 1], but must hold numbers that are at least 1"
    )
    with pytest.raises(ValueError, match="a data set needs at least one scene"):
        small([])


def test_the_fingerprint_tells_what_decides_the_clips(root, tmp_path):
    scenes = read_scenes(root).train
    fingerprint = small(scenes).fingerprint()
    assert json.loads(json.dumps(fingerprint)) == fingerprint and fingerprint["num_items"] == 4
    moved = tmp_path / "moved"
    moved.mkdir()
    for name in ("DL3DV-10K", "seeds.txt", "captions.json"):
        (root / name).rename(moved / name)
    assert small(read_scenes(moved).train).fingerprint() == fingerprint
    others = [
        small(read_scenes(moved, prompt_file=None).train),
        small(read_scenes(moved).train[:3]),
        small(read_scenes(moved).train, width_px=32),
        small(read_scenes(moved).train, frame_intervals=(1, 2)),
        small(read_scenes(moved).train, random_start=False),
    ]
    assert all(other.fingerprint() != fingerprint for other in others)
    assert pickle.loads(pickle.dumps(others[0])).fingerprint() == others[0].fingerprint()  # for loader processes


# Edges that lie beside the frames


def test_edges_are_cut_as_the_frames_are(root):
    scenes = read_scenes(root).train
    for image in scenes[0].images():
        edges = scenes[0].folder.parent / "edges" / image.name
        edges.parent.mkdir(exist_ok=True)
        Image.open(image).getchannel("R").save(edges)
    dataset = small(scenes, edge_folder="edges")
    item = dataset.item(0, dataset.cuts(0, 1)[0])
    assert item["edges"].shape == (5, 16, 24) and np.array_equal(item["edges"], item["frames"][..., 0])
    assert dataset.images_of(0)[5:] == [scenes[0].folder.parent / "edges" / i.name for i in scenes[0].images()]
    assert dataset.fingerprint()["edge_folder"] == "edges" and "edges" not in small(scenes).item(0, Cut(1, 0, 0, 0))
    with pytest.raises(MediaError, match="edges/frame_00001.png"):
        dataset.item(1, Cut(1, 0, 0, 0))
