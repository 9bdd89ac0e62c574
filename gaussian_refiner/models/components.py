"""The parts of an SD2.1-unCLIP checkpoint, loaded one by one from a folder or a hub id."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import AutoencoderKL, DDPMScheduler, PNDMScheduler, StableUnCLIPImg2ImgPipeline, UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import StableUnCLIPImageNormalizer
from diffusers.schedulers import SchedulerMixin
from PIL.Image import Image
from transformers import CLIPImageProcessor, CLIPTextModel, CLIPTokenizer, CLIPVisionModelWithProjection

from common.pretrained import is_local, load_part
from gaussian_refiner.models.objective import PredictionType, RefinerConstants
from gaussian_refiner.models.unet import load_unet

logger = logging.getLogger(__name__)

SUBFOLDERS = (
    "feature_extractor",
    "image_encoder",
    "image_noising_scheduler",
    "image_normalizer",
    "scheduler",
    "text_encoder",
    "tokenizer",
    "unet",
    "vae",
)
PARITY_PROMPTS = (
    "low quality, bad quality",
    "best quality, high quality",
)  # the original's validation: negative, positive
WITHDRAWN = (
    "Stability AI withdrew its stable-diffusion-2-* repositories from the hub in November 2025: give the folder of a "
    "local copy, or the id of a mirror, as --pretrained_model_name_or_path"
)


@dataclass
class Components:
    """An SD2.1-unCLIP checkpoint with an 8-channel UNet; the modules are in float32 and in eval mode."""

    feature_extractor: CLIPImageProcessor
    image_encoder: CLIPVisionModelWithProjection
    image_normalizer: StableUnCLIPImageNormalizer
    image_noising_scheduler: DDPMScheduler
    scheduler: SchedulerMixin
    text_encoder: CLIPTextModel
    tokenizer: CLIPTokenizer
    unet: UNet2DConditionModel
    vae: AutoencoderKL

    def constants(self, device: torch.device) -> RefinerConstants:
        """The checkpoint's schedules and embedding statistics on `device`, in float32."""
        return RefinerConstants(
            alphas_cumprod=self.scheduler.alphas_cumprod.to(device),
            image_alphas_cumprod=self.image_noising_scheduler.alphas_cumprod.to(device),
            embed_mean=self.image_normalizer.mean.detach().to(device),
            embed_std=self.image_normalizer.std.detach().to(device),
        )

    @property
    def prediction_type(self) -> PredictionType:
        """What the scheduler takes the UNet's answers for; it may be set against what the checkpoint says."""
        return self.scheduler.config.prediction_type

    @prediction_type.setter
    def prediction_type(self, prediction_type: PredictionType) -> None:
        self.scheduler.register_to_config(prediction_type=prediction_type)

    def pipeline(self) -> StableUnCLIPImg2ImgPipeline:
        """The components as a diffusers pipeline, to be saved; its own sampling does not know the render."""
        return StableUnCLIPImg2ImgPipeline(**{name: getattr(self, name) for name in SUBFOLDERS})


def load_components(
    source: str,
    *,
    revision: str | None = None,
    unet_revision: str | None = None,
    variant: str | None = None,
    cache_dir: str | None = None,
    unet_source: str | None = None,
) -> Components:
    """Loads every component in float32, whatever the files hold.

    Args:
        source: a folder with one subfolder per component, or a hub id.
        revision, unet_revision, cache_dir: as in `from_pretrained`; the UNet's revision may differ.
        variant: of the weights, e.g. fp16; a component without it is loaded from its plain file.
        unet_source: another folder for the UNet alone: that of a checkpoint or an export of the refiner.

    Raises:
        FileNotFoundError: the folder lacks subfolders or files (they are named), or the hub id cannot be had.
        ValueError: a file is damaged, or of another network.
    """
    check_layout(source)

    def part(load: Callable[..., Any], name: str, **options: Any) -> Any:
        what = name.replace("_", " ")
        try:
            return load_part(load, what, source, name, revision, cache_dir, **options)
        except FileNotFoundError as error:
            if options.get("variant"):
                logger.warning("%s has no %s of variant %s: the one without is taken", source, what, variant)
                return part(load, name, **{**options, "variant": None})
            if Path(source).is_dir():
                raise
            raise FileNotFoundError(f"{error}. {WITHDRAWN}") from error

    # transformers would take the dtype of the files.
    clip: Any = {"variant": variant, "dtype": torch.float32}
    hub = {} if unet_source else {"revision": unet_revision or revision, "cache_dir": cache_dir}
    return Components(
        feature_extractor=part(CLIPImageProcessor.from_pretrained, "feature_extractor"),
        image_encoder=part(CLIPVisionModelWithProjection.from_pretrained, "image_encoder", **clip),
        image_normalizer=part(StableUnCLIPImageNormalizer.from_pretrained, "image_normalizer", variant=variant),
        image_noising_scheduler=part(DDPMScheduler.from_pretrained, "image_noising_scheduler"),
        scheduler=_scheduler_of(part(PNDMScheduler.load_config, "scheduler"), source),
        text_encoder=part(CLIPTextModel.from_pretrained, "text_encoder", **clip),
        tokenizer=part(CLIPTokenizer.from_pretrained, "tokenizer"),
        unet=load_unet(unet_source or source, variant=variant, **hub),
        vae=part(AutoencoderKL.from_pretrained, "vae", variant=variant),
    )


def check_layout(source: str) -> None:
    """Names the component subfolders that a local folder lacks, before anything is loaded.

    Raises:
        FileNotFoundError: the folder is not laid out like a diffusers unCLIP checkpoint, or a path does not exist.
    """
    folder = Path(source)
    if folder.is_dir():
        missing = [name for name in SUBFOLDERS if not (folder / name).is_dir()]
        if missing:
            if (folder / "export" / "unet").is_dir():
                raise FileNotFoundError(f"{folder} is the folder of a run, no checkpoint: give {folder / 'export'}")
            found = ", ".join(sorted(path.name for path in folder.iterdir() if path.is_dir())) or "no subfolders"
            raise FileNotFoundError(
                f"{folder} is no unCLIP checkpoint in diffusers layout: it lacks {', '.join(missing)}; it holds {found}"
            )
    elif is_local(source):
        raise FileNotFoundError(f"the checkpoint folder {source} does not exist. {WITHDRAWN}")


def _scheduler_of(config: dict[str, Any], source: str) -> SchedulerMixin:
    """The scheduler of the class that the checkpoint names: PNDM in the released one."""
    scheduler_class = getattr(diffusers, config.get("_class_name", "PNDMScheduler"), None)
    if not (isinstance(scheduler_class, type) and issubclass(scheduler_class, SchedulerMixin)):
        raise ValueError(f"{source}/scheduler names {config.get('_class_name')!r}, which is no scheduler of diffusers")
    return scheduler_class.from_config(config)


@torch.no_grad()
def embed_text(components: Components, prompts: Sequence[str]) -> torch.Tensor:
    """Last hidden states of prompts, padded to the tokenizer's length: (B, 77, C) float32 on the encoder's device."""
    tokenizer, encoder = components.tokenizer, components.text_encoder
    ids = tokenizer(
        list(prompts), padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt"
    ).input_ids  # (B, 77)
    return encoder(ids.to(encoder.device))[0].float()  # (B, 77, C)


@torch.no_grad()
def embed_images(components: Components, images: Sequence[Image | np.ndarray]) -> torch.Tensor:
    """CLIP embeddings (B, D), float32, on the encoder's device, of uint8 RGB images (H, W, 3) of any sizes."""
    encoder = components.image_encoder
    pixels = components.feature_extractor(images=list(images), return_tensors="pt").pixel_values  # (B, 3, 224, 224)
    return encoder(sent(pixels, encoder.device).to(encoder.dtype)).image_embeds.float()  # (B, D)


def sent(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor of the CPU on `device`; out of pinned memory, so that nobody waits for what a GPU still has to do."""
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)
