"""Version and content of the source distribution and the wheel, and the commands that an installation brings."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import make_demo_data
import make_tiny_checkpoints
import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("common", "diffnext", "gaussian_refiner", "mvdiffusion", "training_ggi", "vae")
COMMANDS = ("train-diffnext", "train-ggi", "train-mvdiffusion", "train-refiner", "train-vae")
BUILD = "import sys; from setuptools import build_meta as b; print(b.build_{kind}(sys.argv[1]))"


def build(kind: str, source: Path, target: Path) -> Path:
    """An `sdist` or a `wheel` of a source tree, built with the installed setuptools."""
    command = [sys.executable, "-c", BUILD.format(kind=kind), str(target)]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return target / done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a copy, since building writes into the source tree."""
    pytest.importorskip("setuptools", minversion="77", reason="the build needs setuptools, which this Python lacks")
    source, target = tmp_path_factory.mktemp("source") / "tree", tmp_path_factory.mktemp("dist")
    unwanted = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "runs", "build", "dist")
    shutil.copytree(ROOT, source, ignore=unwanted)
    return build("sdist", source, target)


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from what the source distribution holds."""
    folder = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    return build("wheel", next(folder.iterdir()), sdist.parent)


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The programs of a new environment that holds the wheel, beside the dependencies of this one."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", "--no-index"]
    done = subprocess.run([*pip, str(wheel)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    site = next(folder.glob("lib/python*/site-packages"))
    # Only the packages there: the .pth file by which this checkout is installed is not obeyed.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "bin"


def run(program: Path, *arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    return subprocess.run([program, *arguments], cwd=folder, env=environment, capture_output=True, text=True)


def test_the_source_distribution_is_whole(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {Path(name).relative_to(sdist.name.removesuffix(".tar.gz")).as_posix() for name in archive.getnames()}
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    if not listed:
        pytest.skip("this tree is no git checkout, whose files could be compared")
    wanted = [name for name in listed if not name.startswith(".") and (ROOT / name).exists()]
    assert [name for name in wanted if name not in names] == []


def test_the_wheel_holds_packages_and_configurations_alone(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    tops = {name.split("/")[0] for name in names}
    assert tops == {*PACKAGES, "visual_trainers-0.1.0.data", "visual_trainers-0.1.0.dist-info"}
    share = "visual_trainers-0.1.0.data/data/share/visual-trainers/"
    for folder in ("configs", "accelerate_configs"):
        wanted = {path.relative_to(ROOT).as_posix() for path in (ROOT / folder).rglob("*") if path.is_file()}
        assert {name.removeprefix(share) for name in names if name.startswith(f"{share}{folder}/")} == wanted


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_answered_without_pytorch(installed: Path, command: str, tmp_path: Path) -> None:
    done = run(installed / command, "--help", folder=tmp_path)
    assert done.returncode == 0 and done.stdout.startswith("usage: ")
    script = f"import runpy, sys; sys.argv = ['x', '--help']\ntry: runpy.run_path({str(installed / command)!r})\n"
    script += "except SystemExit: pass\nprint('torch' in sys.modules, file=sys.stderr)"
    done = run(installed / "python", "-c", script, folder=tmp_path)
    assert done.stderr.split() == ["False"]


def test_the_configurations_are_found(installed: Path, tmp_path: Path) -> None:
    done = run(installed / "train-ggi", "--print_config", folder=tmp_path)
    assert done.returncode == 0 and "CogVideoX" in done.stdout, done.stderr
    done = run(installed / "train-mvdiffusion", "--config", "configs/training_config/none.yaml", folder=tmp_path)
    assert "share/visual-trainers/configs/training_config/none.yaml" in done.stderr


def test_an_installed_command_trains(installed: Path, tmp_path: Path) -> None:
    weights = make_tiny_checkpoints.make_refiner_checkpoint(tmp_path / "tiny-unclip")
    folder = make_demo_data.make_refiner_data(tmp_path / "pairs", items=12).parent
    flags = ["--pretrained_model_name_or_path", str(weights), "--output_dir", "out", "--max_train_steps", "1"]
    flags += ["--train_batch_size", "1", "--mixed_precision", "no", "--report_to", "none"]
    flags += "--height_px 64 --num_inference_steps 2 --max_validation_items 1".split()
    done = run(installed / "train-refiner", *flags, "--data.num_workers", "0", folder=folder)
    assert done.returncode == 0, done.stderr
    assert (folder / "out" / "export" / "unet" / "config.json").is_file()
    # Errors made for people are told from mistakes of the program in an installation too.
    done = run(installed / "train-refiner", *flags, folder=folder)
    assert done.returncode == 1 and "error: " in done.stderr and "Traceback" not in done.stderr
