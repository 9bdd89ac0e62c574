"""One self-contained HTML page about finished runs: tables, curves, pictures. Nothing is loaded when it is opened.

Everything is read from the files of a run (`metrics.jsonl`, pictures); nothing here knows a trainer.
"""

import base64
import html
import json
import math
import os
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ENDS = 20  # the first and the last loss are means over so many steps: that of one step is mostly noise
CHART_PX = (560, 300)  # width, height
MARGIN_PX = (62, 16, 16, 46)  # left, top, right, bottom
LABEL_GAP_PX = 15  # least distance between two labels in a chart
COMMAND_COLUMNS = 100
WORD = re.compile(r"""(?:'[^']*'|"[^"]*"|\\.|\S)+""")  # of a shell, quoted parts included
SETTING = re.compile(r"['\"]?(--|[\w.]+=)")  # how a word begins that names what is set
PICTURE_MIMES = {".png": "image/png", ".jpg": "image/jpeg"}

STYLE = """
:root { color-scheme: light; }
body { margin: 2.5rem auto; max-width: 74rem; padding: 0 1.5rem; background: #fff; color: #1d232b;
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1 { font-size: 1.75rem; line-height: 1.25; margin: 0 0 .25rem; }
h2 { font-size: 1.3rem; margin: 2.75rem 0 .5rem; padding-top: 1.25rem; border-top: 1px solid #d8dde3; }
h3 { font-size: 1rem; margin: 1.75rem 0 .5rem; }
p { max-width: 46rem; margin: .5rem 0; }
.quiet, figcaption, th { color: #5a6572; }
.quiet, figcaption { font-size: .875rem; }
table { border-collapse: collapse; margin: .75rem 0; }
th, td { padding: .35rem 1.1rem .35rem 0; text-align: left; vertical-align: top; }
th { font-size: .8125rem; font-weight: 600; vertical-align: bottom; }
.numbers td { border-top: 1px solid #e6e9ed; font-variant-numeric: tabular-nums; }
.charts { display: flex; flex-wrap: wrap; gap: 1.25rem 2rem; }
figure { margin: 0; }
svg { display: block; max-width: 100%; height: auto; }
svg text { font: 12px system-ui, -apple-system, "Segoe UI", Roboto, Arial, sans-serif; fill: #5a6572;
  paint-order: stroke; stroke: #fff; stroke-width: 3px; }
.pictures td { padding: .25rem .5rem .25rem 0; }
.pictures img { display: block; width: 100%; max-width: 13rem; border-radius: 3px; }
code, pre { font: .8125rem/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
pre { margin: 0; background: #f4f6f8; padding: .5rem .75rem; border-radius: 4px;
  white-space: pre-wrap; overflow-wrap: anywhere; }
a { color: #1f6fb5; }
.commands td { padding-bottom: .75rem; }
.commands td:first-child { width: 11rem; }
"""


@dataclass(frozen=True)
class Command:
    """A command as it was run, with what came of it."""

    title: str
    line: str
    folder: Path
    seconds: float
    note: str = ""


@dataclass(frozen=True)
class Pictures:
    """A table of pictures: `rows` of files under `headings`."""

    caption: str
    headings: Sequence[str]
    rows: Sequence[Sequence[Path]]


@dataclass(frozen=True)
class Metric:
    """The validation metric of a run that tells best whether it learned.

    `landmarks` are further names in the validation records, with what they mean: levels to compare with.
    """

    name: str
    label: str
    landmarks: Mapping[str, str]


@dataclass(frozen=True)
class Part:
    """One trainer in the report."""

    trainer: str
    title: str
    explanation: str
    run_dir: Path
    metric: Metric | None  # None: the training loss says it all
    commands: Sequence[Command]
    interrupted_at: int
    pictures: Sequence[Pictures]
    written: Mapping[str, Path]  # what lies where


@dataclass(frozen=True)
class Summary:
    """The numbers of a run. Losses are means over the first and the last steps (see ENDS); without metric no more."""

    steps: int
    first_loss: float
    last_loss: float
    before: float | None
    after: float | None
    landmarks: Mapping[str, float]  # by meaning
    step_s: float


def read_records(run_dir: Path, *kinds: str) -> list[dict]:
    """The lines of metrics.jsonl of some kinds, `train` or `validation` say; ValueError names a file that has none."""
    path = run_dir / "metrics.jsonl"
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    chosen = [record for record in records if record["kind"] in kinds]
    if not chosen:
        raise ValueError(f"{path} holds no lines of kind {' or '.join(map(repr, kinds))}")
    return chosen


def summarise(run_dir: Path, metric: Metric | None) -> Summary:
    """The numbers of a finished run."""
    train = read_records(run_dir, "train")
    validation = read_records(run_dir, "validation") if metric else []
    losses = [record["loss"] for record in train if record["loss"] is not None]
    return Summary(
        steps=read_records(run_dir, "train", "train_discriminator")[-1]["step"],
        first_loss=statistics.fmean(losses[:ENDS]),
        last_loss=statistics.fmean(losses[-ENDS:]),
        before=validation[0][metric.name] if metric else None,
        after=validation[-1][metric.name] if metric else None,
        landmarks={meaning: validation[-1][name] for name, meaning in metric.landmarks.items()} if metric else {},
        step_s=statistics.median(record["step_s"] for record in train),
    )


def summary_cells(part: Part) -> dict[str, str]:
    """The row of a trainer in the summary, by heading: the same on the terminal and in the report."""
    numbers = summarise(part.run_dir, part.metric)
    measured = {}
    if part.metric:
        measured = {"held-out": part.metric.label, "before": f"{numbers.before:.2f}", "after": f"{numbers.after:.2f}"}
    return {
        "trainer": part.trainer,
        "steps": str(numbers.steps),
        "loss, first": f"{numbers.first_loss:.3f}",
        "loss, last": f"{numbers.last_loss:.3f}",
        **measured,
        **{meaning: f"{value:.2f}" for meaning, value in numbers.landmarks.items()},
        "s/step": f"{numbers.step_s:.2f}",
    }


def text_table(rows: Sequence[Mapping[str, str]]) -> str:
    """Rows under their headings, in aligned columns; a heading that a row lacks is left blank."""
    headings = list(dict.fromkeys(heading for row in rows for heading in row))
    widths = {h: max(len(h), *(len(row.get(h, "")) for row in rows)) for h in headings}
    lines = ["  ".join(h.ljust(widths[h]) for h in headings), "  ".join("-" * widths[h] for h in headings)]
    lines += ["  ".join(row.get(h, "").ljust(widths[h]) for h in headings) for row in rows]
    return "\n".join(line.rstrip() for line in lines)


def wrapped(line: str, indent: str = "") -> str:
    """A long command line over several lines, broken in front of flags and key=value, as a shell reads it."""
    settings: list[str] = []  # each with its values
    for word in WORD.findall(line):
        if SETTING.match(word) or not settings:
            settings.append(word)
        else:
            settings[-1] += f" {word}"
    lines = settings[:1]
    for setting in settings[1:]:
        if len(f"{lines[-1]} {setting} \\") <= COMMAND_COLUMNS:
            lines[-1] += f" {setting}"
        else:
            lines.append(f"  {setting}")
    return " \\\n".join(indent + part for part in lines)


# Charts ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Line:
    """A curve: points (x, y) and how it is drawn."""

    points: Sequence[tuple[float, float]]
    name: str = ""
    colour: str = "#1f6fb5"
    width_px: float = 2
    dots: bool = False


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers that span [low, high], at about `count` equal steps of 1, 2 or 5 times a power of ten."""
    if not high > low:
        low, high = low - 0.5, high + 0.5
    raw = (high - low) / count
    power = 10 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(n * step, 10) for n in range(first, last + 1)]


def running_mean(values: Sequence[float], window: int) -> list[float]:
    """The mean of each value and the up to `window` - 1 before it."""
    return [statistics.fmean(values[max(0, i + 1 - window) : i + 1]) for i in range(len(values))]


def spread(positions_px: Sequence[float], gap_px: float) -> list[float]:
    """Positions moved down as little as keeps neighbours `gap_px` apart; the order of the input is kept."""
    moved, previous = [0.0] * len(positions_px), -math.inf
    for index in sorted(range(len(positions_px)), key=lambda i: positions_px[i]):
        previous = max(positions_px[index], previous + gap_px)
        moved[index] = previous
    return moved


def chart(
    lines: Sequence[Line],
    *,
    x_label: str,
    y_label: str,
    levels: Mapping[str, float] | None = None,
    marks: Mapping[str, float] | None = None,
) -> str:
    """An SVG of curves over a common x axis.

    Args:
        levels: dashed horizontal lines by label, e.g. a value to compare with.
        marks: dashed vertical lines by label, e.g. a step at which something happened.
    """
    levels, marks = levels or {}, marks or {}
    (width, height), (left, top, right, bottom) = CHART_PX, MARGIN_PX
    xs = ticks(min(x for line in lines for x, _ in line.points), max(x for line in lines for x, _ in line.points))
    heights = [y for line in lines for _, y in line.points] + list(levels.values())
    ys = ticks(min(heights), max(heights))

    def place(x: float, y: float) -> tuple[float, float]:
        return (
            left + (x - xs[0]) / (xs[-1] - xs[0]) * (width - left - right),
            height - bottom - (y - ys[0]) / (ys[-1] - ys[0]) * (height - top - bottom),
        )

    parts = [_axes(xs, ys, place, x_label, y_label)]
    highest = max(levels.values(), default=0)  # its label stands above the line, the others below theirs
    label_tops = spread([place(xs[0], y)[1] + (-5 if y == highest else 14) for y in levels.values()], LABEL_GAP_PX)
    for (label, y), label_top in zip(levels.items(), label_tops, strict=True):
        (x1, y1), (x2, _) = place(xs[0], y), place(xs[-1], y)
        parts.append(_rule(x1, y1, x2, y1, "#9a6b00"))
        parts.append(_text(x2 - 4, label_top, label, "end", "#7a5500"))
    for label, x in marks.items():
        x1, y1 = place(x, ys[-1])
        parts.append(_rule(x1, y1, x1, place(x, ys[0])[1], "#8a94a0"))
        parts.append(_text(x1 + 5, height - bottom - 6, label))
    for line in lines:
        points = [place(x, y) for x, y in line.points]
        drawn = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        style = f'fill="none" stroke="{line.colour}" stroke-width="{line.width_px}" stroke-linejoin="round"'
        parts.append(f'<polyline points="{drawn}" {style}/>')
        if line.dots:
            parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{line.colour}"/>' for x, y in points]
    parts.append(_legend([line for line in lines if line.name], width - right))
    return f'<svg viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img">{"".join(parts)}</svg>'


def _axes(xs: Sequence[float], ys: Sequence[float], place, x_label: str, y_label: str) -> str:
    """Grid, numbers and names of both axes; `place` maps values to pixels."""
    parts = []
    x_left, x_right, y_bottom = place(xs[0], ys[0])[0], place(xs[-1], ys[0])[0], place(xs[0], ys[0])[1]
    for y in ys:
        y_px = place(xs[0], y)[1]
        parts.append(f'<path d="M{x_left:.1f} {y_px:.1f}H{x_right:.1f}" stroke="#e6e9ed"/>')
        parts.append(_text(x_left - 8, y_px + 4, f"{y:g}", "end"))
    for x in xs:
        parts.append(_text(place(x, ys[0])[0], y_bottom + 18, f"{x:g}", "middle"))
    middle_px = (place(xs[0], ys[-1])[1] + y_bottom) / 2
    parts.append(_text((x_left + x_right) / 2, y_bottom + 38, x_label, "middle"))
    parts.append(f'<g transform="translate(14 {middle_px:.1f}) rotate(-90)">{_text(0, 0, y_label, "middle")}</g>')
    return "".join(parts)


def _legend(lines: Sequence[Line], right_px: float) -> str:
    """Names of the curves below each other, in the upper right corner."""
    parts = []
    for row, line in enumerate(lines):
        y = MARGIN_PX[1] + 12 + row * LABEL_GAP_PX
        parts.append(_text(right_px - 4, y, line.name, "end", line.colour))
    return "".join(parts)


def _rule(x1: float, y1: float, x2: float, y2: float, colour: str) -> str:
    return f'<path d="M{x1:.1f} {y1:.1f}L{x2:.1f} {y2:.1f}" stroke="{colour}" stroke-dasharray="5 4"/>'


def _text(x: float, y: float, text: str, anchor: str = "start", colour: str = "") -> str:
    style = f' style="fill:{colour}"' if colour else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{style}>{html.escape(text)}</text>'


# The page -------------------------------------------------------------------------------------------------------------


def write_report(path: Path, title: str, facts: Sequence[str], parts: Sequence[Part]) -> None:
    """Writes the page: a summary, then a section per trainer.

    Raises:
        FileNotFoundError, ValueError: a run lacks its metrics or a picture.
    """
    page = [
        f'<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>',
        f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head><body>',
        f"<h1>{html.escape(title)}</h1>",
        f'<p class="quiet">{"<br>".join(html.escape(fact) for fact in facts)}</p>',
        _summary([summary_cells(part) for part in parts]),
        *(_section(part, path.parent) for part in parts),
        "</body></html>\n",
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(page), encoding="utf-8")


def _summary(rows: Sequence[Mapping[str, str]]) -> str:
    headings = list(dict.fromkeys(heading for row in rows for heading in row))
    head = "".join(f"<th>{html.escape(heading)}</th>" for heading in headings)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(row.get(heading, ''))}</td>" for heading in headings) + "</tr>"
        for row in rows
    )
    note = f"Losses are means over the first and the last {ENDS} steps; s/step is the median of wall-clock seconds."
    return f'<table class="numbers"><tr>{head}</tr>{body}</table><p class="quiet">{note}</p>'


def _section(part: Part, folder: Path) -> str:
    """All about one trainer; links to its files start at `folder`, where the page is."""
    files = "".join(
        f'<tr><th>{html.escape(what)}</th><td><a href="{link}"><code>{link}</code></a></td></tr>'
        for what, link in ((what, html.escape(os.path.relpath(path, folder))) for what, path in part.written.items())
    )
    blocks = [
        f"<h2>{html.escape(part.title)}</h2><p>{html.escape(part.explanation)}</p>",
        f'<div class="charts">{_loss_figure(part)}{_metric_figure(part)}</div>',
        *(_picture_table(pictures) for pictures in part.pictures),
        "<h3>What was run</h3>",
        f'<table class="commands">{"".join(_command_row(command) for command in part.commands)}</table>',
        f"<h3>What was written</h3><table>{files}</table>",
    ]
    return "\n".join(blocks)


def _loss_figure(part: Part) -> str:
    points = [(r["step"], r["loss"]) for r in read_records(part.run_dir, "train") if r["loss"] is not None]
    steps, losses = zip(*points, strict=True)
    window = max(1, len(points) // 20)
    smooth = list(zip(steps, running_mean(losses, window), strict=True))
    drawing = chart(
        [Line(points, "each step", "#a9c6e3", 1), Line(smooth, f"mean of {window} steps")],
        x_label="optimizer step",
        y_label="training loss",
        marks={"SIGTERM, resumed": part.interrupted_at},
    )
    return _figure(drawing, f"Training loss. The run was stopped with SIGTERM after step {part.interrupted_at}.")


def _metric_figure(part: Part) -> str:
    if part.metric is None:
        return ""
    metric, records = part.metric, read_records(part.run_dir, "validation")
    levels = {f"{meaning} {records[-1][name]:.1f}": records[-1][name] for name, meaning in metric.landmarks.items()}
    curve = [(record["step"], record[metric.name]) for record in records]
    drawing = chart([Line(curve, dots=True)], x_label="optimizer step", y_label=metric.label, levels=levels)
    return _figure(drawing, f"{metric.label} on held-out items, from {curve[0][1]:.2f} to {curve[-1][1]:.2f}.")


def _figure(drawing: str, caption: str) -> str:
    return f"<figure>{drawing}<figcaption>{html.escape(caption)}</figcaption></figure>"


def _picture_table(pictures: Pictures) -> str:
    head = "".join(f"<th>{html.escape(heading)}</th>" for heading in pictures.headings)
    body = "".join("<tr>" + "".join(f"<td>{_image(path)}</td>" for path in row) + "</tr>" for row in pictures.rows)
    return f'<h3>{html.escape(pictures.caption)}</h3><table class="pictures"><tr>{head}</tr>{body}</table>'


def _image(path: Path) -> str:
    content = base64.b64encode(path.read_bytes()).decode()
    return f'<img alt="{html.escape(path.name)}" src="data:{PICTURE_MIMES[path.suffix]};base64,{content}">'


def _command_row(command: Command) -> str:
    note = f", {command.note}" if command.note else ""
    lines = [f"cd {command.folder}"] if command.folder != Path(".") else []
    lines.append(wrapped(command.line))
    return (
        f'<tr><td>{html.escape(command.title)}<br><span class="quiet">{command.seconds:.0f} s{html.escape(note)}</span>'
        f"</td><td><pre>{html.escape(chr(10).join(lines))}</pre></td></tr>"
    )
