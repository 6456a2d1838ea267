# SPDX-License-Identifier: Apache-2.0
"""The exploration job: regret where the best response is hardly ever said."""

from nlhf_jax.checks import LARGEST_SEED, UserError, check_integer, check_range
from nlhf_jax.evaluation import exploration as measured
from nlhf_jax.evaluation.plots import save_png
from nlhf_jax.jobs import folders


def exploration(
    *,
    taus: tuple[float, ...] = (0.2, 0.1, 0.05, 0.025),
    rarity: float = 0.01,
    train_steps: int = 1000,
    num_seeds: int = 16,
    seed: int = 0,
    plot: str = "",
) -> None:
    """Prints the regret of ENPO and of standard iterative NLHF as tau falls.

    A game of three responses whose best one the reference hardly ever says; the total
    regret is the sum of the duality gaps over training steps, mean and 95 % interval
    over seeds.

    Args:
      taus: strengths of the KL to the reference, per nat, > 0.
      rarity: how often the reference says the best response, in (0, 1).
      train_steps: updates of four prompts each.
      num_seeds: runs that differ in nothing but their samples, at least 2.
      seed: of sampling.
      plot: a PNG file for the curves; empty draws none.

    Raises:
      UserError: a setting out of range, or a file that cannot be written.

    Source: the question is that of Nan et al., 2026, arXiv 2606.01382.
    """
    if not taus:
        raise UserError("taus must name at least one tau, got ()")
    check_integer("train_steps", train_steps, 1)
    target = folders.plot_path(plot) if plot else None
    curves = measured.measure(
        taus,
        rarity=rarity,
        train_steps=train_steps,
        num_seeds=num_seeds,
        seed=int(check_range("seed", seed, 0, LARGEST_SEED)),
    )
    print(measured.table(curves))
    if target:
        save_png(measured.figure(curves), target)
