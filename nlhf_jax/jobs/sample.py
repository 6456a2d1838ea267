# SPDX-License-Identifier: Apache-2.0
"""The sampling job: print what a policy answers to a prompt."""

import pathlib
import sys
from collections.abc import Mapping, Sequence

from nlhf_jax.checks import UserError, check_range
from nlhf_jax.data.prompts import OWN_IF_ANY
from nlhf_jax.jobs.speakers import check_prompts, load_speaker, with_the_rest


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
    mixture: Mapping[str, float] | None = None,
    chat_template: str = OWN_IF_ANY,
    system_prompt: str = "",
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
      mixture: more model folders -> their weights; the policy's is what is left to one.
      chat_template: "auto" asks as the policy was asked in training, or where its
        folder does not say, in its own chat template if there is one; "" leaves prompts
        as they are; "model" or a file as in `DataSettings`.
      system_prompt: what the template says before the prompt; with "auto", "" is that
        of training.
      seed: of sampling.

    Raises:
      UserError: an empty prompt, a missing folder, or settings out of range.
    """
    check_range("beta", beta, 0.0, 1.0)
    if beta and not reference_checkpoint:
        raise UserError(
            f"beta {beta} mixes in the reference: reference_checkpoint must name a "
            "model folder, got ''"
        )
    texts = read_prompts(prompt, prompts_file)
    others = dict(mixture or {})
    others[reference_checkpoint] = others.get(reference_checkpoint, 0.0) + beta
    speaker = load_speaker(
        with_the_rest(checkpoint, {k: w for k, w in others.items() if k}),
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        max_decode_length=max_decode_length,
        chat_template=chat_template,
        system_prompt=system_prompt,
    )
    for answers in speaker(texts, num_samples=num_samples, seed=seed):
        for text in answers:
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
    if not texts:
        raise UserError(f"prompts_file {prompts_file!r} is empty")
    check_prompts(texts)
    return texts
