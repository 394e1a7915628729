"""Scores and tables of token classification, from predictions and rows that may be streams of any length."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from orchestrator import metrics as modules
from orchestrator.errors import InputError, did_you_mean
from orchestrator.tasks import tags as tag_rules
from orchestrator.tasks.base import Prediction, Row
from orchestrator.tasks.tags import Span
from orchestrator.tasks.words import Place

DEFAULTS: dict[str, tuple[str, ...]] = {
    "entities": ("f1", "precision", "recall", "accuracy"),
    "words": ("accuracy", "f1_macro"),
}
"""The metrics reported where the job names none; the first one is the objective."""
_OTHERS: dict[str, tuple[str, ...]] = {
    "entities": ("f1_macro", "f1_weighted"),
    "words": ("f1_weighted", "precision_macro", "recall_macro"),
}
_KINDS = ("f1", "precision", "recall")


def known(problem: str, names: Sequence[str]) -> tuple[str, ...]:
    """Every metric that there is, the default ones first."""
    return DEFAULTS[problem] + _OTHERS[problem] + tuple(f"{kind}/{name}" for kind in _KINDS for name in names)


def score_entities(
    predictions: Iterable[Prediction],
    rows: Iterable[Row],
    right: Callable[[Row], list[Span]],
    tags: Callable[[Row, Sequence[Place]], list[str]],
    names: Sequence[str],
    metrics: Sequence[str] | None,
) -> dict[str, float]:
    """Of `right(row)` and the predicted entities; accuracy is that of the words' tags, which `tags(row, places)` says."""
    given, wanted, words, hits = [], [], 0, 0
    for prediction, row in zip(predictions, rows, strict=True):
        said, asked = _aligned(prediction["entities"], right(row))
        given.append(said)
        wanted.append(asked)
        found = prediction["words"]
        words += len(found)
        hits += sum(
            word["label"] == tag for word, tag in zip(found, tags(row, [(word["start"], word["end"]) for word in found]), strict=True)
        )
    if not given:
        return {}
    values = {**modules.compute("entities", predictions=given, references=wanted), "accuracy": hits / words if words else 0.0}
    return _chosen(DEFAULTS["entities"] if metrics is None else metrics, known("entities", names), values, given, wanted)


def score_words(
    predictions: Iterable[Prediction],
    right: Iterable[tuple[Sequence[Place], Sequence[str]]],
    names: Sequence[str],
    metrics: Sequence[str] | None,
) -> dict[str, float]:
    """Of the tags of words: `right` are a text's words and their tags. A word that was not answered is wrong."""
    given, wanted = _flat(predictions, right)
    if not wanted:
        return {}
    every = [*names, *sorted({*given, *wanted} - {*names})]
    arrays = _indices(every, given, wanted)
    asked = DEFAULTS["words"] if metrics is None else metrics
    values = modules.compute("classification", "single-label", **arrays, prediction_scores=(), labels=every, wanted=asked)
    return _chosen(asked, known("words", names), values, arrays["predictions"].tolist(), arrays["references"].tolist())


def tables_of_entities(
    predictions: Sequence[Prediction], rows: Sequence[Row], right: Callable[[Row], list[Span]], names: Sequence[str]
) -> dict[str, list[dict[str, Any]]]:
    """`per_label`, and `borders`: right entities whose borders lie within a word, and predicted I- that begin an entity."""
    hits: Counter[str] = Counter()
    said: Counter[str] = Counter()
    asked: Counter[str] = Counter()
    cut = repaired = 0
    for prediction, row in zip(predictions, rows, strict=True):
        spans = right(row)
        correct = {(span["start"], span["end"], span["label"]) for span in spans}
        found = {(group["start"], group["end"], group["label"]) for group in prediction["entities"]}
        hits.update(label for _, _, label in correct & found)
        said.update(label for _, _, label in found)
        asked.update(label for _, _, label in correct)
        words = prediction["words"]
        starts, ends = {word["start"] for word in words}, {word["end"] for word in words}
        cut += sum(span["start"] not in starts or span["end"] not in ends for span in spans)
        repaired += tag_rules.entities([word["label"] for word in words], "BIO")[1]
    every = [*names, *sorted({*asked} - {*names})]
    borders = [
        {"what": "entities with a border within a word, which no answer can have", "count": cut},
        {"what": "predicted I- without what it goes on with, read as a beginning", "count": repaired},
    ]
    return {"per_label": _per_label(every, hits, said, asked, "entities"), "borders": borders} if every else {}


def tables_of_words(
    predictions: Iterable[Prediction], right: Iterable[tuple[Sequence[Place], Sequence[str]]], names: Sequence[str]
) -> dict[str, list[dict[str, Any]]]:
    """`per_label` of the tags of words, and `confusion_matrix` (a row for each right tag, a column for each predicted one)."""
    from sklearn.metrics import confusion_matrix

    given, wanted = _flat(predictions, right)
    if not wanted:
        return {}
    every = [*names, *sorted({*given, *wanted} - {*names})]
    arrays = _indices(every, given, wanted)
    hits = Counter(tag for tag, said in zip(wanted, given, strict=True) if tag == said)
    counts = confusion_matrix(arrays["references"], arrays["predictions"], labels=range(len(every)))
    matrix = [
        {"label": name or "(none)", **{f"predicted {other or '(none)'}": int(count) for other, count in zip(every, line, strict=True)}}
        for name, line in zip(every, counts, strict=True)
        if name
    ]
    per_label = _per_label([name for name in every if name], hits, Counter(given), Counter(wanted), "words")
    return {"per_label": per_label, "confusion_matrix": matrix}


def _aligned(said: Sequence[Span], right: Sequence[Span]) -> tuple[list[str], list[str]]:
    """Two sets of entities of one text as BIO tags of the same pieces of it, cut wherever one of them begins or ends."""
    cuts = sorted({place for span in (*said, *right) for place in (span["start"], span["end"])})
    order = {place: index for index, place in enumerate(cuts)}
    pieces = max(len(cuts) - 1, 0)
    return tuple(  # type: ignore[return-value]
        tag_rules.bio([(order[span["start"]], order[span["end"]], span["label"]) for span in spans], pieces) for spans in (said, right)
    )


def _flat(predictions: Iterable[Prediction], right: Iterable[tuple[Sequence[Place], Sequence[str]]]) -> tuple[list[str], list[str]]:
    """The predicted ("" for none) and the right tag of every word of all texts."""
    given: list[str] = []
    wanted: list[str] = []
    for prediction, (places, tags) in zip(predictions, right, strict=True):
        said = {word["start"]: word["label"] for word in prediction["words"]}
        given += [said.get(start, "") for start, _ in places]
        wanted += tags
    return given, wanted


def _indices(every: Sequence[str], given: Sequence[str], wanted: Sequence[str]) -> dict[str, Any]:
    import numpy as np

    places = {name: place for place, name in enumerate(every)}
    return {
        "predictions": np.array([places[tag] for tag in given], dtype=np.int32),
        "references": np.array([places[tag] for tag in wanted], dtype=np.int32),
    }


def _per_label(names: Sequence[str], hits: Counter[str], said: Counter[str], asked: Counter[str], what: str) -> list[dict[str, Any]]:
    return [
        {
            "label": name,
            "precision": hits[name] / max(said[name], 1),
            "recall": hits[name] / max(asked[name], 1),
            "f1": 2 * hits[name] / max(said[name] + asked[name], 1),
            what: asked[name],
            "predicted": said[name],
        }
        for name in names
    ]


def _chosen(wanted: Sequence[str], every: Sequence[str], values: dict[str, float], given: Any, right: Any) -> dict[str, float]:
    """The metrics asked for that have a value; one that isn't ours is a module of `evaluate`, given tags or (of words) their numbers."""
    result: dict[str, float] = {}
    for name in wanted:
        if name in values and name in every:
            result[name] = values[name]
        elif name not in every:
            result |= _other(name, every, given, right)
    return result


def _other(name: str, every: Sequence[str], given: Any, right: Any) -> dict[str, float]:
    try:
        module = modules.load(name)
    except InputError as error:
        raise InputError(f"evaluation.metrics: {name!r} is no metric of this task.{did_you_mean(name, every)} {error}") from None
    try:
        values = module.compute(predictions=given, references=right)
    except (TypeError, ValueError) as error:
        raise InputError(f"evaluation.metrics: {name!r} can't score this task: {' '.join(str(error).split())[:300]}") from None
    numbers = {key: float(value) for key, value in values.items() if isinstance(value, (int, float))}
    return {name if len(numbers) == 1 else f"{name}_{key}": value for key, value in numbers.items()}
