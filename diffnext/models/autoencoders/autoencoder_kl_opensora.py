"""The causal autoencoder of clips of Open-Sora-Plan 1.x: 8 x 8 pixels and 4 frames per latent."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffnext.models.autoencoders.autoencoder_kl import AutoencoderKLConfig, modern_attention
from diffnext.models.autoencoders.base import VideoAutoencoder
from diffnext.models.autoencoders.layers import (
    CausalConv3d,
    FrameAttention,
    ResBlock,
    fold_frames,
    group_norm,
    unfold_frames,
)
from diffnext.models.autoencoders.tiling import TemporalTiling


@dataclass(frozen=True)
class AutoencoderKLOpenSoraConfig(AutoencoderKLConfig):
    """Fields of config.json; levels whose type is named 2D are coded frame by frame."""

    down_block_types: tuple[str, ...] = ("DownEncoderBlock2D",) * 2 + ("DownEncoderBlock3D",) * 2
    up_block_types: tuple[str, ...] = ("UpDecoderBlock3D",) * 4

    def __post_init__(self) -> None:
        is_3d = ["3D" in name for name in self.down_block_types]
        if len(is_3d) != len(self.block_out_channels) or is_3d != sorted(is_3d) or not is_3d[-1]:
            raise ValueError(
                f"down_block_types is {self.down_block_types}, but must have one entry for each of the "
                f"{len(self.block_out_channels)} block_out_channels, first 2D ones and then at least one 3D"
            )
        if len(self.up_block_types) != len(self.block_out_channels) or any(
            "2D" in each for each in self.up_block_types
        ):
            raise ValueError(
                f"up_block_types is {self.up_block_types}, but must be 3D for every one of block_out_channels"
            )


class AutoencoderKLOpenSora(VideoAutoencoder):
    """Clips (B, 3, T, H, W) <-> latents (B, C, (T - 1) / 4 + 1, H / 8, W / 8), in windows of 17 frames."""

    config_class = AutoencoderKLOpenSoraConfig
    ignored_keys = ("act_fn", "norm_num_groups", "latents_mean", "latents_std", "force_upcast")
    tiling = TemporalTiling()

    def __init__(self, config: AutoencoderKLOpenSoraConfig) -> None:
        super().__init__(config)
        widths, latents = config.block_out_channels, config.latent_channels
        self.spatial_factor = 2 ** (len(widths) - 1)
        self.temporal_factor = 2 ** sum("3D" in name for name in config.down_block_types[1:])
        moments = 2 * latents if config.double_z else latents
        self.encoder = Encoder(config, moments)
        self.decoder = Decoder(config)
        self.quant_conv = CausalConv3d(moments, moments, 1) if config.use_quant_conv else nn.Identity()
        self.post_quant_conv = CausalConv3d(latents, latents, 1) if config.use_post_quant_conv else nn.Identity()

    @classmethod
    def adapt_state(cls, state: dict[str, Tensor]) -> dict[str, Tensor]:
        return modern_attention(state)

    def _encode(self, x: Tensor) -> Tensor:
        return self.quant_conv(self.encoder(x))  # (B, 2 C, t, h, w)

    def _decode(self, z: Tensor) -> Tensor:
        return self.decoder(self.post_quant_conv(z))  # (B, 3, T, H, W)


class Encoder(nn.Module):
    """(B, 3, T, H, W) -> (B, out_channels, t, h, w); the first levels are in 2D, on all frames as a batch."""

    def __init__(self, config: AutoencoderKLOpenSoraConfig, out_channels: int) -> None:
        super().__init__()
        widths = config.block_out_channels
        convs = [CausalConv3d if "3D" in name else nn.Conv2d for name in config.down_block_types]
        pad = {} if convs[0] is CausalConv3d else {"padding": 1}
        self.conv_in = convs[0](config.in_channels, widths[0], 3, **pad)
        self.down_blocks = nn.ModuleList()
        for n, width in enumerate(widths):
            before = [widths[max(0, n - 1)]] + [width] * (config.layers_per_block - 1)
            block = nn.Module()
            block.resnets = nn.ModuleList(ResBlock(channels, width, convs[n]) for channels in before)
            block.downsamplers = nn.ModuleList(Downsample(width, conv) for conv in convs[n + 1 : n + 2])
            self.down_blocks.append(block)
        self.mid_block = MidBlock(widths[-1])
        self.conv_norm_out = group_norm(widths[-1])
        self.conv_out = CausalConv3d(widths[-1], out_channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        num_frames = x.shape[2]
        x = self.conv_in(fold_frames(x) if isinstance(self.conv_in, nn.Conv2d) else x)
        for block in self.down_blocks:
            for resnet in block.resnets:
                x = resnet(x)
            for downsample in block.downsamplers:
                if downsample.is_3d and x.dim() == 4:
                    x = unfold_frames(x, num_frames)  # (B, C, T, H, W)
                x = downsample(x)
        if x.dim() == 4:  # one level, so no downsampling
            x = unfold_frames(x, num_frames)
        return self.conv_out(F.silu(self.conv_norm_out(self.mid_block(x))))


class Decoder(nn.Module):
    """(B, C, t, h, w) -> (B, 3, T, H, W); all but the last of its upsamplings double the frames after the first."""

    def __init__(self, config: AutoencoderKLOpenSoraConfig) -> None:
        super().__init__()
        widths = config.block_out_channels[::-1]
        self.conv_in = CausalConv3d(config.latent_channels, widths[0], 3)
        self.mid_block = MidBlock(widths[0])
        self.up_blocks = nn.ModuleList()
        for n, width in enumerate(widths):
            before = [widths[max(0, n - 1)]] + [width] * config.layers_per_block
            block = nn.Module()
            block.resnets = nn.ModuleList(ResBlock(channels, width, CausalConv3d) for channels in before)
            # Without time for the last one, and after the last level none.
            kinds = [n < len(widths) - 2] if n < len(widths) - 1 else []
            block.upsamplers = nn.ModuleList(Upsample(width, in_time=in_time) for in_time in kinds)
            self.up_blocks.append(block)
        self.conv_norm_out = group_norm(widths[-1])
        self.conv_out = CausalConv3d(widths[-1], config.out_channels, 3)

    def forward(self, z: Tensor) -> Tensor:
        x = self.mid_block(self.conv_in(z))
        for block in self.up_blocks:
            for layer in (*block.resnets, *block.upsamplers):
                x = layer(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class MidBlock(nn.Module):
    """Two residual blocks around attention within frames."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(ResBlock(channels, channels, CausalConv3d) for _ in range(2))
        self.attentions = nn.ModuleList([FrameAttention(channels)])

    def forward(self, x: Tensor) -> Tensor:
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class Downsample(nn.Module):
    """Halves height and width; in 3D also T -> (T - 1) / 2 + 1."""

    def __init__(self, channels: int, conv: type[nn.Conv2d] | type[CausalConv3d]) -> None:
        super().__init__()
        self.is_3d = conv is CausalConv3d
        if self.is_3d:
            self.conv = CausalConv3d(channels, channels, 3, stride=2, padding_px=0)
        else:
            self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Doubles height and width; with `in_time` also T -> 2 T - 1."""

    def __init__(self, channels: int, in_time: bool) -> None:
        super().__init__()
        self.in_time = in_time
        self.conv = CausalConv3d(channels, channels, 3 if in_time else (1, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        if self.in_time:
            parts = [F.interpolate(x[:, :, :1], scale_factor=(1, 2, 2), mode="trilinear")]
            if x.shape[2] > 1:
                parts.append(F.interpolate(x[:, :, 1:], scale_factor=(2, 2, 2), mode="trilinear"))
            x = torch.cat(parts, dim=2)  # (B, C, 2 T - 1, 2 H, 2 W)
        else:
            x = F.interpolate(x, scale_factor=(1, 2, 2), mode="nearest")  # (B, C, T, 2 H, 2 W)
        return self.conv(x)
