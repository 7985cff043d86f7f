"""Prompts that begin alike, laid out as one sequence in which what they share stands once.

The prompts of one pair (both orders, several principles) are a tree: the head and the dialogue once, then a branch for each
order, then one for each question. Its tokens are put one after the other, each with the position that it has in its prompt, and
each sees only its own ancestors. One forward pass over that computes for every prompt what a pass of its own would (tree
attention: Cai et al. 2024, Medusa, section 3.1).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise, takewhile

import torch

ROOT = -1


@dataclass(frozen=True)
class PrefixTree:
    """Some prompts as one sequence of N tokens. `parents` are places in it, ROOT for a first token; parents come first.

    `prompts` are places in the batch, `ends` says where in the sequence the last token of each stands, `shared` how many tokens
    of each were there already when it was added.
    """

    token_ids: tuple[int, ...]
    position_ids: tuple[int, ...]
    parent_indices: tuple[int, ...]
    prompt_indices: tuple[int, ...]
    end_indices: tuple[int, ...]
    num_shared_tokens: tuple[int, ...]

    def get_branches(self) -> list[tuple[slice, list[int]]]:
        """The runs of tokens of which each is the child of the one before, and the places that the last one of each sees."""
        forks = [place for place, parent in enumerate(self.parent_indices) if parent != place - 1]
        return [
            (slice(start, stop), [*self.get_ancestors(start), *range(start, stop)])
            for start, stop in pairwise((0, *forks, len(self.token_ids)))
        ]

    def get_ancestors(self, index: int) -> list[int]:
        """The places on the way from the root to a token, without its own."""
        found = []
        while (index := self.parent_indices[index]) != ROOT:
            found.append(index)
        return found[::-1]

    def make_visibility_mask(self) -> torch.Tensor:
        """(N, N): whether the token of a row sees that of a column, which is an ancestor or itself."""
        allowed = torch.eye(len(self.token_ids), dtype=torch.bool)
        for place, parent in enumerate(self.parent_indices):
            if parent != ROOT:
                allowed[place] |= allowed[parent]
        return allowed


def build_prefix_trees(prompts: Sequence[Sequence[int]], max_tokens: int) -> list[PrefixTree]:
    """All prompts in trees of at most `most` tokens (a longer prompt has a tree of its own); no prompt may be empty.

    In the order of their tokens each prompt shares with its neighbour whatever it shares with any.
    """
    made: list[PrefixTree] = []
    group = _PrefixTreeBuilder()
    for i in sorted(range(len(prompts)), key=lambda i: tuple(prompts[i])):
        if group.ends and len(group.nodes) + len(prompts[i]) - group.count_shared_tokens(prompts[i]) > max_tokens:
            made.append(group.build())
            group = _PrefixTreeBuilder()
        group.add_prompt(i, prompts[i])
    return [*made, group.build()] if group.ends else made


class _PrefixTreeBuilder:
    """A tree to which prompts are added in the order of their tokens."""

    def __init__(self) -> None:
        self.nodes: list[tuple[int, int, int]] = []  # token, position, parent
        self.ends: list[tuple[int, int, int]] = []  # a prompt, the place of its last token, how many tokens it shares
        self.path: list[int] = []  # the nodes of the newest prompt

    def count_shared_tokens(self, prompt: Sequence[int]) -> int:
        """How many tokens of a prompt stand in the tree."""
        alike = takewhile(lambda both: self.nodes[both[0]][0] == both[1], zip(self.path, prompt, strict=False))
        return sum(1 for _ in alike)

    def add_prompt(self, prompt_index: int, prompt: Sequence[int]) -> None:
        known = self.count_shared_tokens(prompt)
        self.path = self.path[:known]
        for position in range(known, len(prompt)):
            self.nodes.append((prompt[position], position, self.path[-1] if self.path else ROOT))
            self.path.append(len(self.nodes) - 1)
        self.ends.append((prompt_index, self.path[-1], known))

    def build(self) -> PrefixTree:
        return PrefixTree(*zip(*self.nodes, strict=True), *zip(*self.ends, strict=True))
