"""The display on a terminal, drawn with Rich, and the choice between it and plain lines."""

from __future__ import annotations

import io
import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any, TextIO

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.padding import Padding
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from orchestrator.progress import Clock, Now, Plain, Stages, duration, lines


def display(*, verbose: bool = False, json: bool = False) -> Plain | Terminal:
    """The display that fits where the output goes, a context manager: closing it ends the last stage.

    With `json` it writes to standard error, because the last line of standard output is the result. With `verbose` it
    is plain even on a terminal: moving lines and the libraries' own output would write over each other.
    """
    stream: TextIO | None = sys.stderr if json else sys.stdout
    terminal = stream is not None and not stream.closed and stream.isatty() and os.environ.get("TERM") != "dumb"
    own = _own(stream)
    owned = own if own is not stream else None
    return Terminal(own, owned=owned) if terminal and not verbose else Plain(own, owned=owned)


class Terminal(Stages):
    """The current stage as a block that moves; a stage that ended stays above it with a tick and its seconds."""

    def __init__(self, stream: TextIO | None, *, clock: Clock = time.monotonic, owned: TextIO | None = None, **console: Any):
        super().__init__(clock, owned=owned)

        class Quiet(Console):
            def on_broken_pipe(self) -> None:
                self.quiet = True

        self._console = Quiet(file=stream, highlight=False, **console)
        self._spinner = Spinner("dots", style="cyan")
        self._first: Now | None = None
        self._live = Live(
            get_renderable=self._block,
            console=self._console,
            refresh_per_second=8,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
        )

    def say(self, sentence: str) -> None:
        self._add(sentence, "")

    def warn(self, sentence: str) -> None:
        self._add(f"warning: {sentence}", "yellow")

    def _add(self, sentence: str, style: str) -> None:
        with self._lock:
            said = tuple((line, style) for line in lines(sentence))
            if self._now:
                self._now = replace(self._now, said=self._now.said + said)
            else:
                self._safely(self._console.print, *(Text(line, style=style) for line, _ in said), sep="\n")

    def _mute(self) -> None:
        self._console.quiet = True

    def _on_stage(self, now: Now) -> None:
        self._first = None
        self._safely(self._live.start)

    def _on_step(self, now: Now) -> None:
        if self._first is None or self._first.unit == now.unit:  # what a stage counts first is what it is about
            self._first = now

    def _on_end(self, ended: Now, seconds: float, *, finished: bool) -> None:
        head = Text.assemble(
            ("✓ ", "green") if finished else ("✗ ", "red"), (f"{ended.name:<12}", "bold"), (f" {duration(seconds)}", "dim")
        )
        block = [head, *_indented(ended.said)]
        if self._first:
            block.append(Text("    " + " · ".join([self._first.count(), *self._first.figures]), style="dim"))
        if ended.rows:
            block.append(_table(ended, len(ended.rows)))
        self._safely(self._live.stop)
        self._safely(self._console.print, *block, sep="\n")

    def _block(self) -> RenderableType:
        now = self._now
        if now is None:
            return Text("")
        head = Table.grid(padding=(0, 1))
        head.add_row(self._spinner, Text(f"{now.name:<12}", style="bold"), Text(duration(self._clock() - now.began), style="dim"))
        room = max(3, self._console.height - 6)
        rows = min(len(now.rows), max(1, room - 6))
        block: list[RenderableType] = [head, *_indented(now.said[-max(3, room - (rows + 2 if rows else 0)) :])]
        if now.unit:
            moving = Table.grid(padding=(0, 1))
            where = Text(" · ".join(part for part in (now.count(), now.left(self._clock())) if part), no_wrap=True)
            bar = ProgressBar(total=now.total, completed=now.done, width=max(10, min(40, self._console.width - 48)))
            moving.add_row(Text("   "), bar, where)
            block.append(moving)
        if now.figures:
            block.append(Text("    " + " · ".join(now.figures), style="cyan", no_wrap=True, overflow="ellipsis"))
        if rows:
            block.append(_table(now, rows))
        return Group(*block)

    def _safely(self, write: Callable[..., Any], *args: Any, **options: Any) -> None:
        try:
            write(*args, **options)
        except (OSError, ValueError):  # the terminal is gone; the job goes on
            self._console.quiet = True


def _table(now: Now, rows: int) -> RenderableType:
    """The first `rows` rows, a line each, cut where the terminal is too narrow; only the names of columns may take more lines."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for place, column in enumerate(now.columns):
        name = column.replace("_", " ")
        short = all(len(cells[place]) <= 8 for cells, _ in now.rows)  # where room is missing, long cells are cut first
        table.add_column(Text(name), vertical="bottom", no_wrap=short and " " not in name, max_width=24)
    for cells, style in now.rows[:rows]:
        table.add_row(*(Text(cell, no_wrap=True, overflow="ellipsis") for cell in cells), style=style)
    return Padding(table, (0, 0, 0, 4))


def _indented(said: tuple[tuple[str, str], ...]) -> list[Any]:
    return [Padding(Text(line, style=style), (0, 0, 0, 4)) for line, style in said]


def _own(stream: TextIO | None) -> TextIO | None:
    """A copy of `stream` of our own, so that sending standard output to a log file doesn't take the display along.

    Unbuffered: a reader that went away is noticed at the line, not when Python exits.
    """
    if stream is None:
        return None
    try:
        copy = os.dup(stream.fileno())
    except (OSError, ValueError):  # not a real file, for example captured in a test
        return stream
    return io.TextIOWrapper(io.FileIO(copy, "w"), encoding=stream.encoding, errors="replace", write_through=True)
