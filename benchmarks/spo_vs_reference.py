"""One round of SPO, ours against the literal order of work: same models, prompts, noise, pairs and losses.

    python benchmarks/spo_vs_reference.py [--model emoji|tiny] [--repeats 5] [--prompts N] [--report] [--readme]

Both sides run in one process by turns, each repeat from the same weights with nothing encoded yet; literal_spo.py says
what the literal side does. In between, the parts are timed alone: what they and the counts predict is what the measured
ratio is held against. Repeats that are in results/spo_vs_reference.csv with these settings are not run again; --report
only writes tables and plot from the CSV. The scorer is the one that `fastpref train configs/emoji_spm.yaml` leaves.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, ROOT, TABLES, fill, provenance, read_csv, write_csv
from compare import fingerprint
from devices import CPU, add_device, name_of
from spo_bench import Bench, Outcome
from spo_vs_reference_report import SPANS, plot, report, summary

from fastpref.atomic import write_bytes
from fastpref.config import Config, load_config
from fastpref.errors import UserError
from fastpref.models.loading import folder_fingerprint, resolve_device

OUT = RESULTS / "spo_vs_reference.csv"
RECIPE, SCORER = ROOT / "configs" / "emoji_spo.yaml", ROOT / "runs" / "emoji_spm" / "step_preference_model"
LOSS_TOLERANCE = 1e-5
# Files of the public code and what they must hold for its order of work to be the one measured here.
PUBLIC_CODE = {
    "spo_training_and_inference/train_scripts/train_spo.py": ("noise_ref_pred_1", 'DEFINE_config_file(\n    "config"'),
    "spo_training_and_inference/configs/basic_config.py": ("sample.num_sample_each_step", "train.train_batch_size"),
    "spo_training_and_inference/spo/custom_diffusers/multi_sample_pipeline.py": ("preference_model_fn(pred_x0,",),
}


def difference(ours: Outcome, literal: Outcome) -> float:
    """The largest difference of the losses of a round.

    Raises:
        UserError: the two sides did not train on the same pairs, or their losses are apart.
    """
    if ours.pairs != literal.pairs or not torch.allclose(ours.sides, literal.sides, rtol=0, atol=1e-3):
        what = f"void: the two sides keep other pairs, {len(ours.pairs)} and {len(literal.pairs)}"
        raise UserError(what, "spo_vs_reference", "a benchmark of different work says nothing")
    found = max(abs(a - b) for a, b in zip(ours.losses, literal.losses, strict=True))
    if not found <= LOSS_TOLERANCE:
        what = f"void: the losses of the two sides differ by {found:.1e}, more than {LOSS_TOLERANCE:.0e}"
        raise UserError(what, "spo_vs_reference", "a benchmark of different work says nothing")
    return found


def row_of(outcome: Outcome) -> dict[str, Any]:
    """The columns of one side's round."""
    row: dict[str, Any] = {"pairs": len(outcome.pairs), "batches": len(outcome.losses)}
    row |= {f"seconds {phase}": round(value, 5) for phase, value in outcome.seconds.items()}
    row |= {f"seconds in {name}": round(outcome.clock.seconds.get(name, 0.0), 5) for name in SPANS}
    return row | {f"rows {name}": outcome.clock.rows.get(name, 0) for name in SPANS}


def measure(bench: Bench, repeat: int) -> list[dict[str, Any]]:
    """One repeat: the two sides, the one that begins by turns, then the parts."""
    runs = [("ours", bench.ours), ("literal", bench.other)]
    found = {side: run() for side, run in (runs if repeat % 2 else runs[::-1])}
    apart = difference(found["ours"], found["literal"])
    rows = [{"side": side, **row_of(found[side]), "loss difference": apart} for side in ("ours", "literal")]
    return [*rows, {"side": "parts", **{f"ms {name}": round(t, 5) for name, t in bench.time_parts().items()}}]


def compare_sides(config: Config, options: argparse.Namespace, out: Path) -> list[dict[str, Any]]:
    """Run the repeats that are missing, writing the CSV after each; all rows of these settings."""
    settings = f"{fingerprint(config)} {folder_fingerprint(Path(str(config.scorer)))} {options.prompts}"
    device = name_of(resolve_device(config.device))
    settings += "" if device == CPU else f" {device}"
    mark = hashlib.sha256(f"{settings} {torch.get_num_threads()} {torch.__version__}".encode()).hexdigest()[:16]
    rows: list[dict[str, Any]] = [dict(row) for row in read_csv(out) if row["fingerprint"] == mark]
    missing = sorted(set(range(options.repeats)) - {int(row["repeat"]) for row in rows})
    if not missing:
        return rows
    about = {"model": options.model, "prompts": options.prompts, "threads": torch.get_num_threads(), "device": device}
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(config, options.prompts, Path(folder))
        print("warming up", file=sys.stderr)
        measure(bench, 0)
        for repeat in missing:
            print(f"repeat {repeat + 1} of {options.repeats}", file=sys.stderr)
            found = measure(bench, repeat)
            rows += [{"repeat": repeat, **about, **row, "fingerprint": mark, **provenance()} for row in found]
            write_csv(out, rows)
    return rows


def emoji_config(scorer: Path, *overrides: str) -> Config:
    """The recipe with the trained scorer, in the published shape: 20 steps, 16 branched, pools of 4, threshold 0.3.

    Raises:
        UserError: nobody has trained the scorer.
    """
    if not scorer.is_dir():
        train = " && ".join(f"fastpref {command} configs/emoji_spm.yaml" for command in ("prepare", "train"))
        raise UserError("there is no preference model to score with", str(scorer), f"make it with {train}")
    shape = ["sample_steps=20", "plain_steps=4", "timestep_range=null", "candidates=4", "score_threshold=0.3"]
    rest = ["lr_scheduler=constant", f"scorer={scorer}", "tracker=none", "evaluate=false"]
    return load_config(RECIPE, [*shape, *rest, *overrides])


def tiny_config(folder: Path, *overrides: str) -> Config:
    """A random SDXL with a random preference model that knows the timestep, written into ``folder``."""
    from fastpref.emoji.random_models import make_random_clip, make_random_sdxl

    model, clip = make_random_sdxl(folder / "model", vae_factor=2), make_random_clip(folder / "clip")
    settings = [f"model={model}", f"scorer={random_scorer(clip, folder / 'scorer')}", "resolution=16"]
    settings += ["score_threshold=0.05", "learning_rate=1e-3", "tracker=none", "evaluate=false"]
    return load_config("", ["method=spo", *settings, *overrides])


def random_scorer(clip: Path, folder: Path) -> Path:
    """Write a preference model that knows the timestep: the CLIP in ``clip``, all weights moved at random."""
    from fastpref.models.step_preference_file import load_step_preference, resolve_step_preference, save_step_preference

    files = resolve_step_preference(str(clip), None)
    scorer, generator = load_step_preference(files), torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in scorer.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    save_step_preference(scorer, files, folder)
    return folder


def refuse_public_code(folder: Path) -> None:
    """Say what is expected of a checkout of the public code, or that it is not run.

    Raises:
        UserError: always.
    """
    for name, needed in PUBLIC_CODE.items():
        text = (folder / name).read_text() if (folder / name).is_file() else None
        lacking = [piece for piece in needed if text is None or piece not in text]
        if lacking:
            what = "no such file" if text is None else f"it has changed: {lacking[0]!r} is not in it"
            todo = f"expected is a checkout of RockeyCoss/SPO with {', '.join(PUBLIC_CODE)}, started with --config FILE"
            raise UserError(what, str(folder / name), todo)
    what = "the checkout is as expected, but cannot run beside this package: it imports CLIPVisionTransformer, which"
    what += " transformers 5 has not, and pins transformers 4.40, diffusers 0.26 and torch 2.3, older than ours may be"
    raise UserError(what, str(folder), "leave --reference-repo out to measure the literal order of work")


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("emoji", "tiny"), default="emoji", help="tiny: random ones, to try it out")
    parser.add_argument("--scorer", type=Path, default=SCORER, help="folder of the step-aware preference model")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--prompts", type=int, default=16, help="of a round")
    add_device(parser)
    parser.add_argument("--threads", type=int, help="CPU threads; default: torch's choice")
    parser.add_argument("--out", type=Path, help="CSV; tables and plot go beside it")
    parser.add_argument("--report", action="store_true", help="run nothing: tables and plot from the CSV")
    parser.add_argument("--readme", action="store_true", help="also put the table into benchmarks/README.md")
    parser.add_argument("--reference-repo", type=Path, help="checkout of the public code: is it as expected?")
    return parser.parse_args()


def main() -> None:
    """Measure what is missing, report."""
    options = parse()
    out = options.out or (OUT if options.model == "emoji" else ROOT / "runs" / "spo_vs_reference_tiny.csv")
    if options.threads:
        torch.set_num_threads(options.threads)
    try:
        if options.reference_repo is not None:
            refuse_public_code(options.reference_repo)
        if not options.report:
            with tempfile.TemporaryDirectory() as folder:
                tiny = options.model == "tiny"
                chosen = f"device={options.device}"
                config = tiny_config(Path(folder), chosen) if tiny else emoji_config(options.scorer, chosen)
                compare_sides(config, options, out)
        rows = read_csv(out)
        if not rows:
            raise UserError("no rows to report", str(out), "run the comparison first")
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    text = report(rows)
    print(text)
    write_bytes(out.with_suffix(".md"), f"# SPO against the literal order of work\n\n{text}\n".encode())
    plot(rows, out.with_suffix(".png"))
    if options.readme:
        fill(TABLES, "table: spo_vs_reference", summary(rows))


if __name__ == "__main__":
    main()
