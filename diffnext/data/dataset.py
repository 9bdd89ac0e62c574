"""Records as a training run reads them."""

import hashlib
import json
import logging
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common.runtime import Processes
from diffnext.data.annotations import array_of, parse_annotation
from diffnext.data.records import METADATA, RecordDataset

NUM_CHECKED = 64  # records that `check` reads whole, spread over the data set
PREFETCHED = 256  # records whose first page the scan of shapes asks for at a time
PAGE_BYTES = 4096

ENCODED_TEXT = {"data": "BYTES", "shape": ["INT64"]}

logger = logging.getLogger(__name__)

Shape = tuple[int, ...]


@dataclass(frozen=True)
class PromptEmbed:
    """A text that was encoded before: float16 (l, token_dim). Lengths differ, so a batch holds a list of them."""

    values: np.ndarray


class Records:
    """Cached latents and texts of one or several folders of records: a `common.data.SampleSource`.

    Args:
        paths: folders; a string may name several, separated by commas.
        latent_channels: C of the autoencoder; moments have 2 C channels, means then log variances.
        latent_size: height and width of a latent that the model was made for; None takes any.
        text_token_dim: width of encoded texts.
        text_token_len: most tokens of an encoded text.
        needs_flow: videos must have the feature `flow`.

    Raises:
        FileNotFoundError, ValueError: a folder is no data set, lacks a feature, or does not go with the others.
    """

    def __init__(
        self,
        paths: str | Path | Sequence[str | Path],
        *,
        latent_channels: int,
        latent_size: tuple[int, int] | None = None,
        text_token_dim: int = 2560,
        text_token_len: int = 256,
        needs_flow: bool = False,
    ):
        named = paths.split(",") if isinstance(paths, str) else [paths] if isinstance(paths, Path) else paths
        folders = [str(path).strip() for path in named if str(path).strip()]
        if not folders:
            raise ValueError("no data set is named: give the folder that RecordWriter wrote, or several")
        self.sets = [RecordDataset(folder) for folder in folders]
        self.latent_channels, self.latent_size = latent_channels, latent_size
        self.text_token_dim, self.text_token_len, self.needs_flow = text_token_dim, text_token_len, needs_flow
        self._ends = np.cumsum([len(records) for records in self.sets]).tolist()
        for records in self.sets:
            _check_features(records)
        encoded = [records.features["caption"] == ENCODED_TEXT for records in self.sets]
        if len(set(encoded)) > 1:
            raise ValueError(
                f"texts are encoded in {self.sets[encoded.index(True)].path} and plain in "
                f"{self.sets[encoded.index(False)].path}: one run can read one kind alone"
            )
        self.has_encoded_text = encoded[0]

    def __len__(self) -> int:
        return self._ends[-1]

    def sample(self, index: int, rng: np.random.Generator) -> dict[str, Any]:
        """One item; `rng` chooses between its texts.

        Returns:
            moments: float16 (2C, H, W) or (2C, T, H, W), read-only: a view of the file, to be stacked or copied.
            prompt: string, or prompt_embed: `PromptEmbed`.
            flow: motion score, a number, where the records have it.

        Raises:
            ValueError: the record is damaged or not of the shape that this run needs; names file, record, offset.
        """
        records, position = self._locate(index)
        names = [name for name in ("shape", "moments", "caption", "text", "flow") if name in records.features]
        fields = records.fields(position, names)
        try:
            sample: dict[str, Any] = {"moments": self._moments(fields)}
            text = parse_annotation(fields["caption"], fields.get("text", ""), None, rng.random)
            if self.has_encoded_text:
                self._check_embed(text)
                sample["prompt_embed"] = PromptEmbed(text)
            else:
                sample["prompt"] = text
        except ValueError as error:
            raise ValueError(f"{records.describe(position)}: {error}") from None
        if "flow" in fields:
            sample["flow"] = float(fields["flow"])
        return sample

    def files_of(self, index: int) -> list[Path]:
        """The shard that an item lies in."""
        records, position = self._locate(index)
        return [records.shards[records.shard_of(position)]]

    def fingerprint(self) -> dict[str, Any]:
        """What the order and the items follow from, as plain values; latents themselves are not read."""
        return {"sets": [_fingerprint(records) for records in self.sets]}

    def sizes(self, first: int, end: int) -> tuple[np.ndarray, str | None]:
        """Latent frames (0 is an image), height and width of the items first ... end - 1, int32 (n, 3).

        Reads the beginnings of their records. One that cannot be read has zeros; why the first of them is the second
        value.
        """
        sizes, problem = np.zeros((end - first, 3), np.int32), None
        for number, (records, position) in enumerate(self._ahead(first, end)):
            try:
                shape = self._moments(records.fields(position, ("shape", "moments"))).shape
                sizes[number] = (0, *shape[1:])[-3:]
            except ValueError as error:
                problem = problem or f"{records.describe(position)}: {error}"
        return sizes, problem

    def check(self) -> None:
        """Looks for what would spoil a run: files that are cut off, and some records, read whole.

        Raises:
            ValueError: everything that was found, each naming the record.
        """
        problems = [problem for records in self.sets for problem in _cut_off(records)]
        rng = np.random.default_rng(0)
        odd_lengths = set()
        for index in np.unique(np.linspace(0, len(self) - 1, NUM_CHECKED, dtype=np.int64)) if len(self) else ():
            try:
                sample = self.sample(int(index), rng)
                problems += self._problems(int(index), sample)
                odd_lengths |= {n for n in sample["moments"].shape[1:-2] if n % 4 != 1}
            except ValueError as error:
                problems.append(str(error))
        if problems:
            shown = [*dict.fromkeys(problems)]
            more = f"\n... and {len(shown) - 10} more" if len(shown) > 10 else ""
            raise ValueError("the data set cannot be trained on:\n" + "\n".join(shown[:10]) + more)
        if odd_lengths:
            logger.warning(
                "videos of %s latent frames: OpenSora's VAE makes 4 k + 1 of 16 k + 1 frames, and drops what is over",
                sorted(odd_lengths),
            )

    def groups(self, processes: Processes | None = None) -> "Groups":
        """For `SamplePlan`; `processes` share the work of finding them."""
        return Groups(self, processes)

    def _problems(self, index: int, sample: Mapping[str, Any]) -> Iterator[str]:
        records, position = self._locate(index)
        if not np.isfinite(sample["moments"]).all():
            yield f"{records.describe(position)}: moments are not finite; was the autoencoder run in float16?"
        if self.needs_flow and sample["moments"].ndim == 4 and "flow" not in sample:
            yield (
                f"{records.describe(position)}: there is no feature `flow`, which a model with motion_embed needs; "
                'write it ("flow": "float64"; 5 is usual)'
            )

    def _moments(self, fields: Mapping[str, Any]) -> np.ndarray:
        """float16 (2C, [T,] H, W), checked."""
        shape = fields["shape"]
        if len(shape) not in (3, 4) or shape[0] != 2 * self.latent_channels or min(shape) < 1:
            wanted = f"({2 * self.latent_channels}, H, W) or ({2 * self.latent_channels}, T, H, W)"
            raise ValueError(
                f"shape is {tuple(shape)}, not {wanted}: means and log variances of {self.latent_channels} channels"
            )
        if self.latent_size is not None and tuple(shape[-2:]) != self.latent_size:
            raise ValueError(
                f"latents are {shape[-2]} x {shape[-1]}, the model takes {self.latent_size[0]} x "
                f"{self.latent_size[1]}: encode images of the size in the model's image_size"
            )
        return array_of(fields["moments"], shape, np.float16, "moments")

    def _check_embed(self, values: np.ndarray) -> None:
        if values.ndim != 2 or values.shape[1] != self.text_token_dim or len(values) > self.text_token_len:
            raise ValueError(
                f"an encoded text has the shape {values.shape}; the model takes at most {self.text_token_len} tokens "
                f"of {self.text_token_dim}"
            )

    def _locate(self, index: int) -> tuple[RecordDataset, int]:
        number = bisect_right(self._ends, index)
        if index < 0 or number == len(self.sets):
            raise IndexError(f"there are {len(self)} items, none with number {index}")
        return self.sets[number], index - (self._ends[number - 1] if number else 0)

    def _ahead(self, first: int, end: int) -> Iterator[tuple[RecordDataset, int]]:
        """The places of items; the first page of the next ones is on its way from the disk."""
        for start in range(first, end, PREFETCHED):
            places = [self._locate(index) for index in range(start, min(start + PREFETCHED, end))]
            for records, position in places:
                records.prefetch(position, PAGE_BYTES)
            yield from places


class Groups(Sequence[tuple[Shape, bool]]):
    """(Shape of moments, whether there is a flow) of every item, of which a batch must not mix two.

    They are found when first asked for, by all processes at once, each of which reads a share of the records. One that
    cannot be read counts as one of the most frequent shape; ValueError if none can.
    """

    def __init__(self, records: Records, processes: Processes | None):
        self.records, self.processes = records, processes

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: Any) -> Any:
        return self._labels[index]

    @cached_property
    def _labels(self) -> list[tuple[Shape, bool]]:
        processes = self.processes
        rank, num_processes = (processes.process_index, processes.num_processes) if processes else (0, 1)
        first, end = (len(self) * share // num_processes for share in (rank, rank + 1))
        sizes = np.zeros((len(self), 3), np.int32)  # (items, 3)
        sizes[first:end], problem = self.records.sizes(first, end)
        if processes:
            sizes = processes.reduce(torch.from_numpy(sizes).to(processes.device), "sum").cpu().numpy()
        kinds, kind_of, counts = np.unique(sizes, axis=0, return_inverse=True, return_counts=True)
        is_read = kinds.any(axis=1)  # (kinds,)
        if not is_read.any():
            raise ValueError(f"no record can be read; the first: {problem}")
        kinds[~is_read] = kinds[np.where(is_read, counts, 0).argmax()]
        channels = 2 * self.records.latent_channels
        shapes = [(channels, *[length for length in size if length]) for size in kinds.tolist()]  # no frames: an image
        has_flow = chain.from_iterable(["flow" in each.features] * len(each) for each in self.records.sets)
        return [(shapes[kind], flow) for kind, flow in zip(kind_of.ravel().tolist(), has_flow, strict=True)]


def _check_features(records: RecordDataset) -> None:
    """Raises ValueError if a feature is missing or of a type that training cannot use."""
    features, path = records.features, records.path
    for name, kind in (("moments", "BYTES"), ("shape", ["INT64"])):
        if features.get(name) != kind:
            raise ValueError(f"{path} needs the feature {name} as {kind}; it has {json.dumps(features)}")
    if features.get("caption") not in ("STRING", ENCODED_TEXT):
        raise ValueError(f"{path} needs the feature caption as STRING or {ENCODED_TEXT}; it has {json.dumps(features)}")
    if features.get("text", features["caption"]) != features["caption"]:
        raise ValueError(f"{path} has a caption and a text of different types; it has {json.dumps(features)}")
    if features.get("flow", "FLOAT32") not in ("FLOAT32", "INT64"):
        raise ValueError(f"{path} needs the feature flow as FLOAT32; it has {json.dumps(features)}")
    if "label" in features:
        logger.warning("%s: the feature label is not used; prompts are its captions", path)


def _cut_off(records: RecordDataset) -> Iterator[str]:
    """One line per shard that is shorter than its index says."""
    for number, shard in enumerate(records.shards):
        first, end = records.first_of_shard[number : number + 2]
        size = shard.stat().st_size
        outside = np.flatnonzero(records.index[first:end].sum(axis=1) > size)
        if len(outside):
            yield (
                f"{records.describe(first + int(outside[0]))}: the file has {size} bytes, so this record and "
                f"{len(outside) - 1} more are cut off; copy the file again"
            )


def _fingerprint(records: RecordDataset) -> dict[str, Any]:
    digest = hashlib.sha256((records.path / METADATA).read_bytes())
    for number, shard in enumerate(records.shards):
        first, end = records.first_of_shard[number : number + 2]
        digest.update(f"{shard.name} {end - first} {shard.stat().st_size}\n".encode())
    digest.update(records.index.astype("<i8").tobytes())
    return {"entries": len(records), "features": records.features, "digest": digest.hexdigest()}
