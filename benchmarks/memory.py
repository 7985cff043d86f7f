"""Peak memory of one optimiser step of each learner on SmolLM2, all weights and LoRA, each in a process of its own.

python -m benchmarks.memory                the table (ten minutes on two cores)
python -m benchmarks.memory --rows 8 --prompt 64 --answer 128 --micro-batch-size 4      the defaults

Rows are random tokens of one length, so that nothing depends on a data set: `--rows` texts, pairs or answers make one step.
Peak is the process's largest resident set, libraries included; its ratio is to the model's fp32 weights. On a GPU it is the
allocator's peak.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_MIB = 2**20
_LORA_RANK = 16
_WORDS = ("alpha ", "bravo ", "delta ", "echo ", "hotel ", "india ", "lima ", "tango ")  # one token each


def _make_text(rng: random.Random, num_tokens: int) -> str:
    return "".join(rng.choice(_WORDS) for _ in range(num_tokens))


def _train_one_step(case: str, policy: Path, reference: Path, sizes: dict[str, Any]) -> None:
    """One step of the learner that `case` names (`ppo/lora`, `ppo/full/checkpointing` ...)."""
    from schemas.records import ChatMessage
    from trainer import dpo, ppo, reward, sft, weights

    phase, how, *more = case.split("/")
    draw, rows = random.Random(0), sizes["rows"]
    prompts = [(ChatMessage(role="user", content=_make_text(draw, sizes["prompt"])),) for _ in range(rows)]
    common: dict[str, Any] = {
        "lora_rank": _LORA_RANK if how == "lora" else 0,
        "hardware": weights.Hardware(sizes["micro_batch_size"], "checkpointing" in more),
    }
    if phase == "sft":
        texts = [sft.SftExample(messages, _make_text(draw, sizes["answer"]), True, "") for messages in prompts]
        sft.train(policy, texts, learning_rate=1e-5, batch_size=rows, **common)
    elif phase in ("reward", "dpo"):
        pairs = [
            reward.PreferenceExample(
                messages, _make_text(draw, sizes["answer"]), _make_text(draw, sizes["answer"]), 0.8, str(n), True, True
            )
            for n, messages in enumerate(prompts)
        ]
        if phase == "reward":
            reward.train(policy, pairs, learning_rate=1e-3, batch_size=rows, **common)
        else:
            dpo.train(policy, reference, pairs, learning_rate=1e-6, batch_size=rows, **common)
    else:
        answers = [
            ppo.Rollout(*(tuple(draw.randrange(1000, 40000) for _ in range(sizes[key])) for key in ("prompt", "answer")),
                        (-10.0,) * sizes["answer"], True, 0, str(n))
            for n in range(rows)
        ]  # fmt: skip
        p = ppo.PPOConfig(epochs=1, batch_size=rows)
        ppo.train(policy, reference, answers, [draw.gauss(0, 1) for _ in answers], p, **common)


def _measure_peak_bytes() -> int:
    """The most bytes this process has held: the GPU's allocator where there is one, else the resident set."""
    import torch

    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _make_second_policy(base: Path, folder: Path) -> Path:
    """What a first PPO update with LoRA leaves: merged weights, and the adapter and value head beside them."""
    from trainer import ppo, weights

    model = weights.add_lora(weights.load_policy(base), _LORA_RANK, "CAUSAL_LM")
    head = ppo.ActorCritic(model).value_head.state_dict()
    weights.make_rl_saver(model, weights.load_tokenizer(base), head, base)(folder)
    return folder


_CASES = (
    *(f"{phase}/{how}" for phase in ("sft", "reward", "dpo", "ppo") for how in ("full", "lora")),
    "ppo/full/checkpointing",
    "ppo/lora/second update",
    "dpo/lora/second update",
)


def _print_table(sizes: dict[str, Any], cases: Sequence[str]) -> None:
    from engine.models import smollm2

    base = smollm2.get_model_folder()
    weights_bytes = _compute_weight_bytes(base)
    print(f"weights in fp32: {weights_bytes / _MIB:.0f} MiB\n\n| step | peak MiB | of the weights |\n|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        second = _make_second_policy(base, Path(folder))
        for case in cases:
            policy = second if "second update" in case else base
            given = sizes | {"case": case, "policy": str(policy), "reference": str(base)}
            command = [sys.executable, "-W", "ignore", "-m", "benchmarks.memory", "--child", json.dumps(given)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            found = int(done.stdout.splitlines()[-1])
            print(f"| {case.replace('/', ', ')} | {found / _MIB:.0f} | {found / weights_bytes:.1f} |", flush=True)


def _compute_weight_bytes(folder: Path) -> int:
    from trainer import weights

    return sum(4 * parameter.numel() for parameter in weights.load_policy(folder).parameters())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("rows", 8), ("prompt", 64), ("answer", 128), ("micro-batch-size", 4)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("cases", nargs="*", help="some of the steps, e.g. ppo/lora; all by default")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        about = json.loads(given.child)
        _train_one_step(about["case"], Path(about["policy"]), Path(about["reference"]), about)
        print(_measure_peak_bytes())
        return 0
    _print_table(
        {"rows": given.rows, "prompt": given.prompt, "answer": given.answer, "micro_batch_size": given.micro_batch_size},
        given.cases or _CASES,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
