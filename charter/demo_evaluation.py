"""The evaluation at the end of `charter demo`: how often each policy follows the constitution, on prompts that train nothing.

The prompts are the last shipped prompts. They are the same for all policies, and have the split SUITE. Responses are greedy. The
evaluation is that of `charter eval run`, so `charter eval show --name demo` prints its rates again.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, replace

from charter.console import format_table
from charter.evaluation.results import (
    ComparisonRow,
    RateRow,
    compare_policies,
    compute_rates,
    load_completions,
    make_run_pattern,
)
from charter.evaluation.suite_run import EvaluationRequest, plan_evaluation, run_evaluation
from charter.evaluation.suites import ONE_SENTENCE, open_suite
from charter.text import to_one_line
from engine.bus.port import Bus
from engine.settings import Settings
from engine.store import Store
from producers.files import SHIPPED_PROMPTS_PATH

EVALUATION_NAME = "demo"
_NUM_SHOWN = 4  # prompts whose responses are shown
_PROMPT_WIDTH, _RESPONSE_WIDTH = 28, 46
_MARGIN = 0.05  # of the comparison; the summary does not use its outcome
_QUERY_LIMIT_S = 30.0


@dataclass(frozen=True)
class DemoEvaluation:
    """Evaluates policy 0 and the policies that the demo has trained on `num_prompts` prompts, and describes the result."""

    settings: Settings
    store: Store
    num_prompts: int

    @property
    def title(self) -> str:
        return f"evaluation: each policy responds to {self.num_prompts} other prompts"

    def list_policies(self) -> dict[int, str]:
        """Return {version: phase that trained it}, in order: the base model, and the first policy of each phase of the demo."""
        sql = "SELECT min(version), phase FROM policies WHERE kind = 'POLICY' AND run_id = ? GROUP BY phase ORDER BY 1"
        return {0: "base model"} | dict(self.store.query(sql, [self.settings.run.id], limit_s=_QUERY_LIMIT_S).rows)

    def is_finished(self) -> bool:
        """Return whether the database has the grades of all responses."""
        sql = "SELECT count(*) FROM suite_grades WHERE grader = ? AND run_id IN (SELECT unnest(?::VARCHAR[]))"
        policies = self.list_policies()
        parameters = [ONE_SENTENCE, [f"{EVALUATION_NAME}-policy-{version}" for version in policies]]
        (count,) = self.store.query(sql, parameters, limit_s=_QUERY_LIMIT_S).rows[0]
        return bool(count >= len(policies) * self.num_prompts)

    def run(self, bus: Bus) -> bool:
        """Evaluate all policies. Return False if a signal stopped the evaluation."""
        suite = open_suite(f"{ONE_SENTENCE}={SHIPPED_PROMPTS_PATH}", "", self.settings.prompts.max_chars)
        suite = replace(suite, prompts=suite.prompts[-self.num_prompts :])
        request = EvaluationRequest(
            (),
            tuple(map(str, self.list_policies())),
            EVALUATION_NAME,
            max_tokens=self.settings.respond.max_tokens,
        )
        return run_evaluation(plan_evaluation(self.settings, bus, request, (suite,)), bus)

    # The result

    def format_result(self) -> list[str]:
        """Return the rates of all policies, the difference of the last one to the first one, and responses of both."""
        phases = self.list_policies()
        first, last = 0, max(phases)
        with self.store.open_read_session(limit_s=_QUERY_LIMIT_S) as query:
            loaded = load_completions(query, EVALUATION_NAME)
            completions = [c for c in loaded if c.suite == ONE_SENTENCE and c.policy in phases]
            sql = """SELECT policy_version, avg(score) FROM suite_grades
                     WHERE grader = 'length' AND suite = ? AND regexp_full_match(run_id, ?) GROUP BY 1"""
            words = dict(query(sql, [ONE_SENTENCE, make_run_pattern(EVALUATION_NAME)]).rows)
            sql = """SELECT one.messages[-1].content, one.response, one.finish_reason, two.response, two.finish_reason
                     FROM suite_responses one JOIN suite_responses two USING (prompt_id)
                     WHERE one.run_id = $a AND two.run_id = $b AND one.suite = $suite ORDER BY hash(prompt_id::VARCHAR), prompt_id LIMIT $limit"""
            names = {"a": f"{EVALUATION_NAME}-policy-{first}", "b": f"{EVALUATION_NAME}-policy-{last}"}
            responses = query(sql, names | {"suite": ONE_SENTENCE, "limit": _NUM_SHOWN}).rows
        rates = [row for row in compute_rates(completions) if not row.subset]
        (comparison,) = [row for row in compare_policies(completions, first, last, _MARGIN) if not row.is_part]
        rows = [_format_rate(row, phases[row.policy], words[row.policy]) for row in rates]
        columns = ["policy", "trained by", "one short sentence", "95 % interval", "ended by itself", "words"]
        return [
            format_table(columns, rows),
            f"{rates[0].prompts} prompts that trained no policy, the same for all policies, greedy responses",
            describe_difference(comparison, first, last),
            "",
            f"Responses of policy {first} and policy {last} to {len(responses)} of these prompts, which a hash selects",
            "",
            *_format_responses(responses, first, last),
        ]


def _format_rate(row: RateRow, phase: str, words: float) -> list[object]:
    interval = "-" if row.low is None or row.high is None else f"{row.low:.0%} to {row.high:.0%}"
    rate = "-" if row.rate is None else f"{row.rate:.0%}"
    return [row.policy, phase, rate, interval, f"{1 - row.truncated:.0%}", round(words, 1)]


def describe_difference(row: ComparisonRow, first: int, last: int) -> str:
    """Return one sentence about the difference of two policies. An interval that contains 0 is no effect."""
    if row.difference is None or row.low is None or row.high is None:
        return f"Policies {first} and {last} have no prompt in common with a grade, so no effect was measured."
    numbers = f"{row.difference:+.0%}, 95 % interval {row.low:+.0%} to {row.high:+.0%}, McNemar p = {row.p:.2g}"
    if row.low <= 0 <= row.high:
        return f"No effect was measured between policy {first} and policy {last}: {numbers}."
    more = "more" if row.low > 0 else "less"
    return f"Policy {last} answers in one short sentence {more} often than policy {first}: {numbers}."


def _format_responses(rows: Sequence[Sequence[str]], first: int, last: int) -> list[str]:
    """Return two columns of responses. A response that ended at the token limit ends with [...]."""
    lines = [_join_columns(["prompt", f"policy {first}", f"policy {last}"])]
    for prompt, *texts in rows:
        cells = [prompt, *(f"{text} [...]" if reason == "LENGTH" else text for text, reason in (texts[:2], texts[2:]))]
        widths = (_PROMPT_WIDTH, _RESPONSE_WIDTH, _RESPONSE_WIDTH)
        columns = [textwrap.wrap(to_one_line(cell), width) or ["(empty)"] for cell, width in zip(cells, widths, strict=True)]
        height = max(map(len, columns))
        lines.append(_join_columns(["-" * width for width in widths]))
        lines += [_join_columns([column[n] if n < len(column) else "" for column in columns]) for n in range(height)]
    return lines


def _join_columns(cells: Sequence[str]) -> str:
    return f"{cells[0]:<{_PROMPT_WIDTH}}  {cells[1]:<{_RESPONSE_WIDTH}}  {cells[2]}".rstrip()
