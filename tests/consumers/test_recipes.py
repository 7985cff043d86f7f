"""Every recipe on every kind of model: the packaged one, a server that shows log-probabilities, and one that shows none."""

import math

import pytest

from charter.api import Charter
from consumers.templates import LETTER_ONLY_INSTRUCTION
from engine.models.endpoint import Endpoint
from engine.models.probe import PREFILL_BODIES, ServerCapabilities
from engine.settings import PRESETS
from schemas.records import EndReason, Outcome, Verdict
from tests.support.chat_server import FakeChatServer, make_chat_completion

DIALECTS = {
    "logprobs": ServerCapabilities(prefill_body=PREFILL_BODIES[0], max_top_logprobs=20),
    "unbegun": ServerCapabilities(max_top_logprobs=5),
    "votes": ServerCapabilities(),
}
FIRST, SECOND, BETTER = "the first answer", "the second answer", "the better answer"


def kind(number, request):
    """A server that is always right: the first answer before the second, a better one before both, all others flawed."""
    *_, question = (message["content"] for message in request["messages"] if message["role"] == "user")
    content = request["messages"][0]["content"]
    begun = request["messages"][-1]["role"] == "assistant"
    shown = [content.partition(f"Answer ({letter}):\n> ")[2] for letter in "AB"]
    if any(shown):
        worth = [2 * text.startswith(BETTER) + text.startswith(FIRST) for text in shown]
        letter, other = "AB" if worth[0] > worth[1] else "BA"
    else:
        flawed = f"Assistant:\n> {BETTER}" not in content
        letter, other = "AB" if ("(A) Yes" in content) == flawed else "BA"
    top = [(letter, math.log(0.6)), (other, math.log(0.3))] if request.get("logprobs") else None
    if "Begin with" in content:
        return 200, make_chat_completion(f"{'' if begun else 'Answer: ('}{letter}) It is kinder.")
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
    server.script = kind
    yield server
    server.close()


@pytest.fixture(params=DIALECTS)
def endpoint(request, server):
    return Endpoint(server.url, "m", concurrency=4, num_votes=3, cached_server_capabilities=DIALECTS[request.param])


@pytest.mark.parametrize("preset", PRESETS["judge"])
def test_every_judging_recipe_on_a_server(endpoint, make_response, preset):
    charter = Charter(model=endpoint, settings={"judge.preset": preset})
    label = charter.generate_preference_pair(make_response((FIRST, SECOND), text="hello")).preference
    said = 2 / 3 if endpoint.cached_server_capabilities.max_top_logprobs else 1.0
    expected = {"bai2022-cot": 0.6, "course": 1.0}.get(preset, said)
    assert (label.outcome, label.position_flip, label.preset) == (Outcome.OK, False, preset)
    assert label.p_a == pytest.approx(expected) and label.position_gap == pytest.approx(0)
    assert len(label.votes) == (5 if preset == "ensemble-k" else 1)
    questions = (
        len(label.votes)
        * 2
        * (1 if endpoint.cached_server_capabilities.max_top_logprobs or preset == "course" else endpoint.num_votes)
    )
    assert label.prompt_tokens == 3 * (questions + (2 if preset == "bai2022-cot" else 0))


@pytest.mark.parametrize("preset", PRESETS["critique"])
def test_every_critique_recipe_on_a_server(endpoint, make_response, preset):
    charter = Charter(model=endpoint, settings={"critique.preset": preset})
    chain = charter.self_critique_loop(make_response((FIRST, SECOND), text="hello"))
    if preset == "bai2022":  # goes on whatever it finds, until a revision is a copy
        assert (chain.end_reason, chain.final_response, len(chain.revisions)) == (EndReason.UNUSABLE, None, 2)
        return
    assert (chain.end_reason, chain.final_response, len(chain.revisions)) == (EndReason.SATISFIED, BETTER, 1)
    first, last = chain.critiques
    wanted = (Verdict.FLAWED, Verdict.CLEAN) if preset == "charter" else (Verdict.NOT_ASKED, Verdict.NOT_ASKED)
    assert (first.verdict, last.verdict) == wanted and first.critique == "It is rude, and could be kinder."
    assert last.p_better == (
        pytest.approx(2 / 3 if endpoint.cached_server_capabilities.max_top_logprobs else 1.0) if preset == "charter" else None
    )


@pytest.mark.model
def test_every_recipe_on_the_packaged_model(smollm2, make_response):
    from engine.models.local import LocalModel

    model = LocalModel(smollm2)
    short = {
        "judge.max_tokens": 8,
        "critique.max_tokens": 8,
        "revise.max_tokens": 8,
        "critique.rounds": 1,
        "judge.min_option_mass": 0.05,
    }
    response = make_response(("Paris is the capital of France.", "I do not know that."))
    for preset in PRESETS["judge"]:
        label = Charter(model=model, settings=short | {"judge.preset": preset}).generate_preference_pair(response).preference
        assert label.prompt_tokens > 2 * 100 and (label.completion_tokens > 0) == (preset in ("bai2022-cot", "course"))
        assert label.cached_tokens > (label.prompt_tokens / 2 if preset == "ensemble-k" else 0) or preset == "course"
        if preset not in ("bai2022-cot", "course"):  # what the small model writes may well be unreadable
            assert label.outcome is Outcome.OK and 0 < label.p_a < 1
    for preset in PRESETS["critique"]:
        chain = Charter(model=model, settings=short | {"critique.preset": preset}).self_critique_loop(response)
        assert (
            chain.last_step.final
            and chain.end_reason is not EndReason.NONE
            and sum(link.prompt_tokens for link in chain.steps) > 100
        )
