"""The faults: (what, file of the package, exact text, text in its place, tests that must fail)."""

from __future__ import annotations

from typing import NamedTuple


class Fault(NamedTuple):
    what: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]  # arguments of pytest, from kernels/tests


def on(module: str, keywords: str) -> tuple[str, ...]:
    """The tests of a module on the kernels, by keyword."""
    return f"test_{module}.py", "-k", f"triton and ({keywords})"


REWARD = on("implicit_reward", "worked_by_hand or parts_match or (test_matches_oracle and float32 and 19)")
SMALL_REWARD = on("implicit_reward", "test_matches_oracle and float32")
STRIDED = on("implicit_reward", "memory_order")
WORKLOADS = ("test_workloads.py", "-k", "test_kernels_equal_eager_float64 and implicit_reward and noise")
NOISE = on("keyed_noise", "test_noise_matches_oracle")
ADD = on("keyed_noise", "test_add_matches_oracle and float32")
DPO = on("dpo_loss", "worked_by_hand or (test_matches_oracle and float32)")
PAIRED = on("paired_preference_loss", "test_matches_oracle and float32")
RPO = on("rpo_loss", "worked_by_hand or (test_contrast_groups and (12 or 36))")
RPO_SIZES = on("rpo_loss", "test_matches_oracle and float32 and 33")
POOL = on("ddim_pool", "worked_by_hand or (test_matches_oracle and float32)")
SPO = on("transition_loss", "worked_by_hand or (test_matches_oracle and float32)")
CLIPPING = on("transition_loss", "test_settings_match_oracle or extreme_ratios")
NORM = on("group_norm_silu", "worked_by_hand or (test_matches_oracle and float32)")
TILES = on("group_norm_silu", "many_tiles")
GEGLU = on("geglu", "test_matches_oracle and float32 or exact_gelu")
LORA = on("lora_linear", "worked_by_hand or (test_matches_oracle and bfloat16)")

FAULTS = [
    # implicit_reward
    Fault(
        "sign of a difference",
        "_reward_kernels.py",
        "(r - p) * ((r - t) + delta)",
        "(p - r) * ((r - t) + delta)",
        REWARD,
    ),
    Fault("a term subtracted", "_reward_kernels.py", "((r - t) + delta)", "((r - t) - delta)", REWARD),
    Fault("error not squared", "_reward_kernels.py", "error += delta * delta", "error += tl.abs(delta)", REWARD),
    Fault(
        "mask one too wide",
        "_reward_kernels.py",
        "mask = (offset < n_elements) & (offset < start + chunk_size)  # not",
        "mask = (offset <= n_elements) & (offset < start + chunk_size)  # not",
        SMALL_REWARD,
    ),
    Fault(
        "chunks overlap",
        "_reward_kernels.py",
        "& (offset < start + chunk_size)  # not a minimum",
        "# not a minimum",
        on("implicit_reward", "parts_match or many_chunks"),
    ),
    Fault("loser is the winner", "_reward_kernels.py", "tl.where(is_winner, row + n_pairs, row)", "row", REWARD),
    Fault(
        "a plane of the partial sums",
        "_reward_kernels.py",
        "tl.store(partial_ptr + plane + program, error)",
        "tl.store(partial_ptr + program, error)",
        REWARD,
    ),
    Fault(
        "second stage drops a chunk",
        "_reward_kernels.py",
        "mask = chunk < n_chunks\n",
        "mask = chunk < tl.maximum(n_chunks - 1, 1)\n",
        on("implicit_reward", "parts_match"),
    ),
    Fault(
        "sign of reference and policy",
        "_reward_kernels.py",
        ".to(tl.float32) - error",
        ".to(tl.float32) + error",
        SMALL_REWARD,
    ),
    Fault("missing factor 2", "_reward_kernels.py", "(-2.0 / tl.cast(n_elements", "(-1.0 / tl.cast(n_elements", REWARD),
    Fault(
        "gradient of the wrong row",
        "_reward_kernels.py",
        "tl.load(grad_ptr + row * grad_stride)",
        "tl.load(grad_ptr)",
        REWARD,
    ),
    Fault("stride of the middle dimension", "_strides.py", "* strides[2]", "* strides[1]", STRIDED),
    Fault(
        "64-bit row offset",
        "_strides.py",
        "start = row * strides[0]",
        "start = (row * strides[0]).to(tl.int32)",
        on("keyed_targets", "two_to_the_31"),
    ),
    # noise
    Fault("a round of Philox less", "_philox.py", "for _ in range(10)", "for _ in range(9)", NOISE),
    Fault("a Philox word", "_philox.py", "high1 ^ c1 ^ k0", "high0 ^ c1 ^ k0", NOISE),
    Fault("high word of the key", "_philox.py", "(key >> 32)", "(key >> 31)", NOISE),
    Fault(
        "sine for cosine",
        "_philox.py",
        "return radius * cosine, radius * sine",
        "return radius * sine, radius * cosine",
        NOISE,
    ),
    Fault("half a turn", "_philox.py", "6.283185307179586, tl.float32", "3.141592653589793, tl.float32", NOISE),
    Fault(
        "noise of the next block",
        "_targets.py",
        "first // 4, BLOCK_SIZE // 4",
        "first // 4 + 1, BLOCK_SIZE // 4",
        WORKLOADS,
    ),
    Fault(
        "scale and sigma swapped",
        "_targets.py",
        "schedule[1] * noise - schedule[2] * x0",
        "schedule[2] * noise - schedule[1] * x0",
        ("test_workloads.py", "-k", "test_kernels_equal_eager_float64 and velocity"),
    ),
    Fault("noise without its scale", "keyed_noise.py", "x_t += sigma * _normals", "x_t += _normals", ADD),
    Fault("noise in the gradient", "keyed_noise.py", "if not BACKWARD:", "if True:", ADD),
    Fault(
        "int32 rows of the noise",
        "keyed_noise.py",
        "out_ptr + row * n_elements + offset, noise",
        "out_ptr + (row * n_elements).to(tl.int32) + offset, noise",
        ("test_offsets.py", "-k", "test_noise"),
    ),
    Fault(
        "int32 rows of x_t",
        "keyed_noise.py",
        "out_ptr + row * n_elements + offset, x_t",
        "out_ptr + (row * n_elements).to(tl.int32) + offset, x_t",
        ("test_offsets.py", "-k", "test_added_noise"),
    ),
    # losses
    Fault(
        "winner and loser swapped",
        "_pairwise_kernels.py",
        "u = (w - l) * (0.5 * beta)",
        "u = (l - w) * (0.5 * beta)",
        DPO,
    ),
    Fault("a tie counts as lost", "_pairwise_kernels.py", "tl.where(w == l, 0.5, 0.0)", "0.0", DPO),
    Fault("beta without its half", "_pairwise_kernels.py", "scale = 0.5 * beta /", "scale = beta /", DPO),
    Fault(
        "label smoothing forgotten",
        "_pairwise_kernels.py",
        "term = -(1.0 - label_smoothing) * kept",
        "term = -kept",
        DPO,
    ),
    Fault(
        "chunks of the wrong row",
        "_pairwise_kernels.py",
        "row.to(tl.int64)[:, None] * reward[1]",
        "(0 * row).to(tl.int64)[:, None] * reward[1]",
        PAIRED,
    ),
    Fault(
        "chunks of a row dropped",
        "_pairwise_kernels.py",
        "for first in range(0, reward[2], BLOCK_CHUNKS):",
        "for first in range(0, BLOCK_CHUNKS, BLOCK_CHUNKS):",
        ("test_workloads.py", "-k", "test_kernels_equal_eager_float64 and paired"),
    ),
    Fault(
        "epsilon of the norm",
        "_rpo_kernels.py",
        "tl.sqrt(tl.sum(total, axis=0)), 1e-12)",
        "tl.sqrt(tl.sum(total, axis=0)), 1.0)",
        on("rpo_loss", "test_matches_oracle and float32 and 7"),
    ),
    Fault(
        "columns beyond the group",
        "_rpo_kernels.py",
        "tl.where(mask_j[None, :], cosine * norm_w",
        "tl.where(mask_j[None, :] | True, cosine * norm_w",
        RPO_SIZES,
    ),
    Fault("older sums not rescaled", "_rpo_kernels.py", "loss = factor * loss", "loss = loss", RPO),
    Fault(
        "online softmax rescaled the wrong way",
        "_rpo_kernels.py",
        "tl.where(total > 0.0, maximum - higher, 0.0)",
        "tl.where(total > 0.0, higher - maximum, 0.0)",
        RPO,
    ),
    Fault("entropy without its shift", "_rpo_kernels.py", "(moment + shift * total)", "moment", RPO),
    Fault(
        "group of the losers",
        "_rpo_kernels.py",
        "j = _clamped(group, local_j, columns)\n        l = rewards_of",
        "j = _clamped(0, local_j, columns)\n        l = rewards_of",
        RPO,
    ),
    Fault(
        "slope of the columns",
        "_rpo_kernels.py",
        "if INSIDE:\n            u = omega * u\n",
        "if not INSIDE:\n            u = omega * u\n",
        RPO,
    ),
    Fault("softmax sum not applied", "_rpo_kernels.py", "            loss = loss / total\n", "", RPO),
    # steps
    Fault("missing square of eta", "_ddim.py", "variance = eta * eta *", "variance = eta *", POOL),
    Fault("wrong abar", "_ddim.py", "(gap / abar_prev)", "(gap / abar)", POOL),
    Fault(
        "guidance the wrong way",
        "_ddim_pool_kernels.py",
        "pred = uncond + guidance_scale * (pred - uncond)",
        "pred = pred + guidance_scale * (uncond - pred)",
        POOL,
    ),
    Fault(
        "candidates share a key",
        "_ddim_pool_kernels.py",
        "tl.load(keys_ptr + candidate)",
        "tl.load(keys_ptr + row * n_candidates)",
        POOL,
    ),
    Fault(
        "gradient of the unconditional branch",
        "_ddim_pool_kernels.py",
        "(1.0 - guidance_scale) * grad_pred",
        "guidance_scale * grad_pred",
        POOL,
    ),
    Fault(
        "32-bit row",
        "_ddim_pool_kernels.py",
        "candidate * n_elements + offset",
        "(candidate * n_elements).to(tl.int32) + offset",
        ("test_offsets.py",),
    ),
    Fault(
        "winner's state for the loser",
        "_transition_kernels.py",
        "shift * (2.0 * (x_l - x - move) + shift)",
        "shift * (2.0 * (x_w - x - move) + shift)",
        SPO,
    ),
    Fault(
        "square of the shift dropped", "_transition_kernels.py", "(x_w - x - move) + shift)", "(x_w - x - move))", SPO
    ),
    Fault(
        "half of the likelihood",
        "_transition_kernels.py",
        "scale = 0.5 / (sigma * sigma)",
        "scale = 1.0 / (sigma * sigma)",
        SPO,
    ),
    Fault("gradient where clipped", "_transition_kernels.py", "tl.where(out_w, 0.0, -slope)", "-slope", CLIPPING),
    Fault("losers' partial sums", "_transition_kernels.py", "(n_pairs + loser) * n_chunks", "loser * n_chunks", SPO),
    # layers
    Fault("eps outside the root", "_group_norm_silu_kernels.py", "/ total + eps))", "/ total) + eps)", NORM),
    Fault(
        "merge without the means' distance",
        "_group_norm_silu_kernels.py",
        "+ delta * delta * (seen * share)",
        "",
        TILES,
    ),
    Fault(
        "silu's slope",
        "_group_norm_silu_kernels.py",
        "(1.0 + z * (1.0 - sigmoid))",
        "(1.0 - z * (1.0 - sigmoid))",
        NORM,
    ),
    Fault(
        "channel's group",
        "_group_norm_silu_kernels.py",
        "num_groups)\n    mean = _by_channel(mean_ptr, group, channel, n_channels)\n    scale = _by_channel(rstd",
        "num_groups) // 2\n    mean = _by_channel(mean_ptr, group, channel, n_channels)\n    scale = _by_channel(rstd",
        NORM,
    ),
    Fault(
        "value and gate swapped",
        "geglu.py",
        "(value * (gate * phi)).to(out_ptr",
        "(gate * (value * phi * phi)).to(out_ptr",
        GEGLU,
    ),
    Fault("density without the gate", "geglu.py", "(phi + gate * density)", "(phi + density)", GEGLU),
    Fault("gate's column", "geglu.py", "tl.store(place + n_columns,", "tl.store(place + n_columns - 1,", GEGLU),
    Fault("rank not masked", "lora_linear.py", "mask_r = r < rank", "mask_r = r < rank + 1", LORA),
    Fault(
        "bias on every block",
        "lora_linear.py",
        "bias_ptr + column, mask=mask_n",
        "bias_ptr + column * 0, mask=mask_n",
        LORA,
    ),
]
