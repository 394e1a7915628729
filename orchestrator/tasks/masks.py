"""Texts as a masked language model reads them: cut into windows, with some tokens hidden (Devlin et al. 2019, arXiv 1810.04805)."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any

from orchestrator.errors import InputError
from orchestrator.tasks.base import Example

NOT_KNOWN = -100
"""The label of a token that the text itself hides."""


def windows(encoded: Any, place: int, processor: Any, limit: int) -> Iterator[tuple[list[int], list[int]]]:
    """The text at `place`, tokenized without truncation, in parts of about equal length, at most `limit` tokens with special ones.

    For each part the positions of its tokens in `encoded`, special ones around them, and the places of the text's own in it.
    """
    sources = encoded.sequence_ids(place)
    content = [position for position, source in enumerate(sources) if source is not None]
    first, last = (content[0], content[-1] + 1) if content else (len(sources), len(sources))
    head, tail = list(range(first)), list(range(last, len(sources)))
    room = limit - len(head) - len(tail)
    if room < 1:
        raise InputError(f"task.max_length is {limit}, which leaves no room for text beside {len(head) + len(tail)} special tokens.")
    parts = max(1, -(-len(content) // room))
    for part in range(parts):
        own = content[len(content) * part // parts : len(content) * (part + 1) // parts]
        yield [*head, *own, *tail], list(range(len(head), len(head) + len(own)))


def hide(example: Example, units: Sequence[Sequence[int]], share: float, processor: Any, rng: random.Random) -> None:
    """Hides `share` of the tokens, whole units at a time: their `positions` and what stood there, `labels`.

    Of those chosen 8 in 10 become the mask token, 1 in 10 another token, and 1 in 10 stays. At least one is chosen where
    there is any.
    """
    budget = max(1, round(share * sum(map(len, units))))
    chosen: list[int] = []
    for unit in rng.sample(list(units), len(units)):
        if not chosen or len(chosen) + len(unit) <= budget:
            chosen += unit
        if len(chosen) >= budget:
            break
    ids, special = example["input_ids"], set(processor.all_special_ids)
    example["positions"] = sorted(chosen)
    example["labels"] = [ids[position] for position in example["positions"]]
    for position in example["positions"]:
        fate = rng.random()
        if fate < 0.8:
            ids[position] = processor.mask_token_id
        elif fate < 0.9:
            ids[position] = _other(processor, special, rng)


def _other(processor: Any, special: set[int], rng: random.Random) -> int:
    while (token := rng.randrange(len(processor))) in special:
        pass
    return token


def units(words: Sequence[int | None], places: Sequence[int], *, whole_words: bool) -> list[list[int]]:
    """The places in groups that are hidden together: each alone, or all tokens of a word."""
    if not whole_words:
        return [[place] for place in places]
    groups: dict[Any, list[int]] = {}
    for place, word in zip(places, words, strict=True):
        groups.setdefault((None, place) if word is None else word, []).append(place)
    return list(groups.values())


def target_ids(targets: Sequence[str], processor: Any) -> list[int]:
    """The token of each text that a client asks for: itself, or the first one of it, as transformers' pipeline has it."""
    found = []
    for target, token in zip(targets, processor.convert_tokens_to_ids(list(targets)), strict=True):
        if token is None or (token == processor.unk_token_id and target != processor.unk_token):
            ids = processor(target, add_special_tokens=False, padding=False, truncation=False, verbose=False)["input_ids"]
            if not ids:
                raise InputError(f"parameters.targets: {target!r} has no token of the model.")
            token = ids[0]
        found.append(token)
    return list(dict.fromkeys(found))
