"""An image's file into pixels: decoded, turned as its EXIF data say, resized, cropped and perhaps mirrored.

By Pillow, which gives up Python's lock while it works: threads decode in parallel.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFile, ImageOps
from PIL.TiffImagePlugin import TiffImageFile

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")  # none whose decoder is another program
_MARKERS = ((b"\xff\xd8", b"\xff\xd9"), (b"\x89PNG", b"IEND"))  # at both ends of a JPEG and of a PNG
_ORIENTATION, _TRANSPOSED = 0x0112, (5, 6, 7, 8)  # an EXIF tag, and its values that swap height and width
_TIFF_SIZE = 256, 257  # tags of the width and height that are stored

Place = tuple[int, int]
"""Vertical first, in pixels."""


class UndecodableImage(Exception):
    """A file that is no image, or a damaged one. The message says why in a few words."""


@dataclass(frozen=True)
class Crop:
    """How an image gets the size of its bucket in pixels: resized until it covers it, then cropped."""

    height: int
    width: int
    place: Literal["centre"] | tuple[float, float] = "centre"
    """In the middle, or ``y`` and ``x`` of 0 to 1 say where between both ends."""
    flip: bool = False


@dataclass(frozen=True)
class Pixels:
    """``values`` float32 ``[channels, height, width]`` of -1 to 1; sizes and offsets in pixels, vertical first.

    ``crop_top_left``: in the resized image, as SDXL is told.
    """

    values: npt.NDArray[np.float32]
    original_size: tuple[int, int]
    crop_top_left: tuple[int, int]


def size_of(content: bytes) -> tuple[int, int]:
    """Height and width once it is turned, from the file's header alone.

    Raises:
        UndecodableImage: the header is not one of an image.
    """
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            # Pillow's later versions have turned a TIFF's size themselves.
            width, height = (
                (image.tag_v2[tag] for tag in _TIFF_SIZE) if isinstance(image, TiffImageFile) else image.size
            )
            # Of a PNG without EXIF data in its header Pillow would decode all to look behind the pixels.
            described = image.format != "PNG" or "exif" in image.info
            turned = described and image.getexif().get(_ORIENTATION) in _TRANSPOSED
    except Exception as error:  # Pillow's plugins raise whatever their parsers stumble over
        raise UndecodableImage(_reason(error)) from None
    return (width, height) if turned else (height, width)


def size_of_whole(first: bytes, last: bytes, content: Callable[[], bytes]) -> tuple[int, int]:
    """:func:`size_of` a file that was not cut off: by its first and last bytes, or else by decoding it.

    Raises:
        UndecodableImage: it is no image, or was cut off.
    """
    if any(first.startswith(start) and end in last for start, end in _MARKERS):
        with contextlib.suppress(UndecodableImage):
            return size_of(first)
    whole = content()  # its format has no marker, much stands behind it, or its size stands further on
    size = size_of(whole)
    if whole.startswith(b"RIFF") and int.from_bytes(whole[4:8], "little") + 8 <= len(whole):
        return size  # a WebP says in its header how long it is
    try:
        with Image.open(io.BytesIO(whole), formats=FORMATS) as image:
            image.load()
    except Exception as error:
        raise UndecodableImage(_reason(error)) from None
    return size


def load_pixels(content: bytes, crop: Crop, channels: int = 3) -> Pixels:
    """Decode an image and bring it to a size.

    Raises:
        UndecodableImage: it cannot be decoded to its end.
    """
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as opened:
            image = _plain(_eight_bits(ImageOps.exif_transpose(opened), opened.format), channels)
    except Exception as error:
        raise UndecodableImage(_reason(error)) from None
    width, height = image.size
    scale = max(crop.height / height, crop.width / width)
    resized = max(round(height * scale), crop.height), max(round(width * scale), crop.width)
    spare = resized[0] - crop.height, resized[1] - crop.width
    part = (0.5, 0.5) if crop.place == "centre" else crop.place
    top, left = (
        min(int((free + 1) * share), free) if crop.place != "centre" else free // 2 for free, share in zip(spare, part)
    )
    cut = _part(image, resized, (top, left), (crop.height, crop.width))
    values = np.asarray(cut, np.float32).reshape(crop.height, crop.width, channels)
    if crop.flip:
        values = values[:, ::-1]
        left = spare[1] - left  # where the crop is in the mirrored image
    pixels = np.ascontiguousarray(values.transpose(2, 0, 1)) / np.float32(127.5) - np.float32(1)
    return Pixels(pixels, (height, width), (top, left))


def _part(image: Image.Image, resized: Place, corner: Place, size: Place) -> Image.Image:
    """``size`` from ``corner`` of what the image is when it is ``resized``, without a look at the rest of it."""
    (top, left), (height, width) = corner, size
    if resized == (image.height, image.width):
        return image.crop((left, top, left + width, top + height))
    across, down = image.width / resized[1], image.height / resized[0]
    box = left * across, top * down, min((left + width) * across, image.width), min((top + height) * down, image.height)
    # A gap of 3: what is much too large is first halved and halved again, which nobody can see.
    return image.resize((width, height), Image.Resampling.LANCZOS, box=box, reducing_gap=3.0)


def _eight_bits(image: Image.Image, format: str | None) -> Image.Image:
    """Numbers of 16 bits as 8, of which Pillow would cut off what is above 255; of others the range is not known."""
    if image.mode == "F" or (image.mode == "I" and format != "PPM"):
        raise UndecodableImage(
            f"its pixels are of Pillow's mode {image.mode!r}, without a known range; save 8 or 16 bits"
        )
    if image.mode != "I" and not image.mode.startswith("I;16"):
        return image
    values = np.asarray(image)
    return Image.fromarray((values >> 8).astype(np.uint8))


def _plain(image: Image.Image, channels: int) -> Image.Image:
    """One or three channels of 8 bits; what is transparent becomes white."""
    mode = {1: "L", 3: "RGB"}[channels]
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        solid = image.convert("RGBA")
        white = Image.new("RGBA", solid.size, "white")
        image = Image.alpha_composite(white, solid)
    return image.convert(mode)


def _reason(error: Exception) -> str:
    if isinstance(error, Image.UnidentifiedImageError):
        return f"it is none of {', '.join(FORMATS)}"
    return str(error) or type(error).__name__


assert not ImageFile.LOAD_TRUNCATED_IMAGES, "a truncated image would be trained on as if it were grey"
