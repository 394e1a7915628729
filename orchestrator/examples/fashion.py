"""Fashion-MNIST (Xiao et al. 2017, arXiv 1708.07747): grey pictures of garments, alone and together on a canvas."""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.examples.base import Example, deb_members

if TYPE_CHECKING:
    import numpy as np

LABELS = ("T-shirt", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
KINDS = {
    **dict.fromkeys(("T-shirt", "Pullover", "Coat", "Shirt"), "top"),
    **dict.fromkeys(("Sandal", "Sneaker", "Ankle boot"), "shoe"),
    "Trouser": "trouser",
    "Dress": "dress",
    "Bag": "bag",
}
"""What a garment is called in a scene."""
PARTS = {"train": ("train", 12_000), "test": ("t10k", 2_000)}
"""Split -> what its files begin with, and the rows of its small part."""
SCENES = {"train": 2_000, "test": 300}
CANVAS, MOST = 96, 3
"""Side of a scene in pixels, and the most garments in one."""


def _garments(archive: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Split -> images (n, 28, 28) and labels (n), uint8, out of the IDX files."""
    import numpy as np

    found: dict[str, np.ndarray] = {}
    for name, stream in deb_members(archive):
        kind = name.rpartition("/")[2]
        if kind.endswith("-ubyte.gz"):
            content = gzip.decompress(stream.read())
            offset = 4 + 4 * content[3]  # A magic number whose last byte is the number of dimensions, then their sizes.
            found[kind] = np.frombuffer(content, dtype=np.uint8, offset=offset)
    return {
        split: (found[f"{start}-images-idx3-ubyte.gz"].reshape(-1, 28, 28), found[f"{start}-labels-idx1-ubyte.gz"])
        for split, (start, _) in PARTS.items()
    }


def _png(pixels: np.ndarray) -> bytes:
    from PIL import Image

    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def pictures(archive: Path, folder: Path) -> None:
    """`<split>.parquet`, and `<split>-small.parquet` with its first rows: `image` (a PNG file) and `label`."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    for split, (images, labels) in _garments(archive).items():
        table = pa.table({"image": [_png(image) for image in images], "label": [LABELS[label] for label in labels]})
        pq.write_table(table, folder / f"{split}.parquet", compression="none")
        pq.write_table(table.slice(0, PARTS[split][1]), folder / f"{split}-small.parquet", compression="none")


def scenes(archive: Path, folder: Path) -> None:
    """`<split>.json` in COCO's format and `images/`: one to three garments on a dark, noisy canvas of 96 x 96 pixels.

    The pixels are those of Fashion-MNIST, enlarged up to half as much again; the split is Fashion-MNIST's own, so that no garment is in both.
    Boxes are exact: the rectangle of the pixels that are brighter than 16. They overlap by 2 pixels at most. All is drawn from
    numpy's PCG64 with seed 2017.
    """
    import numpy as np

    (folder / "images").mkdir()
    kinds = sorted(set(KINDS.values()))
    rng = np.random.default_rng(2017)
    for split, (images, labels) in _garments(archive).items():
        coco: dict[str, Any] = {
            "images": [],
            "annotations": [],
            "categories": [{"id": place, "name": kind} for place, kind in enumerate(kinds, start=1)],
        }
        for number in range(1, SCENES[split] + 1):
            name = f"{split}-{number:05d}.png"
            canvas = rng.integers(0, 16, (CANVAS, CANVAS), dtype=np.uint8)
            coco["images"].append({"id": number, "file_name": f"images/{name}", "width": CANVAS, "height": CANVAS})
            for place, (left, top, right, bottom) in _pasted(canvas, images, rng):
                coco["annotations"].append(
                    {
                        "id": len(coco["annotations"]) + 1,
                        "image_id": number,
                        "category_id": kinds.index(KINDS[LABELS[labels[place]]]) + 1,
                        "bbox": [left, top, right - left, bottom - top],
                        "area": (right - left) * (bottom - top),
                        "iscrowd": 0,
                    }
                )
            (folder / "images" / name).write_bytes(_png(canvas))
        (folder / f"{split}.json").write_text(json.dumps(coco))


def _pasted(canvas: np.ndarray, images: np.ndarray, rng: np.random.Generator) -> Iterator[tuple[int, tuple[int, int, int, int]]]:
    """Puts garments onto `canvas`; for each its place among `images`, and its box (left, top, right, bottom)."""
    import numpy as np
    from PIL import Image

    taken: list[tuple[int, int, int, int]] = []
    for _ in range(int(rng.integers(1, MOST + 1))):
        place, side = int(rng.integers(len(images))), int(rng.integers(28, 43))
        garment = np.asarray(Image.fromarray(images[place]).resize((side, side), Image.Resampling.BILINEAR))
        rows, columns = (np.flatnonzero((garment > 16).any(axis=axis)) for axis in (1, 0))
        for _ in range(20):
            left, top = (int(rng.integers(CANVAS - side + 1)) for _ in range(2))
            box = left + int(columns[0]), top + int(rows[0]), left + int(columns[-1]) + 1, top + int(rows[-1]) + 1
            if all(min(box[2], b[2]) - max(box[0], b[0]) <= 2 or min(box[3], b[3]) - max(box[1], b[1]) <= 2 for b in taken):
                ground = canvas[top : top + side, left : left + side]
                np.maximum(ground, garment, out=ground)
                taken.append(box)
                yield place, box
                break


_DEBIAN: dict[str, Any] = {
    "package": "dataset-fashion-mnist",
    "version": "0.0~git20200523.55506a9-1",
    "archive": "dataset-fashion-mnist_0.0~git20200523.55506a9-1_all.deb",
    "sha256": "39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0",
    "pool": "pool/main/d/dataset-fashion-mnist",
    "licence": "MIT; cite Xiao, Rasul & Vollgraf 2017",
}

EXAMPLES: dict[str, Example] = {
    "fashion-mnist": Example(
        unpack=pictures,
        main="train.parquet",
        about="70,000 grey pictures of garments, 28 x 28 pixels, ten kinds; train-small.parquet has 12,000, test-small.parquet 2,000",
        **_DEBIAN,
    ),
    "fashion-scenes": Example(
        unpack=scenes,
        main="train.json",
        about="2,300 pictures of 96 x 96 pixels with one to three garments of Fashion-MNIST and their boxes, in COCO's format",
        **_DEBIAN,
    ),
}
