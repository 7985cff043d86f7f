"""Rollouts, and the forward pass that computes the log-probabilities of their tokens. The RL learners on rollouts share this file."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer

from engine.errors import UsageError
from trainer import distributed, sharding, weights
from trainer.learners.policy_math import entropy_from_logits, logprobs_from_logits
from trainer.weights import Hardware

T = TypeVar("T")
_MIN_PREFIX_TOKENS = 16  # a shorter common prefix is not worth a separate forward pass


@dataclass(frozen=True)
class Rollout:
    """A rollout is one sampled completion.

    It has the exact token ids, and the log-probability with which each token was sampled.
    """

    prompt_token_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    ends_with_eos: bool
    policy_version: int
    record_id: str
    temperature: float = 1.0

    @property
    def num_tokens(self) -> int:
        """Return the number of tokens of prompt and completion."""
        return len(self.prompt_token_ids) + len(self.token_ids)


@dataclass(frozen=True)
class PaddedRollouts:
    """These are rollouts as right-padded tensors.

    `input_ids` has shape (B, T), `temperatures` has shape (B,), and the others have shape (B, T_completion). The prompts of all
    rows begin with `prefix`, which is not part of `input_ids`.
    """

    input_ids: torch.Tensor
    completion_ids: torch.Tensor
    completion_mask: torch.Tensor
    logit_positions: torch.Tensor  # the position in `input_ids` whose logits predict each completion token
    temperatures: torch.Tensor
    prefix: tuple[int, ...] = ()

    def scatter(self, token_values: torch.Tensor) -> torch.Tensor:
        """Return the values (tokens,) of the completion tokens as a tensor (B, T_completion). Padding is 0."""
        return torch.zeros_like(self.completion_mask).masked_scatter(self.completion_mask.bool(), token_values)


def find_common_prefix(rollouts: Sequence[Rollout]) -> tuple[int, ...]:
    """Return the tokens that all prompts begin with. Return () if they are too few to be worth a separate forward pass.

    The last token of a prompt is never part of the prefix.
    """
    columns = zip(*(rollout.prompt_token_ids[:-1] for rollout in rollouts), strict=False)
    prefix = tuple(column[0] for column in takewhile(lambda column: len(set(column)) == 1, columns))
    return prefix if len(rollouts) > 1 and len(prefix) >= _MIN_PREFIX_TOKENS else ()


def remove_prefix(rollout: Rollout, prefix: Sequence[int]) -> Rollout:
    """Return the rollout without the first tokens of its prompt."""
    return replace(rollout, prompt_token_ids=rollout.prompt_token_ids[len(prefix) :])


def pad_rollouts(
    rollouts: Sequence[Rollout], completion_length: int, device: torch.device | str, *, share_prefix: bool = False
) -> PaddedRollouts:
    """Convert rollouts to padded tensors. `completion_length` is T_completion.

    With `share_prefix`, the common prefix of the prompts is separate, so that the model computes it once.
    """
    prefix = find_common_prefix(rollouts) if share_prefix else ()
    rollouts = [remove_prefix(rollout, prefix) for rollout in rollouts]
    longest = max(r.num_tokens for r in rollouts)
    ids = torch.zeros(len(rollouts), longest, dtype=torch.long)
    tokens, positions = (torch.zeros(len(rollouts), completion_length, dtype=torch.long) for _ in range(2))
    mask = torch.zeros(len(rollouts), completion_length)
    for row, rollout in enumerate(rollouts):
        start, count = len(rollout.prompt_token_ids), len(rollout.token_ids)
        ids[row, : start + count] = torch.tensor([*rollout.prompt_token_ids, *rollout.token_ids])
        tokens[row, :count] = torch.tensor(rollout.token_ids)
        positions[row, :count] = torch.arange(start - 1, start + count - 1)
        mask[row, :count] = 1.0
    temperatures = torch.tensor([r.temperature for r in rollouts])
    ids, tokens, mask, positions, temperatures = (x.to(device) for x in (ids, tokens, mask, positions, temperatures))
    return PaddedRollouts(ids, tokens, mask, positions, temperatures, prefix)


def make_micro_batches(
    rollouts: Sequence[Rollout], indices: Sequence[int], micro_batch_size: int, *, share_prefix: bool = False
) -> list[list[int]]:
    """Split rows into micro-batches of similar length, so that little padding is needed.

    With `share_prefix`, rows of one prompt go together if this makes the model compute fewer tokens.
    """

    def split(order: list[int]) -> list[list[int]]:
        return [order[i : i + micro_batch_size] for i in range(0, len(order), micro_batch_size)]

    by_length = split(sorted(indices, key=lambda i: rollouts[i].num_tokens))
    if not share_prefix:
        return by_length
    by_prompt = split(sorted(indices, key=lambda i: (rollouts[i].prompt_token_ids, rollouts[i].num_tokens)))
    return min(by_length, by_prompt, key=lambda batches: sum(_count_computed_tokens(rollouts, rows) for rows in batches))


def _count_computed_tokens(rollouts: Sequence[Rollout], rows: Sequence[int]) -> int:
    """Return the number of tokens that the model computes for a micro-batch: the common prefix, and the rows with padding."""
    prefix = len(find_common_prefix([rollouts[row] for row in rows]))
    return prefix + len(rows) * (max(rollouts[row].num_tokens for row in rows) - prefix)


def apply_output_layer(lm_head: Any, logit_softcap: float | None, hidden_states: torch.Tensor) -> torch.Tensor:
    """Return fp32 logits (..., V) from hidden states (..., H)."""
    logits: torch.Tensor = lm_head(hidden_states).float()
    return logits if logit_softcap is None else logit_softcap * torch.tanh(logits / logit_softcap)


class PolicyModel(torch.nn.Module):
    """This module computes the log-probabilities of completion tokens. `title` names the RL method in error messages."""

    def __init__(self, policy: Any, hardware: Hardware = weights.DEFAULT_HARDWARE, title: str = "this RL method") -> None:
        super().__init__()
        self.policy, self.hardware = weights.prepare_for_training(policy, hardware), hardware
        base = policy.get_base_model() if weights.has_adapter(policy) else policy
        sharding.sum_gradients_in_backward(base)
        self.root, self.device = base, base.device
        self.backbone = getattr(base, base.base_model_prefix)
        self.lm_head = base.get_output_embeddings()
        self.config = base.config.get_text_config()
        self.logit_softcap = getattr(self.config, "final_logit_softcapping", None)
        self.require_plain_logits(base, title)
        self.supports_prefix = self._check_prefix()

    def run(self, function: Callable[..., T], *arguments: Any, **named: Any) -> T:
        """Call a function that calls layers of the policy. The layers of a sharded policy work only inside this call."""
        return sharding.run_in_root(self.root, function, *arguments, **named)

    def iterate_shard(self, rollouts: Sequence[Rollout], indices: Sequence[int]) -> Iterator[list[int]]:
        """Yield the micro-batches of this process's share of some rows.

        If another process has more micro-batches, run the missing passes without rows.
        """
        share = distributed.shard_rows(indices)
        batches = make_micro_batches(rollouts, share, self.hardware.micro_batch_size, share_prefix=self.supports_prefix)
        yield from batches
        self.run_empty_passes(len(indices), len(batches))

    def run_empty_passes(self, num_rows: int, num_passes: int) -> None:
        """Run passes of weight 0 until this process has as many passes as the process with most of `num_rows` rows.

        With gradients, a pass has a backward pass. `num_passes` is the number of passes so far.
        """
        most = math.ceil(math.ceil(num_rows / distributed.get_num_shards()) / self.hardware.micro_batch_size)
        for _ in range(most - num_passes):
            with self.hardware.autocast():
                logp, *_ = self(pad_rollouts([Rollout((0,), (0,), (0.0,), False, 0, "")], 1, self.device))
            if torch.is_grad_enabled():
                (0.0 * logp).sum().backward()

    def pad_rollouts(self, rollouts: Sequence[Rollout], completion_length: int) -> PaddedRollouts:
        """Convert rollouts to padded tensors on the device of this model."""
        return pad_rollouts(rollouts, completion_length, self.device, share_prefix=self.supports_prefix)

    def compute_hidden_states(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Return the last hidden states (B, T, H) of right-padded ids (B, T)."""
        states: torch.Tensor = self.backbone(input_ids=input_ids, use_cache=False).last_hidden_state
        return states

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Return fp32 logits (..., V) from hidden states (..., H)."""
        return apply_output_layer(self.lm_head, self.logit_softcap, hidden_states)

    def compute_completion_states(self, batch: PaddedRollouts) -> torch.Tensor:
        """Return the hidden states (tokens, H) that predict the completion tokens.

        The output layer is large. It is therefore computed only at these positions.
        """
        cache = None
        if batch.prefix:
            cache = self.compute_prefix(batch.prefix)
            cache.batch_repeat_interleave(len(batch.input_ids))
        return self.compute_states_after(batch, cache)

    def compute_prefix(self, prefix: Sequence[int]) -> DynamicCache:
        """Return the keys and values of a prefix, with their gradients if these are enabled."""
        cache = DynamicCache(config=self.config)
        self.backbone(input_ids=torch.tensor([prefix], device=self.device), past_key_values=cache, use_cache=True)
        return cache

    def compute_states_after(self, batch: PaddedRollouts, cache: DynamicCache | None) -> torch.Tensor:
        """Return the hidden states (tokens, H) that predict the completion tokens, after a cache with one row per rollout."""
        row, column = batch.completion_mask.bool().nonzero(as_tuple=True)
        if cache is None:
            return self.compute_hidden_states(batch.input_ids)[row, batch.logit_positions[row, column]]
        states: torch.Tensor = self.backbone(input_ids=batch.input_ids, past_key_values=cache, use_cache=True).last_hidden_state
        return states[row, batch.logit_positions[row, column]]

    @torch.no_grad()
    def _check_prefix(self) -> bool:
        """Return whether the model computes the same states if the beginning of a prompt is computed first, as a prefix.

        The layers of some models (sliding windows, recurrence) have other caches, and some models have no layers with a cache at all.
        With gradient checkpointing there is no cache. A sharded layer must not be called twice before its backward pass: the last
        layer's output for a prefix is not used, so FSDP2 would not gather the weights for its backward pass. Such a model computes
        a common prefix again for each rollout.
        """
        has_layers = hasattr(self.config, "num_hidden_layers")
        is_plain = has_layers and all(type(layer) is DynamicLayer for layer in DynamicCache(config=self.config).layers)
        if not is_plain or self.hardware.gradient_checkpointing or sharding.is_sharded(self.root):
            return False
        ids = tuple(1 + n % 3 for n in range(_MIN_PREFIX_TOKENS + 1))
        samples = [Rollout(ids, ids[:n], (0.0,) * n, False, 0, "") for n in (3, 4)]
        with self.hardware.autocast():
            expected, found = (
                PolicyModel.compute_completion_states(self, pad_rollouts(samples, 4, self.device, share_prefix=share)).float()
                for share in (False, True)
            )
        difference = float((found - expected).abs().mean() / expected.abs().mean())
        return difference < (0.02 if self.hardware.bf16 else 1e-4)  # bf16 has three digits

    def compute_token_logprobs(
        self, batch: PaddedRollouts, hidden: torch.Tensor, *, entropy: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the log-probability and the entropy of each completion token. Both have shape (tokens,).

        `hidden` is the result of `compute_completion_states`. Without `entropy`, the entropies are 0.
        """
        row, column = batch.completion_mask.bool().nonzero(as_tuple=True)
        logits = self.compute_logits(hidden) / batch.temperatures[row, None]
        logp = logprobs_from_logits(logits, batch.completion_ids[row, column])
        with torch.no_grad():
            entropies = entropy_from_logits(logits) if entropy else torch.zeros_like(logp)
        return logp, entropies

    def forward(self, batch: PaddedRollouts, *, entropy: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the log-probability of each completion token and the entropy. Both have shape (B, T_completion)."""

        def compute() -> tuple[torch.Tensor, torch.Tensor]:
            logp, entropies = self.compute_token_logprobs(batch, self.compute_completion_states(batch), entropy=entropy)
            return batch.scatter(logp), batch.scatter(entropies)

        return self.run(compute)

    @torch.no_grad()
    def require_plain_logits(self, base_model: Any, title: str) -> None:
        """Raise UsageError if `compute_logits` does not return the model's logits.

        For such a model, all probabilities would be wrong.
        """
        ids = torch.tensor([[1, 2, 3]], device=base_model.device)
        found = self.run(lambda: self.compute_logits(self.compute_hidden_states(ids)))
        expected = base_model(input_ids=ids, use_cache=False).logits.float()
        sharding.release_gathered_weights(base_model)
        if not torch.allclose(found, expected, atol=1e-3):
            raise UsageError(
                f"{title} cannot train a {base_model.config.model_type}",
                "its logits are not the outputs of its output layer",
                'set another models.policy, or train.rl_method = "dpo"',
            )


@torch.no_grad()
def compute_logprobs(model: PolicyModel, rollouts: Sequence[Rollout], completion_length: int) -> torch.Tensor:
    """Return the log-probabilities (N, completion_length) of all rollouts."""
    logp = torch.zeros(len(rollouts), completion_length, device=model.device)
    for rows in model.iterate_shard(rollouts, range(len(rollouts))):
        with model.hardware.autocast():
            logp[rows], _ = PolicyModel.forward(model, model.pad_rollouts([rollouts[i] for i in rows], completion_length))
    distributed.all_reduce_sum(logp)  # each process has computed its rows
    return logp


def compute_model_logprobs(
    folder: Path, rollouts: Sequence[Rollout], completion_length: int, hardware: Hardware
) -> torch.Tensor:
    """Return the log-probabilities (N, completion_length) of another model.

    The model is loaded for this computation and then released.
    """
    model = PolicyModel(weights.load_policy(folder, hardware.weights_dtype), hardware)
    logp = compute_logprobs(model, rollouts, completion_length)
    del model
    gc.collect()
    return logp


def compute_other_logprobs(
    policy_folder: Path,
    reference_folder: Path,
    base_folder: Path | None,
    rollouts: Sequence[Rollout],
    completion_length: int,
    *,
    lora_rank: int,
    hardware: Hardware,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Return the log-probabilities (N, completion_length) under the base model and under the reference.

    Each model is loaded, evaluated and released before the next one is loaded. Call this function before the policy is loaded, so
    that the memory never holds two sets of weights. The value is None without a base model, and for a reference that is the policy,
    or the policy without its adapter.
    """
    base_logprobs = ref_logprobs = None
    if base_folder is not None:
        base_logprobs = compute_model_logprobs(base_folder, rollouts, completion_length, hardware)
    has_adapter = bool(lora_rank) and weights.has_adapter_for_reference(policy_folder, reference_folder)
    if policy_folder != reference_folder and not has_adapter:
        ref_logprobs = compute_model_logprobs(reference_folder, rollouts, completion_length, hardware)
    return base_logprobs, ref_logprobs


@dataclass(frozen=True)
class RLModels:
    """This is the policy at the start of an RL update, and the log-probabilities (N, T) of all rollouts under each model."""

    model: PolicyModel
    disabled_is_reference: bool  # the policy without its adapter is the reference policy
    old_logprobs: torch.Tensor
    ref_logprobs: torch.Tensor
    base_logprobs: torch.Tensor | None


def load_rl_models(
    policy_folder: Path,
    reference_folder: Path,
    base_folder: Path | None,
    rollouts: Sequence[Rollout],
    *,
    lora_rank: int,
    hardware: Hardware,
    title: str,
    skip_policy: bool = False,
) -> RLModels:
    """Load the policy for an update, and compute the log-probabilities of the rollouts.

    With `skip_policy`, `old_logprobs` are 0, and the caller replaces them in place. If the policy is the reference,
    `ref_logprobs` is the same tensor.
    """
    length = max(len(r.token_ids) for r in rollouts)
    base_logprobs, ref_logprobs = compute_other_logprobs(
        policy_folder, reference_folder, base_folder, rollouts, length, lora_rank=lora_rank, hardware=hardware
    )
    policy, disabled_is_reference = weights.load_policy_for_rl(policy_folder, reference_folder, lora_rank, hardware)
    model = PolicyModel(policy, hardware, title)
    if skip_policy:
        old_logprobs = torch.zeros(len(rollouts), length, device=model.device)
    else:
        old_logprobs = compute_logprobs(model, rollouts, length)
    if policy_folder == reference_folder:
        ref_logprobs = old_logprobs
    elif ref_logprobs is None:
        with weights.disable_adapter(policy):
            ref_logprobs = compute_logprobs(model, rollouts, length)
    return RLModels(model, disabled_is_reference, old_logprobs, ref_logprobs, base_logprobs)


def make_token_mask(rollouts: Sequence[Rollout], like: torch.Tensor) -> torch.Tensor:
    """Return 1 for each completion token and 0 for padding, with the shape (N, T) and the device of `like`."""
    lengths = torch.tensor([len(r.token_ids) for r in rollouts], device=like.device)
    return (torch.arange(like.shape[1], device=like.device)[None] < lengths[:, None]).float()


def pad_behavior_logprobs(rollouts: Sequence[Rollout], like: torch.Tensor) -> torch.Tensor:
    """Return the log-probabilities at sampling time, with the shape (N, T) and the device of `like`. Padding is 0."""
    logprobs = torch.zeros_like(like)
    for row, rollout in enumerate(rollouts):
        logprobs[row, : len(rollout.logprobs)] = torch.tensor(rollout.logprobs)
    return logprobs


@dataclass(frozen=True)
class TrainedPolicy:
    """This is the policy after an update.

    `save` writes the policy. `save` also saves the state that the next update starts from, in the folder `weights.RL_FOLDER`.
    """

    policy: Any
    tokenizer: Any
    save: Callable[[Path], None]
