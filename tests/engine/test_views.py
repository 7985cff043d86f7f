"""The views, on records whose answers were counted by hand: nothing held out trains, and no pair counts twice."""

import pytest

from consumers.sink import Sink
from engine.store import Store
from engine.worker import outgoing
from schemas import ids
from schemas.records import (
    Candidate,
    ChainEnd,
    Critique,
    Demonstration,
    FinishReason,
    LabelSource,
    Outcome,
    Preference,
    Prompt,
    Response,
    Sampling,
    Split,
    Turn,
)
from trainer.batches import Standing, candidates, content_hash, manifest_of, rebuild, rows_of


class World:
    """A log and its database; records are made by hand, with ids that follow from their names."""

    def __init__(self, bus, store):
        self.bus, self.store, self.sink = bus, store, Sink(bus, store, max_wait_s=0.01)

    def add(self, *records):
        """Publish records and let the sink write them, so that they come in this order in the commit sequence."""
        for record in records:
            self.bus.publish([outgoing(record)])
            while not self.sink.step():
                pass

    def rows(self, sql):
        return self.store.query(sql).rows

    def ids(self, view):
        return {str(key) for (key,) in self.rows(f"SELECT record_id FROM {view}")}


@pytest.fixture
def world(bus, tmp_path):
    made = World(bus, Store(tmp_path / "charter.duckdb"))
    yield made
    made.sink.close()


def base(kind, name, asked, /, epoch=0, split=Split.TRAIN, **more):
    turns = [Turn(role="user", content=asked)]
    return {
        "record_id": ids.digest(kind, name), "prompt_id": ids.prompt_id(turns, epoch), "run_id": "r", "stage": kind,
        "turns": turns, "source": "test", "split": split, "epoch": epoch, **more
    }  # fmt: skip


def prompt(text, **more):
    return Prompt(**base("produce", [text, *map(str, more.values())], text, **more))


def preference(name, text, p_a, **more):
    values = {"outcome": Outcome.OK, "a": f"{name} a", "b": f"{name} b", "pairing": "candidates", "p_a": p_a} | more
    return Preference(**base("judge", name, text, **values))


def person(name, of, p_a):
    label = {"record_id": ids.digest("label", name), "parent_ids": [of.record_id], "p_a": p_a, "stage": "label"}
    return of.model_copy(update=label | {"label_source": LabelSource.HUMAN, "outcome": Outcome.OK})


def demonstration(name, text, **more):
    return Demonstration(**base("produce", name, text, completion=f"{name} answer", **more))


def chain_end(name, text, **more):
    values = {"response_id": ids.digest("x"), "first_answer": "f", "first_stopped": True, "number": 0, "text": "f"}
    ended = {"final": True, "ended": ChainEnd.SATISFIED, "final_text": f"{name} final", "text_stopped": True}
    return Critique(**base("critique", name, text, **values, **ended, **more))


def response(text, **more):
    answer = Candidate(index=0, text="t", token_ids=[1], logprobs=[-1.0], finish_reason=FinishReason.STOP, policy_version=0)
    sampling = Sampling(temperature=1.0, top_p=1.0, max_tokens=8)
    values = {"candidates": [answer], "prompt_token_ids": [1], "sampling": sampling}
    return Response(**base("respond", [text, *map(str, more.values())], text, **values, **more))


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
    assert world.rows("SELECT a FROM preference_pairs") == [("mine a",)]
    excluded = world.rows("SELECT turns[1].content, excluded_because FROM rollouts ORDER BY 1")
    assert excluded == [("again", "held out"), ("kept", "held out"), ("mine", None), ("moved", "held out")]
    assert world.rows("SELECT a FROM held_out_pairs") == [("kept a",)]


def test_a_label_of_a_prompt_that_has_trained_measures_nothing(world):
    world.add(prompt("first"), preference("first", "first", 0.8), prompt("first", **HELD_OUT))
    world.add(preference("later", "first", 0.8, **HELD_OUT))
    assert world.rows("SELECT a FROM preference_pairs") == [("first a",)]  # what was eligible stays eligible
    assert world.rows("SELECT a FROM held_out_pairs") == []


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
    chosen, _ = candidates(world.store, "reward", Standing(), limit=10)
    drawn = rows_of(world.store, "reward", chosen)
    manifest = manifest_of("reward", 1, drawn, [], Standing(), run_id="r", seed=0, settings={})
    override = person("1", labels[1], 1.0)
    world.add(override)
    assert rebuild(world.store, manifest).rows[1]["p_a"] == 0.2
    after = Standing(cursors=(("reward", manifest.commit_seq_to),))
    assert candidates(world.store, "reward", after, limit=10)[0] == [override.record_id]
    assert content_hash("reward", rows_of(world.store, "reward", chosen), []) == manifest.content_hash
    assert len(candidates(world.store, "reward", Standing(), limit=10)[0]) == 3  # drawn anew, no pair counts twice


def test_demonstrations_train_and_have_a_story_without_a_prompt_to_answer(world):
    labelled = preference("b", "compared", 1.0, label_source=LabelSource.HUMAN)
    world.add(prompt("asked"), demonstration("a", "shown", source="helpful"), demonstration("c", "asked"), labelled)
    found = world.rows("SELECT source, label_source, ended, rounds, completion FROM sft_examples ORDER BY 1")
    assert found == [("helpful", "HUMAN", None, 0, "a answer"), ("test", "HUMAN", None, 0, "c answer")]
    stories = world.rows("SELECT prompt, source, len(demonstrations), len(preferences) FROM stories ORDER BY 1")
    assert stories == [("asked", "test", 1, None), ("compared", "test", None, 1), ("shown", "helpful", 1, None)]
    assert world.rows("SELECT count(*) FROM prompts") == [(1,)]
