"""Training, from the command line to the exported weights; reads top to bottom."""

import logging
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np

from common import loop, runtime
from common.config import find_file, folder_or_id
from common.data import SamplePlan, rng_for
from common.metrics import lpips_for_all
from common.optim import EMA, Learner, build_adamw, lr_schedule
from common.preflight import preflight
from common.replay import replay
from common.video import contact_sheet
from gaussian_refiner import cache
from gaussian_refiner.config import PARSER, RefinerConfig
from gaussian_refiner.data import Pair, Pairs, RefinerDataset, read_pairs
from gaussian_refiner.models.components import PARITY_PROMPTS, embed_text, load_components
from gaussian_refiner.models.self_mutual_attention import install_self_mutual_attention
from gaussian_refiner.task import SHEET_ROWS, RefinerTask

logger = logging.getLogger(__name__)

MEMORY_KNOBS = (
    "train_batch_size (raise gradient_accumulation_steps to match), or use --gradient_checkpointing, "
    "--mixed_precision bf16, --use_8bit_adam, --cache_latents, --offload_ema"
)


def main(argv: Sequence[str] | None = None) -> None:
    """Trains as the command line says; see `--help`."""
    config, warnings = PARSER.parse_or_exit(sys.argv[1:] if argv is None else argv)
    with runtime.clear_errors():
        if config.run.preflight:
            accelerator = runtime.start(config.run, config.optim.gradient_accumulation_steps)
            sys.exit(0 if preflight(config, train, draw_samples, accelerator) else 1)
        train(config, warnings)


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
    config = loop.aside_if_replaying(config)
    accelerator = runtime.start(config.run, config.optim.gradient_accumulation_steps)
    stop = runtime.stop_signal(accelerator, config.run)
    for warning in warnings if accelerator.is_main_process else ():
        logger.warning("%s", warning)
    output_dir, device = Path(config.run.output_dir), accelerator.device

    # Data: who is held out, and in what order the rest is seen.
    pairs = listed_pairs(config)
    training_set = training_data(config, pairs.train)
    held_out = RefinerDataset(pairs.validation, height_px=config.data.height_px)
    global_batch = loop.batch_of(accelerator, config)
    loop.require_enough_items(len(training_set), config.data.batch_size, accelerator.num_processes)
    groups = [training_set.bucket_of(index) for index in range(len(training_set))]
    plan = SamplePlan(len(training_set), config.run.seed, global_batch, groups)

    # The run folder, and where it was left off.
    runtime.require_shared_folder(accelerator, output_dir)
    fingerprint = training_set.fingerprint()
    resume_point = loop.find_resume_point(accelerator, config, output_dir, fingerprint)

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
    total_steps = loop.total_steps(config.run, len(training_set), global_batch)
    learning_rate = lr_schedule(config.optim, total_steps, global_batch)
    ema = EMA(bare_unet, config.optim.ema_decay, config.optim.offload_ema) if config.optim.use_ema else None
    learners = {"model": Learner(unet, optimizer, learning_rate, config.optim.max_grad_norm, ema)}

    # Resume, say what is about to happen, train.
    run = loop.open_run(
        accelerator,
        config,
        stop,
        models={"unet": bare_unet},
        learners=learners,
        num_items=len(training_set),
        fingerprint=fingerprint,
        resume_point=resume_point,
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
    loader = loop.open_loader(run, source, plan)
    if config.run.replay:
        replay(run, task, loader, Path(config.run.replay))
    else:
        loop.fit(run, task, loader, learners)
    run.end()
