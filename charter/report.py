"""Write the report of one run as one HTML file. The file works without scripts or other files, so it can be sent by mail.

The report shows the data of the dashboard, with the same queries and templates. Each section runs its queries in a separate read
session, which ends at the read limit of the store. A section that cannot be read shows its error.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from markupsafe import Markup

import charter
from charter.dashboard import pipeline_view, preferences_view, runs_view, training_view
from charter.dashboard.app import STATIC_FOLDER
from charter.dashboard.query_cache import QueryCache
from charter.dashboard.rendering import create_template_environment, error_to_dict, escape_text, to_json_value
from charter.dashboard.runs_view import load_run_ids
from charter.dashboard.traces_view import load_trace
from charter.label_quality import judge_labels, read_label_quality
from engine.errors import UsageError
from engine.settings import LabelQualitySettings
from engine.store import QueryFunction, Store

_MAX_TEXT_CHARS = 4_000  # maximum length of one text in the report


def resolve_run(store: Store, run_id: str) -> str:
    """Return the requested run, or the newest run if `run_id` is empty. Raise UsageError if there is no such run."""

    with store.open_read_session() as query:
        run_ids: list[str] = load_run_ids(query)["run_ids"]
    if not run_ids:
        raise UsageError(
            f"there is no run in {store.path}",
            "the first stage that starts creates a run",
            "type: charter demo    or: charter run",
        )
    if run_id and run_id not in run_ids:
        raise UsageError(f"there is no run {run_id}", f"the database has: {', '.join(run_ids)}", "type: charter runs")
    return run_id or run_ids[0]


def load_sections(store: Store, run: str, num_traces: int, limits: LabelQualitySettings) -> dict[str, Any]:
    """Return {section: CachedResult}. A result has the data of the section, or the error if the data cannot be read."""

    cache = QueryCache(store)
    return {
        "counts": cache.run_once(lambda query: pipeline_view.load_pipeline(query, run)),
        "labels": cache.run_once(lambda query: {"verdict": str(judge_labels(read_label_quality(query), limits))}),
        "policies": cache.run_once(lambda query: {"policies": training_view.load_policy_stats(query, run)}),
        "pairs": cache.run_once(lambda query: {"pairs": _load_before_after_pairs(query, run)}),
        "preferences": cache.run_once(lambda query: preferences_view.load_preferences(query, run)),
        "training": cache.run_once(lambda query: training_view.load_training(query, run)),
        "traces": cache.run_once(lambda query: {"traces": _sample_traces(query, run, num_traces)}),
        "configuration": cache.run_once(lambda query: runs_view.load_run(query, run, {})),
    }


def _load_before_after_pairs(query: QueryFunction, run: str) -> list[dict[str, Any]]:
    """Return the prompts that the first and the newest policy responded to, with the first completion of each policy."""
    sql = """WITH run_responses AS (SELECT messages, policy_version, completions[1].text AS response FROM responses WHERE run_id = $run),
                  versions AS (SELECT min(policy_version) AS first, max(policy_version) AS last FROM run_responses)
             SELECT DISTINCT ON (one.messages) one.messages[-1].content AS prompt, one.policy_version AS before_version,
                    one.response AS before, two.policy_version AS after_version, two.response AS after
             FROM run_responses one JOIN run_responses two USING (messages), versions
             WHERE first < last AND one.policy_version = first AND two.policy_version = last ORDER BY hash(one.messages)"""
    return query(sql, {"run": run}, 3).to_dicts()


def _sample_traces(query: QueryFunction, run: str, num_traces: int) -> list[dict[str, Any]]:
    """Return the traces of `num_traces` prompts with a revision chain and a judgment.

    The prompts are sorted by the hash of the prompt id. The order looks random, but it is the same in each call.
    """

    sql = """SELECT prompt_id FROM revision_chains WHERE run_id = ? AND prompt_id IN (SELECT prompt_id FROM preferences)
             GROUP BY 1 ORDER BY hash(prompt_id::VARCHAR), 1"""
    return [load_trace(query, str(prompt_id)) for (prompt_id,) in query(sql, [run], num_traces).rows]


def render_html(run: str, sections: dict[str, Any]) -> str:
    """Return the report as HTML."""

    environment = create_template_environment()
    environment.filters["escape_text"] = lambda value, max_length=_MAX_TEXT_CHARS: escape_text(value, max_length)
    style = Markup((STATIC_FOLDER / "charter.css").read_text(encoding="utf-8"))
    return environment.get_template("report.html").render(
        run=run,
        generated_at=to_json_value(datetime.now(UTC).replace(tzinfo=None)),
        version=charter.__version__,
        style=style,
        errors={name: error_to_dict(result.error) for name, result in sections.items() if result.error},
        **{name: to_json_value(result.data) for name, result in sections.items()},
    )
