"""Measure what share of SmolLM2's weights is the same in bf16 before and after one update of SFT, PPO and GRPO.

    python -m benchmarks.unchanged_weights          (about ten minutes on one core)

A server holds weights in bf16. An update whose steps are smaller than the rounding to bf16 leaves a weight unchanged there, although
the fp32 weights of the trainer have changed. A high share means that sending only the changed weights would save time. The learning
rates are Charter's defaults, all weights are trained, and rewards are the share of even token ids.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.grpo import compute_reward

_NUM_COMPLETIONS = 8
_NUM_PROMPTS = 8
_MAX_TOKENS = 24


def main() -> None:
    import torch

    from engine.models.smollm2 import get_model_folder
    from engine.settings import load_settings
    from trainer import weights

    torch.set_num_threads(1)
    folder, settings = get_model_folder(), load_settings({}, environment={})[0]
    base = dict(weights.load_policy(folder).named_parameters())
    print(f"{'update':8}{'steps':>7}{'learning rate':>15}{'unchanged in bf16':>20}{'unchanged in fp32':>20}")
    for name, num_steps, learning_rate, model in _train_each(folder, settings):
        trained = dict(model.named_parameters())
        shares = [_compute_unchanged_share(base, trained, dtype) for dtype in (torch.bfloat16, torch.float32)]
        print(f"{name:8}{num_steps:7}{learning_rate:15g}{shares[0]:20.2%}{shares[1]:20.2%}", flush=True)


def _compute_unchanged_share(before: dict[str, Any], after: dict[str, Any], dtype: Any) -> float:
    """Return the share of equal weights after both are rounded to a type."""
    equal = sum(int((before[name].to(dtype) == after[name].to(dtype)).sum()) for name in before)
    return equal / sum(weight.numel() for weight in before.values())


def _train_each(folder: Path, settings: Any) -> Iterator[tuple[str, int, float, Any]]:
    """Train with each learner from the same rollouts. Yield its name, its number of steps, its learning rate, and the model."""
    import torch

    from engine.models.interface import GenerationRequest, require_results
    from engine.models.local import LocalModel
    from producers.files import SHIPPED_PROMPTS_PATH
    from producers.parse import parse_prompt
    from producers.rows import read_rows
    from trainer import weights
    from trainer.learners import grpo, ppo, sft
    from trainer.learners.rollouts import Rollout

    hardware = weights.Hardware(precision="fp32")
    shipped = read_rows(str(SHIPPED_PROMPTS_PATH), 1, _NUM_PROMPTS)
    messages = [tuple(parse_prompt(row, source="", max_chars=10**6).messages) for _, row in shipped]
    model = LocalModel(folder, threads=1, dtype=torch.float32)
    requests = [GenerationRequest(prompt, seed=n) for n, prompt in enumerate(messages)]
    groups = require_results(model.generate(requests, num_completions=_NUM_COMPLETIONS, max_tokens=_MAX_TOKENS))
    del model
    sampled = [(n, generation) for n, group in enumerate(groups) for generation in group]
    rollouts = [
        Rollout(tuple(g.prompt_token_ids), tuple(g.token_ids), tuple(g.logprobs), g.finish_reason == "stop", 0, str(n))
        for n, g in sampled
    ]
    rewards = [compute_reward(list(rollout.token_ids)) for rollout in rollouts]

    examples = [sft.SftExample(messages[n], g.text, True, f"{n}-{i}") for i, (n, g) in enumerate(sampled)]
    rate, size = settings.sft.learning_rate, settings.sft.batch_size
    trained, _, _ = sft.train(folder, examples, learning_rate=rate, batch_size=size, hardware=hardware)
    yield "SFT", -(-len(examples) // size), rate, trained
    del trained
    grpo_config = grpo.GRPOConfig(max_completion_length=_MAX_TOKENS)
    policy, _ = grpo.train(folder, folder, rollouts, rewards, grpo_config, hardware=hardware)
    yield "GRPO", -(-len(rollouts) // grpo_config.batch_size), grpo_config.learning_rate, policy.policy
    del policy
    ppo_config = ppo.PPOConfig()
    policy, metrics = ppo.train(folder, folder, rollouts, rewards, ppo_config, hardware=hardware)
    print(f"(PPO stopped early: {metrics['stopped_early']:.0f})")
    num_steps = ppo_config.epochs * -(-len(rollouts) // ppo_config.batch_size)
    yield "PPO", num_steps, ppo_config.learning_rate, policy.policy


if __name__ == "__main__":
    main()
