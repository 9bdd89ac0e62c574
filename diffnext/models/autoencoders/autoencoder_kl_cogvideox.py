"""The causal autoencoder of clips of CogVideoX: 8 x 8 pixels and 4 frames per latent."""

import re
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffnext.models.autoencoders.base import VideoAutoencoder
from diffnext.models.autoencoders.layers import CausalConv3d, ResBlock, fold_frames, group_norm, unfold_frames
from diffnext.models.autoencoders.tiling import TemporalTiling

TEMPORAL_LEVELS = 2  # that halve or double the frames


@dataclass(frozen=True)
class AutoencoderKLCogVideoXConfig:
    """Fields of config.json."""

    in_channels: int = 3
    out_channels: int = 3
    block_out_channels: tuple[int, ...] = (128, 256, 256, 512)
    layers_per_block: int = 3
    latent_channels: int = 16
    scaling_factor: float = 0.7
    shift_factor: float | None = None


class AutoencoderKLCogVideoX(VideoAutoencoder):
    """Clips (B, 3, T, H, W) <-> latents (B, C, t, H / 8, W / 8).

    The original codes windows of 17 frames to 5 latents each, which overlap by one frame but by no latent: 33 frames
    are 10 latents. Only windows of an odd number of latents begin with a frame of its own, so 2 latents are 8 frames.
    """

    config_class = AutoencoderKLCogVideoXConfig
    ignored_keys = ("act_fn", "down_block_types", "up_block_types", "norm_num_groups", "norm_eps", "force_upcast")
    ignored_keys += ("latents_mean", "latents_std", "sample_size", "sample_height", "sample_width")
    ignored_keys += ("temporal_compression_ratio", "use_quant_conv", "use_post_quant_conv", "invert_scale_latents")
    temporal_factor = 2**TEMPORAL_LEVELS
    tiling = TemporalTiling(overlap_latents=0)

    def __init__(self, config: AutoencoderKLCogVideoXConfig) -> None:
        super().__init__(config)
        self.spatial_factor = 2 ** (len(config.block_out_channels) - 1)
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)

    @classmethod
    def adapt_state(cls, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Names of diffusers' checkpoints become the original's."""
        return {_original_name(name): value for name, value in state.items()}

    def _encode(self, x: Tensor) -> Tensor:
        return self.encoder(x)

    def _decode(self, z: Tensor) -> Tensor:
        return self.decoder(z)


def _original_name(name: str) -> str:
    name = re.sub(r"\.(conv_in|conv_out|conv1|conv2|conv_y|conv_b)\.conv\.", r".\1.", name)
    for old, new in {".norm_layer.": ".", ".conv_y.": ".scale.", ".conv_b.": ".shift."}.items():
        name = name.replace(old, new)
    return name.replace(".norm_out.", ".conv_norm_out.")


class Encoder(nn.Module):
    """(B, 3, T, H, W) -> (B, 2 C, t, h, w)."""

    def __init__(self, config: AutoencoderKLCogVideoXConfig) -> None:
        super().__init__()
        widths = config.block_out_channels
        self.conv_in = CausalConv3d(config.in_channels, widths[0], 3)
        self.down_blocks = nn.ModuleList()
        for n, width in enumerate(widths):
            before = [widths[max(0, n - 1)]] + [width] * (config.layers_per_block - 1)
            block = nn.Module()
            block.resnets = nn.ModuleList(ResBlock(channels, width, CausalConv3d) for channels in before)
            is_last = n == len(widths) - 1
            block.downsamplers = nn.ModuleList([] if is_last else [Downsample(width, in_time=n < TEMPORAL_LEVELS)])
            self.down_blocks.append(block)
        self.mid_block = nn.Module()
        self.mid_block.resnets = nn.ModuleList(ResBlock(widths[-1], widths[-1], CausalConv3d) for _ in range(2))
        self.conv_norm_out = group_norm(widths[-1])
        self.conv_out = CausalConv3d(widths[-1], 2 * config.latent_channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for block in self.down_blocks:
            for layer in (*block.resnets, *block.downsamplers):
                x = layer(x)
        for resnet in self.mid_block.resnets:
            x = resnet(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class Decoder(nn.Module):
    """(B, C, t, h, w) -> (B, 3, T, H, W); every norm is conditioned on the latents."""

    def __init__(self, config: AutoencoderKLCogVideoXConfig) -> None:
        super().__init__()
        widths, latents = config.block_out_channels[::-1], config.latent_channels
        self.conv_in = CausalConv3d(latents, widths[0], 3)
        self.mid_block = nn.Module()
        self.mid_block.resnets = nn.ModuleList(ConditionedResBlock(widths[0], widths[0], latents) for _ in range(2))
        self.up_blocks = nn.ModuleList()
        for n, width in enumerate(widths):
            before = [widths[max(0, n - 1)]] + [width] * config.layers_per_block
            block = nn.Module()
            block.resnets = nn.ModuleList(ConditionedResBlock(channels, width, latents) for channels in before)
            is_last = n == len(widths) - 1
            block.upsamplers = nn.ModuleList([] if is_last else [Upsample(width, in_time=n < TEMPORAL_LEVELS)])
            self.up_blocks.append(block)
        self.conv_norm_out = ConditionedNorm(widths[-1], latents)
        self.conv_out = CausalConv3d(widths[-1], config.out_channels, 3)

    def forward(self, z: Tensor) -> Tensor:
        x = self.conv_in(z)
        for resnet in self.mid_block.resnets:
            x = resnet(x, z)
        for block in self.up_blocks:
            for resnet in block.resnets:
                x = resnet(x, z)
            for upsample in block.upsamplers:
                x = upsample(x)
        return self.conv_out(F.silu(self.conv_norm_out(x, z)))


class ConditionedNorm(nn.GroupNorm):
    """Group norm whose scale and shift at every position also follow from the latents there (arXiv 2209.09002)."""

    def __init__(self, channels: int, latent_channels: int) -> None:
        super().__init__(32, channels, eps=1e-6)
        self.scale = CausalConv3d(latent_channels, channels, 1)
        self.shift = CausalConv3d(latent_channels, channels, 1)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        num_frames, *size = x.shape[2:]
        if num_frames > 1 and num_frames % 2:
            first = F.interpolate(z[:, :, :1], size=(1, *size))
            z = torch.cat([first, F.interpolate(z[:, :, 1:], size=(num_frames - 1, *size))], dim=2)
        else:
            z = F.interpolate(z, size=(num_frames, *size))  # (B, C, T, H, W)
        return super().forward(x) * self.scale(z) + self.shift(z)


class ConditionedResBlock(ResBlock):
    """A residual block of the decoder."""

    def __init__(self, in_channels: int, out_channels: int, latent_channels: int) -> None:
        super().__init__(in_channels, out_channels, CausalConv3d)
        self.norm1 = ConditionedNorm(in_channels, latent_channels)
        self.norm2 = ConditionedNorm(out_channels, latent_channels)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        residual = self.conv1(F.silu(self.norm1(x, z)))
        residual = self.conv2(F.silu(self.norm2(residual, z)))
        return self.conv_shortcut(x) + residual


class Downsample(nn.Module):
    """Halves height and width of (B, C, T, H, W); with `in_time` also averages pairs of frames.

    An odd first frame stays.
    """

    def __init__(self, channels: int, in_time: bool) -> None:
        super().__init__()
        self.in_time = in_time
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        if self.in_time and x.shape[2] > 1:
            is_odd = x.shape[2] % 2
            pairs = x[:, :, is_odd:].unflatten(2, (-1, 2)).mean(3)
            x = torch.cat([x[:, :, :is_odd], pairs], dim=2)  # (B, C, ceil(T / 2), H, W)
        num_frames = x.shape[2]
        return unfold_frames(self.conv(F.pad(fold_frames(x), (0, 1, 0, 1))), num_frames)  # (B, C, T, H / 2, W / 2)


class Upsample(nn.Module):
    """Doubles height and width of (B, C, T, H, W); with `in_time` also repeats frames. An odd first frame stays."""

    def __init__(self, channels: int, in_time: bool) -> None:
        super().__init__()
        self.in_time = in_time
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        if self.in_time and x.shape[2] > 1:
            is_odd = x.shape[2] % 2
            x = torch.cat([x[:, :, :is_odd], x[:, :, is_odd:].repeat_interleave(2, dim=2)], dim=2)
        num_frames = x.shape[2]
        return unfold_frames(self.conv(F.interpolate(fold_frames(x), scale_factor=2.0)), num_frames)
