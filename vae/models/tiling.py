"""Large frames in overlapping tiles, for memory that grows with the tile instead of the frame.

The result is approximate: convolutions end at a tile's edge, attention and group norms see one tile instead of the
frame. Linear cross-fades hide the seams as far as they can.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Tiles:
    """Square tiles of a frame.

    Attributes:
        tile_px: side of a tile, a multiple of `spatial_factor`.
        overlap: part of a tile that it shares with the next one, a whole number of latents.
        spatial_factor: pixels per latent.
    """

    tile_px: int = 256
    overlap: float = 0.125
    spatial_factor: int = 8

    def __post_init__(self) -> None:
        factor = self.spatial_factor
        if self.tile_px < factor or self.tile_px % factor:
            nearest = max(1, round(self.tile_px / factor)) * factor
            raise ValueError(f"tile_px is {self.tile_px}, but must be a multiple of {factor}: use {nearest}")
        shared = self.overlap * self.latents
        if not 0 <= self.overlap < 1 or abs(shared - round(shared)) > 1e-6:
            nearest = min(max(round(shared), 0), self.latents - 1) / self.latents
            raise ValueError(
                f"overlap is {self.overlap}, but must be below 1 and a multiple of 1/{self.latents}, because a tile of"
                f" {self.tile_px} px has {self.latents} latents: use {nearest:g}"
            )

    @property
    def latents(self) -> int:
        """Side of a tile in latents."""
        return self.tile_px // self.spatial_factor

    @property
    def shared_latents(self) -> int:
        """Width of an overlap in latents."""
        return round(self.overlap * self.latents)


def encode_tiles(encode: Callable[[Tensor], Tensor], x: Tensor, tiles: Tiles) -> Tensor:
    """Moments of a clip, tile by tile, with cross-fades between latents.

    Args:
        encode: (B, 3, T, H, W) -> (B, 2z, t, H / 8, W / 8); 8 stands for the spatial factor.
        x: (B, 3, T, H, W).
    """
    stride_px = tiles.tile_px - tiles.shared_latents * tiles.spatial_factor
    return _by_tiles(encode, x, tiles.tile_px, stride_px, tiles.latents, tiles.shared_latents)


def decode_tiles(decode: Callable[[Tensor], Tensor], z: Tensor, tiles: Tiles) -> Tensor:
    """A clip from latents (B, z, t, h, w), tile by tile, with cross-fades between pixels."""
    shared = tiles.shared_latents
    return _by_tiles(decode, z, tiles.latents, tiles.latents - shared, tiles.tile_px, shared * tiles.spatial_factor)


def time_chunks(num_frames: int, stride_frames: int, reach_frames: int) -> list[slice]:
    """Overlapping runs of frames: they start every `stride_frames` and reach `reach_frames` past the next start."""
    starts = range(0, num_frames, stride_frames)
    chunks = [slice(start, min(start + stride_frames + reach_frames, num_frames)) for start in starts[:-1]]
    if not chunks or chunks[-1].stop < num_frames:
        chunks.append(slice(starts[-1], num_frames))
    return chunks


def _by_tiles(
    run: Callable[[Tensor], Tensor], x: Tensor, tile: int, stride: int, out_tile: int, out_shared: int
) -> Tensor:
    """Each tile of x through `run`; a tile fades in over the tile above it, then over the one to its left."""
    keep = out_tile - out_shared
    above: dict[int, Tensor] = {}
    rows = []
    for top in range(0, x.shape[-2], stride):
        row: list[Tensor] = []
        before = None
        for left in range(0, x.shape[-1], stride):
            out = run(x[..., top : top + tile, left : left + tile])
            if left in above:
                out = _cross_fade(above[left], out, out_shared, dim=-2)
            if before is not None:
                out = _cross_fade(before, out, out_shared, dim=-1)
            above[left] = before = out
            row.append(out[..., :keep, :keep])
        rows.append(torch.cat(row, dim=-1))
    return torch.cat(rows, dim=-2)


def _cross_fade(before: Tensor, after: Tensor, extent: int, dim: int) -> Tensor:
    """`after`, whose first `extent` rows (or columns) come linearly out of the last ones of `before`."""
    extent = min(extent, before.shape[dim], after.shape[dim])
    if extent == 0:
        return after
    weight = torch.arange(extent, dtype=after.dtype, device=after.device) / extent
    weight = weight.unsqueeze(-1) if dim == -2 else weight  # (extent, 1) or (extent,)
    tail = before.narrow(dim, before.shape[dim] - extent, extent)
    head, rest = after.split([extent, after.shape[dim] - extent], dim=dim)
    return torch.cat([tail * (1 - weight) + head * weight, rest], dim=dim)
