"""Models from scratch: what is made is an ordinary base, the same for everyone, and wrong sizes are sentences."""

from pathlib import Path
from typing import Any

import pytest
import torch

from orchestrator import models, processors, scratch
from orchestrator.config import ModelSection
from orchestrator.errors import InputError
from orchestrator.tasks import create
from tests.ray.conftest import write_reviews

BERT = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "max_position_embeddings": 48}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return write_reviews(tmp_path_factory.mktemp("reviews"), [40, 20], 10)


def section(base: str = "config://bert", **given: Any) -> ModelSection:
    return ModelSection.parse({"base": base, **given}, "model")


@pytest.mark.parametrize("kind", ["unigram", "bpe", "wordpiece", "words", "characters"])
def test_a_text_model_has_a_tokenizer_of_the_training_rows_and_weights_of_the_seed(prepared: Any, kind: str) -> None:
    asked = section(config=BERT, processor={"kind": kind, "vocab_size": 400, "lowercase": True})
    made = scratch.based(asked, prepared, seed=3)
    assert scratch.based(asked, prepared, seed=3) == made and scratch.based(asked, prepared, seed=4).base != made.base
    tokenizer = processors.of(prepared.task, made.base)
    text = next(iter(scratch._texts(prepared)))
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == tokenizer.cls_token_id and ids[-1] == tokenizer.sep_token_id and tokenizer.unk_token_id not in ids
    assert "".join(tokenizer.decode(ids, skip_special_tokens=True).split()) == "".join(text.lower().split())
    assert tokenizer.model_max_length == 48
    model = models.load(prepared.task, made, precision="fp32", seed=3)
    assert model.config.vocab_size == len(tokenizer) and model.config.pad_token_id == tokenizer.pad_token_id
    again = models.load(prepared.task, scratch.based(asked, prepared, seed=3), precision="fp32", seed=3)
    assert all(torch.equal(one, other) for one, other in zip(model.parameters(), again.parameters(), strict=True))


def test_an_encoder_decoder_and_a_decoder_end_their_texts(prepared: Any) -> None:
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    sizes |= {"encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    made = scratch.based(section("config://marian", config=sizes, processor={"vocab_size": 200}), prepared, seed=1)
    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(made.base), AutoModelForSeq2SeqLM.from_pretrained(made.base)
    assert tokenizer("good")["input_ids"][-1] == tokenizer.eos_token_id == model.config.eos_token_id
    assert model.config.decoder_start_token_id == tokenizer.pad_token_id
    assert model.get_input_embeddings().weight.shape[0] == len(tokenizer)
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2}
    made = scratch.based(section("config://gpt2", config=sizes, processor={"kind": "bpe", "vocab_size": 400}), prepared, seed=1)
    tokenizer = AutoTokenizer.from_pretrained(made.base)
    assert tokenizer.eos_token == "[SEP]" and tokenizer.decode(tokenizer("Très bon 🙂")["input_ids"]) == "Très bon 🙂"


@pytest.mark.parametrize(
    ("base", "given", "says"),
    [
        ("config://bertt", {}, r"transformers has no model type 'bertt'\. Did you mean 'bert'\?"),
        (
            "config://bert",
            {"config": {"hiden_size": 3}},
            r"model\.config: a 'bert' model has no 'hiden_size'\. Did you mean 'hidden_size'\?",
        ),
        ("config://bert", {"processor": {"kind": "bytes"}}, r"model\.processor: kind"),
        ("config://bert", {"processor": {"vocabsize": 3}}, r"vocab_size"),
        ("example://minilm", {"config": {"hidden_size": 3}}, r"config is for models from scratch"),
    ],
)
def test_what_a_model_type_does_not_have_is_said_before_anything_starts(base: str, given: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        scratch.local(section(base, **given), create("text-classification"))


def test_an_image_and_a_sound_model_have_the_processor_of_their_type(tmp_path: Path) -> None:
    from transformers import AutoFeatureExtractor, AutoImageProcessor

    task = create("text-classification")
    for modality, base, given in (
        ("image", "config://vit", {"size": {"height": 16, "width": 16}}),
        ("audio", "config://wav2vec2", {"sampling_rate": 8000}),
    ):
        kind = type("Other", (type(task),), {"modality": modality})
        asked = section(base, processor=given)
        scratch._save_processor(asked, kind(), scratch._config(asked, kind()), tmp_path / modality) if (
            tmp_path / modality
        ).mkdir() is None else None
        auto = AutoImageProcessor if modality == "image" else AutoFeatureExtractor
        found = auto.from_pretrained(tmp_path / modality).to_dict()
        assert {name: found[name] for name in given} == given
        with pytest.raises(InputError, match=r"has a processor|processor that has no 'sise'"):
            scratch._save_processor(section(base, processor={"sise": 3}), kind(), scratch._config(asked, kind()), tmp_path / modality)
