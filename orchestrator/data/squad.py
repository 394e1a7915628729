"""Questions about texts in the nested JSON of SQuAD, read paragraph by paragraph.

    {"version": "v2.0", "data": [{"title": …, "paragraphs": [{"context": …, "qas": [
        {"id": …, "question": …, "answers": [{"text": …, "answer_start": …}], "is_impossible": false}]}]}]}

(Rajpurkar et al. 2016 and 2018.) Each question is a row with the context it is about; it is numbered by its place among all
questions of the file. What an article and a paragraph say beside their texts, such as `title`, stands in each of their
rows, where it comes before the nested list.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from orchestrator.config import DataSection
from orchestrator.data.files import SourceFile
from orchestrator.data.json_stream import Cursor
from orchestrator.data.readers import BadRow, Record
from orchestrator.errors import InputError

FORM = '{"data": [{"paragraphs": [{"context": …, "qas": [{"question": …, "answers": […]}]}]}]}'


def is_squad(file: SourceFile, section: DataSection) -> bool:
    """Does a JSON file begin as one of SQuAD? Told from its first keys."""
    cursor = Cursor(file, section)
    try:
        if not _finds(cursor, "data"):
            return False
        cursor.take("[", "an array")
        return _finds(cursor, "paragraphs") and cursor.sign() == "["
    except InputError:
        return False


def _finds(cursor: Cursor, wanted: str) -> bool:
    """Enters an object up to the value of the key `wanted`, before which there are only texts and numbers."""
    for key in cursor.members():
        if key == wanted:
            return True
        if cursor.sign() in "[{":
            return False
        cursor.value()
    return False


def questions(file: SourceFile, section: DataSection) -> Iterator[Record]:
    """The rows of a file."""
    cursor, number, seen = Cursor(file, section), 0, False
    for key in cursor.members(f"the form of SQuAD, {FORM}"):
        if key != "data":
            cursor.value()
            continue
        seen = True
        for _ in cursor.items("the articles, [{…}, {…}], after the key 'data'"):
            about: dict[str, Any] = {}
            for inner in cursor.members("an article, an object with 'paragraphs'"):
                if inner != "paragraphs":
                    about |= _plain({inner: cursor.value()})
                    continue
                for _ in cursor.items("the paragraphs of an article, [{…}, {…}]"):
                    for row in _rows(cursor.value(), about):
                        number += 1
                        yield number, row
    if not seen:
        raise InputError(f"{file.name} has no 'data'; expected the form of SQuAD, {FORM}.")


def _rows(paragraph: Any, about: dict[str, Any]) -> Iterator[dict[str, Any] | BadRow]:
    if not isinstance(paragraph, dict) or not isinstance(paragraph.get("qas"), list):
        yield BadRow(None, 'a paragraph such as {"context": …, "qas": […]}', _short(paragraph))
        return
    shared = {**about, **_plain(paragraph), "context": paragraph.get("context")}
    for question in paragraph["qas"]:
        if isinstance(question, dict):
            yield {**shared, **question}
        else:
            yield BadRow(None, 'a question such as {"id": …, "question": …, "answers": […]}', _short(question))


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if not isinstance(value, (list, dict))}


def _short(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)[:80]
