"""Judge presets against hand-computed labels, the parsing of written replies, and the outcomes without a label."""

import itertools
import math
from dataclasses import replace

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
from schemas.records import Completion, FinishReason, Outcome, Preference, Purpose, Split

DEFAULT = load_constitution("default")
SPEC = "judge"


def judge(preset, model, constitution=DEFAULT, **overrides):
    """Return the judge stage that the settings describe."""
    flags = {"models.judge": SPEC, "judge.preset": preset} | {f"judge.{name}": str(value) for name, value in overrides.items()}
    settings, _ = load_settings(flags, environment={})
    return make_judge_stage(settings, RoleModels(settings, {SPEC: model}), constitution)


def is_a_shown_first(request):
    """Return whether response A is shown first."""
    return "Answer (A):\n> first answer" in request.messages[0].content


def make_leaning_judge(p_forward, p_backward):
    """Return a judge that gives response A these probabilities when it is shown first and second."""
    return ScriptedModel(
        option_rule=lambda request: p_forward if is_a_shown_first(request) else 1 - p_backward,
        text_rule=lambda request, n: "The one is kinder than the other.",
    )


def make_writing_judge(forward, backward=None):
    """Return a judge that writes these replies in the two orders."""
    backward = forward if backward is None else backward
    return ScriptedModel(text_rule=lambda request, n: forward if is_a_shown_first(request) else backward)


def find_floats(value):
    """Yield every float in a record's nested values."""
    if isinstance(value, float):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from find_floats(item)


def assert_no_nan(record):
    assert all(math.isfinite(value) for value in find_floats(record.model_dump()))


def judge_one(stage, response):
    ((record,),) = stage([response])
    assert decode_record(encode_record(record), Preference).model_dump_json() == record.model_dump_json()
    return record


# Presets


def test_lee2023_averages_both_orders(make_response):
    record = judge_one(judge("lee2023", make_leaning_judge(0.9, 0.4)), make_response())
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


@pytest.mark.parametrize(
    ("fields", "is_judged"),
    [
        ({"purpose": Purpose.RL}, False),
        ({"purpose": Purpose.RL, "split": Split.EVAL}, True),  # held-out labels check the reward model
        ({"purpose": Purpose.REWARD}, True),
        ({}, True),
    ],
)
def test_pair_of_a_prompt_for_rl_is_not_judged_while_a_training_loop_uses_it(make_response, fields, is_judged):
    model = make_leaning_judge(0.9, 0.4)
    stage, response = judge("lee2023", model), make_response().model_copy(update=fields)
    labeled = judge_one(stage, response)
    record = judge_one(replace(stage, skips_rl_prompts=lambda: True), response)
    assert labeled.outcome is Outcome.OK and labeled.purpose is record.purpose is response.purpose
    if is_judged:
        assert record.record_id == labeled.record_id and record.outcome is Outcome.OK
        return
    assert (record.outcome, record.p_a, record.model, record.prompt_tokens) == (Outcome.NOT_NEEDED, None, None, 0)
    assert record.record_id != labeled.record_id  # the pair can still get a label
    assert record.outcome_reason == "its prompt is for RL (prompts.rl_fraction)"


@pytest.mark.parametrize("preset", ["lee2023", "bai2022", "bai2022-cot", "ensemble-k", "course"])
@pytest.mark.parametrize(
    ("second", "finish_reason", "outcome"),
    [
        ("", FinishReason.LENGTH, Outcome.EMPTY),
        (" \n\u200b", FinishReason.STOP, Outcome.EMPTY),
        ("half of an", FinishReason.REFUSED, Outcome.WITHHELD),
        ("first answer\n", FinishReason.STOP, Outcome.IDENTICAL),
    ],
)
def test_pair_that_cannot_be_compared_is_not_judged(make_response, preset, second, finish_reason, outcome):
    completions = [
        Completion(index=i, text=text, finish_reason=reason)
        for i, (text, reason) in enumerate(
            [("first answer", FinishReason.STOP), (second, finish_reason), ("third", FinishReason.STOP)]
        )
    ]
    response = make_response().model_copy(update={"completions": completions[:2]})
    model = ScriptedModel()
    record = judge_one(judge(preset, model), response)
    assert (record.outcome, record.p_a, record.votes, record.model) == (outcome, None, [], None) and record.outcome_reason
    assert (record.response_b, record.finish_reason_b) == (second, finish_reason)
    assert model.num_scored == model.num_generated == 0
    # Other pairs of the batch are judged, and each record stays with its pair.
    replies = "Answer: (A) because" if preset == "course" else "reasons"
    model = ScriptedModel(text_rule=lambda request, n: replies)
    mixed = response.model_copy(update={"completions": completions})
    (first, *rest), (other,) = judge(preset, model)([mixed, make_response(text="another prompt")])
    assert first.outcome is outcome and len(rest) == 1
    if outcome is Outcome.IDENTICAL:
        assert rest[0].response_b == "third" and rest[0].votes
    assert other.prompt_id == make_response(text="another prompt").prompt_id and other.votes


def test_every_pairing_gives_a_pair_the_same_id_and_each_pair_its_own(make_response):
    completions = [Completion(index=i, text=f"answer {i}", finish_reason=FinishReason.STOP) for i in range(4)]
    response = make_response().model_copy(update={"completions": completions})
    stage = judge("lee2023", make_leaning_judge(0.9, 0.4))

    def judge_pairs(pairs):
        ((*records,),) = replace(stage, pairs=pairs)([response])
        return {(record.completion_index_a, record.completion_index_b): (record.record_id, record.seed) for record in records}

    neighbors, circular, every = (judge_pairs(pairs) for pairs in ("neighbors", "circular", "all"))
    assert len(neighbors) == 3 and circular == neighbors | {(0, 3): every[0, 3]} and neighbors.items() < every.items()
    assert len(every) == len({record_id for record_id, _ in every.values()}) == len({seed for _, seed in every.values()}) == 6


def test_bai2022_takes_its_label_from_the_order_that_the_seed_selects(make_response):
    stage = judge("bai2022", make_leaning_judge(0.9, 0.4))
    records = [judge_one(stage, make_response(text=f"prompt {n}")) for n in range(16)]
    assert {record.label_order for record in records} == {"forward", "backward"}
    for record in records:
        assert record.p_a == pytest.approx(0.9 if record.label_order == "forward" else 0.4)
        assert (record.p_forward, record.p_backward) == (pytest.approx(0.9), pytest.approx(0.4))
    assert [judge_one(stage, make_response(text=f"prompt {n}")).label_order for n in range(16)] == [
        record.label_order for record in records
    ]


@pytest.mark.parametrize(
    ("orders", "p"), [((0.95, 0.25), 0.6), ((0.95, 0.15), 0.55), ((0.95, 0.85), 0.6), ((0.1, 0.2), 0.4), ((0.5, 0.45), 0.475)]
)
def test_bai2022_cot_clamps_after_averaging(make_response, orders, p):
    model = make_leaning_judge(*orders)
    record = judge_one(judge("bai2022-cot", model), make_response())
    assert record.p_a == pytest.approx(p)  # if each order were clamped first, 0.95 and 0.15 would give 0.5
    assert (record.p_forward, record.p_backward) == pytest.approx(orders)
    assert record.explanation == record.votes[0].explanation_backward == "The one is kinder than the other."
    assert record.sampling.temperature == 0 and model.num_generated == model.num_scored == 2


def test_reasoning_is_an_assistant_message(make_response):
    requests = []
    model = make_leaning_judge(0.7, 0.7)
    rule = model.option_rule
    model.option_rule = lambda request: requests.append(request) or rule(request)
    judge_one(judge("bai2022-cot", model), make_response())
    for request in requests:
        assert [message.role for message in request.messages] == [
            "user",
            "assistant",
            "user",
        ] and request.prefill == "Answer: ("
        assert (
            request.messages[1].content == "The one is kinder than the other."
            and request.messages[2].content == CHOICE_QUESTION
        )


def test_ensemble_asks_k_principles_and_weights_their_votes(make_response):
    weighted = DEFAULT.model_copy(
        update={"judge": tuple(p.model_copy(update={"weight": 1.0 + i}) for i, p in enumerate(DEFAULT.judge))}
    )
    probabilities = itertools.cycle([0.9, 0.5, 0.2, 0.6, 0.7])
    by_question = {p.judge_prompt: next(probabilities) for p in weighted.judge}

    def rule(request):
        p = next(p for question, p in by_question.items() if question in request.messages[0].content)
        return p if is_a_shown_first(request) else 1 - p

    record = judge_one(judge("ensemble-k", ScriptedModel(option_rule=rule), weighted, num_principles=4), make_response())
    by_id = {p.id: p for p in weighted.judge}
    assert len({vote.principle_id for vote in record.votes}) == 4 and record.principle_id is None
    assert all(vote.p_forward == pytest.approx(by_question[by_id[vote.principle_id].judge_prompt]) for vote in record.votes)
    total = sum(by_id[vote.principle_id].weight for vote in record.votes)
    assert record.p_a == pytest.approx(sum(by_id[v.principle_id].weight * v.p_forward for v in record.votes) / total)


@pytest.mark.parametrize(
    ("num_unreadable", "outcome"), [(1, Outcome.OK), (2, Outcome.OK), (3, Outcome.LOW_MASS), (4, Outcome.LOW_MASS)]
)
def test_ensemble_gives_a_label_if_half_of_its_votes_can_be_read(make_response, num_unreadable, outcome):
    class PartlyUnreadableModel(ScriptedModel):
        def score_options(self, batch, options):
            scored = super().score_options(batch, options)
            return [s if i // 2 >= num_unreadable else OptionScores((-9.0, -2.0), 0.135) for i, s in enumerate(scored)]

    model = PartlyUnreadableModel(option_rule=lambda request: 0.8 if is_a_shown_first(request) else 0.2)
    record = judge_one(judge("ensemble-k", model, num_principles=4), make_response())
    assert record.outcome is outcome and [vote.outcome for vote in record.votes].count(Outcome.LOW_MASS) == num_unreadable
    assert record.p_a == (pytest.approx(0.8) if outcome is Outcome.OK else None)


def test_course_parses_a_letter_with_explanation_and_requires_it_in_both_orders(make_response):
    consistent = judge_one(judge("course", make_writing_judge("A) It is kinder.", "B) It is kinder.")), make_response())
    assert (consistent.p_a, consistent.outcome, consistent.principle_id, consistent.label_order) == (
        1.0,
        Outcome.OK,
        "all",
        "both",
    )
    assert consistent.explanation == "Answer: (A) It is kinder."
    assert consistent.votes[0].explanation_backward == "Answer: (B) It is kinder."
    flipped = judge_one(judge("course", make_writing_judge("A) It is first.")), make_response())
    assert (flipped.p_forward, flipped.p_backward, flipped.outcome, flipped.position_flip) == (
        1.0,
        0.0,
        Outcome.POSITION_FLIP,
        True,
    )


def test_only_lee2023_follows_a_constitution_that_judges_with_all_principles(make_response):
    course = load_constitution("course")
    assert judge_one(judge("lee2023", ScriptedModel(), course), make_response()).principle_id == "all"
    principle_id = judge_one(judge("bai2022", ScriptedModel(), course), make_response()).principle_id
    assert principle_id in {principle.id for principle in course.judge}


def test_each_preset_has_separate_record_ids_and_each_answer_mode_a_separate_template(make_response):
    answer_modes = {
        "lee2023": "logprobs",
        "bai2022": "logprobs",
        "ensemble-k": "logprobs",
        "bai2022-cot": "reasoning",
        "course": "letter",
    }
    records = {name: judge_one(judge(name, make_leaning_judge(0.7, 0.6)), make_response()) for name in PRESETS["judge"]}
    assert len({record.record_id for record in records.values()}) == len(PRESETS["judge"]) == len(answer_modes)
    assert len({(answer_modes[name], record.template_hash) for name, record in records.items()}) == 3


# Written replies


def make_generation(text, finish_reason="stop"):
    return Generation(text, finish_reason)


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
def test_parse_letter_reads_only_the_beginning(text, p):
    comparison = parse_letter(make_generation(text), "")
    expected = (None, Outcome.UNPARSEABLE, 0.0) if p is None else (p, Outcome.OK, 1.0)
    assert (comparison.p_first, comparison.outcome, comparison.option_mass) == expected


@given(st.text())
def test_parse_letter_accepts_no_other_text(text):
    has_letter = text.lstrip().startswith(("Answer: (A)", "Answer: (B)"))
    assert (parse_letter(make_generation(text), "").outcome is Outcome.OK) <= has_letter


@pytest.mark.parametrize(
    ("text", "is_refusal"),
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
def test_refusal_pattern_matches_refusals_only(text, is_refusal):
    assert bool(REFUSAL_PATTERN.match(text)) == is_refusal


@pytest.mark.parametrize("preset", ["bai2022-cot", "course"])
@pytest.mark.parametrize(
    ("generation", "outcome"),
    [
        (make_generation("I\u2019m sorry, I can\u2019t do that."), Outcome.REFUSED),
        (make_generation("", "refused"), Outcome.REFUSED),
        (make_generation("A) It is", "timeout"), Outcome.TIMEOUT),
        (make_generation("  "), Outcome.UNPARSEABLE),
        (Generation("", "length", reasoning="Let me think", ends_in_reasoning=True), Outcome.TRUNCATED),
    ],
)
def test_unusable_written_reply_has_an_outcome_and_no_label(make_response, preset, generation, outcome):
    class FixedReplyModel(ScriptedModel):
        def generate(self, batch, **sampling):
            assert all(request.timeout_s == 300 for request in batch)
            return [[generation] for _ in batch]

    record = judge_one(judge(preset, FixedReplyModel()), make_response())
    assert (record.outcome, record.p_a, record.p_forward, record.p_backward) == (outcome, None, None, None)
    assert record.votes[0].outcome is outcome and record.votes[0].p_forward is None
    assert_no_nan(record)


@pytest.mark.parametrize("preset", ["bai2022-cot", "course"])
def test_judge_that_thinks_has_a_budget_and_its_reasoning_is_kept_apart(make_response, preset):
    requests = []

    class ThinkingModel(ScriptedModel):
        def generate(self, batch, **sampling):
            requests.extend((request.prefill, sampling["max_thinking_tokens"]) for request in batch)
            return [[Generation("Answer: (A) It is kinder.", "stop", reasoning="Let me think.")] for _ in batch]

    stage = replace(judge(preset, ThinkingModel()), max_thinking_tokens=500)
    record = judge_one(stage, make_response())
    assert set(requests[:2]) == {("", 500)} and record.sampling.max_thinking_tokens == 500
    assert record.outcome in (Outcome.OK, Outcome.POSITION_FLIP)  # this judge always writes A
    assert record.votes[0].reasoning == record.votes[0].reasoning_backward == "Let me think."
    assert "think" not in record.explanation
    assert record.record_id != judge_one(judge(preset, ThinkingModel()), make_response()).record_id


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
        (
            OptionScores((math.log(0.25), -math.inf), 0.25, unparsed_replies=("",) * 6, num_cut_replies=5),
            Outcome.TRUNCATED,
        ),
    ],
)
@pytest.mark.parametrize("order", [0, 1])
def test_unusable_scores_in_one_order_give_no_label(make_response, scores, outcome, order):
    class FixedScoresModel(ScriptedModel):
        def score_options(self, batch, options):
            scored = super().score_options(batch, options)
            return [scores if i % 2 == order else valid for i, valid in enumerate(scored)]

    record = judge_one(judge("lee2023", FixedScoresModel()), make_response())
    assert (record.outcome, record.p_a) == (outcome, None)
    assert_no_nan(record)


@pytest.mark.parametrize("preset", PRESETS["judge"])
def test_record_of_an_unreadable_reply_holds_null_and_no_nan(make_response, preset):
    class UnreadableModel(ScriptedModel):
        def generate(self, batch, **sampling):
            return [[make_generation("Both are good.")] for _ in batch]

        def score_options(self, batch, options):
            return [OptionScores((math.nan, math.nan), math.nan) for _ in batch]

    record = judge_one(judge(preset, UnreadableModel()), make_response())
    assert (record.outcome, record.option_mass) == (Outcome.UNPARSEABLE, 0.0)
    assert record.p_a is record.p_forward is record.p_backward is record.position_gap is None
    assert all(vote.p_forward is vote.p_backward is None for vote in record.votes)
    assert_no_nan(record)


def test_sampled_votes_give_a_soft_label(make_response):
    """The fraction of the replies is the soft label. (The endpoint's tests cover the counting.)"""
    capabilities = ModelCapabilities(prefill=False, logprobs=False, token_ids=False, exact_logprobs=False, num_votes=8)

    class VotingModel(ScriptedModel):
        def score_options(self, batch, options):
            assert all(request.prefill == "" for request in batch)
            counts = [(6, 2) if is_a_shown_first(request) else (4, 4) for request in batch]
            return [OptionScores((math.log(a / 8), math.log(b / 8)), 1.0) for a, b in counts]

    record = judge_one(judge("lee2023", VotingModel(capabilities=capabilities)), make_response())
    assert record.p_a == pytest.approx((0.75 + 0.5) / 2) and record.option_mass == 1.0
    assert record.template_hash != judge_one(judge("lee2023", ScriptedModel()), make_response()).template_hash
