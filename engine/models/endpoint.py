"""Use models on an OpenAI-compatible server (vLLM, SGLang, llama.cpp, transformers serve, hosted APIs).

A server is probed once, at its first use (`engine.models.probe`). If a capability is missing, the stages use other prompt
templates, which have another template hash. The prompts of the policy are sent as token ids if the server accepts them and the tokenizer
is on this machine (`engine.models.token_api`).

Requests run concurrently up to a limit, which adapts to the server (`engine.models.throttle`). Completions are streamed if the
server can stream everything that an unstreamed response contains (`engine.models.chat_stream`). The timeout then limits the time
to the first token and the time between two tokens, so a slow server can finish long completions. Without streaming it limits the
whole response. After a timeout, status 429 or 5xx, a broken connection, or a response that is not a chat completion, the request
is retried with exponential backoff and full jitter. A `Retry-After` header delays all requests. The log has a line at the first failure, and then a status line
at intervals (`engine.models.server_health`).

Each request of a batch has its own result, and an error does not affect the other requests:

ModelUnreachable        the server answers no request until the deadline, or it is the wrong server, model or key; the stage pauses
RequestFailed           the server fails for this request, but answers others; this counts as an attempt of the record
PermanentRecordError    the server rejects the request as invalid; the record becomes a dead letter

If a record has several requests and one of them fails, the responses to the others are kept for the next attempt
(`engine.models.paid_responses`).

Options are scored with the `top_logprobs` of the first token. If the server has no log-probabilities, the shares of sampled
replies are used.

Tokens are counted as the server bills them. The usage of a failed attempt is added to the next successful response.

The API key is read from an environment variable, which can differ between servers. No message contains the API key.
"""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import math
import os
import threading
import time
import unicodedata
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from functools import partial
from http import HTTPStatus
from typing import Any, Protocol, TypeVar
from urllib.parse import urljoin

import httpx

from engine.backoff import BACKOFF_RANGE_S, compute_backoff
from engine.errors import CharterError, ModelUnreachable, PermanentRecordError, RequestFailed, UsageError
from engine.models.chat_api import (
    FailedAttempt,
    JsonObject,
    ReceivedResponse,
    RequestGivenUp,
    RequestRejected,
    RequestTimeout,
    ServerCapabilities,
    ServerMisconfigured,
    TransientError,
    count_votes,
    estimate_prompt_tokens,
    estimate_usage,
    normalize_chat_completion,
    parse_chat_completion,
    parse_generation,
    parse_option_scores,
    parse_retry_after,
    parse_usage,
)
from engine.models.control_tokens import break_up_markers
from engine.models.interface import (
    NO_USAGE,
    NUM_VOTES,
    Generation,
    GenerationRequest,
    ModelCapabilities,
    OptionScores,
    Result,
    Usage,
    combine_results,
)
from engine.models.paid_responses import PaidResponses
from engine.models.probe import NO_THINKING_BODY, THINKING_BODY, probe_server
from engine.models.reasoning import report_reasoning
from engine.models.response_reader import TimeLimits, read_body, read_stream
from engine.models.server_health import STATUS_INTERVAL_S, ServerHealth
from engine.models.throttle import Throttle
from engine.models.token_api import (
    GENERATE_PATH,
    TokenCodec,
    is_token_request,
    make_token_request,
    parse_token_completion,
    require_complete,
)
from engine.text import format_count
from schemas.http_client import ClientSettingsError, create_http_client, find_proxy_variable
from schemas.ids import compute_fingerprint

logger = logging.getLogger("charter.endpoint")

_RETRY_TIMEOUT_S = 600.0
_CONNECT_TIMEOUT_S = 10.0
_CHECK_TIMEOUT_S = 10.0
_STREAM_CONTENT_TYPE = "text/event-stream"
_REQUEST_ERROR_STATUSES = (400, 413, 422)
_TRANSIENT_CLIENT_ERROR_STATUSES = (
    408,
    409,
    425,
    429,
)  # every other status from 401 to 499 means a wrong model, key or address
_OVERLOAD_STATUSES = (429, 503, 529)  # 529: Anthropic
_MAX_FAILURES = 3  # after this number of failures, the request itself may be the cause
_MAX_ERROR_CHARS = 300
_MAX_VOTE_TOKENS = 8
_MAX_THINKING_TOKENS = 1024  # additional tokens for a vote of a model that thinks before it replies
_MIN_UNLISTED_SCORES = 20  # this number of option scores without any listed option is worth a warning

T = TypeVar("T")


@dataclass(frozen=True)
class ChatRequest:
    """A request body, the time limit of the whole completion in seconds, or None, and the group of the GenerationRequest."""

    body: JsonObject
    timeout_s: float | None = None
    group: str = ""

    @property
    def key(self) -> str:
        """The hash of the body."""
        return hashlib.sha256(json.dumps(self.body, sort_keys=True).encode()).hexdigest()


def _get_phrase(status: int) -> str:
    """Return the name of a status, e.g. "Internal Server Error", or an empty string."""
    return next((known.phrase for known in HTTPStatus if known == status), "")


def _remove_prefill(result: Result[Generation], prefill: str) -> Result[Generation]:
    """Return the result without the prefilled message at the start of its text."""
    if not prefill or not isinstance(result, Generation):
        return result
    return replace(result, text=result.text.removeprefix(prefill))


def compute_served_revision(url: str, model: str) -> str:
    """Return the revision of a served model: a hash of its address and name, because its weights are unknown."""
    return compute_fingerprint("served_model", url=url, model=model)[:16]


def open_endpoint(
    spec: str,
    *,
    api_key_env: str = "OPENAI_API_KEY",
    timeout_s: float = 120.0,
    concurrency: int = 16,
    send_seed: bool = True,
    stream: bool = True,
    verify: Callable[[Endpoint], None] | None = None,
    load_tokenizer: Callable[[], Any] | None = None,
) -> Endpoint:
    """Open the model `http://HOST:PORT/v1#MODEL`.

    Raise UsageError if the address has a different form, or if the API key or the proxy settings cannot be used.
    """
    address, _, model = spec.partition("#")
    try:
        url = httpx.URL(address)
    except httpx.InvalidURL as error:
        raise UsageError("the address of the model server is invalid", str(error), "write http://HOST:PORT/v1#MODEL") from error
    variable = get_api_key_variable(url, api_key_env)
    if url.userinfo or url.query:
        raise UsageError(
            f"the address of the model server {url.host} contains a user, a password or a query",
            "settings are stored in the records of a run, and must not contain a key",
            f"put the key into the environment variable {variable} and write http://HOST:PORT/v1#MODEL",
        )
    if not model or not url.host:
        raise UsageError(f"{spec} names no model", "a server can serve several models", f"write {address}#MODEL")
    key = _read_api_key(variable) if variable else ""
    try:
        return Endpoint(
            address.rstrip("/"),
            model,
            key,
            timeout_s=timeout_s,
            concurrency=concurrency,
            send_seed=send_seed,
            stream=stream,
            verify=verify,
            load_tokenizer=load_tokenizer,
        )
    except ClientSettingsError as error:
        raise UsageError(error.what, error.why, error.fix) from None


def _read_api_key(variable: str) -> str:
    """Return the API key in an environment variable. Raise UsageError, which does not contain the key, if it is malformed."""
    key = os.environ.get(variable, "")
    if problem := _describe_key_problem(key):
        raise UsageError(
            f"the API key in the environment variable {variable} cannot be sent",
            f"it {problem}; a key consists of ASCII characters, without quotation marks around it",
            f"set it again, e.g. export {variable}=$(tr -d '[:space:]' < FILE)",
        )
    return key


def _describe_key_problem(key: str) -> str:
    """Return what is wrong with an API key, or an empty string."""
    if len(key) > 1 and key[0] in "\"'" and key[-1] in "\"'":
        return "is enclosed in quotation marks"
    for character in key:
        if character in "\r\n":
            return "contains a line break"
        if not character.isascii() or not character.isprintable():
            name = unicodedata.name(character, "a control character").lower()
            return f"contains U+{ord(character):04X} ({name})"
    if key != key.strip():
        return "starts or ends with a space"
    return "starts with the word Bearer, which Charter adds" if key.lower().startswith("bearer ") else ""


def get_api_key_variable(address: httpx.URL | str, api_key_env: str) -> str:
    """Return the environment variable that holds the API key of a server.

    An entry `HOST=VARIABLE` or `HOST:PORT=VARIABLE` for this server has precedence over an entry without a host. If all entries
    name other hosts, return an empty string, because a server must not receive the API key of another server.
    """
    url, default = httpx.URL(address), ""
    for entry in api_key_env.split(","):
        host, separator, variable = (part.strip() for part in entry.partition("="))
        if separator and host in (url.host, url.netloc.decode()):
            return variable
        default = default if separator else host
    return default


class ServedWeights(Protocol):
    """The weights of a policy on a server whose weights or adapters change while it runs (see `engine.weight_sync`)."""

    def acquire(self) -> str:
        """Make the server have these weights. Return a mark of its present state. Raise CharterError if it does not have them."""
        ...

    def require_unchanged(self, mark: str) -> None:
        """Raise ModelUnreachable if the weights of the server have changed since `acquire` returned this mark."""
        ...


@dataclass
class Endpoint:
    """One model of one server.

    `timeout_s` limits the time to the first token and between two tokens, or the whole response if it is not streamed. Both are
    limits of one attempt. `retry_timeout_s` limits all attempts together. If the server has no
    log-probabilities, `num_votes` replies are sampled to score options. If `send_seed` is false, no request has a seed. If
    `stream` is false, no response is streamed. `verify` is called once after the probe, and raises UsageError if the server must not
    be used. `load_tokenizer` returns the tokenizer of the policy, or raises UsageError if this machine does not have it; None means
    that the model is not the policy. `token_codec` is set if prompts are sent as token ids. `served_weights` are checked before and after each
    batch; None means that the weights of the model never change.
    """

    url: str
    id: str
    api_key: str = field(default="", repr=False)
    timeout_s: float = 120.0
    concurrency: int = 16
    retry_timeout_s: float = _RETRY_TIMEOUT_S
    backoff_range_s: tuple[float, float] = BACKOFF_RANGE_S
    num_votes: int = NUM_VOTES
    send_seed: bool = True
    stream: bool = True
    verify: Callable[[Endpoint], None] | None = None
    load_tokenizer: Callable[[], Any] | None = None
    token_codec: TokenCodec | None = None
    served_weights: ServedWeights | None = None
    cached_server_capabilities: ServerCapabilities | None = None

    def __post_init__(self) -> None:
        headers = {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=self.concurrency)
        timeout = httpx.Timeout(self.timeout_s, connect=min(_CONNECT_TIMEOUT_S, self.timeout_s))
        self.client = create_http_client(headers=headers, timeout=timeout, limits=limits, follow_redirects=False)
        self.executor = ThreadPoolExecutor(self.concurrency, thread_name_prefix="endpoint")
        self.revision = compute_served_revision(self.url, self.id)
        self.lock = threading.Lock()
        self.probe_lock = threading.RLock()  # `verify` uses the capabilities
        self.unbilled_usage = NO_USAGE  # usage of failed attempts that is not yet added to a response
        self.template_opens_reasoning = False
        self.throttle = Throttle(self.url, self.concurrency, self.timeout_s)
        self.health = ServerHealth(f"{self.url}#{self.id}")
        self.paid_responses = PaidResponses()
        self.num_unlisted_scores: int | None = 0  # option scores without any listed option so far; None after the warning

    # The Model interface

    @property
    def server_capabilities(self) -> ServerCapabilities:
        """The capabilities of the server. The server is probed and verified at the first use of this property."""
        with self.probe_lock:
            if self.cached_server_capabilities is None:
                self.cached_server_capabilities = probe_server(self)
                logger.info("%s#%s: %s", self.url, self.id, self.cached_server_capabilities)
                try:
                    if self.verify:  # before prompts are sent as token ids, because it compares the tokenizers
                        self.verify(self)
                    if self.load_tokenizer:
                        self.token_codec = self.make_token_codec(self.load_tokenizer, self.cached_server_capabilities)
                except CharterError:
                    self.cached_server_capabilities = None  # the next use probes the server again
                    raise
            return self.cached_server_capabilities

    def make_token_codec(self, load_tokenizer: Callable[[], Any], capabilities: ServerCapabilities) -> TokenCodec | None:
        """Return the codec of the policy, or log why the chat template of the server formats its prompts and return None."""
        reason = f"it does not accept token ids at {GENERATE_PATH} (vLLM: start it with --enable-scale-out)"
        if capabilities.accepts_token_ids:
            try:
                tokenizer = load_tokenizer()
            except UsageError as error:
                reason = f"{error.what}: {error.why}"
            else:
                if tokenizer.chat_template:
                    logger.info("%s#%s gets prompts as token ids (%s)", self.url, self.id, GENERATE_PATH)
                    return TokenCodec(tokenizer)
                reason = "the tokenizer of train.base_model has no chat template"
        logger.warning("%s#%s formats the prompts of the policy with its own chat template: %s", self.url, self.id, reason)
        return None

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
        max_thinking_tokens: int = 0,
    ) -> list[Result[list[Generation]]]:
        server_capabilities = self.server_capabilities
        if temperature > 0 and server_capabilities.ignores_seed:
            raise UsageError(
                f"{self.id} on {self.url} ignores the seed",
                "the probe got different completions for the same seed, so its sampled completions cannot be repeated",
                "use a server that supports seeds, or accept this: set models.send_seed to false",
            )
        limit = max_tokens + max_thinking_tokens  # a server has one limit for the reasoning and the response
        has_logprobs = top_p == 1 and temperature > 0 and (temperature == 1 or server_capabilities.processed_logprobs)
        has_logprobs = has_logprobs and self.capabilities.exact_logprobs
        sampling = self.make_sampling_body(temperature, top_p)
        # One request for each completion, because some servers do not support n > 1, and each completion has a different seed.
        if self.token_codec is not None:
            sampling |= {"max_tokens": limit, "stop_token_ids": self.token_codec.stop_token_ids, "detokenize": False}
            sampling |= {"logprobs": 0} if has_logprobs else {}
            thinking = max_thinking_tokens > 0
            bodies = [self.make_token_bodies(self.token_codec, r, sampling, num_completions, thinking) for r in batch]
            parse = self.token_codec.parse_generation
        else:
            sampling |= {server_capabilities.max_tokens_field: limit} | (server_capabilities.stream_body or {})
            if max_thinking_tokens and NO_THINKING_BODY.items() <= server_capabilities.extra_body.items():
                sampling |= THINKING_BODY
            sampling |= server_capabilities.token_ids_body or {}
            sampling |= {"logprobs": True, "top_logprobs": 0} if has_logprobs else {}
            bodies = [self.make_chat_bodies(request, sampling, num_completions) for request in batch]
            parse = parse_generation
        return self.send_generation_requests(batch, bodies, parse)

    def make_chat_bodies(self, request: GenerationRequest, sampling: JsonObject, count: int) -> Result[list[JsonObject]]:
        """Return the bodies of the requests for `count` completions."""
        body = self.make_request_body(request) | sampling
        return [body | self.make_seed_body(request.seed + n) for n in range(count)]

    def make_token_bodies(
        self, codec: TokenCodec, request: GenerationRequest, sampling: JsonObject, count: int, thinking: bool
    ) -> Result[list[JsonObject]]:
        """Return the bodies of the requests for `count` completions, or the error of a prompt that cannot be encoded."""
        try:
            prompt = codec.encode(request, thinking=thinking)
        except PermanentRecordError as error:
            return error
        seeds = [self.make_seed_body(request.seed + n) for n in range(count)]
        stream_body = self.server_capabilities.stream_body
        return [make_token_request(self.id, prompt, sampling | seed, stream_body) for seed in seeds]

    def send_generation_requests(
        self,
        batch: Sequence[GenerationRequest],
        bodies: Sequence[Result[list[JsonObject]]],
        parse: Callable[[JsonObject, Usage], Generation],
    ) -> list[Result[list[Generation]]]:
        """Send the bodies of each request. Return the completions of each request, or its error."""
        sent = [
            (request, body)
            for request, made in zip(batch, bodies, strict=True)
            if not isinstance(made, CharterError)
            for body in made
        ]
        results = self.send_requests([ChatRequest(body, request.timeout_s, request.group) for request, body in sent], parse)
        if self.server_capabilities.echoes_prefill:
            results = [_remove_prefill(result, request.prefill) for result, (request, _) in zip(results, sent, strict=True)]
        generations = iter(self.find_cut_reasoning(results))
        return [
            made if isinstance(made, CharterError) else combine_results([next(generations) for _ in made]) for made in bodies
        ]

    def find_cut_reasoning(self, results: Sequence[Result[Generation]]) -> list[Result[Generation]]:
        """Return the results. A text that was cut while the model was thinking becomes the reasoning.

        If the chat template of the server writes the opening mark, such a text contains no mark. That the template does this is
        known from the first completion with only a closing mark.
        """
        self.template_opens_reasoning |= any(isinstance(result, Generation) and result.lacks_opening for result in results)
        return [self.check_reasoning(result) if isinstance(result, Generation) else result for result in results]

    def check_reasoning(self, generation: Generation) -> Generation:
        is_open = self.template_opens_reasoning and self.token_codec is None
        if is_open and generation.finish_reason == "length" and not generation.reasoning:
            generation = replace(generation, text="", reasoning=generation.text, ends_in_reasoning=True)
        report_reasoning(self.id, generation)
        return generation

    def score_options(self, batch: Sequence[GenerationRequest], options: Sequence[str]) -> list[Result[OptionScores]]:
        server_capabilities = self.server_capabilities
        if not self.capabilities.logprobs:
            return self.score_options_by_vote(batch, options)
        scoring = self.make_sampling_body(1.0, 1.0) | {
            server_capabilities.max_tokens_field: 1,
            "logprobs": True,
            "top_logprobs": server_capabilities.max_top_logprobs,
        }
        results = self.send_requests(
            [ChatRequest(self.make_request_body(request) | scoring, group=request.group) for request in batch],
            partial(parse_option_scores, options=options),
        )
        self.warn_about_unlisted_options(results, options)
        return results

    def score_options_by_vote(self, batch: Sequence[GenerationRequest], options: Sequence[str]) -> list[Result[OptionScores]]:
        """Return the share of each option among `num_votes` replies sampled at temperature 1."""
        max_tokens = _MAX_VOTE_TOKENS + (_MAX_THINKING_TOKENS if self.server_capabilities.thinks else 0)
        results = self.generate(batch, num_completions=self.num_votes, max_tokens=max_tokens)
        return [result if isinstance(result, CharterError) else count_votes(result, options) for result in results]

    def warn_about_unlisted_options(self, results: Sequence[Result[OptionScores]], options: Sequence[str]) -> None:
        """Warn once if the top tokens of many questions never contain an option, so that no question gets a label."""
        with self.lock:
            masses = [result.option_mass for result in results if isinstance(result, OptionScores)]
            if self.num_unlisted_scores is None or not masses:
                return
            self.num_unlisted_scores = None if any(masses) else self.num_unlisted_scores + len(masses)
            if self.num_unlisted_scores is None or self.num_unlisted_scores < _MIN_UNLISTED_SCORES:
                return
            count, self.num_unlisted_scores = self.num_unlisted_scores, None
        logger.warning(
            "%s#%s: none of the options %s was among the top tokens of %d questions, so none of them has a label (LOW_MASS):"
            " check the model, its chat template and how the server names tokens",
            self.url,
            self.id,
            ", ".join(options),
            count,
        )

    def make_sampling_body(self, temperature: float, top_p: float) -> JsonObject:
        """Return the sampling fields of a request: those that the server accepts, without values that mean no change."""
        server_capabilities = self.server_capabilities
        if temperature != 1 and not server_capabilities.any_temperature:
            raise UsageError(
                f"{self.id} on {self.url} cannot sample at temperature {temperature:g}",
                "the probe showed that the server accepts only the default temperature, which is 1",
                "set respond.temperature and critique.temperature to 1, or use another model",
            )
        body: JsonObject = {"temperature": temperature} if server_capabilities.sends_temperature else {}
        if server_capabilities.top_p_with_temperature:
            return body | {"top_p": top_p}
        if top_p == 1:
            return body
        if temperature != 1:
            raise UsageError(
                f"{self.id} on {self.url} cannot sample with temperature {temperature:g} and top_p {top_p:g}",
                "the probe showed that the server rejects requests with both",
                "set respond.temperature or respond.top_p to 1",
            )
        return {"top_p": top_p}

    def make_seed_body(self, seed: int) -> JsonObject:
        return {"seed": seed % 2**31} if self.server_capabilities.supports_seed else {}

    def make_request_body(self, request: GenerationRequest) -> JsonObject:
        """Return the body of a chat request.

        The prefill is sent as a last assistant message that the server must continue. Markers of chat formats in a message are
        broken up, because a server may encode them as control tokens.
        """
        server_capabilities = self.server_capabilities
        messages = [{"role": message.role, "content": break_up_markers(message.content)} for message in request.messages]
        body = {"model": self.id, "messages": messages} | server_capabilities.extra_body
        if not request.prefill:
            return body
        if server_capabilities.prefill_body is None:
            raise UsageError(
                f"{self.url} does not support a prefilled assistant message",
                "the probe showed that the server starts a new message instead",
                "use a prompt without a prefill when capabilities.prefill is false",
            )
        return (
            body
            | {"messages": [*messages, {"role": "assistant", "content": request.prefill}]}
            | server_capabilities.prefill_body
        )

    # Requests

    def send_requests(self, requests: Sequence[ChatRequest], parse: Callable[[JsonObject, Usage], T]) -> list[Result[T]]:
        """Send requests concurrently. Return the parsed response or the error of each request.

        If the weights of the server change in the meantime, discard all responses and raise ModelUnreachable.
        """
        if self.served_weights is None:
            return self.send_checked_requests(requests, parse)
        mark = self.served_weights.acquire()
        results: list[Any] = self.send_checked_requests(requests, parse)
        try:
            self.served_weights.require_unchanged(mark)
        except CharterError:
            self.add_unbilled(sum((result.usage for result in results if not isinstance(result, CharterError)), NO_USAGE))
            raise
        return results

    def send_checked_requests(
        self, requests: Sequence[ChatRequest], parse: Callable[[JsonObject, Usage], T]
    ) -> list[Result[T]]:
        """Send requests concurrently. Return the parsed response or the error of each request."""
        self.add_unbilled(self.paid_responses.begin({request.group for request in requests if request.group}))
        with self.health.track_requests(len(requests)):
            futures = [self.executor.submit(self.send_request, request, parse) for request in requests]
            while wait(futures, timeout=STATUS_INTERVAL_S).not_done:
                self.health.log_status()
        results = [future.result() for future in futures]
        # A permanent error ends the record, so it will not need its other responses.
        for group in {r.group for r, result in zip(requests, results, strict=True) if isinstance(result, PermanentRecordError)}:
            self.add_unbilled(self.paid_responses.forget(group))
        return results

    def send_request(self, request: ChatRequest, parse: Callable[[JsonObject, Usage], T]) -> Result[T]:
        """Send a request with retries, or use the kept response to it. Return the parsed response or the error."""
        try:
            response, usage = self.paid_responses.take(request.group, request.key) or self.post_record_request(request)
        except CharterError as error:
            self.paid_responses.mark_failed(request.group)
            return error
        self.paid_responses.add(request.group, request.key, response, usage)
        return parse(response, usage)

    def post_record_request(self, request: ChatRequest) -> tuple[JsonObject, Usage]:
        """Send a request of a record with retries. Raise the error of the record or of the server."""
        try:
            response, usage = self.post_with_retries(
                request.body, timeout_s=request.timeout_s, should_give_up=self.is_request_at_fault
            )
        except RequestGivenUp as error:
            self.health.note_alive()
            raise self.make_request_error(str(error)) from error
        except RequestRejected as error:
            raise PermanentRecordError(
                f"{self.url} rejected the request",
                str(error),
                "change the prompt, or leave it out: other records are not affected",
            ) from error
        except ServerMisconfigured as error:
            if not self.is_alive():
                raise
            if is_token_request(request.body):  # no filter of a gateway reads token ids, so all requests fail
                raise ModelUnreachable(
                    f"{self.url} does not accept token ids any more, but it answers chat requests",
                    f"{error.what}: {error.why}",
                    "start vLLM with --enable-scale-out; or start Charter again, which then uses the chat API",
                ) from error
            raise self.make_request_error(f"{error.what}: {error.why}") from error
        return response, usage + self.take_unbilled()

    def make_request_error(self, reason: str) -> RequestFailed:
        return RequestFailed(
            f"{self.url} fails for this request, but it answers others",
            reason,
            "check the log of the server; the record is tried again, and then becomes a dead letter (charter dlq list)",
        )

    def is_request_at_fault(self, attempt: FailedAttempt) -> bool:
        """Return whether the server answers others, so that a failure is a failure of this request and not of the server."""
        error = attempt.error
        if error.status_code in _OVERLOAD_STATUSES or not error.was_sent:
            return False
        if isinstance(error, RequestTimeout):
            return self.is_timeout_at_fault(error, attempt)
        if attempt.num_failures < _MAX_FAILURES:
            return False
        return self.health.answered_at > attempt.first_failed_at or self.is_alive()

    def is_timeout_at_fault(self, error: RequestTimeout, attempt: FailedAttempt) -> bool:
        """Return whether a timeout is a failure of the request.

        Requests that time out together mean that the server is too slow for this number of requests. A request is at fault if its
        repetitions also time out, and the server has answered others that were sent long after the request received its last token.
        It is also at fault if it was alone and the server answers a small request. If the server is too slow for two requests at once,
        the timeout is raised to its maximum first.
        """
        slot = attempt.slot
        if attempt.num_failures >= _MAX_FAILURES and self.health.answered_start > error.waiting_since + error.limit_s / 2:
            return True
        was_alone = slot.was_alone and self.throttle.is_idle
        is_slow_server = slot.concurrency == 1 and slot.timeout_s < self.throttle.max_timeout_s
        return was_alone and not is_slow_server and self.is_alive()

    def post_with_retries(
        self,
        request: JsonObject,
        *,
        timeout_s: float | None = None,
        should_give_up: Callable[[FailedAttempt], bool] = lambda attempt: False,
    ) -> tuple[JsonObject, Usage]:
        """Send a request until it succeeds. Return the response and its usage.

        If `should_give_up` returns true for a failed attempt, raise RequestGivenUp. If the whole response takes longer than
        `timeout_s` and the server is alive, return the streamed part of the response with the finish reason "timeout". If the server
        does not answer a second request, treat the timeout as a failed attempt.
        """
        num_failures, first_failed_at = 0, math.inf
        while True:
            self.wait_for_retry_after(min(first_failed_at, time.monotonic()) + self.retry_timeout_s)
            try:
                with self.throttle.acquire_slot() as slot:
                    if self.retry_delay_s > 0:  # the server asked for it while this request waited for its slot
                        continue
                    received = self.post_once(request, slot.timeout_s, total_timeout_s=timeout_s)
            except TransientError as error:
                num_failures, first_failed_at = num_failures + 1, min(first_failed_at, time.monotonic())
                pause_s = compute_backoff(num_failures - 1, self.backoff_range_s)
                self.health.note_failure(error.kind, str(error), max(pause_s, self.retry_delay_s), self.retry_timeout_s)
                was_alone = slot.was_alone and self.throttle.is_idle  # then the server is not overloaded by our requests
                if error.status_code in _OVERLOAD_STATUSES or (isinstance(error, RequestTimeout) and not was_alone):
                    self.throttle.note_overload(slot)
                if isinstance(error, RequestTimeout) and error.is_total and (error.partial or self.is_alive()):
                    return self.finish_timed_out(request, error)
                self.add_unbilled(error.usage)
                if isinstance(error, RequestTimeout) and not error.is_total:
                    self.throttle.note_timeout(slot)
                if should_give_up(FailedAttempt(error, num_failures, first_failed_at, slot)):
                    raise RequestGivenUp(str(error)) from error
                started_at = min(first_failed_at, self.health.failing_since or math.inf)
                if time.monotonic() + pause_s >= started_at + self.retry_timeout_s:
                    raise self.make_unreachable_error(f"{error}, after {format_count(num_failures, 'attempts')}") from error
                time.sleep(pause_s)
            else:
                self.health.note_answer(slot.started_at)
                self.throttle.note_response(received.latency_s)
                return received.response, received.usage

    def finish_timed_out(self, request: JsonObject, error: RequestTimeout) -> tuple[JsonObject, Usage]:
        """Return the part of a response that was received in its time, with the finish reason "timeout", and its usage."""
        self.health.note_alive()
        if error.partial:
            response = normalize_chat_completion(error.partial)
            response["choices"][0]["finish_reason"] = "timeout"
            return response, error.usage
        empty = {"choices": [{"message": {"content": ""}, "finish_reason": "timeout"}]}
        return empty, estimate_usage(request, empty)

    def make_unreachable_error(self, reason: str) -> ModelUnreachable:
        variable = find_proxy_variable(self.url)
        proxy = f" (requests go through the proxy of {variable}; NO_PROXY excludes a host)" if variable else ""
        return ModelUnreachable(
            f"the model server {self.url} is unreachable",
            f"{reason}{proxy}",
            "check the server and models.*; the stage continues when the server is available again",
        )

    def is_alive(self) -> bool:
        """Return whether the server responds to a minimal request now."""
        try:
            self.add_unbilled(self.post_once(self.make_greeting(), self.timeout_s).usage)
        except (TransientError, ModelUnreachable):
            return False
        except RequestRejected:
            pass  # a rejection is also a response
        self.health.note_alive()
        return True

    def make_greeting(self) -> JsonObject:
        """Return a minimal request."""
        greeting = {
            "model": self.id,
            "messages": [{"role": "user", "content": "Hello"}],
            self.server_capabilities.max_tokens_field: 1,
        }
        return greeting | self.server_capabilities.extra_body

    def check_reachable(self) -> None:
        """Send one small request without retries. Raise ModelUnreachable if the server does not answer it.

        The capabilities are not known yet. A rejection of the request is an answer, because the probe tries other forms.
        """
        request = {"model": self.id, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 1}
        try:
            self.add_unbilled(self.post_once(request, min(_CHECK_TIMEOUT_S, self.timeout_s)).usage)
        except TransientError as error:
            raise self.make_unreachable_error(str(error)) from error
        except RequestRejected:
            pass

    def post_once(self, request: JsonObject, timeout_s: float, *, total_timeout_s: float | None = None) -> ReceivedResponse:
        """Send a request once. Raise TransientError, RequestRejected or ModelUnreachable.

        The limits are those of `engine.models.response_reader.TimeLimits`.
        """
        limits = TimeLimits(timeout_s, total_timeout_s, is_streamed=bool(request.get("stream")))
        try:
            return self.fetch_response(request, limits)
        except httpx.ReadTimeout as error:
            raise limits.make_timeout("no response within {limit} (ReadTimeout)") from error
        except httpx.LocalProtocolError as error:
            raise ServerMisconfigured(
                f"the request to {self.url} cannot be sent",
                self.sanitize_error_text(str(error)),
                "check models.* and the API key",
            ) from error
        except httpx.HTTPError as error:
            was_sent = not isinstance(error, httpx.ConnectError | httpx.ConnectTimeout | httpx.PoolTimeout | httpx.ProxyError)
            detail = self.sanitize_error_text(str(error))
            raise TransientError(f"{type(error).__name__}: {detail}".rstrip(": "), was_sent=was_sent) from error

    def fetch_response(self, request: JsonObject, limits: TimeLimits) -> ReceivedResponse:
        """Send a request and read its response: as a stream if the server streams it, and otherwise whole."""
        is_token = is_token_request(request)
        url = f"{self.url.removesuffix('/v1')}{GENERATE_PATH}" if is_token else f"{self.url}/chat/completions"
        timeout = httpx.Timeout(limits.read_timeout_s, connect=min(_CONNECT_TIMEOUT_S, limits.read_timeout_s))
        with self.client.stream("POST", url, json=request, timeout=timeout) as response:
            status = response.status_code
            if status == 200 and response.headers.get("content-type", "").startswith(_STREAM_CONTENT_TYPE):
                return self.read_streamed_response(request, response, limits)
            text = read_body(response, limits)
        self.require_success(status, response.headers, text)
        try:
            completion = parse_token_completion(text) if is_token else parse_chat_completion(text)
        except TransientError as error:
            reason = f"{error}: {self.sanitize_error_text(text)}"
            raise TransientError(reason, status, error.usage) from error
        return self.make_received_response(request, completion, limits)

    def read_streamed_response(self, request: JsonObject, response: httpx.Response, limits: TimeLimits) -> ReceivedResponse:
        sampling = request.get("sampling_params", request)
        max_tokens = sampling.get("max_tokens") or sampling.get("max_completion_tokens") or 0
        stream = read_stream(
            response,
            limits,
            max_tokens=max_tokens,
            num_prompt_tokens=estimate_prompt_tokens(request),
            note_token=self.health.note_token,
        )
        usage = parse_usage(stream.response)
        if stream.error is not None:
            self.add_unbilled(usage or stream.estimate_received_usage(estimate_prompt_tokens(request)))
            code = stream.error.get("code") if isinstance(stream.error, dict) else None
            status = code if isinstance(code, int) and 400 <= code < 600 else HTTPStatus.INTERNAL_SERVER_ERROR
            self.require_success(status, response.headers, json.dumps({"error": stream.error}).encode())
        return self.make_received_response(request, normalize_chat_completion(stream.assemble()), limits)

    def make_received_response(self, request: JsonObject, completion: JsonObject, limits: TimeLimits) -> ReceivedResponse:
        """Return a response with its usage. Raise TransientError if a completion of token ids is not complete."""
        if is_token_request(request):
            require_complete(request, completion, self.token_codec.num_tokens if self.token_codec else None)
        return ReceivedResponse(completion, parse_usage(completion) or estimate_usage(request, completion), limits.latency_s)

    def require_success(self, status: int, headers: httpx.Headers, text: bytes) -> None:
        """Raise the error that a status means: TransientError, RequestRejected or ModelUnreachable."""
        if status in _REQUEST_ERROR_STATUSES:
            raise RequestRejected(self.sanitize_error_text(text))
        if 300 <= status < 400:
            raise self.make_redirect_error(status, headers.get("location", ""))
        if 400 <= status < 500 and status not in _TRANSIENT_CLIENT_ERROR_STATUSES:
            raise ServerMisconfigured(
                f"{self.url} does not serve {self.id} (status {status})",
                self.sanitize_error_text(text),
                "check models.* and the environment variable of models.api_key_env",
            )
        if status != HTTPStatus.OK:
            self.throttle.delay(parse_retry_after(headers.get("retry-after", "")))
            raise TransientError(
                f"status {status}: {self.sanitize_error_text(text) or _get_phrase(status)}".rstrip(": "), status
            )

    def make_redirect_error(self, status: int, location: str, path: str = "chat/completions") -> ModelUnreachable:
        """Return the error for a redirect of a path. It names the new address, without a user, a password or a query."""
        target = urljoin(f"{self.url}/{path}", location).partition("?")[0]
        scheme, separator, rest = target.partition("://")
        new_url = self.sanitize_error_text(f"{scheme}{separator}{rest.rpartition('@')[2]}").removesuffix(f"/{path}")
        where = f"it redirects to {new_url}" if location else "the response has no Location header"
        return ServerMisconfigured(
            f"{self.url} redirects requests (status {status})",
            f"{where}; Charter does not follow redirects, because the new server would receive the API key",
            f"if this address is right, set models.* to {new_url}#{self.id}" if location else "check models.* and the server",
        )

    # Other models of the same server

    def with_model(self, model: str) -> Endpoint:
        """Return an endpoint for another model of the same server. The two endpoints share their connections."""
        capabilities, other = self.server_capabilities, copy.copy(self)
        other.cached_server_capabilities, other.unbilled_usage = capabilities, NO_USAGE
        other.id, other.revision = model, compute_served_revision(self.url, model)
        other.health = ServerHealth(f"{self.url}#{model}")
        return other

    def with_weights(self, weights: ServedWeights | None, name: str | None = None) -> Endpoint:
        """Return an endpoint for the same model with other weights, whose revision contains `name`. None keeps the revision."""
        other = copy.copy(self)
        other.served_weights, other.unbilled_usage = weights, NO_USAGE
        other.paid_responses = PaidResponses()  # the same request has another response
        if name is not None:
            other.revision = compute_served_revision(self.url, name)
        return other

    def require_served(self) -> None:
        """Raise ModelUnreachable if the server does not generate a token for this model."""
        try:
            response, usage, _ = self.post_once(self.make_greeting(), self.timeout_s)
        except (TransientError, RequestRejected) as error:
            raise self.make_unreachable_error(str(error)) from error
        self.add_unbilled(usage)
        if response.get("model", self.id) != self.id:
            raise self.make_unreachable_error(f"the response to a request for {self.id} is from {str(response['model'])[:100]}")

    @property
    def retry_delay_s(self) -> float:
        """The time that the last Retry-After header still asks for, in seconds."""
        return max(0.0, self.throttle.retry_at - time.monotonic())

    def wait_for_retry_after(self, deadline: float) -> None:
        """Wait until the time of the last Retry-After header. Raise ModelUnreachable if this time is after the deadline."""
        while (remaining_s := self.retry_delay_s) > 0:
            if time.monotonic() + remaining_s >= deadline:
                raise self.make_unreachable_error(
                    f"the server accepts no requests for another {remaining_s:.0f} s (Retry-After)"
                )
            time.sleep(remaining_s)

    def add_unbilled(self, usage: Usage) -> None:
        with self.lock:
            self.unbilled_usage += usage

    def take_unbilled(self) -> Usage:
        """Return the usage of failed attempts, and set the stored usage to zero."""
        with self.lock:
            usage, self.unbilled_usage = self.unbilled_usage, NO_USAGE
            return usage

    def sanitize_error_text(self, text: bytes | str) -> str:
        """Return the start of the server's error message on one line. If the message contains the API key, mask the key."""
        message = text[:100_000].decode("utf-8", "replace") if isinstance(text, bytes) else text
        message = " ".join((message.replace(self.api_key, "***") if self.api_key else message).split())
        return message[:_MAX_ERROR_CHARS]
