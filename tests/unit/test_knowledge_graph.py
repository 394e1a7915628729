"""Predicted triples as a graph: every one with its row, or merged."""

import gc
import json
from pathlib import Path

import networkx
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from orchestrator import cli, knowledge_graph
from orchestrator.errors import InputError


def triple(head: str, relation: str, tail: str, score: float, **more: object) -> dict[str, object]:
    return {"head": head, "relation": relation, "tail": tail, "score": score, **more}


ROWS = [
    [triple("Acme", "lies in", "Bern", 0.9, head_start=0, head_end=4, tail_start=13, tail_end=17, head_type="ORG", tail_type="LOC")],
    [],
    [triple("ACME ", "lies in", "bern", 0.6), triple("Anna", "knows", "Otto", 0.3)],
    [triple("Anna", "knows\x00", "Otto & <Söhne>\x0b", 0.8)],
]


@pytest.fixture
def predictions(tmp_path: Path) -> Path:
    """As `predict` writes them; the last row could not be predicted."""
    said = [json.dumps({"triples": found, "pairs": []}) for found in ROWS]
    table = pa.table({"text": ["…"] * 5, "row_id": [f"corpus.jsonl:{place}" for place in range(1, 6)], "prediction": [*said, None]})
    pq.write_table(table, tmp_path / "predictions.parquet")
    return tmp_path / "predictions.parquet"


@pytest.mark.parametrize("ending", [".parquet", ".csv", ".jsonl"])
def test_every_triple_is_a_line_with_its_row(predictions: Path, tmp_path: Path, ending: str):
    target = tmp_path / f"triples{ending}"
    assert knowledge_graph.write(str(predictions), str(target)) == {"triples": 4}
    if ending == ".parquet":
        lines = pq.read_table(target).to_pylist()
        assert [line["row_id"] for line in lines] == ["corpus.jsonl:1", "corpus.jsonl:3", "corpus.jsonl:3", "corpus.jsonl:4"]
        assert lines[0] == {**ROWS[0][0], "row_id": "corpus.jsonl:1", "known": None}
        assert lines[1]["head"] == "ACME " and lines[1]["head_start"] is None


def test_equal_names_and_triples_are_merged(predictions: Path, tmp_path: Path):
    target = tmp_path / "graph.graphml"
    assert knowledge_graph.write(str(predictions), str(target)) == {"triples": 4, "nodes": 5, "edges": 3}
    graph = networkx.read_graphml(target, force_multigraph=True)
    assert graph.is_directed()
    nodes = {name["label"]: name for _, name in graph.nodes(data=True)}
    assert nodes["Acme"] == {"label": "Acme", "count": 2, "type": "ORG"}
    assert "Otto & <Söhne>" in nodes
    edges = {
        (graph.nodes[head]["label"], edge["relation"], graph.nodes[tail]["label"]): edge for head, tail, edge in graph.edges(data=True)
    }
    assert edges["Acme", "lies in", "Bern"] == {"relation": "lies in", "score": 0.9, "count": 2}


def test_weak_and_rare_triples_are_left_out(predictions: Path, tmp_path: Path):
    target = str(tmp_path / "graph.graphml")
    assert knowledge_graph.write(str(predictions), target, min_score=0.7) == {"triples": 2, "nodes": 4, "edges": 2}
    assert knowledge_graph.write(str(predictions), target, min_count=2) == {"triples": 2, "nodes": 2, "edges": 1}
    assert knowledge_graph.write(str(predictions), target, min_score=1.0) == {"triples": 0, "nodes": 0, "edges": 0}
    assert len(networkx.read_graphml(target)) == 0
    empty = str(tmp_path / "none.parquet")
    assert knowledge_graph.write(str(predictions), empty, min_score=1.0) == {"triples": 0}
    assert pq.read_table(empty).num_rows == 0


def test_predictions_of_something_else_are_refused_by_row(tmp_path: Path):
    source = tmp_path / "labels.jsonl"
    source.write_text('{"prediction": "{\\"label\\": \\"good\\"}"}\n')
    with pytest.raises(InputError, match=r"labels.jsonl, row 1: the prediction has no triples"):
        knowledge_graph.write(str(source), str(tmp_path / "g.graphml"))
    assert not (tmp_path / "g.graphml").exists()
    (tmp_path / "texts.csv").write_text("text\na\n")
    with pytest.raises(InputError, match="no column 'prediction'"):
        knowledge_graph.write(str(tmp_path / "texts.csv"), str(tmp_path / "g.csv"))
    for target, says in (("g.xml", "must end in"), ("", "must end in")):
        with pytest.raises(InputError, match=says):
            knowledge_graph.write(str(source), str(tmp_path / target))
    with pytest.raises(InputError, match="--min-count"):
        knowledge_graph.write(str(source), str(tmp_path / "g.parquet"), min_count=2)


def test_predictions_that_are_not_there_are_named_as_the_command_does(tmp_path: Path):
    with pytest.raises(InputError, match=r"^PREDICTIONS: there is no file '.*nothing\.jsonl'"):
        knowledge_graph.write(str(tmp_path / "nothing.jsonl"), str(tmp_path / "triples.csv"))


def test_nothing_is_left_of_a_graph_that_could_not_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    complaints: list[object] = []
    monkeypatch.setattr("sys.unraisablehook", complaints.append)
    (tmp_path / "said.jsonl").write_text('{"prediction": {"label": "good"}}\n')
    with pytest.raises(InputError, match="row 1: the prediction has no triples"):
        knowledge_graph.write(str(tmp_path / "said.jsonl"), str(tmp_path / "triples.parquet"))
    gc.collect()
    assert not complaints and [file.name for file in tmp_path.iterdir()] == ["said.jsonl"]


def test_the_command_says_what_it_wrote(predictions: Path, tmp_path: Path):
    done = CliRunner().invoke(cli.app, ["graph", str(predictions), str(tmp_path / "g.graphml"), "--min-score", "0.5", "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout.splitlines()[-1]) == {
        "status": "done", "output": str(tmp_path / "g.graphml"), "triples": 3, "nodes": 4, "edges": 2,
    }  # fmt: skip
