# SPDX-License-Identifier: Apache-2.0
"""Pictures as people have them, in every mode and with every flag that changes what a viewer shows."""

import io
import struct
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms

from dmole.data.images import ImageError, image_size, inspect_image, open_image

RAMP = np.linspace(0, 65535, 64 * 4).astype(np.uint16).reshape(64, 4)
GREY = np.rint(RAMP * (255 / 65535)).astype(np.uint8)


def stored(image: Image.Image, form: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def pixels(source: Path | str | bytes | Image.Image) -> np.ndarray:
    image = open_image(source)
    assert image.mode == "RGB"
    return np.asarray(image)


def gray(values: np.ndarray) -> np.ndarray:
    return np.repeat(values[..., None], 3, axis=2)


def arrow() -> Image.Image:
    """4 x 2, red at the top left and green at the top right: no turn leaves it as it is."""
    image = Image.new("RGB", (4, 2), "black")
    image.putpixel((0, 0), (255, 0, 0))
    image.putpixel((3, 0), (0, 255, 0))
    return image


# ---- 16 bits, floats


@pytest.mark.parametrize("form", ["PNG", "TIFF", "JPEG2000", "PPM"])
def test_a_16_bit_ramp_is_a_ramp(form: str) -> None:
    assert np.array_equal(pixels(stored(Image.fromarray(RAMP), form)), gray(GREY))


@pytest.mark.parametrize("mode", ["I;16", "I;16L", "I;16B", "I"])
def test_a_16_bit_ramp_in_memory_is_a_ramp(mode: str) -> None:
    kind = {"I;16B": ">u2", "I": "<i4"}.get(mode, "<u2")
    image = Image.frombytes(mode, (4, 64), RAMP.astype(kind).tobytes())
    assert np.array_equal(pixels(image), gray(GREY))


def test_a_big_endian_tiff_is_a_ramp() -> None:
    assert np.array_equal(
        pixels(stored(Image.frombytes("I;16B", (4, 64), RAMP.astype(">u2").tobytes()), "TIFF")), gray(GREY)
    )


def test_a_dark_16_bit_picture_stays_dark_where_the_format_says_16_bits() -> None:
    dark = np.full((4, 4), 255, np.uint16)
    for form in ("PNG", "PPM", "TIFF"):
        assert (pixels(stored(Image.fromarray(dark), form)) == 1).all()
    assert (pixels(Image.fromarray(dark.astype(np.int32))) == 255).all()  # int32 that may as well hold 8 bits


def test_a_tiff_whose_zero_is_white_is_inverted() -> None:
    content = stored(Image.fromarray(RAMP), "TIFF", tiffinfo={262: 0})
    assert np.array_equal(pixels(content), gray(255 - GREY))


def test_12_bits_of_a_tiff_are_scaled_by_4095() -> None:
    values = np.array([0, 4095, 2048, 1024], np.uint16)
    packed = int("".join(f"{value:012b}" for value in values), 2).to_bytes(6, "big")
    entries = [(256, 3, 4), (257, 3, 1), (258, 3, 12), (259, 3, 1), (262, 3, 1), (273, 4, 8), (277, 3, 1), (278, 3, 1)]
    entries.append((279, 4, 6))
    content = b"II*\0" + struct.pack("<I", 14) + packed + struct.pack("<H", len(entries))
    content += b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in entries) + b"\0\0\0\0"
    assert pixels(content)[0, :, 0].tolist() == [0, 255, 128, 64]


@pytest.mark.parametrize("scale", [1, 255])
def test_floats_of_0_to_1_and_of_0_to_255_are_ramps(scale: int) -> None:
    image = Image.fromarray((RAMP / np.float32(65535) * scale).astype(np.float32))
    for source in (image, stored(image, "TIFF")):
        assert np.array_equal(pixels(source), gray(GREY))


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        (np.array([[0, 300]], np.float32), "holds numbers from 0 to 300; expected 0 to 1 or 0 to 255. Scale them"),
        (np.array([[-0.5, 0.5]], np.float32), "holds numbers from -0.5 to 0.5; expected 0 to 1 or 0 to 255"),
        (np.array([[np.nan, 0.5]], np.float32), "holds numbers from nan to nan; expected 0 to 1 or 0 to 255"),
        (np.array([[0, 65536]], np.int32), "holds integers from 0 to 65536; expected 0 to 65535. Save it with 8 or 16"),
        (np.array([[-1, 5]], np.int32), "holds integers from -1 to 5; expected 0 to 65535"),
    ],
)
def test_numbers_of_no_known_scale_are_refused(values: np.ndarray, complaint: str) -> None:
    with pytest.raises(ImageError, match=f"^image of mode [IF] {complaint}"):
        open_image(Image.fromarray(values))


# ---- transparency


MEMORY = [(mode, "memory") for mode in ("RGBA", "LA", "RGBa", "La", "PA")]


@pytest.mark.parametrize(
    ("mode", "form"), [*MEMORY, *((mode, form) for mode in ("RGBA", "LA") for form in ("PNG", "TIFF"))]
)
def test_a_black_icon_on_nothing_is_black_on_white(mode: str, form: str) -> None:
    icon = Image.new("LA", (3, 1), (0, 0))
    icon.putpixel((0, 0), (0, 255))
    icon.putpixel((1, 0), (0, 128))
    made = icon if mode in ("LA", "La") else icon.convert("RGBA")
    if mode == "PA":
        made = Image.new("PA", (3, 1))
        made.putpalette([0, 0, 0] * 256)
        made.putalpha(icon.getchannel("A"))
    elif mode != made.mode:
        made = made.convert(mode)
    source = made if form == "memory" else stored(made, form)
    assert pixels(source)[0, :, 0].tolist() == [0, 127, 255]


def palette_icon() -> Image.Image:
    image = Image.new("P", (3, 1))
    image.putpalette([0, 0, 0, 255, 0, 0, 0, 0, 0])
    for x in range(3):
        image.putpixel((x, 0), x)
    return image


@pytest.mark.parametrize(
    ("form", "transparency", "expected"),
    [
        ("PNG", b"\xff\xff\x00", [(0, 0, 0), (255, 0, 0), (255, 255, 255)]),
        ("PNG", b"\xff\x80\x00", [(0, 0, 0), (255, 127, 127), (255, 255, 255)]),
        ("PNG", 2, [(0, 0, 0), (255, 0, 0), (255, 255, 255)]),
        ("GIF", 2, [(0, 0, 0), (255, 0, 0), (255, 255, 255)]),
        ("PNG", None, [(0, 0, 0), (255, 0, 0), (0, 0, 0)]),
    ],
)
def test_a_palette_with_transparency_is_composited_on_white(form: str, transparency: Any, expected: list[Any]) -> None:
    options = {} if transparency is None else {"transparency": transparency}
    found = pixels(stored(palette_icon(), form, **options))
    assert [tuple(colour) for colour in found[0].tolist()] == expected


def png(width: int, depth: int, colour: int, line: bytes, key: bytes) -> bytes:
    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", width, 1, depth, colour, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"tRNS", key) + chunk(b"IDAT", zlib.compress(b"\0" + line))
    return b"\x89PNG\r\n\x1a\n" + body + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        pytest.param(png(4, 2, 0, bytes([0b00011011]), b"\0\0"), [255, 85, 170, 255], id="2 bits, black is nothing"),
        pytest.param(png(4, 2, 0, bytes([0b00011011]), b"\0\1"), [0, 255, 170, 255], id="2 bits, dark is nothing"),
        pytest.param(png(2, 4, 0, bytes([0x5A]), b"\0\5"), [255, 170], id="4 bits"),
        pytest.param(png(2, 8, 0, bytes([5, 6]), b"\0\5"), [255, 6], id="8 bits"),
        pytest.param(png(2, 8, 0, bytes([5, 6]), b"\1\5"), [255, 6], id="8 bits, of whose key the low ones count"),
        pytest.param(png(2, 16, 0, bytes([0, 0, 128, 0]), b"\0\0"), [255, 128], id="16 bits"),
        pytest.param(png(2, 1, 0, bytes([0b01000000]), b"\0\0"), [255, 255], id="1 bit"),
    ],
)
def test_one_transparent_grey_of_a_png_is_white(content: bytes, expected: list[int]) -> None:
    assert pixels(content)[0, :, 0].tolist() == expected


def test_one_transparent_colour_is_white() -> None:
    assert pixels(png(2, 8, 2, bytes([1, 2, 3, 4, 5, 6]), bytes([0, 1, 0, 2, 0, 3])))[0].tolist() == [
        [255] * 3,
        [4, 5, 6],
    ]
    wide = bytes([16, 1, 32, 1, 48, 1, 64, 0, 80, 0, 96, 0])
    assert pixels(png(2, 16, 2, wide, wide[:6]))[0].tolist() == [[255] * 3, [64, 80, 96]]


# ---- other modes


def test_other_modes_look_as_they_should() -> None:
    red = Image.new("RGB", (16, 16), (255, 0, 0))
    for mode in ("CMYK", "YCbCr", "HSV", "P"):
        assert np.abs(pixels(red.convert(mode)).astype(int) - [255, 0, 0]).max() <= 1
    for form in ("JPEG", "TIFF"):
        # Adobe's JPEGs hold CMYK inverted; Pillow writes and reads them so.
        assert np.abs(pixels(stored(red.convert("CMYK"), form)).astype(int) - [255, 0, 0]).max() <= 3
    bits = Image.new("1", (2, 1), 0)
    bits.putpixel((1, 0), 1)
    for form in ("PNG", "TIFF", "BMP"):
        assert pixels(stored(bits, form))[0].tolist() == [[0] * 3, [255] * 3]


def test_lab_is_shown_in_srgb() -> None:
    profiles = [ImageCms.createProfile(name) for name in ("sRGB", "LAB")]
    lab = ImageCms.applyTransform(arrow(), ImageCms.buildTransform(*profiles, "RGB", "LAB"))
    assert lab is not None and np.abs(pixels(lab).astype(int) - pixels(arrow())).max() <= 16


def test_a_plain_picture_keeps_its_bytes() -> None:
    image = Image.effect_noise((9, 7), 60).convert("RGB")
    for source in (image, stored(image, "PNG"), stored(image, "BMP")):
        assert open_image(source).tobytes() == image.tobytes()
    assert open_image(image) is not image


# ---- orientation


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ["PNG", "TIFF", "WEBP", "JPEG"])
def test_pictures_are_upright(form: str, orientation: int, tmp_path: Path) -> None:
    turned = {
        1: lambda a: a, 2: lambda a: a[:, ::-1], 3: lambda a: a[::-1, ::-1], 4: lambda a: a[::-1],
        5: lambda a: a.swapaxes(0, 1), 6: lambda a: np.rot90(a, 1), 7: lambda a: np.rot90(a, 2).swapaxes(0, 1),
        8: lambda a: np.rot90(a, -1),
    }  # fmt: skip
    large = np.asarray(arrow().resize((64, 32), Image.Resampling.NEAREST))
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"WEBP": {"lossless": True}, "JPEG": {"quality": 100, "subsampling": 0}}.get(form, {})
    path = tmp_path / "turned"
    path.write_bytes(
        stored(Image.fromarray(np.ascontiguousarray(turned[orientation](large))), form, exif=exif, **options)
    )
    found = open_image(path)
    assert found.size == (64, 32) == image_size(path) == inspect_image(path).size
    assert np.abs(np.asarray(found).astype(int) - large).mean() < 4


def test_exif_that_cannot_be_read_is_said_and_the_picture_used() -> None:
    content = stored(arrow(), "PNG", exif=b"Exif\0\0XXnonsense")
    assert open_image(content).tobytes() == arrow().tobytes()
    (note,) = inspect_image(content).notes
    assert note == "has EXIF data that cannot be read (SyntaxError); it is used as stored"


# ---- several frames


@pytest.mark.parametrize("form", ["GIF", "PNG", "WEBP", "TIFF"])
def test_the_first_frame_is_used_and_said(form: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    options = {"lossless": True} if form == "WEBP" else {}
    report = inspect_image(content := stored(frames[0], form, save_all=True, append_images=frames[1:], **options))
    assert report.notes == ("has 3 frames; the first one is used",) and report.complaint is None
    assert (pixels(content) == [255, 0, 0]).all()


# ---- damage


@pytest.mark.parametrize("form", ["AVIF", "BLP", "DDS", "PNG", "GIF", "TIFF", "ICNS", "QOI", "WEBP", "JPEG2000", "TGA"])
def test_a_damaged_file_is_a_finding_whatever_its_decoder_raises(form: str, tmp_path: Path) -> None:
    image = Image.effect_noise((32, 32), 60).convert("P" if form == "BLP" else "RGB")
    content = stored(image, form)
    path = tmp_path / "damaged"
    for cut in {len(content) * part // 16 for part in range(1, 16)}:
        path.write_bytes(content[:cut])
        report = inspect_image(path)
        try:
            assert (open_image(path).size == report.size) or report.complaint is not None
        except ImageError as error:
            # A PNG's checksums are read before its pixels.
            assert report.complaint is not None and str(error) == f"image {path} {error.complaint}"
    path.write_bytes(content[: len(content) // 16])
    complaint = inspect_image(path).complaint
    assert complaint is not None
    assert complaint.startswith("cannot be decoded (") and complaint.endswith("; replace the file")
    assert str(tmp_path) not in complaint and " at 0x" not in complaint


class _Broken(Image.Image):
    """A lazy picture of some library, whose decoder fails in a way of its own."""

    error: BaseException

    def load(self) -> None:  # type: ignore[override]
        raise self.error


@pytest.mark.parametrize(
    "kind", [struct.error, SyntaxError, KeyError, RuntimeError, MemoryError, AssertionError, zlib.error]
)
def test_any_exception_of_a_decoder_is_named(kind: type[Exception]) -> None:
    image = _Broken()
    image.error = kind("spoilt")
    with pytest.raises(ImageError, match=f"cannot be decoded \\({kind.__name__}: '?spoilt'?\\); replace the file"):
        open_image(image)
    image.error = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        open_image(image)


def test_a_decompression_bomb_is_refused_before_it_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    content = stored(Image.new("1", (400, 400)), "PNG")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 159_999)
    with (
        pytest.warns(Image.DecompressionBombWarning),
        pytest.raises(ImageError, match=r"\(400 x 400 pixels\); scale it"),
    ):
        open_image(content)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ImageError, match="^image of [0-9]+ bytes is too large .*; scale it down$"):
        open_image(content)


def test_drawings_are_refused_whatever_is_installed_to_render_them() -> None:
    content = stored(arrow(), "EPS")
    with pytest.raises(ImageError, match="is a drawing \\(EPS\\), which another program renders; save it as PNG"):
        open_image(content)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="none.png is missing$"):
        open_image(tmp_path / "none.png")


# ---- files are opened once


_opened: list[str] = []
_listening = False


def _hook(event: str, arguments: Any) -> None:
    if _listening and event == "open":
        _opened.append(str(arguments[0]))


@pytest.fixture
def opened() -> Iterator[Callable[[Path], int]]:
    """How often a file has been opened since the fixture was asked for, by anything in this process."""
    global _listening
    if not _opened:
        sys.addaudithook(_hook)  # for good: Python has no way to take one out
    _opened[:] = ["installed"]
    _listening = True
    yield lambda path: _opened.count(str(path))
    _listening = False


@pytest.mark.parametrize("form", ["PNG", "JPEG", "TIFF", "GIF", "WEBP"])
def test_each_file_is_opened_once(form: str, tmp_path: Path, opened: Callable[[Path], int]) -> None:
    path = tmp_path / "picture"
    arrow().save(path, form)
    before = opened(path)
    inspect_image(path)
    assert opened(path) == before + 1
    open_image(path)
    assert opened(path) == before + 2
