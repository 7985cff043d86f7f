"""Rollouts: the prefix that prompts share is computed once, and changes no log-probability and no gradient."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from trainer import weights
from trainer.learners import rollouts as module
from trainer.learners.rollouts import PolicyModel, Rollout, compute_logprobs, make_micro_batches

EXACT = weights.Hardware(micro_batch_size=3, precision="fp32")
SYSTEM = tuple(range(3, 23))
SIZES = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}


def make_rollout(prompt, completion):
    return Rollout((*SYSTEM, *prompt), completion, (0.0,) * len(completion), True, 0, str(prompt), 0.7)


ROLLOUTS = [
    make_rollout((5, 6, 7), (8, 9)),
    make_rollout((5, 6, 7), (10, 11, 12, 13)),
    make_rollout((9,), (5, 4)),
    make_rollout((9,), (3, 4, 5)),
    make_rollout((8, 8), (3,)),
]


@pytest.fixture
def model():
    torch.manual_seed(1)
    return PolicyModel(LlamaForCausalLM(LlamaConfig(**SIZES)), EXACT)


def compute_gradients(model, rows_of_each_batch):
    model.zero_grad()
    for rows in rows_of_each_batch:
        logp, entropy = model(model.pad_rollouts([ROLLOUTS[row] for row in rows], 4), entropy=True)
        (logp.square().sum() + entropy.sum()).backward()
    return [parameter.grad.clone() for parameter in model.policy.parameters()]


def test_prefix_is_computed_once_and_changes_only_rounding(model, monkeypatch):
    assert model.supports_prefix
    prefixes, compute_prefix = [], model.compute_prefix
    monkeypatch.setattr(model, "compute_prefix", lambda prefix: prefixes.append(prefix) or compute_prefix(prefix))
    found, gradients = compute_logprobs(model, ROLLOUTS, 4), compute_gradients(model, [[0, 1], [2, 3, 4]])
    assert prefixes[-2:] == [(*SYSTEM, 5, 6), SYSTEM]  # the last token of a prompt predicts the first one of the completion
    prefixes.clear()
    model.supports_prefix = False
    one_by_one = compute_gradients(model, [[row] for row in range(len(ROLLOUTS))])
    assert torch.allclose(found, compute_logprobs(model, ROLLOUTS, 4), atol=1e-5) and found.min() < -1
    for gradient, expected in zip(gradients, one_by_one, strict=True):
        assert torch.allclose(gradient, expected, atol=1e-4)
    assert prefixes == [] and max(gradient.abs().max() for gradient in gradients) > 0.1


def test_models_with_other_caches_compute_each_prompt_whole():
    sliding = MistralForCausalLM(MistralConfig(**SIZES, num_key_value_heads=2, sliding_window=4))
    assert not PolicyModel(sliding, EXACT).supports_prefix
    checkpointed = weights.Hardware(micro_batch_size=3, precision="fp32", gradient_checkpointing=True)
    assert not PolicyModel(LlamaForCausalLM(LlamaConfig(**SIZES)), checkpointed).supports_prefix


def test_rows_of_one_prompt_go_together_if_fewer_tokens_are_computed():
    long_prompts = [make_rollout((n,) * 30, (4,) * length) for length in (1, 2, 3) for n in (5, 6)]
    together = make_micro_batches(long_prompts, range(6), 3, share_prefix=True)
    assert together == [[0, 2, 4], [1, 3, 5]]
    assert make_micro_batches(long_prompts, range(6), 3) == [[0, 1, 2], [3, 4, 5]]
    short_prompts = [make_rollout((n,), (4,) * length) for length in (1, 60) for n in (5, 6)]
    by_length = make_micro_batches(short_prompts, range(4), 2, share_prefix=True)
    assert by_length == [[0, 1], [2, 3]]


def test_common_prefix_is_long_and_leaves_a_token_of_each_prompt():
    same = [Rollout(SYSTEM, (5,), (0.0,), True, 0, "a")] * 2
    assert module.find_common_prefix(same) == SYSTEM[:-1]
    assert module.find_common_prefix([same[0]]) == ()
    assert module.find_common_prefix([Rollout(SYSTEM[:10], (5,), (0.0,), True, 0, "a")] * 2) == ()
