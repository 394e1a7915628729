"""Dialects: the ways in which clients speak to the endpoint, all on one port.

A dialect turns a request into rows, and predictions or a problem into the answer its clients expect. To add one: a module
here with a class of this protocol, and a line in `DIALECTS`. A dialect serves the tasks it has words for: where `routes`
returns none, it isn't there. It knows no task by name; what differs between tasks it asks of the task.
"""

from __future__ import annotations

import importlib
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from starlette.requests import Request
from starlette.responses import Response

from orchestrator.tasks.base import Row, Task
from serving.batcher import Answer
from serving.problem import Problem

DIALECTS: dict[str, str] = {
    "huggingface": "serving.dialects.huggingface:HuggingFace",
}


class Model(Protocol):
    """The served model, as dialects see it."""

    name: str
    version: int | None
    task: Task

    async def json(self, request: Request) -> Any:
        """The request's body, read within limits; `Problem` 400, 413 or 415."""
        ...

    async def content(self, request: Request) -> bytes:
        """The request's body as it is, read within limits; `Problem` 400 or 413."""
        ...

    async def predict(self, request: Request, rows: Sequence[Row]) -> Answer:
        """Predictions for clean rows; `Problem` 413, 422, 429, 500, 503 or 504."""
        ...


@dataclass(frozen=True)
class Route:
    """One path of a dialect. `path` may have parameters, as in `/models/{model:path}`."""

    path: str
    handler: Callable[[Request], Awaitable[Response]]
    operation: dict[str, Any] = field(default_factory=dict)
    """OpenAPI operation object: summary, requestBody, responses."""
    method: str = "POST"
    public: bool = False
    """Answered without an API key."""


class Dialect(Protocol):
    """One way of speaking to the endpoint."""

    name: str

    def routes(self, model: Model) -> list[Route]:
        """The dialect's routes for this model; none where it has no words for the model's task."""
        ...

    def error(self, problem: Problem) -> Any:
        """The JSON body that says `problem` to this dialect's clients."""
        ...


def load() -> list[Dialect]:
    """Every dialect, in the order of `DIALECTS`; the first one's errors are used where no dialect was addressed."""
    dialects = []
    for target in DIALECTS.values():
        module, _, name = target.partition(":")
        dialects.append(getattr(importlib.import_module(module), name)())
    return dialects
