"""Shared prefixes: one pass over a tree of prompts gives the same scores as one pass per prompt, with fewer tokens."""

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


def read_path(tree, end):
    """Return the tokens on the path from the root to a node, with their positions."""
    path = []
    while end != ROOT:
        path.append((tree.token_ids[end], tree.position_ids[end]))
        end = tree.parent_indices[end]
    return path[::-1]


@given(PROMPTS, st.integers(1, 40))
def test_trees_contain_every_prompt_and_each_shared_prefix_once(prompts, max_tokens):
    trees = build_prefix_trees(prompts, max_tokens)
    assert sorted(index for tree in trees for index in tree.prompt_indices) == list(range(len(prompts)))
    for tree in trees:
        for index, end in zip(tree.prompt_indices, tree.end_indices, strict=True):
            assert read_path(tree, end) == [(token, i) for i, token in enumerate(prompts[index])]
        prefixes = {tuple(prompts[index][:n]) for index in tree.prompt_indices for n in range(1, len(prompts[index]) + 1)}
        assert len(tree.token_ids) == len(prefixes) <= max(max_tokens, *map(len, prompts))
        assert sum(len(prompts[index]) for index in tree.prompt_indices) - sum(tree.num_shared_tokens) == len(tree.token_ids)
        for index, visible in tree.get_branches():
            assert [tree.token_ids[i] for i in visible] == [t for t, _ in read_path(tree, index.stop - 1)]
        for index, mask in enumerate(tree.make_visibility_mask().tolist()):
            assert [t for t, is_visible in zip(tree.token_ids, mask, strict=True) if is_visible] == [
                t for t, _ in read_path(tree, index)
            ]


def make_requests():
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


def test_tree_pass_gives_the_same_scores_as_one_pass_per_prompt(model):
    all_scores = model.score_options(make_requests(), ("A", "B"))
    for request, scores in zip(make_requests(), all_scores, strict=True):
        logits = model.model(torch.tensor([model.encode_request(request, 1)])).logits[0, -1]
        p = torch.softmax(logits, -1)
        expected = [p[model.tokenizer.convert_tokens_to_ids(letter)].item() for letter in "AB"]
        assert [math.exp(x) for x in scores.logprobs] == pytest.approx(expected, rel=1e-4)
    encoded = [model.encode_request(request, 1) for request in make_requests()]
    distinct = len({tuple(ids[:n]) for ids in encoded for n in range(1, len(ids) + 1)})
    assert sum(s.usage.prompt_tokens - s.usage.cached_tokens for s in all_scores) == distinct < sum(map(len, encoded)) / 2


def test_branch_attention_gives_the_same_logits_as_a_tree_mask(model, monkeypatch):
    assert model.uses_tree_attention
    before = model.model.config._attn_implementation
    (tree,) = model.build_trees([model.encode_request(request, 1) for request in make_requests()])
    with torch.inference_mode():
        branches = model.compute_end_logits(tree)
        monkeypatch.setattr(LocalModel, "uses_tree_attention", False)
        masked = model.compute_end_logits(tree)
    assert len(tree.get_branches()) > 1 and branches.shape == (len(make_requests()), model.model.config.vocab_size)
    torch.testing.assert_close(branches, masked, rtol=1e-4, atol=1e-5)
    assert model.model.config._attn_implementation == before


def test_model_with_sliding_window_attention_does_not_share_prefixes(tiny):
    windowed = LocalModel(tiny, dtype=torch.float32)
    expected = windowed.score_options(make_requests(), ("A", "B"))
    windowed.model.config.layer_types = ["sliding_attention", "full_attention"]
    scores = windowed.score_options(make_requests(), ("A", "B"))
    assert sum(s.usage.cached_tokens for s in scores) == 0
    assert [s.logprobs for s in scores] == [pytest.approx(s.logprobs, rel=1e-4) for s in expected]


def test_completion_that_times_out_is_returned_incomplete(model):
    messages = (ChatMessage(role="user", content="q"),)
    late, complete = model.generate(
        [GenerationRequest(messages, timeout_s=0.0), GenerationRequest(messages)], max_tokens=20, temperature=0
    )
    assert late[0].finish_reason == "timeout" and len(late[0].token_ids) == 1 == len(late[0].logprobs)
    assert complete[0].finish_reason != "timeout" and complete[0].token_ids[:1] == late[0].token_ids
