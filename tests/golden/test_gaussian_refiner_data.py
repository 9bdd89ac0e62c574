"""The refiner's data against recorded vectors: buckets, windows, normalisation, hold-out split, bucket batches."""

import hashlib
import io
import json
import os
import re
from pathlib import Path

import numpy as np
import PIL
import pytest
from PIL import Image
from safetensors import safe_open

from gaussian_refiner.data import BUCKETS, Pair, bucket_batches, choose_bucket, load_crops, normalise, read_pairs

GOLDEN_DIR = Path(os.environ.get("GOLDEN_DIR") or Path(__file__).resolve().parents[3] / "shared" / "golden")
FOLDER = GOLDEN_DIR / "gaussian_refiner"
FILES = sorted(FOLDER.glob("dataset_transform*.safetensors"))


def read_header(path: Path) -> dict:
    with safe_open(path, "np") as file:
        header = file.metadata()
    return {key: json.loads(text) if text[:1] in "{[" else text for key, text in header.items()}


def read_tensor(path: Path, key: str) -> np.ndarray:
    with safe_open(path, "np") as file:
        return file.get_tensor(key)


def cases(pattern: str) -> list:
    """A test parameter (path, prefix) for every tensor name that `pattern` fits, its first group being the prefix."""
    found = []
    for path in FILES:
        with safe_open(path, "np") as file:
            fits = [re.fullmatch(pattern, key) for key in file.keys()]
        prefixes = sorted((fit[1] for fit in fits if fit), key=lambda p: [int(n) for n in re.findall(r"\d+", p)])
        found += [pytest.param(path, prefix, id=f"{path.stem}-{prefix}") for prefix in prefixes]
    reason = f"no dataset_transform*.safetensors with {pattern} in {FOLDER}; set GOLDEN_DIR"
    return found or [pytest.param(None, None, marks=pytest.mark.skip(reason=reason))]


def decode(png: np.ndarray) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png.tobytes())))


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


@pytest.mark.parametrize(("path", "case"), cases(r"(.+)\.in\.render_png"))
def test_windows(path, case, tmp_path):
    header = read_header(path)
    crop_difference, row_difference = tolerances(header)
    files = {}
    for key in ("render", "gt", "cond"):
        files[key] = tmp_path / f"{key}.png"
        files[key].write_bytes(read_tensor(path, f"{case}.in.{key}_png").tobytes())
    width, height = Image.open(files["render"]).size
    bucket = choose_bucket(width, height)
    crops = load_crops(Pair("case", **files), BUCKETS[bucket], int(read_tensor(path, f"{case}.in.rand_x")[0]))

    record = header["config"]["samples"][int(re.search(r"\d+", case)[0])]
    assert bucket == record["bucket"]
    first_row = int(re.search(r"rows (\d+)\.\.\d+", header["notes"])[1])
    for key, crop in crops.items():
        expected = decode(read_tensor(path, f"{case}.out.{key}_crop_png"))
        assert crop.shape == expected.shape, key
        assert np.abs(crop.astype(int) - expected).max() <= crop_difference, key
        if crop_difference == 0:
            assert hashlib.sha256(crop.tobytes()).hexdigest() == record[f"{key}_sha256_hwc_u8"], key
        rows = read_tensor(path, f"{case}.out.{key}_rows")  # (3, rows, H)
        actual = normalise(crop)
        assert list(actual.shape) == record["shape"] and actual.dtype == rows.dtype, key
        actual = actual[:, first_row : first_row + rows.shape[1]]
        np.testing.assert_allclose(actual, rows, rtol=0, atol=row_difference, err_msg=key)


@pytest.mark.parametrize(("path", "case"), cases(r"(.+)\.in\.sizes_wh"))
def test_bucket_choice(path, case):
    assert {key: list(size) for key, size in BUCKETS.items()} == read_header(path)["config"]["buckets_wh"]
    sizes = read_tensor(path, f"{case}.in.sizes_wh")
    actual = [list(BUCKETS).index(choose_bucket(width, height)) for width, height in sizes.tolist()]
    assert actual == read_tensor(path, f"{case}.out.index").tolist()


@pytest.mark.parametrize(("path", "case"), cases(r"(.+\.out\.drop_last_(?:true|false))"))
def test_bucket_batches(path, case):
    batches, _, drop_last = re.fullmatch(r"(.+)\.out\.(drop_last)_(true|false)", case).groups()
    order = read_tensor(path, f"{batches}.in.order").tolist()
    bucket_of_index = read_tensor(path, f"{batches}.in.bucket_of_index").tolist()
    recorded = read_tensor(path, case)  # (N, batch size), short batches filled up with -1
    expected = [[index for index in row if index >= 0] for row in recorded.tolist()]
    assert recorded.shape[1] == read_header(path)["config"]["batch_size_for_batches"]
    for _ in range(2):  # nothing may be left over between calls
        assert bucket_batches(order, bucket_of_index, recorded.shape[1], drop_last == "true") == expected


@pytest.mark.parametrize(
    "path", FILES or [pytest.param(None, marks=pytest.mark.skip(reason=f"no vectors in {FOLDER}"))]
)
def test_hold_out_split(path, tmp_path):
    split = read_header(path)["config"]["split"]
    names = [f"{number}.png" for number in range(split["n_total"])]
    for name in names:
        (tmp_path / name).touch()
    (tmp_path / "list.json").write_text(json.dumps({"render": names, "gt": names, "cond": names}))
    pairs = read_pairs(tmp_path / "list.json")
    assert [pair.render.name for pair in pairs.train] == names[: split["n_train"]]
    assert [pair.render.name for pair in pairs.validation] == names[split["n_train"] :]
