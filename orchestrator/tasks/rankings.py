"""The likeliest of many, best first and cut at some length: as an answer, and how far two of them are apart."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

SCORED_LABELS: dict[str, Any] = {
    "type": "array",
    "items": {
        "type": "object",
        "properties": {"label": {"type": "string"}, "score": {"type": "number"}},
        "required": ["label", "score"],
        "additionalProperties": False,
    },
    "minItems": 1,
}
"""JSON Schema of what `scored_labels` returns."""


def scored_labels(scores: Mapping[str, float], most: int | None) -> list[dict[str, Any]]:
    """`[{label, score}, …]` as Hugging Face clients read it, of at most `most` labels (None: all)."""
    ranked = sorted(scores.items(), key=lambda item: -item[1])[:most]
    return [{"label": name, "score": score} for name, score in ranked]


def labels_difference(one: Sequence[Any], other: Sequence[Any]) -> float:
    """`difference` of two answers of scored labels, or of two lists of such answers; inf where these are not as many."""
    if isinstance(one[0], list) or isinstance(other[0], list):
        if len(one) != len(other):
            return math.inf
        return max(labels_difference(*pair) for pair in zip(one, other, strict=True))
    return difference(*({entry["label"]: entry["score"] for entry in answer} for answer in (one, other)))


def difference(one: Mapping[Hashable, float], other: Mapping[Hashable, float]) -> float:
    """The largest difference of a probability; what one list lacks is at most as likely there as the last that it has.

    So two lists whose ends changed places are not far apart.
    """
    most = 0.0
    for here, there in ((one, other), (other, one)):
        least = min(there.values(), default=0.0)
        for name, score in here.items():
            most = max(most, abs(score - there[name]) if name in there else max(0.0, score - least))
    return most
