"""Probe the capabilities of a server once, with a few short requests.

The name and version of a server are unreliable, because a proxy can forward to several servers. So each capability is tested:

1. A plain request must work: with `max_tokens` or `max_completion_tokens`, with or without a seed, at temperature 0, or at
   temperature 1, or without a temperature, and with 4 tokens, or with more tokens for a model that thinks first.
2. Requests with additional fields turn off thinking (`chat_template_kwargs`) and hidden sampling defaults (`top_k` and others,
   and `top_p`, which some servers reject together with `temperature`).
3. A prefilled assistant message ends in the middle of a word. Only a server that continues the message completes the word. The
   first request has two fields of vLLM. The second request has no extra fields, because llama.cpp and several hosted models do
   not need them. llama.cpp repeats the prefilled message at the start of the response.
4. Log-probabilities are requested, to find the number of top tokens and whether the values depend on the temperature.
5. The token ids of the completion are requested with `return_token_ids`, and then with `return_tokens_as_token_ids`.
6. A completion is streamed. A server streams only if the stream has everything that an unstreamed response has: the text, the
   finish reason, the usage, the token ids and a log-probability for each of them.
7. Two completions are sampled, because some servers decode greedily at every temperature. One of them is repeated with the same
   seed.
8. If a server reports the token ids of a prompt, it is asked to complete these ids (`engine.models.token_api`).
9. A longer completion shows whether the model thinks before it replies.

A capability is missing if the server rejects the request with 4xx, or if it returns status 500 three times. After any other
failure the server counts as unreachable, and ModelUnreachable is raised.
"""

from __future__ import annotations

import logging
import re
from itertools import product
from typing import Any

from engine.errors import ModelUnreachable
from engine.models.chat_api import (
    ChatServer,
    FailedAttempt,
    JsonObject,
    RequestRejected,
    ServerCapabilities,
    ServerMisconfigured,
    parse_generation,
    parse_top_logprobs,
    parse_usage,
)
from engine.models.chat_stream import STREAM_BODIES, STREAMED_OBJECT
from engine.models.interface import NO_USAGE
from engine.models.token_api import make_token_request

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
_THINKING_MAX_TOKENS = 1024  # enough for a model that thinks before it replies to a short question
_THINKING_PROBE_MAX_TOKENS = 128  # enough to see that a model thinks
_BASE_MAX_TOKENS = (_PROBE_MAX_TOKENS, _THINKING_MAX_TOKENS)
_TEMPERATURE_BODIES: tuple[JsonObject, ...] = ({"temperature": 0.0}, {"temperature": 1.0}, {})
_TOKEN_ID_PATTERN = re.compile(r"token_id:\d+")
_TOP_LOGPROBS_COUNTS = (20, 5)
_MAX_TOKENS_FIELDS = ("max_tokens", "max_completion_tokens")
_LOGPROB_TOLERANCE = 1e-3  # smaller differences between log-probabilities are treated as rounding errors
NO_THINKING_BODY: JsonObject = {"chat_template_kwargs": {"enable_thinking": False}}
# Chat templates use one of these names. They ignore the other one.
THINKING_BODY: JsonObject = {"chat_template_kwargs": {"enable_thinking": True, "thinking": True}}
UNMODIFIED_SAMPLING_BODY: JsonObject = {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}
PREFILL_BODIES: tuple[JsonObject, ...] = ({"continue_final_message": True, "add_generation_prompt": False}, {})
TOKEN_IDS_BODIES: tuple[JsonObject, ...] = ({"return_token_ids": True}, {"return_tokens_as_token_ids": True})
_MAX_SERVER_ERRORS = 3
_MAX_SAME_SEED = 3
_OTHER_API_STATUSES = (200, 500, 501, 502)  # 200: a response that is no completion


class _ServerProbe:
    """The probe of one server. `base_request` is a request that the server accepts. All other requests add fields to it."""

    def __init__(self, server: ChatServer) -> None:
        self.server = server
        self.max_tokens_field, self.max_tokens = "max_tokens", _PROBE_MAX_TOKENS
        self.supports_seed = self.reports_usage = self.sends_temperature = self.any_temperature = True
        self.base_request: JsonObject = {"model": server.id, "messages": [_COUNTING_MESSAGE]}
        self.find_base_request()

    def find_base_request(self) -> None:
        """Find the fields of a plain request that the server accepts. If it rejects all variants, raise ModelUnreachable."""
        first_error = ""
        seeds: tuple[JsonObject, ...] = ({"seed": 1}, {}) if self.server.send_seed else ({},)
        for max_tokens, temperature, seed, limit in product(_BASE_MAX_TOKENS, _TEMPERATURE_BODIES, seeds, _MAX_TOKENS_FIELDS):
            request = self.base_request | temperature | seed | {limit: max_tokens}
            try:
                response = self.send_request(request)
            except RequestRejected as error:
                first_error = first_error or str(error)
                continue
            self.max_tokens_field, self.max_tokens, self.supports_seed = limit, max_tokens, bool(seed)
            self.sends_temperature, self.any_temperature = bool(temperature), temperature == _TEMPERATURE_BODIES[0]
            self.reports_usage, self.base_request = parse_usage(response) is not None, request
            return
        raise ModelUnreachable(
            f"{self.server.url} rejected a plain request for {self.server.id}",
            first_error,
            "check models.* and the server",
        )

    def send_request(self, request: JsonObject) -> JsonObject:
        response, usage = self.server.post_with_retries(
            request, should_give_up=lambda attempt: _is_server_error(attempt) and attempt.num_failures >= _MAX_SERVER_ERRORS
        )
        self.server.add_unbilled(usage)
        return response

    def try_fields(self, fields: JsonObject) -> JsonObject | None:
        """Send the base request with additional fields and return the response, or None if the server rejects the request.

        A request never contains a temperature that the server does not accept.
        """
        if not self.any_temperature:
            fields = {name: value for name, value in fields.items() if name != "temperature"}
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

    def is_thinking(self, stream_body: JsonObject | None) -> bool:
        """Return whether a completion contains reasoning with the current base request. It is streamed if the server can.

        A completion without text that ends at the token limit also shows reasoning, which the server hides.
        """
        max_tokens = max(self.max_tokens, _THINKING_PROBE_MAX_TOKENS)
        response = self.try_fields({self.max_tokens_field: max_tokens} | (stream_body or {}))
        if response is None:
            return False
        generation = parse_generation(response, NO_USAGE)
        is_hidden = not generation.text.strip() and generation.finish_reason == "length"
        return is_hidden or bool(generation.reasoning)

    def sample_text(self, seed: int) -> str | None:
        """Return a completion at temperature 1, or None if the server rejects the request."""
        max_tokens = max(self.max_tokens, _SAMPLING_MAX_TOKENS)
        fields = {"messages": [_SAMPLING_MESSAGE], "temperature": 1.0, self.max_tokens_field: max_tokens}
        response = self.try_fields(fields | ({"seed": seed} if self.supports_seed else {}))
        return str(response["choices"][0]["message"]["content"]) if response else None

    def find_sampling(self) -> tuple[bool, bool]:
        """Return whether two seeds give different completions at temperature 1, and whether the same seed does.

        The same seed is tried up to three times, because servers that batch requests have rounding differences.
        """
        texts = [self.sample_text(1), self.sample_text(2)]
        is_sampling = None not in texts and texts[0] != texts[1]
        if not is_sampling or not self.supports_seed:
            return is_sampling, False
        repeated = [texts[0]]
        while len(repeated) < _MAX_SAME_SEED:
            text = self.sample_text(1)
            if text in repeated:
                return True, False
            repeated.append(text)
        return True, True

    def find_prefill_body(self) -> tuple[JsonObject | None, bool]:
        """Return the request fields that let the server continue a prefilled message, or None if it does not support this.

        Also return whether the response begins with the prefilled message.
        """
        for fields in PREFILL_BODIES:
            response = self.try_fields(fields | {"messages": [_COUNTING_MESSAGE, _PREFILL_MESSAGE]})
            content = response["choices"][0]["message"]["content"] if response else ""
            if content.startswith(_EXPECTED_CONTINUATION):
                return fields, False
            if content.startswith(_PREFILL_MESSAGE["content"] + _EXPECTED_CONTINUATION):
                return fields, True
        return None, False

    def fetch_top_logprobs(self, count: int, temperature: float = 1.0) -> dict[str, float]:
        """Return the log-probabilities of the top tokens at the first position. Return an empty dict if the server has none."""
        if temperature != 1 and not self.any_temperature:
            return {}
        fields = {"temperature": temperature, self.max_tokens_field: 1, "logprobs": True, "top_logprobs": count}
        response = self.try_fields(fields)
        return dict(parse_top_logprobs(response)) if response else {}

    def find_top_logprobs(self) -> tuple[int, bool]:
        """Return the number of top log-probabilities that the server provides, and whether they name tokens by their texts."""
        for count in _TOP_LOGPROBS_COUNTS:
            if top_logprobs := self.fetch_top_logprobs(count):
                names_tokens = not all(_TOKEN_ID_PATTERN.fullmatch(token) for token in top_logprobs)
                return min(count, len(top_logprobs)), names_tokens
        return 0, True

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

    def find_stream_body(self, token_ids_body: JsonObject | None, max_top_logprobs: int) -> JsonObject | None:
        """Return the request fields that let the server stream a completion, or None if a stream lacks a part of the response."""
        fields = token_ids_body or {}
        if token_ids_body is not None and max_top_logprobs:
            fields = fields | {"logprobs": True, "top_logprobs": 0}
        whole = self.try_fields(fields)
        if whole is None:
            return None
        expected = _describe_parts(whole)
        for stream_body in STREAM_BODIES:
            streamed = self.try_fields(fields | stream_body)
            if streamed and streamed.get("object") == STREAMED_OBJECT and _describe_parts(streamed) == expected:
                return stream_body
        return None

    def accepts_token_ids(self, token_ids_body: JsonObject | None, stream_body: JsonObject | None) -> bool:
        """Return whether the server completes the token ids of a prompt, with the token ids and log-probabilities of the completion."""
        whole = None if token_ids_body is None else self.try_fields(token_ids_body)
        prompt = parse_generation(whole, NO_USAGE).prompt_token_ids if whole else ()
        if not prompt:
            return False
        request = make_token_request(self.server.id, prompt, {"max_tokens": self.max_tokens, "logprobs": 0}, stream_body)
        try:
            _, usage = self.server.post_with_retries(request, should_give_up=_is_other_api)
        except (RequestRejected, ServerMisconfigured) as error:
            logger.info("%s does not complete token ids: %s", self.server.url, error)
            return False
        self.server.add_unbilled(usage)
        return True


def _describe_parts(response: JsonObject) -> tuple[object, ...]:
    """Return which parts a response has. Two responses to one request can have different texts, because servers batch requests."""
    generation, usage = parse_generation(response, NO_USAGE), parse_usage(response)
    return (
        bool(generation.text or generation.reasoning),
        bool(response["choices"][0].get("finish_reason")),
        usage is not None,
        generation.prompt_token_ids,
        bool(generation.token_ids),
        bool(generation.logprobs),
        usage is not None and len(generation.token_ids) == usage.completion_tokens,
    )


def _is_server_error(attempt: FailedAttempt) -> bool:
    """Return whether the status is 500. Several responses with status 500 mean that the server does not support a request."""
    return attempt.error.status_code == 500


def _is_other_api(attempt: FailedAttempt) -> bool:
    """Return whether the server does something else at the path of the request."""
    return attempt.error.status_code in _OTHER_API_STATUSES and attempt.num_failures >= _MAX_SERVER_ERRORS


def probe_server(server: ChatServer) -> ServerCapabilities:
    """Return the capabilities of a server. Raise ModelUnreachable if it is unreachable."""
    probe = _ServerProbe(server)
    thinking_off = probe.adopt_fields_if_accepted(NO_THINKING_BODY)
    top_p_with_temperature = probe.adopt_fields_if_accepted({"top_p": 1.0})
    unmodified = probe.adopt_fields_if_accepted(UNMODIFIED_SAMPLING_BODY)
    max_top_logprobs, names_tokens = probe.find_top_logprobs()
    token_ids_body = probe.find_token_ids_body(max_top_logprobs)
    stream_body = probe.find_stream_body(token_ids_body, max_top_logprobs) if server.stream else None
    prefill_body, echoes_prefill = probe.find_prefill_body()
    is_sampling, ignores_seed = probe.find_sampling()
    capabilities = ServerCapabilities(
        max_tokens_field=probe.max_tokens_field,
        extra_body=(NO_THINKING_BODY if thinking_off else {}) | (UNMODIFIED_SAMPLING_BODY if unmodified else {}),
        prefill_body=prefill_body,
        echoes_prefill=echoes_prefill,
        max_top_logprobs=max_top_logprobs,
        processed_logprobs=max_top_logprobs > 0 and probe.has_processed_logprobs(max_top_logprobs),
        token_ids_body=token_ids_body,
        unmodified_sampling=unmodified and top_p_with_temperature,
        supports_seed=probe.supports_seed,
        reports_usage=probe.reports_usage,
        sends_temperature=probe.sends_temperature,
        any_temperature=probe.any_temperature,
        top_p_with_temperature=top_p_with_temperature,
        thinks=probe.is_thinking(stream_body),
        names_tokens=names_tokens,
        stream_body=stream_body,
        ignores_seed=ignores_seed,
        accepts_token_ids=probe.accepts_token_ids(token_ids_body, stream_body),
    )
    _log_missing_capabilities(server, capabilities)
    if not is_sampling:
        logger.warning(
            "%s ignores the seed and does not sample, so all completions and votes of a prompt are identical", server.url
        )
    return capabilities


def _log_missing_capabilities(server: ChatServer, capabilities: ServerCapabilities) -> None:
    """Log the missing capabilities of a server, and what Charter uses instead."""
    if capabilities.prefill_body is None:
        logger.warning("%s does not support a prefilled assistant message: prompts ask for the option instead", server.url)
    if capabilities.thinks:
        logger.warning(
            "%s cannot turn thinking off: the reasoning is separated from its completions, and option mass is low", server.url
        )
    if not capabilities.any_temperature:
        logger.warning(
            "%s accepts only temperature 1: replies of a critic or judge are sampled instead of decoded greedily", server.url
        )
    if not capabilities.names_tokens:
        logger.warning(
            "%s names tokens by their ids (token_id:N), so options are scored by votes, which cost more"
            " (vLLM: omit --return-tokens-as-token-ids)",
            server.url,
        )
    if not capabilities.max_top_logprobs:
        logger.warning("%s provides no log-probabilities: options are scored by votes, which cost more", server.url)
    if capabilities.ignores_seed:
        logger.warning(
            "%s ignores the seed: requests at a temperature above 0 are refused while models.send_seed is on", server.url
        )
    if capabilities.stream_body is None and server.stream:
        logger.warning(
            "%s does not stream completions with all their parts: models.timeout_s limits the whole response", server.url
        )
    if not capabilities.reports_usage:
        logger.warning("%s reports no usage: tokens are estimated as one per four characters", server.url)
