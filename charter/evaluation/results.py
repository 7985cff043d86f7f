"""Compute the results of an evaluation: the rates of each policy, and the comparison of two policies on the same prompts.

The input are the views `suite_responses` and `suite_grades`. docs/evaluation.md ("Results", "Comparing two policies") describes each
number. A prompt with several completions counts once, with the mean of its completions. Nothing is dropped silently:
a response that cannot be graded (empty, degenerate, encoded) is counted as `unusable` and is no hit; a response without a grade is
counted as `ungraded` and is not part of a rate.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from charter.evaluation.suite_metrics import DETAILED_GRADERS, HARMLESSNESS, HELPFULNESS, SuiteMetric, get_suite_metrics
from consumers.graders.refusal import UNUSABLE
from engine.errors import UsageError
from engine.statistics import (
    Z_SCORE_95,
    ComparisonOutcome,
    compute_holm_p,
    compute_mcnemar_p,
    compute_paired_bootstrap,
    compute_paired_interval,
    compute_wilson_interval,
    decide_noninferiority,
)
from engine.store import QueryFunction
from schemas.records import ChatMessage, FinishReason

RUN_PATTERN = r"^(.*)-policy-(\d+)$"  # the run id of one policy of an evaluation
LATEST = "latest"


@dataclass(frozen=True)
class SuiteGrade:
    """The grade of one completion by one grader. `label` is empty if the grader failed."""

    label: str
    details: Mapping[str, float]


@dataclass(frozen=True)
class SuiteCompletion:
    """One completion of a suite prompt by one policy, with its grades by grader."""

    policy: int
    suite: str
    subset: str
    transform: str
    prompt_id: str
    is_truncated: bool
    grades: Mapping[str, SuiteGrade]
    response_id: str = ""
    completion_index: int = 0


@dataclass(frozen=True)
class Cell:
    """The place of a rate: a suite, a subset ("" is the whole suite), a transformation ("" is the original) and a metric.

    `is_part` is true for a subset of a suite that also has a row for the whole suite.
    """

    suite: str
    subset: str
    transform: str
    metric: SuiteMetric
    is_part: bool = False


@dataclass(frozen=True)
class RateRow:
    """One rate of one policy.

    `prompts` is the number of prompts with a graded completion, and `rate` the mean over these prompts, with its 95 % interval. The
    counts `completions`, `unusable` and `ungraded` are completions; `truncated` is the share of completions that ended at the
    token limit.
    """

    policy: int
    suite: str
    subset: str
    transform: str
    metric: str
    rate: float | None
    low: float | None
    high: float | None
    prompts: int
    completions: int
    unusable: int
    ungraded: int
    truncated: float


@dataclass(frozen=True)
class ComparisonRow:
    """The comparison of two policies in one cell.

    `prompts` is the number of prompts that both policies have with a grade. `only_a` and `only_b` are the numbers of prompts that
    only one policy has, and `ungraded` is the number of shared prompts without a grade of one policy. `difference` is rate_b minus
    rate_a on the shared prompts. `outcome` is null if neither direction is better.
    """

    suite: str
    subset: str
    transform: str
    metric: str
    prompts: int
    rate_a: float | None = None
    rate_b: float | None = None
    difference: float | None = None
    low: float | None = None
    high: float | None = None
    test: str = ""
    p: float | None = None
    p_holm: float | None = None
    outcome: ComparisonOutcome | None = None
    only_a: int = 0
    only_b: int = 0
    ungraded: int = 0
    unusable_a: int = 0
    unusable_b: int = 0
    is_part: bool = field(default=False, repr=False)


# Reading


def make_run_pattern(name: str) -> str:
    """Return a regular expression of the runs of an evaluation, for DuckDB's regexp_full_match."""
    return f"{re.escape(name)}-policy-[0-9]+"


def list_evaluations(query: QueryFunction) -> dict[str, list[int]]:
    """Return {name: policy versions} of all evaluations in the database. The evaluation that wrote last comes first."""
    rows = query("SELECT run_id, max(created_at) FROM suite_responses GROUP BY 1 ORDER BY 2 DESC, 1").rows
    evaluations: dict[str, list[int]] = {}
    for run_id, _ in rows:
        if match := re.match(RUN_PATTERN, run_id):
            evaluations.setdefault(match[1], []).append(int(match[2]))
    return {name: sorted(policies) for name, policies in evaluations.items()}


def require_evaluation(query: QueryFunction, name: str) -> list[int]:
    """Return the policies of an evaluation. Raise UsageError if the database has no such evaluation."""
    evaluations = list_evaluations(query)
    if name not in evaluations:
        raise UsageError(
            f"there is no evaluation {name}",
            f"the database has: {', '.join(evaluations)}" if evaluations else "the database has no responses to suites",
            "type: charter eval run --suite NAME=FILE --policy 0, or choose another one: --name NAME",
        )
    return evaluations[name]


def resolve_policy(text: str, name: str, policies: Sequence[int]) -> int:
    """Return the version of a policy that an evaluation has. `latest` is the newest version that was evaluated."""
    if text == LATEST:
        return max(policies)
    if text.isdecimal() and int(text) in policies:
        return int(text)
    raise UsageError(
        f"policy {text} is not in the evaluation {name}",
        f"it has the policies {', '.join(map(str, policies))}",
        f"give one of them or {LATEST}, or type: charter eval run --name {name} --suite NAME --policy {text if text.isdecimal() else 'N'}",
    )


def resolve_policies(a: str, b: str, name: str, policies: Sequence[int]) -> tuple[int, int]:
    """Return the versions of two policies of an evaluation. Raise UsageError if both are the same policy."""
    first, second = (resolve_policy(text, name, policies) for text in (a, b))
    if first == second:
        raise UsageError(
            f"{a} and {b} are the same policy {first}",
            f"the evaluation {name} has the policies {', '.join(map(str, policies))}",
            f"compare two different ones, or type: charter eval run --name {name} --suite NAME --policy N",
        )
    return first, second


def load_completions(query: QueryFunction, name: str) -> list[SuiteCompletion]:
    """Return all completions of an evaluation, with their grades. The policy is the one in the id of the run."""
    pattern = {"pattern": make_run_pattern(name)}
    grades: dict[tuple[str, int], dict[str, SuiteGrade]] = defaultdict(dict)
    # Most graders have details that no metric needs. A grader with a grade for each principle has several grades.
    sql = """SELECT response_id::VARCHAR, completion_index, concat_ws(' ', grader, principle_id), label,
                    CASE WHEN list_contains($detailed, grader) THEN details END
             FROM suite_grades WHERE regexp_full_match(run_id, $pattern)"""
    for response_id, index, grader, label, details in query(sql, pattern | {"detailed": sorted(DETAILED_GRADERS)}).rows:
        grades[response_id, index][grader] = SuiteGrade(label, details or {})
    sql = """SELECT run_id, suite, subset, transform, prompt_id::VARCHAR, response_id::VARCHAR, completion_index, finish_reason
             FROM suite_responses WHERE regexp_full_match(run_id, $pattern)"""
    return [
        SuiteCompletion(
            policy=int(run_id.rpartition("-")[2]),
            suite=suite,
            subset=subset,
            transform=transform,
            prompt_id=prompt_id,
            is_truncated=finish_reason == FinishReason.LENGTH,
            grades=grades.get((response_id, index), {}),
            response_id=response_id,
            completion_index=index,
        )
        for run_id, suite, subset, transform, prompt_id, response_id, index, finish_reason in query(sql, pattern).rows
    ]


def load_first_responses(
    query: QueryFunction, name: str, a: int, b: int
) -> list[tuple[str, str, tuple[ChatMessage, ...], str, str]]:
    """Return (suite, transformation, messages, response of a, response of b) of the prompts that both policies have.

    The responses are the first completions. A hash of the prompt decides the order. Raises UsageError if there is no such prompt.
    """
    sql = """SELECT one.suite, one.transform, one.messages, one.response, two.response
             FROM suite_responses one JOIN suite_responses two USING (prompt_id)
             WHERE one.run_id = $a AND two.run_id = $b AND one.completion_index = 0 AND two.completion_index = 0
             ORDER BY one.suite, one.transform, hash(prompt_id::VARCHAR), prompt_id"""
    rows = query(sql, {"a": f"{name}-policy-{a}", "b": f"{name}-policy-{b}"}).rows
    if not rows:
        raise UsageError(
            f"the policies {a} and {b} have no prompt in common in the evaluation {name}",
            "only the same prompts can be compared",
            f"evaluate both on the same suite: charter eval run --name {name} --suite NAME --policy {a} --policy {b}",
        )
    return [
        (suite, transform, tuple(ChatMessage(**m) for m in messages), *texts) for suite, transform, messages, *texts in rows
    ]


# Rates


def list_cells(completions: Sequence[SuiteCompletion]) -> list[Cell]:
    """Return the cells of the given completions: for each suite, transformation and metric the whole suite, then its subsets.

    A metric that is not compared has no rows for subsets, so that the table stays short.
    """
    subsets: dict[tuple[str, str], set[str]] = defaultdict(set)
    for completion in completions:
        subsets[completion.suite, completion.transform].add(completion.subset)
    cells = []
    for (suite, transform), present in sorted(subsets.items()):
        metrics = get_suite_metrics(suite)
        named = present & {metric.subset for metric in metrics if metric.subset}
        for metric in metrics:
            names = sorted(present & {metric.subset} if metric.subset else present - named)
            if len(names) == 1 or (named and all(names)):
                cells += [Cell(suite, name, transform, metric) for name in names]
            elif names:
                cells.append(Cell(suite, "", transform, metric))
                parts = names if metric.compare else []
                cells += [Cell(suite, name, transform, metric, is_part=True) for name in parts if name]
    return cells


def select_completions(completions: Iterable[SuiteCompletion], cell: Cell) -> list[SuiteCompletion]:
    """Return the completions of a cell."""
    return [
        c
        for c in completions
        if (c.suite, c.transform) == (cell.suite, cell.transform) and cell.subset in ("", c.subset)
    ]  # fmt: skip


def measure(metric: SuiteMetric, completion: SuiteCompletion) -> tuple[float, float] | None:
    """Return (hits, trials) of one completion, or None if it has no grade."""
    grade = completion.grades.get(metric.grader)
    if grade is None or not grade.label:
        return None
    if not metric.hits:
        return float(grade.label in metric.labels), 1.0
    if metric.hits not in grade.details:
        return None
    return grade.details[metric.hits], grade.details[metric.trials] if metric.trials else 1.0


def count_unusable(metric: SuiteMetric, completions: Iterable[SuiteCompletion]) -> int:
    """Return the number of completions that the grader of the metric could not grade because of their text."""
    return sum((grade := c.grades.get(metric.grader)) is not None and grade.label == UNUSABLE for c in completions)


def count_ungraded(completions: Iterable[SuiteCompletion]) -> int:
    """Return the number of completions that have no grade for a metric of their suite."""
    return sum(
        any(measure(m, c) is None for m in get_suite_metrics(c.suite) if m.subset in ("", c.subset)) for c in completions
    )


def group_by_prompt(metric: SuiteMetric, completions: Iterable[SuiteCompletion]) -> dict[str, list[tuple[float, float]]]:
    """Return {prompt id: [(hits, trials)]}. The list of a prompt without a grade is empty."""
    by_prompt: dict[str, list[tuple[float, float]]] = {}
    for completion in completions:
        values = by_prompt.setdefault(completion.prompt_id, [])
        if (value := measure(metric, completion)) is not None:
            values.append(value)
    return by_prompt


def compute_rates(completions: Sequence[SuiteCompletion]) -> list[RateRow]:
    """Return the rates of all policies, in the order of the cells."""
    by_policy: dict[int, list[SuiteCompletion]] = defaultdict(list)
    for completion in completions:
        by_policy[completion.policy].append(completion)
    rows = []
    for cell in list_cells(completions):
        for policy in sorted(by_policy):
            if selected := select_completions(by_policy[policy], cell):
                rows.append(_compute_rate(policy, cell, selected))
    return rows


def _compute_rate(policy: int, cell: Cell, completions: Sequence[SuiteCompletion]) -> RateRow:
    metric = cell.metric
    graded = {prompt: values for prompt, values in group_by_prompt(metric, completions).items() if values}
    num_graded = sum(map(len, graded.values()))
    rate, interval = None, None
    if graded and metric.trials:
        # The instructions of one response are not independent, so an interval of binomial counts would be too narrow.
        hits, trials = (math.fsum(value[i] for values in graded.values() for value in values) for i in (0, 1))
        rate = hits / trials if trials else None
    elif graded:
        hits = math.fsum(_compute_mean(values) for values in graded.values())
        rate, interval = hits / len(graded), compute_wilson_interval(hits, len(graded))
    low, high = interval or (None, None)
    return RateRow(
        policy, cell.suite, cell.subset, cell.transform, metric.name, rate, low, high, len(graded), len(completions),
        count_unusable(metric, completions), len(completions) - num_graded,
        sum(c.is_truncated for c in completions) / len(completions),
    )  # fmt: skip


def _compute_mean(values: Sequence[tuple[float, float]]) -> float:
    return math.fsum(hits for hits, _ in values) / len(values)


# Two policies


def compare_policies(
    completions: Sequence[SuiteCompletion], a: int, b: int, margin: float, seed: int = 0
) -> list[ComparisonRow]:
    """Compare policy `b` with policy `a` in each cell, on the prompts that both have.

    Holm's correction of the rows of whole suites counts these rows, and that of the rows of subsets counts the subsets.
    """
    of_a, of_b = ([c for c in completions if c.policy == policy] for policy in (a, b))
    rows, directions = [], []
    for cell in list_cells([*of_a, *of_b]):
        if cell.metric.compare:
            rows.append(_compare_cell(cell, select_completions(of_a, cell), select_completions(of_b, cell), seed))
            directions.append(cell.metric.higher_is_better)
    for is_part in (False, True):
        tested = [i for i, row in enumerate(rows) if row.is_part == is_part and row.p is not None]
        for i, p_holm in zip(tested, compute_holm_p([p for i in tested if (p := rows[i].p) is not None]), strict=True):
            rows[i] = replace(rows[i], p_holm=p_holm, outcome=_decide(rows[i], p_holm, directions[i], margin))
    return rows


def _decide(row: ComparisonRow, p_holm: float, higher_is_better: bool | None, margin: float) -> ComparisonOutcome | None:
    if higher_is_better is None or row.low is None or row.high is None:
        return None
    low, high = (row.low, row.high) if higher_is_better else (-row.high, -row.low)
    return decide_noninferiority(low, high, p_holm, margin)


def _compare_cell(cell: Cell, of_a: Sequence[SuiteCompletion], of_b: Sequence[SuiteCompletion], seed: int) -> ComparisonRow:
    metric = cell.metric
    values_a, values_b = group_by_prompt(metric, of_a), group_by_prompt(metric, of_b)
    shared = sorted(values_a.keys() & values_b.keys())
    pairs = [(values_a[prompt], values_b[prompt]) for prompt in shared if values_a[prompt] and values_b[prompt]]
    row = ComparisonRow(
        cell.suite, cell.subset, cell.transform, metric.name, len(pairs),
        only_a=len(values_a) - len(shared), only_b=len(values_b) - len(shared), ungraded=len(shared) - len(pairs),
        unusable_a=count_unusable(metric, of_a), unusable_b=count_unusable(metric, of_b), is_part=cell.is_part,
    )  # fmt: skip
    if not pairs:
        return row if metric.higher_is_better is None else replace(row, outcome=ComparisonOutcome.UNDECIDED)
    rates = [math.fsum(_compute_mean(pair[i]) for pair in pairs) / len(pairs) for i in (0, 1)]
    return replace(row, rate_a=rates[0], rate_b=rates[1], difference=rates[1] - rates[0], **_test_difference(pairs, seed))


_ValuePairs = Sequence[tuple[Sequence[tuple[float, float]], Sequence[tuple[float, float]]]]


def _test_difference(pairs: _ValuePairs, seed: int) -> dict[str, Any]:
    """Return the interval, the test and its p. McNemar's test needs one completion of each policy that is a hit or not."""
    hits = [([hits for hits, _ in a], [hits for hits, _ in b]) for a, b in pairs]
    if all(len(a) == len(b) == 1 and {a[0], b[0]} <= {0.0, 1.0} for a, b in hits):
        only_a = sum(a[0] > b[0] for a, b in hits)
        only_b = sum(a[0] < b[0] for a, b in hits)
        low, high = compute_paired_interval(only_a, only_b, len(hits)) or (None, None)
        return {"low": low, "high": high, "test": "mcnemar", "p": compute_mcnemar_p(only_a, only_b)}
    result = compute_paired_bootstrap([a for a, _ in hits], [b for _, b in hits], seed=seed)
    assert result is not None
    # Resampling cannot show a difference that no prompt of the sample has, so a few equal prompts would give an empty interval. The
    # interval reaches at least as far as that of as many prompts on which the policies agree.
    reach = Z_SCORE_95**2 / (len(hits) + Z_SCORE_95**2)
    low = max(-1.0, min(result.low, result.difference - reach))
    high = min(1.0, max(result.high, result.difference + reach))
    return {"low": low, "high": high, "test": "bootstrap", "p": result.p}


def find_failed_rows(rows: Iterable[ComparisonRow], fail_on: str) -> list[ComparisonRow]:
    """Return the rows for which `charter eval compare --fail-on` fails.

    A worse row always fails, also that of a subset. With `undecided`, an undecided row of a whole suite fails too; a subset often has
    too few prompts for a decision.
    """
    return [
        row
        for row in rows
        if row.outcome is ComparisonOutcome.WORSE
        or (fail_on == "undecided" and not row.is_part and row.outcome is ComparisonOutcome.UNDECIDED)
    ]


# The plane of harmlessness and helpfulness


def compute_plane(completions: Sequence[SuiteCompletion]) -> dict[str, Any]:
    """Return one point for each policy, with a rate and a 95 % interval on each axis.

    A rate is the mean over the metrics of an axis, so each suite counts equally. Only the original prompts (without a jailbreak
    transformation) that all policies have with a grade are used, so that the points can be compared. The interval combines
    the Wilson intervals of the metrics (Zou and Donner 2008). `metrics` names the metrics of each axis and their number of
    prompts. If an axis has no metric, there are no points.
    """
    policies = sorted({c.policy for c in completions})
    used: dict[str, list[str]] = defaultdict(list)
    rates: dict[tuple[int, str], list[tuple[float, float, float]]] = defaultdict(list)
    for cell in list_cells([c for c in completions if not c.transform]):
        axis = cell.metric.axis
        if not axis or cell.is_part:
            continue
        selected = select_completions(completions, cell)
        by_policy = [group_by_prompt(cell.metric, [c for c in selected if c.policy == policy]) for policy in policies]
        shared = [p for p in by_policy[0] if all(values.get(p) for values in by_policy)]
        if not shared:
            continue
        part = f"{cell.suite} {cell.subset}".strip()
        used[axis].append(f"{part}, {cell.metric.name} ({len(shared)} prompts)")
        for policy, values in zip(policies, by_policy, strict=True):
            hits = math.fsum(_compute_mean(values[prompt]) for prompt in shared)
            interval = compute_wilson_interval(hits, len(shared))
            assert interval is not None
            rates[policy, axis].append((hits / len(shared), *interval))
    axes = (HARMLESSNESS, HELPFULNESS)
    points = [
        {"policy": policy} | {name: value for axis in axes for name, value in _combine_rates(axis, rates[policy, axis]).items()}
        for policy in policies
        if all(used[axis] for axis in axes)
    ]
    return {"points": points, "metrics": {axis: used[axis] for axis in axes}}


def _combine_rates(axis: str, rates: Sequence[tuple[float, float, float]]) -> dict[str, Any]:
    k = len(rates)
    mean = math.fsum(rate for rate, _, _ in rates) / k
    low = mean - math.sqrt(math.fsum((rate - low) ** 2 for rate, low, _ in rates)) / k
    high = mean + math.sqrt(math.fsum((high - rate) ** 2 for rate, _, high in rates)) / k
    return {axis: mean, f"{axis}_interval": (max(0.0, low), min(1.0, high))}
