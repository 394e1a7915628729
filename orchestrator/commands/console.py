"""What every command does alike: its display, its result as JSON, and how an error becomes a sentence and an exit status."""

from __future__ import annotations

import contextlib
import errno
import json as jsons
import math
import os
import sys
import tempfile
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from orchestrator.errors import InputError, StageError
from orchestrator.progress import clean
from orchestrator.terminal import display

if TYPE_CHECKING:
    from orchestrator.doctor import Check

DONE, FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130


class Refused(InputError):
    """What is wrong, with what `--json` says of it beside the sentence."""

    def __init__(self, sentence: str, **details: Any):
        super().__init__(sentence)
        self.details = details


class Output:
    """Where a command's words and its result go."""

    def __init__(self, *, verbose: bool, json: bool):
        self.verbose, self.json = verbose, json
        self.display = display(verbose=verbose, json=json)
        self.log_dir: Path | None = None
        """Where the traceback of an unexpected error is written; None: a temporary file."""

    @property
    def human(self) -> TextIO | None:
        return sys.stderr if self.json else sys.stdout

    def text(self, text: str) -> None:
        """Lines for people."""
        _write(self.human, text)

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[str]], styles: Sequence[str] | None = None) -> None:
        """A table for people; `styles` gives each row's colour."""
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        stream = self.human
        if stream is None:
            return
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
        for column in columns:
            table.add_column(column, overflow="fold")
        for row, style in zip(rows, styles or [""] * len(rows), strict=True):
            table.add_row(*(Text("\n".join(clean(line) for line in cell.splitlines())) for cell in row), style=style)
        width = None if stream.isatty() else 1000
        Console(file=stream, width=width, highlight=False).print(table)

    def result(self, result: dict[str, Any]) -> None:
        """With `--json`, the last line of standard output."""
        if self.json:
            _write(sys.stdout, jsons.dumps(finite(result), allow_nan=False))


@contextlib.contextmanager
def command(*, verbose: bool = False, json: bool = False) -> Iterator[Output]:
    """The body of a command: closes the display, and ends the process with a sentence and a status on an error."""
    output = Output(verbose=verbose, json=json)
    with errors_to_exit_status(output), output.display:
        yield output


@contextlib.contextmanager
def errors_to_exit_status(output: Output | None = None, *, verbose: bool = False, json: bool = False) -> Iterator[None]:
    """Raises `SystemExit`: 2 for an `InputError`, 130 on Ctrl-C, 1 for anything else, and says the sentence last."""
    verbose, json = (output.verbose, output.json) if output else (verbose, json)
    try:
        yield
    except Exception as error:  # noqa: BLE001 - the one place where an error ends; nothing is swallowed, it sets the exit status
        cause = root_cause(error)
        if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT):
            cause = InputError(
                f"storage: the disk is full{f' at {cause.filename}' if cause.filename else ''}. Free some room, or give another --storage."
            )
        sentence = str(cause) if isinstance(cause, (InputError, StageError)) else f"{type(cause).__name__}: {_first_line(cause)}"
        failed: dict[str, Any] = {"status": "failed", "error": sentence, "error_type": type(cause).__name__}
        if isinstance(cause, Refused):
            failed |= cause.details
        if verbose:
            _write(sys.stderr, "".join(traceback.format_exception(error)))
        elif not isinstance(cause, (InputError, StageError)):
            failed["traceback"] = str(_keep_traceback(error, output.log_dir if output else None))
            _write(sys.stderr, f"The traceback is in {failed['traceback']}; -v shows it here.")
        _say_error(sentence)
        if json:
            _write(sys.stdout, jsons.dumps(failed))
        raise SystemExit(BAD_INPUT if isinstance(cause, InputError) else FAILED) from None
    except KeyboardInterrupt:
        _say_error("Interrupted. Nothing that was done is lost: the same command goes on from there.")
        if json:
            _write(sys.stdout, jsons.dumps({"status": "interrupted", "error": "Interrupted.", "error_type": "KeyboardInterrupt"}))
        raise SystemExit(INTERRUPTED) from None


def root_cause(error: BaseException) -> BaseException:
    """What a person should be told: the first `InputError` or `StageError` on the way down, else the innermost error.

    Ray hands errors over wrapped, with the original in `cause`; the wrapper may be an instance of both classes, and its text is
    a traceback.
    """
    chain: list[BaseException] = []
    while error not in chain:
        chain.append(error)
        inner = getattr(error, "cause", None)
        below = (
            inner if isinstance(inner, BaseException) else error.__cause__ or (None if error.__suppress_context__ else error.__context__)
        )
        error = below if below is not None else error
    spoken = (
        link for link in chain if isinstance(link, (InputError, StageError)) and not isinstance(getattr(link, "cause", None), BaseException)
    )
    return next(spoken, chain[-1])


def show_checks(output: Output, checks: Sequence[Check]) -> None:
    """A table of what was looked at, what didn't pass in red; a check whose `ok` is None could not be made."""
    marks = {True: ("ok", ""), False: ("wrong", "red"), None: ("unknown", "yellow")}
    rows = [[check.name, marks[check.ok][0], "\n".join(filter(None, (check.sentence, check.fix)))] for check in checks]
    output.table(["checked", "", "found"], rows, [marks[check.ok][1] for check in checks])


def show_tokens(output: Output, views: Sequence[Sequence[tuple[str, bool]]]) -> None:
    """Rows as the model reads them: tokens that count in the loss are green on a terminal, and stand in «…» with | between them."""
    from itertools import groupby

    stream = output.human
    colour = stream is not None and stream.isatty() and not os.environ.get("NO_COLOR")
    for number, view in enumerate(views, 1):
        counted = sum(counts for _, counts in view)
        output.text(f"\nrow {number}: {len(view):,} tokens, {counted:,} of them count in the loss")
        parts = []
        for counts, tokens in groupby(view, key=lambda token: token[1]):
            shown = [clean(text.replace("\r", "␍").replace("\n", "⏎")) for text, _ in tokens]
            text = f"«{'|'.join(shown)}»" if counts else "".join(shown)
            parts.append(f"\x1b[{'32' if counts else '2'}m{text}\x1b[0m" if colour else text)
        output.text("".join(parts))


def check_json(check: Check) -> dict[str, Any]:
    return {"name": check.name, "ok": check.ok, "sentence": check.sentence, "fix": check.fix}


def finite(value: Any) -> Any:
    """`value` with None for what JSON can't say: NaN and infinities."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _first_line(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[0].strip() if lines else "no message"


def _say_error(sentence: str) -> None:
    colour = sys.stderr is not None and sys.stderr.isatty() and not os.environ.get("NO_COLOR")
    text = "error: " + "\n".join(clean(line) for line in sentence.splitlines())
    _write(sys.stderr, f"\x1b[31m{text}\x1b[0m" if colour else text)


def _keep_traceback(error: BaseException, folder: Path | None) -> Path:
    text = "".join(traceback.format_exception(error))
    if folder is not None and folder.is_dir():
        place = folder / "traceback.txt"
        place.write_text(text, encoding="utf-8")
        return place
    with tempfile.NamedTemporaryFile("w", prefix="orchestrator-", suffix=".txt", delete=False, encoding="utf-8") as file:
        file.write(text)
    return Path(file.name)


def _write(stream: TextIO | None, text: str) -> None:
    if stream is None:
        return
    try:
        stream.write(text.rstrip("\n") + "\n")
        stream.flush()
    except OSError:
        # Nobody reads any more, as in `orchestrator models list | head -1`. Python would complain again when it exits.
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
