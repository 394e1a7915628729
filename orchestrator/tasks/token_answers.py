"""Answers of token classification as Hugging Face clients expect them, and how far two of them are apart."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from orchestrator.tasks import tags as tag_rules
from orchestrator.tasks.base import Parameters, Prediction
from orchestrator.tasks.tags import OUTSIDE

Word = dict[str, Any]
"""label, score, word, start, end."""


class TokenClassificationParameters(Parameters):
    """`parameters` of a Hugging Face token-classification request."""

    aggregation_strategy: Literal["none", "simple", "first", "average", "max"] = "simple"
    """none: each word with its tag. The others say the same here: words grouped to entities. A word is asked once, at its first token."""
    ignore_labels: list[str] | None = None
    """Labels that are not answered; None: O, where entities are looked for."""
    stride: Annotated[int, Field(ge=0)] | None = None
    """Taken, for clients that send it, and of no effect: a long text is always read in windows that overlap as in training."""


_ENTRY = {
    "type": "object",
    "properties": {
        "entity_group": {"type": "string"},
        "entity": {"type": "string"},
        "index": {"type": "integer"},
        "score": {"type": "number"},
        "word": {"type": "string"},
        "start": {"type": "integer"},
        "end": {"type": "integer"},
    },
    "required": ["score", "word", "start", "end"],
    "additionalProperties": False,
}
_ENTRIES = {"type": "array", "items": _ENTRY}
SCHEMA: dict[str, Any] = {"anyOf": [_ENTRIES, {"type": "array", "items": _ENTRIES}]}


def groups(text: str, words: Sequence[Word], *, outside: bool) -> list[Word]:
    """Words in the scheme BIO as entities, whose score is the mean of their words' scores; with `outside` also what lies between them."""
    found, _ = tag_rules.entities([word["label"] for word in words], "BIO")
    if outside:
        ends = [0, *(place for first, last, _ in found for place in (first, last)), len(words)]
        between = [(first, last, OUTSIDE) for first, last in zip(ends[::2], ends[1::2], strict=True) if first < last]
        found = sorted([*found, *between])
    made = []
    for first, last, label in found:
        start, end = words[first]["start"], words[last - 1]["end"]
        score = sum(word["score"] for word in words[first:last]) / (last - first)
        made.append({"label": label, "score": score, "word": text[start:end], "start": start, "end": end})
    return made


def answer(prediction: Prediction, parameters: Any, *, grouped: bool) -> list[Word]:
    """What a request is answered for one text; `grouped`: the labels are those of entities, else of words."""
    ignored = parameters.ignore_labels if parameters.ignore_labels is not None else [OUTSIDE] * grouped
    if parameters.aggregation_strategy == "none":
        return [
            {"entity": word["label"], "index": index, **_without_label(word)}
            for index, word in enumerate(prediction["words"], 1)
            if word["label"] not in ignored
        ]
    if not grouped:
        found = prediction["words"]
    elif OUTSIDE in ignored:
        found = prediction["entities"]
    else:
        found = groups(prediction["text"], prediction["words"], outside=True)
    return [{"entity_group": group["label"], **_without_label(group)} for group in found if group["label"] not in ignored]


def _without_label(word: Word) -> Word:
    return {key: value for key, value in word.items() if key != "label"}


def difference(one: Sequence[Mapping[str, Any]], other: Sequence[Mapping[str, Any]], label: str = "label") -> float:
    """The largest difference of a score; where labels differ, the least by which scores must differ for it. inf: of other words."""
    if [(word["start"], word["end"]) for word in one] != [(word["start"], word["end"]) for word in other]:
        return math.inf
    largest = 0.0
    for word, same in zip(one, other, strict=True):
        apart = abs(word["score"] - same["score"])
        if word[label] != same[label]:
            # Each side gives the other's label at most what its own does not have, and at most as much as its own.
            apart = max(apart, word["score"] + same["score"] - 1)
        largest = max(largest, apart)
    return largest


def answer_difference(one: Any, other: Any) -> float:
    """Of two answers to one request, each for one text or for a list of them."""
    if len(one) != len(other):
        return math.inf
    if one and isinstance(one[0], list):
        return max(answer_difference(*pair) for pair in zip(one, other, strict=True))
    if one and "entity" in one[0]:
        return difference(one, other, "entity")
    same = [group["entity_group"] for group in one] == [group["entity_group"] for group in other]
    return difference(one, other, "entity_group") if same else math.inf
