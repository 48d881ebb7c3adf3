"""A decoded picture of any mode as the 8-bit sRGB picture that a viewer shows, or the reason why there is none."""

from __future__ import annotations

import io
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image, ImageCms, ImageFile

_BITS_PER_SAMPLE, _PHOTOMETRIC, _WHITE_IS_ZERO = 258, 262, 0  # TIFF tags
_SPACE = {"RGB": "RGB", "L": "GRAY", "CMYK": "CMYK"}  # mode → ICC colour space of a profile that is meant for it
_PROFILE_BYTES = 8 << 20
_SRGB_STEPS = 2
# Code points of ITU-T H.273 that are shown as sRGB: BT.709 and SD primaries, and curves close to sRGB's.
_PRIMARIES, _TRANSFERS = (1, 2, 5, 6), (1, 2, 4, 6, 13, 14, 15)


class ImageError(Exception):
    """A picture that cannot be used: ``reason`` in a few fixed words, ``detail`` from the decoder."""

    def __init__(self, reason: str, detail: str = "") -> None:
        self.reason, self.detail = reason, detail
        super().__init__(reason, detail)


def check_coding(image: Image.Image, data: bytes) -> None:
    """Refuse a PNG or AVIF that names HDR or wide-gamut colours by code points alone, which nothing here converts."""
    if "icc_profile" in image.info:
        return
    if image.format == "AVIF":
        at, width = data.find(b"colrnclx", 0, 1 << 16), 2
    elif image.format == "PNG":
        at, width = data.find(b"cICP", 0, max(0, data.find(b"IDAT"))), 1
    else:
        return
    if at < 0:
        return
    start = at + (8 if width == 2 else 4)
    codes = [int.from_bytes(data[start + i * width : start + (i + 1) * width], "big") for i in range(2)]
    if codes[0] not in _PRIMARIES or codes[1] not in _TRANSFERS:
        raise ImageError("image is HDR or wide-gamut without a profile", f"colour primaries and curve {codes}")


def load(image: ImageFile.ImageFile) -> Image.Image:
    """Decode ``image`` (its first frame): RGB, transparent pixels over white, an embedded profile applied.

    The picture is not turned by its EXIF.

    Raises:
        ImageError: the values have no defined black and white (signed, 32-bit or float samples).
        Exception: whatever a decoder raises on damaged bytes.
    """
    tile = image.tile[0] if image.tile else None  # gone once loaded
    image.load()
    profile = image.info.get("icc_profile")
    picture, alpha = _parts(image, str(tile.args) if tile else "")
    rgb = _converted(picture, profile)
    box = tile.extents if tile else None
    if image.format == "GIF" and box is not None and tuple(box) != (0, 0, *image.size):
        covered = Image.new("L", image.size, 0)  # nothing is drawn beside a first frame that is smaller than the screen
        covered.paste(255 if alpha is None else alpha.crop(box), box)
        alpha = covered
    if alpha is None:
        return rgb
    shown = Image.new("RGB", rgb.size, "white")
    shown.paste(rgb, mask=alpha)
    return shown


def _parts(image: Image.Image, raw: str) -> tuple[Image.Image, Image.Image | None]:
    """The picture in mode L, RGB, CMYK or LAB, and its alpha (None: opaque). ``raw``: how the file codes a pixel."""
    key = image.info.get("transparency")
    if image.mode.startswith("I;16"):
        return _of_16_bits(image, key)
    if image.mode in ("I", "F"):
        raise ImageError(
            "image has no defined black and white", f"mode {image.mode}: save it in 8 or 16 bits, unsigned"
        )
    if image.mode == "La":
        image = image.convert("LA")
    if image.mode == "LA":
        return image.getchannel("L"), image.getchannel("A")
    if image.mode in ("RGBA", "PA", "RGBa"):
        layer = image.convert("RGBA")
        return layer.convert("RGB"), layer.getchannel("A")
    if key is not None and image.mode in ("1", "L", "RGB", "P"):
        if image.mode == "RGB" and "16" in raw:
            raise ImageError("image has a transparent colour of 16 bits", "save it with 8 bits a channel")
        # A PNG of 2 or 4 bits names the transparent grey in its own bits.
        image.info["transparency"] = key * {"L;2": 85, "L;4": 17}.get(raw, 1) if image.mode == "L" else key
        layer = image.convert("RGBA")
        return layer.convert("RGB" if image.mode in ("RGB", "P") else "L"), layer.getchannel("A")
    if image.mode in ("L", "RGB", "CMYK", "LAB"):
        return image, None
    return image.convert("L" if image.mode == "1" else "RGB"), None


def _of_16_bits(image: Image.Image, key: Any) -> tuple[Image.Image, Image.Image | None]:
    """Grey of up to 16 bits in 8, rounded."""
    values = np.asarray(image)
    tags = getattr(image, "tag_v2", {})
    bits = tags.get(_BITS_PER_SAMPLE, (16,))
    top = (1 << (bits[0] if isinstance(bits, tuple) else bits)) - 1
    in_8_bits = ((np.minimum(np.arange(1 << 16), top) * 255 + top // 2) // top).astype(np.uint8)
    if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:
        in_8_bits = 255 - in_8_bits
    alpha = None if key is None else Image.fromarray(np.where(values == key, 0, 255).astype(np.uint8))
    return Image.fromarray(in_8_bits[values]), alpha


def _converted(picture: Image.Image, profile: bytes | None) -> Image.Image:
    """sRGB of a picture whose numbers mean what ``profile`` says."""
    transform = _transform(profile, picture.mode) if profile and picture.mode in _SPACE else None
    if transform is None:
        return picture.convert("RGB")
    shown = ImageCms.applyTransform(picture, transform)
    assert shown is not None
    return shown


@lru_cache(maxsize=16)
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """To sRGB; None for sRGB itself and, as in viewers, for a profile that is broken or meant for another mode."""
    if len(profile) > _PROFILE_BYTES:
        return None
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if source.profile.xcolor_space.strip() != _SPACE[mode]:
            return None
        # lcms samples a grey curve too coarsely unless told not to: 10 of 255 in the shadows of linear light.
        flags = ImageCms.Flags.NOOPTIMIZE if mode == "L" else ImageCms.Flags.NONE
        transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB", flags=flags)
    except (ImageCms.PyCMSError, OSError):
        return None
    if mode == "CMYK":
        return transform
    # Every program writes its own sRGB profile; rounding alone is no reason to touch the pixels.
    levels = np.arange(0, 256, 15 if mode == "RGB" else 1, dtype=np.uint8)
    grid = (
        np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(-1, 1, 3) if mode == "RGB" else levels[:, None]
    )
    before = Image.fromarray(np.ascontiguousarray(grid))
    after = ImageCms.applyTransform(before, transform)
    moved = np.abs(np.asarray(after).astype(int) - np.asarray(before.convert("RGB")).astype(int)).max()
    return transform if moved > _SRGB_STEPS else None
