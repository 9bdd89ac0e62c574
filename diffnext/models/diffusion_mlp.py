"""The diffusion head: an MLP that denoises each token by itself, given its features (Li et al. 2024)."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from diffnext.models.embeddings import FREQUENCIES, PatchEmbed, sinusoids


def timestep_waves(timestep: Tensor) -> Tensor:
    """Cosines, then sines, of timesteps (...) at frequencies 10000^(-k / 128): (..., 256) float32."""
    # The form of the original: up to time 1000, another rounding of the powers would show in the waves.
    powers = torch.arange(FREQUENCIES, dtype=torch.float32, device=timestep.device)  # (128,)
    sin, cos = sinusoids(timestep, torch.exp(-math.log(10_000) * powers / FREQUENCIES))  # (..., 128) each
    return torch.cat([cos, sin], dim=-1)  # (..., 256)


class SiluMlp(nn.Module):
    """Two linear layers with SiLU between them."""

    def __init__(self, dim_in: int, dim: int):
        super().__init__()
        self.fc1 = nn.Linear(dim_in, dim)
        self.fc2 = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.silu(self.fc1(x)))


class TimeCondEmbed(nn.Module):
    """Sum of the embeddings of a token's timestep and of its features."""

    def __init__(self, cond_dim: int, embed_dim: int):
        super().__init__()
        self.timestep_proj = SiluMlp(2 * FREQUENCIES, embed_dim)
        self.condition_proj = SiluMlp(cond_dim, embed_dim)

    def forward(self, timestep: Tensor, z: Tensor) -> Tensor:
        """Timesteps (R * n, N) or (R * n,) and features (n, N, cond_dim) to (R * n, N, embed_dim)."""
        timestep = timestep[:, None] if timestep.ndim == 1 else timestep  # (R * n, N or 1)
        waves = timestep_waves(timestep).to(self.timestep_proj.fc1.weight.dtype)  # (R * n, N or 1, 256)
        condition = self.condition_proj(z).repeat(len(timestep) // len(z), 1, 1)  # (R * n, N, embed_dim)
        return condition + self.timestep_proj(waves)


class AdaLayerNorm(nn.Module):
    """x -> norm(x) * (1 + scale) + shift, where scale, shift (and more) are linear in SiLU of a condition.

    Args:
        num_stats: 2, or 3 with a gate that is returned for the caller to apply.
        rank: above 0, the linear map goes through so few channels.
        normalize: False takes x as it is.
    """

    def __init__(self, dim: int, num_stats: int = 2, rank: int = 0, normalize: bool = True):
        super().__init__()
        if rank > 0:
            self.lora = nn.Linear(dim, rank, bias=False)
        self.proj = nn.Linear(rank if rank > 0 else dim, num_stats * dim)
        self.num_stats, self.rank, self.normalize = num_stats, rank, normalize

    def forward(self, x: Tensor, condition: Tensor) -> tuple[Tensor, ...]:
        """x and condition, both (..., dim), to the modulated x (..., dim), and the gate (..., dim) if there is one."""
        hidden = F.silu(condition)
        hidden = self.lora(hidden) if self.rank > 0 else hidden  # (..., rank or dim)
        scale, shift, *gate = self.proj(hidden).chunk(self.num_stats, dim=-1)  # (..., dim) each
        x = F.layer_norm(x, x.shape[-1:], eps=1e-6) if self.normalize else x
        return x * (1 + scale) + shift, *gate


class DiffusionBlock(nn.Module):
    """h + norm(mlp(modulated h)) * gate."""

    def __init__(self, dim: int):
        super().__init__()
        self.norm1 = AdaLayerNorm(dim, num_stats=3)
        self.proj = SiluMlp(dim, dim)
        self.norm2 = nn.LayerNorm(dim)
        self.recompute = False

    def _mlp(self, h: Tensor) -> Tensor:
        return self.norm2(self.proj(h))

    def forward(self, h: Tensor, condition: Tensor) -> Tensor:
        """(n, N, dim) and (n, N, dim) to (n, N, dim)."""
        if self.recompute and torch.is_grad_enabled():
            modulated, gate = checkpoint(self.norm1, h, condition, use_reentrant=False)
            return h + checkpoint(self._mlp, modulated, use_reentrant=False) * gate
        modulated, gate = self.norm1(h, condition)
        return h + self._mlp(modulated) * gate


class DiffusionMLP(nn.Module):
    """Predicts the noise, the velocity or the data of tokens of p x p x C latent values."""

    def __init__(self, depth: int, embed_dim: int, cond_dim: int, patch: int, image_dim: int):
        super().__init__()
        self.patch_embed = PatchEmbed(image_dim, embed_dim, patch)
        self.time_cond_embed = TimeCondEmbed(cond_dim, embed_dim)
        self.blocks = nn.ModuleList(DiffusionBlock(embed_dim) for _ in range(depth))
        self.norm = AdaLayerNorm(embed_dim)
        self.head = nn.Linear(embed_dim, patch**2 * image_dim)

    def forward(self, tokens: Tensor, timestep: Tensor, z: Tensor) -> Tensor:
        """One prediction per token; all tokens of an image or some of them.

        Args:
            tokens: (R * n, N, p * p * C) noisy values in the layout of `patchify`.
            timestep: (R * n, N) or (R * n,) in [0, 1000], of any precision; float32 keeps neighbours apart.
            z: (n, N, cond_dim) features, shared by the R copies.

        Returns:
            (R * n, N, p * p * C).
        """
        condition = self.time_cond_embed(timestep, z)  # (R * n, N, D)
        h = self.patch_embed.project(tokens)  # (R * n, N, D)
        for block in self.blocks:
            h = block(h, condition)
        return self.head(self.norm(h, condition)[0])
