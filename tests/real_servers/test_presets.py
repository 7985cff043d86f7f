"""Every judge and critique preset on a real vLLM and a real llama.cpp, which have log-probabilities and prefilled messages."""

import pytest

from charter.models import RoleModels
from charter.pipeline import make_stage
from constitutions.loader import load_constitution
from engine.settings import PRESETS, load_settings
from schemas.codec import decode_record, encode_record
from schemas.records import Critique, EndReason, Outcome, Preference, Revision
from tests.consumers.conftest import make_prompt, make_response  # noqa: F401  (fixtures)
from tests.support.real_servers import report

SHORT_SETTINGS = {
    "judge.max_tokens": 24, "critique.max_tokens": 16, "revise.max_tokens": 16, "judge.min_option_mass": 0.01,
    "critique.min_option_mass": 0.01, "models.concurrency": 4,
}  # fmt: skip


@pytest.fixture(scope="module", params=["vllm", "llama"])
def models(request):
    """Return the models of the roles; all of them are on one server, whose capabilities are probed once."""
    address = request.getfixturevalue(request.param).address
    models = RoleModels(load_settings({"models.policy": address} | SHORT_SETTINGS, environment={})[0])
    found = models.get_model("judge").server_capabilities
    report(
        f"{request.param}: prefill {found.prefill_body is not None}, {found.max_top_logprobs} top log-probabilities,"
        f" token ids {found.token_ids_body is not None}, streams {found.stream_body is not None}, ignores seed {found.ignores_seed}"
    )
    assert found.prefill_body is not None and found.max_top_logprobs == 20 and found.stream_body is not None
    assert (found.token_ids_body is not None) == (request.param == "vllm")
    return models


def make_preset_stage(name, models, **overrides):
    flags = {"models.policy": models.settings.models.policy} | SHORT_SETTINGS
    settings, _ = load_settings(flags | {key.replace("__", "."): value for key, value in overrides.items()}, environment={})
    shared = RoleModels(settings, models.open_models)
    return make_stage(name, settings, shared, load_constitution("default"), None, labels_all=True)


@pytest.mark.parametrize("preset", PRESETS["judge"])
def test_judge_preset(models, make_response, preset):  # noqa: F811
    overrides = {"judge__num_principles": "2"} if preset == "ensemble-k" else {}
    judge = make_preset_stage("judge", models, judge__preset=preset, **overrides)
    ((label,),) = judge.process([make_response(("Paris is the capital of France.", "I do not know that."))])
    assert isinstance(label, Preference) and label.outcome is not Outcome.UNKNOWN
    assert encode_record(decode_record(encode_record(label), Preference)) == encode_record(label)
    assert label.prompt_tokens > 100 and label.completion_tokens > 0 and label.template_hash
    if label.outcome is Outcome.OK:
        assert 0 <= label.p_a <= 1
    report(f"{models.get_model('judge').url} judge {preset}: {label.outcome.value}, p_a {label.p_a}")


@pytest.mark.parametrize("preset", PRESETS["critique"])
def test_critique_preset(models, make_response, preset):  # noqa: F811
    overrides = {"critique__preset": preset, "critique__rounds": "1"}
    ((critique,),) = make_preset_stage("critique", models, **overrides).process([make_response()])
    assert isinstance(critique, Critique) and critique.prompt_tokens > 50
    if critique.final:
        assert critique.end_reason is not EndReason.NONE
        return
    ((revision,),) = make_preset_stage("revise", models, **overrides).process([critique])
    assert isinstance(revision, Revision) and revision.completion_tokens > 0
