"""The reward model: a scalar score for an answer, learned from soft labels.

For a pair with the judge's probability p that A is better, the loss is (Lee et al. 2023, section 3)

    -[p log s(rA - rB) + (1 - p) log s(rB - rA)] + c * (rA + rB)^2

whose minimum is at s(rA - rB) = p; the second term keeps scores near zero.

A tenth of the prompts, chosen by hash and so the same ones in every batch, never trains: accuracy, calibration, margin and the
correlation with length are theirs, and so are the mean and the deviation that scores are normalised with. Both are frozen in
the checkpoint (`reward.json`). Two kinds of model are refused. One agrees with fewer of these labels than the one that it
started from, beyond chance: fine-tuning on the newest labels can undo what earlier ones taught. The other agrees with no more
of them than chance may: PPO would follow its noise.

An ensemble has members of different seeds: heads, shuffles, adapters. Its score is mean - lambda * variance of the members'
normalised scores, which is low where they disagree (Coste et al. 2023, uncertainty-weighted optimisation, eq. 4).
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
from datasets import Dataset
from trl import RewardConfig, RewardTrainer

from engine.errors import CannotLearn, UsageError
from engine.models.chat import completion_ids, prompt_ids
from schemas.records import ChatMessage
from trainer import hf, weights

log = logging.getLogger("charter.trainer")
NORMALISATION = "reward.json"
LEAST_DEVIATION = 1e-4
SCORE_ROWS = 16
HELD_OUT = 0.1  # share of prompts whose labels never train
LEAST_HELD_OUT = 8  # pairs; a mean and a deviation of fewer are noise
MANY = 16  # coin flips that all fall the same way once in 32,768 times
BINS = 10
SIGMAS = 1.96
CHANCE = 0.025  # of a model without any knowledge to pass


class EqualRewards(CannotLearn):
    """The reward model gives every text the same score."""


class Forgot(CannotLearn):
    """The reward model agrees with fewer held-out labels than the one that it started from, beyond chance."""


class AtChance(CannotLearn):
    """The reward model agrees with no more held-out labels than chance may."""


class OneSidedLabels(CannotLearn):
    """Every label prefers the answer in the same place, although the two were sampled alike."""


@dataclass(frozen=True)
class PreferenceExample:
    """Two answers to one prompt and the probability that A is better.

    `exchangeable`: both were sampled alike, so that a judge who reads them prefers either about as often.
    """

    messages: tuple[ChatMessage, ...]
    a: str
    b: str
    p_a: float
    record_id: str
    a_stopped: bool = False
    b_stopped: bool = False
    exchangeable: bool = False


def soft_label_loss(r_a: torch.Tensor, r_b: torch.Tensor, p_a: torch.Tensor, centring: float) -> torch.Tensor:
    """The mean loss over pairs; all arguments (B,)."""
    gap = r_a - r_b
    preference = -(p_a * F.logsigmoid(gap) + (1 - p_a) * F.logsigmoid(-gap))
    return (preference + centring * (r_a + r_b) ** 2).mean()


def encode(tokenizer: Any, messages: Sequence[ChatMessage], text: str, stopped: bool, max_length: int) -> list[int]:
    """Prompt and answer as ids; a too long prompt loses its beginning, never the answer its end."""
    ids = prompt_ids(tokenizer, messages) + completion_ids(tokenizer, text, stopped=stopped)
    return ids[-max_length:]


def padded(sequences: Sequence[Sequence[int]], pad: int) -> dict[str, torch.Tensor]:
    """Right-padded ids and mask, both (B, T)."""
    longest = max(len(sequence) for sequence in sequences)
    ids = torch.tensor([[*sequence, *[pad] * (longest - len(sequence))] for sequence in sequences])
    mask = torch.tensor([[1] * len(sequence) + [0] * (longest - len(sequence)) for sequence in sequences])
    return {"input_ids": ids, "attention_mask": mask}


class SoftLabelTrainer(RewardTrainer):
    """trl's RewardTrainer with the loss of soft labels (its own takes a margin, not a probability)."""

    centring = 0.0
    pad = 0

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        p_a = inputs.pop("p_a")
        # trl and transformers have both put the tokenizer's padding there, often the end token: scores would be read at
        # fillers, or before the end, and not where `RewardModel` reads them.
        self.model.config.get_text_config().pad_token_id = self.pad
        outputs = model(**inputs, use_cache=False)
        r_a, r_b = outputs.logits.squeeze(-1).float().chunk(2)
        loss = soft_label_loss(r_a, r_b, p_a, self.centring)
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
    centring: float = 0.01,
    members: int = 1,
    variance_penalty: float = 0.1,
    lora_rank: int = 0,
    max_length: int = 1024,
    require_above_chance: bool = True,
    hardware: weights.Hardware = weights.DEFAULT,
    seed: int = 0,
    on_step: hf.OnStep = hf.ignore,
) -> tuple[RewardModel, dict[str, float]]:
    """Train on the model in `folder` (a policy, or an earlier reward model); returns the scorer and its metrics.

    Raises OneSidedLabels, EqualRewards when the scores of the held-out texts do not differ, Forgot when an earlier reward model
    in `folder` agreed with more of the held-out labels, AtChance when `require_above_chance` and it agrees with no more of them
    than chance may, CannotLearn when a number is not finite. The steps of an ensemble's members are reported one after the
    other.
    """
    refuse_one_sided(examples)
    taught, held_out = split(examples)
    tokenizer = weights.load_tokenizer(folder)
    rows = [encoded_pair(tokenizer, example, max_length) for example in taught]
    model = RewardModel([], tokenizer, variance_penalty, max_length=max_length, hardware=hardware)
    metrics: dict[str, float] = {}
    before = load(folder, hardware).agrees(held_out) if (folder / NORMALISATION).exists() else None
    for number in range(members):
        done = int(metrics.get("steps", 0))

        def report(step: int, metrics: dict[str, float], done: int = done) -> None:
            on_step(done + step, metrics)

        scorer, metrics = train_member(
            starting_point(folder, number, seed if members > 1 else None),
            rows,
            tokenizer,
            arguments={"learning_rate": learning_rate * (weights.LORA_SPEEDUP if lora_rank else 1.0), "epochs": epochs}
            | {"batch_size": batch_size, "seed": seed + number, "max_length": max_length, "hardware": hardware}
            | {"shuffle": number > 0},
            centring=centring,
            lora_rank=lora_rank,
            on_step=report,
        )
        metrics["steps"] += done
        model.members.append(Member(scorer))
    metrics |= model.normalise(taught, held_out) | {"examples": float(len(taught))}
    agreed = model.agrees(held_out)
    if before is not None:
        refuse_forgotten(before, agreed)
    compare_with_chance(int(agreed.sum()), len(agreed), require=require_above_chance)
    return model, metrics


def refuse_forgotten(before: torch.Tensor, after: torch.Tensor) -> None:
    """Raise Forgot when fewer labels are met than before, beyond chance (McNemar's test on the labels that changed)."""
    lost, won = int((before & ~after).sum()), int((~before & after).sum())
    if lost - won > SIGMAS * math.sqrt(lost + won):
        raise Forgot(
            f"the new reward model agrees with {int(after.sum())} of {len(after)} held-out labels, the one before with"
            f" {int(before.sum())}",
            "it has forgotten what it knew, and is not published; the one before stays in use, and the labels are free again",
            "wait for more labels, or lower reward.learning_rate, or raise reward.replay",
        )


def compare_with_chance(agreed: int, labels: int, *, require: bool) -> None:
    """Raise AtChance, or warn, when a coin agrees with as many of the decided held-out labels too often (`CHANCE`).

    Fewer labels than `MANY` cannot tell, so they are warned of only. The probability is exact: that of at least `agreed` heads.
    """
    by_chance = sum(math.comb(labels, heads) for heads in range(agreed, labels + 1)) / 2**labels
    if by_chance <= CHANCE:
        return
    what = f"the reward model agrees with {agreed} of {labels} held-out labels, as chance may"
    if require and labels >= MANY:
        raise AtChance(
            what,
            "PPO would follow its noise, so it is not published, and the labels are free again",
            "wait for more labels, raise reward.epochs, or measure the judge: charter eval agreement;"
            " reward.require_above_chance = false publishes it all the same",
        )
    log.warning("%s: PPO follows it all the same (docs/training.md)", what)


def refuse_one_sided(examples: Sequence[PreferenceExample]) -> None:
    """Raise OneSidedLabels when every one of many exchangeable pairs prefers the same side."""
    labels = [example.p_a for example in examples if example.exchangeable]
    for side, one_sided in (("first", all(p > 0.5 for p in labels)), ("second", all(p < 0.5 for p in labels))):
        if one_sided and len(labels) >= MANY:
            raise OneSidedLabels(
                f"all {len(labels)} labels prefer the {side} answer",
                "both answers of a pair were sampled alike: this judge goes by their place, not by what they say",
                "set judge.reject_flips = true or another models.judge, and judge anew: charter replay --from judge",
            )


def split(examples: Sequence[PreferenceExample]) -> tuple[list[PreferenceExample], list[PreferenceExample]]:
    """The examples that train, and those that are held out: the prompts whose hash lies in the lowest tenth.

    Where those are fewer than `LEAST_HELD_OUT` pairs the next lowest hashes join them, up to a quarter of the batch.
    """
    by_prompt: dict[float, list[PreferenceExample]] = {}
    for example in examples:
        by_prompt.setdefault(place_of(example.messages), []).append(example)
    held_out: set[float] = set()
    count = 0
    for place in sorted(by_prompt):
        more = len(by_prompt[place])
        few = count < LEAST_HELD_OUT and count + more <= len(examples) // 4
        if not (few or place < HELD_OUT) or count + more >= len(examples):
            break
        held_out.add(place)
        count += more
    sides: tuple[list[PreferenceExample], list[PreferenceExample]] = ([], [])
    for example in examples:
        sides[place_of(example.messages) in held_out].append(example)
    return sides


def place_of(messages: Sequence[ChatMessage]) -> float:
    """A number in [0, 1) that follows from a prompt's text alone."""
    text = json.dumps([(message.role, message.content) for message in messages])
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8]) / 2**64


def encoded_pair(tokenizer: Any, example: PreferenceExample, max_length: int) -> dict[str, Any]:
    chosen = encode(tokenizer, example.messages, example.a, example.a_stopped, max_length)
    rejected = encode(tokenizer, example.messages, example.b, example.b_stopped, max_length)
    longest = max(len(chosen), len(rejected))
    return {"chosen_ids": chosen, "rejected_ids": rejected, "p_a": example.p_a, "length": longest}


def starting_point(folder: Path, number: int, seed: int | None) -> Any:
    """The scorer that an ensemble's member begins with: itself in the last checkpoint, or a fresh head of its own seed."""
    trained = (folder / NORMALISATION).exists()
    own = member_folder(folder, number)
    if trained and own.exists():
        return weights.load_scorer(own, trained=True)
    scorer = weights.load_scorer(folder)
    if seed is not None:
        generator = torch.Generator().manual_seed(seed + number)
        scale = scorer.config.get_text_config().initializer_range
        fresh = torch.randn(scorer.score.weight.shape, generator=generator) * scale
        scorer.score.weight.data.copy_(fresh)
    return scorer


def member_folder(folder: Path, number: int) -> Path:
    """The first member is the checkpoint itself, the others lie in it."""
    return folder / f"member-{number}" if number else folder


def train_member(
    scorer: Any,
    rows: Sequence[dict[str, Any]],
    tokenizer: Any,
    *,
    arguments: dict[str, Any],
    centring: float,
    lora_rank: int,
    on_step: hf.OnStep,
) -> tuple[Any, dict[str, float]]:
    """Train one scorer through trl; returns it whole, adapters merged, and its metrics."""
    torch.manual_seed(arguments["seed"])  # LoRA's first matrices
    pad = pad_for(scorer, [row[side] for row in rows for side in ("chosen_ids", "rejected_ids")])
    model = weights.with_lora(scorer, lora_rank, "SEQ_CLS", keep=["score"])

    def collate(batch: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        sequences = [row["chosen_ids"] for row in batch] + [row["rejected_ids"] for row in batch]
        return padded(sequences, pad) | {"p_a": torch.tensor([row["p_a"] for row in batch])}

    with tempfile.TemporaryDirectory() as output:
        trainer = SoftLabelTrainer(
            model=model,
            args=RewardConfig(**hf.arguments(output, **arguments, texts=2), remove_unused_columns=False),
            train_dataset=Dataset.from_list(list(rows)),
            processing_class=tokenizer,
            data_collator=collate,
        )
        trainer.centring, trainer.pad = centring, pad
        metrics = hf.run(trainer, on_step)
    return weights.merged(trainer.model), metrics


def pad_for(model: Any, sequences: Sequence[Sequence[int]]) -> int:
    """Set and return a padding id that none of these sequences has, so that pooling finds their real ends."""
    config = model.config.get_text_config()
    config.pad_token_id = weights.unused_id(sequences, config.vocab_size)
    return int(config.pad_token_id)


@dataclass
class Member:
    """One scorer, and what its scores are normalised with."""

    model: Any
    mean: float = 0.0
    deviation: float = 1.0


@dataclass
class RewardModel:
    """Scores answers; `normalised` scores have mean 0 and deviation 1 over the held-out labels of its last training."""

    members: list[Member]
    tokenizer: Any
    variance_penalty: float = 0.0
    mean: float = 0.0
    deviation: float = 1.0
    max_length: int = 1024
    hardware: weights.Hardware = field(default=weights.DEFAULT)

    def score(self, texts: Sequence[tuple[Sequence[ChatMessage], str, bool]]) -> list[float]:
        """The score of each (messages, answer, stopped), not yet normalised."""
        scores: list[float] = self.combined(self.raw(texts)).tolist()
        return scores

    def normalised(self, scores: Sequence[float]) -> list[float]:
        return [(score - self.mean) / self.deviation for score in scores]

    @torch.inference_mode()
    def raw(self, texts: Sequence[tuple[Sequence[ChatMessage], str, bool]]) -> torch.Tensor:
        """Each member's own score of each text, (members, N)."""
        encoded = [encode(self.tokenizer, messages, text, stopped, self.max_length) for messages, text, stopped in texts]
        order = sorted(range(len(encoded)), key=lambda i: len(encoded[i]))
        scores = torch.zeros(len(self.members), len(encoded))
        for number, member in enumerate(self.members):
            member.model.eval()
            pad = pad_for(member.model, encoded)
            for start in range(0, len(order), SCORE_ROWS):
                chunk = order[start : start + SCORE_ROWS]
                inputs = padded([encoded[i] for i in chunk], pad)
                with self.hardware.autocast():
                    logits = member.model(**{key: value.to(member.model.device) for key, value in inputs.items()}).logits
                scores[number, chunk] = logits.squeeze(-1).float().cpu()
        return scores

    def combined(self, raw: torch.Tensor) -> torch.Tensor:
        """One score for each text (N,) from those of the members (members, N)."""
        if len(self.members) == 1:
            return raw[0]
        mean, deviation = (torch.tensor([getattr(m, name) for m in self.members])[:, None] for name in ("mean", "deviation"))
        own = (raw - mean) / deviation
        return own.mean(0) - self.variance_penalty * own.var(0, correction=0)

    def agrees(self, examples: Sequence[PreferenceExample]) -> torch.Tensor:
        """For each decided label (one that is not 0.5), whether the scores prefer the same answer."""
        decided = [e for e in examples if e.p_a != 0.5]
        if not decided:
            return torch.zeros(0, dtype=torch.bool)
        texts = [(e.messages, e.a, e.a_stopped) for e in decided] + [(e.messages, e.b, e.b_stopped) for e in decided]
        a, b = torch.tensor(self.score(texts)).chunk(2)
        return (a > b) == (torch.tensor([e.p_a for e in decided]) > 0.5)

    def normalise(self, taught: Sequence[PreferenceExample], held_out: Sequence[PreferenceExample]) -> dict[str, float]:
        """Freeze mean and deviation over the held-out texts, and say how well the scores agree with their labels.

        A batch too small to spare enough labels is measured on all of them; the log says so.
        """
        measured = list(held_out)
        if len(held_out) < LEAST_HELD_OUT:
            log.warning(
                "only %d labels could be held out: the reward model is measured on all, those it learned from too",
                len(held_out),
            )
            measured = [*held_out, *taught]
        texts = [(e.messages, e.a, e.a_stopped) for e in measured] + [(e.messages, e.b, e.b_stopped) for e in measured]
        raw = self.raw(texts)
        for member, scores in zip(self.members, raw, strict=True):
            member.mean, member.deviation = float(scores.mean()), float(scores.std(correction=0))
            refuse_equal(member.deviation, len(texts))
        scores = self.combined(raw)
        self.mean, self.deviation = float(scores.mean()), float(scores.std(correction=0))
        refuse_equal(self.deviation, len(texts))
        labels = torch.tensor([e.p_a for e in measured])
        lengths = torch.tensor([float(len(text)) for _, text, _ in texts])
        return agreement(raw, scores / self.deviation, labels, lengths) | {
            "reward/mean": self.mean,
            "reward/deviation": self.deviation,
            "reward/held_out": float(len(held_out)),
        }

    def save(self, folder: Path) -> None:
        """Weights of every member, tokenizer and normalisation."""
        for number, member in enumerate(self.members):
            place = member_folder(folder, number)
            place.mkdir(exist_ok=True)
            weights.saver(member.model, self.tokenizer)(place)
        about = {
            "mean": self.mean,
            "deviation": self.deviation,
            "variance_penalty": self.variance_penalty,
            "max_length": self.max_length,
            "members": [[member.mean, member.deviation] for member in self.members],
        }
        (folder / NORMALISATION).write_text(json.dumps(about))


def refuse_equal(deviation: float, texts: int) -> None:
    if deviation < LEAST_DEVIATION:
        raise EqualRewards(
            "the reward model gives every text the same score",
            f"the deviation over {texts} texts is {deviation:.1e}",
            "it needs more labels, more epochs or a higher reward.learning_rate",
        )


def agreement(raw: torch.Tensor, scores: torch.Tensor, p: torch.Tensor, lengths: torch.Tensor) -> dict[str, float]:
    """How scores agree with the labels `p` (N,). `raw` (members, 2N), `scores` and `lengths` (2N,): all A, then all B.

    Brier score and expected calibration error are of the mean over members of s(rA - rB), against the soft label. Pairs
    without a preference (p = 0.5) count in neither accuracy.
    """
    a, b = scores.chunk(2)
    raw_a, raw_b = raw.chunk(2, dim=1)
    predicted = torch.sigmoid(raw_a - raw_b).mean(0)
    longer = lengths.chunk(2)[0] - lengths.chunk(2)[1]
    preferred = torch.sign(p - 0.5)
    decided = preferred != 0
    return {
        "reward/accuracy": share(((a - b) * preferred > 0)[decided]),
        "reward/length_accuracy": share((longer * preferred > 0)[decided]),
        "reward/margin": float(((a - b) * preferred).mean()),
        "reward/brier": float(((predicted - p) ** 2).mean()),
        "reward/ece": calibration_error(predicted, p),
        "reward/length_correlation": correlation(scores, lengths),
        "reward/disagreement": float(raw.std(0, correction=0).mean()),
    }


def share(held: torch.Tensor) -> float:
    """The share of true entries; 0 of none."""
    return float(held.float().mean()) if len(held) else 0.0


def calibration_error(predicted: torch.Tensor, p: torch.Tensor) -> float:
    """Expected calibration error: |mean prediction - mean label| over bins of equal width, weighted by their size."""
    bins = (predicted * BINS).long().clamp(max=BINS - 1)
    gaps = [(predicted[bins == b] - p[bins == b]).sum().abs() for b in range(BINS)]
    return float(sum(gaps)) / len(p)


def correlation(x: torch.Tensor, y: torch.Tensor) -> float:
    """Pearson's correlation; 0 when one of them does not vary."""
    x, y = x - x.mean(), y - y.mean()
    scale = float(x.norm() * y.norm())
    return float((x * y).sum()) / scale if scale > 0 else 0.0


def load(folder: Path, hardware: weights.Hardware = weights.DEFAULT, *, policy: Path | None = None) -> RewardModel:
    """A trained reward model with its frozen normalisation.

    Raises UsageError when the folder holds none, or not one that was made from the same model as `policy`.
    """
    if policy is not None:
        weights.require_kin(policy, folder, "the reward model")
    try:
        kept = json.loads((folder / NORMALISATION).read_text())
        frozen = [(float(mean), float(deviation)) for mean, deviation in kept["members"]]
        mean, deviation, penalty = (float(kept[key]) for key in ("mean", "deviation", "variance_penalty"))
        max_length = int(kept["max_length"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"{folder} holds no whole reward model",
            f"its {NORMALISATION} cannot be read: {error}",
            "restore the folder from a copy, or train anew: charter train --phase reward",
        ) from error
    members = [
        Member(weights.load_scorer(member_folder(folder, number), trained=True), *own) for number, own in enumerate(frozen)
    ]
    return RewardModel(members, weights.load_tokenizer(folder), penalty, mean, deviation, max_length, hardware)
