"""The autoencoder of clips of LTX-Video 0.9.5: 32 x 32 pixels and 8 frames per latent."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffnext.models.autoencoders.base import DecoderOutput, VideoAutoencoder
from diffnext.models.autoencoders.layers import CausalConv3d

PATCH_PX = 4
# Frames, rows and columns that each level of the encoder folds into channels; those of the decoder fold out 2 of each.
DOWN_STRIDES = ((1, 2, 2), (2, 1, 1), (2, 2, 2), (2, 2, 2))
UP_STRIDE = (2, 2, 2)
TIMESTEP_CHANNELS = 256


@dataclass(frozen=True)
class AutoencoderKLLTXVideoConfig:
    """Fields of config.json."""

    in_channels: int = 3
    out_channels: int = 3
    block_out_channels: tuple[int, ...] = (128, 256, 512, 1024, 2048)
    layers_per_block: tuple[int, ...] = (4, 6, 6, 2, 2)
    decoder_block_out_channels: tuple[int, ...] = (128, 256, 512, 1024)
    decoder_layers_per_block: tuple[int, ...] = (5, 5, 5, 5)
    latent_channels: int = 128
    scaling_factor: float = 1.0
    shift_factor: float | None = None
    latents_mean: tuple[float, ...] | None = None
    latents_std: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        for name, count in (("", len(DOWN_STRIDES) + 1), ("decoder_", 4)):
            for field in (f"{name}block_out_channels", f"{name}layers_per_block"):
                if len(getattr(self, field)) != count:
                    raise ValueError(f"{field} is {getattr(self, field)}, but must have {count} values")
        if (self.latents_mean is None) != (self.latents_std is None):
            raise ValueError("latents_mean and latents_std belong together, but one of them is missing")
        for field in ("latents_mean", "latents_std"):
            values = getattr(self, field)
            if values is not None and len(values) != self.latent_channels:
                raise ValueError(f"{field} has {len(values)} values for latent_channels {self.latent_channels}")


class AutoencoderKLLTXVideo(VideoAutoencoder):
    """Clips (B, 3, T, H, W) <-> latents (B, C, (T - 1) / 8 + 1, H / 32, W / 32), as a whole.

    The posterior's parameters have C + 1 channels: one variance for all latents of a position. The decoder sees a
    timestep, because it was trained to remove some noise from the latents.
    """

    config_class = AutoencoderKLLTXVideoConfig
    ignored_keys = ("sample_size", "force_upcast")
    spatial_factor = PATCH_PX * 2**3
    temporal_factor = 2**3

    def __init__(self, config: AutoencoderKLLTXVideoConfig) -> None:
        super().__init__(config)
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)

    def scale_(self, x: Tensor) -> Tensor:
        if self.config.latents_mean is None:
            return super().scale_(x)
        return x.sub_(self._per_channel("latents_mean", x)).div_(self._per_channel("latents_std", x))

    def unscale_(self, x: Tensor) -> Tensor:
        if self.config.latents_mean is None:
            return super().unscale_(x)
        return x.mul_(self._per_channel("latents_std", x)).add_(self._per_channel("latents_mean", x))

    def _per_channel(self, name: str, x: Tensor) -> Tensor:
        factor = 1 / self.config.scaling_factor if name == "latents_std" else 1.0
        values = torch.tensor(getattr(self.config, name), device=x.device) * factor
        return values.view(-1, *[1] * (x.dim() - 2)).to(x.dtype)  # (C, 1, ...)

    def decode(self, z: Tensor, timestep: float | Tensor = 0.05) -> DecoderOutput:
        """Latents (B, C, t, h, w) -> pixels (B, 3, T, H, W); without t no T.

        Args:
            timestep: share of noise in the latents that the decoder is told, one or (B,), in [0, 1].
        """
        latents = z.unsqueeze(2) if z.dim() == 4 else z  # (B, C, t, h, w)
        timesteps = torch.as_tensor(timestep, dtype=torch.float32, device=z.device).expand(len(z))  # (B,)
        pixels = self.decoder(latents, timesteps)  # (B, 3, T, H, W)
        return DecoderOutput(pixels.squeeze(2) if z.dim() == 4 else pixels)

    def _encode(self, x: Tensor) -> Tensor:
        return self.encoder(x)  # (B, C + 1, t, h, w)


class Encoder(nn.Module):
    """(B, 3, T, H, W) -> (B, C + 1, t, h, w)."""

    def __init__(self, config: AutoencoderKLLTXVideoConfig) -> None:
        super().__init__()
        widths, layers = config.block_out_channels, config.layers_per_block
        self.conv_in = CausalConv3d(config.in_channels * PATCH_PX**2, widths[0], 3)
        self.down_blocks = nn.ModuleList()
        for n, stride in enumerate(DOWN_STRIDES):
            block = nn.Module()
            block.resnets = nn.ModuleList(ResBlock(widths[n]) for _ in range(layers[n]))
            block.downsamplers = nn.ModuleList([Downsample(widths[n], widths[n + 1], stride)])
            self.down_blocks.append(block)
        self.mid_block = nn.Module()
        self.mid_block.resnets = nn.ModuleList(ResBlock(widths[-1]) for _ in range(layers[-1]))
        self.conv_out = CausalConv3d(widths[-1], config.latent_channels + 1, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(fold(x, (1, PATCH_PX, PATCH_PX), columns_first=True))
        for block in self.down_blocks:
            for layer in (*block.resnets, *block.downsamplers):
                x = layer(x)
        for resnet in self.mid_block.resnets:
            x = resnet(x)
        return self.conv_out(F.silu(rms_norm(x)))


class Decoder(nn.Module):
    """(B, C, t, h, w) and timesteps (B,) -> (B, 3, T, H, W)."""

    def __init__(self, config: AutoencoderKLLTXVideoConfig) -> None:
        super().__init__()
        widths, layers = config.decoder_block_out_channels[::-1], config.decoder_layers_per_block[::-1]
        self.conv_in = CausalConv3d(config.latent_channels, widths[0], 3, causal=False)
        self.mid_block = ConditionedBlocks(widths[0], layers[0])
        self.up_blocks = nn.ModuleList()
        for n, width in enumerate(widths[1:], start=1):
            block = ConditionedBlocks(width, layers[n])
            block.upsamplers = nn.ModuleList([Upsample(widths[n - 1], width)])
            self.up_blocks.append(block)
        self.conv_out = CausalConv3d(widths[-1], config.out_channels * PATCH_PX**2, 3, causal=False)
        self.timestep_scale = nn.Parameter(torch.tensor(1000.0))
        self.time_embed = TimeEmbed(2 * widths[-1])
        self.scale_shift_table = nn.Parameter(torch.randn(2, widths[-1]) / widths[-1] ** 0.5)

    def forward(self, z: Tensor, timesteps: Tensor) -> Tensor:
        timesteps = timesteps * self.timestep_scale.float()
        x = self.mid_block(self.conv_in(z), timesteps)
        for block in self.up_blocks:
            x = block(block.upsamplers[0](x), timesteps)
        shift, scale = modulation(self.time_embed(timesteps, x.dtype), self.scale_shift_table)
        x = F.silu(rms_norm(x) * (1 + scale) + shift)
        return unfold(self.conv_out(x), (1, PATCH_PX, PATCH_PX), columns_first=True)


class ConditionedBlocks(nn.Module):
    """Residual blocks that see the timestep."""

    def __init__(self, channels: int, num_layers: int) -> None:
        super().__init__()
        self.time_embed = TimeEmbed(4 * channels)
        self.resnets = nn.ModuleList(ResBlock(channels, is_conditioned=True) for _ in range(num_layers))

    def forward(self, x: Tensor, timesteps: Tensor) -> Tensor:
        embedding = self.time_embed(timesteps, x.dtype)  # (B, 4 C)
        for resnet in self.resnets:
            x = resnet(x, embedding)
        return x


class TimeEmbed(nn.Module):
    """Timesteps (B,) -> sines, two layers -> (B, channels)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.timestep_proj = nn.Module()
        self.timestep_proj.fc1 = nn.Linear(TIMESTEP_CHANNELS, channels)
        self.timestep_proj.fc2 = nn.Linear(channels, channels)

    def forward(self, timesteps: Tensor, dtype: torch.dtype) -> Tensor:
        half = TIMESTEP_CHANNELS // 2
        frequencies = 10000 ** (-torch.arange(half, device=timesteps.device) / half)
        angles = timesteps[:, None].float() * frequencies  # (B, 128)
        waves = torch.cat([angles.cos(), angles.sin()], dim=1).to(dtype)  # (B, 256)
        return self.timestep_proj.fc2(F.silu(self.timestep_proj.fc1(waves)))


def modulation(embedding: Tensor, table: Tensor) -> tuple[Tensor, ...]:
    """(B, n C) and (n, C) -> n tensors (B, C, 1, 1, 1): shift, scale, ..."""
    rows = embedding.unflatten(1, (len(table), -1)) + table  # (B, n, C)
    return rows[..., None, None, None].unbind(1)


def rms_norm(x: Tensor) -> Tensor:
    """Channels of (B, C, T, H, W) over their root mean square, in float32 as it would overflow in half precision."""
    return (x.float() * torch.rsqrt(x.float().square().mean(1, keepdim=True) + 1e-8)).to(x.dtype)


class ResBlock(nn.Module):
    """RMS norm, SiLU, convolution, twice; with `is_conditioned`, norms are scaled and shifted by the timestep."""

    def __init__(self, channels: int, is_conditioned: bool = False) -> None:
        super().__init__()
        self.conv1 = CausalConv3d(channels, channels, 3, causal=not is_conditioned)
        self.conv2 = CausalConv3d(channels, channels, 3, causal=not is_conditioned)
        table = torch.randn(4, channels) / channels**0.5
        self.scale_shift_table = nn.Parameter(table) if is_conditioned else None

    def forward(self, x: Tensor, embedding: Tensor | None = None) -> Tensor:
        shift1 = scale1 = shift2 = scale2 = 0.0
        if self.scale_shift_table is not None:
            shift1, scale1, shift2, scale2 = modulation(embedding, self.scale_shift_table)
        residual = self.conv1(F.silu(rms_norm(x) * (1 + scale1) + shift1))
        return x + self.conv2(F.silu(rms_norm(residual) * (1 + scale2) + shift2))


class Downsample(nn.Module):
    """Folds frames, rows and columns into channels, beside the means of its input's.

    T is 1 + a multiple of the stride; the first frame is repeated to make it whole.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: tuple[int, int, int]) -> None:
        super().__init__()
        volume = stride[0] * stride[1] * stride[2]
        self.stride, self.group_size = stride, in_channels * volume // out_channels
        self.conv = CausalConv3d(in_channels, out_channels // volume, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([x[:, :, : self.stride[0] - 1], x], dim=2)
        means = fold(x, self.stride).unflatten(1, (-1, self.group_size)).mean(2)
        return fold(self.conv(x), self.stride) + means


class Upsample(nn.Module):
    """Doubles T (less the first frame), height and width out of channels, beside copies of its input."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.copies = out_channels * 8 // in_channels
        self.conv = CausalConv3d(in_channels, out_channels * 8, 3, causal=False)

    def forward(self, x: Tensor) -> Tensor:
        copies = unfold(x, UP_STRIDE).repeat(1, self.copies, 1, 1, 1)
        return (unfold(self.conv(x), UP_STRIDE) + copies)[:, :, 1:]


def fold(x: Tensor, stride: tuple[int, int, int], columns_first: bool = False) -> Tensor:
    """(B, C, t T, h H, w W) -> (B, C t h w, T, H, W), or (B, C t w h, T, H, W) with `columns_first`."""
    x = x.unflatten(4, (-1, stride[2])).unflatten(3, (-1, stride[1])).unflatten(2, (-1, stride[0]))
    order = (0, 1, 3, 7, 5, 2, 4, 6) if columns_first else (0, 1, 3, 5, 7, 2, 4, 6)
    return x.permute(order).flatten(1, 4)


def unfold(x: Tensor, stride: tuple[int, int, int], columns_first: bool = False) -> Tensor:
    """The inverse of `fold`."""
    if columns_first:
        x = x.unflatten(1, (-1, stride[0], stride[2], stride[1]))  # (B, C, t, w, h, T, H, W)
        x = x.permute(0, 1, 5, 2, 6, 4, 7, 3)
    else:
        x = x.unflatten(1, (-1, *stride))  # (B, C, t, h, w, T, H, W)
        x = x.permute(0, 1, 5, 2, 6, 3, 7, 4)
    return x.flatten(6, 7).flatten(4, 5).flatten(2, 3)  # (B, C, t T, h H, w W)
