# SPDX-License-Identifier: Apache-2.0
"""The step with a judge on the host: while it reads one part, the next is decoded.

    devices   draw 0 | draw 1 | draw 2 |        | learn
    judge            | read 0 | read 1 | read 2 |

The policy is the same for all parts, that before the update, so that nothing is
learned from another policy's responses. The order of the host's calls changes no
number.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Float, Int

from nlhf_jax import daemon_threads, distributed, partitioning, speed
from nlhf_jax.checks import UserError
from nlhf_jax.data import batches as data_batches
from nlhf_jax.data.order import example_order
from nlhf_jax.outside_step import JudgedPrompts
from nlhf_jax.preferences.outside import OutsideJudge
from nlhf_jax.settings import LoopSettings, MeshSettings
from nlhf_jax.types import ParamSets, PromptBatch, Responses, TrainState

JUDGING, WAITED = "time/judging", "time/judging_waited"


def check(judge: OutsideJudge | None, loop: LoopSettings, mesh: MeshSettings) -> None:
    """Checks that a batch can be judged on the host, where there is such a judge.

    Raises:
      UserError: the batch cannot be cut into so many parts, or there are several
        processes.
    """
    if judge is None:
        return
    check_parts(judge, loop)
    if distributed.num_processes() > 1:
        raise UserError(
            "OutsideJudge is asked by one process, got "
            f"{distributed.num_processes()} processes"
        )
    device_mesh = partitioning.make_mesh(mesh)
    parts = judge.num_parts, "num_parts of OutsideJudge"
    partitioning.check_batch_size(loop.batch_size, device_mesh, *parts)


def check_parts(judge: OutsideJudge | None, loop: LoopSettings) -> None:
    """Checks what needs no devices of a judge on the host, where there is one.

    Raises:
      UserError: the batch cannot be cut into so many parts.
    """
    if judge is not None and loop.batch_size % judge.num_parts:
        raise UserError(
            f"num_parts of OutsideJudge must divide batch_size {loop.batch_size}, got "
            f"{judge.num_parts}"
        )


def batch(
    data: data_batches.SupervisedData,
    seed: int,
    batch_size: int,
    step: int,
    rows: Int[np.ndarray, "R"],
) -> JudgedPrompts:
    """Returns rows of a step's batch, which say where their texts are."""
    _, indices_B = example_order(seed, step, batch_size, data.num_examples)
    prompts = data.batch(seed, step, batch_size, rows).prompts
    return JudgedPrompts(prompts, indices_B[rows].astype(np.int32))


@dataclasses.dataclass(frozen=True)
class Reader:
    """A judge of texts, given responses as tokens.

    Attributes:
      judge: reads texts.
      vocabulary: turns tokens into texts.
      prompt_texts: of all examples of the data, by their rows.
    """

    judge: OutsideJudge
    vocabulary: Any
    prompt_texts: Sequence[str]

    @property
    def compares(self) -> bool:
        """Whether it answers comparisons: always."""
        return True

    def answers(
        self,
        rows_B: Int[np.ndarray, "B"],
        responses: Sequence[Responses],
        comparisons: Sequence[tuple[int, int]],
    ) -> tuple[Float[np.ndarray, "B"], ...]:
        """Returns P(i > j) for each comparison (i, j); the judge is called once.

        Args:
          rows_B: the prompts' rows in the data.
          responses: of each speaker, on the host.
          comparisons: pairs of speakers' indices.

        Raises:
          UserError: a row that the data do not have, as of a batch of another run.
        """
        last = max((int(row) for row in rows_B), default=-1)
        if last >= len(self.prompt_texts):
            raise UserError(
                f"the batch names row {last} of the data, which have "
                f"{len(self.prompt_texts)} rows, counted from 0: it is of other data"
            )
        texts = [
            data_batches.decode_responses(*one, self.vocabulary) for one in responses
        ]
        prompts = [self.prompt_texts[row] for row in rows_B]
        firsts = [text for i, _ in comparisons for text in texts[i]]
        seconds = [text for _, j in comparisons for text in texts[j]]
        asked = prompts * len(comparisons)
        found = self.judge.preferences(asked, firsts, seconds)
        return tuple(np.split(found, len(comparisons)))

    def preferences(
        self, prompts: PromptBatch, first: Responses, second: Responses
    ) -> Float[np.ndarray, "B"]:
        """Returns P(first > second) for the first examples of the data, in order."""
        del prompts  # their texts are at hand, before they were cut
        rows = np.arange(len(first.tokens_BT))
        return self.answers(rows, (first, second), ((0, 1),))[0]


@dataclasses.dataclass(frozen=True)
class Halves:
    """A step as two pure functions and a judge on the host between them.

    Attributes:
      draw: (state, frozen, prompts, key, part) -> (samples, decode steps).
      learn: (state, frozen, prompts, samples, decode steps, preferences) ->
        (state, metrics), the last three one per part.
      comparisons: pairs of speakers' indices that the judge is asked.
      reader: the judge.
    """

    draw: Callable[..., Any]
    learn: Callable[..., tuple[TrainState, dict]]
    comparisons: tuple[tuple[int, int], ...]
    reader: Reader


class OutsideStep:
    """(state, frozen, batch, key) -> (state, metrics), compiled; the state is donated.

    Two programs: one draws a part and serves all of them, the other learns. At most one
    part is drawn ahead of the judge.
    """

    def __init__(
        self, halves: Halves, mesh: Mesh, lie: partitioning.StepShardings
    ) -> None:
        """Compiles nothing yet.

        Args:
          halves: what is compiled, and who judges.
          mesh: of devices.
          lie: where state and frozen sets lie.
        """
        rows, whole = partitioning.batch_sharding(mesh), partitioning.replicated(mesh)
        self.mesh, self._halves = mesh, halves
        self._lie = rows, whole
        self._num_parts = halves.reader.judge.num_parts
        self._draw = partitioning.CompiledFunction(
            halves.draw,
            mesh,
            in_shardings=(lie.state, lie.frozen, rows, whole, whole),
            out_shardings=(rows, whole),
        )
        self._learn = partitioning.CompiledFunction(
            halves.learn,
            mesh,
            state_sharding=lie.state,
            in_shardings=(lie.state, lie.frozen, rows, rows, whole, rows),
            out_shardings=(lie.state, whole),
            donate_argnums=0,
        )

    @property
    def num_compilations(self) -> int:
        """How often the half that was compiled more often was; 1 is right."""
        return max(self._draw.num_compilations, self._learn.num_compilations)

    def compile_ahead(
        self, state: TrainState, frozen: ParamSets, batch: JudgedPrompts, key: jax.Array
    ) -> speed.Compilation:
        """Compiles both halves for arguments like these; see `speed.compile_ahead`."""
        prompts = batch.prompts
        part = np.int32(0)
        drawing = speed.compile_ahead(self._draw, state, frozen, prompts, key, part)
        # Said to lie where they will, else the call would find another program.
        drawn = [
            jax.tree.map(functools.partial(_abstract, sharding), one)
            for one, sharding in zip(
                jax.eval_shape(self._halves.draw, state, frozen, prompts, key, part),
                self._lie,
                strict=True,
            )
        ]
        size = len(batch.rows_B) // self._num_parts
        answer = jax.ShapeDtypeStruct((size,), np.float32)
        answers = (answer,) * len(self._halves.comparisons)
        parts = ([one] * self._num_parts for one in (*drawn, answers))
        learning = speed.compile_ahead(self._learn, state, frozen, prompts, *parts)
        return learning.with_others(drawing, self._num_parts)

    def __call__(
        self, state: TrainState, frozen: ParamSets, batch: JudgedPrompts, key: jax.Array
    ) -> tuple[TrainState, dict[str, Any]]:
        """Takes one step; the metrics say how long the judge took."""
        rows_MP = np.asarray(batch.rows_B).reshape(-1, self._num_parts).T
        ahead = int(self._halves.reader.judge.overlaps)
        drawn, done_at, answers, judged_at = [], [], [], []
        for number in range(self._num_parts + ahead):
            if number < self._num_parts:
                part = np.int32(number)
                args = (state, frozen, batch.prompts, key, part)
                drawn.append(self._draw(*args))
                done_at.append(_time_of(drawn[-1]))
            if number >= ahead:
                read = number - ahead
                found, when = self._read(rows_MP[read], drawn[read][0])
                answers.append(found)
                judged_at.append(when)
        samples, num_steps = zip(*drawn, strict=True)
        parts = (list(samples), list(num_steps), answers)
        state, metrics = self._learn(state, frozen, batch.prompts, *parts)
        return state, metrics | judging(judged_at, done_at, ahead)

    def _read(self, rows_P: Int[np.ndarray, "P"], samples: Sequence[Any]) -> tuple:
        """Returns the judge's answers to one part, and when it began and ended."""
        responses = jax.device_get([one.responses for one in samples])
        start = time.perf_counter()
        found = self._halves.reader.answers(rows_P, responses, self._halves.comparisons)
        return found, (start, time.perf_counter())


def _abstract(sharding: NamedSharding, leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(
        leaf.shape, leaf.dtype, sharding=sharding, weak_type=leaf.weak_type
    )


def _time_of(arrays: Any) -> Future:
    """Notes when devices are done; it never holds up the step, nor the process."""
    found: Future = Future()

    def wait() -> None:
        try:
            jax.block_until_ready(arrays)
            found.set_result(time.perf_counter())
        except BaseException as error:  # raised where the time is asked for
            found.set_exception(error)

    daemon_threads.start(wait, "devices")
    return found


def judging(
    judged_at: Sequence[tuple[float, float]], done_at: Sequence[Future], ahead: int
) -> dict[str, float]:
    """Returns the seconds that the judge took, and those in which no device had work.

    Args:
      judged_at: when the judge began and ended with each part.
      done_at: when each part's responses were there.
      ahead: parts that are decoded while one is judged.
    """
    took = waited = 0.0
    for number, (start, end) in enumerate(judged_at):
        busy_until = start
        if ahead and number + 1 < len(done_at):
            busy_until = min(max(start, done_at[number + 1].result()), end)
        took += end - start
        waited += end - busy_until
    return {JUDGING: took, WAITED: waited}
