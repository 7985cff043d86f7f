"""Use models on an OpenAI-compatible server (vLLM, SGLang, llama.cpp, transformers serve, hosted APIs).

A server is probed once, at its first use (`engine.models.probe`). If a capability is missing, the stages use other prompt
templates, which have another template hash.

Requests run concurrently up to a limit. Each request has a timeout. After status 429 or 5xx, a broken connection, or a response
that is not JSON, the request is retried with exponential backoff and full jitter. A `Retry-After` header delays the retry. If
the deadline of the call passes, ModelUnreachable is raised, and the stage pauses without losing records. If the server rejects
a request as invalid, PermanentRecordError is raised, and the record becomes a dead letter.

Options are scored with the `top_logprobs` of the first token. If the server has no log-probabilities, the shares of sampled
replies are used.

Tokens are counted as the server bills them. The usage of a failed attempt is added to the next successful response.

The API key is read from an environment variable, which can differ between servers. No message contains the API key.
"""

from __future__ import annotations

import copy
import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TypeVar

import httpx

from engine.backoff import BACKOFF_RANGE_S, compute_backoff
from engine.errors import CharterError, DependencyUnreachable, ModelUnreachable, PermanentRecordError, UsageError
from engine.models.chat_api import (
    JsonObject,
    RequestRejected,
    RequestTimeout,
    ServerCapabilities,
    TransientError,
    count_votes,
    estimate_usage,
    parse_chat_completion,
    parse_generation,
    parse_option_scores,
    parse_retry_after,
    parse_usage,
)
from engine.models.control_tokens import break_up_markers
from engine.models.interface import NO_USAGE, Generation, GenerationRequest, ModelCapabilities, OptionScores, Usage
from engine.models.probe import probe_server
from schemas.ids import compute_fingerprint

logger = logging.getLogger("charter.endpoint")

_RETRY_TIMEOUT_S = 600.0
_MAX_RESPONSE_BYTES = 16 * 1024 * 1024
_REQUEST_ERROR_STATUSES = (400, 413, 422)
_CONFIG_ERROR_STATUSES = (401, 402, 403, 404)
_NUM_VOTES = 8
_MAX_VOTE_TOKENS = 8

T = TypeVar("T")


@dataclass(frozen=True)
class ChatRequest:
    """A request body, and the timeout of the response in seconds.

    If `timeout_s` is None, the timeout of the endpoint is used, and the request is retried after a timeout.
    """

    body: JsonObject
    timeout_s: float | None = None


def compute_served_revision(url: str, model: str) -> str:
    """Return the revision of a served model: a hash of its address and name, because its weights are unknown."""
    return compute_fingerprint("served_model", url=url, model=model)[:16]


def open_endpoint(
    spec: str, *, api_key_env: str = "OPENAI_API_KEY", timeout_s: float = 120.0, concurrency: int = 16
) -> Endpoint:
    """Open the model `http://HOST:PORT/v1#MODEL`. Raise UsageError if the address has a different form."""
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
    key = os.environ.get(variable, "") if variable else ""
    return Endpoint(address.rstrip("/"), model, key, timeout_s=timeout_s, concurrency=concurrency)


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


@dataclass
class Endpoint:
    """One model of one server.

    `timeout_s` limits one attempt of a request, and `retry_timeout_s` limits all attempts together. If the server has no
    log-probabilities, `num_votes` replies are sampled to score options.
    """

    url: str
    id: str
    api_key: str = field(default="", repr=False)
    timeout_s: float = 120.0
    concurrency: int = 16
    retry_timeout_s: float = _RETRY_TIMEOUT_S
    backoff_range_s: tuple[float, float] = BACKOFF_RANGE_S
    num_votes: int = _NUM_VOTES
    cached_server_capabilities: ServerCapabilities | None = None

    def __post_init__(self) -> None:
        headers = {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}
        limits = httpx.Limits(max_connections=self.concurrency, max_keepalive_connections=self.concurrency)
        self.client = httpx.Client(headers=headers, timeout=self.timeout_s, limits=limits)
        self.executor = ThreadPoolExecutor(self.concurrency, thread_name_prefix="endpoint")
        self.revision = compute_served_revision(self.url, self.id)
        self.lock = threading.Lock()
        self.probe_lock = threading.Lock()
        self.unbilled_usage = NO_USAGE  # usage of failed attempts that is not yet added to a response
        self.retry_at = 0.0  # on the monotonic clock; no request is sent before this time (Retry-After)

    # The Model interface

    @property
    def server_capabilities(self) -> ServerCapabilities:
        """The capabilities of the server. The server is probed at the first use of this property."""
        with self.probe_lock:
            if self.cached_server_capabilities is None:
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
        server_capabilities = self.server_capabilities
        sampling = {"temperature": temperature, "top_p": top_p, server_capabilities.max_tokens_field: max_tokens}
        exact = top_p == 1 and temperature > 0 and (temperature == 1 or server_capabilities.processed_logprobs)
        if server_capabilities.token_ids_body is not None:
            sampling |= server_capabilities.token_ids_body
            sampling |= {"logprobs": True, "top_logprobs": 0} if exact and self.capabilities.exact_logprobs else {}
        # One request for each completion, because some servers do not support n > 1, and each completion has a different seed.
        requests = [
            ChatRequest(self.make_request_body(request) | sampling | self.make_seed_body(request.seed + n), request.timeout_s)
            for request in batch
            for n in range(num_completions)
        ]
        generations = self.send_requests(requests, parse_generation)
        return [generations[i : i + num_completions] for i in range(0, len(generations), num_completions)]

    def score_options(self, batch: Sequence[GenerationRequest], options: Sequence[str]) -> list[OptionScores]:
        server_capabilities = self.server_capabilities
        if not server_capabilities.max_top_logprobs:
            return self.score_options_by_vote(batch, options)
        scoring = {
            "temperature": 1.0,
            "top_p": 1.0,
            server_capabilities.max_tokens_field: 1,
            "logprobs": True,
            "top_logprobs": server_capabilities.max_top_logprobs,
        }
        return self.send_requests(
            [ChatRequest(self.make_request_body(request) | scoring) for request in batch],
            partial(parse_option_scores, options=options),
        )

    def score_options_by_vote(self, batch: Sequence[GenerationRequest], options: Sequence[str]) -> list[OptionScores]:
        """Return the share of each option among `num_votes` replies sampled at temperature 1."""
        replies_by_request = self.generate(batch, num_completions=self.num_votes, max_tokens=_MAX_VOTE_TOKENS)
        return [count_votes(replies, options) for replies in replies_by_request]

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

    def send_requests(self, requests: Sequence[ChatRequest], parse: Callable[[JsonObject, Usage], T]) -> list[T]:
        """Send requests concurrently and return their parsed responses.

        If a request fails, wait for all requests, add the usage of the successful requests to `unbilled_usage`, and raise.
        """
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
        """Send a request with retries. Return the parsed response and its usage."""
        try:
            response, usage = self.post_with_retries(request.body, timeout_s=request.timeout_s)
        except RequestRejected as error:
            raise PermanentRecordError(f"{self.url} rejected the request", str(error), "") from error
        usage += self.take_unbilled()
        return parse(response, usage), usage

    def post_with_retries(
        self,
        request: JsonObject,
        *,
        timeout_s: float | None = None,
        should_give_up: Callable[[TransientError, int], bool] = lambda error, attempts: False,
    ) -> tuple[JsonObject, Usage]:
        """Send a request until it succeeds. Return the response and its usage.

        If `should_give_up(error, attempts)` returns true, raise RequestRejected. If a response takes longer than `timeout_s`,
        send a second request. If the server responds to this second request, return an empty response with the finish reason
        "timeout". If the server does not respond, treat the timeout as a failed attempt.
        """
        deadline, attempts = time.monotonic() + self.retry_timeout_s, 0
        while True:
            self.wait_for_retry_after(deadline)
            try:
                return self.post_once(request, timeout_s or self.timeout_s)
            except TransientError as error:
                if isinstance(error, RequestTimeout) and timeout_s and self.is_alive():
                    timed_out = {"choices": [{"message": {"content": ""}, "finish_reason": "timeout"}]}
                    return timed_out, estimate_usage(request, timed_out)
                self.add_unbilled(error.usage)
                pause_s = compute_backoff(attempts, self.backoff_range_s)
                attempts += 1
                if should_give_up(error, attempts):
                    raise RequestRejected(str(error)) from error
                if time.monotonic() + pause_s >= deadline:
                    raise self.make_unreachable_error(f"{error}, after {attempts} attempts") from error
                time.sleep(pause_s)

    def make_unreachable_error(self, reason: str) -> CharterError:
        return ModelUnreachable(
            f"the model server {self.url} is unreachable",
            reason,
            "check the server and models.*; the stage continues when the server is available again",
        )

    def is_alive(self) -> bool:
        """Return whether the server responds to a minimal request now."""
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
            pass  # a rejection is also a response
        return True

    def post_once(self, request: JsonObject, timeout_s: float) -> tuple[JsonObject, Usage]:
        """Send a request once. Raise TransientError, RequestRejected or ModelUnreachable."""
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
                f"{self.url} does not serve {self.id} (status {status})",
                self.sanitize_error_text(text),
                "check models.* and the environment variable of models.api_key_env",
            )
        if status != 200:
            self.apply_retry_after(headers.get("retry-after", ""))
            raise TransientError(f"status {status}", status)
        response = parse_chat_completion(text)
        return response, parse_usage(response) or estimate_usage(request, response)

    # Other models of the same server

    def with_model(self, model: str) -> Endpoint:
        """Return an endpoint for another model of the same server. The two endpoints share their connections."""
        capabilities, other = self.server_capabilities, copy.copy(self)
        other.cached_server_capabilities = capabilities
        other.id, other.revision = model, compute_served_revision(self.url, model)
        return other

    def load_adapter(self, name: str, folder: Path) -> None:
        """Load an adapter into vLLM under a name. If an adapter with this name is already loaded, do not raise an error."""
        try:
            response = self.client.post(f"{self.url}/load_lora_adapter", json={"lora_name": name, "lora_path": str(folder)})
        except httpx.HTTPError as error:
            raise self.make_unreachable_error(type(error).__name__) from error
        if response.status_code != 200 and "already" not in response.text:
            raise ModelUnreachable(
                f"{self.url} does not load {name} (status {response.status_code})",
                self.sanitize_error_text(response.content),
                "start vLLM with --enable-lora, VLLM_ALLOW_RUNTIME_LORA_UPDATING=True and a sufficient --max-lora-rank",
            )

    def require_served(self) -> None:
        """Raise ModelUnreachable if the server does not generate a token for this model."""
        greeting = {
            "model": self.id,
            "messages": [{"role": "user", "content": "Hello"}],
            self.server_capabilities.max_tokens_field: 1,
        }
        try:
            response, usage = self.post_once(greeting | self.server_capabilities.extra_body, self.timeout_s)
        except (TransientError, RequestRejected) as error:
            raise self.make_unreachable_error(str(error)) from error
        self.add_unbilled(usage)
        if response.get("model", self.id) != self.id:
            raise self.make_unreachable_error(f"the response to a request for {self.id} is from {str(response['model'])[:100]}")

    def fetch_response(self, request: JsonObject, timeout_s: float) -> tuple[int, httpx.Headers, bytes]:
        """Return status, headers and body. Abort the response if it is too large or not complete within the timeout."""
        deadline = time.monotonic() + timeout_s
        parts, size, url = [], 0, f"{self.url}/chat/completions"
        with self.client.stream("POST", url, json=request, timeout=httpx.Timeout(self.timeout_s, read=timeout_s)) as response:
            for part in response.iter_bytes():
                parts.append(part)
                size += len(part)
                if size > _MAX_RESPONSE_BYTES:
                    raise TransientError(f"the response has more than {_MAX_RESPONSE_BYTES} bytes")
                if time.monotonic() > deadline:
                    raise RequestTimeout(f"the response is not complete after {timeout_s:g} s")
            return response.status_code, response.headers, b"".join(parts)

    def apply_retry_after(self, retry_after: str) -> None:
        """Delay all requests until the time that a Retry-After header specifies."""
        with self.lock:
            self.retry_at = max(self.retry_at, time.monotonic() + parse_retry_after(retry_after))

    def wait_for_retry_after(self, deadline: float) -> None:
        """Wait until the time of the last Retry-After header. Raise ModelUnreachable if this time is after the deadline."""
        while (remaining_s := self.retry_at - time.monotonic()) > 0:
            if self.retry_at >= deadline:
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

    def sanitize_error_text(self, text: bytes) -> str:
        """Return the start of the server's error message. If the message contains the API key, mask the key."""
        message = text[:100_000].decode("utf-8", "replace")
        return (message.replace(self.api_key, "***") if self.api_key else message)[:300]
