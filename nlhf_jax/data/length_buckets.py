# SPDX-License-Identifier: Apache-2.0
"""How wide a batch is: a few widths, so that a step is compiled a few times only.

The order of the data does not depend on it, and the width is a function of the batch's
rows alone: a run that goes on sees the same batches.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from nlhf_jax.types import PromptBatch


def bucket(
    prompts: PromptBatch, indices_B: Int[np.ndarray, "B"], buckets: Sequence[int]
) -> int:
    """Returns the first of the buckets, or else S, that the prompts at `indices_B` fit.

    Every process finds the same, whichever rows it has. A prompt's padding says
    nothing, so the rows mean what they mean at any width.
    """
    if not buckets:
        return prompts.tokens_BS.shape[1]
    longest = int(prompts.mask_BS[indices_B].sum(axis=1).max())
    return next(
        width for width in (*buckets, prompts.tokens_BS.shape[1]) if longest <= width
    )


def first_columns(prompts: PromptBatch, width: int) -> PromptBatch:
    """Returns the prompts as wide as that."""
    return PromptBatch(*(leaf[:, :width] for leaf in prompts))
