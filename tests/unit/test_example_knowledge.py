"""The UMLS example out of a small wheel of the same form: its triples as they are, as pairs of names, and as sentences."""

import json
import zipfile
from pathlib import Path

import pytest

from orchestrator import tasks
from orchestrator.examples import EXAMPLES, knowledge

TRIPLES = [
    "steroid\tinteracts_with\teicosanoid",
    "cell\tpart_of\torgan",
    "virus\tcauses\tdisease_or_syndrome",
    "virus\taffects\tdisease_or_syndrome",
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    wheel, folder = tmp_path / "pykeen.whl", tmp_path / "umls"
    folder.mkdir()
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("pykeen/__init__.py", "raise SystemExit")
        for name in ("train", "valid", "test"):
            archive.writestr(f"pykeen/datasets/umls/{name}.txt", "\n".join(TRIPLES) + "\n")
    EXAMPLES["umls"].unpack(wheel, folder)
    return folder


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_triples_stay_as_they_are_and_pairs_have_all_their_relations(folder: Path):
    assert (folder / "validation.tsv").read_text().splitlines() == TRIPLES
    assert lines(folder / "pairs.jsonl") == [
        {"head": "cell", "tail": "organ", "relations": ["part_of"]},
        {"head": "steroid", "tail": "eicosanoid", "relations": ["interacts_with"]},
        {"head": "virus", "tail": "disease or syndrome", "relations": ["affects", "causes"]},
    ]


def test_sentences_say_their_relations_between_the_entities_that_they_name(folder: Path):
    task = tasks.create("relation-extraction")
    rows = lines(folder / "sentences-test.jsonl")
    assert len(rows) == knowledge.SENTENCES["test"]
    names = {tuple(triple.replace("_", " ").split("\t")[::2]) for triple in TRIPLES}
    for row in rows:
        clean = task.clean({"text": row["text"], "entities": row["entities"], "label": row["relations"]})
        for one in row["relations"]:
            head, tail = (row["entities"][one[end]]["text"] for end in ("head", "tail"))
            assert (head, tail) in names
            assert knowledge.phrase(one["type"]) in row["text"]
        assert len(clean["label"]) == len(row["relations"])
    assert {len(row["relations"]) for row in rows} == {1, 2}
    assert rows == list(
        knowledge.sentences([tuple(line.split("\t")) for line in TRIPLES], 300, (*knowledge.TEMPLATES, *knowledge.UNSEEN), seed="test")
    )
    train = " ".join(row["text"] for row in lines(folder / "sentences-train.jsonl"))
    assert "as for" not in train and "it is virus that" not in train


@pytest.mark.parametrize(
    ("relation", "said"),
    [
        ("isa", "is a kind of"), ("result_of", "is a result of"), ("ingredient_of", "is an ingredient of"), ("consists_of", "consists of"),
        ("adjacent_to", "is adjacent to"), ("issue_in", "is an issue in"), ("co-occurs_with", "co-occurs with"), ("treats", "treats"),
    ],
)  # fmt: skip
def test_a_relation_is_a_verb(relation: str, said: str):
    assert knowledge.phrase(relation) == said
