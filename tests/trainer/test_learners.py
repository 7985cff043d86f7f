"""SFT and the reward model: masks, losses against closed forms and hand loops, and weights that are served changed."""

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
from trainer import reward, sft, weights
from trainer.reward import (
    EqualRewards,
    OneSidedLabels,
    PreferenceExample,
    RewardModelAtChance,
    RewardModelRegression,
    compute_soft_label_loss,
)
from trainer.sft import IGNORE_INDEX, SftExample

TURNS = (ChatMessage(role="user", content="say a"),)


# SFT


def test_prompt_tokens_are_masked_and_the_end_is_learned_only_where_there_was_one(tiny):
    tokenizer = weights.load_tokenizer(tiny)
    stopped = sft.encode_example(tokenizer, SftExample(TURNS, "abc", True, "x"), 256)
    cut = sft.encode_example(tokenizer, SftExample(TURNS, "abc", False, "x"), 256)
    prompt = LocalModel(tiny).encode_request(GenerationRequest(TURNS), 1)  # what generation uses
    assert stopped["input_ids"][: len(prompt)] == prompt and set(stopped["labels"][: len(prompt)]) == {IGNORE_INDEX}
    assert stopped["labels"][len(prompt) :] == stopped["input_ids"][len(prompt) :]
    assert stopped["input_ids"] == [*cut["input_ids"], tokenizer.eos_token_id]
    short = sft.encode_example(tokenizer, SftExample(TURNS, "abc" * 100, True, "x"), 40)
    assert len(short["input_ids"]) == len(short["labels"]) == 40


def test_chat_templates_are_exact(smollm2):
    """Ids and mask are those of the whole dialogue in the model's own template, up to what it writes after the end token."""
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


def hand_loss(model, rows):
    """Token-mean negative log-likelihood, one row at a time."""
    total, count = 0.0, 0
    for row in rows:
        logits = model(torch.tensor([row["input_ids"]])).logits[0]
        for t, label in enumerate(row["labels"][1:]):
            if label != IGNORE_INDEX:
                total -= torch.log_softmax(logits[t].float(), -1)[label].item()
                count += 1
    return total / count


@pytest.mark.parametrize("end_to_end", [True, False])
def test_the_first_steps_loss_is_the_hand_computed_one(tiny, end_to_end, monkeypatch):
    """In both layouts of a pass: texts laid end to end do not see each other."""
    examples = [
        SftExample(TURNS, text, stopped, text) for text, stopped in (("abc", True), ("hello there", False), ("a", True))
    ]
    tokenizer, policy = weights.load_tokenizer(tiny), weights.load_policy(tiny)
    assert sft.supports_padding_free(policy)
    if not end_to_end:
        monkeypatch.setattr(sft, "supports_padding_free", lambda model: False)
    expected = hand_loss(policy, [sft.encode_example(tokenizer, e, 256) for e in examples])
    steps = []
    exact = weights.Hardware(precision="fp32")
    sft.train(tiny, examples, learning_rate=1e-3, batch_size=4, hardware=exact, on_step=lambda n, m: steps.append(m))
    assert steps[0]["loss"] == pytest.approx(expected, abs=1e-5)


def test_a_model_that_looks_into_the_text_before_is_padded(tiny):
    model = weights.load_policy(tiny)
    forward = model.forward
    model.forward = lambda input_ids, **more: forward(input_ids, **{k: v for k, v in more.items() if k != "position_ids"})
    assert not sft.supports_padding_free(model)


def served(folder, letter):
    """The log-probability that the served (bf16) model gives a letter as the answer's first."""
    return LocalModel(folder).score_options([GenerationRequest(TURNS)], (letter,))[0].logprobs[0]


@pytest.mark.parametrize("lora_rank", [0, 4])
def test_an_update_changes_what_is_served(tiny, tmp_path, lora_rank):
    examples = [SftExample(TURNS, "aaaa", True, str(n)) for n in range(16)]
    steps = []
    model, tokenizer, metrics = sft.train(
        tiny, examples, learning_rate=5e-3, epochs=6, batch_size=8, lora_rank=lora_rank,
        on_step=lambda n, m: steps.append(m["loss"]),
    )  # fmt: skip
    weights.make_saver(model, tokenizer)(tmp_path / "new")
    before, after = (served(folder, "a") for folder in (tiny, tmp_path / "new"))
    assert after > before + 0.1
    assert steps[-1] < steps[0] and metrics["examples"] == 16 and len(steps) == metrics["steps"] == 12


def test_the_same_seed_trains_the_same(tiny):
    examples = [SftExample(TURNS, f"{'ab' * n}", True, str(n)) for n in range(1, 9)]
    first, second = (sft.train(tiny, examples, learning_rate=1e-3, seed=5)[0] for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


# The reward model


@given(st.floats(-5, 5), st.floats(-5, 5), st.floats(0, 1))
def test_soft_label_loss_is_the_closed_form(a, b, p):
    loss = compute_soft_label_loss(torch.tensor([a]), torch.tensor([b]), torch.tensor([p]), 0.01).item()
    sigmoid = 1 / (1 + math.exp(b - a))
    closed = -(p * math.log(sigmoid) + (1 - p) * math.log(1 - sigmoid)) + 0.01 * (a + b) ** 2
    assert loss == pytest.approx(closed, rel=1e-4, abs=1e-5)


def test_soft_label_loss_has_its_minimum_where_the_sigmoid_is_the_label():
    for p in (0.5, 0.7, 0.99):
        best = math.log(p / (1 - p))
        at = [
            compute_soft_label_loss(torch.tensor([g]), torch.tensor([0.0]), torch.tensor([p]), 0.0).item()
            for g in (best - 0.1, best, best + 0.1)
        ]
        assert at[1] < at[0] and at[1] < at[2]
    hard = compute_soft_label_loss(torch.tensor([1.0]), torch.tensor([0.0]), torch.tensor([1.0]), 0.0).item()
    assert hard == pytest.approx(-math.log(1 / (1 + math.exp(-1))))  # p = 1 is Bradley-Terry


def pairs(count, p=0.9):
    """Pairs in which the answer of `a` is better, each of a prompt of its own."""
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


def test_the_reward_model_learns_and_keeps_its_normalisation(tiny, tmp_path):
    steps = []
    model, metrics = reward.train(
        tiny, pairs(16), learning_rate=5e-3, epochs=8, batch_size=8, on_step=lambda n, m: steps.append(m["loss"])
    )
    assert steps[0] == pytest.approx(math.log(2), abs=1e-3)  # a fresh head scores everything alike
    assert steps[-1] < steps[0] and metrics["reward/accuracy"] == 1.0
    texts = [(TURNS, text, True) for text in ("aaa", "bbb", "aaaaa")]
    raw = model.score(texts)
    assert raw[0] > raw[1]
    everything = [
        (e.messages, text, True) for e in pairs(16) for text in (e.response_a, e.response_b)
    ]  # too few to hold enough of them out
    normal = torch.tensor(model.normalize(model.score(everything)))
    assert normal.mean().item() == pytest.approx(0, abs=1e-2) and normal.std(correction=0).item() == pytest.approx(1, abs=1e-2)
    (tmp_path / "r").mkdir()
    model.save(tmp_path / "r")
    again = reward.load_reward_model(tmp_path / "r")
    assert again.normalize(again.score(texts)) == pytest.approx(model.normalize(raw), abs=1e-2)


@pytest.mark.parametrize("lora_rank", [0, 4])
def test_training_reads_scores_where_scoring_does(tiny, monkeypatch, lora_rank):
    """At the end of each text, whatever padding stands behind it: trl would have the model look for the tokenizer's own."""
    seen, real = [], reward.SoftLabelRewardTrainer.compute_loss

    def spy(self, model, inputs, *more, **named):
        result = real(self, model, dict(inputs), *more, **named)
        alone = [
            model(input_ids=ids[mask.bool()][None], use_cache=False).logits.item()
            for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)
        ]
        together = model(**{k: v for k, v in inputs.items() if k != "p_a"}, use_cache=False).logits.flatten().tolist()
        seen.append((together, alone, int((inputs["attention_mask"] == 0).sum())))
        return result

    monkeypatch.setattr(reward.SoftLabelRewardTrainer, "compute_loss", spy)
    exact = weights.Hardware(micro_batch_size=8, precision="fp32")
    reward.train(tiny, pairs(40), learning_rate=5e-3, epochs=2, lora_rank=lora_rank, hardware=exact)
    assert any(padding for _, _, padding in seen)
    for together, alone, _ in seen:
        assert together == pytest.approx(alone, abs=1e-4)
    assert any(abs(score) > 1e-3 for _, alone, _ in seen for score in alone)


def test_scores_are_of_the_real_last_token_although_pad_is_the_end_token(tiny):
    torch.manual_seed(1)
    scorer = weights.load_scorer(tiny)
    torch.nn.init.normal_(scorer.score.weight)
    model = reward.RewardModel([reward.EnsembleMember(scorer)], weights.load_tokenizer(tiny))
    texts = [(TURNS, "a", True), (TURNS, "a much longer text", True), (TURNS, "a", False)]
    together = model.score(texts)
    assert together == pytest.approx([model.score([one])[0] for one in texts], abs=2e-2)
    assert abs(together[0] - together[2]) > 0.05  # the end token counts, it is not padding


def test_an_all_equal_reward_is_an_error(tiny):
    same = [PreferenceExample(TURNS, "a", "a", 0.9, str(n), True, True) for n in range(4)]
    with pytest.raises(EqualRewards, match="same score"):
        reward.train(tiny, same, learning_rate=1e-3)


def test_lora_reward_models_are_saved_whole(tiny, tmp_path):
    model, _ = reward.train(tiny, pairs(8), learning_rate=5e-4, epochs=2, lora_rank=4)
    (tmp_path / "r").mkdir()
    model.save(tmp_path / "r")
    texts = [(TURNS, "aa", True), (TURNS, "bb", True)]
    assert reward.load_reward_model(tmp_path / "r").score(texts) == pytest.approx(model.score(texts), abs=1e-2)


# What is held out, and what is said of it


def test_prompts_are_held_out_by_their_text_alone():
    """The same prompt is on the same side in every batch that is large enough, whatever else is in it, and all its labels."""
    examples = [replace(pair, record_id=f"{n}") for n, pair in enumerate(pairs(200) + pairs(200))]
    taught, held_out = reward.split_held_out(examples)
    assert len(taught) + len(held_out) == 400 and 20 <= len(held_out) <= 60
    prompts = {example.messages for example in held_out}
    assert not prompts & {example.messages for example in taught}
    again = reward.split_held_out(list(reversed(examples[:350])))[1]
    assert {example.messages for example in again} == {
        example.messages for example in examples[:350] if example.messages in prompts
    }
    few = reward.split_held_out(pairs(12))
    assert len(few[1]) == 3 and len(few[0]) == 9  # of few labels a quarter, and never all
    assert reward.split_held_out(pairs(1)) == (pairs(1), [])


def test_agreement_with_the_labels_against_a_loop():
    draw = random.Random(3)
    members, count = 3, 40
    raw = torch.tensor([[draw.gauss(0, 2) for _ in range(2 * count)] for _ in range(members)])
    scores, lengths = raw.mean(0), torch.tensor([float(draw.randrange(1, 90)) for _ in range(2 * count)])
    labels = [draw.choice((0.5, 0.2, 0.9, draw.random())) for _ in range(count)]
    found = reward.compute_agreement_metrics(raw, scores, torch.tensor(labels), lengths)
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
    assert found == pytest.approx(expected, abs=1e-5)


def test_an_ensemble_scores_low_where_its_members_disagree(tiny, tmp_path):
    settings = {"learning_rate": 5e-3, "epochs": 2, "batch_size": 8, "hardware": weights.Hardware(precision="fp32")}
    steps = []
    model, metrics = reward.train(
        tiny, pairs(40), ensemble_size=3, variance_penalty=0.5, on_step=lambda n, m: steps.append(n), **settings
    )
    assert steps == list(range(1, len(steps) + 1)) and metrics["steps"] == len(steps) and metrics["reward/disagreement"] > 0
    texts = [(TURNS, text, True) for text in ("aaa", "bbb", "hmm")]
    raw, members = model.score_members(texts), model.members
    by_hand = []
    for n in range(len(texts)):
        own = [(raw[m, n].item() - members[m].mean) / members[m].deviation for m in range(3)]
        by_hand.append(statistics.mean(own) - 0.5 * statistics.pvariance(own))
    assert model.score(texts) == pytest.approx(by_hand, abs=1e-4)
    assert len({round(x, 4) for x in raw[:, 2].tolist()}) == 3  # members differ
    folder = checkpoints.write_checkpoint(tmp_path / "ensemble", model.save, {}).folder
    again = reward.load_reward_model(folder, settings["hardware"])
    assert again.normalize(again.score(texts)) == pytest.approx(model.normalize(by_hand), abs=1e-4)
    # Each member goes on from itself, and one of them alone is a reward model too.
    for number in range(3):
        start = reward.load_initial_scorer(folder, number, 0)
        assert torch.equal(start.score.weight, members[number].model.score.weight)
    assert len(reward.train(folder, pairs(40), ensemble_size=1, **settings)[0].members) == 1


def test_the_normalisation_is_that_of_the_held_out_texts(tiny):
    examples = pairs(100)
    taught, held_out = reward.split_held_out(examples)
    model, metrics = reward.train(tiny, examples, learning_rate=5e-3, hardware=weights.Hardware(precision="fp32"))
    texts = [(e.messages, text, True) for e in held_out for text in (e.response_a, e.response_b)]
    normal = torch.tensor(model.normalize(model.score(texts)))
    assert normal.mean().item() == pytest.approx(0, abs=1e-3) and normal.std(correction=0).item() == pytest.approx(1, abs=1e-3)
    assert metrics["reward/held_out"] == len(held_out) >= 8 and metrics["examples"] == len(taught)


@pytest.mark.parametrize(
    ("agreed", "labels", "outcome"),
    [
        (500, 1000, "refused"), (165, 300, "refused"), (168, 300, "passed"),  # P(at least 168 of 300 heads) = 0.022
        (12, 16, "refused"), (13, 16, "passed"),  # 0.038 and 0.011: sums of binomial coefficients over 2^16
        (15, 15, "passed"), (11, 15, "warned"), (4, 4, "warned"), (0, 0, "warned"),
    ],
)  # fmt: skip
def test_a_reward_model_that_agrees_as_chance_does(caplog, agreed, labels, outcome):
    with (
        pytest.raises(RewardModelAtChance, match=f"agrees with {agreed} of {labels}") if outcome == "refused" else nullcontext()
    ):
        reward.check_against_chance(agreed, labels, require=True)
    assert bool(caplog.records) == (outcome == "warned")
    caplog.clear()
    reward.check_against_chance(agreed, labels, require=False)
    assert bool(caplog.records) == (outcome != "passed")


def test_noise_makes_no_reward_model(tiny):
    """The same texts with the labels that the text decides are learned."""
    settings = {"learning_rate": 5e-3, "epochs": 2, "batch_size": 8, "hardware": weights.Hardware(precision="fp32")}
    flip = random.Random(7)
    noise = [replace(pair, p_a=flip.choice((0.1, 0.9))) for pair in pairs(300)]
    with pytest.raises(RewardModelAtChance) as error:
        reward.train(tiny, noise, **settings)
    assert str(error.value).count("\n") == 2
    assert reward.train(tiny, noise, **settings, require_above_chance=False)[1]["reward/accuracy"] < 0.8
    assert reward.train(tiny, pairs(300), **settings)[1]["reward/accuracy"] == 1.0


@pytest.mark.parametrize(("p", "side"), [(0.9, "first"), (0.1, "second")])
def test_one_sided_labels_are_an_error(tiny, p, side):
    one_sided = [replace(pair, exchangeable=True, p_a=p) for pair in pairs(16)]
    with pytest.raises(OneSidedLabels, match=f"all 16 labels prefer the {side} answer") as error:
        reward.train(tiny, one_sided, learning_rate=1e-3)
    assert str(error.value).count("\n") == 2
    reward.require_two_sided_labels(one_sided[:15])  # that may be chance
    reward.require_two_sided_labels([*one_sided, replace(one_sided[0], p_a=1 - p)])
    reward.require_two_sided_labels(pairs(16, p))  # a revision may be better than its first answer every time


def test_a_reward_model_that_has_forgotten_is_refused(tiny, tmp_path):
    """New labels say the opposite of all earlier ones, of other prompts: those that are held out are not met any more."""
    settings = {"learning_rate": 5e-3, "epochs": 8, "batch_size": 8, "hardware": weights.Hardware(precision="fp32")}
    model, _ = reward.train(tiny, pairs(100), **settings)
    folder = checkpoints.write_checkpoint(tmp_path / "knows", model.save, {}).folder
    _, held_out = reward.split_held_out(pairs(100))
    assert model.check_label_agreement(held_out).all()
    opposite = [pair if pair in held_out else replace(pair, p_a=0.1) for pair in pairs(100)]
    with pytest.raises(
        RewardModelRegression, match=f"agrees with [01] of {len(held_out)} held-out labels, the one before with"
    ) as error:
        reward.train(folder, opposite, **settings)
    assert str(error.value).count("\n") == 2
    assert reward.train(folder, pairs(100), **settings)[1]["reward/accuracy"] == 1.0


@pytest.mark.parametrize(("lost", "won", "forgot"), [(10, 2, True), (5, 1, False), (4, 0, True), (3, 0, False), (2, 9, False)])
def test_labels_that_were_met_before_may_change_as_chance_does(lost, won, forgot):
    before = torch.tensor([True] * lost + [False] * won + [True] * 30 + [False] * 5)
    after = torch.tensor([False] * lost + [True] * won + [True] * 30 + [False] * 5)
    if forgot:
        with pytest.raises(RewardModelRegression):
            reward.require_no_regression(before, after)
    else:
        reward.require_no_regression(before, after)


def test_agreement_is_with_decided_labels_alone(tiny):
    model = reward.train(tiny, pairs(16), learning_rate=5e-3, epochs=8, batch_size=8)[0]
    found = model.check_label_agreement([*pairs(2), replace(pairs(1)[0], p_a=0.5), replace(pairs(1)[0], p_a=0.2)])
    assert found.tolist() == [True, True, False] and len(model.check_label_agreement([])) == 0
