"""State which completions of a response are compared with each other (`judge.pairing`).

The judge stage makes these pairs, and the trainer computes win rates from them.
"""

from __future__ import annotations

from itertools import combinations, pairwise

REVISION_PAIRING = "revision"
CONTRAST_PAIRING = "contrast"  # a completion sampled with the constitution in its prompt, and one without it
# The value of the column `pairing` in records of pairs of completions. It is part of record ids, so it never changes. The same
# pair has the same id with every pairing.
COMPLETIONS_PAIRING = "completions"
# A pair of neighbors has the position of its first completion as its sample index. Other pairs are numbered behind all of these.
_MAX_COMPLETIONS = 65_536


def name_pairing(pairing: str) -> str:
    """Return the value of the column `pairing` for a value of `judge.pairing`."""
    return pairing if pairing in (REVISION_PAIRING, CONTRAST_PAIRING) else COMPLETIONS_PAIRING


def list_pairs(pairing: str, num_completions: int) -> list[tuple[int, int]]:
    """Return the positions of the completions of each pair, for a value of `judge.pairing`.

    neighbors  (0, 1), (1, 2), ...: one pair less than completions
    circular   the neighbors, and the first and the last completion: each completion is in two pairs
    all        every pair: n (n - 1) / 2 pairs of n completions
    contrast   none: the other completion of the pair has another prompt
    """
    if pairing == CONTRAST_PAIRING:
        return []
    positions = range(num_completions)
    if pairing == "all":
        return list(combinations(positions, 2))
    closing = [(0, num_completions - 1)] if pairing == "circular" and num_completions > 2 else []
    return [*pairwise(positions), *closing]


def compute_pair_index(index_a: int, index_b: int) -> int:
    """Return the sample index of a pair of completions. It depends only on the two completions."""
    return (index_b - index_a - 1) * _MAX_COMPLETIONS + index_a
