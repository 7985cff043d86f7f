"""Define the model interface: generate completions, and score options. Charter uses no other functions of a model.

A model answers each request of a batch separately. The answer to a request is a result, or the error of this request. So a failed
request does not discard the answers to the other requests, which a server may have billed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias, TypeVar

from engine.errors import CharterError
from schemas.records import ChatMessage

NUM_VOTES = 8  # replies that a server without log-probabilities samples to score options
T = TypeVar("T")
Result: TypeAlias = T | CharterError  # the answer to one request, or the error of this request


def require_results(results: Sequence[Result[T]]) -> list[T]:
    """Return the results. If there is an error among them, raise the first one."""
    for result in results:
        if isinstance(result, CharterError):
            raise result
    return [result for result in results if not isinstance(result, CharterError)]


def combine_results(results: Sequence[Result[T]]) -> Result[list[T]]:
    """Return the results of one record, or the first error among them, because a record needs all of its results."""
    error = next((result for result in results if isinstance(result, CharterError)), None)
    return error or [result for result in results if not isinstance(result, CharterError)]


@dataclass(frozen=True)
class GenerationRequest:
    """A dialogue to continue. `prefill` is the start of the assistant message, which the completion continues.

    `timeout_s` limits the generation time of a completion in seconds. After a timeout, the tokens generated so far are returned
    with the finish reason "timeout". If the model is unreachable, the result is an error instead.

    `group` names the record that needs the result. If one request of a group fails, a server model keeps the answers to the other
    requests of the group, and uses them when the record is tried again. Requests without a group are never kept.
    """

    messages: tuple[ChatMessage, ...]
    prefill: str = ""
    seed: int = 0
    timeout_s: float | None = None
    group: str = ""


@dataclass(frozen=True)
class Usage:
    """The numbers of billed prompt tokens and billed completion tokens, including the tokens of failed attempts.

    `cached_tokens` is the number of prompt tokens that were computed only once because several prompts share them.
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

    `finish_reason` is "stop", "length", "timeout" (see GenerationRequest), "refused" or "unknown". It is "refused" if a filter
    of the server removed the completion, or if the response contains a refusal. `token_ids` include the end token if the reason
    is "stop". `logprobs` are the log-probabilities of these tokens at the sampling temperature, over the whole vocabulary. All
    tuples are empty if the server does not report tokens. `reported_usage` is the usage that the server reports.

    `text` does not contain the reasoning of a model that thinks; `reasoning` has it. The tokens include those of the reasoning.
    `ends_in_reasoning` is true if the completion ended before the response began. `lacks_opening` is true if the reasoning has no
    opening mark, because the chat template of a server has written it.
    """

    text: str
    finish_reason: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    prompt_token_ids: tuple[int, ...] = ()
    reported_usage: Usage | None = None
    reasoning: str = ""
    ends_in_reasoning: bool = False
    lacks_opening: bool = False

    @property
    def usage(self) -> Usage:
        return self.reported_usage or Usage(len(self.prompt_token_ids), len(self.token_ids))


def sum_usage(generations: Sequence[Generation]) -> Usage:
    """Return the usage of several completions of one prompt.

    A local model processes the prompt once for all completions. A server bills the prompt for each completion.
    """
    billed = sum(g.usage.prompt_tokens for g in generations if g.reported_usage)
    prompt_tokens = billed or max(g.usage.prompt_tokens for g in generations)
    return Usage(prompt_tokens, sum(g.usage.completion_tokens for g in generations))


@dataclass(frozen=True)
class OptionScores:
    """The scores of the options as the next token.

    `logprobs` contains, for each option, the log of the total probability of its token variants. `option_mass` is the total
    probability of all options. If the model has no log-probabilities, the probabilities are shares of sampled replies, and
    `unparsed_replies` contains the replies that are not an option. `num_cut_replies` of them ended while the model was thinking.
    """

    logprobs: tuple[float, ...]
    option_mass: float
    usage: Usage = NO_USAGE
    unparsed_replies: tuple[str, ...] = ()
    num_cut_replies: int = 0


@dataclass(frozen=True)
class ModelCapabilities:
    """The capabilities of a model. If some are missing, other prompt templates are used, and records get another template hash.

    `prefill` means that the model continues a prefilled assistant message. If it is false, `GenerationRequest.prefill` must be
    empty.
    `logprobs` means that options are scored by next-token probabilities. If it is false, `num_votes` replies are sampled, and
    the shares of the options are used.
    `token_ids` means that generations have exact token ids.
    `exact_logprobs` means that generations have the exact log-probabilities of their tokens.
    `any_temperature` means that the sampling temperature can be chosen. If it is false, the temperature is always 1.
    """

    prefill: bool = True
    logprobs: bool = True
    token_ids: bool = True
    exact_logprobs: bool = True
    num_votes: int = 0
    any_temperature: bool = True


LOCAL_CAPABILITIES = ModelCapabilities()


class Model(Protocol):
    """A language model.

    `revision` identifies the weights. This value is a content hash, or a hash of server address and model name.
    """

    id: str
    revision: str

    @property
    def capabilities(self) -> ModelCapabilities:
        """The capabilities of the model. A server is probed once, at the first use."""
        ...

    def generate(
        self,
        batch: Sequence[GenerationRequest],
        *,
        num_completions: int = 1,
        temperature: float = 1.0,
        top_p: float = 1.0,
        max_tokens: int = 256,
        max_thinking_tokens: int = 0,
    ) -> Sequence[Result[list[Generation]]]:
        """Sample `num_completions` completions for each request.

        The result has one entry for each request: a list of `num_completions` completions, or the error of the request.

        If `max_thinking_tokens` is above 0, the model may first think, and this limits the tokens of its reasoning. `max_tokens`
        limits the tokens of the response. If it is 0, thinking is turned off. A prefill also turns thinking off.
        """
        ...

    def score_options(self, batch: Sequence[GenerationRequest], options: Sequence[str]) -> Sequence[Result[OptionScores]]:
        """Score the options as the next token of each request. The result has one entry for each request, perhaps an error."""
        ...
