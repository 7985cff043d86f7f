"""Endpoints with a fake server on loopback, correct and faulty; test_models_served uses a real server."""

import contextlib
import email.utils
import json
import logging
import math
import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from consumers.compare import AnswerMode, Question
from engine.errors import ModelUnreachable, PermanentRecordError, UsageError
from engine.models import open_model
from engine.models.chat_api import (
    ServerCapabilities,
    TransientError,
    count_votes,
    parse_chat_completion,
    parse_generation,
    parse_option_scores,
    parse_retry_after,
    parse_vote,
    replace_surrogates,
)
from engine.models.endpoint import Endpoint, get_api_key_variable
from engine.models.interface import NO_USAGE, Generation, GenerationRequest, Usage, require_results
from engine.models.probe import NO_THINKING_BODY, PREFILL_BODIES, TOKEN_IDS_BODIES, UNMODIFIED_SAMPLING_BODY
from schemas.records import ChatMessage, Outcome
from tests.support.chat_server import (
    CUT_CONNECTION,
    STANDARD_FIELDS,
    VLLM_FIELDS,
    FakeChatServer,
    make_chat_completion,
    make_script,
)
from tests.support.waiting import HANG_S

KEY = "sk-very-secret"
SCORING = ServerCapabilities(prefill_body=PREFILL_BODIES[0], max_top_logprobs=20)


def make_request(text="hi", prefill=""):
    return GenerationRequest((ChatMessage(role="user", content=text),), prefill, 7)


@pytest.fixture
def server():
    server = FakeChatServer()
    yield server
    server.close()


def make_endpoint(server, **options):
    defaults = {
        "backoff_range_s": (0.01, 0.02),
        "retry_timeout_s": HANG_S,
        "timeout_s": HANG_S,
        "cached_server_capabilities": SCORING,
    }
    return Endpoint(server.url, "m", KEY, **defaults | options)


# Server capabilities


def test_capabilities_of_a_full_server_are_probed_once(server):
    server.script = make_script(
        accepted_fields=VLLM_FIELDS, prefill_support="requested", processed_logprobs=True, returns_token_ids=True
    )
    model = make_endpoint(server, cached_server_capabilities=None)
    assert model.server_capabilities == ServerCapabilities(
        extra_body=NO_THINKING_BODY | UNMODIFIED_SAMPLING_BODY,
        prefill_body=PREFILL_BODIES[0],
        max_top_logprobs=3,
        processed_logprobs=True,
        token_ids_body=TOKEN_IDS_BODIES[0],
        unmodified_sampling=True,
    )
    num_requests = len(server.requests)
    model.score_options([make_request()], ("A", "B"))
    capabilities = model.capabilities
    assert len(server.requests) == num_requests + 1 and capabilities.num_votes == 0
    assert capabilities.prefill and capabilities.logprobs and capabilities.exact_logprobs
    assert sorted(body.get("max_tokens", 0) for body in server.request_bodies)[-2:] == [12, 128]  # 128 to see reasoning


@pytest.mark.parametrize(
    ("server_options", "expected"),
    [
        ({}, ServerCapabilities(max_top_logprobs=3)),  # a strict hosted server: no extensions and no prefill
        ({"max_top_logprobs": 5}, ServerCapabilities(max_top_logprobs=3)),
        ({"max_top_logprobs": 2}, ServerCapabilities()),  # too few to be useful
        (
            {"prefill_support": "always", "processed_logprobs": True},
            ServerCapabilities(prefill_body={}, max_top_logprobs=3, processed_logprobs=True),
        ),
        ({"accepted_fields": STANDARD_FIELDS - {"logprobs", "top_logprobs"}}, ServerCapabilities()),
        ({"logprobs": False}, ServerCapabilities()),  # silently ignored
        (
            {"accepted_fields": STANDARD_FIELDS - {"max_tokens"} | {"max_completion_tokens"}},
            ServerCapabilities(max_tokens_field="max_completion_tokens", max_top_logprobs=3),
        ),
        ({"accepted_fields": STANDARD_FIELDS - {"seed"}}, ServerCapabilities(max_top_logprobs=3, supports_seed=False)),
    ],
)
def test_probe_detects_missing_capabilities(server, server_options, expected):
    server.script = make_script(**server_options)
    assert make_endpoint(server, cached_server_capabilities=None).server_capabilities == expected


@pytest.mark.parametrize("streams", [False, True])
def test_prefilled_message_that_a_server_repeats_is_removed(server, streams):
    server.script = make_script(prefill_support="echoed", streams=streams)
    model = make_endpoint(server, cached_server_capabilities=None)
    assert (model.server_capabilities.prefill_body, model.server_capabilities.echoes_prefill) == ({}, True)
    requests = [make_request(prefill="eleven: "), make_request()]
    ((first,), (second,)) = model.generate(requests)
    assert (first.text, second.text) == ("en, twelve", "one, two")


def test_probe_treats_a_failing_extension_as_missing_and_retries_a_busy_server(server):
    full_script = make_script(accepted_fields=VLLM_FIELDS, prefill_support="requested")

    def script(number, request):
        if "chat_template_kwargs" in request:
            return 500, b"Internal Server Error"
        return (503, b"busy") if number % 2 else full_script(number, request)

    server.script = script
    capabilities = make_endpoint(server, cached_server_capabilities=None).server_capabilities
    assert (capabilities.extra_body, capabilities.prefill_body, capabilities.max_top_logprobs) == (
        UNMODIFIED_SAMPLING_BODY,
        PREFILL_BODIES[0],
        3,
    )


def test_probe_finds_the_sampling_fields_that_a_server_accepts(server):
    def script(number, request):
        if "temperature" in request and "top_p" in request:
            return 400, b"`temperature` and `top_p` cannot both be specified"
        return make_script()(number, request)

    server.script = script
    model = make_endpoint(server, cached_server_capabilities=None)
    assert model.server_capabilities == ServerCapabilities(max_top_logprobs=3, top_p_with_temperature=False)
    del server.requests[:]
    require_results(model.generate([make_request()], temperature=0.5))
    require_results(model.generate([make_request()], top_p=0.9))
    require_results(model.score_options([make_request()], ("A", "B")))
    bodies = server.request_bodies
    assert [(body.get("temperature"), body.get("top_p")) for body in bodies] == [(0.5, None), (None, 0.9), (1.0, None)]
    with pytest.raises(UsageError, match="with both"):
        model.generate([make_request()], temperature=0.5, top_p=0.9)


@pytest.mark.parametrize("sends_temperature", [True, False])
def test_model_with_temperature_1_only_is_used_at_temperature_1(server, sends_temperature):
    def script(number, request):
        if "temperature" in request and (request["temperature"] != 1 or not sends_temperature):
            return 400, b"Unsupported value: 'temperature' does not support 0 with this model"
        return make_script(logprobs=False)(number, request)

    server.script = script
    model = make_endpoint(server, cached_server_capabilities=None)
    expected = ServerCapabilities(any_temperature=False, sends_temperature=sends_temperature)
    assert model.server_capabilities == expected and not model.capabilities.any_temperature
    del server.requests[:]
    require_results(model.generate([make_request()]))
    assert server.request_bodies[0].get("temperature") == (1.0 if sends_temperature else None)
    with pytest.raises(UsageError, match="sample at temperature"):
        model.generate([make_request()], temperature=0.5)
    (comparison,) = AnswerMode("letter").judge_questions(model, [Question((ChatMessage(role="user", content="?"),))])
    assert comparison.outcome is Outcome.UNPARSEABLE  # the reply is "one, two"


@pytest.mark.parametrize(
    "reply",
    [
        make_chat_completion("Let me think.\n</think>\n\none, two"),
        make_chat_completion("<thought>hm</thought>one"),
        make_chat_completion("<|channel|>analysis<|message|>hm"),
        make_chat_completion("", "length"),  # the server hides the reasoning
        make_chat_completion([{"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]}, {"type": "text", "text": "one"}]),
    ],
)  # fmt: skip
def test_probe_is_long_enough_to_notice_a_thinking_model(server, reply):
    server.script = lambda n, request: (200, reply if request["max_tokens"] > 16 else make_chat_completion("one"))
    model = make_endpoint(server, cached_server_capabilities=None)
    assert model.server_capabilities.thinks
    del server.requests[:]
    model.score_options([make_request()], ("A", "B"))
    assert min(body["max_tokens"] for body in server.request_bodies) > 1000  # a vote has room for the reasoning


def test_model_that_needs_more_tokens_than_the_probe_gives_is_probed_with_more(server):
    def script(number, request):
        if (request.get("max_tokens") or request["max_completion_tokens"]) < 100:
            return 400, b"max_tokens reached, try again with higher max_tokens"
        return 200, make_chat_completion("x")

    server.script = script
    assert make_endpoint(server, cached_server_capabilities=None).capabilities.num_votes > 0


def test_tokens_named_by_ids_are_scored_by_votes_with_a_warning(server, caplog):
    server.script = lambda n, request: (
        200, make_chat_completion("A", top_logprobs=[("token_id:32", -0.1), ("token_id:33", -2.0)] if request.get("logprobs") else None),
    )  # fmt: skip
    model = make_endpoint(server, cached_server_capabilities=None)
    with caplog.at_level(logging.WARNING, "charter.endpoint"):
        (scores,) = model.score_options([make_request()], ("A", "B"))
    assert scores.option_mass == 1 and scores.logprobs[0] == 0
    assert sum("token_id:N" in line for line in caplog.messages) == 1


def test_options_that_are_never_listed_are_reported_once(server, caplog):
    server.script = lambda n, request: (200, make_chat_completion("x", top_logprobs=[("b'A'", -0.1)]))
    with caplog.at_level(logging.WARNING, "charter.endpoint"):
        model = make_endpoint(server)
        for _ in range(9):
            model.score_options([make_request()] * 5, ("A", "B"))
    (line,) = caplog.messages
    assert "none of the options A, B was among the top tokens of 20 questions" in line


def test_no_request_has_a_seed_if_the_setting_is_off(server):
    server.script = lambda n, request: CUT_CONNECTION if "seed" in request else make_script()(n, request)
    model = make_endpoint(server, cached_server_capabilities=None, send_seed=False)
    require_results(model.generate([make_request()]))
    assert server.requests and not any("seed" in body for body in server.request_bodies)


def test_server_that_ignores_the_seed_is_refused_for_sampled_completions(server, caplog):
    def script(number, request):
        sampled = request["temperature"] > 0
        return 200, make_chat_completion(f"name {number}" if sampled else "one")

    server.script = script
    model = make_endpoint(server, cached_server_capabilities=None)
    with caplog.at_level(logging.WARNING, "charter.endpoint"), pytest.raises(UsageError, match="ignores the seed") as caught:
        model.generate([make_request()])
    assert len(str(caught.value).splitlines()) == 3 and "models.send_seed" in caught.value.fix
    assert sum("ignores the seed" in line for line in caplog.messages) == 1
    require_results(model.generate([make_request()], temperature=0.0))  # nothing is sampled
    accepted = make_endpoint(server, cached_server_capabilities=None, send_seed=False)
    require_results(accepted.generate([make_request()]))
    # A rounding difference in one of the repetitions does not mean that the seed is ignored.
    texts = iter(["a ship", "another ship", "a shin", "a ship"])
    server.script = lambda n, request: (200, make_chat_completion(next(texts) if "ship" in str(request["messages"]) else "one"))
    assert not make_endpoint(server, cached_server_capabilities=None).server_capabilities.ignores_seed


def test_content_in_parts_is_joined_without_its_reasoning():
    parts = [{"type": "thinking", "thinking": [{"type": "text", "text": "plan"}]}, {"type": "text", "text": "A "}, "bird."]
    reply = make_chat_completion(parts)
    reply["choices"][0]["token_ids"] = [1, 2]
    one = parse_generation(parse_chat_completion(json.dumps(reply).encode()), NO_USAGE)
    assert (one.text, one.reasoning) == ("A bird.", "plan")
    with pytest.raises(TransientError, match="image_url"):
        parse_chat_completion(json.dumps(make_chat_completion([{"type": "image_url"}])).encode())
    without_content = make_chat_completion("")
    without_content["choices"][0]["message"] = {"role": "assistant", "reasoning_content": "cut"}
    assert parse_generation(parse_chat_completion(json.dumps(without_content).encode()), NO_USAGE).text == ""


def test_missing_capabilities_are_logged(server, caplog):
    server.script = lambda n, request: (200, make_chat_completion("<think>hm", token_counts=None))
    with caplog.at_level(logging.WARNING, "charter.endpoint"):
        assert make_endpoint(server, cached_server_capabilities=None).capabilities.num_votes > 0
    log_text = " ".join(caplog.messages)
    assert all(
        words in log_text
        for words in ("prefilled assistant message", "votes", "cannot turn thinking off", "four characters", "does not sample")
    )


def test_server_without_any_success_is_unreachable(server):
    server.script = lambda n, request: (503, b"loading")
    model = make_endpoint(server, cached_server_capabilities=None, retry_timeout_s=0.1)
    with pytest.raises(ModelUnreachable):
        model.score_options([make_request()], ("A", "B"))
    server.script = lambda n, request: (400, f"no such {KEY}".encode())
    with pytest.raises(ModelUnreachable, match=r"rejected a plain request(.|\n)*no such \*\*\*"):
        model.score_options([make_request()], ("A", "B"))
    server.script = make_script()
    assert model.score_options([make_request()], ("A", "B"))[0].option_mass == pytest.approx(0.9)


# Requests


def test_request_contains_the_sampling_parameters_and_the_api_key(server):
    server.script = lambda n, request: (200, make_chat_completion(request["messages"][0]["content"], "length"))
    completions = make_endpoint(server).generate(
        [make_request("a"), make_request("b")], num_completions=2, temperature=0.5, top_p=0.9, max_tokens=11
    )
    assert [[g.text for g in generations] for generations in completions] == [["a", "a"], ["b", "b"]]
    assert completions[0][0].finish_reason == "length" and completions[0][0].token_ids == ()
    path, key, request = server.requests[0]
    assert (path, key) == ("/v1/chat/completions", f"Bearer {KEY}")
    assert (request["model"], request["temperature"], request["top_p"], request["max_tokens"]) == ("m", 0.5, 0.9, 11)
    assert len({r["seed"] for r in server.request_bodies}) == 2


def test_prefill_is_sent_for_continuation_or_rejected(server):
    make_endpoint(server).generate([make_request(prefill="Answer: (")])
    request = server.request_bodies[0]
    assert request["messages"][-1] == {"role": "assistant", "content": "Answer: ("}
    assert request["continue_final_message"] is True and request["add_generation_prompt"] is False
    with pytest.raises(UsageError, match="prefilled assistant message"):
        make_endpoint(server, cached_server_capabilities=ServerCapabilities(max_top_logprobs=20)).score_options(
            [make_request(prefill="Answer: (")], ("A", "B")
        )


def test_token_ids_and_logprobs_are_returned_only_if_they_are_exact(server):
    server.script = make_script(accepted_fields=VLLM_FIELDS, returns_token_ids=True)
    full = ServerCapabilities(
        extra_body=UNMODIFIED_SAMPLING_BODY, max_top_logprobs=20, token_ids_body=TOKEN_IDS_BODIES[0], unmodified_sampling=True
    )
    ((one,),) = make_endpoint(server, cached_server_capabilities=full).generate([make_request()])
    assert (one.prompt_token_ids, one.token_ids, one.logprobs) == ((1, 2, 3), (7, 8, 2), (-0.5, -0.5, -0.5))
    assert one.usage == Usage(3, 2) and server.request_bodies[0]["top_k"] == -1
    # Raw log-probabilities are not exact at another temperature, and never with a truncated vocabulary.
    for sampling, processed in [({"temperature": 0.5}, False), ({"top_p": 0.9}, True), ({"temperature": 0.0}, True)]:
        capabilities = ServerCapabilities(
            max_top_logprobs=20, token_ids_body=TOKEN_IDS_BODIES[0], unmodified_sampling=True, processed_logprobs=processed
        )
        ((one,),) = make_endpoint(server, cached_server_capabilities=capabilities).generate([make_request()], **sampling)
        assert one.token_ids == (7, 8, 2) and one.logprobs == ()
    capabilities = ServerCapabilities(
        max_top_logprobs=20, token_ids_body=TOKEN_IDS_BODIES[0], unmodified_sampling=True, processed_logprobs=True
    )
    assert (
        make_endpoint(server, cached_server_capabilities=capabilities)
        .generate([make_request()], temperature=0.5)[0][0]
        .logprobs
    )
    without_unmodified_sampling = ServerCapabilities(max_top_logprobs=20, token_ids_body=TOKEN_IDS_BODIES[0])
    assert (
        make_endpoint(server, cached_server_capabilities=without_unmodified_sampling).generate([make_request()])[0][0].logprobs
        == ()
    )


def test_logprobs_by_token_id_are_parsed_unless_misaligned():
    token_logprobs = [{"token": "token_id:11", "logprob": -1.0}, {"token": "token_id:2", "logprob": 1e-9}]
    reply = make_chat_completion("x")
    reply["choices"][0]["logprobs"] = {"content": token_logprobs}
    one = parse_generation(reply, NO_USAGE)
    assert (one.token_ids, one.logprobs) == ((11, 2), (-1.0, 0.0))
    reply["choices"][0]["token_ids"] = [11, 2, 3]
    assert parse_generation(reply, NO_USAGE).logprobs == ()


def test_thinking_is_removed_from_the_completion():
    reply = make_chat_completion("<think>A or B? A.</think>\nB", finish_reason="content_filter")
    reply["choices"][0]["token_ids"] = [1, 2]
    one = parse_generation(reply, NO_USAGE)
    assert (one.text, one.reasoning, one.finish_reason) == ("B", "A or B? A.", "refused")
    cut = parse_generation(make_chat_completion("<think>never ends"), NO_USAGE)
    assert (cut.text, cut.reasoning, cut.ends_in_reasoning) == ("", "never ends", True)


@pytest.mark.parametrize(
    "fields",
    [
        {"reasoning_content": "plan"},
        {"reasoning": "plan"},
        {"thinking": "plan"},
        {"reasoning_details": [{"type": "reasoning.text", "text": "plan"}]},
    ],
)
def test_reasoning_in_a_field_of_the_message_is_kept_apart(fields):
    reply = make_chat_completion("Paris.")
    reply["choices"][0]["message"] |= fields
    one = parse_generation(reply, NO_USAGE)
    assert (one.text, one.reasoning, one.ends_in_reasoning) == ("Paris.", "plan", False)
    reply["choices"][0]["message"]["content"] = ""  # the server has cut the reasoning
    assert parse_generation(reply, NO_USAGE).ends_in_reasoning


def test_cut_reasoning_without_marks_is_known_from_another_completion(server):
    texts = {"a": ("Let me think.\n</think>\n\nParis.", "stop"), "b": ("Let me think about", "length"), "c": ("Rome.", "stop")}
    server.script = lambda n, request: (200, make_chat_completion(*texts[request["messages"][0]["content"]]))
    model = make_endpoint(server)
    ((before,),) = model.generate([make_request("b")])
    assert before.text == "Let me think about"  # nothing shows yet that the template writes the opening mark
    (one,), (cut,), (other,) = model.generate([make_request(name) for name in "abc"])
    assert (one.text, one.reasoning, other.text) == ("Paris.", "Let me think.", "Rome.")
    assert (cut.text, cut.reasoning, cut.ends_in_reasoning) == ("", "Let me think about", True)


def test_thinking_budget_turns_thinking_on_and_extends_the_limit(server):
    capabilities = ServerCapabilities(extra_body=NO_THINKING_BODY)
    for budget in (0, 50):
        make_endpoint(server, cached_server_capabilities=capabilities).generate(
            [make_request()], max_tokens=11, max_thinking_tokens=budget
        )
    off, on = server.request_bodies
    assert off["max_tokens"] == 11 and off["chat_template_kwargs"] == {"enable_thinking": False}
    assert on["max_tokens"] == 61 and on["chat_template_kwargs"]["enable_thinking"] is True


# Options


def make_scores_reply(*top):
    return make_chat_completion("A", top_logprobs=top)


def test_option_scores_sum_variants_and_bound_unlisted_options():
    half, quarter, eighth = math.log(0.5), math.log(0.25), math.log(0.125)
    one = parse_option_scores(make_scores_reply(("A", half), (" A", quarter), ("x", eighth)), NO_USAGE, options=("A", "B"))
    # A has 0.75. B is at most 0.125, the smallest listed value, which is also the remainder: 1 - 0.875.
    assert one.logprobs == pytest.approx((math.log(0.75), eighth)) and one.option_mass == pytest.approx(0.875)
    # The remainder is less than the smallest listed value: 1 - 0.6 - 0.3 = 0.1.
    one = parse_option_scores(make_scores_reply(("A", math.log(0.6)), ("x", math.log(0.3))), NO_USAGE, options=("A", "B"))
    assert one.logprobs == pytest.approx((math.log(0.6), math.log(0.1))) and one.option_mass == pytest.approx(0.7)
    # Two unlisted options share the remainder.
    one = parse_option_scores(make_scores_reply(("A", math.log(0.6)), ("x", math.log(0.3))), NO_USAGE, options=("A", "B", "C"))
    assert one.logprobs[1:] == pytest.approx((math.log(0.05), math.log(0.05))) and one.option_mass == pytest.approx(0.7)


@pytest.mark.parametrize("top", [[("The", -0.7)], [("The", -1.0), ("One", -1.1)], [], [("A", float("nan"))]])
def test_option_mass_is_zero_if_no_option_is_listed(top):
    one = parse_option_scores(make_scores_reply(*top), NO_USAGE, options=("A", "B"))
    assert one.option_mass == 0 and one.logprobs[0] == one.logprobs[1]


@given(st.lists(st.tuples(st.sampled_from(["A", " B", "(A", "x", ""]), st.floats(-1000, 1)), max_size=20))
def test_option_mass_is_always_a_probability(top):
    one = parse_option_scores(make_scores_reply(*top), NO_USAGE, options=("A", "B"))
    assert 0 <= one.option_mass <= 1 and all(value <= math.log(20) and not math.isnan(value) for value in one.logprobs)


def test_votes_count_only_replies_that_are_exactly_an_option(server):
    replies = ["A", "(A)", "Answer: (A)", "**A**", "A.", "A\nbecause", "B)", "b", "A better one", "AB", "I would say (B)", ""]
    votes = [parse_vote(text, ("A", "B")) for text in replies]
    assert votes == ["A"] * 6 + ["B"] + [None] * 5
    one = count_votes([Generation(text, "stop", reported_usage=Usage(5, 1)) for text in replies], ("A", "B"))
    assert one.logprobs == pytest.approx((math.log(6 / 12), math.log(1 / 12))) and one.option_mass == pytest.approx(7 / 12)
    assert one.usage == Usage(60, 12)
    assert one.unparsed_replies == ("b", "A better one", "AB", "I would say (B)", "")
    silent = count_votes([Generation("no", "stop")], ("A", "B"))
    assert silent.logprobs == (-math.inf, -math.inf) and silent.option_mass == 0
    replies = iter(["A", "A", "A", "B"] * 2)
    server.script = lambda n, request: (200, make_chat_completion(next(replies)))
    (one,) = make_endpoint(server, cached_server_capabilities=ServerCapabilities(), concurrency=1).score_options(
        [make_request()], ("A", "B")
    )
    assert math.exp(one.logprobs[0]) == pytest.approx(0.75) and len({body["seed"] for body in server.request_bodies}) == 8


def test_reply_without_log_probabilities_has_no_option_mass(server):
    (one,) = make_endpoint(server).score_options([make_request()], ("A", "B"))
    assert one.option_mass == 0


# Server faults


@pytest.mark.parametrize(
    "fault",
    [
        (429, {}), (500, {}), (503, b"busy"), (200, b"no json"), (200, b"[" * 100_000), (200, {"choices": []}), (200, [1]),
        (200, {"choices": [{"message": {"content": [1]}}]}), (200, b"\xff"), CUT_CONNECTION,
    ],
)  # fmt: skip
def test_transient_fault_is_retried(server, fault):
    server.script = lambda n, request: fault if n <= 2 else (200, make_chat_completion("at last"))
    assert make_endpoint(server).generate([make_request()])[0][0].text == "at last"
    assert len(server.requests) == 3


def test_permanent_server_fault_raises_model_unreachable(server):
    server.script = lambda n, request: (500, {})
    (error,) = make_endpoint(server, retry_timeout_s=0.2).generate([make_request()])
    assert isinstance(error, ModelUnreachable) and "is unreachable" in str(error)


def test_huge_and_slow_replies_are_aborted(server):
    server.script = lambda n, request: (
        (200, make_chat_completion("x" * 17_000_000)) if n == 1 else (200, make_chat_completion("short"))
    )
    assert make_endpoint(server).generate([make_request()])[0][0].text == "short"
    finished = threading.Event()
    server.script = lambda n, request: (200, (b" " for _ in range(500) if not finished.wait(0.02)))
    try:
        (error,) = make_endpoint(server, timeout_s=0.2, retry_timeout_s=0.1).generate([make_request()])
        assert isinstance(error, ModelUnreachable) and "not complete" in str(error)
    finally:
        finished.set()


def test_absent_or_slow_server_raises_model_unreachable(server):
    with pytest.raises(ModelUnreachable, match="ConnectError"):
        Endpoint("http://127.0.0.1:9/v1", "m", retry_timeout_s=0.2, backoff_range_s=(0.01, 0.02)).generate([make_request()])
    release = threading.Event()
    server.script = lambda n, request: release.wait(HANG_S) and (200, make_chat_completion("late"))
    try:
        (error,) = make_endpoint(server, timeout_s=0.1, retry_timeout_s=0.3).generate([make_request()])
        assert isinstance(error, ModelUnreachable) and "Timeout" in str(error)
    finally:
        release.set()


def test_slow_completion_has_finish_reason_timeout_if_the_server_is_reachable(server):
    finished = threading.Event()

    def script(n, request):
        slow = request["messages"][0]["content"] == "slow"
        return 200, (b" " for _ in range(500) if not finished.wait(0.02)) if slow else make_chat_completion(
            "x", token_counts=(3, 1)
        )

    server.script = script
    slow = GenerationRequest((ChatMessage(role="user", content="slow"),), timeout_s=0.1)
    try:
        ((late,), (other,)) = make_endpoint(server).generate([slow, make_request("quick")])
    finally:
        finished.set()
    assert (late.text, late.finish_reason, other.finish_reason) == ("", "timeout", "stop")
    server.script = lambda n, request: server_cut.wait(0.1) and CUT_CONNECTION
    server_cut = threading.Event()
    (error,) = make_endpoint(server, retry_timeout_s=0.3).generate([slow])
    assert isinstance(error, ModelUnreachable)  # an unreachable server is not a timeout


def test_refusal_field_gives_finish_reason_refused():
    reply = make_chat_completion(None)
    reply["choices"][0]["message"] |= {"content": "", "refusal": "I will not."}
    one = parse_generation(reply, NO_USAGE)
    assert (one.text, one.finish_reason) == ("I will not.", "refused")
    assert [parse_generation(make_chat_completion("x", finish), NO_USAGE).finish_reason for finish in ("stop", "length", "tool_calls", None)] == [
        "stop", "length", "unknown", "unknown",
    ]  # fmt: skip


def test_rejected_request_is_a_permanent_error_without_the_api_key(server):
    server.script = lambda n, request: (400, f"bad request with {KEY}".encode())
    (error,) = make_endpoint(server).generate([make_request()])
    assert isinstance(error, PermanentRecordError) and "bad request" in str(error) and KEY not in str(error)
    server.script = lambda n, request: (401, b"x" * 290 + f"wrong key {KEY}".encode())
    (error,) = make_endpoint(server).generate([make_request()])
    assert isinstance(error, ModelUnreachable) and "401" in str(error)
    assert KEY[:8] not in str(error) and KEY not in repr(make_endpoint(server))


def test_retry_after_delays_all_requests(server):
    server.script = lambda n, request: (429, b"", {"Retry-After": "1"}) if n == 1 else (200, make_chat_completion("x"))
    model, started = make_endpoint(server, concurrency=1), time.monotonic()
    model.generate([make_request("a"), make_request("b")])
    assert time.monotonic() - started >= 0.9 and len(server.requests) == 3
    server.script = lambda n, request: (503, b"", {"Retry-After": "3600"})
    for _ in range(2):  # the second call sends no request
        (error,) = model.generate([make_request()])
        assert isinstance(error, ModelUnreachable) and "accepts no requests" in str(error)
    assert len(server.requests) == 4


def test_parse_retry_after_accepts_seconds_and_dates():
    assert parse_retry_after("7") == 7 and parse_retry_after(
        email.utils.formatdate(time.time() + 60, usegmt=True)
    ) == pytest.approx(60, abs=2)
    assert [parse_retry_after(text) for text in ("", "soon", "-1", "1e9", "²", "9" * 40, "Wed, 21 Oct 2015 07:28:00 GMT")] == [
        0
    ] * 7


def test_requests_run_concurrently_up_to_the_limit(server):
    barrier = threading.Barrier(4)
    server.script = lambda n, request: (barrier.wait(HANG_S) >= 0) and (200, make_chat_completion("x"))
    make_endpoint(server, concurrency=4).generate([make_request(str(n)) for n in range(12)])
    assert server.max_active == 4


# Tokens


def test_tokens_of_failed_attempts_are_added_to_the_next_usage(server):
    broken = {"choices": [], "usage": {"prompt_tokens": 100, "completion_tokens": 10}}
    server.script = lambda n, request: (200, broken) if n <= 2 else (200, make_chat_completion("x", token_counts=(3, 2)))
    model = make_endpoint(server)
    assert model.generate([make_request()])[0][0].usage == Usage(203, 22)
    assert model.generate([make_request()])[0][0].usage == Usage(3, 2)


def test_rejected_request_does_not_discard_the_rest_of_its_batch(server):
    def script(n, request):
        return (
            (400, b"no")
            if request["messages"][0]["content"] == "bad"
            else (200, make_chat_completion("x", token_counts=(3, 2)))
        )

    server.script = script
    model = make_endpoint(server, concurrency=1)
    first, error, last = model.generate([make_request("good"), make_request("bad"), make_request("good")])
    assert isinstance(error, PermanentRecordError)
    assert first[0].usage == last[0].usage == Usage(3, 2) and len(server.requests) == 3


def test_usage_is_estimated_if_the_server_reports_none(server):
    server.script = lambda n, request: (200, make_chat_completion("four" * 3, token_counts=None))
    assert make_endpoint(server).generate([make_request("12345678")])[0][0].usage == Usage(2, 3)
    server.script = lambda n, request: (200, make_chat_completion("x", token_counts=(-1, True)))
    assert make_endpoint(server).generate([make_request("12345678")])[0][0].usage == Usage(2, 0)


# Addresses and bytes


def test_open_model_rejects_an_address_without_a_model_or_with_a_key(monkeypatch):
    for address in (
        "http://127.0.0.1:9/v1",
        "http://user:secret@127.0.0.1/v1#m",
        "http://127.0.0.1/v1?key=secret#m",
        "http://host:port/v1#m",
        "http:///v1#m",
    ):
        with pytest.raises(UsageError) as caught:
            open_model(address)
        assert "secret" not in str(caught.value)
    monkeypatch.setenv("MY_KEY", KEY)
    model = open_model("http://127.0.0.1:9/v1/#m", api_key_env="MY_KEY")
    assert (model.url, model.id, model.api_key) == ("http://127.0.0.1:9/v1", "m", KEY)


@pytest.mark.parametrize(
    ("api_key_env", "variable"),
    [
        ("KEY", "KEY"),
        ("api.example=HOSTED, localhost:8000=OWN", "OWN"),
        ("localhost=OWN,KEY", "OWN"),
        ("KEY, localhost=", ""),  # this server gets no key
        ("api.example=HOSTED", ""),
        ("localhost:8001=OTHER,KEY", "KEY"),
        ("", ""),
    ],
)
def test_each_server_gets_only_its_own_api_key(api_key_env, variable, monkeypatch):
    assert get_api_key_variable("http://localhost:8000/v1", api_key_env) == variable
    for name in ("KEY", "OWN", "HOSTED", "OTHER"):
        monkeypatch.setenv(name, f"secret of {name}")
    model = open_model("http://localhost:8000/v1#m", api_key_env=api_key_env)
    assert model.api_key == (f"secret of {variable}" if variable else "")
    assert ("authorization" in model.client.headers) == bool(variable)


@given(st.binary(max_size=200))
def test_arbitrary_bytes_parse_or_raise_transient_error(data):
    with contextlib.suppress(TransientError):
        parse_chat_completion(data)


def test_lone_surrogates_are_replaced():
    assert replace_surrogates("a\ud800b") == "a�b" and replace_surrogates("\ud83d\ude00") == "😀"
