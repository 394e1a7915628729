"""What a person sees while a job runs: Rich on a terminal, plain lines elsewhere."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, Self, TextIO

Clock = Callable[[], float]
Row = tuple[Sequence[str], str]
"""The cells of a line of a table, and its style."""


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

    def step(self, done: float, total: float | None, unit: str = "steps", *, left: float | None = None, **fields: float | str) -> None:
        """The stage's moving line: how much of how much, and named figures such as loss=0.31, rate="412 examples/s".

        `left`: seconds to go, from who knows better than the pace so far says.
        """
        ...

    def table(self, columns: Sequence[str], rows: Sequence[Row], news: Sequence[str] = ()) -> None:
        """The stage's live table, whole; of more rows than there is room for the last ones are left out.

        `news` are lines about what changed, for those who can't see the table.
        """
        ...


class Silent:
    """A display that shows nothing, for tests and for use as a library."""

    def stage(self, name: str) -> None: ...
    def say(self, sentence: str) -> None: ...
    def warn(self, sentence: str) -> None: ...
    def step(self, done: float, total: float | None, unit: str = "steps", *, left: float | None = None, **fields: float | str) -> None: ...
    def table(self, columns: Sequence[str], rows: Sequence[Row], news: Sequence[str] = ()) -> None: ...


class Pace:
    """How long until a count reaches its total, from how fast it went so far."""

    def __init__(self, clock: Clock = time.monotonic):
        self._clock = clock
        self._first: tuple[float, float] | None = None
        self._last: tuple[float, float] = (0.0, 0.0)

    def at(self, done: float) -> None:
        """The count is `done` now; a count that fell starts over."""
        now = self._clock()
        if self._first is None or done < self._last[1]:
            self._first = (now, done)
        self._last = (now, done)

    def left(self, total: float | None) -> float | None:
        """Seconds until `total`, None while that can't be said."""
        if total is None or self._first is None or self._last[1] <= self._first[1]:
            return None
        then = self._last[0] + (total - self._last[1]) * (self._last[0] - self._first[0]) / (self._last[1] - self._first[1])
        return max(0.0, then - self._clock())


@dataclass(frozen=True)
class Now:
    """A stage at one moment. Frozen, so that the thread that draws needs no lock: it could wait for the drawer's own."""

    name: str
    began: float
    said: tuple[tuple[str, str], ...] = ()
    """Line and style of each."""
    done: float = 0.0
    total: float | None = None
    unit: str = ""
    figures: tuple[str, ...] = ()
    pace: Pace | None = None
    ends: float | None = None
    """When the stage will probably be done, where somebody said so."""
    columns: tuple[str, ...] = ()
    rows: tuple[Row, ...] = ()

    def count(self) -> str:
        of = f"/{figure(self.total)}" if self.total is not None else ""
        share = f" ({min(1.0, self.done / self.total):.0%})" if self.total else ""
        return f"{figure(self.done)}{of} {self.unit}{share}"

    def left(self, now: float) -> str:
        if self.done == self.total:
            return ""
        left = max(0.0, self.ends - now) if self.ends is not None else self.pace.left(self.total) if self.pace else None
        return f"{duration(left)} left" if left else ""  # nothing where it takes longer than was thought


class Stages:
    """What both displays know: the stage, when it began, its moving line and how long each stage took."""

    def __init__(self, clock: Clock = time.monotonic, *, owned: TextIO | None = None):
        self.timings: dict[str, float] = {}
        """Seconds that each stage took so far; a stage that came twice counts both times."""
        self._clock = clock
        self._owned = owned
        self._lock = threading.RLock()
        self._now: Now | None = None
        self._paces: dict[str, Pace] = {}

    def stage(self, name: str) -> None:
        with self._lock:
            self._end(finished=True)
            self._now = Now(clean(name), self._clock())
            self._paces = {}
            self._on_stage(self._now)

    def step(self, done: float, total: float | None, unit: str = "steps", *, left: float | None = None, **fields: float | str) -> None:
        with self._lock:
            if self._now is None:
                return
            pace = self._paces.setdefault(unit, Pace(self._clock))
            pace.at(done)
            # Text stands for itself, as in `412 examples/s`.
            figures = (
                clean(value) if isinstance(value, str) else f"{clean(name).replace('_', ' ')} {figure(value)}"
                for name, value in fields.items()
            )
            ends = self._clock() + left if left is not None else None
            self._now = replace(self._now, done=done, total=total, unit=clean(unit), figures=tuple(figures), pace=pace, ends=ends)
            self._on_step(self._now)

    def table(self, columns: Sequence[str], rows: Sequence[Row], news: Sequence[str] = ()) -> None:
        with self._lock:
            if self._now is not None:
                drawn = tuple((tuple(clean(cell) for cell in cells), style) for cells, style in rows)
                self._now = replace(self._now, columns=tuple(map(clean, columns)), rows=drawn)

    def close(self, *, finished: bool = True) -> None:
        """Ends the last stage; `finished` is false when it broke off. Nothing is shown afterwards."""
        with self._lock:
            self._end(finished=finished)
            self._mute()
            if self._owned is not None:
                self._owned.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(finished=kind is None)

    def _end(self, *, finished: bool) -> None:
        ended, self._now = self._now, None
        if ended is not None:
            seconds = self._clock() - ended.began
            self.timings[ended.name] = round(self.timings.get(ended.name, 0.0) + seconds, 3)
            self._on_end(ended, seconds, finished=finished)

    def _mute(self) -> None: ...
    def _on_stage(self, now: Now) -> None: ...
    def _on_step(self, now: Now) -> None: ...
    def _on_end(self, ended: Now, seconds: float, *, finished: bool) -> None: ...


class Plain(Stages):
    """One line after another, for files, pipes and logs: no control characters, a line at least every five seconds of
    work or tenth of the way, and one that says what it is at every `heartbeat` seconds of silence."""

    def __init__(self, stream: TextIO | None, *, clock: Clock = time.monotonic, heartbeat: float = 15.0, owned: TextIO | None = None):
        super().__init__(clock, owned=owned)
        self._stream = stream
        self._told = clock()
        self._tenth = -1
        self._stop = threading.Event()
        self._heartbeat = heartbeat
        self._thread: threading.Thread | None = None

    def say(self, sentence: str) -> None:
        with self._lock:
            for line in lines(sentence):
                self._write(f"  {line}" if self._now else line)

    def warn(self, sentence: str) -> None:
        self.say(f"warning: {sentence}")

    def table(self, columns: Sequence[str], rows: Sequence[Row], news: Sequence[str] = ()) -> None:
        for sentence in news:
            self.say(sentence)

    def close(self, *, finished: bool = True) -> None:
        self._stop.set()
        super().close(finished=finished)

    def _mute(self) -> None:
        self._stream = None

    def _on_stage(self, now: Now) -> None:
        self._tenth = -1
        self._write(now.name)
        if self._thread is None and self._stream is not None:
            self._thread = threading.Thread(target=self._beat, name="progress", daemon=True)
            self._thread.start()

    def _on_step(self, now: Now) -> None:
        tenth = int(10 * now.done / now.total) if now.total else self._tenth
        silent = self._clock() - self._told
        whole = now.total is not None and now.done >= now.total
        if self._tenth < 0 or silent >= 5 or whole or (tenth != self._tenth and silent >= 1):
            self._tenth = max(tenth, 0)
            self._write(f"  {now.name}: {', '.join(part for part in (now.count(), *now.figures, now.left(self._clock())) if part)}")

    def _on_end(self, ended: Now, seconds: float, *, finished: bool) -> None:
        self._write(f"{ended.name}: {'done in' if finished else 'stopped after'} {duration(seconds)}")

    def _beat(self) -> None:
        while not self._stop.wait(self._heartbeat / 4):
            with self._lock:
                now = self._now
                if now and not self._stop.is_set() and self._clock() - self._told >= self._heartbeat:
                    at = f", at {now.count()}" if now.unit else ""
                    self._write(f"  {now.name}: {duration(self._clock() - now.began)} so far{at}")

    def _write(self, line: str) -> None:
        self._told = self._clock()
        if self._stream is None:
            return
        try:
            self._stream.write(line + "\n")
            self._stream.flush()
        except (OSError, ValueError):  # nobody reads any more, as in `orchestrator run job.yaml | head`; the job goes on
            self._stream = None


def figure(value: float) -> str:
    """A number as people write it: 2,985 and 0.3127."""
    if isinstance(value, int) or (abs(value) >= 1000 and abs(value) != float("inf")):
        return f"{value:,.0f}"
    return f"{value:.4g}"


def duration(seconds: float) -> str:
    """2.1 s, 42 s, 3 min 12 s, 2 h 05 min."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def clean(text: str) -> str:
    """Data and libraries' messages may hold control characters, which would steer the terminal."""
    return "".join(character if character.isprintable() else " " for character in str(text))


def lines(sentence: str) -> list[str]:
    return [clean(line) for line in str(sentence).splitlines()] or [""]
