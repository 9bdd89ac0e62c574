"""Windows encoded once: latents and image embeddings of fixed places, instead of the frozen networks in every step."""

import logging
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from common.cache import Cache, digest_of_files, digest_of_weights
from common.data import BAD_SAMPLE_ERRORS, collate
from common.runtime import Processes, StopSignal
from gaussian_refiner.data import RefinerDataset
from gaussian_refiner.models.components import Components
from gaussian_refiner.task import encode_batch

logger = logging.getLogger(__name__)


def fingerprint(components: Components, dataset: RefinerDataset) -> dict[str, Any]:
    """What the cached values follow from, beside the image files themselves."""
    return {
        "format": 1,
        "vae_sha256": digest_of_weights(components.vae),
        "vae_scaling_factor": components.vae.config.scaling_factor,
        "image_encoder_sha256": digest_of_weights(components.image_encoder),
        "image_processor": {k: str(v) for k, v in components.feature_extractor.to_dict().items()},
        "windows_per_item": dataset.windows_per_item,
        "buckets_px": {key: list(size) for key, size in dataset.buckets.items()},
    }


class CachedWindows:
    """A data set that reads encoded windows; it draws the same place as `RefinerDataset` does from the same rng."""

    def __init__(self, dataset: RefinerDataset, cache: Cache):
        self.dataset, self.cache = dataset, cache

    def __len__(self) -> int:
        return len(self.dataset)

    def files_of(self, index: int) -> list:
        return self.dataset.files_of(index)

    def sample(self, index: int, rng: np.random.Generator) -> dict[str, Any]:
        """`render_latents`, `cond_latents`, `gt_latents` (4, h, w), `image_embeds` (D,), `has_cond`."""
        place = self.dataset.draw_place(rng)
        entry = self.cache.load(digest_of_files(*self.files_of(index)))
        return {name: tensor[place].numpy() for name, tensor in entry.items()}


def build(
    dataset: RefinerDataset, components: Components, folder: str, processes: Processes, stop: StopSignal
) -> CachedWindows:
    """Encodes every window that is not in `folder` yet, the items split over the processes.

    Items that cannot be read are left out here, and replaced in training as bad samples are.

    Raises:
        CacheError: the folder was made with other weights, windows or sizes.
        StopRequested: the run was asked to stop; what is encoded stays.
    """
    cache = Cache(folder, fingerprint(components, dataset))
    mine = -(-(len(dataset) - processes.process_index) // processes.num_processes)  # items of this process
    bar = {"desc": "encoding windows", "unit": "item", "disable": not processes.is_main_process}
    for index in tqdm(stop.share(len(dataset)), total=mine, **bar):
        try:
            key = digest_of_files(*dataset.files_of(index))
            if key in cache:
                continue
            windows = collate([dataset.window(index, place) for place in range(dataset.windows_per_item)])
        except BAD_SAMPLE_ERRORS as error:
            logger.warning("item %d is not cached: %s", index, error)
            continue
        windows = {k: v if k == "cond_u8" else v.to(processes.device) for k, v in windows.items()}
        with torch.no_grad():
            encoded = encode_batch(components, windows)  # (K, ...) each
        cache.save(key, {**encoded, "has_cond": windows["has_cond"]})
    processes.wait_for_everyone()
    return CachedWindows(dataset, cache)
