"""Training, from the command line to the exported weights; reads top to bottom."""

import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common import runtime, training
from common.checkpoint import MANIFEST, TRAINER_STATE, CheckpointError, TrainedWeights, listed
from common.config import find_file, folder_or_id
from common.data import BAD_SAMPLE_ERRORS, SampleSource, rng_for
from common.optim import EMA, Learner, build_adamw, lr_schedule
from common.sharding import sharding_of_launcher
from common.video import contact_sheet
from training_ggi import cache
from training_ggi.config import HED_WEIGHTS, GGIConfig, GGIOptim
from training_ggi.data import Scene, SceneDataset, Scenes, read_scenes
from training_ggi.front_end import FrontEnd
from training_ggi.models.base_lora import LoraFile, read_lora_file, set_up_training
from training_ggi.models.components import load_scheduler_config, load_text_encoder, load_tokenizer, load_vae
from training_ggi.models.edges import fetch_hed, load_hed, load_midas
from training_ggi.models.objective import GGIConstants
from training_ggi.models.raft import fetch_raft, load_raft
from training_ggi.models.results import export_upstream, save_result
from training_ggi.models.schedule import alphas_cumprod
from training_ggi.models.transformer import blank_transformer, check_video_size, load_transformer, rotary_for
from training_ggi.task import GGITask, HeldOut

logger = logging.getLogger(__name__)

MEMORY_KNOBS = (
    "train_batch_size (raise gradient_accumulation to match) or rank, or use train_mode lora, gradient_checkpointing, "
    "mixed_precision bf16, cache_latents, enable_tiling, accelerate_configs/fsdp2.yaml with train_mode full"
)
SHOWN_SAMPLES, SHOWN_FRAMES = 4, 6
ADAM_SETTINGS = ("lr", "betas", "eps", "weight_decay", "fused")
HED_SETTING = "hed_weights (ControlNetHED.pth is on the Hub, in lllyasviel/Annotators; cond=precomputed does without)"
BASE_LORA_SETTING = "base_lora_path (the file is on the Hub, in Eyeline-Labs/Go-with-the-Flow)"


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


def held_out_clips(
    config: GGIConfig, scenes: Sequence[Scene], front_end: FrontEnd, is_main: bool = True
) -> HeldOut | None:
    """What validation looks at, with its prompts encoded; None without scenes. Those too short are named now."""
    if not scenes:
        return None
    dataset = scene_dataset(config, scenes)
    for index in range(len(scenes) if is_main else 0):
        try:
            dataset.cuts(index, 1)
        except BAD_SAMPLE_ERRORS as error:
            logger.warning("held-out scene %d will not be validated: %s", index, error)
    return HeldOut(dataset, [front_end.embed([scene.prompt])[0].cpu() for scene in scenes])


def find_networks(config: GGIConfig) -> tuple[Path, Path | None]:
    """The weights of RAFT and of HED, downloaded where none are named and none are there; no HED for edges from files.

    Raises:
        FileNotFoundError: they are neither there nor to be downloaded.
    """
    model = config.model
    raft = find_file(model.raft_weights, "raft_weights") if model.raft_weights else fetch_raft()
    if config.data.cond == "precomputed":
        return raft, None
    try:
        return raft, find_file(model.hed_weights, HED_SETTING)
    except FileNotFoundError:
        if model.hed_weights != HED_WEIGHTS:
            raise
        return raft, fetch_hed(model.cache_dir)


def check_base(config: GGIConfig) -> tuple[LoraFile, tuple[int, int, int, int]]:
    """The base LoRA, and the latents' shape (F', C, h, w) of a clip, if both fit the base model.

    Of that, `config.json` alone is read; errors as of `load_transformer`, `check_video_size` and `read_lora_file`.
    """
    model, data = config.model, config.data
    blank = blank_transformer(
        folder_or_id(model.pretrained_model_name_or_path),
        ignore_learned_positional_embeddings=model.ignore_learned_positional_embeddings,
        revision=model.revision,
        cache_dir=model.cache_dir,
    )
    num_frames, height, width = check_video_size(blank, data.max_num_frames, data.height, data.width)
    base_lora = read_lora_file(find_file(model.base_lora_path, BASE_LORA_SETTING), blank)
    return base_lora, (num_frames, blank.config.out_channels, height, width)


def load_base(config: GGIConfig, dtype: torch.dtype) -> Any:
    """The base transformer on the CPU, in float32 where all of it is trained."""
    model = config.model
    return load_transformer(
        folder_or_id(model.pretrained_model_name_or_path),
        torch_dtype=torch.float32 if model.train_mode == "full" else dtype,
        ignore_learned_positional_embeddings=model.ignore_learned_positional_embeddings,
        revision=model.revision,
        variant=model.variant,
        cache_dir=model.cache_dir,
    )


def load_front_end(
    config: GGIConfig, raft: Path, hed: Path | None, device: torch.device, dtype: torch.dtype
) -> FrontEnd:
    """The frozen networks on the device: VAE and text encoder in the run's precision, the others in float32.

    Args:
        raft, hed: see `find_networks`.
    """
    model, data = config.model, config.data
    base = folder_or_id(model.pretrained_model_name_or_path)
    hub = {"revision": model.revision, "variant": model.variant, "cache_dir": model.cache_dir}
    vae = load_vae(base, **hub, tiling=model.enable_tiling, slicing=model.enable_slicing)
    return FrontEnd(
        vae=vae.to(device, dtype),
        tokenizer=load_tokenizer(base, model.revision, model.cache_dir),
        text_encoder=load_text_encoder(base, **hub, dtype=dtype).to(device),
        raft=load_raft(raft).to(device),
        hed=load_hed(hed).to(device) if hed else None,
        midas=load_midas(folder_or_id(model.midas_path)).to(device) if data.cond == "depth_hed" else None,
        data=data,
    )


def write_result(config: GGIConfig, transformer: Any, directory: Path) -> None:
    """The LoRA and the input projection; with train_mode full the original's `transformer/`."""
    if config.model.train_mode == "full":
        export_upstream(transformer, directory / "transformer")
    else:
        save_result(transformer, directory, config.model.train_mode)


def build_optimizer(parameters: Sequence[Any], optim: GGIOptim, device: torch.device) -> torch.optim.Optimizer:
    """AdamW, or Adam with the same settings, whose weight decay is a part of the gradient."""
    optimizer = build_adamw(parameters, optim, device)
    if optim.optimizer == "adamw":
        return optimizer
    return torch.optim.Adam(parameters, **{key: optimizer.defaults[key] for key in ADAM_SETTINGS})


def refuse_originals(config: GGIConfig) -> None:
    """CheckpointError where there is nothing to go on from but a checkpoint of the original trainer."""
    wanted, output_dir = config.checkpoint.resume_from_checkpoint, Path(config.run.output_dir)
    found = listed(output_dir) if wanted == "latest" else [Path(wanted), output_dir / wanted] if wanted else []
    ours = [path for path in found if (path / MANIFEST).is_file() or (path / TRAINER_STATE).is_file()]
    originals = [path for path in found if (path / "transformer" / "config.json").is_file()]
    if originals and not ours:
        raise CheckpointError(
            f"{originals[0]} was written by the original trainer and cannot be resumed: weights and optimizer are in "
            "half precision, and it says nothing of settings and data. infer.py takes its weights (--model); to train, "
            "name another --output_dir"
        )


def require_launcher(train_mode: str) -> None:
    """ValueError where `accelerate launch` was told to spread weights that every process needs whole."""
    if sharding_of_launcher() and train_mode != "full":
        raise ValueError(
            f"FSDP spreads what is trained, and train_mode {train_mode} keeps most weights frozen on every GPU: "
            "launch it with default.yaml, or set train_mode to full"
        )


def train(config: GGIConfig, warnings: Sequence[str] = (), *, prepare_only: bool = False) -> None:
    """Trains as `config` says; ValueError, OSError or CheckpointError before anything is written or hours are lost."""
    if prepare_only and not config.data.cache_latents:
        raise ValueError("cache_latents is required to prepare clips: the folder for them; set cuts_per_scene with it")
    session = training.start(config, warnings)
    config, accelerator, stop, device = session.config, session.accelerator, session.stop, session.device
    model = config.model
    require_launcher(model.train_mode)
    refuse_originals(config)
    dtype = runtime.weight_dtype(accelerator)

    # Data: who is held out, in what order the rest is seen, and where an earlier start left off.
    scenes = listed_scenes(config)
    training_set = scene_dataset(config, scenes.train)
    course = training.course_of(session, training_set)

    # All files, and whether they and the clips fit the base model: nothing should be missed after minutes of loading.
    with accelerator.local_main_process_first():
        raft, hed = find_networks(config)
    base_lora, latent_shape = check_base(config)

    # The frozen networks, and what they make of clips.
    front_end = load_front_end(config, raft, hed, device, dtype)
    source: SampleSource = training_set
    if config.data.cuts_per_scene:
        source = cache.FixedCuts(training_set, config.data.cuts_per_scene)
        if config.data.cache_latents:
            source = cache.build(source, front_end, config, latent_shape[0], accelerator, stop)
    if prepare_only:
        logger.info("clips of %d scenes are prepared in %s", len(training_set), config.data.cache_latents)
        return

    # What validation asks of the text encoder; it stays only where training asks for more.
    empty_prompt_embeds = front_end.embed([""])  # (1, tokens, D)
    held_out = held_out_clips(config, scenes.validation, front_end, accelerator.is_main_process)
    if config.data.cache_latents or not config.data.use_captions:
        front_end.text_encoder = None

    # What is trained. FSDP and DeepSpeed want weights of one type.
    bare = load_base(config, dtype).to(device)
    runtime.seed_model_randomness(int(config.run.seed), 0)
    frozen_dtype = None if sharding_of_launcher() or runtime.uses_deepspeed(accelerator) else dtype
    set_up_training(
        bare, model.train_mode, base_lora, rank=model.rank, alpha=model.lora_alpha, frozen_dtype=frozen_dtype
    )
    bare.train()
    if model.gradient_checkpointing:
        bare.enable_gradient_checkpointing()
    saved = bare if model.train_mode == "full" else TrainedWeights(bare)
    base = folder_or_id(model.pretrained_model_name_or_path)
    scheduler_config = load_scheduler_config(base, model.revision, model.cache_dir)
    constants = GGIConstants(
        alphas_cumprod(scheduler_config),
        rotary_for(bare, torch.empty(1, *latent_shape, device=device)),
        front_end.vae.config.scaling_factor,
        config.loss.noised_image_dropout,
        config.loss.caption_dropout,
    )

    # Optimizer, learning rate, moving average.
    optimizer = build_optimizer([p for p in bare.parameters() if p.requires_grad], config.optim, device)
    transformer, optimizer = accelerator.prepare(bare, optimizer)
    learning_rate = lr_schedule(config.optim, course.total_steps, course.plan.global_batch)
    ema = EMA(saved, config.optim.ema_decay, config.optim.offload_ema) if config.optim.use_ema else None
    learners = {"model": Learner(transformer, optimizer, learning_rate, config.optim.max_grad_norm, ema)}

    # Resume, say what is about to happen, train.
    run = training.open_run(
        session,
        course,
        models={"transformer": saved},
        learners=learners,
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
    training.run_to_end(run, task, source)
