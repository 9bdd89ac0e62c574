"""Checkpoints are whole or do not exist: every damage, a full disk and a kill at any instant."""

import errno
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

from common import checkpoint as subject
from common.checkpoint import (
    CheckpointError,
    Checkpoints,
    TrainedWeights,
    find,
    listed,
    newest_valid,
    problems_of,
    publish,
    read_state,
    read_weights,
    save_weights,
    seal,
    step_of,
)
from common.optim import EMA

NO_MANIFEST = "it has no manifest.json, so it was never finished or was not written by these trainers"


@pytest.fixture
def accelerator() -> Iterator[Accelerator]:
    """A real one, on the CPU; it leaves no state for other tests."""
    environment = dict(os.environ)
    AcceleratorState._reset_state(reset_partial_state=True)
    yield Accelerator(cpu=True)
    AcceleratorState._reset_state(reset_partial_state=True)
    assert PartialState._shared_state == {}, "accelerate kept its state: other tests would see it"
    os.environ.clear()
    os.environ.update(environment)


def fill(folder: Path, text: str = "weights") -> None:
    (folder / "model").mkdir(parents=True, exist_ok=True)
    (folder / "model" / "model.safetensors").write_text(text)
    (folder / "optimizer.bin").write_bytes(bytes(range(256)))
    (folder / "empty").touch()
    (folder / "trainer_state.json").write_text('{"step": 1}\n')


def make(output_dir: Path, step: int, text: str = "weights") -> Path:
    """A whole checkpoint."""
    folder = output_dir / f"checkpoint-{step}"
    fill(folder, text)
    seal(folder)
    return folder


def hidden(output_dir: Path) -> list[str]:
    return sorted(path.name for path in output_dir.iterdir() if path.name.startswith("."))


# Manifests ------------------------------------------------------------------------------------------------------------


def test_a_manifest_lists_every_file(tmp_path: Path) -> None:
    folder = make(tmp_path, 1)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["format"] == 1
    assert manifest["files"] == {
        name: {
            "size": (folder / name).stat().st_size,
            "sha256": hashlib.sha256((folder / name).read_bytes()).hexdigest(),
        }
        for name in ("empty", "model/model.safetensors", "optimizer.bin", "trainer_state.json")
    }
    assert problems_of(folder) == []
    seal(folder)  # a second time: the manifest does not list itself
    assert json.loads((folder / "manifest.json").read_text()) == manifest


def test_everything_is_flushed_and_the_manifest_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed: list[Path] = []
    monkeypatch.setattr(subject, "_fsync", lambda path: flushed.append(path))
    folder = make(tmp_path, 1)
    files = {path for path in folder.rglob("*") if path.is_file()}
    manifest = folder / "manifest.json"
    assert {*files, folder, folder / "model"} == set(flushed) and len(flushed) == len(set(flushed))
    assert set(flushed[: len(files) - 1]) == files - {manifest} and flushed[len(files) - 1] == manifest


def flip_a_bit(folder: Path) -> None:
    content = bytearray((folder / "optimizer.bin").read_bytes())
    content[100] ^= 1
    (folder / "optimizer.bin").write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "problem", "seen_without_reading"),
    [
        (lambda f: (f / "optimizer.bin").unlink(), "optimizer.bin is missing", True),
        (lambda f: shutil.rmtree(f / "model"), "model/model.safetensors is missing", True),
        (lambda f: (f / "optimizer.bin").write_bytes(b"abc"), "optimizer.bin has 3 bytes instead of 256", True),
        (lambda f: (f / "empty").write_bytes(b"a"), "empty has 1 bytes instead of 0", True),
        (lambda f: ((f / "empty").unlink(), (f / "empty").mkdir()), "empty is missing", True),
        (flip_a_bit, "the content of optimizer.bin has changed", False),
        (lambda f: (f / "manifest.json").unlink(), NO_MANIFEST, True),
        (lambda f: os.truncate(f / "manifest.json", 60), "its manifest.json cannot be read (JSONDecodeError)", True),
        (lambda f: os.truncate(f / "manifest.json", 0), "its manifest.json cannot be read (JSONDecodeError)", True),
    ],
)
def test_damage_is_found(
    tmp_path: Path, damage: Callable[[Path], Any], problem: str, seen_without_reading: bool
) -> None:
    folder = make(tmp_path, 1)
    damage(folder)
    assert problems_of(folder) == [problem]
    assert problems_of(folder, compare_content=False) == ([problem] if seen_without_reading else [])


def test_all_damage_is_named(tmp_path: Path) -> None:
    folder = make(tmp_path, 1)
    (folder / "empty").unlink()
    flip_a_bit(folder)
    assert problems_of(folder) == ["empty is missing", "the content of optimizer.bin has changed"]


def test_further_files_do_no_harm(tmp_path: Path) -> None:
    folder = make(tmp_path, 1)
    (folder / "notes.txt").write_text("best so far")
    assert problems_of(folder) == []


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("[]", "its manifest.json cannot be read (TypeError)"),
        ("null", "its manifest.json cannot be read (TypeError)"),
        ("{}", "its manifest.json cannot be read (KeyError)"),
        ('{"files": []}', "its manifest.json cannot be read (AttributeError)"),
        ('{"files": {"empty": 3}}', "its manifest.json cannot be read (TypeError)"),
        ('{"files": {"empty": {"size": 0}}}', "its manifest.json cannot be read (KeyError)"),
        ('{"files": {"empty": {"size": "0", "sha256": ""}}}', "empty has 0 bytes instead of 0"),
        ('{"files": {"empty": {"size": null, "sha256": ""}}}', "empty has 0 bytes instead of None"),
        ('{"files": {"empty": {"size": 0, "sha256": null}}}', "the content of empty has changed"),
        ('{"files": {"empty": {"size": 0, "sha256": [1]}}}', "the content of empty has changed"),
        ('{"files": {"../outside": {"size": 1, "sha256": ""}}}', "../outside lies outside the folder"),
        ('{"files": {"/etc/passwd": {"size": 1, "sha256": ""}}}', "/etc/passwd lies outside the folder"),
        (
            '{"files": {"model/../../outside": {"size": 1, "sha256": ""}}}',
            "model/../../outside lies outside the folder",
        ),
        ('{"files": {"link": {"size": 1, "sha256": ""}}}', "link lies outside the folder"),
        ('{"files": {"": {"size": 1, "sha256": ""}}}', " is missing"),
        ('{"files": {"model": {"size": 1, "sha256": ""}}}', "model is missing"),
        (b"\xff\xfe{}", "its manifest.json cannot be read (UnicodeDecodeError)"),
    ],
)
def test_manifests_that_are_none(tmp_path: Path, content: str | bytes, problem: str) -> None:
    (tmp_path / "outside").write_text("x")
    folder = make(tmp_path, 1)
    (folder / "link").symlink_to(tmp_path / "outside")
    (folder / "manifest.json").write_bytes(content.encode() if isinstance(content, str) else content)
    assert problems_of(folder) == [problem]
    assert newest_valid(tmp_path) is None


def test_a_manifest_that_is_a_folder(tmp_path: Path) -> None:
    folder = make(tmp_path, 1)
    (folder / "manifest.json").unlink()
    (folder / "manifest.json").mkdir()
    assert problems_of(folder) == ["its manifest.json cannot be read (IsADirectoryError)"]


@pytest.mark.parametrize("name", ["a\0b", "a" * 300, "loop"])
def test_manifests_with_impossible_paths(tmp_path: Path, name: str) -> None:
    older, folder = make(tmp_path, 1), make(tmp_path, 2)
    (folder / "loop").symlink_to("loop")
    (folder / "manifest.json").write_text(json.dumps({"files": {name: {"size": 1, "sha256": ""}}}))
    assert len(problems_of(folder)) == 1
    assert newest_valid(tmp_path) == older


def test_an_empty_manifest_is_no_checkpoint(tmp_path: Path) -> None:
    older, folder = make(tmp_path, 1), tmp_path / "checkpoint-2"
    folder.mkdir()
    (folder / "manifest.json").write_text('{"format": 1, "files": {}}')
    assert newest_valid(tmp_path) == older


def test_a_manifest_of_a_subfolder_is_a_file_as_any_other(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint-1"
    fill(folder)
    (folder / "model" / "manifest.json").write_text("{}")
    seal(folder)
    (folder / "model" / "manifest.json").unlink()
    assert problems_of(folder) == ["model/manifest.json is missing"]


# Which checkpoints there are ------------------------------------------------------------------------------------------


def test_only_numbered_folders_are_ours(tmp_path: Path) -> None:
    for step in (9, 10, 100):
        make(tmp_path, step)
    for name in (
        "checkpoint-best",
        "checkpoint-",
        "checkpoint-1a",
        "checkpoint-12-old",
        "xcheckpoint-7",
        "checkpoint--3",
    ):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-500").write_text("a file")
    make(tmp_path / "nested", 999)
    assert [path.name for path in listed(tmp_path)] == ["checkpoint-100", "checkpoint-10", "checkpoint-9"]
    assert [step_of(path) for path in listed(tmp_path)] == [100, 10, 9]
    assert newest_valid(tmp_path) == tmp_path / "checkpoint-100"
    assert listed(tmp_path / "gone") == [] and newest_valid(tmp_path / "gone") is None


def test_damaged_ones_are_passed_over_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    good, flipped, foreign = make(tmp_path, 5), make(tmp_path, 7), tmp_path / "checkpoint-9"
    fill(foreign)
    flip_a_bit(flipped)
    assert newest_valid(tmp_path) == good
    assert [record.getMessage() for record in caplog.records] == [
        f"{foreign} is passed over: {NO_MANIFEST}",
        f"{flipped} is passed over: the content of optimizer.bin has changed",
    ]
    flip_a_bit(good)
    assert newest_valid(tmp_path) is None


def test_a_fresh_start_needs_a_fresh_folder(accelerator: Accelerator, tmp_path: Path) -> None:
    assert find(accelerator, tmp_path / "new", None) is None
    assert find(accelerator, tmp_path / "new", "latest") is None
    (tmp_path / "checkpoint-best").mkdir()
    assert find(accelerator, tmp_path, None) is None
    (tmp_path / "checkpoint-3").mkdir()  # damaged, but somebody's
    with pytest.raises(CheckpointError) as raised:
        find(accelerator, tmp_path, None)
    assert str(raised.value) == (
        f"{tmp_path} already holds checkpoint-3 of an earlier run: continue it with --resume_from_checkpoint latest, "
        "or start afresh with another --output_dir"
    )


def test_what_resume_from_checkpoint_may_be(
    accelerator: Accelerator, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    older, newer = make(tmp_path, 3), make(tmp_path, 20)
    other = make(tmp_path / "other", 4)
    assert find(accelerator, tmp_path, "latest") == newer
    assert find(accelerator, tmp_path, "checkpoint-3") == older
    assert find(accelerator, tmp_path, "checkpoint-3/") == older
    assert find(accelerator, tmp_path, str(older)) == older
    assert find(accelerator, tmp_path, str(other)) == other
    flip_a_bit(newer)
    assert find(accelerator, tmp_path, "latest") == older
    with pytest.raises(CheckpointError) as raised:
        find(accelerator, tmp_path, "checkpoint-20")
    assert str(raised.value) == f"{newer} cannot be resumed from: the content of optimizer.bin has changed"
    with pytest.raises(CheckpointError) as raised:
        find(accelerator, tmp_path, "checkpoint-4")
    assert str(raised.value) == (
        f"there is no checkpoint 'checkpoint-4'; tried checkpoint-4, {tmp_path}/checkpoint-4. Checkpoints in "
        f"{tmp_path}: checkpoint-20, checkpoint-3"
    )
    with pytest.raises(CheckpointError) as raised:
        find(accelerator, tmp_path, "/nowhere/checkpoint-4")
    assert str(raised.value) == (
        f"there is no checkpoint '/nowhere/checkpoint-4'; tried /nowhere/checkpoint-4, {tmp_path}/checkpoint-4. "
        f"Checkpoints in {tmp_path}: checkpoint-20, checkpoint-3"
    )
    assert find(accelerator, tmp_path, "/moved/checkpoint-3") == older
    assert caplog.messages[-1] == f"/moved/checkpoint-3 is not there; its namesake {older} is resumed from"
    with pytest.raises(CheckpointError, match=r"Checkpoints in .*/none: none$"):
        find(accelerator, tmp_path / "none", "checkpoint-4")


def test_a_foreign_folder_is_refused(accelerator: Accelerator, tmp_path: Path) -> None:
    fill(tmp_path / "foreign")
    with pytest.raises(CheckpointError) as raised:
        find(accelerator, tmp_path, "foreign")
    assert str(raised.value) == f"{tmp_path}/foreign cannot be resumed from: {NO_MANIFEST}"


@pytest.mark.parametrize("wanted", [None, "latest"])
def test_leftovers_of_a_kill_are_removed_at_the_start(
    accelerator: Accelerator, tmp_path: Path, wanted: str | None
) -> None:
    for name in (".checkpoint-5.partial", ".checkpoint-3.deleting", ".export.partial"):
        fill(tmp_path / name)
    (tmp_path / ".cache").mkdir()
    assert find(accelerator, tmp_path, wanted) is None
    assert hidden(tmp_path) == [".cache"]


def test_any_error_of_the_search_reaches_all_processes(
    accelerator: Accelerator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[Any] = []
    monkeypatch.setattr(subject, "broadcast_object_list", lambda answer: told.append(list(answer)))
    monkeypatch.setattr(subject, "listed", lambda path: (_ for _ in ()).throw(PermissionError(13, "denied", str(path))))
    with pytest.raises((CheckpointError, PermissionError)):
        find(accelerator, tmp_path, None)
    assert len(told) == 1


# Publishing -----------------------------------------------------------------------------------------------------------


def test_a_folder_appears_whole(accelerator: Accelerator, tmp_path: Path) -> None:
    final = tmp_path / "new" / "checkpoint-1"

    def write(staging: Path) -> None:
        assert staging.parent == final.parent and staging.name == ".checkpoint-1.partial"
        assert list(staging.iterdir()) == [] and not final.exists()
        fill(staging)
        assert newest_valid(final.parent) is None

    publish(accelerator, final, write)
    assert problems_of(final) == [] and hidden(final.parent) == []


def test_an_older_folder_is_replaced(accelerator: Accelerator, tmp_path: Path) -> None:
    final = make(tmp_path, 1, "old")
    (final / "only in the old one").touch()
    (tmp_path / ".checkpoint-1.partial").mkdir()
    (tmp_path / ".checkpoint-1.partial" / "left over").touch()

    def write(staging: Path) -> None:
        fill(staging, "new")
        assert problems_of(final) == []  # until the new one is whole

    publish(accelerator, final, write)
    assert problems_of(final) == []
    assert (final / "model" / "model.safetensors").read_text() == "new"
    assert not (final / "only in the old one").exists() and not (final / "left over").exists()
    assert hidden(tmp_path) == []


FULL_DISKS = [
    OSError(errno.ENOSPC, "No space left on device"),
    OSError(errno.EDQUOT, "Disk quota exceeded"),
    SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0"),
    SafetensorError("Error while serializing: I/O error: Disk quota exceeded (os error 122)"),
]


@pytest.mark.parametrize("error", FULL_DISKS)
@pytest.mark.parametrize("old", [False, True])
def test_a_full_disk(accelerator: Accelerator, tmp_path: Path, error: Exception, old: bool) -> None:
    older = make(tmp_path, 5)
    final = make(tmp_path, 10, "old") if old else tmp_path / "checkpoint-10"

    def write(staging: Path) -> None:
        fill(staging)
        raise error

    with pytest.raises(CheckpointError) as raised:
        publish(accelerator, final, write)
    before, after = str(raised.value).split(" MiB free): ")
    assert before.startswith(f"the disk of {tmp_path} is full (") and before.rsplit("(", 1)[1].isdigit()
    assert after == (
        "checkpoint-10 was not written, older checkpoints are untouched. Free some space or lower "
        "checkpoints_total_limit, then resume with --resume_from_checkpoint latest"
    )
    assert raised.value.__cause__ is error
    assert hidden(tmp_path) == []
    assert problems_of(older) == [] and final.exists() == old and (not old or problems_of(final) == [])


@pytest.mark.parametrize("function", ["fsync", "rename"])
def test_a_disk_that_fills_up_while_sealing(
    accelerator: Accelerator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str
) -> None:
    older = make(tmp_path, 5)

    def fail(*arguments: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched, pytest.raises(CheckpointError, match="checkpoint-10 was not written"):
        patched.setattr(subject.os, function, fail)
        publish(accelerator, tmp_path / "checkpoint-10", fill)
    assert newest_valid(tmp_path) == older and hidden(tmp_path) == []


@pytest.mark.parametrize("error", [OSError(errno.EIO, "I/O error"), RuntimeError("CUDA error"), ValueError("mistake")])
def test_other_errors_are_not_called_a_full_disk(accelerator: Accelerator, tmp_path: Path, error: Exception) -> None:
    def write(staging: Path) -> None:
        fill(staging)
        raise error

    older = make(tmp_path, 5)
    with pytest.raises(type(error)) as raised:
        publish(accelerator, tmp_path / "checkpoint-10", write)
    assert raised.value is error
    assert not (tmp_path / "checkpoint-10").exists() and newest_valid(tmp_path) == older
    assert hidden(tmp_path) == []


def test_a_failure_leaves_the_older_folder_and_nothing_else(
    accelerator: Accelerator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    final, rename = make(tmp_path, 10, "old"), os.rename

    def fail(source: Path, target: Path) -> None:
        if source.name.endswith(".partial"):
            raise OSError(errno.EIO, "I/O error")
        rename(source, target)

    with monkeypatch.context() as patched, pytest.raises(OSError, match="I/O error"):
        patched.setattr(subject.os, "rename", fail)
        publish(accelerator, final, lambda staging: fill(staging, "new"))
    assert problems_of(final) == [] and (final / "model" / "model.safetensors").read_text() == "old"
    assert hidden(tmp_path) == []


class Killed(BaseException):
    """What nobody catches."""


def kill_at(call: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process ends at that call of a function that changes what is on disk, after half of a deletion."""
    left = [call]

    def deadly(function: Callable) -> Callable:
        def wrapped(path: Any, *arguments: Any, **settings: Any) -> Any:
            left[0] -= 1
            if left[0] == 0 and function is not shutil.rmtree:
                raise Killed
            if left[0] == 0:
                for file in sorted(p for p in Path(path).rglob("*") if p.is_file())[::2]:
                    file.unlink()
                raise Killed
            if left[0] < 0:
                raise Killed  # a dead process does no more
            return function(path, *arguments, **settings)

        return wrapped

    for module, name in ((os, "rename"), (os, "fsync"), (shutil, "rmtree"), (os, "mkdir")):
        monkeypatch.setattr(module, name, deadly(getattr(module, name)))


@pytest.mark.parametrize("old", [False, True])
def test_a_kill_at_any_instant_leaves_a_whole_checkpoint(
    accelerator: Accelerator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, old: bool
) -> None:
    outcomes = []
    for call in range(1, 100):
        output_dir = tmp_path / str(call)
        make(output_dir, 5)
        if old:
            make(output_dir, 10, "old")
        with monkeypatch.context() as patched:
            kill_at(call, patched)
            try:
                publish(accelerator, output_dir / "checkpoint-10", lambda staging: fill(staging, "new"))
                finished = True
            except Killed:
                finished = False
        found = find(accelerator, output_dir, "latest")
        assert found in (output_dir / "checkpoint-5", output_dir / "checkpoint-10")
        outcomes.append((found / "model" / "model.safetensors").read_text() if step_of(found) == 10 else "none")
        assert hidden(output_dir) == []
        if finished:
            break
    assert finished and outcomes[-1] == "new" and len(outcomes) > 8
    assert outcomes[0] == ("old" if old else "none")


def test_a_replaced_folder_is_deleted_after_its_successor_is_there(
    accelerator: Accelerator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    final, plain, seen = make(tmp_path, 1, "old"), shutil.rmtree, []

    def observed(path: Path, **settings: Any) -> None:
        if path.exists():
            seen.append(final.exists())
        plain(path, **settings)

    monkeypatch.setattr(subject.shutil, "rmtree", observed)
    publish(accelerator, final, fill)
    assert seen and all(seen)


# Weights --------------------------------------------------------------------------------------------------------------


def test_weights_of_a_plain_module(tmp_path: Path) -> None:
    module = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    with torch.no_grad():
        module[0].weight = nn.Parameter(torch.arange(6.0).reshape(2, 3).T)  # not contiguous
    save_weights(module, tmp_path / "model")
    weights = read_weights(tmp_path / "model")
    assert weights.keys() == module.state_dict().keys()
    assert all(torch.equal(weights[name], tensor) for name, tensor in module.state_dict().items())


def test_weights_in_shards(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "model-00001-of-00002.safetensors")
    save_file({"b": torch.ones(1)}, tmp_path / "model-00002-of-00002.safetensors")
    assert {name: value.item() for name, value in read_weights(tmp_path).items()} == {"a": 0, "b": 1}


def test_no_weights(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(CheckpointError) as raised:
        read_weights(tmp_path)
    assert str(raised.value) == f"{tmp_path} holds no safetensors weights"


def test_damaged_weights(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(CheckpointError, match="model.safetensors is damaged, or no safetensors file: Error while"):
        read_weights(tmp_path)


def mostly_frozen(trained: int) -> nn.Sequential:
    """Two layers, one of them trained."""
    network = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2)).requires_grad_(False)
    network[trained].requires_grad_(True)
    return network


def test_trained_weights_are_all_that_is_saved(tmp_path: Path) -> None:
    network, other = mostly_frozen(1), mostly_frozen(1)
    frozen = other[0].weight.clone()
    save_weights(TrainedWeights(network), tmp_path / "model")
    weights = read_weights(tmp_path / "model")
    assert weights.keys() == {"1.weight", "1.bias"} and torch.equal(weights["1.weight"], network[1].weight)
    TrainedWeights(other).load_state_dict(weights)
    assert torch.equal(other[1].weight, network[1].weight) and torch.equal(other[1].bias, network[1].bias)
    assert torch.equal(other[0].weight, frozen) and other[1].weight.requires_grad


def test_the_average_of_trained_weights(tmp_path: Path) -> None:
    network = mostly_frozen(1)
    ema = EMA(TrainedWeights(network), decay=0.5)
    start = network[1].bias.detach().clone()
    with torch.no_grad():
        network[1].bias += 1
    with ema.swapped():
        assert torch.equal(network[1].bias, start)
    assert torch.equal(network[1].bias, start + 1)


# The checkpoints of a run ---------------------------------------------------------------------------------------------


class TinyRun:
    """A model with dropout, its optimizer and its average, saved by the class under test."""

    def __init__(self, accelerator: Accelerator, output_dir: Path, total_limit: int | None = None):
        torch.manual_seed(0)
        self.bare = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.Linear(4, 4))
        optimizer = torch.optim.AdamW(self.bare.parameters(), lr=0.1)
        self.model, self.optimizer = accelerator.prepare(self.bare, optimizer)
        self.accelerator, self.ema = accelerator, EMA(self.bare, 0.9)
        self.checkpoints = Checkpoints(accelerator, output_dir, {"net": self.bare}, {"net": self.ema}, total_limit)

    def train(self, steps: int) -> list[float]:
        losses = []
        for _ in range(steps):
            loss = self.model(torch.randn(3, 4)).square().mean()  # draws from the global generator, as dropout does
            self.accelerator.backward(loss)
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.ema.update()
            losses.append(loss.item())
        return losses


def test_a_run_goes_on_where_it_was_saved(accelerator: Accelerator, tmp_path: Path) -> None:
    run = TinyRun(accelerator, tmp_path)
    run.train(3)
    final = run.checkpoints.save(3, {"step": 3, "config": {"run": {"seed": 1}}})
    assert final == tmp_path / "checkpoint-3" and problems_of(final) == []
    names = {str(path.relative_to(final)) for path in final.rglob("*") if path.is_file()}
    assert names == {
        "manifest.json",
        "net/model.safetensors",
        "net_ema/config.json",
        "net_ema/model.safetensors",
        "optimizer.bin",
        "random_states_0.pkl",
        "trainer_state.json",
    }
    assert read_state(final) == {"step": 3, "config": {"run": {"seed": 1}}}
    losses = run.train(4)

    again = TinyRun(Accelerator(cpu=True), tmp_path)
    again.train(7)
    again.checkpoints.load(final)
    assert again.checkpoints.resumed_from == final and again.ema.updates == 3
    assert again.train(4) == losses
    for ours, theirs in zip(again.bare.parameters(), run.bare.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert all(torch.equal(a, b) for a, b in zip(again.ema.average, run.ema.average, strict=True))


def test_weights_of_another_network_are_refused(accelerator: Accelerator, tmp_path: Path) -> None:
    final = TinyRun(accelerator, tmp_path).checkpoints.save(3, {"step": 3})
    bare = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 5))
    checkpoints = Checkpoints(Accelerator(cpu=True), tmp_path, {"net": bare}, {}, None)
    with pytest.raises(CheckpointError) as raised:
        checkpoints.load(final)
    assert str(raised.value) == (
        f"{final} cannot be resumed: its net is another network than this run's (2 missing: 1.weight, 1.bias; "
        "2 unexpected: 2.bias, 2.weight). Set back what decides on it"
    )


def test_saving_leaves_the_weights_alone(accelerator: Accelerator, tmp_path: Path) -> None:
    run, other = TinyRun(accelerator, tmp_path), TinyRun(Accelerator(cpu=True), tmp_path / "other")
    losses = []
    for trained, saves in ((run, True), (other, False)):
        torch.manual_seed(1)
        for step in range(3):
            losses.append(trained.train(1)[0])
            if saves:
                trained.checkpoints.save(step, {})
    assert losses[:3] == losses[3:]


def break_safetensors(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(tensors: Any, path: Path) -> None:
        Path(path).write_bytes(b"half a file")
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(subject, "save_file", fail)


def break_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any, **settings: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", fail)


@pytest.mark.parametrize("break_", [break_safetensors, break_torch])
def test_a_full_disk_costs_one_checkpoint(
    accelerator: Accelerator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, break_: Callable
) -> None:
    run = TinyRun(accelerator, tmp_path, total_limit=1)
    older = run.checkpoints.save(1, {"step": 1})
    own = [p.detach().clone() for p in run.bare.parameters()]
    with monkeypatch.context() as patched:
        break_(patched)
        with pytest.raises(CheckpointError, match=r"the disk of .* is full .*: checkpoint-2 was not written"):
            run.checkpoints.save(2, {"step": 2})
    assert newest_valid(tmp_path) == older
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-1"]
    assert all(torch.equal(p, o) for p, o in zip(run.bare.parameters(), own, strict=True))
    run.checkpoints.save(2, {"step": 2})
    assert [path.name for path in listed(tmp_path)] == ["checkpoint-2"]


def kept(output_dir: Path) -> list[int]:
    return [step_of(path) for path in listed(output_dir)]


def test_rotation(accelerator: Accelerator, tmp_path: Path) -> None:
    unlimited = TinyRun(accelerator, tmp_path / "all")
    limited = TinyRun(Accelerator(cpu=True), tmp_path / "two", total_limit=2)
    for step in (8, 9, 10, 11):
        unlimited.checkpoints.save(step, {})
        limited.checkpoints.save(step, {})
    assert kept(tmp_path / "all") == [11, 10, 9, 8]
    assert kept(tmp_path / "two") == [11, 10]
    assert hidden(tmp_path / "two") == []


def test_rotation_counts_whole_ones_only(accelerator: Accelerator, tmp_path: Path) -> None:
    run = TinyRun(accelerator, tmp_path, total_limit=2)
    for step in (1, 2):
        make(tmp_path, step)
    (make(tmp_path, 3) / "optimizer.bin").unlink()
    fill(tmp_path / "checkpoint-4")
    (tmp_path / "checkpoint-best").mkdir()
    run.checkpoints.save(5, {})
    assert kept(tmp_path) == [
        5,
        4,
        3,
        2,
    ]  # 5 and 2 are the two whole ones; the damaged are evidence, not ours to delete
    assert (tmp_path / "checkpoint-best").exists()


def test_rotation_spares_the_one_resumed_from(accelerator: Accelerator, tmp_path: Path) -> None:
    TinyRun(accelerator, tmp_path).checkpoints.save(1, {"step": 1})
    run = TinyRun(Accelerator(cpu=True), tmp_path, total_limit=1)
    run.checkpoints.load(tmp_path / "." / "checkpoint-1")
    for step in (2, 3, 4):
        run.checkpoints.save(step, {})
        assert kept(tmp_path) == [step, 1]


def test_rotation_spares_the_newest_below_older_numbers(accelerator: Accelerator, tmp_path: Path) -> None:
    """Resumed from an early checkpoint, a run saves numbers below those of its former course."""
    for step in (1, 20, 30):
        make(tmp_path, step)
    run = TinyRun(accelerator, tmp_path, total_limit=1)
    run.checkpoints.save(2, {})
    assert 2 in kept(tmp_path) and problems_of(tmp_path / "checkpoint-2") == []


def test_latest_after_going_back(accelerator: Accelerator, tmp_path: Path) -> None:
    run = TinyRun(accelerator, tmp_path)
    for step in (5, 10, 15):
        run.checkpoints.save(step, {"step": step})
    back = TinyRun(Accelerator(cpu=True), tmp_path)
    back.checkpoints.load(tmp_path / "checkpoint-5")
    newest = back.checkpoints.save(7, {"step": 7})
    assert find(accelerator, tmp_path, "latest") == newest


@pytest.mark.parametrize("name", ["best", "abandoned-0-checkpoint-5"])
def test_a_renamed_checkpoint_may_be_resumed_from(accelerator: Accelerator, tmp_path: Path, name: str) -> None:
    run = TinyRun(accelerator, tmp_path)
    for step in (5, 10):
        run.checkpoints.save(step, {"step": step})
    (tmp_path / "checkpoint-5").rename(tmp_path / name)
    back = TinyRun(Accelerator(cpu=True), tmp_path)
    back.checkpoints.load(tmp_path / name)
    assert kept(tmp_path) == [] and (tmp_path / "abandoned-0-checkpoint-10").is_dir()


def test_courses_that_are_left_are_kept_apart(
    accelerator: Accelerator, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(2):
        run = TinyRun(Accelerator(cpu=True), tmp_path)
        for step in (5, 10):
            run.checkpoints.save(step, {"step": step})
        run.checkpoints.load(tmp_path / "checkpoint-5")
    assert kept(tmp_path) == [5]
    for number in range(2):
        assert problems_of(tmp_path / f"abandoned-{number}-checkpoint-10") == []
    aside = tmp_path / "abandoned-1-checkpoint-10"
    assert caplog.messages[-1] == f"checkpoint-10 is newer than what is resumed from: it is now {aside}"


def test_checkpoints_of_another_folder_are_left_alone(accelerator: Accelerator, tmp_path: Path) -> None:
    other = TinyRun(accelerator, tmp_path / "other")
    for step in (5, 10):
        other.checkpoints.save(step, {"step": step})
    TinyRun(Accelerator(cpu=True), tmp_path / "run").checkpoints.load(tmp_path / "other" / "checkpoint-5")
    assert kept(tmp_path / "other") == [10, 5]


def test_a_kill_while_rotating_leaves_a_whole_checkpoint(
    accelerator: Accelerator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for call in range(1, 100):
        output_dir = tmp_path / str(call)
        run = TinyRun(Accelerator(cpu=True), output_dir, total_limit=1)
        for step in (1, 2):
            make(output_dir, step)
        newest = make(output_dir, 3)
        with monkeypatch.context() as patched:
            kill_at(call, patched)
            try:
                run.checkpoints._rotate(newest)
                finished = True
            except Killed:
                finished = False
        assert find(accelerator, output_dir, "latest") == newest and hidden(output_dir) == []
        assert all(problems_of(path) == [] for path in listed(output_dir))
        if finished:
            break
    assert finished and call > 4 and kept(output_dir) == [3]


def test_latest_without_whole_checkpoints(
    accelerator: Accelerator, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    assert find(accelerator, tmp_path, "latest") is None
    damaged = make(tmp_path, 5)
    (damaged / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="every checkpoint in .* is damaged .*: restore one, or start afresh"):
        find(accelerator, tmp_path, "latest")
    assert f"{damaged} is passed over: it has no manifest.json" in caplog.text
