"""Learning rates and moving averages against diffusers, optimizers against their settings."""

import sys
from pathlib import Path

import pytest
import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import nn

from common import checkpoint
from common.config import OptimConfig
from common.optim import EMA, Learner, build_adamw, lr_factor, lr_schedule

NAMES = ("linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup")
CPU = torch.device("cpu")

# Learning rate --------------------------------------------------------------------------------------------------------


def reference(name: str, base_lr: float = 1e-4, **settings):
    """The multiplier of diffusers' schedule as a function of the step."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=base_lr)
    (factor,) = get_scheduler(name, optimizer, **settings).lr_lambdas
    return factor


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("warmup_steps", "total_steps"), [(0, 1), (0, 100), (1, 7), (10, 100), (99, 100)])
@pytest.mark.parametrize(("num_cycles", "power", "base_lr"), [(1, 1.0, 1e-4), (3, 2.5, 1e-3), (4, 0.5, 2.0)])
def test_factors_are_those_of_diffusers(name, warmup_steps, total_steps, num_cycles, power, base_lr) -> None:
    # diffusers gives `num_cycles` to cosine_with_restarts alone, and `power` to polynomial alone, as is promised here.
    factor = reference(
        name,
        base_lr,
        num_warmup_steps=warmup_steps,
        num_training_steps=total_steps,
        num_cycles=num_cycles,
        power=power,
    )
    for step in range(total_steps + 20):  # beyond the end too
        actual = lr_factor(
            name,
            step,
            warmup_steps=warmup_steps,
            total_steps=total_steps,
            num_cycles=num_cycles,
            power=power,
            base_lr=base_lr,
        )
        assert actual == pytest.approx(factor(step), rel=1e-12, abs=1e-15), step


@pytest.mark.parametrize("rules", ["1:10,0.1", "1:10,0.1:20,0.01:30,0.005", "0.5", "2:1,1"])
def test_piecewise_factors_are_those_of_diffusers(rules: str) -> None:
    factor = reference("piecewise_constant", step_rules=rules)
    for step in range(40):
        assert lr_factor("piecewise_constant", step, step_rules=rules) == factor(step)


def test_piecewise_rules_out_of_order() -> None:
    rules = "0.1:20,1:10,0.01"
    factor = reference("piecewise_constant", step_rules=rules)
    assert [lr_factor("piecewise_constant", s, step_rules=rules) for s in (0, 15, 25)] == [
        factor(s) for s in (0, 15, 25)
    ]


@pytest.mark.parametrize("rules", [None, "", "1:10", "1,0.1", "a:10,0.1", "1:b,0.1", "1:10:20,0.1", "1:1.5,0.1"])
def test_piecewise_rules_that_cannot_be_read(rules: str | None) -> None:
    optim = OptimConfig(lr_scheduler="piecewise_constant", lr_step_rules=rules)
    with pytest.raises(ValueError) as raised:
        lr_schedule(optim, 100, 1)
    assert str(raised.value) == (
        f"lr_step_rules {rules!r} must read `factor:until_step,...,last_factor`, e.g. 1:1000,0.1"
    )


@pytest.mark.parametrize("rules", ["1:10,", "1:10,x", "1:10,0.1:b,0.01", "1:10,0.1:20"])
def test_late_piecewise_rules_that_cannot_be_read(rules: str) -> None:
    with pytest.raises(ValueError, match="lr_step_rules"):
        lr_schedule(OptimConfig(lr_scheduler="piecewise_constant", lr_step_rules=rules), 100, 1)


def test_an_unknown_schedule_is_refused() -> None:
    with pytest.raises(ValueError, match="^lr_scheduler 'sine' is unknown$"):
        lr_factor("sine", 0)


@pytest.mark.parametrize(("scale_lr", "factor"), [(False, 1), (True, 24)])
@pytest.mark.parametrize("name", NAMES)
def test_the_base_rate_is_scaled(name: str, scale_lr: bool, factor: int) -> None:
    optim = OptimConfig(learning_rate=1e-3, scale_lr=scale_lr, lr_scheduler=name, lr_warmup_steps=5, lr_num_cycles=2)
    rate = lr_schedule(optim, 50, samples_per_step=24)
    curve = reference(name, 1e-3 * factor, num_warmup_steps=5, num_training_steps=50, num_cycles=2)
    for step in range(50):
        assert rate(step) == pytest.approx(1e-3 * factor * curve(step), rel=1e-12, abs=1e-18)


def test_a_learning_rate_of_zero_is_zero() -> None:
    for name in NAMES:
        rate = lr_schedule(OptimConfig(learning_rate=0.0, lr_scheduler=name), 10, 1)
        assert [rate(step) for step in (0, 5, 9, 10)] == [0.0] * 4


def test_each_group_has_its_scale() -> None:
    a, b, c = (nn.Parameter(torch.zeros(1)) for _ in range(3))
    groups = [{"params": [a]}, {"params": [b], "lr_scale": 0.1}, {"params": [c], "lr_scale": 0.0}]
    optimizer = build_adamw(groups, OptimConfig(learning_rate=2e-3, adam_weight_decay=0.0), CPU)
    schedule = lr_schedule(OptimConfig(learning_rate=2e-3, lr_scheduler="linear"), 10, 1)
    learner = Learner(nn.Linear(1, 1), optimizer, schedule, 1.0)
    assert learner.set_learning_rate(5) == pytest.approx(1e-3)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([1e-3, 1e-4, 0.0])
    assert learner.set_learning_rate(5) == pytest.approx(1e-3)  # set again, it is not scaled again
    for parameter in (a, b, c):
        parameter.grad = torch.ones(1)
    optimizer.step()
    assert torch.cat([a, b, c]).tolist() == pytest.approx([-1e-3, -1e-4, 0.0], rel=1e-4)


# Optimizers -----------------------------------------------------------------------------------------------------------


def test_adamw_has_the_settings() -> None:
    parameter = nn.Parameter(torch.ones(3))
    settings = OptimConfig(learning_rate=0.5, adam_beta1=0.8, adam_beta2=0.7, adam_weight_decay=0.25, adam_epsilon=1e-3)
    optimizer = build_adamw([parameter], settings, CPU)
    assert type(optimizer) is torch.optim.AdamW
    (group,) = optimizer.param_groups
    assert (group["lr"], group["betas"], group["weight_decay"], group["eps"]) == (0.5, (0.8, 0.7), 0.25, 1e-3)
    parameter.grad = torch.full((3,), 2.0)
    optimizer.step()
    expected = (
        1 - 0.5 * 0.25 - 0.5 * 2 / (2 + 1e-3)
    )  # decoupled decay; the first moments, bias-corrected, are the gradient's
    assert parameter.tolist() == pytest.approx([expected] * 3, rel=1e-5)


def test_8_bit_adam_without_its_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ValueError) as raised:
        build_adamw([nn.Parameter(torch.ones(1))], OptimConfig(use_8bit_adam=True), CPU)
    assert str(raised.value) == (
        "use_8bit_adam needs bitsandbytes: pip install 'visual-trainers[bnb]', or leave use_8bit_adam out"
    )


# Moving average -------------------------------------------------------------------------------------------------------


class Small(ModelMixin, ConfigMixin):
    """A diffusers model with a frozen part, a buffer and a parameter in another order than that of the layers."""

    @register_to_config
    def __init__(self, width: int = 3):
        super().__init__()
        self.first, self.frozen, self.last = nn.Linear(2, width), nn.Linear(width, width), nn.Linear(width, 1)
        self.frozen.requires_grad_(False)
        self.register_buffer("count", torch.zeros(2))


def moved(model: nn.Module, step: int) -> None:
    """What an optimizer step would do to the trained weights."""
    generator = torch.Generator().manual_seed(step)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator))


@pytest.mark.parametrize("decay", [0.0, 0.15, 0.9, 1.0])
@pytest.mark.parametrize("offload", [False, True])
def test_the_average_is_that_of_diffusers(decay: float, offload: bool) -> None:
    model = Small()
    ours, theirs = EMA(model, decay, offload), EMAModel(model.parameters(), decay=decay)
    for step in range(25):
        moved(model, step)
        ours.update()
        theirs.step(model.parameters())
        assert ours.current_decay() == pytest.approx(theirs.get_decay(theirs.optimization_step), rel=1e-12)
        trained = [s for s, p in zip(theirs.shadow_params, model.parameters(), strict=True) if p.requires_grad]
        assert len(trained) == len(ours.average) == 4
        for mine, other in zip(ours.average, trained, strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-6)
    assert ours.updates == theirs.optimization_step == 25


def test_the_first_update_takes_the_weights_over() -> None:
    model = nn.Linear(2, 2)
    ema = EMA(model, 0.9999)
    before = [p.clone() for p in model.parameters()]
    moved(model, 0)
    assert all(torch.equal(a, b) for a, b in zip(ema.average, before, strict=True))
    ema.update()
    assert all(torch.equal(a, p) for a, p in zip(ema.average, model.parameters(), strict=True))


def test_the_average_of_half_precision_weights_is_full() -> None:
    model = nn.Linear(2, 2).bfloat16()
    ema = EMA(model, 0.5)
    assert {a.dtype for a in ema.average} == {torch.float32}
    for _ in range(3):
        moved(model, 1)
        ema.update()
    own = [p.clone() for p in model.parameters()]
    assert any(not torch.equal(a, a.bfloat16().float()) for a in ema.average)
    with ema.swapped():
        assert all(p.dtype == torch.bfloat16 for p in model.parameters())
    assert all(torch.equal(p, o) for p, o in zip(model.parameters(), own, strict=True))


def assert_weights(model: nn.Module, expected: list[torch.Tensor]) -> None:
    live = [p for p in model.parameters() if p.requires_grad]
    assert all(torch.equal(p, e) for p, e in zip(live, expected, strict=True))


@pytest.mark.parametrize("offload", [False, True])
def test_swapped_gives_the_weights_back_bit_for_bit(offload: bool) -> None:
    model = Small()
    ema = EMA(model, 0.9, offload)
    for step in range(3):
        moved(model, step)
        ema.update()
    moved(model, 9)
    with torch.no_grad():
        model.first.weight[0, 0] = float("nan")  # even what is not equal to itself
    own_bits = [p.detach().clone().view(torch.int32) for p in model.parameters() if p.requires_grad]
    average = [a.clone() for a in ema.average]
    identities = [id(p) for p in model.parameters()]

    with ema.swapped():
        assert_weights(model, average)
    with pytest.raises(KeyError, match="inside"), ema.swapped():
        assert_weights(model, average)
        moved(model, 4)  # what the block does to the weights is forgotten
        raise KeyError("inside")
    bits = [p.detach().view(torch.int32) for p in model.parameters() if p.requires_grad]
    assert all(torch.equal(a, b) for a, b in zip(bits, own_bits, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(ema.average, average, strict=True))
    assert [id(p) for p in model.parameters()] == identities


def test_an_optimizer_goes_on_after_swapped() -> None:
    torch.manual_seed(0)
    plain, swapping = nn.Linear(2, 2), nn.Linear(2, 2)
    swapping.load_state_dict(plain.state_dict())
    ema = EMA(swapping, 0.5)
    pairs = [(m, build_adamw(m.parameters(), OptimConfig(learning_rate=0.1), CPU)) for m in (plain, swapping)]
    for step in range(4):
        for model, optimizer in pairs:
            model(torch.ones(1, 2) * step).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        ema.update()
        with ema.swapped():
            swapping(torch.ones(1, 2))
    assert_weights(swapping, [p.detach() for p in plain.parameters()])


def test_the_last_update_of_a_run_counts() -> None:
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    ema, averages = EMA(model, 0.5, warmup=False, every=3), []
    for step in range(1, 6):
        nn.init.constant_(model.weight, step)
        ema.update(is_last=step == 5)
        averages.append(ema.average[0].item())
    assert averages == [0, 0, 1.5, 1.5, 3.25]


def test_offloaded_averages_are_in_host_memory() -> None:
    model = nn.Linear(2, 2, device="meta")  # the one other device that every machine has
    assert {a.device.type for a in EMA(model, 0.9).average} == {"meta"}
    assert {a.device.type for a in EMA(nn.Linear(2, 2), 0.9, offload=True).average} == {"cpu"}
    with pytest.raises(NotImplementedError, match="meta tensor"):  # so it is indeed copied
        EMA(model, 0.9, offload=True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_offloaded_averages_leave_the_gpu() -> None:
    model = nn.Linear(2, 2, device="cuda")
    kept, offloaded = EMA(model, 0.9), EMA(model, 0.9, offload=True)
    for step in range(3):
        with torch.no_grad():
            model.weight.add_(step)
        kept.update()
        offloaded.update()
    assert {a.device.type for a in offloaded.average} == {"cpu"} and {a.device.type for a in kept.average} == {"cuda"}
    for a, b in zip(kept.average, offloaded.average, strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=1e-6, atol=1e-6)
    own = model.weight.detach().clone()
    with offloaded.swapped():
        assert model.weight.is_cuda
    assert torch.equal(model.weight, own)


def test_a_saved_average_is_read_by_diffusers(tmp_path: Path) -> None:
    model = Small(width=4)
    model.count.fill_(5)
    ema = EMA(model, 0.75)
    for step in range(12):
        moved(model, step)
        ema.update()
    own = [p.detach().clone() for p in model.parameters() if p.requires_grad]
    checkpoint.save_average(ema, tmp_path / "unet_ema")
    assert_weights(model, own)

    read = EMAModel.from_pretrained(str(tmp_path / "unet_ema"), Small)
    assert (read.decay, read.optimization_step, read.update_after_step) == (0.75, 12, 0)
    assert (read.min_decay, read.use_ema_warmup, read.inv_gamma, read.power) == (0.0, False, 1.0, 2 / 3)
    assert read.model_config["width"] == 4
    with ema.swapped():
        for shadow, parameter in zip(read.shadow_params, model.parameters(), strict=True):
            assert torch.equal(shadow, parameter)
    assert torch.equal(Small.from_pretrained(tmp_path / "unet_ema").count, torch.full((2,), 5.0))

    again = EMA(Small(width=4), 0.75)
    checkpoint.load_average(again, tmp_path / "unet_ema")
    assert (again.updates, again.current_decay()) == (12, ema.current_decay())
    assert all(torch.equal(a, b) for a, b in zip(again.average, ema.average, strict=True))


def test_an_average_of_a_plain_module_goes_on_as_if_never_saved(tmp_path: Path) -> None:
    model = nn.Linear(3, 3)
    ema = EMA(model, 0.9)
    for step in range(6):
        moved(model, step)
        ema.update()
    checkpoint.save_average(ema, tmp_path)
    other = nn.Linear(3, 3)
    other.load_state_dict(model.state_dict())
    resumed = EMA(other, 0.9)
    checkpoint.load_average(resumed, tmp_path)
    for step in range(6, 9):
        for m, e in ((model, ema), (other, resumed)):
            moved(m, step)
            e.update()
    assert all(torch.equal(a, b) for a, b in zip(resumed.average, ema.average, strict=True))


def test_an_average_without_warm_up_uses_its_decay_from_the_first_update_on(tmp_path: Path) -> None:
    model = Small(width=4)
    start = [p.detach().clone() for p in model.parameters() if p.requires_grad]
    ema = EMA(model, 0.75, warmup=False)
    moved(model, 0)
    ema.update()
    live = [p.detach() for p in model.parameters() if p.requires_grad]
    expected = [0.75 * before + 0.25 * now for before, now in zip(start, live, strict=True)]
    for average, value in zip(ema.average, expected, strict=True):
        torch.testing.assert_close(average, value)
    checkpoint.save_average(ema, tmp_path / "ema")
    read = EMAModel.from_pretrained(str(tmp_path / "ema"), Small)
    assert read.get_decay(5) == 0.75
