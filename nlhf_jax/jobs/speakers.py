# SPDX-License-Identifier: Apache-2.0
"""Speakers served: prompts as text in, answers as text out, from any mixture of models.

What a game-theoretic method recommends is often no single model: Nash-MD's opponent is
the policy mixed with its reference, (1 - beta, beta). Here such a speaker is read from
model folders and decodes as it did in training, in the one decode loop.
"""

import math
import sys
from collections.abc import Mapping, Sequence

import jax

from nlhf_jax.checks import LARGEST_SEED, UserError, check_integer, check_range
from nlhf_jax.data import batches as data_batches
from nlhf_jax.data.prompts import OWN_IF_ANY, PromptFormat, prompt_format
from nlhf_jax.jobs import folders, generation
from nlhf_jax.jobs.policies import Policy, load_policy
from nlhf_jax.mixture import speaker_weights
from nlhf_jax.settings import SamplingSettings
from nlhf_jax.types import Params, Speaker

DECIMALS = 12  # of weights that are computed


class TextSpeaker:
    """A log-linear mixture of models that answers prompts.

    At each prefix log p(token) = sum_k weight_k log p_k(token) + const; token by token,
    as `types.Speaker` says.

    Attributes:
      policy: the first of its models; the others have its shape and vocabulary.
      weights: model folder -> weight.
      sampling: how tokens are drawn.
      form: what stands around a prompt's text.
    """

    def __init__(
        self,
        policy: Policy,
        params: Mapping[str, Params],
        weights: Mapping[str, float],
        sampling: SamplingSettings,
        form: PromptFormat | None = None,
    ):
        """Takes models that `load_speaker` has read."""
        self.form = form
        self.policy, self.weights, self.sampling = policy, dict(weights), sampling
        self._params = dict(params)
        self._generators: dict[int, generation.Generator] = {}

    def __call__(
        self,
        prompts: Sequence[str],
        *,
        num_samples: int = 1,
        seed: int = 0,
        batch_size: int = 0,
    ) -> list[list[str]]:
        """Returns `num_samples` answers to each prompt.

        Prompts longer than the model's are cut, which one line on standard error says.

        Args:
          prompts: texts, none of them blank.
          num_samples: answers per prompt.
          seed: the same seed, prompts and sizes give the same answers.
          batch_size: answers decoded at once; 0 decodes all of them. Each size is
            compiled once.

        Raises:
          UserError: no prompt, a blank one, or a number out of its range.
        """
        check_integer("num_samples", num_samples, 1)
        check_range("seed", seed, -LARGEST_SEED, LARGEST_SEED)
        check_integer("batch_size", batch_size, 0)
        check_prompts(prompts)
        repeated = [text for text in prompts for _ in range(num_samples)]
        length = self.policy.description.feature_lengths["inputs"]
        batch, num_cut = data_batches.prompt_batch(
            repeated, self.policy.vocabulary, length, self.form
        )
        if num_cut:
            print(
                f"nlhf: {num_cut // num_samples} prompt(s) longer than {length} tokens "
                "were truncated",
                file=sys.stderr,
            )
        decode = self._generator(batch_size or len(repeated))
        texts = decode(self._params, batch, jax.random.key(seed)).texts
        return [
            texts[start : start + num_samples]
            for start in range(0, len(texts), num_samples)
        ]

    def _generator(self, batch_size: int) -> generation.Generator:
        if batch_size not in self._generators:
            self._generators[batch_size] = generation.Generator(
                self.policy.network,
                self.policy.vocabulary,
                speaker=generation.policy_speaker(self.sampling, self.weights),
                max_decode_length=self.sampling.max_decode_length,
                batch_size=batch_size,
            )
        return self._generators[batch_size]


def load_speaker(
    mixture: str | Mapping[str, float],
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    max_decode_length: int = 0,
    chat_template: str = OWN_IF_ANY,
    system_prompt: str = "",
) -> TextSpeaker:
    """Reads a speaker from model folders.

    Nash-MD's opponent is `{"runs/nash": 1 - beta, "runs/sft": beta}`; averages,
    snapshots and adversaries are the folders that training wrote under `sets/`.

    Args:
      mixture: a model folder, or model folder -> its weight. Weights sum to one and may
        be negative, which steps away from a model.
      temperature: divides the mixed log-probabilities; 0 is greedy.
      top_k: keep the k most likely tokens; 0 keeps all.
      top_p: keep the smallest set of tokens of this probability; 1 keeps all.
      max_decode_length: tokens at most; 0 takes that of the first model's training.
      chat_template: "auto" asks as the first model was asked in training, or where its
        folder does not say, in its own chat template if there is one; "" leaves prompts
        as they are; "model" or a file as in `DataSettings`.
      system_prompt: what the template says before the prompt; with "auto", "" is that
        of training.

    Raises:
      UserError: a folder is missing, models differ in shape or vocabulary, or a number
        is out of its range.
    """
    weights = {mixture: 1.0} if isinstance(mixture, str) else dict(mixture)
    if not weights:
        raise UserError("a mixture must name at least one model folder, got {}")
    _check_finite(weights)
    speaker_weights(Speaker(weights), 0)
    first, *others = weights
    policy = load_policy(first)
    if chat_template == OWN_IF_ANY and policy.description.chat_template is not None:
        chat_template = policy.description.chat_template
        system_prompt = system_prompt or policy.description.system_prompt
    form = prompt_format(policy.vocabulary, chat_template, system_prompt)
    folders.check_same_vocabulary(*weights)
    params = {first: policy.params}
    for other in others:
        shape = folders.read_description(other).settings
        if shape != policy.description.settings:
            raise UserError(
                f"models of one mixture must have one shape, got {first!r} with "
                f"{policy.description.settings} and {other!r} with {shape}"
            )
        params[other] = load_policy(other).params
    sampling = SamplingSettings(
        max_decode_length or policy.response_length, temperature, top_k, top_p
    )
    return TextSpeaker(policy, params, weights, sampling, form)


def with_the_rest(first: str, others: Mapping[str, float]) -> dict[str, float]:
    """Returns a mixture in which `first` has what the others' weights leave to one.

    Models of weight 0 are left out.

    Raises:
      UserError: a weight is no finite number.
    """
    _check_finite(others)
    # Rounded, since 1 - 0.9 is not what was meant.
    rest = round(1 - sum(others.values()), DECIMALS)
    weights = {first: rest} | others | {first: rest + others.get(first, 0.0)}
    return {folder: weight for folder, weight in weights.items() if weight}


def _check_finite(weights: Mapping[str, float]) -> None:
    for folder, weight in weights.items():
        check_range(
            f"weight of {folder!r}",
            weight,
            -math.inf,
            math.inf,
            low_open=True,
            high_open=True,
        )


def check_prompts(prompts: Sequence[str]) -> None:
    """Raises a UserError unless there is a prompt and none of them is blank."""
    if isinstance(prompts, str):
        raise UserError(f"prompts must be a list of texts, got one text {prompts!r}")
    if not prompts:
        raise UserError("prompts must hold at least one text, got none")
    for number, text in enumerate(prompts, start=1):
        if not text.strip():
            raise UserError(f"prompt {number} is empty")
