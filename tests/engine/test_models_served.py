"""Endpoints against a real server: the OpenAI-compatible one that transformers ships, serving SmolLM2 on the loopback."""

import logging

import pytest

from engine.models.endpoint import ServerCapabilities, open_endpoint
from engine.models.interface import GenerationRequest, Usage
from engine.models.probe import probe_server
from schemas.records import ChatMessage

pytestmark = pytest.mark.model


def ask(text, seed=0):
    return GenerationRequest((ChatMessage(role="user", content=text),), seed=seed)


@pytest.fixture(scope="module")
def model(served):
    return open_endpoint(served, timeout_s=60, concurrency=2)


def test_what_it_can_do_is_found_out(model):
    # Unknown fields are refused with 422, logprobs ignored, and a last assistant message is closed before the next begins.
    assert model.server_capabilities == ServerCapabilities(extra_body={"chat_template_kwargs": {"enable_thinking": False}})
    assert (model.capabilities.prefill, model.capabilities.logprobs) == (False, False)


def test_it_answers_and_counts(model):
    model.take_unbilled()
    ((one,),) = model.generate([ask("What is the capital of France?")], temperature=0.0, max_tokens=24)
    assert "Paris" in one.text and one.finish_reason == "stop" and one.token_ids == ()
    assert one.usage.prompt_tokens == 37 and 4 < one.usage.completion_tokens <= 24
    (cut,) = model.generate([ask("Count to one hundred.")], max_tokens=2)[0]
    assert cut.finish_reason == "length" and cut.usage.completion_tokens == 2


def test_it_votes_on_options(model):
    question = "Which letter comes first in the alphabet? Reply with one letter, A or B. Write that letter alone."
    (one,) = model.score_options([ask(question, seed=3)], ("A", "B"))
    assert 0 <= one.option_mass <= 1 and one.usage.prompt_tokens > 8 * 30 and one.usage.completion_tokens >= 8
    assert one.usage != Usage()


def test_it_samples_where_the_models_configuration_says_so(model, caplog):
    with caplog.at_level(logging.WARNING, "charter.endpoint"):
        assert probe_server(model) == model.server_capabilities
    told = " ".join(caplog.messages)
    assert "prefilled assistant message" in told and "votes" in told and "does not sample" not in told
