"""`charter demo` with the real SmolLM2 on four prompts: every stage, one update of each phase, killed during training."""

import json
import os
import re
import signal
import subprocess
import sys

import pytest

from charter.connect import open_store
from engine.settings import load_settings
from tests.support.waiting import read_until_hang

PROMPTS = 2  # of the second iteration and of the evaluation; the first iteration has 1


def start_demo(folder):
    command = [sys.executable, "-m", "charter", "demo", "--data", str(folder), "--prompts", str(PROMPTS)]
    overrides = ["respond.max_tokens=24", "revise.max_tokens=24", "critique.max_tokens=16"]
    command += [option for override in overrides for option in ("--set", override)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def assert_shows_result(output):
    """Check the table of all policies, which a sentence about their difference and responses follow."""
    result = output[output.index("How often each policy answers in one short sentence") :]
    rows = re.findall(r"^ +(\d)  (base model|sft|ppo|distill) +\d+% +\d+% to \d+% +\d+% +\d", result, re.MULTILINE)
    assert rows == [("0", "base model"), ("1", "sft"), ("2", "ppo"), ("3", "distill")], result
    assert (
        re.search(r"95 % interval [-+]\d+% to [-+]\d+%, McNemar p = ", result)
        and "Responses of policy 0 and policy 3" in result
    )


@pytest.mark.model
@pytest.mark.timeout(0)  # read_until_hang ends a process that makes no progress
def test_demo_with_a_real_model_continues_after_a_kill(smollm2, tmp_path):
    first = start_demo(tmp_path / "data")
    # Kill the demo during its first training phase.
    read_until_hang(first, lambda line: "sft step" in line or "training: reward" in line)
    os.kill(first.pid, signal.SIGKILL)
    first.communicate()

    second = start_demo(tmp_path / "data")
    output = read_until_hang(second)
    assert second.wait() == 0, output
    summary = output[output.index("Trace of one prompt") :]
    assert "labels: " in summary and "charter sql --data" in summary and "WARNING" not in output
    assert_shows_result(summary)

    store = open_store(load_settings({"data.folder": str(tmp_path / "data")}, environment={})[0])
    versions = "SELECT policy_version, count(*) FROM responses WHERE split {} 'SUITE' GROUP BY 1 ORDER BY 1"
    assert store.query(versions.format("<>")).rows == [(0, 1), (1, 2)]
    assert store.query(versions.format("=")).rows == [(0, 2), (1, 2), (2, 2), (3, 2)]
    assert store.query("SELECT count(DISTINCT messages) FROM suite_responses").rows == [(2,)]
    assert store.query(
        "SELECT count(*) FROM suite_responses WHERE messages IN (SELECT messages FROM prompts WHERE split <> 'SUITE')"
    ).rows == [(0,)]
    judges = store.query("SELECT DISTINCT model.id FROM preferences WHERE outcome = 'OK'").rows
    assert judges == [("grader-one-sentence",)]
    assert store.query("SELECT count(DISTINCT prompt_id), count(*) FROM revision_chains").rows == [(3, 3)]
    assert store.query("SELECT count(*) FROM preferences").rows == [(3,)]
    for topic in ("prompts", "responses", "critiques", "revisions", "preferences", "batches", "policies"):
        assert store.query("SELECT duplicates FROM pipeline_status WHERE topic = ?", [topic]).rows == [(0,)], topic
    updates = store.query("SELECT phase, kind, version FROM policies ORDER BY commit_seq").rows
    assert updates == [("sft", "POLICY", 1), ("reward", "REWARD", 1), ("ppo", "POLICY", 2), ("distill", "POLICY", 3)]
    response = store.query_dicts("SELECT * FROM responses WHERE policy_version = 1")[0]
    completion = response["completions"][0]
    assert len(completion["token_ids"]) == len(completion["logprobs"]) > 0 and response["model"]["revision"]
    trace = store.query_dicts("SELECT * FROM traces ORDER BY created_at LIMIT 1")[0]
    assert trace["responses"] and trace["critiques"] and trace["preferences"]
    assert json.loads(store.query("SELECT settings FROM runs LIMIT 1").rows[0][0])["respond"]["max_tokens"] == 24

    third = start_demo(tmp_path / "data")  # a finished demo only prints its summary
    output = read_until_hang(third)
    assert third.wait() == 0 and "nothing runs" in output and "training:" not in output
    assert_shows_result(output)
    assert store.query("SELECT count(*) FROM responses").rows == [(11,)]
