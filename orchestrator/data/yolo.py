"""YOLO's text files: for `images/…/one.jpg` the boxes in `labels/…/one.txt`, a line each, and the names of the classes in data.yaml."""

from __future__ import annotations

import functools
import math
import posixpath
from collections.abc import Iterator
from typing import Any

import pyarrow.fs as pafs
import yaml

from orchestrator.data.files import SourceFile, place
from orchestrator.data.readers import BadRow, Record
from orchestrator.errors import InputError

_NAMES = ("data.yaml", "data.yml", "dataset.yaml", "classes.txt", "obj.names")
_LINE = "class x_center y_center width height, as shares of the image (or a class and the corners of a polygon)"


def rows(file: SourceFile) -> Iterator[Record]:
    """One row: `image` (a path) and `objects` (label and box). An image without a text file has no objects."""
    labels = _beside(file.uri)
    objects = []
    for number, line in enumerate(_text(labels).splitlines(), start=1):
        if not line.strip():
            continue
        found = _object(line.split(), _names(file.uri))
        if found is None:
            yield 1, BadRow("objects", _LINE, f"{line.strip()[:80]} ({posixpath.basename(labels)}, line {number})")
            return
        objects.append(found)
    yield 1, {"image": file.uri, "objects": objects}


def about(file: SourceFile) -> str:
    """All that is said of an image beside it: by this it is known whether anything has changed."""
    return f"{_text(_beside(file.uri))}\n{_names(file.uri)}"


def _object(fields: list[str], names: dict[int, str]) -> dict[str, Any] | None:
    try:
        number, values = int(fields[0]), [float(value) for value in fields[1:]]
    except ValueError:
        return None
    if number < 0 or (names and number not in names) or not all(map(math.isfinite, values)):
        return None
    if len(values) >= 6 and len(values) % 2 == 0:
        x, y = values[::2], values[1::2]
        values = [(min(x) + max(x)) / 2, (min(y) + max(y)) / 2, max(x) - min(x), max(y) - min(y)]
    if len(values) != 4:
        return None
    box = dict(zip(("x_center", "y_center", "width", "height"), values, strict=True))
    return {"label": names.get(number, str(number)), "box": box, "crowd": False}


def _beside(image: str) -> str:
    """The text file of an image: in `labels` where it lies in `images`, else beside it."""
    stem = posixpath.splitext(image)[0]
    before, separator, after = stem.rpartition("/images/")
    return f"{before}/labels/{after}.txt" if separator else f"{stem}.txt"


def _text(uri: str) -> str:
    filesystem, path = place(uri)
    try:
        with filesystem.open_input_stream(path) as stream:
            return stream.read().decode("utf-8-sig", errors="replace")
    except FileNotFoundError:
        return ""


def _names(image: str) -> dict[int, str]:
    """Number of a class -> its name, from the first file that has them, beside `images` or above; empty: classes are called by number."""
    folder = image.rpartition("/images/")[0] or image.rpartition("/")[0]
    return _names_in(folder) or _names_in(folder.rpartition("/")[0])


@functools.lru_cache(maxsize=64)
def _names_in(folder: str) -> dict[int, str]:
    if not folder or folder.endswith(("/", ":")):
        return {}
    filesystem, path = place(folder)
    for name in _NAMES:
        if filesystem.get_file_info(f"{path}/{name}").type == pafs.FileType.File:
            text = _text(f"{folder}/{name}")
            if name.endswith(("yaml", "yml")):
                return _listed(text, f"{folder}/{name}")
            return dict(enumerate(line.strip() for line in text.strip().splitlines()))
    return {}


def _listed(text: str, where: str) -> dict[int, str]:
    try:
        names = (yaml.safe_load(text) or {}).get("names")
    except (yaml.YAMLError, AttributeError):
        names = None
    if isinstance(names, list):
        names = dict(enumerate(names))
    if not isinstance(names, dict) or not all(isinstance(number, int) for number in names):
        raise InputError(f"{where} has no list `names` of the classes, such as names: [cat, dog].")
    return {number: str(name) for number, name in names.items()}
