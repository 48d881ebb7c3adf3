"""Why a ledger of the same pass differs from training's first step on a GPU, and that a ledger in fp32 trains there.

One change at a time to the forward that training does before its first update: what of it changes the errors is a
cause. The control is the same in fp32: what is rounding there is some 2^16 times smaller, a fault is not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastpref.config import Config, load_config
from fastpref.data.ledger import Ledger
from fastpref.models import public
from fastpref.models.loading import DTYPES
from fastpref.models.policy import Conditioning, Policy, make_policy
from fastpref.train.job import TrainJob
from fastpref.train.offline import OfflineTrainer
from fastpref.train.reference import prepare_reference
from fastpref.watch import Watch
from fastpref_kernels import implicit_reward

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: torch.cuda.is_available() is False"),
]
MakeConfig = Callable[..., Config]
BETA = 100
SMALL = {"block_out_channels": (64, 128), "transformer_layers_per_block": (1, 2), "attention_head_dim": (2, 4)}
# SDXL's widths, heads and prompts; two of its three levels, 2 of its 10 transformer blocks
SDXL = {"block_out_channels": (320, 640), "transformer_layers_per_block": (1, 2), "attention_head_dim": (5, 10)}


def unet_of(shape: dict[str, Any], precision: str, device: torch.device) -> Any:
    """A random UNet of SDXL's kind with two levels, as :func:`load_policy` reads one for a LoRA."""
    from diffusers import UNet2DConditionModel

    blocks = {
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    }
    torch.manual_seed(0)
    with device:
        return UNet2DConditionModel.from_config(public.UNETS["sdxl"] | blocks | shape).eval().to(DTYPES[precision])


def inputs_of(policy: Policy, rows: int, side: int) -> tuple[torch.Tensor, torch.Tensor, Conditioning]:
    """Latents, timesteps and SDXL's conditions, winners' prompts equal to losers'."""
    random = torch.Generator().manual_seed(1)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=random).to(policy.device)

    unet = policy.unet.config
    prompts = drawn(rows // 2, 77, unet.cross_attention_dim).repeat(2, 1, 1)
    pooled = drawn(rows // 2, unet.projection_class_embeddings_input_dim - 6 * 256).repeat(2, 1)
    times = torch.linspace(1, 998, rows // 2, device=policy.device).long().repeat(2)
    sizes = torch.tensor([side * 8, side * 8, 0, 0, side * 8, side * 8]).float().repeat(rows, 1).to(policy.device)
    return drawn(rows, 4, side, side), times, Conditioning(prompts, pooled, sizes)


@contextmanager
def flags(module: Any, **values: Any) -> Iterator[None]:
    """Attributes of ``module`` for a while."""
    before = {name: getattr(module, name) for name in values}
    for name, value in values.items():
        setattr(module, name, value)
    yield
    for name, value in before.items():
        setattr(module, name, value)


Inputs = tuple[torch.Tensor, torch.Tensor, Conditioning]


class Probe:
    """A policy before its first update, and what its forward can be changed in."""

    def __init__(self, shape: dict[str, Any], precision: str, rows: int, side: int, device: torch.device) -> None:
        self.device, self.shape = device, shape
        self.config = load_config("", ["method=dpo", f"precision={precision}", "lora_rank=8", "fused_ops=false"])
        self.policy = make_policy(unet_of(shape, precision, device), self.config, device, needs_reference=True)
        self.inputs = inputs_of(self.policy, rows, side)
        self.target = torch.randn(self.inputs[0].shape, generator=torch.Generator().manual_seed(2)).to(device)

    def errors(self, predict: Callable[..., torch.Tensor] | None = None, inputs: Inputs | None = None) -> torch.Tensor:
        prediction = (predict or self.policy.forward_pass)(*(inputs or self.inputs))
        return -implicit_reward(prediction.detach(), self.target).double()

    def without_layers(self) -> torch.Tensor:
        bare = make_policy(
            unet_of(self.shape, self.config.precision, self.device),
            self.config.model_copy(update={"train": "full", "reference": "copy"}),
            self.device,
            needs_reference=False,
        )
        return self.errors(bare.forward_pass)

    def autocast(self) -> torch.Tensor:
        """The pass under DeepSpeed; fp32 has no other."""
        config = self.config.model_copy(update={"engine": "deepspeed"})
        other = make_policy(
            unet_of(self.shape, self.config.precision, self.device), config, self.device, needs_reference=True
        )
        return self.errors(other.forward_pass)

    def recomputing(self) -> torch.Tensor:
        self.policy.unet.enable_gradient_checkpointing()
        found = self.errors()
        self.policy.unet.disable_gradient_checkpointing()
        return found

    def elsewhere(self) -> torch.Tensor:
        """The same numbers at other addresses, 2 bytes off the usual alignment."""
        noisy, times, conditioning = self.inputs
        prompts = conditioning.prompt_embeds
        moved = torch.empty(prompts.numel() + 1, device=self.device, dtype=prompts.dtype)[1:].view(prompts.shape)
        moved.copy_(prompts)
        other = Conditioning(moved, conditioning.pooled_prompt_embeds, conditioning.time_ids)
        return self.errors(inputs=(noisy.clone(), times, other))

    def pair_by_pair(self) -> torch.Tensor:
        noisy, times, conditioning = self.inputs
        half = len(noisy) // 2
        found = torch.empty(2, half, dtype=torch.float64, device=self.device)
        for pair in range(half):
            at = [pair, half + pair]
            part = Conditioning(*(None if value is None else value[at] for value in conditioning.tensors()))
            prediction = self.policy.forward_pass(noisy[at], times[at], part)
            found[:, pair] = -implicit_reward(prediction.detach(), self.target[at]).double()
        return found.flatten()

    def under(self, manager: AbstractContextManager[Any]) -> torch.Tensor:
        with manager:
            return self.errors()

    def replayed(self) -> torch.Tensor:
        """From a CUDA graph."""
        with torch.no_grad():
            self.policy.forward_pass(*self.inputs)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                prediction = self.policy.forward_pass(*self.inputs)
            graph.replay()
        return -implicit_reward(prediction, self.target).double()

    def causes(self) -> dict[str, torch.Tensor]:
        """Errors of every changed forward."""
        cudnn = torch.backends.cudnn
        found = {
            "the same again": self.errors(),
            "without gradients": self.under(torch.no_grad()),
            "LoRA switched off": self.errors(self.policy.reference_pass),
            "no LoRA layers": self.without_layers(),
            "checkpointing": self.recomputing(),
            "other addresses": self.elsewhere(),
            "pair by pair": self.pair_by_pair(),
            "cuDNN benchmark": self.under(flags(cudnn, benchmark=True)),
            "cuDNN deterministic": self.under(flags(cudnn, deterministic=True)),
            "no cuDNN": self.under(flags(cudnn, enabled=False)),
            "autocast": self.autocast(),
            "CUDA graph": self.replayed(),
        }
        # On compute capability 9.0 torch prefers cuDNN's, which is planned anew where gradients ask for softmax sums.
        for backend in ("MATH", "FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION"):
            try:
                with sdpa_kernel(getattr(SDPBackend, backend)):
                    found[f"SDPA {backend.lower()}"] = self.errors()
                    found[f"the same without gradients, {backend.lower()}"] = self.under(torch.no_grad())
            except RuntimeError:  # not for this dtype or on this device
                continue
        return found

    def table(self) -> dict[str, float]:
        """By change: root mean square of what it moves the logit by at β 100."""
        base, moved = self.errors(), {}
        for name, errors in self.causes().items():
            winners, losers = (errors - base).view(2, -1)
            moved[name] = float((winners - losers).square().mean().sqrt() * BETA / 2)
        return moved


def check_causes(capsys: pytest.CaptureFixture[str], shape: dict[str, Any], rows: int, side: int) -> None:
    """Print the table; what is rounding in bf16 is far smaller in fp32."""
    device = torch.device("cuda")
    half, single = (Probe(shape, precision, rows, side, device).table() for precision in ("bf16", "fp32"))
    with capsys.disabled():
        print(f"\nlogit at beta {BETA}, {shape['block_out_channels']}: bf16, fp32")
        for name in half.keys() | single.keys():
            print(f"  {name:52} {half.get(name, float('nan')):9.2g} {single.get(name, float('nan')):9.2g}")
    assert half["the same again"] == 0, "the forward is not repeatable"
    for name, moved in single.items():
        assert moved < 1e-2, name  # cuDNN's convolutions may take TF32, whose roundings are bf16's over 8


@pytest.mark.parametrize(("shape", "rows", "side"), [(SMALL, 8, 32), (SDXL, 8, 64)], ids=["small", "sdxl"])
def test_what_makes_the_first_step_differ(
    capsys: pytest.CaptureFixture[str], shape: dict[str, Any], rows: int, side: int
) -> None:
    check_causes(capsys, shape, rows, side)


@pytest.mark.parametrize("ledger", ["fp32", "training"])
def test_training_with_a_ledger(
    sdxl_config: MakeConfig, tmp_path: Path, ledger: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Either kind of ledger leaves no more in the logit than a reference in the step does: twice, of 8 pairs."""
    monkeypatch.setattr("fastpref.data.ledger.FOLDER", str(tmp_path / "ledgers"))
    recipe = ["method=dpo", "precision=bf16", "reference=ledger", "beta=5000", "steps=2", "device=cuda"]
    config = sdxl_config(*recipe, "micro_batch_size=4", f"ledger_precision={ledger}")
    prepare_reference(config, progress=False)
    trainer = TrainJob.open(config).trainer
    assert isinstance(trainer, OfflineTrainer) and isinstance(trainer.ledger, Ledger)
    said: list[str] = []
    trainer.begin(tmp_path, Watch(line=said.append))
    metrics = [trainer.step(step) for step in range(2)]
    noise, own = float(said[0].split()[7].rstrip(";")), float(said[0].split()[-1])
    assert noise < 2 * own and all(line["grad_norm"] for line in metrics)
