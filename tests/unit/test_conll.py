import gzip
from pathlib import Path
from typing import Any

import pytest

from orchestrator.config import DataSection
from orchestrator.data import conll, files, readers
from orchestrator.data.readers import BadRow
from orchestrator.errors import InputError


def read(path: Path, content: str | bytes, columns: list[str] | None = None, required: tuple[str, ...] = (), **options: Any) -> list[Any]:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    section = DataSection.parse({"train": str(path), **options})
    return [record for file in files.find(section)["train"] for record in readers.records(file, section, columns, required)]


@pytest.mark.parametrize("ending", ["conll", "bio", "iob", "iob2", "conllu"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_sentences_are_numbered_by_the_line_where_they_begin(tmp_path: Path, ending: str, end: str) -> None:
    lines = ["", "EU\tB-ORG", "rejects\tO", "", " ", "Peter\tB-PER", ""]
    assert read(tmp_path / f"a.{ending}", end.join(lines)) == [
        (2, {"tokens": ["EU", "rejects"], "tags": ["B-ORG", "O"]}),
        (6, {"tokens": ["Peter"], "tags": ["B-PER"]}),
    ]


def test_columns_in_between_are_numbered_and_can_be_named(tmp_path: Path) -> None:
    text = "-DOCSTART- -X- -X- O\n\nEU NNP B-NP B-ORG\nrejects VBZ B-VP O\n"
    [(number, row)] = read(tmp_path / "a.conll", text)
    assert number == 3
    assert row == {"tokens": ["EU", "rejects"], "column_2": ["NNP", "VBZ"], "column_3": ["B-NP", "B-VP"], "tags": ["B-ORG", "O"]}
    assert read(tmp_path / "a.conll", text, ["word", "ner"], names=["word", "pos", "chunk", "ner"]) == [
        (3, {"word": ["EU", "rejects"], "ner": ["B-ORG", "O"]})
    ]
    with pytest.raises(InputError, match=r"data\.names gives 2 names, and its lines have 4 columns"):
        read(tmp_path / "a.conll", text.partition("\n\n")[2], names=["word", "ner"])


UNIVERSAL = """\
# sent_id = 1
# text = du Chat dort
1-2\tdu\t_\t_\t_\t_\t_\t_\t_\t_
1\tde\tde\tADP\t_\t_\t3\tcase\t_\t_
2\tle\tle\tDET\t_\t_\t3\tdet\t_\t_
3\tChat\tchat\tNOUN\t_\tNumber=Sing\t4\tnsubj\t_\t_
4\tdort\tdormir\tVERB\t_\t_\t0\troot\t_\t_
4.1\tet\tet\tCCONJ\t_\t_\t_\t_\t_\t_

# newpar
1\t#\t#\tSYM\t_\t_\t0\troot\t_\t_
"""


def test_universal_dependencies_have_their_names(tmp_path: Path) -> None:
    first, second = read(tmp_path / "a.conllu", UNIVERSAL)
    assert first[0] == 3
    assert list(first[1]) == [*conll.UNIVERSAL, "text"]
    assert first[1]["tokens"] == ["de", "le", "Chat", "dort"]
    assert first[1]["upos"] == ["ADP", "DET", "NOUN", "VERB"]
    assert first[1]["text"] == "du Chat dort"
    assert second == (11, {**second[1], "tokens": ["#"], "upos": ["SYM"]})
    assert "text" not in second[1]
    assert read(tmp_path / "b.conllu", UNIVERSAL, ["tokens", "upos", "text"], ("tokens", "upos", "text"))[1] == (
        11,
        {"tokens": ["#"], "upos": ["SYM"]},
    )
    [(_, empty)] = read(tmp_path / "c.conllu", "1-2\tdu\t_\t_\t_\t_\t_\t_\t_\t_\n")
    assert isinstance(empty, BadRow)


def test_words_may_begin_with_the_sign_of_comments(tmp_path: Path) -> None:
    assert read(tmp_path / "a.bio", "#Friday\tO\n#\tO\nParis\tB-LOC\n\n#fun\tO\n") == [
        (1, {"tokens": ["#Friday", "#", "Paris"], "tags": ["O", "O", "B-LOC"]}),
        (5, {"tokens": ["#fun"], "tags": ["O"]}),
    ]
    assert read(tmp_path / "b.conll", "# a note\n# id = 7\na O\n# O\n\n# O\n# one more note\n# x = 1\n\n# id = 8\nb O\n") == [
        (3, {"tokens": ["a", "#"], "tags": ["O", "O"]}),
        (6, BadRow(None, "2 columns in each line (tokens, tags)", "4 in line 7: # one more note")),
        (11, {"tokens": ["b"], "tags": ["O"]}),
    ]


def test_a_sentence_with_ragged_lines_is_bad_and_reading_goes_on(tmp_path: Path) -> None:
    rows = read(tmp_path / "a.conll", "a O\nb\nc O\n\nd O\n")
    assert rows == [
        (1, BadRow(None, "2 columns in each line (tokens, tags)", "1 in line 2: b")),
        (5, {"tokens": ["d"], "tags": ["O"]}),
    ]


def test_white_space_beside_space_and_tab_is_part_of_a_word(tmp_path: Path) -> None:
    assert read(tmp_path / "a.conll", "a\u3000b\xa0c O\n\u200b O\n")[0][1]["tokens"] == ["a\u3000b\xa0c", "\u200b"]
    assert read(tmp_path / "b.conll", "New York\tB-LOC\n")[0][1]["tokens"] == ["New York"]
    assert read(tmp_path / "c.conll", "a|O\n", delimiter="|")[0][1] == {"tokens": ["a"], "tags": ["O"]}


def test_words_alone_text_files_and_packed_files_are_read(tmp_path: Path) -> None:
    assert read(tmp_path / "a.conll", "a\nb\n") == [(1, {"tokens": ["a", "b"]})]
    assert read(tmp_path / "a.txt", b"\xef\xbb\xbfa O\n", format="conll") == [(1, {"tokens": ["a"], "tags": ["O"]})]
    assert read(tmp_path / "a.conll.gz", gzip.compress(b"a O\n")) == [(1, {"tokens": ["a"], "tags": ["O"]})]
    assert read(tmp_path / "empty.conll", "\n# nothing\n\n") == []


def test_a_missing_column_and_a_missing_empty_line_are_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="has no column 'tags', which the job reads; its columns are 'tokens'"):
        read(tmp_path / "a.conll", "a\nb\n", ["tokens", "tags"], ("tokens", "tags"))
    monkeypatch.setattr(conll, "LONGEST", 3)
    with pytest.raises(InputError, match="line 1: 3 lines without an empty one"):
        read(tmp_path / "a.conll", "a O\n" * 4)
