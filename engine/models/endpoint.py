"""Models behind an OpenAI-compatible server (vLLM, SGLang, llama.cpp, transformers serve, hosted APIs).

A server is asked once, at its first use, what it can do (`engine.models.probe`); what it cannot do is never papered over:
`capabilities` says it, and the stages ask in other words, under another template hash.

Requests run side by side up to a limit, with a time limit each; 429, 5xx, cut connections and answers that are not JSON are
tried again with exponential back-off and full jitter, and never before a `Retry-After` is over, until the call's deadline: then
the server counts as away (ModelUnreachable), the stage pauses and nothing is lost. A request that the server calls wrong is the
record's fault (PermanentRecordError).

Options are read from the first token's `top_logprobs`, or counted in sampled replies where a server gives none (`scores`,
`votes`). Tokens are counted as the server bills them: what a failed try used is added to the next answer that arrives. The key
comes from an environment variable, which may be one server's own, and stands in no message.
"""

from __future__ import annotations

import copy
import email.utils
import json
import logging
import math
import os
import random
import re
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import httpx

from engine.errors import CharterError, DependencyUnreachable, ModelUnreachable, PermanentRecordError, UsageError
from engine.models.interface import NO_USAGE, Generation, GenerationRequest, ModelCapabilities, OptionScores, Usage
from schemas.ids import compute_fingerprint

logger = logging.getLogger("charter.endpoint")

_RETRY_TIMEOUT_S = 600.0
_BACKOFF_RANGE_S = (0.5, 30.0)
_MAX_RESPONSE_BYTES = 16 * 1024 * 1024
_CHARS_PER_TOKEN = 4  # where a server does not count
_REQUEST_ERROR_STATUSES = (400, 413, 422)
_CONFIG_ERROR_STATUSES = (401, 402, 403, 404)
_NUM_VOTES = 8
_MAX_VOTE_TOKENS = 8
# What surrounds a letter in a token: spaces (also as two families of tokenizers write them) and parentheses.
_OPTION_STRIP_CHARS = " \n\tĠ▁()"
_OPTION_REPLY_PATTERN = re.compile(r"[\s(\[*\"']*(?:answer\s*:?\s*)?[\s(\[*\"']*(\w+)\s*(?:[)\]*\"'.:,]|\n|$)", re.IGNORECASE)
_THINKING_PATTERN = re.compile(r"\s*<think>(?:.*?</think>\s*|.*\Z)", re.DOTALL)

_FINISH_REASONS = {"stop": "stop", "length": "length", "timeout": "timeout", "content_filter": "refused"}

T = TypeVar("T")
JsonObject = dict[str, Any]


class TransientError(Exception):
    """One request failed in a way that may pass. `status` is the server's, 0 for none; `used` what it billed all the same."""

    def __init__(self, reason: str, status_code: int = 0, usage: Usage = NO_USAGE) -> None:
        super().__init__(reason)
        self.status_code, self.usage = status_code, usage


class RequestTimeout(TransientError):
    """A request was taken and not answered in time."""


class RequestRejected(Exception):
    """The server calls a request wrong; its words, without the key."""


@dataclass(frozen=True)
class ChatRequest:
    """What is sent, and the seconds in which the answer may be written; None: the endpoint's own limit, and tried again."""

    body: JsonObject
    timeout_s: float | None = None


@dataclass(frozen=True)
class ServerCapabilities:
    """How one server is talked to: fields that its requests need, None where it cannot do it.

    always: in every request (thinking off, no truncation hidden in the server's defaults).
    begun: with a prefilled assistant message. token_ids: to get exact token ids. shown: how many top log-probabilities, 0: none.
    processed: whether they are those of the sampling temperature. unmodified: sampling is what the request says and no more.
    seeds, counts: whether it takes seeds, and says how many tokens it used.
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


def compute_served_revision(url: str, model: str) -> str:
    """What stands for the weights of a server's model in records."""
    return compute_fingerprint("served_model", url=url, model=model)[:16]


def open_endpoint(
    spec: str, *, api_key_env: str = "OPENAI_API_KEY", timeout_s: float = 120.0, concurrency: int = 16
) -> Endpoint:
    """The model that `http://HOST:PORT/v1#MODEL` names."""
    address, _, model = spec.partition("#")
    try:
        url = httpx.URL(address)
    except httpx.InvalidURL as error:
        raise UsageError("the model server has no proper address", str(error), "write http://HOST:PORT/v1#MODEL") from error
    variable = get_api_key_variable(url, api_key_env)
    if url.userinfo or url.query:
        raise UsageError(
            f"the address of the model server {url.host} holds more than an address",
            "a setting stands in the records of a run, and a key must not",
            f"put the key into the environment variable {variable} and write http://HOST:PORT/v1#MODEL",
        )
    if not model or not url.host:
        raise UsageError(f"{spec} names no model", "a server may serve several", f"write it as {address}#MODEL")
    key = os.environ.get(variable, "") if variable else ""
    return Endpoint(address.rstrip("/"), model, key, timeout_s=timeout_s, concurrency=concurrency)


def get_api_key_variable(address: httpx.URL | str, api_key_env: str) -> str:
    """The environment variable with a server's key: of `HOST=VARIABLE` its own (with a port or without), else the one alone.

    A server must not be sent another one's key: where the setting names hosts only, the others get none.
    """
    url, others = httpx.URL(address), ""
    for entry in api_key_env.split(","):
        host, separator, variable = (part.strip() for part in entry.partition("="))
        if separator and host in (url.host, url.netloc.decode()):
            return variable
        others = others if separator else host
    return others


@dataclass
class Endpoint:
    """One model of one server. `timeout_s` bounds all tries of one request; `votes` is how many replies score an option."""

    url: str
    id: str
    api_key: str = field(default="", repr=False)
    timeout_s: float = 120.0
    concurrency: int = 16
    retry_timeout_s: float = _RETRY_TIMEOUT_S
    backoff_range_s: tuple[float, float] = _BACKOFF_RANGE_S
    num_votes: int = _NUM_VOTES
    cached_server_capabilities: ServerCapabilities | None = None

    def __post_init__(self) -> None:
        headers = {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}
        limits = httpx.Limits(max_connections=self.concurrency, max_keepalive_connections=self.concurrency)
        self.client = httpx.Client(headers=headers, timeout=self.timeout_s, limits=limits)
        self.executor = ThreadPoolExecutor(self.concurrency, thread_name_prefix="endpoint")
        # A server's weights have no name of their own: the address and the model's name stand for them.
        self.revision = compute_served_revision(self.url, self.id)
        self.lock = threading.Lock()
        self.probe_lock = threading.Lock()
        self.unbilled_usage = NO_USAGE  # billed, but of no answer that arrived
        self.retry_at = 0.0  # on the monotonic clock: the server asked for quiet until then

    # The port

    @property
    def server_capabilities(self) -> ServerCapabilities:
        """How this server is talked to; asked once."""
        with self.probe_lock:
            if self.cached_server_capabilities is None:
                from engine.models.probe import probe_server

                self.cached_server_capabilities = probe_server(self)
                logger.info("%s#%s: %s", self.url, self.id, self.cached_server_capabilities)
            return self.cached_server_capabilities

    @property
    def capabilities(self) -> ModelCapabilities:
        return self.server_capabilities.to_model_capabilities(self.num_votes)

    def generate(
        self,
        batch: Sequence[GenerationRequest],
        *,
        num_completions: int = 1,
        temperature: float = 1.0,
        top_p: float = 1.0,
        max_tokens: int = 256,
    ) -> list[list[Generation]]:
        dialect = self.server_capabilities
        sampling = {"temperature": temperature, "top_p": top_p, dialect.max_tokens_field: max_tokens}
        exact = top_p == 1 and temperature > 0 and (temperature == 1 or dialect.processed_logprobs)
        if dialect.token_ids_body is not None:
            sampling |= dialect.token_ids_body
            sampling |= {"logprobs": True, "top_logprobs": 0} if exact and self.capabilities.exact_logprobs else {}
        # Requests of one text each: not every server takes n > 1, and each gets a seed of its own.
        requests = [
            ChatRequest(self.make_request_body(ask) | sampling | self.make_seed_body(ask.seed + n), ask.timeout_s)
            for ask in batch
            for n in range(num_completions)
        ]
        answers = self.send_requests(requests, parse_generation)
        return [answers[i : i + num_completions] for i in range(0, len(answers), num_completions)]

    def score_options(self, batch: Sequence[GenerationRequest], options: Sequence[str]) -> list[OptionScores]:
        dialect = self.server_capabilities
        if not dialect.max_top_logprobs:
            return self.score_options_by_vote(batch, options)
        wanted = {
            "temperature": 1.0,
            "top_p": 1.0,
            dialect.max_tokens_field: 1,
            "logprobs": True,
            "top_logprobs": dialect.max_top_logprobs,
        }
        return self.send_requests(
            [ChatRequest(self.make_request_body(ask) | wanted) for ask in batch], partial(parse_option_scores, options=options)
        )

    def score_options_by_vote(self, batch: Sequence[GenerationRequest], options: Sequence[str]) -> list[OptionScores]:
        """The options' shares among `votes` replies sampled at temperature 1."""
        replies = self.generate(batch, num_completions=self.num_votes, max_tokens=_MAX_VOTE_TOKENS)
        return [count_votes(of_one, options) for of_one in replies]

    def make_seed_body(self, seed: int) -> JsonObject:
        return {"seed": seed % 2**31} if self.server_capabilities.supports_seed else {}

    def make_request_body(self, ask: GenerationRequest) -> JsonObject:
        """A chat request; a prefill is an assistant message that the server is asked to go on with."""
        dialect = self.server_capabilities
        messages = [{"role": message.role, "content": message.content} for message in ask.messages]
        request = {"model": self.id, "messages": messages} | dialect.extra_body
        if not ask.prefill:
            return request
        if dialect.prefill_body is None:
            raise UsageError(
                f"{self.url} cannot go on with a prefilled assistant message",
                "it was asked to, and began a new one",
                "ask for what the message should begin with in words (capabilities.prefill says so)",
            )
        return request | {"messages": [*messages, {"role": "assistant", "content": ask.prefill}]} | dialect.prefill_body

    # Requests

    def send_requests(self, requests: Sequence[ChatRequest], parse: Callable[[JsonObject, Usage], T]) -> list[T]:
        """Every request's answer. When one fails all are waited for, and what the others used is kept in mind."""
        futures = [self.executor.submit(self.send_request, request, parse) for request in requests]
        wait(futures)
        errors = [error for future in futures if (error := future.exception())]
        if not errors:
            return [future.result()[0] for future in futures]
        for future in futures:
            if not future.exception():
                self.add_unbilled(future.result()[1])
        raise next((error for error in errors if isinstance(error, DependencyUnreachable)), errors[0])

    def send_request(self, request: ChatRequest, parse: Callable[[JsonObject, Usage], T]) -> tuple[T, Usage]:
        """Send a request until it is answered well, up to the deadline: what `read` makes of it, and the tokens used."""
        try:
            answer, used = self.post_with_retries(request.body, timeout_s=request.timeout_s)
        except RequestRejected as error:
            raise PermanentRecordError(f"{self.url} refuses the request", str(error), "") from error
        used += self.take_unbilled()
        return parse(answer, used), used

    def post_with_retries(
        self,
        request: JsonObject,
        *,
        timeout_s: float | None = None,
        should_give_up: Callable[[TransientError, int], bool] = lambda error, tries: False,
    ) -> tuple[JsonObject, Usage]:
        """The answer to one request, and what it used; `give_up` may end the tries early, as Refused.

        An answer that takes longer than `writing_s` ends with "timeout" if the server answers another request; else it is away.
        """
        deadline, tries = time.monotonic() + self.retry_timeout_s, 0
        while True:
            self.wait_for_retry_after(deadline)
            try:
                return self.post_once(request, timeout_s or self.timeout_s)
            except TransientError as error:
                if isinstance(error, RequestTimeout) and timeout_s and self.is_alive():
                    late = {"choices": [{"message": {"content": ""}, "finish_reason": "timeout"}]}
                    return late, _estimate_usage(request, late)
                self.add_unbilled(error.usage)
                pause = random.uniform(0, min(self.backoff_range_s[1], self.backoff_range_s[0] * 2**tries))
                tries += 1
                if should_give_up(error, tries):
                    raise RequestRejected(str(error)) from error
                if time.monotonic() + pause >= deadline:
                    raise self.make_unreachable_error(f"{error}, after {tries} tries") from error
                time.sleep(pause)

    def make_unreachable_error(self, reason: str) -> CharterError:
        return ModelUnreachable(
            f"the model server {self.url} does not answer",
            reason,
            "look at the server and at models.*; the stage goes on when it is back",
        )

    def is_alive(self) -> bool:
        """Whether the server answers the smallest of requests now."""
        greeting = {
            "model": self.id,
            "messages": [{"role": "user", "content": "Hello"}],
            self.server_capabilities.max_tokens_field: 1,
        }
        try:
            self.add_unbilled(self.post_once(greeting | self.server_capabilities.extra_body, self.timeout_s)[1])
        except TransientError:
            return False
        except RequestRejected:
            pass  # an answer all the same
        return True

    def post_once(self, request: JsonObject, timeout_s: float) -> tuple[JsonObject, Usage]:
        """One try. Raises Away, Refused or ModelUnreachable."""
        try:
            status, headers, text = self.fetch_response(request, timeout_s)
        except httpx.ReadTimeout as error:
            raise RequestTimeout(f"ReadTimeout after {timeout_s:g} s") from error
        except httpx.HTTPError as error:
            raise TransientError(type(error).__name__) from error
        if status in _REQUEST_ERROR_STATUSES:
            raise RequestRejected(self.sanitize_error_text(text))
        if status in _CONFIG_ERROR_STATUSES:
            raise ModelUnreachable(
                f"{self.url} does not serve {self.id} to us ({status})",
                self.sanitize_error_text(text),
                "check models.* and the variable that models.api_key_env names",
            )
        if status != 200:
            self.apply_retry_after(headers.get("retry-after", ""))
            raise TransientError(f"status {status}", status)
        answer = parse_chat_completion(text)
        return answer, parse_usage(answer) or _estimate_usage(request, answer)

    # Other models of the same server

    def with_model(self, model: str) -> Endpoint:
        """The same server under another of its model names, over the same connections."""
        dialect, other = self.server_capabilities, copy.copy(self)
        other.cached_server_capabilities, other.id, other.revision = dialect, model, compute_served_revision(self.url, model)
        return other

    def load_adapter(self, name: str, folder: Path) -> None:
        """Let vLLM load an adapter under a name. That it has one of this name already is for `require` to tell."""
        try:
            answer = self.client.post(f"{self.url}/load_lora_adapter", json={"lora_name": name, "lora_path": str(folder)})
        except httpx.HTTPError as error:
            raise self.make_unreachable_error(type(error).__name__) from error
        if answer.status_code != 200 and "already" not in answer.text:
            raise ModelUnreachable(
                f"{self.url} does not load {name} ({answer.status_code})",
                self.sanitize_error_text(answer.content),
                "start vLLM with --enable-lora, VLLM_ALLOW_RUNTIME_LORA_UPDATING=True and a --max-lora-rank that is enough",
            )

    def require_served(self) -> None:
        """Raise ModelUnreachable unless the server gives a token under this name."""
        greeting = {
            "model": self.id,
            "messages": [{"role": "user", "content": "Hello"}],
            self.server_capabilities.max_tokens_field: 1,
        }
        try:
            answer, used = self.post_once(greeting | self.server_capabilities.extra_body, self.timeout_s)
        except (TransientError, RequestRejected) as error:
            raise self.make_unreachable_error(str(error)) from error
        self.add_unbilled(used)
        if answer.get("model", self.id) != self.id:
            raise self.make_unreachable_error(f"asked for {self.id}, it answers as {str(answer['model'])[:100]}")

    def fetch_response(self, request: JsonObject, timeout_s: float) -> tuple[int, httpx.Headers, bytes]:
        """Status, headers and body; an answer that is too long, or trickles in past the time limit, is cut off."""
        ends = time.monotonic() + timeout_s
        parts, size, url = [], 0, f"{self.url}/chat/completions"
        with self.client.stream("POST", url, json=request, timeout=httpx.Timeout(self.timeout_s, read=timeout_s)) as response:
            for part in response.iter_bytes():
                parts.append(part)
                size += len(part)
                if size > _MAX_RESPONSE_BYTES:
                    raise TransientError(f"an answer of more than {_MAX_RESPONSE_BYTES} bytes")
                if time.monotonic() > ends:
                    raise RequestTimeout(f"an answer that is not complete after {timeout_s:g} s")
            return response.status_code, response.headers, b"".join(parts)

    def apply_retry_after(self, retry_after: str) -> None:
        """Hold all requests back as long as a Retry-After header says."""
        with self.lock:
            self.retry_at = max(self.retry_at, time.monotonic() + parse_retry_after(retry_after))

    def wait_for_retry_after(self, deadline: float) -> None:
        """Wait while the server wants quiet; if that is longer than the deadline it counts as away."""
        while (left := self.retry_at - time.monotonic()) > 0:
            if self.retry_at >= deadline:
                raise self.make_unreachable_error(f"it asks to be left alone for another {left:.0f} s (Retry-After)")
            time.sleep(left)

    def add_unbilled(self, usage: Usage) -> None:
        with self.lock:
            self.unbilled_usage += usage

    def take_unbilled(self) -> Usage:
        """What is owed, to be counted with an answer that arrived."""
        with self.lock:
            owed, self.unbilled_usage = self.unbilled_usage, NO_USAGE
            return owed

    def sanitize_error_text(self, text: bytes) -> str:
        """The server's words, short, and without the key should it repeat it."""
        words = text[:100_000].decode("utf-8", "replace")
        return (words.replace(self.api_key, "***") if self.api_key else words)[:300]


def parse_retry_after(retry_after: str) -> float:
    """How long a Retry-After header asks for, in seconds or as a date; 0 for what is neither, or past."""
    if re.fullmatch(r"\s*[0-9]{1,9}\s*", retry_after):
        return float(retry_after)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(retry_after).timestamp() - time.time())
    except (TypeError, ValueError):
        return 0.0


# What answers say


def parse_chat_completion(text: bytes) -> JsonObject:
    """A chat completion; raises Away for anything else (with the usage, where that much can be read)."""
    try:
        answer = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise TransientError("an answer that is not JSON") from error
    if not isinstance(answer, dict):
        raise TransientError("an answer that is no chat completion")
    try:
        message = answer["choices"][0]["message"]
        content = message["content"]
    except (KeyError, IndexError, TypeError) as error:
        raise TransientError("an answer that is no chat completion", usage=parse_usage(answer) or NO_USAGE) from error
    if not isinstance(content, str | None):
        raise TransientError("an answer whose content is not a text", usage=parse_usage(answer) or NO_USAGE)
    message["content"] = replace_surrogates(content or "")
    return answer


def replace_surrogates(text: str) -> str:
    """The text without lone surrogates, which JSON can carry and UTF-8 cannot."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def parse_usage(answer: JsonObject) -> Usage | None:
    """The server's own count."""
    usage = answer.get("usage")
    if not isinstance(usage, dict):
        return None
    numbers = _parse_non_negative_ints([usage.get("prompt_tokens"), usage.get("completion_tokens")])
    return Usage(*numbers) if numbers else None


def _estimate_usage(request: JsonObject, answer: JsonObject) -> Usage:
    """Four characters a token, for a server that does not count: a budget must not be blind."""
    read = sum(len(message["content"]) for message in request["messages"])
    return Usage(read // _CHARS_PER_TOKEN, len(answer["choices"][0]["message"]["content"]) // _CHARS_PER_TOKEN)


def parse_generation(answer: JsonObject, usage: Usage) -> Generation:
    """The sampled text; its tokens too where the server gave them, exact and whole."""
    choice = answer["choices"][0]
    said = choice["message"]["content"]
    refusal = choice["message"].get("refusal")
    text = _THINKING_PATTERN.sub("", said, count=1) if said.lstrip().startswith("<think>") else said
    finish = _FINISH_REASONS.get(str(choice.get("finish_reason")), "unknown")
    if isinstance(refusal, str) and refusal:
        text, finish = text or replace_surrogates(refusal), "refused"
    token_ids, logprobs = _parse_sampled_tokens(choice)
    if text != said:
        token_ids, logprobs = (), ()  # they are of the thought too
    prompt = _parse_non_negative_ints(answer.get("prompt_token_ids") or choice.get("prompt_token_ids"))
    return Generation(text, finish, token_ids, logprobs, prompt, usage)


def _parse_sampled_tokens(choice: JsonObject) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """The sampled tokens' ids and, when there is one for each, their log-probabilities."""
    entries = [entry for entry in (choice.get("logprobs") or {}).get("content") or [] if isinstance(entry, dict)]
    named = [str(entry.get("token")) for entry in entries]
    token_ids = _parse_non_negative_ints(choice.get("token_ids"))
    if not token_ids and named and all(re.fullmatch(r"token_id:\d+", name) for name in named):
        token_ids = tuple(int(name.removeprefix("token_id:")) for name in named)
    logprobs = tuple(value for entry in entries if (value := _parse_logprob(entry)) is not None)
    return token_ids, logprobs if len(logprobs) == len(token_ids) else ()


def _parse_non_negative_ints(value: Any) -> tuple[int, ...]:
    good = isinstance(value, list) and all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in value)
    return tuple(value) if good else ()


def _parse_logprob(entry: Any) -> float | None:
    """A finite log-probability; rounding above 0 is cut off."""
    value = entry.get("logprob") if isinstance(entry, dict) else None
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        return None
    return min(0.0, float(value))


def parse_top_logprobs(answer: JsonObject) -> list[tuple[str, float]]:
    """The first token's shown tokens with their log-probabilities."""
    content = (answer["choices"][0].get("logprobs") or {}).get("content") or [{}]
    listed = content[0].get("top_logprobs") if isinstance(content[0], dict) else None
    pairs = [(entry.get("token"), _parse_logprob(entry)) for entry in listed or [] if isinstance(entry, dict)]
    return [(token, value) for token, value in pairs if isinstance(token, str) and value is not None]


def parse_option_scores(answer: JsonObject, usage: Usage, *, options: Sequence[str]) -> OptionScores:
    """Sum each option over the shown tokens that mean it: `A`, ` A`, `(A`, `A)`.

    An option that is not shown has at most the smallest probability shown, and all of those together at most what the shown
    tokens leave over. It is given that bound, and beside a shown option the bound counts in the mass; where no option is shown
    nothing is known of any, and the mass is 0.
    """
    shown = [(token.strip(_OPTION_STRIP_CHARS), value) for token, value in parse_top_logprobs(answer)]
    sums = [math.fsum(math.exp(value) for token, value in shown if token == option) for option in options]
    hidden = sum(found == 0 for found in sums)
    smallest = min((math.exp(value) for _, value in shown), default=0.0)
    left = max(0.0, 1.0 - math.fsum(math.exp(value) for _, value in shown))
    bound = min(smallest, left / hidden) if hidden else 0.0
    known = any(sums)
    held = [found or bound for found in sums]
    return OptionScores(
        logprobs=tuple(math.log(p) if p > 0 else -math.inf for p in held),
        option_mass=min(1.0, math.fsum(held)) if known else 0.0,
        usage=usage,
    )


def count_votes(replies: Sequence[Generation], options: Sequence[str]) -> OptionScores:
    """Each option's share of the replies, and what they all share; a reply that is more than an option counts for none."""
    found = [parse_vote(reply.text, options) for reply in replies]
    shares = [found.count(option) / len(replies) for option in options]
    return OptionScores(
        logprobs=tuple(math.log(share) if share else -math.inf for share in shares),
        option_mass=math.fsum(shares),
        usage=sum((reply.usage for reply in replies), NO_USAGE),
        unparsed_replies=tuple(reply.text for reply, option in zip(replies, found, strict=True) if option is None),
    )


def parse_vote(text: str, options: Sequence[str]) -> str | None:
    """The option that a reply begins with, alone: `A`, `(A)`, `Answer: A.`, `**A**`; not the `A` of `A better one`."""
    match = _OPTION_REPLY_PATTERN.match(text)
    return match[1] if match and match[1] in options else None
