"""What two caches of the refiner save: keys and values of the conditioning rows in sampling, latents in training.

    python bench/refiner.py [--size tiny|medium] [--device cpu|cuda]

Variants of one comparison take turns within one run; what counts is their ratio, taken within each turn. On a CPU one
thread runs, and its processor time is taken: other programs on the machine disturb that less than the clock. Weights
are random: they do not matter for the time.
"""

import argparse
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from diffusers import DDPMScheduler, PNDMScheduler, UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import StableUnCLIPImageNormalizer
from released import CLIP_PX, UNET_WIDTHS, build_image_encoder, build_vae, divided, num_groups
from turns import RowCounter, arguments_of, compare, training_step

from gaussian_refiner.config import RefinerConfig
from gaussian_refiner.data import normalise
from gaussian_refiner.models.components import Components
from gaussian_refiner.models.self_mutual_attention import CondCache, install_self_mutual_attention
from gaussian_refiner.repair import Frame, Sampling, encode_frames, repair_frames
from gaussian_refiner.task import RefinerTask, encode_batch

# By how much all widths of the released networks are divided, and the height of the images. With half the height and a
# quarter of the width, convolutions and attention share the work as in the released networks at 512 px.
SIZES = {"tiny": (16, 64), "medium": (4, 256)}
RELEASED_HEIGHT_PX, TOKENS = 512, 77


def build_components(divisor: int, height_px: int, device: torch.device, dtype: torch.dtype) -> Components:
    """SD2.1-unCLIP with an 8-channel UNet, all widths divided, without its text encoder; the UNet stays float32."""
    embed_width = 1024 // divisor
    unet = UNet2DConditionModel(
        in_channels=8,
        block_out_channels=divided(UNET_WIDTHS, divisor),
        attention_head_dim=(5, 10, 20, 20),
        norm_num_groups=num_groups(divisor),
        cross_attention_dim=1024 // divisor,
        use_linear_projection=True,
        class_embed_type="projection",
        projection_class_embeddings_input_dim=2 * embed_width,
    )
    image_encoder, feature_extractor = build_image_encoder(
        divisor,
        CLIP_PX * height_px // RELEASED_HEIGHT_PX,
        device,
        dtype,
        hidden_size=1280,
        num_layers=32,
        projection_dim=1024,
        activation="gelu",
    )
    schedule = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
    return Components(
        feature_extractor=feature_extractor,
        image_encoder=image_encoder,
        image_normalizer=StableUnCLIPImageNormalizer(embed_width),
        image_noising_scheduler=DDPMScheduler(beta_schedule="squaredcos_cap_v2"),
        scheduler=PNDMScheduler(**schedule, skip_prk_steps=True, prediction_type="v_prediction"),
        text_encoder=None,
        tokenizer=None,
        unet=unet.to(device),
        vae=build_vae(divisor, device, dtype),
    )


def random_image(height_px: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height_px, height_px, 3), dtype=np.uint8)  # (H, H, 3)


def compare_sampling(
    components: Components, cond_cache: CondCache, counter: RowCounter, arguments: argparse.Namespace, height_px: int
) -> None:
    """One image from pixels to pixels, with and without the conditioning rows' keys and values kept."""
    device = components.vae.device
    frame = Frame(height_px, height_px, None, 0, (0,))
    text = torch.randn(1, TOKENS, components.unet.config.cross_attention_dim, device=device)  # (1, tokens, C)

    def repair(guidance_scale: float, use_cond_cache: bool) -> None:
        how = Sampling(arguments.steps, guidance_scale, 0.7, 1.0, ("clip", "render", "cond"), (text, text))
        encoded = encode_frames(components, [random_image(height_px, 0)], [random_image(height_px, 1)], frame)
        options = {"seed": 0, "numbers": [0], "use_cond_cache": use_cond_cache}
        repair_frames(components, cond_cache, how, encoded, **options)

    for guidance_scale in (1.5, 1.0):
        compare(
            f"repair of {height_px} px, {arguments.steps} steps, guidance {guidance_scale:g}, cond cache off / on",
            lambda scale=guidance_scale: repair(scale, False),
            lambda scale=guidance_scale: repair(scale, True),
            counter,
            arguments.repeats,
            device,
        )


def compare_training(
    components: Components, cond_cache: CondCache, counter: RowCounter, arguments: argparse.Namespace, height_px: int
) -> None:
    """One optimizer step on a batch of pixels, and on the same batch encoded before; loading files is left out."""
    device, dtype = components.vae.device, components.vae.dtype
    unet = components.unet.train()
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-5)
    text = torch.randn(1, TOKENS, unet.config.cross_attention_dim, device=device)  # (1, tokens, C)
    nothing: dict[str, Any] = dict.fromkeys(("held_out", "log", "stop", "reload_components", "lpips"))
    processes = SimpleNamespace(device=device)
    task = RefinerTask(RefinerConfig(), processes, components, unet, cond_cache, text, text.repeat(2, 1, 1), **nothing)
    images = {name: random_image(height_px, seed) for seed, name in enumerate(("render", "gt", "prompt_img"))}
    pixels = {name: torch.from_numpy(normalise(image))[None].to(device) for name, image in images.items()}
    common = {"sample_number": torch.tensor([0]), "has_cond": torch.tensor([True], device=device)}  # (1,) each
    raw = {**pixels, **common, "cond_u8": torch.from_numpy(images["prompt_img"])[None]}
    with torch.no_grad():
        encoded = {**encode_batch(components, raw), **common}

    step = training_step(lambda batch: task.training_step(batch, 0).loss, optimizer, device, dtype)
    compare(
        f"training step, batch of one, {height_px} px, from pixels / from cached latents",
        lambda: step(raw),
        lambda: step(encoded),
        counter,
        arguments.repeats,
        device,
    )


def main() -> None:
    arguments = arguments_of(__doc__, SIZES, ("--steps", 20, "sampler steps"))
    divisor, height_px = SIZES[arguments.size]
    components = build_components(divisor, height_px, arguments.device, arguments.dtype)
    cond_cache, counter = install_self_mutual_attention(components.unet), RowCounter(components.unet)
    compare_training(components, cond_cache, counter, arguments, height_px)
    components.unet.requires_grad_(False).eval().to(arguments.dtype)
    compare_sampling(components, cond_cache, counter, arguments, height_px)


if __name__ == "__main__":
    main()
