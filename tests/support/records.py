"""Records made by hand, with ids that follow from their names, and a database of them without a log."""

from consumers.sink import tables_of
from engine.bus.port import Message
from engine.store import Store
from engine.tables import insert_statement
from schemas import ids
from schemas.records import (
    ChatMessage,
    Completion,
    ConstitutionRef,
    Critique,
    Demonstration,
    EndReason,
    FinishReason,
    LabelSource,
    ModelRef,
    Outcome,
    Preference,
    PrincipleVerdict,
    PrincipleVote,
    Prompt,
    RejectionReason,
    Response,
    Revision,
    Round,
    Sampling,
    Split,
    Verdict,
)
from schemas.topics import TOPICS


class World:
    """A database; what is added comes in that order in the commit sequence."""

    def __init__(self, path):
        self.store, self.seq = Store(path), 0
        self.store.prepare()

    def add(self, *records):
        with self.store.writing() as connection:
            messages = [Message(record.topic, 0, self.seq + i, None, None, (), 0) for i, record in enumerate(records)]
            for topic, table in tables_of(list(zip(records, messages, strict=True)), self.seq).items():
                connection.register("batch", table)
                connection.execute(insert_statement(TOPICS[topic]))
            self.seq += len(records)
            connection.execute("UPDATE raw.sink_state SET next_seq = ?", [self.seq])

    def rows(self, sql):
        return self.store.query(sql).rows

    def records(self, sql):
        return self.store.records(sql)

    def ids(self, view):
        return {str(key) for (key,) in self.rows(f"SELECT record_id FROM {view}")}


def base(kind, name, asked, /, epoch=0, split=Split.TRAIN, **more):
    messages = [ChatMessage(role="user", content=asked)]
    return {
        "record_id": ids.digest(kind, name), "prompt_id": ids.prompt_id(messages, epoch), "run_id": "r", "stage": kind,
        "messages": messages, "source": "test", "split": split, "epoch": epoch, **more
    }  # fmt: skip


def prompt(text, **more):
    return Prompt(**base("produce", [text, *map(str, more.values())], text, **more))


def preference(name, text, p_a, **more):
    values = {
        "outcome": Outcome.OK,
        "response_a": f"{name} a",
        "response_b": f"{name} b",
        "pairing": "completions",
        "p_a": p_a,
    } | more
    return Preference(**base("judge", name, text, **values))


def person(name, of, p_a):
    label = {"record_id": ids.digest("label", name), "parent_ids": [of.record_id], "p_a": p_a, "stage": "label"}
    return of.model_copy(update=label | {"label_source": LabelSource.HUMAN, "outcome": Outcome.OK})


def demonstration(name, text, **more):
    return Demonstration(**base("produce", name, text, completion=f"{name} answer", **more))


def chain_end(name, text, **more):
    values = {
        "response_id": ids.digest("x"),
        "initial_response": "f",
        "initial_finish_reason": FinishReason.STOP,
        "round": 0,
        "response": "f",
    }
    ended = {
        "final": True,
        "end_reason": EndReason.SATISFIED,
        "final_response": f"{name} final",
        "finish_reason": FinishReason.STOP,
    }
    return Critique(**base("critique", name, text, **values, **ended, **more))


def response(text, **more):
    answer = Completion(index=0, text="t", token_ids=[1], logprobs=[-1.0], finish_reason=FinishReason.STOP, policy_version=0)
    sampling = Sampling(temperature=1.0, top_p=1.0, max_tokens=8)
    values = {"completions": [answer], "prompt_token_ids": [1], "sampling": sampling}
    return Response(**base("respond", [text, *map(str, more.values())], text, **values, **more))


MADE_BY = {
    "constitution": ConstitutionRef(name="default", version="1.0.0", hash="c0ffee"),
    "model": ModelRef(id="critic", revision="v"),
    "preset": "charter",
}


def critique(name, asked, verdict, p_flawed, text, round=0, principle="harm", **more):
    """A verdict on a text under one principle; of a revision under the principle that it was made by."""
    said = PrincipleVerdict(principle_id=principle, verdict=verdict, p_flawed=p_flawed, option_mass=0.9)
    rounds = [Round(round=n + 1, principle_id=principle, critique="c", revision="r") for n in range(round)]
    chain = {
        "response_id": ids.digest("response", name),
        "initial_response": text,
        "initial_finish_reason": FinishReason.STOP,
        "finish_reason": FinishReason.STOP,
    }
    values = {"verdict": verdict, "p_flawed": p_flawed, "verdicts": [said], "rounds": rounds, "round": round, "response": text}
    return Critique(**base("critique", [name, round], asked, **MADE_BY, **chain, **values, **more))


def revision(name, asked, before, after, alike, rejection_reason=RejectionReason.NONE, round=1, principle="harm"):
    chain = {
        "response_id": ids.digest("response", name),
        "initial_response": before,
        "initial_finish_reason": FinishReason.STOP,
        "finish_reason": FinishReason.STOP,
    }
    values = {
        "previous_response": before,
        "response": after,
        "similarity": alike,
        "rejection_reason": rejection_reason,
        "round": round,
        "critique": "c",
    }
    return Revision(**base("revise", [name, round], asked, **MADE_BY, **chain, **values, principle_id=principle))


def judged(name, asked, a, b, forward, backward, principle="care", **more):
    """A judgement by one principle in both orders."""
    vote = PrincipleVote(
        principle_id=principle,
        p_forward=forward,
        p_backward=backward,
        option_mass_forward=0.9,
        option_mass_backward=0.9,
        outcome=Outcome.OK,
    )
    values = {
        "response_a": a,
        "response_b": b,
        "votes": [vote],
        "p_forward": forward,
        "p_backward": backward,
        "principle_id": principle,
    }
    figures = {
        "position_gap": abs(forward - backward),
        "option_mass": 0.9,
        "position_flip": (forward > 0.5) != (backward > 0.5),
    }
    return preference(name, asked, (forward + backward) / 2, **MADE_BY, **values, **figures, **more)


def unjudged(name, asked, outcome, principle="care"):
    values = {"response_a": "aa", "response_b": "b", "principle_id": principle, "outcome": outcome}
    return preference(name, asked, None, **MADE_BY, **values)


def known(world):
    """A small run whose figures tests/engine/test_figures.py has counted by hand."""
    world.add(*(prompt(text) for text in ("one", "two", "three", "four")))
    # Four first answers under one principle: two flawed, one clean, one that the critic could not say.
    world.add(
        critique("1", "one", Verdict.FLAWED, 0.9, "x" * 10),
        critique("2", "two", Verdict.FLAWED, 0.7, "x" * 10),
        critique("3", "three", Verdict.CLEAN, 0.2, "xx", final=True, end_reason=EndReason.SATISFIED, final_response="xx"),
        critique("4", "four", Verdict.LOW_MASS, None, "x"),
    )
    # Three revisions: one wins and is 4 characters longer, one loses and is 2 shorter, one is a copy.
    end = {"final": True, "round": 1}
    world.add(
        revision("1", "one", "x" * 10, "y" * 14, 0.5),
        revision("2", "two", "x" * 10, "y" * 8, 0.1),
        revision("4", "four", "x", "x", 1.0, RejectionReason.COPY),
        critique(
            "1",
            "one",
            Verdict.CLEAN,
            0.1,
            "y" * 14,
            p_better=0.8,
            end_reason=EndReason.SATISFIED,
            final_response="y" * 14,
            **end,
        ),
        critique(
            "2", "two", Verdict.FLAWED, 0.6, "y" * 8, p_better=0.3, end_reason=EndReason.LOST, final_response="x" * 10, **end
        ),
    )
    # Five judgements by `care` (one refused, one flip), two by `honest` (a tie and one without a label).
    first, second = judged("1", "one", "aaaa", "b", 0.9, 0.7), judged("3", "three", "a", "bbbb", 0.2, 0.4)
    world.add(
        first,
        judged("2", "two", "aa", "b", 0.9, 0.3),
        second,
        judged("4", "four", "aaa", "b", 0.8, 0.6),
        unjudged("5", "four", Outcome.REFUSED),
        judged("6", "one", "a", "b", 0.6, 0.4, principle="honest"),
        unjudged("7", "two", Outcome.LOW_MASS, principle="honest"),
    )
    # A person agrees with the first, overrides the second, and a file holds the pair of the flip the other way round.
    world.add(person("1", first, 1.0), person("2", second, 1.0), demonstration("shown", "five", source="helpful"))
    values = {"response_a": "b", "response_b": "aa", "label_source": LabelSource.HUMAN, "pairing": "human"}
    world.add(preference("file", "two", 0.0, **values))
