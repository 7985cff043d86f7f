"""Run the PPOTrainer of trl 1.12 on the task of `benchmarks.ppo`, and measure the time of its sampling and of its updates.

`benchmarks.ppo` runs this file with trl 1.12 on the Python path. Charter's trainer requires a newer version of trl, so this
file does not import the trainer.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from dataclasses import asdict
from typing import Any

import torch
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PrinterCallback,
    TrainerCallback,
)

from benchmarks.ppo import REWARD_SCALE, REWARDED_LETTER, ClockReading, PPOTask, RoundTiming, compute_elapsed, read_clocks
from engine.models.chat_template import encode_prompt
from schemas.records import ChatMessage


class _LetterRewardModel(torch.nn.Module):
    """This reward model has the interface that trl expects. The score is the fraction of one letter in the response.

    Padding counts as another letter.
    """

    base_model_prefix = "trunk"

    def __init__(self, letter_token_id: int, prompt_length: int) -> None:
        super().__init__()
        self.letter_token_id, self.prompt_length = letter_token_id, prompt_length
        self.trunk, self.score = self.compute_hidden_states, torch.nn.Identity()

    def compute_hidden_states(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **_: Any) -> Any:
        response = input_ids[:, self.prompt_length :]
        fractions = (response == self.letter_token_id).float().cumsum(1) / torch.arange(1, response.shape[1] + 1)
        states = torch.zeros(input_ids.shape, dtype=torch.float32)
        states[:, self.prompt_length :] = REWARD_SCALE * fractions
        return type("Output", (), {"hidden_states": (states[..., None],)})


class _TimedSampler:
    """This wrapper of trl's sampling function records start times, end times and the number of sampled tokens."""

    def __init__(self, sample: Any, eos_token_id: int) -> None:
        self.sample, self.eos_token_id = sample, eos_token_id
        self.start_times: list[ClockReading] = []
        self.end_times: list[ClockReading] = []
        self.token_counts: list[int] = []

    def __call__(self, model: Any, queries: torch.Tensor, *more: Any) -> Any:
        self.start_times.append(read_clocks())
        result = self.sample(model, queries, *more)
        self.end_times.append(read_clocks())
        responses = result[0][:, queries.shape[1] :]
        self.token_counts.append(
            sum(row.index(self.eos_token_id) + 1 if self.eos_token_id in row else len(row) for row in responses.tolist())
        )
        return result


class _RewardCallback(TrainerCallback):
    def __init__(self) -> None:
        self.mean_rewards: list[float] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if "objective/scores" in logs:
            self.mean_rewards.append(logs["objective/scores"])


def _run_trl(task: PPOTask) -> list[RoundTiming]:
    """Run trl's rounds."""
    from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

    # trl creates a separate accelerator, which `bf16=True` does not configure since transformers 5.
    os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16" if task.precision == "bf16" else "no"
    torch.set_num_threads(2)
    torch.manual_seed(task.seed)
    tokenizer = AutoTokenizer.from_pretrained(task.policy, padding_side="left")
    # trl masks every token that is equal to the pad token, so the pad token must not occur in responses. The pad token of
    # SmolLM2 is its end token, so another token is used.
    tokenizer.pad_token_id = 0
    policy, reference = (AutoModelForCausalLM.from_pretrained(task.policy, dtype=torch.float32) for _ in range(2))
    policy.generation_config.pad_token_id = 0
    value = AutoModelForSequenceClassification.from_pretrained(
        task.reward_model or task.policy, num_labels=1, dtype=torch.float32
    )
    if not task.reward_model:
        torch.nn.init.zeros_(value.score.weight)
    prompts = [encode_prompt(tokenizer, (ChatMessage(role="user", content=text),)) for text in task.prompts]
    if task.reward_model:
        reward: Any = AutoModelForSequenceClassification.from_pretrained(task.reward_model, num_labels=1, dtype=torch.float32)
    else:
        reward = _LetterRewardModel(tokenizer.convert_tokens_to_ids(REWARDED_LETTER), len(prompts[0]))
    rewards, sampler = _RewardCallback(), _TimedSampler(ppo_trainer.batch_generation, tokenizer.eos_token_id)
    ppo_trainer.batch_generation = sampler
    with tempfile.TemporaryDirectory() as output:
        config = PPOConfig(
            output_dir=output,
            learning_rate=task.learning_rate,
            lr_scheduler_type="constant",
            per_device_train_batch_size=len(prompts),
            gradient_accumulation_steps=1,
            num_mini_batches=len(prompts) // task.minibatch_size,
            num_ppo_epochs=task.num_epochs,
            total_episodes=len(prompts) * task.num_rounds,
            response_length=task.max_tokens,
            stop_token="eos",
            temperature=1.0,
            kl_coef=task.beta,
            missing_eos_penalty=None,
            num_sample_generations=0,
            bf16=task.precision == "bf16",
            gradient_checkpointing=False,
            use_cpu=not torch.cuda.is_available(),
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            seed=task.seed,
        )
        trainer = PPOTrainer(
            args=config,
            processing_class=tokenizer,
            model=policy,
            ref_model=reference,
            reward_model=reward,
            value_model=value,
            train_dataset=Dataset.from_dict({"input_ids": prompts}),
            eval_dataset=Dataset.from_dict({"input_ids": prompts[:1]}),
            callbacks=[rewards],
        )
        trainer.remove_callback(PrinterCallback)
        try:
            trainer.train()
        except RuntimeError as error:  # if the policy has diverged, sampling fails; the rounds before the failure are used
            print(
                f"trl 1.12 ends after {len(rewards.mean_rewards)} of {task.num_rounds} rounds: {error}",
                file=sys.stderr,
                flush=True,
            )
    # An update ends when the next sampling begins.
    update_ends = [*sampler.start_times[1:], read_clocks()]
    rounds = []
    for started, sampled, updated, num_tokens, mean_reward in zip(
        sampler.start_times, sampler.end_times, update_ends, sampler.token_counts, rewards.mean_rewards, strict=False
    ):
        generate_s, generate_cpu_s = compute_elapsed(started, sampled)
        update_s, update_cpu_s = compute_elapsed(sampled, updated)
        rounds.append(RoundTiming(generate_s, update_s, generate_cpu_s, update_cpu_s, num_tokens, mean_reward))
    return rounds


if __name__ == "__main__":
    task = json.loads(sys.argv[sys.argv.index("--task") + 1])
    print(json.dumps([asdict(r) for r in _run_trl(PPOTask(**task | {"prompts": tuple(task["prompts"])}))]))
