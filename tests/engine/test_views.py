"""The views, on records whose answers were counted by hand: nothing held out trains, and no pair counts twice."""

import pytest

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
from trainer.batches import TrainingState, build_manifest, compute_content_hash, load_rows, rebuild_batch, select_new_rows


@pytest.fixture
def world(tmp_path):
    return RecordDatabase(tmp_path / "charter.duckdb")


HELD_OUT = {"split": Split.EVAL}


def test_nothing_of_a_held_out_prompt_trains(world):
    """By its own mark, as another epoch of a held-out prompt, and when another run has held it out before."""
    world.add(
        make_prompt("mine"), make_prompt("kept", **HELD_OUT), make_prompt("again", **HELD_OUT), make_prompt("again", epoch=1)
    )
    world.add(make_prompt("moved", **HELD_OUT).model_copy(update={"run_id": "earlier"}), make_prompt("moved"))
    kept, again, moved = ("kept", HELD_OUT), ("again", {"epoch": 1}), ("moved", {})
    for text, more in (("mine", {}), kept, again, moved):
        world.add(make_chain_end(text, text, **more), make_preference(text, text, 0.9, **more), make_response(text, **more))
        world.add(make_demonstration(f"{text} shown", text, **more))
    assert {text for (text,) in world.query_rows("SELECT completion FROM sft_examples")} == {"mine final", "mine shown answer"}
    assert world.query_rows("SELECT response_a FROM preference_pairs") == [("mine a",)]
    excluded = world.query_rows("SELECT messages[1].content, exclusion_reason FROM rollouts ORDER BY 1")
    assert excluded == [("again", "held out"), ("kept", "held out"), ("mine", None), ("moved", "held out")]
    assert world.query_rows("SELECT response_a FROM held_out_pairs") == [("kept a",)]


def test_a_label_of_a_prompt_that_has_trained_measures_nothing(world):
    world.add(make_prompt("first"), make_preference("first", "first", 0.8), make_prompt("first", **HELD_OUT))
    world.add(make_preference("later", "first", 0.8, **HELD_OUT))
    assert world.query_rows("SELECT response_a FROM preference_pairs") == [("first a",)]  # what was eligible stays eligible
    assert world.query_rows("SELECT response_a FROM held_out_pairs") == []


def test_a_prompt_that_has_trained_in_another_epoch_measures_nothing(world):
    again = {"epoch": 1, "split": Split.EVAL}
    world.add(make_prompt("old"), make_prompt("old", **again), make_prompt("new", **again))
    for text in ("old", "new"):
        world.add(make_preference(text, text, 0.8, **again), make_chain_end(text, text, **again))
    assert world.query_rows("SELECT response_a FROM held_out_pairs") == [("new a",)]
    assert world.query_rows("SELECT completion FROM held_out_examples") == [("new final",)]


def test_a_persons_label_takes_the_place_of_the_one_it_names(world):
    ai, other, unread = (
        make_preference("x", "x", 0.2),
        make_preference("y", "y", 0.3),
        make_preference("z", "z", None, outcome=Outcome.LOW_MASS),
    )
    first, second, third = make_human_label("1", ai, 1.0), make_human_label("2", ai, 0.5), make_human_label("3", unread, 0.0)
    world.add(ai, other, unread)
    assert world.query_record_ids("preference_pairs") == {ai.record_id, other.record_id}
    world.add(first)
    assert world.query_record_ids("preference_pairs") == {first.record_id, other.record_id}
    world.add(second, third)
    assert world.query_record_ids("preference_pairs") == {second.record_id, other.record_id, third.record_id}
    standing = dict(world.query_rows("SELECT record_id::VARCHAR, overridden_by::VARCHAR FROM preference_labels"))
    assert standing == {
        ai.record_id: second.record_id, first.record_id: second.record_id, second.record_id: None, other.record_id: None,
        third.record_id: None,
    }  # fmt: skip


def test_an_override_is_new_to_the_cursor_and_leaves_old_batches_as_they_were(world):
    labels = [make_preference(name, name, 0.2) for name in "xyz"]
    world.add(*labels)
    chosen = select_new_rows(world.store, "reward", TrainingState(), limit=10)
    keys = [row.row_id for row in chosen]
    drawn = load_rows(world.store, "reward", keys)
    manifest = build_manifest("reward", 1, drawn, [], TrainingState(), chosen, run_id="r", seed=0, settings={})
    override = make_human_label("1", labels[1], 1.0)
    world.add(override)
    assert rebuild_batch(world.store, manifest).rows[1]["p_a"] == 0.2
    after = TrainingState(cursors={("reward", ""): manifest.commit_seq_to})
    assert [row.row_id for row in select_new_rows(world.store, "reward", after, limit=10)] == [override.record_id]
    assert compute_content_hash(load_rows(world.store, "reward", keys)) == manifest.content_hash
    assert len(select_new_rows(world.store, "reward", TrainingState(), limit=10)) == 3  # drawn anew, no pair counts twice


def test_demonstrations_train_and_have_a_story_without_a_prompt_to_answer(world):
    labelled = make_preference("b", "compared", 1.0, label_source=LabelSource.HUMAN)
    world.add(
        make_prompt("asked"), make_demonstration("a", "shown", source="helpful"), make_demonstration("c", "asked"), labelled
    )
    found = world.query_rows("SELECT source, label_source, end_reason, rounds, completion FROM sft_examples ORDER BY 1")
    assert found == [("helpful", "HUMAN", None, 0, "a answer"), ("test", "HUMAN", None, 0, "c answer")]
    stories = world.query_rows("SELECT prompt, source, len(demonstrations), len(preferences) FROM traces ORDER BY 1")
    assert stories == [("asked", "test", 1, None), ("compared", "test", None, 1), ("shown", "helpful", 1, None)]
    assert world.query_rows("SELECT count(*) FROM prompts") == [(1,)]
