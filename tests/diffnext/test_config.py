"""Settings of the NOVA trainer: what they take besides the documented keys, and what they do not."""

import pytest

from common.config import ConfigError
from diffnext.config import PARSER

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


def test_an_empty_resume_point_is_none() -> None:
    assert PARSER.parse(NEEDED)[0].checkpoint.resume_from_checkpoint == "latest"
    assert PARSER.parse([*NEEDED, "experiment.resume_from_checkpoint="])[0].checkpoint.resume_from_checkpoint is None
