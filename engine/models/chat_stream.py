"""Assemble the chunks of a streamed chat completion to the response that a server sends without streaming.

One parser therefore reads both, and the texts, token ids and log-probabilities do not depend on streaming. A stream consists of
server-sent events (https://html.spec.whatwg.org/multipage/server-sent-events.html). The data of an event is a chunk in JSON, or
`[DONE]`. Only the first choice of a chunk is read, because Charter asks for one completion at a time.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from engine.models.interface import NO_USAGE, Usage

STREAM_BODIES: tuple[dict[str, Any], ...] = (
    {"stream": True, "stream_options": {"include_usage": True}},
    {"stream": True},
)
STREAMED_OBJECT = "chat.completion.chunk"  # the value of the field `object` of an assembled response
_DONE = b"[DONE]"
_TEXT_FIELDS = ("content", "reasoning_content", "reasoning", "thinking", "reasoning_details", "refusal")
_PART_FIELDS = ("text", "thinking", "summary", "content")
_LIST_FIELDS = ("token_ids", "prompt_token_ids")
# A chunk has at least one token, except chunks of some servers that split a token. More chunks mean that max_tokens is ignored.
_MAX_CHUNKS_PER_TOKEN = 8
_MIN_MAX_CHUNKS = 1024


class InvalidChunk(Exception):
    """A chunk is not JSON, or it is not a chunk of a chat completion."""


class EventReader:
    """Splits the bytes of a stream into the data of its events. Comments and the other fields of events are skipped."""

    def __init__(self) -> None:
        self.buffer = b""
        self.data_lines: list[bytes] = []

    def feed(self, part: bytes) -> Iterator[bytes]:
        """Add bytes. Yield the data of the events that are complete now."""
        lines = (self.buffer + part).splitlines(keepends=True)
        # A line that ends in \r may continue with \n in the next part.
        self.buffer = lines.pop() if lines and not lines[-1].endswith(b"\n") else b""
        for line in lines:
            yield from self._add_line(line.rstrip(b"\r\n"))

    def finish(self) -> Iterator[bytes]:
        """Yield the data of the last event, if the stream ended without the empty line after it."""
        yield from self._add_line(self.buffer.rstrip(b"\r\n"))
        yield from self._add_line(b"")
        self.buffer = b""

    def _add_line(self, line: bytes) -> Iterator[bytes]:
        name, _, value = line.partition(b":")
        if name == b"data":
            self.data_lines.append(value.removeprefix(b" "))
        elif not line and self.data_lines:
            yield b"\n".join(self.data_lines)
            self.data_lines = []


class StreamedCompletion:
    """A chat completion that arrives in chunks. `max_tokens` is the limit of the request.

    `num_chunks` counts the chunks with tokens. `is_done` is true after the end mark of the stream, or after the finish reason and
    the usage, because some servers send no end mark. `error` is the error that the server sent instead of a chunk, or None.
    """

    def __init__(self, max_tokens: int) -> None:
        self.reader = EventReader()
        self.response: dict[str, Any] = {}
        self.choice: dict[str, Any] = {}
        self.message: dict[str, Any] = {"role": "assistant", "content": ""}
        self.max_chunks = max(_MIN_MAX_CHUNKS, _MAX_CHUNKS_PER_TOKEN * max_tokens)
        self.num_chunks = 0
        self.has_end_mark = False
        self.error: Any = None

    def feed(self, part: bytes) -> bool:
        """Add bytes of the stream. Return whether they contain at least one token. Raise InvalidChunk."""
        before = self.num_chunks
        for data in self.reader.feed(part):
            self._add_event(data)
        return self.num_chunks > before

    def finish(self) -> None:
        """Read the rest of a stream that has ended. Raise InvalidChunk."""
        for data in self.reader.finish():
            self._add_event(data)

    @property
    def is_done(self) -> bool:
        return self.has_end_mark or (bool(self.choice.get("finish_reason")) and "usage" in self.response)

    @property
    def num_tokens(self) -> int:
        """The number of tokens so far. A chunk counts as one token if the server does not list its tokens."""
        logprobs = self.choice.get("logprobs")
        num_entries = len(logprobs["content"]) if isinstance(logprobs, dict) else 0
        return max(len(self.choice.get("token_ids", ())), num_entries, self.num_chunks)

    def assemble(self) -> dict[str, Any]:
        """Return the response, with the chunks so far."""
        return {
            **self.response,
            "object": STREAMED_OBJECT,
            "choices": [{"message": self.message, "finish_reason": None, **self.choice}],
        }

    def estimate_received_usage(self, num_prompt_tokens: int) -> Usage:
        """Return the usage of a stream that broke off: the tokens so far. Without a token, the server may not have begun."""
        return Usage(num_prompt_tokens, self.num_tokens) if self.num_chunks else NO_USAGE

    def _add_event(self, data: bytes) -> None:
        if self.has_end_mark or self.error is not None:
            return
        if data.strip() == _DONE:
            self.has_end_mark = True
            return
        try:
            chunk = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise InvalidChunk("a chunk of the stream is not JSON") from error
        if not isinstance(chunk, dict):
            raise InvalidChunk("a chunk of the stream is not an object")
        if chunk.get("error"):
            self.error = chunk["error"]
            return
        self._add_chunk(chunk)
        if self.num_chunks > self.max_chunks:
            raise InvalidChunk(f"the stream has more than {self.max_chunks} chunks, so the server ignores max_tokens")

    def _add_chunk(self, chunk: dict[str, Any]) -> None:
        """Add a chunk: the fields of the response, of its first choice, and of the message."""
        _merge(self.response, {name: value for name, value in chunk.items() if name != "choices"})
        choices = chunk.get("choices") or []
        if not isinstance(choices, list):
            raise InvalidChunk("the choices of a chunk are not a list")
        for choice in choices:
            if not isinstance(choice, dict) or not isinstance(delta := choice.get("delta") or {}, dict):
                raise InvalidChunk("a choice of a chunk has another form than that of a chat completion")
            if choice.get("index"):
                continue
            logprobs = choice.get("logprobs")
            entries = logprobs.get("content") if isinstance(logprobs, dict) else None
            names = [name for name in _TEXT_FIELDS if delta.get(name)]
            self.num_chunks += bool(names or choice.get("token_ids") or entries)
            for name in names:
                self.message[name] = _join(self.message.get(name), delta[name])
            _merge(self.choice, {name: value for name, value in choice.items() if name not in ("delta", "index", "logprobs")})
            if entries and isinstance(entries, list):
                self.choice.setdefault("logprobs", {"content": []})["content"] += entries


def _merge(target: dict[str, Any], fields: dict[str, Any]) -> None:
    """Set fields that are not None. The lists of tokens are appended."""
    for name, value in fields.items():
        if name in _LIST_FIELDS and isinstance(value, list):
            target[name] = target.get(name, []) + value
        elif value is not None:
            target[name] = value


def _join(old: Any, new: Any) -> Any:
    """Return a text or a list of parts with the next piece. Pieces of the same part become one part."""
    if not old:
        return new
    if isinstance(old, str) and isinstance(new, str):
        return old + new
    parts = _to_parts(old)
    for part in _to_parts(new):
        if parts and _is_same_part(parts[-1], part):
            last = parts[-1]
            parts[-1] = {**last, **part, **{name: _join(last.get(name), part[name]) for name in _PART_FIELDS if part.get(name)}}
        else:
            parts.append(part)
    return parts


def _to_parts(value: Any) -> list[Any]:
    return [{"type": "text", "text": value}] if isinstance(value, str) else list(value) if isinstance(value, list) else [value]


def _is_same_part(a: Any, b: Any) -> bool:
    both = isinstance(a, dict) and isinstance(b, dict)
    return both and a.get("type") == b.get("type") and a.get("index") == b.get("index")
