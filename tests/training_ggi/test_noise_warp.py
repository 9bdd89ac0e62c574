"""The noise warp: what holds for any draws, its options, and its errors. Recorded values are in tests/golden."""

import itertools
import math
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from training_ggi.models.noise_warp import (
    NoiseWarper,
    OutOfBounds,
    Routes,
    backward_sources,
    downscale_noise,
    mix_noise,
    regaussianize,
    resize_flow,
    resize_list,
    warp_clip,
)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def white(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=seeded(seed))


def smooth_flow(height: int, width: int, seed: int, length_px: float = 3.0) -> Tensor:
    """(2, height, width), with expansions, contractions and ways out of the frame."""
    coarse = white(1, 2, 4, 5, seed=seed) * length_px
    return F.interpolate(coarse, size=(height, width), mode="bicubic")[0]


def constant_flow(dx: float, dy: float, height: int, width: int) -> Tensor:
    return torch.tensor([dx, dy])[:, None, None].expand(2, height, width).contiguous()


def zoom_flow(height: int, width: int, rate: float) -> Tensor:
    """Away from the centre, negative rates towards it."""
    y, x = torch.meshgrid(torch.arange(height) - (height - 1) / 2, torch.arange(width) - (width - 1) / 2, indexing="ij")
    return rate * torch.stack([x, y])


def stepped(noise: Tensor, flows: list[Tensor], seed: int = 1, **options: OutOfBounds) -> NoiseWarper:
    warper, generator = NoiseWarper(noise, **options), seeded(seed)
    for flow in flows:
        warper.step(flow, generator)
    return warper


def correlation(one: Tensor, other: Tensor) -> float:
    return torch.corrcoef(torch.stack([one.flatten(), other.flatten()]))[0, 1].item()


def check_white(rows: Tensor) -> None:
    """Mean 0 and variance 1, of which chance leaves 5 standard deviations."""
    assert abs(rows.mean().item()) < 5 / rows.numel() ** 0.5
    assert abs(rows.var().item() - 1) < 5 * (2 / rows.numel()) ** 0.5


# One step.


def plain_step(noise: Tensor, weight: Tensor, flow: Tensor, draw: Tensor, oob: OutOfBounds) -> tuple[Tensor, Tensor]:
    """The rules, one pixel after another: noise and weight after a step."""
    channels, height, width = noise.shape
    pixels = list(itertools.product(range(height), range(width)))
    dx, dy = flow.round().int().tolist()
    moves, copies = {}, []  # copies: [source or None, place of the draw]
    for y, x in pixels:
        y_to, x_to = y + dy[y][x], x + dx[y][x]
        inside = 0 <= y_to < height and 0 <= x_to < width
        if inside or oob == "keep":
            moves[y, x] = (y_to, x_to) if inside else (y, x)
            copies.append(((y, x) if inside else None, (y, x)))
    taken = set(moves.values())
    for y, x in pixels:
        y_from, x_from = y - dy[y][x], x - dx[y][x]
        is_source = (y, x) not in taken and 0 <= y_from < height and 0 <= x_from < width
        copies.append(((y_from, x_from) if is_source else None, (y, x + width)))
    groups: dict[tuple[int, int] | None, list[tuple[int, int]]] = {}
    for source, place in copies:
        groups.setdefault(source, []).append(place)
    made = {}
    for source, places in groups.items():
        k, draws = len(places), torch.stack([draw[:, y, x] for y, x in places])
        value, old = (noise[:, *source], weight[source]) if source else (torch.zeros(channels), torch.tensor(1.0))
        for place, each in zip(places, draws - draws.mean(0), strict=True):
            made[place] = (value / math.sqrt(k) + each, old / k)
    new_noise, new_weight = torch.empty_like(noise), torch.empty_like(weight)
    for y, x in pixels:
        arrived = [made[place] for place, target in moves.items() if target == (y, x)] or [made[y, x + width]]
        weights = torch.stack([each for _, each in arrived])
        new_noise[:, y, x] = sum(each * row for row, each in arrived) / weights.square().sum().sqrt()
        new_weight[y, x] = weights.sum()
    return new_noise, ((new_weight / new_weight.mean()) + 1e-5) ** 0.9999


@pytest.mark.parametrize("oob", ["keep", "drop"])
@pytest.mark.parametrize("seed", range(3))
def test_step_follows_the_rules(seed: int, oob: OutOfBounds) -> None:
    noise, draw = white(2, 7, 9, seed=seed), white(2, 7, 18, seed=seed + 10)
    weight = 0.1 + torch.rand(7, 9, generator=seeded(seed))
    flow = smooth_flow(7, 9, seed)
    warper = NoiseWarper(noise, weight, oob=oob)
    warper.step(flow, draw)
    expected_noise, expected_weight = plain_step(noise, weight, flow, draw, oob)
    torch.testing.assert_close(warper.noise, expected_noise, atol=2e-6, rtol=0)
    torch.testing.assert_close(warper.weight, expected_weight, atol=2e-6, rtol=0)


def test_zero_flow_changes_nothing() -> None:
    noise = white(4, 24, 32)
    warper = stepped(noise, [torch.zeros(2, 3, 4)] * 3)
    assert torch.equal(warper.noise, noise)
    assert (warper.weight - 1).abs().max() < 1e-5 + 1e-7


@pytest.mark.parametrize(("dx", "dy"), [(3, -2), (-7, 0), (0, 5)])
def test_whole_pixel_shift_moves_the_noise(dx: int, dy: int) -> None:
    height, width = 24, 32
    noise = white(4, height, width)
    flow = constant_flow(dx, dy, height, width)
    dropped, kept = (stepped(noise, [flow], oob=oob).noise for oob in ("drop", "keep"))
    moved = torch.zeros(height, width, dtype=torch.bool)
    moved[max(dy, 0) : height + min(dy, 0), max(dx, 0) : width + min(dx, 0)] = True
    expected = noise.roll((dy, dx), (1, 2))[:, moved]
    assert torch.equal(dropped[:, moved], expected)
    # What leaves the frame stays where others come, but with a weight of 1 / (number of blank entries).
    torch.testing.assert_close(kept[:, moved], expected, atol=5 / (height * width), rtol=0)
    for warped in (dropped, kept):
        fresh = warped[:, ~moved]
        assert not torch.isin(fresh, noise).any()
        check_white(fresh)


@pytest.mark.parametrize(("offset_px", "whole_px"), [(0.5, 0), (1.5, 2), (-0.5, 0)])
def test_halves_move_all_pixels_alike(offset_px: float, whole_px: int) -> None:
    """Rounding each target instead would make every other pixel collide."""
    noise = white(2, 8, 12)
    warped = stepped(noise, [constant_flow(offset_px, 0, 8, 12)], oob="drop").noise
    assert torch.equal(warped[:, :, whole_px:], noise[:, :, : 12 - whole_px])


def test_two_shifts_are_one() -> None:
    noise, flows = white(4, 24, 32), [constant_flow(dx, dy, 24, 32) for dx, dy in ((2, 3), (4, -1), (6, 2))]
    twice, once = (stepped(noise, each, oob="drop").noise for each in (flows[:2], flows[2:]))
    assert torch.equal(twice[:, 2:23, 6:], once[:, 2:23, 6:])


def test_flow_beyond_the_frame_makes_all_fresh() -> None:
    noise = white(16, 24, 32)
    for oob in ("keep", "drop"):
        warper = stepped(noise, [constant_flow(-10000, 5e8, 3, 4)], oob=oob)
        check_white(warper.noise)
        assert abs(correlation(warper.noise, noise)) < 5 / noise.numel() ** 0.5


def test_dropping_fills_the_border_from_inside_when_zooming_in() -> None:
    """Places that pixels have left for good, and which the flow does not reach."""
    height, width = 36, 48
    flow = zoom_flow(height, width, 0.27)
    noise = white(16, height, width)
    fresh = {}
    for oob in ("keep", "drop"):
        routes = Routes(height, width, flow.device)
        routes.follow(flow, oob)
        holes = (routes.origin[:-1] < 0).nonzero().flatten()
        kept = (~routes.inside).sum() if oob == "keep" else 0
        fresh[oob] = int(kept + (backward_sources(routes.offsets, holes) < 0).sum())
        check_white(stepped(noise, [flow], oob=oob).noise)
    assert fresh["keep"] > 300
    assert fresh["drop"] == 0


# Independence.


def test_copies_of_a_value_are_independent_and_sum_to_it() -> None:
    groups = torch.tensor([7, 3, 7, 0, 7, 3])
    values = white(8, 20000)[groups]  # (M, C)
    rows, counts = regaussianize(values, groups, white(6, 20000, seed=1))
    assert counts.tolist() == [3, 2, 3, 1, 3, 2]
    assert torch.equal(rows[3], values[3]), "a value that is copied once changed"
    for group in (7, 3):
        copies = rows[groups == group]
        torch.testing.assert_close(copies.sum(0), len(copies) ** 0.5 * values[groups == group][0], atol=2e-6, rtol=0)
    torch.testing.assert_close(torch.corrcoef(rows), torch.eye(6), atol=5 / 20000**0.5, rtol=0)
    for row in rows:
        check_white(row)


def test_what_a_source_gives_sums_to_it() -> None:
    """In a step, for sources that meet no other at their target."""
    height, width = 40, 56
    noise, flow = white(4, height, width), smooth_flow(height, width, seed=3)
    warped = stepped(noise, [flow]).noise.flatten(1)
    routes = Routes(height, width, flow.device)
    routes.follow(flow)
    holes = (routes.origin[:-1] < 0).nonzero().flatten()
    source = backward_sources(routes.offsets, holes)
    holes, source = holes[source >= 0], source[source >= 0]
    is_alone = torch.bincount(routes.target, minlength=height * width)[routes.target] == 1
    sums, counts = torch.zeros(4, height * width), torch.zeros(height * width)
    sums.index_add_(1, source, warped[:, holes])
    counts.index_add_(0, source, torch.ones(len(source)))
    moved = routes.inside & is_alone
    sums[:, moved] += warped[:, routes.target[moved]]
    counts[moved] += 1
    tested = (is_alone | ~routes.inside) & (counts > 0)
    assert (counts[tested] > 1).sum() > 100
    expected = counts.sqrt() * noise.flatten(1)
    torch.testing.assert_close(sums[:, tested], expected[:, tested], atol=1e-5, rtol=0)


FLOWS: dict[str, Callable[[int], Tensor]] = {
    "smooth": lambda seed: smooth_flow(96, 128, seed),
    "zoom in": lambda seed: zoom_flow(96, 128, 0.1),
    "zoom out": lambda seed: zoom_flow(96, 128, -0.1),
    "rough": lambda seed: white(2, 96, 128, seed=seed) * 2,
}


@pytest.mark.parametrize("kind", FLOWS)
@pytest.mark.parametrize("oob", ["keep", "drop"])
def test_noise_stays_white(kind: str, oob: OutOfBounds) -> None:
    warper = stepped(white(16, 96, 128), [FLOWS[kind](seed) for seed in range(4)], oob=oob)
    last = FLOWS[kind](4)
    warper.step(last, seeded(9))
    noise = warper.noise
    check_white(noise)
    pairs = [(noise[1:], noise[:-1]), (noise[:, 1:], noise[:, :-1]), (noise[..., 1:], noise[..., :-1])]
    for one, other in pairs:
        assert abs(correlation(one, other)) < 5 / one.numel() ** 0.5
    routes = Routes(96, 128, last.device)
    routes.follow(last, oob)
    sources = torch.bincount(routes.target, minlength=noise[0].numel() + 1)[:-1]
    for where in (sources == 0, sources > 1):  # new, and contracted places
        if where.any():
            check_white(noise.flatten(1)[:, where])


@pytest.mark.parametrize(("dx", "dy"), [(8, 0), (8, 4), (16, -24), (32, 0)])
def test_shifted_latents_correlate_by_their_overlap(dx: int, dy: int) -> None:
    noise = white(64, 192, 256)
    before = downscale_noise(noise, 32)
    after = downscale_noise(stepped(noise, [constant_flow(dx, dy, 192, 256)], oob="drop").noise, 32)
    inside = (slice(None), slice(1, -1), slice(1, -1))
    expected = (1 - abs(dx) / 32) * (1 - abs(dy) / 32)
    assert correlation(after[inside], before[inside]) == pytest.approx(expected, abs=5 / before[inside].numel() ** 0.5)
    if dx == 32:
        assert torch.equal(after[:, :, 1:], before[:, :, :-1])


def test_weights_stay_positive_and_of_mean_one() -> None:
    warper, generator = NoiseWarper(white(1, 40, 56)), seeded(0)
    for seed in range(100):
        warper.step(smooth_flow(5, 7, seed, length_px=0.4), generator)
        assert warper.weight.min() > 0
        before_floor_and_decay = warper.weight.double() ** (1 / 0.9999) - 1e-5
        assert abs(before_floor_and_decay.mean().item() - 1) < 1e-6
    assert warper.noise.isfinite().all()


# What goes in and out.


def test_flow_is_brought_to_the_working_grid() -> None:
    flow = torch.stack([torch.full((4, 6), 2.0), torch.full((4, 6), -3.0)])
    for swap_ratios, (dx, dy) in ((False, (10.0, -6.0)), (True, (4.0, -15.0))):
        torch.testing.assert_close(resize_flow(flow, (8, 30), swap_ratios), constant_flow(dx, dy, 8, 30))
    column = torch.tensor([0.0, 2.0, 4.0, 10.0])[:, None].expand(2, 4, 1)
    shrunk_and_grown = resize_flow(column, (2, 3))
    assert shrunk_and_grown.tolist() == [[[3.0] * 3, [21.0] * 3], [[0.5] * 3, [3.5] * 3]]


def test_flow_by_bands_is_the_flow_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    flow = smooth_flow(6, 9, seed=0, length_px=0.5)
    whole, banded = Routes(45, 72, flow.device), Routes(45, 72, flow.device)
    whole.follow(flow)
    monkeypatch.setattr("training_ggi.models.noise_warp.BAND_PIXELS", 4 * 72)
    banded.follow(flow)
    for name in ("offsets", "target", "inside", "origin"):
        assert torch.equal(getattr(whole, name), getattr(banded, name)), name
    assert torch.equal(whole.others(), banded.others())
    expected = resize_flow(flow, (45, 72))
    assert (whole.offsets - expected).abs().max() < 0.5 + 1e-5


def test_downscaling_keeps_unit_variance() -> None:
    noise = white(16, 96, 128)
    assert torch.equal(downscale_noise(noise, 1), noise)
    check_white(downscale_noise(noise, 4))
    assert downscale_noise(noise, 5).shape == (16, 20, 26)


def test_temporal_pick() -> None:
    assert resize_list("abcde", 3) == ["a", "c", "e"]
    assert resize_list(range(49), 13) == list(range(0, 49, 4))
    assert resize_list("abc", 1) == ["a"]
    with pytest.raises(ValueError, match="cannot pick 3 of 0 items; both must be at least 1"):
        resize_list([], 3)


def test_mixing() -> None:
    warped, fresh = white(3, 16, 50, 50), white(3, 16, 50, 50, seed=1)
    mixed = mix_noise(warped, fresh, torch.tensor([0.0, 1.0, 0.3]))
    assert torch.equal(mixed[0], warped[0])
    assert torch.equal(mixed[1], fresh[1])
    check_white(mixed[2])
    assert correlation(mixed[2], warped[2]) == pytest.approx(0.7 / 0.58**0.5, abs=0.02)


# Clips.


@pytest.fixture
def flow() -> Tensor:
    """(B, T, 2, h, w)"""
    flows = [smooth_flow(12, 16, seed, length_px=0.5) for seed in range(6)]
    return torch.stack(flows).view(2, 3, 2, 12, 16)


def warp(flow: Tensor, seeds: tuple[int, ...] = (1, 2), **options: object) -> Tensor:
    return warp_clip(flow, [seeded(seed) for seed in seeds], **{"channels": 4, **options})


def test_clips_have_latents_before_and_after_each_flow(flow: Tensor) -> None:
    noise = warp(flow)
    assert noise.shape == (2, 4, 4, 3, 4)
    assert noise.dtype == torch.float32
    warper = NoiseWarper(white(96 * 128, 4, seed=1).view(96, 128, 4).permute(2, 0, 1))
    assert torch.equal(noise[0, 0], downscale_noise(warper.noise, 32))
    assert warp(flow, flow_scale=4).shape == noise.shape
    assert warp(flow, frame_scale=0.25, latent_scale=4).shape == (2, 4, 4, 12, 16)


def test_kept_frames_are_those_of_the_whole_clip(flow: Tensor) -> None:
    whole = warp(flow)
    assert torch.equal(warp(flow, keep=[2, 0, 2]), whole[:, [2, 0, 2]])
    assert torch.equal(warp(flow, keep=[0]), whole[:, :1])


def test_a_clip_does_not_depend_on_others(flow: Tensor) -> None:
    both = warp(flow)
    assert torch.equal(warp(flow[1:], (2,))[0], both[1])
    assert torch.equal(warp(flow.flip(0), (2, 1)).flip(0), both)
    assert not torch.equal(warp(flow, (1, 3))[1], both[1])


@pytest.fixture
def num_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("channels", [3, 16])
def test_number_of_threads_does_not_matter(channels: int, num_threads: None) -> None:
    """Frames large enough for several threads, and of sizes that do not divide evenly."""
    flow = smooth_flow(27, 41, seed=0)[None, None].expand(1, 2, -1, -1, -1)
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(warp(flow, (0,), channels=channels, progressive_noise_alpha=0.1))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_progressive_noise(flow: Tensor) -> None:
    still = torch.zeros(1, 2, 2, 48, 64)
    noise = warp(still, (0,), channels=16, progressive_noise_alpha=0.2, flow_scale=2, frame_scale=1)[0]
    expected = 0.8 / math.sqrt(0.8**2 + 0.2**2)
    margin = 5 / noise[0].numel() ** 0.5
    for frame in (1, 2):
        check_white(noise[frame])
        assert correlation(noise[frame], noise[0]) == pytest.approx(expected**frame, abs=margin)


def test_inputs_stay_as_they_are() -> None:
    noise, weight, draw, flow = white(2, 8, 12), torch.ones(8, 12), white(2, 8, 24), smooth_flow(8, 12, 0)
    copies = [each.clone() for each in (noise, weight, draw, flow)]
    NoiseWarper(noise, weight).step(flow, draw)
    channel_last = noise.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    NoiseWarper(channel_last).step(flow, draw)
    for each, copy in zip((noise, weight, draw, flow), copies, strict=True):
        assert torch.equal(each, copy)
    assert torch.equal(channel_last, noise)


# Errors.


def test_errors_of_clips(flow: Tensor) -> None:
    with pytest.raises(ValueError, match=r"the flow has shape \(3, 2, 12, 16\); it must be \(B, T, 2, h, w\)"):
        warp(flow[0])
    with pytest.raises(ValueError, match="1 generators for 2 clips; give one per clip"):
        warp(flow, (1,))
    with pytest.raises(ValueError, match=r"keep is \[0, 4\]; 3 flows make frames 0 to 3"):
        warp(flow, keep=[0, 4])
    with pytest.raises(ValueError, match=r"keep is \[\]; 3 flows make frames 0 to 3"):
        warp(flow, keep=[])
    with pytest.raises(ValueError, match="oob is 'wrap'; it must be 'keep' or 'drop'"):
        warp(flow, oob="wrap")
    flow[1, 2, 0, 3, 3] = math.nan
    with pytest.raises(ValueError, match="flow 2 of clip 1 is not finite; mark unknown pixels by a flow out of the"):
        warp(flow)


def test_errors_of_the_warper() -> None:
    with pytest.raises(ValueError, match=r"the draw has shape \(2, 8, 12\); this warper needs .* = \(2, 8, 24\)"):
        NoiseWarper(white(2, 8, 12)).step(torch.zeros(2, 8, 12), white(2, 8, 12))
    with pytest.raises(ValueError, match="a working grid of 1 x 40000; sides may have 32767 pixels at most"):
        NoiseWarper(white(1, 1, 40000))


# On a GPU.


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu() -> None:
    noise, flow, draw = white(16, 192, 256), smooth_flow(24, 32, 0, length_px=0.5), white(16, 192, 512)
    cpu, cuda = NoiseWarper(noise), NoiseWarper(noise.cuda())
    for _ in range(3):
        cpu.step(flow, draw)
        cuda.step(flow.cuda(), draw.cuda())
    # Rounding may send a pixel near half a pixel elsewhere.
    assert ((cuda.noise.cpu() - cpu.noise).abs().amax(0) > 1e-4).float().mean() < 1e-3
    clips = [warp_clip(flow.cuda()[None, None], [torch.Generator("cuda").manual_seed(0)], keep=[1]) for _ in range(2)]
    assert torch.equal(*clips), "two runs differ"
    check_white(clips[0])
