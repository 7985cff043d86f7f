"""`charter demo` with the real SmolLM2 on four prompts: every stage, one update of each phase, killed during training."""

import json
import os
import signal
import subprocess
import sys

import pytest

from charter.connect import open_store
from engine.settings import load_settings
from tests.support.waiting import read_until_hang

PROMPTS = 2  # of the first iteration; the other two have 1 each


def start_demo(folder):
    command = [sys.executable, "-m", "charter", "demo", "--data", str(folder), "--prompts", str(PROMPTS)]
    overrides = ["respond.max_tokens=24", "revise.max_tokens=24", "critique.max_tokens=16", "label_quality.min_labels=1"]
    overrides.append(
        "critique.few_shot=false"
    )  # with short completions the small model repeats the examples: nothing to train on
    command += [option for override in overrides for option in ("--set", override)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


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
    # Nearly every label of this small judge flips. The demo trains PPO on them and says so.
    assert ("The demo runs PPO anyway" in output) == ("do not train a policy on these 3 labels" in output)
    assert "labels: " in output[output.index("Trace of one prompt") :]
    assert "Trace of one prompt" in output and "policy 2" in output and "charter sql --data" in output

    store = open_store(load_settings({"data.folder": str(tmp_path / "data")}, environment={})[0])
    versions = store.query("SELECT policy_version, count(*) FROM responses GROUP BY 1 ORDER BY 1").rows
    assert versions == [(0, 2), (1, 1), (2, 1)]
    assert store.query("SELECT count(DISTINCT prompt_id), count(*) FROM revision_chains").rows == [(4, 4)]
    assert store.query("SELECT count(*) FROM preferences").rows == [(4,)]
    for topic in ("prompts", "responses", "critiques", "revisions", "preferences", "batches", "policies"):
        assert store.query("SELECT duplicates FROM pipeline_status WHERE topic = ?", [topic]).rows == [(0,)], topic
    updates = store.query("SELECT phase, kind, version FROM policies ORDER BY commit_seq").rows
    assert updates == [("sft", "POLICY", 1), ("reward", "REWARD", 1), ("ppo", "POLICY", 2)]
    response = store.query_dicts("SELECT * FROM responses WHERE policy_version = 1")[0]
    completion = response["completions"][0]
    assert len(completion["token_ids"]) == len(completion["logprobs"]) > 0 and response["model"]["revision"]
    trace = store.query_dicts("SELECT * FROM traces ORDER BY created_at LIMIT 1")[0]
    assert trace["responses"] and trace["critiques"] and trace["preferences"]
    assert json.loads(store.query("SELECT settings FROM runs LIMIT 1").rows[0][0])["respond"]["max_tokens"] == 24

    third = start_demo(tmp_path / "data")  # a finished demo only prints its summary
    output = read_until_hang(third)
    assert third.wait() == 0 and "training:" not in output
    assert store.query("SELECT count(*) FROM responses").rows == [(4,)]
