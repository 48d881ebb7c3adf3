"""A UNet in one file means the same in every naming that programs write."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from original_layout import State, original_unet
from safetensors.torch import save_file

from fastpref.emoji.random_models import make_random_sd15, make_random_sdxl
from fastpref.errors import UserError
from fastpref.models.export import export_pipeline, run_export, save_lora, stored_dtype
from fastpref.models.loading import load_unet
from fastpref.models.policy import load_policy
from fastpref.models.unet_file import is_unet_file

LAYERS = 1  # of the random models' blocks


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {"sdxl": make_random_sdxl(folder / "sdxl"), "sd15": make_random_sd15(folder / "sd15")}


def weights(folder: Path) -> State:
    """Of the folder's UNet, all moved, so that no file can be mistaken for the folder's own."""
    return {name: tensor + 0.25 for name, tensor in load_unet(folder, torch.float32).state_dict().items()}


def _original(state: State) -> State:
    return original_unet(state, LAYERS)


def _under(prefix: str, named: Callable[[State], State] = dict) -> Callable[[State], State]:
    return lambda state: {prefix + name: tensor for name, tensor in named(state).items()}


def _compiled_blocks(state: State) -> State:
    return {name.replace(".resnets.", "._orig_mod.resnets."): tensor for name, tensor in state.items()}


def _whole_checkpoint(state: State) -> State:
    others = {
        "first_stage_model.encoder.conv_in.weight": torch.zeros(2, 3, 3, 3),
        "cond_stage_model.transformer.text_model.embeddings.position_ids": torch.zeros(1, 77, dtype=torch.int64),
        **{"model_ema.diffusion_modelinput_blocks00weight": torch.zeros(1), "model_ema.decay": torch.zeros(1)},
    }
    return _under("model.diffusion_model.", _original)(state) | others


def _linear_projections(state: State) -> State:
    """proj_in and proj_out with and without the 1x1 kernel exchanged."""

    def turned(tensor: torch.Tensor) -> torch.Tensor:
        return tensor[:, :, 0, 0] if tensor.ndim == 4 else tensor[:, :, None, None]

    return {
        n: turned(t).contiguous() if n.endswith(("proj_in.weight", "proj_out.weight")) else t for n, t in state.items()
    }


NAMINGS: dict[str, Callable[[State], State]] = {
    "diffusers": dict,
    "unet.": _under("unet."),
    "module.": _under("module."),
    "module.unet.": _under("module.unet."),
    "model.": _under("model."),
    "diffusion_model.": _under("diffusion_model."),
    "compiled": _under("_orig_mod."),
    "module, compiled": _under("module._orig_mod."),
    "compiled blocks": _compiled_blocks,
    "original": _original,
    "original, diffusion_model.": _under("diffusion_model.", _original),
    "original, model.diffusion_model.": _under("model.diffusion_model.", _original),
    "whole checkpoint": _whole_checkpoint,
    "with an EMA": lambda state: state | {"model_ema.conv_inweight": torch.zeros(1)},
    "other projections": _linear_projections,
}


@pytest.mark.parametrize("naming", NAMINGS)
@pytest.mark.parametrize("family", ["sdxl", "sd15"])
def test_every_naming_is_the_same_unet(models: dict[str, Path], tmp_path: Path, family: str, naming: str) -> None:
    state, file = weights(models[family]), tmp_path / "unet.safetensors"
    save_file(NAMINGS[naming](state), file)
    unet = load_unet(models[family], torch.float64, str(file))
    loaded = unet.state_dict()
    assert is_unet_file(file) and not unet.training and all(p.requires_grad for p in unet.parameters())
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[name], state[name].double()) for name in state)


def test_a_pickled_file_is_read_without_running_code(models: dict[str, Path], tmp_path: Path) -> None:
    state = weights(models["sd15"])
    torch.save({"state_dict": _under("model.diffusion_model.", _original)(state)}, tmp_path / "old.ckpt")
    loaded = load_unet(models["sd15"], torch.float32, str(tmp_path / "old.ckpt")).state_dict()
    assert all(torch.equal(loaded[name], state[name]) for name in state)


def _changed(change: Callable[[State], Any], named: Callable[[State], State] = dict) -> Callable[[State], State]:
    def make(state: State) -> State:
        made = dict(named(state))
        change(made)
        return made

    return make


def _set(name: str, tensor: torch.Tensor) -> Callable[[State], Any]:
    return lambda state: state.update({name: tensor})


FAULTS: dict[str, Callable[[State], State]] = {
    "lacks conv_out.bias": _changed(lambda s: s.pop("conv_out.bias")),
    "lacks label_emb.0.0.bias": _changed(lambda s: s.pop("label_emb.0.0.bias"), _original),
    "lacks add_embedding.linear_1.bias and 23 more": lambda s: {
        n: t for n, t in s.items() if "time_emb" not in n and "add_emb" not in n
    },
    "wrong shape for conv_in.weight": _changed(_set("conv_in.weight", torch.zeros(16, 9, 3, 3))),
    "has the unknown extra.weight": _changed(_set("extra.weight", torch.zeros(1))),
    "has the unknown output_blocks.9": _changed(_set("output_blocks.9.0.weight", torch.zeros(1)), _original),
    "has the unknown control.weight": _changed(_set("control.weight", torch.zeros(1)), _original),
    "quantised: conv_out.weight is float8": _changed(
        _set("conv_out.weight", torch.zeros(4, 16, 3, 3, dtype=torch.float8_e4m3fn))
    ),
    "quantised: conv_out.weight is uint8": _changed(_set("conv_out.weight", torch.zeros(8, dtype=torch.uint8))),
    "no UNet in the file": lambda s: {"encoder." + name: tensor for name, tensor in s.items()},
    "2 UNets in the file": lambda s: dict(s) | {f"unet.{name}": tensor.clone() for name, tensor in s.items()},
}


@pytest.mark.parametrize("message", FAULTS)
def test_a_file_that_does_not_fit_is_one_line(models: dict[str, Path], tmp_path: Path, message: str) -> None:
    save_file(FAULTS[message](weights(models["sdxl"])), tmp_path / "unet.safetensors")
    with pytest.raises(UserError, match=message) as caught:
        load_unet(models["sdxl"], torch.float32, str(tmp_path / "unet.safetensors"))
    assert "unet.safetensors" in str(caught.value)


@pytest.mark.parametrize(
    ("metadata", "marker", "message"),
    [
        ({"modelspec.prediction_type": "epsilon"}, [], None),
        ({"modelspec.prediction_type": "v"}, [], "for v_prediction, the model's scheduler is for epsilon"),
        (None, ["v_pred", "ztsnr"], "for v_prediction"),
        (None, ["ztsnr"], "ends in pure noise, the model's scheduler does not"),
        ({"modelspec.prediction_type": "rectified_flow"}, [], "predicts 'rectified_flow'"),
    ],
)
def test_what_the_file_says_it_predicts_has_to_be_the_models(
    models: dict[str, Path], tmp_path: Path, metadata: dict[str, str] | None, marker: list[str], message: str | None
) -> None:
    state = weights(models["sdxl"]) | {name: torch.zeros(0) for name in marker}
    save_file(state, tmp_path / "unet.safetensors", metadata=metadata)
    if message is None:
        load_unet(models["sdxl"], torch.float32, str(tmp_path / "unet.safetensors"))
        return
    with pytest.raises(UserError, match=message):
        load_unet(models["sdxl"], torch.float32, str(tmp_path / "unet.safetensors"))


def test_a_unet_file_is_exported_and_trained_from(models: dict[str, Path], tmp_path: Path) -> None:
    from fastpref.config import load_config

    state, file = weights(models["sdxl"]), tmp_path / "unet.safetensors"
    save_file({name: tensor.half() for name, tensor in _original(state).items()}, file)
    out = run_export(file, tmp_path / "out", model=str(models["sdxl"]))
    exported = load_unet(out, torch.float32).state_dict()
    assert all(torch.equal(exported[name], state[name].half().float()) for name in state)
    config = load_config("", [f"model={models['sdxl']}", f"unet={file}", "lora_rank=2"])
    policy = load_policy(config, models["sdxl"], torch.device("cpu"), needs_reference=False)
    assert torch.equal(dict(policy.unet.named_parameters())["conv_in.weight"], state["conv_in.weight"].half().float())


def test_a_lora_is_merged_onto_the_unet_it_was_trained_on(models: dict[str, Path], tmp_path: Path) -> None:
    """Of a run that started from another UNet than the model's; in that one's dtype."""
    from peft import LoraConfig

    state, file, run = weights(models["sdxl"]), tmp_path / "start.safetensors", tmp_path / "run"
    save_file({name: tensor.half() for name, tensor in state.items()}, file)
    trained = load_unet(models["sdxl"], torch.float32, str(file))
    trained.add_adapter(LoraConfig(r=2, init_lora_weights=False, target_modules=["to_q"]))
    run.mkdir()
    save_lora(trained, run)
    (run / "config.yaml").write_text(f"model: {models['sdxl']}\nunet: {file}\n")
    out = run_export(run, tmp_path / "out")
    assert stored_dtype(out / "unet") == torch.float16
    assert torch.equal(load_unet(out, torch.float16).conv_in.weight, state["conv_in.weight"].half())
    assert stored_dtype(export_pipeline(models["sdxl"], tmp_path / "own", lora=run) / "unet") == torch.float32
