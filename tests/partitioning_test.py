# SPDX-License-Identifier: Apache-2.0
"""The table of rules, meshes, and the same numbers on one and on eight devices."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from nlhf_jax import constraints, partitioning
from nlhf_jax.checks import UserError
from nlhf_jax.settings import MeshSettings
from nlhf_jax.supervised_step import init_state
from nlhf_jax.types import POLICY

HERE = pathlib.Path(__file__).parent


@pytest.fixture(scope="module")
def eight(tmp_path_factory):
    """What `partitioning_worker.py` found on eight fake devices."""
    path = tmp_path_factory.mktemp("eight") / "found.json"
    environment = {
        **os.environ,
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "NPROC": "16",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(HERE.parent),
    }
    run = subprocess.run(
        [sys.executable, str(HERE / "partitioning_worker.py"), str(path)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    found = json.loads(path.read_text())
    assert found["num_devices"] == 8
    return found


MESHES = ["data", "fsdp", "tensor", "microbatches"]


@pytest.mark.parametrize("mesh", MESHES)
def test_one_and_eight_devices_give_the_same_numbers(eight, mesh):
    # Sums run in another order: the last digits of float32 may differ.
    np.testing.assert_allclose(eight[mesh]["losses"], eight["one"]["losses"], rtol=1e-5)
    for name in ("embed", "out"):
        np.testing.assert_allclose(
            eight[mesh]["params"]["params"][name],
            eight["one"]["params"]["params"][name],
            rtol=1e-4,
            atol=1e-5,
        )


def test_adafactor_on_eight_devices(eight):
    np.testing.assert_allclose(
        eight["tensor_adafactor"]["losses"],
        eight["one_adafactor"]["losses"],
        rtol=1e-5,
    )


def test_the_loss_falls(eight):
    first, *_, last = eight["one"]["losses"]
    assert last < first


@pytest.mark.parametrize("mesh", ["one", *MESHES])
def test_compiles_once_keeps_its_place_and_donates(eight, mesh):
    found = eight[mesh]
    assert found["compilations"] == 1
    assert found["keeps_sharding"]
    assert found["donated"]


@pytest.mark.parametrize("mesh", ["one", "tensor", "microbatches"])
def test_constraints_are_in_the_trace(eight, mesh):
    # One on the logits going forward, and its transpose going back.
    assert eight[mesh]["constraints"] == 2


def test_parameters_are_split_as_the_table_says(eight):
    # embed is [12, 8] with axes (vocab, embed).
    assert eight["one"]["embed_shards"] == ["(12, 8)"]
    assert eight["data"]["embed_shards"] == ["(12, 8)"]
    assert eight["fsdp"]["embed_shards"] == ["(12, 2)"]
    assert eight["tensor"]["embed_shards"] == ["(6, 4)"]


def test_a_checkpoint_moves_to_another_mesh(eight):
    # Checksums are compared too: they do not depend on the layout.
    assert eight["elsewhere"] == {"equal": True, "placed": True}


def test_rows_are_split_over_data_and_fsdp():
    mesh = partitioning.make_mesh(MeshSettings())
    assert partitioning.batch_sharding(mesh).spec == P(("data", "fsdp"))
    assert partitioning.replicated(mesh).spec == P()


def test_errors_name_sizes_that_would_do(eight):
    errors = eight["errors"]
    assert errors["product"] == (
        "mesh data=3 x fsdp=2 x tensor=1 must use all 8 devices; "
        "each size must be one of [1, 2, 4, 8], and their product 8"
    )
    assert "fsdp=3" in errors["rest"]
    assert errors["batch"] == (
        "batch_size must be divisible by 4 (mesh data=2 x fsdp=2, "
        "num_microbatches=1), got 10; 8 or 12 would do"
    )
    assert errors["small_batch"].endswith("got 3; 4 would do")
    assert errors["microbatches"].endswith("got 20; 16 or 24 would do")
    assert errors["good_batch"] == ""
    assert errors["parameter"] == (
        "axis 'mlp' of wo has size 5, which the mesh's tensor=2 does not divide; "
        "sizes that do: [1, 5]"
    )


@pytest.mark.parametrize(
    ("logical_axes", "spec"),
    [
        ((), P()),
        (("embed",), P("fsdp")),
        (("vocab", "embed"), P("tensor", "fsdp")),
        (("embed", "mlp"), P("fsdp", "tensor")),
        (("layers", "embed", "joined_kv"), P(None, "fsdp", "tensor")),
        (("heads", "relpos_buckets"), P("tensor", None)),
        # The batch has taken fsdp: embed falls back to its second rule.
        (("batch", "length", "embed"), P(("data", "fsdp"), None, None)),
        (("batch", "length", "heads", "kv"), P(("data", "fsdp"), None, "tensor", None)),
        (("embed", "embed"), P("fsdp", None)),
        ((None, "mlp"), P(None, "tensor")),
    ],
)
def test_resolution(logical_axes, spec):
    assert partitioning.resolve(logical_axes) == spec


def test_order_of_the_rules_decides_not_the_order_of_the_axes():
    rules = (("b", "data"), ("a", "data"), ("a", "tensor"), ("b", None))
    assert partitioning.resolve(("a", "b"), rules) == P("tensor", "data")


def test_collisions_name_both_sides():
    with pytest.raises(
        UserError,
        match=r"axes 'vocab' and 'mlp' of .* both want mesh axis 'tensor'; add the rule"
        r" \('mlp', None\)",
    ):
        partitioning.resolve(("mlp", "vocab"))
    with pytest.raises(UserError, match="'heads' and 'heads' of"):
        partitioning.resolve(("heads", "heads"))


def test_unknown_axis_names_the_nearest():
    with pytest.raises(UserError, match=r"'embeds' in .*did you mean 'embed'"):
        partitioning.resolve(("embeds",))


def test_rank_must_match():
    mesh = partitioning.make_mesh(MeshSettings())
    with pytest.raises(UserError, match=r"w has shape \(3,\) but logical axes"):
        partitioning.shardings_for({"w": ("embed", "mlp")}, {"w": jnp.zeros(3)}, mesh)


def test_mesh_has_auto_axes():
    mesh = partitioning.make_mesh(MeshSettings())
    assert mesh.axis_names == ("data", "fsdp", "tensor")
    assert mesh.axis_types == (AxisType.Auto,) * 3


def test_mesh_settings_check_themselves():
    with pytest.raises(UserError, match="mesh fsdp must be an integer of at least 1"):
        MeshSettings(fsdp=0)
    with pytest.raises(UserError, match="at most one mesh size may be -1"):
        MeshSettings(data=-1, tensor=-1)


@pytest.mark.parametrize("optimizer", [optax.adam(0.1), optax.adafactor(0.1)])
def test_optimiser_state_follows_the_parameters(optimizer):
    # 200 x 300 is factored by Adafactor: its row and column moments have other shapes.
    mesh = partitioning.make_mesh(MeshSettings())
    params = {"a": {"wi": jnp.zeros((200, 300))}, "scale": jnp.zeros(5)}
    axes = {"a": {"wi": ("embed", "mlp")}, "scale": ("embed",)}
    state = init_state(params, optimizer)
    state = state._replace(param_sets={**state.param_sets, "ema": params})
    lie = partitioning.shardings_for(axes, params, mesh)
    found = partitioning.state_shardings(state, lie, params)
    for state_leaf, sharding in zip(
        jax.tree.leaves(state), jax.tree.leaves(found), strict=True
    ):
        expected = {
            (200, 300): P("fsdp", "tensor"),
            (5,): P("fsdp"),
        }.get(state_leaf.shape, P())
        assert sharding.spec == expected
    for param_set in found.param_sets.values():
        assert param_set == lie


def test_equal_shapes_do_not_mix_up_parameters():
    mesh = partitioning.make_mesh(MeshSettings())
    params = {"a": {"w": jnp.zeros((4, 4))}, "b": {"w": jnp.zeros((4, 4))}}
    axes = {"a": {"w": ("embed", "mlp")}, "b": {"w": ("mlp", "embed")}}
    lie = partitioning.shardings_for(axes, params, mesh)
    found = partitioning.state_shardings(
        init_state(params, optax.adam(0.1)), lie, params
    )
    assert found.opt_states[POLICY][0].mu == lie
    assert found.opt_states[POLICY][0].nu["b"]["w"].spec == P("tensor", "fsdp")


def test_constrain_does_nothing_without_a_mesh():
    array = jnp.ones((2, 3))
    assert constraints.constrain(array, ("batch", "embed")) is array
    mesh = partitioning.make_mesh(MeshSettings())

    def constrained(x):
        return constraints.constrain(x, ("batch", "embed")) * 2

    assert "sharding_constraint" not in str(jax.make_jaxpr(constrained)(array))
    assert constraints.count_constraints(constrained, mesh, array) == 1


def test_compilations_are_counted():
    mesh = partitioning.make_mesh(MeshSettings())
    double = partitioning.CompiledFunction(lambda x: x * 2, mesh)
    assert double.num_compilations == 0
    for size in (2, 2, 3, 2):
        np.testing.assert_array_equal(double(jnp.ones(size)), 2 * np.ones(size))
    assert double.num_compilations == 2


def test_a_state_from_elsewhere_is_compiled_once():
    mesh = partitioning.make_mesh(MeshSettings())
    whole = partitioning.replicated(mesh)
    step = partitioning.compile_step(lambda s, b, k: (s + b.sum(), {}), mesh, whole)
    state = jnp.zeros(3)
    for _ in range(3):
        state, _ = step(state, np.ones(2, np.float32), jax.random.key(0))
    np.testing.assert_array_equal(state, np.full(3, 6.0))
    assert step.num_compilations == 1


def test_lowering_needs_no_arrays():
    mesh = partitioning.make_mesh(MeshSettings())
    whole = partitioning.replicated(mesh)
    step = partitioning.compile_step(lambda s, b, k: (s + b.sum(), {}), mesh, whole)
    key = jax.eval_shape(lambda: jax.random.key(0))
    abstract = jax.ShapeDtypeStruct((3,), jnp.float32)
    assert "func" in step.lower(abstract, abstract, key).as_text()


class Device:
    """Stands for a device of a slice; the mesh asks for no more."""

    platform, device_kind, process_index = "tpu", "TPU v5 lite", 0

    def __init__(self, number: int, slice_index: int):
        self.id, self.slice_index = number, slice_index
        self.coords, self.core_on_chip = (number % 2, number % 4 // 2, 0), 0


def slices(count: int, each: int = 4) -> list[Device]:
    return [Device(i * each + n, i) for i in range(count) for n in range(each)]


def test_a_batch_goes_over_slices_and_parameters_do_not():
    mesh = partitioning.over_slices((2, 2, 1), 2, slices(2))
    assert mesh.shape == (4, 2, 1)  # two slices, each 2 x 2 x 1
    rows = [{device.slice_index for device in row.ravel()} for row in mesh]
    assert rows == [{0}, {0}, {1}, {1}]


@pytest.mark.parametrize(("wanted", "there"), [(1, 2), (2, 1), (3, 2)])
def test_another_number_of_slices_is_refused(wanted, there):
    with pytest.raises(UserError, match=f"mesh slice must be {there}, .* got {wanted}"):
        partitioning.make_mesh(MeshSettings(slice=wanted), slices(there))


def test_slices_count_among_the_sizes():
    with pytest.raises(UserError, match="mesh slice=2 x data=3 x fsdp=1 x tensor=1"):
        partitioning.make_mesh(MeshSettings(data=3, slice=2), slices(2))
    with pytest.raises(UserError, match="mesh slice must be an integer of at least 1"):
        MeshSettings(slice=0)


def test_a_size_that_does_not_divide_stays_whole():
    mesh = partitioning.make_mesh(MeshSettings(), jax.devices()[:1])

    def laid(x):
        return constraints.constrain(x, ("batch", "heads"))

    assert constraints.count_constraints(laid, mesh, jnp.ones((3, 5))) == 1
    odd = {"data": 2, "fsdp": 2, "tensor": 4}
    kept = constraints._fitting(
        jnp.ones((8, 6)), P(("data", "fsdp"), "tensor"), type("M", (), {"shape": odd})
    )
    assert kept == P(("data", "fsdp"), None)


def test_gathering_needs_a_mesh_that_splits():
    array = jnp.ones((4, 2))
    assert constraints.gather(array, ("embed", "mlp")) is array
