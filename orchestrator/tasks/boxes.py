"""Boxes around objects: how they stand in data, what is wrong with one, how they move with their image, when two sets agree.

In a row an object is `{"label": …, "box": {"xmin", "ymin", "xmax", "ymax"}, "crowd": …}`, in pixels of the image as it is shown.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from orchestrator.schema import Schema
from orchestrator.tasks.augmentation import GREY, jitter, resized_crop
from orchestrator.tasks.base import RowError
from orchestrator.tasks.labels import label_name, missing

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

BoxFormat = Literal["xyxy", "xywh", "yolo"]
SLACK = 1.0
"""Pixels by which a box may leave its image: annotation tools round. It is cut there."""
CROP_TRIES = 10
_LABELS = ("label", "category", "class", "class_name")
_BOXES = ("box", "bbox")
_CORNERS = ("xmin", "ymin", "xmax", "ymax")
_PLACED = ("x", "y", "width", "height")
_CENTRED = ("x_center", "y_center", "width", "height")
_EXPECTED = 'a list of objects such as {"box": [10, 20, 50, 80], "label": "dog"} (empty: none)'


# ---- in a row ------------------------------------------------------------------------------------------------
def clean_objects(column: str, value: Any, size: tuple[int, int], form: BoxFormat) -> list[dict[str, Any]]:
    """The objects in a cell, `size` being the image's width and height; `RowError` for a box or label that can't be.

    Takes a list of `{box or bbox, label or category}`, a dict of such lists (as `datasets` writes it), or either as JSON text. A box
    of four bare numbers is read as `form` says; one with named numbers says itself what it is.
    """
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            raise RowError(column, _EXPECTED, value) from None
    if isinstance(value, Mapping):
        value = _rows_of(column, value)
    if not isinstance(value, (list, tuple)):
        raise RowError(column, _EXPECTED, value)
    return [_object(column, item, size, form) for item in value]


def _rows_of(column: str, lists: Mapping[str, Any]) -> list[dict[str, Any]]:
    plural = {"boxes": "box", "labels": "label", "categories": "category"}
    columns = {plural.get(name, name): values for name, values in lists.items() if isinstance(values, (list, tuple))}
    if len({len(values) for values in columns.values()}) != 1:
        raise RowError(column, "as many labels as boxes", dict(lists))
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def _object(column: str, item: Any, size: tuple[int, int], form: BoxFormat) -> dict[str, Any]:
    if not isinstance(item, Mapping):
        raise RowError(column, _EXPECTED, item)
    label = next((item[name] for name in _LABELS if not missing(item.get(name))), None)
    if not isinstance(label, (str, bool, int, float)) or not str(label).strip():
        raise RowError(column, "a label for each box", dict(item))
    box = next((item[name] for name in _BOXES if item.get(name) is not None), None)
    return {"label": label_name(label), "box": _box(column, box, size, form), "crowd": bool(item.get("crowd") or item.get("iscrowd"))}


def _box(column: str, box: Any, size: tuple[int, int], form: BoxFormat) -> dict[str, float]:
    width, height = size
    if isinstance(box, Mapping):
        names = next((names for names in (_CORNERS, _PLACED, _CENTRED) if all(name in box for name in names)), None)
        form = {_CORNERS: "xyxy", _PLACED: "xywh", _CENTRED: "yolo"}.get(names, form)  # type: ignore[assignment, arg-type]
        numbers: Any = [box[name] for name in names] if names else None
    else:
        numbers = box
    if (
        not isinstance(numbers, (list, tuple))
        or len(numbers) != 4
        or any(not isinstance(n, (int, float)) or isinstance(n, bool) for n in numbers)
    ):
        raise RowError(column, f"a box of four numbers ({form})", box)
    first, second, third, fourth = map(float, numbers)
    if not all(map(math.isfinite, (first, second, third, fourth))):
        raise RowError(column, "a box of finite numbers", repr(box))
    if form == "yolo":
        first, third, second, fourth = first * width, third * width, second * height, fourth * height
        first, second = first - third / 2, second - fourth / 2
    if form != "xyxy":
        third, fourth = first + third, second + fourth
    if third <= first or fourth <= second:
        raise RowError(column, f"a box with a width and a height above 0 ({form})", box)
    if first < -SLACK or second < -SLACK or third > width + SLACK or fourth > height + SLACK:
        raise RowError(column, f"a box within the image of {width} x {height} pixels ({form})", box)
    cut = max(0.0, first), max(0.0, second), min(float(width), third), min(float(height), fourth)
    if cut[2] <= cut[0] or cut[3] <= cut[1]:
        raise RowError(column, f"a box within the image of {width} x {height} pixels ({form})", box)
    return dict(zip(_CORNERS, cut, strict=True))


def corners(box: Mapping[str, float]) -> list[float]:
    """xmin, ymin, xmax, ymax."""
    return [box[name] for name in _CORNERS]


def named(values: Sequence[float]) -> dict[str, float]:
    """The box of these corners."""
    return dict(zip(_CORNERS, values, strict=True))


# ---- moving with the image -----------------------------------------------------------------------------------
class BoxAugment(Schema):
    """What is done to training images and their boxes at random, in this order; nothing by default."""

    crop: Annotated[float, Field(gt=0, le=1)] | None = None
    """Random crop: the smallest share of the image's area that is kept. An object whose middle is cut off is left out."""
    scale: Annotated[float, Field(gt=0, le=1)] | None = None
    """The image is shrunk by a factor down to this one and put on a grey ground of its former size."""
    flip: bool = False
    """Mirror every other image."""
    color: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Colour jitter: brightness, contrast and saturation change by up to this share."""

    def __bool__(self) -> bool:
        return self != type(self)()

    def apply(self, image: Image.Image, boxes: np.ndarray, rng: np.random.Generator) -> tuple[Image.Image, np.ndarray, np.ndarray]:
        """The image, its boxes (n, 4: corners in pixels) as they lie in it, and the places of those that are left among the former ones."""
        import numpy as np
        from PIL import Image as images

        kept = np.arange(len(boxes))
        if self.crop is not None:
            image, boxes, kept = _crop(image, boxes, self.crop, rng)
        if self.scale is not None:
            image, boxes = _shrink(image, boxes, float(rng.uniform(self.scale, 1.0)), rng)
        if self.flip and rng.random() < 0.5:
            image = image.transpose(images.Transpose.FLIP_LEFT_RIGHT)
            boxes = boxes.copy()
            boxes[:, [0, 2]] = image.width - boxes[:, [2, 0]]
        if self.color:
            image = jitter(image, self.color, rng)
        return image, boxes, kept


def _crop(image: Image.Image, boxes: np.ndarray, smallest: float, rng: np.random.Generator) -> tuple[Image.Image, np.ndarray, np.ndarray]:
    """A crop in which some box is left, where there is any; the whole image where none is found."""
    import numpy as np

    for _ in range(CROP_TRIES):
        left, top, right, bottom = resized_crop(image.size, smallest, rng)
        middle = (boxes[:, :2] + boxes[:, 2:]) / 2
        kept = np.flatnonzero(((middle > [left, top]) & (middle < [right, bottom])).all(axis=1))
        if len(kept) or not len(boxes):
            moved = np.clip(boxes[kept] - [left, top, left, top], 0, [right - left, bottom - top] * 2)
            return image.crop((left, top, right, bottom)), moved, kept
    return image, boxes, np.arange(len(boxes))


def _shrink(image: Image.Image, boxes: np.ndarray, factor: float, rng: np.random.Generator) -> tuple[Image.Image, np.ndarray]:
    from PIL import Image as images

    width, height = max(1, round(image.width * factor)), max(1, round(image.height * factor))
    left, top = int(rng.integers(image.width - width + 1)), int(rng.integers(image.height - height + 1))
    ground = images.new(image.mode, image.size, GREY if image.mode == "L" else (GREY,) * 3)
    ground.paste(image.resize((width, height), images.Resampling.BILINEAR), (left, top))
    scale = [width / image.width, height / image.height] * 2
    return ground, boxes * scale + [left, top, left, top]


# ---- agreeing ------------------------------------------------------------------------------------------------
def difference(one: Sequence[Mapping[str, Any]], other: Sequence[Mapping[str, Any]], threshold: float, slack: float = 0.0) -> float:
    """How far two sets of found objects are apart: the largest over those scored `threshold` or more in either set.

    Each is compared with the nearest of its label in the other set: by score, and by corners relative to the longest side of the two (beyond `slack`
    pixels). One that has none there counts by how far its score is above the threshold, where it would have vanished.
    """
    return max(_missed(one, other, threshold, slack), _missed(other, one, threshold, slack))


def _missed(one: Sequence[Mapping[str, Any]], other: Sequence[Mapping[str, Any]], threshold: float, slack: float) -> float:
    free = list(other)
    largest = 0.0
    for found in sorted(one, key=lambda item: -item["score"]):
        if found["score"] < threshold:
            break
        nearest = min((item for item in free if item["label"] == found["label"]), key=lambda item: _apart(found, item, slack), default=None)
        if nearest is None:
            largest = max(largest, found["score"] - threshold)
        else:
            free.remove(nearest)
            largest = max(largest, _apart(found, nearest, slack))
    return largest


def _apart(one: Mapping[str, Any], other: Mapping[str, Any], slack: float) -> float:
    a, b = corners(one["box"]), corners(other["box"])
    side = max(*(box[2] - box[0] for box in (a, b)), *(box[3] - box[1] for box in (a, b)), 1.0)
    shift = max(abs(x - y) for x, y in zip(a, b, strict=True))
    return max(abs(one["score"] - other["score"]), max(0.0, shift - slack) / side)
