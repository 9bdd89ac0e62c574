"""The command: photographs in, folders of views out, the same whatever the batch; pictures and their metrics."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import make_tiny_checkpoints
import numpy as np
import pytest
import torch
from accelerate import PartialState
from PIL import Image
from running import on_ranks

from common.video import MediaError, load_image, probe_video
from mvdiffusion import infer
from mvdiffusion.infer import PARSER, find_jobs, main
from mvdiffusion.media import (
    image_grid,
    interleave_halves,
    normal_angular_error,
    object_mask,
    prepare_photo,
    read_photo,
    turntable,
    view_sheet,
)
from mvdiffusion.models import components
from mvdiffusion.models.initialise import load_unet
from mvdiffusion.pipelines import MVDiffusionImagePipeline, fixed_cameras, load_pipeline
from mvdiffusion.pipelines.mvdiffusion_image import released_cameras

VIEWS = ("front", "right", "back", "left")
REQUIRED = ["--input", "photos", "--output_dir", "out"]
FEW = ["--num_inference_steps", "2", "--device", "cpu", "--mixed_precision", "no"]


@pytest.fixture(autouse=True)
def on_cpu(clean_process: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """`--device cpu` hides the GPUs: from this test alone."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_checkpoints.make_mvdiffusion_checkpoint(tmp_path_factory.mktemp("mv") / "tiny")


@pytest.fixture(scope="module")
def model(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline as training exports it, for four views."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet, _ = load_unet(checkpoint, unet_config={"cd_attention_mid": True}, num_views=4, conv_in_init="copy_random")
    path, folder = str(checkpoint), tmp_path_factory.mktemp("run") / "export"
    MVDiffusionImagePipeline(
        components.load_vae(path),
        components.load_image_encoder(path),
        unet,
        components.load_scheduler(path),
        components.load_feature_extractor(path),
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """owl.png and Fox.webp are cut out, cat.jpg is not."""
    folder = tmp_path_factory.mktemp("photos")
    for number, name in enumerate(("owl.png", "Fox.webp", "cat.jpg")):
        coarse = np.random.default_rng(number).integers(0, 256, (4, 4, 3), dtype=np.uint8)
        picture = Image.fromarray(coarse).resize((90, 60), Image.Resampling.BICUBIC)
        if number < 2:
            alpha = np.zeros((60, 90), np.uint8)
            alpha[10:50, 30:50] = 255
            picture.putalpha(Image.fromarray(alpha))
        picture.save(folder / name)
    (folder / "notes.txt").touch()
    return folder


def run(model: Path, *arguments: object, num_processes: int = 1) -> dict:
    """Why objects went wrong, of all processes, by name."""
    config, _ = PARSER.parse(["--model", str(model), *map(str, arguments), *FEW])
    done = on_ranks(num_processes, lambda rank: infer.infer(config, rank, torch.float32))
    return {job.name: reason for each in done for job, reason in each.items()}


def files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def pixels(path: Path) -> np.ndarray:
    return np.asarray(load_image(path)).astype(int)  # (H, W, 3)


# The command ----------------------------------------------------------------------------------------------------------


def test_a_folder_of_photographs(model, photos, tmp_path, capsys, caplog):
    output = tmp_path / "views"
    arguments = ["--model", str(model), "--input", str(photos), "--output_dir", str(output), *FEW]
    main(arguments)
    printed = capsys.readouterr()
    assert "3 of 3 objects are there" in printed.out
    assert f"{photos}/cat.jpg has no transparency: its background is taken as it is" in printed.err
    assert "owl.png has no transparency" not in printed.err
    assert sorted(path.name for path in output.iterdir()) == ["Fox", "cat", "owl"]
    plain = {f"{kind}_000_{view}.png" for kind in ("normals", "rgb") for view in VIEWS}
    plain |= {"input.png", "sheet.png", "turntable.mp4", "views.json"}
    assert files(output / "cat") == sorted(plain)
    assert files(output / "owl") == sorted(plain | {f"masked_colors/rgb_000_{view}.png" for view in VIEWS})

    with Image.open(output / "owl/masked_colors/rgb_000_back.png") as masked:
        assert masked.mode == "RGBA" and masked.size == (64, 64)
        assert np.array_equal(np.asarray(masked)[..., :3], pixels(output / "owl/rgb_000_back.png"))
        alpha = np.asarray(masked)[..., 3]
    with Image.open(output / "owl/normals_000_back.png") as normals:
        assert normals.mode == "RGBA" and np.array_equal(np.asarray(normals)[..., 3], alpha)
    with Image.open(output / "cat/normals_000_back.png") as normals:
        assert normals.mode == "RGB"
    info = probe_video(output / "owl/turntable.mp4")
    assert (info.num_frames, info.fps, info.width_px, info.height_px) == (4, 2, 64, 128)
    record = json.loads((output / "owl/views.json").read_text())
    assert [name for name, *_ in record["cameras"]] == list(VIEWS)
    assert (record["input"], record["seed"], record["guidance_scale"]) == (f"{photos}/owl.png", 42, 3.0)

    # What is missing is made again, and is the same; the rest is left alone.
    picture, kept = (output / "owl/rgb_000_back.png").read_bytes(), (output / "cat/input.png").stat().st_mtime_ns
    shutil.rmtree(output / "owl")
    main(arguments)
    assert "2 of 3 objects exist and are kept; --overwrite true makes them again" in capsys.readouterr().out
    assert (output / "owl/rgb_000_back.png").read_bytes() == picture
    assert (output / "cat/input.png").stat().st_mtime_ns == kept
    with pytest.raises(SystemExit):
        main([*arguments, "--guidance_scale", "2", "--seed", "1"])
    assert f"{output}/Fox/views.json was made with another guidance_scale, seed: give another --output_dir, or" in (
        capsys.readouterr().err
    )


def test_batches_processes_and_other_photographs_do_not_count(model, photos, tmp_path):
    assert run(model, "--input", photos, "--output_dir", tmp_path / "one") == {}
    assert run(model, "--input", photos, "--output_dir", tmp_path / "all", "--batch_size", 3) == {}
    assert run(model, "--input", photos, "--output_dir", tmp_path / "two", num_processes=2) == {}
    assert run(model, "--input", photos / "owl.png", "--output_dir", tmp_path / "single") == {}
    assert files(tmp_path / "one") == files(tmp_path / "all") == files(tmp_path / "two")
    for name in (f"owl/{kind}_000_{view}.png" for kind in ("rgb", "normals") for view in VIEWS):
        expected = pixels(tmp_path / "single" / name)
        for other in ("one", "all", "two"):
            assert abs(pixels(tmp_path / other / name) - expected).max() <= 1, name
    assert abs(pixels(tmp_path / "one/Fox/rgb_000_back.png") - pixels(tmp_path / "one/owl/rgb_000_back.png")).max() > 1


def test_a_bad_photograph_does_not_take_others_along(model, photos, tmp_path, capsys):
    folder = shutil.copytree(photos, tmp_path / "photos")
    (folder / "bad.png").write_bytes((photos / "owl.png").read_bytes()[:200])
    (folder / "empty.jpg").touch()
    Image.new("RGBA", (20, 20)).save(folder / "ghost.png")
    output = tmp_path / "out"
    failures = run(model, "--input", folder, "--output_dir", output, "--batch_size", 6)
    assert sorted(failures) == ["bad", "empty", "ghost"]
    assert failures["bad"].startswith("cannot be read as an image") and "0 bytes" in failures["empty"]
    assert failures["ghost"].startswith("the photograph is transparent everywhere: there is no object")
    assert sorted(path.name for path in output.iterdir()) == ["Fox", "cat", "owl"]
    printed = capsys.readouterr()
    assert "3 of 6 objects are there" in printed.out
    assert f"not made: {folder}/ghost.png: the photograph is transparent everywhere" in printed.err
    with pytest.raises(SystemExit) as stopped:
        main(["--model", str(model), "--input", str(folder), "--output_dir", str(output), *FEW])
    assert stopped.value.code == 1
    assert "3 objects went wrong:\n  " in capsys.readouterr().err


def test_other_settings(model, photos, tmp_path):
    arguments = ["--input", photos / "owl.png", "--masks", "false", "--sheet", "false", "--turntable", "false"]
    arguments += ["--resolution", 48, "--background", "gray", "--crop_size", 40, "--guidance_scale", 1, "--eta", 0]
    run(model, *arguments, "--output_dir", tmp_path / "out", "--poses", "upright", "--views", *VIEWS[:2], "top", "left")
    names = [f"{kind}_000_{view}.png" for kind in ("normals", "rgb") for view in ("front", "right", "top", "left")]
    assert files(tmp_path / "out/owl") == sorted([*names, "input.png", "views.json"])
    shown = pixels(tmp_path / "out/owl/input.png")
    assert shown.shape == (48, 48, 3) and (shown[0] == 128).all()
    rows = np.flatnonzero((shown != 128).any((1, 2)))
    assert (rows.min(), rows.max()) == (4, 43)
    cameras = json.loads((tmp_path / "out/owl/views.json").read_text())["cameras"]
    assert cameras[1] == ["right", pytest.approx(0), pytest.approx(np.pi / 2)]


def test_poses_are_those_of_training(model, checkpoint, tmp_path, caplog):
    trained = load_pipeline(str(model), cameras=fixed_cameras(VIEWS, "upright"))
    trained.save_pretrained(tmp_path / "export")

    def cameras(source: Path, *arguments: object) -> list:
        config = PARSER.parse([*REQUIRED, "--model", str(source), *map(str, arguments)])[0]
        return infer.load_model(config, PartialState(), torch.float32).config.cameras

    other = ["front", "front_right", "right", "back"]
    assert cameras(tmp_path / "export", "--views", *other) == fixed_cameras(other, "upright")
    assert cameras(checkpoint, "--unet", model, "--poses", "upright") == fixed_cameras(VIEWS, "upright")
    assert caplog.text == ""
    assert cameras(checkpoint, "--unet", model) == released_cameras(VIEWS)
    assert "is taken to be trained with tilted poses" in caplog.text and "--poses upright" in caplog.text


def test_a_damaged_record_is_named(model, photos, tmp_path):
    (tmp_path / "out/owl").mkdir(parents=True)
    (tmp_path / "out/owl/views.json").write_text("{")
    with pytest.raises(ValueError, match="owl/views.json is no valid JSON"):
        run(model, "--input", photos / "owl.png", "--output_dir", tmp_path / "out")


def test_weights_of_a_checkpoint(model, checkpoint, photos, tmp_path):
    folder = tmp_path / "checkpoint-5"
    shutil.copytree(model / "unet", folder / "unet")
    unet, _ = load_unet(model, num_views=4)
    torch.nn.init.zeros_(unet.conv_out.weight.detach())
    unet.save_pretrained(folder / "unet_ema")
    pictures = {}
    choices = {"own": (model, ()), "raw": (checkpoint, (folder,)), "ema": (model, (folder, "--use_ema", "true"))}
    for name, (source, choice) in choices.items():
        output, more = tmp_path / name, ("--unet", *choice) if choice else ()
        assert run(source, "--input", photos / "owl.png", "--output_dir", output, *more) == {}
        pictures[name] = pixels(output / "owl/rgb_000_left.png")
    assert abs(pictures["own"] - pictures["raw"]).max() <= 1
    assert abs(pictures["own"] - pictures["ema"]).max() > 1


def test_settings_and_paths_that_do_not_fit(model, photos, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--crop_size", "0", "--etta", "2"])
    assert stopped.value.code == 2
    assert "--etta (flag) is unknown; did you mean eta" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["--crop_size", "0"])
    text = capsys.readouterr().err
    for name in ("--input", "--output_dir", "--model"):
        assert f"{name} is required: " in text
    assert "crop_size 0 leaves nothing of the object: give pixels, or -1" in text

    def jobs(*arguments: object) -> Sequence[infer.Job]:
        return find_jobs(PARSER.parse(["--model", "m", *map(str, arguments)])[0].data)

    assert [job.name for job in jobs("--input", photos, "--output_dir", "o")] == ["Fox", "cat", "owl"]
    with pytest.raises(FileNotFoundError, match="nope was not found; .*set --input to where it is"):
        jobs("--input", tmp_path / "nope", "--output_dir", "o")
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match="none holds no images: files ending in .png, .jpg"):
        jobs("--input", tmp_path / "none", "--output_dir", "o")
    (tmp_path / "none/a.png").touch()
    (tmp_path / "none/a.jpg").touch()
    with pytest.raises(ValueError, match="a.jpg and .*a.png would both be written to o/a: rename one"):
        jobs("--input", tmp_path / "none", "--output_dir", "o")
    with pytest.raises(ValueError, match="a.png is a file, but must be a folder"):
        jobs("--input", photos, "--output_dir", tmp_path / "none/a.png")
    arguments = ["--input", photos, "--output_dir", tmp_path / "o"]
    with pytest.raises(ValueError, match="resolution 50 must be a multiple of 8, the VAE's pixels per latent"):
        run(model, *arguments, "--resolution", 50)
    with pytest.raises(ValueError, match=r"views names 1 views \(top\), but num_views is 4"):
        run(model, *arguments, "--views", "top")
    with pytest.raises(ValueError, match="crop_size 65 is above the resolution, 64: the object would not fit"):
        run(model, *arguments, "--crop_size", 65, "--resolution", 64)
    with pytest.raises(FileNotFoundError, match="the UNet is looked for in /no/where, no folder and no hub id"):
        run(model, *arguments, "--unet", "/no/where")


def test_help(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert not stopped.value.code
    text = capsys.readouterr().out
    assert "usage: infer.py" in text and "--output_dir, --output\n" in text and ", --guidance_scale" in text


# Photographs ----------------------------------------------------------------------------------------------------------


def test_photographs_are_upright_and_transparent_only_if_they_are(tmp_path):
    rgba = Image.new("RGBA", (30, 20), (10, 20, 30, 255))
    rgba.save(tmp_path / "opaque.png")
    assert read_photo(tmp_path / "opaque.png").mode == "RGB"
    rgba.putpixel((0, 0), (0, 0, 0, 0))
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    rgba.save(tmp_path / "turned.png", exif=exif)
    assert (read_photo(tmp_path / "turned.png").mode, read_photo(tmp_path / "turned.png").size) == ("RGBA", (20, 30))
    palette = rgba.convert("RGB").quantize(4)
    palette.save(tmp_path / "palette.gif", transparency=palette.getpixel((0, 0)))
    assert read_photo(tmp_path / "palette.gif").mode == "RGBA"
    with pytest.raises(MediaError, match="no such file"):
        read_photo(tmp_path / "none.png")


def test_photographs_are_centred():
    photo = Image.new("RGBA", (40, 30), (0, 0, 0, 0))
    photo.paste((200, 100, 50, 255), (0, 0, 10, 20))
    pixels = np.asarray(prepare_photo(photo, 32, None, "white"))
    object_ = (pixels != 255).any(-1)
    rows, columns = np.flatnonzero(object_.any(1)), np.flatnonzero(object_.any(0))
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (4, 27, 10, 21)  # 24 of 32 px, centred
    assert (pixels[16, 16] == (200, 100, 50)).all()
    wide = Image.new("RGB", (40, 20), (200, 100, 50))
    pixels = np.asarray(prepare_photo(wide, 32, 8, "black"))
    assert (pixels[[0, 31]] == 0).all() and (pixels[16] == (200, 100, 50)).all()
    with pytest.raises(ValueError, match="crop_size is 0, but must be -1 or at least 1"):
        prepare_photo(photo, 32, 0, "white")


# Pictures and metrics -------------------------------------------------------------------------------------------------


def encoded(*normal: float) -> torch.Tensor:
    """(3, 2, 2) of one normal."""
    return (torch.tensor(normal) / 2 + 0.5)[:, None, None].expand(3, 2, 2)


def test_angles_between_normals():
    up, side, tilted = encoded(0, 0, 1), encoded(1, 0, 0), encoded(0, 0.5, 0.5)
    everywhere = torch.ones(3, 2, 2, dtype=torch.bool)
    error = normal_angular_error(torch.stack([up, side, tilted]), up.expand(3, 3, 2, 2), everywhere)
    assert error.tolist() == pytest.approx([0, 90, 45], abs=1e-4)
    mixed = torch.cat([up[:, :1], side[:, :1]], dim=1)  # one row each
    half = torch.tensor([[True, True], [False, False]])
    assert normal_angular_error(mixed, up, half).item() == 0
    assert normal_angular_error(mixed, up, ~half).item() == pytest.approx(90)
    assert normal_angular_error(mixed, up, torch.ones(2, 2)).item() == pytest.approx(45)
    assert normal_angular_error(up, up, torch.zeros(2, 2)).isnan()
    with pytest.raises(ValueError, match=r"mask \(\.\.\., H, W\), got \(3, 2, 2\), \(3, 2, 2\) and \(1, 2, 2\)"):
        normal_angular_error(up, up, torch.ones(1, 2, 2))


def test_masks_follow_from_the_length_of_normals():
    surface = [encoded(0, 0, 1), encoded(0.6, 0.8, 0), encoded(-0.9, 0, 0)]
    plain = [torch.full((3, 2, 2), grey) for grey in (1.0, 0.5, 0.0)]
    assert object_mask(torch.stack([*surface, *plain])).flatten(1).all(1).tolist() == [True] * 3 + [False] * 3


def test_grids():
    rows = torch.arange(6.0)[:, None, None, None].expand(6, 3, 1, 2)
    assert image_grid(rows, 3)[0].tolist() == [[0, 0, 1, 1, 2, 2], [3, 3, 4, 4, 5, 5]]
    assert image_grid(interleave_halves(rows), 4)[2].tolist() == [[0, 0, 3, 3, 1, 1, 4, 4], [2, 2, 5, 5, 0, 0, 0, 0]]


def test_sheets_and_turntables():
    levels = torch.tensor([0.0, 0.2, 0.4])[:, None, None, None].expand(3, 3, 8, 8)
    views = {"normal": levels, "colour": 1 - levels}
    clip = turntable(views, [0.0, 3.0, -4.0])  # -4 is 2.28
    assert clip.shape == (3, 16, 8, 3) and clip.dtype == np.uint8
    assert clip[:, 8, 0, 0].tolist() == [0, 102, 51] and clip[:, 0, 0, 0].tolist() == [255, 153, 204]
    names = ["front", "back", "left"]
    sheet = view_sheet(torch.zeros(3, 8, 8), views, names)
    compared = view_sheet(torch.zeros(3, 8, 8), views, names, targets=views)
    assert sheet.dtype == np.uint8 and compared.shape[0] - sheet.shape[0] == 2 * 12  # 8 px and a gap of 4
