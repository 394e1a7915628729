"""Words of a text as tokens of a model: the token that speaks for each word, and long texts in windows that overlap."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from orchestrator.errors import InputError
from orchestrator.tasks.base import Example
from orchestrator.tasks.words import Place


@dataclass(frozen=True)
class Window:
    """Some tokens of a text as an example, and the words that it answers for."""

    example: Example
    words: list[int]
    """Indices of words. Each word of a text that has a token is in one window: that in which its token has most context."""
    tokens: list[int]
    """For each of these words the place of its token in `example`."""


def windows(texts: Sequence[str], words: Sequence[Sequence[Place]], processor: Any, most: int, overlap: int) -> list[list[Window]]:
    """The windows of each text, of at most `most` tokens (special ones included), `overlap` of them shared by neighbours.

    A word's token is the first that begins in it. Words that share one token, as where a tokenizer has one for several
    characters, all get that. A word that the tokenizer drops, such as a zero-width space, has none.
    """
    if not texts:
        return []
    if not processor.is_fast:
        raise InputError(
            f"model.base: its tokenizer ({type(processor).__name__}) does not say where in the text a token stands; one written in Rust "
            "(`is_fast`) is needed."
        )
    # Neither truncation nor padding: a fast tokenizer keeps such settings inside, where another thread may be encoding.
    encoded = processor(list(texts), padding=False, truncation=False, verbose=False, return_offsets_mapping=True)
    offsets = encoded.pop("offset_mapping")
    found = []
    for place, text in enumerate(texts):
        whole = {key: values[place] for key, values in encoded.items()}
        inner = [index for index, source in enumerate(encoded.sequence_ids(place)) if source is not None]
        tokens = _first_tokens(text, words[place], offsets[place], inner)
        found.append(_windows(whole, inner, tokens, processor, most, overlap))
    return found


def _first_tokens(text: str, words: Sequence[Place], offsets: Sequence[Place], inner: Sequence[int]) -> list[int | None]:
    """For each word the place among `inner` of the first token with a character of it; None where there is none."""
    starts = [start for start, _ in words]
    first: list[int | None] = [None] * len(words)
    for place, index in enumerate(inner):
        start, end = offsets[index]
        while start < end and text[start].isspace():  # some tokenizers count the space before a word to its token
            start += 1
        if start >= end:
            continue
        word = max(bisect.bisect_right(starts, start) - 1, 0)
        while word < len(words) and words[word][0] < end:
            if first[word] is None and words[word][1] > start:
                first[word] = place
            word += 1
    return first


def _windows(whole: Example, inner: Sequence[int], tokens: Sequence[int | None], processor: Any, most: int, overlap: int) -> list[Window]:
    size = len(whole["input_ids"])
    if not size:
        filler = processor.eos_token_id if processor.eos_token_id is not None else processor.pad_token_id
        return [Window({key: [{"input_ids": filler, "attention_mask": 1}.get(key, 0)] for key in whole}, [], [])]
    before = list(range(inner[0])) if inner else list(range(size))
    after = list(range(inner[-1] + 1, size)) if inner else []
    room = most - len(before) - len(after)
    if len(inner) > room and room <= overlap:
        raise InputError(
            f"task.max_length is {most} and task.stride {overlap}: beside {len(before) + len(after)} special tokens, a window must have more tokens than the stride."
        )
    bounds = _bounds(len(inner), room, overlap)
    owned: list[tuple[list[int], list[int]]] = [([], []) for _ in bounds]
    for word, token in enumerate(tokens):
        if token is not None:
            best = _most_context(token, bounds, len(inner))
            owned[best][0].append(word)
            owned[best][1].append(len(before) + token - bounds[best][0])
    made = []
    for (start, end), (words, places) in zip(bounds, owned, strict=True):
        chosen = [*before, *inner[start:end], *after]
        made.append(Window({key: [values[index] for index in chosen] for key, values in whole.items()}, words, places))
    return made


def _bounds(tokens: int, room: int, overlap: int) -> list[Place]:
    """[start, end) of each window; the last ones are as long as the others, since context is better than none."""
    if tokens <= room:
        return [(0, tokens)]
    starts = list(range(0, tokens - room, room - overlap))
    return [(start, start + room) for start in [*starts, tokens - room]]


def _most_context(token: int, bounds: Sequence[Place], tokens: int) -> int:
    """The window in which a token is farthest from a cut; the ends of the text are none."""

    def context(bound: Place) -> int:
        start, end = bound
        return min(token - start if start else tokens, end - 1 - token if end < tokens else tokens)

    last = bisect.bisect_right(bounds, (token, tokens + 1)) - 1
    first = last
    while first and bounds[first - 1][1] > token:
        first -= 1
    return max(range(first, last + 1), key=lambda index: context(bounds[index]))
