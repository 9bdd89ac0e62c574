"""What decides whether a run may begin: the data that its processes see, and how its checkpoint was launched."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from accelerate import DistributedType

from common import training
from common.checkpoint import CheckpointError
from common.config import Change


def test_processes_that_see_other_data_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    training._require_same_data(5, {"files": "a"})
    monkeypatch.setattr(training, "gather_object", lambda found: [*found, *found, '4 items, {"files": "b"}'])
    with pytest.raises(ValueError) as raised:
        training._require_same_data(5, {"files": "a"})
    assert str(raised.value) == (
        'processes see different training data: this one 5 items, {"files": "a"}, process 2 4 items, {"files": "b"}. '
        "Start again when nothing writes into the data any more and all nodes see the same files"
    )


def changed(saved: dict, now: str, precision: str, num_processes: int = 2) -> list[Change]:
    kind = DistributedType.DEEPSPEED if now == "DeepSpeed" else DistributedType.MULTI_GPU
    accelerator: Any = SimpleNamespace(distributed_type=kind, num_processes=num_processes, mixed_precision=precision)
    return training._changed_launch(Path("run/checkpoint-2"), {"world_size": 2, **saved}, accelerator)


def test_a_launch_may_change_where_the_state_does_not_depend_on_it() -> None:
    assert changed({}, "DDP", "fp16") == []  # of a checkpoint that does not tell
    plain, sharded = ({"uses_deepspeed": deepspeed, "precision": "bf16"} for deepspeed in (False, True))
    assert changed(plain, "DDP", "bf16", num_processes=8) == [] and changed(sharded, "DeepSpeed", "bf16") == []
    assert [str(change) for change in changed(plain, "DDP", "no")] == [
        "the precision: 'bf16' in the checkpoint, 'no' now"
    ]
    with pytest.raises(CheckpointError) as raised:
        changed(plain, "DDP", "fp16")
    assert str(raised.value) == (
        "run/checkpoint-2 was made in precision bf16, so it lacks the loss scale of fp16: go on in bf16"
    )
    for saved, now, num_processes in ((sharded, "DeepSpeed", 4), (sharded, "DDP", 2), (plain, "DeepSpeed", 2)):
        with pytest.raises(CheckpointError, match="DeepSpeed saves each process's share"):
            changed(saved, now, "bf16", num_processes)
    with pytest.raises(CheckpointError, match="made by 2 processes with DeepSpeed, and this run is 4 processes with"):
        changed(sharded, "DeepSpeed", "bf16", 4)
