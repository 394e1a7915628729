"""What an image in a cell may be, what it becomes, and what a client can't make the server do."""

import base64
import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from orchestrator.data.files import SourceFile
from orchestrator.data.sources import located
from orchestrator.errors import InputError
from orchestrator.storage import Folder
from orchestrator.tasks import images
from orchestrator.tasks.base import RowError
from tests.fixtures.tiny_images import picture, png, uri

RED = picture((200, 30, 20))


def file(image: Image.Image, form: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, form, **options)
    return stream.getvalue()


def photo(width: int = 40, height: int = 24) -> Image.Image:
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize(
    "value",
    [
        RED,
        bytearray(RED),
        {"bytes": RED, "path": "x.png"},
        uri(RED),
        uri(RED).replace("base64,", "base64,\n ").replace("image/png", "image/PNG"),
        base64.b64encode(RED).decode(),
        base64.encodebytes(RED).decode(),
    ],
)
def test_content_becomes_one_data_uri_however_it_came(value: Any) -> None:
    assert images.clean_image("image", value) == (uri(RED), (20, 16))


def test_a_path_stays_a_reference_until_it_is_to_be_carried_along(tmp_path: Path) -> None:
    path = tmp_path / "ü 1.png"
    path.write_bytes(RED)
    for value in (str(path), {"path": str(path), "bytes": None}, f"file://{tmp_path}/%C3%BC%201.png"):
        clean, size = images.clean_image("image", value)
        assert size == (20, 16)
        assert not clean.startswith("data:")
        assert images.self_contained(clean) == uri(RED)
    assert images.self_contained(uri(RED)) == uri(RED)
    assert images.inputs_from({"image": str(path)}) == base64.b64encode(RED).decode()


def test_a_path_is_relative_to_its_file_and_content_is_none(tmp_path: Path) -> None:
    table = SourceFile(uri="/data/set/rows.jsonl", name="rows.jsonl", format="jsonl", size=1)
    assert located(table, "../images/1.png") == "/data/images/1.png"
    assert located(table, {"path": "1.png", "bytes": None}) == {"path": "/data/set/1.png", "bytes": None}
    for content in (base64.b64encode(RED).decode(), base64.encodebytes(RED).decode(), uri(RED), "s3://bucket/1.png", "/abs/1.png"):
        assert located(table, content) == content


@pytest.mark.parametrize(
    "value", [None, "", " ", 7, 1.5, ["a.png"], {}, {"path": None}, b"", b"no image", "nowhere.png", "data:image/png,x"]
)
def test_what_is_no_image_is_a_bad_row(value: Any) -> None:
    with pytest.raises(RowError) as raised:
        images.clean_image("photo", value)
    assert raised.value.column == "photo"
    assert "image" in raised.value.expected


@pytest.mark.parametrize("form", ["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF"])
def test_a_torn_file_is_a_bad_row_and_a_whole_one_is_not(form: str) -> None:
    whole = file(photo(200, 100), form)
    assert images.clean_image("image", whole)[1] == (200, 100)
    for torn in (whole[: len(whole) // 2], whole[:20]):
        with pytest.raises(RowError):
            images.clean_image("image", torn)


def test_other_documents_are_not_opened() -> None:
    for content in (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", b"%PDF-1.7", b"<svg/>", b"P6 1 1 255 abc", bytes(1000)):
        with pytest.raises(RowError):
            images.clean_image("image", content)


def test_a_small_file_that_claims_to_be_huge_is_refused_before_it_is_decoded() -> None:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    for side in (9_000, 12_000, 60_000):  # Below, between and above the limits at which Pillow warns and raises.
        header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
        bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")
        with pytest.raises(RowError, match="pixels"):
            images.clean_image("image", bomb)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_picture_is_turned_as_its_camera_says(orientation: int) -> None:
    upright = np.zeros((16, 32, 3), np.uint8)
    upright[:8, :16] = 255  # Bright at the upper left.
    turns = {2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE", 6: "ROTATE_90", 7: "TRANSVERSE", 8: "ROTATE_270"}
    stored = Image.fromarray(upright)
    if orientation > 1:
        stored = stored.transpose(Image.Transpose[turns[orientation]])
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = file(stored, "JPEG", exif=exif, quality=95)
    assert images.clean_image("image", content)[1] == (32, 16)
    shown = np.asarray(images.load(images.data_uri(content)))
    assert shown.shape == (16, 32, 3)
    assert abs(shown.astype(int) - upright).mean() < 5


def test_every_mode_becomes_8_bit_rgb_or_grey() -> None:
    grey = np.linspace(0, 255, 64, dtype=np.uint8).reshape(8, 8)
    clear = np.dstack([grey, grey, grey, np.full((8, 8), 0, np.uint8)])
    half = np.dstack([np.zeros((8, 8, 3), np.uint8), np.full((8, 8), 128, np.uint8)])

    def rgb(image: Image.Image, form: str = "PNG", **options: Any) -> np.ndarray:
        shown = images.load(images.clean_image("image", file(image, form, **options))[0])
        assert shown.mode == "RGB"
        return np.asarray(shown)[..., 0]

    assert np.array_equal(rgb(Image.fromarray(grey)), grey)
    assert np.array_equal(rgb(Image.fromarray(grey.astype(np.uint16) * 257)), grey)
    assert abs(rgb(Image.fromarray(grey.astype(np.float32) / 255), "TIFF").astype(int) - grey).max() <= 1
    assert (rgb(Image.fromarray(np.full((8, 8), np.nan, np.float32)), "TIFF") == 0).all()
    assert (rgb(Image.fromarray(clear)) == 255).all()
    assert abs(rgb(Image.fromarray(half)).astype(int) - 127).max() <= 1
    assert (rgb(Image.fromarray(clear).convert("LA")) == 255).all()
    palette = Image.fromarray(grey).convert("P")
    assert (rgb(palette, transparency=palette.getpixel((7, 7)))[7, 7]) == 255
    assert set(np.unique(rgb(Image.fromarray(grey).convert("1")))) <= {0, 255}
    assert rgb(Image.fromarray(np.dstack([grey] * 3)).convert("CMYK"), "JPEG").shape == (8, 8)
    assert images.load(uri(RED), channels=1).mode == "L"


def test_of_a_moving_picture_the_first_one_counts() -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    content = file(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert np.asarray(images.load(images.data_uri(content)))[0, 0].tolist() == [255, 0, 0]


def test_a_file_that_went_away_after_preparing_is_told_of(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"gone\.png was readable when"):
        images.load(str(tmp_path / "gone.png"))


# ---- clients -------------------------------------------------------------------------------------------------
def test_a_client_sends_bytes_or_base64() -> None:
    encoded = base64.b64encode(RED).decode()
    for inputs in (RED, encoded, uri(RED), f" {encoded}\n", f"data:;base64,{encoded}"):
        assert images.rows_from(inputs) == [{"image": uri(RED)}]
    assert images.rows_from([encoded, uri(RED)]) == [{"image": uri(RED)}] * 2
    assert images.rows_from(images.EXAMPLE)[0]["image"].startswith("data:image/png")


def test_nothing_that_a_client_names_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "secret.png"
    path.write_bytes(RED)
    monkeypatch.setattr(Folder, "read_bytes", lambda self: pytest.fail(f"opened {self.uri}"))
    monkeypatch.setattr(Image, "open", lambda *_, **__: pytest.fail("gave Pillow what is no image"))
    for named in (str(path), f"file://{path}", "http://localhost/x.png", "s3://bucket/x.png", "../x.png", "data:text/plain,x", "secret"):
        with pytest.raises(InputError, match="inputs"):
            images.rows_from(named)
        with pytest.raises(InputError, match="inputs"):
            images.rows_from(named.encode())


@pytest.mark.parametrize("inputs", [None, 7, [], "", b"", [""], [[images.EXAMPLE]], {"image": images.EXAMPLE}, "not base64!"])
def test_inputs_of_another_shape_are_refused(inputs: Any) -> None:
    with pytest.raises(InputError, match="inputs") as raised:
        images.rows_from(inputs)
    assert not isinstance(raised.value.__cause__, RowError)


def test_well_formed_inputs_that_are_no_image_are_told_apart() -> None:
    for inputs in (RED[:-40], base64.b64encode(RED[:40]).decode(), base64.b64encode(b"hello, world").decode(), b"\0" * 50):
        with pytest.raises(InputError, match="expected an image") as raised:
            images.rows_from(inputs)
        assert isinstance(raised.value.__cause__, RowError)
        assert "base64," not in str(raised.value)


# ---- numbers -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("ViT", {}),
        ("ViT", {"image_mean": [0.4], "image_std": [0.3]}),
        ("ConvNext", {"size": {"shortest_edge": 32}, "crop_pct": 0.875}),
        ("EfficientNet", {"rescale_offset": True, "do_center_crop": True, "crop_size": {"height": 24, "width": 24}}),
        ("MobileViT", {"size": {"shortest_edge": 32}, "crop_size": {"height": 30, "width": 30}}),
        ("CLIP", {"size": {"shortest_edge": 32}, "crop_size": 32}),
        ("Yolos", {"size": {"shortest_edge": 32, "longest_edge": 64}}),
        ("Detr", {"size": {"shortest_edge": 32, "longest_edge": 64}}),
        ("RTDetr", {"size": {"height": 32, "width": 32}}),
    ],
)
def test_resized_first_and_made_numbers_later_is_what_the_processor_does_at_once(name: str, settings: dict[str, Any]) -> None:
    import transformers.models.auto.image_processing_auto as auto

    processor: Any = auto.get_image_processor_class_from_name(f"{name}ImageProcessorPil")(**settings)
    channels = images.channels(processor)
    assert channels == len(settings.get("image_mean", (1, 2, 3)))
    pictures = [images.plain(photo(), channels), images.plain(photo(70, 50), channels)]
    arrays = [images.pixels(image, processor) for image in pictures]
    assert all(array.dtype == np.uint8 for array in arrays)
    examples = [images.example(array) for array in arrays]
    for image, found in zip(pictures, images.numbers(examples, processor), strict=True):
        wanted = np.asarray(processor(image)["pixel_values"][0])
        assert found.shape == wanted.shape
        assert abs(found.numpy() - wanted).max() < 1e-5


def test_the_length_of_an_image_is_its_patches() -> None:
    assert [images.length({"shape": [3, *size]}) for size in ((16, 16), (17, 16), (224, 224), (1, 1))] == [1, 2, 196, 1]


def test_png_is_what_the_fixtures_say() -> None:
    assert np.asarray(Image.open(io.BytesIO(png(np.eye(3, dtype=np.uint8) * 255)))).sum() == 3 * 255


def test_a_client_is_told_what_is_wrong_with_a_picture() -> None:
    content = file(Image.effect_noise((64, 64), 90), "JPEG")
    with pytest.raises(InputError, match=r"found [\d,]+ bytes that are none \(image file is truncated \(\d+ bytes not processed\)\)\.$"):
        images.rows_from(content[: len(content) // 2])
    with pytest.raises(InputError, match=r"found 4 bytes that are none \(no picture in it\)\.$"):
        images.rows_from(b"text")
