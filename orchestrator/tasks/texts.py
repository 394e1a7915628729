"""Texts: what a text in a cell is, and texts as tokens, for every task that reads them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from orchestrator.errors import InputError
from orchestrator.tasks.base import Example, RowError
from orchestrator.tasks.labels import label_name

if TYPE_CHECKING:
    import torch

DEFAULT_MAX_LENGTH = 512
"""Tokens kept of a text where neither the task nor the tokenizer names a limit."""


def clean_text(column: str, value: Any) -> str:
    """The text in a cell with all its characters, or `RowError`; a number is its digits, as where a reader guessed the column's type."""
    if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
        return label_name(value)
    if not isinstance(value, str):
        raise RowError(column, "a text", value)
    if not value.strip():
        raise RowError(column, "a text that is not empty", value)
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise RowError(column, f"Unicode text (character {error.start} is half of a surrogate pair)", ascii(value[:80])) from None
    return value


def short(value: Any) -> str:
    """A value that a client sent, for a sentence about it."""
    text = ascii(value) if isinstance(value, str) else repr(value)
    return text if len(text) <= 80 else f"{text[:80]}…"


def limit(processor: Any, max_length: int | None) -> int:
    """Most tokens of an example, special tokens included."""
    known = int(processor.model_max_length) if processor.model_max_length < 1_000_000 else DEFAULT_MAX_LENGTH
    return max_length or known


def encode(texts: Sequence[str], pairs: Sequence[str | None], processor: Any, most: int) -> list[Example]:
    """The tokens of each text (or text and pair), at most `most`; `truncated` says whether it was cut.

    The tokenizer is called without truncation and padding, always: a fast tokenizer keeps these settings inside and
    can't change them while another thread encodes ("Already borrowed"). So cutting is done here, by the rules
    of `truncation=True` (the longer of two texts first, from the tokenizer's truncation side).
    """
    examples: list[Example] = [{} for _ in texts]
    for paired in (False, True):
        chosen = [index for index, pair in enumerate(pairs) if (pair is not None) == paired]
        if not chosen:
            continue
        encoded = processor(
            [texts[index] for index in chosen],
            [pairs[index] for index in chosen] if paired else None,
            padding=False,
            truncation=False,
            verbose=False,
        )
        for place, index in enumerate(chosen):
            example: Example = {key: values[place] for key, values in encoded.items()}
            length = len(example["input_ids"])
            if length > most:
                example = _cut(encoded, place, processor, texts[index], pairs[index], most)
            elif length == 0:
                filler = processor.eos_token_id if processor.eos_token_id is not None else processor.pad_token_id
                example = {key: [{"input_ids": filler, "attention_mask": 1}.get(key, 0)] for key in example}
            examples[index] = {**example, "truncated": length > most}
    return examples


def pad(examples: Sequence[Example], processor: Any) -> dict[str, torch.Tensor]:
    """Token ids and what goes with them as tensors of the longest example's length, padded on the tokenizer's side."""
    import torch

    longest = max(len(example["input_ids"]) for example in examples)
    fillers = {"input_ids": processor.pad_token_id, "token_type_ids": processor.pad_token_type_id, "attention_mask": 0}
    left = processor.padding_side == "left"
    batch: dict[str, torch.Tensor] = {}
    for key in (name for name in processor.model_input_names if name in examples[0]):
        rows = []
        for example in examples:
            values = list(example[key])
            padding = [fillers.get(key, 0)] * (longest - len(values))
            rows.append(padding + values if left else values + padding)
        batch[key] = torch.tensor(rows, dtype=torch.long)
    return batch


def _cut(encoded: Any, place: int, processor: Any, text: str, pair: str | None, limit: int) -> Example:
    """The example at `place` with tokens of its texts left out until `limit` is met; special tokens stay."""
    if not encoded.is_fast:
        return dict(processor(text, pair, padding=False, truncation=True, max_length=limit))
    sources = encoded.sequence_ids(place)
    tokens = [[position for position, source in enumerate(sources) if source == which] for which in (0, 1)]
    counts = [len(positions) for positions in tokens]
    room = limit - (len(sources) - sum(counts))
    if room < (2 if counts[1] else 1):
        raise InputError(f"task.max_length is {limit}, which leaves no room for text beside {len(sources) - sum(counts)} special tokens.")
    shorter, longer = sorted((0, 1), key=lambda which: counts[which])
    keep = {shorter: min(counts[shorter], room // 2)}
    keep[longer] = room - keep[shorter]
    drops = [count - keep[which] for which, count in enumerate(counts)]
    left = processor.truncation_side == "left"
    dropped = {
        position
        for positions, count in zip(tokens, drops, strict=True)
        if count
        for position in (positions[:count] if left else positions[-count:])
    }
    return {key: [value for position, value in enumerate(values[place]) if position not in dropped] for key, values in encoded.items()}
