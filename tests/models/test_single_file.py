"""SDXL and SD1.5 in one file, as published: what opens them, what is refused, and that nothing is lost on the way.

The models are small but have the real blocks and names; the renaming to the original layout is our own
(original_layout.py), and diffusers' from_single_file reads the same files beside us.
"""

from __future__ import annotations

import functools
import json
import os
import struct
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from original_layout import State, original_checkpoint
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from fastpref.config import load_config
from fastpref.data.prepare import prepare
from fastpref.errors import UserError
from fastpref.evaluate.sample import run_sample
from fastpref.models import public, single_file
from fastpref.models.checkpoint import convert, expected_shapes, read_facts
from fastpref.models.clip_tokenizer import write_tokenizer
from fastpref.models.export import run_export
from fastpref.models.loading import model_family, resolve_model_dir
from fastpref.models.noise_schedule import ddim_settings, noise_schedule
from fastpref.models.pipeline import load_pipeline
from fastpref.models.weights import stored_dtype
from fastpref.plan.report import make_plan
from fastpref.runs import run_training

CPU = torch.device("cpu")
WIDTHS = {"text_encoder": 16, "text_encoder_2": 32}
CROSS = {"sd15": 16, "sdxl": 48}
Parts = dict[str, State]


def _tiny(name: str, family: str, config: dict[str, Any]) -> dict[str, Any]:
    """A public configuration made narrow; blocks and layers stay."""
    if name == "unet":
        levels = len(config.get("block_out_channels", (0,) * 4))
        narrow = {"block_out_channels": (8, 16, 16, 16)[:levels], "norm_num_groups": 4, "attention_head_dim": 4}
        narrow |= {"cross_attention_dim": CROSS[family], "sample_size": 8}
        if family == "sdxl":
            narrow |= {"addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 6 * 8 + 32}
            narrow |= {"transformer_layers_per_block": (1, 1, 2)}
        return config | narrow
    if name == "vae":
        return config | {"block_out_channels": (4, 4, 8, 8), "norm_num_groups": 2, "sample_size": 64}
    width = WIDTHS[name]
    layers = {"text_encoder": 2, "text_encoder_2": 10}[name]  # diffusers knows the second encoder by its tenth block
    small = {"hidden_size": width, "intermediate_size": width, "num_hidden_layers": layers, "num_attention_heads": 4}
    return config | small | {"projection_dim": width}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The public models made narrow, and a cache of the test's own."""
    for family in ("sdxl", "sd15"):
        monkeypatch.setitem(public.UNETS, family, _tiny("unet", family, public.UNETS[family]))
        monkeypatch.setitem(public.VAES, family, _tiny("vae", family, public.VAES[family]))
        encoders = {name: _tiny(name, family, config) for name, config in public.TEXT_ENCODERS[family].items()}
        monkeypatch.setitem(public.TEXT_ENCODERS, family, encoders)
    monkeypatch.setenv("FASTPREF_CACHE", str(tmp_path / "cache"))


@functools.cache
def make_parts(family: str) -> Parts:
    """Random weights of the public models, which are narrow whenever a test asks; every one of them moved."""
    torch.manual_seed(3)
    models: dict[str, Any] = {
        "unet": UNet2DConditionModel(**public.UNETS[family]),
        "vae": AutoencoderKL(**public.VAES[family]),
    }
    for name, config in public.TEXT_ENCODERS[family].items():
        kind = CLIPTextModelWithProjection if name == "text_encoder_2" else CLIPTextModel
        models[name] = kind(CLIPTextConfig(**config))
    states = {name: model.state_dict() for name, model in models.items()}
    return {
        name: {
            key: tensor + 0.02 * torch.randn(tensor.shape) for key, tensor in state.items() if "position_ids" not in key
        }
        for name, state in states.items()
    }


def write(path: Path, family: str, *, metadata: dict[str, str] | None = None, **extra: Any) -> tuple[Path, Parts]:
    """A checkpoint file, and what is in it by diffusers' names."""
    dtype, markers = extra.pop("dtype", torch.float32), extra.pop("markers", {})
    parts = {part: {name: t.to(dtype) for name, t in state.items()} for part, state in make_parts(family).items()}
    state = original_checkpoint(parts, **extra) | markers
    save_file(state, path, metadata=metadata)
    return path, parts


def states(pipe: Any) -> Parts:
    """Every weight of a pipeline, text encoders without the wrapper that some versions of transformers have."""
    names = [
        name for name in ("unet", "vae", "text_encoder", "text_encoder_2") if getattr(pipe, name, None) is not None
    ]
    return {name: plain(getattr(pipe, name).state_dict()) for name in names}


def plain(state: State) -> State:
    return {n.removeprefix("text_model."): t.float() for n, t in state.items() if "position_ids" not in n}


def assert_same(found: Parts, wanted: Parts) -> None:
    assert found.keys() == wanted.keys()
    for part, state in wanted.items():
        assert found[part].keys() == plain(state).keys(), part
        for name, tensor in plain(state).items():
            assert torch.equal(found[part][name], tensor), f"{part}.{name}"


def picture(pipe: Any) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    drawn = pipe("a photo of a cat", latents=noise, num_inference_steps=3, height=64, width=64, output_type="pt")
    return torch.as_tensor(drawn.images)


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("sdxl", {}),
        ("sdxl", {"dtype": torch.float16, "convolutions": False}),
        ("sd15", {}),
        ("sd15", {"dtype": torch.float16, "wrapped": False, "convolutions": False}),
    ],
    ids=["sdxl", "sdxl fp16", "sd15", "sd15, an old merge"],
)
def test_a_checkpoint_is_the_pipeline_it_was_made_of(
    small: None, tmp_path: Path, family: str, options: dict[str, Any]
) -> None:
    prefix = "conditioner.embedders.0" if family == "sdxl" else "cond_stage_model"
    beside = {
        f"{prefix}.transformer.text_model.embeddings.position_ids": torch.arange(77)[None],
        **{"model_ema.diffusion_modelinput_blocks00weight": torch.zeros(1), "first_stage_model.loss.x": torch.zeros(1)},
    }
    if family == "sdxl":
        beside["conditioner.embedders.1.model.logit_scale"] = torch.zeros(())
    file, parts = write(tmp_path / "model.safetensors", family, markers=beside, **options)
    folder = resolve_model_dir(str(file))
    assert model_family(folder) == family
    ours = load_pipeline(folder, torch.float32, CPU)
    assert_same(states(ours), parts)
    assert {stored_dtype(folder / part) for part in parts} == {options.get("dtype", torch.float32)}
    if options.get("wrapped", True):  # diffusers does not read the older form
        kind = StableDiffusionXLPipeline if family == "sdxl" else StableDiffusionPipeline
        theirs = kind.from_single_file(str(file), config=str(folder), local_files_only=True, torch_dtype=torch.float32)
        assert_same(states(theirs), parts)
        assert torch.equal(picture(ours), picture(theirs))


@pytest.mark.parametrize(
    ("metadata", "markers", "key", "kind", "last"),
    [
        (None, [], "auto", "epsilon", None),
        ({"modelspec.prediction_type": "v"}, [], "auto", "v_prediction", None),
        ({"modelspec.prediction_type": "epsilon"}, [], "auto", "epsilon", None),
        (None, ["v_pred"], "auto", "v_prediction", None),
        (None, ["v_pred", "ztsnr"], "auto", "v_prediction", 0.0),
        (None, [], "v_prediction", "v_prediction", None),
        (None, [], "v_prediction_zero_snr", "v_prediction", 0.0),
        ({"modelspec.prediction_type": "v"}, [], "epsilon", "epsilon", None),
    ],
)
@pytest.mark.parametrize("family", ["sdxl", "sd15"])
def test_the_schedule_is_what_the_file_or_the_key_says(
    tmp_path: Path,
    family: str,
    metadata: dict[str, str] | None,
    markers: list[str],
    key: str,
    kind: str,
    last: float | None,
) -> None:
    """Read from the file's header; ᾱ of the last step is 0.00466 by the public betas, 0 with zero terminal SNR."""
    tensors = {name: torch.zeros(0) for name in markers}
    checkpoint = _facts(tmp_path / "m.safetensors", family, tensors, metadata)
    config, said = single_file._scheduler(checkpoint, key)
    schedule = noise_schedule(ddim_settings(config, "the file"), "the file")
    assert schedule.prediction_type == kind and kind in said
    assert float(schedule.alphas_cumprod[-1]) == pytest.approx(0.00466 if last is None else last, abs=1e-5)


def _facts(file: Path, family: str, tensors: State, metadata: dict[str, str] | None) -> Any:
    """Of a file that has one tensor of every part."""
    anchors = {
        "model.diffusion_model.input_blocks.0.0.weight": torch.zeros(8, 4, 3, 3),
        "first_stage_model.encoder.conv_in.weight": torch.zeros(1),
    }
    if family == "sdxl":
        anchors["model.diffusion_model.label_emb.0.0.weight"] = torch.zeros(1)
        anchors["conditioner.embedders.0.transformer.text_model.final_layer_norm.bias"] = torch.zeros(1)
        anchors["conditioner.embedders.1.model.ln_final.bias"] = torch.zeros(1)
    else:
        anchors["cond_stage_model.transformer.text_model.final_layer_norm.bias"] = torch.zeros(1)
    save_file({name: tensor.clone() for name, tensor in (anchors | tensors).items()}, file, metadata=metadata)
    return read_facts(file)


def test_epsilon_on_pure_noise_is_refused(tmp_path: Path) -> None:
    checkpoint = _facts(tmp_path / "m.safetensors", "sdxl", {"ztsnr": torch.zeros(0)}, None)
    with pytest.raises(UserError, match=r"ends in pure noise.*prediction_type=v_prediction_zero_snr"):
        single_file._scheduler(checkpoint, "auto")


UNET = "model.diffusion_model."
FIRST = {f"{UNET}input_blocks.0.0.weight": torch.zeros(8, 4, 3, 3)}
ATTENTION = f"{UNET}input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
OTHERS: dict[str, State] = {
    "holds no vae, no text_encoder .*the key unet": FIRST,
    "an inpainting model": {f"{UNET}input_blocks.0.0.weight": torch.zeros(8, 9, 3, 3)},
    "edits pictures": {f"{UNET}input_blocks.0.0.weight": torch.zeros(8, 8, 3, 3)},
    "an SD2 model": FIRST | {ATTENTION: torch.zeros(8, 1024)},
    "SDXL refiner": FIRST | {ATTENTION: torch.zeros(8, 1280), f"{UNET}label_emb.0.0.weight": torch.zeros(1)},
    "Playground": FIRST | {"edm_mean": torch.zeros(4)},
    "CosXL": FIRST | {"edm_vpred.sigma_max": torch.zeros(())},
    "a UNet alone.*key unet": {"conv_in.weight": torch.zeros(8, 4, 3, 3)},
    "a Flux model": {f"{UNET}double_blocks.0.img_attn.norm.key_norm.scale": torch.zeros(1)},
    "an SD3 model": {f"{UNET}joint_blocks.0.x_block.attn.qkv.weight": torch.zeros(1)},
    "a LoRA": {"lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight": torch.zeros(1)},
    "a ControlNet": {"control_model.input_blocks.0.0.weight": torch.zeros(1)},
    "a VAE": {"decoder.up.0.block.0.conv1.weight": torch.zeros(1)},
    "not a Stable Diffusion checkpoint": {"x": torch.zeros(1)},
}


@pytest.mark.parametrize("message", OTHERS)
def test_other_models_are_refused_by_name(tmp_path: Path, message: str) -> None:
    save_file({name: tensor.clone() for name, tensor in OTHERS[message].items()}, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match=message) as caught:
        read_facts(tmp_path / "other.safetensors")
    assert "other.safetensors" in str(caught.value)


def _drop(part: str) -> Callable[[State], State]:
    return lambda state: {name: tensor for name, tensor in state.items() if part not in name}


def _quantised(state: State) -> State:
    return {n: t.to(torch.float8_e4m3fn) if n.startswith(UNET) and t.ndim == 2 else t for n, t in state.items()}


FAULTS: dict[str, Callable[[State], State]] = {
    "holds no vae": _drop("first_stage_model."),
    "holds no text_encoder_2": _drop("embedders.1"),
    "lacks label_emb.0.2": _drop("label_emb.0.2"),
    "lacks down_blocks.0.resnets.0.conv1.weight": _drop("input_blocks.1.0.in_layers.2.weight"),
    "lacks decoder.conv_out.bias": _drop("decoder.conv_out.bias"),
    "lacks text_model.final_layer_norm.bias": _drop("embedders.0.transformer.text_model.final_layer_norm.bias"),
    "lacks .* and": _drop("text_projection"),
    "has the unknown adapter": lambda s: s | {f"{UNET}adapter.weight": torch.zeros(1)},
    "wrong shape for conv_out.weight": lambda s: s | {f"{UNET}out.2.weight": torch.zeros(4, 9, 3, 3)},
    "quantised: .* is F8_E4M3": _quantised,
}


@pytest.mark.parametrize("message", FAULTS)
def test_a_checkpoint_with_something_amiss_is_one_line_and_leaves_nothing(
    small: None, tmp_path: Path, message: str
) -> None:
    state = original_checkpoint(make_parts("sdxl"))
    save_file(FAULTS[message](state), tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=message):
        resolve_model_dir(str(tmp_path / "model.safetensors"))
    left = [path.name for path in (tmp_path / "cache" / "models").iterdir() if path.suffix != ".lock"]
    assert not left


def test_the_cache_knows_content_not_names(small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, _ = write(tmp_path / "a.safetensors", "sd15", metadata={"modelspec.resolution": "768x768"})
    folder = resolve_model_dir(str(file))
    assert json.loads((folder / "unet" / "config.json").read_text())["sample_size"] == 96
    moved = file.rename(tmp_path / "b.safetensors")
    assert resolve_model_dir(str(moved)) == folder
    monkeypatch.setattr(single_file, "_make", lambda *_: pytest.fail("it is there"))
    monkeypatch.setattr(single_file, "_hash", lambda *_: pytest.fail("its hash is remembered"))
    assert resolve_model_dir(str(moved)) == folder
    monkeypatch.undo()
    monkeypatch.setenv("FASTPREF_CACHE", str(tmp_path / "cache"))
    stat = moved.stat()
    content = bytearray(moved.read_bytes())
    content[-1] ^= 1
    moved.write_bytes(content)
    os.utime(moved, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # same size, same time, other weights
    with pytest.raises(UserError):  # the narrow public models are gone with the patches
        resolve_model_dir(str(moved))


def test_a_full_disk_is_one_line(small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, _ = write(tmp_path / "a.safetensors", "sd15")
    monkeypatch.setattr(single_file.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000})())
    with pytest.raises(UserError, match=r"needs 0\.0 GB as a folder.*FASTPREF_CACHE"):
        resolve_model_dir(str(file))


def test_a_pickled_checkpoint_is_read_without_running_code(small: None, tmp_path: Path) -> None:
    parts = make_parts("sd15")
    torch.save({"state_dict": original_checkpoint(parts), "global_step": 840000}, tmp_path / "old.ckpt")
    folder = resolve_model_dir(str(tmp_path / "old.ckpt"))
    assert_same(states(load_pipeline(folder, torch.float32, CPU)), parts)
    (tmp_path / "model.gguf").touch()
    with pytest.raises(UserError, match=r"a \.gguf file is not a model"):
        resolve_model_dir(str(tmp_path / "model.gguf"))


def test_a_file_is_planned_prepared_trained_sampled_and_exported(
    small: None, tmp_path: Path, few_records: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Zero-SNR v-prediction by the key, all the way; the UNet of a second file as the start.

    With prediction_type left at auto the file is refused, so every step that forgets the key fails.
    """
    file, parts = write(tmp_path / "model.safetensors", "sdxl", markers={"ztsnr": torch.zeros(0)})
    start = {name: tensor + 0.01 for name, tensor in original_checkpoint(make_parts("sdxl")).items()}
    save_file(start, tmp_path / "start.safetensors")
    settings = [f"model={file}", f"unet={tmp_path}/start.safetensors", f"records={few_records}", "resolution=64"]
    settings += ["prediction_type=v_prediction_zero_snr"]
    settings += [f"store={tmp_path}/store", f"output_dir={tmp_path}", "method=sft", "evaluate=false", "tracker=none"]
    settings += ["sample_steps=2"]
    config = load_config("", [*settings, "steps=1", "batch_size=2", "lora_rank=2", "name=run"])
    with monkeypatch.context() as only_a_plan:
        only_a_plan.setattr(single_file, "_make", lambda *_: pytest.fail("a plan converts nothing"))
        assert make_plan(config, 1, "h100").count.trained_values > 0
    prepare(config, progress=False)
    run_training(config)
    (drawn,) = run_sample(config, ["a cat"], [0], lora=tmp_path / "run", out_dir=tmp_path / "samples", progress=False)
    assert drawn.is_file()
    chosen = {"model": str(file), "prediction_type": "v_prediction_zero_snr"}
    assert run_export(tmp_path / "run", tmp_path / "kohya.safetensors", layout="kohya", **chosen).is_file()
    out = run_export(tmp_path / "run", tmp_path / "out")
    pipe = StableDiffusionXLPipeline.from_pretrained(out)
    assert pipe.scheduler.config.prediction_type == "v_prediction" and pipe.scheduler.config.rescale_betas_zero_snr
    assert torch.equal(pipe.unet.conv_in.weight, start["model.diffusion_model.input_blocks.0.0.weight"])
    assert_same({"vae": plain(pipe.vae.state_dict())}, {"vae": parts["vae"]})


def test_every_command_opens_the_file_as_the_key_says(
    small: None, tmp_path: Path, few_records: Path, clip: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, _ = write(tmp_path / "model.safetensors", "sd15")
    settings = [
        f"model={file}",
        "prediction_type=v_prediction",
        f"records={few_records}",
        f"eval_records={few_records}",
    ]
    settings += [f"store={tmp_path}/store", f"output_dir={tmp_path}", f"clip={clip}", "resolution=64", "tracker=none"]
    settings += ["method=spo", "steps=1", "batch_size=2", "rollout_prompts=2", "candidates=2", "plain_steps=1"]
    settings += ["sample_steps=2", "score_threshold=0", "lora_rank=2", "eval_prompts=2", "name=run"]
    config = load_config("", settings)
    run_training(config)
    run_sample(config, ["a cat"], [0], lora=tmp_path / "run", out_dir=tmp_path / "pictures")
    run_export(tmp_path / "run", tmp_path / "own")
    run_export(tmp_path / "run", tmp_path / "named", model=str(file))
    lora = (tmp_path / "run" / "pytorch_lora_weights.safetensors").rename(tmp_path / "lora.safetensors")
    run_export(lora, tmp_path / "alone", model=str(file), prediction_type="v_prediction")
    (folder,) = [path for path in (tmp_path / "cache" / "models").iterdir() if path.is_dir()]
    assert "v_prediction" in folder.name and "epsilon" not in capsys.readouterr().err
    for out in ("own", "named", "alone"):
        scheduler = json.loads((tmp_path / out / "scheduler" / "scheduler_config.json").read_text())
        assert scheduler["prediction_type"] == "v_prediction", out


def test_prediction_type_is_for_files(sdxl: Path) -> None:
    for model in (str(sdxl), "emoji"):
        with pytest.raises(UserError, match="a folder says it in scheduler"):
            resolve_model_dir(model, "v_prediction")
    with pytest.raises(UserError, match="prediction_type is 'x'"):
        load_config("", ["prediction_type=x"])


def test_the_tokenizer_is_clips(tmp_path: Path) -> None:
    """Ids of the published tokenizers: words, letters without a merge, case, spaces, accents and padding."""
    ids = {}
    for name, pad in public.PAD_TOKENS.items():
        write_tokenizer(tmp_path / name, pad)
        tokenizer = CLIPTokenizer.from_pretrained(tmp_path / name)
        assert (len(tokenizer), tokenizer.model_max_length) == (49408, 77)
        texts = ["a photo of a cat", "A  Photo of a CAT", "", "hello world!"]
        ids[name] = tokenizer(texts, padding="max_length", truncation=True).input_ids
    assert ids["tokenizer"][0] == [49406, 320, 1125, 539, 320, 2368] + [49407] * 71
    assert ids["tokenizer"][1] == ids["tokenizer"][0]
    assert ids["tokenizer"][2] == [49406] + [49407] * 76
    assert ids["tokenizer"][3][:5] == [49406, 3306, 1002, 256, 49407]
    assert ids["tokenizer_2"][0] == [49406, 320, 1125, 539, 320, 2368, 49407] + [0] * 70


@pytest.fixture(scope="module")
def real() -> dict[str, tuple[State, dict[str, dict[str, torch.Size]]]]:
    """Real checkpoints' names and shapes, on the meta device: the public models in the original layout."""
    made = {}
    for family in ("sdxl", "sd15"):
        expected = expected_shapes(family)
        parts = {
            part: {name: torch.empty(shape, device="meta", dtype=torch.float16) for name, shape in own.items()}
            for part, own in expected.items()
        }
        made[family] = original_checkpoint(parts), expected
    return made


# As published in sd_xl_base_1.0.safetensors and v1-5-pruned-emaonly.safetensors.
PUBLISHED = {
    "sdxl": {
        "model.diffusion_model.label_emb.0.0.weight": (1280, 2816),
        "model.diffusion_model.input_blocks.4.1.transformer_blocks.1.attn2.to_k.weight": (640, 2048),
        "model.diffusion_model.input_blocks.8.1.transformer_blocks.9.ff.net.0.proj.weight": (10240, 1280),
        "model.diffusion_model.output_blocks.2.2.conv.weight": (1280, 1280, 3, 3),
        "model.diffusion_model.output_blocks.8.0.skip_connection.weight": (320, 640, 1, 1),
        "first_stage_model.decoder.mid.attn_1.proj_out.weight": (512, 512, 1, 1),
        "first_stage_model.decoder.up.0.block.0.nin_shortcut.weight": (128, 256, 1, 1),
        "conditioner.embedders.0.transformer.text_model.embeddings.token_embedding.weight": (49408, 768),
        "conditioner.embedders.1.model.transformer.resblocks.31.attn.in_proj_weight": (3840, 1280),
        "conditioner.embedders.1.model.text_projection": (1280, 1280),
    },
    "sd15": {
        "model.diffusion_model.input_blocks.1.1.proj_in.weight": (320, 320, 1, 1),
        "model.diffusion_model.output_blocks.2.1.conv.weight": (1280, 1280, 3, 3),
        "model.diffusion_model.output_blocks.11.1.transformer_blocks.0.attn2.to_v.weight": (320, 768),
        "cond_stage_model.transformer.text_model.encoder.layers.11.mlp.fc1.weight": (3072, 768),
    },
}
TENSORS = {"sdxl": 2515 - 2, "sd15": 686 + 248 + 196}  # of SDXL's file without position_ids and logit_scale


@pytest.mark.parametrize("family", ["sdxl", "sd15"])
def test_real_checkpoints_map_completely(real: Any, tmp_path: Path, family: str) -> None:
    state, expected = real[family]
    assert len(state) == TENSORS[family]
    assert {name: tuple(state[name].shape) for name in PUBLISHED[family]} == PUBLISHED[family]
    file = _header_only(tmp_path / "model.safetensors", state)
    facts = read_facts(file)
    assert (facts.family, facts.values["unet"]) == (family, public.PARAMETERS[family])
    assert sum(facts.values.values()) == sum(t.numel() for t in state.values())
    converted = convert(state, facts, expected)
    assert {part: {n: t.shape for n, t in own.items()} for part, own in converted.items()} == expected


def _header_only(file: Path, state: State) -> Path:
    """A safetensors file whose tensors are a hole in the disk."""
    header, place = {}, 0
    for name, tensor in state.items():
        header[name] = {"dtype": "F16", "shape": list(tensor.shape), "data_offsets": [place, place + tensor.nbytes]}
        place += tensor.nbytes
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text)
    os.truncate(file, 8 + len(text) + place)
    return file


def test_ranks_that_start_at_once_share_one_folder(
    small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As threads, which the lock tells apart like processes: one makes the folder, the others wait for it."""
    file, parts = write(tmp_path / "model.safetensors", "sd15")
    made, make = [], single_file._make
    monkeypatch.setattr(single_file, "_make", lambda *a: (made.append(a), time.sleep(0.2), make(*a)))
    with ThreadPoolExecutor(3) as ranks:
        folders = set(ranks.map(resolve_model_dir, [str(file)] * 3))
    assert len(folders) == len(made) == 1
    assert_same(states(load_pipeline(folders.pop(), torch.float32, CPU)), parts)
