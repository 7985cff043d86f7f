"""Write the dataset card of an export. The card describes the rows, the excluded records and the origin of the rows."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pyarrow as pa

import charter
from charter.export.selection import UNCERTAIN_MARGIN, ExportSelection, SplitStats
from charter.label_quality import TIE_MARGIN, LabelQuality, judge_labels, read_label_quality
from engine.settings import LabelQualitySettings
from engine.store import QueryFunction

_TITLES = {
    "sft": "SFT data",
    "openai": "Conversations",
    "preference": "Preference data",
    "contrast": "Contrast pairs",
    "kto": "KTO data",
    "prompts": "Prompts",
}
_HUMAN_DATA_ONLY = "None: all rows are human data."
_NO_RESPONSES = "None: the rows are prompts without responses."
EXPORT_TAG = "charter-export"  # --force replaces only a folder whose card has this tag

# The kind of the records that the rows of each format come from.
_KINDS = {
    "sft": "sft",
    "openai": "sft",
    "preference": "preference",
    "contrast": "preference",
    "kto": "preference",
    "prompts": "prompts",
}
# The reasons why a chain, a label or a prompt is not in a training view.
_EXCLUDED_SQL = {
    "sft": """
        SELECT 'chain ended ' || end_reason || CASE WHEN rejection_reason = 'NONE' THEN '' ELSE ': ' || rejection_reason END AS reason,
               count(*) AS records
        FROM revision_chains
        WHERE end_reason NOT IN ('SATISFIED', 'LAST_ROUND', 'LOST', 'SKIPPED') AND {where} GROUP BY 1
        UNION ALL
        SELECT 'prompt is in both splits', count(*) FROM trainable_responses u
        WHERE {where} AND record_id NOT IN (SELECT record_id FROM sft_examples)
          AND record_id NOT IN (SELECT record_id FROM held_out_examples)
        ORDER BY 2 DESC""",
    "preference": """
        SELECT CASE label_source WHEN 'HUMAN' THEN 'a person' WHEN 'CONTRAST' THEN 'contrast pair' ELSE 'judge' END || ' gave no label: ' || outcome AS reason,
               count(*) AS records
        FROM preferences
        WHERE (outcome <> 'OK' OR p_a IS NULL) AND outcome NOT IN ('EMPTY', 'WITHHELD', 'REASONING', 'IDENTICAL') AND {where} GROUP BY 1
        UNION ALL
        SELECT 'pair cannot be compared: ' || outcome, count(*) FROM preferences
        WHERE outcome IN ('EMPTY', 'WITHHELD', 'REASONING', 'IDENTICAL') AND {where} GROUP BY 1
        UNION ALL
        SELECT 'pair cannot be compared: ' || exclusion_reason, count(*) FROM preference_labels
        WHERE exclusion_reason IS NOT NULL AND {where} GROUP BY 1
        UNION ALL
        SELECT 'tie: no response is preferred', count(*) FROM preference_labels
        WHERE p_a = 0.5 AND overridden_by IS NULL AND exclusion_reason IS NULL AND {where}
        UNION ALL
        SELECT 'replaced by a human label', count(*) FROM preference_labels
        WHERE overridden_by IS NOT NULL AND exclusion_reason IS NULL AND {where}
        UNION ALL
        SELECT 'contrast pair of a replay: the first record of the pair counts', count(*) FROM preference_labels
        WHERE {is_exported} AND {where} AND record_id IN (SELECT record_id FROM repeated_contrast_pairs)
        UNION ALL
        SELECT '{other_pairs}', count(*) FROM preference_labels
        WHERE overridden_by IS NULL AND exclusion_reason IS NULL AND {where} AND NOT {is_exported}
        UNION ALL
        SELECT 'prompt is in both splits', count(*) FROM preference_labels
        WHERE overridden_by IS NULL AND exclusion_reason IS NULL AND {where}
          AND {is_exported} AND record_id NOT IN (SELECT record_id FROM training_pairs)
          AND record_id NOT IN (SELECT record_id FROM repeated_contrast_pairs)
          AND record_id NOT IN (SELECT record_id FROM held_out_pairs)
        ORDER BY 2 DESC""",
    "prompts": """
        SELECT 'prompt of an evaluation suite' AS reason, count(*) FROM prompts WHERE split = 'SUITE' AND {where}
        UNION ALL
        SELECT 'prompt is in both splits', count(*) FROM prompts
        WHERE {where} AND ((split = 'TRAIN' AND prompt_id IN (SELECT prompt_id FROM held_out_prompts))
                           OR (split = 'EVAL' AND prompt_id IN (SELECT prompt_id FROM trained_prompts)))""",
}
# Selects the models that made the rows. Responses are selected by id and not by run, because a replay of the judge stage labels
# the responses of another run.
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
        SELECT stage, model, count(*) AS records, 1 AS stage_order FROM responses WHERE record_id IN ({responses}) GROUP BY ALL
        UNION ALL SELECT stage, model, count(*), 2 FROM critiques WHERE (response_id, run_id) IN (FROM chains) GROUP BY ALL
        UNION ALL SELECT stage, model, count(*), 3 FROM revisions WHERE (response_id, run_id) IN (FROM chains) GROUP BY ALL
        {judges})
    WHERE model IS NOT NULL ORDER BY stage_order, 2"""
_REJECTED_FLIPS_SQL = "SELECT count(*) FROM preferences WHERE outcome = 'POSITION_FLIP' AND split = 'TRAIN' AND {where}"
_PRESETS_SQL = """
    SELECT preset, outcome, count(*) AS labels FROM preferences WHERE label_source = 'AI' AND {where}
    GROUP BY ALL ORDER BY ALL"""


def _format_markdown_table(columns: list[str], rows: list[Any]) -> str:
    lines = [" | ".join(columns), " | ".join("---" for _ in columns), *(" | ".join(map(_escape_cell, row)) for row in rows)]
    return "\n".join(f"| {line} |" for line in lines)


def _escape_cell(value: object) -> str:
    """Return a value as one line. Escape Markdown characters, because names come from data files and can contain them."""
    text = " ".join(str(value).split())
    return "".join(f"\\{c}" if c in "|\\`*_[]<>" else c for c in text)


def _format_front_matter(
    format_name: str, files: dict[str, str], content_hashes: dict[str, str], columns: Mapping[str, pa.DataType]
) -> str:
    """Return the YAML front matter. The Hugging Face hub and `datasets` find the file of each split in the front matter.

    The front matter also declares the type of each column. Otherwise `datasets` infers the types of JSON lines from the first
    split, and it cannot load another split in which a column is no longer null.

    The description has the hashes of the files. `datasets` finds its cache by the name of the folder and these lines, and not by
    the content of the files. Without the hashes it would load the rows of an earlier export, or of another folder of this name.
    """
    names = {"train": "train", "eval": "test"}
    lines = [f"  - split: {names[split]}\n    path: {json.dumps(path)}" for split, path in files.items()]
    header = [
        "---",
        f"pretty_name: Charter {format_name} data",
        f"tags: [constitutional-ai, synthetic, {EXPORT_TAG}]",
        "configs:",
        "- config_name: default",
        f"  description: {json.dumps(', '.join(f'{split} sha256 {content_hashes[split]}' for split in files))}",
    ]
    features = [line for name, arrow_type in columns.items() for line in _format_feature(name, arrow_type, "  ")]
    return "\n".join([*header, "  data_files:", *lines, "dataset_info:", "  features:", *features, "---"])


def _format_feature(name: str, arrow_type: pa.DataType, indent: str) -> list[str]:
    """Return the YAML lines that declare a column for `datasets`."""
    if pa.types.is_list(arrow_type):
        fields = [line for field in arrow_type.value_type for line in _format_feature(field.name, field.type, f"{indent}  ")]
        return [f"{indent}- name: {name}", f"{indent}  list:", *fields]
    dtype = {pa.float64(): "float64"}.get(arrow_type, str(arrow_type))  # Arrow's own name is double
    return [f"{indent}- name: {name}", f"{indent}  dtype: {dtype}"]


def format_dataset_card(
    query: QueryFunction,
    format_name: str,
    trainer: str,
    columns: Mapping[str, pa.DataType],
    selection: ExportSelection,
    split_stats: dict[str, SplitStats],
    suffix: str,
    limits: LabelQualitySettings,
    excluded: list[tuple[str, int]],
) -> str:
    """Return the contents of the README.md of an export.

    `columns` are the columns of its files. `excluded` has the reasons why records are not exported, and the number of records.
    """
    files = {split: f"data/{split}.{suffix}" for split, stats in split_stats.items() if stats.num_rows}
    all_stats = split_stats.values()
    row_counts = sorted(
        (split, *source, count) for split, stats in split_stats.items() for source, count in stats.rows_by_source.items()
    )
    constitutions = sorted({constitution for stats in all_stats for constitution in stats.constitutions})
    versions = sorted({version for stats in all_stats for version in stats.policy_versions if version is not None})
    runs = sorted({run for stats in all_stats for run in stats.run_ids})
    times = [time for stats in all_stats for time in (stats.first_created_at, stats.last_created_at) if time]
    parts = [
        _format_front_matter(format_name, files, {split: stats.content_hash for split, stats in split_stats.items()}, columns),
        f"# {_TITLES[format_name]} of Charter {charter.__version__}",
        f"For {trainer}. Made by a Constitutional AI pipeline: {_describe_format(format_name)}",
        f"Rows created from {min(times):%Y-%m-%d %H:%M} to {max(times):%Y-%m-%d %H:%M} UTC, runs {', '.join(map(_escape_cell, runs))}, up"
        f" to commit {selection.max_commit_seq} of the database; policy versions {', '.join(map(str, versions)) or 'none'}.",
        "## Rows\n\n" + _format_markdown_table(["split", "prompt source", "label source", "rows"], row_counts),
        "A hash of the prompt decides, before all stages, whether the prompt is held out. No prompt is in both splits.",
        "## Constitutions\n\n"
        + (
            _format_markdown_table(["constitution", "hash"], constitutions)
            if constitutions
            else _explain_no_models(format_name)
        ),
        "## Models\n\n" + _format_models(query, format_name, selection),
        "## Excluded records\n\n" + (_format_markdown_table(["reason", "records"], excluded) if excluded else "None."),
    ]
    if _KINDS[format_name] == "preference":
        parts.append("## Label certainty\n\n" + _format_certainty(selection, split_stats))
        parts.append("## Can I train on this?\n\n" + _format_verdict(query, selection, split_stats, limits))
        parts.append(
            "## Judge outcomes\n\n"
            + _format_markdown_table(["preset", "outcome", "labels"], _query_selection(query, _PRESETS_SQL, selection))
        )
    parts.append(
        "Prompts may be offensive on purpose, and responses may be wrong. Responses and labels come from models unless the label"
        " source is HUMAN. `charter show RECORD_ID` shows the trace of a row's prompt."
    )
    return "\n\n".join(parts) + "\n"


def _query_selection(query: QueryFunction, sql: str, selection: ExportSelection) -> list[tuple[Any, ...]]:
    parameters = selection.parameters if "{where}" in sql else {}
    return query(sql.replace("{where}", f"({selection.where_clause})"), parameters).rows


def _format_models(query: QueryFunction, format_name: str, selection: ExportSelection) -> str:
    kind = _KINDS[format_name]
    if kind == "prompts":
        return _NO_RESPONSES
    parts = {
        "chains": _CHAINS_SQL[kind],
        "responses": _RESPONSES_SQL[kind],
        "judges": _JUDGES_SQL if kind == "preference" else "",
    }
    sql = _MODELS_SQL
    for name, part in parts.items():
        sql = sql.replace(f"{{{name}}}", part)
    rows = _query_selection(query, sql, selection)
    return _format_markdown_table(["stage", "model", "records"], rows) if rows else _HUMAN_DATA_ONLY


def _explain_no_models(format_name: str) -> str:
    return _NO_RESPONSES if _KINDS[format_name] == "prompts" else _HUMAN_DATA_ONLY


def _format_certainty(selection: ExportSelection, split_stats: dict[str, SplitStats]) -> str:
    """Return the margins and the rate of position flips of the exported labels."""
    rows = []
    for split, stats in split_stats.items():
        margins = sorted(stats.margins)
        if not margins:
            continue
        quantiles = [f"{margins[round(share * (len(margins) - 1))]:.3f}" for share in (0.1, 0.5, 0.9)]
        flip_rate = f"{stats.num_flips / stats.num_both_orders:.1%}" if stats.num_both_orders else "-"
        rows.append((split, len(margins), *quantiles, stats.num_uncertain, stats.num_both_orders, stats.num_flips, flip_rate))
    left_out = (
        f" Labels with a margin below {selection.min_margin:g} are left out (`--min-margin`)." if selection.min_margin else ""
    )
    columns = [
        "split",
        "labels",
        "margin: 10 %",
        "median",
        "90 %",
        f"below {UNCERTAIN_MARGIN}",
        "both orders",
        "flips",
        "flip rate",
    ]
    return (
        "The margin of a label is |p - 0.5|, where p is the probability that one response is better. A label with a small margin"
        " is nearly a tie, and a trainer that uses only the sign treats it as certain."
        f" Labels that flip with the order of the responses are {'left out' if selection.excludes_flips else 'included'} (`--no-flips`)."
        f"{left_out}"
        " A flip means that the judge saw the pair in both orders and preferred the same position in both."
        " Labels of people have no orders.\n\n" + _format_markdown_table(columns, rows)
    )


def _format_verdict(
    query: QueryFunction, selection: ExportSelection, split_stats: dict[str, SplitStats], limits: LabelQualitySettings
) -> str:
    """Return the verdict on the labels of the split train. Flips that were left out count, because they show the judge's bias."""
    stats = split_stats.get("train", SplitStats())
    num_flips = stats.num_flips_left_out + _query_selection(query, _REJECTED_FLIPS_SQL, selection)[0][0]
    all_labels = read_label_quality(query)
    quality = LabelQuality(
        labels=len(stats.margins),
        both_orders=stats.num_both_orders + num_flips,
        flips=stats.num_flips + num_flips,
        uncertain=stats.count_margins(TIE_MARGIN),
        compared=all_labels.compared,
        agreed=all_labels.agreed,
        agreement_low=all_labels.agreement_low,
    )
    return _escape_cell(judge_labels(quality, limits))


def list_excluded(query: QueryFunction, format_name: str, selection: ExportSelection) -> list[tuple[str, int]]:
    """Return the reasons why records are in no training view, and the number of records of each reason."""
    sql = _EXCLUDED_SQL[_KINDS[format_name]]
    is_contrast = format_name == "contrast"
    other = "label of a judge or a person: export preference" if is_contrast else "contrast pair: export contrast"
    sql = sql.replace("{other_pairs}", other).replace(
        "{is_exported}", f"(label_source {'=' if is_contrast else '<>'} 'CONTRAST')"
    )
    return [(reason, count) for reason, count in _query_selection(query, sql, selection) if count]


def list_left_out(selection: ExportSelection, split_stats: dict[str, SplitStats]) -> list[tuple[str, int]]:
    """Return the reasons why the options of the export leave out labels, and the number of labels of each reason."""
    num_below = sum(stats.num_below_margin for stats in split_stats.values())
    rows = [(f"margin below {selection.min_margin:g}: nearly a tie", num_below)] if num_below else []
    num_flips = sum(stats.num_flips_left_out for stats in split_stats.values())
    rows += [("the label flips with the order of the responses", num_flips)] if num_flips else []
    return rows


def _describe_format(format_name: str) -> str:
    return {
        "sft": "the final response of each revision chain, and human demonstrations.",
        "preference": "pairs of responses judged by principles; `p_chosen` is the probability that the chosen response is better.",
        "openai": "the same conversations as sft, with the response as the last message. OpenAI's format allows no other columns.",
        "prompts": "the prompts alone, each once.",
        "contrast": "pairs of a response that was sampled with the constitution in its prompt (chosen), and one that was not (rejected).",
        "kto": "responses that were preferred or not; `p_better` is the probability that the response is the better one of its pair.",
    }[format_name]
