"""A sound's output depends on nothing but the sound, for every family of models that `sound_models` says so of."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from orchestrator.dropout import row_keyed
from orchestrator.tasks import create, sound_models
from orchestrator.tasks.sound_models import MASKED
from tests.fixtures import tiny_sounds
from tests.fixtures.tones import data_uri

ROWS = [{"audio": data_uri(text), "text": text} for text in ("ab", "cab bad", "bad a dab")]


def logits(task: Any, model: Any, processor: Any, rows: list[dict[str, Any]]) -> list[np.ndarray]:
    examples = [example for its in task.encode(rows, processor) for example in its]
    with torch.inference_mode():
        found, frames = sound_models.logits(model, task.collate(examples, processor))
    return [one[:count].numpy() for one, count in zip(found, frames.tolist(), strict=True)]


FAMILIES = [(kind, norm) for kind in sorted(MASKED) for norm in ("group", "layer")]
WAVLM = "ignore:Support for mismatched key_padding_mask and attn_mask is deprecated:UserWarning"  # transformers 5.23's WavLM on torch 2.13


@pytest.mark.filterwarnings(WAVLM)
@pytest.mark.parametrize(("kind", "norm"), [*FAMILIES, ("sew", "group"), ("data2vec-audio", "layer")])
def test_padding_changes_no_frame(kind: str, norm: str, tmp_path: Path) -> None:
    """Among them wav2vec2-base and hubert-base, whose group norm takes padding in as published; sew and data2vec can't mask it, so they go alone."""
    task = create({"name": "speech-recognition", "characters": ["a", "b", "c", "d"]})
    more = {"squeeze_factor": 2} if kind == "sew" else {}
    base = tiny_sounds.wave_base(tmp_path, norm, kind, **more)
    processor, model = task.processor(base), task.model(base, dtype=torch.float32).eval()
    assert processor.alone == (kind not in MASKED)
    for one, row in zip(logits(task, model, processor, ROWS), ROWS, strict=True):
        [alone] = logits(task, model, processor, [row])
        assert one.shape == alone.shape
        assert abs(one - alone).max() < 1e-4
    assert [task.length(example) for its in task.encode(ROWS, processor) for example in its] != [] and (
        min(task.length(its[0]) for its in task.encode(ROWS, processor)) > 100_000
    ) == processor.alone


def test_as_published_group_norm_takes_padding_in(tmp_path: Path) -> None:
    from transformers import AutoModel

    model = AutoModel.from_pretrained(tiny_sounds.wave_base(tmp_path)).eval()
    sound, padded = torch.randn(1, 2000), torch.zeros(1, 4000)
    padded[:, :2000] = sound
    mask = (torch.arange(4000) < 2000).long()[None]
    with torch.inference_mode():
        one, other = (model(values, attention_mask=its).last_hidden_state for values, its in ((sound, mask[:, :2000]), (padded, mask)))
        assert abs(one - other[:, : one.shape[1]]).max() > 1e-2
        sound_models.steady(model)
        one, other = (model(values, attention_mask=its).last_hidden_state for values, its in ((sound, mask[:, :2000]), (padded, mask)))
    assert abs(one - other[:, : one.shape[1]]).max() < 1e-5


@pytest.mark.filterwarnings(WAVLM)
@pytest.mark.parametrize("kind", ["wav2vec2", "hubert", "wavlm"])
def test_training_draws_nothing_but_the_rows_dropout(kind: str, tmp_path: Path) -> None:
    """LayerDrop and SpecAugment, on in every published config, are off; so a step is the same whatever the process drew before."""
    task = create({"name": "speech-recognition", "characters": ["a", "b", "c", "d"]})
    base = tiny_sounds.wave_base(tmp_path, "layer", kind, layerdrop=0.5, mask_time_prob=0.5, mask_time_length=2, hidden_dropout=0.3)
    processor, model = task.processor(base), task.model(base, dtype=torch.float32).train()
    batch = task.collate([its[0] for its in task.encode(ROWS, processor)], processor)
    losses = []
    with row_keyed(model, 1) as keys:
        for seed in (1, 2):
            torch.manual_seed(seed)
            np.random.seed(seed)
            keys.set([1, 2, 3], torch.device("cpu"))
            losses.append(float(task.loss(model, batch)[0].detach()))
    assert losses[0] == losses[1]
    assert not any(weight.requires_grad for name, weight in model.named_parameters() if "masked_spec_embed" in name)


def test_a_whisper_that_hears_less_keeps_its_weights_and_is_saved_as_it_is(tmp_path: Path) -> None:
    from transformers import WhisperForConditionalGeneration

    base = tiny_sounds.whisper_base(tmp_path / "base")
    whole = WhisperForConditionalGeneration.from_pretrained(base)
    task = create({"name": "speech-recognition", "chunk_length_s": 0.5, "max_new_tokens": 8})
    model: Any = task.model(base, dtype=torch.float32)
    assert model.config.max_source_positions == 25
    assert torch.equal(model.model.encoder.embed_positions.weight, whole.model.encoder.embed_positions.weight[:25])
    assert not any("encoder.embed_positions" in name for name, _ in model.named_parameters())
    model.save_pretrained(tmp_path / "saved")
    again: Any = task.model(str(tmp_path / "saved"), dtype=torch.float32)
    processor = task.processor(base)
    batch = task.collate([its[0] for its in task.encode(ROWS, processor)], processor)
    with torch.no_grad():
        assert float(task.loss(again, batch)[0]) == pytest.approx(float(task.loss(model, batch)[0]))
