"""PPO: the mathematics against hand-computed numbers and slow loops, and whole updates of a tiny model."""

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
from trainer import weights
from trainer.learners import ppo
from trainer.learners.ppo import PPOConfig, Rollout


def tensor(rows):
    return torch.tensor(rows, dtype=torch.float32)


# The mathematics


def slow_gae(rewards, values, length, gamma, lam):
    advantages = [0.0] * len(rewards)
    for t in range(length):
        total, weight = 0.0, 1.0
        for k in range(t, length):
            next_value = values[k + 1] if k + 1 < length else 0.0
            total += weight * (rewards[k] + gamma * next_value - values[k])
            weight *= gamma * lam
        advantages[t] = total
    return advantages


def test_gae_matches_a_slow_loop():
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


def test_gae_matches_a_hand_computed_case():
    # gamma 1, lambda 0.5: deltas are 0 + 0.2 - 0.5 = -0.3 and 1 - 0.2 = 0.8; A = [-0.3 + 0.5 * 0.8, 0.8]
    advantages, returns = ppo.compute_gae(tensor([[0.0, 1.0]]), tensor([[0.5, 0.2]]), tensor([[1.0, 1.0]]), 1.0, 0.5)
    assert advantages.tolist() == [pytest.approx([0.1, 0.8])] and returns.tolist() == [pytest.approx([0.6, 1.0])]


def test_token_rewards_add_the_score_to_the_last_real_token():
    rewards = ppo.compute_token_rewards(tensor([[0.1, 0.2, 9.0]]), tensor([2.0]), torch.tensor([2]), 0.5, tensor([[1, 1, 0]]))
    assert rewards.tolist() == [pytest.approx([-0.05, 1.9, 0.0])]


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "clipped"),
    [
        (1.0, 2.0, -2.0, 0.0),
        (1.5, 2.0, -2.4, 1.0),  # the ratio is too high, the advantage positive: 1.2 * 2
        (0.5, 2.0, -1.0, 0.0),  # the ratio fell, the advantage is positive: not clipped, so that it can rise again
        (1.5, -2.0, 3.0, 0.0),  # the ratio rose, the advantage is negative: not clipped
        (0.5, -2.0, 1.6, 1.0),  # the ratio is too low, the advantage negative: 0.8 * 2
    ],
)
def test_clipped_policy_loss_matches_hand_computed_values(ratio, advantage, loss, clipped):
    one = torch.ones(1, 1)
    token_loss, is_clipped = ppo.compute_clipped_policy_loss(one * math.log(ratio), one * 0, one * advantage, one, 0.2)
    assert (token_loss.item(), is_clipped.item()) == (pytest.approx(loss), clipped)
    weighted, _ = ppo.compute_clipped_policy_loss(one * math.log(ratio), one * 0, one * advantage, one * 0.25, 0.2)
    assert weighted.item() == pytest.approx(loss / 4)


@pytest.mark.parametrize(
    ("value", "old", "returned", "loss"),
    [(1.0, 1.0, 2.0, 0.5), (2.0, 1.0, 2.0, 0.5 * 0.8**2), (0.0, 1.0, 2.0, 0.5 * 4.0), (1.1, 1.0, 2.0, 0.5 * 0.9**2)],
)
def test_clipped_value_loss_matches_hand_computed_values(value, old, returned, loss):
    token_loss = ppo.compute_clipped_value_loss(tensor([value]), tensor([old]), tensor([returned]), 0.2)
    assert token_loss.item() == pytest.approx(loss)


def test_kl_estimates_match_the_exact_kl():
    generator = torch.Generator().manual_seed(1)
    logp, logq = (torch.log_softmax(torch.randn(50, generator=generator), -1) for _ in range(2))
    exact = (logp.exp() * (logp - logq)).sum().item()
    assert (logp.exp() * ppo.kl_k1(logp, logq)).sum().item() == pytest.approx(exact, abs=1e-6)
    assert (logp.exp() * ppo.kl_k3(logp, logq)).sum().item() == pytest.approx(exact, abs=1e-5)
    assert (ppo.kl_k3(logp, logq) >= 0).all() and ppo.kl_k3(logp, logp).abs().max() == 0


def test_policy_kl_estimate_is_exact_in_expectation_and_bounded_per_token():
    """The samples come from the old policy, but the expectation of the weighted estimate is KL(new || reference)."""
    sampled, reference, new = (torch.tensor(p).log() for p in ([0.5, 0.3, 0.2], [0.4, 0.4, 0.2], [0.7, 0.3 - 1e-6, 1e-6]))
    exact = (new.exp() * (new - reference)).sum().item()
    assert (sampled.exp() * ppo.estimate_policy_kl(new, reference, sampled)).sum().item() == pytest.approx(exact, abs=1e-5)
    # A token that the policy has learned to avoid counts less than 2 nats; without the weight it would be 2e5 nats.
    assert ppo.estimate_policy_kl(new, reference, sampled).max() < 2
    # A token that was rare when it was sampled and is likely now: without the cap 4,500 * 7.4 nats.
    rare, likely = torch.tensor(1e-4).log(), torch.tensor(0.45).log()
    assert 10 * math.log(4500) > ppo.estimate_policy_kl(likely, rare, rare).item() > 10 * (math.log(4500) - 1) - 1e-3


def test_logprobs_from_logits_match_a_loop():
    logits, tokens = torch.randn(2, 3, 7), torch.tensor([[0, 6, 3], [2, 2, 5]])
    logprobs = ppo.logprobs_from_logits(logits, tokens)
    for i in range(2):
        for t in range(3):
            exponents = [math.exp(x) for x in logits[i, t].tolist()]
            assert logprobs[i, t].item() == pytest.approx(math.log(exponents[tokens[i, t]] / sum(exponents)), abs=1e-5)


def test_scale_to_unit_std_keeps_zeros_and_constant_inputs():
    mask = tensor([[1, 1, 1, 0]])
    scaled = ppo.scale_to_unit_std(tensor([[0.0, 2.0, 4.0, 99.0]]), mask)
    assert scaled[0, :3].std(correction=0).item() == pytest.approx(1) and scaled[0, 0] == 0 == scaled[0, 3]
    flat = tensor([[0.5, 0.5, 0.5, 0.0]])
    assert torch.equal(ppo.scale_to_unit_std(flat, mask), flat)


def test_value_weight_is_the_clamped_regression_coefficient():
    mask, rewards = tensor([[1, 1], [1, 1]]), tensor([[0.0, 1.0], [0.0, -1.0]])
    rewards_to_come = tensor([[1.0, 1.0], [-1.0, -1.0]])

    def compute_weight(values):
        return ppo.compute_value_weight(values, rewards, mask, 1.0)

    assert [
        compute_weight(x)
        for x in (rewards_to_come, 2 * rewards_to_come, rewards_to_come / 2, -rewards_to_come, 0 * rewards_to_come)
    ] == [1.0, 0.5, 1.0, 0.0, 0.0]
    assert compute_weight(rewards_to_come + 7.0) == 1.0  # an offset does not change the coefficient
    noise = tensor([[1.0, -1.0], [1.0, -1.0]])  # the same in every completion, and unrelated to the rewards
    assert compute_weight(noise) == 0.0 and compute_weight(rewards_to_come + noise) == 0.5


def test_wrong_values_give_equal_completions_no_advantage():
    """All completions of one prompt are the same refusal; the rewards of the other prompt contradict the values."""
    same, other = Rollout((1,), (5, 6, 7), (0.0,) * 3, True, 0, "a"), Rollout((2,), (8, 9, 3), (0.0,) * 3, True, 0, "b")
    values = tensor([[0.4, -0.3, 0.2]] * 4 + [[-0.4, 0.3, -0.2]] * 2)
    logprobs = torch.zeros(6, 3)
    rollouts, scores = [same] * 4 + [other] * 2, [1.0] * 4 + [2.0, 0.0]
    targets = ppo.prepare_batch(rollouts, scores, logprobs, values, logprobs, None, PPOConfig())
    assert targets.value_weight == 0.0 and targets.advantages[:4].abs().max() == 0
    assert (targets.advantages[4] > 0).all() and (targets.advantages[5] < 0).all()


def test_beta_adapts_to_the_kl_target_and_ignores_negative_estimates():
    assert [ppo.adapt_beta(0.02, kl, 6.0) for kl in (60.0, 9.1, 8.9, 6.0, 4.1)] == [0.04, 0.04, 0.02, 0.02, 0.02]
    assert ppo.adapt_beta(0.02, 3.9, 6.0) == 0.01
    assert ppo.adapt_beta(0.02, -3.0, 6.0) == 0.02
    assert ppo.adapt_beta(0.02, 0.0, 6.0) == 0.02  # the policy still equals the reference


def test_learning_rate_factor_matches_hand_computed_values():
    factors = [ppo.compute_learning_rate_factor(step, 8, 0.25) for step in range(8)]
    assert factors == pytest.approx([1 / 3, 2 / 3, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6])
    assert ppo.compute_learning_rate_factor(0, 1, 0.0) == 1.0
    assert [ppo.compute_learning_rate_factor(step, 2, 0.15) for step in range(2)] == [0.5, 1.0]


def test_baseline_is_the_mean_of_the_other_completions_of_the_prompt():
    scores, prompts = tensor([5.0, 7.0, 0.0, 1.0, 5.0, 10.0]), ["a", "a", "b", "b", "b", "c"]
    mean = 28 / 6
    by_hand = [5 - 7, 7 - 5, 0 - 3, 1 - 2.5, 5 - 0.5, 10 - mean]  # the last one is the only completion of its prompt
    assert ppo.subtract_baseline(scores, prompts, "prompt").tolist() == pytest.approx(by_hand, abs=1e-5)
    assert ppo.subtract_baseline(scores, prompts, "batch").tolist() == pytest.approx(
        [s - mean for s in scores.tolist()], abs=1e-5
    )


def test_baseline_removes_an_offset_per_prompt():
    """A reward model trained on pairs cannot compare responses to different prompts."""
    scores, prompts = tensor([0.0, 1.0, 3.0, 2.0]), ["benign", "benign", "harmful", "harmful"]
    shifted = ppo.subtract_baseline(scores - tensor([0.0, 0.0, 9.0, 9.0]), prompts, "prompt")
    assert torch.equal(shifted, ppo.subtract_baseline(scores, prompts, "prompt"))
    with pytest.raises(TrainingFailed, match="each of 4 completions has the same reward as the other completions"):
        ppo.subtract_baseline(tensor([0.0, 0.0, 1.0, 1.0]), prompts, "prompt")


def test_explained_variance_is_1_for_exact_and_0_for_constant_values():
    mask = tensor([[1, 1, 1, 0]])
    returns = tensor([[1.0, 2.0, 3.0, 50.0]])
    assert ppo.compute_explained_variance(returns, returns, mask) == pytest.approx(1.0)
    assert ppo.compute_explained_variance(torch.zeros(1, 4), returns, mask) == pytest.approx(0.0)
    assert ppo.compute_explained_variance(returns, torch.ones(1, 4), mask) == 0.0


# Whole updates of a tiny model


MESSAGES = (ChatMessage(role="user", content="say a"),)


def sample(folder, count, seed, temperature=1.0, max_tokens=8):
    model = LocalModel(folder, dtype=torch.float32)
    generations = model.generate(
        [GenerationRequest(MESSAGES, seed=seed)], num_completions=count, temperature=temperature, max_tokens=max_tokens
    )[0]
    return [
        Rollout(g.prompt_token_ids, g.token_ids, g.logprobs, g.finish_reason == "stop", 0, f"{seed}/{n}", temperature)
        for n, g in enumerate(generations)
    ]


def get_token_id(folder, text="a"):
    return weights.load_tokenizer(folder)(text, add_special_tokens=False)["input_ids"][0]


def compute_frequency(rollouts, token):
    return sum(r.token_ids.count(token) for r in rollouts) / sum(len(r.token_ids) for r in rollouts)


FAST = PPOConfig(learning_rate=3e-3, epochs=2, batch_size=16, beta=0.0, max_kl_update=1e9)


EXACT = weights.Hardware(precision="fp32")  # tiny models are compared in fp32
train = partial(ppo.train, hardware=EXACT)


def test_first_step_has_ratio_1_and_kl_0(tiny):
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


def test_ppo_raises_a_learnable_reward(tiny, tmp_path):
    token, folder = get_token_id(tiny), tiny
    before = compute_frequency(sample(folder, 128, 99), token)
    for round_number in range(6):
        rollouts = sample(folder, 64, round_number)
        scores = [10 * r.token_ids.count(token) / len(r.token_ids) for r in rollouts]
        trained, _ = train(folder, folder, rollouts, scores, replace(FAST, learning_rate=6e-3), seed=round_number)
        folder = tmp_path / f"round-{round_number}"
        checkpoints.write_checkpoint(folder, trained.save, {})
    after = compute_frequency(sample(folder, 128, 99), token)
    assert after > before + 0.2, (before, after)


@pytest.mark.parametrize("count", [1, 8])
def test_constant_reward_is_rejected(tiny, count):
    with pytest.raises(TrainingFailed, match=f"the reward of all {count} completions is the same") as error:
        train(tiny, tiny, sample(tiny, count, 3), [1.7] * count, FAST)
    assert str(error.value).count("\n") == 2


@pytest.mark.parametrize(
    ("limit", "metric"), [("max_kl", "kl_ref"), ("max_kl_update", "kl_update"), ("max_kl_base", "kl_base")]
)
def test_kl_limit_ends_a_diverging_update(tiny, limit, metric):
    rollouts = sample(tiny, 32, 4)
    scores = [random.Random(n).gauss(0, 5) for n in range(32)]
    config = PPOConfig(learning_rate=3e-2, epochs=10, batch_size=32, **{limit: 0.5})
    steps = []
    _, metrics = train(tiny, tiny, rollouts, scores, config, base_folder=tiny, on_step=lambda n, m: steps.append(m))
    assert metrics["stopped_early"] == 1.0 and metrics["steps"] == len(steps) - 1 < 10 and metrics[metric] > 0.5
    assert ppo.find_exceeded_limit(metrics, config) == limit and not any(ppo.find_exceeded_limit(m, config) for m in steps[:-1])


def test_update_that_starts_above_a_kl_limit_is_rejected(tiny, tmp_path):
    """It would make no step, and an unchanged policy would be published."""
    rollouts = sample(tiny, 16, 9)
    trained, _ = train(tiny, tiny, rollouts, list(range(16)), replace(FAST, learning_rate=1e-2))
    far = checkpoints.write_checkpoint(tmp_path / "far", trained.save, {}).folder
    own = sample(far, 64, 10)
    with pytest.raises(TrainingFailed, match=r"KL of the policy to the reference is .* nats per completion") as error:
        train(far, tiny, own, [float(n % 5) for n in range(64)], replace(FAST, max_kl=0.01))
    assert "ppo.max_kl = 0.01" in str(error.value) and str(error.value).count("\n") == 2


def test_update_kl_estimate_detects_probability_moved_to_unsampled_tokens():
    """Half of the probability moves to a token that no sample has; the KL to the reference hardly changes on these samples."""
    old = torch.tensor([0.5, 0.5 - 1e-9]).log()
    new = old - math.log(2)
    assert ppo.estimate_update_kl(old, new).mean().item() == pytest.approx(math.log(2) - 0.5, abs=1e-5)
    rare, likely = torch.tensor(1e-6).log(), torch.tensor(0.5).log()
    assert ppo.estimate_update_kl(rare, likely).item() == pytest.approx(
        9 - math.log(10), abs=1e-4
    )  # a single token does not end an update


def test_importance_weights_of_stale_rollouts_are_capped(tiny):
    rollouts = sample(tiny, 4, 5)
    logprobs = torch.tensor([list(r.logprobs) + [0.0] * (8 - len(r.logprobs)) for r in rollouts])
    targets = ppo.prepare_batch(rollouts, [0.0, 1.0, 2.0, 3.0], logprobs + 1.5, torch.zeros(4, 8), logprobs, None, PPOConfig())
    assert targets.importance_weights.max().item() == 2.0  # exp(1.5) is above the cap
    targets = ppo.prepare_batch(rollouts, [0.0, 1.0, 2.0, 3.0], logprobs - 1.0, torch.zeros(4, 8), logprobs, None, PPOConfig())
    token_weights = targets.importance_weights[targets.mask.bool()]
    assert token_weights.tolist() == pytest.approx([math.exp(-1)] * len(token_weights), abs=1e-5)


def test_masks_come_from_lengths_when_the_pad_token_is_the_end_token(tiny):
    actor = ppo.ActorCritic(weights.load_policy(tiny), EXACT)
    end = weights.load_tokenizer(tiny).eos_token_id
    short, long = (
        Rollout((1, 5, 6), (7, end), (0.0,) * 2, True, 0, "a"),
        Rollout((1, 9), (8, 9, 10, 11), (0.0,) * 4, False, 0, "b"),
    )
    together, _, _ = actor(actor.pad_rollouts([short, long], 4))
    alone, _, _ = actor(actor.pad_rollouts([short], 2))
    assert together[0, :2].tolist() == pytest.approx(alone[0].tolist(), abs=1e-5) and together[0, 2:].tolist() == [0, 0]


def test_combined_objective_adds_the_supervised_gradient(tiny):
    rollouts = sample(tiny, 8, 6)
    row = {"input_ids": [1, 5, 6, 7, 2], "labels": [-100, -100, 6, 7, 2]}
    config = PPOConfig(epochs=1, batch_size=8, alpha=0.0, learning_rate=1e-2)
    trained, metrics = train(tiny, tiny, rollouts, list(range(8)), config, sl_rows=[row])
    before, after = (
        ppo.compute_sl_loss(ppo.ActorCritic(p, EXACT), [row]).item() for p in (weights.load_policy(tiny), trained.policy)
    )
    assert metrics["sl_loss"] == pytest.approx(before / 3, abs=1e-4) and after < before


def test_lora_starts_at_the_reference_and_is_merged(tiny, tmp_path):
    rollouts = sample(tiny, 8, 7)
    adapted = weights.add_lora(weights.load_policy(tiny), 4, "CAUSAL_LM")
    actor = ppo.ActorCritic(adapted, EXACT)
    on, _ = ppo.compute_logprobs_and_values(actor, rollouts, 8)
    with adapted.disable_adapter():
        off, _ = ppo.compute_logprobs_and_values(actor, rollouts, 8)
    assert torch.allclose(on, off, atol=1e-6)
    trained, _ = train(tiny, tiny, rollouts, list(range(8)), FAST, lora_rank=4)
    checkpoints.write_checkpoint(tmp_path / "merged", trained.save, {})
    merged = weights.load_policy(tmp_path / "merged")
    changed = [n for n, p in merged.named_parameters() if not torch.equal(p, weights.load_policy(tiny).get_parameter(n))]
    assert changed and not (tmp_path / "merged" / "adapter_config.json").exists()


def test_lora_update_loads_the_reference_and_the_last_adapter_only(tiny, tmp_path, monkeypatch):
    """With the adapter the model is the served policy, without it the reference. Only the reference's weights are loaded."""
    rollouts = sample(tiny, 16, 8)
    trained, _ = train(tiny, tiny, rollouts, list(range(16)), FAST, lora_rank=4)
    second = checkpoints.write_checkpoint(tmp_path / "second", trained.save, {}).folder
    assert not (second / "rl" / "README.md").exists()
    policy, disabled_is_reference = weights.load_policy_for_rl(second, tiny, 4)
    assert disabled_is_reference
    actor = ppo.ActorCritic(policy, EXACT)
    on, (off, _) = (
        ppo.compute_logprobs_and_values(actor, rollouts, 8)[0],
        ppo.compute_logprobs_and_values(ppo.ActorCritic(weights.load_policy(tiny), EXACT), rollouts, 8),
    )
    served, _ = ppo.compute_logprobs_and_values(ppo.ActorCritic(weights.load_policy(second), EXACT), rollouts, 8)
    assert torch.allclose(on, served, atol=1e-5) and not torch.allclose(on, off, atol=1e-3)
    with weights.disable_adapter(actor.policy):
        assert torch.allclose(ppo.compute_logprobs_and_values(actor, rollouts, 8)[0], off, atol=1e-6)
    loaded, load = [], weights.load_policy
    monkeypatch.setattr(weights, "load_policy", lambda folder, *a: loaded.append(folder) or load(folder, *a))
    steps = []
    trained, _ = train(second, tiny, rollouts, list(range(16)), FAST, lora_rank=8, on_step=lambda n, m: steps.append(m))
    assert loaded == [tiny]
    kl = (torch.expm1(off - on) - (off - on)).sum(-1).mean().item()
    assert steps[0]["ratio_max"] == pytest.approx(1, abs=1e-5) and len(steps) == 2
    assert steps[0]["kl_ref"] == pytest.approx(kl, rel=1e-3) and kl > 1e-4
    third = checkpoints.write_checkpoint(tmp_path / "third", trained.save, {}).folder
    assert weights.has_adapter_for_reference(third, tiny) and not weights.has_adapter_for_reference(third, second)
    assert trained.policy.peft_config["default"].r == 4  # the rank of the phase, not the new setting


@pytest.mark.parametrize("lora_rank", [0, 4])
def test_policy_without_a_reference_adapter_uses_the_reference_for_its_kl(tiny, tmp_path, lora_rank):
    """With full training, or after a change to LoRA within a phase, the reference is loaded separately and then released."""
    rollouts = sample(tiny, 16, 9)
    trained, _ = train(tiny, tiny, rollouts, list(range(16)), FAST)
    second = checkpoints.write_checkpoint(tmp_path / "second", trained.save, {}).folder
    steps = []
    _, metrics = train(second, tiny, rollouts, list(range(16)), FAST, lora_rank=lora_rank, on_step=lambda n, m: steps.append(m))
    on, off = (
        ppo.compute_logprobs_and_values(ppo.ActorCritic(weights.load_policy(f), EXACT), rollouts, 8)[0] for f in (second, tiny)
    )
    assert steps[0]["kl_ref"] == pytest.approx((torch.expm1(off - on) - (off - on)).sum(-1).mean().item(), rel=1e-3)
    assert metrics["kl_rollouts"] == pytest.approx((on - off).sum(-1).mean().item(), rel=1e-3, abs=1e-5)


def test_value_head_is_kept_within_an_rl_phase(tiny, tmp_path):
    rollouts = sample(tiny, 16, 10)
    trained, _ = train(tiny, tiny, rollouts, [4.0 * (n % 2) for n in range(16)], FAST)
    second = checkpoints.write_checkpoint(tmp_path / "second", trained.save, {}).folder
    head = weights.load_value_head(second)
    assert head["weight"].abs().max() > 0
    value_heads = []
    evaluate = ppo.compute_logprobs_and_values
    ppo_values = lambda actor, *more: value_heads.append(actor.value_head.weight.clone()) or evaluate(actor, *more)  # noqa: E731
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ppo, "compute_logprobs_and_values", ppo_values)
        train(second, second, rollouts, [0.0, 1.0] * 8, FAST)
    assert torch.equal(value_heads[0], head["weight"])
    assert weights.load_value_head(tiny) is None


def test_gradient_checkpointing_and_micro_batches_change_only_rounding(tiny):
    rollouts, results = sample(tiny, 8, 11), []
    for hardware, rank in [(EXACT, r) for r in (0, 4)] + [
        (weights.Hardware(micro_batch_size=3, gradient_checkpointing=True, precision="fp32"), r) for r in (0, 4)
    ]:
        # Steps of half the batch: over the whole batch the scores add up to 0, and Adam would make full steps from rounding errors.
        _, metrics = train(tiny, tiny, rollouts, list(range(8)), replace(FAST, batch_size=4), lora_rank=rank, hardware=hardware)
        results.append(metrics)
    for plain, low_memory in zip(results[:2], results[2:], strict=True):
        for name in ("policy_loss", "value_loss", "grad_norm", "kl_ref", "entropy"):
            assert low_memory[name] == pytest.approx(plain[name], rel=1e-3, abs=1e-5), name


def test_missing_eos_penalty_is_off_when_most_completions_are_truncated(tiny, caplog):
    rollouts = sample(tiny, 8, 12, max_tokens=2)
    config = PPOConfig(epochs=1, missing_eos_penalty=3.0)
    mostly_cut = [replace(r, ends_with_eos=n < 2) for n, r in enumerate(rollouts)]
    with pytest.raises(TrainingFailed, match="the reward of all 8"):
        train(tiny, tiny, mostly_cut, [1.0] * 8, config)
    assert "no missing-EOS penalty, because 75 %" in caplog.text
    mostly_ended = [replace(r, ends_with_eos=n > 2) for n, r in enumerate(rollouts)]
    _, metrics = train(tiny, tiny, mostly_ended, [1.0] * 8, config)
    assert metrics["missing_eos_penalty"] == 3.0 and metrics["grad_norm"] > 0


def test_diverging_update_raises(tiny):
    rollouts = sample(tiny, 8, 13)
    steps = []
    with pytest.raises(TrainingFailed, match="training has diverged") as error:
        train(tiny, tiny, rollouts, [float("nan"), *range(7)], FAST, on_step=lambda n, m: steps.append(m))
    assert str(error.value).count("\n") == 2 and not steps


def test_model_with_unknown_logit_processing_is_rejected(tiny):
    """Softcapping (Gemma 2) is supported; any other processing would make every probability silently wrong."""
    model = weights.load_policy(tiny)
    model.register_forward_hook(lambda module, inputs, output: setattr(output, "logits", output.logits / 2))
    with pytest.raises(UsageError, match="PPO cannot train a llama"):
        ppo.ActorCritic(model, EXACT)
