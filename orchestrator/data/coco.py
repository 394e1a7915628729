"""COCO's JSON for detection: an object with `images`, `annotations` and `categories`, read a piece at a time.

A row is an image with its boxes. The lists stand one after the other in the file, so what is known of each image is held until its
row: some hundred bytes for a box, and of segmentations nothing.
"""

from __future__ import annotations

import json
import posixpath
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pyarrow.fs as pafs

from orchestrator.config import DataSection
from orchestrator.data.files import SourceFile, place
from orchestrator.data.json_stream import Cursor
from orchestrator.data.readers import BadRow, Record
from orchestrator.errors import InputError


def rows(file: SourceFile, section: DataSection) -> Iterator[Record]:
    """`image` (a path), `objects` (label and box; none where the file has no annotations at all), `image_id`; numbered by their place in `images`."""
    found = _Found()
    _read(Cursor(file, section), found)
    if found.images is None:
        listed = ", ".join(map(repr, found.keys)) or "nothing"
        raise InputError(f"{file.name}: expected COCO's JSON, an object with images, annotations and categories; it has {listed}.")
    yield from _rows(file, section, found)


@dataclass
class _Found:
    keys: list[str] = field(default_factory=list)
    images: list[dict[str, Any]] | None = None
    boxes: dict[Any, list[tuple[Any, Any, bool]]] | None = None
    """Image id -> category id, bbox, whether it is a crowd."""
    names: dict[Any, Any] = field(default_factory=dict)
    """Category id -> name."""


def _read(cursor: Cursor, found: _Found) -> None:
    for key in cursor.members("COCO's JSON, an object with images, annotations and categories"):
        found.keys.append(key)
        if key == "images":
            found.images = [_some(cursor.value(), "id", "file_name") for _ in cursor.items("the list of images")]
        elif key == "annotations":
            found.boxes = {}
            for _ in cursor.items("the list of annotations"):
                entry = _some(cursor.value(), "image_id", "category_id", "bbox", "iscrowd")
                box = _hashable(entry.get("category_id")), entry.get("bbox"), bool(entry.get("iscrowd"))
                found.boxes.setdefault(_hashable(entry.get("image_id")), []).append(box)
        elif key == "categories":
            entries = [_some(cursor.value(), "id", "name") for _ in cursor.items("the list of categories")]
            found.names = {_hashable(entry.get("id")): entry.get("name") for entry in entries}
        elif cursor.sign() == "[":
            for _ in cursor.items():
                cursor.value()
        else:
            cursor.value()


def _rows(file: SourceFile, section: DataSection, found: _Found) -> Iterator[Record]:
    assert found.images is not None
    first = next((item["file_name"] for item in found.images if isinstance(item.get("file_name"), str)), None)
    folder = _folder(file, section, first) if first is not None else ""
    seen: set[Any] = set()
    number = 0
    for number, image in enumerate(found.images, start=1):
        name, key = image.get("file_name"), _hashable(image.get("id"))
        if not isinstance(name, str) or not name or key is None:
            yield number, BadRow("images", "an image with an id and a file_name", json.dumps(image)[:80])
        elif key in seen:
            yield number, BadRow("images", "an id of its own for each image", json.dumps(image)[:80])
        else:
            seen.add(key)
            yield number, _row(image, key, name if "://" in name or name.startswith("/") else f"{folder}/{name}", found)
    for key in () if found.boxes is None else found.boxes:
        if key not in seen:
            number += 1
            yield number, BadRow("annotations", "the id of an image in `images`", f"image_id {key!r}")


def _row(image: dict[str, Any], key: Any, path: str, found: _Found) -> dict[str, Any] | BadRow:
    row: dict[str, Any] = {"image": path, "image_id": key}
    if found.boxes is None:
        return row
    row["objects"] = []
    for category, box, crowd in found.boxes.get(key, ()):
        name = found.names.get(category)
        if not isinstance(name, str):
            return BadRow("objects", "the id of a category in `categories`", f"category_id {category!r} (image {image['file_name']!r})")
        sides = ("x", "y", "width", "height")
        named = dict(zip(sides, box, strict=True)) if isinstance(box, list) and len(box) == 4 else box
        row["objects"].append({"label": name, "box": named, "crowd": crowd})
    return row


def _some(item: Any, *names: str) -> dict[str, Any]:
    return {name: item[name] for name in names if name in item} if isinstance(item, dict) else {}


def _hashable(value: Any) -> Any:
    return value if isinstance(value, (str, int)) else None


# ---- where the images are ------------------------------------------------------------------------------------
def _folder(file: SourceFile, section: DataSection, name: str) -> str:
    """The folder that `file_name` is relative to: `data.images`, else the first of the usual ones where the first image is."""
    if "://" in name or name.startswith("/"):
        return ""
    here = file.uri.rpartition("/")[0]
    if section.images is not None:
        usual = [section.images if "://" in section.images or section.images.startswith("/") else f"{here}/{section.images}"]
    else:
        stem = posixpath.splitext(posixpath.basename(file.uri).removesuffix(".gz"))[0]
        part = stem.rpartition("_")[2]  # instances_train2017.json goes with train2017/.
        usual = [here, f"{here}/images", f"{here}/{part}", f"{here}/../images", f"{here}/../{part}", f"{here}/../images/{part}"]
    for folder in usual:
        filesystem, path = place(_plain(f"{folder}/{name}"))
        if filesystem.get_file_info(path).type == pafs.FileType.File:
            return _plain(folder)
    tried = ", ".join(repr(_plain(folder)) for folder in dict.fromkeys(usual))
    raise InputError(f"{file.name}: its first image {name!r} is not in {tried}. Say where the images are with data.images.")


def _plain(path: str) -> str:
    scheme, separator, rest = path.rpartition("://")
    return f"{scheme}{separator}{posixpath.normpath(rest)}"
