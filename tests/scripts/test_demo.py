"""The demo's report, its summary, and what happens when a step fails or is interrupted; the demo itself is not run."""

import dataclasses
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import demo
import make_demo_data
import numpy as np
import pytest
import report
from PIL import Image

from diffnext import build_cache, infer
from diffnext import config as diffnext_config

METRIC = report.Metric("psnr", "PSNR (dB)", {"psnr_render": "render's own", "psnr_vae": "ceiling"})


@pytest.fixture
def part(tmp_path: Path) -> report.Part:
    """A run of 60 steps whose loss falls from 2 to 1, stopped once after step 30, two validations, a picture."""
    run = tmp_path / "run"
    run.mkdir()
    lines = [{"step": 0, "kind": "validation", "psnr": 10.0, "psnr_render": 20.5, "psnr_vae": 21.0}]
    for step in range(1, 61):
        loss = None if step == 40 else 2.0 if step <= 30 else 1.0
        lines.append({"step": step, "kind": "train", "loss": loss, "step_s": 0.25 if step > 1 else 9.0})
    lines.append({"step": 60, "kind": "validation", "psnr": 15.5, "psnr_render": 20.5, "psnr_vae": 21.0})
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    Image.fromarray(np.full((8, 8, 3), 200, np.uint8)).save(run / "a.png")
    return report.Part(
        trainer="toy",
        title="toy <trainer>",
        explanation="It learns & is measured.",
        run_dir=run,
        metric=METRIC,
        commands=[report.Command("train", "train --steps 60 --name 'a b'", Path("data"), 12.4, "exit status 0")],
        interrupted_at=30,
        pictures=[report.Pictures("Pictures", ("before", "after"), [[run / "a.png", run / "a.png"]])],
        written={"metrics": run / "metrics.jsonl"},
    )


def test_summary_is_read_from_the_run(part: report.Part) -> None:
    assert report.summarise(part.run_dir, METRIC) == report.Summary(
        steps=60,
        first_loss=2.0,
        last_loss=1.0,
        before=10.0,
        after=15.5,
        landmarks={"render's own": 20.5, "ceiling": 21.0},
        step_s=0.25,
    )


def test_summary_on_the_terminal(part: report.Part) -> None:
    assert report.text_table([report.summary_cells(part), {"trainer": "other", "steps": "7"}]).splitlines() == [
        "trainer  steps  loss, first  loss, last  held-out   before  after  render's own  ceiling  s/step",
        "-------  -----  -----------  ----------  ---------  ------  -----  ------------  -------  ------",
        "toy      60     2.000        1.000       PSNR (dB)  10.00   15.50  20.50         21.00    0.25",
        "other    7",
    ]


def test_a_run_without_validation_is_named(part: report.Part) -> None:
    path = part.run_dir / "metrics.jsonl"
    path.write_text(path.read_text().replace("validation", "something"))
    with pytest.raises(ValueError, match=f"{re.escape(str(path))} holds no lines of kind 'validation'"):
        report.summarise(part.run_dir, METRIC)


def test_a_run_without_metric_is_summed_up_by_its_loss(part: report.Part, tmp_path: Path) -> None:
    path = part.run_dir / "metrics.jsonl"
    path.write_text("".join(line for line in path.open() if "validation" not in line))
    part = dataclasses.replace(part, metric=None)
    assert report.summary_cells(part) == {
        "trainer": "toy",
        "steps": "60",
        "loss, first": "2.000",
        "loss, last": "1.000",
        "s/step": "0.25",
    }
    report.write_report(tmp_path / "report.html", "Demo", [], [part])
    assert (tmp_path / "report.html").read_text().count("<svg") == 1


class Page(HTMLParser):
    """What a page loads, links to and says, and whether every element is closed."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.loads, self.links, self.words = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        if tag not in ("meta", "img", "br", "link", "path", "circle", "polyline"):
            self.open.append(tag)
        named = dict(attributes)
        self.loads += [named[name] for name in ("src", "srcset", "data") if name in named]
        self.links += [named["href"]] if "href" in named else []

    def handle_startendtag(self, tag, attributes):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def test_the_page_stands_alone(part: report.Part, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    report.write_report(path, "Demo", ["2 cores"], [part])
    text = path.read_text()
    page = Page(text)
    assert page.open == []
    assert len(page.loads) == 2 and all(source.startswith("data:image/png;base64,") for source in page.loads)
    assert page.links == ["run/metrics.jsonl"]
    assert "<script" not in text and "http" not in text and "@import" not in text and "url(" not in text
    said = " ".join(page.words)
    for words in ("toy <trainer>", "It learns & is measured.", "2 cores", "before", "12 s, exit status 0"):
        assert words in said
    assert "cd data\ntrain --steps 60 --name 'a b'" in said


def test_the_charts_show_the_numbers(part: report.Part, tmp_path: Path) -> None:
    report.write_report(tmp_path / "report.html", "Demo", [], [part])
    loss, metric = map(
        ElementTree.fromstring, re.findall(r"<svg.*?</svg>", (tmp_path / "report.html").read_text(), re.S)
    )
    raw, smooth = (line.get("points").split() for line in loss.iter("polyline"))
    assert len(raw) == len(smooth) == 59  # the step without a finite loss is left out
    assert len(list(metric.iter("circle"))) == 2
    labels = [text.text for text in metric.iter("text")]
    assert {"render's own 20.5", "ceiling 21.0", "PSNR (dB)", "optimizer step"} <= set(labels)
    assert "SIGTERM, resumed" in [text.text for text in loss.iter("text")]
    # Equal losses are drawn at equal heights, half the loss at half the height above zero.
    heights = {point.split(",")[1] for point in raw}
    assert len(heights) == 2
    top, bottom = sorted(float(height) for height in heights)
    zero = next(float(t.get("y")) - 4 for t in loss.iter("text") if t.text == "1")
    assert bottom == pytest.approx(zero, abs=0.11) and top < bottom


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.0, 1.0, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (13.4, 21.2, [12, 14, 16, 18, 20, 22]),
        (0, 500, [0, 100, 200, 300, 400, 500]),
        (-0.03, 0.02, [-0.03, -0.02, -0.01, 0, 0.01, 0.02]),
        (3.0, 3.0, [2.4, 2.6, 2.8, 3, 3.2, 3.4, 3.6]),
    ],
)
def test_ticks_are_round_and_span_the_values(low: float, high: float, expected: list[float]) -> None:
    assert report.ticks(low, high) == pytest.approx(expected)


def test_running_mean_and_spread() -> None:
    assert report.running_mean([4, 2, 0, 6], 2) == [4, 3, 1, 3]
    assert report.spread([10, 12, 11, 60], 15) == [10, 40, 25, 60]


@pytest.mark.parametrize("form", ["--flag_{n}", "--flag_{n}=a", "a.b.flag_{n}=it's a value"])
@pytest.mark.parametrize("flags", [3, 40])
def test_wrapped_commands_are_the_same_to_a_shell(flags: int, form: str) -> None:
    words = ["run", "x.py", *(word for n in range(flags) for word in (form.format(n=n), f"a value {n}"))]
    line = report.wrapped(shlex.join(words), indent="  ")
    assert shlex.split(line.replace("\\\n", "")) == words
    assert max(map(len, line.splitlines())) <= report.COMMAND_COLUMNS + 4


# Running the steps ----------------------------------------------------------------------------------------------------

TRAIN = """
import json, pathlib, signal, sys, time
run = pathlib.Path(sys.argv[1])
run.mkdir(parents=True)
stop = []
signal.signal(signal.SIGTERM, lambda *_: stop.append(1))
for step in range(1, 1000):
    with open(run / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"step": step, "kind": "train", "loss": 1 / step}) + "\\n")
    if stop:
        if len(sys.argv) == 2:
            (run / f"checkpoint-{step}").mkdir()
        sys.exit(0)
    time.sleep(0.02)
"""
LAUNCH = "import subprocess, sys; sys.exit(subprocess.call([sys.executable, *sys.argv[1:]]))"


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> demo.Demo:
    """A demo whose trainer only counts, in a repository of its own."""
    (tmp_path / "train.py").write_text(TRAIN)
    (tmp_path / "launch.py").write_text(LAUNCH)
    monkeypatch.setattr(demo, "ROOT", tmp_path)
    monkeypatch.setattr(demo, "OUTPUT", tmp_path / "runs" / "demo")
    monkeypatch.setattr(demo, "POLL_S", 0.05)
    launcher = [sys.executable, str(tmp_path / "launch.py"), str(tmp_path / "train.py")]
    return demo.Demo(
        trainer="toy",
        title="toy",
        explanation="",
        train=lambda places: [*launcher, str(places.run)],
        use=lambda places: {},
        minutes=1,
        steps=20,
        metric=METRIC,
        pictures=lambda places: [],
        written=lambda places: {},
    )


def places(folder: Path) -> demo.Places:
    return demo.Places(data=folder, checkpoint=folder, run=folder / "run", result=folder)


def test_training_is_interrupted_and_its_checkpoint_found(
    toy: demo.Demo, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = places(tmp_path)
    command, step = demo.run_until_interrupted(toy, toy.train(where), where, tmp_path)
    assert 8 <= step < 999
    assert (where.run / f"checkpoint-{step}").is_dir()
    assert command.note == f"stopped by SIGTERM, saved checkpoint-{step}, exit status 0"
    assert command.line == "python launch.py train.py run"
    out = capsys.readouterr().out
    assert re.search(r"step \d+ of 20, loss 0\.\d{3}\n.*SIGTERM at step \d+", out, re.S)
    assert all(line.startswith("toy              | ") for line in out.splitlines())


def test_an_interruption_that_saves_nothing_is_a_failure(toy: demo.Demo, tmp_path: Path) -> None:
    where = places(tmp_path)
    with pytest.raises(demo.StepFailed, match="one checkpoint and no export were expected in .*run; found none"):
        demo.run_until_interrupted(toy, [*toy.train(where), "do not save"], where, tmp_path)


def test_a_step_that_fails_shows_its_end_and_its_status(toy: demo.Demo, tmp_path: Path) -> None:
    code = "import sys; [print('line', n) for n in range(50)]; print('0%\\r50%\\r100%'); sys.exit(7)"
    with pytest.raises(demo.StepFailed) as caught:
        demo.run_step("use", [sys.executable, "-c", code], tmp_path, tmp_path, toy)
    message = str(caught.value)
    log = tmp_path / "toy" / "logs" / "use.log"
    assert caught.value.exit_status == 7 and message.startswith(f"toy, use: exit status 7; the end of {log}:\n")
    assert message.splitlines()[1:] == [f"    line {n}" for n in range(21, 50)] + ["    100%"]


def test_the_demo_ends_with_the_status_of_the_failed_step(
    toy: demo.Demo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "DEMOS", (toy,))
    old = tmp_path / "runs" / "demo" / "old"
    old.mkdir(parents=True)
    with pytest.raises(SystemExit) as caught:  # this repository has no scripts/make_demo_data.py
        demo.main([])
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: toy, demo data: exit status 2") and "make_demo_data.py" in error
    assert not old.exists()  # what an earlier demo left is replaced


def test_a_part_that_fails_is_named_and_the_others_finish(
    part: report.Part,
    toy: demo.Demo,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    bad, good = (dataclasses.replace(toy, trainer=name) for name in ("bad", "good"))

    def run_demo(entry: demo.Demo, output: Path) -> report.Part:
        if entry is bad:
            raise demo.StepFailed("bad, train: exit status 3; the end of a log:\n    oh", 3)
        return dataclasses.replace(part, trainer=entry.trainer)

    monkeypatch.setattr(demo, "DEMOS", (bad, good))
    monkeypatch.setattr(demo, "run_demo", run_demo)
    with pytest.raises(SystemExit) as caught:
        demo.main(["--jobs", "2"])
    assert caught.value.code == 3
    out, error = capsys.readouterr()
    assert "good     60     2.000" in out and "good wrote:" in out
    assert error == "error: bad, train: exit status 3; the end of a log:\n    oh\n"
    page = (demo.OUTPUT / "report.html").read_text()
    assert "Failed: bad, train: exit status 3; the end of a log:" in page and "<pre>" in page


def test_parts_run_at_the_same_time_and_are_reported_in_their_order(
    toy: demo.Demo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    demos = [dataclasses.replace(toy, trainer=name, minutes=minutes) for name, minutes in (("a", 1), ("b", 2))]
    both, begun = threading.Barrier(2), []

    def run_demo(entry: demo.Demo, output: Path) -> str:
        begun.append(entry.trainer)
        both.wait(timeout=30)
        return entry.trainer

    monkeypatch.setattr(demo, "run_demo", run_demo)
    assert demo.run_all(demos, tmp_path, jobs=2) == (["a", "b"], [])
    assert begun == ["b", "a"]


def test_an_interrupted_demo_ends_its_commands(toy: demo.Demo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "STOPPING", threading.Event())
    demo.STOPPING.set()
    with pytest.raises(demo.StepFailed, match="toy, use: interrupted"):
        demo.run_step("use", [sys.executable, "-c", "import time; time.sleep(60)"], tmp_path, tmp_path, toy)


def test_less_than_one_job_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        demo.main(["--jobs", "0"])
    assert capsys.readouterr().err.endswith("error: --jobs is 0; it must be 1 or more\n")


def test_every_demo_is_a_trainer_of_the_repository() -> None:
    for entry in demo.DEMOS:
        assert (demo.ROOT / entry.trainer.split("_t2")[0] / "train.py").is_file()
        assert len(entry.trainer) <= demo.NAME_COLUMNS
    assert [entry.trainer for entry in demo.DEMOS] == [
        "gaussian_refiner",
        "vae",
        "diffnext_t2i",
        "diffnext_t2v",
        "mvdiffusion",
        "training_ggi",
    ]


def test_novas_settings_and_prompts_are_those_of_its_data_and_trainer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("skimage", reason="the photographs come with scikit-image")
    for entry, make in (
        (demo.NOVA_T2I, make_demo_data.make_nova_image_data),
        (demo.NOVA_T2V, make_demo_data.make_nova_clip_data),
    ):
        folder = demo.ROOT / "runs" / "demo"  # nothing is written there
        data = folder / "data" / entry.trainer
        places = demo.Places(data, folder / "checkpoint", folder / "run", folder / "result")
        settings = entry.train(places)
        words = settings[settings.index(str(demo.ROOT / "scripts" / "train.py")) + 1 :]
        words = [word.replace("../../../..", str(demo.ROOT)) if word.startswith("config=") else word for word in words]
        config, warnings = diffnext_config.PARSER.parse(words)
        assert not warnings and config.run.max_train_steps == entry.steps
        monkeypatch.setattr(make_demo_data, "make_vae_data", lambda directory, seed: directory.mkdir(parents=True))
        table = make(tmp_path / entry.trainer)
        assert set(config.validation.prompts) <= set(table.with_name("prompts.txt").read_text().splitlines())
        (command,) = entry.prepare(places).values()
        cache, _ = build_cache.PARSER.parse([*command[3:], "--source", str(table)])
        assert table.name in command and str(cache.output.output_dir) in config.data.dataset
        (command,) = entry.use(places).values()
        infer.PARSER.parse(command[3:])


def test_a_line_that_is_being_written_is_not_read(tmp_path: Path) -> None:
    assert demo.last_training_record(tmp_path) is None
    whole = json.dumps({"step": 3, "kind": "train", "loss": 0.5}) + "\n"
    (tmp_path / "metrics.jsonl").write_text(whole + '{"step": 4, "kind": "tr')
    assert demo.last_training_record(tmp_path) == {"step": 3, "kind": "train", "loss": 0.5}


# The scripts around it ------------------------------------------------------------------------------------------------


@pytest.fixture
def installed(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess]:
    """Runs a script of a repository whose pip installs nothing, on a disk with so many free GB."""
    programs = {".venv/bin/pip": "exit 0", ".venv/bin/python": 'echo "ran $*"'}
    for name, body in programs.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!/bin/sh\n{body}\n")
        path.chmod(0o755)
    (tmp_path / "pyproject.toml").touch()
    (tmp_path / "scripts").mkdir()
    for name in ("setup_env.sh", "demo.sh"):
        shutil.copy(demo.ROOT / "scripts" / name, tmp_path / "scripts")

    def run(script: str, free_gb: float) -> subprocess.CompletedProcess:
        df = tmp_path / "programs" / "df"
        df.parent.mkdir(exist_ok=True)
        free_kib = round(free_gb * 1e9 / 1024) + 1
        df.write_text(f"#!/bin/sh\necho Filesystem 1024-blocks Used Available\necho /dev/a 1 1 {free_kib} 9% /\n")
        df.chmod(0o755)
        environment = {**os.environ, "PATH": f"{df.parent}:{os.environ['PATH']}"}
        command = ["bash", str(tmp_path / "scripts" / script)]
        return subprocess.run(command, env=environment, capture_output=True, text=True)

    return run


def test_little_room_for_a_first_installation_is_a_warning(installed: Callable, tmp_path: Path) -> None:
    done = installed("setup_env.sh", free_gb=9.5)
    assert done.returncode == 0
    assert done.stderr.splitlines() == [
        f"warning: {tmp_path} has 9 GB of free disk space; a first installation needs 10 GB",
        "installing into .venv (the first time takes some minutes)",
    ]
    assert installed("setup_env.sh", free_gb=9.5).stderr == ""  # it is installed


def test_enough_room_is_not_spoken_of(installed: Callable) -> None:
    done = installed("setup_env.sh", free_gb=10)
    assert done.stderr == "installing into .venv (the first time takes some minutes)\n"


def test_no_room_for_the_demo_is_an_error(installed: Callable, tmp_path: Path) -> None:
    installed("setup_env.sh", free_gb=20)
    done = installed("demo.sh", free_gb=0.9)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr == f"error: {tmp_path} has 900 MB of free disk space; the demo writes 1000 MB into runs/demo\n"
    done = installed("demo.sh", free_gb=1)
    assert (done.returncode, done.stdout, done.stderr) == (0, "ran scripts/demo.py\n", "")
