"""All triples of a graph in little room: what a filtered rank leaves out, and what a proposal is not new by."""

from __future__ import annotations

import base64
import zlib
from collections.abc import Iterable
from typing import Any

MOST_TRIPLES = 1_000_000
"""Triples that are kept: they travel in the task, at about 5 bytes each."""


def packed(triples: Iterable[tuple[int, int, int]]) -> str:
    """Places of head, relation and tail as text; the same for the same triples in any order."""
    import numpy as np

    array = np.array(sorted(triples), dtype="<i4").reshape(-1, 3)
    # Column by column, as differences to the triple before: sorted triples differ little.
    return base64.b64encode(zlib.compress(np.diff(array, axis=0, prepend=0).T.astype("<i4").tobytes(), 9)).decode()


class KnownTriples:
    """Which entities are known to answer (source, relation, ?), in both directions: relation r backwards is r + `relations`."""

    def __init__(self, text: str, relations: int):
        import numpy as np

        array = np.cumsum(np.frombuffer(zlib.decompress(base64.b64decode(text)), dtype="<i4").reshape(3, -1).T, axis=0)
        heads, kinds, tails = array.T.astype(np.int64)
        self._step = 2 * relations
        keys = np.concatenate([heads * self._step + kinds, tails * self._step + kinds + relations])
        order = np.argsort(keys, kind="stable")
        self._keys, self._answers = keys[order], np.concatenate([tails, heads])[order]

    def answers(self, source: int, relation: int) -> Any:
        """Places of the entities, as an array of int64."""
        import numpy as np

        key = source * self._step + relation
        low, high = np.searchsorted(self._keys, [key, key + 1])
        return self._answers[low:high]
