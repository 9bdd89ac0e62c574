"""The noise warp against recorded vectors."""

import re
from collections.abc import Sequence

import pytest
import torch
import vectors as golden
from torch import Tensor
from vectors import Vectors

from training_ggi.models.noise_warp import (
    NoiseWarper,
    Routes,
    backward_sources,
    downscale_noise,
    mix_noise,
    regaussianize,
    resize_flow,
    resize_list,
)

TRAINER = "training_ggi"


# One step.


@golden.by_case(TRAINER, "warp_step*.safetensors", r"(.+)/flow")
def test_step(vectors: Vectors, case: str) -> None:
    given = vectors.under(f"{case}/")
    warper = NoiseWarper(given["noise_in"], given["weight_in"])
    warper.step(given["flow"], given["foreign"])
    tolerance = vectors.header["tolerance"]
    vectors.check_within(f"{case}/noise_out", warper.noise, tolerance["noise_out"])
    vectors.check_within(f"{case}/weight_out", warper.weight, tolerance["weight_out"])


@golden.by_case(TRAINER, "warp_step*.safetensors", r"(.+)/flow")
def test_where_pixels_go_and_come_from(vectors: Vectors, case: str) -> None:
    given = vectors.under(f"{case}/")
    size = given["flow"].shape[1:]
    routes = Routes(*size, given["flow"].device)
    routes.follow(given["flow"])
    actual = {
        "dst_index": routes.target,
        "in_bounds": routes.inside,
        "shrink_mask": routes.origin[:-1] >= 0,
        "src_index": backward_sources(routes.offsets, torch.arange(len(routes.target))),
    }
    for name, value in actual.items():
        vectors.check_within(f"{case}/{name}", value.view(size), 0)


@golden.by_case(TRAINER, "warp_step*.safetensors", r"(.+)/flow")
def test_groups(vectors: Vectors, case: str) -> None:
    """All copies side by side, regaussianized, although a step makes those alone that it uses."""
    given = vectors.under(f"{case}/")
    channels, height, width = given["noise_in"].shape
    routes = Routes(height, width, given["flow"].device)
    routes.follow(given["flow"])
    pixels = torch.arange(height * width)
    moved = torch.where(routes.inside, pixels, -1).view(height, width)
    source = backward_sources(routes.offsets, pixels)
    expanded = torch.where(routes.origin[:-1] < 0, source, -1).view(height, width)
    groups = torch.cat([moved, expanded], dim=1).flatten()  # (H * 2 W,), -1 is blank

    def copied(rows: Tensor, blank: float) -> Tensor:
        return torch.where((groups < 0)[:, None], blank, rows[groups])

    values = copied(given["noise_in"].flatten(1).T, 0.0)  # (H * 2 W, C)
    rows, counts = regaussianize(values, groups, given["foreign"].flatten(1).T)
    weights = copied(given["weight_in"].flatten()[:, None], 1.0)[:, 0] / counts
    tolerance = vectors.header["tolerance"]
    vectors.check_within(f"{case}/group_id", (groups + 1).view(height, -1), 0)
    vectors.check_within(f"{case}/group_count", counts.view(height, -1), 0)
    vectors.check_within(f"{case}/regauss", rows.T.view(channels, height, -1), tolerance["regauss"])
    vectors.check_within(f"{case}/weight_div_count", weights.view(height, -1), tolerance["weight_out"])


@golden.by_case(TRAINER, "regaussianize*.safetensors", r"(.+)/labels")
def test_regaussianize(vectors: Vectors, case: str) -> None:
    given = vectors.under(f"{case}/")
    values, draws = (given[name].flatten(1).T for name in ("noise_in", "foreign"))
    rows, counts = regaussianize(values, given["labels"].flatten(), draws)
    vectors.check_within(f"{case}/noise_out", rows.T.view_as(given["noise_in"]), vectors.header["tolerance"])
    vectors.check_within(f"{case}/counts", counts.view_as(given["labels"]), 0)


# Several steps, and what goes in and out.


@golden.by_case(TRAINER, "warp_multistep*.safetensors", r"(.+)/flow_lowres")
def test_steps(vectors: Vectors, case: str) -> None:
    given, config = vectors.under(f"{case}/"), vectors.header["cases"][case]
    warper = NoiseWarper(given["init_noise"], swap_ratios=True)
    states = [(warper.noise.clone(), warper.weight.clone())]
    for flow, draw in zip(given["flow_lowres"], given["foreign"], strict=True):
        warper.step(flow, draw)
        states.append((warper.noise.clone(), warper.weight.clone()))
    saved = [states[step] for step in config["saved_steps_of_noise_and_weight"]]
    down = torch.stack([downscale_noise(noise, config["downscale"]) for noise, _ in states])
    tolerance = vectors.header["tolerance"]
    vectors.check_within(f"{case}/noise", torch.stack([noise for noise, _ in saved]), tolerance["noise"])
    vectors.check_within(f"{case}/weight", torch.stack([weight for _, weight in saved]), tolerance["weight"])
    vectors.check_within(f"{case}/down", down, tolerance["down"])


@golden.by_case(TRAINER, "flow_resize*.safetensors", r"(.+)/flow")
def test_flow_resize(vectors: Vectors, case: str) -> None:
    config = vectors.header["cases"][case]
    (height, width), flow = config["out"], vectors[f"{case}/flow"]
    actual = resize_flow(flow, (height, width), swap_ratios=True)
    name, (lines, columns) = f"{case}/out", config.get("subsample", (1, 1))
    name = name if name in vectors else f"{case}/out_sub"
    vectors.check_within(name, actual[:, ::lines, ::columns], vectors.header["tolerance"])
    if height * flow.shape[2] == width * flow.shape[1]:
        assert torch.equal(actual, resize_flow(flow, (height, width)))


@golden.by_case(TRAINER, "downscale_noise*.safetensors", r"(.+)/in")
def test_downscale_noise(vectors: Vectors, case: str) -> None:
    noise, factor = vectors[f"{case}/in"], vectors.header["cases"][case]["factor"]
    channel_last = noise.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    for layout in (noise, channel_last):
        vectors.check_within(f"{case}/out", downscale_noise(layout, factor), vectors.header["tolerance"])


@golden.by_case(TRAINER, "resize_list*.safetensors", r"(\d+_to_\d+)")
def test_resize_list(vectors: Vectors, case: str) -> None:
    num_items, length = map(int, case.split("_to_"))
    assert resize_list(range(num_items), length) == vectors[case].tolist()


@golden.by_case(TRAINER, "mix_noise*.safetensors", r"out_(\d+)")
def test_mix_noise(vectors: Vectors, case: str) -> None:
    noise, fresh, alpha = vectors["noise"], vectors["fresh"], vectors["alphas"][int(case)]
    tolerance = vectors.header["tolerance"]
    vectors.check_within(f"out_{case}", mix_noise(noise, fresh, alpha), tolerance["fp32"])
    per_sample = mix_noise(torch.cat([noise, noise]), torch.cat([fresh, fresh]), alpha.repeat(2 * len(noise)))
    vectors.check_within(f"out_{case}", per_sample[len(noise) :], tolerance["fp32"])
    half = mix_noise(noise.bfloat16(), fresh.bfloat16(), alpha)
    assert half.dtype == torch.bfloat16
    vectors.check_within(f"out_bf16_{case}", half, tolerance["bf16"])


# Statistics, of draws of our own.

NUM_CLIPS, MORE_CHANNELS = 4, 8  # more noise than was recorded, so that chance is nearly theirs alone


def correlation(one: Tensor, other: Tensor) -> float:
    return torch.corrcoef(torch.stack([one.flatten(), other.flatten()]))[0, 1].item()


def warped(geometry: dict[str, int], flows: Sequence[Tensor]) -> Tensor:
    """(clips, steps + 1, MORE_CHANNELS * C, h, w); one flow serves for all steps."""
    clips = []
    for seed in range(NUM_CLIPS):
        generator = torch.Generator().manual_seed(seed)
        shape = MORE_CHANNELS * geometry["channels"], geometry["H"], geometry["W"]
        warper = NoiseWarper(torch.randn(shape, generator=generator), swap_ratios=True)
        frames = [downscale_noise(warper.noise, geometry["downscale"])]
        for step in range(geometry["steps"]):
            warper.step(flows[min(step, len(flows) - 1)], generator)
            frames.append(downscale_noise(warper.noise, geometry["downscale"]))
        clips.append(torch.stack(frames))
    return torch.stack(clips)


def latent_shift(flow: Tensor, geometry: dict[str, int]) -> tuple[int, int]:
    """(dx, dy) in latent pixels of a flow (K, 2, h, w) that moves all alike by whole ones; ratios are swapped."""
    scales = geometry["H"] / geometry["flow_h"], geometry["W"] / geometry["flow_w"]
    dx, dy = (flow[0, axis, 0, 0].item() * scale / geometry["downscale"] for axis, scale in enumerate(scales))
    return round(dx), round(dy)


def overlap(later: Tensor, first: Tensor, dx: int, dy: int) -> tuple[Tensor, Tensor]:
    """The parts of (..., h, w) that show the same before and after a shift by (dx, dy)."""
    for dim, by in ((-2, dy), (-1, dx)):
        length = max(first.shape[dim] - abs(by), 0)
        later, first = later.narrow(dim, max(by, 0), length), first.narrow(dim, max(-by, 0), length)
    return later, first


@golden.by_case(TRAINER, "noise_stats*.safetensors", r"(.+)/flow_lowres")
def test_statistics(vectors: Vectors, case: str) -> None:
    recorded, geometry = vectors.header["stats"][case], vectors.header["geometry"]
    limits = dict(re.findall(r"([\w/ -]+): ([\d.]+)", vectors.header["tolerance"]))
    clips = warped(geometry, vectors[f"{case}/flow_lowres"])
    frames = clips.transpose(0, 1)  # (steps + 1, clips, C, h, w)
    last = frames[-1]
    for frame in frames:
        assert abs(frame.mean()) < 5 / recorded["n_samples_per_frame"] ** 0.5
        assert frame.std() == pytest.approx(1, abs=float(limits[" std"]))
    neighbours = [(last[..., 1:], last[..., :-1]), (last[..., 1:, :], last[..., :-1, :]), (last[:, 1:], last[:, :-1])]
    for one, other in neighbours:
        assert abs(correlation(one, other)) < float(limits[" autocorrelation/cross-channel"])

    limit = {"abs": float(limits[" cross-frame correlations"])}
    with_first = [correlation(frame, frames[0]) for frame in frames]
    with_previous = [correlation(*pair) for pair in zip(frames[1:], frames[:-1], strict=True)]
    assert with_first == pytest.approx(recorded["corr_frame0_zero_lag"], **limit)
    assert with_previous == pytest.approx(recorded["corr_prev_zero_lag"], **limit)
    if "corr_frame0_at_shift_k_interior" in recorded:  # whole latent pixels in each step
        step = latent_shift(vectors[f"{case}/flow_lowres"], geometry)
        moved = [correlation(*overlap(frame, frames[0], k * step[0], k * step[1])) for k, frame in enumerate(frames)]
        assert moved == pytest.approx(recorded["corr_frame0_at_shift_k_interior"], abs=0.01)
        assert moved == pytest.approx([1.0] * len(frames), abs=1e-5)
        exposed = torch.ones(last.shape[-2:], dtype=torch.bool)
        overlap(exposed, exposed, *(geometry["steps"] * along for along in step))[0].fill_(False)
        if exposed.any():
            assert abs(correlation(last[..., exposed], frames[0][..., exposed])) < limit["abs"]
