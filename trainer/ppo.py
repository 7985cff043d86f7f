"""PPO: the policy learns from scored answers that the stream has sampled (RL-CAI). One file, to be read from top to bottom.

    minimise   L = -E[ min(r A, clip(r, 1-e, 1+e) A) ] + c_v * L_value         (alternate)
               L_SL + alpha * L                                                 (combined)

with r = pi(token) / pi_prox(token), advantages A from GAE over per-token rewards -beta * (log pi_prox - log pi_ref), and the
reward model's normalised score on the last token (Schulman et al. 2017; Bai et al. 2022, section 4; Ziegler et al. 2019).

Where this departs from the papers, and why:

 1. The answers are those the stream generated, with their own behaviour log-probabilities; nothing is sampled here. They
    may be a few policy versions old, so the proximal log-probabilities are computed afresh with the present policy and each
    token is weighted with min(pi_prox / pi_behaviour, 2) (truncated importance sampling; decoupled PPO).
 2. Scores are centred over the batch before they are handed out: a reward that is the same everywhere teaches nothing.
 3. Advantages are whitened over the batch only when they vary; noise is never scaled up to a signal.
 4. The value head is linear on the policy's own trunk and starts at zero: half the memory of a value model.
 5. No entropy bonus, no dropout, gamma 1: an answer is judged once, at its end.
 6. beta adapts to a KL target in nats per sequence; a negative estimate never lowers it. The phase stops hard when the KL to
    the reference, or to the very first model, passes a limit. It is estimated for the policy of the moment from answers that
    the proximal one sampled, so each token is weighted with pi / pi_prox.
 7. Masks come from lengths and never from `!= pad`: SmolLM2 pads with its end token.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from trainer import weights
from trainer.hf import OnStep, ignore
from trainer.sft import IGNORED

MICRO_ROWS = 4  # rows in one forward and backward pass: bounds the memory of (rows, tokens, vocabulary) logits
IMPORTANCE_CAP = 2.0
LEAST_DEVIATION = 1e-4
MAX_GRAD_NORM = 1.0


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
    epochs: int = 4
    batch_size: int = 8
    clip: float = 0.2
    value_clip: float = 0.2
    value_coefficient: float = 0.1
    gae_gamma: float = 1.0
    gae_lambda: float = 0.95
    beta: float = 0.02
    kl_target: float = 6.0
    kl_stop: float = 30.0
    kl_first_stop: float = 200.0
    missing_eos_penalty: float = 0.0
    alpha: float = 1.0


# The maths. Tensors are (B, T) over answer tokens; masks are 1 on real tokens.


def masked_mean(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return (x * mask).sum() / mask.sum().clamp(min=1)


def logprobs_from_logits(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """log p(token) from logits (B, T, V) and tokens (B, T)."""
    return torch.log_softmax(logits, dim=-1).gather(-1, tokens[..., None])[..., 0]


def kl_k1(logp: torch.Tensor, logq: torch.Tensor) -> torch.Tensor:
    """The unbiased estimate of KL(p || q) per token, from samples of p; may be negative (Schulman 2020, "k1")."""
    return logp - logq


def kl_k3(logp: torch.Tensor, logq: torch.Tensor) -> torch.Tensor:
    """The estimate of KL(p || q) per token that is never negative (Schulman 2020, "k3")."""
    return torch.expm1(logq - logp) - (logq - logp)


def kl_of_policy(logp: torch.Tensor, logq: torch.Tensor, log_sampled: torch.Tensor) -> torch.Tensor:
    """The estimate of KL(p || q) per token from samples of a third distribution: k3 weighted with p / sampled.

    Never negative. Without the weight a token that p has just learned to avoid counts q / p, thousands of nats for one token.
    """
    return torch.exp(logp - log_sampled) * kl_k3(logp, logq)


def token_rewards(
    kl: torch.Tensor, scores: torch.Tensor, lengths: torch.Tensor, beta: float, mask: torch.Tensor
) -> torch.Tensor:
    """-beta * kl on every token, and the score (B,) on the last one."""
    rewards = -beta * kl * mask
    rewards[torch.arange(len(lengths)), lengths - 1] += scores
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


def centred(scores: torch.Tensor) -> torch.Tensor:
    """Scores (N,) with mean 0; exactly zero when they do not vary, for Adam makes full steps of the rounding errors else."""
    if scores.std(correction=0) < LEAST_DEVIATION:
        return torch.zeros_like(scores)
    return scores - scores.mean()


def whiten(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean 0 and deviation 1 over real tokens; left as it is when it hardly varies."""
    mean = masked_mean(x, mask)
    deviation = masked_mean((x - mean) ** 2, mask).sqrt()
    if deviation < LEAST_DEVIATION:
        return x
    return (x - mean) / deviation * mask


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
    """The next phase's beta (Ziegler et al. 2019, section 2.2); a KL estimate below zero never lowers it."""
    if kl < 0:
        return beta
    error = max(-0.2, min(0.2, kl / target - 1))
    return beta * (1 + 0.1 * error)


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

    def __init__(self, policy: Any) -> None:
        super().__init__()
        self.policy = policy
        base = policy.get_base_model() if hasattr(policy, "get_base_model") else policy
        self.trunk = getattr(base, base.base_model_prefix)
        self.head = base.get_output_embeddings()
        self.value = torch.nn.Linear(base.config.get_text_config().hidden_size, 1)
        torch.nn.init.zeros_(self.value.weight)
        torch.nn.init.zeros_(self.value.bias)

    def forward(self, batch: Padded, *, entropy: bool = False) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Log-probabilities of the answer tokens, values before each of them, and entropies: all (B, T_answer)."""
        hidden = self.trunk(input_ids=batch.ids, attention_mask=batch.attention, use_cache=False).last_hidden_state
        # Only the places that predict answer tokens go through the (large) output layer.
        index = batch.before[..., None].expand(-1, -1, hidden.shape[-1])
        hidden = hidden.gather(1, index)
        logits = self.head(hidden).float() / batch.temperature[:, None, None]
        logp = logprobs_from_logits(logits, batch.tokens) * batch.mask
        values = self.value(hidden.float())[..., 0] * batch.mask
        spread = torch.zeros_like(logp)
        if entropy:
            with torch.no_grad():
                spread = torch.distributions.Categorical(logits=logits).entropy() * batch.mask
        return logp, values, spread


@dataclass(frozen=True)
class Padded:
    """Rollouts as right-padded tensors: ids and attention (B, T); tokens, mask and `before` (B, T_answer)."""

    ids: torch.Tensor
    attention: torch.Tensor
    tokens: torch.Tensor
    mask: torch.Tensor
    before: torch.Tensor  # the position whose output predicts each answer token
    temperature: torch.Tensor


def pad(rollouts: Sequence[Rollout], width: int, device: str) -> Padded:
    """Tensors of some rollouts; `width` is T_answer."""
    longest = max(len(r.prompt_token_ids) + len(r.token_ids) for r in rollouts)
    ids, attention = (torch.zeros(len(rollouts), longest, dtype=torch.long) for _ in range(2))
    tokens, before = (torch.zeros(len(rollouts), width, dtype=torch.long) for _ in range(2))
    mask = torch.zeros(len(rollouts), width)
    for row, rollout in enumerate(rollouts):
        start, count = len(rollout.prompt_token_ids), len(rollout.token_ids)
        ids[row, : start + count] = torch.tensor([*rollout.prompt_token_ids, *rollout.token_ids])
        attention[row, : start + count] = 1
        tokens[row, :count] = torch.tensor(rollout.token_ids)
        before[row, :count] = torch.arange(start - 1, start + count - 1)
        mask[row, :count] = 1.0
    temperature = torch.tensor([r.temperature for r in rollouts])
    return Padded(*(x.to(device) for x in (ids, attention, tokens, mask, before, temperature)))


@torch.no_grad()
def evaluate(actor: Actor, rollouts: Sequence[Rollout], width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities and values of all rollouts (N, width), computed in small batches of similar length."""
    device = next(actor.parameters()).device
    logp = torch.zeros(len(rollouts), width, device=device)
    values = torch.zeros_like(logp)
    for rows in micro_batches(rollouts, range(len(rollouts)), 2 * MICRO_ROWS):
        with weights.autocast():
            some_logp, some_values, _ = actor(pad([rollouts[i] for i in rows], width, str(device)))
        logp[rows], values[rows] = some_logp, some_values
    return logp, values


def micro_batches(rollouts: Sequence[Rollout], rows: Sequence[int], size: int) -> list[list[int]]:
    """Rows of similar length together, so that little is padded."""
    order = sorted(rows, key=lambda i: len(rollouts[i].prompt_token_ids) + len(rollouts[i].token_ids))
    return [order[i : i + size] for i in range(0, len(order), size)]


@dataclass(frozen=True)
class Targets:
    """What stays fixed during a phase, (N, T) each: see the module's docstring."""

    prox: torch.Tensor
    reference: torch.Tensor
    first: torch.Tensor | None
    old_values: torch.Tensor
    importance: torch.Tensor
    advantages: torch.Tensor
    returns: torch.Tensor
    mask: torch.Tensor


def prepare(
    rollouts: Sequence[Rollout],
    scores: Sequence[float],
    prox: torch.Tensor,
    old_values: torch.Tensor,
    reference: torch.Tensor,
    first: torch.Tensor | None,
    p: Hyperparameters,
) -> Targets:
    """Rewards, advantages and importance weights of a phase."""
    lengths = torch.tensor([len(r.token_ids) for r in rollouts])
    mask = (torch.arange(prox.shape[1])[None] < lengths[:, None]).float().to(prox.device)
    behaviour = torch.zeros_like(prox)
    for row, rollout in enumerate(rollouts):
        behaviour[row, : len(rollout.logprobs)] = torch.tensor(rollout.logprobs)
    cut = torch.tensor([0.0 if r.stopped else p.missing_eos_penalty for r in rollouts])
    handed_out = centred(torch.tensor(list(scores)) - cut).to(prox.device)
    rewards = token_rewards(kl_k1(prox, reference), handed_out, lengths, p.beta, mask)
    advantages, returns = gae(rewards, old_values, mask, p.gae_gamma, p.gae_lambda)
    importance = torch.exp((prox - behaviour) * mask).clamp(max=IMPORTANCE_CAP) * mask
    return Targets(prox, reference, first, old_values, importance, whiten(advantages, mask), returns, mask)


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
    seed: int = 0,
    on_step: OnStep = ignore,
) -> tuple[Any, Any, dict[str, float]]:
    """One PPO phase on scored rollouts; returns (policy, tokenizer, metrics).

    `scores` are normalised, one for each rollout. `sl_rows` (ids and labels, from `sft.encode`) turn on the combined
    objective. The metrics hold `stopped_early` = 1 when a KL limit ended the phase.
    """
    torch.manual_seed(seed)
    tokenizer = weights.load_tokenizer(policy_folder)
    actor = Actor(weights.with_lora(weights.load_policy(policy_folder), lora_rank, "CAUSAL_LM"))
    actor.to(weights.device()).eval()  # eval: no dropout, so that ratios start at one
    width = max(len(r.token_ids) for r in rollouts)
    prox, old_values = evaluate(actor, rollouts, width)
    reference = prox if reference_folder == policy_folder else other_logprobs(reference_folder, rollouts, width)
    first = None if first_folder is None else other_logprobs(first_folder, rollouts, width)
    targets = prepare(rollouts, scores, prox, old_values, reference, first, p)
    metrics = optimise(actor, rollouts, targets, p, sl_rows, seed, lora_rank, on_step)
    kl = float(((kl_k1(prox, reference) * targets.mask).sum(-1)).mean())
    return (
        actor.policy,
        tokenizer,
        metrics
        | {
            "beta": adapted_beta(p.beta, kl, p.kl_target),
            "kl_rollouts": kl,
            "reward_mean": sum(scores) / len(scores),
            "rollouts": float(len(rollouts)),
            "importance_mean": float(masked_mean(targets.importance, targets.mask)),
        },
    )


def other_logprobs(folder: Path, rollouts: Sequence[Rollout], width: int) -> torch.Tensor:
    """Log-probabilities under another model, which is loaded for this and let go."""
    other = Actor(weights.load_policy(folder)).to(weights.device()).eval()
    return evaluate(other, rollouts, width)[0]


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
    """Epochs of minibatches; returns the last step's metrics."""
    rate = p.learning_rate * (weights.LORA_SPEEDUP if lora_rank else 1.0)
    trained = [parameter for parameter in actor.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)
    shuffle, step, metrics = random.Random(seed), 0, {}
    for _ in range(p.epochs):
        order = list(range(len(rollouts)))
        shuffle.shuffle(order)
        for start in range(0, len(order), p.batch_size):
            rows = order[start : start + p.batch_size]
            metrics = rl_gradients(actor, rollouts, rows, targets, p, p.alpha if sl_rows else 1.0)
            if sl_rows:
                chosen = [sl_rows[(start + i) % len(sl_rows)] for i in range(len(rows))]
                metrics["sl_loss"] = sl_gradients(actor, chosen)
            metrics["grad_norm"] = float(torch.nn.utils.clip_grad_norm_(trained, MAX_GRAD_NORM))
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            metrics["stopped_early"] = float(metrics["kl_ref"] > p.kl_stop or metrics.get("kl_first", 0.0) > p.kl_first_stop)
            on_step(step, metrics)
            if metrics["stopped_early"]:
                return metrics | {"steps": float(step)}
    return metrics | {"steps": float(step)}


def rl_gradients(
    actor: Actor, rollouts: Sequence[Rollout], rows: Sequence[int], t: Targets, p: Hyperparameters, scale: float
) -> dict[str, float]:
    """Accumulate the gradients of one minibatch, in micro-batches whose losses add up to the token mean; returns metrics."""
    tokens = float(t.mask[list(rows)].sum())
    sums: dict[str, float] = {}
    ratios = []
    for some in micro_batches(rollouts, rows, MICRO_ROWS):
        mask = t.mask[some]
        with weights.autocast():
            logp, values, entropy = actor(pad([rollouts[i] for i in some], mask.shape[1], str(mask.device)), entropy=True)
        policy, clipped = clipped_policy_loss(logp, t.prox[some], t.advantages[some], t.importance[some], p.clip)
        value = clipped_value_loss(values, t.old_values[some], t.returns[some], p.value_clip)
        loss = ((policy + p.value_coefficient * value) * mask).sum() / tokens
        (scale * loss).backward()
        new = logp.detach()
        ratios.append(float(torch.exp((new - t.prox[some]) * mask).max()))
        parts = {
            "policy_loss": policy.detach(),
            "value_loss": value.detach(),
            "entropy": entropy,
            "approx_kl": kl_k3(t.prox[some], new),
            "clipfrac": clipped,
            "kl_ref_per_token": kl_of_policy(new, t.reference[some], t.prox[some]),
        }
        for name, part in parts.items():
            sums[name] = sums.get(name, 0.0) + float((part * mask).sum())
        if t.first is not None:
            kl_first = kl_of_policy(new, t.first[some], t.prox[some])
            sums["kl_first"] = sums.get("kl_first", 0.0) + float((kl_first * mask).sum())
    metrics = {name: value / tokens for name, value in sums.items() if name != "kl_first"}
    metrics["kl_ref"] = sums["kl_ref_per_token"] / len(rows)
    if "kl_first" in sums:
        metrics["kl_first"] = sums["kl_first"] / len(rows)
    metrics["ratio_max"] = max(ratios)
    index = list(rows)
    metrics["explained_variance"] = explained_variance(t.old_values[index], t.returns[index], t.mask[index])
    return metrics


def sl_gradients(actor: Actor, rows: Sequence[dict[str, list[int]]]) -> float:
    """Accumulate the gradients of the supervised loss (token mean) of one minibatch; returns the loss."""
    tokens = sum(label != IGNORED for row in rows for label in row["labels"][1:])
    total = 0.0
    for start in range(0, len(rows), MICRO_ROWS):
        some = rows[start : start + MICRO_ROWS]
        loss = sl_loss(actor, some) / max(1, tokens)
        loss.backward()
        total += float(loss.detach())
    return total


def sl_loss(actor: Actor, rows: Sequence[dict[str, list[int]]]) -> torch.Tensor:
    """Summed negative log-likelihood of the labels."""
    longest = max(len(row["input_ids"]) for row in rows)
    device = next(actor.parameters()).device

    def tensor(key: str, filler: int) -> torch.Tensor:
        return torch.tensor([row[key] + [filler] * (longest - len(row[key])) for row in rows], device=device)

    ids, labels = tensor("input_ids", 0), tensor("labels", IGNORED)
    lengths = torch.tensor([len(row["input_ids"]) for row in rows], device=device)
    attention = (torch.arange(longest, device=device)[None] < lengths[:, None]).long()
    with weights.autocast():
        hidden = actor.trunk(input_ids=ids, attention_mask=attention, use_cache=False).last_hidden_state[:, :-1]
        kept = labels[:, 1:] != IGNORED
        logits = actor.head(hidden[kept])
    return F.cross_entropy(logits.float(), labels[:, 1:][kept], reduction="sum")
