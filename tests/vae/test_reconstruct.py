"""Step 1 of the evaluation: the same files and metrics for any number of processes, interruptions, bad videos."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from common.metrics import flicker, psnr, ssim
from common.video import clip_writer, load_image, probe_video, read_frames, save_image
from vae import reconstruct
from vae.data import EvalClips, list_videos, to_uint8_frames
from vae.models.load import build_model, load_model
from vae.reconstruct import WeightsConfig, batches, find_weights, load_vae, main, output_names

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def on_cpu(clean_process: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """`--device cpu` hides the GPUs: from this test alone."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


@pytest.fixture(scope="module")
def weights(tiny_json: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights") / "ckpt"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        build_model("WFVAE", json.loads(tiny_json.read_text())).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def dataset(videos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four clips (two of one base name), one that is no video, one that is too short."""
    root = tmp_path_factory.mktemp("dataset")
    for source, name in (("part0/0", "a"), ("part1/1", "sub/a"), ("part0/2", "sub/b"), ("part1/3", "c")):
        (root / name).parent.mkdir(exist_ok=True)
        shutil.copy(videos / f"{source}.mp4", root / f"{name}.mp4")
    with clip_writer(root / "short.mp4", 24) as write:
        write(np.zeros((3, 40, 48, 3), np.uint8))
    (root / "bad.mp4").write_bytes(b"no video")
    return root


@pytest.fixture
def flags(weights: Path, dataset: Path, tmp_path: Path) -> list[str]:
    paths = {"from_pretrained": weights, "real_video_dir": dataset, "generated_video_dir": tmp_path / "out"}
    sizes = {"num_frames": 9, "resolution": 16, "sample_rate": 2, "num_workers": 0, "device": "cpu"}
    return [word for name, value in (paths | sizes).items() for word in (f"--{name}", str(value))]


def rows(folder: Path, name: str = "metrics.jsonl") -> list[dict]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_close(found: np.ndarray, expected: np.ndarray) -> None:
    """Equal, but for values that float noise rounds to the other side."""
    difference = np.abs(found.astype(int) - expected)
    assert found.shape == expected.shape and difference.max() <= 1 and difference.mean() < 1e-3


def problem(capsys: pytest.CaptureFixture, argv: list[str]) -> str:
    with pytest.raises(SystemExit) as stopped:
        main(argv)
    assert stopped.value.code != 0
    return capsys.readouterr().err


def test_files_and_metrics_are_those_of_the_model(flags, weights, dataset, tmp_path, capsys):
    out = tmp_path / "out"
    main([*flags, "--output_origin", "--side_by_side", "--lossless", "--batch_size", "2", "--sample_fps", "24"])
    names = ["a.mp4", "c.mp4", "sub/a.mp4", "sub/b.mp4"]
    kinds = [f"{folder}{name}" for folder in ("", "origin/", "side_by_side/") for name in names]
    records = ["metrics.jsonl", "settings.json", "skipped.jsonl", "summary.json"]
    assert sorted(files(out)) == sorted([*kinds, *records])
    assert [row["name"] for row in rows(out)] == names

    clips = EvalClips(list_videos(dataset), dataset, 9, 16, 2, crop_px=None)
    real = clips.sample([path.name for path in clips.paths].index("c.mp4"))["video"][None, ..., 1:17]  # 19 -> 16 wide
    with torch.no_grad():
        fake = load_model(weights)(real).sample
    assert_close(read_frames(out / "c.mp4", range(9)), to_uint8_frames(fake[0]).numpy())
    np.testing.assert_array_equal(read_frames(out / "origin/c.mp4", range(9)), to_uint8_frames(real[0]).numpy())
    both = read_frames(out / "side_by_side/c.mp4", range(9))
    np.testing.assert_array_equal(both[:, :, :16], to_uint8_frames(real[0]).numpy())
    info = probe_video(out / "c.mp4")
    assert (info.num_frames, info.fps, info.width_px, info.height_px) == (9, 12.0, 16, 16)

    fake, real = fake.clamp(-1, 1) / 2 + 0.5, real / 2 + 0.5
    frames = fake[0].transpose(0, 1), real[0].transpose(0, 1)
    expected = {"psnr": psnr(*frames).mean(), "ssim": ssim(*frames).mean(), "flicker": flicker(fake, real)[0]}
    row = rows(out)[1]
    for name, value in expected.items():
        assert row[name] == pytest.approx(value.item(), rel=1e-5)
    summary = json.loads((out / "summary.json").read_text())
    assert summary["mean"]["psnr"] == pytest.approx(np.mean([row["psnr"] for row in rows(out)]))
    assert (summary["num_videos"], summary["num_skipped"]) == (4, 2)
    assert rows(out, "skipped.jsonl")[1] == {
        "name": "short.mp4",
        "source": "short.mp4",
        "reason": "clip has 3 frames, num_frames x sample_rate needs 18",
    }
    printed = capsys.readouterr()
    assert printed.out.startswith(f"reconstructed 4 videos: {out}\nbefore the codec: PSNR ")
    assert "2 videos were skipped" in printed.err and "bad.mp4: cannot be read as video" in printed.err


def test_an_interrupted_run_goes_on_and_equals_a_whole_one(flags, tmp_path, monkeypatch):
    flags = [*flags, "--output_origin"]
    main(flags)
    whole = files(tmp_path / "out")
    (tmp_path / "out").rename(tmp_path / "whole")

    written = []

    def fail_later(job, *rest):
        written.append(job)
        if len(written) == 3:
            raise KeyboardInterrupt
        return real_outputs(job, *rest)

    real_outputs = reconstruct.outputs
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(reconstruct, "is_done", lambda *_: False)
        patch.setattr(reconstruct, "outputs", fail_later)
        main(flags)
    out = tmp_path / "out"
    left = files(out)
    assert sorted(name for name in left if name.endswith("mp4")) == ["a.mp4", "c.mp4", "origin/a.mp4", "origin/c.mp4"]
    with open(out / ".0.metrics.jsonl", "a") as lines:
        lines.write('{"name": "sub/a.mp4", "sou')  # the line that a kill cut off
    (out / ".sub.1.tmp.mp4").touch()
    before = (out / "a.mp4").stat().st_mtime_ns
    main(flags)
    assert files(out) == whole
    assert (out / "a.mp4").stat().st_mtime_ns == before


def test_missing_parts_are_made_and_others_kept(flags, tmp_path):
    out = tmp_path / "out"
    main([*flags, "--subset_size", "1"])
    assert sorted(name for name in files(out) if name.endswith("mp4")) == ["a.mp4"]
    main([*flags, "--output_origin"])
    assert (out / "origin/a.mp4").is_file() and len(rows(out)) == 4


def test_two_processes_equal_one(flags, tmp_path):
    main(flags)
    (tmp_path / "out").rename(tmp_path / "one")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*launcher, str(ROOT / "vae/reconstruct.py"), *flags],
        capture_output=True,
        text=True,
        timeout=240,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    assert files(tmp_path / "out") == files(tmp_path / "one")


@pytest.mark.slow
def test_the_documented_scripts(weights, dataset, tmp_path):
    """Both steps as the guide gives them, with settings from the environment alone."""
    shutil.copytree(weights, tmp_path / "ckpt")
    shutil.copytree(dataset, tmp_path / "test_video")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    settings = {"NUM_FRAMES": "9", "RESOLUTION": "16", "SAMPLE_RATE": "2", "METRIC": "psnr", "EXP_NAME": "new"}
    environment = {**os.environ, **settings, "PATH": path}
    for script in ("gen_video.sh", "eval.sh"):
        command = ["bash", str(ROOT / "vae/examples" / script), "--num_workers", "1"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    out = tmp_path / "video_gen/new_sr2_nf9_res16_subset0"
    assert (out / "origin/sub/a.mp4").is_file() and len(rows(out)) == 4
    found = json.loads((out / "metrics-psnr.json").read_text())
    assert found["num_videos"] == 4 and found["settings"]["real_sample_rate"] == 1
    assert done.stdout.splitlines()[-1] == f"psnr {found['mean']['psnr']:.6g}"


def test_other_settings_do_not_mix(flags, tmp_path, capsys):
    main([*flags, "--subset_size", "1"])
    capsys.readouterr()
    text = problem(capsys, [*flags, "--sample_rate", "1"])
    assert "holds reconstructions of other settings (sample_rate 2 there, 1 now): choose another" in text
    (tmp_path / "out" / "settings.json").unlink()
    assert "holds other videos (a.mp4): choose an empty folder" in problem(capsys, flags)


def test_settings_that_came_to_nothing_do_not_bind(flags, tmp_path, capsys):
    too_large = [*flags, "--crop_size", "64"]
    assert "a crop of 64x64 px does not fit into frames of" in problem(capsys, too_large)
    main([*flags, "--subset_size", "1"])
    assert json.loads((tmp_path / "out" / "settings.json").read_text())["crop_px"] is None


def test_images_become_images(weights, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (32, 40, 3), dtype=np.uint8)
    save_image(tmp_path / "in" / "a.png", pixels)
    paths = ["--real_video_dir", str(tmp_path / "in"), "--generated_video_dir", str(tmp_path / "out")]
    more = "--num_frames 1 --resolution 32 --num_workers 0 --device cpu --output_origin --side_by_side".split()
    main(["--from_pretrained", str(weights), *paths, *more])
    assert np.array_equal(np.asarray(load_image(tmp_path / "out" / "origin" / "a.png")), pixels)
    sizes = {str(p.relative_to(tmp_path / "out")): load_image(p).size for p in (tmp_path / "out").rglob("*.png")}
    assert sizes == {"a.png": (40, 32), "origin/a.png": (40, 32), "side_by_side/a.png": (80, 32)}


def test_what_cannot_work_is_said_before_anything_is_written(flags, dataset, tmp_path, capsys):
    assert "16 frames are not 4 n + 1: use 13 or 17" in problem(capsys, [*flags, "--num_frames", "16"])
    assert "a height of 20 px is no multiple of 8: use 16 or 24" in problem(capsys, [*flags, "--resolution", "20"])
    inside = [*flags, "--generated_video_dir", str(dataset / "out")]
    assert "so its videos would be inputs of the next run" in problem(capsys, inside)
    assert "--output_orign (flag) is unknown; did you mean output_origin" in problem(capsys, [*flags, "--output_orign"])
    crops = [*flags, "--crop_size", "16", "--crop_size_height", "16", "--crop_size_width", "16"]
    assert "crop_size excludes crop_size_height and crop_size_width" in problem(capsys, crops)
    text = problem(capsys, ["--num_frames", "9"])
    assert "--model is required: folder with weights" in text and "--real_video_dir is required: folder" in text
    assert not (tmp_path / "out").exists()


def test_no_readable_video_is_an_error(flags, capsys):
    text = problem(capsys, [*flags, "--num_frames", "33"])
    assert "none of the 6 videos of" in text and "the first is a.mp4: clip has 24 frames, num_frames x" in text


def test_accepted_flags_without_effect_say_so(flags, capsys):
    main([*flags, "--subset_size", "1", "--tile_overlap_factor", "0.25", "--enable_tiling"])
    assert "tile_overlap_factor has no effect: tiles overlap by an eighth" in capsys.readouterr().err


def test_output_names_do_not_collide():
    sources = ["a.avi", "a.mp4", "a.webm", "b.MOV", "b.mkv", "c.jpg", "c.png", "d/a.webm", "d/a.webm.mp4"]
    expected = [
        "a.avi.mp4",
        "a.mp4",
        "a.webm.mp4",
        "b.mp4",
        "b.mkv.mp4",
        "c.jpg.png",
        "c.png",
        "d/a.mp4",
        "d/a.webm.mp4",
    ]
    assert output_names(sources) == expected


def test_batches_hold_neighbours_of_one_shape():
    shapes = [4, 4, 4, 8, 4]
    found = list(batches(((n, torch.zeros(3, 1, size, 4)) for n, size in enumerate(shapes)), 2))
    assert [indices for indices, _ in found] == [[0, 1], [2], [3], [4]]


def test_a_clip_comes_out_the_same_every_time(tmp_path):
    frames = np.random.default_rng(0).integers(0, 256, (12, 41, 63, 3), dtype=np.uint8)
    contents = set()
    for _ in range(8):
        with clip_writer(tmp_path / "new/clip.mp4", 24) as write:
            write(frames[:5])
            write(frames[5:])
        contents.add((tmp_path / "new/clip.mp4").read_bytes())
    assert len(contents) == 1
    assert read_frames(tmp_path / "new/clip.mp4", [0]).shape == (1, 42, 64, 3)
    with pytest.raises(KeyboardInterrupt), clip_writer(tmp_path / "new/other.mp4", 24) as write:
        write(frames)
        raise KeyboardInterrupt
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["clip.mp4"]


def test_weights_are_found_in_a_run(weights, tmp_path):
    run = tmp_path / "run"
    for number, name in enumerate(("checkpoint-5/vae", "checkpoint-5/vae_ema", "export")):
        shutil.copytree(weights, run / name)
        manifest = (run / name if name == "export" else run / "checkpoint-5") / "manifest.json"
        manifest.write_text(json.dumps({"files": {}}))
        os.utime(manifest, (number, number))
    assert find_weights(run) == run / "export"
    assert find_weights(run / "checkpoint-5") == run / "checkpoint-5/vae_ema"
    assert find_weights(weights / "diffusion_pytorch_model.safetensors") == weights
    shutil.rmtree(run / "export")
    with pytest.raises(FileNotFoundError, match="holds no weights: --model takes a folder with config.json"):
        find_weights(run)  # its checkpoint's manifest lists nothing: it is not whole


def test_a_trained_average_is_loaded(weights, tmp_path):
    shutil.copytree(weights, tmp_path / "vae")
    model = load_model(weights)
    with torch.no_grad():
        model.last_layer.zero_()
    model.save_pretrained(tmp_path / "vae_ema")
    config = json.loads((tmp_path / "vae_ema/config.json").read_text())
    (tmp_path / "vae_ema/config.json").write_text(json.dumps(config | {"decay": 0.999, "optimization_step": 5}))
    loaded, source = load_vae(WeightsConfig(model=str(tmp_path)), torch.device("cpu"))
    assert source == tmp_path / "vae_ema" and not loaded.last_layer.any() and not loaded.training


def test_a_ckpt_of_the_original_is_loaded(weights, tmp_path):
    model = load_model(weights)
    content = {"state_dict": {"gen_model": model.state_dict()}, "ema_state_dict": {}}
    torch.save(content, tmp_path / "checkpoint-7.ckpt")
    (tmp_path / "config.json").write_text((weights / "config.json").read_text())
    for source in (tmp_path, tmp_path / "checkpoint-7.ckpt"):
        loaded, _ = load_vae(WeightsConfig(model=str(source), model_name="WFVAE"), torch.device("cpu"))
        torch.testing.assert_close(dict(loaded.state_dict()), dict(model.state_dict()), rtol=0, atol=0)
