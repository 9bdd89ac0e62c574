"""Embeddings of patches, positions, time, motion, text and labels.

Angles and sinusoids are float32 whatever the precision of the weights: in half precision neighbouring positions and
timesteps would coincide.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FREQUENCIES = 128
DEFAULT_FLOW, DEFAULT_FPS = 5.0, 12.0
TEXT_ROWS = 512  # null embeddings that a checkpoint holds; a model uses the first `num_tokens`


def patchify(x: Tensor, patch: int) -> Tensor:
    """Images (..., C, H, W) to tokens (..., H/p * W/p, p * p * C), a token's values in the order (row, column, C)."""
    *lead, channels, height, width = x.shape
    rows, columns = height // patch, width // patch
    x = x.reshape(-1, channels, rows, patch, columns, patch)  # (n, C, H/p, p, W/p, p)
    x = x.permute(0, 2, 4, 3, 5, 1)  # (n, H/p, W/p, p, p, C)
    return x.reshape(*lead, rows * columns, patch * patch * channels)


def unpatchify(tokens: Tensor, patch: int, size: tuple[int, int]) -> Tensor:
    """Inverse of `patchify`: (..., N, p * p * C) to (..., C, H, W), where size = (H, W)."""
    *lead, _, values = tokens.shape
    rows, columns, channels = size[0] // patch, size[1] // patch, values // patch**2
    x = tokens.reshape(-1, rows, columns, patch, patch, channels)  # (n, H/p, W/p, p, p, C)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(*lead, channels, *size)  # (..., C, H, W)


class PatchEmbed(nn.Module):
    """A convolution whose stride is its kernel, done as a linear map: it also takes some tokens of an image only."""

    def __init__(self, image_dim: int, embed_dim: int, patch: int):
        super().__init__()
        self.patch = patch
        self.proj = nn.Conv2d(image_dim, embed_dim, patch, patch)

    def forward(self, x: Tensor) -> Tensor:
        """Latents (..., C, H, W) to (..., N, D)."""
        return self.project(patchify(x, self.patch))

    def project(self, tokens: Tensor) -> Tensor:
        """Tokens (..., p * p * C) of `patchify` to (..., D)."""
        weight = self.proj.weight.permute(0, 2, 3, 1).flatten(1)  # (D, p * p * C)
        return F.linear(tokens.to(weight.dtype), weight, self.proj.bias)


def sinusoids(values: Tensor, frequencies: Tensor) -> tuple[Tensor, Tensor]:
    """Sines and cosines of values (...) at frequencies (count,): two of (..., count), float32."""
    angles = values[..., None].float() * frequencies  # (..., count)
    return angles.sin(), angles.cos()


def position_frequencies(count: int = FREQUENCIES, device: torch.device | None = None) -> Tensor:
    """10000^(-k / count) of k < count: (count,) float32."""
    return 1 / 10_000 ** (torch.arange(count, dtype=torch.float32, device=device) / count)


def position_embedding(size: Sequence[int], dim: int, device: torch.device | None = None) -> Tensor:
    """Sinusoids of the places of H x W tokens: (H * W, dim) float32, [sin w, cos w, sin h, cos h]."""
    height, width = size
    frequencies = position_frequencies(dim // 4, device)  # (dim / 4,)
    rows = torch.cat(sinusoids(torch.arange(height, device=device), frequencies), dim=-1)  # (H, dim / 2)
    columns = torch.cat(sinusoids(torch.arange(width, device=device), frequencies), dim=-1)  # (W, dim / 2)
    rows, columns = rows[:, None].expand(-1, width, -1), columns[None].expand(height, -1, -1)  # (H, W, dim / 2) each
    return torch.cat([columns, rows], dim=-1).flatten(0, 1)  # (H * W, dim)


def grid_positions(
    num_frames: int, size: Sequence[int], first_frame: int = 0, device: torch.device | None = None
) -> Tensor:
    """Places (t, h, w) of the tokens of some frames: (num_frames * H * W, 3)."""
    times = torch.arange(first_frame, first_frame + num_frames, device=device)
    axes = (times, *(torch.arange(length, device=device) for length in size))
    return torch.cartesian_prod(*axes)  # (T * H * W, 3)


def _two_layers(dim: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(2 * FREQUENCIES, dim), nn.SiLU(), nn.Linear(dim, dim))


class VideoPosEmbed(nn.Module):
    """Adds time and place to the tokens of frames.

    Args:
        base_size: (T, H, W); any number of frames is stretched over T, H x W tokens are a frame's.
    """

    def __init__(self, dim: int, base_size: Sequence[int]):
        super().__init__()
        self.dim, self.base_size = dim, tuple(base_size)
        self.norm = nn.LayerNorm(dim)
        self.time_proj = _two_layers(dim)

    def time(self, num_frames: int) -> Tensor:
        """Embeddings of the frames of a video of `num_frames`: (num_frames, 1, dim)."""
        weight = self.norm.weight
        frames = torch.arange(num_frames, dtype=torch.float32, device=weight.device)
        frames = frames * (self.base_size[0] / num_frames)  # (T,)
        waves = torch.cat(sinusoids(frames, position_frequencies(device=frames.device)), dim=-1)  # (T, 256)
        return self.norm(self.time_proj(waves.to(weight.dtype)))[:, None]  # (T, 1, dim)

    def forward(self, x: Tensor, num_frames: int | None = None, first_frame: int = 0) -> Tensor:
        """(B, t, H * W, dim) to the same: frames first_frame, ..., first_frame + t - 1 of `num_frames` (default t)."""
        time = self.time(num_frames or x.shape[1])[first_frame : first_frame + x.shape[1]]  # (t, 1, dim)
        return x + time + position_embedding(self.base_size[1:], self.dim, x.device).to(x.dtype)


class MotionEmbed(nn.Module):
    """Two tokens: how much a clip moves, and its frame rate."""

    def __init__(self, dim: int):
        super().__init__()
        self.flow_proj = _two_layers(dim)
        self.fps_proj = _two_layers(dim)

    def forward(self, flow: Tensor, fps: Tensor | None = None) -> Tensor:
        """Flow scores (B,) and frames per second (B,), by default 12, to (B, 2, dim): flow, then rate."""
        fps = torch.full_like(flow, DEFAULT_FPS) if fps is None else fps
        dtype, frequencies = self.flow_proj[0].weight.dtype, position_frequencies(device=flow.device)
        tokens = [
            proj(torch.cat(sinusoids(value, frequencies), dim=-1).to(dtype))  # (B, dim)
            for proj, value in ((self.flow_proj, flow), (self.fps_proj, fps))
        ]
        return torch.stack(tokens, dim=1)  # (B, 2, dim)


class TextEmbed(nn.Module):
    """Projects outputs of the text encoder.

    `weight` is what stands for a prompt's unused tokens, and for all tokens of a dropped prompt. It is never trained.
    """

    weight: Tensor

    def __init__(self, token_dim: int, embed_dim: int, num_tokens: int):
        super().__init__()
        if num_tokens > TEXT_ROWS:
            raise ValueError(f"text_token_len={num_tokens} is above {TEXT_ROWS}, the number of null embeddings")
        self.num_tokens = num_tokens
        self.register_buffer("weight", torch.randn(TEXT_ROWS, token_dim) * 0.02)
        self.proj = nn.Linear(token_dim, embed_dim)
        self.norm = nn.LayerNorm(embed_dim)

    @torch.no_grad()
    def pad(self, prompts: Sequence[Tensor]) -> Tensor:
        """Prompts (l, token_dim), l at most num_tokens, to rows (B, num_tokens, token_dim) in the buffer's precision.

        Raises:
            ValueError: a prompt has too many tokens or another width.
        """
        rows = self.weight[: self.num_tokens].repeat(len(prompts), 1, 1)  # (B, num_tokens, token_dim)
        for i, prompt in enumerate(prompts):
            if prompt.ndim != 2 or len(prompt) > self.num_tokens or prompt.shape[1] != rows.shape[2]:
                raise ValueError(
                    f"prompt {i} is an embedding of shape {tuple(prompt.shape)}; this model takes at most "
                    f"({self.num_tokens}, {rows.shape[2]}): (tokens, width of the text encoder)"
                )
            rows[i, : len(prompt)] = prompt.to(rows)
        return rows

    def forward(self, rows: Tensor, dropped: Tensor | None = None) -> Tensor:
        """Rows (B, num_tokens, token_dim) of `pad`, dropped (B,) bool, to (B, num_tokens, embed_dim).

        Raises:
            ValueError: rows of another shape.
        """
        if rows.shape[1:] != self.weight[: self.num_tokens].shape:
            expected = f"(B, {self.num_tokens}, {self.weight.shape[1]}), as `text_embed.pad` makes them"
            raise ValueError(f"text is {tuple(rows.shape)}, expected {expected}")
        rows = rows.to(self.weight)
        if dropped is not None:
            rows = torch.where(dropped[:, None, None], self.weight[: self.num_tokens], rows)
        return self.norm(self.proj(rows.to(self.proj.weight.dtype)))


class LabelEmbed(nn.Module):
    """One token for a class; the last row stands for none."""

    def __init__(self, embed_dim: int, num_classes: int = 1000):
        super().__init__()
        self.num_classes = num_classes
        self.weight = nn.Parameter(torch.randn(num_classes + 1, embed_dim) * 0.02)
        self.norm = nn.LayerNorm(embed_dim)

    def forward(self, labels: Tensor, dropped: Tensor | None = None) -> Tensor:
        """Labels (B,) in [0, num_classes], dropped (B,) bool, to (B, 1, embed_dim)."""
        if dropped is not None:
            labels = torch.where(dropped, self.num_classes, labels)
        return self.norm(F.embedding(labels, self.weight)[:, None])  # (B, 1, embed_dim)
