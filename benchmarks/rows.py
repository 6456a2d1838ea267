# SPDX-License-Identifier: Apache-2.0
"""The sides, and the rows of the table with their goals."""

from benchmarks.figures import LIMIT, Row
from benchmarks.sides import Side

PEERS = "benchmarks.peers."
T5X = PEERS + "t5x"

# Groups run one after the other, the sides of a group in turns. A ratio has both its
# sides in one group.
GROUPS: dict[str, tuple[Side, ...]] = {
    "peaks": (
        Side("peaks.jax", "benchmarks.peaks", "jax"),
        Side("peaks.torch", "benchmarks.peaks", "torch", "trl"),
    ),
    "step": (
        Side("ours.step", "benchmarks.ours_step", "one"),
        Side("ours.step_three", "benchmarks.ours_step", "three"),
        Side("ours.step_pairwise", "benchmarks.ours_step", "pairwise"),
        Side("trl.shipped", PEERS + "trl_step", "shipped", "trl"),
        Side("trl.cached", PEERS + "trl_step", "cached", "trl"),
        Side("trl.repaired", PEERS + "trl_step", "repaired", "trl"),
        Side("trl.compiled", PEERS + "trl_step", "compiled", "trl"),
        Side("tunix.step", PEERS + "tunix_sides", "step", "tunix"),
        Side("easydel.step", PEERS + "easydel_sides", "step", "easydel"),
    ),
    "decode": (
        Side("ours.decode", "benchmarks.ours_decode", "plain"),
        Side("transformers.decode", PEERS + "torch_decode", "shipped", "trl"),
        Side("transformers.decode_best", PEERS + "torch_decode", "best", "trl"),
        Side("tunix.decode", PEERS + "tunix_sides", "decode", "tunix"),
        Side("easydel.decode", PEERS + "easydel_sides", "decode", "easydel"),
    ),
    "kinds": (Side("ours.kinds", "benchmarks.ours_decode", "kinds"),),
    "t5_decode": (
        Side("ours.t5_decode", "benchmarks.ours_decode", "t5"),
        Side("transformers.t5_decode", PEERS + "torch_decode", "t5", "trl"),
        Side("transformers.t5_decode_best", PEERS + "torch_decode", "t5_best", "trl"),
        Side("t5x.decode", T5X, "decode", "t5x"),
    ),
    "training": (
        Side("ours.reward", "benchmarks.ours_training", "reward"),
        Side("ours.preference", "benchmarks.ours_training", "preference"),
        Side("ours.language", "benchmarks.ours_training", "language"),
        Side("torch.reward", PEERS + "torch_training", "reward", "trl"),
        Side("torch.reward_best", PEERS + "torch_training", "reward_best", "trl"),
        Side("torch.language", PEERS + "torch_training", "language", "trl"),
        Side("torch.language_best", PEERS + "torch_training", "language_best", "trl"),
    ),
    "t5_training": (
        Side("ours.t5_training", "benchmarks.ours_training", "t5"),
        Side("torch.t5_training", PEERS + "torch_training", "t5", "trl"),
        Side("torch.t5_training_best", PEERS + "torch_training", "t5_best", "trl"),
        Side("t5x.training", T5X, "training", "t5x"),
    ),
    "compile": (Side("ours.compile", "benchmarks.ours_compile", "step"),),
}


def _peer(name: str, above: str, below: str = "ours.step", **goals: float) -> Row:
    return Row(name, above, below, goals)


def _at_most(name: str, above: str, below: str, goal: float, scale: float = 1.0):
    sizes = ("small", "wide", "long")
    return Row(name, above, below, dict.fromkeys(sizes, goal), False, scale)


# A peer as shipped has the goal of the first release; tuned as far as it goes it should
# not be ahead of us.
ROWS = (
    _peer("Nash-MD step, TRL as shipped", "trl.shipped", small=15, tiny=8, long=40),
    _peer(
        "Nash-MD step, TRL with its cache on (wrong)", "trl.cached", small=1.5, tiny=5
    ),
    _peer("Nash-MD step, TRL repaired", "trl.repaired", small=1.5),
    _peer("Nash-MD step, TRL repaired and compiled", "trl.compiled", small=1.5),
    _peer("Nash-MD step, EasyDeL (does less)", "easydel.step", small=2, tiny=40),
    _peer("Nash-MD step, Tunix GRPO-2 (other work)", "tunix.step", small=1.5),
    _peer(
        "generate, TRL with its cache on (wrong)",
        "trl.cached/generate",
        "ours.step_three/generate",
        small=2.3,
    ),
    _peer(
        "generate, TRL repaired",
        "trl.repaired/generate",
        "ours.step_three/generate",
        small=2.3,
    ),
    Row("our step, three programs / one", "ours.step_three", "ours.step"),
    Row("our step, pairwise judge / reward", "ours.step_pairwise", "ours.step"),
    _peer("decode, Tunix", "tunix.decode", "ours.decode", small=1.8),
    _peer("decode, EasyDeL", "easydel.decode", "ours.decode", small=1),
    _peer(
        "decode, transformers as shipped",
        "transformers.decode",
        "ours.decode",
        small=3.5,
        wide=2.2,
    ),
    _peer(
        "decode, transformers static and compiled",
        "transformers.decode_best",
        "ours.decode",
        small=1,
        wide=1,
    ),
    _peer("T5 decode, T5X", "t5x.decode", "ours.t5_decode", small=1.3),
    _peer(
        "T5 decode, transformers as shipped",
        "transformers.t5_decode",
        "ours.t5_decode",
        small=2.2,
    ),
    _peer(
        "T5 decode, transformers static and compiled",
        "transformers.t5_decode_best",
        "ours.t5_decode",
        small=1,
    ),
    _peer("reward-model step, torch", "torch.reward", "ours.reward", small=0.9),
    _peer(
        "reward-model step, torch compiled",
        "torch.reward_best",
        "ours.reward",
        small=0.9,
    ),
    _peer("language-model step, torch", "torch.language", "ours.language", small=0.9),
    _peer(
        "language-model step, torch compiled",
        "torch.language_best",
        "ours.language",
        small=0.9,
    ),
    Row(
        "our preference-model step / reward-model step",
        "ours.preference",
        "ours.reward",
    ),
    _peer("T5 step, torch", "torch.t5_training", "ours.t5_training", small=0.9),
    _peer(
        "T5 step, torch compiled",
        "torch.t5_training_best",
        "ours.t5_training",
        small=0.9,
    ),
    _peer("T5 step, T5X", "t5x.training", "ours.t5_training", small=1.15),
    _at_most("mixture / plain decode", "ours.kinds/mixture", "ours.kinds/plain", 2.0),
    _at_most(
        "fused / separate decode", "ours.kinds/fused", "ours.kinds/separate", 0.95
    ),
    _at_most(
        "cost a token, 4 x as many / as many",
        "ours.kinds/four_times",
        "ours.kinds/plain",
        1.3,
        0.25,
    ),
    _at_most(
        "all rows end at a quarter / at the last",
        "ours.kinds/ends_at_quarter",
        "ours.kinds/ends_at_last",
        0.5,
    ),
    Row("fraction of the machine's limit, step", LIMIT, "ours.step", {"small": 0.6}),
    _at_most("step compiles cold, seconds", "ours.compile/cold", "", 10.0),
    _at_most("step compiles from the cache, seconds", "ours.compile/warm", "", 2.0),
    Row(
        "compilations of the step",
        "ours.step:compilations",
        "",
        dict.fromkeys(("tiny", "small", "wide", "long"), 1.0),
        False,
    ),
    _at_most(
        "peak memory, ours / TRL", "ours.step:peak_mib", "trl.shipped:peak_mib", 1.0
    ),
)
