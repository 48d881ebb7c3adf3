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
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import torch
from common import RESULTS, ROOT, fill, provenance, read_csv, write_csv
from compare import fingerprint
from literal_spo import Clock, LiteralSPO, as_prompts
from spo_vs_reference_report import PHASES, ROLLOUT, SCORING, SPANS, TRAINING, plot, report, summary

import fastpref.rollout.pool as pool
from fastpref.atomic import write_bytes
from fastpref.config import Config, load_config
from fastpref.errors import UserError
from fastpref.models.guidance import GuidedRows
from fastpref.models.loading import folder_fingerprint, resolve_model_dir
from fastpref.models.work import Work
from fastpref.rollout.step_scorers import PreferenceScorer
from fastpref.train.engine import LocalEngine
from fastpref.train.stepwise import open_trainer
from fastpref.watch import Watch

OUT = RESULTS / "spo_vs_reference.csv"
RECIPE, SCORER = ROOT / "configs" / "emoji_spo.yaml", ROOT / "runs" / "emoji_spm" / "step_preference_model"
LOSS_TOLERANCE = 1e-5
# Files of the public code and what they must hold for its order of work to be the one measured here.
PUBLIC_CODE = {
    "spo_training_and_inference/train_scripts/train_spo.py": ("noise_ref_pred_1", 'DEFINE_config_file(\n    "config"'),
    "spo_training_and_inference/configs/basic_config.py": ("sample.num_sample_each_step", "train.train_batch_size"),
    "spo_training_and_inference/spo/custom_diffusers/multi_sample_pipeline.py": ("preference_model_fn(pred_x0,",),
}


@dataclass
class Outcome:
    """What one side's round came to."""

    seconds: dict[str, float]  # by phase, and total
    clock: Clock
    losses: list[float]
    pairs: list[tuple[int, int]]  # (place of the prompt, step)
    sides: torch.Tensor  # (2, M, C, h, w): winners and losers


class Bench:
    """Both sides on the same models.

    Args:
        std: of what is added to the LoRA's weights before the first step; 0 is where a run starts.
    """

    def __init__(self, config: Config, prompts: int, folder: Path, std: float = 0.0) -> None:
        self.config = config.model_copy(update={"rollout_prompts": prompts})
        self.trainer = open_trainer(self.config, resolve_model_dir(config.model), torch.device("cpu"))
        trainable = list(self.trainer.policy.trainable.values())
        generator = torch.Generator().manual_seed(config.seed)
        with torch.no_grad():
            for parameter in trainable:
                parameter.add_(std * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
        self.weights = [parameter.detach().clone() for parameter in trainable]
        self.trainer.begin(folder, Watch())
        self.literal = LiteralSPO(self.trainer)
        plan = self.trainer.order.batch(0)
        self.numbers, self.epoch = [int(i) for i in plan.indices], plan.epoch
        self.prompts = [self.trainer.prompts[i] for i in self.numbers]

    def ours(self) -> Outcome:
        """A round as ``fastpref train`` does it."""
        trainer, clock, lines = self._fresh(), Clock(), []
        with watched(trainer, clock):
            began = time.perf_counter()
            while not lines or trainer.position < len(trainer.batches):
                lines.append(trainer.step(len(lines)))
            total = time.perf_counter() - began
        seconds = {phase: trainer.totals[f"seconds_{phase}"] for phase in PHASES} | {"total": total}
        found, place = trainer.transitions, {number: i for i, number in enumerate(self.numbers)}
        assert found is not None
        pairs = [(place[int(n)], int(step)) for n, step in zip(found.prompt, found.step, strict=True)]
        return Outcome(seconds, clock, [line["loss"] for line in lines], pairs, torch.stack([found.x_w, found.x_l]))

    def other(self) -> Outcome:
        """The same round by the literal order of work, in the batches that ours splits it into."""
        self.literal.start(self.weights)
        self.trainer.round = 0  # whose shuffling it is
        began = time.perf_counter()
        found = self.literal.round(self.prompts, self.epoch)
        rolled = time.perf_counter()
        lines = self.literal.train(found, self.trainer._split(len(found)))
        ended, clock = time.perf_counter(), self.literal.clock
        scoring = sum(clock.seconds[name] for name, (phase, *_) in SPANS.items() if phase == SCORING)
        seconds = {ROLLOUT: rolled - began - scoring, SCORING: scoring, TRAINING: ended - rolled}
        pairs = list(zip(found.prompt.tolist(), found.step.tolist(), strict=True))
        sides = torch.stack([found.x_w, found.x_l])
        return Outcome(seconds | {"total": ended - began}, clock, [line["loss"] for line in lines], pairs, sides)

    def _fresh(self) -> Any:
        """The trainer as at the start of a run."""
        trainer, scorer = self.trainer, self.trainer.collector.scorer
        assert isinstance(scorer, PreferenceScorer)
        with torch.no_grad():
            for parameter, weight in zip(trainer.policy.trainable.values(), self.weights, strict=True):
                parameter.copy_(weight)
        trainer.engine = LocalEngine(trainer.policy, self.config)
        trainer.load_state({}, {"round": -1, "position": 0, "totals": {}, "seconds": 0.0})
        trainer.restore_work(Work())
        trainer.collector.book._known.clear()
        scorer._known.clear()
        return trainer

    def parts(self) -> dict[str, tuple[int, Callable[[], Any]]]:
        """What is timed alone: rows of a call, and the call, at the sizes that the round has."""
        ours, literal, config = self.trainer, self.literal, self.config
        scorer, book, policy = ours.collector.scorer, ours.collector.book, ours.policy
        assert isinstance(scorer, PreferenceScorer)
        n, k, m = min(config.rollout_batch_size, len(self.prompts)), config.candidates, config.batch_size
        pool_rows, chunk = n * k, min(config.decode_batch_size, n * k)
        x = torch.randn(max(pool_rows, m), *ours.collector.shape, dtype=ours.collector.dtype)
        t = torch.full((len(x),), ours.collector.sampler.score_timesteps[0])
        texts = [self.prompts[i % len(self.prompts)] for i in range(len(x))]
        known = book.conditioning(texts)
        prompts = as_prompts(known.prompt_embeds, known.pooled_prompt_embeds)
        images, tokens, few = literal.decode(x), literal.tokens(texts), texts[: max(1, chunk // k)]

        def rows(predict: Any, count: int) -> Callable[[], Any]:
            guided = GuidedRows(predict, book.conditioning(texts[:count]), book.empty(), config.guidance_scale)
            return lambda: guided(x[:count], t[:count])

        def theirs(unet: Any, count: int) -> Callable[[], Any]:
            return lambda: literal.guided(unet, x[:count], t[:count], prompts.rows(torch.arange(count)))

        def both(forward: Callable[[], Any] = rows(policy.predict, m)) -> None:  # noqa: B008
            with torch.enable_grad():
                torch.stack([branch.square().mean() for branch in forward()]).sum().backward()
            ours.engine.discard()

        return {
            "UNet, LoRA beside": (2 * pool_rows, theirs(literal.policy, pool_rows)),
            "UNet, LoRA merged": (2 * pool_rows, rows(policy.predict, pool_rows)),
            "UNet forward + backward": (2 * m, both),
            "reference, full copy": (2 * m, theirs(literal.reference, m)),
            "reference, LoRA off": (2 * m, rows(policy.predict_reference, m)),
            "VAE decode, a step's candidates": (pool_rows, lambda: literal.decode(x[:pool_rows])),
            "VAE decode, in chunks": (chunk, lambda: scorer.decoder.images(x[:chunk])),
            "SPM image, unfolded": (pool_rows, lambda: literal.scorer.embed_images(images[:pool_rows], t[:pool_rows])),
            "SPM image, folded": (chunk, lambda: scorer.model.embed_images(images[:chunk], t[:chunk])),
            "SPM text, each candidate": (pool_rows, lambda: literal.captions(tokens[:pool_rows])),
            "SPM text, each prompt": (len(few), lambda: scorer.model.embed_texts(few)),
            "text encoders, a batch": (n, lambda: book.texts.encode(texts[:n])),
            "text encoders, one prompt": (1, lambda: book.texts.encode(texts[:1])),
        }

    @torch.no_grad()
    def time_parts(self, calls: int = 3) -> dict[str, float]:
        """Milliseconds a row of each part, the median of ``calls``."""
        found = {}
        for name, (rows, call) in self.parts().items():
            with self.trainer.policy.merged() if name == "UNet, LoRA merged" else ExitStack():
                call()
                times = []
                for _ in range(calls):
                    began = time.perf_counter()
                    call()
                    times.append(time.perf_counter() - began)
            found[name] = 1000 * median(times) / rows
        return found


@contextmanager
def watched(trainer: Any, clock: Clock) -> Iterator[None]:
    """Inside, the trainer's parts book their time and rows."""
    collector = trainer.collector

    def length(*args: Any) -> int:
        return len(args[0])

    def unet(*_: Any) -> str:
        return "policy forward" if torch.is_grad_enabled() else "UNet of the rollout"

    parts: list[tuple[Any, str, Any, Any]] = [
        (trainer.policy, "predict", unet, length),
        (trainer.policy, "predict_reference", "reference forward", length),
        (trainer.policy, "count_backward", "rows of the backward", lambda rows: rows),
        (trainer.engine, "backward", "backward", None),
        (trainer.objective, "_compare", "loss", None),
        (trainer, "update", "optimizer", None),
        (collector.scorer.decoder, "images", "VAE decode", length),
        (collector.scorer.model, "embed_images", "preference model, image", length),
        (collector.scorer.model, "embed_texts", "preference model, text", length),
        (collector.book.texts, "encode", "text encoders", length),
        (pool, "ddim_pool_step", "noise and steps", None),
        (pool, "predict_x0", "noise and steps", None),
    ]
    with ExitStack() as stack:
        for owner, name, label, rows in parts:
            stack.enter_context(mock.patch.object(owner, name, timed(getattr(owner, name), clock, label, rows)))
        yield
    clock.rows["backward"] = clock.rows.pop("rows of the backward")


def timed(plain: Any, clock: Clock, label: Any, rows: Any) -> Any:
    """``plain``, booked under ``label`` (or what it returns for the arguments) with ``rows`` of the arguments."""

    def call(*args: Any, **kwargs: Any) -> Any:
        with clock.span(label(*args) if callable(label) else label, rows(*args) if rows else 0):
            return plain(*args, **kwargs)

    return call


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
    mark = hashlib.sha256(f"{settings} {torch.get_num_threads()} {torch.__version__}".encode()).hexdigest()[:16]
    rows: list[dict[str, Any]] = [dict(row) for row in read_csv(out) if row["fingerprint"] == mark]
    missing = sorted(set(range(options.repeats)) - {int(row["repeat"]) for row in rows})
    if not missing:
        return rows
    about = {"model": options.model, "prompts": options.prompts, "threads": torch.get_num_threads()}
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


def emoji_config(scorer: Path) -> Config:
    """The recipe with the trained scorer, in the published shape: 20 steps, 16 of them branched, pools of 4."""
    shape = ["sample_steps=20", "plain_steps=4", "timestep_range=null", "candidates=4", "lr_scheduler=constant"]
    return load_config(RECIPE, [*shape, f"scorer={scorer}", "tracker=none", "evaluate=false"])


def tiny_config(folder: Path, *overrides: str) -> Config:
    """A random SDXL with a random preference model that knows the timestep, written into ``folder``."""
    from fastpref.emoji.random_models import make_random_clip, make_random_sdxl
    from fastpref.models.step_preference_file import load_step_preference, resolve_step_preference, save_step_preference

    model, clip = make_random_sdxl(folder / "model", vae_factor=2), make_random_clip(folder / "clip")
    files = resolve_step_preference(str(clip), None)
    scorer, generator = load_step_preference(files), torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in scorer.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    save_step_preference(scorer, files, folder / "scorer")
    settings = [f"model={model}", f"scorer={folder / 'scorer'}", "resolution=16", "score_threshold=0.05"]
    return load_config(
        "", ["method=spo", *settings, "learning_rate=1e-3", "tracker=none", "evaluate=false", *overrides]
    )


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
    what = "the checkout is as expected, but this benchmark does not run it: its dependencies need a GPU build of torch"
    raise UserError(what, str(folder), "leave --reference-repo out to measure the literal order of work")


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("emoji", "tiny"), default="emoji", help="tiny: random ones, to try it out")
    parser.add_argument("--scorer", type=Path, default=SCORER, help="folder of the step-aware preference model")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--prompts", type=int, default=16, help="of a round")
    parser.add_argument("--threads", type=int, help="CPU threads; default: torch's choice")
    parser.add_argument("--out", type=Path, help="CSV; tables and plot go beside it")
    parser.add_argument("--report", action="store_true", help="run nothing: tables and plot from the CSV")
    parser.add_argument("--readme", action="store_true", help="also put the table into README.md")
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
                config = tiny_config(Path(folder)) if tiny else emoji_config(options.scorer)
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
        fill(ROOT / "README.md", "table: spo_vs_reference", summary(rows))


if __name__ == "__main__":
    main()
