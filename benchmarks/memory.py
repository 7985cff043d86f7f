"""Peak memory of one optimiser step of each learner on SmolLM2, all weights and LoRA, each in a process of its own.

python -m benchmarks.memory                the table (ten minutes on two cores)
python -m benchmarks.memory --rows 8 --prompt 64 --answer 128 --micro-rows 4      the defaults

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

MIB = 2**20
RANK = 16
WORDS = ("alpha ", "bravo ", "delta ", "echo ", "hotel ", "india ", "lima ", "tango ")  # one token each


def text(draw: random.Random, tokens: int) -> str:
    return "".join(draw.choice(WORDS) for _ in range(tokens))


def learn(case: str, policy: Path, reference: Path, about: dict[str, Any]) -> None:
    """One step of the learner that `case` names (`ppo/lora`, `ppo/full/checkpointing` ...)."""
    from schemas.records import ChatMessage
    from trainer import dpo, ppo, reward, sft, weights

    phase, how, *more = case.split("/")
    draw, rows = random.Random(0), about["rows"]
    prompts = [(ChatMessage(role="user", content=text(draw, about["prompt"])),) for _ in range(rows)]
    common: dict[str, Any] = {
        "lora_rank": RANK if how == "lora" else 0,
        "hardware": weights.Hardware(about["micro_rows"], "checkpointing" in more),
    }
    if phase == "sft":
        texts = [sft.SftExample(messages, text(draw, about["answer"]), True, "") for messages in prompts]
        sft.train(policy, texts, learning_rate=1e-5, batch_size=rows, **common)
    elif phase in ("reward", "dpo"):
        pairs = [
            reward.PreferenceExample(
                messages, text(draw, about["answer"]), text(draw, about["answer"]), 0.8, str(n), True, True
            )
            for n, messages in enumerate(prompts)
        ]
        if phase == "reward":
            reward.train(policy, pairs, learning_rate=1e-3, batch_size=rows, **common)
        else:
            dpo.train(policy, reference, pairs, learning_rate=1e-6, batch_size=rows, **common)
    else:
        answers = [
            ppo.Rollout(*(tuple(draw.randrange(1000, 40000) for _ in range(about[key])) for key in ("prompt", "answer")),
                        (-10.0,) * about["answer"], True, 0, str(n))
            for n in range(rows)
        ]  # fmt: skip
        p = ppo.Hyperparameters(epochs=1, batch_size=rows)
        ppo.train(policy, reference, answers, [draw.gauss(0, 1) for _ in answers], p, **common)


def peak() -> int:
    """The most bytes this process has held: the GPU's allocator where there is one, else the resident set."""
    import torch

    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def second_policy(base: Path, folder: Path) -> Path:
    """What a first PPO update with LoRA leaves: merged weights, and the adapter and value head beside them."""
    from trainer import ppo, weights

    model = weights.with_lora(weights.load_policy(base), RANK, "CAUSAL_LM")
    head = ppo.Actor(model).value.state_dict()
    weights.rl_saver(model, weights.load_tokenizer(base), head, base)(folder)
    return folder


CASES = (
    *(f"{phase}/{how}" for phase in ("sft", "reward", "dpo", "ppo") for how in ("full", "lora")),
    "ppo/full/checkpointing",
    "ppo/lora/second update",
    "dpo/lora/second update",
)


def table(about: dict[str, Any], cases: Sequence[str]) -> None:
    from engine.models import smollm2

    base = smollm2.folder()
    weights_bytes = weights_size(base)
    print(f"weights in fp32: {weights_bytes / MIB:.0f} MiB\n\n| step | peak MiB | of the weights |\n|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        second = second_policy(base, Path(folder))
        for case in cases:
            policy = second if "second update" in case else base
            given = about | {"case": case, "policy": str(policy), "reference": str(base)}
            command = [sys.executable, "-W", "ignore", "-m", "benchmarks.memory", "--child", json.dumps(given)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            found = int(done.stdout.splitlines()[-1])
            print(f"| {case.replace('/', ', ')} | {found / MIB:.0f} | {found / weights_bytes:.1f} |", flush=True)


def weights_size(folder: Path) -> int:
    from trainer import weights

    return sum(4 * parameter.numel() for parameter in weights.load_policy(folder).parameters())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("rows", 8), ("prompt", 64), ("answer", 128), ("micro-rows", 4)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("cases", nargs="*", help="some of the steps, e.g. ppo/lora; all by default")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        about = json.loads(given.child)
        learn(about["case"], Path(about["policy"]), Path(about["reference"]), about)
        print(peak())
        return 0
    table(
        {"rows": given.rows, "prompt": given.prompt, "answer": given.answer, "micro_rows": given.micro_rows},
        given.cases or CASES,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
