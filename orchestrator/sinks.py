"""One output file, written as a stream and seen whole or not at all: Parquet, CSV or JSONL, by its ending."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from orchestrator.errors import InputError
from orchestrator.storage import Folder

if TYPE_CHECKING:
    import pyarrow as pa

ENDINGS = (".parquet", ".csv", ".jsonl")


class Sink(Protocol):
    def write(self, table: pa.Table) -> None: ...

    def close(self) -> None: ...


def check(uri: str) -> None:
    """`InputError` where nothing could be written to `uri`: before any work is done for it."""
    if not uri.endswith(ENDINGS):
        raise InputError(f"The output {uri!r} must end in {', '.join(ENDINGS[:-1])} or {ENDINGS[-1]}.")
    target = Folder(uri)
    if target.is_local and Path(target.path).is_dir():
        raise InputError(f"The output {uri!r} is a folder; name a file.")


@contextlib.contextmanager
def open_sink(target: Folder, schema: pa.Schema) -> Iterator[Sink]:
    """A file that takes tables of `schema`; it appears at `target` when the block ends without an error."""
    filesystem = target.filesystem
    filesystem.create_dir(os.path.dirname(target.path), recursive=True)
    # On an object store a file is there only once it is closed; elsewhere it is written beside its place and renamed.
    temporary = f"{target.path}.{uuid.uuid4().hex[:8]}.tmp" if target.is_local else target.path
    try:
        with filesystem.open_output_stream(temporary) as stream:
            sink = _SINKS[Path(target.path).suffix](stream, schema)
            try:
                yield sink
            finally:
                sink.close()  # Also of one that is thrown away: Arrow complains of a writer whose stream is closed.
        if temporary != target.path:
            os.replace(temporary, target.path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            filesystem.delete_file(temporary)
        raise


class _Parquet:
    def __init__(self, stream: Any, schema: pa.Schema):
        import pyarrow.parquet as pq

        self._schema, self._writer = schema, pq.ParquetWriter(stream, schema)

    def write(self, table: pa.Table) -> None:
        self._writer.write_table(table.cast(self._schema))

    def close(self) -> None:
        self._writer.close()


class _Jsonl:
    def __init__(self, stream: Any, schema: pa.Schema):
        self._stream = stream

    def write(self, table: pa.Table) -> None:
        lines = (json.dumps(row, ensure_ascii=False, default=_plain) + "\n" for row in table.to_pylist())
        self._stream.write("".join(lines).encode())

    def close(self) -> None: ...


class _Csv:
    def __init__(self, stream: Any, schema: pa.Schema):
        self._stream, self._names = stream, schema.names
        self._line([self._names])

    def write(self, table: pa.Table) -> None:
        self._line([[_cell(row[name]) for name in self._names] for row in table.to_pylist()])

    def close(self) -> None: ...

    def _line(self, lines: list[list[Any]]) -> None:
        text = io.StringIO(newline="")
        csv.writer(text, lineterminator="\n").writerows(lines)
        self._stream.write(text.getvalue().encode())


_SINKS: dict[str, Any] = {".parquet": _Parquet, ".csv": _Csv, ".jsonl": _Jsonl}


def _cell(value: Any) -> Any:
    return json.dumps(value, ensure_ascii=False, default=_plain) if isinstance(value, (list, dict)) else value


def _plain(value: Any) -> Any:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)
