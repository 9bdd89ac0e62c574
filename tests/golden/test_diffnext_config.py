"""Configuration files, learning rates and moving averages against recorded ones."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import vectors as golden
from torch import nn

from common.optim import EMA
from diffnext.config import ALIASES, PARSER, STRONGER
from diffnext.engine import lr_scheduler

ROOT = Path(__file__).parents[2]


def cases(pattern: str, key: str) -> Any:
    """Parametrise over the cases of json files; skip with the reason where there are none."""
    found = []
    for path in sorted((golden.GOLDEN_DIR / "diffnext").glob(pattern)):
        content = json.loads(path.read_text())
        values = content[key] if isinstance(content[key], list) else [content[key]]
        found += [pytest.param(case, content, id=f"{path.stem}-{n}") for n, case in enumerate(values)]
    absent = pytest.param(None, None, marks=pytest.mark.skip(reason=f"no {pattern}: set GOLDEN_DIR"), id="absent")
    return pytest.mark.parametrize(("case", "content"), found or [absent])


def leaves(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted keys; a mapping that a field of ours takes is left whole."""
    flat = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        flat |= leaves(value, f"{name}.") if isinstance(value, dict) and name not in ALIASES else {name: value}
    return flat


@cases("config_resolved*.json", "cases")
def test_documented_commands_resolve_as_recorded(
    case: dict[str, Any], content: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    config, warnings = PARSER.parse(case["args"])
    given = {word.partition("=")[0] for word in case["args"]}
    assert {warning.split(" ")[0] for warning in warnings} <= given  # the files of ours hold nothing without effect
    resolved = leaves(case["resolved"])
    for key, value in resolved.items():
        if key == "config" or key in PARSER.ignored or STRONGER.get(key) in resolved:
            continue
        section, field = ALIASES.get(key, key).split(".")
        found = getattr(getattr(config, section), field)
        expected = tuple(value) if isinstance(value, list) else value
        expected = tuple(value.split(",")) if field == "dataset" else expected
        expected = None if field == "resume_from_checkpoint" and value == "" else expected  # both are no checkpoint
        assert found == expected, key


@cases("lr_ema*.json", "lr_cases")
def test_learning_rates(case: dict[str, Any], content: dict[str, Any]) -> None:
    schedule = getattr(lr_scheduler, case["cls"])(**case["kwargs"])
    start, expected = case.get("start_step", 0), case["lr"]
    found = [schedule(start + step) for step in range(len(expected))]
    np.testing.assert_allclose(found, expected, rtol=content["tolerance"]["rtol"])


@cases("lr_ema*.json", "ema")
def test_moving_average(case: dict[str, Any], content: dict[str, Any]) -> None:
    weights = [torch.tensor(value) for value in case["params"]]
    module = nn.Linear(weights[0].shape[1], weights[0].shape[0])
    module.load_state_dict(golden.rule_weights(module, case["weights_seed"]))
    module.bias.requires_grad_(False)
    ema = EMA(module, case["decay"], warmup=False)
    for value, expected in zip(weights, case["ema_weight"], strict=True):
        with torch.no_grad():
            module.weight.copy_(value)
        ema.update()
        np.testing.assert_allclose(ema.average[0], expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(module.bias.detach(), case["ema_bias_unchanged"], rtol=1e-6)
