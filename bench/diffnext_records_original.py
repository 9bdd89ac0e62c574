"""Batches through the original's reader, for `diffnext_records.py`, in an environment that has codewithgpu.

    python diffnext_records_original.py FOLDER BATCH_SIZE NUM_BATCHES

Its DatasetReader shuffles and puts examples into a queue, from which this process makes arrays and stacks them. The
original's FeatureDataLoader does the same with one more queue between, so this is the least that it takes.
"""

import json
import multiprocessing
import sys
import time

import codewithgpu
import numpy as np


def main(folder: str, batch_size: int, num_batches: int) -> None:
    """Prints the seconds to the first batch, and the seconds per record after it."""
    queue = multiprocessing.Queue(2 * batch_size)
    started = time.perf_counter()
    reader = codewithgpu.DatasetReader(folder, queue, codewithgpu.RecordDataset, shuffle=True)
    reader.start()

    def batch() -> np.ndarray:
        examples = [queue.get() for _ in range(batch_size)]
        return np.stack([np.frombuffer(e["moments"], np.float16).reshape(e["shape"]) for e in examples])

    batch()
    first_s = time.perf_counter() - started
    for _ in range(3):  # what the queue had in store
        batch()
    started = time.perf_counter()
    for _ in range(num_batches):
        batch()
    record_s = (time.perf_counter() - started) / (num_batches * batch_size)
    reader.terminate()
    print(json.dumps({"first_s": first_s, "record_s": record_s}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
