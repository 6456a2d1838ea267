# SPDX-License-Identifier: Apache-2.0
"""Runs on eight fake devices in a process of its own; writes what it found as JSON."""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np

from nlhf_jax import constraints, partitioning
from nlhf_jax.checkpoints import Checkpointer
from nlhf_jax.checks import UserError
from nlhf_jax.optimizers import make_optimizer
from nlhf_jax.sequences import from_all_logits
from nlhf_jax.settings import MeshSettings, OptimizerSettings
from nlhf_jax.supervised_step import init_state, make_sft_step
from nlhf_jax.types import POLICY
from tests import supervised_toys as toys

STEPS = 3


def padded_model():
    """The toy model with its eleven words padded to twelve, which a mesh divides."""
    model = toys.toy_language_model()

    def init(key):
        params = model.init(key)
        return {
            "embed": jnp.pad(params["embed"], ((0, 1), (0, 0))),
            "out": jnp.pad(params["out"], ((0, 0), (0, 1))),
        }

    def logits(params, prompts, tokens_BT, dropout_key=None):
        logits_BTV = model.logits(params, prompts, tokens_BT, dropout_key)
        return constraints.constrain(logits_BTV, ("batch", "length", "vocab"))

    return model._replace(init=init, logits=logits, **from_all_logits(logits))


def train(settings, devices, name="adamw", num_microbatches=1):
    """Returns parameters and losses of a few steps, and facts on the way there."""
    model = padded_model()
    optimizer = make_optimizer(OptimizerSettings(name=name, learning_rate=0.05), STEPS)
    mesh = partitioning.make_mesh(settings, devices)

    def init(key):
        return init_state(model.init(key), optimizer)

    key = jax.random.key(0)
    state = jax.eval_shape(init, key)
    params = state.param_sets[POLICY]
    lie = partitioning.shardings_for(model.logical_axes, params, mesh)
    sharding = partitioning.state_shardings(state, lie, params)
    state = partitioning.initialize(init, mesh, sharding, key)
    step_fn = make_sft_step(model, optimizer, num_microbatches=num_microbatches)
    compiled = partitioning.compile_step(step_fn, mesh, sharding)
    embed_shards = {
        str(s.data.shape) for s in state.param_sets[POLICY]["embed"].addressable_shards
    }
    old = state.param_sets[POLICY]["embed"]
    losses = []
    for step in range(STEPS):
        batch = jax.device_get(toys.supervised_batch(step))
        state, metrics = compiled(state, batch, key)
        losses.append(float(metrics["loss/token_nll"]))
    same = jax.tree.map(
        lambda x, s: x.sharding.is_equivalent_to(s, x.ndim), state, sharding
    )
    return {
        "losses": losses,
        "params": jax.tree.map(lambda x: np.asarray(x).tolist(), state.param_sets),
        "compilations": compiled.num_compilations,
        "embed_shards": sorted(embed_shards),
        "keeps_sharding": all(jax.tree.leaves(same)),
        "donated": old.is_deleted(),
        "specs": sorted({str(s.spec) for s in jax.tree.leaves(sharding)}),
        "constraints": constraints.count_constraints(
            step_fn, mesh, state, toys.supervised_batch(0), key
        ),
    }


def restore_elsewhere(folder):
    """Saves a state on one mesh and restores it on another, damaged file checks on."""
    model = padded_model()
    optimizer = make_optimizer(OptimizerSettings(name="adamw"), 1)

    def init(key):
        return init_state(model.init(key), optimizer)

    key = jax.random.key(5)
    shapes = jax.eval_shape(init, key)
    params = shapes.param_sets[POLICY]

    def sharding_on(settings):
        mesh = partitioning.make_mesh(settings)
        lie = partitioning.shardings_for(model.logical_axes, params, mesh)
        return mesh, partitioning.state_shardings(shapes, lie, params)

    mesh, sharding = sharding_on(MeshSettings(2, 2, 2))
    _, other = sharding_on(MeshSettings(1, 8, 1))
    saved = partitioning.initialize(init, mesh, sharding, key)
    like = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, other
    )
    with Checkpointer(folder) as checkpointer:
        checkpointer.save(0, saved)
        checkpointer.wait()
        restored = checkpointer.restore(0, like)
    equal = jax.tree.map(lambda a, b: bool((np.asarray(a) == b).all()), saved, restored)
    placed = jax.tree.map(
        lambda x, s: x.sharding.is_equivalent_to(s, x.ndim), restored, other
    )
    return {
        "equal": all(jax.tree.leaves(equal)),
        "placed": all(jax.tree.leaves(placed)),
    }


def error_of(fn, *args, **kwargs):
    """Returns the text of the user error that a call raises."""
    try:
        fn(*args, **kwargs)
    except UserError as error:
        return str(error)
    return ""


def errors():
    """Returns the messages for meshes, batches and parameters that do not fit."""
    mesh = partitioning.make_mesh(MeshSettings(data=2, fsdp=2, tensor=2))
    check = partitioning.check_batch_size
    axes, shape = {"wo": ("mlp", "embed")}, {"wo": jnp.zeros((5, 4))}
    return {
        "product": error_of(partitioning.make_mesh, MeshSettings(3, 2, 1)),
        "rest": error_of(partitioning.make_mesh, MeshSettings(-1, 3, 1)),
        "batch": error_of(check, 10, mesh),
        "small_batch": error_of(check, 3, mesh),
        "microbatches": error_of(check, 20, mesh, 2),
        "good_batch": error_of(check, 16, mesh, 2),
        "parameter": error_of(partitioning.shardings_for, axes, shape, mesh),
    }


def main(path):
    """Writes everything to `path`."""
    one = jax.devices()[:1]
    found = {
        "num_devices": jax.device_count(),
        "one": train(MeshSettings(), one),
        "data": train(MeshSettings(), None),
        "fsdp": train(MeshSettings(data=2, fsdp=4), None, num_microbatches=1),
        "tensor": train(MeshSettings(data=2, fsdp=2, tensor=2), None),
        "one_adafactor": train(MeshSettings(), one, "adafactor"),
        "tensor_adafactor": train(MeshSettings(2, 2, 2), None, "adafactor"),
        "microbatches": train(MeshSettings(1, 4, 2), None, num_microbatches=2),
        "errors": errors(),
        "elsewhere": restore_elsewhere(path + ".checkpoints"),
    }
    with open(path, "w") as file:
        json.dump(found, file)


if __name__ == "__main__":
    main(sys.argv[1])
