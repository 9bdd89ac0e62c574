"""CausalVAE: a convolutional autoencoder of clips whose frames see the past only, under the original's names."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vae.models.base import Autoencoder
from vae.models.layers import (
    AttnBlock3D,
    AttnBlock3DFix,
    CausalConv3d,
    Conv2d,
    ResnetBlock2D,
    ResnetBlock3D,
    norm_silu_conv,
    normalize,
)
from vae.models.posterior import DiagonalGaussian
from vae.models.resample import (
    Downsample,
    Spatial2x3DDownsample,
    Spatial2x3DUpsample,
    Spatial2xTime2x3DDownsample,
    Spatial2xTime2x3DUpsample,
    SpatialDownsample2x,
    SpatialUpsample2x,
    TimeDownsample2x,
    TimeDownsampleRes2x,
    TimeUpsample2x,
    TimeUpsampleRes2x,
    Upsample,
)
from vae.models.tiling import Tiles, decode_tiles, encode_tiles, time_chunks


def _by_name(*classes: type[nn.Module]) -> dict[str, type[nn.Module]]:
    return {each.__name__: each for each in classes}


# What a configuration may name.
CONVS = _by_name(CausalConv3d, Conv2d)
RESNETS = _by_name(ResnetBlock2D, ResnetBlock3D)
ATTENTIONS = _by_name(AttnBlock3D, AttnBlock3DFix)
SPATIAL_DOWN = _by_name(Downsample, SpatialDownsample2x, Spatial2x3DDownsample, Spatial2xTime2x3DDownsample)
SPATIAL_UP = _by_name(Upsample, SpatialUpsample2x, Spatial2x3DUpsample, Spatial2xTime2x3DUpsample)
TEMPORAL_DOWN = _by_name(TimeDownsample2x, TimeDownsampleRes2x)
TEMPORAL_UP = _by_name(TimeUpsample2x, TimeUpsampleRes2x)
CHOICES = {
    "q_conv": CONVS,
    "encoder_conv_in": CONVS,
    "encoder_conv_out": CONVS,
    "encoder_attention": ATTENTIONS,
    "encoder_resnet_blocks": RESNETS,
    "encoder_spatial_downsample": SPATIAL_DOWN,
    "encoder_temporal_downsample": TEMPORAL_DOWN,
    "encoder_mid_resnet": RESNETS,
    "decoder_conv_in": CONVS,
    "decoder_conv_out": CONVS,
    "decoder_attention": ATTENTIONS,
    "decoder_resnet_blocks": RESNETS,
    "decoder_spatial_upsample": SPATIAL_UP,
    "decoder_temporal_upsample": TEMPORAL_UP,
    "decoder_mid_resnet": RESNETS,
}
ALSO_IN_TIME = ("Spatial2xTime2x3DDownsample", "Spatial2xTime2x3DUpsample")


@dataclass(frozen=True)
class CausalVAEConfig:
    """The network's shape, in the names of released `config.json` files; sequences have one entry per level.

    Attributes:
        hidden_size, hidden_size_mult: level i is hidden_size * hidden_size_mult[i] channels wide.
        attn_resolutions: nominal sizes in pixels with attention; level 0 has `resolution`, whatever the input's size.
        z_channels, embed_dim: latent channels inside and, with `use_quant_layer`, outside the quant convolutions.
        scale, shift: of latents for a diffusion model; not applied here.
    """

    hidden_size: int = 128
    z_channels: int = 4
    hidden_size_mult: tuple[int, ...] = (1, 2, 4, 4)
    attn_resolutions: tuple[int, ...] = ()
    dropout: float = 0.0
    resolution: int = 256
    double_z: bool = True
    embed_dim: int = 4
    num_res_blocks: int = 2
    q_conv: str = "CausalConv3d"
    encoder_conv_in: str = "CausalConv3d"
    encoder_conv_out: str = "CausalConv3d"
    encoder_attention: str = "AttnBlock3D"
    encoder_resnet_blocks: tuple[str, ...] = ("ResnetBlock3D",) * 4
    encoder_spatial_downsample: tuple[str, ...] = (*("SpatialDownsample2x",) * 3, "")
    encoder_temporal_downsample: tuple[str, ...] = ("", *("TimeDownsample2x",) * 2, "")
    encoder_mid_resnet: str = "ResnetBlock3D"
    decoder_conv_in: str = "CausalConv3d"
    decoder_conv_out: str = "CausalConv3d"
    decoder_attention: str = "AttnBlock3D"
    decoder_resnet_blocks: tuple[str, ...] = ("ResnetBlock3D",) * 4
    decoder_spatial_upsample: tuple[str, ...] = ("", *("SpatialUpsample2x",) * 3)
    decoder_temporal_upsample: tuple[str, ...] = ("", "", *("TimeUpsample2x",) * 2)
    decoder_mid_resnet: str = "ResnetBlock3D"
    scale: tuple[float, ...] = (0.18215,) * 4
    shift: tuple[float, ...] = (0,) * 4
    use_quant_layer: bool = True
    norm_type: str = "groupnorm"

    def __post_init__(self) -> None:
        num_levels = len(self.hidden_size_mult)
        for name, choices in CHOICES.items():
            value = getattr(self, name)
            if not isinstance(value, str) and len(value) != num_levels:
                raise ValueError(f"{name} has {len(value)} entries, hidden_size_mult has {num_levels} levels")
            allowed = [*choices, ""] if name.endswith("sample") else [*choices]  # "" changes no resolution
            for entry in [value] if isinstance(value, str) else value:
                if entry not in allowed:
                    raise ValueError(f"{name} names {entry!r}; choose one of {', '.join(map(repr, allowed))}")
        if not self.double_z:
            raise ValueError("double_z is false, but the encoder must give means and log variances: set it to true")
        for what, down, up in (
            ("height and width", self.spatial_factor, 2 ** _count(self.decoder_spatial_upsample)),
            (
                "time",
                self.temporal_factor,
                2 ** self._time_steps("decoder_spatial_upsample", "decoder_temporal_upsample"),
            ),
        ):
            if down != up:
                raise ValueError(f"the encoder divides {what} by {down}, the decoder multiplies it by {up}")

    @property
    def spatial_factor(self) -> int:
        return 2 ** _count(self.encoder_spatial_downsample)

    @property
    def temporal_factor(self) -> int:
        return 2 ** self._time_steps("encoder_spatial_downsample", "encoder_temporal_downsample")

    def _time_steps(self, spatial: str, temporal: str) -> int:
        return _count(getattr(self, temporal)) + sum(entry in ALSO_IN_TIME for entry in getattr(self, spatial))

    @property
    def latent_channels(self) -> int:
        return self.embed_dim if self.use_quant_layer else self.z_channels

    @property
    def widths(self) -> tuple[int, ...]:
        return tuple(self.hidden_size * mult for mult in self.hidden_size_mult)


def _count(entries: Sequence[str]) -> int:
    return sum(bool(entry) for entry in entries)


class _Mid(nn.Module):
    """Block, attention, block at the lowest resolution."""

    def __init__(self, width: int, resnet: str, attention: str, config: CausalVAEConfig, attention_norm: str) -> None:
        super().__init__()
        block = RESNETS[resnet]
        self.block_1 = block(width, width, dropout=config.dropout, norm_type=config.norm_type)
        self.attn_1 = ATTENTIONS[attention](width, norm_type=attention_norm)
        self.block_2 = block(width, width, dropout=config.dropout, norm_type=config.norm_type)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class _Level(nn.Module):
    """Residual blocks, each with attention where the level has it; changes of resolution are added by their names."""

    def __init__(
        self, widths: Sequence[int], resnet: str, attention: str | None, config: CausalVAEConfig, attention_norm: str
    ) -> None:
        super().__init__()
        block, pairs = RESNETS[resnet], list(zip(widths[:-1], widths[1:], strict=True))
        self.block = nn.ModuleList(
            block(before, after, dropout=config.dropout, norm_type=config.norm_type) for before, after in pairs
        )
        self.attn = nn.ModuleList(
            ATTENTIONS[attention](after, norm_type=attention_norm) for _, after in (pairs if attention else ())
        )

    def forward(self, x: Tensor) -> Tensor:
        for index, block in enumerate(self.block):
            x = block(x)
            if self.attn:
                x = self.attn[index](x)
        for name in ("downsample", "time_downsample", "upsample", "time_upsample"):
            if hasattr(self, name):
                x = getattr(self, name)(x)
        return x


class Encoder(nn.Module):
    """(B, 3, T, H, W) -> (B, 2 z_channels, t, H / 8, W / 8)."""

    def __init__(self, config: CausalVAEConfig) -> None:
        super().__init__()
        widths, attention_norm = config.widths, "groupnorm"  # whatever norm_type: released weights have it so
        self.conv_in = CONVS[config.encoder_conv_in](3, config.hidden_size, kernel_size=3, padding=1)
        self.down = nn.ModuleList()
        resolution, width = config.resolution, config.hidden_size
        for index, after in enumerate(widths):
            attention = config.encoder_attention if resolution in config.attn_resolutions else None
            resnet = config.encoder_resnet_blocks[index]
            level = _Level([width, *[after] * config.num_res_blocks], resnet, attention, config, attention_norm)
            if name := config.encoder_spatial_downsample[index]:
                level.downsample = SPATIAL_DOWN[name](after, after)
                resolution //= 2
            if name := config.encoder_temporal_downsample[index]:
                level.time_downsample = TEMPORAL_DOWN[name](after, after)
            self.down.append(level)
            width = after
        self.mid = _Mid(width, config.encoder_mid_resnet, config.encoder_attention, config, attention_norm)
        self.norm_out = normalize(width, config.norm_type)
        self.conv_out = CONVS[config.encoder_conv_out](width, 2 * config.z_channels, kernel_size=3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
        return norm_silu_conv(self.mid(x), self.norm_out, self.conv_out)


class Decoder(nn.Module):
    """(B, z_channels, t, h, w) -> (B, 3, T, 8 h, 8 w)."""

    def __init__(self, config: CausalVAEConfig) -> None:
        super().__init__()
        widths, width = config.widths, config.widths[-1]
        self.conv_in = CONVS[config.decoder_conv_in](config.z_channels, width, kernel_size=3, padding=1)
        self.mid = _Mid(width, config.decoder_mid_resnet, config.decoder_attention, config, config.norm_type)
        levels: list[_Level] = []  # from the lowest resolution upwards
        resolution = config.resolution // 2 ** (len(widths) - 1)
        for index in reversed(range(len(widths))):
            attention = config.decoder_attention if resolution in config.attn_resolutions else None
            after, resnet = widths[index], config.decoder_resnet_blocks[index]
            blocks = [width, *[after] * (config.num_res_blocks + 1)]
            level = _Level(blocks, resnet, attention, config, config.norm_type)
            if name := config.decoder_spatial_upsample[index]:
                level.upsample = SPATIAL_UP[name](after, after)
                resolution *= 2
            if name := config.decoder_temporal_upsample[index]:
                level.time_upsample = TEMPORAL_UP[name](after, after)
            levels.append(level)
            width = after
        self.up = nn.ModuleList(reversed(levels))
        self.norm_out = normalize(width, config.norm_type)
        self.conv_out = CONVS[config.decoder_conv_out](width, 3, kernel_size=3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        x = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            x = level(x)
        return norm_silu_conv(x, self.norm_out, self.conv_out)


@dataclass(frozen=True)
class _Tiling:
    """How `CausalVAE` cuts long or large clips: frames of a run, latents that runs share in time, tiles of frames."""

    frames: int
    shared_latents: int
    tiles: Tiles


class CausalVAE(Autoencoder):
    """The autoencoder: x (B, 3, T, H, W) in [-1, 1]; by default T = 4 n + 1 and H, W are multiples of 8."""

    config_class = CausalVAEConfig

    def __init__(self, config: CausalVAEConfig | None = None) -> None:
        super().__init__(config)
        config = self.config
        self.encoder, self.decoder = Encoder(config), Decoder(config)
        if config.use_quant_layer:
            conv = CONVS[config.q_conv]
            self.quant_conv = conv(2 * config.z_channels, 2 * config.embed_dim, kernel_size=1)
            self.post_quant_conv = conv(config.embed_dim, config.z_channels, kernel_size=1)
        self._tiling: _Tiling | None = None

    @property
    def last_layer(self) -> nn.Parameter:
        conv = self.decoder.conv_out
        return conv.weight if isinstance(conv, Conv2d) else conv.conv.weight

    def encoder_modules(self) -> list[nn.Module]:
        return [self.quant_conv, self.encoder] if self.config.use_quant_layer else [self.encoder]

    def decoder_modules(self) -> list[nn.Module]:
        return [self.post_quant_conv, self.decoder] if self.config.use_quant_layer else [self.decoder]

    def encode(self, x: Tensor) -> DiagonalGaussian:
        self.check_size(*x.shape[2:])
        tiling = self._tiling
        if tiling is None or (x.shape[2] <= tiling.frames and max(x.shape[-2:]) <= tiling.tiles.tile_px):
            return DiagonalGaussian(self._encode(x))
        reach = 1 + (tiling.shared_latents - 1) * self.temporal_factor
        parts = []
        for chunk in time_chunks(x.shape[2], tiling.frames - 1, reach):
            moments = encode_tiles(self._encode, x[:, :, chunk], tiling.tiles)
            parts.append(moments[:, :, tiling.shared_latents if parts else 0 :])
        return DiagonalGaussian(torch.cat(parts, dim=2))

    def decode(self, z: Tensor) -> Tensor:
        tiling, factor = self._tiling, self.temporal_factor
        latents = (tiling.frames - 1) // factor + 1 if tiling else 0  # of a run
        if tiling is None or (z.shape[2] <= latents and max(z.shape[-2:]) <= tiling.tiles.latents):
            return self._decode(z)
        reach = 1 + (tiling.shared_latents - 1) * factor
        parts = []
        for chunk in time_chunks(z.shape[2], latents - 1, tiling.shared_latents):
            frames = decode_tiles(self._decode, z[:, :, chunk], tiling.tiles)
            parts.append(frames[:, :, reach if parts else 0 :])
        return torch.cat(parts, dim=2)

    def _encode(self, x: Tensor) -> Tensor:
        moments = self.encoder(x)
        return self.quant_conv(moments) if self.config.use_quant_layer else moments

    def _decode(self, z: Tensor) -> Tensor:
        return self.decoder(self.post_quant_conv(z) if self.config.use_quant_layer else z)

    def enable_tiling(
        self, tile_px: int = 256, tile_frames: int = 9, overlap: float = 0.125, shared_latents: int = 2
    ) -> None:
        """Encode and decode larger clips piece by piece: less memory, visible seams; the original's lossy scheme.

        Args:
            tile_px, overlap: side of a tile and the part of it that it shares with the next, see `Tiles`.
            tile_frames: start to start, runs of frames are tile_frames - 1 apart.
            shared_latents: in time, that a run computes anew and drops.

        Raises:
            ValueError: pieces do not consist of whole latents.
        """
        factor = self.temporal_factor
        if tile_frames <= factor or (tile_frames - 1) % factor:
            nearest = max(1, round((tile_frames - 1) / factor)) * factor + 1
            raise ValueError(f"tile_frames is {tile_frames}, but must be {factor} n + 1, n > 0: use {nearest}")
        if shared_latents < 1:
            raise ValueError(f"shared_latents is {shared_latents}, but must be at least 1")
        self._tiling = _Tiling(tile_frames, shared_latents, Tiles(tile_px, overlap, self.spatial_factor))

    def disable_tiling(self) -> None:
        """Encode and decode clips whole."""
        self._tiling = None
