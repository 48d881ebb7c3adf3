"""Encoded pictures to RGB pixels of a bucket: decoded with limits, upright, cropped to its aspect, never stretched."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageFile, UnidentifiedImageError, features

from fastpref.data import colour
from fastpref.data.buckets import Size
from fastpref.data.colour import ImageError

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
# Part of a store's fingerprint; raise it when pixels of any picture come out differently.
DECODING = 2
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_EXIF_ORIENTATION = 0x0112
_SIDEWAYS = (5, 6, 7, 8)
_DRAFT_SIDE = 256  # from here a JPEG is tried at an eighth of its size
_ROUGH_SIDE, _ROUGH_STEPS = 4, 16


@contextmanager
def own_pixel_limit() -> Iterator[None]:
    """Leave the limit on pixels to ``max_pixels`` of :func:`probe` and :func:`load_rgb`."""
    before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = before


@dataclass(frozen=True)
class Look:
    """What a trial decode shows: the upright picture's size, and its pixels averaged to very few."""

    size: Size
    rough: np.ndarray  # (4, 4, 3) int16


def probe(data: bytes, max_pixels: int) -> Look:
    """A look at the upright picture, by a trial decode (JPEG: at an eighth of the size).

    Raises:
        ImageError: no picture in one of :data:`FORMATS`, cut short, of more than ``max_pixels`` pixels, or of a kind
            that nobody can say how to show (see :func:`fastpref.data.colour.load`).
    """
    with _open(data, max_pixels) as image:
        if image.format == "PNG":
            _verify(data)
        size = image.size
        if min(size) >= _DRAFT_SIDE:
            image.draft("RGB", (size[0] // 8, size[1] // 8))
        drafted = image.size != size
        shown, orientation = _decoded(image)
    if drafted and orientation in _SIDEWAYS:
        size = size[1], size[0]
    rough = shown.resize((_ROUGH_SIDE, _ROUGH_SIDE), Image.Resampling.BOX)
    return Look(size if drafted else shown.size, np.asarray(rough).astype(np.int16))


def load_rgb(data: bytes, max_pixels: int) -> Image.Image:
    """The upright sRGB picture (first frame; transparent pixels over white); raises as :func:`probe`."""
    with _open(data, max_pixels) as image:
        return _decoded(image)[0]


def same_picture(first: bytes, second: bytes, looks: tuple[Look, Look], max_pixels: int) -> bool:
    """Whether two pictures have the same pixels, whatever their formats and metadata; ``looks`` are theirs."""
    if first == second:
        return True
    one, other = looks
    # The rough pictures of equal pixels differ by the rounding of a JPEG's trial decode and the filling of its edge.
    if one.size != other.size or np.abs(one.rough - other.rough).max() > _ROUGH_STEPS:
        return False
    return load_rgb(first, max_pixels).tobytes() == load_rgb(second, max_pixels).tobytes()


@dataclass(frozen=True)
class Fit:
    """How a picture enters its bucket: the part kept, in its own pixels, and SDXL's crop ids, in resized pixels."""

    box: tuple[float, float, float, float]  # left, upper, right, lower
    crop_top: int
    crop_left: int


def enlargement(size: Size, target: Size) -> float:
    """How many times a picture of ``size`` is enlarged to cover ``target``."""
    return max(target[0] / size[0], target[1] / size[1])


def fit(size: Size, target: Size) -> Fit:
    """The largest centred box of ``target``'s aspect ratio in a picture of ``size``.

    The box has fractional edges, so its aspect ratio is exact. A picture smaller than the target is enlarged.
    """
    width, height = size
    scale = enlargement(size, target)
    kept_w, kept_h = target[0] / scale, target[1] / scale
    left, top = (width - kept_w) / 2, (height - kept_h) / 2
    box = (max(left, 0.0), max(top, 0.0), min(left + kept_w, float(width)), min(top + kept_h, float(height)))
    return Fit(box, crop_top=max(0, round(top * scale)), crop_left=max(0, round(left * scale)))


def to_bucket(image: Image.Image, target: Size) -> Image.Image:
    """``image`` cropped to :func:`fit`'s box and resampled (Lanczos) to ``target`` in one step."""
    box = fit(image.size, target).box
    if image.size == target:
        return image
    return image.resize(target, Image.Resampling.LANCZOS, box=box)


def _open(data: bytes, max_pixels: int) -> ImageFile.ImageFile:
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Exception as error:  # decoders raise anything on hostile bytes; each is a reject with its reason
        raise _unread(data, error) from error
    if image.width * image.height > max_pixels:
        raise ImageError("image has too many pixels", f"{image.width}x{image.height}, limit {max_pixels}")
    colour.check_coding(image, data)
    return image


def _unread(data: bytes, error: Exception) -> ImageError:
    """Why nothing opened the picture."""
    brand = data[8:12] if data[4:8] == b"ftyp" else b""
    if brand in (b"avif", b"avis") and not features.check("avif"):
        return ImageError("image is AVIF, which this Pillow is built without", "install Pillow from PyPI")
    if brand in (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx"):
        return ImageError("image is HEIC, which is not read", "save it as AVIF, JPEG or PNG")
    if data.startswith((b"\xff\x0a", b"\0\0\0\x0cJXL ")):
        return ImageError("image is JPEG XL, which is not read", "save it as AVIF, JPEG or PNG")
    if isinstance(error, UnidentifiedImageError):  # its text holds an address in memory
        return ImageError("image cannot be decoded", f"not a whole {', '.join(FORMATS)} file")
    return ImageError("image cannot be decoded", f"{type(error).__name__}: {error}"[:200])


def _verify(data: bytes) -> None:
    """Compare the checksums of a PNG's chunks, which decoding does not."""
    try:
        with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
            image.verify()
    except Exception as error:  # as in _open
        raise ImageError("image cannot be decoded", f"{type(error).__name__}: {error}"[:200]) from error


def _decoded(image: ImageFile.ImageFile) -> tuple[Image.Image, int]:
    """The upright RGB picture, and the EXIF orientation that it was turned by."""
    try:
        shown = colour.load(image)
    except ImageError:
        raise
    except Exception as error:  # as in _open
        raise ImageError("image cannot be decoded", f"{type(error).__name__}: {error}"[:200]) from error
    # Asked for when loaded: then the decoder has taken away what it turned by itself (TIFF).
    orientation = _orientation(image)
    turn = _UPRIGHT.get(orientation)
    return (shown if turn is None else shown.transpose(turn)), orientation


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(_EXIF_ORIENTATION, 1))
    except Exception:  # a broken EXIF block says nothing about the picture
        return 1
