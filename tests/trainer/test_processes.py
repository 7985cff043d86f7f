"""Two processes under a launcher train the same as one process, on the CPU."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.waiting import HANG_S

LEARN = """
import json, sys
from pathlib import Path
from engine.errors import CharterError
from schemas.records import ChatMessage
from trainer import distributed, weights
from trainer.learners import distill, dpo, grpo, ppo, reward, rloo, sft

EXACT = {"hardware": weights.Hardware(micro_batch_size=2, precision="fp32"), "seed": 1}
prompts = [(ChatMessage(role="user", content="say " + n * "n"),) for n in range(10)]
texts = [sft.SftExample(messages, n * "ab" + "c", True, str(n)) for n, messages in enumerate(prompts[:8])]
pairs = [reward.PreferenceExample(messages, "aa", "bbb", 0.8, str(n), True) for n, messages in enumerate(prompts)]
rollouts = [ppo.Rollout((1, 5 + n), (7, 8, 2)[: 1 + n % 3], (-3.0,) * (1 + n % 3), n % 2 == 0, 0, str(n)) for n in range(7)]
sl_rows = [{"input_ids": [1, 5, 6, 7, 2], "labels": [-100, -100, 6, 7, 2]}, {"input_ids": [1, 9, 2], "labels": [-100, 9, 2]}]
examples = [distill.DistillExample(rollout, (1, 9, 4, *rollout.prompt_token_ids)) for rollout in rollouts]
d = distill.DistillConfig(learning_rate=1e-2, epochs=2, batch_size=3, min_teacher_effect=0.0)
p = ppo.PPOConfig(learning_rate=1e-2, epochs=2, batch_size=3)
groups = [ppo.Rollout(r.prompt_token_ids, r.token_ids, r.logprobs, r.ends_with_eos, 0, str(n // 4)) for n, r in enumerate(rollouts)]
g = {"learning_rate": 1e-2, "epochs": 2, "batch_size": 3}


def learn(tiny):
    metrics_by_phase = {}
    def on_step(phase):
        return lambda n, m: metrics_by_phase.setdefault(phase, []).append({k: m[k] for k in m if k in KEPT})
    distributed.call_learner(sft.train, tiny, texts, learning_rate=1e-3, batch_size=4, on_step=on_step("sft"), **EXACT)
    distributed.call_learner(reward.train, tiny, pairs, learning_rate=1e-3, batch_size=4, on_step=on_step("reward"), **EXACT)
    try:  # the log is unreachable at a step: the other process must not wait within the next step
        distributed.call_learner(dpo.train, tiny, tiny, pairs, learning_rate=1e-3, batch_size=4, on_step=fail_step, **EXACT)
    except CharterError as error:
        metrics_by_phase["error"] = [{"message": error.what}]
    distributed.call_learner(dpo.train, tiny, tiny, pairs, learning_rate=1e-3, batch_size=4, on_step=on_step("dpo"), **EXACT)
    distributed.call_learner(ppo.train, tiny, tiny, rollouts, list(range(7)), p, sl_rows=sl_rows, on_step=on_step("ppo"), **EXACT)
    for learner, config in ((grpo, grpo.GRPOConfig(**g)), (rloo, rloo.RLOOConfig(**g))):
        name = learner.__name__.rpartition(".")[2]
        distributed.call_learner(learner.train, tiny, tiny, groups, list(range(7)), config, on_step=on_step(name), **EXACT)
    distributed.call_learner(distill.train, tiny, tiny, examples, d, on_step=on_step("distill"), **EXACT)
    return metrics_by_phase


def fail_step(step, metrics):
    raise CharterError("the log is unreachable")


KEPT = {"loss", "grad_norm", "policy_loss", "value_loss", "kl_ref", "sl_loss", "ratio_max", "clipfrac", "entropy"}
if __name__ == "__main__":
    with distributed.join_processes() as is_main:
        if is_main:
            Path(sys.argv[2]).write_text(json.dumps(learn(Path(sys.argv[1]))))
"""


def test_two_processes_train_like_one(tiny, tmp_path):
    script, out = tmp_path / "learn.py", tmp_path / "result.json"
    script.write_text(LEARN)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path.cwd())}
    # This is what `accelerate launch --multi_gpu` runs.
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    processes = subprocess.Popen([*launch, str(script), str(tiny), str(out)], env=environment)
    expected = runpy.run_path(str(script), run_name="alone")["learn"](tiny)
    assert processes.wait(timeout=HANG_S) == 0
    result = json.loads(out.read_text())
    assert result.pop("error") == expected.pop("error") == [{"message": "the log is unreachable"}]
    assert set(result) == set(expected) == {"sft", "reward", "dpo", "ppo", "grpo", "rloo", "distill"}
    for phase, steps in expected.items():
        assert len(result[phase]) == len(steps) >= 2
        for number, step in enumerate(steps):
            assert result[phase][number] == pytest.approx(step, rel=1e-3, abs=1e-4), (phase, number)
