"""`charter eval judge`: measure judges on suites of labeled pairs."""

from __future__ import annotations

from dataclasses import asdict

import click

from charter.console import common_options, output_options, print_records
from charter.evaluation.agreement_study import JUDGE_PRESETS
from charter.evaluation.judge_suites import SUITES, JudgeStudy, parse_suite
from charter.models import RoleModels
from engine.settings import Settings


@click.command()
@click.option(
    "--suite",
    "suites",
    metavar="NAME=FILE",
    multiple=True,
    required=True,
    help="llmbar=FILE (JSON of LLMBar) or pairs=FILE (human preferences, in a format of charter produce). May be repeated.",
)
@click.option(
    "--preset",
    "presets",
    multiple=True,
    type=click.Choice(JUDGE_PRESETS),
    help="Evaluate only this judge preset; may be repeated.",
)
@click.option("--limit", metavar="N", type=click.IntRange(min=1), help="Judge N pairs of each file, sampled with --seed.")
@click.option(
    "--limit-generative",
    metavar="N",
    type=click.IntRange(min=1),
    help="Judge only the first N pairs of each file with presets that generate text.",
)
@click.option("--seed", default=0, show_default=True, help="Seed for sampling the pairs and for the A/B order.")
@output_options
@common_options
def judge(
    settings: Settings,
    origins: dict[str, str],
    suites: tuple[str, ...],
    presets: tuple[str, ...],
    limit: int | None,
    limit_generative: int | None,
    seed: int,
    output: str,
) -> None:
    """Measure judge presets on LLMBar and on human pairs.

    The table also has the published accuracies on LLMBar. The judge is models.judge. A file of LLMBar has input, output_1,
    output_2 and label; its pairs are judged under one principle, which asks which response follows the instruction, unless
    run.constitution is set. Pairs of equal length (words within 10 %) are also reported apart. A pair that the judge cannot
    label has an outcome and no accuracy.

    \b
    Examples:
      charter eval judge --suite llmbar=natural.json --preset lee2023
      charter eval judge --suite llmbar=gptinst.json --suite pairs=pairs.jsonl --limit 100 --csv
    """
    files = [parse_suite(suite) for suite in suites]
    datasets = [(name, SUITES[name](file, limit, seed)) for name, file in files]
    study = JudgeStudy(settings, origins, datasets, seed)
    models = RoleModels(settings)
    try:
        study.run(models, presets or JUDGE_PRESETS, limit_generative)
    finally:
        models.close()
    if output:
        print_records([asdict(row) for row in study.rows], output)
    else:
        click.echo(study.format_table())
