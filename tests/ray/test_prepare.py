import gzip
import hashlib
import json
import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from orchestrator.config import DataSection, JobConfig
from orchestrator.data import fingerprint, sources, spool
from orchestrator.data.prepare import prepare
from orchestrator.errors import InputError
from orchestrator.progress import Silent
from orchestrator.records import PreparedData
from orchestrator.storage import Folder

pytestmark = pytest.mark.usefixtures("ray_session")


class Said(Silent):
    """A display that keeps what was said."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.warned: list[str] = []

    def say(self, sentence: str) -> None:
        self.said.append(sentence)

    def warn(self, sentence: str) -> None:
        self.warned.append(sentence)


@pytest.fixture
def display() -> Said:
    return Said()


@pytest.fixture
def storage(tmp_path: Path) -> Folder:
    return Folder(str(tmp_path / "storage"))


def job(train: Any, task: Any = "text-classification", **data: Any) -> JobConfig:
    return JobConfig.parse(
        {"task": task, "model": {"base": "none"}, "data": {"train": str(train) if isinstance(train, Path) else train, **data}}
    )


def reviews(path: Path, rows: int, labels: str = "ab", begin: int = 0) -> Path:
    """A CSV of texts that all differ, labels in turn."""
    lines = [f"review number {number},{labels[number % len(labels)]}\n" for number in range(begin, begin + rows)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("text,label\n" + "".join(lines))
    return path


def table(prepared: PreparedData, split: str) -> pa.Table:
    files = [pq.read_table(f"{prepared.root}/{file.path}", partitioning=None) for file in prepared.splits[split].files]
    assert [file.num_rows for file in files] == [file.rows for file in prepared.splits[split].files]
    assert all(file["_row"].to_pylist() == list(range(file.num_rows)) for file in files)
    return pa.concat_tables(files)


def ids(prepared: PreparedData) -> dict[str, list[str]]:
    return {split: table(prepared, split)["row_id"].to_pylist() if prepared.splits[split].rows else [] for split in prepared.splits}


def contents(root: str) -> dict[str, str]:
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(Path(root).rglob("*.parquet"))
    }  # fmt: skip


# ---- splits --------------------------------------------------------------------------------------------------
def test_every_row_is_in_one_split_with_exact_shares_of_each_label(tmp_path: Path, storage: Folder, display: Said) -> None:
    prepared = prepare(job(reviews(tmp_path / "reviews.csv", 1000, "aaab")), storage, display)
    found = ids(prepared)
    assert {split: len(rows) for split, rows in found.items()} == {"train": 800, "validation": 100, "test": 100}
    assert sorted(row for rows in found.values() for row in rows) == sorted(f"reviews.csv:{line}" for line in range(2, 1002))
    for split, share in (("train", 0.8), ("validation", 0.1), ("test", 0.1)):
        assert prepared.observed[split] == {"rows": 1000 * share, "labels": {"a": 750 * share, "b": 250 * share}}
        assert prepared.splits[split].rows == 1000 * share
    assert prepared.task.labels == ("a", "b")  # type: ignore[attr-defined]
    assert (prepared.rows_read, prepared.rows_bad, prepared.quarantine) == (1000, 0, None)
    row = table(prepared, "test").to_pylist()[0]
    line = int(row["row_id"].partition(":")[2])
    assert row["text"] == f"review number {line - 2}"
    assert table(prepared, "train")["row_id"].to_pylist() != sorted(found["train"])
    assert display.said[-1].startswith("1,000 rows: 800 train, 100 validation, 100 test, from 1 file")


def test_splits_of_their_own_are_used_as_they_are(tmp_path: Path, storage: Folder, display: Said) -> None:
    train, test = reviews(tmp_path / "train" / "r.csv", 100), reviews(tmp_path / "test" / "r.csv", 20, begin=100)
    prepared = prepare(job(train, test=str(test)), storage, display)
    found = ids(prepared)
    assert {split: len(rows) for split, rows in found.items()} == {"train": 90, "validation": 10, "test": 20}
    assert set(found["test"]) == {f"test/r.csv:{line}" for line in range(2, 22)}
    assert all(row.startswith("train/r.csv:") for row in found["train"] + found["validation"])
    assert prepared.sources == {"train": (str(train),), "test": (str(test),)}


def test_groups_never_cross_splits(tmp_path: Path, storage: Folder, display: Said) -> None:
    rng = random.Random(1)
    group = {f"text {number}": rng.randrange(60) for number in range(600)}
    lines = [f"{text},{'ab'[number % 2]},customer {who}\n" for number, (text, who) in enumerate(group.items())]
    (tmp_path / "r.csv").write_text("text,label,customer\n" + "".join(lines))
    prepared = prepare(job(tmp_path / "r.csv", split={"group": "customer"}), storage, display)
    seen = {split: {group[text] for text in table(prepared, split)["text"].to_pylist()} for split in prepared.splits}
    assert not seen["train"] & seen["validation"] and not seen["train"] & seen["test"] and not seen["validation"] & seen["test"]
    assert abs(prepared.splits["test"].rows - 60) <= 12
    with pytest.raises(InputError, match=r"data.split.group: there is no column 'costumer' in data.train. Did you mean 'customer'"):
        prepare(job(tmp_path / "r.csv", split={"group": "costumer"}), storage, display)


def test_without_shares_all_rows_train(tmp_path: Path, storage: Folder, display: Said) -> None:
    prepared = prepare(job(reviews(tmp_path / "r.csv", 10), split={"validation": 0, "test": 0}), storage, display)
    assert {split: part.rows for split, part in prepared.splits.items()} == {"train": 10, "validation": 0, "test": 0}
    assert display.warned == ["Classes with fewer than 10 training rows: 'a' (5), 'b' (5)."]


# ---- the same every time -------------------------------------------------------------------------------------
def test_the_same_data_gives_the_same_bytes_wherever_it_lies(tmp_path: Path, display: Said, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "TASK_BYTES", 1000)
    for place in ("one", "two"):
        for part in range(5):
            reviews(tmp_path / place / f"{part}.csv", 200, "abc", begin=200 * part)
    one = prepare(job(str(tmp_path / "one" / "*.csv")), Folder(str(tmp_path / "a")), display)
    two = prepare(job(str(tmp_path / "two")), Folder(str(tmp_path / "b")), display)
    assert one.fingerprint == two.fingerprint
    assert contents(one.root) == contents(two.root) != {}
    other = prepare(job(str(tmp_path / "one"), split={"seed": 7}), Folder(str(tmp_path / "a")), display)
    assert other.fingerprint != one.fingerprint
    assert ids(other)["test"] != ids(one)["test"]


def test_unchanged_data_is_not_prepared_again(tmp_path: Path, storage: Folder, display: Said, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ORCHESTRATOR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(fingerprint, "REMEMBERED_FROM", 1)
    path = reviews(tmp_path / "r.csv", 50)
    first = prepare(job(path), storage, display)
    assert prepare(job(path), storage, display) == first
    assert display.said[-1].startswith("prepared before from the same data, reused: 50 rows: 40 train")
    reviews(path, 51)
    assert prepare(job(path), storage, display).fingerprint != first.fingerprint
    assert not display.said[-1].startswith("prepared before")


def test_a_folder_that_lost_a_file_is_prepared_again(tmp_path: Path, storage: Folder, display: Said) -> None:
    path = reviews(tmp_path / "r.csv", 50)
    first = prepare(job(path), storage, display)
    before = contents(first.root)
    Path(first.root, first.splits["test"].files[0].path).unlink()
    assert prepare(job(path), storage, display) == first
    assert contents(first.root) == before


def test_leftovers_of_a_killed_build_are_removed_and_those_of_a_living_one_stay(tmp_path: Path, storage: Folder, display: Said) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True, check=True
    ).stdout.strip()
    host = os.uname().nodename
    dead, alive = (Path(storage.path, "prepared", f".abc.{host}.{pid}.0.tmp") for pid in (ended, os.getpid()))
    for folder in (dead, alive):
        (folder / "train").mkdir(parents=True)
    prepare(job(reviews(tmp_path / "r.csv", 50)), storage, display)
    assert not dead.exists()
    assert alive.exists()


def test_storage_by_uri_and_in_place(tmp_path: Path, display: Said, monkeypatch: pytest.MonkeyPatch) -> None:
    path = reviews(tmp_path / "r.csv", 50)
    by_uri = prepare(job(path), Folder((tmp_path / "a").as_uri()), display)
    assert sum(part.rows for part in by_uri.splits.values()) == 50
    # An object store has no rename: the files are written where they stay.
    monkeypatch.setattr(Folder, "is_local", property(lambda self: False))
    in_place = prepare(job(path), Folder((tmp_path / "b").as_uri()), display)
    assert in_place.root.startswith("file://")
    root = in_place.root.removeprefix("file://")
    assert contents(root) == contents(by_uri.root)
    assert sorted(path.name for path in Path(root).iterdir()) == ["manifest.json", "test", "train", "validation"]
    with pytest.raises(InputError):
        prepare(job(reviews(path, 50, "a")), Folder((tmp_path / "b").as_uri()), display)
    assert list((tmp_path / "b" / "prepared").iterdir()) == [Path(root)]


# ---- much data in little memory ------------------------------------------------------------------------------
def test_many_spools_and_many_files_hold_each_row_once(tmp_path: Path, storage: Folder, display: Said) -> None:
    rng = random.Random(0)
    with (tmp_path / "r.jsonl").open("w") as target:
        for number in range(90_000):
            target.write(json.dumps({"text": f"{number} {rng.random()} " + "word " * rng.randrange(300), "label": number % 3}) + "\n")
    assert (tmp_path / "r.jsonl").stat().st_size > spool.SPOOL_BYTES
    prepared = prepare(job(tmp_path / "r.jsonl"), storage, display)
    found = ids(prepared)
    assert sorted(row for rows in found.values() for row in rows) == sorted(f"r.jsonl:{line}" for line in range(1, 90_001))
    assert {split: len(rows) for split, rows in found.items()} == {"train": 72_000, "validation": 9_000, "test": 9_000}
    files = prepared.splits["train"].files
    assert len(files) >= 3
    sizes = [file.rows for file in files]
    assert max(sizes) < 1.1 * min(sizes)
    for file in files:
        parquet = pq.ParquetFile(f"{prepared.root}/{file.path}")
        assert parquet.metadata.num_row_groups == 1
        lines = [int(row.partition(":")[2]) for row in parquet.read()["row_id"].to_pylist()]
        assert abs(sum(lines) / len(lines) - 45_000) < 2_000
    assert not [path for path in Path(prepared.root).iterdir() if path.name not in ("manifest.json", "train", "validation", "test")]


# ---- formats -------------------------------------------------------------------------------------------------
def test_every_format_gives_the_same_rows(tmp_path: Path, storage: Folder, display: Said) -> None:
    rows = [{"text": f'text, {number}\n"quoted"', "label": "xy"[number % 2]} for number in range(40)]
    packed = pa.Table.from_pylist(rows)

    def quote(text: str) -> str:
        return '"' + text.replace('"', '""') + '"'

    (tmp_path / "r.csv").write_text("text,label\n" + "".join(f"{quote(row['text'])},{row['label']}\n" for row in rows))
    (tmp_path / "r.tsv").write_text("text\tlabel\n" + "".join(f"{quote(row['text'])}\t{row['label']}\n" for row in rows))
    (tmp_path / "r.jsonl.gz").write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    (tmp_path / "r.json").write_text(json.dumps(rows))
    pq.write_table(packed, tmp_path / "r.parquet")
    with pa.OSFile(str(tmp_path / "r.arrow"), "wb") as sink, pa.ipc.new_stream(sink, packed.schema) as writer:
        writer.write_table(packed)
    for number, row in enumerate(rows):
        (tmp_path / "folder" / row["label"]).mkdir(parents=True, exist_ok=True)
        (tmp_path / "folder" / row["label"] / f"{number:02}.txt").write_text(row["text"])
    everything = Counter((row["text"], row["label"]) for row in rows)
    for name in ("r.csv", "r.tsv", "r.jsonl.gz", "r.json", "r.parquet", "r.arrow", "folder"):
        prepared = prepare(job(tmp_path / name), storage, display)
        seen = pa.concat_tables([table(prepared, split) for split in prepared.splits]).to_pylist()
        assert Counter((row["text"], row["label"]) for row in seen) == everything, name
        assert len({row["row_id"] for row in seen}) == 40, name


def test_lists_of_labels_and_numbers_keep_their_types(tmp_path: Path, storage: Folder, display: Said) -> None:
    (tmp_path / "many.jsonl").write_text(
        "".join(json.dumps({"text": f"t {n}", "label": [["a"], [], ["a", "b"]][n % 3]}) + "\n" for n in range(30))
    )
    prepared = prepare(job(tmp_path / "many.jsonl", {"name": "text-classification", "problem": "multi-label"}), storage, display)
    assert table(prepared, "train").schema.field("label").type == pa.list_(pa.string())
    (tmp_path / "score.csv").write_text("text,label\n" + "".join(f"t {n},{n / 4}\n" for n in range(30)))
    prepared = prepare(job(tmp_path / "score.csv", {"name": "text-classification", "problem": "regression"}), storage, display)
    assert table(prepared, "train").schema.field("label").type == pa.float64()


# ---- bad input -----------------------------------------------------------------------------------------------
BAD = [
    ("text,label\n" + "a,x\nb,y\n" * 5 + "one, two,x\n", {}, [r"r.csv, row 12: expected 2 fields (text, label), found 3 fields (one,  two, x).", "data.max_bad_rows"]),
    ("text,label\n" + "a,x\nb,y\n" * 5 + " ,x\n", {}, ["r.csv, row 12, column 'text': expected a text that is not empty, found ' '."]),
    ("review,label\n" + "a,x\nb,y\n" * 5 + "c,\n", {"columns": {"text": "review"}}, ["r.csv, row 12, column 'label': expected a label, found ''."]),
    ("text,label\n" + "a,x\nb,y\n" * 5 + "c,x\n" + "\xff", {}, ["r.csv, line 13: byte 0xFF at offset 55 is not valid utf-8"]),
    ("text,label\n" + "a,x\nb,x\n" * 5, {}, ["All 8 training rows have the label 'x'"]),
    ("text,label\n" + "a,x\nb,y\n" * 50 + "c,Y \n" * 40, {}, ["Labels differ only by case or spaces: 'y' (50 rows) and 'Y ' (40 rows)"]),
    ("review,label\na,x\n", {}, ["data.train: there is no column 'text'", "The columns are 'label', 'review'", "--set data.columns.text=review"]),
    ("text,label\n", {}, ["data.train: r.csv has no rows."]),
    ("", {}, ["r.csv is empty"]),
    ("text,label\n" + "a,x\nb,y\n" * 200 + '"open,x\n' + "c,x\n" * 9, {}, ["r.csv, line 402: a field opens with a quote that is not closed"]),
]  # fmt: skip


@pytest.mark.parametrize(("content", "options", "says"), BAD)
def test_bad_data_is_a_sentence_and_nothing_stays(
    tmp_path: Path, storage: Folder, display: Said, content: str, options: dict, says: list[str]
) -> None:
    (tmp_path / "r.csv").write_bytes(content.encode("latin-1"))
    with pytest.raises(InputError) as caught:
        prepare(job(tmp_path / "r.csv", **options), storage, display)
    for sentence in says:
        assert sentence in str(caught.value)
    assert not storage.exists() or not list(Path(f"{storage}/prepared").iterdir())


def test_labels_that_train_lacks_are_named_with_their_split(tmp_path: Path, storage: Folder, display: Said) -> None:
    train, test = reviews(tmp_path / "r.csv", 50, "ab"), reviews(tmp_path / "t.csv", 9, "abc")
    with pytest.raises(InputError, match=r"The test split has labels that no training row has: 'c' \(3 rows\)"):
        prepare(job(train, test=str(test)), storage, display)


def test_bad_rows_within_the_share_are_listed_and_left_out(tmp_path: Path, storage: Folder, display: Said) -> None:
    path = reviews(tmp_path / "r.csv", 97)
    path.write_text(path.read_text() + "too,many,fields\n,a\nno label,\n")
    with pytest.raises(
        InputError,
        match=r"Bad rows \(3.00%; data.max_bad_rows allows 0.02\):\n  r.csv, row 99: .*\n  r.csv, row 100, .*\n  r.csv, row 101, ",
    ):
        prepare(job(path, max_bad_rows=0.02), storage, display)
    prepared = prepare(job(path, max_bad_rows=0.03), storage, display)
    assert (prepared.rows_read, prepared.rows_bad) == (100, 3)
    assert sum(part.rows for part in prepared.splits.values()) == 97
    assert prepared.quarantine is not None
    assert [json.loads(line) for line in Path(prepared.quarantine).read_text().splitlines()] == [
        {
            "file": "r.csv",
            "row": 99,
            "column": None,
            "expected": "2 fields (text, label)",
            "found": "3 fields (too, many, fields)",
            "row_id": "r.csv:99",
        },
        {"file": "r.csv", "row": 100, "column": "text", "expected": "a text that is not empty", "found": "", "row_id": "r.csv:100"},
        {"file": "r.csv", "row": 101, "column": "label", "expected": "a label", "found": "", "row_id": "r.csv:101"},
    ]
    assert f"3 bad rows of 100 (3.00%) left out; they are listed in {prepared.quarantine}." in display.warned


def test_reading_stops_early_where_no_bad_row_is_allowed(tmp_path: Path, storage: Folder, display: Said) -> None:
    (tmp_path / "r.csv").write_text("text,label\na,b\n" + ",b\n" * 5000)
    with pytest.raises(InputError, match=r"(?s)Bad rows \(100 of the 101 read; .*… and 95 more"):
        prepare(job(tmp_path / "r.csv"), storage, display)


def test_missing_values_of_json_rows_are_bad(tmp_path: Path, storage: Folder, display: Said) -> None:
    (tmp_path / "r.jsonl").write_text('{"text": "a", "label": NaN}\n{"text": "a"}\n{"label": "x"}\n{"text": "a", "label": "x"}\n')
    with pytest.raises(InputError) as caught:
        prepare(job(tmp_path / "r.jsonl"), storage, display)
    assert "r.jsonl, row 1, column 'label': expected a label, found 'nan'" in str(caught.value)
    assert "r.jsonl, row 2, column 'label': expected a label, found None" in str(caught.value)
    assert "r.jsonl, row 3, column 'text': expected a text, found None" in str(caught.value)


def test_duplicates_and_leaks_are_said_with_their_rows(tmp_path: Path, storage: Folder, display: Said) -> None:
    path = reviews(tmp_path / "r.csv", 100)
    path.write_text(path.read_text() + "review number 0,b\n")
    test = reviews(tmp_path / "t.csv", 10)
    prepare(job(path, test=str(test), split={"validation": 0}), storage, display)
    said = "\n".join(display.warned)
    assert "11 rows (9.9%) repeat the text of another row, for example " in said
    assert "10 rows of test have the same text as a training row" in said
    assert "1 input has different labels in different rows, for example r.csv:2 and r.csv:102." in said


def test_a_full_disk_is_said(tmp_path: Path, storage: Folder, display: Said) -> None:
    """/dev/full refuses every byte, as a full disk does."""
    reading = spool.Reading(
        task=job("none").task, section=DataSection(train="none"), split="train", mapping={"text": "text", "label": "label"}, index=0, buckets=8,
        files=tuple(sources.peek(job(reviews(tmp_path / "r.csv", 20)).data).files), spool=Folder(str(tmp_path / "full")),
    )  # fmt: skip
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "train-000000-000000.arrow").symlink_to("/dev/full")
    [report] = [row for part in reading() for row in part.to_pylist()]
    assert report["error"].startswith("storage: the disk is full")


# ---- reading for prediction ----------------------------------------------------------------------------------
def test_read_gives_every_row_with_its_columns_and_what_is_bad(ray_session: Any, tmp_path: Path) -> None:
    (tmp_path / "r.csv").write_text("text,n\na,1\nb\nc,3\n")
    rows = sources.read(DataSection(train=str(tmp_path / "r.csv"))).take_all()
    assert [row["row_id"] for row in rows] == ["r.csv:2", "r.csv:3", "r.csv:4"]
    assert [(row["text"], row["n"]) for row in rows] == [("a", "1"), (None, None), ("c", "3")]
    assert json.loads(rows[1]["_bad"]) == {"column": None, "expected": "2 fields (text, n)", "found": "1 field (b)"}


def test_read_yields_blocks_of_bounded_size(ray_session: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "r.jsonl").write_text("".join(json.dumps({"text": "x" * 1000}) + "\n" for _ in range(20_000)))
    section = DataSection(train=str(tmp_path / "r.jsonl"))
    blocks = [block.num_rows for block in sources._Blocks(section, tuple(sources.peek(section).files), ())()]
    assert sum(blocks) == 20_000
    assert len(blocks) >= 3
