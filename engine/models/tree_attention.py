"""Attention over a tree of prompts, branch by branch: nothing is computed for what a token does not see.

With a mask over the whole tree a kernel computes every pair of tokens and throws most of it away, which for a tree of some
thousand tokens costs more than all else that the model does. A branch looks at its ancestors and at itself alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward

from engine.models.prefix_tree import PrefixTree

_ATTN_IMPLEMENTATION = "charter_tree"


class TreeBranch(NamedTuple):
    """The places of a branch, those that its last token sees (S), and the mask (1, 1, B, S) that keeps others from its end."""

    query_slice: slice
    key_indices: torch.Tensor
    mask: torch.Tensor | None


def build_branches(tree: PrefixTree, mask: torch.Tensor) -> list[TreeBranch]:
    """The tree's branches, with their parts of its mask (1, 1, N, N)."""
    made = []
    for place, seen in tree.get_branches():
        index = torch.tensor(seen)
        one = place.stop - place.start == 1  # it sees all that there is to see
        made.append(TreeBranch(place, index, None if one else mask[:, :, place].index_select(3, index)))
    return made


def _tree_attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    branches: Sequence[TreeBranch] = (),
    scaling: float | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of queries (1, H, N, D) over keys and values (1, G, N, D): (1, N, H, D). Without branches, that of `sdpa`."""
    if not branches:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **options)
    groups = query.shape[1] // key.shape[1]
    attended = query.new_empty(1, query.shape[1], query.shape[2], value.shape[3])
    for place, seen, mask in branches:
        keys, values = (repeat_kv(part.index_select(2, seen), groups) for part in (key, value))
        attended[:, :, place] = scaled_dot_product_attention(query[:, :, place], keys, values, attn_mask=mask, scale=scaling)
    return attended.transpose(1, 2).contiguous(), None


AttentionInterface.register(_ATTN_IMPLEMENTATION, _tree_attention_forward)


def supports_tree_attention(model: Any) -> bool:
    """Whether a model asks transformers for its attention, so that ours can take its place."""
    return bool(model._can_set_attn_implementation())


@contextmanager
def use_tree_attention(model: Any, enabled: bool) -> Iterator[None]:
    """Give a model this attention for a pass that brings `branches`."""
    before = model.config._attn_implementation
    model.set_attn_implementation(_ATTN_IMPLEMENTATION if enabled else before)
    try:
        yield
    finally:
        model.set_attn_implementation(before)
