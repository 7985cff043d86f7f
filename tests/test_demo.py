"""The main job with the real SmolLM2 on a handful of prompts: every stage, one update of each kind, killed half way."""

import json
import os
import signal
import subprocess
import sys

import pytest

from charter.connect import open_store
from engine.settings import load_settings

PROMPTS = 2  # then 1 and 1 more, answered by the new policies


def demo(folder, **more):
    command = [sys.executable, "-m", "charter", "demo", "--data", str(folder), "--prompts", str(PROMPTS)]
    short = ["respond.max_tokens=24", "revise.max_tokens=24", "critique.max_tokens=16"]
    short.append("critique.few_shot=false")  # in so few tokens the small model repeats the worked examples: nothing to train on
    command += [word for setting in short for word in ("--set", setting)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **more)


@pytest.mark.model
def test_the_demo_with_a_real_model_survives_a_kill_and_ends_whole(smollm2, tmp_path):
    first = demo(tmp_path / "data")
    for line in first.stdout:  # killed in the middle of the first training
        if "sft step" in line or "training: reward" in line:
            break
    os.kill(first.pid, signal.SIGKILL)
    first.communicate()

    second = demo(tmp_path / "data")
    output, _ = second.communicate()
    assert second.returncode == 0, output
    assert "One prompt's story" in output and "policy 2" in output and "charter sql --data" in output

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
    candidate = response["completions"][0]
    assert len(candidate["token_ids"]) == len(candidate["logprobs"]) > 0 and response["model"]["revision"]
    story = store.query_dicts("SELECT * FROM traces ORDER BY created_at LIMIT 1")[0]
    assert story["responses"] and story["critiques"] and story["preferences"]
    assert json.loads(store.query("SELECT settings FROM runs LIMIT 1").rows[0][0])["respond"]["max_tokens"] == 24

    third = demo(tmp_path / "data")  # a finished demo only shows its summary
    output, _ = third.communicate()
    assert third.returncode == 0 and "training:" not in output
    assert store.query("SELECT count(*) FROM responses").rows == [(4,)]
