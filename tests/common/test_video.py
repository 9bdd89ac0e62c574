"""Images and clips: the same pixels from both libraries, whole files, clear errors."""

import gc
import os
import pickle
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from skimage import data

from common import video
from common.video import (
    MediaError,
    contact_sheet,
    image_size,
    load_image,
    probe_video,
    read_frames,
    save_image,
    to_uint8,
    write_video,
)

av = pytest.importorskip("av")
av.logging.set_level(av.logging.PANIC)  # damaged files make FFmpeg talk

NUM_FRAMES = 40
MARK_PX = 8
HAS_DECORD = video._decord() is not None

# Images ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def photo() -> np.ndarray:
    return np.ascontiguousarray(data.astronaut()[100:148, 150:214])  # (48, 64, 3)


def saved(image: Image.Image, path: Path, **options) -> Path:
    image.save(path, **options)
    return path


def count_open(kind: str) -> int:
    """Open files ("fd") or threads ("task") of this process; 0 where the system does not tell."""
    return len(os.listdir(f"/proc/self/{kind}")) if os.path.isdir("/proc/self") else 0


def test_rgb_image_is_read_exactly_and_closed(photo, tmp_path):
    path = saved(Image.fromarray(photo), tmp_path / "photo.png")
    open_before = count_open("fd")
    image = load_image(path)
    assert image.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(image), photo)
    assert count_open("fd") == open_before


def test_alpha_is_dropped_or_composited(photo, tmp_path):
    alpha = np.full(photo.shape[:2], 51, np.uint8)  # 0.2
    path = saved(Image.fromarray(np.dstack([photo, alpha])), tmp_path / "alpha.png")
    np.testing.assert_array_equal(np.asarray(load_image(path)), photo)
    white = np.asarray(load_image(path, background=(255, 255, 255))).astype(float)
    assert np.abs(white - (0.2 * photo + 0.8 * 255)).max() <= 1


def test_grey_with_alpha(photo, tmp_path):
    grey = photo[..., 0]
    path = saved(Image.fromarray(np.dstack([grey, grey])), tmp_path / "la.png")
    np.testing.assert_array_equal(np.asarray(load_image(path)), np.dstack([grey] * 3))


def test_sixteen_bit_grey_is_scaled_not_clipped(tmp_path):
    values = np.array([[0, 257, 32896, 65535]], np.uint16)
    path = saved(Image.fromarray(values), tmp_path / "grey16.png")
    np.testing.assert_array_equal(np.asarray(load_image(path))[0], [[0] * 3, [1] * 3, [128] * 3, [255] * 3])


def test_palette_with_transparency(tmp_path):
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putdata([0, 1])
    path = saved(image, tmp_path / "palette.png", transparency=bytes([0, 255]))
    np.testing.assert_array_equal(np.asarray(load_image(path))[0], [[10, 20, 30], [200, 100, 50]])
    np.testing.assert_array_equal(np.asarray(load_image(path, (1, 2, 3)))[0], [[1, 2, 3], [200, 100, 50]])


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp"])
@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_exif_orientation(photo, tmp_path, suffix, orientation):
    exif = Image.Exif()
    exif[video.EXIF_ORIENTATION] = orientation
    path = saved(Image.fromarray(photo), tmp_path / f"turned{suffix}", exif=exif)
    image = load_image(path)
    expected = np.rot90(photo, {1: 0, 3: 2, 6: -1, 8: 1}[orientation])
    assert image.size == image_size(path) == (expected.shape[1], expected.shape[0])
    assert np.abs(np.asarray(image).astype(int) - expected).mean() < 8  # JPEG and WebP lose a little


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "no such file"),
        (b"", "the file is empty (0 bytes)"),
        (b"not an image at all", "cannot be read as an image (UnidentifiedImageError"),
        ("half", "cannot be read as an image (OSError: image file is truncated"),
        ("flipped", "cannot be read as an image ("),
    ],
)
def test_broken_images_name_path_and_reason(photo, tmp_path, content, reason):
    path = tmp_path / "broken.png"
    whole = saved(Image.fromarray(photo), tmp_path / "whole.png").read_bytes()
    if content == "half":
        content = whole[: len(whole) // 2]
    if content == "flipped":
        at = whole.index(b"IDAT") + 4
        content = whole[:at] + bytes(255 - b for b in whole[at : at + 200]) + whole[at + 200 :]
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(MediaError) as raised:
        load_image(path)
    assert str(raised.value).startswith(f"{path}: {reason}")
    assert isinstance(raised.value, ValueError)


def test_folder_is_no_image(tmp_path):
    with pytest.raises(MediaError, match="is not a file"):
        image_size(tmp_path)


def test_size_comes_from_the_header_alone(photo, tmp_path):
    whole = saved(Image.fromarray(photo), tmp_path / "whole.png").read_bytes()
    (tmp_path / "head.png").write_bytes(whole[: whole.index(b"IDAT") + 8])
    assert image_size(tmp_path / "head.png") == (64, 48)
    (tmp_path / "text.png").write_bytes(b"hello")
    with pytest.raises(MediaError, match="text.png: has no readable image header"):
        image_size(tmp_path / "text.png")


def test_media_error_survives_pickling():
    error = pickle.loads(pickle.dumps(MediaError("a/b.png", "is broken")))
    assert (str(error), error.path, error.reason) == ("a/b.png: is broken", "a/b.png", "is broken")


def test_to_uint8():
    chw = torch.tensor([-0.1, 0.0, 0.5, 1.2]).view(1, 1, 4)
    np.testing.assert_array_equal(to_uint8(chw)[0], [[0] * 3, [0] * 3, [128] * 3, [255] * 3])
    assert to_uint8(np.zeros((5, 4, 1), np.uint8)).shape == (5, 4)
    assert to_uint8(torch.zeros(3, 5, 4, dtype=torch.bfloat16)).shape == (5, 4, 3)
    with pytest.raises(ValueError, match=r"must be uint8 \(H, W, C\) or float .*, got float64 \(4, 5, 3\)"):
        to_uint8(np.zeros((4, 5, 3)))
    with pytest.raises(ValueError, match="holds 1 values that are not finite"):
        to_uint8(torch.tensor([float("nan"), 0.0]).view(1, 1, 2))


def test_save_image_is_atomic_and_makes_folders(photo, tmp_path):
    path = tmp_path / "a" / "b" / "photo.png"
    save_image(path, photo)
    np.testing.assert_array_equal(np.asarray(load_image(path)), photo)
    save_image(path, torch.from_numpy(photo).permute(2, 0, 1) / 255)
    np.testing.assert_array_equal(np.asarray(load_image(path)), photo)
    with pytest.raises(ValueError, match="unknown file extension"):
        save_image(path.with_suffix(".nonsense"), photo)
    assert [p.name for p in path.parent.iterdir()] == ["photo.png"]


def test_contact_sheet_places_cells_and_labels():
    red, blue = np.zeros((10, 20, 3), np.uint8), np.zeros((40, 40, 3), np.uint8)
    red[..., 0], blue[..., 2] = 255, 255
    sheet = contact_sheet([[red, blue], [blue]], cell_height_px=20, gap_px=4)
    # One height (20 px) for all: red becomes 40 x 20, blue 20 x 20, its column mate is 40 wide.
    assert sheet.shape == (4 + 2 * 24, 4 + 40 + 4 + 20 + 4, 3) and sheet.dtype == np.uint8
    assert (sheet[4:24, 4:44] == [255, 0, 0]).all() and (sheet[4:24, 48:68] == [0, 0, 255]).all()
    assert (sheet[28:48, 4:24] == [0, 0, 255]).all() and (sheet[28:48, 24:] == 255).all()
    labelled = contact_sheet([[red, blue]], ["render", "truth"], ["first"], cell_height_px=20)
    assert (labelled[:16] != 255).any() and labelled.shape[1] > sheet.shape[1]
    assert (labelled[-24:-4, -24:-4] == [0, 0, 255]).any(axis=2).any()
    with pytest.raises(ValueError, match="labels has 1 entries for 2 columns"):
        contact_sheet([[red, blue]], ["render"])
    with pytest.raises(ValueError, match="at least one image"):
        contact_sheet([])


# Clips ----------------------------------------------------------------------------------------------------------------


def pan(height_px: int, width_px: int) -> np.ndarray:
    """Frames of a camera that pans over a photograph, each with its number in binary in the top left corner."""
    photograph = data.astronaut()
    frames = []
    for number in range(NUM_FRAMES):
        y, x = 3 * number, 5 * number
        frame = photograph[y : y + height_px, x : x + width_px].copy()
        for bit in range(6):
            frame[:MARK_PX, bit * MARK_PX : (bit + 1) * MARK_PX] = 255 * (number >> bit & 1)
        frames.append(frame)
    return np.stack(frames)  # (T, H, W, 3)


def number_of(frame: np.ndarray) -> int:
    """The number that `pan` wrote into a frame."""
    marks = [frame[2:6, bit * MARK_PX + 2 : bit * MARK_PX + 6].mean() > 128 for bit in range(6)]
    return sum(1 << bit for bit, mark in enumerate(marks) if mark)


def encode(
    path, frames, codec="libx264", pix_fmt="yuv420p", options=None, first_pts=0, pts_ms=None, rotation=0, container=None
) -> Path:
    with av.open(str(path), "w", container_options=container or {}) as file:
        stream = file.add_stream(codec, rate=25, options=options or {})
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], pix_fmt
        if rotation:
            stream.set_display_rotation(rotation)
        if pts_ms is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        for number, array in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(array, format="rgb24")
            frame.pts = number + first_pts if pts_ms is None else int(pts_ms[number])
            frame.time_base = Fraction(1, 25 if pts_ms is None else 1000)
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    return path


def decode_all(path) -> np.ndarray:
    """All frames in presentation order: the plain loop without a seek that everything else is held against."""
    with av.open(str(path)) as file:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)])


B_FRAMES = {"bf": "3", "g": "12"}
QUICK_VP9 = {"g": "12", "cpu-used": "8", "deadline": "realtime"}
VARIABLE_MS = np.cumsum([0] + [20 + 37 * i % 60 for i in range(NUM_FRAMES - 1)])
X265 = {"g": "12", "x265-params": "log-level=none"}
EVEN, ODD = (96, 128), (95, 127)

# name: (size, options of `encode`, is decord exact?)
CLIPS = {
    "b_frames.mp4": (EVEN, {"options": B_FRAMES}, True),
    "b_frames.mkv": (EVEN, {"options": B_FRAMES}, True),
    "one_keyframe.mp4": (EVEN, {"options": {"bf": "3", "g": "250"}}, True),
    "fragmented.mp4": (EVEN, {"options": B_FRAMES, "container": {"movflags": "frag_keyframe+empty_moov"}}, True),
    "late_start.mp4": (EVEN, {"options": B_FRAMES, "first_pts": 50}, True),
    "late_start.mkv": (EVEN, {"options": B_FRAMES, "first_pts": 50}, True),
    "variable_rate.mp4": (EVEN, {"options": B_FRAMES, "pts_ms": VARIABLE_MS}, True),
    "variable_rate.mkv": (EVEN, {"options": B_FRAMES, "pts_ms": VARIABLE_MS}, True),
    "vp9.webm": (EVEN, {"codec": "libvpx-vp9", "options": QUICK_VP9}, True),
    "full_range.mp4": (EVEN, {"pix_fmt": "yuvj420p", "options": B_FRAMES}, True),
    "open_gop.mp4": (EVEN, {"options": {"bf": "3", "x264-params": "open-gop=1:keyint=12:scenecut=0"}}, False),
    "intra_refresh.mkv": (EVEN, {"options": {"x264-params": "intra-refresh=1:keyint=10:bframes=0"}}, False),
    "hevc.mp4": (EVEN, {"codec": "libx265", "options": X265}, False),
    "mpeg4.avi": (EVEN, {"codec": "mpeg4", "options": {"g": "12"}}, False),
    "mpeg4_b_frames.avi": (EVEN, {"codec": "mpeg4", "options": {"g": "12", "bf": "2"}}, False),
    "mpeg4_b_frames.mp4": (EVEN, {"codec": "mpeg4", "options": {"g": "12", "bf": "2"}}, False),
    "h264_b_frames.avi": (EVEN, {"options": B_FRAMES}, False),
    "transport.ts": (EVEN, {"options": B_FRAMES}, False),
    "raw.h264": (EVEN, {"options": B_FRAMES}, False),
    "ten_bit.mp4": (EVEN, {"pix_fmt": "yuv420p10le", "options": B_FRAMES}, False),
    "odd.webm": (ODD, {"codec": "libvpx-vp9", "options": QUICK_VP9}, False),
    "odd.mp4": (ODD, {"pix_fmt": "yuv444p", "options": B_FRAMES}, False),
    "odd.avi": (ODD, {"codec": "mjpeg", "pix_fmt": "yuvj420p"}, False),
}


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("clips")
    frames = {size: pan(*size) for size in (EVEN, ODD)}
    return {name: encode(folder / name, frames[size], **options) for name, (size, options, _) in CLIPS.items()}


@pytest.mark.parametrize("name", CLIPS)
def test_both_backends_return_the_frames_of_a_plain_loop(clips, name):
    (height, width), _, decord_is_exact = CLIPS[name]
    truth = decode_all(clips[name])
    assert [number_of(frame) for frame in truth] == list(range(NUM_FRAMES))
    info = probe_video(clips[name])
    assert (info.num_frames, info.height_px, info.width_px) == (NUM_FRAMES, height, width)
    assert info.backend == ("decord" if decord_is_exact and HAS_DECORD else "pyav")

    indices = np.random.default_rng(0).integers(0, NUM_FRAMES, 25).tolist() + [0, NUM_FRAMES - 1, 0]
    for wanted in (indices, [NUM_FRAMES - 1], [13], range(11, 14)):
        for backend in ("auto", "pyav"):
            np.testing.assert_array_equal(read_frames(clips[name], wanted, backend=backend), truth[list(wanted)])
        if decord_is_exact and HAS_DECORD:
            np.testing.assert_array_equal(read_frames(clips[name], wanted, backend="decord"), truth[list(wanted)])
    if not decord_is_exact and HAS_DECORD:
        with pytest.raises(
            MediaError, match=r"cannot be read exactly with decord \(.+\); use backend 'auto' or 'pyav'"
        ):
            read_frames(clips[name], [0], backend="decord")


def test_frame_rates(clips):
    assert probe_video(clips["b_frames.mp4"]).fps == 25
    assert probe_video(clips["late_start.mkv"]).fps == 25
    expected = (NUM_FRAMES - 1) / (VARIABLE_MS[-1] / 1000)
    for name in ("variable_rate.mp4", "variable_rate.mkv"):
        assert probe_video(clips[name]).fps == pytest.approx(expected, rel=1e-6)


def test_edit_list_hides_frames(tmp_path):
    path = encode(
        tmp_path / "cut.mp4", pan(*EVEN), options=B_FRAMES, first_pts=-5, container={"avoid_negative_ts": "disabled"}
    )
    assert probe_video(path).num_frames == NUM_FRAMES - 5
    assert [number_of(f) for f in read_frames(path, [0, 34, 20])] == [5, 39, 25]


@pytest.mark.parametrize("name", ["open_gop.mp4", "hevc.mp4"])
def test_clip_cut_inside_an_open_gop_starts_at_its_first_keyframe(clips, tmp_path, name):
    path, keyframes = tmp_path / "cut.mkv", 0  # MP4 would hide the frames before the keyframe by an edit list
    with av.open(str(clips[name])) as source, av.open(str(path), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            keyframes += packet.is_keyframe
            if packet.size and keyframes >= 2:
                packet.stream = stream
                target.mux(packet)
    count = probe_video(path).num_frames
    assert [number_of(f) for f in read_frames(path, range(count))] == list(range(NUM_FRAMES - count, NUM_FRAMES))
    assert 20 <= count < NUM_FRAMES
    with av.open(str(path)) as file:
        assert sum(packet.size > 0 for packet in file.demux(video=0)) > count


@pytest.mark.parametrize("rotation", [90, 180, -90])
def test_display_rotation_is_applied(clips, tmp_path, rotation):
    path = encode(tmp_path / "turned.mp4", pan(*EVEN), options=B_FRAMES, rotation=rotation)
    with av.open(str(path)) as file:
        turns = round(next(file.decode(video=0)).rotation / 90)
    assert turns != 0
    expected = np.rot90(decode_all(path)[[3, 30]], turns, axes=(1, 2))
    info = probe_video(path)
    assert (info.height_px, info.width_px) == expected.shape[1:3]
    for backend in ("pyav", "decord") if HAS_DECORD else ("pyav",):
        np.testing.assert_array_equal(read_frames(path, [3, 30], backend=backend), expected)


def test_resizing_is_the_same_for_both_backends(clips):
    path = clips["b_frames.mp4"]
    native = read_frames(path, [7, 21])
    expected = [np.asarray(Image.fromarray(f).resize((50, 30), Image.Resampling.BILINEAR)) for f in native]
    for backend in ("auto", "pyav"):
        resized = read_frames(path, [7, 21], height_px=30, width_px=50, backend=backend)
        np.testing.assert_array_equal(resized, expected)
    assert read_frames(path, [0], height_px=48).shape == (1, 48, 64, 3)
    assert read_frames(path, [0], width_px=32).shape == (1, 24, 32, 3)
    assert read_frames(path, [], width_px=32).shape == (0, 24, 32, 3)
    with pytest.raises(ValueError, match="height_px is 0, but must be at least 1"):
        read_frames(path, [0], height_px=0)


@pytest.mark.parametrize("backend", ["auto", "pyav"])
@pytest.mark.parametrize("index", [-1, NUM_FRAMES])
def test_index_out_of_range_says_how_many_frames_there_are(clips, backend, index):
    with pytest.raises(IndexError, match=f"frame {index} was asked for, but the clip has {NUM_FRAMES} frames"):
        read_frames(clips["b_frames.mp4"], [0, index], backend=backend)


def test_pyav_seeks_instead_of_decoding_from_the_start(clips, monkeypatch):
    path = clips["b_frames.mp4"]
    probe_video(path)
    decoded, plain = [], video._decode_until

    def counted(path, frames, index, numbers):
        return plain(path, (decoded.append(frame.pts) or frame for frame in frames), index, numbers)

    monkeypatch.setattr(video, "_decode_until", counted)
    assert [number_of(frame) for frame in read_frames(path, [38, 1], backend="pyav")] == [38, 1]
    assert len(decoded) == 2 + 3  # frames 0 and 1; 36 (a keyframe) to 38


def test_unknown_backend(clips):
    with pytest.raises(ValueError, match="backend is 'opencv', but must be one of auto, decord, pyav"):
        read_frames(clips["b_frames.mp4"], [0], backend="opencv")


def test_without_decord_pyav_reads(clips, monkeypatch):
    expected = read_frames(clips["b_frames.mp4"], [5, 30])
    monkeypatch.setattr(video, "_decord", lambda: None)
    assert probe_video(clips["b_frames.mp4"]).backend == "pyav"
    np.testing.assert_array_equal(read_frames(clips["b_frames.mp4"], [5, 30]), expected)
    with pytest.raises(MediaError, match="decord is not installed"):
        read_frames(clips["b_frames.mp4"], [0], backend="decord")


@pytest.mark.parametrize("name", ["b_frames.mp4", "b_frames.mkv", "vp9.webm", "mpeg4.avi", "transport.ts"])
@pytest.mark.parametrize("backend", ["auto", "pyav"])
def test_truncated_clips(clips, tmp_path, name, backend):
    whole = clips[name].read_bytes()
    path = tmp_path / name
    path.write_bytes(whole[: int(0.7 * len(whole))])
    if name == "transport.ts":  # a stream announces no length: what is there can be read
        assert 20 < probe_video(path).num_frames < NUM_FRAMES
        return
    reason = "cannot be read as video" if name.endswith("mp4") else "truncated: the header announces"
    for read in (probe_video, lambda p: read_frames(p, [0], backend=backend)):
        with pytest.raises(MediaError) as raised:
            read(path)
        assert str(raised.value).startswith(f"{path}: {reason}")


def test_truncated_clip_with_its_header_in_front(tmp_path):
    path = encode(tmp_path / "fast.mp4", pan(*EVEN), options=B_FRAMES, container={"movflags": "faststart"})
    whole = path.read_bytes()
    path.write_bytes(whole[: int(0.7 * len(whole))])
    with pytest.raises(MediaError, match=rf"truncated: the header announces {NUM_FRAMES} frames, \d+ are in the file"):
        read_frames(path, [0])


def test_damage_inside_a_clip_is_not_patched_up(clips, tmp_path):
    """PyAV alone: FFmpeg's default, which decord keeps, is to guess what is damaged."""
    with av.open(str(clips["b_frames.mp4"])) as file:
        keyframe = [packet for packet in file.demux(video=0) if packet.is_keyframe][2]
        start, stop = keyframe.pos + keyframe.size // 4, keyframe.pos + keyframe.size
    content = bytearray(clips["b_frames.mp4"].read_bytes())
    content[start:stop] = np.random.default_rng(0).integers(0, 256, stop - start, dtype=np.uint8).tobytes()
    path = tmp_path / "damaged.mp4"
    path.write_bytes(content)
    truth = decode_all(clips["b_frames.mp4"])
    for sound in ([0, 5], [38]):  # before the damage, and from a later keyframe on
        np.testing.assert_array_equal(read_frames(path, sound, backend="pyav"), truth[sound])
    for damaged in ([24], [30], range(NUM_FRAMES)):
        with pytest.raises(MediaError, match=f"^{path}: (cannot be read as video|frame .* is damaged)"):
            read_frames(path, damaged, backend="pyav")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "no such file"),
        (b"", "the file is empty"),
        (b"this is no clip " * 40, "cannot be read as video \\(InvalidDataError"),
    ],
)
def test_files_that_are_no_clips(tmp_path, content, reason):
    path = tmp_path / "clip.mp4"
    if content is not None:
        path.write_bytes(content)
    for read in (probe_video, lambda p: read_frames(p, [0])):
        with pytest.raises(MediaError, match=f"^{path}: {reason}"):
            read(path)


def test_audio_only_file(tmp_path):
    path = tmp_path / "sound.mp4"
    with av.open(str(path), "w") as file:
        stream = file.add_stream("aac", rate=16000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.rate = 16000
        file.mux(stream.encode(frame))
        file.mux(stream.encode())
    with pytest.raises(MediaError, match="holds no video stream"):
        probe_video(path)


def test_a_replaced_file_is_read_anew(tmp_path):
    frames = pan(*EVEN)
    path = tmp_path / "clip.mp4"
    write_video(path, frames[:10], 25)
    assert probe_video(path).num_frames == 10
    write_video(path, frames[:25], 25)
    assert probe_video(path).num_frames == 25


@pytest.mark.parametrize("backend", ["auto", "pyav"])
def test_reading_leaves_no_threads_or_files_open(clips, backend):
    read_frames(clips["b_frames.mp4"], [0], backend=backend)
    gc.collect()
    threads, files = count_open("task"), count_open("fd")
    for _ in range(20):
        read_frames(clips["b_frames.mp4"], [0, 20], backend=backend)
    assert count_open("task") <= threads
    assert count_open("fd") <= files


@pytest.mark.parametrize("size", [EVEN, ODD])
def test_written_clips_come_back(tmp_path, size):
    frames = pan(*size)
    path = tmp_path / "new" / "clip.mp4"
    write_video(path, torch.from_numpy(frames), 24)
    info = probe_video(path)
    assert (info.num_frames, info.fps) == (NUM_FRAMES, 24)
    assert (info.height_px, info.width_px) == (96, 128)  # odd sizes: the last row and column are repeated
    actual = read_frames(path, range(NUM_FRAMES)).astype(float)
    assert [number_of(frame) for frame in actual] == list(range(NUM_FRAMES))
    mse = np.square(actual[:, : size[0], : size[1]] - frames).mean()
    assert 10 * np.log10(255**2 / mse) > 30  # chroma at half size limits a photograph to some 35 dB
    assert [p.name for p in path.parent.iterdir()] == ["clip.mp4"]
    with av.open(str(path)) as file:
        assert file.streams.video[0].codec_context.pix_fmt == "yuv420p"


def test_fractional_rate(tmp_path):
    write_video(tmp_path / "ntsc.mp4", pan(*EVEN)[:30], 30000 / 1001)
    assert probe_video(tmp_path / "ntsc.mp4").fps == pytest.approx(30000 / 1001, rel=1e-9)


def test_write_video_refuses_and_leaves_nothing(tmp_path):
    path = tmp_path / "clip.mp4"
    with pytest.raises(
        ValueError, match=r"frames must be uint8 \(T, H, W, 3\) with T >= 1, got float64 \(2, 4, 4, 3\)"
    ):
        write_video(path, np.zeros((2, 4, 4, 3)), 25)
    with pytest.raises(ValueError, match="got uint8"):
        write_video(path, np.zeros((0, 4, 4, 3), np.uint8), 25)
    with pytest.raises(ValueError, match="fps is 0, but must be above 0"):
        write_video(path, np.zeros((1, 4, 4, 3), np.uint8), 0)
    with pytest.raises(Exception, match="no_such_codec"):
        write_video(path, np.zeros((1, 4, 4, 3), np.uint8), 25, codec="no_such_codec")
    assert list(tmp_path.iterdir()) == []


def test_clips_that_decord_refuses_are_read_with_pyav(tmp_path):
    """decord ends a clip of 16 x 16 px with an error of its own."""
    frames = np.random.default_rng(0).integers(0, 256, (8, 16, 16, 3), dtype=np.uint8)
    write_video(tmp_path / "small.mp4", frames, fps=8)
    read = read_frames(tmp_path / "small.mp4", [0, 7, 3])
    np.testing.assert_array_equal(read, read_frames(tmp_path / "small.mp4", [0, 7, 3], backend="pyav"))
