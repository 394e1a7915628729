"""Scores and tables of classifiers: predictions and rows as arrays, then the metric modules."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from orchestrator import metrics as modules
from orchestrator.errors import InputError, did_you_mean
from orchestrator.tasks.base import Prediction, Row

_OTHERS = ("precision_micro", "recall_micro", "precision_weighted", "recall_weighted", "f1_weighted")
DEFAULTS: dict[str, tuple[str, ...]] = {
    "single-label": ("accuracy", "f1_macro", "f1_micro", "precision_macro", "recall_macro", "roc_auc", "mcc"),
    "multi-label": (
        "f1_micro",
        "f1_macro",
        "precision_micro",
        "recall_micro",
        "precision_macro",
        "recall_macro",
        "accuracy",
        "roc_auc",
        "mcc",
    ),
    "regression": ("pearson", "spearman", "mse", "mae", "r2"),
}
"""The metrics reported where the job names none; the first one is the objective."""


def known(problem: str, names: Sequence[str]) -> tuple[str, ...]:
    """Every metric of the shipped modules, the default ones first."""
    if problem == "regression":
        return DEFAULTS[problem]
    others = tuple(name for name in _OTHERS if name not in DEFAULTS[problem])
    return DEFAULTS[problem] + others + tuple(f"{kind}/{name}" for kind in ("f1", "precision", "recall") for name in names)


def score(
    problem: str, names: Sequence[str], predictions: Sequence[Prediction], rows: Sequence[Row], metrics: Sequence[str] | None
) -> dict[str, float]:
    """The chosen metrics that have a value here; `InputError` for one that there is not."""
    if not rows:
        return {}
    arrays = _arrays(problem, names, predictions, rows)
    wanted = DEFAULTS[problem] if metrics is None else metrics
    if problem == "regression":
        values = modules.compute("regression", **arrays)
    else:
        values = modules.compute("classification", problem, **arrays, labels=list(names), wanted=wanted)
    every = known(problem, names)
    result: dict[str, float] = {}
    for name in wanted:
        if name in every:
            result.update({name: values[name]} if name in values else {})
        else:
            result.update(_other(name, arrays, every))
    return result


def tables(problem: str, names: Sequence[str], predictions: Sequence[Prediction], rows: Sequence[Row]) -> dict[str, list[dict[str, Any]]]:
    """`per_class`, and `confusion_matrix` (a row for each right label, a column for each predicted one) for one label a row."""
    if not rows:
        return {}
    arrays = _arrays(problem, names, predictions, rows)
    values = modules.compute("classification", problem, **arrays, labels=list(names))
    right, given = arrays["references"], arrays["predictions"]
    several = problem == "multi-label"
    per_class = [
        {
            "label": name,
            "precision": values[f"precision/{name}"],
            "recall": values[f"recall/{name}"],
            "f1": values[f"f1/{name}"],
            "rows": int(right[:, place].sum() if several else (right == place).sum()),
            "predicted": int(given[:, place].sum() if several else (given == place).sum()),
        }
        for place, name in enumerate(names)
    ]
    if several:
        return {"per_class": per_class}
    from sklearn.metrics import confusion_matrix

    counts = confusion_matrix(right, given, labels=range(len(names)))
    matrix = [
        {"label": name, **{f"predicted {other}": int(count) for other, count in zip(names, line, strict=True)}}
        for name, line in zip(names, counts, strict=True)
    ]
    return {"per_class": per_class, "confusion_matrix": matrix}


def applied(function: str, logits: Any) -> list[float]:
    """Scores from a model's raw numbers: softmax, sigmoid, or none for the numbers themselves."""
    import numpy as np

    values: np.ndarray = np.asarray(logits, dtype=np.float64)
    if function == "softmax":
        powers = np.exp(values - values.max())
        values = powers / powers.sum()
    elif function == "sigmoid":
        values = np.where(values >= 0, 1 / (1 + np.exp(-np.abs(values))), np.exp(-np.abs(values)) / (1 + np.exp(-np.abs(values))))
    return [float(value) for value in values]


def _arrays(problem: str, names: Sequence[str], predictions: Sequence[Prediction], rows: Sequence[Row]) -> dict[str, Any]:
    import numpy as np

    pairs = zip(predictions, rows, strict=True)
    if problem == "regression":
        said, right = zip(*((prediction["value"], row["label"]) for prediction, row in pairs), strict=True)
        return {"predictions": np.asarray(said, dtype=np.float64), "references": np.asarray(right, dtype=np.float64)}
    places = {name: place for place, name in enumerate(names)}
    count = len(rows)
    scores = np.empty((count, len(names)))
    shape = (count, len(names)) if problem == "multi-label" else (count,)
    given, right = np.zeros(shape, dtype=np.int32), np.zeros(shape, dtype=np.int32)
    for index, (prediction, row) in enumerate(pairs):
        scores[index] = [prediction["scores"][name] for name in names]
        if problem == "multi-label":
            given[index, [places[name] for name in prediction["labels"]]] = 1
            right[index, [places[name] for name in row["label"]]] = 1
        else:
            given[index], right[index] = places[prediction["label"]], places[row["label"]]
    return {"predictions": given, "prediction_scores": scores, "references": right}


def _other(name: str, arrays: dict[str, Any], known: Sequence[str]) -> dict[str, float]:
    """A metric module from the hub or a path, given label indices (or numbers); its numbers, by its name."""
    try:
        module = modules.load(name)
    except InputError as error:
        raise InputError(f"evaluation.metrics: {name!r} is no metric of this task.{did_you_mean(name, known)} {error}") from None
    try:
        values = module.compute(predictions=arrays["predictions"].tolist(), references=arrays["references"].tolist())
    except (TypeError, ValueError) as error:
        raise InputError(f"evaluation.metrics: {name!r} can't score this task: {' '.join(str(error).split())[:300]}") from None
    numbers = {key: float(value) for key, value in values.items() if isinstance(value, (int, float))}
    return {name if len(numbers) == 1 else f"{name}_{key}": value for key, value in numbers.items()}
