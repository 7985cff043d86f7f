"""The mathematics that the RL learners share. Only pure functions are shared. Each learner has its own loop.

Tensors have shape (B, T) over completion tokens, if nothing else is stated. Masks are 1 on real tokens and 0 on padding.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import torch

from engine.errors import TrainingFailed
from engine.text import format_count

KL_WEIGHT_CAP = 10.0
IMPORTANCE_WEIGHT_CAP = 2.0
_EQUAL_REWARDS_RANGE = 1e-4  # rewards of a group within this range count as equal
_STD_EPSILON = 1e-4  # as in TRL


# Probabilities and KL


def masked_mean(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return (x * mask).sum() / mask.sum().clamp(min=1)


def logprobs_from_logits(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Return log p(token) with shape (...), from logits (..., V) and tokens (...)."""
    return torch.log_softmax(logits, dim=-1).gather(-1, tokens[..., None])[..., 0]


def entropy_from_logits(logits: torch.Tensor) -> torch.Tensor:
    """Return the entropy in nats with shape (...), from logits (..., V)."""
    logp = torch.log_softmax(logits, dim=-1)
    return -(logp.exp() * logp).sum(-1)


def kl_k1(logp: torch.Tensor, logq: torch.Tensor) -> torch.Tensor:
    """Return the unbiased estimate of KL(p || q) per token, from samples of p (Schulman 2020, "k1").

    The estimate may be negative.
    """
    return logp - logq


def kl_k3(logp: torch.Tensor, logq: torch.Tensor) -> torch.Tensor:
    """Return the estimate of KL(p || q) per token, from samples of p (Schulman 2020, "k3"). The estimate is never negative."""
    return torch.expm1(logq - logp) - (logq - logp)


def estimate_policy_kl(logp: torch.Tensor, logq: torch.Tensor, sampling_logp: torch.Tensor) -> torch.Tensor:
    """Return the estimate of KL(p || q) per token, from samples of a third distribution `sampled`.

    The estimate is k3 weighted with min(p / sampled, 10), and is never negative. Assume that p has just learned to avoid a
    sampled token. Without the weight, this token would count q / p, which can be thousands of nats. Assume that p has just
    learned to prefer a sampled token. Without the cap, this token could also count thousands of nats. For tokens with a capped
    weight, the estimate is too low.
    """
    return torch.exp(logp - sampling_logp).clamp(max=KL_WEIGHT_CAP) * kl_k3(logp, logq)


def estimate_update_kl(old_logprobs: torch.Tensor, new_logprobs: torch.Tensor) -> torch.Tensor:
    """Return the estimate of KL(old || new) per token, from samples of `old`.

    The estimate is k3 with the ratio new / old capped at 10, and is never negative. A single token may have been rare and be
    likely now. Because of the cap, such a token does not end an update. For tokens with a capped ratio, the estimate is too
    low.
    """
    return kl_k3(old_logprobs, torch.minimum(new_logprobs, old_logprobs + math.log(KL_WEIGHT_CAP)))


# Advantages of groups. A group consists of the completions of one response record. All arrays have shape (N,).


def find_groups(groups: Sequence[object]) -> dict[object, list[int]]:
    """Return the rows of each group. `groups` has one entry per row."""
    rows_by_group: dict[object, list[int]] = {}
    for row, group in enumerate(groups):
        rows_by_group.setdefault(group, []).append(row)
    return rows_by_group


def compute_group_advantages(
    rewards: torch.Tensor, groups: Sequence[object], scale: Literal["none", "group", "batch"] = "none"
) -> torch.Tensor:
    """Return each reward minus the mean reward of its group (Shao et al. 2024, DeepSeekMath, section 4.1.2).

    With `scale` "group", divide by the standard deviation of the group, as that paper does. This gives groups with nearly equal
    rewards the same weight as other groups (Liu et al. 2025, "Understanding R1-Zero-Like Training"). With "batch", divide by
    the standard deviation of all rewards. The names and the constant 1e-4 are those of TRL's `scale_rewards`.
    """
    advantages = torch.zeros_like(rewards)
    for rows in find_groups(groups).values():
        deviation = rewards[rows] if scale == "group" else rewards
        divisor = 1.0 if scale == "none" else deviation.std() + _STD_EPSILON
        advantages[rows] = (rewards[rows] - rewards[rows].mean()) / divisor
    return advantages


def compute_leave_one_out_advantages(rewards: torch.Tensor, groups: Sequence[object]) -> torch.Tensor:
    """Return each reward minus the mean reward of the other rows of its group (Kool et al. 2019; Ahmadian et al. 2024, RLOO)."""
    advantages = torch.zeros_like(rewards)
    for rows in find_groups(groups).values():
        others = (rewards[rows].sum() - rewards[rows]) / (len(rows) - 1)
        advantages[rows] = rewards[rows] - others
    return advantages


def count_equal_groups(rewards: torch.Tensor, groups: Sequence[object]) -> int:
    """Return the number of groups whose rewards are all equal. Such a group has advantages of zero and teaches nothing."""
    rows_by_group = find_groups(groups)
    return sum(bool(rewards[rows].max() - rewards[rows].min() < _EQUAL_REWARDS_RANGE) for rows in rows_by_group.values())


def require_comparable_groups(rewards: torch.Tensor, groups: Sequence[object], title: str) -> None:
    """Raise TrainingFailed if the rewards of every group are equal.

    Without any difference in a group, Adam would make full steps from rounding errors.
    """
    rows_by_group = find_groups(groups)
    if count_equal_groups(rewards, groups) == len(rows_by_group):
        raise TrainingFailed(
            f"in each of {format_count(len(rows_by_group), 'groups')}, all completions have the same reward",
            f"{title} cannot learn from equal rewards. This update was not saved, and the last policy stays in use",
            "wait for more responses, raise respond.num_completions, or inspect the grades: charter tail grades",
        )


def compute_importance_weights(old_logprobs: torch.Tensor, behavior_logprobs: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return min(pi_old / pi_behavior, 2) for each token, and 0 on padding (truncated importance sampling)."""
    return torch.exp((old_logprobs - behavior_logprobs) * mask).clamp(max=IMPORTANCE_WEIGHT_CAP) * mask


# The policy loss


def compute_clipped_policy_loss(
    logprobs: torch.Tensor, old_logprobs: torch.Tensor, advantages: torch.Tensor, importance_weights: torch.Tensor, clip: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the clipped loss per token (Schulman et al. 2017, eq. 7) times its importance weight.

    Also return a tensor that is 1.0 where the clip applies.
    """
    ratio = torch.exp(logprobs - old_logprobs)
    unclipped, clipped = -advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip)
    return importance_weights * torch.maximum(unclipped, clipped), (clipped > unclipped).float()


# KL control. The attributes of `config` are the settings with these names.


def adapt_beta(beta: float, kl: float, kl_target: float) -> float:
    """Return beta for the next update (Schulman et al. 2017, section 4). A KL of at most 0 keeps beta unchanged."""
    if kl > 1.5 * kl_target:
        return 2 * beta
    return beta / 2 if 0 < kl < kl_target / 1.5 else beta


def find_exceeded_limit(metrics: Mapping[str, float], config: object) -> str:
    """Return the first setting whose KL limit the metrics exceed. Return "" when no limit is exceeded."""
    limits = {"max_kl_update": "kl_update", "max_kl": "kl_ref", "max_kl_base": "kl_base"}
    return next((limit for limit, name in limits.items() if metrics.get(name, 0.0) > getattr(config, limit)), "")


def require_within_kl_limits(kls: Mapping[str, float], config: object, section: str) -> None:
    """Raise TrainingFailed when the policy exceeds a KL limit before the first step.

    `section` is the section of the settings that has the limits.
    """
    if limit := find_exceeded_limit(kls, config):
        name, model = {"max_kl": ("kl_ref", "reference"), "max_kl_base": ("kl_base", "base model")}[limit]
        raise TrainingFailed(
            f"the KL of the policy to the {model} is {kls[name]:.1f} nats per completion",
            f"this is above {section}.{limit} = {getattr(config, limit):g} before the first step, so no step was made",
            f"restore an earlier policy (charter policy rollback), train SFT, or raise {section}.{limit}",
        )
