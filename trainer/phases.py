"""From a batch to a learner: what each phase hands to its learner, and what comes back to be saved.

A learner is a function of the trainer and a batch. It trains, passes each step's numbers to `trainer.step`, and returns a
function that saves what it made into a folder, and its metrics. It raises TrainingFailed (or a class below it) when the batch
cannot be trained on: a NaN loss, one-sided labels, equal rewards. Nothing is saved or published then.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.settings import Settings
from schemas import ids
from schemas.records import BatchManifest, Incident, PolicyKind, Score
from trainer.batches import Batch, parse_messages

if TYPE_CHECKING:
    from trainer.loop import Trainer
    from trainer.ppo import Rollout
    from trainer.reward import PreferenceExample
    from trainer.sft import SftExample
    from trainer.weights import Hardware

_TrainOutput = tuple[Callable[[Path], None], dict[str, float]]
Learner = Callable[["Trainer", Batch], _TrainOutput]


# Rows as the learners take them


def _make_sft_example(row: Mapping[str, Any]) -> SftExample:
    from trainer.sft import SftExample

    return SftExample(
        messages=parse_messages(row),
        completion=row["completion"],
        ends_with_eos=row["finish_reason"] == "STOP",
        record_id=str(row["record_id"]),
    )


def _make_preference_example(row: Mapping[str, Any]) -> PreferenceExample:
    from trainer.reward import PreferenceExample

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
    from trainer.ppo import Rollout

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


def _get_hardware(settings: Settings) -> Hardware:
    """How learners use this machine; no part of a batch, whose rows train the same on another one."""
    from trainer.weights import Hardware

    train = settings.train
    return Hardware(train.micro_batch_size, train.gradient_checkpointing, train.precision)


def learn_sft(trainer: Trainer, batch: Batch) -> _TrainOutput:
    """The policy on the final texts of chains."""
    from trainer import distributed, sft

    base, settings = trainer.get_policy_folder(batch.manifest.base_policy_version), batch.settings
    settings.pop("rounds", None)  # the rows are theirs already
    model, tokenizer, metrics = distributed.call_learner(
        sft.train,
        base,
        [_make_sft_example(row) for row in batch.rows],
        seed=batch.manifest.seed or 0,
        hardware=_get_hardware(trainer.settings),
        on_step=partial(trainer.publish_step_metrics, batch.manifest),
        **settings,
    )
    return make_sft_saver(model, tokenizer, base, trainer.base_folder), metrics


def make_sft_saver(model: Any, tokenizer: Any, start_folder: Path, base_folder: Path) -> Callable[[Path], None]:
    """Saves the policy that was trained on the weights of `base`, and the adapter for a server that has the first model's."""
    from trainer import weights

    def save(folder: Path) -> None:
        if weights.has_adapter(model):
            with tempfile.TemporaryDirectory() as delta:
                weights.save_adapter(model, Path(delta))
                weights.save_combined_adapter(folder, Path(delta), start_folder, base_folder)
        weights.make_saver(model, tokenizer)(folder)

    return save


def make_saver_with_adapter(save: Callable[[Path], None], reference_folder: Path, base_folder: Path) -> Callable[[Path], None]:
    """`save` of the RL phase, and the same adapter."""
    from trainer import weights

    def both(folder: Path) -> None:
        save(folder)
        weights.save_combined_adapter(folder, folder / weights.RL_FOLDER, reference_folder, base_folder)

    return both


def learn_reward(trainer: Trainer, batch: Batch) -> _TrainOutput:
    """The reward model on soft labels: from the last one, or from the policy with a fresh head."""
    from trainer import distributed, reward

    manifest, settings = batch.manifest, batch.settings
    settings.pop("replay_ratio", None)  # the rows are there already
    version = manifest.base_reward_version
    base = trainer.get_policy_folder(manifest.base_policy_version)
    model, metrics = distributed.call_learner(
        reward.train,
        trainer.get_version_folder(PolicyKind.REWARD, version) if version else base,
        [_make_preference_example(row) for row in batch.rows],
        seed=manifest.seed or 0,
        hardware=_get_hardware(trainer.settings),
        on_step=partial(trainer.publish_step_metrics, manifest),
        **settings,
    )
    return model.save, metrics


def learn_ppo(trainer: Trainer, batch: Batch) -> _TrainOutput:
    """The policy on its own scored answers, held near the policy that the last supervised phase made."""
    from trainer import distributed, ppo, sft, weights

    manifest, settings = batch.manifest, batch.settings
    lora_rank, max_length = settings.pop("lora_rank"), settings.pop("max_length")
    policy = trainer.get_policy_folder(manifest.base_policy_version)
    reference = trainer.get_policy_folder(manifest.reference_policy_version or 0)
    tokenizer, hyperparameters = weights.load_tokenizer(policy), ppo.PPOConfig(**settings)
    learned, metrics = distributed.call_learner(
        ppo.train,
        policy,
        reference,
        [_make_rollout(row) for row in batch.rows],
        _score_rollouts(trainer, batch),
        hyperparameters,
        base_folder=None if reference == trainer.base_folder else trainer.base_folder,
        sl_rows=[sft.encode_example(tokenizer, _make_sft_example(row), max_length) for row in batch.sl_rows],
        lora_rank=lora_rank,
        hardware=_get_hardware(trainer.settings),
        seed=manifest.seed or 0,
        on_step=partial(trainer.publish_step_metrics, manifest),
    )
    if metrics["stopped_early"]:
        trainer.publish([_make_early_stop_incident(manifest, metrics, ppo.find_exceeded_limit(metrics, hyperparameters))])
    return make_saver_with_adapter(learned.save, reference, trainer.base_folder), metrics


def learn_dpo(trainer: Trainer, batch: Batch) -> _TrainOutput:
    """The policy on labels, held near the policy that the last supervised phase made."""
    from trainer import distributed, dpo

    manifest = batch.manifest
    reference = trainer.get_policy_folder(manifest.reference_policy_version or 0)
    save, metrics = distributed.call_learner(
        dpo.train,
        trainer.get_policy_folder(manifest.base_policy_version),
        reference,
        [_make_preference_example(row) for row in batch.rows],
        hardware=_get_hardware(trainer.settings),
        seed=manifest.seed or 0,
        on_step=partial(trainer.publish_step_metrics, manifest),
        **batch.settings,
    )
    return make_saver_with_adapter(save, reference, trainer.base_folder), metrics


def _score_rollouts(trainer: Trainer, batch: Batch) -> list[float]:
    """The reward model's normalised score of each rollout; all scores are published too."""
    from trainer import reward

    manifest = batch.manifest
    version = manifest.base_reward_version
    assert version is not None, "PPO batches are drawn only when there is a reward model"
    model = reward.load_reward_model(
        trainer.get_version_folder(PolicyKind.REWARD, version),
        _get_hardware(trainer.settings),
        policy=trainer.get_policy_folder(manifest.base_policy_version),
    )
    raw = model.score([(parse_messages(row), row["text"], row["finish_reason"] == "STOP") for row in batch.rows])
    normalised = model.normalize(raw)
    configuration = ids.compute_fingerprint("score", reward_version=version)
    trainer.publish(
        [
            Score(
                record_id=ids.compute_record_id("score", [str(row["response_id"])], configuration, row["completion_index"]),
                parent_ids=[str(row["response_id"])],
                prompt_id=str(row["prompt_id"]),
                run_id=manifest.run_id,
                stage="train",
                policy_version=row["policy_version"],
                response_id=str(row["response_id"]),
                completion_index=row["completion_index"],
                reward_version=version,
                score=score,
                normalized_score=value,
            )
            for row, score, value in zip(batch.rows, raw, normalised, strict=True)
        ]
    )
    return normalised


def _make_early_stop_incident(manifest: BatchManifest, metrics: dict[str, float], limit: str) -> Incident:
    return Incident(
        record_id=ids.compute_record_id("incident", [manifest.record_id], ids.compute_fingerprint("incident", title="kl")),
        parent_ids=[manifest.record_id],
        run_id=manifest.run_id,
        stage="train",
        policy_version=manifest.base_policy_version,
        phase=manifest.phase,
        title="PPO stopped early: the policy moved too far",
        detail=f"its KL passed ppo.{limit} after {metrics['steps']:.0f} steps; what it had learned until then is published",
        metrics=metrics,
    )


LEARNERS: dict[str, Learner] = {"sft": learn_sft, "reward": learn_reward, "ppo": learn_ppo, "dpo": learn_dpo}
