"""Prompts with common prefixes, as one sequence that contains each shared prefix once.

The judge prompts of one pair (both orders, several principles) form a tree: the system prompt and the dialogue once, then a
branch for each order, then one for each question. The sequence lists the tokens of the tree. Each token has its position id of
the original prompt and attends only to its ancestors. One forward pass over the sequence gives the same results as a separate
pass for each prompt (tree attention: Cai et al. 2024, Medusa, section 3.1).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise, takewhile

import torch

ROOT = -1


@dataclass(frozen=True)
class PrefixTree:
    """Prompts as one sequence of N tokens.

    token_ids, position_ids: for each token, its id and its position in the original prompt.
    parent_indices: for each token, the index of its parent in the sequence (smaller than its own); ROOT for a first token.
    prompt_indices: for each prompt, its index in the batch.
    end_indices: for each prompt, the index of its last token in the sequence.
    num_shared_tokens: for each prompt, the number of its tokens that earlier prompts already contributed.
    """

    token_ids: tuple[int, ...]
    position_ids: tuple[int, ...]
    parent_indices: tuple[int, ...]
    prompt_indices: tuple[int, ...]
    end_indices: tuple[int, ...]
    num_shared_tokens: tuple[int, ...]

    def get_branches(self) -> list[tuple[slice, list[int]]]:
        """Return the branches: each a run of consecutive parent-child tokens, with the indices visible to its last token."""
        forks = [index for index, parent in enumerate(self.parent_indices) if parent != index - 1]
        return [
            (slice(start, stop), [*self.get_ancestors(start), *range(start, stop)])
            for start, stop in pairwise((0, *forks, len(self.token_ids)))
        ]

    def get_ancestors(self, index: int) -> list[int]:
        """Return the indices on the path from the root to a token, without the token itself."""
        ancestors = []
        while (index := self.parent_indices[index]) != ROOT:
            ancestors.append(index)
        return ancestors[::-1]

    def make_visibility_mask(self) -> torch.Tensor:
        """Return the mask (N, N): True where the token of the column is the token of the row or one of its ancestors."""
        visible = torch.eye(len(self.token_ids), dtype=torch.bool)
        for index, parent in enumerate(self.parent_indices):
            if parent != ROOT:
                visible[index] |= visible[parent]
        return visible


def build_prefix_trees(prompts: Sequence[Sequence[int]], max_tokens: int) -> list[PrefixTree]:
    """Build trees of at most `max_tokens` tokens from all prompts. A longer prompt gets its own tree; no prompt may be empty.

    The prompts are sorted by their tokens: each then shares its longest common prefix with the prompt before it.
    """
    trees: list[PrefixTree] = []
    builder = _PrefixTreeBuilder()
    for i in sorted(range(len(prompts)), key=lambda i: tuple(prompts[i])):
        if builder.ends and len(builder.nodes) + len(prompts[i]) - builder.count_shared_tokens(prompts[i]) > max_tokens:
            trees.append(builder.build())
            builder = _PrefixTreeBuilder()
        builder.add_prompt(i, prompts[i])
    return [*trees, builder.build()] if builder.ends else trees


class _PrefixTreeBuilder:
    """Builds a tree from prompts that are added in the sorted order of their tokens."""

    def __init__(self) -> None:
        self.nodes: list[tuple[int, int, int]] = []  # token, position, parent
        self.ends: list[tuple[int, int, int]] = []  # prompt index, index of its last token, number of shared tokens
        self.path: list[int] = []  # node indices of the latest prompt

    def count_shared_tokens(self, prompt: Sequence[int]) -> int:
        """Return the number of tokens that a prompt shares with the latest prompt."""
        shared = takewhile(lambda pair: self.nodes[pair[0]][0] == pair[1], zip(self.path, prompt, strict=False))
        return sum(1 for _ in shared)

    def add_prompt(self, prompt_index: int, prompt: Sequence[int]) -> None:
        num_shared = self.count_shared_tokens(prompt)
        self.path = self.path[:num_shared]
        for position in range(num_shared, len(prompt)):
            self.nodes.append((prompt[position], position, self.path[-1] if self.path else ROOT))
            self.path.append(len(self.nodes) - 1)
        self.ends.append((prompt_index, self.path[-1], num_shared))

    def build(self) -> PrefixTree:
        return PrefixTree(*zip(*self.nodes, strict=True), *zip(*self.ends, strict=True))
