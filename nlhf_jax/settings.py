# SPDX-License-Identifier: Apache-2.0
"""Frozen settings that check themselves; gin fills them, factories read them."""

import dataclasses
from collections.abc import Mapping

from nlhf_jax.checks import (
    UserError,
    check_choice,
    check_increasing,
    check_integer,
    check_range,
)

ATTENTIONS = ("plain", "recomputed", "chunked", "automatic")


@dataclasses.dataclass(frozen=True)
class MemorySettings:
    """What a step computes again, cuts up or halves in order to fit.

    Only `compute_dtype` and `frozen_dtype` change numbers by more than rounding.

    Attributes:
      remat: what of a layer the backward pass keeps: "none" computes nothing again,
        "dots" keeps the products with weights, "full" keeps the layer's input only.
      scan_layers: compiles one layer and runs it in a loop, with all layers' weights
        stacked for the time of a pass; the parameters keep their names. Decoding is
        not affected.
      num_vocab_chunks: parts of the vocabulary whose logits exist at once, when given
        tokens are scored; it divides the vocabulary's size.
      attention: of decoder-only models: "plain" keeps all weights, "recomputed" and
        "chunked" make them again, "automatic" has kernels; see `models.attention`. T5
        has "plain" alone.
      attention_chunk: queries at a time, where "chunked".
      compute_dtype: of the activations, "float32" or "bfloat16"; "" is the model's own.
        Parameters, softmax, logits and log-probabilities stay float32.
      frozen_dtype: of the parameters that are not trained (reference and judges),
        "float32" or "bfloat16".
    """

    remat: str = "none"
    scan_layers: bool = False
    num_vocab_chunks: int = 1
    attention: str = "plain"
    attention_chunk: int = 128
    compute_dtype: str = ""
    frozen_dtype: str = "float32"

    def __post_init__(self):
        check_choice("remat", self.remat, ("none", "dots", "full"))
        check_integer("num_vocab_chunks", self.num_vocab_chunks, 1)
        check_choice("attention", self.attention, ATTENTIONS)
        check_integer("attention_chunk", self.attention_chunk, 1)
        check_choice("compute_dtype", self.compute_dtype, ("", "float32", "bfloat16"))
        check_choice("frozen_dtype", self.frozen_dtype, ("float32", "bfloat16"))


@dataclasses.dataclass(frozen=True)
class LoraSettings:
    """Low-rank adapters: W + scale A B is trained by A and B alone, and W stays.

    A [inputs, rank] starts uniform in +-1 / sqrt(inputs) and B [rank, outputs] at 0, so
    that a run starts at its base.

    Source: Hu et al., 2021, arXiv 2106.09685; `rank_stabilized`: Kalajdzievski, 2023,
    arXiv 2312.03732.

    Attributes:
      rank: r, columns of A, >= 1.
      alpha: the scale is alpha / rank, > 0.
      targets: names of the modules whose kernels are adapted, wherever they stand:
        query, key, value and out of attention, wi_0, wi_1 (wi in T5 1.0) and wo of the
        feed-forward blocks.
      rank_stabilized: the scale is alpha / sqrt(rank).
    """

    rank: int = 8
    alpha: float = 16.0
    targets: tuple[str, ...] = ("query", "value")
    rank_stabilized: bool = False

    def __post_init__(self):
        check_integer("rank", self.rank, 1)
        check_range("alpha", self.alpha, 0.0, low_open=True, high_open=True)
        # In one order, so that equal adapters have equal settings.
        object.__setattr__(self, "targets", tuple(sorted(self.targets)))
        if not self.targets:
            raise UserError("targets must name at least one module, got ()")
        for name in self.targets:
            if self.targets.count(name) > 1:
                raise UserError(f"targets names {name!r} twice")

    @property
    def scale(self) -> float:
        """What A B is multiplied by."""
        return self.alpha / (self.rank**0.5 if self.rank_stabilized else self.rank)


@dataclasses.dataclass(frozen=True)
class OptimizerSettings:
    """An optimiser with a warm-up schedule and clipping.

    Attributes:
      name: "adafactor" or "adamw".
      learning_rate: peak step size, > 0.
      schedule: after the warm-up, "constant", "linear" (to 0 at the last step),
        "cosine" (to 0) or "rsqrt" (proportional to 1/sqrt(step)).
      warmup_steps: steps of linear warm-up from 0.
      weight_decay: decoupled weight decay, >= 0; times the learning rate each step.
      clip_norm: largest global gradient norm; 0 does not clip.
      multiply_by_parameter_scale: Adafactor only: steps are relative to the root mean
        square of each parameter array, as in T5X; False makes them absolute.
    """

    name: str = "adafactor"
    learning_rate: float = 1e-3
    schedule: str = "constant"
    warmup_steps: int = 0
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    multiply_by_parameter_scale: bool = True

    def __post_init__(self):
        check_choice("optimizer name", self.name, ("adafactor", "adamw"))
        check_range("learning_rate", self.learning_rate, 0.0, low_open=True)
        check_choice(
            "schedule", self.schedule, ("constant", "linear", "cosine", "rsqrt")
        )
        check_integer("warmup_steps", self.warmup_steps)
        check_range("weight_decay", self.weight_decay, 0.0)
        check_range("clip_norm", self.clip_norm, 0.0)


@dataclasses.dataclass(frozen=True)
class SamplingSettings:
    """How a deployed policy is decoded.

    Attributes:
      max_decode_length: longest response in tokens, the end token included.
      temperature: 0 is greedy.
      top_k: 0 keeps all tokens.
      top_p: 1 keeps all tokens.
    """

    max_decode_length: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self):
        check_integer("max_decode_length", self.max_decode_length, 1)
        check_range("temperature", self.temperature, 0.0)
        check_integer("top_k", self.top_k)
        check_range("top_p", self.top_p, 0.0, 1.0, low_open=True)


@dataclasses.dataclass(frozen=True)
class LoopSettings:
    """What happens when in a training loop (all in steps).

    Attributes:
      train_steps: updates in all.
      batch_size: prompts (or comparisons) per update.
      num_microbatches: parts a batch is split into for the gradient.
      log_period: steps between lines of metrics.
      checkpoint_period: steps between checkpoints; the last step is always saved.
      eval_period: steps between evaluations; 0 evaluates at the end only.
      keep_checkpoints: newest checkpoints kept.
      keep_every_steps: checkpoints of steps that it divides are kept for ever; 0 keeps
        none for that.
      keep_best: checkpoints kept for the best evaluation; 0 keeps none for that.
      best_metric: the evaluation's metric they are chosen by, "eval/kl" for instance.
      best_is: whether "higher" or "lower" values of it are better.
      save_attempts: how often a save that fails is tried in all.
      save_retry_seconds: from a failed save to the next attempt.
      profile_steps: (first, last) of the steps that are traced into MODEL_DIR/profile,
        counted from 1, both included; () traces none.
      peak_flops: FLOP/s of one chip at best, for compute/mfu; 0 takes the published
        figure of a chip that is known.
      hang_seconds: the longest that a batch, a step, a save or an evaluation may take
        before the process counts as hanging, shows its stacks and ends with 42; four
        times as much for the first of each, which compiles. 0 waits for ever; the
        variable NLHF_HANG_SECONDS counts more.
      max_skipped_steps: how many steps of a run may have a number that is not finite
        and be left out; one more ends the run. 0 ends it at the first. More than 0
        takes the memory of a second train state.
    """

    train_steps: int
    batch_size: int
    num_microbatches: int = 1
    log_period: int = 10
    checkpoint_period: int = 1000
    eval_period: int = 0
    keep_checkpoints: int = 2
    keep_every_steps: int = 0
    keep_best: int = 0
    best_metric: str = ""
    best_is: str = "higher"
    save_attempts: int = 3
    save_retry_seconds: float = 10.0
    profile_steps: tuple[int, ...] = ()
    peak_flops: float = 0.0
    hang_seconds: float = 1800.0
    max_skipped_steps: int = 0

    def __post_init__(self):
        for name in (
            "train_steps",
            "batch_size",
            "num_microbatches",
            "log_period",
            "checkpoint_period",
            "keep_checkpoints",
            "save_attempts",
        ):
            check_integer(name, getattr(self, name), 1)
        for name in (
            "eval_period",
            "keep_every_steps",
            "keep_best",
            "max_skipped_steps",
        ):
            check_integer(name, getattr(self, name))
        check_choice("best_is", self.best_is, ("higher", "lower"))
        check_range("save_retry_seconds", self.save_retry_seconds, 0.0, high_open=True)
        self._check_what_is_kept()
        check_range("peak_flops", self.peak_flops, 0.0, high_open=True)
        check_range("hang_seconds", self.hang_seconds, 0.0, high_open=True)
        self._check_profile_steps()
        if self.batch_size % self.num_microbatches:
            raise UserError(
                f"num_microbatches must divide batch_size {self.batch_size}, "
                f"got {self.num_microbatches}"
            )

    def _check_what_is_kept(self):
        period = self.checkpoint_period
        if self.keep_every_steps % period and period <= self.train_steps:
            raise UserError(
                f"keep_every_steps must be a multiple of checkpoint_period {period}, "
                f"got {self.keep_every_steps}"
            )
        if self.keep_best and not (self.best_metric and self.eval_period):
            raise UserError(
                f"keep_best {self.keep_best} needs best_metric and eval_period, got "
                f"{self.best_metric!r} and {self.eval_period}"
            )

    def _check_profile_steps(self):
        window = tuple(self.profile_steps)
        is_window = len(window) == 2 and all(type(step) is int for step in window)
        if window and not (is_window and 1 <= window[0] <= window[1]):
            raise UserError(
                "profile_steps must be () or (first, last), two steps counted from 1, "
                f"got {window!r}"
            )
        if window and window[1] > self.train_steps:
            raise UserError(
                f"profile_steps {window!r} must end by the last of train_steps "
                f"{self.train_steps}"
            )


@dataclasses.dataclass(frozen=True)
class DataSettings:
    """Which texts a job reads and how they become tokens.

    Attributes:
      mixture_or_task_name: "docstrings", "docstrings_pretraining", "debian",
        "debian_or_docstrings" (the second where there is no apt), "tldr", "jsonl", or a
        seqio task or mixture the user has registered.
      task_feature_lengths: {"inputs": S, "targets": T}, the longest prompt and response
        in tokens, the end token included.
      vocabulary_path: a SentencePiece model or a `tokenizer.json`; "byte" for the byte
        vocabulary; "" for the 4,096 pieces trained on the docstrings.
      cache_dir: where corpora are prepared; "" for $NLHF_CACHE, else
        ~/.cache/nlhf_jax.
      data_dir: folder of a prepared corpus to keep whatever becomes of the environment
        ("docstrings": made when it is empty, never remade), or of files to read
        ("tldr"); "" prepares one in the cache.
      lock_file: requirements lock that limits "docstrings" to the packages it pins.
      train_file: JSON lines to train on ("jsonl"), also gzipped.
      evaluation_file: JSON lines to evaluate on; "" holds groups of train_file out.
      group_field: field of the JSON lines whose values are held out as wholes.
      evaluation_share: share of groups held out without an evaluation_file, in (0, 1).
      chat_template: what makes a user's turn of a prompt: "" nothing does, "model" the
        template in the model's folder, "auto" that one if there is one, or a file with
        a template.
      system_prompt: what the template says before the user's turn; "" for nothing.
      length_buckets: rising lengths below S; a batch to train on has the first that
        holds its longest prompt, and a step is compiled once for each; () for S alone.
    """

    mixture_or_task_name: str
    task_feature_lengths: Mapping[str, int]
    vocabulary_path: str = ""
    cache_dir: str = ""
    data_dir: str = ""
    lock_file: str = ""
    train_file: str = ""
    evaluation_file: str = ""
    group_field: str = ""
    evaluation_share: float = 0.2
    chat_template: str = ""
    system_prompt: str = ""
    length_buckets: tuple[int, ...] = ()

    def __post_init__(self):
        if not self.mixture_or_task_name:
            raise UserError("mixture_or_task_name must name a task, got ''")
        if sorted(self.task_feature_lengths) != ["inputs", "targets"]:
            raise UserError(
                "task_feature_lengths must have the keys 'inputs' and 'targets', got "
                f"{dict(self.task_feature_lengths)!r}"
            )
        for name, length in self.task_feature_lengths.items():
            check_integer(f"task_feature_lengths[{name!r}]", length, 1)
        share, most = self.evaluation_share, self.task_feature_lengths["inputs"]
        check_range("evaluation_share", share, 0.0, 1.0, low_open=True, high_open=True)
        check_increasing("length_buckets", self.length_buckets, most)


@dataclasses.dataclass(frozen=True)
class MeshSettings:
    """How many devices lie along each axis of the mesh.

    At most one size is -1: the devices that are left. The defaults split the batch
    over all devices.

    Attributes:
      data: copies of the parameters, each with a part of the batch.
      fsdp: the batch and the parameters are split over it.
      tensor: heads, hidden units and vocabulary are split over it.
      slice: groups of devices with fast links inside and a slow network between them,
        each with its own copy of the three sizes above; the batch is split over them.
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    slice: int = 1

    def __post_init__(self):
        check_integer("mesh slice", self.slice, 1)
        sizes = {"data": self.data, "fsdp": self.fsdp, "tensor": self.tensor}
        for name, size in sizes.items():
            if size != -1:
                check_integer(f"mesh {name}", size, 1)
        if list(sizes.values()).count(-1) > 1:
            raise UserError(f"at most one mesh size may be -1, got {sizes}")
