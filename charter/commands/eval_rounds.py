"""`charter eval rounds`: measure the same revision chains after each round."""

from __future__ import annotations

from typing import Any

import click

from charter.commands.eval_win_rate import QUERY_LIMIT_S, WIN_COLUMNS, judge_options, measure_evidence, print_evidence
from charter.connect import open_store
from charter.console import common_options, output_options, print_progress, print_rows
from charter.evaluation.held_out_judge import HeldOutJudge
from charter.evaluation.rounds import compute_round_rows, load_chains
from charter.evaluation.win_rates import apply_judge, require_held_out
from charter.lookup import resolve_run_id
from engine.settings import Settings

_ROUND_COLUMNS = [
    "rounds", "chains", "revised", "violation", "verdicts", "refused", "refused_low", "refused_high", "unusable", "similarity",
    "similarity_to_first", "words",
]  # fmt: skip


@click.command("rounds")
@judge_options(required=False)
@output_options
@common_options
def compare_rounds(
    settings: Settings,
    origins: dict[str, str],
    judge_model: str | None,
    judge_suites: tuple[str, ...],
    limit: int | None,
    output: str,
) -> None:
    """Measure the same chains after 0, 1, 2, ... revisions.

    A chain that has ended keeps its final response. `violation` is the critic's mean probability of a violation of the chain's first
    principle. `refused` is graded by the rules of the grader refusal. With --judge, the response of each round is compared with the
    initial response by a judge that did not criticize. Without --run, the command reads the newest run.

    \b
    Examples:
      charter eval rounds
      charter eval rounds --run live --judge http://localhost:8000/v1#MODEL --judge-suite llmbar=natural.json --csv
    """
    if judge_suites and not judge_model:
        raise click.UsageError("--judge-suite needs --judge MODEL", click.get_current_context())
    store = open_store(settings)
    run = resolve_run_id(settings, origins, store)
    with store.open_read_session(limit_s=QUERY_LIMIT_S) as query:
        chain_set = load_chains(query, run)
    judge: HeldOutJudge | None = None
    evidence: dict[str, Any] = {}
    if judge_model:
        settings, model = apply_judge(settings, judge_model)
        require_held_out(judge_model, model, chain_set.critics, "criticized or revised these chains")
        judge = HeldOutJudge(settings)
        evidence = measure_evidence(settings, model, judge_suites, limit)
    rows = []
    for row in compute_round_rows(chain_set.chains, judge, limit):
        values = {column: getattr(row, column) for column in _ROUND_COLUMNS}
        for group in row.wins:
            prefix = "judge_" if group is row.wins[0] else "equal_length_"
            values |= {f"{prefix}{column}": getattr(group, column) for column in WIN_COLUMNS}
        rows.append(values | evidence)
    columns = list(dict.fromkeys(column for row in rows for column in row))
    if not output:
        columns = [column for column in columns if column not in evidence]
    print_rows(columns, [[row.get(column) for column in columns] for row in rows], output)
    print_evidence(evidence)
    print_progress(
        f"run {run}: {len(chain_set.chains)} chains; not counted: {chain_set.num_unfinished} unfinished, {chain_set.num_skipped} of"
        f" skipped sources, {chain_set.num_unusable} with an unusable initial response"
    )
