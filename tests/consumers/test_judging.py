"""The judging recipes against hand-computed labels, what a judge's own words may and may not mean, and reasons for no label."""

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from charter.models import RoleModels
from charter.pipeline import make_judge_stage
from constitutions.loader import load_constitution as load_constitution
from consumers.compare import REFUSAL_PATTERN, parse_letter
from consumers.templates import CHOICE_QUESTION
from engine.models.interface import Generation, ModelCapabilities, OptionScores
from engine.models.scripted import ScriptedModel
from engine.settings import PRESETS, load_settings
from schemas.codec import decode_record, encode_record
from schemas.records import Outcome, Preference

DEFAULT = load_constitution("default")
SPEC = "judge"


def judge(preset, model, constitution=DEFAULT, **more):
    """The stage as the settings make it."""
    flags = {"models.judge": SPEC, "judge.preset": preset} | {f"judge.{name}": str(value) for name, value in more.items()}
    settings, _ = load_settings(flags, environment={})
    return make_judge_stage(settings, RoleModels(settings, {SPEC: model}), constitution)


def shown_first(ask):
    """Whether the answer called a is the one shown first."""
    return "Answer (A):\n> first answer" in ask.messages[0].content


def leaning(p_forward, p_backward):
    """A judge that gives the answer called a these probabilities when it is shown first and second."""
    return ScriptedModel(
        option_rule=lambda ask: p_forward if shown_first(ask) else 1 - p_backward,
        text_rule=lambda ask, n: "The one is kinder than the other.",
    )


def writes(forward, backward=None):
    """A judge that writes these texts."""
    other = forward if backward is None else backward
    return ScriptedModel(text_rule=lambda ask, n: forward if shown_first(ask) else other)


def one(stage, response):
    ((record,),) = stage([response])
    assert decode_record(encode_record(record), Preference).model_dump_json() == record.model_dump_json()
    return record


# The recipes


def test_lee2023_averages_both_orders(make_response):
    record = one(judge("lee2023", leaning(0.9, 0.4)), make_response())
    assert record.p_a == pytest.approx(0.65) and record.label_order == "both" and record.outcome is Outcome.OK
    assert (record.p_forward, record.p_backward, record.position_gap) == (
        pytest.approx(0.9),
        pytest.approx(0.4),
        pytest.approx(0.5),
    )
    (vote,) = record.votes
    assert record.position_flip and record.option_mass == pytest.approx(0.9) and vote.principle_id == record.principle_id
    assert (vote.p_forward, vote.outcome, vote.weight) == (pytest.approx(0.9), Outcome.OK, 1.0)
    assert (record.preset, record.sampling, record.explanation) == ("lee2023", None, "")


def test_bai2022_labels_by_one_order_that_the_seed_picks_and_keeps_both(make_response):
    stage = judge("bai2022", leaning(0.9, 0.4))
    records = [one(stage, make_response(text=f"prompt {n}")) for n in range(16)]
    assert {record.label_order for record in records} == {"forward", "backward"}
    for record in records:
        assert record.p_a == pytest.approx(0.9 if record.label_order == "forward" else 0.4)
        assert (record.p_forward, record.p_backward) == (pytest.approx(0.9), pytest.approx(0.4))
    assert [one(stage, make_response(text=f"prompt {n}")).label_order for n in range(16)] == [
        record.label_order for record in records
    ]


@pytest.mark.parametrize(
    ("orders", "p"), [((0.95, 0.25), 0.6), ((0.95, 0.15), 0.55), ((0.95, 0.85), 0.6), ((0.1, 0.2), 0.4), ((0.5, 0.45), 0.475)]
)
def test_bai2022_cot_clamps_after_averaging(make_response, orders, p):
    model = leaning(*orders)
    record = one(judge("bai2022-cot", model), make_response())
    assert record.p_a == pytest.approx(p)  # clamped before, 0.95 and 0.15 would give a half
    assert (record.p_forward, record.p_backward) == pytest.approx(orders)
    assert record.explanation == record.votes[0].explanation_backward == "The one is kinder than the other."
    assert record.sampling.temperature == 0 and model.num_generated == model.num_scored == 2


def test_reasoning_stays_the_judges_own_turn(make_response):
    asked = []
    model = leaning(0.7, 0.7)
    rule = model.option_rule
    model.option_rule = lambda ask: asked.append(ask) or rule(ask)
    one(judge("bai2022-cot", model), make_response())
    for ask in asked:
        assert [message.role for message in ask.messages] == ["user", "assistant", "user"] and ask.prefill == "Answer: ("
        assert ask.messages[1].content == "The one is kinder than the other." and ask.messages[2].content == CHOICE_QUESTION


def test_an_ensemble_asks_k_principles_and_weighs_their_votes(make_response):
    weighty = DEFAULT.model_copy(
        update={"judge": tuple(p.model_copy(update={"weight": 1.0 + i}) for i, p in enumerate(DEFAULT.judge))}
    )
    chances = itertools.cycle([0.9, 0.5, 0.2, 0.6, 0.7])
    by_question = {p.judge_prompt: next(chances) for p in weighty.judge}

    def rule(ask):
        p = next(p for question, p in by_question.items() if question in ask.messages[0].content)
        return p if shown_first(ask) else 1 - p

    record = one(judge("ensemble-k", ScriptedModel(option_rule=rule), weighty, num_principles=4), make_response())
    by_id = {p.id: p for p in weighty.judge}
    assert len({vote.principle_id for vote in record.votes}) == 4 and record.principle_id is None
    assert all(vote.p_forward == pytest.approx(by_question[by_id[vote.principle_id].judge_prompt]) for vote in record.votes)
    total = sum(by_id[vote.principle_id].weight for vote in record.votes)
    assert record.p_a == pytest.approx(sum(by_id[v.principle_id].weight * v.p_forward for v in record.votes) / total)


@pytest.mark.parametrize(
    ("silent", "outcome"), [(1, Outcome.OK), (2, Outcome.OK), (3, Outcome.LOW_MASS), (4, Outcome.LOW_MASS)]
)
def test_an_ensemble_labels_when_half_of_it_can_be_read_and_by_those_alone(make_response, silent, outcome):
    class Partly(ScriptedModel):
        def score_options(self, batch, options):
            scored = super().score_options(batch, options)
            return [s if i // 2 >= silent else OptionScores((-9.0, -2.0), 0.135) for i, s in enumerate(scored)]

    model = Partly(option_rule=lambda ask: 0.8 if shown_first(ask) else 0.2)
    record = one(judge("ensemble-k", model, num_principles=4), make_response())
    assert record.outcome is outcome and [vote.outcome for vote in record.votes].count(Outcome.LOW_MASS) == silent
    assert record.p_a == (pytest.approx(0.8) if outcome is Outcome.OK else None)


def test_the_course_reads_a_letter_with_its_explanation_and_wants_it_twice(make_response):
    sure = one(judge("course", writes("A) It is kinder.", "B) It is kinder.")), make_response())
    assert (sure.p_a, sure.outcome, sure.principle_id, sure.label_order) == (1.0, Outcome.OK, "all", "both")
    assert sure.explanation == "Answer: (A) It is kinder." and sure.votes[0].explanation_backward == "Answer: (B) It is kinder."
    torn = one(judge("course", writes("A) It stands first.")), make_response())
    assert (torn.p_forward, torn.p_backward, torn.outcome, torn.position_flip) == (1.0, 0.0, Outcome.POSITION_FLIP, True)


def test_a_constitution_asked_whole_is_asked_whole_by_lee2023_alone(make_response):
    course = load_constitution("course")
    assert one(judge("lee2023", ScriptedModel(), course), make_response()).principle_id == "all"
    drawn = one(judge("bai2022", ScriptedModel(), course), make_response()).principle_id
    assert drawn in {principle.id for principle in course.judge}


def test_each_recipe_has_records_and_a_template_of_its_own(make_response):
    asked = {
        "lee2023": "logprobs",
        "bai2022": "logprobs",
        "ensemble-k": "logprobs",
        "bai2022-cot": "reasoning",
        "course": "letter",
    }
    records = {name: one(judge(name, leaning(0.7, 0.6)), make_response()) for name in PRESETS["judge"]}
    assert len({record.record_id for record in records.values()}) == len(PRESETS["judge"]) == len(asked)
    assert len({(asked[name], record.template_hash) for name, record in records.items()}) == 3


# What a judge's words mean


def written(text, finish="stop"):
    return Generation(text, finish)


@pytest.mark.parametrize(
    ("text", "p"),
    [
        ("Answer: (A) because it is honest.", 1.0),
        ("  Answer: (B)\nIt says less.", 0.0),
        ("Answer: (A). Answer (B) is rude.", 1.0),
        ("Answer: (A) or (B)", None),
        ("Answer: (A)/(B)", None),
        ("Answer: (A) and Answer: (B)", None),
        ("Answer: (C)", None),
        ("Answer: A", None),
        ("answer: (a)", None),
        ("The better one is Answer: (A)", None),
        ("A", None),
        ("Both are good.", None),
        ("", None),
    ],
)
def test_a_letter_is_read_from_the_beginning_or_not_at_all(text, p):
    reading = parse_letter(written(text), "")
    if p is None:
        assert math.isnan(reading.p_first) and reading.outcome is Outcome.UNPARSEABLE and reading.option_mass == 0
    else:
        assert (reading.p_first, reading.outcome, reading.option_mass) == (p, Outcome.OK, 1.0)


@given(st.text())
def test_no_other_text_is_a_letter(text):
    begins = text.lstrip().startswith(("Answer: (A)", "Answer: (B)"))
    assert (parse_letter(written(text), "").outcome is Outcome.OK) <= begins


@pytest.mark.parametrize(
    ("text", "refuses"),
    [
        ("I'm sorry, but I can't compare these.", True),
        ("I cannot help with that.", True),
        ("Unfortunately, I am unable to judge this.", True),
        ("As an AI language model, I have no view.", True),
        ("Answer: (I'm sorry, I won't choose.", True),
        ("Answer (A) says it is sorry; that is kinder.", False),
        ("The assistant cannot know that, so (B).", False),
        ("I can see that the first is better.", False),
    ],
)
def test_a_refusal_is_told_from_a_judgement_about_one(text, refuses):
    assert bool(REFUSAL_PATTERN.match(text)) == refuses


@pytest.mark.parametrize("preset", ["bai2022-cot", "course"])
@pytest.mark.parametrize(
    ("answer", "outcome"),
    [
        (written("I\u2019m sorry, I can\u2019t do that."), Outcome.REFUSED),
        (written("", "refused"), Outcome.REFUSED),
        (written("A) It is", "timeout"), Outcome.TIMEOUT),
        (written("  "), Outcome.UNPARSEABLE),
    ],
)
def test_what_a_judge_does_not_say_has_a_reason_and_no_label(make_response, preset, answer, outcome):
    class Silent(ScriptedModel):
        def generate(self, batch, **sampling):
            assert all(ask.timeout_s == 300 for ask in batch)
            return [[answer] for _ in batch]

    record = one(judge(preset, Silent()), make_response())
    assert (record.outcome, record.p_a, record.p_forward, record.p_backward) == (outcome, None, None, None)
    assert record.votes[0].outcome is outcome


@pytest.mark.parametrize(
    ("scores", "outcome"),
    [
        (OptionScores((math.nan, -1.0), 0.9), Outcome.UNPARSEABLE),
        (OptionScores((-math.inf, -math.inf), 0.0), Outcome.UNPARSEABLE),
        (OptionScores((0.5, -1.0), 0.9), Outcome.UNPARSEABLE),
        (OptionScores((-0.1, -0.2), 1.7), Outcome.UNPARSEABLE),
        (OptionScores((-1.0, -2.0), math.nan), Outcome.UNPARSEABLE),
        (OptionScores((-3.0, -4.0), 0.07), Outcome.LOW_MASS),
        (
            OptionScores((math.log(0.25), -math.inf), 0.25, unparsed_replies=("I cannot choose.",) * 5 + ("no",)),
            Outcome.REFUSED,
        ),
        (
            OptionScores((math.log(0.25), -math.inf), 0.25, unparsed_replies=("I cannot choose.",) + ("both",) * 5),
            Outcome.UNPARSEABLE,
        ),
    ],
)
@pytest.mark.parametrize("order", [0, 1])
def test_scores_that_say_nothing_in_one_order_give_no_label(make_response, scores, outcome, order):
    class Odd(ScriptedModel):
        def score_options(self, batch, options):
            scored = super().score_options(batch, options)
            return [scores if i % 2 == order else one for i, one in enumerate(scored)]

    record = one(judge("lee2023", Odd()), make_response())
    assert (record.outcome, record.p_a) == (outcome, None)


def test_votes_of_a_server_without_log_probabilities_are_counted(make_response):
    """The endpoint's own counting is tested with it; here that a share of replies is a soft label like any other."""
    capabilities = ModelCapabilities(prefill=False, logprobs=False, token_ids=False, exact_logprobs=False, num_votes=8)

    class Voting(ScriptedModel):
        def score_options(self, batch, options):
            assert all(ask.prefill == "" for ask in batch)
            shares = [(6, 2) if shown_first(ask) else (4, 4) for ask in batch]
            return [OptionScores((math.log(a / 8), math.log(b / 8)), 1.0) for a, b in shares]

    record = one(judge("lee2023", Voting(capabilities=capabilities)), make_response())
    assert record.p_a == pytest.approx((0.75 + 0.5) / 2) and record.option_mass == 1.0
    assert record.template_hash != one(judge("lee2023", ScriptedModel()), make_response()).template_hash
