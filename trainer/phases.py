"""Connect each phase to its learner.

Each `learn_*` function converts the rows of a batch to the learner's inputs and calls the learner. The function returns the
metrics, and a second function that saves the trained model into a folder. A `learn_*` function raises TrainingFailed (or a
subclass) when training on the batch fails, for example because of a NaN loss, one-sided labels or equal rewards. In this case
no model is saved or published.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from engine.settings import REWARD_MODEL, RewardTerm, parse_rewards
from schemas import ids
from schemas.records import BatchManifest, Incident, PolicyKind, Record, Score
from trainer.batches import Batch, parse_messages
from trainer.folders import ModelFolders
from trainer.methods import PHASES as PHASES
from trainer.methods import RL_METHODS
from trainer.rewards import Evidence, compute_term_value
from trainer.scores import make_score

if TYPE_CHECKING:
    from engine.settings import TrainSettings
    from trainer.learners.reward import PreferenceExample
    from trainer.learners.rollouts import Rollout
    from trainer.learners.sft import SftExample
    from trainer.weights import Hardware


@dataclass(frozen=True)
class LearnContext:
    """A context is passed to a learner function together with the batch.

    `publish` writes records to the log in one transaction. `publish_scores` writes the scores that are not on the log yet, and
    returns the normalized scores on the log. `on_step` is called with the number of a step and its metrics.
    """

    folders: ModelFolders
    train_settings: TrainSettings
    publish: Callable[[Sequence[Record]], None]
    publish_scores: Callable[[Sequence[Score]], list[float]]
    on_step: Callable[[int, dict[str, float]], None]

    @property
    def hardware(self) -> Hardware:
        """Return how learners use this machine.

        The hardware is not stored with the batch, because the same batch can be trained on another machine.
        """
        from trainer.weights import Hardware

        return Hardware.from_settings(self.train_settings)


_TrainOutput = tuple[Callable[[Path], None], dict[str, float]]
Learner = Callable[[LearnContext, Batch], _TrainOutput]


# From rows to the learners' inputs


def _make_sft_example(row: Mapping[str, Any]) -> SftExample:
    from trainer.learners.sft import SftExample

    return SftExample(
        messages=parse_messages(row),
        completion=row["completion"],
        ends_with_eos=row["finish_reason"] == "STOP",
        record_id=str(row["record_id"]),
    )


def _make_preference_example(row: Mapping[str, Any]) -> PreferenceExample:
    from trainer.learners.reward import PreferenceExample

    return PreferenceExample(
        messages=parse_messages(row),
        response_a=row["response_a"],
        response_b=row["response_b"],
        p_a=row["p_a"],
        record_id=str(row["record_id"]),
        ends_with_eos_a=row["finish_reason_a"] == "STOP",
        ends_with_eos_b=row["finish_reason_b"] == "STOP",
        exchangeable=row["pairing"] == "completions" and row["label_source"] == "AI",
    )


def _make_rollout(row: Mapping[str, Any]) -> Rollout:
    from trainer.learners.rollouts import Rollout

    return Rollout(
        prompt_token_ids=tuple(row["prompt_token_ids"]),
        token_ids=tuple(row["token_ids"]),
        logprobs=tuple(row["logprobs"]),
        ends_with_eos=row["finish_reason"] == "STOP",
        policy_version=row["policy_version"],
        record_id=str(row["response_id"]),
        temperature=row["temperature"],
    )


# The phases


def learn_sft(context: LearnContext, batch: Batch) -> _TrainOutput:
    """Train the policy on the final responses of revision chains."""
    from trainer import distributed
    from trainer.learners import sft

    folders, settings = context.folders, batch.settings
    policy_folder = folders.get_policy_folder(batch.manifest.base_policy_version)
    settings.pop("rounds", None)  # this setting has already selected the rows
    model, tokenizer, metrics = distributed.call_learner(
        sft.train,
        policy_folder,
        [_make_sft_example(row) for row in batch.rows],
        seed=batch.manifest.seed or 0,
        hardware=context.hardware,
        on_step=context.on_step,
        **settings,
    )
    return make_sft_saver(model, tokenizer, policy_folder, folders.base_folder), metrics


def learn_reward(context: LearnContext, batch: Batch) -> _TrainOutput:
    """Train the reward model on soft labels, starting from the last reward model.

    The first reward model starts from the policy with a new head.
    """
    from trainer import distributed
    from trainer.learners import reward

    manifest, settings, folders = batch.manifest, batch.settings, context.folders
    settings.pop("replay_ratio", None)  # the replayed rows are already in the batch
    policy_folder, version = folders.get_policy_folder(manifest.base_policy_version), manifest.base_reward_version
    model, metrics = distributed.call_learner(
        reward.train,
        folders.get_version_folder(PolicyKind.REWARD, version) if version else policy_folder,
        [_make_preference_example(row) for row in batch.rows],
        seed=manifest.seed or 0,
        hardware=context.hardware,
        on_step=context.on_step,
        **settings,
    )
    return model.save, metrics


def learn_ppo(context: LearnContext, batch: Batch) -> _TrainOutput:
    """Train the policy with PPO on its scored completions. The reference is the policy of the last supervised phase."""
    from trainer import distributed, weights
    from trainer.learners import policy_math, ppo, sft

    manifest, settings, folders = batch.manifest, batch.settings, context.folders
    lora_rank, max_length = settings.pop("lora_rank"), settings.pop("max_length")
    policy_folder = folders.get_policy_folder(manifest.base_policy_version)
    reference_folder = folders.get_policy_folder(manifest.reference_policy_version or 0)
    tokenizer, config = weights.load_tokenizer(policy_folder), ppo.PPOConfig(**settings)
    trained, metrics = distributed.call_learner(
        ppo.train,
        policy_folder,
        reference_folder,
        [_make_rollout(row) for row in batch.rows],
        _score_rollouts(context, batch),
        config,
        base_folder=None if reference_folder == folders.base_folder else folders.base_folder,
        sl_rows=[sft.encode_example(tokenizer, _make_sft_example(row), max_length) for row in batch.sl_rows],
        lora_rank=lora_rank,
        hardware=context.hardware,
        seed=manifest.seed or 0,
        on_step=context.on_step,
    )
    if metrics["stopped_early"]:
        context.publish([_make_early_stop_incident(manifest, metrics, policy_math.find_exceeded_limit(metrics, config))])
    return make_saver_with_adapter(trained.save, reference_folder, folders.base_folder), metrics


def learn_dpo(context: LearnContext, batch: Batch) -> _TrainOutput:
    """Train the policy with DPO on preference labels. The reference is the policy of the last supervised phase."""
    from trainer import distributed
    from trainer.learners import dpo

    manifest, folders = batch.manifest, context.folders
    reference_folder = folders.get_policy_folder(manifest.reference_policy_version or 0)
    save, metrics = distributed.call_learner(
        dpo.train,
        folders.get_policy_folder(manifest.base_policy_version),
        reference_folder,
        [_make_preference_example(row) for row in batch.rows],
        hardware=context.hardware,
        seed=manifest.seed or 0,
        on_step=context.on_step,
        **batch.settings,
    )
    return make_saver_with_adapter(save, reference_folder, folders.base_folder), metrics


def learn_grpo(context: LearnContext, batch: Batch) -> _TrainOutput:
    """Train the policy with GRPO on groups of rewarded completions. The reference is the policy of the last supervised phase."""
    from trainer.learners import grpo

    settings = batch.settings
    rewards = parse_rewards(settings.pop("rewards"))
    return _learn_on_groups(context, batch, rewards, grpo.train, grpo.GRPOConfig, settings)


def learn_rloo(context: LearnContext, batch: Batch) -> _TrainOutput:
    """Train the policy with RLOO on groups of rewarded completions. The reference is the policy of the last supervised phase."""
    from trainer.learners import rloo

    settings = batch.settings
    rewards = parse_rewards(settings.pop("rewards"))
    del settings["max_completion_length"]  # RLOO does not divide by a length
    return _learn_on_groups(context, batch, rewards, rloo.train, rloo.RLOOConfig, settings)


def _learn_on_groups(
    context: LearnContext,
    batch: Batch,
    terms: Sequence[RewardTerm],
    learner: Callable[..., Any],
    make_config: Callable[..., Any],
    settings: dict[str, Any],
) -> _TrainOutput:
    from trainer import distributed
    from trainer.learners import policy_math

    manifest, folders = batch.manifest, context.folders
    lora_rank, _ = settings.pop("lora_rank"), settings.pop("max_length")
    reference_folder = folders.get_policy_folder(manifest.reference_policy_version or 0)
    config = make_config(**settings)
    values = _compute_term_values(context, batch, terms)
    rewards = [sum(term.weight * values[term.name][n] for term in terms) for n in range(len(batch.rows))]
    trained, metrics = distributed.call_learner(
        learner,
        folders.get_policy_folder(manifest.base_policy_version),
        reference_folder,
        [_make_rollout(row) for row in batch.rows],
        rewards,
        config,
        base_folder=None if reference_folder == folders.base_folder else folders.base_folder,
        lora_rank=lora_rank,
        hardware=context.hardware,
        seed=manifest.seed or 0,
        on_step=context.on_step,
    )
    sizes = {str(row["response_id"]): row["num_in_group"] for row in batch.rows}
    metrics |= {f"rewards/{name}": fmean(column) for name, column in values.items()}
    metrics["completions_without_reward"] = float(sum(sizes.values()) - len(batch.rows))
    if metrics["stopped_early"]:
        context.publish([_make_early_stop_incident(manifest, metrics, policy_math.find_exceeded_limit(metrics, config))])
    return make_saver_with_adapter(trained.save, reference_folder, folders.base_folder), metrics


def _compute_term_values(context: LearnContext, batch: Batch, terms: Sequence[RewardTerm]) -> dict[str, list[float]]:
    """Return the values of each term for all rows. The reward model scores the rows, and its scores are published."""
    values: dict[str, list[float]] = {}
    for term in terms:
        if term.source == REWARD_MODEL:
            values[term.name] = _score_rollouts(context, batch)
        else:
            of_rows = [compute_term_value(Evidence(row["reward_grades"], row["reward_pairs"]), term) for row in batch.rows]
            values[term.name] = [value for value in of_rows if value is not None]  # the batch has only rows with a reward
    return values


def learn_distill(context: LearnContext, batch: Batch) -> _TrainOutput:
    """Train the policy to answer without the constitution as the reference policy answers with it."""
    from constitutions.loader import parse_constitution
    from engine import constitution_prompts
    from trainer import distributed, weights
    from trainer.learners import distill, policy_math

    manifest, settings, folders = batch.manifest, batch.settings, context.folders
    lora_rank = settings.pop("lora_rank")
    settings.pop("max_length")
    constitution = parse_constitution(settings.pop("constitution"), f"the constitution of batch {manifest.batch_number}")
    role, num_principles = settings.pop("constitution_role"), settings.pop("num_principles")
    policy_folder = folders.get_policy_folder(manifest.base_policy_version)
    reference_version = manifest.reference_policy_version or 0
    reference_folder = folders.get_policy_folder(reference_version)
    tokenizer, config = weights.load_tokenizer(policy_folder), distill.DistillConfig(**settings)

    def make_example(row: Mapping[str, Any]) -> distill.DistillExample:
        principles = constitution_prompts.select_principles(constitution, str(row["prompt_id"]), num_principles, row["tags"])
        text = constitution_prompts.render_principles(constitution, principles)
        prompt = constitution_prompts.encode_teacher_prompt(tokenizer, parse_messages(row), text, role)
        return distill.DistillExample(_make_rollout(row), tuple(prompt))

    trained, metrics = distributed.call_learner(
        distill.train,
        policy_folder,
        reference_folder,
        [make_example(row) for row in batch.rows],
        config,
        policy_version=manifest.base_policy_version,
        reference_version=reference_version,
        base_folder=None if reference_folder == folders.base_folder else folders.base_folder,
        lora_rank=lora_rank,
        hardware=context.hardware,
        seed=manifest.seed or 0,
        on_step=context.on_step,
    )
    if metrics["stopped_early"]:
        context.publish([_make_early_stop_incident(manifest, metrics, policy_math.find_exceeded_limit(metrics, config))])
    return make_saver_with_adapter(trained.save, reference_folder, folders.base_folder), metrics


LEARNERS: dict[str, Learner] = {
    "sft": learn_sft,
    "reward": learn_reward,
    "ppo": learn_ppo,
    "dpo": learn_dpo,
    "grpo": learn_grpo,
    "rloo": learn_rloo,
    "distill": learn_distill,
}


def _score_rollouts(context: LearnContext, batch: Batch) -> list[float]:
    """Return the reward model's normalized score of each rollout, and publish the scores."""
    from trainer import distributed
    from trainer.learners import reward

    manifest = batch.manifest
    version = manifest.base_reward_version
    assert version is not None, "batches that a reward model scores are sampled only when there is one"
    scores, normalized = distributed.call_learner(
        reward.score_responses,
        context.folders.get_version_folder(PolicyKind.REWARD, version),
        [(parse_messages(row), row["text"], row["finish_reason"] == "STOP") for row in batch.rows],
        policy=context.folders.get_policy_folder(manifest.base_policy_version),
        hardware=context.hardware,
    )
    records = zip(batch.rows, scores, normalized, strict=True)
    return context.publish_scores([make_score(row, manifest.run_id, version, *pair) for row, *pair in records])


def _make_early_stop_incident(manifest: BatchManifest, metrics: dict[str, float], limit: str) -> Incident:
    return Incident(
        record_id=ids.compute_record_id("incident", [manifest.record_id], ids.compute_fingerprint("incident", title="kl")),
        parent_ids=[manifest.record_id],
        run_id=manifest.run_id,
        stage="train",
        policy_version=manifest.base_policy_version,
        phase=manifest.phase,
        title=f"{RL_METHODS[manifest.phase].title} stopped early because its KL exceeded a limit",
        detail=f"the KL exceeded {manifest.phase}.{limit} after {metrics['steps']:.0f} steps, and the policy of the last step is published",
        metrics=metrics,
    )


# Saving


def make_sft_saver(model: Any, tokenizer: Any, start_folder: Path, base_folder: Path) -> Callable[[Path], None]:
    """Return a function that saves a policy whose training started from the weights in `start_folder`.

    With LoRA, the function also saves an adapter for the base model. A server that has loaded the base model can use this
    adapter.
    """
    from trainer import weights

    def save(folder: Path) -> None:
        if weights.has_adapter(model):
            with tempfile.TemporaryDirectory() as adapter_folder:
                weights.save_adapter(model, Path(adapter_folder))
                weights.save_combined_adapter(folder, Path(adapter_folder), start_folder, base_folder)
        weights.make_saver(model, tokenizer)(folder)

    return save


def make_saver_with_adapter(save: Callable[[Path], None], reference_folder: Path, base_folder: Path) -> Callable[[Path], None]:
    """Return a function that calls `save`, and then saves an adapter for the base model.

    `save` is the function that an RL learner returned.
    """
    from trainer import weights

    def save_both(folder: Path) -> None:
        save(folder)
        weights.save_combined_adapter(folder, folder / weights.RL_FOLDER, reference_folder, base_folder)

    return save_both
