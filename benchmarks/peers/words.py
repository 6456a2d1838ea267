# SPDX-License-Identifier: Apache-2.0
"""A tokenizer of made-up words for trainers that insist on text."""

from typing import Any

from benchmarks.sizes import Size

PAD, UNKNOWN, BEGIN, FIRST_WORD = 0, 1, 2, 10


def word(token_id: int) -> str:
    """Returns the text of an id."""
    names = {PAD: "<pad>", UNKNOWN: "<unk>", BEGIN: "<s>"}
    return names.get(token_id, f"w{token_id}")


def prompts(size: Size, rows: int, seed: int = 0) -> list[str]:
    """Returns texts of S words each."""
    import random

    draw = random.Random(seed)
    ids = range(FIRST_WORD, size.vocab_size)
    return [
        " ".join(word(draw.choice(ids)) for _ in range(size.prompt_length))
        for _ in range(rows)
    ]


def tokenizer(size: Size) -> Any:
    """Returns a `transformers` tokenizer, one id a word.

    Its end token is one past the model's last logit, so that no model can say it.
    """
    import tokenizers
    import transformers

    vocabulary = {word(token_id): token_id for token_id in range(size.vocab_size)}
    vocabulary["</s>"] = size.vocab_size
    model = tokenizers.models.WordLevel(vocabulary, unk_token=word(UNKNOWN))
    inner = tokenizers.Tokenizer(model)
    inner.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token=word(PAD),
        unk_token=word(UNKNOWN),
        eos_token="</s>",
        padding_side="left",
    )


class PlainTokenizer:
    """The same words for frameworks that ask for a few methods only."""

    def __init__(self, size: Size):
        self._size = size

    def encode(self, text: str, **ignored: Any) -> list[int]:
        """Returns the ids of words `wN`."""
        return [int(one.removeprefix("w")) for one in text.split()]

    def decode(self, ids: Any, **ignored: Any) -> str:
        """Returns the words of ids."""
        return " ".join(word(int(token_id)) for token_id in ids)

    def bos_id(self) -> int:
        """Returns 0: nothing begins a prompt."""
        return PAD

    def pad_id(self) -> int:
        """Returns the id of padding."""
        return PAD

    def eos_id(self) -> int:
        """Returns an id past the last logit."""
        return self._size.vocab_size
