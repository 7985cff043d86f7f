"""Train the policy on the final responses of critique-revision chains (supervised fine-tuning, SL-CAI).

The loss is the negative log-likelihood of the final response given the prompt, averaged over the response's tokens. Prompt
tokens are masked (Bai et al. 2022, section 3). The prompt tokens are the same as in generation. The end token is a target only
if the response really ended with this token. The policy therefore does not learn to stop from responses that were truncated at
a length limit.

The sequences of one pass are concatenated without padding (trl's `padding_free`), if the model separates them by their position
ids. `supports_padding_free` tests whether the model separates them. Other models would attend across sequences, so they get
padded sequences. A step always has `batch_size` sequences. trl can also pack sequences into rows of `max_length`, but this
would change the size of a step. trl's reward trainer and (currently) its DPO trainer support only padding. For these two
trainers, sequences of similar length are next to each other.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from trl import SFTConfig, SFTTrainer

from engine.errors import TrainingFailed
from engine.models.chat_template import encode_completion, encode_prompt
from engine.text import format_count
from schemas.records import ChatMessage
from trainer import hf, sharding, weights
from trainer.hf import IGNORE_INDEX as IGNORE_INDEX


@dataclass(frozen=True)
class SftExample:
    """An example has a prompt and the response to learn.

    `ends_with_eos` is true if the response ended with the end token. `ends_with_eos` is false if the response was truncated.
    """

    messages: tuple[ChatMessage, ...]
    completion: str
    ends_with_eos: bool
    record_id: str


def encode_example(tokenizer: Any, example: SftExample, max_length: int) -> dict[str, list[int]]:
    """Return token ids and labels (T,). Sequences longer than `max_length` are truncated at the end."""
    prompt = encode_prompt(tokenizer, example.messages)
    completion = encode_completion(tokenizer, example.completion, ends_with_eos=example.ends_with_eos)
    ids = (prompt + completion)[:max_length]
    return {"input_ids": ids, "labels": ([IGNORE_INDEX] * len(prompt) + completion)[:max_length]}


@torch.no_grad()
def supports_padding_free(policy: Any) -> bool:
    """Return whether the logits of a sequence stay the same when it follows another sequence without padding.

    The position ids start again at 0 for the second sequence.
    """
    first, second = torch.tensor([[1, 2, 3]]), torch.tensor([[2, 1]])
    positions = torch.tensor([[0, 1, 2, 0, 1]], device=policy.device)
    concatenated = policy(torch.cat([first, second], 1).to(policy.device), position_ids=positions, use_cache=False).logits[
        :, 3:
    ]
    alone = policy(second.to(policy.device), use_cache=False).logits
    sharding.release_gathered_weights(policy)
    return torch.allclose(concatenated.float(), alone.float(), atol=1e-3 if policy.dtype == torch.float32 else 0.1)


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
    """Fine-tune the policy in `folder`. Return (model, tokenizer, metrics).

    Raise TrainingFailed when every prompt has at least `max_length` tokens, or when a metric is not finite.
    """
    tokenizer = weights.load_tokenizer(folder)
    rows = [encode_example(tokenizer, example, max_length) for example in examples]
    # Remove rows whose prompt has `max_length` tokens or more, because no token of the response is left.
    rows = [row for row in rows if any(label != IGNORE_INDEX for label in row["labels"])]
    if not rows:
        raise TrainingFailed(
            f"{format_count(len(examples), 'responses', 'have')} no tokens to learn",
            f"each prompt alone fills train.max_length = {max_length} tokens",
            "raise train.max_length, then type: charter train",
        )
    dtype = hardware.weights_dtype if lora_rank else torch.float32
    model = weights.add_lora(weights.load_policy(folder, dtype), lora_rank, "CAUSAL_LM")
    padding_free = supports_padding_free(model)
    with tempfile.TemporaryDirectory() as output:
        config = SFTConfig(
            **hf.build_training_arguments(
                output,
                learning_rate=learning_rate * (weights.LORA_LEARNING_RATE_FACTOR if lora_rank else 1.0),
                epochs=epochs,
                batch_size=batch_size,
                seed=seed,
                max_length=None,  # the rows are already truncated
                hardware=hardware,
            ),
            padding_free=padding_free,
            dataset_kwargs={"skip_prepare_dataset": True},
        )
        trainer = SFTTrainer(model=model, args=config, train_dataset=hf.make_dataset(rows), processing_class=tokenizer)
        metrics = hf.run_trainer(trainer, on_step)
    return weights.gather_model(trainer.model), tokenizer, metrics | {"examples": float(len(rows))}
