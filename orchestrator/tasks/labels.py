"""Labels as they stand in data: their one spelling, their order, and what is said of those that can't be learnt from.

Counts are observations of `Task.observe`: split -> {"rows": …, "labels": {name: rows}}.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from orchestrator.errors import InputError, nearest
from orchestrator.tasks.base import Observation, RowError

_WHOLE = re.compile(r"(-?(?:0|[1-9]\d*))\.0+")


def label_name(value: Any) -> str:
    """The one spelling of a label: 1, 1.0, "1" and "1.0" are "1"; true, "True" and "TRUE" are "true"; other text stays as it is."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return str(int(value)) if value.is_integer() else repr(value)
    text = str(value)
    if text.lower() in ("true", "false"):
        return text.lower()
    whole = _WHOLE.fullmatch(text)
    return whole[1] if whole else text


def label_names(value: Any) -> Any:
    """`label_name` of each, where `value` is a list: for a field of a task."""
    return tuple(label_name(name) for name in value) if isinstance(value, (list, tuple)) else value


LabelNames = Annotated[Annotated[tuple[str, ...], Field(min_length=1)] | None, BeforeValidator(label_names)]
"""A task's `labels`: at least one name, or None."""


def missing(value: Any) -> bool:
    """None or NaN: what readers give where nothing stands."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def one_label(value: Any, expected: str = "a label") -> str:
    """The label in a cell, or `RowError`."""
    if missing(value) or (isinstance(value, str) and not value.strip()):
        raise RowError("label", "a label", value)
    if not isinstance(value, (str, bool, int, float)) or (isinstance(value, float) and not math.isfinite(value)):
        raise RowError("label", expected, value)
    return label_name(value)


def several_labels(value: Any, delimiter: str | None) -> list[str]:
    """The labels in a cell, sorted: of a list, a JSON list, or text with `delimiter` (None: `|` where there is one, else `,`) between them.

    Empty text is no label; `RowError` where the cell is missing or something else.
    """
    expected = "a list of labels, or text such as a|b (empty: none of them)"
    if isinstance(value, str):
        text = value.strip()
        if text.startswith("["):
            try:
                parts = json.loads(text)
            except ValueError:
                raise RowError("label", "a JSON list of labels", value) from None
        else:
            parts = [part.strip() for part in text.split(delimiter or ("|" if "|" in text else ",")) if part.strip()]
    elif isinstance(value, (list, tuple)):
        parts = list(value)
    elif isinstance(value, (bool, int, float)) and not missing(value):
        parts = [value]
    else:
        raise RowError("label", expected, value)
    if any(missing(part) or (isinstance(part, str) and not part.strip()) for part in parts):
        raise RowError("label", "a list without empty labels", value)
    return sorted({one_label(part, "a flat list of labels") for part in parts})


def one_number(value: Any, column: str = "label") -> float:
    """The number in a cell, or `RowError`."""
    try:
        number = float(value) if isinstance(value, (int, float, str)) and not isinstance(value, bool) else math.nan
    except (ValueError, OverflowError):
        raise RowError(column, "a number", value) from None
    if not math.isfinite(number):
        raise RowError(column, "a finite number", value)
    return number


def bit_counts(values: Sequence[float]) -> dict[str, int]:
    """How often each bit of the 64 of a double is set: equal numbers, and only they, give 0 or all for every bit.

    So whether all targets are the same can be told from counts that merge by addition.
    """
    import numpy as np

    bits = np.unpackbits((np.asarray(values, dtype="<f8") + 0.0).view(np.uint8)).reshape(-1, 64).sum(axis=0)
    return {str(place): int(count) for place, count in enumerate(bits) if count}


def _number(name: str) -> float | None:
    try:
        number = float(name)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def ordered(names: Iterable[str]) -> tuple[str, ...]:
    """Numbers by size where all are numbers, else names by alphabet."""
    every = list(names)
    numbers = all(_number(name) is not None for name in every)
    return tuple(sorted(every, key=_number if numbers else None))  # type: ignore[arg-type, type-var]


def listed(names: Iterable[str], most: int = 5) -> str:
    """The first of the names, for a sentence."""
    every = list(names)
    shown = ", ".join(repr(name) for name in every[:most])
    return f"{shown} and {len(every) - most:,} more" if len(every) > most else shown


def _rows(count: float) -> str:
    return f"{int(count):,} row" if count == 1 else f"{int(count):,} rows"


def counted(counts: Mapping[str, float]) -> str:
    """The most frequent names with their rows, for a sentence."""
    most = sorted(counts, key=lambda name: -counts[name])
    shown = ", ".join(f"{name!r} ({_rows(counts[name])})" for name in most[:5])
    return f"{shown} and {len(most) - 5:,} more" if len(most) > 5 else shown


def refuse_unlearnable(observed: Mapping[str, Observation], *, several: bool) -> None:
    """`InputError` where the training rows have no label, one only, all the same, or nearly as many as there are rows."""
    rows, counts = int(observed["train"]["rows"]), observed["train"]["labels"]
    if not counts:
        raise InputError(f"None of the {rows:,} training rows has a label, so there is nothing to learn.")
    if len(counts) == 1 and not several:
        raise InputError(f"All {rows:,} training rows have the label {next(iter(counts))!r}; a classifier needs two labels or more.")
    if several and all(count == rows for count in counts.values()):
        raise InputError(f"All {rows:,} training rows have the same labels, {listed(counts)}, so there is nothing to learn.")
    if len(counts) > 50 and 2 * len(counts) > rows:
        numbers = all(_number(name) is not None for name in counts)
        advice = "to predict a number, set task.problem: regression" if numbers else "is data.columns.label the right column?"
        raise InputError(f"The {rows:,} training rows have {len(counts):,} different labels, such as {listed(counts)}: {advice}.")


def refuse_look_alikes(observed: Mapping[str, Observation]) -> None:
    """`InputError` where labels differ only by case or spaces, with how many rows have each."""
    total: Counter[str] = Counter()
    for observation in observed.values():
        total.update(observation.get("labels", {}))
    alike: dict[str, list[str]] = {}
    for name in total:
        alike.setdefault("".join(name.casefold().split()), []).append(name)
    if groups := [names for names in alike.values() if len(names) > 1]:
        shown = "; ".join(
            " and ".join(f"{name!r} ({_rows(total[name])})" for name in sorted(names, key=lambda name: -total[name]))
            for names in groups[:5]
        )
        raise InputError(f"Labels differ only by case or spaces: {shown}. Write each label one way.")


def refuse_unlisted(labels: Sequence[str], observed: Mapping[str, Observation]) -> None:
    """`InputError` where rows have labels that the job does not name, or it names some that no training row has."""
    counts = observed["train"]["labels"]
    for split, observation in observed.items():
        if unknown := {name: count for name, count in observation.get("labels", {}).items() if name not in labels}:
            closest = nearest(next(iter(unknown)), labels)[0]
            raise InputError(
                f"The {split} split has labels that task.labels does not name: {counted(unknown)}. The nearest that it names is {closest!r}."
            )
    counts = observed["train"]["labels"]
    if unseen := [name for name in labels if name not in counts]:
        raise InputError(f"task.labels names {listed(unseen)}, which no row has. The rows have {counted(counts)}.")


def refuse_untrained(observed: Mapping[str, Observation]) -> None:
    """`InputError` where a split has labels that no training row has."""
    counts = observed["train"]["labels"]
    for split, observation in observed.items():
        if unknown := {name: count for name, count in observation.get("labels", {}).items() if name not in counts}:
            closest = nearest(next(iter(unknown)), counts)[0]
            raise InputError(
                f"The {split} split has labels that no training row has: {counted(unknown)}. The nearest training label is {closest!r}."
            )
