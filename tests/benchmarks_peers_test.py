# SPDX-License-Identifier: Apache-2.0
"""Peers' sides as far as they can be tested without the peers."""

import importlib
import pathlib
import subprocess
import sys
import types

import pytest

from benchmarks import rows, sizes
from benchmarks.peers import t5x, trl_step, words
from benchmarks.peers.stepping import Stepper
from benchmarks.protocol import Absent

TINY = sizes.SIZES["tiny"]
pytestmark = pytest.mark.timeout(120)
FOLDER = pathlib.Path(t5x.__file__).parent


def test_every_peer_has_its_program():
    for many in rows.GROUPS.values():
        for side in many:
            if side.module.startswith(rows.PEERS):
                module = importlib.import_module(side.module)
                assert side.variant in module.VARIANTS, side.name
                assert side.environment, side.name


def test_peers_import_neither_their_framework_nor_ours():
    names = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem != "__init__")
    words = "".join(f"import benchmarks.peers.{name}\n" for name in names)
    words += "import sys\nprint(sorted(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", words], capture_output=True, text=True, check=True
    )
    loaded = {name.strip("[]',") for name in done.stdout.split()}
    heavy = {"torch", "transformers", "trl", "tunix", "easydel", "jax", "nlhf_jax"}
    assert len(names) > 5 and not heavy & loaded


@pytest.mark.parametrize(
    "path", sorted(FOLDER.glob("requirements-*.txt")), ids=lambda p: p.stem
)
def test_what_is_compared_with_has_its_exact_version(path):
    lines = [line for line in path.read_text().splitlines() if line[:1] not in "#"]
    name = path.stem.removeprefix("requirements-")
    pinned = [line.split("==")[0] for line in lines if "==" in line]
    assert name in {one.removeprefix("google-") for one in pinned}
    environments = {side.environment for many in rows.GROUPS.values() for side in many}
    assert name in environments


def test_a_stepper_lets_a_loop_go_once():
    seen = []

    def loop(stepper):
        for number in range(2):
            stepper.begin()
            seen.append(number)
            stepper.done()

    stepper = Stepper(loop)
    assert seen == []
    stepper.step()
    assert seen == [0]
    stepper.step()
    assert seen == [0, 1]
    with pytest.raises(RuntimeError, match="the loop has ended"):
        stepper.step()


def test_what_a_loop_raises_is_raised_where_the_step_was_asked():
    def loop(stepper):
        stepper.begin()
        raise ValueError("no paper")

    with pytest.raises(ValueError, match="no paper"):
        Stepper(loop).step()


def test_a_loop_that_fails_before_its_first_step_is_not_waited_for():
    def loop(stepper):
        raise ImportError("no trainer")

    with pytest.raises(ImportError, match="no trainer"):
        Stepper(loop).step()


def test_prompts_are_full_and_their_words_are_ids():
    texts = words.prompts(TINY, 3)
    plain = words.PlainTokenizer(TINY)
    for text in texts:
        ids = plain.encode(text)
        assert len(ids) == TINY.prompt_length
        assert min(ids) >= words.FIRST_WORD and max(ids) < TINY.vocab_size
        assert plain.decode(ids) == text
    assert len(set(texts)) == 3 and texts == words.prompts(TINY, 3)
    assert plain.eos_id() == TINY.vocab_size  # past the last logit
    assert plain.pad_id() == plain.bos_id() == words.PAD


def test_t5x_is_absent_and_says_what_is_missing(monkeypatch):
    with pytest.raises(ModuleNotFoundError, match="t5x"):
        t5x.side(TINY, "decode")
    monkeypatch.setitem(sys.modules, "t5x", types.ModuleType("t5x"))
    with pytest.raises(Absent, match="its decode side is not written"):
        t5x.side(TINY, "decode")


class Spiky:
    """A causal model that knows one next token, with a cache that counts."""

    def __init__(self, torch, successor):
        self._torch, self._successor, self.reads = torch, successor, []

    def __call__(self, input_ids, past_key_values, use_cache, logits_to_keep):
        past_key_values.append(input_ids.shape[1])
        self.reads.append(input_ids.shape[1])
        logits = self._torch.full((len(input_ids), 1, 8), -1e9)
        for row, last in enumerate(input_ids[:, -1].tolist()):
            logits[row, 0, self._successor(last)] = 0.0
        return types.SimpleNamespace(logits=logits)


def test_the_repaired_decode_has_a_cache_for_each_model_and_feeds_each_token_once():
    torch = pytest.importorskip("torch", reason="torch is not installed")
    models = [Spiky(torch, lambda last: (last + 1) % 8) for _ in range(2)]
    caches = {}

    def make_cache(model):
        return caches.setdefault(id(model), [])

    prompts = torch.tensor([[1, 2], [5, 6]])
    found = trl_step.decode(models, [0.5, 0.5], prompts, 3, make_cache)
    assert found.tolist() == [[1, 2, 3, 4, 5], [5, 6, 7, 0, 1]]
    assert [model.reads for model in models] == [[2, 1, 1]] * 2
    assert sorted(caches.values()) == [[2, 1, 1]] * 2


def test_the_repaired_decode_mixes_by_its_weights():
    torch = pytest.importorskip("torch", reason="torch is not installed")
    models = [Spiky(torch, lambda last: 3), Spiky(torch, lambda last: 4)]
    prompts = torch.tensor([[1, 2]])
    found = trl_step.decode(models, [1.0, 0.0], prompts, 2, lambda model: [])
    assert found.tolist() == [[1, 2, 3, 3]]
    found = trl_step.decode(models, [0.0, 1.0], prompts, 2, lambda model: [])
    assert found.tolist() == [[1, 2, 4, 4]]
