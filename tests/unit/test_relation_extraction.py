"""Relations between mentions and between names: what is special about them beside the contract of all tasks."""

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from orchestrator import bundle, predictor, processors, tasks
from orchestrator.config import DataSection
from orchestrator.data.sources import map_columns
from orchestrator.errors import InputError
from orchestrator.storage import Folder
from orchestrator.tasks import mentions
from orchestrator.tasks.base import RowError
from tests.fixtures import tiny

WORKS = {"text": "Anna works for Acme", "entities": [{"start": 0, "end": 4, "type": ""}, {"start": 15, "end": 19, "type": ""}]}


def created(**fields: Any) -> Any:
    return tasks.create({"name": "relation-extraction", **fields})


def fitted(rows: list[dict[str, Any]], **fields: Any) -> Any:
    task = created(**fields)
    return task.fit({"train": task.observe([task.clean(row) for row in rows])})


def span(start: int, end: int, kind: str = "") -> dict[str, Any]:
    return {"start": start, "end": end, "type": kind}


# ---- rows ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "row",
    [
        {"text": "Anna works for Acme", "head": {"start": 0, "end": 4}, "tail": {"start": 15, "end": 19}},
        {"text": "Anna works for Acme", "head": '{"start": 0, "end": 4}', "tail": '{"start": 15, "end": "19"}'},
        {"text": "Anna works for Acme", "head_start": "0", "head_end": "4", "tail_start": 15.0, "tail_end": 19},
        {"text": "<e1>Anna</e1> works for <e2>Acme</e2>"},
        {**WORKS, "pairs": [[0, 1]]},
        {**WORKS, "pairs": '[{"head": 0, "tail": 1}]'},
    ],
)
def test_every_way_to_write_a_pair_is_one_row(row: dict[str, Any]):
    clean = {**WORKS, "pairs": [[0, 1]], "label": [{"head": 0, "tail": 1, "label": "works_for"}]}
    assert created().clean({**row, "label": "works_for"}) == clean
    assert created().clean(row) == {key: value for key, value in clean.items() if key != "label"}


def test_a_column_of_relations_is_the_label():
    for between in ("mentions", "names"):
        assert (
            map_columns(DataSection(train="x"), created(between=between).columns(), ["text", "head", "tail", "relations"])["label"]
            == "relations"
        )


def test_marks_may_stand_in_either_order_and_between_any_characters():
    row = created().clean({"text": "In <e2>Zürich\r\n👩‍👩‍👧</e2> wohnt <e1>A\u0301nna</e1>", "label": "lives_in"})
    assert row["text"] == "In Zürich\r\n👩‍👩‍👧 wohnt A\u0301nna"
    assert [row["text"][one["start"] : one["end"]] for one in row["entities"]] == ["A\u0301nna", "Zürich\r\n👩‍👩‍👧"]
    assert row["pairs"] == [[0, 1]]


def test_offsets_that_were_counted_in_bytes_are_found_by_the_mention_s_own_text():
    with pytest.raises(RowError, match=r"'Acme' at 10 to 14.*found 'me 1'"):
        created().clean({"text": "Zürich: Acme 1", "head": {"start": 0, "end": 6}, "tail": {"start": 10, "end": 14, "text": "Acme"}})


def test_pairs_that_no_relation_is_said_of_are_unrelated_or_where_there_is_no_such_label_not_asked():
    row = {
        "text": "Anna met Otto in Bern",
        "entities": [span(0, 4), span(9, 13), span(17, 21)],
        "label": [{"head": 0, "tail": 1, "type": "met"}],
    }
    task = created()
    assert task.observe([task.clean(row)]) == {"rows": 6, "labels": {"met": 1, "no_relation": 5}, "types": {}}
    without = created(no_relation=None)
    assert without.clean(row)["pairs"] == [[0, 1]]
    assert without.observe([without.clean(row)])["labels"] == {"met": 1}
    several = created(problem="multi-label")
    again = {**row, "label": [*row["label"], {"head": 0, "tail": 1, "type": "knows"}]}
    assert several.observe([several.clean(again)]) == {"rows": 6, "labels": {"met": 1, "knows": 1}, "types": {}}
    with pytest.raises(RowError, match="one relation for a pair"):
        task.clean(again)


def test_a_text_with_too_many_entities_must_say_which_pairs_matter():
    text = "a " * 101
    row = {"text": text, "entities": [{"start": 2 * place, "end": 2 * place + 1} for place in range(101)]}
    with pytest.raises(RowError, match="at most 100 mentions"):
        created().clean(row)
    assert created().clean({**row, "pairs": [[0, 100]]})["pairs"] == [[0, 100]]


@pytest.mark.parametrize(
    ("labels", "fields", "says"),
    [
        (["a", "a"], {}, "All 2 training rows have the label 'a'"),
        (["a", "A"], {}, "differ only by case"),
        (["a", "No Relation"], {}, "set task.no_relation: 'No Relation'"),
        (["a", "b"], {"labels": ["a", "c"]}, "labels that task.labels does not name"),
        ([], {}, "nothing to learn from"),
    ],
)
def test_what_can_not_be_learnt_is_said(labels: list[str], fields: dict[str, Any], says: str):
    rows = [{"head": "x", "tail": "y", "label": label} for label in labels]
    with pytest.raises(InputError, match=says):
        fitted(rows, between="names", **fields)


def test_a_relation_that_stands_in_the_test_rows_only_is_refused_with_the_nearest():
    task = created(between="names")
    observed = {split: task.observe([task.clean({"head": "x", "tail": "y", "label": label}) for label in labels])
                for split, labels in {"train": ["treats", "causes"], "test": ["treat"]}.items()}  # fmt: skip
    with pytest.raises(InputError, match="The nearest training label is 'treats'"):
        task.fit(observed)


def test_names_have_no_entities_to_find():
    with pytest.raises(InputError, match="between: names reads none"):
        created(between="names", entities_from="x")


# ---- what the model sees -------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("pair", "shown"),
    [
        ((span(0, 4, "PER"), span(15, 19)), "@ * PER * Anna @ works for # Acme #"),
        ((span(15, 19), span(0, 4, "PER")), "# ^ PER ^ Anna # works for @ Acme @"),
        ((span(0, 19), span(15, 19)), "@ Anna works for # Acme # @"),
        ((span(0, 4), span(0, 10)), "# @ Anna @ works # for Acme"),
        ((span(0, 4), span(4, 10)), "@ Anna @#  works # for Acme"),
        ((span(0, 10), span(5, 19)), "@ Anna # works @ for Acme #"),
    ],
)
def test_both_mentions_stand_between_typed_marks(pair: Any, shown: str):
    text, spans = mentions.marked("Anna works for Acme", pair)
    assert text == shown
    assert [text[start] + text[end - 1] for start, end in spans] == ["@@", "##"]


def test_a_long_text_keeps_both_mentions_and_what_is_nearest(tmp_path: Path):
    text = f"{'before ' * 200}Anna met {'between ' * 200}Otto {'after ' * 200}"
    head, tail = text.index("Anna"), text.index("Otto")
    base = tiny.text_base(tmp_path, [text, "@ #"])
    task = created(max_length=20, labels=["met", "no_relation"])
    tokenizer = processors.of(task, base)
    row = {"text": text, "entities": [span(head, head + 4), span(tail, tail + 4)], "pairs": [[0, 1]]}
    [[example]] = task.encode([row], tokenizer)
    words = tokenizer.decode(example["input_ids"]).split()
    assert len(words) == 20 and example["truncated"]
    assert {"anna", "otto", "met", "before", "between", "after"} <= set(words)
    assert words.count("@") == words.count("#") == 2
    huge = {"text": text, "entities": [span(0, tail), span(tail, tail + 4)], "pairs": [[0, 1]]}
    [[example]] = task.encode([huge], tokenizer)
    assert len(example["input_ids"]) == 20 and "otto" in tokenizer.decode(example["input_ids"])
    with pytest.raises(InputError, match="no room for two mentions"):
        mentions.encode([mentions.marked("Anna Otto", (span(0, 4), span(5, 9)))], tokenizer, 3)


def test_of_unrelated_pairs_as_many_are_learnt_from_as_the_job_says_and_others_in_each_epoch(tmp_path: Path):
    row = {
        "text": "Anna met Otto in Bern",
        "entities": [span(0, 4), span(9, 13), span(17, 21)],
        "label": [{"head": 1, "tail": 0, "type": "met"}],
    }
    task = fitted([row], negatives_per_row=2)
    clean, tokenizer = task.clean(row), processors.of(task, tiny.text_base(tmp_path, [row["text"]]))
    assert task.augments and not created().augments
    epochs = [task.encode_to_train([clean], tokenizer, [seed])[0] for seed in range(20)]
    met = task.labels.index("met")
    assert all([example["labels"] == met for example in epoch].count(True) == 1 and len(epoch) == 3 for epoch in epochs)
    assert {tuple(example["pair"][:4]) for epoch in epochs for example in epoch} == {
        tuple(example["pair"][:4]) for example in task.encode([clean], tokenizer)[0]
    }
    assert pickle.dumps(epochs[7]) == pickle.dumps(task.encode_to_train([clean], tokenizer, [7])[0])
    none = task.model_copy(update={"negatives_per_row": 0})
    assert [len(examples) for examples in none.encode_to_train([clean, {**clean, "label": []}], tokenizer, [0, 0])] == [1, 1]


def test_a_row_without_pairs_is_one_example_that_counts_for_nothing(tmp_path: Path):
    import torch

    task = fitted([{**WORKS, "label": [{"head": 0, "tail": 1, "label": "works_for"}]}])
    base = tiny.text_base(tmp_path, ["Anna works for Acme"])
    tokenizer, model = processors.of(task, base), task.model(base, dtype=torch.float32)
    rows = [task.clean({"text": text, "entities": [], "label": []}) for text in ("a text", "another that is longer")]
    examples = [example for [example] in task.encode(rows, tokenizer)]
    with torch.inference_mode():
        total, items = task.loss(model, task.collate(examples, tokenizer))
        outputs = task.infer(model, task.collate(examples, tokenizer))
    assert (float(total), items) == (0.0, 0.0)
    found = [task.decode(row, [output]) for row, output in zip(rows, outputs, strict=True)]
    assert found == [{"triples": [], "pairs": []}] * 2
    assert task.score(found, rows) == {} and task.tables(found, rows) == {}


# ---- answers -------------------------------------------------------------------------------------------------
def test_a_label_that_says_the_direction_turns_the_triple(tmp_path: Path):
    task = created(labels=["Cause-Effect(e1,e2)", "Cause-Effect(e2,e1)", "Other"], no_relation="Other", entity_types=["N"])
    row = {"text": "rain from clouds", "entities": [span(0, 4, "N"), span(10, 16)]}
    output = np.array([0, 4, 10, 16, 0, -1, 0.0, 3.0, 1.0])
    [triple] = task.decode(row, [output])["triples"]
    assert {**triple, "score": round(triple["score"], 2)} == {
        "head": "clouds", "relation": "Cause-Effect", "tail": "rain", "score": 0.84,
        "head_start": 10, "head_end": 16, "tail_start": 0, "tail_end": 4, "tail_type": "N",
    }  # fmt: skip


def test_f1_leaves_no_relation_out():
    task = created(labels=["a", "b", "no_relation"], between="names")
    right, said = ["a", "a", "b", "no_relation", "no_relation"], [0, 2, 1, 2, 0]
    rows = [task.clean({"head": "x", "tail": "y", "label": label}) for label in right]
    outputs = [np.array([-1.0] * 6 + [9.0 * (place == chosen) for place in range(3)]) for chosen in said]
    predictions = [task.decode(row, [output]) for row, output in zip(rows, outputs, strict=True)]
    scores = task.score(predictions, rows)
    assert scores == pytest.approx({"precision": 2 / 3, "recall": 2 / 3, "f1": 2 / 3, "f1_macro": (0.5 + 1) / 2, "accuracy": 0.6})
    assert task.score(predictions, rows, ["f1/a", "recall/b"]) == {"f1/a": 0.5, "recall/b": 1.0}
    with pytest.raises(InputError, match="no metric of this task"):
        task.score(predictions, rows, ["f1/no_relation"])
    assert [(line["relation"], line["pairs"], line["predicted"]) for line in task.tables(predictions, rows)["per_relation"]] == [
        ("a", 2, 2),
        ("b", 1, 1),
    ]


def test_a_client_may_ask_for_more_relations_or_surer_ones():
    task = created(labels=["a", "b", "no_relation"], between="names")
    row = {"head": "x", "tail": "y"}
    prediction = task.decode(row, [np.array([-1.0] * 6 + [1.0, 0.5, 2.0])])
    assert prediction["triples"] == [] and task.answer([prediction], task.parameters(), single=True) == []
    answer = task.answer([prediction], task.parameters(top_k=5), single=True)
    assert [triple["relation"] for triple in answer] == ["a", "b"]
    assert len(task.answer([prediction], task.parameters(top_k=5, min_score=0.2), single=False)[0]) == 1


def test_answers_differ_by_no_more_than_explains_them():
    task = created(labels=["a", "b", "no_relation"], between="names")

    def answer(*logits: float) -> Any:
        return task.answer([task.decode({"head": "x", "tail": "y"}, [np.array([-1.0] * 6 + list(logits))])], task.parameters(), single=True)

    assert 0 < task.answer_difference(answer(1.0, 0.999, 0), answer(0.999, 1.0, 0)) < 0.01  # a tie
    assert task.answer_difference(answer(9, 0, 0), answer(0, 9, 0)) > 0.9
    assert task.answer_difference(answer(9, 0, 0), answer(0, 0, 9)) > 0.4
    sure = created(labels=["a", "b"], no_relation=None, between="names")
    assert sure.answer_difference([{"head": "x", "tail": "y", "relation": "a", "score": 0.9}], []) == float("inf")


# ---- entities that another model finds -----------------------------------------------------------------------
@pytest.fixture
def finder(tmp_path: Path) -> str:
    import torch

    from tests.fixtures.capitals import Capitals

    base = tiny.text_base(tmp_path / "base", ["Anna works for Acme in Bern"])
    task = Capitals()
    folder = Folder(str(tmp_path / "finder"))
    bundle.write(
        folder, model=task.model(base, dtype=torch.float32), processor=processors.of(task, base), task=task, job={}, lineage={}, metrics={}
    )
    return folder.uri


def test_entities_are_found_by_the_model_that_the_job_names_and_the_bundle_needs_it_no_more(finder: str, tmp_path: Path):
    import shutil

    import torch

    task = fitted([{**WORKS, "label": [{"head": 0, "tail": 1, "label": "works_for"}]}], entities_from=finder)
    base = tiny.text_base(tmp_path / "relations", ["Anna works for Acme"])
    task.check_base(base)
    processor = pickle.loads(pickle.dumps(processors.of(task, base)))
    bundle.write(
        Folder(str(tmp_path / "bundle")),
        model=task.model(base, dtype=torch.float32),
        processor=processor,
        task=task,
        job={},
        lineage={},
        metrics={},
    )
    shutil.rmtree(finder)
    loaded = predictor.Predictor(bundle.load(str(tmp_path / "bundle")), precision="fp32")
    rows = loaded.task.rows_from(["Anna knows Bern and Acme", "nobody", "Otto"])
    assert rows == [{"text": "Anna knows Bern and Acme"}, {"text": "nobody"}, {"text": "Otto"}]
    found = loaded(rows)
    assert [[(pair["head"], pair["tail"]) for pair in one["pairs"]] for one in found] == [
        [("Anna", "Bern"), ("Anna", "Acme"), ("Bern", "Anna"), ("Bern", "Acme"), ("Acme", "Anna"), ("Acme", "Bern")], [], [],
    ]  # fmt: skip
    names = [{"start": start, "end": end, "type": "NAME"} for start, end in ((0, 4), (20, 24))]
    given = loaded.task.rows_from({"text": "Anna knows Bern and Acme", "entities": names})
    assert [pair["scores"] for pair in loaded(given)[0]["pairs"]] == [pytest.approx(found[0]["pairs"][place]["scores"]) for place in (1, 4)]


def test_a_token_classification_job_finds_the_entities_that_its_endpoint_answers(tmp_path: Path):
    import torch

    from orchestrator.tasks.entity_finder import TokenizerAndFinder

    ner = tasks.create({"name": "token-classification", "max_length": 12, "stride": 4})
    ner = ner.fit({"train": ner.observe([ner.clean({"tokens": ["Anna", "met"], "tags": ["B-PER", "O"]})])})
    base = tiny.text_base(tmp_path / "base", ["Anna works for Acme in Bern"])
    torch.manual_seed(3)
    bundle.write(
        Folder(str(tmp_path / "ner")),
        model=ner.model(base, dtype=torch.float32),
        processor=processors.of(ner, base),
        task=ner,
        job={},
        lineage={},
        metrics={},
    )
    served = predictor.Predictor(bundle.load(str(tmp_path / "ner")), precision="fp32")
    texts = ["Anna works for Acme in Bern and Otto met Anna in Bern for Acme", "👩‍👩‍👧 Anna", "\u200b"]
    wanted = [
        [{"start": one["start"], "end": one["end"], "type": one["label"]} for one in prediction["entities"]]
        for prediction in served(ner.rows_from(texts))
    ]
    assert any(wanted)
    assert TokenizerAndFinder.load(base, str(tmp_path / "ner")).find(texts) == wanted


def test_what_finds_no_entities_is_refused(tmp_path: Path, finder: str):
    with pytest.raises(InputError, match="is not the bundle of a token-classification job"):
        created(entities_from=str(tmp_path)).check_base(tiny.text_base(tmp_path / "base2", ["a"]))
    task = json.loads((Path(finder) / "task.json").read_text())
    (Path(finder) / "task.json").write_text(json.dumps({**task, "name": "text-classification"}))
    with pytest.raises(InputError, match="finds no entities"):
        created(entities_from=finder).check_base(tiny.text_base(tmp_path / "base3", ["a"]))
    with pytest.raises(InputError, match=r"inputs.head.*found None"):
        created().rows_from("Anna works for Acme")
