"""Words of a text, by their places in it: the same for training, evaluation and the endpoint, whatever the tokenizer.

A place is [start, end) in characters (Unicode code points) of the text as it was given.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

Place = tuple[int, int]

_CONTINUOUS = r"\p{Han}\p{Hiragana}\p{Katakana}\u30fc\uff70\p{Bopomofo}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}\p{Tibetan}"
"""Scripts that are written without spaces between words: each character is a unit of its own."""
_JOINERS = r"\u200c\u200d"
"""Within words of Persian and of Indian scripts."""


@functools.cache
def _patterns() -> tuple[Any, Any]:
    import regex

    letters = rf"[[\p{{L}}\p{{N}}]--[{_CONTINUOUS}]]"
    inside = rf"[[\p{{L}}\p{{N}}\p{{M}}{_JOINERS}]--[{_CONTINUOUS}]]"
    words = rf"[{_CONTINUOUS}][\p{{M}}]*+|{letters}{inside}*+|(?=\S)\X"
    # Ideographic and full-width punctuation stands among such characters without spaces too.
    return regex.compile(words, regex.V1), regex.compile(rf"[{_CONTINUOUS}\u3000-\u303f\uff01-\uff65]", regex.V1)


def split(text: str) -> list[Place]:
    """The words: runs of letters, digits and their marks; each character of scripts without spaces; each other sign alone."""
    return [match.span() for match in _patterns()[0].finditer(text)]


def join(tokens: Sequence[str]) -> tuple[str, list[Place]]:
    """The text of given words, and their places in it: with a space between two, none where both sides are written without."""
    continuous = _patterns()[1]
    parts: list[str] = []
    places: list[Place] = []
    length = 0
    for token in tokens:
        if parts and not (continuous.match(parts[-1][-1]) and continuous.match(token[0])):
            parts.append(" ")
            length += 1
        places.append((length, length + len(token)))
        parts.append(token)
        length += len(token)
    return "".join(parts), places


def find(tokens: Sequence[str], text: str) -> list[Place] | None:
    """The places of given words in a text that consists of them and of white space; None where it does not."""
    places: list[Place] = []
    at = 0
    for token in tokens:
        while at < len(text) and text[at].isspace():
            at += 1
        if not text.startswith(token, at):
            return None
        places.append((at, at + len(token)))
        at += len(token)
    return None if text[at:].strip() else places


def cut(places: Sequence[Place], words: Sequence[Place]) -> int:
    """How many of `places` begin or end within a word rather than at its border."""
    starts, ends = {start for start, _ in words}, {end for _, end in words}
    return sum(start not in starts or end not in ends for start, end in places)
