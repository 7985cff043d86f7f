"""The data card of an export: what is in it, what is not, and where every row came from."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import charter

if TYPE_CHECKING:
    from charter.dataset import Choice, Counted
    from engine.store import Store

LIMIT_S = 60.0
NONE = "None: people's data alone."
MARK = "charter-export"  # a tag of the card: --force replaces no folder without it

# Why a chain or a label that was made is in no training view.
LEFT_OUT = {
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
CHAINS = {
    "sft": "SELECT response_id, run_id FROM revision_chains WHERE {where}",
    "preference": """SELECT response_id, run_id FROM revision_chains
        WHERE record_id IN (SELECT parent_ids[1] FROM preferences WHERE label_source = 'AI' AND {where})""",
}
ANSWERS = {
    "sft": "SELECT response_id FROM revision_chains WHERE {where}",
    "preference": "SELECT response_id FROM preferences WHERE {where}",
}
JUDGES = """UNION ALL SELECT stage, model, count(*), 4 FROM preferences WHERE label_source = 'AI' AND {where} GROUP BY ALL"""
MODELS = """
    WITH chains AS ({chains})
    SELECT stage, model.id || CASE WHEN model.revision = '' THEN '' ELSE ' (' || model.revision || ')' END AS model, records
    FROM (
        SELECT stage, model, count(*) AS records, 1 AS place FROM responses WHERE record_id IN ({answers}) GROUP BY ALL
        UNION ALL SELECT stage, model, count(*), 2 FROM critiques WHERE (response_id, run_id) IN (FROM chains) GROUP BY ALL
        UNION ALL SELECT stage, model, count(*), 3 FROM revisions WHERE (response_id, run_id) IN (FROM chains) GROUP BY ALL
        {judges})
    WHERE model IS NOT NULL ORDER BY place, 2"""
PRESETS = """
    SELECT preset, outcome, count(*) AS labels FROM preferences WHERE label_source = 'AI' AND {where}
    GROUP BY ALL ORDER BY ALL"""


def table(columns: list[str], rows: list[Any]) -> str:
    lines = [" | ".join(columns), " | ".join("---" for _ in columns), *(" | ".join(map(cell, row)) for row in rows)]
    return "\n".join(f"| {line} |" for line in lines)


def cell(value: object) -> str:
    """A value that stays in its cell: what a name says is data, not markup."""
    text = " ".join(str(value).split())
    return "".join(f"\\{c}" if c in "|\\`*_[]<>" else c for c in text)


def front_matter(form: str, files: dict[str, str]) -> str:
    """What the hub and `datasets` read: which file is which split."""
    names = {"train": "train", "eval": "test"}
    lines = [f"  - split: {names[split]}\n    path: {json.dumps(path)}" for split, path in files.items()]
    head = [
        "---",
        f"pretty_name: Charter {form} data",
        f"tags: [constitutional-ai, synthetic, {MARK}]",
        "configs:",
        "- config_name: default",
    ]
    return "\n".join([*head, "  data_files:", *lines, "---"])


def card(store: Store, form: str, trainer: str, choice: Choice, counts: dict[str, Counted], suffix: str) -> str:
    """README.md of an export."""
    files = {split: f"data/{split}.{suffix}" for split, counted in counts.items() if counted.rows}
    by = sorted((split, *about, rows) for split, counted in counts.items() for about, rows in counted.by.items())
    constitutions = sorted({about for counted in counts.values() for about in counted.constitutions})
    versions = sorted({v for counted in counts.values() for v in counted.policies if v is not None})
    runs = sorted({run for counted in counts.values() for run in counted.runs})
    times = [time for counted in counts.values() for time in (counted.first, counted.last) if time]
    parts = [
        front_matter(form, files),
        f"# {form.upper() if form != 'preference' else 'Preference'} data of Charter {charter.__version__}",
        f"For TRL's {trainer}. Made by a stream of Constitutional AI: {about_form(form)}",
        f"Rows made from {min(times):%Y-%m-%d %H:%M} to {max(times):%Y-%m-%d %H:%M} UTC, runs {', '.join(map(cell, runs))}, up"
        f" to commit {choice.upto} of the database; policy versions {', '.join(map(str, versions)) or 'none'}.",
        "## Rows\n\n" + table(["split", "source of the prompt", "label from", "rows"], by),
        "Prompts are held out by the hash of their text before anything is made of them; no prompt is in both splits.",
        "## Constitutions\n\n" + (table(["constitution", "hash"], constitutions) if constitutions else NONE),
        "## Models\n\n" + models(store, form, choice),
        "## Left out\n\n" + left_out(store, form, choice),
    ]
    if form != "sft":
        parts.append("## Judging\n\n" + table(["preset", "outcome", "labels"], ask(store, PRESETS, choice)))
    parts.append(
        "Prompts may be offensive on purpose, and answers wrong: they are a model's, not a person's, unless the label source"
        " says HUMAN. Each row names its record (`record_id`); `charter show ID` tells its story."
    )
    return "\n\n".join(parts) + "\n"


def ask(store: Store, sql: str, choice: Choice) -> list[tuple[Any, ...]]:
    wanted = {name: value for name, value in choice.parameters.items() if "{where}" in sql}
    return store.query(sql.replace("{where}", f"({choice.where})"), wanted, limit_s=LIMIT_S).rows


def models(store: Store, form: str, choice: Choice) -> str:
    kind = "sft" if form == "sft" else "preference"
    parts = {"chains": CHAINS[kind], "answers": ANSWERS[kind], "judges": "" if form == "sft" else JUDGES}
    sql = MODELS
    for name, part in parts.items():
        sql = sql.replace(f"{{{name}}}", part)
    found = ask(store, sql, choice)
    return table(["stage", "model", "records"], found) if found else NONE


def left_out(store: Store, form: str, choice: Choice) -> str:
    found = [row for row in ask(store, LEFT_OUT["sft" if form == "sft" else "preference"], choice) if row[1]]
    return table(["why", "records"], found) if found else "Nothing."


def about_form(form: str) -> str:
    return {
        "sft": "the final text of each chain of critique and revision, and people's demonstrations.",
        "preference": "pairs of answers under principles; `p_chosen` is the probability that the chosen answer is better.",
        "kto": "answers that won or lost their comparison; `p_better` is the probability that the answer is the better one.",
    }[form]
