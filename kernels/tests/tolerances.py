"""The one table of tolerances: (absolute, relative) by the dtype that a result is rounded to.

fp32: sums of up to 1e5 terms of order one, and log, exp and cos good to a few units in the last place. Half types:
one rounding of the result, half a unit in the last place, everything before it being fp32.

What an op multiplies its own rounding by (a temperature, a beta) comes on top, from `softmax_rounding` and
`sum_rounding`: no order of a sum is promised, and BLAS kernels differ between processors.
"""

from __future__ import annotations

import math

import torch

TOLERANCES = {
    torch.float64: (1e-12, 1e-12),
    torch.float32: (1e-6, 2e-6),
    torch.bfloat16: (1e-6, 2.0**-8),
    torch.float16: (1e-6, 2.0**-11),
}


def sum_rounding(terms: int, dtype: torch.dtype = torch.float32) -> float:
    """Error of a sum of `terms` products in any order, over the sum of their magnitudes; u is the unit roundoff.

    At most n u, whatever the order (Higham, Accuracy and Stability of Numerical Algorithms, section 3.1). Long sums
    stay below 6 sqrt(n) u: independent roundings exceed lambda sqrt(n) u with probability 2 exp(-lambda^2 / 2), here
    3e-8 (Higham and Mary, SIAM J. Sci. Comput. 41, 2019).
    """
    return torch.finfo(dtype).eps / 2 * min(terms, 6 * math.sqrt(terms))


def softmax_rounding(dim: int, temperature: float, dtype: torch.dtype = torch.float32) -> float:
    """Relative error of softmax weights of cosines over `dim` terms, divided by a temperature.

    A cosine is off by delta: the dot product by sum_rounding(dim), each norm by half of that, and ten single roundings
    (square roots, reciprocals, products, the division by the temperature, the subtraction of the maximum). A logit is
    then off by delta / temperature, and a weight, in numerator and denominator, by a factor of
    exp(2 delta / temperature): at temperature 1e-4 rounding in the seventh digit shows in the third.
    """
    delta = 2 * sum_rounding(dim, dtype) + 10 * torch.finfo(dtype).eps / 2
    return math.expm1(2 * delta / temperature)


def assert_close(result: torch.Tensor, oracle: torch.Tensor, scale: float = 1.0, amplified: float = 0.0) -> None:
    """`result` equals the float64 oracle to its dtype's tolerance.

    scale: the size of what was summed. amplified: relative error from rounding that the op itself multiplies.
    """
    assert result.shape == oracle.shape
    absolute, relative = TOLERANCES[result.dtype]
    torch.testing.assert_close(
        result.double(), oracle.double(), atol=absolute * scale, rtol=relative + amplified, check_device=False
    )
