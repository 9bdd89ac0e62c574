"""Two networks that take turns, each with its optimizer, as in a GAN."""

import shutil
from pathlib import Path

import pytest
import torch
from processes import assert_same_state, metrics, run
from safetensors.torch import load_file

FLAGS = ("data.alternate=true", "--use_ema", "true")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 steps, never stopped: even ones train the model, odd ones the critic."""
    folder = tmp_path_factory.mktemp("two") / "whole"
    flags = ("--batch_size", "1", "--gradient_accumulation_steps", "4", "--checkpointing_steps", "1")
    run(folder, *FLAGS, *flags, "--max_train_steps", "12")
    return folder


def critic(output_dir: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(output_dir / f"checkpoint-{step}" / "critic" / "model.safetensors")


def test_each_kind_of_step_trains_its_own_network(whole: Path) -> None:
    trained = [record for record in metrics(whole) if record["kind"] != "validation"]
    assert [record["kind"] for record in trained] == ["train", "train_critic"] * 6
    for step in range(1, 11):
        frozen = {"model": step % 2 == 1, "critic": step % 2 == 0}  # step 1, the second, is the critic's
        for name, stays in frozen.items():
            before, after = (
                load_file(whole / f"checkpoint-{s}" / name / "model.safetensors") for s in (step, step + 1)
            )
            assert all(torch.equal(before[key], after[key]) for key in before) == stays, (step, name)
    optimizers = sorted(path.name for path in (whole / "checkpoint-12").glob("optimizer*"))
    assert optimizers == ["optimizer.bin", "optimizer_1.bin"]


def test_processes_and_accumulation_change_nothing_not_even_dropout(whole: Path, tmp_path: Path) -> None:
    flags = ("--batch_size", "1", "--gradient_accumulation_steps", "2", "--max_train_steps", "12")
    run(tmp_path / "run", *FLAGS, *flags, processes=2)
    for ours, reference in zip(metrics(tmp_path / "run"), metrics(whole), strict=True):
        assert ours["kind"] == reference["kind"]
        for name in ("loss", "grad_norm", "error"):
            if name in reference:
                assert ours[name] == pytest.approx(reference[name], rel=1e-5), (ours["step"], name)
    for key, value in critic(whole, 12).items():
        torch.testing.assert_close(critic(tmp_path / "run", 12)[key], value, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("step", [5, 6])
def test_resume_is_bit_exact_before_a_step_of_either(whole: Path, tmp_path: Path, step: int) -> None:
    cut = tmp_path / "run"
    shutil.copytree(whole, cut)
    for newer in range(step + 1, 13):
        shutil.rmtree(cut / f"checkpoint-{newer}")
    shutil.rmtree(cut / "export")
    flags = ("--batch_size", "1", "--gradient_accumulation_steps", "4", "--resume_from_checkpoint", "latest")
    assert f"at step {step}" in run(cut, *FLAGS, *flags, "--max_train_steps", "12")
    assert metrics(cut) == metrics(whole)
    assert_same_state(cut, whole, 12)
    assert all(torch.equal(value, critic(cut, 12)[key]) for key, value in critic(whole, 12).items())
    ours, theirs = (
        torch.load(d / "checkpoint-12" / "optimizer_1.bin", weights_only=True)["state"] for d in (cut, whole)
    )
    assert all(
        torch.equal(ours[i][k].float(), theirs[i][k].float()) for i in theirs for k in ("exp_avg", "exp_avg_sq", "step")
    )


def test_a_diverging_critic_stops_the_run_though_the_model_is_finite(tmp_path: Path) -> None:
    flags = ("--batch_size", "2", "--max_train_steps", "20", "--max_nonfinite_steps", "2", "data.nan_critic=true")
    output = run(tmp_path / "run", *FLAGS, *flags, status=1)
    assert "step 5 of the critic (samples 10 to 11): 3 steps in a row were not finite" in output
    assert "nonfinite/step-1/record.json" in output
    records = [r["loss"] is None for r in metrics(tmp_path / "run") if r["kind"] != "validation"]
    assert records == [False, True] * 2 + [False]


def test_both_kinds_are_logged_whatever_the_interval(tmp_path: Path) -> None:
    flags = ("--batch_size", "2", "--max_train_steps", "9", "--log_every_steps", "4")
    run(tmp_path / "run", *FLAGS, *flags)
    records = [(r["step"], r["kind"]) for r in metrics(tmp_path / "run") if r["kind"] != "validation"]
    assert records == [(1, "train"), (4, "train_critic"), (5, "train"), (8, "train_critic"), (9, "train")]
