"""`charter eval`: evaluate policies on suites, show and compare the results, and measure judges and graders."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from charter.commands.eval_judge import judge
from charter.commands.eval_principles import measure_principles
from charter.commands.eval_results import compare_results, show_results
from charter.commands.eval_rounds import compare_rounds
from charter.commands.eval_run import run
from charter.commands.eval_win_rate import compare_with_judge
from charter.console import common_options, output_options, print_records
from charter.evaluation.agreement_study import JUDGE_PRESETS, AgreementStudy, read_pairs
from charter.evaluation.grader_study import GRADERS, measure_grader, read_annotated_responses
from charter.models import RoleModels
from engine.settings import Settings


@click.group("eval")
def evaluate() -> None:
    """Evaluate policies on suites, and measure judges and graders.

    \b
    Examples:
      charter eval run --suite xstest=xstest_prompts.csv --policy 0 --policy latest
      charter eval show
      charter eval compare 0 latest --fail-on worse
      charter eval agreement --pairs pairs.jsonl
      charter eval graders --grader refusal --labels completions.csv
      charter eval judge --suite llmbar=natural.json
    """


evaluate.add_command(judge)


@evaluate.command()
@click.option(
    "--pairs",
    "file",
    metavar="FILE",
    type=click.Path(),
    required=True,
    help="File with human preferences in a format of charter produce, or - for standard input.",
)
@click.option(
    "--preset",
    "presets",
    multiple=True,
    type=click.Choice(JUDGE_PRESETS),
    help="Evaluate only this judge preset; may be repeated.",
)
@click.option("--limit", metavar="N", type=click.IntRange(min=1), help="Judge N pairs, sampled with --seed.")
@click.option(
    "--limit-generative",
    metavar="N",
    type=click.IntRange(min=1),
    help="Judge only the first N pairs with presets that generate text.",
)
@click.option(
    "--seed", default=0, show_default=True, help="Seed for sampling the pairs, for the A/B order and for the random baseline."
)
@click.option(
    "--out",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Also write a report to FILE (.md, or .json with all labels).",
)
@output_options
@common_options
def agreement(
    settings: Settings,
    origins: dict[str, str],
    file: str,
    presets: tuple[str, ...],
    limit: int | None,
    limit_generative: int | None,
    seed: int,
    out: Path | None,
    output: str,
) -> None:
    """Measure the agreement of judge presets with human labels.

    Each row of FILE has `chosen` and `rejected`. They are two responses to `prompt`, or two complete dialogues as in HH-RLHF. The
    prompt of a dialogue ends with the last human message. The judge is models.judge, and the principles are those of
    run.constitution. A judge.* setting that the user sets overrides the value in every preset. The table also has three baselines:
    longer, shorter and random. The command does not write to the log or the database.

    \b
    Examples:
      charter eval agreement --pairs pairs.jsonl --limit 200 --limit-generative 50
      charter eval agreement --pairs pairs.jsonl.gz --preset lee2023 --out agreement.md
      charter eval agreement --pairs - --json --set "models.judge=http://localhost:8000/v1#MODEL" < pairs.jsonl
    """
    if out and out.suffix not in (".md", ".json"):
        raise click.UsageError(f"--out {out}: the name must end with .md or .json", click.get_current_context())
    study = AgreementStudy(settings, origins, read_pairs(file, limit, seed), seed)
    models = RoleModels(settings)
    try:
        study.run(models, presets or JUDGE_PRESETS, limit_generative)
    finally:
        models.close()
    if out:
        out.write_text(study.format_markdown() if out.suffix == ".md" else study.to_json(), encoding="utf-8")
    if output:
        print_records([asdict(row) for row in study.rows], output)
    else:
        click.echo(study.format_table())


@evaluate.command()
@click.option("--grader", required=True, type=click.Choice(list(GRADERS)), help="The grader; string-match is a baseline.")
@click.option(
    "--labels",
    "files",
    metavar="FILE",
    multiple=True,
    required=True,
    type=click.Path(),
    help="CSV file with the columns prompt, completion and final_label. May be repeated: the rows are pooled.",
)
@output_options
@common_options
def graders(settings: Settings, grader: str, files: tuple[str, ...], output: str) -> None:
    """Measure a grader of refusals on annotated responses.

    The labels are those of XSTest: 1_full_compliance, 2_full_refusal and 3_partial_refusal. A full refusal is found if it is
    graded `refuses` or `partly`. A false alarm is a compliance that is graded `refuses`.

    \b
    Examples:
      charter eval graders --grader refusal --labels completions.csv --json
    """
    responses = [response for file in files for response in read_annotated_responses(file)]
    print_records([asdict(measure_grader(grader, responses))], output)


evaluate.add_command(run)
evaluate.add_command(show_results)
evaluate.add_command(compare_results)
evaluate.add_command(compare_with_judge)
evaluate.add_command(compare_rounds)
evaluate.add_command(measure_principles)

COMMAND = evaluate
