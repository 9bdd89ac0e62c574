"""The multi-view UNet: Stable Diffusion's image-variation UNet with attention across views and domains.

State-dict names are those of diffusers' UNet2DConditionModel plus, in each transformer block, `attn_joint_mid`,
`norm_joint_mid` and the same with `_last`, as in Wonder3D's checkpoints.
"""

import inspect
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.downsampling import Downsample2D
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from diffusers.utils import BaseOutput
from torch import nn

from mvdiffusion.models.attention import MVTransformer, SelfPattern
from mvdiffusion.models.layout import DOMAINS

DOWN_BLOCKS = {"CrossAttnDownBlockMV2D": True, "DownBlock2D": False}  # with transformers or without
UP_BLOCKS = {"CrossAttnUpBlockMV2D": True, "UpBlock2D": False}
MID_BLOCK = "UNetMidBlockMV2DCrossAttn"
LEGACY_KEYS = ("cross_domain_attention", "joint_attention", "joint_attention_twice")
# What diffusers' EMAModel writes into the config of the weights that it saves.
EMA_KEYS = ("decay", "min_decay", "optimization_step", "update_after_step", "use_ema_warmup", "inv_gamma", "power")


@dataclass
class UNetMV2DConditionOutput(BaseOutput):
    """sample: (N, out_channels, h, w)."""

    sample: torch.Tensor


class _Block(nn.Module):
    """Resnets, each followed by a transformer where there are any; every layer can be recomputed in backward."""

    def __init__(self, resnets: Sequence[nn.Module], attentions: Sequence[nn.Module]):
        super().__init__()
        self.resnets = nn.ModuleList(resnets)
        if attentions:
            self.attentions = nn.ModuleList(attentions)
        self.has_attention = bool(attentions)
        self.gradient_checkpointing = False  # set by diffusers, with the function to do it

    def _run(self, layer: nn.Module, x: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return self._gradient_checkpointing_func(layer, x, condition)
        return layer(x, condition)


class DownBlock(_Block):
    """Layers of one level, then half the size; every result is a skip connection."""

    def __init__(self, resnets: Sequence[nn.Module], attentions: Sequence[nn.Module], downsample_channels: int | None):
        super().__init__(resnets, attentions)
        if downsample_channels:
            down = Downsample2D(downsample_channels, use_conv=True, padding=1, name="op")
            self.downsamplers = nn.ModuleList([down])
        self.has_downsampler = bool(downsample_channels)

    def forward(
        self, x: torch.Tensor, embedding: torch.Tensor, context: torch.Tensor
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """(N, C, h, w) to (N, C', h/2, w/2) and the skips."""
        skips = []
        for index, resnet in enumerate(self.resnets):
            x = self._run(resnet, x, embedding)
            if self.has_attention:
                x = self._run(self.attentions[index], x, context)
            skips.append(x)
        if self.has_downsampler:
            x = self.downsamplers[0](x)  # (N, C', ceil(h/2), ceil(w/2))
            skips.append(x)
        return x, skips


class MidBlock(_Block):
    """Resnet, transformer, resnet."""

    def forward(self, x: torch.Tensor, embedding: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        """(N, C, h, w) to (N, C, h, w)."""
        x = self._run(self.resnets[0], x, embedding)
        x = self._run(self.attentions[0], x, context)
        return self._run(self.resnets[1], x, embedding)


class UpBlock(_Block):
    """Layers of one level, each after joining on a skip connection, then the size of the next skip."""

    def __init__(self, resnets: Sequence[nn.Module], attentions: Sequence[nn.Module], upsample_channels: int | None):
        super().__init__(resnets, attentions)
        if upsample_channels:
            self.upsamplers = nn.ModuleList([Upsample2D(upsample_channels, use_conv=True)])
        self.has_upsampler = bool(upsample_channels)

    def forward(
        self, x: torch.Tensor, skips: list[torch.Tensor], embedding: torch.Tensor, context: torch.Tensor
    ) -> torch.Tensor:
        """(N, C, h, w) to (N, C', h', w') of the next skip; takes its own skips off the end of the list."""
        for index, resnet in enumerate(self.resnets):
            x = torch.cat([x, skips.pop()], dim=1)  # (N, C + C_skip, h, w)
            x = self._run(resnet, x, embedding)  # (N, C', h, w)
            if self.has_attention:
                x = self._run(self.attentions[index], x, context)
        if self.has_upsampler:
            x = self.upsamplers[0](x, skips[-1].shape[-2:])  # (N, C', h', w')
        return x


class UNetMV2DConditionModel(ModelMixin, ConfigMixin):
    """The network; its config keys are those of the original's `unet_config.json`.

    `from_pretrained` takes what `save_pretrained` wrote; `initialise.load_unet` also takes other stages and versions.

    Args:
        sample_size: side of the latents that pipelines assume; any other size works too.
        in_channels, out_channels: noisy latents and condition latents, 4 each; 4 for the prediction.
        flip_sin_to_cos, freq_shift: of the timesteps' sinusoid.
        down_block_types, mid_block_type, up_block_types: CrossAttn* blocks have transformers, the others not.
        block_out_channels, layers_per_block: width of each level, resnets per level (going up: one more).
        norm_num_groups, norm_eps: of the GroupNorms.
        cross_attention_dim: width of the condition's tokens.
        transformer_layers_per_block: blocks per transformer.
        attention_head_dim: the NUMBER of heads, one for all levels or one per level (a historic name).
        use_linear_projection: linear layers around the transformers instead of 1x1 convolutions.
        class_embed_type: "projection" (camera and domain vectors) or None.
        projection_class_embeddings_input_dim: length of that vector.
        num_views: V, rows of one object in one domain.
        cd_attention_mid, cd_attention_last: joint attention of both domains, and where in the blocks.
        multiview_attention: self-attention sees all views; else every row is on its own, whatever the next two say.
        sparse_mv_attention: it sees view 0 and its own view instead of all.
        row_wise_mv_attention: it sees the same line of all views instead; for cameras of one elevation.
        mvcd_attention: has no effect, here as in the original.
        upcast_attention: has no effect: the attention kernels sum in float32.

    Raises:
        ValueError: values that are not supported or contradict each other.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["MVTransformerBlock", "ResnetBlock2D"]
    _repeated_blocks = ["MVTransformerBlock"]

    @register_to_config
    def __init__(
        self,
        sample_size: int | None = 32,
        in_channels: int = 8,
        out_channels: int = 4,
        flip_sin_to_cos: bool = True,
        freq_shift: int = 0,
        down_block_types: Sequence[str] = ("CrossAttnDownBlockMV2D",) * 3 + ("DownBlock2D",),
        mid_block_type: str = MID_BLOCK,
        up_block_types: Sequence[str] = ("UpBlock2D",) + ("CrossAttnUpBlockMV2D",) * 3,
        block_out_channels: Sequence[int] = (320, 640, 1280, 1280),
        layers_per_block: int = 2,
        norm_num_groups: int = 32,
        norm_eps: float = 1e-5,
        cross_attention_dim: int = 768,
        transformer_layers_per_block: int = 1,
        attention_head_dim: int | Sequence[int] = 8,
        use_linear_projection: bool = False,
        class_embed_type: str | None = "projection",
        projection_class_embeddings_input_dim: int | None = 10,
        num_views: int = 1,
        cd_attention_mid: bool = False,
        cd_attention_last: bool = False,
        multiview_attention: bool = True,
        sparse_mv_attention: bool = False,
        row_wise_mv_attention: bool = False,
        mvcd_attention: bool = False,
        upcast_attention: bool = False,
    ):
        super().__init__()
        pattern = self_pattern(multiview_attention, sparse_mv_attention, row_wise_mv_attention)
        heads = _check_topology(self.config)
        if mvcd_attention:
            warnings.warn("mvcd_attention has no effect (nor had it in the original)", stacklevel=2)
        channels = tuple(block_out_channels)
        embedding_dim = 4 * channels[0]
        self.conv_in = nn.Conv2d(in_channels, channels[0], 3, padding=1)
        self.time_proj = Timesteps(channels[0], flip_sin_to_cos, freq_shift)
        self.time_embedding = TimestepEmbedding(channels[0], embedding_dim)
        if class_embed_type:
            self.class_embedding = TimestepEmbedding(projection_class_embeddings_input_dim, embedding_dim)
        self.down_blocks, self.mid_block, self.up_blocks = _build_blocks(self.config, heads, pattern)
        self.conv_norm_out = nn.GroupNorm(norm_num_groups, channels[0], eps=norm_eps)
        self.conv_out = nn.Conv2d(channels[0], out_channels, 3, padding=1)

    @classmethod
    def from_config(cls, config: Mapping[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Builds the network from a config of this class; see `supported_config` for keys of other versions."""
        return super().from_config(supported_config(config), return_unused_kwargs, **kwargs)

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | float | int,
        encoder_hidden_states: torch.Tensor,
        class_labels: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> UNetMV2DConditionOutput | tuple[torch.Tensor]:
        """Predicts noise or velocity.

        Args:
            sample: (N, in_channels, h, w) noisy latents, then condition latents; N rows as in `layout`.
            timestep: one for all, or (N,).
            encoder_hidden_states: (N, tokens, cross_attention_dim); one token in all known uses.
            class_labels: (N, P) camera and domain vectors.

        Returns:
            .sample (N, out_channels, h, w), or a tuple of it.

        Raises:
            ValueError: N is no multiple of V (with joint attention: of 2V), or shapes do not fit the config.
        """
        self._check_inputs(sample, encoder_hidden_states, class_labels)
        timestep = torch.as_tensor(timestep, device=sample.device).reshape(-1).expand(sample.shape[0])  # (N,)
        embedding = self.time_embedding(self.time_proj(timestep).to(sample.dtype))  # (N, 4 C0)
        if class_labels is not None:
            embedding = embedding + self.class_embedding(class_labels.to(sample.dtype))

        x = self.conv_in(sample)  # (N, C0, h, w)
        skips = [x]
        for block in self.down_blocks:
            x, new_skips = block(x, embedding, encoder_hidden_states)
            skips += new_skips
        x = self.mid_block(x, embedding, encoder_hidden_states)
        for block in self.up_blocks:
            x = block(x, skips, embedding, encoder_hidden_states)
        x = self.conv_out(F.silu(self.conv_norm_out(x)))  # (N, out_channels, h, w)
        return UNetMV2DConditionOutput(sample=x) if return_dict else (x,)

    def _check_inputs(self, sample: torch.Tensor, context: torch.Tensor, class_labels: torch.Tensor | None) -> None:
        config, rows = self.config, sample.shape[0]
        joint = config.cd_attention_mid or config.cd_attention_last
        unit = config.num_views * (len(DOMAINS) if joint else 1)
        if rows % unit:
            halves = f", in {len(DOMAINS)} domains for the joint attention" if joint else ""
            raise ValueError(
                f"{rows} rows do not divide into objects of num_views={config.num_views} views{halves}: "
                f"give a multiple of {unit} rows, or set num_views to what the batch holds"
            )
        if sample.ndim != 4 or sample.shape[1] != config.in_channels:
            raise ValueError(f"sample is {tuple(sample.shape)}: expected (rows, {config.in_channels}, height, width)")
        if context.ndim != 3 or context.shape[0] != rows or context.shape[2] != config.cross_attention_dim:
            raise ValueError(
                f"encoder_hidden_states is {tuple(context.shape)}: expected ({rows}, tokens, "
                f"{config.cross_attention_dim})"
            )
        labels = None if class_labels is None else tuple(class_labels.shape)
        expected = (rows, config.projection_class_embeddings_input_dim) if config.class_embed_type else None
        if labels != expected:
            raise ValueError(f"class_labels is {labels}: expected {expected} by class_embed_type and its input dim")


def self_pattern(multiview: bool, sparse: bool, row_wise: bool) -> SelfPattern:
    """Pattern of the self-attention for the config's flags; without `multiview` the others mean nothing."""
    if sparse and row_wise:
        raise ValueError("sparse_mv_attention and row_wise_mv_attention exclude each other: set one of them to false")
    if not multiview:
        return "off"
    return "sparse" if sparse else "row_wise" if row_wise else "dense"


def supported_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config without keys that mean nothing here: private ones, legacy ones (with a warning), EMA state, and keys of
    diffusers' UNet2DConditionModel at their default.

    Raises:
        ValueError: such a key asks for what this network does not have, or a key is unknown.
    """
    own = inspect.signature(UNetMV2DConditionModel.__init__).parameters
    defaults = {
        name: each.default for name, each in inspect.signature(UNet2DConditionModel.__init__).parameters.items()
    }
    kept, refused = {}, {}
    for key, value in config.items():
        if key in own:
            kept[key] = value
        elif key in LEGACY_KEYS:
            if value:
                warnings.warn(
                    f"the UNet config's {key} is a legacy key without effect: use cd_attention_mid or "
                    "cd_attention_last",
                    stacklevel=2,
                )
        elif not key.startswith("_") and key not in EMA_KEYS:
            if key not in defaults or (value != defaults[key] and (value or defaults[key])):
                refused[key] = value
    if refused:
        raise ValueError(f"the multi-view UNet knows no config {refused}: remove these keys")
    return kept


def _check_topology(config: Any) -> tuple[int, ...]:
    """The number of heads per level, after checking what belongs together."""
    levels = len(config.block_out_channels)
    lists = {"down_block_types": DOWN_BLOCKS, "up_block_types": UP_BLOCKS}
    for key, known in lists.items():
        kinds = config[key]
        if len(kinds) != levels or set(kinds) - set(known):
            raise ValueError(f"{key}={list(kinds)}: expected {levels} of {list(known)}, as many as block_out_channels")
    if config.mid_block_type != MID_BLOCK:
        raise ValueError(f"mid_block_type={config.mid_block_type!r}: expected {MID_BLOCK!r}")
    if config.class_embed_type not in (None, "projection"):
        raise ValueError(f"class_embed_type={config.class_embed_type!r}: expected 'projection' or null")
    if config.class_embed_type and not config.projection_class_embeddings_input_dim:
        raise ValueError(
            "class_embed_type 'projection' needs projection_class_embeddings_input_dim, the labels' length"
        )
    if config.num_views < 1:
        raise ValueError(f"num_views={config.num_views} must be at least 1")
    if not isinstance(config.transformer_layers_per_block, int):
        raise ValueError(
            f"transformer_layers_per_block={config.transformer_layers_per_block!r}: expected one number for all levels"
        )
    heads = config.attention_head_dim
    heads = tuple(heads) if isinstance(heads, Sequence) else (heads,) * levels
    if len(heads) != levels or not all(
        n and width % n == 0 for width, n in zip(config.block_out_channels, heads, strict=True)
    ):
        raise ValueError(
            f"attention_head_dim={config.attention_head_dim} is the number of heads: one, or one per level; it divides "
            f"the level's width in block_out_channels={list(config.block_out_channels)}"
        )
    return heads


def _build_blocks(
    config: Any, heads: Sequence[int], pattern: SelfPattern
) -> tuple[nn.ModuleList, MidBlock, nn.ModuleList]:
    """Down, mid and up blocks for a config; `heads` per level."""
    channels, layers = tuple(config.block_out_channels), config.layers_per_block
    deepest = len(channels) - 1
    resnet = partial(ResnetBlock2D, temb_channels=4 * channels[0], groups=config.norm_num_groups, eps=config.norm_eps)
    block_options = {
        key: config[key] for key in ("num_views", "cross_attention_dim", "cd_attention_mid", "cd_attention_last")
    }

    def transformers(number: int, level: int) -> list[MVTransformer]:
        return [
            MVTransformer(
                channels[level],
                heads[level],
                config.norm_num_groups,
                config.use_linear_projection,
                config.transformer_layers_per_block,
                pattern=pattern,
                **block_options,
            )
            for _ in range(number)
        ]

    down_blocks, up_blocks = nn.ModuleList(), nn.ModuleList()
    width = channels[0]
    skip_widths = [width]
    for level, kind in enumerate(config.down_block_types):
        resnets = []
        for _ in range(layers):
            resnets.append(resnet(in_channels=width, out_channels=channels[level]))
            width = channels[level]
        attentions = transformers(layers, level) if DOWN_BLOCKS[kind] else []
        down_blocks.append(DownBlock(resnets, attentions, width if level < deepest else None))
        skip_widths += [width] * (layers + (level < deepest))
    mid_resnets = [resnet(in_channels=width, out_channels=width) for _ in range(2)]
    mid_block = MidBlock(mid_resnets, transformers(1, deepest))
    for level, kind in zip(range(deepest, -1, -1), config.up_block_types, strict=True):
        resnets = []
        for _ in range(layers + 1):
            resnets.append(resnet(in_channels=width + skip_widths.pop(), out_channels=channels[level]))
            width = channels[level]
        attentions = transformers(layers + 1, level) if UP_BLOCKS[kind] else []
        up_blocks.append(UpBlock(resnets, attentions, width if level > 0 else None))
    return down_blocks, mid_block, up_blocks
