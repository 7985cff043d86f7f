"""Two processes under a launcher shard each model and train the same as one process, on the CPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from tests.support.learner_processes import list_cases, run_learners
from tests.support.waiting import HANG_S


@pytest.fixture
def untied(tiny, tmp_path):
    """Return the folder of a tiny model whose output layer has its own weights."""
    folder = tmp_path / "untied"
    folder.mkdir()
    for file in tiny.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tiny, tie_word_embeddings=False)).save_pretrained(folder)
    return folder


def test_two_processes_train_like_one(tiny, untied, tmp_path):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path.cwd())}
    sharded, single = tmp_path / "sharded", tmp_path / "single"
    # This is what `accelerate launch --multi_gpu` runs.
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    script = "tests/support/learner_processes.py"
    processes = subprocess.Popen([*launch, script, str(tiny), str(untied), str(sharded)], env=environment)
    expected = run_learners(tiny, untied, single)
    assert processes.wait(timeout=HANG_S) == 0
    result = json.loads((sharded / "steps.json").read_text())
    assert result.pop("error") == expected.pop("error") == [{"message": "the log is unreachable"}]
    cases = list_cases(tiny, untied)
    assert set(result) == set(expected) == set(cases)
    for name, steps in expected.items():
        assert len(result[name]) == len(steps) >= 1
        tolerance = 0.15 if "bf16" in name else 0.01  # bf16 has three digits
        precise = {"rel": tolerance / 10, "abs": tolerance / 100}
        for number, step in enumerate(steps):
            assert result[name][number] == pytest.approx(step, **precise), (name, number)
        for file in single.joinpath(name).rglob("*.safetensors"):
            trained, other = load_file(file), load_file(sharded / file.relative_to(single))
            assert trained.keys() == other.keys()
            initial = load_file(cases[name][1][0] / "model.safetensors")
            for key, weight in trained.items():
                update = weight - initial[key] if key in initial else weight
                assert (weight - other[key]).norm() <= tolerance * update.norm() + 1e-6, (name, file.name, key)
        one, two = (json.loads((out / name / "config.json").read_text()) for out in (single, sharded))
        assert one | {"pad_token_id": 0} == two | {"pad_token_id": 0}, name  # a reward model sets it for each batch
