"""torch.compile of a UNet, block by block or as one graph.

Blocks are compiled once for all that are alike, and hooks between them (DeepSpeed's) stay as they are. One graph takes
longer to start and is compiled again for every batch size, and removes what lies between the blocks too.
"""

from __future__ import annotations

from typing import Any

import torch

BLOCKS = ("BasicTransformerBlock", "ResnetBlock2D")
OPTIONS: dict[str, Any] = {"dynamic": False}
_GRAPHS = 256  # of one block class: every width and size, with and without gradient, LoRA on and off


def compile_unet(unet: torch.nn.Module, whole: bool) -> None:
    """Compile a UNet, or its transformer and residual blocks, in place; parameter names stay as they are."""
    for name in ("recompile_limit", "accumulated_recompile_limit"):
        setattr(torch._dynamo.config, name, max(_GRAPHS, getattr(torch._dynamo.config, name)))
    for module in [unet] if whole else unet.modules():
        if whole or type(module).__name__ in BLOCKS:
            module.compile(**OPTIONS)
