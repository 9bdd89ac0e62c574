"""The loop under FSDP2, on the CPU."""

import copy
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from processes import BASE, TINY, assert_same_state, metrics, weights
from processes import run as run_plain
from torch import nn

from common.checkpoint import load_average, read_weights, save_average, save_weights
from common.optim import EMA
from common.sharding import Sharding, is_sharded, load_weights, shard, sharding_of_launcher, whole

ROOT = Path(__file__).parents[2]
FLAGS = ("--batch_size", "2", "--use_ema", "--checkpointing_steps", "3", "--max_train_steps", "6")


def run(output_dir: Path, *flags: str, processes: int = 2, status: int = 0) -> str:
    """Runs the tiny trainer as the documented launcher file says, and returns what it printed."""
    command = [str(Path(sys.executable).with_name("accelerate")), "launch", "--num_processes", str(processes)]
    command += ["--config_file", str(ROOT / "accelerate_configs" / "fsdp2.yaml"), "--mixed_precision", "no"]
    command += ["--main_process_port", "0", str(TINY), "--output_dir", str(output_dir), *BASE, *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, cwd=output_dir.parent)
    assert (done.returncode == 0) == (status == 0), done.stdout + done.stderr
    return done.stdout + done.stderr


def cut_after_3(whole_run: Path, cut: Path) -> None:
    shutil.copytree(whole_run, cut)
    for name in ("checkpoint-6", "export"):
        shutil.rmtree(cut / name)


def assert_close(ours: Path, reference: Path) -> None:
    """Two runs computed the same, up to the order of summation."""
    for left, right in zip(metrics(ours), metrics(reference), strict=True):
        for name in ("loss", "grad_norm", "lr", "error"):
            if name in right:
                assert left[name] == pytest.approx(right[name], rel=1e-5), (right["step"], name)
    for folder in ("model", "model_ema"):
        left, right = (read_weights(d / "checkpoint-6" / folder) for d in (ours, reference))
        for key, value in right.items():
            torch.testing.assert_close(left[key], value, rtol=1e-5, atol=1e-6)


def test_it_computes_what_plain_training_does(tmp_path: Path) -> None:
    flags = [*FLAGS, "--gradient_accumulation_steps", "2", "--max_grad_norm", "0.3"]
    assert "sharded over the processes" in run(tmp_path / "sharded", *flags)
    run_plain(tmp_path / "plain", *flags, processes=2)
    assert_close(tmp_path / "sharded", tmp_path / "plain")


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "precision"), [(1, "no"), (2, "no"), (2, "bf16")])
def test_resume_is_bit_exact(tmp_path: Path, processes: int, precision: str) -> None:
    flags = [*FLAGS, "--gradient_accumulation_steps", "2", "--mixed_precision", precision]
    run(tmp_path / "whole", *flags, processes=processes)
    cut_after_3(tmp_path / "whole", tmp_path / "cut")
    assert "at step 3" in run(tmp_path / "cut", *flags, "--resume_from_checkpoint", "latest", processes=processes)
    assert metrics(tmp_path / "cut") == metrics(tmp_path / "whole")
    assert_same_state(tmp_path / "cut", tmp_path / "whole", 6)


@pytest.mark.slow
def test_half_precision_is_that_of_plain_training(tmp_path: Path) -> None:
    run(tmp_path / "sharded", *FLAGS, "--mixed_precision", "bf16")
    run_plain(tmp_path / "plain", *FLAGS, "--mixed_precision", "bf16", processes=2)
    for ours, reference in zip(metrics(tmp_path / "sharded"), metrics(tmp_path / "plain"), strict=True):
        for name in {"loss", "grad_norm", "error"} & set(reference):
            assert ours[name] == pytest.approx(reference[name], rel=2e-3), (reference["step"], name)
    assert all(value.dtype == torch.float32 for value in weights(tmp_path / "sharded", 6).values())


@pytest.mark.slow
def test_a_run_may_change_between_sharded_and_plain_and_in_the_number_of_processes(tmp_path: Path) -> None:
    flags, resume = [*FLAGS], ("--resume_from_checkpoint", "latest")
    run(tmp_path / "sharded", *flags)  # 2 x 2
    cut_after_3(tmp_path / "sharded", tmp_path / "to-plain")
    cut_after_3(tmp_path / "sharded", tmp_path / "to-one")
    one = [*flags, "--gradient_accumulation_steps", "2"]
    run_plain(tmp_path / "to-plain", *one, *resume)
    run(tmp_path / "to-one", *one, *resume, processes=1)
    run_plain(tmp_path / "plain", *one)
    cut_after_3(tmp_path / "plain", tmp_path / "to-sharded")
    run(tmp_path / "to-sharded", *flags, *resume)
    for name in ("to-plain", "to-one", "to-sharded"):
        assert_close(tmp_path / name, tmp_path / "plain")


@pytest.mark.slow
def test_a_nonfinite_step_is_skipped_by_all_and_can_be_replayed(tmp_path: Path) -> None:
    flags = [*FLAGS, "--nan_samples", "5"]  # which one of the processes sees
    output = run(tmp_path / "run", *flags)
    assert all(f"[rank {rank}] WARNING step 1 of the model (samples 4 to 7) was skipped" in output for rank in (0, 1))
    run_plain(tmp_path / "plain", *flags, processes=2)
    for left, right in zip(weights(tmp_path / "run", 6).items(), weights(tmp_path / "plain", 6).items(), strict=True):
        torch.testing.assert_close(left[1], right[1], rtol=1e-5, atol=1e-6)
    found = "it begins in the loss itself"
    for name, start in (("run", run), ("plain", run_plain)):
        record = tmp_path / name / "nonfinite" / "step-1" / "record.json"
        assert found in start(tmp_path / name, *flags, "--replay", str(record), processes=2)


def test_what_cannot_be_sharded_is_refused(tmp_path: Path) -> None:
    output = run(tmp_path / "run", *FLAGS, "--alternate", "true", status=1)
    assert "error: FSDP shards one network per run, and this trainer trains two in turns" in output


# In this process ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("FSDP_VERSION", "1", "fsdp_version must be 2"),
        ("FSDP_AUTO_WRAP_POLICY", "SIZE_BASED_WRAP", "must be one of NO_WRAP, TRANSFORMER_BASED_WRAP"),
        ("FSDP_OFFLOAD_PARAMS", "true", "fsdp_offload_params must be false"),
        ("FSDP_ACTIVATION_CHECKPOINTING", "true", "gradient_checkpointing does it"),
    ],
)
def test_launcher_settings_that_do_not_work_are_refused(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, text: str
) -> None:
    monkeypatch.setenv(name, value)
    assert sharding_of_launcher() is None
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", value if name == "FSDP_VERSION" else "2")
    with pytest.raises(ValueError, match=text):
        sharding_of_launcher()


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(3, 4)
        self.block = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4, bias=False))
        self.head = nn.Linear(4, 1).requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.block(self.embed(x)))


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def sharded(net: nn.Module, precision: str = "no") -> tuple[nn.Module, torch.optim.Optimizer]:
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], 0.1, fused=True)
    shard(net, optimizer, Sharding(True, ("Sequential",), True), torch.device("cpu"), precision)
    return net, optimizer


def train(net: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    net(torch.ones(2, 3)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.usefixtures("one_process")
def test_a_whole_network_is_what_it_was_before(tmp_path: Path) -> None:
    plain = Net()
    net, optimizer = sharded(copy.deepcopy(plain))
    assert is_sharded(net) and is_sharded(net.block)
    save_weights(net, tmp_path / "sharded")
    save_weights(plain, tmp_path / "plain")
    ours, theirs = (tmp_path / name / "model.safetensors" for name in ("sharded", "plain"))
    assert ours.read_bytes() == theirs.read_bytes()
    parts = list(net.parameters())
    with whole(net):
        assert type(net) is Net and not is_sharded(net) and not net._forward_hooks and not net.block._forward_hooks
        assert [type(p) for p in net.parameters()] == [nn.Parameter] * len(parts)
        assert [p.requires_grad for p in net.parameters()] == [p.requires_grad for p in parts]
        assert torch.equal(net(torch.ones(2, 3)), plain(torch.ones(2, 3)))
        assert torch.equal(net.block(torch.ones(2, 4)), plain.block(torch.ones(2, 4)))  # and not from its root
    assert is_sharded(net) and all(a is b for a, b in zip(net.parameters(), parts, strict=True))
    plain_optimizer = torch.optim.AdamW([p for p in plain.parameters() if p.requires_grad], 0.1, fused=True)
    for _ in range(2):
        train(net, optimizer)
        train(plain, plain_optimizer)
    assert all(torch.equal(a.full_tensor(), b) for a, b in zip(net.parameters(), plain.parameters(), strict=True))


@pytest.mark.usefixtures("one_process")
def test_states_pass_between_sharded_and_plain() -> None:
    plain = Net()
    net, optimizer = sharded(copy.deepcopy(plain))
    train(net, optimizer)
    state = copy.deepcopy(optimizer.state_dict())
    assert all(type(v) is torch.Tensor for values in state["state"].values() for v in values.values())
    other, other_optimizer = sharded(Net())
    with whole(net):
        load_weights(other, net.state_dict())
        plain.load_state_dict(net.state_dict())
    other_optimizer.load_state_dict(copy.deepcopy(state))
    plain_optimizer = torch.optim.AdamW([p for p in plain.parameters() if p.requires_grad], 0.1, fused=True)
    plain_optimizer.load_state_dict(copy.deepcopy(state))
    for model, its_optimizer in ((net, optimizer), (other, other_optimizer), (plain, plain_optimizer)):
        train(model, its_optimizer)
    for a, b, c in zip(net.parameters(), other.parameters(), plain.parameters(), strict=True):
        assert torch.equal(a.full_tensor(), b.full_tensor()) and torch.equal(a.full_tensor(), c)


@pytest.mark.usefixtures("one_process")
def test_an_average_is_saved_whole(tmp_path: Path) -> None:
    plain = Net()
    net, optimizer = sharded(copy.deepcopy(plain))
    average, reference = EMA(net, 0.9), EMA(plain, 0.9)
    average.update(), reference.update()
    train(net, optimizer)
    with whole(net):
        plain.load_state_dict(net.state_dict())
    for ema, name in ((average, "sharded"), (reference, "plain")):
        ema.update()
        save_average(ema, tmp_path / name)
    ours, theirs = read_weights(tmp_path / "sharded"), read_weights(tmp_path / "plain")
    assert all(torch.equal(ours[key], value) for key, value in theirs.items())
    again = EMA(net, 0.9)
    load_average(again, tmp_path / "plain")
    assert all(torch.equal(a, b) for a, b in zip(again.average, average.average, strict=True))


@pytest.mark.usefixtures("one_process")
def test_vectors_are_not_rounded_in_half_precision() -> None:
    net, _ = sharded(Net(), "bf16")
    seen = {}
    net.block[0].register_forward_hook(lambda module, *_: seen.update(norm=module.weight.dtype))
    net.block[1].register_forward_pre_hook(lambda module, _: seen.update(matrix=module.weight.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        net(torch.ones(2, 3)).sum().backward()
    assert seen == {"norm": torch.float32, "matrix": torch.bfloat16}
    assert {p.grad.dtype for p in net.parameters() if p.grad is not None} == {torch.float32}


@pytest.mark.usefixtures("one_process")
def test_8_bit_states_are_refused() -> None:
    class AdamW8bit(torch.optim.AdamW):
        __module__ = "bitsandbytes.optim"

    net = Net()
    with pytest.raises(ValueError, match="use_8bit_adam does not work with FSDP"):
        shard(net, AdamW8bit(net.parameters()), Sharding(True, (), True), torch.device("cpu"), "no")
