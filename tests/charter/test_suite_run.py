"""`charter eval run`: all prompts are responded to and graded once, also after a kill, and training does not notice the evaluation."""

import json
import os
import signal
import subprocess
import sys
import uuid

import pytest

from charter.connect import connect_bus, open_store
from charter.dashboard.runs_view import load_run_ids
from charter.dashboard.traces_view import search_traces
from charter.dashboard.training_view import load_policy_stats
from charter.pipeline import make_host
from charter.stages import STAGES
from engine.bus.read import read_topic
from engine.errors import UsageError
from engine.models.scripted import POISON_TEXT
from engine.policy import make_restore_update
from engine.run_starts import read_start_positions
from engine.worker import to_producer_record
from tests.chaos.crash_points import FAKE_LEARNERS
from tests.support.deployment import Deployment
from tests.support.waiting import HANG_S, wait_until
from trainer.loop import Trainer

TEXTS = [f"Question {n}?" for n in range(8)]
RESPONSES = "SELECT run_id, suite, item, transform, count(*) FROM suite_responses GROUP BY ALL ORDER BY ALL"


@pytest.fixture
def deployment(tmp_path):
    return Deployment(tmp_path / "data")


@pytest.fixture(params=["embedded", pytest.param("kafka", marks=pytest.mark.kafka)])
def any_bus(request, tmp_path):
    if request.param == "embedded":
        return Deployment(tmp_path / "data")
    return Deployment(tmp_path / "data", request.getfixturevalue("kafka_address"), f"s{uuid.uuid4().hex[:8]}.")


def write_suite(folder, texts=TEXTS, name="mine"):
    """Write a suite of prompts, of which every second one is harmful. Return the value of --suite."""
    path = folder / f"{name}.jsonl"
    rows = [{"prompt": text, "source": ("benign", "red-team")[n % 2]} for n, text in enumerate(texts)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"{name}={path}"


def publish_policy(deployment):
    """Publish a policy with the weights of the base model."""
    bus = connect_bus(deployment.settings())
    bus.publish([to_producer_record(make_restore_update([], 0, run_id="live", base_model="scripted"))])
    bus.close()


def test_each_policy_responds_to_all_prompts_in_a_run_of_its_own(any_bus, tmp_path):
    publish_policy(any_bus)
    words = ("eval", "run", "--suite", write_suite(tmp_path), "--policy", "0", "--policy", "latest", "--transform", "base64")
    rows = json.loads(any_bus.call(*words, "--policy", "1", "--json"))
    places = [(row["policy"], row["subset"], row["transform"], row["prompts"]) for row in rows]
    subsets = [("benign", "", 4), ("red-team", "", 4), ("red-team", "base64", 4)]
    assert places == [(policy, *subset) for policy in (0, 1) for subset in subsets]
    assert {sum(labels.values()) for row in rows for labels in row["labels"].values()} == {4}
    assert {row[0] for row in any_bus.sql(RESPONSES)} == {"eval-policy-0", "eval-policy-1"}
    assert {row[-1] for row in any_bus.sql(RESPONSES)} == {1} and len(any_bus.sql(RESPONSES)) == 24
    assert any_bus.sql("SELECT grader, count(*) FROM suite_grades GROUP BY 1 ORDER BY 1") == [("length", 24), ("refusal", 24)]
    assert any_bus.sql("SELECT count(*) FROM critiques UNION ALL SELECT count(*) FROM preferences") == [(0,), (0,)]
    before = any_bus.sql("SELECT record_id, created_at FROM raw.responses ORDER BY 1")
    assert json.loads(any_bus.call(*words, "--json")) == rows
    assert any_bus.sql("SELECT record_id, created_at FROM raw.responses ORDER BY 1") == before


def start_evaluation(deployment, *words, batch_delay_s):
    """Start an evaluation with a fake model, whose calls take `batch_delay_s`."""
    flags = [word for key, value in deployment.flags.items() for word in ("--set", f"{key}={value}")]
    command = [sys.executable, "-m", "tests.chaos.fake_process", "eval", "run", *words, *flags]
    environment = os.environ | {"CHAOS_BATCH_S": str(batch_delay_s)}
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)


def read_responses(deployment):
    """Return the responses on the log as bytes."""
    if not (deployment.folder / "log.sqlite").exists():
        return []
    bus = connect_bus(deployment.settings())
    values = [raw.value for raw in read_topic(bus, "responses")]
    bus.close()
    return values


def test_killed_evaluation_continues_and_is_whole(deployment, tmp_path):
    count, deployment.flags["models.max_batch_size"] = 40, "2"
    words = ("--suite", write_suite(tmp_path, [f"Question {n}?" for n in range(count)]), "--policy", "0")
    process = start_evaluation(deployment, *words, batch_delay_s=0.5)
    wait_until(lambda: process.poll() is not None or len(read_responses(deployment)) >= 4)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait(HANG_S) == -signal.SIGKILL
    before = read_responses(deployment)
    assert 4 <= len(before) < count
    assert start_evaluation(deployment, *words, batch_delay_s=0).wait(HANG_S) == 0
    after = read_responses(deployment)
    assert len(after) == count and set(before) <= set(after)
    assert [row[-1] for row in deployment.sql(RESPONSES)] == [1] * count
    assert deployment.sql("SELECT count(*), count(DISTINCT record_id) FROM raw.grades") == [(2 * count, 2 * count)]


VIEWS = (
    "SELECT record_id FROM sft_examples", "SELECT record_id FROM preference_pairs", "SELECT record_id FROM held_out_examples",
    "SELECT record_id FROM held_out_pairs", "SELECT prompt_id FROM held_out_prompts", "SELECT prompt_id FROM trained_prompts",
    "SELECT response_id, completion_index, exclusion_reason FROM rollouts", "SELECT response_id FROM monitored_responses",
    "SELECT * FROM label_quality", "SELECT policy_version, harmful, answers, refusals FROM monitor_refusals",
)  # fmt: skip


def train(deployment, folder):
    """Train both supervised phases. Return the rows of their batches, and the rows of every view of training and monitoring."""
    (folder / "base").mkdir()
    more = {"train__sft_mixture": "[]", "train__reward_mixture": "[]"}
    settings = deployment.settings(**more)
    bus, store = connect_bus(settings), open_store(settings)
    trainer = Trainer(bus, store, settings, folder / "base", learners=FAKE_LEARNERS)
    for phase in ("sft", "reward"):
        trainer.update(phase)
    batches = {manifest.phase: set(manifest.record_ids) for manifest in trainer.read_state().manifests}
    trainer.close()
    bus.close()
    return batches, [set(deployment.sql(view)) for view in VIEWS]


def test_training_beside_an_evaluation_of_the_same_prompts_has_the_same_rows(tmp_path):
    texts, results = [f"Question {n}?" for n in range(12)], []
    suite = write_suite(tmp_path, texts)
    for name in ("alone", "shared"):
        folder = tmp_path / name
        folder.mkdir()
        deployment = Deployment(folder / "data")
        deployment.flags["prompts.eval_fraction"] = "0.3"
        if name == "shared":
            deployment.call("eval", "run", "--suite", suite, "--policy", "0", "--name", "before")
        deployment.publish(*texts)
        settings = deployment.settings()
        bus = connect_bus(settings)
        with make_host(settings, bus, STAGES, sink=True) as host:
            if name == "shared":
                deployment.call("eval", "run", "--suite", suite, "--policy", "0", "--name", "during")
            done = "SELECT count(*) FROM traces WHERE split <> 'SUITE' AND end_reason IS NOT NULL AND preferences IS NOT NULL"
            wait_until(lambda d=deployment, sql=done: d.sql(sql) == [(len(texts),)], host)
            wait_until(lambda d=deployment: d.sql("SELECT count(*) FROM grades WHERE split <> 'SUITE'") == [(48,)], host)
        bus.close()
        results.append(train(deployment, folder))
    assert deployment.sql("SELECT count(*) FROM suite_grades") == [(48,)]
    assert results[0][0] == results[1][0] and len(results[0][0]["sft"]) > 4
    assert results[0][1] == results[1][1] and all(results[0][1][:5])


def test_other_runs_do_not_wait_for_an_evaluation(deployment, tmp_path):
    deployment.publish("One?")
    deployment.call("run", "--until-done")
    deployment.call("eval", "run", "--suite", write_suite(tmp_path), "--policy", "0")
    status = deployment.rows("status")
    assert status["run"] == "live" and {row["lag"] for row in status["topics"]} <= {0, None}
    with open_store(deployment.settings()).open_read_session() as query:
        assert load_run_ids(query)["run_ids"] == ["live", "eval-policy-0"]
        assert [trace["source"] for trace in search_traces(query, "", {})["traces"]] == ["prompts"]
        assert len(search_traces(query, "", {"split": "SUITE"})["traces"]) == len(TEXTS)
        assert [row["prompts"] for row in load_policy_stats(query, "")] == [1]
    deployment.fails(UsageError, "run eval-policy-0 is part of the evaluation eval", "run", "--run", "eval-policy-0")
    output = deployment.call("replay", "--stage", "critique", "--from", "run:eval-policy-0", "--as", "again")
    assert "selected 8, done 0, skipped 8, dead letters 0" in output
    assert deployment.sql("SELECT count(*) FROM critiques WHERE run_id <> 'live'") == [(0,)]


def test_limits_of_length_samples_and_prompts(deployment, tmp_path):
    xstest = tmp_path / "x.csv"
    xstest.write_text("id,prompt,type,label\n1,Hello?,a,safe\n2,Hi?,a,unsafe\n")
    suites = ("--suite", write_suite(tmp_path), "--suite", f"xstest={xstest}", "--policy", "0")
    sampling = (
        "SELECT source, count(*), any_value(sampling.max_tokens), any_value(sampling.temperature), any_value(len(completions))"
    )
    by_suite = f"{sampling} FROM raw.responses WHERE run_id = '{{}}-policy-0' GROUP BY 1 ORDER BY 1"
    deployment.call("eval", "run", *suites, "--name", "own")
    assert deployment.sql(by_suite.format("own")) == [("mine", 8, 512, 0.0, 1), ("xstest", 2, 256, 0.0, 1)]
    more = ("--name", "short", "--max-tokens", "5", "--limit", "3", "--samples", "2", "--temperature", "1", "--json")
    rows = json.loads(deployment.call("eval", "run", *suites, *more))
    assert deployment.sql(by_suite.format("short")) == [("mine", 3, 5, 1.0, 2), ("xstest", 2, 5, 1.0, 2)]
    assert sum(row["completions"] for row in rows) == 10 and {row["truncated"] for row in rows} == {0}


def test_prompts_that_are_erased_trained_or_fail_are_reported(deployment, tmp_path):
    deployment.flags["worker.max_attempts"] = "1"
    deployment.publish(*TEXTS[:3])
    deployment.call("run", "--until-done")
    ((prompt_id,),) = deployment.sql(f"SELECT prompt_id::VARCHAR FROM traces WHERE prompt = '{TEXTS[0]}'")
    deployment.call("erase", prompt_id, "--yes")
    suite = write_suite(tmp_path, [*TEXTS, POISON_TEXT])
    output = deployment.call("eval", "run", "--suite", suite, "--policy", "0", code=1, stream="output")
    assert "8 prompts of mine published, 1 skipped because they were erased" in output
    assert "suite mine: 2 prompts are also training prompts of this log" in output
    assert "1 records became dead letters, so their grades are missing: charter dlq list" in output
    assert [row[2] for row in deployment.sql(RESPONSES)] == [str(number) for number in range(2, 9)]
    bus = connect_bus(deployment.settings())
    start = read_start_positions(bus, "eval-policy-0")
    bus.close()
    assert sum(offset for tp, offset in start.offsets.items() if tp.topic == "prompts") == 3  # earlier records are not read


def test_a_changed_evaluation_is_refused(deployment, tmp_path):
    suite = ("--suite", write_suite(tmp_path), "--policy", "0")
    deployment.call("eval", "run", *suite)
    cold = r"respond.temperature was 0.0 and is now 0.5(.|\n)*--name NAME$"
    deployment.fails(UsageError, cold, "eval", "run", *suite, "--temperature", "0.5")
    limit = "respond.max_tokens was the limit of each suite and is now 5"
    deployment.fails(UsageError, limit, "eval", "run", *suite, "--max-tokens", "5")
    write_suite(tmp_path, ["Changed?", *TEXTS[1:]])
    deployment.fails(
        UsageError, "the prompt 1 of the suite mine has changed since the evaluation eval began", "eval", "run", *suite
    )
    settings = deployment.settings(run__id="taken-policy-0")
    bus = connect_bus(settings)
    with make_host(settings, bus, ["respond"], sink=False):
        pass
    bus.close()
    deployment.fails(UsageError, "it is not an evaluation", "eval", "run", *suite, "--name", "taken")


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (("--policy", "3"), "there is no policy 3 on the log\nit has the policies 0\n"),
        (("--policy", "newest"), "newest is not a policy version"),
        (("--name", "a b"), "--name a b is not a name"),
        (("--samples", "2"), "--samples is 2 and --temperature is 0"),
        (("--run", "mine"), "--run has no effect on an evaluation"),
        (("--suite", "other={benign}", "--transform", "base64"), "--transform changes no prompt of the suite other"),
        (("--suite", "mine={benign}"), "the suite mine is given twice"),
        (("--suite", "nothing"), "there is no suite and no file nothing"),
        (("--set", 'grade.graders=["loud"]'), "there is no grader loud"),
    ],
)
def test_wrong_option_is_refused_before_anything_is_published(deployment, tmp_path, words, match):
    (tmp_path / "benign.jsonl").write_text('"Hello?"\n')
    words = [word.format(benign=tmp_path / "benign.jsonl") for word in words]
    deployment.fails(UsageError, match, "eval", "run", "--suite", write_suite(tmp_path), *words)
    bus = connect_bus(deployment.settings())
    assert not list(read_topic(bus, "prompts"))
    bus.close()
