"""Training as users start it: the documented commands, stages, resume, exports, and what bad input is told."""

import json
import shutil
from pathlib import Path

import pytest
import running
import torch
from diffusers import DiffusionPipeline
from running import ROOT, assert_close, assert_same_checkpoint, entries, launch, metrics
from safetensors.torch import load_file, save_file

from mvdiffusion.config import PARSER, MVData, resolved
from mvdiffusion.train import conv_in_init, validation_background

WEIGHTS = "diffusion_pytorch_model.safetensors"
SMALL = (
    "--pretrained_config_path_unet null --num_views 2 --resolution 64 --num_validation_samples 2 --report_to none "
    "--dataloader_num_workers 0 --max_validation_items 1 --num_inference_steps 2 --validation_guidance_scale 2 "
    "--mixed_precision no --gradient_checkpointing no --lr_warmup_steps 0 --use_ema no --allow_tf32 no"
)


def train(*words: object) -> None:
    running.train("mvdiffusion", *SMALL.split(), *words)


def refused(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    return running.refused(capsys, "mvdiffusion", *SMALL.split(), *words)


@pytest.fixture
def flags(checkpoint: Path, renders: Path, clean_process: None) -> list[str]:
    """A small run that is not validated at the start."""
    words = f"--pretrained_model_name_or_path {checkpoint} --train_data_dir {renders} --train_batch_size 2"
    return [*words.split(), *"--gradient_accumulation_steps 1 --max_train_steps 4 --validate_at_start no".split()]


# The documented commands ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path, renders: Path) -> Path:
    """The run folder of the documented single-GPU command."""
    folder = tmp_path_factory.mktemp("single") / "run"
    words = f"--pretrained_model_name_or_path {checkpoint} --train_data_dir {renders} --output_dir {folder}"
    more = "--train_batch_size 2 --gradient_accumulation_steps 2 --max_train_steps 2 --checkpointing_steps 1"
    script = ["python", "train_image_variation.py", *SMALL.split()]
    output = launch(*script, *words.split(), *more.split(), folder=ROOT / "mvdiffusion")
    assert "num_views 2 x 2 domains x train_batch_size 2 = 8 rows" in output
    assert "conv_in.weight widened" in output and "6 items" in output
    return folder


def test_the_documented_single_gpu_command(single: Path) -> None:
    records = metrics(single)
    kinds = [(record["step"], record["kind"]) for record in records]
    assert kinds == [(0, "validation"), (1, "train"), (2, "train"), (2, "validation")]
    assert {"psnr", "ssim", "normals_deg"} < set(records[0]) and {"mse_normal", "mse_colour"} < set(records[1])
    assert {path.name for path in (single / "validation" / "step-000002").iterdir()} == {"000-cfg2.png", "sheet.png"}
    expected = {"manifest.json", "optimizer.bin", "random_states_0.pkl", "trainer_state.json", "unet"}
    assert {path.name for path in (single / "checkpoint-2").iterdir()} == expected


def test_the_export_reloads_as_a_pipeline(single: Path) -> None:
    trained = load_file(single / "checkpoint-2" / "unet" / WEIGHTS)
    pipeline = DiffusionPipeline.from_pretrained(single / "export")
    assert type(pipeline).__name__ == "MVDiffusionImagePipeline" and pipeline.views == ["front", "back"]
    assert all(torch.equal(tensor, trained[name]) for name, tensor in pipeline.unet.state_dict().items())
    assert pipeline.unet.config.sample_size == 8 and pipeline.unet.config.num_views == 2


# Going on -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_resume_is_bit_exact(flags: list[str], tmp_path: Path, precision: str) -> None:
    more = "--use_ema yes --checkpointing_steps 2 --random_flip yes --noise_offset 0.1 --gradient_checkpointing yes"
    flags += [*more.split(), "--mixed_precision", precision]
    train(*flags, "--output_dir", tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "export")
    (tmp_path / "cut" / "checkpoint-4" / "unet" / WEIGHTS).write_bytes(b"cut short")
    train(*flags, "--output_dir", tmp_path / "cut", "--resume_from_checkpoint", "latest")
    assert metrics(tmp_path / "cut") == metrics(tmp_path / "whole")
    ours, theirs = (tmp_path / name / "checkpoint-4" for name in ("cut", "whole"))
    assert_same_checkpoint(ours, theirs)
    exported, averaged = load_file(tmp_path / "whole/export/unet" / WEIGHTS), load_file(theirs / "unet_ema" / WEIGHTS)
    assert all(torch.equal(exported[key], averaged[key]) for key in averaged)


def test_accumulation_changes_nothing(flags: list[str], tmp_path: Path) -> None:
    train(*flags, "--output_dir", tmp_path / "whole")
    flags += ["--train_batch_size", "1", "--gradient_accumulation_steps", "2"]
    train(*flags, "--output_dir", tmp_path / "halves")
    assert_close(tmp_path / "halves", tmp_path / "whole", 2e-4)


def test_two_stages(flags: list[str], tmp_path: Path) -> None:
    one = ["--pred_type", "mix", "--max_train_steps", "2", "--output_dir", tmp_path / "one"]
    train(*flags, *one)
    first = load_file(tmp_path / "one/export/unet" / WEIGHTS)
    assert not any("joint" in key for key in first)
    two = ["--pretrained_unet_path", tmp_path / "one/export", "--trainable_modules", "joint_mid"]
    train(*flags, *two, "--max_train_steps", "2", "--output_dir", tmp_path / "two")
    second = load_file(tmp_path / "two/export/unet" / WEIGHTS)
    joint = {key for key in second if "joint_mid" in key}
    assert joint and second.keys() - joint == first.keys()
    assert all(torch.equal(second[key], first[key]) for key in first)
    assert any(second[key].abs().max() > 0 for key in joint if "to_out.0.weight" in key)


def test_weights_that_know_other_cameras_are_noticed(
    flags: list[str], checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What their pipeline or their run says counts; where nothing does, they are taken for released ones."""
    flags += "--max_train_steps 1 --validation_steps 100".split()
    run, alone = tmp_path / "run", tmp_path / "alone"
    train(*flags, "--output_dir", run)
    shutil.copytree(run / "export" / "unet", alone / "unet")
    told = "they know elevation {} and azimuth {} rad, and are now told {} and {}"
    upright, tilted = ("0.000", "3.142"), ("0.522", "3.142")
    for source, poses, expected in (
        (run / "export", "upright", None),
        (run / "export" / "unet", "tilted", told.format(*upright, *tilted)),
        (run / "checkpoint-1", "upright", None),
        (run / "checkpoint-1" / "unet", "tilted", told.format(*upright, *tilted)),
        (alone, "tilted", None),
        (alone, "upright", told.format(*tilted, *upright)),
    ):
        capsys.readouterr()
        train(*flags, "--pretrained_unet_path", source, "--poses", poses, "--output_dir", tmp_path / "more")
        written = capsys.readouterr().err
        assert ("know other cameras" in written) == (expected is not None)
        assert expected is None or f"poses {poses} gives: of back {expected}" in written
        shutil.rmtree(tmp_path / "more")


def test_a_unet_for_other_labels_is_refused(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "labels.json").write_text('{"projection_class_embeddings_input_dim": 6}')
    more = ("--pretrained_config_path_unet", tmp_path / "labels.json", "--output_dir", tmp_path / "run")
    message = refused(capsys, *flags, *more)
    assert "the UNet takes class labels of 6 numbers, and training gives it 10, of camera and domain: set" in message


@pytest.mark.parametrize(("stage", "preset"), [("joint", "recommended"), ("mix", "wonder3d")])
def test_the_cache_gives_the_loss_of_raw_images(flags: list[str], tmp_path: Path, stage: str, preset: str) -> None:
    flags += ["--pred_type", stage, "--preset", preset, "--random_flip", "yes", "--max_train_steps", "2"]
    train(*flags, "--output_dir", tmp_path / "raw")
    cached = ["--cache_latents", tmp_path / "cache"]
    train(*flags, *cached, "--output_dir", tmp_path / "cached")
    assert_close(tmp_path / "cached", tmp_path / "raw", 1e-4)
    clip_resize = json.loads((tmp_path / "cache" / "fingerprint.json").read_text()).get("clip_resize", "pil")
    assert clip_resize == {"recommended": "pil", "wonder3d": "tensor"}[preset]
    before = entries(tmp_path / "cache")
    assert len(before) == 6 * 3 * 2  # objects, backgrounds, mirrored or not
    train(*flags, *cached, "--output_dir", tmp_path / "again")
    assert entries(tmp_path / "cache") == before
    assert metrics(tmp_path / "again") == metrics(tmp_path / "cached")


def test_the_original_values_run_on_random_numbers(checkpoint: Path, tmp_path: Path, clean_process: None) -> None:
    folders = [f"--pretrained_path_{part} {checkpoint}" for part in ("vae", "image_encoder", "scheduler")]
    folders += [f"--pretrained_path_feature_extractor {checkpoint} --pretrained_weight_path_unet {checkpoint}"]
    words = f"--config_path configs/training_config/gnn3d.yaml {' '.join(folders)} --max_train_steps 1".split()
    train(*words, "--output_dir", tmp_path / "run", "--validation_dir", photographs(tmp_path))
    assert [record["kind"] for record in metrics(tmp_path / "run")] == ["train"]  # pictures, but nothing to measure
    assert (tmp_path / "run/validation/step-000001/photo-cup-cfg2.png").exists()


def photographs(folder: Path) -> Path:
    from PIL import Image

    photo = Image.new("RGBA", (40, 30), (0, 0, 0, 0))
    photo.paste((200, 80, 40, 255), (10, 5, 30, 25))
    (folder / "photos").mkdir()
    photo.save(folder / "photos" / "cup.png")
    (folder / "photos" / "broken.png").write_bytes(b"no picture")
    return folder / "photos"


def test_validation_samples_what_the_loss_trains(flags: list[str], tmp_path: Path) -> None:
    """A prediction type that replaces the scheduler's own is known to the sampler and to the export."""
    for kind in ("epsilon", "v_prediction"):
        train(*flags, "--max_train_steps", "1", "--prediction_type", kind, "--output_dir", tmp_path / kind)
    one, other = (metrics(tmp_path / kind)[-1] for kind in ("epsilon", "v_prediction"))
    assert one["kind"] == other["kind"] == "validation" and one["psnr"] != other["psnr"]
    saved = json.loads((tmp_path / "v_prediction/export/scheduler/scheduler_config.json").read_text())
    assert saved["prediction_type"] == "v_prediction"


def test_bad_held_out_objects_and_photographs_are_left_out(
    flags: list[str], renders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(renders, tmp_path / "renders")
    next((tmp_path / "renders").glob("07/*/rgb_000_back.png")).write_bytes(b"no picture")
    photos = photographs(tmp_path)
    shutil.copy(photos / "cup.png", photos / "cup.webp")
    flags += ["--train_data_dir", str(tmp_path / "renders"), "--validation_dir", str(photos), "--max_train_steps", "1"]
    train(*flags, "--max_validation_items", "2", "--output_dir", tmp_path / "bad")
    train(*flags, "--max_validation_items", "1", "--output_dir", tmp_path / "good")
    assert metrics(tmp_path / "bad") == metrics(tmp_path / "good")
    names = {path.name for path in (tmp_path / "bad/validation/step-000001").iterdir()}
    assert names == {"000-cfg2.png", "photo-cup-cfg2.png", "photos.png", "sheet.png"}
    written = capsys.readouterr().err
    for text in ("a held-out object is left out of this validation: ", "another one is named cup too"):
        assert text in written


def test_views_that_are_not_finite_are_not_measured(
    flags: list[str], checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = load_file(checkpoint / "unet" / WEIGHTS)
    weights["conv_out.bias"].fill_(torch.nan)
    shutil.copytree(checkpoint / "unet", tmp_path / "unet")
    save_file(weights, tmp_path / "unet" / WEIGHTS)
    flags += ["--pretrained_unet_path", str(tmp_path / "unet"), "--max_train_steps", "1"]
    message = refused(capsys, *flags, "--output_dir", tmp_path / "run")
    assert metrics(tmp_path / "run")[-1]["psnr"] is None
    assert "after step 1 the views of 000 at guidance 2 are not finite" in message
    assert "none of the 1 steps was finite" in message


def test_how_the_first_layer_starts() -> None:
    for flags, expected in {
        "": "copy_zero",
        "--zero_init_conv_in no": "copy_random",
        "--preset gnn3d": "random",
        "--preset gnn3d --zero_init_conv_in yes": "copy_zero",
    }.items():
        needed = "--pretrained_model_name_or_path somewhere --train_data_dir elsewhere"
        assert conv_in_init(resolved(PARSER.parse([*needed.split(), *flags.split()])[0])) == expected


def test_validation_has_a_background_that_training_knows() -> None:
    for given, expected in {"three_choices": "white", "black": "black", "gray": "gray", "0.3": "white"}.items():
        assert validation_background(MVData(bg_color=given)) == expected


# Bad input ------------------------------------------------------------------------------------------------------------


def test_bad_input_is_told_what_to_change(
    flags: list[str], tmp_path: Path, checkpoint: Path, renders: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags += ["--output_dir", str(tmp_path / "run")]
    message = refused(capsys, "--output_dir", tmp_path / "run")
    assert "train_data_dir is required" in message and "pretrained_model_name_or_path is required" in message
    message = refused(capsys, *flags, "--train_data_dir", tmp_path / "nowhere")
    assert "nowhere was not found" in message and "train_data_dir" in message
    assert "leaves none to train on" in refused(capsys, *flags, "--num_validation_samples", "8")
    message = refused(capsys, *flags, "--pred_type", "mix", "--cd_attention_mid", "yes")
    assert "cross-domain layers need both" in message
    assert "32 is below the least value 64" in refused(capsys, *flags, "--resolution", "32")
    message = refused(capsys, *flags, "--trainable_modules", "joint_first")
    assert "no module that is trained has a name that ends" in message
    assert "condition_drop_rate 0.5 is above 1/3" in refused(capsys, *flags, "--condition_drop_rate", "0.5")
    assert "crop_size 65 is above the resolution, 64" in refused(capsys, *flags, "--crop_size", "65")
    message = refused(capsys, *flags, "--trainable_modules", "joint_mid")
    assert "tensors are new and trainable_modules does not name them (conv_in.weight" not in message
    assert "tensors are new and trainable_modules does not name them (class_embedding.linear_1.weight" in message
    assert "pretrained_unet_path" in message
    message = refused(capsys, *flags, "--num_inference_steps", "1000")
    assert "num_inference_steps is 1000, but must be in 1..999" in message
    (tmp_path / "list.json").write_text("[1]")
    message = refused(capsys, *flags, "--pretrained_config_path_unet", tmp_path / "list.json")
    assert "list.json must hold a mapping in braces, it holds a list" in message
    assert "no vae" in refused(capsys, *flags, "--pretrained_path_vae", checkpoint / "unet")
    assert not (tmp_path / "run" / "export").exists()
