"""Batch prediction: every row of any readable source, in order, with its prediction or with what is wrong with it."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator import actors, sinks
from orchestrator import bundle as bundles
from orchestrator.config import DataSection
from orchestrator.data import files, sources
from orchestrator.errors import InputError
from orchestrator.predictor import TOKENS_PER_BATCH
from orchestrator.progress import Display
from orchestrator.storage import Folder
from orchestrator.tasks.base import Prediction, Row, RowError, Task

if TYPE_CHECKING:
    import pyarrow as pa
    from ray.data import Dataset

BLOCK_BYTES = 1 << 20
"""Rows go to an actor in blocks of about this size: enough to sort by length, few enough to show progress."""


def predict(
    bundle_uri: str, source: DataSection, output: str, *, display: Display, tokens: int = TOKENS_PER_BATCH, start_timeout_s: float = 120.0
) -> dict[str, int]:
    """Writes the rows of `source.train` to the file `output`, by its ending Parquet, CSV or JSONL; counts `rows` and `errors`.

    To each row's own columns come `row_id` (file and row), `prediction_<key>` for each text, number or vector of the prediction,
    `prediction` (all of it, JSON), and `error`: what is wrong with a row that has no prediction. Memory does not grow with
    the rows. Raises `InputError` where the input can't be read or lacks a column; then there is no output.
    """
    sinks.check(output)
    bundle = bundles.load(bundle_uri)
    inputs = inputs_of(bundle.task, source)
    arguments = {"bundle_uri": bundle_uri, "inputs": inputs, "tokens": tokens}

    def build() -> Dataset:
        rows = sources.read(source, media=sources.media(bundle.task.columns(), inputs))
        return rows.map_batches(_RowPredictor, batch_size=None, batch_format="pyarrow", **actors.pool(arguments, rows=None, readers=True))

    with tempfile.TemporaryDirectory(prefix="orchestrator-predict-") as temporary:
        spool = _Spool(Path(temporary))
        for table in actors.tables(build, start_timeout_s, target_max_block_size=BLOCK_BYTES):
            spool.add(table)
            display.step(spool.rows, None, "rows")
        schema = unified(spool.schemas)
        with sinks.open_sink(Folder(output), schema) as sink:
            for table in spool.tables():
                sink.write(conformed(table, schema))
    if spool.errors:
        display.warn(f"{spool.errors:,} of {spool.rows:,} rows have no prediction; the column `error` says why.")
    return {"rows": spool.rows, "errors": spool.errors}


def inputs_of(task: Task, source: DataSection) -> dict[str, str]:
    """Role -> column of the rows to predict. Raises `InputError` where they can't be read, or have other columns than the task needs."""
    with files.called("INPUT"):
        peek = sources.peek(source)
    roles = task.columns()
    mapping = sources.map_columns(source, roles, peek.columns, "INPUT", targets=False)
    if taken := [name for name in peek.columns if name == "error" or name == "prediction" or name.startswith("prediction_")]:
        raise InputError(f"INPUT has the column {taken[0]!r}, which the output is to have for what is predicted; rename it.")
    return {role: name for role, name in mapping.items() if not roles[role].target}


class _RowPredictor:
    """A Ray Data actor: takes rows as `sources.read` gives them, and adds predictions or errors."""

    def __init__(self, bundle_uri: str, inputs: dict[str, str], tokens: int, threads: int):
        self._predictor = actors.load(bundle_uri, tokens, threads)
        self._inputs = inputs

    def __call__(self, table: pa.Table) -> pa.Table:
        import pyarrow as pa

        columns = {role: table[name].to_pylist() for role, name in self._inputs.items() if name in table.column_names}
        unreadable = table["_bad"].to_pylist()
        rows: dict[int, Row] = {}
        errors: list[str | None] = [None] * table.num_rows
        for place, bad in enumerate(unreadable):
            try:
                if bad is not None:
                    errors[place] = _sentence(**json.loads(bad))
                else:
                    rows[place] = self._predictor.task.clean({role: values[place] for role, values in columns.items()})
            except RowError as error:
                errors[place] = _sentence(self._inputs.get(error.column, error.column), error.expected, error.found)
        predictions: list[Prediction | None] = [None] * table.num_rows
        for place, prediction in zip(rows, self._predictor(list(rows.values())), strict=True):
            predictions[place] = prediction
        result = table.drop_columns("_bad")
        for name, values in actors.prediction_columns(predictions, vectors=True).items():
            result = result.append_column(name, pa.array(values))
        return result.append_column("error", pa.array(errors, pa.string()))


class _Spool:
    """Tables on the disk, each with a schema of its own: what type a column has is known only when all rows were seen."""

    def __init__(self, folder: Path):
        self._folder = folder
        self.schemas: list[pa.Schema] = []
        self.rows = self.errors = self._tables = 0

    def add(self, table: pa.Table) -> None:
        from pyarrow import feather

        feather.write_feather(table, str(self._folder / f"{self._tables}.arrow"))
        self._tables += 1
        self.rows += table.num_rows
        self.errors += table.num_rows - table["error"].null_count
        if table.schema not in self.schemas:
            self.schemas.append(table.schema)

    def tables(self) -> Iterator[pa.Table]:
        from pyarrow import feather

        for place in range(self._tables):
            yield feather.read_table(str(self._folder / f"{place}.arrow"))


def unified(schemas: Iterable[pa.Schema]) -> pa.Schema:
    """A schema for rows of all of these: columns as they appear, those of predictions last; text where types differ and are not numbers."""
    import pyarrow as pa

    types: dict[str, list[pa.DataType]] = {}
    for schema in schemas:
        for field in schema:
            types.setdefault(field.name, []).append(field.type)
    last = sorted(types, key=lambda name: (name.startswith("prediction_")) + 2 * (name == "prediction") + 3 * (name == "error"))
    return pa.schema([(name, _common(types[name])) for name in last])


def _common(types: list[pa.DataType]) -> pa.DataType:
    import pyarrow as pa

    kinds = list(dict.fromkeys(kind for kind in types if not pa.types.is_null(kind)))
    if len(kinds) <= 1:
        return kinds[0] if kinds else pa.string()
    if all(pa.types.is_integer(kind) or pa.types.is_floating(kind) for kind in kinds):
        return pa.float64() if any(pa.types.is_floating(kind) for kind in kinds) else pa.int64()
    return pa.string()


def conformed(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """The table with exactly the columns of `schema`; what became text and wasn't is written as JSON."""
    import pyarrow as pa

    columns = []
    for field in schema:
        if field.name not in table.column_names:
            columns.append(pa.nulls(table.num_rows, field.type))
        elif (
            pa.types.is_string(field.type)
            and not pa.types.is_string(kind := table.schema.field(field.name).type)
            and not pa.types.is_null(kind)
        ):
            texts = [
                None if value is None else json.dumps(value, ensure_ascii=False, default=str) for value in table[field.name].to_pylist()
            ]
            columns.append(pa.array(texts, pa.string()))
        else:
            columns.append(table[field.name].cast(field.type))
    return pa.table(columns, schema=schema)


def _sentence(column: str | None, expected: str, found: Any) -> str:
    shown = found if isinstance(found, str) and column is None else repr(found)
    shown = shown if len(shown) <= 120 else f"{shown[:120]}…"
    return f"{f'column {column!r}: ' if column else ''}expected {expected}, found {shown}."
