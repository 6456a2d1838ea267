# SPDX-License-Identifier: Apache-2.0
"""One process alone, a store that is scripted, and two real processes that meet."""

import json
import socket

import jax
import numpy as np
import pytest

from nlhf_jax import distributed, global_arrays, loop, partitioning, watchdog
from nlhf_jax.checkpoints import Checkpointer
from nlhf_jax.checks import UserError
from nlhf_jax.discovery import Processes
from nlhf_jax.distributed import Patience, PeerLost
from nlhf_jax.settings import MeshSettings
from tests import process_toys

WORKER = process_toys.ROOT / "tests" / "distributed_worker.py"
HOST = socket.gethostname()

# ---------------------------------------------------------------- one process alone


def test_alone_everything_is_the_obvious_thing():
    assert distributed.num_processes() == 1
    assert distributed.is_first()
    assert distributed.exchange("words", "alone") == {0: "alone"}
    assert distributed.all_do("act", lambda: 3) == 3
    assert distributed.first_then_others("read", lambda: 4) == 4
    done = []
    distributed.first_does("write", lambda: done.append(1))
    assert done == [1]
    distributed.barrier("end")
    distributed.leave(1)  # does not end the process
    distributed.start(Processes())
    assert distributed.num_processes() == 1


def test_alone_an_error_stays_what_it_is():
    def fail():
        raise UserError("no room")

    with pytest.raises(UserError, match=r"^no room$"):
        distributed.first_does("write", fail)


def test_alone_a_batch_is_all_here():
    mesh = partitioning.make_mesh(MeshSettings(), jax.devices()[:1])
    sharding = partitioning.batch_sharding(mesh)
    rows = global_arrays.rows_here(sharding, 6)
    np.testing.assert_array_equal(rows, np.arange(6))
    batch = {"x": np.arange(12.0).reshape(6, 2)}
    whole = global_arrays.from_rows(batch, rows, 6, sharding)
    assert whole["x"].sharding == sharding
    np.testing.assert_array_equal(global_arrays.fetch(whole)["x"], batch["x"])


def test_patience_is_read_from_the_environment():
    assert Patience.from_variables({}) == Patience()
    given = {"NLHF_START_SECONDS": "3", "NLHF_HEARTBEAT_SECONDS": "7.5"}
    assert Patience.from_variables(given) == Patience(start=3.0, heartbeat=7.5)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("soon", "must be a number, got 'soon'"),
        ("0", "must be in [1, 604800]"),
        ("inf", "604800], got inf"),
    ],
)
def test_patience_that_is_no_number(text, complaint):
    with pytest.raises(UserError) as caught:
        Patience.from_variables({"NLHF_BARRIER_SECONDS": text})
    assert str(caught.value).startswith("NLHF_BARRIER_SECONDS")
    assert complaint in str(caught.value)


# ------------------------------------------------------- a store that is scripted


class Store:
    """Stands for the store that processes share; `others` act when one waits."""

    def __init__(self, others=(), error=""):
        self.values: dict[str, str] = {}
        self.others, self.error = dict(others), error
        self.waited: list[str] = []

    def key_value_set(self, key, value):
        if key in self.values:
            raise jax.errors.JaxRuntimeError(f"ALREADY_EXISTS: {key}")
        self.values[key] = value

    def key_value_try_get(self, key):
        if key not in self.values:
            raise jax.errors.JaxRuntimeError(f"NOT_FOUND: {key}")
        return self.values[key]

    def key_value_dir_get(self, folder):
        inside = folder.rstrip("/") + "/"
        return [pair for pair in self.values.items() if pair[0].startswith(inside)]

    def key_value_delete(self, folder):
        for key, _ in self.key_value_dir_get(folder):
            del self.values[key]

    def wait_at_barrier(self, folder, milliseconds):
        self.waited.append(f"{folder} {milliseconds}")
        for number, value in self.others.items():
            self.values[f"{folder}/{number}"] = value
        if self.error:
            raise jax.errors.JaxRuntimeError(self.error)


@pytest.fixture
def joined(monkeypatch):
    """Returns a function that makes this process number K of three, with a store."""

    def join(number=0, **script):
        store = Store(**script)
        job = distributed._Job(
            Processes("h:1", 3, number, "a test"),
            Patience(barrier=9),
            {0: "a", 1: "b", 2: "c"},
            store,
        )
        monkeypatch.setattr(distributed, "_job", job)
        return store

    return join


def test_what_all_say_is_heard_and_old_rounds_are_forgotten(joined):
    store = joined(others={1: "one", 2: "two"})
    for _ in range(3):
        heard = distributed.exchange("words", "zero")
        assert heard == {0: "zero", 1: "one", 2: "two"}
    assert store.waited == [f"nlhf/words/{n} 9000" for n in (1, 2, 3)]
    # Somebody may still read the last round.
    assert {key.rpartition("/")[0] for key in store.values} == {"nlhf/words/3"}


def test_the_late_are_named_with_their_hosts(joined):
    joined(others={1: ""}, error="DEADLINE_EXCEEDED: Barrier timed out")
    with pytest.raises(PeerLost, match="process 2 on c did not come"):
        distributed.barrier("tea", 2)
    joined(others={}, error="UNAVAILABLE: a task died")
    with pytest.raises(PeerLost, match="process 1 on b, process 2 on c did not"):
        distributed.barrier("tea", 2)


def test_who_was_late_itself_is_told_so(joined):
    joined(2, others={0: "", 1: ""}, error="DEADLINE_EXCEEDED: Barrier timed out")
    with pytest.raises(PeerLost, match="process 2 came when others had given up"):
        distributed.barrier("tea", 2)


def test_an_error_of_one_is_an_error_of_all(joined):
    joined(others={1: "", 2: "no room"})
    with pytest.raises(UserError, match=r"^no room \(process 2 on c\)$"):
        distributed.all_do("folder", lambda: 3)


def test_only_the_first_acts(joined):
    done = []
    joined(0, others={1: "", 2: ""})
    distributed.first_does("write", lambda: done.append(0))
    joined(1, others={0: "", 2: ""})
    assert not distributed.is_first()
    distributed.first_does("write", lambda: done.append(1))
    assert done == [0]
    assert distributed.first_then_others("read", lambda: "mine") == "mine"


def test_the_first_word_counts(joined):
    store = joined(1)
    key, other = distributed.new_key("stop"), distributed.new_key("stop")
    assert key != other
    assert distributed.first_word(key) == ""
    assert distributed.first_word(key, "7") == "7"
    assert distributed.first_word(key, "8") == "7"
    assert distributed.first_word(other) == ""
    store.values[other] = "9"
    assert distributed.first_word(other) == "9"


def test_without_the_store_process_0_is_gone(joined, monkeypatch):
    def unavailable(key):
        raise jax.errors.JaxRuntimeError("UNAVAILABLE: Socket closed")

    monkeypatch.setattr(joined(1), "key_value_try_get", unavailable)
    with pytest.raises(PeerLost, match="process 0 is gone: UNAVAILABLE"):
        distributed.first_word("key")


def test_errors_that_mean_another_process(joined):
    gloo = RuntimeError("Gloo all-reduce failed: Connection reset by peer")
    assert not distributed.is_peer_loss(gloo)  # alone there is no other
    assert distributed.is_peer_loss(PeerLost("late"))
    joined()
    assert distributed.is_peer_loss(gloo)
    assert not distributed.is_peer_loss(ValueError("shapes differ"))
    assert not distributed.is_peer_loss(None)


@pytest.mark.parametrize(
    ("error", "waits"), [(PeerLost("late"), False), (ValueError("shapes"), True)]
)
def test_nobody_waits_for_a_save_with_who_is_gone(tmp_path, monkeypatch, error, waits):
    waited, dog = [], watchdog.Watchdog(0)
    monkeypatch.setattr(Checkpointer, "wait", lambda self: waited.append("wait"))
    checkpointer = Checkpointer(tmp_path)
    with pytest.raises(type(error)), checkpointer, loop._all_saved(checkpointer, dog):
        raise error
    # In the loop and when the folder is let go.
    assert waited == ["wait", "wait"] * waits


# ------------------------------------------------------------ two real processes


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Returns what each process of `distributed_worker.py` found."""
    folder, port = tmp_path_factory.mktemp("two"), process_toys.free_port()
    with process_toys.gang(folder / "logs") as gang:
        for number in range(2):
            gang.start([WORKER, folder, 2, number, port], devices=2)
        assert gang.wait(200) == [0, 0], "\n".join(gang.logs())
    return [json.loads((folder / f"{n}.json").read_text()) for n in range(2)]


@pytest.mark.battery
def test_two_processes_meet(two):
    assert [found["first"] for found in two] == [True, False]
    assert [found["devices"] for found in two] == [[4, 2], [4, 2]]
    for found in two:
        heard = {"0": "I am 0", "1": "I am 1"}
        assert found["meet"]["exchanged"] == [heard] * 3
    first, second = (found["meet"] for found in two)
    assert first["all_do"] == f"UserError: no room on this host (process 1 on {HOST})"
    assert second["all_do"] == "UserError: no room on this host"
    # What process 1 would do wrong it does not do.
    assert first["first_only"] == second["first_only"] == ""
    assert [part["first_does"][1] for part in (first, second)] == [[0], []]
    assert [part["first_then_others"][0] for part in (first, second)] == [0, 1]
    assert first["first_then_others"][1] < second["first_then_others"][1]


@pytest.mark.battery
def test_sigterm_is_nobodys_until_the_loop_begins(two):
    # JAX's preemption service is on, and its handler would swallow it.
    assert [found["sigterm is caught"] for found in two] == [False, False]


@pytest.mark.battery
def test_two_processes_name_the_late_one(two):
    late = f"PeerLost: barrier 'tea': process 1 on {HOST} did not come within 1 s"
    assert two[0]["meet"]["late"] == late
    assert "process 1 came when others had given up" in two[1]["meet"]["late"]


@pytest.mark.battery
def test_two_processes_stop_at_the_same_step(two):
    assert two[0]["stop"] == two[1]["stop"]
    by_jax = two[0]["stop"].pop("by JAX")
    assert by_jax[0], by_jax
    assert by_jax[2] is True, by_jax
    # Two steps after the first who was asked.
    assert two[0]["stop"] == {
        "one": 6,
        "both": 7,
        "later": 8,
        "nobody": "settled: False",
        "at the last step": "settled: True",
        "after the last step": "settled: True",
    }


@pytest.mark.battery
def test_two_processes_hold_a_batch_together(two):
    upper = [[0, 1, 2, 3], [4, 5, 6, 7]]
    both = [list(range(8))] * 2
    expected = {
        "4 x 1 x 1": upper,
        "1 x 4 x 1": upper,
        "1 x 1 x 4": both,
        "2 x 1 x 2": upper,
    }
    for name, rows in expected.items():
        assert [found["rows"][name]["rows"] for found in two] == rows
        for found in two:
            part = found["rows"][name]
            assert part["same"]
            assert not part["addressable"]
            assert part["sum"] == sum(range(24))


@pytest.mark.battery
def test_two_processes_put_and_fetch(two):
    for found in two:
        places = found["places"]
        assert places["shards"] == [[1, 3], [1, 3]]  # of four rows
        assert places["untouched"]
        assert places["equal"] == [True, True, True]
        assert places["whole"]
        assert places["plain"] == 3


@pytest.mark.battery
def test_damage_that_one_process_sees_sends_both_to_the_older_checkpoint(two):
    for found in two:
        assert found["checkpoints"] == {
            "written": ["1", "2"],
            "equal": True,
            "equal_older": True,
            "left": ["1", "2.damaged"],
        }
