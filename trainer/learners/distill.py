"""Train the policy to answer without the constitution as it would answer with it (self-distillation). Read from top to bottom.

    minimize   E[ D( pi_ref(. | constitution, prompt, y_<t) , pi(. | prompt, y_<t) ) ]       over the tokens y_t of completions

The student is the policy. It has sampled the completions y from the prompt alone. The teacher is the reference policy, and has
the constitution in its prompt (`engine.constitution_prompts`). For each token of a completion, the student learns the teacher's
distribution of the next token. There is no reward, no judge and no label. D is the forward KL, the reverse KL, or the
generalized Jensen-Shannon divergence (Agarwal et al. 2024, GKD, equation 1).

Sources: context distillation (Askell et al. 2021, section 2.2; Snell et al. 2022) on the student's own completions, as in
on-policy distillation (Agarwal et al. 2024). On-Policy Context Distillation (Ye et al. 2026, OPCD, arXiv 2602.12275) does this with the
reverse KL, and Self-Distillation Fine-Tuning (Shenfeld et al. 2026, SDFT, arXiv 2601.19897) with demonstrations in the prompt. TRL
implements SDFT in `trl.experimental.sdft`. Constitutional On-Policy Safe Distillation (Wen et al. 2026, COPSD, arXiv 2606.03089) puts a
constitution into the prompt. It reports that the reverse KL makes responses shorter and more cautious than the teacher's.
The default here is therefore the forward KL. COPSD also fine-tunes the teacher first; this file does not.

The implementation differs from these in the following points, for these reasons:

 1. D is computed over the whole vocabulary, at each token. The KL of the sampled tokens alone cannot teach the student to stop:
    if no completion was ended by the student, no sample contains the end token. With `top_k`, the support is the teacher's k most
    likely tokens and the end token. All other tokens are one further outcome, so that their probability is not lost.
 2. The teacher's distributions do not change during an update, so they are computed once. Over the whole vocabulary they would
    need 200 kB per token. Therefore the last hidden states of the teacher are kept, and the output layer is applied again at
    each step. The result is the same. With `top_k`, the log-probabilities themselves are kept.
 3. The prompts of the teacher begin with the same constitution. This common prefix is computed once per update. The student's
    prompts of a micro-batch often begin with the same system message, which is computed once per pass, with its gradient.
 4. The output layer of the student is applied to `_OUTPUT_TOKENS` tokens at a time, forward and backward. Memory therefore holds
    the logits of this number of tokens, for any micro-batch. The divergence is computed for `_CHUNK_TOKENS` of them at a time.
 5. A completion may be a few versions old. The loss is defined for any completion, so stale completions have no importance
    weights.
 6. Before the first step, the teacher's own effect is measured: the KL of the teacher to the reference policy without the
    constitution, on some of the completions. If it is below `min_teacher_effect`, there is nothing to learn except rounding
    errors, and the update is rejected.
 7. The KL to the reference policy grows by design: the target is the teacher, not the reference policy. The limits of the KL
    are those of PPO (`ppo.py`, point 8). Its KL penalties do not exist here. For completions that the reference policy or the
    current policy has sampled, the recorded log-probabilities are used in these KLs, because a limit does not need more precision.
 8. The loss is the mean over the completion tokens of a step, as in PPO and in `trl.DistillationTrainer`. SDFT first takes the
    mean of each completion.
"""

from __future__ import annotations

import copy
import gc
import math
import random
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from engine.errors import TrainingFailed, UsageError
from engine.models.control_tokens import find_end_token_id
from trainer import distributed, sharding, weights
from trainer.hf import StepCallback, compute_learning_rate_factor, ignore_step, require_finite
from trainer.learners.policy_math import (
    estimate_policy_kl,
    estimate_update_kl,
    find_exceeded_limit,
    kl_k1,
    require_within_kl_limits,
)
from trainer.learners.rollouts import (
    PaddedRollouts,
    PolicyModel,
    Rollout,
    TrainedPolicy,
    apply_output_layer,
    compute_logprobs,
    compute_model_logprobs,
    find_common_prefix,
    make_micro_batches,
    pad_behavior_logprobs,
    pad_rollouts,
    remove_prefix,
)
from trainer.weights import Hardware

Divergence = Literal["forward_kl", "reverse_kl", "jsd"]
_TITLE = "self-distillation"
_OUTPUT_TOKENS = 256  # the output layer is applied to this number of tokens at a time
_CHUNK_TOKENS = 64  # divergences are computed for this number of tokens at a time
_MAX_EFFECT_ROLLOUTS = 32  # the effect of the teacher is measured on a quarter of the completions, and at most on this number
_MAX_GRAD_NORM = 1.0
_KL_WINDOW = 64  # kl_update is averaged over this number of rollouts, as in PPO


@dataclass(frozen=True)
class DistillConfig:
    """These are the settings `distill.*` of an update that the learner uses."""

    learning_rate: float = 2e-5
    epochs: int = 1
    batch_size: int = 8
    divergence: Divergence = "forward_kl"
    beta: float = 0.5
    top_k: int = 0
    min_teacher_effect: float = 0.03
    max_kl_update: float = 30.0
    max_kl: float = 60.0
    max_kl_base: float = 200.0


@dataclass(frozen=True)
class DistillExample:
    """An example has a rollout of the student, and the token ids of the teacher's prompt."""

    rollout: Rollout
    teacher_prompt_token_ids: tuple[int, ...]

    @property
    def teacher_rollout(self) -> Rollout:
        """Return the same completion after the teacher's prompt."""
        return replace(self.rollout, prompt_token_ids=self.teacher_prompt_token_ids)


# The mathematics. Tensors have shape (N, V): N completion tokens and V outcomes.


def compute_divergence(
    student_logprobs: torch.Tensor, teacher_logprobs: torch.Tensor, divergence: Divergence, beta: float = 0.5
) -> torch.Tensor:
    """Return the divergence of each token (N,) in nats.

    "forward_kl" is KL(teacher || student), "reverse_kl" is KL(student || teacher). "jsd" is
    beta KL(teacher || m) + (1 - beta) KL(student || m) with m = beta teacher + (1 - beta) student. For beta towards 0 or 1, "jsd"
    divided by beta or (1 - beta) approaches the two KLs (Agarwal et al. 2024). TRL computes these KLs for its `beta` 0 and 1.
    """
    if divergence == "forward_kl":
        return compute_kl(teacher_logprobs, student_logprobs)
    if divergence == "reverse_kl":
        return compute_kl(student_logprobs, teacher_logprobs)
    mixture = torch.logaddexp(student_logprobs + math.log1p(-beta), teacher_logprobs + math.log(beta))
    return beta * compute_kl(teacher_logprobs, mixture) + (1 - beta) * compute_kl(student_logprobs, mixture)


def compute_kl(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """Return KL(p || q) of each token (N,) from log-probabilities (N, V)."""
    return (p.exp() * (p - q)).sum(-1)


def select_support(logprobs: torch.Tensor, top_k: int, end_token_id: int | None) -> torch.Tensor:
    """Return the ids of the top_k most likely tokens and of the end token (N, top_k + 1).

    If the end token is one of the top_k tokens, the last one is the next most likely token.
    """
    support = logprobs.topk(top_k + 1, dim=-1).indices
    if end_token_id is None:
        return support
    is_missing = (support[:, :top_k] != end_token_id).all(-1)
    support[:, top_k] = torch.where(is_missing, end_token_id, support[:, top_k])
    return support


def project_on_support(logprobs: torch.Tensor, support: torch.Tensor) -> torch.Tensor:
    """Return the log-probabilities of the supported tokens, and of all other tokens together: (N, K + 1) for a support (N, K)."""
    others = torch.logsumexp(logprobs.scatter(-1, support, -math.inf), dim=-1, keepdim=True)
    return torch.cat([logprobs.gather(-1, support), others], dim=-1)


# The teacher


@dataclass(frozen=True)
class _OutputLayer:
    """The output layer of the reference policy. The other layers are not needed after the teacher has run."""

    lm_head: Any
    logit_softcap: float | None
    hardware: Hardware

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return apply_output_layer(self.lm_head, self.logit_softcap, hidden_states)


@dataclass(frozen=True)
class TeacherTargets:
    """These are the teacher's distributions at all completion tokens of a batch. Each list has one tensor per rollout.

    Over the whole vocabulary, `states` has the last hidden states (T, H) for the output layer. With `top_k`, there is no output
    layer, and `supports` and `logprobs` have the ids (T, K) and the log-probabilities (T, K + 1).
    """

    output_layer: _OutputLayer | None
    states: Sequence[torch.Tensor] = ()
    supports: Sequence[torch.Tensor] = ()
    logprobs: Sequence[torch.Tensor] = ()

    def select_rows(self, rows: Sequence[int]) -> TeacherTargets:
        """Return the targets of some rollouts as one tensor over all their tokens."""
        parts = (
            [torch.cat([part[row] for row in rows])] if part else () for part in (self.states, self.supports, self.logprobs)
        )
        return TeacherTargets(self.output_layer, *parts)

    def compare(
        self, tokens: slice, student_logprobs: torch.Tensor, temperatures: torch.Tensor, config: DistillConfig
    ) -> torch.Tensor:
        """Return the divergence (N,) at some of the tokens, for the result of `select_rows`."""
        if self.output_layer is None:
            student_logprobs = project_on_support(student_logprobs, self.supports[0][tokens])
            return compute_divergence(student_logprobs, self.logprobs[0][tokens], config.divergence, config.beta)
        with torch.no_grad():
            teacher_logprobs = _compute_distributions(self.output_layer, self.states[0][tokens], temperatures)
        return compute_divergence(student_logprobs, teacher_logprobs, config.divergence, config.beta)


@torch.no_grad()
def compute_all_states(model: PolicyModel, rollouts: Sequence[Rollout]) -> list[torch.Tensor]:
    """Return the hidden states (T, H) that predict the completion tokens of each rollout. No gradients are computed.

    The prefix that all prompts share is computed once.
    """
    cache = None
    if model.supports_prefix and (prefix := find_common_prefix(rollouts)):
        with model.hardware.autocast():
            cache = model.run(model.compute_prefix, prefix)
        rollouts = [remove_prefix(rollout, prefix) for rollout in rollouts]
    states = [torch.empty(0)] * len(rollouts)
    for rows in make_micro_batches(rollouts, range(len(rollouts)), model.hardware.micro_batch_size):
        lengths = [len(rollouts[row].token_ids) for row in rows]
        padded = pad_rollouts([rollouts[row] for row in rows], max(lengths), model.device)
        row_cache = copy.deepcopy(cache)
        if row_cache is not None:
            row_cache.batch_repeat_interleave(len(rows))
        with model.hardware.autocast():
            parts = model.run(model.compute_states_after, padded, row_cache).split(lengths)
        for row, part in zip(rows, parts, strict=True):
            states[row] = part
    return states


@torch.no_grad()
def compute_teacher_targets(
    model: PolicyModel, examples: Sequence[DistillExample], config: DistillConfig, end_token_id: int | None
) -> tuple[TeacherTargets, dict[str, float]]:
    """Run the reference policy `model` with the constitution in its prompts. Return the targets and the effect of the teacher."""
    states = compute_all_states(model, [example.teacher_rollout for example in examples])
    lm_head = sharding.copy_gathered_module(model.lm_head) if sharding.is_sharded(model.root) else model.lm_head
    output_layer = _OutputLayer(lm_head, model.logit_softcap, model.hardware)
    effect = _measure_teacher_effect(model, output_layer, examples, states)
    if not 0 < config.top_k < model.config.vocab_size - 1:
        return TeacherTargets(output_layer, states), effect
    supports, logprobs = [], []
    for example, row_states in zip(examples, states, strict=True):
        row_logprobs = _compute_distributions(output_layer, row_states, example.rollout.temperature)
        supports.append(select_support(row_logprobs, config.top_k, end_token_id))
        logprobs.append(project_on_support(row_logprobs, supports[-1]))
    return TeacherTargets(None, supports=supports, logprobs=logprobs), effect


def _measure_teacher_effect(
    model: PolicyModel, output_layer: _OutputLayer, examples: Sequence[DistillExample], states: Sequence[torch.Tensor]
) -> dict[str, float]:
    """Return how much the constitution in the prompt changes the reference policy, on some of the completions.

    `teacher_effect` is the mean KL(teacher || reference) in nats per token. `teacher_changed_tokens` is the share of tokens at
    which the teacher has another most likely token. `states` are the teacher's hidden states of all completions.
    """
    indices = range(0, len(examples), max(4, math.ceil(len(examples) / _MAX_EFFECT_ROLLOUTS)))
    plain_states = compute_all_states(model, [examples[i].rollout for i in indices])
    kl, num_changed, num_tokens = 0.0, 0, 0
    for i, row_states in zip(indices, plain_states, strict=True):
        for parts in zip(states[i].split(_CHUNK_TOKENS), row_states.split(_CHUNK_TOKENS), strict=True):
            teacher, plain = (_compute_distributions(output_layer, part, examples[i].rollout.temperature) for part in parts)
            kl += float(compute_kl(teacher, plain).sum())
            num_changed += int((teacher.argmax(-1) != plain.argmax(-1)).sum())
        num_tokens += len(row_states)
    return {"teacher_effect": kl / num_tokens, "teacher_changed_tokens": num_changed / num_tokens}


def _compute_distributions(output_layer: _OutputLayer, states: torch.Tensor, temperature: float | torch.Tensor) -> torch.Tensor:
    """Return the log-probabilities (N, V) of the next token, from hidden states (N, H)."""
    with output_layer.hardware.autocast():
        logits = output_layer.compute_logits(states)
    return _compute_log_softmax(logits, temperature)


def _compute_log_softmax(logits: torch.Tensor, temperature: float | torch.Tensor) -> torch.Tensor:
    """Return the log-probabilities (N, V) of logits (N, V). The temperature is one number or has shape (N, 1)."""
    is_one = bool((torch.as_tensor(temperature) == 1.0).all())  # saves a pass over the logits
    return torch.log_softmax(logits if is_one else logits / temperature, dim=-1)


def require_teacher_effect(effect: dict[str, float], config: DistillConfig) -> None:
    """Raise TrainingFailed when the constitution in the prompt changes nothing."""
    if effect["teacher_effect"] < config.min_teacher_effect:
        raise TrainingFailed(
            f"the constitution in the prompt changes nothing: the KL of the teacher to the reference policy is"
            f" {effect['teacher_effect']:.2g} nats per token, and {effect['teacher_changed_tokens']:.1%} of the most likely tokens differ",
            f"distill.min_teacher_effect is {config.min_teacher_effect:g}. There is nothing to learn, so no step was made",
            "write principles that change the policy's answers, change distill.constitution_role, or use a larger model (models.policy)",
        )


def _require_short_prompts(model: PolicyModel, examples: Sequence[DistillExample]) -> None:
    """Raise UsageError when a prompt of the teacher and its completion are longer than the context of the model."""
    limit = getattr(model.config, "max_position_embeddings", None)
    longest = max(example.teacher_rollout.num_tokens for example in examples)
    if limit and longest > limit:
        raise UsageError(
            f"a prompt with the constitution and its completion have {longest} tokens",
            f"the policy has a context of {limit} tokens",
            "set distill.num_principles to a lower number, shorten the constitution, or use another model (models.policy)",
        )


# One update


def train(
    policy_folder: Path,
    reference_folder: Path,
    examples: Sequence[DistillExample],
    config: DistillConfig,
    *,
    policy_version: int = 0,
    reference_version: int = 0,
    base_folder: Path | None = None,
    lora_rank: int = 0,
    hardware: Hardware = weights.DEFAULT_HARDWARE,
    seed: int = 0,
    on_step: StepCallback = ignore_step,
) -> tuple[TrainedPolicy, dict[str, float]]:
    """Make one update on completions of the stream. Return the policy and the metrics.

    `on_step` is first called with step 0 and the effect of the teacher. Completions of `policy_version` and `reference_version`
    have recorded log-probabilities that are used in the KLs. If `base_folder` is None, the KL to the base model is not computed.
    The metrics are means over the last epoch. `stopped_early` is 1 if a KL limit ended the update. Raise TrainingFailed when
    the teacher has no effect, when a metric is not finite, or when a KL limit is exceeded at the start. Raise UsageError when the
    models do not have the same architecture and tokenizer, or when a prompt of the teacher is too long for the model.
    """
    torch.manual_seed(seed)
    weights.require_compatible_models(policy_folder, reference_folder, "the reference policy")
    tokenizer = weights.load_tokenizer(policy_folder)
    rollouts = [example.rollout for example in examples]
    length = max(len(rollout.token_ids) for rollout in rollouts)

    # Other models are loaded, evaluated and released before the policy is loaded. Memory holds one set of weights, and the
    # output layer of the reference policy.
    base_logprobs = None
    if base_folder is not None:
        base_logprobs = compute_model_logprobs(base_folder, rollouts, length, hardware)
    is_reference = policy_folder == reference_folder
    has_reference_adapter = bool(lora_rank) and weights.has_adapter_for_reference(policy_folder, reference_folder)

    def run_reference(model: PolicyModel) -> tuple[TeacherTargets, dict[str, float], torch.Tensor]:
        _require_short_prompts(model, examples)
        targets, effect = compute_teacher_targets(model, examples, config, find_end_token_id(tokenizer))
        on_step(0, effect)
        require_teacher_effect(effect, config)
        return targets, effect, _get_logprobs(model, rollouts, reference_version, length)

    def load_reference() -> PolicyModel:
        return PolicyModel(weights.load_policy(reference_folder, hardware.weights_dtype), hardware, _TITLE)

    if not is_reference and not has_reference_adapter:
        teacher, effect, ref_logprobs = run_reference(load_reference())
        gc.collect()
    policy, disabled_is_reference = weights.load_policy_for_rl(policy_folder, reference_folder, lora_rank, hardware)
    model = PolicyModel(policy, hardware, _TITLE)
    if disabled_is_reference:
        with weights.disable_adapter(policy):
            teacher, effect, ref_logprobs = run_reference(model)
    elif is_reference:
        teacher, effect, ref_logprobs = run_reference(model)
        # The update changes the output layer of the policy.
        teacher = replace(teacher, output_layer=copy.deepcopy(teacher.output_layer))
    old_logprobs = ref_logprobs if is_reference else _get_logprobs(model, rollouts, policy_version, length)

    batch = _DistillBatch(teacher, old_logprobs, ref_logprobs, base_logprobs)
    kls = {"kl_ref": _compute_sequence_kl(batch, ref_logprobs)}
    if base_logprobs is not None:
        kls["kl_base"] = _compute_sequence_kl(batch, base_logprobs)
    require_within_kl_limits(kls, config, "distill")
    metrics = _optimize_policy(model, rollouts, batch, config, seed, lora_rank, on_step)
    metrics |= effect | summarize_completions(rollouts) | {"kl_rollouts": kls["kl_ref"], "rollouts": float(len(rollouts))}
    policy = weights.gather_model(policy)
    save = weights.make_rl_saver(policy, tokenizer, None, reference_folder if disabled_is_reference else None)
    return TrainedPolicy(policy, tokenizer, save), metrics


@dataclass(frozen=True)
class _DistillBatch:
    """These values do not change during an update. The log-probabilities of the sampled tokens have shape (N, T)."""

    teacher: TeacherTargets
    old_logprobs: torch.Tensor
    ref_logprobs: torch.Tensor
    base_logprobs: torch.Tensor | None


def _get_logprobs(model: PolicyModel, rollouts: Sequence[Rollout], version: int, length: int) -> torch.Tensor:
    """Return the log-probabilities (N, length) of the sampled tokens under `model`, which is the policy `version`.

    For completions that this version sampled, these are the recorded ones.
    """
    logprobs = pad_behavior_logprobs(rollouts, torch.zeros(len(rollouts), length, device=model.device))
    if others := [i for i, rollout in enumerate(rollouts) if rollout.policy_version != version]:
        logprobs[others] = compute_logprobs(model, [rollouts[i] for i in others], length)
    return logprobs


def _compute_sequence_kl(batch: _DistillBatch, other_logprobs: torch.Tensor) -> float:
    """Return the estimate of KL(pi_old || other) in nats per sequence. Padding is 0 in both."""
    return float(kl_k1(batch.old_logprobs, other_logprobs).sum(-1).mean())


def summarize_completions(rollouts: Sequence[Rollout]) -> dict[str, float]:
    """Return the lengths in tokens and the share of truncated completions, with TRL's names."""
    ended = [len(rollout.token_ids) for rollout in rollouts if rollout.ends_with_eos]
    num_tokens = sum(len(rollout.token_ids) for rollout in rollouts)
    return {
        "completion_tokens": float(num_tokens),
        "completions/mean_length": num_tokens / len(rollouts),
        "completions/mean_terminated_length": sum(ended) / len(ended) if ended else 0.0,
        "completions/clipped_ratio": 1 - len(ended) / len(rollouts),
    }


def _optimize_policy(
    model: PolicyModel,
    rollouts: Sequence[Rollout],
    batch: _DistillBatch,
    config: DistillConfig,
    seed: int,
    lora_rank: int,
    on_step: StepCallback,
) -> dict[str, float]:
    """Train for `config.epochs` epochs of minibatches. Return the mean metrics of the last epoch."""
    parameters = [parameter for parameter in model.policy.parameters() if parameter.requires_grad]
    learning_rate = config.learning_rate * (weights.LORA_LEARNING_RATE_FACTOR if lora_rank else 1.0)
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0, fused=True)
    num_steps = config.epochs * math.ceil(len(rollouts) / config.batch_size)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: compute_learning_rate_factor(step, num_steps))
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
    model: PolicyModel, rollouts: Sequence[Rollout], indices: Sequence[int], batch: _DistillBatch, config: DistillConfig
) -> dict[str, float]:
    """Accumulate the gradients of one minibatch and return its metrics.

    The losses of its micro-batches add up to the token mean. With several processes, each process takes a part of the rows. The
    gradients come from this part. The metrics come from all rows.
    """
    num_tokens = float(sum(len(rollouts[i].token_ids) for i in indices))
    sums: dict[str, float] = {}
    for rows in model.iterate_shard(rollouts, indices):
        padded = model.pad_rollouts([rollouts[i] for i in rows], batch.old_logprobs.shape[1])
        states, gradient = model.run(_compute_states_and_gradient, model, padded, rows, batch, config, num_tokens, sums)
        states.backward(gradient)
    sums = distributed.sum_over_processes(sums)
    per_token = {"loss", "entropy"}
    return {name: total / (num_tokens if name in per_token else len(indices)) for name, total in sums.items()}


def _compute_states_and_gradient(
    model: PolicyModel,
    padded: PaddedRollouts,
    rows: Sequence[int],
    batch: _DistillBatch,
    config: DistillConfig,
    num_tokens: float,
    sums: dict[str, float],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the hidden states (tokens, H) of a micro-batch and the gradient of the loss with respect to them.

    Accumulate the gradients of the output layer, and add the metrics to `sums`. The gradient of each part ends at the states.
    The caller continues the gradients of all parts into the trunk at once.
    """
    is_token = padded.completion_mask.bool()
    old_logprobs, ref_logprobs = (x[rows][is_token] for x in (batch.old_logprobs, batch.ref_logprobs))
    tokens = _MicroBatch(
        batch.teacher.select_rows(rows),
        padded.completion_ids[is_token],
        padded.temperatures[is_token.nonzero()[:, 0], None],
        old_logprobs,
        ref_logprobs,
        None if batch.base_logprobs is None else batch.base_logprobs[rows][is_token],
    )
    with model.hardware.autocast():
        states = model.compute_completion_states(padded)
    leaf = states.detach().requires_grad_()
    for start in range(0, len(leaf), _OUTPUT_TOKENS):
        with model.hardware.autocast():
            logits = model.compute_logits(leaf[start : start + _OUTPUT_TOKENS])
        # The backward pass of the output layer does not read the logits, so their gradient takes their place.
        values = logits.detach()
        for first in range(0, len(values), _CHUNK_TOKENS):
            chunk = values[first : first + _CHUNK_TOKENS]
            position = slice(start + first, start + first + len(chunk))
            chunk.copy_(_compute_logit_gradient(chunk, position, tokens, config, num_tokens, sums))
        logits.backward(values)
    assert leaf.grad is not None, "a micro-batch has tokens"
    return states, leaf.grad


@dataclass(frozen=True)
class _MicroBatch:
    """These are the values of all completion tokens of a micro-batch. All tensors but `temperatures` (tokens, 1) have shape (tokens,)."""

    teacher: TeacherTargets
    token_ids: torch.Tensor
    temperatures: torch.Tensor
    old_logprobs: torch.Tensor
    ref_logprobs: torch.Tensor
    base_logprobs: torch.Tensor | None


def _compute_logit_gradient(
    logits: torch.Tensor,
    position: slice,
    tokens: _MicroBatch,
    config: DistillConfig,
    num_tokens: float,
    sums: dict[str, float],
) -> torch.Tensor:
    """Return the gradient (N, V) of the loss with respect to the logits at some of the tokens. Add the metrics to `sums`."""
    logits = logits.clone().requires_grad_()
    temperatures, old_logprobs = tokens.temperatures[position], tokens.old_logprobs[position]
    student = _compute_log_softmax(logits, temperatures)
    divergence = tokens.teacher.compare(position, student, temperatures, config)
    (gradient,) = torch.autograd.grad(divergence.sum() / num_tokens, logits)

    student = student.detach()
    logp = student.gather(-1, tokens.token_ids[position, None])[:, 0]
    token_metrics = {
        "loss": divergence.detach(),
        "entropy": -(student.exp() * student).sum(-1),
        "kl_update": estimate_update_kl(old_logprobs, logp),
        "kl_ref": estimate_policy_kl(logp, tokens.ref_logprobs[position], old_logprobs),
    }
    if tokens.base_logprobs is not None:
        token_metrics["kl_base"] = estimate_policy_kl(logp, tokens.base_logprobs[position], old_logprobs)
    for name, value in token_metrics.items():
        sums[name] = sums.get(name, 0.0) + float(value.sum())
    return gradient
