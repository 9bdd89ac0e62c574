"""What a training run reads of records: items, groups, checks; the original's loader and its starving ranks."""

import logging
import multiprocessing
import re
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from common.data import SampleLoader, SamplePlan
from diffnext.data.annotations import first_sentence, parse_annotation, parse_latents
from diffnext.data.dataset import PromptEmbed, Records
from diffnext.data.flex_loaders import FeatureDataLoader
from diffnext.data.reader import DatasetReader, check_partitions, reader_order
from diffnext.data.records import RecordDataset, RecordWriter

PLAIN = {"moments": "bytes", "caption": "string", "text": "string", "shape": ["int64"]}
ENCODED = {"data": "bytes", "shape": ["int64"]}


def moments(shape: Sequence[int], value: float = 0.0) -> dict[str, Any]:
    return {"shape": tuple(shape), "moments": np.full(shape, value, np.float16).tobytes()}


def write(folder: Path, examples: Sequence[dict[str, Any]], max_examples: int = 3, **features: Any) -> Path:
    folder.mkdir()
    with RecordWriter(folder, {**PLAIN, **features}, max_examples) as writer:
        for example in examples:
            writer.write(example)
    return folder


def images(folder: Path, count: int = 8) -> Path:
    texts = [{"caption": f"Long {i}. More", "text": f"short {i}"} for i in range(count)]
    return write(folder, [moments((8, 2, 3), i) | texts[i] for i in range(count)])


def encoded(values: np.ndarray) -> dict[str, Any]:
    return {"data": values.astype(np.float16).tobytes(), "shape": list(values.shape)}


class Draws:
    """A generator whose uniform draws are given."""

    def __init__(self, *values: float):
        self.values = list(values)

    def random(self) -> float:
        return self.values.pop(0)


# Items


def test_an_image(tmp_path: Path) -> None:
    records = Records(images(tmp_path / "set"), latent_channels=4)
    draws = Draws(0.49, 0.5)
    first, second = records.sample(3, draws), records.sample(4, draws)
    assert list(first) == ["moments", "prompt"]
    np.testing.assert_array_equal(first["moments"], np.full((8, 2, 3), 3, np.float16), strict=True)
    assert (first["prompt"], second["prompt"], draws.values) == ("short 3", "Long 4. More", [])
    assert len(records) == 8
    assert records.files_of(3) == [tmp_path / "set" / "00001.data"]
    with pytest.raises(IndexError, match="there are 8 items, none with number 8"):
        records.sample(8, draws)


def test_a_video_without_a_short_text(tmp_path: Path) -> None:
    folder = write(tmp_path / "set", [moments((8, 5, 2, 2)) | {"caption": "One. Two", "flow": 5}], flow="float64")
    records = Records(folder, latent_channels=4, needs_flow=True)
    sample = records.sample(0, Draws(0.1))
    assert (sample["prompt"], sample["flow"], sample["moments"].shape) == ("One.", 5.0, (8, 5, 2, 2))
    records.check()


def test_encoded_texts(tmp_path: Path) -> None:
    long, short = np.arange(8).reshape(2, 4), np.arange(4).reshape(1, 4)
    examples = [moments((8, 2, 2)) | {"caption": encoded(long), "text": encoded(text)} for text in (short, short[:0])]
    folder = write(tmp_path / "set", examples, caption=ENCODED, text=ENCODED)
    records = Records(folder, latent_channels=4, text_token_dim=4)
    draws = Draws(0.2, 0.9)
    embeds = [records.sample(index, draws)["prompt_embed"] for index in (0, 0, 1)]
    assert draws.values == [] and all(isinstance(embed, PromptEmbed) for embed in embeds)
    for embed, expected in zip(embeds, (short, long, long), strict=True):
        np.testing.assert_array_equal(embed.values, expected.astype(np.float16), strict=True)
    with pytest.raises(ValueError, match=r"record 0 .* shape \(2, 4\); the model takes at most 1 tokens of 4"):
        Records(folder, latent_channels=4, text_token_dim=4, text_token_len=1).sample(0, Draws(0.9))
    with pytest.raises(ValueError, match="at most 256 tokens of 2560"):
        Records(folder, latent_channels=4).check()


@pytest.mark.parametrize(
    ("example", "text"),
    [
        (
            moments((6, 2, 2)),
            "shape is (6, 2, 2), not (8, H, W) or (8, T, H, W): means and log variances of 4 channels",
        ),
        (moments((8, 4)), "shape is (8, 4), not (8, H, W)"),
        ({}, "shape is (), not (8, H, W)"),
        (
            moments((8, 2, 4)),
            "latents are 2 x 4, the model takes 2 x 2: encode images of the size in the model's image",
        ),
        (moments((8, 2, 2)) | {"moments": bytes(128)}, "moments has 128 bytes; float16 of shape (8, 2, 2) has 64"),
        (moments((8, 2, 2)) | {"shape": (8, -1, 2)}, "shape is (8, -1, 2), not"),
    ],
)
def test_a_record_that_does_not_fit(tmp_path: Path, example: dict, text: str) -> None:
    folder = write(tmp_path / "set", [moments((8, 2, 2)), example])
    records = Records(folder, latent_channels=4, latent_size=(2, 2))
    with pytest.raises(ValueError, match=r"set/00000\.data: record 1 \(bytes \d+ to \d+\): " + re.escape(text)):
        records.sample(1, Draws())
    with pytest.raises(ValueError, match=r"cannot be trained on:\n.*record 1 .*" + re.escape(text)):
        records.check()
    assert list(records.groups()) == [((8, 2, 2), False)] * 2


# Data sets


def test_groups(tmp_path: Path) -> None:
    shapes = [(8, 2, 3), (8, 3, 2), (8, 2, 3)]
    first = write(tmp_path / "images", [moments(shape) | {"caption": "c"} for shape in shapes])
    video = moments((8, 5, 2, 2)) | {"caption": "c", "flow": 1}
    second = write(tmp_path / "videos", [video, video], max_examples=1, flow="float32")
    records = Records(f"{first}, {second}", latent_channels=4, needs_flow=True)
    groups = [(shape, False) for shape in shapes] + [((8, 5, 2, 2), True)] * 2
    assert list(records.groups()) == groups and len(records.groups()) == 5
    assert records.files_of(4) == [second / "00001.data"]
    records.check()


def test_an_unreadable_record_is_grouped_with_most(tmp_path: Path) -> None:
    shapes = [(8, 1, 2), (8, 2, 2), (8, 2, 2)]
    folder = write(tmp_path / "set", [{"moments": b"x"}, *(moments(shape) for shape in shapes)])
    groups = [((8, 2, 2), False), *((shape, False) for shape in shapes)]
    assert list(Records(folder, latent_channels=4).groups()) == groups
    only = write(tmp_path / "bad", [{"moments": b"x"}])
    with pytest.raises(
        ValueError, match=r"no record can be read; the first: .*bad/00000.data: record 0 .*shape is \(\)"
    ):
        list(Records(only, latent_channels=4).groups())


class OneOfThree:
    """A process that reduces with what the others found."""

    num_processes, device = 3, torch.device("cpu")

    def __init__(self, process_index: int, others: Tensor):
        self.process_index, self.others = process_index, others

    def reduce(self, tensor: Tensor, reduction: str = "sum") -> Tensor:
        self.own = tensor
        return tensor + self.others


def test_processes_share_the_reading_for_groups(tmp_path: Path) -> None:
    shapes = [(8, 1 + i % 2, 2) for i in range(7)] + [(8, 5, 2, 2)]
    folder = write(tmp_path / "set", [moments(shape) for shape in shapes])
    records, found = Records(folder, latent_channels=4), torch.zeros(8, 3, dtype=torch.int32)
    for rank in range(3):
        process = OneOfThree(rank, torch.zeros(8, 3, dtype=torch.int32))
        list(records.groups(process))
        found += process.own
        assert process.own.any(1).nonzero().ravel().tolist() == [[0, 1], [2, 3, 4], [5, 6, 7]][rank]
    assert found.tolist() == [[0, 1 + i % 2, 2] for i in range(7)] + [[5, 2, 2]]
    mine = torch.zeros_like(found)
    mine[:2] = found[:2]
    assert list(records.groups(OneOfThree(0, found - mine))) == [(shape, False) for shape in shapes]


def loader_of(records: Records, folder: Path, num_workers: int) -> SampleLoader:
    plan = SamplePlan(len(records), 0, 4, records.groups())
    return SampleLoader(
        records,
        plan,
        micro_batch=4,
        rank=0,
        world_size=1,
        num_workers=num_workers,
        bad_samples_path=folder / "bad.jsonl",
        max_bad_fraction=0.5,
    )


@pytest.mark.parametrize("num_workers", [0, 1])
def test_through_the_loader(tmp_path: Path, num_workers: int) -> None:
    examples = [moments((8, 2 + i % 2, 2), i) | {"caption": f"{i}", "flow": i} for i in range(8)]
    folder = write(tmp_path / "set", examples, max_examples=2, flow="float32")
    with open(folder / "00003.data", "r+b") as file:
        file.truncate(file.seek(0, 2) - 10)  # record 7, of which the shape can be read
    records = Records(folder, latent_channels=4)
    loader = loader_of(records, tmp_path, num_workers)
    seen = set()
    for batch in loader.batches(0, 8):
        items = batch["item"].tolist()
        assert batch["moments"].shape == (4, 8, 2 + items[0] % 2, 2) and len({i % 2 for i in items}) == 1
        assert batch["moments"][:, 0, 0, 0].tolist() == batch["flow"].tolist() == items
        assert batch["prompt"] == [f"{i}" for i in items]
        seen |= set(items)
    assert seen == {0, 1, 2, 3, 4, 5, 6}
    assert loader.bad_items == {7}
    with pytest.raises(ValueError, match=r"record 7 .*so this record and 0 more are cut off; copy the file again"):
        records.check()


def test_what_is_looked_for_up_front(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    video = moments((8, 3, 2, 2)) | {"caption": "c"}
    folder = write(tmp_path / "set", [video, video | moments((8, 3, 2, 2), np.nan)], label="int")
    text = r"record 0 .*no feature `flow`, which a model with motion_embed needs; write it(.|\n)*record 1 .*not finite"
    with pytest.raises(ValueError, match=text):
        Records(folder, latent_channels=4, needs_flow=True).check()
    assert "the feature label is not used" in caplog.text
    caplog.clear()
    folder = write(tmp_path / "odd", [video])
    with caplog.at_level(logging.WARNING):
        Records(folder, latent_channels=4).check()
    assert "videos of [3] latent frames: OpenSora's VAE makes 4 k + 1 of 16 k + 1 frames" in caplog.text


def test_many_problems_are_counted(tmp_path: Path) -> None:
    folder = write(tmp_path / "set", [moments((4, 2, 2))] * 30, max_examples=100)
    with pytest.raises(ValueError, match=r"record 9 .*\n\.\.\. and 20 more$"):
        Records(folder, latent_channels=4).check()


@pytest.mark.parametrize(
    ("features", "text"),
    [
        ({"moments": "string"}, "needs the feature moments as BYTES; it has"),
        ({"shape": "int"}, "needs the feature shape as"),
        ({"caption": "int"}, "needs the feature caption as STRING or {'data': 'BYTES', 'shape': ['INT64']}"),
        ({"caption": ENCODED}, "a caption and a text of different types"),
        ({"flow": "string"}, "needs the feature flow as FLOAT32"),
    ],
)
def test_features_of_other_types(tmp_path: Path, features: dict, text: str) -> None:
    folder = write(tmp_path / "set", [{}], **features)
    with pytest.raises(ValueError, match=re.escape(text)):
        Records(folder, latent_channels=4)


def test_sets_that_do_not_go_together(tmp_path: Path) -> None:
    first = images(tmp_path / "plain")
    second = write(tmp_path / "encoded", [{}], caption=ENCODED, text=ENCODED)
    with pytest.raises(ValueError, match="texts are encoded in .*encoded and plain in .*plain: one run can read one"):
        Records([first, second], latent_channels=4)
    with pytest.raises(ValueError, match="no data set is named"):
        Records(" , ", latent_channels=4)


def test_the_fingerprint_follows_the_files(tmp_path: Path) -> None:
    one, other = (Records(images(tmp_path / name, 8), latent_channels=4).fingerprint() for name in "ab")
    assert one == other and one["sets"][0]["entries"] == 8
    assert Records(images(tmp_path / "c", 7), latent_channels=4).fingerprint() != one
    with open(tmp_path / "b" / "00002.data", "ab") as file:
        file.write(b"x")
    assert Records(tmp_path / "b", latent_channels=4).fingerprint() != one


# Texts and latents


def test_first_sentence() -> None:
    assert first_sentence("Is it? It is.") == "Is it?"
    assert first_sentence("2.5 kg.") == "2.5 kg."
    assert first_sentence("one\ntwo. three") == "one\ntwo. three"


def test_a_class_label_leaves_the_caption_alone() -> None:
    assert parse_annotation("long", "short", 0, Draws().random) == "long"


def test_latents() -> None:
    codes = np.arange(4, dtype=np.int32).reshape(2, 2)
    read = parse_latents({"codes": codes.tobytes(), "shape": [2, 2]})
    np.testing.assert_array_equal(read, codes, strict=True)
    with pytest.raises(ValueError, match="a record needs `moments` or `codes`; it has shape"):
        parse_latents({"shape": [1]})


# The original's reader and loader


def test_partitions_taken_in_turn() -> None:
    """As the original delivers them, which takes the next partition even before the first epoch."""
    order = islice(reader_order(10, 3, 0, initial_fill=2, stick_to_partition=False), 14)
    assert list(order) == [4, 5, 6, 7, 8, 9, 0, 1, 2, 3, 4, 5, 6, 7]
    order = islice(reader_order(10, 3, 0, 1337, 7, shuffle=True, stick_to_partition=False), 20)
    assert list(order) == [7, 6, 5, 4, 8, 9, 3, 2, 0, 1, 6, 7, 4, 5, 8, 9, 0, 2, 1, 3]


def test_every_epoch_is_whole() -> None:
    order = list(islice(reader_order(100, 4, 2, 3, 40, shuffle=True), 250))
    assert all(sorted(order[i : i + 25]) == list(range(50, 75)) for i in range(0, 250, 25))
    with pytest.raises(ValueError, match="initial_fill is 0: at least one example has to be held back"):
        next(reader_order(3, initial_fill=0))


STARVED = (
    r"has 9 examples; split over 8 ranks, 2 in a row for each, none is left for rank 5, 6, 7\. Write a multiple of 8"
)


def test_starving_ranks_are_told_at_once(tmp_path: Path) -> None:
    folder = images(tmp_path / "set", 9)
    for rank in (0, 7):
        with pytest.raises(ValueError, match=STARVED):
            FeatureDataLoader(folder, shard_id=rank, num_shards=8)
        with pytest.raises(ValueError, match=STARVED):
            DatasetReader(folder, None, RecordDataset, rank, 8)
    assert next(reader_order(9, 8, 0)) == 0
    with pytest.raises(ValueError, match=STARVED):
        next(reader_order(9, 8, 0, stick_to_partition=False))
    check_partitions(folder, 16, 8)
    with pytest.raises(ValueError, match="has 0 examples"):
        check_partitions(folder, 0, 1)


def test_the_loader_is_called_or_iterated(tmp_path: Path) -> None:
    folder = images(tmp_path / "set")
    called, iterated = (FeatureDataLoader(folder, batch_size=3, queue_depth=2, prefetch_count=50) for _ in range(2))
    for (expected,) in islice(iterated, 5):
        (batch,) = called()
        np.testing.assert_array_equal(batch["latents"], expected["latents"], strict=True)
        assert batch["prompt"] == expected["prompt"] and batch["latents"].shape == (3, 8, 2, 3)


def test_labels_are_prompts(tmp_path: Path) -> None:
    folder = write(tmp_path / "set", [moments((8, 2, 2)) | {"label": 3, "caption": "c"}], label="int")
    assert next(FeatureDataLoader(folder, batch_size=2))[0]["prompt"] == [3, 3]


def test_the_reader_is_a_process(tmp_path: Path) -> None:
    folder = images(tmp_path / "set")
    queue = multiprocessing.Queue(2)
    reader = DatasetReader(folder, queue, RecordDataset, 1, 2, shuffle=True, initial_fill=3, seed=5, queue_depth=1)
    reader.start()
    texts = [queue.get(timeout=60)["text"] for _ in range(9)]
    reader.terminate()
    reader.join()
    assert texts == [f"short {i}" for i in islice(reader_order(8, 2, 1, 5, 3, shuffle=True), 9)]
