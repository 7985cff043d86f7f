"""Prompts that begin alike, laid out as one sequence in which what they share stands once.

The prompts of one pair (both orders, several principles) are a tree: the head and the dialogue once, then a branch for each
order, then one for each question. Its tokens are put one after the other, each with the position that it has in its prompt, and
each sees only its own ancestors. One forward pass over that computes for every prompt what a pass of its own would (tree
attention: Cai et al. 2024, Medusa, section 3.1). The last token of every prompt stands at the end, so that a pass gives back
logits for these alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile

import torch

ROOT = -1


@dataclass(frozen=True)
class Tree:
    """Some prompts as one sequence of N tokens. `parents` are places in it, ROOT for a first token; parents come first.

    The last len(prompts) tokens are the ends of `prompts`, which are places in the batch; `shared` says how many tokens of each
    were there already when it was added.
    """

    tokens: tuple[int, ...]
    positions: tuple[int, ...]
    parents: tuple[int, ...]
    prompts: tuple[int, ...]
    shared: tuple[int, ...]

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
        if group.ends and group.size + len(prompts[i]) - group.common(prompts[i]) > most:
            made.append(group.tree())
            group = Growing()
        group.add(i, prompts[i])
    return [*made, group.tree()] if group.ends else made


class Growing:
    """A tree to which prompts are added in the order of their tokens."""

    def __init__(self) -> None:
        self.nodes: list[tuple[int, int, int]] = []  # token, position, parent
        self.ends: list[tuple[int, int, int, int]] = []  # the last token of a prompt, its position, its parent; the prompt
        self.shared: list[int] = []
        self.path: list[int] = []  # the nodes of the newest prompt without its last token

    @property
    def size(self) -> int:
        return len(self.nodes) + len(self.ends)

    def common(self, prompt: Sequence[int]) -> int:
        """How many tokens of a prompt, its last one apart, stand in the tree."""
        alike = takewhile(lambda both: self.nodes[both[0]][0] == both[1], zip(self.path, prompt[:-1], strict=False))
        return sum(1 for _ in alike)

    def add(self, place: int, prompt: Sequence[int]) -> None:
        known = self.common(prompt)
        self.path = self.path[:known]
        for position in range(known, len(prompt) - 1):
            self.nodes.append((prompt[position], position, self.path[-1] if self.path else ROOT))
            self.path.append(len(self.nodes) - 1)
        self.ends.append((prompt[-1], len(prompt) - 1, self.path[-1] if self.path else ROOT, place))
        self.shared.append(known)

    def tree(self) -> Tree:
        tokens, positions, parents = zip(*self.nodes, *(end[:3] for end in self.ends), strict=True)
        return Tree(tokens, positions, parents, tuple(end[3] for end in self.ends), tuple(self.shared))
