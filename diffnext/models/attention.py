"""Self-attention: rotary positions, frame-causal attention without a dense mask, cached keys and values."""

from collections.abc import Sequence
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class KVCache:
    """Keys and values of one attention layer, of all frames so far."""

    def __init__(self) -> None:
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    def extend(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Append (B, heads, n, head_dim) along the sequence; returns all that is held."""
        if self.keys is not None and self.values is not None:
            keys = torch.cat([self.keys, keys], dim=2)  # (B, heads, held + n, head_dim)
            values = torch.cat([self.values, values], dim=2)
        self.keys, self.values = keys, values
        return keys, values


def frame_causal_attention(q: Tensor, k: Tensor, v: Tensor, frame_lengths: Sequence[int]) -> Tensor:
    """Tokens see their own frame and all frames before it.

    One call per frame over the keys so far: nothing is computed in vain, and without a mask every kernel will do.

    Args:
        q, k, v: (B, heads, sum(frame_lengths), head_dim).
        frame_lengths: tokens of each frame in order; those of a prefix count to the first.

    Returns:
        (B, heads, sum(frame_lengths), head_dim).
    """
    ends = accumulate(frame_lengths)
    frames = [
        F.scaled_dot_product_attention(q[:, :, end - length : end], k[:, :, :end], v[:, :, :end])
        for length, end in zip(frame_lengths, ends, strict=True)
    ]
    return torch.cat(frames, dim=2)


def rotary_angles(positions: Tensor, head_dim: int, theta: float = 10_000.0) -> Tensor:
    """Rotation angles of tokens on three axes (Su et al. 2021, with the head split among time, height and width).

    Args:
        positions: (..., 3) of (t, h, w).
        head_dim: an eighth of it goes to time, the rest in halves to height and width; all three must be even.

    Returns:
        (..., head_dim / 2) float32, one angle per pair of channels.

    Raises:
        ValueError: `head_dim` cannot be split so.
    """
    time_dim = head_dim // 8
    space_dim = (head_dim - time_dim) // 2
    if head_dim % 8 or time_dim % 2 or space_dim % 2:
        raise ValueError(
            f"rotary positions need a head width of which 1/8 and 7/16 are even, got {head_dim}: use a multiple of 32 "
            "(or 96 = 12 + 42 + 42), or rotary_pos_embed=False"
        )
    angles = []
    for axis, dim in enumerate((time_dim, space_dim, space_dim)):
        exponents = torch.arange(0, dim, 2, dtype=torch.float32, device=positions.device) / dim  # (dim / 2,)
        angles.append(positions[..., axis, None].float() * theta**-exponents)  # (..., dim / 2)
    return torch.cat(angles, dim=-1)  # (..., head_dim / 2)


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Rotate neighbouring channels: x (B, heads, n, head_dim) by angles (B or 1, n, head_dim / 2)."""
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]  # (B or 1, 1, n, head_dim / 2)
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)  # (B, heads, n, head_dim / 2) each
    rotated = torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1)  # (..., head_dim / 2, 2)
    return rotated.flatten(-2).to(x.dtype)  # (B, heads, n, head_dim)


class Attention(nn.Module):
    """Multi-head self-attention of (B, n, dim)."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(
        self,
        x: Tensor,
        angles: Tensor | None = None,
        frame_lengths: Sequence[int] | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """(B, n, dim) to (B, n, dim).

        Args:
            angles: (B or 1, n, head_dim / 2) of `rotary_angles`.
            frame_lengths: makes attention frame-causal; None lets all tokens see all others.
            cache: tokens also see what it holds, and are added to it.
        """
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))  # (B, n, 3, heads, head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # (B, heads, n, head_dim) each
        if angles is not None:
            q, k = rotate(q, angles), rotate(k, angles)
        if cache is not None:
            k, v = cache.extend(k, v)
        if frame_lengths is not None and len(frame_lengths) > 1:
            out = frame_causal_attention(q, k, v, frame_lengths)
        else:
            out = F.scaled_dot_product_attention(q, k, v)
        return self.proj(out.transpose(1, 2).flatten(2))  # (B, n, dim)
