"""trl 1.12's PPOTrainer on the toy of `benchmarks.learning`, the yardstick of its stability.

    python -m benchmarks.learning --arm judge --arm trl112 --trl112 DIR    (pip install --no-deps --target DIR trl==1.12.0)

It starts from policy 1 of the judge's run with the same seed, and makes as many updates, each of as many answers to as many new
prompts, with the same minibatches, epochs, peak learning rate and KL weight; its own defaults else (a rate that falls linearly
over all updates, a value model of its own that starts as the reward model). Its reward model is the last one of that run, which
has learned the most labels, and stays; its scores have deviation 1, as in Charter. It samples its own answers, so the rate of a
version is that of the batch that it samples with that version; the last version answers new prompts at the end, sampled as the
stream does.

Run in a process whose path has trl 1.12: that is why this file imports nothing of the trainer. It prints the answers as JSON.
"""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
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

from engine.models.chat_template import encode_prompt
from schemas.records import ChatMessage

_PAD_TOKEN = "<|system|>"  # a token that no answer has: trl finds the end of an answer at the first padding


@dataclass(frozen=True)
class _TrlTask:
    """`prompts` are those of all updates, each once; every one is answered `samples` times. `folder` is for the last policy."""

    policy: str
    reward: str
    folder: str
    prompts: tuple[str, ...]
    updates: int
    samples: int
    minibatch: int
    epochs: int
    tokens: int
    learning_rate: float
    beta: float
    seed: int
    threads: int


class _RecordingSampler:
    """trl's sampling, which keeps what it gives back."""

    def __init__(self, sample: Any) -> None:
        self.sample = sample
        self.batches: list[tuple[torch.Tensor, torch.Tensor]] = []

    def __call__(self, model: Any, queries: torch.Tensor, *more: Any) -> Any:
        result = self.sample(model, queries, *more)
        self.batches.append((queries, result[0][:, queries.shape[1] :]))
        return result


class _KLCallback(TrainerCallback):
    """trl's own figure of KL(policy || reference) of each batch that it samples, nats per answer."""

    def __init__(self) -> None:
        self.kls: list[float] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if "objective/kl" in logs:
            self.kls.append(logs["objective/kl"])


def _train(task: _TrlTask) -> dict[str, Any]:
    """The answers of every version but the last, the KL of each, and why training ended before its time, if it did."""
    from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

    torch.set_num_threads(task.threads)
    torch.manual_seed(task.seed)
    tokenizer = AutoTokenizer.from_pretrained(task.policy, padding_side="left")
    tokenizer.pad_token = _PAD_TOKEN
    policy, reference = (AutoModelForCausalLM.from_pretrained(task.policy, dtype=torch.float32) for _ in range(2))
    policy.generation_config.pad_token_id = tokenizer.pad_token_id
    reward, value = (
        AutoModelForSequenceClassification.from_pretrained(task.reward, num_labels=1, dtype=torch.float32) for _ in range(2)
    )
    deviation = json.loads((Path(task.reward) / "reward.json").read_text())["deviation"]
    for scorer in (reward, value):
        scorer.score.weight.data /= deviation
    asked = [encode_prompt(tokenizer, (ChatMessage(role="user", content=text),)) for text in task.prompts]
    rows = [ids for ids in asked for _ in range(task.samples)]
    batch = len(rows) // task.updates
    sampled, divergences = _RecordingSampler(ppo_trainer.batch_generation), _KLCallback()
    ppo_trainer.batch_generation = sampled
    with tempfile.TemporaryDirectory() as output:
        config = PPOConfig(
            output_dir=output,
            learning_rate=task.learning_rate,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=1,
            num_mini_batches=batch // task.minibatch,
            num_ppo_epochs=task.epochs,
            total_episodes=len(rows),
            response_length=task.tokens,
            stop_token="eos",
            temperature=1.0,
            kl_coef=task.beta,
            missing_eos_penalty=None,
            num_sample_generations=0,
            bf16=False,
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
            train_dataset=Dataset.from_dict({"input_ids": rows}),
            eval_dataset=Dataset.from_dict({"input_ids": rows[:1]}),
            callbacks=[divergences],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        trainer.model.policy.save_pretrained(task.folder)
    AutoTokenizer.from_pretrained(task.policy).save_pretrained(task.folder)
    answers = [
        {"version": number, "question": question, "text": text}
        for number, (queries, responses) in enumerate(sampled.batches)
        for question, text in zip(_decode_responses(tokenizer, queries), _decode_responses(tokenizer, responses), strict=True)
    ]
    return {"answers": answers, "kls": divergences.kls}


def _decode_responses(tokenizer: Any, rows: torch.Tensor) -> list[str]:
    """Each row up to its end token, without what marks messages."""
    end, made = tokenizer.eos_token_id, []
    for row in rows.tolist():
        kept = [token for token in row if token != tokenizer.pad_token_id]
        while kept and kept[0] == end:
            kept = kept[1:]
        made.append(tokenizer.decode(kept[: kept.index(end)] if end in kept else kept, skip_special_tokens=True).strip())
    return made


if __name__ == "__main__":
    given = json.loads(Path(sys.argv[1]).read_text())
    print(json.dumps(_train(_TrlTask(**given | {"prompts": tuple(given["prompts"])}))))
