# SPDX-License-Identifier: Apache-2.0
"""The supervised jobs: fine-tuning, the preference model and the reward model."""

import json
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from nlhf_jax import distributed, supervised_step
from nlhf_jax.checks import UserError, check_integer
from nlhf_jax.data import batches as data_batches
from nlhf_jax.data import tasks, vocabularies
from nlhf_jax.decoder_settings import ModelSettings
from nlhf_jax.evaluation import summaries
from nlhf_jax.jobs import (
    collect,
    first_states,
    folders,
    generation,
    runs,
    steps,
    trained,
)
from nlhf_jax.jobs.adapters import stand_on
from nlhf_jax.jobs.judges import build_preference_model, build_reward_model
from nlhf_jax.jobs.policies import as_frozen_base, load_params
from nlhf_jax.models.families import check_end, language_model
from nlhf_jax.settings import (
    DataSettings,
    LoopSettings,
    LoraSettings,
    MemorySettings,
    MeshSettings,
    OptimizerSettings,
    SamplingSettings,
)
from nlhf_jax.types import POLICY, TrainState


def sft(
    *,
    model_dir: str,
    model: ModelSettings | None = None,
    data: DataSettings,
    optimizer: OptimizerSettings,
    loop: LoopSettings,
    seed: int = 0,
    initial_checkpoint_path: str = "",
    num_eval_examples: int = 512,
    mesh: MeshSettings = MeshSettings(),  # noqa: B008 frozen, so it can be shared
    memory: MemorySettings = MemorySettings(),  # noqa: B008
    lora: LoraSettings | None = None,
) -> None:
    """Fine-tunes a language model on prompts and their target responses.

    Args:
      model_dir: folder for checkpoints, metrics and the model's description.
      model: shape of the network; None takes that of `initial_checkpoint_path`.
      data: the task, its feature lengths and its vocabulary.
      optimizer: optimiser settings.
      loop: steps, batch size and periods.
      seed: of initialisation, data order and dropout.
      initial_checkpoint_path: model folder to start from; empty starts from scratch.
      num_eval_examples: evaluation examples read, for the loss and for ROUGE.
      mesh: how devices are laid out.
      memory: what a step computes again or cuts up to fit.
      lora: trains adapters on the weights of `initial_checkpoint_path`, which stay;
        None trains all of the weights.

    Raises:
      UserError: the data, the vocabulary, the checkpoint or the folder is unusable.
    """
    model = first_states.settings_of(model, initial_checkpoint_path)
    vocabulary_path = _vocabulary_path(data, initial_checkpoint_path, tasks.SUPERVISED)
    vocabulary = vocabularies.load_vocabulary(vocabulary_path)
    vocabularies.check_vocabulary(vocabulary, model.vocab_size)
    check_end(model, vocabulary.eos_id)
    train = data_batches.load_supervised(data, "train", vocabulary)
    held_out = data_batches.load_supervised(data, "evaluation", vocabulary)
    lengths = dict(data.task_feature_lengths)
    description = folders.ModelDescription("language_model", model, lengths)
    network = language_model(model, memory)
    check_integer("num_eval_examples", num_eval_examples, 1)
    rows = np.arange(min(num_eval_examples, held_out.num_examples))
    loss = _mean_over(
        supervised_step.make_sft_evaluation(network), held_out, rows, loop.batch_size
    )
    decode = generation.Generator(
        network,
        vocabulary,
        speaker=generation.policy_speaker(SamplingSettings(lengths["targets"], 0.0)),
        max_decode_length=lengths["targets"],
        batch_size=min(loop.batch_size, len(rows)),
    )

    def evaluate(state: TrainState) -> dict[str, float]:
        params = state.param_sets[POLICY]
        prompts = held_out.take(rows).prompts
        texts = decode({POLICY: params}, prompts, jax.random.key(seed)).texts
        references = [held_out.target_texts[row] for row in rows]
        if distributed.is_first():
            _write_samples(model_dir, state, held_out, rows, texts)
        return loss(params) | {
            "eval/rouge_l": summaries.rouge(texts, references)["rougeL"]
        }

    _run_supervised(
        "sft",
        supervised_step.make_sft_step,
        network,
        train,
        evaluate,
        description=description,
        vocabulary_path=vocabulary_path,
        asked=(data.chat_template, data.system_prompt),
        model_dir=model_dir,
        optimizer=optimizer,
        loop=loop,
        seed=seed,
        initial_checkpoint_path=initial_checkpoint_path,
        mesh=mesh,
        memory=memory,
        lora=lora,
    )


def preference(
    *,
    model_dir: str,
    data: DataSettings,
    optimizer: OptimizerSettings,
    loop: LoopSettings,
    comparisons_dir: str = "",
    initial_checkpoint_path: str = "",
    model: ModelSettings | None = None,
    seed: int = 0,
    num_eval_examples: int = 512,
    mesh: MeshSettings = MeshSettings(),  # noqa: B008 frozen, so it can be shared
    memory: MemorySettings = MemorySettings(),  # noqa: B008
    lora: LoraSettings | None = None,
) -> None:
    """Trains the pairwise preference model P(y > y' | x) on labelled comparisons.

    Args:
      model_dir: folder for checkpoints, metrics and the model's description.
      data: a task of comparisons and its feature lengths.
      optimizer: optimiser settings.
      loop: steps, batch size and periods.
      comparisons_dir: folder of a `collect` job; its files replace those of `data`.
      initial_checkpoint_path: model folder to start from, a language model or a
        preference model; its shape and vocabulary are used. Empty starts from scratch
        with `model`.
      model: shape of the network when it starts from scratch.
      seed: of initialisation and data order.
      num_eval_examples: held-out comparisons read at each evaluation.
      mesh: how devices are laid out.
      memory: what a step computes again or cuts up to fit.
      lora: trains adapters on the weights of `initial_checkpoint_path`, which stay;
        None trains all of the weights.

    Raises:
      UserError: the data, the checkpoint or the folder is unusable.
    """
    _train_judge(
        "preference",
        supervised_step.make_preference_step,
        supervised_step.make_preference_evaluation,
        build_preference_model,
        **locals(),
    )


def reward(
    *,
    model_dir: str,
    data: DataSettings,
    optimizer: OptimizerSettings,
    loop: LoopSettings,
    comparisons_dir: str = "",
    initial_checkpoint_path: str = "",
    model: ModelSettings | None = None,
    seed: int = 0,
    num_eval_examples: int = 512,
    mesh: MeshSettings = MeshSettings(),  # noqa: B008 frozen, so it can be shared
    memory: MemorySettings = MemorySettings(),  # noqa: B008
    lora: LoraSettings | None = None,
) -> None:
    """Trains a Bradley-Terry reward model on labelled comparisons.

    The arguments and errors are those of `preference`.
    """
    _train_judge(
        "reward",
        supervised_step.make_reward_step,
        supervised_step.make_reward_evaluation,
        build_reward_model,
        **locals(),
    )


def _train_judge(
    kind: str,
    make_step: Callable[..., Any],
    make_evaluation: Callable[..., Any],
    build: Callable[..., Any],
    *,
    model_dir: str,
    data: DataSettings,
    comparisons_dir: str,
    initial_checkpoint_path: str,
    model: ModelSettings | None,
    num_eval_examples: int,
    loop: LoopSettings,
    memory: MemorySettings,
    **how: Any,
) -> None:
    if comparisons_dir:
        data = collect.comparison_data(data, comparisons_dir)
    settings, vocabulary_path = _shape_and_vocabulary(
        data, initial_checkpoint_path, model
    )
    vocabulary = vocabularies.load_vocabulary(vocabulary_path)
    vocabularies.check_vocabulary(vocabulary, settings.vocab_size)
    check_end(settings, vocabulary.eos_id)
    train = data_batches.load_comparisons(data, "train", vocabulary)
    held_out = data_batches.load_comparisons(data, "evaluation", vocabulary)
    description = folders.ModelDescription(
        kind, settings, dict(data.task_feature_lengths)
    )
    network = build(description, vocabulary, memory)
    check_integer("num_eval_examples", num_eval_examples, 1)
    rows = np.arange(min(num_eval_examples, held_out.num_examples))
    loss = _mean_over(make_evaluation(network), held_out, rows, loop.batch_size)
    _run_supervised(
        kind,
        make_step,
        network,
        train,
        lambda state: loss(state.param_sets[POLICY]),
        description=description,
        vocabulary_path=vocabulary_path,
        asked=(data.chat_template, data.system_prompt),
        model_dir=model_dir,
        loop=loop,
        initial_checkpoint_path=initial_checkpoint_path,
        memory=memory,
        **how,
    )


def _vocabulary_path(data: DataSettings, checkpoint: str, kind: tuple[str, ...]) -> str:
    """The vocabulary that is named, else the checkpoint's, else one of our own."""
    if checkpoint and not data.vocabulary_path:
        return folders.vocabulary_file(checkpoint)
    if data.vocabulary_path:
        return data.vocabulary_path
    tasks.check_files(data, kind)  # making a vocabulary takes a while
    return distributed.first_then_others(
        "vocabulary", lambda: vocabularies.docstring_vocabulary_path(data)
    )


def _shape_and_vocabulary(
    data: DataSettings, checkpoint: str, model: ModelSettings | None
) -> tuple[ModelSettings, str]:
    if not checkpoint:
        path = _vocabulary_path(data, "", tasks.COMPARISONS)
        return runs.required("model", model), path
    kind = folders.kind_of(checkpoint)
    settings = folders.read_description(checkpoint, kind).settings
    return settings, folders.vocabulary_file(checkpoint)


def _run_supervised(
    name: str,
    make_step: Callable[..., Any],
    network: Any,
    train: Any,
    evaluate: Callable[[TrainState], dict[str, float]],
    *,
    description: folders.ModelDescription,
    vocabulary_path: str,
    asked: tuple[str, str],
    model_dir: str,
    optimizer: OptimizerSettings,
    loop: LoopSettings,
    seed: int,
    initial_checkpoint_path: str,
    mesh: MeshSettings,
    memory: MemorySettings,
    lora: LoraSettings | None,
) -> None:
    step = steps.supervised(
        make_step, network, optimizer=optimizer, loop=loop, lora=lora
    )
    first = initial_checkpoint_path
    one = _trained(network, first, seed, step, mesh, memory, lora)
    runs.check_layout(one.start, one.logical_axes, loop, mesh)
    folder = one.opened(model_dir, seed)
    one.describe(folder, description, vocabulary_path, *asked)
    runs.run(
        runs.Training(
            name,
            step.step_fn,
            one.frozen,
            lambda step, rows: train.batch(seed, step, loop.batch_size, rows),
            one.evaluated(evaluate),
            {
                "data/truncated_prompts": train.num_truncated_prompts,
                "data/truncated_share": train.num_truncated_prompts
                / train.num_examples,
            },
            one.logical_axes,
            one.frozen_axes,
        ),
        folder=folder,
        initial_state=one.start,
        settings=loop,
        seed=seed,
        mesh=mesh,
    )


def _trained(
    network: Any,
    first: str,
    seed: int,
    step: steps.Step,
    mesh: MeshSettings,
    memory: MemorySettings,
    lora: LoraSettings | None,
) -> trained.Trained:
    if lora is None:
        return trained.whole(network, first, seed, step.init_state)
    if not first:
        raise UserError(
            "with lora, initial_checkpoint_path must name the model whose weights "
            "stay, got ''"
        )
    stand = stand_on(first, lora)
    base = as_frozen_base(load_params(stand.base, network, mesh), memory)
    return trained.on_base(stand, network, base, seed, step.init_state)


def _mean_over(
    evaluation: Callable[..., Any], data: Any, rows: np.ndarray, batch_size: int
) -> Callable[[Any], dict[str, float]]:
    """Returns params -> means over `rows`, named `eval/...`, in one compiled shape."""
    compiled = jax.jit(evaluation)
    size = min(batch_size, len(rows))
    # A part of a batch would be another shape; the rows left over are not read.
    groups = np.split(rows[: len(rows) // size * size], len(rows) // size)

    def mean(params) -> dict[str, float]:
        totals = [compiled(params, data.take(group)) for group in groups]
        found = supervised_step.mean_metrics(totals)
        return {f"eval/{name.replace('/', '_')}": x for name, x in found.items()}

    return mean


def _write_samples(
    model_dir: str, state: TrainState, data: Any, rows: np.ndarray, texts: list[str]
) -> None:
    folder = pathlib.Path(model_dir).expanduser() / "samples"
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / f"step_{int(state.step)}.jsonl", "w") as file:
        for row, text in zip(rows, texts, strict=True):
            record = {
                "prompt": data.prompt_texts[row],
                "target": data.target_texts[row],
                "response": text,
            }
            file.write(json.dumps(record) + "\n")
