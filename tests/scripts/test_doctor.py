import faulthandler
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import doctor
import numpy as np
import pytest
from PIL import Image

from common.doctor import Item, Result, scan
from common.video import write_video
from mvdiffusion.data.mvds import find_objects
from mvdiffusion.data.poses import fixed_poses
from mvdiffusion.views import VIEW_LISTS
from training_ggi.data import read_scenes
from vae.data import list_videos

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests" / "common"))
from spheres import write_object  # noqa: E402
from test_video import CLIPS, NUM_FRAMES, encode, pan  # noqa: E402


def deed(content: str) -> None:
    """Does what the content says: a check function with every way to fail."""
    word, _, argument = content.partition(" ")
    if word == "kill":
        faulthandler.disable()  # pytest's would print where the crash was
        os.kill(os.getpid(), getattr(signal, argument))
    elif word == "exit":
        os._exit(int(argument))
    elif word == "sleep":
        time.sleep(float(argument))
    elif word == "raise":
        raise {"ValueError": ValueError("bad pixels"), "KeyError": KeyError("missing")}[argument]
    elif word == "first":  # fails only in a process that has done something before
        if hasattr(deed, "used"):
            os._exit(7)
    elif word == "interrupt":
        os.kill(os.getppid(), signal.SIGINT)
        time.sleep(30)
    deed.used = True


def items_of(*contents: str) -> list[Item]:
    return [Item(f"{number} {content}", (), content) for number, content in enumerate(contents)]


def run(*contents: str, processes: int = 1, timeout_s: float = 30) -> list[Result]:
    return scan(items_of(*contents), deed, processes, timeout_s, lambda index, result: None)


# The engine


@pytest.mark.parametrize("processes", [1, 2, 5])
def test_results_are_complete_and_in_order_whatever_happens_to_the_children(processes):
    contents = [
        "fine",
        "kill SIGSEGV",
        "sleep 30",
        "raise ValueError",
        "kill SIGKILL",
        "exit 3",
        "raise KeyError",
        "ok",
    ]
    told = []
    items = items_of(*contents)
    results = scan(items, deed, processes, 0.5, lambda index, result: told.append((index, result)))
    assert [result.name for result in results] == [item.name for item in items]
    assert [result.reason for result in results] == [
        "",
        "checking it ends the process with SIGSEGV",
        "checking it takes more than 0.5 s",
        "bad pixels",
        "checking it ends the process with SIGKILL (the machine may be short of memory)",
        "checking it ends the process with status 3",
        "KeyError: 'missing'",
        "",
    ]
    assert [result.ok for result in results] == [not result.reason for result in results]
    assert 0.5 <= results[2].seconds < 10
    assert sorted(told, key=lambda entry: entry[0]) == list(enumerate(results))
    assert multiprocessing.active_children() == []


def test_one_slow_item_does_not_hold_up_the_others():
    order = []
    scan(items_of("sleep 1", "ok", "ok", "ok"), deed, 2, 30, lambda index, result: order.append(index))
    assert order == [1, 2, 3, 0]


def test_an_item_that_a_used_process_fails_at_is_tried_in_a_new_one():
    assert [result.reason for result in run("ok", "first", "ok")] == ["", "", ""]


def test_no_items_need_no_process():
    assert run() == []


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match=r"^processes is 0, but must be at least 1$"):
        run("ok", processes=0)
    with pytest.raises(ValueError, match=r"^timeout_s is 0, but must be above 0 and finite$"):
        run("ok", timeout_s=0)


def test_an_error_of_the_caller_leaves_no_child():
    def stop(index: int, result: Result) -> None:
        raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        scan(items_of("ok", "sleep 30"), deed, 2, 60, stop)
    assert multiprocessing.active_children() == []


PARENT_THAT_DIES = """
import os, signal, time
from common.doctor import Item, scan

def check(content):
    os.write(1, b"begun ")
    time.sleep(content)

def die(index, result):
    time.sleep(0.3)  # the other child has begun
    os.kill(os.getpid(), signal.SIGKILL)

scan([Item("a", (), 0.2), Item("b", (), 0.7)], check, 2, 60, die)
"""


def test_children_end_when_their_parent_is_killed():
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    # The pipe of stdout stays open as long as a child lives: `run` returns when the last one has ended.
    done = subprocess.run(
        [sys.executable, "-c", PARENT_THAT_DIES], env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == -signal.SIGKILL
    assert done.stdout == "begun begun "
    assert done.stderr == ""


# The command


@pytest.fixture
def made_up(monkeypatch):
    """A kind whose items are the lines of a file, and which runs them as deeds; the file of an item is NAME.txt."""

    def list_lines(path, data_root):
        lines = path.read_text().splitlines()
        return [Item(name, (path.parent / f"{name}.txt",), word) for name, word in (x.split(": ") for x in lines)]

    monkeypatch.setitem(doctor.KINDS, "deeds", (list_lines, deed))


def deeds(folder: Path, **words: str) -> Path:
    for name in words:
        (folder / f"{name}.txt").write_text(name)
    path = folder / "deeds"
    path.write_text("".join(f"{name}: {word}\n" for name, word in words.items()))
    return path


def records(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "results.jsonl").read_text().splitlines()]


def test_results_report_and_allow_list(made_up, tmp_path, capsys):
    path, output = (
        deeds(tmp_path, a="ok", b="kill SIGSEGV", c="raise ValueError", d="ok", e="raise ValueError"),
        tmp_path,
    )
    assert doctor.main(["deeds", str(path), "--output", str(output / "out")]) == 1
    out = output / "out"
    assert (out / "allow-list.txt").read_text() == "a\nd\n"
    crash = "checking it ends the process with SIGSEGV"
    assert json.loads((out / "report.json").read_text()) == {
        "kind": "deeds",
        "items": 5,
        "usable": 2,
        "unusable": 3,
        "reasons": [{"reason": "bad pixels", "items": 2}, {"reason": crash, "items": 1}],
        "unusable_items": [
            {"name": "b", "reason": crash},
            {"name": "c", "reason": "bad pixels"},
            {"name": "e", "reason": "bad pixels"},
        ],
    }
    found = {record["name"]: (record["ok"], record["reason"]) for record in records(out)}
    assert found == {
        "a": (True, ""), "b": (False, crash), "c": (False, "bad pixels"), "d": (True, ""), "e": (False, "bad pixels"),
    }  # fmt: skip
    assert all(record["seconds"] >= 0 for record in records(out))
    assert capsys.readouterr().out == (
        f"2 of 5 items are usable: {out}/allow-list.txt\n3 are not: {out}/report.json\n"
        f"       2  bad pixels\n       1  {crash}\n"
    )
    assert {file.name for file in out.iterdir()} == {"results.jsonl", "allow-list.txt", "report.json"}


def test_a_second_run_looks_at_new_and_changed_files_alone(made_up, tmp_path):
    path, out = deeds(tmp_path, a="ok", b="raise ValueError"), tmp_path / "out"
    command = ["deeds", str(path), "--output", str(out)]
    assert doctor.main(command) == 1
    path.write_text("a: raise ValueError\nb: ok\nc: ok\n")  # unseen: the files of a and b are as before
    (tmp_path / "c.txt").write_text("c")
    assert doctor.main(command) == 1
    assert [record["name"] for record in records(out)][2:] == ["c"]
    assert (out / "allow-list.txt").read_text() == "a\nc\n"
    os.utime(tmp_path / "b.txt", ns=(0, 0))
    assert doctor.main(command) == 0
    assert [record["name"] for record in records(out)][3:] == ["b"]
    assert doctor.main([*command, "--again"]) == 1
    assert sorted(record["name"] for record in records(out)[4:]) == ["a", "b", "c"]
    assert (out / "allow-list.txt").read_text() == "b\nc\n"


def test_a_longer_time_out_tries_failed_items_again(made_up, tmp_path):
    path, out = deeds(tmp_path, a="sleep 1", b="ok"), tmp_path / "out"
    command = ["deeds", str(path), "--output", str(out), "--timeout_s"]
    assert doctor.main([*command, "0.3"]) == 1
    assert doctor.main([*command, "0.2"]) == 1
    assert len(records(out)) == 2
    assert doctor.main([*command, "30"]) == 0
    assert [record["name"] for record in records(out)[2:]] == ["a"]


def test_a_torn_last_line_costs_one_item(made_up, tmp_path):
    path, out = deeds(tmp_path, a="ok", b="ok"), tmp_path / "out"
    command = ["deeds", str(path), "--output", str(out), "--processes", "1"]
    assert doctor.main(command) == 0
    lines = (out / "results.jsonl").read_bytes()
    (out / "results.jsonl").write_bytes(lines[:-20])
    assert doctor.main(command) == 0
    first, torn, second = (out / "results.jsonl").read_text().splitlines()
    assert [json.loads(first)["name"], json.loads(second)["name"]] == ["a", "b"]
    assert torn.encode() == lines[:-20].splitlines()[1]
    assert (out / "allow-list.txt").read_text() == "a\nb\n"


def test_ctrl_c_keeps_what_is_done(made_up, tmp_path, capsys):
    path, out = deeds(tmp_path, a="ok", b="interrupt", c="ok"), tmp_path / "out"
    command = ["deeds", str(path), "--output", str(out), "--processes", "1"]
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs of a shell ignore it
    try:
        assert doctor.main(command) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    assert f"stopped; what is done is kept in {out}: run it again to go on\n" in capsys.readouterr().err
    assert [record["name"] for record in records(out)] == ["a"]
    assert not (out / "allow-list.txt").exists()
    assert multiprocessing.active_children() == []
    path.write_text("a: ok\nb: ok\nc: ok\n")
    assert doctor.main(command) == 0
    assert [record["name"] for record in records(out)] == ["a", "b", "c"]


def test_reasons_are_grouped_without_files_and_numbers():
    items = [Item(name, (Path("x") / name,), None) for name in ("a", "b", "c")]
    reasons = ["x/a: is 3x40 px, by 1.5 s", "", "x/c: is 12x5 px, by 2 s"]
    results = [Result(item.name, not reason, reason, 0) for item, reason in zip(items, reasons, strict=True)]
    assert doctor.grouped_reasons(items, results) == [("FILE: is N px, by N s", 2)]


# Wrong usage


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["videos", "absent"], "doctor: absent is not a folder; videos needs the folder that the clips are in\n"),
        (
            ["videos", "."],
            "doctor: . holds no clip; looked for *.mp4, *.avi, *.webm, *.mkv, *.mov, *.m4v, *.png, *.jpg, *.jpeg, "
            "*.webp, *.bmp in it and the folders in it\n",
        ),
        (
            ["videos", ".", "--data_root", "x"],
            "doctor: --data_root is for pairs, views and scenes; the clips of videos are searched in PATH itself\n",
        ),
        (["videos", ".", "--processes", "0"], "doctor: --processes is 0, but must be at least 1\n"),
        (["videos", ".", "--min_frames", "0"], "doctor: --min_frames is 0, but must be at least 1\n"),
        (["pairs", "x.json", "--min_side_px", "64"], "doctor: --min_side_px is for videos\n"),
        (["views", "x", "--min_frames", "2"], "doctor: --min_frames is for videos and scenes\n"),
        (["videos", ".", "--num_views", "2"], "doctor: --num_views is for views\n"),
        (["videos", ".", "--timeout_s", "-2"], "doctor: --timeout_s is -2, but must be above 0 and finite\n"),
    ],
)
def test_wrong_usage_is_one_sentence_and_status_2(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert doctor.main(arguments) == 2
    captured = capsys.readouterr()
    assert (captured.err, captured.out) == (message, "")
    assert list(tmp_path.iterdir()) == []


def test_an_absent_list_and_an_output_that_is_a_file(made_up, tmp_path, capsys):
    assert doctor.main(["pairs", str(tmp_path / "none.json")]) == 2
    assert capsys.readouterr().err.startswith(f"doctor: the list of pairs {tmp_path}/none.json (from ")
    path = deeds(tmp_path, a="ok")
    assert doctor.main(["deeds", str(path), "--output", str(path)]) == 2
    assert capsys.readouterr().err == f"doctor: --output is {path}, which is a file; name a folder\n"


def test_an_unknown_kind_is_refused(capsys):
    with pytest.raises(SystemExit) as caught:
        doctor.main(["audio", "."])
    assert caught.value.code == 2
    assert (
        "argument KIND: invalid choice: 'audio' (choose from 'pairs', 'videos', 'views', 'scenes')"
        in capsys.readouterr().err
    )


# The kinds


def save(path: Path, width_px: int, height_px: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (height_px, width_px, 3), dtype=np.uint8)
    path.parent.mkdir(exist_ok=True, parents=True)
    Image.fromarray(pixels).save(path)


def test_pairs(tmp_path):
    sizes_px = {  # render, gt
        "good": ((120, 90), (240, 180)),
        "cut": ((120, 90), (120, 90)),
        "small": ((120, 90), (80, 60)),
        "wide": ((120, 90), (128, 90)),
        "within": ((120, 90), (125, 90)),
    }
    content: dict = {"train": {}, "test": {}}
    for name, (render_wh, gt_wh) in sizes_px.items():
        save(tmp_path / f"{name}-r.png", *render_wh)
        save(tmp_path / f"{name}-g.png", *gt_wh)
        split = "test" if name in ("good", "wide") else "train"
        content[split][name] = {"image": f"{name}-r.png", "target_image": f"{name}-g.png"}
    content["train"]["good"] = {**content["test"]["good"], "ref_image": "cut-r.png"}
    cut = tmp_path / "cut-r.png"
    cut.write_bytes(cut.read_bytes()[:2000])
    (tmp_path / "pairs.json").write_text(json.dumps(content))
    out = tmp_path / "out"
    command = ["pairs", str(tmp_path / "pairs.json"), "--data_root", str(tmp_path), "--output", str(out)]
    assert doctor.main(command) == 1
    assert (out / "allow-list.txt").read_text() == "within\ntest/good\n"
    report = json.loads((out / "report.json").read_text())
    reasons = {item["name"]: item["reason"] for item in report["unusable_items"]}
    assert list(reasons) == ["cut", "small", "train/good", "wide"]
    assert reasons["cut"].startswith(f"{cut}: cannot be read as an image (")
    assert reasons["train/good"] == reasons["cut"]
    assert reasons["small"] == f"{tmp_path}/small-g.png: gt is 80x60 px, but its sides must be at least 64 px"
    assert reasons["wide"] == (
        f"{tmp_path}/wide-g.png: the aspects of render (120x90 px) and gt (128x90 px) differ by 6.7%, "
        "but may differ by 5% at most"
    )
    assert report["reasons"][0]["items"] == 2  # both that use the damaged file


def test_videos(tmp_path):
    frames = np.random.default_rng(0).integers(0, 256, (12, 48, 64, 3), dtype=np.uint8)
    clips = tmp_path / "clips"
    for name in ("good.mp4", "sub/good.MKV", "sub/cut.mp4"):
        write_video(clips / name.lower(), frames, 12)
    (clips / "sub/good.mkv").rename(clips / "sub/good.MKV")
    data = (clips / "sub/cut.mp4").read_bytes()
    (clips / "sub/cut.mp4").write_bytes(data[: len(data) // 2])
    (clips / "empty.webm").touch()
    (clips / "notes.txt").touch()
    (clips / "sub/loop").symlink_to(clips)
    write_video(clips / "two\nlines.mp4", frames[:1], 12)
    out = tmp_path / "out"
    assert doctor.main(["videos", str(clips), "--output", str(out)]) == 1
    assert (out / "allow-list.txt").read_text() == "good.mp4\nsub/good.MKV\n"
    report = json.loads((out / "report.json").read_text())
    reasons = {item["name"]: item["reason"] for item in report["unusable_items"]}
    assert list(reasons) == ["empty.webm", "sub/cut.mp4", "two\nlines.mp4"]
    assert reasons["empty.webm"] == f"{clips}/empty.webm: the file is empty (0 bytes)"
    assert reasons["sub/cut.mp4"].startswith(f"{clips}/sub/cut.mp4: ")
    assert reasons["two\nlines.mp4"].endswith("a line break, which a list of names cannot hold; rename it")


def test_views(tmp_path):
    views = VIEW_LISTS[2]
    poses, renders = fixed_poses(views, "upright"), tmp_path / "renders"
    bad = ["big", "cut", "full", "grey", "lacks", "nothing", "pose", "world"]
    paths = {}
    for uid in ["good", *bad]:
        found = write_object(renders, uid, views, poses, masks=uid == "grey", pose_files=uid in ("good", "pose"))
        kind = {"big": "normals", "grey": "normals", "world": "normals", "lacks": "normals"}.get(uid, "rgb")
        paths[uid] = found.image(kind, "back")
    write_object(renders, "masked", views, poses, masks=True, tag=3)
    Image.new("RGB", (32, 32), (127, 127, 127)).save(paths["grey"])
    paths["cut"].write_bytes(paths["cut"].read_bytes()[:500])
    paths["lacks"].unlink()
    paths["pose"] = found.folder.parents[1] / "po" / "pose" / "000_back_RT.txt"
    paths["pose"].write_text("1 0 0")
    for uid in ("big", "full", "nothing", "world"):
        pixels = np.array(Image.open(paths[uid]))
        if uid == "world":
            pixels[..., :3] = pixels[..., [0, 2, 1]]  # z up
        elif uid == "big":
            pixels = pixels.repeat(2, 0).repeat(2, 1)
        else:
            pixels[..., 3] = 255 if uid == "full" else 0
        Image.fromarray(pixels).save(paths[uid])
    out = tmp_path / "out"
    command = ["views", str(renders), "--num_views", "2", "--output", str(out)]
    assert doctor.main(command) == 1
    assert (out / "allow-list.txt").read_text() == "good\nmasked\n"
    report = json.loads((out / "report.json").read_text())
    reasons = {item["name"]: item["reason"] for item in report["unusable_items"]}
    assert list(reasons) == bad
    expected = {
        "big": f"{paths['big'].with_name('rgb_000_back.png')}: is 32 px wide, but of the same view are: normals 64, ",
        "cut": f"{paths['cut']}: cannot be read as an image (",
        "full": f"{paths['full']}: all of the image is the object, as its mask or alpha says",
        "grey": f"{paths['grey']}: the median length of the normals is 0.01, but normals have length 1",
        "lacks": f"{paths['lacks']}: no such file",
        "nothing": f"{paths['nothing']}: none of the image is the object, as its mask or alpha says",
        "pose": f"{paths['pose']}: a pose must be a 3x4 matrix, but this one is 1x3",
        "world": f"{paths['world']}: ",
    }
    for uid, reason in expected.items():
        assert reasons[uid].startswith(reason)
    assert reasons["world"].endswith(
        "% of the visible normals face the camera (blue above 127), but nearly all do in the view's own camera frame"
    )
    allowed = find_objects(renders, views=views, object_list=out / "allow-list.txt").train
    assert [found.uid for found in allowed] == ["good", "masked"]
    listed = ["views", str(out / "allow-list.txt"), "--data_root", str(renders), "--num_views", "2"]
    assert doctor.main([*listed, "--output", str(tmp_path / "again")]) == 0


def test_views_in_the_wrong_place(tmp_path, capsys):
    assert doctor.main(["views", str(tmp_path / "none")]) == 2
    assert capsys.readouterr().err.startswith(f"doctor: {tmp_path}/none (from ")
    assert doctor.main(["views", str(tmp_path), "--num_views", "7"]) == 2
    assert capsys.readouterr().err.startswith("doctor: num_views is 7, which has no list of its own (only 1, 2, 3, ")


def test_scenes(tmp_path, capsys):
    root, out = tmp_path / "datasets", tmp_path / "out"
    scenes = {name: root / "DL3DV-10K" / "1K" / name for name in ("good", "jpeg", "short", "mixed", "cut", "flipped")}
    for name, folder in scenes.items():
        suffix = "jpg" if name == "jpeg" else "png"
        for number in range(4 if name == "short" else 6):
            save(folder / "images_2" / f"frame_{number + 1:05d}.{suffix}", 48, 32)
    images = {name: folder / "images_2" / "frame_00002.png" for name, folder in scenes.items()}
    save(images["mixed"], 32, 48)
    images["cut"].write_bytes(images["cut"].read_bytes()[:1000])
    flipped = bytearray(images["flipped"].read_bytes())
    flipped[500] ^= 1
    images["flipped"].write_bytes(flipped)
    (root / "DL3DV-10K/2K/none").mkdir(parents=True)
    (root / "DL3DV-10K/2K/two/images_4").mkdir(parents=True)
    (root / "DL3DV-10K/2K/two/images_8").mkdir()
    (root / "captions.json").write_text('{"good": "a room"}')
    command = ["scenes", str(root), "--min_frames", "5", "--output", str(out)]
    assert doctor.main(command) == 1
    assert (out / "allow-list.txt").read_text() == "DL3DV-10K/1K/good\nDL3DV-10K/1K/jpeg\n"
    assert capsys.readouterr().out.endswith(
        f"1 of the usable scenes have no caption in {root}/captions.json, the first is DL3DV-10K/1K/jpeg: "
        "scripts/caption_dl3dv.py adds them\n"
    )
    report = json.loads((out / "report.json").read_text())
    reasons = {item["name"].rpartition("/")[2]: item["reason"] for item in report["unusable_items"]}
    assert list(reasons) == ["cut", "flipped", "mixed", "short", "none", "two"]
    for name in ("cut", "flipped"):
        assert reasons[name].startswith(f"{images[name]}: cannot be read as an image (")
    assert reasons["mixed"] == f"{images['mixed']}: is 32x48 px, but frame_00001.png is 48x32 px"
    assert reasons["short"] == f"{images['short'].parent}: the number of its frames is 4, but --min_frames is 5"
    assert reasons["none"] == f"{root}/DL3DV-10K/2K/none: holds no folder images_2"
    assert reasons["two"].endswith("two: holds no folder images_2, but images_4 and images_8: choose one with "
                                   "data.image_folder")  # fmt: skip
    assert {"reason": "FILE: is N px, but frame_00001.png is N px", "items": 1} in report["reasons"]
    # The list is one for the trainer, and can be looked at again.
    assert [scene.scene_id for scene in read_scenes(root, out / "allow-list.txt").train] == ["good", "jpeg"]
    listed = ["scenes", str(out / "allow-list.txt"), "--data_root", str(root), "--output", str(tmp_path / "again")]
    assert doctor.main(listed) == 1  # by default a scene needs 46 frames
    assert doctor.main([*listed, "--min_frames", "6"]) == 0
    before = (out / "results.jsonl").stat().st_size
    assert doctor.main(command) == 1 and (out / "results.jsonl").stat().st_size == before
    images["cut"].unlink()
    assert doctor.main(command) == 1 and "1K/cut\n" in (out / "allow-list.txt").read_text()


def test_scenes_in_the_wrong_place(tmp_path, capsys):
    assert doctor.main(["scenes", str(tmp_path / "none")]) == 2
    assert capsys.readouterr().err.startswith(f"doctor: {tmp_path}/none (from ")
    assert doctor.main(["scenes", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith(f"doctor: {tmp_path} holds no scenes; their images must be in DL3DV-10K/")


@pytest.fixture(scope="module")
def odd_clips(tmp_path_factory) -> Path:
    """Clips of many codecs, 10-bit, turned, at a varying rate, of odd sizes, of one frame; images; and broken files."""
    import av

    folder = tmp_path_factory.mktemp("clips")
    kinds = {name: row for name, row in CLIPS.items() if not name.endswith((".ts", ".h264"))}
    for name, (size, options, _) in kinds.items():
        (folder / name.partition(".")[2]).mkdir(exist_ok=True)
        encode(folder / name.partition(".")[2] / name, pan(*size), **options)
    encode(folder / "odd_71x53.webm", pan(53, 71), codec="libvpx-vp9", options={"cpu-used": "8"})
    encode(folder / "turned.mp4", pan(64, 96), rotation=90)
    encode(folder / "one_frame.mp4", pan(64, 96)[:1])
    save(folder / "image.png", 96, 64)
    (folder / "hidden").mkdir()
    save(folder / "hidden" / ".thumbnail.jpg", 96, 64)
    whole = (folder / "mkv" / "b_frames.mkv").read_bytes()
    (folder / "cut.mkv").write_bytes(whole[: len(whole) // 2])
    (folder / "cut.png").write_bytes((folder / "image.png").read_bytes()[:3000])
    (folder / "zero.webm").touch()
    with av.open(str(folder / "sound.mp4"), "w") as file:
        stream = file.add_stream("aac", rate=16000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.rate = 16000
        file.mux(stream.encode(frame))
        file.mux(stream.encode())
    return folder


def test_videos_of_many_kinds_and_the_trainers_use_of_the_allow_list(odd_clips, tmp_path):
    command = ["videos", str(odd_clips), "--output", str(tmp_path)]
    assert doctor.main(command) == 1
    report = json.loads((tmp_path / "report.json").read_text())
    reasons = {item["name"]: item["reason"] for item in report["unusable_items"]}
    assert list(reasons) == ["cut.mkv", "cut.png", "sound.mp4", "zero.webm"]
    assert reasons["cut.mkv"].startswith(f"{odd_clips}/cut.mkv: truncated: the header announces")
    assert reasons["cut.png"].startswith(f"{odd_clips}/cut.png: cannot be read as an image (")
    assert reasons["sound.mp4"] == f"{odd_clips}/sound.mp4: holds no video stream"
    assert reasons["zero.webm"] == f"{odd_clips}/zero.webm: the file is empty (0 bytes)"
    listed = list_videos(odd_clips, tmp_path / "allow-list.txt", images=True)
    everything = list_videos(odd_clips, images=True)
    assert len(listed) == report["usable"] == len(everything) - 4 > 20
    assert [path for path in everything if path not in listed] == [odd_clips / name for name in reasons]
    # The same files under other limits are looked at again.
    assert doctor.main([*command, "--min_frames", "2", "--min_side_px", "64"]) == 1
    report = json.loads((tmp_path / "report.json").read_text())
    reasons = {item["name"]: item["reason"] for item in report["unusable_items"]}
    assert list(reasons) == [
        "cut.mkv", "cut.png", "image.png", "odd_71x53.webm", "one_frame.mp4", "sound.mp4", "zero.webm",
    ]  # fmt: skip
    one_frame = f"{odd_clips}/one_frame.mp4: the number of its frames is 1, but --min_frames is 2"
    assert reasons["one_frame.mp4"] == one_frame
    assert reasons["odd_71x53.webm"] == f"{odd_clips}/odd_71x53.webm: is 71x53 px, but --min_side_px is 64"
    before = (tmp_path / "results.jsonl").stat().st_size
    assert doctor.main([*command, "--min_frames", "2", "--min_side_px", "64"]) == 1
    assert (tmp_path / "results.jsonl").stat().st_size == before
    assert doctor.main([*command, "--min_frames", str(NUM_FRAMES + 1)]) == 1
    with pytest.raises(ValueError, match="allow-list.txt is empty"):
        list_videos(odd_clips, tmp_path / "allow-list.txt")


def test_file_names_that_are_not_utf8_keep_their_bytes(tmp_path):
    name = os.fsdecode(b"\xff.mp4")
    items = [Item(name, (), None), Item("b.mp4", (), None)]
    results = [Result(name, True, "", 0), Result("b.mp4", False, f"{name} is damaged", 0)]
    report = doctor.write_report("videos", items, results, tmp_path)
    assert (tmp_path / "allow-list.txt").read_bytes() == b"\xff.mp4\n"
    assert doctor.table(report, tmp_path).endswith("       1  \\udcff.mp4 is damaged")


def test_the_script_runs_by_itself(tmp_path):
    write_video(tmp_path / "clips/a.mp4", np.zeros((3, 64, 64, 3), np.uint8), 12)
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts/doctor.py"), "videos", "clips"],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "1 of 1 items are usable: runs/doctor/allow-list.txt\n")
    assert (tmp_path / "runs/doctor/allow-list.txt").read_text() == "a.mp4\n"
