"""Hold the sequences that a local model decodes together. Finished rows leave the batch, and rows of waiting prompts join it.

The real tokens of a row are on the right, and padding is on the left. A row that joins gets padding on its left, or the other rows
do. Columns that are padding in all rows are removed, so that the length of the batch is the length of its longest row.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers.cache_utils import DynamicLayer

# Finished rows are removed, and replaced by waiting ones, when they are this fraction of the batch. Removing and replacing copies
# the cache, which on a CPU costs more than a few idle rows.
_COMPACTION_FRACTION = 0.25


@dataclass
class SampledSequence:
    """The state of one sequence during sampling. `started` is when its prompt was computed (`time.monotonic`)."""

    request_index: int
    rng: random.Random
    num_prompt_tokens: int
    started: float
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    is_finished: bool = False
    timed_out: bool = False
    is_cut: bool = False
    is_thinking: bool = False
    has_opening: bool = False
    num_reasoning_tokens: int = 0


@dataclass
class DecodeBatch:
    """R rows with a cache of T tokens each.

    `logits` (R, V) predict the next token. `mask` (R, T) is 0 on padding. `positions` (R,) is the number of tokens of a row in the
    cache, which is the position of its next token. It does not rise after the end of a row: a row that waits for its removal must
    not reach a position beyond the context.
    """

    rows: list[SampledSequence]
    cache: Any
    logits: torch.Tensor
    mask: torch.Tensor
    positions: torch.Tensor
    increments: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.freeze_finished()

    @property
    def num_finished(self) -> int:
        return sum(row.is_finished for row in self.rows)

    @property
    def accepts_rows(self) -> bool:
        """Whether rows can join. The layers of some models (sliding windows, recurrence) have caches of other forms."""
        layers = self.cache.layers
        return bool(layers) and all(type(layer) is DynamicLayer and layer.get_seq_length() for layer in layers)

    def freeze_finished(self) -> None:
        """Keep the positions of finished rows from now on."""
        self.increments = torch.tensor([int(not row.is_finished) for row in self.rows], device=self.mask.device)

    def run_step(self, model: Any, tokens: torch.Tensor) -> None:
        """Compute the logits after one more token (R,) of each row."""
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.rows), 1)], dim=-1)
        out = model(
            input_ids=tokens[:, None],
            attention_mask=self.mask,
            position_ids=self.positions[:, None],
            past_key_values=self.cache,
            use_cache=True,
        )
        self.logits = out.logits[:, -1]
        self.positions = self.positions + self.increments

    def drop_finished(self, tokens: torch.Tensor) -> torch.Tensor:
        """Remove the finished rows if there are enough of them to justify the copy. Return the tokens (R,) of the other rows."""
        if self.num_finished < max(1, _COMPACTION_FRACTION * len(self.rows)):
            return tokens
        indices = [i for i, row in enumerate(self.rows) if not row.is_finished]
        self.rows = [self.rows[i] for i in indices]
        if not self.rows:  # the caller discards the batch
            return tokens[:0]
        keep = torch.tensor(indices, device=tokens.device)
        self.positions = self.positions[keep]
        if self.accepts_rows:
            length = int(self.positions.max())
            for layer in self.cache.layers:
                layer.keys, layer.values = (states[:, :, -length:][keep] for states in (layer.keys, layer.values))
            self.mask = self.mask[:, -length:][keep]
        else:
            self.cache.batch_select_indices(keep)
            self.mask = self.mask[keep]
        self.freeze_finished()
        return tokens[keep]

    def extend(self, other: DecodeBatch) -> None:
        """Add the rows of another batch."""
        for layer, new in zip(self.cache.layers, other.cache.layers, strict=True):
            layer.keys, layer.values = (_stack(layer.keys, new.keys, 2), _stack(layer.values, new.values, 2))
        self.mask = _stack(self.mask, other.mask, 1)
        self.rows = self.rows + other.rows
        self.logits = torch.cat([self.logits, other.logits])
        self.positions = torch.cat([self.positions, other.positions])
        self.freeze_finished()


def _stack(first: torch.Tensor, second: torch.Tensor, dim: int) -> torch.Tensor:
    """Concatenate the rows of two tensors. The shorter one gets zeros on the left in dimension `dim`."""
    shape = list(first.shape)
    shape[0], shape[dim] = first.shape[0] + second.shape[0], max(first.shape[dim], second.shape[dim])
    stacked = first.new_zeros(shape)
    for part, rows in ((first, slice(None, len(first))), (second, slice(len(first), None))):
        stacked[rows].narrow(dim, shape[dim] - part.shape[dim], part.shape[dim]).copy_(part)
    return stacked
