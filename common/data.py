"""Sample numbering: data order, augmentation and random draws as functions of (seed, sample number); the loader.

Samples of a run are numbered 0, 1, 2, ... in the order in which the optimizer consumes them. Optimizer step k takes the
numbers k G ... (k + 1) G - 1, G being the global batch: processes x accumulation x batch size. Nothing else decides
which item a sample is or what is drawn for it: resume needs no loader state, and the number of processes is free.
"""

import atexit
import dataclasses
import itertools
import json
import multiprocessing
import os
import queue
import signal
import threading
import zlib
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

Draws = TypeVar("Draws", bound=Any)
Read = TypeVar("Read")

MAX_REPLACEMENTS = 20  # draws of another item for one unreadable one, before giving up
MAX_LOADER_FAILURES = 3
BAD_SAMPLE_ERRORS = (OSError, ValueError)
HOST_KEYS = ("sample_number", "item")  # of a batch; reading them back from a GPU would wait for all its work


# Draws ----------------------------------------------------------------------------------------------------------------


def rng_for(seed: int, purpose: str, *numbers: int) -> np.random.Generator:
    """An independent generator for every (seed, purpose, numbers), the same on every process and machine."""
    key = (zlib.crc32(purpose.encode()), *(int(n) for n in numbers))
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(entropy=seed, spawn_key=key)))


def on_device(draws: Draws, device: torch.device) -> Draws:
    """A dataclass whose tensors, drawn on the CPU, are on `device`; other values stay.

    They are copied out of pinned memory, so that the host need not wait for what a GPU still has to do.
    """

    def sent(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return (value.pin_memory() if device.type == "cuda" else value).to(device, non_blocking=True)

    return dataclasses.replace(draws, **{name: sent(value) for name, value in vars(draws).items()})


def draw_normal(seed: int, purpose: str, sample_numbers: Sequence[int], shape: Sequence[int]) -> Tensor:
    """Standard normal float32 on the CPU, (B, *shape), a row per sample number."""
    rows = [rng_for(seed, purpose, n).standard_normal(tuple(shape), dtype=np.float32) for n in sample_numbers]
    return torch.from_numpy(np.stack(rows))


def draw_uniform(seed: int, purpose: str, sample_numbers: Sequence[int], shape: Sequence[int] = ()) -> Tensor:
    """Uniform float32 in [0, 1) on the CPU, (B, *shape), a row per sample number."""
    rows = [rng_for(seed, purpose, n).random(tuple(shape), dtype=np.float32) for n in sample_numbers]
    return torch.from_numpy(np.stack(rows))


def draw_integers(
    seed: int, purpose: str, sample_numbers: Sequence[int], low: int, high: int, shape: Sequence[int] = ()
) -> Tensor:
    """Uniform int64 in [low, high) on the CPU, (B, *shape), a row per sample number."""
    rows = [rng_for(seed, purpose, n).integers(low, high, tuple(shape)) for n in sample_numbers]
    return torch.from_numpy(np.stack(rows))


# Order ----------------------------------------------------------------------------------------------------------------


class SamplePlan:
    """Which item of the data set each sample number is.

    Without groups, every epoch is one seeded permutation of all items, and global batches run across epoch ends. With
    groups (aspect buckets, say), each global batch holds items of one group: in every cycle of `num_items` batches a
    group of n items gets n batches, in seeded order, and walks through its own seeded permutations.

    Args:
        num_items: items of the data set.
        seed: of the order.
        global_batch: samples of one optimizer step.
        groups: a label per item, where a batch must be homogeneous.
    """

    def __init__(self, num_items: int, seed: int, global_batch: int, groups: Sequence[Any] | None = None):
        if num_items < 1:
            raise ValueError("the data set is empty: there is nothing to train on")
        if groups is not None and len(groups) != num_items:
            raise ValueError(f"there are {len(groups)} group labels for {num_items} items")
        self.num_items, self.seed, self.global_batch = num_items, seed, global_batch
        self._recent: dict[int, dict[int, np.ndarray]] = {}  # per group its last two permutations
        labels = sorted(set(groups)) if groups is not None else [None]
        every = range(num_items)
        self.members = [
            np.array([i for i in every if groups is None or groups[i] == label], dtype=np.int64) for label in labels
        ]

    def _permutation(self, group: int, round_: int) -> np.ndarray:
        recent, members = self._recent.setdefault(group, {}), self.members[group]
        if round_ not in recent:
            while len(recent) > 1:
                del recent[min(recent)]
            recent[round_] = members[rng_for(self.seed, "order", group, round_).permutation(len(members))]
        return recent[round_]

    @lru_cache(maxsize=2)  # noqa: B019 (one plan lives as long as the run)
    def _cycle(self, cycle: int) -> tuple[np.ndarray, np.ndarray]:
        """Group of every batch of a cycle, and how many batches of that group came before it in the cycle."""
        group = np.repeat(np.arange(len(self.members)), [len(m) for m in self.members])
        group = group[rng_for(self.seed, "group order", cycle).permutation(self.num_items)]
        before = np.empty_like(group)
        for g in range(len(self.members)):
            before[group == g] = np.arange((group == g).sum())
        return group, before

    def batch(self, first_sample: int) -> np.ndarray:
        """Items of the global batch that starts at `first_sample`: int64 (G,)."""
        if len(self.members) == 1:
            group, start = 0, first_sample
        else:
            cycle, position = divmod(first_sample // self.global_batch, self.num_items)
            groups, before = self._cycle(cycle)
            group = int(groups[position])
            start = (cycle * len(self.members[group]) + int(before[position])) * self.global_batch
        size = len(self.members[group])
        numbers = range(start, start + self.global_batch)
        return np.array([self._permutation(group, n // size)[n % size] for n in numbers])

    def replacement(self, item: int, sample_number: int, attempt: int) -> int:
        """Another item of the same group, for one that cannot be read."""
        members = next(m for m in self.members if item in m)
        return int(members[rng_for(self.seed, "replacement", sample_number, attempt).integers(len(members))])


# Loading --------------------------------------------------------------------------------------------------------------


class SampleSource(Protocol):
    """A data set as trainers write it."""

    def __len__(self) -> int: ...

    def sample(self, index: int, rng: np.random.Generator) -> dict[str, Any]:
        """Arrays of one item; `rng` makes every random choice. Unreadable: OSError or ValueError naming the file."""
        ...

    def files_of(self, index: int) -> Sequence[Path]:
        """The files that an item is read from."""
        ...


def collate(samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Arrays are stacked to tensors (B, ...), numbers become a tensor (B,), everything else a list."""
    batch: dict[str, Any] = {}
    for key, first in samples[0].items():
        values = [sample[key] for sample in samples]
        if isinstance(first, (np.ndarray, np.generic)):
            batch[key] = torch.from_numpy(np.stack(values))
        elif isinstance(first, Tensor):
            batch[key] = torch.stack(values)
        elif isinstance(first, (bool, int, float)):
            batch[key] = torch.tensor(values)
        else:
            batch[key] = values
    return batch


def read_ahead(
    read: Callable[[int], Read], indices: Iterable[int], num_threads: int
) -> Generator[tuple[int, "Future[Read]"]]:
    """(index, the future of read(index)) in order; while one is used, `num_threads` threads read the next ones.

    For reading beside the loader, in the training process: the death of a loader process started by the main thread
    would be raised anywhere in it.
    """
    waiting: deque[tuple[int, Future[Read]]] = deque()
    with ThreadPoolExecutor(max(1, num_threads)) as pool:
        for index in indices:
            waiting.append((index, pool.submit(read, index)))
            if len(waiting) > num_threads:
                yield waiting.popleft()
        yield from waiting


class _Numbered(Dataset):
    """Reads (sample number, item) pairs; an unreadable item is replaced, and the replacement reported."""

    def __init__(self, source: SampleSource, plan: SamplePlan, seed: int):
        self.source, self.plan, self.seed = source, plan, seed
        self.forbidden: set[int] = set()  # items that kill or hang the process that reads them

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        number, item = key
        bad = []
        for attempt in range(MAX_REPLACEMENTS):
            if item in self.forbidden:
                item = self.plan.replacement(item, number, attempt)
                continue
            try:
                sample = self.source.sample(item, rng_for(self.seed, "augmentation", number))
                return {**sample, "sample_number": number, "item": item, "_bad": bad}
            except BAD_SAMPLE_ERRORS as error:
                files = [str(path) for path in self.source.files_of(item)]
                bad.append({"item": item, "files": files, "reason": f"{type(error).__name__}: {error}"})
                item = self.plan.replacement(item, number, attempt)
        reasons = "; ".join(sorted({record["reason"] for record in bad})[:3])
        raise RuntimeError(
            f"{MAX_REPLACEMENTS} items in a row could not be read for sample {number}, so the data set itself must be "
            f"wrong: {reasons}"
        )


class _MicroBatches:
    """Keys of this process's micro-batches, from one optimizer step to another."""

    def __init__(self, plan: SamplePlan, micro_batch: int, rank: int, world_size: int, first_sample: int, steps: int):
        self.plan, self.micro_batch, self.rank, self.world_size = plan, micro_batch, rank, world_size
        self.first_sample, self.steps = first_sample, steps
        self.skipped = 0  # micro-batches that were delivered before the loader had to start again

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return itertools.islice(self._all(), self.skipped, None)

    def _all(self) -> Iterator[list[tuple[int, int]]]:
        per_round = self.micro_batch * self.world_size
        for step in range(self.steps):
            first = self.first_sample + step * self.plan.global_batch
            items = self.plan.batch(first)
            for start in range(self.rank * self.micro_batch, self.plan.global_batch, per_round):
                yield [(first + i, int(items[i])) for i in range(start, start + self.micro_batch)]


class SampleLoader:
    """This process's micro-batches in the order of the sample numbers.

    An item that cannot be read is recorded and replaced. With `num_workers` > 0 that holds even for one that kills the
    process that reads it, or keeps it busy for more than `sample_timeout_s`.

    Args:
        source: the data set.
        plan: the order; its global batch must be `micro_batch` x `world_size` x accumulation.
        micro_batch: samples of this process per micro-batch.
        sample_timeout_s: how long one item may take a loader process; 0 waits for ever.
        bad_samples_path: unreadable items are written here, once each, by all processes.
        max_bad_fraction: share of the items; `too_many_bad` tells when it is passed.
    """

    def __init__(
        self,
        source: SampleSource,
        plan: SamplePlan,
        *,
        micro_batch: int,
        rank: int,
        world_size: int,
        num_workers: int,
        bad_samples_path: Path,
        max_bad_fraction: float,
        sample_timeout_s: float = 0.0,
    ):
        self.plan, self.micro_batch, self.rank, self.world_size = plan, micro_batch, rank, world_size
        self.dataset = _Numbered(source, plan, plan.seed)
        self.num_workers, self.sample_timeout_s = num_workers, sample_timeout_s
        self.bad_samples_path, self.max_bad_items = bad_samples_path, max_bad_fraction * plan.num_items
        self.bad_items: set[int] = set()
        self._read_bad_items()

    @property
    def too_many_bad(self) -> bool:
        return len(self.bad_items) > self.max_bad_items

    def batches(self, first_sample: int, steps: int) -> Iterator[dict[str, Any]]:
        """Collated micro-batches on the CPU, with `sample_number` and `item` (B,), for that many optimizer steps."""
        keys = _MicroBatches(self.plan, self.micro_batch, self.rank, self.world_size, first_sample, steps)
        failures = 0
        while True:
            iterator: Any = iter(self._loader(keys))
            processes = set(getattr(iterator, "_workers", ()))
            _loader_processes.update(processes)
            try:
                for batch in iterator:
                    keys.skipped, failures = keys.skipped + 1, 0
                    for record in sum(batch.pop("_bad"), []):
                        self._note_bad(record)
                    yield batch
                return
            except RuntimeError as error:
                failures += 1
                if not _loader_process_failed(error):
                    raise
                if not self._forbid_culprits(keys) and failures >= MAX_LOADER_FAILURES:
                    raise RuntimeError(
                        f"loader processes failed {failures} times in a row, though every item can be read by itself "
                        f"({error}): the machine may be short of memory; lower data.num_workers"
                    ) from error
            finally:
                _kill(processes)  # one that hangs in a decoder would outlive the run

    def _loader(self, keys: _MicroBatches) -> DataLoader:
        return DataLoader(
            self.dataset,
            batch_sampler=keys,  # type: ignore[arg-type]  (any iterable of key lists will do)
            num_workers=self.num_workers,
            collate_fn=collate,
            pin_memory=torch.cuda.is_available(),
            timeout=self.sample_timeout_s * self.micro_batch if self.num_workers else 0,
            worker_init_fn=_leave_signals_to_the_main_process,
            generator=torch.Generator(),  # torch draws a seed from it that nothing uses: not from the global one
        )

    def _forbid_culprits(self, keys: _MicroBatches) -> bool:
        """Reads what the loader processes had before them, each item in a process of its own; True if one failed."""
        in_flight = list(itertools.islice(keys, 2 * self.num_workers + 1))
        found = False
        for number, item in sum(in_flight, []):
            if item in self.dataset.forbidden:
                continue
            reason = _fatal_reason(self.dataset, (number, item), self.sample_timeout_s)
            if reason:
                files = [str(path) for path in self.dataset.source.files_of(item)]
                self._note_bad({"item": item, "files": files, "reason": reason, "forbidden": True})
                found = True
        return found

    def _note_bad(self, record: dict[str, Any]) -> None:
        self._read_bad_items()
        if record["item"] in (self.dataset.forbidden if record.get("forbidden") else self.bad_items):
            return
        self.bad_samples_path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.bad_samples_path, "ab+") as file:  # one short line per write: processes do not interleave
            is_torn = file.tell() > 0 and (file.seek(-1, os.SEEK_END), file.read(1))[1] != b"\n"
            file.write((b"\n" if is_torn else b"") + json.dumps(record).encode() + b"\n")
        self._remember(record)

    def _read_bad_items(self) -> None:
        """What all processes have found so far, and earlier starts of this run."""
        for record in _read_json_lines(self.bad_samples_path):
            if not (isinstance(record, dict) and isinstance(record.get("item"), int)):
                continue  # what a crash left of a line
            self._remember(record)

    def _remember(self, record: dict[str, Any]) -> None:
        self.bad_items.add(record["item"])
        if record.get("forbidden"):
            self.dataset.forbidden.add(record["item"])


_loader_processes: set[Any] = set()


def _kill(processes: set[Any]) -> None:
    """Loader processes hold nothing worth saving, and SIGTERM does not reach them."""
    for process in list(processes):
        process.kill()
        _loader_processes.discard(process)


# Registered after that of multiprocessing, so called before it, which would wait for them.
atexit.register(_kill, _loader_processes)


def _leave_signals_to_the_main_process(worker: int) -> None:
    """Schedulers signal every process, but the main one still needs its batches to finish the step and save."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


def _loader_process_failed(error: RuntimeError) -> bool:
    """A loader process died or was too slow, as torch words it (an exception that it raised has another text)."""
    text = str(error)
    return text.startswith(("DataLoader worker (pid", "DataLoader timed out"))


def _fatal_reason(dataset: _Numbered, key: tuple[int, int], timeout_s: float) -> str | None:
    """Why reading one sample ends its process; None if it returns or raises, as it should."""
    process = multiprocessing.get_context("fork").Process(target=_try_to_read, args=(dataset, key), daemon=True)
    process.start()
    process.join(timeout_s or None)
    if process.is_alive():
        process.kill()
        process.join()
        return f"reading it takes more than data.sample_timeout_s ({timeout_s:g} s)"
    if process.exitcode and process.exitcode < 0:
        return f"reading it ends the process with {signal.Signals(-process.exitcode).name}"
    return f"reading it ends the process with status {process.exitcode}" if process.exitcode else None


def _try_to_read(dataset: _Numbered, key: tuple[int, int]) -> None:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_DFL)  # the run's own handlers would only take note
    dataset[key]


class Fetcher:
    """Reads ahead in a thread, so that whoever waits for a batch can be told to stop waiting.

    The loader's processes are started by that thread, too: started by the main thread, torch would raise their death
    in whatever line the main thread happens to execute.
    """

    def __init__(self, batches: Iterator[dict[str, Any]], ahead: int = 1):
        self._queue: queue.Queue = queue.Queue(maxsize=ahead)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(batches,), daemon=True, name="fetch")
        self._thread.start()

    def _run(self, batches: Iterator[dict[str, Any]]) -> None:
        try:
            for batch in batches:
                if not self._put((batch, None)):
                    return
        except BaseException as error:  # noqa: BLE001 (raised again by `next`)
            self._put((None, error))

    def _put(self, entry: tuple) -> bool:
        while not self._closed.is_set():
            try:
                self._queue.put(entry, timeout=0.2)
                return True
            except queue.Full:
                continue
        return False

    def next(self, give_up: Callable[[], bool]) -> dict[str, Any] | None:
        """The next batch; None if `give_up()` becomes true before there is one."""
        while True:
            try:
                batch, error = self._queue.get(timeout=0.2)
            except queue.Empty:
                if give_up():
                    return None
                continue
            if error is not None:
                raise error
            return batch

    def close(self) -> None:
        """Ends the thread; batches that were read ahead are dropped."""
        self._closed.set()
        self._thread.join(timeout=5)  # torch aborts the process if this thread is ending loader processes at its exit


def _read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The records of a file of JSON lines; lines that a crash has torn are passed over."""
    records = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            records.append(json.loads(line))
        except ValueError:
            continue
    return records
