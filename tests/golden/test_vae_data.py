"""The VAE's data against recorded vectors: resizing and cropping, frame indices, 8-bit frames, the order of samples."""

import numpy as np
import torch
from torch import Tensor
from vae_cases import Case, by_case

from common.data import SamplePlan
from vae.data import (
    center_crop_resize,
    eval_transform,
    resize_and_crop,
    to_uint8_frames,
    train_begin_range,
    train_frame_indices,
    valid_frame_indices,
)


def in_unit_range(video: Tensor) -> Tensor:
    return (video + 1) / 2


@by_case("train_transform*.safetensors")
def test_train_transform(case: Case):
    resolution = case.config["resolution"]
    case.check("video", resize_and_crop(case.inputs["frames"], resolution, (resolution, resolution)))


@by_case("valid_transform*.safetensors")
def test_valid_transform(case: Case):
    frames = case.inputs["frames"].transpose(0, 1)  # (T, C, H, W)
    crop_px = tuple(case.config["crop"]) if "crop" in case.config else None
    case.check("video", in_unit_range(resize_and_crop(frames, case.config["resolution"], crop_px)))


@by_case("eval_transform*.safetensors")
def test_eval_transform(case: Case):
    frames = case.inputs["frames"].transpose(0, 1)  # (T, C, H, W)
    crop_px = (case.config["crop"],) * 2 if "crop" in case.config else None
    case.check("video", in_unit_range(eval_transform(frames, case.config["resolution"], crop_px)))


@by_case("center_crop_resize*.safetensors")
def test_center_crop_resize(case: Case):
    frames = case.inputs["clip"].transpose(0, 1)  # (T, C, H, W)
    case.check("video", center_crop_resize(frames, *case.config["size"]))


@by_case("uint8_video*.safetensors")
def test_uint8_frames(case: Case):
    video = case.inputs["x"]
    case.check("frames_saved", to_uint8_frames(video, "truncate"))
    logged = to_uint8_frames(video, "truncate", low=0.0)  # (T, H, W, C)
    case.check("frames_logged", logged.permute(0, 3, 1, 2))
    rounded, exact = to_uint8_frames(video).double(), in_unit_range(video.double().clamp(-1, 1)) * 255
    assert (rounded.permute(3, 0, 1, 2) - exact).abs().max() <= 0.5 + 1e-4


@by_case("frame_indices*.safetensors")
def test_frame_indices(case: Case):
    for i, (total, num_frames, sample_rate, begin) in enumerate(case.config["train"]):
        case.check(f"train_{i}", torch.from_numpy(train_frame_indices(total, num_frames, sample_rate, begin)))
        case.check(f"train_{i}_range", torch.tensor(train_begin_range(total, num_frames, sample_rate)))
    for i, (num_frames, sample_rate) in enumerate(case.config["valid"]):
        case.check(f"valid_{i}", torch.from_numpy(valid_frame_indices(num_frames, sample_rate)))


def recorded_order(num_items: int, world_size: int, seed: int) -> Tensor:
    """What the original's ranks visit, (world_size, items per rank): a permutation, wrapped so that all get as many."""
    order = torch.randperm(num_items, generator=torch.Generator().manual_seed(seed))
    per_rank = -(-num_items // world_size)
    repeats = -(-per_rank * world_size // num_items)
    return order.repeat(repeats)[: per_rank * world_size].view(per_rank, world_size).T


@by_case("sampler*.safetensors")
def test_every_epoch_visits_every_item_once_where_the_original_repeats_some(case: Case):
    for i, settings in enumerate(case.config["cases"]):
        num_items, world_size, epoch = settings["n"], settings["world"], settings["epoch"]
        original = recorded_order(num_items, world_size, settings.get("seed", 0) + epoch)
        for rank, items in enumerate(original):
            case.check(f"{i}_rank{rank}", items[settings.get("resume", 0) :])
            case.check(f"{i}_rank{rank}_after", torch.tensor([0, len(items)]))
        assert set(original.flatten().tolist()) == set(range(num_items))
        plan = SamplePlan(num_items, seed=0, global_batch=world_size)
        visited = np.concatenate([plan.batch(first) for first in range(0, (epoch + 1) * num_items, world_size)])
        this_epoch = visited[epoch * num_items : (epoch + 1) * num_items]
        assert sorted(this_epoch.tolist()) == list(range(num_items))
