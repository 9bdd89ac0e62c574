"""What every process is doing, written down each second, so that a process that died or hangs is named by the others.

Each process has a thread that writes `watch/rank-<r>.json` in the run folder: phase, step, samples, time. It also reads
the files of the others. When one is gone, or the one that is furthest behind has not moved for too long, it says which
rank, in which phase, with which samples, and ends its own process, which may be waiting for that one for ever.
"""

import faulthandler
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

HEARTBEAT_S = 1.0
SILENT_S = 30.0  # a process of another machine that has written nothing for so long is gone
EXIT_STATUS = 1


class PeerLost(RuntimeError):
    """Another process of this run died or hangs; the text says which, where and with which samples."""


@dataclass
class Pulse:
    """What one process last wrote about itself."""

    token: str
    rank: int
    host: str
    machine: str
    pid: int
    phase: str = "start"
    step: int = 0
    samples: list[int] = field(default_factory=list)
    progress: int = 0  # phases entered and left; the process with the fewest is the one the others wait for
    beats: int = 0  # how often this was written

    def __str__(self) -> str:
        samples = f", samples {self.samples[0]} to {self.samples[-1]}" if self.samples else ""
        return (
            f"rank {self.rank} (process {self.pid} on {self.host}) in phase {self.phase} of step {self.step}{samples}"
        )


@dataclass
class _Observed:
    """When, by this machine's clock, a process was last seen to write and to move."""

    beats: int = -1
    heard: float = 0.0
    progress: int = -1
    moved: float = 0.0

    def update(self, pulse: Pulse, now: float) -> None:
        if pulse.beats != self.beats:
            self.beats, self.heard = pulse.beats, now
        if pulse.progress != self.progress:
            self.progress, self.moved = pulse.progress, now


class Watch:
    """The watchdog of one process, and the clock of its phases.

    Args:
        folder: shared by all processes.
        token: the same on all processes of this start of the run, and on no other.
        rank, num_processes: of this process.
        hang_timeout_s: how long one phase may last; 0 never gives up.
    """

    def __init__(self, folder: Path, token: str, rank: int, num_processes: int, hang_timeout_s: float):
        self.folder, self.num_processes, self.hang_timeout_s = folder, num_processes, hang_timeout_s
        self.pulse = Pulse(token, rank, socket.gethostname(), _machine(), os.getpid())
        self._observed = [_Observed() for _ in range(num_processes)]
        self.seconds: dict[str, float] = {}
        self.failed_phase = ""  # the innermost one that an exception has left
        self._ended, self._writing = threading.Event(), threading.Lock()
        folder.mkdir(parents=True, exist_ok=True)
        self._write()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="watch")
        self._thread.start()

    @contextmanager
    def phase(self, name: str, *, step: int | None = None, samples: list[int] | None = None) -> Iterator[None]:
        """Inside the block this process is in phase `name`; its duration is added to `seconds[name]`."""
        outer, started = self.pulse.phase, time.perf_counter()
        self._enter(name, step, samples)
        try:
            yield
        except BaseException:
            self.failed_phase = self.failed_phase or name
            raise
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started
            self._enter(outer)

    def _enter(self, name: str, step: int | None = None, samples: list[int] | None = None) -> None:
        pulse = self.pulse
        pulse.phase, pulse.progress = name, pulse.progress + 1
        pulse.step = pulse.step if step is None else step
        pulse.samples = pulse.samples if samples is None else samples

    def moved(self) -> None:
        """Still in the same phase, but not stuck: called between the items of long work."""
        self.pulse.progress += 1

    def take_seconds(self) -> dict[str, float]:
        """Seconds per phase since the last call."""
        seconds, self.seconds = self.seconds, {}
        return seconds

    def end(self) -> None:
        """Says that this process is done, so that nobody takes it for dead."""
        self._ended.set()
        self._thread.join()  # nothing is written after this
        self.pulse.phase = "end"
        self._write()

    def lost_peer(self) -> str | None:
        """Who died or hangs, in words; None if all is well."""
        now, pulses = time.monotonic(), [self.pulse, *self._peers()]
        for pulse in pulses:
            self._observed[pulse.rank].update(pulse, now)
        for pulse in pulses[1:]:
            silent_s = now - self._observed[pulse.rank].heard
            if pulse.phase != "end" and _is_gone(pulse, self.pulse.machine, silent_s):
                return f"{pulse} is gone (last heard of {silent_s:.0f} s ago)"
        last = min(pulses, key=lambda pulse: pulse.progress)
        stuck_s = now - self._observed[last.rank].moved
        if self.hang_timeout_s and last.phase not in ("end", "start") and stuck_s > self.hang_timeout_s:
            return f"{last} has not moved for {stuck_s:.0f} s (run.hang_timeout_s is {self.hang_timeout_s:g})"
        return None

    @contextmanager
    def naming_lost_peers(self) -> Iterator[None]:
        """A failed collective is reported as what it is: another process died. Everything else passes through."""
        try:
            yield
        except RuntimeError as error:
            if self.num_processes > 1 and not isinstance(error, PeerLost):
                lost = self._lost_after_failure()
                if lost:
                    raise PeerLost(self._message(lost)) from error
            raise

    def _lost_after_failure(self) -> str | None:
        """Who died, now that something failed: waits until those on other machines are heard again, or silent."""
        remote = {pulse.rank: pulse.beats for pulse in self._peers() if pulse.machine != self.pulse.machine}
        deadline = time.monotonic() + SILENT_S + 2 * HEARTBEAT_S
        time.sleep(2 * HEARTBEAT_S)  # the other one's end takes a moment to show
        while not (lost := self.lost_peer()):
            beats = {pulse.rank: pulse.beats for pulse in self._peers()}
            if all(beats.get(rank, before) > before for rank, before in remote.items()) or time.monotonic() > deadline:
                return None
            time.sleep(HEARTBEAT_S)
        return lost

    def _message(self, lost: str) -> str:
        return (
            f"{lost}; rank {self.pulse.rank}, in phase {self.pulse.phase} of step {self.pulse.step}, stops. Look at "
            "the last output of that process, then continue with --resume_from_checkpoint latest"
        )

    def _peers(self) -> list[Pulse]:
        pulses = []
        for rank in range(self.num_processes):
            if rank != self.pulse.rank:
                pulse = _read(self.folder / f"rank-{rank}.json")
                if pulse and pulse.token == self.pulse.token:
                    pulses.append(pulse)
        return pulses

    def _write(self) -> None:
        path = self.folder / f"rank-{self.pulse.rank}.json"
        temporary = path.with_suffix(f".{self.pulse.pid}.partial")
        with self._writing:  # one thread of the two, or the other would find its file renamed
            self.pulse.beats += 1
            try:
                temporary.write_text(json.dumps(asdict(self.pulse)))
                temporary.replace(path)
            except FileNotFoundError:
                if self.folder.parent.exists():
                    print(f"watch: {self.folder} was deleted: who dies or hangs is no longer told", file=sys.stderr)
                self._ended.set()  # of a run that failed and whose folder was deleted, nobody reads this
            except OSError as error:  # a full disk is reported where it matters, in the save
                print(f"watch: {path} cannot be written ({error})", file=sys.stderr)

    def _watch(self) -> None:
        while not self._ended.wait(HEARTBEAT_S):
            self._write()
            lost = self.lost_peer()
            if lost and not self._ended.wait(5 * HEARTBEAT_S) and self.lost_peer():
                # The main thread has had time to notice by itself; it must be waiting in a collective or be stuck.
                print(f"[rank {self.pulse.rank}] error: {self._message(lost)}", file=sys.stderr, flush=True)
                faulthandler.dump_traceback(all_threads=True)
                os._exit(EXIT_STATUS)


def _read(path: Path) -> Pulse | None:
    try:
        values: Mapping = json.loads(path.read_text())
        return Pulse(**values)
    except (OSError, ValueError, TypeError):
        return None


def _machine() -> str:
    """What the process ids of this machine are good for; containers on several machines may bear the same host name."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{socket.gethostname()} {boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # not Linux
        return socket.gethostname()


def _is_gone(pulse: Pulse, this_machine: str, silent_s: float) -> bool:
    if pulse.machine != this_machine:
        return silent_s > SILENT_S
    try:
        os.kill(pulse.pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return _is_zombie(pulse.pid)


def _is_zombie(pid: int) -> bool:
    """Killed, but not yet collected by its launcher."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (OSError, IndexError):
        return False
