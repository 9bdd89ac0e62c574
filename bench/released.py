"""The frozen networks of the released models with random weights and all widths divided, for the benchmarks."""

import torch
from diffusers import AutoencoderKL
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

UNET_WIDTHS = (320, 640, 1280, 1280)
VAE_WIDTHS = (128, 256, 512, 512)
CLIP_PX = 224


def num_groups(divisor: int) -> int:
    """Groups of normalisation that divide the narrowest width, which 2 x `divisor` divides."""
    return min(32, 64 // divisor)


def divided(widths: tuple[int, ...], divisor: int) -> tuple[int, ...]:
    return tuple(width // divisor for width in widths)


def build_vae(divisor: int, device: torch.device, dtype: torch.dtype) -> AutoencoderKL:
    """Stable Diffusion's."""
    vae = AutoencoderKL(
        block_out_channels=divided(VAE_WIDTHS, divisor),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        norm_num_groups=num_groups(divisor),
        scaling_factor=0.18215,
    )
    return vae.requires_grad_(False).eval().to(device, dtype)


def build_image_encoder(
    divisor: int,
    side_px: int,
    device: torch.device,
    dtype: torch.dtype,
    *,
    hidden_size: int,
    num_layers: int,
    projection_dim: int,
    activation: str,
) -> tuple[CLIPVisionModelWithProjection, CLIPImageProcessor]:
    """A CLIP for images of `side_px`, and what prepares images for it; widths are those before they are divided."""
    config = CLIPVisionConfig(
        hidden_size=hidden_size // divisor,
        intermediate_size=4 * hidden_size // divisor,
        num_hidden_layers=num_layers,
        num_attention_heads=16,
        image_size=side_px,
        patch_size=14,
        projection_dim=projection_dim // divisor,
        hidden_act=activation,
    )
    encoder = CLIPVisionModelWithProjection(config).requires_grad_(False).eval().to(device, dtype)
    size = {"height": side_px, "width": side_px}
    return encoder, CLIPImageProcessor(size={"shortest_edge": side_px}, crop_size=size)
