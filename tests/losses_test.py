# SPDX-License-Identifier: Apache-2.0
"""The policy-gradient loss by hand, and what must carry no gradient."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nlhf_jax import losses
from nlhf_jax.types import POLICY, REFERENCE, LossOutput, ScoredSample

EXACT = 1e-12


def scored(policy, reference, mask=None) -> ScoredSample:
    policy = jnp.asarray(policy)
    mask = jnp.ones(policy.shape, bool) if mask is None else jnp.asarray(mask, bool)
    # Drawn from the policy itself.
    drawn_from = jax.lax.stop_gradient(policy)
    return ScoredSample(
        mask, {POLICY: policy, REFERENCE: jnp.asarray(reference)}, drawn_from
    )


def by_hand(policy, reference, mask, payoff, tau):
    """The formula, token by token: (loss, its gradient by the log-probabilities)."""
    loss, gradient = np.zeros(len(policy)), np.zeros(np.shape(policy))
    for row, keep in enumerate(mask):
        for t in np.flatnonzero(keep):
            to_go = sum(
                policy[row][m] - reference[row][m]
                for m in np.flatnonzero(keep)
                if m >= t
            )
            advantage = payoff[row] - tau * to_go
            loss[row] -= advantage
            gradient[row][t] = -advantage
    return loss, gradient


def example(seed=0):
    rng = np.random.default_rng(seed)
    policy, reference = -rng.exponential(size=(2, 5, 6))
    mask = np.arange(6)[None, :] < np.array([[1], [6], [3], [4], [2]])
    payoff = rng.uniform(-0.5, 0.5, size=5)
    return policy, reference, mask, payoff


@pytest.mark.parametrize("tau", [0.0, 0.008, 1.5])
def test_loss_and_gradient_are_the_written_formula(tau, float64):
    policy, reference, mask, payoff = example()

    def total(log_probs):
        output = losses.policy_gradient(
            scored(log_probs, reference, mask), jnp.asarray(payoff), tau=tau
        )
        return output.loss_B.sum(), output.loss_B

    (_, loss), gradient = jax.value_and_grad(total, has_aux=True)(jnp.asarray(policy))
    known_loss, known_gradient = by_hand(policy, reference, mask, payoff, tau)
    np.testing.assert_allclose(loss, known_loss, rtol=0, atol=EXACT)
    np.testing.assert_allclose(gradient, known_gradient, rtol=0, atol=EXACT)


def test_a_token_pays_for_the_divergence_still_to_come_only():
    # Ratios 1, 2, 4 nats: what the first token answers for is 7, the last one 4.
    policy = jnp.array([[-1.0, -1.0, -1.0]])
    reference = policy - jnp.array([[1.0, 2.0, 4.0]])
    gradient = jax.grad(
        lambda x: losses.policy_gradient(
            scored(x, reference), jnp.zeros(1), tau=1.0
        ).loss_B.sum()
    )(policy)
    np.testing.assert_array_equal(gradient, [[7.0, 6.0, 4.0]])


def test_nothing_flows_through_payoff_or_reference():
    policy, reference, mask, payoff = example()

    def total(reference, payoff):
        return losses.policy_gradient(
            scored(policy, reference, mask), payoff, tau=0.5
        ).loss_B.sum()

    arguments = jnp.asarray(reference), jnp.asarray(payoff)
    for gradient in jax.grad(total, argnums=(0, 1))(*arguments):
        np.testing.assert_array_equal(gradient, 0.0)


def test_a_winning_answer_becomes_more_likely_by_descent():
    policy = jnp.array([[-1.0, -2.0], [-1.0, -2.0]])
    gradient = jax.grad(
        lambda x: losses.policy_gradient(
            scored(x, policy), jnp.array([0.25, -0.25]), tau=0.1
        ).loss_B.sum()
    )(policy)
    assert (gradient[0] < 0).all() and (gradient[1] > 0).all()


def test_far_from_the_reference_descent_returns_to_it():
    # Payoff 0: too likely a token becomes less likely, too unlikely a one more.
    policy = jnp.array([[-0.5], [-3.0]])
    reference = jnp.array([[-1.0], [-1.0]])
    gradient = jax.grad(
        lambda x: losses.policy_gradient(
            scored(x, reference), jnp.zeros(2), tau=0.1
        ).loss_B.sum()
    )(policy)
    np.testing.assert_allclose(gradient, [[0.05], [-0.2]], rtol=1e-6)


def test_metrics_are_sums_over_the_tokens_that_count(float64):
    policy, reference, mask, payoff = example()
    metrics = losses.policy_gradient(
        scored(policy, reference, mask), jnp.asarray(payoff), tau=0.1
    ).metrics
    assert set(metrics) == {"policy/kl", "policy/entropy", "response/length"}
    known_kl = np.where(mask, policy - reference, 0).sum(axis=1)
    known_entropy = -np.where(mask, policy, 0).sum(axis=1)
    np.testing.assert_allclose(metrics["policy/kl"], known_kl, rtol=0, atol=EXACT)
    np.testing.assert_allclose(metrics["policy/entropy"], known_entropy, atol=EXACT)
    np.testing.assert_array_equal(metrics["response/length"], mask.sum(axis=1))


def test_metrics_carry_no_gradient():
    policy, reference, mask, payoff = example()

    def total(log_probs):
        output = losses.policy_gradient(
            scored(log_probs, reference, mask), jnp.asarray(payoff), tau=0.1
        )
        return sum(value.sum() for value in output.metrics.values())

    np.testing.assert_array_equal(jax.grad(total)(jnp.asarray(policy)), 0.0)


def test_expected_metrics_are_divergence_and_entropy(float64):
    # Two independent tokens of two: enumerate the four responses.
    probs = np.array([[0.7, 0.3], [0.2, 0.8]])
    reference = np.array([[0.5, 0.5], [0.4, 0.6]])
    picks = np.array(list(itertools.product(range(2), repeat=2)))
    at = np.arange(2)[None, :]
    log_probs, log_reference = np.log(probs)[at, picks], np.log(reference)[at, picks]
    weight = np.exp(log_probs.sum(axis=1))
    metrics = losses.policy_gradient(
        scored(log_probs, log_reference), jnp.zeros(4), tau=0.1
    ).metrics
    kl = np.sum(probs * np.log(probs / reference))
    entropy = -np.sum(probs * np.log(probs))
    np.testing.assert_allclose(weight @ metrics["policy/kl"], kl, atol=EXACT)
    np.testing.assert_allclose(weight @ metrics["policy/entropy"], entropy, atol=EXACT)


def test_a_constant_payoff_has_no_expected_gradient(float64):
    # E[grad log pi] = 0 on-policy, so a baseline is free; each sample alone does move.
    logits = jnp.array([0.3, -0.1, 0.2])

    def expected(logits, payoff, held):
        log_probs = jax.nn.log_softmax(logits)[:, None]
        output = losses.policy_gradient(
            scored(log_probs, held[:, None]), jnp.full(3, payoff), tau=0.0
        )
        return jnp.exp(held) @ output.loss_B

    held = jax.nn.log_softmax(logits)
    gradient = jax.grad(expected)(logits, 3.0, held)
    np.testing.assert_allclose(gradient, 0.0, atol=EXACT)


def test_mean_of_averages_losses_and_metrics():
    outputs = (
        LossOutput(jnp.array([1.0, 2.0]), {"policy/kl": jnp.array([0.0, 4.0])}),
        LossOutput(jnp.array([3.0, 6.0]), {"policy/kl": jnp.array([1.0, 2.0])}),
    )
    found = losses.mean_of(outputs)
    np.testing.assert_array_equal(found.loss_B, [2.0, 4.0])
    np.testing.assert_array_equal(found.metrics["policy/kl"], [0.5, 3.0])
