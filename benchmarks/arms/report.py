"""Write the results of the arms as Markdown tables and as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from benchmarks.arms.plan import Arm
from benchmarks.arms.run import RunProgress, RunResult
from benchmarks.arms.statistics import SeedDifference, compute_seed_difference
from benchmarks.arms.worlds import Metric, World


@dataclass(frozen=True)
class ArmReport:
    """The results of an arm by seed. `unfinished` has the progress of each seed without a result."""

    arm: Arm
    results: Sequence[RunResult]
    unfinished: Mapping[int, str]

    @property
    def is_finished(self) -> bool:
        return not self.unfinished


def describe_progress(progress: RunProgress | None) -> str:
    """Return the progress of a run without a result."""
    return f"{progress.num_done} of {progress.num_steps} steps" if progress else "not started"


def compute_difference(base: RunResult, report: ArmReport, metric: Metric) -> SeedDifference | None:
    """Return the difference of an arm to the base model, or None if no seed has a result."""
    if not report.results:
        return None
    return compute_seed_difference(base.values[metric.title], [result.values[metric.title] for result in report.results])


def format_report(world: World, base: RunResult | None, reports: Sequence[ArmReport]) -> str:
    """Return the tables of a world: differences to the base model, each seed, and the price."""
    if base is None:
        return "The base model is not measured yet: run the command again."
    tables = [_format_differences(world, base, reports), _format_seeds(world, base, reports), _format_price(base, reports)]
    notes = [
        f"* {report.arm.title}, seed {result.seed}: {reason}"
        for report in reports
        for result in report.results
        for reason in dict.fromkeys(result.refused)
    ]
    if notes:
        tables.append("Training steps that published nothing:\n\n" + "\n".join(notes))
    return "\n\n".join(tables)


def _format_differences(world: World, base: RunResult, reports: Sequence[ArmReport]) -> str:
    num_prompts = len(base.values[world.metrics[0].title])
    lines = [
        f"Difference to the base model on {num_prompts} held-out prompts, with its 95 % interval (rates in percentage points).",
        "**Bold**: the arm moves. The interval excludes 0, and the difference has one sign in every seed.",
        "",
        f"| arm | seeds | {' | '.join(metric.title for metric in world.metrics)} |",
        "|---|---|" + "---|" * len(world.metrics),
        f"| base model | | {' | '.join(_format_mean(base, metric) for metric in world.metrics)} |",
    ]
    for report in reports:
        seeds = str(len(report.results)) + ("" if report.is_finished else f" of {len(report.results) + len(report.unfinished)}")
        cells = [_format_difference(compute_difference(base, report, metric), metric, report) for metric in world.metrics]
        lines.append(f"| {report.arm.title}{'' if report.is_finished else ' (unfinished)'} | {seeds} | {' | '.join(cells)} |")
    unfinished = [
        f"* {report.arm.title}, seed {seed}: {progress}" for report in reports for seed, progress in report.unfinished.items()
    ]
    return "\n".join(lines + (["", "Unfinished, so nothing is claimed for these arms:", "", *unfinished] if unfinished else []))


def _format_difference(difference: SeedDifference | None, metric: Metric, report: ArmReport) -> str:
    if difference is None:
        return ""
    scale, digits = (100, 0) if metric.is_rate else (1, 1)
    mean, low, high = (f"{scale * value:+.{digits}f}" for value in (difference.mean, difference.low, difference.high))
    text = f"{mean} ({low} to {high})"
    return f"**{text}**" if difference.moves and report.is_finished else text


def _format_mean(result: RunResult, metric: Metric) -> str:
    mean = fmean(result.values[metric.title].values())
    return f"{100 * mean:.0f} %" if metric.is_rate else f"{mean:.1f}"


def _format_seeds(world: World, base: RunResult, reports: Sequence[ArmReport]) -> str:
    lines = [
        f"| arm | seed | policy | {' | '.join(metric.title for metric in world.metrics)} |",
        "|---|---|---|" + "---|" * len(world.metrics),
    ]
    rows = [("base model", "", base), *((r.arm.title, str(x.seed), x) for r in reports for x in r.results)]
    for title, seed, result in rows:
        cells = " | ".join(_format_mean(result, metric) for metric in world.metrics)
        lines.append(f"| {title} | {seed} | {result.version} | {cells} |")
    return "\n".join(lines)


def _format_price(base: RunResult, reports: Sequence[ArmReport]) -> str:
    """Return the table of the perplexity of human text, IFEval and the seconds of an update."""
    lines = ["| arm | seed | perplexity of human text | IFEval, strict | seconds (CPU) |", "|---|---|---|---|---|"]
    rows = [("base model", "", base), *((r.arm.title, str(x.seed), x) for r in reports for x in r.results)]
    for title, seed, result in rows:
        ifeval = f"{100 * result.price['ifeval']:.0f} %" if "ifeval" in result.price else "not measured"
        seconds = ", ".join(f"{kind} {value:.0f} ({result.cpu_seconds[kind]:.0f})" for kind, value in result.seconds.items())
        lines.append(f"| {title} | {seed} | {result.price['perplexity']:.1f} | {ifeval} | {seconds} |")
    return "\n".join(lines)


def list_rows(world: World, base: RunResult | None, reports: Sequence[ArmReport]) -> list[dict[str, Any]]:
    """Return one row for each arm and metric, with all seeds. An arm without results has a row with its progress."""
    rows = []
    for report in reports:
        common = {"model": world.model, "world": world.name, "arm": report.arm.name, "finished": report.is_finished}
        common |= {"unfinished": {str(seed): progress for seed, progress in report.unfinished.items()}}
        for metric in world.metrics if base and report.results else ():
            assert base is not None
            difference = compute_difference(base, report, metric)
            assert difference is not None
            rows.append(
                common
                | {
                    "metric": metric.title,
                    "base": fmean(base.values[metric.title].values()),
                    "difference": difference.mean,
                    "low": difference.low,
                    "high": difference.high,
                    "by_seed": {str(r.seed): d for r, d in zip(report.results, difference.by_seed, strict=True)},
                    "moves": difference.moves if report.is_finished else None,
                    "price": {"base": base.price} | {str(result.seed): result.price for result in report.results},
                    "seconds": {str(result.seed): result.seconds for result in report.results},
                    "cpu_seconds": {str(result.seed): result.cpu_seconds for result in report.results},
                    "refused": {str(result.seed): result.refused for result in report.results if result.refused},
                }
            )
        if not (base and report.results):
            rows.append(common | {"metric": None})
    return rows


def format_examples(base: RunResult, reports: Sequence[ArmReport], count: int) -> str:
    """Return the responses of the base model and of the first seed of each arm to some held-out prompts."""
    lines = []
    for prompt in list(base.responses)[:count]:
        lines += [f"**{prompt}**", "", f"* base model: {_quote(base.responses[prompt])}"]
        lines += [
            f"* {r.arm.title}: {_quote(r.results[0].responses[prompt])}"
            for r in reports
            if r.results and prompt in r.results[0].responses
        ]
        lines.append("")
    return "\n".join(lines).rstrip()


def _quote(text: str) -> str:
    return " / ".join(line.strip() for line in text.strip().splitlines() if line.strip()) or "(empty)"
