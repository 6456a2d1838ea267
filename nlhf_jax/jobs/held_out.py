# SPDX-License-Identifier: Apache-2.0
"""What a policy is worth on held-out prompts while it trains."""

import jax
import jax.numpy as jnp
import numpy as np

from nlhf_jax.data import batches as data_batches
from nlhf_jax.evaluation.bounds import gain_of_the_best
from nlhf_jax.jobs import generation, judges
from nlhf_jax.jobs.policies import Policy
from nlhf_jax.sequences import has_eos
from nlhf_jax.settings import SamplingSettings
from nlhf_jax.types import POLICY, REFERENCE, Params, TrainState


class HeldOut:
    """Answers the same prompts at each evaluation and compares the answers.

    Everything is sampled at temperature 1. The reference answers once, with its own
    key; the policy's key is the same at each evaluation.
    """

    def __init__(
        self,
        reference: Policy,
        judge: judges.LoadedJudge,
        data: data_batches.SupervisedData,
        *,
        num_prompts: int,
        num_gap_samples: int,
        max_decode_length: int,
        seed: int,
    ):
        """Draws the reference's answers.

        Args:
          reference: the policy that is compared with, and its network.
          judge: the learned preference model, where there is one.
          data: held-out prompts.
          num_prompts: how many of them, from the first one.
          num_gap_samples: candidates, and as many opponents, of the lower bound of the
            duality gap; 0 leaves it out.
          max_decode_length: longest response in tokens.
          seed: of sampling.
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
        self._last = None

    def _answers(self, params: Params, key: jax.Array):
        return self._decode({POLICY: params}, self._prompts, key).responses

    def _preferences(self, first, second) -> np.ndarray:
        return self._judge.preferences(self._prompts, first, second)

    def __call__(self, state: TrainState) -> dict[str, float]:
        """Returns the metrics of the policy in `state`."""
        params = state.param_sets[POLICY]
        responses = self._answers(params, self._policy_key)
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
        if "preference" in self._judge.frozen:
            found |= self._judged(params, responses)
        self._last = responses
        return found

    def _judged(self, params: Params, responses) -> dict[str, float]:
        wins_B = self._preferences(responses, self._by_reference)
        found = {"eval/win_rate_reference": float(np.mean(wins_B))}
        if self._last is not None:
            wins_B = self._preferences(responses, self._last)
            found["eval/win_rate_last"] = float(np.mean(wins_B))
        if self._num_gap_samples:
            gain_B = self._gain(params)
            error = gain_B.std(ddof=1) / np.sqrt(len(gain_B))
            found["eval/duality_gap"] = 2 * float(gain_B.mean())
            found["eval/duality_gap_error"] = 2 * float(error)
        return found

    def _gain(self, params: Params) -> np.ndarray:
        """Returns what the best of n samples wins against the policy, by prompt."""
        keys = jax.random.split(
            jax.random.fold_in(self._policy_key, 1), 2 * self._num_gap_samples
        )
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
