"""Every query of docs/sql.md is asked of a small stream that really ran, and its list of columns is the database's."""

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
from trainer.batches import build_manifest, load_rows, select_new_rows
from trainer.state import TrainingState

PAGE = (Path(__file__).parent.parent / "docs" / "sql.md").read_text(encoding="utf-8")
QUERIES = re.findall(r"^([^\n]+):\n\n```sql\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
PROMPTS = 16


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Prompts (one of them poisoned), people's pairs and demonstrations, labels by a person, and a batch drawn from it all."""
    folder = tmp_path_factory.mktemp("sql")
    flags = {"data.folder": str(folder / "data"), "models.policy": "scripted", "prompts.eval_fraction": "0.3"}
    settings = load_settings(flags, environment={})[0]
    asked = SHIPPED_PROMPTS_PATH.read_text(encoding="utf-8").splitlines()[:PROMPTS]
    put(folder / "prompts.jsonl", *map(json.loads, asked), POISON_TEXT)
    put(folder / "pairs.jsonl", {"prompt": "Which?", "chosen": "this", "rejected": "that"})
    put(folder / "shown.jsonl", {"prompt": "How?", "completion": "So.", "source": "helpful"})
    call(flags, "produce", folder / "prompts.jsonl")
    call(flags, "produce", "--as", "preferences", folder / "pairs.jsonl")
    call(flags, "produce", "--as", "demonstrations", folder / "shown.jsonl")
    bus, found = connect_bus(settings), open_store(settings)

    def runs_until(sql, wanted):
        with make_host(settings, bus, STAGES, sink=True) as host:
            while not found.path.exists() or found.query(sql).rows != [(wanted,)]:
                host.failure_event.wait(0.05)
                host.raise_if_failed()

    done = """SELECT (SELECT count(*) FROM revision_chains) + (SELECT count(*) FROM preferences)
                     + (SELECT count(*) FROM dead_letters) + (SELECT count(*) FROM demonstrations)"""
    runs_until(done, 2 * PROMPTS + 3)
    judged = "SELECT record_id FROM preferences WHERE label_source = 'AI' AND outcome = 'OK' ORDER BY commit_seq LIMIT 4"
    for (pair,) in found.query(judged).rows:
        call(flags, "label", pair, "--prefer", "a")
    chosen = select_new_rows(found, "reward", TrainingState(), limit=8)
    drawn = load_rows(found, "reward", [row.row_id for row in chosen])
    bus.publish(
        [
            to_producer_record(
                build_manifest("reward", 1, drawn, [], TrainingState(), chosen, run_id="live", seed=0, settings={})
            )
        ]
    )
    runs_until("SELECT (SELECT count(*) FROM batches) + (SELECT count(*) FROM preferences WHERE stage = 'label')", 5)
    bus.close()
    return found


def put(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def call(flags, *arguments):
    words = [word for name, value in flags.items() for word in ("--set", f"{name}={value}")]
    done = CliRunner().invoke(cli, [*map(str, arguments), *words], catch_exceptions=False)
    assert done.exit_code == 0, done.output


@pytest.mark.parametrize(("asks", "query"), QUERIES, ids=[asks for asks, _ in QUERIES])
def test_every_question_has_an_answer(store, asks, query):
    found = store.query(query, limit_s=20.0)
    assert found.rows and any(value is not None for value in found.rows[0]), asks


def test_there_are_a_dozen_questions_and_more():
    assert len(QUERIES) == PAGE.count("```sql") >= 12


def test_the_page_lists_every_table_and_no_column_that_is_not_there(store):
    listed = dict(re.findall(r"^\| `(\w+)` \| ([^|]+) \|$", PAGE, re.MULTILINE))
    there = {name: columns.split(", ") for name, columns in store.query(TABLES_SQL).rows}
    assert set(listed) == set(there)
    assert [name for name in there if not set(listed[name].split(", ")) <= set(there[name])] == []
