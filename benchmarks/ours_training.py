# SPDX-License-Identifier: Apache-2.0
"""Our supervised steps as sides: judges, and a language model of either kind.

python -m benchmarks.ours_training reward --size tiny      # speaks the protocol
"""

import functools

from benchmarks import ours
from benchmarks.protocol import Work, main
from benchmarks.sizes import Size
from nlhf_jax import supervised_step
from nlhf_jax.models.families import language_model


def judge(size: Size, kind: str) -> Work:
    """One update of a judge on B comparisons of S + T tokens a side.

    Our reward model reads the response twice, in its input and again where the score
    is taken: S + 2 T tokens a row and a few words, where a peer reads S + T.
    """
    network = ours.judge_network(size, kind)
    make = {
        "reward": supervised_step.make_reward_step,
        "preference": supervised_step.make_preference_step,
    }[kind]
    return _work(make, network, ours.comparisons_of(size))


def language(size: Size, is_t5: bool) -> Work:
    """One update of a language model on full prompts and responses.

    The decoder has 2 B rows of S + T tokens, the T5 has B rows; the loss is over T.
    """
    settings = ours.t5_settings(size) if is_t5 else ours.decoder_settings(size)
    rows = size.batch_size if is_t5 else 2 * size.batch_size
    batch = ours.targets_of(size, rows)
    return _work(supervised_step.make_sft_step, language_model(settings), batch)


def _work(make, network, batch) -> Work:
    unit, compiled = ours.supervised_run(make, network, batch)
    return Work(unit, lambda: {"compilations": compiled.num_compilations})


VARIANTS = {
    "reward": functools.partial(judge, kind="reward"),
    "preference": functools.partial(judge, kind="preference"),
    "language": functools.partial(language, is_t5=False),
    "t5": functools.partial(language, is_t5=True),
}

if __name__ == "__main__":
    raise SystemExit(main(VARIANTS, ours.PACKAGES))
