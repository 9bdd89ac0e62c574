"""Training as users start it: the documented commands, resume, exports, and what bad input is told."""

import json
import os
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import running
import torch
from diffusers import StableUnCLIPImg2ImgPipeline, UNet2DConditionModel
from diffusers.training_utils import EMAModel
from PIL import Image
from running import metrics
from safetensors.torch import load_file

from common.metrics import psnr
from gaussian_refiner.repair import repair_frames

ENTRY = Path(__file__).parents[2] / "gaussian_refiner" / "train_repair_cross_attn_version.py"
# What the guide's commands are given beside their own flags, so that they end soon on small windows.
SMALL = "--height_px 64 --num_inference_steps 2 --max_validation_items 2 --report_to none"
QUICK = [*SMALL.split(), "--train_batch_size", "2", "--gradient_accumulation_steps", "2"]
SINGLE = """accelerate launch --num_processes 1 --mixed_precision fp16 train_repair_cross_attn_version.py
  --pretrained_model_name_or_path {checkpoint} --output_dir {output_dir} --train_batch_size 1
  --gradient_accumulation_steps 20 --num_train_epochs 1 --validation_epochs 1"""


def launch(command: str, **values: object) -> str:
    """Runs a command of the guide, the script by its full path, from the working directory."""
    words = shlex.split(command.format(**values) + " " + SMALL)
    return running.launch(*[{ENTRY.name: str(ENTRY)}.get(word, word) for word in words], folder=Path.cwd())


def train(*flags: str) -> None:
    running.train("gaussian_refiner", *QUICK, *flags)


def refused(capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    return running.refused(capsys, "gaussian_refiner", *QUICK, *flags)


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path, data_folder: Path) -> Path:
    """The run folder of the documented single-GPU command."""
    output_dir = tmp_path_factory.mktemp("single") / "run"
    here = Path.cwd()
    os.chdir(data_folder)
    try:
        output = launch(SINGLE, checkpoint=checkpoint, output_dir=output_dir)
    finally:
        os.chdir(here)
    assert "fp16 needs a GPU" in output or torch.cuda.is_available()
    assert "6 items" in output and "1 optimizer steps" in output
    return output_dir


def test_the_documented_single_gpu_command_trains_validates_and_exports(single: Path) -> None:
    first, step, last = metrics(single)
    assert (first["kind"], first["step"]) == ("validation", 0)
    assert (step["kind"], step["step"], step["lr"]) == ("train", 1, 1e-4)
    assert (last["kind"], last["step"]) == ("validation", 1)
    for record in (first, last):
        assert {"psnr", "ssim", "psnr_render", "psnr_vae"} <= set(record)
    pictures = sorted(p.name for p in (single / "validation" / "step-000001").iterdir())
    kinds = ("cond", "gt", "render", "repaired")
    assert pictures == sorted(["sheet.png", *(f"{i:03d}-{kind}.png" for i in range(2) for kind in kinds)])
    assert np.asarray(Image.open(single / "validation/step-000001/000-gt.png")).shape == (64, 64, 3)
    expected = {"manifest.json", "optimizer.bin", "random_states_0.pkl", "trainer_state.json", "unet"}
    assert {p.name for p in (single / "checkpoint-1").iterdir()} == expected


def test_exports_reload_in_stock_diffusers(single: Path, checkpoint: Path) -> None:
    trained = load_file(single / "checkpoint-1" / "unet" / "diffusion_pytorch_model.safetensors")
    assert trained["conv_in.weight"].shape[1] == 8
    for folder in (single / "checkpoint-1" / "unet", single / "export" / "unet"):
        unet = UNet2DConditionModel.from_pretrained(folder)  # the config must say 8 channels for this to work
        assert unet.config.in_channels == 8
        for name, tensor in unet.state_dict().items():
            assert torch.equal(tensor, trained[name]), name
    pipeline = StableUnCLIPImg2ImgPipeline.from_pretrained(single / "export")
    original = StableUnCLIPImg2ImgPipeline.from_pretrained(checkpoint)
    assert pipeline.scheduler.config.prediction_type == "v_prediction"
    for part in ("vae", "image_encoder", "text_encoder"):
        ours, theirs = getattr(pipeline, part).state_dict(), getattr(original, part).state_dict()
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in theirs), part


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_resume_is_bit_exact(tmp_path: Path, in_data_folder: Path, checkpoint: Path, precision: str) -> None:
    flags = ["--pretrained_model_name_or_path", str(checkpoint), "--max_train_steps", "4", "--checkpointing_steps", "2"]
    flags += ["--use_ema", "--mixed_precision", precision, "--validation_steps", "3", "--noise_offset", "0.1"]
    flags += ["--lr_scheduler", "cosine", "--gradient_checkpointing", "--snr_gamma", "5"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    train(*flags, "--output_dir", str(whole))
    train(*flags, "--output_dir", str(cut))
    (cut / "checkpoint-4" / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"cut short")
    train(*flags, "--output_dir", str(cut), "--resume_from_checkpoint", "latest")
    assert metrics(cut) == metrics(whole)
    for name in ("unet", "unet_ema"):
        ours, theirs = (
            load_file(d / "checkpoint-4" / name / "diffusion_pytorch_model.safetensors") for d in (cut, whole)
        )
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs), name
    ours, theirs = (torch.load(d / "checkpoint-4" / "optimizer.bin", weights_only=True) for d in (cut, whole))
    for index, state in theirs["state"].items():
        assert all(torch.equal(ours["state"][index][key], value) for key, value in state.items())
    average = EMAModel.from_pretrained(whole / "checkpoint-4" / "unet_ema", UNet2DConditionModel)
    assert average.optimization_step == 4
    exported = load_file(whole / "export" / "unet" / "diffusion_pytorch_model.safetensors")
    averaged = load_file(whole / "checkpoint-4" / "unet_ema" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(exported[key], averaged[key]) for key in averaged)  # the average is what is exported


def test_cached_windows_give_the_loss_of_raw_ones(tmp_path: Path, in_data_folder: Path, checkpoint: Path) -> None:
    flags = ["--pretrained_model_name_or_path", str(checkpoint), "--max_train_steps", "2", "--windows_per_item", "3"]
    flags += ["--validate_at_start", "no"]
    train(*flags, "--output_dir", str(tmp_path / "raw"))
    cached = ["--cache_latents", str(tmp_path / "cache")]
    train(*flags, "--output_dir", str(tmp_path / "cached"), *cached)
    for ours, reference in zip(metrics(tmp_path / "cached"), metrics(tmp_path / "raw"), strict=True):
        for name in reference.keys() - {"kind"}:
            assert ours[name] == pytest.approx(reference[name], rel=1e-5), name
    entries = {p: p.stat().st_mtime_ns for p in (tmp_path / "cache").rglob("*.safetensors")}
    assert len(entries) == 6
    train(*flags, "--output_dir", str(tmp_path / "again"), *cached)
    assert entries == {p: p.stat().st_mtime_ns for p in (tmp_path / "cache").rglob("*.safetensors")}
    assert metrics(tmp_path / "again") == metrics(tmp_path / "cached")


def test_a_cache_of_other_windows_is_refused(
    tmp_path: Path, in_data_folder: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--pretrained_model_name_or_path", str(checkpoint), "--max_train_steps", "1", "--validate_at_start", "no"]
    flags += ["--cache_latents", str(tmp_path / "cache")]
    train(*flags, "--windows_per_item", "2", "--output_dir", str(tmp_path / "a"))
    message = refused(capsys, *flags, "--windows_per_item", "4", "--output_dir", str(tmp_path / "b"))
    assert "does not belong to this run: windows_per_item was 2, is 4" in message


def test_bad_input_is_told_what_to_change(
    tmp_path: Path, in_data_folder: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = ["--pretrained_model_name_or_path", str(checkpoint), "--output_dir", str(tmp_path / "run")]
    pairs = json.loads(Path("example_kitti.json").read_text())

    def listed(name: str, **lists: list) -> list[str]:
        path = in_data_folder / f"{tmp_path.name}-{name}.json"
        path.write_text(json.dumps({**pairs, **lists}))
        return [*good, "--data_json", str(path)]

    message = refused(capsys, *listed("unequal", cond=pairs["cond"][:-3]))
    assert "render 16, gt 16, cond 13" in message
    message = refused(capsys, *listed("missing", gt=["nowhere.png", *pairs["gt"][1:]]))
    assert "1 files are missing" in message and "nowhere.png" in message
    few = listed("few", **{key: values[:10] for key, values in pairs.items()})
    message = refused(capsys, *few, "--holdout_items", "10")
    assert "lists 10 items" in message and "data.holdout_items" in message
    message = refused(capsys, *good, "--data_json", "nothing.json")
    assert "nothing.json was not found; tried" in message and "set --data_json" in message
    message = refused(capsys, "--pretrained_model_name_or_path", "stabilityai/stable-diffusion-2-1-unclip")
    assert "withdrew" in message and "local copy" in message
    message = refused(capsys, "--pretrained_model_name_or_path", str(checkpoint / "unet"))
    assert "lacks feature_extractor" in message
    message = refused(capsys, "--pretrained_model_name_or_path", str(tmp_path / "nowhere"))
    assert "does not exist" in message
    message = refused(capsys, *good, "--learning_rat", "1", "--snr_mode", "pairwise")
    assert "did you mean learning_rate" in message
    message = refused(capsys, *good, "--train_batch_size", "7")
    assert "data.batch_size 7 x 1 processes is 7, the training items are 6" in message
    message = refused(capsys, "--output_dir", "x")
    assert "--pretrained_model_name_or_path is required" in message
    assert not (tmp_path / "run").exists()


def test_other_data_are_refused_on_resume(
    tmp_path: Path, in_data_folder: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--pretrained_model_name_or_path", str(checkpoint), "--output_dir", str(tmp_path / "run")]
    flags += ["--validate_at_start", "no"]
    train(*flags, "--max_train_steps", "1")
    flags += ["--resume_from_checkpoint", "latest", "--max_train_steps", "2", "--max_train_samples", "5"]
    message = refused(capsys, *flags)
    assert "data.num_items: 6 in the checkpoint, 5 now" in message and "data.pairs_sha256" in message
    assert "--allow_changed data.num_items data.pairs_sha256" in message
    train(*flags, "--allow_changed", "data.num_items", "data.pairs_sha256")
    assert metrics(tmp_path / "run")[-1]["step"] == 2


def test_too_little_memory_names_phase_and_knobs(
    tmp_path: Path,
    in_data_folder: Path,
    checkpoint: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def out_of_memory(*arguments: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB.")

    monkeypatch.setattr("gaussian_refiner.task.repair_loss", out_of_memory)
    flags = ["--pretrained_model_name_or_path", str(checkpoint), "--output_dir", str(tmp_path / "run")]
    message = refused(capsys, *flags, "--max_train_steps", "1", "--validate_at_start", "no")
    assert (
        "cpu ran out of memory in phase forward of step 0, with micro-batches of 2: lower train_batch_size" in message
    )
    assert "--gradient_checkpointing" in message and "Tried to allocate 20 GiB" in message


def with_a_torn_target(data_folder: Path, name: str, number: int) -> Path:
    """Writes `<name>.json`, the demo's list in which the target of one item is cut off; returns that image."""
    pairs = json.loads((data_folder / "example_kitti.json").read_text())
    bad = data_folder / f"{name}.png"
    bad.write_bytes((data_folder / pairs["gt"][number]).read_bytes()[:2000])
    pairs["gt"][number] = bad.name
    (data_folder / f"{name}.json").write_text(json.dumps(pairs))
    return bad


def test_held_out_items_that_cannot_be_measured_are_left_out(
    tmp_path: Path,
    in_data_folder: Path,
    checkpoint: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of three: a file that cannot be read, a repair that is not finite, and a good one."""
    bad = with_a_torn_target(in_data_folder, tmp_path.name, 6)

    def repair(*arguments: Any, numbers: list[int], **options: Any) -> torch.Tensor:
        images = repair_frames(*arguments, numbers=numbers, **options)
        return images * float("nan") if numbers == [1] else images

    monkeypatch.setattr("gaussian_refiner.task.repair_frames", repair)
    flags = ["--pretrained_model_name_or_path", str(checkpoint), "--data_json", f"{tmp_path.name}.json"]
    flags += ["--max_train_steps", "1", "--validate_at_start", "no"]
    train(*flags, "--output_dir", str(tmp_path / "run"), "--max_validation_items", "3")
    said = capsys.readouterr().err
    assert f"held-out item 000006_0006 is left out of the validation after step 1: {bad}: " in said
    assert "held-out item 000007_0007 is left out of the validation after step 1: {'psnr': nan, " in said
    folder = tmp_path / "run/validation/step-000001"
    assert sorted(path.name for path in folder.glob("0*")) == [
        f"002-{kind}.png" for kind in ("cond", "gt", "render", "repaired")
    ]
    assert Image.open(folder / "sheet.png").height < 2 * 256  # one row
    images = {
        kind: torch.from_numpy(np.array(Image.open(folder / f"002-{kind}.png"))).permute(2, 0, 1)[None] / 255
        for kind in ("gt", "render", "repaired")
    }  # (1, 3, H, H) each
    record = metrics(tmp_path / "run")[-1]
    assert record["psnr"] == pytest.approx(psnr(images["repaired"], images["gt"]).item(), abs=0.05)
    assert record["psnr_render"] == pytest.approx(psnr(images["render"], images["gt"]).item(), abs=0.05)

    train(*flags, "--output_dir", str(tmp_path / "none"), "--max_validation_items", "2")
    assert [record["kind"] for record in metrics(tmp_path / "none")] == ["train"]
    assert (tmp_path / "none" / "export").is_dir()


def test_corrupt_images_are_replaced_and_recorded(
    tmp_path: Path, in_data_folder: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = with_a_torn_target(in_data_folder, tmp_path.name, 2)
    flags = ["--pretrained_model_name_or_path", str(checkpoint), "--data_json", f"{tmp_path.name}.json"]
    flags += ["--max_train_steps", "3", "--validate_at_start", "no"]
    train(*flags, "--output_dir", str(tmp_path / "run"), "--max_bad_fraction", "0.5")
    (record,) = [json.loads(line) for line in (tmp_path / "run" / "bad_samples.jsonl").read_text().splitlines()]
    assert record["item"] == 2 and bad.name in record["reason"] and str(bad) in record["files"]
    message = refused(capsys, *flags, "--output_dir", str(tmp_path / "strict"), "--max_bad_fraction", "0")
    assert "1 of 6 items could not be read" in message
