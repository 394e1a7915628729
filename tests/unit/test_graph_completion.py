"""Completing a graph: ranks by the book, names that are not there, and where the vocabulary lives."""

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from orchestrator import scratch, tasks
from orchestrator.config import ModelSection
from orchestrator.errors import InputError
from orchestrator.tasks.base import RowError
from orchestrator.tasks.graph_embedding import GraphEmbedding, GraphEmbeddingConfig
from orchestrator.tasks.known_triples import KnownTriples, packed
from tests.fixtures import tiny

TRAIN = [("a", "knows", "b"), ("a", "knows", "c"), ("b", "knows", "c"), ("c", "pays", "a"), ("d", "pays", "a")]
TEST = [("a", "knows", "d"), ("c", "pays", "e")]


def rows(triples: list[tuple[str, str, str]]) -> list[dict[str, Any]]:
    return [dict(zip(("head", "relation", "tail"), triple, strict=True)) for triple in triples]


def fitted(**splits: list[tuple[str, str, str]]) -> Any:
    task = tasks.create("graph-completion")
    return task.fit({split: task.observe([task.clean(row) for row in rows(triples)]) for split, triples in splits.items()})


def test_known_triples_are_found_in_both_directions():
    rng = np.random.default_rng(0)
    triples = {
        (int(h), int(r), int(t))
        for h, r, t in zip(rng.integers(0, 90_000, 5000), rng.integers(0, 7, 5000), rng.integers(0, 90_000, 5000), strict=True)
    }
    text = packed(triples)
    assert text == packed(sorted(triples, reverse=True))
    known = KnownTriples(text, 7)
    for head, relation, tail in list(triples)[:300]:
        assert set(known.answers(head, relation).tolist()) == {t for h, r, t in triples if (h, r) == (head, relation)}
        assert set(known.answers(tail, relation + 7).tolist()) == {h for h, r, t in triples if (t, r) == (tail, relation)}
    assert known.answers(90_001, 0).tolist() == []


def test_ranks_leave_out_what_is_known_in_any_split():
    """Against the definition, one entity after the other."""
    task = fitted(train=TRAIN, test=TEST)
    assert task.entities == ("a", "b", "c", "d", "e")
    rng = np.random.default_rng(1)
    everything = {*TRAIN, *TEST}
    for triple in TEST:
        output = rng.integers(0, 4, (2, 5)).astype(np.float32)  # with ties
        prediction = task.decode(rows([triple])[0], [output])
        for end, side in (("tail", 0), ("head", 1)):
            place = 2 if end == "tail" else 0
            right = output[side, task.entities.index(triple[place])]
            rivals = [
                output[side, number]
                for number, name in enumerate(task.entities)
                if name != triple[place]
                and tuple(name if number == place else part for number, part in enumerate(triple)) not in everything
            ]
            assert prediction[f"{end}_rank"] == 1 + sum(rival > right for rival in rivals) + sum(rival == right for rival in rivals) / 2


def test_scores_are_of_both_ends_and_of_each():
    task = fitted(train=TRAIN, test=TEST)
    predictions = [
        {"triples": [], "tail_rank": 1.0, "head_rank": 4.0},
        {"triples": [], "tail_rank": 2.0, "head_rank": 20.0},
        {"triples": []},
    ]
    some = [*rows(TEST), {"head": "a", "relation": "knows"}]
    assert task.score(predictions, some, ["mrr", "hits_at_3", "mrr_tail", "hits_at_10_head"]) == pytest.approx(
        {"mrr": (1 + 0.25 + 0.5 + 0.05) / 4, "hits_at_3": 0.5, "mrr_tail": 0.75, "hits_at_10_head": 0.5}
    )
    assert [line["relation"] for line in task.tables(predictions, some)["per_relation"]] == ["knows", "pays"]
    assert task.score([], []) == {} and task.tables([], []) == {}
    with pytest.raises(InputError, match="Did you mean 'hits_at_10'"):
        task.score(predictions, some, ["hits@10"])


def test_questions_rank_entities_and_say_which_triples_are_known():
    task = fitted(train=TRAIN, test=TEST)
    scores = np.array([[0.0, 9.0, 5.0, 1.0, 2.0], [1.0, 2.0, 3.0, 4.0, 5.0]], dtype=np.float32)
    [question] = task.rows_from({"head": "a", "relation": "knows"})
    prediction = task.decode(question, [scores])
    assert [(triple["tail"], triple["known"]) for triple in prediction["triples"]] == [
        ("b", True),
        ("c", True),
        ("e", False),
        ("d", True),
        ("a", False),
    ]
    assert sum(triple["score"] for triple in prediction["triples"]) == pytest.approx(1)
    new = task.answer([prediction], task.parameters(top_k=1, new_only=True), single=True)
    assert [(triple["head"], triple["relation"], triple["tail"]) for triple in new] == [("a", "knows", "e")]
    [question] = task.rows_from({"relation": "pays", "tail": "a"})
    assert [triple["head"] for triple in task.decode(question, [scores])["triples"]] == ["e", "d", "c", "b", "a"]


def test_names_that_are_not_in_the_graph_are_refused_with_the_nearest():
    task = fitted(train=TRAIN, test=TEST)
    with pytest.raises(RowError, match="a relation of the graph, which has 2; the nearest is 'knows'"):
        task.clean({"head": "a", "relation": "know"})
    with pytest.raises(InputError, match=r"`inputs\[1\].tail`: expected an entity of the graph.*found 'zz'"):
        task.rows_from([{"relation": "pays", "tail": "a"}, {"relation": "pays", "tail": "zz"}])


@pytest.mark.parametrize(
    ("splits", "says"),
    [
        ({"train": []}, "None of the 0 training rows is a triple"),
        ({"train": [("a", "knows", "a")]}, "one entity only"),
        ({"train": TRAIN, "test": [("a", "know", "b")]}, "The nearest training label is 'knows'"),
        ({"train": [*TRAIN, ("a", "Knows", "b")]}, "differ only by case"),
    ],
)
def test_what_can_not_be_learnt_is_said(splits: Any, says: str):
    with pytest.raises(InputError, match=says):
        fitted(**splits)


def test_a_graph_over_the_bound_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("orchestrator.tasks.graph_completion.MOST_TRIPLES", 4)
    with pytest.raises(InputError, match="The graph has 5 triples; this task takes up to 4"):
        fitted(train=TRAIN)


def test_rows_that_are_no_triples_count_in_no_score_and_no_graph():
    task = tasks.create("graph-completion")
    clean = [
        task.clean(row)
        for row in [*rows(TRAIN), {"head": "a", "relation": "knows", "tail": None}, {"head": None, "relation": "pays", "tail": "a"}]
    ]
    assert clean[5:] == [{"head": "a", "relation": "knows"}, {"relation": "pays", "tail": "a"}]
    done = task.fit({"train": task.observe(clean)})
    assert done == fitted(train=TRAIN)
    [[example]] = done.encode(clean[5:6], None)
    assert example["source"] == [0, -1] and example["target"] == [-1, 0]


def test_what_is_learnt_from_are_whole_triples():
    task = tasks.create("graph-completion")
    task.check_target(task.clean(rows(TRAIN)[0]))
    for absent in ("head", "tail"):
        with pytest.raises(RowError, match=f"column '{absent}': expected an entity"):
            task.check_target(task.clean({**rows(TRAIN)[0], absent: ""}))


def test_what_was_computed_of_a_task_does_not_travel_with_it():
    task = fitted(train=TRAIN)
    size = len(pickle.dumps(task))
    task.encode(rows(TRAIN), None)
    task.decode(rows(TRAIN)[0], [np.zeros((2, 4), dtype=np.float32)])
    assert len(pickle.dumps(task)) == size
    assert pickle.loads(pickle.dumps(task)) == task == tasks.create(json.loads(json.dumps(task.to_json())))


# ---- the model -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("scoring", ["complex", "distmult", "transe"])
def test_scores_are_those_of_the_papers(scoring: str):
    torch.manual_seed(0)
    model = GraphEmbedding(GraphEmbeddingConfig(scoring=scoring, hidden_size=6, num_entities=4, num_relations=2, initializer_range=1.0))
    found = model(source=torch.tensor([1]), relation=torch.tensor([3])).logits[0].detach()
    e, r = model.entities.detach().numpy(), model.relations.detach().numpy()
    for tail in range(4):
        if scoring == "complex":
            h, w, t = (row[:3] + 1j * row[3:] for row in (e[1], r[3], e[tail]))
            expected = np.real((h * w * np.conj(t)).sum())
        elif scoring == "distmult":
            expected = (e[1] * r[3] * e[tail]).sum()
        else:
            expected = -np.linalg.norm(e[1] + r[3] - e[tail])
        assert float(found[tail]) == pytest.approx(float(expected), abs=1e-5)


def test_embeddings_are_regularized_in_training_only_and_not_rounded_by_autocast(tmp_path: Path):
    task = fitted(train=TRAIN)
    torch.manual_seed(0)
    model = task.model(tiny.graph_base(tmp_path, []))
    batch = task.collate([example for [example] in task.encode(rows(TRAIN), None)], None)
    trained, items = task.loss(model.train(), batch)
    plain, _ = task.loss(model.eval(), batch)

    def size(weight: torch.Tensor) -> float:
        real, imaginary = weight.detach().chunk(2, -1)
        return float((real**2 + imaginary**2).pow(1.5).sum())

    asked = (batch[name].flatten() for name in ("source", "relation", "target"))
    penalty = sum(
        size(model.entities[one]) + size(model.relations[by]) + size(model.entities[other]) for one, by, other in zip(*asked, strict=True)
    )
    assert items == 2 * len(TRAIN)
    assert float((trained - plain).detach()) == pytest.approx(task.regularization * penalty, rel=1e-4)
    plain_logits = model(**batch).logits
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(model(**batch).logits, plain_logits)


def test_a_base_is_made_from_its_config_and_another_is_refused(tmp_path: Path):
    task = fitted(train=TRAIN)
    section = ModelSection.parse({"base": "config://graph-embedding", "config": {"scoring": "distmult", "hidden_size": 10}})
    config = task.check_base(scratch.check(section, task))
    assert (config.scoring, config.hidden_size) == ("distmult", 10)
    for wrong, says in (
        ({"base": "config://graph-embeding"}, "Did you mean 'graph-embedding'"),
        ({"base": "config://graph-embedding", "config": {"dim": 3}}, "has no 'dim'"),
        ({"base": "config://graph-embedding", "config": {"hidden_size": 3}}, "even for complex numbers"),
        ({"base": "config://graph-embedding", "config": {"scoring": "rotate"}}, "scoring"),
    ):
        with pytest.raises(InputError, match=says):
            scratch.check(ModelSection.parse(wrong), task)
    with pytest.raises(InputError, match="is a 'bert' model; a graph is completed by"):
        task.check_base(tiny.text_base(tmp_path / "bert", ["a"]))
    other = fitted(train=[*TRAIN, ("x", "knows", "y")])
    other.model(tiny.graph_base(tmp_path / "other", [])).save_pretrained(tmp_path / "trained")
    with pytest.raises(InputError, match="embeds another graph, of 6 entities"):
        task.check_base(str(tmp_path / "trained"))
