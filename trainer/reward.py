"""The reward model: a scalar score for an answer, learned from soft labels.

For a pair with the judge's probability p that A is better, the loss is (Lee et al. 2023, section 3)

    -[p log s(rA - rB) + (1 - p) log s(rB - rA)] + c * (rA + rB)^2

whose minimum is at s(rA - rB) = p; the second term keeps scores near zero. Scores are normalised to mean 0 and deviation 1
over the labelled texts; mean and deviation are frozen in the checkpoint (`reward.json`).
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from datasets import Dataset
from trl import RewardConfig, RewardTrainer

from engine.errors import CharterError
from engine.models.chat import completion_ids, prompt_ids
from schemas.records import Turn
from trainer import hf, weights

NORMALISATION = "reward.json"
LEAST_DEVIATION = 1e-4
SCORE_ROWS = 16


class EqualRewards(CharterError):
    """The reward model gives every text the same score."""


@dataclass(frozen=True)
class PreferenceExample:
    """Two answers to one prompt and the probability that A is better."""

    turns: tuple[Turn, ...]
    a: str
    b: str
    p_a: float
    record_id: str
    a_stopped: bool = False
    b_stopped: bool = False


def soft_label_loss(r_a: torch.Tensor, r_b: torch.Tensor, p_a: torch.Tensor, centring: float) -> torch.Tensor:
    """The mean loss over pairs; all arguments (B,)."""
    gap = r_a - r_b
    preference = -(p_a * F.logsigmoid(gap) + (1 - p_a) * F.logsigmoid(-gap))
    return (preference + centring * (r_a + r_b) ** 2).mean()


def encode(tokenizer: Any, turns: Sequence[Turn], text: str, stopped: bool, max_length: int) -> list[int]:
    """Prompt and answer as ids; a too long prompt loses its beginning, never the answer its end."""
    ids = prompt_ids(tokenizer, turns) + completion_ids(tokenizer, text, stopped=stopped)
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

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        p_a = inputs.pop("p_a")
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
    lora_rank: int = 0,
    max_length: int = 1024,
    seed: int = 0,
    on_step: hf.OnStep = hf.ignore,
) -> tuple[RewardModel, dict[str, float]]:
    """Train on the model in `folder` (a policy, or an earlier reward model); returns the scorer and its metrics.

    Raises EqualRewards when the scores of the labelled texts do not differ.
    """
    tokenizer = weights.load_tokenizer(folder)
    rows: list[dict[str, Any]] = [
        {
            "chosen_ids": encode(tokenizer, example.turns, example.a, example.a_stopped, max_length),
            "rejected_ids": encode(tokenizer, example.turns, example.b, example.b_stopped, max_length),
            "p_a": example.p_a,
        }
        for example in examples
    ]
    scorer = weights.load_scorer(folder)
    pad = pad_for(scorer, [row[side] for row in rows for side in ("chosen_ids", "rejected_ids")])
    model = weights.with_lora(scorer, lora_rank, "SEQ_CLS", keep=["score"])

    def collate(batch: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        sequences = [row["chosen_ids"] for row in batch] + [row["rejected_ids"] for row in batch]
        return padded(sequences, pad) | {"p_a": torch.tensor([row["p_a"] for row in batch])}

    with tempfile.TemporaryDirectory() as output:
        config = RewardConfig(
            **hf.arguments(
                output,
                learning_rate=learning_rate * (weights.LORA_SPEEDUP if lora_rank else 1.0),
                epochs=epochs,
                batch_size=batch_size,
                seed=seed,
                max_length=max_length,
            ),
            remove_unused_columns=False,
        )
        trainer = SoftLabelTrainer(
            model=model,
            args=config,
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            data_collator=collate,
        )
        trainer.centring = centring
        metrics = hf.run(trainer, on_step)
    reward = RewardModel(weights.merged(trainer.model), tokenizer, max_length=max_length)
    return reward, metrics | reward.normalise(examples)


def pad_for(model: Any, sequences: Sequence[Sequence[int]]) -> int:
    """Set and return a padding id that none of these sequences has, so that pooling finds their real ends."""
    config = model.config.get_text_config()
    config.pad_token_id = weights.unused_id(sequences, config.vocab_size)
    return int(config.pad_token_id)


def load(folder: Path, max_length: int = 1024) -> RewardModel:
    """A trained reward model with its frozen normalisation."""
    kept = json.loads((folder / NORMALISATION).read_text())
    return RewardModel(weights.load_scorer(folder), weights.load_tokenizer(folder), kept["mean"], kept["deviation"], max_length)


@dataclass
class RewardModel:
    """Scores answers; `normalised` scores have mean 0 and deviation 1 over the labels it was trained on."""

    model: Any
    tokenizer: Any
    mean: float = 0.0
    deviation: float = 1.0
    max_length: int = 1024

    @torch.inference_mode()
    def score(self, texts: Sequence[tuple[Sequence[Turn], str, bool]]) -> list[float]:
        """The raw score of each (turns, answer, stopped)."""
        encoded = [encode(self.tokenizer, turns, text, stopped, self.max_length) for turns, text, stopped in texts]
        self.model.eval()
        pad = pad_for(self.model, encoded)
        order = sorted(range(len(encoded)), key=lambda i: len(encoded[i]))
        scores = [0.0] * len(encoded)
        for start in range(0, len(order), SCORE_ROWS):
            chunk = order[start : start + SCORE_ROWS]
            inputs = padded([encoded[i] for i in chunk], pad)
            with weights.autocast():
                logits = self.model(**{key: value.to(self.model.device) for key, value in inputs.items()}).logits
            for i, value in zip(chunk, logits.squeeze(-1).float().tolist(), strict=True):
                scores[i] = value
        return scores

    def normalised(self, scores: Sequence[float]) -> list[float]:
        return [(score - self.mean) / self.deviation for score in scores]

    def normalise(self, examples: Sequence[PreferenceExample]) -> dict[str, float]:
        """Freeze mean and deviation over the labelled texts, and say how well the scores agree with the labels."""
        a = torch.tensor(self.score([(e.turns, e.a, e.a_stopped) for e in examples]))
        b = torch.tensor(self.score([(e.turns, e.b, e.b_stopped) for e in examples]))
        p = torch.tensor([e.p_a for e in examples])
        both = torch.cat([a, b])
        self.mean, self.deviation = float(both.mean()), float(both.std(correction=0))
        if self.deviation < LEAST_DEVIATION:
            raise EqualRewards(
                "the reward model gives every text the same score",
                f"the deviation over {len(both)} texts is {self.deviation:.1e}",
                "it needs more labels, more epochs or a higher reward.learning_rate",
            )
        lengths = torch.tensor([float(len(text)) for e in examples for text in (e.a,)] + [float(len(e.b)) for e in examples])
        predicted = torch.sigmoid(a - b)
        return {
            "train_accuracy": float(((a > b) == (p > 0.5)).float().mean()),
            "train_brier": float(((predicted - p) ** 2).mean()),
            "reward_mean": self.mean,
            "reward_deviation": self.deviation,
            "length_correlation": correlation(both, lengths),
        }

    def save(self, folder: Path) -> None:
        """Weights, tokenizer and normalisation."""
        weights.saver(self.model, self.tokenizer)(folder)
        (folder / NORMALISATION).write_text(json.dumps({"mean": self.mean, "deviation": self.deviation}))


def correlation(x: torch.Tensor, y: torch.Tensor) -> float:
    """Pearson's correlation; 0 when one of them does not vary."""
    x, y = x - x.mean(), y - y.mean()
    scale = float(x.norm() * y.norm())
    return float((x * y).sum()) / scale if scale > 0 else 0.0
