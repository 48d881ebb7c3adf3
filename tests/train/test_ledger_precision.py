"""The ledger of half-precision training: what it is against float64, when rounding cancels, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fastpref.config import Config
from fastpref.data import ledger as files
from fastpref.errors import UserError
from fastpref.models.loading import model_dir_of
from fastpref.models.policy import Policy
from fastpref.objectives import PairRewards
from fastpref.train import untrained
from fastpref.train.engine import LocalEngine
from fastpref.train.job import TrainJob
from fastpref.train.offline import OfflineTrainer
from fastpref.train.reference import open_reference, prepare_reference
from fastpref.train.untrained import check_untrained, micro_batches_to_ask
from fastpref.watch import Watch
from fastpref_kernels import implicit_reward

MakeConfig = Callable[..., Config]
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _own_ledgers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ledgers of a test lie in its own folder; DeepSpeed's engine is not needed for the pass under it."""
    monkeypatch.setattr(files, "FOLDER", str(tmp_path / "ledgers"))
    monkeypatch.setattr("fastpref.train.offline.open_engine", LocalEngine)


def opened(config: Config) -> OfflineTrainer:
    trainer = TrainJob.open(config).trainer
    assert isinstance(trainer, OfflineTrainer)
    return trainer


def start_of(one_level_config: MakeConfig, tmp_path: Path) -> str:
    """A LoRA file that does something, also in the parts that stay in fp32."""
    from fastpref.models.lora_file import save_lora

    policy = opened(one_level_config("method=dpo", "lora_targets=[to_q, conv_in]")).policy
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in policy.trainable.values():
            weight += 0.05 * torch.randn(weight.shape, generator=random)
    save_lora(policy.unet, tmp_path / "start.safetensors")
    return f"init_lora={tmp_path / 'start.safetensors'}"


RECIPES = {
    "lora": [],
    "fp16": ["precision=fp16"],
    "full": ["train=full"],
    "full, bf16 weights": ["train=full", "step_in_backward=true", "pure_bf16=true"],
    "lora from a file": ["init_lora"],
    "autocast": ["engine=deepspeed"],
}


def recipe_of(one_level_config: MakeConfig, tmp_path: Path, name: str) -> list[str]:
    more = [start_of(one_level_config, tmp_path) if text == "init_lora" else text for text in RECIPES[name]]
    return ["method=dpo", "precision=bf16", "reference=ledger", *more]


@pytest.mark.parametrize("name", RECIPES)
def test_before_training_a_ledger_of_the_same_pass_has_no_noise(
    one_level_config: MakeConfig, tmp_path: Path, name: str
) -> None:
    """Bit for bit, with and without the LoRA layers, gradients and recomputation: the same products of the same
    shapes; a LoRA of zeros adds zeros."""
    settings = recipe_of(one_level_config, tmp_path, name)
    micro = [] if "step_in_backward=true" in settings else ["micro_batch_size=2"]
    for mode in ("none", "full"):
        more = [*micro, "ledger_precision=training", "steps=1", f"gradient_checkpointing={mode}"]
        config = one_level_config(*settings, *more)
        prepare_reference(config, progress=False)
        metrics = opened(config).step(0)
        assert metrics["margin"] == metrics["reward_winner"] == metrics["reward_loser"] == 0
    if micro:
        with pytest.raises(UserError, match="micro_batch_size 2, here 4"):
            TrainJob.open(config.model_copy(update={"micro_batch_size": 4}))


def test_masters_of_a_lora_from_a_file_are_not_rounded(one_level_config: MakeConfig, tmp_path: Path) -> None:
    start = start_of(one_level_config, tmp_path)
    exact, half = (
        opened(one_level_config("method=dpo", start, f"precision={precision}")).policy for precision in ("fp32", "bf16")
    )
    assert exact.trainable.keys() == half.trainable.keys()
    assert all(torch.equal(half.trainable[name], weight) for name, weight in exact.trainable.items())


def errors(policy: Policy, trainer: OfflineTrainer, dtype: torch.dtype) -> torch.Tensor:
    batch = trainer.batches.build(trainer.sampler.batch(0), slice(0, 8))
    inputs: list[Any] = [batch.noisy.to(dtype), batch.timesteps, batch.conditioning]
    return -implicit_reward(policy.predict_reference(*inputs), batch.target.to(dtype)).double()


@pytest.mark.parametrize("name", RECIPES)
def test_a_ledger_in_fp32_is_the_exact_error_of_the_weights_that_train(
    one_level_config: MakeConfig, tmp_path: Path, name: str
) -> None:
    """Against float64 with the weights in the training's own modules: a hundred times nearer than its own pass is, of
    the 2^13 by which fp32 rounds finer than fp16."""
    config = one_level_config(*recipe_of(one_level_config, tmp_path, name), "steps=1")
    found = opened(config.model_copy(update={"reference": "auto"}))
    own = errors(found.policy, found, torch.float32)
    wide = errors(open_reference(config, model_dir_of(config), CPU), found, torch.float32)
    exact = open_reference(config, model_dir_of(config), CPU)
    exact.unet.to(torch.float64)
    exact.base_dtype = torch.float64
    trained = (found.policy.reference_unet or found.policy.unet).named_parameters()
    values = {key.replace(".base_layer", ""): value.detach() for key, value in trained}
    for key, parameter in exact.unet.named_parameters():
        parameter.data = values[key.replace(".base_layer", "")].to(torch.float64)
    true = errors(exact, found, torch.float64)
    assert (wide - true).square().mean() < (own - true).square().mean() / 1e4


def test_a_ledger_in_fp32_serves_every_shape_and_operator(one_level_config: MakeConfig) -> None:
    common = ["method=dpo", "precision=bf16", "reference=ledger", "steps=2"]
    prepare_reference(one_level_config(*common), progress=False)
    for other in ("micro_batch_size=2", "fused_ops=true", "attention=sliced", "prepare_batch_size=3"):
        TrainJob.open(one_level_config(*common, other))
    with pytest.raises(UserError, match='ledger_precision "fp32", here "training"'):
        TrainJob.open(one_level_config(*common, "ledger_precision=training"))
    with pytest.raises(UserError, match='precision "bf16", here "fp16"'):
        TrainJob.open(one_level_config(*common, "precision=fp16"))
    with pytest.raises(UserError, match="autocast false, here true"):
        TrainJob.open(one_level_config(*common, "engine=deepspeed"))


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_the_first_step_says_how_far_rounding_moves_the_logit(
    one_level_config: MakeConfig, tmp_path: Path, precision: str
) -> None:
    """A ledger in fp32 has the noise of one rounded pass, a reference in the step of two: 0.7 times, of 8 pairs that
    is between a quarter and 1.5 times."""
    settings = ["method=dpo", f"precision={precision}", "reference=ledger", "steps=1", "beta=5000"]
    config = one_level_config(*settings, "micro_batch_size=4")
    prepare_reference(config, progress=False)
    trainer, said = opened(config), []
    trainer.begin(tmp_path, Watch(line=said.append))
    trainer.step(0)
    words = said[0].split()
    noise, own = float(words[7].rstrip(";")), float(words[-1])
    assert len(said) == 1 and said[0].startswith("reference ledger: rounding moves the logit by ")
    assert own / 4 < noise < 1.5 * own
    trainer = opened(config)
    assert trainer.ledger is not None
    trainer.ledger.errors(0, 0, slice(0, 8)).view(2, 8)[0] += 30 * own / 2500
    with pytest.raises(UserError, match="in the logit, at most "):
        trainer.step(0)


def test_the_shift_that_rounds_otherwise_moves_nothing_itself(
    one_level_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In fp32, latents shifted as for bf16 move the errors by a fifth at most of what they do in bf16."""
    apart = []
    for precision in ("bf16", "fp32"):
        trainer = opened(one_level_config("method=dpo", f"precision={precision}"))
        batch = trainer.batches.build(trainer.sampler.batch(0), slice(0, 8))
        ratio = torch.finfo(torch.bfloat16).eps / torch.finfo(trainer.policy.base_dtype).eps
        monkeypatch.setattr(untrained, "_SHIFT", 1 / 16 * ratio)
        winners, losers = untrained.rounding_apart(trainer.policy, batch, 2)
        apart.append(float((winners - losers).square().mean().sqrt()))
        assert winners.shape == (16,)
    assert 0 < apart[1] < apart[0] / 5


def rewards(offset: float) -> PairRewards:
    """Logits of ``offset`` at β = 2."""
    zero = torch.zeros(4)
    return PairRewards(zero + offset, zero, zero, zero)


def test_the_rule() -> None:
    """Ten times what rounding does, or what nobody notices; a number that is none is no ledger's."""
    apart = torch.tensor([[0.3, -0.3], [0.0, 0.0]])  # 0.3 in the logit at β = 2
    assert "by 2.9; once trained, a reference computed in the step by 0.3" in check_untrained(rewards(2.9), 2, apart)
    assert check_untrained(rewards(0.04), 2, apart / 1e6).startswith(
        "reference ledger: rounding moves the logit by 0.04;"
    )
    assert check_untrained(rewards(0.04), 2) == "reference ledger: rounding moves the logit by 0.04"
    for offset, own in ((3.1, apart), (0.06, None), (0.06, apart / 1e6), (float("nan"), apart), (float("nan"), None)):
        with pytest.raises(UserError, match="not this model's"):
            check_untrained(rewards(offset), 2, own)


@pytest.mark.parametrize(
    ("pairs", "count", "expected"),
    [(1, 1, (1, 8)), (2, 16, (16, 1)), (4, 100, (16, 1)), (128, 3, (1, 1)), (3, 2, (2, 2))],
)
def test_enough_pairs_are_asked(pairs: int, count: int, expected: tuple[int, int]) -> None:
    asked, repeats = micro_batches_to_ask(pairs, count)
    assert (asked, repeats) == expected and asked * pairs * repeats >= 8 and asked <= count
