"""`charter eval`: measure how well a judge agrees with human labels."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from charter.console import common_options, output_options, print_records
from charter.evaluation.agreement_study import JUDGE_PRESETS, AgreementStudy, read_pairs
from charter.models import RoleModels
from engine.settings import Settings


@click.group("eval")
def evaluate() -> None:
    """Measure a judge against human labels.

    \b
    Examples:
      charter eval agreement --pairs pairs.jsonl
    """


@evaluate.command()
@click.option(
    "--pairs",
    "file",
    metavar="FILE",
    type=click.Path(),
    required=True,
    help="Human preferences, as for charter produce; - for stdin.",
)
@click.option("--preset", "presets", multiple=True, type=click.Choice(JUDGE_PRESETS), help="Only this one; may be repeated.")
@click.option("--limit", metavar="N", type=click.IntRange(min=1), help="Judge N of the pairs, drawn by --seed.")
@click.option("--limit-written", metavar="N", type=click.IntRange(min=1), help="The first N of those where a judge writes.")
@click.option("--seed", default=0, show_default=True, help="Draws the pairs, which answer is A, and the random baseline.")
@click.option("--out", metavar="FILE", type=click.Path(path_type=Path), help="Also write a report: .md, or .json with labels.")
@output_options
@common_options
def agreement(
    settings: Settings,
    origins: dict[str, str],
    file: str,
    presets: tuple[str, ...],
    limit: int | None,
    limit_written: int | None,
    seed: int,
    out: Path | None,
    output: str,
) -> None:
    """How far each judging preset agrees with people.

    Beside baselines that look at length or at nothing.

    FILE has `chosen` and `rejected` in each row: answers beside a `prompt`, or whole dialogues as in HH-RLHF, of which the last
    human message ends the prompt. The judge is models.judge, the principles are those of run.constitution; nothing is written to
    the log or the database. Settings of judge.* that are given count for every preset.

    \b
    Examples:
      charter eval agreement --pairs pairs.jsonl --limit 200 --limit-written 50
      charter eval agreement --pairs pairs.jsonl.gz --preset lee2023 --out agreement.md
      charter eval agreement --pairs - --json --set "models.judge=http://localhost:8000/v1#MODEL" < pairs.jsonl
    """

    if out and out.suffix not in (".md", ".json"):
        raise click.UsageError(f"--out {out}: give a name that ends with .md or .json", click.get_current_context())
    study = AgreementStudy(settings, origins, read_pairs(file, limit, seed), seed)
    models = RoleModels(settings)
    try:
        study.run(models, presets or JUDGE_PRESETS, limit_written)
    finally:
        models.close()
    if out:
        out.write_text(study.format_markdown() if out.suffix == ".md" else study.to_json(), encoding="utf-8")
    if output:
        print_records([asdict(row) for row in study.rows], output)
    else:
        click.echo(study.format_table())


COMMAND = evaluate
