"""Endpoints with a real server: the OpenAI-compatible server of transformers with SmolLM2 on loopback."""

import logging
from dataclasses import replace

import pytest

from engine.models.endpoint import open_endpoint
from engine.models.interface import GenerationRequest, Usage
from engine.models.probe import probe_server
from schemas.records import ChatMessage
from tests.support.transformers_server import SERVER_CAPABILITIES
from tests.support.waiting import HANG_S

pytestmark = pytest.mark.model


def make_request(text, seed=0):
    return GenerationRequest((ChatMessage(role="user", content=text),), seed=seed)


def probe(endpoint):
    """Return the capabilities that the probe finds, except whether a seed is repeated.

    This server has one random generator for all requests, and other tests use it at the same time.
    """
    return replace(probe_server(endpoint), ignores_seed=False)


@pytest.fixture(scope="module")
def model(served):
    endpoint = open_endpoint(served, timeout_s=HANG_S, concurrency=2)
    endpoint.cached_server_capabilities = probe(endpoint)
    return endpoint


def test_probe_finds_the_capabilities_of_the_server(model):
    assert model.server_capabilities == SERVER_CAPABILITIES
    assert (model.capabilities.prefill, model.capabilities.logprobs) == (False, False)


def test_server_generates_and_reports_usage(model):
    model.take_unbilled()
    ((one,),) = model.generate([make_request("What is the capital of France?")], temperature=0.0, max_tokens=24)
    assert "Paris" in one.text and one.finish_reason == "stop" and one.token_ids == ()
    assert one.usage.prompt_tokens == 37 and 4 < one.usage.completion_tokens <= 24
    (truncated,) = model.generate([make_request("Count to one hundred.")], max_tokens=2)[0]
    assert truncated.finish_reason == "length" and truncated.usage.completion_tokens == 2


def test_options_are_scored_by_votes(model):
    question = "Which letter comes first in the alphabet? Reply with one letter, A or B. Write that letter alone."
    (one,) = model.score_options([make_request(question, seed=3)], ("A", "B"))
    assert 0 <= one.option_mass <= 1 and one.usage.prompt_tokens > 8 * 30 and one.usage.completion_tokens >= 8
    assert one.usage != Usage()


def test_probe_detects_that_the_server_samples(model, caplog):
    with caplog.at_level(logging.WARNING, "charter.endpoint"):
        assert probe(model) == model.server_capabilities
    log_text = " ".join(caplog.messages)
    assert "prefilled assistant message" in log_text and "votes" in log_text and "does not sample" not in log_text
