"""Every mode and format gives the picture that a viewer shows, or a reject that says why."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageOps, features

from fastpref.data.images import ImageError, load_rgb, probe

LIMIT = 1 << 20
GREY = np.arange(256, dtype=np.uint8).reshape(16, 16)
RGB = np.stack([GREY, GREY.T, 255 - GREY], axis=-1)
ALPHA = np.where(np.arange(16) < 8, 255, 0).astype(np.uint8)[None].repeat(16, 0)
WHITE_BESIDE = np.where(ALPHA[..., None] == 255, RGB, 255)
needs_avif = pytest.mark.skipif(not features.check("avif"), reason="Pillow is built without AVIF")


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png(depth: int, colour: int, rows: np.ndarray, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG of packed ``rows`` (height, bytes), with more chunks before the pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    channels = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour]
    header = struct.pack(">IIBBBBB", rows.shape[1] * 8 // (depth * channels), len(rows), depth, colour, 0, 0, 0)
    body = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    parts = [(b"IHDR", header), *chunks, (b"IDAT", body), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def big(values: np.ndarray) -> np.ndarray:
    """8 bits as 16, big-endian bytes: 255 becomes 65535."""
    return (values.astype(">u2") * 257).reshape(len(values), -1).view(np.uint8)


def pixels(data: bytes) -> np.ndarray:
    shown = load_rgb(data, LIMIT)
    assert probe(data, LIMIT).size == shown.size and shown.mode == "RGB"
    return np.asarray(shown).astype(int)


def grey(values: np.ndarray) -> np.ndarray:
    return values[..., None].repeat(3, -1)


def _palette(transparent: bytes | int) -> bytes:
    image = Image.fromarray(GREY).convert("P", palette=Image.Palette.ADAPTIVE)
    return encoded(image, "PNG", transparency=transparent)


def _lab() -> bytes:
    # neutral greys: Lab of 8 bits holds them to half a step of L, 2.55/2 levels of 255 times a slope of at most 1.1
    grey_rgb = Image.fromarray(grey(GREY))
    srgb, lab = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    made = ImageCms.profileToProfile(grey_rgb, srgb, lab, outputMode="LAB")
    assert made is not None
    return encoded(made, "TIFF")


GREY16 = GREY.astype(np.uint16) * 257
EXACT: dict[str, tuple[Callable[[], bytes], np.ndarray]] = {
    "16-bit grey PNG": (lambda: encoded(Image.fromarray(GREY16), "PNG"), grey(GREY)),
    "16-bit grey TIFF": (lambda: encoded(Image.fromarray(GREY16), "TIFF"), grey(GREY)),
    "16-bit grey TIFF, big-endian": (
        lambda: encoded(Image.frombytes("I;16B", (16, 16), GREY16.astype(">u2").tobytes()), "TIFF"),
        grey(GREY),
    ),
    "16-bit grey TIFF, deflate": (
        lambda: encoded(Image.fromarray(GREY16), "TIFF", compression="tiff_adobe_deflate"),
        grey(GREY),
    ),
    "16-bit grey TIFF, white is zero": (
        lambda: encoded(Image.fromarray(GREY16), "TIFF", tiffinfo={262: 0}),
        grey(255 - GREY),
    ),
    "8-bit grey TIFF, white is zero": (lambda: encoded(Image.fromarray(GREY), "TIFF", tiffinfo={262: 0}), grey(GREY)),
    "16-bit grey PNG, a transparent grey": (
        lambda: png(16, 0, big(GREY), (b"tRNS", struct.pack(">H", 3 * 257))),
        grey(np.where(GREY == 3, 255, GREY)),
    ),
    "16-bit grey and alpha PNG": (
        lambda: png(16, 4, big(np.stack([GREY, ALPHA], -1))),
        np.where(ALPHA[..., None] == 255, grey(GREY), 255),
    ),
    "16-bit RGB PNG": (lambda: png(16, 2, big(RGB)), RGB),
    "16-bit RGBA PNG": (lambda: png(16, 6, big(np.dstack([RGB, ALPHA]))), WHITE_BESIDE),
    "8-bit RGB PNG, a transparent colour": (
        lambda: png(8, 2, RGB.reshape(16, -1), (b"tRNS", struct.pack(">3H", *RGB[2, 5]))),
        np.where((RGB[2, 5] == RGB).all(-1, keepdims=True), 255, RGB),
    ),
    "4-bit grey PNG, a transparent grey": (
        lambda: png(4, 0, np.full((8, 4), 0x37, np.uint8), (b"tRNS", b"\0\3")),
        grey(np.tile([255, 0x77], (8, 4))),
    ),
    "2-bit grey PNG, a transparent grey": (
        lambda: png(2, 0, np.full((8, 2), 0b01101101, np.uint8), (b"tRNS", b"\0\1")),
        grey(np.tile([255, 170, 255, 255], (8, 2))),
    ),
    "1-bit PNG, black is transparent": (
        lambda: png(1, 0, np.full((8, 1), 0xF0, np.uint8), (b"tRNS", b"\0\0")),
        grey(np.full((8, 8), 255)),
    ),
    "1-bit PNG": (lambda: png(1, 0, np.full((8, 1), 0xF0, np.uint8)), grey(np.tile([255] * 4 + [0] * 4, (8, 1)))),
    "grey and alpha PNG": (
        lambda: encoded(Image.fromarray(np.dstack([GREY, ALPHA])), "PNG"),
        np.where(ALPHA[..., None] == 255, grey(GREY), 255),
    ),
    "palette PNG, one entry transparent": (lambda: _palette(0), None),
    "palette PNG, alpha of every entry": (lambda: _palette(bytes(range(256))), None),
    "palette and alpha TIFF": (
        lambda: encoded(Image.fromarray(GREY).convert("P").convert("PA"), "TIFF"),
        grey(GREY),
    ),
    "CMYK TIFF": (lambda: encoded(Image.fromarray(RGB).convert("CMYK"), "TIFF"), RGB),
    "RGBA TIFF": (lambda: encoded(Image.fromarray(np.dstack([RGB, ALPHA])), "TIFF"), WHITE_BESIDE),
    "BMP": (lambda: encoded(Image.fromarray(RGB), "BMP"), RGB),
    "lossless WebP with alpha": (
        lambda: encoded(Image.fromarray(np.dstack([RGB, ALPHA])), "WEBP", lossless=True),
        WHITE_BESIDE,
    ),
}


@pytest.mark.parametrize("name", EXACT)
def test_the_picture_is_that_of_8_bits(name):
    make, wanted = EXACT[name]
    data = make()
    if wanted is None:  # a palette: what any viewer does, entry by entry
        layer = np.asarray(Image.open(io.BytesIO(data)).convert("RGBA")).astype(float)
        wanted = np.rint(layer[..., :3] * layer[..., 3:] / 255 + 255 - layer[..., 3:])
        assert np.abs(pixels(data) - wanted).max() <= 1  # one rounding more
    else:
        assert np.array_equal(pixels(data), wanted)


@pytest.mark.parametrize("bits", [12, 16])
def test_16_bits_are_rounded_to_the_nearest_of_8(bits):
    top, values = (1 << bits) - 1, np.linspace(0, (1 << bits) - 1, 4096).astype(np.uint16).reshape(64, 64)
    data = encoded(Image.fromarray(values), "TIFF")
    if bits == 12:  # three bytes hold two values
        pair = values.reshape(-1, 2).astype(np.uint32)
        packed = (pair[:, 0] << 12 | pair[:, 1]).astype(">u4").view(np.uint8).reshape(-1, 4)[:, 1:].tobytes()
        data = _tiff(64, 64, 12, packed)
    assert np.abs(pixels(data)[..., 0] - values / top * 255).max() <= 0.5


def _tiff(width: int, height: int, bits: int, data: bytes, sample_format: int = 1, photometric: int = 1) -> bytes:
    """An uncompressed grey TIFF of one strip."""
    tags = [(256, width), (257, height), (258, bits), (259, 1), (262, photometric), (273, 8 + 2 + 10 * 12 + 4)]
    tags += [(277, 1), (278, height), (279, len(data)), (339, sample_format)]
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4) + data


# YCbCr and chroma at half size: on a picture without colour they leave only the codec's own rounding.
@pytest.mark.parametrize(
    ("mode", "kind", "options", "levels"),
    [
        ("CMYK", "JPEG", {"quality": 100}, 3),
        ("L", "JPEG", {"quality": 100}, 3),
        ("YCbCr", "TIFF", {}, 1),
        ("RGB", "TIFF", {"compression": "jpeg", "quality": 100}, 4),
        ("L", "GIF", {}, 0),
        pytest.param("RGB", "AVIF", {"quality": 100, "subsampling": "4:4:4"}, 4, marks=needs_avif),
        pytest.param("L", "AVIF", {"quality": 100}, 4, marks=needs_avif),
    ],
)
def test_other_codings_of_a_grey_picture_stay_within_their_rounding(mode, kind, options, levels):
    data = encoded(Image.fromarray(grey(GREY)).convert(mode), kind, **options)
    assert np.abs(pixels(data) - grey(GREY)).max() <= levels


def test_ycck_is_read_as_adobe_writes_it():
    """A CMYK JPEG whose Adobe marker says that C, M, Y were coded as YCC: taken back, then shown like any CMYK."""
    stored = np.array([120, 100, 150, 200])  # as in the file, inverted
    ink = Image.frombytes("CMYK", (16, 16), bytes(255 - stored.astype(np.uint8)) * 256)
    data = bytearray(encoded(ink, "JPEG", quality=100))
    at = data.index(b"Adobe") + 11
    data[at] = 2
    y, blue, red = stored[0], stored[1] - 128, stored[2] - 128
    cmy = np.array([y + 1.402 * red, y - 0.344136 * blue - 0.714136 * red, y + 1.772 * blue])
    wanted = (255 - cmy) * stored[3] / 255
    assert np.abs(pixels(bytes(data)) - wanted).max() <= 3  # a coefficient, the matrix and the product, rounded


def test_lab_is_shown_in_srgb():
    assert np.abs(pixels(_lab()) - grey(GREY)).max() <= 3


@pytest.mark.parametrize(
    ("name", "data", "reason"),
    [
        ("float", encoded(Image.fromarray(GREY.astype(np.float32)), "TIFF"), "image has no defined black and white"),
        ("signed", _tiff(16, 16, 16, GREY16.tobytes(), 2), "image has no defined black and white"),
        ("32 bits", encoded(Image.fromarray(GREY.astype(np.int32)), "TIFF"), "image has no defined black and white"),
        ("16-bit key", png(16, 2, big(RGB), (b"tRNS", bytes(6))), "image has a transparent colour of 16 bits"),
        (
            "PQ",
            png(8, 2, RGB.reshape(16, -1), (b"cICP", b"\x09\x10\0\1")),
            "image is HDR or wide-gamut without a profile",
        ),
        ("HEIC", b"\0\0\0\x18ftypheic" + bytes(64), "image is HEIC, which is not read"),
        ("JPEG XL", b"\xff\x0a" + bytes(64), "image is JPEG XL, which is not read"),
        ("PSD", b"8BPS\0\1" + bytes(64), "image cannot be decoded"),
    ],
)
def test_what_has_no_defined_look_is_refused(name, data, reason):
    for read in (probe, load_rgb):
        with pytest.raises(ImageError) as caught:
            read(data, LIMIT)
        assert caught.value.reason == reason
        assert " at 0x" not in caught.value.detail  # an address would differ from run to run


@needs_avif
@pytest.mark.filterwarnings("ignore:image file could not be identified")
def test_avif_names_its_colours_too(monkeypatch):
    data = encoded(Image.fromarray(RGB), "AVIF")
    at = data.index(b"colrnclx") + 8
    assert pixels(data).shape == (16, 16, 3)
    for primaries, curve in ((12, 13), (9, 16)):
        other = data[:at] + struct.pack(">HH", primaries, curve) + data[at + 4 :]
        with pytest.raises(ImageError, match="HDR or wide-gamut"):
            probe(other, LIMIT)
    monkeypatch.setattr("PIL.AvifImagePlugin.SUPPORTED", False)
    monkeypatch.setattr("PIL.features.check", lambda name: name != "avif")
    with pytest.raises(ImageError, match="this Pillow is built without"):
        probe(data, LIMIT)


ANIMATED = ["GIF", "WEBP", "PNG", pytest.param("AVIF", marks=needs_avif), "TIFF", "MPO"]


@pytest.mark.parametrize("kind", ANIMATED)
def test_of_several_frames_the_first_is_shown(kind):
    first, second = Image.new("RGB", (32, 32), (0, 0, 255)), Image.new("RGB", (32, 32), (255, 0, 0))
    data = encoded(first, kind, save_all=True, append_images=[second])
    assert np.abs(pixels(data) - np.asarray([0, 0, 255])).max() <= 4  # the codecs' rounding; never the red one


def test_a_png_shows_its_default_picture():
    first, moving = Image.new("RGB", (8, 8), "blue"), [Image.new("RGB", (8, 8), name) for name in ("red", "lime")]
    data = encoded(first, "PNG", save_all=True, append_images=moving, default_image=True)
    assert (pixels(data) == [0, 0, 255]).all()


def test_a_first_frame_smaller_than_the_screen_leaves_the_rest_empty():
    data = bytearray(encoded(Image.fromarray(np.full((16, 16), 7, np.uint8)), "GIF"))
    data[6:10] = struct.pack("<HH", 24, 20)
    shown = pixels(bytes(data))
    assert shown.shape == (20, 24, 3)
    assert (shown[:16, :16] == 7).all()
    assert (shown[16:] == 255).all() and (shown[:, 16:] == 255).all()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "MPO", pytest.param("AVIF", marks=needs_avif)])
def test_a_picture_is_turned_once(kind, orientation):
    stored = Image.new("RGB", (48, 32), "black")
    stored.paste("white", (0, 0, 16, 32))
    stored.paste("red", (0, 0, 16, 16))
    exif = Image.Exif()
    exif[0x0112] = orientation
    more = {"save_all": True, "append_images": [stored]} if kind == "MPO" else {}
    data = encoded(stored, kind, exif=exif, **more)
    with Image.open(io.BytesIO(data)) as image:
        image.load()
        wanted = np.asarray(ImageOps.exif_transpose(image).convert("RGB")).astype(int)
    upright = np.asarray(ImageOps.exif_transpose(_tagged(stored, orientation))).astype(int)
    shown = pixels(data)
    assert np.array_equal(shown, wanted)
    assert np.abs(shown - upright).mean() < 12  # codecs blur the edges; a picture turned wrong is off by 60 and more


def _tagged(image: Image.Image, orientation: int) -> Image.Image:
    image = image.copy()
    image.getexif()[0x0112] = orientation
    return image


@pytest.mark.parametrize("kind", ["JPEG", "TIFF", "WEBP"])
def test_an_orientation_in_xmp_counts_where_exif_has_none(kind):
    stored = Image.new("RGB", (48, 32), "black")
    xmp = b"<x:xmpmeta xmlns:x='adobe:ns:meta/'><tiff:Orientation>6</tiff:Orientation></x:xmpmeta>"
    options = {"tiffinfo": {700: xmp}} if kind == "TIFF" else {"xmp": xmp}
    assert pixels(encoded(stored, kind, **options)).shape == (48, 32, 3)


def test_a_large_jpeg_tried_at_an_eighth_has_its_full_size():
    exif = Image.Exif()
    exif[0x0112] = 6
    assert probe(encoded(Image.new("RGB", (605, 397)), "JPEG", exif=exif), LIMIT).size == (397, 605)


# Colorants adapted to D50, and the sRGB curve: the public definitions of the colour spaces.
SRGB = np.array([[0.43607, 0.38515, 0.14307], [0.22249, 0.71687, 0.06061], [0.01392, 0.09708, 0.71410]])
ADOBE = np.array([[0.60974, 0.20528, 0.14919], [0.31111, 0.62567, 0.06322], [0.01947, 0.06087, 0.74457]])
P3 = np.array([[0.51512, 0.29198, 0.15710], [0.24120, 0.69225, 0.06657], [-0.00105, 0.04189, 0.78407]])


def _profile(space: bytes, tags: dict[bytes, bytes], connection: bytes = b"XYZ ", kind: bytes = b"mntr") -> bytes:
    """An ICC version 2 profile."""
    tags = {b"wtpt": _xyz([0.9642, 1.0, 0.8249]), **tags}
    table, body, start = b"", b"", 128 + 4 + 12 * len(tags)
    for name, content in tags.items():
        table += name + struct.pack(">II", start + len(body), len(content))
        body += content + bytes(-len(content) % 4)
    header = struct.pack(">I4sI4s4s4s", start + len(body), b"lcms", 0x02100000, kind, space, connection)
    header += bytes(12) + b"acsp" + bytes(28) + struct.pack(">3i", 63190, 65536, 54061)
    return header.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + body


def _xyz(values) -> bytes:
    return b"XYZ \0\0\0\0" + struct.pack(">3i", *(round(v * 65536) for v in values))


def _gamma(value: float) -> bytes:
    return b"curv\0\0\0\0" + struct.pack(">IH", 1, round(value * 256))


def _rgb_profile(matrix: np.ndarray, gamma: float) -> bytes:
    columns = {name + b"XYZ": _xyz(matrix[:, i]) for i, name in enumerate((b"r", b"g", b"b"))}
    return _profile(b"RGB ", {**columns, **{name + b"TRC": _gamma(gamma) for name in (b"r", b"g", b"b")}})


def _srgb_of(linear: np.ndarray) -> np.ndarray:
    """Linear light to sRGB, 0..255, in float64."""
    light = np.clip(linear, 0, 1)
    return 255 * np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)


@pytest.mark.parametrize(("matrix", "least"), [(ADOBE, 40), (P3, 20)])
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
def test_an_embedded_profile_is_applied(matrix, least, kind):
    gamma = 563 / 256
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(Image.fromarray(RGB), kind, icc_profile=_rgb_profile(matrix, gamma), **options)
    wanted = _srgb_of((RGB / 255) ** gamma @ (np.linalg.inv(SRGB) @ matrix).T)
    shown = pixels(data)
    assert np.abs(wanted - RGB).max() > least, "without it the picture would be far off"
    assert np.abs(shown - wanted).max() <= 1.5  # rounded to 8 bits, from 14 bits of linear light and 5 digits of matrix


def test_a_grey_profile_and_alpha_are_applied_together():
    profile = _profile(b"GRAY", {b"kTRC": _gamma(1.0)})
    data = encoded(Image.fromarray(np.dstack([GREY, ALPHA])), "PNG", icc_profile=profile)
    wanted = np.where(ALPHA == 255, _srgb_of(GREY / 255), 255)
    assert np.abs(pixels(data) - grey(wanted)).max() <= 0.6  # rounding to 8 bits, from 16
    deep = encoded(Image.fromarray(GREY16), "PNG", icc_profile=profile)
    assert np.abs(pixels(deep) - grey(_srgb_of(GREY / 255))).max() <= 0.6


def test_a_cmyk_profile_says_what_ink_looks_like():
    """Here cyan is printed as a grey of L* 50 (118.9 in sRGB), black as black, and the other inks leave no trace."""
    light = [0 if i & 1 else 128 if i & 8 else 255 for i in range(16)]
    corners = np.array([[value, 128, 128] for value in light], np.uint8)
    ramp = np.arange(256, dtype=np.uint8).tobytes()
    lut = b"mft1\0\0\0\0" + struct.pack(">BBBx9i", 4, 3, 2, *[65536 * (i % 4 == 0) for i in range(9)])
    profile = _profile(b"CMYK", {b"A2B0": lut + ramp * 4 + corners.tobytes() + ramp * 3}, b"Lab ", b"prtr")
    ink = np.zeros((16, 16, 4), np.uint8)
    ink[:, 8:, 0] = 255
    for kind, options in (("TIFF", {}), ("JPEG", {"quality": 100})):
        shown = pixels(encoded(Image.frombytes("CMYK", (16, 16), ink.tobytes()), kind, icc_profile=profile, **options))
        # L* in 8 bits is 0.39 a step: one level of 255 and the rounding
        assert np.abs(shown[:, 10:] - 118.9).max() <= 2
        assert shown[:, :6].min() >= 253


@pytest.mark.parametrize(
    "profile",
    [
        ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes(),
        b"no profile at all",
        _rgb_profile(ADOBE, 2.2)[:200],
        _profile(b"GRAY", {b"kTRC": _gamma(1.0)}),
        _profile(b"CMYK", {}),
    ],
    ids=["sRGB", "broken", "cut", "grey on RGB", "CMYK on RGB"],
)
def test_srgb_and_profiles_that_do_not_fit_leave_the_pixels(profile):
    assert np.array_equal(pixels(encoded(Image.fromarray(RGB), "PNG", icc_profile=profile)), RGB)
