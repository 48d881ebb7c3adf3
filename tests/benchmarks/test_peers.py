"""Public losses beside ours: the literal formulas agree with our step, and code is cut out of a script as it stands."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import peer_steps  # noqa: E402
import peers  # noqa: E402
from peer_code import Checkout  # noqa: E402
from peer_losses import MU, Case, cases, dpo_side, exact, ours, script  # noqa: E402

from fastpref.errors import UserError  # noqa: E402

# Diffusion-DPO and the safeguard of Diffusion-SDPO as their scripts state them: one λ a micro-batch, applied to the
# loser's error in such a way that its value stays and its gradient shrinks.
SCRIPT = """
SLACK = 1e-9
LIMIT = max_lambda()

@register("unused decorator")
def get_adaptive_lose_l_scale(pred, target, mu):
    won, lost = (2 * (pred - target).detach() / pred[: len(pred) // 2].numel()).chunk(2)
    product = (won * lost).sum()
    scale = (1 - mu) * won.square().sum() / (product + SLACK)
    return torch.where(product > 0, scale, torch.ones(())).clamp(0, 1)

def main(args):
    for batch in load():
        model_pred = unet(batch)
        if args.train_method == "sft":
            loss = 0
        else:
            model_losses = (model_pred - target).square().mean(dim=(1, 2, 3))
            won, lost = model_losses.chunk(2)
            if args.use_winner_preserving:
                kept = lost.detach()
                lost = kept + get_adaptive_lose_l_scale(model_pred, target, args.winner_preserving_mu) * (lost - kept)
            with torch.no_grad():
                ref_won, ref_lost = (ref_unet(batch=None).sample - target).square().mean(dim=(1, 2, 3)).chunk(2)
            inside_term = -0.5 * args.beta_dpo * ((won - lost) - (ref_won - ref_lost))
            implicit_acc = (inside_term > 0).float().mean() + 0.5 * (inside_term == 0).float().mean()
            loss = -F.logsigmoid(inside_term).mean()
        accelerator.backward(loss)
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    (tmp_path / "train.py").write_text(SCRIPT)
    return Checkout(tmp_path)


def bound(case: Case) -> float:
    """Of the relative difference of two fp32 sides: four errors, whose sums of 1,024 squares round in at most 10 + 4
    additions on any way, times β/2, is what the logit may be off by, and with it the logarithm of loss and gradient."""
    errors = sum(float((x - case.target).square().mean(dim=(1, 2, 3)).max()) for x in (case.pred, case.ref))
    return 2 * case.beta / 2 * 2 * errors * 14 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("safeguard", [False, True])
def test_our_step_equals_the_scripts_loss_and_gradient(checkout: Checkout, safeguard: bool) -> None:
    theirs = dpo_side(checkout, "train.py", safeguard=safeguard)
    for case in cases(24, pairs=1 if safeguard else None):
        sides = theirs(case), ours(case, safeguard), exact(case, safeguard)
        for side in sides[1:]:
            torch.testing.assert_close(side.loss.double(), sides[0].loss.double(), rtol=bound(case), atol=0)
            # the script's slack of 1e-9 in λ's denominator, against a product of about 4·0.09/1024
            slack = 1e-9 / (4 * 0.05 / 1024) if safeguard else 0.0
            largest = float(sides[0].gradient.abs().max())
            error = (side.gradient.double() - sides[0].gradient.double()).abs().max()
            assert float(error) <= (bound(case) + slack) * largest


def test_a_safeguard_per_pair_is_another_one_than_per_micro_batch(checkout: Checkout) -> None:
    """An intended departure: in the script a pair's λ depends on the pairs it shares a micro-batch with. Here the first
    loser errs as its winner does (λ = 1 - μ), the second the other way (λ = 1); together their products cancel."""
    error = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    pred, target = torch.cat([error, error, error, -error]), torch.zeros(4, 4, 16, 16)
    case = Case(pred, pred, target, 5000.0)
    plain, own = ours(case).gradient, ours(case, True).gradient
    torch.testing.assert_close(own[2], plain[2] * (1 - MU), rtol=1e-5, atol=0)
    torch.testing.assert_close(own[[0, 1, 3]], plain[[0, 1, 3]], rtol=0, atol=0)
    theirs = dpo_side(checkout, "train.py", safeguard=True)(case).gradient
    torch.testing.assert_close(theirs, plain, rtol=bound(case), atol=0)


def test_beta_that_a_script_does_not_halve_is_handed_in_half() -> None:
    """diffusers' script for SD1.5 multiplies by β, not β/2, so its β of 2500 is 5000 everywhere else."""
    text = """
model_losses = (model_pred - target).square().mean(dim=(1, 2, 3))
gained = (unet().sample - target).square().mean(dim=(1, 2, 3)) - model_losses
margin = torch.sub(*gained.chunk(2))
loss = -F.logsigmoid(args.beta_dpo * margin).mean()
implicit_acc = (margin > 0).float().mean()
"""
    side = script(compile(text, "script", "exec"), {}, halved=False)
    for case in cases(3):
        torch.testing.assert_close(side(case).loss, ours(case).loss, rtol=bound(case), atol=0)


def test_before_the_first_update_half_of_the_pairs_count_as_right() -> None:
    case = next(cases(1, pairs=3))
    assert float(ours(case._replace(pred=case.ref)).accuracy) == 0.5


def literal_transitions(case: peer_steps.StepCase) -> torch.Tensor:
    """SPO's loss as its paper and code state it: log-densities of DDIM's step, ratios clipped, in float64."""
    scheduler = peer_steps.published_scheduler()
    now, before = (scheduler.alphas_cumprod.double()[t] for t in (case.t, max(case.t - 50, 0)))
    variance = (1 - before) / (1 - now) * (1 - now / before)
    ratios = []
    for end in (case.x_w, case.x_l):
        densities = []
        for with_prompt, without in (case.policy, case.reference):
            noise = without + peer_steps.GUIDANCE * (with_prompt - without)
            x0 = (case.x_t - (1 - now).sqrt() * noise) / now.sqrt()
            mean = before.sqrt() * x0 + (1 - before - variance).sqrt() * noise
            densities.append((-((end - mean) ** 2) / (2 * variance) - variance.sqrt().log()).mean(dim=(1, 2, 3)))
        ratios.append((densities[0] - densities[1]).exp().clamp(1 - peer_steps.CLIP, 1 + peer_steps.CLIP))
    return -torch.nn.functional.logsigmoid(case.beta * (ratios[0].log() - ratios[1].log())).mean()


def test_our_transitions_equal_the_literal_loss() -> None:
    """In float64. The literal mean takes the difference of two densities of about 1/σ² each, hence the slack."""
    for case in peer_steps.step_cases(40):
        double = peers._double(case)
        assert float(peer_steps.our_loss(double).loss) == pytest.approx(float(literal_transitions(double)), rel=1e-7)


def test_our_verdict_is_a_softmax_over_best_and_worst() -> None:
    """θ_t runs with σ_t from 0.35 at the last step to 0.5 at the first (LPO)."""
    scores = torch.tensor([[0.0, 1.1, 0.3, 0.2], [0.0, 0.2, 0.75, 0.1]], dtype=torch.float64)
    shares = [(math.exp(gap) - 1) / (math.exp(gap) + 1) for gap in (1.1, 0.75)]  # 0.50, 0.36
    assert 0.5 < shares[0] < 0.501 and 0.35 < shares[1] < 0.36
    first, last = (peer_steps.our_verdict(scores, step, (0.35, 0.5)) for step in (0, 19))
    assert first.kept.tolist() == [True, False] and last.kept.tolist() == [True, True]
    assert last.winner.tolist() == [1, 2] and last.loser.tolist() == [0, 0]


def test_our_candidates_carry_the_noise_of_their_keys() -> None:
    """x_{t-1} of candidate k is the mean that all share plus σ times its own noise."""
    (case,) = peer_steps.step_cases(1)
    double = peers._double(case)
    keys = peer_steps.derive_keys(3, 0, torch.arange(4 * len(case.x_t)), 0, "candidate").view(-1, 4)
    pool, noise = peer_steps.our_candidates(double, keys), peer_steps.noise_of(keys, double).transpose(0, 1)
    means = pool - peer_steps.published_sampler().sigma(0) * noise
    torch.testing.assert_close(means, means[:, :1].expand_as(means), rtol=0, atol=1e-12)


def test_functions_come_with_what_they_use_and_nothing_else(checkout: Checkout) -> None:
    """Neither the decorator nor LIMIT, whose value needs an import, is run."""
    space = checkout.definitions("train.py", "get_adaptive_lose_l_scale", given={"torch": torch})
    assert space["SLACK"] == 1e-9 and "LIMIT" not in space and "main" not in space
    orthogonal = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    assert float(space["get_adaptive_lose_l_scale"](orthogonal, torch.zeros(2, 2), MU)) == 1.0


@pytest.mark.parametrize("text", ["model_losses = 1\n", "loss = 1\nmodel_losses = 2\n", "def broken(:\n"])
def test_other_code_is_refused_in_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "train.py").write_text(text)
    with pytest.raises(UserError, match="cannot use the code there"):
        Checkout(tmp_path).statements("train.py", "model_losses", "loss")


def test_a_folder_of_something_else_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a checkout of a public code"):
        peers.compare([tmp_path])
