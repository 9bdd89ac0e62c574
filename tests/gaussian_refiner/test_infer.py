"""Inference as users start it: files in, files out, and what bad input is told."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import PartialState
from diffusers import DDPMScheduler
from lpips import LPIPS
from PIL import Image

from common.data import draw_normal
from common.metrics import psnr, ssim
from common.video import MediaError, load_image
from gaussian_refiner import infer as infer_module
from gaussian_refiner import repair as repair_module
from gaussian_refiner.infer import (
    PARSER,
    Refiner,
    find_jobs,
    frames_of,
    load_model,
    main,
    measure,
)
from gaussian_refiner.models.components import embed_images, load_components
from gaussian_refiner.models.denoise import decode, denoise, encode
from gaussian_refiner.models.objective import class_labels
from gaussian_refiner.models.unet import load_unet
from gaussian_refiner.repair import Frame, encode_frames, sampling

ROOT = Path(__file__).parents[2]
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
def offline(clean_process, monkeypatch, tmp_path):
    """No LPIPS weights, and none to be fetched; `--device cpu` hides the GPUs from one test alone."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch_home"))


@pytest.fixture
def run(checkpoint: Path, trained: Path):
    def call(*flags: object) -> None:
        fixed = ("--model", str(checkpoint), "--unet", str(trained), *SMALL)
        main([*fixed, *map(str, flags)])

    return call


def load(*flags: object) -> Refiner:
    config, _ = PARSER.parse(["--input", "a", "--output_dir", "b", *map(str, flags), *SMALL])
    return load_model(config, PartialState(cpu=True), torch.float32)


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
    run("--input", images / "renders/a.png", "--output_dir", output)
    assert load_image(output).size == (90, 67)
    assert list(output.parent.iterdir()) == [output]
    captured = capsys.readouterr()
    assert captured.out == f"1 of 1 images are there: {output}\n"
    assert "does not look at the render" not in captured.err


def test_one_image_with_all_that_goes_with_it(run, images, tmp_path, capsys):
    output = tmp_path / "out.png"
    flags = ("--reference", images / "references/a.png", "--gt", images / "gts/a.png", "--side_by_side")
    run("--input", images / "renders/a.png", "--output_dir", output, *flags)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.png", "out_metrics.json", "out_side_by_side.png"]
    sheet = load_image(tmp_path / "out_side_by_side.png")
    assert sheet.height == 67 + 2 * 4 + 16 and sheet.width > 4 * 90
    printed = capsys.readouterr()
    assert f"metrics of 1 images: {tmp_path / 'out_metrics.json'}" in printed.out
    assert "no LPIPS in the metrics: LPIPS (alex) has no weights" in printed.err


def test_an_image_is_repaired_as_the_formulas_say(checkpoint, trained, images, tmp_path, run):
    """Against the sampler called by hand: one window, so no blending takes part."""
    output = tmp_path / "out.png"
    files = {"input": images / "renders/b.png", "reference": images / "references/b.png"}
    run("--input", files["input"], "--reference", files["reference"], "--output_dir", output, "--seed", 7)

    refiner = load("--model", checkpoint, "--unet", trained)
    parts = refiner.components
    crops = [load_image(files[name]).resize((64, 64), Image.Resampling.LANCZOS) for name in ("input", "reference")]
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
    latents = denoise(
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
        run("--input", images / "renders/b.png", "--output_dir", tmp_path / f"{name}.png", *flags)
    bytes_of = {name: (tmp_path / f"{name}.png").read_bytes() for name in variants}
    assert bytes_of["none"] == bytes_of["again"]
    assert len(set(bytes_of.values())) == 4


def test_cond_cache_changes_nothing(run, images, tmp_path):
    for name, cached in (("cached", "true"), ("paired", "false")):
        flags = ("--reference", images / "references/wide.png", "--cond_cache", cached)
        run("--input", images / "renders/wide.png", "--output_dir", tmp_path / f"{name}.png", *flags)
    difference = np.abs(pixels(tmp_path / "cached.png") - pixels(tmp_path / "paired.png"))
    assert difference.max() <= 1 and difference.mean() < 0.01


@pytest.mark.parametrize("name, content", [("rgba", "RGBA"), ("grey", "L"), ("odd", "RGB")])
def test_other_modes_and_odd_sizes(run, tmp_path, name, content):
    rng = np.random.default_rng(1)
    channels = {"RGBA": (4,), "L": (), "RGB": (3,)}[content]
    picture = Image.fromarray(rng.integers(0, 256, (33, 41, *channels), dtype=np.uint8))
    assert picture.mode == content
    picture.save(tmp_path / "in.png")
    run("--input", tmp_path / "in.png", "--output_dir", tmp_path / "out.png")
    with Image.open(tmp_path / "out.png") as repaired:
        assert repaired.size == (41, 33) and repaired.mode == "RGB"


def test_parity_samples_as_the_original(run, checkpoint, images, tmp_path, monkeypatch, capsys):
    seen = {}

    def record(unet, cache, scheduler, *, render_latents, **options):
        seen.update(options)
        return render_latents

    monkeypatch.setattr(repair_module, "denoise", record)
    job = ("--input", images / "renders/a.png", "--reference", images / "references/a.png")
    run(*job, "--output_dir", tmp_path / "out.png", "--parity", "--seed", 3)
    assert (seen["num_inference_steps"], seen["guidance_scale"], seen["guidance_rescale"]) == (20, 10.0, 0.0)
    assert seen["null_kinds"] == ("text", "clip") and not torch.equal(*seen["text"])
    noise = draw_normal(3, "validation image embedding noise", [0], (2, 12))[0]  # both rows of the pair: (2, D)
    assert not torch.equal(*noise)
    sigma = (1 - DDPMScheduler(beta_schedule="squaredcos_cap_v2").alphas_cumprod[0]).sqrt()
    difference = (seen["class_labels"][1] - seen["class_labels"][0])[:12]
    std = load_components(str(checkpoint)).image_normalizer.std[0].detach()
    torch.testing.assert_close(difference, sigma * std * (noise[1] - noise[0]), atol=1e-5, rtol=0)
    assert "--num_inference_steps has no effect: parity is True, not False" in capsys.readouterr().err


def test_a_rescale_without_guidance_is_named(caplog):
    text = torch.zeros(1, 77, 16), torch.zeros(2, 77, 16)
    for flags in ((), ("--guidance_scale", "1"), ("--guidance_rescale", "0.3")):
        sampling(PARSER.parse(["--input", "a", "--output_dir", "b", "--model", "c", *flags])[0].sampling, *text)
    assert caplog.messages == []
    flags = ("--guidance_scale", "1", "--guidance_rescale", "0.3")
    sampling(PARSER.parse(["--input", "a", "--output_dir", "b", "--model", "c", *flags])[0].sampling, *text)
    assert caplog.messages == ["guidance_rescale 0.3 has no effect: guidance_scale is 1"]


# Windows --------------------------------------------------------------------------------------------------------------


def frame(bucket: str, *flags: str) -> Frame:
    return frames_of(PARSER.parse(["--input", "a", "--output_dir", "b", "--model", "c", *flags])[0].sampling)[bucket]


def test_frames_of_the_buckets():
    assert frame("1.5") == Frame(640, 480, 480, 120, (0, 160))
    assert frame("3.66") == Frame(1920, 512, 512, 128, (0, 384, 768, 1152, 1408))
    assert frame("3.66", "--full_frame") == Frame(1920, 512, None, 0, (704,))
    assert frame("1.5", "--full_frame") == Frame(640, 480, None, 0, (80,))
    assert frame("3.66", "--height_px", "64") == Frame(256, 64, 64, 16, (0, 48, 96, 144, 192))
    assert frame("3.66", "--height_px", "64", "--window_overlap_px", "0") == Frame(256, 64, 64, 0, (0, 64, 128, 192))
    assert frame("1.5", "--height_px", "64").width_px == 64
    with pytest.raises(ValueError, match="overlap_px=64 must lie in .0, 56. for window_px=64"):
        frame("3.66", "--height_px", "64", "--window_overlap_px", "64")


def test_each_window_sees_its_part_of_the_reference(checkpoint, trained):
    components = load("--model", checkpoint, "--unet", trained).components
    rng = np.random.default_rng(2)
    renders, references = ([rng.integers(0, 256, (64, 128, 3), dtype=np.uint8) for _ in range(2)] for _ in range(2))
    encoded = encode_frames(components, renders, [references[0], None], Frame(128, 64, 64, 16, (0, 48, 64)))
    assert encoded["has_cond"].tolist() == [True, False]
    assert encoded["render_latents"].shape == encoded["cond_latents"].shape == (2, 4, 8, 16)
    assert encoded["image_embeds"].shape == (3, 2, 12)
    for window, left in enumerate((0, 48, 64)):
        alone = embed_images(components, [references[0][:, left : left + 64].copy()])
        torch.testing.assert_close(encoded["image_embeds"][window, :1], alone)


def test_windows_and_full_frame_differ_and_keep_the_size(run, images, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(repair_module, "denoise", lambda *a, **options: calls.append(options) or denoise(*a, **options))
    source = images / "renders/wide.png"
    run("--input", source, "--output_dir", tmp_path / "windows.png", "--reference", images / "references/wide.png")
    run("--input", source, "--output_dir", tmp_path / "full.png", "--full_frame")
    assert (calls[0]["window_px"], calls[0]["window_overlap_px"], len(calls[0]["class_labels"])) == (64, 16, 5)
    assert calls[0]["class_labels"][0].any()
    assert calls[1]["window_px"] is None and calls[1]["class_labels"].shape == (1, 24)
    assert not calls[1]["class_labels"].any() and not calls[1]["cond_latents"].any()  # no reference
    assert calls[1]["render_latents"].shape == (1, 4, 8, 32)
    assert pixels(tmp_path / "windows.png").shape == pixels(tmp_path / "full.png").shape == (50, 188, 3)
    assert np.abs(pixels(tmp_path / "windows.png") - pixels(tmp_path / "full.png")).max() > 1


# Folders --------------------------------------------------------------------------------------------------------------


def test_folder_with_references_whatever_the_batch(run, images, tmp_path):
    folders = ("--input", images / "renders", "--reference", images / "references")
    run(*folders, "--output_dir", tmp_path / "one")
    run(*folders, "--output_dir", tmp_path / "two", "--batch_size", 2)
    assert sorted(p.name for p in (tmp_path / "one").iterdir()) == ["a.png", "b.png", "wide.png"]
    for name, size in (("a", (90, 67)), ("b", (64, 48)), ("wide", (188, 50))):
        assert load_image(tmp_path / "one" / f"{name}.png").size == size
        difference = np.abs(pixels(tmp_path / "one" / f"{name}.png") - pixels(tmp_path / "two" / f"{name}.png"))
        assert difference.max() <= 1 and difference.mean() < 0.01


def test_existing_outputs_are_kept_and_the_rest_is_the_same(run, images, tmp_path, capsys, monkeypatch):
    run("--input", images / "renders", "--output_dir", tmp_path)
    first = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    (tmp_path / "b.png").unlink()
    (tmp_path / "a.png").write_bytes(b"mine")
    capsys.readouterr()
    run("--input", images / "renders", "--output_dir", tmp_path)
    assert capsys.readouterr().out.splitlines() == [
        "2 of 3 images exist and are kept; --overwrite true makes them again",
        f"3 of 3 images are there: {tmp_path}",
    ]
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == first | {"a.png": b"mine"}
    run("--input", images / "renders", "--output_dir", tmp_path, "--overwrite")
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == first
    monkeypatch.setattr(infer_module, "load_model", lambda *_: pytest.fail("nothing is left to repair"))
    run("--input", images / "renders", "--output_dir", tmp_path)


def test_unreadable_images_are_skipped_and_listed(run, images, tmp_path, capsys):
    renders, output = tmp_path / "renders", tmp_path / "out"
    renders.mkdir()
    whole = (images / "renders/a.png").read_bytes()
    (renders / "a.png").write_bytes(whole)
    (renders / "cut.png").write_bytes(whole[: len(whole) // 2])  # its header is fine
    (renders / "text.png").write_text("no image")
    (renders / "notes.txt").write_text("not looked at")
    text = problem(capsys, run, "--input", renders, "--output_dir", output, "--batch_size", 3)
    assert [p.name for p in output.iterdir()] == ["a.png"]
    assert f"not made: {renders / 'text.png'}: has no readable image header" in text
    listed = text[text.index("2 images went wrong:") :].splitlines()
    assert len(listed) == 3
    assert {str(renders / name) in "".join(listed[1:]) for name in ("cut.png", "text.png")} == {True}
    run("--input", renders / "a.png", "--output_dir", tmp_path / "alone.png")
    assert (tmp_path / "alone.png").read_bytes() == (output / "a.png").read_bytes()


def test_results_that_are_not_finite_are_not_written(run, images, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(repair_module, "decode", lambda vae, latents: torch.full((1, 3, 64, 64), float("nan")))
    text = problem(capsys, run, "--input", images / "renders/a.png", "--output_dir", tmp_path / "out.png")
    assert "the result is not finite: use --mixed_precision bf16 or no" in text
    assert not list(tmp_path.glob("*.png"))


def test_too_little_memory_names_the_batch_size(run, images, tmp_path, capsys, monkeypatch):
    def out_of_memory(*arguments: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB.")

    monkeypatch.setattr(repair_module, "decode", out_of_memory)
    flags = ("--input", images / "renders", "--output_dir", tmp_path / "out", "--batch_size", 2)
    text = problem(capsys, run, *flags)
    assert (
        "error: cpu ran out of memory with a batch_size of 2: lower it or height_px, leave out --full_frame, or use a "
        "half --mixed_precision. torch says: CUDA out of memory. Tried to allocate 20 GiB." in text
    )
    assert "Traceback" not in text


# Lists and metrics ----------------------------------------------------------------------------------------------------


def test_json_with_metrics_of_old_and_new_outputs(run, data_folder, tmp_path, capsys):
    flags = ("--input", data_folder / "example_kitti.json", "--holdout_items", 3, "--output_dir", tmp_path)
    run(*flags)
    first = json.loads((tmp_path / "metrics.json").read_text())
    names = [f"{number:06d}_{number:04d}.png" for number in (13, 14, 15)]
    assert [row["name"] for row in first["images"]] == names and first["num_images"] == 3
    for row, number in zip(first["images"], (13, 14, 15), strict=True):
        files = (tmp_path / row["name"], data_folder / f"render/{number:04d}.png", data_folder / f"gt/{number:04d}.png")
        repaired, render, gt = (torch.from_numpy(pixels(path)).permute(2, 0, 1)[None] / 255 for path in files)
        expected = {"psnr": psnr(repaired, gt), "psnr_render": psnr(render, gt)}
        expected |= {"ssim": ssim(repaired, gt), "ssim_render": ssim(render, gt)}
        assert {k: v for k, v in row.items() if k != "name"} == pytest.approx(
            {name: value.item() for name, value in expected.items()}, abs=1e-4
        )
    assert first["mean"] == pytest.approx(
        {name: np.mean([row[name] for row in first["images"]]) for name in first["mean"]}
    )
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == "PSNR (dB) render -> repaired SSIM render -> repaired".split()
    mean = first["mean"]
    assert lines[-3].split() == (
        f"mean {mean['psnr_render']:.4f} -> {mean['psnr']:.4f} {mean['ssim_render']:.4f} -> {mean['ssim']:.4f}".split()
    )
    (tmp_path / names[1]).unlink()
    run(*flags)
    assert json.loads((tmp_path / "metrics.json").read_text()) == first


def test_two_processes_equal_one(run, checkpoint, trained, data_folder, tmp_path, capsys):
    """Pictures, sheets and metrics; a render that cannot be read ends one process, and is missing in both."""
    root = shutil.copytree(data_folder, tmp_path / "pairs")
    (root / "render/0014.png").write_bytes(b"no image")
    flags = ["--input", str(root / "example_kitti.json"), "--holdout_items", "3", "--side_by_side"]
    problem(capsys, run, *flags, "--output_dir", tmp_path / "one")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    weights = ["--model", str(checkpoint), "--unet", str(trained), *SMALL]
    command = [*launcher, "-m", "gaussian_refiner.infer", *weights, *flags, "--output_dir", str(tmp_path / "two")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment)
    assert done.returncode != 0 and "1 images went wrong:\n" in done.stderr
    assert f"2 of 3 images are there: {tmp_path / 'two'}" in done.stdout and "metrics of 2 images: " in done.stdout
    one, two = (
        {p.relative_to(f): p.read_bytes() for p in f.rglob("*.*")} for f in (tmp_path / "one", tmp_path / "two")
    )
    assert len(one) == 2 + 2 + 1 and one == two


def test_lpips_joins_the_metrics(images, tmp_path):
    with torch.random.fork_rng():
        model = LPIPS(net="alex", pnet_rand=True, verbose=False)
    job = find_jobs(data_section("--input", images / "renders/a.png", "--gt", images / "gts/a.png"))[0]
    job.output.write_bytes((images / "gts/a.png").read_bytes())
    row = measure(job, infer_module.Lpips(model.eval()))
    assert list(row) == ["psnr", "psnr_render", "ssim", "ssim_render", "lpips", "lpips_render"]
    assert (row["psnr"], row["ssim"], row["lpips"]) == (100, pytest.approx(1), 0)
    assert row["lpips_render"] > 0 and row["psnr_render"] < 30
    table = infer_module.table({"a.png": row} | {f"{n}.png": row for n in range(40)}, row).splitlines()
    assert "LPIPS render -> repaired" in table[0] and table[-2] == "... and 11 more" and len(table) == 33


def test_lpips_weights_that_are_asked_for_must_be_there(images, checkpoint, capsys):
    Path("out.png").write_bytes((images / "gts/a.png").read_bytes())
    flags = ["--input", str(images / "renders/a.png"), "--gt", str(images / "gts/a.png"), "--output_dir", "out.png"]
    with pytest.raises(SystemExit) as stopped:
        main([*flags, "--model", str(checkpoint), "--lpips_weights", "no.pth", "--device", "cpu"])
    assert stopped.value.code == 1
    assert "error: LPIPS (alex): the weights no.pth are not a file: download" in capsys.readouterr().err


def test_what_cannot_be_measured_is_said(images, tmp_path):
    job = find_jobs(data_section("--input", images / "renders/a.png", "--gt", images / "gts/a.png"))[0]
    Image.new("RGB", (10, 10)).save(job.output)
    with pytest.raises(MediaError, match="is 10 x 10 px, its render 90 x 67 px: repair it again with --overwrite"):
        measure(job, None)


def data_section(*flags: object):
    """The data section of these flags; the output is out.png in the working directory unless they say."""
    flags = tuple(map(str, flags)) + (() if "--output_dir" in flags else ("--output_dir", "out.png"))
    return PARSER.parse([*flags, "--model", "c"])[0].data


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_splits_of_the_two_formats(data_folder, tmp_path):
    source = data_folder / "example_kitti.json"
    numbers = {
        split: [
            int(job.render.stem)
            for job in find_jobs(data_section("--input", source, "--output_dir", "o", "--split", split))
        ]
        for split in ("train", "validation", "all")
    }
    assert numbers == {"train": [*range(6)], "validation": [*range(6, 16)], "all": [*range(16)]}
    image = str(data_folder / "gt/0000.png")
    items = {"scene/1": {"image": image, "target_image": image}}
    (tmp_path / "difix.json").write_text(json.dumps({"train": items, "test": {"scene/2": items["scene/1"]}}))
    jobs = find_jobs(data_section("--input", "difix.json", "--output_dir", "o", "--split", "all"))
    assert [str(job.output) for job in jobs] == ["o/scene_1.png", "o/scene_2.png"]
    assert [job.reference for job in jobs] == [None, None]


# What is told ---------------------------------------------------------------------------------------------------------


def fill(folder: Path, *names: str) -> Path:
    folder.mkdir()
    for name in names:
        (folder / name).touch()
    return folder


def test_references_of_the_same_names_or_of_the_same_number(tmp_path, caplog):
    renders = fill(tmp_path / "renders", "b.png", "a.png")
    same = fill(tmp_path / "same", "a.JPG", "b.png", "more.png")
    other = fill(tmp_path / "other", "y.png", "x.png")
    jobs = find_jobs(data_section("--input", renders, "--reference", same, "--gt", other, "--output_dir", "o"))
    assert [(job.number, job.render.name, job.reference.name, job.gt.name) for job in jobs] == [
        (0, "a.png", "a.JPG", "x.png"),
        (1, "b.png", "b.png", "y.png"),
    ]
    assert (
        f"--gt {other}: no name agrees with those of --input, so images are paired in order of their names, a.png with"
        " x.png first" in caplog.text
    )
    jobs = find_jobs(data_section("--input", renders, "--reference", same / "more.png", "--output_dir", "o"))
    assert [job.reference.name for job in jobs] == ["more.png", "more.png"]


def test_paths_that_do_not_fit(tmp_path):
    renders = fill(tmp_path / "renders", "a.png", "b.png")
    partly = fill(tmp_path / "partly", "a.png", "c.png")
    three = fill(tmp_path / "three", "x.png", "y.png", "z.png")
    fill(tmp_path / "empty", "notes.txt")
    twins = fill(tmp_path / "twins", "a.png", "a.jpg")
    (tmp_path / "file").touch()
    cases = {
        f"nope.png was not found; tried {tmp_path}/nope.png, ": ("--input", "nope.png"),
        f"--input {tmp_path}/empty holds no images: files ending in .png, .jpg": ("--input", "empty"),
        f"gone was not found; tried {tmp_path}/gone, ": ("--input", renders, "--reference", "gone"),
        f"--reference {partly} holds 2 images, but none for 1 of 2 inputs: b. Give every input one": (
            *("--input", renders, "--reference", "partly"),
        ),
        f"--gt {three} holds 3 images, but none for 2 of 2 inputs: a, b": ("--input", renders, "--gt", three),
        f"--gt {three}/x.png is one image, but --input gives 2: give a folder": (
            *("--input", renders, "--gt", "three/x.png"),
        ),
        "--output_dir out.png is one file, but --input gives 2 images: give a folder": ("--input", renders),
        "--output_dir file must be a folder, or a file that ends in .png": ("--input", renders, "--output_dir", "file"),
        "--output_dir o.jpg must be a folder, or a file that ends in .png": (
            *("--input", renders / "a.png", "--output_dir", "o.jpg"),
        ),
        f"{twins}/a.jpg and {twins}/a.png would both be written to o/a.png: rename one": (
            *("--input", twins, "--output_dir", "o"),
        ),
        f"--output_dir {renders} would overwrite the input {renders}/a.png": (
            "--input",
            renders,
            "--output_dir",
            renders,
        ),
        f"--output_dir {partly} would overwrite the input {partly}/a.png": (
            *("--input", renders / "a.png", "--reference", partly / "a.png", "--output_dir", partly),
        ),
    }
    for message, flags in cases.items():
        with pytest.raises((ValueError, FileNotFoundError)) as raised:
            find_jobs(data_section(*flags))
        assert str(raised.value).startswith(message), f"{message}\n{raised.value}"


def test_settings_that_cannot_be(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--heigth_px", "64", "--guidance_scale", "0", "--height_px", "100"])
    assert stopped.value.code == 2
    text = capsys.readouterr().err
    assert "infer.py: the configuration cannot be used" in text
    assert "--heigth_px (flag) is unknown; did you mean height_px" in text
    assert "height_px 100 must be a multiple of 8 and at least 64" in text
    assert "--guidance_scale: 0.0 must be above 0" in text
    with pytest.raises(SystemExit):
        main(["--input", "list.json", "--reference", "r"])
    text = capsys.readouterr().err
    assert "--output_dir is required: a folder, or for one image a .png file" in text
    assert "--model is required: the folder `export` of a run" in text
    assert "--reference cannot go with the json list list.json, which names its own; leave it out" in text
    with pytest.raises(SystemExit):
        main([])
    assert "--input is required: an image, a folder of images, or a json list" in capsys.readouterr().err


def test_older_spellings_hold():
    old = "--pretrained_model_name_or_path m --output o data.output=o frame.height_px=64 --input i".split()
    new = "--model m --output_dir o sampling.height_px=64 --input i".split()
    assert PARSER.parse(old) == PARSER.parse(new)


def test_bf16_repairs(run, images, tmp_path):
    flags = ("--reference", images / "references/b.png")
    run("--input", images / "renders/b.png", "--output_dir", tmp_path / "full.png", *flags)
    run("--input", images / "renders/b.png", "--output_dir", tmp_path / "half.png", *flags, "--mixed_precision", "bf16")
    difference = np.abs(pixels(tmp_path / "full.png") - pixels(tmp_path / "half.png"))
    assert 0 < difference.max() and difference.mean() < 5


def test_untrained_and_missing_weights_are_told(checkpoint, run, images, tmp_path, capsys):
    job = ("--input", str(images / "renders/a.png"), "--output_dir", str(tmp_path / "out.png"), *SMALL)
    main([*job, "--model", str(checkpoint)])
    assert f"the UNet of {checkpoint} does not look at the render: these are the weights that training starts from" in (
        capsys.readouterr().err
    )
    for flags, message in (
        (("--model", str(images)), "is no unCLIP checkpoint in diffusers layout"),
        (("--model", str(checkpoint), "--unet", str(images)), "no weights in"),
    ):
        with pytest.raises(SystemExit) as stopped:
            main([*job, "--overwrite", *flags])
        assert stopped.value.code == 1
        error = capsys.readouterr().err
        assert message in error and "Traceback" not in error


@pytest.mark.parametrize("suffix", ["unet", ""])
def test_weights_of_the_original_trainer_load(checkpoint, trained, suffix):
    unet = load("--model", checkpoint, "--unet", trained / suffix).components.unet
    weights = torch.load(trained / "unet" / "diffusion_pytorch_model.bin", weights_only=True)
    assert unet.config.in_channels == 8
    assert all(torch.equal(value, weights[name]) for name, value in unet.state_dict().items())


def test_an_export_needs_no_other_unet(checkpoint, trained, images, run, tmp_path):
    load_components(str(checkpoint), unet_source=str(trained)).pipeline().save_pretrained(tmp_path / "export")
    job = ["--input", str(images / "renders/a.png"), *SMALL]
    main([*job, "--output_dir", "exported.png", "--model", str(tmp_path / "export")])
    run("--input", images / "renders/a.png", "--output_dir", "given.png")
    assert (tmp_path / "exported.png").read_bytes() == (tmp_path / "given.png").read_bytes()


@pytest.mark.parametrize("as_module", [True, False])
def test_help_of_both_ways_to_start(as_module):
    folder = Path(infer_module.__file__).parent
    command = ["-m", "gaussian_refiner.infer"] if as_module else ["infer.py"]
    done = subprocess.run(
        [sys.executable, *command, "--help"],
        cwd=folder.parent if as_module else folder,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0 and not done.stderr
    assert "usage: infer.py" in done.stdout
    for flag in ("input", "output_dir", "output", "reference", "gt", "model", "unet", "batch_size", "seed"):
        assert re.search(rf", --{flag}[,\n]", done.stdout), flag
