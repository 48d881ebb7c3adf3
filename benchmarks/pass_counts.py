"""What a UNet pass launches and moves on a GPU, counted without one, by group of operators.

    python benchmarks/pass_counts.py [--rows 2 8] [--report] [--readme]

SDXL's shape at 1024 px, LoRA of rank 8 on q, k, v and out, one or four pairs with shared prompts. The policy of a
recipe runs on fake tensors through the code that training runs; every operator is looked up in pass_meter.py for its
kernels and for the bytes that it reads and writes. Forms of the pass:

    autocast            half precision by autocast, fp32 LoRA, the layers as diffusers and peft have them
    one dtype           half precision throughout but for fp32 islands
    one dtype, lean     without the layers' superfluous work (fastpref/models/lean_unet.py): engine=local's pass
    lean, fused_ops     with our kernels
    lean, compile       with transformer and residual blocks by inductor (pass_inductor.py)

"modelled" is no measurement: it is the sum over all kernels of bytes / copy bandwidth or operations / matrix rate,
whichever is larger, both rates as measured on one H200. Writes results/pass_counts.csv, .md and .png.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import pass_inductor
import torch
from bars import Panel, draw
from common import RESULTS, TABLES, markdown, provenance, publish, read_csv
from pass_meter import CASTS, GROUPS, CudaAutocast, PassMeter
from torch._subclasses.fake_tensor import FakeTensorMode

import fastpref.models.policy
from fastpref.config import parse_config
from fastpref.models import public
from fastpref.plan.count import Shapes, fake_policy

OUT = RESULTS / "pass_counts.csv"
ROWS = (2, 8)
PARTS = ("forward", "backward")
COMMON: dict[str, Any] = {"method": "dpo", "precision": "bf16", "lora_rank": 8, "device": "cpu"}
LEAN = "one dtype, lean"
FORMS: dict[str, dict[str, Any]] = {
    "autocast": {"engine": "deepspeed"},
    "one dtype": {},
    LEAN: {},
    "lean, fused_ops": {"fused_ops": True},
    "lean, compile": {"compile": True},
}
NOT_LEAN = ("autocast", "one dtype")


def shapes() -> Shapes:
    """SDXL at 1024 px."""
    return Shapes(public.UNETS["sdxl"], (4, 128, 128), 77)


def count(form: str, rows: int, sizes: Shapes) -> dict[str, PassMeter]:
    """The policy's forward, with gradients, and its backward."""
    config, mode = parse_config({**COMMON, **FORMS[form]}), FakeTensorMode()
    meters: dict[str, PassMeter] = {part: PassMeter() for part in PARTS}
    with ExitStack() as stack:
        if config.compile:
            stack.enter_context(pass_inductor.counted(meters, mode))
        if config.engine == "deepspeed":
            stack.enter_context(CudaAutocast())
        if form in NOT_LEAN:
            stack.enter_context(mock.patch.object(fastpref.models.policy, "make_lean", lambda _: None))
        policy = fake_policy(config, sizes.unet, mode)
        with mode:
            policy.share_prompts()
            for meter in meters.values():
                meter.freeze(p for p in policy.unet.parameters() if not p.requires_grad)
            noisy, timesteps, conditioning = sizes.inputs(policy, rows)
            with meters["forward"] as meter, meter.blocks(policy.unet):
                prediction = policy.predict(noisy, timesteps, conditioning)
            gradient = torch.empty_like(prediction)
            with meters["backward"]:
                prediction.backward(gradient)
    return meters


def measure(form: str, rows: int) -> list[dict[str, Any]]:
    """Rows of the CSV: one a part, group and operator."""
    found = []
    for part, meter in count(form, rows, shapes()).items():
        for (group, name), tally in meter.found.items():
            found.append(
                {
                    "form": form,
                    "rows": rows,
                    "part": part,
                    "group": group,
                    "operator": name.replace("_for_cpu", ""),
                    "kernels": tally.launches,
                    "bytes": tally.moved,
                    "operations": tally.flops,
                    "modelled_ms": f"{1e3 * tally.seconds:.4f}",
                    "in_blocks": meter.casts_in_blocks if group == CASTS else "",
                    **provenance(),
                }
            )
    return found


def totals(rows: Sequence[dict[str, Any]], key: str) -> dict[str, dict[str, float]]:
    """form → group → sum of ``key``; the group "all" is the whole pass."""
    found: dict[str, dict[str, float]] = {}
    for row in rows:
        own = found.setdefault(row["form"], defaultdict(float))
        for group in (row["group"], "all"):
            own[group] += float(row[key])
    return found


def table(rows: Sequence[dict[str, Any]]) -> str:
    """A table for each number of rows: kernels and GB by group, a column a form; and the casts."""
    texts = []
    for number in sorted({int(row["rows"]) for row in rows}):
        own = [row for row in rows if int(row["rows"]) == number]
        kernels, moved, modelled = (totals(own, key) for key in ("kernels", "bytes", "modelled_ms"))
        forms = [form for form in FORMS if form in kernels]
        groups = [group for group in GROUPS if any(kernels[form][group] for form in forms)]
        lines = [
            [group, *(f"{kernels[form][group]:,.0f} / {moved[form][group] / 1e9:.1f}" for form in forms)]
            for group in (*groups, "all")
        ]
        for part in PARTS:
            count_of, bytes_of = (totals([r for r in own if r["part"] == part], key) for key in ("kernels", "bytes"))
            lines.append(
                [
                    f"of them, {part}",
                    *(f"{count_of[form]['all']:,.0f} / {bytes_of[form]['all'] / 1e9:.1f}" for form in forms),
                ]
            )
        lines.append(["modelled, ms", *(f"{modelled[form]['all']:.0f}" for form in forms)])
        title = f"**{number} rows ({number // 2} pair{'s' * (number > 2)}), forward + backward: kernels / GB moved**"
        texts += [title, markdown(["", *forms], lines)]
    return "\n\n".join([*texts, casts(rows)])


def casts(rows: Sequence[dict[str, Any]]) -> str:
    """One line: copies between dtypes in a forward."""
    said = []
    for form in FORMS:
        inside = [int(r["in_blocks"]) for r in rows if (r["form"], r["part"], r["group"]) == (form, "forward", CASTS)]
        counted = totals([r for r in rows if r["part"] == "forward"], "kernels").get(form)
        if counted is not None:
            several = len({r["rows"] for r in rows if r["form"] == form})
            said.append(f"{form} {max(inside, default=0)} (and {counted[CASTS] / several:.0f} in all)")
    return f"Casts outside the fp32 islands in a forward: {'; '.join(said)}."


def plot(rows: Sequence[dict[str, Any]], out: Path) -> None:
    """GB of every group, a bar a form, for each number of rows; kernels, which hardly depend on it, once."""
    panels = []
    numbers = sorted({int(row["rows"]) for row in rows})
    for number, key, axis, scale in (
        *((n, "bytes", "GB moved", 1e-9) for n in numbers),
        (numbers[0], "kernels", "kernels", 1),
    ):
        found = totals([row for row in rows if int(row["rows"]) == number], key)
        groups = [group for group in GROUPS if any(found[form][group] * scale >= 1 for form in found)]
        bars = {group: {form: [found[form][group] * scale] for form in found} for group in groups}
        panels.append(Panel(f"SDXL, {number} rows, forward + backward, counted", axis, bars))
    draw(panels, out)


def main() -> None:
    """Count, write, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS, help="of a forward")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--report", action="store_true", help="count nothing: table and plot from the CSV")
    parser.add_argument("--readme", action="store_true", help="also put the table into benchmarks/README.md")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = list(read_csv(options.out)) if options.report else []
    for number in () if options.report else options.rows:
        for form in FORMS:
            rows += measure(form, number)
    text = table(rows)
    print(text)
    readme = TABLES if options.readme else None
    publish(options.out, rows, "Kernels and bytes of a UNet pass", text, plot, readme)


if __name__ == "__main__":
    main()
