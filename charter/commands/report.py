"""`charter report`: write a report of a run to one HTML file."""

from __future__ import annotations

from pathlib import Path

import click

from charter.connect import open_store
from charter.console import common_options, json_option
from charter.dashboard.rendering import error_to_dict, to_json_value
from charter.report import load_sections, render_html, resolve_run
from charter.text import format_json
from engine.settings import Settings

_DEFAULT_NUM_TRACES = 5


@click.command()
@click.argument("file", metavar="[FILE]", type=click.Path(path_type=Path), default=Path("charter-report.html"))
@click.option(
    "--traces",
    "num_traces",
    default=_DEFAULT_NUM_TRACES,
    show_default=True,
    type=click.IntRange(0, 100),
    help="Number of sampled traces.",
)
@json_option
@common_options
def report(settings: Settings, origins: dict[str, str], file: Path, num_traces: int, as_json: bool) -> None:
    """Write a report of a run to one HTML file.

    The report has record counts, the verdict on the labels ("Can I train on this?"), a comparison of the policies, the statistics
    of the principles, the curves of reward and KL, sampled traces, and the configuration of the run. Without --run, the report
    shows the newest run. FILE defaults to charter-report.html; - is standard output.

    \b
    Examples:
      charter report
      charter report --run live --traces 10 live.html
      charter report --json | jq .policies
    """

    store = open_store(settings)
    run = resolve_run(store, settings.run.id if origins["run.id"] != "default" else "")
    sections = load_sections(store, run, num_traces, settings.label_quality)
    if as_json:
        contents = {
            name: result.data if result.error is None else {"error": error_to_dict(result.error)}
            for name, result in sections.items()
        }
        click.echo(format_json(to_json_value({"run": run, **contents})))
        return
    page = render_html(run, sections)
    if str(file) == "-":
        click.echo(page)
        return
    file.write_text(page, encoding="utf-8", errors="replace")
    click.echo(f"run {run}: {file.resolve()} ({len(page) / 1000:,.0f} kB)")


COMMAND = report
