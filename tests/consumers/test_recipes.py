"""Every preset on every kind of model: the packaged one, a server with log-probabilities, and a server without them."""

import math

import pytest

from charter.api import Charter
from consumers.templates import LETTER_ONLY_INSTRUCTION
from engine.models.endpoint import Endpoint
from engine.models.probe import PREFILL_BODIES, ServerCapabilities
from engine.settings import PRESETS
from schemas.records import EndReason, Outcome, Verdict
from tests.support.chat_server import FakeChatServer, make_chat_completion

CAPABILITIES = {
    "logprobs": ServerCapabilities(prefill_body=PREFILL_BODIES[0], max_top_logprobs=20),
    "no prefill": ServerCapabilities(max_top_logprobs=5),
    "votes": ServerCapabilities(),
}
FIRST, SECOND, BETTER = "the first answer", "the second answer", "the better answer"


def reply_correctly(number, request):
    """Reply as a correct judge and critic: FIRST is better than SECOND, BETTER than both, and only BETTER is not flawed."""
    *_, question = (message["content"] for message in request["messages"] if message["role"] == "user")
    content = request["messages"][0]["content"]
    has_prefill = request["messages"][-1]["role"] == "assistant"
    responses = [content.partition(f"Answer ({letter}):\n> ")[2] for letter in "AB"]
    if any(responses):
        ranks = [2 * response.startswith(BETTER) + response.startswith(FIRST) for response in responses]
        letter, other = "AB" if ranks[0] > ranks[1] else "BA"
    else:
        flawed = f"Assistant:\n> {BETTER}" not in content
        letter, other = "AB" if ("(A) Yes" in content) == flawed else "BA"
    top = [(letter, math.log(0.6)), (other, math.log(0.3))] if request.get("logprobs") else None
    if "Begin with" in content:
        return 200, make_chat_completion(f"{'' if has_prefill else 'Answer: ('}{letter}) It is kinder.")
    if "Write only the new answer" in content:
        return 200, make_chat_completion(BETTER)
    if top or question.endswith(LETTER_ONLY_INSTRUCTION):
        return 200, make_chat_completion(letter, top_logprobs=top)
    if "Two possible answers" in content or "Answer in two or three sentences" in content:
        return 200, make_chat_completion("There are no problems." if BETTER in content else "It is rude, and could be kinder.")
    return 200, make_chat_completion(FIRST if len(question) % 2 else SECOND)


@pytest.fixture(scope="module")
def server():
    server = FakeChatServer()
    server.script = reply_correctly
    yield server
    server.close()


@pytest.fixture(params=CAPABILITIES)
def endpoint(request, server):
    return Endpoint(server.url, "m", concurrency=4, num_votes=3, cached_server_capabilities=CAPABILITIES[request.param])


@pytest.mark.parametrize("preset", PRESETS["judge"])
def test_judge_preset_labels_correctly_on_a_server(endpoint, make_response, preset):
    charter = Charter(model=endpoint, settings={"judge.preset": preset})
    label = charter.generate_preference_pair(make_response((FIRST, SECOND), text="hello")).preference
    p = 2 / 3 if endpoint.cached_server_capabilities.max_top_logprobs else 1.0
    expected = {"bai2022-cot": 0.6, "course": 1.0}.get(preset, p)
    assert (label.outcome, label.position_flip, label.preset) == (Outcome.OK, False, preset)
    assert label.p_a == pytest.approx(expected) and label.position_gap == pytest.approx(0)
    assert len(label.votes) == (5 if preset == "ensemble-k" else 1)
    is_voting = not endpoint.cached_server_capabilities.max_top_logprobs and preset != "course"
    num_requests = len(label.votes) * 2 * (endpoint.num_votes if is_voting else 1) + (2 if preset == "bai2022-cot" else 0)
    assert label.prompt_tokens == 3 * num_requests


@pytest.mark.parametrize("preset", PRESETS["critique"])
def test_critique_preset_ends_its_chain_correctly_on_a_server(endpoint, make_response, preset):
    charter = Charter(model=endpoint, settings={"critique.preset": preset})
    chain = charter.self_critique_loop(make_response((FIRST, SECOND), text="hello"))
    if preset == "bai2022":  # it continues regardless of its critique, until a revision is a copy
        assert (chain.end_reason, chain.final_response, len(chain.revisions)) == (EndReason.UNUSABLE, None, 2)
        return
    assert (chain.end_reason, chain.final_response, len(chain.revisions)) == (EndReason.SATISFIED, BETTER, 1)
    first, last = chain.critiques
    expected = (Verdict.FLAWED, Verdict.CLEAN) if preset == "charter" else (Verdict.NOT_ASKED, Verdict.NOT_ASKED)
    assert (first.verdict, last.verdict) == expected and first.critique == "It is rude, and could be kinder."
    assert last.p_better == (
        pytest.approx(2 / 3 if endpoint.cached_server_capabilities.max_top_logprobs else 1.0) if preset == "charter" else None
    )


@pytest.mark.model
def test_every_preset_runs_on_the_packaged_model(smollm2, make_response):
    from engine.models.local import LocalModel

    model = LocalModel(smollm2)
    short_settings = {
        "judge.max_tokens": 8,
        "critique.max_tokens": 8,
        "revise.max_tokens": 8,
        "critique.rounds": 1,
        "judge.min_option_mass": 0.05,
    }
    response = make_response(("Paris is the capital of France.", "I do not know that."))
    for preset in PRESETS["judge"]:
        label = (
            Charter(model=model, settings=short_settings | {"judge.preset": preset})
            .generate_preference_pair(response)
            .preference
        )
        assert label.prompt_tokens > 2 * 100 and (label.completion_tokens > 0) == (preset in ("bai2022-cot", "course"))
        assert label.cached_tokens > (label.prompt_tokens / 2 if preset == "ensemble-k" else 0) or preset == "course"
        if preset not in ("bai2022-cot", "course"):  # a reply that the small model writes may be unreadable
            assert label.outcome is Outcome.OK and 0 < label.p_a < 1
    for preset in PRESETS["critique"]:
        chain = Charter(model=model, settings=short_settings | {"critique.preset": preset}).self_critique_loop(response)
        assert chain.last_step.final and chain.end_reason is not EndReason.NONE
        assert sum(step.prompt_tokens for step in chain.steps) > 100
