"""What a stage leaves behind: one frozen record each, on disk before the next stage starts."""

from __future__ import annotations

from typing import Any

from orchestrator.schema import Schema
from orchestrator.tasks import AnyTask


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
