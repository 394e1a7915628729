"""What is special about token classification: words and their places, schemes of tags, windows, scores and answers."""

import json
import math
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from orchestrator import metrics, predictor, processors
from orchestrator.config import DataSection
from orchestrator.data.files import SourceFile
from orchestrator.data.spool import Reading
from orchestrator.errors import InputError
from orchestrator.storage import Folder
from orchestrator.tasks import create, tags, words
from orchestrator.tasks.base import RowError
from orchestrator.tasks.windows import windows
from tests.fixtures import oracles, tiny
from tests.unit import live


def task(**fields: Any) -> Any:
    return create({"name": "token-classification", **fields})


def fitted(*rows: dict[str, Any], **fields: Any) -> Any:
    one = task(**fields)
    return one.fit({"train": one.observe([one.clean(row) for row in rows])})


def spans(text: str, *found: tuple[str, str]) -> list[dict[str, Any]]:
    return [{"start": text.index(word), "end": text.index(word) + len(word), "label": label} for word, label in found]


def test_settings_that_can_not_be() -> None:
    for wrong, says in (({"max_length": 8, "stride": 8}, "stride is 8"), ({"labels": []}, "labels")):
        with pytest.raises(InputError, match=says):
            task(**wrong)


# ---- words ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("Bob, U.S. (3-0)", ["Bob", ",", "U", ".", "S", ".", "(", "3", "-", "0", ")"]),
        ("don't  @user\n#tag_x", ["don", "'", "t", "@", "user", "#", "tag", "_", "x"]),
        ("北京2008年に", ["北", "京", "2008", "年", "に"]),
        ("cafe\u0301 Ångström Σ", ["cafe\u0301", "Ångström", "Σ"]),
        ("👩‍👩‍👧 ok 🇫🇷👍🏽", ["👩‍👩‍👧", "ok", "🇫🇷", "👍🏽"]),
        ("हिन्दी में", ["हिन्दी", "में"]),
        ("می\u200cروم", ["می\u200cروم"]),
        ("กิน", ["กิ", "น"]),
        ("서울에서", ["서울에서"]),
        ("a\u200bb \xa0\u3000c", ["a", "\u200b", "b", "c"]),
        (" \n\t", []),
    ],
)
def test_words_of_a_text(text, wanted):
    assert [text[start:end] for start, end in words.split(text)] == wanted


@pytest.mark.parametrize(
    ("tokens", "text"),
    [
        (["Bob", "'s", "."], "Bob 's ."),
        (["人民", "日报", "，", "1998", "年"], "人民日报， 1998 年"),
        (["北京", "Hotel", "東京"], "北京 Hotel 東京"),
        (["サッカー", "です"], "サッカーです"),
    ],
)
def test_given_words_become_a_text_in_which_they_are_found(tokens, text):
    assert words.join(tokens)[0] == text
    assert [text[start:end] for start, end in words.join(tokens)[1]] == tokens
    assert words.find(tokens, text) == words.join(tokens)[1]


def test_a_text_of_other_words_is_not_that_of_the_words():
    assert words.find(["Bob", "'s"], "Bob's \n") == [(0, 3), (3, 5)]
    assert words.find(["Bob"], "Bob and") is None
    assert words.find(["Bob", "and"], "Bob") is None
    assert words.find(["a", "b"], "ab a") is None


# ---- schemes -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("scheme", "line", "wanted", "repaired"),
    [
        ("BIO", "B-P I-P O B-P B-P", [(0, 2, "P"), (3, 4, "P"), (4, 5, "P")], 0),
        ("BIO", "I-P I-P O I-L B-L I-P", [(0, 2, "P"), (3, 4, "L"), (4, 5, "L"), (5, 6, "P")], 3),
        ("IOB1", "I-P I-P B-P O I-L I-P", [(0, 2, "P"), (2, 3, "P"), (4, 5, "L"), (5, 6, "P")], 0),
        ("IO", "I-P I-P O P L L", [(0, 2, "P"), (3, 4, "P"), (4, 6, "L")], 0),
        ("BIOES", "B-P E-P S-P O B-L I-L E-L", [(0, 2, "P"), (2, 3, "P"), (4, 7, "L")], 0),
        ("BIOES", "B-P O E-P B-L I-L", [(0, 1, "P"), (2, 3, "P"), (3, 5, "L")], 3),
        ("BILOU", "B-P L-P U-P L-P O", [(0, 2, "P"), (2, 3, "P"), (3, 4, "P")], 1),
        ("auto", "B-P M-P E-P O U-geo-loc", [(0, 3, "P"), (4, 5, "geo-loc")], 0),
        ("auto", "O O", [], 0),
        ("auto", "B-P", [(0, 1, "P")], 0),
    ],
)
def test_schemes_are_read_as_entities(scheme, line, wanted, repaired):
    found = tags.entities(line.split(), scheme)
    assert found == (wanted, repaired)
    assert tags.entities(tags.bio(wanted, len(line.split())), "BIO") == (wanted, 0)


def test_entities_of_well_formed_and_of_broken_tags_are_those_of_seqeval():
    from seqeval.metrics.sequence_labeling import get_entities

    rng = np.random.default_rng(0)
    choices = ["O", "B-X", "I-X", "B-Y", "I-Y", "E-X", "S-Y"]
    for _ in range(300):
        line = rng.choice(choices[:5], size=8).tolist()
        assert [(first, last - 1, label) for first, last, label in tags.entities(line, "BIO")[0]] == [
            (start, end, label) for label, start, end in get_entities(line)
        ]


@pytest.mark.parametrize(
    ("fields", "tag", "expected"),
    [
        ({}, "PER", "task.scheme: IO"),
        ({}, "PER", "task.problem: words"),
        ({}, "X-PER", "O or a tag such as B-PER"),
        ({"scheme": "BIO"}, "S-PER", "scheme BIO: O, B-…, I-…"),
        ({"scheme": "IO"}, "B-PER", "scheme IO: O, I-… or a label without a prefix"),
        ({"scheme": "BILOU"}, "E-PER", "scheme BILOU"),
    ],
)
def test_a_tag_that_fits_no_scheme_makes_a_bad_row(fields, tag, expected):
    with pytest.raises(RowError, match=expected) as caught:
        task(**fields).clean({"tokens": ["a", "b"], "tags": ["O", tag]})
    assert (caught.value.column, caught.value.found) == ("tags", tag)


# ---- rows ----------------------------------------------------------------------------------------------------
def test_numbers_of_tags_are_names_where_the_job_says_which():
    one = task(tag_names=["O", "B-PER", "I-PER"])
    assert one.clean({"tokens": ["a", "b"], "tags": [1, 2.0]})["tags"] == ["B-PER", "I-PER"]
    assert one.clean({"tokens": "a b", "tags": "0 1"})["tags"] == ["O", "B-PER"]
    with pytest.raises(RowError, match="a number from 0 to 2"):
        one.clean({"tokens": ["a"], "tags": [3]})
    with pytest.raises(RowError, match=r"task\.tag_names"):
        task().clean({"tokens": ["a"], "tags": [3]})


def test_words_keep_the_spaces_of_their_text_where_it_has_them():
    one = task()
    row = one.clean({"tokens": ["Bob", "'s"], "text": "Bob's", "tags": ["B-PER", "O"]})
    assert row == {"text": "Bob's", "tokens": ["Bob", "'s"], "tags": ["B-PER", "O"]}
    assert one.entities(row) == [{"start": 0, "end": 3, "label": "PER"}]
    assert one.clean({"tokens": ["Bob", "'s"], "text": "robert", "tags": ["B-PER", "O"]})["text"] == "Bob 's"
    assert one.clean({"tokens": ["Bob"], "text": "robert"}) == {"text": "robert"}
    assert task(problem="words").clean({"tokens": ["Bob"], "text": "robert"}) == {"text": "Bob", "tokens": ["Bob"]}


def test_rows_of_annotation_tools_are_understood():
    one, text = task(), "Bob  is in Rome "
    prodigy = {"text": text, "tokens": [{"text": "Bob", "id": 0}], "spans": [{"start": 0, "end": 5, "label": "PER", "token_start": 0}]}
    assert one.clean(prodigy) == {"text": text, "spans": [{"start": 0, "end": 3, "label": "PER"}]}
    doccano = {"text": text, "spans": [[11, 16, "LOC"], [0, 3, "PER"], [0, 3, "PER"]]}
    assert one.clean(doccano)["spans"] == spans(text, ("Bob", "PER"), ("Rome", "LOC"))
    assert one.clean({**doccano, "tags": None})["spans"] == spans(text, ("Bob", "PER"), ("Rome", "LOC"))
    assert one.clean({"text": text, "spans": json.dumps(doccano["spans"])}) == one.clean(doccano)
    assert one.clean({"text": text, "spans": ""})["spans"] == []


def test_words_become_a_text_that_is_kept_and_bad_rows_are_named(tmp_path):
    words_file, spans_file = tmp_path / "names.conll", tmp_path / "names.jsonl"
    words_file.write_text("Bob B-PER\n! O\n\nRome X-LOC\n")
    spans_file.write_text('{"text": "Bob", "spans": [[0, 3, "PER"]]}\n{"text": "Bob", "spans": [[1, 9, "PER"]]}\n')
    kept = {}
    for path, roles, column, found in (
        (words_file, ("tokens", "tags"), "tags", "X-LOC"),
        (spans_file, ("text", "spans"), "spans", "[1, 9, 'PER']"),
    ):
        file = SourceFile(uri=str(path), name=path.name, format=path.suffix[1:], size=path.stat().st_size)
        section = DataSection(train=str(path), max_bad_rows=1)
        spool = Folder(str(tmp_path / path.stem / path.suffix[1:])).make()
        [report] = Reading(task(), section, "train", (file,), {role: role for role in roles}, 0, 1, spool)()
        [said] = report.to_pylist()
        [bad] = json.loads(said["bad_first"])
        assert (bad["file"], bad["column"], bad["found"]) == (path.name, column, found)
        kept[path.suffix] = pa.ipc.read_schema(pa.py_buffer(said["schema"])).names
    assert "text" in kept[".conll"]


def test_overlapping_spans_say_which():
    with pytest.raises(RowError, match=r"PER 'Anna Maria' at 0 to 10 and LOC 'Maria Square' at 5 to 17"):
        task().clean({"text": "Anna Maria Square", "spans": [[0, 10, "PER"], [5, 17, "LOC"]]})


def test_what_is_odd_in_the_data_is_counted_and_said():
    rows = [
        {"tokens": ["Bob", "of", "Rome"], "tags": ["I-PER", "O", "B-LOC"]},
        {"text": "Romeo", "spans": [[0, 4, "LOC"]]},
    ]
    one = task()
    observed = {
        "train": one.observe([one.clean(row) for row in rows]),
        "test": one.observe([one.clean({"tokens": ["x"], "tags": ["B-PERS"]})]),
    }
    assert observed["train"] == {"rows": 2, "labels": {"PER": 1, "LOC": 2}, "repaired": 1, "cut": 1}
    first, second, third = one.fit(observed).remarks(observed)
    assert "1 tag of the train rows fit no entity" in first
    assert "1 entity of the train rows begins or ends within a word" in second
    assert (
        "The test rows have labels that no training row has: 'PERS' (1). They count as missed. The nearest training label is 'PER'" in third
    )


def test_labels_can_be_left_out():
    rows = [{"tokens": ["Bob", "Rome"], "tags": ["B-PER", "B-LOC"]}]
    one = fitted(*rows, ignore_labels=["LOC"])
    assert one.labels == ("PER",)
    assert one.gold(one.clean(rows[0]), [(0, 3), (4, 8)]) == ["B-PER", "O"]


@pytest.mark.parametrize(
    ("fields", "rows", "sentence"),
    [
        ({}, [], "no rows"),
        ({}, [{"tokens": ["a"], "tags": ["O"]}], "None of the 1 training rows has an entity"),
        ({"problem": "words"}, [{"tokens": ["a"], "tags": ["N"]}], "All words of the training rows have the tag 'N'"),
        ({}, [{"tokens": ["a", "b", "c"], "tags": ["B-PER", "B-Per", "B-PER"]}], r"'PER' \(2 times\) and 'Per' \(1 times\)"),
        ({"labels": ["PERS"]}, [{"tokens": ["a"], "tags": ["B-PER"]}], r"does not name: 'PER'. The nearest that it names is 'PERS'"),
        ({"labels": ["PER", "LOC"]}, [{"tokens": ["a"], "tags": ["B-PER"]}], "'LOC', which no training row has. The rows have 'PER'"),
        ({}, [{"tokens": ["a"] * 60, "tags": [f"B-{n}" for n in range(60)]}], r"60 different labels.*is data\.columns right"),
    ],
)
def test_what_cannot_be_learnt_is_refused(fields, rows, sentence):
    with pytest.raises(InputError, match=sentence):
        fitted(*rows, **fields)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"labels": ["O", "B-PER"]}, "labels of entities stand without B-"),
        ({"labels": ["A", "A"]}, "'A' twice"),
        ({"labels": ["A"], "ignore_labels": ["A"]}, "in labels and in ignore_labels"),
        ({"problem": "words", "scheme": "BIO"}, "neither a scheme nor ignore_labels"),
    ],
)
def test_fields_that_do_not_fit_are_refused(fields, sentence):
    with pytest.raises(InputError, match=sentence):
        task(**fields)


# ---- tensors -------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def wordpieces(tmp_path_factory):
    """A BERT tokenizer that cuts words, writes them small and takes their accents away."""
    from transformers import BertTokenizer

    vocabulary = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "un",
        "##aff",
        "##able",
        "cafe",
        "is",
        ",",
        ".",
        "'",
        "s",
        "北",
        "京",
        "a",
        "b",
        "i",
        "##stanbul",
    ]
    return BertTokenizer(vocab={word: place for place, word in enumerate(vocabulary)}, model_max_length=64)


def test_a_word_of_many_tokens_has_one_label_at_the_first(wordpieces):
    one = fitted({"tokens": ["unaffable", "cafe"], "tags": ["B-PER", "B-LOC"]})
    row = one.clean({"tokens": ["unaffable", "is", "unaffable", "café"], "tags": ["B-PER", "O", "B-LOC", "I-LOC"]})
    [[example]] = one.encode([row], wordpieces)
    batch = one.collate([example], wordpieces)
    names = [one._names[label] if label >= 0 else None for label in batch["labels"][0].tolist()]
    assert wordpieces.convert_ids_to_tokens(example["input_ids"])[1:9] == ["un", "##aff", "##able", "is", "un", "##aff", "##able", "cafe"]
    assert names == [None, "B-PER", None, None, "O", "B-LOC", None, None, "I-LOC", None]
    assert example["units"] == [[1, 0, 9], [4, 10, 12], [5, 13, 22], [8, 23, 27]]


@pytest.mark.parametrize("text", ["Cafe\u0301 is 👩‍👩‍👧 café, İstanbul 北京", "is\u200b a\u0301\r\nb", "ﬁ is", "👍🏽is"])
def test_places_are_of_the_text_as_it_was_given(wordpieces, text):
    [its] = windows([text], [words.split(text)], wordpieces, 64, 8)
    [window] = its
    for word, token in zip(window.words, window.tokens, strict=True):
        start, end = words.split(text)[word]
        piece = wordpieces.convert_ids_to_tokens(window.example["input_ids"])[token]
        shown = {"[UNK]": text[start:end]}.get(piece, piece)
        assert text[start:end].casefold()[:1].translate({0xE9: "e"}) == shown[:1].translate({0xE9: "e"}) or piece == "[UNK]"
    assert len(window.words) == sum(text[start:end] != "\u200b" for start, end in words.split(text))


@pytest.fixture(scope="module")
def unigrams(tmp_path_factory):
    """A tokenizer that has tokens of several characters without spaces, and counts the space before a word to its token."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    pieces = ["<pad>", "<unk>", "▁", "▁北京", "北京", "大学", "▁in", "▁Rome", "▁Bob", "'s", "。"]
    tokenizer = Tokenizer(models.Unigram([(piece, -float(place)) for place, piece in enumerate(pieces)], unk_id=1))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", model_max_length=32)


def test_words_that_share_a_token_are_one_unit_of_entities(unigrams):
    text = "北京大学 in Rome"
    row = {"text": text, "spans": spans(text, ("北京大学", "ORG"), ("Rome", "LOC"))}
    one = fitted(row)
    [[example]] = one.encode([one.clean(row)], unigrams)
    assert [(start, end) for _, start, end in example["units"]] == [(0, 2), (2, 4), (5, 7), (8, 12)]
    assert [one._names[label] for label in example["labels"]] == ["B-ORG", "I-ORG", "O", "B-LOC"]


def test_words_that_share_a_token_each_get_its_tag(unigrams):
    row = {"tokens": ["北", "京", "in"], "tags": ["A", "B", "C"]}
    one = fitted(row, problem="words")
    [[example]] = one.encode([one.clean(row)], unigrams)
    assert [(start, end) for _, start, end in example["units"]] == [(0, 1), (1, 2), (3, 5)]
    batch = one.collate([example], unigrams)
    assert [label for label in batch["labels"][0].tolist() if label >= 0] == [0, 2]
    assert one.loss(_Says(one, 5), batch)[1] == 2.0


class _Says(torch.nn.Module):
    """A model that says what the token ids tell it: the label `id % labels`."""

    def __init__(self, one: Any, scale: float):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.labels, self.scale = len(one._names), scale

    def forward(self, input_ids, **inputs):
        assert not inputs.keys() & {"labels", "units"}
        logits = torch.nn.functional.one_hot(input_ids % self.labels, self.labels) * self.scale
        return type("Output", (), {"logits": (logits + self.weight).to(torch.bfloat16)})()


@pytest.fixture(scope="module")
def letters(tmp_path_factory):
    base = tiny.text_base(tmp_path_factory.mktemp("letters"), [" ".join("abcdefghijklmnopqrstuvwxyz")])
    return processors.load(base, "text")


@pytest.mark.parametrize("stride", [0, 1, 3, 5])
@pytest.mark.parametrize("size", [1, 7, 8, 9, 15, 26, 100])
def test_each_word_is_in_one_window_with_most_context(letters, size, stride):
    text = " ".join("abcdefghijklmnopqrstuvwxyz"[place % 26] for place in range(size))
    [its] = windows([text], [words.split(text)], letters, 10, stride)
    assert [word for window in its for word in window.words] == list(range(size))
    for place, window in enumerate(its):
        ids = letters.convert_ids_to_tokens(window.example["input_ids"])
        assert len(ids) <= 10
        assert (ids[0], ids[-1]) == ("[CLS]", "[SEP]")
        assert [ids[token] for token in window.tokens] == [text[2 * word] for word in window.words]
        left = min(window.tokens) - 1 if place else math.inf
        right = len(ids) - 2 - max(window.tokens) if place < len(its) - 1 else math.inf
        assert min(left, right) >= stride // 2


def test_an_entity_over_the_edge_of_windows_is_whole(letters):
    text = " ".join("abcdefghijklmnopqrstuvwxyz")
    row = {"text": text, "spans": [{"start": 6, "end": 40, "label": "LONG"}, {"start": 40, "end": 41, "label": "LONG"}]}
    one = fitted(row, max_length=8, stride=2)
    [examples] = one.encode([one.clean(row)], letters)
    assert len(examples) == 6
    assert sum(label >= 0 for label in one.collate(examples, letters)["labels"].flatten().tolist()) == 26
    outputs = [
        np.array([[start, end, *np.eye(3)[label] * 9] for (_, start, end), label in zip(one_["units"], one_["labels"], strict=True)])
        for one_ in examples
    ]
    found = one.decode(row, outputs)["entities"]
    assert [(entity["start"], entity["end"]) for entity in found] == [(6, 39), (40, 41)]
    assert found[0]["word"] == text[6:39]


def test_a_window_must_be_longer_than_the_stride(letters):
    with pytest.raises(InputError, match=r"task\.max_length is 8 and task\.stride 6"):
        task(max_length=8, stride=6).encode([{"text": "a b c d e f g h"}], letters)
    assert len(task(max_length=8, stride=6).encode([{"text": "a b"}], letters)[0]) == 1


def test_a_slow_tokenizer_is_refused(letters):
    slow = type("Slow", (), {"is_fast": False, "model_max_length": 64})()
    with pytest.raises(InputError, match=r"does not say where in the text a token stands"):
        task().encode([{"text": "a"}], slow)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_moves_labels_and_units_along(letters, side):
    letters.padding_side = side
    rows = [{"tokens": ["a", "b", "c"], "tags": ["B-X", "O", "B-X"]}, {"tokens": ["d"], "tags": ["B-X"]}]
    one = fitted(*rows)
    batch = one.collate([example for [example] in one.encode([one.clean(row) for row in rows], letters)], letters)
    letters.padding_side = "right"
    for ids, units, labels in zip(batch["input_ids"], batch["units"], batch["labels"], strict=True):
        shown = [letters.convert_ids_to_tokens(int(ids[token])) for token, _, _ in units.tolist() if token >= 0]
        assert shown == [letters.convert_ids_to_tokens(int(token)) for token in ids[labels >= 0]]
        assert "[PAD]" not in shown
    with torch.no_grad():
        assert one.infer(_Says(one, 1), batch)[1].shape == (1, 5)


def test_a_text_without_any_word_is_answered(letters):
    one = fitted({"tokens": ["a"], "tags": ["B-X"]})
    row = one.clean({"text": "\u200b\u0301"})
    [[example]] = one.encode([row], letters)
    found = one.decode(row, predictor.forward(one, _Says(one, 1), letters, [example], tokens=10, precision="fp32"))
    assert found["entities"] == [] or all(entity["word"] for entity in found["entities"])
    assert one.score([found], [one.clean({"text": "\u200b\u0301", "spans": []})])["f1"] == 0.0


def test_losses_are_those_of_transformers(tmp_path):
    rows = [{"tokens": ["a", "b", "c"], "tags": ["B-X", "I-X", "O"]}, {"tokens": ["b"], "tags": ["B-Y"]}]
    one = fitted(*rows)
    base = tiny.text_base(tmp_path, ["a b c"])
    processor, model = processors.load(base, "text"), one.model(base, dtype=torch.float32)
    assert model.config.id2label == {0: "O", 1: "B-X", 2: "I-X", 3: "B-Y", 4: "I-Y"}
    batch = one.collate([example for [example] in one.encode([one.clean(row) for row in rows], processor)], processor)
    plain = {key: value for key, value in batch.items() if key != "units"}
    total, items = one.loss(model, batch)
    assert items == 4.0
    assert total.item() / items == pytest.approx(model(**plain).loss.item(), rel=1e-5)
    smooth, _ = one.loss(model, batch, label_smoothing=0.1)
    reference = torch.nn.CrossEntropyLoss(label_smoothing=0.1)(model(**plain).logits.flatten(0, 1), batch["labels"].flatten())
    assert smooth.item() / items == pytest.approx(reference.item(), rel=1e-5)


def test_a_base_without_such_a_head_is_refused(tmp_path):
    from transformers import BertConfig, ViTConfig

    ViTConfig().save_pretrained(tmp_path / "vit")
    with pytest.raises(InputError, match="no token-classification head"):
        task().check_base(str(tmp_path / "vit"))
    BertConfig(max_position_embeddings=64).save_pretrained(tmp_path / "bert")
    with pytest.raises(InputError, match="has only 64 positions"):
        task(max_length=65).check_base(str(tmp_path / "bert"))


# ---- scores --------------------------------------------------------------------------------------------------
def says(one: Any, text: str, found: list[tuple[str, str]]) -> dict[str, Any]:
    """The prediction of a model that finds these."""
    row = {"text": text, "spans": spans(text, *found)}
    return one.decode(row, oracles.outputs(one, row))


def test_scores_are_those_of_seqeval_on_the_words():
    text = "Anna Maria of New York met Ben in Rome"
    right = {"text": text, "spans": spans(text, ("Anna Maria", "PER"), ("New York", "LOC"), ("Ben", "PER"), ("Rome", "LOC"))}
    one = fitted(right)
    given = says(one, text, [("Anna", "PER"), ("New York", "LOC"), ("Ben", "LOC"), ("Rome", "LOC")])
    scores = one.score([given], [right])
    assert scores == pytest.approx({"f1": 0.5, "precision": 0.5, "recall": 0.5, "accuracy": 7 / 9})
    more = one.score([given], [right], ["f1/LOC", "recall/PER", "precision/LOC", "f1_macro"])
    assert more == pytest.approx({"f1/LOC": 0.8, "recall/PER": 0.0, "precision/LOC": 2 / 3, "f1_macro": 0.4})
    tables = one.tables([given], [right])
    assert [(line["label"], line["entities"], line["predicted"]) for line in tables["per_label"]] == [("LOC", 2, 3), ("PER", 2, 1)]
    assert tables["per_label"][0]["f1"] == pytest.approx(0.8)


def test_a_border_within_a_word_is_never_found():
    right = {"text": "Londoner here", "spans": [{"start": 0, "end": 6, "label": "LOC"}]}
    one = fitted(right)
    given = one.decode(right, oracles.outputs(one, right))
    assert given["entities"][0]["word"] == "Londoner"
    assert one.score([given], [right])["f1"] == 0.0
    assert one.tables([given], [right])["borders"][0]["count"] == 1


def test_labels_that_were_never_learnt_count_as_missed():
    one = fitted({"tokens": ["Bob"], "tags": ["B-PER"]})
    row = one.clean({"tokens": ["Bob", "Rome"], "tags": ["B-PER", "B-LOC"]})
    given = says(one, "Bob Rome", [("Bob", "PER")])
    assert one.score([given], [row]) == pytest.approx({"f1": 2 / 3, "precision": 1.0, "recall": 0.5, "accuracy": 0.5})
    assert [line["label"] for line in one.tables([given], [row])["per_label"]] == ["PER", "LOC"]


def test_words_are_scored_one_by_one():
    rows = [{"tokens": ["a", "day", "in"], "tags": ["DET", "NOUN", "PREP"]}, {"tokens": ["a", "\u200b"], "tags": ["DET", "X"]}]
    one = fitted(*rows, problem="words")
    clean = [one.clean(row) for row in rows]
    given = [one.decode(row, oracles.outputs(one, row)) for row in clean]
    assert one.score(given, clean) == {"accuracy": 1.0, "f1_macro": 1.0}
    given[1]["words"].pop()
    assert one.score(given, clean)["accuracy"] == pytest.approx(0.8)
    tables = one.tables(given, clean)
    assert [line["label"] for line in tables["confusion_matrix"]] == ["DET", "NOUN", "PREP", "X"]
    assert tables["confusion_matrix"][3]["predicted (none)"] == 1


def test_no_rows_and_unknown_metrics(monkeypatch):
    shipped = metrics.load("entities")

    def load(name, config=None):
        if name != "entities":
            raise InputError("There is no module.")
        return shipped

    one = fitted({"tokens": ["Bob"], "tags": ["B-PER"]})
    assert one.score([], []) == {}
    row = one.clean({"tokens": ["Bob"], "tags": ["B-PER"]})
    monkeypatch.setattr(metrics, "load", load)
    with pytest.raises(InputError, match=r"'f1/PERS' is no metric of this task\. Did you mean 'f1/PER'"):
        one.score([says(one, "Bob", [])], [row], ["f1/PERS"])


# ---- answers -------------------------------------------------------------------------------------------------
TEXT = "Anna Maria lives in New York."


@pytest.fixture(scope="module")
def known():
    row = {"text": TEXT, "spans": spans(TEXT, ("Anna Maria", "PER"), ("New York", "LOC"))}
    return fitted(row), row


def answered(known: Any, **parameters: Any) -> Any:
    one, row = known
    return one.answer([one.decode(row, oracles.outputs(one, row))], one.parameters(**parameters), single=True)


@pytest.mark.parametrize("strategy", ["simple", "first", "average", "max"])
def test_entities_are_grouped_unless_asked_otherwise(known, strategy):
    found = answered(known, aggregation_strategy=strategy)
    assert found == answered(known)
    assert [(one["entity_group"], one["word"], one["start"], one["end"]) for one in found] == [("PER", "Anna Maria", 0, 10), ("LOC", "New York", 20, 28)]  # fmt: skip
    assert all(0.99 < one["score"] <= 1 for one in found)


def test_labels_that_are_not_ignored_are_answered(known):
    assert [one["entity_group"] for one in answered(known, ignore_labels=["PER", "O"])] == ["LOC"]
    every = answered(known, ignore_labels=[])
    assert [(one["entity_group"], one["word"]) for one in every] == [
        ("PER", "Anna Maria"), ("O", "lives in"), ("LOC", "New York"), ("O", "."),
    ]  # fmt: skip
    none = answered(known, aggregation_strategy="none")
    assert [(one["entity"], one["index"], one["word"]) for one in none] == [
        ("B-PER", 1, "Anna"), ("I-PER", 2, "Maria"), ("B-LOC", 5, "New"), ("I-LOC", 6, "York"),
    ]  # fmt: skip
    assert len(answered(known, aggregation_strategy="none", ignore_labels=[])) == 7


def test_words_are_answered_without_grouping():
    row = {"tokens": ["Anna", "Maria", "lives"], "tags": ["NAME", "NAME", "O"]}
    one = fitted(row, problem="words")
    row = one.clean(row)
    [found] = one.answer([one.decode(row, oracles.outputs(one, row))], one.parameters(), single=False)
    assert [(word["entity_group"], word["word"]) for word in found] == [("NAME", "Anna"), ("NAME", "Maria"), ("O", "lives")]


def test_a_label_may_differ_only_where_scores_could_have_changed_it():
    one = task()

    def prediction(*scored: tuple[str, float]) -> dict[str, Any]:
        return {"words": [{"label": label, "score": score, "start": 2 * n, "end": 2 * n + 1} for n, (label, score) in enumerate(scored)]}

    sure = prediction(("O", 0.99), ("B-X", 0.9))
    assert one.difference(sure, prediction(("O", 0.98), ("B-X", 0.9))) == pytest.approx(0.01)
    assert one.difference(sure, prediction(("O", 0.99), ("O", 0.9))) == pytest.approx(0.8)
    assert one.agree(prediction(("O", 0.505)), prediction(("B-X", 0.5)), 0.02)
    assert one.difference(prediction(("O", 0.4)), prediction(("B-X", 0.3))) == pytest.approx(0.1)
    assert one.difference(sure, prediction(("O", 0.99))) == math.inf
    assert not one.agree(sure, prediction(("O", 0.99)), math.inf)


def test_replays_compare_every_word(known):
    one, row = known
    prediction = one.decode(row, oracles.outputs(one, row))
    other = {**prediction, "words": [{**word, "label": "O"} if word["word"] == "York" else word for word in prediction["words"]]}
    asked = one.replay_parameters()
    assert one.parameters.parse(asked.model_dump(mode="json", exclude_defaults=True)) == asked
    wanted, found = (one.answer([said], asked, single=True) for said in (prediction, other))
    assert one.answer_difference(wanted, wanted) == 0
    assert one.answer_difference(wanted, found) > 0.9
    assert one.answer_difference([wanted, wanted], [wanted, found]) > 0.9
    assert one.answer_difference(wanted, wanted[1:]) == math.inf


def test_a_client_of_hugging_face_gets_its_answers(known):
    from huggingface_hub import InferenceClient

    one, labelled = known

    class Engine:
        """Knows the entities of one text."""

        task = one

        def encode(self, rows):
            return [[{"input_ids": row["text"].split(), "row": row}] for row in rows]

        def infer(self, examples):
            return [
                oracles.outputs(one, {**example["row"], "spans": labelled["spans"] * (example["row"]["text"] == TEXT)})[0]
                for example in examples
            ]

        def decode(self, row, outputs):
            return one.decode(row, outputs)

    with live.endpoint(Engine()) as url:
        client = InferenceClient(model=url)
        found = client.token_classification(TEXT)
        assert [(entity.entity_group, entity.word, entity.start, entity.end) for entity in found] == [("PER", "Anna Maria", 0, 10), ("LOC", "New York", 20, 28)]  # fmt: skip
        raw = client.token_classification(TEXT, aggregation_strategy="none", ignore_labels=["O", "B-PER"], stride=16)
        assert [entity.entity for entity in raw] == ["I-PER", "B-LOC", "I-LOC"]
        assert client.token_classification("nobody here") == []
