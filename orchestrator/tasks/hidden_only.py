"""A language model whose output layer computes for the hidden tokens only.

They are one token in seven, and in a small model the layer that scores a vocabulary of 30,000 costs as much as all others
together. Heads of masked language models look at one token at a time, so it is enough to hand them fewer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


class _Gate:
    """Between encoder and head: lets the wanted positions through while some are named."""

    positions: torch.Tensor | None = None

    def __call__(self, module: Any, inputs: Any, output: Any) -> Any:
        if self.positions is not None and "last_hidden_state" in output:
            hidden = output.last_hidden_state
            output.last_hidden_state = hidden.reshape(-1, hidden.shape[-1])[self.positions][None]
        return output


def install(model: Any) -> None:
    """Prepares a model of transformers for `logits`; it stays what it is for everyone else."""
    model.hidden_only = gate = _Gate()
    model.base_model.register_forward_hook(gate)


def logits(model: Any, inputs: Mapping[str, torch.Tensor], positions: torch.Tensor) -> torch.Tensor:
    """Logits of shape (positions, vocabulary), in fp32; `positions` count through the padded batch, row after row."""
    inner = model
    while not hasattr(inner, "hidden_only"):  # inside of DistributedDataParallel
        inner = inner.module
    inner.hidden_only.positions = positions
    try:
        found = model(**inputs).logits
    finally:
        inner.hidden_only.positions = None
    flat = found.reshape(-1, found.shape[-1])
    return (flat if len(flat) == len(positions) else flat[positions]).float()
