"""Train the policy with RLOO on groups of completions that the stream has sampled and rewarded. Read from top to bottom.

    minimize   E[ -min(R A, clip(R, 1-e, 1+e) A) ]

Here R = pi(completion) / pi_old(completion) is the ratio of whole completions, and pi_old is the policy at the start of the
update. The advantage A of a completion is its reward minus the mean reward of the other completions of its group, which consists
of the completions of one prompt (REINFORCE leave-one-out: Kool et al. 2019; Ahmadian et al. 2024, "Back to Basics", section 3).
The reward includes the KL: reward - beta * (log pi_old - log pi_ref), summed over the tokens (k1). There is no value model.
`policy_math.py` has the formulas.

The implementation differs from the papers in the following points, for these reasons:

 1. The papers make one step per sample and have no ratio. Here an update makes several steps, so the ratio is clipped, as in
    TRL's RLOOTrainer. A whole completion is one action, so one ratio and one clip apply to it.
 2. This file does not sample. A rollout may be a few policy versions old. Each completion is weighted with
    min(pi_old / pi_behavior, 2), where pi_behavior sampled the completion (truncated importance sampling).
 3. A completion without a readable reward is not part of its group: it is not trained, and the baseline does not use it.
 4. beta adapts to a KL target, once per update, as in PPO. beta never falls below the setting `rloo.beta`.
 5. If a KL is above its limit before a step, the step is not made and the update ends, as in PPO. If the KL to the reference or
    to the base model is above its limit at the start, the update is rejected.
 6. An update in which all groups have equal rewards is rejected. Groups with equal rewards in other updates are counted
    (`equal_groups`). They stay in the mean, as in TRL, so that the step is smaller if fewer groups teach something.
"""

from __future__ import annotations

import logging
import math
import random
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from trainer import distributed, sharding, weights
from trainer.hf import StepCallback, compute_learning_rate_factor, ignore_step, require_finite
from trainer.learners.policy_math import (
    adapt_beta,
    compute_clipped_policy_loss,
    compute_importance_weights,
    compute_leave_one_out_advantages,
    count_equal_groups,
    estimate_policy_kl,
    estimate_update_kl,
    find_exceeded_limit,
    find_groups,
    kl_k1,
    kl_k3,
    require_comparable_groups,
    require_within_kl_limits,
)
from trainer.learners.rollouts import (
    PolicyModel,
    RLModels,
    Rollout,
    TrainedPolicy,
    load_rl_models,
    make_token_mask,
    pad_behavior_logprobs,
)
from trainer.weights import Hardware

logger = logging.getLogger("charter.trainer")
_MAX_GRAD_NORM = 1.0
_KL_WINDOW = 64  # kl_update is averaged over this number of rollouts, because the mean of fewer than 64 is too noisy


@dataclass(frozen=True)
class RLOOConfig:
    """These are the settings `rloo.*` of an update."""

    learning_rate: float = 1e-6
    lr_scheduler_type: Literal["linear", "constant"] = "linear"
    warmup_ratio: float = 0.15
    epochs: int = 1
    batch_size: int = 64
    clip: float = 0.2
    beta: float = 0.05
    kl_target: float = 6.0
    max_kl_update: float = 6.0
    max_kl: float = 30.0
    max_kl_base: float = 200.0


# The loss. Log-probabilities of tokens have shape (B, T), masks are 1 on real tokens, and all other tensors have shape (B,).


def compute_sequence_loss(
    logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    mask: torch.Tensor,
    advantages: torch.Tensor,
    importance_weights: torch.Tensor,
    clip: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the clipped loss of each completion, and a tensor that is 1.0 where the clip applies."""
    new, old = (logprobs * mask).sum(-1), (old_logprobs * mask).sum(-1)
    return compute_clipped_policy_loss(new, old, advantages, importance_weights, clip)


def compute_penalized_rewards(
    rewards: torch.Tensor, old_logprobs: torch.Tensor, ref_logprobs: torch.Tensor, mask: torch.Tensor, beta: float
) -> torch.Tensor:
    """Return the rewards minus beta times the KL to the reference (k1, summed over the tokens)."""
    return rewards - beta * (kl_k1(old_logprobs, ref_logprobs) * mask).sum(-1)


# One update


def train(
    policy_folder: Path,
    reference_folder: Path,
    rollouts: Sequence[Rollout],
    rewards: Sequence[float],
    config: RLOOConfig,
    *,
    base_folder: Path | None = None,
    lora_rank: int = 0,
    hardware: Hardware = weights.DEFAULT_HARDWARE,
    seed: int = 0,
    on_step: StepCallback = ignore_step,
) -> tuple[TrainedPolicy, dict[str, float]]:
    """Make one RLOO update. Return the policy and the metrics.

    `rewards` has one entry per rollout. Rollouts with the same `record_id` form a group, and each group has at least two rollouts.
    If `base_folder` is None, the KL to the base model is not computed. The metrics are means over the last epoch. `stopped_early`
    is 1 if a KL limit ended the update. Raise TrainingFailed when a metric is not finite, when the rewards of every group are
    equal, or when a KL limit is exceeded at the start. Raise UsageError when the models do not have the same architecture and
    tokenizer.
    """
    torch.manual_seed(seed)
    weights.require_compatible_models(policy_folder, reference_folder, "the reference policy")
    groups = [r.record_id for r in rollouts]
    reward_values = torch.tensor(list(rewards), dtype=torch.float32)
    require_comparable_groups(reward_values, groups, "RLOO")

    models = load_rl_models(
        policy_folder, reference_folder, base_folder, rollouts, lora_rank=lora_rank, hardware=hardware, title="RLOO"
    )
    batch = prepare_batch(rollouts, reward_values, groups, models, config)
    kl_ref = _compute_sequence_kl(batch, batch.ref_logprobs)
    kl_base = 0.0 if batch.base_logprobs is None else _compute_sequence_kl(batch, batch.base_logprobs)
    require_within_kl_limits({"kl_ref": kl_ref, "kl_base": kl_base}, config, "rloo")
    metrics = _optimize_policy(models.model, rollouts, batch, config, seed, lora_rank, on_step)
    metrics |= {
        "beta": adapt_beta(config.beta, kl_ref, config.kl_target),
        "kl_rollouts": kl_ref,
        "reward_mean": float(reward_values.mean()),
        "advantage_std": float(batch.advantages.std(correction=0)),
        "groups": float(len(find_groups(groups))),
        "equal_groups": float(count_equal_groups(reward_values, groups)),
        "rollouts": float(len(rollouts)),
        "truncated_fraction": sum(not r.ends_with_eos for r in rollouts) / len(rollouts),
        "importance_mean": float(batch.importance_weights.mean()),
        "completion_tokens": float(batch.mask.sum()),
    }
    tokenizer = weights.load_tokenizer(policy_folder)
    policy = weights.gather_model(models.model.policy)
    save = weights.make_rl_saver(policy, tokenizer, None, reference_folder if models.disabled_is_reference else None)
    return TrainedPolicy(policy, tokenizer, save), metrics


@dataclass(frozen=True)
class _RLOOBatch:
    """These values do not change during an update.

    `advantages` and `importance_weights` have shape (N,), and all other tensors have shape (N, T).
    """

    old_logprobs: torch.Tensor
    ref_logprobs: torch.Tensor
    base_logprobs: torch.Tensor | None
    importance_weights: torch.Tensor
    advantages: torch.Tensor
    mask: torch.Tensor


def prepare_batch(
    rollouts: Sequence[Rollout], rewards: torch.Tensor, groups: Sequence[str], models: RLModels, config: RLOOConfig
) -> _RLOOBatch:
    """Compute the advantages and the importance weights of an update. `rewards` has shape (N,)."""
    old_logprobs, ref_logprobs = models.old_logprobs, models.ref_logprobs
    mask = make_token_mask(rollouts, old_logprobs)
    log_weights = ((old_logprobs - pad_behavior_logprobs(rollouts, old_logprobs)) * mask).sum(-1, keepdim=True)
    importance_weights = compute_importance_weights(log_weights, torch.zeros_like(log_weights), torch.ones_like(log_weights))
    penalized = compute_penalized_rewards(rewards.to(mask.device), old_logprobs, ref_logprobs, mask, config.beta)
    advantages = compute_leave_one_out_advantages(penalized, groups)
    return _RLOOBatch(old_logprobs, ref_logprobs, models.base_logprobs, importance_weights[:, 0], advantages, mask)


def _compute_sequence_kl(batch: _RLOOBatch, other_logprobs: torch.Tensor) -> float:
    """Return the estimate of KL(pi_old || other) in nats per completion."""
    return float((kl_k1(batch.old_logprobs, other_logprobs) * batch.mask).sum(-1).mean())


def _optimize_policy(
    model: PolicyModel,
    rollouts: Sequence[Rollout],
    batch: _RLOOBatch,
    config: RLOOConfig,
    seed: int,
    lora_rank: int,
    on_step: StepCallback,
) -> dict[str, float]:
    """Train for `config.epochs` epochs of minibatches. Return the mean metrics of the last epoch."""
    parameters = [parameter for parameter in model.policy.parameters() if parameter.requires_grad]
    learning_rate = config.learning_rate * (weights.LORA_LEARNING_RATE_FACTOR if lora_rank else 1.0)
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0, fused=True)
    num_steps = config.epochs * math.ceil(len(rollouts) / config.batch_size)
    is_linear = config.lr_scheduler_type == "linear"
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: compute_learning_rate_factor(step, num_steps, config.warmup_ratio) if is_linear else 1.0
    )
    recent_kls: deque[float] = deque(maxlen=math.ceil(_KL_WINDOW / config.batch_size))
    rng, step, epoch_metrics = random.Random(seed), 0, [dict[str, float]()]
    for _ in range(config.epochs):
        order, epoch_metrics = list(range(len(rollouts))), []
        rng.shuffle(order)
        for start in range(0, len(order), config.batch_size):
            metrics = _accumulate_gradients(model, rollouts, order[start : start + config.batch_size], batch, config)
            sharding.all_reduce_gradients(parameters)
            metrics["grad_norm"] = sharding.clip_gradients(parameters, _MAX_GRAD_NORM)
            require_finite(step + 1, metrics)
            recent_kls.append(metrics["kl_update"])
            metrics["kl_update"] = sum(recent_kls) / len(recent_kls)
            # These metrics describe the policy before this step. If a KL is above its limit, the step is not made.
            metrics["stopped_early"] = float(step > 0 and bool(find_exceeded_limit(metrics, config)))
            if metrics["stopped_early"]:
                on_step(step + 1, metrics)
                return metrics | {"steps": float(step)}
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            step += 1
            on_step(step, metrics)
            epoch_metrics.append(metrics)
    means = {name: sum(m[name] for m in epoch_metrics) / len(epoch_metrics) for name in epoch_metrics[0]}
    return means | {"steps": float(step)}


def _accumulate_gradients(
    model: PolicyModel, rollouts: Sequence[Rollout], indices: Sequence[int], batch: _RLOOBatch, config: RLOOConfig
) -> dict[str, float]:
    """Accumulate the gradients of one minibatch and return its metrics.

    The losses of its micro-batches add up to the loss of the minibatch. With several processes, each process takes a part of the
    rows. The gradients come from this part. The metrics come from all rows.
    """
    indices = list(indices)
    num_tokens = float(batch.mask[indices].sum())
    sums: dict[str, float] = {}
    ratio_max = 0.0
    for rows in model.iterate_shard(rollouts, indices):
        mask, old_logprobs, ref_logprobs = batch.mask[rows], batch.old_logprobs[rows], batch.ref_logprobs[rows]
        with model.hardware.autocast():
            logp, entropy = model(model.pad_rollouts([rollouts[i] for i in rows], mask.shape[1]), entropy=True)
        sequence_loss, clipped = compute_sequence_loss(
            logp, old_logprobs, mask, batch.advantages[rows], batch.importance_weights[rows], config.clip
        )
        (sequence_loss.sum() / len(indices)).backward()

        logp = logp.detach()
        ratio_max = max(ratio_max, float(torch.exp(((logp - old_logprobs) * mask).sum(-1)).max()))
        step_sums = {"policy_loss": sequence_loss.detach().sum(), "clipfrac": clipped.sum()}
        token_metrics = {
            "entropy": entropy,
            "approx_kl": kl_k3(old_logprobs, logp),
            "kl_update": estimate_update_kl(old_logprobs, logp),
            "kl_ref_per_token": estimate_policy_kl(logp, ref_logprobs, old_logprobs),
        }
        if batch.base_logprobs is not None:
            token_metrics["kl_base"] = estimate_policy_kl(logp, batch.base_logprobs[rows], old_logprobs)
        step_sums |= {name: (value * mask).sum() for name, value in token_metrics.items()}
        for name, value in step_sums.items():
            sums[name] = sums.get(name, 0.0) + float(value)

    sums = distributed.sum_over_processes(sums)
    per_sequence = {"policy_loss", "clipfrac", "kl_update", "kl_base"} & sums.keys()
    metrics = {name: total / (len(indices) if name in per_sequence else num_tokens) for name, total in sums.items()}
    metrics["kl_ref"] = sums["kl_ref_per_token"] / len(indices)
    metrics["ratio_max"] = distributed.max_over_processes(ratio_max)
    return metrics
