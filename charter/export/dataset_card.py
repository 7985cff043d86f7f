"""The data card of an export: what is in it, what is not, and where every row came from."""

from __future__ import annotations

import json
from typing import Any

import charter
from charter.export.selection import ExportSelection, SplitStats
from engine.store import Store

_QUERY_TIMEOUT_S = 60.0
_HUMAN_DATA_ONLY = "None: people's data alone."
EXPORT_TAG = "charter-export"  # a tag of the card: --force replaces no folder without it

# Why a chain or a label that was made is in no training view.
_EXCLUDED_SQL = {
    "sft": """
        SELECT 'chain ended ' || end_reason AS reason, count(*) AS records FROM revision_chains
        WHERE end_reason NOT IN ('SATISFIED', 'LAST_ROUND', 'LOST', 'SKIPPED') AND {where} GROUP BY 1
        UNION ALL
        SELECT 'prompt is both trained on and held out', count(*) FROM trainable_responses u
        WHERE {where} AND record_id NOT IN (SELECT record_id FROM sft_examples)
          AND record_id NOT IN (SELECT record_id FROM held_out_examples)
        ORDER BY 2 DESC""",
    "preference": """
        SELECT 'judge gave no label: ' || outcome AS reason, count(*) AS records FROM preferences
        WHERE (outcome <> 'OK' OR p_a IS NULL) AND {where} GROUP BY 1
        UNION ALL
        SELECT 'no answer is preferred', count(*) FROM preference_labels WHERE p_a = 0.5 AND overridden_by IS NULL AND {where}
        UNION ALL
        SELECT 'a person''s label stands instead', count(*) FROM preference_labels WHERE overridden_by IS NOT NULL AND {where}
        UNION ALL
        SELECT 'prompt is both trained on and held out', count(*) FROM preference_labels
        WHERE overridden_by IS NULL AND {where} AND record_id NOT IN (SELECT record_id FROM preference_pairs)
          AND record_id NOT IN (SELECT record_id FROM held_out_pairs)
        ORDER BY 2 DESC""",
}
# The models that the rows came from: those of each chain, or of the answers that were compared and of what became of them.
# A run that judges old answers anew has no answers of its own.
_CHAINS_SQL = {
    "sft": "SELECT response_id, run_id FROM revision_chains WHERE {where}",
    "preference": """SELECT response_id, run_id FROM revision_chains
        WHERE record_id IN (SELECT parent_ids[1] FROM preferences WHERE label_source = 'AI' AND {where})""",
}
_RESPONSES_SQL = {
    "sft": "SELECT response_id FROM revision_chains WHERE {where}",
    "preference": "SELECT response_id FROM preferences WHERE {where}",
}
_JUDGES_SQL = (
    """UNION ALL SELECT stage, model, count(*), 4 FROM preferences WHERE label_source = 'AI' AND {where} GROUP BY ALL"""
)
_MODELS_SQL = """
    WITH chains AS ({chains})
    SELECT stage, model.id || CASE WHEN model.revision = '' THEN '' ELSE ' (' || model.revision || ')' END AS model, records
    FROM (
        SELECT stage, model, count(*) AS records, 1 AS place FROM responses WHERE record_id IN ({answers}) GROUP BY ALL
        UNION ALL SELECT stage, model, count(*), 2 FROM critiques WHERE (response_id, run_id) IN (FROM chains) GROUP BY ALL
        UNION ALL SELECT stage, model, count(*), 3 FROM revisions WHERE (response_id, run_id) IN (FROM chains) GROUP BY ALL
        {judges})
    WHERE model IS NOT NULL ORDER BY place, 2"""
_PRESETS_SQL = """
    SELECT preset, outcome, count(*) AS labels FROM preferences WHERE label_source = 'AI' AND {where}
    GROUP BY ALL ORDER BY ALL"""


def _format_markdown_table(columns: list[str], rows: list[Any]) -> str:
    lines = [" | ".join(columns), " | ".join("---" for _ in columns), *(" | ".join(map(_escape_cell, row)) for row in rows)]
    return "\n".join(f"| {line} |" for line in lines)


def _escape_cell(value: object) -> str:
    """A value that stays in its cell: what a name says is data, not markup."""
    text = " ".join(str(value).split())
    return "".join(f"\\{c}" if c in "|\\`*_[]<>" else c for c in text)


def _format_front_matter(format_name: str, files: dict[str, str]) -> str:
    """What the hub and `datasets` read: which file is which split."""
    names = {"train": "train", "eval": "test"}
    lines = [f"  - split: {names[split]}\n    path: {json.dumps(path)}" for split, path in files.items()]
    head = [
        "---",
        f"pretty_name: Charter {format_name} data",
        f"tags: [constitutional-ai, synthetic, {EXPORT_TAG}]",
        "configs:",
        "- config_name: default",
    ]
    return "\n".join([*head, "  data_files:", *lines, "---"])


def format_dataset_card(
    store: Store, format_name: str, trainer: str, selection: ExportSelection, split_stats: dict[str, SplitStats], suffix: str
) -> str:
    """README.md of an export."""
    files = {split: f"data/{split}.{suffix}" for split, counted in split_stats.items() if counted.num_rows}
    by = sorted(
        (split, *about, rows) for split, counted in split_stats.items() for about, rows in counted.rows_by_source.items()
    )
    constitutions = sorted({about for counted in split_stats.values() for about in counted.constitutions})
    versions = sorted({v for counted in split_stats.values() for v in counted.policy_versions if v is not None})
    runs = sorted({run for counted in split_stats.values() for run in counted.run_ids})
    times = [time for counted in split_stats.values() for time in (counted.first_created_at, counted.last_created_at) if time]
    parts = [
        _format_front_matter(format_name, files),
        f"# {format_name.upper() if format_name != 'preference' else 'Preference'} data of Charter {charter.__version__}",
        f"For TRL's {trainer}. Made by a stream of Constitutional AI: {_describe_format(format_name)}",
        f"Rows made from {min(times):%Y-%m-%d %H:%M} to {max(times):%Y-%m-%d %H:%M} UTC, runs {', '.join(map(_escape_cell, runs))}, up"
        f" to commit {selection.max_commit_seq} of the database; policy versions {', '.join(map(str, versions)) or 'none'}.",
        "## Rows\n\n" + _format_markdown_table(["split", "source of the prompt", "label from", "rows"], by),
        "Prompts are held out by the hash of their text before anything is made of them; no prompt is in both splits.",
        "## Constitutions\n\n"
        + (_format_markdown_table(["constitution", "hash"], constitutions) if constitutions else _HUMAN_DATA_ONLY),
        "## Models\n\n" + _format_models(store, format_name, selection),
        "## Left out\n\n" + _format_excluded(store, format_name, selection),
    ]
    if format_name != "sft":
        parts.append(
            "## Judging\n\n"
            + _format_markdown_table(["preset", "outcome", "labels"], _query_selection(store, _PRESETS_SQL, selection))
        )
    parts.append(
        "Prompts may be offensive on purpose, and answers wrong: they are a model's, not a person's, unless the label source"
        " says HUMAN. Each row names its record (`record_id`); `charter show ID` tells its story."
    )
    return "\n\n".join(parts) + "\n"


def _query_selection(store: Store, sql: str, selection: ExportSelection) -> list[tuple[Any, ...]]:
    wanted = {name: value for name, value in selection.parameters.items() if "{where}" in sql}
    return store.query(sql.replace("{where}", f"({selection.where_clause})"), wanted, limit_s=_QUERY_TIMEOUT_S).rows


def _format_models(store: Store, format_name: str, selection: ExportSelection) -> str:
    kind = "sft" if format_name == "sft" else "preference"
    parts = {
        "chains": _CHAINS_SQL[kind],
        "answers": _RESPONSES_SQL[kind],
        "judges": "" if format_name == "sft" else _JUDGES_SQL,
    }
    sql = _MODELS_SQL
    for name, part in parts.items():
        sql = sql.replace(f"{{{name}}}", part)
    found = _query_selection(store, sql, selection)
    return _format_markdown_table(["stage", "model", "records"], found) if found else _HUMAN_DATA_ONLY


def _format_excluded(store: Store, format_name: str, selection: ExportSelection) -> str:
    found = [
        row
        for row in _query_selection(store, _EXCLUDED_SQL["sft" if format_name == "sft" else "preference"], selection)
        if row[1]
    ]
    return _format_markdown_table(["why", "records"], found) if found else "Nothing."


def _describe_format(format_name: str) -> str:
    return {
        "sft": "the final text of each chain of critique and revision, and people's demonstrations.",
        "preference": "pairs of answers under principles; `p_chosen` is the probability that the chosen answer is better.",
        "kto": "answers that won or lost their comparison; `p_better` is the probability that the answer is the better one.",
    }[format_name]
