# SPDX-License-Identifier: Apache-2.0
"""A judge outside of the compiled step: a Python function that reads texts.

Whatever it does, asking a service or a model of another framework, it runs on the host
while the devices go on with what they have (`nlhf_jax.jobs.outside_steps`).
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from nlhf_jax.checks import UserError, check_integer
from nlhf_jax.types import Algorithm, Judge

Texts = Sequence[str]


@dataclasses.dataclass(frozen=True)
class OutsideJudge:
    """A function of texts as the judge, and how a step asks it.

        P(first > second | prompt) = function(prompts, firsts, seconds)

    with one number in [0, 1] for each row of the three lists, which have one length.
    Texts are those of the data, before tokenisation and cutting, and the responses
    without their end token. With `both_orders` it is (P(y > y') + 1 - P(y' > y)) / 2,
    so that a judge who favours a place favours nobody.

    A run that resumes is the run that never stopped, bit for bit, if the function gives
    the same numbers for the same texts.

    Attributes:
      function: see above; it is called by one thread at a time.
      num_parts: parts of a batch, at least 1; while the judge reads one, the responses
        of the next are decoded. All are drawn from the same policy, the one before the
        step's update. The more parts, the less of the judge's time is waited for, and
        the less the devices do at once while they decode.
      both_orders: whether each pair is asked twice.
      overlaps: whether a part is decoded while another is read; without, they take
        turns, with the same numbers.

    Raises:
      UserError: something that cannot be called, or less than one part.
    """

    function: Callable[..., Sequence[float]]
    num_parts: int = 2
    both_orders: bool = False
    overlaps: bool = True

    def __post_init__(self):
        if not callable(self.function):
            raise UserError(
                "the function of OutsideJudge must be a function of (prompts, firsts, "
                f"seconds), as in OutsideJudge.function = @mine, got {self.function!r}"
            )
        check_integer("num_parts of OutsideJudge", self.num_parts, 1)

    def preferences(
        self, prompts: Texts, firsts: Texts, seconds: Texts
    ) -> Float[np.ndarray, "B"]:
        """Returns P(first > second) in [0, 1], float32.

        Raises:
          UserError: the function gave something else than a number in [0, 1] for each
            row. What the function itself raises passes through.
        """
        first_B = self._asked(prompts, firsts, seconds)
        if not self.both_orders:
            return first_B.astype(np.float32)
        second_B = self._asked(prompts, seconds, firsts)
        return (0.5 + 0.5 * (first_B - second_B)).astype(np.float32)

    def _asked(
        self, prompts: Texts, firsts: Texts, seconds: Texts
    ) -> Float[np.ndarray, "B"]:
        given = self.function(list(prompts), list(firsts), list(seconds))
        try:
            found_B = np.asarray(given, np.float64)
        except (TypeError, ValueError):
            raise UserError(_expected(len(prompts), f"{given!r:.80}")) from None
        if found_B.shape != (len(prompts),):
            raise UserError(_expected(len(prompts), f"shape {list(found_B.shape)}"))
        wrong = np.flatnonzero(~((found_B >= 0) & (found_B <= 1)))
        if wrong.size:
            row = wrong[0]
            raise UserError(
                _expected(len(prompts), f"{found_B[row]} for pair {row + 1}")
            )
        return found_B


def _expected(num_rows: int, got: str) -> str:
    return (
        f"the outside judge must give {num_rows} numbers in [0, 1], one for each pair, "
        f"got {got}"
    )


def check_serves(algorithm: Algorithm) -> None:
    """Checks that an algorithm asks what an outside judge can answer.

    Raises:
      UserError: it rates responses, or needs a judge before its own update is done.
    """
    if len(algorithm.parts) > 1:
        raise UserError(
            f"{algorithm.name} draws and learns {len(algorithm.parts)} times a step, "
            "and OutsideJudge serves those that do once, as nash_md_pg; give a "
            "PREFERENCE_CHECKPOINT instead"
        )
    if algorithm.ratings:
        raise UserError(
            f"{algorithm.name} rates responses, and OutsideJudge compares them; give a "
            "REWARD_CHECKPOINT instead"
        )


def indifferent() -> Judge:
    """Returns the judge that calls everything a tie: it stands for one on the host.

    With it a step has the shapes and, the judge aside, the costs of the real one.
    """

    def preference(frozen: Any, prompts: Any, first: Any, second: Any):
        del frozen, prompts, second
        return jnp.full(first.tokens_BT.shape[:1], 0.5, jnp.float32)

    def reward(frozen: Any, prompts: Any, responses: Any):
        del frozen, prompts
        return jnp.zeros(responses.tokens_BT.shape[:1], jnp.float32)

    return Judge(preference, reward)
