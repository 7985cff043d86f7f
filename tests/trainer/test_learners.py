"""SFT and the reward model: masks, losses against closed forms and loops, and the effect on the served policy."""

import math
import random
import statistics
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine import checkpoints
from engine.models.interface import GenerationRequest
from engine.models.local import LocalModel
from schemas.records import ChatMessage
from trainer import weights
from trainer.learners import reward, sft
from trainer.learners.reward import (
    EqualRewards,
    OneSidedLabels,
    PreferenceExample,
    RewardModelAtChance,
    RewardModelRegression,
    compute_soft_label_loss,
)
from trainer.learners.sft import IGNORE_INDEX, SftExample

MESSAGES = (ChatMessage(role="user", content="say a"),)


# SFT


def test_sft_masks_the_prompt_and_learns_the_end_token_only_of_complete_responses(tiny):
    tokenizer = weights.load_tokenizer(tiny)
    complete = sft.encode_example(tokenizer, SftExample(MESSAGES, "abc", True, "x"), 256)
    truncated = sft.encode_example(tokenizer, SftExample(MESSAGES, "abc", False, "x"), 256)
    prompt = LocalModel(tiny).encode_request(GenerationRequest(MESSAGES), 1)  # the tokens that generation uses
    assert complete["input_ids"][: len(prompt)] == prompt and set(complete["labels"][: len(prompt)]) == {IGNORE_INDEX}
    assert complete["labels"][len(prompt) :] == complete["input_ids"][len(prompt) :]
    assert complete["input_ids"] == [*truncated["input_ids"], tokenizer.eos_token_id]
    short = sft.encode_example(tokenizer, SftExample(MESSAGES, "abc" * 100, True, "x"), 40)
    assert len(short["input_ids"]) == len(short["labels"]) == 40


def test_sft_tokens_match_the_chat_template(smollm2):
    """Tokens and mask are those of the whole dialogue in the model's template, except for what follows the end token."""
    tokenizer = weights.load_tokenizer(smollm2)
    messages = (
        ChatMessage(role="user", content="Why?"),
        ChatMessage(role="assistant", content="So."),
        ChatMessage(role="user", content="Really? 🙂"),
    )
    row = sft.encode_example(tokenizer, SftExample(messages, "Yes, really.", True, "x"), 512)
    dialogue = [{"role": message.role, "content": message.content} for message in messages]
    whole = tokenizer.apply_chat_template([*dialogue, {"role": "assistant", "content": "Yes, really."}], tokenize=False)
    prompt = tokenizer.apply_chat_template(dialogue, tokenize=False, add_generation_prompt=True)
    assert whole == tokenizer.decode(row["input_ids"]) + "\n"
    assert row["input_ids"] == tokenizer(whole, add_special_tokens=False)["input_ids"][:-1]
    learned = [token for token, label in zip(row["input_ids"], row["labels"], strict=True) if label != IGNORE_INDEX]
    assert prompt + tokenizer.decode(learned) + "\n" == whole
    assert [label for label in row["labels"] if label != IGNORE_INDEX] == learned and learned[-1] == tokenizer.eos_token_id


def compute_loss_by_hand(model, rows):
    """Return the token-mean negative log-likelihood, computed one row at a time."""
    total, count = 0.0, 0
    for row in rows:
        logits = model(torch.tensor([row["input_ids"]])).logits[0]
        for t, label in enumerate(row["labels"][1:]):
            if label != IGNORE_INDEX:
                total -= torch.log_softmax(logits[t].float(), -1)[label].item()
                count += 1
    return total / count


@pytest.mark.parametrize("padding_free", [True, False])
def test_first_sft_loss_matches_a_hand_computed_value(tiny, padding_free, monkeypatch):
    """In both layouts of a pass: concatenated sequences do not attend to each other."""
    examples = [
        SftExample(MESSAGES, text, ends_with_eos, text)
        for text, ends_with_eos in (("abc", True), ("hello there", False), ("a", True))
    ]
    tokenizer, policy = weights.load_tokenizer(tiny), weights.load_policy(tiny)
    assert sft.supports_padding_free(policy)
    if not padding_free:
        monkeypatch.setattr(sft, "supports_padding_free", lambda model: False)
    expected = compute_loss_by_hand(policy, [sft.encode_example(tokenizer, e, 256) for e in examples])
    steps = []
    exact = weights.Hardware(precision="fp32")
    sft.train(tiny, examples, learning_rate=1e-3, batch_size=4, hardware=exact, on_step=lambda n, m: steps.append(m))
    assert steps[0]["loss"] == pytest.approx(expected, abs=1e-5)


def test_model_that_ignores_position_ids_is_padded(tiny):
    model = weights.load_policy(tiny)
    forward = model.forward
    model.forward = lambda input_ids, **more: forward(input_ids, **{k: v for k, v in more.items() if k != "position_ids"})
    assert not sft.supports_padding_free(model)


def get_served_logprob(folder, letter):
    """Return the log-probability of a letter as the first of the response, under the served (bf16) model."""
    return LocalModel(folder).score_options([GenerationRequest(MESSAGES)], (letter,))[0].logprobs[0]


@pytest.mark.parametrize("lora_rank", [0, 4])
def test_sft_update_changes_the_served_policy(tiny, tmp_path, lora_rank):
    examples = [SftExample(MESSAGES, "aaaa", True, str(n)) for n in range(16)]
    steps = []
    model, tokenizer, metrics = sft.train(
        tiny, examples, learning_rate=5e-3, epochs=6, batch_size=8, lora_rank=lora_rank,
        on_step=lambda n, m: steps.append(m["loss"]),
    )  # fmt: skip
    weights.make_saver(model, tokenizer)(tmp_path / "new")
    before, after = (get_served_logprob(folder, "a") for folder in (tiny, tmp_path / "new"))
    assert after > before + 0.1
    assert steps[-1] < steps[0] and metrics["examples"] == 16 and len(steps) == metrics["steps"] == 12


def test_same_seed_gives_the_same_weights(tiny):
    examples = [SftExample(MESSAGES, f"{'ab' * n}", True, str(n)) for n in range(1, 9)]
    first, second = (sft.train(tiny, examples, learning_rate=1e-3, seed=5)[0] for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


# The reward model


@given(st.floats(-5, 5), st.floats(-5, 5), st.floats(0, 1))
def test_soft_label_loss_matches_the_closed_form(a, b, p):
    loss = compute_soft_label_loss(torch.tensor([a]), torch.tensor([b]), torch.tensor([p]), 0.01).item()
    sigmoid = 1 / (1 + math.exp(b - a))
    closed = -(p * math.log(sigmoid) + (1 - p) * math.log(1 - sigmoid)) + 0.01 * (a + b) ** 2
    assert loss == pytest.approx(closed, rel=1e-4, abs=1e-5)


def test_soft_label_loss_is_minimal_where_the_sigmoid_equals_the_label():
    for p in (0.5, 0.7, 0.99):
        best = math.log(p / (1 - p))
        at = [
            compute_soft_label_loss(torch.tensor([g]), torch.tensor([0.0]), torch.tensor([p]), 0.0).item()
            for g in (best - 0.1, best, best + 0.1)
        ]
        assert at[1] < at[0] and at[1] < at[2]
    hard = compute_soft_label_loss(torch.tensor([1.0]), torch.tensor([0.0]), torch.tensor([1.0]), 0.0).item()
    assert hard == pytest.approx(-math.log(1 / (1 + math.exp(-1))))  # p = 1 is Bradley-Terry


def make_pairs(count, p=0.9):
    """Make pairs with different prompts, in which response A is better with probability `p`."""
    return [
        PreferenceExample(
            (ChatMessage(role="user", content=f"say a {n * 'n'}"),),
            "aaaa"[: 1 + n % 4] + "a",
            "bbbb"[: 1 + n % 4] + "b",
            p,
            str(n),
            True,
            True,
        )
        for n in range(count)
    ]


def test_reward_model_learns_and_saves_its_normalization(tiny, tmp_path):
    steps = []
    model, metrics = reward.train(
        tiny, make_pairs(16), learning_rate=5e-3, epochs=8, batch_size=8, on_step=lambda n, m: steps.append(m["loss"])
    )
    assert steps[0] == pytest.approx(math.log(2), abs=1e-3)  # a new head gives all responses the same score
    assert steps[-1] < steps[0] and metrics["reward/accuracy"] == 1.0
    responses = [(MESSAGES, text, True) for text in ("aaa", "bbb", "aaaaa")]
    raw = model.score(responses)
    assert raw[0] > raw[1]
    # 16 pairs are too few to hold enough of them out, so all are used.
    all_responses = [(e.messages, text, True) for e in make_pairs(16) for text in (e.response_a, e.response_b)]
    normal = torch.tensor(model.normalize(model.score(all_responses)))
    assert normal.mean().item() == pytest.approx(0, abs=1e-2) and normal.std(correction=0).item() == pytest.approx(1, abs=1e-2)
    (tmp_path / "r").mkdir()
    model.save(tmp_path / "r")
    again = reward.load_reward_model(tmp_path / "r")
    assert again.normalize(again.score(responses)) == pytest.approx(model.normalize(raw), abs=1e-2)


@pytest.mark.parametrize("lora_rank", [0, 4])
def test_training_and_scoring_read_the_same_position(tiny, monkeypatch, lora_rank):
    """Scores are read at the end of each sequence, before any padding. trl would set the tokenizer's padding token."""
    calls, compute_loss = [], reward.SoftLabelRewardTrainer.compute_loss

    def record_scores(self, model, inputs, *more, **named):
        result = compute_loss(self, model, dict(inputs), *more, **named)
        alone = [
            model(input_ids=ids[mask.bool()][None], use_cache=False).logits.item()
            for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)
        ]
        together = model(**{k: v for k, v in inputs.items() if k != "p_a"}, use_cache=False).logits.flatten().tolist()
        calls.append((together, alone, int((inputs["attention_mask"] == 0).sum())))
        return result

    monkeypatch.setattr(reward.SoftLabelRewardTrainer, "compute_loss", record_scores)
    exact = weights.Hardware(micro_batch_size=8, precision="fp32")
    reward.train(tiny, make_pairs(40), learning_rate=5e-3, epochs=2, lora_rank=lora_rank, hardware=exact)
    assert any(padding for _, _, padding in calls)
    for together, alone, _ in calls:
        assert together == pytest.approx(alone, abs=1e-4)
    assert any(abs(score) > 1e-3 for _, alone, _ in calls for score in alone)


def test_score_is_read_at_the_last_real_token_when_the_pad_token_is_the_end_token(tiny):
    torch.manual_seed(1)
    scorer = weights.load_scorer(tiny)
    torch.nn.init.normal_(scorer.score.weight)
    model = reward.RewardModel([reward.EnsembleMember(scorer)], weights.load_tokenizer(tiny))
    responses = [(MESSAGES, "a", True), (MESSAGES, "a much longer text", True), (MESSAGES, "a", False)]
    together = model.score(responses)
    assert together == pytest.approx([model.score([one])[0] for one in responses], abs=2e-2)
    assert abs(together[0] - together[2]) > 0.05  # the end token is read, it does not count as padding


def test_equal_scores_raise(tiny):
    same = [PreferenceExample(MESSAGES, "a", "a", 0.9, str(n), True, True) for n in range(4)]
    with pytest.raises(EqualRewards, match="same score"):
        reward.train(tiny, same, learning_rate=1e-3)


def test_lora_reward_model_is_saved_merged(tiny, tmp_path):
    model, _ = reward.train(tiny, make_pairs(8), learning_rate=5e-4, epochs=2, lora_rank=4)
    (tmp_path / "r").mkdir()
    model.save(tmp_path / "r")
    responses = [(MESSAGES, "aa", True), (MESSAGES, "bb", True)]
    assert reward.load_reward_model(tmp_path / "r").score(responses) == pytest.approx(model.score(responses), abs=1e-2)


# Held-out labels


def test_held_out_prompts_are_the_same_in_every_batch():
    """A prompt, with all of its labels, is held out in every batch that is large enough, or in none."""
    examples = [replace(pair, record_id=f"{n}") for n, pair in enumerate(make_pairs(200) + make_pairs(200))]
    train_examples, held_out = reward.split_held_out(examples)
    assert len(train_examples) + len(held_out) == 400 and 20 <= len(held_out) <= 60
    prompts = {example.messages for example in held_out}
    assert not prompts & {example.messages for example in train_examples}
    again = reward.split_held_out(list(reversed(examples[:350])))[1]
    assert {example.messages for example in again} == {
        example.messages for example in examples[:350] if example.messages in prompts
    }
    few = reward.split_held_out(make_pairs(12))
    assert len(few[1]) == 3 and len(few[0]) == 9  # of a small batch a quarter
    assert reward.split_held_out(make_pairs(1)) == (make_pairs(1), [])


def test_agreement_metrics_match_a_loop():
    rng = random.Random(3)
    members, count = 3, 40
    raw = torch.tensor([[rng.gauss(0, 2) for _ in range(2 * count)] for _ in range(members)])
    scores, lengths = raw.mean(0), torch.tensor([float(rng.randrange(1, 90)) for _ in range(2 * count)])
    labels = [rng.choice((0.5, 0.2, 0.9, rng.random())) for _ in range(count)]
    metrics = reward.compute_agreement_metrics(raw, scores, torch.tensor(labels), lengths)
    right, longer, decided, margin, brier = 0, 0, 0, 0.0, 0.0
    bins = {}
    for n, p in enumerate(labels):
        gap, sign = (scores[n] - scores[count + n]).item(), (p > 0.5) - (p < 0.5)
        decided += p != 0.5
        right += p != 0.5 and gap * sign > 0
        longer += p != 0.5 and (lengths[n] - lengths[count + n]).item() * sign > 0
        margin += gap * sign / count
        predicted = sum(1 / (1 + math.exp(raw[m, count + n].item() - raw[m, n].item())) for m in range(members)) / members
        brier += (predicted - p) ** 2 / count
        bins.setdefault(min(9, int(predicted * 10)), []).append(predicted - p)
    ece = sum(abs(sum(gaps)) for gaps in bins.values()) / count
    r = statistics.correlation(scores.tolist(), lengths.tolist())
    spread = sum(statistics.pstdev(raw[:, n].tolist()) for n in range(2 * count)) / (2 * count)
    expected = {
        "reward/accuracy": right / decided, "reward/length_accuracy": longer / decided, "reward/margin": margin,
        "reward/brier": brier, "reward/ece": ece, "reward/length_correlation": r, "reward/disagreement": spread,
    }  # fmt: skip
    assert metrics == pytest.approx(expected, abs=1e-5)


def test_ensemble_score_subtracts_the_variance_of_its_members(tiny, tmp_path):
    settings = {"learning_rate": 5e-3, "epochs": 2, "batch_size": 8, "hardware": weights.Hardware(precision="fp32")}
    steps = []
    model, metrics = reward.train(
        tiny, make_pairs(40), ensemble_size=3, variance_penalty=0.5, on_step=lambda n, m: steps.append(n), **settings
    )
    assert steps == list(range(1, len(steps) + 1)) and metrics["steps"] == len(steps) and metrics["reward/disagreement"] > 0
    responses = [(MESSAGES, text, True) for text in ("aaa", "bbb", "hmm")]
    raw, members = model.score_members(responses), model.members
    by_hand = []
    for n in range(len(responses)):
        normalized = [(raw[m, n].item() - members[m].mean) / members[m].deviation for m in range(3)]
        by_hand.append(statistics.mean(normalized) - 0.5 * statistics.pvariance(normalized))
    assert model.score(responses) == pytest.approx(by_hand, abs=1e-4)
    assert len({round(x, 4) for x in raw[:, 2].tolist()}) == 3  # members differ
    folder = checkpoints.write_checkpoint(tmp_path / "ensemble", model.save, {}).folder
    again = reward.load_reward_model(folder, settings["hardware"])
    assert again.normalize(again.score(responses)) == pytest.approx(model.normalize(by_hand), abs=1e-4)
    # Each member is trained further, and one member alone is also a reward model.
    for number in range(3):
        start = reward.load_initial_scorer(folder, number, 0)
        assert torch.equal(start.score.weight, members[number].model.score.weight)
    assert len(reward.train(folder, make_pairs(40), ensemble_size=1, **settings)[0].members) == 1


def test_normalization_uses_the_held_out_responses(tiny):
    examples = make_pairs(100)
    train_examples, held_out = reward.split_held_out(examples)
    model, metrics = reward.train(tiny, examples, learning_rate=5e-3, hardware=weights.Hardware(precision="fp32"))
    responses = [(e.messages, text, True) for e in held_out for text in (e.response_a, e.response_b)]
    normal = torch.tensor(model.normalize(model.score(responses)))
    assert normal.mean().item() == pytest.approx(0, abs=1e-3) and normal.std(correction=0).item() == pytest.approx(1, abs=1e-3)
    assert metrics["reward/held_out"] == len(held_out) >= 8 and metrics["examples"] == len(train_examples)


@pytest.mark.parametrize(
    ("agreed", "labels", "outcome"),
    [
        (500, 1000, "rejected"), (165, 300, "rejected"), (168, 300, "accepted"),  # P(at least 168 of 300 heads) = 0.022
        (12, 16, "rejected"), (13, 16, "accepted"),  # 0.038 and 0.011: sums of binomial coefficients over 2^16
        (15, 15, "accepted"), (11, 15, "warned"), (4, 4, "warned"), (0, 0, "warned"),
    ],
)  # fmt: skip
def test_chance_check_rejects_warns_or_accepts(caplog, agreed, labels, outcome):
    with (
        pytest.raises(RewardModelAtChance, match=f"agrees with {agreed} of {labels}")
        if outcome == "rejected"
        else nullcontext()
    ):
        reward.check_against_chance(agreed, labels, require=True)
    assert bool(caplog.records) == (outcome == "warned")
    caplog.clear()
    reward.check_against_chance(agreed, labels, require=False)
    assert bool(caplog.records) == (outcome != "accepted")


def test_chance_check_without_held_out_labels_says_so(caplog):
    reward.check_against_chance(0, 0, require=True)
    assert "no label is held out" in caplog.text and "0 of 0" not in caplog.text


def test_reward_model_trained_on_noise_is_rejected(tiny):
    """The same responses are learned when the labels follow from their content."""
    settings = {"learning_rate": 5e-3, "batch_size": 8, "hardware": weights.Hardware(precision="fp32")}
    flip = random.Random(7)
    noise = [replace(pair, p_a=flip.choice((0.1, 0.9))) for pair in make_pairs(300)]
    with pytest.raises(RewardModelAtChance) as error:
        reward.train(tiny, noise, **settings)
    assert str(error.value).count("\n") == 2
    assert reward.train(tiny, noise, **settings, require_above_chance=False)[1]["reward/accuracy"] < 0.8
    assert reward.train(tiny, make_pairs(300), **settings)[1]["reward/accuracy"] == 1.0


@pytest.mark.parametrize(("p", "side"), [(0.9, "first"), (0.1, "second")])
def test_one_sided_labels_raise(tiny, p, side):
    one_sided = [replace(pair, exchangeable=True, p_a=p) for pair in make_pairs(16)]
    with pytest.raises(OneSidedLabels, match=f"all 16 labels prefer the {side} response") as error:
        reward.train(tiny, one_sided, learning_rate=1e-3)
    assert str(error.value).count("\n") == 2
    reward.require_two_sided_labels(one_sided[:15])  # 15 equal labels may be chance
    reward.require_two_sided_labels([*one_sided, replace(one_sided[0], p_a=1 - p)])
    reward.require_two_sided_labels(make_pairs(16, p))  # a revision may always be better than the initial response


def test_reward_model_that_regresses_is_rejected(tiny, tmp_path):
    """New labels contradict the earlier ones: the model no longer agrees with the held-out labels."""
    settings = {"learning_rate": 2e-3, "epochs": 3, "batch_size": 8, "hardware": weights.Hardware(precision="fp32")}
    model, _ = reward.train(tiny, make_pairs(100), **settings)
    folder = checkpoints.write_checkpoint(tmp_path / "first", model.save, {}).folder
    _, held_out = reward.split_held_out(make_pairs(100))
    assert model.check_label_agreement(held_out).all()
    opposite = [pair if pair in held_out else replace(pair, p_a=0.1) for pair in make_pairs(100)]
    with pytest.raises(
        RewardModelRegression, match=f"agrees with [01] of {len(held_out)} held-out labels, and the previous model"
    ) as error:
        reward.train(folder, opposite, **settings)
    assert str(error.value).count("\n") == 2
    assert reward.train(folder, make_pairs(100), **settings)[1]["reward/accuracy"] == 1.0


@pytest.mark.parametrize(
    ("lost", "won", "regresses"), [(10, 2, True), (5, 1, False), (4, 0, True), (3, 0, False), (2, 9, False)]
)
def test_regression_check_allows_changes_within_chance(lost, won, regresses):
    before = torch.tensor([True] * lost + [False] * won + [True] * 30 + [False] * 5)
    after = torch.tensor([False] * lost + [True] * won + [True] * 30 + [False] * 5)
    if regresses:
        with pytest.raises(RewardModelRegression):
            reward.require_no_regression(before, after)
    else:
        reward.require_no_regression(before, after)


def test_label_agreement_ignores_undecided_labels(tiny):
    model = reward.train(tiny, make_pairs(16), learning_rate=5e-3, epochs=8, batch_size=8)[0]
    agreement = model.check_label_agreement(
        [*make_pairs(2), replace(make_pairs(1)[0], p_a=0.5), replace(make_pairs(1)[0], p_a=0.2)]
    )
    assert agreement.tolist() == [True, True, False] and len(model.check_label_agreement([])) == 0
