"""The step-aware preference model: equal to its CLIP at first, adaLN as published, folding, files and their faults."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastpref.errors import UserError
from fastpref.models.recompute import MODES, recomputed_region
from fastpref.models.step_preference import Preprocess, StepPreferenceModel, timestep_features
from fastpref.models.step_preference_file import (
    WEIGHTS_NAME,
    load_clip_scorer,
    load_step_preference,
    resolve_step_preference,
    save_step_preference,
)

CAPTIONS = ["a red cat on the moon", "blue heart", "", "a picture of the black sun"]
TIMESTEPS = torch.tensor([0, 251, 951, 251])


def load(clip: Path | None = None, scorer: Path | None = None, dtype: torch.dtype = torch.float32) -> Any:
    files = resolve_step_preference(*(None if path is None else str(path) for path in (scorer, clip)))
    return load_step_preference(files, dtype=dtype)


def pictures(height: int = 32, width: int = 32, dtype: torch.dtype = torch.float32) -> Tensor:
    g = torch.Generator().manual_seed(3)
    return (0.7 * torch.randn(4, 3, height, width, generator=g, dtype=torch.float64)).to(dtype)


def perturbed(model: StepPreferenceModel, scale: float = 0.05) -> StepPreferenceModel:
    """Every weight moved, so that shifts, scales and gates are those of no special model."""
    g = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += (scale * torch.randn(parameter.shape, generator=g, dtype=torch.float64)).to(parameter.dtype)
    return model


def scores(model: Any, images: Tensor, timesteps: Tensor = TIMESTEPS) -> Tensor:
    with torch.no_grad():
        return model.score(model.embed_images(images, timesteps), model.embed_texts(CAPTIONS))


@pytest.mark.parametrize("size", [(32, 32), (48, 40)])
def test_at_first_it_is_the_clip_bit_for_bit(clip: Path, size: tuple[int, int]) -> None:
    plain = load_clip_scorer(resolve_step_preference(None, str(clip)))
    own = scores(load(clip), pictures(*size))
    assert torch.equal(own, scores(plain, pictures(*size))) and own.std() > 0.1


def test_at_first_it_scores_as_transformers_own_forward(clip: Path) -> None:
    """CLIPModel's logits of picture i and caption i, padding mask and all; of the bundled CLIP too."""
    from fastpref.emoji import CLIP_DIR

    for folder in (clip, CLIP_DIR):
        model = load(folder)
        tokens = model.tokenizer(CAPTIONS, padding=True, return_tensors="pt")
        with torch.no_grad():
            logits = model.clip(**tokens, pixel_values=model.preprocess(pictures())).logits_per_image.diag()
        assert torch.allclose(scores(model, pictures()), logits, rtol=1e-5, atol=1e-5)


def literal_image_rows(model: StepPreferenceModel, pixels: Tensor, timestep: int) -> Tensor:
    """The vision tower under adaLN, one picture (3, S, S) and one timestep, written out from the weights in float64."""
    w = {name: value.double() for name, value in model.state_dict().items()}
    config = model.clip.config.vision_config
    heads, width, patch = config.num_attention_heads, config.hidden_size, config.patch_size

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(x: Tensor, name: str) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        spread = (centred.square().mean(-1, keepdim=True) + config.layer_norm_eps).sqrt()
        return centred / spread * w[f"{name}.weight"] + w[f"{name}.bias"]

    def silu(x: Tensor) -> Tensor:
        return x / (1 + (-x).exp())

    angles = [timestep / 10000 ** (i / 128) for i in range(128)]
    features = torch.tensor([math.cos(a) for a in angles] + [math.sin(a) for a in angles], dtype=torch.float64)
    h = silu(linear(silu(linear(features, "time_mlp.0")), "time_mlp.2"))
    cells = [
        (pixels[:, y : y + patch, x : x + patch] * w["clip.vision_model.embeddings.patch_embedding.weight"]).sum(
            (1, 2, 3)
        )
        for y in range(0, pixels.shape[1], patch)
        for x in range(0, pixels.shape[2], patch)
    ]
    x = torch.stack([w["clip.vision_model.embeddings.class_embedding"], *cells])
    x = norm(x + w["clip.vision_model.embeddings.position_embedding.weight"], "clip.vision_model.pre_layrnorm")
    for layer in range(config.num_hidden_layers):
        at, m = f"clip.vision_model.encoder.layers.{layer}", linear(h, f"modulations.{layer}")
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = m.split(width)
        seen = norm(x, f"{at}.layer_norm1") * (1 + scale) + shift
        q, k, v = (linear(seen, f"{at}.self_attn.{part}_proj").view(len(x), heads, -1) for part in "qkv")
        weights = (torch.einsum("qhd,khd->hqk", q, k) / (width / heads) ** 0.5).softmax(-1)
        attended = torch.einsum("hqk,khd->qhd", weights, v).reshape(len(x), width)
        x = x + gate * linear(attended, f"{at}.self_attn.out_proj")
        inner = linear(norm(x, f"{at}.layer_norm2") * (1 + mlp_scale) + mlp_shift, f"{at}.mlp.fc1")
        x = x + mlp_gate * linear(inner / (1 + (-1.702 * inner).exp()), f"{at}.mlp.fc2")
    shift, scale = linear(h, "final_modulation").split(width)
    row = (norm(x[0], "clip.vision_model.post_layernorm") * (1 + scale) + shift) @ w["clip.visual_projection.weight"].T
    return row / row.norm()


def test_adaln_equals_a_literal_implementation(clip: Path) -> None:
    model = perturbed(load(clip, dtype=torch.float64))
    images = pictures(dtype=torch.float64)
    with torch.no_grad():
        rows = model.embed_images(images, TIMESTEPS)
        plain = load(clip, dtype=torch.float64).embed_images(images, TIMESTEPS)
    assert (rows - plain).abs().max() > 0.05, "the timestep and the weights changed nothing"
    for row, image, timestep in zip(rows, model.preprocess(images), TIMESTEPS.tolist(), strict=True):
        assert (row - literal_image_rows(model, image, timestep)).abs().max() < 1e-11


def test_the_timestep_changes_the_picture_row_and_not_the_text(clip: Path) -> None:
    model = perturbed(load(clip))
    same = pictures()[:1].repeat(3, 1, 1, 1)
    with torch.no_grad():
        rows = model.embed_images(same, torch.tensor([1, 501, 951]))
    assert (rows[0] - rows[1]).abs().max() > 1e-3 and (rows[1] - rows[2]).abs().max() > 1e-3
    assert torch.allclose(timestep_features(torch.tensor([0]))[0], torch.tensor([1.0] * 128 + [0.0] * 128).double())


def test_recomputing_the_vision_layers_gives_the_same_gradients(clip: Path) -> None:
    gradients = []
    for mode in MODES:
        model = perturbed(load(clip))
        model.region = recomputed_region(mode)
        model.score(model.embed_images(pictures(), TIMESTEPS), model.embed_texts(CAPTIONS)).sum().backward()
        gradients.append([p.grad for p in model.trainable.values()])
    for other in gradients[1:]:
        assert all(torch.equal(a, b) for a, b in zip(gradients[0], other, strict=True) if a is not None)
    assert sum(a is not None and bool(a.abs().sum() > 0) for a in gradients[0]) > 50


def bicubic_matrix(size: int, new: int) -> Tensor:
    """(new, size): Keys' kernel with a = -0.75 at half-pixel centres, edges repeated, no antialiasing."""
    matrix = torch.zeros(new, size, dtype=torch.float64)
    for out in range(new):
        centre = (out + 0.5) * size / new - 0.5
        for tap in range(math.floor(centre) - 1, math.floor(centre) + 3):
            d, a = abs(centre - tap), -0.75
            inner = (a + 2) * d**3 - (a + 3) * d**2 + 1
            weight = inner if d <= 1 else a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a
            matrix[out, min(max(tap, 0), size - 1)] += weight
    return matrix


@pytest.mark.parametrize("size", [(64, 64), (20, 20), (48, 64), (70, 33), (32, 32)])
def test_pixels_are_a_bicubic_resize_a_centre_crop_a_clamp_and_the_normalisation(size: tuple[int, int]) -> None:
    preprocess = Preprocess(32, (0.1, 0.2, 0.3), (0.5, 0.6, 0.7))
    images = pictures(*size, dtype=torch.float64)
    scale = 32 / min(size)
    height, width = (int(side * scale + 0.5) for side in size)
    resized = bicubic_matrix(size[0], height) @ images @ bicubic_matrix(size[1], width).T
    top, left = round((height - 32) / 2), round((width - 32) / 2)
    cut = (resized[:, :, top : top + 32, left : left + 32] / 2 + 0.5).clamp(0, 1)
    expected = (cut - torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1)) / torch.tensor([0.5, 0.6, 0.7]).view(3, 1, 1)
    assert (preprocess(images) - expected).abs().max() < 1e-6
    assert (cut == 0).any() and (cut == 1).any()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_folded_it_scores_identically(clip: Path, dtype: torch.dtype, tolerance: float) -> None:
    model = perturbed(load(clip, dtype=dtype))
    folded = model.fold([951, 0, 251, 251], resident=2)
    expected = scores(model, pictures(dtype=dtype))
    for _ in range(2):
        assert (scores(folded, pictures(dtype=dtype)) - expected).abs().max() <= tolerance * expected.abs().max()
    assert folded.timesteps == [0, 251, 951] and len(folded._folded) == 2, "only two timesteps' weights stay in memory"
    with pytest.raises(ValueError, match="timestep 5 is not folded"):
        folded.embed_images(pictures(), torch.tensor([0, 5, 0, 0]))


def test_a_folded_timestep_is_a_plain_clip(clip: Path) -> None:
    """The folded weights, put into transformers' CLIP, score as the conditioned model: no adaLN is left."""
    model = perturbed(load(clip, dtype=torch.float64))
    plain = load_clip_scorer(resolve_step_preference(None, str(clip)), dtype=torch.float64)
    plain.clip.load_state_dict(model.clip.state_dict())
    missing = plain.clip.vision_model.load_state_dict(model.fold([501]).vision_weights(501), strict=False)
    assert not missing.unexpected_keys
    at = torch.full((4,), 501)
    expected = scores(model, pictures(dtype=torch.float64), at)
    assert (scores(plain, pictures(dtype=torch.float64), at) - expected).abs().max() < 1e-12


def published_names(layers: int) -> set[str]:
    """Names beside the CLIPModel's own, as in the public repository's model code."""
    names = {f"model.t_embedder.mlp.{part}.{kind}" for part in (0, 2) for kind in ("weight", "bias")}
    names |= {f"model.vision_model.adaLN_modulation.1.{kind}" for kind in ("weight", "bias")}
    for layer in range(layers):
        at = f"model.vision_model.encoder.layers.{layer}.adaLN_modulation.1"
        names |= {f"{at}.weight", f"{at}.bias"}
    return names


@pytest.fixture
def published(clip: Path) -> dict[str, Tensor]:
    """A random state dict in the published layout, with the position ids that older transformers saved."""
    from transformers import CLIPConfig, CLIPModel

    config = CLIPConfig.from_pretrained(clip)
    width, layers = config.vision_config.hidden_size, config.vision_config.num_hidden_layers
    state = {f"model.{name}": value for name, value in CLIPModel(config).state_dict().items()}
    g = torch.Generator().manual_seed(9)
    for name in sorted(published_names(layers)):
        rows = width if "t_embedder" in name else 6 * width if "layers" in name else 2 * width
        columns = 256 if "mlp.0" in name else width
        shape = (rows, columns) if name.endswith("weight") else (rows,)
        state[name] = 0.1 * torch.randn(shape, generator=g)
    for tower, length in (("text", config.text_config.max_position_embeddings), ("vision", 17)):
        state[f"model.{tower}_model.embeddings.position_ids"] = torch.arange(length)[None]
    return state


def test_the_published_layout_is_read_and_written(clip: Path, published: dict[str, Tensor], tmp_path: Path) -> None:
    file = tmp_path / "sd-v1-5_step-aware_preference_model.bin"
    torch.save(published, file)
    model = load(clip, file)
    state = model.state_dict()
    for ours, theirs in (
        ("time_mlp.2.bias", "t_embedder.mlp.2.bias"),
        ("modulations.1.weight", "vision_model.encoder.layers.1.adaLN_modulation.1.weight"),
        ("final_modulation.bias", "vision_model.adaLN_modulation.1.bias"),
        ("clip.text_projection.weight", "text_projection.weight"),
        ("clip.logit_scale", "logit_scale"),
    ):
        assert torch.equal(state[ours], published[f"model.{theirs}"])
    save_step_preference(model, resolve_step_preference(str(file), str(clip)), tmp_path / "ours")
    from safetensors.torch import load_file

    written = load_file(tmp_path / "ours" / WEIGHTS_NAME)
    assert written.keys() == {name for name in published if not name.endswith("position_ids")}
    assert all(torch.equal(value, published[name]) for name, value in written.items())
    again = load(None, tmp_path / "ours")
    assert torch.equal(scores(again, pictures()), scores(model, pictures()))
    assert not list(tmp_path.glob(".*")), "a draft was left"


def _damage(name: str, state: dict[str, Tensor]) -> Any:
    if name == "unknown":
        return state | {"model.vision_model.extra": torch.zeros(1)}
    if name == "no prefix":
        return {key.removeprefix("model."): value for key, value in state.items()}
    if name == "missing adaLN":
        return {key: value for key, value in state.items() if "layers.1.adaLN_modulation.1.bias" not in key}
    if name == "missing CLIP weight":
        return {key: value for key, value in state.items() if key != "model.text_projection.weight"}
    if name == "position ids":
        return state | {"model.vision_model.embeddings.position_ids": torch.arange(17)[None].flip(1)}
    if name == "shape":
        return state | {"model.t_embedder.mlp.0.weight": torch.zeros(32, 128)}
    if name == "image size":
        return state | {"model.vision_model.embeddings.position_embedding.weight": torch.zeros(50, 32)}
    return {"state_dict": state, "code": Path("x")}


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        ("unknown", "has the unknown .*vision_model.extra"),
        ("no prefix", "has the unknown"),
        ("missing adaLN", "lacks model.vision_model.encoder.layers.1.adaLN_modulation.1.bias"),
        ("missing CLIP weight", "lacks text_projection.weight"),
        ("position ids", "position_ids is not"),
        ("shape", "wrong shape for model.t_embedder.mlp.0.weight"),
        ("image size", "takes pictures of 56 pixels, the CLIP folder says 32"),
        ("code", "more than tensors"),
    ],
)
def test_another_layout_is_one_line(
    clip: Path, published: dict[str, Tensor], tmp_path: Path, damage: str, says: str
) -> None:
    file = tmp_path / "model.bin"
    torch.save(_damage(damage, published), file)
    with pytest.raises(UserError, match=says) as error:
        load(clip, file)
    assert "\n" not in str(error.value)


def _edit(folder: Path, name: str, change: Callable[[dict[str, Any]], None]) -> None:
    settings = json.loads((folder / name).read_text())
    change(settings)
    (folder / name).write_text(json.dumps(settings))


def test_a_clip_folder_that_does_not_fit_is_one_line(clip: Path, tmp_path: Path) -> None:
    folder = tmp_path / "clip"
    shutil.copytree(clip, folder)
    _edit(folder, "preprocessor_config.json", lambda s: s.update(crop_size={"height": 224, "width": 224}))
    with pytest.raises(UserError, match="makes pictures of 224 pixels, the CLIP takes 32"):
        load(folder)
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(UserError, match=r"preprocessor_config\.json"):
        load(folder)
    shutil.copyfile(clip / "preprocessor_config.json", folder / "preprocessor_config.json")
    for file in ("vocab.json", "tokenizer.json"):
        (folder / file).unlink()
    with pytest.raises(UserError, match="no tokenizer"):
        load(folder)


def test_what_is_not_there_is_one_line(clip: Path, tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(b"")
    for clip_dir, scorer, says in (
        (None, None, "set clip=FOLDER of a CLIP, or scorer=PATH"),
        (clip, tmp_path / "none", "no such preference model"),
        (None, tmp_path / "model.bin", "needs the CLIP folder it belongs to"),
        (clip, tmp_path / "model.bin", "checkpoint"),
        (clip, tmp_path, "no CLIP model there"),
        (tmp_path, None, "no CLIP model there"),
    ):
        with pytest.raises(UserError, match=says):
            load(clip_dir, scorer)
