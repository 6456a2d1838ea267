# SPDX-License-Identifier: Apache-2.0
"""Our Nash-MD step as a side: one program, three programs, and the paper's judge.

python -m benchmarks.ours_step one --size tiny      # speaks the line protocol
"""

import functools

import jax

from benchmarks import ours
from benchmarks.protocol import Work, main, timed
from benchmarks.sizes import Size
from nlhf_jax import train_step
from nlhf_jax.optimizers import make_optimizer
from nlhf_jax.partitioning import CompiledFunction
from nlhf_jax.types import TrainState


def one(size: Size, kind: str = "reward") -> Work:
    """The whole step as one program, as `nlhf train` compiles it.

    The judge is a reward model through a Bradley-Terry sigmoid, which is what the
    peers have; `kind` "preference" is the pairwise model of the paper, whose every
    comparison reads prompt and both responses, in both orders.
    """
    run = ours.PolicyRun(size, kind)
    return Work(run.unit, run.facts)


def three(size: Size) -> Work:
    """The same step as three programs, as an outside judge would need it."""
    run = ours.PolicyRun(size)
    optimizer = make_optimizer(ours.OPTIMIZER, 1000)
    options = {"max_length": size.response_length}
    rollout = functools.partial(
        train_step.rollout, run.network, ours.ALGORITHM, **options
    )
    judged = functools.partial(train_step.judged, ours.ALGORITHM, run.judge)
    update = functools.partial(
        train_step.update, run.network, ours.ALGORITHM, optimizer
    )

    def learn(state, frozen, examples):
        state, metrics = update(state, dict(frozen) | state.param_sets, examples)
        return TrainState(state.step + 1, state.param_sets, state.opt_states), metrics

    programs = {
        "generate": CompiledFunction(rollout, run.mesh),
        "score": CompiledFunction(judged, run.mesh),
        "update": CompiledFunction(learn, run.mesh, donate_argnums=0),
    }

    def part(name, *args):
        seconds, result = timed(lambda: jax.block_until_ready(programs[name](*args)))
        parts[name] = seconds
        return result

    parts: dict[str, float] = {}

    def unit():
        sets = dict(run.frozen) | run.state.param_sets
        key = jax.random.fold_in(run.key, run.state.step)
        drawn = part("generate", sets, run.prompts, key, run.state.step)
        examples = part("score", run.frozen, run.prompts, drawn.samples)
        # The policy is in `sets` too, and donated here: it is not read again.
        run.state, _ = part("update", run.state, run.frozen, examples)
        return parts

    def facts():
        compilations = [one.num_compilations for one in programs.values()]
        return {"compilations": max(compilations)}

    return Work(unit, facts)


VARIANTS = {
    "one": one,
    "three": three,
    "pairwise": functools.partial(one, kind="preference"),
}

if __name__ == "__main__":
    raise SystemExit(main(VARIANTS, ours.PACKAGES))
