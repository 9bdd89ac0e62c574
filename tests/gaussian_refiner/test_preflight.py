"""`--preflight` on a tiny checkpoint: what it says, what it leaves behind, and what it refuses."""

import re
import shutil
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image
from running import train

from common import preflight

SMALL = "--height_px 64 --num_inference_steps 2 --report_to none --train_batch_size 2 --preflight".split()


def run_preflight(capsys: pytest.CaptureFixture[str], *flags: str) -> tuple[int, str, str]:
    """Exit status, standard output and standard error of a preflight in this process."""
    with pytest.raises(SystemExit) as caught:
        train("gaussian_refiner", *SMALL, *flags)
    return int(caught.value.code or 0), *capsys.readouterr()


def test_it_tries_everything_and_leaves_nothing(
    tmp_path: Path, in_data_folder: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output_dir = tmp_path / "run"
    flags = ("--pretrained_model_name_or_path", str(checkpoint), "--output_dir", str(output_dir), "--use_ema")
    status, output, errors = run_preflight(capsys, *flags, "--max_train_steps", "1000", "--checkpointing_steps", "400")
    assert status == 0, errors
    sheet = tmp_path / "run-preflight-samples.png"
    patterns = [
        "",
        "preflight",
        re.escape(f"data        samples are drawn in {sheet}: look at them"),
        r"micro-run   trained, validated, saved, resumed, exported in \d+\.\d s",
        r"step        \S+ s, \S+ samples/s",
        r"phases \(s\)  .*data .*forward .*backward .*optimizer .*validation \(1 item\) .*",
        r"memory      peak \d+\.\d\d GiB",
        r"disk        4 checkpoints of \d\.\d\d GiB and the export need \d\.\d\d GiB, [\d.]+ GiB are free",
        "verdict     ready to train",
    ]
    lines = output.splitlines()[-len(patterns) :]
    for line, pattern in zip(lines, patterns, strict=True):
        assert re.fullmatch(pattern, line), line
    assert [path.name for path in tmp_path.iterdir()] == [sheet.name]
    picture = np.asarray(Image.open(sheet))
    assert picture.ndim == 3 and picture.shape[0] > 64 and picture.shape[1] > 3 * 64 and picture.std() > 1


def test_what_an_earlier_run_left_is_not_touched(
    tmp_path: Path,
    in_data_folder: Path,
    checkpoint: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    output_dir = tmp_path / "run"
    output_dir.mkdir()
    (output_dir / "metrics.jsonl").write_text("an earlier run's")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda path: usage._replace(free=2**20))
    flags = ("--pretrained_model_name_or_path", str(checkpoint), "--output_dir", str(output_dir))
    status, output, errors = run_preflight(capsys, *flags, "--checkpoints_total_limit", "2")
    assert status == 1, errors
    disk, verdict = output.splitlines()[-2:]
    assert re.fullmatch(
        r"disk        3 checkpoints of \d\.\d\d GiB and the export need \d\.\d\d GiB, but only 0\.00 GiB are free: set "
        "--checkpoints_total_limit, or free some",
        disk,
    )
    assert verdict == "verdict     NOT ready"
    assert [path.name for path in output_dir.iterdir()] == ["metrics.jsonl"]
    assert (output_dir / "metrics.jsonl").read_text() == "an earlier run's"


class _Checkpoint(NamedTuple):
    checkpointing_steps: int
    checkpoints_total_limit: int | None


class _Run(NamedTuple):
    max_train_steps: int | None


class _Config(NamedTuple):
    run: _Run
    checkpoint: _Checkpoint


@pytest.mark.parametrize(
    ("max_train_steps", "total_limit", "kept"), [(1000, None, 4), (1000, 1, 2), (None, 5, 6), (None, None, 2)]
)
def test_the_disk_must_hold_one_checkpoint_more_than_are_kept(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    max_train_steps: int | None,
    total_limit: int | None,
    kept: int,
) -> None:
    for name, size_bytes in {
        "checkpoint-2/unet/weights": 1000,
        "checkpoint-2/state": 24,
        "export/weights": 500,
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(bytes(size_bytes))
    config, usage = _Config(_Run(max_train_steps), _Checkpoint(400, total_limit)), shutil.disk_usage(tmp_path)
    for spare_bytes, fits in ((0, True), (-1, False)):
        free = kept * 1024 + 500 + spare_bytes
        monkeypatch.setattr(preflight.shutil, "disk_usage", lambda path, free=free: usage._replace(free=free))
        ready, text = preflight._disk(config, tmp_path)
        assert ready is fits and text.startswith(f"disk        {kept} checkpoints of ")
        grows = max_train_steps is None and total_limit is None and fits
        assert text.endswith("; without --checkpoints_total_limit they will be more and more") is grows


def test_a_bad_checkpoint_is_one_sentence(
    tmp_path: Path, in_data_folder: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--output_dir", str(tmp_path / "run"), "--pretrained_model_name_or_path", str(checkpoint / "unet"))
    status, output, errors = run_preflight(capsys, *flags)
    assert status == 1 and "verdict" not in output
    assert "lacks feature_extractor" in errors and "Traceback" not in errors
    assert not (tmp_path / "run").exists()


def test_bad_data_is_one_sentence(
    tmp_path: Path, in_data_folder: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--output_dir", str(tmp_path / "run"), "--pretrained_model_name_or_path", str(checkpoint))
    status, _, errors = run_preflight(capsys, *flags, "--data_json", "nothing.json")
    assert status == 1
    assert "error: nothing.json was not found; tried" in errors and "set --data_json" in errors
    assert not (tmp_path / "run").exists()
