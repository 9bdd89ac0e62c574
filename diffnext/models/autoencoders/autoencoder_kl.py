"""The autoencoder of images of Stable Diffusion: diffusers' encoder and decoder under one roof with the others."""

from dataclasses import dataclass

from diffusers.models.autoencoders.vae import Decoder, Encoder
from torch import Tensor, nn

from diffnext.models.autoencoders.base import Autoencoder, DecoderOutput, EncoderOutput

LEGACY_ATTENTION = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}


@dataclass(frozen=True)
class AutoencoderKLConfig:
    """Fields of config.json; the scale is that of Stable Diffusion 1 where it is not given."""

    in_channels: int = 3
    out_channels: int = 3
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    latent_channels: int = 16
    sample_size: int = 1024
    scaling_factor: float = 0.18215
    shift_factor: float | None = None
    double_z: bool = True
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True


class AutoencoderKL(Autoencoder):
    """Images (B, 3, H, W) <-> latents (B, C, h, w); each width but the last halves height and width."""

    config_class = AutoencoderKLConfig
    # Settings that do not change the network, or that all released checkpoints share.
    ignored_keys = ("act_fn", "down_block_types", "up_block_types", "norm_num_groups", "mid_block_add_attention")
    ignored_keys += ("latents_mean", "latents_std", "force_upcast")

    def __init__(self, config: AutoencoderKLConfig) -> None:
        super().__init__(config)
        widths, latents = config.block_out_channels, config.latent_channels
        self.spatial_factor = 2 ** (len(widths) - 1)
        shared = {"block_out_channels": widths, "layers_per_block": config.layers_per_block}
        self.encoder = Encoder(
            config.in_channels,
            latents,
            down_block_types=("DownEncoderBlock2D",) * len(widths),
            double_z=config.double_z,
            **shared,
        )
        self.decoder = Decoder(
            latents, config.out_channels, up_block_types=("UpDecoderBlock2D",) * len(widths), **shared
        )
        moments = 2 * latents if config.double_z else latents
        self.quant_conv = nn.Conv2d(moments, moments, 1) if config.use_quant_conv else nn.Identity()
        self.post_quant_conv = nn.Conv2d(latents, latents, 1) if config.use_post_quant_conv else nn.Identity()

    @classmethod
    def adapt_state(cls, state: dict[str, Tensor]) -> dict[str, Tensor]:
        return modern_attention(state)

    def encode(self, x: Tensor) -> EncoderOutput:
        """Pixels (B, 3, H, W) in [-1, 1] -> posterior with parameters (B, 2 C, h, w).

        Raises:
            ValueError: clips, or sizes that are not whole latents.
        """
        if x.dim() != 4:
            raise ValueError(f"AutoencoderKL encodes images (B, 3, H, W), not {tuple(x.shape)}")
        self.check_size(1, *x.shape[2:])
        return self._posterior(self.quant_conv(self.encoder(x)))  # (B, 2 C, h, w)

    def decode(self, z: Tensor) -> DecoderOutput:
        """Latents (B, C, h, w) or (B, C, 1, h, w) -> pixels (B, 3, H, W)."""
        if z.dim() == 5:
            if z.shape[2] != 1:
                raise ValueError(f"AutoencoderKL decodes images, but these latents have {z.shape[2]} frames")
            z = z.squeeze(2)  # (B, C, h, w)
        return DecoderOutput(self.decoder(self.post_quant_conv(z)))  # (B, 3, H, W)

    def check_size(self, num_frames: int, height_px: int, width_px: int) -> None:
        if num_frames != 1:
            raise ValueError(f"AutoencoderKL takes images, not clips of {num_frames} frames")
        super().check_size(num_frames, height_px, width_px)


def modern_attention(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Renames the attention of old checkpoints, whose projections may be 1 x 1 convolutions."""
    renamed = {}
    for name, value in state.items():
        for old, new in LEGACY_ATTENTION.items():
            name = name.replace(old, new) if ".attentions." in name else name
        is_projection = ".attentions." in name and name.endswith(".weight") and value.dim() > 2
        renamed[name] = value.flatten(1) if is_projection else value  # (C, C)
    return renamed
