"""What goes wrong with a request, before any dialect has said it in its own words."""

from __future__ import annotations

from dataclasses import dataclass, field

from orchestrator.errors import InputError
from orchestrator.tasks.base import RowError
from serving.batcher import BadItem, Closed, Late, Overloaded


@dataclass(eq=False)
class Problem(Exception):
    """An answer that is not a prediction. `sentence` goes to the client, so nothing of the server's insides is in it."""

    status: int
    kind: str
    """One word for programs: validation, unauthorized, not_found, too_large, overloaded, unhealthy, timeout, internal, …"""
    sentence: str
    headers: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.status} {self.kind}: {self.sentence}"


def wrong_input(error: InputError) -> Problem:
    """400 for inputs of the wrong shape, 422 for well-formed ones that cannot be used, such as an empty text."""
    unusable = isinstance(error, RowError) or isinstance(error.__cause__, RowError)
    return Problem(422 if unusable else 400, "validation", str(error))


def from_batcher(error: Exception) -> Problem:
    """The problem of a request that the batcher didn't answer."""
    if isinstance(error, Overloaded):
        sentence = f"The endpoint has as many rows waiting as it takes; try again in {error.retry_after_s:.0f} s."
        return Problem(429, "overloaded", sentence, {"Retry-After": f"{error.retry_after_s:.0f}"})
    if isinstance(error, Late):
        return Problem(504, "timeout", f"There was {error}.", {"x-should-retry": "false"})
    if isinstance(error, Closed):
        return Problem(503, "unhealthy", "The endpoint is shutting down.", {"Retry-After": "1"})
    if isinstance(error, BadItem):
        cause = error.__cause__
        if isinstance(cause, (InputError, RowError)):
            return Problem(422, "validation", f"inputs[{error.index}]: {cause}")
        return Problem(500, "internal", f"inputs[{error.index}] could not be answered: an error in {error.stage}.")
    raise error
