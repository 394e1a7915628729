"""What a sweep tries next, as a searcher of Ray Tune: the known settings first, then what Optuna or hyperopt proposes.

Whatever the algorithm, spaces, conditions, seeds and known settings mean the same, no setting of a sweep comes twice,
and every report is kept: so that a sweep that goes on after a death knows what it knew, and its scheduler too
(`schedulers` reads `reports`).

Imports Ray: import it late.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ray.tune.search import Searcher

from orchestrator.records import TrialRecord
from orchestrator.search.space import ENUMERABLE, Sample, Space

if TYPE_CHECKING:
    from orchestrator.search.engines import Engine

TRIES = 20
"""Suggestions in a row that were there before, after which what is left of the space is listed."""


@dataclass
class Trial:
    """A trial that was asked for."""

    number: int
    origin: str
    sample: Sample
    reports: list[dict[str, Any]] = field(default_factory=list)
    """The numbers that decide: objectives and `examples`."""


class Proposals(Searcher):
    """Gives each trial `{"sample": …, "number": …, "origin": "default" | "start" | "search"}`.

    `engine` None: what is queued is all there is (a grid, a replay). `known` are trials of an earlier start of the sweep:
    those that have ended are told to the engine, those that were running come first and go on.
    """

    def __init__(self, space: Space, engine: Engine | None, queued: Iterable[tuple[str, Sample]], known: Sequence[TrialRecord] = ()):
        super().__init__()
        self._space, self._engine = space, engine
        self._distinct = not space.mutable  # a population's samples change, and its trials have folders by their ids
        self._running: set[str] = set()
        self._paused: set[str] = set()
        self._open: set[str] = set()
        """Trials that have not ended."""
        self._exhausted = False
        self._limit: int | None = None
        self.ended: dict[str, Trial] = {}
        """Trials of an earlier start that are over, by id: the scheduler judges the others beside them."""
        self._asked: dict[str, Trial] = {}
        self._first: list[Trial] = []
        self._seen: set[str] = set()
        for record in known:
            self._know(record)
        self._count = max((record.number + 1 for record in known), default=0)
        numbers = {record.number for record in known}
        for number, (origin, sample) in enumerate(queued):
            if self._new(sample) and number not in numbers:
                self._seen.add(space.key(sample))
                self._first.append(Trial(-1, origin, sample))

    def reports(self, trial_id: str) -> Sequence[Mapping[str, Any]]:
        """What a trial has reported so far, in earlier lives too: the objectives and `examples` of each validation."""
        return self._asked[trial_id].reports if trial_id in self._asked else ()

    # ---- what Tune calls -------------------------------------------------------------------------------------
    def set_search_properties(self, metric: str | None, mode: str | None, config: dict[str, Any], **spec: Any) -> bool:
        return True

    def set_max_concurrency(self, max_concurrent: int) -> bool:
        # A population takes turns, all of it: its resources say how many of it run at once. Elsewhere paused trials don't count.
        self._limit = None if self._space.mutable else max_concurrent
        return True

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        if self._limit is not None and len(self._running) >= self._limit:
            return None
        trial = None if self._exhausted or len(self.ended) + len(self._asked) >= self._space.search.num_trials else self._next(trial_id)
        if trial is None:
            # Tune ends the process of a paused trial where there are no more trials to come: it starts a new one for it then.
            self._exhausted = True
            return None if self._open else Searcher.FINISHED
        self._asked[trial_id] = trial
        self._running.add(trial_id)
        self._open.add(trial_id)
        return {"sample": trial.sample, "number": trial.number, "origin": trial.origin}

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        if trial_id not in self._paused:  # Tune asks the scheduler first, then tells the searcher
            self._running.add(trial_id)
        self._keep(trial_id, result)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        for trials in (self._running, self._paused, self._open):
            trials.discard(trial_id)
        if trial_id not in self._asked:
            return
        if result:
            self._keep(trial_id, result)
        if self._engine is not None:
            self._engine.tell(trial_id, None if error else worth(self._space, self._asked[trial_id].reports))

    def on_pause(self, trial_id: str) -> None:
        """A scheduler lets a trial wait: another may run."""
        self._running.discard(trial_id)
        self._paused.add(trial_id)

    def on_unpause(self, trial_id: str) -> None:
        self._paused.discard(trial_id)
        self._running.add(trial_id)

    def save(self, checkpoint_path: str) -> None:
        """Nothing: a sweep continues from its ledger."""

    # ---- what is next ----------------------------------------------------------------------------------------
    def _next(self, trial_id: str) -> Trial | None:
        if self._first:
            trial = self._first.pop(0)
            self._note(trial_id, trial)
        else:
            sample = self._fresh(trial_id)
            if sample is None:
                return None
            trial = Trial(-1, "search", sample)
        self._seen.add(self._space.key(trial.sample))
        if trial.number < 0:
            trial.number = self._count
            self._count += 1
        return trial

    def _fresh(self, trial_id: str) -> Sample | None:
        """A sample that no trial had; None: there is none left."""
        if self._engine is None:
            return None
        for _ in range(TRIES):
            sample = self._engine.ask(trial_id)
            if self._new(sample):
                return sample
            self._engine.tell(trial_id, None)
        size = self._space.grid_size
        left = [sample for sample in self._space.grid() if self._new(sample)] if size is not None and size <= ENUMERABLE else []
        if not left:
            return None
        self._engine.note(trial_id, left[0])
        return left[0]

    def _new(self, sample: Sample) -> bool:
        return not self._distinct or self._space.key(sample) not in self._seen

    # ---- what is known ---------------------------------------------------------------------------------------
    def _know(self, record: TrialRecord) -> None:
        trial = Trial(record.number, record.origin, dict(record.sample))
        for report in record.reports:
            self._add(trial, report)
        self._seen.add(self._space.key(trial.sample))
        if record.status == "running":
            self._first.append(trial)
            return
        self.ended[record.id] = trial
        self._note(record.id, trial)
        if self._engine is not None:
            self._engine.tell(record.id, None if record.status == "failed" else worth(self._space, trial.reports))

    def _keep(self, trial_id: str, result: Mapping[str, Any]) -> None:
        if trial_id in self._asked:
            trial = self._asked[trial_id]
            before = len(trial.reports)
            self._add(trial, result)
            self._hear(trial_id, trial.reports[before:])

    def _note(self, trial_id: str, trial: Trial) -> None:
        """Tells the engine of a trial that it has not proposed, and of what that has reported."""
        if self._engine is not None:
            self._engine.note(trial_id, trial.sample)
            self._hear(trial_id, trial.reports)

    def _hear(self, trial_id: str, reports: Iterable[Mapping[str, Any]]) -> None:
        metric, _ = self._space.objectives[0]
        for report in reports:
            if self._engine is not None and metric in report:
                self._engine.hear(trial_id, report[metric])

    def _add(self, trial: Trial, result: Mapping[str, Any]) -> None:
        numbers = {name: result[name] for name in ("examples", *(name for name, _ in self._space.objectives)) if name in result}
        # A trial that ends says its last report again, and one that is started again all that it had said.
        said = trial.reports if self._distinct else trial.reports[-1:]
        if "examples" in numbers and len(numbers) > 1 and not any(report["examples"] == numbers["examples"] for report in said):
            trial.reports.append(numbers)


def worth(space: Space, reports: Sequence[Mapping[str, Any]]) -> list[float] | None:
    """The objectives at a trial's best validation by the first of them; None: it has no number for each."""
    (first, higher), *_ = space.objectives
    scored = [report for report in reports if all(math.isfinite(report.get(name, math.nan)) for name, _ in space.objectives)]
    if not scored:
        return None
    best = max(scored, key=lambda report: report[first] if higher else -report[first])
    return [float(best[name]) for name, _ in space.objectives]
