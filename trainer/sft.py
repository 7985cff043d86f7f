"""Supervised fine-tuning (SL-CAI): the policy learns the final texts of its own critique-revision chains.

The loss is the negative log-likelihood of the final text given the prompt, averaged over its tokens; prompt tokens are masked
(Bai et al. 2022, section 3). Prompt ids are those that generation uses, and the end token is a target only where the text
really ended by itself, so that answers cut at a limit do not teach the policy to stop.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from engine.errors import CannotLearn
from engine.models.chat import completion_ids, prompt_ids
from schemas.records import Turn
from trainer import hf, weights

IGNORED = -100  # labels that no loss looks at


@dataclass(frozen=True)
class SftExample:
    """A prompt and the text to learn; `stopped` when the text ended by itself."""

    turns: tuple[Turn, ...]
    completion: str
    stopped: bool
    record_id: str


def encode(tokenizer: Any, example: SftExample, max_length: int) -> dict[str, list[int]]:
    """Token ids and labels (T,), at most `max_length`, cut at the end."""
    prompt = prompt_ids(tokenizer, example.turns)
    completion = completion_ids(tokenizer, example.completion, stopped=example.stopped)
    ids = (prompt + completion)[:max_length]
    return {"input_ids": ids, "labels": ([IGNORED] * len(prompt) + completion)[:max_length]}


def train(
    folder: Path,
    examples: Sequence[SftExample],
    *,
    learning_rate: float,
    epochs: int = 1,
    batch_size: int = 8,
    lora_rank: int = 0,
    max_length: int = 1024,
    hardware: weights.Hardware = weights.DEFAULT,
    seed: int = 0,
    on_step: hf.OnStep = hf.ignore,
) -> tuple[Any, Any, dict[str, float]]:
    """Fine-tune the policy in `folder`; returns (model, tokenizer, metrics)."""
    tokenizer = weights.load_tokenizer(folder)
    rows = [encode(tokenizer, example, max_length) for example in examples]
    # A prompt as long as the limit leaves nothing to learn.
    rows = [row for row in rows if any(label != IGNORED for label in row["labels"])]
    if not rows:
        raise CannotLearn(
            f"none of the {len(examples)} texts has a token left to learn",
            f"their prompts alone are longer than train.max_length = {max_length}",
            "raise train.max_length, then type: charter train",
        )
    model = weights.with_lora(weights.load_policy(folder), lora_rank, "CAUSAL_LM")
    with tempfile.TemporaryDirectory() as output:
        config = SFTConfig(
            **hf.arguments(
                output,
                learning_rate=learning_rate * (weights.LORA_SPEEDUP if lora_rank else 1.0),
                epochs=epochs,
                batch_size=batch_size,
                seed=seed,
                max_length=max_length,
                hardware=hardware,
            ),
            dataset_kwargs={"skip_prepare_dataset": True},
        )
        trainer = SFTTrainer(model=model, args=config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
        metrics = hf.run(trainer, on_step)
    return trainer.model, tokenizer, metrics | {"examples": float(len(rows))}
