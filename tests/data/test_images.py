"""Pixels: upright, cropped and never stretched; buckets of one area; hostile bytes are refused."""

from __future__ import annotations

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fastpref.data.buckets import bucket_granularity, choose_buckets, make_buckets
from fastpref.data.images import ImageError, fit, load_rgb, probe, to_bucket
from fastpref.errors import UserError

LIMIT = 10_000_000
SIDES = st.integers(8, 300)
TARGETS = st.sampled_from([*make_buckets(64, 8), (32, 32), (8, 8)])
# Eight pixels leave no run between the cut Lanczos windows long enough to measure a slope in 8-bit values.
MEASURABLE = st.sampled_from([*make_buckets(64, 8), (32, 32), (16, 16)])


def _encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@given(width=SIDES, height=SIDES, target=TARGETS)
def test_the_box_has_the_target_aspect_is_centred_and_touches_two_edges(width, height, target):
    left, top, right, bottom = fit((width, height), target).box
    assert (right - left) / (bottom - top) == pytest.approx(target[0] / target[1], rel=1e-9)
    assert left == pytest.approx(width - right, abs=1e-6)
    assert top == pytest.approx(height - bottom, abs=1e-6)
    assert min(left, top) == pytest.approx(0, abs=1e-6)


@settings(max_examples=40, deadline=None)
@given(width=st.integers(40, 200), height=st.integers(40, 200), target=MEASURABLE)
def test_pixels_are_never_stretched(width, height, target):
    """Red counts columns, green rows: in the result both advance by the same number of source pixels a pixel."""
    columns, rows = np.meshgrid(np.arange(width), np.arange(height))
    pixels = np.stack([columns, rows, np.zeros_like(rows)], axis=-1).astype(np.uint8)
    out = np.asarray(to_bucket(Image.fromarray(pixels), target), dtype=float)
    assert out.shape == (target[1], target[0], 3)
    # two pixels in: nearer to the edge the Lanczos window is cut and leans inwards
    across = (out[:, -3, 0] - out[:, 2, 0]).mean() / (target[0] - 5)
    down = (out[-3, :, 1] - out[2, :, 1]).mean() / (target[1] - 5)
    scale = min(width / target[0], height / target[1])
    assert across == pytest.approx(scale, abs=0.06 + 1.5 / (target[0] - 3))
    assert down == pytest.approx(scale, abs=0.06 + 1.5 / (target[1] - 3))


def test_crop_ids_are_those_of_the_resized_picture():
    found = fit((64, 32), (32, 32))
    assert (found.box, found.crop_top, found.crop_left) == ((16, 0, 48, 32), 0, 16)
    assert fit((128, 256), (32, 32)).crop_top == 16  # resized to 32×64
    assert fit((16, 32), (32, 32)).box == (0, 8, 16, 24)  # enlarged to 32×64
    assert fit((16, 32), (32, 32)).crop_top == 16


def test_a_picture_of_the_target_size_is_kept_exactly(picture):
    image = load_rgb(picture(3), LIMIT)
    assert np.array_equal(np.asarray(to_bucket(image, (32, 32))), np.asarray(image))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_exif_orientation_is_applied(kind):
    image = Image.new("RGB", (40, 20), "black")
    image.paste("white", (0, 0, 20, 20))  # stored: left half white
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned clockwise: white on top
    data = _encoded(image, kind, exif=exif)
    assert probe(data, LIMIT).size == (20, 40)
    pixels = np.asarray(load_rgb(data, LIMIT))
    assert pixels.shape == (40, 20, 3)
    assert pixels[:18].min() > 240
    assert pixels[22:].max() < 15


def test_transparent_pixels_are_shown_over_white():
    layer = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    layer.putpixel((0, 0), (0, 0, 255, 255))
    pixels = np.asarray(load_rgb(_encoded(layer), LIMIT))
    assert pixels[0, 0].tolist() == [0, 0, 255]
    assert pixels[1, 1].tolist() == [255, 255, 255]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_cut_short_and_foreign_bytes_are_refused(kind, picture):
    data = picture(1, (64, 64), kind)
    assert probe(data, LIMIT).size == (64, 64)
    for bad in (data[: len(data) * 2 // 3], data[:20], b"GIF89a", b"%!PS-Adobe-3.0 EPSF-3.0\n", b""):
        with pytest.raises(ImageError) as caught:
            probe(bad, LIMIT)
        assert caught.value.reason == "image cannot be decoded"


def test_a_decompression_bomb_is_refused_by_its_header(picture):
    data = bytearray(picture(1))
    data[16:24] = (60_000).to_bytes(4, "big") * 2  # width and height in the PNG header
    import zlib

    data[29:33] = zlib.crc32(bytes(data[12:29])).to_bytes(4, "big")
    with pytest.raises(ImageError) as caught:
        probe(bytes(data), LIMIT)
    assert caught.value.reason in ("image has too many pixels", "image cannot be decoded")
    with pytest.raises(ImageError, match="too many pixels"):
        probe(picture(1, (40, 30)), 1199)
    assert probe(picture(1, (40, 30)), 1200).size == (40, 30)


@pytest.mark.parametrize(("resolution", "granularity"), [(1024, 64), (512, 64), (32, 8), (64, 8), (256, 16)])
def test_buckets_have_one_area_and_granular_sides(resolution, granularity):
    buckets = make_buckets(resolution, granularity)
    assert (resolution, resolution) in buckets
    assert len(set(buckets)) == len(buckets)
    assert sorted((h, w) for w, h in buckets) == sorted(buckets)
    for width, height in buckets:
        assert width % granularity == height % granularity == 0
        assert max(width, height) <= 4 * min(width, height)
        assert width * height <= resolution**2
        assert (max(width, height) + granularity) * min(width, height) > resolution**2


def test_granularity_is_sdxls_and_fits_small_pictures():
    assert bucket_granularity(1024, 8, 4) == 64
    assert bucket_granularity(256, 8, 4) == 32
    assert bucket_granularity(32, 2, 4) == 8
    with pytest.raises(UserError, match="multiple of 64"):
        make_buckets(1000, 64)


def test_a_pair_gets_the_bucket_between_its_pictures():
    buckets = make_buckets(64, 8)
    wide, tall, square = (128, 32), (32, 128), (64, 64)
    sizes_w = np.asarray([(640, 160), (50, 50), (100, 400), (90, 360)])
    sizes_l = np.asarray([(320, 80), (70, 70), (400, 100), (1, 4)])
    chosen = [buckets[i] for i in choose_buckets(buckets, sizes_w, sizes_l)]
    assert chosen == [wide, square, square, tall]


def test_a_flipped_bit_of_a_png_is_found_by_its_checksums(picture):
    data = bytearray(picture(1, (16, 16)))
    start, found = data.index(b"IDAT") + 4, 0
    for at in range(start, len(data) - 16):
        damaged = data.copy()
        damaged[at] ^= 1
        with pytest.raises(ImageError, match="cannot be decoded"):
            probe(bytes(damaged), 64_000_000)
        found += 1
    assert found > 100
