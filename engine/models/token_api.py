"""Ask vLLM for a completion of a prompt of token ids (`POST /inference/v1/generate`, vLLM 0.32 with `--enable-scale-out`).

Charter formats and encodes the prompt with the tokenizer of the trainer (`engine.models.chat_template`), and decodes the completion.
So the prompts of rollouts have the tokens that a local model gets, and that training uses for the same messages, also if the server
has another chat template. The chat API returns exact token ids too, but they are those of the server's chat template.

The stream has the form of a chat stream without texts, so `engine.models.chat_stream` reads both. The response has the form of a
chat completion without a message.

Options are scored with the chat API. A judge is often another model, whose tokenizer is not on this machine. The scores must not depend
on whether the judge is also the policy.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from dataclasses import replace
from http import HTTPStatus
from typing import Any

from engine.models.chat_api import (
    JsonObject,
    TransientError,
    normalize_chat_completion,
    parse_generation,
    parse_usage,
)
from engine.models.chat_template import decode_completion, encode_prompt, find_stop_token_ids
from engine.models.interface import NO_USAGE, Generation, GenerationRequest, Usage

GENERATE_PATH = "/inference/v1/generate"


def make_token_request(
    model: str, token_ids: Sequence[int], sampling: JsonObject, stream_body: JsonObject | None
) -> JsonObject:
    """Return the body of a request. `sampling` has the sampling parameters of vLLM."""
    body = {"model": model, "token_ids": list(token_ids), "sampling_params": sampling, "return_token_ids": True}
    return body | (stream_body or {})


def is_token_request(request: JsonObject) -> bool:
    return "token_ids" in request


def parse_token_completion(text: bytes) -> JsonObject:
    """Parse an unstreamed response. Return it as a chat completion with an empty text. If it is invalid, raise TransientError."""
    try:
        response = json.loads(text)
        response["choices"][0].setdefault("message", {"content": ""})
    except (ValueError, RecursionError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise TransientError("the response is not a completion of token ids") from error
    return normalize_chat_completion(response)


def require_complete(request: JsonObject, response: JsonObject, num_tokens: int | None) -> None:
    """Raise TransientError if a response to a request of token ids lacks a part, or has ids outside a vocabulary of `num_tokens`."""
    usage = parse_usage(response) or NO_USAGE
    if not response["choices"][0].get("finish_reason"):
        raise TransientError("the completion has no finish reason", HTTPStatus.OK, usage)
    generation = parse_generation(response, NO_USAGE)
    largest = max(generation.token_ids, default=0)
    if list(generation.prompt_token_ids) != request["token_ids"]:
        problem = "the completion does not have the prompt of the request"
    elif not generation.token_ids:
        problem = "the completion has no token ids"
    elif num_tokens is not None and largest >= num_tokens:
        problem = f"the completion has the token id {largest}, and the tokenizer of train.base_model has {num_tokens} tokens"
    elif "logprobs" in request["sampling_params"] and not generation.logprobs:
        problem = "the completion does not have a log-probability for each token"
    else:
        return
    raise TransientError(problem, HTTPStatus.OK, usage)


class TokenCodec:
    """Encodes prompts and decodes completions with the tokenizer of the policy, which has a chat template."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer, self.num_tokens = tokenizer, len(tokenizer)
        self.stop_token_ids = sorted(find_stop_token_ids(tokenizer))
        self.lock = threading.Lock()  # encoding can change the settings of a tokenizer, and several batches are in flight

    def encode(self, request: GenerationRequest, *, thinking: bool) -> list[int]:
        """Return the token ids of a prompt. Raise PermanentRecordError if the chat template rejects it."""
        with self.lock:
            return encode_prompt(self.tokenizer, request.messages, request.prefill, thinking=thinking)

    def parse_generation(self, response: JsonObject, usage: Usage) -> Generation:
        """Return the sampled completion with its text."""
        generation = parse_generation(response, usage)
        ids = generation.token_ids
        if generation.finish_reason == "stop" and ids and ids[-1] in self.stop_token_ids:
            ids = ids[:-1]
        separated = decode_completion(self.tokenizer, generation.prompt_token_ids, ids)
        return replace(
            generation,
            text=separated.response,
            reasoning=separated.reasoning,
            ends_in_reasoning=separated.ends_in_reasoning,
        )
