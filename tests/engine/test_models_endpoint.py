"""Endpoints against a loopback server that behaves in several ways and misbehaves; test_models_served has a real one."""

import contextlib
import email.utils
import logging
import math
import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import ModelUnreachable, PermanentRecordError, UsageError
from engine.models import open_model
from engine.models.endpoint import (
    Endpoint,
    ServerCapabilities,
    TransientError,
    count_votes,
    get_api_key_variable,
    parse_chat_completion,
    parse_generation,
    parse_option_scores,
    parse_retry_after,
    parse_vote,
    replace_surrogates,
)
from engine.models.interface import NO_USAGE, Generation, GenerationRequest, Usage
from engine.models.probe import NO_THINKING_BODY, PREFILL_BODIES, TOKEN_IDS_BODIES, UNMODIFIED_SAMPLING_BODY
from schemas.records import ChatMessage
from tests.support.chat_server import (
    CUT_CONNECTION,
    STANDARD_FIELDS,
    VLLM_FIELDS,
    FakeChatServer,
    make_chat_completion,
    make_script,
)

KEY = "sk-very-secret"
SCORING = ServerCapabilities(prefill_body=PREFILL_BODIES[0], max_top_logprobs=20)


def ask(text="hi", prefill=""):
    return GenerationRequest((ChatMessage(role="user", content=text),), prefill, 7)


@pytest.fixture
def server():
    served = FakeChatServer()
    yield served
    served.close()


def endpoint(server, **more):
    quick = {
        "backoff_range_s": (0.01, 0.02),
        "retry_timeout_s": 5.0,
        "timeout_s": 2.0,
        "cached_server_capabilities": SCORING,
    }
    return Endpoint(server.url, "m", KEY, **quick | more)


# What a server can do


def test_a_server_that_can_do_everything_is_asked_once(server):
    server.script = make_script(
        accepted_fields=VLLM_FIELDS, prefill_support="told", processed_logprobs=True, returns_token_ids=True
    )
    model = endpoint(server, cached_server_capabilities=None)
    assert model.server_capabilities == ServerCapabilities(
        extra_body=NO_THINKING_BODY | UNMODIFIED_SAMPLING_BODY,
        prefill_body=PREFILL_BODIES[0],
        max_top_logprobs=3,
        processed_logprobs=True,
        token_ids_body=TOKEN_IDS_BODIES[0],
        unmodified_sampling=True,
    )
    asked = len(server.requests)
    model.score_options([ask()], ("A", "B"))
    able = model.capabilities
    assert len(server.requests) == asked + 1 and able.prefill and able.logprobs and able.exact_logprobs and able.num_votes == 0
    assert all(body["max_tokens"] <= 12 for body in server.request_bodies)


@pytest.mark.parametrize(
    ("like", "expected"),
    [
        ({}, ServerCapabilities(max_top_logprobs=3)),  # a strict hosted one: no extension, and no prefill
        ({"max_top_logprobs": 5}, ServerCapabilities(max_top_logprobs=3)),
        ({"max_top_logprobs": 2}, ServerCapabilities()),  # too few to be worth anything
        (
            {"prefill_support": "always", "processed_logprobs": True},
            ServerCapabilities(prefill_body={}, max_top_logprobs=3, processed_logprobs=True),
        ),
        ({"accepted_fields": STANDARD_FIELDS - {"logprobs", "top_logprobs"}}, ServerCapabilities()),
        ({"logprobs": False}, ServerCapabilities()),  # ignored in silence
        (
            {"accepted_fields": STANDARD_FIELDS - {"max_tokens"} | {"max_completion_tokens"}},
            ServerCapabilities(max_tokens_field="max_completion_tokens", max_top_logprobs=3),
        ),
        ({"accepted_fields": STANDARD_FIELDS - {"seed"}}, ServerCapabilities(max_top_logprobs=3, supports_seed=False)),
    ],
)
def test_what_a_server_cannot_do_is_found_out(server, like, expected):
    server.script = make_script(**like)
    assert endpoint(server, cached_server_capabilities=None).server_capabilities == expected


def test_a_server_that_breaks_at_an_extension_cannot_do_it_and_one_that_is_busy_still_can(server):
    able = make_script(accepted_fields=VLLM_FIELDS, prefill_support="told")

    def script(number, request):
        if "chat_template_kwargs" in request:
            return 500, b"Internal Server Error"
        return (503, b"busy") if number % 2 else able(number, request)

    server.script = script
    dialect = endpoint(server, cached_server_capabilities=None).server_capabilities
    assert (dialect.extra_body, dialect.prefill_body, dialect.max_top_logprobs) == (
        UNMODIFIED_SAMPLING_BODY,
        PREFILL_BODIES[0],
        3,
    )


def test_what_it_cannot_do_is_told(server, caplog):
    server.script = lambda n, request: (200, make_chat_completion("<think>hm", token_counts=None))
    with caplog.at_level(logging.WARNING, "charter.endpoint"):
        assert endpoint(server, cached_server_capabilities=None).capabilities.num_votes > 0
    told = " ".join(caplog.messages)
    assert all(
        words in told
        for words in ("prefilled assistant message", "votes", "goes on thinking", "four characters", "does not sample")
    )


def test_a_server_that_serves_nothing_is_away_and_not_judged(server):
    server.script = lambda n, request: (503, b"loading")
    model = endpoint(server, cached_server_capabilities=None, retry_timeout_s=0.1)
    with pytest.raises(ModelUnreachable):
        model.score_options([ask()], ("A", "B"))
    server.script = lambda n, request: (400, f"no such {KEY}".encode())
    with pytest.raises(ModelUnreachable, match=r"refuses a plain request(.|\n)*no such \*\*\*"):
        model.score_options([ask()], ("A", "B"))
    server.script = make_script()
    assert model.score_options([ask()], ("A", "B"))[0].option_mass == pytest.approx(0.9)


# Requests


def test_samples_sampling_and_the_key_are_sent(server):
    server.script = lambda n, request: (200, make_chat_completion(request["messages"][0]["content"], "length"))
    answers = endpoint(server).generate([ask("a"), ask("b")], num_completions=2, temperature=0.5, top_p=0.9, max_tokens=11)
    assert [[g.text for g in a] for a in answers] == [["a", "a"], ["b", "b"]]
    assert answers[0][0].finish_reason == "length" and answers[0][0].token_ids == ()
    path, key, request = server.requests[0]
    assert (path, key) == ("/v1/chat/completions", f"Bearer {KEY}")
    assert (request["model"], request["temperature"], request["top_p"], request["max_tokens"]) == ("m", 0.5, 0.9, 11)
    assert len({r["seed"] for r in server.request_bodies}) == 2


def test_a_prefill_asks_the_server_to_go_on_or_is_an_error(server):
    endpoint(server).generate([ask(prefill="Answer: (")])
    request = server.request_bodies[0]
    assert request["messages"][-1] == {"role": "assistant", "content": "Answer: ("}
    assert request["continue_final_message"] is True and request["add_generation_prompt"] is False
    with pytest.raises(UsageError, match="prefilled assistant message"):
        endpoint(server, cached_server_capabilities=ServerCapabilities(max_top_logprobs=20)).score_options(
            [ask(prefill="Answer: (")], ("A", "B")
        )


def test_exact_tokens_are_passed_on_where_they_are_exact(server):
    server.script = make_script(accepted_fields=VLLM_FIELDS, returns_token_ids=True)
    full = ServerCapabilities(
        extra_body=UNMODIFIED_SAMPLING_BODY, max_top_logprobs=20, token_ids_body=TOKEN_IDS_BODIES[0], unmodified_sampling=True
    )
    ((one,),) = endpoint(server, cached_server_capabilities=full).generate([ask()])
    assert (one.prompt_token_ids, one.token_ids, one.logprobs) == ((1, 2, 3), (7, 8, 2), (-0.5, -0.5, -0.5))
    assert one.usage == Usage(3, 2) and server.request_bodies[0]["top_k"] == -1
    # Raw log-probabilities are not those of another temperature; those of a cut vocabulary never are.
    for how, processed in [({"temperature": 0.5}, False), ({"top_p": 0.9}, True), ({"temperature": 0.0}, True)]:
        known = ServerCapabilities(
            max_top_logprobs=20, token_ids_body=TOKEN_IDS_BODIES[0], unmodified_sampling=True, processed_logprobs=processed
        )
        ((one,),) = endpoint(server, cached_server_capabilities=known).generate([ask()], **how)
        assert one.token_ids == (7, 8, 2) and one.logprobs == ()
    known = ServerCapabilities(
        max_top_logprobs=20, token_ids_body=TOKEN_IDS_BODIES[0], unmodified_sampling=True, processed_logprobs=True
    )
    assert endpoint(server, cached_server_capabilities=known).generate([ask()], temperature=0.5)[0][0].logprobs
    hidden_cut = ServerCapabilities(max_top_logprobs=20, token_ids_body=TOKEN_IDS_BODIES[0])
    assert endpoint(server, cached_server_capabilities=hidden_cut).generate([ask()])[0][0].logprobs == ()


def test_tokens_named_by_their_ids_are_read_and_misaligned_ones_are_not():
    named = [{"token": "token_id:11", "logprob": -1.0}, {"token": "token_id:2", "logprob": 1e-9}]
    answer = make_chat_completion("x")
    answer["choices"][0]["logprobs"] = {"content": named}
    one = parse_generation(answer, NO_USAGE)
    assert (one.token_ids, one.logprobs) == ((11, 2), (-1.0, 0.0))
    answer["choices"][0]["token_ids"] = [11, 2, 3]
    assert parse_generation(answer, NO_USAGE).logprobs == ()


def test_a_thought_is_no_part_of_an_answer():
    answer = make_chat_completion("<think>A or B? A.</think>\nB", finish_reason="content_filter")
    answer["choices"][0]["token_ids"] = [1, 2]
    one = parse_generation(answer, NO_USAGE)
    assert (one.text, one.token_ids, one.finish_reason) == ("B", (), "refused")
    assert parse_generation(make_chat_completion("<think>never ends"), NO_USAGE).text == ""


# Options


def shown(*top):
    return make_chat_completion("A", top_logprobs=top)


def test_options_sum_variants_and_bound_what_is_not_shown():
    half, quarter, eighth = math.log(0.5), math.log(0.25), math.log(0.125)
    one = parse_option_scores(shown(("A", half), (" A", quarter), ("x", eighth)), NO_USAGE, options=("A", "B"))
    # A has 0.75. B is at most 0.125, the smallest shown, and that is also what is left over: 1 - 0.875.
    assert one.logprobs == pytest.approx((math.log(0.75), eighth)) and one.option_mass == pytest.approx(0.875)
    # What the shown tokens leave over is less than the smallest: 1 - 0.6 - 0.3 = 0.1.
    one = parse_option_scores(shown(("A", math.log(0.6)), ("x", math.log(0.3))), NO_USAGE, options=("A", "B"))
    assert one.logprobs == pytest.approx((math.log(0.6), math.log(0.1))) and one.option_mass == pytest.approx(0.7)
    # Two options that are not shown share what is left over.
    one = parse_option_scores(shown(("A", math.log(0.6)), ("x", math.log(0.3))), NO_USAGE, options=("A", "B", "C"))
    assert one.logprobs[1:] == pytest.approx((math.log(0.05), math.log(0.05))) and one.option_mass == pytest.approx(0.7)


@pytest.mark.parametrize("top", [[("The", -0.7)], [("The", -1.0), ("One", -1.1)], [], [("A", float("nan"))]])
def test_where_no_option_is_shown_the_mass_is_nothing_however_large_the_bound(top):
    one = parse_option_scores(shown(*top), NO_USAGE, options=("A", "B"))
    assert one.option_mass == 0 and one.logprobs[0] == one.logprobs[1]


@given(st.lists(st.tuples(st.sampled_from(["A", " B", "(A", "x", ""]), st.floats(-1000, 1)), max_size=20))
def test_a_mass_is_a_probability_whatever_a_server_shows(top):
    one = parse_option_scores(shown(*top), NO_USAGE, options=("A", "B"))
    assert 0 <= one.option_mass <= 1 and all(value <= math.log(20) and not math.isnan(value) for value in one.logprobs)


def test_votes_are_shares_of_replies_that_are_an_option_and_nothing_else(server):
    said = ["A", "(A)", "Answer: (A)", "**A**", "A.", "A\nbecause", "B)", "b", "A better one", "AB", "I would say (B)", ""]
    found = [parse_vote(text, ("A", "B")) for text in said]
    assert found == ["A"] * 6 + ["B"] + [None] * 5
    one = count_votes([Generation(text, "stop", reported_usage=Usage(5, 1)) for text in said], ("A", "B"))
    assert one.logprobs == pytest.approx((math.log(6 / 12), math.log(1 / 12))) and one.option_mass == pytest.approx(7 / 12)
    assert one.usage == Usage(60, 12)
    assert one.unparsed_replies == ("b", "A better one", "AB", "I would say (B)", "")
    silent = count_votes([Generation("no", "stop")], ("A", "B"))
    assert silent.logprobs == (-math.inf, -math.inf) and silent.option_mass == 0
    replies = iter(["A", "A", "A", "B"] * 2)
    server.script = lambda n, request: (200, make_chat_completion(next(replies)))
    (one,) = endpoint(server, cached_server_capabilities=ServerCapabilities(), concurrency=1).score_options([ask()], ("A", "B"))
    assert math.exp(one.logprobs[0]) == pytest.approx(0.75) and len({body["seed"] for body in server.request_bodies}) == 8


def test_a_request_without_log_probabilities_is_no_label(server):
    (one,) = endpoint(server).score_options([ask()], ("A", "B"))
    assert one.option_mass == 0


# Trouble


@pytest.mark.parametrize(
    "trouble",
    [
        (429, {}), (500, {}), (503, b"busy"), (200, b"no json"), (200, b"[" * 100_000), (200, {"choices": []}), (200, [1]),
        (200, {"choices": [{"message": {"content": [1]}}]}), (302, b""), (200, b"\xff"), CUT_CONNECTION,
    ],
)  # fmt: skip
def test_trouble_that_passes_is_tried_again(server, trouble):
    server.script = lambda n, request: trouble if n <= 2 else (200, make_chat_completion("at last"))
    assert endpoint(server).generate([ask()])[0][0].text == "at last"
    assert len(server.requests) == 3


def test_trouble_that_stays_is_the_servers_and_not_the_records(server):
    server.script = lambda n, request: (500, {})
    with pytest.raises(ModelUnreachable, match="does not answer"):
        endpoint(server, retry_timeout_s=0.2).generate([ask()])


def test_a_huge_answer_is_cut_off_and_one_that_trickles_in_too(server):
    server.script = lambda n, request: (
        (200, make_chat_completion("x" * 17_000_000)) if n == 1 else (200, make_chat_completion("short"))
    )
    assert endpoint(server, timeout_s=30).generate([ask()])[0][0].text == "short"
    over = threading.Event()
    server.script = lambda n, request: (200, (b" " for _ in range(500) if not over.wait(0.02)))
    try:
        with pytest.raises(ModelUnreachable, match="not complete"):
            endpoint(server, timeout_s=0.2, retry_timeout_s=0.1).generate([ask()])
    finally:
        over.set()


def test_a_server_that_is_away_or_slow_is_unreachable(server):
    with pytest.raises(ModelUnreachable):
        Endpoint("http://127.0.0.1:9/v1", "m", retry_timeout_s=0.2, backoff_range_s=(0.01, 0.02)).generate([ask()])
    release = threading.Event()
    server.script = lambda n, request: release.wait(5) and (200, make_chat_completion("late"))
    try:
        with pytest.raises(ModelUnreachable, match="Timeout"):
            endpoint(server, timeout_s=0.1, retry_timeout_s=0.3).generate([ask()])
    finally:
        release.set()


def test_a_text_that_takes_too_long_ends_with_timeout_while_the_server_answers_others(server):
    over = threading.Event()

    def script(n, request):
        slow = request["messages"][0]["content"] == "slow"
        return 200, (b" " for _ in range(500) if not over.wait(0.02)) if slow else make_chat_completion(
            "x", token_counts=(3, 1)
        )

    server.script = script
    slow = GenerationRequest((ChatMessage(role="user", content="slow"),), timeout_s=0.1)
    try:
        ((late,), (other,)) = endpoint(server).generate([slow, ask("quick")])
    finally:
        over.set()
    assert (late.text, late.finish_reason, other.finish_reason) == ("", "timeout", "stop")
    server.script = lambda n, request: server_cut.wait(0.1) and CUT_CONNECTION
    server_cut = threading.Event()
    with pytest.raises(ModelUnreachable):  # away is no timeout
        endpoint(server, retry_timeout_s=0.3).generate([slow])


def test_a_refusal_is_told_from_an_answer():
    answer = make_chat_completion(None)
    answer["choices"][0]["message"] |= {"content": "", "refusal": "I will not."}
    one = parse_generation(answer, NO_USAGE)
    assert (one.text, one.finish_reason) == ("I will not.", "refused")
    assert [parse_generation(make_chat_completion("x", finish), NO_USAGE).finish_reason for finish in ("stop", "length", "tool_calls", None)] == [
        "stop", "length", "unknown", "unknown",
    ]  # fmt: skip


def test_a_refused_request_is_the_records_fault_and_the_key_is_not_repeated(server):
    server.script = lambda n, request: (400, f"bad request with {KEY}".encode())
    with pytest.raises(PermanentRecordError) as caught:
        endpoint(server).generate([ask()])
    assert "bad request" in str(caught.value) and KEY not in str(caught.value)
    server.script = lambda n, request: (401, b"x" * 290 + f"wrong key {KEY}".encode())
    with pytest.raises(ModelUnreachable, match="401") as caught:
        endpoint(server).generate([ask()])
    assert KEY[:8] not in str(caught.value) and KEY not in repr(endpoint(server))


def test_retry_after_holds_every_request_back(server):
    server.script = lambda n, request: (429, b"", {"Retry-After": "1"}) if n == 1 else (200, make_chat_completion("x"))
    model, started = endpoint(server, concurrency=1), time.monotonic()
    model.generate([ask("a"), ask("b")])
    assert time.monotonic() - started >= 0.9 and len(server.requests) == 3
    server.script = lambda n, request: (503, b"", {"Retry-After": "3600"})
    for _ in range(2):  # the second time nobody is even asked
        with pytest.raises(ModelUnreachable, match="left alone"):
            model.generate([ask()])
    assert len(server.requests) == 4


def test_what_a_retry_after_header_says():
    assert parse_retry_after("7") == 7 and parse_retry_after(
        email.utils.formatdate(time.time() + 60, usegmt=True)
    ) == pytest.approx(60, abs=2)
    assert [parse_retry_after(text) for text in ("", "soon", "-1", "1e9", "²", "9" * 40, "Wed, 21 Oct 2015 07:28:00 GMT")] == [
        0
    ] * 7


def test_requests_run_side_by_side_up_to_the_limit(server):
    barrier = threading.Barrier(4)
    server.script = lambda n, request: (barrier.wait(5) >= 0) and (200, make_chat_completion("x"))
    endpoint(server, concurrency=4, timeout_s=10).generate([ask(str(n)) for n in range(12)])
    assert server.max_active == 4


# Tokens


def test_tokens_of_failed_tries_are_counted_with_the_next_answer(server):
    broken = {"choices": [], "usage": {"prompt_tokens": 100, "completion_tokens": 10}}
    server.script = lambda n, request: (200, broken) if n <= 2 else (200, make_chat_completion("x", token_counts=(3, 2)))
    model = endpoint(server)
    assert model.generate([ask()])[0][0].usage == Usage(203, 22)
    assert model.generate([ask()])[0][0].usage == Usage(3, 2)


def test_tokens_of_answers_that_a_failing_batch_throws_away_are_counted_too(server):
    def script(n, request):
        return (
            (400, b"no")
            if request["messages"][0]["content"] == "bad"
            else (200, make_chat_completion("x", token_counts=(3, 2)))
        )

    server.script = script
    model = endpoint(server, concurrency=1)
    with pytest.raises(PermanentRecordError):
        model.generate([ask("good"), ask("bad"), ask("good")])
    assert model.generate([ask("good")])[0][0].usage == Usage(9, 6)


def test_a_server_that_does_not_count_is_counted_for(server):
    server.script = lambda n, request: (200, make_chat_completion("four" * 3, token_counts=None))
    assert endpoint(server).generate([ask("12345678")])[0][0].usage == Usage(2, 3)
    server.script = lambda n, request: (200, make_chat_completion("x", token_counts=(-1, True)))
    assert endpoint(server).generate([ask("12345678")])[0][0].usage == Usage(2, 0)


# Addresses and bytes


def test_an_address_must_name_a_model_and_hold_no_key(monkeypatch):
    for bad in (
        "http://127.0.0.1:9/v1",
        "http://user:secret@127.0.0.1/v1#m",
        "http://127.0.0.1/v1?key=secret#m",
        "http://host:port/v1#m",
        "http:///v1#m",
    ):
        with pytest.raises(UsageError) as caught:
            open_model(bad)
        assert "secret" not in str(caught.value)
    monkeypatch.setenv("MY_KEY", KEY)
    opened = open_model("http://127.0.0.1:9/v1/#m", api_key_env="MY_KEY")
    assert (opened.url, opened.id, opened.api_key) == ("http://127.0.0.1:9/v1", "m", KEY)


@pytest.mark.parametrize(
    ("named", "variable"),
    [
        ("KEY", "KEY"),
        ("api.example=HOSTED, localhost:8000=OWN", "OWN"),
        ("localhost=OWN,KEY", "OWN"),
        ("KEY, localhost=", ""),  # this one gets none
        ("api.example=HOSTED", ""),
        ("localhost:8001=OTHER,KEY", "KEY"),
        ("", ""),
    ],
)
def test_a_server_gets_its_own_key_and_never_anothers(named, variable, monkeypatch):
    assert get_api_key_variable("http://localhost:8000/v1", named) == variable
    for name in ("KEY", "OWN", "HOSTED", "OTHER"):
        monkeypatch.setenv(name, f"secret of {name}")
    opened = open_model("http://localhost:8000/v1#m", api_key_env=named)
    assert opened.api_key == (f"secret of {variable}" if variable else "")
    assert ("authorization" in opened.client.headers) == bool(variable)


@given(st.binary(max_size=200))
def test_any_bytes_are_an_answer_or_none(data):
    with contextlib.suppress(TransientError):
        parse_chat_completion(data)


def test_lone_surrogates_are_made_readable():
    assert replace_surrogates("a\ud800b") == "a�b" and replace_surrogates("\ud83d\ude00") == "😀"
