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
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as parquet

from charter.card import MARK, card
from engine.errors import UsageError

if TYPE_CHECKING:
    from engine.store import Store

PAGE = 2000
LIMIT_S = 60.0
Row = dict[str, Any]

MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
LINEAGE = {
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


def said(text: str) -> list[Row]:
    return [{"role": "assistant", "content": text}]


def lineage(row: Row) -> Row:
    constitution = row["constitution"]
    known = row | {
        "record_id": str(row["record_id"]),
        "prompt_id": str(row["prompt_id"]),
        "constitution": f"{constitution['name']} {constitution['version']}" if constitution else None,
        "constitution_hash": constitution["hash"] if constitution else None,
    }
    return {key: known[key] for key in LINEAGE}


def sft(row: Row) -> list[Row]:
    return [{"prompt": row["messages"], "completion": said(row["completion"]), "end_reason": row["end_reason"], **lineage(row)}]


def preference(row: Row) -> list[Row]:
    """The better answer first; `p_chosen` is the soft label, above one half: of a tie there is no chosen answer.

    `p_chosen_shown_first` and `p_chosen_shown_second` are the judge's in each order; null where it was not asked.
    """
    if row["p_a"] == 0.5:
        return []
    first = row["p_a"] > 0.5
    forward, backward = row["p_forward"], row["p_backward"]
    orders = (forward, backward) if first else (other(backward), other(forward))
    chosen, rejected = (row["response_a"], row["response_b"]) if first else (row["response_b"], row["response_a"])
    p_chosen = row["p_a"] if first else 1 - row["p_a"]
    more = {"p_chosen": p_chosen, "p_chosen_shown_first": orders[0], "p_chosen_shown_second": orders[1]}
    more |= {"position_gap": row["position_gap"], "option_mass": row["option_mass"], "position_flip": row["position_flip"]}
    return [{"prompt": row["messages"], "chosen": said(chosen), "rejected": said(rejected), **more, **lineage(row)}]


def other(p: float | None) -> float | None:
    return None if p is None else 1 - p


def kto(row: Row) -> list[Row]:
    """Both answers by themselves, each wanted or not. A pair without a winner says nothing about either."""
    if row["p_a"] == 0.5:
        return []
    answers = ((row["response_a"], row["p_a"]), (row["response_b"], 1 - row["p_a"]))
    return [
        {"prompt": row["messages"], "completion": said(text), "label": p > 0.5, "p_better": p, **lineage(row)}
        for text, p in answers
    ]


@dataclass(frozen=True)
class Form:
    """One form of training data: the view that says what is in each split, the one that has the rows whatever came after them,
    its columns, and what a row becomes."""

    views: dict[str, str]
    texts: str
    columns: dict[str, pa.DataType]
    rows: Callable[[Row], list[Row]]
    trainer: str


PAIRS = {"train": "preference_pairs", "eval": "held_out_pairs"}
FORMS = {
    "sft": Form(
        {"train": "sft_examples", "eval": "held_out_examples"},
        "trainable_responses",
        {"prompt": MESSAGES, "completion": MESSAGES, "end_reason": pa.string(), **LINEAGE},
        sft,
        "SFTTrainer (conversational prompt and completion)",
    ),
    "preference": Form(
        PAIRS,
        "preference_labels",
        {
            "prompt": MESSAGES,
            "chosen": MESSAGES,
            "rejected": MESSAGES,
            "p_chosen": pa.float64(),
            "p_chosen_shown_first": pa.float64(),
            "p_chosen_shown_second": pa.float64(),
            "position_gap": pa.float64(),
            "option_mass": pa.float64(),
            "position_flip": pa.bool_(),
            **LINEAGE,
        },
        preference,
        "RewardTrainer and DPOTrainer (conversational, explicit prompt)",
    ),
    "kto": Form(
        PAIRS,
        "preference_labels",
        {"prompt": MESSAGES, "completion": MESSAGES, "label": pa.bool_(), "p_better": pa.float64(), **LINEAGE},
        kto,
        "KTOTrainer (unpaired, conversational)",
    ),
}


@dataclass(frozen=True)
class Choice:
    """Which records: of one run (those too that another had made before) or all, of some sources or of all, up to a commit."""

    run_id: str | None = None
    sources: tuple[str, ...] = ()
    upto: int = -1

    @property
    def where(self) -> str:
        parts = ["commit_seq <= $upto"]
        parts += ["record_id IN (SELECT record_id FROM run_records WHERE run_id = $run)"] if self.run_id else []
        parts += ["list_contains($sources::VARCHAR[], source)"] if self.sources else []
        return " AND ".join(parts)

    @property
    def parameters(self) -> dict[str, Any]:
        more: dict[str, Any] = {"run": self.run_id} if self.run_id else {}
        return {"upto": self.upto, **more, **({"sources": list(self.sources)} if self.sources else {})}


@dataclass
class Counted:
    """What went into one file."""

    rows: int = 0
    by: dict[tuple[str, str], int] = field(default_factory=dict)  # (source, label_source) -> rows
    policies: set[int | None] = field(default_factory=set)
    constitutions: set[tuple[str, str]] = field(default_factory=set)  # (name and version, hash)
    runs: set[str] = field(default_factory=set)
    first: datetime | None = None
    last: datetime | None = None

    def add(self, row: Row) -> None:
        self.rows += 1
        about = (row["source"], row["label_source"])
        self.by[about] = self.by.get(about, 0) + 1
        self.policies.add(row["policy_version"])
        self.constitutions |= {(row["constitution"], row["constitution_hash"])} if row["constitution"] else set()
        self.runs.add(row["run_id"])
        self.first = min(self.first or row["created_at"], row["created_at"])
        self.last = max(self.last or row["created_at"], row["created_at"])


Pages = list[list[int]]


def chosen(store: Store, form: Form, choice: Choice, limit: int | None) -> tuple[Choice, dict[str, Pages]]:
    """The choice up to the newest commit, and for each split the places of its rows, a page at a time.

    All in one hold of the database: an override that comes later takes no label away from what is being written.
    """
    with store.reading(limit_s=LIMIT_S) as ask:
        choice = replace(choice, upto=ask("SELECT next_seq - 1 FROM raw.sink_state").rows[0][0])
        most = f" ORDER BY commit_seq LIMIT {limit}" if limit else ""
        pages = {}
        for split, view in form.views.items():
            sql = f"""SELECT list(commit_seq ORDER BY commit_seq)
                      FROM (SELECT commit_seq, (row_number() OVER (ORDER BY commit_seq) - 1) // {PAGE} AS page
                            FROM (SELECT commit_seq FROM {view} WHERE {choice.where}{most}))
                      GROUP BY page ORDER BY page"""
            pages[split] = [page for (page,) in ask(sql, choice.parameters).rows]
    return choice, pages


def rows(store: Store, view: str, pages: Pages) -> Iterator[Row]:
    """The rows of a view at these places, in their order."""
    sql = f"""SELECT * FROM {view} WHERE commit_seq BETWEEN $first AND $last
              AND commit_seq IN (SELECT unnest($page::BIGINT[])) ORDER BY commit_seq"""
    for page in pages:
        yield from store.records(sql, {"first": page[0], "last": page[-1], "page": page}, limit_s=LIMIT_S)


class Lines:
    """JSON lines."""

    suffix = "jsonl"

    def __init__(self, path: Path, columns: dict[str, pa.DataType]) -> None:
        self.file = path.open("w", encoding="utf-8", errors="surrogatepass")

    def write(self, page: list[Row]) -> None:
        self.file.writelines(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in page)

    def close(self) -> None:
        self.file.close()


class Columns:
    """Parquet."""

    suffix = "parquet"

    def __init__(self, path: Path, columns: dict[str, pa.DataType]) -> None:
        self.schema = pa.schema(list(columns.items()))
        self.file = parquet.ParquetWriter(path, self.schema, compression="zstd")

    def write(self, page: list[Row]) -> None:
        self.file.write_table(pa.Table.from_pylist(page, schema=self.schema))

    def close(self) -> None:
        self.file.close()


WRITERS = {writer.suffix: writer for writer in (Lines, Columns)}


def write(path: Path, writer: type[Lines | Columns], form: Form, found: Iterator[Row]) -> Counted:
    """Write one file; what is in it."""
    counted, page, file = Counted(), [], writer(path, form.columns)
    try:
        for row in found:
            for made in form.rows(row):
                counted.add(made)
                page.append(made)
            if len(page) >= PAGE:
                file.write(page)
                page = []
        file.write(page)
    finally:
        file.close()
    return counted


def is_ours(folder: Path) -> bool:
    """Whether `charter export` has written a folder: its card has our tag."""
    path = folder / "README.md"
    return path.is_file() and MARK in path.read_text(encoding="utf-8", errors="replace").partition("configs:")[0]


@contextmanager
def new_folder(target: Path, force: bool) -> Iterator[Path]:
    """A folder beside the target that takes its place when all went well."""
    if target.exists() and not (force and is_ours(target)):
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


def export(
    store: Store, target: Path, name: str, choice: Choice, suffix: str, limit: int | None, force: bool
) -> dict[str, Counted]:
    """Write a form's splits and the card to a new folder; what is in each split."""
    form, writer = FORMS[name], WRITERS[suffix]
    with new_folder(target, force) as folder:
        choice, pages = chosen(store, form, choice, limit)
        counts = {}
        for split in form.views:
            path = folder / "data" / f"{split}.{suffix}"
            counts[split] = write(path, writer, form, rows(store, form.texts, pages[split]))
            if not counts[split].rows:
                path.unlink()
        if not any(counted.rows for counted in counts.values()):
            fix = "type: charter status    (what there is), or leave --run and --source out"
            raise UsageError("there is nothing to export", f"no row of {' and '.join(form.views.values())} fits", fix)
        text = card(store, name, form.trainer, choice, counts, suffix)
        (folder / "README.md").write_text(text, encoding="utf-8")
    return counts
