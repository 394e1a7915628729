"""What a person should know of the data before training on it, in sentences."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from orchestrator.data.files import SPLITS

SMALL_CLASS = 10
"""Training rows below which a class is named."""
IMBALANCE = 20
"""Ratio of the largest class to the smallest from which it is said."""
MOST_ROWS = 30_000_000
"""Above so many rows duplicates are not looked for: the hashes of all would not fit the driver's memory."""


def duplicates(
    inputs: np.ndarray,
    targets: np.ndarray,
    splits: np.ndarray,
    where: Callable[[int], str],
    columns: Sequence[str],
    *,
    own_files: bool,
    group: str | None,
) -> list[str]:
    """Rows with the same input: how many, on both sides of a split, and with different targets.

    `inputs`, `targets`: hashes (uint64) of a row's input and of its target. `splits`: places in `SPLITS`. `where(i)`:
    the row id of row i. `columns`: the columns of the input.
    """
    if len(inputs) > MOST_ROWS:
        return [f"{len(inputs):,} rows are too many to look for duplicates (up to {MOST_ROWS:,} are)."]
    order = np.argsort(inputs, kind="stable")
    same = inputs[order][1:] == inputs[order][:-1]
    if not same.any():
        return []
    text = " and ".join(columns) or "input"
    sentences = []
    first = np.flatnonzero(same)
    repeated = int(same.sum())
    share = repeated / len(inputs)
    example = _both(where(int(order[first[0]])), where(int(order[first[0] + 1])))
    sentences.append(
        f"{_rows(repeated)} ({share:.1%}) {'repeat' if repeated != 1 else 'repeats'} the {text} of another row, for example {example}."
    )
    # Runs of equal inputs: their numbers along `order`.
    run = np.concatenate([[0], np.cumsum(~same)])
    sentences += _leaks(run, splits[order], text, columns, own_files=own_files, group=group)
    mixed = _runs_with_more_than_one(run, targets[order])
    if len(mixed):
        begin = int(np.searchsorted(run, mixed[0]))
        one, other = _two_that_differ(order[begin : int(np.searchsorted(run, mixed[0], side="right"))], targets)
        ids = _both(where(one), where(other))
        sentences.append(
            f"{len(mixed):,} {'inputs have' if len(mixed) != 1 else 'input has'} different labels in different rows, for example {ids}."
        )
    return sentences


def _leaks(run: np.ndarray, splits: np.ndarray, text: str, columns: Sequence[str], *, own_files: bool, group: str | None) -> list[str]:
    runs = int(run[-1]) + 1
    in_train = np.zeros(runs, dtype=bool)
    in_train[run[splits == 0]] = True
    sentences = []
    for place in (2, 1):
        leaked = int(in_train[run[splits == place]].sum())
        if leaked:
            remedy = (
                f"remove them from the {SPLITS[place]} rows"
                if own_files or group
                else f"remove the duplicates, or set data.split.group: {columns[0]} so that equal rows stay together"
            )
            sentences.append(
                f"{_rows(leaked)} of {SPLITS[place]} {'have' if leaked != 1 else 'has'} the same {text} as a training row, which makes {SPLITS[place]} scores look better than they are: {remedy}."
            )
    return sentences


def _runs_with_more_than_one(run: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Numbers of the runs in which `values` differ."""
    different = (run[1:] == run[:-1]) & (values[1:] != values[:-1])
    return np.unique(run[1:][different])


def _two_that_differ(rows: np.ndarray, values: np.ndarray) -> tuple[int, int]:
    other = rows[values[rows] != values[rows[0]]][0]
    return int(rows[0]), int(other)


def balance(counts: Mapping[str, Mapping[str, int]]) -> list[str]:
    """Classes with few rows or far fewer than others. `counts`: split -> class -> rows."""
    train = counts.get("train", {})
    if len(train) < 2:
        return []
    sentences = []
    most, least = max(train, key=lambda name: train[name]), min(train, key=lambda name: train[name])
    if train[most] > IMBALANCE * train[least]:
        sentences.append(
            f"Classes are far apart: {_rows(train[most])} of {most!r} and {_rows(train[least])} of {least!r} in train; accuracy says little then, look at F1 and at class weights."
        )
    small = sorted((name for name in train if train[name] < SMALL_CLASS), key=lambda name: train[name])
    if small:
        shown = ", ".join(f"{name!r} ({train[name]})" for name in small[:5])
        more = f" and {len(small) - 5:,} more" if len(small) > 5 else ""
        sentences.append(f"Classes with fewer than {SMALL_CLASS} training rows: {shown}{more}.")
    for split in ("validation", "test"):
        absent = [name for name in train if counts.get(split) and name not in counts[split]]
        if absent:
            shown = ", ".join(map(repr, absent[:5])) + (f" and {len(absent) - 5:,} more" if len(absent) > 5 else "")
            sentences.append(f"No {split} row has {shown}: {split} scores say nothing of it.")
    return sentences


def _both(one: str, other: str) -> str:
    """Two row ids, the earlier row first."""
    return " and ".join(sorted((one, other), key=lambda name: (len(name), name)))


def _rows(count: int) -> str:
    return f"{count:,} row{'s' * (count != 1)}"
