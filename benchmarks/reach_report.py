"""Table and plot of benchmarks/reach.py: what each arm spent until its pictures passed the bar."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from common import markdown
from compare_report import interval

BASE = "base"
UNET = ("policy_rows", "reference_rows", "rollout_rows", "backward_rows")
KEPT = 0.9  # of the base's retrieval
Rows = Sequence[dict[str, Any]]


def passes(row: dict[str, Any], bar: float) -> bool:
    """Whether a checkpoint is at the bar: on the few prompts and, confirmed, on all."""
    shares = [row.get(f"{name}_share", "") for name in ("look", "confirmed")]
    return all(share not in ("", None) and float(share) >= bar for share in shares)


def number(row: dict[str, Any], name: str) -> float:
    """A cell; an empty one is 0."""
    return float(row.get(name) or 0)


def curve(rows: Rows, arm: str, seed: int) -> list[dict[str, Any]]:
    """An arm's checkpoints in order."""
    own = [row for row in rows if row["arm"] == arm and int(row["seed"]) == seed]
    return sorted(own, key=lambda row: int(row["step"]))


def seeds_of(rows: Rows, arm: str) -> list[int]:
    return sorted({int(row["seed"]) for row in rows if row["arm"] == arm})


def reward_model(plan: dict[str, Any], rows: Rows, arm: str, seed: int) -> dict[str, float]:
    """UNet rows and seconds of training the arm's reward model; a latent one's rows, of half a UNet, count in full."""
    found = curve(rows, plan["arms"][arm].get("scorer", ""), seed)
    names = ("frozen_rows", "latent_reward_rows", "backward_rows")
    spent = found[-1] if found else {}
    return {"rows": sum(number(spent, name) for name in names), "seconds": number(spent, "seconds")}


def total_rows(plan: dict[str, Any], rows: Rows, arm: str, row: dict[str, Any]) -> float:
    """UNet rows up to a checkpoint, the reward model's training included."""
    own = sum(number(row, name) for name in (*UNET, "latent_reward_rows"))
    return own + reward_model(plan, rows, arm, int(row["seed"]))["rows"]


def total_seconds(plan: dict[str, Any], rows: Rows, arm: str, row: dict[str, Any]) -> float:
    """Seconds up to a checkpoint, the reward model's training included."""
    return number(row, "seconds") + reward_model(plan, rows, arm, int(row["seed"]))["seconds"]


def budget(rows: Rows, arm: str) -> int:
    """Optimizer steps that the arm was given at most."""
    return max(int(number(row, "budget")) for row in rows if row["arm"] == arm)


def first_at(rows: Rows, arm: str, bar: float) -> list[dict[str, Any]]:
    """Of each seed that reached the bar the first checkpoint there."""
    found = (next((row for row in curve(rows, arm, seed) if passes(row, bar)), None) for seed in seeds_of(rows, arm))
    return [row for row in found if row is not None]


def kept(rows: Rows, row: dict[str, Any]) -> float:
    """The share of the base's retrieval that a confirmed checkpoint still has."""
    return number(row, "confirmed_top5") / number(next(r for r in rows if r["arm"] == BASE), "confirmed_top5")


def reach_table(plan: dict[str, Any], rows: Rows) -> str:
    """One line an arm: mean and 95 % interval over the seeds that reached the bar."""
    bar, lines = float(plan["bar"]), []
    for arm, about in plan["arms"].items():
        seeds, there = seeds_of(rows, arm), first_at(rows, arm, bar)
        if not seeds:
            continue
        count = f"{len(there)} of {len(seeds)}"
        if not there:
            best = max(number(row, "look_share") for row in rows if row["arm"] == arm)
            lines.append([about["label"], count, f"not in {budget(rows, arm)} steps (best {best:.2f})", *["–"] * 8])
            continue

        def cell(values: Sequence[float], digits: int = 0) -> str:
            return interval(list(values)).text(digits)

        models = [reward_model(plan, rows, arm, int(row["seed"])) for row in there]
        lines.append(
            [
                about["label"],
                count,
                cell([number(row, "step") for row in there]),
                " / ".join(f"{mean(number(row, name) for row in there):.0f}" for name in UNET),
                cell([number(row, "latent_reward_rows") for row in there]),
                cell([model["rows"] for model in models]),
                cell([total_rows(plan, rows, arm, row) for row in there]),
                cell([number(row, "seconds") for row in there]),
                cell([model["seconds"] for model in models]),
                cell([total_seconds(plan, rows, arm, row) for row in there]),
                cell([kept(rows, row) for row in there], 2),
            ]
        )
    head = ["arm", "seeds there", "steps", "UNet rows: policy / reference / rollout / backward", "latent reward rows"]
    head += ["reward model's rows", "all rows", "s", "reward model's s", "all s", "retrieval, of the base's"]
    return markdown(head, lines)


def against_dpo(plan: dict[str, Any], rows: Rows) -> str:
    """How SPO stands to DPO, the reward model counted and not."""
    bar = float(plan["bar"])
    spo, dpo = (first_at(rows, arm, bar) for arm in ("spo", "dpo"))
    if not spo or not dpo:
        return ""

    def ratio(total: Any) -> float:
        return mean(total(plan, rows, "spo", row) for row in spo) / mean(total(plan, rows, "dpo", row) for row in dpo)

    own = mean(number(row, "seconds") for row in spo) / mean(number(row, "seconds") for row in dpo)
    return (
        f"To a share of {bar} SPO takes {ratio(total_rows):.3g} times the UNet rows of DPO and "
        f"{ratio(total_seconds):.3g} times its seconds, its preference model's training counted ({own:.3g} times the "
        "seconds without it). Its paper claims to be 20 times faster than DPO."
    )


def verdict(plan: dict[str, Any], rows: Rows) -> str:
    """Whether the arms that go beyond the bar get there within their budget with their content kept."""
    lines = []
    for arm, about in plan["arms"].items():
        seeds = seeds_of(rows, arm)
        if "until" not in about or not seeds:
            continue
        bar, there = float(about["until"]), first_at(rows, arm, float(about["until"]))
        text = (
            f"{about['label']}: a share of {bar} in {len(there)} of {len(seeds)} seeds within {budget(rows, arm)} steps"
        )
        if there:
            content = [kept(rows, row) for row in there]
            steps = interval([number(row, "step") for row in there]).text(0)
            spent = interval([total_seconds(plan, rows, arm, row) for row in there]).text(0)
            shares = interval([number(row, "confirmed_share") for row in there]).text()
            text += f", after {steps} steps and {spent} s in all (share {shares}); retrieval "
            text += f"{mean(content):.2f} of the base's (least {min(content):.2f}, needed {KEPT})"
            met = len(there) == len(seeds) and mean(content) >= KEPT
            text += ": met" if met else ": missed"
        lines.append(f"{text}." if there else f"{text}: missed.")
    return "\n".join(lines)


def report(plan: dict[str, Any], rows: Rows) -> str:
    """Everything, as Markdown."""
    base = next((row for row in rows if row["arm"] == BASE), None)
    if base is None:
        return "The base was not measured."
    share, top5 = number(base, "confirmed_share"), number(base, "confirmed_top5")
    head = f"Before training: line-art share {share:.2f}, prompt found in top 5 {top5:.2f}."
    parts = [head, reach_table(plan, rows), against_dpo(plan, rows), verdict(plan, rows)]
    return "\n\n".join(part for part in parts if part)


def mean_curve(plan: dict[str, Any], rows: Rows, arm: str, total: Any) -> tuple[list[float], list[float]]:
    """(mean of ``total``, mean share) at the steps that every seed has."""
    curves = [curve(rows, arm, seed) for seed in seeds_of(rows, arm)]
    steps = sorted(set.intersection(*({int(row["step"]) for row in points} for points in curves)))
    at = [[row for points in curves for row in points if int(row["step"]) == step] for step in steps]
    x = [mean(total(plan, rows, arm, row) for row in found) for found in at]
    return x, [mean(number(row, "look_share") for row in found) for found in at]


def plot(plan: dict[str, Any], rows: Rows, path: Path) -> None:
    """Share against UNet rows and against seconds: a line an arm, thin ones for its seeds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4), sharey=True)
    panels = (total_rows, "UNet rows, the reward model's training included"), (total_seconds, "seconds, likewise")
    for axis, (total, label) in zip(axes, panels, strict=True):
        for place, (arm, about) in enumerate(plan["arms"].items()):
            seeds = seeds_of(rows, arm)
            for seed in seeds:
                points = curve(rows, arm, seed)
                x = [total(plan, rows, arm, row) for row in points]
                axis.plot(x, [number(row, "look_share") for row in points], color=f"C{place}", linewidth=0.6, alpha=0.6)
            if seeds:
                x, shares = mean_curve(plan, rows, arm, total)
                axis.plot(x, shares, color=f"C{place}", linewidth=2, marker="o", markersize=3, label=about["label"])
        axis.axhline(float(plan["bar"]), color="grey", linestyle="--", linewidth=1)
        axis.set_xscale("log")
        axis.set_xlabel(label)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("line-art share")
    axes[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)
