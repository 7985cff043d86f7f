"""The model interface: generate completions, and score options. Charter uses no other function of a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from schemas.records import ChatMessage


@dataclass(frozen=True)
class GenerationRequest:
    """A dialogue to continue. `prefill` is the start of the assistant message; the completion continues it.

    `timeout_s` limits the generation time of a completion in seconds, counted from the start of generation. An unfinished
    completion is returned with what was generated and the finish reason "timeout". An unreachable model raises an error
    instead.
    """

    messages: tuple[ChatMessage, ...]
    prefill: str = ""
    seed: int = 0
    timeout_s: float | None = None


@dataclass(frozen=True)
class Usage:
    """Prompt tokens and completion tokens as billed, failed attempts included.

    `cached_tokens` is the number of prompt tokens that were not computed again, because they are shared with another prompt.
    """

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0

    def __add__(self, other: Usage) -> Usage:
        return Usage(
            self.prompt_tokens + other.prompt_tokens,
            self.completion_tokens + other.completion_tokens,
            self.cached_tokens + other.cached_tokens,
        )


NO_USAGE = Usage()


@dataclass(frozen=True)
class Generation:
    """One sampled completion, without the prefill.

    `finish_reason` is "stop", "length", "timeout" (see GenerationRequest), "refused" (a filter of the server withheld the
    completion, or the response has a refusal) or "unknown". `token_ids` include the end token if the reason is "stop".
    `logprobs` are the log-probabilities of these tokens at the sampling temperature, over the whole vocabulary. The tuples are
    empty if the server reports no tokens. `reported_usage` is the usage that the server reports.
    """

    text: str
    finish_reason: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    prompt_token_ids: tuple[int, ...] = ()
    reported_usage: Usage | None = None

    @property
    def usage(self) -> Usage:
        return self.reported_usage or Usage(len(self.prompt_token_ids), len(self.token_ids))


def sum_usage(generations: Sequence[Generation]) -> Usage:
    """Return the usage of several completions of one prompt.

    A local model processes the prompt once; a server bills it for each completion.
    """
    billed = sum(g.usage.prompt_tokens for g in generations if g.reported_usage)
    prompt_tokens = billed or max(g.usage.prompt_tokens for g in generations)
    return Usage(prompt_tokens, sum(g.usage.completion_tokens for g in generations))


@dataclass(frozen=True)
class OptionScores:
    """For each option, the log of its next-token probability, summed over the token variants of the option.

    `option_mass` is the total probability of all options. For a model without log-probabilities the probabilities are shares of
    sampled replies, and `unparsed_replies` are the replies that are not an option.
    """

    logprobs: tuple[float, ...]
    option_mass: float
    usage: Usage = NO_USAGE
    unparsed_replies: tuple[str, ...] = ()


@dataclass(frozen=True)
class ModelCapabilities:
    """The capabilities of a model. Without some of them other prompt templates are used, and records get another template hash.

    prefill: the model continues a prefilled assistant message. Without it, a `GenerationRequest.prefill` is an error.
    logprobs: options are scored by next-token probabilities. Without it, by the shares of `num_votes` sampled replies.
    token_ids: generations have their exact token ids.
    exact_logprobs: generations have the exact log-probabilities of their tokens.
    """

    prefill: bool = True
    logprobs: bool = True
    token_ids: bool = True
    exact_logprobs: bool = True
    num_votes: int = 0


LOCAL_CAPABILITIES = ModelCapabilities()


class Model(Protocol):
    """A language model. `revision` identifies the weights: a content hash, or a hash of the server's address and model name."""

    id: str
    revision: str

    @property
    def capabilities(self) -> ModelCapabilities:
        """The capabilities of the model; a server is probed once, at the first use."""
        ...

    def generate(
        self,
        batch: Sequence[GenerationRequest],
        *,
        num_completions: int = 1,
        temperature: float = 1.0,
        top_p: float = 1.0,
        max_tokens: int = 256,
    ) -> list[list[Generation]]:
        """Sample `num_completions` completions for each request: [len(batch)][num_completions]."""
        ...

    def score_options(self, batch: Sequence[GenerationRequest], options: Sequence[str]) -> list[OptionScores]:
        """Score the options as the next token of each request: [len(batch)]."""
        ...
