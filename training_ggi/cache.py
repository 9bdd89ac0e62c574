"""Clips prepared once: what the frozen networks make of fixed cuts, instead of these networks in every step.

Training on them has the loss that it has on raw frames with the same settings.
"""

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common.cache import CachedItems, digest_of_files, digest_of_weights, encode_items, open_cache
from common.runtime import Processes, StopSignal
from training_ggi.config import GGIConfig
from training_ggi.data import SceneDataset
from training_ggi.front_end import FrontEnd, warped_noise
from training_ggi.task import set_seed


class FixedCuts:
    """A data set that draws from a fixed number of cuts of every scene."""

    def __init__(self, dataset: SceneDataset, cuts_per_scene: int):
        self.dataset, self.cuts_per_scene = dataset, cuts_per_scene
        self._digests: dict[int, str] = {}  # a scene has hundreds of files, which no sample should look up again

    def __len__(self) -> int:
        return len(self.dataset)

    def files_of(self, index: int) -> list:
        return self.dataset.files_of(index)

    def key_of(self, index: int, place: int) -> str:
        """Name of a prepared clip; changes with the scene's images and prompt."""
        if index not in self._digests:
            self._digests[index] = digest_of_files(*self.dataset.images_of(index))
        facts = f"{self._digests[index]} {self.dataset.scenes[index].prompt} {place}"
        return hashlib.sha256(facts.encode()).hexdigest()

    def draw_place(self, rng: np.random.Generator) -> int:
        """Which of the cuts."""
        return int(rng.integers(self.cuts_per_scene))

    def sample(self, index: int, rng: np.random.Generator) -> dict[str, Any]:
        """As `SceneDataset.sample`, and `cut`, the place among the fixed cuts."""
        place = self.draw_place(rng)
        return {**self.item(index, place), "cut": place}

    def item(self, index: int, place: int) -> dict[str, Any]:
        """The clip of a cut, as `SceneDataset.item`."""
        return self.dataset.item(index, self.dataset.cuts(index, self.cuts_per_scene)[place])


class PreparedClips(CachedItems[FixedCuts]):
    """A data set that reads prepared clips; it draws the same cut as `FixedCuts` does from the same rng."""

    def sample(self, index: int, rng: np.random.Generator) -> dict[str, Any]:
        """What `FrontEnd.encode` returns, for one clip, and `cut`; `noise_sets` (S, F', 16, h, w) instead of `flow`."""
        place = self.dataset.draw_place(rng)
        key = self.dataset.key_of(index, place)
        return {**self.entry(key, lambda: self.dataset.item(index, place)), "cut": place}


def fingerprint(front_end: FrontEnd, config: GGIConfig, dataset: SceneDataset) -> dict[str, Any]:
    """What the prepared values follow from, beside the images themselves."""
    networks = {name: getattr(front_end, name) for name in ("vae", "text_encoder", "raft", "hed", "midas")}
    return {
        "format": 2 if config.data.noise_sets else 1,  # 1 had the flow beside noises, which the list's order decided
        **{f"{name}_sha256": digest_of_weights(network) for name, network in networks.items() if network is not None},
        "precision": str(front_end.vae.dtype),
        "tiling": config.model.enable_tiling,
        "use_captions": config.data.use_captions,
        **{k: v for k, v in dataset.fingerprint().items() if k not in ("num_items", "scenes_sha256")},
        **{name: getattr(config.data, name) for name in ("cond", "clipwise_depth", "detect_resolution", "noise_sets")},
        "noise": [config.run.seed, config.loss.flow_scale, config.loss.oob] if config.data.noise_sets else None,
    }


def build(
    clips: FixedCuts,
    front_end: FrontEnd,
    config: GGIConfig,
    num_latent_frames: int,
    processes: Processes,
    stop: StopSignal,
) -> PreparedClips:
    """Prepares every cut that is not in the folder yet, the scenes split over the processes.

    Scenes that cannot be read are left out here, and replaced in training as bad samples are.

    Raises:
        CacheError: the folder was made with other networks or settings.
        StopRequested: the run was asked to stop; what is prepared stays.
    """
    sets = range(config.data.noise_sets or 0)

    def encode(index: int, place: int, item: Mapping[str, Any]) -> dict[str, Tensor]:
        entry = prepare(front_end, item)
        if sets:
            seeds = [set_seed(int(config.run.seed or 0), item["scene"], place, number) for number in sets]
            flow = entry.pop("flow")  # (T, 2, h, w), a third of the entry, and for the noise alone
            flow = flow.to(front_end.vae.device).expand(len(sets), *flow.shape)  # (S, T, 2, h, w)
            entry["noise_sets"] = warped_noise(flow, seeds, num_latent_frames, config.loss)
        return entry

    folder, facts = str(config.data.cache_latents), fingerprint(front_end, config, clips.dataset)
    cache = open_cache(folder, facts, processes)
    encode_items(
        cache,
        len(clips),
        range(clips.cuts_per_scene),
        key_of=clips.key_of,
        read=clips.item,
        encode=encode,
        unit="scene",
        processes=processes,
        stop=stop,
    )
    return PreparedClips(clips, cache)


def prepare(front_end: FrontEnd, item: Mapping[str, Any]) -> dict[str, Tensor]:
    """The entry of one clip."""
    frames = torch.from_numpy(item["frames"])[None].to(front_end.vae.device)
    edges = torch.from_numpy(item["edges"])[None] if "edges" in item else None
    return {name: value[0] for name, value in front_end.encode(frames, [item["prompt"]], edges).items()}
