import bz2
import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.feather as feather
import pyarrow.parquet as pq
import pytest

from orchestrator.config import DataSection
from orchestrator.data import files, readers
from orchestrator.data.readers import BadRow
from orchestrator.errors import InputError


def read(path: Path, content: bytes | str | None = None, columns: list[str] | None = None, **options: Any) -> list[readers.Record]:
    if content is not None:
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    section = DataSection.parse({"train": str(path), **options})
    return [record for file in files.find(section)["train"] for record in readers.records(file, section, columns)]


def numbers(records: list[readers.Record]) -> list[int]:
    return [number for number, _ in records]


# ---- CSV -----------------------------------------------------------------------------------------------------
def test_csv_rows_are_numbered_by_the_line_where_they_start(tmp_path: Path) -> None:
    rows = read(tmp_path / "a.csv", 'text,label\nfine,good\n"two\nlines, ""quoted""",bad\n\nlast,good')
    assert rows == [
        (2, {"text": "fine", "label": "good"}),
        (3, {"text": 'two\nlines, "quoted"', "label": "bad"}),
        (6, {"text": "last", "label": "good"}),
    ]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_line_ends_of_every_system_are_read(tmp_path: Path, end: str) -> None:
    assert read(tmp_path / "a.csv", f"text,label{end}a,1{end}b,2{end}") == [
        (2, {"text": "a", "label": "1"}),
        (3, {"text": "b", "label": "2"}),
    ]


def test_a_byte_order_mark_is_no_part_of_the_first_name(tmp_path: Path) -> None:
    assert read(tmp_path / "a.csv", b"\xef\xbb\xbftext,label\na,1\n") == [(2, {"text": "a", "label": "1"})]


def test_delimiter_header_and_names(tmp_path: Path) -> None:
    assert read(tmp_path / "a.csv", "x;y\n", delimiter=";", header=False, names=["text", "label"]) == [(1, {"text": "x", "label": "y"})]
    assert read(tmp_path / "b.csv", "A,B\nx,y\n", names=["text", "label"]) == [(2, {"text": "x", "label": "y"})]
    assert read(tmp_path / "c.tsv", "text\tlabel\nx, z\ty\n") == [(2, {"text": "x, z", "label": "y"})]


def test_only_the_columns_asked_for_are_kept(tmp_path: Path) -> None:
    assert read(tmp_path / "a.csv", "id,text,label\n7,a,b\n", columns=["text"]) == [(2, {"text": "a"})]


def test_rows_with_another_number_of_fields_are_bad(tmp_path: Path) -> None:
    rows = read(tmp_path / "a.csv", "text,label\ngood, but dear,1\nb,2\nlonely\n")
    assert rows == [
        (2, BadRow(None, "2 fields (text, label)", "3 fields (good,  but dear, 1)")),
        (3, {"text": "b", "label": "2"}),
        (4, BadRow(None, "2 fields (text, label)", "1 field (lonely)")),
    ]


def test_text_after_a_closing_quote_is_bad_and_reading_goes_on(tmp_path: Path) -> None:
    rows = read(tmp_path / "a.csv", 'text,label\n"He said "hi" to me",1\nb,2\n')
    assert isinstance(rows[0][1], BadRow)
    assert rows[0][0] == 2
    assert "written twice" in rows[0][1].expected
    assert rows[1] == (3, {"text": "b", "label": "2"})


def test_a_quote_that_never_closes_names_its_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"a\.csv, line 3: a field opens with a quote that is not closed"):
        read(tmp_path / "a.csv", 'text,label\na,1\n"b,2\nc,3\nd,4\n')


def test_a_quote_that_stays_open_stops_before_memory_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "LINE_LIMIT", 1000)
    with pytest.raises(InputError, match=r"a\.csv, line 2: .*not closed up to line \d+"):
        read(tmp_path / "a.csv", 'text,label\n"b,2\n' + "c,3\n" * 1000)


def test_a_line_without_end_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "LINE_LIMIT", 1000)
    with pytest.raises(InputError, match=r"a\.jsonl, line 2: longer than 1,000 characters; is it really jsonl"):
        read(tmp_path / "a.jsonl", '{"text": "a"}\n{"text": "' + "b" * 2000 + '"}\n')


def test_a_nul_character_is_bad_and_names_the_column(tmp_path: Path) -> None:
    assert read(tmp_path / "a.csv", b"text,label\na\0b,1\n") == [(2, BadRow("text", "text", "a NUL character"))]


def test_two_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="two columns are called 'text'"):
        read(tmp_path / "a.csv", "text,text\na,b\n")


def test_names_must_be_as_many_as_the_header_has(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="gives 2 names, and the header line has 3 fields: a, b, c"):
        read(tmp_path / "a.csv", "a,b,c\n1,2,3\n", names=["text", "label"])


# ---- encodings -----------------------------------------------------------------------------------------------
def test_a_wrong_byte_is_named_with_offset_line_and_likely_encoding(tmp_path: Path) -> None:
    content = "text,label\nnice,pos\nun café là,neg\n".encode("cp1252")
    with pytest.raises(InputError) as caught:
        read(tmp_path / "a.csv", content)
    offset = content.index(b"\xe9")
    assert str(caught.value) == (
        f"a.csv, line 3: byte 0xE9 at offset {offset} is not valid utf-8. It looks like cp1252: "
        "set data.encoding: cp1252, or save the file as UTF-8."
    )
    assert read(tmp_path / "a.csv", encoding="cp1252")[1] == (3, {"text": "un café là", "label": "neg"})


def test_the_offset_is_right_far_into_a_file_and_of_the_unpacked_content(tmp_path: Path) -> None:
    begin = ("text,label\r\n" + "ein schöner Tag,gut\r\n" * 150_000).encode()
    (tmp_path / "a.csv.gz").write_bytes(gzip.compress(begin + b"\xff,gut\r\n", 1, mtime=0))
    with pytest.raises(InputError, match=rf"a\.csv\.gz, line 150002: byte 0xFF at offset {len(begin):,} \(of the unpacked content\)"):
        read(tmp_path / "a.csv.gz")


def test_a_character_cut_off_at_the_end_of_the_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"line 2: byte 0xC3 at offset 9 is not valid utf-8"):
        read(tmp_path / "a.csv", b"text,a\nb,\xc3")


@pytest.mark.parametrize(
    ("encoding", "text"),
    [
        ("gb18030", "这个手机的质量非常好，我很喜欢。"),
        ("cp1251", "Очень хороший телефон, рекомендую"),
        ("utf-16", "a nice phone"),
        ("utf-16-le", "a nice phone"),
        ("utf-16-be", "a nice phone"),
    ],
)
def test_encodings_are_guessed_and_the_guess_reads_the_file(tmp_path: Path, encoding: str, text: str) -> None:
    content = ("text,label\n" + f'"{text}",x\n' * 20).encode(encoding)
    with pytest.raises(InputError, match=f"looks like {encoding}"):
        read(tmp_path / "a.csv", content)
    assert read(tmp_path / "a.csv", encoding=encoding)[0] == (2, {"text": text, "label": "x"})


def test_an_unknown_encoding_is_refused_with_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no text encoding 'utf-88'. Did you mean 'utf-8'"):
        read(tmp_path / "a.csv", "text\na\n", encoding="utf-88")


# ---- JSON ----------------------------------------------------------------------------------------------------
def test_json_lines(tmp_path: Path) -> None:
    rows = read(tmp_path / "a.jsonl", '{"text": "a", "n": [1, 2]}\n\n{"text": "b",}\n["c"]\n{"text": "d"}')
    assert rows == [
        (1, {"text": "a", "n": [1, 2]}),
        (3, BadRow(None, "a JSON object", "Expecting property name enclosed in double quotes at column 14")),
        (4, BadRow(None, "a JSON object such as {…}", '["c"]')),
        (5, {"text": "d"}),
    ]


def test_a_json_array_is_read_object_by_object(tmp_path: Path) -> None:
    objects = [{"text": "x" * 5000, "n": {"deep": [number]}} for number in range(100)]
    assert read(tmp_path / "a.json", json.dumps(objects, indent=1)) == list(enumerate(objects, start=1))
    assert read(tmp_path / "b.json", " [ ] ") == []


def test_json_lines_in_a_json_file_are_recognised(tmp_path: Path) -> None:
    assert read(tmp_path / "a.json", '{"text": "a"}\n{"text": "b"}\n') == [(1, {"text": "a"}), (2, {"text": "b"})]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ('[\n{"text": "a"},\n{"text" "b"},\n' + '{"text": "c"},\n' * 20, "line 3: object 2 of the array is not JSON"),
        ('[\n{"text": "a"}\n{"text": "b"}]', r"line 3: expected ',' or '\]' after object 1 of the array, found '\{'"),
        ('[\n{"text": "a"},\n{"te', "the file ends after object 1"),
        ('[{"text": "a"}', "the file ends after object 1"),
        ('{\n "data": []\n}', r"expected an array of objects.*begins with '\{'"),
    ],
)
def test_a_broken_json_array_names_the_line(tmp_path: Path, content: str, says: str) -> None:
    with pytest.raises(InputError, match=says):
        read(tmp_path / "a.json", content)


# ---- tables --------------------------------------------------------------------------------------------------
TABLE = {"text": ["a", "b", None], "label": [0, 1, 1]}
ROWS = [(1, {"text": "a", "label": 0}), (2, {"text": "b", "label": 1}), (3, {"text": None, "label": 1})]


def test_parquet_and_arrow_in_both_forms(tmp_path: Path) -> None:
    table = pa.table(TABLE)
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=2)
    feather.write_feather(table, str(tmp_path / "a.feather"))
    with pa.OSFile(str(tmp_path / "a.arrow"), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    for name in ("a.parquet", "a.feather", "a.arrow"):
        assert read(tmp_path / name) == ROWS
        assert read(tmp_path / name, columns=["label"]) == [(number, {"label": row["label"]}) for number, row in ROWS]  # type: ignore[index]


def test_class_labels_of_datasets_become_names(tmp_path: Path) -> None:
    import datasets

    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["neg", "pos"])})
    data = datasets.Dataset.from_dict({"text": ["a", "b", "c"], "label": [1, 0, -1]}, features=features)
    data.to_parquet(str(tmp_path / "a.parquet"))
    data.save_to_disk(str(tmp_path / "saved"))
    expected = [(1, {"text": "a", "label": "pos"}), (2, {"text": "b", "label": "neg"}), (3, {"text": "c", "label": None})]
    assert read(tmp_path / "a.parquet") == expected
    assert read(tmp_path / "saved") == expected


def test_a_table_without_a_required_column_names_its_columns(tmp_path: Path) -> None:
    pq.write_table(pa.table(TABLE), tmp_path / "a.parquet")
    section = DataSection(train=str(tmp_path / "a.parquet"))
    [file] = files.find(section)["train"]
    with pytest.raises(InputError, match=r"a\.parquet has no column 'stars', which the job reads; its columns are 'text', 'label'"):
        list(readers.records(file, section, ["text", "stars"], ["text", "stars"]))


# ---- files ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("ending", "pack"), [(".gz", gzip.compress), (".bz2", bz2.compress)])
def test_compressed_text_is_read(tmp_path: Path, ending: str, pack: Any) -> None:
    assert read(tmp_path / f"a.csv{ending}", pack(b"text\na\n")) == [(2, {"text": "a"})]


def test_a_gzip_file_of_several_members_is_read_whole(tmp_path: Path) -> None:
    assert numbers(read(tmp_path / "a.csv.gz", gzip.compress(b"text\na\n", mtime=0) + gzip.compress(b"b\n"))) == [2, 3]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv.gz", gzip.compress(b"text\n" + b"a\n" * 1000, mtime=0)[:-9]),
        ("a.csv.gz", b"text\na\n"),
        ("a.parquet", b"PAR1 but not really"),
        ("a.arrow", b"text,label\na,b\n"),
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, name: str, content: bytes) -> None:
    with pytest.raises(InputError, match=f"{name} is damaged or not a"):
        read(tmp_path / name, content)


def test_text_files_have_their_folder_as_label(tmp_path: Path) -> None:
    for label, name, text in (("neg", "1.txt", "poor\nthing"), ("pos", "1.txt", "fine"), ("pos", "2.txt", "great")):
        (tmp_path / "reviews" / label).mkdir(parents=True, exist_ok=True)
        (tmp_path / "reviews" / label / name).write_text(text)
    rows = read(tmp_path / "reviews")
    assert [values for _, values in rows] == [
        {"text": "poor\nthing", "label": "neg"},
        {"text": "fine", "label": "pos"},
        {"text": "great", "label": "pos"},
    ]
