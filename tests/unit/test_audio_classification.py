"""Audio classification: labels, what is heard of a sound, bases and answers."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from orchestrator import processors
from orchestrator.errors import InputError
from orchestrator.tasks import create
from tests.fixtures import tiny_sounds
from tests.fixtures.tones import data_uri, wav, whistle
from tests.unit import live

ROWS = [{"audio": data_uri(text), "label": label} for text, label in (("aaa", "low"), ("zzz", "high"), ("zyz", "high"), ("aba", "low"))]


def fitted(rows: list[dict[str, Any]] = ROWS, **given: Any) -> Any:
    made = create({"name": "audio-classification", **given})
    return made.fit({"train": made.observe([made.clean(row) for row in rows])})


def test_labels_are_those_of_the_training_rows_and_wrong_ones_are_said() -> None:
    assert fitted().labels == ("high", "low")
    with pytest.raises(InputError, match="two labels"):
        fitted(ROWS[:1])
    with pytest.raises(InputError, match="differ only by case"):
        fitted([*ROWS, {**ROWS[0], "label": "Low"}])
    made = create("audio-classification")
    with pytest.raises(InputError, match=r"The test split has labels that no training row has: 'hgh'.*'high'"):
        made.fit({"train": made.observe(ROWS), "test": made.observe([{**ROWS[0], "label": "hgh"}])})
    with pytest.raises(InputError, match="twice"):
        create({"name": "audio-classification", "labels": [1, 1.0]})


def test_what_is_beyond_the_limit_is_not_heard(tmp_path: Path) -> None:
    made = fitted(max_length_s=0.2)
    processor = made.processor(tiny_sounds.wave_base(tmp_path))
    short, long, same = ({"audio": data_uri(text), "label": "low"} for text in ("abc", "abcabc", "abcaaaaaaaa"))
    examples = [its[0] for its in made.encode([short, long, same], processor)]
    assert [example["truncated"] for example in examples] == [False, True, True]
    assert len(examples[1]["input_values"]) == 1600
    assert np.array_equal(examples[1]["input_values"], made.encode([long], processor)[0][0]["input_values"])
    changed = fitted(max_length_s=0.2, augment={"gain_db": 1})
    heard = [its[0]["input_values"] for its in changed.encode_to_train([long] * 4, processor, [1, 1, 2, 3])]
    assert np.array_equal(heard[0], heard[1]) and not np.array_equal(heard[0], heard[2])
    assert all(len(one) == 1600 for one in heard)


def test_the_encoder_of_a_recogniser_becomes_a_classifier(tmp_path: Path) -> None:
    from transformers import WhisperForConditionalGeneration

    base = tiny_sounds.whisper_base(tmp_path)
    made = fitted(max_length_s=0.5)
    model = made.model(base, dtype=torch.float32)
    theirs = WhisperForConditionalGeneration.from_pretrained(base).state_dict()
    assert type(model).__name__ == "WhisperForAudioClassification" and model.config.id2label == {0: "high", 1: "low"}
    name = "encoder.layers.0.fc1.weight"
    assert torch.equal(model.state_dict()[name], theirs[f"model.{name}"])
    assert made.processor(base).window_s == 0.5 and model.config.max_source_positions == 25


def test_a_spectrogram_transformer_learns(tmp_path: Path) -> None:
    from transformers import ASTConfig, ASTFeatureExtractor, ASTModel

    sizes = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "max_length": 64,
        "num_mel_bins": 32,
    }
    ASTModel(ASTConfig(**sizes)).save_pretrained(tmp_path)
    ASTFeatureExtractor(max_length=64, num_mel_bins=32).save_pretrained(tmp_path)
    made = fitted()
    processor, model = processors.of(made, str(tmp_path)), made.model(str(tmp_path), dtype=torch.float32)
    batch = made.collate([its[0] for its in made.encode(ROWS, processor)], processor)
    assert batch.keys() == {"input_values", "labels"} and batch["input_values"].shape == (4, 64, 32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(30):
        loss, items = made.loss(model, batch)
        optimizer.zero_grad()
        (loss / items).backward()
        optimizer.step()
    assert loss.item() / items < 0.1


def test_bases_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    from transformers import BertConfig

    BertConfig().save_pretrained(tmp_path)
    with pytest.raises(InputError, match="'bert' model, for which transformers has no audio-classification head"):
        fitted().check_base(str(tmp_path))


def test_the_clients_of_hugging_face_are_answered(tmp_path: Path) -> None:
    from huggingface_hub import InferenceClient

    made = fitted()

    class Engine:
        task = made

        def encode(self, rows: Any) -> list[list[dict[str, Any]]]:
            return [[{"length": 10, "row": row}] for row in rows]

        def infer(self, examples: Any) -> list[np.ndarray]:
            return [np.array([2.0, 1.0], dtype=np.float32) for _ in examples]

        def decode(self, row: Any, outputs: Any) -> dict[str, Any]:
            return made.decode(row, outputs)

    with live.endpoint(Engine()) as url:
        client = InferenceClient(model=url, token="none")
        every = client.audio_classification(wav(whistle("zz")))
        assert [one.label for one in every] == ["high", "low"] and sum(one.score for one in every) == pytest.approx(1)
        [best] = client.audio_classification(wav(whistle("zz")), top_k=1, function_to_apply="none")
        assert (best.label, best.score) == ("high", 2.0)
