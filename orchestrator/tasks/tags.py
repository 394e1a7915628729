"""Tags of words and spans of characters, as they stand in data, read as entities.

An entity among words is (first word, word after the last, label); among characters it is {start, end, label}.
Schemes: IOB1 is that of Ramshaw & Marcus 1995, BIO (IOB2) that of Tjong Kim Sang & Veenstra 1999; BIOES and BILOU mark ends and
single words too; IO marks neither.
"""

from __future__ import annotations

import ast
import itertools
import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from orchestrator.tasks.base import RowError
from orchestrator.tasks.labels import label_name, missing

Scheme = Literal["auto", "BIO", "IOB1", "BIOES", "BILOU", "IO"]
Entity = tuple[int, int, str]
Span = dict[str, Any]

OUTSIDE = "O"
_PREFIXES: dict[str, str] = {"BIO": "BI", "IOB1": "BI", "BIOES": "BIES", "BILOU": "BILU", "IO": "I", "auto": "BIMESLU"}
_BEGINS, _SINGLE, _ENDS = "BSU", "SU", "ESLU"
_LABEL_KEYS = ("label", "entity_group", "entity", "type", "tag")


# ---- tags ----------------------------------------------------------------------------------------------------
def parse(tag: str, scheme: Scheme) -> tuple[str, str] | None:
    """Prefix and label of a tag, ("", "") for no entity; None where it is no tag of the scheme."""
    if tag == OUTSIDE:
        return "", ""
    prefix, dash, label = tag.partition("-")
    if dash and label and len(prefix) == 1 and prefix in _PREFIXES[scheme]:
        return prefix, label
    return ("I", tag) if scheme == "IO" and tag and not (dash and prefix in tuple(_PREFIXES["auto"])) else None


def expected(scheme: Scheme) -> str:
    """What `parse` takes, for the sentence on a tag that it doesn't."""
    if scheme == "auto":
        return "O or a tag such as B-PER and I-PER (labels without a prefix: task.scheme: IO; a tag of each word, as parts of speech: task.problem: words)"
    prefixes = ", ".join(f"{prefix}-…" for prefix in _PREFIXES[scheme])
    return f"a tag of the scheme {scheme}: O, {prefixes}{' or a label without a prefix' if scheme == 'IO' else ''}"


def entities(tags: Sequence[str], scheme: Scheme) -> tuple[list[Entity], int]:
    """The entities in the tags of a text's words, and how many tags had to be repaired for it.

    A tag that goes on with what did not begin (I- after O, or after another label) begins it, as conlleval reads it; an
    entity of BIOES or BILOU that does not end, ends where it stops.
    """
    found: list[Entity] = []
    repaired = 0
    begin, label, ended = -1, "", True
    pairs = [parse(tag, scheme) or ("", "") for tag in tags]
    marks_ends = scheme in ("BIOES", "BILOU") or (scheme == "auto" and any(prefix and prefix in _ENDS for prefix, _ in pairs))
    for place, (prefix, name) in enumerate([*pairs, ("", "")]):
        goes_on = bool(prefix) and prefix not in _BEGINS and not ended and name == label
        if not goes_on:
            if begin >= 0:
                found.append((begin, place, label))
                repaired += marks_ends and not ended
            begin = place if prefix else -1
            repaired += bool(prefix) and prefix not in _BEGINS and scheme not in ("IO", "IOB1")
        label, ended = name, not prefix or prefix in _ENDS
    return found, repaired


def bio(found: Sequence[Entity], words: int) -> list[str]:
    """The tags of so many words, in the scheme BIO."""
    tags = [OUTSIDE] * words
    for first, last, label in found:
        tags[first:last] = [f"B-{label}", *[f"I-{label}"] * (last - first - 1)]
    return tags


# ---- cells ---------------------------------------------------------------------------------------------------
def listed(column: str, value: Any, what: str) -> list[Any]:
    """The list in a cell: a list, its text as JSON or Python writes it, or words with spaces between; `RowError` for anything else."""
    if isinstance(value, str) and value.strip()[:1] in ("[", "("):
        for read in (json.loads, ast.literal_eval):
            try:
                found = read(value)
            except (ValueError, SyntaxError, MemoryError, RecursionError):
                continue
            if isinstance(found, (list, tuple)):
                return list(found)
    if isinstance(value, (list, tuple)):
        return list(value)
    if isinstance(value, str) and value.strip():
        return value.split()
    raise RowError(column, what, value)


def clean_tokens(value: Any) -> list[str]:
    """The words of a row: texts that are not empty, without white space around them."""
    tokens = listed("tokens", value, "a list of words, or words with spaces between")
    if not tokens:
        raise RowError("tokens", "a list with at least one word", value)
    tokens = [token.get("text") if isinstance(token, Mapping) else token for token in tokens]  # as Prodigy writes them
    for token in tokens:
        if not isinstance(token, (str, int, float)) or isinstance(token, bool) or missing(token) or not str(token).strip():
            raise RowError("tokens", "words that are not empty", token)
    words = [label_name(token) if not isinstance(token, str) else token.strip() for token in tokens]
    for word in words:
        if any("\ud800" <= sign <= "\udfff" for sign in word):
            raise RowError("tokens", "Unicode text (no half of a surrogate pair)", ascii(word[:80]))
    return words


def clean_tags(value: Any, words: int, names: Sequence[str] | None) -> list[str]:
    """A tag for each of so many words; numbers become `names`."""
    tags = listed("tags", value, "a list of tags, one for each word")
    if len(tags) != words:
        raise RowError("tags", f"{words:,} tags, one for each word", f"{len(tags):,} tags: {_short(tags)}")
    return [_tag(tag, names) for tag in tags]


def _tag(tag: Any, names: Sequence[str] | None) -> str:
    if isinstance(tag, float) and tag.is_integer():
        tag = int(tag)
    if isinstance(tag, str) and names is not None and tag.strip().isdecimal() and tag.strip() not in names:
        tag = int(tag)
    if isinstance(tag, int) and not isinstance(tag, bool):
        if names is None:
            raise RowError("tags", "names of tags (what the numbers mean is said by task.tag_names, in their order)", tag)
        if not 0 <= tag < len(names):
            raise RowError("tags", f"a number from 0 to {len(names) - 1}, as task.tag_names has {len(names)} names", tag)
        return names[tag]
    if not isinstance(tag, str) or not tag.strip():
        raise RowError("tags", "a tag for each word", tag)
    return tag.strip()


def clean_spans(value: Any, text: str) -> list[Span]:
    """The entities of a text in their order, {start, end, label} each, without white space at their ends; equal ones once."""
    if isinstance(value, str) and not value.strip():
        value = []
    spans = {_span(span, text) for span in listed("spans", value, "a list of spans such as {start: 0, end: 3, label: PER}; empty: none")}
    ordered = sorted(spans)
    for (start, end, label), (other_start, other_end, other) in itertools.pairwise(ordered):
        if other_start < end:
            both = f"{label} {text[start:end]!r} at {start} to {end} and {other} {text[other_start:other_end]!r} at {other_start} to {other_end}"
            raise RowError("spans", "spans that do not overlap, since a word has one label", both)
    return [{"start": start, "end": end, "label": label} for start, end, label in ordered]


def _span(span: Any, text: str) -> Entity:
    if isinstance(span, Mapping):
        start, end, label = span.get("start"), span.get("end"), next((span[key] for key in _LABEL_KEYS if not missing(span.get(key))), None)
    elif isinstance(span, (list, tuple)) and len(span) == 3:
        start, end, label = span
    else:
        raise RowError("spans", "a span such as {start: 0, end: 3, label: PER}, or [0, 3, PER]", span)
    if not isinstance(label, (str, int)) or isinstance(label, bool) or not str(label).strip():
        raise RowError("spans", "a span with a label", span)
    places = []
    for place in (start, end):
        if isinstance(place, float) and place.is_integer():
            place = int(place)
        if not isinstance(place, int) or isinstance(place, bool):
            raise RowError("spans", "a span with whole numbers start and end, in characters of the text", span)
        places.append(place)
    start, end = places
    if not 0 <= start < end <= len(text):
        raise RowError("spans", f"0 <= start < end <= {len(text)}, the length of the text", span)
    inner = text[start:end]
    if not inner.strip():
        raise RowError("spans", "a span with something in it beside white space", span)
    return start + len(inner) - len(inner.lstrip()), end - len(inner) + len(inner.rstrip()), str(label).strip()


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}…"
