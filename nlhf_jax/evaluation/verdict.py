# SPDX-License-Identifier: Apache-2.0
"""What a tournament says in plain language, and no more than it says.

Every sentence is computed from win rates and their intervals: "beats" means that the
whole interval lies above one half, and what no interval decides is called undecided.
"""

from collections.abc import Sequence

import numpy as np

from nlhf_jax.evaluation.cyclicity import Cyclicity
from nlhf_jax.evaluation.tournament import Interval, WinRates, beats

# Mean differences between judges below this are called agreement.
NOTABLE_DIFFERENCE = 0.05


def join_names(names: Sequence[str]) -> str:
    """Returns `a`, `a and b`, or `a, b and c`."""
    if len(names) < 2:
        return "".join(names)
    return f"{', '.join(names[:-1])} and {names[-1]}"


def digits_of(interval: Interval) -> tuple[str, str, str]:
    """Returns mean, low and high with two decimals, or as many as set an end off 1/2.

    An interval from 0.502 is not shown as one from 0.50: the reader could not see that
    it excludes one half.
    """
    for decimals in (2, 3, 4):
        shown = tuple(f"{number:.{decimals}f}" for number in interval)
        ends = zip((interval.low, interval.high), map(float, shown[1:]), strict=True)
        if all(number == 0.5 or end != 0.5 for number, end in ends):
            break
    return shown


def format_interval(interval: Interval) -> str:
    """Returns `0.61 [0.55, 0.67]`."""
    mean, low, high = digits_of(interval)
    return f"{mean} [{low}, {high}]"


def verdict(
    population: WinRates,
    *,
    baseline: str,
    rlhf: Sequence[str] = (),
    nash: Sequence[str] = (),
    learned: WinRates | None = None,
) -> str:
    """Returns the paragraph at the head of the report.

    Args:
      population: win rates under the held-out population of raters.
      baseline: the policy that training started from.
      rlhf: policies trained on a scalar reward.
      nash: policies trained to pursue the equilibrium.
      learned: win rates under the preference model that training used.
    """
    sentences = [
        f"Judged by the held-out population on {population.num_prompts} prompts:",
        *_against_baseline(population, baseline),
        *_nash_against_rlhf(population, nash, rlhf),
        *_best(population),
        *_judges(population, learned, baseline),
        f"Brackets are {population.confidence:.0%} intervals, each for its comparison "
        "by itself; they cover the choice of prompts, not the training seed.",
    ]
    return " ".join(sentences)


def _against_baseline(rates: WinRates, baseline: str) -> list[str]:
    others = [name for name in rates.names if name != baseline]
    groups: dict[str, list[str]] = {"win": [], "open": [], "lose": []}
    for name in others:
        won, lost = beats(rates, name, baseline), beats(rates, baseline, name)
        shown = f"{name} ({format_interval(rates.interval(name, baseline))})"
        groups["win" if won else "lose" if lost else "open"].append(shown)
    forms = {
        "win": (f"beats {baseline}", f"beat {baseline}"),
        "lose": (f"loses to {baseline}", f"lose to {baseline}"),
        "open": (
            f"against {baseline} is undecided",
            f"against {baseline} are undecided",
        ),
    }
    sentences = [
        f"{join_names(names)} {forms[group][len(names) > 1]}."
        for group, names in groups.items()
        if names
    ]
    if not groups["win"]:
        sentences.insert(0, f"No policy is shown to beat {baseline}.")
    return sentences


def _nash_against_rlhf(
    rates: WinRates, nash: Sequence[str], rlhf: Sequence[str]
) -> list[str]:
    sentences = []
    for name in nash:
        for other in rlhf:
            shown = f"({format_interval(rates.interval(name, other))})"
            if beats(rates, name, other):
                sentences.append(f"{name} is ahead of {other} {shown}.")
            elif beats(rates, other, name):
                sentences.append(f"{name} is behind {other} {shown}.")
            else:
                sentences.append(
                    f"Whether {name} or {other} is ahead is undecided {shown}."
                )
    return sentences


def _best(rates: WinRates) -> list[str]:
    if len(rates.names) < 3:
        return []
    for name in rates.names:
        if all(beats(rates, name, other) for other in rates.names if other != name):
            return [f"{name} beats every other policy."]
    return ["No policy is shown to beat every other one."]


def _judges(population: WinRates, learned: WinRates | None, baseline: str) -> list[str]:
    """Says how far the judge that training used flatters what it trained."""
    others = [name for name in population.names if name != baseline]
    if learned is None or not set(population.names) <= set(learned.names):
        return []
    difference = np.mean(
        [
            learned.interval(name, baseline).mean
            - population.interval(name, baseline).mean
            for name in others
        ]
    )
    if abs(difference) < NOTABLE_DIFFERENCE:
        return [
            "The learned preference model, which training used, agrees with the "
            f"population on the gains over {baseline} to {abs(difference):.2f} on "
            "average."
        ]
    if difference > 0:
        return [
            "The learned preference model, which training used, sees win rates over "
            f"{baseline} {difference:.2f} higher on average than the population does: "
            "the population does not share all of the gain it sees."
        ]
    return [
        "The learned preference model, which training used, sees win rates over "
        f"{baseline} {-difference:.2f} lower on average than the population does."
    ]


def cyclicity_paragraph(found: Cyclicity) -> str:
    """Returns what was measured about cycles, with its limits."""
    if not found.num_triples:
        return (
            f"With {found.num_candidates} candidates per prompt there are no triples, "
            "so cycles cannot be seen."
        )
    return (
        f"{found.num_cyclic_triples} of {found.num_triples} triples of candidates "
        f"({found.cyclic_share:.1%}) form a strict cycle: the population prefers the "
        "first to the second, the second to the third, and the third to the first. "
        f"{found.cyclic_prompt_share:.0%} of the {found.num_prompts} prompts have at "
        f"least one such cycle among their {found.num_candidates} candidates, and in "
        f"{found.no_winner_share:.0%} every candidate loses to some other. Of the "
        f"squared margins {found.cyclic_energy_share:.1%} cannot be written as a "
        "difference of scores. The best Bradley-Terry reward, fitted to each prompt on "
        f"its own, is off by {found.bradley_terry_error:.3f} in preference on average "
        f"and gets {found.bradley_terry_wrong_share:.1%} of the decided pairs wrong. "
        "This describes this population of criteria on these candidates. It is no "
        "statement about people."
    )
