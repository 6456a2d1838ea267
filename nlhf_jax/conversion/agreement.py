# SPDX-License-Identifier: Apache-2.0
"""Whether `transformers` says of some weights what our network says of them.

Both compute in float32 on the CPU. Ours decodes greedily, from a padded batch and a
cache; theirs reads each whole sequence without either.
"""

import functools
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nlhf_jax import decoding
from nlhf_jax.checks import UserError
from nlhf_jax.conversion.shapes import nested
from nlhf_jax.conversion.tensors import Weights
from nlhf_jax.decoder_settings import DecoderOnlySettings, ModelSettings
from nlhf_jax.models.families import end_of, language_model
from nlhf_jax.models.t5 import START_ID
from nlhf_jax.types import POLICY, PromptBatch, Speaker

# Of the largest difference between two logits; of large logits, a part of the largest,
# since float32 has seven digits and a deep network loses two of them.
LIMIT, RELATIVE_LIMIT = 1e-4, 1e-5
NUM_TOKENS = 32
LONGEST_PROMPT = 256  # tokens; the end of a longer one is cut
PROMPTS = (
    "The quick brown fox jumps over the lazy dog.",
    "Summarise: the meeting of 3 May was moved to Tuesday, 10:30 am.",
    "def add(x, y):\n    return x + y\n",
)


class Agreement(NamedTuple):
    """What was compared, and how much it differs.

    Attributes:
      difference: largest absolute difference between two logits.
      largest: largest absolute logit.
      num_tokens: greedy tokens compared.
      num_others: those of them that are not theirs, ties apart.
    """

    difference: float
    largest: float
    num_tokens: int
    num_others: int

    @property
    def limit(self) -> float:
        """The largest difference that rounding may make."""
        return max(LIMIT, RELATIVE_LIMIT * self.largest)

    @property
    def is_good(self) -> bool:
        """Whether logits differ by `limit` at most and all tokens are the same."""
        return self.difference <= self.limit and self.num_others == 0

    def __str__(self):
        return (
            f"largest difference of logits {self.difference:.2e} (limit "
            f"{self.limit:.2g}, "
            f"largest logit {self.largest:.3g}), "
            f"{self.num_tokens - self.num_others} of {self.num_tokens} greedy tokens "
            "the same"
        )


def require(*, with_peft: bool = False) -> None:
    """Checks that what is compared with is installed.

    Args:
      with_peft: whether adapters are to be loaded, too.

    Raises:
      UserError: it is not; says how to install it.
    """
    try:
        import torch  # noqa: F401
        import transformers  # noqa: F401

        if with_peft:
            import peft  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"--check needs {error.name or 'transformers'}, which is not installed: "
            'pip install "nlhf_jax[hf]"'
        ) from None
    _quiet()


def _quiet() -> None:
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def load_theirs(path: pathlib.Path, dtype: str = "") -> Any:
    """Returns the model that `transformers` makes of a folder or a GGUF file.

    Args:
      path: what to load; nothing is fetched, and no code of it is run.
      dtype: the parameters are rounded to it; "" leaves them.

    Raises:
      UserError: it cannot be loaded, or not without tensors missing or left over.
    """
    import torch
    import transformers

    folder, more = path, {}
    if path.is_file():
        folder, more = path.parent, {"gguf_file": path.name}
    # Other files of weights are pickled.
    only = {} if more else {"use_safetensors": True}
    try:
        config = transformers.AutoConfig.from_pretrained(
            folder, local_files_only=True, **more
        )
        is_pair = config.is_encoder_decoder
        auto = "AutoModelForSeq2SeqLM" if is_pair else "AutoModelForCausalLM"
        model, told = getattr(transformers, auto).from_pretrained(
            folder,
            local_files_only=True,
            dtype=torch.float32,
            attn_implementation="eager",
            output_loading_info=True,
            **more,
            **only,
        )
    except Exception as error:  # of many kinds, and all mean the same
        text = " ".join(str(error).split())
        raise UserError(f"transformers cannot load {path}: {text:.300}") from error
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        names = sorted(map(str, told.get(kind, ())))
        if names and not more:
            raise UserError(f"transformers finds {kind} in {path}: {names[0]}")
    if dtype:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(parameter.to(getattr(torch, dtype)).float())
    return model.eval()


def with_adapters(model: Any, folder: pathlib.Path) -> Any:
    """Returns a model of `load_theirs` on which `peft` has put a folder's adapters.

    Raises:
      UserError: it cannot.
    """
    import peft

    try:
        return peft.PeftModel.from_pretrained(model, str(folder)).eval()
    except Exception as error:  # of many kinds, and all mean the same
        text = " ".join(str(error).split())
        raise UserError(f"peft cannot load {folder}: {text:.300}") from error


def compare(
    weights: Weights, model: Any, rows: Sequence[Sequence[int]], *, length: int
) -> Agreement:
    """Returns how far two models agree on prompts and on what ours says to them.

    Args:
      weights: ours; all are read.
      model: theirs.
      rows: ids of each prompt, at least one.
      length: tokens to decode greedily.
    """
    params = {
        path: jnp.asarray(tensor.read(), jnp.float32)
        for path, tensor in weights.tensors.items()
    }
    longest = max(map(len, rows))
    mask_BS = np.arange(longest)[None, :] < np.array([[len(row)] for row in rows])
    tokens_BS = np.zeros(mask_BS.shape, np.int32)
    tokens_BS[mask_BS] = np.concatenate([np.asarray(row, np.int32) for row in rows])
    prompts = PromptBatch(jnp.asarray(tokens_BS), jnp.asarray(mask_BS))
    decode = _decoder(weights.settings, length)
    tokens_BT, logits_BTV = map(np.asarray, decode(nested(params), prompts))
    is_pair = not isinstance(weights.settings, DecoderOnlySettings)
    differences, largest, num_others = [], 0.0, 0
    for row, tokens_T, logits_TV in zip(rows, tokens_BT, logits_BTV, strict=True):
        said_TV = _theirs(model, row, tokens_T, is_pair)
        differences.append(np.abs(said_TV - logits_TV).max())
        largest = max(largest, float(np.abs(said_TV).max()))
        chosen_T = np.take_along_axis(said_TV, tokens_T[:, None], axis=1)[:, 0]
        # Two tokens this close are a tie, which either may break.
        num_others += int((said_TV.max(axis=1) - chosen_T > 2 * LIMIT).sum())
    # numpy's maximum of numbers and NaN is NaN, which no limit allows.
    return Agreement(float(np.max(differences)), largest, tokens_BT.size, num_others)


@functools.cache
def _decoder(settings: ModelSettings, length: int) -> Any:
    """Returns (params, prompts) -> (tokens_BT, logits_BTV) of a network, compiled once.

    The responses are greedy and do not end.
    """
    network = language_model(settings)
    endless = network._replace(eos_id=-1)
    speaker = Speaker({POLICY: 1.0}, temperature=0.0)

    @jax.jit
    def decode(params, prompts):
        rollout = decoding.sample(
            endless,
            {POLICY: params},
            (speaker,),
            prompts,
            jax.random.key(0),
            max_length=length,
        )
        tokens_BT = rollout.samples[0].responses.tokens_BT
        return tokens_BT, network.logits(params, prompts, tokens_BT)

    return decode


def _theirs(
    model: Any, row: Sequence[int], tokens_T: np.ndarray, is_pair: bool
) -> np.ndarray:
    """Returns their logits_TV of a response's tokens, one row."""
    import torch

    before = [START_ID] if is_pair else list(row)
    known = torch.tensor([[*before, *tokens_T[:-1].tolist()]])
    with torch.no_grad():
        if is_pair:
            prompt = torch.tensor([list(row)])
            found = model(input_ids=prompt, decoder_input_ids=known).logits[0]
        else:
            found = model(known).logits[0, len(row) - 1 :]
    return found.numpy()


def prompt_rows(
    texts: Sequence[str], vocabulary: Any, weights: Weights
) -> list[list[int]]:
    """Returns the ids of some prompts as a network reads them.

    Args:
      texts: the prompts; none takes `PROMPTS`.
      vocabulary: of the model.
      weights: whose network it is; an encoder's prompt ends with its end token.
    """
    is_pair = not isinstance(weights.settings, DecoderOnlySettings)
    end = [end_of(weights.settings)]
    rows = []
    for text in texts or PROMPTS:
        ids = [int(i) for i in vocabulary.encode(text)][: LONGEST_PROMPT - 1]
        rows.append([*ids, *end] if is_pair or not ids else ids)
    return rows


def check(found: Agreement) -> str:
    """Returns what was compared, in words.

    Raises:
      UserError: the two do not agree.
    """
    if not found.is_good:
        raise UserError(f"--check: transformers does not agree: {found}")
    return f"agrees with transformers: {found}"
