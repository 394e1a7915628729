"""Row-keyed dropout: what is dropped from a row is a function of (seed, step, row, layer), not of the process.

So neither padding, the cut into micro-batches, the number of workers nor a restart changes a training run
(docs/decisions/0002-row-keyed-dropout.md). The random bits are a counter-based hash, as in Salmon et al. 2011
("Parallel random numbers: as easy as 1, 2, 3"), with the mixer `lowbias32` of C. Wellons (hash-prospector): element i of
a row gets hash(key of the row, i), the same on every device, and cheaper on a CPU than torch's own generator.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn import functional

_ATTENTION_RATES = ("attention_dropout", "attn_dropout", "attn_drop", "dropout", "dropout_p", "dropout_prob")
"""Attributes in which attention modules of transformers keep, as a float, the rate that they hand to the attention kernel."""


class Keys:
    """Which rows are in the model now; shared by all dropout layers of a model."""

    def __init__(self, seed: int):
        self.seed = seed
        self.layers = 0
        self.table: torch.Tensor | None = None
        """int32, (layers, rows, 1)."""

    def set(self, rows: Sequence[int], device: torch.device) -> None:
        """The next forward pass, and the backward pass that belongs to it, are for the rows with these keys (see `row_keys`)."""
        base = torch.tensor(rows, dtype=torch.int64).to(torch.int32)
        layer = _mix(torch.arange(1, self.layers + 1, dtype=torch.int32))
        self.table = _mix(base[None, :] ^ layer[:, None]).unsqueeze(-1).to(device)


def row_keys(seed: int, step: int, row_ids: Sequence[str]) -> list[int]:
    """A 32-bit key for each example of a step; the examples that one row became get different ones."""
    seen: Counter[str] = Counter()
    keys = []
    for row_id in row_ids:
        text = f"{seed}/{step}/{seen[row_id]}/{row_id}"
        keys.append(int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "little", signed=True))
        seen[row_id] += 1
    return keys


class RowDropout(torch.nn.Module):
    """Takes the place of `torch.nn.Dropout`. Where dimension 0 of the input is not the rows it drops by torch's generator.

    `p` is 0: attention modules read it to hand it to a fused kernel, whose dropout can't be keyed by row.
    """

    p = 0.0

    def __init__(self, rate: float, layer: int, keys: Keys):
        super().__init__()
        self.rate, self.layer, self.keys = rate, layer, keys

    def extra_repr(self) -> str:
        return f"rate={self.rate}"

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return input
        table = self.keys.table
        if table is None or input.dim() < 2 or input.shape[0] != table.shape[1]:
            return functional.dropout(input, self.rate)
        quantum = round(self.rate * 65536)  # The rate in steps of 2^-16: two elements share one 32-bit hash.
        elements = input[0].numel()
        counter = torch.arange((elements + 1) // 2, dtype=torch.int32, device=input.device)
        bits = _mix(counter ^ table[self.layer]).view(torch.int16)[:, :elements]
        kept = (bits >= quantum - 32768).view(input.shape)
        return input * kept * (65536 / (65536 - quantum))


class RowDropPath(RowDropout):
    """Takes the place of a model's stochastic depth (Huang et al. 2016, arXiv 1603.09382), which drops a layer's whole output of a row."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return input
        rows = input.new_ones(len(input), 1, dtype=torch.float32)
        return input * super().forward(rows).to(input.dtype).view(-1, *[1] * (input.dim() - 1))


@contextmanager
def row_keyed(model: torch.nn.Module, seed: int) -> Iterator[Keys]:
    """Inside, the dropout of `model` is keyed by row and attention dropout is off; after, the model is as it was."""
    keys = Keys(seed)
    modules = list(model.named_modules())
    replaced: list[tuple[torch.nn.Module, str, torch.nn.Module]] = []
    silenced: list[tuple[Any, str, float]] = []
    try:
        for _, parent in modules:
            for name, child in list(parent.named_children()):
                if type(child) is torch.nn.Dropout and child.p > 0:
                    replaced.append((parent, name, child))
                    setattr(parent, name, RowDropout(child.p, keys.layers, keys).train(child.training))
                    keys.layers += 1
                elif type(child).__name__.endswith("DropPath") and (getattr(child, "drop_prob", None) or 0.0) > 0:
                    replaced.append((parent, name, child))
                    setattr(parent, name, RowDropPath(child.drop_prob, keys.layers, keys).train(child.training))  # pyright: ignore[reportArgumentType]
                    keys.layers += 1
            if "attention" in type(parent).__name__.lower():
                for name in _ATTENTION_RATES:
                    rate = parent.__dict__.get(name)
                    if isinstance(rate, float) and rate > 0:
                        silenced.append((parent, name, rate))
                        setattr(parent, name, 0.0)
        yield keys
    finally:
        for parent, name, child in replaced:
            setattr(parent, name, child.train(parent.training))
        for parent, name, rate in silenced:
            setattr(parent, name, rate)


def _mix(x: torch.Tensor) -> torch.Tensor:
    """`lowbias32` on int32, which wraps around; a shift of a signed number needs its sign bits masked off."""
    x = x ^ ((x >> 16) & 0xFFFF)
    x = x * 0x7FEB352D
    x ^= (x >> 15) & 0x1FFFF
    x *= 0x846CA68B - (1 << 32)
    x ^= (x >> 16) & 0xFFFF
    return x
