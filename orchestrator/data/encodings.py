"""Text that is not in the encoding it was said to be: which byte, where, and what it probably is."""

from __future__ import annotations

import codecs
import io
import re

from orchestrator.data.files import SourceFile
from orchestrator.errors import InputError, did_you_mean

COMMON = ("utf-8", "utf-16", "cp1252", "latin-1", "gb18030", "big5", "shift_jis", "euc_kr", "cp1251")


def known_encoding(name: str) -> str:
    """Python's name of a text encoding; `InputError` where there is none of that name."""
    try:
        codec = codecs.lookup(name)
        "".encode(name)
    except LookupError:
        raise InputError(f"data.encoding: there is no text encoding {name!r}.{did_you_mean(name, COMMON)}") from None
    return codec.name


def looks_like_utf16(line: str) -> str | None:
    """UTF-16 of Latin text has a NUL beside each letter, and is valid UTF-8."""
    if 3 * line.count("\0") < len(line):
        return None
    return "utf-16-be" if line.startswith("\0") else "utf-16-le"


def bad_bytes(file: SourceFile, encoding: str, error: UnicodeDecodeError) -> InputError:
    """The sentence for a file that can't be decoded; reads it again up to the first wrong byte."""
    decoder = codecs.getincrementaldecoder(encoding)()
    one_line_end = io.IncrementalNewlineDecoder(decoder, translate=True)
    offset, line, sample = 0, 1, b""
    with file.open_stream() as stream:
        while True:
            chunk = stream.read(1 << 20)
            try:
                line += one_line_end.decode(chunk, final=not chunk).count("\n")
            except UnicodeDecodeError as problem:
                # `object` also holds what was kept of the chunk before.
                begin = offset - (len(problem.object) - len(chunk))
                before = problem.object[: problem.start].decode(encoding, errors="replace")
                line += len(re.findall("\r\n|\r|\n", before))
                return _sentence(file, encoding, begin + problem.start, line, problem, sample)
            if not chunk:
                break
            sample = sample or chunk[:4]
            offset += len(chunk)
    return InputError(f"{file.name}: not {encoding}: {error.reason}.")


def _sentence(file: SourceFile, encoding: str, offset: int, line: int, problem: UnicodeDecodeError, begin: bytes) -> InputError:
    wrong = problem.object[problem.start : problem.start + 1]
    guess = _guess(begin or problem.object[:4], problem.object, problem.start)
    unpacked = " (of the unpacked content)" if file.compression else ""
    advice = (
        f"It looks like {guess}: set data.encoding: {guess}, or save the file as UTF-8."
        if guess
        else "Say the file's encoding with data.encoding."
    )
    return InputError(
        f"{file.name}, line {line}: byte 0x{wrong.hex().upper()} at offset {offset:,}{unpacked} is not valid {encoding}. {advice}"
    )


def _guess(begin: bytes, data: bytes, place: int) -> str | None:
    """By the byte order mark, by how bytes beyond ASCII stand together, and then by what charset_normalizer finds."""
    if begin.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    sample = data[max(0, place - (1 << 15)) : place + (1 << 15)]
    runs = re.findall(rb"[\x80-\xff]+", sample)
    if not runs:
        return None
    if 5 * sample.count(0) > len(sample):
        return "utf-16-le" if sample[1:2] == b"\0" else "utf-16-be"
    if sum(map(len, runs)) < 2 * len(runs):
        # Single letters among ASCII: a Western European text.
        return "cp1252"
    import charset_normalizer

    best = charset_normalizer.from_bytes(sample).best()
    return best.encoding if best is not None and not best.encoding.startswith("utf_8") else None
