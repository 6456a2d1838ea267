# SPDX-License-Identifier: Apache-2.0
"""Shapes that all sides share, and the arithmetic that a step of them needs.

Standard library only: peers import it in environments of their own.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Size:
    """A Llama-like decoder (and a T5 of as many layers each side) and its batch.

    Attributes:
      num_layers: blocks L; a T5 has as many in its encoder and in its decoder.
      width: D.
      num_heads: H, each `width / num_heads` wide; as many of keys and values.
      mlp_dim: hidden width F of the gated feed-forward block.
      vocab_size: V; the output layer is not tied.
      batch_size: prompts B of a step; a training step has 2 B rows.
      prompt_length: tokens S of every prompt, without padding.
      response_length: new tokens T; no response ends earlier.
    """

    num_layers: int
    width: int
    num_heads: int
    mlp_dim: int
    vocab_size: int
    batch_size: int
    prompt_length: int
    response_length: int

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value < 1:
                raise ValueError(f"{field.name} must be at least 1, got {value}")
        if self.width % (2 * self.num_heads):
            raise ValueError(
                f"width must be a multiple of 2 x num_heads, got {self.width} and "
                f"{self.num_heads}"
            )

    @property
    def head_dim(self) -> int:
        """Width K of a head."""
        return self.width // self.num_heads

    @property
    def body_products(self) -> int:
        """Parameters in matrix products but the output's: L (4 D D + 3 D F)."""
        per_layer = 4 * self.width**2 + 3 * self.width * self.mlp_dim
        return self.num_layers * per_layer

    @property
    def head_products(self) -> int:
        """Parameters of the output layer: D V."""
        return self.width * self.vocab_size


SIZES = {
    "tiny": Size(2, 64, 4, 192, 1024, 8, 16, 16),
    "small": Size(4, 256, 8, 768, 8192, 16, 64, 64),
    "wide": Size(8, 512, 8, 1536, 32_000, 8, 64, 64),
    "long": Size(4, 256, 8, 768, 8192, 16, 64, 256),
}


@dataclasses.dataclass(frozen=True)
class Needed:
    """FLOPs that a Nash-MD step cannot do without, part by part.

    A product with N parameters costs 2 N FLOPs a row forward and 4 N backward.
    Attention and the sampler are left out, so a fraction of the limit that is made of
    these is too low rather than too high.

    Attributes:
      decode: 2 N (2 B + B) T: the policy on both responses, the reference on one.
      prefill: 2 N' 2 B S: both sets read the prompt once; N' has no output layer.
      score: 2 N' 2 B (S + T): a reward model on both responses.
      update: 8 B ((S + T) N' + T D V): gradient (6) and the reference's pass (2).
    """

    decode: float
    prefill: float
    score: float
    update: float

    @classmethod
    def of(cls, size: Size) -> "Needed":
        """Returns the FLOPs of one step."""
        body, head = size.body_products, size.head_products
        rows, prompt, new = size.batch_size, size.prompt_length, size.response_length
        return cls(
            decode=2.0 * (body + head) * 3 * rows * new,
            prefill=2.0 * body * 2 * rows * prompt,
            score=2.0 * body * 2 * rows * (prompt + new),
            update=8.0 * rows * ((prompt + new) * body + new * head),
        )

    @property
    def step(self) -> float:
        """FLOPs of the whole step."""
        return self.decode + self.prefill + self.score + self.update
