"""Encodes images or clips with an autoencoder into records that training reads; `--help` lists all settings.

    python -m diffnext.build_cache --source captions.csv --vae nova-d48w1024-sdxl1024/vae --output_dir img_dataset
    accelerate launch -m diffnext.build_cache --source clips --vae nova-d48w1024-osp480/vae --output_dir vid_dataset

The source is a table (.csv, .json, .jsonl) with a column of paths, or a folder of media with a .txt (the caption) or a
.json (the columns of a table) beside each. The output folder then holds

    METADATA, 00000.data, 00000.index, ...   the records, in the source's order (see `diffnext.data.records`)
    cache.json                               what they were made with; another run in this folder must agree
    skipped.jsonl                            media that could not be used, and why; nothing takes their place

Shards are whole or absent: the same command again continues where it was interrupted, with any number of processes.
"""

import hashlib
import json
import logging
import os
import random
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from common import tools
from common.cache import digest_of_weights
from common.config import Parser, find_file, option
from common.runtime import Processes
from diffnext.data.records import METADATA, RecordDataset, RecordWriter
from diffnext.media import (
    SHOWN,
    Item,
    Preprocessing,
    Sample,
    SourceConfig,
    listed,
    preprocessing_of,
    read_items,
    read_media,
)
from diffnext.models.autoencoders import load_autoencoder
from diffnext.models.autoencoders.base import Autoencoder
from diffnext.motion import motion_score

logger = logging.getLogger(__name__)

CACHE_FILE, SKIPPED_FILE, SHARD_FILE = "cache.json", "skipped.jsonl", "shard.json"
PARTS, MERGED_PARTS = ".shards", ".shards.merged"
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
# Root mean square of what `verify` finds, relative to the moments: batches of another size are summed in another order.
VERIFY_LIMITS = {"fp16": 1e-2, "bf16": 5e-2, "fp32": 1e-3}


# Settings -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class NetworksConfig:
    vae: str | None = option(None, "folder of the autoencoder, or of a pipeline that holds vae/; required")
    dtype: Literal["auto", "fp16", "bf16", "fp32"] = option("auto", "of the autoencoder; auto: fp16, on a CPU fp32")
    text_encoder: str | None = option(None, "folder of a Phi text encoder: cache embeddings instead of texts")
    tokenizer: str | None = option(None, "folder of its tokenizer; null is tokenizer/ beside it", needs="text_encoder")
    max_tokens: int = option(256, "tokens after which a text is cut", minimum=1, needs="text_encoder")


@dataclass(frozen=True, kw_only=True)
class OutputConfig:
    output_dir: str | None = option(None, "folder for the records; required")
    shard_size: int = option(256, "items per shard, which is what an interruption loses at most", minimum=1)
    verify: int = option(0, "encode so many records of the finished cache again, and compare", minimum=0)


@dataclass(frozen=True, kw_only=True)
class CacheConfig:
    data: SourceConfig = SourceConfig()
    model: NetworksConfig = NetworksConfig()
    output: OutputConfig = OutputConfig()
    run: tools.DeviceConfig = tools.DeviceConfig()


def check(config: CacheConfig) -> list[str]:
    """Problems between sections, one sentence each."""
    required = {
        "data.source": "table or folder of media",
        "model.vae": "folder of the autoencoder",
        "output.output_dir": "folder for the records",
    }
    return tools.required(config, required)


PARSER = Parser(
    CacheConfig,
    check=check,
    program="python -m diffnext.build_cache",
    description="Encodes images or clips with an autoencoder into records that training reads.",
)


# Networks -------------------------------------------------------------------------------------------------------------


class LatentEncoder:
    """An autoencoder on a device, which makes moments out of pixels as the guide's snippets do."""

    def __init__(self, vae: Autoencoder, dtype: torch.dtype, device: torch.device, is_video: bool) -> None:
        self.vae, self.dtype, self.device, self.is_video = vae.to(device, dtype), dtype, device, is_video

    @torch.no_grad()
    def __call__(self, pixels: Tensor) -> np.ndarray:
        """uint8 (B, T, H, W, 3) -> moments float16 (B, 2 C, t, h, w), of images (B, 2 C, h, w).

        What overflows in half precision is encoded again in float32; what does even there is not finite.
        """
        x = pixels.to(self.device).permute(0, 4, 1, 2, 3)  # (B, 3, T, H, W)
        x = x if self.is_video else x[:, :, 0]
        moments = self._moments(x, self.dtype)
        if self.dtype != torch.float32 and not moments.isfinite().all():
            self.vae.float()
            moments = self._moments(x, torch.float32)
            self.vae.to(self.dtype)
        return moments.cpu().numpy()

    def _moments(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        return self.vae.encode(x.to(dtype).sub(127.5).div(127.5)).latent_dist.parameters.half()


class TextEmbedder:
    """A text encoder and its tokenizer, which make the embeddings that a record holds in place of a text."""

    def __init__(self, model: NetworksConfig, device: torch.device) -> None:
        from transformers import AutoTokenizer

        from diffnext.models.text_encoders.phi import PhiEncoderModel

        folder = find_file(str(model.text_encoder), "--text_encoder")
        tokenizer = find_file(model.tokenizer or str(folder.parent / "tokenizer"), "--tokenizer")
        dtype = torch.float16 if device.type == "cuda" else torch.float32
        self.encoder: Any = PhiEncoderModel.from_pretrained(folder).to(device, dtype).eval()
        self.tokenizer: Any = AutoTokenizer.from_pretrained(tokenizer, local_files_only=True)
        self.max_tokens, self.device = model.max_tokens, device

    @torch.no_grad()
    def __call__(self, text: str) -> dict[str, Any]:
        """{"data": float16 bytes, "shape": [tokens, width]}; no tokens, no data."""
        ids = self.tokenizer(text, max_length=self.max_tokens, truncation=True).input_ids
        if not ids:
            return {"data": b"", "shape": [0, self.encoder.config.hidden_size]}
        states = self.encoder(torch.tensor([ids], device=self.device)).last_hidden_state[0]  # (l, width)
        return {"data": states.half().cpu().numpy().tobytes(), "shape": list(states.shape)}


# Records --------------------------------------------------------------------------------------------------------------


@dataclass
class Encoding:
    """Makes a record of each item."""

    config: CacheConfig
    items: Sequence[Item]
    preprocessing: Preprocessing
    encode: LatentEncoder
    embed: TextEmbedder | None

    @property
    def features(self) -> dict[str, Any]:
        """The descriptor of the records."""
        text: Any = {"data": "bytes", "shape": ["int64"]} if self.embed else "string"
        features = {"moments": "bytes", "caption": text, "text": text, "shape": ["int64"]}
        return features | ({"flow": "float64"} if self.preprocessing.is_video else {})

    def flow(self, item: Item, pixels: Tensor) -> float:
        """The motion score of a clip (T, H, W, 3); see `SourceConfig.flow`."""
        if item.flow is not None:
            return item.flow
        is_measured = self.config.data.flow == "measure"
        return motion_score(pixels.to(self.encode.device)) if is_measured else self.config.data.flow_value

    def examples(self, samples: Iterable[Sample], skip: Callable[[int, str], None]) -> Iterator[dict[str, Any]]:
        """A record for each sample that can be used; the others go to `skip`."""
        for batch in _batches(self._usable(samples, skip), self.config.data.batch_size):
            moments = self.encode(torch.stack([pixels for _, pixels in batch]))  # (B, 2 C, ...)
            for (index, pixels), values in zip(batch, moments, strict=True):
                if not np.isfinite(values).all():
                    skip(index, "its latents are not finite: use other weights")
                    continue
                yield self._example(self.items[index], pixels, values)

    def _example(self, item: Item, pixels: Tensor, moments: np.ndarray) -> dict[str, Any]:
        texts: dict[str, Any] = {"caption": item.caption, "text": item.text}
        if self.embed:
            texts = {name: self.embed(text) for name, text in texts.items()}
        example = {"shape": moments.shape, "moments": moments.tobytes(), **texts}
        return example | ({"flow": self.flow(item, pixels)} if self.preprocessing.is_video else {})

    def _usable(self, samples: Iterable[Sample], skip: Callable[[int, str], None]) -> Iterator[tuple[int, Tensor]]:
        for index, pixels, reason in samples:
            try:
                if pixels is not None:
                    self.encode.vae.check_size(*pixels.shape[:3])
            except ValueError as error:
                pixels, reason = None, f"{error}; set resize and crop_size"
            if pixels is None:
                skip(index, reason)
            else:
                yield index, pixels


def _batches(samples: Iterable[tuple[int, Tensor]], batch_size: int) -> Iterator[list[tuple[int, Tensor]]]:
    """Neighbours of one shape, at most `batch_size` of them."""
    batch: list[tuple[int, Tensor]] = []
    for index, pixels in samples:
        if batch and (len(batch) == batch_size or pixels.shape != batch[0][1].shape):
            yield batch
            batch = []
        batch.append((index, pixels))
    if batch:
        yield batch


def write_shard(folder: Path, encoding: Encoding, samples: Iterable[Sample]) -> None:
    """Encodes samples into `folder`, which appears whole: one shard, and a description of it."""
    partial_folder = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial_folder, ignore_errors=True)
    partial_folder.mkdir()
    skipped: list[dict[str, Any]] = []
    shapes: Counter[str] = Counter()

    def skip(index: int, reason: str) -> None:
        skipped.append({"index": index, "path": encoding.items[index].path, "reason": reason})

    with RecordWriter(partial_folder, encoding.features) as writer:
        for example in encoding.examples(samples, skip):
            writer.write(example)
            shapes[" x ".join(map(str, example["shape"]))] += 1
    tools.write_json(partial_folder / SHARD_FILE, {"entries": shapes.total(), "shapes": shapes, "skipped": skipped})
    os.replace(partial_folder, folder)


def merge(folder: Path, num_shards: int) -> dict[str, Any]:
    """Moves finished shards up, numbered without gaps, and writes METADATA; can be called again after a kill.

    Returns:
        entries, shapes and skipped items of all shards.
    """
    total: dict[str, Any] = {"entries": 0, "shapes": Counter(), "skipped": []}
    features, number = None, 0
    for shard in range(num_shards):
        part = folder / PARTS / f"{shard:05d}"
        facts = json.loads((part / SHARD_FILE).read_text("utf-8"))
        total["skipped"] += facts["skipped"]
        if not facts["entries"]:
            continue
        features = json.loads((part / METADATA).read_text("utf-8"))["features"]
        for suffix in ("data", "index"):
            if (part / f"00000.{suffix}").exists():
                os.replace(part / f"00000.{suffix}", folder / f"{number:05d}.{suffix}")
        number += 1
        total["entries"] += facts["entries"]
        total["shapes"].update(facts["shapes"])
    if not total["entries"]:
        first = total["skipped"][0]
        raise ValueError(f"none of the items can be used; the first is {first['path']}: {first['reason']}")
    lines = "".join(json.dumps(row) + "\n" for row in total["skipped"])
    if lines:
        tools.write_text(folder / SKIPPED_FILE, lines)
    metadata = {"entries": total["entries"], "features": features, "version": RecordWriter.VERSION}
    tools.write_text(folder / METADATA, json.dumps(metadata, indent=2))
    return total


# The output folder ----------------------------------------------------------------------------------------------------


def fingerprint_of(encoding: Encoding) -> dict[str, Any]:
    """Everything that the records follow from."""
    config, preprocessing = encoding.config, encoding.preprocessing
    items = [[item.path, item.caption, item.text, item.flow] for item in encoding.items]
    text_encoder = None
    if encoding.embed:
        text_encoder = {"weights": digest_of_weights(encoding.embed.encoder), "max_tokens": config.model.max_tokens}
    return {
        "vae": type(encoding.encode.vae).__name__,
        "vae_weights": digest_of_weights(encoding.encode.vae),
        "dtype": str(encoding.encode.dtype).removeprefix("torch."),
        "kind": "video" if preprocessing.is_video else "image",
        "frame_ids": config.data.frame_ids if preprocessing.is_video else None,
        "resize": preprocessing.resize,
        "crop_size": list(preprocessing.crop_size),
        "interpolation": "bilinear" if preprocessing.is_video else "bicubic",
        "flow": [config.data.flow, config.data.flow_value] if preprocessing.is_video else None,
        "text_encoder": text_encoder,
        "num_items": len(items),
        "items": hashlib.sha256(json.dumps(items).encode()).hexdigest(),
        "shard_size": config.output.shard_size,
    }


def claim_folder(folder: Path, fingerprint: Mapping[str, Any]) -> None:
    """Makes the output folder, or finds one of the same fingerprint; it has `PARTS` if the cache is not complete.

    Raises:
        ValueError: it holds another cache, or other records; the message lists what differs.
    """
    path = folder / CACHE_FILE
    folder.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        others = [each.name for each in folder.iterdir() if each.name == METADATA or each.suffix in (".data", ".index")]
        if others:
            raise ValueError(f"{folder} holds records without {CACHE_FILE} ({others[0]}): choose another --output_dir")
        tools.write_json(path, {"fingerprint": fingerprint})
    try:
        found = json.loads(path.read_text("utf-8"))["fingerprint"]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path} is damaged: choose another --output_dir, or delete {folder}") from None
    differing = [
        f"{key} was {found.get(key)!r}, is {value!r}" for key, value in fingerprint.items() if found.get(key) != value
    ]
    if differing:
        raise ValueError(
            f"the cache {folder} does not belong to this run: {'; '.join(differing)}. Choose another --output_dir, or "
            "delete the folder to have it made again"
        )
    shutil.rmtree(folder / MERGED_PARTS, ignore_errors=True)
    if not (folder / METADATA).exists():
        (folder / PARTS).mkdir(exist_ok=True)


# The work -------------------------------------------------------------------------------------------------------------


def set_up(config: CacheConfig, items: Sequence[Item], preprocessing: Preprocessing, device: torch.device) -> Encoding:
    """Loads the networks; raises ValueError where the autoencoder cannot take such media."""
    folder = find_file(str(config.model.vae), "--vae")
    vae = load_autoencoder(folder / "vae" if (folder / "model_index.json").is_file() else folder)
    side = vae.spatial_factor
    try:
        vae.check_size(len(preprocessing.frame_ids), *(preprocessing.crop_size or (side, side)))
    except ValueError as error:
        settings = "crop_size, frame_ids or the autoencoder" if preprocessing.is_video else "crop_size"
        raise ValueError(f"{folder}: {error} (change {settings})") from error
    name = ("fp16" if device.type == "cuda" else "fp32") if config.model.dtype == "auto" else config.model.dtype
    encode = LatentEncoder(vae, DTYPES[name], device, preprocessing.is_video)
    embed = TextEmbedder(config.model, device) if config.model.text_encoder else None
    return Encoding(config, items, preprocessing, encode, embed)


def build(config: CacheConfig, processes: Processes) -> dict[str, Any] | None:
    """Makes the records that are not there yet, on all processes.

    Returns:
        entries, shapes and skipped items; None if the cache was complete.
    """
    folder, shard_size = Path(str(config.output.output_dir)), config.output.shard_size
    items = read_items(config.data)
    preprocessing = preprocessing_of(config.data, items)
    encoding = set_up(config, items, preprocessing, processes.device)
    if processes.is_main_process:
        claim_folder(folder, fingerprint_of(encoding))
    processes.wait_for_everyone()
    result = None
    if (folder / PARTS).exists():
        num_shards = (len(items) + shard_size - 1) // shard_size
        todo = [n for n in range(num_shards) if not (folder / PARTS / f"{n:05d}").exists()]
        tools.say_kept(num_shards - len(todo), num_shards, "shard", processes, has_overwrite=False)
        encode_shards(encoding, folder, tools.share_of(todo, processes), processes)
        processes.wait_for_everyone()
        if processes.is_main_process:
            result = merge(folder, num_shards)
            os.replace(folder / PARTS, folder / MERGED_PARTS)  # at once: what is half deleted could not be merged
            shutil.rmtree(folder / MERGED_PARTS)
    if config.output.verify and processes.is_main_process:
        verify(encoding, folder)
    processes.wait_for_everyone()
    return result


def encode_shards(encoding: Encoding, folder: Path, shards: Sequence[int], processes: Processes) -> None:
    """Writes this process's shards, one after the other; media are read ahead across their borders."""
    size, data = encoding.config.output.shard_size, encoding.config.data
    indices = [n for shard in shards for n in range(shard * size, min((shard + 1) * size, len(encoding.items)))]
    with tqdm(total=len(indices), unit="item", disable=not processes.is_main_process) as bar:
        samples = _counted(read_media(encoding.items, indices, encoding.preprocessing, data.num_workers), bar)
        for shard, group in groupby(samples, key=lambda sample: sample[0] // size):
            write_shard(folder / PARTS / f"{shard:05d}", encoding, group)


def _counted(samples: Iterable[Sample], bar: Any) -> Iterator[Sample]:
    for sample in samples:
        yield sample
        bar.update()


def verify(encoding: Encoding, folder: Path) -> None:
    """Encodes random records again; ValueError names those that are not what they should be."""
    records = RecordDataset(folder)
    skipped_file = folder / SKIPPED_FILE
    lines = skipped_file.read_text("utf-8").splitlines() if skipped_file.exists() else []
    skipped = {json.loads(line)["index"] for line in lines}
    kept = [index for index in range(len(encoding.items)) if index not in skipped]
    numbers = sorted(random.Random(0).sample(range(len(records)), min(encoding.config.output.verify, len(records))))
    limit = VERIFY_LIMITS[next(name for name, dtype in DTYPES.items() if dtype == encoding.encode.dtype)]
    wrong, worst = [], 0.0
    samples = read_media(encoding.items, [kept[n] for n in numbers], encoding.preprocessing, 0)
    for number, sample in zip(numbers, samples, strict=True):
        expected = next(iter(encoding.examples([sample], lambda index, reason: None)), None)
        error = _difference(records[number], expected) if expected else float("inf")
        worst = max(worst, error)
        if error > limit:
            wrong.append(f"record {number} ({encoding.items[sample[0]].path})")
    if wrong:
        raise ValueError(
            f"{len(wrong)} of {len(numbers)} records of {folder} differ from what their media give now: "
            f"{listed(wrong)}; have the media changed? Delete the folder to have it made again"
        )
    logger.info("verified %d records: moments differ by %.2g at most (relative root mean square)", len(numbers), worst)


def _difference(record: Mapping[str, Any], expected: Mapping[str, Any]) -> float:
    """Relative root mean square error of the moments; infinity if anything else differs."""
    if record["shape"] != list(expected["shape"]) or any(
        record[name] != expected[name] for name in ("caption", "text") if isinstance(record[name], str)
    ):
        return float("inf")
    found, right = (np.frombuffer(each["moments"], np.float16).astype(np.float64) for each in (record, expected))
    return float(np.sqrt(np.square(found - right).mean() / max(np.square(right).mean(), 1e-12)))


def report(result: dict[str, Any] | None, folder: Path) -> None:
    """Says what came of it."""
    if result is None:
        print(f"{folder} is complete already")
        return
    shapes = ", ".join(f"{shape} ({count})" for shape, count in sorted(result["shapes"].items()))
    print(f"wrote {result['entries']} records: {folder}\nshapes of the moments: {shapes}")
    if len(result["shapes"]) > 1:
        print("most models take one shape: give resize and crop_size to have one", file=sys.stderr)
    if result["skipped"]:
        lines = "".join(f"\n  {row['path']}: {row['reason']}" for row in result["skipped"][:SHOWN])
        print(f"{len(result['skipped'])} items were skipped ({folder / SKIPPED_FILE}):{lines}", file=sys.stderr)


def main(argv: Sequence[str] | None = None) -> None:
    """Builds a cache as the command line says; see `--help`."""
    with tools.started(PARSER, argv) as (config, accelerator, _):
        result = build(config, accelerator)
        if accelerator.is_main_process:
            report(result, Path(str(config.output.output_dir)))


if __name__ == "__main__":
    main()
