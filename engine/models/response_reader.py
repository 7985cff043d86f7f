"""Read the response to one chat request within its time limits, streamed or whole.

A streamed response has a limit on the time to the first token and between two tokens. An unstreamed response has a limit on the
whole. Bytes without a token, such as the comments with which a proxy keeps a connection open, do not extend a limit.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import httpx

from engine.models.chat_api import JsonObject, RequestTimeout, TransientError, parse_usage
from engine.models.chat_stream import InvalidChunk, StreamedCompletion
from engine.models.interface import NO_USAGE, Usage

_MAX_RESPONSE_BYTES = 16 * 1024 * 1024
_MAX_STREAM_BYTES = 256 * 1024 * 1024  # each chunk of a stream repeats the fields of the response


@dataclass
class TimeLimits:
    """The limits of one attempt in seconds, and its clock, which starts now.

    `timeout_s` limits the time without a token if the response is streamed, and otherwise the whole response. `total_timeout_s`
    limits the whole completion. An unstreamed response with a `total_timeout_s` has no other limit.
    """

    timeout_s: float
    total_timeout_s: float | None = None
    is_streamed: bool = False
    latency_s: float = 0.0  # the longest time without a token so far

    def __post_init__(self) -> None:
        self.started_at = self.waiting_since = time.monotonic()
        if not self.is_streamed:
            self.timeout_s = self.total_timeout_s or self.timeout_s

    @property
    def read_timeout_s(self) -> float:
        """The time limit of one read from the connection."""
        return min(self.timeout_s, self.total_timeout_s or self.timeout_s)

    def note_token(self) -> None:
        self.note_wait()
        self.waiting_since = time.monotonic()

    def note_wait(self) -> None:
        """Record the time that the request has waited since its last token."""
        self.latency_s = max(self.latency_s, time.monotonic() - self.waiting_since)

    @property
    def is_total_over(self) -> bool:
        return self.total_timeout_s is not None and time.monotonic() - self.started_at >= self.total_timeout_s

    @property
    def is_over(self) -> bool:
        return self.is_total_over or time.monotonic() - self.waiting_since > self.timeout_s

    def make_timeout(self, reason: str, usage: Usage = NO_USAGE, partial: JsonObject | None = None) -> RequestTimeout:
        """Return the error of a timeout. `reason` has the place {limit} for the limit."""
        is_total = self.is_total_over
        limit_s = self.total_timeout_s if is_total and self.total_timeout_s else self.timeout_s
        return RequestTimeout(
            reason.format(limit=f"{limit_s:g} s"),
            usage,
            waiting_since=self.waiting_since,
            limit_s=limit_s,
            is_total=is_total,
            partial=partial if is_total else None,
        )


def read_body(response: httpx.Response, limits: TimeLimits) -> bytes:
    """Return the body. Raise TransientError if it is too large, and RequestTimeout if it is not complete within the timeout."""
    parts, size = [], 0
    for part in response.iter_bytes():
        parts.append(part)
        size += len(part)
        if size > _MAX_RESPONSE_BYTES:
            raise TransientError(f"the response has more than {_MAX_RESPONSE_BYTES} bytes")
        if limits.is_over:
            raise limits.make_timeout("the response is not complete after {limit}")
    limits.note_wait()
    return b"".join(parts)


def read_stream(
    response: httpx.Response, limits: TimeLimits, *, max_tokens: int, num_prompt_tokens: int, note_token: Callable[[], None]
) -> StreamedCompletion:
    """Return the completion of a stream, or the error that the server sent in it (`StreamedCompletion.error`).

    If the stream is invalid, breaks off or does not continue, raise TransientError or RequestTimeout. Its usage counts the tokens
    so far, because most servers bill them; `num_prompt_tokens` is the estimate for the prompt. `note_token` is called when tokens
    arrive.
    """
    stream, size = StreamedCompletion(max_tokens), 0

    def make_timeout() -> RequestTimeout:
        if limits.is_total_over:
            reason = "the completion is not finished after {limit}"
        else:
            reason = (
                f"no further token for {{limit}}, after {stream.num_tokens}" if stream.num_chunks else "no token within {limit}"
            )
        return limits.make_timeout(reason, get_usage(), stream.assemble() if stream.num_chunks else None)

    def get_usage() -> Usage:
        return parse_usage(stream.response) or stream.estimate_received_usage(num_prompt_tokens)

    try:
        for part in response.iter_bytes():
            size += len(part)
            if size > _MAX_STREAM_BYTES:
                raise InvalidChunk(f"the stream has more than {_MAX_STREAM_BYTES} bytes")
            if stream.feed(part):
                limits.note_token()
                note_token()
            if stream.error is not None:
                return stream
            if limits.is_over and not stream.is_done:
                raise make_timeout()
        stream.finish()
    except InvalidChunk as error:
        raise TransientError(str(error), response.status_code, get_usage()) from error
    except httpx.ReadTimeout as error:
        if not stream.is_done:
            raise make_timeout() from error
    except httpx.HTTPError as error:
        if not stream.is_done:
            raise TransientError(f"{type(error).__name__}: the stream broke off", usage=get_usage()) from error
    if not stream.is_done and stream.error is None:
        raise TransientError("the stream ended before the completion was finished", response.status_code, get_usage())
    return stream
