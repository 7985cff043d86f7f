"""Report how often the judge and the graders agree with the labels of contrast pairs (`judge.pairing = "contrast"`)."""

from __future__ import annotations

from typing import Any

from engine.store import Store

_STATS_SQL = """
    SELECT constitution, source, name, pairs, decided, agreed, agreement, agreement_low, agreement_high
    FROM contrast_stats WHERE run_id = ? ORDER BY source DESC, name, constitution"""
_COUNT_SQL = "SELECT count(*) FROM preferences WHERE label_source = 'CONTRAST' AND outcome = 'OK' AND run_id = ?"


def read_contrast_agreement(store: Store, run_id: str) -> dict[str, Any]:
    """Return the number of labels of contrast pairs of a run, and the rows of the view `contrast_stats`."""
    ((count,),) = store.query(_COUNT_SQL, [run_id]).rows
    return {"pairs": count, "agreement": store.query_dicts(_STATS_SQL, [run_id]) if count else []}


def format_contrast_agreement(contrast: dict[str, Any]) -> list[str]:
    """Return the agreement as lines. Return no lines for a run without contrast pairs."""
    if not contrast["pairs"]:
        return []
    lines = [f"contrast pairs: {contrast['pairs']:,}"]
    for row in contrast["agreement"]:
        verb = "prefers" if row["source"] == "judge" else "has a higher score for"
        share = ""
        if row["decided"]:
            share = f" ({row['agreement']:.0%}, 95 % interval {row['agreement_low']:.0%} to {row['agreement_high']:.0%})"
        lines.append(
            f"  {row['source']} {row['name']} {verb} the completion with the constitution in {row['agreed']} of {row['decided']}"
            f" decided pairs{share}"
        )
    if not contrast["agreement"]:
        lines.append("  neither the judge nor a grader has compared them (contrast.ask_judge, grade.subjects)")
    return lines
