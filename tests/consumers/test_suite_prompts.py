"""Responses to prompts of evaluation suites are graded. They are not criticized, revised or judged, and no model is asked."""

import pytest

from charter.models import RoleModels
from charter.pipeline import make_critique_stage, make_judge_stage, make_revise_stage
from constitutions.loader import load_constitution
from engine.models.scripted import ScriptedModel
from engine.notices import NOTICES
from engine.settings import load_settings
from schemas.records import EndReason, Split
from tests.support.records import make_chain_end

MAKERS = {"critique": make_critique_stage, "revise": make_revise_stage, "judge": make_judge_stage}


def make_stage(name, pairing="completions"):
    model = ScriptedModel()
    settings, _ = load_settings({"models.policy": "scripted", "judge.pairing": pairing}, environment={})
    return model, MAKERS[name](settings, RoleModels(settings, {"scripted": model}), load_constitution("default"))


def make_input(stage, make_response, pairing="completions"):
    if stage == "revise":
        update = {"final": False, "end_reason": EndReason.NONE, "critique": "It is unkind.", "round": 0}
        return make_chain_end("one", "one").model_copy(update=update)
    if pairing == "revision":
        return make_chain_end("one", "one")
    return make_response()


@pytest.mark.parametrize(
    ("name", "pairing"),
    [("critique", "completions"), ("revise", "completions"), ("judge", "completions"), ("judge", "revision")],
)
def test_stage_skips_suite_prompts_and_says_so_once(name, pairing, make_response, monkeypatch):
    NOTICES.clear()
    model, stage = make_stage(name, pairing)
    record = make_input(name, make_response, pairing)
    suite_record = record.model_copy(update={"split": Split.SUITE, "record_id": "00000000-0000-0000-0000-000000000001"})
    expected = [output.record_id for output in stage([record])[0]]
    assert expected
    outputs = stage([suite_record, record, suite_record])
    assert [[output.record_id for output in found] for found in outputs] == [[], expected, []]
    assert NOTICES.get_counts()["suite_prompt", name] == 2
    for method in ("generate", "score_options"):
        monkeypatch.setattr(model, method, lambda *_, **__: pytest.fail("a model was asked"))
    assert stage([suite_record]) == [[]]
