"""Vision transformer with post-norm blocks."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from diffnext.models.attention import Attention, KVCache
from diffnext.models.embeddings import PatchEmbed
from diffnext.models.masking import gather_tokens


class Mlp(nn.Module):
    """dim -> 4 dim -> dim with exact GELU."""

    def __init__(self, dim: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.activation = nn.GELU()
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(x)))


class Block(nn.Module):
    """x + norm(attention(x)), then x + norm(mlp(x))."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim)
        self.recompute_mlp = False

    def _mlp(self, x: Tensor) -> Tensor:
        return self.norm2(self.mlp(x))

    def forward(
        self,
        x: Tensor,
        angles: Tensor | None = None,
        frame_lengths: Sequence[int] | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """(B, n, dim) to the same; arguments as `Attention.forward`."""
        x = x + self.norm1(self.attn(x, angles, frame_lengths, cache))
        if self.recompute_mlp and torch.is_grad_enabled():
            return x + checkpoint(self._mlp, x, use_reentrant=False)
        return x + self._mlp(x)


class VisionTransformer(nn.Module):
    """Blocks over [prefix, tokens].

    Args:
        patch: side of a patch of `patch_embed`, in latent pixels.
    """

    def __init__(self, depth: int, embed_dim: int, num_heads: int, patch: int, image_dim: int):
        super().__init__()
        self.patch_embed = PatchEmbed(image_dim, embed_dim, patch)
        self.blocks = nn.ModuleList(Block(embed_dim, num_heads) for _ in range(depth))
        self.norm = nn.LayerNorm(embed_dim)
        self.embed_dim, self.head_dim = embed_dim, embed_dim // num_heads

    def forward(
        self,
        x: Tensor,
        prefix: Tensor | None = None,
        visible_ids: Tensor | None = None,
        angles: Tensor | None = None,
        frame_lengths: Sequence[int] | None = None,
        caches: Sequence[KVCache] | None = None,
    ) -> Tensor:
        """Embedded tokens, with their positions, to features.

        Args:
            x: (B, N, D).
            prefix: (B, P, D) tokens that the others see, and that see them; no features of theirs are returned.
            visible_ids: (B, k): the first half of the blocks works on the prefix and these tokens only.
            angles: (B or 1, N, head_dim / 2) of `rotary_angles`; the prefix is not rotated.
            frame_lengths: makes attention frame-causal, see `frame_causal_attention`.
            caches: one per block.

        Returns:
            (B, N, D).
        """
        prefix = x[:, :0] if prefix is None else prefix
        blocks = list(zip(self.blocks, caches or [None] * len(self.blocks), strict=True))
        if visible_ids is not None:
            half = len(blocks) // 2
            early, blocks = blocks[:half], blocks[half:]
            visible = gather_tokens(x, visible_ids)  # (B, k, D)
            rotation = None
            if angles is not None:
                rotation = gather_tokens(angles.expand(len(x), -1, -1), visible_ids)  # (B, k, head_dim / 2)
            prefix, visible = _run(early, prefix, visible, rotation, None)
            index = visible_ids[..., None].expand_as(visible)  # (B, k, D)
            x = x.to(visible.dtype).scatter(1, index, visible)  # (B, N, D)
        return self.norm(_run(blocks, prefix, x, angles, frame_lengths)[1])


def _run(
    blocks: Sequence[tuple[Block, KVCache | None]],
    prefix: Tensor,
    x: Tensor,
    angles: Tensor | None,
    frame_lengths: Sequence[int] | None,
) -> tuple[Tensor, Tensor]:
    """Prefix (B, P, D) and tokens (B, n, D) after some blocks."""
    prefix_length = prefix.shape[1]
    if angles is not None:
        angles = nn.functional.pad(angles, (0, 0, prefix_length, 0))  # (B or 1, P + n, head_dim / 2)
    sequence = torch.cat([prefix, x], dim=1)  # (B, P + n, D)
    for block, cache in blocks:
        sequence = block(sequence, angles, frame_lengths, cache)
    return sequence[:, :prefix_length], sequence[:, prefix_length:]
