"""Settings of the NOVA trainer: what they take besides the documented keys, and what they do not."""

from pathlib import Path

import pytest

from common.config import ConfigError
from diffnext.config import IGNORED, PARSER

ROOT = Path(__file__).parents[2]
NEEDED = ["--output_dir", "run", "--pretrained_path", "nova", "--dataset", "cache"]


@pytest.mark.parametrize(
    ("words", "betas"),
    [
        ([], (0.9, 0.95)),
        (["optimizer.params.betas=[0.8,0.9]"], (0.8, 0.9)),
        (["--betas", "0.8", "0.9"], (0.8, 0.9)),
        (["--adam_beta2", "0.99"], (0.9, 0.99)),
        (["--betas", "0.8", "0.9", "--adam_beta1", "0.8", "--adam_beta2", "0.9"], (0.8, 0.9)),
    ],
)
def test_betas_are_given_together_or_one_by_one(words: list[str], betas: tuple[float, float]) -> None:
    optim = PARSER.parse([*NEEDED, *words])[0].optim
    assert (optim.adam_beta1, optim.adam_beta2) == optim.betas == betas


def test_betas_that_disagree_are_refused() -> None:
    with pytest.raises(ConfigError) as caught:
        PARSER.parse([*NEEDED, "--betas", "0.8,0.9", "--adam_beta2", "0.99"])
    assert caught.value.problems == [
        "optim: betas (0.8, 0.9) and adam_beta1, adam_beta2 (0.9, 0.99) disagree: leave one of the two out"
    ]


@pytest.mark.parametrize("name", ["lr_scheduler", "lr_warmup_steps", "scale_lr", "use_ema", "offload_ema"])
def test_settings_of_the_other_trainers_schedules_and_averages_are_unknown(name: str) -> None:
    with pytest.raises(ConfigError, match=f"optim.{name} .* is unknown"):
        PARSER.parse([*NEEDED, f"optim.{name}=1"])


FILE = "config=configs/nova_d48w1024_sdxl1024.yaml"


@pytest.mark.parametrize(
    ("words", "field", "value"),
    [
        ([FILE, "lr_scheduler.params.lr_max=3e-4"], "optim.learning_rate", 3e-4),
        ([FILE, "optimizer.params.lr=3e-4"], "optim.learning_rate", 3e-4),
        ([FILE, "optimizer.params.lr=3e-4", "lr_scheduler.params.lr_max=2e-4"], "optim.learning_rate", 2e-4),
        ([FILE, "--learning_rate", "3e-4"], "optim.learning_rate", 3e-4),
        ([FILE, "train_dataloader.params.seed=7"], "run.seed", 7),
        ([FILE, "training.seed=7"], "run.seed", 7),
        ([FILE, "train_dataloader.params.batch_size=3"], "data.batch_size", 3),
        ([FILE], "log.report_to", "wandb"),
        ([FILE, "log.report_to=none"], "log.report_to", "none"),
        (["wandb.run_id=null"], "log.report_to", "wandb"),
        ([], "log.report_to", "none"),
        ([], "optim.ema_decay", None),
        (["ema.params.device=cpu"], "optim.ema_decay", 0.99),
        ([FILE, "ema.params.device=cpu"], "optim.ema_decay", 0.98),
        ([FILE, "ema.params.decay=null"], "optim.ema_decay", None),
    ],
)
def test_keys_of_the_original_mean_what_they_mean_there(
    words: list[str], field: str, value: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    config, warnings = PARSER.parse([*words, *NEEDED])
    section, name = field.split(".")
    assert getattr(getattr(config, section), name) == value and warnings == []


def test_keys_of_the_original_without_effect_warn() -> None:
    words = ["train_dataloader.params.shuffle=false", "train_dataloader.params.stick_to_partition=true"]
    none = "has no effect"
    assert PARSER.parse([*words, "training.gpu_id=1", *NEEDED])[1] == [
        f"train_dataloader.params.stick_to_partition {none}: {IGNORED['train_dataloader.params.stick_to_partition']}",
        f"training.gpu_id {none}: the launcher decides it",
        f"train_dataloader.params.shuffle false {none}: the data are visited in a seeded order, new in every epoch",
    ]


def test_an_empty_resume_point_is_none() -> None:
    assert PARSER.parse(NEEDED)[0].checkpoint.resume_from_checkpoint == "latest"
    assert PARSER.parse([*NEEDED, "experiment.resume_from_checkpoint="])[0].checkpoint.resume_from_checkpoint is None
