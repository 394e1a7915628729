"""Reads a request's body within limits and parses it, so that no body can hurt the server."""

from __future__ import annotations

import asyncio
import json
import re
import zlib
from typing import Any

from starlette.requests import Request

from serving.problem import Problem

MAX_DEPTH = 64
"""Levels of nesting in a JSON body."""
_INLINE_BYTES = 65_536
"""Larger bodies are parsed off the event loop."""
_STRING_OR_BRACKET = re.compile(r'"(?:[^"\\]|\\.?)*+(?:"|\Z)|[\[{\]}]', re.DOTALL)
"""A string that isn't closed ends with the text: so each character is looked at once, whatever the text."""


async def read(request: Request, max_bytes: int) -> bytes:
    """The body, unpacked where it is gzip or deflate; `Problem` 413 as soon as it is over `max_bytes`, packed or not."""
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and (len(declared) > 15 or int(declared) > max_bytes):
        raise _too_large(max_bytes)
    unpack = _unpacker(request.headers.get("content-encoding", "identity").strip().lower())
    content, packed = bytearray(), 0
    try:
        async for chunk in request.stream():
            packed += len(chunk)
            content += chunk if unpack is None else unpack.decompress(chunk, max_bytes + 1 - len(content))
            if packed > max_bytes or len(content) > max_bytes or (unpack is not None and unpack.unconsumed_tail):
                raise _too_large(max_bytes)
    except zlib.error:
        raise Problem(400, "validation", "The body is not what its Content-Encoding says.") from None
    if unpack is not None and not unpack.eof:
        raise Problem(400, "validation", "The body ends in the middle of its compressed data.")
    return bytes(content)


async def read_json(request: Request, max_bytes: int) -> Any:
    """The body as JSON: UTF-8, no NaN or Infinity, no more than `MAX_DEPTH` levels deep."""
    media_type, _, parameters = request.headers.get("content-type", "application/json").partition(";")
    media_type = media_type.strip().lower()
    if media_type != "application/json" and not (media_type.startswith("application/") and media_type.endswith("+json")):
        sentence = f"The Content-Type is {media_type[:80]!r}; send JSON with Content-Type: application/json."
        raise Problem(415, "validation", sentence, {"Accept": "application/json"})
    charset = parameters.lower().partition("charset=")[2].strip("\"' ")
    if charset not in ("", "utf-8", "utf8"):
        raise Problem(415, "validation", f"The charset is {charset[:40]!r}; send UTF-8.")
    content = await read(request, max_bytes)
    return parse(content) if len(content) <= _INLINE_BYTES else await asyncio.to_thread(parse, content)


def parse(content: bytes) -> Any:
    """`content` as JSON, or `Problem` 400 that says what is wrong and where."""
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise Problem(400, "validation", f"The body is not UTF-8 at byte {error.start}.") from None
    if not text.strip():
        raise Problem(400, "validation", 'The body is empty; send JSON such as {"inputs": …}.')
    if _depth_over(text, MAX_DEPTH):
        raise Problem(400, "validation", f"The body is nested more than {MAX_DEPTH} levels deep.")
    try:
        value = json.loads(text, parse_constant=_no_constant)
        _check_unicode(text, value)
    except json.JSONDecodeError as error:
        raise Problem(400, "validation", f"The body is not JSON: {error.msg} at line {error.lineno}, column {error.colno}.") from None
    except (ValueError, RecursionError) as error:
        sentence = str(error) if isinstance(error, _NotJson) else "it has a number with too many digits"
        raise Problem(400, "validation", f"The body is not usable JSON: {sentence}.") from None
    return value


class _NotJson(ValueError):
    pass


def _no_constant(name: str) -> None:
    raise _NotJson(f"{name} is not a JSON number")


def _depth_over(text: str, limit: int) -> bool:
    """Does a bracket stand more than `limit` deep? Counted before parsing, since a parser recurses; strings are skipped."""
    if text.count("[") + text.count("{") <= limit:
        return False
    depth = 0
    for token in _STRING_OR_BRACKET.finditer(text):
        first = text[token.start()]
        depth += (first in "[{") - (first in "]}")
        if depth > limit:
            return True
    return False


def _check_unicode(text: str, value: Any) -> None:
    """Refuses halves of surrogate pairs, which only an escape can bring in and no encoder can take."""
    if "\\ud" not in text and "\\uD" not in text:
        return
    pending = [value]
    while pending:
        item = pending.pop()
        if isinstance(item, str):
            try:
                item.encode()
            except UnicodeEncodeError:
                raise _NotJson("a string has half of a surrogate pair (\\ud800 to \\udfff alone)") from None
        elif isinstance(item, dict):
            pending += item.keys()
            pending += item.values()
        elif isinstance(item, list):
            pending += item


def _unpacker(encoding: str) -> Any:
    if encoding in ("", "identity"):
        return None
    if encoding in ("gzip", "x-gzip"):
        return zlib.decompressobj(zlib.MAX_WBITS | 16)
    if encoding == "deflate":
        return zlib.decompressobj()
    raise Problem(
        415, "validation", f"The Content-Encoding is {encoding[:40]!r}; send gzip, deflate or none.", {"Accept-Encoding": "gzip, deflate"}
    )


def _too_large(max_bytes: int) -> Problem:
    return Problem(413, "too_large", f"The body is over {max_bytes:,} bytes, the most this endpoint takes (serving.max_body_bytes).")
