"""What a sweep knows of its trials: fed with what happens to them, it keeps a record of each on disk and says when the sweep is over.

The records are what a sweep continues from: the driver may be killed at any time. Ray's own state of a sweep is not used for that.
It lacks what the scheduler knows, it is written every so often rather than when something happens, and one that can't be read is
replaced by an empty one without a word.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Mapping, Sequence
from typing import Any

from orchestrator.config import SearchSection
from orchestrator.progress import Clock
from orchestrator.records import TrialRecord
from orchestrator.search.disk import Objectives, value
from orchestrator.search.view import SweepView
from orchestrator.storage import Folder

RECORD, CLOCK = "record.json", "clock.json"
CLOCK_EVERY_S = 5.0


class Ledger:
    """The trials of a sweep in `folder`, by the ids that Ray Tune gives them, and what of its budgets is used.

    `rungs` are the examples at which the scheduler decides; `population` says that trials take each other's weights over.
    """

    def __init__(
        self,
        folder: Folder,
        search: SearchSection,
        objectives: Objectives,
        view: SweepView,
        *,
        rungs: Sequence[float] = (),
        population: bool = False,
        known: Sequence[TrialRecord] = (),
        clock: Clock = time.monotonic,
    ):
        self.folder, self.search, self.objectives, self.view = folder, search, objectives, view
        self.rungs, self.population = tuple(rungs), population
        self.stopped_by: str | None = None
        """Why the sweep is to end before its last trial; set once."""
        self._records: dict[str, TrialRecord] = {trial.id: trial for trial in known}
        self._ids: dict[str, str] = {}
        self._clock = clock
        self._began = clock() - spent(folder)
        self._saved = -math.inf
        self._since_best = 0
        self._best_value: float | None = None
        for trial in sorted(known, key=lambda trial: trial.number):
            if trial.status in ("done", "stopped"):
                self._count(trial)

    # ---- what there is -----------------------------------------------------------------------------------------
    @property
    def records(self) -> list[TrialRecord]:
        """Of all trials, by number."""
        return sorted(self._records.values(), key=lambda trial: trial.number)

    @property
    def seconds(self) -> float:
        """Of the sweep, those before it was continued too."""
        return self._clock() - self._began

    @property
    def examples(self) -> int:
        """Rows that all trials were trained on."""
        return sum(trial.examples for trial in self._records.values())

    def knows(self, tune_id: str) -> bool:
        return tune_id in self._ids

    def of(self, tune_id: str) -> TrialRecord:
        return self._records[self._ids[tune_id]]

    # ---- what happens ------------------------------------------------------------------------------------------
    def begin(self, tune_id: str, config: Mapping[str, Any], folder: Folder) -> None:
        """A trial starts, or goes on after a pause or the death of its process."""
        key = folder.path.rstrip("/").rsplit("/", 1)[-1]
        self._ids[tune_id] = key
        before = self._records.get(key)
        if before is None:
            record = TrialRecord(
                id=key,
                number=config["number"],
                origin=config["origin"],
                sample=dict(config["sample"]),
                status="running",
                started=round(self.seconds, 3),
                folder=folder.uri,
            )
        else:
            record = before.model_copy(update={"status": "running", "error": None, "log": None, "sample": dict(config["sample"])})
        self._keep(record)
        self.view.started(record)

    def report(self, tune_id: str, report: Mapping[str, Any]) -> TrialRecord:
        """A trial reports a validation; one that it had reported before, in an earlier attempt, changes nothing."""
        record = self.of(tune_id)
        report = dict(report)
        if self._is_known(record, report):
            return record
        reports = record.reports if self.population else tuple(one for one in record.reports if one["step"] < report["step"])
        reports = (*reports, report)
        examples = report["examples"]
        grown = max(0, examples - (record.reports[-1]["examples"] if record.reports else 0)) if self.population else 0
        found: dict[str, Any] = {
            "reports": reports,
            "best": self._standing(reports),
            "examples": record.examples + grown if self.population else examples,
            "rung": sum(examples >= rung for rung in self.rungs),
            "seconds": report["seconds"],
            "halvings": report.get("micro_batch_halvings", record.halvings),
            "parent": report.get("parent", record.parent),
            "first_step_seconds": record.first_step_seconds or report.get("first_step_seconds"),
            **{name: report[name] for name in ("pid", "node", "warm") if name in report},
        }
        record = record.model_copy(update=found)
        self._keep(record)
        self.view.reported(record, report)
        self._save_clock()
        return record

    def die(self, tune_id: str) -> TrialRecord:
        """A trial's process is gone, and the trial starts again."""
        record = self.of(tune_id)
        record = record.model_copy(update={"restarts": record.restarts + 1})
        self._keep(record)
        return record

    def end(self, tune_id: str, status: str, error: str | None = None) -> TrialRecord:
        """A trial is over: done, stopped by the scheduler, or failed."""
        record = self.of(tune_id)
        found: dict[str, Any] = {"status": status, "error": error}
        if status == "stopped" and record.reports:  # it reached this rung and was not let on
            found["rung"] = max(0, record.rung - 1)
        if status == "failed":
            log = Folder(record.folder) / "failure.log"
            found["log"] = str(log) if log.exists() else None
        record = record.model_copy(update=found)
        self._keep(record)
        self._count(record)
        self.view.ended(record)
        self._save_clock(at_once=True)
        return record

    def close(self) -> None:
        """The sweep is over, for now: what still ran is marked as stopped in memory, and goes on where the sweep is continued."""
        for record in self.records:
            if record.status == "running":
                self._records[record.id] = record.model_copy(update={"status": "stopped"})
        self._save_clock(at_once=True)

    # ---- budgets -----------------------------------------------------------------------------------------------
    def over(self) -> str | None:
        """A sentence where a budget is used up or the best has not become better for long enough."""
        search = self.search
        if self.stopped_by is None:
            if search.max_seconds is not None and self.seconds >= search.max_seconds:
                self.stopped_by = f"search.max_seconds: {search.max_seconds:g} s are over"
            elif search.max_examples is not None and self.examples >= search.max_examples:
                self.stopped_by = f"search.max_examples: {self.examples:,} rows were trained on"
            elif search.plateau is not None and self._since_best >= search.plateau:
                self.stopped_by = f"search.plateau: the best has not improved in {self._since_best} trials"
        return self.stopped_by

    # ---- inside ------------------------------------------------------------------------------------------------
    def _standing(self, reports: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
        """The report whose checkpoint is kept: the trial's best, or of a population what came with the weights that it has now."""
        last, metric = reports[-1], self.objectives[0][0]
        if last.get("best_step") is None:
            return None

        def is_it(report: Mapping[str, Any]) -> bool:
            return report["step"] == last["best_step"] and report.get(metric) == last["best_value"]

        own = next((report for report in reversed(reports) if is_it(report)), None)
        others = (report for trial in self._records.values() for report in trial.reports if is_it(report))
        found = own or next(others, None)
        named = {"step": last["best_step"], "best_step": last["best_step"], "best_value": last["best_value"], metric: last["best_value"]}
        return {**(found or {"epoch": last["epoch"], "examples": last["examples"]}), **named}

    def _is_known(self, record: TrialRecord, report: Mapping[str, Any]) -> bool:
        metric = self.objectives[0][0]
        return any(one["step"] == report["step"] and one.get(metric) == report.get(metric) for one in record.reports)

    def _count(self, trial: TrialRecord) -> None:
        """One more trial has ended: is the best better for it?"""
        metric, higher = self.objectives[0]
        found = value(trial.best, metric)
        if found is not None and (self._best_value is None or (found > self._best_value if higher else found < self._best_value)):
            self._best_value, self._since_best = found, 0
        else:
            self._since_best += 1

    def _keep(self, record: TrialRecord) -> None:
        self._records[record.id] = record
        (Folder(record.folder) / RECORD).write_json(record.to_json())

    def _save_clock(self, *, at_once: bool = False) -> None:
        if at_once or self._clock() - self._saved > CLOCK_EVERY_S:
            self._saved = self._clock()
            (self.folder / CLOCK).write_json({"seconds": round(self.seconds, 3)})


def spent(folder: Folder) -> float:
    """Seconds of the sweep in `folder` before now, to within `CLOCK_EVERY_S` of a killed one."""
    place = folder / CLOCK
    return float(place.read_json()["seconds"]) if place.exists() else 0.0


def read(folder: Folder) -> tuple[list[TrialRecord], list[str]]:
    """The records of the trials of a sweep in `folder`, by number, and a sentence for each that can't be read."""
    records, torn = [], []
    for name in (folder / "trials").names():
        place = folder / "trials" / name / RECORD
        if not place.exists():
            continue
        try:
            records.append(TrialRecord.parse(place.read_json(), name))
        except ValueError as error:
            reason = str(error).splitlines()[0]
            torn.append(f"The record {str(place)!r} can't be read ({reason}), so what it says of its trial is forgotten.")
    return sorted(records, key=lambda trial: trial.number), torn


def most_common_cause(trials: Sequence[TrialRecord]) -> str | None:
    """What most of the failed trials say, numbers aside."""
    said: dict[str, list[str]] = {}
    for trial in trials:
        if trial.error:
            said.setdefault(re.sub(r"[\d.e+-]+", "#", trial.error), []).append(trial.error)
    return max(said.values(), key=len)[0] if said else None
