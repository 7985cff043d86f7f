"""Compare Charter's GRPO with trl's GRPOTrainer in separate processes, and its peak memory with Charter's PPO.

    python -m benchmarks.grpo                        SmolLM2, 8 prompts, 8 completions of each (20 minutes on two cores)
    python -m benchmarks.grpo --prompts 4 --completions 4 --max-tokens 32

Model, prompts, number and length of completions, rewards, loss type, KL, optimizer, learning rate, precision (fp32) and the number
of completions in one optimizer step and in one pass are the same. A round begins with a batch of prompts and ends with the next
policy. Charter loads the policy as the respond stage does, samples, makes one GRPO update and writes a checkpoint, which the next
round loads. trl samples and updates in one process and keeps all models in memory. The first round is a warm-up. Rates are per
CPU second, so that other load on the machine does not change the ratio. The exit code is 1 if Charter samples and trains fewer than
1.3 times the tokens of trl, or if the peak memory of its first round is above that of PPO. In the first round, both have the same
completions. Later rounds have completions of other lengths.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from benchmarks.memory import measure_peak_bytes

_MIN_SPEEDUP = 1.3
_MIB = 2**20
_CONTESTANTS = ("charter", "trl", "charter ppo")


@dataclass(frozen=True)
class GRPOTask:
    """All contestants run this task. `micro_batch_size` is the number of completions in one pass."""

    policy: str
    prompts: tuple[str, ...]
    num_rounds: int
    num_completions: int
    max_tokens: int
    micro_batch_size: int
    learning_rate: float = 1e-6
    beta: float = 0.04
    seed: int = 0


@dataclass
class Result:
    """The CPU time in seconds and the sampled tokens of all rounds but the first, and the peak memory of the process in bytes.

    `first_peak_bytes` is the peak memory after the first round of Charter's learners, which sample the same completions in it.
    """

    generate_s: float = 0.0
    update_s: float = 0.0
    num_tokens: int = 0
    peak_bytes: int = 0
    first_peak_bytes: int = 0


def compute_reward(token_ids: list[int]) -> float:
    """Return a programmatic reward that differs between completions: the share of even token ids."""
    return sum(token % 2 == 0 for token in token_ids) / max(1, len(token_ids))


def _run_charter(task: GRPOTask, learner: str) -> Result:
    import torch

    from engine import checkpoints
    from engine.models.interface import GenerationRequest
    from engine.models.local import LocalModel
    from schemas.records import ChatMessage
    from trainer import weights
    from trainer.learners import grpo, ppo
    from trainer.learners.rollouts import Rollout

    hardware = weights.Hardware(task.micro_batch_size, False, "fp32")
    result, base, policy = Result(), Path(task.policy), Path(task.policy)
    num_rows = len(task.prompts) * task.num_completions
    with tempfile.TemporaryDirectory() as folder:
        for number in range(task.num_rounds):
            started = time.process_time()
            model = LocalModel(policy, threads=1, dtype=torch.float32, max_batch_size=num_rows)
            requests = [
                GenerationRequest((ChatMessage(role="user", content=text),), seed=1000 * number + n)
                for n, text in enumerate(task.prompts)
            ]
            groups = model.generate(requests, num_completions=task.num_completions, max_tokens=task.max_tokens)
            rollouts = [
                Rollout(tuple(g.prompt_token_ids), tuple(g.token_ids), tuple(g.logprobs), g.finish_reason == "stop", 0, str(n))
                for n, group in enumerate(groups)
                for g in group
            ]
            del model
            sampled = time.process_time()
            rewards = [compute_reward(list(r.token_ids)) for r in rollouts]
            common: dict[str, Any] = {"learning_rate": task.learning_rate, "batch_size": num_rows, "beta": task.beta}
            if learner == "grpo":
                config = grpo.GRPOConfig(**common, max_completion_length=task.max_tokens, lr_scheduler_type="constant")
                trained, _ = grpo.train(policy, base, rollouts, rewards, config, hardware=hardware, seed=task.seed)
            else:
                ppo_config = ppo.PPOConfig(**common, epochs=1, lr_scheduler_type="constant")
                trained, _ = ppo.train(policy, base, rollouts, rewards, ppo_config, hardware=hardware, seed=task.seed)
            policy = checkpoints.write_checkpoint(Path(folder) / f"policy-{number}", trained.save, {}).folder
            del trained
            if number:
                result.generate_s += sampled - started
                result.update_s += time.process_time() - sampled
                result.num_tokens += sum(len(r.token_ids) for r in rollouts)
            else:
                result.first_peak_bytes = measure_peak_bytes()
    return result


def _run_trl(task: GRPOTask) -> Result:
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    result, current = Result(), {"generate_s": 0.0, "tokens": 0, "started": 0.0}
    num_rows = len(task.prompts) * task.num_completions

    def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
        current["tokens"] += sum(len(ids) for ids in completion_ids)
        return [compute_reward(ids) for ids in completion_ids]

    class TimedTrainer(GRPOTrainer):  # type: ignore[misc]
        def _generate(self, *arguments: Any, **named: Any) -> Any:
            started = time.process_time()
            output = super()._generate(*arguments, **named)
            current["generate_s"] += time.process_time() - started
            return output

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            current.update(generate_s=0.0, tokens=0, started=time.process_time())

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step > 1:
                result.generate_s += current["generate_s"]
                result.update_s += time.process_time() - current["started"] - current["generate_s"]
                result.num_tokens += int(current["tokens"])

    with tempfile.TemporaryDirectory() as folder:
        config = GRPOConfig(
            output_dir=folder, learning_rate=task.learning_rate, lr_scheduler_type="constant", weight_decay=0.0, max_grad_norm=1.0,
            per_device_train_batch_size=task.micro_batch_size, gradient_accumulation_steps=num_rows // task.micro_batch_size,
            num_generations=task.num_completions, max_completion_length=task.max_tokens, temperature=1.0, beta=task.beta,
            loss_type="dr_grpo", scale_rewards="none", max_steps=task.num_rounds, bf16=False, use_cpu=True, seed=task.seed,
            shuffle_dataset=False, gradient_checkpointing=False, save_strategy="no", report_to="none", disable_tqdm=True,
            logging_strategy="no", dataloader_pin_memory=False, disable_dropout=True,
        )  # fmt: skip
        prompts = [{"prompt": [{"role": "user", "content": text}]} for text in task.prompts]
        trainer = TimedTrainer(
            model=task.policy, reward_funcs=reward, args=config, train_dataset=Dataset.from_list(prompts * task.num_rounds),
            processing_class=AutoTokenizer.from_pretrained(task.policy), callbacks=[Clock()],
        )  # fmt: skip
        trainer.train()
    return result


def _run_child(name: str, task: GRPOTask) -> None:
    import torch

    torch.set_num_threads(1)
    result = _run_trl(task) if name == "trl" else _run_charter(task, "ppo" if name == "charter ppo" else "grpo")
    result.peak_bytes = measure_peak_bytes()
    print(json.dumps(asdict(result)))


def _measure(name: str, task: GRPOTask) -> Result:
    environment = os.environ | {"OMP_WAIT_POLICY": "PASSIVE", "TRANSFORMERS_VERBOSITY": "error", "TQDM_DISABLE": "1"}
    arguments = [sys.executable, "-W", "ignore", "-m", "benchmarks.grpo", "--child", json.dumps({"name": name} | asdict(task))]
    completed = subprocess.run(arguments, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return Result(**json.loads(completed.stdout.splitlines()[-1]))


def _load_prompts(count: int) -> tuple[str, ...]:
    from producers.files import SHIPPED_PROMPTS_PATH
    from producers.parse import parse_prompt
    from producers.rows import read_rows

    rows = islice(read_rows(str(SHIPPED_PROMPTS_PATH), 1, count), count)
    return tuple(parse_prompt(row, source="", max_chars=10**6).messages[-1].content for _, row in rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--completions", type=int, default=8)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--micro-batch-size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=2, help="measured rounds")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        fields = json.loads(options.child)
        name = fields.pop("name")
        _run_child(name, GRPOTask(**fields | {"prompts": tuple(fields["prompts"])}))
        return 0
    from engine.models import smollm2

    task = GRPOTask(
        str(smollm2.get_model_folder()), _load_prompts(options.prompts), options.rounds + 1, options.completions,
        options.max_tokens, options.micro_batch_size,
    )  # fmt: skip
    print("| | sampled tokens per CPU second | sampling only | update only | peak MiB |\n|---|---|---|---|---|")
    results = {}
    for name in _CONTESTANTS:
        result = results[name] = _measure(name, task)
        seconds = (result.generate_s + result.update_s, result.generate_s, result.update_s)
        rates = " | ".join(f"{result.num_tokens / s:.1f}" for s in seconds)
        print(f"| {name} | {rates} | {result.peak_bytes / _MIB:.0f} |", flush=True)
    charter, trl, ppo = (results[name] for name in _CONTESTANTS)
    own, other = (r.num_tokens / (r.generate_s + r.update_s) for r in (charter, trl))
    print(f"\nGRPO, sampling and update: {own / other:.2f} to 1 (goal {_MIN_SPEEDUP}); the update alone:"
          f" {charter.num_tokens / charter.update_s / (trl.num_tokens / trl.update_s):.2f} to 1; peak memory in relation to PPO:"
          f" {charter.first_peak_bytes / ppo.first_peak_bytes:.2f} in the first round")  # fmt: skip
    return 0 if own / other >= _MIN_SPEEDUP and charter.first_peak_bytes <= ppo.first_peak_bytes else 1


if __name__ == "__main__":
    sys.exit(main())
