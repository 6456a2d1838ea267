# SPDX-License-Identifier: Apache-2.0
"""Where each algorithm ends when it trains by sampling; responses that end early."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nlhf_jax import loss_gradient, train_step
from nlhf_jax.algorithms import ALGORITHMS
from nlhf_jax.evaluation import exact
from nlhf_jax.games import matrices, solutions
from nlhf_jax.models import tabular
from nlhf_jax.preferences.tables import table_judge
from nlhf_jax.types import POLICY, REFERENCE
from tests.algorithms_test import SKEWED, TABLE, TAU, WITHOUT_BONUS
from tests.battery import all_but

REWARD = np.array([0.06, -0.02, 0.04])
STEPS, BATCH = 1500, 512


def train(algorithm, *, steps=STEPS, seed=0):
    """Returns the one-token policy after sampled updates on the skew game."""
    model = tabular.tabular_model(3, 1)
    # The step size falls to 0, so that sampling noise averages out.
    optimizer = optax.sgd(optax.cosine_decay_schedule(4.0, steps))
    step = train_step.make_train_step(
        model,
        algorithm,
        table_judge(model, matrices.skew(), REWARD),
        optimizer,
        max_length=1,
    )
    reference = jax.tree.map(jnp.asarray, tabular.table(np.log(SKEWED)))
    reference = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), reference)
    prompts, key = tabular.empty_prompts(BATCH), jax.random.key(seed)

    @jax.jit
    def run(state):
        def advance(state, _):
            return step(state, {REFERENCE: reference}, prompts, key)[0], None

        return jax.lax.scan(advance, state, length=steps)[0]

    start = train_step.init_state(reference, algorithm, optimizer)
    table = run(start).param_sets[POLICY]["table"]
    return solutions.normalise(np.asarray(table[0, 0], np.float64))


# Of fifteen responses by five speakers there are too many combinations to enumerate.
SHORTER = ("self_play", "nash_md_pg", "reward_pg", "grpo", "inpo", "egpo")
FIRST = ("nash_md_pg", "enpo", "egpo")
SMALL = [row for row in TABLE if len(row.make().speakers) < 5]


@pytest.mark.parametrize(
    "row", all_but(SHORTER, SMALL, lambda row: row.name), ids=lambda row: row.name
)
def test_sampled_gradients_average_to_the_exact_one(row):
    # Rollout, judge and loss of the train step, on responses that end early: 400
    # batches of 256, each entry within 4.5 standard errors of the enumeration.
    model, sets = ending_model(), ending_sets()
    rng = np.random.default_rng(3)
    game, reward = matrices.random_game(rng, 15), rng.normal(size=15)
    judge, prompts = table_judge(model, game, reward), tabular.empty_prompts(256)
    algorithm = row.make()
    followed = (*algorithm.derived_sets, *algorithm.lookaheads)
    sets = dict(sets) | dict.fromkeys(followed, sets[REFERENCE])

    def one(key):
        drawn = train_step.rollout(
            model, algorithm, sets, prompts, key, jnp.zeros((), int), max_length=LENGTH
        )
        examples = train_step.judged(algorithm, judge, {}, prompts, drawn.samples)
        return loss_gradient.gradient(model, algorithm, sets[POLICY], sets, examples)[0]

    keys = jax.random.split(jax.random.key(0), 400)
    found = np.asarray(jax.jit(lambda keys: jax.lax.map(one, keys))(keys)["table"])
    known = exact.expected_gradient(model, algorithm, judge, sets, LENGTH)["table"]
    error = found.std(axis=0, ddof=1) / np.sqrt(len(keys))
    assert (np.abs(found.mean(axis=0) - known) <= 4.5 * error + 1e-7).all()
    # Not lost in the noise: the largest entry is seen at ten standard errors.
    assert (np.abs(known) / (error + 1e-7)).max() > 10


def test_the_mixture_of_a_fixed_beta_is_the_nash_at_another_tau():
    beta = 0.5
    policy = train(ALGORITHMS["nash_md_pg"](tau=TAU, beta=beta))
    mixture = solutions.geometric_mixture(policy, SKEWED, beta)
    nash = solutions.regularised_nash(matrices.skew(), SKEWED, TAU / (1 - beta))
    np.testing.assert_allclose(mixture, nash, rtol=0, atol=0.01)
    assert np.abs(policy - nash).max() > 0.05


# Responses that end by themselves: token 2 of three ends one of at most three tokens.
VOCAB, LENGTH, END = 3, 3, 2


def ending_model():
    return tabular.tabular_model(VOCAB, LENGTH, eos_id=END)


def ending_sets():
    model = ending_model()
    keys = jax.random.split(jax.random.key(5))
    return {POLICY: model.init(keys[0]), REFERENCE: model.init(keys[1])}


def continued():
    """Returns all runs of three tokens, and which of them count, by a plain loop.

    A response that has ended is one of the runs that begin with it.
    """
    tokens = np.array(list(itertools.product(range(VOCAB), repeat=LENGTH)))
    mask = np.array(
        [[END not in run[:place] for place in range(LENGTH)] for run in tokens]
    )
    return tokens, mask


def log_probs_by_token(table, tokens):
    """Plain numpy in float64: a prefix's row is its tokens read in base three."""
    table = np.asarray(table["table"], np.float64)
    found = np.zeros(tokens.shape)
    for run, row in zip(tokens, found, strict=True):
        for t in range(LENGTH):
            prefix = int(sum(token * VOCAB**k for k, token in enumerate(run[:t][::-1])))
            row[t] = np.log(solutions.normalise(table[t, prefix])[run[t]])
    return found


def draw(algorithm, sets, prompts, seed):
    """Returns a rollout of the ending model, and its responses by speaker."""
    drawn = train_step.rollout(
        ending_model(),
        algorithm,
        sets,
        prompts,
        jax.random.key(seed),
        jnp.zeros((), jnp.int32),
        max_length=LENGTH,
    )
    return drawn, tuple(samples.responses for samples in drawn.samples)


def test_decode_and_teacher_forcing_agree_on_responses_that_end(float64):
    model, sets = ending_model(), ending_sets()
    algorithm = ALGORITHMS["self_play"](tau=TAU)
    prompts = tabular.empty_prompts(64)
    drawn, responses = draw(algorithm, sets, prompts, seed=0)
    (scored,) = loss_gradient.scored_samples(
        model, algorithm, sets[POLICY], sets, prompts, drawn.samples
    )
    np.testing.assert_allclose(
        scored.log_probs[POLICY], drawn.samples[0].log_probs[POLICY], rtol=0, atol=1e-12
    )
    tokens, mask = map(np.asarray, responses[0])
    assert set(mask.sum(axis=1)) == {1, 2, 3}
    assert (tokens[~mask] == model.pad_id).all()
    for name in (POLICY, REFERENCE):
        known = np.where(mask, log_probs_by_token(sets[name], tokens), 0.0)
        np.testing.assert_allclose(scored.log_probs[name], known, rtol=0, atol=1e-12)


def test_metrics_are_within_their_standard_error_of_the_truth():
    count = 20_000
    model, sets = ending_model(), ending_sets()
    algorithm, optimizer = ALGORITHMS["self_play"](tau=TAU), optax.sgd(0.0)
    judge = table_judge(model, np.full((15, 15), 0.5), np.zeros(15))
    step = train_step.make_train_step(
        model, algorithm, judge, optimizer, max_length=LENGTH
    )
    state = train_step.init_state(sets[POLICY], algorithm, optimizer)
    frozen = {REFERENCE: sets[REFERENCE]}
    _, metrics = jax.jit(step)(
        state, frozen, tabular.empty_prompts(count), jax.random.key(1)
    )
    tokens, mask = continued()
    policy = log_probs_by_token(sets[POLICY], tokens)
    ratio = policy - log_probs_by_token(sets[REFERENCE], tokens)
    weight = np.exp(policy.sum(axis=1))
    np.testing.assert_allclose(weight.sum(), 1.0, atol=1e-12)
    for name, values in {
        "policy/kl": np.where(mask, ratio, 0).sum(axis=1),
        "policy/entropy": -np.where(mask, policy, 0).sum(axis=1),
        "response/length": mask.sum(axis=1),
        "response/eos_rate": (tokens == END).any(axis=1),
    }.items():
        mean = weight @ values
        standard_error = np.sqrt((weight @ values**2 - mean**2) / count)
        assert abs(float(metrics[name]) - mean) < 4.5 * standard_error, name
    assert 0.05 < metrics["response/eos_rate"] < 0.95
    assert metrics["preference/mean"] == 0.5


def test_what_follows_the_end_has_no_gradient():
    model, sets = ending_model(), ending_sets()
    algorithm, prompts = ALGORITHMS["self_play"](tau=TAU), tabular.empty_prompts(512)
    drawn, responses = draw(algorithm, sets, prompts, seed=2)
    rng = np.random.default_rng(0)
    judge = table_judge(model, matrices.random_game(rng, 15), rng.normal(size=15))
    feedback = train_step.score(algorithm, judge, {}, prompts, responses)
    examples = (prompts, drawn.samples, feedback)
    table = loss_gradient.gradient(model, algorithm, sets[POLICY], sets, examples)[0]
    table = np.asarray(table["table"])
    # Rows of prefixes: after "2"; after "00" to "22", those with a 2 at either place.
    assert (table[1, END] == 0).all()
    ended = [prefix for prefix in range(9) if END in divmod(prefix, VOCAB)]
    alive = [prefix for prefix in range(9) if END not in divmod(prefix, VOCAB)]
    assert (table[2, ended] == 0).all()
    assert (np.abs(table[2, alive]).max(axis=1) > 0).all()
    assert (np.abs(table[1, :END]).max(axis=1) > 0).all()


@pytest.mark.parametrize(
    "row", all_but(FIRST, WITHOUT_BONUS, lambda row: row.name), ids=lambda row: row.name
)
def test_the_first_step_starts_at_divergence_zero_exactly(row):
    model, sets = ending_model(), ending_sets()
    algorithm, optimizer = ALGORITHMS[row.name](**row.settings), optax.sgd(0.1)
    judge = table_judge(model, np.full((15, 15), 0.5), np.ones(15))
    step = train_step.make_train_step(
        model, algorithm, judge, optimizer, max_length=LENGTH
    )
    state = train_step.init_state(sets[REFERENCE], algorithm, optimizer)
    frozen = {REFERENCE: sets[REFERENCE]}
    after, metrics = jax.jit(step)(
        state, frozen, tabular.empty_prompts(32), jax.random.key(0)
    )
    assert float(metrics["policy/kl"]) == 0.0
    # Ties and no divergence: no sample moves anything.
    # Only the weights of an anchor, which add to one in decimals, round.
    rounding = 1e-7 if algorithm.derived_sets else 0.0
    assert float(metrics["optimizer/gradient_norm"]) <= rounding
    np.testing.assert_allclose(
        after.param_sets[POLICY]["table"],
        sets[REFERENCE]["table"],
        rtol=0,
        atol=rounding,
    )
