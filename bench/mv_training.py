"""What encoding objects once saves in a training step of the multi-view trainer.

    python bench/mv_training.py [--size tiny|medium] [--device cpu|cuda]

Both variants take turns within one run, as in refiner.py; what counts is the ratio. Weights are random: they do not
matter for the time.
"""

from types import SimpleNamespace
from typing import Any

import torch
from diffusers import DDIMScheduler
from released import CLIP_PX, UNET_WIDTHS, build_image_encoder, build_vae, divided, num_groups
from turns import RowCounter, arguments_of, compare, training_step

from common.data import collate
from mvdiffusion.config import PARSER, resolved
from mvdiffusion.data.mvds import RandomViews
from mvdiffusion.data.preparation import ClipTransform
from mvdiffusion.models.initialise import trainable_parameters
from mvdiffusion.models.unet_mv2d import UNetMV2DConditionModel
from mvdiffusion.task import Frozen, MVTask, encode_batch

# By how much all widths of the released networks are divided, and the side of the images.
SIZES = {"tiny": (16, 64), "medium": (4, 128)}
NUM_VIEWS, RELEASED_PX = 6, 256


def build(
    divisor: int, side_px: int, device: torch.device, dtype: torch.dtype
) -> tuple[UNetMV2DConditionModel, Frozen]:
    """The joint network and the frozen parts of the released sizes, all widths divided; the UNet stays float32."""
    unet = UNetMV2DConditionModel(
        block_out_channels=divided(UNET_WIDTHS, divisor),
        attention_head_dim=4,
        norm_num_groups=num_groups(divisor),
        cross_attention_dim=768 // divisor,
        num_views=NUM_VIEWS,
        cd_attention_mid=True,
    )
    image_encoder, feature_extractor = build_image_encoder(
        divisor,
        CLIP_PX * side_px // RELEASED_PX // 14 * 14,
        device,
        dtype,
        hidden_size=1024,
        num_layers=24,
        projection_dim=768,
        activation="quick_gelu",
    )
    frozen = Frozen(
        vae=build_vae(divisor, device, dtype),
        image_encoder=image_encoder,
        feature_extractor=feature_extractor,
        scheduler=DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False),
    )
    return unet.to(device), frozen


def main() -> None:
    arguments = arguments_of(__doc__, SIZES)
    device, dtype = arguments.device, arguments.dtype
    divisor, side_px = SIZES[arguments.size]
    unet, frozen = build(divisor, side_px, device, dtype)
    optimizer = torch.optim.AdamW(trainable_parameters(unet).values(), lr=1e-5)
    flags = ["--debug", "yes", "--pretrained_model_name_or_path", "random", "--resolution", str(side_px)]
    config = resolved(PARSER.parse([*flags, "--num_views", str(NUM_VIEWS)])[0])
    nothing: Any = {"photographs": {}} | dict.fromkeys(("held_out", "log", "stop", "reload_frozen", "lpips"))
    cameras = [[str(view), 0.0, 0.0] for view in range(NUM_VIEWS)]
    task = MVTask(config, SimpleNamespace(device=device), frozen, unet, unet, cameras, **nothing)
    objects = RandomViews(NUM_VIEWS, side_px, clip=ClipTransform.of(frozen.feature_extractor))
    batch = collate([objects.item(0, objects.variants()[0])])
    raw = {name: value.to(device) for name, value in batch.items()} | {"sample_number": torch.tensor([0])}
    encoded = {**raw, **encode_batch(frozen, raw)}
    step = training_step(lambda batch: task.training_step(batch, 0).loss, optimizer, device, dtype)
    title = f"training step, one object of {NUM_VIEWS} views of {side_px} px, from pixels / from cached latents"
    compare(title, lambda: step(raw), lambda: step(encoded), RowCounter(unet), arguments.repeats, device)


if __name__ == "__main__":
    main()
