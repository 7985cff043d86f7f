"""Run every query of docs/sql.md on the database of a small run, and compare the page's list of columns with the database's."""

import json
import re
from pathlib import Path

import pytest
from click.testing import CliRunner

from charter.cli import cli
from charter.commands.sql import TABLES_SQL
from charter.connect import connect_bus, open_store
from charter.pipeline import STAGES, make_host
from engine.models.scripted import POISON_TEXT
from engine.settings import load_settings
from engine.worker import to_producer_record
from producers.files import SHIPPED_PROMPTS_PATH
from schemas.records import LabelSource
from tests.support.records import make_judged_preference
from tests.support.waiting import HANG_S, wait_until
from trainer.batches import build_manifest, load_rows, select_new_rows
from trainer.state import TrainingState

PAGE = (Path(__file__).parent.parent / "docs" / "sql.md").read_text(encoding="utf-8")
QUERIES = re.findall(r"^([^\n]+):\n\n```sql\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
PROMPTS = 16


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Return a database with prompts (one poisoned), human pairs and demonstrations, human labels, and a training batch."""
    folder = tmp_path_factory.mktemp("sql")
    flags = {"data.folder": str(folder / "data"), "models.policy": "scripted", "prompts.eval_fraction": "0.3"}
    settings = load_settings(flags, environment={})[0]
    prompt_lines = SHIPPED_PROMPTS_PATH.read_text(encoding="utf-8").splitlines()[:PROMPTS]
    write_jsonl(folder / "prompts.jsonl", *map(json.loads, prompt_lines), POISON_TEXT)
    write_jsonl(folder / "pairs.jsonl", {"prompt": "Which?", "chosen": "this", "rejected": "that"})
    write_jsonl(folder / "shown.jsonl", {"prompt": "How?", "completion": "So.", "source": "helpful"})
    run_command(flags, "produce", folder / "prompts.jsonl")
    run_command(flags, "produce", "--as", "preferences", folder / "pairs.jsonl")
    run_command(flags, "produce", "--as", "demonstrations", folder / "shown.jsonl")
    bus, store = connect_bus(settings), open_store(settings)

    def run_until(sql, expected):
        with make_host(settings, bus, STAGES, sink=True) as host:
            wait_until(lambda: store.path.exists() and store.query(sql).rows == [(expected,)], host)

    finished = """SELECT (SELECT count(*) FROM revision_chains) + (SELECT count(*) FROM preferences)
                     + (SELECT count(*) FROM dead_letters) + (SELECT count(*) FROM demonstrations)"""
    run_until(finished, 2 * PROMPTS + 3)
    labeled = "SELECT record_id FROM preferences WHERE label_source = 'AI' AND outcome = 'OK' ORDER BY commit_seq LIMIT 4"
    for (pair,) in store.query(labeled).rows:
        run_command(flags, "label", pair, "--prefer", "a")
    new_rows = select_new_rows(store, "reward", TrainingState(), limit=8)
    rows = load_rows(store, "reward", [row.row_id for row in new_rows])
    manifest = build_manifest("reward", 1, rows, [], TrainingState(), new_rows, run_id="live", seed=0, settings={})
    contrast = make_judged_preference("contrast", "With the constitution?", "yes", "no", 0.9, 0.7, pairing="contrast")
    contrast = contrast.model_copy(update={"label_source": LabelSource.CONTRAST, "p_a": 1.0})
    bus.publish([to_producer_record(manifest), to_producer_record(contrast)])
    run_until(
        "SELECT (SELECT count(*) FROM batches) + (SELECT count(*) FROM preferences WHERE stage = 'label' OR pairing = 'contrast')",
        6,
    )
    bus.close()
    return store


def write_jsonl(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def run_command(flags, *arguments):
    options = [option for name, value in flags.items() for option in ("--set", f"{name}={value}")]
    result = CliRunner().invoke(cli, [*map(str, arguments), *options], catch_exceptions=False)
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize(("title", "query"), QUERIES, ids=[title for title, _ in QUERIES])
def test_every_query_of_the_page_returns_a_value(store, title, query):
    rows = store.query(query, limit_s=HANG_S).rows
    assert rows and any(value is not None for value in rows[0]), title


def test_every_sql_block_of_the_page_has_a_title():
    # Without a title QUERIES would skip the block, and no test would run it.
    blocks = re.findall(r"^```sql\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    assert blocks == [query for _, query in QUERIES]


def test_page_lists_every_table_and_only_existing_columns(store):
    listed = dict(re.findall(r"^\| `(\w+)` \| ([^|]+) \|$", PAGE, re.MULTILINE))
    tables = {name: columns.split(", ") for name, columns in store.query(TABLES_SQL).rows}
    assert set(listed) == set(tables)
    assert [name for name in tables if not set(listed[name].split(", ")) <= set(tables[name])] == []
