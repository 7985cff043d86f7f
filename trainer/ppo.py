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

from engine.errors import CannotLearn, UsageError
from trainer import processes, weights
from trainer.hf import OnStep, ignore, learning_rate_factor, require_finite
from trainer.sft import IGNORED
from trainer.weights import Hardware

log = logging.getLogger("charter.trainer")
IMPORTANCE_CAP = 2.0
KL_WEIGHT_CAP = 10.0
LEAST_DEVIATION = 1e-4
MAX_GRAD_NORM = 1.0
LEAST_VALUE_RATE = 1e-5  # at PPO's usual 1e-6 a linear head that starts at zero would learn next to nothing
MOSTLY_CUT = 0.5
KL_WINDOW = 64  # rollouts over which the KL of an update is averaged: of fewer it is too noisy to stop at


@dataclass(frozen=True)
class Rollout:
    """One sampled answer: exact ids, and the log-probabilities under which it was sampled."""

    prompt_token_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    stopped: bool
    policy_version: int
    record_id: str
    temperature: float = 1.0


@dataclass(frozen=True)
class Hyperparameters:
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
    kl_stop: float = 30.0
    kl_first_stop: float = 200.0
    baseline: Literal["prompt", "batch"] = "prompt"
    missing_eos_penalty: float = 0.0
    alpha: float = 1.0


# The maths. Tensors are (B, T) over answer tokens; masks are 1 on real tokens.


def masked_mean(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return (x * mask).sum() / mask.sum().clamp(min=1)


def logprobs_from_logits(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """log p(token) from logits (..., V) and tokens (...)."""
    return torch.log_softmax(logits, dim=-1).gather(-1, tokens[..., None])[..., 0]


def entropies(logits: torch.Tensor) -> torch.Tensor:
    """-sum p log p in nats, from logits (..., V)."""
    logp = torch.log_softmax(logits, dim=-1)
    return -(logp.exp() * logp).sum(-1)


def kl_k1(logp: torch.Tensor, logq: torch.Tensor) -> torch.Tensor:
    """The unbiased estimate of KL(p || q) per token, from samples of p; may be negative (Schulman 2020, "k1")."""
    return logp - logq


def kl_k3(logp: torch.Tensor, logq: torch.Tensor) -> torch.Tensor:
    """The estimate of KL(p || q) per token that is never negative (Schulman 2020, "k3")."""
    return torch.expm1(logq - logp) - (logq - logp)


def kl_of_policy(logp: torch.Tensor, logq: torch.Tensor, log_sampled: torch.Tensor) -> torch.Tensor:
    """The estimate of KL(p || q) per token from samples of a third distribution: k3 weighted with min(p / sampled, 10).

    Never negative. Without the weight a token that p has just learned to avoid counts q / p, thousands of nats for one token;
    without the cap one that p has just learned to prefer does. The cap makes the estimate too low where it binds.
    """
    return torch.exp(logp - log_sampled).clamp(max=KL_WEIGHT_CAP) * kl_k3(logp, logq)


def kl_moved(old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """The estimate of KL(old || new) per token, from samples of `old`: k3 with the ratio new / old capped at 10.

    Never negative. The cap keeps one token that was rare and is likely now from ending an update alone; it makes the estimate
    too low where it binds.
    """
    return kl_k3(old, torch.minimum(new, old + math.log(KL_WEIGHT_CAP)))


def token_rewards(
    kl: torch.Tensor, scores: torch.Tensor, lengths: torch.Tensor, beta: float, mask: torch.Tensor
) -> torch.Tensor:
    """-beta * kl on every token, and the score (B,) on the last one."""
    rewards = -beta * kl * mask
    rewards[torch.arange(len(lengths), device=rewards.device), lengths - 1] += scores
    return rewards


def gae(
    rewards: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, gamma: float, lam: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Advantages and returns (B, T): delta_t = r_t + gamma V_t+1 - V_t, A_t = delta_t + gamma lambda A_t+1 (2015, eq. 16)."""
    values = values * mask
    advantages = torch.zeros_like(rewards)
    running = torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        following = values[:, t + 1] if t + 1 < rewards.shape[1] else torch.zeros_like(running)
        delta = rewards[:, t] + gamma * following - values[:, t]
        running = (delta + gamma * lam * running) * mask[:, t]
        advantages[:, t] = running
    return advantages, advantages + values


def compare_scores(scores: torch.Tensor, prompts: Sequence[object], baseline: str) -> torch.Tensor:
    """By how much each score (N,) exceeds the mean score of the other answers to its prompt (`prompts`, one for each score).

    With baseline "batch", and for an answer that is the only one to its prompt: the mean of all scores. Raises CannotLearn when
    nothing differs, for Adam would make full steps of rounding errors.
    """
    compared = scores - scores.mean()
    groups: dict[object, list[int]] = {}
    for row, prompt in enumerate(prompts):
        groups.setdefault(prompt, []).append(row)
    for rows in groups.values() if baseline == "prompt" else ():
        if (count := len(rows)) > 1:
            compared[rows] = (scores[rows] - scores[rows].mean()) * count / (count - 1)
    if compared.std(correction=0) < LEAST_DEVIATION:
        same = scores.std(correction=0) < LEAST_DEVIATION
        raise CannotLearn(
            f"the reward of all {len(scores)} answers is the same"
            if same
            else f"no reward of {len(scores)} answers differs from those of the other answers to the same prompt",
            "none of them is better than another, and nothing of this update was saved; the last policy stays in use",
            "wait for more answers, or look at these and their reward: charter tail responses, charter tail scores",
        )
    return compared


def scale(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Deviation 1 over real tokens, zeros kept at zero; left as it is when it hardly varies."""
    deviation = masked_mean((x - masked_mean(x, mask)) ** 2, mask).sqrt()
    return x if deviation < LEAST_DEVIATION else x / deviation * mask


def value_weight(values: torch.Tensor, rewards: torch.Tensor, mask: torch.Tensor, gamma: float) -> float:
    """How far values (B, T) are borne out: the regression coefficient of the rewards to come on them, kept in [0, 1]."""
    to_come, _ = gae(rewards, torch.zeros_like(values), mask, gamma, 1.0)
    v, r = (x[mask.bool()] - masked_mean(x, mask) for x in (values, to_come))
    spread = float((v * v).sum())
    return max(0.0, min(1.0, float((v * r).sum()) / spread)) if spread > 0 else 0.0


def clipped_policy_loss(
    logp: torch.Tensor, prox: torch.Tensor, advantages: torch.Tensor, importance: torch.Tensor, clip: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Per token: the clipped loss (2017, eq. 7) with its importance weight, and whether the clip bound it."""
    ratio = torch.exp(logp - prox)
    free, bound = -advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip)
    return importance * torch.maximum(free, bound), (bound > free).float()


def clipped_value_loss(values: torch.Tensor, old: torch.Tensor, returns: torch.Tensor, clip: float) -> torch.Tensor:
    """Per token: half the larger of the squared errors with the value free, and kept within `clip` of the old one."""
    kept = old + (values - old).clamp(-clip, clip)
    return 0.5 * torch.maximum((values - returns) ** 2, (kept - returns) ** 2)


def adapted_beta(beta: float, kl: float, target: float) -> float:
    """The next update's beta (Schulman et al. 2017, section 4); a KL estimate of zero or below never lowers it."""
    if kl > 1.5 * target:
        return 2 * beta
    return beta / 2 if 0 < kl < target / 1.5 else beta


def explained_variance(values: torch.Tensor, returns: torch.Tensor, mask: torch.Tensor) -> float:
    """1 - Var(returns - values) / Var(returns) over real tokens; 0 when returns do not vary."""
    kept = mask.bool()
    spread = returns[kept].var(correction=0)
    if spread < 1e-12:
        return 0.0
    return float(1 - (returns - values)[kept].var(correction=0) / spread)


# The model: a policy with a value head on its trunk.


class Actor(torch.nn.Module):
    """The policy, and a linear value head on its last hidden state."""

    def __init__(self, policy: Any, hardware: Hardware = weights.DEFAULT) -> None:
        super().__init__()
        self.policy, self.hardware = weights.prepare(policy, hardware), hardware
        base = policy.get_base_model() if weights.adapted(policy) else policy
        self.trunk = getattr(base, base.base_model_prefix)
        self.output = base.get_output_embeddings()
        config = base.config.get_text_config()
        self.softcap = getattr(config, "final_logit_softcapping", None)
        self.value = torch.nn.Linear(config.hidden_size, 1, device=base.device)
        torch.nn.init.zeros_(self.value.weight)
        torch.nn.init.zeros_(self.value.bias)
        self.require_plain_output(base)

    def hidden(self, ids: torch.Tensor) -> torch.Tensor:
        """The last hidden states (B, T, H) of right-padded ids (B, T)."""
        states: torch.Tensor = self.trunk(input_ids=ids, use_cache=False).last_hidden_state
        return states

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """fp32 logits (..., V)."""
        logits: torch.Tensor = self.output(hidden).float()
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def forward(self, batch: Padded, *, entropy: bool = False) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Log-probabilities of the answer tokens, values before each of them, and entropies: all (B, T_answer)."""
        # Only the places that predict answer tokens go through the (large) output layer: N = all answer tokens.
        kept = batch.mask.bool()
        row, place = kept.nonzero(as_tuple=True)
        hidden = self.hidden(batch.ids)[row, batch.before[row, place]]
        logits = self.logits(hidden) / batch.temperature[row, None]
        logp = logprobs_from_logits(logits, batch.tokens[row, place])
        with torch.no_grad():
            spread = entropies(logits) if entropy else torch.zeros_like(logp)
        # Not as a matrix product, which autocast would round to bf16: values are regressed on, three digits are too few.
        values = (hidden.float() * self.value.weight[0]).sum(-1) + self.value.bias

        def spread_out(of_tokens: torch.Tensor) -> torch.Tensor:
            return torch.zeros_like(batch.mask).masked_scatter(kept, of_tokens)

        return spread_out(logp), spread_out(values), spread_out(spread)

    @torch.no_grad()
    def require_plain_output(self, base: Any) -> None:
        """Raise UsageError for a model that does more to its logits than we know of: every probability would be wrong."""
        ids = torch.tensor([[1, 2, 3]], device=base.device)
        if not torch.allclose(self.logits(self.hidden(ids)), base(input_ids=ids, use_cache=False).logits.float(), atol=1e-3):
            raise UsageError(
                f"PPO cannot train a {base.config.model_type}",
                "its logits are not those of its output layer alone",
                'choose another models.policy, or set train.policy_learner = "dpo"',
            )


@dataclass(frozen=True)
class Padded:
    """Rollouts as right-padded tensors: ids (B, T); tokens, mask and `before` (B, T_answer); temperature (B,)."""

    ids: torch.Tensor
    tokens: torch.Tensor
    mask: torch.Tensor
    before: torch.Tensor  # the position whose output predicts each answer token
    temperature: torch.Tensor


def pad(rollouts: Sequence[Rollout], width: int, device: torch.device | str) -> Padded:
    """Tensors of some rollouts; `width` is T_answer."""
    longest = max(length_of(r) for r in rollouts)
    ids = torch.zeros(len(rollouts), longest, dtype=torch.long)
    tokens, before = (torch.zeros(len(rollouts), width, dtype=torch.long) for _ in range(2))
    mask = torch.zeros(len(rollouts), width)
    for row, rollout in enumerate(rollouts):
        start, count = len(rollout.prompt_token_ids), len(rollout.token_ids)
        ids[row, : start + count] = torch.tensor([*rollout.prompt_token_ids, *rollout.token_ids])
        tokens[row, :count] = torch.tensor(rollout.token_ids)
        before[row, :count] = torch.arange(start - 1, start + count - 1)
        mask[row, :count] = 1.0
    temperature = torch.tensor([r.temperature for r in rollouts])
    return Padded(*(x.to(device) for x in (ids, tokens, mask, before, temperature)))


def length_of(rollout: Rollout) -> int:
    return len(rollout.prompt_token_ids) + len(rollout.token_ids)


def micro_batches(rollouts: Sequence[Rollout], rows: Sequence[int], size: int) -> list[list[int]]:
    """Rows of similar length together, so that little is padded."""
    order = sorted(rows, key=lambda i: length_of(rollouts[i]))
    return [order[i : i + size] for i in range(0, len(order), size)]


@torch.no_grad()
def evaluate(actor: Actor, rollouts: Sequence[Rollout], width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities and values of all rollouts (N, width), computed in small batches of similar length."""
    device = actor.value.weight.device
    logp = torch.zeros(len(rollouts), width, device=device)
    values = torch.zeros_like(logp)
    for rows in micro_batches(rollouts, range(len(rollouts)), actor.hardware.micro_rows):
        with actor.hardware.autocast():
            some_logp, some_values, _ = actor(pad([rollouts[i] for i in rows], width, device))
        logp[rows], values[rows] = some_logp, some_values
    return logp, values


# One update: what is fixed at its start, and the steps.


@dataclass(frozen=True)
class Targets:
    """What stays fixed during an update, (N, T) each: see the module's docstring."""

    prox: torch.Tensor
    reference: torch.Tensor
    first: torch.Tensor | None
    old_values: torch.Tensor
    importance: torch.Tensor
    advantages: torch.Tensor
    returns: torch.Tensor
    mask: torch.Tensor
    value_weight: float


def prepare(
    rollouts: Sequence[Rollout],
    scores: Sequence[float],
    prox: torch.Tensor,
    old_values: torch.Tensor,
    reference: torch.Tensor,
    first: torch.Tensor | None,
    p: Hyperparameters,
) -> Targets:
    """Rewards, advantages and importance weights of an update."""
    lengths = torch.tensor([len(r.token_ids) for r in rollouts], device=prox.device)
    mask = (torch.arange(prox.shape[1], device=prox.device)[None] < lengths[:, None]).float()
    behaviour = torch.zeros_like(prox)
    for row, rollout in enumerate(rollouts):
        behaviour[row, : len(rollout.logprobs)] = torch.tensor(rollout.logprobs)
    cut = torch.tensor([0.0 if r.stopped else p.missing_eos_penalty for r in rollouts])
    prompts = [r.prompt_token_ids for r in rollouts]
    handed_out = compare_scores(torch.tensor(list(scores)) - cut, prompts, p.baseline).to(prox.device)
    rewards = token_rewards(kl_k1(prox, reference), handed_out, lengths, p.beta, mask)
    weight = value_weight(old_values, rewards, mask, p.gae_gamma)
    advantages, returns = gae(rewards, weight * old_values, mask, p.gae_gamma, p.gae_lambda)
    importance = torch.exp((prox - behaviour) * mask).clamp(max=IMPORTANCE_CAP) * mask
    return Targets(prox, reference, first, old_values, importance, scale(advantages, mask), returns, mask, weight)


def tell_alone(p: Hyperparameters, rollouts: Sequence[Rollout]) -> None:
    """Say how many answers have no other one to their prompt, and so no baseline of their own."""
    counts = Counter(r.prompt_token_ids for r in rollouts)
    alone = sum(count == 1 for count in counts.values())
    if alone and p.baseline == "prompt":
        log.warning(
            "%d of %d answers are the only one to their prompt and are compared with the mean of all (respond.samples)",
            alone,
            len(rollouts),
        )


def without_penalty_if_mostly_cut(p: Hyperparameters, rollouts: Sequence[Rollout]) -> Hyperparameters:
    """No missing-EOS penalty where most answers were cut at the limit; the log says so."""
    cut = sum(not r.stopped for r in rollouts) / len(rollouts)
    if not p.missing_eos_penalty or cut <= MOSTLY_CUT:
        return p
    log.warning(
        "no missing-EOS penalty in this update: %.0f %% of its answers were cut at the limit (respond.max_tokens)", 100 * cut
    )
    return replace(p, missing_eos_penalty=0.0)


@dataclass(frozen=True)
class Learned:
    """The policy after an update, and how it is saved: whole, with what the next update goes on from (`weights.RL`)."""

    policy: Any
    tokenizer: Any
    save: Callable[[Path], None]


def train(
    policy_folder: Path,
    reference_folder: Path,
    rollouts: Sequence[Rollout],
    scores: Sequence[float],
    p: Hyperparameters,
    *,
    first_folder: Path | None = None,
    sl_rows: Sequence[dict[str, list[int]]] = (),
    lora_rank: int = 0,
    hardware: Hardware = weights.DEFAULT,
    seed: int = 0,
    on_step: OnStep = ignore,
) -> tuple[Learned, dict[str, float]]:
    """One PPO update on scored rollouts; returns the policy and metrics.

    `scores` are normalised, one for each rollout. `sl_rows` (ids and labels, from `sft.encode`) message on the combined
    objective. The metrics are means over the last epoch; `stopped_early` = 1 when a KL limit ended the update. Raises
    CannotLearn when a number is not finite or the scores are all equal, UsageError for folders that do not belong together.
    """
    torch.manual_seed(seed)
    weights.require_kin(policy_folder, reference_folder, "the reference policy")
    p = without_penalty_if_mostly_cut(p, rollouts)
    tell_alone(p, rollouts)
    width = max(len(r.token_ids) for r in rollouts)
    # The other models are read, asked and let go before the policy is loaded: one set of weights in memory at any time.
    same = policy_folder == reference_folder
    first = None if first_folder is None else logprobs_under(first_folder, rollouts, width, hardware)
    reference = None
    if not same and not (lora_rank and weights.adapter_is_on(policy_folder, reference_folder)):
        reference = logprobs_under(reference_folder, rollouts, width, hardware)
    policy, off_is_reference = weights.load_for_rl(policy_folder, reference_folder, lora_rank)
    actor = Actor(policy, hardware)
    if kept := weights.load_value(policy_folder):
        actor.value.load_state_dict(kept)
    prox, old_values = evaluate(actor, rollouts, width)
    if reference is None:
        reference = prox if same else reference_logprobs(actor, rollouts, width)
    targets = prepare(rollouts, scores, prox, old_values, reference, first, p)
    require_within_limits(targets, p)
    metrics = optimise(actor, rollouts, targets, p, sl_rows, seed, lora_rank, on_step)
    tokenizer = weights.load_tokenizer(policy_folder)
    save = weights.rl_saver(policy, tokenizer, actor.value.state_dict(), reference_folder if off_is_reference else None)
    return Learned(policy, tokenizer, save), metrics | summary(rollouts, scores, targets, p)


def reference_logprobs(actor: Actor, rollouts: Sequence[Rollout], width: int) -> torch.Tensor:
    """Log-probabilities (N, width) of the policy without its adapter."""
    with weights.adapter_off(actor.policy):
        return evaluate(actor, rollouts, width)[0]


def logprobs_under(folder: Path, rollouts: Sequence[Rollout], width: int, hardware: Hardware) -> torch.Tensor:
    """Log-probabilities (N, width) under another model, which is loaded for this and let go."""
    actor = Actor(weights.load_policy(folder), hardware)
    logp = evaluate(actor, rollouts, width)[0]
    del actor
    gc.collect()
    return logp


def require_within_limits(t: Targets, p: Hyperparameters) -> None:
    """Raise CannotLearn when the policy is past a limit before the first step: it would not be made, and nothing learned."""
    kls = {name: sequence_kl(t, other) for name, other in (("kl_ref", t.reference), ("kl_first", t.first)) if other is not None}
    if limit := passed_limit(kls, p):
        what = {"kl_stop": "kl_ref", "kl_first_stop": "kl_first"}[limit]
        raise CannotLearn(
            f"the policy is {kls[what]:.1f} nats per answer away from the {'reference' if what == 'kl_ref' else 'first model'}",
            f"that is past ppo.{limit} = {getattr(p, limit):g} before the first step, and nothing was trained",
            f"go back to an earlier policy (charter policy rollback), train SFT, or set ppo.{limit}",
        )


def sequence_kl(t: Targets, other: torch.Tensor) -> float:
    """The estimate of KL(proximal || other), nats per sequence, from the proximal policy's own answers."""
    return float((kl_k1(t.prox, other) * t.mask).sum(-1).mean())


def summary(rollouts: Sequence[Rollout], scores: Sequence[float], t: Targets, p: Hyperparameters) -> dict[str, float]:
    """What an update says of its rollouts, and the next update's beta."""
    kl = sequence_kl(t, t.reference)
    return {
        "beta": adapted_beta(p.beta, kl, p.kl_target),
        "kl_rollouts": kl,
        "value_weight": t.value_weight,
        "reward_mean": sum(scores) / len(scores),
        "rollouts": float(len(rollouts)),
        "cut_share": sum(not r.stopped for r in rollouts) / len(rollouts),
        "missing_eos_penalty": p.missing_eos_penalty,
        "importance_mean": float(masked_mean(t.importance, t.mask)),
        "answer_tokens": float(t.mask.sum()),
    }


def optimise(
    actor: Actor,
    rollouts: Sequence[Rollout],
    targets: Targets,
    p: Hyperparameters,
    sl_rows: Sequence[dict[str, list[int]]],
    seed: int,
    lora_rank: int,
    on_step: OnStep,
) -> dict[str, float]:
    """Epochs of minibatches; returns the means of the last epoch's metrics."""
    trained, optimizer = optimizer_of(actor, p, lora_rank)
    steps = p.epochs * math.ceil(len(rollouts) / p.batch_size)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda done: learning_rate_factor(done, steps, p.warmup_ratio) if p.lr_scheduler_type == "linear" else 1.0
    )
    moved: deque[float] = deque(maxlen=math.ceil(KL_WINDOW / p.batch_size))
    shuffle, step, epoch = random.Random(seed), 0, [dict[str, float]()]
    for _ in range(p.epochs):
        order, epoch = list(range(len(rollouts))), []
        shuffle.shuffle(order)
        for start in range(0, len(order), p.batch_size):
            rows = order[start : start + p.batch_size]
            metrics = rl_gradients(actor, rollouts, rows, targets, p, p.alpha if sl_rows else 1.0)
            if sl_rows:
                chosen = [sl_rows[(start + i) % len(sl_rows)] for i in range(len(rows))]
                metrics["sl_loss"] = sl_gradients(actor, chosen)
            processes.add_up(trained)
            metrics["grad_norm"] = float(torch.nn.utils.clip_grad_norm_(trained, MAX_GRAD_NORM))
            require_finite(step + 1, metrics)
            moved.append(metrics["kl_update"])
            metrics["kl_update"] = sum(moved) / len(moved)
            metrics["stopped_early"] = float(step > 0 and bool(passed_limit(metrics, p)))
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


def passed_limit(metrics: Mapping[str, float], p: Hyperparameters) -> str:
    """The setting whose limit these metrics pass; empty where they pass none."""
    limits = {"max_kl_update": "kl_update", "kl_stop": "kl_ref", "kl_first_stop": "kl_first"}
    return next((limit for limit, name in limits.items() if metrics.get(name, 0.0) > getattr(p, limit)), "")


def optimizer_of(actor: Actor, p: Hyperparameters, lora_rank: int) -> tuple[list[torch.nn.Parameter], torch.optim.Optimizer]:
    """Adam over the policy and the value head."""
    policy = [parameter for parameter in actor.policy.parameters() if parameter.requires_grad]
    head = list(actor.value.parameters())
    rate = p.learning_rate * (weights.LORA_SPEEDUP if lora_rank else 1.0)
    groups = [{"params": policy, "lr": rate}, {"params": head, "lr": max(rate, LEAST_VALUE_RATE)}]
    return [*policy, *head], torch.optim.AdamW(groups, weight_decay=0.0, fused=True)


def rl_gradients(
    actor: Actor, rollouts: Sequence[Rollout], rows: Sequence[int], t: Targets, p: Hyperparameters, scale: float
) -> dict[str, float]:
    """Accumulate the gradients of one minibatch, in micro-batches whose losses add up to the token mean; returns metrics.

    Several processes take a part of the rows each: gradients are those of the part, metrics those of all rows.
    """
    tokens = float(t.mask[list(rows)].sum())
    sums: dict[str, float] = {}
    ratio_max = 0.0
    for some in micro_batches(rollouts, processes.mine(rows), actor.hardware.micro_rows):
        mask = t.mask[some]
        with actor.hardware.autocast():
            logp, values, entropy = actor(pad([rollouts[i] for i in some], mask.shape[1], mask.device), entropy=True)
        policy, clipped = clipped_policy_loss(logp, t.prox[some], t.advantages[some], t.importance[some], p.clip)
        value = clipped_value_loss(values, t.old_values[some], t.returns[some], p.value_clip)
        kl = kl_k3(t.prox[some], logp)
        loss = ((policy + p.value_coefficient * value + p.kl_coefficient * kl) * mask).sum() / tokens
        (scale * loss).backward()
        new = logp.detach()
        ratio_max = max(ratio_max, float(torch.exp((new - t.prox[some]) * mask).max()))
        parts = {
            "policy_loss": policy.detach(),
            "value_loss": value.detach(),
            "entropy": entropy,
            "approx_kl": kl.detach(),
            "kl_update": kl_moved(t.prox[some], new),
            "clipfrac": clipped,
            "kl_ref_per_token": kl_of_policy(new, t.reference[some], t.prox[some]),
        }
        if t.first is not None:
            parts["kl_first"] = kl_of_policy(new, t.first[some], t.prox[some])
        for name, part in parts.items():
            sums[name] = sums.get(name, 0.0) + float((part * mask).sum())
    sums = processes.total(sums)
    per_sequence = {"kl_update", "kl_first"} & sums.keys()
    metrics = {name: value / (len(rows) if name in per_sequence else tokens) for name, value in sums.items()}
    metrics["kl_ref"] = sums["kl_ref_per_token"] / len(rows)
    metrics["ratio_max"] = processes.largest(ratio_max)
    index = list(rows)
    metrics["explained_variance"] = explained_variance(t.old_values[index], t.returns[index], t.mask[index])
    return metrics


def sl_gradients(actor: Actor, rows: Sequence[dict[str, list[int]]]) -> float:
    """Accumulate the gradients of the supervised loss (token mean) of one minibatch; returns the loss."""
    tokens = sum(label != IGNORED for row in rows for label in row["labels"][1:])
    total, size, own = 0.0, actor.hardware.micro_rows, processes.mine(rows)
    for start in range(0, len(own), size):
        loss = sl_loss(actor, own[start : start + size]) / max(1, tokens)
        loss.backward()
        total += float(loss.detach())
    return processes.total({"sl": total})["sl"]


def sl_loss(actor: Actor, rows: Sequence[dict[str, list[int]]]) -> torch.Tensor:
    """Summed negative log-likelihood of the labels."""
    longest = max(len(row["input_ids"]) for row in rows)
    device = actor.value.weight.device

    def tensor(key: str, filler: int) -> torch.Tensor:
        return torch.tensor([row[key] + [filler] * (longest - len(row[key])) for row in rows], device=device)

    ids, labels = tensor("input_ids", 0), tensor("labels", IGNORED)[:, 1:]
    kept = labels != IGNORED
    with actor.hardware.autocast():
        logits = actor.logits(actor.hidden(ids)[:, :-1][kept])
    return F.cross_entropy(logits, labels[kept], reduction="sum")
