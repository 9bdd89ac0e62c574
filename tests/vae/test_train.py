"""Training as users start it: the documented script, resume, stages, exports, and what bad input is told."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import running
import torch
from running import assert_same_checkpoint, metrics
from safetensors.torch import load_file
from torch import Tensor

from vae import upstream
from vae.config import PARSER
from vae.models.load import build_model, load_model
from vae.models.wfvae import Encoder
from vae.task import VaeTask

VAE = Path(__file__).parents[2] / "vae"
KEYS = Path(__file__).parents[3] / "shared" / "specs" / "keys" / "loss_lpips_with_discriminator3d.json"
SMALL = "--resolution 32 --num_frames 9 --sample_rate 1 --dataset_num_worker 0 --report_to none --log_steps 1"
EVALUATED = "--eval_resolution 32 --eval_num_frames 9 --eval_batch_size 2 --eval_subset_size 4"


@pytest.fixture
def flags(videos: Path, tiny_json: Path, clean_process: None) -> list[str]:
    """A small run without LPIPS, generator and discriminator taking turns from the start."""
    return [
        *f"--model_name WFVAE --model_config {tiny_json} --video_path {videos} {SMALL} --mix_precision fp32".split(),
        *"--perceptual_weight 0 --disc_start 0 --wavelet_loss --ema --lr 1e-3".split(),
    ]


def train(*words: object) -> None:
    running.train("vae", *words)


def launch(*words: object, processes: int = 1) -> str:
    """A training run under torchrun; returns what it printed."""
    launcher = ["torchrun", "--standalone", f"--nproc_per_node={processes}"]
    return running.launch(*launcher, "train_ddp.py", *words, folder=VAE)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(next(folder.glob("*.safetensors")))


# The documented script ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("processes", [1, 2])
def test_the_documented_script(
    processes: int, videos: Path, tiny_json: Path, vgg_weights: Path, tmp_path: Path
) -> None:
    words = [f"--video_path {videos} --eval_video_path {videos} --model_config {tiny_json} {SMALL} {EVALUATED}"]
    words += [
        f"--ckpt_dir {tmp_path} --max_steps 4 --save_ckpt_step 2 --mix_precision fp32 --vgg_weights {vgg_weights}"
    ]
    words += ["--eval_batch_size 1"]  # so that the two clips of the trackers are on two processes
    script = ["bash", "examples/train_ddp.sh", *" ".join(words).split()]
    printed = running.launch(*script, folder=VAE, environment={"NUM_PROCESSES": str(processes)})
    assert "no LPIPS in validation" in printed and f"global batch {processes} = " in printed
    run = tmp_path / "WFVAE-lr1.00e-05-bs1-rs32-sr1-fr9"
    records = metrics(run)
    assert [(r["step"], r["kind"]) for r in records] == [
        (0, "validation"),
        (1, "train"),
        (2, "train_discriminator"),
        (3, "train"),
        (4, "train_discriminator"),
        (4, "validation"),
    ]
    assert records[1]["lpips"] > 0 and records[1]["wl_loss"] > 0 and records[1]["d_weight"] > 0
    assert {"psnr", "ssim", "flicker"} <= set(records[0])
    pictures = {path.name for path in (run / "validation" / "step-000004").iterdir()}
    assert {"sheet.png", "000.mp4", "001.mp4", "003.png"} <= pictures and "002.mp4" not in pictures
    assert {p.name for p in run.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-4"}
    exported, averaged = weights(run / "export"), weights(run / "checkpoint-4" / "vae_ema")
    assert all(torch.equal(exported[key], averaged[key]) for key in averaged)
    for folder in ("export", "checkpoint-4/vae", "checkpoint-4/vae_ema"):
        assert load_model(run / folder).latent_channels == 4


# Going on -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", [pytest.param("fp32", marks=pytest.mark.slow), "bf16"])
def test_resume_is_bit_exact_across_the_alternation(flags: list[str], tmp_path: Path, precision: str) -> None:
    flags += [
        "--mix_precision",
        precision,
        "--max_steps",
        "6",
        "--save_ckpt_step",
        "1",
        "--gradient_accumulation_steps",
        "2",
    ]
    train(*flags, "--output_dir", tmp_path / "whole")
    for step in (3, 4):  # the next step is the discriminator's, the generator's
        cut = tmp_path / f"cut-{step}"
        shutil.copytree(tmp_path / "whole", cut)
        shutil.rmtree(cut / "export")
        for newer in range(step + 1, 7):
            shutil.rmtree(cut / f"checkpoint-{newer}")
        train(*flags, "--output_dir", cut, "--resume_from_checkpoint", "latest")
        assert metrics(cut) == metrics(tmp_path / "whole")
        assert_same_checkpoint(cut / "checkpoint-6", tmp_path / "whole" / "checkpoint-6")


def test_processes_and_accumulation_change_nothing(flags: list[str], tmp_path: Path) -> None:
    flags += ["--max_steps", "4", "--batch_size", "1"]
    for processes, accumulation in ((1, 4), (2, 2), (4, 1)):
        folder = tmp_path / f"{processes}x{accumulation}"
        launch(*flags, "--gradient_accumulation_steps", accumulation, "--output_dir", folder, processes=processes)
    reference = metrics(tmp_path / "1x4")
    assert [record["kind"] for record in reference] == ["train", "train_discriminator"] * 2
    for name in ("2x2", "4x1"):
        for ours, expected in zip(metrics(tmp_path / name), reference, strict=True):
            assert ours["kind"] == expected["kind"]
            for key in expected.keys() - {"kind"}:
                assert ours[key] == pytest.approx(expected[key], rel=1e-3, abs=1e-6), (name, expected["step"], key)
        for part in ("vae", "discriminator"):
            found, expected = (weights(tmp_path / n / "checkpoint-4" / part) for n in (name, "1x4"))
            for key in expected:
                if "running" not in key and "tracked" not in key:  # statistics that nothing uses, of each process
                    torch.testing.assert_close(found[key], expected[key], rtol=1e-3, atol=3e-3, msg=f"{name} {key}")


def test_an_original_checkpoint_is_written_and_resumed_from(
    flags: list[str], tmp_path: Path, vgg_weights: Path
) -> None:
    flags += ["--save_ckpt_step", "3", "--max_steps", "6"]
    train(*flags, "--output_dir", tmp_path / "whole")
    ckpt = tmp_path / "ckpt" / "checkpoint-3.ckpt"
    upstream.main([str(tmp_path / "whole" / "checkpoint-3"), str(ckpt)])
    content = torch.load(ckpt, weights_only=True)
    assert set(content) == {
        "epoch", "current_step", "optimizer_state", "state_dict", "ema_state_dict", "scaler_state", "sampler_state"
    }  # fmt: skip
    assert set(content["state_dict"]) == {"gen_model", "dics_model"}
    assert all(name.startswith("module.") for name in content["ema_state_dict"])
    keys = json.loads(KEYS.read_text()) if KEYS.is_file() else {}  # of the original's loss
    upstream.main(
        [str(tmp_path / "whole" / "checkpoint-3"), str(tmp_path / "all.ckpt"), "--vgg_weights", str(vgg_weights)]
    )
    loss = torch.load(tmp_path / "all.ckpt", weights_only=True)["state_dict"]["dics_model"]
    assert {"logvar", "discriminator.main.0.weight", "perceptual_loss.lin0.model.1.weight"} <= set(loss)
    assert not keys or {name: list(value.shape) for name, value in loss.items()} == keys
    torch.amp.GradScaler("cpu").load_state_dict(content["scaler_state"])  # as the original does, in any precision

    train(*flags, "--output_dir", tmp_path / "resumed", "--resume_from_checkpoint", ckpt)
    assert metrics(tmp_path / "resumed") == [record for record in metrics(tmp_path / "whole") if record["step"] > 3]
    assert_same_checkpoint(tmp_path / "resumed" / "checkpoint-6", tmp_path / "whole" / "checkpoint-6")

    model, average = upstream.load_ckpt_model(ckpt.parent), weights(tmp_path / "whole" / "checkpoint-3" / "vae_ema")
    assert all(torch.equal(tensor, average[name]) for name, tensor in model.state_dict().items())
    train(*flags, "--output_dir", tmp_path / "more", "--max_steps", "1", "--pretrained_model_name_or_path", ckpt.parent,
          "--ignore_mismatched_sizes")  # fmt: skip


def test_a_ckpt_of_a_wrapped_network_becomes_a_folder(tiny_json: Path, tmp_path: Path) -> None:
    model = build_model("WFVAE", json.loads(tiny_json.read_text()))
    state = {f"module.{name}": value for name, value in model.state_dict().items()}
    average = {f"module.{name}": value + 1 for name, value in model.named_parameters() if value.requires_grad}
    (tmp_path / "in").mkdir()
    for name, ema in (("checkpoint-9", {}), ("checkpoint-10", average)):
        torch.save({"state_dict": {"gen_model": state}, "ema_state_dict": ema}, tmp_path / "in" / f"{name}.ckpt")
    named = ["--model_name", "WFVAE", "--model_config", str(tiny_json)]
    upstream.main([str(tmp_path / "in" / "checkpoint-9.ckpt"), str(tmp_path / "raw"), *named])
    upstream.main([str(tmp_path / "in"), str(tmp_path / "averaged"), *named])  # of several files the last one
    raw, averaged = (load_model(tmp_path / name).state_dict() for name in ("raw", "averaged"))
    for name, value in model.state_dict().items():
        assert torch.equal(raw[name], value)
        assert torch.equal(averaged[name], value + 1 if f"module.{name}" in average else value)


def test_a_new_stage_refreshes_what_it_is_told_to(flags: list[str], tmp_path: Path) -> None:
    flags += ["--save_ckpt_step", "3"]
    train(*flags, "--output_dir", tmp_path / "one", "--max_steps", "3")
    first = tmp_path / "one" / "checkpoint-3"
    stage = [*flags, "--resume_from_checkpoint", first, "--not_resume_discriminator", "--max_steps", "4"]
    train(*stage, "--output_dir", tmp_path / "two")
    second = tmp_path / "two" / "checkpoint-4"  # its one step was the discriminator's
    own, before = weights(second / "vae"), weights(first / "vae")
    assert all(torch.equal(own[key], before[key]) for key in before)
    states = [torch.load(folder / "optimizer_1.bin", weights_only=True)["state"] for folder in (first, second)]
    assert [float(state[0]["step"]) for state in states] == [1, 1]
    train(*flags, "--resume_from_checkpoint", first, "--not_resume_training_process", "--not_resume_optimizer",
          "--max_steps", "1", "--output_dir", tmp_path / "three")  # fmt: skip
    assert [record["step"] for record in metrics(tmp_path / "three")] == [1]
    state = torch.load(tmp_path / "three" / "checkpoint-1" / "optimizer.bin", weights_only=True)["state"]
    assert float(state[0]["step"]) == 1


# Switches -------------------------------------------------------------------------------------------------------------


def test_a_frozen_encoder_stays_with_two_processes(flags: list[str], tmp_path: Path) -> None:
    flags += ["--freeze_encoder", "--max_steps", "4", "--save_ckpt_step", "1", "--output_dir", str(tmp_path / "run")]
    launch(*flags, processes=2)
    first, last = (weights(tmp_path / "run" / f"checkpoint-{step}" / "vae") for step in (1, 4))
    changed = {name.split(".")[0] for name in first if not torch.equal(first[name], last[name])}
    assert changed == {"decoder"}


def test_a_frozen_encoder_is_in_eval_mode(
    flags: list[str], videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    modes, forward = [], VaeTask.training_step

    def noting(task: VaeTask, *arguments: Any) -> Any:
        output = forward(task, *arguments)
        modes.append((task.bare_vae.encoder.mid.training, task.bare_vae.decoder.mid.training))
        return output

    monkeypatch.setattr(VaeTask, "training_step", noting)
    flags += f"--freeze_encoder --max_steps 3 --eval_steps 1 --eval_video_path {videos} {EVALUATED}".split()
    train(*flags, "--output_dir", tmp_path / "run")
    assert modes == [(False, True)] * 3


def test_validation_alone_passes_in_chunks(
    flags: list[str], videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chunks, encode = [], Encoder.forward

    def noting(encoder: Encoder, x: Tensor, stream: Any = None) -> Any:
        chunks.append((torch.is_grad_enabled(), x.shape[2]))
        return encode(encoder, x, stream)

    monkeypatch.setattr(Encoder, "forward", noting)
    flags += f"--max_steps 3 --eval_video_path {videos} {EVALUATED} --eval_num_frames 17".split()
    train(*flags, "--output_dir", tmp_path / "whole")
    assert set(chunks) == {(True, 9), (False, 9), (False, 17)}  # of the autoencoder's turn, its adversary's, validation
    chunks.clear()
    train(*flags, "--output_dir", tmp_path / "chunks", "--enable_tiling")
    assert set(chunks) == {(True, 9), (False, 9), (False, 8)}
    for ours, expected in zip(metrics(tmp_path / "chunks"), metrics(tmp_path / "whole"), strict=True):
        exact = ours["kind"] != "validation"
        for key in expected.keys() - {"kind"}:
            assert ours[key] == (expected[key] if exact else pytest.approx(expected[key], rel=1e-3)), key


def test_the_loss_counts_its_terms(flags: list[str], tmp_path: Path) -> None:
    train(*flags, "--output_dir", tmp_path / "run", "--max_steps", "1", "--disc_start", "100")
    (record,) = metrics(tmp_path / "run")
    expected = record["nll_loss"] + 1e-6 * record["kl_loss"] + 0.1 * record["wl_loss"]
    assert record["loss"] == pytest.approx(expected, rel=1e-5)
    assert record["nll_loss"] == pytest.approx(record["rec_per_pixel"] * 3 * 32 * 32, rel=1e-5)
    assert record["d_weight"] == record["g_loss"] == 0


def test_broken_files_are_replaced_and_named(flags: list[str], videos: Path, tmp_path: Path) -> None:
    shutil.copytree(videos, tmp_path / "videos")
    whole = (tmp_path / "videos" / "part0" / "0.mp4").read_bytes()
    (tmp_path / "videos" / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "videos" / "empty.webm").touch()
    words = ["--video_path", tmp_path / "videos", "--max_bad_fraction", "0.5", "--max_steps", "10"]
    train(*flags, *words, "--output_dir", tmp_path / "run", "--disc_start", "1000")
    records = [json.loads(line) for line in (tmp_path / "run" / "bad_samples.jsonl").read_text().splitlines()]
    assert {Path(record["files"][0]).name for record in records} == {"cut.mp4", "empty.webm"}


# Bad input ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "texts"),
    [
        (["--num_frames", "10", "--video_path", "nowhere"], ["--num_frames 10", "use 9 or 13"]),  # before data
        (["--resolution", "36"], ["--resolution 36", "use 32 or 40"]),
        (["--eval_video_path", "nowhere", "--eval_num_frames", "10"], ["--eval_num_frames 10", "use 9 or 13"]),
        (["--video_path", "nowhere"], ["--video_path nowhere is not a folder"]),
        (["--model_config", "nowhere.json"], ["--model_config", "nowhere.json"]),
        (["--perceptual_weight", "1"], ["--vgg_weights names a file", "--perceptual_weight 0"]),
        (["--resume_from_checkpoint", "nowhere.ckpt"], ["nowhere.ckpt is not a file"]),
        (["--resume_from_checkpoint", "checkpoint-9"], ["there is no checkpoint 'checkpoint-9'"]),
        (["--load_disc_from_checkpoint", "nowhere"], ["neither a .ckpt file nor a checkpoint folder"]),
        (["--batch_size", "9"], ["the batch is larger than the data: data.batch_size 9 x 1"]),
        (["--vgg_weights", "nowhere", "--perceptual_weight", "1"], ["or set vgg_weights to where it is"]),
        (["--num_frames", "1", "--resolution", "16"], ["batch of 1 clips of 1 frames, 16 px", "raise --resolution"]),
        (["--disc_cls", "LPIPSWithDiscriminator", "--resolution", "16"], ["discriminator cannot take", "16 px"]),
    ],
)
def test_bad_input_is_refused_at_start(
    flags: list[str], words: list[str], texts: list[str], tmp_path: Path,
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    with pytest.raises(SystemExit) as ended:
        train(*flags, *words, "--output_dir", tmp_path / "run", "--max_steps", "1")
    assert ended.value.code == 1
    printed = capsys.readouterr().err
    assert "error: " in printed
    for text in texts:
        assert text in printed
    assert not list(tmp_path.glob("run/checkpoint-*"))


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"{'a': 1}", "bad.json is no valid JSON"),
        (b'"\xff"', "bad.json is no valid JSON"),
        (b"[1]", "bad.json must hold a mapping in braces, it holds a list"),
        (b'{"base_channels": -4}', "base_channels is -4, but must not be negative"),
        (b'{"base_chanels": 4}', "did you mean 'base_channels'?"),
        (b'{"norm_type": "groupnorm"}', "a clip in chunks would give another result: leave tiling disabled"),
    ],
)
def test_a_bad_json_is_refused(
    flags: list[str], content: bytes, text: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "bad.json").write_bytes(content)
    with pytest.raises(SystemExit):
        train(*flags, "--model_config", tmp_path / "bad.json", "--output_dir", tmp_path / "run",
              "--eval_video_path", "nowhere", "--enable_tiling")  # fmt: skip
    assert text in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_damaged_weights_are_refused(
    flags: list[str], tiny_json: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    for folder, name in (("vae", "diffusion_pytorch_model"), ("other/discriminator", "model")):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / f"{name}.safetensors").write_bytes(b"x" * 100)
    shutil.copy(tiny_json, tmp_path / "vae" / "config.json")
    pretrained = [word for word in flags if word not in ("--model_config", str(tiny_json))]
    for words in (
        [*pretrained, "--pretrained_model_name_or_path", tmp_path / "vae"],
        [*flags, "--load_disc_from_checkpoint", tmp_path / "other"],
    ):
        with pytest.raises(SystemExit):
            train(*words, "--output_dir", tmp_path / "run")
        printed = capsys.readouterr().err
        assert "model.safetensors " in printed and "is damaged, or " in printed


def test_what_a_checkpoint_does_not_fit_is_said(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    train(*flags, "--max_steps", "3", "--output_dir", tmp_path / "one")
    again = [*flags, "--output_dir", tmp_path / "two", "--resume_from_checkpoint", tmp_path / "one" / "checkpoint-3"]
    frozen = [*again, "--freeze_encoder", "--max_steps", "4"]
    texts = {
        "the checkpoint is of step 3, but the run ends after step 2": [*again, "--max_steps", "2"],
        "its optimizer trained other parameters": [*frozen, "--allow_changed", "model.freeze_encoder"],
        "Another --freeze_encoder needs a fresh one: --not_resume_optimizer": [*frozen, "--not_resume_discriminator"],
        "does not hold the weights of this NLayerDiscriminator; 11 missing: discriminator.main.5.weight": [
            *again, "--not_resume_optimizer", "--disc_cls", "LPIPSWithDiscriminator", "--max_steps", "4"
        ],
    }  # fmt: skip
    for text, words in texts.items():
        with pytest.raises(SystemExit):
            train(*words)
        assert text in capsys.readouterr().err
    train(*frozen, "--not_resume_optimizer")
    assert "autoencoder, its average, discriminator, the discriminator's optimizer; not from there: its optimizer" in (
        capsys.readouterr().err
    )


def test_a_pretrained_folder_brings_its_own_network(
    flags: list[str], tiny_json: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    wide = json.loads(tiny_json.read_text()) | {"latent_dim": 6}
    build_model("WFVAE", wide).save_pretrained(tmp_path / "wide")
    flags += ["--pretrained_model_name_or_path", str(tmp_path / "wide"), "--max_steps", "1"]
    text = f"--model_config {tiny_json} is not used: the network is that of {tmp_path / 'wide' / 'config.json'}"
    for name, words, is_said, latent_dim in (
        ("own", [], True, 6),
        ("same", ["--model_config", tmp_path / "wide" / "config.json"], False, 6),
        ("fitting", ["--ignore_mismatched_sizes"], False, 4),
    ):
        train(*flags, *words, "--output_dir", tmp_path / name)
        printed = capsys.readouterr().err
        assert printed.count(text) == printed.count("is not used") == is_said
        assert load_model(tmp_path / name / "export").latent_channels == latent_dim
        assert ("tensors start at random" in printed) == (name == "fitting")
    (tmp_path / "bare").mkdir()
    torch.save({"state_dict": {"gen_model": load_model(tmp_path / "wide").state_dict()}}, tmp_path / "bare" / "a.ckpt")
    (tmp_path / "wide" / "config.json").rename(tmp_path / "wide.json")
    words = ["--pretrained_model_name_or_path", tmp_path / "bare", "--model_config", tmp_path / "wide.json"]
    train(*flags, *words, "--output_dir", tmp_path / "ckpt")  # the original writes no config.json beside its files
    assert load_model(tmp_path / "ckpt" / "export").latent_channels == 6


def test_settings_without_effect_are_named() -> None:
    words = (
        "--video_path v --pretrained_model_name_or_path p --eval_lpips --eval_num_frames 9 --ignore_mismatched_sizes"
    )
    _, warnings = PARSER.parse(words.split())
    assert warnings == [
        "--eval_lpips has no effect: eval_video_path is null",
        "--eval_num_frames has no effect: eval_video_path is null",
        "--ignore_mismatched_sizes has no effect: model_config is null",
    ]
    with pytest.raises(ValueError, match="--eval_resolution: 8 is below the least value 16"):  # SSIM's window
        PARSER.parse([*words.split(), "--eval_resolution", "8"])


def test_the_trial_tries_both_turns_and_passes_over_broken_clips(
    flags: list[str], videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    shutil.copytree(videos, tmp_path / "videos")
    (tmp_path / "videos" / "a.mp4").write_bytes(b"x")
    words = ["--video_path", tmp_path / "videos", "--disc_start", "50", "--max_bad_fraction", "0.5"]
    with pytest.raises(SystemExit) as ended:
        train(*flags, *words, "--output_dir", tmp_path / "run", "--preflight")
    printed = capsys.readouterr()
    assert ended.value.code == 0 and "ready to train" in printed.out and "loss_discriminator=" in printed.err
    assert "a training clip cannot be read" in printed.err and (tmp_path / "run-preflight-samples.png").exists()


def test_a_damaged_ckpt_is_refused_without_running_its_code(tmp_path: Path) -> None:
    import pickle

    class Code:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "executed"),))

    path = tmp_path / "x.ckpt"
    for content in (pickle.dumps(Code()), b"", b"PK\x03\x04 torn"):
        path.write_bytes(content)
        with pytest.raises(
            upstream.CheckpointError, match="is no checkpoint of the original's layout, or is damaged"
        ) as raised:
            upstream.read_ckpt(path)
        assert "weights_only" not in str(raised.value)  # PyTorch advises to run the code
    torch.save({"state_dict": {"unet": {}}}, path)
    with pytest.raises(upstream.CheckpointError, match="gen_model"):
        upstream.read_ckpt(path)
    assert not (tmp_path / "executed").exists()
