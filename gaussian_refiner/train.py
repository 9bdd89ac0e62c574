"""Training, from the command line to the exported weights; reads top to bottom."""

import logging
from collections.abc import Sequence
from functools import partial

import numpy as np

from common import runtime, training
from common.config import find_file, folder_or_id
from common.data import rng_for
from common.metrics import lpips_for_all
from common.optim import EMA, Learner, build_adamw, lr_schedule
from common.video import contact_sheet
from gaussian_refiner import cache
from gaussian_refiner.config import RefinerConfig
from gaussian_refiner.data import Pair, Pairs, RefinerDataset, read_pairs
from gaussian_refiner.models.components import PARITY_PROMPTS, embed_text, load_components
from gaussian_refiner.models.self_mutual_attention import install_self_mutual_attention
from gaussian_refiner.task import SHEET_ROWS, RefinerTask

logger = logging.getLogger(__name__)

MEMORY_KNOBS = (
    "train_batch_size (raise gradient_accumulation_steps to match), or use --gradient_checkpointing, "
    "--mixed_precision bf16, --use_8bit_adam, --cache_latents, --offload_ema"
)


def draw_samples(config: RefinerConfig) -> np.ndarray:
    """A contact sheet of the first samples that training will see."""
    dataset = training_data(config, listed_pairs(config).train)
    rows = []
    for number in range(min(len(dataset), SHEET_ROWS)):
        sample = dataset.sample(number, rng_for(config.run.seed, "augmentation", number))
        rows.append([sample[key] / 2 + 0.5 for key in ("render", "gt", "prompt_img")])
    return contact_sheet(rows, ["render", "gt", "cond"])


def listed_pairs(config: RefinerConfig) -> Pairs:
    """The items of the configuration's list, those held out apart."""
    path = find_file(config.data.data_json, "--data_json")
    return read_pairs(path, config.data.data_root, config.data.holdout_items)


def training_data(config: RefinerConfig, pairs: Sequence[Pair]) -> RefinerDataset:
    """The training windows of a configuration."""
    return RefinerDataset(
        pairs[: config.data.max_train_samples],
        random_flip=config.data.random_flip,
        height_px=config.data.height_px,
        windows_per_item=config.data.windows_per_item,
    )


def train(config: RefinerConfig, warnings: Sequence[str] = ()) -> None:
    """Trains as `config` says; ValueError, OSError or CheckpointError before anything is written or hours are lost."""
    session = training.start(config, warnings)
    config, accelerator, stop, device = session.config, session.accelerator, session.stop, session.device

    # Data: who is held out, in what order the rest is seen, and where an earlier start left off.
    pairs = listed_pairs(config)
    training_set = training_data(config, pairs.train)
    held_out = RefinerDataset(pairs.validation, height_px=config.data.height_px)
    groups = [training_set.bucket_of(index) for index in range(len(training_set))]
    course = training.course_of(session, training_set, groups)

    # The checkpoint: all frozen but the UNet, which gets 8 input channels and self-mutual attention.
    load = partial(
        load_components,
        folder_or_id(str(config.model.pretrained_model_name_or_path)),
        revision=config.model.revision,
        unet_revision=config.model.non_ema_revision,
        variant=config.model.variant,
        cache_dir=config.model.cache_dir,
    )
    components = load()
    if config.loss.prediction_type:
        components.prediction_type = config.loss.prediction_type
    null_text = embed_text(components, [""]).to(device)  # (1, 77, C)
    parity_text = embed_text(components, PARITY_PROMPTS).to(device)  # (2, 77, C)
    del components.text_encoder  # all texts are embedded, and the export loads it again
    for frozen in (components.vae, components.image_encoder):
        frozen.requires_grad_(False).to(device, runtime.weight_dtype(accelerator))
    bare_unet = components.unet.train()
    cond_cache = install_self_mutual_attention(bare_unet)
    if config.model.gradient_checkpointing:
        bare_unet.enable_gradient_checkpointing()

    source = training_set
    if config.data.cache_latents:
        source = cache.build(training_set, components, config.data.cache_latents, accelerator, stop)

    # Optimizer, learning rate, moving average.
    optimizer = build_adamw(bare_unet.parameters(), config.optim, device)
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
        memory_knobs=MEMORY_KNOBS,
    )
    task = RefinerTask(
        config,
        accelerator,
        components,
        unet,
        cond_cache,
        null_text,
        parity_text,
        held_out,
        run.log,
        stop,
        reload_components=load,
        lpips=lpips_for_all("alex", config.validation.lpips_weights, accelerator),
    )
    training.run_to_end(run, task, source)
