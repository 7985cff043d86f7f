"""Training data in the forms that TRL and `datasets` read (`charter export`).

A folder with JSON lines or Parquet for each split and a README.md, as the Hugging Face hub lays data sets out. Which rows are
in it is settled in one hold of the database, as their places in the commit order; then they are read page by page, from what
never changes. So the stream may go on meanwhile, time grows with the rows, and memory by forty bytes for each of them.
"""

from __future__ import annotations

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

from charter.export.dataset_card import EXPORT_TAG, format_dataset_card
from charter.export.selection import ExportSelection, SplitStats
from engine.errors import UsageError
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
    "created_at": pa.timestamp("us"),
}


def _to_assistant_messages(text: str) -> list[_RowDict]:
    return [{"role": "assistant", "content": text}]


def _extract_lineage(row: _RowDict) -> _RowDict:
    constitution = row["constitution"]
    known = row | {
        "record_id": str(row["record_id"]),
        "prompt_id": str(row["prompt_id"]),
        "constitution": f"{constitution['name']} {constitution['version']}" if constitution else None,
        "constitution_hash": constitution["hash"] if constitution else None,
    }
    return {key: known[key] for key in _LINEAGE_COLUMNS}


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
    """The better answer first; `p_chosen` is the soft label, above one half: of a tie there is no chosen answer.

    `p_chosen_shown_first` and `p_chosen_shown_second` are the judge's in each order; null where it was not asked.
    """
    if row["p_a"] == 0.5:
        return []
    first = row["p_a"] > 0.5
    forward, backward = row["p_forward"], row["p_backward"]
    orders = (forward, backward) if first else (_complement_probability(backward), _complement_probability(forward))
    chosen, rejected = (row["response_a"], row["response_b"]) if first else (row["response_b"], row["response_a"])
    p_chosen = row["p_a"] if first else 1 - row["p_a"]
    more = {"p_chosen": p_chosen, "p_chosen_shown_first": orders[0], "p_chosen_shown_second": orders[1]}
    more |= {"position_gap": row["position_gap"], "option_mass": row["option_mass"], "position_flip": row["position_flip"]}
    return [
        {
            "prompt": row["messages"],
            "chosen": _to_assistant_messages(chosen),
            "rejected": _to_assistant_messages(rejected),
            **more,
            **_extract_lineage(row),
        }
    ]


def _complement_probability(p: float | None) -> float | None:
    return None if p is None else 1 - p


def _to_kto_rows(row: _RowDict) -> list[_RowDict]:
    """Both answers by themselves, each wanted or not. A pair without a winner says nothing about either."""
    if row["p_a"] == 0.5:
        return []
    answers = ((row["response_a"], row["p_a"]), (row["response_b"], 1 - row["p_a"]))
    return [
        {
            "prompt": row["messages"],
            "completion": _to_assistant_messages(text),
            "label": p > 0.5,
            "p_better": p,
            **_extract_lineage(row),
        }
        for text, p in answers
    ]


@dataclass(frozen=True)
class ExportFormat:
    """One form of training data: the view that says what is in each split, the one that has the rows whatever came after them,
    its columns, and what a row becomes."""

    split_views: dict[str, str]
    source_view: str
    columns: dict[str, pa.DataType]
    to_rows: Callable[[_RowDict], list[_RowDict]]
    trainer: str


_PAIR_VIEWS = {"train": "preference_pairs", "eval": "held_out_pairs"}
EXPORT_FORMATS = {
    "sft": ExportFormat(
        {"train": "sft_examples", "eval": "held_out_examples"},
        "trainable_responses",
        {"prompt": _MESSAGES_TYPE, "completion": _MESSAGES_TYPE, "end_reason": pa.string(), **_LINEAGE_COLUMNS},
        _to_sft_rows,
        "SFTTrainer (conversational prompt and completion)",
    ),
    "preference": ExportFormat(
        _PAIR_VIEWS,
        "preference_labels",
        {
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
        },
        _to_preference_rows,
        "RewardTrainer and DPOTrainer (conversational, explicit prompt)",
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
        "KTOTrainer (unpaired, conversational)",
    ),
}


CommitPages = list[list[int]]


def select_commits(
    store: Store, export_format: ExportFormat, selection: ExportSelection, limit: int | None
) -> tuple[ExportSelection, dict[str, CommitPages]]:
    """The choice up to the newest commit, and for each split the places of its rows, a page at a time.

    All in one hold of the database: an override that comes later takes no label away from what is being written.
    """
    with store.open_read_session(limit_s=_QUERY_TIMEOUT_S) as ask:
        selection = replace(selection, max_commit_seq=ask("SELECT next_seq - 1 FROM raw.sink_state").rows[0][0])
        most = f" ORDER BY commit_seq LIMIT {limit}" if limit else ""
        pages = {}
        for split, view in export_format.split_views.items():
            sql = f"""SELECT list(commit_seq ORDER BY commit_seq)
                      FROM (SELECT commit_seq, (row_number() OVER (ORDER BY commit_seq) - 1) // {PAGE_SIZE} AS page
                            FROM (SELECT commit_seq FROM {view} WHERE {selection.where_clause}{most}))
                      GROUP BY page ORDER BY page"""
            pages[split] = [page for (page,) in ask(sql, selection.parameters).rows]
    return selection, pages


def read_rows(store: Store, view: str, pages: CommitPages) -> Iterator[_RowDict]:
    """The rows of a view at these places, in their order."""
    sql = f"""SELECT * FROM {view} WHERE commit_seq BETWEEN $first AND $last
              AND commit_seq IN (SELECT unnest($page::BIGINT[])) ORDER BY commit_seq"""
    for page in pages:
        yield from store.query_dicts(sql, {"first": page[0], "last": page[-1], "page": page}, limit_s=_QUERY_TIMEOUT_S)


class _JsonLinesWriter:
    """JSON lines."""

    suffix = "jsonl"

    def __init__(self, path: Path, columns: dict[str, pa.DataType]) -> None:
        self.file = path.open("w", encoding="utf-8", errors="surrogatepass")

    def write(self, rows: list[_RowDict]) -> None:
        self.file.writelines(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows)

    def close(self) -> None:
        self.file.close()


class _ParquetWriter:
    """Parquet."""

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
    path: Path, writer: type[_JsonLinesWriter | _ParquetWriter], export_format: ExportFormat, source_rows: Iterator[_RowDict]
) -> SplitStats:
    """Write one file; what is in it."""
    counted, page, file = SplitStats(), [], writer(path, export_format.columns)
    try:
        for row in source_rows:
            for made in export_format.to_rows(row):
                counted.add_row(made)
                page.append(made)
            if len(page) >= PAGE_SIZE:
                file.write(page)
                page = []
        file.write(page)
    finally:
        file.close()
    return counted


def _is_export_folder(folder: Path) -> bool:
    """Whether `charter export` has written a folder: its card has our tag."""
    path = folder / "README.md"
    return path.is_file() and EXPORT_TAG in path.read_text(encoding="utf-8", errors="replace").partition("configs:")[0]


@contextmanager
def _replace_folder(target: Path, force: bool) -> Iterator[Path]:
    """A folder beside the target that takes its place when all went well."""
    if target.exists() and not (force and _is_export_folder(target)):
        why = "it is replaced only with --force" if not force else "it is no folder that charter export wrote"
        raise UsageError(f"{target} is there already", why, "name another folder" + ("" if force else ", or add --force"))
    making = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        (making / "data").mkdir(parents=True)
        yield making
        if target.exists():
            shutil.rmtree(target)
        making.rename(target)
    except OSError as error:
        raise UsageError(f"{target} cannot be written", str(error), "name a folder that can") from error
    finally:
        shutil.rmtree(making, ignore_errors=True)


def export_dataset(
    store: Store, target: Path, format_name: str, selection: ExportSelection, suffix: str, limit: int | None, force: bool
) -> dict[str, SplitStats]:
    """Write a form's splits and the card to a new folder; what is in each split."""
    form, writer = EXPORT_FORMATS[format_name], _WRITERS[suffix]
    with _replace_folder(target, force) as folder:
        selection, pages = select_commits(store, form, selection, limit)
        counts = {}
        for split in form.split_views:
            path = folder / "data" / f"{split}.{suffix}"
            counts[split] = _write_split(path, writer, form, read_rows(store, form.source_view, pages[split]))
            if not counts[split].num_rows:
                path.unlink()
        if not any(counted.num_rows for counted in counts.values()):
            fix = "type: charter status    (what there is), or leave --run and --source out"
            raise UsageError("there is nothing to export", f"no row of {' and '.join(form.split_views.values())} fits", fix)
        text = format_dataset_card(store, format_name, form.trainer, selection, counts, suffix)
        (folder / "README.md").write_text(text, encoding="utf-8")
    return counts
