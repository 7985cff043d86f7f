"""Train the policy with PPO on scored rollouts that the stream has sampled (RL-CAI). Read from top to bottom.

`policy_math.py` has the formulas that GRPO and RLOO also use, and `rollouts.py` has the forward pass.

    minimize   L = -E[ min(r A, clip(r, 1-e, 1+e) A) ] + c_v * L_value + c_k * KL(pi_old || pi)     (alternate)
               L_SL + alpha * L                                                (combined)

Here r = pi(token) / pi_old(token), and pi_old is the policy at the start of the update. The advantages A are computed with GAE
from per-token rewards. The reward of a token is -beta * (log pi_old - log pi_ref). The last token also gets the reward model's
normalized score (Schulman et al. 2017; Bai et al. 2022, section 4; Ziegler et al. 2019).

The implementation differs from the papers in the following points, for these reasons:

 1. This file does not sample. The rollouts come from the stream. Each rollout has the log-probabilities with which it was
    sampled (pi_behavior). A rollout may be a few policy versions old. Therefore the old log-probabilities are computed again
    with the current policy, and each token is weighted with min(pi_old / pi_behavior, 2) (truncated importance sampling;
    decoupled PPO). Rollouts of the current policy are also weighted, because the arithmetic of a server differs from the
    arithmetic of training.
 2. The mean score of the other completions of the same prompt is subtracted from each score (Ahmadian et al. 2024, RLOO). A
    reward model trained on pairs has no common scale for different prompts. Only the differences between completions of the
    same prompt are meaningful. A linear value head is too weak to remove the differences between prompts. If the mean of the
    batch were subtracted instead, refusals of harmful prompts would score below helpful responses to benign prompts, and PPO
    would unlearn the refusals. If a prompt has only one completion, the mean of the batch is subtracted from its score, and a
    warning is logged. A batch in which all resulting scores are equal is rejected.
 3. Advantages are divided by their standard deviation over the batch, if they vary. Their mean is not subtracted, because a
    mean was already subtracted from the scores. If a completion is exactly as good as the others of its prompt, subtracting the
    mean would train all tokens of this completion.
 4. The value head is a linear layer on the policy's trunk and starts at zero. This design needs half the memory of a separate
    value model. Later PPO updates continue with the same head until the next supervised phase. The learning rate of the
    head is at least 1e-5. A linear head can be worse than a constant value (explained_variance below 0). The head makes the
    same errors in all completions that begin alike. If all responses to harmful prompts are the same refusal, these errors make
    the tokens of the refusal less likely. No sample shows which tokens should replace them. Values are therefore multiplied by
    the regression coefficient of the future rewards on the values, limited to [0, 1] (the best coefficient of a control
    variate: Greensmith et al. 2004, section 5).
 5. The loss has no entropy bonus. Dropout is off. Gamma is 1. A completion is scored once, at its end.
 6. beta adapts to a KL target in nats per sequence, once per update. beta doubles if the KL is above 1.5 times the target. beta
    halves if the KL is below two thirds of the target (Schulman et al. 2017, section 4). Beta never falls below the setting
    `ppo.beta`. Ziegler's controller (2 % per update) is made for thousands of small updates, but a stream makes few large
    updates. The KL is estimated from the rollouts, under pi_old. The first update after SFT does not change beta. Before this
    update, the policy is equal to the reference, so the KL is zero for any beta.
 7. The clip limits how much the gradient of a completion changes the tokens of this completion. The clip does not limit how
    much this gradient changes the tokens of other completions. When training makes some completions less likely, the tokens
    that all completions share can also become less likely. As a result, tokens that occur in no sample become more likely.
    Therefore each step also has a KL penalty towards pi_old (Schulman et al. 2017, section 4, in addition to the clip).
 8. If a KL is above its limit before a step, the step is not made and the update ends. The KL to the reference, the KL to the
    base model and the KL to pi_old (`max_kl_update`) have limits. Within an update, only the KL to pi_old is reliable. The
    other two KLs are estimated for the current policy, from completions that pi_old sampled. If the policy has learned to write
    something that pi_old never wrote, these samples do not show it. In one case an estimate of 1.6 nats was 12 nats on the
    completions of the next version (docs/learning.md). The samples only show what the policy now writes less often. In these
    two estimates, each token is weighted with min(pi / pi_old, 10). Assume that a token was rare when it was sampled and is
    likely now. Without the cap, this single token would count thousands of nats. If the KL to the reference or to the base
    model is above its limit at the start, the update is rejected.
 9. Masks are computed from lengths and never from `!= pad`, because SmolLM2 pads with its end token. Padding is on the right of
    the tokens, and a causal model attends only to the left. An attention mask is therefore not needed.
10. A loss is the mean over the completion tokens of its minibatch, so long completions have more weight. Every published PPO
    implementation for language models uses this mean. In the papers the expectation is over time steps.
11. Adam starts without state in each update, because a saved state would take twice the disk space of the weights. Without
    state, the first steps of Adam have the full length of the learning rate, for any gradient. Therefore the learning rate
    rises over the first steps and falls to zero over the other steps (Ouyang et al. 2022, appendix C.4, warm up over 10
    iterations; trl's PPO decays linearly).
12. The score of a completion that was truncated at the length limit is reduced by `missing_eos_penalty`. If most completions
    were truncated, the limit is too low, and the penalty is not applied. With such a limit, the penalty would teach short
    responses instead of complete responses.
"""

from __future__ import annotations

import logging
import math
import random
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F

from engine.errors import TrainingFailed
from trainer import distributed, sharding, weights
from trainer.hf import IGNORE_INDEX, StepCallback, compute_learning_rate_factor, ignore_step, require_finite
from trainer.learners.policy_math import (
    adapt_beta,
    compute_clipped_policy_loss,
    compute_importance_weights,
    estimate_policy_kl,
    estimate_update_kl,
    find_exceeded_limit,
    kl_k1,
    kl_k3,
    masked_mean,
    require_within_kl_limits,
)
from trainer.learners.policy_math import logprobs_from_logits as logprobs_from_logits
from trainer.learners.rollouts import (
    PaddedRollouts,
    PolicyModel,
    Rollout,
    TrainedPolicy,
    compute_other_logprobs,
    pad_behavior_logprobs,
)
from trainer.weights import Hardware

logger = logging.getLogger("charter.trainer")
_MIN_STD = 1e-4
_MAX_GRAD_NORM = 1.0
_MIN_VALUE_LEARNING_RATE = 1e-5  # at PPO's usual 1e-6, a linear head that starts at zero hardly learns
_MAX_TRUNCATED_FRACTION = 0.5
_KL_WINDOW = 64  # kl_update is averaged over this number of rollouts, because the mean of fewer than 64 is too noisy


@dataclass(frozen=True)
class PPOConfig:
    """These are the settings `ppo.*` of an update. `alpha` is the weight of the RL loss in the combined objective."""

    learning_rate: float = 1e-6
    lr_scheduler_type: Literal["linear", "constant"] = "linear"
    warmup_ratio: float = 0.15
    epochs: int = 4
    batch_size: int = 8
    clip: float = 0.2
    value_clip: float = 0.2
    value_coefficient: float = 0.1
    gae_gamma: float = 1.0
    gae_lambda: float = 0.95
    beta: float = 0.02
    kl_target: float = 6.0
    kl_coefficient: float = 0.05
    max_kl_update: float = 6.0
    max_kl: float = 30.0
    max_kl_base: float = 200.0
    baseline: Literal["prompt", "batch"] = "prompt"
    missing_eos_penalty: float = 0.0
    alpha: float = 1.0


# The mathematics. Tensors have shape (B, T) over completion tokens. Masks are 1 on real tokens and 0 on padding.


def compute_token_rewards(
    kl: torch.Tensor, scores: torch.Tensor, lengths: torch.Tensor, beta: float, mask: torch.Tensor
) -> torch.Tensor:
    """Return the reward of each token, which is -beta * kl. The last token also gets the score (B,)."""
    rewards = -beta * kl * mask
    rewards[torch.arange(len(lengths), device=rewards.device), lengths - 1] += scores
    return rewards


def compute_gae(
    rewards: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, gamma: float, gae_lambda: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return advantages and returns (Schulman et al. 2015, eq. 16).

    delta_t = r_t + gamma V_t+1 - V_t,  A_t = delta_t + gamma lambda A_t+1,  return_t = A_t + V_t
    """
    values = values * mask
    advantages = torch.zeros_like(rewards)
    running = torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        next_value = values[:, t + 1] if t + 1 < rewards.shape[1] else torch.zeros_like(running)
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        running = (delta + gamma * gae_lambda * running) * mask[:, t]
        advantages[:, t] = running
    return advantages, advantages + values


def subtract_baseline(scores: torch.Tensor, prompts: Sequence[object], baseline: str) -> torch.Tensor:
    """Return each score (N,) minus the mean score of the other completions of its prompt.

    `prompts` has one entry per score. If `baseline` is "batch", or if a prompt has only one completion, subtract the mean of
    all scores. Raise TrainingFailed when the results are all equal, because Adam would make full steps from rounding errors.
    """
    advantages = scores - scores.mean()
    groups: dict[object, list[int]] = {}
    for row, prompt in enumerate(prompts):
        groups.setdefault(prompt, []).append(row)
    for rows in groups.values() if baseline == "prompt" else ():
        if (count := len(rows)) > 1:
            advantages[rows] = (scores[rows] - scores[rows].mean()) * count / (count - 1)
    if advantages.std(correction=0) < _MIN_STD:
        all_equal = scores.std(correction=0) < _MIN_STD
        raise TrainingFailed(
            f"the reward of all {len(scores)} completions is the same"
            if all_equal
            else f"each of {len(scores)} completions has the same reward as the other completions of its prompt",
            "PPO cannot learn from equal rewards. This update was not saved, and the last policy stays in use",
            "wait for more responses, or inspect the responses and their scores: charter tail responses, charter tail scores",
        )
    return advantages


def scale_to_unit_std(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Divide `x` by its standard deviation over real tokens. Return `x` unchanged when it hardly varies."""
    deviation = masked_mean((x - masked_mean(x, mask)) ** 2, mask).sqrt()
    return x if deviation < _MIN_STD else x / deviation * mask


def compute_value_weight(values: torch.Tensor, rewards: torch.Tensor, mask: torch.Tensor, gamma: float) -> float:
    """Return the regression coefficient of the future rewards on the values (B, T), limited to [0, 1]."""
    future_rewards, _ = compute_gae(rewards, torch.zeros_like(values), mask, gamma, 1.0)
    v, r = (x[mask.bool()] - masked_mean(x, mask) for x in (values, future_rewards))
    variance = float((v * v).sum())
    return max(0.0, min(1.0, float((v * r).sum()) / variance)) if variance > 0 else 0.0


def compute_clipped_value_loss(
    values: torch.Tensor, old_values: torch.Tensor, returns: torch.Tensor, clip: float
) -> torch.Tensor:
    """Return half the squared error per token.

    The value has an error, and the clipped value has an error. The larger of these two errors counts.

    The clipped value differs from the old value by at most `clip`.
    """
    clipped = old_values + (values - old_values).clamp(-clip, clip)
    return 0.5 * torch.maximum((values - returns) ** 2, (clipped - returns) ** 2)


def compute_explained_variance(values: torch.Tensor, returns: torch.Tensor, mask: torch.Tensor) -> float:
    """Return 1 - Var(returns - values) / Var(returns) over real tokens. Return 0 when the returns do not vary."""
    is_token = mask.bool()
    variance = returns[is_token].var(correction=0)
    if variance < 1e-12:
        return 0.0
    return float(1 - (returns - values)[is_token].var(correction=0) / variance)


# The model: a policy with a value head on its trunk


class ActorCritic(PolicyModel):
    """This module has the policy and a linear value head on the policy's last hidden states."""

    def __init__(self, policy: Any, hardware: Hardware = weights.DEFAULT_HARDWARE) -> None:
        super().__init__(policy, hardware, "PPO")
        self.value_head = torch.nn.Linear(self.config.hidden_size, 1, device=self.device)
        torch.nn.init.zeros_(self.value_head.weight)
        torch.nn.init.zeros_(self.value_head.bias)

    def forward(  # type: ignore[override]
        self, batch: PaddedRollouts, *, entropy: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the log-probability of each completion token, the value before it, and the entropy.

        All three have shape (B, T_completion).
        """

        def compute() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            hidden = self.compute_completion_states(batch)
            logp, entropies = self.compute_token_logprobs(batch, hidden, entropy=entropy)
            # Autocast would round a matrix product to bf16. The three digits of bf16 are too few for the value loss. The product
            # is therefore computed with a multiplication and a sum.
            values = (hidden.float() * self.value_head.weight[0]).sum(-1) + self.value_head.bias
            return batch.scatter(logp), batch.scatter(values), batch.scatter(entropies)

        return self.run(compute)


@torch.no_grad()
def compute_logprobs_and_values(
    actor: ActorCritic, rollouts: Sequence[Rollout], completion_length: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return log-probabilities and values of all rollouts. Both have shape (N, completion_length)."""
    device = actor.value_head.weight.device
    logp = torch.zeros(len(rollouts), completion_length, device=device)
    values = torch.zeros_like(logp)
    for rows in actor.iterate_shard(rollouts, range(len(rollouts))):
        with actor.hardware.autocast():
            row_logp, row_values, _ = actor(actor.pad_rollouts([rollouts[i] for i in rows], completion_length))
        logp[rows], values[rows] = row_logp, row_values
    distributed.all_reduce_sum(logp)  # each process has computed its rows
    distributed.all_reduce_sum(values)
    return logp, values


# One update


def train(
    policy_folder: Path,
    reference_folder: Path,
    rollouts: Sequence[Rollout],
    scores: Sequence[float],
    config: PPOConfig,
    *,
    base_folder: Path | None = None,
    sl_rows: Sequence[dict[str, list[int]]] = (),
    lora_rank: int = 0,
    hardware: Hardware = weights.DEFAULT_HARDWARE,
    seed: int = 0,
    on_step: StepCallback = ignore_step,
) -> tuple[TrainedPolicy, dict[str, float]]:
    """Make one PPO update on scored rollouts. Return the policy and the metrics.

    `scores` are normalized, one per rollout. If `base_folder` is None, the KL to the base model is not computed. If `sl_rows`
    (ids and labels, from `sft.encode_example`) are given, the combined objective is used. The metrics are means over the last
    epoch. `stopped_early` is 1 if a KL limit ended the update. Raise TrainingFailed when a metric is not finite, when all
    scores are equal, or when a KL limit is exceeded at the start. Raise UsageError when the models do not have the same
    architecture and tokenizer.
    """
    torch.manual_seed(seed)
    weights.require_compatible_models(policy_folder, reference_folder, "the reference policy")
    truncated_fraction = sum(not r.ends_with_eos for r in rollouts) / len(rollouts)
    if config.missing_eos_penalty and truncated_fraction > _MAX_TRUNCATED_FRACTION:
        logger.warning(
            "this update has no missing-EOS penalty, because %.0f %% of its completions were truncated (respond.max_tokens)",
            100 * truncated_fraction,
        )
        config = replace(config, missing_eos_penalty=0.0)
    num_single = list(Counter(r.prompt_token_ids for r in rollouts).values()).count(1)
    if num_single and config.baseline == "prompt":
        logger.warning(
            "%d of %d completions are the only completion of their prompt. Their scores are compared with the mean of all scores"
            " (respond.num_completions)",
            num_single,
            len(rollouts),
        )

    completion_length = max(len(r.token_ids) for r in rollouts)
    base_logprobs, ref_logprobs = compute_other_logprobs(
        policy_folder, reference_folder, base_folder, rollouts, completion_length, lora_rank=lora_rank, hardware=hardware
    )
    policy, disabled_is_reference = weights.load_policy_for_rl(policy_folder, reference_folder, lora_rank, hardware)
    actor = ActorCritic(policy, hardware)
    if value_head := weights.load_value_head(policy_folder):
        actor.value_head.load_state_dict(value_head)
    old_logprobs, old_values = compute_logprobs_and_values(actor, rollouts, completion_length)
    if policy_folder == reference_folder:
        ref_logprobs = old_logprobs
    elif ref_logprobs is None:
        with weights.disable_adapter(policy):
            ref_logprobs, _ = compute_logprobs_and_values(actor, rollouts, completion_length)

    batch = prepare_batch(rollouts, scores, old_logprobs, old_values, ref_logprobs, base_logprobs, config)
    kl_ref = _compute_sequence_kl(batch, ref_logprobs)
    kl_base = 0.0 if base_logprobs is None else _compute_sequence_kl(batch, base_logprobs)
    require_within_kl_limits({"kl_ref": kl_ref, "kl_base": kl_base}, config, "ppo")
    metrics = _optimize_policy(actor, rollouts, batch, config, sl_rows, seed, lora_rank, on_step)
    metrics |= {
        "beta": adapt_beta(config.beta, kl_ref, config.kl_target),
        "kl_rollouts": kl_ref,
        "value_weight": batch.value_weight,
        "reward_mean": sum(scores) / len(scores),
        "rollouts": float(len(rollouts)),
        "truncated_fraction": truncated_fraction,
        "missing_eos_penalty": config.missing_eos_penalty,
        "importance_mean": float(masked_mean(batch.importance_weights, batch.mask)),
        "completion_tokens": float(batch.mask.sum()),
    }
    tokenizer, policy = weights.load_tokenizer(policy_folder), weights.gather_model(policy)
    adapter_reference = reference_folder if disabled_is_reference else None
    save = weights.make_rl_saver(policy, tokenizer, actor.value_head.state_dict(), adapter_reference)
    return TrainedPolicy(policy, tokenizer, save), metrics


@dataclass(frozen=True)
class _PPOBatch:
    """These values do not change during an update. Tensors have shape (N, T). The module's docstring explains the values."""

    old_logprobs: torch.Tensor
    ref_logprobs: torch.Tensor
    base_logprobs: torch.Tensor | None
    old_values: torch.Tensor
    importance_weights: torch.Tensor
    advantages: torch.Tensor
    returns: torch.Tensor
    mask: torch.Tensor
    value_weight: float


def prepare_batch(
    rollouts: Sequence[Rollout],
    scores: Sequence[float],
    old_logprobs: torch.Tensor,
    old_values: torch.Tensor,
    ref_logprobs: torch.Tensor,
    base_logprobs: torch.Tensor | None,
    config: PPOConfig,
) -> _PPOBatch:
    """Compute rewards, advantages, returns and importance weights of an update."""
    lengths = torch.tensor([len(r.token_ids) for r in rollouts], device=old_logprobs.device)
    mask = (torch.arange(old_logprobs.shape[1], device=old_logprobs.device)[None] < lengths[:, None]).float()

    penalties = torch.tensor([0.0 if r.ends_with_eos else config.missing_eos_penalty for r in rollouts])
    prompts = [r.prompt_token_ids for r in rollouts]
    compared_scores = subtract_baseline(torch.tensor(list(scores)) - penalties, prompts, config.baseline)
    kl = kl_k1(old_logprobs, ref_logprobs)
    rewards = compute_token_rewards(kl, compared_scores.to(old_logprobs.device), lengths, config.beta, mask)
    value_weight = compute_value_weight(old_values, rewards, mask, config.gae_gamma)
    advantages, returns = compute_gae(rewards, value_weight * old_values, mask, config.gae_gamma, config.gae_lambda)

    behavior_logprobs = pad_behavior_logprobs(rollouts, old_logprobs)
    importance_weights = compute_importance_weights(old_logprobs, behavior_logprobs, mask)
    return _PPOBatch(
        old_logprobs,
        ref_logprobs,
        base_logprobs,
        old_values,
        importance_weights,
        scale_to_unit_std(advantages, mask),
        returns,
        mask,
        value_weight,
    )


def _compute_sequence_kl(batch: _PPOBatch, other_logprobs: torch.Tensor) -> float:
    """Return the estimate of KL(pi_old || other) in nats per sequence, from the rollouts."""
    return float((kl_k1(batch.old_logprobs, other_logprobs) * batch.mask).sum(-1).mean())


def _optimize_policy(
    actor: ActorCritic,
    rollouts: Sequence[Rollout],
    batch: _PPOBatch,
    config: PPOConfig,
    sl_rows: Sequence[dict[str, list[int]]],
    seed: int,
    lora_rank: int,
    on_step: StepCallback,
) -> dict[str, float]:
    """Train for `config.epochs` epochs of minibatches. Return the mean metrics of the last epoch."""
    policy_parameters = [parameter for parameter in actor.policy.parameters() if parameter.requires_grad]
    head_parameters = list(actor.value_head.parameters())
    parameters = [*policy_parameters, *head_parameters]
    learning_rate = config.learning_rate * (weights.LORA_LEARNING_RATE_FACTOR if lora_rank else 1.0)
    optimizer = torch.optim.AdamW(
        [
            {"params": policy_parameters, "lr": learning_rate},
            {"params": head_parameters, "lr": max(learning_rate, _MIN_VALUE_LEARNING_RATE)},
        ],
        weight_decay=0.0,
        fused=True,
    )
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
            indices = order[start : start + config.batch_size]
            metrics = _accumulate_rl_gradients(actor, rollouts, indices, batch, config, config.alpha if sl_rows else 1.0)
            if sl_rows:
                minibatch = [sl_rows[(start + i) % len(sl_rows)] for i in range(len(indices))]
                metrics["sl_loss"] = _accumulate_sl_gradients(actor, minibatch)
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


def _accumulate_rl_gradients(
    actor: ActorCritic,
    rollouts: Sequence[Rollout],
    indices: Sequence[int],
    batch: _PPOBatch,
    config: PPOConfig,
    loss_scale: float,
) -> dict[str, float]:
    """Accumulate the gradients of one minibatch and return its metrics.

    The losses of its micro-batches add up to the token mean. With several processes, each process takes a part of the rows. The
    gradients come from this part. The metrics come from all rows.
    """
    indices = list(indices)
    num_tokens = float(batch.mask[indices].sum())
    sums: dict[str, float] = {}
    ratio_max = 0.0
    for rows in actor.iterate_shard(rollouts, indices):
        mask, old_logprobs = batch.mask[rows], batch.old_logprobs[rows]
        with actor.hardware.autocast():
            logp, values, entropy = actor(actor.pad_rollouts([rollouts[i] for i in rows], mask.shape[1]), entropy=True)
        policy_loss, clipped = compute_clipped_policy_loss(
            logp, old_logprobs, batch.advantages[rows], batch.importance_weights[rows], config.clip
        )
        value_loss = compute_clipped_value_loss(values, batch.old_values[rows], batch.returns[rows], config.value_clip)
        kl = kl_k3(old_logprobs, logp)
        token_loss = policy_loss + config.value_coefficient * value_loss + config.kl_coefficient * kl
        loss = (token_loss * mask).sum() / num_tokens
        (loss_scale * loss).backward()

        logp = logp.detach()
        ratio_max = max(ratio_max, float(torch.exp((logp - old_logprobs) * mask).max()))
        token_metrics = {
            "policy_loss": policy_loss.detach(),
            "value_loss": value_loss.detach(),
            "entropy": entropy,
            "approx_kl": kl.detach(),
            "kl_update": estimate_update_kl(old_logprobs, logp),
            "clipfrac": clipped,
            "kl_ref_per_token": estimate_policy_kl(logp, batch.ref_logprobs[rows], old_logprobs),
        }
        if batch.base_logprobs is not None:
            token_metrics["kl_base"] = estimate_policy_kl(logp, batch.base_logprobs[rows], old_logprobs)
        for name, value in token_metrics.items():
            sums[name] = sums.get(name, 0.0) + float((value * mask).sum())

    sums = distributed.sum_over_processes(sums)
    per_sequence = {"kl_update", "kl_base"} & sums.keys()
    metrics = {name: total / (len(indices) if name in per_sequence else num_tokens) for name, total in sums.items()}
    metrics["kl_ref"] = sums["kl_ref_per_token"] / len(indices)
    metrics["ratio_max"] = distributed.max_over_processes(ratio_max)
    metrics["explained_variance"] = compute_explained_variance(
        batch.old_values[indices], batch.returns[indices], batch.mask[indices]
    )
    return metrics


def _accumulate_sl_gradients(actor: ActorCritic, rows: Sequence[dict[str, list[int]]]) -> float:
    """Accumulate the gradients of the supervised loss (token mean) of one minibatch. Return the loss."""
    num_tokens = sum(label != IGNORE_INDEX for row in rows for label in row["labels"][1:])
    total, size, shard = 0.0, actor.hardware.micro_batch_size, distributed.shard_rows(rows)
    starts = range(0, len(shard), size)
    for start in starts:
        loss = compute_sl_loss(actor, shard[start : start + size]) / max(1, num_tokens)
        loss.backward()
        total += float(loss.detach())
    actor.run_empty_passes(len(rows), len(starts))
    return distributed.sum_over_processes({"sl": total})["sl"]


def compute_sl_loss(actor: ActorCritic, rows: Sequence[dict[str, list[int]]]) -> torch.Tensor:
    """Return the summed negative log-likelihood of the labels."""
    longest = max(len(row["input_ids"]) for row in rows)
    device = actor.value_head.weight.device

    def pad(key: str, filler: int) -> torch.Tensor:
        return torch.tensor([row[key] + [filler] * (longest - len(row[key])) for row in rows], device=device)

    ids, labels = pad("input_ids", 0), pad("labels", IGNORE_INDEX)[:, 1:]
    is_target = labels != IGNORE_INDEX
    with actor.hardware.autocast():
        logits = actor.run(lambda: actor.compute_logits(actor.compute_hidden_states(ids)[:, :-1][is_target]))
    return F.cross_entropy(logits, labels[is_target], reduction="sum")
