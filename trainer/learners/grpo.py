"""Train the policy with GRPO on groups of completions that the stream has sampled and rewarded. Read from top to bottom.

    minimize   E[ -min(r A, clip(r, 1-e, 1+e) A) + beta * k3(pi || pi_ref) ]

Here r = pi(token) / pi_old(token), and pi_old is the policy at the start of the update. The advantage A of a completion is its
reward minus the mean reward of its group, which consists of the completions of one prompt (Shao et al. 2024, DeepSeekMath,
equations 3 and 4). There is no value model. `policy_math.py` has the formulas.

The mean over the tokens has three variants. Their names are those of TRL's `loss_type`:

  grpo       the mean over the completions of the mean over the tokens of a completion (Shao et al. 2024, equation 3). A long
             completion has less weight per token.
  bnpo       the mean over all tokens of the step. Every token has the same weight (Yu et al. 2025, DAPO, equation 8: the
             token-level loss). TRL's `bnpo` normalizes over a micro-batch; here a step has one mean for any micro-batch size.
  dr_grpo    the sum over all tokens, divided by the number of completions and by `respond.max_tokens`. The divisor does not depend
             on the lengths (Liu et al. 2025, "Understanding R1-Zero-Like Training", Dr. GRPO).

The implementation differs from the papers in the following points, for these reasons:

 1. Advantages are not divided by the standard deviation of their group (`scale_rewards`; Liu et al. 2025). The division gives
    a group in which nearly all rewards are equal the same weight as a group with large differences.
 2. This file does not sample. A rollout may be a few policy versions old. Each token is weighted with
    min(pi_old / pi_behavior, 2), where pi_behavior sampled the token (truncated importance sampling). The KL is not weighted.
 3. A completion without a readable reward is not part of its group: it is not trained, and the baseline does not use it.
 4. beta adapts to a KL target, once per update, as in PPO. beta never falls below the setting `grpo.beta`.
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
    compute_group_advantages,
    compute_importance_weights,
    count_equal_groups,
    estimate_policy_kl,
    estimate_update_kl,
    find_exceeded_limit,
    find_groups,
    kl_k1,
    kl_k3,
    masked_mean,
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
LossType = Literal["dr_grpo", "bnpo", "grpo"]
_MAX_GRAD_NORM = 1.0
_KL_WINDOW = 64  # kl_update is averaged over this number of rollouts, because the mean of fewer than 64 is too noisy


@dataclass(frozen=True)
class GRPOConfig:
    """These are the settings `grpo.*` of an update. `max_completion_length` is `respond.max_tokens`."""

    learning_rate: float = 1e-6
    lr_scheduler_type: Literal["linear", "constant"] = "linear"
    warmup_ratio: float = 0.15
    epochs: int = 1
    batch_size: int = 64
    loss_type: LossType = "dr_grpo"
    scale_rewards: Literal["none", "group", "batch"] = "none"
    clip: float = 0.2
    beta: float = 0.04
    kl_target: float = 6.0
    max_kl_update: float = 6.0
    max_kl: float = 30.0
    max_kl_base: float = 200.0
    max_completion_length: int = 256


# The loss. Tensors have shape (B, T) over completion tokens. Masks are 1 on real tokens and 0 on padding.


def compute_token_shares(
    mask: torch.Tensor, loss_type: LossType, *, num_completions: int, num_tokens: float, max_completion_length: int
) -> torch.Tensor:
    """Return the weight of each token in the loss. The weights of a step add up to 1, except with dr_grpo.

    `num_completions` and `num_tokens` count the whole step, of which these rows are a part.
    """
    if loss_type == "bnpo":
        return mask / num_tokens
    if loss_type == "grpo":
        return mask / mask.sum(-1, keepdim=True).clamp(min=1.0) / num_completions
    return mask / (num_completions * max_completion_length)


def compute_token_loss(
    logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    ref_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    importance_weights: torch.Tensor,
    clip: float,
    beta: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the loss of each token, its part from the policy, and a tensor that is 1.0 where the clip applies.

    `advantages` has shape (B, 1).
    """
    policy_loss, clipped = compute_clipped_policy_loss(logprobs, old_logprobs, advantages, importance_weights, clip)
    return policy_loss + beta * kl_k3(logprobs, ref_logprobs), policy_loss, clipped


# One update


def train(
    policy_folder: Path,
    reference_folder: Path,
    rollouts: Sequence[Rollout],
    rewards: Sequence[float],
    config: GRPOConfig,
    *,
    base_folder: Path | None = None,
    lora_rank: int = 0,
    hardware: Hardware = weights.DEFAULT_HARDWARE,
    seed: int = 0,
    on_step: StepCallback = ignore_step,
) -> tuple[TrainedPolicy, dict[str, float]]:
    """Make one GRPO update. Return the policy and the metrics.

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
    require_comparable_groups(reward_values, groups, "GRPO")

    # The pass of a single step computes the log-probabilities of pi_old. They need no other pass.
    is_single_step = config.epochs == 1 and len(rollouts) <= config.batch_size
    models = load_rl_models(
        policy_folder,
        reference_folder,
        base_folder,
        rollouts,
        lora_rank=lora_rank,
        hardware=hardware,
        title="GRPO",
        skip_policy=is_single_step,
    )
    batch = prepare_batch(rollouts, reward_values, groups, models, config, is_single_step)
    metrics = _optimize_policy(models.model, rollouts, batch, config, seed, lora_rank, on_step)
    kl_ref = batch.compute_sequence_kl(batch.ref_logprobs)
    metrics |= {
        "beta": adapt_beta(config.beta, kl_ref, config.kl_target),
        "kl_rollouts": kl_ref,
        "reward_mean": float(reward_values.mean()),
        "advantage_std": float(batch.advantages.std(correction=0)),
        "groups": float(len(find_groups(groups))),
        "equal_groups": float(count_equal_groups(reward_values, groups)),
        "rollouts": float(len(rollouts)),
        "truncated_fraction": sum(not r.ends_with_eos for r in rollouts) / len(rollouts),
        "importance_mean": float(masked_mean(batch.compute_importance_weights(slice(None)), batch.mask)),
        "completion_tokens": float(batch.mask.sum()),
    }
    tokenizer = weights.load_tokenizer(policy_folder)
    policy = weights.gather_model(models.model.policy)
    save = weights.make_rl_saver(policy, tokenizer, None, reference_folder if models.disabled_is_reference else None)
    return TrainedPolicy(policy, tokenizer, save), metrics


@dataclass(frozen=True)
class _GRPOBatch:
    """These values do not change during an update. `advantages` has shape (N, 1), and all other tensors have shape (N, T).

    With `is_single_step`, `old_logprobs` are 0 until the pass of the step has replaced them.
    """

    old_logprobs: torch.Tensor
    ref_logprobs: torch.Tensor
    base_logprobs: torch.Tensor | None
    behavior_logprobs: torch.Tensor
    advantages: torch.Tensor
    mask: torch.Tensor
    is_single_step: bool

    def compute_importance_weights(self, rows: list[int] | slice) -> torch.Tensor:
        """Return the importance weight of each token of some rows."""
        return compute_importance_weights(self.old_logprobs[rows], self.behavior_logprobs[rows], self.mask[rows])

    def compute_sequence_kl(self, other_logprobs: torch.Tensor) -> float:
        """Return the estimate of KL(pi_old || other) in nats per completion."""
        return float((kl_k1(self.old_logprobs, other_logprobs) * self.mask).sum(-1).mean())


def prepare_batch(
    rollouts: Sequence[Rollout],
    rewards: torch.Tensor,
    groups: Sequence[str],
    models: RLModels,
    config: GRPOConfig,
    is_single_step: bool,
) -> _GRPOBatch:
    """Compute the advantages of an update. `rewards` has shape (N,)."""
    old_logprobs = models.old_logprobs
    advantages = compute_group_advantages(rewards, groups, config.scale_rewards).to(old_logprobs.device)[:, None]
    return _GRPOBatch(
        old_logprobs,
        models.ref_logprobs,
        models.base_logprobs,
        pad_behavior_logprobs(rollouts, old_logprobs),
        advantages,
        make_token_mask(rollouts, old_logprobs),
        is_single_step,
    )


def _require_start_within_limits(batch: _GRPOBatch, config: GRPOConfig) -> None:
    """Raise TrainingFailed if the policy exceeds a KL limit before the first step."""
    kls = {"kl_ref": batch.compute_sequence_kl(batch.ref_logprobs)}
    if batch.base_logprobs is not None:
        kls["kl_base"] = batch.compute_sequence_kl(batch.base_logprobs)
    require_within_kl_limits(kls, config, "grpo")


def _optimize_policy(
    model: PolicyModel,
    rollouts: Sequence[Rollout],
    batch: _GRPOBatch,
    config: GRPOConfig,
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
            if step == 0:
                _require_start_within_limits(batch, config)
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
    model: PolicyModel, rollouts: Sequence[Rollout], indices: Sequence[int], batch: _GRPOBatch, config: GRPOConfig
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
        mask = batch.mask[rows]
        with model.hardware.autocast():
            logp, entropy = model(model.pad_rollouts([rollouts[i] for i in rows], mask.shape[1]), entropy=True)
        if batch.is_single_step:
            batch.old_logprobs[rows] = logp.detach()
        old_logprobs, ref_logprobs = batch.old_logprobs[rows], batch.ref_logprobs[rows]
        token_loss, policy_loss, clipped = compute_token_loss(
            logp,
            old_logprobs,
            ref_logprobs,
            batch.advantages[rows],
            batch.compute_importance_weights(rows),
            config.clip,
            config.beta,
        )
        shares = compute_token_shares(
            mask,
            config.loss_type,
            num_completions=len(indices),
            num_tokens=num_tokens,
            max_completion_length=config.max_completion_length,
        )
        (token_loss * shares).sum().backward()

        logp = logp.detach()
        ratio_max = max(ratio_max, float(torch.exp((logp - old_logprobs) * mask).max()))
        step_sums = {"loss": (token_loss.detach() * shares).sum(), "policy_loss": (policy_loss.detach() * shares).sum()}
        token_metrics = {
            "entropy": entropy,
            "approx_kl": kl_k3(old_logprobs, logp),
            "kl_update": estimate_update_kl(old_logprobs, logp),
            "clipfrac": clipped,
            "kl_ref_per_token": estimate_policy_kl(logp, ref_logprobs, old_logprobs),
        }
        if batch.base_logprobs is not None:
            token_metrics["kl_base"] = estimate_policy_kl(logp, batch.base_logprobs[rows], old_logprobs)
        step_sums |= {name: (value * mask).sum() for name, value in token_metrics.items()}
        for name, value in step_sums.items():
            sums[name] = sums.get(name, 0.0) + float(value)

    if batch.is_single_step:
        distributed.all_reduce_sum(batch.old_logprobs)  # each process has computed its rows
    sums = distributed.sum_over_processes(sums)
    divisors = {"loss": 1.0, "policy_loss": 1.0, "kl_update": float(len(indices)), "kl_base": float(len(indices))}
    metrics = {name: total / divisors.get(name, num_tokens) for name, total in sums.items()}
    metrics["kl_ref"] = sums["kl_ref_per_token"] / len(indices)
    metrics["ratio_max"] = distributed.max_over_processes(ratio_max)
    return metrics
