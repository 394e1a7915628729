"""JSON from a stream: arrays and objects are entered, and what stands in them is decoded value by value."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from typing import Any

from orchestrator.config import DataSection
from orchestrator.data.encodings import bad_bytes, known_encoding, looks_like_utf16
from orchestrator.data.files import SourceFile
from orchestrator.errors import InputError

CHUNK = 1 << 16
VALUE_LIMIT = 1 << 25
"""Characters of one value that is decoded as a whole; longer ones are a mistake."""


def characters(file: SourceFile, section: DataSection) -> Iterator[str]:
    """The text of a file in pieces, whatever its lines: JSON often stands in a single one."""
    encoding = known_encoding(section.encoding)
    with file.open_stream() as stream:
        text = io.TextIOWrapper(stream, encoding="utf-8-sig" if encoding == "utf-8" else encoding, newline="")
        first = True
        try:
            while chunk := text.read(CHUNK):
                if first and "\0" in chunk and (guess := looks_like_utf16(chunk)):
                    raise InputError(f"{file.name} is not {section.encoding}: it looks like {guess}. Set data.encoding: {guess}.")
                first = False
                yield chunk
        except UnicodeDecodeError as error:
            raise bad_bytes(file, encoding, error) from None


class Cursor:
    """A place in a JSON text. What does not fit raises `InputError` with the line."""

    def __init__(self, file: SourceFile, section: DataSection):
        self._name, self._more = file.name, characters(file, section)
        self._buffer, self._at, self._line, self._ended = "", 0, 1, False
        self._decoder = json.JSONDecoder()

    def sign(self) -> str:
        """The next character that is no white space, not taken; empty at the end."""
        while True:
            while self._at < len(self._buffer):
                if not (found := self._buffer[self._at]).isspace():
                    return found
                self._take(1)
            if not self._read():
                return ""

    def take(self, wanted: str, what: str) -> str:
        """Takes the next sign, which must be one of `wanted`; `what` says in a sentence what that is."""
        found = self.sign()
        if not found or found not in wanted:
            raise InputError(f"{self._name}, line {self._line}: expected {what}, found {repr(found) if found else 'the end of the file'}.")
        self._take(1)
        return found

    def value(self) -> Any:
        """The next value, decoded and taken."""
        self.sign()
        while True:
            try:
                value, end = self._decoder.raw_decode(self._buffer, self._at)
            except json.JSONDecodeError as error:
                broken = error.pos < len(self._buffer) - 64 and not error.msg.startswith("Unterminated string")
                if broken or len(self._buffer) - self._at > VALUE_LIMIT or not self._read():
                    line = self._line + self._buffer.count("\n", self._at, error.pos)
                    raise InputError(f"{self._name}, line {line}: this is not JSON: {error.msg}.") from None
            else:
                if end == len(self._buffer) and self._read():  # A number may go on.
                    continue
                self._take(end - self._at)
                return value

    def members(self, what: str = "an object, {…}") -> Iterator[str]:
        """Enters an object: its keys, one by one. Whoever gets a key takes its value before asking for the next."""
        self.take("{", what)
        if self.sign() == "}":
            self.take("}", "'}'")
            return
        while True:
            if self.sign() != '"':
                self.take('"', "a key in quotes")
            key = self.value()
            self.take(":", "':' after a key")
            yield key
            if self.take(",}", "',' or '}' after a value of an object") == "}":
                return

    def items(self, what: str = "an array, […]") -> Iterator[int]:
        """Enters an array: the place of each of its values, from 0; each is taken before the next is asked for."""
        self.take("[", what)
        if self.sign() == "]":
            self.take("]", "']'")
            return
        place = 0
        while True:
            yield place
            place += 1
            if self.take(",]", "',' or ']' after a value of an array") == "]":
                return

    def _take(self, count: int) -> None:
        self._line += self._buffer.count("\n", self._at, self._at + count)
        self._at += count

    def _read(self) -> bool:
        """As much again as is waiting, so that a long value is decoded a few times only; False at the end of the text."""
        waiting = self._buffer[self._at :]
        parts, size = [waiting], 0
        while not self._ended and size < max(CHUNK, len(waiting)):
            chunk = next(self._more, "")
            self._ended = not chunk
            parts.append(chunk)
            size += len(chunk)
        self._buffer, self._at = "".join(parts), 0
        return size > 0
