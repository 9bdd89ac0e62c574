"""Caches of latents: the guide's records byte for byte, any number of processes, interruptions, bad media."""

import csv
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import decord
import numpy as np
import PIL.Image
import pytest
import torch
from running import on_ranks
from tiny_vaes import write_image_vae, write_video_vae
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PhiConfig, PhiForCausalLM, PreTrainedTokenizerFast

import diffnext.build_cache as build_cache
from common import tools
from common.video import save_image, write_video
from diffnext.data import records as codewithgpu
from diffnext.data.records import RecordDataset
from diffnext.media import Preprocessing, SourceConfig, parse_frame_ids, read_items
from diffnext.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffnext.models.autoencoders.autoencoder_kl_opensora import AutoencoderKLOpenSora
from diffnext.motion import motion_score

ROOT = Path(__file__).parents[2]
NUM_IMAGES = 7


def smooth(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Random uint8 (..., H, W, 3) without much detail."""
    coarse = rng.integers(0, 256, (*shape[:-2], shape[-2] // 8, shape[-1] // 8, 3), np.uint8)
    return coarse.repeat(8, -2).repeat(8, -3)


@pytest.fixture(scope="module", autouse=True)
def no_gpu() -> Iterator[None]:
    """Numbers are those of the CPU; the variable is as it was afterwards."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        yield


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """vae_image/, vae_video/, seven images with captions.csv, three clips of 17 frames with .txt and .json beside."""
    folder = tmp_path_factory.mktemp("media")
    write_image_vae(folder / "vae_image")
    write_video_vae(folder / "vae_video")
    rng = np.random.default_rng(0)
    rows = []
    for n in range(NUM_IMAGES):
        save_image(folder / "images" / f"{n}.png", smooth(rng, 32, 48))
        rows.append({"path": f"images/{n}.png", "caption": f"A long caption, number {n}.", "text": f"short {n}"})
    write_table(folder / "captions.csv", rows)
    for n in range(3):
        clip = folder / "clips" / f"{n}.mp4"
        write_video(clip, smooth(rng, 17, 48, 80), fps=10, crf=1)
        clip.with_suffix(".txt").write_text(f"clip {n}\n")
    (folder / "clips" / "1.json").write_text(json.dumps({"text": "one", "flow": 2.5}))
    return folder


def write_table(path: Path, rows: list[dict[str, Any]]) -> None:
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def image_flags(media: Path, output: Path, *flags: str) -> list[str]:
    ours = ["--source", str(media / "captions.csv"), "--vae", str(media / "vae_image"), "--output_dir", str(output)]
    return [*ours, "--num_workers", "0", "--shard_size", "2", "--device", "cpu", *flags]


def video_flags(media: Path, output: Path, *flags: str) -> list[str]:
    ours = ["--source", str(media / "clips"), "--vae", str(media / "vae_video"), "--output_dir", str(output)]
    return [*ours, "--num_workers", "0", "--frame_ids", "0:17:2", "--resize", "48", "--crop_size", "40,64", *flags]


def build(flags: list[str]) -> None:
    build_cache.main(flags)


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def failure(flags: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What is printed by a run that ends with an error."""
    with pytest.raises(SystemExit) as stop:
        build(flags)
    assert stop.value.code != 0
    return capsys.readouterr().err


# The guide's snippets


def test_images_are_the_guides_records(media: Path, tmp_path: Path) -> None:
    dtype = torch.float16
    vae = AutoencoderKL.from_pretrained(media / "vae_image").to(dtype=dtype).eval()
    features = {"moments": "bytes", "caption": "string", "text": "string", "shape": ["int64"]}
    (tmp_path / "guide").mkdir()
    writer = codewithgpu.RecordWriter(str(tmp_path / "guide"), features)
    for n in range(3):
        img = PIL.Image.open(media / "images" / f"{n}.png")
        x = torch.as_tensor(np.array(img)[None, ...].transpose(0, 3, 1, 2)).to(dtype)
        with torch.no_grad():
            x = vae.encode(x.sub(127.5).div(127.5)).latent_dist.parameters.cpu().numpy()[0]
        example = {"caption": f"A long caption, number {n}.", "text": f"short {n}"}
        writer.write({"shape": x.shape, "moments": x.tobytes(), **example})
    writer.close()
    build(image_flags(media, tmp_path / "ours", "--dtype", "fp16", "--max_items", "3", "--shard_size", "99"))
    found = files_of(tmp_path / "ours")
    assert {name: found[name] for name in files_of(tmp_path / "guide")} == files_of(tmp_path / "guide")
    assert sorted(found) == ["00000.data", "00000.index", "METADATA", "cache.json"]


def test_clips_are_the_guides_records(media: Path, tmp_path: Path) -> None:
    dtype = torch.float16
    vae = AutoencoderKLOpenSora.from_pretrained(media / "vae_video").to(dtype=dtype).eval()
    features = {"moments": "bytes", "caption": "string", "text": "string", "shape": ["int64"], "flow": "float64"}
    (tmp_path / "guide").mkdir()
    writer = codewithgpu.RecordWriter(str(tmp_path / "guide"), features)
    resize, crop_size, frame_ids = 48, (40, 64), list(range(0, 17, 2))
    vid = decord.VideoReader(str(media / "clips" / "0.mp4"))
    h, w = vid[0].shape[:2]
    scale = float(resize) / float(min(h, w))
    size = int(h * scale + 0.5), int(w * scale + 0.5)
    y, x = (size[0] - crop_size[0]) // 2, (size[1] - crop_size[1]) // 2
    vid = decord.VideoReader(str(media / "clips" / "0.mp4"), height=size[0], width=size[1])
    vid = vid.get_batch(frame_ids).asnumpy()
    vid = vid[:, y : y + crop_size[0], x : x + crop_size[1]]
    x = torch.as_tensor(vid[None, ...].transpose((0, 4, 1, 2, 3))).to(dtype)
    with torch.no_grad():
        x = vae.encode(x.sub(127.5).div(127.5)).latent_dist.parameters.cpu().numpy()[0]
    writer.write({"shape": x.shape, "moments": x.tobytes(), "caption": "clip 0", "text": "", "flow": 5})
    writer.close()
    build(video_flags(media, tmp_path / "ours", "--dtype", "fp16", "--max_items", "1"))
    found = files_of(tmp_path / "ours")
    assert {name: found[name] for name in files_of(tmp_path / "guide")} == files_of(tmp_path / "guide")
    assert RecordDataset(tmp_path / "ours")[0]["shape"] == [8, 3, 5, 8]


def test_sizes_and_frames_of_the_guide() -> None:
    clips = Preprocessing(True, tuple(parse_frame_ids("0:65:2")), 480, (480, 768))
    assert clips.scaled(720, 1280) == (480, 853)
    assert clips.scaled(1280, 721) == (852, 480)
    pixels = np.arange(480 * 853).reshape(1, 480, 853, 1)
    assert clips._centre(pixels)[0, 0, 0, 0] == 42
    assert clips.frame_ids == tuple(range(0, 65, 2)) and len(clips.frame_ids) == 33


# Sources


def test_folder_and_motion_scores(media: Path, tmp_path: Path) -> None:
    build(video_flags(media, tmp_path / "given"))
    rows = list(RecordDataset(tmp_path / "given"))
    assert [(row["caption"], row["text"], row["flow"]) for row in rows] == [
        ("clip 0", "", 5.0),
        ("clip 1", "one", 2.5),
        ("clip 2", "", 5.0),
    ]
    build(video_flags(media, tmp_path / "measured", "--flow", "measure"))
    measured = [row["flow"] for row in RecordDataset(tmp_path / "measured")]
    assert all(score not in (5.0, 2.5) and score > 0 for score in measured)


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".csv"])
def test_tables(media: Path, tmp_path: Path, suffix: str) -> None:
    rows = [{"file": "0.png", "long": "a, b\nc"}, {"file": str(media / "images" / "1.png"), "long": "d"}]
    table = tmp_path / f"rows{suffix}"
    if suffix == ".csv":
        write_table(table, rows)
    else:
        table.write_text(json.dumps(rows) if suffix == ".json" else "\n".join(map(json.dumps, rows)))
    data = SourceConfig(
        source=str(table), media_dir=str(media / "images"), path_column="file", caption_column="long", flow="auto"
    )
    items = read_items(data)
    assert [(item.file, item.caption, item.text, item.flow) for item in items] == [
        (media / "images" / "0.png", "a, b\nc", "", None),
        (media / "images" / "1.png", "d", "", None),
    ]


@pytest.mark.parametrize(
    ("rows", "flags", "message"),
    [
        ([{"file": "0.png", "caption": "a"}], [], "has no column 'path' (--path_column); it has file, caption"),
        ([{"path": "0.png", "caption": "a"}], ["--flow", "column"], "has no column 'flow' (--flow_column); it has"),
        (
            [{"path": "0.png", "caption": "a"}, {"path": "1.png", "caption": " "}, {"path": "", "caption": "a"}],
            [],
            "2 of 3 items of {table} cannot be used: row 2: caption is ' ', but must be text; row 3: no path",
        ),
        ([{"path": "0.png", "caption": "a", "flow": "fast"}], [], "row 1: flow is 'fast', but must be a number"),
        (
            [{"path": "0.png", "caption": "a"}, {"path": "nowhere.png", "caption": "a"}],
            [],
            "1 of the 2 media of {table} are not there: {media}/images/nowhere.png; change --media_dir",
        ),
        (
            [{"path": "0.png", "caption": "a"}, {"path": "../clips/0.mp4", "caption": "a"}],
            [],
            "0.png and ../clips/0.mp4: an image and a clip; a cache holds one kind; choose with --kind image or video",
        ),
        (
            [{"path": "../clips/0.mp4", "caption": "a"}],
            [],
            "AutoencoderKL takes images, not clips of 33 frames (change crop_size, frame_ids or the autoencoder)",
        ),
    ],
)
def test_errors_before_anything_is_encoded(
    media: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    rows: list[dict[str, Any]],
    flags: list[str],
    message: str,
) -> None:
    write_table(tmp_path / "rows.csv", rows)
    flags = ["--source", str(tmp_path / "rows.csv"), "--media_dir", str(media / "images"), *flags]
    flags += ["--vae", str(media / "vae_image"), "--output_dir", str(tmp_path / "out")]
    assert message.format(table=tmp_path / "rows.csv", media=media) in failure(flags, capsys)
    assert not (tmp_path / "out").exists()


def test_settings_that_are_refused(media: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = failure(["--frame_ids", "9:3", "--crop_sise", "3"], capsys)
    assert "frame_ids is '9:3', but must be start:stop:step with at least one frame, e.g. 0:65:2" in message
    assert "--crop_sise (flag) is unknown; did you mean crop_size" in message
    assert "--source is required: table or folder of media" in failure([], capsys)
    wrong = video_flags(media, tmp_path / "out", "--frame_ids", "0:17:3", "--crop_size", "40,60")
    assert "a width of 60 px is no multiple of 8: use 56 or 64" in failure(wrong, capsys)
    assert "the end of 6 frames would be lost: use 5 or 9" in failure([*wrong, "--crop_size", "40,64"], capsys)


# Runs


@pytest.fixture(scope="module")
def whole(media: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The images as one process makes them at one go."""
    folder = tmp_path_factory.mktemp("whole") / "cache"
    build(image_flags(media, folder))
    return folder


def test_shards_and_order(whole: Path) -> None:
    records = RecordDataset(whole)
    assert [record["text"] for record in records] == [f"short {n}" for n in range(NUM_IMAGES)]
    assert sorted(path.name for path in whole.iterdir()) == sorted(
        [f"{n:05d}.{suffix}" for n in range(4) for suffix in ("data", "index")] + ["METADATA", "cache.json"]
    )
    text = (whole / "METADATA").read_text()
    assert text.startswith('{\n  "entries": 7,\n  "features": {\n    "moments": "BYTES",') and text.endswith("}")


def test_three_ranks_equal_one(media: Path, whole: Path, tmp_path: Path) -> None:
    config, _ = build_cache.PARSER.parse(image_flags(media, tmp_path / "three"))
    results = on_ranks(3, lambda rank: build_cache.build(config, rank))
    assert [result and result["entries"] for result in results] == [NUM_IMAGES, None, None]
    assert files_of(tmp_path / "three") == files_of(whole)


@pytest.mark.slow
def test_two_processes_equal_one(media: Path, whole: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += ["-m", "diffnext.build_cache", *image_flags(media, tmp_path / "two")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "wrote 7 records" in done.stdout
    assert files_of(tmp_path / "two") == files_of(whole)


def test_an_interruption_loses_one_shard(
    media: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    encoded: list[int] = []
    examples = build_cache.Encoding.examples

    def interrupted_at_5(self: Any, samples: Any, skip: Any) -> Any:
        for sample in samples:
            if sample[0] == 5 and 5 not in encoded:
                encoded.append(5)
                raise KeyboardInterrupt
            encoded.append(sample[0])
            yield from examples(self, [sample], skip)

    monkeypatch.setattr(build_cache.Encoding, "examples", interrupted_at_5)
    with pytest.raises(KeyboardInterrupt):
        build(image_flags(media, tmp_path / "cache"))
    assert not (tmp_path / "cache" / "METADATA").exists()
    assert encoded == [0, 1, 2, 3, 4, 5]
    build(image_flags(media, tmp_path / "cache"))
    assert encoded == [0, 1, 2, 3, 4, 5, 4, 5, 6]
    assert files_of(tmp_path / "cache") == files_of(whole)
    build(image_flags(media, tmp_path / "cache"))
    assert "is complete already" in capsys.readouterr().out
    assert len(encoded) == 9


@pytest.mark.parametrize("moment", ["METADATA", "cleaning up"])
def test_kills_while_shards_are_merged(
    media: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    write, remove = tools.write_text, shutil.rmtree

    def killed_writing(path: Path, text: str) -> None:
        if path.name == moment:
            raise KeyboardInterrupt
        write(path, text)

    def killed_removing(path: Path, ignore_errors: bool = False) -> None:
        if path.name == build_cache.MERGED_PARTS and path.exists():
            remove(path / "00001")
            raise KeyboardInterrupt
        remove(path, ignore_errors)

    with monkeypatch.context() as patch:
        patch.setattr(tools, "write_text", killed_writing)
        patch.setattr(build_cache.shutil, "rmtree", killed_removing)
        with pytest.raises(KeyboardInterrupt):
            build(image_flags(media, tmp_path / "cache"))
    monkeypatch.setattr(build_cache.LatentEncoder, "__call__", None)  # nothing is encoded again
    build(image_flags(media, tmp_path / "cache"))
    assert files_of(tmp_path / "cache") == files_of(whole)


def test_bad_media_are_reported_and_not_replaced(
    media: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"path": str(media / "images" / f"{n}.png"), "caption": f"caption {n}"} for n in range(NUM_IMAGES)]
    for n, content in {2: b"", 3: b"no image", 5: None}.items():
        rows[n]["path"] = f"{n}.png"
        if content is None:
            save_image(tmp_path / f"{n}.png", np.zeros((30, 48, 3), np.uint8))
        else:
            (tmp_path / f"{n}.png").write_bytes(content)
    write_table(tmp_path / "rows.csv", rows)
    flags = ["--source", str(tmp_path / "rows.csv"), "--vae", str(media / "vae_image"), "--shard_size", "2"]
    build([*flags, "--output_dir", str(tmp_path / "out"), "--verify", "3", "--num_workers", "1"])
    records = RecordDataset(tmp_path / "out")
    assert [record["caption"] for record in records] == [f"caption {n}" for n in (0, 1, 4, 6)]
    assert [path.name for path in records.shards] == ["00000.data", "00001.data", "00002.data"]
    skipped = [json.loads(line) for line in (tmp_path / "out" / "skipped.jsonl").read_text().splitlines()]
    assert [(row["index"], row["path"]) for row in skipped] == [(2, "2.png"), (3, "3.png"), (5, "5.png")]
    assert skipped[0]["reason"] == "the file is empty (0 bytes)"
    assert skipped[2]["reason"] == "a height of 30 px is no multiple of 8: use 24 or 32; set resize and crop_size"
    assert "3 items were skipped" in capsys.readouterr().err


def test_short_and_small_clips(media: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(1)
    for name, shape in {"short": (9, 48, 80), "small": (17, 48, 56)}.items():
        write_video(tmp_path / "clips" / f"{name}.mp4", smooth(rng, *shape), fps=10)
        (tmp_path / "clips" / f"{name}.txt").write_text(name)
    message = failure(video_flags(media, tmp_path / "out", "--source", str(tmp_path / "clips")), capsys)
    assert "none of the items can be used; the first is short.mp4: has 9 frames, but frame 16 (from 0)" in message
    clips = Preprocessing(True, (0, 2), 48, (40, 64))
    with pytest.raises(ValueError, match=r"is 48 x 56 px \(height x width\) where 40 x 64 are cut out"):
        clips.read(tmp_path / "clips" / "small.mp4")


def test_other_settings_are_refused(
    media: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = files_of(whole)
    write_image_vae(tmp_path / "vae", seed=1)
    message = failure(image_flags(media, whole, "--vae", str(tmp_path / "vae"), "--crop_size", "16,16"), capsys)
    assert "does not belong to this run: vae_weights was '" in message
    assert "crop_size was [], is [16, 16]. Choose another --output_dir, or delete the folder" in message
    assert "num_items was 7, is 3; items was" in failure(image_flags(media, whole, "--max_items", "3"), capsys)
    assert files_of(whole) == before
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "METADATA").write_text("{}")
    message = failure(image_flags(media, tmp_path / "foreign"), capsys)
    assert "holds records without cache.json (METADATA): choose another --output_dir" in message


def test_verify(media: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for n in range(3):
        (images / f"{n}.png").write_bytes((media / "images" / f"{n}.png").read_bytes())
        (images / f"{n}.txt").write_text(f"image {n}")
    flags = [*image_flags(media, tmp_path / "cache", "--batch_size", "2"), "--source", str(images)]
    build([*flags, "--verify", "3"])
    save_image(images / "1.png", np.zeros((32, 48, 3), np.uint8))
    message = failure([*flags, "--verify", "99"], capsys)
    assert "1 of 3 records of" in message and "record 1 (1.png); have the media changed?" in message


# Numbers


def test_overflow_in_half_precision(media: Path) -> None:
    vae = AutoencoderKL.from_pretrained(media / "vae_image")
    pixels = torch.from_numpy(smooth(np.random.default_rng(0), 2, 1, 16, 24))
    rounded = AutoencoderKL.from_pretrained(media / "vae_image").half().float()
    expected = build_cache.LatentEncoder(rounded, torch.float32, torch.device("cpu"), False)(pixels)
    half = build_cache.LatentEncoder(vae, torch.float16, torch.device("cpu"), False)
    encode = vae.encode

    def overflowing(x: torch.Tensor) -> Any:
        output = encode(x)
        if x.dtype == torch.float16:
            output.latent_dist.parameters.fill_(float("inf"))
        return output

    vae.encode = overflowing
    assert np.array_equal(half(pixels), expected)
    assert {each.dtype for each in vae.parameters()} == {torch.float16}


def test_text_embeddings(media: Path, tmp_path: Path) -> None:
    words = {word: n for n, word in enumerate(["[UNK]", "A", "long", "caption,", "number", "short"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]").save_pretrained(tmp_path / "tokenizer")
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    encoder = PhiForCausalLM(PhiConfig(vocab_size=8, **sizes)).eval()
    encoder.save_pretrained(tmp_path / "text_encoder")
    flags = ["--text_encoder", str(tmp_path / "text_encoder"), "--max_tokens", "4", "--max_items", "1"]
    build(image_flags(media, tmp_path / "cache", *flags))
    record = RecordDataset(tmp_path / "cache")[0]
    assert record["caption"]["shape"] == [4, 16] and record["text"]["shape"] == [2, 16]
    with torch.no_grad():
        states = encoder.model(torch.tensor([[1, 2, 3, 4]])).last_hidden_state[0]
    found = np.frombuffer(record["caption"]["data"], np.float16).reshape(4, 16)
    np.testing.assert_allclose(found, states.numpy(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("dx", "dy", "score"), [(0, 0, 0.0), (1, 0, 1.0), (3, 4, 5.0), (12, 5, 13.0)])
def test_motion_score_is_pixels_per_frame(dx: int, dy: int, score: float) -> None:
    scene = torch.rand(1, 3, 60, 90, generator=torch.Generator().manual_seed(0))
    scene = torch.nn.functional.interpolate(scene, scale_factor=8, mode="bicubic")[0].clamp(0, 1).permute(1, 2, 0)
    frames = [scene[100 + dy * n : 400 + dy * n, 100 + dx * n : 580 + dx * n] for n in range(3)]
    found = motion_score((torch.stack(frames) * 255).to(torch.uint8))
    assert found == pytest.approx(score, rel=0.1, abs=0.01)


def test_one_frame_does_not_move() -> None:
    assert motion_score(torch.zeros(1, 16, 16, 3, dtype=torch.uint8)) == 0.0
