"""The recipes of the README, run as they are printed, and compared with what they replace."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tolerances import sum_rounding

import fastpref_kernels
from fastpref_kernels import keyed_noise, paired_preference_loss, patch_unet, unpatch_unet

pytest.importorskip("diffusers")
pytest.importorskip("peft")

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def blocks() -> dict[str, str]:
    """Heading -> its Python block, in the section of recipes."""
    section = README.split("\n## Recipes\n")[1].split("\n## ")[0]
    return dict(re.findall(r"^### (.+?)\n.*?^```python\n(.*?)^```$", section, re.M | re.S))


SETUP, DPO, RPO, PIPELINE = blocks()


def run(*headings: str) -> dict[str, Any]:
    """The names that the setup and these recipes leave behind."""
    torch.manual_seed(0)
    names: dict[str, Any] = {}
    for heading in (SETUP, *headings):
        exec(compile(blocks()[heading], heading, "exec"), names)
    return names


def test_dpo_loss_block_is_replaced_by_the_same_loss(capsys: pytest.CaptureFixture) -> None:
    names = run(DPO)
    printed = re.findall(r"step \d: loss (\S+), accuracy", capsys.readouterr().out)
    assert printed[0] == "0.6931"  # log 2: LoRA begins at zero
    arguments = names["ref_pred"], names["target"], 5000.0
    plain, fused = (names["pred"].detach().clone().requires_grad_() for _ in range(2))
    source = re.search(r"^def loss_block.*?^    return [^\n]*\n", blocks()[DPO], re.M | re.S)
    assert source is not None
    exec(source[0].replace(".float()", ".double()"), names)
    expected = names["loss_block"](plain, *arguments)
    loss = paired_preference_loss(fused, arguments[1], ref_pred=arguments[0], beta=5000.0).loss
    assert (names["pred"] != names["ref_pred"]).any()  # a step was taken
    # beta / 2 multiplies the rounding of a reward, a mean of (pred - ref_pred) * (pred + ref_pred - 2 target)
    pred, ref_pred, target = (x.detach().double() for x in (plain, *arguments[:2]))
    size = ((pred - ref_pred) * (pred + ref_pred - 2 * target)).abs().flatten(1).mean(1).max().item()
    rounding = 2 * 2500.0 * (sum_rounding(pred[0].numel()) + 4 * 2.0**-24) * size
    assert rounding < 1e-5  # a difference of two fp32 means of squares could be off by 0.07
    assert abs(loss.item() - expected.item()) < rounding
    assert names["out"].loss.item() == loss.item()
    expected.backward()
    loss.backward()
    assert plain.grad is not None and fused.grad is not None
    assert (plain.grad - fused.grad).abs().max() < 2 * rounding * plain.grad.abs().max()


def test_rpo_with_keyed_noise_is_the_plain_formula_and_repeats() -> None:
    names = run(RPO)
    assert names["losses"] == run(RPO)["losses"]
    assert abs(names["losses"][0] - torch.tensor(2.0).log().item()) < 1e-6
    pred, ref_pred = names["pred"].detach().double(), names["ref_pred"].double()
    noise = keyed_noise(names["keys"], pred.shape[1:], torch.float32).double()
    reward_w, reward_l = ((ref_pred - noise).square() - (pred - noise).square()).mean((1, 2, 3)).chunk(2)
    emb_w, emb_l = (F.normalize(names[name].double(), dim=1) for name in ("emb_w", "emb_l"))
    omega = (emb_w @ emb_l.T / 0.1).softmax(1)
    margins = 2500.0 * (reward_w[:, None] - reward_l[None, :])
    assert abs((-(omega * F.logsigmoid(margins)).sum(1).mean()).item() - names["losses"][1]) < 1e-5


def test_pipeline_makes_the_same_images_patched() -> None:
    names = run(DPO, PIPELINE)
    assert names["counts"] == (17, 4, 32)
    assert unpatch_unet(names["unet"]) == (0, 0, 0)  # the recipe has undone it
    names["pipeline"].scheduler = type(names["pipeline"].scheduler).from_config(names["noise_scheduler"].config)
    call = re.search(r"pipeline\(\n.*?\n\)", blocks()[PIPELINE].split("images = ")[1], re.S)
    assert call is not None
    plain = eval(call[0], names).images
    torch.testing.assert_close(names["images"], plain, rtol=1e-4, atol=1e-4)
    assert patch_unet(names["unet"]) == names["counts"]


def test_every_public_name_is_in_the_readme() -> None:
    functions = [
        name for name in fastpref_kernels.__all__ if callable(getattr(fastpref_kernels, name)) and name.islower()
    ]
    assert [name for name in functions if f"`{name}(" not in README] == []
