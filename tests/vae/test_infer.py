"""The single-file tool: any size and length, piece by piece; and the latents' statistics."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from common.data import draw_normal
from common.video import clip_writer, load_image, probe_video, read_frames, save_image
from vae.data import center_crop_resize, resize_and_crop, to_uint8_frames
from vae.infer import Reconstructor, main
from vae.models.load import build_model, load_model
from vae.models.wfvae import WFVAE


@pytest.fixture(autouse=True)
def on_cpu(clean_process: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """`--device cpu` hides the GPUs: from this test alone."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


def save_model(folder: Path, tiny_json: Path, **changes: object) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        build_model("WFVAE", json.loads(tiny_json.read_text()) | changes).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def weights(tiny_json: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("weights") / "ckpt", tiny_json)


@pytest.fixture(scope="module")
def clip(videos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """22 frames of 45 x 35 px, losslessly."""
    path = tmp_path_factory.mktemp("clip") / "clip.mp4"
    with clip_writer(path, 12, lossless=True) as write:
        write(read_frames(videos / "part0/0.mp4", range(22))[:, :35, :45])
    return path


@pytest.fixture
def run(weights: Path):
    def call(source: Path, output: Path | None, *flags: str) -> None:
        outputs = [] if output is None else ["--output_dir", str(output)]
        main(["--model", str(weights), "--input", str(source), *outputs, "--device", "cpu", *flags])

    return call


def pixels(path: Path, indices: range = range(22)) -> torch.Tensor:
    """(T, 3, H, W) uint8."""
    return torch.from_numpy(read_frames(path, indices)).permute(0, 3, 1, 2)


def direct(model: torch.nn.Module, video: torch.Tensor) -> np.ndarray:
    """Reconstruction of (3, T, H, W), padded to whole latents and cut back: uint8 (T, H, W, 3)."""
    num_frames, height, width = video.shape[1:]
    video = torch.cat([video, video[:, -1:].expand(-1, -(num_frames - 1) % 4, -1, -1)], dim=1)
    video = F.pad(video, (0, -width % 8, 0, -height % 8), mode="replicate")
    with torch.no_grad():
        sample = model(video[None]).sample[0, :, :num_frames, :height, :width]
    return to_uint8_frames(sample).numpy()


def assert_close(found: np.ndarray, expected: np.ndarray) -> None:
    """Equal, but for values that float noise rounds to the other side."""
    difference = np.abs(found.astype(int) - expected)
    assert found.shape == expected.shape and difference.max() <= 1 and difference.mean() < 1e-3


@pytest.mark.parametrize("chunk_frames", [1, 5, 16, 100])
def test_a_video_of_any_size_and_length(run, weights, clip, tmp_path, chunk_frames):
    run(clip, tmp_path / "new/out.mp4", "--lossless", "--chunk_frames", str(chunk_frames))
    info = probe_video(tmp_path / "new/out.mp4")
    assert (info.num_frames, info.fps, info.width_px, info.height_px) == (22, 12.0, 45, 35)
    video = pixels(clip).transpose(0, 1).float() / 127.5 - 1
    assert_close(read_frames(tmp_path / "new/out.mp4", range(22)), direct(load_model(weights), video))


def test_long_videos_never_lie_in_memory_whole(run, clip, tmp_path, monkeypatch):
    passed = []
    encode_chunks = WFVAE.encode_chunks

    def watched(self, chunks):
        return encode_chunks(self, (passed.append(chunk.shape[2]) or chunk for chunk in chunks))

    monkeypatch.setattr(WFVAE, "encode_chunks", watched)
    run(clip, tmp_path / "out.mp4", "--chunk_frames", "6")
    assert passed == [6, 6, 6, 4, 3]  # the last are the last frame, repeated to 4 n + 1


def test_a_model_that_cannot_be_chunked_takes_it_whole(clip, tiny_json, tmp_path):
    changes = {"base_channels": 32, "norm_type": "groupnorm"}
    flow = {f"{side}_energy_flow_hidden_size": 32 for side in ("encoder", "decoder")}
    folder = save_model(tmp_path / "ckpt", tiny_json, **changes, **flow)
    argv = ["--from_pretrained", str(folder), "--video_path", str(clip), "--rec_path", str(tmp_path / "out.mp4")]
    main([*argv, "--num_frames", "6", "--lossless", "--short_size", "24", "--device", "cpu", "--fps", "30"])
    video = resize_and_crop(pixels(clip, range(6)), 24)
    assert_close(read_frames(tmp_path / "out.mp4", range(6)), direct(load_model(folder), video))
    assert probe_video(tmp_path / "out.mp4").fps == 30.0


def test_every_third_frame_of_the_central_square(run, weights, clip, tmp_path):
    run(clip, tmp_path / "out.mp4", "--lossless", "--sample_rate", "3", "--height", "16", "--width", "24")
    video = center_crop_resize(pixels(clip)[::3], 16, 24)
    assert_close(read_frames(tmp_path / "out.mp4", range(8)), direct(load_model(weights), video))
    assert probe_video(tmp_path / "out.mp4").fps == 4.0


def test_the_sampled_posterior_follows_from_the_seed_alone(run, weights, clip, tmp_path):
    sampled = ("--lossless", "--sample_posterior", "--num_frames", "9")
    for name, flags in {"a": ["--chunk_frames", "4"], "b": [], "c": ["--seed", "1"]}.items():
        run(clip, tmp_path / f"{name}.mp4", *sampled, *flags)
    found = {name: read_frames(tmp_path / f"{name}.mp4", range(9)) for name in "abc"}
    assert_close(found["a"], found["b"])
    assert (found["b"] != found["c"]).mean() > 0.1
    model = load_model(weights)
    video = F.pad(pixels(clip, range(9)).transpose(0, 1).float() / 127.5 - 1, (0, 3, 0, 5), mode="replicate")
    noise = draw_normal(0, "posterior of input 0", range(3), (4, 5, 6)).transpose(0, 1)[None]
    with torch.no_grad():
        expected = model(video[None], noise).sample[0, :, :, :35, :45]
    assert_close(found["b"], to_uint8_frames(expected).numpy())


def test_an_image(run, weights, clip, tmp_path):
    save_image(tmp_path / "in.png", read_frames(clip, [0])[0])
    run(tmp_path / "in.png", tmp_path / "out.png")
    video = pixels(clip, range(1)).transpose(0, 1).float() / 127.5 - 1
    assert_close(np.asarray(load_image(tmp_path / "out.png"))[None], direct(load_model(weights), video))
    run(tmp_path / "in.png", tmp_path / "folder")
    assert (tmp_path / "folder/in.png").read_bytes() == (tmp_path / "out.png").read_bytes()


def test_a_folder_goes_on_and_names_what_went_wrong(run, clip, tmp_path, capsys):
    source, output = tmp_path / "in", tmp_path / "out"
    (source / "sub").mkdir(parents=True)
    (source / "sub/clip.mp4").write_bytes(clip.read_bytes())
    (source / "bad.mp4").write_bytes(b"no video")
    Image.new("RGB", (16, 16)).save(source / "image.jpg")
    for _ in range(2):
        with pytest.raises(SystemExit) as stopped:
            run(source, output)
        assert stopped.value.code == 1
    printed = capsys.readouterr()
    assert sorted(str(p.relative_to(output)) for p in output.rglob("*.*")) == ["image.png", "sub/clip.mp4"]
    assert printed.out.count("2 of 3 inputs are there") == 2
    assert "2 of 3 inputs exist and are kept; --overwrite true makes them again" in printed.out
    assert f"1 inputs went wrong:\n  {source / 'bad.mp4'}: cannot be read as video" in printed.err


def test_latent_statistics(run, weights, clip, videos, tmp_path, capsys):
    run(videos / "part0", tmp_path / "stats.json", "--latent_stats", "--num_frames", "11", "--chunk_frames", "5")
    found = json.loads((tmp_path / "stats.json").read_text())
    model, samples, generator = load_model(weights), [], torch.Generator().manual_seed(0)
    for path in sorted((videos / "part0").iterdir()):
        video = pixels(path, range(9)).transpose(0, 1).float() / 127.5 - 1  # 11 frames make no whole latents
        with torch.no_grad():
            posterior = model.encode(video[None])
        noise = torch.randn(4000, *posterior.mean.shape[1:], generator=generator)
        samples.append((posterior.mean + posterior.std * noise).transpose(0, 1).flatten(1))  # (z, 4000 t h w)
    latents = torch.cat(samples, dim=1)
    np.testing.assert_allclose(found["mean"], latents.mean(1), atol=5e-3)
    np.testing.assert_allclose(found["std"], latents.std(1), rtol=5e-3)
    np.testing.assert_allclose(np.multiply(found["scale"], found["std"]), 1)
    assert found["shift"] == found["mean"] and found["num_latents"] == 4 * 3 * 5 * 6
    assert found["settings"]["from_pretrained"] == str(weights) and "output_dir" not in found["settings"]
    printed = capsys.readouterr().out
    assert "a diffusion model takes (latent - shift) * scale: {" in printed and f"{found['std'][2]:.5f}" in printed


def test_values_that_are_not_finite_are_not_written(run, clip, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Reconstructor, "_decode", lambda self, latents: (z[:, :3] * torch.nan for z in latents))
    with pytest.raises(SystemExit):
        run(clip, tmp_path / "out.mp4")
    assert "the result is not finite: use --mixed_precision bf16 or no" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_work_is_said(run, clip, tmp_path, capsys):
    for source, output, flags, text in (
        (clip, tmp_path / "out.webm", (), "out.webm must end in one of .mp4, .mov, .mkv, or be a folder"),
        (clip, clip, (), "would overwrite the input: choose another name"),
        (clip.parent, tmp_path / "out.mp4", (), "out.mp4 must be a folder, because --input"),
        (clip.parent, clip.parent / "out", (), "choose a folder beside it"),
        (clip, None, (), "--output_dir is required: a folder, or for one input a file"),
        (clip, tmp_path / "out", ("--latent_stats",), "must end in .json with --latent_stats"),
        (clip, tmp_path / "out", ("--height", "16"), "height and width must be given together"),
        (tmp_path / "absent.mp4", tmp_path / "out", (), "absent.mp4 was not found"),
        (clip, tmp_path / "out", ("--model", str(tmp_path)), "holds no weights: --model takes"),
    ):
        with pytest.raises(SystemExit) as stopped:
            run(source, output, *flags)
        assert stopped.value.code != 0
        assert text in capsys.readouterr().err
