"""Scores of vectors: of a search among all positives of a split, of similarities against scores or labels; and what smaller vectors cost."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from orchestrator import metrics as modules
from orchestrator.tasks import vectors
from orchestrator.tasks.base import Prediction, Row
from orchestrator.tasks.contrastive import text_key
from orchestrator.tasks.vectors import Precision

if TYPE_CHECKING:
    import numpy as np

_SEARCH = ("ndcg_at_10", "mrr_at_10", "recall_at_1", "recall_at_5", "recall_at_10")
METRICS: dict[str, tuple[str, ...]] = {
    "pairs": _SEARCH,
    "triplets": ("accuracy", *_SEARCH),
    "scored-pairs": ("spearman", "pearson"),
    "labelled-pairs": ("average_precision",),
}
"""By problem; the first one is the objective."""
BLOCK = 1 << 24
"""Similarities that are in memory at once."""


def score(problem: str, predictions: Sequence[Prediction], rows: Sequence[Row], wanted: Sequence[str]) -> dict[str, float]:
    """Those of the metrics that have a value here."""
    if not len(rows):
        return {}
    values = _said(problem, predictions, rows).values(None, "float32")
    return {name: values[name] for name in wanted if name in values}


def sizes(problem: str, predictions: Sequence[Prediction], rows: Sequence[Row], dims: Sequence[int] | None) -> list[dict[str, Any]]:
    """A line for each size and precision of the vectors: the bytes that one takes, and the metrics with such vectors."""
    if not len(rows):
        return []
    said = _said(problem, predictions, rows)
    lines = []
    for size in dims or (said.size,):
        for precision in vectors.PRECISIONS:
            line = {"dimensions": size, "precision": precision, "bytes_per_vector": vectors.stored_bytes(size, precision)}
            values = said.values(size, precision)
            lines.append(line | {name: values[name] for name in METRICS[problem] if name in values})
    return lines


@dataclass(frozen=True)
class _Compared:
    """Pairs of texts and the number that belongs to each."""

    problem: str
    first: np.ndarray
    second: np.ndarray
    targets: np.ndarray

    @property
    def size(self) -> int:
        return self.first.shape[1]

    def values(self, size: int | None, precision: Precision) -> dict[str, float]:
        import numpy as np

        first, second = (vectors.comparable(some, size, precision) for some in (self.first, self.second))
        cosines = np.einsum("ij,ij->i", first, second)
        if self.problem == "scored-pairs":
            said = modules.compute("regression", predictions=cosines, references=self.targets)
            return {name: said[name] for name in METRICS[self.problem] if name in said}
        if not 0 < self.targets.sum() < len(self.targets):
            return {}
        from sklearn.metrics import average_precision_score

        return {"average_precision": float(average_precision_score(self.targets, cosines))}


@dataclass(frozen=True)
class _Searched:
    """Each text once: what is asked, what there is to be found, and which is right for which."""

    queries: np.ndarray
    corpus: np.ndarray
    right: list[list[int]]
    """Places in the corpus that are right for a query."""
    same: list[int]
    """Where the query itself stands in the corpus, which is no answer; -1: nowhere."""
    triplets: list[tuple[int, int, list[int]]]
    """Query, positive and negatives of each row that has negatives."""

    @property
    def size(self) -> int:
        return self.queries.shape[1]

    def values(self, size: int | None, precision: Precision) -> dict[str, float]:
        """Recall (the share of what is right that is found), MRR and nDCG, averaged over the queries; accuracy over triplets."""
        import numpy as np

        queries, corpus = (vectors.comparable(some, size, precision) for some in (self.queries, self.corpus))
        sums: dict[str, float] = defaultdict(float)
        discounts = 1 / np.log2(np.arange(2, 12))
        for query, ranks in enumerate(self._ranks(queries, corpus)):
            count = len(self.right[query])
            top = ranks[ranks <= 10]
            for most in (1, 5, 10):
                sums[f"recall_at_{most}"] += float((top <= most).sum()) / count
            sums["mrr_at_10"] += 1 / float(top.min()) if len(top) else 0.0
            sums["ndcg_at_10"] += float(discounts[top - 1].sum() / discounts[:count].sum())
        result = {name: total / len(self.right) for name, total in sums.items()}
        if self.triplets:
            nearer = [
                float(queries[query] @ corpus[positive]) > float((corpus[negatives] @ queries[query]).max())
                for query, positive, negatives in self.triplets
            ]
            result["accuracy"] = float(np.mean(nearer))
        return result

    def _ranks(self, queries: np.ndarray, corpus: np.ndarray) -> Iterator[np.ndarray]:
        """For each query the ranks (from 1) of what is right for it, in an exact search. Of equal similarities the earlier text wins."""
        import numpy as np

        at_once = max(1, BLOCK // len(corpus))
        for start in range(0, len(queries), at_once):
            block = queries[start : start + at_once] @ corpus.T
            for line, similarities in enumerate(block):
                query = start + line
                if self.same[query] >= 0:
                    similarities[self.same[query]] = -np.inf
                ranks = []
                for place in self.right[query]:
                    own = similarities[place]
                    before = np.count_nonzero(similarities > own) + np.count_nonzero(similarities[:place] == own)
                    ranks.append(1 + int(before))
                yield np.asarray(ranks)


def _said(problem: str, predictions: Sequence[Prediction], rows: Sequence[Row]) -> _Compared | _Searched:
    if problem in ("scored-pairs", "labelled-pairs"):
        return _compared(problem, predictions, rows)
    return _searched(predictions, rows)


def _compared(problem: str, predictions: Sequence[Prediction], rows: Sequence[Row]) -> _Compared:
    import numpy as np

    role = "score" if problem == "scored-pairs" else "label"
    first, second, targets = [], [], []
    for prediction, row in zip(predictions, rows, strict=True):
        first.append(np.asarray(prediction["text_a"], dtype=np.float32))
        second.append(np.asarray(prediction["text_b"], dtype=np.float32))
        targets.append(row[role])
    return _Compared(problem, np.stack(first), np.stack(second), np.asarray(targets, dtype=np.float64))


def _searched(predictions: Sequence[Prediction], rows: Sequence[Row]) -> _Searched:
    import numpy as np

    queries, corpus = _Texts(), _Texts()
    right: dict[int, set[int]] = defaultdict(set)
    triplets = []
    for prediction, row in zip(predictions, rows, strict=True):
        query = queries.add(row["anchor"], prediction["anchor"])
        positive = corpus.add(row["positive"], prediction["positive"])
        right[query].add(positive)
        negatives = [
            corpus.add(text, vector) for text, vector in zip(row.get("negative") or (), prediction.get("negative") or (), strict=True)
        ]
        if negatives:
            triplets.append((query, positive, negatives))
    found = [sorted(right[query]) for query in range(len(queries.vectors))]
    same = [-1 if (place := corpus.places.get(key, -1)) in right[query] else place for key, query in queries.places.items()]
    return _Searched(np.stack(queries.vectors), np.stack(corpus.vectors), found, same, triplets)


class _Texts:
    """Different texts and their vectors, in the order in which they came."""

    def __init__(self) -> None:
        self.places: dict[int, int] = {}
        self.vectors: list[Any] = []

    def add(self, text: str, vector: Sequence[float]) -> int:
        import numpy as np

        place = self.places.setdefault(text_key(text), len(self.vectors))
        if place == len(self.vectors):
            self.vectors.append(np.asarray(vector, dtype=np.float32))
        return place
