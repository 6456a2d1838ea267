# SPDX-License-Identifier: Apache-2.0
"""The main job: pursue the equilibrium of the preference game from a reference."""

from collections.abc import Callable

import jax
import numpy as np

from nlhf_jax import train_step
from nlhf_jax.checks import UserError
from nlhf_jax.data import batches as data_batches
from nlhf_jax.jobs import folders, generation, judges, runs
from nlhf_jax.jobs.policies import Policy, load_policy
from nlhf_jax.settings import (
    DataSettings,
    LoopSettings,
    MeshSettings,
    OptimizerSettings,
    SamplingSettings,
)
from nlhf_jax.types import POLICY, REFERENCE, Algorithm, TrainState


def train(
    *,
    model_dir: str,
    algorithm: Algorithm,
    data: DataSettings,
    optimizer: OptimizerSettings,
    loop: LoopSettings,
    reference_checkpoint: str,
    preference_checkpoint: str = "",
    reward_checkpoint: str = "",
    initial_checkpoint_path: str = "",
    max_decode_length: int = 0,
    seed: int = 0,
    num_eval_examples: int = 64,
    mesh: MeshSettings = MeshSettings(),  # noqa: B008 frozen, so it can be shared
) -> None:
    """Trains a policy with one of the registered algorithms.

    Args:
      model_dir: folder for checkpoints, metrics and the model's description.
      algorithm: speakers, comparisons and loss.
      data: the task whose prompts are answered; its targets are not read.
      optimizer: optimiser settings.
      loop: steps, batch size and periods.
      reference_checkpoint: model folder of the reference policy mu.
      preference_checkpoint: model folder of the preference model, where the algorithm
        asks for comparisons.
      reward_checkpoint: model folder of the reward model, where it asks for ratings.
      initial_checkpoint_path: where the policy starts; empty is the reference.
      max_decode_length: longest response in tokens; 0 is the reference's own.
      seed: of the prompts' order and of sampling.
      num_eval_examples: held-out prompts answered at each evaluation.
      mesh: how devices are laid out.

    Raises:
      UserError: a checkpoint is missing or does not fit, the algorithm needs a judge
        that is not given, the data or the folder is unusable.
    """
    check_judges(algorithm, preference_checkpoint, reward_checkpoint)
    reference = load_policy(reference_checkpoint)
    judge = judges.load_judge(
        preference_checkpoint=preference_checkpoint if algorithm.comparisons else "",
        reward_checkpoint=reward_checkpoint if algorithm.ratings else "",
    )
    prompts = data_batches.load_supervised(data, "train", reference.vocabulary)
    held_out = data_batches.load_supervised(data, "evaluation", reference.vocabulary)
    max_decode_length = (
        max_decode_length or reference.description.feature_lengths["targets"]
    )
    frozen = {REFERENCE: reference.params} | judge.frozen
    transformation, rate = runs.optimizer_and_rate(optimizer, loop.train_steps)
    network = reference.network
    step_fn = train_step.make_train_step(
        network,
        algorithm,
        judge.judge,
        transformation,
        max_length=max_decode_length,
        num_microbatches=loop.num_microbatches,
        learning_rate=rate,
    )
    start = runs.initial_params(
        network.init, initial_checkpoint_path or reference_checkpoint, seed
    )
    folder = runs.open_folder(model_dir)
    folders.describe(folder, reference.description, reference.vocabulary_path)
    runs.run(
        runs.Training(
            algorithm.name,
            step_fn,
            frozen,
            lambda step: prompts.batch(seed, step, loop.batch_size).prompts,
            _held_out_comparison(
                reference,
                judge,
                held_out,
                num_prompts=num_eval_examples,
                max_decode_length=max_decode_length,
                seed=seed,
            ),
            {"data/truncated_prompts": prompts.num_truncated_prompts},
            network.logical_axes,
        ),
        folder=folder,
        initial_state=train_step.init_state(start, algorithm, transformation),
        settings=loop,
        seed=seed,
        mesh=mesh,
    )


def _held_out_comparison(
    reference: Policy,
    judge: judges.LoadedJudge,
    data: data_batches.SupervisedData,
    *,
    num_prompts: int,
    max_decode_length: int,
    seed: int,
) -> Callable[[TrainState], dict[str, float]]:
    """Returns state -> win rate against the reference, KL and length, held out.

    One sample per prompt and policy at temperature 1; the reference's samples are
    drawn once.
    """
    rows = np.arange(min(num_prompts, data.num_examples))
    prompts = data.take(rows).prompts
    decode = generation.Generator(
        reference.network,
        reference.vocabulary,
        speaker=generation.policy_speaker(SamplingSettings(max_decode_length)),
        max_decode_length=max_decode_length,
        batch_size=len(rows),
    )
    log_ratio = generation.LogRatio(reference.network, len(rows))
    policy_key, reference_key = jax.random.split(jax.random.key(seed))
    baseline = decode({POLICY: reference.params}, prompts, reference_key).responses

    def compare(state: TrainState) -> dict[str, float]:
        params = state.param_sets[POLICY]
        responses = decode({POLICY: params}, prompts, policy_key).responses
        param_sets = {POLICY: params, REFERENCE: reference.params}
        ratio_B = log_ratio(param_sets, prompts, responses)
        found = {
            "eval/kl": float(np.mean(ratio_B)),
            "eval/length": float(responses.mask_BT.sum(axis=1).mean()),
        }
        if "preference" in judge.frozen:
            wins_B = judge.preferences(prompts, responses, baseline)
            found["eval/win_rate_reference"] = float(np.mean(wins_B))
        return found

    return compare


def check_judges(algorithm: Algorithm, preference: str, reward: str) -> None:
    """Raises a UserError if the algorithm asks a judge for which no folder is named."""
    if algorithm.comparisons and not preference:
        raise UserError(
            f"{algorithm.name} compares responses: PREFERENCE_CHECKPOINT must name a "
            "model folder, got ''"
        )
    if algorithm.ratings and not reward:
        raise UserError(
            f"{algorithm.name} rates responses: REWARD_CHECKPOINT must name a model "
            "folder, got ''"
        )
