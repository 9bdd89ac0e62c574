"""The order in which codewithgpu's DatasetReader delivers examples, and a reader process of its name."""

import multiprocessing
import signal
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np


def partition(size: int, num_partitions: int, partition_id: int) -> range:
    """Examples of one of `num_partitions` readers: ceil(size / num_partitions) in a row, fewer or none at the end."""
    length = -(-size // num_partitions)
    return range(size)[partition_id * length : (partition_id + 1) * length]


def starved_partitions(size: int, num_partitions: int) -> list[int]:
    """Readers for whom no example is left; the original waits for their batches for ever."""
    return [i for i in range(num_partitions) if not partition(size, num_partitions, i)]


def check_partitions(path: str | Path, size: int, num_partitions: int) -> None:
    """Raises ValueError, the same on every rank, if one of them would get no example."""
    starved = starved_partitions(size, num_partitions)
    if starved:
        each = -(-size // num_partitions)
        raise ValueError(
            f"{path} has {size} examples; split over {num_partitions} ranks, {each} in a row for each, none is left "
            f"for rank {', '.join(map(str, starved))}. Write a multiple of {num_partitions} examples (the same ones "
            "several times will do), or start fewer processes"
        )


def reader_order(
    size: int,
    num_partitions: int = 1,
    partition_id: int = 0,
    seed: int = 1337,
    initial_fill: int = 1024,
    shuffle: bool = False,
    stick_to_partition: bool = True,
) -> Iterator[int]:
    """Indices of the examples that a reader delivers, without end.

    `initial_fill` examples are held back; one of them, which belongs to the oldest epoch, is drawn each time and the
    next one read takes its place. So every epoch comes whole and without repetition, shuffled within a window.

    Args:
        stick_to_partition: otherwise each epoch reads the next partition, the first one that after `partition_id`.

    Raises:
        ValueError: a partition that is to be read is empty.
    """
    if initial_fill < 1:
        raise ValueError(f"initial_fill is {initial_fill}: at least one example has to be held back")
    if not partition(size, num_partitions, partition_id) or not stick_to_partition:
        check_partitions("the data set", size, num_partitions)
    draws = np.random.RandomState(seed)
    source = _read_round(size, num_partitions, partition_id, stick_to_partition)
    epochs = deque([[0, 0]])  # [start, end) of what is held back, counted from the first example read

    def read() -> int:
        index, ends_epoch = next(source)
        epochs[-1][1] += 1
        if ends_epoch:
            epochs.append([epochs[-1][1]] * 2)
        return index

    held = [read() for _ in range(initial_fill)]
    while True:
        if epochs[0][0] == epochs[0][1]:
            epochs.popleft()
        start, end = epochs[0]
        chosen = start + draws.randint(0, end - start) if shuffle else start
        yield held[chosen % initial_fill]
        held[chosen % initial_fill] = held[start % initial_fill]
        epochs[0][0] += 1
        held[start % initial_fill] = read()


def _read_round(size: int, num_partitions: int, partition_id: int, stick: bool) -> Iterator[tuple[int, bool]]:
    """(index, whether it is the last of its epoch), without end."""
    while True:
        partition_id = partition_id if stick else (partition_id + 1) % num_partitions
        indices = partition(size, num_partitions, partition_id)
        for index in indices:
            yield index, index == indices[-1]


class DatasetReader(multiprocessing.Process):
    """A process that puts examples into a queue, without end, in the original's order.

    Indices wait in the shuffle buffer, not examples: memory is bounded by the queue.

    Args:
        path: the data set.
        output_queue: whatever has a method `put`.
        dataset_getter: makes a data set with `len` and `[i]` of the path, `RecordDataset` for one.
        partition_id, num_partitions, stick_to_partition, shuffle, initial_fill, seed: see `reader_order`.

    Raises:
        ValueError: a rank would get no example.
    """

    def __init__(
        self,
        path: str | Path,
        output_queue: Any,
        dataset_getter: Callable[[Any], Any],
        partition_id: int = 0,
        num_partitions: int = 1,
        stick_to_partition: bool = True,
        shuffle: bool = False,
        initial_fill: int = 1024,
        seed: int = 1337,
        **ignored: Any,
    ):
        super().__init__(daemon=True)
        self.path, self.output_queue, self.dataset_getter = path, output_queue, dataset_getter
        check_partitions(path, len(dataset_getter(path)), num_partitions)
        self._order = (num_partitions, partition_id, seed, initial_fill, shuffle, stick_to_partition)

    def run(self) -> None:
        """What the process does."""
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a handler of the parent's might only take note
        dataset = self.dataset_getter(self.path)
        for index in reader_order(len(dataset), *self._order):
            self.output_queue.put(dataset[index])
