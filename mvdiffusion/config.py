"""Settings of the multi-view trainer: sections, profiles, the keys of the original's and its parent's YAML, checks."""

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from common.config import (
    CheckpointConfig,
    DataConfig,
    DenoisingLossConfig,
    HubModelConfig,
    LogConfig,
    OptimConfig,
    Parser,
    PicturesConfig,
    RunConfig,
    option,
)
from mvdiffusion.views import choose_views, colours_of, require_condition_view, require_countable

# What a switch means where it is not given: section.field -> value. `gnn3d` trains as the original did, `wonder3d` as
# its parent; `recommended` is the parent's with the min-SNR weights of v-prediction, the start of the joint layers and
# CLIP's input mended.
_PARENT = {
    "data.clip_resize": "pil",
    "loss.half_order": "normal_first",
    "loss.condition_latents": "mode",
    "loss.timestep_sharing": "domain_object",
    "loss.drop_type": "drop_as_a_whole",
    "loss.condition_drop_rate": 0.05,
    "loss.snr_mode": "canonical",
    "model.zero_init_conv_in": True,
    "model.zero_init_joint_bias": True,
    "optim.camera_embedding_lr_mult": 10.0,
    "validation.cfg_order": "domain",
}
PROFILES: dict[str, dict[str, Any]] = {
    "recommended": _PARENT,
    "wonder3d": {
        **_PARENT,
        "data.clip_resize": "tensor",
        "loss.snr_mode": "wonder3d",
        "model.zero_init_joint_bias": False,
    },
    "gnn3d": {
        "data.clip_resize": "pil",
        "loss.half_order": "image_first",
        "loss.condition_latents": "sample",
        "loss.timestep_sharing": "row",
        "loss.drop_type": "row_both",
        "loss.condition_drop_rate": 0.1,
        "loss.snr_mode": "gnn3d",
        "model.zero_init_conv_in": False,
        "model.zero_init_joint_bias": False,
        "optim.camera_embedding_lr_mult": 1.0,
        "validation.cfg_order": "upstream",
    },
}
_BY_PROFILE = "null is what run.preset says"


@dataclass(frozen=True, kw_only=True)
class MVRun(RunConfig):
    output_dir: str = option("sd-model-finetuned")
    seed: int = option(42)
    preset: Literal["recommended", "gnn3d", "wonder3d"] = option(
        "recommended", "values of the switches that are not given: the original's, its parent's, or the better of both"
    )


@dataclass(frozen=True, kw_only=True)
class MVData(DataConfig):
    batch_size: int = option(
        2, "objects per process and micro-batch; the network sees num_views x 2 rows of each", minimum=1
    )
    train_data_dir: str | None = option(None, "folder of rendered objects, see scripts/render_multiview.py; required")
    object_list: str | None = option(None, "JSON list of the objects to use; null takes all in the folder")
    invalid_list: str | None = option(None, "JSON list of objects to leave out")
    subscene_tag: int | None = option(None, "letters of an object's id in its parent folder; null finds out", minimum=0)
    suffix: str | None = option(None, "file suffix of the renders: png or webp; null finds out")
    read_mask: bool | None = option(
        None, "mask files tell objects from their background, else the images' own transparency; null finds out"
    )
    num_validation_samples: int = option(32, "last objects of the list, held out for validation", minimum=0)
    max_train_samples: int | None = option(None, "train on the first so many objects", minimum=1)
    num_views: int = option(6, "views per object: 1 to 6, or 8", minimum=1)
    views: tuple[str, ...] = option((), "names of the views, where they are not the usual ones of num_views")
    poses: Literal["upright", "tilted", "rendered"] = option(
        "upright",
        "camera angles given to the network: even ones, those of the released weights, or of each object's own files",
    )
    resolution: int = option(256, "side of the images in pixels, a multiple of 8", minimum=64)
    bg_color: str | float = option(
        "three_choices", "background: white, black, gray, random, three_choices, or a grey level in [0, 1]"
    )
    augment_data: bool = option(False, "condition on any of the views instead of the front one")
    clip_resize: Literal["pil", "tensor", "tensor_antialias"] | None = option(
        None,
        "how training brings the condition image to CLIP's size: as inference does, or as a tensor, without "
        f"antialiasing or with it; {_BY_PROFILE}",
    )
    random_flip: bool = option(False, "mirror an object half of the time, with its normals and views")
    debug: bool = option(False, "train on random numbers instead of data, to measure speed and memory")
    cache_latents: str | None = option(None, "folder of encoded objects, made if absent; needs countable backgrounds")

    @property
    def background(self) -> str | float:
        """A name, or a grey level in [0, 1]."""
        try:
            return float(self.bg_color)
        except ValueError:
            return str(self.bg_color)

    def __post_init__(self) -> None:
        if self.resolution % 8:
            raise ValueError(f"resolution {self.resolution} must be a multiple of 8")
        if self.cache_latents and self.debug:
            raise ValueError("cache_latents and debug exclude each other: random numbers need no cache")


@dataclass(frozen=True, kw_only=True)
class MVModel(HubModelConfig):
    pretrained_model_name_or_path: str | None = option(
        None, "sd-image-variations or a Wonder3D pipeline: a folder or a hub id; the components below replace its own"
    )
    pretrained_path_vae: str | None = option(None, "folder or hub id that holds vae/")
    pretrained_path_image_encoder: str | None = option(None, "folder or hub id that holds image_encoder/")
    pretrained_path_feature_extractor: str | None = option(None, "folder or hub id that holds feature_extractor/")
    pretrained_path_scheduler: str | None = option(None, "folder or hub id that holds scheduler/")
    pretrained_unet_path: str | None = option(
        None, "folder or hub id that holds unet/: 2-D weights, or those of an earlier stage or run"
    )
    pretrained_config_path_unet: str | None = option(None, "JSON file with the UNet's settings, e.g. unet_config.json")
    cd_attention_mid: bool | None = option(
        None, "cross-domain layers after self-attention; null is true when domains are trained jointly", state=True
    )
    cd_attention_last: bool | None = option(None, "cross-domain layers at the end of blocks; null is false", state=True)
    multiview_attention: bool | None = option(None, "self-attention over all views; null is true", state=True)
    sparse_mv_attention: bool | None = option(None, "only over the first view and the own; null is false", state=True)
    zero_init_conv_in: bool | None = option(
        None,
        "from 2-D weights, begin with an input layer that overlooks the condition; false draws it at random, and with "
        f"preset gnn3d all of that layer; {_BY_PROFILE}",
    )
    zero_init_joint_bias: bool | None = option(None, f"cross-domain layers start without any effect; {_BY_PROFILE}")
    trainable_modules: tuple[str, ...] | None = option(
        None, "train only modules whose names end so, e.g. joint_mid in stage 2; null trains all", state=True
    )


@dataclass(frozen=True, kw_only=True)
class MVLoss(DenoisingLossConfig):
    pred_type: Literal["joint", "mix"] = option(
        "joint", "both domains of an object together (stage 2), or one of them, drawn per sample (stage 1)", state=True
    )
    half_order: Literal["normal_first", "image_first"] | None = option(
        None, f"which domain's rows come first in training; {_BY_PROFILE}"
    )
    condition_latents: Literal["mode", "sample"] | None = option(
        None, f"the condition image's latent: its mean or a draw; {_BY_PROFILE}"
    )
    timestep_sharing: Literal["row", "domain_object", "object"] | None = option(
        None, f"what shares a timestep: nothing, the views of a domain, or an object; {_BY_PROFILE}"
    )
    drop_type: Literal["drop_as_a_whole", "drop_independent", "drop_joint", "row_both"] | None = option(
        None,
        "what loses its condition together: an object, a row, a view in both domains (each in one of three ways), or a "
        f"row in both conditions at once; {_BY_PROFILE}",
        needs="use_classifier_free_guidance",
    )
    condition_drop_rate: float | None = option(
        None,
        f"chance of each way to drop a condition; {_BY_PROFILE}",
        minimum=0,
        maximum=1,
        needs="use_classifier_free_guidance",
    )
    snr_gamma: float | None = option(5.0)
    snr_mode: Literal["canonical", "wonder3d", "gnn3d"] | None = option(
        None, f"min-SNR weights of v-prediction; {_BY_PROFILE}", needs="snr_gamma"
    )


@dataclass(frozen=True, kw_only=True)
class MVOptim(OptimConfig):
    lr_warmup_steps: int = option(500)
    camera_embedding_lr_mult: float | None = option(
        None, f"factor of the learning rate of the class embedding; {_BY_PROFILE}", above=0
    )


@dataclass(frozen=True, kw_only=True)
class MVLog(LogConfig):
    report_to: str = option("wandb")
    tracker_project_name: str = option("image2image_fine_tune")
    wandb_args: dict | None = option(None, "for wandb's start: {entity: your user name, name: of the run}")


@dataclass(frozen=True, kw_only=True)
class MVValidation(PicturesConfig):
    num_inference_steps: int = option(20, "sampler steps", minimum=1)
    eta: float = option(
        0.0, "noise that DDIM adds per step, from none at 0 to as much as DDPM at 1", minimum=0, maximum=1
    )
    cfg_order: Literal["domain", "upstream"] | None = option(
        None, f"order of guided rows; `upstream` mixes up conditions with guidance above 1; {_BY_PROFILE}"
    )
    validation_guidance_scales: tuple[float, ...] = option((1.0, 3.0), "guidance of each validation; 1 is none")
    validation_dir: str | None = option(None, "folder of photographs of single objects, sampled in every validation")
    crop_size: int | None = option(
        None, "longer side of the object in such a photograph in pixels; null is 3/4 of the resolution", minimum=1
    )


@dataclass(frozen=True, kw_only=True)
class MVConfig:
    run: MVRun = MVRun()
    data: MVData = MVData()
    model: MVModel = MVModel()
    loss: MVLoss = MVLoss()
    optim: MVOptim = MVOptim()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: MVLog = MVLog()
    validation: MVValidation = MVValidation()


_UNET = "unet_from_pretrained_kwargs"
ALIASES = {
    "train_batch_size": "data.batch_size",
    "dataloader_num_workers": "data.num_workers",
    "pretrained_weight_path_unet": "model.pretrained_unet_path",
    "p_uncond": "loss.condition_drop_rate",
    "validation_guidance_scale": "validation.validation_guidance_scales",
    "pipe_validation_kwargs.eta": "validation.eta",
    "validation_sanity_check": "validation.validate_at_start",
    "pipe_kwargs.num_views": "data.num_views",
    "train_dataset.root_dir": "data.train_data_dir",
    "train_dataset.num_samples": "data.max_train_samples",
    **{
        f"train_dataset.{name}": f"data.{name}"
        for name in (
            *("object_list", "invalid_list", "num_views", "bg_color", "augment_data", "num_validation_samples"),
            *("subscene_tag", "suffix", "read_mask"),
        )
    },
    f"{_UNET}.num_views": "data.num_views",
    **{
        f"{_UNET}.{name}": f"model.{name}"
        for name in (
            "cd_attention_mid",
            "cd_attention_last",
            "multiview_attention",
            "sparse_mv_attention",
            "zero_init_conv_in",
        )
    },
}

_FIXED_EMBEDDING = "ten numbers, the sines and cosines of the angles and of the domain, are always given"
_LEFT_OVER = "a left-over of the text-to-image script that the original grew from"
_SIZE = "`resolution` sets the size"
IGNORED = {
    "enable_xformers_memory_efficient_attention": "PyTorch's own fused attention is always used",
    "center_crop": "renders are square and are not cropped",
    "camera_embedding_type": _FIXED_EMBEDDING,
    "pipe_kwargs.camera_embedding_type": _FIXED_EMBEDDING,
    f"{_UNET}.camera_embedding_type": _FIXED_EMBEDDING,
    f"{_UNET}.projection_class_embeddings_input_dim": _FIXED_EMBEDDING,
    f"{_UNET}.sample_size": _SIZE,
    f"{_UNET}.zero_init_camera_projection": "it had no effect in the parent either: it would drown pose and domain",
    f"{_UNET}.mvcd_attention": "it had no effect in the parent either",
    **{f"{_UNET}.{name}_channels": "pretrained_config_path_unet or the weights set it" for name in ("in", "out")},
    "train_dataset.img_wh": _SIZE,
    "train_dataset.groups_num": "it had no effect in the parent either",
    "train_dataset.validation": "the split is made by num_validation_samples",
    **{f"train_dataset.{name}": "pred_type decides it" for name in ("read_normal", "read_color", "mix_color_normal")},
    "train_dataset.read_depth": "depth takes no part",
    "validation_dataset": "the last num_validation_samples objects of train_data_dir are held out",
    "validation_train_dataset": "validation samples held-out objects only",
    "validation_batch_size": "validation samples one object at a time",
    "validation_train_batch_size": "validation samples held-out objects only",
    "validation_grid_nrow": "a row of the contact sheet is an object",
    "scale_input_latents": "condition latents are always scaled",
    "last_global_step": "a checkpoint knows its step",
    "vis_dir": "pictures go to output_dir/validation",
    "non_ema_revision": "`revision` holds for all components",
    "variant": "weights are read in full precision",
    "local_rank": "the launcher sets it in the environment",
    "push_to_hub": "upload the folder `export` with `hf upload` when you are content with it",
    "hub_token": "nothing is uploaded",
    "hub_model_id": "nothing is uploaded",
}


def _data_problems(data: MVData) -> list[str]:
    """What is wrong with the names of views and background, one sentence each."""
    problems = []
    try:
        require_condition_view("front", choose_views(data.num_views, data.views or None, data.poses))
    except ValueError as error:
        problems.append(str(error))
    try:
        backgrounds = colours_of(data.background)
        if data.cache_latents:
            require_countable(backgrounds)
    except ValueError as error:
        problems.append(str(error))
    return problems


def check(config: MVConfig) -> list[str]:
    """Problems between sections, one sentence each."""
    data, model = config.data, config.model
    problems = _data_problems(data)
    if not data.train_data_dir and not data.debug:
        problems.append("train_data_dir is required: the folder of rendered objects (or debug: Yes for random numbers)")
    missing = [
        name
        for name in ("vae", "image_encoder", "feature_extractor", "scheduler")
        if not (getattr(model, f"pretrained_path_{name}") or model.pretrained_model_name_or_path)
    ]
    if not (model.pretrained_unet_path or model.pretrained_model_name_or_path):
        missing.append("unet")
    if missing:
        problems.append(
            "pretrained_model_name_or_path is required (the folder or hub id of sd-image-variations-diffusers), or "
            f"paths of single components; without any are: {', '.join(missing)}"
        )
    crop_size = config.validation.crop_size
    if crop_size and crop_size > data.resolution:
        problems.append(f"crop_size {crop_size} is above the resolution, {data.resolution}: the object would not fit")
    loss = resolved(config).loss
    rate = loss.condition_drop_rate or 0.0
    if 3 * rate > 1 and loss.drop_type != "row_both":
        problems.append(
            f"condition_drop_rate {rate} is above 1/3: the three ways to drop would not fit into one; the parent's "
            "value is 0.05"
        )
    return problems


def switches(profile: str, section: str) -> dict[str, Any]:
    """What a profile says about one section: field -> value."""
    paths = {path: value for path, value in PROFILES[profile].items() if path.startswith(f"{section}.")}
    return {path.removeprefix(f"{section}."): value for path, value in paths.items()}


def resolved(config: MVConfig) -> MVConfig:
    """The same settings with every switch that was left to the profile filled in."""
    sections = {}
    for section in ("data", "model", "loss", "optim", "validation"):
        given = getattr(config, section)
        left = {k: v for k, v in switches(config.run.preset, section).items() if getattr(given, k) is None}
        sections[section] = dataclasses.replace(given, **left)
    return dataclasses.replace(config, **sections)


PARSER = Parser(
    MVConfig,
    aliases=ALIASES,
    ignored=IGNORED,
    check=check,
    resolve=resolved,
    program="train_image_variation.py",
    description="Trains a UNet that turns one image into many views, in colour and normals (Wonder3D family).",
    default_yaml="configs/training_config/train_config.yml",
    yaml_flags=("config", "config_path"),
)
