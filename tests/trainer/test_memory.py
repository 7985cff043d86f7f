"""The estimate of the memory of an update agrees with the tensors of small models."""

from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from trainer import memory, weights
from trainer.learners.rollouts import PolicyModel, Rollout

SETTINGS = memory.UpdateSettings(sequence_length=96, completion_length=64, micro_batch_size=3)


def measure_kept_bytes(model, settings):
    """Return the bytes of the tensors that autograd keeps for one forward pass, except the parameters."""
    policy = PolicyModel(model, weights.Hardware(precision="fp32", gradient_checkpointing=settings.gradient_checkpointing))
    prompt_length = settings.sequence_length - settings.completion_length
    tokens = tuple(1 + n % 50 for n in range(settings.completion_length))
    rollouts = [
        Rollout(tuple(1 + (n + row) % 50 for n in range(prompt_length)), tokens, (0.0,) * len(tokens), True, 0, "")
        for row in range(settings.micro_batch_size)
    ]
    batch, kept = policy.pad_rollouts(rollouts, settings.completion_length), {}
    parameters = {p.untyped_storage().data_ptr() for p in policy.parameters()}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        policy(batch)
    return sum(kept.values())


@pytest.mark.parametrize("is_tied", [True, False])
def test_the_parameters_and_the_activations_agree_with_models(tmp_path, is_tied):
    config = LlamaConfig(
        vocab_size=300, hidden_size=96, intermediate_size=256, num_hidden_layers=3, num_attention_heads=6, num_key_value_heads=2,
        tie_word_embeddings=is_tied,
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    shape, model = memory.read_shape(tmp_path), LlamaForCausalLM(config)
    assert shape.num_parameters == model.num_parameters()
    logits = 3 * 64 * 300 * 4  # the estimate of the rest has no vocabulary
    kept = measure_kept_bytes(model, SETTINGS) - logits
    estimate = memory.estimate_update(replace(shape, vocab_size=0), SETTINGS, 1).activations
    assert kept == pytest.approx(estimate, rel=0.1)
    checkpointed = replace(SETTINGS, gradient_checkpointing=True)
    kept_at_once = measure_kept_bytes(model, checkpointed) - logits + kept / 3  # one of the layers is computed again
    assert kept_at_once == pytest.approx(
        memory.estimate_update(replace(shape, vocab_size=0), checkpointed, 1).activations, rel=0.1
    )
    adapted = weights.add_lora(model, 8, "CAUSAL_LM")
    assert shape.count_lora_parameters(8) == sum(p.numel() for p in adapted.parameters() if p.requires_grad)


def test_more_cards_need_less_memory_each_and_adapters_less_than_all_weights():
    shape = memory.SHAPES[1]
    assert shape.num_parameters == 8_030_261_248  # Llama 3.1 8B
    alone, eight = (memory.estimate_update(shape, SETTINGS, n) for n in (1, 8))
    assert alone.weights + alone.gradients + alone.adam == 16 * shape.num_parameters
    assert (eight.weights, eight.gradients, eight.adam) == tuple(n * shape.num_parameters // 8 for n in (4, 4, 8))
    lora = memory.estimate_update(shape, replace(SETTINGS, lora_rank=16, base_dtype="bf16", bf16=True), 8)
    assert lora.weights == 2 * shape.num_parameters // 8
    assert lora.total < eight.total < alone.total
    lines = memory.format_estimates(memory.SHAPES, [SETTINGS, replace(SETTINGS, lora_rank=16)], [1, 8])
    assert [line.split()[0] for line in lines] == ["model", "1B", "1B", "8B", "8B", "70B", "70B"]


def test_a_model_of_another_form_has_no_estimate(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "gpt2", "n_embd": 768}')
    assert memory.read_shape(tmp_path) is None
