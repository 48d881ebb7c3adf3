"""A plan for a terminal."""

from __future__ import annotations

from rich.console import Group
from rich.table import Table

from fastpref.config_rules import STEPWISE_METHODS
from fastpref.plan.devices import device_bytes
from fastpref.plan.memory import RESERVE, fits
from fastpref.plan.report import Plan


def render(plan: Plan) -> Group:
    """The plan for a terminal."""
    config, count, batch, limit = plan.config, plan.count, plan.batch, device_bytes(plan.device)
    table = Table("GB per GPU", *(_stage(memory.stage) for memory in plan.memories))
    for part in ("weights", "gradients", "optimizer", "activations", "buffers", "total"):
        table.add_row(part, *(f"{getattr(memory, part) / 1e9:.2f}" for memory in plan.memories))
    table.add_row("fits", *("yes" if fits(plan.peak(memory), limit) else "no" for memory in plan.memories))
    table.add_row("sent per step", *(f"{sent / 1e9:.2f}" for sent in plan.traffic))
    unit = "transitions" if config.method in STEPWISE_METHODS else "pairs"
    arithmetic = f"{batch.pairs} {unit} = {plan.gpus} GPUs x {batch.rounds} x {batch.micro} per forward"
    if batch.micro * batch.rounds * plan.gpus != batch.pairs:
        arithmetic += ", the last ones smaller"
    lines = [
        f"{config.method}, {count.trained_values:,} trained values of {count.trained / 1e9:.2f} GB, "
        f"{count.frozen / 1e9:.2f} GB frozen; {plan.device} has {limit / 1e9:.0f} GB, {RESERVE:.0%} of it kept free",
        f"batch: {arithmetic}",
        f"gradient_checkpointing: {_modes(plan)}",
        f"work: {plan.flops / 1e12:.2f} TFLOP a step" + _rollout(plan),
        f"store: {plan.store}",
    ]
    lines += [f"{name}: {_of(need.total, need.weights, 'models')}" for name, need in plan.preparing.items()]
    if plan.scoring is not None:
        whole = plan.scoring_total(plan.best)
        lines.append(f"scoring: {_of(whole, whole - plan.scoring.activations, 'there in training too')}")
    if plan.not_counted:
        lines.append(f"not counted: {', '.join(plan.not_counted)}")
    verdict = "fits" if not plan.nearest else f"does not fit; nearest that does: {plan.nearest}"
    return Group(table, *lines, verdict)


def _modes(plan: Plan) -> str:
    needs = ", ".join(f"{mode} {need / 1e9:.2f} GB" for mode, need in plan.by_mode.items())
    return f"{needs}; {'auto takes' if plan.config.gradient_checkpointing == 'auto' else 'here'} {plan.mode}"


def _of(total: int, part: int, what: str) -> str:
    return f"{total / 1e9:.2f} GB, of which {part / 1e9:.2f} {what}"


def _rollout(plan: Plan) -> str:
    found = plan.count.rollout_flops
    return f", {found / 1e12:.2f} TFLOP a UNet call over the candidates of a rollout batch" if found else ""


def _stage(stage: int) -> str:
    return "one process" if stage == 0 else f"ZeRO-{stage}"
