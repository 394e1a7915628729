"""Which rows are for training, validation and test: exact shares, decided by hashes, so by nothing but seed and row id."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from orchestrator.data.files import SPLITS

TRAIN, VALIDATION, TEST = range(3)
"""Places in `SPLITS`."""


def hashes(texts: Sequence[str], purpose: str) -> np.ndarray:
    """A 64-bit hash (SipHash, uint64) of each text; those for one purpose are independent of those for another."""
    from pandas.util import hash_array as siphash

    key = hashlib.blake2b(purpose.encode(), digest_size=8).hexdigest()
    try:
        return siphash(np.array(texts, dtype=object), hash_key=key, categorize=False)  # pyright: ignore[reportCallIssue]
    except UnicodeEncodeError:  # half of a surrogate pair, in the name of a file for example
        return siphash(np.array([ascii(text) for text in texts], dtype=object), hash_key=key, categorize=False)  # pyright: ignore[reportCallIssue]


@dataclass(frozen=True)
class Cuts:
    """Where hashes are cut: below the first number test, below the second validation, else train."""

    fixed: int | None = None
    """The split of every row, where the files belong to one."""
    strata: Mapping[str | None, tuple[int, int]] | None = None
    """The two numbers for the rows of each stratum."""
    everywhere: tuple[int, int] | None = None
    """The two numbers for all rows, where strata don't count."""

    def assign(self, hashes: np.ndarray, codes: np.ndarray, strata: Sequence[str | None]) -> np.ndarray:
        """For each row its split's place in `SPLITS` (int8); `codes[i]` is the place in `strata` of row i."""
        if self.fixed is not None:
            return np.full(len(hashes), self.fixed, dtype=np.int8)
        result = np.full(len(hashes), TRAIN, dtype=np.int8)
        if self.everywhere is not None:
            test, validation = (np.uint64(limit) for limit in self.everywhere)
        else:
            assert self.strata is not None
            limits = np.array([self.strata[name] for name in strata], dtype=np.uint64).reshape(-1, 2)
            test, validation = limits[codes, 0], limits[codes, 1]
        result[hashes < validation] = VALIDATION
        result[hashes < test] = TEST
        return result


def fixed(split: str) -> Cuts:
    """Every row belongs to `split`."""
    return Cuts(fixed=SPLITS.index(split))


def cut(hashes: np.ndarray, codes: np.ndarray, strata: Sequence[str | None], *, validation: float, test: float) -> Cuts:
    """Cuts that give each split its share of the rows to the row, and of each stratum to within one row.

    `codes[i]` is the place in `strata` of row i. A stratum's last row stays in train: what no training row shows
    can't be learnt.
    """
    counts = np.bincount(codes, minlength=len(strata)).astype(np.int64)
    for_test = apportion(counts, test, counts - 1)
    for_validation = apportion(counts, validation, counts - 1 - for_test)
    result: dict[str | None, tuple[int, int]] = {}
    for place, name in enumerate(strata):
        ordered = np.sort(hashes[codes == place]) if len(strata) > 1 else np.sort(hashes)
        if len(ordered):
            first, second = int(for_test[place]), int(for_test[place] + for_validation[place])
            result[name] = (int(ordered[first]), int(ordered[second]))
    return Cuts(strata=result) if strata != (None,) else Cuts(everywhere=result[None])


def cut_groups(hashes: np.ndarray, *, validation: float, test: float) -> Cuts:
    """Cuts between groups (rows of equal hash), as near to the shares as the sizes of the groups allow."""
    groups, counts = np.unique(hashes, return_counts=True)
    ends = np.concatenate([[0], np.cumsum(counts)])
    # At least one group is left to train on.
    last = len(groups) - 1

    def nearest_end(rows: float, low: int) -> int:
        return low + int(np.argmin(np.abs(ends[low : last + 1] - rows)))

    first = nearest_end(test * len(hashes), 0) if test else 0
    second = nearest_end(ends[first] + validation * len(hashes), first) if validation else first
    return Cuts(everywhere=(int(groups[first]), int(groups[second])))


def apportion(counts: np.ndarray, share: float, room: np.ndarray) -> np.ndarray:
    """`share` of each count, whole numbers that add up to `share` of the sum: largest remainders, none above `room`.

    A share above nothing of three rows or more is at least one row.
    """
    room = np.maximum(room, 0)
    total = int(counts.sum())
    wanted = round(share * total)
    if share > 0 and total >= 3:
        wanted = max(1, wanted)
    exact = counts * share
    given = np.minimum(np.floor(exact).astype(np.int64), room)
    while (left := wanted - int(given.sum())) > 0:
        open_places = np.flatnonzero(given < room)
        if not len(open_places):
            break
        order = open_places[np.argsort(-(exact - given)[open_places], kind="stable")]
        given[order[:left]] += 1
    return given
