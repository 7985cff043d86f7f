"""The short form: PPO alone on the small language, without stream and reward model, in seconds an update.

    python -m benchmarks.learning.short                 # PPO as it is, and with each of its parts taken away; five seeds
    python -m benchmarks.learning.short --seed 7

A smaller model of the same small language. The reward is what a reward model of pairs knows of the rule: the value of an
answer, and something that depends on the prompt alone, which no pair tells. The test suite runs one seed
(tests/trainer/test_ppo_learns.py).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory

import torch

from benchmarks.learning.base import train_base
from benchmarks.learning.experiment import divergence, settings_for
from benchmarks.learning.language import Question, questions, refuses, value
from engine import checkpoints
from engine.errors import CannotLearn
from engine.models.local import LocalModel
from engine.models.port import Ask
from schemas.records import ChatMessage
from trainer import ppo, weights

EXACT = weights.Hardware(micro_rows=64, precision="fp32")
PROMPTS, SAMPLES, UPDATES = 64, 6, 3
OFFSET = -4.0  # of every answer to a harmful prompt
RATES = {"ppo.learning_rate": "3e-4", "ppo.batch_size": "32"}  # for so small a model, and so few answers
BEFORE = {
    "ppo.lr_scheduler_type": "constant", "ppo.baseline": "batch", "ppo.max_kl_update": "1e9", "ppo.kl_stop": "1e9",
}  # fmt: skip
VARIANTS: dict[str, dict[str, str]] = {
    "as it is": {},
    "a constant rate": {"ppo.lr_scheduler_type": "constant"},
    "no warm-up": {"ppo.warmup_ratio": "0"},
    "the batch's mean as the baseline": {"ppo.baseline": "batch"},
    "no limit on an update": {"ppo.max_kl_update": "1e9"},
    "as it was": BEFORE,
}


@dataclass(frozen=True)
class Course:
    """By policy version: the target rate, the share of harmful prompts refused, and the KL to the base in nats per answer.

    `refused` is set where an update was refused, and ended the course.
    """

    rates: list[float]
    refusals: list[float]
    kls: list[float]
    refused: str = ""


def make_base(folder: Path) -> Path:
    """Train the smaller model (10 to 20 seconds)."""
    train_base(folder, steps=250, rows=48, width=96, layers=2)
    return folder


def hyperparameters(more: Mapping[str, str]) -> ppo.Hyperparameters:
    return ppo.Hyperparameters(**settings_for(Path("unused"), Path("unused"), 0, RATES | more).ppo.model_dump())


def answer(folder: Path, asked: Sequence[Question], number: int) -> list[tuple[Question, str, ppo.Rollout]]:
    """SAMPLES answers to each question."""
    model = LocalModel(folder, threads=torch.get_num_threads(), dtype=torch.float32, max_batch=192)
    asks = [Ask((ChatMessage(role="user", content=q.text),), seed=1000 * number + n) for n, q in enumerate(asked)]
    return [
        (q, g.text, ppo.Rollout(g.prompt_token_ids, g.token_ids, g.logprobs, g.finish_reason == "stop", number, str(n)))
        for n, (q, made) in enumerate(zip(asked, model.generate(asks, samples=SAMPLES, max_tokens=48), strict=True))
        for g in made
    ]


def reward(question: Question, text: str) -> float:
    return value(question.text, text) + (OFFSET if question.source == "red-team" else 0.0)


def share(hits: Iterable[bool]) -> float:
    return fmean(map(float, hits))


def learn(base: Path, folder: Path, p: ppo.Hyperparameters, seed: int) -> Course:
    """UPDATES of PPO, each on the answers of the version before to new questions."""
    policy, asked, course = base, questions(seed), Course([], [], [])
    for number in range(UPDATES + 1):
        answers = answer(policy, list(islice(asked, PROMPTS)), 100 * seed + number)
        course.rates.append(share(value(q.text, text) == 1 for q, text, _ in answers))
        course.refusals.append(share(refuses(text) for q, text, _ in answers if q.source == "red-team"))
        rollouts = [rollout for _, _, rollout in answers]
        course.kls.append(divergence(policy, base, rollouts))
        if number < UPDATES:
            try:
                scores = [reward(q, text) for q, text, _ in answers]
                learned, metrics = ppo.train(policy, base, rollouts, scores, p, hardware=EXACT, seed=seed + number)
            except CannotLearn as error:
                return replace(course, refused=error.what)
            policy = checkpoints.write(folder / f"policy-{number}", learned.save, {}).folder
            p = replace(p, beta=max(metrics["beta"], p.beta))
    return course


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", action="append", type=int, help="only this seed (may be repeated) [default: 300 to 304]")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    print("| PPO | last rate, by seed | harmful prompts refused | last KL, by seed |\n|---|---|---|---|")
    with TemporaryDirectory() as temporary:
        base = make_base(Path(temporary) / "base")
        for number, (name, more) in enumerate(VARIANTS.items()):
            found = [
                learn(base, Path(temporary) / f"{number}-{seed}", hyperparameters(more), seed)
                for seed in options.seed or range(300, 305)
            ]
            rates, kls = (
                " ".join(texts) for texts in ([f"{c.rates[-1]:.2f}" for c in found], [f"{c.kls[-1]:.1f}" for c in found])
            )
            print(f"| {name} | {rates} | {fmean(c.refusals[-1] for c in found):.2f} | {kls} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
