"""DPO on soft labels: its first and second step by hand, where it stops pulling, and the reference of the RL phase."""

import math

import pytest
import torch

from engine import checkpoints
from engine.models.chat_template import encode_completion, encode_prompt
from engine.models.interface import GenerationRequest
from engine.models.local import LocalModel
from schemas.records import ChatMessage
from trainer import dpo, weights
from trainer.reward import OneSidedLabels, PreferenceExample

EXACT = weights.Hardware(precision="fp32")


def pairs(count, p=0.9):
    """Each of a prompt of its own; the answer `a` is the better one."""
    return [
        PreferenceExample((ChatMessage(role="user", content=f"say {n * 'n'}"),), "aa", "bbb", p, str(n), True, n % 2 == 0)
        for n in range(count)
    ]


def answer_logprob(model, tokenizer, messages, text, stopped):
    prompt, answer = encode_prompt(tokenizer, messages), encode_completion(tokenizer, text, ends_with_eos=stopped)
    logp = torch.log_softmax(model(torch.tensor([prompt + answer])).logits[0].float(), -1)
    return sum(logp[len(prompt) + k - 1, token].item() for k, token in enumerate(answer))


def gaps(folder, examples):
    """log p(a) - log p(b) of each example under the policy in a folder."""
    model, tokenizer = weights.load_policy(folder), weights.load_tokenizer(folder)
    with torch.no_grad():
        return [
            answer_logprob(model, tokenizer, e.messages, e.response_a, e.ends_with_eos_a)
            - answer_logprob(model, tokenizer, e.messages, e.response_b, e.ends_with_eos_b)
            for e in examples
        ]


def test_the_losses_are_the_hand_computed_ones(tiny, tmp_path):
    """One row for each step, so that the second loss is that of the policy which the first step made."""
    examples, steps = pairs(3, 0.8), []
    save, _ = dpo.train(
        tiny, tiny, examples, learning_rate=1e-3, batch_size=1, hardware=EXACT, on_step=lambda n, m: steps.append(m)
    )
    assert steps[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)  # the policy is the reference
    checkpoints.write_checkpoint(tmp_path / "new", save, {})
    # Training again on the same pair, held to the first policy: the loss before that step is the one by hand.
    again = []
    dpo.train(
        tmp_path / "new",
        tiny,
        examples[:1],
        learning_rate=1e-3,
        batch_size=1,
        beta=0.3,
        hardware=EXACT,
        on_step=lambda n, m: again.append(m),
    )
    d = 0.3 * (gaps(tmp_path / "new", examples[:1])[0] - gaps(tiny, examples[:1])[0])
    by_hand = -(0.8 * math.log(1 / (1 + math.exp(-d))) + 0.2 * math.log(1 / (1 + math.exp(d))))
    assert again[0]["loss"] == pytest.approx(by_hand, abs=1e-5) and abs(d) > 1e-3


@pytest.mark.parametrize("lora_rank", [0, 4])
def test_the_policy_moves_as_far_as_the_labels_say(tiny, tmp_path, lora_rank):
    examples = pairs(8, 0.7)
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
    moved = [0.5 * (b - a) for a, b in zip(gaps(tiny, examples), gaps(tmp_path / "new", examples), strict=True)]
    assert sum(moved) / len(moved) == pytest.approx(math.log(0.7 / 0.3), abs=0.25)  # s(beta d) = p, and no further
    assert metrics["held_out/accuracy"] == 1.0 and metrics["held_out"] == 2
    # What is served moved too.
    served = [
        LocalModel(folder).score_options([GenerationRequest(examples[0].messages)], ("a", "b"))[0].logprobs
        for folder in (tiny, tmp_path / "new")
    ]
    assert served[1][0] - served[1][1] > served[0][0] - served[0][1] + 0.1
    assert weights.has_adapter_for_reference(tmp_path / "new", tiny) == bool(lora_rank)


def test_an_undecided_judge_moves_nothing(tiny, tmp_path):
    save, metrics = dpo.train(tiny, tiny, pairs(4, 0.5), learning_rate=1e-2, hardware=EXACT)
    checkpoints.write_checkpoint(tmp_path / "new", save, {})
    old, new = (weights.load_policy(folder) for folder in (tiny, tmp_path / "new"))
    assert all(torch.equal(a, b) for a, b in zip(old.parameters(), new.parameters(), strict=True))
    assert "held_out/accuracy" not in metrics


@pytest.mark.parametrize("lora_rank", [0, 4])
def test_a_second_update_is_held_to_the_reference_of_the_phase(tiny, tmp_path, lora_rank):
    examples = pairs(8)
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
    d = gaps(tmp_path / "second", examples[:1])[0] - gaps(tiny, examples[:1])[0]
    assert steps[0]["rewards/margins"] == pytest.approx(0.1 * d, abs=1e-4) and d > 0.5


def test_a_long_prompt_loses_its_beginning_and_answers_are_whole(tiny):
    tokenizer = weights.load_tokenizer(tiny)
    row = dpo.encode_pair(
        tokenizer, PreferenceExample((ChatMessage(role="user", content="x" * 50),), " abc", " ab", 0.9, "1", True), 13
    )
    whole = encode_prompt(tokenizer, (ChatMessage(role="user", content="x" * 50),))
    assert row["prompt_ids"] == whole[-8:] and len(row["chosen_ids"]) == 5 and len(row["rejected_ids"]) == 3
    row = dpo.encode_pair(tokenizer, PreferenceExample((ChatMessage(role="user", content="x"),), "a" * 50, "ab", 0.9, "1"), 12)
    assert len(row["prompt_ids"]) == 1 and len(row["chosen_ids"]) == 11


def test_one_sided_labels_are_refused(tiny):
    one_sided = [
        PreferenceExample(e.messages, e.response_a, e.response_b, 0.9, e.record_id, exchangeable=True) for e in pairs(16)
    ]
    with pytest.raises(OneSidedLabels, match="all 16 labels prefer the first answer"):
        dpo.train(tiny, tiny, one_sided, learning_rate=1e-3)
