# SPDX-License-Identifier: Apache-2.0
"""First states on eight fake devices: where they lie and what was ever whole; JSON."""

import faulthandler
import json
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np

from nlhf_jax import checkpoints, partitioning, supervised_step
from nlhf_jax.jobs import folders, runs
from nlhf_jax.optimizers import make_optimizer
from nlhf_jax.settings import MeshSettings, OptimizerSettings
from nlhf_jax.t5_settings import T5Settings
from nlhf_jax.types import POLICY

ANY_SHAPE = T5Settings(8, 4, 1, 4, 4, 1, 1)  # of a description that must be there

WORDS, WIDTH = 4096, 64
AXES = {"table": ("embed", "kv"), "scale": ("kv",)}
OPTIMIZER = make_optimizer(OptimizerSettings(name="adamw"), 1)


def init(key):
    """Returns a table that only eight devices should hold."""
    return {
        "table": jax.random.normal(key, (WORDS, WIDTH)),
        "scale": jnp.ones(WIDTH),
    }


def make(params):
    """Returns the first state of training."""
    return supervised_step.init_state(params, OPTIMIZER)


def shardings(mesh, start):
    """Returns where parameters and state are to lie."""
    params = partitioning.shardings_for(AXES, start.params, mesh)
    return params, partitioning.state_shardings(start.shapes, params, start.params)


def largest_on_one_device():
    """Returns how many numbers the largest part of any array on a device has."""
    parts = [s.data.size for a in jax.live_arrays() for s in a.addressable_shards]
    return max(parts, default=0)


class Watch:
    """Looks at what is on a device whenever our code, or `device_put`, is entered."""

    def __init__(self):
        self.largest = 0

    def __call__(self, frame, event, argument):
        if event not in ("call", "return"):
            return
        code = frame.f_code
        if "nlhf_jax" in code.co_filename or code.co_name == "device_put":
            self.largest = max(self.largest, largest_on_one_device())

    def of(self, make):
        """Returns `make()`; the largest part seen until then is kept."""
        self.largest = 0
        sys.setprofile(self)
        try:
            return make()
        finally:
            sys.setprofile(None)


def described(state, expected, wanted, largest):
    """Returns how a state lies, and whether its numbers are right."""
    tables = [leaf for leaf in jax.tree.leaves(state) if leaf.shape == (WORDS, WIDTH)]
    place = jax.tree.map(
        lambda leaf, sharding: leaf.sharding.is_equivalent_to(sharding, leaf.ndim),
        state,
        wanted,
    )
    same = jax.tree.map(
        lambda a, b: bool(np.array_equal(np.asarray(a), b)), state, expected
    )
    return {
        "equal": all(jax.tree.leaves(same)),
        "in_place": all(jax.tree.leaves(place)),
        "shards": [list(t.addressable_shards[0].data.shape) for t in tables],
        "largest_on_one_device": largest,
    }


def main(folder):
    """Writes what was found."""
    faulthandler.dump_traceback_later(150, exit=True)
    folder = pathlib.Path(folder)
    mesh = partitioning.make_mesh(MeshSettings(1, 8, 1))
    seed, found, watch = 4, {}, Watch()
    expected = jax.device_get(jax.jit(lambda k: make(init(k)))(jax.random.key(seed)))

    def first(checkpoint):
        start = runs.initial_state(init, str(checkpoint), seed, make)
        params, state = shardings(mesh, start)
        return watch.of(lambda: start.on(mesh, params, state)), state

    state, wanted = first("")
    found["fresh"] = described(state, expected, wanted, watch.largest)
    with checkpoints.Checkpointer(folder / "run" / "checkpoints") as checkpointer:
        checkpointer.save(1, state)
        checkpointer.wait()
        del state
        like = jax.tree.map(
            lambda leaf, place: jax.ShapeDtypeStruct(
                leaf.shape, leaf.dtype, sharding=place
            ),
            jax.eval_shape(lambda: expected),
            wanted,
        )
        again = watch.of(lambda: checkpointer.restore(1, like))
    found["resumed"] = described(again, expected, wanted, watch.largest)
    del again
    checkpoints.save_params(folder / "file", expected.param_sets[POLICY], "float32")
    for name in ("run", "file"):
        lengths = {"inputs": 1, "targets": 1}
        said = folders.ModelDescription("language_model", ANY_SHAPE, lengths).to_json()
        (folder / name / folders.DESCRIPTION_FILE).write_text(said)
    for kind, name in (("steps", "run"), ("file", "file")):
        state, wanted = first(folder / name)
        found[kind] = described(state, expected, wanted, watch.largest)
        del state
    lie = wanted.param_sets[POLICY]
    params = checkpoints.load_params(folder / "run", expected.param_sets[POLICY], lie)
    same = jax.tree.map(
        lambda a, b: bool(np.array_equal(a, b)), params, expected.param_sets[POLICY]
    )
    there = jax.tree.map(
        lambda a, s: a.sharding.is_equivalent_to(s, a.ndim), params, lie
    )
    found["frozen"] = {
        "equal": all(jax.tree.leaves(same)),
        "in_place": all(jax.tree.leaves(there)),
    }
    (folder / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
