"""Probe the capabilities of a server once, with a few short requests.

The name and version of a server are unreliable, because a proxy can forward to several servers. So each capability is tested:

1. A plain request must work, with `max_tokens` or `max_completion_tokens`, and with or without a seed.
2. Requests with additional fields turn off thinking (`chat_template_kwargs`) and hidden sampling defaults (`top_k` and others).
3. A prefilled assistant message ends in the middle of a word. Only a server that continues the message completes the word. The
   first request has two fields of vLLM. The second request has no extra fields, because llama.cpp and several hosted models do
   not need them.
4. Log-probabilities are requested, to find the number of top tokens and whether the values depend on the temperature.
5. The token ids of the completion are requested with `return_token_ids`, and then with `return_tokens_as_token_ids`.
6. Two completions are sampled, because some servers decode greedily at every temperature.

A capability is missing if the server rejects the request with 4xx, or if it returns status 500 three times. After any other
failure the server counts as unreachable, and ModelUnreachable is raised.
"""

from __future__ import annotations

import logging
from typing import Any

from engine.errors import ModelUnreachable
from engine.models.chat_api import (
    ChatServer,
    JsonObject,
    RequestRejected,
    ServerCapabilities,
    TransientError,
    parse_generation,
    parse_top_logprobs,
    parse_usage,
)
from engine.models.interface import NO_USAGE

logger = logging.getLogger("charter.endpoint")

_COUNTING_MESSAGE = {
    "role": "user",
    "content": "Write the numbers from one to twelve in words, in lower case, separated by commas.",
}
_PREFILL_MESSAGE = {"role": "assistant", "content": "one, two, three, four, five, six, seven, eight, nine, ten, elev"}
_EXPECTED_CONTINUATION = "en"
_SAMPLING_MESSAGE = {
    "role": "user",
    "content": "Invent a name for a new ship, and tell me where it sails to. Be as original as you can.",
}
_SAMPLING_MAX_TOKENS = 12  # long enough that two samples are almost never identical
_PROBE_MAX_TOKENS = 4
_TOP_LOGPROBS_COUNTS = (20, 5)
_MAX_TOKENS_FIELDS = ("max_tokens", "max_completion_tokens")
_LOGPROB_TOLERANCE = 1e-3  # smaller differences between log-probabilities are treated as rounding errors
NO_THINKING_BODY: JsonObject = {"chat_template_kwargs": {"enable_thinking": False}}
UNMODIFIED_SAMPLING_BODY: JsonObject = {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}
PREFILL_BODIES: tuple[JsonObject, ...] = ({"continue_final_message": True, "add_generation_prompt": False}, {})
TOKEN_IDS_BODIES: tuple[JsonObject, ...] = ({"return_token_ids": True}, {"return_tokens_as_token_ids": True})
_MAX_SERVER_ERRORS = 3


class _ServerProbe:
    """The probe of one server. `base_request` is a request that the server accepts. All other requests add fields to it."""

    def __init__(self, server: ChatServer) -> None:
        self.server = server
        self.max_tokens_field, self.supports_seed, self.reports_usage = "max_tokens", True, True
        self.base_request: JsonObject = {"model": server.id, "messages": [_COUNTING_MESSAGE], "temperature": 0.0}
        self.find_base_request()

    def find_base_request(self) -> None:
        """Find the fields of a plain request that the server accepts. If it rejects all variants, raise ModelUnreachable."""
        first_error = ""
        for seed in ({"seed": 1}, {}):
            for limit in _MAX_TOKENS_FIELDS:
                request = self.base_request | seed | {limit: _PROBE_MAX_TOKENS}
                try:
                    response = self.send_request(request)
                except RequestRejected as error:
                    first_error = first_error or str(error)
                    continue
                self.max_tokens_field, self.supports_seed, self.reports_usage, self.base_request = (
                    limit,
                    bool(seed),
                    parse_usage(response) is not None,
                    request,
                )
                return
        raise ModelUnreachable(
            f"{self.server.url} rejected a plain request for {self.server.id}",
            first_error,
            "check models.* and the server",
        )

    def send_request(self, request: JsonObject) -> JsonObject:
        response, usage = self.server.post_with_retries(
            request, should_give_up=lambda error, attempts: _is_server_error(error) and attempts >= _MAX_SERVER_ERRORS
        )
        self.server.add_unbilled(usage)
        return response

    def try_fields(self, fields: JsonObject) -> JsonObject | None:
        """Send the base request with additional fields and return the response, or None if the server rejects the request."""
        try:
            return self.send_request(self.base_request | fields)
        except RequestRejected:
            return None

    def adopt_fields_if_accepted(self, fields: JsonObject) -> bool:
        """Add fields to the base request if the server accepts them. Return whether they were added."""
        if self.try_fields(fields) is None:
            return False
        self.base_request = self.base_request | fields
        return True

    def is_thinking(self) -> bool:
        """Return whether a completion contains reasoning with the current base request."""
        message = (self.try_fields({}) or {"choices": [{"message": {"content": ""}}]})["choices"][0]["message"]
        reasoning = message.get("reasoning_content") or message.get("reasoning")
        return bool(reasoning) or message["content"].lstrip().startswith("<think>")

    def is_sampling(self) -> bool:
        """Return whether two seeds give two different completions at temperature 1."""
        fields = {"messages": [_SAMPLING_MESSAGE], "temperature": 1.0, self.max_tokens_field: _SAMPLING_MAX_TOKENS}
        responses = [self.try_fields(fields | ({"seed": seed} if self.supports_seed else {})) for seed in (1, 2)]
        completions = [response["choices"][0]["message"]["content"] for response in responses if response]
        return len(set(completions)) == len(responses)

    def find_prefill_body(self) -> JsonObject | None:
        """Return the request fields that let the server continue a prefilled message, or None if it does not support
        this."""
        for fields in PREFILL_BODIES:
            response = self.try_fields(fields | {"messages": [_COUNTING_MESSAGE, _PREFILL_MESSAGE]})
            if response and response["choices"][0]["message"]["content"].startswith(_EXPECTED_CONTINUATION):
                return fields
        return None

    def fetch_top_logprobs(self, count: int, temperature: float = 1.0) -> dict[str, float]:
        """Return the log-probabilities of the top tokens at the first position. Return an empty dict if the server has none."""
        fields = {"temperature": temperature, self.max_tokens_field: 1, "logprobs": True, "top_logprobs": count}
        response = self.try_fields(fields)
        return dict(parse_top_logprobs(response)) if response else {}

    def count_top_logprobs(self) -> int:
        """Return the number of top log-probabilities that the server provides."""
        for count in _TOP_LOGPROBS_COUNTS:
            if top_logprobs := self.fetch_top_logprobs(count):
                return min(count, len(top_logprobs))
        return 0

    def has_processed_logprobs(self, max_top_logprobs: int) -> bool:
        """Return whether the log-probabilities change when the temperature is halved."""
        full, half = self.fetch_top_logprobs(max_top_logprobs), self.fetch_top_logprobs(max_top_logprobs, temperature=0.5)
        common = full.keys() & half.keys()
        return bool(common) and max(abs(full[token] - half[token]) for token in common) > _LOGPROB_TOLERANCE

    def find_token_ids_body(self, max_top_logprobs: int) -> JsonObject | None:
        """Return the request fields that let the server report token ids, or None if it does not support this."""
        for fields in TOKEN_IDS_BODIES:
            logprob_fields: dict[str, Any] = {"logprobs": True, "top_logprobs": 0} if max_top_logprobs else {}
            response = self.try_fields(fields | logprob_fields)
            if response and parse_generation(response, NO_USAGE).token_ids:
                return fields
        return None


def _is_server_error(error: TransientError) -> bool:
    """Return whether the status is 500. Several responses with status 500 mean that the server does not support a request."""
    return error.status_code == 500


def probe_server(server: ChatServer) -> ServerCapabilities:
    """Return the capabilities of a server. Raise ModelUnreachable if it is unreachable."""
    probe = _ServerProbe(server)
    thinking_off = probe.adopt_fields_if_accepted(NO_THINKING_BODY)
    unmodified = probe.adopt_fields_if_accepted(UNMODIFIED_SAMPLING_BODY)
    max_top_logprobs = probe.count_top_logprobs()
    capabilities = ServerCapabilities(
        max_tokens_field=probe.max_tokens_field,
        extra_body=(NO_THINKING_BODY if thinking_off else {}) | (UNMODIFIED_SAMPLING_BODY if unmodified else {}),
        prefill_body=probe.find_prefill_body(),
        max_top_logprobs=max_top_logprobs,
        processed_logprobs=max_top_logprobs > 0 and probe.has_processed_logprobs(max_top_logprobs),
        token_ids_body=probe.find_token_ids_body(max_top_logprobs),
        unmodified_sampling=unmodified,
        supports_seed=probe.supports_seed,
        reports_usage=probe.reports_usage,
    )
    _log_missing_capabilities(server, capabilities)
    if not probe.is_sampling():
        logger.warning(
            "%s ignores the seed and does not sample, so all completions and votes of a prompt are identical", server.url
        )
    if probe.is_thinking():
        logger.warning(
            "%s cannot turn thinking off: the reasoning is removed from its completions, and option mass is low", server.url
        )
    return capabilities


def _log_missing_capabilities(server: ChatServer, capabilities: ServerCapabilities) -> None:
    """Log the missing capabilities of a server, and what Charter uses instead."""
    if capabilities.prefill_body is None:
        logger.warning("%s does not support a prefilled assistant message: prompts ask for the option instead", server.url)
    if not capabilities.max_top_logprobs:
        logger.warning("%s provides no log-probabilities: options are scored by votes, which cost more", server.url)
    if not capabilities.reports_usage:
        logger.warning("%s reports no usage: tokens are estimated as one per four characters", server.url)
