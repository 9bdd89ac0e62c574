"""WF-VAE: a video autoencoder whose low-pass wavelet pyramid bypasses the backbone (arXiv 2411.17459).

Names of parameters and configuration fields, with their spelling, are those of released weights.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vae.models.base import Autoencoder, VaeOutput
from vae.models.layers import (
    AttnBlock3D,
    AttnBlock3DFix,
    CausalConv3d,
    Chain,
    Conv2d,
    ResnetBlock2D,
    ResnetBlock3D,
    channels_last,
    norm_silu_conv,
    normalize,
)
from vae.models.posterior import DiagonalGaussian
from vae.models.resample import (
    T_INTERPOLATIONS,
    Downsample,
    Spatial2xTime2x3DDownsample,
    Spatial2xTime2x3DUpsample,
    Upsample,
)
from vae.models.streaming import Stream, align, in_chunks, in_groups, with_stream
from vae.models.wavelets import (
    HaarWaveletTransform2D,
    HaarWaveletTransform3D,
    InverseHaarWaveletTransform2D,
    InverseHaarWaveletTransform3D,
)

ATTENTIONS = {"AttnBlock3D": AttnBlock3D, "AttnBlock3DFix": AttnBlock3DFix}
# The four modules of a level, by whether it halves time too.
LEVELS = {
    False: (Downsample, HaarWaveletTransform2D, Upsample, InverseHaarWaveletTransform2D),
    True: (
        Spatial2xTime2x3DDownsample,
        HaarWaveletTransform3D,
        Spatial2xTime2x3DUpsample,
        InverseHaarWaveletTransform3D,
    ),
}
PIXEL_BANDS = 24  # of a video's 3-D wavelet transform
LOW = 3  # its first channels: the low-pass image


@dataclass(frozen=True)
class WFVAEConfig:
    """The network's shape, in the names of released `config.json` files.

    Attributes:
        connect_res_layer_num: residual blocks between the decoder's backbone and each level of its pyramid.
        l1_*, l2_*: blocks and wavelets of the two lower levels. A level halves time as well with the 3-D ones: level 2
            alone makes the model 4x in time, both make it 8x.
        scale, shift: of latents for a diffusion model; not applied here.
    """

    latent_dim: int = 8
    base_channels: int = 128
    encoder_num_resblocks: int = 2
    encoder_energy_flow_hidden_size: int = 64
    decoder_num_resblocks: int = 2
    decoder_energy_flow_hidden_size: int = 128
    attention_type: str = "AttnBlock3DFix"
    use_attention: bool = True
    dropout: float = 0.0
    norm_type: str = "groupnorm"
    t_interpolation: str = "nearest"
    connect_res_layer_num: int = 1
    scale: tuple[float, ...] = (0.18215,) * 4
    shift: tuple[float, ...] = (0,) * 4
    l1_dowmsample_block: str = "Downsample"
    l1_downsample_wavelet: str = "HaarWaveletTransform2D"
    l2_dowmsample_block: str = "Spatial2xTime2x3DDownsample"
    l2_downsample_wavelet: str = "HaarWaveletTransform3D"
    l1_upsample_block: str = "Upsample"
    l1_upsample_wavelet: str = "InverseHaarWaveletTransform2D"
    l2_upsample_block: str = "Spatial2xTime2x3DUpsample"
    l2_upsample_wavelet: str = "InverseHaarWaveletTransform3D"

    def __post_init__(self) -> None:
        problems = [
            f"{name} is {getattr(self, name)!r}; choose one of {', '.join(choices)}"
            for name, choices in (("attention_type", ATTENTIONS), ("t_interpolation", T_INTERPOLATIONS))
            if getattr(self, name) not in choices
        ]
        for level in ("l1", "l2"):
            if self._blocks(level) not in map(_names, LEVELS.values()):
                choices = " or ".join(", ".join(_names(blocks)) for blocks in LEVELS.values())
                problems.append(f"{level} has the blocks {', '.join(self._blocks(level))}; choose {choices}")
        if problems:
            raise ValueError("; ".join(problems))

    def _blocks(self, level: str) -> tuple[str, ...]:
        kinds = ("dowmsample_block", "downsample_wavelet", "upsample_block", "upsample_wavelet")
        return tuple(getattr(self, f"{level}_{kind}") for kind in kinds)

    def halves_time(self, level: str) -> bool:
        """Whether level "l1" or "l2" works in time as well as in space."""
        return self._blocks(level) == _names(LEVELS[True])

    @property
    def temporal_factor(self) -> int:
        return 2 ** (1 + self.halves_time("l1") + self.halves_time("l2"))

    @property
    def spatial_factor(self) -> int:
        return 8

    @property
    def latent_channels(self) -> int:
        return self.latent_dim

    @property
    def l1_bands(self) -> int:
        """Channels of the wavelet coefficients at level 1."""
        return LOW * (8 if self.halves_time("l1") else 4)

    @property
    def l2_bands(self) -> int:
        return LOW * (8 if self.halves_time("l2") else 4)


def _names(classes: Iterable[type[nn.Module]]) -> tuple[str, ...]:
    return tuple(each.__name__ for each in classes)


def _resnets(config: WFVAEConfig, block: Callable[..., nn.Module], *widths: int) -> list[nn.Module]:
    """Residual blocks between each width and the next."""
    pairs = zip(widths[:-1], widths[1:], strict=True)
    return [block(before, after, dropout=config.dropout, norm_type=config.norm_type) for before, after in pairs]


def _mid(config: WFVAEConfig, before: int, width: int, after: int) -> Chain:
    attention = [ATTENTIONS[config.attention_type](width, config.norm_type)] if config.use_attention else []
    first, last = _resnets(config, ResnetBlock3D, before, width, after)
    return Chain(first, *attention, last)


class Encoder(nn.Module):
    """Clips to moments; the pyramid's coefficients enter the backbone at their resolutions."""

    def __init__(self, config: WFVAEConfig) -> None:
        super().__init__()
        base, flow, num_blocks = (
            config.base_channels,
            config.encoder_energy_flow_hidden_size,
            config.encoder_num_resblocks,
        )
        l1_down, l1_wavelet, *_ = LEVELS[config.halves_time("l1")]
        l2_down, l2_wavelet, *_ = LEVELS[config.halves_time("l2")]
        self.wavelet_transform_in = HaarWaveletTransform3D()
        self.wavelet_transform_l1, self.wavelet_transform_l2 = l1_wavelet(), l2_wavelet()
        self.down1 = Chain(
            Conv2d(PIXEL_BANDS, base, kernel_size=3, padding=1),
            *_resnets(config, ResnetBlock2D, *[base] * (num_blocks + 1)),
            l1_down(base, base),
        )
        self.connect_l1 = Conv2d(config.l1_bands, flow, kernel_size=3, padding=1)
        self.down2 = Chain(
            Conv2d(base + flow, 2 * base, kernel_size=3, padding=1),
            *_resnets(config, ResnetBlock3D, *[2 * base] * (num_blocks + 1)),
            l2_down(2 * base, 2 * base),
        )
        self.connect_l2 = Conv2d(config.l2_bands, flow, kernel_size=3, padding=1)
        self.mid = _mid(config, 2 * base + flow, 4 * base, 4 * base)
        self.norm_out = normalize(4 * base, config.norm_type)
        self.conv_out = CausalConv3d(4 * base, 2 * config.latent_dim, kernel_size=3, padding=1)

    def forward(self, x: Tensor, stream: Stream | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """(B, 3, T, H, W) -> moments (B, 2z, t, H/8, W/8), coefficients W2 (H/4) and W3 (H/8)."""
        w1 = self.wavelet_transform_in(x, stream)  # (B, 24, T1, H/2, W/2)
        w2 = self.wavelet_transform_l1(w1[:, :LOW], stream)  # (B, 12 or 24, T1 or T1', H/4, W/4)
        w3 = self.wavelet_transform_l2(w2[:, :LOW], stream)  # (B, 24, t, H/8, W/8)
        h = self.down1(w1, stream)  # (B, b, ., H/4, W/4)
        h = self.down2(torch.cat([h, self.connect_l1(w2)], dim=1), stream)  # (B, 2b, t, H/8, W/8)
        h = self.mid(torch.cat([h, self.connect_l2(w3)], dim=1), stream)  # (B, 4b, t, H/8, W/8)
        return norm_silu_conv(h, self.norm_out, self.conv_out, stream), w2, w3


class Decoder(nn.Module):
    """Latents to clips; the backbone's last channels at each resolution become the pyramid's coefficients."""

    def __init__(self, config: WFVAEConfig) -> None:
        super().__init__()
        base, flow, num_blocks = (
            config.base_channels,
            config.decoder_energy_flow_hidden_size,
            config.decoder_num_resblocks,
        )
        self.flow = flow
        *_, l1_wavelet = LEVELS[config.halves_time("l1")]
        *_, l2_wavelet = LEVELS[config.halves_time("l2")]
        self.conv_in = CausalConv3d(config.latent_dim, 4 * base, kernel_size=3, padding=1)
        self.mid = _mid(config, 4 * base, 4 * base, 4 * base + flow)
        self.connect_l2 = self._connect(config, config.l2_bands)
        self.up2 = Chain(
            *_resnets(config, ResnetBlock3D, *[4 * base] * (num_blocks + 1)),
            self._upsample(config, "l2", 4 * base),
            *_resnets(config, ResnetBlock3D, 4 * base, 4 * base + flow),
        )
        self.connect_l1 = self._connect(config, config.l1_bands)
        self.up1 = Chain(
            *_resnets(config, ResnetBlock3D, 4 * base, *[2 * base] * num_blocks),
            self._upsample(config, "l1", 2 * base),
            *_resnets(config, ResnetBlock3D, 2 * base, 2 * base),
        )
        self.layer = Chain(*_resnets(config, ResnetBlock3D, 2 * base, base, base))
        self.norm_out = normalize(base, config.norm_type)
        self.conv_out = Conv2d(base, PIXEL_BANDS, kernel_size=3, padding=1)
        self.inverse_wavelet_transform_out = InverseHaarWaveletTransform3D()
        self.inverse_wavelet_transform_l1, self.inverse_wavelet_transform_l2 = l1_wavelet(), l2_wavelet()

    @staticmethod
    def _connect(config: WFVAEConfig, bands: int) -> Chain:
        flow = config.decoder_energy_flow_hidden_size
        blocks = _resnets(config, ResnetBlock3D, *[flow] * (config.connect_res_layer_num + 1))
        return Chain(*blocks, Conv2d(flow, bands, kernel_size=3, padding=1))

    @staticmethod
    def _upsample(config: WFVAEConfig, level: str, width: int) -> nn.Module:
        if config.halves_time(level):
            return Spatial2xTime2x3DUpsample(width, width, t_interpolation=config.t_interpolation)
        return Upsample(width, width)

    def forward(self, z: Tensor, stream: Stream | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """(B, z, t, h, w) -> sample (B, 3, T, 8h, 8w), coefficients V2 (2h) and V3 (h).

        In a stream, time upsampling may emit its last frame later; the pyramid waits for it.
        """
        h, flow = self._split(self.mid(self.conv_in(z, stream), stream))
        v3 = self.connect_l2(flow, stream)  # (B, 24, t, h, w)
        l2 = self.inverse_wavelet_transform_l2(v3, stream)  # (B, 3, t', 2h, 2w)
        h, flow = self._split(self.up2(h, stream))
        v2 = self.connect_l1(flow, stream)  # (B, 12 or 24, t', 2h, 2w)
        v2 = _add_low(v2, align(stream, self.inverse_wavelet_transform_l2, l2, v2))
        l1 = self.inverse_wavelet_transform_l1(v2, stream)  # (B, 3, T1, 4h, 4w)
        del flow
        for layer in (*self.up1, *self.layer):  # a call of the chain would hold its input until it returns
            h = layer(h, stream)  # in the end (B, b, T1, 4h, 4w)
        v1 = norm_silu_conv(h, self.norm_out, self.conv_out)  # (B, 24, T1, 4h, 4w)
        v1 = _add_low(v1, align(stream, self.inverse_wavelet_transform_l1, l1, v1))
        return self.inverse_wavelet_transform_out(v1, stream), v2, v3  # (B, 3, T, 8h, 8w)

    def _split(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """The backbone's channels, and those of the energy flow behind them."""
        return channels_last(h[:, : -self.flow]), channels_last(h[:, -self.flow :])


def _add_low(coefficients: Tensor, low: Tensor) -> Tensor:
    """Coefficients with the low-pass image of the level below added to theirs."""
    return torch.cat([coefficients[:, :LOW] + low, coefficients[:, LOW:]], dim=1)


class WFVAE(Autoencoder):
    """The autoencoder: x (B, 3, T, H, W) in [-1, 1], T = 4 n + 1 (8 n + 1 for the 8x model), H and W multiples of 8."""

    config_class = WFVAEConfig
    has_wavelet_coefficients = True

    def __init__(self, config: WFVAEConfig | None = None) -> None:
        super().__init__(config)
        self.encoder, self.decoder = Encoder(self.config), Decoder(self.config)
        self._chunk_frames: int | None = None
        self._chunk_latents: int | None = None

    def encode(self, x: Tensor) -> DiagonalGaussian:
        self.check_size(*x.shape[2:])
        return DiagonalGaussian(self._encode(x)[0])

    def decode(self, z: Tensor) -> Tensor:
        return self._decode(z)[0]

    def forward(self, x: Tensor, noise: Tensor | None = None) -> VaeOutput:
        self.check_size(*x.shape[2:])
        moments, w2, w3 = self._encode(x)
        posterior = DiagonalGaussian(moments)
        sample, v2, v3 = self._decode(posterior.mode() if noise is None else posterior.sample(noise))
        return VaeOutput(sample, moments, (w2, v2, w3, v3))

    def _encode(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self._chunk_frames is None:
            return self.encoder(x)
        chunks = with_stream(in_groups(in_chunks(x, self._chunk_frames), self.temporal_factor))
        return _join(self.encoder(chunk, stream) for chunk, stream in chunks)

    def _decode(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self._chunk_latents is None:
            return self.decoder(z)
        return _join(self.decoder(chunk, stream) for chunk, stream in with_stream(in_chunks(z, self._chunk_latents)))

    def encode_chunks(self, chunks: Iterable[Tensor]) -> Iterator[Tensor]:
        """Moments of a video that comes in pieces of any length: equal to those of the whole, in constant memory.

        Args:
            chunks: (B, 3, T_i, H, W) in [-1, 1], together T = temporal_factor n + 1 frames.

        Yields:
            (B, 2z, t_i, h, w), together t frames.

        Raises:
            ValueError: sizes as in `check_size`, or a model that cannot be chunked.
        """
        self._check_chunkable()
        num_frames = 0
        for chunk, stream in with_stream(in_groups(chunks, self.temporal_factor)):
            num_frames += chunk.shape[2]
            self.check_size(num_frames, *chunk.shape[3:])
            yield self.encoder(chunk, stream)[0]

    def decode_chunks(self, chunks: Iterable[Tensor]) -> Iterator[Tensor]:
        """Frames of latents that come in pieces (B, z, t_i, h, w) of any length, equal to those of the whole.

        Yields:
            (B, 3, T_i, H, W), together temporal_factor * (t - 1) + 1 frames. They come as soon as they are known.
        """
        self._check_chunkable()
        for chunk, stream in with_stream(chunks):
            yield self.decoder(chunk, stream)[0]

    def enable_tiling(self, chunk_frames: int | None = None, chunk_latents: int | None = None) -> None:
        """Encode and decode in chunks of time: the same result, in less memory where no gradients are recorded.

        Args:
            chunk_frames: frames that are encoded at once (and frame 0 with the first); default: two latents' worth.
            chunk_latents: latents that are decoded at once (and latent 0 with the first); default 2.

        Raises:
            ValueError: the model's norm or attention looks at all frames, or a chunk is empty.
        """
        self._check_chunkable()
        chunk_frames = 2 * self.temporal_factor if chunk_frames is None else chunk_frames
        chunk_latents = 2 if chunk_latents is None else chunk_latents
        for name, value in (("chunk_frames", chunk_frames), ("chunk_latents", chunk_latents)):
            if value < 1:
                raise ValueError(f"{name} is {value}, but must be at least 1")
        self._chunk_frames, self._chunk_latents = chunk_frames, chunk_latents

    def disable_tiling(self) -> None:
        """Encode and decode clips whole."""
        self._chunk_frames = self._chunk_latents = None

    def _check_chunkable(self) -> None:
        config = self.config
        for reason, applies, remedy in (
            ("norm_type groupnorm takes its statistics over all frames", config.norm_type == "groupnorm", "layernorm"),
            (
                "attention_type AttnBlock3D mixes all frames",
                config.use_attention and config.attention_type == "AttnBlock3D",
                "AttnBlock3DFix",
            ),
        ):
            if applies:
                raise ValueError(
                    f"{reason}, so a clip in chunks would give another result: leave tiling disabled and take shorter"
                    f" or smaller clips, or a model with {remedy}"
                )


def _join(chunks: Iterable[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """Results of chunks, each joined in time."""
    return tuple(torch.cat(parts, dim=2) for parts in zip(*chunks, strict=True))
