"""Asking a server what it can do, once, with a handful of requests of a few tokens.

Names and versions of servers say little (a proxy answers for several), so each thing is tried and the answer looked at:

1. a plain request, which must work (`max_tokens`, or `max_completion_tokens` where that is the name; with a seed, or without);
2. thinking switched off (`chat_template_kwargs`), and the server's own hidden sampling defaults (`top_k` and such) neutralised;
3. a prefilled assistant message, cut in the middle of a word: only a server that goes on with it ends the word. First with vLLM's two
   fields, then without (llama.cpp and several hosted models go on with a last assistant message as it is);
4. log-probabilities: how many top tokens, and whether they change with the temperature (processed) or not (raw);
5. token ids of the sampled text: `return_token_ids`, else `return_tokens_as_token_ids`;
6. whether it samples at all: some servers answer greedily whatever temperature is asked for.

A request that is refused with 4xx, or answered three times with 500, means that the server cannot do it. Anything else that
goes wrong is the server being away, and nothing is concluded from it.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from engine.errors import ModelUnreachable
from engine.models.endpoint import (
    JsonObject,
    RequestRejected,
    ServerCapabilities,
    TransientError,
    parse_generation,
    parse_top_logprobs,
    parse_usage,
)
from engine.models.interface import NO_USAGE

if TYPE_CHECKING:
    from engine.models.endpoint import Endpoint

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
_SAMPLING_MAX_TOKENS = 12  # tokens in which two samples are hardly ever the same
_PROBE_MAX_TOKENS = 4
_TOP_LOGPROBS_COUNTS = (20, 5)
_MAX_TOKENS_FIELDS = ("max_tokens", "max_completion_tokens")
_LOGPROB_TOLERANCE = 1e-3  # log-probabilities that differ by less are the same
NO_THINKING_BODY: JsonObject = {"chat_template_kwargs": {"enable_thinking": False}}
UNMODIFIED_SAMPLING_BODY: JsonObject = {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}
PREFILL_BODIES: tuple[JsonObject, ...] = ({"continue_final_message": True, "add_generation_prompt": False}, {})
TOKEN_IDS_BODIES: tuple[JsonObject, ...] = ({"return_token_ids": True}, {"return_tokens_as_token_ids": True})
_MAX_SERVER_ERRORS = 3


class _ServerProbe:
    """One server being asked. `base` is a request that works."""

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        self.max_tokens_field, self.supports_seed, self.reports_usage = "max_tokens", True, True
        self.base_request: JsonObject = {"model": endpoint.id, "messages": [_COUNTING_MESSAGE], "temperature": 0.0}
        self.find_base_request()

    def find_base_request(self) -> None:
        words = ""
        for seed in ({"seed": 1}, {}):
            for limit in _MAX_TOKENS_FIELDS:
                request = self.base_request | seed | {limit: _PROBE_MAX_TOKENS}
                try:
                    answer = self.send_request(request)
                except RequestRejected as error:
                    words = words or str(error)
                    continue
                self.max_tokens_field, self.supports_seed, self.reports_usage, self.base_request = (
                    limit,
                    bool(seed),
                    parse_usage(answer) is not None,
                    request,
                )
                return
        raise ModelUnreachable(
            f"{self.endpoint.url} refuses a plain request for {self.endpoint.id}", words, "check models.* and the server"
        )

    def send_request(self, request: JsonObject) -> JsonObject:
        answer, used = self.endpoint.post_with_retries(
            request, should_give_up=lambda error, tries: _is_server_error(error) and tries >= _MAX_SERVER_ERRORS
        )
        self.endpoint.add_unbilled(used)
        return answer

    def try_fields(self, fields: JsonObject) -> JsonObject | None:
        """The answer to the plain request with `more` in it; None when it is refused."""
        try:
            return self.send_request(self.base_request | fields)
        except RequestRejected:
            return None

    def adopt_fields_if_accepted(self, fields: JsonObject) -> bool:
        """Whether these fields are taken; if so every request has them from now on."""
        if self.try_fields(fields) is None:
            return False
        self.base_request = self.base_request | fields
        return True

    def is_thinking(self) -> bool:
        """Whether answers still begin with a thought."""
        message = (self.try_fields({}) or {"choices": [{"message": {"content": ""}}]})["choices"][0]["message"]
        thought = message.get("reasoning_content") or message.get("reasoning")
        return bool(thought) or message["content"].lstrip().startswith("<think>")

    def is_sampling(self) -> bool:
        """Whether two seeds give two texts at temperature 1."""
        wanted = {"messages": [_SAMPLING_MESSAGE], "temperature": 1.0, self.max_tokens_field: _SAMPLING_MAX_TOKENS}
        answers = [self.try_fields(wanted | ({"seed": seed} if self.supports_seed else {})) for seed in (1, 2)]
        texts = [answer["choices"][0]["message"]["content"] for answer in answers if answer]
        return len(set(texts)) == len(answers)

    def find_prefill_body(self) -> JsonObject | None:
        for fields in PREFILL_BODIES:
            answer = self.try_fields(fields | {"messages": [_COUNTING_MESSAGE, _PREFILL_MESSAGE]})
            if answer and answer["choices"][0]["message"]["content"].startswith(_EXPECTED_CONTINUATION):
                return fields
        return None

    def fetch_top_logprobs(self, count: int, temperature: float = 1.0) -> dict[str, float]:
        wanted = {"temperature": temperature, self.max_tokens_field: 1, "logprobs": True, "top_logprobs": count}
        answer = self.try_fields(wanted)
        return dict(parse_top_logprobs(answer)) if answer else {}

    def count_top_logprobs(self) -> int:
        for count in _TOP_LOGPROBS_COUNTS:
            if found := self.fetch_top_logprobs(count):
                return min(count, len(found))
        return 0

    def has_processed_logprobs(self, max_top_logprobs: int) -> bool:
        """Whether halving the temperature changes the log-probabilities."""
        warm, cool = self.fetch_top_logprobs(max_top_logprobs), self.fetch_top_logprobs(max_top_logprobs, temperature=0.5)
        both = warm.keys() & cool.keys()
        return bool(both) and max(abs(warm[token] - cool[token]) for token in both) > _LOGPROB_TOLERANCE

    def find_token_ids_body(self, max_top_logprobs: int) -> JsonObject | None:
        for fields in TOKEN_IDS_BODIES:
            more: dict[str, Any] = {"logprobs": True, "top_logprobs": 0} if max_top_logprobs else {}
            answer = self.try_fields(fields | more)
            if answer and parse_generation(answer, NO_USAGE).token_ids:
                return fields
        return None


def _is_server_error(error: TransientError) -> bool:
    """A server that answers 500 to one kind of request cannot do it; other trouble passes."""
    return error.status_code == 500


def probe_server(endpoint: Endpoint) -> ServerCapabilities:
    """What a server can do. Raises ModelUnreachable while it is away."""
    asked = _ServerProbe(endpoint)
    thinking_off = asked.adopt_fields_if_accepted(NO_THINKING_BODY)
    unmodified = asked.adopt_fields_if_accepted(UNMODIFIED_SAMPLING_BODY)
    shown = asked.count_top_logprobs()
    dialect = ServerCapabilities(
        max_tokens_field=asked.max_tokens_field,
        extra_body=(NO_THINKING_BODY if thinking_off else {}) | (UNMODIFIED_SAMPLING_BODY if unmodified else {}),
        prefill_body=asked.find_prefill_body(),
        max_top_logprobs=shown,
        processed_logprobs=shown > 0 and asked.has_processed_logprobs(shown),
        token_ids_body=asked.find_token_ids_body(shown),
        unmodified_sampling=unmodified,
        supports_seed=asked.supports_seed,
        reports_usage=asked.reports_usage,
    )
    _log_missing_capabilities(endpoint, dialect)
    if not asked.is_sampling():
        logger.warning(
            "%s answers alike whatever the seed: it does not sample, so completions and votes are all the same", endpoint.url
        )
    if asked.is_thinking():
        logger.warning("%s goes on thinking: what it thinks is cut off its answers, and its options catch little", endpoint.url)
    return dialect


def _log_missing_capabilities(endpoint: Endpoint, dialect: ServerCapabilities) -> None:
    """Say once what this server cannot do and what is done instead."""
    if dialect.prefill_body is None:
        logger.warning("%s does not go on with a prefilled assistant message: options are asked for in words", endpoint.url)
    if not dialect.max_top_logprobs:
        logger.warning("%s gives no log-probabilities: options are scored by votes, which cost more", endpoint.url)
    if not dialect.reports_usage:
        logger.warning("%s does not count tokens: four characters are taken for one", endpoint.url)
