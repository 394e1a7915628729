"""Text classification: what labels and texts become, what can't be learnt from and what is said of it, and the numbers."""

import math

import numpy as np
import pytest
import torch

from orchestrator.errors import InputError
from orchestrator.tasks import create, texts
from orchestrator.tasks.base import RowError
from orchestrator.tasks.labels import label_name
from orchestrator.tasks.text_classification import ClassificationParameters
from tests.fixtures.tiny import text_base

TEXTS = ["a b c d e f g h i j k l m n o p q r s t u v w x y z", "good bad camera"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return text_base(tmp_path_factory.mktemp("base"), TEXTS)


@pytest.fixture(scope="module")
def tokenizer(base):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(base)


def task(**fields):
    return create({"name": "text-classification", **fields})


def counts(rows=None, **labels):
    return {"rows": sum(labels.values()) if rows is None else rows, "labels": labels}


# ---- rows ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("value", "name"),
    [(1, "1"), (1.0, "1"), ("1", "1"), ("1.0", "1"), ("-2.00", "-2"), (0.5, "0.5"), ("0.50", "0.50"), ("007", "007"), (True, "true"), ("TRUE", "true"), ("Good ", "Good "), (-0.0, "0")],
)  # fmt: skip
def test_a_label_has_one_spelling(value, name):
    assert label_name(value) == name
    assert label_name(name) == name


@pytest.mark.parametrize("label", [None, math.nan, "", "  ", ["a"], {"a": 1}, math.inf])
def test_a_missing_or_strange_label_is_a_bad_row(label):
    with pytest.raises(RowError, match="column 'label': expected") as raised:
        task().clean({"text": "good", "label": label})
    assert raised.value.found is label


@pytest.mark.parametrize("text", [None, math.nan, "", " \n\t", ["good"], True, "half \ud800 pair"])
def test_a_missing_or_strange_text_is_a_bad_row(text):
    with pytest.raises(RowError, match="column 'text': expected"):
        task().clean({"text": text})


def test_texts_keep_their_characters():
    for text in ("  spaced  ", "nul \0 inside", "\u200b", "line\r\nbreak", "x" * 100_000):
        assert task().clean({"text": text, "label": "a", "other": 1}) == {"text": text, "label": "a"}
    assert task().clean({"text": 10.0, "text_pair": None}) == {"text": "10"}


@pytest.mark.parametrize(
    ("value", "labels"),
    [
        (["b", "a"], ["a", "b"]), ('["a", 1]', ["1", "a"]), ("a|b", ["a", "b"]), ("a, b,", ["a", "b"]), ("b,c|a", ["a", "b,c"]),
        ("", []), ([], []), (" ", []), ("a", ["a"]), (3, ["3"]), (["a", "a"], ["a"]),
    ],
)  # fmt: skip
def test_several_labels_come_in_many_forms(value, labels):
    assert task(problem="multi-label").clean({"text": "x", "label": value})["label"] == labels


@pytest.mark.parametrize("value", [None, math.nan, ["a", None], [["a"]], '["a"', '{"a": 1}x[', {"a": 1}])
def test_labels_that_are_no_list_are_bad_rows(value):
    if value == '{"a": 1}x[':
        assert task(problem="multi-label").clean({"text": "x", "label": value})["label"] == [value]
        return
    with pytest.raises(RowError):
        task(problem="multi-label").clean({"text": "x", "label": value})


def test_the_delimiter_can_be_said():
    assert task(problem="multi-label", delimiter=";").clean({"text": "x", "label": "a|b; c,d"})["label"] == ["a|b", "c,d"]


@pytest.mark.parametrize("value", [None, "", "three", "inf", math.nan, True, [1], 10**400])
def test_a_number_must_be_one(value):
    with pytest.raises(RowError, match="number"):
        task(problem="regression").clean({"text": "x", "label": value})
    assert task(problem="regression").clean({"text": "x", "label": " 4.5 "})["label"] == 4.5


# ---- fit -----------------------------------------------------------------------------------------------------
def test_labels_are_ordered_by_number_or_by_name():
    assert task().fit({"train": {"rows": 3, "labels": {"10": 1, "9": 1, "-1.5": 1}}}).labels == ("-1.5", "9", "10")
    assert task().fit({"train": {"rows": 3, "labels": {"b": 1, "B2": 1, "10": 1}}}).labels == ("10", "B2", "b")
    assert task(labels=["b", "a"]).fit({"train": counts(a=1, b=1)}).labels == ("b", "a")
    assert task(labels=[1, 0]).fit({"train": {"rows": 2, "labels": {"0": 1, "1": 1}}}).labels == ("1", "0")


@pytest.mark.parametrize(
    ("fields", "observed", "sentence"),
    [
        ({}, {"train": counts(good=5)}, r"All 5 training rows have the label 'good'; a classifier needs two labels or more\."),
        ({}, {"train": counts()}, "The training split has no rows"),
        ({}, {}, "The training split has no rows"),
        ({}, {"train": counts(good=120, bad=2, **{"good ": 3})}, r"differ only by case or spaces: 'good' \(120 rows\) and 'good ' \(3 rows\)"),
        ({}, {"train": counts(Good=2, bad=2), "test": counts(good=1)}, r"'Good' \(2 rows\) and 'good' \(1 row\)"),
        ({}, {"train": counts(a=2, b=2), "test": counts(a=1, ab=3)}, r"The test split has labels that no training row has: 'ab' \(3 rows\)\. The nearest training label is"),
        ({}, {"train": counts(positive=2, b=2), "validation": counts(positve=1)}, r"validation split .* 'positve' \(1 row\)\. The nearest training label is 'positive'"),
        ({"labels": ["a", "b"]}, {"train": counts(a=2, b=2, c=1)}, r"The train split has labels that task.labels does not name: 'c' \(1 row\)"),
        ({"labels": ["a", "b", "z"]}, {"train": counts(a=2, b=2)}, r"task.labels names 'z', which no row has\. The rows have 'a' \(2 rows\)"),
        ({"problem": "multi-label"}, {"train": counts(rows=4)}, "None of the 4 training rows has a label"),
        ({"problem": "multi-label"}, {"train": counts(rows=4, a=4)}, "All 4 training rows have the same labels, 'a'"),
        ({"problem": "regression"}, {"train": {"rows": 4, "bits": {"3": 4}}}, "All 4 training rows have the same number"),
        ({}, {"train": {"rows": 90, "labels": {str(n): 1 for n in range(90)}}}, r"90 different labels, such as .* set task\.problem: regression"),
        ({}, {"train": {"rows": 90, "labels": {f"n{n}": 1 for n in range(90)}}}, r"is data\.columns\.label the right column\?"),
    ],
)  # fmt: skip
def test_what_cannot_be_learnt_from_is_said(fields, observed, sentence):
    with pytest.raises(InputError, match=sentence):
        task(**fields).fit(observed)


def test_equal_numbers_are_told_from_almost_equal_ones():
    regression = task(problem="regression")
    near = [{"label": 1e6}] * 99 + [{"label": math.nextafter(1e6, 2e6)}]
    assert regression.fit({"train": regression.observe(near)}) == regression
    for number in (0.1, -3.0, 0.0):
        with pytest.raises(InputError, match="same number"):
            regression.fit({"train": regression.observe([{"label": number}] * 7)})
    with pytest.raises(InputError, match="same number"):
        regression.fit({"train": regression.observe([{"label": 0.0}, {"label": -0.0}])})


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"labels": ["1", 1.0]}, "labels names '1' twice"),
        ({"problem": "regression", "labels": ["a"]}, "takes neither labels nor class_weights"),
        ({"problem": "regression", "class_weights": "balanced"}, "takes neither labels nor class_weights"),
        ({"max_len": 3}, "unknown key 'max_len'.*'max_length'"),
        ({"problem": "multilabel"}, "multi-label"),
    ],
)
def test_fields_that_do_not_fit_are_refused(fields, sentence):
    with pytest.raises(InputError, match=sentence):
        task(**fields)


# ---- tensors -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("limit", [5, 8, 9, 17])
def test_texts_are_cut_as_transformers_cuts_them(base, tokenizer, side, limit):
    from transformers import AutoTokenizer

    reference = AutoTokenizer.from_pretrained(base, truncation_side=side)
    tokenizer.truncation_side = side
    long, short, other = "a b c d e f g h i j k l m n", "x y z", "o p q r s t u v w x y z a b c d"
    rows = [{"text": long}, {"text": short}, *({"text": a, "text_pair": b} for a in (long, short, other) for b in (long, short, other))]
    encoded = task(max_length=limit).encode(rows, tokenizer)
    for row, [example] in zip(rows, encoded, strict=True):
        whole = reference(row["text"], row.get("text_pair"))
        wanted = reference(row["text"], row.get("text_pair"), truncation=True, max_length=limit)
        assert {key: example[key] for key in wanted} == dict(wanted)
        assert example["truncated"] == (len(whole["input_ids"]) > limit)


def test_the_limit_is_the_tasks_or_the_tokenizers_or_512(tokenizer):
    assert texts.limit(tokenizer, None) == 64
    assert texts.limit(tokenizer, 7) == 7
    endless = type("Endless", (), {"model_max_length": int(1e30)})()
    assert texts.limit(endless, None) == 512


def test_no_room_for_text_is_said(tokenizer):
    with pytest.raises(InputError, match=r"task\.max_length is 4, which leaves no room for text beside 3 special tokens"):
        task(max_length=4).encode([{"text": "a b c", "text_pair": "d e f"}], tokenizer)


def test_a_slow_tokenizer_is_cut_too(tokenizer):
    class Slow:
        """A tokenizer whose encodings don't say where tokens come from, as those written in Python."""

        model_max_length = 64

        def __call__(self, *texts, **settings):
            encoded = tokenizer(*texts, **settings)
            tokenizer.backend_tokenizer.no_truncation()
            return type("Slowly", (dict,), {"is_fast": False})(encoded)

    tokenizer.truncation_side = "right"
    rows = [{"text": "a b c d e f g"}, {"text": "a"}]
    assert task(max_length=5).encode(rows, Slow()) == task(max_length=5).encode(rows, tokenizer)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_goes_to_the_tokenizers_side(tokenizer, side):
    tokenizer.padding_side = side
    batch = task().collate([example for [example] in task().encode([{"text": "a b"}, {"text": "c"}], tokenizer)], tokenizer)
    tokenizer.padding_side = "right"
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [0, 1, 1, 1] if side == "left" else [1, 1, 1, 0]]
    assert batch["input_ids"][1, 0 if side == "left" else -1] == tokenizer.pad_token_id
    assert batch.keys() == {"input_ids", "token_type_ids", "attention_mask"}


def test_an_unknown_label_is_not_encoded(tokenizer):
    with pytest.raises(RowError, match="expected one of 'a', 'b', found 'c'"):
        task(labels=["a", "b"]).encode([{"text": "a", "label": "c"}], tokenizer)
    with pytest.raises(InputError, match=r"task\.labels is not known yet"):
        task().encode([{"text": "a", "label": "c"}], tokenizer)


# ---- model ---------------------------------------------------------------------------------------------------
class Fixed(torch.nn.Module):
    """A model that says what it was told to."""

    def __init__(self, logits):
        super().__init__()
        self.logits = torch.tensor(logits, dtype=torch.bfloat16)

    def forward(self, **inputs):
        assert "labels" not in inputs
        return type("Output", (), {"logits": self.logits})()


def test_losses_are_those_of_transformers(base):
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(1)
    batch = {"input_ids": torch.randint(4, 20, (5, 7)), "attention_mask": torch.ones(5, 7, dtype=torch.long)}
    targets = {
        "single-label": torch.tensor([0, 2, 1, 1, 2]),
        "multi-label": torch.randint(0, 2, (5, 3)).float(),
        "regression": torch.randn(5),
    }
    for problem, target in targets.items():
        one = task(problem=problem, **({} if problem == "regression" else {"labels": ["a", "b", "c"]}))
        model = one.model(base, dtype=torch.float32)
        assert isinstance(model, type(AutoModelForSequenceClassification.from_pretrained(base)))
        reference = model(**batch, labels=target).loss
        total, items = one.loss(model, {**batch, "labels": target})
        assert total.item() / items == pytest.approx(reference.item(), rel=1e-5)


def test_label_smoothing_and_class_weights_are_those_of_torch():
    logits, target = [[1.0, 0.0, -1.0], [0.5, 2.0, 0.0]], torch.tensor([0, 2])
    fitted = task(class_weights="balanced").fit({"train": counts(a=6, b=3, c=1)})
    assert fitted.weights == pytest.approx((10 / 18, 10 / 9, 10 / 3))
    total, items = fitted.loss(Fixed(logits), {"labels": target}, label_smoothing=0.1)
    reference = torch.nn.CrossEntropyLoss(weight=torch.tensor(fitted.weights), label_smoothing=0.1)
    assert total.item() / items == pytest.approx(reference(torch.tensor(logits), target).item(), rel=1e-6)
    assert total.dtype == torch.float32

    several = task(problem="multi-label", class_weights="balanced").fit({"train": counts(rows=10, a=5, b=2, c=1)})
    assert several.weights == pytest.approx((1.0, 4.0, 9.0))
    truth = torch.tensor([[1.0, 0, 0], [0, 1, 1]])
    total, items = several.loss(Fixed(logits), {"labels": truth}, label_smoothing=0.2)
    reference = torch.nn.BCEWithLogitsLoss(pos_weight=torch.tensor(several.weights))
    assert total.item() / items == pytest.approx(reference(torch.tensor(logits), truth * 0.8 + 0.1).item(), rel=1e-6)


def test_the_model_knows_its_labels_and_takes_another_head(base, tmp_path):
    first = task(labels=["neg", "pos"]).model(base)
    assert first.config.id2label == {0: "neg", 1: "pos"}
    assert first.config.label2id == {"neg": 0, "pos": 1}
    first.save_pretrained(tmp_path / "two")
    three = task(labels=["1", "2", "3"]).model(str(tmp_path / "two"))
    assert three.config.num_labels == 3
    assert three.classifier.out_features == 3
    assert three.config.problem_type == "single_label_classification"
    again = task(labels=["neg", "pos"]).model(str(tmp_path / "two"))
    assert torch.equal(again.classifier.weight, first.classifier.weight)
    number = task(problem="regression").model(base)
    assert number.config.problem_type == "regression"
    assert number.config.id2label == {0: "value"}


def test_a_base_without_such_a_head_or_too_short_is_refused(base, tmp_path):
    from transformers import CLIPConfig

    CLIPConfig().save_pretrained(tmp_path)
    with pytest.raises(InputError, match="is a 'clip' model, for which transformers has no sequence-classification head"):
        task(labels=["a", "b"]).model(str(tmp_path))
    with pytest.raises(InputError, match=r"task\.max_length is 65, but the base model .* has only 64 positions"):
        task(labels=["a", "b"], max_length=65).model(base)


def test_a_decoder_reads_the_last_token_that_is_not_padding(tmp_path):
    from orchestrator import predictor, processors

    decoder = text_base(tmp_path, TEXTS, "gpt2")
    one = task(labels=["a", "b"])
    tokenizer = processors.load(decoder, "text")
    torch.manual_seed(0)
    model = one.model(decoder, dtype=torch.float32)
    assert model.config.pad_token_id == tokenizer.pad_token_id == tokenizer.eos_token_id
    examples = [example for [example] in one.encode([{"text": "a b c d e f"}, {"text": "good"}], tokenizer)]
    together = predictor.forward(one, model, tokenizer, examples, tokens=100, precision="fp32")
    alone = predictor.forward(one, model, tokenizer, examples[1:], tokens=100, precision="fp32")
    assert together[1] == pytest.approx(alone[0], abs=1e-5)


# ---- answers -------------------------------------------------------------------------------------------------
def test_predictions_say_label_and_scores():
    one = task(labels=["a", "b"]).decode({}, [np.array([0.0, 1000.0], dtype=np.float32)])
    assert one == {"label": "b", "score": 1.0, "scores": {"a": 0.0, "b": 1.0}, "logits": [0.0, 1000.0]}
    several = task(problem="multi-label", labels=["a", "b", "c"], threshold=0.3).decode({}, [np.array([-0.5, -1000, 9], dtype=np.float32)])
    assert several["labels"] == ["a", "c"]
    assert several["scores"] == pytest.approx({"a": 1 / (1 + math.exp(0.5)), "b": 0.0, "c": 1 / (1 + math.exp(-9))})
    assert task(problem="regression").decode({}, [np.array([2.5], dtype=np.float32)]) == {"value": 2.5}


def test_answers_are_what_hugging_face_clients_need():
    one = task(labels=["a", "b", "c"])
    prediction = one.decode({}, [np.array([0.0, 2.0, 1.0], dtype=np.float32)])
    [answer] = one.answer([prediction], ClassificationParameters(), single=True)
    assert [entry["label"] for entry in answer] == ["b", "c", "a"]
    assert sum(entry["score"] for entry in answer) == pytest.approx(1)
    assert one.answer([prediction] * 2, ClassificationParameters(top_k=1), single=False) == [[answer[0]]] * 2
    raw = one.answer([prediction], ClassificationParameters(function_to_apply="none"), single=True)
    assert raw == [[{"label": "b", "score": 2.0}, {"label": "c", "score": 1.0}, {"label": "a", "score": 0.0}]]
    sigmoid = one.answer([prediction], ClassificationParameters(function_to_apply="sigmoid"), single=True)
    assert sigmoid[0][2]["score"] == 0.5
    number = task(problem="regression")
    assert number.answer([{"value": 3.5}], ClassificationParameters(), single=True) == [[{"label": "value", "score": 3.5}]]


@pytest.mark.parametrize("parameters", [{"top_k": 0}, {"top_k": "many"}, {"function_to_apply": "tanh"}, {"topk": 1}])
def test_parameters_that_do_not_fit_are_refused(parameters):
    with pytest.raises(InputError):
        ClassificationParameters.parse(parameters, "parameters")


@pytest.mark.parametrize(
    ("inputs", "sentence"),
    [
        ([], "`inputs` is an empty list"),
        (None, "`inputs` is None; it must be a text or"),
        (["good", 5], r"`inputs\[1\]` is 5; it must be a text or"),
        ("", "`inputs`: expected a text that is not empty"),
        (["ok", {"text": " "}], r"`inputs\[1\]`: expected a text that is not empty"),
        ({"text": "a", "pair": "b"}, "`inputs` has the unknown key 'pair'"),
        ({"text": ["a"]}, r"`inputs\.text` is \['a'\]; it must be a text"),
        ("\ud83d", "half of a surrogate pair"),
        ([["a"] * 1000], r"`inputs\[0\]` is \[.*…; it must be a text"),
    ],
)
def test_inputs_that_do_not_fit_are_a_sentence(inputs, sentence):
    with pytest.raises(InputError, match=sentence) as raised:
        task(labels=["a", "b"]).rows_from(inputs)
    str(raised.value).encode()


def test_strange_but_right_inputs_are_answered(base, tokenizer):
    one = task(labels=["a", "b"])
    rows = one.rows_from(["\0", "\u200b", "🙂" * 5000, "日本語"])
    encoded = one.encode(rows, tokenizer)
    assert all(1 <= len(example["input_ids"]) <= 64 for [example] in encoded)


def test_near_ties_agree_and_others_do_not():
    one = task(labels=["a", "b"])

    def says(a):
        return {"label": "a" if a >= 0.5 else "b", "score": max(a, 1 - a), "scores": {"a": a, "b": 1 - a}, "logits": [a * 100, 0.0]}

    assert one.agree(says(0.505), says(0.495), 0.02)
    assert not one.agree(says(0.60), says(0.55), 0.02)
    assert one.answer_difference([[{"label": "a", "score": 0.51}, {"label": "b", "score": 0.49}]], [[{"label": "b", "score": 0.5}, {"label": "a", "score": 0.5}]]) == pytest.approx(0.01)  # fmt: skip
    assert one.answer_difference([[{"label": "a", "score": 0.5}]], [[{"label": "b", "score": 0.5}]]) == math.inf
    number = task(problem="regression")
    assert number.agree({"value": 1000.0}, {"value": 1001.0}, 0.02)
    assert not number.agree({"value": 1.0}, {"value": 1.1}, 0.02)
