"""Estimate the memory that one update needs on each card, from the shape of the model and the settings `train.*`.

The parts of the estimate, in bytes, for P parameters, N cards and LoRA with L parameters:

  weights      4 P / N (2 P / N with train.base_dtype = bf16)
  gradients    4 P / N, or 4 L with LoRA. The adapters are complete on each card
  Adam         8 P / N, or 12 L with LoRA (the adapters themselves and two moments)
  gathered     with several cards: the embedding and the output layer, and two layers, because FSDP2 gathers the next layer ahead.
               If all weights are trained, also the gradients of the output layer and of one layer
  activations  the tensors that autograd keeps for one pass of train.micro_batch_size sequences, and the logits of the completions

The estimate has neither the libraries nor the fragments of the allocator. `tests/trainer/test_memory.py` compares it with
measured tensors.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

_GIB = 2**30
_LOGIT_COPIES = 4  # the logits, the scaled logits, the log-probabilities and their gradient


@dataclass(frozen=True)
class ModelShape:
    """Holds the sizes of a decoder with gated MLPs and grouped-query attention (Llama, Qwen, Mistral, SmolLM2)."""

    title: str
    hidden_size: int
    intermediate_size: int
    num_layers: int
    key_value_size: int
    vocab_size: int
    is_tied: bool

    @property
    def layer_parameters(self) -> int:
        """Return the number of parameters of one layer."""
        attention = 2 * self.hidden_size * (self.hidden_size + self.key_value_size)
        return attention + 3 * self.hidden_size * self.intermediate_size + 2 * self.hidden_size

    @property
    def vocabulary_parameters(self) -> int:
        """Return the number of parameters of the embedding and the output layer."""
        return self.vocab_size * self.hidden_size * (1 if self.is_tied else 2)

    @property
    def num_parameters(self) -> int:
        """Return the number of all parameters."""
        return self.num_layers * self.layer_parameters + self.vocabulary_parameters + self.hidden_size

    def count_lora_parameters(self, rank: int) -> int:
        """Return the number of parameters of adapters on every linear layer."""
        hidden, inner, key_value = self.hidden_size, self.intermediate_size, self.key_value_size
        return self.num_layers * rank * (2 * (hidden + hidden) + 2 * (hidden + key_value) + 3 * (hidden + inner))


# The shapes of Llama 3.2 1B, Llama 3.1 8B and Llama 3.1 70B
SHAPES = (
    ModelShape("1B", 2048, 8192, 16, 512, 128256, True),
    ModelShape("8B", 4096, 14336, 32, 1024, 128256, False),
    ModelShape("70B", 8192, 28672, 80, 1024, 128256, False),
)


@dataclass(frozen=True)
class UpdateSettings:
    """Holds the settings of an update. `sequence_length` and `completion_length` are the longest ones, in tokens."""

    sequence_length: int
    completion_length: int
    micro_batch_size: int
    lora_rank: int = 0
    base_dtype: str = "fp32"
    bf16: bool = False
    gradient_checkpointing: bool = False


@dataclass(frozen=True)
class UpdateMemory:
    """Holds the memory of the parts of an update on one card, in bytes."""

    weights: int
    gradients: int
    adam: int
    gathered: int
    activations: int

    @property
    def total(self) -> int:
        """Return the memory of all parts."""
        return sum(getattr(self, part.name) for part in fields(self))


def read_shape(folder: Path) -> ModelShape | None:
    """Read the shape of the model in a folder. Return None if the model is not a decoder of this form."""
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    if any(name not in config for name in names) or "num_experts" in config or "num_local_experts" in config:
        return None
    head_size = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    key_value_size = head_size * config.get("num_key_value_heads", config["num_attention_heads"])
    sizes = (
        config["hidden_size"],
        config["intermediate_size"],
        config["num_hidden_layers"],
        key_value_size,
        config["vocab_size"],
    )
    return ModelShape(folder.name, *sizes, bool(config.get("tie_word_embeddings", False)))


def estimate_update(shape: ModelShape, settings: UpdateSettings, num_cards: int) -> UpdateMemory:
    """Return the memory that an RL update needs on each of `num_cards` cards."""
    lora = shape.count_lora_parameters(settings.lora_rank)
    weight_bytes = 2 if settings.base_dtype == "bf16" else 4
    gathered_bytes = 2 if settings.bf16 else weight_bytes
    part = -(-shape.num_parameters // num_cards)
    gathered = gathered_gradients = 0
    if num_cards > 1:
        # A tied weight is gathered twice, for the embedding and for the output layer.
        gathered = gathered_bytes * (2 * shape.layer_parameters + 2 * shape.vocab_size * shape.hidden_size)
        gathered_gradients = 4 * (shape.layer_parameters + shape.vocab_size * shape.hidden_size)
    return UpdateMemory(
        weights=weight_bytes * part,
        gradients=4 * lora if lora else 4 * part,
        adam=12 * lora if lora else 8 * part,
        gathered=gathered if lora else gathered + gathered_gradients,
        activations=_estimate_activations(shape, settings, num_cards),
    )


def _estimate_activations(shape: ModelShape, settings: UpdateSettings, num_cards: int) -> int:
    value_bytes = 2 if settings.bf16 else 4
    tokens = settings.micro_batch_size * settings.sequence_length
    # Two norms keep their input and their normalized input in fp32. The linear layers keep their inputs. The attention keeps the
    # query, the repeated keys and values, and its output. The MLP keeps four tensors of the intermediate size.
    per_layer = tokens * (4 * 4 * shape.hidden_size + value_bytes * (7 * shape.hidden_size + 4 * shape.intermediate_size))
    if settings.lora_rank:
        per_layer += tokens * value_bytes * 7 * settings.lora_rank
    layers = shape.num_layers * per_layer
    if settings.gradient_checkpointing:
        layers = shape.num_layers * tokens * 4 * shape.hidden_size + per_layer
    # Without sharding, autocast keeps a bf16 copy of each fp32 weight until the backward pass.
    copies = 2 * shape.num_parameters if settings.bf16 and settings.base_dtype == "fp32" and num_cards == 1 else 0
    completion_tokens = settings.micro_batch_size * settings.completion_length
    return layers + copies + completion_tokens * shape.vocab_size * 4 * _LOGIT_COPIES


def format_estimates(shapes: Sequence[ModelShape], settings: Sequence[UpdateSettings], cards: Sequence[int]) -> list[str]:
    """Return a table: one line per model and settings, and one column of GiB for each number of cards."""
    lines = [f"{'model':<26} {'trained':<26}" + "".join(f"{n:>9}" for n in cards)]
    for shape in shapes:
        for update in settings:
            trained = f"LoRA rank {update.lora_rank}, base {update.base_dtype}" if update.lora_rank else "all weights"
            totals = [estimate_update(shape, update, n).total / _GIB for n in cards]
            lines.append(f"{shape.title[:26]:<26} {trained:<26}" + "".join(f"{total:>9.1f}" for total in totals))
    return lines
