"""Which column of a file is which role of a task, and how well a file fits a task: by names, else by what stands in the columns."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from orchestrator.errors import InputError
from orchestrator.tasks.base import Column, Row, RowError, Task

TARGET_NAMES = (
    "label",
    "class",
    "target",
    "category",
    "sentiment",
    "stars",
    "star",
    "rating",
    "score",
    "polarity",
    "intent",
    "topic",
    "tag",
    "tags",
    "answer",
    "answers",
)
_MEDIA = {
    "image": re.compile(r"\.(jpe?g|png|bmp|gif|webp|tiff?)$|^data:image/", re.IGNORECASE),
    "audio": re.compile(r"\.(wav|flac|mp3|ogg|oga|opus|aiff)$|^data:audio/", re.IGNORECASE),
}


@dataclass(frozen=True)
class Guess:
    """The column taken for a role, and why; None: no column looks like it."""

    column: str | None
    why: str
    named: bool = False
    """The column is called as the role, or has files of its kind in it, so it is no guess."""


def guess(columns: Mapping[str, Column], rows: Sequence[Mapping[str, Any]]) -> dict[str, Guess]:
    """Role -> column, from some rows: names first, then what stands in them. Roles that are not required only by their name."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    found: dict[str, Guess] = {}
    for role, column in columns.items():
        if (name := _called(role, column, names)) is not None:
            found[role] = Guess(name, _say(column, name, rows), named=True)
    taken = {given.column for given in found.values()}
    # Targets first: few values repeat in them, while any column of words could be the text.
    for role, column in sorted(columns.items(), key=lambda item: not item[1].target):
        if role in found or not column.required or column.unless in found:
            continue
        free = [name for name in names if name not in taken]
        given = (_target(role, column, free, rows) if column.target else None) or _input(role, column, free, rows)
        found[role] = given if given.column is not None else Guess(None, f"no column looks like it; there is {', '.join(names) or 'none'}")
        taken.add(given.column)
    return {role: found[role] for role in columns if role in found}


def fits(task: Task, rows: Sequence[Mapping[str, Any]]) -> float:
    """From 0 (no row can be used) to 1: how many of some rows the task takes, and how surely their columns are its roles."""
    roles = task.columns()
    found = {role: given for role, given in guess(roles, rows).items() if given.column is not None}
    columns = {role: given.column or "" for role, given in found.items()}
    targets = [role for role, column in roles.items() if column.target and column.required]
    if not found or not rows or (targets and not any(roles[role].target for role in found)):
        return 0.0
    mapped: list[Row] = [{role: row.get(column) for role, column in columns.items()} for row in rows]
    good = sum(_is_usable(task, row) for row in mapped) / len(rows)
    named = sum(given.named for given in found.values()) / len(found)
    used = len(found) / len({name for row in rows for name in row})
    return good * (0.3 + 0.5 * named + 0.2 * used)


def _is_usable(task: Task, row: Row) -> bool:
    always = {role for role, column in task.columns().items() if column.required}
    try:
        task.clean({role: value for role, value in row.items() if role in always or value is not None})
    except (RowError, InputError):
        return False
    return True


def _called(role: str, column: Column, names: Sequence[str]) -> str | None:
    """The column that bears a role's name, or another that it often has."""
    wanted = [role, *getattr(column, "aliases", ())]
    return next((name for want in wanted for name in names if name.lower() == want.lower()), None)


def _target(role: str, column: Column, names: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> Guess | None:
    """A column of labels or numbers; None where the target is of another kind, for which one looks as for an input."""
    if column.kind not in ("label", "number", "any"):
        return None

    def rank(name: str) -> tuple[bool, int]:
        return (not _named(name, (role, *TARGET_NAMES)), len(_distinct(name, rows)))

    def fits_kind(name: str) -> bool:
        if column.kind == "number":
            return all(_is_number(value) for value in _distinct(name, rows))
        return _named(name, (role, *TARGET_NAMES)) or 1 < len(_distinct(name, rows)) <= max(2, len(rows) // 4)

    likely = [name for name in names if _distinct(name, rows) and fits_kind(name)]
    if not likely:
        return Guess(None, "")
    best = min(likely, key=rank)
    return Guess(best, _say(column, best, rows))


def _input(role: str, column: Column, names: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> Guess:
    def length(name: str) -> float:
        return _length(name, rows)

    if column.kind in _MEDIA:
        likely = [name for name in names if _is_media(column.kind, name, rows)]
    elif column.kind == "number":
        likely = [name for name in names if _distinct(name, rows) and all(map(_is_number, _distinct(name, rows)))]
    elif column.kind == "any":
        likely = [name for name in names if any(isinstance(row.get(name), (list, dict)) for row in rows)]
    else:
        likely = [name for name in names if length(name) > 0 and not _holds_no_words(name, rows)]
    if not likely:
        return Guess(None, "")
    close = [name for name in likely if _named(name, (role,))]
    best = max(close or likely, key=length)
    return Guess(best, _say(column, best, rows), named=column.kind in _MEDIA)


def _holds_no_words(name: str, rows: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a column has numbers only, or files of images or sounds."""
    return all(map(_is_number, _distinct(name, rows))) or any(_is_media(kind, name, rows) for kind in _MEDIA)


def _say(column: Column, name: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """What stands in a column, for a comment."""
    if column.target and column.kind in ("label", "any"):
        values = _distinct(name, rows)
        shown = ", ".join(sorted(str(value)[:20] for value in values)[:6])
        return f"{len(values)} different: {shown}" if len(values) <= 6 else f"{len(values)} different, such as {shown}"
    return f"{_length(name, rows):.0f} characters on average" if column.kind == "text" else ""


def _length(name: str, rows: Sequence[Mapping[str, Any]]) -> float:
    values = [row.get(name) for row in rows]
    return sum(len(value) for value in values if isinstance(value, str)) / max(1, len(values))


def _distinct(name: str, rows: Sequence[Mapping[str, Any]]) -> set[Any]:
    return {
        repr(value) if isinstance(value, (list, dict)) else value
        for row in rows
        if not ((value := row.get(name)) is None or (isinstance(value, str) and value == ""))
    }


def _is_number(value: Any) -> bool:
    try:
        float(value)
    except (TypeError, ValueError):
        return False
    return not isinstance(value, bool)


def _is_media(kind: str, name: str, rows: Sequence[Mapping[str, Any]]) -> bool:
    """Whether most of what stands in a column are files of this kind: a wrong row among them makes it no other column."""
    values = [row[name] for row in rows if row.get(name) is not None and row[name] != ""]
    fitting = sum(
        bool(_MEDIA[kind].search(value)) if isinstance(value, str) else isinstance(value, (bytes, dict)) and _named(name, (kind,))
        for value in values
    )
    return 2 * fitting > len(values)


def _named(column: str, names: Sequence[str]) -> bool:
    return bool(set(re.split(r"[^a-z]+", column.lower())) & set(names))
