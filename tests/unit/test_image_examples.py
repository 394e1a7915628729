"""The examples with images, on a small package of the same form as Debian's."""

import gzip
import io
import json
import struct
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from orchestrator.examples import EXAMPLES, efficientnet, fashion
from orchestrator.tasks import create


def idx(array: np.ndarray) -> bytes:
    return gzip.compress(struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes())


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """20 + 10 garments: each a rectangle of its own grey in a black picture."""
    monkeypatch.setattr(fashion, "PARTS", {"train": ("train", 8), "test": ("t10k", 4)})
    monkeypatch.setattr(fashion, "SCENES", {"train": 6, "test": 3})
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w:xz") as archive:
        for start, count in (("train", 20), ("t10k", 10)):
            images = np.zeros((count, 28, 28), np.uint8)
            for place in range(count):
                images[place, 3:25, 6:20] = 100 + place
            parts = {"images-idx3": images, "labels-idx1": (np.arange(count) % 10).astype(np.uint8)}
            for kind, array in parts.items():
                entry, packed = tarfile.TarInfo(f"./usr/share/datasets/fashion-mnist/{start}-{kind}-ubyte.gz"), idx(array)
                entry.size = len(packed)
                archive.addfile(entry, io.BytesIO(packed))
    members = {"debian-binary": b"2.0\n", "data.tar.xz": content.getvalue()}
    path = tmp_path / "package.deb"
    with path.open("wb") as file:
        file.write(b"!<arch>\n")
        for name, data in members.items():
            file.write(f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(data):<10}`\n".encode() + data + b"\n" * (len(data) % 2))
    return path


def test_pictures_are_rows_with_a_png_and_a_label(package: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    EXAMPLES["fashion-mnist"].unpack(package, folder)
    assert {path.name: pq.read_metadata(path).num_rows for path in folder.iterdir()} == {
        "train.parquet": 20, "train-small.parquet": 8, "test.parquet": 10, "test-small.parquet": 4,
    }  # fmt: skip
    row = pq.read_table(folder / "train.parquet").to_pylist()[3]
    assert row["label"] == "Dress"
    assert np.asarray(Image.open(io.BytesIO(row["image"])))[10, 10] == 103


def test_scenes_have_exact_boxes_and_are_the_same_each_time(package: Path, tmp_path: Path) -> None:
    found: list[Any] = []
    for place in ("one", "two"):
        (tmp_path / place).mkdir()
        EXAMPLES["fashion-scenes"].unpack(package, tmp_path / place)
        found.append({path.relative_to(tmp_path / place): path.read_bytes() for path in (tmp_path / place).rglob("*") if path.is_file()})
    assert found[0] == found[1]
    coco = json.loads((tmp_path / "one" / "train.json").read_text())
    assert len(coco["images"]) == 6
    assert {category["name"] for category in coco["categories"]} == {"bag", "dress", "shoe", "top", "trouser"}
    task = create({"name": "object-detection", "box_format": "xywh"})
    for image in coco["images"]:
        pixels = np.asarray(Image.open(tmp_path / "one" / image["file_name"]))
        assert pixels.shape == (96, 96)
        boxes = [entry["bbox"] for entry in coco["annotations"] if entry["image_id"] == image["id"]]
        assert 1 <= len(boxes) <= 3
        covered = np.zeros_like(pixels, dtype=bool)
        for left, top, width, height in boxes:
            covered[top : top + height, left : left + width] = True
            assert (pixels[top : top + height, left : left + width] > 16).mean() > 0.95
        assert (pixels[~covered] <= 16).all()
        row = {"image": str(tmp_path / "one" / image["file_name"]), "objects": [{"bbox": box, "label": "x"} for box in boxes]}
        assert len(task.clean(row)["objects"]) == len(boxes)


def test_weights_get_the_names_that_transformers_gives_them() -> None:
    """A checkpoint is made of a transformers model by the reverse names; back again, every weight is where it was."""
    import torch
    from transformers import EfficientNetForImageClassification

    config = efficientnet._config()
    with torch.device("meta"):
        wanted = EfficientNetForImageClassification(config).state_dict()
    stored: dict[str, Any] = {}
    for name in wanted:
        if "squeeze_excite" in name:
            continue
        for prefix, source in {
            "efficientnet.embeddings.convolution.": "_conv_stem.",
            "efficientnet.embeddings.batchnorm.": "_bn0.",
            "efficientnet.encoder.top_conv.": "_conv_head.",
            "efficientnet.encoder.top_bn.": "_bn1.",
            "classifier.": "_fc.",
        }.items():
            if name.startswith(prefix):
                stored[source + name.removeprefix(prefix)] = name
        if name.startswith("efficientnet.encoder.blocks."):
            _, _, _, place, rest = name.split(".", 4)
            ours = next(key for key in efficientnet._BLOCK if rest.startswith(key.removesuffix(".weight")))
            theirs = efficientnet._BLOCK[ours].removesuffix(".weight")
            stored[f"_blocks.{place}.{theirs}.{rest.rpartition('.')[2]}"] = name
    found = efficientnet.renamed(stored, wanted)
    assert found.keys() == wanted.keys()
    assert all(value == name for name, value in found.items() if "squeeze_excite" not in name)
