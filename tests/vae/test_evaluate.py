"""Step 2 of the evaluation: pairs, every video counted once, the same numbers for any number of processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision

from common.metrics import Lpips, flicker, psnr, ssim
from common.video import clip_writer, read_frames, save_image
from vae.data import eval_transform
from vae.evaluate import PARSER, find_pairs, main
from vae.fvd import frechet_distance, load_features

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
NAMES = ("a.mp4", "b.mp4", "sub/a.mp4")


@pytest.fixture(autouse=True)
def on_cpu(clean_process: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """`--device cpu` hides the GPUs: from this test alone."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


@pytest.fixture(scope="module")
def folders(videos: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Real clips of 24 frames and noisy ones, losslessly; among the latter's folders two that do not count."""
    root, rng = tmp_path_factory.mktemp("folders"), np.random.default_rng(0)
    for number, name in enumerate(NAMES):
        frames = read_frames(videos / f"part{number % 2}/{number}.mp4", range(24)).astype(int)
        noisy = (frames + rng.integers(-20, 20, frames.shape)).clip(0, 255)
        kinds = {"real": frames, "fake": noisy, "fake/origin": frames, "fake/side_by_side": noisy}
        for kind, content in kinds.items():
            with clip_writer(root / kind / name, 24, lossless=True) as write:
                write(content.astype(np.uint8))
    return root / "real", root / "fake"


def flags(folders: tuple[Path, Path], *more: str) -> list[str]:
    real, fake = folders
    paths = ["--real_video_dir", str(real), "--generated_video_dir", str(fake)]
    return [*paths, "--num_frames", "9", "--resolution", "32", "--num_workers", "0", "--device", "cpu", *more]


def clips(folders: tuple[Path, Path], crop_px: tuple[int, int] | None = None) -> list[list[torch.Tensor]]:
    """(3, 9, H, W) in [0, 1] of each pair, the generated one first."""
    frames = [[read_frames(folder / name, range(9)) for folder in folders[::-1]] for name in NAMES]
    tensors = [[torch.from_numpy(one).permute(0, 3, 1, 2) for one in pair] for pair in frames]
    return [[eval_transform(one, 32, crop_px) / 2 + 0.5 for one in pair] for pair in tensors]


def report(folder: Path, name: str) -> dict:
    return json.loads((folder / f"metrics-{name}.json").read_text())


def problem(capsys: pytest.CaptureFixture, argv: list[str]) -> str:
    with pytest.raises(SystemExit) as stopped:
        main(argv)
    assert stopped.value.code != 0
    return capsys.readouterr().err


def test_metrics_are_those_of_the_clips(folders, capsys):
    main(flags(folders, "--metric", "psnr,ssim,flicker", "--crop_size", "24"))
    found = report(folders[1], "psnr-ssim-flicker")
    for row, name, (fake, real) in zip(found["videos"], NAMES, clips(folders, (24, 24)), strict=True):
        frames = fake.transpose(0, 1), real.transpose(0, 1)
        expected = {
            "psnr": psnr(*frames).mean(),
            "ssim": ssim(*frames).mean(),
            "flicker": flicker(fake[None], real[None])[0],
        }
        assert row == {"name": name, **{metric: pytest.approx(value.item()) for metric, value in expected.items()}}
    means = {name: np.mean([row[name] for row in found["videos"]]) for name in ("psnr", "ssim", "flicker")}
    assert found["mean"] == pytest.approx(means) and found["num_videos"] == 3 and found["skipped"] == []
    assert found["settings"]["num_frames"] == 9 and "torch" in found["versions"]
    lines = capsys.readouterr().out.splitlines()
    assert lines[-3:] == [f"{name} {value:.6g}" for name, value in means.items()]
    assert lines[2].split() == ["a.mp4", *(f"{found['videos'][0][name]:.4f}" for name in means)]


def test_fvd_is_that_of_the_whole_set(folders, tmp_path, capsys):
    script = tmp_path / "i3d.torchscript"
    torch.jit.script(TinyI3d()).save(script)
    main(flags(folders, "--metric", "fvd", "--i3d_weights", str(script)))
    features = load_features("styleganv", script)
    fake, real = (torch.cat([features(pair[side][None]) for pair in clips(folders)]) for side in (0, 1))
    expected = frechet_distance(real, fake)
    assert report(folders[1], "fvd_styleganv")["mean"] == {"fvd": pytest.approx(expected, rel=1e-6)}
    printed = capsys.readouterr()
    assert printed.out.splitlines()[-1] == f"fvd {expected:.6g}" and expected > 0
    assert "FVD of 3 videos is biased upwards: take at least 256" in printed.err


class TinyI3d(torch.nn.Module):
    """Called as the I3D of StyleGAN-V is."""

    def forward(self, x: torch.Tensor, rescale: bool, resize: bool, return_features: bool) -> torch.Tensor:
        return x[:, 0, 0, ::11, ::11].flatten(1)[:, :400]


def test_lpips_sees_all_frames(folders, tmp_path):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        state = torchvision.models.alexnet(weights=None).state_dict()
    torch.save({name: value for name, value in state.items() if name.startswith("features")}, tmp_path / "alex.pth")
    weights = str(tmp_path / "alex.pth")
    main(flags(folders, "--metric", "LPIPS", "--lpips_weights", weights, "--resolution", "64"))
    lpips = Lpips.load("alex", weights, spatial=True)
    frames = [torch.from_numpy(read_frames(folder / "b.mp4", range(9))).permute(0, 3, 1, 2) for folder in folders[::-1]]
    expected = lpips(*(eval_transform(one, 64).transpose(0, 1) / 2 + 0.5 for one in frames)).mean()
    assert report(folders[1], "lpips")["videos"][1]["lpips"] == pytest.approx(expected.item(), rel=1e-5)


def test_two_processes_equal_one(folders, tmp_path):
    torch.jit.script(TinyI3d()).save(tmp_path / "i3d.torchscript")
    argv = flags(folders, "--metric", "psnr,fvd", "--i3d_weights", str(tmp_path / "i3d.torchscript"))
    main(argv)
    path = folders[1] / "metrics-psnr-fvd_styleganv.json"
    one = path.read_text()
    path.unlink()
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [*launcher, str(ROOT / "vae/evaluate.py"), *argv]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment)
    assert done.returncode == 0, done.stderr
    assert json.loads(path.read_text()) == json.loads(one)
    assert done.stdout.splitlines()[-1].startswith("fvd ")


def test_the_origin_of_step_1_is_sampled_already(folders, capsys):
    origin = folders[1] / "origin"
    argv = flags((origin, folders[1]), "--metric", "psnr", "--sample_rate", "3")
    assert "clip has 24 frames, num_frames x sample_rate needs 27" in problem(capsys, argv)
    (folders[1] / "settings.json").write_text("{}")
    main(argv)
    assert "is read frame by frame: step 1 has sampled it already" in capsys.readouterr().err
    sampled = report(folders[1], "psnr")
    (folders[1] / "settings.json").unlink()
    main(flags(folders, "--metric", "psnr"))
    assert report(folders[1], "psnr")["mean"] == sampled["mean"]


def test_bad_pairs_are_reported_and_do_not_count(folders, capsys):
    short = folders[1] / "sub/short.mp4"
    for path in (short, folders[0] / "sub/short.mp4"):
        with clip_writer(path, 24) as write:
            write(np.zeros((4, 32, 32, 3), np.uint8))
    main(flags(folders, "--metric", "psnr"))
    printed = capsys.readouterr()
    assert "short.mp4: clip has 4 frames, num_frames x sample_rate needs 9: lower --num_frames" in printed.err
    assert "1 pairs could not be measured and do not count" in printed.err and "\n3 videos" not in printed.out
    found = report(folders[1], "psnr")
    assert found["skipped"] == ["sub/short.mp4"] and found["num_videos"] == 3
    (folders[0] / "sub/short.mp4").unlink()
    text = problem(capsys, flags(folders, "--metric", "psnr"))
    assert f"1 of 4 videos of {folders[1]} have no counterpart of the same path" in text and ": sub/short.mp4" in text
    short.unlink()


def test_images_are_clips_of_one_frame(tmp_path, capsys):
    for folder, level in (("real", 100), ("fake", 110), ("fake/origin", 100)):
        save_image(tmp_path / folder / "a.png", np.full((32, 40, 3), level, np.uint8))
    main(flags((tmp_path / "real", tmp_path / "fake"), "--metric", "psnr", "--num_frames", "1"))
    assert report(tmp_path / "fake", "psnr")["mean"]["psnr"] == pytest.approx(20 * np.log10(255 / 10))
    text = problem(capsys, flags((tmp_path / "real", tmp_path / "fake"), "--metric", "psnr"))
    assert "holds no videos" in text  # of more than one frame


def test_pairs_of_other_suffixes(tmp_path):
    names = {"real": ("a.webm", "b.avi", "b.webm", "c.mp4"), "fake": ("a.mp4", "b.mp4", "b.webm.mp4", "c.mp4")}
    for folder, files in names.items():
        (tmp_path / folder).mkdir()
        for name in files:
            (tmp_path / folder / name).touch()
    sources = {"a.mp4": "a.webm", "b.mp4": "b.avi", "b.webm.mp4": "b.webm", "c.mp4": "c.mp4"}
    rows = [json.dumps({"name": name, "source": source}) for name, source in sources.items()]
    (tmp_path / "fake" / "metrics.jsonl").write_text("\n".join(rows))
    config, _ = PARSER.parse(flags((tmp_path / "real", tmp_path / "fake"), "--metric", "psnr"))
    assert {pair.name: pair.real.name for pair in find_pairs(config.data)} == sources
    (tmp_path / "fake" / "metrics.jsonl").unlink()
    with pytest.raises(FileNotFoundError, match="2 of 4 videos of .* have no counterpart .*: b.mp4, b.webm.mp4"):
        find_pairs(config.data)


def test_what_cannot_work_is_said(folders, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    for more, text in (
        (("--metric", "flolpips"), "the original computed lpips under that name; use --metric lpips"),
        (("--metric", "psnr,sim"), "sim is no metric: choose among psnr, ssim, lpips, flicker, fvd, or all"),
        (("--metric", "fvd"), "FVD (styleganv) needs weights, and none are downloaded"),
        (("--metric", "fvd", "--subset_size", "1"), "at least 2 videos, got 1"),
        (("--metric", "fvd", "--num_frames", "8"), "at least 9 frames, got --num_frames 8"),
        (("--metric", "all"), "LPIPS (alex) has no weights and HF_HUB_OFFLINE forbids a download"),
        (("--metric", "ssim", "--crop_size", "10"), "ssim needs frames of at least 11 px, got 10: raise"),
        (("--metric", "psnr", "--num_frames", "25"), "none of the 3 pairs can be measured"),
        (("--metrics", "psnr"), "--metrics (flag) is unknown; did you mean metric"),
    ):
        assert text in problem(capsys, flags(folders, *more))
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "holds no videos: run step 1 (gen_video.sh) first" in problem(capsys, flags((folders[0], empty)))


def test_accepted_flags_without_effect_say_so(folders, capsys):
    main(flags(folders, "--metric", "psnr", "--mp", "--batch_size", "2", "--sample_fps", "24"))
    text = capsys.readouterr().err
    assert all(f"--{name} has no effect" in text for name in ("mp", "batch_size", "sample_fps"))
