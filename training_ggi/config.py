"""Settings of the GGI trainer: sections, the original's spellings, checks."""

import dataclasses
from dataclasses import dataclass
from typing import Literal

from common.config import (
    CheckpointConfig,
    DataConfig,
    GuidedSamplerConfig,
    HeldOutConfig,
    HubModelConfig,
    LogConfig,
    OptimConfig,
    Parser,
    RunConfig,
    Schedule,
    option,
)

DEFAULT_SEED = 42
TRACKER_PROJECT = "cogvideox-sft"
RAFT_MIN_PX = 256  # the flow is found at half the size, where RAFT takes no less than 128
REPEATED_FRAMES = 3  # of the last one, so that the last latent frame is a still
BASE_LORA = "training_ggi/lora_models/I2V5B_final_i38800_nearest_lora_weights.safetensors"
HED_WEIGHTS = "training_ggi/annotators/ControlNetHED.pth"


@dataclass(frozen=True, kw_only=True)
class GGIRun(RunConfig):
    output_dir: str = option("log")
    seed: int | None = option(  # type: ignore[assignment]
        DEFAULT_SEED,
        f"seed of data order, cuts and every draw of the loss; null is {DEFAULT_SEED}",
        minimum=0,
        state=True,
    )
    max_train_steps: int | None = option(10000)


@dataclass(frozen=True, kw_only=True)
class GGIData(DataConfig):
    data_root: str = option("datasets", "folder that holds DL3DV-10K, the scene list and the captions")
    dataset_file: str | None = option("seeds.txt", "list of scenes in data_root; null takes all scenes that are there")
    prompt_file: str | None = option("captions.json", "captions by scene, in data_root", needs="use_captions")
    use_captions: bool = option(True, "train with captions; false trains with the empty prompt")
    image_folder: str = option("images_2", "folder of each scene's frames")
    num_validation_scenes: int = option(4, "last scenes of the list, held out for validation", minimum=0)
    max_train_samples: int | None = option(None, "train on the first so many scenes", minimum=1)
    height: int = option(480, "height of the clips in pixels", minimum=RAFT_MIN_PX)
    width: int = option(720, "width of the clips in pixels", minimum=RAFT_MIN_PX)
    max_num_frames: int = option(
        49, f"frames of a clip, 4k + 1; the last {REPEATED_FRAMES} repeat the one before them", minimum=9
    )
    frame_intervals: tuple[int, ...] = option((1,), "steps between frames to draw from")
    random_start: bool = option(True, "begin anywhere in a scene; false begins at its first frame")
    cond: Literal["depth_hed", "hed", "precomputed"] = option(
        "depth_hed", "edges of depth maps, as the original, of the images, or read from edge_folder"
    )
    edge_folder: str = option(
        "edges", "folder of each scene's edge images, named and sized as its frames", needs="cond=precomputed"
    )
    clipwise_depth: bool = option(
        False, "normalise depth over a clip, not per frame: less flicker", needs="cond=depth_hed"
    )
    detect_resolution: int = option(512, "shorter side in pixels at which edges and depth are found", minimum=64)
    cuts_per_scene: int | None = option(None, "draw from so many fixed cuts per scene; null is anywhere", minimum=1)
    noise_sets: int | None = option(
        None,
        "draw from so many fixed warped noises per cut; null warps anew each time",
        minimum=1,
        needs="cuts_per_scene",
    )
    cache_latents: str | None = option(None, "folder of prepared clips, made if absent; needs cuts_per_scene")

    @property
    def num_frames(self) -> int:
        """Frames that are read of a scene."""
        return self.max_num_frames - REPEATED_FRAMES

    def __post_init__(self) -> None:
        if self.cache_latents and not self.cuts_per_scene:
            raise ValueError("cache_latents needs cuts_per_scene: only fixed cuts can be prepared once")
        if self.noise_sets and not self.cuts_per_scene:
            raise ValueError("noise_sets needs cuts_per_scene: only fixed cuts have fixed noises")
        if not self.frame_intervals or min(self.frame_intervals) < 1:
            raise ValueError(f"frame_intervals {list(self.frame_intervals)} must be whole numbers from 1")
        if self.max_num_frames % 4 != 1:
            raise ValueError(f"max_num_frames {self.max_num_frames} must be 4k + 1, e.g. 49")


@dataclass(frozen=True, kw_only=True)
class GGIModel(HubModelConfig):
    pretrained_model_name_or_path: str = option(  # type: ignore[assignment]
        "THUDM/CogVideoX-5B-I2V", "base model: a folder or a hub id"
    )
    variant: str | None = option(None, "weight variant of all components, e.g. fp16")
    base_lora_path: str = option(BASE_LORA, "LoRA of Go-with-the-Flow")
    train_mode: Literal["lora", "full", "base_lora"] = option(
        "lora",
        "train a new LoRA on the fused base LoRA, all of the base weights (the original's way), or the base LoRA; "
        "always with the input projection",
        state=True,
    )
    rank: int = option(64, "rank of the new LoRA", minimum=1, state=True, needs="train_mode=lora")
    lora_alpha: float = option(
        64.0, "scale of the new LoRA times its rank", above=0, state=True, needs="train_mode=lora"
    )
    gradient_checkpointing: bool = option(True)
    enable_slicing: bool = option(True, "encode one clip at a time")
    enable_tiling: bool = option(True, "encode in overlapping tiles: less memory, slightly other latents")
    ignore_learned_positional_embeddings: bool = option(
        False, "do without the table that holds for 49 frames of 480 x 720 alone", state=True
    )
    raft_weights: str | None = option(
        None, "RAFT weights (raft_large_C_T_SKHT_V2); null takes torch hub's, which are downloaded if absent"
    )
    hed_weights: str = option(
        HED_WEIGHTS, "weights of HED, of lllyasviel/Annotators; if absent, the default one is downloaded"
    )
    midas_path: str = option("Intel/dpt-hybrid-midas", "depth network: a folder or a hub id")


@dataclass(frozen=True, kw_only=True)
class GGILoss:
    noised_image_dropout: float = option(0.05, "share of samples that lose both end images", minimum=0, maximum=1)
    caption_dropout: float = option(0.0, "share of samples that lose their caption", minimum=0, maximum=1)
    flow_scale: int = option(
        8, "pixels of the warp's grid per pixel of the flow; 4 takes a quarter of the time", minimum=1
    )
    oob: Literal["keep", "drop"] = option(
        "keep", "noise that leaves the frame: its place gets fresh noise, or is filled"
    )


_NO_BACKEND = (
    "not offered; to save memory, use_8bit_adam keeps the optimizer in 8 bits, and accelerate_configs/fsdp2.yaml "
    "spreads train_mode full over the GPUs"
)


@dataclass(frozen=True, kw_only=True)
class GGIOptim(OptimConfig):
    learning_rate: float = option(5e-5)
    gradient_accumulation_steps: int = option(4)
    adam_beta2: float = option(0.95)
    adam_weight_decay: float = option(1e-4)
    lr_scheduler: Schedule = option(
        "cosine_with_restarts", "learning-rate schedule; the original ran `constant`, whatever its file said"
    )
    lr_warmup_steps: int = option(800)
    optimizer: Literal["adamw", "adam"] = option("adamw", "adam adds weight decay to the gradient", state=True)
    use_4bit: bool = option(False, _NO_BACKEND)
    use_torchao: bool = option(False, _NO_BACKEND)
    use_cpu_offload_optimizer: bool = option(False, _NO_BACKEND)
    offload_gradients: bool = option(False, _NO_BACKEND)

    def __post_init__(self) -> None:
        backends = ("use_4bit", "use_torchao", "use_cpu_offload_optimizer", "offload_gradients")
        if asked := [name for name in backends if getattr(self, name)]:
            raise ValueError(f"{', '.join(asked)}: {_NO_BACKEND}")
        if self.optimizer == "adam" and self.use_8bit_adam:
            raise ValueError("use_8bit_adam is AdamW: leave it out, or set optimizer to adamw")


@dataclass(frozen=True, kw_only=True)
class GGICheckpoint(CheckpointConfig):
    checkpointing_steps: int = option(150)
    checkpoints_total_limit: int | None = option(2)
    resume_from_checkpoint: str | None = option(
        "latest", "`latest` (a fresh start where there is none), a checkpoint folder, its name, or null"
    )


@dataclass(frozen=True, kw_only=True)
class GGILog(LogConfig):
    tracker_project_name: str | None = option(  # type: ignore[assignment]
        TRACKER_PROJECT, f"project name in the tracker; null is {TRACKER_PROJECT}"
    )


@dataclass(frozen=True, kw_only=True)
class SamplerConfig(GuidedSamplerConfig):
    num_inference_steps: int = option(30)
    guidance_scale: float = option(6.0)
    use_dynamic_cfg: bool = option(False, "raise guidance over the steps")
    degradation: float = option(0.5, "share of fresh noise; 0 follows the flow, 1 overlooks it", minimum=0, maximum=1)


@dataclass(frozen=True, kw_only=True)
class GGIValidation(HeldOutConfig, SamplerConfig):
    validation_steps: int | None = option(500)
    validation_epochs: int | None = option(  # type: ignore[assignment]
        1, "epochs between validations; null is 1", minimum=1, needs="validation_steps=null"
    )
    validate_at_start: bool = option(False)
    fps: float = option(8.0, "frames per second of the clips", above=0)


@dataclass(frozen=True, kw_only=True)
class GGIConfig:
    run: GGIRun = GGIRun()
    data: GGIData = GGIData()
    model: GGIModel = GGIModel()
    loss: GGILoss = GGILoss()
    optim: GGIOptim = GGIOptim()
    checkpoint: GGICheckpoint = GGICheckpoint()
    log: GGILog = GGILog()
    validation: GGIValidation = GGIValidation()


ALIASES = {
    "train_batch_size": "data.batch_size",
    "dataloader_num_workers": "data.num_workers",
    "gradient_accumulation": "optim.gradient_accumulation_steps",
    "beta1": "optim.adam_beta1",
    "beta2": "optim.adam_beta2",
    "weight_decay": "optim.adam_weight_decay",
    "epsilon": "optim.adam_epsilon",
    "use_8bit": "optim.use_8bit_adam",
    "nccl_timeout": "run.process_group_timeout_s",
    "tracker_name": "log.tracker_project_name",
    "num_validation_videos": "validation.max_validation_items",
}

_LEFT_OVER = "a left-over of the script that the original grew from"
IGNORED = {
    "video_reshape_mode": "clips are always cut at random",
    "load_tensors": "use cache_latents",
    "video_column": _LEFT_OVER,
    "caption_column": _LEFT_OVER,
    "id_token": _LEFT_OVER,
    "random_flip": "it had no effect in the original; flow and edges would have to be mirrored too",
    "skip_frames_start": _LEFT_OVER,
    "skip_frames_end": _LEFT_OVER,
    "pin_memory": "batches are moved while the GPU computes",
    "beta3": "it belongs to optimizers that are not offered",
    "prodigy_decouple": "Prodigy is not offered",
    "prodigy_use_bias_correction": "Prodigy is not offered",
    "prodigy_safeguard_warmup": "Prodigy is not offered",
    "validation_prompt": "held-out scenes are validated, with their captions",
    "validation_images": "held-out scenes are validated, with their end frames",
    "validation_prompt_separator": "held-out scenes are validated, with their captions",
    "enable_model_cpu_offload": "validation uses the networks of training",
    "push_to_hub": "upload the folder `export` with `hf upload` when you are content with it",
    "hub_model_id": "nothing is uploaded",
    "hub_token": "nothing is uploaded",
}


def check(config: GGIConfig) -> list[str]:
    """Problems between sections, one sentence each."""
    problems = []
    if config.model.train_mode == "full" and config.run.mixed_precision == "fp16":
        problems.append("train_mode full in fp16 would overflow: set mixed_precision to bf16")
    return problems


def resolved(config: GGIConfig) -> GGIConfig:
    """The same settings with what the original leaves null filled in."""
    seed = DEFAULT_SEED if config.run.seed is None else config.run.seed
    return dataclasses.replace(
        config,
        run=dataclasses.replace(config.run, seed=seed),
        log=dataclasses.replace(config.log, tracker_project_name=config.log.tracker_project_name or TRACKER_PROJECT),
        validation=dataclasses.replace(config.validation, validation_epochs=config.validation.validation_epochs or 1),
    )


PARSER = Parser(
    GGIConfig,
    aliases=ALIASES,
    ignored=IGNORED,
    check=check,
    resolve=resolved,
    program="exps/T073-000.py",
    description="Trains the GGI module: CogVideoX-5B-I2V with flow-warped noise, two end frames and an edge condition.",
    default_yaml="configs/T073-000.yaml",
)
