"""A LoRA acts with the strength and in the place that its file says, however it was published, or is refused.

The oracle is the formula in float64, W + scale * B @ A, computed from the numbers that were written; peft's and
diffusers' own merges stand beside it.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import math
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from fastpref.config import Config, parse_config
from fastpref.errors import UserError
from fastpref.evaluate import sample
from fastpref.evaluate.sample import load_policy_pipeline
from fastpref.models.export import run_export
from fastpref.models.loading import unet_fingerprint
from fastpref.models.lora_file import load_adapter, read_lora, resolve_lora, save_lora
from fastpref.models.lora_text import load_text_adapters
from fastpref.models.lora_unet import fitted, lora_of
from fastpref.models.policy import load_policy

TARGETS = ["to_q", "proj_in", "conv1", "linear_1", "upsamplers.0.conv", "downsamplers.0.conv"]
EPS32 = torch.finfo(torch.float32).eps
State = dict[str, torch.Tensor]


@functools.cache
def _opened(folder: Path) -> UNet2DConditionModel:
    return UNet2DConditionModel.from_pretrained(folder / "unet")


def _base(folder: Path) -> UNet2DConditionModel:
    """The folder's UNet, to be changed."""
    return copy.deepcopy(_opened(folder))


def _adapted(sdxl: Path, **settings: Any) -> UNet2DConditionModel:
    unet = _base(sdxl)
    torch.manual_seed(2)
    unet.add_adapter(LoraConfig(init_lora_weights=False, **{"target_modules": TARGETS, "r": 4, **settings}))
    return unet


def _sgm(module: str) -> str:
    """The place in Stability's UNet of the random SDXL's modules (blocks of one layer), by hand."""
    blocks = {
        "down_blocks.0.resnets.0": "input_blocks.1.0",
        "down_blocks.0.downsamplers.0.conv": "input_blocks.2.0.op",
        "down_blocks.1.resnets.0": "input_blocks.3.0",
        "down_blocks.1.attentions.0": "input_blocks.3.1",
        "mid_block.resnets.0": "middle_block.0",
        "mid_block.attentions.0": "middle_block.1",
        "mid_block.resnets.1": "middle_block.2",
        **{f"up_blocks.{b}.resnets.{n}": f"output_blocks.{2 * b + n}.0" for b in (0, 1) for n in (0, 1)},
        **{f"up_blocks.0.attentions.{n}": f"output_blocks.{n}.1" for n in (0, 1)},
        "up_blocks.0.upsamplers.0.conv": "output_blocks.1.2.conv",
        "time_embedding.linear_1": "time_embed.0",
        "add_embedding.linear_1": "label_emb.0.0",
    }
    (start,) = [block for block in blocks if module == block or module.startswith(f"{block}.")]
    return blocks[start] + module.removeprefix(start).replace(".conv1", ".in_layers.2")


def _renamed(unet: UNet2DConditionModel, name: Callable[[str, str], str], alphas: str = "") -> State:
    """``name(module, "A" or "B")`` to factor, and ``name(module, "")`` + ``alphas`` to alpha."""
    lora, state = lora_of(unet), {}
    for module, alpha in lora.alphas.items():
        for part in "AB":
            state[name(module, part)] = lora.state[f"{module}.lora_{part}.weight"].clone()
        if alphas:
            state[name(module, "") + alphas] = torch.tensor(alpha)
    return state


def _kohya(module: str, part: str) -> str:
    tail = {"A": ".lora_down.weight", "B": ".lora_up.weight", "": ""}[part]
    return "lora_unet_" + _sgm(module).replace(".", "_") + tail


def _comfy(module: str, part: str) -> str:
    return f"diffusion_model.{_sgm(module)}" + {"A": ".lora_down.weight", "B": ".lora_up.weight", "": ""}[part]


def _peft(sdxl: Path, folder: Path, **settings: Any) -> UNet2DConditionModel:
    base = _base(sdxl)
    torch.manual_seed(2)
    config = LoraConfig(init_lora_weights=False, **{"target_modules": TARGETS, "r": 4, **settings})
    get_peft_model(base, config).save_pretrained(folder)
    return _adapted(sdxl, **settings)  # the same draws


def _diffusers(sdxl: Path, folder: Path, **settings: Any) -> UNet2DConditionModel:
    unet = _adapted(sdxl, **settings)
    metadata = unet.peft_config["default"].to_dict()
    metadata["target_modules"] = sorted(metadata["target_modules"])
    StableDiffusionXLPipeline.save_lora_weights(
        folder, get_peft_model_state_dict(unet), unet_lora_adapter_metadata=metadata
    )
    return unet


def _written(sdxl: Path, folder: Path, name: Callable[[str, str], str], alphas: str = "", **settings: Any) -> Any:
    unet = _adapted(sdxl, **settings)
    folder.mkdir()
    save_file(_renamed(unet, name, alphas), folder / "some.safetensors")
    return unet


def _old(module: str, part: str) -> str:
    return f"unet.{module}.lora.{'down' if part == 'A' else 'up'}.weight"


def _plain(prefix: str) -> Callable[[str, str], str]:
    return lambda module, part: f"{prefix}{module}.lora_{part}.weight" if part else f"{prefix}{module}"


PATTERNS = {"rank_pattern": {"to_q": 2, "conv1": 9}, "alpha_pattern": {"proj_in": 3.5, "conv1": 5}}
PUBLISHED: dict[str, Callable[[Path, Path], UNet2DConditionModel]] = {
    "peft": lambda m, f: _peft(m, f, lora_alpha=16),
    "peft rslora": lambda m, f: _peft(m, f, lora_alpha=16, use_rslora=True),
    "peft rslora patterns": lambda m, f: _peft(m, f, lora_alpha=2, use_rslora=True, **PATTERNS),
    "diffusers": lambda m, f: _diffusers(m, f, lora_alpha=1),
    "diffusers rslora": lambda m, f: _diffusers(m, f, r=64, lora_alpha=64, use_rslora=True),
    "diffusers rslora patterns": lambda m, f: _diffusers(m, f, lora_alpha=2, use_rslora=True, **PATTERNS),
    "kohya": lambda m, f: _written(m, f, _kohya, ".alpha", lora_alpha=1),
    "kohya patterns": lambda m, f: _written(m, f, _kohya, ".alpha", lora_alpha=2, **PATTERNS),
    "comfy": lambda m, f: _written(m, f, _comfy, ".alpha", lora_alpha=7),
    "comfy diffusers names": lambda m, f: _written(m, f, _plain("diffusion_model."), ".alpha", lora_alpha=7),
    "bare, no alpha": lambda m, f: _written(m, f, _plain(""), lora_alpha=4),
    "old": lambda m, f: _written(m, f, _old, lora_alpha=4),
}

# One layout of each kind of numbers; what is read of the others is written by the same code.
NUMBERS = ("peft", "diffusers rslora", "diffusers rslora patterns", "kohya patterns")


def _oracle(sdxl: Path, adapted: UNet2DConditionModel) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Weight name to (W + scale B A in float64, what one fp32 matrix product and one sum may be off by)."""
    base = _opened(sdxl).state_dict()
    found = {}
    for module, layer in adapted.named_modules():
        if not hasattr(layer, "lora_A"):
            continue
        weight = base[f"{module}.weight"].double()
        down, up = (getattr(layer, f"lora_{p}")["default"].weight.detach().double().flatten(1) for p in "AB")
        scale, rank = layer.scaling["default"], len(down)
        merged = weight + (scale * up @ down).view_as(weight)
        terms = abs(scale) * (up.abs() @ down.abs()).view_as(weight)
        # rank products and sums, the scale, the addition: each rounds by at most half an eps
        found[f"{module}.weight"] = merged, EPS32 * ((rank + 2) * terms + weight.abs() + terms)
    return found


def _assert_merged(state: Mapping[str, torch.Tensor], oracle: Any, base: Mapping[str, torch.Tensor]) -> None:
    for name, weight in base.items():
        if name not in oracle:
            assert torch.equal(state[name], weight), name
            continue
        merged, bound = oracle[name]
        assert ((state[name].double() - merged).abs() <= bound).all(), name
        assert ((merged - weight.double()).abs() > 4 * bound).any(), "an adapter that is not there would pass"


@pytest.fixture(scope="module")
def theirs(sdxl: Path) -> Any:
    """diffusers' pipeline."""
    return DiffusionPipeline.from_pretrained(sdxl)


@pytest.fixture(scope="module")
def plain_peft(sdxl: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA as peft writes it, of rank 4 and alpha 16, to be copied."""
    folder = tmp_path_factory.mktemp("peft")
    _peft(sdxl, folder, lora_alpha=16, target_modules=["to_q"])
    return folder


@pytest.mark.parametrize("layout", PUBLISHED)
def test_every_reader_applies_the_strength_of_every_published_layout(
    sdxl: Path, theirs: Any, tmp_path: Path, layout: str
) -> None:
    adapted = PUBLISHED[layout](sdxl, tmp_path / "lora")
    oracle, base = _oracle(sdxl, adapted), load_file(next((sdxl / "unet").glob("*.safetensors")))
    merged = run_export(tmp_path / "lora", tmp_path / "merged", model=str(sdxl))
    _assert_merged(load_file(next((merged / "unet").glob("*.safetensors"))), oracle, base)

    settings = {"model": str(sdxl), "init_lora": str(tmp_path / "lora"), "device": "cpu"}
    policy = load_policy(parse_config(settings), sdxl, torch.device("cpu"), needs_reference=True)
    with policy.merged():
        state = {name.replace(".base_layer", ""): tensor for name, tensor in policy.unet.state_dict().items()}
        _assert_merged(state, oracle, base)
    again = save_lora(policy.unet, tmp_path / "again.safetensors")  # what a run that goes on from it would export

    drawing = load_policy_pipeline(parse_config({"model": str(sdxl), "device": "cpu"}), lora=tmp_path / "lora")
    drawing.unet.fuse_lora()
    drawing.unet.unload_lora()
    _assert_merged(drawing.unet.state_dict(), oracle, base)

    kohya = run_export(tmp_path / "lora", tmp_path / "kohya.safetensors", layout="kohya", model=str(sdxl))
    assert read_lora(kohya, unet_config=policy.unet.config).alphas == pytest.approx(read_lora(again).alphas, rel=EPS32)
    plain = run_export(tmp_path / "lora", tmp_path / "diffusers.safetensors", layout="diffusers", model=str(sdxl))
    same = read_lora(plain)
    assert same.alphas == pytest.approx(read_lora(again).alphas, rel=EPS32)
    assert all(torch.equal(same.state[key], tensor) for key, tensor in read_lora(again).state.items())
    # Of those that say the same, diffusers opens one. It drops the alpha of an attention layer in a kohya file where
    # that is not the commonest one.
    for file in (again, *([] if layout.endswith("rslora patterns") else [kohya])) if layout in NUMBERS else ():
        theirs.unet = _base(sdxl)
        theirs.load_lora_weights(file.parent, weight_name=file.name)
        theirs.unet.fuse_lora()
        theirs.unet.unload_lora()
        _assert_merged(theirs.unet.state_dict(), oracle, base)


@pytest.mark.parametrize("layout", [name for name in PUBLISHED if name.startswith(("peft", "diffusers"))])
def test_the_merge_is_peft_s_and_diffusers_own_in_float64(sdxl: Path, tmp_path: Path, layout: str) -> None:
    PUBLISHED[layout](sdxl, tmp_path / "lora")
    theirs = _base(sdxl).double()
    if layout.startswith("peft"):
        theirs = PeftModel.from_pretrained(theirs, tmp_path / "lora").merge_and_unload()
    else:
        theirs.load_lora_adapter(
            tmp_path / "lora" / "pytorch_lora_weights.safetensors", prefix="unet", use_safetensors=True
        )
        theirs.fuse_lora()
        theirs.unload_lora()
    ours = _base(sdxl).double()
    load_adapter(ours, tmp_path / "lora", "a")
    ours.fuse_lora()
    ours.unload_lora()
    found = ours.state_dict()
    for name, weight in theirs.state_dict().items():
        torch.testing.assert_close(found[name], weight, rtol=4 * torch.finfo(torch.float64).eps, atol=1e-14)


def test_an_alpha_that_half_precision_rounds_is_written_in_full(sdxl: Path, tmp_path: Path) -> None:
    """rsLoRA of rank 5 has an irrational alpha; fp16 would be off by up to 2^-11 of it."""
    adapted = _diffusers(sdxl, tmp_path / "lora", r=5, lora_alpha=3, use_rslora=True)
    out = run_export(tmp_path / "lora", tmp_path / "k.safetensors", layout="kohya", model=str(sdxl), dtype="fp16")
    config = dict(adapted.config)
    assert set(read_lora(out, unet_config=config).alphas.values()) == {float(torch.tensor(3 * math.sqrt(5)))}
    tensors = load_file(out)
    assert {tensor.dtype for key, tensor in tensors.items() if key.endswith("weight")} == {torch.float16}


def test_the_adapter_of_a_unet_is_written_as_strong_as_it_acts(sdxl: Path, tmp_path: Path) -> None:
    unet = _adapted(sdxl, lora_alpha=3, use_rslora=True)
    assert set(lora_of(unet).alphas.values()) == {3 / math.sqrt(4) * 4}
    unet.set_adapters(["default"], 0.5)
    assert set(lora_of(unet).alphas.values()) == {0.5 * 3 / math.sqrt(4) * 4}
    with pytest.raises(UserError, match="DoRA"):
        save_lora(_adapted(sdxl, use_dora=True, target_modules=["to_q"]), tmp_path / "dora.safetensors")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"use_dora": True}, "use_dora=true"),
        ({"lora_bias": True}, "lora_bias=true"),
        ({"bias": "lora_only"}, "bias="),
        ({"modules_to_save": ["conv_in"]}, "modules_to_save"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights"),
        ({"init_lora_weights": "olora"}, "init_lora_weights"),
        ({"layer_replication": [[0, 1]]}, "layer_replication"),
        ({"use_qalora": True}, "use_qalora"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
        ({"peft_type": "LOHA"}, "peft_type"),
        ({"of_a_later_peft": 0.5}, "of_a_later_peft=0.5"),
        ({"r": 8}, "says rank 8"),
        ({"rank_pattern": {"to_q": 3}}, "says rank 3"),
        ({"lora_alpha": None}, "configuration is damaged"),
        ({"lora_alpha": float("nan")}, "alpha of .* is nan"),
        ({"lora_alpha": 0}, "alpha of .* is 0"),
        ({"alpha_pattern": {"(": 3}}, "configuration is damaged"),
        ({"alpha_pattern": [3]}, "configuration is damaged"),
        (None, "not a JSON object"),
        ("missing", "strength of this LoRA, which peft wrote, is not known"),
    ],
    ids=str,
)
def test_what_a_plain_lora_does_not_have_is_refused(plain_peft: Path, tmp_path: Path, change: Any, says: str) -> None:
    shutil.copytree(plain_peft, tmp_path, dirs_exist_ok=True)
    config = tmp_path / "adapter_config.json"
    if change == "missing":
        config.unlink()
    else:
        config.write_text("[1]" if change is None else json.dumps(json.loads(config.read_text()) | change))
    for path in (tmp_path, (tmp_path / "adapter_model.safetensors").rename(tmp_path / "renamed.safetensors")):
        with pytest.raises(UserError, match=says) as caught:
            read_lora(path)
        assert str(tmp_path) in str(caught.value)
        if path == tmp_path:
            continue
    if isinstance(change, dict):
        metadata = {f"unet.{key}": value for key, value in json.loads(config.read_text()).items()}
        state = {f"unet.{key.removeprefix('base_model.model.')}": t for key, t in load_file(path).items()}
        save_file(state, tmp_path / "d.safetensors", metadata={"lora_adapter_metadata": json.dumps(metadata)})
        with pytest.raises(UserError, match=says):
            read_lora(tmp_path / "d.safetensors")


def test_settings_that_change_nothing_are_read(plain_peft: Path, tmp_path: Path) -> None:
    shutil.copytree(plain_peft, tmp_path, dirs_exist_ok=True)
    config = tmp_path / "adapter_config.json"
    change = {"fan_in_fan_out": True, "lora_dropout": 0.3, "inference_mode": True, "init_lora_weights": "gaussian"}
    config.write_text(json.dumps(json.loads(config.read_text()) | change))
    assert set(read_lora(tmp_path).alphas.values()) == {16.0}


def _pair(rank: int = 2, name: str = "unet.mid_block.attentions.0.proj_in") -> State:
    return {f"{name}.lora_A.weight": torch.ones(rank, 32), f"{name}.lora_B.weight": torch.ones(32, rank)}


def _metadata(**settings: Any) -> dict[str, str]:
    every = {"unet.r": 2, "unet.lora_alpha": 8.0} | {f"unet.{key}": value for key, value in settings.items()}
    return {"lora_adapter_metadata": json.dumps(every)}


PROJ = "unet.mid_block.attentions.0.proj_in"
TWICE = _pair(name="mid_block.attentions.0.proj_in")
HOLED = _pair() | {f"{PROJ}.lora_A.weight": torch.full((2, 32), torch.nan)}
ENDLESS = _pair() | {f"{PROJ}.lora_B.weight": torch.full((32, 2), -torch.inf).half()}
TINY_NAN = _pair() | {f"{PROJ}.lora_B.weight": torch.full((32, 2), torch.nan).to(torch.float8_e4m3fn)}


@pytest.mark.parametrize(
    ("state", "metadata", "says"),
    [
        (_pair() | {f"{PROJ}.alpha": torch.tensor(2.0)}, _metadata(), "two alphas .* 8 .* 2 by its tensor"),
        (_pair() | {f"{PROJ}.alpha": torch.tensor(8.0)}, _metadata(use_rslora=True), "two alphas"),
        (_pair() | {f"{PROJ}.alpha": torch.tensor([8.0, 8.0])}, None, "has 2 numbers"),
        (_pair() | {f"{PROJ}.alpha": torch.tensor(0.0)}, None, "is 0"),
        (_pair() | {f"{PROJ}.alpha": torch.tensor(torch.nan)}, None, "NaN or infinite"),
        (_pair() | {"unet.mid_block.attentions.0.proj_out.alpha": torch.tensor(1.0)}, None, "has no LoRA weights"),
        (_pair() | TWICE, None, "a second time"),
        (_pair() | {f"{PROJ}.scale": torch.tensor(2.0)}, None, "not a UNet LoRA weight"),
        (_pair() | {f"{PROJ}.scalar": torch.tensor(2.0)}, None, "not a UNet LoRA weight"),
        (_pair() | {f"{PROJ}.dora_scale": torch.ones(32)}, None, "a DoRA"),
        (_pair() | {f"{PROJ}.lora_mid.weight": torch.ones(2, 2, 3, 3)}, None, "Tucker"),
        (_pair() | {f"{PROJ}.lora_B.bias": torch.ones(32)}, None, "with biases"),
        (_pair() | {"diffusion_model.out.0.diff": torch.ones(32)}, None, "a full difference"),
        ({f"{PROJ}.hada_w1_a": torch.ones(2, 2)}, None, "a LoHa"),
        ({f"{PROJ}.lokr_w1": torch.ones(2, 2)}, None, "a LoKr"),
        ({key: tensor.to(torch.int8) for key, tensor in _pair().items()}, None, "torch.int8, not real numbers"),
        ({key: tensor[:0] if "A" in key else tensor[:, :0] for key, tensor in _pair().items()}, None, "has rank 0"),
        (HOLED, None, "proj_in.lora_A.weight has 64 of 64 numbers that are NaN or infinite"),
        (ENDLESS, None, "NaN or infinite"),
        (TINY_NAN, None, "NaN or infinite"),
        (_pair() | {"text_encoder.a.lora_A.weight": torch.full((1,), torch.nan)}, None, "NaN or infinite"),
        (_pair(name="lora_unet_input_blocks_9_1_proj_in"), None, "not a UNet LoRA weight|has no layer 9"),
    ],
)
def test_a_lora_that_contradicts_itself_or_is_broken_is_one_line(
    theirs: Any,
    sdxl: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    state: State,
    metadata: dict[str, str] | None,
    says: str,
) -> None:
    texts = {part: getattr(theirs, part) for part in KOHYA_TEXT}
    monkeypatch.setattr(sample, "load_pipeline", lambda *_: argparse.Namespace(unet=_base(sdxl), **texts))
    save_file({key: tensor.clone() for key, tensor in state.items()}, tmp_path / "bad.safetensors", metadata=metadata)
    with pytest.raises(UserError, match=says) as caught:
        load_policy_pipeline(parse_config({"model": str(sdxl)}), lora=tmp_path / "bad.safetensors")
    assert "bad.safetensors" in str(caught.value) and "\n" not in str(caught.value)
    if not any(key.startswith("text_encoder") for key in state):
        with pytest.raises(UserError, match=says):
            run_export(tmp_path / "bad.safetensors", tmp_path / "out", model=str(sdxl))
    assert not (tmp_path / "out").exists()


def test_two_sources_that_agree_are_read(tmp_path: Path) -> None:
    state = _pair() | {f"{PROJ}.alpha": torch.tensor(8.0 * math.sqrt(2)).bfloat16()}
    save_file(state, tmp_path / "a.safetensors", metadata=_metadata(use_rslora=True))
    assert list(read_lora(tmp_path / "a.safetensors").alphas.values()) == [8.0 * math.sqrt(2)]
    only_text = {"lora_adapter_metadata": json.dumps({"text_encoder.r": 4, "text_encoder.lora_alpha": 16})}
    save_file(_pair(), tmp_path / "b.safetensors", metadata=only_text)
    assert list(read_lora(tmp_path / "b.safetensors").alphas.values()) == [2.0]


def test_a_folder_means_one_lora(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is none"):
        resolve_lora(tmp_path)
    (tmp_path / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(UserError, match=r"adapter_model\.bin, a pickle"):
        resolve_lora(tmp_path)
    (tmp_path / "mine.safetensors").write_bytes(b"")
    assert resolve_lora(tmp_path).name == "mine.safetensors"
    (tmp_path / "yours.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match=r"2 LoRA files \(mine.safetensors, yours.safetensors\)"):
        resolve_lora(tmp_path)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    assert resolve_lora(tmp_path).name == "adapter_model.safetensors"
    (tmp_path / "pytorch_lora_weights.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="2 LoRA files"):
        resolve_lora(tmp_path)


def test_the_fingerprint_covers_what_decides_the_strength(sdxl: Path, plain_peft: Path, tmp_path: Path) -> None:
    shutil.copytree(plain_peft, tmp_path, dirs_exist_ok=True)
    config, found = tmp_path / "adapter_config.json", set()
    for path in (str(tmp_path), str(tmp_path / "adapter_model.safetensors")):
        found.add(unet_fingerprint(sdxl, None, path))
    assert len(found) == 1
    (tmp_path / "README.md").write_text("decides nothing")
    assert unet_fingerprint(sdxl, None, str(tmp_path)) in found
    config.write_text(config.read_text().replace('"lora_alpha": 16', '"lora_alpha": 8'))
    assert unet_fingerprint(sdxl, None, str(tmp_path)) not in found


def test_text_encoder_weights_are_drawn_with_and_not_trained_on(sdxl: Path, tmp_path: Path) -> None:
    """As strong as diffusers makes them, rsLoRA included."""
    pipe = DiffusionPipeline.from_pretrained(sdxl)
    unet = _adapted(sdxl, target_modules=["to_q"])
    config = LoraConfig(r=4, lora_alpha=4, use_rslora=True, init_lora_weights=False, target_modules=["q_proj"])
    torch.manual_seed(4)
    pipe.text_encoder.add_adapter(config)
    metadata = [model.peft_config["default"].to_dict() for model in (unet, pipe.text_encoder)]
    for one in metadata:
        one["target_modules"] = sorted(one["target_modules"])
    StableDiffusionXLPipeline.save_lora_weights(
        tmp_path,
        get_peft_model_state_dict(unet),
        get_peft_model_state_dict(pipe.text_encoder),
        unet_lora_adapter_metadata=metadata[0],
        text_encoder_lora_adapter_metadata=metadata[1],
    )
    drawing = load_policy_pipeline(parse_config({"model": str(sdxl), "device": "cpu"}), lora=tmp_path)
    theirs, ids = DiffusionPipeline.from_pretrained(sdxl), torch.arange(6)[None]
    plain = theirs.text_encoder(ids)[0]
    theirs.load_lora_weights(tmp_path)
    assert torch.equal(drawing.text_encoder(ids)[0], theirs.text_encoder(ids)[0])
    assert torch.equal(drawing.text_encoder(ids)[0], pipe.text_encoder(ids)[0])
    assert not torch.allclose(drawing.text_encoder(ids)[0], plain)
    settings = {"model": str(sdxl), "init_lora": str(tmp_path)}
    with pytest.raises(UserError, match="text-encoder weights"):
        load_policy(parse_config(settings), sdxl, torch.device("cpu"), needs_reference=False)


LAYERS = ["self_attn.q_proj", "self_attn.out_proj", "mlp.fc1"]
KOHYA_TEXT = {"text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}
COMFY_TEXT = {part: f"text_encoders.clip_{letter}.transformer." for part, letter in zip(KOHYA_TEXT, "lg", strict=True)}


def _oldest(part: str, path: str) -> tuple[str, str, str]:
    """diffusers' attention processors, in files from before its own LoRA layers."""
    if "self_attn" not in path:
        return TEXT_LAYOUTS["old"](part, path)
    old = path.replace("q_proj", "to_q").replace("out_proj", "to_out")
    return f"{part}.text_model.{old}_lora", ".down", ".up"


TEXT_LAYOUTS: dict[str, Callable[[str, str], tuple[str, str, str]]] = {
    "kohya": lambda part, path: (KOHYA_TEXT[part] + f"text_model.{path}".replace(".", "_"), ".lora_down", ".lora_up"),
    "comfy": lambda part, path: (f"{COMFY_TEXT[part]}text_model.{path}", ".lora_down", ".lora_up"),
    "diffusers": lambda part, path: (f"{part}.text_model.{path}", ".lora_A", ".lora_B"),
    "diffusers, bare": lambda part, path: (f"{part}.{path}", ".lora_A", ".lora_B"),
    "oldest": _oldest,
    "old": lambda part, path: (f"{part}.text_model.{path}", ".lora_linear_layer.down", ".lora_linear_layer.up"),
}


@pytest.mark.parametrize("alpha", [None, 16.0])
@pytest.mark.parametrize("layers", [LAYERS, LAYERS[:1]], ids=["all", "q alone"])
@pytest.mark.parametrize("layout", TEXT_LAYOUTS)
def test_text_encoder_weights_act_in_every_published_layout(
    theirs: Any, tmp_path: Path, layout: str, layers: list[str], alpha: float | None
) -> None:
    pipe = copy.deepcopy(theirs)
    state: State = {}
    wanted: dict[tuple[str, str], torch.Tensor] = {}
    torch.manual_seed(6)
    for part in KOHYA_TEXT:
        inner = getattr(getattr(pipe, part), "text_model", getattr(pipe, part))
        for path in (f"encoder.layers.{number}.{layer}" for number in (0, 1) for layer in layers):
            name, down, up = TEXT_LAYOUTS[layout](part, path)
            weight = inner.get_submodule(path).weight
            a, b = torch.randn(4, weight.shape[1]), torch.randn(weight.shape[0], 4)
            state |= {f"{name}{down}.weight": a, f"{name}{up}.weight": b}
            state |= {} if alpha is None else {f"{name}.alpha": torch.tensor(alpha)}
            wanted[part, path] = (alpha or 4.0) / 4 * b @ a
    save_file(state, tmp_path / "text.safetensors")
    load_text_adapters(pipe, tmp_path / "text.safetensors")
    found = {}
    for part in KOHYA_TEXT:
        inner = getattr(getattr(pipe, part), "text_model", getattr(pipe, part))
        for path, layer in inner.named_modules():
            if hasattr(layer, "lora_A"):
                found[part, path] = layer.get_delta_weight("default")
    assert found.keys() == wanted.keys()
    for place, change in wanted.items():
        torch.testing.assert_close(found[place], change)


def test_text_encoder_weights_without_a_place_are_one_line(theirs: Any, sdxl: Path, tmp_path: Path) -> None:
    file = tmp_path / "text.safetensors"
    pair = {"text_encoder.encoder.layers.7.mlp.fc1.lora_A.weight": torch.ones(2, 32)}
    pair |= {"text_encoder.encoder.layers.7.mlp.fc1.lora_B.weight": torch.ones(128, 2)}
    save_file(pair | _pair(), file)
    with pytest.raises(UserError, match=r"another text_encoder .*layers\.7\.mlp\.fc1 is not"):
        load_policy_pipeline(parse_config({"model": str(sdxl)}), lora=file)
    save_file({key.replace("encoder.", "encoder_2.", 1): tensor for key, tensor in pair.items()}, file)
    with pytest.raises(UserError, match="has weights for text_encoder_2, the model has none"):
        load_text_adapters(argparse.Namespace(text_encoder=theirs.text_encoder), file)


def _tall(state: Mapping[str, torch.Tensor]) -> State:
    """Every factor of a linear layer as that of a 1 x 1 convolution."""
    return {key: t[..., None, None].clone() if t.ndim == 2 else t.clone() for key, t in state.items()}


def _flat(state: Mapping[str, torch.Tensor]) -> State:
    """Every factor without a kernel of one pixel."""
    return {key: t[..., 0, 0].clone() if t.ndim == 4 and t.shape[-1] == 1 else t.clone() for key, t in state.items()}


@pytest.mark.parametrize("reshape", [_tall, _flat])
@pytest.mark.parametrize("family", ["sdxl", "sd15"])  # proj_in is linear in one, a convolution in the other
def test_shapes_that_mean_the_same_are_accepted(
    request: pytest.FixtureRequest, tmp_path: Path, family: str, reshape: Callable[[Any], State]
) -> None:
    model: Path = request.getfixturevalue(family)
    unet = _adapted(model, lora_alpha=7)
    expected = lora_of(unet)
    assert reshape(expected.state).keys() == expected.state.keys()
    changed = [key for key, tensor in reshape(expected.state).items() if tensor.shape != expected.state[key].shape]
    assert changed
    save_lora(expected, tmp_path / "plain.safetensors")
    save_file(reshape(expected.state), tmp_path / "l.safetensors", metadata=_metadata(r=4, lora_alpha=7))
    found = fitted(read_lora(tmp_path / "l.safetensors"), unet, "")
    assert found.alphas == expected.alphas
    assert all(torch.equal(found.state[key], tensor) for key, tensor in expected.state.items())
    out = [run_export(tmp_path / f"{name}.safetensors", tmp_path / name, model=str(model)) for name in ("plain", "l")]
    first, second = (load_file(next((folder / "unet").glob("*.safetensors"))) for folder in out)
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize(
    ("module", "down", "up"),
    [
        ("down_blocks.0.resnets.0.conv1", (2, 16, 1, 1), (16, 2, 1, 1)),
        ("down_blocks.0.resnets.0.conv1", (2, 16, 3, 3), (16, 2, 3, 3)),
        ("down_blocks.0.resnets.0.conv1", (2, 16), (16, 2)),
        ("down_blocks.0.resnets.0.conv1", (2, 8, 3, 3), (16, 2, 1, 1)),
        ("mid_block.attentions.0.proj_in", (2, 32, 3, 3), (32, 2, 1, 1)),
        ("mid_block.attentions.0.proj_in", (2, 16), (32, 2)),
        ("mid_block.attentions.0.proj_in", (2, 32), (16, 2)),
        ("mid_block.attentions.0.proj_in", (2, 32, 1), (32, 2, 3)),
        ("mid_block.attentions.0.norm", (2, 32), (32, 2)),
        ("mid_block.attentions.0.transformer_blocks.0.attn1", (2, 32), (32, 2)),
        ("mid_block.attentions.9.proj_in", (2, 32), (32, 2)),
    ],
)
def test_other_shapes_are_one_line_that_names_the_module(
    sdxl: Path, tmp_path: Path, module: str, down: tuple[int, ...], up: tuple[int, ...]
) -> None:
    state = {f"unet.{module}.lora_A.weight": torch.ones(down), f"unet.{module}.lora_B.weight": torch.ones(up)}
    save_file(state, tmp_path / "l.safetensors")
    for layout in ("pipeline", "kohya", "diffusers"):
        with pytest.raises(UserError, match="another UNet") as caught:
            run_export(tmp_path / "l.safetensors", tmp_path / "out", layout=layout, model=str(sdxl))  # type: ignore[arg-type]
        assert module in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_unet_of_a_run_is_what_its_lora_is_merged_into(sdxl: Path, tmp_path: Path) -> None:
    other = _base(sdxl)
    with torch.no_grad():
        other.conv_in.weight.add_(1)
    other.save_pretrained(tmp_path / "other" / "unet")
    (tmp_path / "run").mkdir()
    save_lora(_adapted(sdxl, target_modules=["to_q"]), tmp_path / "run")
    (tmp_path / "run" / "config.yaml").write_text(f"model: {sdxl}\nunet: {tmp_path}/other\n")
    for settings, conv in (({}, other.conv_in.weight), ({"model": str(sdxl)}, other.conv_in.weight - 1)):
        out = run_export(tmp_path / "run", tmp_path / "out", overwrite=True, **settings)
        merged = load_file(next((out / "unet").glob("*.safetensors")))["conv_in.weight"]
        torch.testing.assert_close(merged, conv.detach(), rtol=0, atol=2 * EPS32)  # + 1 - 1 rounds
    assert run_export(tmp_path / "run", tmp_path / "k.safetensors", layout="kohya").is_file()


def test_a_unet_with_nan_and_a_dtype_that_overflows_export_nothing(sdxl: Path, tmp_path: Path) -> None:
    unet = _base(sdxl)
    with torch.no_grad():
        unet.conv_out.weight[0, 0, 0, 0] = 1e5
    unet.save_pretrained(tmp_path / "wide")
    with pytest.raises(UserError, match=r"conv_out.weight has 1 of \d+ numbers .*float16"):
        run_export(tmp_path / "wide", tmp_path / "out", model=str(sdxl), dtype="fp16")
    with torch.no_grad():
        unet.conv_out.weight[0, 0, 0, 0] = torch.nan
    unet.save_pretrained(tmp_path / "nan")
    with pytest.raises(UserError, match=r"conv_out.weight has 1 of \d+ numbers"):
        run_export(tmp_path / "nan", tmp_path / "out", model=str(sdxl))
    config: Config = parse_config({"model": str(sdxl), "device": "cpu"})
    with pytest.raises(UserError, match=r"conv_out.weight has 1 of \d+ numbers"):
        load_policy_pipeline(config, unet=tmp_path / "nan")
    big = {key: 1e5 * tensor for key, tensor in _pair().items()}
    save_file(big, tmp_path / "big.safetensors")
    with pytest.raises(UserError, match="NaN or infinite"):
        run_export(tmp_path / "big.safetensors", tmp_path / "out", layout="kohya", model=str(sdxl), dtype="fp16")
    assert not (tmp_path / "out").exists()
