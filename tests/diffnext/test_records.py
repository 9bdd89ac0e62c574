"""Writing and reading records: the guide's snippets, the format's corners, damage."""

import json
import math
import multiprocessing
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from diffnext.data import records
from diffnext.data.records import RecordDataset, RecordWriter, canonical, decode, encode

QUICK = settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
FEATURES = {"n": "int", "name": "string"}


def write(folder: Path, count: int, **options: Any) -> Path:
    folder.mkdir(exist_ok=True)
    with RecordWriter(folder, dict(FEATURES), **options) as writer:
        for n in range(count):
            writer.write({"n": n, "name": f"name {n}"})
    return folder


# Writing


def test_the_guides_snippet(tmp_path: Path) -> None:
    from diffnext.data import records as codewithgpu  # the one line that changes

    features = {"moments": "bytes", "caption": "string", "text": "string", "shape": ["int64"], "flow": "float64"}
    writer = codewithgpu.RecordWriter(str(tmp_path), features)
    x = torch.zeros(8, 2, 2, dtype=torch.float16).numpy()
    example = {"caption": "long caption", "text": "short text", "flow": 5}
    [writer.write({"shape": x.shape, "moments": x.tobytes(), **example}) for _ in range(16)]
    writer.close()
    assert (tmp_path / "METADATA").read_text() == (
        '{\n  "entries": 16,\n  "features": {\n    "moments": "BYTES",\n    "caption": "STRING",\n'
        '    "text": "STRING",\n    "shape": [\n      "INT64"\n    ],\n    "flow": "FLOAT32"\n  },\n  "version": 1\n}'
    )
    assert (tmp_path / "00000.index").read_text().startswith("0 168\n168 168\n336 168\n")
    dataset = codewithgpu.RecordDataset(str(tmp_path))
    assert dataset.size == len(dataset) == 16
    assert dataset[15] == {"moments": bytes(64), "shape": [8, 2, 2], **example}
    assert codewithgpu.DatasetReader.__name__ == "DatasetReader"


def test_the_descriptor_becomes_canonical_in_place(tmp_path: Path) -> None:
    features = {"a": "Int32", "b": ["float64"], "c": {"d": [["FLOAT"]]}}
    RecordWriter(tmp_path, features).close()
    assert features == {"a": "INT64", "b": ["FLOAT32"], "c": {"d": [["FLOAT32"]]}}
    assert list(tmp_path.iterdir()) == []  # there was no example


@pytest.mark.parametrize("kind", ["double", "", None, [], ["int", "int"], ("int",), {"a": "uint8"}])
def test_unknown_types(tmp_path: Path, kind: object) -> None:
    with pytest.raises(
        AttributeError, match=r"is no feature type; there are bytes, string, float, float32, float64, int"
    ):
        RecordWriter(tmp_path, {"x": kind})


@pytest.mark.parametrize(
    ("example", "error", "text"),
    [
        ({"shap": [1]}, KeyError, "shap is not declared; the features are i, f, s, b, shape, m"),
        ({"m": {"y": 1}}, KeyError, "m.y is not declared; the features are x"),
        ({"i": 1.5}, TypeError, "feature i is declared as INT64; float 1.5 does not fit"),
        ({"i": None}, TypeError, "feature i is declared as INT64; NoneType None does not fit"),
        ({"i": 2**63}, ValueError, "feature i: 9223372036854775808 does not fit 64 bits"),
        ({"f": "1"}, TypeError, "feature f is declared as FLOAT32; str '1' does not fit"),
        ({"s": b"x"}, TypeError, "feature s is declared as STRING; bytes b'x' does not fit"),
        ({"b": "x"}, TypeError, "feature b is declared as BYTES; str 'x' does not fit"),
        ({"shape": torch.zeros(1).numpy()}, TypeError, "ndarray array([0.], dtype=float32) does not fit; give a list"),
        ({"shape": [1, "2"]}, TypeError, "feature shape[] is declared as INT64; str '2' does not fit"),
        ({"m": 3}, TypeError, "feature m is declared as {'x': 'INT64'}; int 3 does not fit"),
        ({"i": [1]}, TypeError, "feature i is declared as INT64; list [1] does not fit"),
        ({"s": "\ud800"}, ValueError, "surrogates not allowed"),
    ],
)
def test_what_does_not_fit_is_not_written(tmp_path: Path, example: dict, error: type, text: str) -> None:
    features = {"i": "int", "f": "float", "s": "string", "b": "bytes", "shape": ["int"], "m": {"x": "int"}}
    with RecordWriter(tmp_path, features) as writer:
        writer.write({"i": 1})
        with pytest.raises(error, match=re.escape(text)):
            writer.write(example)
        writer.write({"i": 2})
    assert [example["i"] for example in RecordDataset(tmp_path)] == [1, 2]


def test_float32_is_what_comes_back() -> None:
    features = canonical({"f": "float64"})
    values = [0.1, 16777217, 1e-46, 1e39, -math.inf, 3.4028234e38, True, torch.tensor(2.5)]
    read = [decode(encode({"f": value}, features), features)["f"] for value in values]
    assert read == [0.10000000149011612, 16777216.0, 0.0, math.inf, -math.inf, 3.4028234663852886e38, 1.0, 2.5]
    assert math.isnan(decode(encode({"f": math.nan}, features), features)["f"])


def test_shards(tmp_path: Path) -> None:
    write(tmp_path, 5, max_examples=2, zfill_width=2)
    names = ["00.data", "00.index", "01.data", "01.index", "02.data", "02.index", "METADATA"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert (tmp_path / "01.index").read_text() == "0 27\n27 27\n"
    assert [example["n"] for example in RecordDataset(tmp_path)] == [0, 1, 2, 3, 4]


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    write(tmp_path, 1)
    writer = RecordWriter(tmp_path, dict(FEATURES))
    with pytest.raises(ValueError, match=r"File .*00000\.data existed\. Write into an empty folder"):
        writer.write({"n": 1})
    writer.close()
    writer.close()
    assert len(RecordDataset(tmp_path)) == 1
    with pytest.raises(RuntimeError, match="Writer has been closed"):
        writer.write({"n": 1})


# Reading


def test_the_cursor(tmp_path: Path) -> None:
    dataset = RecordDataset(write(tmp_path, 3))
    assert next(dataset)["n"] == 0 and dataset.tell() == 1
    assert dataset[-1] == {"n": 2, "name": "name 2"} and dataset.tell() == 3
    with pytest.raises(StopIteration):
        dataset.read()
    dataset.seek(1)
    assert dataset.read()["n"] == 1
    dataset.reset()
    dataset.close()
    assert [example["n"] for example in dataset] == [0, 1, 2]
    with pytest.raises(IndexError, match="has 3 records, none with number 3"):
        dataset[3]


def test_some_features_as_views(tmp_path: Path) -> None:
    with RecordWriter(tmp_path, {"data": "bytes", "n": "int", "inner": {"data": "bytes"}}) as writer:
        writer.write({"data": b"abc", "n": -7, "inner": {"data": b"d"}})
        writer.write({})
    dataset = RecordDataset(tmp_path)
    fields = dataset.fields(0, ["n", "data", "inner"])
    assert fields == {"n": -7, "data": b"abc", "inner": {"data": b"d"}}
    assert isinstance(fields["data"], memoryview) and isinstance(fields["inner"]["data"], memoryview)
    assert dataset.fields(1, ["data"]) == {"data": b""}
    assert dataset[1] == {"data": b"", "n": 0, "inner": {"data": b""}}
    assert dataset.tell() == 2


def test_no_more_files_are_open_than_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "MAX_MAPPED_SHARDS", 2)
    dataset = RecordDataset(write(tmp_path, 6, max_examples=1))
    views = [dataset.fields(i, ["name"]) for i in (0, 1, 2, 3, 4, 5, 0)]
    assert [view["name"] for view in views] == [f"name {i}" for i in (0, 1, 2, 3, 4, 5, 0)]
    assert len(dataset._maps) == 2


def _first_n(dataset: RecordDataset, queue: Any) -> None:
    queue.put([dataset[i]["n"] for i in range(len(dataset))])


def test_other_processes(tmp_path: Path) -> None:
    dataset = RecordDataset(write(tmp_path, 4, max_examples=2))
    dataset[0]
    assert pickle.loads(pickle.dumps(dataset))[3]["n"] == 3
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    process = context.Process(target=_first_n, args=(dataset, queue))
    process.start()
    assert queue.get(timeout=30) == [0, 1, 2, 3]
    process.join()
    assert dataset[2]["n"] == 2


# Damage


@pytest.mark.parametrize(
    ("name", "content", "text"),
    [
        ("METADATA", b"{", "METADATA is damaged: JSONDecodeError"),
        ("METADATA", b"[]", "METADATA is damaged: TypeError"),
        ("METADATA", b'{"entries": 3, "version": 1}', "METADATA is damaged: KeyError: 'features'"),
        (
            "METADATA",
            b'{"entries": 3, "features": {}, "version": 2}',
            "METADATA is damaged: ValueError: version 2, not 1",
        ),
        ("METADATA", b'{"entries": -1, "features": {}, "version": 1}', "METADATA is damaged: ValueError: entries -1"),
        ("METADATA", b'{"entries": 3, "features": {"n": "X"}, "version": 1}', "'X' is no feature type"),
        ("METADATA", b"[" * 100_000, "METADATA is damaged: RecursionError"),
        ("00000.index", b"0 28\n28 x\n", "00000.index is damaged: line 2 is b'28 x', not an offset and a length"),
        (
            "00000.index",
            b"0 28\n",
            r"Mismatched number of indices and entries: METADATA of .* says 3, its 1 .index files",
        ),
        ("00000.index", b"", "have 0 lines; a file is missing or cut off"),
    ],
)
def test_what_is_seen_at_once(tmp_path: Path, name: str, content: bytes, text: str) -> None:
    write(tmp_path, 3)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=text):
        RecordDataset(tmp_path)


def test_missing_files(tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match="nowhere is not a folder: a record data set is written by RecordWriter"
    ):
        RecordDataset(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="has no file METADATA: .* whose close\\(\\) writes METADATA"):
        RecordDataset(tmp_path)
    write(tmp_path, 3)
    (tmp_path / "00000.data").unlink()
    with pytest.raises(FileNotFoundError, match=r"00000\.data is missing, though there is its 00000\.index"):
        RecordDataset(tmp_path)


@pytest.mark.parametrize(
    ("message", "text"),
    [
        ("0b00", "byte 0 should begin a field 0x0a of at most 0 bytes, and begins 0x0b of 0 bytes"),
        ("0a", "it ends in the field at byte 0"),
        ("0a05", "byte 0 should begin a field 0x0a of at most 0 bytes, and begins 0x0a of 5 bytes"),
        ("0a80", "a length does not end before byte 2"),
        ("0a808080808001", "a length does not end before byte 6"),
        ("0a060a01611203150000", "byte 5 should begin a field 0x12 of at most 1 bytes, and begins 0x12 of 3 bytes"),
        ("0a080a016112031500000000", "150000 is not an INT64"),
        ("0a080a0161120318ac82", "18ac82 is not an INT64"),
        ("0a080a01611203180100", "180100 is not an INT64"),
        ("0a090a0166120415000000", "byte 7 does not begin a FLOAT32"),
        ("0a080a017312030a01ff", "text at byte 9 is not UTF-8 (invalid start byte)"),
        ("0a090a017312040a016100", "a feature goes on after its value at byte 10"),
        ("0a080a016112021801" + "00", "an entry goes on after its value at byte 9"),
        ("0a050a01ff1200", "text at byte 4 is not UTF-8"),
    ],
)
def test_messages_that_are_none(message: str, text: str) -> None:
    features = canonical({"a": "int", "f": "float", "s": "string"})
    with pytest.raises(ValueError, match=re.escape(text)):
        decode(bytes.fromhex(message), features)


def test_a_damaged_record_is_named(tmp_path: Path) -> None:
    write(tmp_path, 4, max_examples=2)
    path = tmp_path / "00001.data"
    content = bytearray(path.read_bytes())
    content[27] = 0xFF
    path.write_bytes(content[:-1])
    dataset = RecordDataset(tmp_path)
    assert dataset[2]["n"] == 2
    with pytest.raises(
        ValueError, match=r"00001\.data: record 3 \(bytes 27 to 54\): the file ends at byte 53: it is cut"
    ):
        dataset[3]
    path.write_bytes(content)
    dataset.close()
    with pytest.raises(ValueError, match=r"00001\.data: record 3 \(bytes 27 to 54\): byte 0 should begin a field 0x0a"):
        dataset[3]
    path.write_bytes(b"")
    dataset.close()
    with pytest.raises(ValueError, match="the file ends at byte 0"):
        dataset[2]


# Anything


TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=140)
SCALARS = {
    "int64": st.integers(-(2**63), 2**63 - 1),
    "float32": st.floats(width=32, allow_nan=False),
    "string": TEXTS,
    "bytes": st.binary(max_size=300),
}


def values_of(kind: Any) -> st.SearchStrategy:
    if isinstance(kind, list):
        return st.lists(values_of(kind[0]), max_size=4)
    if isinstance(kind, dict):
        return st.fixed_dictionaries({name: values_of(inner) for name, inner in kind.items()})
    return SCALARS[kind]


KINDS = st.recursive(
    st.sampled_from(list(SCALARS)),
    lambda inner: st.lists(inner, min_size=1, max_size=1) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=5,
)


@QUICK
@given(data=st.data(), features=st.dictionaries(TEXTS, KINDS, max_size=4))
def test_what_is_written_is_read(data: st.DataObject, features: dict) -> None:
    example = data.draw(values_of(features))
    canonical(features)
    message = encode(example, features)
    assert decode(message, features) == example
    assert decode(memoryview(message), features, views=True) == example
    for name in features:
        assert decode(message, features, [name]) == {name: example[name]}
    given = data.draw(st.sets(st.sampled_from(list(features)))) if features else set()
    partial = decode(encode({name: example[name] for name in given}, features), features)
    assert {name: partial[name] for name in given} == {name: example[name] for name in given}


@QUICK
@given(data=st.data())
def test_any_damage_is_a_value_error(tmp_path: Path, data: st.DataObject) -> None:
    folder = tmp_path / "set"
    for path in folder.glob("*"):
        path.unlink()
    folder.mkdir(exist_ok=True)
    features = {"moments": "bytes", "shape": ["int"], "caption": {"data": "bytes", "shape": ["int"]}, "flow": "float"}
    with RecordWriter(folder, features, max_examples=2) as writer:
        for n in range(3):
            caption = {"data": bytes(n), "shape": [n, 200]}
            writer.write({"shape": (8, 200, n), "moments": bytes(200), "caption": caption, "flow": n})
    names = ["METADATA", "00000.data", "00000.index", "00001.data", "00001.index"]
    path = folder / data.draw(st.sampled_from(names))
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(0, len(content)) | st.just(len(content)))])
    try:
        dataset = RecordDataset(folder)
    except ValueError as error:
        assert str(folder) in str(error)
        return
    for index in range(len(dataset)):
        dataset.prefetch(index)
        for read in (lambda index: dataset[index], lambda index: dataset.fields(index, list(dataset.features)[:2])):
            try:
                read(index)
            except ValueError as error:
                assert f": record {index} (bytes " in str(error)


@QUICK
@given(message=st.binary(max_size=60))
def test_any_bytes_as_a_message(message: bytes) -> None:
    features = canonical({"": "int", "a": ["float"], "b": {"a": [["string"]]}})
    try:
        example = decode(message, features)
    except ValueError:
        return
    assert list(example) == list(features)
    json.dumps(example)
