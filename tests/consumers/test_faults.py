"""No invented label: a model that fails in every way, under every recipe, and what of that reaches the views that train.

The fake's honest answers are recognisable: as a judge it gives the answer called a 0.8 in either place, as a critic it finds
every text flawed with 0.9 and its revisions say so. So a label that is anything else came from a fault, a default or a draw.
"""

import math
import random
from collections import Counter

import pytest

from charter.models import RoleModels
from charter.pipeline import make_critique_stage, make_judge_stage, make_stage
from constitutions.loader import load_constitution as load_constitution
from engine.models.interface import LOCAL_CAPABILITIES, Generation, ModelCapabilities, OptionScores
from engine.models.scripted import ScriptedModel
from engine.settings import PRESETS, load_settings
from schemas.records import Critique, EndReason, FinishReason, Outcome, RejectionReason, Response, Revision, Verdict
from tests.support.records import RecordDatabase

DEFAULT = load_constitution("default")
SPEC = "faulty"
VOTES = ModelCapabilities(prefill=False, logprobs=False, token_ids=False, exact_logprobs=False, num_votes=8)
PAIRS = 30
HONEST = "an honest revision of it"
BY_PLACE = "the answer shown first"  # of a prompt with these words the judge prefers that one

SCORES = [
    OptionScores((math.nan, math.nan), math.nan),
    OptionScores((math.nan, -0.1), 0.9),
    OptionScores((-math.inf, -math.inf), 0.0),
    OptionScores((math.log(0.3), math.log(0.1)), 0.4),
    OptionScores((0.7, -3.0), 2.1),
    OptionScores((-0.5, -0.9), math.inf),
    OptionScores((math.log(0.125), -math.inf), 0.125, unparsed_replies=("I cannot choose between these.",) * 7),
    OptionScores((-math.inf, -math.inf), 0.0, unparsed_replies=("both",) * 8),
]
TEXTS = [
    Generation("", "stop"),
    Generation(" \n ", "length"),
    Generation("I'm sorry, but I can't help with that.", "stop"),
    Generation("A) It is", "timeout"),
    Generation("No problems. A) It is the better one.", "refused"),
]
UNREAD = [Generation("A) or (B)", "stop"), Generation("Either answer would do.", "stop"), Generation("C) It is best.", "stop")]


class FaultyModel(ScriptedModel):
    """A FAKE that fails about every third time, each time in another way, and counts it."""

    def __init__(self, seed, capabilities=LOCAL_CAPABILITIES, rate=0.3):
        super().__init__(id="faulty", capabilities=capabilities, option_rule=honest_share, text_rule=self.honest_text)
        self.rng, self.rate, self.counted = random.Random(seed), rate, Counter()

    def honest_text(self, ask, n):
        if "Begin with" in ask.messages[0].content:
            opening = "" if ask.prefill else "Answer: ("
            return f"{opening}{'A' if honest_share(ask) > 0.5 else 'B'}) It is kinder."
        return f"{HONEST} {self.rng.random()}"

    def fails(self):
        failing = self.rng.random() < self.rate
        self.counted["faults" if failing else "honest"] += 1
        return failing

    def score_one(self, ask, options):
        return self.rng.choice(SCORES) if self.fails() else super().score_one(ask, options)

    def generate_one(self, ask, sample, temperature, max_tokens):
        if not self.fails():
            return super().generate_one(ask, sample, temperature, max_tokens)
        content = ask.messages[0].content
        if "Write only the new answer" in content:  # a revision: also what copies and what echoes
            worked = [Generation(example.revision, "stop") for example in DEFAULT.examples]
            shown = content.rpartition("\nAssistant:\n> ")[2].partition("\n\n")[0]
            return self.rng.choice([*TEXTS[:2], TEXTS[4], *worked, Generation(shown, "stop")])
        return self.rng.choice([*TEXTS, *(UNREAD if "Begin with" in content else [])])


def honest_share(ask):
    text = ask.messages[0].content
    if BY_PLACE in text:
        return 0.8
    shown = [text.partition(f"Answer ({letter}):\n> ")[2] for letter in "AB"]
    if any(shown):
        a, b = (2 * one.startswith(HONEST) + one.startswith("good") for one in shown)
        return 0.8 if a > b else 0.2 if a < b else 0.5
    return 0.9 if "(A) Yes" in text else 0.1


def settings(role, **chosen):
    flags = {f"models.{role}": SPEC} | {name.replace("__", "."): value for name, value in chosen.items()}
    return load_settings(flags, environment={})[0]


def in_db(tmp_path, records):
    world = RecordDatabase(tmp_path / "charter.duckdb")
    world.add(*records)
    return world


SAID = {"lee2023": 0.8, "bai2022": 0.8, "bai2022-cot": 0.6, "ensemble-k": 0.8, "course": 1.0}


@pytest.fixture(scope="module")
def judgements(make_response):
    """Every recipe's labels of the same pairs by a judge that fails, on log-probabilities and on votes; and that judge."""
    pairs = [make_response(("good", "bad"), text=f"prompt {n}") for n in range(PAIRS)]
    made = {}
    for preset in PRESETS["judge"]:
        for capabilities in (LOCAL_CAPABILITIES, VOTES):
            model, chosen = (
                FaultyModel(f"{preset}/{capabilities.num_votes}", capabilities),
                settings("judge", judge__preset=preset),
            )
            stage = make_judge_stage(chosen, RoleModels(chosen, {SPEC: model}), DEFAULT)
            made[preset, capabilities.num_votes] = [label for (label,) in stage(pairs)], model
    return made


@pytest.mark.parametrize("votes", [0, VOTES.num_votes], ids=["logprobs", "votes"])
@pytest.mark.parametrize("preset", PRESETS["judge"])
def test_only_honest_judgements_become_labels(judgements, preset, votes):
    records, model = judgements[preset, votes]
    assert len(records) == PAIRS and model.counted["faults"] > PAIRS / 4
    for record in records:
        assert (record.p_a is not None) == (record.outcome in (Outcome.OK, Outcome.POSITION_FLIP))
        if record.outcome is Outcome.OK:
            assert record.p_a == pytest.approx(SAID[preset])
        for vote in record.votes:  # a half that could be read says what it said; one that could not says nothing
            if vote.outcome is Outcome.OK:
                assert vote.p_forward == pytest.approx(vote.p_backward) == pytest.approx(1.0 if preset == "course" else 0.8)
        read = sum(vote.weight for vote in record.votes if vote.outcome is Outcome.OK)
        assert (record.outcome is Outcome.OK) == (2 * read >= sum(vote.weight for vote in record.votes))
    outcomes = Counter(record.outcome for record in records)
    assert outcomes[Outcome.OK] > PAIRS / 10 and Outcome.UNKNOWN not in outcomes and len(outcomes) >= 3


def test_a_judge_that_was_cut_off_is_no_judge(judgements):
    """What it had written by then can look like an answer."""
    for (preset, votes), (made, _) in judgements.items():
        told = Counter(vote.outcome for record in made for vote in record.votes)
        assert (told[Outcome.TIMEOUT] > 0) == (preset in ("bai2022-cot", "course")), (preset, votes)


@pytest.mark.parametrize("preset", PRESETS["judge"])
def test_a_judge_that_looks_at_the_place_trains_nothing_where_flips_are_rejected(tmp_path, make_response, preset):
    asked = [f"{BY_PLACE if n % 2 else 'fair'} {n}" for n in range(PAIRS)]
    chosen = settings("judge", judge__preset=preset, judge__reject_position_flips="true")
    stage = make_judge_stage(chosen, RoleModels(chosen, {SPEC: FaultyModel(preset)}), DEFAULT)
    made = [label for (label,) in stage([make_response(("good", "bad"), text=text) for text in asked])]
    outcomes = Counter((BY_PLACE in record.messages[0].content, record.outcome) for record in made)
    assert outcomes[True, Outcome.POSITION_FLIP] > 0 and outcomes[False, Outcome.OK] > 0
    assert outcomes[True, Outcome.OK] == outcomes[False, Outcome.POSITION_FLIP] == 0
    learned = in_db(tmp_path, made).query_rows("SELECT messages[1].content, p_a FROM preference_pairs")
    assert len(learned) == outcomes[False, Outcome.OK]
    assert all(BY_PLACE not in text and p_a == pytest.approx(SAID[preset]) for text, p_a in learned)


def test_nothing_else_reaches_the_training_view_and_refusals_are_counted_by_principle(tmp_path, judgements):
    records = [
        record.model_copy(update={"run_id": f"{preset}/{votes}"})
        for (preset, votes), (made, _) in judgements.items()
        for record in made
    ]
    world = in_db(tmp_path, records)
    assert world.query_rows("SELECT DISTINCT is_duplicate FROM raw.preferences") == [(False,)]
    trained = Counter(world.query_rows("SELECT run_id, round(p_a, 6) FROM preference_pairs"))
    said = Counter((r.run_id, round(SAID[r.preset], 6)) for r in records if r.outcome is Outcome.OK)
    assert trained == said
    refused = Counter((r.run_id, v.principle_id) for r in records for v in r.votes if v.outcome is Outcome.REFUSED)
    found = world.query_rows("SELECT run_id, principle_id, refused FROM principle_stats WHERE stage = 'judge' AND refused > 0")
    assert {(run, principle): count for run, principle, count in found} == refused and len(refused) > 10


def chains(model, preset, responses):
    """Every record of these responses' chains."""
    chosen = settings("critic", critique__preset=preset, critique__few_shot="true")
    models = RoleModels(chosen, {SPEC: model})
    criticise, revise = (
        make_critique_stage(chosen, models, DEFAULT),
        make_stage("revise", chosen, models, DEFAULT, None).process,
    )
    waiting, made = list(responses), []
    while waiting:
        critiques = [one for (one,) in criticise(waiting)]
        revisions = [one for of_one in revise(critiques) for one in of_one]
        made += [*critiques, *revisions]
        waiting = [one for one in revisions if not one.final]
    return made


@pytest.mark.parametrize("preset", PRESETS["critique"])
def test_only_usable_texts_are_learned_and_no_verdict_is_invented(tmp_path, make_response, preset):
    model = FaultyModel(preset)
    responses = [make_response((f"good answer {n}", "x"), text=f"prompt {n}") for n in range(PAIRS)]
    made = chains(model, preset, responses)
    ends = [record for record in made if record.final]
    assert len(ends) == len({end.response_id for end in ends}) == PAIRS and model.counted["faults"] > PAIRS / 4
    critiques = [record for record in made if isinstance(record, Critique)]
    for verdict in (v for critique in critiques for v in critique.verdicts):
        assert verdict.verdict in (Verdict.FLAWED, Verdict.LOW_MASS)
        assert verdict.verdict is not Verdict.FLAWED or verdict.p_flawed == pytest.approx(0.9)
    for critique in critiques:  # two honest revisions are as good as each other
        assert critique.p_better is None or critique.p_better == pytest.approx(0.8 if critique.round == 1 else 0.5)
    assert all(end.end_reason is not EndReason.SATISFIED for end in ends)  # nothing was ever said to be clean
    spoilt = {r.response_id for r in made if isinstance(r, Revision) and r.rejection_reason is not RejectionReason.NONE}
    assert {end.response_id for end in ends if end.end_reason is EndReason.UNUSABLE} == spoilt
    faults = Counter(r.rejection_reason for r in made if isinstance(r, Revision))
    assert set(faults) == set(RejectionReason) - {RejectionReason.UNKNOWN}
    learned = in_db(tmp_path, [*responses, *made]).query_rows("SELECT completion FROM sft_examples")
    assert len(learned) == PAIRS - len(spoilt) > 0
    assert all(text.startswith(HONEST) or text.startswith("good answer") for (text,) in learned)


def test_an_answer_that_a_filter_kept_back_is_not_learned(make_response):
    response: Response = make_response(("half an ans", "x"))
    first = response.completions[0].model_copy(update={"finish_reason": FinishReason.REFUSED})
    response = response.model_copy(update={"completions": [first, response.completions[1]]})
    for preset in PRESETS["critique"]:
        (end,) = chains(FaultyModel(0, rate=0.0), preset, [response])
        assert end.end_reason is EndReason.UNUSABLE
