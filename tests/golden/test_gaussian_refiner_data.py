"""The refiner's data against recorded vectors: buckets, windows, normalisation, hold-out split, bucket batches."""

import hashlib
import io
import json
import re
from pathlib import Path

import numpy as np
import PIL
import pytest
import torch
import vectors as golden
from PIL import Image
from vectors import Vectors

from gaussian_refiner.data import BUCKETS, Pair, bucket_batches, choose_bucket, load_crops, normalise, read_pairs

TRAINER, FILES = "gaussian_refiner", "dataset_transform*.safetensors"


def png_bytes(png: torch.Tensor) -> bytes:
    return png.numpy().tobytes()


def tolerances(header: dict) -> tuple[int, float]:
    """Largest differences of crops (of 255) and of normalised values, by whether this is the recording Pillow."""
    texts = header["tolerance"]
    crop_text = next(text for key, text in texts.items() if "crop" in key)
    row_text = next(text for key, text in texts.items() if "rows" in key)
    crop_difference = int(re.search(r"max abs diff (\d+)", crop_text)[1])
    row_difference = float(re.search(r"atol ([\d.e-]+)", row_text)[1])
    if header["env"]["pillow"] == PIL.__version__ and crop_text.startswith("exact"):
        return 0, row_difference
    return crop_difference, row_difference + crop_difference / 127.5


@golden.by_case(TRAINER, FILES, r"(.+)\.in\.render_png")
def test_windows(vectors: Vectors, case: str, tmp_path: Path) -> None:
    header = vectors.header
    crop_difference, row_difference = tolerances(header)
    files = {}
    for key in ("render", "gt", "cond"):
        files[key] = tmp_path / f"{key}.png"
        files[key].write_bytes(png_bytes(vectors[f"{case}.in.{key}_png"]))
    width, height = Image.open(files["render"]).size
    bucket = choose_bucket(width, height)
    crops = load_crops(Pair("case", **files), BUCKETS[bucket], int(vectors[f"{case}.in.rand_x"][0]))

    record = header["config"]["samples"][int(re.search(r"\d+", case)[0])]
    assert bucket == record["bucket"]
    first_row = int(re.search(r"rows (\d+)\.\.\d+", header["notes"])[1])
    for key, crop in crops.items():
        expected = np.asarray(Image.open(io.BytesIO(png_bytes(vectors[f"{case}.out.{key}_crop_png"]))))
        assert crop.shape == expected.shape, key
        assert np.abs(crop.astype(int) - expected).max() <= crop_difference, key
        if crop_difference == 0:
            assert hashlib.sha256(crop.tobytes()).hexdigest() == record[f"{key}_sha256_hwc_u8"], key
        rows = vectors[f"{case}.out.{key}_rows"].numpy()  # (3, rows, H)
        actual = normalise(crop)
        assert list(actual.shape) == record["shape"] and actual.dtype == rows.dtype, key
        actual = actual[:, first_row : first_row + rows.shape[1]]
        np.testing.assert_allclose(actual, rows, rtol=0, atol=row_difference, err_msg=key)


@golden.by_case(TRAINER, FILES, r"(.+)\.in\.sizes_wh")
def test_bucket_choice(vectors: Vectors, case: str) -> None:
    assert {key: list(size) for key, size in BUCKETS.items()} == vectors.config["buckets_wh"]
    sizes = vectors[f"{case}.in.sizes_wh"]
    actual = [list(BUCKETS).index(choose_bucket(width, height)) for width, height in sizes.tolist()]
    assert actual == vectors[f"{case}.out.index"].tolist()


@golden.by_case(TRAINER, FILES, r"(.+\.out\.drop_last_(?:true|false))")
def test_bucket_batches(vectors: Vectors, case: str) -> None:
    batches, _, drop_last = re.fullmatch(r"(.+)\.out\.(drop_last)_(true|false)", case).groups()
    order = vectors[f"{batches}.in.order"].tolist()
    bucket_of_index = vectors[f"{batches}.in.bucket_of_index"].tolist()
    recorded = vectors[case]  # (N, batch size), short batches filled up with -1
    expected = [[index for index in row if index >= 0] for row in recorded.tolist()]
    assert recorded.shape[1] == vectors.config["batch_size_for_batches"]
    for _ in range(2):  # nothing may be left over between calls
        assert bucket_batches(order, bucket_of_index, recorded.shape[1], drop_last == "true") == expected


@golden.by_file(TRAINER, FILES)
def test_hold_out_split(vectors: Vectors, tmp_path: Path) -> None:
    split = vectors.config["split"]
    names = [f"{number}.png" for number in range(split["n_total"])]
    for name in names:
        (tmp_path / name).touch()
    (tmp_path / "list.json").write_text(json.dumps({"render": names, "gt": names, "cond": names}))
    if len(names) < 2:
        with pytest.raises(ValueError, match="which leaves none to train on: add items"):
            read_pairs(tmp_path / "list.json")
        return
    pairs, num_train = read_pairs(tmp_path / "list.json"), split["n_train"] or 1  # the original may have none
    assert [pair.render.name for pair in pairs.train] == names[:num_train]
    assert [pair.render.name for pair in pairs.validation] == names[num_train:]
