"""Noise that moves with the optical flow of a clip and stays white: the noise warp of Go-with-the-Flow.

Per pixel of a working grid finer than the latents, a step moves noise and a weight along the flow. Where sources meet,
their noise is averaged by weight; holes are filled from where the flow came from, or else with fresh noise. What is
carried to several places is made independent again (`regaussianize`). Averaging down to the latent grid keeps unit
variance.

Noise is kept as rows of channels, one per pixel: a moved pixel is one copied row, and only rows that are copied several
times, meet others or start anew take part in arithmetic and draws. Rows are found through integer indices and summed in
a fixed order, so results are the same bit for bit from run to run, also on a GPU, and for any number of CPU threads.
"""

import math
from collections.abc import Sequence
from typing import Literal, Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

Item = TypeVar("Item")
OutOfBounds = Literal["keep", "drop"]
WEIGHT_FLOOR, WEIGHT_DECAY = 1e-5, 0.9999
BAND_PIXELS, MAX_SIDE_PX = 2**16, 2**15 - 1


class Draws(Protocol):
    """Where a step takes N(0, 1) numbers from. Pixels are linear indices, the result has a row of channels for each."""

    def shared(self, expanded: Tensor, moved: Tensor) -> Tensor:
        """For copies at pixels `expanded`, then for what moves away from pixels `moved`."""
        ...

    def blank(self, outside: Tensor, fresh: Tensor, expanded: Tensor) -> Tensor:
        """For sources that leave the frame, then for holes nothing flows into."""
        ...


class OwnDraws:
    """From a generator, no more than are used."""

    def __init__(self, generator: torch.Generator, channels: int, device: torch.device):
        self.generator, self.channels, self.device = generator, channels, device

    def rows(self, num_rows: int) -> Tensor:
        """(num_rows, C), drawn on the generator's device."""
        generator = self.generator
        return torch.randn(num_rows, self.channels, generator=generator, device=generator.device).to(self.device)

    def shared(self, expanded: Tensor, moved: Tensor) -> Tensor:
        return self.rows(len(expanded) + len(moved))

    def blank(self, outside: Tensor, fresh: Tensor, expanded: Tensor) -> Tensor:
        """Without the mean of the blank group, which is of the size of 1 / sqrt(number of pixels)."""
        return self.rows(len(outside) + len(fresh))


class GivenDraws:
    """From one draw (C, H, 2 W) for all copies, used or not, as the original makes it: moved ones, then expansions."""

    def __init__(self, draw: Tensor):
        self.moved, self.expansions = (half.flatten(1).T for half in draw.chunk(2, dim=-1))  # (N, C)

    def shared(self, expanded: Tensor, moved: Tensor) -> Tensor:
        return torch.cat([self.expansions[expanded], self.moved[moved]])

    def blank(self, outside: Tensor, fresh: Tensor, expanded: Tensor) -> Tensor:
        is_blank = torch.ones(len(self.expansions), dtype=torch.bool, device=expanded.device)
        is_blank[expanded] = False
        mean = torch.cat([self.moved[outside], self.expansions[is_blank]]).mean(0)
        return torch.cat([self.moved[outside], self.expansions[fresh]]) - mean


class NoiseWarper:
    """The noise of one clip and its weights on the working grid.

    Args:
        noise: (C, H, W), independent N(0, 1); it is copied, in float32.
        weight: (H, W), positive; ones by default.
        oob: what becomes of a pixel whose flow leaves the frame. "keep", as in the original: it stays, with fresh
            noise, so that its place is not filled from elsewhere. "drop": it is gone, and its place a hole like others.
        swap_ratios: as in `resize_flow`.
    """

    def __init__(
        self, noise: Tensor, weight: Tensor | None = None, *, oob: OutOfBounds = "keep", swap_ratios: bool = False
    ):
        if oob not in ("keep", "drop"):
            raise ValueError(f"oob is {oob!r}; it must be 'keep' or 'drop'")
        channels, self.height, self.width = noise.shape
        self.oob: OutOfBounds = oob
        self.swap_ratios = swap_ratios
        rows = noise.float().permute(1, 2, 0).clone(memory_format=torch.contiguous_format)
        self._rows = rows.view(-1, channels)  # (N, C), N = H * W
        self._weights = self._rows.new_ones(len(self._rows))  # (N,)
        if weight is not None:
            self._weights.copy_(weight.flatten())
        self._spare, self._spare_weights = torch.empty_like(self._rows), torch.empty_like(self._weights)
        self._routes = Routes(self.height, self.width, noise.device)

    @property
    def noise(self) -> Tensor:
        """(C, H, W), a view that the next step changes."""
        return self._rows.view(self.height, self.width, -1).permute(2, 0, 1)

    @property
    def weight(self) -> Tensor:
        """(H, W), positive, of a mean near 1; a view that the next step changes."""
        return self._weights.view(self.height, self.width)

    @torch.no_grad()
    def mix(self, alpha: float, generator: torch.Generator) -> None:
        """Replaces a part of the noise by fresh one, see `mix_noise`."""
        fresh = OwnDraws(generator, self._rows.shape[1], self._rows.device).rows(len(self._rows))
        norm = math.hypot(alpha, 1 - alpha)
        self._rows.mul_((1 - alpha) / norm).add_(fresh.mul_(alpha / norm))

    @torch.no_grad()
    def step(self, flow: Tensor, draws: torch.Generator | Tensor) -> None:
        """Moves the noise along a flow.

        Args:
            flow: (2, h, w), (dx, dy) in pixels of its own grid from this frame to the next, finite. What points out of
                the frame, however far, counts as unknown.
            draws: a generator, or all N(0, 1) numbers that a step can need, (C, H, 2 W): for moved, then for expanded
                pixels.
        """
        channels, device = self._rows.shape[1], self._rows.device
        if isinstance(draws, torch.Generator):
            self._warp(flow, OwnDraws(draws, channels, device))
            return
        if draws.shape != (channels, self.height, 2 * self.width):
            expected = (channels, self.height, 2 * self.width)
            raise ValueError(f"the draw has shape {tuple(draws.shape)}; this warper needs (C, H, 2 W) = {expected}")
        self._warp(flow, GivenDraws(draws.to(self._rows)))

    def _warp(self, flow: Tensor, draws: Draws) -> None:
        num_pixels = len(self._rows)
        routes = self._routes
        routes.follow(flow, self.oob, self.swap_ratios)
        outside = (~routes.inside).nonzero().flatten() if self.oob == "keep" else routes.target.new_empty(0).long()
        holes = (routes.origin[:num_pixels] < 0).nonzero().flatten()
        source = backward_sources(routes.offsets, holes)
        has_source = source >= 0
        expanded, source, fresh = holes[has_source], source[has_source], holes[~has_source]

        is_source = torch.zeros_like(routes.inside)
        is_source[source] = True
        shared = (is_source & routes.inside).nonzero().flatten()  # sources that are moved, and copied besides
        groups = torch.cat([source, shared])
        copies, counts = regaussianize(self._rows.index_select(0, groups), groups, draws.shared(expanded, shared))
        copy_weights = self._weights.index_select(0, groups) / counts
        blanks = draws.blank(outside, fresh, expanded)
        blank_weight = 1 / max(len(outside) + num_pixels - len(expanded), 1)

        # What is moved takes the place of its source; then all that moves to a place of its own is one gather.
        self._rows[shared], self._rows[outside] = copies[len(expanded) :], blanks[: len(outside)]
        self._weights[shared], self._weights[outside] = copy_weights[len(expanded) :], blank_weight
        others = routes.others()
        origins = routes.origin[:num_pixels].clamp_min_(0)
        rows = torch.index_select(self._rows, 0, origins, out=self._spare)
        weights = torch.index_select(self._weights, 0, origins, out=self._spare_weights)
        if len(others):
            self._contract(rows, weights, others, routes.target.index_select(0, others))
        rows[expanded], rows[fresh] = copies[: len(expanded)], blanks[len(outside) :]
        weights[expanded], weights[fresh] = copy_weights[: len(expanded)], blank_weight
        self._rows, self._spare = rows, self._rows
        self._weights, self._spare_weights = self._normalized(weights), self._weights

    def _contract(self, rows: Tensor, weights: Tensor, others: Tensor, targets: Tensor) -> None:
        """Where sources meet: sum(w n) / sqrt(sum(w^2)) and sum(w). One of them is in `rows`, `others` (M,) are not."""
        targets, order = targets.sort(stable=True)
        others = others.index_select(0, order)
        met, counts = torch.unique_consecutive(targets, return_counts=True)
        starts = counts.cumsum(0) - counts
        first_weights, other_weights = weights.index_select(0, met), self._weights.index_select(0, others)
        sums = F.embedding_bag(others, self._rows, starts, mode="sum", per_sample_weights=other_weights)  # (places, C)
        powers = torch.stack([other_weights, other_weights.square()], dim=1)
        power_sums = F.embedding_bag(torch.arange(len(others), device=starts.device), powers, starts, mode="sum")
        norm = (power_sums[:, 1] + first_weights.square()).sqrt()
        firsts = rows.index_select(0, met).mul_(first_weights[:, None])
        rows[met] = sums.add_(firsts).div_(norm[:, None])
        weights[met] = power_sums[:, 0] + first_weights

    def _normalized(self, weights: Tensor) -> Tensor:
        # The order of a sum over all would depend on the number of threads, as does the rounding of pow.
        mean = weights.view(self.height, self.width).sum(1).sum() / len(weights)
        return weights.div_(mean).add_(WEIGHT_FLOOR).log_().mul_(WEIGHT_DECAY).exp_()


def resize_flow(flow: Tensor, size: tuple[int, int], swap_ratios: bool = False) -> Tensor:
    """Brings a flow (2, h, w), (dx, dy) in pixels of its own grid, to a grid of (height, width).

    Shrinking averages areas, growing interpolates linearly; if one side shrinks and the other grows, in this order.

    Args:
        swap_ratios: scale dx by the ratio of heights and dy by that of widths, as the original does. It matters only
            where the ratios differ.
    """
    height, width = flow.shape[1:]
    ratios = [size[0] / height, size[1] / width] if swap_ratios else [size[1] / width, size[0] / height]
    flow = (flow.float() * flow.new_tensor(ratios, dtype=torch.float32)[:, None, None])[None]  # (1, 2, h, w)
    smaller = (min(height, size[0]), min(width, size[1]))
    if smaller != (height, width):
        flow = F.interpolate(flow, size=smaller, mode="area")
    if smaller != tuple(size):
        flow = F.interpolate(flow, size=size, mode="bilinear", align_corners=False)
    return flow[0]  # (2, H, W)


class Routes:
    """Where the pixels of a frame move, N = height * width of them, as linear indices.

    The same tensors serve each `follow`: fresh memory of this size would cost more time than all that is computed.

    Attributes:
        offsets: (2, H, W), whole pixels (dx, dy), int16.
        target: (N,), int32; of what leaves the frame its own place, or N if it is dropped.
        inside: (N,), bool, whether it stays in the frame.
        origin: (N + 1,), int32, the highest index of those that move to a place, -1 if none does.
    """

    def __init__(self, height: int, width: int, device: torch.device):
        if max(height, width) > MAX_SIDE_PX:
            raise ValueError(f"a working grid of {height} x {width}; sides may have {MAX_SIDE_PX} pixels at most")
        self.height, self.width, num_pixels = height, width, height * width
        self.offsets = torch.empty(2, height, width, dtype=torch.int16, device=device)
        self.target = torch.empty(num_pixels, dtype=torch.int32, device=device)
        self.inside = torch.empty(num_pixels, dtype=torch.bool, device=device)
        self.origin = torch.empty(num_pixels + 1, dtype=torch.int32, device=device)

    def follow(self, flow: Tensor, oob: OutOfBounds = "keep", swap_ratios: bool = False) -> None:
        """Takes a flow (2, h, w), brought to this frame's size and rounded to whole pixels, halves to even."""
        height, width, device = self.height, self.width, flow.device
        self.origin.fill_(-1)
        columns = torch.arange(width, dtype=torch.int32, device=device)
        tall = resize_flow(flow, (height, flow.shape[2]), swap_ratios)  # (2, H, w)
        for lines, places in self._bands():
            band = resize_flow(tall[:, lines], (lines.stop - lines.start, width), swap_ratios).round_()  # (2, n, W)
            band[0].clamp_(-width, width)
            band[1].clamp_(-height, height)
            self.offsets[:, lines] = band
            dx, dy = self.offsets[:, lines]
            rows = torch.arange(lines.start, lines.stop, dtype=torch.int32, device=device)[:, None]
            moved, inside = _linear_index(dx + columns, dy + rows, (height, width))
            pixels = columns + rows * width
            target = torch.where(inside, moved, pixels if oob == "keep" else height * width).flatten()
            self.target[places], self.inside[places] = target, inside.flatten()
            self.origin.scatter_reduce_(0, target.long(), pixels.flatten(), "amax")

    def others(self) -> Tensor:
        """Pixels (M,) that move to a place in the frame, without being its origin; int64."""
        found = []
        for _, places in self._bands():
            pixels = torch.arange(places.start, places.stop, dtype=torch.int32, device=self.target.device)
            others = self.origin.index_select(0, self.target[places]) != pixels
            found.append(others.nonzero().flatten() + places.start)
        others = torch.cat(found)
        return others[self.target.index_select(0, others) < len(self.target)]

    def _bands(self) -> list[tuple[slice, slice]]:
        """Lines and their pixels: few enough for a CPU's cache to hold results in between; a GPU takes all at once."""
        step = self.height if self.target.is_cuda else max(1, BAND_PIXELS // self.width)
        bounds = [(top, min(top + step, self.height)) for top in range(0, self.height, step)]
        return [(slice(top, stop), slice(top * self.width, stop * self.width)) for top, stop in bounds]


def backward_sources(offsets: Tensor, pixels: Tensor) -> Tensor:
    """Linear index that the flow comes from, -1 if outside the frame, of pixels (M,), int64; offsets as in `Routes`."""
    height, width = offsets.shape[1:]
    dx, dy = offsets.flatten(1).index_select(1, pixels)
    source, inside = _linear_index(pixels % width - dx, pixels // width - dy, (height, width))
    return source.masked_fill_(~inside, -1)


def _linear_index(x: Tensor, y: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Of pixels, and whether they are inside the frame."""
    height, width = size
    inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    return y * width + x, inside


def regaussianize(values: Tensor, groups: Tensor, draws: Tensor) -> tuple[Tensor, Tensor]:
    """Makes k copies of a value independent, with unit variance: v / sqrt(k) + g - mean of g over the copies.

    Args:
        values: (M, C), equal within a group.
        groups: (M,), integers that name the group of each copy.
        draws: (M, C), N(0, 1).

    Returns:
        New values (M, C), whose sum over a group is sqrt(k) v; and k (M,).
    """
    ordered, order = groups.sort(stable=True)
    _, number, sizes = torch.unique_consecutive(ordered, return_inverse=True, return_counts=True)
    group = torch.empty_like(order).scatter_(0, order, number)
    sums = F.embedding_bag(order, draws, sizes.cumsum(0) - sizes, mode="sum")  # (groups, C)
    means = (sums / sizes[:, None]).index_select(0, group)  # (M, C)
    counts = sizes.index_select(0, group)
    return torch.sub(draws, means, out=means).addcdiv_(values, counts.sqrt()[:, None]), counts


def downscale_noise(noise: Tensor, factor: int) -> Tensor:
    """Averages areas and restores unit variance: (C, H, W) -> (C, ceil(H / factor), ceil(W / factor))."""
    height, width = (math.ceil(side * (1 / factor)) for side in noise.shape[1:])
    if noise.shape[1:] != (height * factor, width * factor):
        return F.interpolate(noise[None], size=(height, width), mode="area")[0] * factor
    pixels = noise.permute(1, 2, 0)  # (H, W, C)
    lines = pixels.reshape(height, factor, -1).sum(1).view(height, width, factor, -1)  # (h, w, factor, C)
    return lines.sum(2).permute(2, 0, 1) / factor  # (C, h, w)


def resize_list(items: Sequence[Item], length: int) -> list[Item]:
    """Nearest of evenly spaced items from the first to the last, halves to the even index; for length 1 the first."""
    if not items or length < 1:
        raise ValueError(f"cannot pick {length} of {len(items)} items; both must be at least 1")
    spacing = (len(items) - 1) / max(length - 1, 1)
    return [items[round(i * spacing)] for i in range(length)]


def mix_noise(warped: Tensor, fresh: Tensor, alpha: float | Tensor) -> Tensor:
    """(alpha * fresh + (1 - alpha) * warped) / sqrt(alpha^2 + (1 - alpha)^2), computed in float32 with exact weights.

    Args:
        warped: (B, ...), any float type, which the result has as well; alpha = 0 returns it.
        fresh: alike, independent of it.
        alpha: from 0 to 1, one number or one per sample (B,).
    """
    share = torch.as_tensor(alpha, dtype=torch.float64, device=warped.device)
    share = share.view(-1, *[1] * (warped.dim() - 1))  # (B or 1, 1, ...)
    norm = (share.square() + (1 - share).square()).sqrt()
    mixed = share.float() * fresh.float() + (1 - share).float() * warped.float()
    return (mixed / norm.float()).to(warped.dtype)


@torch.no_grad()
def warp_clip(
    flow: Tensor,
    generators: Sequence[torch.Generator],
    *,
    channels: int = 16,
    flow_scale: int = 8,
    frame_scale: float = 0.5,
    latent_scale: int = 8,
    keep: Sequence[int] | None = None,
    oob: OutOfBounds = "keep",
    progressive_noise_alpha: float = 0.0,
) -> Tensor:
    """Warped noise for clips, one after another: the working grid of one clip is in memory, whatever B and T.

    Args:
        flow: (B, T, 2, h, w), (dx, dy) in pixels of its own grid from each frame to the next, finite.
        generators: one per clip. Draws are made on a generator's device, and depend on nothing but it and the clip's
            flow up to the last kept frame.
        flow_scale: working pixels per flow pixel. A quarter of the work for half of it.
        frame_scale: flow pixels per frame pixel.
        latent_scale: frame pixels per latent pixel.
        keep: numbers of the frames wanted, 0..T (0 is before any flow); all by default.
        oob: see `NoiseWarper`.
        progressive_noise_alpha: how much fresh noise enters before each step, 0 to 1 (`mix_noise`).

    Returns:
        (B, T + 1 or len(keep), C, h / (frame_scale * latent_scale), w / ...), float32, N(0, 1), on the flow's device.

    Raises:
        ValueError: for shapes, numbers of frames or options that do not fit, or a flow that is not finite.
    """
    keep = list(range(flow.shape[1] + 1)) if keep is None else list(keep)
    _check_clips(flow, generators, keep)
    factor = round(frame_scale * flow_scale) * latent_scale
    size = (flow_scale * flow.shape[3], flow_scale * flow.shape[4])
    clips = []
    for clip_flow, generator in zip(flow, generators, strict=True):
        draws = OwnDraws(generator, channels, flow.device)
        warper = NoiseWarper(draws.rows(size[0] * size[1]).view(*size, channels).permute(2, 0, 1), oob=oob)
        latents = {0: downscale_noise(warper.noise, factor)}
        for frame in range(1, max(keep) + 1):
            if progressive_noise_alpha:
                warper.mix(progressive_noise_alpha, generator)
            warper.step(clip_flow[frame - 1], generator)
            if frame in keep:
                latents[frame] = downscale_noise(warper.noise, factor)  # (C, h / ..., w / ...)
        clips.append(torch.stack([latents[frame] for frame in keep]))  # (F, C, h / ..., w / ...)
    return torch.stack(clips)  # (B, F, C, h / ..., w / ...)


def _check_clips(flow: Tensor, generators: Sequence[torch.Generator], keep: list[int]) -> None:
    if flow.dim() != 5 or flow.shape[2] != 2:
        raise ValueError(f"the flow has shape {tuple(flow.shape)}; it must be (B, T, 2, h, w)")
    if len(generators) != len(flow):
        raise ValueError(f"{len(generators)} generators for {len(flow)} clips; give one per clip")
    if not keep or min(keep) < 0 or max(keep) > flow.shape[1]:
        raise ValueError(f"keep is {keep}; {flow.shape[1]} flows make frames 0 to {flow.shape[1]}")
    finite = flow.isfinite().flatten(2).all(2)  # (B, T)
    if not finite.all():
        clip, step = (~finite).nonzero()[0].tolist()
        raise ValueError(f"flow {step} of clip {clip} is not finite; mark unknown pixels by a flow out of the frame")
