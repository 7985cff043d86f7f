"""Every judge and critique preset on a real OpenAI-compatible server without log-probabilities and prefill."""

import pytest

from charter.models import RoleModels
from charter.pipeline import make_stage
from constitutions.loader import load_constitution as load_constitution
from consumers.judge import JudgeStage
from engine.models.endpoint import open_endpoint
from engine.settings import PRESETS, load_settings
from schemas.codec import decode_record, encode_record
from schemas.records import Critique, EndReason, Outcome, Preference, Revision
from tests.support.transformers_server import SERVER_CAPABILITIES
from tests.support.waiting import HANG_S

pytestmark = pytest.mark.model
SHORT_SETTINGS = {
    "judge.max_tokens": 24,
    "critique.max_tokens": 16,
    "revise.max_tokens": 16,
    "judge.min_option_mass": 0.01,
    "critique.min_option_mass": 0.01,
}


@pytest.fixture(scope="module")
def server(served):
    model = open_endpoint(served, timeout_s=HANG_S, concurrency=2)
    model.num_votes, model.cached_server_capabilities = 2, SERVER_CAPABILITIES  # without a probe, which takes many requests
    return model


def make_settings_stage(name, served, server, **overrides):
    settings, _ = load_settings(
        {"models.policy": served} | SHORT_SETTINGS | {k.replace("__", "."): v for k, v in overrides.items()}, environment={}
    )
    return make_stage(
        name, settings, RoleModels(settings, {served: server}), load_constitution("default"), None, labels_all=True
    )


@pytest.mark.parametrize("preset", PRESETS["judge"])
def test_judge_preset_runs_on_a_server(served, server, make_response, preset):
    overrides = {"judge__num_principles": "2"} if preset == "ensemble-k" else {}
    judge = make_settings_stage("judge", served, server, judge__preset=preset, **overrides)
    assert isinstance(judge.process, JudgeStage)
    ((label,),) = judge.process([make_response(("Paris is the capital of France.", "I do not know that."))])
    assert isinstance(label, Preference)
    assert encode_record(decode_record(encode_record(label), Preference)) == encode_record(label)
    assert label.prompt_tokens > 100 and label.completion_tokens > 0 and label.model.id == server.id
    assert (label.p_a is not None) >= (label.outcome is Outcome.OK)
    assert label.outcome is not Outcome.UNKNOWN and label.template_hash


@pytest.mark.parametrize("preset", PRESETS["critique"])
def test_critique_preset_runs_on_a_server(served, server, make_response, preset):
    overrides = {"critique__preset": preset, "critique__rounds": "1"}
    ((critique,),) = make_settings_stage("critique", served, server, **overrides).process([make_response()])
    assert isinstance(critique, Critique) and critique.prompt_tokens > 50
    if critique.final:
        assert critique.end_reason is not EndReason.NONE
        return
    ((revision,),) = make_settings_stage("revise", served, server, **overrides).process([critique])
    assert isinstance(revision, Revision) and revision.completion_tokens > 0
    assert decode_record(encode_record(revision), Revision)
