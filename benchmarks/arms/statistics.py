"""Compare an arm with the base model: differences for each prompt, and a bootstrap over seeds and prompts."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from engine.statistics import compute_quantile

_NUM_RESAMPLES = 2_000


@dataclass(frozen=True)
class SeedDifference:
    """The mean difference of an arm to the base model over seeds and prompts, with its 95 % interval. `by_seed` has the means."""

    mean: float
    low: float
    high: float
    by_seed: tuple[float, ...]

    @property
    def moves(self) -> bool:
        """Return whether the interval excludes 0 and the mean has the same sign in every seed."""
        has_one_sign = all(value > 0 for value in self.by_seed) or all(value < 0 for value in self.by_seed)
        return has_one_sign and (self.low > 0 or self.high < 0)


def compute_seed_difference(
    base: Mapping[str, float], by_seed: Sequence[Mapping[str, float]], *, num_resamples: int = _NUM_RESAMPLES
) -> SeedDifference:
    """Return the difference of an arm to the base model.

    `base` and each entry of `by_seed` map the same prompts to values. A resample draws seeds with replacement, then prompts with
    replacement. All drawn seeds have the same drawn prompts, because all seeds are measured on the same prompts. The interval has
    the 0.025 and 0.975 quantiles of the resampled means. With one seed, the interval describes the choice of prompts only.

    Raises ValueError if there is no seed or no prompt, or if the prompts differ.
    """
    prompts = sorted(base)
    if not prompts or not by_seed or any(sorted(values) != prompts for values in by_seed):
        raise ValueError("the base model and all seeds must be measured on the same prompts")
    rows = [[values[prompt] - base[prompt] for prompt in prompts] for values in by_seed]
    means, rng = [], random.Random("arms")
    for _ in range(num_resamples):
        seeds = rng.choices(range(len(rows)), k=len(rows))
        columns = [sum(rows[seed][n] for seed in seeds) for n in range(len(prompts))] if len(rows) > 1 else rows[0]
        means.append(sum(rng.choices(columns, k=len(columns))) / (len(columns) * len(rows)))
    means.sort()
    by_seed_means = tuple(fmean(row) for row in rows)
    return SeedDifference(fmean(by_seed_means), compute_quantile(means, 0.025), compute_quantile(means, 0.975), by_seed_means)
