"""Tries every item of a data set in child processes that may crash or hang: the scan goes on without them.

What an item is and when it can be used is up to the caller: see `scripts/doctor.py`.
"""

import math
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing import connection
from pathlib import Path
from typing import Any

PARENT_CHECK_S = 1.0  # how often an idle child looks whether its parent still lives
KILL_WAIT_S = 5.0  # a process that waits for a dead network disk does not even end when killed
LONGEST_REASON = 2000  # characters

Check = Callable[[Any], None]


@dataclass(frozen=True)
class Item:
    """One item of a data set: a unique name, the files that it is read from, and what its check function is given."""

    name: str
    files: tuple[Path, ...]
    content: Any


@dataclass(frozen=True)
class Result:
    """Can an item be used; if not, why (otherwise ""); and how long that took to find out."""

    name: str
    ok: bool
    reason: str
    seconds: float


def scan(
    items: Sequence[Item],
    check: Check,
    processes: int,
    timeout_s: float,
    on_result: Callable[[int, Result], None],
) -> list[Result]:
    """Call `check(item.content)` for every item, each in one of several child processes.

    An item is usable if `check` returns. It is not if `check` raises an exception, ends its process or takes too long;
    such a process is replaced. A process that ends at a later item than its first may have been damaged by an earlier
    one, so that item gets a second try in a new process.

    Args:
        check: runs in the children. Items are pickled on their way there.
        processes: children at work at a time, at least 1.
        timeout_s: how long one item may take, above 0.
        on_result: called in this process with (index, result) as soon as an item is finished.

    Returns:
        One result per item, in the order of the items. No child is left, whether it returns or raises.
    """
    if processes < 1:
        raise ValueError(f"processes is {processes}, but must be at least 1")
    if not 0 < timeout_s < math.inf:
        raise ValueError(f"timeout_s is {timeout_s:g}, but must be above 0 and finite")
    results: dict[int, Result] = {}
    todo = iter(range(len(items)))
    children: list[_Child] = []
    try:
        for index in (i for i, _ in zip(todo, range(min(processes, len(items))), strict=False)):
            children.append(_Child(check, timeout_s))
            children[-1].give(index, items[index].content)
        while children:
            _wait(children)
            for child in list(children):
                outcome = child.outcome()
                if outcome is None:
                    continue
                index, is_done = child.index, outcome.is_final
                if is_done:
                    result = Result(items[index].name, not outcome.reason, outcome.reason, outcome.seconds)
                    results[index] = result
                    on_result(index, result)
                if outcome.is_child_lost or (following := next(todo, None) if is_done else index) is None:
                    following = next(todo, None) if is_done and outcome.is_child_lost else index
                child = _succeed(children, child, outcome, following)
    finally:
        for child in children:
            child.end()
    return [results[index] for index in range(len(items))]
