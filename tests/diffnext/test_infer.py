"""The command: prompts in, numbered files out; the same whatever the batch and the number of processes."""

import json
import shutil
from pathlib import Path

import make_tiny_checkpoints
import numpy as np
import pytest
import torch
from PIL import Image
from running import on_ranks

from common.video import load_image, probe_video, read_frames
from diffnext import infer
from diffnext.infer import PARSER, main

FEW = ["--num_inference_steps", "3", "--num_diffusion_steps", "2", "--device", "cpu", "--mixed_precision", "no"]


@pytest.fixture(autouse=True)
def on_cpu(clean_process: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """`--device cpu` hides the GPUs: from this test alone."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


@pytest.fixture(scope="module")
def t2i(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_checkpoints.make_nova_checkpoint(tmp_path_factory.mktemp("nova") / "t2i", "t2i")


@pytest.fixture(scope="module")
def t2v(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_checkpoints.make_nova_checkpoint(tmp_path_factory.mktemp("nova") / "t2v", "t2v")


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def write_prompts(path: Path, prompts: list) -> str:
    path.write_text(json.dumps(prompts) if path.suffix == ".json" else "\n".join(prompts))
    return str(path)


def run(arguments: list[str], num_processes: int = 1) -> dict:
    """Why results went wrong, of all processes."""
    config, _ = PARSER.parse([*arguments, *FEW])
    done = on_ranks(num_processes, lambda rank: infer.infer(config, rank, torch.float32))
    return {job: reason for each in done for job, reason in each.items()}


def test_images_of_a_file_of_prompts(t2i: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    prompts = write_prompts(tmp_path / "p.txt", ["a red, fox", "", "snow"])
    arguments = ["--model", str(t2i), "--prompts", prompts, "--output_dir", str(tmp_path / "out"), *FEW]
    main(arguments)
    assert files(tmp_path / "out") == ["00000.json", "00000.png", "00001.json", "00001.png"]
    assert load_image(tmp_path / "out" / "00000.png").size == (64, 64)
    made = json.loads((tmp_path / "out" / "00001.json").read_text())
    assert made["settings"]["pretrained_path"] == str(t2i)
    assert made["prompt"] == "snow" and made["prompt_number"] == 1 and made["settings"]["num_inference_steps"] == 3
    assert "2 of 2 results are there" in capsys.readouterr().out

    # What is missing is made again, and is the same; the rest is left alone.
    picture = (tmp_path / "out" / "00001.png").read_bytes()
    (tmp_path / "out" / "00001.png").unlink()
    kept = (tmp_path / "out" / "00000.png").stat().st_mtime_ns
    main(arguments)
    assert "1 of 2 results exist and are kept; --overwrite true makes them again" in capsys.readouterr().out
    assert (tmp_path / "out" / "00001.png").read_bytes() == picture
    assert (tmp_path / "out" / "00000.png").stat().st_mtime_ns == kept


def test_batches_and_processes_do_not_count(t2i: Path, tmp_path: Path) -> None:
    prompts = write_prompts(tmp_path / "p.txt", ["fox", "snow", "a very long prompt that is cut"])
    arguments = ["--model", str(t2i), "--prompts", prompts, "--num_images_per_prompt", "2"]
    run([*arguments, "--output_dir", str(tmp_path / "one"), "--batch_size", "1"])
    run([*arguments, "--output_dir", str(tmp_path / "two"), "--batch_size", "3"], num_processes=2)
    names = [f"{prompt:05d}_{result}.png" for prompt in range(3) for result in range(2)]
    assert [name for name in files(tmp_path / "one") if name.endswith(".png")] == names
    assert files(tmp_path / "one") == files(tmp_path / "two")
    pictures = {name: np.int32(load_image(tmp_path / "one" / name)) for name in names}
    for name in names:
        assert abs(pictures[name] - np.int32(load_image(tmp_path / "two" / name))).max() <= 1, name
    assert abs(pictures["00000_0.png"] - pictures["00000_1.png"]).max() > 1
    assert abs(pictures["00000_0.png"] - pictures["00001_0.png"]).max() > 1


def test_videos_with_their_own_first_frames(t2v: Path, tmp_path: Path) -> None:
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 70, 3), dtype=np.uint8)).save(tmp_path / "a.png")
    entries = [
        {"prompt": "fox", "image": "a.png", "motion_flow": 8},
        "snow",
        {"prompt": "fox", "negative_prompt": "snow"},
    ]
    prompts = write_prompts(tmp_path / "p.json", entries)
    arguments = ["--model", str(t2v), "--prompts", prompts, "--max_latent_length", "2", "--batch_size", "4"]
    assert run([*arguments, "--output_dir", str(tmp_path / "out"), "--fps", "6"]) == {}
    assert [name for name in files(tmp_path / "out") if name.endswith(".mp4")] == [f"0000{n}.mp4" for n in range(3)]
    info = probe_video(tmp_path / "out" / "00000.mp4")
    assert (info.num_frames, info.fps, info.width_px, info.height_px) == (5, 6, 96, 64)
    made = json.loads((tmp_path / "out" / "00000.json").read_text())
    assert made["motion_flow"] == 8 and made["image"].endswith("a.png")
    first, last = (read_frames(tmp_path / "out" / f"0000{n}.mp4", [0]) for n in (1, 2))
    assert not np.array_equal(first, last)


def test_embeddings_need_no_text_encoder(t2i: Path, tmp_path: Path) -> None:
    folder = tmp_path / "light"
    shutil.copytree(t2i, folder)
    shutil.rmtree(folder / "text_encoder")
    np.save(tmp_path / "a.npy", np.ones((3, 32), np.float16))
    prompts = write_prompts(tmp_path / "p.json", [{"prompt": "a fox, encoded before", "embedding": "a.npy"}])
    arguments = ["--model", str(folder), "--prompts", prompts, "--output_dir", str(tmp_path / "out")]
    assert run([*arguments, "--guidance_scale", "1"]) == {}
    assert files(tmp_path / "out") == ["00000.json", "00000.png"]


def test_weights_of_a_checkpoint(t2i: Path, tmp_path: Path) -> None:
    other = make_tiny_checkpoints.make_nova_checkpoint(tmp_path / "other", "t2i", seed=1) / "transformer"
    checkpoint = tmp_path / "checkpoint-5"
    shutil.copytree(t2i / "transformer", checkpoint / "transformer")
    shutil.copytree(other, checkpoint / "transformer_ema")
    arguments = ["--model", str(t2i), "--prompt", "fox"]
    pictures = {}
    choices = {
        "own": [],
        "raw": [str(checkpoint)],
        "ema": [str(checkpoint), "--use_ema", "true"],
        "other": [str(other)],
    }
    for name, choice in choices.items():
        run([*arguments, "--output_dir", str(tmp_path / name), *(["--transformer", *choice] if choice else [])])
        pictures[name] = (tmp_path / name / "00000.png").read_bytes()
    assert pictures["own"] == pictures["raw"] != pictures["ema"] == pictures["other"]
    shutil.rmtree(checkpoint / "transformer_ema")
    with pytest.raises(
        FileNotFoundError, match="has no transformer_ema/config.json; it holds transformer. Give a check"
    ):
        run([*arguments, "--output_dir", str(tmp_path / "x"), "--transformer", str(checkpoint), "--use_ema", "true"])


def test_results_made_otherwise_are_not_mixed(t2i: Path, tmp_path: Path) -> None:
    arguments = ["--model", str(t2i), "--prompt", "fox", "--output_dir", str(tmp_path)]
    run(arguments)
    with pytest.raises(
        ValueError, match="00000.json was made with another seed: give another --output_dir, or --overwrite"
    ):
        run([*arguments, "--seed", "1"])
    before = (tmp_path / "00000.png").read_bytes()
    run([*arguments, "--seed", "1", "--overwrite", "true"])
    assert (tmp_path / "00000.png").read_bytes() != before


def test_one_that_cannot_be_made_does_not_take_the_others_with_it(
    t2v: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    Image.new("RGB", (30, 30)).save(tmp_path / "good.png")
    (tmp_path / "bad.png").write_bytes(b"none")
    entries = [{"prompt": "fox", "image": name} for name in ("good.png", "bad.png")]
    prompts = write_prompts(tmp_path / "p.json", entries)
    arguments = ["--model", str(t2v), "--prompts", prompts, "--output_dir", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as end:
        main([*arguments, "--max_latent_length", "2", "--batch_size", "2", *FEW])
    assert end.value.code == 1
    printed = capsys.readouterr()
    assert "1 results went wrong:" in printed.err and "prompt 1: " in printed.err and "bad.png" in printed.err
    assert files(tmp_path / "out") == ["00000.json", "00000.mp4"]


def test_older_spellings_hold() -> None:
    old = "--pretrained_path m --output o --prompt fox".split()
    assert PARSER.parse(old) == PARSER.parse("--model m --output_dir o --prompt fox".split())
    assert PARSER.parse(old) == PARSER.parse("model.pretrained_path=m data.output=o --prompt fox".split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--output_dir", "x", "--model", "y"],
            "either --prompt (text) or --prompts (file of prompts) is required",
        ),
        (["--prompt", "a", "--model", "y"], "--output_dir is required: a folder for results"),
        (["--prompt", "a", "--output_dir", "x"], "--model is required: the folder, or hub id"),
        (["--prompt", "a", "--guidance_scal", "3"], "guidance_scale"),
        (
            ["--prompt", "a", "--image_guidance_scale", "2", "--guidance_scale", "1"],
            "image_guidance_scale 2.0 needs a guidance_scale above 1, but that is 1.0",
        ),
    ],
)
def test_commands_that_cannot_be(arguments: list[str], message: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        main(arguments)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "holds no prompts: give one per line, or a json list"),
        ("{", "is no valid JSON"),
        ('["a", 3]', "entry 1 (from 0): must be a text, or an object with prompt or embedding, but is 3"),
        (
            '[{"prompt": "a", "seed": 3}]',
            "entry 0 (from 0): has unknown keys seed; it may have prompt, negative_prompt",
        ),
        ('[{"prompt": 3}]', "entry 0 (from 0): prompt must be text"),
        ('[{"prompt": "a", "motion_flow": "x"}]', "entry 0 (from 0): motion_flow must be a number"),
    ],
)
def test_files_of_prompts_that_cannot_be(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "p.json").write_text(content)
    with pytest.raises(ValueError) as error:
        run(["--model", "x", "--prompts", str(tmp_path / "p.json"), "--output_dir", str(tmp_path / "out")])
    assert message in str(error.value)


def test_what_does_not_fit_the_model_is_said_once_and_early(t2i: Path, t2v: Path, tmp_path: Path) -> None:
    def fails(*arguments: str) -> str:
        with pytest.raises((ValueError, FileNotFoundError)) as error:
            run(["--prompt", "a", "--output_dir", str(tmp_path), *arguments])
        return str(error.value)

    assert "but this model makes single images" in fails("--model", str(t2i), "--max_latent_length", "9")
    assert "videos of at most 16 latent frames" in fails("--model", str(t2v), "--max_latent_length", "17")
    assert "would be lost: use 5 or 9" in fails("--model", str(t2v), "--max_latent_length", "8")
    assert "flow_shift=2.0 has no meaning for DDPMSched" in fails("--model", str(t2v), "--flow_shift", "2")
    assert "nowhere is neither a folder nor a model" in fails("--model", str(tmp_path / "nowhere"))
    assert "must be a folder" in fails("--model", str(t2i), "--output_dir", str(tmp_path / "a.png"))
