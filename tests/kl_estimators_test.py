# SPDX-License-Identifier: Apache-2.0
"""Six ways to estimate the gradient of KL(pi, mu), and which of them are right.

Each is an algorithm of one speaker whose loss is the estimator; the expectation over
its draws is enumerated. The expected vectors were computed independently (numpy,
float64, twelve decimals) for two tokens of two; the coordinate of the other token is
minus the one given.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nlhf_jax import losses
from nlhf_jax.algorithms import ALGORITHMS
from nlhf_jax.evaluation import exact
from nlhf_jax.models import tabular
from nlhf_jax.preferences.tables import table_judge
from nlhf_jax.types import POLICY, REFERENCE, Algorithm, LossOutput, Speaker

EXACT = 1e-12
SETS = {
    POLICY: tabular.table([0.4, -0.2], [[1.0, -0.5], [-0.3, 0.8]]),
    REFERENCE: tabular.table(np.log([0.5, 0.5]), np.log([[0.7, 0.3], [0.6, 0.4]])),
}
MODEL = tabular.tabular_model(2, 2)
DIVERGENCE = 0.156062813917
TRUE = (0.087672735173, 0.062853484642, -0.099952849586)
DIAGONAL = (0.137270544274, 0.062853484642, -0.099952849586)
KNOWN = {
    "reward_to_go": TRUE,
    "full_sequence": TRUE,
    "diagonal": DIAGONAL,
    "k1_in_the_loss": (0.0, 0.0, 0.0),
    "k3_in_the_loss": (0.145656306226, 0.075912702006, -0.124112459598),
    "undetached": (0.274541088548, 0.207299505637, -0.172985518329),
}


def log_probs_and_ratio(samples):
    (sample,) = samples
    log_probs_BT = sample.log_probs[POLICY]
    return log_probs_BT, log_probs_BT - sample.log_probs[REFERENCE]


def reward_to_go(samples, feedback):
    del feedback
    return losses.policy_gradient(samples[0], jnp.zeros(4), tau=1.0).loss_B


def full_sequence(samples, feedback):
    log_probs_BT, ratio_BT = log_probs_and_ratio(samples)
    return jax.lax.stop_gradient(ratio_BT.sum(axis=1)) * log_probs_BT.sum(axis=1)


def diagonal(samples, feedback):
    log_probs_BT, ratio_BT = log_probs_and_ratio(samples)
    return (jax.lax.stop_gradient(ratio_BT) * log_probs_BT).sum(axis=1)


def k1_in_the_loss(samples, feedback):
    return log_probs_and_ratio(samples)[1].sum(axis=1)


def k3_in_the_loss(samples, feedback):
    _, ratio_BT = log_probs_and_ratio(samples)
    return (jnp.exp(-ratio_BT) - 1 + ratio_BT).sum(axis=1)


def undetached(samples, feedback):
    log_probs_BT, ratio_BT = log_probs_and_ratio(samples)
    return (ratio_BT * log_probs_BT).sum(axis=1)


ESTIMATORS = {
    estimator.__name__: estimator
    for estimator in (
        reward_to_go,
        full_sequence,
        diagonal,
        k1_in_the_loss,
        k3_in_the_loss,
        undetached,
    )
}


def algorithm_of(estimator):
    return Algorithm(
        name="estimator",
        speakers=(Speaker({POLICY: 1.0}),),
        comparisons=(),
        ratings=(),
        trained_on=(0,),
        scored_under=(REFERENCE,),
        loss=lambda samples, feedback: LossOutput(estimator(samples, feedback), {}),
    )


def tie_judge():
    return table_judge(MODEL, np.full((4, 4), 0.5), np.zeros(4))


def three(gradient):
    """First token; second token after the first one; second token after the other."""
    table = np.asarray(gradient["table"])
    np.testing.assert_allclose(table[..., 0], -table[..., 1], rtol=0, atol=EXACT)
    return table[0, 0, 0], table[1, 0, 0], table[1, 1, 0]


def divergence(params):
    def log_probs(sets, name):
        return tabular.response_log_probs(
            MODEL, sets, Speaker({name: 1.0}), tabular.all_responses(MODEL, 2)
        )

    log_policy = log_probs({POLICY: params}, POLICY)
    return jnp.exp(log_policy) @ (log_policy - log_probs(SETS, REFERENCE))


@pytest.mark.parametrize("name", KNOWN)
def test_each_estimator_has_the_known_expectation(name, float64):
    algorithm = algorithm_of(ESTIMATORS[name])
    found = exact.expected_gradient(MODEL, algorithm, tie_judge(), SETS, 2)
    np.testing.assert_allclose(three(found), KNOWN[name], rtol=0, atol=EXACT)


def test_the_truth_is_the_derivative_of_the_divergence(float64):
    policy = {"table": jnp.asarray(SETS[POLICY]["table"])}
    value, gradient = jax.value_and_grad(divergence)(policy)
    np.testing.assert_allclose(value, DIVERGENCE, rtol=0, atol=EXACT)
    np.testing.assert_allclose(three(gradient), TRUE, rtol=0, atol=EXACT)


@pytest.mark.parametrize(
    "name", ["self_play", "best_response", "spo", "reward_pg", "rloo", "online_ipo"]
)
def test_on_policy_algorithms_are_drawn_back_by_the_true_gradient(name, float64):
    # Ties everywhere, no reward, tau = 1: nothing but the divergence is left.
    algorithm = ALGORITHMS[name](tau=1.0)
    found = exact.expected_gradient(MODEL, algorithm, tie_judge(), SETS, 2)
    np.testing.assert_allclose(three(found), TRUE, rtol=0, atol=EXACT)


def test_grpo_is_drawn_back_by_the_biased_one(float64):
    algorithm = ALGORITHMS["grpo"](tau=1.0, num_responses=2)
    found = exact.expected_gradient(MODEL, algorithm, tie_judge(), SETS, 2)
    known = KNOWN["k3_in_the_loss"]
    np.testing.assert_allclose(three(found), known, rtol=0, atol=EXACT)
