"""What a model loses on transcripts, and what it writes, for the two families of speech recognisers. Imported where torch is there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.nn import functional
from transformers.models.whisper.tokenization_whisper import LANGUAGES

from orchestrator.errors import InputError
from orchestrator.tasks import sound_models, transcripts
from orchestrator.tasks.sound_processor import SoundProcessor

IGNORED = -100


# ---- CTC -----------------------------------------------------------------------------------------------------
def ctc(model: Any, batch: Mapping[str, torch.Tensor], label_smoothing: float) -> tuple[torch.Tensor, float]:
    """Summed over the sounds that have labels and frames enough to write them, and the number of these labels."""
    if label_smoothing:
        raise InputError("training.label_smoothing_factor: the loss of a CTC model has none; leave it at 0.")
    logits, frames = sound_models.logits(model, batch)
    labels = batch["labels"]
    counts = (labels != IGNORED).sum(dim=-1)
    log_probabilities = functional.log_softmax(logits, dim=-1).transpose(0, 1)
    with torch.backends.cudnn.flags(enabled=False):
        losses = functional.ctc_loss(
            log_probabilities,
            labels.clamp(min=0),
            frames.to(labels.device),
            counts,
            blank=model.config.pad_token_id,
            reduction="none",
            zero_infinity=True,
        )
    repeats = ((labels[:, 1:] == labels[:, :-1]) & (labels[:, 1:] != IGNORED)).sum(dim=-1)  # Between equal ones a blank must stand.
    counted = (counts > 0) & (counts + repeats <= frames.to(labels.device))
    return (losses * counted).sum(), float((counts * counted).sum())


def read_frames(model: Any, batch: Mapping[str, Any], processor: SoundProcessor) -> list[Any]:
    """The likeliest output of each frame, read by the rules of CTC."""
    logits, frames = sound_models.logits(model, batch)
    pieces, blank = processor.pieces(), model.config.pad_token_id
    best = logits.argmax(dim=-1).cpu().tolist()
    return [
        transcripts.of_frames(ids[:count], blank, pieces, start, end)
        for ids, count, (start, end) in zip(best, frames.tolist(), batch["spans"].tolist(), strict=True)
    ]


# ---- Whisper -------------------------------------------------------------------------------------------------
def seq2seq(model: Any, batch: Mapping[str, torch.Tensor], label_smoothing: float) -> tuple[torch.Tensor, float]:
    """Cross-entropy of what follows the prompt, summed over tokens. `labels` are the prompt, -1, and what is to be written."""
    end, start = model.config.eos_token_id, model.config.decoder_start_token_id
    rows = []
    for labels in batch["labels"].tolist():
        place = labels.index(-1) if -1 in labels else 0
        prompt, written = (labels[:place], [token for token in labels[place + 1 :] if token != IGNORED]) if place else ([start], [])
        rows.append(([*prompt, *written[:-1]], [*[IGNORED] * (len(prompt) - 1), *(written or [IGNORED])]))
    longest = max(len(inputs) for inputs, _ in rows)
    device = batch["labels"].device
    inputs = torch.tensor([[*ids, *[end] * (longest - len(ids))] for ids, _ in rows], device=device)
    targets = torch.tensor([[*ids, *[IGNORED] * (longest - len(ids))] for _, ids in rows], device=device)
    logits = model(input_features=batch["input_features"], decoder_input_ids=inputs, use_cache=False).logits.float()
    total = functional.cross_entropy(
        logits.flatten(0, 1), targets.flatten(), reduction="sum", ignore_index=IGNORED, label_smoothing=label_smoothing
    )
    return total, float((targets != IGNORED).sum())


def generate(model: Any, batch: Mapping[str, Any], processor: SoundProcessor) -> list[Any]:
    """What the decoder writes after its prompt; with Whisper's own timestamps for the sounds that ask for them."""
    outputs: list[Any] = [None] * len(batch["spans"])
    wants, spans = batch["timestamps"], batch["spans"].tolist()
    for timestamps in (False, True):
        places = (wants == timestamps).nonzero().flatten().tolist()
        if not places:
            continue
        features = batch["input_features"][places]
        written = model.generate(input_features=features, return_timestamps=timestamps, do_sample=False).cpu()
        for place, tokens in zip(places, written.tolist(), strict=True):
            start, end = spans[place]
            segments = _segments(tokens, processor, end - start)
            outputs[place] = transcripts.of_segments([(text, start + since, start + until) for text, since, until in segments], start, end)
    return outputs


def _segments(tokens: list[int], processor: SoundProcessor, seconds: float) -> list[tuple[str, float, float]]:
    """Texts between timestamp tokens, which count from 0 in steps of 20 ms; one text of the whole length where there are none."""
    tokenizer = processor.tokenizer
    first = tokenizer.convert_tokens_to_ids("<|notimestamps|>") + 1
    segments: list[tuple[str, float, float]] = []
    since, until, held = 0.0, seconds, []

    def close(until: float) -> None:
        text = tokenizer.decode(held, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        segments.append((text, since, max(since, min(until, seconds))))

    for token in tokens:
        if token < first:
            held.append(token)
            continue
        until = (token - first) * 0.02
        if held:
            close(until)
            held = []
        since = min(until, seconds)
    if held:
        close(seconds)
    return segments


def complete_generation(model: Any, processor: SoundProcessor, **settings: Any) -> None:
    """Writes into the model's generation config what `generate` must know, also elsewhere: a bare checkpoint may lack it."""
    config, known = model.generation_config, processor.tokenizer.get_vocab()
    if getattr(config, "no_timestamps_token_id", None) is None:
        config.no_timestamps_token_id = known["<|notimestamps|>"]
    config.is_multilingual = processor.multilingual
    if processor.multilingual and not getattr(config, "lang_to_id", None):
        config.lang_to_id = {token: place for token, place in known.items() if token.strip("<|>") in LANGUAGES}
        config.task_to_id = {name: known[f"<|{name}|>"] for name in ("transcribe", "translate")}
    config.forced_decoder_ids = config.max_length = None
    for name, value in settings.items():
        setattr(config, name, value)
