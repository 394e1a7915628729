"""Triples as answers: what they are made of, and how far two answers are apart."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

LEAST = 0.01
"""Scores below it are left out of a prediction: of many pairs times many relations nearly all are."""
_SOME = 1e-9
_DIRECTED = re.compile(r"(.+)\((e1,e2|e2,e1)\)")
"""A label that says which mention comes first in the relation, as in SemEval-2010 Task 8."""

Triple = dict[str, Any]
Key = tuple[tuple[Any, ...], str]


def made(pair: Mapping[str, Any], label: str, score: float) -> Triple:
    """The triple that a label says of a pair (`head`, `tail`, their places and types); `Cause-Effect(e2,e1)` turns it round."""
    directed = _DIRECTED.fullmatch(label)
    if directed and directed[2] == "e2,e1":
        turned = {"head": "tail", "tail": "head"}
        pair = {turned[key[:4]] + key[4:]: value for key, value in pair.items()}
    rest = {key: value for key, value in pair.items() if key not in ("head", "tail")}
    return {"head": pair["head"], "relation": directed[1] if directed else label, "tail": pair["tail"], "score": score, **rest}


def which(pair: Mapping[str, Any]) -> tuple[Any, ...]:
    """What tells a pair from others of its row."""
    return tuple(pair.get(key) for key in ("head", "tail", "head_start", "head_end", "tail_start", "tail_end"))


def scores_apart(one: Mapping[str, float], other: Mapping[str, float]) -> float:
    """The largest difference of two pairs' scores; one that stands on one side only was at most `LEAST` on the other."""
    both = [abs(one[name] - other[name]) for name in one.keys() & other.keys()]
    alone = [max(0.0, {**one, **other}[name] - LEAST) for name in one.keys() ^ other.keys()]
    return max([*both, *alone], default=0.0)


def apart_by_threshold(one: Sequence[Triple], other: Sequence[Triple], threshold: float) -> float:
    """The smallest difference of scores that explains two answers in which a triple stands from `threshold` on."""
    return _apart(one, other, lambda key, score, there: score - threshold)


def apart_by_rank(one: Sequence[Triple], other: Sequence[Triple], *, always: bool) -> float:
    """As `apart_by_threshold`, where the likeliest relation of a pair is answered, and nothing where that is "no relation" unless `always`."""

    def least(key: Key, score: float, there: Mapping[Key, float]) -> float:
        # What won there has `rival`, so this relation had no more than that, and no more than the rest.
        won = [value for (pair, _), value in there.items() if pair == key[0]]
        rival = won[0] if won else -math.inf if always else 0.5
        return score - min(rival, 1 - rival)

    return _apart(one, other, least)


def _apart(one: Sequence[Triple], other: Sequence[Triple], least: Callable[[Key, float, Mapping[Key, float]], float]) -> float:
    first, second = ({(which(triple), triple["relation"]): triple["score"] for triple in answer} for answer in (one, other))
    largest = 0.0
    for here, there in ((first, second), (second, first)):
        for key, score in here.items():
            largest = max(largest, abs(score - there[key]) if key in there else max(least(key, score, there), _SOME))
    return largest


def schema(*, places: bool) -> dict[str, Any]:
    """JSON Schema of a triple, with the places of its ends in a text or without."""
    text, place = {"type": "string"}, {"type": "integer", "minimum": 0}
    ends = (
        {f"{end}_{key}": text if key == "type" else place for end in ("head", "tail") for key in ("start", "end", "type")} if places else {}
    )
    properties = {"head": text, "relation": text, "tail": text, "score": {"type": "number"}, **ends}
    required = [name for name in properties if not name.endswith("_type")]
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}
