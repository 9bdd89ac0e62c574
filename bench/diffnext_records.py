"""Reading cached latents: our batches against codewithgpu's reader and against a plain read of the same bytes.

    python bench/diffnext_records.py [--num_mib 256] [--turns 5]

They take turns within one run, all of them with the files in the page cache. `ours` is the data set and the collation
of a training run: shuffled, checked, float16, with a text. `our loader` is what a run without loader processes reads
through, which also makes a generator for every sample. codewithgpu is installed with pip into an environment of its own
below a temporary folder; without it, its column is left out.
"""

import argparse
import json
import statistics
import subprocess
import tempfile
import time
import venv
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common.data import SampleLoader, SamplePlan, collate
from diffnext.data.dataset import Records
from diffnext.data.records import RecordWriter

BATCH_SIZE = 16
SHAPES = {"256 KiB, images of 8 x 128 x 128": (8, 128, 128), "810 KiB, videos of 8 x 9 x 60 x 96": (8, 9, 60, 96)}
COMPARED = (
    ("ours", "original"),
    ("our loader", "original"),
    ("our first batch", "original's first batch"),
    ("ours", "plain read"),
    ("our loader", "plain read"),
)
FEATURES = {"moments": "bytes", "caption": "string", "text": "string", "shape": ["int64"], "flow": "float64"}
REQUIREMENTS = ("protobuf==3.20.3", "codewithgpu==0.2.8", "numpy", "requests")


def write(folder: Path, shape: tuple[int, ...], num_bytes: int) -> None:
    """A data set as the guide's snippets write it."""
    folder.mkdir()
    moments = np.random.default_rng(0).standard_normal(shape, dtype=np.float32).astype(np.float16).tobytes()
    texts = {"caption": "A long caption of many words. " * 10, "text": "a short text"}
    with RecordWriter(folder, dict(FEATURES)) as writer:
        for _ in range(num_bytes // len(moments) // BATCH_SIZE * BATCH_SIZE):
            writer.write({"shape": shape, "moments": moments, **texts, "flow": 5})


def seconds_of_plain_read(folder: Path, num_records: int) -> float:
    """Per record, read in order, as much at a time as a batch has, each time into new memory."""
    path = folder / "00000.data"
    batch_bytes = path.stat().st_size // num_records * BATCH_SIZE
    started = time.perf_counter()
    with open(path, "rb") as file:
        while np.fromfile(file, np.uint8, batch_bytes).size:
            pass
    return (time.perf_counter() - started) / num_records


def seconds_of_ours(folder: Path) -> tuple[float, float]:
    """To the first batch (opening, checking, scanning), and per record of one epoch."""
    started = time.perf_counter()
    records = Records(folder, latent_channels=4, needs_flow=True)
    records.check()
    plan = SamplePlan(len(records), 0, BATCH_SIZE, records.groups())
    rng = np.random.default_rng(0)

    def batch(number: int) -> dict[str, Any]:
        return collate([records.sample(int(item), rng) for item in plan.batch(number * BATCH_SIZE)])

    assert batch(0)["moments"].dtype == torch.float16, "a batch that is not ready for training"
    first_s = time.perf_counter() - started
    num_batches = len(records) // BATCH_SIZE
    started = time.perf_counter()
    for number in range(num_batches):
        batch(number)
    return first_s, (time.perf_counter() - started) / (num_batches * BATCH_SIZE)


def seconds_of_our_loader(folder: Path) -> float:
    """Per record of one epoch."""
    records = Records(folder, latent_channels=4, needs_flow=True)
    loader = SampleLoader(
        records,
        SamplePlan(len(records), 0, BATCH_SIZE, records.groups()),
        micro_batch=BATCH_SIZE,
        rank=0,
        world_size=1,
        num_workers=0,
        bad_samples_path=folder / "bad_samples.jsonl",
        max_bad_fraction=0,
    )
    num_batches = len(records) // BATCH_SIZE
    started = time.perf_counter()
    for _ in loader.batches(0, num_batches):
        pass
    return (time.perf_counter() - started) / (num_batches * BATCH_SIZE)


def make_environment(folder: Path) -> Path | None:
    """A Python that has codewithgpu; None, with the reason printed, if it cannot be installed."""
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    done = subprocess.run([python, "-m", "pip", "install", "-q", *REQUIREMENTS], capture_output=True, text=True)
    if done.returncode:
        print(f"codewithgpu is left out, pip cannot install it: {done.stderr.strip().splitlines()[-1]}")
        return None
    return python


def seconds_of_original(python: Path, folder: Path, num_batches: int) -> tuple[float, float]:
    """To the first batch, and per record after it."""
    script = Path(__file__).with_name("diffnext_records_original.py")
    command = [python, script, folder, str(BATCH_SIZE), str(num_batches)]
    result = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return result["first_s"], result["record_s"]


def measure(python: Path | None, folder: Path, num_turns: int) -> None:
    """Prints the speeds of some turns, and the ratios within them: median, least and most."""
    num_records = len(Records(folder, latent_channels=4))
    record_bytes = (folder / "00000.data").stat().st_size / num_records
    seconds: dict[str, list[float]] = {}
    for _ in range(num_turns):
        found = {"plain read": seconds_of_plain_read(folder, num_records)}
        found["our first batch"], found["ours"] = seconds_of_ours(folder)
        found["our loader"] = seconds_of_our_loader(folder)
        if python:
            found["original's first batch"], found["original"] = seconds_of_original(
                python, folder, num_records // BATCH_SIZE
            )
        for name, value in found.items():
            seconds.setdefault(name, []).append(value)
    for name, values in seconds.items():
        median_s = statistics.median(values)
        speed = "" if "first" in name else f", {record_bytes / median_s / 2**20:7.0f} MiB/s"
        print(f"  {name:24}{median_s * 1e6:12.1f} us{speed}")
    for better, other in COMPARED:
        if other in seconds:
            ratios = sorted(b / a for a, b in zip(seconds[better], seconds[other], strict=True))
            middle = statistics.median(ratios)
            print(f"  {better} over {other}: {middle:.2f} times as fast ({ratios[0]:.2f} to {ratios[-1]:.2f})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_mib", type=int, default=256, help="size of each data set")
    parser.add_argument("--turns", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        python = make_environment(Path(temporary) / "env")
        for name, shape in SHAPES.items():
            folder = Path(temporary) / "x".join(map(str, shape))
            write(folder, shape, args.num_mib * 2**20)
            print(f"{name}, batches of {BATCH_SIZE}:", flush=True)
            measure(python, folder, args.turns)


if __name__ == "__main__":
    main()
