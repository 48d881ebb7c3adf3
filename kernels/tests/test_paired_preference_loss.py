from __future__ import annotations

import sys

import pytest
import torch
from interpreter import shuffled, traffic
from reference import keyed_noise as noise_oracle
from reference import paired_preference_loss as oracle
from sparse import far_rows
from tolerances import assert_close
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from triton.runtime.interpreter import GridExecutor

from fastpref_kernels import KeyedNoise, KeyedVelocity, dpo_loss, implicit_reward, rpo_loss
from fastpref_kernels import paired_preference_loss as fused
from fastpref_kernels.common import dispatch
from fastpref_kernels.common.last import counters

ALPHAS_CUMPROD = torch.linspace(0.99, 0.01, 100)
RPO = {"kind": "rpo", "temperature": 0.3}
SETTINGS = {
    "dpo": {},
    "dpo,smoothed": {"label_smoothing": 0.1},
    "outside": RPO,
    "outside,groups": RPO | {"group_size": 3},
    "inside": RPO | {"weight": "inside"},
    "uniform": {"kind": "rpo", "weight": "uniform"},
}


def inputs(pairs: int, dtype: torch.dtype = torch.float32, shape: tuple[int, ...] = (3, 7, 5)) -> list[torch.Tensor]:
    """pred, ref_pred, target: predictions near each other, so that beta = 20 leaves the sigmoid its slope."""
    target, ref_pred = torch.randn(2, 2 * pairs, *shape)
    return [(ref_pred + 0.1 * torch.randn_like(ref_pred)).to(dtype), ref_pred.to(dtype), target.to(dtype)]


def contrasts(name: str, pairs: int, dtype: torch.dtype = torch.float32) -> dict:
    settings = dict(SETTINGS[name])
    if settings.get("temperature"):
        settings |= {"emb_w": torch.randn(pairs, 10).to(dtype), "emb_l": torch.randn(pairs, 10).to(dtype)}
    return settings


def oracle_settings(settings: dict) -> dict:
    if settings.get("kind") == "rpo":
        return {"emb_w": None, "emb_l": None, "temperature": 1.0} | settings
    return settings


CASES = [(name, torch.float32, "ref_pred") for name in SETTINGS] + [
    (name, dtype, reference)
    for name in ("dpo", "outside")
    for dtype, reference in ((torch.bfloat16, "ref_error"), (torch.float16, "ref_pred"), (torch.float64, "none"))
]


@pytest.mark.parametrize(("name", "dtype", "reference"), CASES, ids=str)
def test_matches_oracle(path: str, name: str, dtype: torch.dtype, reference: str) -> None:
    pairs = 6
    pred, ref_pred, target = inputs(pairs, dtype)
    ref = ref_pred if reference == "ref_pred" else None
    settings = contrasts(name, pairs, dtype) | {"beta": 20.0}
    if reference == "ref_error":
        settings["ref_error"] = torch.rand(4 * pairs)[::2]
    leaf, exact = (x.clone().requires_grad_() for x in (pred, pred.double()))
    result = fused(leaf, target, ref_pred=ref, **settings)
    expected = oracle.paired_preference_loss(exact, ref, target, **oracle_settings(settings))
    assert result.loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    # beta multiplies the rounding of the rewards
    for value, exactly in zip(result, expected, strict=True):
        assert_close(value, torch.as_tensor(exactly), 20.0)
    assert not any(x.requires_grad for x in result[1:])
    (3 * result.loss).backward()
    (3 * expected[0]).backward()
    assert leaf.grad is not None and leaf.grad.dtype == dtype
    assert_close(leaf.grad, exact.grad, 20.0)


@pytest.mark.parametrize(
    ("name", "pairs"), [("dpo", 1), ("dpo", 33), ("outside", 33), ("outside", 1), ("inside", 33), ("uniform", 33)]
)
def test_many_pairs(path: str, name: str, pairs: int) -> None:
    """Blocks of pairs and two chunks a row, against the ops that it fuses."""
    pred, ref_pred, target = inputs(pairs, shape=(150,))
    settings = contrasts(name, pairs)
    leaves = [pred.clone().requires_grad_() for _ in range(2)]
    result = fused(leaves[0], target, ref_pred=ref_pred, beta=20.0, **settings)
    reward = implicit_reward(leaves[1], target, ref_pred=ref_pred)
    kind = settings.pop("kind", "dpo")
    if kind == "dpo":
        expected = dpo_loss(*reward.chunk(2), beta=20.0)
    else:
        embeddings = settings.pop("emb_w", None), settings.pop("emb_l", None)
        expected = rpo_loss(*reward.chunk(2), *embeddings, beta=20.0, **{"temperature": 1.0} | settings)
    torch.testing.assert_close(tuple(result[:3]), tuple(expected), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(result.reward, reward.detach(), rtol=1e-6, atol=1e-7)
    result.loss.backward()
    expected.loss.backward()
    torch.testing.assert_close(leaves[0].grad, leaves[1].grad, rtol=1e-4, atol=1e-7)


def test_many_chunks_of_rpo(path: str) -> None:
    """More chunks of a row than the loss reads at a time."""
    pred, ref_pred, target = inputs(1, shape=(2200,))
    found = fused(pred, target, ref_pred=ref_pred, beta=20.0, kind="rpo", weight="uniform")
    torch.testing.assert_close(found.reward, implicit_reward(pred, target, ref_pred=ref_pred), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(found.loss, dpo_loss(*found.reward.chunk(2), beta=20.0).loss, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["noise", "velocity"])
def test_keyed_targets(path: str, kind: str) -> None:
    pred, ref_pred, x0 = inputs(2)
    keys, p = torch.tensor([3, 4, 3, 4]), torch.tensor([0.9, 0.3, 0.9, 0.3])
    if kind == "noise":
        target, exact_target = KeyedNoise(keys), noise_oracle.noise(keys, x0.shape[1:])
    else:
        target = KeyedVelocity(keys, x0, p, p - 1)
        exact_target = noise_oracle.velocity(keys, x0, p, p - 1)
    leaf, exact = (x.clone().requires_grad_() for x in (pred, pred.double()))
    result = fused(leaf, target, ref_pred=ref_pred, beta=20.0)
    expected = oracle.paired_preference_loss(exact, ref_pred, exact_target, 20.0)
    assert_close(result.loss, expected[0], 40.0)
    result.loss.backward()
    expected[0].backward()
    assert leaf.grad is not None
    assert_close(leaf.grad, exact.grad, 40.0)


class Calls(TorchDispatchMode):
    """Names of the torch ops that are no views and no allocations."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        free = {"empty", "empty_like", "new_empty", "empty_strided", "detach", "fill_"}  # fill_: the tests' poison
        if not func.is_view and func._schema.name.split("::")[1] not in free:
            self.names.append(str(func))
        return func(*args, **kwargs or {})


@pytest.mark.parametrize(("name", "count"), [("dpo", 2), ("outside", 4), ("inside", 4), ("uniform", 4)])
def test_launches_forward_and_backward(monkeypatch: pytest.MonkeyPatch, name: str, count: int) -> None:
    """Kernels of both directions; inside the op torch itself computes nothing."""
    calls = Calls()

    def watched(function):
        def run(*args, **kwargs):
            with calls:
                return function(*args, **kwargs)

        return run

    def unwatched(function):
        def run(*args, **kwargs):
            with _disable_current_modes():
                return function(*args, **kwargs)

        return run

    ops, package = sys.modules, "fastpref_kernels."
    for module, name_ in (("paired_preference_loss", "launch"), ("implicit_reward", "launch_backward")):
        monkeypatch.setattr(ops[package + module], name_, watched(getattr(ops[package + module], name_)))
    monkeypatch.setattr(GridExecutor, "__call__", unwatched(GridExecutor.__call__))
    pred, ref_pred, target = inputs(6)
    with dispatch.triton_on_cpu(), traffic() as launches:
        fused(pred.requires_grad_(), target, ref_pred=ref_pred, beta=20.0, **contrasts(name, 6)).loss.backward()
    assert len(launches) == count <= 4
    assert calls.names == []


@pytest.mark.parametrize("name", ["dpo", "outside"])
def test_autograd_keeps_its_inputs_and_a_number_a_row(path: str, name: str) -> None:
    pred, ref_pred, target = inputs(4)
    given = {x.data_ptr() for x in (pred, ref_pred, target)}
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        loss = fused(pred.requires_grad_(), target, ref_pred=ref_pred, beta=20.0, **contrasts(name, 4)).loss
    assert loss.requires_grad
    sizes = [x.numel() for x in saved if x.data_ptr() not in given]
    assert sizes == [8]


def test_worked_by_hand(path: str) -> None:
    """Errors 1 (winner) and 4 (loser), the reference's 2 and 4: rewards 1 and 0, u = 1."""
    pred = torch.tensor([[1.0, 1.0], [2.0, -2.0]], requires_grad=True)
    result = fused(pred, torch.zeros(2, 2), beta=2.0, ref_error=torch.tensor([2.0, 4.0]))
    sigmoid = torch.sigmoid(torch.tensor(-1.0)).item()
    torch.testing.assert_close(result.loss.item(), -torch.sigmoid(torch.tensor(1.0)).log().item())
    assert result.reward.tolist() == [1.0, 0.0] and result.accuracy == 1 and result.effective_contrasts == 1
    result.loss.backward()
    # dL/dreward = -+sigmoid(-1), dreward/dpred = -2/2 * pred
    torch.testing.assert_close(pred.grad, sigmoid * torch.tensor([[1.0, 1.0], [-2.0, 2.0]]))


@pytest.mark.parametrize("name", SETTINGS)
def test_where_policy_equals_reference_half_of_the_pairs_count_as_won(path: str, name: str) -> None:
    pred, _, target = inputs(6)
    result = fused(pred, target, ref_pred=pred.clone(), beta=20.0, **contrasts(name, 6))
    assert result.reward.tolist() == [0.0] * 12 and result.accuracy == 0.5


def test_channels_last_and_far_rows(path: str) -> None:
    pred, ref_pred, target = inputs(2)
    expected = fused(pred, target, ref_pred=ref_pred, beta=20.0).loss
    last = pred.to(memory_format=torch.channels_last).requires_grad_()
    result = fused(last, target, ref_pred=ref_pred, beta=20.0).loss
    assert torch.equal(result, expected)
    result.backward()
    assert last.grad is not None and last.grad.is_contiguous(memory_format=torch.channels_last)
    rows, embeddings = torch.randn(3, 40), torch.randn(3, 8)
    far = rpo_loss(rows[:, 0], rows[:, 1], far_rows(embeddings), embeddings, beta=1.0, temperature=0.5)
    near = rpo_loss(rows[:, 0], rows[:, 1], embeddings, embeddings, beta=1.0, temperature=0.5)
    assert torch.equal(far.loss, near.loss)


def test_nan_row_gives_nan_loss(path: str) -> None:
    pred, ref_pred, target = inputs(3)
    pred[1, 0, 0, 0] = torch.nan
    for name in ("dpo", "outside"):
        result = fused(pred, target, ref_pred=ref_pred, beta=2.0, **contrasts(name, 3))
        assert result.loss.isnan() and result.reward.isnan().tolist() == [False, True, False, False, False, False]


def test_gradcheck() -> None:
    pred, ref_pred, target = inputs(3, torch.float64, (2, 2))
    for name in ("dpo,smoothed", "outside", "inside", "uniform"):
        settings = contrasts(name, 3, torch.float64) | {"beta": 3.0}
        assert torch.autograd.gradcheck(
            lambda x, s=settings: fused(x, target, ref_pred=ref_pred, **s).loss, pred.requires_grad_()
        )


@pytest.mark.parametrize("name", ["dpo", "outside"])
def test_opcheck_and_one_graph(name: str) -> None:
    pred, ref_pred, target = inputs(2)
    pred.requires_grad_()
    emb = [torch.randn(2, 5) if name == "outside" else None for _ in range(2)]
    arguments = (pred, target, None, None, None, ref_pred, None, *emb, 2.0, 0.0, 0.5, name, 1)
    torch.library.opcheck(torch.ops.fastpref_kernels.paired_preference_loss.default, arguments)

    settings = contrasts(name, 2)

    def loss(x, keys):
        return fused(x, KeyedNoise(keys), ref_pred=ref_pred, beta=2.0, **settings).loss

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")(pred, torch.arange(4))
    torch.testing.assert_close(compiled, loss(pred, torch.arange(4)), rtol=1e-6, atol=1e-6)


X, E = torch.zeros(4, 3), torch.zeros(2, 5)


@pytest.mark.parametrize(
    ("pred", "settings", "message"),
    [
        (X[:0], {}, "empty"),
        (X[:3], {}, "even"),
        (X, {"beta": 0.0}, "beta"),
        (X, {"kind": "ipo"}, "kind"),
        (X, {"label_smoothing": 0.5}, "label_smoothing"),
        (X, {"temperature": 1.0}, "kind='rpo'"),
        (X, {"emb_w": E}, "kind='rpo'"),
        (X, {"kind": "rpo", "emb_w": E, "emb_l": E}, "temperature"),
        (X, {"kind": "rpo", "temperature": 1.0}, "needs emb_w"),
        (X, {"kind": "rpo", "weight": "uniform", "label_smoothing": 0.1}, "kind='dpo'"),
        (X, {"kind": "rpo", "weight": "uniform", "group_size": 3}, "divide"),
        (X, {"ref_error": X[:, 0], "ref_pred": X}, "not both"),
    ],
)
def test_errors_are_one_line(pred: torch.Tensor, settings: dict, message: str) -> None:
    settings = {"beta": 1.0} | settings
    with pytest.raises(ValueError, match=message) as error:
        fused(pred, torch.zeros_like(pred), ref_pred=settings.pop("ref_pred", None), **settings)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("seed", range(3))
def test_triton_last_program_solves_dpo_in_any_order(triton_path: None, seed: int) -> None:
    """The last programs of rows and of all decide nothing and leave the counters at 0."""
    pred, ref_pred, target = inputs(5, shape=(300,))
    expected = fused(pred, target, ref_pred=ref_pred, beta=20.0)
    with shuffled(seed):
        for _ in range(2):
            found = fused(pred, target, ref_pred=ref_pred, beta=20.0)
            assert all(map(torch.equal, found, expected))
            assert not counters(pred.device, 1).any()
