"""LoRA files mean the same to us, to diffusers and to kohya's readers; a merged pipeline equals base plus LoRA."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from peft import LoraConfig, get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fastpref.cli import main
from fastpref.emoji.random_models import make_random_sd15, make_random_sdxl
from fastpref.errors import UserError
from fastpref.models.export import export_pipeline, run_export
from fastpref.models.lora_file import load_adapter, read_lora, save_lora
from fastpref.models.lora_naming import kohya_name, module_name
from fastpref.models.lora_unet import lora_of

FAMILIES = ("sd15", "sdxl")
Trained = Callable[[str, list[str]], UNet2DConditionModel]
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
EVERYTHING = [
    *ATTENTION, "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "conv1", "conv2", "conv_shortcut", "time_emb_proj",
    "downsamplers.0.conv", "conv_in", "conv_out", "linear_1", "linear_2",
]  # fmt: skip


def _unet(family: str) -> UNet2DConditionModel:
    """A narrow UNet with the family's real block layout."""
    torch.manual_seed(7)
    common = {"sample_size": 8, "norm_num_groups": 4, "attention_head_dim": 4, "layers_per_block": 2}
    if family == "sd15":
        return UNet2DConditionModel(
            **common,
            down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
            up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
            block_out_channels=(4, 4, 8, 8),
            cross_attention_dim=32,
        )
    return UNet2DConditionModel(
        **common,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(4, 8, 8),
        transformer_layers_per_block=(1, 2, 3),
        cross_attention_dim=64,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=80,
    )


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Random pipeline folders whose UNets have the real block layouts."""
    made = {}
    for family, make in (("sd15", make_random_sd15), ("sdxl", make_random_sdxl)):
        made[family] = make(tmp_path_factory.mktemp(family) / "model")
        _unet(family).save_pretrained(made[family] / "unet")
    return made


@pytest.fixture(scope="module")
def pipes(folders: dict[str, Path]) -> dict[str, Any]:
    """The folders as diffusers opens them; tests leave no LoRA on them."""
    return {family: DiffusionPipeline.from_pretrained(folder) for family, folder in folders.items()}


@pytest.fixture(scope="module")
def trained(folders: dict[str, Path]) -> Trained:
    """``trained(family, targets)``: its UNet with a LoRA of rank 4 and alpha 2, made once. Tests only read it."""

    def make(family: str, targets: tuple[str, ...]) -> UNet2DConditionModel:
        unet = UNet2DConditionModel.from_pretrained(folders[family] / "unet")
        torch.manual_seed(3)
        unet.add_adapter(LoraConfig(r=4, lora_alpha=2.0, init_lora_weights=False, target_modules=[*targets]))
        return unet

    once = functools.cache(make)
    return lambda family, targets: once(family, tuple(targets))


@torch.no_grad()
def _output(unet: UNet2DConditionModel) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    noisy = torch.randn(2, 4, 8, 8, generator=generator)
    embeds = torch.randn(2, 6, unet.config.cross_attention_dim, generator=generator)
    extra = {"text_embeds": torch.randn(2, 32, generator=generator), "time_ids": torch.full((2, 6), 32.0)}
    kwargs = {"added_cond_kwargs": extra} if unet.config.addition_embed_type else {}
    return unet(noisy, torch.tensor([40, 900]), embeds, **kwargs).sample


def _close(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layout", ["diffusers", "kohya"])
@pytest.mark.parametrize(
    "targets",
    [pytest.param(ATTENTION, id="attention", marks=pytest.mark.thorough), pytest.param(EVERYTHING, id="everything")],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_diffusers_reads_what_we_write_at_the_same_strength(
    pipes: dict[str, Any], trained: Trained, tmp_path: Path, family: str, targets: list[str], layout: str
) -> None:
    ours, pipe = trained(family, targets), pipes[family]
    save_lora(ours, tmp_path / "pytorch_lora_weights.safetensors", layout=layout, family=family)
    base, wanted = _output(pipe.unet), _output(ours)
    pipe.load_lora_weights(tmp_path)
    found = _output(pipe.unet)
    pipe.unload_lora_weights()
    _close(found, wanted)
    assert (base - wanted).abs().max() > 0.05


@pytest.mark.parametrize("family", FAMILIES)
def test_kohya_names_of_the_real_layouts(family: str) -> None:
    names = {m for m, layer in _unet(family).named_modules() if isinstance(layer, torch.nn.Linear | torch.nn.Conv2d)}
    written = {kohya_name(m, sgm=family == "sdxl") for m in names}
    assert len(written) == len(names)
    assert {module_name(name) for name in written} == names
    expected = {
        "sd15": "lora_unet_up_blocks_1_attentions_0_transformer_blocks_0_attn2_to_out_0",
        "sdxl": "lora_unet_output_blocks_2_1_transformer_blocks_1_ff_net_0_proj",
    }
    assert expected[family] in written


@pytest.mark.parametrize(
    ("module", "name"),
    [
        (
            "down_blocks.1.attentions.0.transformer_blocks.1.attn1.to_q",
            "input_blocks_4_1_transformer_blocks_1_attn1_to_q",
        ),
        ("down_blocks.2.attentions.1.proj_in", "input_blocks_8_1_proj_in"),
        ("down_blocks.0.downsamplers.0.conv", "input_blocks_3_0_op"),
        ("down_blocks.1.resnets.0.conv_shortcut", "input_blocks_4_0_skip_connection"),
        ("mid_block.attentions.0.proj_out", "middle_block_1_proj_out"),
        ("mid_block.resnets.1.time_emb_proj", "middle_block_2_emb_layers_1"),
        (
            "up_blocks.1.attentions.2.transformer_blocks.0.attn2.to_v",
            "output_blocks_5_1_transformer_blocks_0_attn2_to_v",
        ),
        ("up_blocks.1.upsamplers.0.conv", "output_blocks_5_2_conv"),
        ("add_embedding.linear_2", "label_emb_0_2"),
        ("conv_out", "out_2"),
    ],
)
def test_sdxl_names_by_hand(module: str, name: str) -> None:
    assert kohya_name(module, sgm=True) == f"lora_unet_{name}"
    assert module_name(f"lora_unet_{name}") == module


@pytest.mark.parametrize("family", FAMILIES)
def test_every_spelling_reads_back_the_same(trained: Trained, tmp_path: Path, family: str) -> None:
    unet = trained(family, ATTENTION)
    expected = lora_of(unet)
    peft_state = get_peft_model_state_dict(unet)
    old = {}
    for module in expected.alphas:
        leaf = module.rsplit(".", 1)[0] if module.endswith("to_out.0") else module
        path, leaf = leaf.rsplit(".", 1)
        for part, new in (("down", "lora_A"), ("up", "lora_B")):
            old[f"unet.{path}.processor.{leaf}_lora.{part}.weight"] = expected.state[f"{module}.{new}.weight"].clone()
        old[f"unet.{module}.alpha"] = torch.tensor(2.0)
    files = {
        "diffusers": save_lora(peft_state, tmp_path / "d.safetensors", 2.0),
        "kohya": save_lora(peft_state, tmp_path / "k.safetensors", 2.0, layout="kohya", family=family),
        "old": tmp_path / "o.safetensors",
    }
    save_file(old, files["old"])
    for name, file in files.items():
        lora = read_lora(file)
        assert lora.alphas == expected.alphas, name
        assert lora.state.keys() == expected.state.keys(), name
        assert all(torch.equal(lora.state[key], expected.state[key]) for key in lora.state), name


def test_mixed_ranks_and_alphas_survive(folders: dict[str, Path], pipes: dict[str, Any], tmp_path: Path) -> None:
    unet = UNet2DConditionModel.from_pretrained(folders["sdxl"] / "unet")
    patterns = {"rank_pattern": {"to_v": 3}, "alpha_pattern": {"to_k": 9.0}}
    torch.manual_seed(0)
    unet.add_adapter(LoraConfig(r=2, lora_alpha=1.0, init_lora_weights=False, target_modules=ATTENTION, **patterns))
    file = save_lora(unet, tmp_path)
    assert file.name == "pytorch_lora_weights.safetensors"
    assert set(read_lora(file).ranks.values()) == {2, 3}
    assert set(read_lora(file).alphas.values()) == {1.0, 9.0}
    wanted, pipe = _output(unet), pipes["sdxl"]
    pipe.load_lora_weights(tmp_path)
    found = _output(pipe.unet)
    pipe.unload_lora_weights()
    _close(found, wanted)
    ours = UNet2DConditionModel.from_pretrained(folders["sdxl"] / "unet")
    load_adapter(ours, file)
    _close(_output(ours), wanted)


@pytest.mark.parametrize("family", FAMILIES)
def test_merged_pipeline_equals_base_plus_lora(
    folders: dict[str, Path], trained: Trained, tmp_path: Path, family: str
) -> None:
    ours, run = trained(family, EVERYTHING), tmp_path / "run"
    run.mkdir()
    save_lora(ours, run)
    (run / "config.yaml").write_text(f"model: {folders[family]}\n")
    out = run_export(run, tmp_path / "merged")
    merged = DiffusionPipeline.from_pretrained(out)
    _close(_output(merged.unet), _output(ours))
    assert not any(".lora_" in key for key in load_file(next((out / "unet").glob("*.safetensors"))))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["merged", "run"]
    same = (out / "vae" / "diffusion_pytorch_model.safetensors").read_bytes()
    assert same == (folders[family] / "vae" / "diffusion_pytorch_model.safetensors").read_bytes()


def test_full_unet_folder_and_dtype(folders: dict[str, Path], tmp_path: Path) -> None:
    torch.manual_seed(11)
    other = _unet("sd15")
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.1)
    other.save_pretrained(tmp_path / "run" / "unet")
    out = run_export(tmp_path / "run", tmp_path / "out", model=str(folders["sd15"]), dtype="fp16")
    weights = load_file(next((out / "unet").glob("*.safetensors")))
    assert {tensor.dtype for tensor in weights.values()} == {torch.float16}
    assert torch.equal(weights["conv_in.weight"], other.conv_in.weight.half())


def test_kohya_export_of_a_run(folders: dict[str, Path], trained: Trained, tmp_path: Path) -> None:
    file = save_lora(trained("sdxl", ATTENTION), tmp_path / "lora.safetensors")
    out = run_export(file, tmp_path / "k.safetensors", layout="kohya", model=str(folders["sdxl"]), dtype="fp16")
    with safe_open(str(out), framework="pt") as opened:
        keys, metadata = set(opened.keys()), opened.metadata()
        alpha = opened.get_tensor("lora_unet_middle_block_1_transformer_blocks_0_attn1_to_q.alpha")
    assert (alpha.item(), alpha.dtype) == (2.0, torch.float16)
    assert metadata["ss_network_dim"] == "4"
    assert {key.rsplit(".", 2)[-2] for key in keys if key.endswith("weight")} == {"lora_down", "lora_up"}
    with pytest.raises(UserError, match="file exists"):
        run_export(file, out, layout="kohya", model=str(folders["sdxl"]))


def test_the_command_exports_a_lora_that_no_run_is_beside(
    folders: dict[str, Path],
    trained: Trained,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    ours = trained("sdxl", ATTENTION)
    lora, expected = save_lora(ours, tmp_path), lora_of(ours)
    for source, layouts in ((lora, ("kohya",)), (tmp_path, ("pipeline", "diffusers", "kohya"))):
        command = ["fastpref", "export", str(source), "--out"]
        monkeypatch.setattr("sys.argv", [*command, str(tmp_path / "x")])
        with pytest.raises(SystemExit) as stop:
            main()
        assert stop.value.code == 2 and "give --model FOLDER" in capsys.readouterr().err
        for layout in layouts:
            more = ["--model", str(folders["sdxl"]), "--layout", layout, "--overwrite"]
            monkeypatch.setattr("sys.argv", [*command, str(tmp_path / "out" / layout), *more])
            with pytest.raises(SystemExit) as stop:
                main()
            assert stop.value.code == 0
            if layout != "pipeline":
                assert read_lora(tmp_path / "out" / layout).alphas == expected.alphas
    merged = UNet2DConditionModel.from_pretrained(tmp_path / "out" / "pipeline" / "unet")
    _close(_output(merged), _output(ours))


def _bad_files(folder: Path) -> dict[str, Path]:
    pair = {
        "unet.conv_in.lora_A.weight": torch.zeros(2, 4, 3, 3),
        "unet.conv_in.lora_B.weight": torch.zeros(4, 2, 1, 1),
    }
    files = {
        "no such LoRA file": folder / "missing.safetensors",
        "cannot read": folder / "garbage.safetensors",
        "not a UNet LoRA weight": folder / "checkpoint.safetensors",
        "both there": folder / "half.safetensors",
        "text-encoder": folder / "text.safetensors",
        "DoRA": folder / "dora.safetensors",
        "damaged": folder / "metadata.safetensors",
        "not the LoRA name": folder / "flux.safetensors",
    }
    files["cannot read"].write_bytes(b"PK not safetensors")
    save_file({"conv_in.weight": torch.zeros(1)}, files["not a UNet LoRA weight"])
    save_file({"unet.conv_in.lora_A.weight": torch.zeros(2, 4)}, files["both there"])
    save_file({**pair, "text_encoder.q.lora_A.weight": torch.zeros(2, 2)}, files["text-encoder"])
    save_file({**pair, "unet.conv_in.lora_magnitude_vector": torch.zeros(2)}, files["DoRA"])
    save_file(pair, files["damaged"], metadata={"lora_adapter_metadata": "{"})
    save_file({"lora_unet_%.lora_down.weight": torch.zeros(2, 2)}, files["not the LoRA name"])
    return files


def test_bad_lora_files_are_named(tmp_path: Path) -> None:
    for message, file in _bad_files(tmp_path).items():
        with pytest.raises(UserError, match=message) as caught:
            read_lora(file)
        assert file.name in str(caught.value)


def test_bad_exports_write_nothing(folders: dict[str, Path], trained: Trained, tmp_path: Path) -> None:
    lora = save_lora(trained("sd15", ATTENTION), tmp_path / "lora.safetensors")
    before = sorted(p.name for p in tmp_path.iterdir())
    with pytest.raises(UserError, match="another UNet"):
        export_pipeline(folders["sdxl"], tmp_path / "out", lora=lora)
    with pytest.raises(UserError, match="dtype is 'int8'"):
        export_pipeline(folders["sd15"], tmp_path / "out", lora=lora, dtype="int8")
    with pytest.raises(UserError, match="--model FOLDER"):
        run_export(lora, tmp_path / "out")
    with pytest.raises(UserError, match="no such file"):
        run_export(tmp_path / "nowhere", tmp_path / "out", model=str(folders["sd15"]))
    assert sorted(p.name for p in tmp_path.iterdir()) == before
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="folder exists"):
        export_pipeline(folders["sd15"], tmp_path / "out", lora=lora)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        export_pipeline(folders["sd15"], tmp_path / "file" / "out", lora=lora)
    with pytest.raises(UserError, match="is no LoRA"):
        run_export(folders["sd15"], tmp_path / "x.safetensors", layout="kohya", model=str(folders["sd15"]))


def test_metadata_is_what_diffusers_itself_writes(trained: Trained, tmp_path: Path) -> None:
    with safe_open(str(save_lora(trained("sd15", ATTENTION), tmp_path)), framework="pt") as opened:
        ours = json.loads(opened.metadata()["lora_adapter_metadata"])
    assert (ours["unet.r"], ours["unet.lora_alpha"]) == (4, 2.0)
    assert all(key.startswith("unet.") for key in ours)
