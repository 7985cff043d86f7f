"""PPO: the maths against hand-computed numbers and slow loops; a task it must learn, and one it must not."""

import math
import random
from dataclasses import replace
from functools import partial

import pytest
import torch

from engine import checkpoints
from engine.errors import TrainingFailed, UsageError
from engine.models.interface import GenerationRequest
from engine.models.local import LocalModel
from schemas.records import ChatMessage
from trainer import ppo, weights
from trainer.ppo import PPOConfig, Rollout


def tensor(rows):
    return torch.tensor(rows, dtype=torch.float32)


# The maths


def slow_gae(rewards, values, length, gamma, lam):
    advantages = [0.0] * len(rewards)
    for t in range(length):
        total, weight = 0.0, 1.0
        for k in range(t, length):
            following = values[k + 1] if k + 1 < length else 0.0
            total += weight * (rewards[k] + gamma * following - values[k])
            weight *= gamma * lam
        advantages[t] = total
    return advantages


def test_gae_against_a_slow_loop():
    generator = torch.Generator().manual_seed(0)
    rewards, values = (torch.randn(5, 9, generator=generator) for _ in range(2))
    lengths = [9, 1, 4, 8, 2]
    mask = (torch.arange(9)[None] < torch.tensor(lengths)[:, None]).float()
    for gamma, lam in ((1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (0.99, 0.0)):
        advantages, returns = ppo.compute_gae(rewards * mask, values, mask, gamma, lam)
        for row, length in enumerate(lengths):
            slow = slow_gae(rewards[row].tolist(), values[row].tolist(), length, gamma, lam)
            assert advantages[row].tolist() == pytest.approx(slow, abs=1e-5)
            expected = [a + v for a, v in zip(slow[:length], values[row, :length].tolist(), strict=True)]
            assert returns[row, :length].tolist() == pytest.approx(expected, abs=1e-5)


def test_gae_by_hand():
    # gamma 1, lambda 0.5: deltas are 0 + 0.2 - 0.5 = -0.3 and 1 - 0.2 = 0.8; A = [-0.3 + 0.5 * 0.8, 0.8]
    advantages, returns = ppo.compute_gae(tensor([[0.0, 1.0]]), tensor([[0.5, 0.2]]), tensor([[1.0, 1.0]]), 1.0, 0.5)
    assert advantages.tolist() == [pytest.approx([0.1, 0.8])] and returns.tolist() == [pytest.approx([0.6, 1.0])]


def test_token_rewards_put_the_score_on_the_last_real_token():
    rewards = ppo.compute_token_rewards(tensor([[0.1, 0.2, 9.0]]), tensor([2.0]), torch.tensor([2]), 0.5, tensor([[1, 1, 0]]))
    assert rewards.tolist() == [pytest.approx([-0.05, 1.9, 0.0])]


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "clipped"),
    [
        (1.0, 2.0, -2.0, 0.0),
        (1.5, 2.0, -2.4, 1.0),  # too far up with a good advantage: 1.2 * 2
        (0.5, 2.0, -1.0, 0.0),  # down with a good advantage: no clip, it must come back
        (1.5, -2.0, 3.0, 0.0),  # up with a bad advantage: no clip
        (0.5, -2.0, 1.6, 1.0),  # too far down with a bad advantage: 0.8 * 2
    ],
)
def test_clipped_policy_loss_by_hand(ratio, advantage, loss, clipped):
    one = torch.ones(1, 1)
    found, bound = ppo.compute_clipped_policy_loss(one * math.log(ratio), one * 0, one * advantage, one, 0.2)
    assert (found.item(), bound.item()) == (pytest.approx(loss), clipped)
    weighted, _ = ppo.compute_clipped_policy_loss(one * math.log(ratio), one * 0, one * advantage, one * 0.25, 0.2)
    assert weighted.item() == pytest.approx(loss / 4)


@pytest.mark.parametrize(
    ("value", "old", "returned", "loss"),
    [(1.0, 1.0, 2.0, 0.5), (2.0, 1.0, 2.0, 0.5 * 0.8**2), (0.0, 1.0, 2.0, 0.5 * 4.0), (1.1, 1.0, 2.0, 0.5 * 0.9**2)],
)
def test_clipped_value_loss_by_hand(value, old, returned, loss):
    found = ppo.compute_clipped_value_loss(tensor([value]), tensor([old]), tensor([returned]), 0.2)
    assert found.item() == pytest.approx(loss)


def test_kl_estimates_agree_with_the_exact_kl():
    generator = torch.Generator().manual_seed(1)
    logp, logq = (torch.log_softmax(torch.randn(50, generator=generator), -1) for _ in range(2))
    exact = (logp.exp() * (logp - logq)).sum().item()
    assert (logp.exp() * ppo.kl_k1(logp, logq)).sum().item() == pytest.approx(exact, abs=1e-6)
    assert (logp.exp() * ppo.kl_k3(logp, logq)).sum().item() == pytest.approx(exact, abs=1e-5)
    assert (ppo.kl_k3(logp, logq) >= 0).all() and ppo.kl_k3(logp, logp).abs().max() == 0


def test_the_kl_of_a_policy_that_has_moved_away_from_its_samples_is_exact_and_bounded():
    """Samples come from the proximal policy; the expectation of the weighted estimate is KL(new || reference) all the same."""
    sampled, reference, new = (torch.tensor(p).log() for p in ([0.5, 0.3, 0.2], [0.4, 0.4, 0.2], [0.7, 0.3 - 1e-6, 1e-6]))
    exact = (new.exp() * (new - reference)).sum().item()
    assert (sampled.exp() * ppo.estimate_policy_kl(new, reference, sampled)).sum().item() == pytest.approx(exact, abs=1e-5)
    # A token that the policy has learned to avoid costs no more than it was worth; unweighted it would be 2e5 nats.
    assert ppo.estimate_policy_kl(new, reference, sampled).max() < 2
    # One that was rare when it was sampled and is likely now: uncapped 4,500 * 7.4 nats, for one token.
    rare, likely = torch.tensor(1e-4).log(), torch.tensor(0.45).log()
    assert 10 * math.log(4500) > ppo.estimate_policy_kl(likely, rare, rare).item() > 10 * (math.log(4500) - 1) - 1e-3


def test_logprobs_from_logits_against_a_loop():
    logits, tokens = torch.randn(2, 3, 7), torch.tensor([[0, 6, 3], [2, 2, 5]])
    found = ppo.logprobs_from_logits(logits, tokens)
    for i in range(2):
        for t in range(3):
            exponents = [math.exp(x) for x in logits[i, t].tolist()]
            assert found[i, t].item() == pytest.approx(math.log(exponents[tokens[i, t]] / sum(exponents)), abs=1e-5)


def test_only_what_varies_is_scaled_and_zero_stays_zero():
    mask = tensor([[1, 1, 1, 0]])
    scaled = ppo.scale_to_unit_std(tensor([[0.0, 2.0, 4.0, 99.0]]), mask)
    assert scaled[0, :3].std(correction=0).item() == pytest.approx(1) and scaled[0, 0] == 0 == scaled[0, 3]
    flat = tensor([[0.5, 0.5, 0.5, 0.0]])
    assert torch.equal(ppo.scale_to_unit_std(flat, mask), flat)


def test_values_count_as_far_as_rewards_bear_them_out():
    mask, rewards = tensor([[1, 1], [1, 1]]), tensor([[0.0, 1.0], [0.0, -1.0]])
    told = tensor([[1.0, 1.0], [-1.0, -1.0]])  # exactly what comes

    def weights_of(values):
        return ppo.compute_value_weight(values, rewards, mask, 1.0)

    assert [weights_of(x) for x in (told, 2 * told, told / 2, -told, 0 * told)] == [1.0, 0.5, 1.0, 0.0, 0.0]
    assert weights_of(told + 7.0) == 1.0  # a constant is no error of the slope
    noise = tensor([[1.0, -1.0], [1.0, -1.0]])  # the same in every answer, and nothing comes of it
    assert weights_of(noise) == 0.0 and weights_of(told + noise) == 0.5


def test_equal_answers_get_no_advantage_from_a_value_head_that_is_wrong():
    """Each answer to one prompt is the same refusal; the others' rewards do not bear the values out."""
    same, other = Rollout((1,), (5, 6, 7), (0.0,) * 3, True, 0, "a"), Rollout((2,), (8, 9, 3), (0.0,) * 3, True, 0, "b")
    values = tensor([[0.4, -0.3, 0.2]] * 4 + [[-0.4, 0.3, -0.2]] * 2)
    logprobs = torch.zeros(6, 3)
    rollouts, scores = [same] * 4 + [other] * 2, [1.0] * 4 + [2.0, 0.0]
    targets = ppo.prepare_batch(rollouts, scores, logprobs, values, logprobs, None, PPOConfig())
    assert targets.value_weight == 0.0 and targets.advantages[:4].abs().max() == 0
    assert (targets.advantages[4] > 0).all() and (targets.advantages[5] < 0).all()


def test_beta_doubles_or_halves_far_from_its_target_and_never_falls_on_a_negative_estimate():
    assert [ppo.adapt_beta(0.02, kl, 6.0) for kl in (60.0, 9.1, 8.9, 6.0, 4.1)] == [0.04, 0.04, 0.02, 0.02, 0.02]
    assert ppo.adapt_beta(0.02, 3.9, 6.0) == 0.01
    assert ppo.adapt_beta(0.02, -3.0, 6.0) == 0.02
    assert ppo.adapt_beta(0.02, 0.0, 6.0) == 0.02  # the policy is the reference still


def test_the_learning_rate_rises_then_falls_by_hand():
    factors = [ppo.compute_learning_rate_factor(step, 8, 0.25) for step in range(8)]
    assert factors == pytest.approx([1 / 3, 2 / 3, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6])
    assert ppo.compute_learning_rate_factor(0, 1, 0.0) == 1.0
    assert [ppo.compute_learning_rate_factor(step, 2, 0.15) for step in range(2)] == [0.5, 1.0]


def test_a_score_is_compared_with_the_other_answers_to_its_prompt():
    scores, prompts = tensor([5.0, 7.0, 0.0, 1.0, 5.0, 10.0]), ["a", "a", "b", "b", "b", "c"]
    mean = 28 / 6
    by_hand = [5 - 7, 7 - 5, 0 - 3, 1 - 2.5, 5 - 0.5, 10 - mean]  # the last one is alone
    assert ppo.subtract_baseline(scores, prompts, "prompt").tolist() == pytest.approx(by_hand, abs=1e-5)
    assert ppo.subtract_baseline(scores, prompts, "batch").tolist() == pytest.approx(
        [s - mean for s in scores.tolist()], abs=1e-5
    )


def test_what_a_reward_model_adds_to_all_answers_of_a_prompt_changes_nothing():
    """A model of pairs does not know how a prompt's answers compare with those of another prompt."""
    scores, prompts = tensor([0.0, 1.0, 3.0, 2.0]), ["benign", "benign", "harmful", "harmful"]
    shifted = ppo.subtract_baseline(scores - tensor([0.0, 0.0, 9.0, 9.0]), prompts, "prompt")
    assert torch.equal(shifted, ppo.subtract_baseline(scores, prompts, "prompt"))
    with pytest.raises(TrainingFailed, match="no reward of 4 answers differs from those of the other answers"):
        ppo.subtract_baseline(tensor([0.0, 0.0, 1.0, 1.0]), prompts, "prompt")


def test_explained_variance():
    mask = tensor([[1, 1, 1, 0]])
    returns = tensor([[1.0, 2.0, 3.0, 50.0]])
    assert ppo.compute_explained_variance(returns, returns, mask) == pytest.approx(1.0)
    assert ppo.compute_explained_variance(torch.zeros(1, 4), returns, mask) == pytest.approx(0.0)
    assert ppo.compute_explained_variance(returns, torch.ones(1, 4), mask) == 0.0


# The whole phase, on a tiny model


ASK = (ChatMessage(role="user", content="say a"),)


def sample(folder, count, seed, temperature=1.0, max_tokens=8):
    model = LocalModel(folder, dtype=torch.float32)
    answers = model.generate(
        [GenerationRequest(ASK, seed=seed)], num_completions=count, temperature=temperature, max_tokens=max_tokens
    )[0]
    return [
        Rollout(g.prompt_token_ids, g.token_ids, g.logprobs, g.finish_reason == "stop", 0, f"{seed}/{n}", temperature)
        for n, g in enumerate(answers)
    ]


def letter(folder, text="a"):
    return weights.load_tokenizer(folder)(text, add_special_tokens=False)["input_ids"][0]


def frequency(rollouts, token):
    return sum(r.token_ids.count(token) for r in rollouts) / sum(len(r.token_ids) for r in rollouts)


FAST = PPOConfig(learning_rate=3e-3, epochs=2, batch_size=16, beta=0.0, max_kl_update=1e9)


EXACT = weights.Hardware(precision="fp32")  # tiny models are compared in fp32
train = partial(ppo.train, hardware=EXACT)


def test_at_step_0_ratios_are_one_and_every_kl_is_zero(tiny):
    rollouts = sample(tiny, 8, 1)
    steps = []
    train(
        tiny, tiny, rollouts, [random.Random(n).gauss(0, 1) for n, _ in enumerate(rollouts)],
        PPOConfig(epochs=1, batch_size=8), base_folder=tiny, on_step=lambda n, m: steps.append(m),
    )  # fmt: skip
    first = steps[0]
    assert first["ratio_max"] == pytest.approx(1, abs=1e-5) and first["clipfrac"] == 0
    assert first["approx_kl"] == pytest.approx(0, abs=1e-9) and first["kl_ref"] == pytest.approx(0, abs=1e-8)
    assert first["kl_base"] == pytest.approx(0, abs=1e-8)


def test_the_reward_rises_where_there_is_one_to_learn(tiny, tmp_path):
    token, folder = letter(tiny), tiny
    before = frequency(sample(folder, 128, 99), token)
    for round_number in range(6):
        rollouts = sample(folder, 64, round_number)
        scores = [10 * r.token_ids.count(token) / len(r.token_ids) for r in rollouts]
        learned, _ = train(folder, folder, rollouts, scores, replace(FAST, learning_rate=6e-3), seed=round_number)
        folder = tmp_path / f"round-{round_number}"
        checkpoints.write_checkpoint(folder, learned.save, {})
    after = frequency(sample(folder, 128, 99), token)
    assert after > before + 0.2, (before, after)


@pytest.mark.parametrize("count", [1, 8])
def test_a_constant_reward_is_refused(tiny, count):
    with pytest.raises(TrainingFailed, match=f"the reward of all {count} answers is the same") as error:
        train(tiny, tiny, sample(tiny, count, 3), [1.7] * count, FAST)
    assert str(error.value).count("\n") == 2


@pytest.mark.parametrize(
    ("limit", "figure"), [("max_kl", "kl_ref"), ("max_kl_update", "kl_update"), ("max_kl_base", "kl_base")]
)
def test_a_limit_ends_an_update_that_runs_away(tiny, limit, figure):
    rollouts = sample(tiny, 32, 4)
    scores = [random.Random(n).gauss(0, 5) for n in range(32)]
    hyper = PPOConfig(learning_rate=3e-2, epochs=10, batch_size=32, **{limit: 0.5})
    steps = []
    _, metrics = train(tiny, tiny, rollouts, scores, hyper, base_folder=tiny, on_step=lambda n, m: steps.append(m))
    assert metrics["stopped_early"] == 1.0 and metrics["steps"] == len(steps) - 1 < 10 and metrics[figure] > 0.5
    assert ppo.find_exceeded_limit(metrics, hyper) == limit and not any(ppo.find_exceeded_limit(m, hyper) for m in steps[:-1])


def test_an_update_that_begins_past_a_limit_is_refused(tiny, tmp_path):
    """It would make no step, and its policy would be published as if it had learned."""
    rollouts = sample(tiny, 16, 9)
    learned, _ = train(tiny, tiny, rollouts, list(range(16)), replace(FAST, learning_rate=1e-2))
    far = checkpoints.write_checkpoint(tmp_path / "far", learned.save, {}).folder
    own = sample(far, 64, 10)
    with pytest.raises(TrainingFailed, match="nats per answer away from the reference") as caught:
        train(far, tiny, own, [float(n % 5) for n in range(64)], replace(FAST, max_kl=0.01))
    assert "ppo.max_kl = 0.01" in str(caught.value) and str(caught.value).count("\n") == 2


def test_the_kl_of_an_update_sees_mass_that_leaves_for_tokens_that_were_never_sampled():
    """Half of the mass goes to a token that no sample has: the KL to the reference, from these samples, hardly shows it."""
    old = torch.tensor([0.5, 0.5 - 1e-9]).log()
    new = old - math.log(2)
    assert ppo.estimate_update_kl(old, new).mean().item() == pytest.approx(math.log(2) - 0.5, abs=1e-5)
    rare, likely = torch.tensor(1e-6).log(), torch.tensor(0.5).log()
    assert ppo.estimate_update_kl(rare, likely).item() == pytest.approx(
        9 - math.log(10), abs=1e-4
    )  # one token ends no update alone


def test_stale_rollouts_are_weighted_and_capped(tiny):
    rollouts = sample(tiny, 4, 5)
    prox = torch.tensor([list(r.logprobs) + [0.0] * (8 - len(r.logprobs)) for r in rollouts])
    targets = ppo.prepare_batch(rollouts, [0.0, 1.0, 2.0, 3.0], prox + 1.5, torch.zeros(4, 8), prox, None, PPOConfig())
    assert targets.importance_weights.max().item() == 2.0  # exp(1.5) is above the cap
    targets = ppo.prepare_batch(rollouts, [0.0, 1.0, 2.0, 3.0], prox - 1.0, torch.zeros(4, 8), prox, None, PPOConfig())
    kept = targets.importance_weights[targets.mask.bool()]
    assert kept.tolist() == pytest.approx([math.exp(-1)] * len(kept), abs=1e-5)


def test_masks_come_from_lengths_although_pad_is_the_end_token(tiny):
    actor = ppo.ActorCritic(weights.load_policy(tiny), EXACT)
    end = weights.load_tokenizer(tiny).eos_token_id
    short, long = (
        Rollout((1, 5, 6), (7, end), (0.0,) * 2, True, 0, "a"),
        Rollout((1, 9), (8, 9, 10, 11), (0.0,) * 4, False, 0, "b"),
    )
    together, _, _ = actor(ppo.pad_rollouts([short, long], 4, "cpu"))
    alone, _, _ = actor(ppo.pad_rollouts([short], 2, "cpu"))
    assert together[0, :2].tolist() == pytest.approx(alone[0].tolist(), abs=1e-5) and together[0, 2:].tolist() == [0, 0]


def test_the_combined_objective_adds_the_supervised_gradient(tiny):
    rollouts = sample(tiny, 8, 6)
    row = {"input_ids": [1, 5, 6, 7, 2], "labels": [-100, -100, 6, 7, 2]}
    hyper = PPOConfig(epochs=1, batch_size=8, alpha=0.0, learning_rate=1e-2)
    learned, metrics = train(tiny, tiny, rollouts, list(range(8)), hyper, sl_rows=[row])
    before, after = (
        ppo.compute_sl_loss(ppo.ActorCritic(p, EXACT), [row]).item() for p in (weights.load_policy(tiny), learned.policy)
    )
    assert metrics["sl_loss"] == pytest.approx(before / 3, abs=1e-4) and after < before


def test_lora_starts_at_the_reference_and_merges(tiny, tmp_path):
    rollouts = sample(tiny, 8, 7)
    adapted = weights.add_lora(weights.load_policy(tiny), 4, "CAUSAL_LM")
    actor = ppo.ActorCritic(adapted, EXACT)
    on, _ = ppo.compute_logprobs_and_values(actor, rollouts, 8)
    with adapted.disable_adapter():
        off, _ = ppo.compute_logprobs_and_values(actor, rollouts, 8)
    assert torch.allclose(on, off, atol=1e-6)
    learned, _ = train(tiny, tiny, rollouts, list(range(8)), FAST, lora_rank=4)
    checkpoints.write_checkpoint(tmp_path / "merged", learned.save, {})
    merged = weights.load_policy(tmp_path / "merged")
    changed = [n for n, p in merged.named_parameters() if not torch.equal(p, weights.load_policy(tiny).get_parameter(n))]
    assert changed and not (tmp_path / "merged" / "adapter_config.json").exists()


def test_with_lora_every_update_of_a_phase_starts_from_the_reference_and_its_adapter(tiny, tmp_path, monkeypatch):
    """Adapter on is the served policy, adapter off the reference, and its weights are the only ones that are read."""
    rollouts = sample(tiny, 16, 8)
    learned, _ = train(tiny, tiny, rollouts, list(range(16)), FAST, lora_rank=4)
    second = checkpoints.write_checkpoint(tmp_path / "second", learned.save, {}).folder
    assert not (second / "rl" / "README.md").exists()
    policy, off_is_reference = weights.load_policy_for_rl(second, tiny, 4)
    assert off_is_reference
    actor = ppo.ActorCritic(policy, EXACT)
    on, (off, _) = (
        ppo.compute_logprobs_and_values(actor, rollouts, 8)[0],
        ppo.compute_logprobs_and_values(ppo.ActorCritic(weights.load_policy(tiny), EXACT), rollouts, 8),
    )
    served, _ = ppo.compute_logprobs_and_values(ppo.ActorCritic(weights.load_policy(second), EXACT), rollouts, 8)
    assert torch.allclose(on, served, atol=1e-5) and not torch.allclose(on, off, atol=1e-3)
    assert torch.allclose(ppo.compute_ref_logprobs(actor, rollouts, 8), off, atol=1e-6)
    read, load = [], weights.load_policy
    monkeypatch.setattr(weights, "load_policy", lambda folder: read.append(folder) or load(folder))
    steps = []
    learned, _ = train(second, tiny, rollouts, list(range(16)), FAST, lora_rank=8, on_step=lambda n, m: steps.append(m))
    assert read == [tiny]
    kl = (torch.expm1(off - on) - (off - on)).sum(-1).mean().item()
    assert steps[0]["ratio_max"] == pytest.approx(1, abs=1e-5) and len(steps) == 2
    assert steps[0]["kl_ref"] == pytest.approx(kl, rel=1e-3) and kl > 1e-4
    third = checkpoints.write_checkpoint(tmp_path / "third", learned.save, {}).folder
    assert weights.has_adapter_for_reference(third, tiny) and not weights.has_adapter_for_reference(third, second)
    assert learned.policy.peft_config["default"].r == 4  # the rank of the phase, not the new setting


@pytest.mark.parametrize("lora_rank", [0, 4])
def test_a_policy_that_is_not_an_adapter_on_the_reference_is_held_to_it_all_the_same(tiny, tmp_path, lora_rank):
    """Full training, and a change to LoRA in the middle of a phase: the reference is read, asked and let go first."""
    rollouts = sample(tiny, 16, 9)
    learned, _ = train(tiny, tiny, rollouts, list(range(16)), FAST)
    second = checkpoints.write_checkpoint(tmp_path / "second", learned.save, {}).folder
    steps = []
    _, metrics = train(second, tiny, rollouts, list(range(16)), FAST, lora_rank=lora_rank, on_step=lambda n, m: steps.append(m))
    on, off = (
        ppo.compute_logprobs_and_values(ppo.ActorCritic(weights.load_policy(f), EXACT), rollouts, 8)[0] for f in (second, tiny)
    )
    assert steps[0]["kl_ref"] == pytest.approx((torch.expm1(off - on) - (off - on)).sum(-1).mean().item(), rel=1e-3)
    assert metrics["kl_rollouts"] == pytest.approx((on - off).sum(-1).mean().item(), rel=1e-3, abs=1e-5)


def test_the_value_head_goes_on_within_a_phase(tiny, tmp_path):
    rollouts = sample(tiny, 16, 10)
    learned, _ = train(tiny, tiny, rollouts, [4.0 * (n % 2) for n in range(16)], FAST)
    second = checkpoints.write_checkpoint(tmp_path / "second", learned.save, {}).folder
    head = weights.load_value_head(second)
    assert head["weight"].abs().max() > 0
    seen = []
    evaluate = ppo.compute_logprobs_and_values
    ppo_values = lambda actor, *more: seen.append(actor.value_head.weight.clone()) or evaluate(actor, *more)  # noqa: E731
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ppo, "compute_logprobs_and_values", ppo_values)
        train(second, second, rollouts, [0.0, 1.0] * 8, FAST)
    assert torch.equal(seen[0], head["weight"])
    assert weights.load_value_head(tiny) is None


def test_gradient_checkpointing_and_smaller_passes_change_nothing_but_rounding(tiny):
    rollouts, results = sample(tiny, 8, 11), []
    for hardware, rank in [(EXACT, r) for r in (0, 4)] + [
        (weights.Hardware(micro_batch_size=3, gradient_checkpointing=True, precision="fp32"), r) for r in (0, 4)
    ]:
        # In steps of half the batch: over all of it the scores add up to 0, and Adam would make full steps of rounding errors.
        _, metrics = train(tiny, tiny, rollouts, list(range(8)), replace(FAST, batch_size=4), lora_rank=rank, hardware=hardware)
        results.append(metrics)
    for plain, thrifty in zip(results[:2], results[2:], strict=True):
        for name in ("policy_loss", "value_loss", "grad_norm", "kl_ref", "entropy"):
            assert thrifty[name] == pytest.approx(plain[name], rel=1e-3, abs=1e-5), name


def test_the_missing_eos_penalty_is_off_where_most_answers_are_cut(tiny, caplog):
    rollouts = sample(tiny, 8, 12, max_tokens=2)
    hyper = PPOConfig(epochs=1, missing_eos_penalty=3.0)
    mostly_cut = [replace(r, ends_with_eos=n < 2) for n, r in enumerate(rollouts)]
    with pytest.raises(TrainingFailed, match="the reward of all 8"):
        train(tiny, tiny, mostly_cut, [1.0] * 8, hyper)
    assert "no missing-EOS penalty in this update: 75 %" in caplog.text
    mostly_ended = [replace(r, ends_with_eos=n > 2) for n, r in enumerate(rollouts)]
    _, metrics = train(tiny, tiny, mostly_ended, [1.0] * 8, hyper)
    assert metrics["missing_eos_penalty"] == 3.0 and metrics["grad_norm"] > 0


def test_an_update_that_runs_away_is_an_error(tiny):
    rollouts = sample(tiny, 8, 13)
    steps = []
    with pytest.raises(TrainingFailed, match="training has run away") as caught:
        train(tiny, tiny, rollouts, [float("nan"), *range(7)], FAST, on_step=lambda n, m: steps.append(m))
    assert str(caught.value).count("\n") == 2 and not steps


def test_a_model_whose_logits_are_more_than_its_output_layer_is_refused(tiny):
    """Softcapping (Gemma 2) is known; anything else would make every probability wrong in silence."""
    model = weights.load_policy(tiny)
    model.register_forward_hook(lambda module, inputs, output: setattr(output, "logits", output.logits / 2))
    with pytest.raises(UsageError, match="PPO cannot train a llama"):
        ppo.ActorCritic(model, EXACT)
