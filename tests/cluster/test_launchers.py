"""Every trainer under every launcher: it trains as with plain processes, or it is refused at start with the reason.

Plain processes (DDP), NOVA and training_ggi under FSDP2 and ZeRO-2 are tested with their trainers, what these two do in
themselves in `tests/common`.
"""

import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate.utils import DeepSpeedPlugin
from hosts import WITHOUT_GPU
from running import ROOT, assert_close, launch, refused
from trainers import TRAINERS

from common.checkpoint import read_weights
from common.runtime import require_deepspeed_settings

NEEDS_DEEPSPEED = pytest.mark.skipif(not importlib.util.find_spec("deepspeed"), reason="needs the extra deepspeed")
# So small a norm that every step is clipped.
STEPS = "run.max_train_steps=2 optim.gradient_accumulation_steps=2 optim.max_grad_norm=0.1".split()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny: Callable[[str], Path]) -> Callable[[str, str], Path]:
    """The run folder of a trainer under a launcher file, with two processes."""
    root = tmp_path_factory.mktemp("runs")

    def run(name: str, config: str) -> Path:
        trainer, output_dir = TRAINERS[name], root / f"{name}-{config}"
        if not output_dir.exists():
            words = ["accelerate", "launch", "--config_file", ROOT / "accelerate_configs" / f"{config}.yaml"]
            words += ["--num_processes", 2, "--main_process_port", 0, "--mixed_precision", "no", trainer.script]
            words += [*trainer.command(tiny(name)), *STEPS, f"run.output_dir={output_dir}"]
            launch(*words, folder=ROOT / trainer.folder, environment=WITHOUT_GPU)
        return output_dir

    return run


@pytest.mark.slow
@pytest.mark.parametrize("config", ["fsdp2", pytest.param("8_gpus_zero2", marks=NEEDS_DEEPSPEED)])
@pytest.mark.parametrize("name", ["gaussian_refiner", "mvdiffusion"])
def test_it_trains_as_plain_processes_do(name: str, config: str, runs: Callable[[str, str], Path]) -> None:
    ours, plain = runs(name, config), runs(name, "cpu_2_processes")
    assert_close(ours, plain, TRAINERS[name].tolerance)
    for folder in ("checkpoint-2/unet", "checkpoint-2/unet_ema", "export/unet"):
        found, expected = read_weights(ours / folder), read_weights(plain / folder)
        assert found.keys() == expected.keys()
        for key in expected:
            torch.testing.assert_close(found[key], expected[key], rtol=1e-4, atol=1e-5, msg=f"{folder} {key}")


@pytest.mark.slow
@NEEDS_DEEPSPEED
def test_zero_2_obeys_the_trainers_own_clipping_and_accumulation(runs: Callable[[str, str], Path]) -> None:
    ours, plain = runs("diffnext", "8_gpus_zero2"), runs("diffnext", "cpu_2_processes")
    assert_close(ours, plain, TRAINERS["diffnext"].tolerance)


# Refused at start -----------------------------------------------------------------------------------------------------

REQUIRED = {
    "diffnext": "pipeline.paths.pretrained_path=x train_dataloader.params.dataset=x",
    "gaussian_refiner": "--pretrained_model_name_or_path x",
    "mvdiffusion": "--train_data_dir x --pretrained_model_name_or_path x",
    "training_ggi": "",
    "vae": "--video_path x --model_name WFVAE --model_config x",
}
FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
DEEPSPEED = {"ACCELERATE_USE_DEEPSPEED": "true"}
TWO_NETWORKS = "shards one network per run, and this trainer trains two in turns: launch it without"


@pytest.mark.parametrize(
    ("names", "launcher", "text"),
    [
        (list(TRAINERS), FSDP | {"FSDP_VERSION": "1"}, "launcher settings: fsdp_version must be 2"),
        (["vae"], FSDP, f"FSDP {TWO_NETWORKS} FSDP, e.g. with accelerate_configs/ddp.yaml"),
        (["vae"], DEEPSPEED, f"DeepSpeed {TWO_NETWORKS} DeepSpeed, e.g. with accelerate_configs/ddp.yaml"),
        (
            [name for name in TRAINERS if name != "vae"],
            DEEPSPEED | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"},
            "launcher settings: zero_stage must be 2 at most: 3 spreads frozen networks too, which are read whole here",
        ),
    ],
    ids=["fsdp1", "two-networks-fsdp2", "two-networks-zero2", "zero3"],
)
def test_what_does_not_work_is_refused_before_anything_is_loaded(
    names: list[str],
    launcher: dict[str, str],
    text: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    clean_process: None,
) -> None:
    for variable, value in launcher.items():
        monkeypatch.setenv(variable, value)
    for name in names:
        message = refused(capsys, name, *REQUIRED[name].split(), f"run.output_dir={tmp_path / name}")
        assert message.startswith(f"error: {text}"), name
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("setting", "value", "text"),
    [
        (
            "ACCELERATE_GRADIENT_CLIPPING",
            "1.0",
            "gradient_clipping must be left out, not 1.0: the trainer's own setting says 0.5",
        ),
        (
            "ACCELERATE_GRADIENT_ACCUMULATION_STEPS",
            "8",
            "gradient_accumulation_steps must be left out, not 8: the trainer's own setting says 4",
        ),
        (
            "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE",
            "cpu",
            "offload_optimizer_device must be none: DeepSpeed would",
        ),
        ("ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE", "cpu", "offload_param_device must be none: DeepSpeed would"),
    ],
)
def test_deepspeed_settings_that_contradict_the_trainer_are_refused(
    setting: str, value: str, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable, allowed in (
        ("ACCELERATE_GRADIENT_CLIPPING", "0.0"),
        ("ACCELERATE_GRADIENT_CLIPPING", "0.5"),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4"),
    ):
        monkeypatch.setenv(variable, allowed)
        require_deepspeed_settings(DeepSpeedPlugin(), 4, 0.5)
    monkeypatch.setenv(setting, value)
    with pytest.raises(ValueError, match=f"launcher settings: {text}"):
        require_deepspeed_settings(DeepSpeedPlugin(), 4, 0.5)
