"""The report of a sweep: one HTML page that needs nothing else, no network either."""

from __future__ import annotations

import html
import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from orchestrator.progress import duration, figure
from orchestrator.records import Comparison, SearchRecord, TrialRecord
from orchestrator.search import figures
from orchestrator.search.axes import Axis, axes
from orchestrator.search.importance import importance
from orchestrator.search.view import number, say_value, short_names
from orchestrator.storage import Folder

PAGE = Path(__file__).with_name("report.html")
POPULATION = ("pbt", "pb2")
"""Schedulers that propose settings themselves."""


def sweep_html(record: SearchRecord, comparison: Comparison | None = None, *, name: str = "") -> str:
    """The page; `comparison` are the scores on rows that no trial saw, where there are some, `name` the job's."""
    from plotly.offline import get_plotlyjs

    title = f"{name}: sweep of {len(record.trials)} trials" if name else f"Sweep of {len(record.trials)} trials"
    sections = [
        _summary(record, comparison, title),
        _setting(record),
        _history(record),
        _learning(record),
        _parameters(record),
        _grid("Pareto front", figures.pareto(record), "Trials on the front are beaten by no other in all objectives at once."),
        _grid("Population", figures.population(record, _schedule(record)), "An arrow is a trial taking over another's weights and optimizer state; then its parameters change."),
        _trials(record),
        _failed(record),
        _search(record),
    ]  # fmt: skip
    page = PAGE.read_text(encoding="utf-8").replace("{{title}}", html.escape(title))
    before, between, after = page.replace("{{plotly}}", "{{body}}").split("{{body}}")
    return "".join([before, *sections, between, get_plotlyjs(), after])


# ---- sections ------------------------------------------------------------------------------------------------
def _summary(record: SearchRecord, comparison: Comparison | None, title: str) -> str:
    metric, _ = record.objectives[0]
    best = next(trial for trial in record.trials if trial.id == record.best)
    states = {status: sum(trial.status == status for trial in record.trials) for status in ("done", "stopped", "failed", "running")}
    keys = ("scheduler",) if record.search.get("scheduler") in POPULATION else ("algorithm", "scheduler")
    how = [record.search[key] for key in keys if record.search.get(key) not in (None, "none")]
    counted = ", ".join(f"{count} {'stopped early' if status == 'stopped' else status}" for status, count in states.items() if count)
    at = f"trial {best.number}, epoch {best.best['epoch']:.3g}" if best.best and "epoch" in best.best else f"trial {best.number}"
    score = number(best.best, metric)
    cards = [(f"Best {metric} in validation", figure(score) if score is not None else "none", at)]
    if comparison is not None:
        cards.append(_test_card(comparison))
    cards.append(("Trials", f"{len(record.trials)}", counted))
    cards.append(("Time", duration(record.seconds), _starts(record.trials)))
    shown = "".join(
        f'<div class="card"><h3>{_text(head)}</h3><div class="big">{_text(big)}</div><div class="dim">{_text(small)}</div></div>'
        for head, big, small in cards
    )
    ended = f"<p>{_text(record.stopped_by)}</p>" if record.stopped_by else ""
    return f'<h1>{_text(title)}</h1><p class="dim">{_text(" with ".join(how))}</p>{ended}<div class="cards">{shown}</div>'


def _test_card(found: Comparison) -> tuple[str, str, str]:
    said = f"95 %: {found.low:.4g} to {found.high:.4g}, on {found.rows:,} rows that no trial saw"
    if found.default is not None and found.difference is not None:
        said += f". The job as it is written: {found.default:.4g}, so {found.difference:+.3g} ({found.difference_low or 0.0:+.2g} to {found.difference_high or 0.0:+.2g})"
    return f"{found.metric} on {found.split}", figure(found.score), said


def _starts(trials: Iterable[TrialRecord]) -> str:
    """How long trials took to their first step, in new processes and in those that had run one."""
    found = []
    for warm, name in ((False, "in a new process"), (True, "in a used one")):
        seconds = [trial.first_step_seconds for trial in trials if trial.warm == warm and trial.first_step_seconds is not None]
        if seconds:
            found.append(f"{statistics.median(seconds):.2g} s {name}")
    return f"to a trial's first step: {', '.join(found)}" if found else ""


def _setting(record: SearchRecord) -> str:
    names = short_names(path for trial in record.trials for path in trial.sample)
    default = next((trial for trial in record.trials if trial.origin == "default"), None)
    rows = [
        (path, say_value(record.sample[path]) if path in record.sample else "off")
        + ((say_value(default.sample[path]) if path in default.sample else "off",) if default else ())
        for path in names
    ]
    head = ("parameter", "the best trial", *(("the job as it is written",) if default else ()))
    return f'<h2>The best setting</h2><div class="card scroll">{_table(head, rows)}</div>'


def _history(record: SearchRecord) -> str:
    return _grid("History", [chart for chart in (figures.history(record), figures.wall_time(record)) if chart])


def _learning(record: SearchRecord) -> str:
    said = "Dotted lines are where the scheduler stopped trials." if figures.levels(record) else ""
    return _grid("Learning curves and rungs", [chart for chart in (figures.curves(record), figures.rungs(record)) if chart], said)


def _parameters(record: SearchRecord) -> str:
    lines = figures.parallel(record)
    shares, sentence = importance(record)
    parts = [
        _grid(
            "Parallel coordinates",
            [lines] if lines else [],
            "Drag along an axis to keep a range, drag a name to move its axis.",
            kind="wide",
        ),
        f"<h2>Importance of parameters</h2><p class='dim'>{_text(sentence)}</p>",
    ]
    if chart := figures.importance(shares):
        parts.append(_figure(chart, f"height: {90 + 34 * len(shares)}px"))
    parts.append(
        _grid(
            "Slices",
            figures.slices(record),
            "Each point is a trial's best score; the stronger its colour, the later the trial.",
            kind="small",
        )
    )
    return "".join(parts)


def _trials(record: SearchRecord) -> str:
    columns = axes(record)
    metrics = [metric for metric, _ in record.objectives]
    head = [
        "trial",
        *metrics,
        "state",
        "rung",
        "epochs",
        "rows seen",
        "time",
        *(axis.name for axis in columns),
        "origin",
        "restarts",
        "first step",
        "folder",
    ]
    rows = []
    for trial in record.trials:
        epoch = number(trial.reports[-1], "epoch") if trial.reports else None
        cells: list[tuple[Any, str]] = [(trial.number, str(trial.number))]
        cells += [_cell(number(trial.best, metric)) for metric in metrics]
        cells += [(None, trial.status), (trial.rung, str(trial.rung)), _cell(epoch), (trial.examples, f"{trial.examples:,}")]
        cells += [(trial.seconds, duration(trial.seconds)), *(_setting_cell(axis, trial) for axis in columns), (None, trial.origin)]
        halved = f", micro-batch halved {trial.halvings}×" if trial.halvings else ""
        first = trial.first_step_seconds
        cells += [(trial.restarts, f"{trial.restarts}{halved}"), (first, f"{first:.2g} s" if first is not None else "")]
        rows.append((trial.id == record.best, [*cells, (None, _inside(trial.folder, record))]))
    chosen = "best"
    body = "".join(
        f'<tr class="{chosen * best}">' + "".join(_sorting(value, shown) for value, shown in cells) + "</tr>" for best, cells in rows
    )
    heads = "".join(f'<th><button type="button">{_text(column)}</button></th>' for column in head)
    return f'<h2>All trials</h2><div class="card scroll"><table class="sorts"><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table></div>'


def _failed(record: SearchRecord) -> str:
    failed = [trial for trial in record.trials if trial.status == "failed"]
    if not failed:
        return ""
    rows = [(str(trial.number), trial.error or "", _inside(trial.log or "", record)) for trial in failed]
    return f'<h2>Failed trials</h2><div class="card scroll">{_table(("trial", "cause", "log"), rows, wrap=1)}</div>'


def _search(record: SearchRecord) -> str:
    if not record.search:
        return ""
    text = yaml.safe_dump({"search": record.search}, sort_keys=False, allow_unicode=True, default_flow_style=None, width=120)
    return f'<h2>The search</h2><details class="card"><summary>As it was asked for</summary><pre>{_text(text)}</pre></details>'


# ---- parts ---------------------------------------------------------------------------------------------------
def _grid(title: str, charts: Sequence[figures.Figure], sentence: str = "", kind: str = "") -> str:
    """A section of charts side by side, nothing where there are none."""
    if not charts:
        return ""
    said = f'<p class="dim">{_text(sentence)}</p>' if sentence else ""
    return f'<h2>{_text(title)}</h2>{said}<div class="grid {kind}">{"".join(map(_figure, charts))}</div>'


def _figure(chart: figures.Figure, style: str = "") -> str:
    """A place for the chart, and its data; a script's text must not hold tags, so `<` is written as JSON may write it."""
    data = json.dumps(chart, ensure_ascii=False, allow_nan=False).replace("<", "\\u003c")
    return f'<div class="card"><div class="figure" style="{style}"></div><script type="application/json">{data}</script></div>'


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], wrap: int = -1) -> str:
    heads = "".join(f"<th>{_text(cell)}</th>" for cell in head)
    kinds = ["wrap" if place == wrap else "" for place in range(len(head))]
    body = "".join(
        "<tr>" + "".join(f'<td class="{kind}">{_text(cell)}</td>' for kind, cell in zip(kinds, row, strict=True)) + "</tr>" for row in rows
    )
    return f"<table><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table>"


def _sorting(value: Any, shown: str) -> str:
    return f'<td data-value="{value}">{_text(shown)}</td>' if value is not None else f"<td>{_text(shown)}</td>"


def _cell(value: float | None) -> tuple[Any, str]:
    return (value, figure(value)) if value is not None else (None, "")


def _setting_cell(axis: Axis, trial: TrialRecord) -> tuple[Any, str]:
    shown = say_value(trial.sample[axis.path]) if axis.path in trial.sample else ""
    return (axis.place(trial.sample) if axis.labels is None else None, shown)


def _inside(place: str, record: SearchRecord) -> str:
    """A path below the sweep's folder: an absolute one means nothing to another reader, and a URI may hold credentials."""
    return place.removeprefix(record.folder).lstrip("/") if place.startswith(record.folder) else place.rsplit("/", 1)[-1]


def _schedule(record: SearchRecord) -> list[Mapping[str, Any]]:
    if record.schedule is None:
        return []
    return [json.loads(line) for line in Folder(record.schedule).read_bytes().decode().splitlines() if line.strip()]


def _text(text: Any) -> str:
    return html.escape(str(text))
