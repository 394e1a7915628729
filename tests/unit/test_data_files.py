from pathlib import Path
from typing import Any

import pytest

from orchestrator.config import DataSection
from orchestrator.data import files, fingerprint
from orchestrator.errors import InputError


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Some data files, in the working directory."""
    for name in ("reviews.csv", "parts/a.csv", "parts/b.csv", "parts/deep/c.csv", "parts/README.md", "parts/.hidden.csv", "notes.log"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("text,label\na,b\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def names(train: str | list[str], split: str = "train", **options: Any) -> list[str]:
    return [file.name for file in files.find(DataSection.parse({"train": train, **options}))[split]]


def test_paths_globs_folders_and_lists(folder: Path) -> None:
    assert names("reviews.csv") == ["reviews.csv"]
    assert names(str(folder / "reviews.csv")) == ["reviews.csv"]
    assert names((folder / "reviews.csv").as_uri()) == ["reviews.csv"]
    assert names("parts/*.csv") == ["a.csv", "b.csv"]
    assert names("parts/**/*.csv") == ["a.csv", "b.csv", "deep/c.csv"]
    assert names("part?/[ab].csv") == ["a.csv", "b.csv"]
    assert names("parts") == ["a.csv", "b.csv", "deep/c.csv"]
    assert names(["parts/b.csv", "reviews.csv", "parts/*.csv"]) == ["parts/b.csv", "reviews.csv", "parts/a.csv"]


def test_a_name_with_glob_signs_that_exists_is_that_file(folder: Path) -> None:
    (folder / "odd[1].csv").write_text("text\na\n")
    assert names("odd[1].csv") == ["odd[1].csv"]


def test_names_are_unique_over_all_splits(folder: Path) -> None:
    (folder / "test").mkdir()
    (folder / "test" / "a.csv").write_text("text,label\n")
    found = files.find(DataSection(train="parts/a.csv", test="test/a.csv"))
    assert [file.name for split in found.values() for file in split] == ["parts/a.csv", "test/a.csv"]


def test_class_folders_are_seen_and_can_be_said(folder: Path) -> None:
    for name in ("news/sport/1.txt", "news/sport/2.txt.gz", "news/art/1.txt"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("text")
    found = files.find(DataSection(train="news"))["train"]
    assert [(file.name, file.label, file.format) for file in found] == [
        ("art/1.txt", "art", "folder"),
        ("sport/1.txt", "sport", "folder"),
        ("sport/2.txt.gz", "sport", "folder"),
    ]
    with pytest.raises(InputError, match=r"'loose.txt' lies in 'news' itself"):
        (folder / "news" / "loose.txt").write_text("x")
        names("news", format="folder")


def test_a_saved_dataset_dict_brings_its_splits(folder: Path) -> None:
    import datasets

    def some(*texts: str) -> Any:
        return datasets.Dataset.from_dict({"text": list(texts)})

    datasets.DatasetDict({"train": some("a", "b"), "dev": some("c"), "test": some("d")}).save_to_disk("saved")
    found = files.find(DataSection(train="saved"))
    assert {split: [file.name for file in some] for split, some in found.items()} == {
        "train": ["train/data-00000-of-00001.arrow"],
        "validation": ["dev/data-00000-of-00001.arrow"],
        "test": ["test/data-00000-of-00001.arrow"],
    }
    assert names("saved/train") == ["data-00000-of-00001.arrow"]
    with pytest.raises(InputError, match=r"has no split 'test'; it has 'train', 'extra'"):
        datasets.DatasetDict({"train": some("a"), "extra": some("b")}).save_to_disk("other")
        names("reviews.csv", test="other")


@pytest.mark.parametrize(
    ("train", "options", "says"),
    [
        ("reviws.csv", {}, "data.train: there is no file 'reviws.csv'. Did you mean '.*reviews.csv'"),
        ("parst/a.csv", {}, "there is no file 'parst/a.csv'. Did you mean '.*/parts'"),
        ("quite-other.csv", {}, "In '.*' there is .*'reviews.csv'"),
        ("parts/*.tsv", {}, r"no file matches 'parts/\*.tsv'. In '.*parts' there is "),
        ("notes.log", {}, r"the ending of 'notes.log' names no known format \(.csv, .tsv.*say it with data.format"),
        (".", {}, r"in the folder '.', 'notes.log' has no known format; name a glob such as ./\*.csv"),
        ("empty", {}, "the folder 'empty' has no files"),
        ("reviews.csv", {"format": "folder"}, "is a file; format folder needs a folder"),
        (["reviews.csv", "a.jsonl"], {}, r"mixes formats: csv \(reviews.csv\), jsonl \(a.jsonl\)"),
        ("a.parquet.gz", {}, "parquet files compress inside"),
        ("ftp://host/a.csv", {}, "'ftp://host/a.csv' can't be opened.*There is local, file://, s3://"),
        ([], {}, "data.train is an empty list"),
        ("example://nothing", {}, "there is no example 'nothing'"),
        ("reviews.csv", {"test": "tests.csv"}, "data.test: there is no file 'tests.csv'"),
    ],
)
def test_what_is_not_there_is_named_with_what_is(folder: Path, train: Any, options: dict[str, Any], says: str) -> None:
    (folder / "empty").mkdir()
    (folder / "a.jsonl").write_text("{}")
    (folder / "a.parquet.gz").write_text("")
    with pytest.raises(InputError, match=says):
        names(train, **options)


def test_format_overrides_the_ending(folder: Path) -> None:
    [file] = files.find(DataSection(train="notes.log", format="csv"))["train"]
    assert (file.format, file.size) == ("csv", (folder / "notes.log").stat().st_size)


def test_a_file_gone_before_it_is_read_names_the_machine(folder: Path) -> None:
    [file] = files.find(DataSection(train="reviews.csv"))["train"]
    (folder / "reviews.csv").unlink()
    with pytest.raises(InputError, match="put the data on storage that every node of the cluster reads"):
        file.open_stream()


def test_a_fingerprint_is_of_content_and_remembered_for_large_files(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ORCHESTRATOR_CACHE", str(folder / "cache"))
    one, other = files.find(DataSection(train=["parts/a.csv", "parts/b.csv"]))["train"]
    assert fingerprint.content(one) == fingerprint.content(other)
    monkeypatch.setattr(fingerprint, "REMEMBERED_FROM", 1)
    before = fingerprint.content(one)
    monkeypatch.setattr(fingerprint, "_digest", lambda path: pytest.fail(f"{path} was read again"))
    assert fingerprint.content(one) == before
    monkeypatch.undo()
    monkeypatch.setenv("ORCHESTRATOR_CACHE", str(folder / "cache"))
    monkeypatch.setattr(fingerprint, "REMEMBERED_FROM", 1)
    (folder / "parts" / "a.csv").write_text("text,label\nother,b\n")
    assert fingerprint.content(one) != before
