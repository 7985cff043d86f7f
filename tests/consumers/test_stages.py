"""The stages as functions from records to records, with the scripted model."""

import pytest

from constitutions.loader import load_constitution
from consumers.compare import Comparison, Question, compare_in_both_orders, compute_p_a
from consumers.critique import CritiqueStage
from consumers.judge import JudgeStage
from consumers.respond import RespondStage
from consumers.revise import ReviseStage
from consumers.templates import LETTER_ONLY_INSTRUCTION, TEMPLATE_HASHES, get_template_hash
from engine.models.interface import Generation, ModelCapabilities, OptionScores
from engine.models.scripted import ScriptedModel
from schemas import ids
from schemas.codec import decode_record, encode_record
from schemas.records import ChatMessage, EndReason, FinishReason, Outcome, RejectionReason, Round, Sampling, Verdict
from tests.support.records import RecordDatabase

SAMPLING = Sampling(temperature=1.0, top_p=1.0, max_tokens=64)
DEFAULT = load_constitution("default")


def make_verdict_rule(p):
    """Return an option rule: each verdict has p(flawed) = p for either letter; in a comparison the revision wins."""

    def rule(request):
        question = request.messages[0].content
        if "Two possible answers" in question:
            return 0.9 if "Answer (A):\n> better" in question else 0.1
        return p if "(A) Yes" in question else 1 - p

    return rule


def make_preference_rule(preferred):
    """Return an option rule for comparisons: the response that begins with `preferred` wins with 0.8."""

    def rule(request):
        return 0.8 if f"Answer (A):\n> {preferred}" in request.messages[0].content else 0.2

    return rule


def respond(model, version=0, num_completions=2):
    return RespondStage(lambda: (model, version), num_completions, SAMPLING)


def criticize(model, constitution=DEFAULT, **changes):
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


def test_response_has_tokens_logprobs_and_policy_version(make_prompt):
    prompts = [make_prompt("one"), make_prompt("two")]
    responses = respond(ScriptedModel(), version=7, num_completions=3)(prompts)
    for prompt, (record,) in zip(prompts, responses, strict=True):
        assert record.parent_ids == [prompt.record_id] and record.policy_version == 7 and record.prompt_token_ids
        assert [c.index for c in record.completions] == [0, 1, 2]
        assert all(len(c.token_ids) == len(c.logprobs) > 0 for c in record.completions)
        assert all(c.policy_version == 7 and c.finish_reason is FinishReason.STOP for c in record.completions)
        assert decode_record(encode_record(record), type(record)).record_id == record.record_id


def test_record_id_depends_on_the_policy_only(make_prompt):
    ((first,),) = respond(ScriptedModel(), 1)([make_prompt()])
    ((again,),) = respond(ScriptedModel(), 1)([make_prompt()])
    ((newer,),) = respond(ScriptedModel(revision="w2"), 2)([make_prompt()])
    assert first.record_id == again.record_id != newer.record_id
    assert first.completions == again.completions


def test_completion_with_reasoning_has_no_tokens_and_does_not_train_ppo(make_prompt, tmp_path):
    prompt = make_prompt()
    model = ScriptedModel(text_rule=lambda request, n: "<think>hm</think> yes" if n else "no")
    ((record,),) = respond(model)([prompt])
    plain, thinking = record.completions
    assert (thinking.text, thinking.reasoning, thinking.token_ids, thinking.logprobs) == ("yes", "hm", [], [])
    assert plain.token_ids and plain.reasoning == ""
    database = RecordDatabase(tmp_path / "charter.duckdb")
    database.add(prompt, record)
    reasons = database.query_rows("SELECT completion_index, exclusion_reason FROM rollouts ORDER BY 1")
    assert reasons == [(0, None), (1, "contains reasoning")]


def test_thinking_budget_changes_record_ids(make_prompt):
    thinking = SAMPLING.model_copy(update={"max_thinking_tokens": 100})
    ((plain,),) = respond(ScriptedModel())([make_prompt()])
    ((other,),) = RespondStage(lambda: (ScriptedModel(), 0), 2, thinking)([make_prompt()])
    assert plain.record_id != other.record_id and other.sampling.max_thinking_tokens == 100


# Critique and revise


def test_clean_response_ends_its_chain(make_response):
    ((record,),) = criticize(ScriptedModel(option_rule=make_verdict_rule(0.1)))([make_response()])
    assert (record.final, record.end_reason, record.verdict) == (True, EndReason.SATISFIED, Verdict.CLEAN)
    assert record.final_response == "first answer" and record.final_finish_reason and record.p_flawed == pytest.approx(0.1)
    assert record.policy_version == 3 and record.critique == ""


def test_flawed_response_is_criticized_revised_and_accepted(make_response):
    model = ScriptedModel(option_rule=make_verdict_rule(0.9), text_rule=lambda request, n: "this is why")
    ((critique,),) = criticize(model)([make_response()])
    assert (critique.final, critique.verdict, critique.critique) == (False, Verdict.FLAWED, "this is why")
    ((revision,),) = revise(ScriptedModel(text_rule=lambda request, n: "better response now"))([critique])
    assert (revision.round, revision.response, revision.previous_response) == (1, "better response now", "first answer")
    assert revision.rounds[0].principle_id == critique.principle_id and not revision.final
    ((end,),) = criticize(ScriptedModel(option_rule=make_verdict_rule(0.1)))([revision])
    assert (end.final, end.end_reason, end.final_response) == (True, EndReason.SATISFIED, "better response now")
    assert end.p_better == pytest.approx(0.9)


def make_revision(make_response, response, constitution=DEFAULT):
    model = ScriptedModel(option_rule=make_verdict_rule(0.9), text_rule=lambda request, n: "why")
    ((critique,),) = criticize(model, constitution)([make_response()])
    return revise(ScriptedModel(text_rule=lambda request, n: response))([critique])[0][0]


def test_revision_that_loses_ends_the_chain_with_its_predecessor(make_response):
    revision = make_revision(make_response, "worse response here")
    model = ScriptedModel(option_rule=lambda request: 0.1 if "Answer (A):\n> worse" in request.messages[0].content else 0.9)
    ((end,),) = criticize(model)([revision])
    assert (end.end_reason, end.final_response, end.final) == (EndReason.LOST, "first answer", True)


def test_last_round_ends_a_chain_that_is_still_flawed(make_response):
    revision = make_revision(make_response, "better but flawed")
    ((end,),) = criticize(ScriptedModel(option_rule=make_verdict_rule(0.9)), rounds=1)([revision])
    assert (end.end_reason, end.final_response, end.verdict) == (EndReason.LAST_ROUND, "better but flawed", Verdict.FLAWED)
    ((critique,),) = criticize(
        ScriptedModel(option_rule=make_verdict_rule(0.9), text_rule=lambda request, n: "again"), rounds=2
    )([revision])
    assert (critique.end_reason, critique.final, critique.critique) == (EndReason.NONE, False, "again")


def test_critique_of_a_revision_repeats_the_verdicts_of_earlier_principles(make_response):
    revision = make_revision(make_response, "better now", load_constitution("course"))
    model = ScriptedModel(option_rule=make_verdict_rule(0.1))
    criticize(model, load_constitution("course"), rounds=3)([revision])
    assert model.num_scored == 2 * (1 + 1 + 1)  # comparison, earlier principle, next principle; each in both orders


def test_chain_without_early_stop_has_no_verdicts(make_response):
    model = ScriptedModel(text_rule=lambda request, n: "why")
    ((critique,),) = criticize(model, early_stop="none")([make_response()])
    assert model.num_scored == 0 and critique.verdict is Verdict.NOT_ASKED and not critique.final


def test_skipped_source_is_not_revised(make_response):
    ((record,),) = criticize(ScriptedModel())([make_response(source="helpful")])
    assert (record.end_reason, record.final_response, record.verdict) == (EndReason.SKIPPED, "first answer", Verdict.NOT_ASKED)


def test_empty_response_is_unusable(make_response):
    for source in ("test", "helpful"):  # "helpful" is skipped otherwise
        ((record,),) = criticize(ScriptedModel())([make_response(responses=(" \n\u200b", "x"), source=source)])
        assert (record.end_reason, record.final) == (EndReason.UNUSABLE, True)
        assert record.rejection_reason is RejectionReason.EMPTY


def test_withheld_response_is_unusable(make_response):
    response = make_response()
    withheld = response.completions[0].model_copy(update={"text": "The first half", "finish_reason": FinishReason.REFUSED})
    ((record,),) = criticize(ScriptedModel())([response.model_copy(update={"completions": [withheld]})])
    assert (record.end_reason, record.rejection_reason) == (EndReason.UNUSABLE, RejectionReason.REFUSED)


def make_chain_in_round(revision, *principle_ids):
    """Return the revision with these principles as the principles of its finished rounds."""
    rounds = [Round(round=n + 1, principle_id=id_, critique="c", revision="r") for n, id_ in enumerate(principle_ids)]
    return revision.model_copy(update={"rounds": rounds, "round": len(rounds)})


def test_principle_drawn_twice_is_asked_and_counted_once(make_response):
    revision, drawn = make_revision(make_response, "better now"), {}
    for round_index in range(
        1, 40
    ):  # sampling is independent per round, so the principle of some rounds repeats an earlier one
        seed = ids.compute_stage_seed("principle", revision.response_id, round_index)
        drawn.setdefault(DEFAULT.select_critique_principle(seed, round_index).id, round_index)
    id_, round_index = next(iter(drawn.items()))
    model = ScriptedModel(option_rule=make_verdict_rule(0.9), text_rule=lambda request, n: "why")
    repeated = make_chain_in_round(revision, *[id_] * round_index)
    ((record,),) = criticize(model, rounds=60)([repeated])
    assert record.principle_id == id_ and [verdict.principle_id for verdict in record.verdicts] == [id_]
    assert model.num_scored == 2 * (1 + 1)  # the comparison and one verdict, each in both orders


@pytest.mark.parametrize(
    ("rule", "end_reason"),
    [
        (make_verdict_rule(0.1), EndReason.SATISFIED),
        (lambda request: 0.1 if "Answer (A):\n> better" in request.messages[0].content else 0.9, EndReason.LOST),
    ],
)
def test_end_of_a_chain_names_the_principle_of_its_revision(make_response, rule, end_reason):
    course = load_constitution("course")  # rotates, so the next principle is another one
    revision = make_revision(make_response, "better now", course)
    ((end,),) = criticize(ScriptedModel(option_rule=rule), course, rounds=3)([revision])
    assert (end.end_reason, end.principle_id, end.critique) == (end_reason, revision.rounds[-1].principle_id, "")
    assert len({verdict.principle_id for verdict in end.verdicts}) == 2


def test_written_critique_of_a_revision_names_its_own_principle(make_response):
    course = load_constitution("course")
    revision = make_revision(make_response, "better now", course)
    for text in ("why", ""):  # also if the critic writes nothing
        model = ScriptedModel(option_rule=make_verdict_rule(0.9), text_rule=lambda request, n, text=text: text)
        ((critique,),) = criticize(model, course, rounds=3)([revision])
        assert critique.end_reason is (EndReason.NONE if text else EndReason.NO_CRITIQUE) and critique.critique == text
        assert critique.principle_id == course.critique[1].id != revision.rounds[-1].principle_id


@pytest.mark.parametrize(
    ("generation", "reason"),
    [
        (Generation("", "length", reasoning="hm", ends_in_reasoning=True), RejectionReason.EMPTY),
        (Generation("The answer", "refused"), RejectionReason.REFUSED),
        (None, RejectionReason.LEAK),  # the critic repeats its instruction
    ],
)
def test_unusable_critique_is_not_revised(make_response, generation, reason):
    class FixedCritic(ScriptedModel):
        def generate(self, batch, **sampling):
            repeated = [request.messages[0].content.rpartition("\n\n")[2] for request in batch]
            return [[generation or Generation(text, "stop")] for text in repeated]

    ((record,),) = criticize(FixedCritic(option_rule=make_verdict_rule(0.9)))([make_response()])
    assert (record.end_reason, record.final, record.rejection_reason) == (EndReason.NO_CRITIQUE, True, reason)
    assert record.principle_id and record.reasoning == (generation.reasoning if generation else "")
    assert revise(ScriptedModel())([record]) == [[]] == judge(ScriptedModel(), pairing="revision")([record])


def test_copied_formatting_is_not_part_of_critiques_and_revisions(make_response):
    model = ScriptedModel(option_rule=make_verdict_rule(0.9), text_rule=lambda request, n: "> this is why")
    ((critique,),) = criticize(model)([make_response()])
    ((revision,),) = revise(ScriptedModel(text_rule=lambda request, n: "Assistant: a better response now"))([critique])
    assert (critique.critique, critique.leaks) == ("this is why", ["quotation mark"])
    assert (revision.response, revision.leaks, revision.final) == ("a better response now", ["role name"], False)


def test_verdict_with_low_option_mass_is_not_clean(make_response):
    model = ScriptedModel(option_rule=make_verdict_rule(0.0), option_mass=0.2, text_rule=lambda request, n: "why")
    ((record,),) = criticize(model)([make_response()])
    assert (record.verdict, record.end_reason) == (Verdict.LOW_MASS, EndReason.NONE)


@pytest.mark.parametrize(
    ("response", "rejection_reason"),
    [
        ("", RejectionReason.EMPTY),
        ("first  answer", RejectionReason.COPY),
        (DEFAULT.examples[0].revision, RejectionReason.ECHO),
        (DEFAULT.examples[0].answer, RejectionReason.ECHO),
        ("Well, I would not frighten him at all.", RejectionReason.ECHO),
        ("I would not do it, friendly words are better.", RejectionReason.NONE),
        ("a new response", RejectionReason.NONE),
    ],
)
def test_unusable_revision_has_a_reason_and_ends_its_chain(make_response, response, rejection_reason):
    revision = make_revision(make_response, response)
    assert revision.rejection_reason is rejection_reason
    assert revision.final == (rejection_reason is not RejectionReason.NONE)
    assert revision.end_reason is (EndReason.UNUSABLE if revision.final else EndReason.NONE)
    other = make_response()
    critiques, other_critiques = criticize(ScriptedModel(option_rule=make_verdict_rule(0.1)))([revision, other])
    assert len(critiques) == (not revision.final) and other_critiques[0].parent_ids == [other.record_id]


def test_revise_skips_finished_chains(make_response):
    ((end,),) = criticize(ScriptedModel(option_rule=make_verdict_rule(0.1)))([make_response()])
    assert revise(ScriptedModel())([end]) == [[]]


# Judge


@pytest.mark.parametrize(("preferred", "p"), [("first answer", 0.8), ("second answer", 0.2)])
def test_label_follows_the_response_and_not_its_position(make_response, preferred, p):
    ((record,),) = judge(ScriptedModel(option_rule=make_preference_rule(preferred)))([make_response()])
    assert record.p_a == pytest.approx(p) and record.outcome is Outcome.OK and not record.position_flip
    assert record.p_forward == pytest.approx(record.p_backward) and record.position_gap == pytest.approx(0)
    assert (record.response_a, record.response_b, record.completion_index_a, record.completion_index_b) == (
        "first answer",
        "second answer",
        0,
        1,
    )


def test_judge_that_always_prefers_the_first_position_gives_one_half_and_a_flip(make_response):
    always_a = ScriptedModel(option_rule=lambda request: 0.9)
    ((record,),) = judge(always_a)([make_response()])
    assert record.p_a == pytest.approx(0.5) and record.position_flip and record.outcome is Outcome.OK
    ((rejected,),) = judge(always_a, reject_position_flips=True)([make_response()])
    assert rejected.outcome is Outcome.POSITION_FLIP


def test_judge_with_low_option_mass_gives_no_label(make_response):
    ((record,),) = judge(ScriptedModel(option_mass=0.3))([make_response()])
    assert (record.outcome, record.p_a) == (Outcome.LOW_MASS, None)


def test_k_completions_give_k_minus_1_pairs(make_response):
    (records,) = judge(ScriptedModel())([make_response(responses=("a", "b", "c", "d"))])
    assert [(r.response_a, r.response_b) for r in records] == [("a", "b"), ("b", "c"), ("c", "d")]
    assert len({r.record_id for r in records}) == 3


def test_course_constitution_puts_all_principles_in_one_question(make_response):
    questions = []
    model = ScriptedModel(option_rule=lambda request: questions.append(request.messages[0].content) or 0.7)
    ((record,),) = judge(model, load_constitution("course"))([make_response()])
    assert record.principle_id == "all" and len(questions) == 2
    assert all(principle.judge_prompt in questions[0] for principle in load_constitution("course").judge)


def test_revision_pairing_compares_the_final_response_with_the_initial_one(make_response):
    revision = make_revision(make_response, "better response")
    ((end,),) = criticize(ScriptedModel(option_rule=make_verdict_rule(0.1)))([revision])
    ((record,),) = judge(ScriptedModel(), pairing="revision")([end])
    assert (record.response_a, record.response_b, record.response_id) == ("better response", "first answer", end.response_id)
    assert judge(ScriptedModel(), pairing="revision")([revision]) == [[]]


def test_compare_in_both_orders_matches_hand_computed_values():
    class Fixed(ScriptedModel):
        def score_options(self, batch, options):
            return [OptionScores((-1.0, -2.0), 0.5), OptionScores((-3.0, -1.0), 0.4)]

    (result,) = compare_in_both_orders(
        Fixed(), [(Question((ChatMessage(role="user", content="x"),)), Question((ChatMessage(role="user", content="y"),)))]
    )
    # e^-1 / (e^-1 + e^-2) = 0.7310586, and in the other order 1 - e^-3 / (e^-3 + e^-1) = 0.8807971
    assert result.p_forward == pytest.approx(0.7310586) and result.p_backward == pytest.approx(0.8807971)
    assert result.p_mean == pytest.approx(0.8059278) and result.option_mass == 0.4 and not result.position_flip
    assert compute_p_a(OptionScores((float("-inf"), float("-inf")), 0.0)) is None
    assert Comparison(0.6, 0.4, 1, 1).position_flip


def test_missing_capability_changes_the_question_and_the_template_hash():
    requests = []

    class RecordingModel(ScriptedModel):
        def score_options(self, batch, options):
            requests.extend(batch)
            return super().score_options(batch, options)

    with_prefill, without_prefill = ScriptedModel(), RecordingModel(capabilities=ModelCapabilities(prefill=False))
    question = Question((ChatMessage(role="user", content="Which? (A) or (B)"),))
    compare_in_both_orders(without_prefill, [(question, question)])
    assert [request.prefill for request in requests] == ["", ""] and all(
        request.messages[-1].content.endswith(LETTER_ONLY_INSTRUCTION) for request in requests
    )
    hashes = {
        get_template_hash("comparison", m.capabilities)
        for m in (with_prefill, without_prefill, RecordingModel(capabilities=ModelCapabilities(False, False, num_votes=8)))
    }
    assert len(hashes) == 3 and TEMPLATE_HASHES["comparison"] in hashes


def test_preference_and_critique_records_count_their_tokens(make_response):
    ((record,),) = judge(ScriptedModel())([make_response()])
    assert record.prompt_tokens == 16  # two orders of eight tokens each
    ((critique,),) = criticize(ScriptedModel(option_rule=make_verdict_rule(0.9)))([make_response()])
    assert critique.prompt_tokens == 16 + 8 and critique.completion_tokens > 0
