# SPDX-License-Identifier: Apache-2.0
"""Policy steps on eight fake devices, in a process of its own; writes JSON."""

import dataclasses
import inspect
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax

from nlhf_jax import loss_gradient, partitioning, supervised_step, train_step
from nlhf_jax.algorithms import ALGORITHMS
from nlhf_jax.jobs import runs
from nlhf_jax.models.t5 import t5_language_model
from nlhf_jax.preferences.pairwise import pairwise_preference_model
from nlhf_jax.settings import MeshSettings
from nlhf_jax.t5_settings import T5Settings
from nlhf_jax.types import (
    POLICY,
    REFERENCE,
    ComparisonBatch,
    Feedback,
    Judge,
    PromptBatch,
    Responses,
    Samples,
)
from tests.preference_models_test import PAIRWISE

RUN = ("egpo", "enpo", "comal")  # half-steps, a follower, a magnet
STEPS, BATCH, PROMPT, LENGTH = 10, 16, 5, 6
SETTINGS = T5Settings(64, 8, 4, 2, 16, 1, 1)
MESHES = {
    "8 x 1 x 1": MeshSettings(),
    "1 x 8 x 1": MeshSettings(1, 8, 1),
    "1 x 2 x 4": MeshSettings(1, 2, 4),
    "2 x 2 x 2": MeshSettings(2, 2, 2),
}


def judge() -> Judge:
    """Returns the judge that likes long responses of large tokens."""

    def reward(frozen, prompts, responses):
        del frozen, prompts
        tokens_BT = jnp.where(responses.mask_BT, responses.tokens_BT, 0)
        return tokens_BT.sum(axis=1) / 64.0

    def preference(frozen, prompts, first, second):
        lead_B = reward(frozen, prompts, first) - reward(frozen, prompts, second)
        return jax.nn.sigmoid(lead_B)

    return Judge(preference, reward)


def prompts(step: int) -> PromptBatch:
    """Returns numpy prompts of unequal lengths."""
    rng = np.random.default_rng(step)
    mask = np.arange(PROMPT)[None, :] < rng.integers(1, PROMPT + 1, size=(BATCH, 1))
    tokens = np.where(mask, rng.integers(2, 64, size=(BATCH, PROMPT)), 0)
    return PromptBatch(tokens.astype(np.int32), mask)


def flat(params):
    """Returns every array's numbers as a list."""
    return [np.asarray(leaf).ravel().tolist() for leaf in jax.tree.leaves(params)]


def compiled_on(mesh, step_fn, state_sharding, reference_sharding):
    """Returns the policy step with every argument in its place."""
    return partitioning.compile_step(
        step_fn,
        mesh,
        state_sharding,
        {REFERENCE: reference_sharding},
        partitioning.batch_sharding(mesh),
        partitioning.replicated(mesh),
    )


def train(settings, devices, *, num_microbatches=1):
    """Returns metrics of each step, the last parameters, and compilations."""
    model = t5_language_model(SETTINGS)
    algorithm = ALGORITHMS["nash_md_pg"](tau=0.1, beta=0.25)
    optimizer = optax.sgd(0.1)
    mesh = partitioning.make_mesh(settings, devices)
    params = jax.device_get(model.init(jax.random.key(0)))
    reference = jax.device_get(model.init(jax.random.key(1)))
    state = train_step.init_state(params, algorithm, optimizer)
    lie = partitioning.shardings_for(model.logical_axes, params, mesh)
    sharding = partitioning.state_shardings(state, lie, params)
    step_fn = train_step.make_train_step(
        model,
        algorithm,
        judge(),
        optimizer,
        max_length=LENGTH,
        num_microbatches=num_microbatches,
    )
    compiled = compiled_on(mesh, step_fn, sharding, lie)
    key, frozen = jax.random.key(7), {REFERENCE: jax.device_put(reference, lie)}
    state = jax.device_put(state, sharding)
    history = []
    for step in range(STEPS):
        state, metrics = compiled(state, frozen, prompts(step), key)
        history.append({k: float(v) for k, v in metrics.items() if v.ndim == 0})
    return {
        "metrics": history,
        "start": flat(params),
        "params": flat(state.param_sets[POLICY]),
        "num_compilations": compiled.num_compilations,
    }


def fit_preference(settings, devices, *, num_microbatches=1):
    """Returns the same of a preference model that learns which response is larger."""
    model = pairwise_preference_model(
        SETTINGS, PAIRWISE, prompt_length=PROMPT, response_length=LENGTH
    )
    optimizer = optax.sgd(0.1)
    mesh = partitioning.make_mesh(settings, devices)
    params = jax.device_get(model.init(jax.random.key(0)))
    state = supervised_step.init_state(params, optimizer)
    lie = partitioning.shardings_for(model.logical_axes, params, mesh)
    sharding = partitioning.state_shardings(state, lie, params)
    step_fn = supervised_step.make_preference_step(
        model, optimizer, num_microbatches=num_microbatches
    )
    compiled = partitioning.compile_step(step_fn, mesh, sharding)
    state, history = jax.device_put(state, sharding), []
    for step in range(STEPS):
        rng = np.random.default_rng(step)
        first, second = (
            Responses(
                rng.integers(2, 60, size=(BATCH, LENGTH)).astype(np.int32),
                np.ones((BATCH, LENGTH), bool),
            )
            for _ in range(2)
        )
        lead_B = first.tokens_BT.sum(axis=1) > second.tokens_BT.sum(axis=1)
        batch = ComparisonBatch(prompts(step), first, second, lead_B.astype(np.float32))
        state, metrics = compiled(state, batch, jax.random.key(0))
        history.append({k: float(v) for k, v in metrics.items() if v.ndim == 0})
    return {
        "metrics": history,
        "start": flat(params),
        "params": flat(state.param_sets[POLICY]),
        "num_compilations": compiled.num_compilations,
    }


def on_every_mesh(job):
    """Returns what a job finds on one device, and on eight in several ways."""
    found = {"one": job(MeshSettings(), jax.devices()[:1])}
    for name, settings in MESHES.items():
        found[name] = job(settings, None, num_microbatches=2)
    return found


def settings_of(factory):
    """Returns the arguments that an algorithm needs and has no default for."""
    given = {"tau": 0.1, "beta": 0.25, "step_size": 2.0, "decay": 0.5}
    parameters = inspect.signature(factory).parameters.values()
    return {p.name: given[p.name] for p in parameters if p.default is p.empty}


def placed(name):
    """Returns an algorithm, its step on three axes, a first state, and places."""
    model, optimizer = t5_language_model(SETTINGS), optax.adam(0.01)
    algorithm = ALGORITHMS[name](**settings_of(ALGORITHMS[name]))
    mesh = partitioning.make_mesh(MeshSettings(2, 2, 2))
    params = model.init(jax.random.key(0))
    lie = partitioning.shardings_for(model.logical_axes, params, mesh)
    state = train_step.init_state(params, algorithm, optimizer)
    sharding = partitioning.state_shardings(state, lie, params)
    step_fn = train_step.make_train_step(
        model, algorithm, judge(), optimizer, max_length=LENGTH
    )
    compiled = compiled_on(mesh, step_fn, sharding, lie)
    state = jax.device_put(state, sharding)
    return algorithm, compiled, (state, {REFERENCE: params}), lie


def described(tree):
    """Returns path -> shape, dtype and, for arrays, how they are split."""
    return {
        jax.tree_util.keystr(path): [
            list(leaf.shape),
            str(leaf.dtype),
            str(getattr(getattr(leaf, "sharding", None), "spec", "")),
        ]
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def kept(name, *, is_run):
    """Returns what a state is like before and after a step, and where copies lie."""
    algorithm, compiled, (state, frozen), lie = placed(name)
    before = described(state)
    same = [
        jax.tree.map(lambda leaf, sharding: leaf.sharding == sharding, tree, lie)
        for sets in (state.param_sets.values(), _moments(state))
        for tree in sets
    ]
    after = None
    if is_run:
        after = described(compiled(state, frozen, prompts(0), jax.random.key(7))[0])
    return {
        "before": before,
        "after": after,
        "num_trees": len(same),
        "num_sets": 1 + len(algorithm.derived_sets),
        "num_trained": 1 + len(algorithm.followers),
        "in_place": all(jax.tree.leaves(same)),
        "num_split": sum(
            "fsdp" in spec or "tensor" in spec for *_, spec in before.values()
        ),
    }


def a_judge_of_another_shape():
    """Returns how a larger frozen judge lies beside a small policy."""
    model = t5_language_model(SETTINGS)
    large = t5_language_model(dataclasses.replace(SETTINGS, emb_dim=16, mlp_dim=32))
    algorithm, optimizer = ALGORITHMS["self_play"](tau=0.1), optax.sgd(0.5)
    policy, judge_params = (one.init(jax.random.key(0)) for one in (model, large))
    training = runs.Training(
        "judged",
        lambda *arguments: arguments,
        {REFERENCE: policy, "preference": judge_params},
        lambda step: None,
        lambda state: {},
        {},
        model.logical_axes,
        {REFERENCE: model.logical_axes, "preference": large.logical_axes},
    )
    state = train_step.init_state(policy, algorithm, optimizer)
    mesh = partitioning.make_mesh(MeshSettings(2, 2, 2))
    return described(runs._FrozenStep(training, state, mesh)._frozen)


def _moments(state):
    """Returns Adam's two moments of every set that is trained."""
    return [
        moments
        for opt_state in state.opt_states.values()
        for moments in (opt_state[0].mu, opt_state[0].nu)
    ]


def collectives_of_the_rollout():
    """Returns what crosses devices while a mixture is decoded, by HLO name."""
    model = t5_language_model(SETTINGS)
    algorithm = ALGORITHMS["nash_md_pg"](tau=0.1, beta=0.25)
    mesh = partitioning.make_mesh(MeshSettings())
    params = jax.eval_shape(model.init, jax.random.key(0))
    whole, rows = partitioning.replicated(mesh), partitioning.batch_sharding(mesh)

    def draw(param_sets, prompts, key):
        step = jnp.zeros((), jnp.int32)
        return train_step.rollout(
            model, algorithm, param_sets, prompts, key, step, max_length=LENGTH
        )

    compiled = partitioning.CompiledFunction(
        draw, mesh, in_shardings=(whole, rows, whole)
    )
    sets = {POLICY: params, REFERENCE: params}
    return collectives(compiled.lower(sets, prompts(0), jax.random.key(0)))


def collectives_of_the_gradient():
    """Returns what crosses devices for a gradient in two microbatches, by HLO name."""
    model = t5_language_model(SETTINGS)
    algorithm = ALGORITHMS["self_play"](tau=0.1)
    mesh = partitioning.make_mesh(MeshSettings())
    params = jax.eval_shape(model.init, jax.random.key(0))
    whole, rows = partitioning.replicated(mesh), partitioning.batch_sharding(mesh)
    said = Samples(
        Responses(np.ones((BATCH, LENGTH), np.int32), np.ones((BATCH, LENGTH), bool)),
        {},
        np.zeros((BATCH, LENGTH), np.float32),
    )
    examples = (prompts(0), (said, said), Feedback((np.zeros(BATCH, np.float32),), ()))

    def compute(params, reference, examples):
        constants = {REFERENCE: reference}
        return loss_gradient.gradient(
            model, algorithm, params, constants, examples, num_microbatches=2
        )

    compiled = partitioning.CompiledFunction(
        compute, mesh, in_shardings=(whole, whole, rows)
    )
    return collectives(compiled.lower(params, params, examples))


def collectives(lowered):
    """Returns HLO name -> how often it stands in the compiled program."""
    text = lowered.compile().as_text()
    names = ("all-gather", "all-to-all", "collective-permute")
    return {name: text.count(f" {name}(") for name in names}


def main(path):
    """Writes everything to `path`."""
    found = {
        "num_devices": jax.device_count(),
        "policy": on_every_mesh(train),
        "preference": on_every_mesh(fit_preference),
        "rollout": collectives_of_the_rollout(),
        "gradient": collectives_of_the_gradient(),
        "judge": a_judge_of_another_shape(),
        "kept": {name: kept(name, is_run=name in RUN) for name in ALGORITHMS},
    }
    with open(path, "w") as file:
        json.dump(found, file)


if __name__ == "__main__":
    main(sys.argv[1])
