"""Evaluation: Ray Data runs the served `Predictor` over the validation and test splits, and the task scores what it said."""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from orchestrator import actors, sinks
from orchestrator import bundle as bundles
from orchestrator.batch_prediction import predict
from orchestrator.config import JobConfig
from orchestrator.errors import StageError
from orchestrator.predictor import TOKENS_PER_BATCH, Losses
from orchestrator.progress import Display
from orchestrator.records import EvaluateRecord, PreparedData
from orchestrator.storage import Folder
from orchestrator.tasks.base import Prediction, Row, Task

if TYPE_CHECKING:
    import pyarrow as pa
    from ray.data import Dataset

__all__ = ["evaluate", "predict", "read_predictions"]

SPLITS = ("validation", "test")
READ_ROWS = 512
"""Rows of a file of predictions that are read at once."""


def evaluate(job: JobConfig, prepared: PreparedData, bundle_uri: str, folder: Folder, display: Display) -> EvaluateRecord:
    """Predicts and scores the validation and test splits with the bundle.

    Writes `<split>.parquet` (row_id, roles, prediction) for each split that has rows, and the task's tables as
    `<split>-<table>.csv`, into `folder`. Memory does not grow with the splits, but for the arrays that metrics need.
    Where the task says `most_predicted`, only so many rows of a split are predicted; the loss is of all.
    """
    bundle = bundles.load(bundle_uri)
    chunks = [chunk for split in SPLITS if split in prepared.splits for chunk in _chunks(prepared, split, bundle.task)]
    if not chunks:
        display.warn("Neither the validation nor the test split has rows, so the model is not scored.")
        return EvaluateRecord(metrics={}, predictions={})
    total = sum(chunk["rows"] for chunk in chunks)
    arguments = {
        "bundle_uri": bundle_uri,
        "roles": list(bundle.task.columns()),
        "tokens": job.evaluation.tokens_per_batch or TOKENS_PER_BATCH,
    }

    def build() -> Dataset:
        import ray.data

        dataset = ray.data.from_items(chunks, override_num_blocks=len(chunks))
        return dataset.map_batches(
            _ChunkPredictor, batch_size=1, batch_format="pyarrow", **actors.pool(arguments, rows=total, readers=False)
        )

    predictions: dict[str, str] = {}
    losses = {split: Losses() for split in SPLITS}
    with contextlib.ExitStack() as stack:
        open_sinks: dict[str, sinks.Sink] = {}
        for split, table in _splits(actors.tables(build, job.resources.start_timeout_s), total, display, losses):
            if split not in open_sinks:
                target = folder / f"{split}.parquet"
                open_sinks[split] = stack.enter_context(sinks.open_sink(target, table.schema))
                predictions[split] = target.uri
            open_sinks[split].write(table)

    metrics: dict[str, dict[str, float]] = {}
    tables: dict[str, str] = {}
    for split, uri in predictions.items():
        predicted, rows = _Stored(uri, "prediction"), _Stored(uri, "row")
        asked = min(prepared.splits[split].rows, bundle.task.most_predicted or prepared.splits[split].rows)
        if len(rows) != asked:
            raise StageError(f"{asked:,} rows of the {split} split were to be predicted, but {len(rows):,} were.")
        metrics[split] = _scores(bundle.task, predicted, rows, losses[split], job.evaluation.metrics)
        for name, lines in bundle.task.tables(predicted, rows).items():
            target = folder / f"{split}-{name}.csv"
            _write_table(target, lines)
            tables[f"{split}-{name}"] = target.uri
    return EvaluateRecord(metrics=metrics, predictions=predictions, tables=tables)


def read_predictions(uri: str, limit: int | None = None) -> list[dict[str, Any]]:
    """The first `limit` (None: all) of a file of predictions: row_id, row (role -> value) and prediction."""
    return list(itertools.islice(_stored(uri), limit))


def _chunks(prepared: PreparedData, split: str, task: Task) -> Iterator[dict[str, Any]]:
    """What an actor takes at once: enough rows to sort by length, few enough to show progress."""
    left = task.most_predicted
    for file in prepared.splits[split].files:
        start = 0
        while start < file.rows:
            rows = min(task.rows_at_once, file.rows - start, left or file.rows)
            yield {"split": split, "file": f"{prepared.root}/{file.path}", "start": start, "rows": rows, "predict": left != 0}
            start += rows
            left = None if left is None else max(0, left - rows)


def _scores(
    task: Task, predictions: Sequence[Prediction], rows: Sequence[Row], losses: Losses, asked: Sequence[str] | None
) -> dict[str, float]:
    """The metrics that the job asks for, else the task's defaults; the loss is always among them."""
    loss = losses.total / (losses.items or 1.0)
    more = {**task.of_loss(loss), "loss": loss}
    if asked is None:
        return {**task.score(predictions, rows), **more}
    scored = task.score(predictions, rows, [name for name in asked if name not in more])
    return {**{name: {**scored, **more}[name] for name in asked if name in {**scored, **more}}, **scored, "loss": loss}


class _Stored(Sequence[Any]):
    """One part (`row` or `prediction`) of a file of predictions, read as it is gone through, never held as a whole."""

    def __init__(self, uri: str, part: str):
        self._uri, self._part = uri, part
        with _parquet(uri) as file:
            self._rows = file.metadata.num_rows

    def __len__(self) -> int:
        return self._rows

    def __iter__(self) -> Iterator[Any]:
        return (entry[self._part] for entry in _stored(self._uri, self._part))

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return list(itertools.islice(self, *index.indices(len(self))))
        place = range(len(self))[index]
        return next(itertools.islice(self, place, None))


@contextlib.contextmanager
def _parquet(uri: str) -> Iterator[Any]:
    import pyarrow.parquet as pq

    target = Folder(uri)
    with target.filesystem.open_input_file(target.path) as stream:
        yield pq.ParquetFile(stream)


def _stored(uri: str, part: str | None = None) -> Iterator[dict[str, Any]]:
    with _parquet(uri) as file:
        names = file.schema_arrow.names
        roles = [name for name in names if name not in ("row_id", "prediction") and not name.startswith("prediction_")]
        columns = {"prediction": ["prediction"], "row": roles}.get(part or "")
        for batch in file.iter_batches(batch_size=READ_ROWS, columns=columns):
            for line in batch.to_pylist():
                entry: dict[str, Any] = {"row_id": line.get("row_id")}
                entry["row"] = {role: line[role] for role in roles if line.get(role) is not None}
                entry["prediction"] = json.loads(line["prediction"]) if "prediction" in line else None
                yield entry


class _ChunkPredictor:
    """A Ray Data actor: takes a chunk (split, file, start, rows) and answers its rows with their predictions."""

    def __init__(self, bundle_uri: str, roles: list[str], tokens: int, threads: int):
        self._predictor = actors.load(bundle_uri, tokens, threads)
        self._roles = roles
        self._file, self._table = "", None

    def __call__(self, chunks: pa.Table) -> pa.Table:
        import pyarrow as pa

        answers = []
        for chunk in chunks.to_pylist():
            table = self._read(chunk["file"]).slice(chunk["start"], chunk["rows"])
            rows = [{role: value for role, value in row.items() if role in self._roles and value is not None} for row in table.to_pylist()]
            losses = Losses()
            for name, values in actors.prediction_columns(self._predictor.score(rows, losses, predict=chunk["predict"])).items():
                table = table.append_column(name, pa.array(values, pa.string() if name == "prediction" else None))
            about = {"split": chunk["split"], "loss": losses.total / len(rows), "items": losses.items / len(rows)}
            for name, value in about.items():
                table = table.append_column(f"_{name}", pa.array([value] * len(rows)))
            answers.append(table)
        return pa.concat_tables(answers, promote_options="default")

    def _read(self, uri: str) -> pa.Table:
        """The file's rows; kept, since the next chunk is most often from the same file, which is no larger than a block."""
        if self._file != uri or self._table is None:
            with _parquet(uri) as file:
                names = [name for name in file.schema_arrow.names if name == "row_id" or name in self._roles]
                self._file, self._table = uri, file.read(columns=names)
        return self._table


def _splits(tables: Iterator[pa.Table], total: int, display: Display, losses: dict[str, Losses]) -> Iterator[tuple[str, pa.Table]]:
    """Each table's predicted rows cut by the split they belong to, without the columns about them; their losses go into `losses`."""
    import pyarrow.compute as pc

    done = 0
    display.step(0, total, "rows")
    for table in tables:
        for split in table["_split"].unique().to_pylist():
            some = table.filter(pc.field("_split") == split)
            losses[split].total += sum(some["_loss"].to_pylist())
            losses[split].items += sum(some["_items"].to_pylist())
            predicted = some.filter(some["prediction"].is_valid()).drop_columns(["_split", "_loss", "_items"])
            if predicted.num_rows:
                yield split, predicted
        done += table.num_rows
        display.step(done, total, "rows")


def _write_table(target: Folder, lines: Sequence[Mapping[str, Any]]) -> None:
    import pyarrow as pa

    table = pa.Table.from_pylist([dict(line) for line in lines])
    with sinks.open_sink(target, table.schema) as sink:
        sink.write(table)
