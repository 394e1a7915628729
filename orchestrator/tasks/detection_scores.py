"""COCO's average precision of found boxes, by pycocotools."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from orchestrator.errors import InputError, did_you_mean
from orchestrator.tasks.base import Prediction, Row
from orchestrator.tasks.boxes import corners

if TYPE_CHECKING:
    import numpy as np

DEFAULTS = ("map", "map_50", "map_75", "mar_100")
"""The metrics reported where the job names none; the first one is the objective."""
SIZES = ("map_small", "map_medium", "map_large")
"""Of objects up to 32 x 32 pixels, up to 96 x 96, and larger ones."""


def known(names: Sequence[str]) -> tuple[str, ...]:
    """Every metric: the default ones first, then those by size, then `map/<label>`."""
    return DEFAULTS + SIZES + tuple(f"map/{name}" for name in names)


def score(
    names: Sequence[str], predictions: Sequence[Prediction], rows: Sequence[Row], metrics: Sequence[str] | None = None
) -> dict[str, float]:
    """The chosen metrics that have a value here; `InputError` for one that there is not."""
    wanted = DEFAULTS if metrics is None else metrics
    if unknown := [name for name in wanted if name not in known(names)]:
        raise InputError(f"evaluation.metrics: {unknown[0]!r} is no metric of this task.{did_you_mean(unknown[0], known(names))}")
    if not rows or not wanted:
        return {}
    precision, recall = _evaluated(names, predictions, rows)
    values = {
        "map": _mean(precision[:, :, :, 0]),
        "map_50": _mean(precision[0, :, :, 0]),
        "map_75": _mean(precision[5, :, :, 0]),
        "mar_100": _mean(recall[:, :, 0]),
        **{name: _mean(precision[:, :, :, place]) for place, name in enumerate(SIZES, start=1)},
        **{f"map/{name}": _mean(precision[:, :, place, 0]) for place, name in enumerate(names)},
    }
    return {name: value for name in wanted if (value := values[name]) is not None}


def tables(names: Sequence[str], predictions: Sequence[Prediction], rows: Sequence[Row]) -> dict[str, list[dict[str, Any]]]:
    """`per_class`: average precisions of each label that has objects here, and how many."""
    if not rows:
        return {}
    precision, recall = _evaluated(names, predictions, rows)
    counts = dict.fromkeys(names, 0)
    for row in rows:
        for item in row["objects"]:
            counts[item["label"]] += not item.get("crowd")
    lines = [
        {
            "label": name,
            "map": _mean(precision[:, :, place, 0]),
            "map_50": _mean(precision[0, :, place, 0]),
            "map_75": _mean(precision[5, :, place, 0]),
            "mar_100": _mean(recall[:, place, 0]),
            "objects": counts[name],
        }
        for place, name in enumerate(names)
        if counts[name]
    ]
    return {"per_class": lines} if lines else {}


def _evaluated(names: Sequence[str], predictions: Sequence[Prediction], rows: Sequence[Row]) -> tuple[np.ndarray, np.ndarray]:
    """Precision (IoU thresholds, recalls, labels, sizes) and recall (IoU thresholds, labels, sizes) of up to 100 boxes an image."""
    from pycocotools.cocoeval import COCOeval

    places = {name: place for place, name in enumerate(names, start=1)}
    right: list[dict[str, Any]] = []
    found: list[dict[str, Any]] = []
    count = 0
    for count, (prediction, row) in enumerate(zip(predictions, rows, strict=True), start=1):
        for item in row["objects"]:
            right.append(_annotation(len(right) + 1, count, places[item["label"]], item["box"]) | {"iscrowd": int(bool(item.get("crowd")))})
        for item in prediction["boxes"]:
            found.append(_annotation(len(found) + 1, count, places[item["label"]], item["box"]) | {"score": item["score"]})
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = COCOeval(_index(right, count, places), _index(found, count, places), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
    return evaluation.eval["precision"][..., -1], evaluation.eval["recall"][..., -1]


def _annotation(number: int, image: int, category: int, box: dict[str, float]) -> dict[str, Any]:
    left, top, right, bottom = corners(box)
    width, height = right - left, bottom - top
    return {"id": number, "image_id": image, "category_id": category, "bbox": [left, top, width, height], "area": width * height}


def _index(annotations: list[dict[str, Any]], images: int, places: dict[str, int]) -> Any:
    from pycocotools.coco import COCO

    coco: Any = COCO()
    coco.dataset = {
        "images": [{"id": number} for number in range(1, images + 1)],
        "categories": [{"id": place, "name": name} for name, place in places.items()],
        "annotations": annotations,
    }
    coco.createIndex()
    return coco


def _mean(values: np.ndarray) -> float | None:
    """-1 stands where there is nothing to find."""
    there = values[values > -1]
    return float(there.mean()) if there.size else None
