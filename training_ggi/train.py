"""Training, from the command line to the exported weights; reads top to bottom."""

import logging
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common import loop, runtime
from common.checkpoint import TrainedWeights
from common.config import find_file, folder_or_id
from common.data import SamplePlan, SampleSource, rng_for
from common.optim import EMA, Learner, build_adamw, lr_schedule
from common.preflight import preflight
from common.replay import replay
from common.sharding import sharding_of_launcher
from common.video import contact_sheet
from training_ggi import cache
from training_ggi.config import PARSER, GGIConfig, resolved
from training_ggi.data import Scene, SceneDataset, Scenes, read_scenes
from training_ggi.front_end import FrontEnd
from training_ggi.models.base_lora import read_lora_file, set_up_training
from training_ggi.models.components import load_scheduler_config, load_text_encoder, load_tokenizer, load_vae
from training_ggi.models.edges import load_hed, load_midas
from training_ggi.models.objective import GGIConstants
from training_ggi.models.raft import load_raft
from training_ggi.models.results import export_upstream, save_result
from training_ggi.models.schedule import alphas_cumprod
from training_ggi.models.transformer import check_video_size, load_transformer, rotary_for
from training_ggi.task import GGITask, HeldOut

logger = logging.getLogger(__name__)

MEMORY_KNOBS = (
    "train_batch_size (raise gradient_accumulation to match) or rank, or use train_mode lora, gradient_checkpointing, "
    "mixed_precision bf16, cache_latents, enable_tiling, accelerate_configs/fsdp2.yaml with train_mode full"
)
SHOWN_SAMPLES, SHOWN_FRAMES = 4, 6
HED_SETTING = "hed_weights (ControlNetHED.pth is on the Hub, in lllyasviel/Annotators; cond=precomputed does without)"
BASE_LORA_SETTING = "base_lora_path (the file is on the Hub, in Eyeline-Labs/Go-with-the-Flow)"


def main(argv: Sequence[str] | None = None, *, prepare_only: bool = False) -> None:
    """Trains, or only prepares clips, as the command line says; see `--help`."""
    config, warnings = PARSER.parse_or_exit(sys.argv[1:] if argv is None else argv)
    config = resolved(config)
    with runtime.clear_errors():
        if config.run.preflight:
            accelerator = runtime.start(config.run, config.optim.gradient_accumulation_steps)
            sys.exit(0 if preflight(config, train, draw_samples, accelerator) else 1)
        train(config, warnings, prepare_only=prepare_only)


def draw_samples(config: GGIConfig) -> np.ndarray:
    """Some frames of the first clips that training will see, as a contact sheet."""
    dataset, rows = scene_dataset(config, listed_scenes(config).train), []
    for number in range(min(len(dataset), SHOWN_SAMPLES)):
        frames = dataset.sample(number, rng_for(int(config.run.seed), "augmentation", number))["frames"]
        rows.append(list(frames[np.linspace(0, len(frames) - 1, SHOWN_FRAMES).round().astype(int)]))
    return contact_sheet(rows)


def listed_scenes(config: GGIConfig) -> Scenes:
    """The scenes of the configuration's list, those held out apart."""
    data = config.data
    return read_scenes(
        find_file(data.data_root, "data_root"),
        data.dataset_file,
        data.prompt_file if data.use_captions else None,
        image_folder=data.image_folder,
        num_validation_scenes=data.num_validation_scenes,
        num_scenes=data.max_train_samples,
    )


def scene_dataset(config: GGIConfig, scenes: Sequence[Scene]) -> SceneDataset:
    """Clips of scenes."""
    data = config.data
    return SceneDataset(
        scenes,
        num_frames=data.num_frames,
        frame_intervals=data.frame_intervals,
        random_start=data.random_start,
        height_px=data.height,
        width_px=data.width,
        edge_folder=data.edge_folder if data.cond == "precomputed" else None,
    )


def load_front_end(config: GGIConfig, device: torch.device, dtype: torch.dtype) -> FrontEnd:
    """The frozen networks on the device: VAE and text encoder in the run's precision, the others in float32."""
    model, data = config.model, config.data
    base = folder_or_id(model.pretrained_model_name_or_path)
    hub = {"revision": model.revision, "variant": model.variant, "cache_dir": model.cache_dir}
    # The files that people place themselves first: none should be missed after minutes of loading.
    hed = None if data.cond == "precomputed" else load_hed(find_file(model.hed_weights, HED_SETTING)).to(device)
    raft = load_raft(model.raft_weights and find_file(model.raft_weights, "raft_weights"))
    vae = load_vae(base, **hub, tiling=model.enable_tiling, slicing=model.enable_slicing)
    return FrontEnd(
        vae=vae.to(device, dtype),
        tokenizer=load_tokenizer(base, model.revision, model.cache_dir),
        text_encoder=load_text_encoder(base, **hub).to(device, dtype),
        raft=raft.to(device),
        hed=hed,
        midas=load_midas(folder_or_id(model.midas_path)).to(device) if data.cond == "depth_hed" else None,
        data=data,
    )


def write_result(config: GGIConfig, transformer: Any, directory: Path) -> None:
    """The LoRA and the input projection; with train_mode full the original's `transformer/`."""
    if config.model.train_mode == "full":
        export_upstream(transformer, directory / "transformer")
    else:
        save_result(transformer, directory, config.model.train_mode)


def require_launcher(deepspeed: Any, train_mode: str) -> None:
    """ValueError where `accelerate launch` was told to spread weights that every process needs whole.

    Args:
        deepspeed: Accelerate's plugin, or None.
    """
    if sharding_of_launcher() and train_mode != "full":
        raise ValueError(
            f"FSDP spreads what is trained, and train_mode {train_mode} keeps most weights frozen on every GPU: "
            "launch it with default.yaml, or set train_mode to full"
        )
    if deepspeed is not None and deepspeed.zero_stage == 3:
        raise ValueError(
            "launcher settings: zero_stage 3 spreads the frozen networks too, which are read whole here: set it to 2, "
            "or launch train_mode full with accelerate_configs/fsdp2.yaml"
        )


def train(config: GGIConfig, warnings: Sequence[str] = (), *, prepare_only: bool = False) -> None:
    """Trains as `config` says; ValueError, OSError or CheckpointError before anything is written or hours are lost."""
    if prepare_only and not config.data.cache_latents:
        raise ValueError("cache_latents is required to prepare clips: the folder for them; set cuts_per_scene with it")
    config = loop.aside_if_replaying(config)
    accelerator = runtime.start(config.run, config.optim.gradient_accumulation_steps)
    stop = runtime.stop_signal(accelerator, config.run)
    for warning in warnings if accelerator.is_main_process else ():
        logger.warning("%s", warning)
    output_dir, device, model = Path(config.run.output_dir), accelerator.device, config.model
    require_launcher(accelerator.state.deepspeed_plugin, model.train_mode)
    dtype = runtime.weight_dtype(accelerator)

    # Data: who is held out, and in what order the rest is seen.
    scenes = listed_scenes(config)
    training_set = scene_dataset(config, scenes.train)
    global_batch = loop.batch_of(accelerator, config)
    loop.require_enough_items(len(training_set), config.data.batch_size, accelerator.num_processes)
    plan = SamplePlan(len(training_set), int(config.run.seed), global_batch)

    # The run folder, and where it was left off.
    runtime.require_shared_folder(accelerator, output_dir)
    fingerprint = training_set.fingerprint()
    resume_point = loop.find_resume_point(accelerator, config, output_dir, fingerprint)

    # The base model: sizes and LoRA are checked before the other networks are loaded.
    base = folder_or_id(model.pretrained_model_name_or_path)
    bare = load_transformer(
        base,
        torch_dtype=torch.float32 if model.train_mode == "full" else dtype,
        ignore_learned_positional_embeddings=model.ignore_learned_positional_embeddings,
        revision=model.revision,
        variant=model.variant,
        cache_dir=model.cache_dir,
    )
    num_latent_frames, latent_height, latent_width = check_video_size(
        bare, config.data.max_num_frames, config.data.height, config.data.width
    )
    latent_shape = (num_latent_frames, bare.config.out_channels, latent_height, latent_width)
    base_lora = read_lora_file(find_file(model.base_lora_path, BASE_LORA_SETTING), bare)
    front_end = load_front_end(config, device, dtype)
    source: SampleSource = training_set
    if config.data.cuts_per_scene:
        source = cache.FixedCuts(training_set, config.data.cuts_per_scene)
        if config.data.cache_latents:
            source = cache.build(source, front_end, config, num_latent_frames, accelerator, stop)
    if prepare_only:
        logger.info("clips of %d scenes are prepared in %s", len(training_set), config.data.cache_latents)
        return

    # What validation asks of the text encoder; it stays only where training asks for more.
    empty_prompt_embeds = front_end.embed([""])  # (1, tokens, D)
    held_out = None
    if scenes.validation:
        prompts = [scene.prompt for scene in scenes.validation]
        held_out = HeldOut(scene_dataset(config, scenes.validation), [front_end.embed([p])[0].cpu() for p in prompts])
    if config.data.cache_latents:
        front_end.text_encoder = None

    # What is trained.
    runtime.seed_model_randomness(int(config.run.seed), 0)
    bare.to(device)
    set_up_training(bare, model.train_mode, base_lora, rank=model.rank, alpha=model.lora_alpha)
    bare.train()
    if model.gradient_checkpointing:
        bare.enable_gradient_checkpointing()
    saved = bare if model.train_mode == "full" else TrainedWeights(bare)
    scheduler_config = load_scheduler_config(base, model.revision, model.cache_dir)
    constants = GGIConstants(
        alphas_cumprod(scheduler_config),
        rotary_for(bare, torch.empty(1, *latent_shape, device=device)),
        front_end.vae.config.scaling_factor,
        config.loss.noised_image_dropout,
        config.loss.caption_dropout,
    )

    # Optimizer, learning rate, moving average.
    optimizer = build_adamw([p for p in bare.parameters() if p.requires_grad], config.optim, device)
    transformer, optimizer = accelerator.prepare(bare, optimizer)
    total_steps = loop.total_steps(config.run, len(training_set), global_batch)
    learning_rate = lr_schedule(config.optim, total_steps, global_batch)
    ema = EMA(saved, config.optim.ema_decay, config.optim.offload_ema) if config.optim.use_ema else None
    learners = {"model": Learner(transformer, optimizer, learning_rate, config.optim.max_grad_norm, ema)}

    # Resume, say what is about to happen, train.
    run = loop.open_run(
        accelerator,
        config,
        stop,
        models={"transformer": saved},
        learners=learners,
        num_items=len(training_set),
        fingerprint=fingerprint,
        resume_point=resume_point,
        memory_knobs=MEMORY_KNOBS,
    )
    task = GGITask(
        config,
        accelerator,
        front_end,
        transformer,
        bare,
        constants,
        latent_shape,
        empty_prompt_embeds,
        held_out,
        scheduler_config,
        run.log,
        stop,
        write_result=partial(write_result, config, bare),
    )
    loader = loop.open_loader(run, source, plan)
    if config.run.replay:
        replay(run, task, loader, Path(config.run.replay))
    else:
        loop.fit(run, task, loader, learners)
    run.end()
