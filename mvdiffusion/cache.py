"""Objects encoded once: moments and image embeddings of every variant, instead of frozen networks in every step."""

import hashlib
import logging
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from common.cache import Cache, digest_of_files, digest_of_weights
from common.data import BAD_SAMPLE_ERRORS, collate
from common.runtime import Processes, StopSignal
from mvdiffusion.data.mvds import MultiViewDataset, Variant
from mvdiffusion.task import ENCODED, Frozen, encode_batch

logger = logging.getLogger(__name__)


def fingerprint(frozen: Frozen, dataset: MultiViewDataset) -> dict[str, Any]:
    """What the cached values follow from, beside the image files themselves."""
    return {
        "format": 1,
        "vae_sha256": digest_of_weights(frozen.vae),
        "vae_scaling_factor": frozen.vae.config.scaling_factor,
        "image_encoder_sha256": digest_of_weights(frozen.image_encoder),
        "image_processor": {k: str(v) for k, v in frozen.feature_extractor.to_dict().items()},
        **{k: v for k, v in dataset.fingerprint().items() if k not in ("num_items", "objects_sha256")},
    }


class CachedObjects:
    """A data set that reads encoded objects; it draws the same variant as `MultiViewDataset` does from the same rng."""

    def __init__(self, dataset: MultiViewDataset, cache: Cache):
        self.dataset, self.cache = dataset, cache

    def __len__(self) -> int:
        return len(self.dataset)

    def files_of(self, index: int) -> list:
        return self.dataset.files_of(index)

    def sample(self, index: int, rng: np.random.Generator) -> dict[str, Any]:
        """What `encode_batch` makes of a sample, and its camera embeddings."""
        variant = self.dataset.variant(rng)
        key = _key(self.dataset, index, variant)
        if key not in self.cache:
            self.dataset.item(index, variant)  # raises what kept it from being encoded
        entry = self.cache.load(key)
        return {**{name: tensor.numpy() for name, tensor in entry.items()}, **self.dataset.camera(index, variant)}


def build(
    dataset: MultiViewDataset, frozen: Frozen, folder: str, processes: Processes, stop: StopSignal
) -> CachedObjects:
    """Encodes every variant of every object that is not in `folder` yet, the objects split over the processes.

    Objects that cannot be read are left out here, and replaced in training as bad samples are.

    Raises:
        ValueError: the backgrounds cannot be counted.
        CacheError: the folder was made with other weights, views or sizes.
        StopRequested: the run was asked to stop; what is encoded stays.
    """
    variants = dataset.variants()
    cache = Cache(folder, fingerprint(frozen, dataset))
    mine = -(-(len(dataset) - processes.process_index) // processes.num_processes)  # objects of this process
    bar = {"desc": "encoding objects", "unit": "object", "disable": not processes.is_main_process}
    for index in tqdm(stop.share(len(dataset)), total=mine, **bar):
        for variant in variants:
            try:
                key = _key(dataset, index, variant)
                if key in cache:
                    continue
                batch: Mapping[str, Any] = collate([dataset.item(index, variant)])
            except BAD_SAMPLE_ERRORS as error:
                logger.warning("object %d is not cached: %s", index, error)
                break
            with torch.no_grad():
                encoded = encode_batch(frozen, {k: v.to(processes.device) for k, v in batch.items()})
            cache.save(key, {name: encoded[name][0] for name in ENCODED})
    processes.wait_for_everyone()
    return CachedObjects(dataset, cache)


def _key(dataset: MultiViewDataset, index: int, variant: Variant) -> str:
    return hashlib.sha256(f"{digest_of_files(*dataset.files_of(index))} {variant}".encode()).hexdigest()
