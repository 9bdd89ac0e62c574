"""Attention across views and domains, and the transformer around it.

Every pattern is one ordinary attention over tokens that were grouped by a reshape: keys and values are not replicated.
Linear layers act on single tokens, so the grouping comes before the projections.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from diffusers.models.attention import FeedForward
from torch import nn

SelfPattern = Literal["off", "dense", "sparse", "row_wise"]
Pattern = Literal[SelfPattern, "joint"]


class MVAttention(nn.Module):
    """Multi-head attention whose tokens see each other by a pattern. A query of domain d, object b, view v sees

    - off: its own row (d, b, v);
    - dense: all views of (d, b);
    - sparse: view 0 of (d, b) and its own row;
    - row_wise: its own line of the image in all views of (d, b); for cameras of one elevation (Era3D);
    - joint: (0, b, v) and (1, b, v): the same view in both domains.

    Args:
        dim: width of the queries' tokens.
        heads, head_dim: number of heads and width of each.
        key_dim: width of the tokens given as `context`; None = dim.
        pattern: as above; ignored where `context` is given.
        num_views: V.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        head_dim: int,
        key_dim: int | None = None,
        pattern: Pattern = "off",
        num_views: int = 1,
    ):
        super().__init__()
        self.heads, self.pattern, self.num_views = heads, pattern, num_views
        self.to_q = nn.Linear(dim, heads * head_dim, bias=False)
        self.to_k = nn.Linear(key_dim or dim, heads * head_dim, bias=False)
        self.to_v = nn.Linear(key_dim or dim, heads * head_dim, bias=False)
        self.to_out = nn.Sequential(nn.Linear(heads * head_dim, dim))  # the checkpoints' name is to_out.0

    def forward(self, x: torch.Tensor, height: int | None = None) -> torch.Tensor:
        """Self-attention by the pattern: (N, L, C) to (N, L, C).

        Args:
            x: N rows in domain-major order, N a multiple of V (joint: of 2); L tokens, line by line.
            height: lines of the image; for row_wise alone.
        """
        rows, tokens, dim = x.shape
        views = self.num_views
        match self.pattern:
            case "off":
                return self.attend(x, x)
            case "dense":
                x = x.reshape(rows // views, views * tokens, dim)  # (N/V, V*L, C)
                return self.attend(x, x).reshape(rows, tokens, dim)
            case "sparse":
                return self.attend(x, x, with_first_view=True)
            case "row_wise":
                x = x.reshape(rows // views, views, height, -1, dim).transpose(1, 2)  # (N/V, h, V, w, C)
                lines = x.reshape(-1, x.shape[2] * x.shape[3], dim)  # (N/V*h, V*w, C)
                return self.attend(lines, lines).reshape(x.shape).transpose(1, 2).reshape(rows, tokens, dim)
            case "joint":
                x = x.reshape(2, rows // 2, tokens, dim).transpose(0, 1)  # (N/2, 2, L, C)
                pairs = x.reshape(rows // 2, 2 * tokens, dim)  # (N/2, 2L, C)
                return self.attend(pairs, pairs).reshape(x.shape).transpose(0, 1).reshape(rows, tokens, dim)

    def attend(self, x: torch.Tensor, context: torch.Tensor, with_first_view: bool = False) -> torch.Tensor:
        """Ordinary attention of x (G, T, C) on context (G, S, K): (G, T, C).

        Args:
            with_first_view: each run of V rows also sees the tokens of its first row, projected once for the run.
        """
        q, k, v = self.to_q(x), self.to_k(context), self.to_v(context)  # (G, T or S, heads * d)
        if with_first_view:
            k, v = (self._with_first_view(each) for each in (k, v))  # (G, 2S, heads * d)
        q, k, v = (each.unflatten(-1, (self.heads, -1)).transpose(1, 2) for each in (q, k, v))  # (G, heads, T or S, d)
        x = F.scaled_dot_product_attention(q, k, v)  # (G, heads, T, d), scale d^-1/2
        return self.to_out(x.transpose(1, 2).flatten(2))  # (G, T, C)

    def constant(self, token: torch.Tensor) -> torch.Tensor:
        """What every query gets from a context of one token, as its softmax is 1: (N, 1, K) to (N, 1, C)."""
        return self.to_out(self.to_v(token))

    def _with_first_view(self, x: torch.Tensor) -> torch.Tensor:
        views = x.unflatten(0, (-1, self.num_views))  # (N/V, V, L, C)
        return torch.cat([views[:, :1].expand_as(views), views], dim=2).flatten(0, 1)  # (N, 2L, C)


class MVTransformerBlock(nn.Module):
    """Self-attention, joint attention (mid), cross-attention, feed-forward, joint attention (last); all pre-norm.

    With one token per row, cross-attention is a constant and the layers in `unused` get no gradient. They stay for the
    checkpoints' sake and are frozen from the start, so that data-parallel training does not wait for their gradients.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        head_dim: int,
        cross_attention_dim: int,
        pattern: SelfPattern = "dense",
        num_views: int = 1,
        cd_attention_mid: bool = False,
        cd_attention_last: bool = False,
    ):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn1 = MVAttention(dim, heads, head_dim, pattern=pattern, num_views=num_views)
        if cd_attention_mid:
            self.norm_joint_mid = nn.LayerNorm(dim)
            self.attn_joint_mid = _joint_attention(dim, heads, head_dim)
        self.norm2 = nn.LayerNorm(dim)
        self.attn2 = MVAttention(dim, heads, head_dim, key_dim=cross_attention_dim)
        self.norm3 = nn.LayerNorm(dim)
        self.ff = FeedForward(dim, activation_fn="geglu")
        if cd_attention_last:
            self.norm_joint_last = nn.LayerNorm(dim)
            self.attn_joint_last = _joint_attention(dim, heads, head_dim)
        self.cd_attention_mid, self.cd_attention_last = cd_attention_mid, cd_attention_last
        for module in self.unused:
            module.requires_grad_(False)

    @property
    def unused(self) -> tuple[nn.Module, ...]:
        """Layers that play no part where the context is one token."""
        return self.norm2, self.attn2.to_q, self.attn2.to_k

    def forward(self, x: torch.Tensor, context: torch.Tensor, height: int | None = None) -> torch.Tensor:
        """Tokens x (N, L, C) and context (N, tokens, K) to (N, L, C); `height` as in `MVAttention`."""
        x = x + self.attn1(self.norm1(x), height)
        if self.cd_attention_mid:
            x = x + self.attn_joint_mid(self.norm_joint_mid(x))
        if context.shape[1] == 1:
            x = x + self.attn2.constant(context)
        else:
            x = x + self.attn2.attend(self.norm2(x), context)
        x = x + self.ff(self.norm3(x))
        if self.cd_attention_last:
            x = x + self.attn_joint_last(self.norm_joint_last(x))
        return x


class MVTransformer(nn.Module):
    """Transformer blocks on an image's pixels as tokens, with projections around them and a residual connection.

    Args:
        channels: C, a multiple of `heads`.
        heads: number of heads; their width is C / heads.
        norm_num_groups: groups of the GroupNorm before the projection.
        use_linear_projection: linear layers instead of 1x1 convolutions; the weights' shapes differ.
        num_layers: number of blocks.
        block_options: of `MVTransformerBlock`.
    """

    def __init__(
        self,
        channels: int,
        heads: int,
        norm_num_groups: int,
        use_linear_projection: bool = False,
        num_layers: int = 1,
        **block_options,
    ):
        super().__init__()
        self.norm = nn.GroupNorm(norm_num_groups, channels, eps=1e-6)
        self.proj_in = nn.Linear(channels, channels) if use_linear_projection else nn.Conv2d(channels, channels, 1)
        self.transformer_blocks = nn.ModuleList(
            MVTransformerBlock(channels, heads, channels // heads, **block_options) for _ in range(num_layers)
        )
        self.proj_out = nn.Linear(channels, channels) if use_linear_projection else nn.Conv2d(channels, channels, 1)
        self.use_linear_projection = use_linear_projection

    def forward(self, x: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        """(N, C, h, w) and context (N, tokens, K) to (N, C, h, w)."""
        residual, (height, width) = x, x.shape[-2:]
        x = self.norm(x)
        if not self.use_linear_projection:
            x = self.proj_in(x)
        # Copied once here: the blocks' residual sums keep the order of their first operand.
        x = x.flatten(2).transpose(1, 2).contiguous()  # (N, h*w, C)
        if self.use_linear_projection:
            x = self.proj_in(x)
        for block in self.transformer_blocks:
            x = block(x, context, height)
        if self.use_linear_projection:
            x = self.proj_out(x)
        x = x.transpose(1, 2).unflatten(2, (height, width))  # (N, C, h, w)
        if not self.use_linear_projection:
            x = self.proj_out(x)
        return residual + x  # in this order: sums keep the memory format of the first, and so does the network


def _joint_attention(dim: int, heads: int, head_dim: int) -> MVAttention:
    """Joint attention that adds nothing at first: a stage-2 network starts as the stage-1 network."""
    attention = MVAttention(dim, heads, head_dim, pattern="joint")
    nn.init.zeros_(attention.to_out[0].weight)
    nn.init.zeros_(attention.to_out[0].bias)
    return attention
