"""How sure a score is, and whether one model is better than another on the same rows: the bootstrap (Efron, 1979).

The rows of a split are drawn again with replacement, as many as there are, and scored each time; the middle 95 % of these
scores is the interval. Two models are compared on the same draws, so what is easy or hard about the rows cancels out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from orchestrator.evaluation import read_predictions
from orchestrator.records import Comparison
from orchestrator.tasks.base import Prediction, Row, Task

RESAMPLES = 1000
SEED = 42
LEVEL = 95.0
"""Per cent of the resampled scores that lie in an interval."""


def compare(
    task: Task,
    metric: str,
    split: str,
    predictions: str,
    default: str | None = None,
    *,
    resamples: int = RESAMPLES,
    seed: int = SEED,
    on_resample: Callable[[int, int], None] | None = None,
) -> Comparison:
    """The score of a file of predictions with its interval and, where `default` is another model's predictions of the same rows,
    the difference with its own.

    `on_resample` is told how many resamples of how many are done. Resamples in which the metric has no value are left out.
    """
    import numpy as np

    sides = [_side(predictions)]
    if default is not None:
        sides.append(_aligned(_side(default), sides[0]))
    rows = sides[0][1]
    whole = [task.score(answers, its_rows, [metric])[metric] for answers, its_rows, _ in sides]
    rng = np.random.default_rng(seed)
    drawn: list[list[float]] = []
    for done in range(1, resamples + 1):
        places = rng.integers(0, len(rows), len(rows)).tolist()
        scores = [_score(task, metric, side, places) for side in sides]
        if None not in scores:
            drawn.append(scores)  # pyright: ignore[reportArgumentType]
        if on_resample is not None:
            on_resample(done, resamples)
    low, high = _interval([scores[0] for scores in drawn])
    found: dict[str, Any] = {"metric": metric, "split": split, "rows": len(rows), "score": whole[0], "low": low, "high": high}
    if default is not None:
        below, above = _interval([scores[0] - scores[1] for scores in drawn])
        found |= {"default": whole[1], "difference": whole[0] - whole[1], "difference_low": below, "difference_high": above}
    return Comparison(**found)


Side = tuple[list[Prediction], list[Row], list[str]]
"""Predictions, rows and their ids."""


def _side(uri: str) -> Side:
    entries = read_predictions(uri)
    return [entry["prediction"] for entry in entries], [entry["row"] for entry in entries], [entry["row_id"] for entry in entries]


def _aligned(side: Side, to: Side) -> Side:
    """The same rows in the other side's order."""
    places = {row_id: place for place, row_id in enumerate(side[2])}
    order = [places[row_id] for row_id in to[2]]
    return [side[0][place] for place in order], [side[1][place] for place in order], to[2]


def _score(task: Task, metric: str, side: Side, places: Sequence[int]) -> float | None:
    return task.score([side[0][place] for place in places], [side[1][place] for place in places], [metric]).get(metric)


def _interval(values: Sequence[float]) -> tuple[float, float]:
    import numpy as np

    if not values:
        return float("nan"), float("nan")
    low, high = np.percentile(np.asarray(values), [(100 - LEVEL) / 2, (100 + LEVEL) / 2])
    return float(low), float(high)
