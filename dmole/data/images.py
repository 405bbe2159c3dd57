# SPDX-License-Identifier: Apache-2.0
"""The one way from a file, its bytes or a PIL image to pixels, for checks and training alike: RGB, upright, opaque.

| stored | becomes |
|---|---|
| EXIF or XMP orientation | the picture turned as a viewer shows it |
| transparency: an alpha channel, a palette's, one transparent colour | composited on white |
| 16-bit integers (`I;16`, in either byte order) | `round(255 v / 65535)`; 12 bits of a TIFF: `round(255 v / 4095)` |
| 32-bit integers (`I`) up to 65535 | as 16 bits; as 8 bits if none is above 255 and the format isn't PNG or PPM |
| floats (`F`) | `round(255 v)` if all are in 0..1, `round(v)` if all are in 0..255 |
| several frames or pages | the first |
| 1 bit, grey, palettes, CMYK, YCbCr, HSV | as Pillow converts them; Pillow has undone Adobe's inverted CMYK |

Numbers outside these ranges, NaN, drawings that other programs render (EPS, WMF), more pixels than
`PIL.Image.MAX_IMAGE_PIXELS` and everything that a decoder raises on damaged input are an `ImageError`.
"""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
from PIL import ExifTags, Image
from PIL.ImageFile import ImageFile

Source = Path | str | bytes | Image.Image

# Rendered by Ghostscript and by Windows where those are installed: pixels would depend on the machine.
DRAWINGS = ("EPS", "WMF")
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_STREAM = re.compile(r"<_io\.[^>]*>")  # as Pillow names an open file, with its address
_BITS_PER_SAMPLE, _PHOTOMETRIC, _WHITE_IS_ZERO = 258, 262, 0


class ImageError(ValueError):
    """A picture cannot be used. `complaint` is the text without the picture's name, for a finding that names it."""

    def __init__(self, name: str, complaint: str) -> None:
        self.complaint = complaint
        super().__init__(f"image {name} {complaint}")


@dataclass(frozen=True, kw_only=True)
class ImageReport:
    """What `inspect_image` found: the upright size, or the complaint; and notes on what is used of the picture."""

    size: tuple[int, int] | None = None
    complaint: str | None = None
    notes: tuple[str, ...] = ()


def open_image(source: Source) -> Image.Image:
    """The picture as the model sees it: mode RGB, upright, on white.

    Args:
        source: a file's path, the bytes of a file, or a PIL image, which is left as it is.

    Raises:
        ImageError: a ValueError that names the picture and what is wrong with it.
    """
    with _opened(source) as image:
        return _pixels(image)[0]


def inspect_image(source: Source) -> ImageReport:
    """Decodes a picture as `open_image` does, and checks what decoding does not read: checksums, further frames.

    The file is opened once.
    """
    try:
        with _opened(source) as image:
            # Verifying a PNG reads its checksums to the last chunk, and spoils the object for decoding.
            if isinstance(image, ImageFile) and image.fp is not None and image is not source:
                file = image.fp
                image.verify()
                file.seek(0)
                image = Image.open(file)
            rgb, notes = _pixels(image)
            frames = getattr(image, "n_frames", 1)
    except ImageError as error:
        return ImageReport(complaint=error.complaint)
    if frames > 1:
        notes = (*notes, f"has {frames} frames; the first one is used")
    return ImageReport(size=rgb.size, notes=notes)


def image_size(path: Path) -> tuple[int, int]:
    """(width, height) of `open_image(path)`, from the file's header where that holds the orientation."""
    with _opened(path) as image:
        width, height = image.size
        # A TIFF's size is upright already.
        turned = image.format != "TIFF" and _orientation(image)[0] >= 5
    return (height, width) if turned else (width, height)


@contextlib.contextmanager
def _opened(source: Source) -> Iterator[Image.Image]:
    """The PIL image of a source; whatever Pillow raises inside becomes an ImageError."""
    if isinstance(source, Image.Image):
        name = f"of mode {source.mode}"
    else:
        name = f"of {len(source)} bytes" if isinstance(source, bytes) else str(source)
    try:
        with contextlib.ExitStack() as files:
            if isinstance(source, Image.Image):
                image = source
            else:
                file = io.BytesIO(source) if isinstance(source, bytes) else Path(source).open("rb")
                image = Image.open(cast(IO[bytes], files.enter_context(file)))
            if image.format in DRAWINGS:
                raise ImageError(name, f"is a drawing ({image.format}), which another program renders; save it as PNG")
            limit = Image.MAX_IMAGE_PIXELS
            if limit is not None and image.width * image.height > limit:
                raise ImageError(name, f"is too large ({image.width} x {image.height} pixels); scale it down")
            yield image
    except ImageError:
        raise
    except _Unscaled as error:
        raise ImageError(name, str(error)) from error
    except FileNotFoundError as error:
        raise ImageError(name, "is missing") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError(name, f"is too large ({error}); scale it down") from error
    # Decoders raise almost anything on damaged input: OSError, SyntaxError, ValueError, struct.error, zlib.error,
    # KeyError, AttributeError, AssertionError, NotImplementedError, MemoryError, ... by plugin and version.
    except Exception as error:
        text = _STREAM.sub("the file", " ".join(str(error).split()))[:200]
        raise ImageError(name, f"cannot be decoded ({type(error).__name__}: {text}); replace the file") from error


class _Unscaled(ValueError):
    pass


def _pixels(image: Image.Image) -> tuple[Image.Image, tuple[str, ...]]:
    """RGB, upright, on white; and notes."""
    key = _transparent_colour(image)  # before decoding, which forgets how the file packs its pixels
    image.load()
    if image.mode == "F" or image.mode.startswith("I"):
        rgb = _scaled(image, key).convert("RGB")
    elif image.has_transparency_data:
        rgb = _on_white(image, key)
    else:
        rgb = image.convert("RGB")
    turn, notes = _orientation(image)
    return (rgb.transpose(_TURNS[turn]) if turn in _TURNS else rgb), notes


def _orientation(image: Image.Image) -> tuple[int, tuple[str, ...]]:
    """EXIF's number, 1 for upright; and a note where it cannot be read."""
    try:
        found = image.getexif().get(ExifTags.Base.Orientation, 1)
    # A TIFF reader parses EXIF, with the errors of a decoder; the pixels beside it may be perfect.
    except Exception as error:
        return 1, (f"has EXIF data that cannot be read ({type(error).__name__}); it is used as stored",)
    return (found if isinstance(found, int) else 1), ()


def _transparent_colour(image: Image.Image) -> Any:
    """`info["transparency"]` in the decoded pixels' units: Pillow leaves a PNG's in those of the file."""
    key = image.info.get("transparency")
    packed = str(image.tile[0][3]) if isinstance(image, ImageFile) and image.format == "PNG" and image.tile else ""
    if isinstance(key, int) and packed in ("L;2", "L;4"):
        return key * {"L;2": 85, "L;4": 17}[packed]
    if isinstance(key, tuple) and packed.endswith("16B"):
        return tuple(value >> 8 for value in key)
    return key


def _on_white(image: Image.Image, key: Any) -> Image.Image:
    if key is not None:
        image = image.copy()
        image.info["transparency"] = key
    if image.mode == "La":
        image = image.convert("LA")
    rgba = image.convert("RGBA")
    white = Image.new("RGBA", rgba.size, "white")
    return Image.alpha_composite(white, rgba).convert("RGB")


def _scaled(image: Image.Image, key: Any) -> Image.Image:
    """Integers of 16 or 32 bits, or floats, as 8-bit grey."""
    values = np.asarray(image)
    if not values.size:
        raise _Unscaled("has no pixels; replace the file")
    low, high = values.min(), values.max()
    if image.mode == "F":
        if not (low >= 0 and high <= 255):  # NaN is neither
            raise _Unscaled(f"holds numbers from {low:g} to {high:g}; expected 0 to 1 or 0 to 255. Scale them")
        return Image.fromarray(np.rint(values * (255 if high <= 1 else 1)).astype(np.uint8))
    if not (low >= 0 and high <= 65535):
        raise _Unscaled(f"holds integers from {low} to {high}; expected 0 to 65535. Save it with 8 or 16 bits")
    tags = getattr(image, "tag_v2", {}) if image.format == "TIFF" else {}
    white = 65535
    if image.mode == "I" and high <= 255 and image.format not in ("PNG", "PPM"):
        white = 255
    elif tags.get(_BITS_PER_SAMPLE) == (12,):
        white = 4095
    table = np.rint(np.minimum(np.arange(65536), white) * (255 / white)).astype(np.uint8)
    # Pillow inverts 8 bits whose zero is white, and leaves 16 bits.
    grey = table[white - values if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO else values]
    if key is not None:
        grey[values == key] = 255
    return Image.fromarray(grey)
