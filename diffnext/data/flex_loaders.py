"""The original's loader: the same batches in the same order, in one process.

Training reads through `common.data`, whose order does not depend on the number of processes; this loader is for scripts
that were written for the original, and to compare runs with it.
"""

from pathlib import Path
from typing import Any, Self

import numpy as np

from diffnext.data.annotations import parse_annotation, parse_latents
from diffnext.data.reader import check_partitions, reader_order
from diffnext.data.records import RecordDataset


class FeatureDataLoader:
    """Batches without end; an iterator that is also called, each time for a list of one batch.

    A batch has `latents`, float16 (B, 2C, [T,] H, W), `prompt`, a list of strings, of float16 (l, token_dim) or of
    labels, and, where the records have `flow`, `motion_flow`, a list of numbers.

    Args:
        dataset: folder of records.
        batch_size: B.
        seed: the order follows from seed + shard_id; the choice of captions from a generator per worker.
        shuffle: within a window of `initial_fill` records.
        shard_id, num_shards: rank and number of ranks, each of which reads its part.
        num_workers: record k draws from generator k mod num_workers, as if that many processes shared the work.
        initial_fill, stick_to_partition: see `diffnext.data.reader.reader_order`.
        ignored: `queue_depth`, `prefetch_count`, ...: nothing is read ahead.

    Raises:
        ValueError: there are so few records that a rank would get none.
    """

    def __init__(
        self,
        dataset: str | Path,
        *,
        batch_size: int = 1,
        seed: int = 1337,
        shuffle: bool = True,
        shard_id: int = 0,
        num_shards: int = 1,
        num_workers: int = 1,
        initial_fill: int = 1024,
        stick_to_partition: bool = True,
        **ignored: Any,
    ):
        self.records, self.batch_size = RecordDataset(dataset), batch_size
        check_partitions(dataset, len(self.records), num_shards)
        reader_seed, first_worker = seed + shard_id, seed + shard_id * num_workers
        self._order = enumerate(
            reader_order(
                len(self.records), num_shards, shard_id, reader_seed, initial_fill, shuffle, stick_to_partition
            )
        )
        self._draws = [np.random.RandomState(first_worker + i) for i in range(num_workers)]

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> list[dict[str, Any]]:
        examples = [self._example() for _ in range(self.batch_size)]
        batch = {key: [example[key] for example in examples] for key in examples[0]}
        return [{**batch, "latents": np.stack(batch["latents"])}]  # (B, 2C, [T,] H, W)

    __call__ = next = __next__

    def _example(self) -> dict[str, Any]:
        number, index = next(self._order)
        inputs = self.records[index]
        draw, label = self._draws[number % len(self._draws)].uniform, inputs.get("label")
        prompt = parse_annotation(inputs.get("caption", ""), inputs.get("text", ""), label, draw)
        example = {"latents": parse_latents(inputs), "prompt": prompt if label is None else label}
        return {**example, "motion_flow": inputs["flow"]} if "flow" in inputs else example
