"""Show the rates of each version with intervals, in a table and in plots, and check the claims that must hold.

The field names of `RunResult` and `VersionCounts` are the keys of the result files.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from benchmarks.learning.language import is_polite, is_refusal, is_rude
from benchmarks.learning.programmatic import PreferenceRule
from engine.settings import PPOSettings
from engine.statistics import compute_wilson_interval

_ARM_COLORS = {"judge": "#1b6ca8", "sft": "#c98a00", "shuffled": "#888888", "hacked": "#a83232", "trl112": "#7a4fa3"}
_ARM_LABELS = {
    "judge": "judged by the rule",
    "sft": "SFT alone, no RL",
    "shuffled": "shuffled labels",
    "hacked": "labels that prefer length",
    "trl112": "trl 1.12's PPOTrainer",
}
_MIN_SEED_FRACTION = 0.9  # a claim about single seeds must hold for at least this fraction of the seeds
_NUM_BOOTSTRAP_SAMPLES = 10_000
_KL_TOLERANCE = 10.0  # nats; an update without early stop may raise the KL to the reference by ppo.kl_target plus this


@dataclass(frozen=True)
class VersionCounts:
    """This object holds counts over the first completions of a policy version, and the version's KL to the reference policy.

    `answers` is the number of these completions. `target` is the number of correct completions. `kl` is in nats per completion
    and is estimated on the version's own completions. `stopped` is true if a KL limit stopped the update that produced this
    version.
    """

    arm: str
    seed: int
    version: int
    answers: int
    target: int
    benign: int
    polite: int
    refused_benign: int
    harmful: int
    refused_harmful: int
    rude: int
    words: int
    kl: float = 0.0
    stopped: bool = False

    @property
    def target_rate(self) -> float:
        return self.target / self.answers

    @property
    def target_rate_interval(self) -> tuple[float, float]:
        """Return Wilson's 95 % interval of the target rate."""
        interval = compute_wilson_interval(self.target, self.answers)
        assert interval is not None
        return interval


@dataclass(frozen=True)
class RunResult:
    """This is the result of one arm with one seed. It has the versions in order, and the seconds by phase (`spent`).

    `trips` lists the exceeded limits of the monitor. `refused` lists the rejected or skipped updates. `updates` lists the
    metrics of each policy update. `reward_accuracies` holds the held-out accuracy of each reward model.
    """

    arm: str
    seed: int
    versions: list[VersionCounts]
    spent: dict[str, float]
    trips: list[dict[str, Any]] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    updates: list[dict[str, float]] = field(default_factory=list)
    reward_accuracies: list[float] = field(default_factory=list)
    repeat: int = 0

    @property
    def first_version(self) -> VersionCounts:
        return self.versions[0]

    @property
    def last_version(self) -> VersionCounts:
        return self.versions[-1]

    @property
    def gain(self) -> float:
        return self.last_version.target_rate - self.first_version.target_rate

    @property
    def best_version(self) -> VersionCounts:
        return max(self.versions, key=lambda version: version.target_rate)

    @property
    def has_regressed(self) -> bool:
        """Return whether the rate of the best version is above the interval of the last version."""
        return self.best_version.target_rate > self.last_version.target_rate_interval[1]

    @property
    def largest_kl_increase(self) -> float:
        """Return the largest increase of the KL to the reference in one update without early stop."""
        pairs = zip(self.versions[1:], self.versions[2:], strict=False)
        return max((new.kl - old.kl for old, new in pairs if not new.stopped), default=0.0)


@dataclass(frozen=True)
class Claim:
    """This is a claim of docs/learning.md about some runs. It has their metrics, and states whether the claim holds."""

    text: str
    holds: bool


def count_versions(arm: str, seed: int, responses: Sequence[dict[str, Any]], rule: PreferenceRule) -> list[VersionCounts]:
    """Count the responses by version. A response has the keys policy_version, question, source and text."""
    counts = []
    for version in sorted({row["policy_version"] for row in responses}):
        rows = [row for row in responses if row["policy_version"] == version]
        benign, harmful = (
            [row["text"] for row in rows if (row["source"] == "red-team") == is_harmful] for is_harmful in (False, True)
        )
        counts.append(
            VersionCounts(
                arm=arm,
                seed=seed,
                version=version,
                answers=len(rows),
                target=sum(rule.score_response(row["question"], row["text"]) == 1 for row in rows),
                benign=len(benign),
                polite=sum(map(is_polite, benign)),
                refused_benign=sum(map(is_refusal, benign)),
                harmful=len(harmful),
                refused_harmful=sum(map(is_refusal, harmful)),
                rude=sum(is_rude(row["text"]) for row in rows),
                words=sum(len(row["text"].split()) for row in rows),
            )
        )
    return counts


def _pool_counts(versions: Sequence[VersionCounts], arm: str, version: int, hits: str, cases: str) -> tuple[int, int]:
    """Return the hits and the cases of a version. Both numbers are sums over all seeds."""
    rows = [v for v in versions if v.arm == arm and v.version == version]
    return sum(getattr(v, hits) for v in rows), sum(getattr(v, cases) for v in rows)


def compute_bootstrap_interval(values: Sequence[float]) -> tuple[float, float]:
    """Return the 95 % percentile bootstrap interval of the mean over seeds."""
    rng = random.Random(0)
    means = sorted(fmean(rng.choices(values, k=len(values))) for _ in range(_NUM_BOOTSTRAP_SAMPLES))
    return means[int(0.025 * _NUM_BOOTSTRAP_SAMPLES)], means[int(0.975 * _NUM_BOOTSTRAP_SAMPLES)]


def check_claims(runs: Sequence[RunResult]) -> list[Claim]:
    """Return the claims of docs/learning.md about the arms in `runs`. Each claim states whether it holds for these runs."""
    by_arm = {arm: [run for run in runs if run.arm == arm] for arm in _ARM_LABELS}
    claims = []
    if judged := by_arm["judge"]:
        claims += _check_judge_claims(judged)
    if shuffled := by_arm["shuffled"]:
        low, high = compute_bootstrap_interval([run.gain for run in shuffled])
        claims.append(Claim(f"shuffled labels do not raise the rate: {_format_gain(shuffled, low, high)}", low <= 0))
    if hacked := by_arm["hacked"]:
        detected = sum(bool(run.trips) for run in hacked)
        text = f"the monitor detects the planted fault in {detected} of {len(hacked)} seeds"
        claims.append(Claim(text, detected == len(hacked)))
    if (trl_runs := by_arm["trl112"]) and judged:
        seeds = {run.seed for run in trl_runs}
        own_runs = [run for run in judged if run.seed in seeds]
        (own_regressions, own_increase), (trl_regressions, trl_increase) = (
            (_count_regressions(runs), max(run.largest_kl_increase for run in runs)) for runs in (own_runs, trl_runs)
        )
        text = (
            f"Charter's PPO is not less stable than trl 1.12's: {own_regressions} against {trl_regressions} regressions, "
            f"KL increases up to {own_increase:.1f} against {trl_increase:.1f} nats, {len(seeds)} seeds"
        )
        claims.append(Claim(text, own_regressions <= trl_regressions))
    return claims


def _check_judge_claims(runs: Sequence[RunResult]) -> list[Claim]:
    low, high = compute_bootstrap_interval([run.gain for run in runs])
    above = sum(run.gain > 0 for run in runs)
    stable = len(runs) - _count_regressions(runs)
    increase, limit = max(run.largest_kl_increase for run in runs), PPOSettings().kl_target + _KL_TOLERANCE
    return [
        Claim(f"the target rate increases from the first to the last version: {_format_gain(runs, low, high)}", low > 0),
        Claim(
            f"the last version has a higher rate than the first in {above} of {len(runs)} seeds",
            above >= _MIN_SEED_FRACTION * len(runs),
        ),
        Claim(
            f"the last version is not below the best one by more than its interval in {stable} of {len(runs)} seeds",
            stable >= _MIN_SEED_FRACTION * len(runs),
        ),
        Claim(
            f"no update without early stop raised the KL by more than {increase:.1f} nats (limit {limit:g})", increase <= limit
        ),
    ]


def _count_regressions(runs: Sequence[RunResult]) -> int:
    return sum(run.has_regressed for run in runs)


def _format_gain(runs: Sequence[RunResult], low: float, high: float) -> str:
    return f"{fmean(run.gain for run in runs):+.1%} [{low:+.1%}, {high:+.1%}] over {len(runs)} seeds"


def format_spread(runs: Sequence[RunResult], repeats: Sequence[RunResult]) -> str:
    """Return a line with the spread of the last rate between runs of one seed. The line also has the spread between seeds."""
    seed = repeats[0].seed
    seed_rates = [run.last_version.target_rate for run in [*runs, *repeats] if run.arm == "judge" and run.seed == seed]
    all_rates = [run.last_version.target_rate for run in runs if run.arm == "judge"]
    rates = ", ".join(f"{rate:.1%}" for rate in seed_rates)
    between = f"; between {len(all_rates)} seeds {stdev(all_rates):.1%}" if len(all_rates) > 1 else ""
    return f"seed {seed}, {len(seed_rates)} runs: last rates {rates}, standard deviation {stdev(seed_rates):.1%}{between}"


def _format_fraction(hits: int, n: int) -> str:
    interval = compute_wilson_interval(hits, n)
    return f"{hits / n:.1%} [{interval[0]:.1%}, {interval[1]:.1%}]" if interval else ""


def format_table(runs: Sequence[RunResult]) -> str:
    """Return a Markdown table of runs and arms with the target rates, the last KL, and the largest KL increase in one update.

    The rates of an arm have intervals. An asterisk marks versions whose update was stopped by a KL limit.
    """
    versions = [version for run in runs for version in run.versions]
    numbers = sorted({v.version for v in versions})
    lines = [
        f"| arm | seed | {' | '.join(f'policy {n}' for n in numbers)} | last KL | largest KL increase |",
        "|---|---|" + "---|" * (len(numbers) + 2),
    ]
    for arm in dict.fromkeys(run.arm for run in runs):
        arm_runs = [run for run in runs if run.arm == arm]
        for run in arm_runs:
            by_number = {v.version: v for v in run.versions}
            cells = [f"{v.target_rate:.1%}" + ("*" if v.stopped else "") if (v := by_number.get(n)) else "" for n in numbers]
            kl = f"{run.last_version.kl:.1f} | {run.largest_kl_increase:.1f}"
            lines.append(f"| {_ARM_LABELS[arm]} | {run.seed} | {' | '.join(cells)} | {kl} |")
        cells = [_format_fraction(*_pool_counts(versions, arm, n, "target", "answers")) for n in numbers]
        kl = f"{fmean(run.last_version.kl for run in arm_runs):.1f} | {max(run.largest_kl_increase for run in arm_runs):.1f}"
        lines.append(f"| **{_ARM_LABELS[arm]}** | all | {' | '.join(cells)} | {kl} |")
    return "\n".join(lines)


def plot_results(versions: Sequence[VersionCounts], folder: Path) -> None:
    """Write learning-target.svg (target rate by arm) and learning-parts.svg (fractions of response types, arm judge)."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    plt.rcParams |= {"svg.hashsalt": "charter", "svg.fonttype": "none", "font.size": 10}
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for arm in dict.fromkeys(v.arm for v in versions):
        _plot_line(axes, versions, arm, ("target", "answers"), _ARM_COLORS[arm], _ARM_LABELS[arm])
        for seed in {v.seed for v in versions if v.arm == arm}:
            own = [v for v in versions if v.arm == arm and v.seed == seed]
            axes.plot([v.version for v in own], [v.target / v.answers for v in own], color=_ARM_COLORS[arm], alpha=0.3, lw=0.8)
    _save_plot(figure, axes, "responses that are correct by the rule", folder / "learning-target.svg")
    if any(v.arm == "judge" for v in versions):
        figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
        parts = (
            ("polite", "benign", "#1b6ca8", "benign prompts answered politely"),
            ("refused_harmful", "harmful", "#2a8a4a", "harmful prompts refused"),
            ("refused_benign", "benign", "#a83232", "benign prompts refused"),
            ("rude", "answers", "#888888", "rude responses"),
        )
        for number, (hits, cases, color, label) in enumerate(parts):
            _plot_line(axes, versions, "judge", (hits, cases), color, label, shift=0.05 * (number - 1.5))
        _save_plot(figure, axes, "labels by the rule: types of responses", folder / "learning-parts.svg")


def _plot_line(
    axes: Any, versions: Sequence[VersionCounts], arm: str, columns: tuple[str, str], color: str, label: str, shift: float = 0.0
) -> None:
    """Plot the pooled fractions of `columns` (hits, cases) with intervals. `shift` separates error bars of several lines."""
    numbers = sorted({v.version for v in versions if v.arm == arm})
    counts = [_pool_counts(versions, arm, n, *columns) for n in numbers]
    fractions = [k / n for k, n in counts]
    intervals = [compute_wilson_interval(k, n) or (0.0, 0.0) for k, n in counts]
    below = [fraction - low for fraction, (low, _) in zip(fractions, intervals, strict=True)]
    above = [high - fraction for fraction, (_, high) in zip(fractions, intervals, strict=True)]
    axes.errorbar([n + shift for n in numbers], fractions, yerr=[below, above], color=color, label=label, capsize=3, lw=1.8)


def _save_plot(figure: Any, axes: Any, title: str, path: Path) -> None:
    axes.set(
        xlabel="policy version (0: base model, 1: after SFT)",
        ylabel="fraction of responses, 95 % intervals",
        ylim=(0, 1),
        title=title,
    )
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize=9)
    figure.savefig(path, metadata={"Date": None})
