"""What the VAE's precision costs: latents, pictures and their scores in bf16, fp16 and TF32 against fp32.

    python benchmarks/vae_precision.py [--side 128] [--only bundled,sdxl] [--device cuda] [--report]

Two VAEs: the bundled one, trained, on 64 of the bundled pictures; and random weights in the shape of SDXL's
(83,653,863 values), on two of them enlarged to --side pixels. "tf32" rounds what convolutions take as a GPU does in
fp32 unless it is told otherwise (torch's default for cuDNN); "stored" is the rounding of latents to fp16, in which
half-precision recipes store them. Latents' errors are in units of their standard deviation, pictures' in levels of 255
and in dB below the pictures' own standard deviation. Scores are the bundled CLIP's, of four candidates a picture: its
latents with noise of a tenth of their standard deviation. "score" is the root mean square error in units of the
candidates' spread, "pairs" the share of pools whose best and worst candidate stay the same, which is what SPO asks for.
"scorer" decodes in fp32 and judges in bf16: what a recipe in bf16 accepts anyway. Ways that the device computes in are
timed beside fp32; tf32, which is emulated, is not.
"""

from __future__ import annotations

import argparse
import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from common import RESULTS, markdown, provenance, read_csv, write_csv
from devices import add_device, device_of, name_of, open_device, seconds
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

from fastpref.atomic import write_bytes
from fastpref.data.images import load_rgb, to_bucket
from fastpref.data.records import Record, read_records
from fastpref.emoji import MODEL_DIR
from fastpref.models import vae as calls
from fastpref.models.loading import open_vae
from fastpref.models.public import VAES
from fastpref.models.step_preference import ClipScorer
from fastpref.models.step_preference_file import load_clip_scorer, resolve_step_preference
from fastpref.rollout.step_scorers import agreement

OUT = RESULTS / "vae_precision.csv"
WAYS = ("tf32", "bf16", "fp16")
DTYPES = {"tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
POOL, SPREAD = 4, 0.1  # candidates, and their noise in the latents' standard deviation
WHAT = {"bundled": "bundled, trained", "sdxl": "SDXL's shape, random"}


class Tf32(TorchDispatchMode):
    """Inside, convolutions take their inputs and weights rounded to 10 bits."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.convolution.default:
            args = (rounded(args[0]), rounded(args[1]), *args[2:])
        return func(*args, **(kwargs or {}))


def rounded(values: torch.Tensor) -> torch.Tensor:
    """fp32 values to the nearest with 10 bits behind the leading one."""
    bits = values.contiguous().view(torch.int32)
    return ((bits + 0xFFF + ((bits >> 13) & 1)) & ~0x1FFF).view(torch.float32)


def pictures(count: int, side: int) -> tuple[torch.Tensor, list[str]]:
    """(count, 3, side, side) in [-1, 1] and their captions."""
    found, captions = [], []
    for record in read_records("emoji"):
        if isinstance(record, Record) and len(found) < count:
            image: Image.Image = to_bucket(load_rgb(record.winner, 1 << 24), (side, side))
            values = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(side, side, 3)
            found.append(values.permute(2, 0, 1).float() / 127.5 - 1)
            captions.append(record.caption)
    return torch.stack(found), captions


def open_model(name: str) -> Any:
    """A VAE in fp32."""
    if name == "bundled":
        return open_vae(MODEL_DIR, torch.float32)
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    model: Any = AutoencoderKL.from_config(VAES["sdxl"])
    return model.eval().requires_grad_(False)


def timed(run: Callable[[], Any], device: torch.device) -> tuple[Any, float]:
    """What it gives, and the seconds of its second run."""
    return run(), seconds(run, device)


@torch.no_grad()
def measure(name: str, side: int, device: torch.device) -> list[dict[str, Any]]:
    """A row for each way."""
    if device.type == "cuda":
        torch.backends.cudnn.allow_tf32 = False  # the row of its own emulates it
    model = open_model(name).to(device)
    images, captions = pictures(*((64, 32) if name == "bundled" else (2, side)))
    images = images.to(device)
    scale = model.config.scaling_factor
    latents, encode_seconds = timed(lambda: calls.encode(model, images).mean * scale, device)
    std = latents.std()
    pools = latents.repeat_interleave(POOL, 0)
    noise = torch.randn(pools.shape, generator=torch.Generator().manual_seed(1)).to(device)
    candidates = pools + SPREAD * std * noise
    decoded, decode_seconds = timed(lambda: calls.decode(model, candidates), device)
    judge = load_clip_scorer(resolve_step_preference("emoji", None), device=device)
    scores = scored(judge, decoded, captions)
    rows = [{"vae": name, "way": "stored", **latent_error(latents.half().float(), latents, std)}]
    for way in WAYS:
        own = copy.deepcopy(model).to(DTYPES[way])
        with Tf32() if way == "tf32" else torch.no_grad():
            found, encoding = timed(lambda own=own: calls.encode(own, images).mean * scale, device)
            shown, decoding = timed(lambda own=own: calls.decode(own, candidates), device)
        row = {"vae": name, "way": way, **latent_error(found, latents, std)}
        apart = (shown - decoded).double()
        row["picture_max"] = float(apart.abs().max()) * 127.5
        row["picture_db"] = 20 * math.log10(float(decoded.std()) / float(apart.square().mean().sqrt()))
        row |= score_error(scored(judge, shown, captions), scores)
        if way != "tf32":
            row |= {"encode_speed": encode_seconds / encoding, "decode_speed": decode_seconds / decoding}
        rows.append(row)
    common = {"side": images.shape[-1], "pictures": len(images), "device": name_of(device), **provenance()}
    half = load_clip_scorer(resolve_step_preference("emoji", None), device=device, dtype=torch.bfloat16)
    rows.append({"vae": name, "way": "scorer", **score_error(scored(half, decoded, captions), scores)})
    return [row | common for row in rows]


def latent_error(found: torch.Tensor, exact: torch.Tensor, std: torch.Tensor) -> dict[str, float]:
    apart = ((found - exact) / std).double()
    return {"latent_rms": float(apart.square().mean().sqrt()), "latent_max": float(apart.abs().max())}


def score_error(found: torch.Tensor, exact: torch.Tensor) -> dict[str, float]:
    seen, right = (scores - scores.mean(1, keepdim=True) for scores in (found, exact))
    rms = float((seen - right).square().mean().sqrt() / right.square().mean().sqrt())
    return {"score": rms, "pairs": agreement(exact, found)["same_pair"]}


def scored(judge: ClipScorer, images: torch.Tensor, captions: list[str]) -> torch.Tensor:
    """(pictures, POOL) scores."""
    texts = judge.embed_texts(captions).repeat_interleave(POOL, 0)
    seen = [judge.embed_images(part, torch.zeros(len(part), dtype=torch.int64)) for part in images.split(16)]
    return judge.score(torch.cat(seen), texts).view(-1, POOL).double()


def table(rows: list[dict[str, str]]) -> str:
    """As Markdown."""

    def shown(row: dict[str, str], key: str, form: str) -> str:
        return format(float(row[key]), form) if row.get(key) else ""

    columns = {
        **{"latent_rms": ".5f", "latent_max": ".4f", "picture_db": ".1f", "picture_max": ".2f", "score": ".4f"},
        **{"pairs": ".2f", "encode_speed": ".2f", "decode_speed": ".2f"},
    }
    head = ["VAE", "computed in", "latents, rms / std", "most", "pictures, dB", "most, of 255"]
    head += ["score, rms / spread", "same pairs", "encode, × fp32's speed", "decode"]
    lines = []
    for row in rows:
        way = {"stored": "fp32, stored in fp16", "scorer": "fp32, the scorer in bf16"}.get(row["way"], row["way"])
        where = f"{WHAT[row['vae']]}, {row['side']} px, {device_of(row)}"
        lines.append([where, way, *(shown(row, key, form) for key, form in columns.items())])
    return markdown(head, lines)


def main() -> None:
    """Measure, then write CSV and table; rows of other devices stay."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=128)
    parser.add_argument("--only", default="bundled,sdxl")
    parser.add_argument("--report", action="store_true", help="only write the table again")
    add_device(parser)
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = list(read_csv(OUT))
    if not arguments.report:
        device = open_device(arguments)
        for name in arguments.only.split(","):
            made = measure(name, arguments.side, device)
            rows = [r for r in rows if (r["vae"], device_of(r)) != (name, made[0]["device"])] + made
            write_csv(OUT, rows)
    text = table(read_csv(OUT))
    write_bytes(OUT.with_suffix(".md"), f"# What the VAE's precision costs\n\n{text}\n".encode())
    print(text)


if __name__ == "__main__":
    main()
