"""Self-mutual attention: each target row also attends to the tokens of its conditioning row, never the reverse.

A batch holds pairs of rows, conditioning image first: `[cond_0, target_0, cond_1, target_1, ...]`. Nothing flows from
target to conditioning, so the conditioning row's keys and values do not depend on the target or its timestep. They can
be computed once and kept (`CondCache`); a sampling loop then runs the target rows alone.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention, AttnProcessor2_0

CacheMode = Literal["pair", "record", "cached"]


class CondCache:
    """What the self-attention layers of one UNet share: how to read the batch, and the stored conditioning tokens.

    Modes:
        pair: rows alternate conditioning, target (training, and sampling without the cache). The default.
        record: every row is a conditioning row; each layer stores its keys and values.
        cached: every row is a target row; row i also attends to the stored tokens of conditioning row i.

    Recording and reading are for inference: they are refused while gradients are recorded, because gradient
    checkpointing would repeat the forward pass after the mode has changed.
    """

    def __init__(self) -> None:
        self.mode: CacheMode = "pair"
        self._tokens: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    @contextmanager
    def record(self) -> Iterator[None]:
        """Within the block, a UNet call on conditioning rows replaces the stored tokens."""
        self.clear()
        with self._switched_to("record"):
            yield

    @contextmanager
    def cached(self) -> Iterator[None]:
        """Within the block, a UNet call on target rows reads the stored tokens.

        Raises:
            ValueError: nothing was recorded.
        """
        if not self._tokens:
            raise ValueError(
                "the conditioning cache is empty: run the UNet on the conditioning rows inside `with cache.record():` "
                "first, on a UNet prepared by install_self_mutual_attention"
            )
        with self._switched_to("cached"):
            yield

    @contextmanager
    def _switched_to(self, mode: CacheMode) -> Iterator[None]:
        if torch.is_grad_enabled():
            raise ValueError(f'conditioning cache mode "{mode}" is for inference: wrap the call in torch.no_grad()')
        if self.mode != "pair":
            raise ValueError(f'conditioning cache is already in mode "{self.mode}": leave that block first')
        self.mode = mode
        try:
            yield
        finally:
            self.mode = "pair"

    def store(self, layer: str, key: torch.Tensor, value: torch.Tensor) -> None:
        """Keep one layer's keys and values, each (N, heads, S, d)."""
        self._tokens[layer] = (key, value)

    def tokens(self, layer: str, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        """One layer's stored keys and values, each (rows, heads, S, d).

        Raises:
            ValueError: the layer stored nothing, or not exactly one conditioning row for each target row.
        """
        if layer not in self._tokens:
            raise ValueError(f"layer {layer} stored no conditioning tokens: record with the UNet that is now run")
        key, value = self._tokens[layer]
        if key.shape[0] != rows:
            raise ValueError(
                f"{rows} target rows against {key.shape[0]} stored conditioning rows: record one row per target row "
                "(both halves of classifier-free guidance included), in the same order"
            )
        return key, value

    def clear(self) -> None:
        """Free the stored tokens."""
        self._tokens.clear()


class SelfMutualAttnProcessor:
    """Attention processor for the `attn1` layers; see the module docstring. It adds no parameters.

    With d the head width, `out_cond = softmax(q_c k_c' / sqrt(d)) v_c` and
    `out_target = softmax(q_t [k_t; k_c]' / sqrt(d)) [v_t; v_c]`, concatenated over tokens.
    """

    def __init__(self, cache: CondCache, layer: str) -> None:
        self.cache = cache
        self.layer = layer

    def __call__(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        temb: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attend; the result has the shape of `hidden_states`, (N, S, C) or (N, C, H, W).

        Raises:
            ValueError: an attention mask is given, the number of rows is odd in pair mode, or the stored
                conditioning rows do not match the target rows.
        """
        if attention_mask is not None:
            raise ValueError(
                f"self-mutual attention takes no attention_mask (got one of shape {tuple(attention_mask.shape)}): "
                "call the UNet without attention_mask"
            )
        residual = hidden_states
        if attn.spatial_norm is not None:
            hidden_states = attn.spatial_norm(hidden_states, temb)
        if residual.ndim == 4:
            hidden_states = hidden_states.flatten(2).transpose(1, 2)  # (N, H*W, C)
        if attn.group_norm is not None:
            hidden_states = attn.group_norm(hidden_states.transpose(1, 2)).transpose(1, 2)

        query, key, value = _project(attn, hidden_states, encoder_hidden_states)  # (N, heads, S, d) each
        hidden_states = self._attend(query, key, value)  # (N, heads, S, d)
        hidden_states = hidden_states.transpose(1, 2).flatten(2)  # (N, S, heads*d)
        hidden_states = attn.to_out[1](attn.to_out[0](hidden_states))  # (N, S, C)

        if residual.ndim == 4:
            hidden_states = hidden_states.transpose(1, 2).reshape(residual.shape)  # (N, C, H, W)
        if attn.residual_connection:
            hidden_states = hidden_states + residual
        return hidden_states / attn.rescale_output_factor

    def _attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        if self.cache.mode == "record":
            self.cache.store(self.layer, key, value)
            return F.scaled_dot_product_attention(query, key, value)
        if self.cache.mode == "cached":
            cond_key, cond_value = self.cache.tokens(self.layer, rows=query.shape[0])
            return _attend_to_both(query, key, value, cond_key, cond_value)
        if query.shape[0] % 2:
            raise ValueError(
                f"self-mutual attention got a batch of {query.shape[0]} rows: it needs an even number, "
                "conditioning and target rows alternating"
            )
        cond = F.scaled_dot_product_attention(query[::2], key[::2], value[::2])  # (N/2, heads, S, d)
        target = _attend_to_both(query[1::2], key[1::2], value[1::2], key[::2], value[::2])  # (N/2, heads, S, d)
        return torch.stack([cond, target], dim=1).flatten(0, 1)  # (N, heads, S, d)


def _project(
    attn: Attention, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, keys and values, split into heads: (N, heads, S, d) each."""
    context = hidden_states
    if encoder_hidden_states is not None:
        context = encoder_hidden_states
        if attn.norm_cross:
            context = attn.norm_encoder_hidden_states(context)
    projections = (attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context))  # (N, S, heads*d) each
    query, key, value = (p.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for p in projections)  # (N, heads, S, d)
    return query, key, value


def _attend_to_both(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cond_key: torch.Tensor, cond_value: torch.Tensor
) -> torch.Tensor:
    """Target queries over their own and the conditioning tokens: (N, heads, S, d)."""
    keys = torch.cat([key, cond_key], dim=2)  # (N, heads, S + S_cond, d)
    values = torch.cat([value, cond_value], dim=2)  # (N, heads, S + S_cond, d)
    return F.scaled_dot_product_attention(query, keys, values)


def install_self_mutual_attention(unet: UNet2DConditionModel) -> CondCache:
    """Give every `attn1` layer self-mutual attention and every other attention layer the stock processor.

    Args:
        unet: changed in place; its weights and forward method stay as they are.

    Returns:
        the cache that the `attn1` layers share.

    Raises:
        ValueError: the UNet has no `attn1` layer.
    """
    cache = CondCache()
    processors = {
        name: SelfMutualAttnProcessor(cache, name) if name.endswith("attn1.processor") else AttnProcessor2_0()
        for name in unet.attn_processors
    }
    if not any(isinstance(processor, SelfMutualAttnProcessor) for processor in processors.values()):
        raise ValueError(f"{type(unet).__name__} has no self-attention (attn1) layer to receive the conditioning image")
    unet.set_attn_processor(processors)
    return cache
