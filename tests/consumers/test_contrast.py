"""Contrast pairs: a completion with the constitution in its prompt, which is chosen, and one without it."""

import pytest

from charter.connect import connect_bus
from charter.contrast_agreement import format_contrast_agreement, read_contrast_agreement
from charter.estimate import estimate_costs
from charter.models import LatestPolicyProcessor, RoleModels
from charter.pipeline import STAGES, make_grade_stage, make_host, make_judge_stage, make_respond_stage, make_stage
from charter.stages import get_stage_inputs, get_stage_role
from constitutions.loader import load_constitution
from consumers.critique import CritiqueStage
from consumers.judge import JudgeStage
from engine.bus.read import read_values
from engine.errors import ModelUnreachable, PermanentRecordError, UsageError
from engine.models.interface import Generation, require_results
from engine.models.scripted import ScriptedModel
from engine.notices import NOTICES
from engine.pacing import PacedAdmission
from engine.settings import load_settings
from producers.files import SHIPPED_PROMPTS_PATH, FileProducer
from schemas.codec import decode_record, encode_record
from schemas.records import (
    Allowance,
    ChatMessage,
    FinishReason,
    LabelSource,
    Outcome,
    Preference,
    Prompt,
    Purpose,
    Response,
    Sampling,
    Split,
)
from tests.support.records import RecordDatabase
from tests.support.waiting import HANG_S, wait_until

DEFAULT = load_constitution("default")
HEADER = "Write an answer that needs none of these corrections."


def make_settings(**flags):
    values = {"judge.pairing": "contrast", "models.policy": "scripted", "respond.num_completions": 1}
    return load_settings(values | {name.replace("__", "."): value for name, value in flags.items()}, environment={})[0]


def has_constitution(request):
    return HEADER in request.messages[-1].content


def answer(request, n):
    return "with it" if has_constitution(request) else f"without it {n}"


def respond(prompts, settings=None, model=None, constitution=DEFAULT, version=4):
    settings, model = settings or make_settings(), model or ScriptedModel(text_rule=answer)
    results = make_respond_stage(settings, lambda: (model, version), constitution)(prompts)
    return [response for responses in require_results(results) for response in responses]


def judge(responses, settings=None, model=None, constitution=DEFAULT):
    settings = settings or make_settings()
    models = RoleModels(settings, {"scripted": model or ScriptedModel(option_rule=lambda request: 0.5)})
    return [pair for pairs in require_results(make_judge_stage(settings, models, constitution)(responses)) for pair in pairs]


def prefer(text):
    """Return an option rule of a judge that prefers the response `text` with 0.8."""
    return lambda request: 0.8 if f"Answer (A):\n> {text}" in request.messages[0].content else 0.2


@pytest.fixture(autouse=True)
def no_notices():
    NOTICES.clear()


# Respond


def test_response_has_a_separate_completion_that_was_sampled_with_the_constitution(make_prompt):
    requests = []

    def record(request, n):
        requests.append(request)
        return answer(request, n)

    (response,) = respond([make_prompt()], make_settings(respond__num_completions=2), ScriptedModel(text_rule=record))
    contrast = response.contrast_completion
    assert [completion.text for completion in response.completions] == ["without it 0", "without it 1"]
    assert (contrast.text, contrast.finish_reason, contrast.role) == ("with it", FinishReason.STOP, "user")
    assert contrast.principle_ids == [principle.id for principle in DEFAULT.critique]
    assert response.constitution.hash == DEFAULT.hash and response.messages == make_prompt().messages
    (question,) = [request.messages[-1].content for request in requests if has_constitution(request)]
    assert question.endswith("\n\nHow do magnets work?") and all(p.revision_prompt in question for p in DEFAULT.critique)
    assert contrast.seed != response.completions[0].seed
    assert decode_record(encode_record(response), Response).contrast_completion == contrast


def test_drawn_principles_depend_on_the_prompt_only(make_prompt):
    settings = make_settings(contrast__num_principles=1)
    prompts = [make_prompt(f"question {n}") for n in range(8)]
    drawn = [response.contrast_completion.principle_ids for response in respond(prompts, settings)]
    again = [response.contrast_completion.principle_ids for response in respond(prompts[::-1], settings)]
    assert drawn == again[::-1] and len({ids[0] for ids in drawn}) > 1 and all(len(ids) == 1 for ids in drawn)


def test_only_training_prompts_get_a_contrast_completion_and_other_ids_do_not_change(make_prompt):
    prompts = [make_prompt("train"), make_prompt("held out", split=Split.EVAL)]
    plain = respond(prompts, make_settings(judge__pairing="neighbors"))
    train, held_out = respond(prompts)
    assert train.contrast_completion and held_out.contrast_completion is None and held_out.constitution is None
    assert plain[0].record_id != train.record_id and plain[1].record_id == held_out.record_id
    assert [response.contrast_completion for response in plain] == [None, None]
    assert judge([held_out]) == [] and NOTICES.get_counts() == {}


@pytest.mark.parametrize("changed", [{"contrast__num_principles": 2}, {"contrast__constitution_role": "system"}])
def test_record_id_covers_the_constitution_and_how_it_is_added(make_prompt, changed):
    prompt = make_prompt().model_copy(update={"messages": [ChatMessage(role="system", content="s"), *make_prompt().messages]})
    ((first,), (again,), (other,)) = (respond([prompt], s) for s in (None, None, make_settings(**changed)))
    (reworded,) = respond([prompt], constitution=DEFAULT.without_principles([DEFAULT.critique[0].id]))
    assert first == again.model_copy(update={"created_at": first.created_at, "latency_ms": first.latency_ms})
    assert len({first.record_id, other.record_id, reworded.record_id}) == 3


class LimitedModel(ScriptedModel):
    """A model whose requests with the constitution end with an error."""

    error = PermanentRecordError("the prompt has 9000 tokens", "the model reads at most 8192", "shorten the prompt")

    def generate(self, batch, **options):
        plain = super().generate(batch, **options)
        return [self.error if has_constitution(request) else result for request, result in zip(batch, plain, strict=True)]


def test_prompt_that_is_too_long_with_the_constitution_keeps_its_response(make_prompt, caplog):
    (response,) = respond([make_prompt()], model=LimitedModel(text_rule=answer))
    assert response.completions[0].text == "without it 0" and response.contrast_completion is None
    assert "no contrast completion" in caplog.text and "9000 tokens" in caplog.text
    assert judge([response]) == []
    assert {kind for kind, _ in NOTICES.get_counts()} == {"contrast", "contrast_pair"}


def test_response_is_tried_again_if_the_server_fails_at_the_contrast_completion(make_prompt):
    class BusyModel(LimitedModel):
        error = ModelUnreachable("busy", "", "")

    (result,) = make_respond_stage(make_settings(), lambda: (BusyModel(), 0), DEFAULT)([make_prompt()])
    assert isinstance(result, ModelUnreachable)


def test_system_role_needs_a_chat_template_that_can_be_read(make_prompt, bus):
    system = make_settings(contrast__constitution_role="system")
    (response,) = respond([make_prompt()], system)
    assert response.contrast_completion is None
    assert [value for kind, value in NOTICES.get_counts() if kind == "contrast"] == [
        "the default system message of the model is unk"[:60] + "nown"
    ]
    served = make_settings(contrast__constitution_role="system", models__policy="http://localhost:1/v1#m")
    with pytest.raises(UsageError, match="needs a local policy") as error:
        make_stage("respond", served, RoleModels(served), DEFAULT, bus)
    assert str(error.value).count("\n") == 2


# A contrast completion is no response of the policy


def test_contrast_completion_is_no_rollout_starts_no_chain_and_uses_up_no_allowance(make_prompt, tmp_path, bus):
    (response,) = respond([make_prompt()])
    database = RecordDatabase(tmp_path / "charter.duckdb")
    sampling = Sampling(temperature=1.0, top_p=1.0, max_tokens=8)
    critique = CritiqueStage(ScriptedModel(), DEFAULT, sampling, 1, "none", True, 0.5, 0.6, 0.4, 0.97, ())
    chains = [chain for records in critique([response]) for chain in records]
    database.add(make_prompt(), response, *chains)
    assert [chain.initial_response for chain in chains] == ["without it 0"]
    assert database.query_rows("SELECT text FROM rollouts WHERE exclusion_reason IS NULL") == [("without it 0",)]
    views = {name for (name,) in database.query_rows("SELECT view_name FROM duckdb_views() WHERE NOT internal")}
    assert len(views) > 40
    with database.store.open_read_session(limit_s=HANG_S) as query:
        mentions = {view for view in views if "with it" in repr(query(f"SELECT * FROM {view}").rows)}
    assert mentions == {"responses"}  # the table itself; no view over it
    admission = PacedAdmission(bus, 1)
    admission.allowance = Allowance(record_id=response.record_id, run_id="r", stage="train", phase="ppo")
    admission.count_response(encode_record(response), 0)
    assert admission.num_counted == 1


def test_contrast_completion_is_graded_only_as_such_and_only_on_request(make_prompt):
    (response,) = respond([make_prompt()], make_settings(respond__num_completions=2))
    models = RoleModels(make_settings())

    def grade(*subjects):
        settings = make_settings(grade__graders=["length"], grade__subjects=list(subjects))
        assert get_stage_inputs(settings)["grade"] == ("responses",)
        (grades,) = require_results(make_grade_stage(settings, models, DEFAULT)([response]))
        return [(g.subject, g.completion_index, g.policy_version, g.score) for g in grades]

    own = [("completion", 0, 4, 3.0), ("completion", 1, 4, 3.0)]
    assert grade("completion") == own
    assert grade("completion", "contrast_completion") == [*own, ("contrast_completion", None, None, 2.0)]


# Judge


@pytest.mark.parametrize("preferred", ["with it", "without it"])
def test_completion_with_the_constitution_is_chosen_whatever_the_judge_says(make_prompt, preferred):
    (response,) = respond([make_prompt(purpose=Purpose.RL)])
    model = ScriptedModel(option_rule=prefer(preferred))
    (pair,) = judge([response], model=model)
    assert (pair.response_a, pair.response_b, pair.p_a) == ("with it", "without it 0", 1.0)
    assert (pair.label_source, pair.outcome, pair.pairing) == (LabelSource.CONTRAST, Outcome.OK, "contrast")
    assert (pair.completion_index_a, pair.completion_index_b, pair.policy_version) == (None, 0, 4)
    assert pair.p_forward == pytest.approx(0.8 if preferred == "with it" else 0.2) and pair.votes and model.num_scored == 2
    assert pair.constitution == response.constitution and pair.messages == response.messages


def test_no_judge_is_opened_or_asked_without_ask_judge(make_prompt):
    settings = make_settings(contrast__ask_judge=False, models__judge="http://localhost:1/v1#none")
    (response,) = respond([make_prompt()], settings)
    (pair,) = require_results(make_judge_stage(settings, RoleModels(settings), DEFAULT)([response]))[0]
    assert (pair.p_a, pair.model, pair.p_forward, pair.votes) == (1.0, None, None, [])
    assert get_stage_role("judge", settings) is None and get_stage_role("judge", make_settings()) == "judge"


def test_judge_that_gives_no_readable_answer_takes_no_label_away(make_prompt):
    (pair,) = judge(respond([make_prompt()]), model=ScriptedModel(option_mass=0.1))
    assert (pair.p_a, pair.outcome, pair.votes[0].outcome) == (1.0, Outcome.OK, Outcome.LOW_MASS)


class WithholdingModel(ScriptedModel):
    def generate_one(self, request, *rest):
        made = super().generate_one(request, *rest)
        return Generation(made.text, "refused", made.token_ids, made.logprobs, made.prompt_token_ids)


@pytest.mark.parametrize(
    ("model", "outcome"),
    [
        (ScriptedModel(text_rule=lambda request, n: "same"), Outcome.IDENTICAL),
        (ScriptedModel(text_rule=lambda request, n: "" if has_constitution(request) else "x"), Outcome.EMPTY),
        (ScriptedModel(text_rule=lambda request, n: "x" if has_constitution(request) else ""), Outcome.EMPTY),
        (WithholdingModel(text_rule=answer), Outcome.WITHHELD),
    ],
)
def test_pair_that_cannot_be_compared_has_an_outcome_and_no_label(make_prompt, tmp_path, model, outcome):
    (response,) = respond([make_prompt()], model=model)
    judge_model = ScriptedModel()
    (pair,) = judge([response], model=judge_model)
    assert (pair.outcome, pair.p_a, pair.label_source) == (outcome, None, LabelSource.CONTRAST)
    assert pair.outcome_reason and judge_model.num_scored == 0
    database = RecordDatabase(tmp_path / "charter.duckdb")
    database.add(make_prompt(), response, pair)
    assert database.query_rows("SELECT count(*) FROM contrast_pairs") == [(0,)]
    assert database.query_rows("SELECT pairing, outcome, pairs FROM unjudged_pair_stats") == [("contrast", outcome, 1)]


def test_replay_of_the_judge_keeps_label_and_constitution(make_prompt, tmp_path):
    """The same judge makes the same record. A judge with another constitution is not asked, because the label is about the first."""
    (response,) = respond([make_prompt()])
    stored = decode_record(encode_record(response), Response)
    ((first,), (again,)) = (judge([r]) for r in (response, stored))
    assert first.record_id == again.record_id
    other = ScriptedModel()
    (replayed,) = judge([response], model=other, constitution=load_constitution("red-team"))
    assert (replayed.p_a, replayed.constitution, replayed.model, other.num_scored) == (1.0, response.constitution, None, 0)
    assert replayed.record_id != first.record_id and ("contrast_judge", "constitution") in NOTICES.get_counts()
    skipping = JudgeStage(ScriptedModel(), DEFAULT, "completions", 0.5, False, skips_rl_prompts=lambda: True)
    pairs = response.model_copy(update={"purpose": Purpose.RL, "completions": [response.completions[0]] * 2})
    assert replayed.record_id not in {pair.record_id for (pair,) in skipping([pairs])}  # no id of an unjudged pair
    database = RecordDatabase(tmp_path / "charter.duckdb")
    database.add(make_prompt(), response, replayed, first)
    assert database.query_rows("SELECT record_id::VARCHAR FROM contrast_pairs") == [(first.record_id,)]  # created first


def test_judge_follows_the_policy(make_prompt):
    settings, newest = make_settings(), ScriptedModel(revision="newest")
    stage = make_judge_stage(settings, RoleModels(settings, {"scripted": ScriptedModel()}), DEFAULT)
    ((pair,),) = LatestPolicyProcessor(stage, lambda: (newest, 1))(respond([make_prompt()]))
    assert pair.model.revision == "newest"


# Agreement and cost


def test_agreement_of_judge_and_graders_is_reported(make_prompt, tmp_path):
    """Of four pairs the judge prefers the completion with the constitution in two, and the shorter one always has it."""
    database = RecordDatabase(tmp_path / "charter.duckdb")
    prompts = [make_prompt(f"question {n}") for n in range(4)]
    responses = respond(prompts)
    good, bad = ScriptedModel(option_rule=prefer("with it")), ScriptedModel(option_rule=prefer("without it"))
    pairs = [*judge(responses[:2], model=good), *judge(responses[2:], model=bad)]
    settings = make_settings(grade__graders=["length"], grade__subjects=["completion", "contrast_completion"])
    grades = require_results(make_grade_stage(settings, RoleModels(settings), DEFAULT)(responses))
    database.add(*prompts, *responses, *pairs, *(grade for made in grades for grade in made))
    rows = database.query_rows(
        "SELECT source, name, pairs, decided, agreed, agreement FROM contrast_stats ORDER BY source DESC"
    )
    assert rows == [("judge", "scripted", 4, 4, 2, 0.5), ("grader", "length", 4, 4, 0, 0.0)]
    lines = format_contrast_agreement(read_contrast_agreement(database.store, "r"))
    assert lines[0] == "contrast pairs: 4" and "in 2 of 4 decided pairs (50 %" in lines[1].replace("50%", "50 %")
    assert format_contrast_agreement(read_contrast_agreement(database.store, "none")) == []
    for view in ("judge_votes", "principle_stats WHERE stage = 'judge'", "position_bias_stats"):
        assert database.query_rows(f"SELECT count(*) FROM {view}") == [(0,)]  # statistics of judge labels only


def test_estimate_has_the_contrast_completion_and_no_unasked_judge():
    def estimate(**flags):
        return {cost.stage: cost for cost in estimate_costs(make_settings(**flags), STAGES, 10, 400)}

    plain, contrast = estimate(judge__pairing="neighbors"), estimate()
    assert contrast["respond"].max_completion_tokens == 2 * plain["respond"].max_completion_tokens
    assert contrast["respond"].prompt_tokens > 3 * plain["respond"].prompt_tokens
    assert contrast["judge"] == plain["judge"] and estimate(contrast__ask_judge=False)["judge"].prompt_tokens == 0


# The whole pipeline


def test_stopped_and_restarted_run_makes_the_same_records_as_the_stages(tmp_path):
    settings = make_settings(data__folder=str(tmp_path), run__id="r", prompts__eval_fraction="0")
    bus = connect_bus(settings)
    FileProducer(bus, "r", eval_fraction=0.0).publish(str(SHIPPED_PROMPTS_PATH), last_row=8)

    def read(record):
        return [decode_record(value, record) for value in read_values(bus, record.topic)]

    for record, target in ((Response, 2), (Preference, 8)):
        with make_host(settings, bus, ("respond", "critique", "judge"), sink=False) as host:
            wait_until(lambda record=record, target=target: len(read(record)) >= target, host)
    responses = respond(read(Prompt), settings, ScriptedModel(), version=0)
    expected = [*responses, *judge(responses, settings, ScriptedModel())]
    found = [*read(Response), *read(Preference)]
    bus.close()
    assert len(found) == 16 and all(record.p_a == 1.0 for record in found if isinstance(record, Preference))

    def describe(records):
        return sorted((r.record_id, r.response_a if isinstance(r, Preference) else r.contrast_completion.text) for r in records)

    assert describe(found) == describe(expected)
