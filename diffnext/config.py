"""Settings of the NOVA trainer: sections, the documented keys of the original's YAML files, checks."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from common.config import (
    AdamWConfig,
    CheckpointConfig,
    DataConfig,
    GuidedSamplerConfig,
    LogConfig,
    Parser,
    RunConfig,
    ValidationConfig,
    option,
)

PIPELINES = {"NOVATrainT2IPipeline": "t2i", "NOVATrainT2VPipeline": "t2v"}
SCHEDULES = {"ConstantLR": "constant", "CosineLR": "cosine", "MultiStepLR": "multistep"}


@dataclass(frozen=True, kw_only=True)
class NovaRun(RunConfig):
    output_dir: str | None = option(None, "folder of checkpoints, metrics and samples; required")  # type: ignore[assignment]
    seed: int = option(1337)
    max_train_steps: int | None = option(30000)
    mixed_precision: Literal["no", "fp32", "fp16", "bf16"] | None = option(
        None, "autocast type, no or fp32 for none; null obeys the launcher, and where that says no is bf16 on a GPU"
    )


@dataclass(frozen=True, kw_only=True)
class NovaData(DataConfig):
    dataset: tuple[str, ...] = option((), "folder(s) of cached latents, see `python -m diffnext.build_cache`; required")
    num_workers: int = option(8)
    shuffle: bool = option(True, "always: the data are visited in a seeded order, new in every epoch")


@dataclass(frozen=True, kw_only=True)
class NovaModel:
    pipeline: str = option("t2i", f"what is trained: t2i, t2v, or a dotted path that ends in {' or '.join(PIPELINES)}")
    pretrained_path: str | None = option(
        None, "folder of a NOVA pipeline: model_index.json, transformer, vae, ...; required"
    )
    module_dict: dict | None = option(
        None, "folders of components in place of those in pretrained_path; an empty one leaves the component out"
    )
    module_config: dict | None = option(None, "`transformer`: settings that replace those of transformer/config.json")
    gradient_checkpointing: int = option(
        0,
        "recompute in the backward pass: 1 video encoder, 2 and image encoder, 3 and diffusion head",
        minimum=0,
        maximum=3,
    )
    from_scratch: bool = option(False, "start from random weights, whatever transformer/ holds")

    def __post_init__(self) -> None:
        if self.kind not in ("t2i", "t2v"):
            raise ValueError(
                f"pipeline {self.pipeline!r} is unknown; it must be t2i, t2v or end in {' or '.join(PIPELINES)}"
            )

    @property
    def kind(self) -> str:
        """`t2i` or `t2v`."""
        return PIPELINES.get(self.pipeline.rpartition(".")[2], self.pipeline)


@dataclass(frozen=True, kw_only=True)
class NovaLoss:
    loss_repeat: int = option(4, "noise levels per token and step", minimum=1)
    t2i_weight: float = option(1.0, "weight of a video's first frame; 0 trains image-to-video alone", minimum=0)
    text_dropout: float = option(0.1, "share of samples that lose their text, for guidance", minimum=0, maximum=1)


@dataclass(frozen=True, kw_only=True)
class NovaOptim(AdamWConfig):
    betas: tuple[float, float] | None = option(None, "AdamW betas; sets adam_beta1 and adam_beta2")
    adam_beta2: float = option(0.95)
    adam_weight_decay: float = option(0.02, "AdamW weight decay; norm layers have none", minimum=0)
    max_grad_norm: float = option(0.0)
    schedule: str = option(
        "constant", f"constant, cosine, multistep, or a dotted path ending in {', '.join(SCHEDULES)}"
    )
    schedule_steps: int | None = option(None, "steps of the cosine; null is the run's length", minimum=1)
    warmup_steps: int = option(0, "steps of linear warm-up", minimum=0)
    warmup_factor: float = option(0.001, "share of the learning rate at which warm-up begins", minimum=0, maximum=1)
    lr_min: float = option(0.0, "learning rate that the schedule falls to", minimum=0)
    decay_step: int = option(1, "steps between changes of the cosine", minimum=1)
    decay_steps: tuple[int, ...] = option((), "steps at which multistep decays")
    decay_gamma: float = option(0.1, "factor of each such decay", above=0)
    ema_decay: float | None = option(
        None, "decay of the moving average per update; null keeps none", minimum=0, maximum=1, state=True
    )
    ema_update_every: int = option(100, "optimizer steps between updates of the average", minimum=1, needs="ema_decay")
    ema_device: Literal["cpu", "cuda"] = option("cpu", "where the average is kept", needs="ema_decay")

    def __post_init__(self) -> None:
        if self.schedule_kind not in SCHEDULES.values():
            raise ValueError(f"schedule {self.schedule!r} is unknown; choose among {', '.join(SCHEDULES)}")
        single = (self.adam_beta1, self.adam_beta2)
        betas = self.betas or single
        if single not in (betas, (NovaOptim.adam_beta1, NovaOptim.adam_beta2)):
            raise ValueError(f"betas {betas} and adam_beta1, adam_beta2 {single} disagree: leave one of the two out")
        for name, value in {"betas": betas, "adam_beta1": betas[0], "adam_beta2": betas[1]}.items():
            object.__setattr__(self, name, value)

    @property
    def schedule_kind(self) -> str:
        """`constant`, `cosine` or `multistep`."""
        return SCHEDULES.get(self.schedule.rpartition(".")[2], self.schedule)


@dataclass(frozen=True, kw_only=True)
class NovaCheckpoint(CheckpointConfig):
    checkpointing_steps: int = option(5000)
    resume_from_checkpoint: str | None = option(
        "latest", "`latest` (a fresh start where there is none), a checkpoint folder, its name, or null"
    )


@dataclass(frozen=True, kw_only=True)
class NovaLog(LogConfig):
    report_to: str = option("none")
    tracker_project_name: str = option("nova")
    run_name: str | None = option(None, "name of the run in wandb")
    wandb_run_id: str | None = option(None, "run of wandb to go on with, where report_to names wandb")
    log_every_steps: int = option(20)


@dataclass(frozen=True, kw_only=True)
class SamplerConfig(GuidedSamplerConfig):
    num_inference_steps: int = option(64, "autoregressive steps per frame", minimum=1)
    num_diffusion_steps: int = option(25, "denoising steps per autoregressive step", minimum=1)
    guidance_scale: float = option(5.0)
    motion_flow: float = option(5.0, "amount of motion of videos", minimum=0)


@dataclass(frozen=True, kw_only=True)
class NovaValidation(ValidationConfig, SamplerConfig):
    validation_steps: int | None = option(5000)
    validate_at_start: bool = option(False)
    prompts: tuple[str, ...] = option((), "prompts to generate in validation; none skips it")
    max_latent_length: int | None = option(
        None,
        "latent frames to generate; null is 1 for images, for videos what network and VAE take, 9 at most",
        minimum=1,
    )


@dataclass(frozen=True, kw_only=True)
class NovaConfig:
    run: NovaRun = NovaRun()
    data: NovaData = NovaData()
    model: NovaModel = NovaModel()
    loss: NovaLoss = NovaLoss()
    optim: NovaOptim = NovaOptim()
    checkpoint: NovaCheckpoint = NovaCheckpoint()
    log: NovaLog = NovaLog()
    validation: NovaValidation = NovaValidation()


ALIASES = {
    "experiment.output_dir": "run.output_dir",
    "experiment.project": "log.tracker_project_name",
    "experiment.name": "log.run_name",
    "experiment.log_every": "log.log_every_steps",
    "experiment.save_every": "checkpoint.checkpointing_steps",
    "experiment.resume_from_checkpoint": "checkpoint.resume_from_checkpoint",
    "wandb.run_id": "log.wandb_run_id",
    "model.loss_repeat": "loss.loss_repeat",
    "pipeline.target": "model.pipeline",
    "pipeline.paths.pretrained_path": "model.pretrained_path",
    "pipeline.paths.module_dict": "model.module_dict",
    "pipeline.paths.module_config": "model.module_config",
    "optimizer.params.lr": "optim.learning_rate",
    "optimizer.params.betas": "optim.betas",
    "optimizer.params.weight_decay": "optim.adam_weight_decay",
    "optimizer.params.eps": "optim.adam_epsilon",
    "lr_scheduler.target": "optim.schedule",
    "lr_scheduler.params.lr_max": "optim.learning_rate",
    "lr_scheduler.params.lr_min": "optim.lr_min",
    "lr_scheduler.params.max_steps": "optim.schedule_steps",
    "lr_scheduler.params.warmup_steps": "optim.warmup_steps",
    "lr_scheduler.params.warmup_factor": "optim.warmup_factor",
    "lr_scheduler.params.decay_step": "optim.decay_step",
    "lr_scheduler.params.decay_steps": "optim.decay_steps",
    "lr_scheduler.params.decay_gamma": "optim.decay_gamma",
    "train_dataloader.params.dataset": "data.dataset",
    "train_dataloader.params.batch_size": "data.batch_size",
    "train_dataloader.params.num_workers": "data.num_workers",
    "train_dataloader.params.seed": "run.seed",
    "train_dataloader.params.shuffle": "data.shuffle",
    "ema.params.decay": "optim.ema_decay",
    "ema.params.update_every": "optim.ema_update_every",
    "ema.params.device": "optim.ema_device",
    "training.batch_size": "data.batch_size",
    "training.gradient_accumulation_steps": "optim.gradient_accumulation_steps",
    "training.max_train_steps": "run.max_train_steps",
    "training.seed": "run.seed",
    "training.mixed_precision": "run.mixed_precision",
}

_LOADER = "the loader numbers its samples and keeps no buffer of records"
IGNORED = {
    "model.name": "a checkpoint's folder is always called transformer",
    "optimizer.target": "AdamW is always used",
    "optimizer.params.fused": "AdamW is always fused",
    "train_dataloader.target": "there is one loader",
    **{
        f"train_dataloader.params.{name}": _LOADER
        for name in ("initial_fill", "queue_depth", "prefetch_count", "contiguous", "stick_to_partition")
    },
    **{
        f"train_dataloader.params.{name}": "the launcher decides it"
        for name in ("shard_id", "num_shards", "max_examples")
    },
    "training.gpu_id": "the launcher decides it",
    "experiment.resume_iter": "the checkpoint says it",
}
# In one file or one command line, these count where both are given, as in the original.
STRONGER = {
    "optimizer.params.lr": "lr_scheduler.params.lr_max",
    "training.seed": "train_dataloader.params.seed",
    "training.batch_size": "train_dataloader.params.batch_size",
}
# What a section of the original's files asks for by being there, whatever it holds.
IMPLIED = {"wandb": ("log.report_to", "wandb"), "ema": ("optim.ema_decay", 0.99)}


class NovaParser(Parser):
    """Understands the original's files as the original does."""

    def _layer(self, source: str, pairs: list[tuple[str, Any]], problems: list[str], warnings: list[str]) -> Any:
        given = {name for name, _ in pairs}
        kept = [(name, value) for name, value in pairs if STRONGER.get(name) not in given]
        return super()._layer(source, kept, problems, warnings)

    def _build(self, merged: Mapping[str, tuple[Any, str]], problems: list[str]) -> Any:
        sections = {spelling.lstrip("-").partition(".")[0] for _, spelling in merged.values()}
        implied = {path: (value, section) for section, (path, value) in IMPLIED.items() if section in sections}
        return super()._build({**implied, **merged}, problems)

    def _without_effect(self, config: NovaConfig, given: Mapping[str, tuple[Any, str]]) -> list[str]:
        warnings = super()._without_effect(config, given)
        if not config.data.shuffle:
            spelling = given["data.shuffle"][1]
            warnings.append(
                f"{spelling} false has no effect: the data are visited in a seeded order, new in every epoch"
            )
        return warnings


def check(config: NovaConfig) -> list[str]:
    """Problems between sections, one sentence each."""
    required = {
        "experiment.output_dir (run.output_dir)": config.run.output_dir,
        "pipeline.paths.pretrained_path (model.pretrained_path)": config.model.pretrained_path,
        "train_dataloader.params.dataset (data.dataset)": config.data.dataset,
    }
    problems = [f"{name} is required" for name, value in required.items() if not value]
    return problems


def resolved(config: NovaConfig) -> NovaConfig:
    """The same settings with the precision filled in and an empty resume point understood as none."""
    from common.runtime import half_by_default  # with PyTorch, which --help does without

    changes: dict[str, Any] = {
        "run": {"mixed_precision": half_by_default(config.run.mixed_precision)},
        "checkpoint": {"resume_from_checkpoint": config.checkpoint.resume_from_checkpoint or None},
    }
    sections = {name: dataclasses.replace(getattr(config, name), **values) for name, values in changes.items()}
    return dataclasses.replace(config, **sections)


PARSER = NovaParser(
    NovaConfig,
    aliases=ALIASES,
    ignored=IGNORED,
    check=check,
    resolve=resolved,
    program="scripts/train.py",
    description="Trains NOVA, text-to-image or text-to-video, on cached latents.",
)
