"""Objects encoded once: moments and image embeddings of every variant, instead of frozen networks in every step."""

import hashlib
from typing import Any

import numpy as np
from torch import Tensor

from common.cache import CachedItems, digest_of_files, digest_of_weights, encode_items, open_cache
from common.data import collate
from common.runtime import Processes, StopSignal
from mvdiffusion.data.mvds import MultiViewDataset, Variant
from mvdiffusion.task import ENCODED, Frozen, encode_batch


def fingerprint(frozen: Frozen, dataset: MultiViewDataset) -> dict[str, Any]:
    """What the cached values follow from, beside the image files themselves."""
    return {
        "format": 2,
        "vae_sha256": digest_of_weights(frozen.vae),
        "vae_scaling_factor": frozen.vae.config.scaling_factor,
        "image_encoder_sha256": digest_of_weights(frozen.image_encoder),
        "image_processor": {k: str(v) for k, v in frozen.feature_extractor.to_dict().items()},
        **{k: v for k, v in dataset.fingerprint().items() if k not in ("num_items", "objects_sha256")},
    }


class CachedObjects(CachedItems[MultiViewDataset]):
    """A data set that reads encoded objects; it draws the same variant as `MultiViewDataset` does from the same rng."""

    def sample(self, index: int, rng: np.random.Generator) -> dict[str, Any]:
        """What `encode_batch` makes of a sample, and its camera embeddings."""
        variant = self.dataset.variant(rng)
        entry = self.entry(_key(self.dataset, index, variant), lambda: self.dataset.item(index, variant))
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

    def encode(index: int, variant: Variant, item: dict[str, np.ndarray]) -> dict[str, Tensor]:
        batch = {name: tensor.to(processes.device) for name, tensor in collate([item]).items()}
        encoded = encode_batch(frozen, batch)
        return {name: encoded[name][0] for name in ENCODED}

    variants, cache = dataset.variants(), open_cache(folder, fingerprint(frozen, dataset), processes)
    encode_items(
        cache,
        len(dataset),
        variants,
        key_of=lambda index, variant: _key(dataset, index, variant),
        read=dataset.item,
        encode=encode,
        unit="object",
        processes=processes,
        stop=stop,
    )
    return CachedObjects(dataset, cache)


def _key(dataset: MultiViewDataset, index: int, variant: Variant) -> str:
    return hashlib.sha256(f"{digest_of_files(*dataset.files_of(index))} {variant}".encode()).hexdigest()
