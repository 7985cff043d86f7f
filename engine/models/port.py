"""The model port: generate text, and read the probabilities of options. Nothing else is asked of a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from schemas.records import Turn


@dataclass(frozen=True)
class Ask:
    """A dialogue to continue. `prefill` is text that the assistant's turn is already begun with."""

    turns: tuple[Turn, ...]
    prefill: str = ""
    seed: int = 0


@dataclass(frozen=True)
class Generation:
    """One sampled text (without the prefill).

    `token_ids` include the end token when `finish_reason` is "stop"; `logprobs` are theirs, under the sampling temperature over
    the whole vocabulary. A server that gives no tokens leaves the tuples empty.
    """

    text: str
    finish_reason: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    prompt_token_ids: tuple[int, ...] = ()


@dataclass(frozen=True)
class OptionScores:
    """For each option the log of the next-token probability summed over its surface variants; `mass` is the sum of them."""

    logprobs: tuple[float, ...]
    mass: float


class Model(Protocol):
    """A language model. `revision` says which weights: a content hash, or what the server says."""

    id: str
    revision: str

    def generate(
        self,
        batch: Sequence[Ask],
        *,
        samples: int = 1,
        temperature: float = 1.0,
        top_p: float = 1.0,
        max_tokens: int = 256,
    ) -> list[list[Generation]]:
        """`samples` texts for each ask: [len(batch)][samples]."""
        ...

    def option_logprobs(self, batch: Sequence[Ask], options: Sequence[str]) -> list[OptionScores]:
        """The options' next-token log-probabilities after each ask: [len(batch)]."""
        ...
