"""PPO: the policy learns from scored answers that the stream has sampled (RL-CAI). One file, to be read from top to bottom.

    minimise   L = -E[ min(r A, clip(r, 1-e, 1+e) A) ] + c_v * L_value + c_k * KL(pi_prox || pi)     (alternate)
               L_SL + alpha * L                                                 (combined)

with r = pi(token) / pi_prox(token), advantages A from GAE over per-token rewards -beta * (log pi_prox - log pi_ref), and the
reward model's normalised score on the last token (Schulman et al. 2017; Bai et al. 2022, section 4; Ziegler et al. 2019).

Where this departs from the papers, and why:

 1. The answers are those the stream generated, with their own behaviour log-probabilities; nothing is sampled here. They
    may be a few policy versions old, so the proximal log-probabilities are computed afresh with the present policy and each
    token is weighted with min(pi_prox / pi_behaviour, 2) (truncated importance sampling; decoupled PPO). They are computed
    for fresh answers too: a server samples in another arithmetic than the one we train in.
 2. Each score is compared with the mean score of the other answers to the same prompt (Ahmadian et al. 2024, RLOO). A reward
    model that learned from pairs knows no scale between prompts: only such differences mean something, and a linear value head
    is too weak to take the rest out. Against the batch's mean, refusals of harmful prompts lose to helpful answers of benign
    ones, and PPO unlearns them. An answer without another one to its prompt is compared with the batch's mean, and the log says
    so. A reward that is the same everywhere is refused.
 3. Advantages are divided by their deviation over the batch, only when they vary, and are not centered: scores have been
    compared already, and a shift would push every token of an answer that is as good as the others to its prompt.
 4. The value head is linear on the policy's own trunk and starts at zero: half the memory of a value model. It goes on from
    one PPO update to the next until the next supervised phase, and never learns slower than at 1e-5. Such a head can be worse
    than none (explained_variance below 0), and its errors are the same in every answer that begins alike: where all answers to
    harmful prompts are one refusal, they drive the policy away from its tokens, and no sample shows where to. So values count
    as far as this batch's rewards bear them out: times the regression coefficient of the rewards to come on the values, kept in
    [0, 1] (the best coefficient of a control variate: Greensmith et al. 2004, section 5).
 5. No entropy bonus, no dropout, gamma 1: an answer is judged once, at its end.
 6. beta adapts to a KL target in nats per sequence, once for each update: it doubles above 1.5 times the target and halves
    below two thirds of it (Schulman et al. 2017, section 4), never below its setting. Ziegler's controller (2 % an update) is
    made for thousands of small updates; a stream makes few large ones. The KL is that of the rollouts, which the proximal
    policy sampled; an update whose policy is still the reference changes nothing, for its KL is zero whatever beta is.
 7. The clip bounds what an answer's own gradient does to its tokens, not what the gradients of others do: a policy that is
    pushed away from some answers also leaves tokens that all answers share, for ones that no sample shows. So each step also
    pulls towards the policy that the update began with (Schulman et al. 2017, section 4, beside the clip).
 8. A step that would begin past a limit is not made, and ends the update. The limits are on the KL to the reference, to the
    very first model, and to the policy that the update began with (`max_kl_update`). Only the last one sees what matters within
    an update: the first two are estimated for the policy of the moment from answers that the proximal one sampled, and where
    the policy has learned to write what that one never wrote, these samples do not show it: 1.6 nats by this estimate were 12
    by the next version's own answers (docs/learning.md). What the policy has moved away from, they do show. In the first two
    each token is weighted with min(pi / pi_prox, 10): without the cap one token that was rare when it was sampled and is likely
    now would count thousands of nats. An update that begins past a limit is refused.
 9. Masks come from lengths and never from `!= pad`: SmolLM2 pads with its end token. Padding stands on the right, where a
    causal model never looks, so attention needs no mask.
10. A loss is the mean over the answer tokens of its minibatch, long answers weighing more, as in every published PPO for
    language models; the papers' expectation is over time steps of any length.
11. Adam starts afresh with each update; its moments would be twice the weights on disk. Its first steps are then as long as
    the learning rate allows whatever the gradient is, so the rate rises over the first steps, and falls to nothing over the
    rest (Ouyang et al. 2022, appendix C.4 warm up over 10 iterations; trl's PPO decays linearly).
12. An answer that was cut at the length limit loses `missing_eos_penalty`, but not when most of them were cut: the limit is
    to blame then, and the penalty would teach brevity instead of an end.
"""

from __future__ import annotations

import gc
import logging
import math
import random
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F

from engine.errors import TrainingFailed, UsageError
from trainer import distributed, weights
from trainer.hf import StepCallback, compute_learning_rate_factor, ignore_step, require_finite
from trainer.sft import IGNORE_INDEX
from trainer.weights import Hardware

logger = logging.getLogger("charter.trainer")
_IMPORTANCE_WEIGHT_CAP = 2.0
_KL_WEIGHT_CAP = 10.0
_MIN_STD = 1e-4
_MAX_GRAD_NORM = 1.0
_MIN_VALUE_LEARNING_RATE = 1e-5  # at PPO's usual 1e-6 a linear head that starts at zero would learn next to nothing
_MAX_TRUNCATED_FRACTION = 0.5
_KL_WINDOW = 64  # rollouts over which the KL of an update is averaged: of fewer it is too noisy to stop at


@dataclass(frozen=True)
class Rollout:
    """One sampled answer: exact ids, and the log-probabilities under which it was sampled."""

    prompt_token_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    ends_with_eos: bool
    policy_version: int
    record_id: str
    temperature: float = 1.0


@dataclass(frozen=True)
class PPOConfig:
    """As in `recipe`: clip 0.2, value clip 0.2, value coefficient 0.1, gamma 1, lambda 0.95, beta 0.02."""

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


# The maths. Tensors are (B, T) over answer tokens; masks are 1 on real tokens.


def _masked_mean(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return (x * mask).sum() / mask.sum().clamp(min=1)


def logprobs_from_logits(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """log p(token) from logits (..., V) and tokens (...)."""
    return torch.log_softmax(logits, dim=-1).gather(-1, tokens[..., None])[..., 0]


def _entropy_from_logits(logits: torch.Tensor) -> torch.Tensor:
    """-sum p log p in nats, from logits (..., V)."""
    logp = torch.log_softmax(logits, dim=-1)
    return -(logp.exp() * logp).sum(-1)


def kl_k1(logp: torch.Tensor, logq: torch.Tensor) -> torch.Tensor:
    """The unbiased estimate of KL(p || q) per token, from samples of p; may be negative (Schulman 2020, "k1")."""
    return logp - logq


def kl_k3(logp: torch.Tensor, logq: torch.Tensor) -> torch.Tensor:
    """The estimate of KL(p || q) per token that is never negative (Schulman 2020, "k3")."""
    return torch.expm1(logq - logp) - (logq - logp)


def estimate_policy_kl(logp: torch.Tensor, logq: torch.Tensor, sampling_logp: torch.Tensor) -> torch.Tensor:
    """The estimate of KL(p || q) per token from samples of a third distribution: k3 weighted with min(p / sampled, 10).

    Never negative. Without the weight a token that p has just learned to avoid counts q / p, thousands of nats for one token;
    without the cap one that p has just learned to prefer does. The cap makes the estimate too low where it binds.
    """
    return torch.exp(logp - sampling_logp).clamp(max=_KL_WEIGHT_CAP) * kl_k3(logp, logq)


def estimate_update_kl(old_logprobs: torch.Tensor, new_logprobs: torch.Tensor) -> torch.Tensor:
    """The estimate of KL(old || new) per token, from samples of `old`: k3 with the ratio new / old capped at 10.

    Never negative. The cap keeps one token that was rare and is likely now from ending an update alone; it makes the estimate
    too low where it binds.
    """
    return kl_k3(old_logprobs, torch.minimum(new_logprobs, old_logprobs + math.log(_KL_WEIGHT_CAP)))


def compute_token_rewards(
    kl: torch.Tensor, scores: torch.Tensor, lengths: torch.Tensor, beta: float, mask: torch.Tensor
) -> torch.Tensor:
    """-beta * kl on every token, and the score (B,) on the last one."""
    rewards = -beta * kl * mask
    rewards[torch.arange(len(lengths), device=rewards.device), lengths - 1] += scores
    return rewards


def compute_gae(
    rewards: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, gamma: float, gae_lambda: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Advantages and returns (B, T): delta_t = r_t + gamma V_t+1 - V_t, A_t = delta_t + gamma lambda A_t+1 (2015, eq. 16)."""
    values = values * mask
    advantages = torch.zeros_like(rewards)
    running = torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        following = values[:, t + 1] if t + 1 < rewards.shape[1] else torch.zeros_like(running)
        delta = rewards[:, t] + gamma * following - values[:, t]
        running = (delta + gamma * gae_lambda * running) * mask[:, t]
        advantages[:, t] = running
    return advantages, advantages + values


def subtract_baseline(scores: torch.Tensor, prompts: Sequence[object], baseline: str) -> torch.Tensor:
    """By how much each score (N,) exceeds the mean score of the other answers to its prompt (`prompts`, one for each score).

    With baseline "batch", and for an answer that is the only one to its prompt: the mean of all scores. Raises TrainingFailed when
    nothing differs, for Adam would make full steps of rounding errors.
    """
    compared = scores - scores.mean()
    groups: dict[object, list[int]] = {}
    for row, prompt in enumerate(prompts):
        groups.setdefault(prompt, []).append(row)
    for rows in groups.values() if baseline == "prompt" else ():
        if (count := len(rows)) > 1:
            compared[rows] = (scores[rows] - scores[rows].mean()) * count / (count - 1)
    if compared.std(correction=0) < _MIN_STD:
        same = scores.std(correction=0) < _MIN_STD
        raise TrainingFailed(
            f"the reward of all {len(scores)} answers is the same"
            if same
            else f"no reward of {len(scores)} answers differs from those of the other answers to the same prompt",
            "none of them is better than another, and nothing of this update was saved; the last policy stays in use",
            "wait for more answers, or look at these and their reward: charter tail responses, charter tail scores",
        )
    return compared


def scale_to_unit_std(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Deviation 1 over real tokens, zeros kept at zero; left as it is when it hardly varies."""
    deviation = _masked_mean((x - _masked_mean(x, mask)) ** 2, mask).sqrt()
    return x if deviation < _MIN_STD else x / deviation * mask


def compute_value_weight(values: torch.Tensor, rewards: torch.Tensor, mask: torch.Tensor, gamma: float) -> float:
    """How far values (B, T) are borne out: the regression coefficient of the rewards to come on them, kept in [0, 1]."""
    to_come, _ = compute_gae(rewards, torch.zeros_like(values), mask, gamma, 1.0)
    v, r = (x[mask.bool()] - _masked_mean(x, mask) for x in (values, to_come))
    spread = float((v * v).sum())
    return max(0.0, min(1.0, float((v * r).sum()) / spread)) if spread > 0 else 0.0


def compute_clipped_policy_loss(
    logprobs: torch.Tensor, old_logprobs: torch.Tensor, advantages: torch.Tensor, importance_weights: torch.Tensor, clip: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Per token: the clipped loss (2017, eq. 7) with its importance weight, and whether the clip bound it."""
    ratio = torch.exp(logprobs - old_logprobs)
    free, bound = -advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip)
    return importance_weights * torch.maximum(free, bound), (bound > free).float()


def compute_clipped_value_loss(
    values: torch.Tensor, old_values: torch.Tensor, returns: torch.Tensor, clip: float
) -> torch.Tensor:
    """Per token: half the larger of the squared errors with the value free, and kept within `clip` of the old one."""
    kept = old_values + (values - old_values).clamp(-clip, clip)
    return 0.5 * torch.maximum((values - returns) ** 2, (kept - returns) ** 2)


def adapt_beta(beta: float, kl: float, kl_target: float) -> float:
    """The next update's beta (Schulman et al. 2017, section 4); a KL estimate of zero or below never lowers it."""
    if kl > 1.5 * kl_target:
        return 2 * beta
    return beta / 2 if 0 < kl < kl_target / 1.5 else beta


def compute_explained_variance(values: torch.Tensor, returns: torch.Tensor, mask: torch.Tensor) -> float:
    """1 - Var(returns - values) / Var(returns) over real tokens; 0 when returns do not vary."""
    kept = mask.bool()
    spread = returns[kept].var(correction=0)
    if spread < 1e-12:
        return 0.0
    return float(1 - (returns - values)[kept].var(correction=0) / spread)


# The model: a policy with a value head on its trunk.


class ActorCritic(torch.nn.Module):
    """The policy, and a linear value head on its last hidden state."""

    def __init__(self, policy: Any, hardware: Hardware = weights.DEFAULT_HARDWARE) -> None:
        super().__init__()
        self.policy, self.hardware = weights.prepare_for_training(policy, hardware), hardware
        base = policy.get_base_model() if weights.has_adapter(policy) else policy
        self.backbone = getattr(base, base.base_model_prefix)
        self.lm_head = base.get_output_embeddings()
        config = base.config.get_text_config()
        self.logit_softcap = getattr(config, "final_logit_softcapping", None)
        self.value_head = torch.nn.Linear(config.hidden_size, 1, device=base.device)
        torch.nn.init.zeros_(self.value_head.weight)
        torch.nn.init.zeros_(self.value_head.bias)
        self.require_plain_logits(base)

    def compute_hidden_states(self, input_ids: torch.Tensor) -> torch.Tensor:
        """The last hidden states (B, T, H) of right-padded ids (B, T)."""
        states: torch.Tensor = self.backbone(input_ids=input_ids, use_cache=False).last_hidden_state
        return states

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """fp32 logits (..., V)."""
        logits: torch.Tensor = self.lm_head(hidden_states).float()
        return logits if self.logit_softcap is None else self.logit_softcap * torch.tanh(logits / self.logit_softcap)

    def forward(self, batch: _PaddedRollouts, *, entropy: bool = False) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Log-probabilities of the answer tokens, values before each of them, and entropies: all (B, T_answer)."""
        # Only the places that predict answer tokens go through the (large) output layer: N = all answer tokens.
        kept = batch.completion_mask.bool()
        row, place = kept.nonzero(as_tuple=True)
        hidden = self.compute_hidden_states(batch.input_ids)[row, batch.logit_positions[row, place]]
        logits = self.compute_logits(hidden) / batch.temperatures[row, None]
        logp = logprobs_from_logits(logits, batch.completion_ids[row, place])
        with torch.no_grad():
            spread = _entropy_from_logits(logits) if entropy else torch.zeros_like(logp)
        # Not as a matrix product, which autocast would round to bf16: values are regressed on, three digits are too few.
        values = (hidden.float() * self.value_head.weight[0]).sum(-1) + self.value_head.bias

        def spread_out(of_tokens: torch.Tensor) -> torch.Tensor:
            return torch.zeros_like(batch.completion_mask).masked_scatter(kept, of_tokens)

        return spread_out(logp), spread_out(values), spread_out(spread)

    @torch.no_grad()
    def require_plain_logits(self, base_model: Any) -> None:
        """Raise UsageError for a model that does more to its logits than we know of: every probability would be wrong."""
        ids = torch.tensor([[1, 2, 3]], device=base_model.device)
        if not torch.allclose(
            self.compute_logits(self.compute_hidden_states(ids)),
            base_model(input_ids=ids, use_cache=False).logits.float(),
            atol=1e-3,
        ):
            raise UsageError(
                f"PPO cannot train a {base_model.config.model_type}",
                "its logits are not those of its output layer alone",
                'choose another models.policy, or set train.rl_method = "dpo"',
            )


@dataclass(frozen=True)
class _PaddedRollouts:
    """Rollouts as right-padded tensors: ids (B, T); tokens, mask and `before` (B, T_answer); temperature (B,)."""

    input_ids: torch.Tensor
    completion_ids: torch.Tensor
    completion_mask: torch.Tensor
    logit_positions: torch.Tensor  # the position whose output predicts each answer token
    temperatures: torch.Tensor


def pad_rollouts(rollouts: Sequence[Rollout], completion_length: int, device: torch.device | str) -> _PaddedRollouts:
    """Tensors of some rollouts; `width` is T_answer."""
    longest = max(_get_sequence_length(r) for r in rollouts)
    ids = torch.zeros(len(rollouts), longest, dtype=torch.long)
    tokens, before = (torch.zeros(len(rollouts), completion_length, dtype=torch.long) for _ in range(2))
    mask = torch.zeros(len(rollouts), completion_length)
    for row, rollout in enumerate(rollouts):
        start, count = len(rollout.prompt_token_ids), len(rollout.token_ids)
        ids[row, : start + count] = torch.tensor([*rollout.prompt_token_ids, *rollout.token_ids])
        tokens[row, :count] = torch.tensor(rollout.token_ids)
        before[row, :count] = torch.arange(start - 1, start + count - 1)
        mask[row, :count] = 1.0
    temperature = torch.tensor([r.temperature for r in rollouts])
    return _PaddedRollouts(*(x.to(device) for x in (ids, tokens, mask, before, temperature)))


def _get_sequence_length(rollout: Rollout) -> int:
    return len(rollout.prompt_token_ids) + len(rollout.token_ids)


def _make_micro_batches(rollouts: Sequence[Rollout], indices: Sequence[int], micro_batch_size: int) -> list[list[int]]:
    """Rows of similar length together, so that little is padded."""
    order = sorted(indices, key=lambda i: _get_sequence_length(rollouts[i]))
    return [order[i : i + micro_batch_size] for i in range(0, len(order), micro_batch_size)]


@torch.no_grad()
def compute_logprobs_and_values(
    actor: ActorCritic, rollouts: Sequence[Rollout], completion_length: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities and values of all rollouts (N, width), computed in small batches of similar length."""
    device = actor.value_head.weight.device
    logp = torch.zeros(len(rollouts), completion_length, device=device)
    values = torch.zeros_like(logp)
    for rows in _make_micro_batches(rollouts, range(len(rollouts)), actor.hardware.micro_batch_size):
        with actor.hardware.autocast():
            some_logp, some_values, _ = actor(pad_rollouts([rollouts[i] for i in rows], completion_length, device))
        logp[rows], values[rows] = some_logp, some_values
    return logp, values


# One update: what is fixed at its start, and the steps.


@dataclass(frozen=True)
class _PPOBatch:
    """What stays fixed during an update, (N, T) each: see the module's docstring."""

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
    """Rewards, advantages and importance weights of an update."""
    lengths = torch.tensor([len(r.token_ids) for r in rollouts], device=old_logprobs.device)
    mask = (torch.arange(old_logprobs.shape[1], device=old_logprobs.device)[None] < lengths[:, None]).float()
    behaviour = torch.zeros_like(old_logprobs)
    for row, rollout in enumerate(rollouts):
        behaviour[row, : len(rollout.logprobs)] = torch.tensor(rollout.logprobs)
    cut = torch.tensor([0.0 if r.ends_with_eos else config.missing_eos_penalty for r in rollouts])
    prompts = [r.prompt_token_ids for r in rollouts]
    handed_out = subtract_baseline(torch.tensor(list(scores)) - cut, prompts, config.baseline).to(old_logprobs.device)
    rewards = compute_token_rewards(kl_k1(old_logprobs, ref_logprobs), handed_out, lengths, config.beta, mask)
    weight = compute_value_weight(old_values, rewards, mask, config.gae_gamma)
    advantages, returns = compute_gae(rewards, weight * old_values, mask, config.gae_gamma, config.gae_lambda)
    importance = torch.exp((old_logprobs - behaviour) * mask).clamp(max=_IMPORTANCE_WEIGHT_CAP) * mask
    return _PPOBatch(
        old_logprobs,
        ref_logprobs,
        base_logprobs,
        old_values,
        importance,
        scale_to_unit_std(advantages, mask),
        returns,
        mask,
        weight,
    )


def _warn_single_completions(config: PPOConfig, rollouts: Sequence[Rollout]) -> None:
    """Say how many answers have no other one to their prompt, and so no baseline of their own."""
    counts = Counter(r.prompt_token_ids for r in rollouts)
    alone = sum(count == 1 for count in counts.values())
    if alone and config.baseline == "prompt":
        logger.warning(
            "%d of %d answers are the only one to their prompt and are compared with the mean of all (respond.num_completions)",
            alone,
            len(rollouts),
        )


def _disable_penalty_if_mostly_truncated(config: PPOConfig, rollouts: Sequence[Rollout]) -> PPOConfig:
    """No missing-EOS penalty where most answers were cut at the limit; the log says so."""
    cut = sum(not r.ends_with_eos for r in rollouts) / len(rollouts)
    if not config.missing_eos_penalty or cut <= _MAX_TRUNCATED_FRACTION:
        return config
    logger.warning(
        "no missing-EOS penalty in this update: %.0f %% of its answers were cut at the limit (respond.max_tokens)", 100 * cut
    )
    return replace(config, missing_eos_penalty=0.0)


@dataclass(frozen=True)
class TrainedPolicy:
    """The policy after an update, and how it is saved: whole, with what the next update goes on from (`weights.RL`)."""

    policy: Any
    tokenizer: Any
    save: Callable[[Path], None]


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
    """One PPO update on scored rollouts; returns the policy and metrics.

    `scores` are normalised, one for each rollout. `sl_rows` (ids and labels, from `sft.encode`) message on the combined
    objective. The metrics are means over the last epoch; `stopped_early` = 1 when a KL limit ended the update. Raises
    TrainingFailed when a number is not finite or the scores are all equal, UsageError for folders that do not belong together.
    """
    torch.manual_seed(seed)
    weights.require_compatible_models(policy_folder, reference_folder, "the reference policy")
    config = _disable_penalty_if_mostly_truncated(config, rollouts)
    _warn_single_completions(config, rollouts)
    width = max(len(r.token_ids) for r in rollouts)
    # The other models are read, asked and let go before the policy is loaded: one set of weights in memory at any time.
    same = policy_folder == reference_folder
    first = None if base_folder is None else compute_model_logprobs(base_folder, rollouts, width, hardware)
    reference = None
    if not same and not (lora_rank and weights.has_adapter_for_reference(policy_folder, reference_folder)):
        reference = compute_model_logprobs(reference_folder, rollouts, width, hardware)
    policy, off_is_reference = weights.load_policy_for_rl(policy_folder, reference_folder, lora_rank)
    actor = ActorCritic(policy, hardware)
    if kept := weights.load_value_head(policy_folder):
        actor.value_head.load_state_dict(kept)
    prox, old_values = compute_logprobs_and_values(actor, rollouts, width)
    if reference is None:
        reference = prox if same else compute_ref_logprobs(actor, rollouts, width)
    targets = prepare_batch(rollouts, scores, prox, old_values, reference, first, config)
    _require_within_kl_limits(targets, config)
    metrics = _optimize_policy(actor, rollouts, targets, config, sl_rows, seed, lora_rank, on_step)
    tokenizer = weights.load_tokenizer(policy_folder)
    save = weights.make_rl_saver(
        policy, tokenizer, actor.value_head.state_dict(), reference_folder if off_is_reference else None
    )
    return TrainedPolicy(policy, tokenizer, save), metrics | _summarize_update(rollouts, scores, targets, config)


def compute_ref_logprobs(actor: ActorCritic, rollouts: Sequence[Rollout], completion_length: int) -> torch.Tensor:
    """Log-probabilities (N, width) of the policy without its adapter."""
    with weights.disable_adapter(actor.policy):
        return compute_logprobs_and_values(actor, rollouts, completion_length)[0]


def compute_model_logprobs(
    folder: Path, rollouts: Sequence[Rollout], completion_length: int, hardware: Hardware
) -> torch.Tensor:
    """Log-probabilities (N, width) under another model, which is loaded for this and let go."""
    actor = ActorCritic(weights.load_policy(folder), hardware)
    logp = compute_logprobs_and_values(actor, rollouts, completion_length)[0]
    del actor
    gc.collect()
    return logp


def _require_within_kl_limits(batch: _PPOBatch, config: PPOConfig) -> None:
    """Raise TrainingFailed when the policy is past a limit before the first step: it would not be made, and nothing learned."""
    kls = {
        name: _compute_sequence_kl(batch, other)
        for name, other in (("kl_ref", batch.ref_logprobs), ("kl_base", batch.base_logprobs))
        if other is not None
    }
    if limit := find_exceeded_limit(kls, config):
        what = {"max_kl": "kl_ref", "max_kl_base": "kl_base"}[limit]
        raise TrainingFailed(
            f"the policy is {kls[what]:.1f} nats per answer away from the {'reference' if what == 'kl_ref' else 'first model'}",
            f"that is past ppo.{limit} = {getattr(config, limit):g} before the first step, and nothing was trained",
            f"go back to an earlier policy (charter policy rollback), train SFT, or set ppo.{limit}",
        )


def _compute_sequence_kl(batch: _PPOBatch, other_logprobs: torch.Tensor) -> float:
    """The estimate of KL(proximal || other), nats per sequence, from the proximal policy's own answers."""
    return float((kl_k1(batch.old_logprobs, other_logprobs) * batch.mask).sum(-1).mean())


def _summarize_update(
    rollouts: Sequence[Rollout], scores: Sequence[float], batch: _PPOBatch, config: PPOConfig
) -> dict[str, float]:
    """What an update says of its rollouts, and the next update's beta."""
    kl = _compute_sequence_kl(batch, batch.ref_logprobs)
    return {
        "beta": adapt_beta(config.beta, kl, config.kl_target),
        "kl_rollouts": kl,
        "value_weight": batch.value_weight,
        "reward_mean": sum(scores) / len(scores),
        "rollouts": float(len(rollouts)),
        "truncated_fraction": sum(not r.ends_with_eos for r in rollouts) / len(rollouts),
        "missing_eos_penalty": config.missing_eos_penalty,
        "importance_mean": float(_masked_mean(batch.importance_weights, batch.mask)),
        "answer_tokens": float(batch.mask.sum()),
    }


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
    """Epochs of minibatches; returns the means of the last epoch's metrics."""
    trained, optimizer = _create_optimizer(actor, config, lora_rank)
    steps = config.epochs * math.ceil(len(rollouts) / config.batch_size)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda done: (
            compute_learning_rate_factor(done, steps, config.warmup_ratio) if config.lr_scheduler_type == "linear" else 1.0
        ),
    )
    moved: deque[float] = deque(maxlen=math.ceil(_KL_WINDOW / config.batch_size))
    shuffle, step, epoch = random.Random(seed), 0, [dict[str, float]()]
    for _ in range(config.epochs):
        order, epoch = list(range(len(rollouts))), []
        shuffle.shuffle(order)
        for start in range(0, len(order), config.batch_size):
            rows = order[start : start + config.batch_size]
            metrics = _accumulate_rl_gradients(actor, rollouts, rows, batch, config, config.alpha if sl_rows else 1.0)
            if sl_rows:
                chosen = [sl_rows[(start + i) % len(sl_rows)] for i in range(len(rows))]
                metrics["sl_loss"] = _accumulate_sl_gradients(actor, chosen)
            distributed.all_reduce_gradients(trained)
            metrics["grad_norm"] = float(torch.nn.utils.clip_grad_norm_(trained, _MAX_GRAD_NORM))
            require_finite(step + 1, metrics)
            moved.append(metrics["kl_update"])
            metrics["kl_update"] = sum(moved) / len(moved)
            metrics["stopped_early"] = float(step > 0 and bool(find_exceeded_limit(metrics, config)))
            if metrics["stopped_early"]:
                on_step(step + 1, metrics)
                return metrics | {"steps": float(step)}
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            step += 1
            on_step(step, metrics)
            epoch.append(metrics)
    return {name: sum(m[name] for m in epoch) / len(epoch) for name in epoch[0]} | {"steps": float(step)}


def find_exceeded_limit(metrics: Mapping[str, float], config: PPOConfig) -> str:
    """The setting whose limit these metrics pass; empty where they pass none."""
    limits = {"max_kl_update": "kl_update", "max_kl": "kl_ref", "max_kl_base": "kl_base"}
    return next((limit for limit, name in limits.items() if metrics.get(name, 0.0) > getattr(config, limit)), "")


def _create_optimizer(
    actor: ActorCritic, config: PPOConfig, lora_rank: int
) -> tuple[list[torch.nn.Parameter], torch.optim.Optimizer]:
    """Adam over the policy and the value head."""
    policy = [parameter for parameter in actor.policy.parameters() if parameter.requires_grad]
    head = list(actor.value_head.parameters())
    rate = config.learning_rate * (weights.LORA_LEARNING_RATE_FACTOR if lora_rank else 1.0)
    groups = [{"params": policy, "lr": rate}, {"params": head, "lr": max(rate, _MIN_VALUE_LEARNING_RATE)}]
    return [*policy, *head], torch.optim.AdamW(groups, weight_decay=0.0, fused=True)


def _accumulate_rl_gradients(
    actor: ActorCritic,
    rollouts: Sequence[Rollout],
    indices: Sequence[int],
    batch: _PPOBatch,
    config: PPOConfig,
    loss_scale: float,
) -> dict[str, float]:
    """Accumulate the gradients of one minibatch, in micro-batches whose losses add up to the token mean; returns metrics.

    Several processes take a part of the rows each: gradients are those of the part, metrics those of all rows.
    """
    tokens = float(batch.mask[list(indices)].sum())
    sums: dict[str, float] = {}
    ratio_max = 0.0
    for some in _make_micro_batches(rollouts, distributed.shard_rows(indices), actor.hardware.micro_batch_size):
        mask = batch.mask[some]
        with actor.hardware.autocast():
            logp, values, entropy = actor(pad_rollouts([rollouts[i] for i in some], mask.shape[1], mask.device), entropy=True)
        policy, clipped = compute_clipped_policy_loss(
            logp, batch.old_logprobs[some], batch.advantages[some], batch.importance_weights[some], config.clip
        )
        value = compute_clipped_value_loss(values, batch.old_values[some], batch.returns[some], config.value_clip)
        kl = kl_k3(batch.old_logprobs[some], logp)
        loss = ((policy + config.value_coefficient * value + config.kl_coefficient * kl) * mask).sum() / tokens
        (loss_scale * loss).backward()
        new = logp.detach()
        ratio_max = max(ratio_max, float(torch.exp((new - batch.old_logprobs[some]) * mask).max()))
        parts = {
            "policy_loss": policy.detach(),
            "value_loss": value.detach(),
            "entropy": entropy,
            "approx_kl": kl.detach(),
            "kl_update": estimate_update_kl(batch.old_logprobs[some], new),
            "clipfrac": clipped,
            "kl_ref_per_token": estimate_policy_kl(new, batch.ref_logprobs[some], batch.old_logprobs[some]),
        }
        if batch.base_logprobs is not None:
            parts["kl_base"] = estimate_policy_kl(new, batch.base_logprobs[some], batch.old_logprobs[some])
        for name, part in parts.items():
            sums[name] = sums.get(name, 0.0) + float((part * mask).sum())
    sums = distributed.sum_over_processes(sums)
    per_sequence = {"kl_update", "kl_base"} & sums.keys()
    metrics = {name: value / (len(indices) if name in per_sequence else tokens) for name, value in sums.items()}
    metrics["kl_ref"] = sums["kl_ref_per_token"] / len(indices)
    metrics["ratio_max"] = distributed.max_over_processes(ratio_max)
    index = list(indices)
    metrics["explained_variance"] = compute_explained_variance(batch.old_values[index], batch.returns[index], batch.mask[index])
    return metrics


def _accumulate_sl_gradients(actor: ActorCritic, rows: Sequence[dict[str, list[int]]]) -> float:
    """Accumulate the gradients of the supervised loss (token mean) of one minibatch; returns the loss."""
    tokens = sum(label != IGNORE_INDEX for row in rows for label in row["labels"][1:])
    total, size, own = 0.0, actor.hardware.micro_batch_size, distributed.shard_rows(rows)
    for start in range(0, len(own), size):
        loss = compute_sl_loss(actor, own[start : start + size]) / max(1, tokens)
        loss.backward()
        total += float(loss.detach())
    return distributed.sum_over_processes({"sl": total})["sl"]


def compute_sl_loss(actor: ActorCritic, rows: Sequence[dict[str, list[int]]]) -> torch.Tensor:
    """Summed negative log-likelihood of the labels."""
    longest = max(len(row["input_ids"]) for row in rows)
    device = actor.value_head.weight.device

    def tensor(key: str, filler: int) -> torch.Tensor:
        return torch.tensor([row[key] + [filler] * (longest - len(row[key])) for row in rows], device=device)

    ids, labels = tensor("input_ids", 0), tensor("labels", IGNORE_INDEX)[:, 1:]
    kept = labels != IGNORE_INDEX
    with actor.hardware.autocast():
        logits = actor.compute_logits(actor.compute_hidden_states(ids)[:, :-1][kept])
    return F.cross_entropy(logits, labels[kept], reduction="sum")
