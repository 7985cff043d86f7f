"""Streamed completions: equal to unstreamed ones, limited by the time without a token, and slow servers that always progress."""

import itertools
import json
import logging
import threading
import time

import httpx
import pytest

from engine.errors import PermanentRecordError
from engine.models.chat_api import RequestTimeout, ServerCapabilities, TransientError
from engine.models.chat_stream import STREAM_BODIES, InvalidChunk, StreamedCompletion
from engine.models.endpoint import Endpoint
from engine.models.interface import GenerationRequest, Usage
from engine.models.probe import TOKEN_IDS_BODIES, UNMODIFIED_SAMPLING_BODY
from engine.models.response_reader import TimeLimits, read_stream
from schemas.records import ChatMessage
from tests.support.chat_server import (
    EVENT_STREAM,
    STREAM_FIELDS,
    VLLM_FIELDS,
    FakeChatServer,
    make_chat_completion,
    make_events,
    make_script,
    stream_answer,
)
from tests.support.waiting import HANG_S, wait_until

EXACT = ServerCapabilities(
    extra_body=UNMODIFIED_SAMPLING_BODY, max_top_logprobs=20, token_ids_body=TOKEN_IDS_BODIES[0], unmodified_sampling=True
)
STREAMING = ServerCapabilities(stream_body=STREAM_BODIES[0])


@pytest.fixture
def server():
    server = FakeChatServer()
    yield server
    server.close()


def make_endpoint(server, **options):
    defaults = {
        "backoff_range_s": (0.01, 0.02), "retry_timeout_s": HANG_S, "timeout_s": HANG_S, "cached_server_capabilities": STREAMING,
    }  # fmt: skip
    return Endpoint(server.url, "m", **defaults | options)


def make_request(text="hi", **options):
    return GenerationRequest((ChatMessage(role="user", content=text),), seed=7, **options)


def make_exact_completion(text, finish_reason="stop", **message):
    """Return a completion with a token for each character, an end token and a log-probability for each token."""
    completion = make_chat_completion(text, finish_reason, token_counts=(3, len(text) + 1), prompt_token_ids=[1, 2, 3])
    choice = completion["choices"][0]
    choice["token_ids"] = [*map(ord, text), 2]
    choice["logprobs"] = {"content": [{"token": "t", "logprob": -0.1 * n - 1 / 3} for n in range(len(text) + 1)]}
    choice["message"] |= message
    return completion


# Equality with an unstreamed response


@pytest.mark.parametrize(
    "completion",
    [
        make_exact_completion("Paris is the capital."),
        make_exact_completion("日本 \U0001f600 \u2028 \x85 \n\n data: x"),
        make_exact_completion("", "length"),
        make_exact_completion("Rome.", "length", reasoning_content="Let me think.\n\nYes."),
        make_chat_completion("<think>plan</think>\nParis.", "stop"),
        make_chat_completion("without usage", "length", token_counts=None),
        make_chat_completion("", "content_filter", token_counts=(5, 0)),
    ],
)
@pytest.mark.parametrize("part_size", [1, 100, 10**6])
@pytest.mark.parametrize("line_end", [b"\n", b"\r\n"])
def test_streamed_completion_equals_the_unstreamed_one(server, completion, part_size, line_end):
    data = b": comment\n\n" + b"".join(make_events(completion))
    data = data.replace(b"\n", line_end)
    parts = [data[start : start + part_size] for start in range(0, len(data), part_size)]
    server.script = lambda n, request: (200, iter(parts), EVENT_STREAM) if request.get("stream") else (200, completion)
    generations = []
    for stream_body in (None, STREAM_BODIES[0]):
        capabilities = ServerCapabilities(
            extra_body=EXACT.extra_body, max_top_logprobs=20, token_ids_body=EXACT.token_ids_body, unmodified_sampling=True,
            stream_body=stream_body,
        )  # fmt: skip
        generations += make_endpoint(server, cached_server_capabilities=capabilities).generate([make_request()])[0]
    assert generations[0] == generations[1]
    assert [body.get("stream") for body in server.request_bodies] == [None, True]
    num_tokens = len(completion["choices"][0].get("token_ids", ()))
    assert len(generations[1].logprobs) == len(generations[1].token_ids) == num_tokens


def test_surrogates_in_two_chunks_become_one_character():
    stream = StreamedCompletion(10)
    for piece in (r"\ud83d", r"\ude00"):
        stream.feed(b'data: {"choices": [{"delta": {"content": "%s"}}]}\n\n' % piece.encode())
    assert (
        stream.assemble()["choices"][0]["message"]["content"].encode("utf-16", "surrogatepass").decode("utf-16") == "\U0001f600"
    )


def test_parts_of_reasoning_and_text_in_chunks_become_whole_parts():
    stream = StreamedCompletion(10)
    deltas = [
        {"content": [{"type": "thinking", "thinking": [{"type": "text", "text": "Let"}]}]},
        {"content": [{"type": "thinking", "thinking": [{"type": "text", "text": " me"}]}]},
        {"content": "Par"}, {"content": "is"},
    ]  # fmt: skip
    for delta in deltas:
        stream.feed(b"data: %s\n\n" % json.dumps({"choices": [{"index": 0, "delta": delta}]}).encode())
    assert stream.assemble()["choices"][0]["message"]["content"] == [
        {"type": "thinking", "thinking": [{"type": "text", "text": "Let me"}]}, {"type": "text", "text": "Paris"},
    ]  # fmt: skip
    assert stream.num_chunks == 4 and not stream.is_done


def test_stream_of_a_server_that_ignores_max_tokens_is_refused():
    stream, chunk = StreamedCompletion(4), b'data: {"choices": [{"delta": {"content": "x"}}]}\n\n'
    with pytest.raises(InvalidChunk, match="ignores max_tokens"):
        for _ in range(2000):
            stream.feed(chunk)


# The probe


def get_stream_body(server, caplog, **options):
    """Return the capability that the probe finds, and the number of warnings about it."""
    caplog.clear()
    with caplog.at_level(logging.WARNING, "charter.endpoint"):
        capabilities = make_endpoint(server, cached_server_capabilities=None, **options).server_capabilities
    return capabilities.stream_body, sum("does not stream" in line for line in caplog.messages)


def test_probe_finds_out_whether_a_stream_has_all_parts(server, caplog):
    fields = VLLM_FIELDS | STREAM_FIELDS
    server.script = full = make_script(accepted_fields=fields, returns_token_ids=True, streams=True)
    assert get_stream_body(server, caplog) == (STREAM_BODIES[0], 0)
    server.script = make_script(accepted_fields=VLLM_FIELDS, returns_token_ids=True)  # it rejects the field `stream`
    assert get_stream_body(server, caplog) == (None, 1)

    def make_incomplete(change):
        def script(number, request):
            completion = full(number, {name: value for name, value in request.items() if name not in STREAM_FIELDS})[1]
            if not request.get("stream"):
                return 200, completion
            change(completion)
            return stream_answer(completion)

        return script

    for change in (
        lambda completion: completion.pop("usage"),
        lambda completion: completion.pop("prompt_token_ids", None),
        lambda completion: completion["choices"][0].pop("logprobs", None),
        lambda completion: completion["choices"][0].pop("token_ids", None),
        lambda completion: completion["choices"][0].update(finish_reason=None),
    ):
        server.script = make_incomplete(change)
        assert get_stream_body(server, caplog) == (None, 1)
    # A server that sends the usage only if it is asked for it in no other way than `stream`.
    server.script = lambda n, request: (400, b"stream_options") if "stream_options" in request else full(n, request)
    assert get_stream_body(server, caplog) == (STREAM_BODIES[1], 0)


# Time limits


class Clock:
    """A clock that only the test moves."""

    def __init__(self, monkeypatch):
        self.now = 1000.0
        monkeypatch.setattr("engine.models.response_reader.time.monotonic", lambda: self.now)

    def make_stream(self, *steps):
        """Return a streamed response: numbers move the clock, bytes arrive, and an error breaks off the stream."""

        def generate():
            for step in steps:
                if isinstance(step, bytes):
                    yield step
                elif isinstance(step, Exception):
                    raise step
                else:
                    self.now += step

        return httpx.Response(200, content=generate())


TOKEN = b'data: {"choices": [{"index": 0, "delta": {"content": "x"}}]}\n\n'
END = make_events(make_chat_completion("", token_counts=(3, 9)))[-3:]


def read(response, limits, **options):
    return read_stream(response, limits, max_tokens=100, num_prompt_tokens=5, note_token=lambda: None, **options)


def test_stream_may_take_longer_than_the_timeout_if_tokens_arrive(monkeypatch):
    clock = Clock(monkeypatch)
    limits = TimeLimits(10.0, is_streamed=True)
    steps = itertools.chain.from_iterable([(9.0, TOKEN)] * 50)
    stream = read(clock.make_stream(*steps, *END), limits)
    assert stream.assemble()["choices"][0]["message"]["content"] == "x" * 50
    assert clock.now == 1450.0 and limits.latency_s == 9.0


@pytest.mark.parametrize(
    ("steps", "reason", "usage"),
    [
        ([6.0, b": ping\n\n", 6.0, b": ping\n\n"], "no token within 10 s", Usage()),
        ([6.0, TOKEN, TOKEN, 6.0, b": ping\n\n", 6.0, b": ping\n\n"], "no further token for 10 s, after 2", Usage(5, 2)),
        ([TOKEN, 11.0, httpx.ReadTimeout("")], "no further token for 10 s, after 1", Usage(5, 1)),
    ],
)
def test_time_without_a_token_is_limited_also_if_other_bytes_arrive(monkeypatch, steps, reason, usage):
    clock = Clock(monkeypatch)
    limits = TimeLimits(10.0, is_streamed=True)
    with pytest.raises(RequestTimeout) as caught:
        read(clock.make_stream(*steps), limits)
    error = caught.value
    assert str(error) == reason and error.usage == usage
    assert not error.is_total and error.partial is None and error.waiting_since == limits.waiting_since


def test_whole_completion_has_a_limit_if_the_request_has_one(monkeypatch):
    clock = Clock(monkeypatch)
    with pytest.raises(RequestTimeout, match="not finished after 15 s") as caught:
        read(clock.make_stream(9.0, TOKEN, 9.0, TOKEN), TimeLimits(10.0, 15.0, is_streamed=True))
    assert caught.value.is_total and caught.value.partial["choices"][0]["message"]["content"] == "xx"


@pytest.mark.parametrize(
    ("steps", "words"),
    [
        ([TOKEN, httpx.ReadError("")], "ReadError: the stream broke off"),
        ([TOKEN], "ended before"),
        ([TOKEN, b"data: {no json\n\n"], "not JSON"),
        ([TOKEN, b"data: [1]\n\n"], "not an object"),
        ([TOKEN, b'data: {"choices": 3}\n\n'], "not a list"),
        ([TOKEN, b'data: {"choices": [3]}\n\n'], "another form"),
    ],
)
def test_broken_stream_is_a_failed_attempt_with_the_tokens_so_far(monkeypatch, steps, words):
    with pytest.raises(TransientError, match=words) as caught:
        read(Clock(monkeypatch).make_stream(*steps), TimeLimits(10.0, is_streamed=True))
    assert caught.value.usage == Usage(5, 1)


def test_stream_that_is_not_closed_after_its_end_is_complete(monkeypatch):
    stream = read(Clock(monkeypatch).make_stream(TOKEN, *END, httpx.ReadTimeout("")), TimeLimits(10.0, is_streamed=True))
    assert stream.is_done and stream.response["usage"]["completion_tokens"] == 9


def test_completion_that_exceeds_the_time_of_its_request_keeps_its_tokens(server):
    finished = threading.Event()

    def stream():
        yield TOKEN + TOKEN
        while not finished.wait(0.02):
            yield b": ping\n\n"

    server.script = lambda n, request: (200, stream(), EVENT_STREAM)
    model = make_endpoint(server)
    try:
        ((late,),) = model.generate([make_request("12345678", timeout_s=0.2)])
    finally:
        finished.set()
    assert (late.text, late.finish_reason, late.usage) == ("xx", "timeout", Usage(2, 2))
    assert len(server.requests) == 1  # its tokens show that the server is alive


# Failures


def test_broken_streams_are_repeated_and_their_tokens_are_counted(server):
    def fail_once(number):
        if number == 1:
            return iter([TOKEN])
        if number == 2:
            return iter([TOKEN, b'data: {"error": {"message": "out of memory", "code": 500}}\n\n'])
        return iter(make_events(make_chat_completion("fine", token_counts=(3, 2))))

    server.script = lambda n, request: (200, fail_once(n), EVENT_STREAM)
    model = make_endpoint(server)
    assert model.generate([make_request("12345678")])[0][0].usage == Usage(3 + 2 * 2, 2 + 2 * 1)
    assert model.health.failure_counts == {"status 200": 1, "status 500": 1}


def test_error_in_a_stream_has_the_meaning_of_its_status(server):
    server.script = lambda n, request: (
        200, iter([b'data: {"error": {"message": "too long", "code": 400}}\n\n']), EVENT_STREAM,
    )  # fmt: skip
    (error,) = make_endpoint(server).generate([make_request()])
    assert isinstance(error, PermanentRecordError) and "too long" in str(error) and len(server.requests) == 1


def test_options_are_scored_without_a_stream(server):
    server.script = make_script(streams=True)
    capabilities = ServerCapabilities(max_top_logprobs=20, stream_body=STREAM_BODIES[0])
    make_endpoint(server, cached_server_capabilities=capabilities).score_options([make_request()], ("A", "B"))
    assert "stream" not in server.request_bodies[0]  # the response is one token


# A server whose speed changes


class SharedSpeedServer:
    """A server that computes all its requests at once, like vLLM: with more than `capacity` requests, none gets its next token.

    It begins each request anew and drops the request of a client that has closed the connection. The first four requests begin
    together. When it has finished one request with this capacity, it becomes fast.
    """

    def __init__(self, capacity, num_tokens=3):
        self.capacity, self.num_tokens = capacity, num_tokens
        self.condition, self.active, self.num_started = threading.Condition(), 0, 0
        self.num_dropped = self.num_finished = 0

    def __call__(self, number, request):
        if request["messages"][0]["content"] == "Hello":
            return 200, make_chat_completion("Hello")
        return 200, self.stream(), EVENT_STREAM

    def stream(self):
        events = make_events(make_chat_completion("x" * self.num_tokens))
        is_finished = False
        with self.condition:
            self.active += 1
            self.num_started += 1
        try:
            for event in events:
                while not self.has_capacity():
                    yield b": busy\n\n"  # this fails if the client has closed the connection
                yield event
            is_finished = True
        finally:
            with self.condition:
                self.active -= 1
                self.num_finished += is_finished
                self.num_dropped += not is_finished
                self.capacity = 100 if self.num_finished else self.capacity
                self.condition.notify_all()

    def has_capacity(self):
        with self.condition:
            return self.condition.wait_for(lambda: self.num_started >= 4 and self.active <= self.capacity, 0.02)


def test_server_that_is_too_slow_for_its_requests_progresses_and_gets_more_when_it_is_fast_again(server, caplog):
    server.script = script = SharedSpeedServer(capacity=1)
    model = make_endpoint(server, timeout_s=0.3, concurrency=8)
    with caplog.at_level(logging.WARNING, "charter.endpoint"):
        results = model.generate([make_request(str(n)) for n in range(8)])
    assert [result[0].text for result in results] == ["xxx"] * 8
    assert 1 <= script.num_dropped <= 16  # the first requests time out together, but not for ever
    assert model.throttle.timeout_s > 0.3 and "is overloaded" in caplog.text
    while model.throttle.concurrency < 8:
        assert all(result[0].text == "xxx" for result in model.generate([make_request(str(n)) for n in range(8)]))
    wait_until(lambda: script.active == 0)
    assert server.requests and script.num_finished > 8


def test_long_completions_of_a_slow_server_are_finished_in_one_attempt_each(server):
    """Each completion takes longer than the timeout: an unstreamed request would time out at every attempt."""
    release = threading.Semaphore(0)

    def stream(text):
        for event in make_events(make_chat_completion(text)):
            release.acquire()
            yield event

    server.script = lambda n, request: (200, stream(request["messages"][0]["content"] * 12), EVENT_STREAM)
    model = make_endpoint(server, timeout_s=5.0, concurrency=4)
    finished = threading.Event()

    def tick():
        while not finished.is_set():
            release.release(4)
            time.sleep(0.01)  # the speed of the server: four events in this time

    ticker = threading.Thread(target=tick)
    ticker.start()
    try:
        results = model.generate([make_request(letter) for letter in "abcd"])
    finally:
        finished.set()
        ticker.join()
    assert [result[0].text for result in results] == [letter * 12 for letter in "abcd"]
    assert len(server.requests) == 4
