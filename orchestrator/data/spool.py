"""The two passes of prepare, as functions that run on the cluster: what is in memory at a time has a bound.

Pass 1 (`Reading`, a task for each file or some small ones): read, clean, and write spools: Arrow files whose record
batches are buckets, a row's bucket being a hash of its id. Pass 2 (`Writing`, a task for each output file): read its
buckets from all spools, sort by hash, and write each split's rows as Parquet. So the rows of any input order lie in the
output files at random, without a shuffle through the object store, and the same input gives the same bytes.

Between the passes the driver knows hashes and stratum of every row (about 30 bytes each), which is what exact shares,
duplicates and leaks need.
"""

from __future__ import annotations

import errno
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from orchestrator.config import DataSection
from orchestrator.data.files import SPLITS, SourceFile
from orchestrator.data.readers import BadRow, records
from orchestrator.data.sources import located, media, weight
from orchestrator.data.splits import Cuts, hashes
from orchestrator.errors import InputError
from orchestrator.storage import Folder
from orchestrator.tasks.base import Row, RowError, Task

CHUNK_BYTES = 8_000_000
"""Rows held as Python objects, roughly."""
SPOOL_BYTES = 64_000_000
FILE_BYTES = 24_000_000
"""Of an output file in memory; on disk it is about half. One block of Ray Data holds up to 128 MB."""
MOST_BUCKETS = 8192
SHOWN_BAD_ROWS = 5
ENOUGH_BAD_ROWS = 100
"""Where no bad row is allowed, a task stops reading after so many."""


@dataclass(frozen=True)
class Reading:
    """Pass 1: from files to spools. Yields one report (a table of one row) for each spool."""

    task: Task
    section: DataSection
    split: str
    """Whose files they are."""
    files: tuple[SourceFile, ...]
    mapping: Mapping[str, str]
    """Role -> column."""
    index: int
    buckets: int
    spool: Folder

    def __call__(self) -> Iterator[pa.Table]:
        try:
            yield from self._reports()
        except InputError as error:
            yield _report({"error": str(error)})
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            yield _report({"error": f"storage: the disk is full: nothing more can be written to {self.spool}."})

    def _reports(self) -> Iterator[pa.Table]:
        group = self.section.split.group if self.split == "train" else None
        roles = self.task.columns()
        always = {role for role in self.mapping if roles[role].required}
        columns = [*self.mapping.values()]
        if group is not None and group not in columns:
            columns.append(group)
        files_in = media(roles, self.mapping)
        held = _Held(self)
        blocks = 0
        for file in self.files:
            for number, values in records(file, self.section, columns, columns):
                row_id = f"{file.name}:{number}"
                if isinstance(values, BadRow):
                    held.refuse(file.name, number, row_id, values.column, values.expected, values.found)
                else:
                    values |= {name: located(file, values.get(name)) for name in files_in}
                    row = {role: values.get(name) for role, name in self.mapping.items() if role in always or values.get(name) is not None}
                    try:
                        if group is not None and values.get(group) in (None, ""):
                            raise RowError(group, "the row's group (data.split.group)", values.get(group))
                        clean = self.task.clean(row)
                        self.task.check_target(clean)
                        held.take(clean, file.name, row_id, None if group is None else str(values[group]), weight(values))
                    except RowError as error:
                        held.refuse(file.name, number, row_id, self.mapping.get(error.column, error.column), error.expected, error.found)
                if held.full:
                    yield held.flush(blocks)
                    blocks += 1
                    if held.stopped:
                        return
        if not held.empty:
            yield held.flush(blocks)


@dataclass
class _Chunk:
    """Some clean rows as a table, and what is known of each besides (arrays of as many)."""

    table: pa.Table
    split: np.ndarray
    order: np.ndarray
    inputs: np.ndarray
    targets: np.ndarray
    strata: list[str | None]


@dataclass
class _Held:
    """What pass 1 has read and not yet written."""

    reading: Reading
    pending: list[Row] = field(default_factory=list)
    ids: list[str] = field(default_factory=list)
    groups: list[str] = field(default_factory=list)
    pending_bytes: int = 0
    chunks: list[_Chunk] = field(default_factory=list)
    chunk_bytes: int = 0
    bad: list[dict[str, Any]] = field(default_factory=list)
    all_bad: int = 0
    joined: int = 0
    """Rows that became part of the row before them, since the last spool."""
    last: tuple[str, str | None] | None = None
    """File and group of the last pending row."""

    def __post_init__(self) -> None:
        columns = self.reading.task.columns()
        # A row may be cleaned into another role than that of its column; a role that no row has is left out at the end.
        self.roles = list(columns)
        self.input_roles = [role for role in self.roles if not columns[role].target]
        self.target_roles = [role for role in self.roles if columns[role].target]

    @property
    def empty(self) -> bool:
        return not (self.pending or self.chunks or self.bad)

    @property
    def full(self) -> bool:
        return self.chunk_bytes >= SPOOL_BYTES or len(self.bad) >= 10_000 or self.stopped

    @property
    def stopped(self) -> bool:
        return self.reading.section.max_bad_rows == 0 and self.all_bad >= ENOUGH_BAD_ROWS

    def take(self, row: Row, file: str, row_id: str, group: str | None, size: int) -> None:
        if self.pending and self.last == (file, group) and (both := self.reading.task.joined(self.pending[-1], row)) is not None:
            self.pending[-1] = both
            self.pending_bytes += size
            self.joined += 1
            return
        self.last = (file, group)
        self.pending.append(row)
        self.ids.append(row_id)
        if group is not None:
            self.groups.append(group)
        self.pending_bytes += size
        if self.pending_bytes >= CHUNK_BYTES:
            self._to_chunk()

    def refuse(self, file: str, number: int, row_id: str, column: str | None, expected: str, found: Any) -> None:
        shown = found if found is None or isinstance(found, (bool, int, float, str)) else repr(found)
        shown = f"{shown[:200]}…" if isinstance(shown, str) and len(shown) > 200 else shown
        shown = repr(shown) if isinstance(shown, float) and not np.isfinite(shown) else shown
        self.bad.append({"file": file, "row": number, "column": column, "expected": expected, "found": shown, "row_id": row_id})
        self.all_bad += 1

    def _to_chunk(self) -> None:
        if self.pending:
            columns = {role: _column(role, [row.get(role) for row in self.pending]) for role in self.roles}
            seed = self.reading.section.split.seed
            self.chunks.append(
                _Chunk(
                    table=pa.table({**columns, "row_id": pa.array(self.ids, pa.string())}),
                    split=hashes(self.groups or self.ids, f"split {seed}"),
                    order=hashes(self.ids, f"order {seed}"),
                    inputs=_content(self.pending, self.input_roles),
                    targets=_content(self.pending, self.target_roles),
                    strata=[self.reading.task.stratum(row) for row in self.pending],
                )
            )
            self.chunk_bytes += self.chunks[-1].table.nbytes
            self.pending, self.ids, self.groups, self.pending_bytes = [], [], [], 0

    def flush(self, block: int) -> pa.Table:
        """Writes a spool and the bad rows beside it, and says what is in them."""
        self._to_chunk()
        name = f"{self.reading.split}-{self.reading.index:06d}-{block:06d}"
        rows = sum(chunk.table.num_rows for chunk in self.chunks)
        report: dict[str, Any] = {"split": self.reading.split, "name": name, "rows": rows, "bad": len(self.bad), "joined": self.joined}
        if self.bad:
            lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in self.bad)
            (self.reading.spool / f"{name}.bad.jsonl").write_bytes(lines.encode("utf-8", "backslashreplace"))
            report["bad_first"] = json.dumps(self.bad[:SHOWN_BAD_ROWS], ensure_ascii=True)
        if rows:
            report.update(self._spool(name))
        self.chunks, self.chunk_bytes, self.bad, self.joined = [], 0, [], 0
        return _report(report)

    def _spool(self, name: str) -> dict[str, Any]:
        split, order, inputs, targets = (
            np.concatenate([getattr(chunk, key) for chunk in self.chunks]) for key in ("split", "order", "inputs", "targets")
        )
        strata = [stratum for chunk in self.chunks for stratum in chunk.strata]
        bucket = bucket_of(order, self.reading.buckets)
        by_bucket = np.argsort(bucket, kind="stable")
        table = pa.concat_tables([chunk.table for chunk in self.chunks], promote_options="permissive")
        size, schema = table.nbytes, table.schema
        table = table.append_column("_split", pa.array(split)).append_column("_order", pa.array(order))
        table = table.append_column("_stratum", pa.array(strata, pa.string())).take(pa.array(by_bucket))
        batch = table.combine_chunks().to_batches()[0]
        ends = np.concatenate([[0], np.cumsum(np.bincount(bucket, minlength=self.reading.buckets))])
        place = self.reading.spool / f"{name}.arrow"
        with (
            place.filesystem.open_output_stream(place.path) as stream,
            pa.ipc.new_file(stream, batch.schema, options=pa.ipc.IpcWriteOptions(compression="lz4")) as writer,
        ):
            for start, end in itertools.pairwise(ends):
                writer.write_batch(batch.slice(start, end - start))
        names = sorted(set(strata), key=lambda stratum: (stratum is not None, stratum or ""))
        codes = {stratum: code for code, stratum in enumerate(names)}
        return {
            "bytes": size,
            "schema": schema.serialize().to_pybytes(),
            "split_hashes": split[by_bucket].tobytes(),
            "input_hashes": inputs[by_bucket].tobytes(),
            "target_hashes": targets[by_bucket].tobytes(),
            "strata": names,
            "codes": np.fromiter((codes[stratum] for stratum in strata), np.int32, len(strata))[by_bucket].tobytes(),
        }


def bucket_of(order: np.ndarray, buckets: int) -> np.ndarray:
    """The bucket of rows by their hashes (uint64): ranges of equal width."""
    return (((order >> np.uint64(32)) * np.uint64(buckets)) >> np.uint64(32)).astype(np.int64)


def _content(rows: Sequence[Row], roles: Sequence[str]) -> np.ndarray:
    """Hashes of what stands in `roles`; a row has the same one whichever roles other rows have."""
    return hashes([_text({role: row[role] for role in roles if row.get(role) is not None}) for row in rows], "content")


def _text(values: Mapping[str, Any]) -> str:
    if len(values) == 1 and type(only := next(iter(values.values()))) is str:
        return only
    return json.dumps(values, sort_keys=True, default=repr)


def _column(role: str, values: Sequence[Any]) -> pa.Array:
    try:
        return pa.array(values)
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise InputError(f"The task cleans the values of {role!r} to more than one type: {error}.") from None


_REPORT = pa.schema(
    {
        "error": pa.string(),
        "split": pa.string(),
        "name": pa.string(),
        "rows": pa.int64(),
        "bytes": pa.int64(),
        "bad": pa.int64(),
        "joined": pa.int64(),
        "bad_first": pa.string(),
        "schema": pa.binary(),
        "split_hashes": pa.large_binary(),
        "input_hashes": pa.large_binary(),
        "target_hashes": pa.large_binary(),
        "strata": pa.list_(pa.string()),
        "codes": pa.large_binary(),
        "files": pa.string(),
        "observed": pa.string(),
    }
)


def _report(values: dict[str, Any]) -> pa.Table:
    return pa.Table.from_pylist([values], schema=_REPORT)


@dataclass(frozen=True)
class Writing:
    """Pass 2: some buckets of all spools, as one Parquet file for each split. Yields one report."""

    task: Task
    spools: tuple[str, ...]
    """Names, sorted."""
    buckets: tuple[int, int]
    """First and after the last."""
    schema: bytes
    """Of the roles and `row_id`."""
    cuts: Cuts
    index: int
    spool: Folder
    target: Folder

    def __call__(self) -> Iterator[pa.Table]:
        try:
            yield self._write()
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            yield _report({"error": f"storage: the disk is full: nothing more can be written to {self.target}."})

    def _write(self) -> pa.Table:
        schema = pa.ipc.read_schema(pa.py_buffer(self.schema))
        keys = pa.schema([*schema, ("_split", pa.uint64()), ("_order", pa.uint64()), ("_stratum", pa.string())])
        tables = [table for name in self.spools if (table := self._read(name, keys)).num_rows]
        files: dict[str, tuple[str, int]] = {}
        observed: dict[str, Any] = {}
        table = pa.concat_tables(tables) if tables else keys.empty_table()
        table = table.sort_by([("_order", "ascending"), ("row_id", "ascending")])
        strata = table["_stratum"].combine_chunks().dictionary_encode(null_encoding="encode")
        places = self.cuts.assign(table["_split"].to_numpy(), strata.indices.to_numpy(), strata.dictionary.to_pylist())
        for place, split in enumerate(SPLITS):
            rows = table.select(schema.names).filter(pa.array(places == place)).combine_chunks()
            if rows.num_rows:
                name = f"{split}/part-{self.index:05d}.parquet"
                rows = rows.append_column("_row", pa.array(np.arange(rows.num_rows, dtype=np.int64)))
                sink = pa.BufferOutputStream()
                pq.write_table(rows, sink, compression="zstd", row_group_size=max(1, rows.num_rows))
                (self.target / name).write_bytes(sink.getvalue().to_pybytes())
                files[split] = (name, rows.num_rows)
                observed[split] = self.task.observe([_present(row) for row in rows.select(schema.names).to_pylist()])
        return _report({"files": json.dumps(files), "observed": json.dumps(observed)})

    def _read(self, name: str, keys: pa.Schema) -> pa.Table:
        place = self.spool / f"{name}.arrow"
        with place.filesystem.open_input_file(place.path) as source:
            reader = pa.ipc.open_file(source)
            table = pa.Table.from_batches([reader.get_batch(index) for index in range(*self.buckets)], reader.schema)
        return pa.table([_cast(table, column) for column in keys], schema=keys)


def _cast(table: pa.Table, column: pa.Field) -> pa.ChunkedArray | pa.Array:
    return table[column.name].cast(column.type) if column.name in table.column_names else pa.nulls(table.num_rows, column.type)


def _present(row: Row) -> Row:
    """Without `row_id` and what is null, as the task cleaned it."""
    return {role: value for role, value in row.items() if value is not None and role != "row_id"}
