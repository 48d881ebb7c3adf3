"""Scorers on random weights in the published layouts, against the formulas; checkpoints that cannot be used."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import conv2d, gelu, layer_norm, linear, normalize

from fastpref.emoji import CLIP_DIR
from fastpref.emoji.random_models import make_random_clip
from fastpref.errors import UserError
from fastpref.evaluate.scorers import load_scorer
from fastpref.evaluate.scorers.checkpoint import CLIP_MEAN, CLIP_STD, square_pixels
from fastpref.evaluate.scorers.hpsv2 import clip_config, from_open_clip, padded_pixels
from fastpref.evaluate.scorers.image_reward import MEAN, STD, _renamed, _vision_config

State = dict[str, Tensor]
PROMPTS = ["a red heart", "two blue stars and a moon"]
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "heart", "two", "blue", "star", "##s", "moon"]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def _pictures(sizes: tuple[tuple[int, int], ...] = ((300, 200), (96, 130))) -> list[Image.Image]:
    rng = np.random.default_rng(0)
    small = [Image.fromarray(rng.integers(0, 256, (6, 9, 3), dtype=np.uint8)) for _ in sizes]
    return [image.resize(size, Image.Resampling.BICUBIC) for image, size in zip(small, sizes, strict=True)]


def _linear(state: State, name: str, out: int, into: int) -> None:
    state[f"{name}.weight"], state[f"{name}.bias"] = torch.randn(out, into) / into**0.5, 0.1 * torch.randn(out)


def _norm(state: State, name: str, width: int) -> None:
    state[f"{name}.weight"], state[f"{name}.bias"] = 1 + 0.1 * torch.randn(width), 0.1 * torch.randn(width)


def _attend(qkv: Sequence[Tensor], heads: int, mask: Tensor | None = None) -> Tensor:
    """(n, L, D) by the formula; ``mask`` is added to the logits."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in qkv)
    logits = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    return ((logits if mask is None else logits + mask).softmax(-1) @ v).transpose(1, 2).flatten(2)


def _apply(state: State, name: str, x: Tensor, eps: float | None = None) -> Tensor:
    weight, bias = state[f"{name}.weight"], state[f"{name}.bias"]
    return linear(x, weight, bias) if eps is None else layer_norm(x, x.shape[-1:], weight, bias, eps)


# HPSv2: open_clip's names


def _open_clip_state(layers: int = 2, vision: int = 160, text: int = 128, embed: int = 24, vocab: int = 2295) -> State:
    state: State = {
        "positional_embedding": torch.randn(77, text),
        "text_projection": torch.randn(text, embed),
        "logit_scale": torch.tensor(4.6),
        "visual.class_embedding": torch.randn(vision),
        "visual.positional_embedding": torch.randn(16 * 16 + 1, vision),
        "visual.proj": torch.randn(vision, embed),
        "visual.conv1.weight": 0.05 * torch.randn(vision, 3, 14, 14),
        "token_embedding.weight": torch.randn(vocab, text),
    }
    for name, width in (("visual.ln_pre", vision), ("visual.ln_post", vision), ("ln_final", text)):
        _norm(state, name, width)
    for tower, width in (("visual.transformer", vision), ("transformer", text)):
        for block in (f"{tower}.resblocks.{i}" for i in range(layers)):
            _norm(state, f"{block}.ln_1", width)
            _norm(state, f"{block}.ln_2", width)
            state[f"{block}.attn.in_proj_weight"] = torch.randn(3 * width, width) / width**0.5
            state[f"{block}.attn.in_proj_bias"] = 0.1 * torch.randn(3 * width)
            _linear(state, f"{block}.attn.out_proj", width, width)
            _linear(state, f"{block}.mlp.c_fc", 4 * width, width)
            _linear(state, f"{block}.mlp.c_proj", width, 4 * width)
    return state


def _open_clip_features(state: State, pixels: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    def blocks(x: Tensor, tower: str, heads: int, mask: Tensor | None) -> Tensor:
        for block in (f"{tower}.resblocks.{i}" for i in range(2)):
            normed = _apply(state, f"{block}.ln_1", x, 1e-5)
            qkv = linear(normed, state[f"{block}.attn.in_proj_weight"], state[f"{block}.attn.in_proj_bias"])
            x = x + _apply(state, f"{block}.attn.out_proj", _attend(qkv.chunk(3, -1), heads, mask))
            inner = gelu(_apply(state, f"{block}.mlp.c_fc", _apply(state, f"{block}.ln_2", x, 1e-5)))
            x = x + _apply(state, f"{block}.mlp.c_proj", inner)
        return x

    patches = conv2d(pixels, state["visual.conv1.weight"], stride=14).flatten(2).transpose(1, 2)
    first = state["visual.class_embedding"].expand(len(pixels), 1, -1)
    x = torch.cat([first, patches], 1) + state["visual.positional_embedding"]
    x = blocks(_apply(state, "visual.ln_pre", x, 1e-5), "visual.transformer", 2, None)
    image = _apply(state, "visual.ln_post", x[:, 0], 1e-5) @ state["visual.proj"]
    x = state["token_embedding.weight"][ids] + state["positional_embedding"]
    x = blocks(x, "transformer", 2, torch.full((77, 77), -torch.inf).triu(1))
    x = _apply(state, "ln_final", x, 1e-5)
    text = x[torch.arange(len(ids)), ids.argmax(-1)] @ state["text_projection"]
    return normalize(image, dim=-1), normalize(text, dim=-1)


def test_hpsv2_is_the_cosine_that_open_clip_computes(tmp_path: Path) -> None:
    from transformers import CLIPTokenizer

    halves, images = {f"module.{k}": v.half() for k, v in _open_clip_state().items()}, _pictures()
    state = {k.removeprefix("module."): v.float() for k, v in halves.items()}
    torch.save({"epoch": 1, "state_dict": halves}, tmp_path / "HPS.pt")
    scores = load_scorer(f"hpsv2={tmp_path / 'HPS.pt'},tokenizer={CLIP_DIR}").score(images, PROMPTS)
    tokenizer = CLIPTokenizer.from_pretrained(CLIP_DIR)
    ids = torch.zeros(2, 77, dtype=torch.long)  # open_clip pads with zero
    for row, prompt in zip(ids, PROMPTS, strict=True):
        tokens = tokenizer(prompt).input_ids
        row[: len(tokens)] = torch.tensor(tokens)
    image, text = _open_clip_features(state, padded_pixels(images, 224), ids)
    torch.testing.assert_close(scores, (image * text).sum(-1), atol=2e-5, rtol=0)
    assert scores.dtype == torch.float32 and (scores[0] - scores[1]).abs() > 0.01


def test_the_published_sizes_are_recognised() -> None:
    with torch.device("meta"):
        clip = from_open_clip(_open_clip_state(32, 1280, 1024, 1024, 49408), Path("HPS.pt"))
        blip = _image_reward_state(vision=1024, text=768, vocab=30524)
    config = clip_config(clip, Path("HPS.pt"))
    vision, text = config.vision_config, config.text_config
    assert (vision.num_hidden_layers, vision.num_attention_heads, vision.intermediate_size) == (32, 16, 5120)
    assert (vision.image_size, vision.patch_size, vision.hidden_act) == (224, 14, "gelu")
    assert (text.num_attention_heads, text.intermediate_size, text.max_position_embeddings) == (16, 4096, 77)
    assert (text.eos_token_id, text.hidden_act, config.projection_dim) == (49407, "gelu", 1024)
    prefix = "blip.visual_encoder."
    renamed = {_renamed(k.removeprefix(prefix)): v for k, v in blip.items() if k.startswith(prefix)}
    vision = _vision_config(renamed, Path("ImageReward.pt"))
    assert (vision.num_attention_heads, vision.intermediate_size, vision.image_size) == (16, 4096, 224)
    assert vision.layer_norm_eps == 1e-6  # timm's, not the default of BlipVisionConfig


def test_hpsv2_resizes_the_longer_side_and_pads_with_black() -> None:
    image = _pictures(((300, 201),))[0]
    pixels = padded_pixels([image], 224)[0] * torch.tensor(CLIP_STD)[:, None, None]
    pixels = pixels + torch.tensor(CLIP_MEAN)[:, None, None]
    top, rows = 37, 150  # round(201 * 224 / 300), and half of the other 74
    assert pixels[:, :top].abs().max() < 1e-6 and pixels[:, top + rows :].abs().max() < 1e-6
    for channel in range(3):
        floats = Image.fromarray(np.asarray(image, dtype=np.float32)[..., channel] / 255)
        expected = np.asarray(floats.resize((224, rows), Image.Resampling.BICUBIC))
        np.testing.assert_allclose(pixels[channel, top : top + rows], expected, atol=1e-4)


def test_the_other_scorers_cut_out_the_centre() -> None:
    image = _pictures(((229, 224),))[0]
    pixels = square_pixels([image], 224)[0] * torch.tensor(CLIP_STD)[:, None, None]
    pixels = pixels + torch.tensor(CLIP_MEAN)[:, None, None]
    expected = np.asarray(image)[:, 2:226].transpose(2, 0, 1) / 255  # torchvision: round(2.5) = 2
    np.testing.assert_allclose(pixels, expected, atol=1e-6)
    tall = square_pixels(_pictures(((100, 333),)), 224)
    direct = _pictures(((100, 333),))[0].resize((224, 745), Image.Resampling.BICUBIC).crop((0, 260, 224, 484))
    torch.testing.assert_close(tall, square_pixels([direct], 224))


# ImageReward: BLIP's names


def _image_reward_state(vision: int = 128, text: int = 64, vocab: int = len(VOCABULARY) + 2) -> State:
    state: State = {
        "blip.visual_encoder.cls_token": torch.randn(1, 1, vision),
        "blip.visual_encoder.pos_embed": torch.randn(1, 14 * 14 + 1, vision),
        "blip.visual_encoder.patch_embed.proj.weight": 0.05 * torch.randn(vision, 3, 16, 16),
        "blip.visual_encoder.patch_embed.proj.bias": torch.randn(vision),
        "blip.text_encoder.embeddings.position_ids": torch.arange(512)[None],
        "blip.text_encoder.embeddings.word_embeddings.weight": torch.randn(vocab, text),
        "blip.text_encoder.embeddings.position_embeddings.weight": torch.randn(512, text),
    }
    _norm(state, "blip.visual_encoder.norm", vision)
    _norm(state, "blip.text_encoder.embeddings.LayerNorm", text)
    for block in (f"blip.visual_encoder.blocks.{i}" for i in range(2)):
        _norm(state, f"{block}.norm1", vision)
        _norm(state, f"{block}.norm2", vision)
        _linear(state, f"{block}.attn.qkv", 3 * vision, vision)
        _linear(state, f"{block}.attn.proj", vision, vision)
        _linear(state, f"{block}.mlp.fc1", 4 * vision, vision)
        _linear(state, f"{block}.mlp.fc2", vision, 4 * vision)
    for layer in (f"blip.text_encoder.encoder.layer.{i}" for i in range(2)):
        for kind, width in (("attention", text), ("crossattention", vision)):
            _linear(state, f"{layer}.{kind}.self.query", text, text)
            _linear(state, f"{layer}.{kind}.self.key", text, width)
            _linear(state, f"{layer}.{kind}.self.value", text, width)
            _linear(state, f"{layer}.{kind}.output.dense", text, text)
            _norm(state, f"{layer}.{kind}.output.LayerNorm", text)
        _linear(state, f"{layer}.intermediate.dense", 4 * text, text)
        _linear(state, f"{layer}.output.dense", text, 4 * text)
        _norm(state, f"{layer}.output.LayerNorm", text)
    _linear(state, "blip.vision_proj", 256, vision)
    _linear(state, "blip.text_proj", 256, text)
    return state | _head_state("mlp.", text)


def _head_state(prefix: str, width: int) -> State:
    state: State = {}
    for position, out in zip((0, 2, 4, 6, 7), (1024, 128, 64, 16, 1), strict=True):
        _linear(state, f"{prefix}layers.{position}", out, width)
        width = out
    return state


def _rate(state: State, prefix: str, x: Tensor) -> Tensor:
    for position in (0, 2, 4, 6, 7):
        x = _apply(state, f"{prefix}layers.{position}", x)
    return x[:, 0]


def _med_config(folder: Path) -> None:
    config = {
        "architectures": ["BertModel"],
        "attention_probs_dropout_prob": 0.1,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.1,
        "hidden_size": 64,
        "initializer_range": 0.02,
        "intermediate_size": 256,
        "layer_norm_eps": 1e-12,
        "max_position_embeddings": 512,
        "model_type": "bert",
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "pad_token_id": 0,
        "add_type_embeddings": False,
        "vocab_size": len(VOCABULARY) + 2,
        "encoder_width": 768,
        "add_cross_attention": True,
    }
    (folder / "med_config.json").write_text(json.dumps(config))


def _image_reward_by_hand(state: State, pixels: Tensor, ids: Tensor) -> Tensor:
    see = "blip.visual_encoder"
    weight, bias = (state[f"{see}.patch_embed.proj.{kind}"] for kind in ("weight", "bias"))
    x = conv2d(pixels, weight, bias, stride=16).flatten(2).transpose(1, 2)
    x = torch.cat([state[f"{see}.cls_token"].expand(len(x), -1, -1), x], 1) + state[f"{see}.pos_embed"]
    for block in (f"{see}.blocks.{i}" for i in range(2)):
        qkv = _apply(state, f"{block}.attn.qkv", _apply(state, f"{block}.norm1", x, 1e-6))
        x = x + _apply(state, f"{block}.attn.proj", _attend(qkv.chunk(3, -1), 2))
        inner = gelu(_apply(state, f"{block}.mlp.fc1", _apply(state, f"{block}.norm2", x, 1e-6)))
        x = x + _apply(state, f"{block}.mlp.fc2", inner)
    seen = _apply(state, f"{see}.norm", x, 1e-6)
    embed = "blip.text_encoder.embeddings"
    h = state[f"{embed}.word_embeddings.weight"][ids] + state[f"{embed}.position_embeddings.weight"][: ids.shape[1]]
    h = _apply(state, f"{embed}.LayerNorm", h, 1e-12)
    padding = torch.where(ids == 0, -torch.inf, 0.0)[:, None, None]
    for layer in (f"blip.text_encoder.encoder.layer.{i}" for i in range(2)):
        for kind, source, mask in (("attention", None, padding), ("crossattention", seen, None)):
            name, other = f"{layer}.{kind}", h if source is None else source
            qkv = tuple(
                _apply(state, f"{name}.self.{part}", rows)
                for part, rows in (("query", h), ("key", other), ("value", other))
            )
            out = _apply(state, f"{name}.output.dense", _attend(qkv, 4, mask))
            h = _apply(state, f"{name}.output.LayerNorm", out + h, 1e-12)
        out = _apply(state, f"{layer}.output.dense", gelu(_apply(state, f"{layer}.intermediate.dense", h)))
        h = _apply(state, f"{layer}.output.LayerNorm", out + h, 1e-12)
    return (_rate(state, "mlp.", h[:, 0]) - MEAN) / STD


@pytest.fixture
def image_reward(tmp_path: Path) -> tuple[Path, State]:
    state = _image_reward_state()
    torch.save(state, tmp_path / "ImageReward.pt")
    (tmp_path / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n")
    _med_config(tmp_path)
    return tmp_path / "ImageReward.pt", state


def test_image_reward_is_what_blip_and_the_head_compute(image_reward: tuple[Path, State]) -> None:
    path, state = image_reward
    images = _pictures()
    scores = load_scorer(f"imagereward={path}").score(images, ["A red heart", "two blue stars moon"])
    cls, sep = VOCABULARY.index("[CLS]"), VOCABULARY.index("[SEP]")
    words = [["a", "red", "heart"], ["two", "blue", "star", "##s", "moon"]]
    ids = torch.zeros(2, 35, dtype=torch.long)
    for row, tokens in zip(ids, words, strict=True):
        row[: len(tokens) + 2] = torch.tensor([cls, *map(VOCABULARY.index, tokens), sep])
    expected = _image_reward_by_hand(state, square_pixels(images, 224), ids)
    torch.testing.assert_close(scores, expected, atol=1e-4, rtol=1e-4)
    assert (scores[0] - scores[1]).abs() > 0.01
    other = load_scorer(f"imagereward={path}").score(images, ["two blue moon", "two blue stars moon"])
    assert abs(other[0] - scores[0]) > 0.01 and abs(other[1] - scores[1]) < 1e-4


# the CLIP family


def test_clip_score_and_pickscore_are_clips_own_logits(tmp_path: Path) -> None:
    from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

    folder, images = make_random_clip(tmp_path / "clip"), _pictures()
    model = CLIPModel.from_pretrained(folder).eval()
    pixels = CLIPImageProcessorPil.from_pretrained(folder)(images=images, return_tensors="pt")
    tokens = CLIPTokenizer.from_pretrained(folder)(PROMPTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        logits = model(**tokens, **pixels).logits_per_image.diagonal()
    clip, pick = load_scorer(f"clip={folder}"), load_scorer(f"pickscore={folder},processor={folder}")
    torch.testing.assert_close(pick.score(images, PROMPTS), logits, atol=1e-5, rtol=1e-5)
    cosines = 100 * logits / model.logit_scale.exp().detach()
    torch.testing.assert_close(clip.score(images, PROMPTS), cosines, atol=1e-4, rtol=1e-5)


def test_aesthetic_is_linear_in_the_unit_embedding_and_blind_to_prompts(tmp_path: Path) -> None:
    from transformers import CLIPModel

    folder, images = make_random_clip(tmp_path / "clip"), _pictures()
    state = _head_state("", 24)
    torch.save(state, tmp_path / "head.pth")
    save_file(state, tmp_path / "head.safetensors")
    model = CLIPModel.from_pretrained(folder).eval()
    with torch.no_grad():
        features = model.get_image_features(pixel_values=square_pixels(images, 32)).pooler_output
    expected = _rate(state, "", features / features.norm(dim=-1, keepdim=True))
    for file in ("head.pth", "head.safetensors"):
        scorer = load_scorer(f"aesthetic={tmp_path / file},clip={folder}")
        torch.testing.assert_close(scorer.score(images, PROMPTS), expected, atol=1e-5, rtol=1e-4)
    assert torch.equal(scorer.score(images, PROMPTS), scorer.score(images, PROMPTS[::-1]))


# checkpoints that cannot be used


class Code:
    """Something a pickle would have to run code for."""


def _refused(spec: str, match: str) -> None:
    with pytest.raises(UserError, match=match) as caught:
        load_scorer(spec)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


def _without(name: str) -> Callable[[State], State]:
    return lambda state: {key: value for key, value in state.items() if key != name}


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (_without("visual.ln_pre.bias"), "lacks vision_model.pre_layrnorm.bias"),
        (_without("visual.conv1.weight"), "no open_clip ViT"),
        (lambda state: state | {"text_projection": torch.zeros(128, 25)}, "wrong shape for text_projection.weight"),
        (lambda state: state | {"visual.attn_pool.query": torch.zeros(1)}, "unknown visual.attn_pool.query"),
        (lambda state: state | {"transformer.resblocks.0.ls_1.gamma": torch.zeros(1)}, "unknown ls_1.gamma"),
        (lambda state: {}, "no state dict"),
        (lambda state: {"visual.proj": Code()}, "more than tensors"),
    ],
)
def test_hpsv2_refuses_other_layouts(change: Callable[[State], State], match: str, tmp_path: Path) -> None:
    state = _open_clip_state(vision=80, text=64)
    torch.save({"state_dict": change(state)}, tmp_path / "HPS.pt")
    _refused(f"hpsv2={tmp_path / 'HPS.pt'},tokenizer={CLIP_DIR}", match)


def test_damaged_and_absent_files_are_refused(tmp_path: Path, image_reward: tuple[Path, State]) -> None:
    path, state = image_reward
    (tmp_path / "cut.pt").write_bytes(path.read_bytes()[:-5000])
    (tmp_path / "cut.safetensors").write_bytes(b"\x10")
    for name in ("cut.pt", "cut.safetensors", "none.pt"):
        _refused(f"imagereward={tmp_path / name}", "checkpoint.*" + name)
    torch.save({k: v for k, v in state.items() if not k.startswith("mlp.")}, tmp_path / "headless.pt")
    _refused(f"imagereward={tmp_path / 'headless.pt'}", "nothing under mlp")
    torch.save(_without("blip.text_encoder.encoder.layer.1.crossattention.self.key.bias")(state), tmp_path / "lacks.pt")
    _refused(f"imagereward={tmp_path / 'lacks.pt'}", "lacks encoder.layer.1.crossattention.self.key.bias")
    (tmp_path / "vocab.txt").write_text("\n".join(VOCABULARY[:-1]))
    _refused(f"imagereward={path}", "14 tokens, the checkpoint 15")
    (tmp_path / "med_config.json").write_text('{"vocab_size": 15}')
    _refused(f"imagereward={path}", "no usable med_config.json.*hidden_size")


def test_wrong_parts_are_refused(tmp_path: Path) -> None:
    folder = make_random_clip(tmp_path / "clip")
    for width, match in ((25, "takes embeddings of 25 values, this CLIP gives 24"), (24, "unknown mlp.layers.0.bias")):
        head = _head_state("" if width == 25 else "mlp.", width) | (_head_state("", 24) if width == 24 else {})
        torch.save(head, tmp_path / "head.pth")
        _refused(f"aesthetic={tmp_path / 'head.pth'},clip={folder}", match)
    _refused(f"aesthetic={tmp_path / 'head.pth'}", "no CLIP given")
    torch.save({"state_dict": _open_clip_state(vision=80, text=64, vocab=99)}, tmp_path / "HPS.pt")
    _refused(f"hpsv2={tmp_path / 'HPS.pt'}", "no CLIP tokenizer")
    _refused(f"hpsv2={tmp_path / 'HPS.pt'},tokenizer={CLIP_DIR}", "2295 tokens, the checkpoint 99")
    _refused(f"pickscore={tmp_path}", "no config.json")
    _refused("fid=somewhere", "no such scorer")
    _refused("clip=emoji,tokenizer=x", "no option tokenizer=x")
    from safetensors.torch import load_file

    weights = load_file(folder / "model.safetensors")
    save_file(_without("visual_projection.weight")(weights), folder / "model.safetensors", metadata={"format": "pt"})
    _refused(f"clip={folder}", "lacks visual_projection.weight")
    (folder / "model.safetensors").write_bytes(b"\x10")
    _refused(f"pickscore={folder}", "cannot (read|load)")
