"""Records, reader order, captions and loader batches against what the original wrote and read."""

import base64
import json
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from vectors import GOLDEN_DIR

from diffnext.data.annotations import parse_annotation
from diffnext.data.flex_loaders import FeatureDataLoader
from diffnext.data.reader import reader_order, starved_partitions
from diffnext.data.records import RecordDataset, RecordWriter, canonical, decode, encode

ROOT = GOLDEN_DIR / "diffnext"


def cases_of(pattern: str, key: str | None = None) -> Any:
    """Parametrise over the JSON files of one kind, or over the entries of a list in them."""
    found = []
    for path in sorted(ROOT.glob(pattern)):
        content = json.loads(path.read_text("utf-8"))
        if key is None:
            found.append(pytest.param(path, content, id=path.stem))
        else:
            found += [pytest.param(path, case, id=f"{path.stem}-{i}") for i, case in enumerate(content.get(key, []))]
    reason = f"no vectors {pattern} in {ROOT}: set GOLDEN_DIR"
    absent = pytest.param(None, None, marks=pytest.mark.skip(reason=reason), id="absent")
    return pytest.mark.parametrize(("path", "case"), found or [absent])


def plain(value: Any) -> Any:
    """With bytes instead of their base64 text."""
    if isinstance(value, dict):
        if "__bytes_b64__" in value:
            return base64.b64decode(value["__bytes_b64__"])
        return {key: plain(inner) for key, inner in value.items()}
    return [plain(inner) for inner in value] if isinstance(value, list) else value


@cases_of("records/*.expected.json")
def test_reading(path: Path, case: dict) -> None:
    dataset = RecordDataset(path.with_name(path.name.split(".")[0]))
    assert list(dataset) == plain(case["expected_decoded"])
    assert [dataset[i] for i in reversed(range(len(dataset)))] == plain(case["expected_decoded"])[::-1]
    assert len(dataset) == case["num_examples"]
    for name in dataset.features:
        assert [bytes_of(dataset.fields(i, (name,))) for i in range(len(dataset))] == [
            {name: example[name]} for example in plain(case["expected_decoded"])
        ]


def bytes_of(value: Any) -> Any:
    """With copies instead of views."""
    if isinstance(value, dict):
        return {key: bytes_of(inner) for key, inner in value.items()}
    return bytes(value) if isinstance(value, memoryview) else value


@cases_of("records/*.expected.json")
def test_writing_byte_for_byte(path: Path, case: dict, tmp_path: Path) -> None:
    with RecordWriter(tmp_path, plain(case["input_features"]), **case["writer_kwargs"]) as writer:
        for example in plain(case["examples_in"]):
            writer.write(example)
    folder = path.with_name(path.name.split(".")[0])
    written = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    assert {name: len(content) for name, content in written.items()} == case["files"]
    assert written == {file.name: file.read_bytes() for file in folder.iterdir()}
    assert [[name, written[name].decode().splitlines()] for name, _ in case["index_lines"]] == case["index_lines"]


@cases_of("records/message_bytes*.json")
def test_messages(path: Path, case: dict) -> None:
    features = canonical(case["features"])
    for entry in case["cases"]:
        example, message = plain(entry["example"]), bytes.fromhex(entry["hex"])
        assert encode(example, features) == message
        decoded = decode(message, features)
        assert list(decoded) == list(features)
        if {} not in example.values():  # which is read as a dict of empty values
            assert encode({name: decoded[name] for name in example}, features) == message


@cases_of("records/reader_order*.json", "cases")
def test_reader_order(path: Path, case: dict) -> None:
    case = dict(case)
    if case.pop("kind", None) == "starved_partitions":
        assert starved_partitions(case["size"], case["num_partitions"]) == case["failing_partition_ids"]
        return
    order, error = case.pop("order"), case.pop("error")
    assert error is None
    assert list(islice(reader_order(**case), len(order))) == order


def choose(case: dict, caption: Any, text: Any) -> tuple[Any, int]:
    """The text that is chosen with the recorded draw, and how many draws it took."""
    draws = [] if case["draw"] is None else [case["draw"]]
    drawn: list[float] = []
    chosen = parse_annotation(caption, text, case.get("label_in"), lambda: drawn.append(draws[0]) or draws[0])
    return chosen, len(drawn)


@cases_of("annotations*.json", "cases")
def test_captions(path: Path, case: dict) -> None:
    assert choose(case, case["caption"], case["text"]) == (case["chosen"], case["draw"] is not None)


@cases_of("annotations*.json", "cached")
def test_encoded_captions(path: Path, case: dict) -> None:
    texts = {name: np.array(case[name], np.float16) for name in ("caption", "text")}
    caption, text = ({"data": value.tobytes(), "shape": list(value.shape)} for value in texts.values())
    chosen, num_draws = choose(case, caption, text)
    np.testing.assert_array_equal(chosen, texts[case["chosen"]], strict=True)
    assert num_draws == (case["draw"] is not None)


@cases_of("loader_batches*.json", "cases")
def test_loader_batches(path: Path, case: dict) -> None:
    folder = path.parent / "records" / case["dataset"]
    dataset = RecordDataset(folder)
    loader = FeatureDataLoader(folder, **case["kwargs"])
    for expected in case["batches"]:
        (batch,) = next(loader)
        assert sorted(batch) == expected["keys"]
        assert list(batch["latents"].shape) == expected["latents_shape"]
        assert str(batch["latents"].dtype) == expected["latents_dtype"]
        moments = [dataset[i]["moments"] for i in expected["example_ids"]]
        assert [latents.tobytes() for latents in batch["latents"]] == moments
        assert batch["prompt"] == expected["prompt"]
        assert batch.get("motion_flow") == expected["motion_flow"]
