"""The VAE's clips: which files and frames, what comes out of odd ones, what is drawn from where."""

import logging
import os
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from common.data import SamplePlan, SampleSource, rng_for
from common.video import MediaError, read_frames, write_video
from vae.data import (
    Clips,
    EvalClips,
    center_crop_resize,
    eval_transform,
    list_videos,
    read_in_threads,
    resize_and_crop,
    to_uint8_frames,
    train_begin_range,
    train_frame_indices,
    valid_frame_indices,
)

sys.path.insert(0, str(Path(__file__).parents[1] / "common"))
from test_video import CLIPS, EVEN, NUM_FRAMES, encode, number_of, pan  # noqa: E402


def numbers_in(video: torch.Tensor) -> list[int]:
    """The numbers that `pan` wrote into the frames, of a clip at its own size (where the crop cuts nothing away)."""
    return [number_of(frame) for frame in to_uint8_frames(video).numpy()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Three clips of 40 frames with 96x96 px, numbered, in different containers, and one of 7."""
    root = tmp_path_factory.mktemp("videos")
    frames = pan(*EVEN)[:, :, :96]
    write_video(root / "b.mp4", frames, 25)
    write_video(root / "sub" / "a.MKV", frames, 25)
    write_video(root / "sub" / "deeper" / "c.avi", frames, 25, codec="mpeg4", options={"b": "4000000"})
    write_video(root / "short.mp4", frames[:7], 25)
    return root


def touched(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"x")


def names_of(paths: list[Path], root: Path) -> list[str]:
    return [path.relative_to(root).as_posix() for path in paths]


# Files ----------------------------------------------------------------------------------------------------------------


def test_listing_is_recursive_sorted_and_blind_to_case_and_hidden_files(tmp_path):
    names = ["B.MP4", "a/x.avi", "a/z/y.WebM", "a-1.mov", "b.mkv", "c.m4v"]
    touched(
        tmp_path, *names, ".hidden.mp4", ".cache/k.mp4", "lost+found/l.mp4", "idx.pkl", "notes.txt", "clip.mp4.part"
    )
    (tmp_path / "folder.mp4").mkdir()
    assert names_of(list_videos(tmp_path), tmp_path) == ["B.MP4", "a-1.mov", "a/x.avi", "a/z/y.WebM", "b.mkv", "c.m4v"]


def test_an_index_left_by_the_original_is_never_read(tmp_path):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "trapped"),)

    touched(tmp_path, "a.mp4")
    (tmp_path / "idx.pkl").write_bytes(pickle.dumps(Trap()))
    list_videos(tmp_path)
    assert not (tmp_path / "trapped").exists()


def test_links_are_followed_and_loops_end(tmp_path):
    root, elsewhere = tmp_path / "root", tmp_path / "elsewhere"
    touched(root, "own.mp4")
    touched(elsewhere, "far.mp4", "deep/far.mp4")
    (root / "z_link").symlink_to(elsewhere)
    (root / "y_link").symlink_to(elsewhere)  # of two links to one folder the first by name counts
    (elsewhere / "deep" / "up").symlink_to(root)
    (elsewhere / "self").symlink_to(elsewhere)
    (root / "gone.mp4").symlink_to(tmp_path / "nowhere.mp4")
    names = names_of(list_videos(root), root)
    assert names == ["gone.mp4", "own.mp4", "y_link/deep/far.mp4", "y_link/far.mp4"]
    with pytest.raises(MediaError, match="gone.mp4: no such file"):
        Clips([root / "gone.mp4"], root, 1, 8, 1).sample(0, np.random.default_rng(0))


def test_a_folder_that_cannot_be_read_is_no_smaller_data_set(tmp_path, monkeypatch):
    touched(tmp_path, "a.mp4", "sub/b.mp4")
    plain = os.scandir

    def scandir(path):
        if Path(path).name == "sub":
            raise PermissionError(13, "Permission denied", str(path))
        return plain(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(PermissionError, match="sub"):
        list_videos(tmp_path)


def test_images_are_left_out_unless_asked_for(tmp_path, caplog):
    touched(tmp_path, "a.mp4", "b.PNG", "c/d.jpeg", "e.webp", "f.bmp", "g.jpg")
    with caplog.at_level(logging.INFO, logger="vae.data"):
        assert names_of(list_videos(tmp_path), tmp_path) == ["a.mp4"]
    assert caplog.messages == [f"{tmp_path}: 5 images are left out, which can be used with num_frames 1 alone"]
    assert names_of(list_videos(tmp_path, images=True), tmp_path) == [
        "a.mp4", "b.PNG", "c/d.jpeg", "e.webp", "f.bmp", "g.jpg",
    ]  # fmt: skip


def test_missing_and_empty_folders_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=rf"^{tmp_path}/none \(from .*\) is not a folder$"):
        list_videos(tmp_path / "none")
    message = (
        f"{tmp_path} holds no clip; looked for *.mp4, *.avi, *.webm, *.mkv, *.mov, *.m4v in it and the folders in it"
    )
    with pytest.raises(ValueError) as caught:
        list_videos(tmp_path)
    assert str(caught.value) == message
    touched(tmp_path, "a.png", "b.png")
    with pytest.raises(ValueError) as caught:
        list_videos(tmp_path)
    assert str(caught.value) == f"{message}; its 2 images can be used with num_frames 1"


def test_allow_list(tmp_path):
    odd = os.fsdecode(b"\xff\x0b.mp4")  # neither UTF-8 nor one line for `splitlines`
    touched(tmp_path, "a.mp4", "sub/b.avi", "c.png", odd)
    allow = tmp_path / "allow-list.txt"
    allow.write_bytes(b"sub/b.avi\r\n\nc.png\n" + os.fsencode(odd) + b"\n")
    assert names_of(list_videos(tmp_path, allow), tmp_path) == ["sub/b.avi", odd]
    assert names_of(list_videos(tmp_path, allow, images=True), tmp_path) == ["c.png", "sub/b.avi", odd]
    allow.write_text("a.mp4\ngone.mp4\nfar/gone.mp4\n")
    with pytest.raises(ValueError) as caught:
        list_videos(tmp_path, allow)
    assert str(caught.value) == (
        f"{allow} names 2 files that are not in {tmp_path}, the first: far/gone.mp4; "
        f"make it anew: python scripts/doctor.py videos {tmp_path}"
    )
    allow.write_text("\n")
    with pytest.raises(ValueError, match=f"^the allow-list {allow} is empty: there is nothing to read$"):
        list_videos(tmp_path, allow)
    with pytest.raises(FileNotFoundError, match=r"^the allow-list no.txt \(from .*\) is not a file$"):
        list_videos(tmp_path, "no.txt")


# Frames ---------------------------------------------------------------------------------------------------------------


def test_frame_indices_stay_inside_the_file_and_short_files_are_stretched():
    for total in range(1, 60):
        for num_frames, rate in ((1, 1), (1, 3), (5, 2), (17, 1), (9, 4)):
            low, high = train_begin_range(total, num_frames, rate)
            assert low == 0 and high == max(0, total - num_frames * rate - 1)
            for begin in {low, high}:
                indices = train_frame_indices(total, num_frames, rate, begin)
                assert indices.dtype == np.int64 and len(indices) == num_frames
                assert indices[0] == begin and (np.diff(indices) >= 0).all()
                assert num_frames == 1 or indices[-1] == min(begin + num_frames * rate, total) - 1
    assert train_frame_indices(3, 7, 2, 0).tolist() == [0, 0, 0, 1, 1, 1, 2]
    assert valid_frame_indices(5, 2).tolist() == [0, 2, 4, 6, 9]


# Pixels ---------------------------------------------------------------------------------------------------------------


def test_resizing_is_torchvisions(folder):
    transforms = pytest.importorskip("torchvision.transforms.v2.functional")
    generator = torch.Generator().manual_seed(0)
    for size, resolution in (((53, 71), 32), ((71, 53), 48), ((30, 30), 41), ((9, 200), 8)):
        frames = torch.randint(0, 256, (2, 3, *size), generator=generator, dtype=torch.uint8)
        resized = transforms.resize(frames.float() / 255, [resolution], antialias=True)
        expected = (transforms.center_crop(resized, [resolution, resolution]) * 2 - 1).transpose(0, 1)
        assert torch.equal(resize_and_crop(frames, resolution, (resolution, resolution)), expected)
        assert resize_and_crop(frames, resolution).shape[2:] == resized.shape[2:]


def test_uniform_frames_keep_their_value_and_the_result_spans_minus_one_to_one():
    frames = torch.tensor([0, 128, 255], dtype=torch.uint8)[:, None, None, None].expand(3, 3, 40, 60)  # (T, C, H, W)
    for video in (resize_and_crop(frames, 16), eval_transform(frames, 16), center_crop_resize(frames, 16, 20)):
        expected = torch.tensor([-1, 2 * 128 / 255 - 1, 1])[None, :, None, None].expand_as(video)
        torch.testing.assert_close(video, expected, atol=1e-6, rtol=0)


def test_floating_point_frames_keep_their_range():
    frames = torch.full((2, 3, 20, 30), 3.5, dtype=torch.float64)
    assert torch.equal(resize_and_crop(frames, 10), torch.full((3, 2, 10, 15), 3.5))


def test_a_crop_that_does_not_fit_is_refused():
    with pytest.raises(ValueError) as caught:
        resize_and_crop(torch.zeros(1, 3, 20, 40, dtype=torch.uint8), 16, (16, 48))
    assert str(caught.value) == (
        "a crop of 48x16 px does not fit into frames of 32x16 px; lower the crop or raise the resolution"
    )


def test_frames_become_floating_point_one_by_one(monkeypatch):
    """All at once, 33 frames of 1920x1080 px take 821 MB."""
    shapes, plain = [], torch.nn.functional.interpolate

    def interpolate(pixels, *arguments, **options):
        shapes.append(tuple(pixels.shape))
        return plain(pixels, *arguments, **options)

    monkeypatch.setattr(torch.nn.functional, "interpolate", interpolate)
    resize_and_crop(torch.zeros(4, 3, 20, 30, dtype=torch.uint8), 16)
    assert shapes == [(1, 3, 20, 30)] * 4


def test_eight_bit_frames_round_or_truncate():
    levels = torch.tensor([-2.0, -1.0, 0.0, 0.999, 1.0, 3.0])
    video = levels.expand(3, 1, 2, 6)  # (C, T, H, W)
    rounded = to_uint8_frames(video)
    assert rounded.shape == (1, 2, 6, 3) and rounded.is_contiguous()
    assert rounded[0, 0, :, 0].tolist() == [0, 0, 128, 255, 255, 255]
    assert to_uint8_frames(video, "truncate")[0, 0, :, 0].tolist() == [0, 0, 127, 254, 255, 255]
    assert to_uint8_frames(video.bfloat16(), low=0.0)[0, 0, :, 0].tolist() == [0, 0, 0, 255, 255, 255]
    every = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    assert torch.equal(to_uint8_frames(resize_and_crop(every, 16)), every.permute(0, 2, 3, 1))
    with pytest.raises(ValueError, match="^rounding is 'floor', but must be round or truncate$"):
        to_uint8_frames(video, "floor")


# Training samples -----------------------------------------------------------------------------------------------------


def test_samples_are_the_frames_of_the_file_at_the_drawn_place(folder):
    paths = [path for path in list_videos(folder) if path.name != "short.mp4"]
    clips: SampleSource = Clips(paths, folder, num_frames=5, resolution=96, sample_rate=3)
    assert len(clips) == 3 and names_of(clips.files_of(1), folder) == ["sub/a.MKV"]
    begins = set()
    for index in range(3):
        for number in range(12):
            video = clips.sample(index, rng_for(0, "augmentation", number))["video"]
            assert (video.shape, video.dtype) == ((3, 5, 96, 96), torch.float32)
            assert -1 <= video.min() < -0.9 and 0.9 < video.max() <= 1
            begin = int(rng_for(0, "augmentation", number).integers(0, NUM_FRAMES - 15 - 1, endpoint=True))
            assert numbers_in(video) == train_frame_indices(NUM_FRAMES, 5, 3, begin).tolist()
            begins.add(begin)
    assert len(begins) > 6
    first, again = (clips.sample(0, rng_for(0, "augmentation", 5))["video"] for _ in range(2))
    assert torch.equal(first, again)


def test_every_begin_but_the_last_possible_is_drawn(folder):
    clips = Clips([folder / "short.mp4"], folder, num_frames=1, resolution=96, sample_rate=3)
    drawn = [numbers_in(clips.sample(0, np.random.default_rng(n))["video"])[0] for n in range(60)]
    assert set(drawn) == {0, 1, 2, 3}  # 7 - 3 - 1


def test_dynamic_rate_draws_from_one_to_the_rate(folder):
    clips = Clips([folder / "b.mp4"], folder, num_frames=5, resolution=96, sample_rate=4, dynamic_sample=True)
    spans = []
    for number in range(40):
        shown = numbers_in(clips.sample(0, np.random.default_rng(number))["video"])
        spans.append(shown[-1] - shown[0] + 1)
    assert set(spans) == {5, 10, 15, 20}


def test_short_files_are_stretched_or_rejected(folder):
    arguments = dict(paths=[folder / "short.mp4"], root=folder, num_frames=17, resolution=96, sample_rate=1)
    video = Clips(**arguments).sample(0, np.random.default_rng(0))["video"]
    assert numbers_in(video) == [0, 0, 0, 1, 1, 1, 2, 2, 3, 3, 3, 4, 4, 4, 5, 5, 6]
    for rate, dynamic, needed in ((1, False, 17), (2, False, 34), (2, True, 34)):
        rejecting = Clips(**{**arguments, "sample_rate": rate}, dynamic_sample=dynamic, short_clips="reject")
        with pytest.raises(ValueError) as caught:
            rejecting.sample(0, np.random.default_rng(0))
        expected = f"{folder}/short.mp4: clip has 7 frames, num_frames x sample_rate needs {needed}"
        assert str(caught.value) == expected


def test_images_and_clips_mix_where_one_frame_is_wanted(folder, tmp_path):
    Image.fromarray(np.full((40, 60, 4), (255, 0, 0, 9), np.uint8)).save(tmp_path / "red.png")
    Image.fromarray(np.full((90, 30), 255, np.uint8)).save(tmp_path / "white.JPG", format="jpeg")
    (tmp_path / "clip.mp4").symlink_to(folder / "b.mp4")
    paths = list_videos(tmp_path, images=True)
    clips = Clips(paths, tmp_path, num_frames=1, resolution=32, sample_rate=2, short_clips="reject")
    clip, red, white = (clips.sample(index, np.random.default_rng(3))["video"] for index in range(3))
    assert clip.shape == red.shape == white.shape == (3, 1, 32, 32)
    torch.testing.assert_close(red, torch.tensor([1.0, -1, -1]).view(3, 1, 1, 1).expand_as(red), atol=1e-6, rtol=0)
    torch.testing.assert_close(white, torch.ones_like(white), atol=1e-6, rtol=0)
    evaluated = EvalClips(paths, tmp_path, 1, 32, 2, crop_px=None)
    assert [evaluated.sample(index)["video"].shape[2:] for index in range(3)] == [(32, 32), (32, 48), (96, 32)]
    with pytest.raises(
        ValueError, match=r"num_frames is 5, but .*red.png is an image: list the clips with images=False"
    ):
        Clips(paths, tmp_path, num_frames=5, resolution=32, sample_rate=1)


@pytest.mark.parametrize("name", [name for name in CLIPS if not name.endswith((".ts", ".h264"))])
def test_clips_of_every_kind_are_read_alike(name, tmp_path):
    size, options, _ = CLIPS[name]
    path = encode(tmp_path / name, pan(*size), **options)
    clips = Clips([path], tmp_path, num_frames=5, resolution=64, sample_rate=2)
    video = clips.sample(0, np.random.default_rng(1))["video"]
    begin = int(np.random.default_rng(1).integers(0, 29, endpoint=True))
    frames = read_frames(path, train_frame_indices(NUM_FRAMES, 5, 2, begin).tolist(), backend="auto")
    assert torch.equal(video, resize_and_crop(torch.from_numpy(frames).permute(0, 3, 1, 2), 64, (64, 64)))


def test_unreadable_files_are_named(folder, tmp_path):
    whole = (folder / "b.mp4").read_bytes()
    broken = {
        "cut.mp4": whole[: len(whole) // 2],
        "text.avi": b"no clip at all" * 50,
        "unknown.mp4": whole.replace(b"avc1", b"zzzz"),
        "z.png": b"\x89PNG",
        "zero.webm": b"",
    }
    for name, content in broken.items():
        (tmp_path / name).write_bytes(content)
    paths = list_videos(tmp_path, images=True)
    assert [path.name for path in paths] == list(broken)
    for source in (Clips(paths, tmp_path, 1, 16, 1), EvalClips(paths, tmp_path, 1, 16, 1)):
        for index, path in enumerate(paths):
            with pytest.raises(MediaError, match=f"^{path}: ."):
                source.sample(index, np.random.default_rng(0))
        with pytest.raises(MediaError, match="unknown.mp4: its codec is unknown$"):
            source.sample(2, np.random.default_rng(0))


def test_fingerprint_follows_names_and_sizes_and_not_the_place(tmp_path):
    def fingerprint(root: Path) -> dict:
        return Clips(list_videos(root), root, 5, 16, 1).fingerprint()

    touched(tmp_path / "one", "a.mp4", "sub/b.mp4")
    first = fingerprint(tmp_path / "one")
    assert first["num_items"] == 2 and len(first["files_sha256"]) == 64
    (tmp_path / "one").rename(tmp_path / "two")
    assert fingerprint(tmp_path / "two") == first
    (tmp_path / "two" / "a.mp4").write_bytes(b"xy")
    assert fingerprint(tmp_path / "two") != first
    (tmp_path / "two" / "a.mp4").write_bytes(b"y")
    assert fingerprint(tmp_path / "two") == first
    (tmp_path / "two" / "a.mp4").rename(tmp_path / "two" / "c.mp4")
    assert fingerprint(tmp_path / "two") != first
    (tmp_path / "two" / os.fsdecode(b"\xff.mp4")).symlink_to("nowhere")
    assert fingerprint(tmp_path / "two")["num_items"] == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"paths": []}, "a data set needs at least one clip"),
        ({"num_frames": 0}, "num_frames is 0, but must be at least 1"),
        ({"resolution": 0}, "resolution is 0, but must be at least 1"),
        ({"sample_rate": -1}, "sample_rate is -1, but must be at least 1"),
        ({"short_clips": "drop"}, "short_clips is 'drop', but must be stretch or reject"),
    ],
)
def test_wrong_settings(changes, message):
    arguments = {"paths": [Path("a.mp4")], "root": ".", "num_frames": 5, "resolution": 16, "sample_rate": 1}
    with pytest.raises(ValueError, match=f"^{message}$"):
        Clips(**{**arguments, **changes})


# Evaluation samples ---------------------------------------------------------------------------------------------------


def test_evaluation_reads_the_beginning_of_every_clip(folder):
    paths = list_videos(folder)
    clips: SampleSource = EvalClips(paths, folder, num_frames=5, resolution=96, sample_rate=4)
    for index, name in ((0, "b.mp4"), (2, "sub/a.MKV"), (3, "sub/deeper/c.avi")):
        sample = clips.sample(index)
        assert sample["name"] == name and names_of(clips.files_of(index), folder) == [name]
        assert numbers_in(sample["video"]) == [0, 4, 9, 14, 19]
    with pytest.raises(MediaError) as caught:
        clips.sample(1)
    assert str(caught.value) == f"{folder}/short.mp4: clip has 7 frames, num_frames x sample_rate needs 20"


def test_evaluation_crops(tmp_path):
    write_video(tmp_path / "wide.mp4", pan(96, 128)[:5], 25)
    paths = list_videos(tmp_path)
    shapes = [
        tuple(EvalClips(paths, tmp_path, 5, 48, crop_px=crop_px).sample(0)["video"].shape)
        for crop_px in ("square", None, (40, 56))
    ]
    assert shapes == [(3, 5, 48, 48), (3, 5, 48, 64), (3, 5, 40, 56)]


def test_subsets_are_the_first_clips_and_never_too_large(folder):
    paths = list_videos(folder)
    for subset_size, count in ((0, 4), (1, 1), (3, 3), (4, 4), (1000, 4)):
        clips = EvalClips(paths, folder, 5, 16, subset_size=subset_size)
        assert len(clips) == count and list(clips.paths) == paths[:count]
    with pytest.raises(ValueError, match=r"^subset_size is -1, but must be at least 0 \(0 is all\)$"):
        EvalClips(paths, folder, 5, 16, subset_size=-1)


def test_one_bad_clip_is_replaced_by_the_loader(folder, tmp_path):
    from common.data import SampleLoader

    (tmp_path / "zero.mp4").touch()
    for name in ("x.mp4", "y.mp4"):
        (tmp_path / name).symlink_to(folder / "b.mp4")
    clips = Clips(list_videos(tmp_path), tmp_path, 5, 16, 2, short_clips="reject")
    plan = SamplePlan(len(clips), seed=0, global_batch=3)
    loader = SampleLoader(
        clips, plan, micro_batch=3, rank=0, world_size=1, num_workers=0, bad_samples_path=tmp_path / "bad.jsonl",
        max_bad_fraction=0.5,
    )  # fmt: skip
    (batch,) = loader.batches(0, 1)
    assert batch["video"].shape == (3, 3, 5, 16, 16) and len(loader.bad_items) == 1
    assert f"{tmp_path}/zero.mp4: the file is empty (0 bytes)" in (tmp_path / "bad.jsonl").read_text()


def test_reading_ahead_in_threads_keeps_the_order_and_names_what_failed():
    started = []

    def read(index: int) -> int:
        started.append(index)
        if index == 2:
            raise MediaError("b.mp4", "is broken")
        return 10 * index

    reading = read_in_threads(read, range(100), 3)
    assert [next(reading) for _ in range(4)] == [(0, 0, ""), (1, 10, ""), (2, None, "b.mp4: is broken"), (3, 30, "")]
    reading.close()
    assert len(started) <= 4 + 3
    assert list(read_in_threads(read, [5], 0)) == [(5, 50, "")]
    with pytest.raises(ZeroDivisionError):  # a mistake of the program is no unreadable clip
        list(read_in_threads(lambda index: 1 // index, [0], 2))
