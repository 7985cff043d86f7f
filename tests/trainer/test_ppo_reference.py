"""PPO step by step against a second implementation that shares no code with it: numpy, float64, loops, hand-written gradients.

Both train the same small model, whose hidden state at a token is its embedding plus half of the previous embedding. It is registered with
transformers, so all of `ppo.train` runs: folders, other models, targets, minibatches in several passes, clipping, Adam.
"""

import math
import random
import shutil

import numpy
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutput

from trainer import weights
from trainer.learners import ppo
from trainer.learners.ppo import PPOConfig, Rollout

VOCABULARY, SIZE = 11, 5


class TwoTokensConfig(PretrainedConfig):
    model_type = "charter-test-two-tokens"

    def __init__(self, vocab_size=VOCABULARY, hidden_size=SIZE, **rest):
        super().__init__(**{"tie_word_embeddings": False} | rest)
        self.vocab_size, self.hidden_size = vocab_size, hidden_size


class Trunk(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        self.embed = torch.nn.Embedding(config.vocab_size, config.hidden_size)

    def forward(self, input_ids, **_):
        own = self.embed(input_ids)
        before = torch.cat([torch.zeros_like(own[:, :1]), own[:, :-1]], 1)
        return BaseModelOutput(last_hidden_state=own + 0.5 * before)


class TwoTokens(PreTrainedModel):
    config_class = TwoTokensConfig
    base_model_prefix = "model"

    def __init__(self, config):
        super().__init__(config)
        self.model = Trunk(config)
        self.lm_head = torch.nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def _init_weights(self, module):
        torch.nn.init.normal_(module.weight)

    def get_output_embeddings(self):
        return self.lm_head

    def forward(self, input_ids, **_):
        return CausalLMOutput(logits=self.lm_head(self.model(input_ids).last_hidden_state))


AutoConfig.register(TwoTokensConfig.model_type, TwoTokensConfig)
AutoModelForCausalLM.register(TwoTokensConfig, TwoTokens)


@pytest.fixture(scope="module")
def models(tiny, tmp_path_factory):
    """Three folders with different weights: the policy, the reference, the base model."""
    folders = [tmp_path_factory.mktemp(name) for name in ("policy", "reference", "base")]
    for number, folder in enumerate(folders):
        for file in tiny.glob("tokenizer*"):
            shutil.copy(file, folder)
        torch.manual_seed(number)
        TwoTokens(TwoTokensConfig()).save_pretrained(folder)
    return folders


# The second implementation


class Naive:
    """The model's parameters in float64, with Adam's moments."""

    def __init__(self, folder):
        model = weights.load_policy(folder)
        self.w = {
            "embed": model.model.embed.weight.detach().double().numpy(),
            "head": model.lm_head.weight.detach().double().numpy(),
            "value": numpy.zeros(SIZE),
            "bias": numpy.zeros(1),
        }
        self.first, self.second = ({name: numpy.zeros_like(x) for name, x in self.w.items()} for _ in range(2))
        self.steps = 0

    def state(self, ids, t):
        return self.w["embed"][ids[t]] + (0.5 * self.w["embed"][ids[t - 1]] if t else 0.0)

    def log_softmax(self, ids, t, temperature):
        z = self.w["head"] @ self.state(ids, t) / temperature
        return z - z.max() - math.log(sum(math.exp(x) for x in z - z.max()))

    def value(self, ids, t):
        return float(self.w["value"] @ self.state(ids, t) + self.w["bias"][0])

    def logprobs(self, r):
        ids = [*r.prompt_token_ids, *r.token_ids]
        start = len(r.prompt_token_ids)
        return [self.log_softmax(ids, start + k - 1, r.temperature)[token] for k, token in enumerate(r.token_ids)]

    def values(self, r):
        ids = [*r.prompt_token_ids, *r.token_ids]
        return [self.value(ids, len(r.prompt_token_ids) + k - 1) for k in range(len(r.token_ids))]

    def add_logit_gradient(self, gradient, ids, t, logit_gradient):
        """Add the gradients of embeddings and output layer that follow from d loss / d logits (V,) at position t."""
        state = self.state(ids, t)
        gradient["head"] += numpy.outer(logit_gradient, state)
        self.add_state_gradient(gradient, ids, t, self.w["head"].T @ logit_gradient)

    def add_state_gradient(self, gradient, ids, t, state_gradient):
        gradient["embed"][ids[t]] += state_gradient
        if t:
            gradient["embed"][ids[t - 1]] += 0.5 * state_gradient

    def adam(self, gradient, rates):
        self.steps += 1
        for name, g in gradient.items():
            self.first[name] = 0.9 * self.first[name] + 0.1 * g
            self.second[name] = 0.999 * self.second[name] + 0.001 * g * g
            m, v = self.first[name] / (1 - 0.9**self.steps), self.second[name] / (1 - 0.999**self.steps)
            self.w[name] = self.w[name] - rates[name] * m / (numpy.sqrt(v) + 1e-8)


def k3(p, q):
    return math.exp(q - p) - 1 - (q - p)


def compute_naive_targets(rollouts, scores, old_logprobs, values, reference, p):
    """Return scaled advantages, returns and importance weights, as lists of lists."""
    net_scores = [s - (0.0 if r.ends_with_eos else p.missing_eos_penalty) for s, r in zip(scores, rollouts, strict=True)]
    mean_score = sum(net_scores) / len(net_scores)
    advantages, returns, importance = [], [], []
    all_rewards, all_values, future_rewards = [], [], []
    for i, r in enumerate(rollouts):
        count = len(r.token_ids)
        rewards = [-p.beta * (old_logprobs[i][k] - reference[i][k]) for k in range(count)]
        others = [s for j, s in enumerate(net_scores) if j != i and rollouts[j].prompt_token_ids == r.prompt_token_ids]
        alone = p.baseline == "batch" or not others
        rewards[-1] += net_scores[i] - (mean_score if alone else sum(others) / len(others))
        all_rewards.append(rewards)
        all_values += values[i]
        future_rewards += [sum(p.gae_gamma ** (k - t) * rewards[k] for k in range(t, count)) for t in range(count)]
    weight = min(
        1.0,
        max(0.0, float(numpy.cov(all_values, future_rewards, bias=True)[0, 1]) / (float(numpy.var(all_values)) or math.inf)),
    )
    for i, (r, rewards) in enumerate(zip(rollouts, all_rewards, strict=True)):
        count, values_i, row_advantages = len(r.token_ids), [weight * v for v in values[i]], []
        for t in range(count):
            total = 0.0
            for k in range(t, count):
                next_value = values_i[k + 1] if k + 1 < count else 0.0
                total += (p.gae_gamma * p.gae_lambda) ** (k - t) * (rewards[k] + p.gae_gamma * next_value - values_i[k])
            row_advantages.append(total)
        advantages.append(row_advantages)
        returns.append([a + v for a, v in zip(row_advantages, values_i, strict=True)])
        importance.append([min(math.exp(a - b), 2.0) for a, b in zip(old_logprobs[i], r.logprobs, strict=True)])
    flat = [a for row in advantages for a in row]
    mean = sum(flat) / len(flat)
    deviation = math.sqrt(sum((a - mean) ** 2 for a in flat) / len(flat))
    return [[a / deviation for a in row] for row in advantages], returns, importance


def train_naively(folders, rollouts, scores, p, sl_rows, seed):
    """Return the metrics of every step, and the trained model."""
    model, (reference, first) = Naive(folders[0]), (Naive(folder) for folder in folders[1:])
    old_logprobs, old = [model.logprobs(r) for r in rollouts], [model.values(r) for r in rollouts]
    ref_logprobs, base_logprobs = [reference.logprobs(r) for r in rollouts], [first.logprobs(r) for r in rollouts]
    advantages, returns, importance = compute_naive_targets(rollouts, scores, old_logprobs, old, ref_logprobs, p)
    rng, steps, update_kls = random.Random(seed), [], []
    all_steps = p.epochs * -(-len(rollouts) // p.batch_size)
    for _ in range(p.epochs):
        order = list(range(len(rollouts)))
        rng.shuffle(order)
        for start in range(0, len(order), p.batch_size):
            rows = order[start : start + p.batch_size]
            gradient = {name: numpy.zeros_like(x) for name, x in model.w.items()}
            tokens = sum(len(rollouts[i].token_ids) for i in rows)
            m = dict.fromkeys(("policy_loss", "value_loss", "entropy", "approx_kl", "clipfrac", "kl_ref", "kl_base"), 0.0)
            ratio_max, kl_update = 0.0, 0.0
            scale = p.alpha if sl_rows else 1.0
            for i in rows:
                r = rollouts[i]
                ids, before = [*r.prompt_token_ids, *r.token_ids], len(r.prompt_token_ids) - 1
                for k, token in enumerate(r.token_ids):
                    logp_all = model.log_softmax(ids, before + k, r.temperature)
                    new, value = logp_all[token], model.value(ids, before + k)
                    # The policy
                    ratio, a, w = math.exp(new - old_logprobs[i][k]), advantages[i][k], importance[i][k]
                    clipped = min(max(ratio, 1 - p.clip), 1 + p.clip)
                    m["policy_loss"] += w * max(-a * ratio, -a * clipped) / tokens
                    m["clipfrac"] += float(-a * clipped > -a * ratio) / tokens
                    slope = 0.0 if -a * clipped > -a * ratio else -w * a * ratio
                    slope += p.kl_coefficient * (ratio - 1)  # of k3(old, new) = ratio - 1 - log ratio
                    probabilities = numpy.exp(logp_all)
                    logit_gradient = -probabilities * slope
                    logit_gradient[token] += slope
                    model.add_logit_gradient(gradient, ids, before + k, scale * logit_gradient / r.temperature / tokens)
                    # The value
                    kept = old[i][k] + min(max(value - old[i][k], -p.value_clip), p.value_clip)
                    free, bound = (value - returns[i][k]) ** 2, (kept - returns[i][k]) ** 2
                    m["value_loss"] += 0.5 * max(free, bound) / tokens
                    inside = abs(value - old[i][k]) <= p.value_clip
                    slope = value - returns[i][k] if free >= bound else (kept - returns[i][k] if inside else 0.0)
                    slope *= scale * p.value_coefficient / tokens
                    gradient["value"] += slope * model.state(ids, before + k)
                    gradient["bias"] += slope
                    model.add_state_gradient(gradient, ids, before + k, slope * model.w["value"])
                    # Metrics only
                    m["entropy"] -= float(probabilities @ logp_all) / tokens
                    m["approx_kl"] += k3(old_logprobs[i][k], new) / tokens
                    kl_update += k3(old_logprobs[i][k], old_logprobs[i][k] + min(new - old_logprobs[i][k], math.log(10))) / len(
                        rows
                    )
                    m["kl_ref"] += min(ratio, 10) * k3(new, ref_logprobs[i][k]) / len(rows)
                    m["kl_base"] += min(ratio, 10) * k3(new, base_logprobs[i][k]) / len(rows)
                    ratio_max = max(ratio_max, ratio)
            if sl_rows:
                m["sl_loss"] = add_supervised_gradient(
                    model, gradient, [sl_rows[(start + n) % len(sl_rows)] for n in range(len(rows))]
                )
            norm = math.sqrt(sum(float((g * g).sum()) for g in gradient.values()))
            gradient = {name: g * min(1.0, 1.0 / (norm + 1e-6)) for name, g in gradient.items()}
            update_kls.append(kl_update)
            last = update_kls[-math.ceil(64 / p.batch_size) :]
            m["kl_update"] = sum(last) / len(last)
            factor = 1.0
            if p.lr_scheduler_type == "linear":
                rise = math.ceil(p.warmup_ratio * all_steps)
                factor = min((len(steps) + 1) / (rise + 1), (all_steps - len(steps)) / (all_steps - rise))
            rate, head = factor * p.learning_rate, factor * max(p.learning_rate, 1e-5)
            model.adam(gradient, {"embed": rate, "head": rate, "value": head, "bias": head})
            steps.append(m | {"grad_norm": norm, "ratio_max": ratio_max})
    return steps, model


def add_supervised_gradient(model, gradient, rows):
    """Return the token-mean negative log-likelihood, and add its gradient."""
    targets = [(row["input_ids"], t, row["labels"][t + 1]) for row in rows for t in range(len(row["labels"]) - 1)]
    targets = [(ids, t, label) for ids, t, label in targets if label != -100]
    loss = 0.0
    for ids, t, label in targets:
        logp = model.log_softmax(ids, t, 1.0)
        loss -= logp[label] / len(targets)
        logit_gradient = numpy.exp(logp) / len(targets)
        logit_gradient[label] -= 1 / len(targets)
        model.add_logit_gradient(gradient, ids, t, logit_gradient)
    return loss


# The comparison


def make_rollouts(count, seed):
    """Make completions of different lengths at two temperatures, with random (stale and noisy) log-probabilities."""
    rng = random.Random(seed)
    prompts = [tuple(rng.randrange(VOCABULARY) for _ in range(rng.randint(1, 4))) for _ in range(5)]
    rollouts = []
    for n in range(count):
        prompt = prompts[rng.randrange(4) if n else 4]  # the first completion is the only one of its prompt
        completion = tuple(rng.randrange(VOCABULARY) for _ in range(rng.randint(1, 9)))
        noise = tuple(-abs(rng.gauss(2.0, 0.7)) for _ in completion)
        rollouts.append(Rollout(prompt, completion, noise, n % 3 > 0, 0, str(n), rng.choice((1.0, 0.7))))
    return rollouts


SL_ROWS = [
    {"input_ids": [1, 5, 6, 7, 2], "labels": [-100, -100, 6, 7, 2]},
    {"input_ids": [3, 4, 8], "labels": [-100, 4, 8]},
    {"input_ids": [9, 9, 1, 10, 2, 2], "labels": [-100, -100, -100, 10, 2, 2]},
]
STRONG = PPOConfig(
    learning_rate=2e-2,
    epochs=3,
    batch_size=5,
    beta=0.1,
    missing_eos_penalty=0.7,
    max_kl=1e9,
    max_kl_base=1e9,
    max_kl_update=1e9,
)


@pytest.mark.parametrize(
    ("p", "sl_rows"),
    [
        (STRONG, []),
        (
            PPOConfig(
                **vars(STRONG) | {"gae_gamma": 0.9, "gae_lambda": 0.6, "clip": 0.1, "value_clip": 0.05, "baseline": "batch"}
            ),
            [],
        ),
        (PPOConfig(**vars(STRONG) | {"lr_scheduler_type": "constant", "kl_coefficient": 0.0}), []),
        (PPOConfig(**vars(STRONG) | {"alpha": 0.3, "value_coefficient": 1.0}), SL_ROWS),
    ],
    ids=["alternate", "other-settings", "constant-rate", "combined"],
)
def test_every_step_matches_the_second_implementation(models, p, sl_rows):
    rollouts = make_rollouts(13, 1)
    scores = [random.Random(n).gauss(0, 2) for n in range(13)]
    expected, naive = train_naively(models, rollouts, scores, p, sl_rows, seed=3)
    steps = []
    trained, _ = ppo.train(
        models[0], models[1], rollouts, scores, p, base_folder=models[2], sl_rows=sl_rows, seed=3,
        hardware=weights.Hardware(micro_batch_size=2, precision="fp32"), on_step=lambda n, m: steps.append(m),
    )  # fmt: skip
    assert len(steps) == len(expected) == 9
    for step, expected_step in zip(steps, expected, strict=True):
        for name, value in expected_step.items():
            assert step[name] == pytest.approx(value, abs=1e-5, rel=1e-5), name
    assert sum(step["clipfrac"] for step in steps) > 0.5  # the clip was applied
    assert numpy.abs(trained.policy.model.embed.weight.detach().numpy() - naive.w["embed"]).max() < 1e-4
    assert numpy.abs(trained.policy.lm_head.weight.detach().numpy() - naive.w["head"]).max() < 1e-4
