"""The trials of a sweep as MLflow runs below the winner's, so that MLflow's table and compare view show them side by side."""

from __future__ import annotations

import json
import math
import re
from typing import TYPE_CHECKING, Any

from orchestrator import bundle as bundles
from orchestrator.records import SearchRecord, TrialRecord

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

MOST = 5000
"""Characters of a value."""
COUNTS = ("examples", "step", "seconds", "best_step", "best_value", "pid", "attempt", "total_steps", "micro_batch_halvings")
"""Numbers of a report that are no scores."""


def log(client: MlflowClient, experiment_id: str, parent: str, searched: SearchRecord, now: int) -> None:
    """A run for each trial of a sweep that ended `now` (milliseconds after 1970): its setting, its scores over the rows it saw, how it ended."""
    began = now - round(1000 * searched.seconds)
    for trial in searched.trials:
        _log(client, experiment_id, parent, trial, searched, began + round(1000 * trial.started))


def lineage(searched: SearchRecord) -> dict[str, str]:
    """Tags that say which sweep a version is the winner of."""
    number = next(trial.number for trial in searched.trials if trial.id == searched.best)
    return {
        "search.trial": str(number),
        "search.trials": str(searched.trials_run),
        "search.sample": text(searched.sample),
        "search.folder": searched.folder,
    }


def key(name: str) -> str:
    """A name as MLflow takes it."""
    return re.sub(r"[^\w./ :-]", "_", name)


def text(value: Any) -> str:
    """A value as MLflow takes it, without secrets."""
    written = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return bundles.without_secrets(written)[:MOST]


def _log(client: MlflowClient, experiment_id: str, parent: str, trial: TrialRecord, searched: SearchRecord, start: int) -> None:
    from mlflow.entities import Metric, Param

    end = start + round(1000 * trial.seconds)
    tags = {
        "mlflow.parentRunId": parent,
        "trial": trial.id,
        "number": str(trial.number),
        "origin": trial.origin,
        "status": trial.status,
        "rung": str(trial.rung),
        "folder": trial.folder,
        **({"error": text(trial.error)} if trial.error else {}),
    }
    run_id = client.create_run(experiment_id, start_time=start, run_name=f"trial {trial.number}", tags=tags).info.run_id
    points = [
        Metric(key(name), float(value), start + round(1000 * report["seconds"]), report["examples"])
        for report in trial.reports
        for name, value in report.items()
        if name not in COUNTS and _is_number(value)
    ]
    best = trial.best or {}
    points += [Metric(key(f"best_{name}"), float(best[name]), end, 0) for name, _ in searched.objectives if _is_number(best.get(name))]
    params = [Param(key(path), text(value)) for path, value in trial.sample.items()]
    for first in range(0, max(1, len(points)), 1000):
        client.log_batch(run_id, metrics=points[first : first + 1000], params=params if first == 0 else ())
    client.set_terminated(run_id, status={"done": "FINISHED", "failed": "FAILED"}.get(trial.status, "KILLED"), end_time=end)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
