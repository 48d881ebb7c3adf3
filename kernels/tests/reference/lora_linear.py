from __future__ import annotations

from torch import Tensor


def lora_linear(x: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor, scale: float) -> Tensor:
    y = x.double() @ weight.double().T + scale * (x.double() @ lora_a.double().T) @ lora_b.double().T
    return y if bias is None else y + bias.double()
