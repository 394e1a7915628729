"""What a person sees while a job runs: Rich on a terminal, plain lines elsewhere."""

from __future__ import annotations

from typing import Protocol


class Display(Protocol):
    """Where stages say what they do. Every method returns at once and never raises."""

    def stage(self, name: str) -> None:
        """A new stage begins; ends the one before."""
        ...

    def say(self, sentence: str) -> None:
        """One line that stays on the screen."""
        ...

    def warn(self, sentence: str) -> None:
        """One line that stays on the screen and stands out."""
        ...

    def step(self, done: float, total: float | None, unit: str = "steps", **fields: float | str) -> None:
        """The stage's moving line: how much of how much, and named figures such as loss=0.31, rate="412 examples/s"."""
        ...


class Silent:
    """A display that shows nothing, for tests and for use as a library."""

    def stage(self, name: str) -> None: ...
    def say(self, sentence: str) -> None: ...
    def warn(self, sentence: str) -> None: ...
    def step(self, done: float, total: float | None, unit: str = "steps", **fields: float | str) -> None: ...
