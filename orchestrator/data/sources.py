"""Rows out of files: which files, what columns they have, which column is which role, and reading them with Ray Data."""

from __future__ import annotations

import difflib
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from orchestrator.config import DataSection
from orchestrator.data import files as _files
from orchestrator.data.files import SourceFile
from orchestrator.data.readers import BadRow, records
from orchestrator.errors import InputError, did_you_mean, nearest
from orchestrator.tasks.base import BASE64_FILE, Column

if TYPE_CHECKING:
    import ray.data

TASK_BYTES = 16_000_000
"""Small files are read together, by tasks of about so much; a larger file is one task."""
BLOCK_BYTES = 8_000_000
"""Text in a block that `read` yields, roughly."""


@dataclass(frozen=True)
class Peek:
    """The beginning of a split."""

    columns: tuple[str, ...]
    rows: tuple[dict[str, Any], ...]
    """The first rows that can be read."""
    bad: tuple[str, ...]
    """A sentence for each row among them that can't be read."""
    format: str
    files: tuple[SourceFile, ...]

    @property
    def size(self) -> int:
        """Bytes of all files, as stored."""
        return sum(file.size for file in self.files)


def peek(section: DataSection, split: str = "train", rows: int = 200, *, found: Mapping[str, list[SourceFile]] | None = None) -> Peek:
    """The first rows and the columns of a split, without Ray, in the time it takes to read them.

    `found`: what `files.find` said, if it has been asked. Raises `InputError` where there are no files, no rows, or none that can be read.
    """
    found = found or _files.find(section)
    if split not in found:
        raise InputError(f"data.{split} names no files.")
    files = found[split]
    good: list[dict[str, Any]] = []
    bad: list[str] = []
    for file in files:
        for number, values in itertools.islice(records(file, section), rows - len(good) - len(bad)):
            if isinstance(values, BadRow):
                bad.append(describe(file.name, number, values.column, values.expected, values.found))
            else:
                good.append(values)
        if len(good) + len(bad) >= rows:
            break
    if not good:
        raise InputError(
            f"data.{split}: none of the first {len(bad)} rows can be read.\n" + "\n".join(bad[:3]) if bad else no_rows(split, files)
        )
    columns = tuple(dict.fromkeys(name for row in good for name in row))
    return Peek(columns, tuple(good), tuple(bad), files[0].format, tuple(files))


def located(file: SourceFile, value: Any) -> Any:
    """What stands in a column of images or sounds, with a path in it made one that can be opened from anywhere."""
    if isinstance(value, str):
        return value if not value.strip() or BASE64_FILE.fullmatch(value) else file.beside(value)
    if isinstance(value, dict) and isinstance(value.get("path"), str) and value.get("bytes") is None:
        return {**value, "path": file.beside(value["path"])}
    return value


def media(roles: Mapping[str, Column], mapping: Mapping[str, str]) -> tuple[str, ...]:
    """The columns in which images or sounds stand."""
    return tuple(name for role, name in mapping.items() if roles[role].kind in ("image", "audio"))


def no_rows(split: str, files: Sequence[SourceFile]) -> str:
    """The sentence for a split whose files hold nothing."""
    if len(files) == 1:
        return f"data.{split}: {files[0].name} has no rows."
    return f"data.{split}: none of the {len(files)} files has a row, from {files[0].name} to {files[-1].name}."


def describe(file: str, number: int, column: str | None, expected: str, found: Any) -> str:
    """One bad row as a sentence."""
    shown = found if isinstance(found, str) and column is None else repr(found)
    shown = shown if len(shown) <= 120 else f"{shown[:120]}…"
    return f"{file}, row {number}{f', column {column!r}' if column else ''}: expected {expected}, found {shown}."


def map_columns(
    section: DataSection, roles: Mapping[str, Column], columns: Sequence[str], where: str = "data.train", *, targets: bool = True
) -> dict[str, str]:
    """Role -> column of the files, for the roles that have one; `targets=False` asks for no target column (prediction).

    For prediction a role may be `optional_at_prediction`; one input there must be. Raises `InputError` where a column is
    missing, with the columns there are and the line that would put it right.
    """
    if unknown := [role for role in section.columns if role not in roles]:
        raise InputError(f"data.columns: the task has no role {unknown[0]!r}.{did_you_mean(unknown[0], roles)}")
    mapping: dict[str, str] = {}
    named = {role: section.columns.get(role) or _by_name(section, role, column, columns) for role, column in roles.items()}
    for role, column in roles.items():
        name = named[role]
        needed = (column.required and named.get(column.unless or "") not in columns) or role in section.columns
        if not targets and (column.target or column.optional_at_prediction):
            needed = False
        if name in columns:
            mapping[role] = name
        elif needed:
            raise _no_column(section, where, role, column, name, columns)
    choices = {role: column for role, column in roles.items() if column.alternative}
    if choices and not choices.keys() & mapping.keys():
        listed = ", ".join(f"{role!r} ({column.help})" if column.help else repr(role) for role, column in choices.items())
        example = f"data.columns: {{{next(iter(choices))}: {columns[0]}}}"
        raise InputError(
            f"{where}: one of these is needed: {listed}. The columns are {', '.join(map(repr, columns[:12]))}. Say which it is, as in {example}."
        )
    inputs = {role: column for role, column in roles.items() if not column.target}
    if not targets and inputs and not mapping.keys() & inputs.keys():
        role = next(iter(inputs))
        raise _no_column(section, where, role, inputs[role], section.columns.get(role, role), columns)
    return mapping


def _by_name(section: DataSection, role: str, column: Column, columns: Sequence[str]) -> str:
    """The column of a role that the job does not name: the role's name, else one of its other names that the job gives no other role."""
    others = (name for name in column.aliases if name in columns and name not in section.columns.values())
    return role if role in columns else next(others, role)


def _no_column(section: DataSection, where: str, role: str, column: Column, name: str, columns: Sequence[str]) -> InputError:
    ranked = nearest(name, columns)
    listed = ", ".join(map(repr, ranked[:12])) + (f" and {len(ranked) - 12} more" if len(ranked) > 12 else "")
    what = f"the role {role!r}" + (f" ({column.help})" if column.help else "")
    message = f"{where}: there is no column {name!r} for {what}. The columns are {listed}."
    separator = next((sign for sign in ";\t|" if sign in columns[0]), None) if len(columns) == 1 else None
    if separator is not None and section.delimiter is None:
        return InputError(f"{message} They look separated by {separator!r}: set data.delimiter: {separator!r}.")
    guess = ranked[0]
    if difflib.SequenceMatcher(None, name.lower(), guess.lower()).ratio() < 0.5:
        taken = {section.columns.get(other, other) for other in section.columns if other != role}
        guess = next((other for other in columns if other not in taken), guess)
    return InputError(f"{message} Say which it is, for example data.columns: {{{role}: {guess}}}, or --set data.columns.{role}={guess}.")


# ---- with Ray Data -------------------------------------------------------------------------------------------
def read(section: DataSection, split: str = "train", media: Sequence[str] = ()) -> ray.data.Dataset:
    """A split's rows as a Ray Data set: the files' columns, `row_id`, and `_bad`, in blocks of bounded size.

    `row_id` is "file.csv:17". `_bad` is null, or for a row that can't be read a JSON object with column, expected and
    found (its columns are null). Paths in the columns `media` are made such as can be opened from anywhere. A column whose values are of several kinds comes as JSON text. What is
    wrong with a file is raised as `InputError` by the task that reads it.
    """
    from orchestrator.data.datasource import read_tasks

    found = _files.find(section)
    if split not in found:
        raise InputError(f"data.{split} names no files.")
    files = found[split]
    work = [_Blocks(section, tuple(some), tuple(media)) for some in tasks_of(files)]
    return read_tasks("Files", work, here=any(file.is_local for file in files))


def tasks_of(files: Sequence[SourceFile]) -> list[list[SourceFile]]:
    """Files in order, cut into what one task reads."""
    tasks: list[list[SourceFile]] = []
    size = TASK_BYTES
    for file in files:
        if size >= TASK_BYTES:
            tasks.append([])
            size = 0
        tasks[-1].append(file)
        size += file.size * (4 if file.compression else 1)
    return tasks


@dataclass(frozen=True)
class _Blocks:
    section: DataSection
    files: tuple[SourceFile, ...]
    media: tuple[str, ...]

    def __call__(self) -> Iterator[pa.Table]:
        for file in self.files:
            rows: list[tuple[int, dict[str, Any] | BadRow]] = []
            size = 0
            for number, values in records(file, self.section):
                if isinstance(values, dict):
                    values = {name: located(file, value) if name in self.media else value for name, value in values.items()}
                rows.append((number, values))
                size += weight(values) if isinstance(values, dict) else 200
                if size >= BLOCK_BYTES:
                    yield self._table(file, rows)
                    rows, size = [], 0
            if rows:
                yield self._table(file, rows)

    def _table(self, file: SourceFile, rows: Sequence[tuple[int, dict[str, Any] | BadRow]]) -> pa.Table:
        good = [values if isinstance(values, dict) else {} for _, values in rows]
        columns = {
            name: column([values.get(name) for values in good]) for name in dict.fromkeys(name for values in good for name in values)
        }
        bad = [json.dumps(vars(values), ensure_ascii=False) if isinstance(values, BadRow) else None for _, values in rows]
        if reserved := columns.keys() & {"row_id", "_bad"}:
            raise InputError(f"{file.name} has a column {reserved.pop()!r}, a name that reading itself gives; rename it.")
        ids = [f"{file.name}:{number}" for number, _ in rows]
        return pa.table({**columns, "row_id": pa.array(ids, pa.string()), "_bad": pa.array(bad, pa.string())})


def column(values: Sequence[Any]) -> pa.Array:
    """An Arrow column of any Python values; JSON text where they are of several kinds."""
    try:
        return pa.array(values)
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError):
        texts = [
            value if value is None or isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str) for value in values
        ]
        return pa.array(texts, pa.string())


def weight(values: Mapping[str, Any]) -> int:
    """About how many bytes a row is."""
    size = 32
    for value in values.values():
        size += 16 + len(value) if type(value) is str else _weight(value)
    return size


def _weight(value: Any) -> int:
    if isinstance(value, (str, bytes)):
        return 16 + len(value)
    if isinstance(value, Mapping):
        return weight(value)
    if isinstance(value, Iterable):
        return 16 + sum(map(_weight, value))
    return 16
