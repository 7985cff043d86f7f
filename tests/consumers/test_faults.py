"""No invented labels: a model that fails in many ways, under every preset, and what of it reaches the training views.

The honest replies of the fake are recognizable: as a judge it gives response A 0.8 in both positions, as a critic it finds every
response flawed with 0.9, and its revisions are marked. Any other label must come from a fault, a default or a random value.
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
CHAINS = 120  # enough for every kind of unusable revision
HONEST = "an honest revision of it"
POSITION_MARKER = "the answer shown first"  # for a prompt with these words the judge prefers the first position

FAULTY_SCORES = [
    OptionScores((math.nan, math.nan), math.nan),
    OptionScores((math.nan, -0.1), 0.9),
    OptionScores((-math.inf, -math.inf), 0.0),
    OptionScores((math.log(0.3), math.log(0.1)), 0.4),
    OptionScores((0.7, -3.0), 2.1),
    OptionScores((-0.5, -0.9), math.inf),
    OptionScores((math.log(0.125), -math.inf), 0.125, unparsed_replies=("I cannot choose between these.",) * 7),
    OptionScores((-math.inf, -math.inf), 0.0, unparsed_replies=("both",) * 8),
]
FAULTY_GENERATIONS = [
    Generation("", "stop"),
    Generation(" \n ", "length"),
    Generation("I'm sorry, but I can't help with that.", "stop"),
    Generation("A) It is", "timeout"),
    Generation("No problems. A) It is the better one.", "refused"),
]
UNPARSEABLE = [
    Generation("A) or (B)", "stop"),
    Generation("Either answer would do.", "stop"),
    Generation("C) It is best.", "stop"),
]


class FaultyModel(ScriptedModel):
    """A fake that fails about every third time, each time in another way, and counts its faults."""

    def __init__(self, seed, capabilities=LOCAL_CAPABILITIES, rate=0.3):
        super().__init__(id="faulty", capabilities=capabilities, option_rule=score_honestly, text_rule=self.honest_text)
        self.rng, self.rate, self.counts = random.Random(seed), rate, Counter()

    def honest_text(self, request, n):
        if "Begin with" in request.messages[0].content:
            opening = "" if request.prefill else "Answer: ("
            return f"{opening}{'A' if score_honestly(request) > 0.5 else 'B'}) It is kinder."
        is_critique = "Answer in two or three sentences" in request.messages[0].content
        return f"{'It could be much kinder, as said' if is_critique else HONEST} {self.rng.random()}"

    def fails(self):
        is_fault = self.rng.random() < self.rate
        self.counts["faults" if is_fault else "honest"] += 1
        return is_fault

    def score_one(self, request, options):
        return self.rng.choice(FAULTY_SCORES) if self.fails() else super().score_one(request, options)

    def generate_one(self, request, sample, temperature, max_tokens):
        if not self.fails():
            return super().generate_one(request, sample, temperature, max_tokens)
        content = request.messages[0].content
        if "Write only the new answer" in content:  # a revision: it may also copy its prompt, or keep its reasoning
            response = content.rpartition("\nAssistant:\n> ")[2].partition("\n\n")[0]
            texts = [DEFAULT.examples[0].revision, response, content.rpartition("\n\n")[2], f"{HONEST}\n<think>\nhm\n</think>"]
            copies = [Generation(text, "stop") for text in texts]
            return self.rng.choice([*FAULTY_GENERATIONS[:2], FAULTY_GENERATIONS[4], *copies])
        return self.rng.choice([*FAULTY_GENERATIONS, *(UNPARSEABLE if "Begin with" in content else [])])


def score_honestly(request):
    question = request.messages[0].content
    if POSITION_MARKER in question:
        return 0.8
    responses = [question.partition(f"Answer ({letter}):\n> ")[2] for letter in "AB"]
    if any(responses):
        a, b = (2 * response.startswith(HONEST) + response.startswith("good") for response in responses)
        return 0.8 if a > b else 0.2 if a < b else 0.5
    return 0.9 if "(A) Yes" in question else 0.1


def make_settings(role, **overrides):
    flags = {f"models.{role}": SPEC} | {name.replace("__", "."): value for name, value in overrides.items()}
    return load_settings(flags, environment={})[0]


def make_database(tmp_path, records):
    database = RecordDatabase(tmp_path / "charter.duckdb")
    database.add(*records)
    return database


EXPECTED_LABELS = {"lee2023": 0.8, "bai2022": 0.8, "bai2022-cot": 0.6, "ensemble-k": 0.8, "course": 1.0}


@pytest.fixture(scope="module")
def judgments(make_response):
    """Label the same pairs with each preset and a faulty judge, by log-probabilities and by votes: (labels, judge)."""
    pairs = [make_response(("good", "bad"), text=f"prompt {n}") for n in range(PAIRS)]
    labels_by_mode = {}
    for preset in PRESETS["judge"]:
        for capabilities in (LOCAL_CAPABILITIES, VOTES):
            model = FaultyModel(f"{preset}/{capabilities.num_votes}", capabilities)
            settings = make_settings("judge", judge__preset=preset)
            stage = make_judge_stage(settings, RoleModels(settings, {SPEC: model}), DEFAULT)
            labels_by_mode[preset, capabilities.num_votes] = [label for (label,) in stage(pairs)], model
    return labels_by_mode


@pytest.mark.parametrize("votes", [0, VOTES.num_votes], ids=["logprobs", "votes"])
@pytest.mark.parametrize("preset", PRESETS["judge"])
def test_only_honest_judgments_become_labels(judgments, preset, votes):
    records, model = judgments[preset, votes]
    assert len(records) == PAIRS and model.counts["faults"] > PAIRS / 4
    for record in records:
        assert (record.p_a is not None) == (record.outcome in (Outcome.OK, Outcome.POSITION_FLIP))
        if record.outcome is Outcome.OK:
            assert record.p_a == pytest.approx(EXPECTED_LABELS[preset])
        for vote in record.votes:  # a vote that can be read has the honest probability
            if vote.outcome is Outcome.OK:
                assert vote.p_forward == pytest.approx(vote.p_backward) == pytest.approx(1.0 if preset == "course" else 0.8)
        readable_weight = sum(vote.weight for vote in record.votes if vote.outcome is Outcome.OK)
        assert (record.outcome is Outcome.OK) == (2 * readable_weight >= sum(vote.weight for vote in record.votes))
    outcomes = Counter(record.outcome for record in records)
    assert outcomes[Outcome.OK] > PAIRS / 10 and Outcome.UNKNOWN not in outcomes and len(outcomes) >= 3


def test_reply_that_timed_out_has_outcome_timeout(judgments):
    """A truncated reply can look like a complete one."""
    for (preset, votes), (records, _) in judgments.items():
        outcomes = Counter(vote.outcome for record in records for vote in record.votes)
        assert (outcomes[Outcome.TIMEOUT] > 0) == (preset in ("bai2022-cot", "course")), (preset, votes)


@pytest.mark.parametrize("preset", PRESETS["judge"])
def test_rejected_position_flips_do_not_train(tmp_path, make_response, preset):
    prompts = [f"{POSITION_MARKER if n % 2 else 'fair'} {n}" for n in range(PAIRS)]
    settings = make_settings("judge", judge__preset=preset, judge__reject_position_flips="true")
    stage = make_judge_stage(settings, RoleModels(settings, {SPEC: FaultyModel(preset)}), DEFAULT)
    labels = [label for (label,) in stage([make_response(("good", "bad"), text=text) for text in prompts])]
    outcomes = Counter((POSITION_MARKER in record.messages[0].content, record.outcome) for record in labels)
    assert outcomes[True, Outcome.POSITION_FLIP] > 0 and outcomes[False, Outcome.OK] > 0
    assert outcomes[True, Outcome.OK] == outcomes[False, Outcome.POSITION_FLIP] == 0
    trained = make_database(tmp_path, labels).query_rows("SELECT messages[1].content, p_a FROM preference_pairs")
    assert len(trained) == outcomes[False, Outcome.OK]
    assert all(POSITION_MARKER not in text and p_a == pytest.approx(EXPECTED_LABELS[preset]) for text, p_a in trained)


def test_training_view_has_only_ok_labels_and_stats_count_refusals_by_principle(tmp_path, judgments):
    records = [
        record.model_copy(update={"run_id": f"{preset}/{votes}"})
        for (preset, votes), (labels, _) in judgments.items()
        for record in labels
    ]
    database = make_database(tmp_path, records)
    assert database.query_rows("SELECT DISTINCT is_duplicate FROM raw.preferences") == [(False,)]
    trained = Counter(database.query_rows("SELECT run_id, round(p_a, 6) FROM preference_pairs"))
    expected = Counter((r.run_id, round(EXPECTED_LABELS[r.preset], 6)) for r in records if r.outcome is Outcome.OK)
    assert trained == expected
    refused = Counter((r.run_id, v.principle_id) for r in records for v in r.votes if v.outcome is Outcome.REFUSED)
    rows = database.query_rows(
        "SELECT run_id, principle_id, refused FROM principle_stats WHERE stage = 'judge' AND refused > 0"
    )
    assert {(run, principle): count for run, principle, count in rows} == refused and len(refused) > 10


def run_chains(model, preset, responses):
    """Run the chains of these responses to their ends; return all records."""
    settings = make_settings("critic", critique__preset=preset, critique__few_shot="true")
    models = RoleModels(settings, {SPEC: model})
    criticize, revise = (
        make_critique_stage(settings, models, DEFAULT),
        make_stage("revise", settings, models, DEFAULT, None).process,
    )
    pending, records = list(responses), []
    while pending:
        critiques = [critique for (critique,) in criticize(pending)]
        revisions = [revision for outputs in revise(critiques) for revision in outputs]
        records += [*critiques, *revisions]
        pending = [revision for revision in revisions if not revision.final]
    return records


@pytest.mark.parametrize("preset", PRESETS["critique"])
def test_only_usable_responses_train_and_no_verdict_is_invented(tmp_path, make_response, preset):
    model = FaultyModel(preset)
    responses = [make_response((f"good answer {n}", "x"), text=f"prompt {n}") for n in range(CHAINS)]
    records = run_chains(model, preset, responses)
    ends = [record for record in records if record.final]
    assert len(ends) == len({end.response_id for end in ends}) == CHAINS and model.counts["faults"] > CHAINS / 4
    critiques = [record for record in records if isinstance(record, Critique)]
    for verdict in (v for critique in critiques for v in critique.verdicts):
        assert verdict.verdict in (Verdict.FLAWED, Verdict.LOW_MASS)
        assert verdict.verdict is not Verdict.FLAWED or verdict.p_flawed == pytest.approx(0.9)
    for critique in critiques:  # two honest revisions are equally good
        assert critique.p_better is None or critique.p_better == pytest.approx(0.8 if critique.round == 1 else 0.5)
    assert all(end.end_reason is not EndReason.SATISFIED for end in ends)  # no honest verdict is CLEAN
    unusable = {r.response_id for r in records if isinstance(r, Revision) and r.rejection_reason is not RejectionReason.NONE}
    assert {end.response_id for end in ends if end.end_reason is EndReason.UNUSABLE} == unusable
    without_critique = [end for end in ends if end.end_reason is EndReason.NO_CRITIQUE]
    assert {end.rejection_reason for end in without_critique} == {RejectionReason.EMPTY, RejectionReason.REFUSED}
    reasons = {r.rejection_reason for r in records if isinstance(r, Revision)}
    assert reasons == set(RejectionReason) - {RejectionReason.UNKNOWN}
    trained = make_database(tmp_path, [*responses, *records]).query_rows("SELECT completion FROM sft_examples")
    assert len(trained) == CHAINS - len(unusable) - len(without_critique) > 0
    assert all(text.startswith(HONEST) or text.startswith("good answer") for (text,) in trained)


def test_response_that_a_content_filter_withheld_does_not_train(make_response):
    response: Response = make_response(("half a resp", "x"))
    first = response.completions[0].model_copy(update={"finish_reason": FinishReason.REFUSED})
    response = response.model_copy(update={"completions": [first, response.completions[1]]})
    for preset in PRESETS["critique"]:
        (end,) = run_chains(FaultyModel(0, rate=0.0), preset, [response])
        assert end.end_reason is EndReason.UNUSABLE
