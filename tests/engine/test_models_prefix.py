"""Shared prefixes: one pass over a tree of prompts gives what a pass for each prompt gives, and computes shared tokens once."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.models.interface import GenerationRequest
from engine.models.local import LocalModel
from engine.models.prefix_tree import ROOT, build_prefix_trees
from schemas.records import ChatMessage

PROMPTS = st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=12), min_size=1, max_size=12)


def read_back(tree, end):
    """The tokens on the way from the root to a node, and their positions."""
    found = []
    while end != ROOT:
        found.append((tree.token_ids[end], tree.position_ids[end]))
        end = tree.parent_indices[end]
    return found[::-1]


@given(PROMPTS, st.integers(1, 40))
def test_every_prompt_can_be_read_back_and_nothing_that_is_shared_stands_twice(prompts, most):
    made = build_prefix_trees(prompts, most)
    assert sorted(place for tree in made for place in tree.prompt_indices) == list(range(len(prompts)))
    for tree in made:
        for place, end in zip(tree.prompt_indices, tree.end_indices, strict=True):
            assert read_back(tree, end) == [(token, i) for i, token in enumerate(prompts[place])]
        prefixes = {tuple(prompts[place][:n]) for place in tree.prompt_indices for n in range(1, len(prompts[place]) + 1)}
        assert len(tree.token_ids) == len(prefixes) <= max(most, *map(len, prompts))
        assert sum(len(prompts[place]) for place in tree.prompt_indices) - sum(tree.num_shared_tokens) == len(tree.token_ids)
        for place, seen in tree.get_branches():
            assert [tree.token_ids[i] for i in seen] == [t for t, _ in read_back(tree, place.stop - 1)]
        for place, sees in enumerate(tree.make_visibility_mask().tolist()):
            assert [t for t, seen in zip(tree.token_ids, sees, strict=True) if seen] == [t for t, _ in read_back(tree, place)]


def asks():
    heads = ["a short head, ", "quite another beginning of a prompt, "]
    middles = ["then one answer. and the other", "then the other. and one answer"]
    ends = ["which is more honest", "which is less harmful", "b"]
    return [
        GenerationRequest((ChatMessage(role="user", content=head + middle + end),), "Answer: (")
        for end in ends
        for head in heads
        for middle in middles
    ]


@pytest.fixture(scope="module")
def model(tiny):
    return LocalModel(tiny, dtype=torch.float32)


def test_one_pass_over_a_tree_gives_what_a_pass_for_each_prompt_gives(model):
    together = model.score_options(asks(), ("A", "B"))
    for ask, scores in zip(asks(), together, strict=True):
        logits = model.model(torch.tensor([model.encode_request(ask, 1)])).logits[0, -1]
        p = torch.softmax(logits, -1)
        wanted = [p[model.tokenizer.convert_tokens_to_ids(letter)].item() for letter in "AB"]
        assert [math.exp(x) for x in scores.logprobs] == pytest.approx(wanted, rel=1e-4)
    encoded = [model.encode_request(ask, 1) for ask in asks()]
    distinct = len({tuple(ids[:n]) for ids in encoded for n in range(1, len(ids) + 1)})
    assert sum(s.usage.prompt_tokens - s.usage.cached_tokens for s in together) == distinct < sum(map(len, encoded)) / 2


def test_branch_by_branch_is_what_a_mask_over_the_whole_tree_gives(model, monkeypatch):
    assert model.uses_tree_attention
    before = model.model.config._attn_implementation
    (tree,) = model.build_trees([model.encode_request(ask, 1) for ask in asks()])
    with torch.inference_mode():
        branches = model.compute_end_logits(tree)
        monkeypatch.setattr(LocalModel, "uses_tree_attention", False)
        masked = model.compute_end_logits(tree)
    assert len(tree.get_branches()) > 1 and branches.shape == (len(asks()), model.model.config.vocab_size)
    torch.testing.assert_close(branches, masked, rtol=1e-4, atol=1e-5)
    assert model.model.config._attn_implementation == before


def test_a_model_with_windows_of_its_own_is_asked_prompt_by_prompt(tiny):
    windowed = LocalModel(tiny, dtype=torch.float32)
    expected = windowed.score_options(asks(), ("A", "B"))
    windowed.model.config.layer_types = ["sliding_attention", "full_attention"]
    found = windowed.score_options(asks(), ("A", "B"))
    assert sum(s.usage.cached_tokens for s in found) == 0
    assert [s.logprobs for s in found] == [pytest.approx(s.logprobs, rel=1e-4) for s in expected]


def test_a_text_that_takes_too_long_comes_back_as_far_as_it_is(model):
    messages = (ChatMessage(role="user", content="q"),)
    late, free = model.generate(
        [GenerationRequest(messages, timeout_s=0.0), GenerationRequest(messages)], max_tokens=20, temperature=0
    )
    assert late[0].finish_reason == "timeout" and len(late[0].token_ids) == 1 == len(late[0].logprobs)
    assert free[0].finish_reason != "timeout" and free[0].token_ids[:1] == late[0].token_ids
