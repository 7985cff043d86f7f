"""A real vLLM whose weights are replaced: exact rollouts, a switch in the middle of a batch, a restart, and two GRPO updates."""

import copy
import threading
import time
from pathlib import Path

import pytest

from charter.models import RoleModels
from engine.errors import ModelUnreachable
from engine.models.chat_template import encode_prompt
from engine.models.interface import GenerationRequest, require_results
from engine.models.vllm import VllmServer
from schemas.records import ChatMessage
from tests.support.real_servers import report
from tests.support.served_policies import compute_differences, make_settings, train_policy
from trainer.weights import load_tokenizer

PROMPTS = ("Name a bird.", "Write one sentence about the sea.", "What is a poem?", "Count to ten in words.")
MAX_DIFFERENCE = 0.1  # mean absolute difference of bf16 on the server and fp32 here


def make_requests(seed=0):
    return [GenerationRequest((ChatMessage(role="user", content=text),), seed=seed + n) for n, text in enumerate(PROMPTS)]


def generate(endpoint, seed=0, max_tokens=24):
    results = require_results(endpoint.generate(make_requests(seed), num_completions=2, max_tokens=max_tokens))
    return [generation for generations in results for generation in generations]


def check_weights(folder, generations, name, other=None):
    """Require that the completions were sampled from the weights in a folder and not from those in `other`; report how exactly."""
    differences = compute_differences(folder, generations)
    mean, weight = float(differences.abs().mean()), float(differences.exp().mean())
    report(f"{name}: {len(differences)} tokens, mean |log-prob difference| {mean:.4f}, mean importance weight {weight:.4f}")
    assert mean < MAX_DIFFERENCE and 0.9 < weight < 1.1
    if other is not None:
        mean_of_other = float(compute_differences(other, generations).abs().mean())
        report(f"{name}: {mean_of_other:.4f} with the weights in {Path(other).name}")
        assert mean_of_other > 2 * mean


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("policies")


@pytest.fixture(scope="module")
def models(vllm, untied, folder):
    return RoleModels(make_settings(folder, vllm.address, untied, "vllm"))


@pytest.fixture(scope="module")
def updates(untied, folder):
    """Return two policies that were trained with all weights."""
    return [train_policy(folder, untied, version, lora_rank=0) for version in (1, 2)]


def test_token_ids_and_logprobs_are_exact(models, untied):
    base = models.get_model("policy")
    generations = generate(base)
    assert base.token_codec is not None
    check_weights(untied, generations, "vLLM, version 0")
    tokenizer = load_tokenizer(untied)
    for generation in generations:
        assert tokenizer.decode(generation.token_ids, skip_special_tokens=True) == generation.text


def test_prompts_are_encoded_with_the_local_chat_template(models, untied):
    """The prompts are sent as token ids. The chat API breaks up the markers of all chat formats, also those of other models."""
    policy, tokenizer = models.get_model("policy"), load_tokenizer(untied)
    marked = GenerationRequest((ChatMessage(role="user", content="[INST] Say hello. [/INST]"),), seed=20)
    prefilled = GenerationRequest((ChatMessage(role="user", content="Name a bird."),), "A bird is the", seed=21)
    requests = [*make_requests(), prefilled, marked]
    chat = copy.copy(policy)
    chat.token_codec = None
    by_ids, by_chat = ([result[0] for result in require_results(m.generate(requests, max_tokens=16))] for m in (policy, chat))
    for request, generation in zip(requests, by_ids, strict=True):
        assert list(generation.prompt_token_ids) == encode_prompt(tokenizer, request.messages, request.prefill)
    check_weights(untied, by_ids, "vLLM, prompts as token ids")
    pairs = list(zip(by_ids, by_chat, strict=True))
    prompts = [one.prompt_token_ids == other.prompt_token_ids for one, other in pairs]
    completions = [one.token_ids == other.token_ids for one, other in pairs]
    report(
        f"token ids and chat API, the same seeds: {sum(prompts)} prompts and {sum(completions)} completions of {len(pairs)} are equal"
    )
    assert prompts == [True] * 5 + [False]


def test_batches_during_a_switch_have_the_weights_of_their_policy(models, vllm, updates):
    """A batch that the switch interrupts is either finished with the old weights, or discarded and asked again."""
    first = models.open_policy_update(updates[0])
    generate(first)
    batches, discarded = [], []

    def generate_in_background():
        for seed in range(1000):
            if switched.is_set():
                return
            try:
                batches.append((first, generate(first, seed)))
            except ModelUnreachable as error:
                discarded.append(error)
                return

    switched = threading.Event()
    thread = threading.Thread(target=generate_in_background)
    thread.start()
    while first.health.num_waiting == 0:
        time.sleep(0.01)
    second = models.open_policy_update(updates[1])
    switched.set()
    thread.join()
    batches.append((second, generate(second)))
    report(f"switch in mid-stream: {len(batches)} batches used, {len(discarded)} discarded ({[e.what for e in discarded]})")
    assert first.revision != second.revision
    for endpoint, generations in batches:
        update, other = updates if endpoint is first else reversed(updates)
        check_weights(update.uri, generations, f"vLLM, version {update.version}", other.uri)
    with pytest.raises(ModelUnreachable, match="newer weights"):
        generate(first)


def test_server_killed_in_the_middle_gets_its_policy_again(models, vllm, updates, untied):
    policy = models.open_policy_update(updates[1])
    policy.backoff_range_s = (0.1, 1.0)
    results = []

    def generate_until_it_succeeds():
        while not results:
            try:
                results.append(generate(policy, seed=50, max_tokens=48))
            except ModelUnreachable as error:
                report(f"during the restart: {error.what}: {error.why[:120]}")
                time.sleep(0.5)

    thread = threading.Thread(target=generate_until_it_succeeds)
    thread.start()
    while policy.health.num_waiting == 0:
        time.sleep(0.01)
    vllm.kill()
    vllm.start()
    vllm.wait_until_ready()
    thread.join()
    assert VllmServer(policy).get_weight_version().startswith("policy-000002-")
    check_weights(updates[1].uri, results[0], "vLLM, version 2 after a restart", untied)
