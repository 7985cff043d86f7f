"""The stages as functions from records to records, with the scripted model."""

import math

import pytest

from constitutions.loader import load_constitution
from consumers.compare import Comparison, compare_in_both_orders, compute_p_a
from consumers.critique import CritiqueStage
from consumers.judge import JudgeStage
from consumers.respond import RespondStage
from consumers.revise import ReviseStage
from consumers.templates import LETTER_ONLY_INSTRUCTION, TEMPLATE_HASHES, get_template_hash
from engine.models.interface import ModelCapabilities, OptionScores
from engine.models.scripted import ScriptedModel
from schemas.codec import decode_record, encode_record
from schemas.records import ChatMessage, EndReason, FinishReason, Outcome, RejectionReason, Sampling, Verdict

SAMPLING = Sampling(temperature=1.0, top_p=1.0, max_tokens=64)
DEFAULT = load_constitution("default")


def says_flawed(p):
    """An option rule: every verdict has p(flawed) = p whichever letter means it; of a pair the revision wins."""

    def rule(ask):
        text = ask.messages[0].content
        if "Two possible answers" in text:
            return 0.9 if "Answer (A):\n> better" in text else 0.1
        return p if "(A) Yes" in text else 1 - p

    return rule


def judges(preferred):
    """An option rule for pairs: the answer with this text wins with 0.8."""

    def rule(ask):
        return 0.8 if f"Answer (A):\n> {preferred}" in ask.messages[0].content else 0.2

    return rule


def respond(model, version=0, samples=2):
    return RespondStage(lambda: (model, version), samples, SAMPLING)


def criticise(model, constitution=DEFAULT, **changes):
    fields = {
        "sampling": SAMPLING, "rounds": 2, "early_stop": "verdict", "few_shot": True, "min_option_mass": 0.5, "accept_threshold": 0.6, "reject_threshold": 0.4,
        "similarity_threshold": 0.97, "skip_sources": ("helpful",),
    }  # fmt: skip
    return CritiqueStage(model=model, constitution=constitution, **fields | changes)


def revise(model):
    return ReviseStage(model, DEFAULT, SAMPLING, few_shot=True)


def judge(model, constitution=DEFAULT, pairing="completions", reject_position_flips=False):
    return JudgeStage(model, constitution, pairing, 0.5, reject_position_flips)


# Respond


def test_respond_carries_tokens_logprobs_seed_and_policy_version(make_prompt):
    prompts = [make_prompt("one"), make_prompt("two")]
    made = respond(ScriptedModel(), version=7, samples=3)(prompts)
    for prompt, (record,) in zip(prompts, made, strict=True):
        assert record.parent_ids == [prompt.record_id] and record.policy_version == 7 and record.prompt_token_ids
        assert [c.index for c in record.completions] == [0, 1, 2]
        assert all(len(c.token_ids) == len(c.logprobs) > 0 for c in record.completions)
        assert all(c.policy_version == 7 and c.finish_reason is FinishReason.STOP for c in record.completions)
        assert decode_record(encode_record(record), type(record)).record_id == record.record_id


def test_the_same_work_has_the_same_id_and_another_policy_another(make_prompt):
    ((first,),) = respond(ScriptedModel(), 1)([make_prompt()])
    ((again,),) = respond(ScriptedModel(), 1)([make_prompt()])
    ((newer,),) = respond(ScriptedModel(revision="w2"), 2)([make_prompt()])
    assert first.record_id == again.record_id != newer.record_id
    assert first.completions == again.completions


# Critique and revise


def test_a_clean_answer_ends_its_chain_at_once(make_response):
    ((record,),) = criticise(ScriptedModel(option_rule=says_flawed(0.1)))([make_response()])
    assert (record.final, record.end_reason, record.verdict) == (True, EndReason.SATISFIED, Verdict.CLEAN)
    assert record.final_response == "first answer" and record.final_finish_reason and record.p_flawed == pytest.approx(0.1)
    assert record.policy_version == 3 and record.critique == ""


def test_a_flawed_answer_is_criticised_revised_and_accepted(make_response):
    model = ScriptedModel(option_rule=says_flawed(0.9), text_rule=lambda ask, n: "this is why")
    ((critique,),) = criticise(model)([make_response()])
    assert (critique.final, critique.verdict, critique.critique) == (False, Verdict.FLAWED, "this is why")
    ((revision,),) = revise(ScriptedModel(text_rule=lambda ask, n: "better text now"))([critique])
    assert (revision.round, revision.response, revision.previous_response) == (1, "better text now", "first answer")
    assert revision.rounds[0].principle_id == critique.principle_id and not revision.final
    ((end,),) = criticise(ScriptedModel(option_rule=says_flawed(0.1)))([revision])
    assert (end.final, end.end_reason, end.final_response) == (True, EndReason.SATISFIED, "better text now")
    assert end.p_better == pytest.approx(0.9)


def chain(make_response, text, constitution=DEFAULT):
    model = ScriptedModel(option_rule=says_flawed(0.9), text_rule=lambda ask, n: "why")
    ((critique,),) = criticise(model, constitution)([make_response()])
    return revise(ScriptedModel(text_rule=lambda ask, n: text))([critique])[0][0]


def test_a_revision_that_loses_gives_way_to_its_predecessor(make_response):
    revision = chain(make_response, "worse text here")
    rule = lambda ask: 0.1 if "Answer (A):\n> worse" in ask.messages[0].content else 0.9  # noqa: E731
    ((end,),) = criticise(ScriptedModel(option_rule=rule))([revision])
    assert (end.end_reason, end.final_response, end.final) == (EndReason.LOST, "first answer", True)


def test_the_last_round_ends_a_chain_that_is_still_flawed(make_response):
    revision = chain(make_response, "better but flawed")
    ((end,),) = criticise(ScriptedModel(option_rule=says_flawed(0.9)), rounds=1)([revision])
    assert (end.end_reason, end.final_response, end.verdict) == (EndReason.LAST_ROUND, "better but flawed", Verdict.FLAWED)
    ((more,),) = criticise(ScriptedModel(option_rule=says_flawed(0.9), text_rule=lambda a, n: "again"), rounds=2)([revision])
    assert (more.end_reason, more.final, more.critique) == (EndReason.NONE, False, "again")


def test_earlier_principles_are_asked_again(make_response):
    revision = chain(make_response, "better now", load_constitution("course"))
    model = ScriptedModel(option_rule=says_flawed(0.1))
    criticise(model, load_constitution("course"), rounds=3)([revision])
    assert model.num_scored == 2 * (1 + 1 + 1)  # the comparison, the used principle, the next one: each in both orders


def test_without_early_stop_nothing_is_asked_and_all_rounds_are_made(make_response):
    model = ScriptedModel(text_rule=lambda ask, n: "why")
    ((critique,),) = criticise(model, early_stop="none")([make_response()])
    assert model.num_scored == 0 and critique.verdict is Verdict.NOT_ASKED and not critique.final


def test_helpful_prompts_are_not_revised(make_response):
    ((record,),) = criticise(ScriptedModel())([make_response(source="helpful")])
    assert (record.end_reason, record.final_response, record.verdict) == (EndReason.SKIPPED, "first answer", Verdict.NOT_ASKED)


def test_an_empty_answer_is_unusable(make_response):
    ((record,),) = criticise(ScriptedModel())([make_response(answers=(" ", "x"))])
    assert (record.end_reason, record.final) == (EndReason.UNUSABLE, True)


def test_a_verdict_without_mass_is_not_clean(make_response):
    model = ScriptedModel(option_rule=says_flawed(0.0), option_mass=0.2, text_rule=lambda a, n: "why")
    ((record,),) = criticise(model)([make_response()])
    assert (record.verdict, record.end_reason) == (Verdict.LOW_MASS, EndReason.NONE)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("", RejectionReason.EMPTY),
        ("first  answer", RejectionReason.COPY),
        (DEFAULT.examples[0].revision, RejectionReason.ECHO),
        (DEFAULT.examples[0].answer, RejectionReason.ECHO),
        ("Well, I would not frighten him at all.", RejectionReason.ECHO),
        ("I would not do it, friendly words are better.", RejectionReason.NONE),
        ("a new text", RejectionReason.NONE),
    ],
)
def test_unusable_revisions_are_recorded_and_end_their_chain(make_response, text, fault):
    revision = chain(make_response, text)
    assert revision.rejection_reason is fault
    assert revision.final == (fault is not RejectionReason.NONE)
    assert revision.end_reason is (EndReason.UNUSABLE if revision.final else EndReason.NONE)
    response = make_response()
    again, first = criticise(ScriptedModel(option_rule=says_flawed(0.1)))([revision, response])
    assert len(again) == (not revision.final) and first[0].parent_ids == [response.record_id]


def test_revise_passes_over_finished_chains(make_response):
    ((end,),) = criticise(ScriptedModel(option_rule=says_flawed(0.1)))([make_response()])
    assert revise(ScriptedModel())([end]) == [[]]


# Judge


@pytest.mark.parametrize(("preferred", "p"), [("first answer", 0.8), ("second answer", 0.2)])
def test_the_label_follows_the_answer_not_the_slot(make_response, preferred, p):
    ((record,),) = judge(ScriptedModel(option_rule=judges(preferred)))([make_response()])
    assert record.p_a == pytest.approx(p) and record.outcome is Outcome.OK and not record.position_flip
    assert record.p_forward == pytest.approx(record.p_backward) and record.position_gap == pytest.approx(0)
    assert (record.response_a, record.response_b, record.completion_index_a, record.completion_index_b) == (
        "first answer",
        "second answer",
        0,
        1,
    )


def test_a_judge_that_always_takes_the_first_slot_gives_one_half_and_is_marked(make_response):
    always_a = ScriptedModel(option_rule=lambda ask: 0.9)
    ((record,),) = judge(always_a)([make_response()])
    assert record.p_a == pytest.approx(0.5) and record.position_flip and record.outcome is Outcome.OK
    ((barred,),) = judge(always_a, reject_position_flips=True)([make_response()])
    assert barred.outcome is Outcome.POSITION_FLIP


def test_without_mass_there_is_no_label(make_response):
    ((record,),) = judge(ScriptedModel(option_mass=0.3))([make_response()])
    assert (record.outcome, record.p_a) == (Outcome.LOW_MASS, None)


def test_k_candidates_make_k_minus_1_pairs(make_response):
    (records,) = judge(ScriptedModel())([make_response(answers=("a", "b", "c", "d"))])
    assert [(r.response_a, r.response_b) for r in records] == [("a", "b"), ("b", "c"), ("c", "d")]
    assert len({r.record_id for r in records}) == 3


def test_the_course_judges_by_all_principles_in_one_question(make_response):
    asked = []
    model = ScriptedModel(option_rule=lambda ask: asked.append(ask.messages[0].content) or 0.7)
    ((record,),) = judge(model, load_constitution("course"))([make_response()])
    assert record.principle_id == "all" and len(asked) == 2
    assert all(principle.judge_prompt in asked[0] for principle in load_constitution("course").judge)


def test_the_revision_pairing_compares_the_final_text_with_the_first(make_response):
    revision = chain(make_response, "better text")
    ((end,),) = criticise(ScriptedModel(option_rule=says_flawed(0.1)))([revision])
    ((record,),) = judge(ScriptedModel(), pairing="revision")([end])
    assert (record.response_a, record.response_b, record.response_id) == ("better text", "first answer", end.response_id)
    assert judge(ScriptedModel(), pairing="revision")([revision]) == [[]]


def test_both_orders_against_hand_computed_numbers():
    class Fixed(ScriptedModel):
        def score_options(self, batch, options):
            return [OptionScores((-1.0, -2.0), 0.5), OptionScores((-3.0, -1.0), 0.4)]

    (result,) = compare_in_both_orders(
        Fixed(), [((ChatMessage(role="user", content="x"),), (ChatMessage(role="user", content="y"),))]
    )
    # e^-1 / (e^-1 + e^-2) = 0.7310586, and of the swapped order 1 - e^-3 / (e^-3 + e^-1) = 0.8807971
    assert result.p_forward == pytest.approx(0.7310586) and result.p_backward == pytest.approx(0.8807971)
    assert result.p_mean == pytest.approx(0.8059278) and result.option_mass == 0.4 and not result.position_flip
    assert math.isnan(compute_p_a(OptionScores((float("-inf"), float("-inf")), 0.0)))
    assert Comparison(0.6, 0.4, 1, 1).position_flip


def test_what_a_model_cannot_do_changes_the_question_and_its_hash_never_silently():
    asked = []

    class Unbegun(ScriptedModel):
        def score_options(self, batch, options):
            asked.extend(batch)
            return super().score_options(batch, options)

    able, unable = ScriptedModel(), Unbegun(capabilities=ModelCapabilities(prefill=False))
    response = ChatMessage(role="user", content="Which? (A) or (B)")
    compare_in_both_orders(unable, [((response,), (response,))])
    assert [ask.prefill for ask in asked] == ["", ""] and all(
        ask.messages[-1].content.endswith(LETTER_ONLY_INSTRUCTION) for ask in asked
    )
    hashes = {
        get_template_hash("comparison", m.capabilities)
        for m in (able, unable, Unbegun(capabilities=ModelCapabilities(False, False, num_votes=8)))
    }
    assert len(hashes) == 3 and TEMPLATE_HASHES["comparison"] in hashes


def test_what_a_judgement_and_a_critique_cost_is_on_their_records(make_response):
    ((record,),) = judge(ScriptedModel())([make_response()])
    assert record.prompt_tokens == 16  # both orders, eight each
    ((critique,),) = criticise(ScriptedModel(option_rule=says_flawed(0.9)))([make_response()])
    assert critique.prompt_tokens == 16 + 8 and critique.completion_tokens > 0
