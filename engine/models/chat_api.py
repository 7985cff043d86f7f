"""OpenAI's chat API as Charter uses it: what a server supports, its errors, and the parsing of its responses."""

from __future__ import annotations

import email.utils
import json
import math
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from engine.models.interface import NO_USAGE, Generation, ModelCapabilities, OptionScores, Usage

_CHARS_PER_TOKEN = 4  # estimate for a server that reports no usage
# Characters around a letter in a token: parentheses and spaces. Byte-level BPE writes a space as Ġ, SentencePiece as ▁.
_OPTION_STRIP_CHARS = " \n\tĠ▁()"
_OPTION_REPLY_PATTERN = re.compile(r"[\s(\[*\"']*(?:answer\s*:?\s*)?[\s(\[*\"']*(\w+)\s*(?:[)\]*\"'.:,]|\n|$)", re.IGNORECASE)
_THINKING_PATTERN = re.compile(r"\s*<think>(?:.*?</think>\s*|.*\Z)", re.DOTALL)

_FINISH_REASONS = {"stop": "stop", "length": "length", "timeout": "timeout", "content_filter": "refused"}
JsonObject = dict[str, Any]


class TransientError(Exception):
    """An attempt failed, and a retry may succeed. `status_code` is 0 without a response; `usage` was billed nevertheless."""

    def __init__(self, reason: str, status_code: int = 0, usage: Usage = NO_USAGE) -> None:
        super().__init__(reason)
        self.status_code, self.usage = status_code, usage


class RequestTimeout(TransientError):
    """The server accepted a request and did not complete the response in time."""


class RequestRejected(Exception):
    """The server rejected a request as invalid. The message is the server's, without the API key."""


class ChatServer(Protocol):
    """A server that can be probed (see `engine.models.endpoint.Endpoint`)."""

    url: str
    id: str

    def post_with_retries(
        self,
        request: JsonObject,
        *,
        timeout_s: float | None = None,
        should_give_up: Callable[[TransientError, int], bool] = ...,
    ) -> tuple[JsonObject, Usage]: ...

    def add_unbilled(self, usage: Usage) -> None: ...


@dataclass(frozen=True)
class ServerCapabilities:
    """The result of probing a server. A `*_body` field holds the extra request fields for a feature; None: not supported.

    max_tokens_field: the name of the request field that limits new tokens.
    extra_body: fields of every request (thinking off, hidden sampling defaults off).
    prefill_body: fields of a request with a prefilled assistant message.
    max_top_logprobs: the largest supported `top_logprobs`; 0: no log-probabilities.
    processed_logprobs: log-probabilities are those at the sampling temperature, not at temperature 1.
    token_ids_body: fields of a request whose response must contain exact token ids.
    unmodified_sampling: the server samples exactly as the request specifies, without its own defaults.
    supports_seed, reports_usage: the server accepts seeds, and reports the number of tokens used.
    """

    max_tokens_field: str = "max_tokens"
    extra_body: JsonObject = field(default_factory=dict)
    prefill_body: JsonObject | None = None
    max_top_logprobs: int = 0
    processed_logprobs: bool = False
    token_ids_body: JsonObject | None = None
    unmodified_sampling: bool = False
    supports_seed: bool = True
    reports_usage: bool = True

    def to_model_capabilities(self, num_votes: int) -> ModelCapabilities:
        return ModelCapabilities(
            prefill=self.prefill_body is not None,
            logprobs=self.max_top_logprobs > 0,
            token_ids=self.token_ids_body is not None,
            exact_logprobs=self.token_ids_body is not None and self.max_top_logprobs > 0 and self.unmodified_sampling,
            num_votes=0 if self.max_top_logprobs else num_votes,
        )


def parse_retry_after(retry_after: str) -> float:
    """Return the delay of a Retry-After header (seconds or a date) in seconds; 0 if it is invalid or in the past."""
    if re.fullmatch(r"\s*[0-9]{1,9}\s*", retry_after):
        return float(retry_after)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(retry_after).timestamp() - time.time())
    except (TypeError, ValueError):
        return 0.0


# Parsing responses


def parse_chat_completion(text: bytes) -> JsonObject:
    """Parse a chat completion. Raise TransientError for anything else, with the usage if that can be parsed."""
    try:
        response = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise TransientError("a response that is not JSON") from error
    if not isinstance(response, dict):
        raise TransientError("a response that is not a chat completion")
    try:
        message = response["choices"][0]["message"]
        content = message["content"]
    except (KeyError, IndexError, TypeError) as error:
        raise TransientError("a response that is not a chat completion", usage=parse_usage(response) or NO_USAGE) from error
    if not isinstance(content, str | None):
        raise TransientError("a response whose content is not a string", usage=parse_usage(response) or NO_USAGE)
    message["content"] = replace_surrogates(content or "")
    return response


def replace_surrogates(text: str) -> str:
    """Replace lone surrogates, which are valid in JSON and cannot be encoded as UTF-8."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def parse_usage(response: JsonObject) -> Usage | None:
    """Return the usage that the server reports, or None."""
    usage = response.get("usage")
    if not isinstance(usage, dict):
        return None
    numbers = _parse_non_negative_ints([usage.get("prompt_tokens"), usage.get("completion_tokens")])
    return Usage(*numbers) if numbers else None


def estimate_usage(request: JsonObject, response: JsonObject) -> Usage:
    """Estimate the usage from the number of characters, so that budgets also work without reported usage."""
    num_prompt_chars = sum(len(message["content"]) for message in request["messages"])
    num_completion_chars = len(response["choices"][0]["message"]["content"])
    return Usage(num_prompt_chars // _CHARS_PER_TOKEN, num_completion_chars // _CHARS_PER_TOKEN)


def parse_generation(response: JsonObject, usage: Usage) -> Generation:
    """Return the sampled completion, with its token ids and log-probabilities if the response has them for every token."""
    choice = response["choices"][0]
    content = choice["message"]["content"]
    refusal = choice["message"].get("refusal")
    text = _THINKING_PATTERN.sub("", content, count=1) if content.lstrip().startswith("<think>") else content
    finish = _FINISH_REASONS.get(str(choice.get("finish_reason")), "unknown")
    if isinstance(refusal, str) and refusal:
        text, finish = text or replace_surrogates(refusal), "refused"
    token_ids, logprobs = _parse_sampled_tokens(choice)
    if text != content:
        token_ids, logprobs = (), ()  # they include the tokens of the removed reasoning
    prompt = _parse_non_negative_ints(response.get("prompt_token_ids") or choice.get("prompt_token_ids"))
    return Generation(text, finish, token_ids, logprobs, prompt, usage)


def _parse_sampled_tokens(choice: JsonObject) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """Return the ids of the sampled tokens and, if there is one for each token, their log-probabilities."""
    entries = [entry for entry in (choice.get("logprobs") or {}).get("content") or [] if isinstance(entry, dict)]
    tokens = [str(entry.get("token")) for entry in entries]
    token_ids = _parse_non_negative_ints(choice.get("token_ids"))
    if not token_ids and tokens and all(re.fullmatch(r"token_id:\d+", token) for token in tokens):
        token_ids = tuple(int(token.removeprefix("token_id:")) for token in tokens)
    logprobs = tuple(value for entry in entries if (value := _parse_logprob(entry)) is not None)
    return token_ids, logprobs if len(logprobs) == len(token_ids) else ()


def _parse_non_negative_ints(value: Any) -> tuple[int, ...]:
    is_valid = isinstance(value, list) and all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in value)
    return tuple(value) if is_valid else ()


def _parse_logprob(entry: Any) -> float | None:
    """Return a finite log-probability, clamped to at most 0 (rounding can exceed it), or None."""
    value = entry.get("logprob") if isinstance(entry, dict) else None
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        return None
    return min(0.0, float(value))


def parse_top_logprobs(response: JsonObject) -> list[tuple[str, float]]:
    """Return the top tokens at the first position with their log-probabilities."""
    content = (response["choices"][0].get("logprobs") or {}).get("content") or [{}]
    listed = content[0].get("top_logprobs") if isinstance(content[0], dict) else None
    pairs = [(entry.get("token"), _parse_logprob(entry)) for entry in listed or [] if isinstance(entry, dict)]
    return [(token, value) for token, value in pairs if isinstance(token, str) and value is not None]


def parse_option_scores(response: JsonObject, usage: Usage, *, options: Sequence[str]) -> OptionScores:
    """Return the score of each option: the probability summed over the top tokens that mean it (`A`, ` A`, `(A`, `A)`).

    The probability of an option that is not among the top tokens is at most the smallest top probability, and all missing
    options together have at most the probability that the top tokens leave. A missing option gets this bound as its
    probability. The bound counts in the option mass only if another option is among the top tokens; if none is, the mass is 0.
    """
    top = [(token.strip(_OPTION_STRIP_CHARS), value) for token, value in parse_top_logprobs(response)]
    sums = [math.fsum(math.exp(value) for token, value in top if token == option) for option in options]
    num_missing = sum(total == 0 for total in sums)
    smallest = min((math.exp(value) for _, value in top), default=0.0)
    remaining = max(0.0, 1.0 - math.fsum(math.exp(value) for _, value in top))
    bound = min(smallest, remaining / num_missing) if num_missing else 0.0
    probabilities = [total or bound for total in sums]
    return OptionScores(
        logprobs=tuple(math.log(p) if p > 0 else -math.inf for p in probabilities),
        option_mass=min(1.0, math.fsum(probabilities)) if any(sums) else 0.0,
        usage=usage,
    )


def count_votes(replies: Sequence[Generation], options: Sequence[str]) -> OptionScores:
    """Return the share of each option among the replies. A reply that is not just an option counts for none."""
    votes = [parse_vote(reply.text, options) for reply in replies]
    shares = [votes.count(option) / len(replies) for option in options]
    return OptionScores(
        logprobs=tuple(math.log(share) if share else -math.inf for share in shares),
        option_mass=math.fsum(shares),
        usage=sum((reply.usage for reply in replies), NO_USAGE),
        unparsed_replies=tuple(reply.text for reply, vote in zip(replies, votes, strict=True) if vote is None),
    )


def parse_vote(text: str, options: Sequence[str]) -> str | None:
    """Return the option in a reply such as `A`, `(A)`, `Answer: A.` or `**A**`, or None (for `A better one`, for example)."""
    match = _OPTION_REPLY_PATTERN.match(text)
    return match[1] if match and match[1] in options else None
