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
class Tree:
    """Some prompts as one sequence of N tokens. `parents` are places in it, ROOT for a first token; parents come first.

    `prompts` are places in the batch, `ends` says where in the sequence the last token of each stands, `shared` how many tokens
    of each were there already when it was added.
    """

    tokens: tuple[int, ...]
    positions: tuple[int, ...]
    parents: tuple[int, ...]
    prompts: tuple[int, ...]
    ends: tuple[int, ...]
    shared: tuple[int, ...]

    def branches(self) -> list[tuple[slice, list[int]]]:
        """The runs of tokens of which each is the child of the one before, and the places that the last one of each sees."""
        forks = [place for place, parent in enumerate(self.parents) if parent != place - 1]
        return [
            (slice(start, stop), [*self.ancestors(start), *range(start, stop)])
            for start, stop in pairwise((0, *forks, len(self.tokens)))
        ]

    def ancestors(self, place: int) -> list[int]:
        """The places on the way from the root to a token, without its own."""
        found = []
        while (place := self.parents[place]) != ROOT:
            found.append(place)
        return found[::-1]

    def sees(self) -> torch.Tensor:
        """(N, N): whether the token of a row sees that of a column, which is an ancestor or itself."""
        allowed = torch.eye(len(self.tokens), dtype=torch.bool)
        for place, parent in enumerate(self.parents):
            if parent != ROOT:
                allowed[place] |= allowed[parent]
        return allowed


def trees(prompts: Sequence[Sequence[int]], most: int) -> list[Tree]:
    """All prompts in trees of at most `most` tokens (a longer prompt has a tree of its own); no prompt may be empty.

    In the order of their tokens each prompt shares with its neighbour whatever it shares with any.
    """
    made: list[Tree] = []
    group = Growing()
    for i in sorted(range(len(prompts)), key=lambda i: tuple(prompts[i])):
        if group.ends and len(group.nodes) + len(prompts[i]) - group.common(prompts[i]) > most:
            made.append(group.tree())
            group = Growing()
        group.add(i, prompts[i])
    return [*made, group.tree()] if group.ends else made


class Growing:
    """A tree to which prompts are added in the order of their tokens."""

    def __init__(self) -> None:
        self.nodes: list[tuple[int, int, int]] = []  # token, position, parent
        self.ends: list[tuple[int, int, int]] = []  # a prompt, the place of its last token, how many tokens it shares
        self.path: list[int] = []  # the nodes of the newest prompt

    def common(self, prompt: Sequence[int]) -> int:
        """How many tokens of a prompt stand in the tree."""
        alike = takewhile(lambda both: self.nodes[both[0]][0] == both[1], zip(self.path, prompt, strict=False))
        return sum(1 for _ in alike)

    def add(self, place: int, prompt: Sequence[int]) -> None:
        known = self.common(prompt)
        self.path = self.path[:known]
        for position in range(known, len(prompt)):
            self.nodes.append((prompt[position], position, self.path[-1] if self.path else ROOT))
            self.path.append(len(self.nodes) - 1)
        self.ends.append((place, self.path[-1], known))

    def tree(self) -> Tree:
        return Tree(*zip(*self.nodes, strict=True), *zip(*self.ends, strict=True))
