"""What encoding objects once saves in a training step of the multi-view trainer.

    python bench/mv_training.py [--size tiny|medium] [--device cpu|cuda]

Both variants take turns within one run, as in refiner.py; what counts is the ratio. Weights are random: they do not
matter for the time.
"""

import argparse
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection
from turns import RowCounter, compare

from common.data import collate
from common.runtime import quiet_libraries
from mvdiffusion.config import PARSER, resolved
from mvdiffusion.data.mvds import RandomViews
from mvdiffusion.data.preparation import ClipTransform
from mvdiffusion.models.initialise import trainable_parameters
from mvdiffusion.models.unet_mv2d import UNetMV2DConditionModel
from mvdiffusion.task import Frozen, MVTask, encode_batch

# By how much all widths of the released networks are divided, and the side of the images.
SIZES = {"tiny": (16, 64), "medium": (4, 128)}
NUM_VIEWS, RELEASED_PX, CLIP_PX = 6, 256, 224


def build(
    divisor: int, side_px: int, device: torch.device, dtype: torch.dtype
) -> tuple[UNetMV2DConditionModel, Frozen]:
    """The joint network and the frozen parts of the released sizes, all widths divided; the UNet stays float32."""
    groups, clip_px = min(32, 64 // divisor), CLIP_PX * side_px // RELEASED_PX // 14 * 14
    unet = UNetMV2DConditionModel(
        block_out_channels=tuple(width // divisor for width in (320, 640, 1280, 1280)),
        attention_head_dim=4,
        norm_num_groups=groups,
        cross_attention_dim=768 // divisor,
        num_views=NUM_VIEWS,
        cd_attention_mid=True,
    )
    vae = AutoencoderKL(
        block_out_channels=tuple(width // divisor for width in (128, 256, 512, 512)),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        norm_num_groups=groups,
        scaling_factor=0.18215,
    )
    vision = CLIPVisionConfig(
        hidden_size=1024 // divisor,
        intermediate_size=4096 // divisor,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=clip_px,
        patch_size=14,
        projection_dim=768 // divisor,
    )
    frozen = Frozen(
        vae=vae.requires_grad_(False).eval().to(device, dtype),
        image_encoder=CLIPVisionModelWithProjection(vision).requires_grad_(False).eval().to(device, dtype),
        feature_extractor=CLIPImageProcessor(
            size={"shortest_edge": clip_px}, crop_size={"height": clip_px, "width": clip_px}
        ),
        scheduler=DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False),
    )
    return unet.to(device), frozen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="medium", help="tiny shows that it runs, and measures nothing")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    parser.add_argument("--repeats", type=int, default=5, help="timed turns")
    arguments = parser.parse_args()
    quiet_libraries()
    device = torch.device(arguments.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.manual_seed(0)
    if device.type == "cpu":
        torch.set_num_threads(1)
    divisor, side_px = SIZES[arguments.size]
    unet, frozen = build(divisor, side_px, device, dtype)
    optimizer = torch.optim.AdamW(trainable_parameters(unet).values(), lr=1e-5)
    flags = ["--debug", "yes", "--pretrained_model_name_or_path", "random", "--resolution", str(side_px)]
    config = resolved(PARSER.parse([*flags, "--num_views", str(NUM_VIEWS)])[0])
    nothing: Any = {
        "held_out": None,
        "photographs": {},
        "log": None,
        "stop": None,
        "reload_frozen": None,
        "lpips": None,
    }
    cameras = [[str(view), 0.0, 0.0] for view in range(NUM_VIEWS)]
    task = MVTask(config, SimpleNamespace(device=device), frozen, unet, unet, cameras, **nothing)
    objects = RandomViews(NUM_VIEWS, side_px, clip=ClipTransform.of(frozen.feature_extractor))
    batch = collate([objects.item(0, objects.variants()[0])])
    raw = {name: value.to(device) for name, value in batch.items()} | {"sample_number": torch.tensor([0])}
    encoded = {**raw, **encode_batch(frozen, raw)}

    def step(batch: dict[str, Any]) -> None:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            loss = task.training_step(batch, 0).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    print(f"size {arguments.size}, {device}, {dtype}, torch {torch.__version__}", flush=True)
    title = f"training step, one object of {NUM_VIEWS} views of {side_px} px, from pixels / from cached latents"
    compare(title, lambda: step(raw), lambda: step(encoded), RowCounter(unet), arguments.repeats, device)


if __name__ == "__main__":
    main()
