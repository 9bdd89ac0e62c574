"""Training as users start it: the documented command, resume, prepared clips, exports, and what bad input is told."""

import importlib.util
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

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
from common.video import MediaError
from training_ggi import front_end
from training_ggi.config import PARSER, GGIConfig
from training_ggi.models.base_lora import read_lora_file
from training_ggi.models.results import LORA_NAME, PROJECTION_NAME, load_result
from training_ggi.models.transformer import widen_patch_embed
from training_ggi.task import GGITask
from training_ggi.train import build_optimizer, find_networks, held_out_clips, listed_scenes, require_launcher

VALIDATED = {"clips", "psnr_first", "psnr_last", "flow_error_px", *(f"loss_t{t}" for t in (125, 375, 625, 875))}
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
    with pytest.MonkeyPatch.context() as patch:
        patch.delattr("training_ggi.train.load_base")  # the transformer is not needed for it
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
    ("mode", "precision", "use_ema"), [("lora", "no", "no"), ("lora", "bf16", "yes"), ("full", "bf16", "yes")]
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
    """Also where the scenes are in another order than when they were prepared."""
    before = entries(cache)
    parts = {"ends", "video_moments", "cond_moments", "prompt_embeds", "noise_sets"}  # the flow only made the noise
    assert {frozenset(load_file(path)) for path in before} == {frozenset(parts)}
    (tmp_path / "list.txt").write_text("DL3DV-10K/1K/wall1\nDL3DV-10K/1K/wall0\n")
    words = ["--dataset_file", tmp_path / "list.txt", "--max_train_steps", 1]
    train(*raw, *words, "--output_dir", tmp_path / "raw")
    train(*flags, *words, "--output_dir", tmp_path / "cached")
    assert_close(tmp_path / "cached", tmp_path / "raw", 1e-4)
    assert entries(cache) == before


def test_no_captions_is_as_if_all_were_dropped(
    raw: list[str], flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["--use_captions", "false", "--prompt_file", "not/there.json", "--max_train_steps", 1]
    encoded, encode = [], front_end.encode_prompts
    monkeypatch.setattr(front_end, "encode_prompts", lambda *given: encoded.append(given[2]) or encode(*given))
    train(*raw, *words, "--output_dir", tmp_path / "without")
    assert encoded == [[""]]  # once, and not for every clip
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


@pytest.fixture
def with_short_scene(scenes: Path, tmp_path: Path) -> list[str]:
    """Flags that add a last scene of three frames, too few for a clip."""
    shutil.copytree(scenes, tmp_path / "data")
    images = tmp_path / "data/DL3DV-10K/1K/short/images_2"
    shutil.copytree(tmp_path / "data/DL3DV-10K/1K/wall0/images_2", images)
    for image in sorted(images.iterdir())[3:]:
        image.unlink()
    names = ["wall0", "wall1", "short"]
    (tmp_path / "data/seeds.txt").write_text("".join(f"DL3DV-10K/1K/{name}\n" for name in names))
    return ["--data_root", str(tmp_path / "data"), "--num_validation_scenes", "2"]


@pytest.mark.slow
def test_edges_of_depth_and_validation(
    raw: list[str], with_short_scene: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--cond", "depth_hed", "--clipwise_depth", "yes", "--guidance_scale", 6, *with_short_scene]
    train(*raw, *words, "--validation_steps", 1, "--max_train_steps", 1, "--output_dir", tmp_path / "run")
    assert "held-out scene 1 is not validated" in capsys.readouterr().err
    records = metrics(tmp_path / "run")
    assert [record["kind"] for record in records] == ["train", "validation"]
    assert VALIDATED < records[1].keys() and records[1]["psnr_first"] > 0 and records[1]["clips"] == 1
    written = {path.name for path in (tmp_path / "run" / "validation" / "step-000001").iterdir()}
    assert written == {"000-frames.png", "000.mp4", "sheet.png"}


def test_held_out_scenes_that_are_too_short_are_named_at_the_start(
    raw: list[str], with_short_scene: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    config, _ = PARSER.parse([*raw, *with_short_scene])
    held_out = held_out_clips(config, listed_scenes(config).validation, StubFrontEnd())
    assert held_out is not None and len(held_out.dataset) == len(held_out.prompt_embeds) == 2
    assert held_out.read(0)["scene"] == "wall1"
    (record,) = (record for record in caplog.records if record.name == "training_ggi.train")
    told = "the scene has 3 frames, but a clip of 6 frames at an interval of 1 needs 6"
    assert record.getMessage().startswith("held-out scene 1 will not be validated: ")
    assert record.getMessage().endswith(told)


class StubFrontEnd:
    """In place of networks."""

    def embed(self, prompts: list[str]) -> Tensor:
        return torch.zeros(len(prompts), 2, 3)


class Readable:
    """Three held-out clips, of which those of the given numbers cannot be read."""

    def __init__(self, *bad: int) -> None:
        self.dataset, self.bad = range(3), bad

    def read(self, index: int) -> int:
        if index in self.bad:
            raise MediaError("a.png", "is damaged")
        return index


@pytest.mark.parametrize(("bad", "expected"), [((), 2.0), ((1,), 2.0), ((0, 1), 3.0), ((0, 1, 2), None)])
def test_validation_takes_the_mean_over_clips_that_can_be_read(
    bad: tuple[int, ...], expected: float | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Clip n has the metrics n + 1."""
    task, sheets = GGITask.__new__(GGITask), []
    alone = {"device": torch.device("cpu"), "is_main_process": True, "wait_for_everyone": lambda: None}
    task.processes = SimpleNamespace(**alone, reduce=lambda values, how: values)
    task.config, task.held_out, task.stop = GGIConfig(), Readable(*bad), SimpleNamespace(share=range)
    task.log = SimpleNamespace(image_folder=lambda step: tmp_path, image=lambda *given: sheets.append(given[2].shape))

    def validate_clip(step: int, index: int, item: int) -> dict[str, Tensor]:
        Image.new("RGB", (8, 8)).save(tmp_path / f"{index:03d}-frames.png")
        return dict.fromkeys(VALIDATED, torch.tensor(item + 1.0))

    task._validate_clip = validate_clip
    metrics = task.validate(5)
    assert metrics == ({} if expected is None else dict.fromkeys(VALIDATED, expected) | {"clips": 3 - len(bad)})
    assert len(sheets) == (expected is not None)
    told = [f"held-out scene {index} is not validated: a.png: is damaged" for index in bad]
    assert [record.getMessage() for record in caplog.records] == told


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
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    message = refused(capsys, *raw, "--raft_weights", "null")
    assert "the weights of the optical flow" in message and "raft_large_C_T_SKHT_V2" in message
    assert "cannot be downloaded (HF_HUB_OFFLINE forbids it)" in message
    message = refused(capsys, *raw, "--hed_weights", "none.pth")
    assert "none.pth was not found" in message and "set hed_weights" in message
    assert "lllyasviel/Annotators" in message and "cond=precomputed does without" in message
    assert not (tmp_path / "run" / "export").exists()


def test_networks_that_nobody_placed_are_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    placed = tmp_path / "placed.pth"
    placed.touch()
    monkeypatch.setattr("training_ggi.train.fetch_raft", lambda: tmp_path / "raft")
    monkeypatch.setattr("training_ggi.train.fetch_hed", lambda cache_dir: Path(cache_dir) / "hed")
    monkeypatch.setattr("training_ggi.train.HED_WEIGHTS", "no/ControlNetHED.pth")
    default = ["--hed_weights", "no/ControlNetHED.pth", "--cache_dir", "hub"]
    for words, expected in (
        (default, (tmp_path / "raft", Path("hub/hed"))),
        ([*default, "--cond", "precomputed", "--raft_weights", str(placed)], (placed, None)),
        (["--hed_weights", str(placed)], (tmp_path / "raft", placed)),
    ):
        assert find_networks(PARSER.parse(words)[0]) == expected
    with pytest.raises(FileNotFoundError, match="no/other.pth was not found"):
        find_networks(PARSER.parse(["--hed_weights", "no/other.pth"])[0])


@pytest.mark.parametrize("wanted", ["latest", "checkpoint-150"])
def test_checkpoints_of_the_original_are_told(
    raw: list[str], tmp_path: Path, wanted: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "checkpoint-150" / "transformer" / "config.json"
    config.parent.mkdir(parents=True)
    config.touch()
    message = refused(capsys, *raw, "--output_dir", tmp_path, "--resume_from_checkpoint", wanted)
    assert f"{tmp_path}/checkpoint-150 was written by the original trainer and cannot be resumed" in message
    assert "infer.py takes its weights (--model); to train, name another --output_dir" in message


def test_adam_decays_by_the_gradient() -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    config, _ = PARSER.parse(["--optimizer", "adam", "--weight_decay", "0.5", "--beta1", "0.8", "--epsilon", "1e-6"])
    optimizer = build_optimizer([weight], config.optim, torch.device("cpu"))
    weight.grad = torch.zeros(3)
    optimizer.step()
    assert type(optimizer) is torch.optim.Adam and optimizer.defaults["betas"] == (0.8, 0.95)
    torch.testing.assert_close(weight, torch.full((3,), 1 - 5e-5))  # the sign of the gradient, at the rate of 5e-5
    assert type(build_optimizer([weight], GGIConfig().optim, torch.device("cpu"))) is torch.optim.AdamW


def test_launchers_that_cannot_work_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    require_launcher("full")
    with pytest.raises(ValueError, match="train_mode lora keeps most weights frozen on every GPU: launch it with"):
        require_launcher("lora")


def test_a_base_lora_of_other_ranks_is_refused(
    raw: list[str],
    tmp_path: Path,
    checkpoint: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Before any network is loaded."""
    for name in ("load_base", "load_front_end"):
        monkeypatch.delattr(f"training_ggi.train.{name}")
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
