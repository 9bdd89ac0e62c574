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
    workers = [_Worker(check, timeout_s) for _ in range(min(processes, len(items)))]
    busy = list(workers)
    try:
        for worker, index in zip(workers, todo, strict=False):
            worker.give(index, items[index].content)
        while busy:
            _wait(busy)
            for worker in list(busy):
                verdict = worker.verdict()
                if verdict is None:
                    continue
                index, (reason, seconds) = worker.index, verdict
                results[index] = Result(items[index].name, not reason, reason, seconds)
                on_result(index, results[index])
                following = next(todo, None)
                if following is None:
                    busy.remove(worker)
                else:
                    worker.give(following, items[following].content)
    finally:
        for worker in workers:
            worker.end()
    return [results[index] for index in range(len(items))]


class _Worker:
    """A child process at work on one item at a time; a lost one is replaced with the next item."""

    def __init__(self, check: Check, timeout_s: float):
        self.check, self.timeout_s = check, timeout_s
        self.process: Any = None
        self.connection: Any = None
        self.index, self.content, self.started, self.num_given = -1, None, 0.0, 0

    def give(self, index: int, content: Any) -> None:
        if self.process is None:
            self._start()
        self.index, self.content, self.started = index, content, time.monotonic()
        self.num_given += 1
        try:
            self.connection.send(content)
        except (BrokenPipeError, ConnectionResetError):
            pass  # it died while it was idle: `verdict` sees that

    def verdict(self) -> tuple[str, float] | None:
        """(reason, seconds) of the present item, with "" for a usable one; None while that is not known."""
        is_alive = self.process.is_alive()  # before its message is looked for, which may be its last deed
        elapsed_s = time.monotonic() - self.started
        try:
            if self.connection.poll():
                return self.connection.recv()
            if is_alive and elapsed_s < self.timeout_s:
                return None
        except (EOFError, OSError):
            self.process.join(KILL_WAIT_S)
            is_alive = False
        exitcode, num_given = self.process.exitcode, self.num_given
        self.end()
        if is_alive or exitcode == -signal.SIGALRM:
            return f"checking it takes more than {self.timeout_s:g} s", elapsed_s
        if num_given > 1:
            self.give(self.index, self.content)
            return None
        return _how_it_ended(exitcode), elapsed_s

    def end(self) -> None:
        if self.process is None:
            return
        self.process.kill()
        self.process.join(KILL_WAIT_S)
        self.connection.close()
        self.process = None

    def _start(self) -> None:
        context = multiprocessing.get_context("fork")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(
            target=_serve, args=(theirs, self.check, self.timeout_s, os.getpid()), daemon=True, name="doctor"
        )
        self.process.start()
        theirs.close()  # else the pipe would stay open when the child is gone
        self.num_given = 0


def _wait(busy: Sequence[_Worker]) -> None:
    """Until one of them has something to tell or has used up its time."""
    deadline = min(worker.started + worker.timeout_s for worker in busy)
    channels = [channel for worker in busy for channel in (worker.connection, worker.process.sentinel)]
    connection.wait(channels, max(0.0, deadline - time.monotonic()))


def _how_it_ended(exitcode: int | None) -> str:
    if exitcode is None or exitcode >= 0:
        return f"checking it ends the process with status {exitcode}"
    note = " (the machine may be short of memory)" if exitcode == -signal.SIGKILL else ""
    names = {int(number): number.name for number in signal.Signals}
    return f"checking it ends the process with {names.get(-exitcode, f'signal {-exitcode}')}{note}"


def _serve(channel: Any, check: Check, timeout_s: float, parent_pid: int) -> None:
    """What a child does: check what it is sent, answer (reason, seconds), until its parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the parent ends the children itself
    for number in (signal.SIGTERM, signal.SIGALRM):
        signal.signal(number, signal.SIG_DFL)
    while True:
        # The pipe does not close with the parent: children started later hold copies of its end.
        while not channel.poll(PARENT_CHECK_S):
            if os.getppid() != parent_pid:
                return
        try:
            content = channel.recv()
        except (EOFError, OSError):  # the parent is gone
            return
        signal.alarm(math.ceil(timeout_s + KILL_WAIT_S))  # ends a child that hangs when its parent is gone
        start = time.monotonic()
        reason = _reason(check, content)
        signal.alarm(0)
        try:
            channel.send((reason, time.monotonic() - start))
        except OSError:
            return


def _reason(check: Check, content: Any) -> str:
    try:
        check(content)
    except Exception as error:  # noqa: BLE001 (whatever a decoder raises, training would meet it too)
        is_plain = isinstance(error, (ValueError, OSError)) and str(error)
        return (str(error) if is_plain else f"{type(error).__name__}: {error}")[:LONGEST_REASON]
    return ""
