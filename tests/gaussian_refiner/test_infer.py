"""Inference as users start it: files in, files out, and what bad input is told."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from lpips import LPIPS
from PIL import Image

from common.data import draw_normal
from common.metrics import psnr, ssim
from common.video import MediaError, load_image
from gaussian_refiner import infer as infer_module
from gaussian_refiner.infer import PARSER, Frame, choose_device, find_jobs, frame_of, load_refiner, main, measure
from gaussian_refiner.models.denoise import decode, encode
from gaussian_refiner.models.objective import class_labels
from gaussian_refiner.models.unet import load_unet

SMALL = ("--height_px", "64", "--num_inference_steps", "2", "--device", "cpu")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """renders/{a,b,wide}, references/ and gts/ of the same names and other sizes."""
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for kind, scale in (("renders", 1), ("references", 2), ("gts", 1)):
        (root / kind).mkdir()
        for name, width, height in (("a", 90, 67), ("b", 64, 48), ("wide", 188, 50)):
            coarse = rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)  # (H, W, 3)
            picture = Image.fromarray(coarse).resize((width * scale, height * scale), Image.Resampling.BICUBIC)
            picture.save(root / kind / f"{name}.png")
    return root


@pytest.fixture(scope="module")
def trained(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint folder as the original trainer leaves it: pickled weights of 8 channels, a config that says 4."""
    folder = tmp_path_factory.mktemp("run") / "checkpoint-500"
    unet = load_unet(checkpoint)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        torch.nn.init.normal_(unet.conv_in.weight[:, 4:].detach(), std=0.2)
    (folder / "unet").mkdir(parents=True)
    torch.save(unet.state_dict(), folder / "unet" / "diffusion_pytorch_model.bin")
    unet.register_to_config(in_channels=4)
    unet.save_config(folder / "unet")
    return folder


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    """No LPIPS weights, and none to be fetched."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch_home"))


@pytest.fixture
def run(checkpoint: Path, trained: Path):
    def call(*flags: object) -> None:
        fixed = ("--pretrained_model_name_or_path", str(checkpoint), "--unet", str(trained), *SMALL)
        main([*fixed, *map(str, flags)])

    return call


def pixels(path: Path) -> np.ndarray:
    return np.asarray(load_image(path)).astype(int)  # (H, W, 3)


def problem(capsys, run, *flags: object) -> str:
    """What is printed when the command is refused."""
    with pytest.raises(SystemExit) as stopped:
        run(*flags)
    assert stopped.value.code == 1
    return capsys.readouterr().err


# One image ------------------------------------------------------------------------------------------------------------


def test_one_image_keeps_its_size(run, images, tmp_path, capsys):
    output = tmp_path / "new" / "out.png"
    run("--input", images / "renders/a.png", "--output", output)
    assert load_image(output).size == (90, 67)
    assert list(output.parent.iterdir()) == [output]
    captured = capsys.readouterr()
    assert captured.out == f"repaired 1 of 1 images: {output}\n"
    assert "does not look at the render" not in captured.err


def test_one_image_with_all_that_goes_with_it(run, images, tmp_path, capsys):
    output = tmp_path / "out.png"
    flags = ("--reference", images / "references/a.png", "--gt", images / "gts/a.png", "--side_by_side")
    run("--input", images / "renders/a.png", "--output", output, *flags)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.png", "out_metrics.json", "out_side_by_side.png"]
    sheet = load_image(tmp_path / "out_side_by_side.png")
    assert sheet.height == 67 + 2 * 4 + 16 and sheet.width > 4 * 90
    printed = capsys.readouterr()
    assert f"metrics of 1 images: {tmp_path / 'out_metrics.json'}" in printed.out
    assert "metrics go without LPIPS: LPIPS (alex) has no weights" in printed.err


def test_an_image_is_repaired_as_the_formulas_say(checkpoint, trained, images, tmp_path, run):
    """Against the sampler called by hand: one window, so no blending takes part."""
    output = tmp_path / "out.png"
    files = {"input": images / "renders/b.png", "reference": images / "references/b.png"}
    run("--input", files["input"], "--reference", files["reference"], "--output", output, "--seed", 7)

    config, _ = PARSER.parse(
        ["--input", "x", "--output", "y", "--pretrained_model_name_or_path", str(checkpoint), "--unet", str(trained)]
        + [*SMALL]
    )
    refiner = load_refiner(config)
    parts = refiner.components
    crops = [
        load_image(files[name]).resize((64, 64), Image.Resampling.LANCZOS) for name in ("input", "reference")
    ]
    tensors = [torch.from_numpy(np.array(crop)).permute(2, 0, 1)[None] / 127.5 - 1 for crop in crops]
    render, cond = (encode(parts.vae, tensor) for tensor in tensors)
    inputs = parts.feature_extractor(images=[np.array(crops[1])], return_tensors="pt")
    with torch.no_grad():
        embed = parts.image_encoder(**inputs).image_embeds
    constants = parts.constants(torch.device("cpu"))
    labels = class_labels(
        embed,
        draw_normal(7, "validation image embedding noise", [0], (12,)),
        constants.embed_mean,
        constants.embed_std,
        constants.image_alphas_cumprod,
    )
    latents = infer_module.denoise(
        parts.unet,
        None,
        parts.scheduler,
        cond_latents=cond,
        render_latents=render,
        text=refiner.how.text,
        class_labels=labels,
        init_noise=draw_normal(7, "validation noise", [0], (4, 8, 8)),
        num_inference_steps=2,
        guidance_scale=1.5,
        guidance_rescale=0.7,
        use_cond_cache=False,
        null_kinds=("clip", "render", "cond"),
    )
    expected = (decode(parts.vae, latents)[0].permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)  # (64, 64, 3)
    expected = np.asarray(Image.fromarray(expected).resize((64, 48), Image.Resampling.LANCZOS)).astype(int)
    difference = np.abs(pixels(output) - expected)
    assert difference.max() <= 1 and difference.mean() < 0.01  # rounding of float sums in another order


def test_reference_and_seed_matter(run, images, tmp_path):
    variants = {
        "none": (),
        "reference": ("--reference", images / "references/b.png"),
        "seed": ("--seed", 1),
        "epsilon": ("--prediction_type", "epsilon"),
        "again": (),
    }
    for name, flags in variants.items():
        run("--input", images / "renders/b.png", "--output", tmp_path / f"{name}.png", *flags)
    bytes_of = {name: (tmp_path / f"{name}.png").read_bytes() for name in variants}
    assert bytes_of["none"] == bytes_of["again"]
    assert len(set(bytes_of.values())) == 4


def test_cond_cache_changes_nothing(run, images, tmp_path):
    for name, cached in (("cached", "true"), ("paired", "false")):
        flags = ("--reference", images / "references/wide.png", "--cond_cache", cached)
        run("--input", images / "renders/wide.png", "--output", tmp_path / f"{name}.png", *flags)
    difference = np.abs(pixels(tmp_path / "cached.png") - pixels(tmp_path / "paired.png"))
    assert difference.max() <= 1 and difference.mean() < 0.01


@pytest.mark.parametrize("name, content", [("rgba", "RGBA"), ("grey", "L"), ("odd", "RGB")])
def test_other_modes_and_odd_sizes(run, tmp_path, name, content):
    rng = np.random.default_rng(1)
    channels = {"RGBA": (4,), "L": (), "RGB": (3,)}[content]
    picture = Image.fromarray(rng.integers(0, 256, (33, 41, *channels), dtype=np.uint8))
    assert picture.mode == content
    picture.save(tmp_path / "in.png")
    run("--input", tmp_path / "in.png", "--output", tmp_path / "out.png")
    with Image.open(tmp_path / "out.png") as repaired:
        assert repaired.size == (41, 33) and repaired.mode == "RGB"


def test_parity_samples_as_the_original(run, images, tmp_path, monkeypatch, capsys):
    seen = {}

    def denoise(unet, cache, scheduler, *, render_latents, **options):
        seen.update(options)
        return render_latents

    monkeypatch.setattr(infer_module, "denoise", denoise)
    run("--input", images / "renders/a.png", "--output", tmp_path / "out.png", "--parity", "--seed", 3)
    assert (seen["num_inference_steps"], seen["guidance_scale"], seen["guidance_rescale"]) == (20, 10.0, 0.0)
    assert seen["null_kinds"] == ("text", "clip") and not torch.equal(*seen["text"])
    assert "--num_inference_steps has no effect: parity is True, not False" in capsys.readouterr().err


# Windows --------------------------------------------------------------------------------------------------------------


def frame(bucket: str, *flags: str) -> Frame:
    required = ["--input", "a", "--output", "b", "--pretrained_model_name_or_path", "c"]
    return frame_of(bucket, PARSER.parse([*required, *flags])[0].frame)


def test_frames_of_the_buckets():
    assert frame("1.5") == Frame(640, 480, 480, 120, (0, 160))
    assert frame("3.66") == Frame(1920, 512, 512, 128, (0, 384, 768, 1152, 1408))
    assert frame("3.66", "--full_frame") == Frame(1920, 512, None, 128, (704,))
    assert frame("1.5", "--full_frame") == Frame(640, 480, None, 120, (80,))
    assert frame("3.66", "--height_px", "64") == Frame(256, 64, 64, 16, (0, 8 * 6, 96, 144, 192))[:0] or frame(
        "3.66", "--height_px", "64"
    ).embedded_px == (0, 48, 96, 144, 192)
