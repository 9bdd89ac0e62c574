"""Training, from the command line to the exported pipeline; reads top to bottom."""

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import nn

from common import runtime, training
from common.checkpoint import TRAINER_STATE, read_state
from common.config import find_file, folder_or_id
from common.data import BAD_SAMPLE_ERRORS, SampleSource, rng_for
from common.metrics import lpips_for_all
from common.optim import EMA, Learner, build_adamw, lr_schedule
from common.pretrained import read_json
from common.video import IMAGE_SUFFIXES, contact_sheet, find_files
from mvdiffusion import cache
from mvdiffusion.config import MVConfig, MVData
from mvdiffusion.data.mvds import Layout, MultiViewDataset, Objects, RandomViews, WithoutRawImages, find_objects
from mvdiffusion.data.preparation import ClipTransform
from mvdiffusion.media import GREY_LEVELS, prepare_photo, read_photo
from mvdiffusion.models.components import load_feature_extractor, load_image_encoder, load_scheduler, load_vae
from mvdiffusion.models.initialise import ConvInInit, load_unet, trainable_parameters
from mvdiffusion.pipelines import camera_table, fixed_cameras, pipeline_index
from mvdiffusion.task import Frozen, MVTask
from mvdiffusion.views import FIXED_VIEWS, choose_views

logger = logging.getLogger(__name__)

MEMORY_KNOBS = (
    "train_batch_size (raise gradient_accumulation_steps to match) or num_views, or use gradient_checkpointing, "
    "mixed_precision bf16, use_8bit_adam, offload_ema, cache_latents, trainable_modules"
)
SHOWN_SAMPLES = 8
LABEL_WIDTH = 10  # of the data sets' class labels: camera and domain
SAME_ANGLE_RAD = 5e-3  # released angles are in half precision
UNET_FLAGS = ("cd_attention_mid", "cd_attention_last", "multiview_attention", "sparse_mv_attention")


def draw_samples(config: MVConfig) -> np.ndarray:
    """A contact sheet of the first training objects, each as one of its samples."""
    dataset, rows = training_data(config, ClipTransform(), listed_objects(config.data)), []
    for number in range(min(len(dataset), SHOWN_SAMPLES)):
        sample = dataset.sample(number, rng_for(config.run.seed, "augmentation", number))
        views = [sample["image_cond"], *sample["image_target"], *sample["normal_target"]]  # (3, R, R) each
        rows.append([view.transpose(1, 2, 0) for view in views])
    names = view_names(config.data)
    return contact_sheet(rows, ["condition", *names, *(f"{name} normals" for name in names)])


def view_names(data: MVData) -> tuple[str, ...]:
    """The views of an object in the order of its rows; ValueError for a list that cannot be."""
    return choose_views(data.num_views, data.views or None, data.poses)


def listed_objects(data: MVData) -> Objects:
    """The objects of the configuration's folder, those held out apart; none with `debug`."""
    if data.debug:
        return Objects((), ())
    return find_objects(
        find_file(str(data.train_data_dir), "train_data_dir"),
        Layout(data.subscene_tag, data.suffix, data.read_mask),
        views=view_names(data),
        rendered_poses=data.poses == "rendered",
        object_list=data.object_list and find_file(data.object_list, "object_list"),
        invalid_list=data.invalid_list and find_file(data.invalid_list, "invalid_list"),
        num_validation_samples=data.num_validation_samples,
        num_samples=data.max_train_samples,
    )


def training_data(config: MVConfig, clip: ClipTransform, objects: Objects) -> MultiViewDataset | RandomViews:
    """The training objects of a configuration."""
    data = config.data
    if data.debug:
        return RandomViews(data.num_views, data.resolution, clip=clip)
    return MultiViewDataset(
        objects.train,
        views=view_names(data),
        resolution_px=data.resolution,
        poses=data.poses,
        background=data.background,
        augment_data=data.augment_data,
        random_flip=data.random_flip,
        clip=clip,
    )


def load_frozen(config: MVConfig) -> Frozen:
    """The frozen parts, each from its own path or from the common one, in float32 on the CPU."""
    model = config.model

    def load(name: str, function: Callable[..., Any]) -> Any:
        path = getattr(model, f"pretrained_path_{name}") or model.pretrained_model_name_or_path
        return function(folder_or_id(str(path)), name, model.revision, model.cache_dir)

    return Frozen(
        vae=load("vae", load_vae),
        image_encoder=load("image_encoder", load_image_encoder),
        feature_extractor=load("feature_extractor", load_feature_extractor),
        scheduler=load("scheduler", load_scheduler),
    )


def validation_background(data: MVData) -> str:
    """That of training where it is one that normal maps can be told from, else white."""
    return str(data.background) if data.background in GREY_LEVELS else "white"


def read_photographs(config: MVConfig) -> dict[str, Image.Image]:
    """The photographs of `validation_dir`, prepared, by name; one that cannot be used is left out with a warning."""
    photographs: dict[str, Image.Image] = {}
    if not config.validation.validation_dir:
        return photographs
    for path in find_files(find_file(config.validation.validation_dir, "validation_dir"), IMAGE_SUFFIXES):
        if path.stem in photographs:
            logger.warning("%s is not sampled in validation: another one is named %s too", path, path.stem)
            continue
        try:
            photo = read_photo(path)
            photographs[path.stem] = prepare_photo(
                photo, config.data.resolution, config.validation.crop_size, validation_background(config.data)
            )
        except BAD_SAMPLE_ERRORS as error:
            logger.warning("%s is not sampled in validation: %s", path, error)
    return photographs


def view_cameras(config: MVConfig, training_set: MultiViewDataset | RandomViews) -> list[Any]:
    """Cameras of the views of photographs, which the exported pipeline keeps too."""
    views, poses = view_names(config.data), config.data.poses
    if poses != "rendered" or isinstance(training_set, RandomViews):
        return fixed_cameras(views, "upright" if poses == "rendered" else poses)
    return camera_table(views, training_set.poses_of(0), views.index("front"))


def unet_settings(config: MVConfig) -> dict[str, Any]:
    """Settings of the UNet that replace those of the weights' own: of the JSON file, then of the flags."""
    settings: dict[str, Any] = {"cd_attention_mid": True}
    if config.model.pretrained_config_path_unet:
        settings |= read_json(find_file(config.model.pretrained_config_path_unet, "pretrained_config_path_unet"))
    if config.loss.pred_type == "mix":
        settings |= {"cd_attention_mid": False, "cd_attention_last": False}
    settings |= {name: getattr(config.model, name) for name in UNET_FLAGS if getattr(config.model, name) is not None}
    if config.loss.pred_type == "mix" and (settings["cd_attention_mid"] or settings["cd_attention_last"]):
        raise ValueError(
            "pred_type mix trains one domain at a time, and cross-domain layers need both: leave cd_attention_mid and "
            "cd_attention_last out, or set pred_type to joint"
        )
    return settings


def conv_in_init(config: MVConfig) -> ConvInInit:
    """How `conv_in` begins on 2-D weights; the original draws all of it, its parent at most the condition's part."""
    if config.model.zero_init_conv_in:
        return "copy_zero"
    return "random" if config.run.preset == "gnn3d" else "copy_random"


def require_trained(new: Sequence[str], trained: Mapping[str, nn.Parameter]) -> None:
    """ValueError if weights that no checkpoint held would stay as they were made."""
    left = [name for name in new if name not in trained]
    if left:
        raise ValueError(
            f"{len(left)} tensors are new and trainable_modules does not name them ({', '.join(left[:3])}, ...): set "
            "pretrained_unet_path to weights that hold them, as stage 1 exports, or train them too"
        )


def require_label_input(config: Any) -> None:
    """ValueError for a UNet (by its config) that does not take the labels of the data sets."""
    width = config.projection_class_embeddings_input_dim if config.class_embed_type else 0
    if width != LABEL_WIDTH:
        raise ValueError(
            f"the UNet takes class labels of {width} numbers, and training gives it {LABEL_WIDTH}, of camera and "
            f"domain: set projection_class_embeddings_input_dim to {LABEL_WIDTH} in pretrained_config_path_unet, or "
            "take weights that were trained with such labels"
        )


def cameras_of_weights(source: str, names: Sequence[str], hub: Mapping[str, Any]) -> list[Any]:
    """[name, elevation, azimuth] of views that multi-view weights were trained with, as far as is known.

    A run's checkpoint says it, and so does an export; other pipelines, and a UNet alone, are taken to be released ones,
    whose poses are tilted.

    Args:
        source: what the UNet was loaded from: a folder, its `unet`, or a hub id.
        names: views of which the angles are wanted, where the source names none.
        hub: revision and cache_dir.
    """
    names = [name for name in names if name in FIXED_VIEWS]
    index: dict[str, Any] = {}
    for root in (source, str(Path(source).parent)) if Path(source).is_dir() else (source,):
        if (Path(root) / TRAINER_STATE).is_file():
            poses = read_state(Path(root))["config"]["data"]["poses"]
            return [] if poses == "rendered" else fixed_cameras(names, poses)
        with suppress(OSError):  # a hub id may hold a UNet alone
            index = index or pipeline_index(root, hub)
    return index.get("cameras") or fixed_cameras(names, "tilted")


def warn_of_other_cameras(source: str, known: Sequence[Any], cameras: Sequence[Any], poses: str) -> None:
    """Says so if views have other angles than the weights were trained with; both as of `pipelines.camera_table`."""
    angles = {name: pair for name, *pair in known}
    for name, *pair in cameras:
        if not np.allclose(pair, angles.get(name, pair), rtol=0, atol=SAME_ANGLE_RAD):
            logger.warning(
                "the weights in %s know other cameras than poses %s gives: of %s they know elevation %.3f and azimuth "
                "%.3f rad, and are now told %.3f and %.3f; set poses to what they were trained with (released ones: "
                "tilted), or let them learn the new angles",
                *(source, poses, name, *angles[name], *pair),
            )
            return


def load_trained_unet(
    config: MVConfig, latent_size: int, cameras: Sequence[Any]
) -> tuple[Any, dict[str, nn.Parameter]]:
    """The UNet in training mode, and by name what the stage trains of it.

    Warns where the weights know other `cameras`. ValueError as in `require_label_input` and `require_trained`.
    """
    model = config.model
    source = folder_or_id(str(model.pretrained_unet_path or model.pretrained_model_name_or_path))
    runtime.seed_model_randomness(config.run.seed, 0)
    unet, report = load_unet(
        source,
        unet_config=unet_settings(config) | {"sample_size": latent_size},
        num_views=config.data.num_views,
        conv_in_init=conv_in_init(config),
        zero_init_joint_bias=bool(model.zero_init_joint_bias),
        revision=model.revision,
        cache_dir=model.cache_dir,
    )
    logger.info("UNet: %s", report)
    require_label_input(unet.config)
    if "class_embedding.linear_1.weight" in report.copied and not config.data.debug:
        hub = {"revision": model.revision, "cache_dir": model.cache_dir}
        known = cameras_of_weights(source, [name for name, *_ in cameras], hub)
        warn_of_other_cameras(source, known, cameras, config.data.poses)
    trained = trainable_parameters(unet, model.trainable_modules or None)
    require_trained([*report.new, *report.widened], trained)
    if model.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    return unet.train(), trained


def parameter_groups(parameters: Mapping[str, nn.Parameter], camera_embedding_lr_mult: float) -> list[dict[str, Any]]:
    """The class embedding, which starts at random, may learn faster than the rest."""
    camera = [p for name, p in parameters.items() if "class_embedding" in name]
    others = [p for name, p in parameters.items() if "class_embedding" not in name]
    groups = [{"params": others}, {"params": camera, "lr_scale": camera_embedding_lr_mult}]
    return [group for group in groups if group["params"]]


def train(config: MVConfig, warnings: Sequence[str] = ()) -> None:
    """Trains as `config` says; ValueError, OSError or CheckpointError before anything is written or hours are lost."""
    session = training.start(config, warnings)
    config, accelerator, stop, device = session.config, session.accelerator, session.stop, session.device

    # Data: who is held out, in what order the rest is seen, and where an earlier start left off.
    load = partial(load_frozen, config)
    frozen = load()
    clip = replace(ClipTransform.of(frozen.feature_extractor), resize=config.data.clip_resize)
    objects = listed_objects(config.data)
    training_set = training_data(config, clip, objects)
    held_out = None
    if objects.validation and isinstance(training_set, MultiViewDataset):
        held_out = training_set.held_out(objects.validation, validation_background(config.data))
    photographs = read_photographs(config)
    course = training.course_of(session, training_set)

    # Frozen parts in the run's precision; of the UNet, what the stage trains.
    for module in (frozen.vae, frozen.image_encoder):
        module.to(device, runtime.weight_dtype(accelerator))
    cameras = view_cameras(config, training_set)
    bare_unet, trained = load_trained_unet(config, frozen.latent_shape(config.data.resolution)[-1], cameras)
    num_views, num_domains = config.data.num_views, 2 if config.loss.pred_type == "joint" else 1
    logger.info(
        "real batch per process and micro-batch: num_views %d x %d domains x train_batch_size %d = %d rows",
        *(num_views, num_domains, config.data.batch_size, num_views * num_domains * config.data.batch_size),
    )

    source: SampleSource = WithoutRawImages(training_set)
    if config.data.cache_latents and isinstance(training_set, MultiViewDataset):
        source = cache.build(training_set, frozen, config.data.cache_latents, accelerator, stop)

    # Optimizer, learning rate, moving average.
    groups = parameter_groups(trained, float(config.optim.camera_embedding_lr_mult or 1))
    optimizer = build_adamw(groups, config.optim, device)
    unet, optimizer = accelerator.prepare(bare_unet, optimizer)
    learning_rate = lr_schedule(config.optim, course.total_steps, course.plan.global_batch)
    ema = EMA(bare_unet, config.optim.ema_decay, config.optim.offload_ema) if config.optim.use_ema else None
    learners = {"model": Learner(unet, optimizer, learning_rate, config.optim.max_grad_norm, ema)}

    # Resume, say what is about to happen, train.
    run = training.open_run(
        session,
        course,
        models={"unet": bare_unet},
        learners=learners,
        tracker_arguments={"wandb": {k: v for k, v in (config.log.wandb_args or {}).items() if v is not None}},
        memory_knobs=MEMORY_KNOBS,
    )
    task = MVTask(
        config,
        accelerator,
        frozen,
        unet,
        bare_unet,
        cameras,
        held_out,
        photographs,
        run.log,
        stop,
        reload_frozen=load,
        lpips=lpips_for_all("alex", config.validation.lpips_weights, accelerator),
    )
    training.run_to_end(run, task, source)
