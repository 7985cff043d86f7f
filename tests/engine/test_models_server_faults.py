"""Servers that fail for one request, for a while, or for ever: what is kept, what is repeated, and what the log says."""

import logging
import threading
import time

import pytest

from engine.errors import ModelUnreachable, PermanentRecordError, RequestFailed, UsageError
from engine.models import open_model
from engine.models.chat_api import ServerCapabilities
from engine.models.endpoint import Endpoint
from engine.models.interface import NO_USAGE, GenerationRequest, Usage
from engine.models.paid_responses import PaidResponses
from engine.models.probe import PREFILL_BODIES
from engine.models.server_health import ServerHealth
from engine.models.throttle import Slot, Throttle
from schemas.records import ChatMessage
from tests.support.chat_server import CUT_CONNECTION, FakeChatServer, make_chat_completion
from tests.support.waiting import HANG_S

KEY = "sk-very-secret"
SCORING = ServerCapabilities(prefill_body=PREFILL_BODIES[0], max_top_logprobs=20)


@pytest.fixture
def server():
    server = FakeChatServer()
    yield server
    server.close()


def make_endpoint(server, **options):
    defaults = {
        "backoff_range_s": (0.01, 0.02), "retry_timeout_s": HANG_S, "timeout_s": HANG_S, "cached_server_capabilities": SCORING,
    }  # fmt: skip
    return Endpoint(server.url, "m", KEY, **defaults | options)


def make_request(text, group="", **options):
    return GenerationRequest((ChatMessage(role="user", content=text),), group=group, **options)


def get_text(request):
    return request["messages"][0]["content"]


def count_requests(server, text):
    return sum(get_text(request) == text for request in server.request_bodies)


def answer(request):
    return 200, make_chat_completion(f"answer to {get_text(request)}", token_counts=(3, 2))


def never_answer(fault):
    """Return the script of a server that answers everything except the text "bad"."""
    return lambda n, request: fault if get_text(request) == "bad" else answer(request)


# One request that a server can never answer


@pytest.mark.parametrize(
    "fault",
    [
        (500, b"Out of range float values"), (502, b""), (504, b""), (200, {"error": {"message": "no"}}), (200, {"choices": []}),
        (200, {"choices": [{"message": {"role": "assistant"}}]}), (200, b"<html>"), CUT_CONNECTION,
        (403, b"flagged"), (404, b"no route"), (402, b"too long for this plan"), (451, b"blocked"),
        (200, {"choices": [{"message": {"content": "half"}, "finish_reason": "abort"}]}),
        (200, {"choices": [{"message": {"content": "half"}, "error": {"code": 502}, "finish_reason": "stop"}]}),
        (200, {"choices": [{"message": {"content": [{"type": "image_url", "image_url": "x"}]}}]}),
    ],
)  # fmt: skip
def test_request_that_fails_alone_is_a_failure_of_its_record(server, fault):
    server.script = never_answer(fault)
    first, error, last = make_endpoint(server).generate([make_request("a"), make_request("bad"), make_request("b")])
    assert (first[0].text, last[0].text) == ("answer to a", "answer to b")
    assert isinstance(error, RequestFailed) and "answers others" in str(error) and len(str(error).splitlines()) == 3
    assert count_requests(server, "a") == count_requests(server, "b") == 1 and count_requests(server, "bad") <= 3
    # Also if it is the only request: a small request shows that the server answers.
    (error,) = make_endpoint(server).generate([make_request("bad")])
    assert isinstance(error, RequestFailed)


@pytest.mark.parametrize(
    "logprobs", [float("nan"), [-0.1], {"tokens": ["x"]}, {"content": {"x": -0.1}}, {"content": [{"top_logprobs": {"A": 0}}]}]
)
def test_log_probabilities_in_another_form_do_not_fail_a_batch(server, logprobs):
    choice = {"message": {"content": "A"}, "finish_reason": "stop", "logprobs": logprobs}
    server.script = lambda n, request: (200, {"choices": [choice]})
    model = make_endpoint(server)
    assert model.generate([make_request("a")])[0][0].text == "A"
    assert model.score_options([make_request("a")], ["A", "B"])[0].option_mass == 0.0


def test_request_that_hangs_alone_is_a_failure_of_its_record(server):
    release = threading.Event()
    server.script = lambda n, request: (
        (release.wait(HANG_S) and CUT_CONNECTION) if get_text(request) == "bad" else answer(request)
    )
    try:
        model = make_endpoint(server, timeout_s=0.3)
        (alone,) = model.generate([make_request("bad")])
        good, again = model.generate([make_request("a"), make_request("bad")])
    finally:
        release.set()
    assert good[0].text == "answer to a"
    assert isinstance(alone, RequestFailed) and isinstance(again, RequestFailed)
    assert "0.3 s" in alone.why and model.throttle.timeout_s > 0.6  # each attempt has more time


@pytest.mark.parametrize("fault", [(429, b"slow down"), (503, b"loading"), (529, b"overloaded")])
def test_overload_is_never_a_failure_of_a_record(server, fault):
    server.script = lambda n, request: (
        fault if get_text(request) == "unlucky" and count_requests(server, "unlucky") <= 5 else answer(request)
    )
    results = make_endpoint(server).generate([make_request("a"), make_request("unlucky")])
    assert [result[0].text for result in results] == ["answer to a", "answer to unlucky"]


def test_dead_server_ends_all_requests_of_a_batch_at_one_deadline(server):
    server.script = lambda n, request: (503, b"loading")
    model, started = make_endpoint(server, retry_timeout_s=0.3, concurrency=1), time.monotonic()
    results = model.generate([make_request(str(n)) for n in range(20)])
    assert all(isinstance(result, ModelUnreachable) for result in results)
    assert time.monotonic() - started < 20 * 0.3 / 2  # far below one deadline for each request


# Paid responses


def test_paid_votes_are_kept_for_the_next_attempt_of_the_record(server):
    broken = threading.Event()

    def script(n, request):
        if get_text(request) == "q" and request["seed"] == 5 and not broken.is_set():
            return 500, b"oh"
        return 200, make_chat_completion("A", token_counts=(10, 1))

    server.script = script
    model = make_endpoint(server, cached_server_capabilities=ServerCapabilities())
    other, failed = model.score_options([make_request("other", "g0"), make_request("q", "g1")], ("A", "B"))
    assert other.usage == Usage(80, 8) and isinstance(failed, RequestFailed)
    broken.set()
    before = count_requests(server, "q")
    (scores,) = model.score_options([make_request("q", "g1")], ("A", "B"))
    assert count_requests(server, "q") == before + 1  # only the vote that had failed
    assert scores.usage.completion_tokens >= 8 and scores.logprobs[0] == 0
    # A finished record does not give its responses to another attempt.
    model.score_options([make_request("q", "g1")], ("A", "B"))
    assert count_requests(server, "q") == before + 9


def test_responses_of_a_rejected_record_are_counted_elsewhere(server):
    server.script = lambda n, request: (400, b"no") if request.get("seed") == 1 else answer(request)
    model = make_endpoint(server, concurrency=1)
    (error,) = model.generate([make_request("q", "g")], num_completions=2)
    assert isinstance(error, PermanentRecordError)
    assert model.generate([make_request("next", seed=7)])[0][0].usage == Usage(6, 4)


def test_paid_responses_are_given_out_once_and_only_after_a_failure():
    paid = PaidResponses()
    assert paid.begin({"g"}) == NO_USAGE and paid.take("g", "k") is None
    paid.add("g", "k", {"n": 1}, Usage(1, 1))
    paid.begin({"g"})
    assert paid.take("g", "k") is None
    paid.mark_failed("g")
    paid.begin({"g"})
    assert paid.take("g", "k") == ({"n": 1}, Usage(1, 1)) and paid.take("g", "k") is None
    paid.add("g", "k", {"n": 1}, Usage(1, 1))
    paid.mark_failed("g")
    assert paid.begin({str(n) for n in range(600)}) == Usage(1, 1)  # dropped without a use
    assert paid.take("g", "k") is None and paid.forget("g") == NO_USAGE


# Load


class SlowServer:
    """A server that needs `work_s` for each request, one after another, also for those whose client has disconnected."""

    def __init__(self, work_s):
        self.work_s, self.lock = work_s, threading.Lock()

    def __call__(self, number, request):
        if get_text(request) == "Hello":
            return answer(request)
        with self.lock:
            time.sleep(self.work_s)
        return answer(request)


def test_server_that_is_too_slow_for_the_timeout_makes_progress(server, caplog):
    server.script = SlowServer(0.15)
    model = make_endpoint(server, timeout_s=0.2, concurrency=8)
    with caplog.at_level(logging.WARNING, "charter.endpoint"):
        results = model.generate([make_request(str(n)) for n in range(8)])
    assert [result[0].text for result in results] == [f"answer to {n}" for n in range(8)]
    assert model.throttle.timeout_s > 0.2
    log_text = " ".join(caplog.messages)
    assert "the timeout is 0.4 s now" in log_text and "the number of concurrent requests is 2 now" in log_text


def test_throttle_halves_once_per_overload_and_rises_with_responses():
    throttle = Throttle("s", 8, 10.0)
    assert throttle.concurrency == 4  # a slow server gets few requests at first
    for _ in range(9):
        throttle.note_response(0.1)
    assert throttle.concurrency == 8  # one more for each response, up to the maximum
    with throttle.acquire_slot() as first, throttle.acquire_slot() as second:
        assert first.was_alone and not second.was_alone and not throttle.is_idle
    throttle.note_overload(first)
    throttle.note_overload(second)  # it started before the decrease
    assert int(throttle.concurrency) == 4 and throttle.is_idle
    for _ in range(4):
        throttle.note_response(0.1)
    assert 4.8 < throttle.concurrency < 5  # one more for a whole round
    for _ in range(40):
        throttle.note_response(0.1)
    assert throttle.concurrency == 8
    for _ in range(5):
        throttle.note_overload(Slot(time.monotonic() + 1, 10.0, False))
    assert throttle.concurrency == 1
    for timeout_s in (10.0, 10.0, 20.0, 40.0, 80.0):
        throttle.note_timeout(Slot(0.0, timeout_s, False))
    assert throttle.timeout_s == 80.0


def test_throttle_rises_only_while_the_latency_holds():
    throttle = Throttle("s", 8, 10.0)
    for _ in range(20):
        throttle.note_response(6.0)
    assert throttle.concurrency == 4
    throttle.note_response(4.0)
    assert throttle.concurrency == 5


def test_raised_timeout_falls_back_to_the_setting_after_many_quick_responses(caplog):
    throttle = Throttle("s", 8, 10.0)
    throttle.note_timeout(Slot(0.0, 10.0, False))
    throttle.note_timeout(Slot(0.0, 20.0, False))
    caplog.clear()
    for latency_s in [1.0] * 63 + [15.0] + [1.0] * 63:
        throttle.note_response(latency_s)
    assert throttle.timeout_s == 40.0  # there are never 64 quick responses in a row
    with caplog.at_level(logging.WARNING, "charter.endpoint"):
        for _ in range(200):
            throttle.note_response(1.0)
    assert throttle.timeout_s == 10.0 and [line.rpartition(": ")[2] for line in caplog.messages] == [
        "the timeout is 20 s now", "the timeout is 10 s now",
    ]  # fmt: skip


def test_no_request_is_sent_before_retry_after_also_if_it_waited_for_its_slot(server):
    sent_at = []

    def script(n, request):
        sent_at.append(time.monotonic())
        return (429, b"", {"Retry-After": "1"}) if n == 1 else answer(request)

    server.script = script
    make_endpoint(server, concurrency=1).generate([make_request(str(n)) for n in range(3)])
    assert min(sent_at[1:]) - sent_at[0] > 0.9


# The log


def test_first_failure_is_logged_at_once_with_status_and_body(server, caplog):
    server.script = lambda n, request: (500, f"cannot load {KEY}\nsecond line".encode()) if n <= 2 else answer(request)
    with caplog.at_level(logging.WARNING, "charter.endpoint"):
        make_endpoint(server).generate([make_request("a")])
    (line,) = caplog.messages  # the second failure of the same kind is not repeated at once
    assert f"waiting for {server.url}#m: status 500: cannot load *** second line; 1 failed attempt, the next in" in line
    assert KEY not in line and "the stage pauses in 600 s" in line


def test_status_line_counts_down_at_intervals(caplog, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr("engine.models.server_health.time.monotonic", lambda: now[0])
    health = ServerHealth("http://s/v1#m")
    with caplog.at_level(logging.WARNING, "charter.endpoint"):
        for _ in range(60):
            health.note_failure("ConnectError", "ConnectError: refused", 1.0, 600.0)
            now[0] += 1
        assert [line.partition("the stage pauses ")[2] for line in caplog.messages] == [
            "in 600 s", "in 585 s", "in 570 s", "in 555 s",
        ]  # fmt: skip
        assert "16 failed attempts in 15 s" in caplog.messages[1]
        health.note_answer(started_at=1059.0)
        assert caplog.messages[-1] == "http://s/v1#m answers again, after 60 s"
        caplog.clear()
        with health.track_requests(4):
            for _ in range(100):
                now[0] += 1
                health.log_status()
        assert health.get_wait() is None  # no request waits
    assert caplog.messages[0] == "waiting for http://s/v1#m: no response for 30 s" and len(caplog.messages) == 2


# Wrong addresses, keys and settings


@pytest.mark.parametrize(
    ("location", "words"),
    [
        ("/real/v1/chat/completions", "/real/v1#m"),
        ("https://user:pw@api.example/v1/chat/completions?token=secret", "https://api.example/v1#m"),
        ("", "no Location"),
    ],
)
def test_redirect_is_reported_with_its_target(server, location, words):
    server.script = lambda n, request: (308, b"", {"Location": location} if location else {})
    (error,) = make_endpoint(server).generate([make_request("a")])
    assert isinstance(error, ModelUnreachable) and "308" in error.what and words in str(error)
    assert "secret" not in str(error) and "pw" not in str(error) and count_requests(server, "a") == 1


def test_check_of_a_server_says_what_is_wrong_without_retries(server):
    model = make_endpoint(server, cached_server_capabilities=None)
    model.check_reachable()
    server.script = lambda n, request: (400, b"max_tokens is unknown")
    model.check_reachable()  # the probe tries other forms
    server.script = lambda n, request: (503, b"loading the model")
    with pytest.raises(ModelUnreachable, match="status 503: loading the model"):
        model.check_reachable()
    assert len(server.requests) == 3


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("sk-x\n", "line break"), ("sk\r-x", "line break"), ("“sk-x”", "U+201C"), ("sk-x\u200b", "U+200B"), ("\ufeffsk-x", "U+FEFF"),
        ("sk\tx", "U+0009"), (" sk-x", "space"), ("'sk-x'", "quotation marks"), ("Bearer sk-x", "Bearer"), ("sk-\x7fx", "U+007F"),
    ],
)  # fmt: skip
def test_key_that_cannot_be_sent_is_refused_without_showing_it(monkeypatch, key, words):
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with pytest.raises(UsageError) as caught:
        open_model("http://127.0.0.1:9/v1#m")
    assert (
        words in caught.value.why
        and "OPENAI_API_KEY" in caught.value.what
        and "sk" not in str(caught.value).replace("disk", "")
    )
    assert len(str(caught.value).splitlines()) == 3


def test_proxy_that_cannot_be_used_is_a_usage_error(monkeypatch):
    monkeypatch.setenv("ALL_PROXY", "socks://user:secret@127.0.0.1:7890/")
    with pytest.raises(UsageError, match="ALL_PROXY") as caught:
        open_model("http://127.0.0.1:9/v1#m")
    assert "secret" not in str(caught.value)
    with pytest.raises(UsageError, match="ALL_PROXY"):
        open_model("nobody/no-model")
