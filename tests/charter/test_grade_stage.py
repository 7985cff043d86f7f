"""The stage grade in a run: on both logs, in a replay with other graders, of final responses, and in an erasure."""

import uuid

import pytest

from engine.errors import UsageError
from tests.support.deployment import Deployment

SHOUT = """
from consumers.graders.interface import GradeResult
NAME, VERSION = "shout", "1"
def grade(texts):
    return [GradeResult(label="loud" if text.text.isupper() else "calm", score=1.0) for text in texts]
"""
COMPLETIONS = "SELECT sum(len(completions)) FROM responses"
GRADES = "SELECT grader, subject, count(*) FROM grades GROUP BY ALL ORDER BY ALL"


@pytest.fixture(params=["embedded", pytest.param("kafka", marks=pytest.mark.kafka)])
def any_bus(request, tmp_path):
    if request.param == "embedded":
        return Deployment(tmp_path / "data")
    return Deployment(tmp_path / "data", request.getfixturevalue("kafka_address"), f"g{uuid.uuid4().hex[:8]}.")


@pytest.fixture
def deployment(tmp_path):
    deployment = Deployment(tmp_path / "data")
    deployment.publish("One?", "Two?", "Three?")
    deployment.call("run", "--until-done")
    return deployment


def test_every_completion_is_graded_once_also_of_held_out_prompts(any_bus):
    any_bus.flags["prompts.eval_fraction"] = "0.5"
    any_bus.publish(*(f"Question {n}?" for n in range(8)))
    any_bus.call("run", "--until-done")
    ((completions,),) = any_bus.sql(COMPLETIONS)
    assert completions == 16
    assert any_bus.sql(GRADES) == [("length", "completion", 16), ("refusal", "completion", 16)]
    by_split = "SELECT split, count(*) FROM {} GROUP BY 1 ORDER BY 1"
    splits = dict(any_bus.sql(by_split.format("responses")))
    assert set(splits) == {"TRAIN", "EVAL"}
    assert dict(any_bus.sql(by_split.format("grades"))) == {split: 4 * count for split, count in splits.items()}
    assert any_bus.sql("SELECT count(*) FROM raw.grades WHERE is_duplicate") == [(0,)]
    assert {row["lag"] for row in any_bus.rows("status")["topics"]} <= {0, None}


def test_replay_adds_the_grades_of_other_graders(deployment, tmp_path):
    path = tmp_path / "shout.py"
    path.write_text(SHOUT)
    before = deployment.sql(GRADES)
    names = f'grade.graders=["length", "{path}", "principles"]'
    output = deployment.call("replay", "--stage", "grade", "--as", "again", "--set", names)
    assert "selected 3, done 3, skipped 0, dead letters 0" in output
    after = {grader: count for grader, _, count in deployment.sql(GRADES)}
    principles = after.pop("principles")
    assert after == {"length": 6, "refusal": 6, "shout": 6} and principles and principles % 6 == 0
    # The run had length grades already, so the replay repeats their ids.
    assert deployment.sql("SELECT grader, count(*) FROM raw.grades WHERE is_duplicate GROUP BY 1") == [("length", 6)]
    runs = {row["run"]: row for row in deployment.rows("runs")}
    assert runs["live"]["grades"] == sum(count for *_, count in before) and runs["again"]["grades"] == 12 + principles
    deployment.fails(UsageError, "the stage grade uses no model", "replay", "--stage", "grade", "--model", "scripted")


@pytest.mark.parametrize("archive", [[], ["--archive"]])
def test_replay_grades_final_responses(deployment, archive):
    subjects = ("--set", 'grade.subjects=["final_response", "completion"]')
    deployment.call("replay", "--stage", "grade", "--as", "again", *subjects, *archive)
    ((chains,),) = deployment.sql("SELECT count(*) FROM revision_chains WHERE end_reason <> 'UNUSABLE'")
    counts = {(grader, subject): count for grader, subject, count in deployment.sql(GRADES)}
    assert chains == 3
    assert counts == {
        ("length", "completion"): 6, ("refusal", "completion"): 6, ("length", "final_response"): 3, ("refusal", "final_response"): 3,
    }  # fmt: skip


def test_default_name_of_a_replay_depends_on_the_graders_only_for_the_stage_grade(deployment):
    def get_name(stage, *options):
        return deployment.call("replay", "--stage", stage, "--dry-run", *options).split("as run ")[1].split(",")[0]

    other = ("--set", 'grade.graders=["length"]')
    assert get_name("grade") != get_name("grade", *other) and get_name("judge") == get_name("judge", *other)


def test_grader_that_raises_is_a_dead_letter(tmp_path):
    deployment = Deployment(tmp_path / "data")
    path = tmp_path / "shout.py"
    path.write_text(SHOUT.replace("    return", "    raise ZeroDivisionError('no score')\n    return"))
    deployment.flags |= {"grade.graders": f'["{path}"]', "worker.max_attempts": "1"}
    deployment.publish("One?")
    deployment.call("run", "--until-done")
    (letter,) = deployment.sql("SELECT stage, error_class FROM dead_letters")
    assert letter[0] == "grade" and letter[1] == "ZeroDivisionError"
    assert deployment.sql(GRADES) == [] and deployment.sql("SELECT count(*) FROM preferences") == [(1,)]


@pytest.mark.parametrize(
    ("graders", "match"),
    [
        ('["loud"]', "there is no grader loud"),
        ('["length", "length"]', "has length twice"),
        ('["a.py"]', "there is no file a.py"),
    ],
)
def test_wrong_grader_is_refused(tmp_path, graders, match):
    Deployment(tmp_path / "data").fails(UsageError, match, "run", "--stage", "grade", "--set", f"grade.graders={graders}")


def test_empty_list_turns_grading_off(tmp_path):
    deployment = Deployment(tmp_path / "data")
    deployment.flags["grade.graders"] = "[]"
    deployment.publish("One?")
    deployment.call("run", "--until-done")
    assert deployment.sql("SELECT (SELECT count(*) FROM preferences), (SELECT count(*) FROM grades)") == [(1, 0)]


def test_erasure_deletes_grades(deployment):
    ((prompt_id,),) = deployment.sql("SELECT prompt_id::VARCHAR FROM traces WHERE prompt = 'Two?'")
    assert "grades 4" in deployment.call("erase", prompt_id, "--yes", stream="output")
    assert deployment.sql("SELECT count(*) FROM raw.grades") == [(8,)]
    assert deployment.sql(f"SELECT count(*) FROM raw.grades WHERE prompt_id = '{prompt_id}'") == [(0,)]
