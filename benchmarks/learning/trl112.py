"""Run trl 1.12's PPOTrainer on the task of `benchmarks.learning`, to compare its stability with the stability of Charter's PPO.

    python -m benchmarks.learning --arm judge --arm trl112 --trl112 DIR    (pip install --no-deps --target DIR trl==1.12.0)

A run starts from policy 1 of the judge's run with the same seed. Both runs make the same number of updates. In both runs, an
update has the same number of prompts and completions. The minibatch size, the epochs, the peak learning rate and the KL
coefficient are also the same. All other settings are trl's defaults. The learning rate therefore decreases linearly over all
updates. A separate value model starts from the reward model. The reward model is the last reward model of the judge's run,
which was trained on the most labels. The reward model is not updated. Its scores are scaled to a standard deviation of 1, as in
Charter. PPOTrainer samples its own completions, so the target rate of a version is measured on the batch that this version
sampled. The last version responds to new prompts after training, with the stream's sampling.

This file runs in a process whose path contains trl 1.12. The file must not import the trainer package, because the trainer
package needs another version of trl. The file prints the responses as JSON.
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

_PAD_TOKEN = "<|system|>"  # this token does not occur in responses; for trl, a response ends at the first padding token


@dataclass(frozen=True)
class _TrlTask:
    """`prompts` holds the prompts of all updates. Each prompt occurs once and gets `num_completions` completions.

    The last policy is saved in `folder`.
    """

    policy: str
    reward: str
    folder: str
    prompts: tuple[str, ...]
    updates: int
    num_completions: int
    mini_batch_size: int
    epochs: int
    max_tokens: int
    learning_rate: float
    beta: float
    seed: int
    threads: int


class _RecordingSampler:
    """This wrapper of trl's sampling function stores the sampled batches."""

    def __init__(self, sample: Any) -> None:
        self.sample = sample
        self.batches: list[tuple[torch.Tensor, torch.Tensor]] = []

    def __call__(self, model: Any, queries: torch.Tensor, *more: Any) -> Any:
        result = self.sample(model, queries, *more)
        self.batches.append((queries, result[0][:, queries.shape[1] :]))
        return result


class _KLCallback(TrainerCallback):
    """Collect trl's own estimate of KL(policy || reference) for each sampled batch, in nats per completion."""

    def __init__(self) -> None:
        self.kls: list[float] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if "objective/kl" in logs:
            self.kls.append(logs["objective/kl"])


def _train(task: _TrlTask) -> dict[str, Any]:
    """Train. Return the responses of every version except the last version, and the KL of each version."""
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
    prompts = [encode_prompt(tokenizer, (ChatMessage(role="user", content=text),)) for text in task.prompts]
    rows = [ids for ids in prompts for _ in range(task.num_completions)]
    batch_size = len(rows) // task.updates
    sampler, kl_callback = _RecordingSampler(ppo_trainer.batch_generation), _KLCallback()
    ppo_trainer.batch_generation = sampler
    with tempfile.TemporaryDirectory() as output:
        config = PPOConfig(
            output_dir=output,
            learning_rate=task.learning_rate,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=1,
            num_mini_batches=batch_size // task.mini_batch_size,
            num_ppo_epochs=task.epochs,
            total_episodes=len(rows),
            response_length=task.max_tokens,
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
            callbacks=[kl_callback],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        trainer.model.policy.save_pretrained(task.folder)
    AutoTokenizer.from_pretrained(task.policy).save_pretrained(task.folder)
    responses = [
        {"version": number, "question": question, "text": text}
        for number, (queries, tokens) in enumerate(sampler.batches)
        for question, text in zip(_decode_rows(tokenizer, queries), _decode_rows(tokenizer, tokens), strict=True)
    ]
    return {"responses": responses, "kls": kl_callback.kls}


def _decode_rows(tokenizer: Any, rows: torch.Tensor) -> list[str]:
    """Decode each row up to its end token, without padding and special tokens."""
    end, texts = tokenizer.eos_token_id, []
    for row in rows.tolist():
        ids = [token for token in row if token != tokenizer.pad_token_id]
        while ids and ids[0] == end:
            ids = ids[1:]
        texts.append(tokenizer.decode(ids[: ids.index(end)] if end in ids else ids, skip_special_tokens=True).strip())
    return texts


if __name__ == "__main__":
    arguments = json.loads(Path(sys.argv[1]).read_text())
    print(json.dumps(_train(_TrlTask(**arguments | {"prompts": tuple(arguments["prompts"])}))))
