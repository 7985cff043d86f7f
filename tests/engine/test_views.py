"""The views, on records whose answers were counted by hand: nothing held out trains, and no pair counts twice."""

import pytest

from schemas.records import LabelSource, Outcome, Split
from tests.support.records import World, chain_end, demonstration, person, preference, prompt, response
from trainer.batches import Standing, content_hash, manifest_of, rebuild, rows_of, waiting


@pytest.fixture
def world(tmp_path):
    return World(tmp_path / "charter.duckdb")


HELD_OUT = {"split": Split.EVAL}


def test_nothing_of_a_held_out_prompt_trains(world):
    """By its own mark, as another epoch of a held-out prompt, and when another run has held it out before."""
    world.add(prompt("mine"), prompt("kept", **HELD_OUT), prompt("again", **HELD_OUT), prompt("again", epoch=1))
    world.add(prompt("moved", **HELD_OUT).model_copy(update={"run_id": "earlier"}), prompt("moved"))
    kept, again, moved = ("kept", HELD_OUT), ("again", {"epoch": 1}), ("moved", {})
    for text, more in (("mine", {}), kept, again, moved):
        world.add(chain_end(text, text, **more), preference(text, text, 0.9, **more), response(text, **more))
        world.add(demonstration(f"{text} shown", text, **more))
    assert {text for (text,) in world.rows("SELECT completion FROM sft_examples")} == {"mine final", "mine shown answer"}
    assert world.rows("SELECT response_a FROM preference_pairs") == [("mine a",)]
    excluded = world.rows("SELECT messages[1].content, exclusion_reason FROM rollouts ORDER BY 1")
    assert excluded == [("again", "held out"), ("kept", "held out"), ("mine", None), ("moved", "held out")]
    assert world.rows("SELECT response_a FROM held_out_pairs") == [("kept a",)]


def test_a_label_of_a_prompt_that_has_trained_measures_nothing(world):
    world.add(prompt("first"), preference("first", "first", 0.8), prompt("first", **HELD_OUT))
    world.add(preference("later", "first", 0.8, **HELD_OUT))
    assert world.rows("SELECT response_a FROM preference_pairs") == [("first a",)]  # what was eligible stays eligible
    assert world.rows("SELECT response_a FROM held_out_pairs") == []


def test_a_prompt_that_has_trained_in_another_epoch_measures_nothing(world):
    again = {"epoch": 1, "split": Split.EVAL}
    world.add(prompt("old"), prompt("old", **again), prompt("new", **again))
    for text in ("old", "new"):
        world.add(preference(text, text, 0.8, **again), chain_end(text, text, **again))
    assert world.rows("SELECT response_a FROM held_out_pairs") == [("new a",)]
    assert world.rows("SELECT completion FROM held_out_examples") == [("new final",)]


def test_a_persons_label_takes_the_place_of_the_one_it_names(world):
    ai, other, unread = (
        preference("x", "x", 0.2),
        preference("y", "y", 0.3),
        preference("z", "z", None, outcome=Outcome.LOW_MASS),
    )
    first, second, third = person("1", ai, 1.0), person("2", ai, 0.5), person("3", unread, 0.0)
    world.add(ai, other, unread)
    assert world.ids("preference_pairs") == {ai.record_id, other.record_id}
    world.add(first)
    assert world.ids("preference_pairs") == {first.record_id, other.record_id}
    world.add(second, third)
    assert world.ids("preference_pairs") == {second.record_id, other.record_id, third.record_id}
    standing = dict(world.rows("SELECT record_id::VARCHAR, overridden_by::VARCHAR FROM preference_labels"))
    assert standing == {
        ai.record_id: second.record_id, first.record_id: second.record_id, second.record_id: None, other.record_id: None,
        third.record_id: None,
    }  # fmt: skip


def test_an_override_is_new_to_the_cursor_and_leaves_old_batches_as_they_were(world):
    labels = [preference(name, name, 0.2) for name in "xyz"]
    world.add(*labels)
    chosen = waiting(world.store, "reward", Standing(), most=10)
    keys = [row.key for row in chosen]
    drawn = rows_of(world.store, "reward", keys)
    manifest = manifest_of("reward", 1, drawn, [], Standing(), chosen, run_id="r", seed=0, settings={})
    override = person("1", labels[1], 1.0)
    world.add(override)
    assert rebuild(world.store, manifest).rows[1]["p_a"] == 0.2
    after = Standing(cursors={("reward", ""): manifest.commit_seq_to})
    assert [row.key for row in waiting(world.store, "reward", after, most=10)] == [override.record_id]
    assert content_hash(rows_of(world.store, "reward", keys)) == manifest.content_hash
    assert len(waiting(world.store, "reward", Standing(), most=10)) == 3  # drawn anew, no pair counts twice


def test_demonstrations_train_and_have_a_story_without_a_prompt_to_answer(world):
    labelled = preference("b", "compared", 1.0, label_source=LabelSource.HUMAN)
    world.add(prompt("asked"), demonstration("a", "shown", source="helpful"), demonstration("c", "asked"), labelled)
    found = world.rows("SELECT source, label_source, end_reason, rounds, completion FROM sft_examples ORDER BY 1")
    assert found == [("helpful", "HUMAN", None, 0, "a answer"), ("test", "HUMAN", None, 0, "c answer")]
    stories = world.rows("SELECT prompt, source, len(demonstrations), len(preferences) FROM traces ORDER BY 1")
    assert stories == [("asked", "test", 1, None), ("compared", "test", None, 1), ("shown", "helpful", 1, None)]
    assert world.rows("SELECT count(*) FROM prompts") == [(1,)]
