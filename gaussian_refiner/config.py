"""Settings of the refiner: sections, historic spellings, checks."""

from dataclasses import dataclass
from typing import Literal

from common.config import (
    CheckpointConfig,
    DataConfig,
    DenoisingLossConfig,
    GuidedSamplerConfig,
    HubModelConfig,
    LogConfig,
    OptimConfig,
    Parser,
    PicturesConfig,
    RunConfig,
    option,
)


@dataclass(frozen=True, kw_only=True)
class RefinerRun(RunConfig):
    output_dir: str = option("sd21-unclip-model-finetuned-together")
    seed: int = option(12345)


@dataclass(frozen=True, kw_only=True)
class RefinerData(DataConfig):
    batch_size: int = option(4, "pairs per process and micro-batch", minimum=1)
    data_json: str = option("example_kitti.json", "lists of renders, targets and conditioning images; see the guide")
    data_root: str | None = option(None, "folder that the json's paths are relative to; null is the working directory")
    holdout_items: int | None = option(
        None, "last items, held out for validation, of a list without test split; null is 10, or all but one", minimum=1
    )
    max_train_samples: int | None = option(None, "train on the first so many items", minimum=1)
    height_px: int | None = option(
        None, "height of the resized images, a multiple of 8; null is 480 (4:3) or 512 (wide)"
    )
    random_flip: bool = option(False, "mirror a sample's three images together, half of the time")
    windows_per_item: int | None = option(None, "draw windows from so many fixed places; null is anywhere", minimum=1)
    cache_latents: str | None = option(None, "folder of encoded windows, made if absent; needs windows_per_item")

    def __post_init__(self) -> None:
        if self.height_px is not None and (self.height_px < 64 or self.height_px % 8):
            raise ValueError(f"height_px {self.height_px} must be a multiple of 8 and at least 64")
        if self.cache_latents and not self.windows_per_item:
            raise ValueError("cache_latents needs windows_per_item: only windows at fixed places can be encoded once")
        if self.cache_latents and self.random_flip:
            raise ValueError("cache_latents and random_flip exclude each other: mirrored windows are not in the cache")


@dataclass(frozen=True, kw_only=True)
class RefinerModel(HubModelConfig):
    pretrained_model_name_or_path: str | None = option(
        None, "stable-diffusion-2-1-unclip: a folder or a hub id; required"
    )
    non_ema_revision: str | None = option(None, "revision of the UNet alone; null is `revision`")
    variant: str | None = option(None, "weight variant of all components, e.g. fp16")


@dataclass(frozen=True, kw_only=True)
class RefinerLoss(DenoisingLossConfig):
    condition_dropout_prob: float = option(
        0.05, "chance of each of the seven ways to drop", minimum=0, maximum=1, needs="use_classifier_free_guidance"
    )
    snr_mode: Literal["fixed", "pairwise", "upstream"] = option(
        "fixed",
        "weights by each row's timestep, by the target's, or as the original by the mean of a micro-batch",
        needs="snr_gamma",
    )
    cond_loss_weight: float = option(1.0, "weight of the conditioning rows in the loss", minimum=0)


@dataclass(frozen=True, kw_only=True)
class RefinerLog(LogConfig):
    tracker_project_name: str = option("text2image-fine-tune")


@dataclass(frozen=True, kw_only=True)
class RefinerOptim(OptimConfig):
    gradient_accumulation_steps: int = option(20)
    lr_warmup_steps: int = option(500)


@dataclass(frozen=True, kw_only=True)
class SamplerConfig(GuidedSamplerConfig):
    """How images are repaired, in validation and in inference."""

    num_inference_steps: int = option(20, "sampler steps", minimum=1, needs="parity=False")
    guidance_scale: float = option(
        1.5, "classifier-free guidance; 1 is off and halves the cost", above=0, needs="parity=False"
    )
    guidance_rescale: float = option(
        0.7, "share by which guided predictions are rescaled", minimum=0, maximum=1, needs="parity=False"
    )
    strength: float = option(
        1.0,
        "1 starts from noise, less from the render with that share of noise",
        above=0,
        maximum=1,
        needs="parity=False",
    )
    parity: bool = option(False, "sample as the original did: guidance 10 between two prompts, no rescale")


@dataclass(frozen=True, kw_only=True)
class RefinerValidation(PicturesConfig, SamplerConfig):
    """Repaired images against held-out targets."""


@dataclass(frozen=True, kw_only=True)
class RefinerConfig:
    run: RefinerRun = RefinerRun()
    data: RefinerData = RefinerData()
    model: RefinerModel = RefinerModel()
    loss: RefinerLoss = RefinerLoss()
    optim: RefinerOptim = RefinerOptim()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: RefinerLog = RefinerLog()
    validation: RefinerValidation = RefinerValidation()


ALIASES = {
    "train_batch_size": "data.batch_size",
    "dataloader_num_workers": "data.num_workers",
}

_LEFT_OVER = "a left-over of the text-to-image script that the original grew from"
IGNORED = {
    "conditioning_dropout_prob": "it looks like --condition_dropout_prob, which is the one that counts",
    "resolution": "the aspect bucket sets the size; use --height_px",
    "center_crop": "windows are drawn at random and validated at the centre; --windows_per_item 1 trains on the centre",
    "enable_xformers_memory_efficient_attention": "PyTorch's own fused attention is always used",
    "foreach_ema": "the average is always updated with fused operations",
    "validation_prompts": "the refiner validates on held-out images",
    "dream_training": "never part of the refiner's loss",
    "dream_detail_preservation": "never part of the refiner's loss",
    "pretrained_ip_adpater_path": "no IP-Adapter takes part",
    "local_rank": "the launcher sets it in the environment",
    "push_to_hub": "upload the folder `export` with `hf upload` when you are content with it",
    "hub_token": "nothing is uploaded",
    "hub_model_id": "nothing is uploaded",
    "train_data_dir": f"{_LEFT_OVER}; use --data_json and --data_root",
    "dataset_config_name": f"{_LEFT_OVER}; use --data_json",
    "image_column": f"{_LEFT_OVER}; use --data_json",
    "caption_column": f"{_LEFT_OVER}; use --data_json",
}


def check(config: RefinerConfig) -> list[str]:
    """Problems between sections, one sentence each."""
    if config.model.pretrained_model_name_or_path:
        return []
    return ["--pretrained_model_name_or_path is required: the folder (or hub id) of stable-diffusion-2-1-unclip"]


PARSER = Parser(
    RefinerConfig,
    aliases=ALIASES,
    ignored=IGNORED,
    check=check,
    program="train_repair_cross_attn_version.py",
    description="Fine-tunes SD2.1-unCLIP to repair renders of 3D-Gaussian scenes.",
)
