"""`charter report`: one run as one HTML file that needs nothing else, for sending to a colleague.

It shows what the dashboard shows, from the same questions and the same parts, without script or server. Each section asks the
database in a hold of its own, cut at the read limit; a section that cannot be read says why in its place.
"""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from charter.console import common_options, json_option

if TYPE_CHECKING:
    from engine.settings import Settings
    from engine.store import QueryFunction, Store

_DEFAULT_SAMPLES = 5
_MAX_TEXT_CHARS = 4_000  # characters of one text in the file


@click.command()
@click.argument("file", metavar="[FILE]", type=click.Path(path_type=Path), default=Path("charter-report.html"))
@click.option(
    "--stories", "samples", default=_DEFAULT_SAMPLES, show_default=True, type=click.IntRange(0, 100), help="Story samples."
)
@json_option
@common_options
def report(settings: Settings, origins: dict[str, str], file: Path, samples: int, as_json: bool) -> None:
    """Write a run into one HTML file.

    It has counts, before and after, principles, curves of reward and KL, story samples, and what the run is made of. It is
    about the newest run, or --run. FILE is charter-report.html if it is not given; - is standard output.

    \b
    Examples:
      charter report
      charter report --run live --stories 10 live.html
      charter report --json | jq .policies
    """
    from charter.connect import open_store
    from charter.dashboard.app import error_to_dict
    from charter.dashboard.rendering import to_json_value
    from charter.text import format_json

    store = open_store(settings)
    run = _resolve_run(store, settings.run.id if origins["run.id"] != "default" else "")
    found = _load_sections(store, run, samples)
    if as_json:
        shown = {
            name: look.data if look.error is None else {"trouble": error_to_dict(look.error)} for name, look in found.items()
        }
        click.echo(format_json(to_json_value({"run": run, **shown})))
        return
    page = _render_html(run, found)
    if str(file) == "-":
        click.echo(page)
        return
    file.write_text(page, encoding="utf-8", errors="replace")
    click.echo(f"run {run}: {file.resolve()} ({len(page) / 1000:,.0f} kB)")


def _resolve_run(store: Store, run_id: str) -> str:
    """The run that is asked for, or the newest; raises UsageError when it is not there."""
    from charter.dashboard.runs_view import load_run_ids
    from engine.errors import UsageError

    with store.open_read_session() as ask:
        known: list[str] = load_run_ids(ask)["runs"]
    if not known:
        raise UsageError(
            f"there is no run in {store.path} yet", "a run begins with its first stage", "type: charter demo    or: charter run"
        )
    if run_id and run_id not in known:
        raise UsageError(f"there is no run {run_id}", f"the database has: {', '.join(known)}", "type: charter runs")
    return run_id or known[0]


def _load_sections(store: Store, run: str, samples: int) -> dict[str, Any]:
    """Section -> what the database says, or why it does not (a `Look`)."""
    from charter.dashboard import pipeline_view, preferences_view, runs_view, training_view
    from charter.dashboard.query_cache import QueryCache

    desk = QueryCache(store)
    return {
        "counts": desk.run_once(lambda ask: pipeline_view.load_pipeline(ask, run)),
        "policies": desk.run_once(lambda ask: {"policies": training_view.load_policy_stats(ask, run)}),
        "pairs": desk.run_once(lambda ask: {"pairs": _load_before_after_pairs(ask, run)}),
        "preferences": desk.run_once(lambda ask: preferences_view.load_preferences(ask, run)),
        "training": desk.run_once(lambda ask: training_view.load_training(ask, run)),
        "stories": desk.run_once(lambda ask: {"stories": _sample_traces(ask, run, samples)}),
        "card": desk.run_once(lambda ask: runs_view.load_run(ask, run, {})),
    }


def _load_before_after_pairs(ask: QueryFunction, run: str) -> list[dict[str, Any]]:
    """Prompts that the run's first and its newest policy have both answered, with the first answer of each."""
    sql = """WITH ours AS (SELECT messages, policy_version, completions[1].text AS answer FROM responses WHERE run_id = $run),
                  ends AS (SELECT min(policy_version) AS first, max(policy_version) AS last FROM ours)
             SELECT DISTINCT ON (one.messages) one.messages[-1].content AS prompt, one.policy_version AS before_version,
                    one.answer AS before, two.policy_version AS after_version, two.answer AS after
             FROM ours one JOIN ours two USING (messages), ends
             WHERE first < last AND one.policy_version = first AND two.policy_version = last ORDER BY hash(one.messages)"""
    return ask(sql, {"run": run}, 3).to_dicts()


def _sample_traces(ask: QueryFunction, run: str, samples: int) -> list[dict[str, Any]]:
    """Stories of prompts whose chain has ended and that were judged: as if drawn by lot, the same ones each time."""
    from charter.dashboard.traces_view import load_trace

    sql = """SELECT prompt_id FROM revision_chains WHERE run_id = ? AND prompt_id IN (SELECT prompt_id FROM preferences)
             GROUP BY 1 ORDER BY hash(prompt_id::VARCHAR), 1"""
    return [load_trace(ask, str(prompt)) for (prompt,) in ask(sql, [run], samples).rows] if samples else []


def _render_html(run: str, loaded_sections: dict[str, Any]) -> str:
    """The report as HTML."""
    from markupsafe import Markup

    import charter
    from charter.dashboard.app import STATIC_FOLDER, error_to_dict
    from charter.dashboard.rendering import create_template_environment, escape_text, to_json_value

    pages = create_template_environment()
    pages.filters["inert"] = lambda value, most=_MAX_TEXT_CHARS: escape_text(value, most)
    style = Markup((STATIC_FOLDER / "charter.css").read_text(encoding="utf-8"))
    return pages.get_template("report.html").render(
        run=run,
        made=to_json_value(datetime.now(UTC).replace(tzinfo=None)),
        version=charter.__version__,
        style=style,
        troubles={name: error_to_dict(look.error) for name, look in loaded_sections.items() if look.error},
        **{name: to_json_value(look.data) for name, look in loaded_sections.items()},
    )
