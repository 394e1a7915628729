"""Images: what an image in a cell is, images as pixels, and what a client may send, for every task that reads them.

In a row an image is one string: a path or URI, which stays a reference until it is encoded, or a `data:` URI with the
file's bytes in it. Whatever a client sends becomes a `data:` URI: nothing that a client names is ever opened.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from orchestrator.errors import InputError
from orchestrator.storage import Folder
from orchestrator.tasks.base import Example, Row, RowError

if TYPE_CHECKING:
    import numpy as np
    import torch
    from PIL import Image

MOST_PIXELS = 64_000_000
"""Of one image; what claims more is refused before it is decoded, since a file of kilobytes can claim gigabytes."""
PATCH = 16 * 16
"""Pixels that count as one token of a token budget, as in the patches of a ViT."""
FORMATS = ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF")
"""What is decoded (MPO, of some cameras, is opened as JPEG); Pillow knows more, some of which run other programs."""
BASE64 = r"[A-Za-z0-9+/\s]+={0,2}\s*"
_DATA = re.compile(r"data:[\w.+-]*/?[\w.+-]*(?:;[\w=-]+)*;base64,", re.IGNORECASE)
_MAGIC = {
    b"\x89PNG\r\n\x1a\n": "image/png",
    b"\xff\xd8\xff": "image/jpeg",
    b"GIF8": "image/gif",
    b"RIFF": "image/webp",
    b"BM": "image/bmp",
    b"II*\0": "image/tiff",
    b"MM\0*": "image/tiff",
    b"II+\0": "image/tiff",
    b"MM\0+": "image/tiff",
}
_EXPECTED = "an image (PNG, JPEG, GIF, WebP, BMP or TIFF)"
_NO_PIXELS = {"do_rescale": False, "do_normalize": False, "do_pad": False, "do_flip_channel_order": False, "include_top": False}
_NO_GEOMETRY = {"do_resize": False, "do_center_crop": False, "do_convert_rgb": False, "do_pad": False}
"""A processor is called twice: to resize, when an image is encoded, and for the numbers, when it is collated."""


# ---- in a row ------------------------------------------------------------------------------------------------
def clean_image(column: str, value: Any) -> tuple[str, tuple[int, int]]:
    """The canonical string of the image in a cell, and its width and height as it is shown; `RowError` for what is none.

    Takes a path or URI, bytes, what `datasets` writes ({bytes, path}), a `data:` URI or base64. The file is read and decoded
    once here, so that a broken one is told of before training.
    """
    if isinstance(value, Mapping):
        value = value.get("bytes") if value.get("bytes") is not None else value.get("path")
    if isinstance(value, str) and value.strip() and not _DATA.match(value) and (inside := _from_base64(value)) and _kind(inside):
        value = inside
    if isinstance(value, (bytes, bytearray, memoryview)):
        value = data_uri(bytes(value))
    if not isinstance(value, str) or not value.strip():
        raise RowError(column, f"{_EXPECTED}: a path, bytes, a data: URI or base64", value)
    shown = value if len(value) <= 200 else f"{value[:40]}… ({len(value):,} characters)"
    try:
        content = read(value)
    except FileNotFoundError:
        raise RowError(column, "the path of an image that is there", shown) from None
    except (OSError, ValueError) as error:
        raise RowError(column, f"{_EXPECTED} that can be read", f"{shown} ({_sentence(error)})") from None
    try:
        shape = size(content)
    except ValueError as error:
        raise RowError(column, _EXPECTED, f"{shown} ({error})") from None
    return data_uri(content) if _DATA.match(value) else value, shape


def read(image: str) -> bytes:
    """The bytes of a row's image. `OSError` or `ValueError` (`InputError` among them) where they can't be had."""
    if data := _DATA.match(image):
        content = _from_base64(image[data.end() :])
        if content is None:
            raise ValueError("what follows `base64,` is not base64")
        return content
    if image.startswith("data:"):
        raise ValueError("a data: URI must be of the form data:image/png;base64,…")
    return Folder(image).read_bytes()


def decode(content: bytes) -> Image.Image:
    """The first picture in `content`, turned as its EXIF says; `ValueError` for what is none, torn or too large."""
    from PIL import ImageOps

    with _decoding():
        image = _opened(content)
        image.load()
        return ImageOps.exif_transpose(image)


def size(content: bytes) -> tuple[int, int]:
    """Width and height as `decode` gives them, and its errors; a JPEG is read through but decoded at an eighth of its size."""
    from PIL import ExifTags, ImageOps

    with _decoding():
        image = _opened(content)
        if image.format not in ("JPEG", "MPO"):
            image.load()
            return ImageOps.exif_transpose(image).size
        width, height = image.size
        turned = image.getexif().get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
        image.draft(None, (1, 1))
        image.load()
        return (height, width) if turned else (width, height)


def _opened(content: bytes) -> Image.Image:
    import io

    from PIL import Image

    if _kind(content) is None:
        raise ValueError("no picture in it")
    image = Image.open(io.BytesIO(content), formats=FORMATS)
    if image.width * image.height > MOST_PIXELS:
        raise ValueError(f"{image.width:,} x {image.height:,} pixels, more than the {MOST_PIXELS:,} that an image may have")
    return image


@contextmanager
def _decoding() -> Iterator[None]:
    """What Pillow's decoders raise, which is nearly anything on bytes that are not what they say, becomes a `ValueError`."""
    from PIL import Image

    try:
        yield
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise ValueError(f"more than the {MOST_PIXELS:,} pixels that an image may have") from None
    except Image.UnidentifiedImageError:
        raise ValueError("it can't be decoded") from None
    except Exception as error:  # noqa: BLE001
        raise ValueError(_sentence(error)) from None


def data_uri(content: bytes) -> str:
    """The one `data:` URI of these bytes: their type by how they begin, base64 without line ends."""
    return f"data:{_kind(content) or 'application/octet-stream'};base64,{base64.b64encode(content).decode()}"


def self_contained(image: str) -> str:
    """The image with its bytes in it."""
    return image if _DATA.match(image) else data_uri(read(image))


def load(image: str, channels: int = 3) -> Image.Image:
    """A row's image as 8-bit RGB (or grey, for one channel). `InputError` where a file is gone since it was prepared."""
    try:
        return plain(decode(read(image)), channels)
    except (OSError, ValueError) as error:
        shown = image if len(image) <= 200 else f"{image[:40]}…"
        raise InputError(f"The image {shown} was readable when the data was prepared and is not any more: {_sentence(error)}") from None


def plain(image: Image.Image, channels: int = 3) -> Image.Image:
    """8-bit RGB or grey: transparent pixels over white, 16 bits scaled to 8, other ranges stretched."""
    import numpy as np
    from PIL import Image

    if image.mode.startswith(("I", "F")):
        values = np.asarray(image, dtype=np.float64)
        values = np.nan_to_num(values, nan=0.0, posinf=0.0, neginf=0.0)
        low, high = float(values.min()), float(values.max())
        if image.mode.startswith("I") and low >= 0 and high <= 65535:
            low, high = 0.0, 65535.0
        image = Image.fromarray(np.round((values - low) * (255.0 / ((high - low) or 1.0))).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    wanted = "L" if channels == 1 else "RGB"
    return image if image.mode == wanted else image.convert(wanted)


def _kind(content: bytes) -> str | None:
    return next(
        (kind for magic, kind in _MAGIC.items() if content.startswith(magic) and (kind != "image/webp" or content[8:12] == b"WEBP")), None
    )


def _from_base64(text: str) -> bytes | None:
    try:
        return base64.b64decode("".join(text.split()).encode("ascii"), validate=True)
    except (binascii.Error, UnicodeEncodeError, ValueError):
        return None


def _sentence(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else f"{text[:200]}…"


# ---- from a client -------------------------------------------------------------------------------------------
SCHEMA: dict[str, Any] = {
    "type": "string",
    "minLength": 1,
    "pattern": rf"^(data:[\w.+-]*/?[\w.+-]*;base64,)?{BASE64}$",
    "contentEncoding": "base64",
    "description": "The image's file (PNG, JPEG, GIF, WebP, BMP, TIFF) in base64, or a data: URI of it. A path or URL is not opened.",
}
"""JSON Schema of one image in a request."""
INPUTS_SCHEMA: dict[str, Any] = {"anyOf": [SCHEMA, {"type": "array", "items": SCHEMA, "minItems": 1}]}
EXAMPLE = (
    "iVBORw0KGgoAAAANSUhEUgAAAAgAAAAIAQMAAAD+wSzIAAAABlBMVEX////IKB5tLIdPAAAAGElEQVR42mNgYGBgsGFiYGJgYmBgYGAAAALUAEMQ6XlWAAAAAElFTkSuQmCC"
)
"""An image of 8 x 8 pixels, for the endpoint's pages."""


_KINDS = {str: "an empty text", bytes: "an empty body", type(None): "null", dict: "an object", list: "a list", bool: "a boolean"}


def rows_from(inputs: Any) -> list[Row]:
    """A row for each image that a client sent: raw bytes, base64, a `data:` URI, or a list of these."""
    if isinstance(inputs, list):
        if not inputs:
            raise InputError("`inputs` is an empty list; give at least one image.")
        return [_row_from(item, f"inputs[{place}]") for place, item in enumerate(inputs)]
    return [_row_from(inputs, "inputs")]


def _row_from(item: Any, where: str) -> Row:
    if not isinstance(item, (str, bytes)) or not item:
        kind = _KINDS.get(type(item), "a number")
        raise InputError(f"`{where}` is {kind}; it must be an image in base64, or the body the image itself.")
    content = item if isinstance(item, bytes) else _from_base64(_DATA.sub("", item, count=1))
    if content is None:
        shown = item[:60].decode("latin-1") if isinstance(item, bytes) else item[:60]
        raise InputError(f"`{where}` is {shown!a}, which is not base64; send the image's bytes or base64 (a path or URL is not opened).")
    try:
        uri, _ = clean_image("image", content)
    except RowError as error:
        raise InputError(f"`{where}`: expected {error.expected}, found {len(content):,} bytes that are none{_reason(error)}.") from error
    return {"image": uri}


def _reason(error: RowError) -> str:
    """Why, without the content, of which there is at most a beginning and how long it is."""
    _, long, reason = str(error.found).partition(" characters) ")
    reason = reason if long else str(error.found).partition(" ")[2]
    return f" {reason}" if reason else ""


def inputs_from(row: Row) -> str:
    """The base64 that asks for a row's image."""
    return self_contained(row["image"]).partition("base64,")[2]


# ---- as numbers ----------------------------------------------------------------------------------------------
def channels(processor: Any) -> int:
    """1 where the processor normalises one channel (image_mean has one number), else 3."""
    mean = getattr(processor, "image_mean", None)
    return 1 if isinstance(mean, Sequence) and len(mean) == 1 else 3


def pixels(image: Image.Image, processor: Any) -> np.ndarray:
    """The image resized and cropped as the processor does, uint8 of shape (channels, height, width); no numbers changed yet."""
    import numpy as np

    return np.ascontiguousarray(processor(image, **_known(processor, _NO_PIXELS))["pixel_values"][0], dtype=np.uint8)


def example(array: np.ndarray) -> Example:
    """Pixels as they are pickled: a quarter of the memory of what the model takes."""
    return {"pixels": array.tobytes(), "shape": list(array.shape)}


def array(example: Example) -> np.ndarray:
    """The pixels of an example again."""
    import numpy as np

    return np.frombuffer(example["pixels"], dtype=np.uint8).reshape(example["shape"])


def length(example: Example) -> int:
    """Of a token budget: patches of 16 x 16 pixels."""
    _, height, width = example["shape"]
    return -(-height * width // PATCH)


def numbers(examples: Sequence[Example], processor: Any) -> list[torch.Tensor]:
    """What the model takes of each image, float32 of shape (channels, height, width): the processor's own rescaling and normalisation."""
    import numpy as np
    import torch

    options = _known(processor, _NO_GEOMETRY)
    values = processor([array(one) for one in examples], input_data_format="channels_first", **options)["pixel_values"]
    return [torch.from_numpy(np.ascontiguousarray(value, dtype=np.float32)) for value in values]


def _known(processor: Any, options: Mapping[str, bool]) -> dict[str, bool]:
    names = getattr(processor, "_valid_kwargs_names", ())
    return {name: value for name, value in options.items() if name in names}
