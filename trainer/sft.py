"""Supervised fine-tuning (SL-CAI): the policy learns the final texts of its own critique-revision chains.

The loss is the negative log-likelihood of the final text given the prompt, averaged over its tokens; prompt tokens are masked
(Bai et al. 2022, section 3). Prompt ids are those that generation uses, and the end token is a target only where the text
really ended by itself, so that answers cut at a limit do not teach the policy to stop.

Texts of one pass are laid end to end and padded with nothing (trl's `padding_free`), where the model keeps them apart by their
positions; that is looked at, for a model that does not would read one text into the next. A step is `batch_size` texts all the
same: trl's packing into rows of `max_length` would change what a step is. Its reward trainer has neither, its DPO trainer not
at present: they pad, with texts of similar length side by side.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from engine.errors import TrainingFailed
from engine.models.chat_template import encode_completion, encode_prompt
from schemas.records import ChatMessage
from trainer import hf, weights

IGNORE_INDEX = -100  # labels that no loss looks at


@dataclass(frozen=True)
class SftExample:
    """A prompt and the text to learn; `stopped` when the text ended by itself."""

    messages: tuple[ChatMessage, ...]
    completion: str
    ends_with_eos: bool
    record_id: str


def encode_example(tokenizer: Any, example: SftExample, max_length: int) -> dict[str, list[int]]:
    """Token ids and labels (T,), at most `max_length`, cut at the end."""
    prompt = encode_prompt(tokenizer, example.messages)
    completion = encode_completion(tokenizer, example.completion, ends_with_eos=example.ends_with_eos)
    ids = (prompt + completion)[:max_length]
    return {"input_ids": ids, "labels": ([IGNORE_INDEX] * len(prompt) + completion)[:max_length]}


@torch.no_grad()
def supports_padding_free(policy: Any) -> bool:
    """Whether a text has the same logits behind another one, with positions of its own, as alone."""
    first, second = torch.tensor([[1, 2, 3]]), torch.tensor([[2, 1]])
    positions = torch.tensor([[0, 1, 2, 0, 1]], device=policy.device)
    behind = policy(torch.cat([first, second], 1).to(policy.device), position_ids=positions, use_cache=False).logits[:, 3:]
    alone = policy(second.to(policy.device), use_cache=False).logits
    return torch.allclose(behind.float(), alone.float(), atol=1e-3)


def train(
    folder: Path,
    examples: Sequence[SftExample],
    *,
    learning_rate: float,
    epochs: int = 1,
    batch_size: int = 8,
    lora_rank: int = 0,
    max_length: int = 1024,
    hardware: weights.Hardware = weights.DEFAULT_HARDWARE,
    seed: int = 0,
    on_step: hf.StepCallback = hf.ignore_step,
) -> tuple[Any, Any, dict[str, float]]:
    """Fine-tune the policy in `folder`; returns (model, tokenizer, metrics)."""
    tokenizer = weights.load_tokenizer(folder)
    rows = [encode_example(tokenizer, example, max_length) for example in examples]
    # A prompt as long as the limit leaves nothing to learn.
    rows = [row for row in rows if any(label != IGNORE_INDEX for label in row["labels"])]
    if not rows:
        raise TrainingFailed(
            f"none of the {len(examples)} texts has a token left to learn",
            f"their prompts alone are longer than train.max_length = {max_length}",
            "raise train.max_length, then type: charter train",
        )
    policy = weights.load_policy(folder)
    laid_end_to_end = supports_padding_free(policy)
    model = weights.add_lora(policy, lora_rank, "CAUSAL_LM")
    with tempfile.TemporaryDirectory() as output:
        config = SFTConfig(
            **hf.build_training_arguments(
                output,
                learning_rate=learning_rate * (weights.LORA_LEARNING_RATE_FACTOR if lora_rank else 1.0),
                epochs=epochs,
                batch_size=batch_size,
                seed=seed,
                max_length=None,  # rows are cut already
                hardware=hardware,
            ),
            padding_free=laid_end_to_end,
            dataset_kwargs={"skip_prepare_dataset": True},
        )
        trainer = SFTTrainer(model=model, args=config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
        metrics = hf.run_trainer(trainer, on_step)
    return trainer.model, tokenizer, metrics | {"examples": float(len(rows))}
