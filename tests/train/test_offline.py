"""The offline loop: layout invariance, its gradient against a literal one, the reference, and what is trained."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fastpref.config import Config
from fastpref.models.loading import load_noise_schedule
from fastpref.models.policy import load_policy
from fastpref.objectives.rpo import combine_embeddings
from fastpref.train.batch import BatchBuilder
from fastpref.train.engine import LocalEngine
from fastpref.train.job import TrainJob
from fastpref.train.offline import OfflineTrainer
from fastpref_kernels import derive_keys, keyed_noise

MakeConfig = Callable[..., Config]
METHODS = {
    "sft": ["method=sft"],
    "dpo": ["method=dpo", "beta=200"],
    "dpo safeguard sft": ["method=dpo", "beta=200", "safeguard=0.9", "sft_weight=1"],
    "rpo": ["method=rpo", "beta=200", "temperature=0.3"],
    "rpo groups related": ["method=rpo", "beta=200", "group_size=4", "sampling=related", "embedding=text"],
    "rpo inside": ["method=rpo", "beta=2000", "weight=inside", "safeguard=0.6"],
}


def make_trainer(config: Config) -> OfflineTrainer:
    job = TrainJob.open(config)
    objective, store = job.trainer.objective, job.trainer.batches.store
    policy = load_policy(config, job.model_dir, job.device, needs_reference=objective.uses_reference)
    _perturb(policy.trainable)
    schedule = load_noise_schedule(job.model_dir)
    batches = BatchBuilder(store, schedule, config, job.device, with_losers=objective.uses_losers)
    return OfflineTrainer(config, policy, objective, job.trainer.sampler, batches, LocalEngine(policy, config))


def _perturb(trainable: dict[str, torch.nn.Parameter]) -> None:
    """Move the policy off the reference, so that rewards are not all zero."""
    g = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in trainable.values():
            parameter += 0.05 * torch.randn(parameter.shape, generator=g, dtype=torch.float64).to(parameter.dtype)


def loss_and_gradient(config: Config, step: int = 1) -> tuple[float, torch.Tensor, OfflineTrainer]:
    trainer = make_trainer(config)
    kept: list[torch.Tensor] = []

    def keep(rate: float, loss: torch.Tensor) -> torch.Tensor:
        kept.append(torch.cat([p.grad.flatten() for p in trainer.policy.trainable.values() if p.grad is not None]))
        return torch.zeros(())

    trainer.engine.launch = keep  # type: ignore[method-assign]
    metrics = trainer.step(step)
    return metrics["loss"], kept[0], trainer


@pytest.mark.parametrize("method", METHODS)
def test_the_micro_batch_size_does_not_matter(one_level_config: MakeConfig, one_level_unet: Path, method: str) -> None:
    """8, 4+4 and 2+2+2+2 are one function: 1e-9 in float64, for loss and gradient."""
    common = [*METHODS[method], f"unet={one_level_unet}", "precision=fp64", "caption_dropout=0.3"]
    loss, gradient, _ = loss_and_gradient(one_level_config(*common))
    assert gradient.norm() > 0 and math.isfinite(loss)
    for extra in (["micro_batch_size=4"], ["micro_batch_size=2"], ["micro_batch_size=2", "accumulation=keep_graphs"]):
        other_loss, other, _ = loss_and_gradient(one_level_config(*common, *extra))
        assert abs(other_loss - loss) <= 1e-9 * max(1.0, abs(loss)), extra
        assert (other - gradient).abs().max() <= 1e-9 * gradient.abs().max(), extra


def test_fp32_differences_between_layouts_are_printed_and_small(
    one_level_config: MakeConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    for method in ("dpo", "rpo"):
        loss, gradient, _ = loss_and_gradient(one_level_config(*METHODS[method]))
        other_loss, other, _ = loss_and_gradient(one_level_config(*METHODS[method], "micro_batch_size=2"))
        off = float((other - gradient).norm() / gradient.norm())
        with capsys.disabled():
            print(f"\n{method} in fp32, 8 against 2+2+2+2: loss {other_loss - loss:+.1e}, gradient {off:.1e} relative")
        # beta / 2 = 100 multiplies a UNet's rounding, ten units (2^-24) of errors of order one: 1e-4 of a logit
        assert abs(other_loss - loss) < 1e-4 * abs(loss) and off < 1e-3


@pytest.mark.parametrize("family", ["sdxl", "sd15"])
def test_gradient_equals_a_literal_implementation(
    one_level_config: MakeConfig, sd15_config: MakeConfig, family: str
) -> None:
    """RPO written out naively on the predictions, one autograd graph, against the loop in micro-batches."""
    make = one_level_config if family == "sdxl" else sd15_config
    config = make("method=rpo", "beta=200", "temperature=0.3", "precision=fp64", "micro_batch_size=2")
    loss, gradient, trainer = loss_and_gradient(config)
    plan, n = trainer.sampler.batch(1), config.batch_size
    batch = trainer.batches.build(plan, slice(0, n))

    def errors(predict: Callable[..., torch.Tensor]) -> torch.Tensor:
        pred = predict(batch.noisy, batch.timesteps, batch.conditioning)
        return ((pred - batch.target) ** 2).mean(dim=(1, 2, 3))

    reward = errors(trainer.policy.predict_reference) - errors(trainer.policy.predict)
    stored = trainer.batches.store.batch(plan.indices)
    e_w = combine_embeddings("text+image", stored.clip_text, stored.clip_image_w).double()
    e_l = combine_embeddings("text+image", stored.clip_text, stored.clip_image_l).double()
    cosine = (e_w / e_w.norm(dim=1, keepdim=True)) @ (e_l / e_l.norm(dim=1, keepdim=True)).T
    omega = (cosine / 0.3).softmax(dim=1)
    u = 100 * (reward[:n, None] - reward[None, n:])
    literal = -(omega * torch.nn.functional.logsigmoid(u)).sum(1).mean()
    expected = torch.autograd.grad(literal, list(trainer.policy.trainable.values()))
    flat = torch.cat([g.flatten() for g in expected])
    assert abs(loss - literal.item()) < 1e-9
    assert (gradient - flat).abs().max() <= 1e-8 * flat.abs().max()


def test_noisy_latents_and_velocity_are_the_forward_process(sd15_config: MakeConfig) -> None:
    """From x_t and v both x_0 and ε come back, and winner and loser share ε, drawn once by its key, and t."""
    trainer = make_trainer(sd15_config("method=dpo", "precision=fp64"))
    plan = trainer.sampler.batch(0)
    batch = trainer.batches.build(plan, slice(0, 8))
    alpha = trainer.batches.schedule.alphas_cumprod[batch.timesteps].view(-1, 1, 1, 1)
    noise = (1 - alpha).sqrt() * batch.noisy + alpha.sqrt() * batch.target
    clean = alpha.sqrt() * batch.noisy - (1 - alpha).sqrt() * batch.target
    stored = trainer.batches.store.batch(plan.indices)
    assert torch.allclose(clean[:8], stored.latents_w.double(), atol=1e-9)
    assert torch.allclose(clean[8:], stored.latents_l.double(), atol=1e-9)
    assert torch.allclose(noise[:8], noise[8:], atol=1e-9) and torch.equal(batch.timesteps[:8], batch.timesteps[8:])
    keys = derive_keys(trainer.config.seed, 0, torch.from_numpy(plan.indices), 0, "noise")
    assert torch.allclose(noise[:8], keyed_noise(keys, tuple(noise.shape[1:]), torch.float64), atol=1e-9)
    assert abs(noise.std().item() - 1) < 0.05 and len(set(batch.timesteps.tolist())) > 1


def test_pairs_of_a_group_share_the_timestep_and_groups_differ(one_level_config: MakeConfig) -> None:
    trainer = make_trainer(one_level_config("method=rpo", "group_size=4", "timestep_range=[100, 900]"))
    seen = []
    for step in range(4):
        t = trainer.batches.build(trainer.sampler.batch(step), slice(0, 8)).timesteps
        assert len(set(t[:4].tolist())) == 1 and len(set(t[4:8].tolist())) == 1
        seen += [int(t[0]), int(t[4])]
    assert len(set(seen)) > 4 and all(100 <= t < 900 for t in seen)


def fresh_trainer(config: Config) -> OfflineTrainer:
    return TrainJob.open(config).trainer


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_an_untouched_lora_is_the_reference(one_level_config: MakeConfig, precision: str) -> None:
    """Rewards are exactly zero before the first update, so DPO starts at log 2 and half of the pairs count as won."""
    metrics = fresh_trainer(one_level_config("method=dpo", f"precision={precision}")).step(0)
    assert metrics["reward_winner"] == 0 and metrics["reward_loser"] == 0 and metrics["accuracy"] == 0.5
    assert metrics["loss"] == pytest.approx(math.log(2), rel=1e-6) and metrics["grad_norm"] > 0


@pytest.mark.parametrize("method", ["dpo", "rpo"])
def test_steps_on_one_batch_make_its_winners_win(one_level_config: MakeConfig, method: str) -> None:
    trainer = fresh_trainer(one_level_config(f"method={method}", "learning_rate=1e-3"))
    losses = [trainer.step(0)["loss"] for _ in range(5)]
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0] - 1e-3
    assert trainer.step(0)["margin"] > 0


@pytest.mark.parametrize("train", ["lora", "full"])
def test_the_reference_does_not_move(one_level_config: MakeConfig, train: str) -> None:
    trainer = make_trainer(one_level_config("method=dpo", f"train={train}", "learning_rate=0.01"))
    batch = trainer.batches.build(trainer.sampler.batch(0), slice(0, 8))
    inputs = (batch.noisy, batch.timesteps, batch.conditioning)
    before, policy_before = trainer.policy.predict_reference(*inputs), trainer.policy.predict(*inputs).detach()
    trainer.step(0)
    after, policy_after = trainer.policy.predict_reference(*inputs), trainer.policy.predict(*inputs).detach()
    assert torch.equal(before, after)
    assert (policy_before - policy_after).abs().max() > 1e-3


@pytest.mark.parametrize(
    "extra",
    [
        [],
        ["train=full", "fused_ops=true"],
        ["fused_ops=true", "precision=bf16"],
        ["attention=sliced", "accumulation=keep_graphs"],
    ],
)
def test_gradient_checkpointing_changes_nothing_but_the_count(sdxl_config: MakeConfig, extra: list[str]) -> None:
    """Bit for bit: the same ops on the same numbers."""
    common = [*METHODS["rpo"], "micro_batch_size=4", *extra]
    loss, gradient, plain = loss_and_gradient(sdxl_config(*common, "gradient_checkpointing=none"))
    # 16 rows: reference, rewards first, once more with the graph unless it was kept; 16 rows backward
    forwards = 32 if "accumulation=keep_graphs" in extra else 48
    assert (plain.policy.forwards, plain.policy.recomputed, plain.policy.backwards) == (forwards, 0, 16)
    for mode, recomputed in (("selective", 0), ("full", 16)):
        other_loss, other, again = loss_and_gradient(sdxl_config(*common, f"gradient_checkpointing={mode}"))
        assert other_loss == loss and torch.equal(other, gradient), mode
        counts = (again.policy.forwards, again.policy.recomputed, again.policy.backwards)
        assert counts == (forwards, recomputed, 16), mode


def test_full_checkpointing_runs_the_blocks_again(sdxl_config: MakeConfig) -> None:
    def block_calls(*overrides: str) -> int:
        trainer = make_trainer(sdxl_config("method=sft", *overrides))
        calls = 0

        def count(*_: object) -> None:
            nonlocal calls
            calls += 1

        trainer.policy.unet.up_blocks[-1].resnets[-1].register_forward_pre_hook(count)
        trainer.step(0)
        return calls

    calls = {mode: block_calls(f"gradient_checkpointing={mode}") for mode in ("none", "selective", "full")}
    assert calls == {"none": 1, "selective": 1, "full": 2}


def test_sizes_reach_the_unet_unrounded_in_bf16(one_level_config: MakeConfig) -> None:
    trainer = make_trainer(one_level_config("method=sft", "precision=bf16"))
    batch = trainer.batches.build(trainer.sampler.batch(0), slice(0, 2))
    batch.conditioning.time_ids = torch.tensor([[1365.0, 767, 13, 171, 1024, 1024]] * 2)
    seen: list[torch.Tensor] = []
    trainer.policy.unet.add_time_proj.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    trainer.policy.predict(batch.noisy, batch.timesteps, batch.conditioning)
    assert seen[0].tolist() == [1365, 767, 13, 171, 1024, 1024] * 2


def test_work_counts_of_each_method(one_level_config: MakeConfig) -> None:
    def rows(*overrides: str) -> tuple[int, int]:
        trainer = make_trainer(one_level_config(*overrides))
        trainer.step(0)
        return trainer.policy.forwards, trainer.policy.backwards

    assert rows("method=sft") == (8, 8)  # winners only, no reference
    assert rows("method=dpo", "micro_batch_size=2") == (32, 16)
    assert rows("method=rpo") == (32, 16)  # one micro-batch: no extra forward
    assert rows("method=rpo", "micro_batch_size=2", "accumulation=keep_graphs") == (32, 16)
    assert rows("method=rpo", "micro_batch_size=2") == (48, 16)


def test_clipping_clips_and_logs_the_norm_before(one_level_config: MakeConfig) -> None:
    trainer = make_trainer(one_level_config("method=dpo", "max_grad_norm=1e-3", "train=full"))
    seen: list[float] = []
    update = trainer.engine.optimizer.step  # type: ignore[attr-defined]

    def spy(*args: Any, **kwargs: Any) -> Any:
        grads = [p.grad.norm() for p in trainer.policy.trainable.values() if p.grad is not None]
        seen.append(float(torch.stack(grads).norm()))
        return update(*args, **kwargs)

    trainer.engine.optimizer.step = spy  # type: ignore[attr-defined]
    metrics = trainer.step(0)
    assert metrics["grad_norm"] > 0.1
    assert seen[0] == pytest.approx(1e-3, rel=1e-3)


def test_a_non_finite_loss_skips_the_step_and_a_limit_stops_the_run(
    one_level_config: MakeConfig, tmp_path: Path
) -> None:
    from fastpref.errors import UserError

    trainer = make_trainer(one_level_config("method=rpo", "max_skipped_steps=2"))
    name, parameter = next((n, p) for n, p in trainer.policy.trainable.items() if "lora_B" in n)
    before = {n: p.detach().clone() for n, p in trainer.policy.trainable.items()}
    with torch.no_grad():
        parameter[0, 0] = math.nan
    before[name][0, 0] = math.nan
    for step in range(2):
        assert trainer.step(step)["grad_norm"] is None
    assert trainer.skipped == 2
    for key, value in trainer.policy.trainable.items():
        assert torch.equal(value.nan_to_num(9.0), before[key].nan_to_num(9.0)), "nothing was updated"
    with pytest.raises(UserError, match="non-finite"):
        trainer.step(2)


def test_ema_follows_its_recursion(one_level_config: MakeConfig) -> None:
    trainer = make_trainer(one_level_config("method=dpo", "ema_decay=0.75", "learning_rate=0.01"))
    engine = trainer.engine
    assert isinstance(engine, LocalEngine)
    name = next(iter(trainer.policy.trainable))
    expected = trainer.policy.trainable[name].detach().clone()
    for step in range(3):
        trainer.step(step)
        expected = 0.75 * expected + 0.25 * trainer.policy.trainable[name].detach()
    trained = trainer.policy.trainable[name].detach().clone()
    with engine.whole():
        assert torch.allclose(trainer.policy.trainable[name], expected, atol=1e-6)
    assert torch.equal(trainer.policy.trainable[name], trained), "the average is for export only"
    assert not torch.allclose(expected, trained, atol=1e-4)
