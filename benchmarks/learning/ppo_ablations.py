"""Run only PPO on the small language, without the stream and without a reward model. An update takes seconds.

    python -m benchmarks.learning.ppo_ablations                 # default PPO, and PPO without each of its parts; five seeds
    python -m benchmarks.learning.ppo_ablations --seed 7

The benchmark trains a smaller model on the same language. The reward is the rule's score plus an offset. The offset
depends only on the prompt. The offset imitates a reward model that was trained on pairs. The scores of such a model cannot be
compared between prompts. The test suite runs one seed (tests/trainer/test_ppo_learns.py).
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

from benchmarks.learning.base_model import train_base_model
from benchmarks.learning.experiment import estimate_kl, make_settings
from benchmarks.learning.language import ToyQuestion, generate_questions, is_refusal, score_response
from engine import checkpoints
from engine.errors import TrainingFailed
from engine.models.interface import GenerationRequest
from engine.models.local import LocalModel
from schemas.records import ChatMessage
from trainer import weights
from trainer.learners import ppo

_HARDWARE = weights.Hardware(micro_batch_size=64, precision="fp32")
_NUM_PROMPTS, _NUM_COMPLETIONS, _NUM_UPDATES = 64, 6, 3
_HARMFUL_REWARD_OFFSET = -4.0  # added to the reward of every completion for a harmful prompt
_BASE_SETTINGS = {"ppo.learning_rate": "3e-4", "ppo.batch_size": "32"}  # for a model of this size and this number of rollouts
PREVIOUS_SETTINGS = {
    "ppo.lr_scheduler_type": "constant", "ppo.baseline": "batch", "ppo.max_kl_update": "1e9", "ppo.max_kl": "1e9",
}  # fmt: skip
_VARIANTS: dict[str, dict[str, str]] = {
    "default settings": {},
    "a constant learning rate": {"ppo.lr_scheduler_type": "constant"},
    "no warm-up": {"ppo.warmup_ratio": "0"},
    "the batch's mean as the baseline": {"ppo.baseline": "batch"},
    "no limit on an update": {"ppo.max_kl_update": "1e9"},
    "the previous settings": PREVIOUS_SETTINGS,
}


@dataclass(frozen=True)
class PPOLearningCurve:
    """For each policy version, this object holds the target rate, the fraction of refused harmful prompts, and the KL.

    The KL is the KL to the base model in nats per completion. If an update is rejected, the run ends, and `update_error` is the
    message of the error.
    """

    target_rates: list[float]
    refusal_rates: list[float]
    kls: list[float]
    update_error: str = ""


def train_small_base_model(folder: Path) -> Path:
    """Train the smaller model (10 to 20 seconds)."""
    train_base_model(folder, steps=250, batch_size=48, hidden_size=96, num_layers=2)
    return folder


def make_ppo_config(overrides: Mapping[str, str]) -> ppo.PPOConfig:
    return ppo.PPOConfig(**make_settings(Path("unused"), Path("unused"), 0, _BASE_SETTINGS | overrides).ppo.model_dump())


def _sample_responses(
    folder: Path, questions: Sequence[ToyQuestion], version: int
) -> list[tuple[ToyQuestion, str, ppo.Rollout]]:
    """Sample `_NUM_COMPLETIONS` completions for each question."""
    model = LocalModel(folder, threads=torch.get_num_threads(), dtype=torch.float32, max_batch_size=192)
    requests = [
        GenerationRequest((ChatMessage(role="user", content=q.text),), seed=1000 * version + n) for n, q in enumerate(questions)
    ]
    return [
        (q, g.text, ppo.Rollout(g.prompt_token_ids, g.token_ids, g.logprobs, g.finish_reason == "stop", version, str(n)))
        for n, (q, completions) in enumerate(
            zip(questions, model.generate(requests, num_completions=_NUM_COMPLETIONS, max_tokens=48), strict=True)
        )
        for g in completions
    ]


def _compute_reward(question: ToyQuestion, text: str) -> float:
    return score_response(question.text, text) + (_HARMFUL_REWARD_OFFSET if question.source == "red-team" else 0.0)


def _compute_fraction(hits: Iterable[bool]) -> float:
    return fmean(map(float, hits))


def run_ppo(base: Path, folder: Path, config: ppo.PPOConfig, seed: int) -> PPOLearningCurve:
    """Run `_NUM_UPDATES` PPO updates. Each update uses the previous version's completions for new questions."""
    policy, questions, curve = base, generate_questions(seed), PPOLearningCurve([], [], [])
    for number in range(_NUM_UPDATES + 1):
        responses = _sample_responses(policy, list(islice(questions, _NUM_PROMPTS)), 100 * seed + number)
        curve.target_rates.append(_compute_fraction(score_response(q.text, text) == 1 for q, text, _ in responses))
        curve.refusal_rates.append(_compute_fraction(is_refusal(text) for q, text, _ in responses if q.source == "red-team"))
        rollouts = [rollout for _, _, rollout in responses]
        curve.kls.append(estimate_kl(policy, base, rollouts))
        if number < _NUM_UPDATES:
            try:
                scores = [_compute_reward(q, text) for q, text, _ in responses]
                trained_policy, metrics = ppo.train(
                    policy, base, rollouts, scores, config, hardware=_HARDWARE, seed=seed + number
                )
            except TrainingFailed as error:
                return replace(curve, update_error=error.what)
            policy = checkpoints.write_checkpoint(folder / f"policy-{number}", trained_policy.save, {}).folder
            config = replace(config, beta=max(metrics["beta"], config.beta))
    return curve


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", action="append", type=int, help="only this seed (may be repeated) [default: 300 to 304]")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads [default: 2]")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    print("| PPO | last rate, by seed | harmful prompts refused | last KL, by seed |\n|---|---|---|---|")
    with TemporaryDirectory() as temporary:
        base = train_small_base_model(Path(temporary) / "base")
        for number, (name, overrides) in enumerate(_VARIANTS.items()):
            curves = [
                run_ppo(base, Path(temporary) / f"{number}-{seed}", make_ppo_config(overrides), seed)
                for seed in options.seed or range(300, 305)
            ]
            rates = " ".join(f"{curve.target_rates[-1]:.2f}" for curve in curves)
            kls = " ".join(f"{curve.kls[-1]:.1f}" for curve in curves)
            print(f"| {name} | {rates} | {fmean(curve.refusal_rates[-1] for curve in curves):.2f} | {kls} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
