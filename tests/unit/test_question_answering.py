"""Question answering: answers as data has them, windows, spans, the threshold for no answer, and clients of the endpoint."""

import json
import math
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from orchestrator.errors import InputError
from orchestrator.tasks import answer_scores, create, rankings, spans
from orchestrator.tasks.base import RowError
from orchestrator.tasks.question_answering import QuestionAnsweringParameters
from tests.fixtures.tiny import text_base
from tests.unit import live

CONTEXT = "Ada met Grace. Grace lives in Café Noir, and Ada in a 😀 house."
WORDS = ["who met grace where does live in noir ada house a and , lives cafe café . 😀 n0 n1 n2 n3 n4 n5 n6 n7 n8 n9 ?"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return text_base(tmp_path_factory.mktemp("base"), WORDS)


@pytest.fixture(scope="module")
def tokenizer(base):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(base)


def task(**fields) -> Any:
    return create({"name": "question-answering", **fields})


def answers(value, **row):
    return task().clean({"question": "who?", "context": CONTEXT, "answers": value, **row})["answers"]


# ---- answers in data -----------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("value", "row", "text", "start"),
    [
        ("Grace", {}, ["Grace"], [8]),
        ("Grace", {"answer_start": 15}, ["Grace"], [15]),
        ("Grace", {"answer_start": "15"}, ["Grace"], [15]),
        ("Grace", {"answer_start": [15]}, ["Grace"], [15]),
        ("Grace", {"answer_start": math.nan}, ["Grace"], [8]),
        ("Grace", {"answer_start": 15.0, "is_impossible": "false"}, ["Grace"], [15]),
        (["Ada", "Grace"], {}, ["Ada", "Grace"], [0, 8]),
        (["Ada", "Grace"], {"answer_start": [45, 15]}, ["Ada", "Grace"], [45, 15]),
        ({"text": ["Grace"], "answer_start": [15]}, {}, ["Grace"], [15]),
        ({"text": "Grace", "answer_start": 15}, {}, ["Grace"], [15]),
        ([{"text": "Grace", "answer_start": 15, "answer_id": 7}, {"text": "Ada"}], {}, ["Grace", "Ada"], [15, 0]),
        ('{"text": ["Grace"], "answer_start": [15]}', {}, ["Grace"], [15]),
        ('["Grace"]', {}, ["Grace"], [8]),
        ("😀 house", {}, ["😀 house"], [54]),
        ({"text": [], "answer_start": []}, {}, [], []),
        ({"text": [""], "answer_start": [-1]}, {}, [], []),
        ("", {}, [], []), (" ", {"is_impossible": True}, [], []), ([], {"is_impossible": 1}, [], []), (None, {"is_impossible": "True"}, [], []),
    ],
)  # fmt: skip
def test_answers_come_in_many_forms(value, row, text, start):
    assert answers(value, **row) == {"text": text, "answer_start": start}


@pytest.mark.parametrize(
    ("value", "row", "column", "expected", "found"),
    [
        ("Grace", {"answer_start": 9}, "answers", r"'Grace' at character 9 of the context's 62 \(it stands at 8\)", "race."),
        ("Grace", {"answer_start": 900}, "answers", "at character 900", ""),
        ("grace", {}, "answers", r"letter for letter \('Grace' stands at 8\)", "grace"),
        ("Alan", {}, "answers", "an answer that stands in the context, letter for letter$", "Alan"),
        ("[1]", {}, "answers", "stands in the context", "[1]"),
        ("Grace", {"answer_start": "x"}, "answer_start", "a whole number from 0", "x"),
        ("Grace", {"answer_start": -1}, "answer_start", "a whole number from 0", -1),
        ("Grace", {"answer_start": 8.5}, "answer_start", "a whole number from 0", 8.5),
        ("Grace", {"answer_start": True}, "answer_start", "a whole number from 0", True),
        (["Grace", "Ada"], {"answer_start": [8]}, "answer_start", "as many places as there are answers, 2", [8]),
        (None, {}, "answers", "for a question without an answer an empty list", None),
        (math.nan, {"is_impossible": False}, "answers", "an answer: its text", None),
        ("", {"is_impossible": False}, "answers", "an answer, since is_impossible is false", ""),
        ("Grace", {"is_impossible": True}, "is_impossible", "false where the row has an answer", True),
        ("Grace", {"is_impossible": "maybe"}, "is_impossible", "true or false", "maybe"),
        ({"texts": ["Grace"]}, {}, "answers", "an answer: its text", {"texts": ["Grace"]}),
        (True, {}, "answers", "an answer: its text", True),
    ],
)  # fmt: skip
def test_an_answer_that_is_not_there_is_a_bad_row_that_says_what_is(value, row, column, expected, found):
    import re

    with pytest.raises(RowError) as raised:
        answers(value, **row)
    assert raised.value.column == column
    assert re.search(expected, raised.value.expected)
    assert raised.value.found == found


def test_rows_to_predict_need_no_answers_and_clean_ones_go_through_arrow():
    assert task().clean({"question": "who?", "context": 12}) == {"question": "who?", "context": "12"}
    some = [answers("Grace"), answers("")]
    tables = [pa.table({"answers": pa.array([one])}) for one in some]
    assert pa.concat_tables(tables, promote_options="permissive")["answers"].to_pylist() == some


# ---- fit -----------------------------------------------------------------------------------------------------
def counts(answered, unanswerable):
    return {"rows": answered + unanswerable, "answered": answered, "unanswerable": unanswerable}


def test_whether_there_may_be_no_answer_is_learnt_from_the_training_rows():
    assert task().fit({"train": counts(3, 0)}).handle_impossible_answer is False
    assert task().fit({"train": counts(3, 1), "test": counts(1, 0)}).handle_impossible_answer is True
    assert task(handle_impossible_answer=False).fit({"train": counts(3, 0), "test": counts(1, 9)}).handle_impossible_answer is False


@pytest.mark.parametrize(
    ("observed", "says"),
    [
        ({}, "no rows"),
        ({"train": counts(0, 0)}, "no rows"),
        ({"train": counts(0, 4)}, "None of the 4 training questions has an answer"),
        (
            {"train": counts(4, 0), "test": counts(1, 2)},
            "2 questions of the test split have no answer, and every training question has one",
        ),
    ],
)
def test_what_cannot_be_learnt_is_refused(observed, says):
    with pytest.raises(InputError, match=says):
        task().fit(observed)


def test_windows_that_do_not_move_on_are_refused():
    with pytest.raises(InputError, match="doc_stride is 128, and windows of max_length 64 can't share so much"):
        task(max_length=64)


# ---- windows -------------------------------------------------------------------------------------------------
LONG = " ".join(f"n{number % 10}" for number in range(100))


@pytest.mark.parametrize(("limit", "stride"), [(24, 4), (24, 0), (64, 16), (17, 5)])
def test_windows_are_those_of_the_tokenizers_library(tokenizer, limit, stride):
    question = "who met grace ?"
    [ours] = task(max_length=limit, doc_stride=stride).encode([{"question": question, "context": LONG}], tokenizer)
    theirs = tokenizer(
        question,
        LONG,
        truncation="only_second",
        max_length=limit,
        stride=stride,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )
    assert [example["input_ids"] for example in ours] == theirs["input_ids"]
    assert [example["token_type_ids"] for example in ours] == theirs["token_type_ids"]
    for place, example in enumerate(ours):
        context = [
            list(pair) for pair, source in zip(theirs["offset_mapping"][place], theirs.sequence_ids(place), strict=True) if source == 1
        ]
        assert example["offsets"] == context
        assert theirs.sequence_ids(place).index(1) == example["context"]
    # Left as the tokenizer was, so that other threads may use it: the library's way changes it.
    tokenizer._tokenizer.no_truncation()


def test_only_a_window_with_the_whole_answer_points_at_it(tokenizer):
    row = {"question": "who", "context": LONG, "answers": {"text": ["n9 n0"], "answer_start": [LONG.index("n9 n0")]}}
    [windows] = task(max_length=16, doc_stride=2).encode([row], tokenizer)
    found = [(example["start_positions"], example["end_positions"]) for example in windows]
    hits = [place for place, ends in enumerate(found) if ends != (0, 0)]
    assert hits == [0]
    start, end = found[0]
    assert tokenizer.decode(windows[0]["input_ids"][start : end + 1]) == "n9 n0"
    first_in_second = windows[1]["offsets"][0][0]
    assert first_in_second == row["answers"]["answer_start"][0] + len("n9 ")  # the second window has the end of the answer only
    [without] = task(max_length=16, doc_stride=2).encode([{**row, "answers": {"text": [], "answer_start": []}}], tokenizer)
    assert {(example["start_positions"], example["end_positions"]) for example in without} == {(0, 0)}


def test_a_long_question_is_cut_and_counted(tokenizer):
    row = {"question": LONG, "context": "ada met grace"}
    [[example]] = task(max_question_length=5).encode([row], tokenizer)
    assert len(example["input_ids"]) == 3 + 5 + 3
    assert example["truncated"]
    [examples] = task(max_length=16, doc_stride=1, max_question_length=99).encode([row], tokenizer)
    assert all(len(example["input_ids"]) <= 16 and example["offsets"] for example in examples)


def test_offsets_are_characters_of_the_context_as_it_was_given(tokenizer):
    context = "Ada\r\nlives  in\tCafe\u0301 Noir, a 😀 house"
    row = task().clean({"question": "where?", "context": context, "answers": "Cafe\u0301 Noir"})
    [[example]] = task().encode([row], tokenizer)
    start, end = (example[f"{side}_positions"] - example["context"] for side in ("start", "end"))
    assert context[example["offsets"][start][0] : example["offsets"][end][1]] in ("Cafe\u0301 Noir", "Cafe Noir")
    output = np.array(
        [[-5, -5, 0, 0], *([[9 * (place == start), 9 * (place == end), *pair] for place, pair in enumerate(example["offsets"])])]
    )
    assert task().decode(row, [output])["answer"] == "Cafe\u0301 Noir"


def test_a_context_without_tokens_has_no_answer(base, tmp_path):
    engine = live.predictor(task(handle_impossible_answer=False), base, tmp_path / "bundle")
    [found] = engine([{"question": "who", "context": "\u200b\ufeff"}])
    assert isinstance(found["answer"], str)
    empty = task().decode({"question": "who", "context": "x"}, [np.array([[1.0, 1.0, 0, 0]])])
    assert (empty["answer"], empty["start"], empty["end"], empty["answers"]) == ("", 0, 0, [])
    json.dumps(empty, allow_nan=False)


def test_padding_changes_neither_loss_nor_output(base, tokenizer):
    torch.manual_seed(0)
    of = task(max_length=24, doc_stride=4)
    model = of.model(base, dtype=torch.float32).eval()
    rows = [of.clean({"question": "who", "context": text, "answers": "n3"}) for text in (LONG, "n3 met ada")]
    examples = [example for its in of.encode(rows, tokenizer) for example in its]
    for smoothing in (0.0, 0.1):
        whole, items = of.loss(model, of.collate(examples, tokenizer), label_smoothing=smoothing)
        parts = [of.loss(model, of.collate([example], tokenizer), label_smoothing=smoothing) for example in examples]
        assert whole.item() == pytest.approx(sum(part.item() for part, _ in parts), rel=1e-5)
        assert items == len(examples)
    tokenizer.padding_side = "left"
    left = of.collate(examples, tokenizer)
    tokenizer.padding_side = "right"
    assert left["null"][-1] == 24 - len(examples[-1]["input_ids"])


# ---- spans ---------------------------------------------------------------------------------------------------
def output(*tokens, null=(0.0, 0.0)):
    return np.array([[*null, 0, 0], *tokens], dtype=np.float64)


def test_the_best_span_is_found_over_all_windows_by_brute_force():
    rng = np.random.default_rng(0)
    context = "x" * 40
    outputs = [
        output(*([*rng.normal(size=2), place, place + 1] for place in range(low, low + 12)), null=rng.normal(size=2))
        for low in (0, 8, 16, 28)
    ]
    found = spans.best(context, outputs, longest=4)
    every = {}
    for one in outputs:
        for first in range(1, len(one)):
            for last in range(first, min(first + 4, len(one))):
                span = (int(one[first, 2]), int(one[last, 3]))
                every[span] = max(every.get(span, -np.inf), one[first, 0] + one[last, 1])
    right = sorted(every, key=lambda span: -every[span])[:20]
    assert [(one["start"], one["end"]) for one in found["answers"]] == right
    null = min(one[0, :2].sum() for one in outputs)
    assert found["null_score_diff"] == pytest.approx(null - every[right[0]])
    assert all(one["score"] >= other["score"] for one, other in zip(found["answers"], found["answers"][1:], strict=False))


def test_scores_are_probabilities_as_in_transformers():
    one = output([1.0, 0.5, 0, 2], [2.0, 1.5, 3, 5], null=(0.3, 0.2))
    found = spans.best("ab cd", [one], longest=9)
    start, end = (np.exp(one[:, side]) / np.exp(one[:, side]).sum() for side in (0, 1))
    assert found["null_score"] == pytest.approx(start[0] * end[0])
    assert found["answers"][0] == {"answer": "cd", "score": pytest.approx(start[2] * end[2]), "start": 3, "end": 5}
    assert sum(answer["score"] for answer in found["answers"]) + found["null_score"] < 1


def test_a_span_has_whole_characters_and_words_where_asked():
    context = " unbelievable cafe\u0301 "
    assert spans.best(context, [output([5, 5, 0, 4])], longest=9)["answers"][0]["answer"] == "unb"
    assert spans.best(context, [output([5, 5, 3, 6])], longest=9, whole_words=True)["answers"][0]["answer"] == "unbelievable"
    assert spans.best(context, [output([5, 5, 14, 18])], longest=9)["answers"][0]["answer"] == "cafe\u0301"
    assert spans.best(context, [output([5, 5, 13, 14])], longest=9)["answers"] == []


# ---- scores --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("said", "golden", "f1", "exact"),
    [
        ("The Denver Broncos!", ["Denver Broncos"], 1, 1),
        ("Denver", ["Denver Broncos", "Broncos"], 2 / 3, 0),
        ("", ["Denver"], 0, 0), ("", [], 1, 1), ("Denver", [], 0, 0), ("the", [], 1, 1), ("a", ["the"], 1, 1), ("", ["the"], 1, 1),
        ("a b b", ["b b c"], 0.8, 0), ("Ändern", ["ändern"], 1, 1), ("U.S.", ["US"], 1, 1), ("anthem", ["them"], 0, 0),
    ],
)  # fmt: skip
def test_answers_are_compared_by_squads_rules(said, golden, f1, exact):
    assert answer_scores.match(said, tuple(golden)) == (pytest.approx(f1), exact)


def said(text, diff):
    return {"answers": [{"answer": text, "score": 0.5, "start": 0, "end": 1}], "null_score": 0.1, "null_score_diff": diff}


def row(*golden):
    return {"answers": {"text": list(golden), "answer_start": [0] * len(golden)}}


PREDICTIONS = [said("x", -4), said("y", -1), said("z", 1), said("w", 3), said("v", 6)]
ROWS = [row("x"), row(), row("z"), row(), row()]


def test_the_threshold_is_the_one_with_which_f1_is_best():
    assert answer_scores.best_threshold(PREDICTIONS, ROWS) == 2.0
    best = task(handle_impossible_answer=True).score(PREDICTIONS, ROWS)
    assert best == {
        "f1": 0.8, "exact_match": 0.8, "HasAns_f1": 1.0, "HasAns_exact": 1.0,
        "NoAns_f1": pytest.approx(2 / 3), "NoAns_exact": pytest.approx(2 / 3), "null_score_diff_threshold": 2.0,
    }  # fmt: skip
    for threshold in np.linspace(-10, 10, 81):
        given = task(handle_impossible_answer=True, null_score_diff_threshold=threshold).score(PREDICTIONS, ROWS)
        assert given["f1"] <= best["f1"]
        assert "null_score_diff_threshold" not in given
    assert answer_scores.best_threshold(PREDICTIONS[:1], ROWS[:1]) == 0
    assert answer_scores.best_threshold([said("y", 2.0), said("x", 2.0)], [row(), row("x")]) in (1.0, 3.0)


def test_the_task_that_is_served_has_the_threshold_of_the_best_validation():
    uncalibrated = task(handle_impossible_answer=True)
    metrics = {"f1": 0.8, "loss": 1.0, "null_score_diff_threshold": 2.0}
    calibrated = uncalibrated.calibrate(metrics)
    assert calibrated.null_score_diff_threshold == 2.0
    assert create(json.loads(json.dumps(calibrated.to_json()))) == calibrated
    assert uncalibrated.calibrate({}).null_score_diff_threshold == 0.0
    assert task(null_score_diff_threshold=-1).calibrate(metrics).null_score_diff_threshold == -1
    one = {"question": "q", "context": "ab"}
    outputs = [output([1, 1, 0, 2], null=(2, 1.5))]  # no answer is likelier by 1.5
    assert uncalibrated.decode(one, outputs)["answer"] == ""
    assert calibrated.decode(one, outputs)["answer"] == "ab"
    assert task(handle_impossible_answer=False).decode(one, outputs)["answer"] == "ab"


def test_the_bundle_is_written_with_the_calibrated_task(base, tmp_path):
    from types import SimpleNamespace

    from orchestrator import bundle, processors, worker
    from orchestrator.config import JobConfig
    from orchestrator.storage import Folder

    of = task(handle_impossible_answer=True)
    model = of.model(base, dtype=torch.float32)
    job = JobConfig.parse({"task": "question-answering", "model": {"base": base}, "data": {"train": "x.json"}})
    best = SimpleNamespace(step=3, state={"best": {"step": 3, "metrics": {"f1": 1.0, "null_score_diff_threshold": 1.25}}})
    figures = dict.fromkeys(("steps", "rows_seen", "global_batch_size", "num_workers"), 1)
    worker.write_bundle(
        Folder(str(tmp_path / "bundle")), model, processors.of(of, base), task=of, job=job, lineage={}, best=best, figures=figures  # type: ignore[arg-type]
    )  # fmt: skip
    assert bundle.load(str(tmp_path / "bundle")).task.null_score_diff_threshold == 1.25  # type: ignore[attr-defined]


def test_parts_are_scored_where_they_occur_and_unknown_metrics_refused():
    always = task(handle_impossible_answer=False)
    assert always.score(PREDICTIONS[:1], ROWS[:1]) == {"f1": 1.0, "exact_match": 1.0}
    assert always.score(PREDICTIONS[:1], ROWS[:1], ["HasAns_f1", "NoAns_f1"]) == {"HasAns_f1": 1.0}
    assert always.score([], []) == {}
    with pytest.raises(InputError, match=r"'exact' is no metric of this task.*exact_match"):
        always.score(PREDICTIONS, ROWS, ["exact"])
    table = task(handle_impossible_answer=True, null_score_diff_threshold=2).tables(PREDICTIONS, ROWS)["per_kind"]
    assert [(line["question"], line["rows"], line["answered"]) for line in table] == [("has an answer", 2, 2), ("has no answer", 3, 1)]


def test_rankings_that_are_cut_at_the_same_length_may_end_differently():
    assert rankings.difference({1: 0.5, 2: 0.1}, {1: 0.5, 3: 0.11}) == pytest.approx(0.01)
    assert rankings.difference({1: 0.5}, {2: 0.5}) == 0
    assert rankings.difference({}, {1: 0.3}) == 0.3


# ---- HTTP ----------------------------------------------------------------------------------------------------
def test_the_answer_that_is_given_comes_first():
    of = task(handle_impossible_answer=True, null_score_diff_threshold=2.0)
    prediction = {
        "answers": [
            {"answer": text, "score": score, "start": place, "end": place + 1}
            for place, (text, score) in enumerate([("x", 0.3), ("y", 0.2)])
        ],
        "null_score": 0.4,
        "null_score_diff": 0.3,
    }

    def asked(**parameters):
        return [one["answer"] for one in of.answer([prediction], QuestionAnsweringParameters(top_k=9, **parameters), single=True)]

    assert asked() == ["x", "", "y"]  # no answer is likelier, but not by as much as the threshold asks for
    assert asked(handle_impossible_answer=False) == ["x", "y"]
    prediction["null_score_diff"] = 2.5
    assert asked() == ["", "x", "y"]
    assert of.answer([prediction], QuestionAnsweringParameters(), single=True) == {"answer": "", "score": 0.4, "start": 0, "end": 0}
    assert of.answer([prediction] * 2, QuestionAnsweringParameters(), single=False)[1]["answer"] == ""


def test_an_unmodified_client_is_answered(base, tmp_path, monkeypatch):
    from huggingface_hub import InferenceClient
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.utils import _detect_agent

    monkeypatch.setattr(_detect_agent, "_registry", {})  # not looked up on the hub
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    engine = live.predictor(task(handle_impossible_answer=False, max_length=24, doc_stride=4), base, tmp_path / "bundle")
    with live.endpoint(engine) as url:
        client = InferenceClient(model=url)
        one = client.question_answering(question="who met grace ?", context=CONTEXT)
        assert not isinstance(one, list)
        assert CONTEXT[one.start : one.end] == one.answer != ""
        [direct] = engine([{"question": "who met grace ?", "context": CONTEXT}])
        assert (one.answer, one.score) == (direct["answer"], pytest.approx(direct["score"], abs=1e-6))
        several = client.question_answering(question="who met grace ?", context=LONG, top_k=3)
        assert isinstance(several, list)
        assert len(several) == 3
        every = client.question_answering(
            question="who met grace ?", context=LONG, top_k=2, doc_stride=8, handle_impossible_answer=True, max_answer_len=1,
            max_question_len=2, max_seq_len=32, align_to_words=True,
        )  # fmt: skip
        assert isinstance(every, list)
        assert all(len(one.answer.split()) <= 1 for one in every)
        assert client.question_answering(question="who", context=LONG, max_seq_len=10**6)  # no more than the model reads
        with pytest.raises(HfHubHTTPError, match=r"inputs\.context"):
            client.question_answering(question="who", context=" ")
        with pytest.raises(HfHubHTTPError, match="max_answer_len"):
            client.question_answering(question="who", context="ada", max_answer_len=0)


def test_answers_are_the_same_where_other_spans_are_as_good_as_tied():
    of = task()
    one = {"answer": "x", "score": 0.3, "start": 0, "end": 1}
    assert of.answer_difference(one, {**one, "score": 0.31}) == pytest.approx(0.01)
    assert of.answer_difference(one, {**one, "end": 2, "score": 0.29}) == pytest.approx(0.01)
    assert of.answer_difference({**one, "score": 0.9}, {**one, "end": 2, "score": 0.9}) == math.inf
    assert of.answer_difference([one], [{**one, "score": 0.2}]) == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("inputs", "says"),
    [
        ("who?", "must be"), ([], "empty list"), ({"question": "who?"}, "`inputs.context` is missing"),
        ([{"question": "q", "context": "c"}, {"question": 1, "context": "c"}], r"inputs\[1\].question` is 1"),
        ({"question": "q", "context": "c", "doc": 1}, "unknown key 'doc'"), ({"question": "q", "context": "\n"}, "`inputs.context`: expected a text that is not empty"),
    ],
)  # fmt: skip
def test_wrong_inputs_are_refused_with_a_sentence(inputs, says):
    with pytest.raises(InputError, match=says):
        task().rows_from(inputs)


def test_another_kind_of_model_is_refused(tmp_path):
    from transformers import WhisperConfig

    WhisperConfig().save_pretrained(tmp_path)
    with pytest.raises(InputError, match="no question-answering head; choose an encoder"):
        task().check_base(str(tmp_path))
