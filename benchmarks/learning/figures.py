"""Rates by version, with intervals: as a table and as plots."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.learning.language import is_polite, is_rude, refuses
from benchmarks.learning.programmatic import Rule
from charter.agreement import wilson

COLOURS = {"judge": "#1b6ca8", "sft": "#c98a00", "shuffled": "#888888", "hacked": "#a83232"}
WORDS = {
    "judge": "judged by the rule",
    "sft": "SFT alone, no RL",
    "shuffled": "shuffled labels",
    "hacked": "labels that like length",
}


@dataclass(frozen=True)
class Version:
    """Counts over the first answers of a policy version."""

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


def versions_of(arm: str, seed: int, answers: Sequence[dict[str, Any]], rule: Rule) -> list[Version]:
    """`answers` have policy_version, question, source and text."""
    found = []
    for version in sorted({row["policy_version"] for row in answers}):
        rows = [row for row in answers if row["policy_version"] == version]
        benign, harmful = ([row["text"] for row in rows if (row["source"] == "red-team") == bad] for bad in (False, True))
        found.append(
            Version(
                arm=arm,
                seed=seed,
                version=version,
                answers=len(rows),
                target=sum(rule.value(row["question"], row["text"]) == 1 for row in rows),
                benign=len(benign),
                polite=sum(map(is_polite, benign)),
                refused_benign=sum(map(refuses, benign)),
                harmful=len(harmful),
                refused_harmful=sum(map(refuses, harmful)),
                rude=sum(is_rude(row["text"]) for row in rows),
                words=sum(len(row["text"].split()) for row in rows),
            )
        )
    return found


def pooled(versions: Sequence[Version], arm: str, number: int, hits: str, of: str) -> tuple[int, int]:
    """Hits and cases of a version over all seeds."""
    rows = [v for v in versions if v.arm == arm and v.version == number]
    return sum(getattr(v, hits) for v in rows), sum(getattr(v, of) for v in rows)


def interval(versions: Sequence[Version], arm: str, number: int) -> tuple[float, float]:
    """Wilson's interval of an arm's target rate at a version, over the seeds that `versions` hold."""
    low, high = wilson(*pooled(versions, arm, number, "target", "answers"))
    assert low is not None and high is not None
    return low, high


def shortcomings(versions: Sequence[Version]) -> list[str]:
    """What of the claim does not hold: with the judge the rate rises in every seed, with shuffled labels in none."""
    missed = []
    for seed in dict.fromkeys(v.seed for v in versions):
        own = [v for v in versions if v.seed == seed]
        for arm, must_rise in (("judge", True), ("shuffled", False)):
            numbers = [v.version for v in own if v.arm == arm]
            if not numbers:
                continue
            rises = interval(own, arm, numbers[-1])[0] > interval(own, arm, numbers[0])[1]
            if rises != must_rise:
                missed.append(f"{WORDS[arm]}, seed {seed}: the target rate {'rises' if rises else 'does not rise'}")
    return missed


def percent(hits: int, n: int) -> str:
    low, high = wilson(hits, n)
    return f"{hits / n:.1%} [{low:.1%}, {high:.1%}]" if n and low is not None else ""


def table(versions: Sequence[Version]) -> str:
    """Markdown: the target rate by version, for each arm and seed and pooled, with intervals."""
    numbers = sorted({v.version for v in versions})
    lines = [f"| arm | seed | {' | '.join(f'policy {n}' for n in numbers)} |", "|---|---|" + "---|" * len(numbers)]
    for arm in dict.fromkeys(v.arm for v in versions):
        of_arm = [v for v in versions if v.arm == arm]
        for seed in dict.fromkeys(v.seed for v in of_arm):
            by_number = {v.version: v for v in of_arm if v.seed == seed}
            cells = [percent(v.target, v.answers) if (v := by_number.get(n)) else "" for n in numbers]
            lines.append(f"| {WORDS[arm]} | {seed} | {' | '.join(cells)} |")
        cells = [percent(*pooled(versions, arm, n, "target", "answers")) for n in numbers]
        lines.append(f"| **{WORDS[arm]}** | all | {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(versions: Sequence[Version], folder: Path) -> None:
    """Write learning-target.svg (the target rate, by arm) and learning-parts.svg (what it consists of, arm judge)."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    plt.rcParams |= {"svg.hashsalt": "charter", "svg.fonttype": "none", "font.size": 10}
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for arm in dict.fromkeys(v.arm for v in versions):
        line(axes, versions, arm, ("target", "answers"), COLOURS[arm], WORDS[arm])
        for seed in {v.seed for v in versions if v.arm == arm}:
            own = [v for v in versions if v.arm == arm and v.seed == seed]
            axes.plot([v.version for v in own], [v.target / v.answers for v in own], color=COLOURS[arm], alpha=0.3, lw=0.8)
    finish(figure, axes, "answers that the rule calls right", folder / "learning-target.svg")
    if any(v.arm == "judge" for v in versions):
        figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
        parts = (
            ("polite", "benign", "#1b6ca8", "benign prompts answered politely"),
            ("refused_harmful", "harmful", "#2a8a4a", "harmful prompts refused"),
            ("refused_benign", "benign", "#a83232", "benign prompts refused"),
            ("rude", "answers", "#888888", "rude answers"),
        )
        for place, (hits, of, colour, words) in enumerate(parts):
            line(axes, versions, "judge", (hits, of), colour, words, shift=0.05 * (place - 1.5))
        finish(figure, axes, "labels by the rule: what the answers are", folder / "learning-parts.svg")


def line(
    axes: Any, versions: Sequence[Version], arm: str, counted: tuple[str, str], colour: str, words: str, shift: float = 0.0
) -> None:
    """Pooled shares of `counted` (hits, cases) with their intervals; `shift` keeps those of several lines apart."""
    numbers = sorted({v.version for v in versions if v.arm == arm})
    counts = [pooled(versions, arm, n, *counted) for n in numbers]
    shares = [k / n for k, n in counts]
    ends = [wilson(k, n) for k, n in counts]
    below = [share - (low or 0.0) for share, (low, _) in zip(shares, ends, strict=True)]
    above = [(high or 0.0) - share for share, (_, high) in zip(shares, ends, strict=True)]
    axes.errorbar([n + shift for n in numbers], shares, yerr=[below, above], color=colour, label=words, capsize=3, lw=1.8)


def finish(figure: Any, axes: Any, title: str, path: Path) -> None:
    axes.set(
        xlabel="policy version (0: base model, 1: after SFT)",
        ylabel="share of answers, 95 % intervals",
        ylim=(0, 1),
        title=title,
    )
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize=9)
    figure.savefig(path, metadata={"Date": None})
