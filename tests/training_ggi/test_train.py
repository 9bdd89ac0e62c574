"""Training as users start it: the documented command, resume, prepared clips, exports, and what bad input is told."""

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import running
import torch
from diffusers import CogVideoXTransformer3DModel
from PIL import Image
from running import ROOT, assert_close, assert_same_checkpoint, entries, metrics
from safetensors.torch import load_file, save_file
from torch import Tensor
from trainers import GGI_LORA

from common.checkpoint import read_weights
from training_ggi.models.base_lora import read_lora_file
from training_ggi.models.results import LORA_NAME, PROJECTION_NAME, load_result
from training_ggi.models.transformer import widen_patch_embed
from training_ggi.train import require_launcher

VALIDATED = {"psnr_first", "psnr_last", "flow_error_px", *(f"loss_t{t}" for t in (125, 375, 625, 875))}
SMALL = (
    "--height 256 --width 256 --max_num_frames 9 --detect_resolution 64 --cond hed --flow_scale 2 --enable_tiling no "
    "--num_validation_scenes 0 --num_inference_steps 2 --guidance_scale 1 --dataloader_num_workers 0 --report_to none "
    "--mixed_precision no --allow_tf32 no --rank 4 --lora_alpha 8 --gradient_accumulation 1 --lr_warmup_steps 0 "
    "--learning_rate 1e-3 --checkpointing_steps 1 --cuts_per_scene 1 --noise_sets 2 --max_train_steps 2"
)


def networks(checkpoint: Path, scenes: Path) -> list[str]:
    """Where everything lies."""
    return [
        *SMALL.split(),
        *("--pretrained_model_name_or_path", str(checkpoint), "--base_lora_path", str(checkpoint / GGI_LORA)),
        *("--raft_weights", str(checkpoint / "raft_large.safetensors")),
        *("--hed_weights", str(checkpoint / "ControlNetHED.safetensors")),
        *("--midas_path", str(checkpoint / "dpt-hybrid-midas"), "--data_root", str(scenes)),
    ]


def launch(config_file: object, num_processes: int, *words: object) -> str:
    """The documented script from its folder; returns what it printed."""
    launcher = ["accelerate", "launch", "--config_file", config_file, "--num_processes", num_processes]
    return running.launch(*launcher, "--main_process_port=0", "exps/T073-000.py", *words, folder=ROOT / "training_ggi")


def train(*words: object, **options: object) -> None:
    running.train("training_ggi", *words, **options)


def refused(capsys: pytest.CaptureFixture[str], *words: object, **options: object) -> str:
    return running.refused(capsys, "training_ggi", *words, **options)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path, scenes: Path) -> Path:
    """The scenes as prepared clips, each of one cut and two noises."""
    folder = tmp_path_factory.mktemp("cache")
    words = networks(checkpoint, scenes)
    train(*words, "--cache_latents", folder, "--output_dir", folder / "unused", prepare_only=True)
    assert len(entries(folder)) == 2 and not (folder / "unused" / "metrics.jsonl").exists()
    return folder


@pytest.fixture
def raw(checkpoint: Path, scenes: Path, clean_process: None) -> list[str]:
    """Flags of a small run on frames."""
    return networks(checkpoint, scenes)


@pytest.fixture
def flags(raw: list[str], cache: Path) -> list[str]:
    """Flags of a small run on prepared clips."""
    return [*raw, "--cache_latents", str(cache)]


# The documented command -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path, scenes: Path, cache: Path) -> Path:
    """The run folder of the documented command on one processor."""
    folder = tmp_path_factory.mktemp("single") / "run"
    words = [*networks(checkpoint, scenes), "--cache_latents", cache, "--output_dir", folder]
    output = launch("default.yaml", 1, *words, "--gradient_accumulation", 2)
    assert "global batch 2 = 1 processes x 2 accumulated x 1; 2 items" in output and "Traceback" not in output
    return folder


def test_the_documented_command(single: Path) -> None:
    assert [(record["step"], record["kind"]) for record in metrics(single)] == [(1, "train"), (2, "train")]
    expected = {"manifest.json", "optimizer.bin", "random_states_0.pkl", "trainer_state.json", "transformer"}
    assert {path.name for path in (single / "checkpoint-2").iterdir()} == expected
    kept = read_weights(single / "checkpoint-2" / "transformer")
    assert {key for key in kept if ".lora_" not in key} == {"patch_embed.proj.weight", "patch_embed.proj.bias"}
    assert {tensor.dtype for tensor in kept.values()} == {torch.float32}


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["cpu_2_processes", "fsdp2"])
def test_two_processes_match_one_in_full_training(flags: list[str], tmp_path: Path, launcher: str) -> None:
    flags += ["--train_mode", "full"]
    train(*flags, "--gradient_accumulation", 2, "--output_dir", tmp_path / "one")
    launch(ROOT / "accelerate_configs" / f"{launcher}.yaml", 2, *flags, "--output_dir", tmp_path / "two")
    assert_close(tmp_path / "two", tmp_path / "one", 1e-4)
    assert (tmp_path / "two" / "checkpoint-2" / "random_states_1.pkl").exists()  # every process saves


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("deepspeed"), reason="needs the extra deepspeed")
@pytest.mark.parametrize("mode", ["lora", "full"])
def test_zero2_matches_plain_training(
    flags: list[str], tmp_path: Path, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    flags += ["--train_mode", mode]
    train(*flags, "--output_dir", tmp_path / "plain")
    launch(ROOT / "accelerate_configs" / "1_gpus_zero2.yaml", 1, *flags, "--output_dir", tmp_path / "zero2")
    assert_close(tmp_path / "zero2", tmp_path / "plain", 1e-4)


def stock(checkpoint: Path) -> CogVideoXTransformer3DModel:
    """The base model's transformer, its input projection widened."""
    model = CogVideoXTransformer3DModel.from_pretrained(checkpoint, subfolder="transformer", torch_dtype=torch.float32)
    return widen_patch_embed(model)


def test_the_export_reloads_on_the_stock_transformer(single: Path, checkpoint: Path) -> None:
    files = {"manifest.json", PROJECTION_NAME, LORA_NAME}
    assert {path.name for path in (single / "export").iterdir()} == files
    transformer, trained = stock(checkpoint), read_weights(single / "checkpoint-2" / "transformer")
    base_lora = read_lora_file(checkpoint / GGI_LORA, transformer)
    assert load_result(transformer, single / "export", base_lora) == "lora"
    assert all(torch.equal(transformer.get_parameter(name), tensor) for name, tensor in trained.items())
    assert all(tensor.abs().max() > 0 for tensor in trained.values())
    settings = transformer.peft_config["ggi"]
    assert (settings.r, settings.lora_alpha) == (4, 8)


# Going on -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "precision", "use_ema"), [("lora", "no", "no"), ("lora", "bf16", "yes"), ("full", "no", "yes")]
)
def test_resume_is_bit_exact(
    flags: list[str], cache: Path, tmp_path: Path, mode: str, precision: str, use_ema: str
) -> None:
    if precision == "bf16":  # the networks have another type: these clips are prepared anew
        flags = flags[:-2] + ["--cache_latents", str(tmp_path / "cache"), "--max_train_samples", "1"]
    flags += ["--train_mode", mode, "--mixed_precision", precision, "--use_ema", use_ema]
    train(*flags, "--output_dir", tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "export")
    next((tmp_path / "cut" / "checkpoint-2" / "transformer").glob("*.safetensors")).write_bytes(b"cut short")
    train(*flags, "--output_dir", tmp_path / "cut")  # `latest` is the default
    assert metrics(tmp_path / "cut") == metrics(tmp_path / "whole")
    ours, theirs = (tmp_path / name / "checkpoint-2" for name in ("cut", "whole"))
    assert_same_checkpoint(ours, theirs)
    if mode == "full":
        assert_original_form(tmp_path / "cut" / "export", read_weights(theirs / "transformer_ema"))
    else:
        exported, kept = (load_file(tmp_path / name / "export" / LORA_NAME) for name in ("cut", "whole"))
        assert all(torch.equal(exported[key], kept[key]) for key in kept)


def assert_original_form(export: Path, trained: dict[str, Tensor]) -> None:
    """The folder that the original's inference reads: attention as base layer and LoRA, in bfloat16."""
    weights = load_file(export / "transformer" / "diffusion_pytorch_model.safetensors")
    assert json.loads((export / "transformer" / "config.json").read_text())["in_channels"] == 48
    projection = "transformer_blocks.0.attn1.to_q"
    parts = ("base_layer.weight", "base_layer.bias", "lora_A.default.weight", "lora_B.default.weight")
    assert {key for key in weights if key.startswith(projection)} == {f"{projection}.{part}" for part in parts}
    assert "patch_embed.pos_embedding" in weights and weights["patch_embed.proj.weight"].shape[1] == 48
    for key, tensor in weights.items():
        assert tensor.dtype == torch.bfloat16 and torch.equal(tensor, trained[key].bfloat16()), key


def test_the_base_lora_itself_can_be_trained(flags: list[str], tmp_path: Path, checkpoint: Path) -> None:
    train(*flags, "--train_mode", "base_lora", "--max_train_steps", 1, "--output_dir", tmp_path / "run")
    transformer, trained = stock(checkpoint), read_weights(tmp_path / "run" / "checkpoint-1" / "transformer")
    assert load_result(transformer, tmp_path / "run" / "export") == "base_lora"
    assert all(torch.equal(transformer.get_parameter(name), tensor) for name, tensor in trained.items())
    before = load_file(checkpoint / GGI_LORA)
    exported = load_file(tmp_path / "run" / "export" / LORA_NAME)
    assert exported.keys() == before.keys()
    assert all(not torch.equal(exported[key], before[key].float()) for key in before if "lora_B" in key)


def test_accumulation_changes_nothing(raw: list[str], tmp_path: Path) -> None:
    words = ["--cuts_per_scene", "null", "--noise_sets", "null", "--frame_intervals", "[1,2]", "--max_train_steps", 1]
    train(*raw, *words, "--batch_size", 2, "--dataloader_num_workers", 1, "--output_dir", tmp_path / "whole")
    train(*raw, *words, "--gradient_accumulation", 2, "--output_dir", tmp_path / "halves")
    assert_close(tmp_path / "halves", tmp_path / "whole", 1e-4)


# Prepared clips -------------------------------------------------------------------------------------------------------


def test_prepared_clips_are_read_and_have_the_loss_of_frames(
    raw: list[str], flags: list[str], cache: Path, tmp_path: Path
) -> None:
    before = entries(cache)
    train(*raw, "--max_train_steps", 1, "--output_dir", tmp_path / "raw")
    train(*flags, "--max_train_steps", 1, "--output_dir", tmp_path / "cached")
    assert_close(tmp_path / "cached", tmp_path / "raw", 1e-4)
    assert entries(cache) == before


def test_no_captions_is_as_if_all_were_dropped(raw: list[str], flags: list[str], scenes: Path, tmp_path: Path) -> None:
    words = ["--use_captions", "false", "--prompt_file", "not/there.json", "--max_train_steps", 1]
    train(*raw, *words, "--output_dir", tmp_path / "without")
    train(*flags, "--caption_dropout", 1, "--max_train_steps", 1, "--output_dir", tmp_path / "dropped")
    assert_close(tmp_path / "dropped", tmp_path / "without", 1e-4)
    train(*flags, "--max_train_steps", 1, "--output_dir", tmp_path / "with")
    losses = [metrics(tmp_path / name)[0]["loss"] for name in ("with", "without")]
    assert losses[0] != pytest.approx(losses[1], rel=1e-5)


def test_prepared_clips_of_other_settings_are_refused(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    message = refused(capsys, *flags, "--detect_resolution", 128, "--output_dir", tmp_path)
    assert "detect_resolution was 64, is 128. Name another folder, or delete this one" in message
    message = refused(capsys, *flags, "--noise_sets", 3, "--seed", 1, "--output_dir", tmp_path)
    assert "noise_sets was 2, is 3" in message and "noise was [42, 2, 'keep'], is [1, 2, 'keep']" in message


@pytest.mark.slow
def test_edges_of_depth_and_validation(raw: list[str], tmp_path: Path) -> None:
    words = ["--cond", "depth_hed", "--clipwise_depth", "yes", "--num_validation_scenes", 1, "--guidance_scale", 6]
    train(*raw, *words, "--validation_steps", 1, "--max_train_steps", 1, "--output_dir", tmp_path / "run")
    records = metrics(tmp_path / "run")
    assert [record["kind"] for record in records] == ["train", "validation"]
    assert VALIDATED < records[1].keys() and records[1]["psnr_first"] > 0
    written = {path.name for path in (tmp_path / "run" / "validation" / "step-000001").iterdir()}
    assert written == {"000-frames.png", "000.mp4", "sheet.png"}


def test_edges_from_files_are_what_is_trained_on(raw: list[str], scenes: Path, tmp_path: Path) -> None:
    for image in scenes.glob("DL3DV-10K/*/*/images_2/*"):
        edges = image.parents[1] / "edges" / image.name
        edges.parent.mkdir(exist_ok=True)
        Image.open(image).convert("L").save(edges)
    words = [*raw, "--max_train_steps", 1, "--hed_weights", "nowhere"]
    train(*words, "--cond", "precomputed", "--output_dir", tmp_path / "run")
    assert [record["kind"] for record in metrics(tmp_path / "run")] == ["train"]


# Bad input ------------------------------------------------------------------------------------------------------------


def test_missing_files_are_told(
    raw: list[str],
    tmp_path: Path,
    checkpoint: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    raw += ["--output_dir", str(tmp_path / "run")]
    message = refused(capsys, *raw, "--base_lora_path", "lora_models/nowhere.safetensors")
    assert "lora_models/nowhere.safetensors was not found" in message and "set base_lora_path" in message
    assert "Eyeline-Labs/Go-with-the-Flow" in message
    message = refused(capsys, *raw, "--data_root", tmp_path / "nowhere")
    assert "nowhere was not found" in message and "set data_root" in message
    message = refused(capsys, *raw, "--dataset_file", "none.txt")
    assert "data.dataset_file is none.txt, but there is no file" in message
    message = refused(capsys, *raw, "--prompt_file", "none.json")
    assert "data.prompt_file is none.json" in message and "data.use_captions=false trains without" in message
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    message = refused(capsys, *raw, "--raft_weights", "null")
    assert "the weights of the optical flow" in message and "raft_large_C_T_SKHT_V2" in message
    message = refused(capsys, *raw, "--hed_weights", "none.pth")
    assert "none.pth was not found" in message and "set hed_weights" in message
    assert "lllyasviel/Annotators" in message and "cond=precomputed does without" in message
    assert not (tmp_path / "run" / "export").exists()


def test_launchers_that_cannot_work_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    require_launcher("full")
    with pytest.raises(ValueError, match="train_mode lora keeps most weights frozen on every GPU: launch it with"):
        require_launcher("lora")


def test_a_base_lora_of_other_ranks_is_refused(
    raw: list[str], tmp_path: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = load_file(checkpoint / GGI_LORA)
    last = max(key for key in weights if "lora_A" in key)
    weights[last] = weights[last][:4].clone()
    save_file(weights, tmp_path / "wrong.safetensors")
    message = refused(capsys, *raw, "--base_lora_path", tmp_path / "wrong.safetensors", "--output_dir", tmp_path)
    assert "wrong.safetensors does not fit the transformer at rank 8" in message and last in message
    assert not (tmp_path / "config.yaml").exists()


def test_settings_that_cannot_work_are_told(raw: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    raw += ["--output_dir", str(tmp_path / "run")]
    message = refused(capsys, *raw, "--height", 272)
    assert "the learned position table is for 9 frames of 256x256 px (height x width), not 9 of 272x256" in message
    assert "128 is below the least value 256" in refused(capsys, *raw, "--height", 128)
    assert "max_num_frames 10 must be 4k + 1" in refused(capsys, *raw, "--max_num_frames", 10)
    words = ["--cuts_per_scene", "null", "--noise_sets", "null", "--cache_latents", tmp_path / "cache"]
    assert "cache_latents needs cuts_per_scene" in refused(capsys, *raw, *words)
    assert "noise_sets needs cuts_per_scene" in refused(capsys, *raw, "--cuts_per_scene", "null")
    message = refused(capsys, *raw, "--train_mode", "full", "--mixed_precision", "fp16")
    assert "train_mode full in fp16 would overflow: set mixed_precision to bf16" in message
    assert "leaves none to train on" in refused(capsys, *raw, "--num_validation_scenes", 2)
    message = refused(capsys, *raw, prepare_only=True)
    assert "cache_latents is required" in message
    assert not (tmp_path / "run" / "config.yaml").exists()
