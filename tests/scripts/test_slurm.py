"""The Slurm script between stand-ins for srun, scontrol and accelerate: what starts where, who gets which signal."""

import importlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from accelerate.commands.launch import launch_command_parser

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "slurm_train.sh"
EXAMPLES = [shlex.split(line) for line in re.findall(r"^#   (.*sbatch .*)$", SCRIPT.read_text(), re.M)]
ENTRIES = {
    "scripts/train.py": "diffnext",
    "gaussian_refiner/train_repair_cross_attn_version.py": "gaussian_refiner",
    "mvdiffusion/train_image_variation.py": "mvdiffusion",
    "training_ggi/exps/T073-000.py": "training_ggi",
    "vae/train_ddp.py": "vae",
}
ENTRY = "vae/train_ddp.py"
SCONTROL = """
import os, pathlib, sys
if sys.argv[1:] == ["show", "hostnames", "gpu[07-08]"]:
    print("gpu07\\ngpu08")
elif sys.argv[1] == "requeue":
    pathlib.Path("requeued").write_text(sys.argv[2])
else:
    sys.exit(f"unexpected: {sys.argv[1:]}")
"""
# Starts the command once per node. Signals go to the tasks, or, as some clusters do, to everything below them too.
SRUN = """
import json, os, pathlib, psutil, signal, subprocess, sys
flags = [word for word in sys.argv[1:] if word.startswith("--") and sys.argv.index(word) < sys.argv.index("bash")]
pathlib.Path("srun.json").write_text(json.dumps(flags))
command = sys.argv[1 + len(flags):]
tasks = [subprocess.Popen(command, env={**os.environ, "SLURM_NODEID": str(node)}) for node in range(2)]
def forward(number, frame):
    for task in tasks:
        everyone = psutil.Process(task.pid).children(recursive=True) if "EVERYONE" in os.environ else []
        for process in [task, *everyone]:
            process.send_signal(number)
signal.signal(signal.SIGUSR2, forward)
sys.exit(max(task.wait() for task in tasks))
"""
# A launcher whose training process saves slowly on USR1 and, as the trainers do, ends at once when it comes again.
ACCELERATE = """
import json, os, pathlib, subprocess, sys
rank = sys.argv[sys.argv.index("--machine_rank") + 1]
pathlib.Path(f"accelerate-{rank}.json").write_text(json.dumps(sys.argv[1:]))
sys.exit(subprocess.call([sys.executable, os.environ["WORKER"], rank]))
"""
WORKER = """
import os, pathlib, signal, sys, time
received = []
def receive(number, frame):
    if received:
        os._exit(9)
    received.append(number)
if "ENDS_WITH" in os.environ:
    sys.exit(int(os.environ["ENDS_WITH"]))
signal.signal(signal.SIGUSR1, receive)
pathlib.Path(f"training-{sys.argv[1]}").touch()
deadline = time.monotonic() + 30
while not received and time.monotonic() < deadline:
    time.sleep(0.02)
time.sleep(0.5)
pathlib.Path(f"saved-{sys.argv[1]}").touch()
"""


@pytest.fixture
def cluster(tmp_path: Path) -> dict[str, str]:
    """The environment of a job on two machines; what the stand-ins were told is in the working directory."""
    for name, code in {"srun": SRUN, "scontrol": SCONTROL, "accelerate": ACCELERATE}.items():
        program = tmp_path / "bin" / name
        program.parent.mkdir(exist_ok=True)
        program.write_text(f"#!{sys.executable}\n{code}")
        program.chmod(0o755)
    (tmp_path / "worker.py").write_text(WORKER)
    (tmp_path / ENTRY).parent.mkdir()
    (tmp_path / ENTRY).touch()
    job = {"SLURM_JOB_ID": "1234567", "SLURM_JOB_NODELIST": "gpu[07-08]", "SLURM_GPUS_PER_NODE": "h100:8"}
    path = f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, **job, "SLURM_CPUS_PER_TASK": "64", "PATH": path, "WORKER": str(tmp_path / "worker.py")}


def test_it_is_valid_shell() -> None:
    subprocess.run(["bash", "-n", SCRIPT], check=True)
    directives = [line for line in SCRIPT.read_text().splitlines() if line.startswith("#SBATCH")]
    assert "#SBATCH --signal=B:USR1@300" in directives and "#SBATCH --requeue" in directives
    assert "#SBATCH --ntasks-per-node=1" in directives


@pytest.mark.parametrize("launcher_file", [None, "accelerate_configs/fsdp2.yaml"])
def test_every_machine_starts_its_launcher(tmp_path: Path, cluster: dict[str, str], launcher_file: str | None) -> None:
    arguments = ["--output_dir", "a folder", "loss.noise_offset=0.1"]
    environment = {**cluster, "ENDS_WITH": "0"} | ({"LAUNCHER_FILE": launcher_file} if launcher_file else {})
    subprocess.run(["bash", SCRIPT, ENTRY, *arguments], check=True, cwd=tmp_path, env=environment, timeout=60)
    assert json.loads((tmp_path / "srun.json").read_text()) == ["--ntasks-per-node=1", "--kill-on-bad-exit=1"]
    for rank in range(2):
        words = json.loads((tmp_path / f"accelerate-{rank}.json").read_text())
        assert words == [
            *("launch", "--config_file", launcher_file or "accelerate_configs/multi_node.yaml"),
            *("--num_machines", "2", "--num_processes", "16", "--machine_rank", str(rank)),
            *("--main_process_ip", "gpu07", "--main_process_port", "24567"),
            *(ENTRY, "checkpoint.resume_from_checkpoint=latest", *arguments),
        ]
        assert launch_command_parser().parse_args(words[1:]).training_script_args == words[-4:]
        assert (ROOT / words[2]).is_file()
    assert not (tmp_path / "requeued").exists()


def test_there_is_an_example_for_every_trainer() -> None:
    assert {word for words in EXAMPLES for word in words if word in ENTRIES} == set(ENTRIES)


@pytest.mark.parametrize("words", EXAMPLES, ids=lambda words: " ".join(words)[:60])
def test_the_examples_are_understood_and_continue_a_run(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert all(Path(word).is_file() for word in words if word.startswith(("scripts/", "vae/", "configs/")))
    assert all(
        Path(word.partition("=")[2]).is_file() for word in words if word.startswith(("LAUNCHER_FILE=", "config="))
    )
    (entry,) = [word for word in words if word in ENTRIES]
    parser = importlib.import_module(f"{ENTRIES[entry]}.config").PARSER
    arguments = words[words.index(entry) + 1 :]
    config, warnings = parser.parse(["checkpoint.resume_from_checkpoint=latest", *arguments])
    assert not warnings and config.checkpoint.resume_from_checkpoint == "latest"
    chosen, _ = parser.parse(["checkpoint.resume_from_checkpoint=latest", *arguments, "--resume_from_checkpoint", "x"])
    assert chosen.checkpoint.resume_from_checkpoint == "x"


@pytest.mark.parametrize("words", [[], ["--output_dir", "x"], ["vae/train.sh"]])
def test_a_script_must_be_named(tmp_path: Path, cluster: dict[str, str], words: list[str]) -> None:
    done = subprocess.run(["bash", SCRIPT, *words], cwd=tmp_path, env=cluster, capture_output=True, text=True)
    assert done.returncode == 2
    assert (
        f"error: '{(words or [''])[0]}' is no file in {tmp_path}: the first argument is a training script"
        in done.stderr
    )


def test_a_run_that_fails_is_not_queued_again(tmp_path: Path, cluster: dict[str, str]) -> None:
    done = subprocess.run(["bash", SCRIPT, ENTRY], cwd=tmp_path, env={**cluster, "ENDS_WITH": "3"}, timeout=60)
    assert done.returncode == 3 and not (tmp_path / "requeued").exists()


@pytest.mark.skipif(shutil.which("pkill") is None, reason="pkill (procps) is not installed")
@pytest.mark.parametrize("everyone", [False, True])
def test_the_early_signal_saves_and_queues_again(tmp_path: Path, cluster: dict[str, str], everyone: bool) -> None:
    environment = {**cluster, **({"EVERYONE": "yes"} if everyone else {})}
    job = subprocess.Popen(["bash", SCRIPT, ENTRY], cwd=tmp_path, env=environment)
    deadline = time.monotonic() + 30
    while len(list(tmp_path.glob("training-*"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    job.send_signal(signal.SIGUSR1)
    assert job.wait(timeout=60) == 0
    assert sorted(path.name for path in tmp_path.glob("saved-*")) == ["saved-0", "saved-1"]
    assert (tmp_path / "requeued").read_text() == "1234567"
