"""Train the policy with DPO, the alternative to PPO.

DPO uses the labels directly. DPO works without a reward model and without rollouts.

Let d = (log pi(a) - log ref(a)) - (log pi(b) - log ref(b)), where each log-probability is summed over the response's tokens.
Let p be the judge's probability that a is better. The loss is

    -[p log s(beta d) + (1 - p) log s(-beta d)]

For p = 1 this is DPO (Rafailov et al. 2023, eq. 7). For 0 < p < 1 the minimum is at s(beta d) = p, as in the reward model. The
minimum is not at infinity. If the judge is undecided (p = 0.5), the minimum is at d = 0, so the policy does not change. If the
label of an undecided judge were rounded to 0 or 1, it would change the policy as much as the label of a judge who is certain.
trl's `label_smoothing` is the same loss, but all pairs share one p. Here each pair has its own p.

The reference is the policy of the last supervised phase, as in PPO. Its log-probabilities are computed before the first step.
With LoRA, they are computed by the policy with its adapter disabled. Without LoRA, the reference is loaded next to the policy
for this computation and is then released. DPO holds out the same prompts as the reward model. The metrics of the held-out
prompts are named `held_out/...`.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from trl import DPOConfig, DPOTrainer
from trl.trainer import dpo_trainer
from trl.trainer.dpo_trainer import DataCollatorForPreference

from engine.models.chat_template import encode_completion, encode_prompt
from trainer import hf, sharding, weights
from trainer.learners.reward import PreferenceExample, compute_soft_label_loss, require_two_sided_labels, split_held_out

# trl hashes all weights to find the log-probabilities of the reference in its cache, which Charter does not use. It cannot hash
# sharded weights.
dpo_trainer.hash_module = lambda model: ""


class _SoftLabelDPOTrainer(DPOTrainer):
    """This class is trl's DPOTrainer for rows that are already encoded and have soft labels."""

    def _prepare_dataset(self, dataset: Any, *arguments: Any) -> Any:
        return dataset

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = ["prompt_ids", "chosen_ids", "rejected_ids", "ref_chosen_logps", "ref_rejected_logps", "p_a"]

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
        """Add the log-probabilities of the reference to the rows.

        This method replaces trl's method. trl caches the log-probabilities in files that the processes do not share.
        """
        # If the policy already has an adapter, trl uses a copy of the adapter as the reference. Here the reference is the model
        # without an adapter, so the copy is deleted.
        if weights.has_adapter(self.model) and "ref" in self.model.peft_config:
            self.model.delete_adapter("ref")
        model = self.ref_model or self.model
        chosen, rejected = list[float](), list[float]()
        for start in range(0, len(dataset), batch_size):
            inputs = self.data_collator([dataset[i] for i in range(start, min(start + batch_size, len(dataset)))])
            inputs = {key: value.to(model.device) for key, value in inputs.items() if key != "p_a"}
            for column, logps in zip((chosen, rejected), self.compute_ref_log_probs(model, inputs), strict=True):
                column.extend(logps.float().tolist())
        sharding.release_gathered_weights(model)
        return dataset.add_column("ref_chosen_logps", chosen).add_column("ref_rejected_logps", rejected)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        chosen, rejected = self.compute_response_logprobs(model, inputs)
        r_a = self.beta * (chosen - inputs["ref_chosen_logps"])
        r_b = self.beta * (rejected - inputs["ref_rejected_logps"])
        p_a = inputs["p_a"]
        loss = compute_soft_label_loss(r_a, r_b, p_a, 0.0)
        metrics = self._metrics["train" if self.model.training else "eval"]
        with torch.no_grad():
            preferred = torch.sign(p_a - 0.5)
            decided = preferred != 0
            if decided.any():
                metrics["rewards/accuracies"].append((((r_a - r_b) * preferred)[decided] > 0).float().mean().item())
            metrics["rewards/margins"].append(((r_a - r_b) * preferred).mean().item())
            metrics["logps/chosen"].append(chosen.mean().item())
            metrics["logps/rejected"].append(rejected.mean().item())
        return (loss, {}) if return_outputs else loss

    @staticmethod
    def compute_response_logprobs(model: Any, inputs: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return two tensors of shape (B,): the summed log-probabilities of the two responses."""
        mask = inputs["completion_mask"]
        outputs = model(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            labels=inputs["input_ids"].masked_fill(mask == 0, -100),
            use_cache=False,
            fused_lm_head=True,
        )
        chosen, rejected = outputs.log_probs[:, -(mask.shape[1] - 1) :].sum(1).chunk(2)
        return chosen, rejected


class _SoftLabelCollator(DataCollatorForPreference):
    """This class extends trl's collator. This collator also collects the soft labels."""

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch: dict[str, Any] = super().torch_call(examples)
        return batch | {"p_a": torch.tensor([example["p_a"] for example in examples])}


def encode_pair(tokenizer: Any, example: PreferenceExample, max_length: int) -> dict[str, Any]:
    """Return the token ids of the prompt and of both responses.

    A long prompt is truncated at the beginning. A long response is truncated at the end.
    """
    a = encode_completion(tokenizer, example.response_a, ends_with_eos=example.ends_with_eos_a)
    b = encode_completion(tokenizer, example.response_b, ends_with_eos=example.ends_with_eos_b)
    max_prompt_length = max(1, max_length - max(len(a), len(b)))
    prompt = encode_prompt(tokenizer, example.messages)[-max_prompt_length:]
    max_response_length = max_length - len(prompt)
    a, b = a[:max_response_length], b[:max_response_length]
    return {"prompt_ids": prompt, "chosen_ids": a, "rejected_ids": b, "p_a": example.p_a}


def train(
    policy_folder: Path,
    reference_folder: Path,
    examples: Sequence[PreferenceExample],
    *,
    learning_rate: float,
    epochs: int = 1,
    batch_size: int = 8,
    beta: float = 0.1,
    lora_rank: int = 0,
    max_length: int = 1024,
    hardware: weights.Hardware = weights.DEFAULT_HARDWARE,
    seed: int = 0,
    on_step: hf.StepCallback = hf.ignore_step,
) -> tuple[Callable[[Path], None], dict[str, float]]:
    """Make one DPO update of the policy. Return a function that saves the policy, and the metrics.

    Raise OneSidedLabels when all labels prefer the same position, TrainingFailed when a metric is not finite, and UsageError
    when policy and reference do not have the same architecture and tokenizer.
    """
    weights.require_compatible_models(policy_folder, reference_folder, "the reference policy")
    require_two_sided_labels(examples)
    train_examples, held_out = split_held_out(examples)
    tokenizer = weights.load_tokenizer(policy_folder)
    torch.manual_seed(seed)  # initializes the LoRA matrices
    model, disabled_is_reference = weights.load_policy_for_rl(policy_folder, reference_folder, lora_rank, hardware)
    reference = None if disabled_is_reference or policy_folder == reference_folder else weights.load_policy(reference_folder)
    with tempfile.TemporaryDirectory() as output:
        config = DPOConfig(
            **hf.build_training_arguments(
                output,
                learning_rate=learning_rate * (weights.LORA_LEARNING_RATE_FACTOR if lora_rank else 1.0),
                epochs=epochs,
                batch_size=batch_size,
                seed=seed,
                max_length=max_length,
                hardware=hardware,
                texts_per_row=2,
            ),
            beta=beta,
            precompute_ref_log_probs=True,
        )
        trainer = _SoftLabelDPOTrainer(
            model=model,
            ref_model=reference,
            args=config,
            train_dataset=_build_dataset(tokenizer, train_examples, max_length),
            eval_dataset=_build_dataset(tokenizer, held_out, max_length) if held_out else None,
            processing_class=tokenizer,
            data_collator=_SoftLabelCollator(pad_token_id=tokenizer.eos_token_id, max_length=max_length),
        )
        trainer.ref_model = reference = None
        metrics = hf.run_trainer(trainer, on_step)
        metrics |= _evaluate_held_out(trainer) if held_out else {}
    policy = weights.gather_model(trainer.model)
    save = weights.make_rl_saver(policy, tokenizer, None, reference_folder if disabled_is_reference else None)
    return save, metrics | {"examples": float(len(train_examples)), "held_out": float(len(held_out))}


def _build_dataset(tokenizer: Any, examples: Sequence[PreferenceExample], max_length: int) -> Any:
    return hf.make_dataset([encode_pair(tokenizer, example, max_length) for example in examples])


def _evaluate_held_out(trainer: Any) -> dict[str, float]:
    """Return the loss, the accuracy and the margin on the held-out labels."""
    metrics = trainer.evaluate()
    names = {"loss": "eval_loss", "accuracy": "eval_rewards/accuracies", "margin": "eval_rewards/margins"}
    return {f"held_out/{name}": float(metrics[key]) for name, key in names.items() if key in metrics}
