"""The parts of an SD2.1-unCLIP checkpoint, loaded one by one from a folder or a hub id."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import AutoencoderKL, DDPMScheduler, PNDMScheduler, StableUnCLIPImg2ImgPipeline, UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import StableUnCLIPImageNormalizer
from diffusers.schedulers import SchedulerMixin
from huggingface_hub.errors import HfHubHTTPError
from transformers import CLIPImageProcessor, CLIPTextModel, CLIPTokenizer, CLIPVisionModelWithProjection

from common.pretrained import first_line, is_local
from gaussian_refiner.models.objective import PredictionType, RefinerConstants
from gaussian_refiner.models.unet import load_unet

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
    """Loads every component in float32.

    Args:
        source: a folder with one subfolder per component, or a hub id.
        revision, unet_revision, variant, cache_dir: as in `from_pretrained`; the UNet's revision may differ.
        unet_source: another folder for the UNet alone: that of a checkpoint or an export of the refiner.

    Raises:
        FileNotFoundError: the folder lacks subfolders (they are named), or the hub id cannot be had.
    """
    check_layout(source)
    common = {"cache_dir": cache_dir}
    hub = {**common, "revision": revision}
    try:
        return Components(
            feature_extractor=CLIPImageProcessor.from_pretrained(source, subfolder="feature_extractor", **hub),
            image_encoder=CLIPVisionModelWithProjection.from_pretrained(source, subfolder="image_encoder", **hub),
            image_normalizer=StableUnCLIPImageNormalizer.from_pretrained(source, subfolder="image_normalizer", **hub),
            image_noising_scheduler=DDPMScheduler.from_pretrained(source, subfolder="image_noising_scheduler", **hub),
            scheduler=_load_scheduler(source, hub),
            text_encoder=CLIPTextModel.from_pretrained(source, subfolder="text_encoder", variant=variant, **hub),
            tokenizer=CLIPTokenizer.from_pretrained(source, subfolder="tokenizer", **hub),
            unet=load_unet(
                unet_source or source,
                variant=variant,
                **({} if unet_source else {**common, "revision": unet_revision or revision}),
            ),
            vae=AutoencoderKL.from_pretrained(source, subfolder="vae", variant=variant, **hub),
        )
    except HfHubHTTPError as error:
        raise FileNotFoundError(f"{source} cannot be loaded from the hub ({first_line(error)}). {WITHDRAWN}") from error
    except OSError as error:
        if Path(source).is_dir():
            raise
        raise FileNotFoundError(
            f"{source} is neither a folder nor a hub id that can be reached ({first_line(error)}). {WITHDRAWN}"
        ) from error


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


def _load_scheduler(source: str, hub: dict[str, Any]) -> SchedulerMixin:
    """The scheduler of the class that the checkpoint names: PNDM in the released one."""
    config = PNDMScheduler.load_config(source, subfolder="scheduler", **hub)
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
def embed_images(components: Components, images: Sequence[np.ndarray]) -> torch.Tensor:
    """CLIP embeddings (B, D), float32, on the encoder's device, of uint8 RGB images (H, W, 3) of any sizes."""
    encoder = components.image_encoder
    pixels = components.feature_extractor(images=list(images), return_tensors="pt").pixel_values  # (B, 3, 224, 224)
    return encoder(pixels.to(encoder.device, encoder.dtype)).image_embeds.float()  # (B, D)
