"""Vectors of texts after the model: pooled out of hidden states, normalised, made smaller."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import numpy as np
    import torch

Pooling = Literal["mean", "cls", "last"]
Precision = Literal["float32", "int8", "ubinary"]
PRECISIONS: tuple[Precision, ...] = ("float32", "int8", "ubinary")
DECIMALS = 7
"""Of a number in an answer: as many as float32 has in a vector of length 1."""


def pool(hidden: torch.Tensor, mask: torch.Tensor, pooling: Pooling) -> torch.Tensor:
    """One float32 vector a text from hidden states (texts, tokens, size) and the mask of tokens that are no padding (texts, tokens)."""
    import torch

    hidden = hidden.float()
    if pooling == "mean":
        weight = mask.unsqueeze(-1).to(hidden.dtype)
        return (hidden * weight).sum(dim=1) / weight.sum(dim=1).clamp(min=1.0)
    place = mask.argmax(dim=1) if pooling == "cls" else mask.size(1) - 1 - mask.flip(1).argmax(dim=1)
    return hidden[torch.arange(len(hidden), device=hidden.device), place]


def normalised(vectors: np.ndarray) -> np.ndarray:
    """Each vector (the last dimension) at length 1; one of zeros stays as it is."""
    import numpy as np

    lengths = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return vectors / np.where(lengths > 0, lengths, 1.0)


def as_list(vector: np.ndarray) -> list[float]:
    """The numbers of a vector for JSON, without digits that mean nothing."""
    import numpy as np

    return np.round(vector.astype(np.float64), DECIMALS).tolist()


def quantised(vectors: np.ndarray, precision: Precision) -> np.ndarray:
    """Vectors (…, size) as they are stored at a precision.

    int8: each vector scaled such that its largest number is 127, which keeps its direction and needs no calibration. ubinary: the
    signs as bits, eight in a byte (as sentence-transformers' `quantize_embeddings`).
    """
    import numpy as np

    if precision == "float32":
        return vectors.astype(np.float32)
    if precision == "ubinary":
        return np.packbits(vectors > 0, axis=-1)
    largest = np.abs(vectors).max(axis=-1, keepdims=True)
    return np.rint(vectors * (127.0 / np.where(largest > 0, largest, 1.0))).astype(np.int8)


def comparable(vectors: np.ndarray, dimensions: int | None = None, precision: Precision = "float32") -> np.ndarray:
    """What the first `dimensions` numbers of vectors are worth at a precision: float32 at length 1, whose dot product is their similarity.

    Of signs that is one minus twice the share of bits that differ.
    """
    import numpy as np

    some = vectors[..., :dimensions]
    if precision == "ubinary":
        return np.where(some > 0, 1.0, -1.0).astype(np.float32) / np.float32(np.sqrt(some.shape[-1]))
    return normalised(quantised(some, precision).astype(np.float32))


def stored_bytes(dimensions: int, precision: Precision) -> int:
    """Bytes of a vector in an index."""
    return {"float32": 4 * dimensions, "int8": dimensions, "ubinary": -(-dimensions // 8)}[precision]


def difference(one: Sequence[float], other: Sequence[float]) -> float:
    """How far a vector is from another: one minus their cosine, or the relative difference of their lengths where that is more."""
    import numpy as np

    a, b = np.asarray(one, dtype=np.float64), np.asarray(other, dtype=np.float64)
    if a.shape != b.shape:
        return float("inf")
    lengths = float(np.linalg.norm(a)), float(np.linalg.norm(b))
    if not all(lengths):
        return 0.0 if lengths[0] == lengths[1] else 1.0
    cosine = float(a @ b) / (lengths[0] * lengths[1])
    return max(0.0, 1.0 - cosine if one != other else 0.0, abs(lengths[0] - lengths[1]) / max(lengths))
