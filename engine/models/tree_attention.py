"""Compute attention over a tree of prompts, one branch at a time. In this way, masked attention scores are not computed.

With one mask over the whole tree, a kernel computes the score of every pair of tokens and discards most scores. For a tree of
several thousand tokens, these scores cost more time than the rest of the model. A branch attends only to its ancestors and to
itself.
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
    """A branch of B tokens.

    `query_slice` contains the indices of the branch in the sequence. `key_indices` (S) are the indices that its last token
    attends to. `mask` (1, 1, B, S) hides later tokens from earlier tokens. The mask is None for a single token.
    """

    query_slice: slice
    key_indices: torch.Tensor
    mask: torch.Tensor | None


def build_branches(tree: PrefixTree, mask: torch.Tensor) -> list[TreeBranch]:
    """Return the branches of a tree, each with its part of the mask of the tree (1, 1, N, N)."""
    branches = []
    for query_slice, visible in tree.get_branches():
        key_indices = torch.tensor(visible)
        is_single = query_slice.stop - query_slice.start == 1  # a single token attends to all keys, so it needs no mask
        branch_mask = None if is_single else mask[:, :, query_slice].index_select(3, key_indices)
        branches.append(TreeBranch(query_slice, key_indices, branch_mask))
    return branches


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
    """Compute attention of queries (1, H, N, D) over keys and values (1, G, N, D). Return (1, N, H, D).

    If `branches` is empty, use sdpa.
    """
    if not branches:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **options)
    groups = query.shape[1] // key.shape[1]
    attended = query.new_empty(1, query.shape[1], query.shape[2], value.shape[3])
    for query_slice, key_indices, mask in branches:
        keys, values = (repeat_kv(states.index_select(2, key_indices), groups) for states in (key, value))
        attended[:, :, query_slice] = scaled_dot_product_attention(
            query[:, :, query_slice], keys, values, attn_mask=mask, scale=scaling
        )
    return attended.transpose(1, 2).contiguous(), None


AttentionInterface.register(_ATTN_IMPLEMENTATION, _tree_attention_forward)


def supports_tree_attention(model: Any) -> bool:
    """Return whether the attention implementation of a model can be replaced through transformers."""
    return bool(model._can_set_attn_implementation())


@contextmanager
def use_tree_attention(model: Any, enabled: bool) -> Iterator[None]:
    """Use tree attention in a model within the context, if `enabled`. Forward passes need the argument `branches` for it."""
    previous = model.config._attn_implementation
    model.set_attn_implementation(_ATTN_IMPLEMENTATION if enabled else previous)
    try:
        yield
    finally:
        model.set_attn_implementation(previous)
