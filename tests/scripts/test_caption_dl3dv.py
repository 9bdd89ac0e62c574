import json
import os
import subprocess
import sys
from pathlib import Path

import caption_dl3dv
import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2Processor,
    BlipImageProcessor,
    PreTrainedTokenizerFast,
)

from training_ggi.data import read_scenes

ROOT = Path(__file__).parents[2]
WORDS = ["<s>", "<pad>", "</s>", "<unk>", "a", "room", "with", "chairs", "<image>"]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A random BLIP-2 with a vocabulary of four words."""
    folder = tmp_path_factory.mktemp("blip2")
    tokenizer = Tokenizer(WordLevel({word: index for index, word in enumerate(WORDS[:8])}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    special = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    images = BlipImageProcessor(size={"height": 28, "width": 28})
    Blip2Processor(images, fast, num_query_tokens=4).save_pretrained(folder)
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**size, "vocab_size": 9, "ffn_dim": 16, "word_embed_proj_dim": 16, "max_position_embeddings": 64}
    text |= {"model_type": "opt", "bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False}
    config = Blip2Config(
        vision_config={**size, "intermediate_size": 16, "image_size": 28, "patch_size": 14},
        qformer_config={**size, "intermediate_size": 16, "encoder_hidden_size": 16, "vocab_size": 16},
        text_config=text,
        num_query_tokens=4,
        image_token_index=WORDS.index("<image>"),
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        blip2 = Blip2ForConditionalGeneration(config)
        for parameter in (p for p in blip2.parameters() if p.ndim > 1):
            torch.nn.init.normal_(parameter, std=1.0)  # so that images make a difference
        with torch.no_grad():
            head = blip2.language_model.lm_head.weight  # (9, 16)
            head[[0, 1, 2, 3, 8]] = 0  # it says words only: of these one always has a logit above 0
            head[[5, 7]] = -head[[4, 6]]
    blip2.save_pretrained(folder)
    return folder


@pytest.fixture
def root(tmp_path) -> Path:
    rng = np.random.default_rng(0)
    for number in range(5):
        images = tmp_path / "DL3DV-10K" / "1K" / f"scene{number}" / "images_2"
        images.mkdir(parents=True)
        for frame in (2, 1):
            pixels = rng.integers(0, 256, (4, 6, 3), dtype=np.uint8)
            Image.fromarray(pixels).resize((60, 40)).save(images / f"frame_{frame:05d}.png")
    return tmp_path


def caption(root: Path, model: Path, *flags: str) -> int:
    return caption_dl3dv.main([str(root), "--model", str(model), "--batch_size", "2", *flags])


def test_every_scene_gets_a_caption_of_its_first_frame(root, model, capsys):
    assert caption(root, model) == 0
    assert capsys.readouterr().out == f"5 captions: {root}/captions.json\n"
    text = (root / "captions.json").read_text(encoding="utf-8")
    captions = json.loads(text)
    assert text.count("\n") == 1 and list(captions) == [f"scene{number}" for number in range(5)]
    assert all(set(words.split()) <= set(WORDS[4:8]) and words.strip() == words for words in captions.values())
    assert len(set(captions.values())) > 1
    captioner = caption_dl3dv.load_captioner(str(model), torch.device("cpu"))
    first = Image.open(root / "DL3DV-10K/1K/scene3/images_2/frame_00001.png")
    assert caption_dl3dv.caption_images(captioner, [first]) == [captions["scene3"]]
    assert [scene.prompt for scene in read_scenes(root, None).train] == list(captions.values())
    scenes = [root / "DL3DV-10K/1K" / scene for scene in captions]
    read = [frame.size for _, frames in caption_dl3dv.first_frames(scenes, 2) for frame in frames]
    assert read == [(60, 40)] * 5


def test_what_is_done_is_not_done_again(root, model, monkeypatch):
    (root / "seeds.txt").write_text("DL3DV-10K/1K/scene1\nDL3DV-10K/1K/scene0\n")
    (root / "captions.json").write_text('{"other": "élan", "scene1": "by hand"}')
    partial = root / "captions.json.partial"
    partial.mkdir()
    (partial / "process_3.jsonl").write_text('{"scene": "scene2", "caption": "in part"}\n{"scene": "scene0", "cap')
    asked = []
    real = caption_dl3dv.caption_images
    monkeypatch.setattr(caption_dl3dv, "caption_images", lambda c, images: asked.extend(images) or real(c, images))
    assert caption(root, model) == 0 and len(asked) == 1
    captions = json.loads((root / "captions.json").read_text(encoding="utf-8"))
    assert list(captions) == ["other", "scene1", "scene0"] and captions["scene1"] == "by hand"
    assert "élan" in (root / "captions.json").read_text(encoding="utf-8")
    (root / "seeds.txt").unlink()
    assert caption(root, model) == 0 and len(asked) == 3
    assert json.loads((root / "captions.json").read_text())["scene2"] == "in part"
    monkeypatch.setattr(caption_dl3dv, "load_captioner", None)  # nothing to do needs no model
    assert caption(root, model) == 0


def test_processes_share_the_scenes_and_the_last_one_writes(root, model, monkeypatch, capsys):
    for rank, (done, left) in enumerate([(2, 3), (4, 1), (5, 0)]):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "3")
        assert caption(root, model) == 0
        expected = f"{left} scenes are left to other processes; the last one writes {root}/captions.json\n"
        assert capsys.readouterr().out == (expected if left else f"5 captions: {root}/captions.json\n")
        assert len(caption_dl3dv.read_partial(root / "captions.json.partial")[0]) == done
        assert (root / "captions.json").exists() == (left == 0)
    shared = (root / "captions.json").read_bytes()
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name)
    assert caption(root, model, "--output", str(root / "alone.json")) == 0
    assert (root / "alone.json").read_bytes() == shared


def test_bad_scenes_are_named_and_tried_again(root, model, capsys):
    scenes = root / "DL3DV-10K/1K"
    damaged = scenes / "scene1/images_2/frame_00001.png"
    whole = damaged.read_bytes()
    damaged.write_bytes(whole[:50])
    (scenes / "scene2/images_2").rename(scenes / "scene2/pictures")
    for path in (scenes / "scene4/images_2").iterdir():
        path.unlink()
    (root / "seeds.txt").write_text("".join(f"DL3DV-10K/1K/scene{number}\n" for number in range(5)))
    assert caption(root, model) == 1
    captured = capsys.readouterr()
    assert captured.out == f"2 captions: {root}/captions.json\n"
    lines = [line for line in captured.err.splitlines() if line.startswith("no caption: ")]
    assert lines[0].startswith(f"no caption: {damaged}: cannot be read as an image (")
    assert lines[1:] == [
        f"no caption: {scenes}/scene2: holds no folder images_2",
        f"no caption: {scenes}/scene4/images_2: holds no images",
    ]
    damaged.write_bytes(whole)
    assert caption(root, model) == 1
    assert list(json.loads((root / "captions.json").read_text())) == ["scene0", "scene3", "scene1"]


def test_wrong_usage_is_one_sentence_and_status_2(root, model, capsys):
    assert caption(root, model, "--batch_size", "0") == 2
    assert capsys.readouterr().err == "caption_dl3dv: --batch_size is 0, but must be at least 1\n"
    assert caption(root, model, "--dataset_file", "no.txt") == 2
    assert capsys.readouterr().err.startswith("caption_dl3dv: data.dataset_file is no.txt, but there is no file ")
    assert caption(root / "none", model) == 2
    assert capsys.readouterr().err.startswith(f"caption_dl3dv: {root}/none (from ")
    assert caption(root, root / "no_model") == 2
    assert "no_model" in capsys.readouterr().err


def test_the_script_runs_by_itself(root, model):
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts/caption_dl3dv.py"), str(root), "--model", str(model)],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, f"5 captions: {root}/captions.json\n"), done.stderr
