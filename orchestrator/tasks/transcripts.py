"""Transcripts: how they are compared, what characters they have, and the words that a model's outputs say, with their times.

What a model says of one stretch of sound is an array of float64 with a row for each character: (code point, start, end),
in seconds from the beginning of the sound. A line end stands between segments. The first row is about the stretch itself:
(1 where the times are measured and 0 where they are spread evenly, start, end).
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from orchestrator.tasks.base import RowError

if TYPE_CHECKING:
    import numpy as np

PAUSE_S = 0.8
"""Silence between words from which on a CTC model's words are another segment."""
SAME_WORD_S = 0.15
"""How far apart in time two stretches may place the same word, where times are measured."""
_UNSPACED = ((0x0E00, 0x0EFF), (0x1000, 0x109F), (0x1780, 0x17FF), (0x3040, 0x30FF), (0x3400, 0x9FFF), (0x20000, 0x323AF))
"""Thai, Lao, Burmese, Khmer, Japanese and Chinese, by code point."""
_APOSTROPHES = dict.fromkeys(map(ord, "’ʼ＇`´"), "'")


@dataclass(frozen=True)
class Word:
    text: str
    start: float
    end: float
    begins: bool = False
    """The first word of a segment."""
    glued: bool = False
    """No space before it, as in scripts that write none: there a word is one character with its marks."""


def clean(column: str, value: Any) -> str:
    """The transcript in a cell, white space made single spaces, or `RowError`: it must have a letter or a digit."""
    if isinstance(value, (int, float)) and not isinstance(value, bool) and value == value:
        value = f"{value:g}" if isinstance(value, float) else str(value)  # A reader took a column of digits for numbers.
    if not isinstance(value, str):
        raise RowError(column, "a transcript", value)
    text = " ".join(value.split())
    if not normalised(text):
        raise RowError(column, "a transcript with a letter or digit", value)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RowError(column, f"Unicode text (character {error.start} is half of a surrogate pair)", ascii(value[:80])) from None
    return unicodedata.normalize("NFC", text)


def normalised(text: str) -> str:
    """Lower case, without punctuation and symbols but for apostrophes within words: what is compared, and what CTC models learn.

    Marks stay with their letters, so that no script loses its vowels.
    """
    text = unicodedata.normalize("NFC", unicodedata.normalize("NFKC", text).translate(_APOSTROPHES).lower())
    signs = []
    for place, sign in enumerate(text):
        inner = sign == "'" and 0 < place < len(text) - 1 and text[place - 1].isalpha() and text[place + 1].isalpha()
        signs.append(sign if inner or unicodedata.category(sign)[0] in "LMN" else " ")
    return " ".join("".join(signs).split())


def written(text: str, *, lowercase: bool, remove_punctuation: bool) -> str:
    """A transcript as a model is to write it."""
    if lowercase and remove_punctuation:
        return normalised(text)
    if remove_punctuation:
        kept = (sign if unicodedata.category(sign)[0] in "LMN" or sign == "'" else " " for sign in text.translate(_APOSTROPHES))
        return " ".join("".join(kept).split())
    return text.lower() if lowercase else text


# ---- from a model's output to characters with times --------------------------------------------------------
def of_frames(ids: Sequence[int], blank: int, pieces: Sequence[str], start: float, end: float) -> np.ndarray:
    """What the likeliest outputs of a CTC model say: repeated ones are one, then blanks go (Graves et al. 2006)."""
    seconds = (end - start) / max(1, len(ids))
    found: list[tuple[str, float, float]] = []
    first = 0
    for place in range(1, len(ids) + 1):
        if place < len(ids) and ids[place] == ids[first]:
            continue
        if ids[first] != blank and ids[first] < len(pieces):
            found += [(sign, start + first * seconds, start + place * seconds) for sign in pieces[ids[first]]]
        first = place
    return _array(_segmented(found), start, end, measured=True)


def of_segments(segments: Iterable[tuple[str, float, float]], start: float, end: float) -> np.ndarray:
    """Texts with their times: each character has an even part of its text's time."""
    found: list[tuple[str, float, float]] = []
    for text, since, until in segments:
        text = " ".join(text.split())
        if not text:
            continue
        each = (until - since) / len(text)
        found += [("\n", since, since)] if found else []
        found += [(sign, since + place * each, since + (place + 1) * each) for place, sign in enumerate(text)]
    return _array(found, start, end, measured=False)


def _segmented(signs: list[tuple[str, float, float]]) -> list[tuple[str, float, float]]:
    """Spaces at long pauses become line ends."""
    last = None
    for place, (sign, start, _) in enumerate(signs):
        if sign == " ":
            continue
        if last is not None and place - last > 1 and start - signs[last][2] > PAUSE_S:
            signs[last + 1] = ("\n", signs[last][2], start)
        last = place
    return signs


def _array(signs: Sequence[tuple[str, float, float]], start: float, end: float, *, measured: bool) -> np.ndarray:
    import numpy as np

    return np.array([(float(measured), start, end), *((float(ord(sign)), since, until) for sign, since, until in signs)], dtype=np.float64)


# ---- from characters to one transcript -----------------------------------------------------------------------
def words(said: np.ndarray) -> list[Word]:
    """The words of one stretch."""
    found: list[Word] = []
    begins, glued = True, False
    for code, start, end in said[1:].tolist():
        sign = chr(int(code))
        if sign.isspace():
            begins, glued = begins or sign == "\n", False
            continue
        last = found[-1] if found and glued else None
        if last is not None and (unicodedata.category(sign)[0] == "M" or not (_unspaced(sign) or _unspaced(last.text[0]))):
            found[-1] = replace(last, text=last.text + sign, end=end)
        else:
            found.append(Word(sign, start, end, begins, glued))
        begins, glued = False, True
    return found


def _unspaced(sign: str) -> bool:
    return any(low <= ord(sign) <= high for low, high in _UNSPACED)


def merged(stretches: Sequence[np.ndarray]) -> list[Word]:
    """The words of a sound from what was said of stretches of it, each of which overlaps the one before; none is doubled.

    Both stretches heard what lies in the overlap. The longest run of words that they agree on there is where one goes over
    into the other; where they agree on none, the middle of the overlap is.
    """
    whole: list[Word] = []
    for place, said in enumerate(stretches):
        new = words(said)
        if place == 0:
            whole = new
            continue
        before = stretches[place - 1]
        measured, start, end = bool(said[0, 0] and before[0, 0]), float(said[0, 1]), float(before[0, 2])
        slack = SAME_WORD_S if measured else 2 * (end - start)  # Times spread evenly are wrong by as long as a stretch is silent.
        tail = next((index for index, word in enumerate(whole) if word.end > start - slack), len(whole))
        head = next((index for index, word in enumerate(new) if word.start > end + slack), len(new))
        first, second, length = _agreed(whole[tail:], new[:head], SAME_WORD_S if measured else slack)
        if length:
            keep, take = tail + first + (length + 1) // 2, second + (length + 1) // 2
        else:
            middle = (start + end) / 2
            keep = next((index for index, word in enumerate(whole) if word.start + word.end > 2 * middle), len(whole))
            take = next((index for index, word in enumerate(new) if word.start + word.end > 2 * middle), len(new))
        whole = whole[:keep] + new[take:]
    return whole


def _agreed(one: Sequence[Word], other: Sequence[Word], apart_s: float) -> tuple[int, int, int]:
    """Where the longest run of the same words begins in each, and its length; no two of them further apart in time than `apart_s`.

    Of runs of the same length it is the one whose words are nearest to each other.
    """
    best, best_gap = (0, 0, 0), float("inf")
    keys = [[normalised(word.text) or word.text for word in side] for side in (one, other)]
    runs = [0] * (len(other) + 1)
    for place, word in enumerate(one):
        above = runs
        runs = [0] * (len(other) + 1)
        for column, candidate in enumerate(other):
            gap = abs(word.start + word.end - candidate.start - candidate.end) / 2
            if keys[0][place] != keys[1][column] or gap > apart_s:
                continue
            length = runs[column + 1] = above[column] + 1
            if length > best[2] or (length == best[2] and gap < best_gap):
                best, best_gap = (place - length + 1, column - length + 1, length), gap
    return best


def prediction(found: Sequence[Word]) -> dict[str, Any]:
    """`text`, and as chunks with their timestamps `words` and `segments`."""
    segments: list[list[Word]] = []
    for word in found:
        if word.begins or not segments:
            segments.append([])
        segments[-1].append(word)
    return {"text": _text(found), "words": [_chunk([word]) for word in found], "segments": [_chunk(segment) for segment in segments]}


def _chunk(found: Sequence[Word]) -> dict[str, Any]:
    return {"text": _text(found), "timestamp": [round(found[0].start, 3), round(found[-1].end, 3)]}


def _text(found: Sequence[Word]) -> str:
    return "".join(word.text if word.glued else f" {word.text}" for word in found).strip()
