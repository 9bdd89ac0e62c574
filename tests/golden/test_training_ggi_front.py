"""Frames, the flow network's input and HED edges against recorded vectors, and the names of the released weights."""

import json
import re
from typing import Any

import numpy as np
import pytest
import torch
import vectors as golden
from torch import nn
from torchvision.models.optical_flow import raft_large
from vectors import KEYS_DIR, Vectors

from training_ggi.models.edges import HED, annotator_size, fuse_maps, hed_edges
from training_ggi.models.frames import crop_clip, normalise, resize_antialiased, resize_frame, resized_size
from training_ggi.models.raft import half_size

TRAINER = "training_ggi"


def number(tolerance: Any) -> float:
    """The first number of a tolerance that is a sentence."""
    return float(re.findall(r"\d+(?:\.\d*)?(?:e-?\d+)?", str(tolerance))[0])


def sizes(text: str) -> tuple[int, int]:
    height, width = text.split("x")
    return int(height), int(width)


# Frames


@golden.by_case(TRAINER, "clip_preprocess*.safetensors", r"(.+)/frames_u8")
def test_clip(vectors: Vectors, case: str) -> None:
    config, frames = vectors.header["cases"][case], vectors[f"{case}/frames_u8"]
    crop, offset = (config["height"], config["width"]), config["crop_top_left"]
    resized = resized_size((config["in_h"], config["in_w"]), crop)
    assert list(resized) == config["resized"]
    kept = np.stack([resize_frame(frame.permute(1, 2, 0).numpy(), crop) for frame in frames])
    actual, expected = normalise(crop_clip(kept, *offset, crop)), vectors[f"{case}/video"]

    levels = resize_antialiased(frames.double(), resized).movedim(1, -1)
    levels = crop_clip(levels, *offset, crop).movedim(-1, 1)
    is_tie = (levels - levels.round()).abs() < 1e-3
    allowed = torch.where(is_tie, 2 / 255 + 1e-6, number(vectors.header["tolerance"]))
    assert actual.dtype == torch.float32 and actual.shape == expected.shape
    assert ((actual - expected).abs() <= allowed).all()


@golden.by_file(TRAINER, "flow_input_resize*.safetensors")
def test_resized_sizes(vectors: Vectors) -> None:
    tables = {name: table for name, table in vectors.header.items() if name.startswith("resize_table_")}
    if not tables:
        pytest.skip("no table of sizes in this file")
    for name, table in tables.items():
        actual = {source: list(resized_size(sizes(source), sizes(name.rsplit("_", 1)[1]))) for source in table}
        assert actual == table


@golden.by_case(TRAINER, "flow_input_resize*.safetensors", r"(.+)/frames")
def test_flow_input(vectors: Vectors, case: str) -> None:
    vectors.check_within(f"{case}/half", half_size(vectors[f"{case}/frames"]), number(vectors.header["tolerance"]))


# HED


def hashed_hed(rule: str) -> HED:
    """HED with the weights that the header states as an integer hash: of the tensor's and the element's number."""
    found = re.search(r"z0=i\+(\d+)\*\(j\+1\)\+(\d+)", rule)
    assert found, rule
    factor, offset = int(found[1]), int(found[2])
    hed = HED()
    for number_of_tensor, (name, tensor) in enumerate(hed.state_dict().items()):
        z = np.arange(tensor.numel(), dtype=np.uint64) + np.uint64(factor * (number_of_tensor + 1) + offset)
        z *= np.uint64(0x9E3779B97F4A7C15)
        z ^= z >> np.uint64(30)
        z *= np.uint64(0xBF58476D1CE4E5B9)
        z ^= z >> np.uint64(27)
        z *= np.uint64(0x94D049BB133111EB)
        z ^= z >> np.uint64(31)
        u = (z >> np.uint64(40)).astype(np.float64) / 2**23 - 1
        if name == "norm":
            values = 120 + 10 * u
        elif name.endswith("bias"):
            values = 0.1 * np.sqrt(2) * u
        else:
            values = u * np.sqrt(6 / np.prod(tensor.shape[1:]))
        tensor.copy_(torch.from_numpy(values.astype(np.float32)).view_as(tensor))
    return hed.eval().requires_grad_(False)


@golden.by_file(TRAINER, "hed_edge*.safetensors")
def test_hed(vectors: Vectors) -> None:
    hed, image, tolerance = hashed_hed(vectors.header["weights"]), vectors["image_u8"], vectors.header["tolerance"]
    size = (image.shape[1], image.shape[2])
    maps = hed(image[None].float())
    for index, actual in enumerate(maps, start=1):
        name = f"projection{index}"
        vectors.check_within(
            name, actual[0, 0], number(tolerance["projections"].split()[1]) * vectors[name].std().item()
        )
    vectors.check_within("edge_u8", fuse_maps(maps, size)[0], number(tolerance["edge_u8"]))
    if annotator_size(size, min(size)) == size:
        edges = hed_edges(hed, image.movedim(0, -1)[None], detect_resolution=min(size))
        vectors.check_within("edge_u8", edges[0], number(tolerance["edge_u8"]))


@golden.by_file(TRAINER, "hed_edge*.safetensors")
def test_fused_maps(vectors: Vectors) -> None:
    given = vectors.under("post/")
    height, width = given["edge_u8"].shape
    maps = [given[name][None, None] for name in sorted(given) if name.startswith("map")]
    vectors.check_within(
        "post/edge_u8", fuse_maps(maps, (height, width))[0], number(vectors.header["tolerance"]["post"])
    )


@golden.by_file(TRAINER, "hed_edge*.safetensors")
def test_annotator_sizes(vectors: Vectors) -> None:
    for case, expected in vectors.header["input_size_table"].items():
        source, resolution = case.split("@")
        assert list(annotator_size(sizes(source), int(resolution))) == expected, case


# Names and shapes of the released weights


@pytest.mark.parametrize(("name", "network"), [("ggi_hed_annotator", HED), ("ggi_raft_large", raft_large)])
def test_names_and_sizes(name: str, network: type[nn.Module]) -> None:
    path = KEYS_DIR / f"{name}.json"
    if not path.is_file():
        pytest.skip(f"no list of keys {path}")
    with torch.device("meta"):
        actual = {key: list(tensor.shape) for key, tensor in network().state_dict().items()}
    assert actual == json.loads(path.read_text())
