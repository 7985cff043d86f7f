"""Run each learner on a tiny model, in one process or in several. `test_processes.py` compares the results.

    python -m torch.distributed.run --nproc_per_node 2 tests/support/learner_processes.py TIED UNTIED OUT DATA

TIED and UNTIED are folders of tiny models. Each process checks that the policies were sharded (`check_shards`). Then the processes
resume the unfinished update in the data folder DATA.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor

from charter.connect import connect_bus, open_store
from engine.errors import CharterError
from engine.settings import load_settings
from schemas.records import ChatMessage
from trainer import distributed, sharding, weights
from trainer.learners import distill, dpo, grpo, ppo, reward, rloo, sft
from trainer.loop import Trainer

HARDWARE = weights.Hardware(micro_batch_size=2, precision="fp32")
KEPT = {"loss", "grad_norm", "policy_loss", "value_loss", "kl_ref", "sl_loss", "ratio_max", "clipfrac", "entropy"}
PROMPTS = [(ChatMessage(role="user", content="say " + n * "n"),) for n in range(10)]
TEXTS = [sft.SftExample(messages, n * "ab" + "c", True, str(n)) for n, messages in enumerate(PROMPTS[:8])]
PAIRS = [reward.PreferenceExample(messages, "aa", "bbb", 0.8, str(n), True) for n, messages in enumerate(PROMPTS)]
ROLLOUTS = [ppo.Rollout((1, 5 + n), (7, 8, 2)[: 1 + n % 3], (-3.0,) * (1 + n % 3), n % 2 == 0, 0, str(n)) for n in range(7)]
GROUPS = [replace(rollout, record_id=str(n // 4)) for n, rollout in enumerate(ROLLOUTS)]
EXAMPLES = [distill.DistillExample(rollout, (1, 9, 4, *rollout.prompt_token_ids)) for rollout in ROLLOUTS]
SL_ROWS = [{"input_ids": [1, 5, 6, 7, 2], "labels": [-100, -100, 6, 7, 2]}, {"input_ids": [1, 9, 2], "labels": [-100, 9, 2]}]
SCORES = list(range(7))
# The last of the three minibatches has one row, so that one of two processes has none.
STEPS = {"learning_rate": 1e-2, "epochs": 2, "batch_size": 3}
TRL = {"learning_rate": 1e-3, "batch_size": 4}
PPO = ppo.PPOConfig(**STEPS)
DISTILL = distill.DistillConfig(**STEPS, min_teacher_effect=0.0)


def list_cases(tied, untied, out):
    """Return the learner, its arguments and its settings for each name of a case."""
    checkpointed = {"hardware": replace(HARDWARE, gradient_checkpointing=True)}
    bf16 = {"hardware": weights.Hardware(2, base_dtype="bf16")}
    lora = {"lora_rank": 4}
    return {
        "sft": (sft.train, (tied, TEXTS), TRL),
        "sft-lora": (sft.train, (untied, TEXTS), TRL | lora | checkpointed),
        "reward": (reward.train, (tied, PAIRS), TRL),
        "reward-lora": (reward.train, (tied, PAIRS), TRL | lora | {"ensemble_size": 2}),
        "reward-bf16": (reward.train, (untied, PAIRS), TRL | lora | bf16),
        "dpo": (dpo.train, (untied, untied, PAIRS), TRL | checkpointed),
        "dpo-lora": (dpo.train, (tied, tied, PAIRS), TRL | lora),
        "ppo": (ppo.train, (tied, tied, ROLLOUTS, SCORES, PPO), {"sl_rows": SL_ROWS}),
        "ppo-untied": (ppo.train, (untied, untied, ROLLOUTS, SCORES, PPO), checkpointed),
        "ppo-lora": (ppo.train, (tied, tied, ROLLOUTS, SCORES, PPO), lora | checkpointed | {"sl_rows": SL_ROWS}),
        "ppo-lora-second": (ppo.train, (out / "ppo-lora", tied, ROLLOUTS, SCORES, PPO), lora),
        "ppo-bf16": (ppo.train, (tied, tied, ROLLOUTS, SCORES, PPO), {"hardware": replace(HARDWARE, precision="bf16")}),
        "grpo": (grpo.train, (tied, tied, GROUPS, SCORES, grpo.GRPOConfig(**STEPS)), {"base_folder": untied}),
        "grpo-bf16": (grpo.train, (untied, untied, GROUPS, SCORES, grpo.GRPOConfig(1e-2, batch_size=7)), lora | bf16),
        "rloo": (rloo.train, (untied, untied, GROUPS, SCORES, rloo.RLOOConfig(**STEPS)), {}),
        "distill": (distill.train, (tied, untied, EXAMPLES, DISTILL), {}),
        "distill-untied": (distill.train, (untied, untied, EXAMPLES, replace(DISTILL, top_k=3)), {}),
        "distill-lora": (distill.train, (tied, tied, EXAMPLES, DISTILL), lora),
    }


def run_learners(tied, untied, out):
    """Run all cases. Return the metrics of the steps of each case, and save each trained model in `out`."""
    steps = {}
    for name, (learner, arguments, settings) in list_cases(tied, untied, out).items():

        def on_step(step, metrics, name=name):
            steps.setdefault(name, []).append({key: value for key, value in metrics.items() if key in KEPT})

        result = distributed.call_learner(learner, *arguments, **{"hardware": HARDWARE, "seed": 1} | settings, on_step=on_step)
        (out / name).mkdir(parents=True)
        if learner is sft.train:
            weights.make_saver(*result[:2])(out / name)
        else:
            getattr(result[0], "save", result[0])(out / name)
    responses = [(example.messages, example.response_a, True) for example in PAIRS]
    scores = distributed.call_learner(reward.score_responses, out / "reward", responses, policy=tied, hardware=HARDWARE)
    steps["scores"] = [dict(enumerate(column)) for column in scores]
    try:  # the log is unreachable at a step: the other process must not wait within the next step
        distributed.call_learner(dpo.train, tied, tied, PAIRS, hardware=HARDWARE, on_step=fail_step, **TRL)
    except CharterError as error:
        steps["error"] = [{"message": error.what}]
    return steps


def fail_step(step, metrics):
    raise CharterError("the log is unreachable")


def open_trainer(data, base, **callbacks):
    """Return the log and the trainer of a data folder."""
    flags = {"data.folder": data, "models.policy": base, "train.precision": "fp32", "train.micro_batch_size": 2}
    flags |= {"train.sft_rows": 8, "sft.batch_size": 4, "sft.learning_rate": 1e-3}
    settings = load_settings({name: str(value) for name, value in flags.items()}, environment={})[0]
    bus = connect_bus(settings)
    return bus, Trainer(bus, open_store(settings), settings, base, **callbacks)


def resume_update(data, base):
    """Train the unfinished batch of a data folder. Return the id of the batch and the checkpoint."""
    bus, trainer = open_trainer(data, base)
    update = trainer.resume()
    trainer.close()
    bus.close()
    return update.batch_id, update.uri


def check_shards(model, gather=weights.gather_model):
    """Check in each process that it holds a part of each loaded weight, and that the other trained weights are equal."""
    base = model.get_base_model() if weights.has_adapter(model) else model
    sharding.release_gathered_weights(base)
    plain = {name: p for name, p in base.named_parameters() if not isinstance(p, DTensor)}
    assert all("lora_" in name or "modules_to_save" in name for name in plain), plain.keys()
    parts = [p for p in base.parameters() if isinstance(p, DTensor)]
    assert sum(p.to_local().numel() for p in parts) <= 0.6 * sum(p.numel() for p in parts)
    for name, parameter in plain.items():
        others = [torch.empty_like(parameter) for _ in range(distributed.get_num_shards())]
        torch.distributed.all_gather(others, parameter.detach().contiguous())
        assert all(torch.equal(other, parameter) for other in others), name
    assert bool(plain) == weights.has_adapter(model)
    return gather(model)


if __name__ == "__main__":
    tied, untied, out, data = (Path(argument) for argument in sys.argv[1:])
    weights.gather_model = check_shards
    with distributed.join_processes() as is_main:
        if is_main:
            steps = run_learners(tied, untied, out)
            (out / "result.json").write_text(json.dumps({"steps": steps, "resumed": resume_update(data, tied)}))
