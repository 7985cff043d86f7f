"""GRPO and RLOO: advantages against hand-computed numbers, the loss against TRL's, and whole updates of a tiny model."""

import random
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from trl import GRPOTrainer, RLOOTrainer

from engine import checkpoints
from engine.errors import TrainingFailed
from engine.models.interface import GenerationRequest
from engine.models.local import LocalModel
from schemas.records import ChatMessage
from trainer import weights
from trainer.learners import grpo, policy_math, rloo
from trainer.learners import rollouts as rollouts_module
from trainer.learners.grpo import GRPOConfig
from trainer.learners.rloo import RLOOConfig
from trainer.learners.rollouts import Rollout

EXACT = weights.Hardware(micro_batch_size=64, precision="fp32")
MASK = torch.tensor([[1.0, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0], [1, 0, 0, 0]])


def test_advantages_of_grpo_match_hand_computed_values():
    rewards, groups = torch.tensor([1.0, 0.0, 0.0, 5.0, 0.0, 7.0]), ["a", "a", "b", "b", "a", "b"]
    # group a: 1, 0, 0 with mean 1/3; group b: 0, 5, 7 with mean 4
    assert policy_math.compute_group_advantages(rewards, groups).tolist() == pytest.approx([2 / 3, -1 / 3, -4, 1, -1 / 3, 3])
    # standard deviations with n - 1: a sqrt(1/3), b sqrt(13)
    a, b = (1 / 3) ** 0.5 + 1e-4, 13**0.5 + 1e-4
    scaled = policy_math.compute_group_advantages(rewards, groups, "group").tolist()
    assert scaled == pytest.approx([2 / 3 / a, -1 / 3 / a, -4 / b, 1 / b, -1 / 3 / a, 3 / b])
    batch = rewards.std().item() + 1e-4
    assert policy_math.compute_group_advantages(rewards, groups, "batch")[5].item() == pytest.approx(3 / batch)


def test_advantages_of_rloo_match_hand_computed_values():
    rewards, groups = torch.tensor([1.0, 0.0, 0.0, 5.0, 0.0, 7.0]), ["a", "a", "b", "b", "a", "b"]
    by_hand = [1 - 0, 0 - 0.5, 0 - 6, 5 - 3.5, 0 - 0.5, 7 - 2.5]
    assert policy_math.compute_leave_one_out_advantages(rewards, groups).tolist() == pytest.approx(by_hand)
    # The reward of RLOO includes the KL of the whole completion: 0.5 * (0.2 + 0.4) = 0.3; the third token is padding.
    old, reference = torch.tensor([[-1.0, -1.0, 9.0]]), torch.tensor([[-1.2, -1.4, 0.0]])
    mask = torch.tensor([[1.0, 1.0, 0.0]])
    penalized = rloo.compute_penalized_rewards(torch.tensor([2.0]), old, reference, mask, 0.5)
    assert penalized.tolist() == pytest.approx([1.7])


def test_equal_groups_are_counted_and_an_update_of_equal_groups_is_rejected():
    groups = ["a", "a", "b", "b"]
    assert policy_math.count_equal_groups(torch.tensor([1.0, 1.0, 0.0, 1.0]), groups) == 1
    policy_math.require_comparable_groups(torch.tensor([1.0, 1.0, 0.0, 1.0]), groups, "GRPO")
    with pytest.raises(TrainingFailed, match="in each of 2 groups, all completions have the same reward"):
        policy_math.require_comparable_groups(torch.tensor([1.0, 1.0, 0.0, 0.0]), groups, "GRPO")


# TRL. Its loss is called with the log-probabilities of hand-built inputs, without a model.


def make_logprobs(seed):
    return -torch.rand(4, 4, generator=torch.Generator().manual_seed(seed)) * 3


ADVANTAGES = torch.tensor([1.5, -0.5, -2.0, 0.7])


def call_trl(trainer, logprobs, inputs, **attributes):
    """Return TRL's loss. `logprobs` are those of the policy."""
    fake = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (logprobs, torch.zeros_like(logprobs), None),
        accelerator=SimpleNamespace(gather=lambda x: x, reduce=lambda x, reduction: x, num_processes=1, sync_gradients=True),
        model=SimpleNamespace(training=True), _metrics={"train": defaultdict(list)}, epsilon_low=0.2, epsilon_high=0.2,
        aux_loss_enabled=False, current_gradient_accumulation_steps=1, **attributes,
    )  # fmt: skip
    ids = torch.zeros_like(logprobs, dtype=torch.long)
    batch = {"prompt_ids": ids, "prompt_mask": ids + 1, "completion_ids": ids, "completion_mask": MASK}
    return trainer._compute_loss(fake, fake.model, batch | {"advantages": ADVANTAGES} | inputs)


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo"])
def test_loss_of_grpo_equals_trl(loss_type):
    old, reference = make_logprobs(1), make_logprobs(2)
    ours, theirs = (make_logprobs(3).requires_grad_() for _ in range(2))
    expected = call_trl(
        GRPOTrainer, theirs, {"old_per_token_logps": old, "ref_per_token_logps": reference}, loss_type=loss_type, beta=0.3,
        importance_sampling_level="token", top_entropy_quantile=1.0, off_policy_mask_threshold=None, use_vllm=False,
        args=SimpleNamespace(delta=None, use_bias_correction_kl=False), max_completion_length=7, _entropy_bonus_enabled=False,
    )  # fmt: skip
    token_loss, _, clipped = grpo.compute_token_loss(ours, old, reference, ADVANTAGES[:, None], MASK, 0.2, 0.3)
    shares = grpo.compute_token_shares(
        MASK, loss_type, num_completions=4, num_tokens=float(MASK.sum()), max_completion_length=7
    )
    loss = (token_loss * shares).sum()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6) and 0 < (clipped * MASK).sum() < MASK.sum()
    loss.backward()
    expected.backward()
    assert torch.allclose(ours.grad, theirs.grad, atol=1e-7) and ours.grad.abs().max() > 0.01


def test_loss_of_rloo_equals_trl():
    old = make_logprobs(1)
    ours, theirs = (make_logprobs(3).requires_grad_() for _ in range(2))
    expected = call_trl(RLOOTrainer, theirs, {"old_logps": (old * MASK).sum(1)})
    losses, clipped = rloo.compute_sequence_loss(ours, old, MASK, ADVANTAGES, torch.ones(4), 0.2)
    losses.mean().backward()
    expected.backward()
    assert losses.mean().item() == pytest.approx(expected.item(), rel=1e-6) and 0 < clipped.sum() < 4
    assert torch.allclose(ours.grad, theirs.grad, atol=1e-7) and ours.grad.abs().max() > 0.01


# Whole updates

LEARNERS = {"grpo": (grpo.train, GRPOConfig), "rloo": (rloo.train, RLOOConfig)}
EACH_LEARNER = pytest.mark.parametrize("name", list(LEARNERS))


def make_rollouts(num_groups=3, size=4, seed=0, prompt=(1, 5)):
    rng = random.Random(seed)
    return [
        Rollout(prompt, tuple(rng.randrange(3, 20) for _ in range(n)), (-3.7,) * n, n % 2 == 0, 0, str(group))
        for group in range(num_groups)
        for n in (rng.randint(1, 6) for _ in range(size))
    ]


def train(name, folder, rollouts, rewards, reference=None, hardware=EXACT, **config):
    learner, make_config = LEARNERS[name]
    steps = []
    trained, metrics = learner(
        folder, reference or folder, rollouts, rewards, make_config(**config), hardware=hardware,
        on_step=lambda _, m: steps.append(m),
    )  # fmt: skip
    return trained, metrics, steps


@EACH_LEARNER
@pytest.mark.parametrize("loss_type", ["dr_grpo", "grpo"])
def test_micro_batches_do_not_change_an_update(tiny, name, loss_type):
    rollouts, more = make_rollouts(), {"loss_type": loss_type} if name == "grpo" else {}
    rewards = [float(len(r.token_ids)) for r in rollouts]
    one, two = (
        train(
            name,
            tiny,
            rollouts,
            rewards,
            hardware=weights.Hardware(size, precision="fp32"),
            learning_rate=1e-2,
            epochs=2,
            **more,
        )
        for size in (64, 3)
    )
    for step, other in zip(one[2], two[2], strict=True):
        assert step == pytest.approx(other, abs=1e-4, rel=1e-4)
    for a, b in zip(one[0].policy.parameters(), two[0].policy.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-4)


@EACH_LEARNER
def test_an_update_reports_groups_kl_and_beta(tiny, name):
    rollouts = make_rollouts()
    rewards = [0.0] * 4 + [float(n) for n in range(8)]  # the first group is equal
    _, metrics, steps = train(name, tiny, rollouts, rewards, batch_size=4)
    assert (metrics["groups"], metrics["equal_groups"], metrics["rollouts"], metrics["steps"]) == (3, 1, 12, 3)
    assert metrics["kl_rollouts"] == 0 and metrics["beta"] == LEARNERS[name][1]().beta
    assert {"kl_ref", "kl_update", "policy_loss", "entropy", "clipfrac", "ratio_max"} <= set(steps[0])
    assert 0 < metrics["importance_mean"] <= 2


def test_a_single_step_of_grpo_needs_no_pass_for_the_log_probabilities_before_it(tiny, monkeypatch, tmp_path):
    rollouts = make_rollouts()
    rewards = [float(len(r.token_ids)) for r in rollouts]
    moved, _, _ = train("grpo", tiny, rollouts, rewards, learning_rate=1e-2)
    folder = checkpoints.write_checkpoint(tmp_path / "moved", moved.save, {}).folder
    config = {"reference": tiny, "hardware": weights.Hardware(3, precision="fp32"), "learning_rate": 1e-2, "batch_size": 12}
    passes, compute_logprobs = [], rollouts_module.compute_logprobs
    monkeypatch.setattr(rollouts_module, "compute_logprobs", lambda *a: passes.append(1) or compute_logprobs(*a))
    skipped, metrics, _ = train("grpo", folder, rollouts, rewards, **config)
    load, prepare = grpo.load_rl_models, grpo.prepare_batch
    monkeypatch.setattr(grpo, "load_rl_models", lambda *a, **named: load(*a, **named | {"skip_policy": False}))
    monkeypatch.setattr(grpo, "prepare_batch", lambda *a: prepare(*a[:-1], False))
    computed, expected, _ = train("grpo", folder, rollouts, rewards, **config)
    assert len(passes) == 1 + 2  # the reference; then the reference and the policy
    assert metrics == pytest.approx(expected, abs=1e-5, rel=1e-4) and metrics["kl_rollouts"] > 0.01
    assert metrics["importance_mean"] != pytest.approx(1, abs=0.01)
    for a, b in zip(skipped.policy.parameters(), computed.policy.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-5)
    with pytest.raises(TrainingFailed, match=r"(?s)the KL of the policy to the reference is .* before the first step"):
        train("grpo", folder, rollouts, rewards, **config, max_kl=1e-3)


@EACH_LEARNER
def test_an_update_is_rejected_or_ends_at_a_kl_limit(tiny, name, tmp_path):
    rollouts = make_rollouts()
    rewards = [float(len(r.token_ids)) for r in rollouts]
    trained, metrics, _ = train(name, tiny, rollouts, rewards, learning_rate=3e-2, batch_size=4, epochs=3, max_kl_update=0.1)
    assert metrics["stopped_early"] == 1 and metrics["steps"] < 9
    moved = checkpoints.write_checkpoint(tmp_path / "moved", trained.save, {}).folder
    logprobs = [r for r in rollouts if len(r.token_ids) > 1]
    with pytest.raises(TrainingFailed, match=r"the KL of the policy to the reference is .* nats"):
        train(name, moved, logprobs, [float(len(r.token_ids)) for r in logprobs], reference=tiny, max_kl=-1e3)


def measure_first_half(folder, seed):
    """Sample 8 completions of 8 prompts. Return the rollouts, and for each the fraction of tokens in the first half of all."""
    model = LocalModel(folder, threads=1, dtype=torch.float32, max_batch_size=64)
    requests = [GenerationRequest((ChatMessage(role="user", content="a"),), seed=100 * seed + n) for n in range(8)]
    rollouts = [
        Rollout(g.prompt_token_ids, g.token_ids, g.logprobs, g.finish_reason == "stop", 0, str(n))
        for n, group in enumerate(model.generate(requests, num_completions=8, max_tokens=6))
        for g in group
    ]
    return rollouts, [sum(token < 20 for token in r.token_ids) / len(r.token_ids) for r in rollouts]


@pytest.mark.parametrize(("name", "is_shuffled"), [("grpo", False), ("rloo", False), ("grpo", True)])
def test_learner_raises_a_programmatic_reward(tiny, name, is_shuffled, tmp_path):
    """Three updates raise the fraction of some letters. With rewards that are shuffled in each group they do not."""
    policy, means = tiny, []
    for number in range(4):
        rollouts, rewards = measure_first_half(policy, number)
        means.append(sum(rewards) / len(rewards))
        if number == 3:
            break
        if is_shuffled:
            random.Random(number).shuffle(rewards)
        trained, _, _ = train(
            name,
            policy,
            rollouts,
            rewards,
            reference=tiny,
            learning_rate=1e-2,
            epochs=2,
            batch_size=16,
            beta=0.0,
            max_kl_update=1e9,
        )
        policy = checkpoints.write_checkpoint(tmp_path / f"policy-{number}", trained.save, {}).folder
    assert (means[-1] > means[0] + 0.2) is not is_shuffled, means
