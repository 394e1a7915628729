"""Sends rows through a live endpoint and compares its answers with the offline predictions: is what serves what was scored?"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from orchestrator.errors import StageError
from orchestrator.tasks.base import Prediction, Row, Task

CLIENTS = 8
ATTEMPTS = 5


@dataclass(frozen=True)
class Replay:
    rows: int
    largest_difference: float


def replay(
    url: str,
    task: Task,
    rows: Sequence[Row],
    predictions: Sequence[Prediction],
    tolerance: float,
    *,
    api_key: str | None = None,
    timeout_s: float = 60.0,
) -> Replay:
    """How far the endpoint's answers are from what `predictions` say, over `rows`, several clients at once.

    Raises `StageError` naming the row, what was expected and what came, where they differ by more than `tolerance`.
    """
    parameters = task.replay_parameters()
    asked = parameters.model_dump(mode="json", exclude_defaults=True)
    beside = {"parameters": asked} if asked else {}
    expected = [task.answer([prediction], parameters, single=True) for prediction in predictions]
    largest = 0.0
    with _client(api_key, timeout_s) as client, ThreadPoolExecutor(CLIENTS) as pool:
        answers = pool.map(lambda row: _ask(client, url, {"inputs": task.inputs_from(row), **beside}), rows)
        for row, wanted, found in zip(rows, expected, answers, strict=True):
            try:
                difference = task.answer_difference(wanted, found)
            except (AttributeError, KeyError, TypeError):  # not even of the answer's shape
                difference = math.inf
            if not difference <= tolerance:
                raise StageError(
                    f"The endpoint does not answer as the model was scored: for the row {row.get('row_id', task.inputs_from(row))!r} "
                    f"{_short(wanted)} was expected and {_short(found)} came (difference {difference:.3g}, allowed {tolerance:g})."
                )
            largest = max(largest, difference)
    return Replay(len(expected), largest)


def ask(url: str, task: Task, rows: Sequence[Row], *, api_key: str | None = None, timeout_s: float = 60.0) -> Iterator[tuple[Any, Any]]:
    """The `inputs` of each row and the endpoint's answer to it, one by one."""
    with _client(api_key, timeout_s) as client:
        for row in rows:
            inputs = task.inputs_from(row)
            yield inputs, _ask(client, url, {"inputs": inputs})


def _client(api_key: str | None, timeout_s: float) -> Any:
    import httpx

    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    return httpx.Client(timeout=timeout_s, headers=headers, trust_env=False)


def _ask(client: Any, url: str, body: Any) -> Any:
    """One answer; an endpoint that is busy or away for a moment is asked again."""
    import httpx

    failure = ""
    for attempt in range(1, ATTEMPTS + 1):
        try:
            answer = client.post(url, json=body)
        except httpx.TransportError as error:
            failure = f"{type(error).__name__}: {error}"
        else:
            if answer.status_code == 200:
                return answer.json()
            failure = f"status {answer.status_code}: {answer.text[:300]}"
            if answer.status_code not in (429, 503):
                break
        time.sleep(0.2 * attempt)
    raise StageError(f"The endpoint {url} did not answer a replayed row: {failure}")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 300 else f"{text[:300]}…"
