"""A cache belongs to one fingerprint; its entries appear whole or not at all, and damage is told apart from absence."""

import json
import os
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from common import cache as caches
from common.cache import Cache, CachedItems, CacheError, digest_of_files, digest_of_weights, encode_items
from common.runtime import StopRequested

FINGERPRINT = {"format": 1, "weights": "abc", "size_px": (64, 128), "crop": None}


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "a" / "cache", FINGERPRINT)
    assert "abcd" not in cache
    saved = {
        "x": torch.randn(2, 3).to(torch.bfloat16),
        "n": torch.arange(6).reshape(2, 3).T,
        "flag": torch.tensor(True),
    }
    cache.save("abcd", saved)
    assert "abcd" in cache and cache.path("abcd") == tmp_path / "a" / "cache" / "ab" / "abcd.safetensors"
    loaded = Cache(tmp_path / "a" / "cache", FINGERPRINT).load("abcd")
    assert loaded.keys() == saved.keys()
    for name, tensor in saved.items():
        assert loaded[name].dtype == tensor.dtype and torch.equal(loaded[name], tensor), name


def test_another_fingerprint_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    Cache(folder, FINGERPRINT)
    Cache(folder, {**FINGERPRINT, "size_px": [64, 128]})  # the same once it is JSON
    with pytest.raises(CacheError) as caught:
        Cache(folder, {"format": 1, "weights": "def", "size_px": (64, 256), "crop": None, "new": True})
    assert str(caught.value) == (
        f"the cache {folder} does not belong to this run: weights was 'abc', is 'def'; size_px was [64, 128], is "
        "[64, 256]; new was None, is True. Name another folder, or delete this one to have it made again"
    )
    fewer = {key: value for key, value in FINGERPRINT.items() if key != "weights"}
    with pytest.raises(CacheError, match=re.escape("weights was 'abc', is None.")):
        Cache(folder, fewer)
    assert json.loads((folder / "fingerprint.json").read_text())["weights"] == "abc"  # left as it was


def test_a_file_in_the_place_of_the_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "cache"):
        with pytest.raises(CacheError) as caught:
            Cache(folder, FINGERPRINT)
        assert str(caught.value) == f"the cache {folder} cannot be made, there is a file: name a folder"


@pytest.mark.parametrize("content", [b"", b'{"format": 1', b"\xff\xfe\x00", b"[]", b"null"])
def test_a_damaged_fingerprint_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "fingerprint.json").write_bytes(content)
    with pytest.raises(CacheError) as caught:
        Cache(tmp_path, FINGERPRINT)
    path = tmp_path / "fingerprint.json"
    assert str(caught.value) == f"{path} is damaged: delete the folder {tmp_path}, it will be made again"


def test_a_missing_entry_is_named(tmp_path: Path) -> None:
    with pytest.raises(CacheError) as caught:
        Cache(tmp_path, FINGERPRINT).load("abcd")
    assert str(caught.value) == f"{tmp_path / 'ab' / 'abcd.safetensors'} is missing from the cache"


@pytest.mark.parametrize("kept_bytes", [0, 4, 40, -1])
def test_a_damaged_entry_is_named(tmp_path: Path, kept_bytes: int) -> None:
    cache = Cache(tmp_path, FINGERPRINT)
    cache.save("abcd", {"x": torch.ones(16)})
    path = cache.path("abcd")
    path.write_bytes(path.read_bytes()[:kept_bytes])
    with pytest.raises(CacheError) as caught:
        cache.load("abcd")
    message = str(caught.value)
    assert message.startswith(f"{path} is damaged (") and message.endswith("): delete it, it will be made again")
    cache.save("abcd", {"x": torch.ones(16)})
    assert torch.equal(cache.load("abcd")["x"], torch.ones(16))


def test_an_interrupted_save_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = Cache(tmp_path, FINGERPRINT)
    cache.save("abcd", {"x": torch.ones(4)})

    def half(tensors: dict, path: Path) -> None:
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(caches, "save_file", half)
    for key in ("abcd", "abef"):
        with pytest.raises(KeyboardInterrupt):
            cache.save(key, {"x": torch.zeros(4)})
    assert torch.equal(cache.load("abcd")["x"], torch.ones(4))
    assert "abef" not in cache
    assert [path.name for path in tmp_path.rglob("*.safetensors")] == ["abcd.safetensors"]


def test_the_digest_follows_the_weights() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))  # with a scalar buffer
    first = digest_of_weights(module)
    assert re.fullmatch("[0-9a-f]{64}", first) and digest_of_weights(module) == first
    copy = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    copy.load_state_dict(module.state_dict())
    assert digest_of_weights(copy) == first
    with torch.no_grad():
        copy[0].weight[2, 1] = torch.nextafter(copy[0].weight[2, 1], torch.tensor(9.0))
    assert digest_of_weights(copy) != first
    copy.load_state_dict(module.state_dict())
    copy[1].num_batches_tracked += 1
    assert digest_of_weights(copy) != first


def test_the_digest_follows_weights_in_bf16_and_their_type_and_shape() -> None:
    module = nn.Linear(4, 4, bias=False).to(torch.bfloat16)
    nn.init.ones_(module.weight)
    first = digest_of_weights(module)
    with torch.no_grad():
        module.weight[3, 3] = 1.0078125  # the next number that the type has
    assert digest_of_weights(module) != first
    nn.init.ones_(module.weight)
    assert digest_of_weights(module) == first
    assert digest_of_weights(module.float()) != first
    reshaped = nn.Linear(2, 8, bias=False).to(torch.bfloat16)
    nn.init.ones_(reshaped.weight)
    assert digest_of_weights(reshaped) != first


def test_the_digest_follows_the_files(tmp_path: Path) -> None:
    one, two = tmp_path / "one.png", tmp_path / "two.png"
    for path in (one, two):
        path.write_bytes(b"1234")
        os.utime(path, ns=(10**18, 10**18))
    first = digest_of_files(one, two)
    assert digest_of_files(one, two) == first
    assert digest_of_files(two, one) != first and digest_of_files(one) != first
    os.utime(two, ns=(10**18, 10**18 + 1000))
    later = digest_of_files(one, two)
    assert later != first
    two.write_bytes(b"12345")
    os.utime(two, ns=(10**18, 10**18))
    assert digest_of_files(one, two) not in (first, later)
    two.unlink()
    with pytest.raises(FileNotFoundError, match="two.png"):
        digest_of_files(one, two)


def encode_numbers(cache: Cache, read: list, *, rank: int = 0, stopped_at: int = 99) -> None:
    """Entries `<item><part>` of five items, of which the second part of item 2 cannot be read; logs what is read."""

    def share(count: int) -> Any:
        for index in range(rank, count, 2):
            if index >= stopped_at:
                raise StopRequested("SIGTERM")
            yield index

    def read_one(index: int, part: str) -> int:
        read.append(f"{index}{part}")
        if (index, part) == (2, "b"):
            raise OSError("2.png is damaged")
        return 10 * index

    def encode(index: int, part: str, item: int) -> dict[str, torch.Tensor]:
        assert not torch.is_grad_enabled()
        return {"x": torch.tensor([index, item, len(part)])}

    processes: Any = SimpleNamespace(
        process_index=rank, num_processes=2, is_main_process=rank == 0, wait_for_everyone=lambda: read.append("all")
    )
    stop: Any = SimpleNamespace(share=share)
    encode_items(
        cache,
        5,
        ("a", "b", "c"),
        key_of=lambda index, part: f"item{index}{part}",
        read=read_one,
        encode=encode,
        unit="scene",
        processes=processes,
        stop=stop,
    )


def test_every_part_of_every_item_is_encoded_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache, read = Cache(tmp_path, FINGERPRINT), []
    with pytest.raises(StopRequested):
        encode_numbers(cache, read, stopped_at=4)
    assert read == ["0a", "0b", "0c", "2a", "2b"]  # what is encoded stays, what was read ahead is read again
    read.clear()
    encode_numbers(cache, read)
    assert read == ["2a", "2b", "4a", "4b", "4c", "all"]
    assert caplog.messages == ["scene 2 is not encoded: 2.png is damaged"] * 2
    encode_numbers(cache, read, rank=1)
    names = {path.stem for path in tmp_path.rglob("*.safetensors")}
    assert names == {f"item{index}{part}" for index in range(5) for part in "abc"} - {"item2b", "item2c"}
    assert cache.load("item3c")["x"].tolist() == [3, 30, 1]


def test_cached_items_are_those_of_the_data_set(tmp_path: Path) -> None:
    class Pictures:
        def __len__(self) -> int:
            return 7

        def files_of(self, index: int) -> list[Path]:
            return [Path(f"{index}.png")]

        def sample(self, index: int, rng: Any) -> dict[str, Any]:
            raise AssertionError("the cache is read")

    items = CachedItems(Pictures(), Cache(tmp_path, FINGERPRINT))
    assert len(items) == 7 and items.files_of(3) == [Path("3.png")]
