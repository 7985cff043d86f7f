"""`charter export`: write training data in the formats that TRL, `datasets` and OpenAI read.

An export is a folder in the layout of a Hugging Face dataset: JSON lines or Parquet for each split, and a README.md.

1. One read session of the database selects the commit sequence numbers of the rows, in pages.
2. The rows are read and written page by page. Committed rows do not change, so the pipeline can continue to write.

The time is linear in the number of rows. The memory grows by about 40 bytes per row.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as parquet

from charter.export.dataset_card import EXPORT_TAG, format_dataset_card, list_excluded, list_left_out
from charter.export.selection import UNCERTAIN_MARGIN, ExportSelection, SplitStats
from engine.errors import UsageError
from engine.progress import WorkProgress
from engine.settings import LabelQualitySettings
from engine.store import Store

PAGE_SIZE = 2000
_QUERY_TIMEOUT_S = 60.0
_RowDict = dict[str, Any]

_MESSAGES_TYPE = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
_LINEAGE_COLUMNS = {
    "record_id": pa.string(),
    "prompt_id": pa.string(),
    "run_id": pa.string(),
    "source": pa.string(),
    "label_source": pa.string(),
    "policy_version": pa.int64(),
    "constitution": pa.string(),
    "constitution_hash": pa.string(),
    "principle_id": pa.string(),
    "has_control_markers": pa.bool_(),
    "has_reasoning_marks": pa.bool_(),
    "created_at": pa.timestamp("us"),
}
_PROMPT_LINEAGE_COLUMNS = {
    name: _LINEAGE_COLUMNS[name] for name in ("record_id", "prompt_id", "run_id", "source", "created_at")
}


def _to_assistant_messages(content: str) -> list[_RowDict]:
    return [{"role": "assistant", "content": content}]


def _extract_lineage(row: _RowDict) -> _RowDict:
    """Return the columns that name the record and its origin. A prompt has no constitution, policy or principle."""
    constitution = row.get("constitution")
    values = row | {
        "record_id": str(row["record_id"]),
        "prompt_id": str(row["prompt_id"]),
        "constitution": f"{constitution['name']} {constitution['version']}" if constitution else None,
        "constitution_hash": constitution["hash"] if constitution else None,
    }
    return {name: values.get(name) for name in _LINEAGE_COLUMNS}


def _to_sft_rows(row: _RowDict) -> list[_RowDict]:
    return [
        {
            "prompt": row["messages"],
            "completion": _to_assistant_messages(row["completion"]),
            "end_reason": row["end_reason"],
            **_extract_lineage(row),
        }
    ]


def _to_preference_rows(row: _RowDict) -> list[_RowDict]:
    """Return one row with the preferred response as `chosen`. A tie has no row.

    `p_chosen` is the soft label, greater than 0.5. `p_chosen_shown_first` and `p_chosen_shown_second` are the judge's
    probabilities with the chosen response shown first and second. They are null if the judge did not see this order.
    """
    if row["p_a"] == 0.5:
        return []
    a_is_chosen = row["p_a"] > 0.5
    # p_forward and p_backward are probabilities of response A. The forward order shows A first, the backward order shows B first.
    forward, backward = row["p_forward"], row["p_backward"]
    if a_is_chosen:
        chosen, rejected, p_chosen = row["response_a"], row["response_b"], row["p_a"]
        shown_first, shown_second = forward, backward
    else:
        chosen, rejected, p_chosen = row["response_b"], row["response_a"], 1 - row["p_a"]
        shown_first, shown_second = _complement_probability(backward), _complement_probability(forward)
    return [
        {
            "prompt": row["messages"],
            "chosen": _to_assistant_messages(chosen),
            "rejected": _to_assistant_messages(rejected),
            "p_chosen": p_chosen,
            "p_chosen_shown_first": shown_first,
            "p_chosen_shown_second": shown_second,
            "position_gap": row["position_gap"],
            "option_mass": row["option_mass"],
            "position_flip": row["position_flip"],
            **_extract_lineage(row),
        }
    ]


def _complement_probability(p: float | None) -> float | None:
    return None if p is None else 1 - p


def _to_kto_rows(row: _RowDict) -> list[_RowDict]:
    """Return one row for each response of the pair. The label is true for the preferred response. A tie has no rows.

    The label is hard. Therefore labels with a small margin are left out (`ExportFormat.default_min_margin`).
    """
    if row["p_a"] == 0.5:
        return []
    responses = ((row["response_a"], row["p_a"]), (row["response_b"], 1 - row["p_a"]))
    return [
        {
            "prompt": row["messages"],
            "completion": _to_assistant_messages(response),
            "label": p > 0.5,
            "p_better": p,
            **_extract_lineage(row),
        }
        for response, p in responses
    ]


def _to_openai_rows(row: _RowDict) -> list[_RowDict]:
    """Return one conversation. OpenAI's format allows no other columns."""
    return [{"messages": [*row["messages"], *_to_assistant_messages(row["completion"])]}]


def _to_prompt_rows(row: _RowDict) -> list[_RowDict]:
    lineage = _extract_lineage(row)
    return [{"prompt": row["messages"], **{name: lineage[name] for name in _PROMPT_LINEAGE_COLUMNS}}]


@dataclass(frozen=True)
class ExportFormat:
    """Describes a format of training data.

    `split_views` are the views, or queries in parentheses, that select the rows of each split. `source_view` has the contents of
    these rows, even if a later record removes a row from its split. `to_rows` converts a database row to rows with `columns`. `trainer` names the
    trainers that read the format. `default_min_margin` is the smallest margin of a label, or None if the rows have no label.
    """

    split_views: dict[str, str]
    source_view: str
    columns: dict[str, pa.DataType]
    to_rows: Callable[[_RowDict], list[_RowDict]]
    trainer: str
    default_min_margin: float | None


_EXAMPLE_VIEWS = {"train": "sft_examples", "eval": "held_out_examples"}
_PREFERENCE_COLUMNS = {
    "prompt": _MESSAGES_TYPE,
    "chosen": _MESSAGES_TYPE,
    "rejected": _MESSAGES_TYPE,
    "p_chosen": pa.float64(),
    "p_chosen_shown_first": pa.float64(),
    "p_chosen_shown_second": pa.float64(),
    "position_gap": pa.float64(),
    "option_mass": pa.float64(),
    "position_flip": pa.bool_(),
    **_LINEAGE_COLUMNS,
}
_PAIR_VIEWS = {"train": "preference_pairs", "eval": "held_out_pairs"}
# A prompt is in one split only, as its responses are. In a later epoch, the same prompt comes again.
_PROMPT_VIEWS = {
    "train": "(FROM prompts ANTI JOIN held_out_prompts USING (prompt_id) WHERE split = 'TRAIN' AND epoch = 0)",
    "eval": "(FROM prompts ANTI JOIN trained_prompts USING (prompt_id) WHERE split = 'EVAL' AND epoch = 0)",
}
EXPORT_FORMATS = {
    "sft": ExportFormat(
        _EXAMPLE_VIEWS,
        "trainable_responses",
        {"prompt": _MESSAGES_TYPE, "completion": _MESSAGES_TYPE, "end_reason": pa.string(), **_LINEAGE_COLUMNS},
        _to_sft_rows,
        "TRL's SFTTrainer (conversational prompt and completion)",
        None,
    ),
    "preference": ExportFormat(
        _PAIR_VIEWS,
        "preference_labels",
        _PREFERENCE_COLUMNS,
        _to_preference_rows,
        "TRL's RewardTrainer and DPOTrainer (conversational, explicit prompt)",
        0.0,  # p_chosen is a soft label
    ),
    "contrast": ExportFormat(
        {"train": "contrast_pairs"},
        "preference_labels",
        _PREFERENCE_COLUMNS,
        _to_preference_rows,
        "TRL's DPOTrainer (conversational, explicit prompt)",
        0.0,
    ),
    "kto": ExportFormat(
        _PAIR_VIEWS,
        "preference_labels",
        {
            "prompt": _MESSAGES_TYPE,
            "completion": _MESSAGES_TYPE,
            "label": pa.bool_(),
            "p_better": pa.float64(),
            **_LINEAGE_COLUMNS,
        },
        _to_kto_rows,
        "TRL's KTOTrainer (unpaired, conversational)",
        UNCERTAIN_MARGIN,
    ),
    "prompts": ExportFormat(
        _PROMPT_VIEWS,
        "prompts",
        {"prompt": _MESSAGES_TYPE, **_PROMPT_LINEAGE_COLUMNS},
        _to_prompt_rows,
        "TRL's GRPOTrainer and RLOOTrainer (conversational, prompt-only)",
        None,
    ),
    "openai": ExportFormat(
        _EXAMPLE_VIEWS,
        "trainable_responses",
        {"messages": _MESSAGES_TYPE},
        _to_openai_rows,
        "supervised fine-tuning at OpenAI, and TRL's SFTTrainer (conversations)",
        None,
    ),
}


CommitPages = list[list[int]]  # commit sequence numbers, at most PAGE_SIZE in a page


def select_commits(
    store: Store, export_format: ExportFormat, selection: ExportSelection, limit: int | None
) -> tuple[ExportSelection, dict[str, CommitPages]]:
    """Exclude rows that are committed after this call. Return the limited selection, and the row numbers of each split.

    The row numbers are commit sequence numbers.

    All queries use one read session. Therefore a human label that is committed later does not remove a selected label.
    """
    with store.open_read_session(limit_s=_QUERY_TIMEOUT_S) as query:
        selection = replace(selection, max_commit_seq=query("SELECT next_seq - 1 FROM raw.sink_state").rows[0][0])
        limit_clause = f" ORDER BY commit_seq LIMIT {limit}" if limit else ""
        pages = {}
        for split, view in export_format.split_views.items():
            sql = f"""SELECT list(commit_seq ORDER BY commit_seq)
                      FROM (SELECT commit_seq, (row_number() OVER (ORDER BY commit_seq) - 1) // {PAGE_SIZE} AS page
                            FROM (SELECT commit_seq FROM {view} WHERE {selection.where_clause}{limit_clause}))
                      GROUP BY page ORDER BY page"""
            pages[split] = [page for (page,) in query(sql, selection.parameters).rows]
    return selection, pages


def read_rows(store: Store, view: str, pages: CommitPages) -> Iterator[_RowDict]:
    """Yield the rows of a view with these commit sequence numbers, in commit order."""
    sql = f"""SELECT * FROM {view} WHERE commit_seq BETWEEN $first AND $last
              AND commit_seq IN (SELECT unnest($page::BIGINT[])) ORDER BY commit_seq"""
    for page in pages:
        yield from store.query_dicts(sql, {"first": page[0], "last": page[-1], "page": page}, limit_s=_QUERY_TIMEOUT_S)


def _count_rows(rows: Iterator[_RowDict], progress: WorkProgress) -> Iterator[_RowDict]:
    for row in rows:
        yield row
        progress.num_done += 1


class _JsonLinesWriter:
    """Writes rows as JSON lines."""

    suffix = "jsonl"

    def __init__(self, path: Path, columns: dict[str, pa.DataType]) -> None:
        self.file = path.open("w", encoding="utf-8", errors="surrogatepass")

    def write(self, rows: list[_RowDict]) -> None:
        self.file.writelines(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows)

    def close(self) -> None:
        self.file.close()


class _ParquetWriter:
    """Writes rows as Parquet with zstd compression, one row group per call."""

    suffix = "parquet"

    def __init__(self, path: Path, columns: dict[str, pa.DataType]) -> None:
        self.schema = pa.schema(list(columns.items()))
        self.file = parquet.ParquetWriter(path, self.schema, compression="zstd")

    def write(self, rows: list[_RowDict]) -> None:
        self.file.write_table(pa.Table.from_pylist(rows, schema=self.schema))

    def close(self) -> None:
        self.file.close()


_WRITERS = {writer.suffix: writer for writer in (_JsonLinesWriter, _ParquetWriter)}


def _write_split(
    path: Path,
    writer: type[_JsonLinesWriter | _ParquetWriter],
    export_format: ExportFormat,
    source_rows: Iterator[_RowDict],
    selection: ExportSelection,
) -> SplitStats:
    """Write the file of one split and return its statistics."""
    stats, page, file = SplitStats(), [], writer(path, export_format.columns)
    try:
        for row in source_rows:
            if export_format.default_min_margin is not None and not stats.add_label(row, selection):
                continue
            for exported_row in export_format.to_rows(row):
                stats.add_row(_extract_lineage(row))
                page.append(exported_row)
            if len(page) >= PAGE_SIZE:
                file.write(page)
                page = []
        file.write(page)
    finally:
        file.close()
    return stats


def _is_export_folder(folder: Path) -> bool:
    """Return whether `charter export` wrote the folder. If so, the front matter of its README.md has the export tag."""
    path = folder / "README.md"
    return path.is_file() and EXPORT_TAG in path.read_text(encoding="utf-8", errors="replace").partition("configs:")[0]


@contextmanager
def _replace_folder(target: Path, force: bool) -> Iterator[Path]:
    """Yield a temporary folder next to the target, and rename it to the target if the block succeeds.

    An existing target is replaced if `force` is true and `charter export` wrote the target. Raises UsageError for every other
    existing target.
    """
    if target.exists() and not (force and _is_export_folder(target)):
        why = "an export did not write this folder" if force else "an existing folder is replaced only with --force"
        raise UsageError(f"{target} already exists", why, "use another folder" + ("" if force else ", or add --force"))
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        (temporary / "data").mkdir(parents=True)
        yield temporary
        if target.exists():
            shutil.rmtree(target)
        temporary.rename(target)
    except OSError as error:
        raise UsageError(f"{target} cannot be written", str(error), "use a folder that is writable") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def export_dataset(
    store: Store,
    target: Path,
    format_name: str,
    selection: ExportSelection,
    suffix: str,
    limit: int | None,
    force: bool,
    limits: LabelQualitySettings,
    progress: WorkProgress,
) -> tuple[dict[str, SplitStats], list[tuple[str, int]]]:
    """Write the splits of a format and the dataset card to the folder `target`.

    Return the statistics of each split, and the reasons why records are in no training view with the number of records.

    `suffix` is jsonl or parquet. `limit` is the maximum number of database rows per split. `limits` are the limits of
    the verdict in the card. A split without rows has no file.
    Raises UsageError if the folder exists (see `force`) or no row matches.
    """
    export_format, writer = EXPORT_FORMATS[format_name], _WRITERS[suffix]
    with _replace_folder(target, force) as folder:
        progress.start_step("selecting rows")
        selection, pages = select_commits(store, export_format, selection, limit)
        progress.start_step("writing", sum(len(page) for commit_pages in pages.values() for page in commit_pages))
        split_stats = {}
        for split, commit_pages in pages.items():
            path = folder / "data" / f"{split}.{suffix}"
            rows = _count_rows(read_rows(store, export_format.source_view, commit_pages), progress)
            split_stats[split] = _write_split(path, writer, export_format, rows, selection)
            if not split_stats[split].num_rows:
                path.unlink()
                continue
            with path.open("rb") as file:
                split_stats[split].content_hash = hashlib.file_digest(file, "sha256").hexdigest()
        progress.start_step("describing the rows")
        with store.open_read_session(limit_s=_QUERY_TIMEOUT_S) as query:
            excluded = list_excluded(query, format_name, selection)
            left_out = [*excluded, *list_left_out(selection, split_stats)]
            if not any(stats.num_rows for stats in split_stats.values()):
                why = f"no record matches that can be a row of {format_name}" + (
                    f"; left out: {format_reasons(left_out)}" if left_out else ""
                )
                fix = (
                    "type: charter status    (to see the record counts), or remove --run, --source, --min-margin and --no-flips"
                )
                raise UsageError("there is nothing to export", why, fix)
            trainer, columns = export_format.trainer, export_format.columns
            card = format_dataset_card(query, format_name, trainer, columns, selection, split_stats, suffix, limits, left_out)
        (folder / "README.md").write_text(card, encoding="utf-8")
    return split_stats, excluded


def format_reasons(counts: list[tuple[str, int]]) -> str:
    """Return the reasons why records are not exported, as one line."""
    return ", ".join(f"{count:,} ({reason})" for reason, count in counts)
