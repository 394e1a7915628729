"""COCO's JSON and YOLO's folders as rows: what they mean, and what is wrong with them, by file and row."""

import json
from pathlib import Path
from typing import Any

import pytest

from orchestrator.config import DataSection
from orchestrator.data import files, fingerprint, sources
from orchestrator.data.readers import BadRow, records
from orchestrator.errors import InputError
from orchestrator.tasks import create
from tests.fixtures.tiny_images import picture

TASK = create("object-detection")
COCO: dict[str, Any] = {
    "info": {"year": 2026},
    "licenses": [{"id": 1}],
    "annotations": [
        {"id": 1, "image_id": 7, "category_id": 3, "bbox": [2, 3, 8, 9], "segmentation": [[1, 2, 3, 4]], "iscrowd": 0},
        {"id": 2, "image_id": 7, "category_id": 9, "bbox": [0, 0, 4.5, 4], "iscrowd": 1},
    ],
    "images": [{"id": 7, "file_name": "a.png", "width": 20, "height": 16}, {"id": 8, "file_name": "ü b.png"}],
    "categories": [{"id": 3, "name": "cat"}, {"id": 9, "name": "dog"}],
}


def coco(folder: Path, content: Any = COCO, name: str = "labels.json", images: str = ".") -> Path:
    (folder / images).mkdir(parents=True, exist_ok=True)
    for image in ("a.png", "ü b.png"):
        (folder / images / image).write_bytes(picture((200, 0, 0)))
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return folder / name


def read(path: Path, form: str = "coco", **section: Any) -> list[Any]:
    data = DataSection.parse({"train": str(path), "format": form, **section})
    return [record for file in files.find(data)["train"] for record in records(file, data)]


def test_an_image_with_its_boxes_is_a_row_whatever_the_order_of_the_lists(tmp_path: Path) -> None:
    (first, row), (second, empty) = read(coco(tmp_path))
    assert (first, second) == (1, 2)
    assert row["image_id"] == 7
    assert row["image"] == str(tmp_path / "a.png")
    assert TASK.clean(row)["objects"] == [
        {"label": "cat", "box": {"xmin": 2.0, "ymin": 3.0, "xmax": 10.0, "ymax": 12.0}, "crowd": False},
        {"label": "dog", "box": {"xmin": 0.0, "ymin": 0.0, "xmax": 4.5, "ymax": 4.0}, "crowd": True},
    ]
    assert TASK.clean(empty)["objects"] == []


@pytest.mark.parametrize(
    ("name", "images", "section"),
    [
        ("labels.json", "images", {}),
        ("annotations/instances_train2017.json", "train2017", {}),
        ("annotations/train.json", "images/train", {}),
        ("annotations/x.json", "elsewhere", {"images": "../elsewhere"}),
    ],
)
def test_images_are_found_where_they_usually_lie_or_where_the_job_says(tmp_path: Path, name: str, images: str, section: Any) -> None:
    rows = read(coco(tmp_path, name=name, images=images), **section)
    assert [Path(row["image"]) for _, row in rows] == [tmp_path / images / "a.png", tmp_path / images / "ü b.png"]


def test_images_that_are_not_found_are_asked_for(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"'a\.png' is not in .*data\.images"):
        read(coco(tmp_path, images="elsewhere"))


def bad(rows: list[Any]) -> list[tuple[int, BadRow]]:
    return [(number, row) for number, row in rows if isinstance(row, BadRow)]


def test_what_refers_to_nothing_is_a_bad_row(tmp_path: Path) -> None:
    boxes = [{"image_id": 7, "category_id": 4, "bbox": [1, 1, 2, 2]}, {"image_id": 99, "category_id": 3, "bbox": [1, 1, 2, 2]}]
    images = [*COCO["images"], {"id": 8, "file_name": "a.png"}, {"file_name": "a.png"}]
    found = bad(read(coco(tmp_path, {**COCO, "annotations": boxes, "images": images})))
    assert [(number, row.column) for number, row in found] == [(1, "objects"), (3, "images"), (4, "images"), (5, "annotations")]
    assert "category_id 4" in found[0][1].found
    assert "99" in found[3][1].found


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "expected COCO's JSON"),
        ("[]", "expected COCO's JSON"),
        ('{"rows": []}', "it has 'rows'"),
        ('{"images": [{"id": 1}\n{"id": 2}]}', "line 2"),
        ('{"images": {}}', "the list of images"),
        ('{"images": [', "line 1"),
    ],
)
def test_a_file_that_is_none_is_refused_by_its_line(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        read(coco(tmp_path, text))


def test_images_alone_can_be_predicted_but_not_learnt(tmp_path: Path) -> None:
    path = coco(tmp_path, {"images": COCO["images"]})
    section = DataSection.parse({"train": str(path), "format": "coco"})
    columns = sources.peek(section).columns
    assert sources.map_columns(section, TASK.columns(), columns, targets=False) == {"image": "image"}
    with pytest.raises(InputError, match="no column 'objects'"):
        sources.map_columns(section, TASK.columns(), columns)


# ---- YOLO ----------------------------------------------------------------------------------------------------
def yolo(folder: Path, labels: dict[str, str], names: str | None = "names: [cat, dog]", split: str = "train/") -> Path:
    for name in ("a", "b"):
        (folder / "images" / split).mkdir(parents=True, exist_ok=True)
        (folder / "images" / split / f"{name}.png").write_bytes(picture((0, 200, 0)))
    for name, text in labels.items():
        (folder / "labels" / split).mkdir(parents=True, exist_ok=True)
        (folder / "labels" / split / f"{name}.txt").write_text(text)
    if names is not None:
        (folder / "data.yaml").write_text(names)
    return folder


def test_an_image_and_its_text_file_are_a_row(tmp_path: Path) -> None:
    (_, row), (_, empty) = read(yolo(tmp_path, {"a": "1 0.5 0.5 0.5 0.25\r\n0 0.1 0.1 0.3 0.1 0.3 0.5 0.1 0.5\n\n"}), "yolo")
    assert TASK.clean(row)["objects"] == [
        {"label": "dog", "box": {"xmin": 5.0, "ymin": 6.0, "xmax": 15.0, "ymax": 10.0}, "crowd": False},
        {"label": "cat", "box": pytest.approx({"xmin": 2.0, "ymin": 1.6, "xmax": 6.0, "ymax": 8.0}), "crowd": False},
    ]
    assert TASK.clean(empty)["objects"] == []


def test_splits_have_folders_of_their_own(tmp_path: Path) -> None:
    yolo(yolo(tmp_path, {}), {"a": "0 0.5 0.5 1 1"}, split="val/")
    data = DataSection.parse({"train": str(tmp_path), "validation": str(tmp_path), "format": "yolo"})
    assert {split: [file.name for file in found] for split, found in files.find(data).items()} == {
        "train": ["train/a.png", "train/b.png"],
        "validation": ["val/a.png", "val/b.png"],
    }


@pytest.mark.parametrize(
    ("names", "label"),
    [("names: {0: a cat, 1: a dog}", "a dog"), (None, "1")],
)
def test_classes_have_the_names_that_are_given_or_their_numbers(tmp_path: Path, names: str | None, label: str) -> None:
    (_, row), _ = read(yolo(tmp_path, {"a": "1 0.5 0.5 0.5 0.5"}, names), "yolo")
    assert row["objects"][0]["label"] == label


@pytest.mark.parametrize("line", ["0 0.5 0.5", "cat 0.5 0.5 0.5 0.5", "7 0.5 0.5 0.5 0.5", "0 0.5 nan 0.5 0.5", "0 .1 .1 .1 .1 .9"])
def test_a_line_that_is_no_box_is_a_bad_row(tmp_path: Path, line: str) -> None:
    [(number, row)] = bad(read(yolo(tmp_path, {"a": f"0 0.5 0.5 0.1 0.1\n{line}\n"}), "yolo"))
    assert number == 1
    assert "a.txt, line 2" in row.found


def test_changed_boxes_are_other_data(tmp_path: Path) -> None:
    def digest() -> str:
        return fingerprint.content(files.find(DataSection.parse({"train": str(tmp_path), "format": "yolo"}))["train"][0])

    yolo(tmp_path, {"a": "0 0.5 0.5 0.1 0.1"})
    before = digest()
    assert digest() == before
    yolo(tmp_path, {"a": "0 0.5 0.5 0.1 0.2"})
    assert digest() != before


def test_a_folder_in_place_of_the_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "annotations.json").write_text("{}")
    with pytest.raises(InputError, match=r"is a folder; format coco needs the JSON file .*: name it, as in .*/annotations\.json"):
        read(tmp_path)


def test_a_folder_without_images_is_refused(tmp_path: Path) -> None:
    (tmp_path / "labels.csv").write_text("x")
    with pytest.raises(InputError, match="no image"):
        read(tmp_path, "yolo")
    with pytest.raises(InputError, match="is no image"):
        read(tmp_path / "labels.csv", "yolo")
