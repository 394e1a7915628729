"""What a stage leaves behind: one frozen record each, on disk before the next stage starts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from orchestrator.schema import Schema
from orchestrator.tasks import AnyTask

if TYPE_CHECKING:
    import pandas


class PreparedFile(Schema):
    path: str
    """Relative to the prepared data's folder."""
    rows: int


class PreparedSplit(Schema):
    rows: int
    files: tuple[PreparedFile, ...]


class PreparedData(Schema):
    """A canonical Parquet data set per split: role columns, `row_id` (string), and `_row` (int64, its row in the file).

    Rows lie in the files at random; each file is small enough to be one Ray Data block.
    """

    root: str
    """URI of the folder."""
    fingerprint: str
    """Of the data's bytes and of what was asked of prepare."""
    task: AnyTask
    """Completed: label names and all that the data decides."""
    splits: dict[str, PreparedSplit]
    """train, validation, test; a split may have no rows."""
    observed: dict[str, dict[str, Any]]
    """Each split's merged observation (label counts, …)."""
    rows_read: int
    rows_bad: int
    quarantine: str | None = None
    """JSONL file with file, row, column, expected and found of each bad row."""
    sources: dict[str, tuple[str, ...]] = {}
    """Split -> files read."""


class TrainRecord(Schema):
    bundle: str
    """URI of the bundle with the best weights."""
    metrics: dict[str, float]
    """Validation metrics of the best checkpoint."""
    best_step: int
    steps: int
    epochs: float
    rows_seen: int
    global_batch_size: int
    num_workers: int
    precision: str
    seconds: float
    examples_per_second: float
    data_wait_share: float
    """Share of training time in which the loop waited for rows."""
    peak_memory_bytes: int
    timings: dict[str, float] = {}
    """Seconds from the command to the first step, by part."""
    truncated_share: float | None = None
    """Share of training examples cut at the model's length, where the task cuts."""
    resumed_from: int | None = None
    """The step this run continued from, where it did."""
    history: str
    """JSONL file: metrics over steps."""
    new_weights: tuple[str, ...] = ()
    """Weights of the model that the base lacks; names that differ by a number only stand once, as in h.*.bias (12)."""
    unused_weights: tuple[str, ...] = ()
    """Weights of the base that the model has no place for."""


class TrialRecord(Schema):
    """One trial of a sweep: its setting, all that it reported, and how it ended."""

    id: str
    number: int
    """Trials count from 0, in the order in which they were asked for."""
    origin: Literal["default", "start", "search"] = "search"
    """The job as it is written, a start point of the job, or a suggestion of the algorithm."""
    sample: dict[str, Any]
    """Path of the job -> value; a conditional path that is off is absent. Of a population's member, the last one."""
    status: Literal["running", "done", "stopped", "failed"]
    """`stopped`: by the scheduler or the sweep's end, before its last example."""
    reports: tuple[dict[str, Any], ...] = ()
    """One a validation: the metrics, `examples`, `epoch`, `step`, `train_loss`, `seconds` of the trial, …"""
    best: dict[str, Any] | None = None
    """The report of its best validation by the first objective; None: it has none."""
    rung: int = 0
    """How many of the scheduler's decisions it survived."""
    started: float = 0.0
    """Seconds of the sweep when it began; those between a death of the sweep and its next start don't count."""
    seconds: float = 0.0
    examples: int = 0
    """Rows that it was trained on."""
    error: str | None = None
    """The root cause in a line, of a trial that failed."""
    log: str | None = None
    """File with the whole traceback of a trial that failed."""
    folder: str = ""
    """URI of the folder with its history and checkpoints."""
    restarts: int = 0
    halvings: int = 0
    """How often its micro-batch was halved because memory ran out."""
    parent: str | None = None
    """Id of the trial whose weights it took over last (pbt, pb2)."""
    pid: int | None = None
    node: str | None = None
    warm: bool = False
    """Whether its process had run another trial before."""
    first_step_seconds: float | None = None
    """From its start to the end of its first optimizer step."""


class SearchRecord(Schema):
    """A sweep that has ended: every trial, and the bundle of the best one."""

    search: dict[str, Any] = {}
    """The `search` section of the job, nothing left out."""
    objectives: tuple[tuple[str, bool], ...]
    """Metric and whether higher is better, the one that decides first."""
    trials: tuple[TrialRecord, ...]
    """By number."""
    best: str
    """Id of the winner."""
    pareto: tuple[str, ...] = ()
    """Ids of the trials that no other beats in every objective, where there are several objectives."""
    sample: dict[str, Any]
    """The winner's setting."""
    train: TrainRecord
    """The winner's training and its bundle, which evaluate, register and deploy go on with."""
    default: TrainRecord | None = None
    """The same of the job as it is written, for the comparison."""
    seconds: float
    """Wall time of the sweep, over all its starts."""
    trials_run: int
    stopped_by: str | None = None
    """A sentence where the sweep ended before its last trial: a budget, the plateau; None: all trials ran."""
    schedule: str | None = None
    """JSONL file of a population's exploits (pbt, pb2): `trial`, `parent`, `examples` and the new `sample` of each."""
    report: str | None = None
    """URI of report.html."""
    folder: str
    """URI of the sweep's folder."""

    def frame(self) -> pandas.DataFrame:
        """A row for each trial, by number: how it ended, the objectives at its best validation, and its setting by path."""
        import pandas

        rows = [
            {
                "number": trial.number,
                "origin": trial.origin,
                "status": trial.status,
                **{name: (trial.best or {}).get(name) for name, _ in self.objectives},
                "epoch": (trial.best or {}).get("epoch"),
                "examples": trial.examples,
                "rung": trial.rung,
                "seconds": trial.seconds,
                **trial.sample,
                "error": trial.error,
                "folder": trial.folder,
            }
            for trial in self.trials
        ]
        return pandas.DataFrame(rows).set_index("number")


class Comparison(Schema):
    """The winner and the job as it is written, on the same untouched rows, with bootstrap intervals of 95 %."""

    metric: str
    split: str
    rows: int
    score: float
    low: float
    high: float
    default: float | None = None
    """None: the default setting was not among the trials, or is the winner."""
    difference: float | None = None
    """`score` less `default`, resampled in pairs."""
    difference_low: float | None = None
    difference_high: float | None = None

    def sentence(self) -> str:
        """For example: test f1_macro 0.912 (95 % 0.88 to 0.94), default setting 0.894: +0.018 (-0.01 to +0.05)."""
        said = f"{self.split} {self.metric} {self.score:.4g} (95 % {self.low:.4g} to {self.high:.4g})"
        if self.default is None or self.difference is None:
            return said
        return (
            f"{said}, default setting {self.default:.4g}: "
            f"{self.difference:+.3g} ({self.difference_low or 0.0:+.2g} to {self.difference_high or 0.0:+.2g})"
        )


class EvaluateRecord(Schema):
    metrics: dict[str, dict[str, float]]
    """Split -> metric -> value."""
    predictions: dict[str, str]
    """Split -> Parquet file with row_id, the row and its prediction."""
    tables: dict[str, str] = {}
    """Name -> CSV file in the run folder."""


class RegisterRecord(Schema):
    name: str
    version: int
    uri: str
    """The registry's address."""
    mlflow_run: str
    bundle: str
    alias: str | None
    """The alias that now points at this version; None: it stayed where it was."""
    reason: str
    """A sentence: why the alias moved or stayed."""


class DeployRecord(Schema):
    url: str
    model: str
    version: int | None
    replayed: int
    """Validation rows sent over HTTP, all of which agreed with the offline predictions."""
    largest_difference: float
