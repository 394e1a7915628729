"""Scores and tables of relation extraction: over pairs, where "no relation" is an answer but nothing that is found."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from orchestrator import metrics as modules
from orchestrator.errors import InputError, did_you_mean

DEFAULTS = ("f1", "precision", "recall", "f1_macro", "accuracy")
"""Micro-averaged over the relations without "no relation", as TACRED is scored; `accuracy` is of pairs, with it."""
_NAMES = {"f1": "f1_micro", "precision": "precision_micro", "recall": "recall_micro"}
"""What the classification module calls them."""


def known(relations: Sequence[str]) -> tuple[str, ...]:
    """Every metric, the default ones first."""
    return (*DEFAULTS, *(f"{kind}/{name}" for kind in ("f1", "precision", "recall") for name in relations))


def score(
    relations: Sequence[str], said: Sequence[Sequence[str]], right: Sequence[Sequence[str]], metrics: Sequence[str] | None
) -> dict[str, float]:
    """The chosen metrics over pairs: the relations that were `said` of each, and those that are `right`."""
    wanted = DEFAULTS if metrics is None else metrics
    every = known(relations)
    if unknown := [name for name in wanted if name not in every]:
        raise InputError(f"evaluation.metrics: {unknown[0]!r} is no metric of this task.{did_you_mean(unknown[0], every)}")
    if not right:
        return {}
    values = _compute(relations, said, right)
    return {name: values[_NAMES.get(name, name)] for name in wanted}


def per_relation(relations: Sequence[str], said: Sequence[Sequence[str]], right: Sequence[Sequence[str]]) -> list[dict[str, Any]]:
    """A line for each relation: its scores, in how many pairs it stands and in how many it was said to."""
    values = _compute(relations, said, right)
    return [
        {
            "relation": name,
            **{kind: values[f"{kind}/{name}"] for kind in ("precision", "recall", "f1")},
            "pairs": sum(name in names for names in right),
            "predicted": sum(name in names for names in said),
        }
        for name in relations
    ]


def _compute(relations: Sequence[str], said: Sequence[Sequence[str]], right: Sequence[Sequence[str]]) -> dict[str, float]:
    import numpy as np

    places = {name: place for place, name in enumerate(relations)}
    arrays = []
    for named in (said, right):
        array = np.zeros((len(named), len(relations)), dtype=np.int8)
        for pair, names in enumerate(named):
            array[pair, [places[name] for name in names]] = 1
        arrays.append(array)
    given, true = arrays
    wanted = [_NAMES.get(name, name) for name in DEFAULTS]
    return modules.compute(
        "classification",
        "multi-label",
        predictions=given,
        prediction_scores=given,
        references=true,
        labels=list(relations),
        wanted=wanted,
    )
