"""`charter eval run`: evaluate policies on suites of prompts."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import click

from charter.commands.produce import column_option
from charter.connect import connect_bus, open_store
from charter.console import common_options, output_options, print_progress, print_records, print_rows
from charter.evaluation.jailbreaks import TRANSFORMS
from charter.evaluation.suite_run import EvaluationRequest, EvaluationResult, make_evaluation_plan, read_result, run_evaluation
from charter.evaluation.suites import SHIPPED, SUITES
from charter.startup import start_when_ready, wait_option
from engine.errors import UsageError
from engine.settings import Settings
from engine.text import format_count

_COLUMNS = ("policy", "suite", "subset", "transform", "prompts", "completions", "truncated", "labels")


@click.command("run")
@click.option(
    "--suite",
    "suites",
    metavar="NAME[=FILE]",
    multiple=True,
    required=True,
    help=f"Suite to evaluate: {', '.join((*SUITES, SHIPPED))}, or a file of prompts. May be repeated.",
)
@click.option(
    "--policy",
    "policies",
    metavar="VERSION",
    multiple=True,
    default=("latest",),
    help="Policy to evaluate: a version or latest; 0 is the base model. May be repeated [default: latest].",
)
@click.option("--name", metavar="NAME", default="eval", show_default=True, help="Name of the evaluation.")
@click.option(
    "--transform",
    "transforms",
    metavar="NAME",
    multiple=True,
    type=click.Choice(list(TRANSFORMS)),
    help=f"Also evaluate the harmful prompts with this jailbreak transformation: {', '.join(TRANSFORMS)}. May be repeated.",
)
@click.option(
    "--limit", metavar="N", type=click.IntRange(min=1), help="Evaluate only N prompts of each suite, for all policies the same."
)
@click.option(
    "--samples",
    metavar="K",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Number of responses to each prompt.",
)
@click.option(
    "--temperature",
    metavar="T",
    type=click.FloatRange(min=0),
    default=0.0,
    show_default=True,
    help="Sampling temperature; 0 is greedy.",
)
@click.option(
    "--max-tokens",
    metavar="N",
    type=click.IntRange(min=1),
    help="Maximum length of a response in tokens [default: that of the suite].",
)
@column_option
@output_options
@wait_option
@common_options
def run(settings: Settings, origins: dict[str, str], output: str, wait: bool, **options: Any) -> None:
    """Evaluate policies on suites of prompts.

    Put the prompts of the suites through the stages respond and grade, and wait until the sink has written the grades to the
    database. Each policy has a separate run, NAME-policy-VERSION. Print the number of responses by label, and the share of
    responses that ended at the token limit. The views suite_responses and suite_grades have the responses and grades.

    Charter reads the file of a suite that you have: XSTest's prompts (columns id, prompt, type, label), HarmBench's behaviors
    (Behavior, FunctionalCategory, ContextString), StrongREJECT (category, source, forbidden_prompt) or IFEval (key, prompt,
    instruction_id_list, kwargs). Without FILE, it looks in evaluation.suites_folder. `shipped` are the prompts shipped with
    Charter. Any other FILE that charter produce reads is a suite too.

    The prompts are never trained, and the evaluation does not change any training run. To continue after an interruption, or to add
    prompts or policies, run the command again with the same name. The exit code is 1 if a record became a dead letter, or if a
    signal stopped the evaluation.

    \b
    Examples:
      charter eval run --suite xstest=xstest_prompts.csv --policy 0 --policy latest
      charter eval run --suite strongreject=strongreject.csv --transform role-play --limit 50
      charter eval run --suite ifeval --set evaluation.suites_folder=suites --policy 0
      charter eval run --suite shipped --policy latest --name shipped --samples 4 --temperature 1
    """
    if origins["run.id"] == "flag":
        raise UsageError(
            "--run has no effect on an evaluation",
            "each policy has its own run: NAME-policy-VERSION",
            "give a name: --name NAME",
        )
    bus = start_when_ready(lambda: connect_bus(settings), wait=wait)
    try:
        plan = make_evaluation_plan(settings, bus, EvaluationRequest(**options))
        is_finished = run_evaluation(plan, bus, wait=wait)
    finally:
        bus.close()
    if not is_finished:
        print_progress("stopped; to continue, run the same command again")
        sys.exit(1)
    result = read_result(plan, open_store(settings))
    _print_result(result, output)
    sys.exit(1 if result.num_dead_letters else 0)


def _print_result(result: EvaluationResult, output: str) -> None:
    for suite, count in result.num_trained.items():
        print_progress(
            f"suite {suite}: {format_count(count, 'prompts', 'are')} also training prompts of this log, so their results are not of new prompts"
        )
    if result.num_dead_letters:
        print_progress(
            f"{result.num_dead_letters:,} records became dead letters, so their grades are missing: charter dlq list"
        )
    if output == "json":
        print_records(result.rows, output)
        return
    rows = [[*(row[name] for name in _COLUMNS[:-1]), _format_labels(row["labels"])] for row in result.rows]
    if not output:
        rows = [[*row[:2], row[2] or "all", row[3] or "-", *row[4:6], f"{row[6]:.0%}", row[7]] for row in rows]
    print_rows(_COLUMNS, rows, output)


def _format_labels(labels: Mapping[str, Mapping[str, int]]) -> str:
    return "; ".join(
        f"{grader}: {', '.join(f'{label} {count}' for label, count in counts.items())}" for grader, counts in labels.items()
    )
