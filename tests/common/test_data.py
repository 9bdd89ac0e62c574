"""Sample numbering: draws, order and loading as functions of (seed, sample number) alone."""

import copy
import json
import pickle
import subprocess
import sys
import threading
import tracemalloc
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from common import loop
from common.data import Fetcher, SampleLoader, SamplePlan, collate, draw_integers, draw_normal, draw_uniform, rng_for

# Draws ----------------------------------------------------------------------------------------------------------------


def test_draws_are_pinned() -> None:
    """A change of these numbers, by numpy say, changes every run: it must not go unnoticed."""
    assert rng_for(0, "noise", 0).integers(2**63, size=2).tolist() == [1333778976317401161, 2263634758717433353]
    assert rng_for(7, "order", 1, 2).random(2).tolist() == [0.6800799690209762, 0.49318373239236213]
    assert draw_normal(3, "noise", [0, 5], (2,)).tolist() == [
        [-1.1791129112243652, 0.21719296276569366],
        [-1.7900433540344238, 0.4471059739589691],
    ]
    assert draw_uniform(3, "t", [0, 1]).tolist() == [0.6722723841667175, 0.4604012370109558]
    assert draw_integers(3, "t", [0, 1, 2], 0, 1000).tolist() == [672, 460, 32]


def test_every_key_has_its_own_stream() -> None:
    keys = [
        (0, "a", 0),
        (0, "a", 1),
        (1, "a", 0),
        (0, "b", 0),
        (0, "a"),
        (0, "a", 0, 0),
        (0, "a", 0, 1),
        (0, "a", 1, 0),
    ]
    keys += [(2**40, "a", 0), (0, "a", 2**31), (1, "", 0), (0, "ä", 0)]
    draws = [tuple(rng_for(*key).integers(2**63, size=4).tolist()) for key in keys]
    assert len(set(draws)) == len(keys)
    assert draws == [tuple(rng_for(*key).integers(2**63, size=4).tolist()) for key in keys]
    assert rng_for(0, "a", np.int64(3)).random() == rng_for(0, "a", 3).random()


def test_neighbouring_streams_are_uncorrelated() -> None:
    noise = draw_normal(0, "noise", range(400), (64,))  # (400, 64)
    assert abs(noise.mean().item()) < 4 / np.sqrt(noise.numel())
    assert abs(noise.var().item() - 1) < 4 * np.sqrt(2 / noise.numel())
    neighbours = (noise[1:] * noise[:-1]).mean().item()
    other_seed = (noise * draw_normal(1, "noise", range(400), (64,))).mean().item()
    other_purpose = (noise * draw_normal(0, "latents", range(400), (64,))).mean().item()
    for correlation in (neighbours, other_seed, other_purpose):
        assert abs(correlation) < 4 / np.sqrt(noise.numel())
    uniform = draw_uniform(0, "t", range(2000))
    assert 0 <= uniform.min() and uniform.max() < 1 and abs(uniform.mean().item() - 0.5) < 4 / np.sqrt(12 * 2000)


@pytest.mark.parametrize(
    "draw",
    [
        lambda numbers: draw_normal(1, "x", numbers, (2, 3)),
        lambda numbers: draw_uniform(1, "x", numbers),
        lambda numbers: draw_integers(1, "x", numbers, -5, 900),
    ],
)
def test_a_draw_does_not_depend_on_its_batch(draw: Any) -> None:
    whole = draw(range(8))
    assert torch.equal(whole[[6, 1]], draw([6, 1]))
    assert torch.equal(whole[4:5], draw(torch.tensor([4]).tolist()))
    assert torch.equal(whole, torch.cat([draw([n]) for n in range(8)]))


def test_kinds_of_draws() -> None:
    normal, uniform = draw_normal(0, "x", [1, 2], (3, 4)), draw_uniform(0, "x", [1, 2])
    integers = draw_integers(0, "x", range(500), 2, 5)
    assert (normal.shape, normal.dtype) == ((2, 3, 4), torch.float32)
    assert (uniform.shape, uniform.dtype) == ((2,), torch.float32)
    assert (integers.shape, integers.dtype) == ((500,), torch.int64)
    assert set(integers.tolist()) == {2, 3, 4}
    assert draw_normal(0, "x", [1], ()).shape == (1,)


# Order ----------------------------------------------------------------------------------------------------------------


def items(plan: SamplePlan, steps: int) -> list[int]:
    batches = [plan.batch(step * plan.global_batch) for step in range(steps)]
    assert all(batch.shape == (plan.global_batch,) and batch.dtype == np.int64 for batch in batches)
    return [int(item) for batch in batches for item in batch]


def test_the_order_is_pinned() -> None:
    assert items(SamplePlan(7, 5, 4), 2) == [5, 6, 0, 3, 2, 1, 4, 4]
    grouped = SamplePlan(7, 5, 2, list("aabbbab"))
    assert items(grouped, 7) == [4, 2, 5, 1, 3, 6, 6, 4, 0, 0, 1, 5, 3, 2]
    assert SamplePlan(7, 5, 2).replacement(3, 11, 0) == 2


@pytest.mark.parametrize(("num_items", "global_batch"), [(7, 4), (7, 7), (5, 12), (1, 3), (30, 1)])
def test_every_epoch_is_a_permutation_across_batches(num_items: int, global_batch: int) -> None:
    plan = SamplePlan(num_items, 3, global_batch)
    epochs = 6
    order = items(plan, -(-epochs * num_items // global_batch))
    rounds = [order[i * num_items : (i + 1) * num_items] for i in range(epochs)]
    assert all(sorted(round_) == list(range(num_items)) for round_ in rounds)
    if num_items > 5:
        assert len({tuple(round_) for round_ in rounds}) == epochs  # shuffled anew each time


def test_without_groups_the_global_batch_does_not_matter() -> None:
    orders = [items(SamplePlan(11, 9, size), 24 // size) for size in (1, 2, 3, 4, 6, 12)]
    assert all(order == orders[0] for order in orders)
    assert SamplePlan(11, 9, 4).batch(6).tolist() == orders[0][6:10]  # from any sample number on
    assert items(SamplePlan(11, 10, 4), 6) != orders[0]
    assert items(SamplePlan(11, 9, 4, ["one"] * 11), 6) == orders[0]  # one group is no group


@pytest.mark.parametrize("global_batch", [1, 3, 4, 16])
def test_batches_of_groups_are_homogeneous_and_fair(global_batch: int) -> None:
    groups = ["wide"] * 5 + ["tall"] * 2 + ["square"] + ["wide"] * 3
    plan = SamplePlan(len(groups), 0, global_batch, groups)
    cycles = 3
    order = items(plan, cycles * len(groups))
    labels = [groups[item] for item in order]
    batches = [labels[i : i + global_batch] for i in range(0, len(labels), global_batch)]
    assert all(len(set(batch)) == 1 for batch in batches)
    for cycle in range(cycles):
        part = slice(cycle * len(groups), (cycle + 1) * len(groups))
        assert Counter(batch[0] for batch in batches[part]) == Counter(groups)  # n batches for n items
        span = slice(part.start * global_batch, part.stop * global_batch)
        assert Counter(order[span]) == dict.fromkeys(range(len(groups)), global_batch)
    sequences = [tuple(batch[0] for batch in batches[c * len(groups) : (c + 1) * len(groups)]) for c in range(cycles)]
    assert len(set(sequences)) == cycles  # the groups are shuffled anew in each cycle
    wide = [item for item in order if groups[item] == "wide"]
    assert all(sorted(wide[i : i + 8]) == [0, 1, 2, 3, 4, 8, 9, 10] for i in range(0, len(wide), 8))


def test_a_plan_does_not_depend_on_what_was_asked_before() -> None:
    groups = [i % 3 for i in range(10)]
    plan = SamplePlan(10, 4, 6, groups)
    forward = [plan.batch(6 * step).tolist() for step in range(50)]
    fresh = SamplePlan(10, 4, 6, groups)
    assert [fresh.batch(6 * step).tolist() for step in reversed(range(50))] == forward[::-1]
    assert pickle.loads(pickle.dumps(plan)).batch(60).tolist() == forward[10]
    assert copy.deepcopy(plan).batch(66).tolist() == forward[11]


def test_a_replacement_stays_in_its_group() -> None:
    groups = [i % 3 for i in range(12)]
    plan = SamplePlan(12, 0, 4, groups)
    for item in range(12):
        drawn = [plan.replacement(item, number, attempt) for number in range(20) for attempt in range(3)]
        assert {groups[other] for other in drawn} == {groups[item]}
        assert len(set(drawn)) == 4  # any of the group, the item itself among them
    assert plan.replacement(1, 5, 0) == SamplePlan(12, 0, 99, groups).replacement(1, 5, 0)
    assert {SamplePlan(3, 0, 1).replacement(0, n, 0) for n in range(30)} == {0, 1, 2}


def test_an_empty_data_set_is_refused() -> None:
    with pytest.raises(ValueError, match="^the data set is empty: there is nothing to train on$"):
        SamplePlan(0, 0, 4)


@pytest.mark.parametrize("labels", [["a"], ["a"] * 4])
def test_one_label_per_item(labels: list[str]) -> None:
    with pytest.raises(ValueError, match=f"{len(labels)} group labels.* 3 items"):
        SamplePlan(3, 0, 2, labels)


def test_old_permutations_are_forgotten() -> None:
    num_items, epochs = 20_000, 20
    plan = SamplePlan(num_items, 0, num_items)
    tracemalloc.start()
    try:
        for epoch in range(epochs):
            plan.batch(epoch * num_items)
        kept_bytes, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert kept_bytes < 4 * 8 * num_items


# Loading --------------------------------------------------------------------------------------------------------------


class Source:
    """Item i is [i, a random number]; `bad` items cannot be read."""

    def __init__(self, num_items: int = 10, bad: tuple[int, ...] = (), error: type[Exception] = OSError):
        self.num_items, self.bad, self.error = num_items, bad, error

    def __len__(self) -> int:
        return self.num_items

    def files_of(self, index: int) -> list[Path]:
        return [Path(f"{index}.bin"), Path(f"{index}.txt")]

    def sample(self, index: int, rng: np.random.Generator) -> dict[str, Any]:
        if index in self.bad:
            raise self.error(f"{index}.bin is damaged")
        return {"x": np.array([index, rng.random()], dtype=np.float64), "name": f"item {index}", "index": index}


def loader(source: Source, folder: Path, plan: SamplePlan, **changed: Any) -> SampleLoader:
    arguments: dict[str, Any] = {"micro_batch": plan.global_batch, "rank": 0, "world_size": 1, "num_workers": 0}
    arguments |= {"bad_samples_path": folder / "new" / "bad.jsonl", "max_bad_fraction": 0.2} | changed
    return SampleLoader(source, plan, **arguments)


def read(batches: Any) -> list[tuple[int, int, float]]:
    """(sample number, item, augmentation), after a check of what a batch holds."""
    found = []
    for batch in batches:
        assert set(batch) == {"x", "name", "index", "sample_number", "item"}
        assert torch.equal(batch["index"], batch["item"]) and batch["item"].dtype == torch.int64
        assert batch["name"] == [f"item {item}" for item in batch["item"]]
        assert batch["x"].dtype == torch.float64 and batch["x"][:, 0].tolist() == batch["item"].tolist()
        found += zip(batch["sample_number"].tolist(), batch["item"].tolist(), batch["x"][:, 1].tolist(), strict=True)
    return found


@pytest.mark.parametrize(
    ("micro_batch", "world_size"), [(12, 1), (1, 1), (4, 3), (3, 2), (1, 4), (2, 6), (1, 12), (6, 1)]
)
def test_ranks_share_the_samples_of_a_step(tmp_path: Path, micro_batch: int, world_size: int) -> None:
    plan = SamplePlan(10, 0, 12)
    reference = read(loader(Source(), tmp_path, plan).batches(0, 3))
    assert [number for number, *_ in reference] == list(range(36))
    shares = []
    for rank in range(world_size):
        of_rank = loader(Source(), tmp_path, plan, micro_batch=micro_batch, rank=rank, world_size=world_size)
        batches = list(of_rank.batches(0, 3))
        assert len(batches) == 3 * 12 // (micro_batch * world_size)
        assert all(len(batch["item"]) == micro_batch for batch in batches)
        shares.append(read(batches))
        per_step = 12 // world_size
        steps = [{n // 12 for n, *_ in shares[-1][i : i + per_step]} for i in range(0, 3 * per_step, per_step)]
        assert steps == [{0}, {1}, {2}]
    assert sorted(sum(shares, [])) == reference  # each number once, with the same item and augmentation


def test_a_loader_starts_anywhere(tmp_path: Path) -> None:
    plan = SamplePlan(10, 0, 4)
    whole = read(loader(Source(), tmp_path, plan).batches(0, 6))
    assert read(loader(Source(), tmp_path, plan).batches(12, 3)) == whole[12:]
    assert read(loader(Source(), tmp_path, SamplePlan(10, 0, 6)).batches(12, 2)) == whole[12:]
    assert read(loader(Source(), tmp_path, plan).batches(4, 0)) == []


def test_workers_change_nothing(tmp_path: Path) -> None:
    plan = SamplePlan(10, 0, 4)
    source = Source(bad=(3,))
    alone = read(loader(source, tmp_path / "0", plan).batches(0, 8))
    assert read(loader(source, tmp_path / "2", plan, num_workers=2).batches(0, 8)) == alone
    records = [(tmp_path / name / "new" / "bad.jsonl").read_text() for name in ("0", "2")]
    assert records[0] == records[1] and records[0].count("\n") == 1


def test_workers_may_be_spawned(tmp_path: Path) -> None:
    """What a worker is sent survives the way that spawn and forkserver take."""
    dataset = loader(Source(bad=(0,)), tmp_path, SamplePlan(10, 0, 4, [0, 1] * 5)).dataset
    sent = pickle.loads(pickle.dumps(dataset))
    for key in ((0, 0), (3, 7)):
        ours, theirs = dataset[key], sent[key]
        np.testing.assert_array_equal(ours.pop("x"), theirs.pop("x"))
        assert ours == theirs


SIGNALLED = """
import multiprocessing, signal, subprocess, time
from pathlib import Path
import numpy as np
from common.data import SampleLoader, SamplePlan

class Source:
    def __len__(self):
        return 10

    def sample(self, index, rng):
        return {"x": np.zeros(2)}

def batches(steps):
    settings = {"rank": 0, "world_size": 1, "num_workers": 2, "bad_samples_path": Path("bad"), "max_bad_fraction": 0}
    return SampleLoader(Source(), SamplePlan(10, 0, 4), micro_batch=4, **settings).batches(0, steps)

signalled = batches(20)
read = len(next(signalled)["item"])
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
    for worker in multiprocessing.active_children():
        subprocess.run(["kill", f"-{int(number)}", str(worker.pid)], check=True)
time.sleep(0.3)
print("read", read + sum(len(batch["item"]) for batch in signalled), flush=True)
unfinished = batches(10**6)
next(unfinished)
print("ended", flush=True)  # workers that are still busy must not keep the process from its end
"""


def test_workers_leave_signals_to_the_main_process(tmp_path: Path) -> None:
    """SLURM, `timeout` and Ctrl-C signal workers too, while the main process finishes its step and saves."""
    command = [sys.executable, "-c", SIGNALLED]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "read 80\nended\n"), done.stderr


DEADLY = """
import os, signal, sys, time
from pathlib import Path
import numpy as np
from common.data import Fetcher, SampleLoader, SamplePlan

class Source:
    def __len__(self):
        return 10

    def files_of(self, index):
        return [Path(f"{index}.bin")]

    def sample(self, index, rng):
        if index == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        if index == 5:
            time.sleep(1000)
        if index == 7:
            raise OSError("damaged")
        return {"x": np.zeros(2)}

settings = {"rank": 0, "world_size": 1, "bad_samples_path": Path("bad.jsonl"), "max_bad_fraction": 0.3}
plan = SamplePlan(10, 0, 2)
loader = SampleLoader(Source(), plan, micro_batch=2, num_workers=2, sample_timeout_s=1, **settings)
fetcher = Fetcher(loader.batches(0, 10))
for _ in range(10):
    batch = fetcher.next(lambda: False)
    print(batch["sample_number"].tolist(), batch["item"].tolist(), flush=True)
fetcher.close()
fetcher._thread.join(10)  # a thread that is still ending torch's processes may abort the interpreter's end
print(sorted(loader.bad_items), loader.too_many_bad)
"""


def test_items_that_kill_or_hang_their_process_are_replaced(tmp_path: Path) -> None:
    command = [sys.executable, "-c", DEADLY]
    done = subprocess.run(command, capture_output=True, text=True, timeout=90, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    *batches, last = done.stdout.splitlines()
    plan = SamplePlan(10, 0, 2)
    expected = []
    for number, item in enumerate(items(plan, 10)):
        attempt = 0
        while item in (3, 5, 7):
            item, attempt = plan.replacement(item, number, attempt), attempt + 1
        expected.append(item)
    assert batches == [f"[{n}, {n + 1}] {expected[n : n + 2]}" for n in range(0, 20, 2)]
    assert last == "[3, 5, 7] False"
    records = [json.loads(line) for line in (tmp_path / "bad.jsonl").read_text().splitlines()]
    assert sorted((r["item"], r["files"], r["reason"]) for r in records) == [
        (3, ["3.bin"], "reading it ends the process with SIGKILL"),
        (5, ["5.bin"], "reading it takes more than data.sample_timeout_s (1 s)"),
        (7, ["7.bin"], "OSError: damaged"),
    ]


def test_a_fetcher_hands_on_batches_and_errors_in_order() -> None:
    def batches() -> Iterator[dict[str, Any]]:
        yield {"n": 1}
        yield {"n": 2}
        raise ValueError("the third cannot be read")

    fetcher = Fetcher(batches())
    assert [fetcher.next(lambda: False), fetcher.next(lambda: False)] == [{"n": 1}, {"n": 2}]
    with pytest.raises(ValueError, match="^the third cannot be read$"):
        fetcher.next(lambda: False)


def test_a_fetcher_may_be_given_up_and_closed() -> None:
    closed, go_on = threading.Event(), threading.Event()

    def batches() -> Iterator[dict[str, Any]]:
        try:
            go_on.wait(10)
            for number in range(1000):
                yield {"n": number}
        finally:
            closed.set()

    fetcher = Fetcher(batches())
    assert fetcher.next(lambda: True) is None
    go_on.set()
    assert fetcher.next(lambda: False) == {"n": 0}
    fetcher.close()
    assert closed.wait(5)  # the loader's processes end with it


def test_bad_samples_are_replaced_and_recorded_once(tmp_path: Path) -> None:
    plan = SamplePlan(10, 0, 5)
    source = Source(bad=(2, 7))
    subject = loader(source, tmp_path, plan, max_bad_fraction=0.2)
    found = read(subject.batches(0, 8))
    assert len(found) == 40 and not {2, 7} & {item for _, item, _ in found}
    good = read(loader(Source(), tmp_path / "good", plan).batches(0, 8))
    for ours, theirs in zip(found, good, strict=True):
        assert ours[0] == theirs[0] and ours[2] == theirs[2]  # a replacement has the augmentation of its number
        assert ours[1] == theirs[1] or theirs[1] in (2, 7)
    path = tmp_path / "new" / "bad.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert sorted(record["item"] for record in records) == [2, 7]
    assert {"item": 2, "files": ["2.bin", "2.txt"], "reason": "OSError: 2.bin is damaged"} in records
    assert subject.bad_items == {2, 7}
    assert not subject.too_many_bad  # two of ten are not more than a fifth
    assert not (tmp_path / "good" / "new").exists()


def test_bad_samples_are_recorded_once_over_restarts(tmp_path: Path) -> None:
    plan, source = SamplePlan(10, 0, 5), Source(bad=(2, 7))
    for start in (0, 40, 0):
        read(loader(source, tmp_path, plan).batches(start, 8))
    assert len((tmp_path / "new" / "bad.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize(
    ("bad", "limit", "too_many"), [((1,), 0.0, True), ((), 0.0, False), ((1, 2, 3), 0.2, True), ((1, 2, 3), 0.3, False)]
)
def test_the_limit_of_bad_samples(tmp_path: Path, bad: tuple[int, ...], limit: float, too_many: bool) -> None:
    subject = loader(Source(bad=bad), tmp_path, SamplePlan(10, 0, 5), max_bad_fraction=limit)
    assert not subject.too_many_bad
    read(subject.batches(0, 8))
    assert subject.too_many_bad is too_many


def test_the_message_says_how_to_go_on_after_repairs(tmp_path: Path) -> None:
    subject = loader(Source(bad=(1, 2, 3)), tmp_path, SamplePlan(10, 0, 5))
    read(subject.batches(0, 8))
    assert subject.too_many_bad
    assert "delete that file" in str(loop._too_many_bad(subject))
    subject.bad_samples_path.unlink()
    repaired = loader(Source(), tmp_path, SamplePlan(10, 0, 5))
    read(repaired.batches(40, 8))
    assert not repaired.too_many_bad


def test_bad_samples_are_recorded_and_counted_once_over_ranks(tmp_path: Path) -> None:
    plan = SamplePlan(10, 0, 4)
    ranks = [loader(Source(bad=(1, 2, 3)), tmp_path, plan, micro_batch=2, rank=rank, world_size=2) for rank in range(2)]
    for of_rank in ranks:  # one after the other: a race of two may write a line twice, this must not
        read(of_rank.batches(0, 10))
    records = [json.loads(line)["item"] for line in (tmp_path / "new" / "bad.jsonl").read_text().splitlines()]
    assert sorted(records) == [1, 2, 3]
    assert ranks[1].bad_items == {1, 2, 3}


@pytest.mark.parametrize("torn", ['{"item": 5, "fil', '{"item"', "{"])
def test_a_torn_record_is_passed_over(tmp_path: Path, torn: str) -> None:
    path = tmp_path / "new" / "bad.jsonl"
    path.parent.mkdir()
    path.write_text('{"item": 7, "files": [], "reason": "x"}\n' + torn)
    assert loader(Source(), tmp_path, SamplePlan(10, 0, 5)).bad_items == {7}


def test_a_record_after_a_torn_one_is_read(tmp_path: Path) -> None:
    path = tmp_path / "new" / "bad.jsonl"
    path.parent.mkdir()
    path.write_text('{"item": 5, "fil')
    plan = SamplePlan(10, 0, 5)
    read(loader(Source(bad=(2,)), tmp_path, plan).batches(0, 4))
    read(loader(Source(bad=(2,)), tmp_path, plan).batches(0, 4))
    assert [json.loads(line)["item"] for line in path.read_text().splitlines() if line.endswith("}")] == [2]


def test_a_record_torn_after_a_brace_is_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "new" / "bad.jsonl"
    path.parent.mkdir()
    path.write_text('{"item": 5, "files": [], "reason": "expected {x}')
    assert loader(Source(), tmp_path, SamplePlan(10, 0, 5)).bad_items == set()


def test_a_data_set_that_cannot_be_read_at_all(tmp_path: Path) -> None:
    subject = loader(Source(bad=tuple(range(10))), tmp_path, SamplePlan(10, 0, 5))
    with pytest.raises(RuntimeError) as raised:
        read(subject.batches(15, 1))
    sentence, reasons = str(raised.value).split(" must be wrong: ")
    assert sentence == "20 items in a row could not be read for sample 15, so the data set itself"
    assert len(reasons.split("; ")) == 3
    assert all(r.startswith("OSError: ") and r.endswith(".bin is damaged") for r in reasons.split("; "))


def test_only_unreadable_items_are_replaced(tmp_path: Path) -> None:
    for error in (FileNotFoundError, UnicodeError):  # an OSError, a ValueError
        assert len(read(loader(Source(bad=(2,), error=error), tmp_path, SamplePlan(10, 0, 5)).batches(0, 2))) == 10
    for error in (KeyError, RuntimeError, TypeError):
        with pytest.raises(error, match="2.bin is damaged"):
            read(loader(Source(bad=(2,), error=error), tmp_path, SamplePlan(10, 0, 5)).batches(0, 2))


# Batches --------------------------------------------------------------------------------------------------------------


def test_collate() -> None:
    first = {
        "image": np.zeros((2, 3), np.uint8),
        "mirrored": np.arange(4.0)[::-1],
        "tensor": torch.ones(2, dtype=torch.bfloat16),
        "scalar_array": np.array(3, np.int16),
        "count": 1,
        "share": 0.5,
        "flag": True,
        "caption": "a",
        "path": Path("a"),
        "nothing": None,
        "list": [1, 2],
    }
    second = {**first, "count": 2, "share": 1.5, "flag": False, "caption": "b", "tensor": torch.zeros(2).bfloat16()}
    batch = collate([first, second])
    assert list(batch) == list(first)
    assert (batch["image"].shape, batch["image"].dtype) == ((2, 2, 3), torch.uint8)
    assert batch["mirrored"].tolist() == [[3, 2, 1, 0]] * 2 and batch["mirrored"].dtype == torch.float64
    assert (batch["tensor"].tolist(), batch["tensor"].dtype) == ([[1, 1], [0, 0]], torch.bfloat16)
    assert (batch["scalar_array"].tolist(), batch["scalar_array"].dtype) == ([3, 3], torch.int16)
    assert (batch["count"].tolist(), batch["count"].dtype) == ([1, 2], torch.int64)
    assert (batch["share"].tolist(), batch["share"].dtype) == ([0.5, 1.5], torch.float32)
    assert (batch["flag"].tolist(), batch["flag"].dtype) == ([True, False], torch.bool)
    for name in ("caption", "path", "nothing", "list"):
        assert batch[name] == [first[name], second[name]]


@pytest.mark.parametrize("kind", [np.float32, np.int64, np.bool_])
def test_numbers_of_numpy_become_a_tensor(kind: type) -> None:
    batch = collate([{"n": kind(1)}, {"n": kind(0)}])
    assert torch.equal(batch["n"], torch.from_numpy(np.array([1, 0], kind)))


def test_samples_of_different_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="all input arrays must have the same shape"):
        collate([{"x": np.zeros(2)}, {"x": np.zeros(3)}])
