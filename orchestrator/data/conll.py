"""CoNLL files: a word a line with its columns, an empty line after each sentence. A row is a sentence, each column a list.

Columns are separated by tabs where there are any, else by spaces. Lines before a sentence that begin with # are comments, and
lines of -DOCSTART- are left out. A file of CoNLL-U (universaldependencies.org/format.html) has ten columns with names of
their own; its lines for contracted words (1-2) and for words that are not in the text (1.1) are left out.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from orchestrator.config import DataSection
from orchestrator.data.files import SourceFile
from orchestrator.data.readers import BadRow, Record, lines, missing_column
from orchestrator.errors import InputError

LONGEST = 1 << 17
"""Lines of one sentence; more are a file without empty lines."""
UNIVERSAL = ("id", "tokens", "lemmas", "upos", "xpos", "feats", "head", "deprel", "deps", "misc")
"""Columns of CoNLL-U, named as in the data sets of the Hugging Face hub."""
_ID = re.compile(r"[1-9]\d*(?:-\d+)?|\d+\.\d+")
_NOTE = re.compile(r"#\s*[\w.:-]+\s*=")
_TEXT = re.compile(r"#\s*text\s*=\s*(.*)")
_BLANK = " \t\r\n"


def sentences(file: SourceFile, section: DataSection, columns: list[str] | None, required: Sequence[str]) -> Iterator[Record]:
    """Each sentence by the line where it begins: `tokens`, `tags` (the last column), between them `column_2` and so on.

    `data.names` names the columns instead. A sentence with a comment `# text = …` has a column `text` too.
    """
    names: tuple[str, ...] = ()
    held: list[list[str]] = []
    problem: BadRow | None = None
    text: str | None = None
    begin = 0
    for number, line in enumerate(_and_a_last(lines(file, section)), start=1):
        bare = line.strip(_BLANK)
        fields = _fields(line, section.delimiter)
        if not bare or fields[0] == "-DOCSTART-":
            if held or problem:
                yield begin, problem or _row(held, names, text, columns)
                held, problem = [], None
            text = None
            continue
        if bare.startswith("#") and not held and not problem and _is_comment(line, bare, len(fields), len(names), section.delimiter):
            text = found[1] if (found := _TEXT.match(bare)) else text
            continue
        if not names:
            names = _names(file, section, fields)
            if missing := [name for name in required if name not in (*names, "text")]:
                raise missing_column(file.name, missing, names)
        begin = begin if held or problem else number
        if len(fields) != len(names):
            expected = f"{len(names)} columns in each line ({', '.join(names)})"
            problem = problem or BadRow(None, expected, f"{len(fields)} in line {number}: {bare[:80]}")
        else:
            held.append(fields)
        if len(held) > LONGEST:
            raise InputError(
                f"{file.name}, line {begin}: {LONGEST:,} lines without an empty one, which ends a sentence. Is it a CoNLL file?"
            )


def _and_a_last(source: Iterator[str]) -> Iterator[str]:
    yield from source
    yield ""


def _fields(line: str, delimiter: str | None) -> list[str]:
    line = line.rstrip("\r\n")
    if delimiter or "\t" in line:
        return [field.strip(" ") for field in line.split(delimiter or "\t")]
    return re.split(" +", line.strip(" "))


def _is_comment(line: str, bare: str, fields: int, width: int, delimiter: str | None) -> bool:
    """A word may begin with # too: then its line has as many columns as the others."""
    if delimiter or "\t" in line:
        return bool(_NOTE.match(bare)) and fields != width
    return not width or fields != width or bool(_NOTE.match(bare))


def _names(file: SourceFile, section: DataSection, fields: Sequence[str]) -> tuple[str, ...]:
    if section.names:
        if len(section.names) != len(fields):
            raise InputError(
                f"{file.name}: data.names gives {len(section.names)} names, and its lines have {len(fields)} columns, such as {' '.join(fields)[:80]!r}."
            )
        return tuple(section.names)
    if len(fields) == len(UNIVERSAL) and _ID.fullmatch(fields[0]):
        return UNIVERSAL
    if len(fields) == 1:
        return ("tokens",)
    return ("tokens", *(f"column_{place}" for place in range(2, len(fields))), "tags")


def _row(held: Sequence[Sequence[str]], names: tuple[str, ...], text: str | None, columns: list[str] | None) -> dict[str, Any] | BadRow:
    if names == UNIVERSAL:
        held = [fields for fields in held if fields[0].isdecimal()]
        if not held:
            return BadRow("id", "a sentence with words", "contracted and left-out words only")
    row: dict[str, Any] = {name: list(values) for name, values in zip(names, zip(*held, strict=True), strict=True)}
    if text is not None:
        row.setdefault("text", text)
    return row if columns is None else {name: row[name] for name in columns if name in row}
