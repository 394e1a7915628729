"""Sounds: what a sound in a cell is, and sounds as samples, for every task that hears.

A sound in a clean row is a text: a path or URI, or all of it as a `data:audio/…;base64,…` URI. So rows are JSON and
long recordings stay where they are until they are encoded.
"""

from __future__ import annotations

import base64
import binascii
import io
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, BinaryIO

from orchestrator.errors import InputError
from orchestrator.storage import Folder
from orchestrator.tasks.base import BASE64_FILE, RowError
from orchestrator.tasks.labels import missing

if TYPE_CHECKING:
    import numpy as np

BLOCK = 1 << 22
"""Samples, of all channels, that are read at once: a small file may hold hours of many channels."""
SHORTEST_S = 0.1
"""What is shorter is lengthened by silence to this: models see nothing in a few samples."""
EXPECTED = "a sound that can be read (wav, flac, mp3 or ogg)"

_DATA_URI = re.compile(r"data:(?:audio/[\w.+-]+|application/octet-stream)?(?:;[\w.+-]+=[^;,]*)*;base64,", re.ASCII | re.IGNORECASE)
_CUT_OFF = re.compile(r"^\s*data\s*: (\d+) \(should be (\d+)\)", re.MULTILINE)
"""In what libsndfile says of a wav file: bytes of samples by its header, and those that are there."""
_UNKNOWN_SIZE = 0x7FFFF000
"""From this on a header's size means that the program that wrote it did not know how much would follow."""
_TYPES = {"WAVEX": "wav", "OGG": "ogg", "MP3": "mpeg"}


def clean(column: str, value: Any, *, longest_s: float, used_s: float | None = None) -> str:
    """The canonical form of a sound in a cell: a path, URI, bytes, `data:` URI, base64, or what `datasets` writes.

    `RowError` where it can't be read to the end (of the first `used_s` seconds; None: all), is empty, or is longer than `longest_s`.
    """
    sound = _canonical(column, value)
    with opened(column, sound) as file:
        _check_length(column, file, longest_s)
        said = _frames_said(file)
        wanted = said if used_s is None else min(said, round(used_s * file.samplerate))
        found = sum(len(samples) for samples in _blocks(column, sound, file, wanted))
        if found < wanted and file.format != "MP3":  # Whose header does not say how long it is.
            raise RowError(
                column, EXPECTED, f"{shown(sound)}, which ends {(wanted - found) / file.samplerate:.1f} s before its header says"
            )
    return sound


def from_client(column: str, value: Any, *, longest_s: float) -> str:
    """The canonical form of what a client sent: bytes, base64 or a `data:` URI. A path or URL is not opened, whatever it names.

    Only the header is read here, which is cheap; `InputError` where the value is no sound at all, raised from a `RowError`
    where it is one that can't be used.
    """
    if not isinstance(value, (bytes, str)) or not value:
        raise InputError(f"it is {_kind(value)}; it must be a sound: the body itself, or a text in base64.")
    try:
        content = value if isinstance(value, bytes) else _from_base64(column, value)
        sound = _data_uri(column, content)
        with opened(column, sound) as file:
            _check_length(column, file, longest_s)
    except RowError as error:
        raise InputError(f"expected {error.expected}, found {error.found}.") from error
    return sound


def several_from_client(column: str, inputs: Any, *, longest_s: float) -> list[str]:
    """The sounds in the `inputs` of a request: one, or a list of them; `InputError` as `from_client`, saying which."""
    if isinstance(inputs, list) and not inputs:
        raise InputError("`inputs` is an empty list; give at least one sound.")
    found = []
    for place, value in enumerate(inputs if isinstance(inputs, list) else [inputs]):
        where = f"inputs[{place}]" if isinstance(inputs, list) else "inputs"
        try:
            found.append(from_client(column, value, longest_s=longest_s))
        except InputError as error:
            raise InputError(f"`{where}`: {error}") from error.__cause__
    return found


def inputs_schema() -> dict[str, Any]:
    """JSON Schema of `inputs`: a sound as base64, or a list of them."""
    sound = {
        "type": "string",
        "minLength": 1,
        "description": "a wav, flac, mp3 or ogg file in base64; the body of a request may also be the file",
    }
    return {"anyOf": [sound, {"type": "array", "items": sound, "minItems": 1}]}


def load(column: str, sound: str, rate: int, *, start_s: float = 0.0, most_s: float | None = None) -> np.ndarray:
    """Samples of a clean sound, float32 at `rate` per second, channels mixed; from `start_s` on, at most `most_s` seconds."""
    import numpy as np
    import soxr

    with opened(column, sound) as file:
        file.seek(min(file.frames, round(start_s * file.samplerate)))
        wanted = file.frames - file.tell()
        blocks = _blocks(column, sound, file, wanted if most_s is None else min(wanted, round(most_s * file.samplerate)))
        if file.samplerate == rate:
            parts = list(blocks)
        else:
            stream = soxr.ResampleStream(file.samplerate, rate, 1, dtype="float32")
            parts = [stream.resample_chunk(block) for block in blocks]
            parts.append(stream.resample_chunk(np.zeros(0, dtype=np.float32), last=True))
    samples = np.concatenate([np.zeros(0, dtype=np.float32), *parts])
    shortest = round(SHORTEST_S * rate)
    return samples if len(samples) >= shortest else np.pad(samples, (0, shortest - len(samples)))


def seconds(column: str, sound: str) -> float:
    """How long a sound lasts, by its header."""
    with opened(column, sound) as file:
        return file.frames / file.samplerate


def self_contained(column: str, sound: str) -> str:
    """The sound with all of it in the text."""
    return sound if sound.startswith("data:") else _data_uri(column, _content(column, sound))


def to_base64(column: str, sound: str) -> str:
    """What a client sends for this sound."""
    return self_contained(column, sound).partition(",")[2]


def example() -> str:
    """A short tone as base64: a sound that every model takes."""
    import math
    import wave

    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(1)
        file.setframerate(8000)
        file.writeframes(bytes(128 + round(80 * math.sin(2 * math.pi * 440 * place / 8000)) for place in range(1000)))
    return base64.b64encode(buffer.getvalue()).decode()


def shown(sound: str) -> str:
    """A sound in a sentence: its path, or what kind of data it is."""
    if not sound.startswith("data:"):
        return repr(sound)
    head, _, content = sound.partition(",")
    return f"{head.removeprefix('data:').partition(';')[0]} of {len(content) * 3 // 4:,} bytes"


@contextmanager
def opened(column: str, sound: str) -> Iterator[Any]:
    """A `soundfile.SoundFile` of a clean sound; `RowError` where there is none."""
    import soundfile

    with _stream(column, sound) as stream:
        try:
            file = soundfile.SoundFile(stream)
        except (soundfile.LibsndfileError, TypeError, ValueError) as error:
            raise RowError(column, EXPECTED, f"{shown(sound)} ({_reason(error)})") from None
        with file:
            try:
                yield file
            except (soundfile.LibsndfileError, OSError) as error:  # It begins as a sound does, and breaks off or is damaged.
                raise RowError(column, EXPECTED, f"{shown(sound)} ({_reason(error)})") from None


# ---- what stands in a cell -----------------------------------------------------------------------------------
def _canonical(column: str, value: Any) -> str:
    if missing(value) or value in ("", b""):
        raise RowError(column, "a sound", value)
    if isinstance(value, dict):
        if value.get("bytes") is not None:
            return _canonical(column, value["bytes"])
        if value.get("array") is not None:
            return _of_samples(column, value["array"], value.get("sampling_rate"))
        return _canonical(column, value.get("path"))
    if isinstance(value, (bytes, bytearray, memoryview)):
        return _data_uri(column, bytes(value))
    if not isinstance(value, str):
        raise RowError(column, "a sound: a path, bytes, base64, or {bytes, path} or {array, sampling_rate} of `datasets`", repr(value)[:80])
    if value.startswith("{") and value.endswith("}"):  # A reader made JSON of a column that holds several kinds.
        try:
            return _canonical(column, json.loads(value))
        except json.JSONDecodeError:
            pass
    if value[:5].lower() == "data:" or BASE64_FILE.fullmatch(value):
        return _data_uri(column, _from_base64(column, value))
    return value


def _from_base64(column: str, text: str) -> bytes:
    head = _DATA_URI.match(text)
    if head is None and text[:5].lower() == "data:":
        raise RowError(column, "a sound such as data:audio/wav;base64,…", f"{text[:40]}…")
    try:
        content = base64.b64decode("".join(text[head.end() if head else 0 :].split()), validate=True)
    except (binascii.Error, ValueError):
        raise RowError(column, "a sound as base64 (the endpoint opens no path or URL)", f"{text[:40]!a}…") from None
    if not content:
        raise RowError(column, "a sound that is not empty", "no bytes")
    return content


def _data_uri(column: str, content: bytes) -> str:
    """By what the content is, whatever it was called: so the same sound is the same text."""
    import soundfile

    try:
        with soundfile.SoundFile(io.BytesIO(content)) as file:
            kind = _TYPES.get(file.format, file.format.lower())
    except (soundfile.LibsndfileError, TypeError, ValueError) as error:
        raise RowError(column, EXPECTED, f"{len(content):,} bytes ({_reason(error)})") from None
    return f"data:audio/{kind};base64,{base64.b64encode(content).decode()}"


def _of_samples(column: str, array: Any, rate: Any) -> str:
    """Samples between -1 and 1, of one channel or (channels, samples), as a wav file of 16 bits."""
    import numpy as np
    import soundfile

    if not isinstance(rate, (int, float)) or isinstance(rate, bool) or not 1 <= rate <= 1_000_000:
        raise RowError(column, "a sampling_rate in hertz beside the array", rate)
    try:
        samples: np.ndarray = np.asarray(array, dtype=np.float32)
    except (TypeError, ValueError):
        raise RowError(column, "an array of numbers", repr(array)[:80]) from None
    if not samples.size:
        raise RowError(column, "a sound that is not empty", "an array of no samples")
    if samples.ndim > 2 or not np.isfinite(samples).all():
        raise RowError(column, "an array of finite numbers, of one channel or (channels, samples)", f"shape {samples.shape}")
    buffer = io.BytesIO()
    if samples.ndim == 2 and samples.shape[0] < samples.shape[1]:
        samples = samples.T
    soundfile.write(buffer, samples, round(rate), format="WAV", subtype="PCM_16")
    return _data_uri(column, buffer.getvalue())


def _kind(value: Any) -> str:
    if value in ("", b""):
        return "empty"
    return {list: "a list", dict: "an object", bool: "a boolean", type(None): "null"}.get(type(value), "a number")


# ---- files ---------------------------------------------------------------------------------------------------
@contextmanager
def _stream(column: str, sound: str) -> Iterator[BinaryIO]:
    if sound.startswith("data:"):
        yield io.BytesIO(base64.b64decode(sound.partition(",")[2]))
        return
    try:
        place = Folder(sound)
        file = place.filesystem.open_input_file(place.path)
    except FileNotFoundError:
        raise RowError(column, "the path of a sound file that is there", sound) from None
    except (OSError, ValueError) as error:
        raise RowError(column, "the path or URI of a sound file that can be opened", f"{sound} ({_reason(error)})") from None
    with file:
        yield file


def _content(column: str, sound: str) -> bytes:
    with _stream(column, sound) as stream:
        return stream.read()


def _blocks(column: str, sound: str, file: Any, frames: int) -> Iterator[np.ndarray]:
    """The next `frames` of a file, or fewer where it ends: float32, channels mixed, a block after the other."""
    import numpy as np

    most = max(1, BLOCK // file.channels)
    while frames > 0:
        samples = file.read(min(frames, most), dtype="float32", always_2d=True).mean(axis=1)
        if not len(samples):
            return
        if not np.isfinite(samples).all():
            raise RowError(column, "a sound of finite numbers", f"{shown(sound)}, which has NaN or infinite samples")
        frames -= len(samples)
        yield samples


def _check_length(column: str, file: Any, longest_s: float) -> None:
    if file.frames <= 0:
        raise RowError(column, "a sound that is not empty", "a file without samples")
    length = file.frames / file.samplerate
    if length > longest_s:
        raise RowError(column, f"a sound of at most {longest_s:g} s", f"one of {length:,.1f} s")


def _frames_said(file: Any) -> int:
    """How many frames a file has by its header; of a wav file that was cut off libsndfile counts those that are left."""
    found = _CUT_OFF.search(file.extra_info)
    said, left = (int(found[1]), int(found[2])) if found else (0, 0)
    return round(file.frames * said / left) if left and left < said < _UNKNOWN_SIZE else file.frames


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split()).rpartition(": ")[2] if "Error opening" in str(error) else " ".join(str(error).split())
    return text.rstrip(".")[:120] or type(error).__name__


def windows(samples: np.ndarray, rate: int, length_s: float, overlap_s: float) -> Sequence[tuple[float, np.ndarray]]:
    """(start in seconds, samples) of pieces of at most `length_s` that cover a sound, each overlapping the one before by `overlap_s`.

    A sound that fits is one piece; the last one is as long as is left, and never lies within the one before.
    """
    length, step = round(length_s * rate), round((length_s - overlap_s) * rate)
    count = 1 + max(0, -(-(len(samples) - length) // step))
    return [(place * step / rate, samples[place * step : place * step + length]) for place in range(count)]
