"""Settings of the VAE trainer: sections, historic spellings, checks."""

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from common.config import (
    CheckpointConfig,
    DataConfig,
    LogConfig,
    OptimConfig,
    Parser,
    PicturesConfig,
    RunConfig,
    option,
)

DISCRIMINATORS = {"LPIPSWithDiscriminator3D": 3, "LPIPSWithDiscriminator": 2}  # dimensions of the convolutions


@dataclass(frozen=True, kw_only=True)
class VaeRun(RunConfig):
    exp_name: str = option("test", "first part of the run folder's name", needs="output_dir=null")
    ckpt_dir: str = option("./results/", "parent of the run folder", needs="output_dir=null")
    output_dir: str | None = option(
        None, "run folder; null is <ckpt_dir>/<exp_name>-lr<lr>-bs<batch>-rs<resolution>-sr<sample_rate>-fr<num_frames>"
    )
    seed: int = option(1234)
    num_train_epochs: int = option(10)
    mixed_precision: Literal["no", "fp32", "fp16", "bf16"] | None = option(
        None, "autocast type, no or fp32 for none; null obeys the launcher, and where that says no is bf16 on a GPU"
    )


@dataclass(frozen=True, kw_only=True)
class VaeData(DataConfig):
    batch_size: int = option(1, "clips per process and micro-batch; also those of one BatchNorm statistic", minimum=1)
    num_workers: int = option(4)
    video_path: str | None = option(None, "folder of training videos, searched recursively; required")
    allow_list: str | None = option(None, "file with the paths of the videos to use, as scripts/doctor.py writes it")
    num_frames: int = option(17, "frames per clip, 4 n + 1 (8 n + 1 for the 8x models)", minimum=1)
    resolution: int = option(256, "height and width of a clip in pixels, a multiple of 8", minimum=8)
    sample_rate: int = option(2, "interval between the frames of a clip, in frames of the file", minimum=1)
    dynamic_sample: bool = option(False, "draw each clip's interval from 1 ... sample_rate")
    short_clips: Literal["stretch", "reject"] = option(
        "stretch", "a file with too few frames: repeat some, as the original did, or count it as unreadable"
    )


@dataclass(frozen=True, kw_only=True)
class VaeModel:
    model_name: Literal["WFVAE", "CausalVAE", "WFVAE2"] | None = option(
        None, "network; null is what the pretrained folder says"
    )
    model_config: str | None = option(
        None, "json of a network to train from scratch, see examples/*.json; the pretrained folder's own one wins"
    )
    pretrained_model_name_or_path: str | None = option(
        None, "folder with weights and config.json to start from; optimizer and position are not read"
    )
    ignore_mismatched_sizes: bool = option(
        False, "build model_config's network and take those pretrained weights that fit it", needs="model_config"
    )
    freeze_encoder: bool = option(False, "train the decoder alone", state=True)
    enable_tiling: bool = option(
        False,
        "reconstruct validation clips in pieces: less memory, the same result of WFVAE, an approximate one of "
        "CausalVAE; training, whose backward would hold all pieces and more, passes whole clips",
    )
    find_unused_parameters: bool = option(False, "passed to DistributedDataParallel; nothing here needs it")
    load_disc_from_checkpoint: str | None = option(
        None, "start from the discriminator of this checkpoint folder or .ckpt file"
    )


@dataclass(frozen=True, kw_only=True)
class VaeLoss:
    loss_type: Literal["l1", "l2"] = option("l1", "distance of pixels")
    perceptual_weight: float = option(1.0, "weight of LPIPS in the reconstruction loss; 0 leaves VGG16 out", minimum=0)
    vgg_weights: str | None = option(
        None, "VGG16 weights of torchvision for LPIPS; null looks in torch hub's cache", needs="perceptual_weight"
    )
    kl_weight: float = option(1e-6, "weight of the KL divergence, summed over a clip's latents", minimum=0)
    logvar_init: float = option(0.0, "log variance of the reconstruction term, a constant")
    wavelet_loss: bool = option(False, "compare the wavelet coefficients inside WFVAE's encoder and decoder")
    wavelet_weight: float = option(0.1, "weight of the wavelet loss", minimum=0, needs="wavelet_loss")
    disc_cls: str = option(
        "LPIPSWithDiscriminator3D", f"discriminator: {' or '.join(DISCRIMINATORS)} (a dotted path's last part counts)"
    )
    disc_loss: Literal["hinge", "vanilla"] = option("hinge", "adversarial loss")
    disc_start: int = option(5, "optimizer step from which odd steps train the discriminator", minimum=0)
    disc_weight: float = option(0.5, "weight of the adversarial term, times its adaptive weight", minimum=0)

    def __post_init__(self) -> None:
        if self.discriminator_class not in DISCRIMINATORS:
            raise ValueError(f"disc_cls {self.disc_cls!r} is unknown; it must end in {' or '.join(DISCRIMINATORS)}")

    @property
    def discriminator_class(self) -> str:
        return self.disc_cls.rpartition(".")[2]


@dataclass(frozen=True, kw_only=True)
class VaeOptim(OptimConfig):
    learning_rate: float = option(1e-5, "base learning rate, of both optimizers", minimum=0)
    adam_weight_decay: float = option(1e-4, "AdamW weight decay of all parameters", minimum=0)
    max_grad_norm: float = option(1e5, "gradients are scaled down to this norm, per network; 0 is off", minimum=0)
    ema_decay: float = option(0.999, "decay of the moving average, constant", minimum=0, maximum=1, needs="use_ema")


@dataclass(frozen=True, kw_only=True)
class VaeCheckpoint(CheckpointConfig):
    checkpointing_steps: int = option(1000, "optimizer steps between checkpoints, of both kinds", minimum=1)
    resume_from_checkpoint: str | None = option(
        None, "`latest`, a checkpoint folder, its name under output_dir, or a .ckpt file of the original"
    )
    not_resume_training_process: bool = option(
        False, "begin at step 0 with the checkpoint's weights and optimizers", needs="resume_from_checkpoint"
    )
    not_resume_optimizer: bool = option(
        False, "begin with a fresh optimizer of the autoencoder", needs="resume_from_checkpoint"
    )
    not_resume_discriminator: bool = option(
        False, "begin with a fresh discriminator and its optimizer", needs="resume_from_checkpoint"
    )


@dataclass(frozen=True, kw_only=True)
class VaeLog(LogConfig):
    report_to: str = option("wandb")
    tracker_project_name: str = option(
        "causalvideovae", "project name in the tracker; the environment's WANDB_PROJECT wins"
    )
    log_every_steps: int = option(5)


@dataclass(frozen=True, kw_only=True)
class VaeValidation(PicturesConfig):
    validation_steps: int | None = option(1000)
    eval_video_path: str | None = option(None, "folder of validation videos; null skips validation")
    eval_num_frames: int = option(17, "first frames of each validation clip", minimum=1, needs="eval_video_path")
    eval_resolution: int = option(
        256, "height and width of validation clips in pixels", minimum=16, needs="eval_video_path"
    )
    eval_sample_rate: int = option(
        1, "interval between the frames of a validation clip", minimum=1, needs="eval_video_path"
    )
    eval_batch_size: int = option(
        8, "validation clips per process that pass together", minimum=1, needs="eval_video_path"
    )
    max_validation_items: int | None = option(100, "validation clips; null is all", minimum=1, needs="eval_video_path")
    eval_num_video_log: int = option(2, "validation clips written as video", minimum=0, needs="eval_video_path")
    eval_lpips: bool = option(False, "measure LPIPS (AlexNet), too", needs="eval_video_path")
    lpips_weights: str | None = option(
        None, "AlexNet weights of torchvision for LPIPS; null looks in torch hub's cache", needs="eval_lpips"
    )


@dataclass(frozen=True, kw_only=True)
class VaeConfig:
    run: VaeRun = VaeRun()
    data: VaeData = VaeData()
    model: VaeModel = VaeModel()
    loss: VaeLoss = VaeLoss()
    optim: VaeOptim = VaeOptim()
    checkpoint: VaeCheckpoint = VaeCheckpoint()
    log: VaeLog = VaeLog()
    validation: VaeValidation = VaeValidation()


ALIASES = {
    "epochs": "run.num_train_epochs",
    "max_steps": "run.max_train_steps",
    "mix_precision": "run.mixed_precision",
    "dataset_num_worker": "data.num_workers",
    "lr": "optim.learning_rate",
    "weight_decay": "optim.adam_weight_decay",
    "clip_grad_norm": "optim.max_grad_norm",
    "ema": "optim.use_ema",
    "save_ckpt_step": "checkpoint.checkpointing_steps",
    "log_steps": "log.log_every_steps",
    "eval_steps": "validation.validation_steps",
    "eval_subset_size": "validation.max_validation_items",
}


def check(config: VaeConfig) -> list[str]:
    """Problems between sections, one sentence each."""
    model, problems = config.model, []
    if not config.data.video_path:
        problems.append("--video_path is required: the folder of the training videos")
    if not (model.model_config or model.pretrained_model_name_or_path):
        problems.append(
            "--model_config (a json, to train from scratch) or --pretrained_model_name_or_path (a folder) is required"
        )
    if model.model_config and not (model.model_name or model.pretrained_model_name_or_path):
        problems.append("--model_name is required with --model_config: WFVAE, CausalVAE or WFVAE2")
    return problems


def resolved(config: VaeConfig) -> VaeConfig:
    """The same settings with the run folder's name, the precision and the tracker's project filled in."""
    from common.runtime import half_by_default  # with PyTorch, which --help does without

    run, data = config.run, config.data
    name = f"{run.exp_name}-lr{config.optim.learning_rate:.2e}-bs{data.batch_size}-rs{data.resolution}"
    name += f"-sr{data.sample_rate}-fr{data.num_frames}"
    project = os.environ.get("WANDB_PROJECT", config.log.tracker_project_name)
    return dataclasses.replace(
        config,
        run=dataclasses.replace(
            run,
            output_dir=run.output_dir or str(Path(run.ckpt_dir) / name),
            mixed_precision=half_by_default(run.mixed_precision),
        ),
        log=dataclasses.replace(config.log, tracker_project_name=project),
    )


PARSER = Parser(
    VaeConfig,
    aliases=ALIASES,
    check=check,
    resolve=resolved,
    program="train_ddp.py",
    description="Trains a video autoencoder (WFVAE, CausalVAE) with reconstruction, LPIPS, KL, wavelet and GAN losses.",
)
