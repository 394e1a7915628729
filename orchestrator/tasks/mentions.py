"""Mentions of entities in a text: where they stand, which pairs of them are asked about, and how a pair is shown to a model.

A mention is `{"start", "end", "type"}`: characters of the text (Python's, so code points) from `start` to before `end`,
and the entity's type, empty where it has none.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from orchestrator.errors import InputError
from orchestrator.tasks import texts
from orchestrator.tasks.base import Example, RowError
from orchestrator.tasks.labels import missing

Mention = dict[str, Any]
Pair = tuple[Mention, Mention]

_MARK = re.compile(r"</?e[12]>")
_MARKS = ("<e1>", "</e1>", "<e2>", "</e2>")
_TYPE_KEYS = ("type", "entity_group", "label")
"""What a mention's type is called here, by transformers' pipelines, and by spaCy."""


def clean_mention(column: str, value: Any, text: str) -> Mention:
    """A mention as it stands in a cell, `{start, end}` with or without a type, or `RowError` where it is not in the text.

    Where it says its own `text`, that must be what stands there: offsets counted in bytes or UTF-16 are found by it.
    """
    value = parsed(column, value)
    if not isinstance(value, Mapping):
        raise RowError(column, "a mention such as {start: 0, end: 7}, in characters of the text", value)
    start, end = (_place(column, value.get(key), value) for key in ("start", "end"))
    if not 0 <= start < end <= len(text):
        raise RowError(column, f"0 <= start < end <= {len(text)}, the characters of the text", {"start": start, "end": end})
    found = text[start:end]
    if not found.strip():
        raise RowError(column, "a mention that is not only space", {"start": start, "end": end})
    said = value.get("text")
    if isinstance(said, str) and said != found:
        raise RowError(column, f"{said!r} at {start} to {end} (offsets count characters, not bytes)", found)
    kind = next((value[key] for key in _TYPE_KEYS if not missing(value.get(key))), "")
    if not isinstance(kind, str):
        raise RowError(column, "a mention whose type is a text", kind)
    return {"start": start, "end": end, "type": kind.strip()}


def clean_mentions(column: str, value: Any, text: str) -> list[Mention]:
    """The mentions in a cell, in their order, each once."""
    value = parsed(column, value)
    if not isinstance(value, (list, tuple)):
        raise RowError(column, "a list of mentions such as [{start: 0, end: 7}, …]", value)
    mentions = [clean_mention(column, one, text) for one in value]
    seen: set[tuple[int, int]] = set()
    for one in mentions:
        if (place := (one["start"], one["end"])) in seen:
            raise RowError(column, "each mention once", {"start": place[0], "end": place[1]})
        seen.add(place)
    return mentions


def clean_pairs(column: str, value: Any, mentions: int) -> list[list[int]]:
    """Pairs of places in the list of mentions, head first, each once."""
    value = parsed(column, value)
    if not isinstance(value, (list, tuple)):
        raise RowError(column, "a list of pairs such as [[0, 1]], head first", value)
    return [list(pair) for pair in dict.fromkeys(clean_pair(column, one, mentions) for one in value)]


def clean_pair(column: str, value: Any, mentions: int) -> tuple[int, int]:
    """Two different places in the list of mentions: `[head, tail]` or `{head, tail}`."""
    ends = (value.get("head"), value.get("tail")) if isinstance(value, Mapping) else value
    if not isinstance(ends, (list, tuple)) or len(ends) != 2:
        raise RowError(column, "a pair of places in the list of entities, head first", value)
    head, tail = (_place(column, end, value) for end in ends)
    if not (0 <= head < mentions and 0 <= tail < mentions):
        raise RowError(column, f"places from 0 to {mentions - 1}, of the {mentions} entities", value)
    if head == tail:
        raise RowError(column, "a head and a tail that differ", value)
    return head, tail


def unmarked(column: str, text: str) -> tuple[str, list[Mention]]:
    """The text without `<e1>…</e1>` and `<e2>…</e2>` (as in SemEval-2010 Task 8), and the mentions that they stood around."""
    marks = list(_MARK.finditer(text))
    if sorted(mark[0] for mark in marks) != sorted(_MARKS):
        raise RowError(column, "one <e1>…</e1> and one <e2>…</e2>", text)
    places = {mark[0]: mark.start() - sum(len(before[0]) for before in marks[:number]) for number, mark in enumerate(marks)}
    plain = _MARK.sub("", text)
    spans = [{"start": places[opening], "end": places[closing]} for opening, closing in (_MARKS[:2], _MARKS[2:])]
    return plain, [clean_mention(column, span, plain) for span in spans]


def has_marks(text: str) -> bool:
    return _MARK.search(text) is not None


def all_pairs(mentions: int) -> list[list[int]]:
    """Every ordered pair of places."""
    return [list(pair) for pair in itertools.permutations(range(mentions), 2)]


def marked(text: str, pair: Pair) -> tuple[str, list[tuple[int, int]]]:
    """The text with the head as `@ * type * head @` and the tail as `# ^ type ^ tail #`, and where both stand in it.

    Typed entity markers of punctuation (Zhou & Chen 2021, arXiv 2102.01373): every tokenizer knows them, so no token is
    added and any model will do, also under adapters. Mentions may lie in one another.
    """
    insertions = []
    for which, (mention, sign, around) in enumerate(zip(pair, "@#", "*^", strict=True)):
        kind = f"{around} {mention['type']} {around} " if mention["type"] else ""
        # At one place what ends goes before what begins, the inner mention ends first and the outer one begins first.
        insertions.append((mention["start"], 1, -mention["end"], which, f"{sign} {kind}"))
        insertions.append((mention["end"], 0, -mention["start"], which, f" {sign}"))
    pieces: list[str] = []
    begins, ends = [0, 0], [0, 0]
    length = last = 0
    for place, opens, _, which, sign in sorted(insertions):
        pieces += [text[last:place], sign]
        length += place - last
        last = place
        if opens:
            begins[which] = length
        length += len(sign)
        if not opens:
            ends[which] = length
    return "".join([*pieces, text[last:]]), list(zip(begins, ends, strict=True))


def encode(marked_texts: Sequence[tuple[str, list[tuple[int, int]]]], processor: Any, most: int) -> list[Example]:
    """The tokens of texts out of `marked`; of one longer than `most` those of both mentions and what is nearest to them."""
    if not marked_texts:
        return []
    plain = [text for text, _ in marked_texts]
    if not processor.is_fast:
        return texts.encode(plain, [None] * len(plain), processor, most)
    encoded = processor(plain, padding=False, truncation=False, verbose=False, return_offsets_mapping=True)
    offsets = encoded.pop("offset_mapping")
    examples: list[Example] = []
    for place, (_, spans) in enumerate(marked_texts):
        example = {key: values[place] for key, values in encoded.items()}
        length = len(example["input_ids"])
        if length > most:
            kept = _kept(encoded.sequence_ids(place), offsets[place], spans, most)
            example = {key: [values[position] for position in kept] for key, values in example.items()}
        examples.append({**example, "truncated": length > most})
    return examples


def _kept(sources: Sequence[int | None], offsets: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]], most: int) -> list[int]:
    import numpy as np

    tokens = np.array([position for position, source in enumerate(sources) if source is not None])
    special = len(sources) - len(tokens)
    room = most - special
    if room < 2:
        raise InputError(f"task.max_length is {most}, which leaves no room for two mentions beside {special} special tokens.")
    begins, ends = np.array(offsets)[tokens].T
    inside = [np.flatnonzero((begins < end) & (ends > start))[: room // 2] for start, end in spans]
    distance = np.min([np.abs(np.arange(len(tokens)) - place) for places in inside for place in places], axis=0)
    chosen = set(tokens[np.argsort(distance, kind="stable")[:room]].tolist())
    return [position for position, source in enumerate(sources) if source is None or position in chosen]


def parsed(column: str, value: Any) -> Any:
    """What JSON text says (lists and objects in a CSV file); other values as they are."""
    if not isinstance(value, str) or not value.lstrip().startswith(("[", "{")):
        return value
    try:
        return json.loads(value)
    except ValueError:
        raise RowError(column, "JSON", value) from None


def _place(column: str, value: Any, whole: Any) -> int:
    if isinstance(value, str) and value.strip().isdecimal():
        value = int(value)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise RowError(column, "whole numbers", whole)
    return value
