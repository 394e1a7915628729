"""Exact match and F1 of answers by the rules of SQuAD's own script, and the threshold for giving none (Rajpurkar et al. 2016, 2018)."""

from __future__ import annotations

import functools
import re
import string
from collections import Counter
from collections.abc import Sequence
from typing import Any

from orchestrator.errors import InputError, did_you_mean
from orchestrator.tasks.base import Prediction, Row

THRESHOLD = "null_score_diff_threshold"
METRICS = ("f1", "exact_match")
PARTS = ("HasAns_f1", "HasAns_exact", "NoAns_f1", "NoAns_exact")
"""Of the questions that have an answer, and of those that have none: which no model but one that may say so gets right."""


@functools.lru_cache(maxsize=1 << 16)
def normalized(text: str) -> str:
    """Lower case, without punctuation, the articles a, an, the, and needless white space."""
    plain = "".join(character for character in text.lower() if character not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", plain).split())


@functools.lru_cache(maxsize=1 << 16)
def match(answer: str, golden: tuple[str, ...]) -> tuple[float, float]:
    """F1 and exact match with the golden answer that is nearest; with none the right answer is the empty text."""
    right = [text for text in golden if normalized(text)] or [""]
    return max(_f1(answer, text) for text in right), max(float(normalized(answer) == normalized(text)) for text in right)


def _f1(answer: str, golden: str) -> float:
    said, right = normalized(answer).split(), normalized(golden).split()
    if not said or not right:
        return float(said == right)
    same = (Counter(said) & Counter(right)).total()
    return 2 * same / (len(said) + len(right))


def score(
    predictions: Sequence[Prediction],
    rows: Sequence[Row],
    metrics: Sequence[str] | None,
    *,
    abstains: bool,
    threshold: float | None,
) -> dict[str, float]:
    """The chosen metrics that have a value here; `InputError` for one that there is not.

    `abstains`: the model may give no answer. Without a `threshold` for that the one is taken with which F1 is best on these
    rows (as `best_f1` of SQuAD's script), and it is among the scores.
    """
    if unknown := [name for name in metrics or () if name not in (*METRICS, *PARTS, THRESHOLD)]:
        raise InputError(f"evaluation.metrics: {unknown[0]!r} is no metric of this task.{did_you_mean(unknown[0], (*METRICS, *PARTS))}")
    if not rows:
        return {}
    tuned = abstains and threshold is None
    limit = best_threshold(predictions, rows) if tuned else threshold
    lines = details(predictions, rows, limit if abstains else None)
    values: dict[str, float] = {"f1": _mean(lines, "f1"), "exact_match": _mean(lines, "exact_match")}
    parts = {"HasAns": [line for line in lines if line["answerable"]], "NoAns": [line for line in lines if not line["answerable"]]}
    for name, some in parts.items():
        if some:
            values |= {f"{name}_f1": _mean(some, "f1"), f"{name}_exact": _mean(some, "exact_match")}
    if tuned and limit is not None:
        values[THRESHOLD] = limit
    both = all(parts.values())
    wanted = [name for name in values if both or name not in PARTS] if metrics is None else metrics
    return {name: values[name] for name in wanted if name in values}


def details(predictions: Sequence[Prediction], rows: Sequence[Row], threshold: float | None) -> list[dict[str, Any]]:
    """For each row: whether it has an answer, whether it was given one, F1 and exact match."""
    lines = []
    for prediction, row in zip(predictions, rows, strict=True):
        golden = tuple(row["answers"]["text"])
        answer = decided(prediction, threshold)
        f1, exact = match(answer, golden)
        lines.append({"answerable": bool(golden), "answered": bool(answer), "f1": f1, "exact_match": exact})
    return lines


def decided(prediction: Prediction, threshold: float | None) -> str:
    """The answer of a prediction at a threshold; None: the best span, whatever the score of having none."""
    answers = prediction["answers"]
    abstains = not answers or (threshold is not None and prediction["null_score_diff"] > threshold)
    return "" if abstains else answers[0]["answer"]


def best_threshold(predictions: Sequence[Prediction], rows: Sequence[Row]) -> float:
    """The `null_score_diff` above which giving no answer makes F1 best on these rows; 0 where they are all of one kind.

    It lies in the middle between two rows. Of thresholds that are equally good it is the one nearest to 0.
    """
    import numpy as np

    golden = [tuple(row["answers"]["text"]) for row in rows]
    if all(golden) or not any(golden):
        return 0.0
    order = np.argsort([prediction["null_score_diff"] for prediction in predictions], kind="stable")
    places = np.asarray([predictions[place]["null_score_diff"] for place in order])
    answered = np.asarray([match(decided(predictions[place], None), golden[place])[0] for place in order])
    silent = np.asarray([float(not golden[place]) for place in order])
    # totals[k]: of the k rows that are surest of an answer answered, and none of the others.
    totals = np.concatenate([[0.0], np.cumsum(answered)]) + np.concatenate([np.cumsum(silent[::-1])[::-1], [0.0]])
    between = np.concatenate([[places[0] - 1], (places[:-1] + places[1:]) / 2, [places[-1] + 1]])
    possible = np.concatenate([[True], places[:-1] < places[1:], [True]])
    good = between[possible & (totals >= totals[possible].max() - 1e-9)]
    return float(good[np.argmin(np.abs(good))])


def table(lines: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Questions with and without an answer: how many, how many got one, and their scores."""
    found = []
    for name, answerable in (("has an answer", True), ("has no answer", False)):
        some = [line for line in lines if line["answerable"] == answerable]
        if some:
            counts = {"question": name, "rows": len(some), "answered": sum(line["answered"] for line in some)}
            found.append({**counts, "f1": _mean(some, "f1"), "exact_match": _mean(some, "exact_match")})
    return found


def _mean(lines: Sequence[dict[str, Any]], name: str) -> float:
    return sum(line[name] for line in lines) / len(lines)
