"""`charter report`: one run as one HTML file that needs nothing else, for sending to a colleague.

It shows what the dashboard shows, from the same questions and the same parts, without script or server. Each section asks the
database in a hold of its own, cut at the read limit; a section that cannot be read says why in its place.
"""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from charter.options import common, json_option

if TYPE_CHECKING:
    from engine.settings import Settings
    from engine.store import Ask, Store

SAMPLES = 5
LONGEST_TEXT = 4_000  # characters of one text in the file


@click.command()
@click.argument("file", metavar="[FILE]", type=click.Path(path_type=Path), default=Path("charter-report.html"))
@click.option("--stories", "samples", default=SAMPLES, show_default=True, type=click.IntRange(0, 100), help="Story samples.")
@json_option
@common
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
    from charter.dashboard.app import told
    from charter.dashboard.page import plain
    from charter.pipeline import store_of
    from charter.text import json_text

    store = store_of(settings)
    run = chosen_run(store, settings.run.id if origins["run.id"] != "default" else "")
    found = sections(store, run, samples)
    if as_json:
        shown = {name: look.data if look.trouble is None else {"trouble": told(look.trouble)} for name, look in found.items()}
        click.echo(json_text(plain({"run": run, **shown})))
        return
    page = written(run, found)
    if str(file) == "-":
        click.echo(page)
        return
    file.write_text(page, encoding="utf-8", errors="replace")
    click.echo(f"run {run}: {file.resolve()} ({len(page) / 1000:,.0f} kB)")


def chosen_run(store: Store, wanted: str) -> str:
    """The run that is asked for, or the newest; raises UsageError when it is not there."""
    from charter.dashboard.runs import names
    from engine.errors import UsageError

    with store.reading() as ask:
        known: list[str] = names(ask)["runs"]
    if not known:
        raise UsageError(
            f"there is no run in {store.path} yet", "a run begins with its first stage", "type: charter demo    or: charter run"
        )
    if wanted and wanted not in known:
        raise UsageError(f"there is no run {wanted}", f"the database has: {', '.join(known)}", "type: charter runs")
    return wanted or known[0]


def sections(store: Store, run: str, samples: int) -> dict[str, Any]:
    """Section -> what the database says, or why it does not (a `Look`)."""
    from charter.dashboard import pipeline, preferences, runs, training
    from charter.dashboard.desk import Desk

    desk = Desk(store)
    return {
        "counts": desk.once(lambda ask: pipeline.gather(ask, run)),
        "policies": desk.once(lambda ask: {"policies": training.policies(ask, run)}),
        "pairs": desk.once(lambda ask: {"pairs": before_and_after(ask, run)}),
        "preferences": desk.once(lambda ask: preferences.gather(ask, run)),
        "training": desk.once(lambda ask: training.gather(ask, run)),
        "stories": desk.once(lambda ask: {"stories": sampled(ask, run, samples)}),
        "card": desk.once(lambda ask: runs.card(ask, run, {})),
    }


def before_and_after(ask: Ask, run: str) -> list[dict[str, Any]]:
    """Prompts that the run's first and its newest policy have both answered, with the first answer of each."""
    sql = """WITH ours AS (SELECT messages, policy_version, completions[1].text AS answer FROM responses WHERE run_id = $run),
                  ends AS (SELECT min(policy_version) AS first, max(policy_version) AS last FROM ours)
             SELECT DISTINCT ON (one.messages) one.messages[-1].content AS prompt, one.policy_version AS before_version,
                    one.answer AS before, two.policy_version AS after_version, two.answer AS after
             FROM ours one JOIN ours two USING (messages), ends
             WHERE first < last AND one.policy_version = first AND two.policy_version = last ORDER BY hash(one.messages)"""
    return ask(sql, {"run": run}, 3).records()


def sampled(ask: Ask, run: str, samples: int) -> list[dict[str, Any]]:
    """Stories of prompts whose chain has ended and that were judged: as if drawn by lot, the same ones each time."""
    from charter.dashboard.stories import story

    sql = """SELECT prompt_id FROM revision_chains WHERE run_id = ? AND prompt_id IN (SELECT prompt_id FROM preferences)
             GROUP BY 1 ORDER BY hash(prompt_id::VARCHAR), 1"""
    return [story(ask, str(prompt)) for (prompt,) in ask(sql, [run], samples).rows] if samples else []


def written(run: str, found: dict[str, Any]) -> str:
    """The report as HTML."""
    from markupsafe import Markup

    import charter
    from charter.dashboard.app import STATIC, told
    from charter.dashboard.page import environment, inert, plain

    pages = environment()
    pages.filters["inert"] = lambda value, most=LONGEST_TEXT: inert(value, most)
    style = Markup((STATIC / "charter.css").read_text(encoding="utf-8"))
    return pages.get_template("report.html").render(
        run=run,
        made=plain(datetime.now(UTC).replace(tzinfo=None)),
        version=charter.__version__,
        style=style,
        troubles={name: told(look.trouble) for name, look in found.items() if look.trouble},
        **{name: plain(look.data) for name, look in found.items()},
    )


VERBS = (report,)
