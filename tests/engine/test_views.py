"""The views, with hand-counted results: held-out prompts never train, and no pair counts twice."""

from datetime import timedelta

import pytest

from engine.commit_history import read_commit_history
from schemas.records import LabelSource, Outcome, Split
from tests.support.records import (
    RecordDatabase,
    make_chain_end,
    make_demonstration,
    make_human_label,
    make_preference,
    make_prompt,
    make_response,
)
from trainer.batches import RowRef, build_manifest, compute_content_hash, load_rows, rebuild_batch, select_new_rows
from trainer.state import TrainingState


@pytest.fixture
def database(tmp_path):
    return RecordDatabase(tmp_path / "charter.duckdb")


HELD_OUT = {"split": Split.EVAL}


def test_records_of_a_held_out_prompt_do_not_train(database):
    """A prompt is held out by its split, by another epoch of it, or by an earlier run."""
    database.add(
        make_prompt("mine"), make_prompt("kept", **HELD_OUT), make_prompt("again", **HELD_OUT), make_prompt("again", epoch=1)
    )
    database.add(make_prompt("moved", **HELD_OUT).model_copy(update={"run_id": "earlier"}), make_prompt("moved"))
    kept, again, moved = ("kept", HELD_OUT), ("again", {"epoch": 1}), ("moved", {})
    for text, more in (("mine", {}), kept, again, moved):
        database.add(make_chain_end(text, text, **more), make_preference(text, text, 0.9, **more), make_response(text, **more))
        database.add(make_demonstration(f"{text} shown", text, **more))
    assert {text for (text,) in database.query_rows("SELECT completion FROM sft_examples")} == {
        "mine final",
        "mine shown answer",
    }
    assert database.query_rows("SELECT response_a FROM preference_pairs") == [("mine a",)]
    excluded = database.query_rows("SELECT messages[1].content, exclusion_reason FROM rollouts ORDER BY 1")
    assert excluded == [("again", "held out"), ("kept", "held out"), ("mine", None), ("moved", "held out")]
    assert database.query_rows("SELECT response_a FROM held_out_pairs") == [("kept a",)]


def test_label_of_a_trained_prompt_is_not_held_out(database):
    database.add(make_prompt("first"), make_preference("first", "first", 0.8), make_prompt("first", **HELD_OUT))
    database.add(make_preference("later", "first", 0.8, **HELD_OUT))
    assert database.query_rows("SELECT response_a FROM preference_pairs") == [("first a",)]  # an eligible pair stays eligible
    assert database.query_rows("SELECT response_a FROM held_out_pairs") == []


def test_prompt_that_trained_in_another_epoch_is_not_held_out(database):
    again = {"epoch": 1, "split": Split.EVAL}
    database.add(make_prompt("old"), make_prompt("old", **again), make_prompt("new", **again))
    for text in ("old", "new"):
        database.add(make_preference(text, text, 0.8, **again), make_chain_end(text, text, **again))
    assert database.query_rows("SELECT response_a FROM held_out_pairs") == [("new a",)]
    assert database.query_rows("SELECT completion FROM held_out_examples") == [("new final",)]


def test_human_label_overrides_the_label_that_it_names(database):
    ai, other, unread = (
        make_preference("x", "x", 0.2),
        make_preference("y", "y", 0.3),
        make_preference("z", "z", None, outcome=Outcome.LOW_MASS),
    )
    first, second, third = make_human_label("1", ai, 1.0), make_human_label("2", ai, 0.5), make_human_label("3", unread, 0.0)
    database.add(ai, other, unread)
    assert database.query_record_ids("preference_pairs") == {ai.record_id, other.record_id}
    database.add(first)
    assert database.query_record_ids("preference_pairs") == {first.record_id, other.record_id}
    database.add(second, third)
    assert database.query_record_ids("preference_pairs") == {second.record_id, other.record_id, third.record_id}
    overrides = dict(database.query_rows("SELECT record_id::VARCHAR, overridden_by::VARCHAR FROM preference_labels"))
    assert overrides == {
        ai.record_id: second.record_id, first.record_id: second.record_id, second.record_id: None, other.record_id: None,
        third.record_id: None,
    }  # fmt: skip


def test_override_is_a_new_row_and_leaves_old_batches_unchanged(database):
    labels = [make_preference(name, name, 0.2) for name in "xyz"]
    database.add(*labels)
    selected = select_new_rows(database.store, "reward", TrainingState(), limit=10)
    keys = [row.row_id for row in selected]
    rows = load_rows(database.store, "reward", keys)
    manifest = build_manifest(
        "reward",
        1,
        rows,
        [],
        TrainingState(),
        selected,
        run_id="r",
        seed=0,
        settings={},
        sink_session=read_commit_history(database.store).session_id,
    )
    override = make_human_label("1", labels[1], 1.0)
    database.add(override)
    assert rebuild_batch(database.store, manifest).rows[1]["p_a"] == 0.2
    after = TrainingState(trained_batches=[manifest])
    assert [row.row_id for row in select_new_rows(database.store, "reward", after, limit=10)] == [override.record_id]
    assert compute_content_hash(load_rows(database.store, "reward", keys)) == manifest.content_hash
    assert (
        len(select_new_rows(database.store, "reward", TrainingState(), limit=10)) == 3
    )  # selected again, no pair counts twice


def test_demonstrations_train_and_have_a_trace_without_a_prompt(database):
    labeled = make_preference("b", "compared", 1.0, label_source=LabelSource.HUMAN)
    database.add(
        make_prompt("asked"), make_demonstration("a", "shown", source="helpful"), make_demonstration("c", "asked"), labeled
    )
    rows = database.query_rows("SELECT source, label_source, end_reason, rounds, completion FROM sft_examples ORDER BY 1")
    assert rows == [("helpful", "HUMAN", None, 0, "a answer"), ("test", "HUMAN", None, 0, "c answer")]
    traces = database.query_rows("SELECT prompt, source, len(demonstrations), len(preferences) FROM traces ORDER BY 1")
    assert traces == [("asked", "test", 1, None), ("compared", "test", None, 1), ("shown", "helpful", 1, None)]
    assert database.query_rows("SELECT count(*) FROM prompts") == [(1,)]


def test_restored_rows_of_a_held_out_prompt_do_not_train_if_they_come_first(database):
    """A database that is restored from the log can commit the rows before the record that holds their prompt out."""
    held_out = make_prompt("kept", **HELD_OUT)
    database.add(make_chain_end("kept", "kept"), make_preference("kept", "kept", 0.9), make_response("kept"), held_out)
    for view in ("sft_examples", "preference_pairs", "rollouts WHERE exclusion_reason IS NULL"):
        assert database.query_rows(f"SELECT count(*) FROM {view}") == [(0,)], view


def test_batch_can_be_rebuilt_after_its_prompts_are_held_out(database):
    rows = [make_chain_end("a", "a"), make_preference("a", "a", 0.9), make_response("a")]
    database.add(*rows)
    phases = ("sft", "reward", "ppo")
    manifests = []
    for phase, record in zip(phases, rows, strict=True):
        selected = [RowRef(record.record_id, "test", 0)]
        loaded = load_rows(database.store, phase, [record.record_id])
        manifests.append(build_manifest(phase, 1, loaded, [], TrainingState(), selected, run_id="r", seed=0, settings={}))
    database.add(make_prompt("a", **HELD_OUT).model_copy(update={"created_at": rows[0].created_at - timedelta(days=1)}))
    assert database.query_rows("SELECT count(*) FROM sft_examples") == [(0,)]
    for manifest in manifests:
        assert len(rebuild_batch(database.store, manifest).rows) == 1
