"""Encoded pictures to RGB pixels of a bucket: decoded with limits, upright, cropped to its aspect, never stretched."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from PIL import Image

from fastpref.data.buckets import Size

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
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


class ImageError(Exception):
    """A picture that cannot be used: ``reason`` in a few fixed words, ``detail`` from the decoder."""

    def __init__(self, reason: str, detail: str = "") -> None:
        self.reason, self.detail = reason, detail
        super().__init__(reason, detail)


@contextmanager
def own_pixel_limit() -> Iterator[None]:
    """Leave the limit on pixels to ``max_pixels`` of :func:`probe` and :func:`load_rgb`."""
    before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = before


def probe(data: bytes, max_pixels: int) -> Size:
    """Width and height of the upright picture, after a trial decode (JPEG: at an eighth of the size).

    Raises:
        ImageError: no picture in one of :data:`FORMATS`, cut short, or of more than ``max_pixels`` pixels.
    """
    with _open(data, max_pixels) as image:
        if image.format == "PNG":
            _verify(data)
        width, height = image.size
        sideways = _orientation(image) in _SIDEWAYS
        image.draft("RGB", (max(1, width // 8), max(1, height // 8)))
        _load(image)
    return (height, width) if sideways else (width, height)


def load_rgb(data: bytes, max_pixels: int) -> Image.Image:
    """The upright RGB picture (first frame; transparent pixels over white); raises as :func:`probe`."""
    with _open(data, max_pixels) as image:
        turn = _UPRIGHT.get(_orientation(image))
        _load(image)
        if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA", "RGBa", "La"):
            layer = image.convert("RGBA")
            rgb = Image.new("RGB", layer.size, "white")
            rgb.paste(layer, mask=layer.getchannel("A"))
        else:
            rgb = image.convert("RGB")
    return rgb if turn is None else rgb.transpose(turn)


@dataclass(frozen=True)
class Fit:
    """How a picture enters its bucket: the part kept, in its own pixels, and SDXL's crop ids, in resized pixels."""

    box: tuple[float, float, float, float]  # left, upper, right, lower
    crop_top: int
    crop_left: int


def fit(size: Size, target: Size) -> Fit:
    """The largest centred box of ``target``'s aspect ratio in a picture of ``size``.

    The box has fractional edges, so its aspect ratio is exact. A picture smaller than the target is enlarged.
    """
    width, height = size
    scale = max(target[0] / width, target[1] / height)
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


def _open(data: bytes, max_pixels: int) -> Image.Image:
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Exception as error:  # decoders raise anything on hostile bytes; each is a reject with its reason
        raise ImageError("image cannot be decoded", f"{type(error).__name__}: {error}"[:200]) from error
    if image.width * image.height > max_pixels:
        raise ImageError("image has too many pixels", f"{image.width}x{image.height}, limit {max_pixels}")
    return image


def _verify(data: bytes) -> None:
    """Compare the checksums of a PNG's chunks, which decoding does not."""
    try:
        with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
            image.verify()
    except Exception as error:  # as in _open
        raise ImageError("image cannot be decoded", f"{type(error).__name__}: {error}"[:200]) from error


def _load(image: Image.Image) -> None:
    try:
        image.load()
    except Exception as error:  # as in _open
        raise ImageError("image cannot be decoded", f"{type(error).__name__}: {error}"[:200]) from error


def _orientation(image: Image.Image) -> int:
    # A PNG's EXIF may follow the pixels; asking for it would decode them, so only a leading one counts.
    if image.format == "PNG" and "exif" not in image.info:
        return 1
    try:
        return int(image.getexif().get(_EXIF_ORIENTATION, 1))
    except Exception:  # a broken EXIF block says nothing about the picture
        return 1
