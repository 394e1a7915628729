"""Masked language modelling: which tokens are hidden, the head that computes for those only, perplexity, and clients of the endpoint."""

import copy
import json
import math
import random
from typing import Any

import pyarrow as pa
import pytest
import torch

from orchestrator import models
from orchestrator.config import DataSection, ModelSection
from orchestrator.data.files import SourceFile
from orchestrator.data.spool import Reading
from orchestrator.errors import InputError
from orchestrator.loading import Weights
from orchestrator.storage import Folder
from orchestrator.tasks import create, hidden_only, masks
from tests.fixtures.tiny import text_base
from tests.unit import live

WORDS = [f"w{number}" for number in range(60)]
LONG = " ".join(WORDS[number % 60] for number in range(200))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return text_base(tmp_path_factory.mktemp("base"), [*WORDS, "the goal of life is ."])


@pytest.fixture(scope="module")
def tokenizer(base):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(base)


@pytest.fixture(scope="module")
def pieces():
    """A tokenizer that cuts words: each letter is a token, those inside a word marked."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    letters = "abcdefgh"
    vocabulary = {
        token: place
        for place, token in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters)])
    }
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=64, **names)


def task(**fields) -> Any:
    return create({"name": "masked-lm", **fields})


# ---- windows and masks ---------------------------------------------------------------------------------------
def test_a_long_text_is_cut_into_equal_parts_and_nothing_is_lost(tokenizer):
    [examples] = task(max_length=30).encode([{"text": LONG}], tokenizer)
    assert len(examples) == math.ceil(200 / 28)
    assert {len(example["input_ids"]) for example in examples} == {27}
    together = []
    for example in examples:
        ids = list(example["input_ids"])
        for position, label in zip(example["positions"], example["labels"], strict=True):
            ids[position] = label
        assert (ids[0], ids[-1]) == (tokenizer.cls_token_id, tokenizer.sep_token_id)
        together += ids[1:-1]
    assert together == tokenizer(LONG, add_special_tokens=False)["input_ids"]


def test_what_is_hidden_depends_on_the_text_or_on_the_seed(tokenizer):
    of = task()
    rows = [{"text": "w1 w2 w3 w4 w5 w6 w7 w8", "row_id": "a:1"}, {"text": "w8 w7 w6 w5 w4 w3 w2 w1", "row_id": "a:2"}]
    assert of.encode(rows, tokenizer) == of.encode([{**row, "row_id": "b:9"} for row in rows], tokenizer)

    def hidden(*seeds):
        return [example["positions"] for [example] in of.encode_to_train(rows, tokenizer, seeds)]

    assert hidden(1, 2) == hidden(1, 2)
    assert hidden(1, 2)[::-1] != hidden(1, 2)
    assert len({tuple(hidden(seed, 0)[0]) for seed in range(20)}) > 3
    [[example]] = of.encode_to_train(rows[:1], tokenizer, [1])
    assert example.keys() == {"input_ids", "token_type_ids", "attention_mask", "positions", "labels"}


def test_eight_in_ten_become_the_mask_one_another_token_one_stays(tokenizer):
    examples = [example for its in task().encode_to_train([{"text": LONG}] * 50, tokenizer, range(50)) for example in its]
    fates = {"mask": 0, "same": 0, "other": 0}
    for example in examples:
        assert len(example["positions"]) == round(0.15 * (len(example["input_ids"]) - 2))
        for position, label in zip(example["positions"], example["labels"], strict=True):
            found = example["input_ids"][position]
            fates["mask" if found == tokenizer.mask_token_id else "same" if found == label else "other"] += 1
    total = sum(fates.values())
    assert fates["mask"] / total == pytest.approx(0.8, abs=0.03)
    assert fates["same"] / total == pytest.approx(0.1, abs=0.03)
    assert fates["other"] / total == pytest.approx(0.1, abs=0.03)


def test_whole_words_are_hidden_together(pieces):
    of, text = task(whole_word_mask=True, mlm_probability=0.3), "abc de fgh a abcd cab"
    words = pieces(text).word_ids()
    for seed in range(20):
        [[example]] = of.encode_to_train([{"text": text}], pieces, [seed])
        chosen = {words[position] for position in example["positions"]}
        assert sorted(place for place, word in enumerate(words) if word in chosen) == example["positions"]
        assert len(example["positions"]) <= round(0.3 * 16)
    [[single]] = of.encode_to_train([{"text": "abcdefgh"}], pieces, [0])
    assert len(single["positions"]) == 8


def test_special_and_unknown_tokens_are_never_hidden(tokenizer):
    [[example]] = task(mlm_probability=0.9).encode_to_train([{"text": "w1 unseen [SEP] [MASK] w2"}], tokenizer, [0])
    assert set(example["labels"]) <= set(tokenizer(["w1 w2"], add_special_tokens=False)["input_ids"][0])
    [[nothing]] = task().encode([{"text": "unseen"}], tokenizer)
    assert nothing["positions"] == []


def test_odd_texts_have_parts_of_the_right_size(tokenizer):
    rows = [{"text": text} for text in ("\u200b", "w1\r\nw2", "😀", "[CLS]", "w1" * 5000, " w1 ")]
    of = task(max_length=8)
    for its in of.encode(rows, tokenizer):
        assert its
        assert all(len(example["input_ids"]) <= 8 for example in its)


def test_a_tokenizer_without_a_mask_is_refused(tmp_path):
    from transformers import AutoTokenizer

    decoder = AutoTokenizer.from_pretrained(text_base(tmp_path, WORDS, "gpt2"))
    with pytest.raises(InputError, match="has no mask token"):
        task().encode([{"text": "w1"}], decoder)
    with pytest.raises(InputError, match="'gpt2' model, for which transformers has no masked-language-model head"):
        task().check_base(str(tmp_path))


# ---- model ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("side", ["right", "left"])
def test_the_head_computes_for_hidden_tokens_what_it_computes_for_all(base, tokenizer, side):
    torch.manual_seed(0)
    of = task(max_length=20)
    model = of.model(base, dtype=torch.float32).eval()
    examples = [example for its in of.encode([{"text": LONG}, {"text": "w1 w2 w3"}], tokenizer) for example in its]
    tokenizer.padding_side = side
    batch = of.collate(examples, tokenizer)
    tokenizer.padding_side = "right"
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask", "token_type_ids")}
    seen = []
    handle = model.get_output_embeddings().register_forward_hook(lambda module, given, output: seen.append(output.shape))
    found = hidden_only.logits(model, inputs, batch["positions"])
    handle.remove()
    assert seen[0][:-1] == (1, len(batch["positions"]))
    labels = torch.full_like(batch["input_ids"], masks.NOT_KNOWN)
    labels.view(-1)[batch["positions"]] = batch["labels"]
    whole = model(**inputs, labels=labels)
    assert torch.allclose(found, whole.logits.reshape(-1, whole.logits.shape[-1])[batch["positions"]], atol=1e-5)
    total, count = of.loss(model, batch)
    assert total.item() / count == pytest.approx(whole.loss.item(), rel=1e-5)
    assert count == sum(len(example["positions"]) for example in examples)
    twin = copy.deepcopy(model)
    assert of.loss(twin, batch)[0].item() == pytest.approx(total.item())
    assert twin.hidden_only is not model.hidden_only  # type: ignore[union-attr]


def test_adapters_and_data_parallel_wrappers_keep_the_gate(base, tokenizer):
    of = task()
    model = of.model(base, dtype=torch.float32).eval()
    batch = of.collate([example for its in of.encode([{"text": LONG}], tokenizer) for example in its], tokenizer)
    plain = of.loss(model, batch)[0].item()

    class Wrapper(torch.nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

        def forward(self, **inputs):
            return self.module(**inputs)

    assert of.loss(Wrapper(model), batch)[0].item() == pytest.approx(plain)
    adapted = models.with_adapters(copy.deepcopy(model), ModelSection.model_validate({"base": base, "lora": {}}), Weights())
    assert of.loss(adapted, batch)[0].item() == pytest.approx(plain)


def test_a_batch_with_nothing_hidden_has_no_loss(base, tokenizer):
    of = task()
    model = of.model(base, dtype=torch.float32)
    [[example]] = of.encode([{"text": "unseen"}], tokenizer)
    total, count = of.loss(model, of.collate([example], tokenizer))
    assert (total.item(), count) == (0.0, 0.0)
    total.backward()
    with torch.no_grad():
        found = of.infer(model.eval(), of.collate([example], tokenizer))
    assert found == [{"hidden": 0, "right": 0, "loss": 0.0, "masks": []}]


# ---- answers -------------------------------------------------------------------------------------------------
def mask(start, end, *fills):
    return {
        "start": start,
        "end": end,
        "tokens": list(range(len(fills))),
        "scores": [0.5 / (1 + place) for place in range(len(fills))],
        "texts": list(fills),
    }


def outcome(*masks, hidden=0, right=0, loss=0.0):
    return {"hidden": hidden, "right": right, "loss": loss, "masks": list(masks)}


@pytest.mark.parametrize(
    ("text", "place", "fill", "sequence"),
    [
        ("The Life is [MASK].", (12, 18), "good", "The Life is good."),
        ("life is <mask>.", (7, 14), " good", "life is good."),  # RoBERTa's mask takes the space before it
        ("life is <mask>.", (8, 14), " good", "life is good."),
        ("life is <mask>.", (7, 14), "good", "life is good."),  # as SentencePiece decodes a token
        ("walk[MASK]", (4, 10), "##ing", "walking"),
        ("<mask>!", (0, 6), " Hello", "Hello!"),
        ("😀[MASK]", (1, 7), "é", "😀é"),
    ],
)
def test_a_filled_text_keeps_its_other_characters(text, place, fill, sequence):
    prediction = task().decode({"text": text}, [outcome(mask(*place, fill))])
    assert prediction["sequence"] == sequence
    [answer] = task().answer([prediction], task().parameters(), single=True)
    assert answer == {"score": 0.5, "token": 0, "token_str": fill, "sequence": sequence}


def test_several_masks_have_a_list_each_with_the_likeliest_at_the_others():
    row = {"text": "a [MASK] b [MASK]"}
    prediction = task().decode(row, [outcome(mask(2, 8, "x", "yy")), outcome(mask(11, 17, "z", "w"))])
    first, second = task().answer([prediction], task().parameters(), single=True)
    assert [fill["sequence"] for fill in first] == ["a x b z", "a yy b z"]
    assert [fill["sequence"] for fill in second] == ["a x b z", "a x b w"]


def test_perplexity_and_accuracy_are_over_the_hidden_tokens():
    of = task()
    predictions = [
        of.decode({"text": "w1"}, [outcome(hidden=3, right=1, loss=4.0)]),
        of.decode({"text": "w2"}, [outcome(hidden=1, right=1, loss=2.0)]),
    ]
    assert of.score(predictions, [{}, {}]) == {"perplexity": pytest.approx(math.exp(1.5)), "accuracy": 0.5}
    assert of.of_loss(1.5) == {"perplexity": pytest.approx(math.exp(1.5))}
    assert math.isfinite(of.of_loss(1e9)["perplexity"])
    assert of.score([of.decode({"text": "[MASK]"}, [outcome()])], [{}]) == {}
    assert not of.higher_is_better(of.objective)
    with pytest.raises(InputError, match=r"'perplexty' is no metric.*Did you mean 'perplexity'"):
        of.score(predictions, [{}, {}], ["perplexty"])


def test_neighbouring_rows_of_a_file_are_grouped(tmp_path):
    (tmp_path / "a.txt").write_text("one two\n\nthree\n" + "long " * 20 + "\nfour\n", encoding="utf-8")
    (tmp_path / "b.txt").write_text("five\n", encoding="utf-8")
    files = tuple(SourceFile(uri=str(tmp_path / name), name=name, format="text", size=1) for name in ("a.txt", "b.txt"))

    def read(of, name):
        spool = Folder(str(tmp_path / name)).make()
        [report] = [
            row
            for table in Reading(of, DataSection(train="x"), "train", files, {"text": "text"}, 0, 1, spool)()
            for row in table.to_pylist()
        ]
        with pa.OSFile(str(tmp_path / name / f"{report['name']}.arrow")) as source:
            rows = pa.ipc.open_file(source).read_all().to_pylist()
        return report["rows"], report["joined"], {row["row_id"]: row["text"].strip() for row in rows}

    apart = read(task(max_length=4), "apart")
    assert apart[:2] == (5, 0)
    count, joined, rows = read(task(max_length=4, group_texts=True), "grouped")
    assert (count, joined) == (4, 1)
    assert rows == {"a.txt:1": "one two\nthree", "a.txt:4": ("long " * 20).strip(), "a.txt:5": "four", "b.txt:1": "five"}


def test_no_rows_are_refused():
    with pytest.raises(InputError, match="no rows"):
        task().fit({"train": {"rows": 0}})


def test_an_unmodified_client_is_answered(base, tmp_path, monkeypatch):
    from huggingface_hub import InferenceClient
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.utils import _detect_agent

    monkeypatch.setattr(_detect_agent, "_registry", {})  # not looked up on the hub
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    engine = live.predictor(task(max_length=16), base, tmp_path / "bundle")
    text = "The goal of life is [MASK] ."
    with live.endpoint(engine) as url:
        client = InferenceClient(model=url)
        found = client.fill_mask(text)
        assert len(found) == 5
        assert found[0].sequence == f"The goal of life is {found[0].token_str} ."
        assert found[0].score == max(one.score for one in found)
        [direct] = engine([{"text": text}])
        assert [one.token for one in found] == [fill["token"] for fill in direct["masks"][0]["fills"]]
        targets = client.fill_mask(text, targets=["w3", "w1 w2", "w3"], top_k=9)
        assert {one.token_str for one in targets} == {"w3", "w1"}
        assert len(client.fill_mask(text, top_k=2)) == 2
        assert len(client.fill_mask(text, top_k=1000)) == len(engine.processor)
        assert len(client.fill_mask("w1 w2 w3 w4")) == 5  # without a mask: the first token that validation would hide
        late = client.fill_mask(f"{LONG} [MASK]")  # far behind the first part
        assert late[0].sequence == f"{LONG} {late[0].token_str}"
        for wrong in ({"top_k": 0}, {"targets": []}, {"targets": [""]}):
            with pytest.raises(HfHubHTTPError, match="parameters"):
                client.fill_mask(text, **wrong)
        with pytest.raises(HfHubHTTPError, match="not empty"):
            client.fill_mask(" ")


def test_predictions_of_a_long_text_are_small(base, tmp_path):
    engine = live.predictor(task(max_length=16), base, tmp_path / "bundle")
    [found] = engine([{"text": " ".join(random.Random(0).choices(WORDS, k=2000))}])
    assert found["hidden"] > 250
    assert len(found["masks"]) == 1
    assert len(json.dumps(found)) < 10_000
