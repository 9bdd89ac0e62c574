"""Mutations of what a run reads back: always a sentence of ours, never an error that nobody wrote, never a hang."""

import json
import shutil
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from processes import metrics

from common.cache import Cache, CacheError
from common.checkpoint import CheckpointError, find, newest_valid, problems_of, seal
from common.config import LogConfig
from common.data import SampleLoader, SamplePlan
from common.log import RunLog

QUICK = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


def make_checkpoint(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "model").mkdir(parents=True)
    (folder / "model" / "weights.bin").write_bytes(bytes(range(256)))
    (folder / "trainer_state.json").write_text('{"step": 1}')
    seal(folder)
    return folder


@QUICK
@given(data=st.data())
def test_any_changed_byte_of_a_checkpoint_is_seen(tmp_path: Path, data: st.DataObject) -> None:
    folder = make_checkpoint(tmp_path / "checkpoint-1")
    path = folder / data.draw(st.sampled_from(["model/weights.bin", "trainer_state.json"]))
    content = bytearray(path.read_bytes())
    place = data.draw(st.integers(0, len(content) - 1))
    content[place] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content[: data.draw(st.integers(place + 1, len(content)))])
    (problem,) = problems_of(folder)
    assert path.name in problem
    assert newest_valid(tmp_path) is None


@QUICK
@given(data=st.data())
def test_any_damage_to_a_manifest_is_survived(tmp_path: Path, data: st.DataObject) -> None:
    folder = make_checkpoint(tmp_path / "checkpoint-1")
    path = folder / "manifest.json"
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    assert all(isinstance(problem, str) and problem for problem in problems_of(folder))


@QUICK
@given(manifest=JSON, files=JSON)
def test_any_json_as_a_manifest_is_refused(tmp_path: Path, manifest: object, files: object) -> None:
    folder = make_checkpoint(tmp_path / "checkpoint-1")
    for content in (manifest, {"format": 1, "files": files}):
        (folder / "manifest.json").write_text(json.dumps(content))
        assert problems_of(folder)


@QUICK
@given(names=st.lists(st.text("checkpoint-0123456789abz._", min_size=1, max_size=14), max_size=6))
def test_any_names_in_the_run_folder(tmp_path: Path, names: list[str]) -> None:
    accelerator, folder = Accelerator(cpu=True), tmp_path / "run"
    shutil.rmtree(folder, ignore_errors=True)
    for name in names:
        if name.strip("."):
            (folder / name).mkdir(parents=True, exist_ok=True)
    for wanted in (None, "latest", *names):
        try:
            found = find(accelerator, folder, wanted)
        except CheckpointError as error:
            assert str(error)
        else:
            assert found is None


@QUICK
@given(lines=st.lists(st.text(max_size=20) | JSON.map(json.dumps), max_size=5))
def test_any_lines_in_the_metrics(tmp_path: Path, lines: list[str]) -> None:
    folder = tmp_path / "run"
    folder.mkdir(exist_ok=True)
    path = folder / "metrics.jsonl"
    path.write_text("\n".join(['{"step": 1, "kind": "train"}', *lines]), encoding="utf-8", errors="replace")
    RunLog(folder, LogConfig(report_to="none"), {}, is_main=True).begin(1)
    assert metrics(folder)[0] == {"step": 1, "kind": "train"}
    (folder / "bad_samples.jsonl").write_bytes(path.read_bytes())
    settings = {"micro_batch": 1, "rank": 0, "world_size": 1, "num_workers": 0, "max_bad_fraction": 0.5}
    source: Any = range(4)
    loader = SampleLoader(source, SamplePlan(4, 0, 1), bad_samples_path=folder / "bad_samples.jsonl", **settings)
    assert all(isinstance(item, int) for item in loader.bad_items)


@QUICK
@given(content=JSON)
def test_any_json_as_a_fingerprint(tmp_path: Path, content: object) -> None:
    folder = tmp_path / "cache"
    folder.mkdir(exist_ok=True)
    (folder / "fingerprint.json").write_text(json.dumps(content))
    try:
        Cache(folder, {"weights": "abc"})
    except CacheError as error:
        assert str(folder) in str(error)
    else:
        raise AssertionError(f"{content!r} was taken for the fingerprint of other weights")
