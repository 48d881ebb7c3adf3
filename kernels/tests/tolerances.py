"""The one table of tolerances: (absolute, relative) by the dtype that a result is rounded to.

fp32: sums of up to 1e5 terms of order one, and log, exp and cos good to a few units in the last place. Half types:
one rounding of the result, half a unit in the last place, everything before it being fp32.
"""

from __future__ import annotations

import torch

TOLERANCES = {
    torch.float64: (1e-12, 1e-12),
    torch.float32: (1e-6, 2e-6),
    torch.bfloat16: (1e-6, 2.0**-8),
    torch.float16: (1e-6, 2.0**-11),
}


def assert_close(result: torch.Tensor, oracle: torch.Tensor, scale: float = 1.0) -> None:
    """`result` equals the float64 oracle to its dtype's tolerance; `scale` is the size of what was summed."""
    assert result.shape == oracle.shape
    absolute, relative = TOLERANCES[result.dtype]
    torch.testing.assert_close(
        result.double(), oracle.double(), atol=absolute * scale, rtol=relative, check_device=False
    )
