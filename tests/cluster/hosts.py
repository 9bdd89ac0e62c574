"""Two machines on one: network namespaces with a wire between them, each with its own name, mounts and process ids."""

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from running import BIN, ROOT

WIRE, PORT, END_S = "lan0", 29500, 400.0
WITHOUT_GPU = {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}


@dataclass(frozen=True)
class Host:
    """A machine: what it is called, its network namespace and its address there."""

    name: str
    namespace: str
    address: str

    def command(self, *words: object, unshared: Path | None = None) -> list[str]:
        """`words` as a command on this machine; the folder `unshared` is an empty one of its own there."""
        mount = f'mount -t tmpfs tmpfs "{unshared}" && ' if unshared else ""
        separate = ["unshare", "--uts", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
        inside = ["ip", "netns", "exec", self.namespace, *separate]
        return [*inside, "sh", "-c", f'hostname {self.name} && {mount}exec "$@"', "sh", *map(str, words)]

    def kill(self) -> None:
        """Ends all of its processes at once, without a chance to say anything."""
        listed = subprocess.run(["ip", "netns", "pids", self.namespace], capture_output=True, text=True, check=True)
        for word in listed.stdout.split():
            try:
                os.kill(int(word), signal.SIGKILL)
            except ProcessLookupError:  # it went with another one
                pass

    def unplug(self) -> None:
        """No packet passes any more, not even the one that says that a connection has ended."""
        _ip("-n", self.namespace, "link", "set", WIRE, "down")


@contextmanager
def two_hosts() -> Iterator[tuple[Host, Host]]:
    """Two machines that see each other and nothing else, gone after the block; CalledProcessError without the right."""
    number = os.getpid()
    hosts = (
        Host("first", f"trainers-{number}-first", "10.213.7.1"),
        Host("second", f"trainers-{number}-second", "10.213.7.2"),
    )
    try:
        for host in hosts:
            _ip("netns", "add", host.namespace)
        # Either end is made in its namespace: the machine's own network has no part in it.
        ends = [["netns", host.namespace, "name", WIRE] for host in hosts]
        _ip("link", "add", *ends[0][2:], *ends[0][:2], "type", "veth", "peer", *ends[1][2:], *ends[1][:2])
        for host in hosts:
            _ip("-n", host.namespace, "addr", "add", f"{host.address}/24", "dev", WIRE)
            for interface in ("lo", WIRE):
                _ip("-n", host.namespace, "link", "set", interface, "up")
        yield hosts
    finally:
        for host in hosts:
            if Path("/run/netns", host.namespace).exists():
                host.kill()
                _ip("netns", "delete", host.namespace)  # the wire goes with its ends


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


def why_not() -> str:
    """Why two machines cannot be made here; empty if they can."""
    for program in ("ip", "unshare"):
        if not shutil.which(program):
            return f"needs the program {program}"
    try:
        with two_hosts() as (first, _):
            subprocess.run(first.command("true", unshared=Path("/mnt")), check=True, capture_output=True, text=True)
    except subprocess.CalledProcessError as error:
        return f"needs the right to make network namespaces: {error.stderr.strip()}"
    return ""


class Launched:
    """The documented command for several machines, started on each of two, with one process on either.

    Args:
        words: the script and its arguments.
        folder: where users stand.
        logs: where the output is kept.
        config: a launcher file, in which {rank} is the machine's.
        unshared: a folder that the second machine has for itself.
    """

    def __init__(
        self,
        hosts: tuple[Host, Host],
        words: Sequence[object],
        folder: Path,
        logs: Path,
        *,
        config: str = "multi_node.yaml",
        unshared: Path | None = None,
    ):
        self.outputs = [logs / f"{host.name}.log" for host in hosts]
        variables = {**os.environ, **WITHOUT_GPU, "GLOO_SOCKET_IFNAME": WIRE}
        self.processes = []
        for rank, (host, log) in enumerate(zip(hosts, self.outputs, strict=True)):
            file = ROOT / "accelerate_configs" / config.format(rank=rank)
            launch = [BIN / "accelerate", "launch", "--config_file", file]
            launch += ["--num_machines", 2, "--num_processes", 2, "--machine_rank", rank, "--mixed_precision", "no"]
            launch += ["--main_process_ip", hosts[0].address, "--main_process_port", PORT, *words]
            command = host.command(*launch, unshared=unshared if rank else None)
            with open(log, "wb") as output:
                self.processes.append(
                    subprocess.Popen(command, cwd=folder, stdout=output, stderr=output, env=variables)
                )

    def output(self, rank: int) -> str:
        """What was printed on the machine of this rank."""
        return self.outputs[rank].read_text(errors="replace")

    def wait(self) -> list[int]:
        """The exit status on either machine; TimeoutExpired after some minutes."""
        deadline = time.monotonic() + END_S
        return [process.wait(max(deadline - time.monotonic(), 1)) for process in self.processes]
