"""Translation and summarization: languages, targets, searching for texts, and what clients get."""

from typing import Any

import pytest
import torch

from orchestrator import processors
from orchestrator.errors import InputError
from orchestrator.tasks import create, generation, text_scores
from orchestrator.tasks.base import RowError
from orchestrator.tasks.generation import BeamGeneration, Prompts
from tests.fixtures.tiny_generation import encoder_decoder
from tests.unit import live

TEXTS = ["Save the file", "Open a new document", "保存文件", "打开新文档", "summarize: a long text"]


def task(**fields) -> Any:
    return create({"name": "text2text", **fields})


@pytest.fixture(scope="module")
def t5(tmp_path_factory):
    return encoder_decoder(tmp_path_factory.mktemp("t5"), TEXTS)


@pytest.fixture(scope="module")
def bart(tmp_path_factory):
    return encoder_decoder(tmp_path_factory.mktemp("bart"), TEXTS, "bart")


# ---- rows ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("languages", "value"),
    [
        (("en", "zh"), {"en": "Save", "zh": "保存"}),
        (("en_XX", "zh_CN"), {"en": "Save", "zh": "保存", "de": "Sichern"}),
        (("en", "zh"), {"en-US": "Save", "zh-CN": "保存"}),
        (("eng_Latn", "zho_Hans"), '{"eng_Latn": "Save", "zho_Hans": "保存"}'),
    ],
)
def test_a_translation_column_has_a_text_for_each_language(languages, value):
    one = task(source_lang=languages[0], target_lang=languages[1])
    row = one.clean({"translation": value})
    assert row == {"source": "Save", "target": "保存"} == one.clean(row)
    one.check_target(row)


def test_rows_without_what_is_needed_are_bad():
    one = task(source_lang="en", target_lang="zh")
    with pytest.raises(RowError, match=r"a text for the language 'en', found \['de'\]"):
        one.clean({"translation": {"de": "Sichern"}})
    with pytest.raises(RowError, match=r"task\.source_lang to say which of its languages"):
        task().clean({"translation": {"en": "Save"}})
    with pytest.raises(RowError, match="'target': expected the text to write"):
        one.check_target(one.clean({"translation": {"en": "Save", "zh": None}}))
    with pytest.raises(InputError, match="no rows"):
        one.fit({})
    assert "translation" not in task(problem="summarization").columns()
    with pytest.raises(InputError, match="are for problem: translation"):
        task(problem="summarization", target_lang="zh")


# ---- tensors -------------------------------------------------------------------------------------------------
def test_prefix_limits_and_ends(t5):
    made = processors.of(task(), t5)
    one = task(prefix="summarize: ", max_source_length=12, max_target_length=5)
    row = {"source": "a long text " * 5, "target": "Open a new document " * 5}
    [[example]] = one.encode([row], made)
    assert example["truncated"] and len(example["input_ids"]) == 12 and example["input_ids"][-1] == made.eos_token_id
    assert made.decode(example["input_ids"]).startswith("summarize: a long")
    assert len(example["labels"]) == 5 and example["labels"][-1] == made.eos_token_id
    [[whole], [cut]] = one.encode([{"source": "Save", "target": "Save"}, {"source": "Save", "target": "Open a new document " * 5}], made)
    assert (whole["truncated"], cut["truncated"]) == (False, True)
    assert example["generate"]["max_new_tokens"] == 5
    made.backend_tokenizer.post_processor = None  # One that does not end its texts: they must end all the same.
    assert one._target("Save", made)[0][-1] == made.eos_token_id


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_the_loss_is_the_models_own_but_for_its_mean(kind, t5, bart):
    base = {"t5": t5, "bart": bart}[kind]
    one = task()
    made, model = processors.of(one, base), one.model(base, dtype=torch.float32).eval()
    rows = [{"source": "Save the file", "target": "保存文件"}, {"source": "Open", "target": "打开新文档"}]
    batch = one.collate([examples[0] for examples in one.encode(rows, made)], made)
    total, items = one.loss(model, batch)
    own = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=batch["labels"]).loss
    assert total.item() / items == pytest.approx(own.item(), rel=1e-5)
    smoothed, _ = one.loss(model, batch, label_smoothing=0.1)
    from transformers.trainer_pt_utils import LabelSmoother

    theirs = LabelSmoother(epsilon=0.1)(
        {"logits": model(**{key: batch[key] for key in ("input_ids", "attention_mask", "labels")}).logits}, batch["labels"]
    )
    assert smoothed.item() / items == pytest.approx(theirs.item(), rel=1e-5)


@pytest.mark.parametrize("kind", ["t5", "bart"])
@pytest.mark.parametrize(
    "settings", [{"num_beams": 1}, {"num_beams": 3, "length_penalty": 0.7}, {"num_beams": 1, "no_repeat_ngram_size": 2}]
)
def test_texts_are_what_the_library_finds_alone_and_in_a_batch(kind, settings, t5, bart):
    base = {"t5": t5, "bart": bart}[kind]
    one = task()
    made, model = processors.of(one, base), one.model(base, dtype=torch.float32).eval()
    texts = ["Save the file", "Open", "Open a new document and save it as a file"]
    asked = [made(text)["input_ids"] for text in texts]
    found = BeamGeneration(max_new_tokens=12, **settings)
    with torch.inference_mode():
        together = generation.generate(model, Prompts(asked, [found] * 3, made))
        for ids, output in zip(asked, together, strict=True):
            [alone] = generation.generate(model, Prompts([ids], [found], made))
            assert alone["ids"] == output["ids"] and generation.difference(alone, output, searched=settings["num_beams"] > 1) < 1e-5
            theirs = model.generate(input_ids=torch.tensor([ids]), max_new_tokens=12, do_sample=False, **settings)[0, 1:].tolist()
            assert output["ids"] == theirs[: len(output["ids"])]
            assert all(token == made.pad_token_id for token in theirs[len(output["ids"]) :])


def test_rows_of_a_batch_may_search_differently(t5):
    one = task()
    made, model = processors.of(one, t5), one.model(t5, dtype=torch.float32).eval()
    rows = [{"source": "Save"}, {"source": "Save", "generate": {"num_beams": 3}}, {"source": "Save", "generate": {"max_new_tokens": 2}}]
    batch = one.collate([examples[0] for examples in one.encode(rows, made)], made)
    with torch.inference_mode():
        outputs = one.infer(model, batch)
    assert len(outputs[2]["ids"]) <= 2 and outputs[2]["ids"] == outputs[0]["ids"][: len(outputs[2]["ids"])]
    with pytest.raises(InputError, match="use one of them"):
        task(generate={"do_sample": True, "num_beams": 2})


# ---- languages -----------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def multilingual(tmp_path_factory):
    """A tiny NLLB: its tokenizer knows languages by tokens of their codes."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import M2M100Config, M2M100ForConditionalGeneration, NllbTokenizerFast

    folder = tmp_path_factory.mktemp("nllb")
    specials = ["<s>", "<pad>", "</s>", "<unk>"]
    words = ["▁Save", "▁the", "▁file", "▁保存", "▁文件"]
    inner = Tokenizer(models.BPE({token: place for place, token in enumerate([*specials, *words])}, [], unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    made = NllbTokenizerFast(tokenizer_object=inner, src_lang="eng_Latn", model_max_length=64)
    made.save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {f"{side}_{what}": 1 for side in ("encoder", "decoder") for what in ("layers", "attention_heads")}
    sizes |= {"encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "d_model": 16, "max_position_embeddings": 64}
    M2M100ForConditionalGeneration(M2M100Config(vocab_size=len(made), decoder_start_token_id=2, **sizes)).save_pretrained(folder)
    return str(folder)


def test_a_multilingual_model_is_told_its_languages(multilingual, tmp_path):
    one = task(source_lang="eng_Latn", target_lang="zho_Hans", max_target_length=32, generate={"num_beams": 1, "max_new_tokens": 4})
    made = processors.of(one, multilingual)
    [[example]] = one.encode([{"source": "Save the file", "target": "保存"}], made)
    assert made.convert_ids_to_tokens(example["input_ids"])[0] == "eng_Latn"
    assert made.convert_ids_to_tokens(example["labels"])[0] == "zho_Hans"
    model = one.model(multilingual, dtype=torch.float32).eval()
    with torch.inference_mode():
        [output] = one.infer(model, one.collate([example], made))
    assert made.convert_ids_to_tokens(output["ids"])[0] == "zho_Hans"
    model.save_pretrained(tmp_path)
    assert one.model(str(tmp_path)).generation_config.forced_bos_token_id == made.convert_tokens_to_ids("zho_Hans")
    with pytest.raises(InputError, match=r"task\.target_lang: .* has no 'zho_Han'\. Did you mean 'zho_Hans'\?"):
        processors.of(task(source_lang="eng_Latn", target_lang="zho_Han"), multilingual)
    with pytest.raises(InputError, match=r"task\.source_lang: .* needs one\. There is"):
        processors.of(task(target_lang="zho_Hans"), multilingual)


def test_only_an_encoder_decoder_will_do(tmp_path):
    from transformers import BartConfig, LlamaConfig

    LlamaConfig().save_pretrained(tmp_path / "llama")
    with pytest.raises(InputError, match="which is no encoder-decoder"):
        task().check_base(str(tmp_path / "llama"))
    BartConfig(max_position_embeddings=64).save_pretrained(tmp_path / "bart")
    with pytest.raises(InputError, match=r"task\.max_target_length is 128, but .* has only 64 positions"):
        task().check_base(str(tmp_path / "bart"))


# ---- scores and answers --------------------------------------------------------------------------------------
def test_bleu_cuts_words_by_the_language():
    import sacrebleu

    said, right = ["保存这个文件到磁盘"], ["保存这个文件到硬盘"]
    rows = [{"source": "x", "target": right[0]}]
    found = task(source_lang="en", target_lang="zh_CN").score([{"text": said[0], "finish_reason": ""}], rows, ["bleu", "chrf"])
    assert found["bleu"] == pytest.approx(sacrebleu.corpus_bleu(said, [right], tokenize="zh").score / 100)
    assert found["chrf"] == pytest.approx(sacrebleu.corpus_chrf(said, [right]).score / 100)
    assert [text_scores.tokenization(code) for code in (None, "de", "zho_Hans", "ja", "jpn_Jpan", "th")] == [
        "13a",
        "13a",
        "zh",
        "char",
        "char",
        "char",
    ]
    assert task().objective == "chrf" and task(problem="summarization").objective == "rougeL"
    assert not task().higher_is_better("ter") and not task().higher_is_better("perplexity")


def test_parameters_of_a_request():
    one = task(source_lang="en_XX", target_lang="zh_CN")

    def asked(**given):
        return one.rows_from("Save", one.parameters.parse(given))

    assert asked(src_lang="en", tgt_lang="zh_CN", generate_parameters={"max_length": 9, "num_beams": 2}) == [
        {"source": "Save", "generate": {"max_new_tokens": 9, "num_beams": 2}}
    ]
    with pytest.raises(InputError, match=r"parameters\.tgt_lang is 'de', but the model was trained for 'zh_CN'"):
        asked(src_lang="en", tgt_lang="de")
    with pytest.raises(InputError, match=r"there is no 'beams'\. Did you mean 'num_beams'\?"):
        asked(generate_parameters={"beams": 2})
    with pytest.raises(InputError, match="`inputs`: expected num_beams"):
        asked(generate_parameters={"num_beams": 0})
    with pytest.raises(InputError, match="do_not_truncate is not there"):
        asked(truncation="do_not_truncate")
    entry = one.answer(
        [{"text": "Hello , it 's me .", "finish_reason": ""}], one.parameters.parse({"clean_up_tokenization_spaces": True}), single=True
    )
    assert entry == [{"translation_text": "Hello, it's me."}]


def test_the_hugging_face_client_translates_and_summarizes(t5, bart, tmp_path, monkeypatch):
    engine = live.predictor(task(source_lang="en", target_lang="zh", max_target_length=6), t5, tmp_path / "translator")
    with live.endpoint(engine) as url:
        ask = live.client(url, monkeypatch)
        assert isinstance(ask.translation("Save").translation_text, str)
        assert isinstance(ask.translation("Save", src_lang="en", tgt_lang="zh", generate_parameters={"num_beams": 2}).translation_text, str)
        with pytest.raises(Exception, match="was trained for 'zh'"):
            ask.translation("Save", src_lang="en", tgt_lang="de")
    engine = live.predictor(task(problem="summarization", max_target_length=6), bart, tmp_path / "summarizer")
    with live.endpoint(engine) as url:
        ask = live.client(url, monkeypatch)
        assert isinstance(ask.summarization("A long text.").summary_text, str)
