"""Encoded rows that stay in memory, for processes that train on the same data again and again: the trials of a sweep.

The global batches are those of `stream.RankStream` with one worker, row for row: the same `Plan` gives them. Rows are
kept as the stream hands them over (pickled examples), which takes a tenth of the memory that lists of tokens take, and
no use of them can change them for the next.
"""

from __future__ import annotations

import itertools
import pickle
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from orchestrator.data.stream import Encoding, Plan, Unpacker, lengths
from orchestrator.loop import Share
from orchestrator.tasks.base import Example, Row

RESIDENT_ROWS = 200_000
"""Rows of a split beyond which it is streamed, in each trial anew."""
RESIDENT_BYTES = 512 * 2**20
"""The same for the encoded rows of a split."""


@dataclass(frozen=True)
class Resident:
    """All rows of a split, encoded, in the order of its files."""

    counts: tuple[int, ...]
    row_ids: list[str]
    examples: list[bytes]
    rows: list[bytes]
    """The rows themselves, where they were asked for."""
    lengths: np.ndarray
    """By which rows are grouped."""
    rows_at_once: int
    """That were encoded together."""

    @classmethod
    def read(cls, encoding: Encoding, *, with_rows: bool = False) -> Resident | str:
        """Reads and encodes the split of `encoding` (not for training, of one worker); a sentence where it is too large to keep."""
        total = sum(encoding.counts)
        if total > RESIDENT_ROWS:
            return f"{total:,} rows are more than the {RESIDENT_ROWS:,} that a trial keeps in memory, so they are streamed"
        size = 0
        made = cls(encoding.counts, [], [], [], np.zeros(total, dtype=np.int64), encoding.task.rows_at_once)
        for file, count in enumerate(encoding.counts):
            if not count:
                continue
            table = encoding.read(0, file, 0, total)
            first = len(made.row_ids)
            made.lengths[first : first + count] = lengths(table, encoding.task)
            for low in range(0, count, made.rows_at_once):
                encoded = encoding.encode(table.slice(low, made.rows_at_once), with_rows)
                size += encoded.nbytes
                if size > RESIDENT_BYTES:
                    return f"more than the {RESIDENT_BYTES / 1e6:.0f} MB of encoded rows that a trial keeps in memory, so they are streamed"
                made.row_ids.extend(encoded["row_id"].to_pylist())
                made.examples.extend(encoded["examples"].to_pylist())
                if with_rows:
                    made.rows.extend(encoded["row"].to_pylist())
        return made


class ResidentStream(Unpacker):
    """A `loop.Stream` of one worker over resident rows."""

    def __init__(self, split: Resident, *, seed: int, global_batch: int, group_by_length: bool):
        self.rows = len(split.row_ids)
        self.steps_per_epoch = -(-self.rows // global_batch)
        self._split, self._order = split, (seed, global_batch, group_by_length)

    def steps(self, epoch: int, start: int) -> Iterator[Share]:
        """The global batches of `epoch` from step `start` on."""
        seed, batch, grouped = self._order
        order = _in_order(Plan(self._split.counts, seed, epoch, batch, grouped), self._split.lengths)
        for step in range(start, self.steps_per_epoch):
            row_ids: list[str] = []
            examples: list[Example] = []
            for place in order[step * batch : (step + 1) * batch]:
                found = self.unpack(self._split.examples[place])
                examples += found
                row_ids += [self._split.row_ids[place]] * len(found)
            yield Share(step=step, row_ids=row_ids, examples=examples)

    def close(self) -> None:
        """As the other stream; there is nothing to close."""


class ResidentRows:
    """The rows of a split that is not trained on, in chunks of (position, row, examples), as `stream.SplitRows` gives them."""

    def __init__(self, split: Resident):
        self.rows = len(split.row_ids)
        self._split = split

    def __iter__(self) -> Iterator[list[tuple[int, Row, list[Example]]]]:
        unpacker = Unpacker()
        for first, last in _chunks(self._split.counts, self._split.rows_at_once):
            yield [
                (place, pickle.loads(self._split.rows[place]), unpacker.unpack(self._split.examples[place])) for place in range(first, last)
            ]


def _in_order(plan: Plan, lengths: np.ndarray) -> list[int]:
    """For each position of the epoch the row there."""
    order = np.empty(plan.rows, dtype=np.int64)
    starts = list(itertools.accumulate(plan.counts, initial=0))
    for file in plan.files(0, plan.rows):
        rows = slice(starts[file], starts[file + 1])
        order[plan.positions(file, lengths[rows])] = np.arange(rows.start, rows.stop)
    return order.tolist()


def _chunks(counts: tuple[int, ...], at_once: int) -> Iterator[tuple[int, int]]:
    """First and last+1 row of what a task encodes at once: the model sees chunks of the same rows as in `stream.SplitRows`."""
    for start, stop in itertools.pairwise(itertools.accumulate(counts, initial=0)):
        for first in range(start, stop, at_once):
            yield first, min(first + at_once, stop)
