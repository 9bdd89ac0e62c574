"""A whole trainer in miniature, on everything of `common`: what the tests of the loop start as processes."""

import os
import signal
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import nn

from common import runtime, training
from common.config import (
    CheckpointConfig,
    DataConfig,
    LogConfig,
    OptimConfig,
    Parser,
    RunConfig,
    ValidationConfig,
    option,
)
from common.data import draw_normal
from common.loop import StepOutput
from common.optim import EMA, Learner, build_adamw, lr_schedule

WIDTH, NUM_ITEMS = 16, 21


@dataclass(frozen=True, kw_only=True)
class TinyData(DataConfig):
    bad_items: tuple[int, ...] = option((), "items that cannot be read")
    fatal_items: tuple[int, ...] = option((), "items that kill the process that reads them")
    hanging_items: tuple[int, ...] = option((), "items that never return")
    fatal_step: int | None = option(None, "step in which the process of rank 1 is killed")
    nan_samples: tuple[int, ...] = option((), "sample numbers whose loss is not a number")
    nan_critic: bool = option(False, "the critic's loss is never a number")
    alternate: bool = option(False, "odd steps train a second network, the critic, as in a GAN")


@dataclass(frozen=True, kw_only=True)
class TinyConfig:
    run: RunConfig = field(default_factory=RunConfig)
    data: TinyData = field(default_factory=TinyData)
    optim: OptimConfig = field(default_factory=OptimConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)


class Source:
    """Items are vectors; two groups of unequal size, as aspect buckets would be."""

    def __init__(self, data: TinyData):
        self.data = data

    def __len__(self) -> int:
        return NUM_ITEMS

    def group_of(self, index: int) -> str:
        return "a" if index % 3 else "b"

    def files_of(self, index: int) -> list[Path]:
        return [Path(f"item-{index}.bin")]

    def fingerprint(self) -> dict[str, int]:
        return {"num_items": NUM_ITEMS}

    def sample(self, index: int, rng: np.random.Generator) -> dict[str, object]:
        if index in self.data.fatal_items:
            os.kill(os.getpid(), signal.SIGKILL)
        while index in self.data.hanging_items:
            time.sleep(1)
        if index in self.data.bad_items:
            raise ValueError(f"item-{index}.bin is damaged")
        x = np.cos(np.arange(WIDTH, dtype=np.float32) * (index + 1)) + rng.normal(0, 0.1, WIDTH).astype(np.float32)
        return {"x": x, "group": self.group_of(index)}


class Model(nn.Module):
    _no_split_modules = ("Linear",)

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(WIDTH, 32), nn.SiLU(), nn.Dropout(0.0), nn.Linear(32, WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


class Critic(nn.Module):
    """Tells vectors from denoised ones; its dropout shows what masks a sample meets."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(WIDTH, 8), nn.Dropout(0.3), nn.Linear(8, 1))

    def forward(self, *rows: torch.Tensor) -> list[torch.Tensor]:
        return [self.layers(x) for x in rows]


class TinyTask:
    """Denoises vectors, and writes down which samples each process saw with which draws."""

    def __init__(
        self, config: TinyConfig, accelerator, model: nn.Module, bare: nn.Module, critic: nn.Module, seen: Path
    ):
        self.config, self.accelerator, self.model, self.bare, self.seen = config, accelerator, model, bare, seen
        self.critic = critic

    def training_step(self, batch: dict, step: int) -> StepOutput:
        numbers = batch["sample_number"].tolist()
        if (step, self.accelerator.process_index) == (self.config.data.fatal_step, 1):
            time.sleep(2)  # long enough to be written down by the watch
            os.kill(os.getpid(), signal.SIGKILL)
        assert len(set(batch["group"])) == 1, f"step {step} mixes groups {batch['group']}"
        noise = draw_normal(self.config.run.seed, "noise", numbers, (WIDTH,)).to(batch["x"].device)
        with open(self.seen, "a") as file:
            for number, item, x, row in zip(numbers, batch["item"].tolist(), batch["x"], noise, strict=True):
                file.write(f"{step} {number} {item} {x.sum().item().hex()} {row.sum().item().hex()}\n")
        if self.config.data.alternate and step % 2:
            with torch.no_grad():
                denoised = self.bare(batch["x"] + noise)
            real, fake = self.critic(batch["x"], denoised)  # (B, 1) each
            loss = torch.relu(1 - real.float()).mean() + torch.relu(1 + fake.float()).mean()
            return StepOutput(loss * (torch.nan if self.config.data.nan_critic else 1), optimizer="critic")
        loss = (self.model(batch["x"] + noise).float() - batch["x"]).square().mean(dim=1)  # (B,)
        bad = torch.tensor([n in self.config.data.nan_samples for n in numbers], device=loss.device)
        return StepOutput(torch.where(bad, torch.nan, loss).mean(), {"noise": noise.mean()})

    def validate(self, step: int) -> dict[str, float]:
        x = draw_normal(0, "held out", range(4), (WIDTH,)).to(self.accelerator.device)
        return {"error": (self.bare(x).float() - x).square().mean().item()}

    def export(self, directory: Path) -> None:
        if self.accelerator.is_main_process:
            torch.save(self.bare.state_dict(), directory / "weights.bin")


def main(argv: list[str]) -> None:
    config, _ = Parser(TinyConfig, program="tiny_trainer.py").parse_or_exit(argv)
    with runtime.clear_errors():
        train(config)


def train(config: TinyConfig) -> None:
    session = training.start(config, num_networks=2 if config.data.alternate else 1)
    config, accelerator = session.config, session.accelerator
    source = Source(config.data)
    course = training.course_of(session, source, [source.group_of(index) for index in range(len(source))])

    torch.manual_seed(0)
    bare = Model()
    optimizer = build_adamw(bare.parameters(), config.optim, accelerator.device)
    critic = Critic()
    models = {"model": bare, "critic": critic} if config.data.alternate else {"model": bare}
    critic_optimizer = build_adamw(critic.parameters(), config.optim, accelerator.device)
    model, optimizer = accelerator.prepare(bare, optimizer)
    schedule = lr_schedule(config.optim, course.total_steps, course.plan.global_batch)
    ema = EMA(bare, config.optim.ema_decay) if config.optim.use_ema else None
    learners = {"model": Learner(model, optimizer, schedule, config.optim.max_grad_norm, ema)}
    if config.data.alternate:
        critic, critic_optimizer = accelerator.prepare(critic, critic_optimizer)
        learners["critic"] = Learner(critic, critic_optimizer, schedule, config.optim.max_grad_norm)

    run = training.open_run(session, course, models=models, learners=learners)
    seen = Path(config.run.output_dir) / f"seen-{accelerator.process_index}.txt"
    training.run_to_end(run, TinyTask(config, accelerator, model, bare, critic, seen), source)


if __name__ == "__main__":
    main(sys.argv[1:])
