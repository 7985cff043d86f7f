"""Combine prompts with common prefixes into one sequence that contains each shared prefix once.

The judge prompts of one pair (both orders, several principles) form a tree. The root is the system prompt and the dialogue. It
has a branch for each order, and each order has a branch for each question. The sequence contains the tokens of the tree. Each
token keeps its position id from the original prompt and attends only to itself and its ancestors. One forward pass over the
sequence gives the same results as a separate pass for each prompt (tree attention: Cai et al. 2024, Medusa, section 3.1).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise, takewhile

import torch

ROOT = -1


@dataclass(frozen=True)
class PrefixTree:
    """Several prompts as one sequence of N tokens.

    `token_ids` and `position_ids` contain the id of each token and its position in the original prompt.
    `parent_indices` contains the index of each token's parent in the sequence, or ROOT for the first token of a prompt.
    A parent is always before its children.
    `prompt_indices` contains the index of each prompt in the batch.
    `end_indices` contains the index of each prompt's last token in the sequence.
    `num_shared_tokens` contains the number of tokens that each prompt shares with earlier prompts.
    """

    token_ids: tuple[int, ...]
    position_ids: tuple[int, ...]
    parent_indices: tuple[int, ...]
    prompt_indices: tuple[int, ...]
    end_indices: tuple[int, ...]
    num_shared_tokens: tuple[int, ...]

    def get_branches(self) -> list[tuple[slice, list[int]]]:
        """Return the branches of the tree. With each branch, return the indices that its last token attends to.

        In a branch, the parent of each token is the token before it.
        """
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
        """Return the mask (N, N). An entry is True if the column is the token of the row or an ancestor of this token."""
        visible = torch.eye(len(self.token_ids), dtype=torch.bool)
        for index, parent in enumerate(self.parent_indices):
            if parent != ROOT:
                visible[index] |= visible[parent]
        return visible


def build_prefix_trees(prompts: Sequence[Sequence[int]], max_tokens: int) -> list[PrefixTree]:
    """Build trees of at most `max_tokens` tokens from non-empty prompts. A longer prompt gets a separate tree.

    The prompts are sorted by their tokens. Each prompt then has its longest common prefix with the prompt before it.
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
