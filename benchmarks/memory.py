"""Measure the peak memory of one optimizer step of each learner on SmolLM2, with full fine-tuning and with LoRA.

python -m benchmarks.memory                print the table (ten minutes on two cores)
python -m benchmarks.memory --rows 8 --prompt 64 --response 128 --micro-batch-size 4      the same with explicit sizes
python -m benchmarks.memory --processes 2 ppo/full                                        shard the model over two processes

Each step runs in a separate process. With `--processes`, the table has the process with the highest peak.

The rows are random tokens of a fixed length, so that the result does not depend on a data set. One step has `--rows` examples,
pairs or rollouts. On a CPU, the peak is the largest resident set of the process, including libraries. On a GPU, the peak is the
largest memory of the allocator. The table also has the peak divided by the size of the weights in fp32.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

_MIB = 2**20
_LORA_RANK = 16
_WORDS = ("alpha ", "bravo ", "delta ", "echo ", "hotel ", "india ", "lima ", "tango ")  # one token each


def _make_text(rng: random.Random, num_tokens: int) -> str:
    return "".join(rng.choice(_WORDS) for _ in range(num_tokens))


def _train_one_step(case: str, policy: Path, reference: Path, sizes: dict[str, Any]) -> None:
    """Run one step of the learner that `case` names (`ppo/lora`, `ppo/full/checkpointing`, ...)."""
    from schemas.records import ChatMessage
    from trainer import weights
    from trainer.distributed import call_learner
    from trainer.hf import ignore_step
    from trainer.learners import distill, dpo, grpo, ppo, reward, sft

    phase, tuning, *options = case.split("/")
    rng, rows = random.Random(0), sizes["rows"]
    prompts = [(ChatMessage(role="user", content=_make_text(rng, sizes["prompt"])),) for _ in range(rows)]
    common: dict[str, Any] = {
        "lora_rank": _LORA_RANK if tuning == "lora" else 0,
        "hardware": weights.Hardware(sizes["micro_batch_size"], "checkpointing" in options),
        "on_step": ignore_step,
    }
    if phase == "sft":
        examples = [sft.SftExample(messages, _make_text(rng, sizes["response"]), True, "") for messages in prompts]
        call_learner(sft.train, policy, examples, learning_rate=1e-5, batch_size=rows, **common)
    elif phase in ("reward", "dpo"):
        pairs = [
            reward.PreferenceExample(
                messages, _make_text(rng, sizes["response"]), _make_text(rng, sizes["response"]), 0.8, str(n), True, True
            )
            for n, messages in enumerate(prompts)
        ]
        if phase == "reward":
            call_learner(reward.train, policy, pairs, learning_rate=1e-3, batch_size=rows, **common)
        else:
            call_learner(dpo.train, policy, reference, pairs, learning_rate=1e-6, batch_size=rows, **common)
    else:
        # The prompt of the teacher also has the constitution, of half the length of the prompt.
        constitution = tuple(rng.randrange(1000, 40000) for _ in range(sizes["prompt"] // 2))
        rollouts = [
            ppo.Rollout(*(tuple(rng.randrange(1000, 40000) for _ in range(sizes[key])) for key in ("prompt", "response")),
                        (-10.0,) * sizes["response"], True, 0, str(n))
            for n in range(rows)
        ]  # fmt: skip
        rewards = [rng.gauss(0, 1) for _ in rollouts]
        if phase == "grpo":
            groups = [replace(rollout, record_id="one group") for rollout in rollouts]
            call_learner(grpo.train, policy, reference, groups, rewards, grpo.GRPOConfig(batch_size=rows), **common)
        elif phase == "distill":
            examples = [distill.DistillExample(r, constitution + r.prompt_token_ids) for r in rollouts]
            call_learner(distill.train, policy, reference, examples, distill.DistillConfig(batch_size=rows), **common)
        else:
            call_learner(ppo.train, policy, reference, rollouts, rewards, ppo.PPOConfig(epochs=1, batch_size=rows), **common)


def measure_peak_bytes() -> int:
    """Return the peak memory of this process in bytes.

    On a GPU, the peak is the allocator's peak. On a CPU, the peak is the largest resident set.
    """
    import torch

    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    bytes_per_unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes on macOS and in KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * bytes_per_unit


def _make_second_policy(base: Path, folder: Path) -> Path:
    """Write the checkpoint of a first PPO update with LoRA: merged weights, the adapter and the value head."""
    from trainer import weights
    from trainer.learners import ppo

    model = weights.add_lora(weights.load_policy(base), _LORA_RANK, "CAUSAL_LM")
    head = ppo.ActorCritic(model).value_head.state_dict()
    weights.make_rl_saver(model, weights.load_tokenizer(base), head, base)(folder)
    return folder


_CASES = (
    *(f"{phase}/{tuning}" for phase in ("sft", "reward", "dpo", "ppo", "grpo", "distill") for tuning in ("full", "lora")),
    "ppo/full/checkpointing",
    "ppo/lora/second update",
    "dpo/lora/second update",
    "distill/lora/second update",
)


def _print_table(sizes: dict[str, Any], cases: Sequence[str], num_processes: int) -> None:
    from engine.models import smollm2

    base = smollm2.get_model_folder()
    weights_bytes = _compute_weight_bytes(base)
    print(f"weights in fp32: {weights_bytes / _MIB:.0f} MiB\n\n| step | peak MiB | ratio to weights |\n|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        second = _make_second_policy(base, Path(folder))
        for case in cases:
            policy = second if "second update" in case else base
            job = sizes | {"case": case, "policy": str(policy), "reference": str(base)}
            command = [sys.executable, "-W", "ignore", "-m"]
            if num_processes > 1:
                command += ["torch.distributed.run", "--standalone", f"--nproc_per_node={num_processes}", "-m"]
            command += ["benchmarks.memory", "--child", json.dumps(job)]
            completed = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            peak_bytes = max(int(line) for line in completed.stdout.splitlines()[-num_processes:])
            print(f"| {case.replace('/', ', ')} | {peak_bytes / _MIB:.0f} | {peak_bytes / weights_bytes:.1f} |", flush=True)


def _run_child(job: dict[str, Any]) -> None:
    """Run one step, alone or with the other processes of a launcher. Print the peak memory of this process."""
    from trainer import distributed

    is_launched = int(os.environ.get("WORLD_SIZE", "1")) > 1
    with distributed.join_processes() if is_launched else nullcontext(True) as is_main:
        if is_main:
            _train_one_step(job["case"], Path(job["policy"]), Path(job["reference"]), job)
    print(measure_peak_bytes(), flush=True)


def _compute_weight_bytes(folder: Path) -> int:
    from trainer import weights

    return sum(4 * parameter.numel() for parameter in weights.load_policy(folder).parameters())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=64, help="tokens of a prompt")
    parser.add_argument("--response", type=int, default=128, help="tokens of a response")
    parser.add_argument("--micro-batch-size", type=int, default=4)
    parser.add_argument("--processes", type=int, default=1, help="processes that share the weights of the model")
    parser.add_argument("cases", nargs="*", help="steps to measure, such as ppo/lora (default: all)")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        _run_child(json.loads(options.child))
        return 0
    sizes = {name: getattr(options, name) for name in ("rows", "prompt", "response", "micro_batch_size")}
    _print_table(sizes, options.cases or _CASES, options.processes)
    return 0


if __name__ == "__main__":
    sys.exit(main())
