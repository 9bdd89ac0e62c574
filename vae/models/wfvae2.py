"""WFVAE2: the wavelet-flow autoencoder with a free number of levels, under the original's names."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vae.models.base import Autoencoder
from vae.models.layers import (
    AttnBlock3D,
    AttnBlock3DFix,
    CausalConv3d,
    Chain,
    Conv2d,
    ResnetBlock2D,
    ResnetBlock3D,
    norm_silu_conv,
    normalize,
)
from vae.models.posterior import DiagonalGaussian
from vae.models.resample import Downsample, Spatial2xTime2x3DDownsample, Spatial2xTime2x3DUpsample, Upsample
from vae.models.wavelets import (
    HaarWaveletTransform2D,
    HaarWaveletTransform3D,
    InverseHaarWaveletTransform2D,
    InverseHaarWaveletTransform3D,
)

RESNETS = {"ResnetBlock2D": ResnetBlock2D, "ResnetBlock3D": ResnetBlock3D}
# The original's default names Attention3DFix, a class that it lacks.
ATTENTIONS = {"AttnBlock3D": AttnBlock3D, "AttnBlock3DFix": AttnBlock3DFix, "Attention3DFix": AttnBlock3DFix}
COEFFICIENTS = {"hw": 12, "thw": 24}  # bands of RGB where a level halves height and width, or time too


@dataclass(frozen=True)
class WFVAE2Config:
    """The network's shape, in the names of the original's configuration files; levels go from fine to coarse.

    Attributes:
        base_channels, decoder_base_channels: widths, one more than there are levels; the decoder's default to the
            encoder's.
        layer_type: per level, "hw" halves height and width, "thw" time too.
        layer_res_type: class of a level's residual blocks.
        encoder_energy_flow_size, decoder_energy_flow_size: channels in which coefficients enter or leave a level.
        input_type: "video" or "image": whether the outermost wavelet halves time.
        scale, shift: of latents for a diffusion model; not applied here.
    """

    latent_dim: int = 4
    base_channels: tuple[int, ...] = (128, 256, 512)
    decoder_base_channels: tuple[int, ...] | None = None
    layer_type: tuple[str, ...] = ("hw", "thw")
    layer_res_type: tuple[str, ...] = ("ResnetBlock2D", "ResnetBlock3D")
    encoder_num_resblocks: int = 2
    encoder_energy_flow_size: int = 128
    decoder_num_resblocks: int = 3
    decoder_energy_flow_size: int = 128
    dropout: float = 0.0
    norm_type: str = "layernorm"
    t_interpolation: str = "trilinear"
    input_type: str = "video"
    mid_layers_type: tuple[str, ...] = ("ResnetBlock3D", "AttnBlock3DFix", "ResnetBlock3D")
    scale: tuple[float, ...] = (0.18215,) * 8
    shift: tuple[float, ...] = (0,) * 8

    def __post_init__(self) -> None:
        num_levels = len(self.layer_type)
        for name, length in (
            ("layer_res_type", num_levels),
            ("base_channels", num_levels + 1),
            ("decoder_base_channels", num_levels + 1),
        ):
            value = getattr(self, name)
            if value is not None and len(value) != length:
                raise ValueError(
                    f"{name} has {len(value)} entries, but {num_levels} levels in layer_type need {length}"
                )
        for name, choices in (
            ("layer_type", COEFFICIENTS),
            ("layer_res_type", RESNETS),
            ("mid_layers_type", RESNETS | ATTENTIONS),
            ("input_type", ("video", "image")),
        ):
            value = getattr(self, name)
            for entry in [value] if isinstance(value, str) else value:
                if entry not in choices:
                    raise ValueError(f"{name} names {entry!r}; choose one of {', '.join(map(repr, choices))}")
        for name, least in (("encoder_num_resblocks", 1), ("decoder_num_resblocks", 2)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}, but must be at least {least}")

    @property
    def latent_channels(self) -> int:
        return self.latent_dim

    @property
    def outer_type(self) -> str:
        """What the outermost wavelet halves, as in `layer_type`."""
        return "thw" if self.input_type == "video" else "hw"

    @property
    def decoder_widths(self) -> tuple[int, ...]:
        return self.decoder_base_channels or self.base_channels

    @property
    def spatial_factor(self) -> int:
        return 2 ** (1 + len(self.layer_type))

    @property
    def temporal_factor(self) -> int:
        return 2 ** [self.outer_type, *self.layer_type].count("thw")


def _resnet(name: str, before: int, after: int, config: WFVAE2Config) -> nn.Module:
    return RESNETS[name](before, after, dropout=config.dropout, norm_type=config.norm_type)


def _wavelet(layer_type: str) -> nn.Module:
    return HaarWaveletTransform3D() if layer_type == "thw" else HaarWaveletTransform2D()


def _inverse_wavelet(layer_type: str) -> nn.Module:
    return InverseHaarWaveletTransform3D() if layer_type == "thw" else InverseHaarWaveletTransform2D()


def _mid(width: int, config: WFVAE2Config) -> Chain:
    return Chain(
        *(
            ATTENTIONS[name](width, norm_type=config.norm_type)
            if name in ATTENTIONS
            else _resnet(name, width, width, config)
            for name in config.mid_layers_type
        )
    )


class _DownBlock(nn.Module):
    """Residual blocks and half the resolution; there the coefficients of the next level join."""

    def __init__(self, level: int, config: WFVAE2Config) -> None:
        super().__init__()
        layer_type, resnet = config.layer_type[level], config.layer_res_type[level]
        width, after = config.base_channels[level : level + 2]
        flow = config.encoder_energy_flow_size
        self.wavelet_transform = _wavelet(layer_type)
        self.in_flow_conv = Conv2d(COEFFICIENTS[layer_type], flow, kernel_size=3, padding=1)
        self.res_block = Chain(
            *(_resnet(resnet, width, width, config) for _ in range(config.encoder_num_resblocks - 1))
        )
        self.down = (Spatial2xTime2x3DDownsample if layer_type == "thw" else Downsample)(width, width)
        self.out_res_block = _resnet(resnet, width + flow, after, config)

    def forward(self, x: Tensor, coefficients: Tensor) -> tuple[Tensor, Tensor]:
        x = self.down(self.res_block(x))
        coefficients = self.wavelet_transform(coefficients[:, :3])
        return self.out_res_block(torch.cat([x, self.in_flow_conv(coefficients)], dim=1)), coefficients


class Encoder(nn.Module):
    """(B, 3, T, H, W) -> moments (B, 2z, t, h, w), and the coefficients of each level."""

    def __init__(self, config: WFVAE2Config) -> None:
        super().__init__()
        first, last = config.base_channels[0], config.base_channels[-1]
        self.wavelet_transform_in = _wavelet(config.outer_type)
        self.conv_in = Conv2d(COEFFICIENTS[config.outer_type], first, kernel_size=3, padding=1)
        self.down_blocks = nn.ModuleList(_DownBlock(level, config) for level in range(len(config.layer_type)))
        self.mid = _mid(last, config)
        self.norm_out = normalize(last, config.norm_type)
        self.conv_out = CausalConv3d(last, 2 * config.latent_dim, kernel_size=3, padding=1)

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        coefficients, found = self.wavelet_transform_in(x), []
        x = self.conv_in(coefficients)
        for block in self.down_blocks:
            x, coefficients = block(x, coefficients)
            found.append(coefficients)
        return norm_silu_conv(self.mid(x), self.norm_out, self.conv_out), found


class _UpBlock(nn.Module):
    """Coefficients branch off and become the next level's low frequencies; the rest doubles its resolution."""

    def __init__(self, level: int, config: WFVAE2Config) -> None:
        super().__init__()
        layer_type, resnet = config.layer_type[level], config.layer_res_type[level]
        after, width = config.decoder_widths[level : level + 2]
        flow, in_time = config.decoder_energy_flow_size, layer_type == "thw"
        branch = "ResnetBlock3D" if in_time else "ResnetBlock2D"
        self.width = width
        self.branch_conv = _resnet(branch, width, width + flow, config)
        self.out_flow_conv = Chain(
            _resnet(branch, flow, flow, config), Conv2d(flow, COEFFICIENTS[layer_type], kernel_size=3, padding=1)
        )
        self.inverse_wavelet_transform = _inverse_wavelet(layer_type)
        self.res_block = Chain(
            *(_resnet(resnet, width, width, config) for _ in range(config.decoder_num_resblocks - 2))
        )
        self.up = Spatial2xTime2x3DUpsample(width, width, config.t_interpolation) if in_time else Upsample(width, width)
        self.out_res_block = _resnet(resnet, width, after, config)

    def forward(self, x: Tensor, low: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        x, flow = self.branch_conv(x).tensor_split([self.width], dim=1)
        coefficients = _add_low(self.out_flow_conv(flow), low)
        low = self.inverse_wavelet_transform(coefficients)
        return self.out_res_block(self.up(self.res_block(x))), low, coefficients


def _add_low(coefficients: Tensor, low: Tensor | None) -> Tensor:
    """The low-frequency bands plus what the level below says of them."""
    return coefficients if low is None else torch.cat([coefficients[:, :3] + low, coefficients[:, 3:]], dim=1)


class Decoder(nn.Module):
    """(B, z, t, h, w) -> clips (B, 3, T, H, W), and the coefficients of each level, the coarsest first."""

    def __init__(self, config: WFVAE2Config) -> None:
        super().__init__()
        first, last = config.decoder_widths[0], config.decoder_widths[-1]
        self.conv_in = CausalConv3d(config.latent_dim, last, kernel_size=3, padding=1)
        self.mid = _mid(last, config)
        self.up_blocks = nn.ModuleList(_UpBlock(level, config) for level in reversed(range(len(config.layer_type))))
        self.norm_out = normalize(first, config.norm_type)
        self.conv_out = Conv2d(first, COEFFICIENTS[config.outer_type], kernel_size=3, padding=1)
        self.inverse_wavelet_transform_out = _inverse_wavelet(config.outer_type)

    def forward(self, z: Tensor) -> tuple[Tensor, list[Tensor]]:
        x, low, found = self.mid(self.conv_in(z)), None, []
        for block in self.up_blocks:
            x, low, coefficients = block(x, low)
            found.append(coefficients)
        x = self.conv_out(self.norm_out(x))  # no activation: the original has none either
        return self.inverse_wavelet_transform_out(_add_low(x, low)), found


class WFVAE2(Autoencoder):
    """The autoencoder: x (B, 3, T, H, W) in [-1, 1]; by default T = 4 n + 1 and H, W are multiples of 8.

    Its coefficients are kept to itself: they are not of the levels that the wavelet loss compares.
    """

    config_class = WFVAE2Config

    def __init__(self, config: WFVAE2Config | None = None) -> None:
        super().__init__(config)
        self.encoder, self.decoder = Encoder(self.config), Decoder(self.config)

    def encode(self, x: Tensor) -> DiagonalGaussian:
        self.check_size(*x.shape[2:])
        return DiagonalGaussian(self.encoder(x)[0])

    def decode(self, z: Tensor) -> Tensor:
        return self.decoder(z)[0]

    def enable_tiling(self) -> None:
        """Always a ValueError: this network has no chunked mode, in the original neither."""
        raise ValueError(
            "WFVAE2 cannot encode in chunks: leave tiling disabled and take shorter or smaller clips, or WFVAE"
        )

    def disable_tiling(self) -> None:
        """Nothing to do."""
