"""Reading the nested JSON of SQuAD, and plain text."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from orchestrator.config import DataSection
from orchestrator.data import files, readers, sources
from orchestrator.data.readers import BadRow
from orchestrator.errors import InputError


def read(path: Path, content: Any, columns: list[str] | None = None, **options: Any) -> list[readers.Record]:
    text = content if isinstance(content, (str, bytes)) else json.dumps(content)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    section = DataSection.parse({"train": str(path), **options})
    return [record for file in files.find(section)["train"] for record in readers.records(file, section, columns)]


def question(number: int, **more: Any) -> dict[str, Any]:
    return {"id": f"q{number}", "question": f"who is {number}?", "answers": [{"text": "Ada", "answer_start": 0}], **more}


SQUAD = {
    "version": "v2.0",
    "data": [
        {"title": "One", "paragraphs": [{"context": "Ada is 1", "qas": [question(1), question(2, answers=[], is_impossible=True)]}]},
        {"title": "Two", "paragraphs": [{"context": "Ada is 3", "qas": [question(3)]}, {"context": "Ada", "qas": []}]},
    ],
}
ROWS = [
    (1, {"title": "One", "context": "Ada is 1", **question(1)}),
    (2, {"title": "One", "context": "Ada is 1", **question(2, answers=[], is_impossible=True)}),
    (3, {"title": "Two", "context": "Ada is 3", **question(3)}),
]


def test_each_question_is_a_row_with_its_context(tmp_path: Path) -> None:
    assert read(tmp_path / "a.json", SQUAD) == ROWS
    assert read(tmp_path / "b.json", json.dumps(SQUAD, indent=2).replace("\n", "\r\n")) == ROWS
    assert read(tmp_path / "c.json", {"data": SQUAD["data"], "version": "1.1"}) == ROWS
    assert read(tmp_path / "d.json.gz", gzip.compress(json.dumps(SQUAD).encode())) == ROWS
    assert read(tmp_path / "e.txt", SQUAD, format="squad") == ROWS
    assert read(tmp_path / "f.json", SQUAD, columns=["question"]) == [(number, {"question": row["question"]}) for number, row in ROWS]
    assert read(tmp_path / "g.json", "\ufeff" + json.dumps(SQUAD)) == ROWS


def test_rows_have_ids_by_running_number(tmp_path: Path) -> None:
    read(tmp_path / "a.json", SQUAD)
    [table] = list(
        sources._Blocks(DataSection(train="a.json"), tuple(files.find(DataSection(train=str(tmp_path / "a.json")))["train"]), ())()
    )
    assert table["row_id"].to_pylist() == ["a.json:1", "a.json:2", "a.json:3"]


def test_a_file_in_one_line_longer_than_a_line_may_be_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "LINE_LIMIT", 1000)
    many = {"data": [{"paragraphs": [{"context": "é" * 5000, "qas": [question(number)]} for number in range(100)]}]}
    rows = read(tmp_path / "a.json", many)
    assert [number for number, _ in rows] == list(range(1, 101))
    assert all(isinstance(row, dict) and len(row["context"]) == 5000 for _, row in rows)


def test_what_is_no_paragraph_or_question_is_a_bad_row_and_reading_goes_on(tmp_path: Path) -> None:
    broken = {"data": [{"paragraphs": [7, {"context": "x"}, {"context": "Ada", "qas": ["who?", question(2)]}, {"qas": [question(3)]}]}]}
    rows = read(tmp_path / "a.json", broken)
    assert [number for number, _ in rows] == [1, 2, 3, 4, 5]
    assert rows[0][1] == BadRow(None, 'a paragraph such as {"context": …, "qas": […]}', "7")
    assert rows[2][1] == BadRow(None, 'a question such as {"id": …, "question": …, "answers": […]}', '"who?"')
    assert rows[3][1] == {"context": "Ada", **question(2)}
    assert rows[4][1] == {"context": None, **question(3)}


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "expected the form of SQuAD.*found the end of the file"),
        ("{}", "has no 'data'"),
        ("[]", r"expected the form of SQuAD.*found '\['"),
        ('{"data": {}}', "expected the articles"),
        ('{"data": [1]}', "expected an article"),
        ('{"data": [\n{"paragraphs": 1}]}', "line 2: expected the paragraphs"),
        ('{"data": [{"paragraphs": [\n{"context": "a" "qas": []}]}]}' + " " * 99, "line 2: this is not JSON: Expecting ',' delimiter"),
        ('{"data": [{"paragraphs": [{"context": "a"', "this is not JSON"),
        ('{"data": [{"paragraphs": []}', r"expected ',' or '\]' after a value of an array, found the end of the file"),
        ('{"data" 1}', "expected ':' after a key"),
        ("{1: 2}", "expected a key in quotes"),
    ],
)
def test_a_broken_file_names_the_line(tmp_path: Path, content: str, says: str) -> None:
    with pytest.raises(InputError, match=says):
        read(tmp_path / "a.json", content, format="squad")


def test_other_objects_with_data_are_no_squad(tmp_path: Path) -> None:
    lines = '{"data": [{"x": 1}], "text": "a"}\n{"data": [], "text": "b"}\n'
    assert read(tmp_path / "a.json", lines) == [(1, {"data": [{"x": 1}], "text": "a"}), (2, {"data": [], "text": "b"})]
    with pytest.raises(InputError, match="expected an array of objects"):
        read(tmp_path / "b.json", '{"images": [{"id": 1}],\n "data": []}')


# ---- plain text ----------------------------------------------------------------------------------------------
def test_a_paragraph_of_plain_text_is_a_row_by_its_line(tmp_path: Path) -> None:
    content = "\ufeffFirst  one. \r\n\r\n \t\nSecond — 😀\nlast"
    assert read(tmp_path / "a.txt", content) == [(1, {"text": "First  one. "}), (4, {"text": "Second — 😀"}), (5, {"text": "last"})]
    assert read(tmp_path / "b.log", "one\n", format="text") == [(1, {"text": "one"})]
    assert read(tmp_path / "c.txt.gz", gzip.compress(b"one\ntwo\n")) == [(1, {"text": "one"}), (2, {"text": "two"})]
    assert read(tmp_path / "d.txt", "") == []


def test_plain_text_has_one_column(tmp_path: Path) -> None:
    read(tmp_path / "a.txt", "one\n")
    section = DataSection(train=str(tmp_path / "a.txt"))
    with pytest.raises(InputError, match=r"a\.txt has no column 'label', which the job reads; its columns are 'text'"):
        list(readers.records(files.find(section)["train"][0], section, ["label"], ["label"]))


def test_a_folder_of_texts_is_read_in_order(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt"):
        (tmp_path / name).write_text(f"{name}\n")
    section = DataSection(train=str(tmp_path))
    assert [row for file in files.find(section)["train"] for _, row in readers.records(file, section)] == [
        {"text": "a.txt"},
        {"text": "b.txt"},
    ]
