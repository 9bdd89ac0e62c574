"""Counted FLOPs against hand-computed ones, the table of peaks, and what is reported of a step."""

import json
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from processes import run
from torch import Tensor, nn
from torch.nn import functional as F

from common.measure import MAX_COUNTS, Meter, parse_steps, peak_flops

CPU = torch.device("cpu")


def meter(micro_batches: int = 1, num_kinds: int = 1) -> Meter:
    return Meter(CPU, micro_batches, None, Path("unused.json"), num_kinds)


@pytest.mark.parametrize(
    ("device_name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA B200", 2.25e15),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A10", 125e12),
        ("NVIDIA A40", 150e12),
        ("NVIDIA RTX A6000", 155e12),
        ("Tesla V100-SXM2-32GB", 125e12),
        ("NVIDIA GeForce RTX 4090", 165e12),
        ("NVIDIA GeForce GTX 1080 Ti", None),
        ("NVIDIA RTX A1000", None),  # no A100
        ("NVIDIA RTX A4000", None),  # no A40
        ("NVIDIA A10G", None),
        ("AMD Instinct MI300X", None),
        ("", None),
    ],
)
def test_peaks(device_name: str, peak: float | None) -> None:
    assert peak_flops(device_name) == peak


@pytest.mark.parametrize(
    ("text", "steps"), [(None, None), ("5", (5, 5)), ("5:8", (5, 8)), ("0:0", (0, 0)), ("7:", (7, 7))]
)
def test_steps(text: str | None, steps: tuple[int, int] | None) -> None:
    assert parse_steps(text) == steps


@pytest.mark.parametrize("text", ["", ":", ":8", "8:5", "five", "-1", "1:2:3", "1.5", "1:x", " 1", "²"])
def test_steps_that_cannot_be_read(text: str) -> None:
    with pytest.raises(ValueError) as caught:
        parse_steps(text)
    assert str(caught.value) == f"profile {text!r} must be a step or FIRST:LAST, e.g. 5:8"


def test_a_step_in_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = meter()
    monkeypatch.setattr(measured, "memory", lambda: {"memory_peak_gib": 1.5})
    plain = {"step_s": 0.5, "samples_per_s": 16.0, "data_wait_percent": 20.0, "time/data_s": 0.1, "time/forward_s": 0.3}
    phases = {"data": 0.1, "forward": 0.3}
    assert measured.of_step(0.5, phases, 8) == {**plain, "memory_peak_gib": 1.5}
    measured.flops_per_step = {"model": 4 * 10**12}
    assert measured.of_step(0.5, phases, 8) == {**plain, "tflops_per_s": 8.0, "memory_peak_gib": 1.5}
    measured.peak = 32e12
    assert measured.of_step(0.5, phases, 8) == {
        **plain,
        "tflops_per_s": 8.0,
        "mfu_percent": 25.0,
        "memory_peak_gib": 1.5,
    }
    assert measured.of_step(0.5, {}, 8)["data_wait_percent"] == 0
    assert "tflops_per_s" not in measured.of_step(0.5, phases, 8, "discriminator")


def test_every_kind_of_step_is_counted_once() -> None:
    layer, measured = nn.Linear(7, 11), meter(num_kinds=2)
    for kind, rows in (("model", 5), ("discriminator", 3), ("model", 4)):
        for _ in range(2):  # of two micro-batches the first is counted
            with measured.counting():
                layer(torch.randn(rows, 7)).sum().backward()
        measured.of_step(1.0, {}, 1, kind)
    assert measured.flops_per_step == {"model": 2 * 2 * 5 * 7 * 11, "discriminator": 2 * 2 * 3 * 7 * 11}


def test_a_kind_of_step_that_comes_late_is_not_counted() -> None:
    measured = meter(num_kinds=2)
    for _ in range(MAX_COUNTS):
        with measured.counting():
            nn.Linear(7, 11)(torch.randn(5, 7)).sum().backward()
        measured.of_step(1.0, {}, 1)
    assert isinstance(measured.counting(), nullcontext)


def test_memory_of_a_process_without_a_gpu() -> None:
    (before,) = meter().memory().values()
    block = torch.ones(2**26)  # 0.25 GiB
    (after,) = meter().memory().values()
    assert 0.01 < before <= after < 1000 and block.numel() == 2**26
    ones = torch.ones(int(before * 2**30 / 4) + 2**25)  # more than the peak so far
    assert meter().memory()["memory_peak_gib"] >= before + 0.1 and ones[0] == 1


def test_flops_of_a_linear_layer() -> None:
    batch, inputs, outputs = 5, 7, 11
    layer, x = nn.Linear(inputs, outputs), torch.randn(batch, inputs, requires_grad=True)
    measured = meter(micro_batches=3)
    with measured.counting():
        layer(x).sum().backward()
    product = 2 * batch * inputs * outputs  # forward, gradient of the input, gradient of the weight
    measured.of_step(1.0, {}, batch)
    assert measured.flops_per_step == {"model": 3 * 3 * product}
    with measured.counting():  # counts once only
        layer(x).sum().backward()
    measured.of_step(1.0, {}, batch)
    assert measured.flops_per_step == {"model": 3 * 3 * product}


def test_flops_of_a_layer_whose_input_needs_no_gradient() -> None:
    layer, x = nn.Linear(7, 11), torch.randn(5, 7)
    measured = meter()
    with measured.counting():
        layer(x).sum().backward()
    measured.of_step(1.0, {}, 1)
    assert measured.flops_per_step == {"model": 2 * (2 * 5 * 7 * 11)}


def test_flops_of_a_convolution() -> None:
    batch, inputs, outputs, kernel_px, height_px, width_px = 2, 4, 6, 3, 10, 8
    layer = nn.Conv2d(inputs, outputs, kernel_px, stride=2, padding=1)
    x = torch.randn(batch, inputs, height_px, width_px, requires_grad=True)
    measured = meter()
    with measured.counting():
        layer(x).sum().backward()
    places = (height_px // 2) * (width_px // 2)
    forward = 2 * batch * places * outputs * inputs * kernel_px**2
    measured.of_step(1.0, {}, 1)
    assert measured.flops_per_step == {"model": 3 * forward}


def test_frozen_networks_count_with_their_forward_pass() -> None:
    frozen, x = nn.Linear(7, 11).requires_grad_(False), torch.randn(5, 7)
    measured = meter()
    with measured.counting(), torch.no_grad():
        frozen(x)
    measured.of_step(1.0, {}, 1)
    assert measured.flops_per_step == {"model": 2 * 5 * 7 * 11}


class Net(nn.Module):
    """A convolution, normalisation, attention and linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 16, 3, padding=1), nn.GroupNorm(4, 16)
        self.qkv, self.head = nn.Linear(16, 48), nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 3))

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.norm(self.conv(x)))  # (B, 16, H, W)
        x = x.flatten(2).transpose(1, 2)  # (B, H*W, 16)
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)  # each (B, 2, H*W, 8)
        x = x + F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)  # (B, H*W, 16)
        return F.dropout(self.head(x), 0.1)  # (B, H*W, 3)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_counting_changes_no_bit(dtype: torch.dtype | None) -> None:
    torch.manual_seed(0)
    net, x = Net(), torch.randn(2, 3, 12, 12)

    def passes(measured: Meter) -> list[Tensor]:
        torch.manual_seed(1)
        net.zero_grad(set_to_none=True)
        with measured.counting():
            with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
                loss = net(x).float().square().mean()
            loss.backward()
        return [loss.detach(), *(p.grad.clone() for p in net.parameters())]

    measured = meter()
    counted = passes(measured)
    plain = passes(measured)  # the second time nothing is counted
    measured.of_step(1.0, {}, 1)
    assert measured.flops_per_step["model"] > 0
    assert len(plain) == 11 and all(torch.equal(a, b) for a, b in zip(counted, plain, strict=True))


def test_a_failed_pass_counts_nothing() -> None:
    measured = meter()
    with pytest.raises(KeyError, match="from the step"), measured.counting():
        raise KeyError("from the step")
    measured.of_step(1.0, {}, 1)
    assert measured.flops_per_step == {}


def test_a_trace_is_written_and_loads(tmp_path: Path) -> None:
    run(tmp_path / "run", "--batch_size", "2", "--max_train_steps", "4", "--profile", "1:2")
    trace = json.loads((tmp_path / "run" / "profile" / "rank-0.json").read_text())
    names = [event.get("name") for event in trace["traceEvents"]]
    assert names.count("Optimizer.step#AdamW.step") == 2  # the two steps, and no other
    assert "aten::addmm" in names
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    trained = [record for record in records if record["kind"] == "train"]
    products = 2 + 2 + 1  # of 16 x 32 each: forward and weight gradients of both layers, input gradient of the second
    assert trained[0]["tflops_per_s"] * trained[0]["step_s"] * 1e12 == pytest.approx(2 * (2 * products * 16 * 32))
