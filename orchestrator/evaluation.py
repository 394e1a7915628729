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
from orchestrator.predictor import TOKENS_PER_BATCH
from orchestrator.progress import Display
from orchestrator.records import EvaluateRecord, PreparedData
from orchestrator.storage import Folder

if TYPE_CHECKING:
    import pyarrow as pa
    from ray.data import Dataset

__all__ = ["evaluate", "predict", "read_predictions"]

SPLITS = ("validation", "test")
CHUNK_ROWS = 512
"""Rows an actor takes at once: enough to sort by length, few enough to show progress."""


def evaluate(job: JobConfig, prepared: PreparedData, bundle_uri: str, folder: Folder, display: Display) -> EvaluateRecord:
    """Predicts and scores the validation and test splits with the bundle.

    Writes `<split>.parquet` (row_id, roles, prediction) for each split that has rows, and the task's tables as
    `<split>-<table>.csv`, into `folder`. Memory does not grow with the splits, but for the arrays that metrics need.
    """
    bundle = bundles.load(bundle_uri)
    chunks = [
        {"split": split, "file": f"{prepared.root}/{file.path}", "start": start, "rows": min(CHUNK_ROWS, file.rows - start)}
        for split in SPLITS
        if split in prepared.splits
        for file in prepared.splits[split].files
        for start in range(0, file.rows, CHUNK_ROWS)
    ]
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
    with contextlib.ExitStack() as stack:
        open_sinks: dict[str, sinks.Sink] = {}
        for split, table in _splits(actors.tables(build, job.resources.start_timeout_s), total, display):
            if split not in open_sinks:
                target = folder / f"{split}.parquet"
                open_sinks[split] = stack.enter_context(sinks.open_sink(target, table.schema))
                predictions[split] = target.uri
            open_sinks[split].write(table)

    metrics: dict[str, dict[str, float]] = {}
    tables: dict[str, str] = {}
    for split, uri in predictions.items():
        predicted, rows = _Stored(uri, "prediction"), _Stored(uri, "row")
        if len(rows) != prepared.splits[split].rows:
            raise StageError(f"The {split} split has {prepared.splits[split].rows:,} rows, but {len(rows):,} were predicted.")
        metrics[split] = bundle.task.score(predicted, rows, job.evaluation.metrics)
        for name, lines in bundle.task.tables(predicted, rows).items():
            target = folder / f"{split}-{name}.csv"
            _write_table(target, lines)
            tables[f"{split}-{name}"] = target.uri
    return EvaluateRecord(metrics=metrics, predictions=predictions, tables=tables)


def read_predictions(uri: str, limit: int | None = None) -> list[dict[str, Any]]:
    """The first `limit` (None: all) of a file of predictions: row_id, row (role -> value) and prediction."""
    return list(itertools.islice(_stored(uri), limit))


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
        for batch in file.iter_batches(batch_size=CHUNK_ROWS, columns=columns):
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
            for name, values in actors.prediction_columns(self._predictor(rows)).items():
                table = table.append_column(name, pa.array(values))
            answers.append(table.append_column("_split", pa.array([chunk["split"]] * len(rows))))
        return pa.concat_tables(answers, promote_options="default")

    def _read(self, uri: str) -> pa.Table:
        """The file's rows; kept, since the next chunk is most often from the same file, which is no larger than a block."""
        if self._file != uri or self._table is None:
            with _parquet(uri) as file:
                names = [name for name in file.schema_arrow.names if name == "row_id" or name in self._roles]
                self._file, self._table = uri, file.read(columns=names)
        return self._table


def _splits(tables: Iterator[pa.Table], total: int, display: Display) -> Iterator[tuple[str, pa.Table]]:
    """Each table cut by the split its rows belong to, without the column that says so."""
    import pyarrow.compute as pc

    done = 0
    display.step(0, total, "rows")
    for table in tables:
        for split in table["_split"].unique().to_pylist():
            yield split, table.filter(pc.field("_split") == split).drop_columns("_split")
        done += table.num_rows
        display.step(done, total, "rows")


def _write_table(target: Folder, lines: Sequence[Mapping[str, Any]]) -> None:
    import pyarrow as pa

    table = pa.Table.from_pylist([dict(line) for line in lines])
    with sinks.open_sink(target, table.schema) as sink:
        sink.write(table)
