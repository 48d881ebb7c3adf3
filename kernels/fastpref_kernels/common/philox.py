"""Philox4x32-10 and Box-Muller as device functions, for every kernel that regenerates noise from a key.

Nothing here needs local memory: the angle is reduced and its sine and cosine are polynomials, where the library's
take a slow path through the stack. The fused multiply-adds are explicit, so the compiler cannot contract the rounded
angle into what follows and every device reduces the angle that the CPU path rounds to.
Source: Salmon et al., Parallel random numbers: as easy as 1, 2, 3 (SC 2011), section 4.3; Cody and Waite, Software
manual for the elementary functions (1980), for the reduction.
"""

# mypy: allow-incomplete-defs, allow-untyped-defs
from __future__ import annotations

from .dispatch import jit, tl


@jit
def _philox4x32(c0, c1, c2, c3, k0, k1):
    """Philox4x32-10 on uint32 blocks."""
    for _ in range(10):
        low0 = c0 * 0xD2511F53
        low1 = c2 * 0xCD9E8D57
        high0 = tl.umulhi(c0, tl.full(c0.shape, 0xD2511F53, tl.uint32))
        high1 = tl.umulhi(c2, tl.full(c2.shape, 0xCD9E8D57, tl.uint32))
        c0 = high1 ^ c1 ^ k0
        c2 = high0 ^ c3 ^ k1
        c1 = low1
        c3 = low0
        k0 = k0 + 0x9E3779B9
        k1 = k1 + 0xBB67AE85
    return c0, c1, c2, c3


@jit
def _uniform(word):
    """A 32-bit word to (0, 1]; only the sum rounds."""
    return word.to(tl.float32) * 2.3283064365386963e-10 + 2.3283064365386963e-10


@jit
def _cosine_sine(angle):
    """(cos, sin) of fp32 angles in [0, 2 pi], each to 8e-8 absolute.

    angle = quadrant * pi/2 + r with |r| <= pi/4; pi/2 is split in two, of which the first has so few bits that its
    product with the quadrant is exact. The coefficients are a minimax fit of (sin r / r - 1) / r^2 and
    (cos r - 1 + r^2/2) / r^4 in powers of r^2.
    """
    quadrant = tl.floor(tl.fma(angle, tl.full(angle.shape, 0.6366197723675814, tl.float32), 0.5))
    r = tl.fma(quadrant, -1.57080078125, angle)
    r = tl.fma(quadrant, 4.454454938240815e-06, r)
    y = r * r
    s = tl.fma(y, -0.00019517233886290342, 0.008332177996635437)
    s = tl.fma(y, s, -0.16666655242443085)
    sine = tl.fma(r * y, s, r)
    c = tl.fma(y, 2.4438379114144482e-05, -0.0013887366512790322)
    c = tl.fma(y, c, 0.04166664555668831)
    cosine = tl.fma(y * y, c, tl.fma(y, -0.5, 1.0))
    turn = quadrant.to(tl.int32)
    odd = (turn & 1) == 1
    cos_out = tl.where(odd, sine, cosine)
    sin_out = tl.where(odd, cosine, sine)
    return tl.where(((turn + 1) & 2) == 2, -cos_out, cos_out), tl.where((turn & 2) == 2, -sin_out, sin_out)


@jit
def _box_muller(radius_word, angle_word):
    """Two standard normals of two words."""
    radius = tl.sqrt_rn(-2.0 * tl.log(_uniform(radius_word)))
    full_turn = tl.full(radius.shape, 6.283185307179586, tl.float32)
    cosine, sine = _cosine_sine(tl.fma(_uniform(angle_word), full_turn, 0.0))
    return radius * cosine, radius * sine


@jit
def _normals(key, first, BLOCK_SIZE: tl.constexpr):
    """4 * BLOCK_SIZE normals of the Philox blocks first .. first + BLOCK_SIZE, in element order."""
    counter = (first + tl.arange(0, BLOCK_SIZE)).to(tl.uint32)
    zero = tl.zeros((BLOCK_SIZE,), tl.uint32)
    low = zero + key.to(tl.uint32)
    high = zero + (key >> 32).to(tl.uint32)
    w0, w1, w2, w3 = _philox4x32(counter, zero, zero, zero, low, high)
    z0, z1 = _box_muller(w0, w1)
    z2, z3 = _box_muller(w2, w3)
    return tl.interleave(tl.interleave(z0, z2), tl.interleave(z1, z3))
