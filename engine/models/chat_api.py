"""Define the capabilities and errors of a server with OpenAI's chat API, and parse its responses."""

from __future__ import annotations

import email.utils
import json
import math
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from engine.errors import ModelUnreachable
from engine.models.finish_reason import find_broken_completion, parse_choice_finish_reason
from engine.models.interface import NO_USAGE, Generation, ModelCapabilities, OptionScores, Usage
from engine.models.reasoning import join_texts, read_message, read_reasoning_fields
from engine.models.throttle import Slot

_CHARS_PER_TOKEN = 4  # used to estimate the usage if a server reports none
# A token can contain these characters around a letter. Byte-level BPE writes a space as Ġ, SentencePiece writes it as ▁.
_OPTION_STRIP_CHARS = " \n\tĠ▁()"
_OPTION_REPLY_PATTERN = re.compile(r"[\s(\[*\"']*(?:answer\s*:?\s*)?[\s(\[*\"']*(\w+)\s*(?:[)\]*\"'.:,]|\n|$)", re.IGNORECASE)

_MISSING_LOGPROB = -9999.0  # vLLM sends this value for a token without a log-probability
_TEXT_PART_TYPES = ("text", "output_text")
_REASONING_PART_TYPES = ("thinking", "redacted_thinking", "reasoning")
JsonObject = dict[str, Any]


class TransientError(Exception):
    """An attempt failed, and a retry may succeed.

    `status_code` is 0 if there was no response. `usage` contains the tokens that the server billed for the attempt. `was_sent` is
    false if the server has not received the request. `kind` is equal for failures of the same kind.
    """

    def __init__(self, reason: str, status_code: int = 0, usage: Usage = NO_USAGE, *, was_sent: bool = True) -> None:
        super().__init__(reason)
        self.status_code, self.usage, self.was_sent = status_code, usage, was_sent

    @property
    def kind(self) -> str:
        return f"status {self.status_code}" if self.status_code else str(self).partition(":")[0]


class RequestTimeout(TransientError):
    """The server accepted a request, but it did not send the next token, or the whole response, within the timeout.

    The request has received nothing since `waiting_since`, on the monotonic clock. `limit_s` is the timeout. If the time of the
    whole completion was over (see `GenerationRequest.timeout_s`), `is_total` is true, and `partial` is the streamed part of the
    response, or None.
    """

    def __init__(
        self,
        reason: str,
        usage: Usage = NO_USAGE,
        *,
        waiting_since: float,
        limit_s: float,
        is_total: bool = False,
        partial: JsonObject | None = None,
    ) -> None:
        super().__init__(reason, usage=usage)
        self.waiting_since, self.limit_s, self.is_total, self.partial = waiting_since, limit_s, is_total, partial

    @property
    def kind(self) -> str:
        return "timeout"


class RequestRejected(Exception):
    """The server rejected a request as invalid. The message is the server's message; the API key is removed."""


class ServerMisconfigured(ModelUnreachable):
    """The server answers, but the address, the model or the key is wrong."""


class RequestGivenUp(RequestRejected):
    """The caller of `post_with_retries` has given up a request that failed several times."""


class ReceivedResponse(NamedTuple):
    """A response and its usage. `latency_s` is the longest time without a token: before the first one, or between two of them.

    If the response was not streamed, `latency_s` is the time until the whole response.
    """

    response: JsonObject
    usage: Usage
    latency_s: float


@dataclass(frozen=True)
class FailedAttempt:
    """A failed attempt of a request: the number of failures so far, and the time of the first one on the monotonic clock."""

    error: TransientError
    num_failures: int
    first_failed_at: float
    slot: Slot


class ChatServer(Protocol):
    """A server that can be probed (see `engine.models.endpoint.Endpoint`)."""

    url: str
    id: str
    send_seed: bool
    stream: bool

    def post_with_retries(
        self,
        request: JsonObject,
        *,
        timeout_s: float | None = None,
        should_give_up: Callable[[FailedAttempt], bool] = ...,
    ) -> tuple[JsonObject, Usage]: ...

    def add_unbilled(self, usage: Usage) -> None: ...


@dataclass(frozen=True)
class ServerCapabilities:
    """The capabilities of a server. A `*_body` field contains the request fields of a feature, or None if it is not supported.

    `max_tokens_field` is the name of the request field that limits the number of new tokens.
    `extra_body` contains fields that are added to every request. They turn off thinking and the server's own sampling defaults.
    `prefill_body` contains the fields of a request with a prefilled assistant message.
    `echoes_prefill` is true if the content of a response to such a request begins with the prefilled message (llama.cpp).
    `max_top_logprobs` is the largest supported `top_logprobs`. 0 means that log-probabilities are not supported.
    `processed_logprobs` is true if log-probabilities are computed at the sampling temperature instead of temperature 1.
    `token_ids_body` contains the fields of a request whose response must contain exact token ids.
    `unmodified_sampling` is true if the server samples exactly as the request specifies, without its own defaults.
    `supports_seed` is true if the server accepts seeds. `reports_usage` is true if it reports the number of tokens.
    `sends_temperature` is false if requests must not contain a temperature. `any_temperature` is false if only 1 is accepted.
    `top_p_with_temperature` is false if a request must not contain both.
    `thinks` is true if a completion starts with reasoning although the request turns thinking off.
    `stream_body` contains the fields of a request whose response is streamed. It is None if the server cannot stream everything
    that an unstreamed response contains: the log-probabilities, the token ids and the usage.
    `ignores_seed` is true if the server accepts seeds, but samples different completions for the same seed.
    `accepts_token_ids` is true if the server completes a prompt of token ids (`engine.models.token_api`).
    `names_tokens` is false if log-probabilities contain token ids instead of texts, so that options cannot be found in them.
    """

    max_tokens_field: str = "max_tokens"
    extra_body: JsonObject = field(default_factory=dict)
    prefill_body: JsonObject | None = None
    echoes_prefill: bool = False
    max_top_logprobs: int = 0
    processed_logprobs: bool = False
    token_ids_body: JsonObject | None = None
    unmodified_sampling: bool = False
    supports_seed: bool = True
    reports_usage: bool = True
    sends_temperature: bool = True
    any_temperature: bool = True
    top_p_with_temperature: bool = True
    thinks: bool = False
    names_tokens: bool = True
    stream_body: JsonObject | None = None
    ignores_seed: bool = False
    accepts_token_ids: bool = False

    def to_model_capabilities(self, num_votes: int) -> ModelCapabilities:
        return ModelCapabilities(
            prefill=self.prefill_body is not None,
            logprobs=self.can_score_options,
            token_ids=self.token_ids_body is not None,
            exact_logprobs=self.token_ids_body is not None and self.max_top_logprobs > 0 and self.unmodified_sampling,
            num_votes=0 if self.can_score_options else num_votes,
            any_temperature=self.any_temperature,
        )

    @property
    def can_score_options(self) -> bool:
        """Whether options can be found among the top tokens."""
        return self.max_top_logprobs > 0 and self.names_tokens


def parse_retry_after(retry_after: str) -> float:
    """Return the delay in seconds of a Retry-After header, which contains seconds or a date. Return 0 if it is invalid."""
    if re.fullmatch(r"\s*[0-9]{1,9}\s*", retry_after):
        return float(retry_after)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(retry_after).timestamp() - time.time())
    except (TypeError, ValueError):
        return 0.0


# Parsing responses


def parse_chat_completion(text: bytes) -> JsonObject:
    """Parse a chat completion. If the response is invalid, raise TransientError with the reported usage."""
    try:
        response = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise TransientError("the response is not JSON") from error
    return normalize_chat_completion(response)


def normalize_chat_completion(response: Any) -> JsonObject:
    """Return a decoded chat completion whose content is a text. If it is invalid, raise TransientError with the reported usage."""
    if not isinstance(response, dict):
        raise TransientError("the response is not a chat completion")
    usage = parse_usage(response) or NO_USAGE
    try:
        message = response["choices"][0]["message"]
        content = message.get("content") if read_reasoning_fields(message) else message["content"]
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise TransientError("the response is not a chat completion", usage=usage) from error
    if problem := find_broken_completion(response["choices"][0]):
        raise TransientError(problem, usage=usage)
    if isinstance(content, list):
        content = _join_parts(content, message, usage)
    if not isinstance(content, str | None):
        raise TransientError("the content of the response is not a string", usage=usage)
    message["content"] = replace_surrogates(content or "")
    return response


def _join_parts(parts: list[Any], message: JsonObject, usage: Usage) -> str:
    """Return the text of a content that is a list of parts. Move its reasoning to the field `reasoning_content`."""
    texts: list[str] = []
    reasoning = [message.get("reasoning_content")]
    for part in parts:
        fields = {"type": "text", "text": part} if isinstance(part, str) else part if isinstance(part, dict) else {}
        kind, text = fields.get("type", "text"), fields.get("text")
        if kind in _REASONING_PART_TYPES:
            reasoning.append(join_texts(fields) or f"({kind})")  # redacted reasoning has no text
        elif kind in _TEXT_PART_TYPES and isinstance(text, str):
            texts.append(text)
        else:
            raise TransientError(f"the content of the response has a part of type {str(kind)[:50]!r} without text", usage=usage)
    message["reasoning_content"] = join_texts(reasoning)
    return "".join(texts)


def replace_surrogates(text: str) -> str:
    """Replace lone surrogates. Lone surrogates are valid in JSON but cannot be encoded as UTF-8."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def parse_usage(response: JsonObject) -> Usage | None:
    """Return the usage that the server reports, or None if it reports none."""
    usage = response.get("usage")
    if not isinstance(usage, dict):
        return None
    numbers = _parse_non_negative_ints([usage.get("prompt_tokens"), usage.get("completion_tokens")])
    return Usage(*numbers) if numbers else None


def estimate_usage(request: JsonObject, response: JsonObject) -> Usage:
    """Estimate the usage from the token ids or the number of characters, so that budgets also work without reported usage."""
    choice = response["choices"][0]
    num_tokens = len(choice.get("token_ids") or ()) or len(choice["message"]["content"]) // _CHARS_PER_TOKEN
    return Usage(estimate_prompt_tokens(request), num_tokens)


def estimate_prompt_tokens(request: JsonObject) -> int:
    """Return the number of prompt tokens of a request of token ids. For messages, estimate it from the number of characters."""
    if "token_ids" in request:
        return len(request["token_ids"])
    return sum(len(message["content"]) for message in request["messages"]) // _CHARS_PER_TOKEN


def parse_generation(response: JsonObject, usage: Usage) -> Generation:
    """Return the sampled completion. Add token ids and log-probabilities if the response has them for every token."""
    choice = response["choices"][0]
    refusal = choice["message"].get("refusal")
    separated = read_message(choice["message"])
    text, finish = separated.response, parse_choice_finish_reason(choice)
    if isinstance(refusal, str) and refusal:
        text, finish = text or replace_surrogates(refusal), "refused"
    token_ids, logprobs = _parse_sampled_tokens(choice)
    prompt = _parse_non_negative_ints(response.get("prompt_token_ids") or choice.get("prompt_token_ids"))
    return Generation(
        text,
        finish,
        token_ids,
        logprobs,
        prompt,
        usage,
        replace_surrogates(separated.reasoning),
        separated.ends_in_reasoning,
        separated.lacks_opening,
    )


def _parse_sampled_tokens(choice: JsonObject) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """Return the ids of the sampled tokens and their log-probabilities. If one is missing, return no log-probabilities."""
    entries = _list_logprob_entries(choice)
    tokens = [str(entry.get("token")) for entry in entries]
    token_ids = _parse_non_negative_ints(choice.get("token_ids"))
    if not token_ids and tokens and all(re.fullmatch(r"token_id:\d+", token) for token in tokens):
        token_ids = tuple(int(token.removeprefix("token_id:")) for token in tokens)
    values = map(_parse_logprob, entries)
    logprobs = tuple(value for value in values if value is not None and value > _MISSING_LOGPROB)
    return token_ids, logprobs if len(logprobs) == len(token_ids) else ()


def _list_logprob_entries(choice: JsonObject) -> list[JsonObject]:
    """Return the entries of the sampled tokens. Log-probabilities in another form, such as that of old completions, have none."""
    logprobs = choice.get("logprobs")
    content = logprobs.get("content") if isinstance(logprobs, dict) else None
    return [entry for entry in content if isinstance(entry, dict)] if isinstance(content, list) else []


def _parse_non_negative_ints(value: Any) -> tuple[int, ...]:
    is_valid = isinstance(value, list) and all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in value)
    return tuple(value) if is_valid else ()


def _parse_logprob(entry: Any) -> float | None:
    """Return a log-probability, or None if it is not finite. Values above 0 (rounding errors) become 0."""
    value = entry.get("logprob") if isinstance(entry, dict) else None
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        return None
    return min(0.0, float(value))


def parse_top_logprobs(response: JsonObject) -> list[tuple[str, float]]:
    """Return the top tokens at the first position with their log-probabilities."""
    first = next(iter(_list_logprob_entries(response["choices"][0])), {})
    listed = first.get("top_logprobs")
    entries = listed if isinstance(listed, list) else []
    pairs = [(entry.get("token"), _parse_logprob(entry)) for entry in entries if isinstance(entry, dict)]
    return [(token, value) for token, value in pairs if isinstance(token, str) and value is not None]


def parse_option_scores(response: JsonObject, usage: Usage, *, options: Sequence[str]) -> OptionScores:
    """Return the score of each option: the total probability of its variants among the top tokens (`A`, ` A`, `(A`, `A)`).

    An option that is not among the top tokens has at most the smallest top probability. The total probability of all
    missing options is at most 1 minus the total probability of the top tokens. The smaller of these two bounds is used as the
    probability of a missing option. If all options are missing, the option mass is 0.
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
    """Return the share of each option among the replies. A reply that is not exactly one option is not counted."""
    votes = [parse_vote(reply.text, options) for reply in replies]
    shares = [votes.count(option) / len(replies) for option in options]
    return OptionScores(
        logprobs=tuple(math.log(share) if share else -math.inf for share in shares),
        option_mass=math.fsum(shares),
        usage=sum((reply.usage for reply in replies), NO_USAGE),
        unparsed_replies=tuple(reply.text for reply, vote in zip(replies, votes, strict=True) if vote is None),
        num_cut_replies=sum(reply.ends_in_reasoning for reply in replies),
    )


def parse_vote(text: str, options: Sequence[str]) -> str | None:
    """Return the option in a reply such as `A`, `(A)`, `Answer: A.` or `**A**`, or None for another reply (`A better one`)."""
    match = _OPTION_REPLY_PATTERN.match(text)
    return match[1] if match and match[1] in options else None
