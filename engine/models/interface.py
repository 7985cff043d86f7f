"""The model port: generate text, and read the probabilities of options. Nothing else is asked of a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from schemas.records import ChatMessage


@dataclass(frozen=True)
class GenerationRequest:
    """A dialogue to continue. `prefill` is text that the assistant's message is already begun with.

    `timeout_s` is how long a text may take to be written once the model has begun on it, in seconds; what is not finished by
    then comes back as far as it is, with the finish reason "timeout". A model that is away is no timeout: it raises.
    """

    messages: tuple[ChatMessage, ...]
    prefill: str = ""
    seed: int = 0
    timeout_s: float | None = None


@dataclass(frozen=True)
class Usage:
    """Tokens that were read and written for something, as whoever bills them counts: failed tries that used some included.

    `cached` are those of `prompt` that were not computed again, because another prompt begins with them.
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
    """One sampled text (without the prefill).

    `finish_reason` is "stop", "length", "timeout" (see Ask) or "refused" (a server's filter kept the text back, or the model
    said so in the field that servers have for it). `token_ids` include the end token when it is "stop"; `logprobs` are theirs,
    under the sampling temperature over the whole vocabulary. A server that gives no tokens leaves the tuples empty. `counted`
    is a server's own count.
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
    """What several samples of one prompt used: a local model reads the prompt once, a server bills it for each."""
    read = sum(g.usage.prompt_tokens for g in generations if g.reported_usage) or max(
        g.usage.prompt_tokens for g in generations
    )
    return Usage(read, sum(g.usage.completion_tokens for g in generations))


@dataclass(frozen=True)
class OptionScores:
    """For each option the log of the next-token probability summed over its surface variants; `mass` is the sum of them.

    Of a model without log-probabilities these are shares of sampled replies; `replies` are those that named no option.
    """

    logprobs: tuple[float, ...]
    option_mass: float
    usage: Usage = NO_USAGE
    unparsed_replies: tuple[str, ...] = ()


@dataclass(frozen=True)
class ModelCapabilities:
    """What a model can do. What it cannot do changes the wording of a question, and so the template hash of the record.

    prefill: it goes on with a prefilled assistant message; else `Ask.prefill` is an error, and a question must say how to begin.
    logprobs: options are scored by next-token probabilities; else by votes, the shares of `votes` sampled replies.
    token_ids: generations carry their exact token ids; exact_logprobs: and their log-probabilities at temperature 1.
    """

    prefill: bool = True
    logprobs: bool = True
    token_ids: bool = True
    exact_logprobs: bool = True
    num_votes: int = 0


LOCAL_CAPABILITIES = ModelCapabilities()


class Model(Protocol):
    """A language model. `revision` says which weights: a content hash, or what the server says."""

    id: str
    revision: str

    @property
    def capabilities(self) -> ModelCapabilities:
        """What it can do; a server is asked once, at the first use."""
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
        """`samples` texts for each ask: [len(batch)][samples]."""
        ...

    def score_options(self, batch: Sequence[GenerationRequest], options: Sequence[str]) -> list[OptionScores]:
        """The options' next-token log-probabilities after each ask: [len(batch)]."""
        ...
