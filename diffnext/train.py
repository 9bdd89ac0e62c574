"""Training, from the command line to the exported weights; reads top to bottom."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common import checkpoint as checkpoints
from common import runtime, training
from common.checkpoint import CheckpointError
from common.data import rng_for
from common.optim import EMA, Learner, build_adamw
from common.pretrained import CONFIG_FILE, read_config
from common.video import contact_sheet
from diffnext.config import NovaConfig, NovaOptim
from diffnext.data.dataset import Records
from diffnext.engine.lr_scheduler import ConstantLR, CosineLR, MultiStepLR
from diffnext.models.parameters import freeze, parameter_groups
from diffnext.models.transformers.transformer_nova import NovaConfig as TransformerConfig
from diffnext.models.transformers.transformer_nova import NOVATransformer3DModel
from diffnext.pipelines import load_components
from diffnext.task import NovaTask, check_parts

logger = logging.getLogger(__name__)

MEMORY_KNOBS = (
    "training.batch_size (raise training.gradient_accumulation_steps to match), model.loss_repeat, or use "
    "model.gradient_checkpointing=3, training.mixed_precision=bf16, ema.params.device=cpu, cached text embeddings"
)


def schedule(optim: NovaOptim, total_steps: int) -> ConstantLR:
    """The learning rate of each optimizer step; ValueError for settings that make none."""
    common: dict[str, Any] = {
        "lr_max": optim.learning_rate,
        "lr_min": optim.lr_min,
        "max_steps": optim.schedule_steps or total_steps,
        "warmup_steps": optim.warmup_steps,
        "warmup_factor": optim.warmup_factor,
    }
    if optim.schedule_kind == "cosine":
        return CosineLR(**common, decay_step=optim.decay_step)
    if optim.schedule_kind == "multistep":
        return MultiStepLR(**common, decay_steps=optim.decay_steps, decay_gamma=optim.decay_gamma)
    return ConstantLR(**common)


def draw_samples(config: NovaConfig) -> np.ndarray:
    """The first channels of the first latents that training will see, as a contact sheet."""
    records, cells = training_data(config, transformer_config(config)), []
    for number in range(min(len(records), 8)):
        moments = records.sample(number, rng_for(config.run.seed, "augmentation", number))["moments"]
        mean = np.float32(moments[:3] if moments.ndim == 3 else moments[:3, 0])  # (3, h, w)
        low, high = mean.min(), mean.max()
        cells.append((mean - low) / max(high - low, 1e-6))
    return contact_sheet([cells])


def transformer_config(config: NovaConfig) -> TransformerConfig:
    """The network's sizes: those of transformer/config.json, and of the configuration where it gives others."""
    model = config.model
    folder = Path((model.module_dict or {}).get("transformer") or Path(str(model.pretrained_path)) / "transformer")
    stored = read_config(folder) if (folder / CONFIG_FILE).is_file() else {}
    settings = {**stored, **(model.module_config or {}).get("transformer", {})}
    if not settings:
        raise FileNotFoundError(
            f"there is no {folder / CONFIG_FILE}: pipeline.paths.pretrained_path must be a NOVA pipeline's folder, or "
            "pipeline.paths.module_config.transformer give the network's sizes"
        )
    return NOVATransformer3DModel.parse_config(settings)


def training_data(config: NovaConfig, network: TransformerConfig) -> Records:
    """The cached latents of a configuration, refused where they do not go with the network."""
    height, width = (side // network.image_stride for side in network.image_size)
    return Records(
        config.data.dataset,
        latent_channels=network.image_dim,
        latent_size=None if network.rotary_pos_embed else (height, width),
        text_token_dim=network.text_token_dim,
        text_token_len=network.text_token_len,
        needs_flow=network.video_base_size[0] > 1,
    )


def refuse_checkpoints_of_the_original(config: NovaConfig) -> None:
    """CheckpointError where the run was to go on from weights alone, which is all that the original saves."""
    output_dir, wanted = Path(str(config.run.output_dir)), config.checkpoint.resume_from_checkpoint
    if wanted == "latest":
        is_chosen = bool((config.model.module_dict or {}).get("transformer"))  # as the message says, so begin with them
        is_new = not checkpoints.listed(output_dir) and not is_chosen
        candidates = checkpoints.listed(output_dir / "checkpoints")[:1] if is_new else []
    else:
        candidates = [Path(wanted), output_dir / wanted] if wanted else []
    for found in candidates:
        weights = found / "transformer"
        if (weights / CONFIG_FILE).is_file() and not (found / checkpoints.TRAINER_STATE).exists():
            raise CheckpointError(
                f"{found} is of the original trainer: weights without optimizer and position. To begin with them, at "
                f"step 0, give pipeline.paths.module_dict.transformer={weights} and "
                "experiment.resume_from_checkpoint=latest; to leave them, another experiment.output_dir"
            )


def train(config: NovaConfig, warnings: Sequence[str] = ()) -> None:
    """Trains as `config` says; ValueError, OSError or CheckpointError before anything is written or hours are lost."""
    session = training.start(config, warnings)
    config, accelerator, stop, device = session.config, session.accelerator, session.stop, session.device

    # Data.
    refuse_checkpoints_of_the_original(config)
    network = transformer_config(config)
    records = training_data(config, network)
    records.check()

    # The pipeline: all frozen but most of the transformer. What no step needs is not loaded.
    runtime.seed_model_randomness(config.run.seed, 0)
    generates = bool(config.validation.prompts)
    components = load_components(
        str(config.model.pretrained_path),
        config.model.module_dict,
        config.model.module_config,
        text_encoder=generates or not records.has_encoded_text,
        vae=generates,
        random_transformer=config.model.from_scratch,
    )
    check_parts(config.validation, components, records.has_encoded_text)
    bare, dtype = components.transformer.train(), runtime.weight_dtype(accelerator)
    freeze(bare, config.model.kind)
    bare.enable_gradient_checkpointing(config.model.gradient_checkpointing)
    # The autoencoder of SDXL overflows in fp16.
    in_vae = torch.float32 if dtype == torch.float16 else dtype
    for frozen, own_dtype in ((components.text_encoder, dtype), (components.vae, in_vae)):
        if frozen is not None:
            frozen.requires_grad_(False).to(device, own_dtype)

    # Batches hold latents of one shape; where an earlier start left off. After the weights: this reads every record.
    course = training.course_of(session, records, records.groups(accelerator))

    # Optimizer, learning rate, moving average.
    optimizer = build_adamw(parameter_groups(bare), config.optim, device)
    transformer, optimizer = accelerator.prepare(bare, optimizer)
    ema = None
    if config.optim.ema_decay is not None:
        every, offload = config.optim.ema_update_every, config.optim.ema_device == "cpu"
        ema = EMA(bare, config.optim.ema_decay, offload, warmup=False, every=every)
    learning_rate = schedule(config.optim, course.total_steps)
    learners = {"model": Learner(transformer, optimizer, learning_rate, config.optim.max_grad_norm, ema)}

    # Resume, say what is about to happen, train.
    run = training.open_run(
        session,
        course,
        models={"transformer": bare},
        learners=learners,
        tracker_arguments={"wandb": _wandb_arguments(config)},
        memory_knobs=MEMORY_KNOBS,
    )
    task = NovaTask(config, accelerator, transformer, components, run.log, stop, dtype)
    training.run_to_end(run, task, records)


def _wandb_arguments(config: NovaConfig) -> dict[str, Any]:
    """The run's name, and the run that is gone on with."""
    named = {"name": config.log.run_name, "id": config.log.wandb_run_id}
    arguments = {key: value for key, value in named.items() if value}
    return arguments | ({"resume": "allow"} if config.log.wandb_run_id else {})
