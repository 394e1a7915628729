"""From a file to its records, one after the other, with the row's number and without holding the file in memory.

What is wrong with one row is a `BadRow` and reading goes on; what is wrong with the file is an `InputError`.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from orchestrator.config import DataSection
from orchestrator.data.encodings import bad_bytes, known_encoding, looks_like_utf16
from orchestrator.data.files import SourceFile, media_kind
from orchestrator.errors import InputError

LINE_LIMIT = 1 << 25
"""Characters of one line, one CSV field or one JSON object; longer ones are a mistake, such as a quote that never closes."""
ARROW_ROWS = 1024


@dataclass(frozen=True)
class BadRow:
    """Why a row can't be read."""

    column: str | None
    expected: str
    found: str


Record = tuple[int, dict[str, Any] | BadRow]
"""Number of the row as an editor or viewer shows it (line where it starts, or row of the table), from 1; its columns."""


def records(file: SourceFile, section: DataSection, columns: Sequence[str] | None = None, required: Sequence[str] = ()) -> Iterator[Record]:
    """The rows of a file in order; only `columns` of them (None: all).

    Raises `InputError` for a file that can't be read or whose table lacks one of the `required` columns.
    """
    try:
        yield from _READERS[file.format](file, section, None if columns is None else list(columns), required)
    except (pa.ArrowInvalid, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise InputError(f"{file.name} can't be read: {error}.") from None
        what = f"a {file.compression} file" if file.compression else f"a {file.format} file"
        raise InputError(f"{file.name} is damaged or not {what}: {' '.join(str(error).split())}.") from None


def missing_column(name: str, missing: Sequence[str], columns: Sequence[str]) -> InputError:
    """Where a file's table lacks columns that others of the same split have."""
    listed = ", ".join(map(repr, columns))
    return InputError(f"{name} has no column {missing[0]!r}, which the job reads; its columns are {listed}.")


# ---- text ----------------------------------------------------------------------------------------------------
def lines(file: SourceFile, section: DataSection) -> Iterator[str]:
    """The lines with their ends, decoded; no line longer than `LINE_LIMIT`."""
    encoding = known_encoding(section.encoding)
    # A byte order mark may stand before UTF-8: editors on Windows write one.
    decoder = "utf-8-sig" if encoding == "utf-8" else encoding
    number = 0
    with file.open_stream() as stream:
        text = io.TextIOWrapper(stream, encoding=decoder, newline="")
        try:
            while line := text.readline(LINE_LIMIT):
                number += 1
                if number == 1 and "\0" in line and (guess := looks_like_utf16(line)):
                    raise InputError(f"{file.name} is not {section.encoding}: it looks like {guess}. Set data.encoding: {guess}.")
                if len(line) == LINE_LIMIT and not line.endswith(("\n", "\r")):
                    raise InputError(f"{file.name}, line {number}: longer than {LINE_LIMIT:,} characters; is it really {file.format}?")
                yield line
        except UnicodeDecodeError as error:
            raise bad_bytes(file, encoding, error) from None


def _csv(file: SourceFile, section: DataSection, columns: list[str] | None, required: Sequence[str]) -> Iterator[Record]:
    """By the rules of Python's csv module: quoted fields may hold delimiters, line ends and doubled quotes."""
    delimiter = section.delimiter or ("\t" if file.format == "tsv" else ",")
    csv.field_size_limit(LINE_LIMIT)
    reader = csv.reader(lines(file, section), delimiter=delimiter, strict=True)
    names = section.names
    if section.header:
        try:
            header = next((row for row in reader if row), None)
        except csv.Error as error:
            raise InputError(f"{file.name}, line 1: the header line can't be read: {error}.") from None
        if header is None:
            raise InputError(f"{file.name} is empty: not even a header line.")
        names = names or header
        if len(names) != len(header):
            raise InputError(
                f"{file.name}: data.names gives {len(names)} names, and the header line has {len(header)} fields: {_fields(header)}."
            )
    assert names is not None
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise InputError(f"{file.name}: two columns are called {twice[0]!r}; each needs a name of its own (data.names gives new ones).")
    _require(file, required, names)
    places = [(name, place) for place, name in enumerate(names) if columns is None or name in columns]
    while True:
        number = reader.line_num + 1
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield number, _broken_csv(file, number, reader.line_num, error)
            continue
        if len(row) == len(names):
            values = {name: row[place] for name, place in places}
            nul = next((name for name, value in values.items() if "\0" in value), None)
            yield number, BadRow(nul, "text", "a NUL character") if nul is not None else values
        elif row:
            expected = f"{len(names)} fields ({_fields(names)})"
            yield number, BadRow(None, expected, f"{len(row)} field{'s' * (len(row) != 1)} ({_fields(row)})")


def _broken_csv(file: SourceFile, number: int, last: int, error: csv.Error) -> BadRow:
    text = str(error)
    if "unexpected end of data" in text or "field larger" in text:
        until = "the end of the file" if "unexpected" in text else f"line {last}"
        raise InputError(
            f"{file.name}, line {number}: a field opens with a quote that is not closed up to {until}. "
            "Close it, or write a quote inside a field twice."
        )
    where = f" in line {last}" if last != number else ""
    return BadRow(
        None, "a delimiter or the end of the line after a closing quote (a quote inside a quoted field is written twice)", f"{text}{where}"
    )


def _fields(values: Sequence[str]) -> str:
    shown = ", ".join(value if len(value) <= 30 else f"{value[:30]}…" for value in values[:8])
    return f"{shown}, …" if len(values) > 8 else shown


def _jsonl(file: SourceFile, section: DataSection, columns: list[str] | None, required: Sequence[str]) -> Iterator[Record]:
    for number, line in enumerate(lines(file, section), start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            yield number, BadRow(None, "a JSON object", f"{error.msg} at column {error.colno}")
            continue
        yield number, _object(value, columns)


def _object(value: Any, columns: list[str] | None) -> dict[str, Any] | BadRow:
    if not isinstance(value, dict):
        return BadRow(None, "a JSON object such as {…}", json.dumps(value, ensure_ascii=False)[:80])
    return value if columns is None else {name: value[name] for name in columns if name in value}


def _json(file: SourceFile, section: DataSection, columns: list[str] | None, required: Sequence[str]) -> Iterator[Record]:
    """An array of objects, read object by object; rows are numbered by their place in it. Or SQuAD's form or JSON lines, by how it begins."""
    from orchestrator.data.squad import is_squad

    if is_squad(file, section):
        yield from _squad(file, section, columns, required)
        return
    first = next((line for line in lines(file, section) if line.strip()), "")
    if not first:
        return
    if first.lstrip().startswith("["):
        yield from _array(file, section, columns)
        return
    try:
        one_line = isinstance(json.loads(first), dict)
    except json.JSONDecodeError:
        one_line = False
    if not one_line:
        raise InputError(
            f"{file.name}: expected an array of objects, [{{…}}, {{…}}], or one object a line; it begins with {first.strip()[:40]!r}."
        )
    yield from _jsonl(file, section, columns, required)


def _array(file: SourceFile, section: DataSection, columns: list[str] | None) -> Iterator[Record]:
    decoder = json.JSONDecoder()
    source = lines(file, section)
    buffer, line, number, wanted = "", 1, 0, "["
    while True:
        text = buffer.lstrip()
        line += buffer[: len(buffer) - len(text)].count("\n")
        buffer = text
        if buffer and wanted in ("[", ",", ",or]"):
            sign, buffer = buffer[0], buffer[1:]
            if sign == "]" and wanted == ",or]":
                return
            if sign != ("[" if wanted == "[" else ","):
                raise InputError(f"{file.name}, line {line}: expected ',' or ']' after object {number} of the array, found {sign!r}.")
            wanted = "first" if wanted == "[" else "object"
            continue
        if buffer and wanted == "first" and buffer[0] == "]":
            return
        if buffer:
            try:
                value, end = decoder.raw_decode(buffer)
            except json.JSONDecodeError as error:
                problem, broken = error, error.pos < len(buffer) - 64 and not error.msg.startswith("Unterminated string")
            else:
                # A number at the end of the buffer may go on; an object is whole.
                number += 1
                yield number, _object(value, columns)
                line += buffer.count("\n", 0, end)
                buffer, wanted = buffer[end:], ",or]"
                continue
            if broken or len(buffer) > LINE_LIMIT:
                where = line + buffer.count("\n", 0, problem.pos)
                raise InputError(f"{file.name}, line {where}: object {number + 1} of the array is not JSON: {problem.msg}.")
        more = _some(source)
        if not more:
            raise InputError(f"{file.name}, line {line}: the array is not closed: the file ends after object {number}.")
        buffer += more


def _some(source: Iterator[str], characters: int = 1 << 16) -> str:
    parts: list[str] = []
    size = 0
    for line in source:
        parts.append(line)
        size += len(line)
        if size >= characters:
            break
    return "".join(parts)


def _squad(file: SourceFile, section: DataSection, columns: list[str] | None, required: Sequence[str]) -> Iterator[Record]:
    """Each question of the nested form is a row."""
    from orchestrator.data.squad import questions

    for number, values in questions(file, section):
        yield number, values if isinstance(values, BadRow) else _object(values, columns)


def _text(file: SourceFile, section: DataSection, columns: list[str] | None, required: Sequence[str]) -> Iterator[Record]:
    """Plain text, a paragraph a line: each is a row, numbered by its line; empty lines are none."""
    _require(file, required, ["text"])
    for number, line in enumerate(lines(file, section), start=1):
        if line.strip():
            yield number, _object({"text": line.rstrip("\r\n")}, columns)


def _of_class(file: SourceFile, section: DataSection, columns: list[str] | None, required: Sequence[str]) -> Iterator[Record]:
    """One text, image or sound: one row, its folder is the class."""
    kind = media_kind(file.uri) or "text"
    values = {kind: "".join(lines(file, section)) if kind == "text" else file.uri, "label": file.label}
    _require(file, required, list(values))
    yield 1, values if columns is None else {name: value for name, value in values.items() if name in columns}


# ---- tables --------------------------------------------------------------------------------------------------
def _parquet(file: SourceFile, section: DataSection, columns: list[str] | None, required: Sequence[str]) -> Iterator[Record]:
    import pyarrow.parquet as pq

    with file.open_random() as source:
        table = pq.ParquetFile(source)
        names = table.schema_arrow.names
        _require(file, required, names)
        wanted = names if columns is None else [name for name in names if name in columns]
        yield from _rows(table.iter_batches(batch_size=ARROW_ROWS, columns=wanted), class_names(table.schema_arrow))


def _arrow(file: SourceFile, section: DataSection, columns: list[str] | None, required: Sequence[str]) -> Iterator[Record]:
    """Both Arrow formats: files (also called Feather 2) and streams, which `datasets` writes."""
    with file.open_random() as source:
        is_file = source.read(6) == b"ARROW1"
        source.seek(0)
        if is_file:
            reader = pa.ipc.open_file(source)
            batches = (reader.get_batch(index) for index in range(reader.num_record_batches))
        else:
            batches = reader = pa.ipc.open_stream(source)
        names = reader.schema.names
        _require(file, required, names)
        wanted = names if columns is None else [name for name in names if name in columns]
        pieces = (batch.slice(start, ARROW_ROWS) for batch in batches for start in range(0, batch.num_rows, ARROW_ROWS))
        yield from _rows((piece.select(wanted) for piece in pieces), class_names(reader.schema))


def _rows(batches: Iterator[pa.RecordBatch], classes: dict[str, list[str]]) -> Iterator[Record]:
    number = 0
    for batch in batches:
        for values in batch.to_pylist():
            number += 1
            for name in classes.keys() & values.keys():
                values[name] = _class_name(classes[name], values[name])
            yield number, values


def class_names(schema: pa.Schema) -> dict[str, list[str]]:
    """Names of the classes of columns that `datasets` wrote as `ClassLabel`, from what it leaves in the schema."""
    note = (schema.metadata or {}).get(b"huggingface")
    features = json.loads(note).get("info", {}).get("features", {}) if note else {}
    classes = {}
    for column, feature in features.items():
        inner = (
            feature.get("feature") if isinstance(feature, dict) and feature.get("_type") in ("Sequence", "List", "LargeList") else feature
        )
        if isinstance(inner, dict) and inner.get("_type") == "ClassLabel" and inner.get("names"):
            classes[column] = list(inner["names"])
    return classes


def _class_name(names: list[str], value: Any) -> Any:
    """-1 is how `datasets` writes "no label"."""
    if isinstance(value, list):
        return [_class_name(names, item) for item in value]
    if value is None or value == -1:
        return None
    return names[value] if 0 <= value < len(names) else value


def _require(file: SourceFile, required: Sequence[str], names: Sequence[str]) -> None:
    if missing := [name for name in required if name not in names]:
        raise missing_column(file.name, missing, names)


_READERS: dict[str, Callable[[SourceFile, DataSection, list[str] | None, Sequence[str]], Iterator[Record]]] = {
    "csv": _csv,
    "tsv": _csv,
    "jsonl": _jsonl,
    "json": _json,
    "squad": _squad,
    "text": _text,
    "parquet": _parquet,
    "arrow": _arrow,
    "folder": _of_class,
}
