"""DPO on soft labels: its first and second step by hand, its optimum, and the reference of the RL phase."""

import math

import pytest
import torch

from engine import checkpoints
from engine.models.chat_template import encode_completion, encode_prompt
from engine.models.interface import GenerationRequest
from engine.models.local import LocalModel
from schemas.records import ChatMessage
from trainer import weights
from trainer.learners import dpo
from trainer.learners.reward import OneSidedLabels, PreferenceExample

EXACT = weights.Hardware(precision="fp32")


def make_pairs(count, p=0.9):
    """Make pairs with different prompts; response A is the better one with probability `p`."""
    return [
        PreferenceExample((ChatMessage(role="user", content=f"say {n * 'n'}"),), "aa", "bbb", p, str(n), True, n % 2 == 0)
        for n in range(count)
    ]


def compute_response_logprob(model, tokenizer, messages, text, ends_with_eos):
    prompt, response = encode_prompt(tokenizer, messages), encode_completion(tokenizer, text, ends_with_eos=ends_with_eos)
    logp = torch.log_softmax(model(torch.tensor([prompt + response])).logits[0].float(), -1)
    return sum(logp[len(prompt) + k - 1, token].item() for k, token in enumerate(response))


def compute_logprob_gaps(folder, examples):
    """Return log p(a) - log p(b) of each example under the policy in a folder."""
    model, tokenizer = weights.load_policy(folder), weights.load_tokenizer(folder)
    with torch.no_grad():
        return [
            compute_response_logprob(model, tokenizer, e.messages, e.response_a, e.ends_with_eos_a)
            - compute_response_logprob(model, tokenizer, e.messages, e.response_b, e.ends_with_eos_b)
            for e in examples
        ]


def test_losses_match_hand_computed_values(tiny, tmp_path):
    """A step has one row, so the second loss is that of the policy after the first step."""
    examples, steps = make_pairs(3, 0.8), []
    save, _ = dpo.train(
        tiny, tiny, examples, learning_rate=1e-3, batch_size=1, hardware=EXACT, on_step=lambda n, m: steps.append(m)
    )
    assert steps[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)  # the policy is the reference
    checkpoints.write_checkpoint(tmp_path / "new", save, {})
    # Train again on the same pair, with the first policy as the reference: the loss before that step is computed by hand below.
    second_steps = []
    dpo.train(
        tmp_path / "new",
        tiny,
        examples[:1],
        learning_rate=1e-3,
        batch_size=1,
        beta=0.3,
        hardware=EXACT,
        on_step=lambda n, m: second_steps.append(m),
    )
    d = 0.3 * (compute_logprob_gaps(tmp_path / "new", examples[:1])[0] - compute_logprob_gaps(tiny, examples[:1])[0])
    by_hand = -(0.8 * math.log(1 / (1 + math.exp(-d))) + 0.2 * math.log(1 / (1 + math.exp(d))))
    assert second_steps[0]["loss"] == pytest.approx(by_hand, abs=1e-5) and abs(d) > 1e-3


@pytest.mark.parametrize("lora_rank", [0, 4])
def test_policy_moves_until_it_matches_the_soft_labels(tiny, tmp_path, lora_rank):
    examples = make_pairs(8, 0.7)
    save, metrics = dpo.train(
        tiny,
        tiny,
        examples,
        learning_rate=5e-3 / (10 if lora_rank else 1),
        epochs=30,
        beta=0.5,
        lora_rank=lora_rank,
        hardware=EXACT,
    )
    checkpoints.write_checkpoint(tmp_path / "new", save, {})
    moved = [
        0.5 * (b - a)
        for a, b in zip(compute_logprob_gaps(tiny, examples), compute_logprob_gaps(tmp_path / "new", examples), strict=True)
    ]
    assert sum(moved) / len(moved) == pytest.approx(math.log(0.7 / 0.3), abs=0.25)  # at the optimum s(beta d) = p
    assert metrics["held_out/accuracy"] == 1.0 and metrics["held_out"] == 2
    # The served (bf16) policy moved too.
    served = [
        LocalModel(folder).score_options([GenerationRequest(examples[0].messages)], ("a", "b"))[0].logprobs
        for folder in (tiny, tmp_path / "new")
    ]
    assert served[1][0] - served[1][1] > served[0][0] - served[0][1] + 0.1
    assert weights.has_adapter_for_reference(tmp_path / "new", tiny) == bool(lora_rank)


def test_undecided_labels_leave_the_policy_unchanged(tiny, tmp_path):
    save, metrics = dpo.train(tiny, tiny, make_pairs(4, 0.5), learning_rate=1e-2, hardware=EXACT)
    checkpoints.write_checkpoint(tmp_path / "new", save, {})
    old, new = (weights.load_policy(folder) for folder in (tiny, tmp_path / "new"))
    assert all(torch.equal(a, b) for a, b in zip(old.parameters(), new.parameters(), strict=True))
    assert "held_out/accuracy" not in metrics


@pytest.mark.parametrize("lora_rank", [0, 4])
def test_second_update_uses_the_reference_of_the_phase(tiny, tmp_path, lora_rank):
    examples = make_pairs(8)
    save, _ = dpo.train(tiny, tiny, examples, learning_rate=5e-3, epochs=4, lora_rank=lora_rank, hardware=EXACT)
    checkpoints.write_checkpoint(tmp_path / "second", save, {})
    steps = []
    dpo.train(
        tmp_path / "second",
        tiny,
        examples[:1],
        learning_rate=1e-3,
        lora_rank=lora_rank,
        hardware=EXACT,
        on_step=lambda n, m: steps.append(m),
    )
    d = compute_logprob_gaps(tmp_path / "second", examples[:1])[0] - compute_logprob_gaps(tiny, examples[:1])[0]
    assert steps[0]["rewards/margins"] == pytest.approx(0.1 * d, abs=1e-4) and d > 0.5


def test_long_prompt_loses_its_beginning_and_responses_stay_complete(tiny):
    tokenizer = weights.load_tokenizer(tiny)
    row = dpo.encode_pair(
        tokenizer, PreferenceExample((ChatMessage(role="user", content="x" * 50),), " abc", " ab", 0.9, "1", True), 13
    )
    whole = encode_prompt(tokenizer, (ChatMessage(role="user", content="x" * 50),))
    assert row["prompt_ids"] == whole[-8:] and len(row["chosen_ids"]) == 5 and len(row["rejected_ids"]) == 3
    row = dpo.encode_pair(tokenizer, PreferenceExample((ChatMessage(role="user", content="x"),), "a" * 50, "ab", 0.9, "1"), 12)
    assert len(row["prompt_ids"]) == 1 and len(row["chosen_ids"]) == 11


def test_one_sided_labels_are_rejected(tiny):
    one_sided = [
        PreferenceExample(e.messages, e.response_a, e.response_b, 0.9, e.record_id, exchangeable=True) for e in make_pairs(16)
    ]
    with pytest.raises(OneSidedLabels, match="all 16 labels prefer the first response"):
        dpo.train(tiny, tiny, one_sided, learning_rate=1e-3)
