"""What a person sees of a sweep while it runs: a table of trials, the best so far and the time left."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from orchestrator.progress import Clock, Display, Row, duration, figure
from orchestrator.records import TrialRecord

ROWS = 12
"""Lines of the table, running trials and the best ones together."""


class SweepView:
    """Fed by the driver with the trials as they are, it draws them on a display. Callable from several threads.

    `examples` are the rows that a whole trial sees at most, `spent` the seconds of the sweep before it was continued.
    """

    def __init__(
        self,
        display: Display,
        *,
        objectives: Sequence[tuple[str, bool]],
        paths: Sequence[str],
        num_trials: int,
        examples: int | None = None,
        max_seconds: float | None = None,
        max_examples: int | None = None,
        spent: float = 0.0,
        clock: Clock = time.monotonic,
    ):
        self._display, self._clock = display, clock
        self._objectives, self._names = tuple(objectives), short_names(paths)
        self._num_trials, self._examples = num_trials, examples
        self._max_seconds, self._max_examples = max_seconds, max_examples
        self._began = clock() - spent
        self._trials: dict[str, _Seen] = {}
        self._best: str | None = None
        self._at_once = 1
        self._lock = threading.RLock()

    def known(self, trials: Iterable[TrialRecord]) -> None:
        """Trials that had ended before the sweep was continued: shown, and not news."""
        with self._lock:
            for trial in trials:
                self._keep(trial)
            self._draw()

    def started(self, trial: TrialRecord) -> None:
        with self._lock:
            self._keep(trial)
            self._at_once = max(self._at_once, len(self._running()))
            self._draw()

    def reported(self, trial: TrialRecord, report: Mapping[str, Any]) -> None:
        """A validation of a running trial; `trial` as it is after it."""
        with self._lock:
            news = []
            if self._keep(trial):
                news.append(f"trial {trial.number}: {self._scores(report)} at {_epoch(report)}, the best so far")
            self._draw(news)

    def ended(self, trial: TrialRecord) -> None:
        with self._lock:
            self._keep(trial)
            if trial.status == "failed":
                self._display.warn(
                    f"trial {trial.number} failed: {trial.error or 'no reason given'}" + (f"; log: {trial.log}" if trial.log else "")
                )
                self._draw()
                return
            how = f"stopped at rung {trial.rung + 1}" if trial.status == "stopped" else "done"
            best = f"best {self._scores(trial.best)} at {_epoch(trial.best)}" if trial.best else "no score"
            self._draw([f"trial {trial.number} {how} after {duration(trial.seconds)}: {best} ({self._setting(trial)})"])

    def refresh(self) -> None:
        """Draws again, for the times that have gone on."""
        with self._lock:
            if self._running():
                self._draw()

    def left(self) -> float | None:
        """Seconds until the sweep is over, by its trials so far and its budgets; None while that can't be said."""
        with self._lock:
            elapsed = self._clock() - self._began
            found = [self._work_left()]
            if self._max_seconds is not None:
                found.append(max(0.0, self._max_seconds - elapsed))
            seen = sum(trial.record.examples for trial in self._trials.values())
            if self._max_examples is not None and seen:
                found.append(max(0.0, (self._max_examples - seen) * elapsed / seen))
            return min((seconds for seconds in found if seconds is not None), default=None)

    def _work_left(self) -> float | None:
        now = self._clock()
        ended = [trial.record for trial in self._trials.values() if trial.record.status != "running"]
        running = [(now - trial.since, trial.record.examples) for trial in self._running()]
        guesses = [seconds * (self._examples or 0) / examples for seconds, examples in running if examples]
        lengths = [trial.seconds for trial in ended if trial.status != "failed"] or [guess for guess in guesses if guess]
        if not lengths:
            return None
        typical = sum(lengths) / len(lengths)
        open_ = [max(typical - seconds, 0.0) for seconds, _ in running]
        waiting = max(0, self._num_trials - len(ended) - len(running))
        return max([(sum(open_) + waiting * typical) / self._at_once, *open_])

    def _keep(self, trial: TrialRecord) -> bool:
        """Whether the trial is the best now and better than all before it."""
        metric, higher = self._objectives[0]
        was, value = self._value(self._best), number(trial.best, metric)
        since = self._trials[trial.id].since if trial.id in self._trials else self._clock()
        self._trials[trial.id] = _Seen(trial, since)
        better = value is not None and (was is None or (value > was if higher else value < was))
        if better:
            self._best = trial.id
        return better

    def _value(self, trial: str | None) -> float | None:
        return None if trial is None else number(self._trials[trial].record.best, self._objectives[0][0])

    def _running(self) -> list[_Seen]:
        return sorted((seen for seen in self._trials.values() if seen.record.status == "running"), key=lambda seen: seen.record.number)

    def _draw(self, news: Sequence[str] = ()) -> None:
        running, failed = self._running(), sum(seen.record.status == "failed" for seen in self._trials.values())
        figures = {"running": f"{len(running)} running"} if running else {}
        if failed:
            figures["failed"] = f"{failed} failed"
        if self._best is not None:
            best = self._trials[self._best].record
            figures["best"] = f"best {self._scores(best.best or {})} (trial {best.number})"
        ended = len(self._trials) - len(running)
        self._display.step(ended, max(self._num_trials, len(self._trials)), "trials", left=self.left(), **figures)
        self._display.table(self._columns(), self._rows(running), news)

    def _columns(self) -> list[str]:
        return ["trial", "state", "rung", *(metric for metric, _ in self._objectives), "epoch", "time", *self._names.values()]

    def _rows(self, running: Sequence[_Seen]) -> list[Row]:
        """The best one first, then what runs, then the best of what has ended."""
        first, higher = self._objectives[0]
        ended = [seen for seen in self._trials.values() if seen.record.status != "running" and seen.record.id != self._best]
        scored = [(value, seen) for seen in ended if (value := number(seen.record.best, first)) is not None]
        scored.sort(key=lambda pair: (-pair[0] if higher else pair[0], pair[1].record.number))
        top = [self._trials[self._best]] if self._best is not None else []
        going = [seen for seen in running if seen.record.id != self._best]
        room = ROWS - len(top)
        shown = going[: max(room - 3, room - len(scored))]
        return [self._row(seen) for seen in [*top, *shown, *(seen for _, seen in scored[: room - len(shown)])]]

    def _row(self, seen: _Seen) -> Row:
        trial = seen.record
        seconds = self._clock() - seen.since if trial.status == "running" else trial.seconds
        last = trial.reports[-1] if trial.reports else None
        style = "bold green" if trial.id == self._best else {"running": "", "failed": "red"}.get(trial.status, "dim")
        scores = (figure(value) if (value := number(trial.best, metric)) is not None else "" for metric, _ in self._objectives)
        setting = (say_value(trial.sample[path]) if path in trial.sample else "" for path in self._names)
        epoch = f"{last['epoch']:.3g}" if last and "epoch" in last else ""
        return ([f"{trial.number}", _state(trial), f"{trial.rung}", *scores, epoch, duration(seconds), *setting], style)

    def _scores(self, report: Mapping[str, Any]) -> str:
        return ", ".join(f"{metric} {figure(value)}" for metric, _ in self._objectives if (value := number(report, metric)) is not None)

    def _setting(self, trial: TrialRecord) -> str:
        named = [f"{name} {say_value(trial.sample[path])}" for path, name in self._names.items() if path in trial.sample]
        return ", ".join(named) if trial.origin != "default" else "the job as it is written"


@dataclass(frozen=True)
class _Seen:
    record: TrialRecord
    since: float
    """When it was first seen, on the view's clock."""


def short_names(paths: Iterable[str]) -> dict[str, str]:
    """Path of the job -> as little of its end as tells it from the others."""
    paths = list(paths)
    names: dict[str, str] = {}
    for path in paths:
        parts = path.split(".")
        ends = (".".join(parts[-count:]) for count in range(1, len(parts)))
        names[path] = next((end for end in ends if sum(f".{other}".endswith(f".{end}") for other in paths) == 1), path)
    return names


def say_value(value: Any) -> str:
    """A value of a setting as people write it: 3e-5, none, r=4 alpha=8."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        number, _, exponent = (f"{value:.2e}" if 0 < abs(value) < 1e-3 else f"{value:.3g}").partition("e")
        return f"{number.rstrip('0').rstrip('.')}e{int(exponent)}" if exponent else number
    if isinstance(value, Mapping):
        return " ".join(f"{key}={say_value(item)}" for key, item in value.items()) or "{}"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(say_value, value)) or "[]"
    return str(value)


def _state(trial: TrialRecord) -> str:
    if trial.status == "running" and not trial.reports:
        return "starts again" if trial.restarts else "starts"
    return trial.status


def _epoch(report: Mapping[str, Any]) -> str:
    return f"epoch {report['epoch']:.3g}" if "epoch" in report else f"step {report.get('step', '?')}"


def number(report: Mapping[str, Any] | None, metric: str) -> float | None:
    """The value of a metric in a report; None where the report lacks it or it isn't a number."""
    value = (report or {}).get(metric)
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None
