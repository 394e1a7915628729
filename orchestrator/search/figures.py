"""The figures of a sweep's report: each a Plotly figure as JSON, or None where there is nothing to draw.

Colours are names of the page's theme, `css:accent`. Text that comes from a user is escaped, since Plotly reads tags in it.
"""

from __future__ import annotations

import html
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from orchestrator.progress import figure
from orchestrator.records import SearchRecord, TrialRecord
from orchestrator.search.axes import axes, cut
from orchestrator.search.view import number, say_value, short_names

Figure = dict[str, Any]
STATES = {"stopped": "css:muted", "failed": "css:bad", "running": "css:text", "done": "css:accent"}
"""Status of a trial -> colour; what is drawn last is on top."""
RUNGS = ("asha", "hyperband")


def history(record: SearchRecord) -> Figure | None:
    """Each trial's best score, and the best so far, by trial."""
    metric, _ = record.objectives[0]
    scored = _scored(record)
    if not scored:
        return None
    line = {"x": [trial.number for trial, _ in scored], "y": _running_best(record, [value for _, value in scored])}
    data = [
        {**_points(record, group), "x": [trial.number for trial, _ in group], "y": [value for _, value in group], "name": status}
        | {"marker": {"color": colour, "size": 8}}
        for status, colour in STATES.items()
        if (group := [pair for pair in scored if pair[0].status == status])
    ]
    return {"data": [*data, _best_line(**line)], "layout": {"xaxis": {"title": {"text": "trial"}}, "yaxis": _metric(metric)}}


def wall_time(record: SearchRecord) -> Figure | None:
    """The best so far by the sweep's seconds, from every validation of every trial."""
    metric, _ = record.objectives[0]
    moments = [
        (trial.started + float(report["seconds"]), value, trial)
        for trial in record.trials
        for report in trial.reports
        if (value := number(report, metric)) is not None and number(report, "seconds") is not None
    ]
    if not moments:
        return None
    moments.sort(key=lambda moment: moment[0])
    best = _running_best(record, [value for _, value, _ in moments])
    kept = [place for place in range(len(best)) if place == 0 or best[place] != best[place - 1]]
    unit, name = next(
        (unit, name) for unit, name in ((1, "seconds"), (60, "minutes"), (3600, "hours")) if record.seconds < 180 * unit or unit == 3600
    )
    x = [moments[place][0] / unit for place in kept]
    texts = [_hover(record, moments[place][2]) for place in kept]
    line = _best_line([*x, max(record.seconds / unit, x[-1])], [*(best[place] for place in kept), best[-1]])
    line |= {"mode": "lines+markers", "text": [*texts, "end of the sweep"], "hovertemplate": "%{y:.4g}<br>%{text}<extra></extra>"}
    axis = {"title": {"text": f"{name} of the sweep"}, "rangemode": "tozero"}
    return {"data": [line], "layout": {"xaxis": axis, "yaxis": _metric(metric), "showlegend": False}}


def curves(record: SearchRecord) -> Figure | None:
    """Every trial's validations by rows seen; dotted where the scheduler stopped trials."""
    metric, _ = record.objectives[0]
    data: list[Figure] = []
    for status, colour in STATES.items():
        x, y, texts = [], [], []
        for trial in record.trials:
            if trial.status == status and trial.id != record.best:
                points = _curve(trial, metric)
                x += [*(seen for seen, _ in points), None]  # a gap to the next trial's line
                y += [*(value for _, value in points), None]
                texts += [*([_hover(record, trial)] * len(points)), ""]
        if any(value is not None for value in y):
            data.append(_line(x, y, texts, status, {"color": colour, "width": 1}, 0.55))
    for trial in record.trials:
        if trial.id == record.best and (points := _curve(trial, metric)):
            x, y = [seen for seen, _ in points], [value for _, value in points]
            data.append(
                _line(x, y, [_hover(record, trial)] * len(x), f"trial {trial.number}, the best", {"color": "css:good", "width": 3}, 1.0)
            )
    if not data:
        return None
    lines = [
        {
            "type": "line",
            "x0": level,
            "x1": level,
            "yref": "paper",
            "y0": 0,
            "y1": 1,
            "line": {"color": "css:muted", "width": 1, "dash": "dot"},
        }
        for level in levels(record)
    ]
    axis = {"title": {"text": "training rows seen"}, "rangemode": "tozero"}
    return {"data": data, "layout": {"xaxis": axis, "yaxis": _metric(metric), "shapes": lines}}


def levels(record: SearchRecord) -> list[float]:
    """The rows seen at which a scheduler with rungs stopped trials; those of a rung differ a little with the batch size."""
    if record.search.get("scheduler") not in RUNGS:
        return []
    groups: list[list[int]] = []
    for seen in sorted(trial.examples for trial in record.trials if trial.status == "stopped" and trial.examples):
        if groups and seen <= 1.15 * groups[-1][0]:
            groups[-1].append(seen)
        else:
            groups.append([seen])
    return [sum(group) / len(group) for group in groups] if len(groups) <= 12 else []


def rungs(record: SearchRecord) -> Figure | None:
    """How many trials reached each rung, and how many of them went on."""
    if record.search.get("scheduler") not in RUNGS:
        return None
    trials = [trial for trial in record.trials if trial.status != "failed"]
    top = max((trial.rung for trial in trials), default=0)
    if not top:
        return None
    names = ["before the first rung", *(f"rung {rung}" for rung in range(1, top + 1))]
    reached = [sum(trial.rung >= rung for trial in trials) for rung in range(top + 1)]
    on = [*reached[1:], sum(trial.rung == top and trial.status != "stopped" for trial in trials)]
    bars = [
        ("went on or finished", on, "css:accent"),
        ("ended here", [all_ - some for all_, some in zip(reached, on, strict=True)], "css:muted"),
    ]
    data = [
        {"type": "bar", "orientation": "h", "y": names, "x": counts, "name": name, "marker": {"color": colour}, "hovertemplate": "%{x} trials<extra>%{y}</extra>"}
        for name, counts, colour in bars
    ]  # fmt: skip
    return {
        "data": data,
        "layout": {"barmode": "stack", "yaxis": {"autorange": "reversed", "showgrid": False}, "xaxis": {"title": {"text": "trials"}}},
    }


def parallel(record: SearchRecord) -> Figure | None:
    """A line a trial through its setting and score. Numbers alone can be drawn, so logarithms and choices have own ticks."""
    scored = _scored(record)
    if len(scored) < 2:
        return None
    higher = record.objectives[0][1]
    dimensions = [axis.dimension([trial.sample for trial, _ in scored]) for axis in axes(record)]
    dimensions += [{"label": html.escape(name), "values": values} for name, values in _objective_values(record, scored)]
    values = sorted(value for _, value in scored)
    tenth = len(values) // 10  # a few very bad trials would leave all others one colour
    low, high = (values[tenth], values[-1]) if higher else (values[0], values[-1 - tenth])
    colour = {"color": [value for _, value in scored], "colorscale": "css:scale", "cmin": low, "cmax": high, "reversescale": not higher}
    return {
        "data": [{"type": "parcoords", "dimensions": dimensions, "line": colour}],
        "layout": {"margin": {"t": 70, "l": 70, "r": 70, "b": 24}},
    }


def slices(record: SearchRecord) -> list[Figure]:
    """The objective against each parameter, later trials darker."""
    metric, _ = record.objectives[0]
    found = []
    for axis in axes(record):
        placed = [(place, pair) for pair in _scored(record) if (place := axis.place(pair[0].sample)) is not None]
        if placed:
            group = [pair for _, pair in placed]
            marker = {"color": [trial.number for trial, _ in group], "colorscale": "css:scale", "size": 9, "line": {"width": 0}}
            points = {**_points(record, group), "x": [place for place, _ in placed], "y": [value for _, value in group], "marker": marker}
            found.append({"data": [points], "layout": {"xaxis": axis.layout(), "yaxis": _metric(metric), "showlegend": False}})
    return found


def importance(shares: Mapping[str, float]) -> Figure | None:
    """Bars of `importance.importance`, the largest on top."""
    if not shares:
        return None
    order = sorted(shares, key=lambda name: shares[name])
    bar = {"type": "bar", "orientation": "h", "y": [html.escape(name) for name in order], "x": [shares[name] for name in order]}
    bar |= {
        "marker": {"color": "css:accent"},
        "text": [f"{shares[name]:.0%}" for name in order],
        "textposition": "outside",
        "cliponaxis": False,
    }
    axis = {"tickformat": ".0%", "title": {"text": "share of the score's variance"}, "rangemode": "tozero"}
    return {"data": [{**bar, "hoverinfo": "skip"}], "layout": {"xaxis": axis, "showlegend": False, "yaxis": {"showgrid": False}}}


def pareto(record: SearchRecord) -> list[Figure]:
    """The first objective against each other one, with the trials that no other beats in all."""
    (first, _), *others = record.objectives
    found = []
    for metric, _ in others:
        pairs = [(trial, value) for trial, value in _scored(record) if number(trial.best, metric) is not None]
        groups = [
            ("beaten", [pair for pair in pairs if pair[0].id not in record.pareto], {"color": "css:muted", "size": 8}),
            ("Pareto front", sorted((pair for pair in pairs if pair[0].id in record.pareto), key=lambda pair: pair[1]), {"color": "css:good", "size": 10}),
        ]  # fmt: skip
        data = [
            {
                **_points(record, group),
                "x": [value for _, value in group],
                "y": [number(trial.best, metric) for trial, _ in group],
                "name": name,
            }
            | {
                "marker": marker,
                "mode": "lines+markers" if name == "Pareto front" else "markers",
                "line": {"color": "css:good", "dash": "dot"},
            }
            for name, group, marker in groups
            if group
        ]
        if data:
            found.append({"data": data, "layout": {"xaxis": _metric(first), "yaxis": _metric(metric)}})
    return found


def population(record: SearchRecord, schedule: Sequence[Mapping[str, Any]]) -> list[Figure]:
    """Who took over whose weights when, and each mutated parameter of each member over its rows."""
    members = {trial.id: trial for trial in record.trials}
    moves = [move for move in schedule if move.get("trial") in members]  # the last line only names the best one
    if not moves:
        return []
    lanes = [
        {
            "x": [0, trial.examples],
            "y": [trial.number] * 2,
            "mode": "lines",
            "line": {"color": "css:good" if trial.id == record.best else "css:muted"},
        }
        | {"hoverinfo": "skip", "showlegend": False}
        for trial in record.trials
    ]
    arrows = [
        {"x": move["examples"], "y": members[move["trial"]].number, "ax": move["examples"], "ay": members[move["parent"]].number}
        | {"xref": "x", "yref": "y", "axref": "x", "ayref": "y", "showarrow": True, "arrowhead": 2, "arrowcolor": "css:accent", "text": ""}
        for move in moves
        if move.get("parent") in members and move["parent"] != move["trial"]
    ]
    seen = {"title": {"text": "training rows seen"}, "rangemode": "tozero"}
    trials = {"title": {"text": "trial"}, "dtick": max(1, len(members) // 10), "zeroline": False}
    found: list[Figure] = [{"data": lanes, "layout": {"annotations": arrows, "xaxis": seen, "yaxis": trials, "showlegend": False}}]
    for axis in axes(record):
        steps = {id: [(move["examples"], axis.place(move["sample"])) for move in moves if move["trial"] == id] for id in members}
        data = [
            _line(
                [*(at for at, _ in points), members[id].examples],
                [*(value for _, value in points), points[-1][1]],
                [_hover(record, members[id])] * (len(points) + 1),
                f"trial {members[id].number}",
                {"color": "css:good" if id == record.best else "css:accent", "width": 3 if id == record.best else 1, "shape": "hv"},
                1.0 if id == record.best else 0.5,
            )
            for id, points in steps.items()
            if points
        ]
        if len({value for points in steps.values() for _, value in points}) > 1:
            found.append({"data": data, "layout": {"xaxis": seen, "yaxis": axis.layout(), "showlegend": False}})
    return found


# ---- parts ---------------------------------------------------------------------------------------------------
def _scored(record: SearchRecord) -> list[tuple[TrialRecord, float]]:
    metric = record.objectives[0][0]
    return [(trial, value) for trial in record.trials if (value := number(trial.best, metric)) is not None]


def _running_best(record: SearchRecord, values: Sequence[float]) -> list[float]:
    return list(itertools.accumulate(values, max if record.objectives[0][1] else min))


def _curve(trial: TrialRecord, metric: str) -> list[tuple[float, float]]:
    return [
        (float(report["examples"]), value)
        for report in trial.reports
        if (value := number(report, metric)) is not None and number(report, "examples") is not None
    ]


def _objective_values(record: SearchRecord, scored: Sequence[tuple[TrialRecord, float]]) -> list[tuple[str, list[float]]]:
    every = [(metric, [number(trial.best, metric) for trial, _ in scored]) for metric, _ in record.objectives]
    return [(metric, values) for metric, values in every if None not in values]  # pyright: ignore[reportReturnType]


def _points(record: SearchRecord, group: Sequence[tuple[TrialRecord, float]]) -> Figure:
    texts = [_hover(record, trial) for trial, _ in group]
    return {"type": "scatter", "mode": "markers", "text": texts, "hovertemplate": "%{y:.4g}<br>%{text}<extra></extra>"}


def _line(x: Sequence[Any], y: Sequence[Any], texts: Sequence[str], name: str, line: Figure, opacity: float) -> Figure:
    shape = {"type": "scatter", "mode": "lines+markers", "marker": {"size": 4, "color": line["color"]}, "line": line, "opacity": opacity}
    return {**shape, "x": x, "y": y, "text": texts, "name": name, "hovertemplate": "%{y:.4g}<br>%{text}<extra></extra>"}


def _best_line(x: Sequence[float], y: Sequence[float]) -> Figure:
    line = {"color": "css:good", "width": 2, "shape": "hv"}
    return {
        "type": "scatter",
        "mode": "lines",
        "x": x,
        "y": y,
        "line": line,
        "marker": {"color": "css:good"},
        "name": "best so far",
        "hoverinfo": "skip",
    }


def _hover(record: SearchRecord, trial: TrialRecord) -> str:
    names = short_names(trial.sample)
    setting = [f"{html.escape(names[path])}: {html.escape(cut(say_value(value), 40))}" for path, value in trial.sample.items()]
    score = number(trial.best, record.objectives[0][0])
    return "<br>".join(
        [f"<b>trial {trial.number}</b>, {trial.status}" + (f", best {figure(score)}" if score is not None else ""), *setting]
    )


def _metric(metric: str) -> Figure:
    return {"title": {"text": html.escape(metric)}}
