# SPDX-License-Identifier: Apache-2.0
"""How far policies are from equilibrium, under jit and vmap, and over prompts."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from nlhf_jax.checks import UserError
from nlhf_jax.games.methods import Game
from nlhf_jax.games.products import product


def gap(game: Game, policy_N: Float[Array, "N"]) -> Float[Array, ""]:
    """Returns max over pi' of P_tau(pi' > pi) - 1/2, which is 0 at the Nash only.

    In closed form tau log sum_y mu(y) exp(P(y > pi) / tau) + tau KL(pi, mu) - 1/2, and
    max over y of P(y > pi) - 1/2 at tau = 0: `solutions.regularised_gap` and
    `solutions.exploitability` under jit and vmap; docs/math.md (9), (10).
    """
    value_N = product(game.preference_NN, policy_N)
    is_soft = jnp.asarray(game.tau) > 0
    tau = jnp.where(is_soft, game.tau, 1.0)
    log_reference_N = jnp.log(game.reference_N)
    # 0 log 0 = 0
    held_N = jnp.where(policy_N > 0, policy_N, 1.0)
    kl = jnp.sum(policy_N * (jnp.log(held_N) - log_reference_N))
    soft = tau * (jax.nn.logsumexp(log_reference_N + value_N / tau) + kl)
    return jnp.where(is_soft, soft, value_N.max()) - 0.5


@jax.jit
def gaps(games: Game, policy_BN: Float[Array, "B N"]) -> Float[Array, "B"]:
    """Returns the gap of one policy in each of B games, or runs on one game."""
    is_one = games.preference_NN.ndim == 2
    return jax.vmap(gap, in_axes=(Game(None if is_one else 0, 0, 0), 0))(
        games, policy_BN
    )


def averaged_gap(
    games: Game, policy_BN: Float[Array, "B N"], rho_B: np.ndarray
) -> Float[Array, ""]:
    """Returns the gap of a contextual policy: sum over prompts of rho(x) gap(x).

    Preference and KL are means over x ~ rho and a policy is free to answer each prompt
    by itself, so the best response is one per prompt; docs/math.md (15).

    Raises:
      UserError: rho is not B weights of at least 0 that sum to 1.
    """
    rho_B = np.asarray(rho_B, np.float64)
    is_good = rho_B.shape == games.tau.shape and (rho_B >= 0).all()
    if not is_good or abs(rho_B.sum() - 1) > 1e-6:
        raise UserError(
            f"rho must be {len(games.tau)} weights of at least 0 that sum to 1, got "
            f"{rho_B}"
        )
    return jnp.asarray(rho_B) @ gaps(games, policy_BN)
