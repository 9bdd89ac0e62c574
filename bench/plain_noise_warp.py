"""The noise warp written plainly, as the original computes it: what `bench/noise_warp.py` compares with.

Channels come first, both copies of all pixels lie side by side, every one of them gets a draw, and copies of one pixel
are found by sorting all values of channel 0.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


class PlainNoiseWarper:
    """Noise (C, H, W) and its weights (H, W)."""

    def __init__(self, noise: Tensor):
        self.noise = noise
        self.weight = torch.ones_like(noise[0])

    def step(self, flow: Tensor, draw: Tensor | None = None) -> None:
        """Moves the noise along a flow (2, h, w); `draw` (C, H, 2 W) stands in for new numbers."""
        channels, height, width = self.noise.shape
        scale = height / flow.shape[1]
        dx, dy = scale * F.interpolate(flow[None], size=(height, width), mode="bilinear")[0]
        rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        pixels = rows * width + columns  # (H, W)

        x, y = columns + dx.round().long(), rows + dy.round().long()
        inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
        target = torch.where(inside, y * width + x, pixels).flatten()
        occupied = torch.zeros(height * width, dtype=torch.bool)
        occupied[target] = True
        occupied = occupied.view(height, width)

        x, y = columns - dx.round().long(), rows - dy.round().long()
        expands = (x >= 0) & (x < width) & (y >= 0) & (y < height) & ~occupied
        source = torch.where(expands, y * width + x, 0).flatten()
        expanded = torch.where(expands, self.noise.flatten(1)[:, source].view_as(self.noise), 0.0)
        expanded_weight = torch.where(expands, self.weight.flatten()[source].view(height, width), 1.0)
        copies = torch.cat([torch.where(inside, self.noise, 0.0), expanded], dim=2)  # (C, H, 2 W)
        weights = torch.cat([torch.where(inside, self.weight, 1.0), expanded_weight], dim=1)  # (H, 2 W)

        copies, counts = regaussianize(copies, torch.randn_like(copies) if draw is None else draw)
        weights = weights / counts
        moved, moved_weight = copies[..., :width].flatten(1), weights[:, :width].flatten()
        weight_sum = torch.zeros(height * width).index_add_(0, target, moved_weight)
        square_sum = torch.zeros(height * width).index_add_(0, target, moved_weight.square())
        noise_sum = torch.zeros(channels, height * width).index_add_(1, target, moved * moved_weight)
        contracted = (noise_sum / square_sum.sqrt()).view_as(self.noise)
        self.noise = torch.where(occupied, contracted, copies[..., width:])
        weight = torch.where(occupied, weight_sum.view(height, width), weights[:, width:])
        self.weight = (weight / weight.mean() + 1e-5) ** 0.9999


def regaussianize(copies: Tensor, draw: Tensor) -> tuple[Tensor, Tensor]:
    """(C, H, 2 W) with equal values of channel 0 made independent; how many there were of each (H, 2 W)."""
    _, group, sizes = torch.unique(copies[0], return_inverse=True, return_counts=True)
    group = group.flatten()
    means = torch.zeros(len(copies), len(sizes)).index_add_(1, group, draw.flatten(1)) / sizes
    counts = sizes[group].view(copies.shape[1:])
    return copies / counts.sqrt() + draw - means[:, group].view_as(copies), counts
