"""Answers as they stand in data: the forms in which people keep them, and whether they stand in their context.

The canonical form is that of `datasets`: `{"text": [...], "answer_start": [...]}`, with the place of each text's first
character in the context, counted in Unicode characters; both lists are empty where the context has no answer.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from orchestrator.tasks.base import Row, RowError
from orchestrator.tasks.labels import label_name, missing

Answers = dict[str, list[Any]]

FORMS = 'an answer: its text, a list of texts, {"text": […], "answer_start": […]}, or a list of {"text": …, "answer_start": …}'
NO_ANSWER = "for a question without an answer an empty list or text, or is_impossible: true"


def clean_answers(row: Row, context: str) -> Answers:
    """What `answers`, `answer_start` and `is_impossible` of a row say, or `RowError`.

    An answer without its place is taken to stand where its text occurs first.
    """
    value, impossible = row.get("answers"), _flag(row.get("is_impossible"))
    if missing(value):
        if not impossible:
            raise RowError("answers", f"{FORMS}; {NO_ANSWER}", None)
        return {"text": [], "answer_start": []}
    pairs = [(text, start) for text, start in _pairs(value, row.get("answer_start")) if text.strip()]
    if impossible and pairs:
        raise RowError("is_impossible", "false where the row has an answer", row["is_impossible"])
    if impossible is False and not pairs:
        raise RowError("answers", "an answer, since is_impossible is false", value)
    places = [_place(text, start, context) for text, start in pairs]
    return {"text": [text for text, _ in pairs], "answer_start": places}


def _flag(value: Any) -> bool | None:
    if missing(value) or (isinstance(value, str) and not value.strip()):
        return None
    known = {"true": True, "false": False, "1": True, "0": False}
    name = label_name(value).strip().lower() if isinstance(value, (str, bool, int, float)) else ""
    if name not in known:
        raise RowError("is_impossible", "true or false", value)
    return known[name]


def _pairs(value: Any, start: Any) -> list[tuple[str, Any]]:
    """Each answer's text and the place that is given for it (None: none is)."""
    if isinstance(value, str):
        inner = _json_of(value) if value.lstrip().startswith(("{", "[")) else None
        return [(value, _only(start))] if inner is None else _pairs(inner, start)
    if isinstance(value, Mapping):
        if "text" not in value:
            raise RowError("answers", FORMS, value)
        return _pairs(value["text"], value.get("answer_start"))
    if isinstance(value, (list, tuple)):
        starts = start if isinstance(start, (list, tuple)) else [start] * len(value)
        if len(starts) != len(value):
            raise RowError("answer_start", f"as many places as there are answers, {len(value)}", start)
        return [pair for item, its in zip(value, starts, strict=True) for pair in _pairs(item, its)]
    if isinstance(value, (int, float)) and not isinstance(value, bool) and not missing(value):
        return [(label_name(value), _only(start))]
    raise RowError("answers", FORMS, value)


def _json_of(text: str) -> Any:
    """Answers written as JSON in a cell; None where the text is something else, such as an answer in brackets."""
    try:
        value = json.loads(text)
    except ValueError:
        return None
    items = value if isinstance(value, list) else [value]
    return value if all(isinstance(item, str) or (isinstance(item, dict) and "text" in item) for item in items) else None


def _only(start: Any) -> Any:
    return start[0] if isinstance(start, (list, tuple)) and len(start) == 1 else start


def _place(text: str, start: Any, context: str) -> int:
    """Where the answer stands, or `RowError` saying what stands there."""
    if missing(start) or (isinstance(start, str) and not start.strip()):
        found = context.find(text)
        if found < 0:
            raise RowError("answers", f"an answer that stands in the context, letter for letter{_hint(text, context)}", text)
        return found
    number = _number(start)
    if context[number : number + len(text)] != text:
        there = context[number : number + len(text)]
        place = f"at character {number} of the context's {len(context)}{_hint(text, context)}"
        raise RowError("answers", f"{_short(text)} {place}", there)
    return number


def _number(start: Any) -> int:
    if isinstance(start, str) and start.strip().isdecimal():
        return int(start)
    if isinstance(start, (int, float)) and not isinstance(start, bool) and start >= 0 and float(start).is_integer():
        return int(start)
    raise RowError("answer_start", "the place of the answer's first character in the context, a whole number from 0", start)


def _hint(text: str, context: str) -> str:
    found = context.find(text)
    if found >= 0:
        return f" (it stands at {found})"
    other = re.search(re.escape(text.strip()), context, re.IGNORECASE)
    return f" ({_short(other[0])} stands at {other.start()})" if other else ""


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:60]}…")
