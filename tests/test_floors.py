"""Who may import whom. Read from the source text: nothing is imported."""

import ast
import sys
from collections.abc import Iterator, Mapping
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TRAINERS = ("training_ggi", "gaussian_refiner", "vae", "mvdiffusion", "diffnext")
OWN = ("common", *TRAINERS)
# Third-party packages that are kept to some modules, so that they can be replaced there.
KEPT_TO = {
    "accelerate": {f"common/{name}.py" for name in ("runtime", "checkpoint", "loop", "log", "replay", "training")},
    "omegaconf": {"common/config.py"},
    "wandb": {"common/log.py"},  # trackers are reached through accelerate.tracking, which knows no video
    "tensorboard": set(),
}
# What the networks need of `common`: leaves, which import nothing of ours, nor more of others than these.
LEAVES = ("diffusion", "pretrained")
LEAF_PACKAGES = ("torch", "safetensors", "numpy")
# What a module of a trainer must not import from its own folder; a missing name may import all but the entry points.
ENTRY_POINTS = (
    "__main__",
    "train",
    "infer",
    "reconstruct",
    "evaluate",
    "upstream",
    "train_ddp",
    "prepare",
    "export",
    "exps",
)
FORBIDDEN = {
    "models": ("config", "data", "task", "cache", "repair", *ENTRY_POINTS),
    "config": ("data", "models", "task", "cache", "repair", *ENTRY_POINTS),
    "data": ("task", "cache", "repair", *ENTRY_POINTS),
    "task": ENTRY_POINTS,
}


def sources() -> dict[str, str]:
    """Text of every module of the packages, scripts and benchmarks, by path from the root."""
    folders = [ROOT / name for name in (*OWN, "scripts", "bench") if (ROOT / name).is_dir()]
    return {p.relative_to(ROOT).as_posix(): p.read_text("utf-8") for f in folders for p in sorted(f.rglob("*.py"))}


def imported(text: str, path: str) -> Iterator[tuple[int, str]]:
    """(line, module) of every import in a module, also inside functions; `from a import b` counts as a.b."""
    package = path.split("/")[:-1]
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            base += node.module.split(".") if node.module else []
            yield from ((node.lineno, ".".join([*base, alias.name])) for alias in node.names)


def violations(files: Mapping[str, str]) -> list[str]:
    """One line per import that breaks a floor."""
    found = []
    for path, text in files.items():
        for line, module in imported(text, path):
            reason = _broken_floor(path, module.split("."))
            if reason:
                found.append(f"{path}:{line} imports {module}: {reason}")
    return found


def _broken_floor(path: str, module: list[str]) -> str | None:
    home, top = path.split("/")[0], module[0]
    if top in KEPT_TO and path not in KEPT_TO[top]:
        return f"{top} is kept to {', '.join(sorted(KEPT_TO[top])) or 'no module at all'}"
    if top in ("scripts", "tests", "bench") and home in OWN:
        return f"{top} stands above the packages"
    if home == "common" and top in TRAINERS:
        return "common knows no trainer"
    if home in TRAINERS and top in TRAINERS and top != home:
        return "trainers do not import each other"
    if home in TRAINERS and path.split("/")[1] == "models" and top == "common" and ".".join(module[1:2]) not in LEAVES:
        return f"of common, models know {' and '.join(LEAVES)} alone"
    if path in {f"common/{name}.py" for name in LEAVES} and top not in {*LEAF_PACKAGES, *sys.stdlib_module_names}:
        return f"this leaf of common imports {', '.join(LEAF_PACKAGES)} and the standard library alone"
    if home in TRAINERS and top == home and len(module) > 1:
        part = path.split("/")[1].removesuffix(".py")
        forbidden = FORBIDDEN.get(part, ENTRY_POINTS if part not in ENTRY_POINTS and not _is_entry(path) else ())
        if module[1] in forbidden:
            return f"{part} stands below {module[1]}"
    return None


def _is_entry(path: str) -> bool:
    """An entry script: a docstring and one call, so the one kind of module that may import train or infer."""
    return path.count("/") == 1 and path.split("/")[1].startswith(("__main__", "train_", "run_"))


def cycles(files: Mapping[str, str]) -> list[str]:
    """Modules of ours that import each other in a circle, as `a -> b -> a`."""
    by_name = {path.removesuffix(".py").removesuffix("/__init__").replace("/", "."): path for path in files}
    graph = {name: set() for name in by_name}
    for name, path in by_name.items():
        for _, module in imported(files[path], path):
            target = module if module in by_name else module.rpartition(".")[0]
            if target in by_name and target != name:
                graph[name].add(target)
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> Iterator[str]:
        if name in trail:
            yield " -> ".join([*trail[trail.index(name) :], name])
        elif name not in done:
            for target in sorted(graph[name]):
                yield from visit(target, (*trail, name))
            done.add(name)

    return [cycle for name in sorted(graph) for cycle in visit(name, ())]


def test_import_floors() -> None:
    files = sources()
    assert "common/loop.py" in files and "gaussian_refiner/models/denoise.py" in files
    assert violations(files) == []


@pytest.mark.parametrize(
    ("path", "text", "reason"),
    [
        ("common/loop.py", "import vae.task", "common knows no trainer"),
        ("common/loop.py", "def f():\n    from vae import task", "common knows no trainer"),
        ("vae/task.py", "from diffnext.data import Clips", "trainers do not import each other"),
        ("vae/models/wfvae.py", "from common.video import read_frames", "of common, models know diffusion and"),
        ("vae/models/wfvae.py", "import common", "of common, models know diffusion and pretrained alone"),
        ("vae/models/wfvae.py", "from common import data", "of common, models know diffusion and pretrained"),
        ("common/diffusion.py", "from common.pretrained import named", "this leaf of common imports torch"),
        ("common/diffusion.py", "from . import data", "this leaf of common imports torch, safetensors"),
        ("common/pretrained.py", "def f():\n    import diffusers", "this leaf of common imports torch, safetensors"),
        ("vae/models/wfvae.py", "from ..config import VaeConfig", "models stands below config"),
        ("vae/models/wfvae.py", "from vae import task", "models stands below task"),
        ("vae/data.py", "from vae.task import VaeTask", "data stands below task"),
        ("vae/task.py", "from vae.train import main", "task stands below train"),
        ("vae/helper.py", "import vae.infer", "helper stands below infer"),
        ("vae/train.py", "from accelerate import Accelerator", "accelerate is kept to common/checkpoint.py"),
        ("common/data.py", "from omegaconf import OmegaConf", "omegaconf is kept to common/config.py"),
        ("common/data.py", "import wandb", "wandb is kept to common/log.py"),
        ("common/data.py", "import scripts.report", "scripts stands above the packages"),
    ],
)
def test_what_breaks_a_floor(path: str, text: str, reason: str) -> None:
    (found,) = violations({path: text})
    assert found.startswith(f"{path}:") and reason in found


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("common/loop.py", "from accelerate import Accelerator"),
        ("vae/models/wfvae.py", "from vae.models.blocks import Block\nimport torch"),
        ("vae/models/wfvae.py", "from common.pretrained import PretrainedModel\nfrom common import diffusion"),
        ("common/pretrained.py", "import json\nfrom safetensors.torch import load_file\nfrom torch import nn"),
        ("vae/task.py", "from common.loop import StepOutput\nfrom vae.models.wfvae import WFVAE"),
        ("vae/train_vae.py", "from vae.train import main"),
        ("scripts/report.py", "from gaussian_refiner.config import PARSER"),
    ],
)
def test_what_does_not(path: str, text: str) -> None:
    assert violations({path: text}) == []


def test_no_import_cycles() -> None:
    assert cycles(sources()) == []
    planted = {"common/a.py": "from common import b", "common/b.py": "from common.c import x", "common/c.py": ""}
    assert cycles(planted) == []
    assert cycles({**planted, "common/c.py": "import common.a"}) == ["common.a -> common.b -> common.c -> common.a"]


def test_no_module_beside_an_entry_script_hides_another() -> None:
    """Python puts a script's folder first on sys.path: a `logging.py` there would be everyone's logging."""
    taken = sys.stdlib_module_names | {name for name in packages_distributions() if name not in OWN}
    assert {"logging", "torch", "diffusers"} <= taken
    folders = [ROOT / name for name in (*TRAINERS, "scripts", "bench") if (ROOT / name).is_dir()]
    names = {p: p.stem for folder in folders for p in folder.iterdir() if p.suffix == ".py" or p.is_dir()}
    assert "config" in names.values()
    hiding = [str(p.relative_to(ROOT)) for p, name in names.items() if name in taken and name != "__init__"]
    assert hiding == []


def test_asserts_say_what_is_wrong() -> None:
    silent = [
        f"{path}:{node.lineno}"
        for path, text in sources().items()
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Assert) and node.msg is None
    ]
    assert silent == []
