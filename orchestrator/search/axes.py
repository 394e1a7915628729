"""Where the values of a search space lie on the axes of a report's figures."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from orchestrator.records import SearchRecord
from orchestrator.search.view import say_value, short_names

LOGARITHMIC = ("loguniform", "logint")
OFF = "off"


@dataclass(frozen=True)
class Axis:
    """How the values of one path of the job lie on an axis."""

    path: str
    name: str
    log: bool = False
    labels: tuple[str, ...] | None = None
    """Of a choice, in its order; None: the values are numbers."""

    def place(self, sample: Mapping[str, Any]) -> float | None:
        """The number that stands for the sample's value; None where the path is off."""
        if self.path not in sample:
            return None
        value = sample[self.path]
        return float(value) if self.labels is None else float(self.labels.index(say_value(value)))

    def layout(self) -> dict[str, Any]:
        """The axis of a chart whose coordinates are places."""
        axis: dict[str, Any] = {"title": {"text": html.escape(self.name)}}
        if self.log:
            marks = [mark * 10.0**power for power in range(-12, 13) for mark in (1, 2, 5)]
            return {**axis, "type": "log", "tickvals": marks, "ticktext": [say_value(float(f"{mark:.3g}")) for mark in marks]}
        if self.labels is None:
            return axis
        texts = [html.escape(cut(label)) for label in self.labels]
        return {**axis, "tickvals": list(range(len(texts))), "ticktext": texts, "range": [-0.5, len(texts) - 0.5], "zeroline": False}

    def dimension(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """An axis of parallel coordinates; trials in which the path is off get a place of their own below."""
        places = [self.place(sample) for sample in samples]
        values = [math.log10(place) if self.log and place is not None else place for place in places]
        there = [value for value in values if value is not None] or [0.0]
        low, high = min(there), max(there)
        if self.labels is not None:
            ticks = {float(place): html.escape(cut(label, 12)) for place, label in enumerate(self.labels)}
            low, high = 0.0, float(len(self.labels) - 1)
        else:
            marks = [low + (high - low) * step / 4 for step in range(5)] if high > low else [low]
            ticks = {mark: say_value(float(f"{10**mark if self.log else mark:.3g}")) for mark in marks}
        off = low - (high - low or 1.0) / (len(self.labels) if self.labels else 5)
        if None in values:
            ticks[off], low = OFF, off
        pad = 0.5 if low == high else 0.0
        dimension = {"label": html.escape(self.name), "values": [off if value is None else value for value in values]}
        return {**dimension, "tickvals": list(ticks), "ticktext": list(ticks.values()), "range": [low - pad, high + pad]}


def axes(record: SearchRecord) -> list[Axis]:
    """The paths that were searched, in the order of the job."""
    space: Mapping[str, Mapping[str, Any]] = record.search.get("space") or {}
    paths = list(dict.fromkeys([*space, *(path for trial in record.trials for path in trial.sample)]))
    names = short_names(paths)
    found = []
    for path in paths:
        values = [trial.sample[path] for trial in record.trials if path in trial.sample]
        choices = list(space.get(path, {}).get("choice") or ())
        numbers = not choices and all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values)
        if numbers:
            log = any(kind in space.get(path, {}) for kind in LOGARITHMIC) and all(value > 0 for value in values)
            found.append(Axis(path, names[path], log))
        else:
            found.append(Axis(path, names[path], labels=tuple(dict.fromkeys(say_value(value) for value in [*choices, *values]))))
    return found


def cut(text: str, most: int = 18) -> str:
    """At most so many characters of a text."""
    return text if len(text) <= most else text[: most - 1] + "…"
