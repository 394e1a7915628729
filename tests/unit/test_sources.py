from pathlib import Path
from typing import Any

import pytest

from orchestrator.config import DataSection
from orchestrator.data import sources
from orchestrator.data.files import SourceFile
from orchestrator.errors import InputError
from orchestrator.tasks.base import Column

ROLES = {
    "text": Column(kind="text", help="the text"),
    "text_pair": Column(kind="text", required=False),
    "label": Column(kind="label", target=True),
}


def section(path: Path, content: str, **options: Any) -> DataSection:
    path.write_text(content)
    return DataSection.parse({"train": str(path), **options})


def test_peek_shows_columns_rows_and_what_is_bad(tmp_path: Path) -> None:
    peek = sources.peek(section(tmp_path / "a.csv", "review,stars\nfine,5\nbad,1,extra\npoor,2\n"), rows=3)
    assert peek.columns == ("review", "stars")
    assert peek.rows == ({"review": "fine", "stars": "5"}, {"review": "poor", "stars": "2"})
    assert peek.bad == ("a.csv, row 3: expected 2 fields (review, stars), found 3 fields (bad, 1, extra).",)
    assert (peek.format, [file.name for file in peek.files], peek.size) == ("csv", ["a.csv"], 39)


def test_peek_reads_no_further_than_asked(tmp_path: Path) -> None:
    asked = section(tmp_path / "a.jsonl", '{"a": 1}\n{"b": 2}\n' + "\xff" * 10)
    assert sources.peek(asked, rows=2).columns == ("a", "b")


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.csv", "", "a.csv is empty: not even a header line"),
        ("a.csv", "text,label\n", "data.train: a.csv has no rows"),
        ("a.jsonl", "\n\n", "data.train: a.jsonl has no rows"),
        ("a.json", "[]", "data.train: a.json has no rows"),
        ("a.jsonl", "[1]\n[2]\n", "none of the first 2 rows can be read.\na.jsonl, row 1: expected a JSON object"),
    ],
)
def test_peek_refuses_files_without_rows(tmp_path: Path, name: str, content: str, says: str) -> None:
    with pytest.raises(InputError, match=says):
        sources.peek(section(tmp_path / name, content))


def test_roles_are_mapped_by_name_or_by_the_job() -> None:
    asked = DataSection(train="a.csv", columns={"text": "review"})
    assert sources.map_columns(asked, ROLES, ["id", "review", "label"]) == {"text": "review", "label": "label"}
    assert sources.map_columns(asked, ROLES, ["review", "text_pair", "label"]) == {
        "text": "review",
        "text_pair": "text_pair",
        "label": "label",
    }


def test_prediction_needs_no_target() -> None:
    asked = DataSection(train="a.csv", columns={"text": "review", "label": "stars"})
    assert sources.map_columns(asked, ROLES, ["review"], targets=False) == {"text": "review"}


@pytest.mark.parametrize(
    ("columns", "there", "says"),
    [
        ({}, ["review", "label"], "there is no column 'text' for the role 'text' (the text). The columns are 'label', 'review'."),
        ({}, ["review", "label"], "data.columns: {text: review}, or --set data.columns.text=review"),
        ({"text": "reveiw"}, ["id", "label", "review"], "The columns are 'review', "),
        ({"text": "reveiw"}, ["id", "label", "review"], "--set data.columns.text=review"),
        ({"text_pair": "question"}, ["text", "label"], "there is no column 'question' for the role 'text_pair'"),
        ({"txet": "review"}, ["text", "label"], "the task has no role 'txet'. Did you mean 'text'?"),
        ({}, ["text;label"], "They look separated by ';': set data.delimiter: ';'"),
    ],
)
def test_a_missing_column_is_named_with_those_there_are(columns: dict[str, str], there: list[str], says: str) -> None:
    with pytest.raises(InputError) as caught:
        sources.map_columns(DataSection(train="a.csv", columns=columns), ROLES, there, where="data.train")
    assert says in str(caught.value)


def test_small_files_are_read_together_and_large_ones_alone() -> None:
    def file(size: int, compression: str | None = None) -> SourceFile:
        return SourceFile(uri=f"/{size}", name=str(size), format="csv", size=size, compression=compression)

    sizes = [[one.size for one in task] for task in sources.tasks_of([file(1_000_000)] * 20 + [file(50_000_000), file(1), file(2)])]
    assert sizes == [[1_000_000] * 16, [1_000_000] * 4 + [50_000_000], [1, 2]]
    assert len(sources.tasks_of([file(4_000_000, "gzip")] * 3)) == 3


def test_a_column_of_several_kinds_comes_as_text() -> None:
    assert sources.column([1, "one", None, {"a": [1]}]).to_pylist() == ["1", "one", None, '{"a": [1]}']
    assert sources.column([1, None, 2]).to_pylist() == [1, None, 2]
