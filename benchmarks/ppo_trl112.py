"""trl 1.12's side of `benchmarks.ppo`: its PPOTrainer on the same task, timed around its own sampling.

Run by `benchmarks.ppo` with a path on which trl is 1.12: that is why this file imports nothing of the trainer.
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

from benchmarks.ppo import LETTER, SCALE, Moment, Round, Task, between, now
from engine.models.chat import prompt_ids
from schemas.records import ChatMessage


class LetterShare(torch.nn.Module):
    """A reward model in trl's form whose score is the share of one letter in the answer; padding stands for 0."""

    base_model_prefix = "trunk"

    def __init__(self, letter: int, prompt_length: int) -> None:
        super().__init__()
        self.letter, self.prompt_length = letter, prompt_length
        self.trunk, self.score = self.hidden, torch.nn.Identity()

    def hidden(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **_: Any) -> Any:
        answer = input_ids[:, self.prompt_length :]
        counted = (answer == self.letter).float().cumsum(1) / torch.arange(1, answer.shape[1] + 1)
        states = torch.zeros(input_ids.shape, dtype=torch.float32)
        states[:, self.prompt_length :] = SCALE * counted
        return type("Output", (), {"hidden_states": (states[..., None],)})


class Timed:
    """trl's sampling, with a clock: when it began, when it ended, and how many tokens it gave."""

    def __init__(self, sample: Any, end: int) -> None:
        self.sample, self.end = sample, end
        self.began: list[Moment] = []
        self.ended: list[Moment] = []
        self.tokens: list[int] = []

    def __call__(self, model: Any, queries: torch.Tensor, *more: Any) -> Any:
        self.began.append(now())
        result = self.sample(model, queries, *more)
        self.ended.append(now())
        answers = result[0][:, queries.shape[1] :]
        self.tokens.append(sum(row.index(self.end) + 1 if self.end in row else len(row) for row in answers.tolist()))
        return result


class Rewards(TrainerCallback):
    def __init__(self) -> None:
        self.means: list[float] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if "objective/scores" in logs:
            self.means.append(logs["objective/scores"])


def trl(task: Task) -> list[Round]:
    """trl's rounds."""
    from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

    # Its accelerator is one of its own, which `bf16=True` does not reach since transformers 5.
    os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16" if task.precision == "bf16" else "no"
    torch.set_num_threads(2)
    torch.manual_seed(task.seed)
    tokenizer = AutoTokenizer.from_pretrained(task.policy, padding_side="left")
    # Its pad token must be none that answers have: SmolLM2's is the end token, and trl cuts masks at `== pad`.
    tokenizer.pad_token_id = 0
    policy, reference = (AutoModelForCausalLM.from_pretrained(task.policy, dtype=torch.float32) for _ in range(2))
    policy.generation_config.pad_token_id = 0
    value = AutoModelForSequenceClassification.from_pretrained(task.reward or task.policy, num_labels=1, dtype=torch.float32)
    if not task.reward:
        torch.nn.init.zeros_(value.score.weight)
    prompts = [prompt_ids(tokenizer, (ChatMessage(role="user", content=text),)) for text in task.prompts]
    if task.reward:
        reward: Any = AutoModelForSequenceClassification.from_pretrained(task.reward, num_labels=1, dtype=torch.float32)
    else:
        reward = LetterShare(tokenizer.convert_tokens_to_ids(LETTER), len(prompts[0]))
    rewards, timed = Rewards(), Timed(ppo_trainer.batch_generation, tokenizer.eos_token_id)
    ppo_trainer.batch_generation = timed
    with tempfile.TemporaryDirectory() as output:
        config = PPOConfig(
            output_dir=output,
            learning_rate=task.learning_rate,
            lr_scheduler_type="constant",
            per_device_train_batch_size=len(prompts),
            gradient_accumulation_steps=1,
            num_mini_batches=len(prompts) // task.minibatch,
            num_ppo_epochs=task.epochs,
            total_episodes=len(prompts) * task.rounds,
            response_length=task.tokens,
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
        except RuntimeError as error:  # a policy that has run away cannot be sampled from: the rounds before it count
            print(f"trl 1.12 ends after {len(rewards.means)} of {task.rounds} rounds: {error}", file=sys.stderr, flush=True)
    ends = [*timed.began[1:], now()]
    rounds = []
    for began, ended, end, tokens, mean in zip(timed.began, timed.ended, ends, timed.tokens, rewards.means, strict=False):
        (generate_s, generate_cpu_s), (update_s, update_cpu_s) = between(began, ended), between(ended, end)
        rounds.append(Round(generate_s, update_s, generate_cpu_s, update_cpu_s, tokens, mean))
    return rounds


if __name__ == "__main__":
    task = json.loads(sys.argv[sys.argv.index("--task") + 1])
    print(json.dumps([asdict(r) for r in trl(Task(**task | {"prompts": tuple(task["prompts"])}))]))
