"""Validation of a run: metrics of many frames, clips of several processes."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from common.metrics import flicker, psnr, ssim
from vae.config import PARSER
from vae.task import METRIC_FRAMES, VaeTask

WORDS = "--model_name WFVAE --model_config x --video_path v --eval_video_path v --eval_resolution 16"


class Log:
    def __init__(self) -> None:
        self.videos: list[tuple[str, np.ndarray]] = []

    def video(self, step: int, name: str, frames: np.ndarray, fps: float) -> None:
        self.videos.append((name, frames))


class Processes:
    """One of two, whose sums with the other are told in advance."""

    device = torch.device("cpu")

    def __init__(self, is_main: bool, of_the_other: list[Tensor]) -> None:
        self.is_main_process, self.of_the_other = is_main, of_the_other

    def reduce(self, tensor: Tensor, reduction: str) -> Tensor:
        return tensor + self.of_the_other.pop(0)


def task(processes: Any, log: Any = None, lpips: Callable | None = None) -> VaeTask:
    config, _ = PARSER.parse([*WORDS.split(), "--eval_num_frames", "2", "--eval_num_video_log", "3"])
    nothing: Any = None
    return VaeTask(config, processes, *[nothing] * 6, log, nothing, lpips)  # type: ignore[arg-type]


def test_metrics_are_taken_of_some_frames_at_a_time() -> None:
    torch.manual_seed(0)
    real, fake = torch.rand(2, 2, 3, 9, 16, 16)
    seen = []

    def lpips(pred: Tensor, target: Tensor) -> Tensor:
        seen.append(len(pred))
        return (pred - target).square().mean((1, 2, 3))

    found = task(None, lpips=lpips)._measure(real, fake)
    frames = [clips.transpose(1, 2).flatten(0, 1) for clips in (fake, real)]  # (18, 3, 16, 16)
    assert seen == [METRIC_FRAMES, METRIC_FRAMES, 2]
    for name, metric in {"psnr": psnr, "ssim": ssim, "lpips": lpips}.items():
        assert found[name] == pytest.approx(metric(*frames).sum().item() / 9, rel=1e-6)
    assert found["flicker"] == pytest.approx(flicker(fake, real).sum().item(), rel=1e-12)


def test_the_main_process_writes_the_first_clips_of_all() -> None:
    one, other = np.random.default_rng(0).integers(0, 256, (2, 2, 16, 32, 3), np.uint8)  # (T, R, 2 R, 3) each
    black = torch.zeros(one.shape, dtype=torch.uint8)
    main, log = Log(), Log()
    flags = torch.tensor([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0]])  # clip 2 cannot be read
    task(Processes(True, [flags[0], black, torch.from_numpy(other)]), main)._write_videos(5, {0: one})
    assert [name for name, _ in main.videos] == ["000", "001"]
    assert all(np.array_equal(found, clip) for (_, found), clip in zip(main.videos, (one, other), strict=True))
    task(Processes(False, [flags[1], torch.from_numpy(one), black]), log)._write_videos(5, {1: other})
    assert not log.videos
