"""Windows encoded once: latents and image embeddings of fixed places, instead of the frozen networks in every step."""

from typing import Any

import numpy as np
from torch import Tensor

from common.cache import CachedItems, digest_of_files, digest_of_weights, encode_items, open_cache
from common.data import collate
from common.runtime import Processes, StopSignal
from gaussian_refiner.data import RefinerDataset
from gaussian_refiner.models.components import Components
from gaussian_refiner.task import encode_batch


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


class CachedWindows(CachedItems[RefinerDataset]):
    """A data set that reads encoded windows; it draws the same place as `RefinerDataset` does from the same rng."""

    def sample(self, index: int, rng: np.random.Generator) -> dict[str, Any]:
        """`render_latents`, `cond_latents`, `gt_latents` (4, h, w), `image_embeds` (D,), `has_cond`."""
        place = self.dataset.draw_place(rng)
        entry = self.entry(digest_of_files(*self.files_of(index)), lambda: self.dataset.window(index, place))
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

    def read(index: int, places: range) -> dict[str, Any]:
        return collate([dataset.window(index, place) for place in places])

    def encode(index: int, places: range, windows: dict[str, Any]) -> dict[str, Tensor]:
        windows = {k: v if k == "cond_u8" else v.to(processes.device) for k, v in windows.items()}
        return {**encode_batch(components, windows), "has_cond": windows["has_cond"]}  # (K, ...) each

    cache = open_cache(folder, fingerprint(components, dataset), processes)
    encode_items(
        cache,
        len(dataset),
        [range(dataset.windows_per_item)],  # one entry of all windows
        key_of=lambda index, places: digest_of_files(*dataset.files_of(index)),
        read=read,
        encode=encode,
        unit="item",
        processes=processes,
        stop=stop,
    )
    return CachedWindows(dataset, cache)
