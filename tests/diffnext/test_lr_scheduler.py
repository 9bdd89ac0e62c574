"""Learning rates as functions of the step."""

import pytest

from diffnext.engine.lr_scheduler import ConstantLR, CosineLR, MultiStepLR


def test_warm_up_ends_at_the_full_rate() -> None:
    rate = ConstantLR(lr_max=1.0, warmup_steps=4, warmup_factor=0.0)
    assert [rate(step) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_stairs_do_not_depend_on_where_a_run_was_resumed() -> None:
    stairs = CosineLR(lr_max=1.0, max_steps=8, decay_step=4)
    assert stairs(5) == stairs(4) == pytest.approx(0.5) and stairs(3) == 1.0 and stairs(8) == 0.0


def test_multi_step() -> None:
    rate = MultiStepLR(lr_max=1.0, lr_min=0.5, decay_steps=(2, 4), decay_gamma=0.5)
    assert [rate(step) for step in range(6)] == [1.0, 1.0, 0.75, 0.75, 0.625, 0.625]


def test_a_cosine_without_a_length_is_refused() -> None:
    with pytest.raises(ValueError, match="CosineLR needs max_steps above warmup_steps 5, got 5"):
        CosineLR(lr_max=1.0, max_steps=5, warmup_steps=5)
