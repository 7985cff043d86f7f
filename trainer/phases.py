"""From a batch to a learner: what each phase hands to its learner, and what comes back to be saved.

A learner is a function of the trainer and a batch. It trains, passes each step's numbers to `trainer.step`, and returns a
function that saves what it made into a folder, and its metrics. It raises CannotLearn (or a class below it) when the batch
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
from trainer.batches import Batch, turns_of

if TYPE_CHECKING:
    from trainer.loop import Trainer
    from trainer.ppo import Rollout
    from trainer.reward import PreferenceExample
    from trainer.sft import SftExample
    from trainer.weights import Hardware

Trained = tuple[Callable[[Path], None], dict[str, float]]
Learner = Callable[["Trainer", Batch], Trained]


# Rows as the learners take them


def sft_example(row: Mapping[str, Any]) -> SftExample:
    from trainer.sft import SftExample

    return SftExample(
        messages=turns_of(row),
        completion=row["completion"],
        stopped=row["finish_reason"] == "STOP",
        record_id=str(row["record_id"]),
    )


def preference_example(row: Mapping[str, Any]) -> PreferenceExample:
    from trainer.reward import PreferenceExample

    return PreferenceExample(
        messages=turns_of(row),
        a=row["response_a"],
        b=row["response_b"],
        p_a=row["p_a"],
        record_id=str(row["record_id"]),
        a_stopped=row["finish_reason_a"] == "STOP",
        b_stopped=row["finish_reason_b"] == "STOP",
        exchangeable=row["pairing"] == "completions" and row["label_source"] == "AI",
    )


def rollout(row: Mapping[str, Any]) -> Rollout:
    from trainer.ppo import Rollout

    return Rollout(
        prompt_token_ids=tuple(row["prompt_token_ids"]),
        token_ids=tuple(row["token_ids"]),
        logprobs=tuple(row["logprobs"]),
        stopped=row["finish_reason"] == "STOP",
        policy_version=row["policy_version"],
        record_id=str(row["response_id"]),
        temperature=row["temperature"],
    )


# The phases


def hardware_of(settings: Settings) -> Hardware:
    """How learners use this machine; no part of a batch, whose rows train the same on another one."""
    from trainer.weights import Hardware

    train = settings.train
    return Hardware(train.micro_rows, train.checkpointing, train.precision)


def learn_sft(trainer: Trainer, batch: Batch) -> Trained:
    """The policy on the final texts of chains."""
    from trainer import processes, sft

    base, settings = trainer.policy_folder(batch.manifest.base_policy_version), batch.settings
    settings.pop("rounds", None)  # the rows are theirs already
    model, tokenizer, metrics = processes.call(
        sft.train,
        base,
        [sft_example(row) for row in batch.rows],
        seed=batch.manifest.seed or 0,
        hardware=hardware_of(trainer.settings),
        on_step=partial(trainer.step, batch.manifest),
        **settings,
    )
    return sft_saver(model, tokenizer, base, trainer.base), metrics


def sft_saver(model: Any, tokenizer: Any, base: Path, first: Path) -> Callable[[Path], None]:
    """Saves the policy that was trained on the weights of `base`, and the adapter for a server that has the first model's."""
    from trainer import weights

    def save(folder: Path) -> None:
        if weights.adapted(model):
            with tempfile.TemporaryDirectory() as delta:
                weights.save_delta(model, Path(delta))
                weights.add_adapter(folder, Path(delta), base, first)
        weights.saver(model, tokenizer)(folder)

    return save


def with_adapter(save: Callable[[Path], None], reference: Path, first: Path) -> Callable[[Path], None]:
    """`save` of the RL phase, and the same adapter."""
    from trainer import weights

    def both(folder: Path) -> None:
        save(folder)
        weights.add_adapter(folder, folder / weights.RL, reference, first)

    return both


def learn_reward(trainer: Trainer, batch: Batch) -> Trained:
    """The reward model on soft labels: from the last one, or from the policy with a fresh head."""
    from trainer import processes, reward

    manifest, settings = batch.manifest, batch.settings
    settings.pop("replay", None)  # the rows are there already
    version = manifest.base_reward_version
    base = trainer.policy_folder(manifest.base_policy_version)
    model, metrics = processes.call(
        reward.train,
        trainer.folder_of(PolicyKind.REWARD, version) if version else base,
        [preference_example(row) for row in batch.rows],
        seed=manifest.seed or 0,
        hardware=hardware_of(trainer.settings),
        on_step=partial(trainer.step, manifest),
        **settings,
    )
    return model.save, metrics


def learn_ppo(trainer: Trainer, batch: Batch) -> Trained:
    """The policy on its own scored answers, held near the policy that the last supervised phase made."""
    from trainer import ppo, processes, sft, weights

    manifest, settings = batch.manifest, batch.settings
    lora_rank, max_length = settings.pop("lora_rank"), settings.pop("max_length")
    policy = trainer.policy_folder(manifest.base_policy_version)
    reference = trainer.policy_folder(manifest.reference_policy_version or 0)
    tokenizer, hyperparameters = weights.load_tokenizer(policy), ppo.Hyperparameters(**settings)
    learned, metrics = processes.call(
        ppo.train,
        policy,
        reference,
        [rollout(row) for row in batch.rows],
        scores_of(trainer, batch),
        hyperparameters,
        first_folder=None if reference == trainer.base else trainer.base,
        sl_rows=[sft.encode(tokenizer, sft_example(row), max_length) for row in batch.sl_rows],
        lora_rank=lora_rank,
        hardware=hardware_of(trainer.settings),
        seed=manifest.seed or 0,
        on_step=partial(trainer.step, manifest),
    )
    if metrics["stopped_early"]:
        trainer.publish([stopped_early(manifest, metrics, ppo.passed_limit(metrics, hyperparameters))])
    return with_adapter(learned.save, reference, trainer.base), metrics


def learn_dpo(trainer: Trainer, batch: Batch) -> Trained:
    """The policy on labels, held near the policy that the last supervised phase made."""
    from trainer import dpo, processes

    manifest = batch.manifest
    reference = trainer.policy_folder(manifest.reference_policy_version or 0)
    save, metrics = processes.call(
        dpo.train,
        trainer.policy_folder(manifest.base_policy_version),
        reference,
        [preference_example(row) for row in batch.rows],
        hardware=hardware_of(trainer.settings),
        seed=manifest.seed or 0,
        on_step=partial(trainer.step, manifest),
        **batch.settings,
    )
    return with_adapter(save, reference, trainer.base), metrics


def scores_of(trainer: Trainer, batch: Batch) -> list[float]:
    """The reward model's normalised score of each rollout; all scores are published too."""
    from trainer import reward

    manifest = batch.manifest
    version = manifest.base_reward_version
    assert version is not None, "PPO batches are drawn only when there is a reward model"
    model = reward.load(
        trainer.folder_of(PolicyKind.REWARD, version),
        hardware_of(trainer.settings),
        policy=trainer.policy_folder(manifest.base_policy_version),
    )
    raw = model.score([(turns_of(row), row["text"], row["finish_reason"] == "STOP") for row in batch.rows])
    normalised = model.normalised(raw)
    configuration = ids.fingerprint(reward=version)
    trainer.publish(
        [
            Score(
                record_id=ids.record_id("score", [str(row["response_id"])], configuration, row["completion_index"]),
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


def stopped_early(manifest: BatchManifest, metrics: dict[str, float], limit: str) -> Incident:
    return Incident(
        record_id=ids.record_id("incident", [manifest.record_id], ids.fingerprint(what="kl")),
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
