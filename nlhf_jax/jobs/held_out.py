# SPDX-License-Identifier: Apache-2.0
"""What a policy is worth on held-out prompts while it trains."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from nlhf_jax import distributed
from nlhf_jax.data import batches as data_batches
from nlhf_jax.evaluation.bounds import gain_of_the_best
from nlhf_jax.jobs import generation, judges, outside_steps
from nlhf_jax.jobs.policies import Policy
from nlhf_jax.sequences import has_eos
from nlhf_jax.settings import SamplingSettings
from nlhf_jax.types import POLICY, REFERENCE, Params, Responses, TrainState


class HeldOut:
    """Answers the same prompts at each evaluation and compares the answers.

    Everything is sampled at temperature 1, independently at each step. Answers are kept
    in a folder, so that a resumed run compares with what it had answered before.
    """

    def __init__(
        self,
        reference: Policy,
        judge: judges.LoadedJudge | outside_steps.Reader,
        data: data_batches.SupervisedData,
        *,
        num_prompts: int,
        num_gap_samples: int,
        max_decode_length: int,
        seed: int,
        folder: pathlib.Path,
    ):
        """Draws the reference's answers.

        Args:
          reference: the policy that is compared with, and its network.
          judge: the learned preference model, where there is one, or a judge of texts
            that has those of `data`.
          data: held-out prompts.
          num_prompts: how many of them, from the first one.
          num_gap_samples: candidates, and as many opponents, of the lower bound of the
            duality gap; 0 leaves it out.
          max_decode_length: longest response in tokens.
          seed: of sampling.
          folder: where the answers are kept, STEP.npz; made when the first are.
        """
        rows = np.arange(min(num_prompts, data.num_examples))
        self._prompts = data.take(rows).prompts
        self._reference, self._judge = reference, judge
        self._num_gap_samples = num_gap_samples
        self._decode = generation.Generator(
            reference.network,
            reference.vocabulary,
            speaker=generation.policy_speaker(SamplingSettings(max_decode_length)),
            max_decode_length=max_decode_length,
            batch_size=len(rows),
        )
        self._log_ratio = generation.LogRatio(reference.network, len(rows))
        self._policy_key, reference_key = jax.random.split(jax.random.key(seed))
        self._by_reference = self._answers(reference.params, reference_key)
        self._folder = folder

    def _answers(self, params: Params, key: jax.Array):
        return self._decode({POLICY: params}, self._prompts, key).responses

    def _preferences(self, first, second) -> np.ndarray:
        return self._judge.preferences(self._prompts, first, second)

    def __call__(self, state: TrainState) -> dict[str, float]:
        """Returns the metrics of the policy in `state`."""
        params, step = state.param_sets[POLICY], int(state.step)
        key = jax.random.fold_in(self._policy_key, step)
        responses = self._answers(params, key)
        param_sets = {POLICY: params, REFERENCE: self._reference.params}
        ratio_B = self._log_ratio(param_sets, self._prompts, responses)
        ended_B = has_eos(
            *(jnp.asarray(leaf) for leaf in responses), self._reference.network.eos_id
        )
        found = {
            "eval/kl": float(np.mean(ratio_B)),
            "eval/length": float(responses.mask_BT.sum(axis=1).mean()),
            "eval/eos_rate": float(np.asarray(ended_B).mean()),
        }
        if self._judge.compares:
            found |= self._judged(params, responses, self._before(step), key)
        distributed.first_does("answers", lambda: self._keep(step, responses))
        return found

    def _keep(self, step: int, responses: Responses) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        np.savez_compressed(self._folder / f"{step}.npz", **responses._asdict())

    def _before(self, step: int) -> Responses | None:
        """Returns what was answered at the last evaluation before `step`."""
        kept = [int(f.stem) for f in self._folder.glob("*.npz") if f.stem.isdecimal()]
        newest = max((one for one in kept if one < step), default=-1)
        # What process 0 sees holds for all: they must ask the judge the same questions.
        newest = int(distributed.exchange("answers before", str(newest))[0])
        if newest < 0:
            return None
        file = self._folder / f"{newest}.npz"
        with np.load(file, allow_pickle=False) as answers:
            return Responses(answers["tokens_BT"], answers["mask_BT"])

    def _judged(
        self, params: Params, responses, before: Responses | None, key: jax.Array
    ) -> dict[str, float]:
        wins_B = self._preferences(responses, self._by_reference)
        found = {"eval/win_rate_reference": float(np.mean(wins_B))}
        if before is not None:
            wins_B = self._preferences(responses, before)
            found["eval/win_rate_last"] = float(np.mean(wins_B))
        if self._num_gap_samples:
            gain_B = self._gain(params, jax.random.fold_in(key, 1))
            error = gain_B.std(ddof=1) / np.sqrt(len(gain_B)) if len(gain_B) > 1 else 0
            found["eval/duality_gap"] = 2 * float(gain_B.mean())
            found["eval/duality_gap_error"] = 2 * float(error)
        return found

    def _gain(self, params: Params, key: jax.Array) -> np.ndarray:
        """Returns what the best of n samples wins against the policy, by prompt."""
        keys = jax.random.split(key, 2 * self._num_gap_samples)
        drawn = [self._answers(params, key) for key in keys]
        candidates = drawn[: self._num_gap_samples]
        opponents = drawn[self._num_gap_samples :]
        preference_BNC = np.stack(
            [
                np.stack([self._preferences(y, z) for z in opponents], axis=-1)
                for y in candidates
            ],
            axis=1,
        )
        return gain_of_the_best(preference_BNC)
