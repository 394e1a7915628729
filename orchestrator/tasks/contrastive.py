"""Losses over the vectors of a whole global batch, by what its rows say: pairs, triplets, scores or labels of pairs.

A *relation* is what a loss knows of a text beside its vector: (role, key of the text, target of the row). The texts of a row stand
together, the first one (role 0) opens the row.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import torch

FIRST = 0
"""The role of an anchor or first text; its positive or second text is 1 and stands after it, its negatives are 2."""

Relation = tuple[int, int, float]
Loss = Callable[["torch.Tensor", Sequence[Relation]], "torch.Tensor"]
"""From vectors at length 1 (texts, size) and their relations to the sum over the rows."""


def text_key(text: str) -> int:
    """The same number for the same text, whatever its spaces; 63 bits."""
    return int.from_bytes(hashlib.blake2b(" ".join(text.split()).encode(), digest_size=8).digest(), "little") >> 1


def rows_in(relations: Sequence[Relation]) -> int:
    return sum(role == FIRST for role, _, _ in relations)


def over_sizes(loss: Loss, vectors: torch.Tensor, relations: Sequence[Relation], sizes: Sequence[int] | None) -> torch.Tensor:
    """The loss, summed over the first numbers of the vectors where `sizes` says how many (Matryoshka: Kusupati et al. 2022, arXiv 2205.13147)."""
    from torch.nn import functional

    every = [vectors[:, :size] for size in sizes] if sizes else [vectors]
    return sum(loss(functional.normalize(some.float(), dim=1), relations) for some in every)  # type: ignore[return-value]


def in_batch_negatives(vectors: torch.Tensor, relations: Sequence[Relation], *, scale: float, label_smoothing: float = 0.0) -> torch.Tensor:
    """Cross-entropy of finding an anchor's positive among all positives and negatives of the batch, by cosine x `scale`.

    Henderson et al. 2017, arXiv 1705.00652; van den Oord et al. 2018, arXiv 1807.03748. Texts known to be right for an anchor, or the
    same as it, are no negatives. Label smoothing spreads over the candidates that count.
    """
    import torch

    anchors = _places(relations, FIRST, vectors)
    candidates = torch.tensor([place for place, (role, _, _) in enumerate(relations) if role != FIRST], device=vectors.device)
    own = torch.searchsorted(candidates, anchors + 1)
    logits = scale * vectors[anchors] @ vectors[candidates].T
    out = torch.from_numpy(_not_negatives(relations, own.tolist())).to(vectors.device)
    chosen = logits.gather(1, own.unsqueeze(1)).squeeze(1)
    total = logits.masked_fill(out, float("-inf")).logsumexp(dim=1)
    even = logits.masked_fill(out, 0.0).sum(dim=1) / (~out).sum(dim=1)
    return (total - (1 - label_smoothing) * chosen - label_smoothing * even).sum()


def _not_negatives(relations: Sequence[Relation], own: Sequence[int]) -> np.ndarray:
    """For each anchor and candidate (anchors, candidates): is it out of the comparison? The own positive never is."""
    import numpy as np

    columns: dict[int, list[int]] = defaultdict(list)
    for column, (_, key, _) in enumerate(relation for relation in relations if relation[0] != FIRST):
        columns[key].append(column)
    right: dict[int, set[int]] = defaultdict(set)
    anchors = []
    for place, (role, key, _) in enumerate(relations):
        if role == FIRST:
            anchors.append(key)
            right[key] |= {key, relations[place + 1][1]}
    out = np.zeros((len(anchors), sum(map(len, columns.values()))), dtype=bool)
    for line, anchor in enumerate(anchors):
        for key in right[anchor]:
            out[line, columns.get(key, [])] = True
        out[line, own[line]] = False
    return out


def cosent(vectors: torch.Tensor, relations: Sequence[Relation], *, scale: float) -> torch.Tensor:
    """CoSENT (Su 2022, kexue.fm/archives/8847): of any two pairs of texts the one with the higher score should have the higher cosine.

    Scores count by their order alone, so they may be on any scale. The loss is one of the batch; times its rows, to be a sum.
    """
    import torch

    cosines, targets = _cosines(vectors, relations)
    wrong = scale * (cosines[None, :] - cosines[:, None])[targets[:, None] > targets[None, :]]
    return torch.cat([wrong.new_zeros(1), wrong]).logsumexp(dim=0) * len(cosines)


def cosine_error(vectors: torch.Tensor, relations: Sequence[Relation]) -> torch.Tensor:
    """Squared difference of a pair's cosine and its score (Reimers & Gurevych 2019, arXiv 1908.10084)."""
    cosines, targets = _cosines(vectors, relations)
    return ((cosines - targets) ** 2).sum()


def contrastive(vectors: torch.Tensor, relations: Sequence[Relation], *, margin: float) -> torch.Tensor:
    """Pairs of label 1 are drawn together, those of label 0 pushed to a cosine distance of `margin` (Hadsell et al. 2006)."""
    cosines, same = _cosines(vectors, relations)
    distance = 1 - cosines
    return 0.5 * (same * distance**2 + (1 - same) * (margin - distance).clamp(min=0.0) ** 2).sum()


def _places(relations: Sequence[Relation], role: int, like: torch.Tensor) -> torch.Tensor:
    import torch

    return torch.tensor([place for place, relation in enumerate(relations) if relation[0] == role], dtype=torch.long, device=like.device)


def _cosines(vectors: torch.Tensor, relations: Sequence[Relation]) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and target of each row's two texts."""
    import torch

    first = _places(relations, FIRST, vectors)
    targets = torch.tensor([target for role, _, target in relations if role == FIRST], dtype=torch.float32, device=vectors.device)
    return (vectors[first] * vectors[first + 1]).sum(dim=1), targets
