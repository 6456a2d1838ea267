# SPDX-License-Identifier: Apache-2.0
"""The sampling job: print what a policy answers to a prompt."""

import pathlib
import sys
from collections.abc import Sequence

import jax

from nlhf_jax.checks import LARGEST_SEED, UserError, check_integer, check_range
from nlhf_jax.data import batches as data_batches
from nlhf_jax.jobs import generation
from nlhf_jax.jobs.policies import load_policy
from nlhf_jax.settings import SamplingSettings
from nlhf_jax.types import POLICY, REFERENCE


def sample(
    *,
    checkpoint: str,
    prompt: str = "",
    prompts_file: str = "",
    num_samples: int = 1,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    max_decode_length: int = 0,
    reference_checkpoint: str = "",
    beta: float = 0.0,
    seed: int = 0,
) -> None:
    """Prints a policy's responses, one a line.

    Args:
      checkpoint: model folder of the policy.
      prompt: the prompt's text; "-" reads it from standard input.
      prompts_file: a text file with one prompt a line, instead of `prompt`.
      num_samples: responses per prompt.
      temperature: 0 is greedy.
      top_k: keep the k most likely tokens; 0 keeps all.
      top_p: keep the smallest set of tokens of this probability; 1 keeps all.
      max_decode_length: tokens at most; 0 takes the length of the model's training.
      reference_checkpoint: model folder of the reference, for a mixture.
      beta: weight of the reference in the mixture, in [0, 1].
      seed: of sampling.

    Raises:
      UserError: an empty prompt, a missing folder, or settings out of range.
    """
    check_integer("num_samples", num_samples, 1)
    check_range("seed", seed, -LARGEST_SEED, LARGEST_SEED)
    check_range("beta", beta, 0.0, 1.0)
    if beta and not reference_checkpoint:
        raise UserError(
            f"beta {beta} mixes in the reference: reference_checkpoint must name a "
            "model folder, got ''"
        )
    texts = read_prompts(prompt, prompts_file)
    policy = load_policy(checkpoint)
    lengths = policy.description.feature_lengths
    sampling = SamplingSettings(
        max_decode_length or lengths["targets"], temperature, top_k, top_p
    )
    param_sets, weights = {POLICY: policy.params}, {POLICY: 1.0}
    if beta:
        param_sets[REFERENCE] = load_policy(reference_checkpoint).params
        weights = {POLICY: 1.0 - beta, REFERENCE: beta}
    repeated = [text for text in texts for _ in range(num_samples)]
    prompts, num_cut = data_batches.prompt_batch(
        repeated, policy.vocabulary, lengths["inputs"]
    )
    if num_cut:
        print(
            f"nlhf: {num_cut // num_samples} prompt(s) longer than {lengths['inputs']} "
            "tokens were truncated",
            file=sys.stderr,
        )
    decode = generation.Generator(
        policy.network,
        policy.vocabulary,
        speaker=generation.policy_speaker(sampling, weights),
        max_decode_length=sampling.max_decode_length,
        batch_size=len(repeated),
    )
    for text in decode(param_sets, prompts, jax.random.key(seed)).texts:
        print(text)


def read_prompts(prompt: str, prompts_file: str) -> Sequence[str]:
    """Returns the prompts that the two flags name.

    Raises:
      UserError: both or neither given, no such file, or an empty prompt.
    """
    if bool(prompt) == bool(prompts_file):
        raise UserError(
            "give exactly one of --prompt and --prompts_file, got "
            f"prompt={prompt!r} and prompts_file={prompts_file!r}"
        )
    if prompts_file:
        path = pathlib.Path(prompts_file)
        if not path.is_file():
            raise UserError(f"prompts_file {prompts_file!r} does not exist")
        try:
            texts = path.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError:
            raise UserError(f"prompts_file {prompts_file!r} is not UTF-8") from None
    else:
        texts = [sys.stdin.read() if prompt == "-" else prompt]
    for number, text in enumerate(texts, start=1):
        if not text.strip():
            raise UserError(f"prompt {number} is empty")
    if not texts:
        raise UserError(f"prompts_file {prompts_file!r} is empty")
    return texts
