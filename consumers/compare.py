"""Comparing two texts by next-token probabilities, in both orders.

p(first order) = e^lA / (e^lA + e^lB), never a sampled letter (Bai et al. 2022, section 4.1); both orders are asked and
averaged, because judges favour a slot (Lee et al. 2023, section 2.3). The mass is how much probability the two letters caught:
where it is small the model meant to say something else, and there is no label.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from consumers import templates
from consumers.templates import OPTIONS
from engine.models.port import NOTHING, Model, OptionScores, Usage
from schemas.records import Turn


@dataclass(frozen=True)
class Comparison:
    """The probability that the first text is better when shown first (`forward`) and when shown second (`backward`)."""

    forward: float
    backward: float
    mass_forward: float
    mass_backward: float
    usage: Usage = NOTHING

    @property
    def p(self) -> float:
        return (self.forward + self.backward) / 2

    @property
    def mass(self) -> float:
        return min(self.mass_forward, self.mass_backward)

    @property
    def gap(self) -> float:
        return abs(self.forward - self.backward)

    @property
    def flipped(self) -> bool:
        """Whether the same slot won twice."""
        return (self.forward - 0.5) * (self.backward - 0.5) < 0


def share_of_a(scores: OptionScores) -> float:
    """The probability of option A among A and B; one half when neither caught anything."""
    a, b = scores.logprobs
    if a == b:  # also both -inf
        return 0.5
    return 1.0 / (1.0 + math.exp(min(700.0, b - a)))


def both_orders(model: Model, pairs: Sequence[tuple[tuple[Turn, ...], tuple[Turn, ...]]]) -> list[Comparison]:
    """Ask each question in both orders: `pairs` holds the wording with the first text as A, and as B."""
    asks = [templates.choice(turns, model.capabilities) for pair in pairs for turns in pair]
    scores = model.option_logprobs(asks, OPTIONS)
    return [
        Comparison(
            forward=share_of_a(scores[i]),
            backward=1.0 - share_of_a(scores[i + 1]),
            mass_forward=scores[i].mass,
            mass_backward=scores[i + 1].mass,
            usage=scores[i].usage + scores[i + 1].usage,
        )
        for i in range(0, len(scores), 2)
    ]
