"""The verdict on the labels: its checks, where it is shown, and RL on labels that are not good enough."""

import pytest
from starlette.testclient import TestClient

from charter.dashboard.app import Dashboard
from charter.label_quality import LabelQuality, judge_labels, make_label_check, read_label_quality
from engine.errors import UsageError
from engine.settings import load_settings
from schemas import ids
from schemas.records import LabelSource, ModelRef, Outcome, PolicyKind, PolicyUpdate, Split
from tests.charter.test_export import judgement
from tests.support.deployment import Deployment
from tests.support.records import RecordDatabase, make_human_label, make_preference, make_revision
from tests.support.workspace import Workspace

LIMITS = load_settings({}, environment={})[0].label_quality
GOOD = {"labels": 100, "both_orders": 100, "flips": 40, "uncertain": 50}


def make_flip(name, number, **more):
    return judgement(name, f"prompt {name} {number}", f"{name} a", f"{name} b", 0.9, 0.2, **more).model_copy(
        update={"record_id": ids.compute_id(name, number), "position_flip": True}
    )


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({}, ""),
        ({"flips": 41}, "41% of 100 labels flip with the order of the responses, at most 40%. Use a larger judge"),
        ({"uncertain": 51}, "51% of 100 labels are within 0.45 to 0.55, at most 50%. Use a larger judge"),
        (
            {"written": 40, "leaks": 21},
            "52% of 40 critiques and revisions contain parts of their prompt, at most 50%. Use a larger",
        ),
        ({"compared": 40, "agreed": 22, "agreement_low": 0.398}, "agrees with people on 22 of 40 pairs (lower bound 0.40"),
        ({"compared": 40, "agreed": 32, "agreement_low": 0.652}, ""),
        ({"compared": 3, "agreed": 3, "agreement_low": 0.438}, ""),  # too few pairs
        ({"reward_version": 2, "held_out": 30, "reward_accuracy": 0.6, "length_accuracy": 0.6}, "reward model 2 predicts 60%"),
        ({"reward_version": 2, "held_out": 30, "reward_accuracy": 0.7, "length_accuracy": 0.6}, ""),
        ({"reward_version": 2, "held_out": 3, "reward_accuracy": 0.3, "length_accuracy": 0.6}, ""),
    ],
)
def test_each_check_has_a_limit(changes, problem):
    verdict = judge_labels(LabelQuality(**GOOD | changes), LIMITS)
    assert bool(verdict.problems) == bool(problem) and problem in str(verdict) and "\n" not in str(verdict)
    assert str(verdict).startswith("labels: do not train" if problem else "labels: good enough to train on (40% of 100")


def test_few_labels_decide_nothing():
    quality = LabelQuality(labels=19, both_orders=19, flips=19, uncertain=19)
    assert "19 labels are too few" in str(judge_labels(quality, LIMITS))
    assert "100% of 19 labels flip" in str(judge_labels(quality, LIMITS.model_copy(update={"min_labels": 19})))
    assert str(judge_labels(LabelQuality(0, 0, 0, 0), LIMITS)) == "labels: there are none yet"


def test_view_counts_the_labels_that_train(tmp_path):
    database = RecordDatabase(tmp_path / "charter.duckdb")
    ai = judgement("seen", "by a person", "aa", "b", 0.9, 0.7)
    critic = {"model": ModelRef(id="critic", revision="1"), "template_hash": "t"}
    database.add(
        *(make_flip("flip", n) for n in range(2)),
        make_flip("held out", 0, split=Split.EVAL),
        make_flip("rejected", 0).model_copy(update={"outcome": Outcome.POSITION_FLIP, "p_a": None}),
        judgement("same", "one", "aa", "b", 0.9, 0.7),
        make_preference("near", "two", 0.55),
        make_revision("clean", "three", "a", "b", 0.1).model_copy(update=critic),
        make_revision("leak", "three", "a", "c", 0.1).model_copy(update=critic | {"leaks": ["instruction"]}),
        ai,
        make_human_label("person", ai, 1.0),
        PolicyUpdate(
            record_id=ids.compute_id("reward"), run_id="r", stage="train", kind=PolicyKind.REWARD, version=3, phase="reward",
            uri="x", content_hash="x", base_version=0, batch_id=ids.compute_id("batch"),
            metrics={"reward/held_out": 30.0, "reward/accuracy": 0.6, "reward/length_accuracy": 0.7},
        ),
    )  # fmt: skip
    quality = read_label_quality(database.store.query)
    # The label of the person replaces the label of the judge, so five labels train. A rejected flip gives no label.
    assert (quality.labels, quality.both_orders, quality.flips, quality.uncertain) == (5, 4, 3, 3)
    assert (quality.written, quality.leaks, quality.compared, quality.agreed) == (2, 1, 1, 1)
    assert (quality.reward_version, quality.held_out, quality.reward_accuracy, quality.length_accuracy) == (3, 30, 0.6, 0.7)


@pytest.fixture
def workspace(tmp_path):
    workspace = Workspace(tmp_path / "data")
    yield workspace
    workspace.close()


def test_loop_skips_rl_says_so_once_and_goes_on_with_sft(workspace):
    workspace.reopen(check_labels=make_label_check(LIMITS))
    workspace.add(*(make_flip("flip", n) for n in range(24)))
    workspace.add_chains("a")
    for phase in ("sft", "reward"):
        assert workspace.trainer.next_phase() == phase
        workspace.trainer.update(phase)
    workspace.add_responses("a")
    workspace.add_chains("b")
    # Without the check, PPO would come now, and SFT would wait for PPO.
    assert workspace.trainer.next_phase() == "sft" and workspace.trainer.next_phase() == "sft"
    (message,) = [message for message in workspace.messages if "skipped" in message]
    assert "ppo is skipped" in message and "100% of 24 labels flip" in message and "--force" in message
    workspace.reopen()
    assert workspace.trainer.next_phase() == "ppo"


@pytest.fixture
def deployment(tmp_path):
    """A data folder in which every label flips with the order of the responses."""
    deployment = Deployment(tmp_path / "data")
    deployment.flags["label_quality.min_labels"] = "3"
    database = RecordDatabase(tmp_path / "data" / "charter.duckdb")
    database.add(*(make_flip("flip", n) for n in range(3)), make_preference("person", "x", 1.0, label_source=LabelSource.HUMAN))
    return deployment


VERDICT = "labels: do not train a policy on these 4 labels: 100% of 3 labels flip with the order of the responses"


def test_status_and_card_show_the_verdict(deployment, tmp_path):
    assert VERDICT in deployment.call("status")
    labels = deployment.rows("status")["labels"]
    assert labels["num_labels"] == 4 and "100% of 3 labels flip" in labels["problems"][0]
    with TestClient(Dashboard(deployment.settings()).build_app(), base_url="http://127.0.0.1:8400") as client:
        assert VERDICT in client.get("/preferences").text
    deployment.call("export", "preference", tmp_path / "pairs")
    assert VERDICT in (tmp_path / "pairs" / "README.md").read_text(encoding="utf-8")
    output = deployment.call("export", "preference", tmp_path / "same", "--no-flips")
    assert "train: 1 row" in output and "3 labels left out, because they flip" in output
    card = (tmp_path / "same" / "README.md").read_text(encoding="utf-8")
    # The flips that were left out still show that the judge prefers a position.
    assert "100% of 3 labels flip" in card and "| the label flips with the order of the responses | 3 |" in card
    deployment.fails(UsageError, "sft has no --no-flips", "export", "sft", tmp_path / "sft", "--no-flips")


def test_run_until_done_ends_with_the_verdict(tmp_path):
    deployment = Deployment(tmp_path / "data")
    deployment.publish("One?")
    assert "labels: 1 label is too few" in deployment.call("run", "--until-done", stream="stderr")


def test_training_on_bad_labels_needs_force(deployment, tiny):
    deployment.flags["models.policy"] = str(tiny)
    deployment.publish("One?")  # train refuses a folder without a log
    deployment.fails(UsageError, "ppo does not train on these 4 labels", "train", "--phase", "ppo")
    # With --force the command goes on to the next requirement.
    deployment.fails(UsageError, "reward", "train", "--phase", "ppo", "--force")
    assert VERDICT in deployment.call("train", stream="output")
