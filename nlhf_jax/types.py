# SPDX-License-Identifier: Apache-2.0
"""The nouns of the framework and the dimension letters of every array.

Arrays of rank one or more end their name in their dimension letters:

    B  prompts of a batch              T  response tokens
    S  source (prompt) tokens          V  vocabulary
    R  rows of a decode (several responses to one prompt are several rows)
    C  comparisons of an algorithm     N  policies, or actions of a matrix game
    D  model width                     H  attention heads
    K  width of one head               F  hidden width of the feed-forward block
    L  layers                          M  microbatches
    G  blocks of the vocabulary        W  ids in a block

Token id 0 is padding unless a vocabulary says otherwise, and a mask is True where
an entry counts. All log-probabilities are in nats and float32.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from jaxtyping import Array, Bool, Float, Int, PyTree

Params = PyTree
ParamSets = Mapping[str, Params]
Cache = PyTree
Schedule = Callable[[jax.Array | int], jax.Array | float]

POLICY = "params"
REFERENCE = "reference"
BASE = "base"


class Adapted(NamedTuple):
    """Parameters with low-rank adapters on: W + A B in place of each adapted W.

    Every function of a `LanguageModel` takes one where it takes parameters.

    Attributes:
      base: the parameters W, which are shared and never changed.
      adapters: `lora_a` [.., D, r] and `lora_b` [.., r, F] for the arrays [.., D, F]
        that are adapted, their scale already in `lora_b`; {} is the base itself. With
        one more axis N in front, row k of a decode has the adapters k mod N.
    """

    base: Params
    adapters: PyTree


class PromptBatch(NamedTuple):
    """A batch of tokenised prompts, padded on the right.

    Attributes:
      tokens_BS: token ids, `pad_id` where `mask_BS` is False.
      mask_BS: True on the prompt's own tokens.
    """

    tokens_BS: Int[Array, "B S"]
    mask_BS: Bool[Array, "B S"]


class Responses(NamedTuple):
    """A batch of tokenised responses, padded on the right.

    Attributes:
      tokens_BT: token ids.
      mask_BT: True up to and including the first end-of-sequence token; a response
        cut at the length limit has no such token and is True throughout.
    """

    tokens_BT: Int[Array, "B T"]
    mask_BT: Bool[Array, "B T"]


class ComparisonBatch(NamedTuple):
    """Labelled comparisons; `preference_B` = P(first preferred to second) in [0, 1]."""

    prompts: PromptBatch
    first: Responses
    second: Responses
    preference_B: Float[Array, "B"]


class SupervisedBatch(NamedTuple):
    """Prompts with the response each should be given."""

    prompts: PromptBatch
    targets: Responses


class Samples(NamedTuple):
    """What one speaker said to each prompt of a batch.

    Attributes:
      responses: the sampled tokens.
      log_probs: for each parameter set that took part in the speaker's mixture, the
        log-probability (nats) of each sampled token under that set alone, before
        temperature and truncation; [B, T], zero where the mask is False.
      sampling_log_probs_BT: log-probability of each token under the distribution it
        was drawn from (mixed, tempered, truncated); zero where the mask is False.
    """

    responses: Responses
    log_probs: dict[str, Float[Array, "B T"]]
    sampling_log_probs_BT: Float[Array, "B T"]


class Rollout(NamedTuple):
    """One `Samples` per speaker, in the speakers' order, and the decode steps taken."""

    samples: tuple[Samples, ...]
    num_steps: Int[Array, ""]


@dataclasses.dataclass(frozen=True)
class Speaker:
    """A policy written as a log-linear mixture of parameter sets.

    At each prefix, log p(token) = sum_k weights[k] * log p_k(token) + const, with the
    normaliser taken per token: the one-step-at-a-time mixture, which differs from the
    sequence-level geometric mixture of the theorem unless responses have one token
    (Munos et al., 2024, arXiv 2312.00886, Appendix F.1).

    Attributes:
      weights: parameter set name -> weight, a number or a schedule of the step. They
        sum to one.
      temperature: divides the mixed log-probabilities; 0 means the most likely token.
      top_k: keep the k most likely tokens of the mixture; 0 keeps all.
      top_p: keep the smallest set of tokens whose probability reaches top_p; 1 keeps
        all.
    """

    weights: Mapping[str, float | Schedule]
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0


class TokenScores(NamedTuple):
    """What a model says of given tokens, float32 and [B, T] each.

    Attributes:
      log_probs_BT: log-probability of the token, nats.
      log_normalizers_BT: log of the sum of exp(logit) over the vocabulary, nats.
      is_most_likely_BT: True where no token has a larger logit.
    """

    log_probs_BT: Float[Array, "B T"]
    log_normalizers_BT: Float[Array, "B T"]
    is_most_likely_BT: Bool[Array, "B T"]


class LanguageModel(NamedTuple):
    """A conditional language model as pure functions of its parameters.

    Attributes:
      init: key -> parameters (float32).
      logical_axes: parameters' tree with a tuple of logical axis names per leaf.
      logits: (params, prompts, tokens_BT, dropout_key or None) -> float32 logits_BTV,
        where position t predicts tokens_BT[:, t] from the prompt and tokens_BT[:, :t].
      logits_of: (params, prompts, tokens_BT, token_id) -> the [B, T] of those logits
        that are one token's, without the others.
      token_scores: (params, prompts, tokens_BT, dropout_key) -> the `TokenScores` of
        the tokens under those logits, which need not all exist at once.
      prefill: (params, prompts, max_length) -> (start_tokens_B, cache): reads the
        prompt once. Every leaf of the cache has the row as its first axis, so rows can
        be repeated or gathered with one tree_map.
      decode_step: (params, cache, tokens_R, step) -> (float32 logits_RV, cache): feeds
        the token before position `step` (start tokens at step 0) and predicts position
        `step`. `step` is a scalar.
      vocab_size: number of logits.
      pad_id: id that fills the padding.
      eos_id: id that ends a response.
      for_decoding: parameters -> parameters as `decode_step` wants them, made once
        before a decode and not once a token: gathered from devices, say, or cast.
      join: N sets -> one value under which row k of a prefill or a decode is read by
        set k mod N, in one pass over what the sets share; None where they share
        nothing.
      share: (cache of a prefill, N) -> cache of N rows a prompt, row p N + n, in which
        what was read of a prompt stands once; None where rows have to be repeated.
      reads_prompts_once: whether `token_scores` takes N rows of tokens a prompt in the
        same order, and reads the prompt once for them.
    """

    init: Callable[[jax.Array], Params]
    logical_axes: PyTree
    logits: Callable[..., Float[Array, "B T V"]]
    logits_of: Callable[[Params, PromptBatch, Array, int], Float[Array, "B T"]]
    token_scores: Callable[..., TokenScores]
    prefill: Callable[[Params, PromptBatch, int], tuple[Int[Array, "B"], Cache]]
    decode_step: Callable[..., tuple[Float[Array, "R V"], Cache]]
    vocab_size: int
    pad_id: int
    eos_id: int
    for_decoding: Callable[[Params], Params] = lambda params: params
    join: Callable[[Sequence[Params]], Params] | None = None
    share: Callable[[Cache, int], Cache] | None = None
    reads_prompts_once: bool = False


class PreferenceModel(NamedTuple):
    """A learned pairwise judge.

    Attributes:
      init: key -> parameters.
      logical_axes: parameters' tree with logical axis names per leaf.
      logits: (params, prompts, first, second) -> float32 logit_B with
        P(first > second | prompt) = sigmoid(logit); swapping the responses negates it.
    """

    init: Callable[[jax.Array], Params]
    logical_axes: PyTree
    logits: Callable[[Params, PromptBatch, Responses, Responses], Float[Array, "B"]]


class RewardModel(NamedTuple):
    """A learned scalar judge: `rewards(params, prompts, responses)` -> reward_B."""

    init: Callable[[jax.Array], Params]
    logical_axes: PyTree
    rewards: Callable[[Params, PromptBatch, Responses], Float[Array, "B"]]


class Judge(NamedTuple):
    """Who answers an algorithm's questions, as functions of the frozen weights.

    Attributes:
      preference: (frozen, prompts, first, second) -> P(first > second) in [0, 1], [B].
      reward: (frozen, prompts, responses) -> reward [B].
    """

    preference: Callable[
        [ParamSets, PromptBatch, Responses, Responses], Float[Array, "B"]
    ]
    reward: Callable[[ParamSets, PromptBatch, Responses], Float[Array, "B"]]


class Feedback(NamedTuple):
    """The judge's answers to one rollout.

    Attributes:
      preferences: one P in [0, 1] of shape [B] per comparison of the algorithm.
      rewards: one reward of shape [B] per rated sample of the algorithm.
    """

    preferences: tuple[Float[Array, "B"], ...]
    rewards: tuple[Float[Array, "B"], ...]


class ScoredSample(NamedTuple):
    """One sample as a loss sees it: teacher-forced log-probabilities by set.

    Attributes:
      mask_BT: True on the tokens that count, the end-of-sequence token included.
      log_probs: parameter set name -> log-probabilities [B, T], zero where the mask is
        False. The entry of the set that is trained carries the gradient; the others
        are constants.
      sampling_log_probs_BT: under what the tokens were drawn from, as in `Samples`.
    """

    mask_BT: Bool[Array, "B T"]
    log_probs: dict[str, Float[Array, "B T"]]
    sampling_log_probs_BT: Float[Array, "B T"]


class LossOutput(NamedTuple):
    """A loss per example, and named quantities per example for the metrics."""

    loss_B: Float[Array, "B"]
    metrics: dict[str, Float[Array, "B"]]


LossFn = Callable[[tuple[ScoredSample, ...], Feedback], LossOutput]


Select = Callable[[tuple[Samples, ...], Feedback], tuple[tuple[Samples, ...], Feedback]]
UpdateSets = Callable[[ParamSets, jax.Array, Mapping[str, jax.Array]], ParamSets]


def _select_all(
    samples: tuple[Samples, ...], feedback: Feedback
) -> tuple[tuple[Samples, ...], Feedback]:
    return samples, feedback


def _keep_param_sets(
    param_sets: ParamSets, step: jax.Array, metrics: Mapping[str, jax.Array]
) -> ParamSets:
    del step, metrics
    return param_sets


@dataclasses.dataclass(frozen=True)
class Algorithm:
    """Speakers, questions to the judge, a loss, and what happens around an update.

    Attributes:
      name: its name in the registry.
      speakers: each answers every prompt once; opponents are constants for the
        gradient.
      comparisons: pairs (i, j) of speakers; the judge says P(y_i > y_j).
      ratings: speakers whose sample the judge rates with a scalar.
      select: (samples, feedback) -> (samples, feedback): which of what was drawn and
        said goes on to the loss, prompt by prompt (the best and the worst of several
        candidates, say).
      trained_on: selected samples that the loss reads, in the order it gets them.
      scored_under: parameter sets, besides the trained one, whose teacher-forced
        log-probabilities of those samples the loss reads.
      loss: (scored samples, feedback) -> loss per example. It is minimised.
      trains: the parameter set that the loss moves.
      is_regularised: whether it pursues the equilibrium at its tau; if not, that of the
        game without regularisation.
      derived_sets: parameter sets kept in the train state besides the policy; they
        start as copies of the policy (an average of past policies, say).
      update_sets: (param_sets, step, metrics) -> param_sets, applied at the end of
        each step to the sets, the steps done, and what this step measured.
      lookaheads: parameter set -> algorithm; before each step the set becomes what one
        step of that algorithm would make of the policy. Neither the policy nor its
        optimiser's state keep anything of it.
      followers: algorithms that take a step after the policy's own, each training a
        derived set of its own with an optimiser state of its own.
    """

    name: str
    speakers: tuple[Speaker, ...]
    comparisons: tuple[tuple[int, int], ...]
    ratings: tuple[int, ...]
    trained_on: tuple[int, ...]
    scored_under: tuple[str, ...]
    loss: LossFn
    trains: str = POLICY
    is_regularised: bool = True
    derived_sets: tuple[str, ...] = ()
    select: Select = _select_all
    update_sets: UpdateSets = _keep_param_sets
    lookaheads: Mapping[str, "Algorithm"] = dataclasses.field(default_factory=dict)
    followers: tuple["Algorithm", ...] = ()

    @property
    def parts(self) -> tuple["Algorithm", ...]:
        """Everything that draws, asks and learns in a step, in the order it does."""
        return (*self.lookaheads.values(), self, *self.followers)


class TrainState(NamedTuple):
    """All that an update changes.

    Attributes:
      step: number of steps done.
      param_sets: `params` and the algorithm's derived sets.
      opt_states: the optimiser's state of each set that is trained.
    """

    step: Int[Array, ""]
    param_sets: dict[str, Any]
    opt_states: dict[str, PyTree]
