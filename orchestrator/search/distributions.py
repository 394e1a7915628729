"""The distributions of a search space: their values, their ends, and drawing from them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any

from orchestrator.config import Parameter


def draw(trial: Any, path: str, parameter: Parameter) -> Any:
    """A value by the `suggest_…` method of an Optuna trial that fits."""
    kind = parameter.kind
    if parameter.choice is not None:  # by place: values may be sections, and Optuna wants plain ones
        return parameter.choice[trial.suggest_categorical(path, list(range(len(parameter.choice))))]
    if parameter.quniform is not None:
        low, _, step = parameter.quniform
        value = trial.suggest_float(path, low, corners(parameter)[1], step=step)
        return _rounded(low + round((value - low) / step) * step)
    if kind in ("int", "logint"):
        return trial.suggest_int(path, int(parameter.low), int(parameter.high), log=kind == "logint")
    value = trial.suggest_float(path, parameter.low, parameter.high, log=kind == "loguniform")
    return min(max(float(f"{value:.6g}"), parameter.low), parameter.high)


def corners(parameter: Parameter) -> list[Any]:
    """Its ends; of a choice all of it."""
    if parameter.choice is not None:
        return parameter.choice
    if parameter.quniform is not None:
        low, _, step = parameter.quniform
        return [low, _rounded(low + (count(parameter) - 1) * step)]  # pyright: ignore[reportOptionalOperand]
    return [parameter.low, parameter.high]


def count(parameter: Parameter) -> int | None:
    """How many values it has; None: endless."""
    if parameter.choice is not None:
        return len(parameter.choice)
    if parameter.quniform is not None:
        low, high, step = parameter.quniform
        return math.floor((high - low) / step + 1e-9) + 1
    return int(parameter.high - parameter.low) + 1 if parameter.kind in ("int", "logint") else None


def values(parameter: Parameter) -> Iterator[Any]:
    """All values of one that is not endless."""
    if parameter.choice is not None:
        yield from parameter.choice
    elif parameter.quniform is not None:
        low, _, step = parameter.quniform
        yield from (_rounded(low + place * step) for place in range(count(parameter) or 0))
    else:
        yield from range(int(parameter.low), int(parameter.high) + 1)


def contains(parameter: Parameter, value: Any) -> bool:
    """Could a trial be given this value?"""
    if parameter.choice is not None:
        return any(same(value, choice) for choice in parameter.choice)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not parameter.low <= value <= parameter.high:
        return False
    if parameter.quniform is not None:
        low, _, step = parameter.quniform
        return math.isclose((value - low) / step, round((value - low) / step), abs_tol=1e-6)
    return float(value).is_integer() or parameter.kind not in ("int", "logint")


def same(one: Any, other: Any) -> bool:
    """Equality of JSON values, in which true is not 1."""
    return one == other and isinstance(one, bool) == isinstance(other, bool)


def _rounded(value: float) -> float:
    """Without the dust of binary fractions: 0.3 for 0.1 + 0.2."""
    return float(f"{value:.12g}")


def shown(parameter: Parameter) -> str:
    """As a person would write it."""
    value = getattr(parameter, parameter.kind)
    return (
        f"one of {json.dumps(value)}"
        if parameter.choice is not None
        else f"{parameter.kind}: [{', '.join(f'{bound:g}' for bound in value)}]"
    )
