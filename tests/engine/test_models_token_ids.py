"""Prompts as token ids on a fake vLLM: ids, log-probabilities, seeds, streams, faulty completions, and servers without the API."""

import itertools
import logging
import threading

import pytest
from transformers import AutoTokenizer

from engine.errors import ModelUnreachable, PermanentRecordError, RequestFailed, UsageError
from engine.models.chat_api import ServerCapabilities
from engine.models.chat_stream import STREAM_BODIES
from engine.models.chat_template import encode_prompt
from engine.models.endpoint import Endpoint
from engine.models.interface import GenerationRequest, Usage, require_results
from engine.models.probe import TOKEN_IDS_BODIES, UNMODIFIED_SAMPLING_BODY
from engine.models.token_api import GENERATE_PATH, TokenCodec
from schemas.records import ChatMessage
from tests.support.chat_server import VLLM_FIELDS, FakeChatServer, make_script
from tests.support.token_completions import (
    DISABLED,
    TokenScript,
    answer_token_request,
    make_token_completion,
    sample_tokens,
)
from tests.support.waiting import HANG_S

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}({{ m.role[0] }}:{{ m.content }})"
    "{% endfor %}{% if enable_thinking %}(t){% endif %}(a:"
)
EXACT = ServerCapabilities(
    extra_body=UNMODIFIED_SAMPLING_BODY, max_top_logprobs=20, token_ids_body=TOKEN_IDS_BODIES[0], unmodified_sampling=True,
    stream_body=STREAM_BODIES[0], accepts_token_ids=True,
)  # fmt: skip


@pytest.fixture
def server():
    server = FakeChatServer()
    server.script = TokenScript()
    yield server
    server.close()


@pytest.fixture
def tokenizer(tiny):
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def make_endpoint(server, tokenizer=None, **options):
    defaults = {
        "backoff_range_s": (0.01, 0.02), "retry_timeout_s": HANG_S, "timeout_s": HANG_S, "cached_server_capabilities": EXACT,
        "token_codec": TokenCodec(tokenizer) if tokenizer else None,
    }  # fmt: skip
    return Endpoint(server.url, "m", **defaults | options)


def make_request(text="a bat", role="user", **options):
    return GenerationRequest((ChatMessage(role=role, content=text),), seed=7, **options)


def list_token_requests(server):
    return [request for path, _, request in server.requests if path == GENERATE_PATH]


@pytest.mark.parametrize("stream_body", [None, *STREAM_BODIES])
def test_prompt_is_encoded_here_and_the_ids_of_the_server_are_kept(server, tokenizer, stream_body):
    model = make_endpoint(
        server, tokenizer, cached_server_capabilities=ServerCapabilities(**vars(EXACT) | {"stream_body": stream_body})
    )
    requests = [make_request("a bat", prefill="is"), make_request("a </s> ant")]
    results = require_results(model.generate(requests, num_completions=2, max_tokens=7))
    sent = {(tuple(body["token_ids"]), body["sampling_params"]["seed"]): body for body in list_token_requests(server)}
    assert len(sent) == 4 and len(server.requests) == 4
    for request, generations in zip(requests, results, strict=True):
        prompt = tuple(encode_prompt(tokenizer, request.messages, request.prefill))
        assert 2 not in prompt  # the control token of the text is broken up
        for n, generation in enumerate(generations):
            body = sent[prompt, 7 + n]
            tokens, logprobs, reason = sample_tokens(body)
            assert generation.prompt_token_ids == prompt and generation.token_ids == tuple(tokens)
            assert generation.logprobs == tuple(logprobs) and generation.finish_reason == reason == "stop"
            assert generation.text == tokenizer.decode(tokens[:-1]) and "</s>" not in generation.text
            assert generation.usage == Usage(len(prompt), len(tokens))
            assert body["sampling_params"] == {
                "temperature": 1.0, "top_p": 1.0, "max_tokens": 7, "logprobs": 0, "seed": 7 + n, "stop_token_ids": [2],
                "detokenize": False,
            }  # fmt: skip
    assert results[0][0].token_ids != results[0][1].token_ids  # other seeds


def test_same_seed_repeats_a_completion_and_a_cut_one_has_its_reason(server, tokenizer):
    model = make_endpoint(server, tokenizer)
    ((first,),) = model.generate([make_request()])
    ((again,),) = model.generate([make_request()])
    ((cut,),) = model.generate([make_request()], max_tokens=3)
    assert first == again
    assert cut.token_ids == first.token_ids[:3] and cut.finish_reason == "length"
    assert cut.text == tokenizer.decode(cut.token_ids)


def test_log_probabilities_are_requested_only_if_they_are_those_of_the_samples(server, tokenizer):
    model = make_endpoint(server, tokenizer)
    for options in ({"temperature": 0.5}, {"top_p": 0.9}, {"temperature": 0.0}):
        ((generation,),) = model.generate([make_request()], **options)
        assert generation.logprobs == () and len(generation.token_ids) == 7
    assert all("logprobs" not in request["sampling_params"] for request in list_token_requests(server))


def test_thinking_is_turned_on_in_the_prompt_and_its_limit_is_added(server, tokenizer):
    model = make_endpoint(server, tokenizer)
    model.generate([make_request()], max_tokens=5, max_thinking_tokens=2)
    (request,) = list_token_requests(server)
    assert request["token_ids"] == encode_prompt(tokenizer, make_request().messages, thinking=True)
    assert request["token_ids"] != encode_prompt(tokenizer, make_request().messages)
    assert request["sampling_params"]["max_tokens"] == 7


def test_prompt_that_the_chat_template_rejects_does_not_fail_the_batch(server, tokenizer):
    rejected, accepted = make_endpoint(server, tokenizer).generate(
        [make_request(role="system"), make_request()], num_completions=2
    )
    assert isinstance(rejected, PermanentRecordError) and "no system" in rejected.why
    assert len(accepted) == 2 and len(server.requests) == 2


def test_busy_server_is_asked_again(server, tokenizer):
    server.script.results = [(503, {"error": {"message": "busy"}}), (429, {"error": {"message": "busy"}})]
    ((generation,),) = make_endpoint(server, tokenizer).generate([make_request()])
    assert len(generation.token_ids) == 7 and len(list_token_requests(server)) == 3


def make_change(**fields):
    def change(completion):
        completion["choices"][0].update(fields)
        return completion

    return change


def remove_one_logprob(completion):
    completion["choices"][0]["logprobs"]["content"][1]["logprob"] = -9999.0  # vLLM's mark of a missing one
    return completion


def change_prompt(completion):
    return completion | {"prompt_token_ids": completion["prompt_token_ids"][1:]}


FAULTS = [
    (make_change(token_ids=[5, 6, 7, 8, 9, 10, 4000]), "has the token id 4000"),
    (make_change(logprobs=None), "does not have a log-probability for each token"),
    (remove_one_logprob, "does not have a log-probability for each token"),
    (make_change(finish_reason=None), "has no finish reason"),
    (make_change(finish_reason="abort"), "broke off the completion"),
    (make_change(token_ids=[], logprobs={"content": []}), "has no token ids"),
    (change_prompt, "does not have the prompt of the request"),
]


@pytest.mark.parametrize("stream_body", [None, STREAM_BODIES[0]])
@pytest.mark.parametrize(("change", "words"), FAULTS)
def test_faulty_completion_is_asked_again_and_then_fails_its_record(server, tokenizer, stream_body, change, words):
    server.script.change = change
    model = make_endpoint(
        server, tokenizer, cached_server_capabilities=ServerCapabilities(**vars(EXACT) | {"stream_body": stream_body})
    )
    (result,) = model.generate([make_request()])
    assert isinstance(result, RequestFailed) and len(str(result).splitlines()) == 3
    assert words in result.why and len(list_token_requests(server)) == 3


def test_stream_that_ends_early_is_asked_again_and_its_tokens_are_counted(server, tokenizer):
    model = make_endpoint(server, tokenizer)
    ((whole,),) = model.generate([make_request()])
    body = list_token_requests(server)[0]
    _, events, headers = answer_token_request(body, make_token_completion(body, *sample_tokens(body)))
    server.script.results = [(200, iter(list(events)[:3]), headers)]
    ((generation,),) = model.generate([make_request()])
    assert generation.token_ids == whole.token_ids
    prompt = len(generation.prompt_token_ids)
    assert generation.usage == Usage(2 * prompt, len(generation.token_ids) + 3)


def test_completion_that_exceeds_the_time_of_its_request_keeps_its_tokens(server, tokenizer):
    model, finished = make_endpoint(server, tokenizer), threading.Event()
    ((whole,),) = model.generate([make_request()])
    body = list_token_requests(server)[0]
    _, events, headers = answer_token_request(body, make_token_completion(body, *sample_tokens(body)))

    def stream():
        yield from itertools.islice(events, 2)
        while not finished.wait(0.02):
            yield b": ping\n\n"

    server.script.results = [(200, stream(), headers)]
    try:
        ((late,),) = model.generate([make_request(timeout_s=0.2)])
    finally:
        finished.set()
    assert late.finish_reason == "timeout" and late.text == tokenizer.decode(late.token_ids)
    assert late.token_ids == whole.token_ids[:2] and late.logprobs == whole.logprobs[:2]
    assert late.prompt_token_ids == whole.prompt_token_ids


def test_rejected_prompt_is_a_dead_letter_also_in_a_stream(server, tokenizer):
    error = {"error": {"message": "longer than the maximum model length", "code": 400}}
    server.script.results = [
        (400, error),
        (200, b"data: %s\n\n" % str(error).replace("'", '"').encode(), {"Content-Type": "text/event-stream"}),
    ]
    for _ in range(2):
        (result,) = make_endpoint(server, tokenizer).generate([make_request()])
        assert isinstance(result, PermanentRecordError) and "maximum model length" in result.why


def test_server_restarted_without_the_api_pauses_the_stage(server, tokenizer):
    server.script.results = [DISABLED]
    (result,) = make_endpoint(server, tokenizer).generate([make_request()])
    assert isinstance(result, ModelUnreachable) and "does not accept token ids any more" in result.what
    assert "Restart vllm serve with --enable-scale-out" in result.why and len(str(result).splitlines()) == 3


# The probe


def make_probed_script(answer):
    chat = make_script(accepted_fields=VLLM_FIELDS, returns_token_ids=True, streams=True)
    return lambda number, request: answer(number, request) if "token_ids" in request else chat(number, request)


def open_probed(server, caplog, load_tokenizer):
    model = make_endpoint(server, cached_server_capabilities=None, load_tokenizer=load_tokenizer)
    with caplog.at_level(logging.INFO, "charter.endpoint"):
        model.generate([make_request()])
        model.generate([make_request()])
    return model, [line for line in caplog.messages if "chat template" in line or "gets prompts" in line]


def test_api_is_found_and_used_for_the_policy_only(server, tokenizer, caplog):
    server.script = make_probed_script(TokenScript())
    model, lines = open_probed(server, caplog, lambda: tokenizer)
    assert model.server_capabilities.accepts_token_ids and len(lines) == 1 and "gets prompts as token ids" in lines[0]
    assert list_token_requests(server)[0]["token_ids"] == [1, 2, 3]  # those that the chat API reported
    assert len(list_token_requests(server)) == 3
    adapter = model.with_model("adapter")
    adapter.generate([make_request()])
    assert list_token_requests(server)[-1]["model"] == "adapter"
    num_chats = len(server.requests) - len(list_token_requests(server))
    model.score_options([make_request()], ("A", "B"))
    judge = make_endpoint(server, cached_server_capabilities=model.server_capabilities)
    judge.generate([make_request()])
    assert len(server.requests) - len(list_token_requests(server)) == num_chats + 2


@pytest.mark.parametrize(
    "result",
    [
        DISABLED,
        (404, {"detail": "Not Found"}),
        (405, {"detail": "Method Not Allowed"}),
        (501, {"error": {"message": "no generate"}}),
        (200, b"<html>welcome</html>"),
        (307, b"", {"Location": "/login"}),
    ],
)
def test_server_without_the_api_keeps_the_chat_api_and_this_is_said_once(server, tokenizer, caplog, result):
    server.script = make_probed_script(lambda number, request: result)
    model, lines = open_probed(server, caplog, lambda: tokenizer)
    assert not model.server_capabilities.accepts_token_ids and model.token_codec is None
    assert len(lines) == 1 and "formats the prompts of the policy with its own chat template" in lines[0]
    assert "--enable-scale-out" in lines[0]


def test_completions_without_log_probabilities_do_not_count_as_the_api(server, tokenizer, caplog):
    script = TokenScript()
    script.change = make_change(logprobs=None)
    server.script = make_probed_script(script)
    assert not open_probed(server, caplog, lambda: tokenizer)[0].server_capabilities.accepts_token_ids


def test_policy_without_a_tokenizer_or_a_chat_template_keeps_the_chat_api(server, tokenizer, caplog):
    def fail():
        raise UsageError("there is no tokenizer of the policy on this machine", "train.base_model is not set", "set it")

    server.script = make_probed_script(TokenScript())
    model, lines = open_probed(server, caplog, fail)
    assert model.server_capabilities.accepts_token_ids and model.token_codec is None
    assert len(lines) == 1 and "train.base_model is not set" in lines[0]
    caplog.clear()
    tokenizer.chat_template = None
    model, lines = open_probed(server, caplog, lambda: tokenizer)
    assert model.token_codec is None and len(lines) == 1 and "has no chat template" in lines[0]
