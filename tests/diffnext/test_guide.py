"""The guide's snippets run as they stand: only paths, the device and the size of the clip are replaced."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_vaes import write_image_vae, write_video_vae

from common.video import write_video
from diffnext.data.dataset import Records
from diffnext.data.records import RecordDataset

README = Path(__file__).parents[2] / "diffnext" / "README.md"
NUM_RECORDS = 16
FEATURES = {"moments": "BYTES", "caption": "STRING", "text": "STRING", "shape": ["INT64"]}


def snippets() -> dict[str, str]:
    """The guide's Python blocks by their headings."""
    return dict(re.findall(r"^### ([^\n]+)\n[^#`]*```python\n(.*?)^```", README.read_text("utf-8"), re.M | re.S))


def run(snippet: str, replacements: dict[str, str]) -> None:
    """Executes a snippet, in which each text to be replaced must occur."""
    if not torch.cuda.is_available():
        replacements = {**replacements, 'torch.device("cuda")': 'torch.device("cpu")'}
    for old, new in replacements.items():
        assert old in snippet, old
        snippet = snippet.replace(old, new)
    exec(compile(snippet, str(README), "exec"), {})


def check_records(folder: Path, shape: list[int], features: dict, extra: dict) -> np.ndarray:
    """Compares a cache, byte counts and descriptor included, and returns the moments of the first record."""
    assert sorted(path.name for path in folder.iterdir()) == ["00000.data", "00000.index", "METADATA"]
    metadata = {"entries": NUM_RECORDS, "features": features, "version": 1}
    assert json.loads((folder / "METADATA").read_text()) == metadata
    records = RecordDataset(folder)
    assert len(records) == NUM_RECORDS
    for number in range(NUM_RECORDS):
        record = records[number]
        assert {name: value for name, value in record.items() if name != "moments"} == {
            "caption": "long caption",
            "text": "short text",
            "shape": shape,
            **extra,
        }
        assert bytes(record["moments"]) == bytes(records[0]["moments"])
    moments = np.frombuffer(records[0]["moments"], np.float16)
    assert moments.nbytes == 2 * int(np.prod(shape)) and np.isfinite(moments).all()
    Records(
        (str(folder),),
        latent_channels=4,
        latent_size=(shape[-2], shape[-1]),
        text_token_dim=32,
        text_token_len=8,
        needs_flow=len(shape) == 4,
    ).check()  # training takes it
    return moments.reshape(shape)


def test_the_guide_has_the_two_snippets() -> None:
    assert list(snippets()) == ["Build T2I cache", "Build T2V cache"]


def test_t2i_snippet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    vae = write_image_vae(tmp_path / "nova" / "vae")
    pixels = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    run(
        snippets()["Build T2I cache"],
        {"/path/to/nova-d48w1024-sdxl1024/vae": "nova/vae", "./assets/sample_image.jpg": "image.png"},
    )
    moments = check_records(tmp_path / "img_dataset", [8, 6, 8], FEATURES, {})
    x = torch.from_numpy(pixels).permute(2, 0, 1)[None] / 127.5 - 1  # (1, 3, H, W)
    with torch.no_grad():
        expected = vae.encode(x).latent_dist.parameters[0].numpy()
    assert np.abs(moments - expected).max() < 0.02 * np.abs(expected).max()


def test_t2v_snippet_at_64_x_96_px(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With all its 33 frames, but smaller: 480 x 768 px take minutes on a CPU."""
    pytest.importorskip("decord", reason="the snippet reads clips with decord")
    monkeypatch.chdir(tmp_path)
    write_video_vae(tmp_path / "nova" / "vae")
    ramp = np.linspace(0, 255, 65)[:, None, None, None] + np.zeros((65, 80, 128, 3))
    write_video("clip.mp4", ramp.round().astype(np.uint8), 24)
    run(
        snippets()["Build T2V cache"],
        {
            "/path/to/nova-d48w1024-osp480/vae": "nova/vae",
            "./assets/sample_video.mp4": "clip.mp4",
            "480, (480, 768)": "64, (64, 96)",
        },
    )
    check_records(tmp_path / "vid_dataset", [8, 9, 8, 12], {**FEATURES, "flow": "FLOAT32"}, {"flow": 5.0})
