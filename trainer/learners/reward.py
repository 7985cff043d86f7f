"""Train the reward model on soft labels. The reward model gives each response a scalar score.

For a pair with the judge's probability p that A is better, the loss is (Lee et al. 2023, section 3)

    -[p log s(rA - rB) + (1 - p) log s(rB - rA)] + c * (rA + rB)^2

The first term has its minimum at s(rA - rB) = p. The second term keeps scores near zero.

A tenth of the prompts is never used for training. These prompts are selected by hash, so they are the same in every batch.
These held-out prompts are used to measure the accuracy, the calibration, the margin and the correlation with length. The
held-out prompts are also used to measure the mean and the standard deviation that normalize the scores. The mean and the
standard deviation are saved in the checkpoint (`reward.json`) and do not change. A model is rejected in two cases:

- The model agrees with fewer held-out labels than its starting model did, and the difference is statistically significant.
  Fine-tuning on the newest labels can reverse what earlier labels taught.
- The agreement of the model with the held-out labels is not better than chance. PPO would learn from noise.

Each member of an ensemble has its own seed for the head, the shuffling and the adapter. The score of the ensemble is mean -
lambda * variance of the members' normalized scores. This score is low where the members disagree (Coste et al. 2023,
uncertainty-weighted optimization, eq. 4).
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from trl import RewardConfig, RewardTrainer

from engine.errors import TrainingFailed, UsageError
from engine.models.chat_template import encode_completion, encode_prompt
from engine.statistics import Z_SCORE_95, compute_calibration_error, compute_correlation
from engine.text import format_count
from schemas.records import ChatMessage
from trainer import distributed, hf, sharding, weights

logger = logging.getLogger("charter.trainer")
_NORMALIZATION_FILE = "reward.json"
_MIN_STD = 1e-4
_SCORE_BATCH_SIZE = 16
_HELD_OUT_FRACTION = 0.1  # the fraction of prompts whose labels are never used for training
_MIN_HELD_OUT_PAIRS = 8  # with fewer than 8 pairs, the mean and the deviation are too noisy
_MIN_LABELS_FOR_TEST = 16  # the probability that 16 coin flips are all equal is 1 / 32,768
_SIGNIFICANCE_LEVEL = 0.025  # the probability that a guessing model is accepted


class EqualRewards(TrainingFailed):
    """The reward model gives every response the same score."""


class RewardModelRegression(TrainingFailed):
    """The reward model agrees with significantly fewer held-out labels than its starting model did."""


class RewardModelAtChance(TrainingFailed):
    """The reward model's agreement with the held-out labels is not better than chance."""


class OneSidedLabels(TrainingFailed):
    """Every label prefers the response in the same position, although both responses were sampled in the same way."""


@dataclass(frozen=True)
class PreferenceExample:
    """An example has two responses to one prompt, and the probability that response A is better.

    `exchangeable` is true if both responses were sampled in the same way. A judge who reads the responses then prefers each
    position about equally often.
    """

    messages: tuple[ChatMessage, ...]
    response_a: str
    response_b: str
    p_a: float
    record_id: str
    ends_with_eos_a: bool = False
    ends_with_eos_b: bool = False
    exchangeable: bool = False


def compute_soft_label_loss(
    rewards_a: torch.Tensor, rewards_b: torch.Tensor, p_a: torch.Tensor, center_rewards_coefficient: float
) -> torch.Tensor:
    """Return the mean loss over pairs. All tensors have shape (B,)."""
    gap = rewards_a - rewards_b
    preference = -(p_a * F.logsigmoid(gap) + (1 - p_a) * F.logsigmoid(-gap))
    return (preference + center_rewards_coefficient * (rewards_a + rewards_b) ** 2).mean()


def _encode_response(
    tokenizer: Any, messages: Sequence[ChatMessage], response: str, ends_with_eos: bool, max_length: int
) -> list[int]:
    """Return prompt and response as token ids.

    A long sequence is truncated at the beginning, so the end of the response is always kept.
    """
    ids = encode_prompt(tokenizer, messages) + encode_completion(tokenizer, response, ends_with_eos=ends_with_eos)
    return ids[-max_length:]


def _pad_sequences(sequences: Sequence[Sequence[int]], pad_token_id: int) -> dict[str, torch.Tensor]:
    """Return right-padded ids and their mask. Both have shape (B, T)."""
    longest = max(len(sequence) for sequence in sequences)
    ids = torch.tensor([[*sequence, *[pad_token_id] * (longest - len(sequence))] for sequence in sequences])
    mask = torch.tensor([[1] * len(sequence) + [0] * (longest - len(sequence)) for sequence in sequences])
    return {"input_ids": ids, "attention_mask": mask}


class SoftLabelRewardTrainer(RewardTrainer):
    """This class is trl's RewardTrainer with a loss for soft labels. trl's loss uses a margin instead of a probability."""

    center_rewards_coefficient = 0.0
    pad_token_id = 0

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        p_a = inputs.pop("p_a")
        # trl and transformers set this to the tokenizer's padding token, which is often the end token. With that token, the
        # score would be read at the padding or before the end. `RewardModel` reads the score at the real end.
        self.model.config.get_text_config().pad_token_id = self.pad_token_id
        outputs = model(**inputs, use_cache=False)
        r_a, r_b = outputs.logits.squeeze(-1).float().chunk(2)
        loss = compute_soft_label_loss(r_a, r_b, p_a, self.center_rewards_coefficient)
        with torch.no_grad():
            agree = ((r_a > r_b) == (p_a > 0.5)).float().mean()
            self._metrics["train"]["accuracy"].append(agree.item())
            self._metrics["train"]["margin"].append((r_a - r_b).abs().mean().item())
        return (loss, outputs) if return_outputs else loss


def train(
    folder: Path,
    examples: Sequence[PreferenceExample],
    *,
    learning_rate: float,
    epochs: int = 1,
    batch_size: int = 8,
    center_rewards_coefficient: float = 0.01,
    ensemble_size: int = 1,
    variance_penalty: float = 0.1,
    lora_rank: int = 0,
    max_length: int = 1024,
    require_above_chance: bool = True,
    hardware: weights.Hardware = weights.DEFAULT_HARDWARE,
    seed: int = 0,
    on_step: hf.StepCallback = hf.ignore_step,
) -> tuple[RewardModel, dict[str, float]]:
    """Train from the model in `folder` (a policy, or an earlier reward model). Return the reward model and its metrics.

    The steps of an ensemble's members are reported one after the other.

    Raise OneSidedLabels when all labels prefer the same position. Raise EqualRewards when all held-out responses have the same
    score. Raise RewardModelRegression when an earlier reward model in `folder` agreed with more of the held-out labels. Raise
    RewardModelAtChance when `require_above_chance` is true and the agreement is not better than chance. Raise TrainingFailed
    when a metric is not finite.
    """
    require_two_sided_labels(examples)
    train_examples, held_out = split_held_out(examples)
    tokenizer = weights.load_tokenizer(folder)
    rows = [_encode_pair(tokenizer, example, max_length) for example in train_examples]
    model = RewardModel([], tokenizer, variance_penalty, max_length=max_length, hardware=hardware)
    metrics: dict[str, float] = {}
    starts_from_reward_model = (folder / _NORMALIZATION_FILE).exists()
    agreed_before = load_reward_model(folder, hardware).check_label_agreement(held_out) if starts_from_reward_model else None
    for index in range(ensemble_size):
        previous_steps = int(metrics.get("steps", 0))

        def report_step(step: int, metrics: dict[str, float], previous_steps: int = previous_steps) -> None:
            on_step(previous_steps + step, metrics)

        scorer, metrics = _train_member(
            load_initial_scorer(
                folder,
                index,
                seed if ensemble_size > 1 else None,
                dtype=hardware.weights_dtype if lora_rank else torch.float32,
            ),
            rows,
            tokenizer,
            training_arguments={
                "learning_rate": learning_rate * (weights.LORA_LEARNING_RATE_FACTOR if lora_rank else 1.0),
                "epochs": epochs,
                "batch_size": batch_size,
                "seed": seed + index,
                "max_length": max_length,
                "hardware": hardware,
                "shuffle": index > 0,
            },
            center_rewards_coefficient=center_rewards_coefficient,
            lora_rank=lora_rank,
            on_step=report_step,
        )
        metrics["steps"] += previous_steps
        model.members.append(EnsembleMember(scorer))
    metrics |= model.fit_normalization(train_examples, held_out) | {"examples": float(len(train_examples))}
    agreed = model.check_label_agreement(held_out)
    if agreed_before is not None:
        require_no_regression(agreed_before, agreed)
    check_against_chance(int(agreed.sum()), len(agreed), require=require_above_chance)
    for member in model.members:
        member.model = weights.gather_model(member.model)
    return model, metrics


def require_no_regression(before: torch.Tensor, after: torch.Tensor) -> None:
    """Raise RewardModelRegression when the model agrees with significantly fewer labels than before (McNemar's test)."""
    lost, won = int((before & ~after).sum()), int((~before & after).sum())
    if lost - won > Z_SCORE_95 * math.sqrt(lost + won):
        raise RewardModelRegression(
            f"the new reward model agrees with {int(after.sum())} of {len(after)} held-out labels, and the previous model"
            f" agreed with {int(before.sum())}",
            "chance does not explain this loss, so the new model is not published. The previous model stays in use, and the labels of"
            " this batch can be sampled again",
            "wait for more labels, or lower reward.learning_rate, or raise reward.replay_ratio",
        )


def check_against_chance(num_agreed: int, num_labels: int, *, require: bool) -> None:
    """Raise RewardModelAtChance, or log a warning, when the agreement with the held-out labels is not better than chance.

    The function computes the exact (binomial) probability that a guessing model agrees with at least `num_agreed` labels. The
    agreement is better than chance if this probability is at most `_SIGNIFICANCE_LEVEL`. With fewer labels than
    `_MIN_LABELS_FOR_TEST`, or if `require` is false, only a warning is logged.
    """
    by_chance = sum(math.comb(num_labels, heads) for heads in range(num_agreed, num_labels + 1)) / 2**num_labels
    if by_chance <= _SIGNIFICANCE_LEVEL:
        return
    if not num_labels:
        logger.warning(
            "the reward model could not be checked, because no label is held out. It is published anyway (docs/training.md)"
        )
        return
    agreement = f"the reward model agrees with {num_agreed} of {num_labels} held-out labels"
    if num_labels < _MIN_LABELS_FOR_TEST:
        logger.warning("%s, too few to exclude chance. The model is published anyway (docs/training.md)", agreement)
        return
    message = f"{agreement}, which is not better than chance"
    if require:
        raise RewardModelAtChance(
            message,
            "PPO would learn from noise, so the model is not published. The labels of this batch can be sampled again",
            "wait for more labels, or raise reward.epochs. To publish the model anyway, set reward.require_above_chance = false."
            " To measure the judge, type: charter eval agreement --pairs FILE",
        )
    logger.warning("%s. The model is published anyway (docs/training.md)", message)


def require_two_sided_labels(examples: Sequence[PreferenceExample]) -> None:
    """Raise OneSidedLabels when all exchangeable pairs prefer the same position.

    Batches with fewer than `_MIN_LABELS_FOR_TEST` such pairs are not checked.
    """
    labels = [example.p_a for example in examples if example.exchangeable]
    for side, one_sided in (("first", all(p > 0.5 for p in labels)), ("second", all(p < 0.5 for p in labels))):
        if one_sided and len(labels) >= _MIN_LABELS_FOR_TEST:
            raise OneSidedLabels(
                f"all {len(labels)} labels prefer the {side} response",
                "both responses of a pair were sampled in the same way, so the judge prefers a position and ignores the content",
                "set judge.reject_position_flips = true or another models.judge, and judge again: charter replay --stage judge",
            )


def split_held_out(examples: Sequence[PreferenceExample]) -> tuple[list[PreferenceExample], list[PreferenceExample]]:
    """Split the examples into training examples and held-out examples.

    A prompt is held out if its hash is below `_HELD_OUT_FRACTION`. If this rule selects fewer than `_MIN_HELD_OUT_PAIRS` pairs,
    the prompts with the next lowest hashes are also held out, up to a quarter of the batch.
    """
    by_prompt: dict[float, list[PreferenceExample]] = {}
    for example in examples:
        by_prompt.setdefault(_hash_prompt(example.messages), []).append(example)
    held_out: set[float] = set()
    count = 0
    for prompt_hash in sorted(by_prompt):
        new_count = count + len(by_prompt[prompt_hash])
        is_needed = count < _MIN_HELD_OUT_PAIRS and new_count <= len(examples) // 4
        if not (is_needed or prompt_hash < _HELD_OUT_FRACTION) or new_count >= len(examples):
            break
        held_out.add(prompt_hash)
        count = new_count
    sides: tuple[list[PreferenceExample], list[PreferenceExample]] = ([], [])
    for example in examples:
        sides[_hash_prompt(example.messages) in held_out].append(example)
    return sides


def _hash_prompt(messages: Sequence[ChatMessage]) -> float:
    """Return a hash of a prompt's messages as a number in [0, 1)."""
    text = json.dumps([(message.role, message.content) for message in messages])
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8]) / 2**64


def _encode_pair(tokenizer: Any, example: PreferenceExample, max_length: int) -> dict[str, Any]:
    chosen = _encode_response(tokenizer, example.messages, example.response_a, example.ends_with_eos_a, max_length)
    rejected = _encode_response(tokenizer, example.messages, example.response_b, example.ends_with_eos_b, max_length)
    longest = max(len(chosen), len(rejected))
    return {"chosen_ids": chosen, "rejected_ids": rejected, "p_a": example.p_a, "length": longest}


def load_initial_scorer(folder: Path, member_index: int, seed: int | None, *, dtype: torch.dtype = torch.float32) -> Any:
    """Load the scorer that an ensemble member starts from.

    If there is a checkpoint, the member starts from the same member of the last checkpoint. Otherwise, the member starts from
    the policy with a new head. A new head starts at zero. If `seed` is given, the head starts at random values, so that the
    members differ.
    """
    trained = (folder / _NORMALIZATION_FILE).exists()
    member_folder = _get_member_folder(folder, member_index)
    if trained and member_folder.exists():
        return weights.load_scorer(member_folder, trained=True, dtype=dtype)
    scorer = weights.load_scorer(folder, dtype=dtype)
    if seed is not None:
        generator = torch.Generator().manual_seed(seed + member_index)
        scale = scorer.config.get_text_config().initializer_range
        sharding.copy_to_parameter(scorer.score.weight, torch.randn(scorer.score.weight.shape, generator=generator) * scale)
    return scorer


def _get_member_folder(folder: Path, member_index: int) -> Path:
    """Return the folder of an ensemble member.

    The first member uses the checkpoint folder itself. The other members use subfolders.
    """
    return folder / f"member-{member_index}" if member_index else folder


def _train_member(
    scorer: Any,
    rows: Sequence[dict[str, Any]],
    tokenizer: Any,
    *,
    training_arguments: dict[str, Any],
    center_rewards_coefficient: float,
    lora_rank: int,
    on_step: hf.StepCallback,
) -> tuple[Any, dict[str, float]]:
    """Train one scorer with trl. Return the scorer and its metrics."""
    torch.manual_seed(training_arguments["seed"])  # initializes the LoRA matrices
    pad = _set_unused_pad_token(scorer, [row[side] for row in rows for side in ("chosen_ids", "rejected_ids")])
    model = weights.add_lora(scorer, lora_rank, "SEQ_CLS", modules_to_save=["score"])

    def collate(batch: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        sequences = [row["chosen_ids"] for row in batch] + [row["rejected_ids"] for row in batch]
        return _pad_sequences(sequences, pad) | {"p_a": torch.tensor([row["p_a"] for row in batch])}

    with tempfile.TemporaryDirectory() as output:
        trainer = SoftLabelRewardTrainer(
            model=model,
            args=RewardConfig(
                **hf.build_training_arguments(output, **training_arguments, texts_per_row=2), remove_unused_columns=False
            ),
            train_dataset=hf.make_dataset(rows),
            processing_class=tokenizer,
            data_collator=collate,
        )
        trainer.center_rewards_coefficient, trainer.pad_token_id = center_rewards_coefficient, pad
        metrics = hf.run_trainer(trainer, on_step)
    return trainer.model, metrics


def _set_unused_pad_token(model: Any, sequences: Sequence[Sequence[int]]) -> int:
    """Set and return a padding id that is not in these sequences.

    The score is then read at the real end of each sequence.
    """
    config = model.config.get_text_config()
    config.pad_token_id = weights.find_unused_token_id(sequences, config.vocab_size)
    return int(config.pad_token_id)


@dataclass
class EnsembleMember:
    """A member has one scorer, and the mean and standard deviation that normalize its scores."""

    model: Any
    mean: float = 0.0
    deviation: float = 1.0


@dataclass
class RewardModel:
    """The reward model scores responses.

    Normalized scores have mean 0 and standard deviation 1 over the held-out responses of the last training.
    """

    members: list[EnsembleMember]
    tokenizer: Any
    variance_penalty: float = 0.0
    mean: float = 0.0
    deviation: float = 1.0
    max_length: int = 1024
    hardware: weights.Hardware = field(default=weights.DEFAULT_HARDWARE)

    def score(self, responses: Sequence[tuple[Sequence[ChatMessage], str, bool]]) -> list[float]:
        """Return the score of each (messages, response, ends_with_eos). The scores are not normalized."""
        scores: list[float] = self.combine_member_scores(self.score_members(responses)).tolist()
        return scores

    def normalize(self, scores: Sequence[float]) -> list[float]:
        """Normalize the scores. Over the held-out responses, normalized scores have mean 0 and standard deviation 1."""
        return [(score - self.mean) / self.deviation for score in scores]

    @torch.inference_mode()
    def score_members(self, responses: Sequence[tuple[Sequence[ChatMessage], str, bool]]) -> torch.Tensor:
        """Return the scores (members, N) that each member gives to each (messages, response, ends_with_eos)."""
        encoded = [
            _encode_response(self.tokenizer, messages, response, ends_with_eos, self.max_length)
            for messages, response, ends_with_eos in responses
        ]
        order = sorted(range(len(encoded)), key=lambda i: len(encoded[i]))
        scores = torch.zeros(len(self.members), len(encoded))
        for index, member in enumerate(self.members):
            member.model.eval()
            pad = _set_unused_pad_token(member.model, encoded)
            for start in range(0, len(order), _SCORE_BATCH_SIZE):
                chunk = order[start : start + _SCORE_BATCH_SIZE]
                inputs = _pad_sequences([encoded[i] for i in chunk], pad)
                with self.hardware.autocast():
                    logits = member.model(**{key: value.to(member.model.device) for key, value in inputs.items()}).logits
                scores[index, chunk] = logits.squeeze(-1).float().cpu()
            sharding.release_gathered_weights(member.model)
        return distributed.broadcast_from_main(scores)

    def combine_member_scores(self, member_scores: torch.Tensor) -> torch.Tensor:
        """Combine the members' scores (members, N) into one score per response (N,)."""
        if len(self.members) == 1:
            return member_scores[0]
        mean, deviation = (torch.tensor([getattr(m, name) for m in self.members])[:, None] for name in ("mean", "deviation"))
        normalized = (member_scores - mean) / deviation
        return normalized.mean(0) - self.variance_penalty * normalized.var(0, correction=0)

    def check_label_agreement(self, examples: Sequence[PreferenceExample]) -> torch.Tensor:
        """Return a bool tensor (N,), which is true where the scores and the label prefer the same response.

        Only decided labels (other than 0.5) are included.
        """
        decided = [e for e in examples if e.p_a != 0.5]
        if not decided:
            return torch.zeros(0, dtype=torch.bool)
        a, b = torch.tensor(self.score(_list_responses(decided))).chunk(2)
        return (a > b) == (torch.tensor([e.p_a for e in decided]) > 0.5)

    def fit_normalization(
        self, train_examples: Sequence[PreferenceExample], held_out_examples: Sequence[PreferenceExample]
    ) -> dict[str, float]:
        """Set the mean and the standard deviation from the held-out responses.

        Return metrics of the agreement between the scores and the labels. If too few labels are held out, all labels are used
        and a warning is logged.
        """
        measured = list(held_out_examples)
        if len(held_out_examples) < _MIN_HELD_OUT_PAIRS:
            logger.warning(
                "%s could be held out. The reward model is measured on all labels, including its training labels",
                f"only {format_count(len(held_out_examples), 'labels')}" if held_out_examples else "no label",
            )
            measured = [*held_out_examples, *train_examples]
        responses = _list_responses(measured)
        member_scores = self.score_members(responses)
        for member, scores in zip(self.members, member_scores, strict=True):
            member.mean, member.deviation = float(scores.mean()), float(scores.std(correction=0))
            _require_varying_scores(member.deviation, len(responses))
        scores = self.combine_member_scores(member_scores)
        self.mean, self.deviation = float(scores.mean()), float(scores.std(correction=0))
        _require_varying_scores(self.deviation, len(responses))
        labels = torch.tensor([e.p_a for e in measured])
        lengths = torch.tensor([float(len(response)) for _, response, _ in responses])
        return compute_agreement_metrics(member_scores, scores / self.deviation, labels, lengths) | {
            "reward/mean": self.mean,
            "reward/deviation": self.deviation,
            "reward/held_out": float(len(held_out_examples)),
        }

    def save(self, folder: Path) -> None:
        """Save the weights and the tokenizer of every member, and the normalization."""
        for index, member in enumerate(self.members):
            member_folder = _get_member_folder(folder, index)
            member_folder.mkdir(exist_ok=True)
            weights.make_saver(member.model, self.tokenizer)(member_folder)
        normalization = {
            "mean": self.mean,
            "deviation": self.deviation,
            "variance_penalty": self.variance_penalty,
            "max_length": self.max_length,
            "members": [[member.mean, member.deviation] for member in self.members],
        }
        (folder / _NORMALIZATION_FILE).write_text(json.dumps(normalization))


def _list_responses(examples: Sequence[PreferenceExample]) -> list[tuple[Sequence[ChatMessage], str, bool]]:
    """Return (messages, response, ends_with_eos) of every response A, then of every response B."""
    responses_a = [(e.messages, e.response_a, e.ends_with_eos_a) for e in examples]
    return [*responses_a, *((e.messages, e.response_b, e.ends_with_eos_b) for e in examples)]


def _require_varying_scores(deviation: float, num_responses: int) -> None:
    if deviation < _MIN_STD:
        raise EqualRewards(
            "the reward model gives every response the same score",
            f"the standard deviation over {format_count(num_responses, 'responses')} is {deviation:.1e}",
            "use more labels, more epochs or a higher reward.learning_rate",
        )


def compute_agreement_metrics(
    member_scores: torch.Tensor, scores: torch.Tensor, labels: torch.Tensor, lengths: torch.Tensor
) -> dict[str, float]:
    """Return metrics of the agreement between the scores and the labels (N,).

    `member_scores` has shape (members, 2N). `scores` and `lengths` have shape (2N,). All responses A come first, then all
    responses B. Brier score and expected calibration error compare the soft label with s(rA - rB), averaged over the members.
    Pairs without a preference (p = 0.5) are excluded from both accuracies.
    """
    a, b = scores.chunk(2)
    raw_a, raw_b = member_scores.chunk(2, dim=1)
    predicted = torch.sigmoid(raw_a - raw_b).mean(0)
    longer = lengths.chunk(2)[0] - lengths.chunk(2)[1]
    preferred = torch.sign(labels - 0.5)
    decided = preferred != 0
    return {
        "reward/accuracy": _compute_fraction(((a - b) * preferred > 0)[decided]),
        "reward/length_accuracy": _compute_fraction((longer * preferred > 0)[decided]),
        "reward/margin": float(((a - b) * preferred).mean()),
        "reward/brier": float(((predicted - labels) ** 2).mean()),
        "reward/ece": compute_calibration_error(predicted.tolist(), labels.tolist()) or 0.0,
        "reward/length_correlation": compute_correlation(scores.tolist(), lengths.tolist()),
        "reward/disagreement": float(member_scores.std(0, correction=0).mean()),
    }


def _compute_fraction(flags: torch.Tensor) -> float:
    """Return the fraction of true entries. Return 0 for an empty tensor."""
    return float(flags.float().mean()) if len(flags) else 0.0


def load_reward_model(
    folder: Path, hardware: weights.Hardware = weights.DEFAULT_HARDWARE, *, policy: Path | None = None
) -> RewardModel:
    """Load a trained reward model with its saved normalization.

    Raise UsageError when the folder does not contain a reward model, or when the architecture or the tokenizer differs from
    `policy`.
    """
    if policy is not None:
        weights.require_compatible_models(policy, folder, "the reward model")
    try:
        normalization = json.loads((folder / _NORMALIZATION_FILE).read_text())
        member_statistics = [(float(mean), float(deviation)) for mean, deviation in normalization["members"]]
        mean, deviation, penalty = (float(normalization[key]) for key in ("mean", "deviation", "variance_penalty"))
        max_length = int(normalization["max_length"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"{folder} does not contain a complete reward model",
            f"its {_NORMALIZATION_FILE} cannot be read: {error}",
            "restore the folder from a copy, or train a new reward model: charter train --phase reward",
        ) from error
    members = [
        EnsembleMember(weights.load_scorer(_get_member_folder(folder, index), trained=True), *statistics)
        for index, statistics in enumerate(member_statistics)
    ]
    return RewardModel(members, weights.load_tokenizer(folder), penalty, mean, deviation, max_length, hardware)


def score_responses(
    folder: Path,
    responses: Sequence[tuple[Sequence[ChatMessage], str, bool]],
    *,
    policy: Path,
    hardware: weights.Hardware = weights.DEFAULT_HARDWARE,
) -> tuple[list[float], list[float]]:
    """Load a reward model. Return its score and its normalized score of each (messages, response, ends_with_eos).

    Raise UsageError as `load_reward_model` does.
    """
    model = load_reward_model(folder, hardware, policy=policy)
    scores = model.score(responses)
    return scores, model.normalize(scores)
