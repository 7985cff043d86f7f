"""Records with ids derived from names, and a database of such records without an event log."""

import shutil

from constitutions.loader import load_constitution
from consumers.grade import COMPLETION, GradeStage
from consumers.graders.refusal import RefusalGrader
from consumers.sink import to_arrow_tables
from engine.bus.port import ConsumerRecord
from engine.commit_history import begin_session
from engine.models.interface import require_results
from engine.store import Store
from engine.tables import build_insert_statement
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
    SuiteItem,
    Verdict,
)
from schemas.topics import TOPICS
from tests.support.shared import make_once


def copy_empty_database(path):
    """Copy a database without rows, unless there is a database. To create its views takes much longer."""
    if path.exists() or Store(path).list_wal_paths():
        return
    empty = make_once("empty-database", lambda folder: Store(folder / "charter.duckdb").create_schema())
    path.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(empty / "charter.duckdb", path)


class RecordDatabase:
    """A database; added records get commit sequence numbers in the order in which they are added."""

    def __init__(self, path):
        self.store, self.next_commit_seq = Store(path), 0
        copy_empty_database(path)
        with self.store.open_write_session() as connection:
            begin_session(connection)
            connection.execute("UPDATE raw.sink_state SET complete_seq = 0")

    def add(self, *records):
        with self.store.open_write_session() as connection:
            messages = [
                ConsumerRecord(record.topic, 0, self.next_commit_seq + i, None, None, (), 0) for i, record in enumerate(records)
            ]
            for topic, table in to_arrow_tables(list(zip(records, messages, strict=True)), self.next_commit_seq).items():
                connection.register("batch", table)
                connection.execute(build_insert_statement(TOPICS[topic]))
            self.next_commit_seq += len(records)
            connection.execute("UPDATE raw.sink_state SET next_seq = ?", [self.next_commit_seq])

    def query_rows(self, sql):
        return self.store.query(sql).rows

    def query_records(self, sql):
        return self.store.query_dicts(sql)

    def query_record_ids(self, view):
        return {str(key) for (key,) in self.query_rows(f"SELECT record_id FROM {view}")}


def make_record_fields(kind, name, prompt_text, /, epoch=0, split=Split.TRAIN, **more):
    messages = [ChatMessage(role="user", content=prompt_text)]
    return {
        "record_id": ids.compute_id(kind, name), "prompt_id": ids.compute_prompt_id(messages, epoch), "run_id": "r", "stage": kind,
        "messages": messages, "source": "test", "split": split, "epoch": epoch, **more
    }  # fmt: skip


def make_prompt(text, **more):
    return Prompt(**make_record_fields("produce", [text, *map(str, more.values())], text, **more))


def make_preference(name, text, p_a, **more):
    values = {
        "outcome": Outcome.OK,
        "response_a": f"{name} a",
        "response_b": f"{name} b",
        "pairing": "completions",
        "p_a": p_a,
    } | more
    return Preference(**make_record_fields("judge", name, text, **values))


def make_human_label(name, preference, p_a):
    label = {"record_id": ids.compute_id("label", name), "parent_ids": [preference.record_id], "p_a": p_a, "stage": "label"}
    return preference.model_copy(update=label | {"label_source": LabelSource.HUMAN, "outcome": Outcome.OK})


def make_demonstration(name, text, **more):
    return Demonstration(**make_record_fields("produce", name, text, completion=f"{name} answer", **more))


def make_chain_end(name, text, **more):
    values = {
        "response_id": ids.compute_id("x"),
        "initial_response": "f",
        "initial_finish_reason": FinishReason.STOP,
        "round": 0,
        "response": "f",
    }
    end = {
        "final": True,
        "end_reason": EndReason.SATISFIED,
        "final_response": f"{name} final",
        "finish_reason": FinishReason.STOP,
    }
    return Critique(**make_record_fields("critique", name, text, **values, **end, **more))


def make_response(text, **more):
    completion = Completion(
        index=0, text="t", token_ids=[1], logprobs=[-1.0], finish_reason=FinishReason.STOP, policy_version=0
    )
    sampling = Sampling(temperature=1.0, top_p=1.0, max_tokens=8)
    values = {"completions": [completion], "prompt_token_ids": [1], "sampling": sampling}
    return Response(**make_record_fields("respond", [text, *map(str, more.values())], text, **values, **more))


def make_suite_response(item, text, suite="xstest", subset="safe", transform="", policy_version=0, **more):
    """Return a response of a policy to a prompt of a suite, in the run of this policy. The text of the prompt is that of the item."""
    messages = [ChatMessage(role="user", content=item)]
    place = SuiteItem(suite=suite, item=item, subset=subset, transform=transform)
    completion = Completion(
        index=0,
        text=text,
        token_ids=[1, 2],
        logprobs=[-1.0, -1.0],
        finish_reason=FinishReason.STOP,
        policy_version=policy_version,
    )
    values = {
        "prompt_id": ids.compute_suite_prompt_id(suite, item, transform, messages), "run_id": f"eval-policy-{policy_version}",
        "source": suite, "suite_item": place, "policy_version": policy_version, "completions": [completion], "split": Split.SUITE,
    } | more  # fmt: skip
    name = [item, suite, transform, policy_version, text]
    return make_response(item).model_copy(update={"record_id": ids.compute_id("suite response", name), **values})


_PROVENANCE = {
    "constitution": ConstitutionRef(name="default", version="1.0.0", hash="c0ffee"),
    "model": ModelRef(id="critic", revision="v"),
    "preset": "charter",
}


def make_counted_critique(name, prompt_text, verdict, p_flawed, text, round=0, principle="harm", **more):
    """Return a critique of a response under one principle; for a revision, the principle that it was revised under."""
    principle_verdict = PrincipleVerdict(principle_id=principle, verdict=verdict, p_flawed=p_flawed, option_mass=0.9)
    rounds = [Round(round=n + 1, principle_id=principle, critique="c", revision="r") for n in range(round)]
    chain = {
        "response_id": ids.compute_id("response", name),
        "initial_response": text,
        "initial_finish_reason": FinishReason.STOP,
        "finish_reason": FinishReason.STOP,
    }
    values = {
        "verdict": verdict,
        "p_flawed": p_flawed,
        "verdicts": [principle_verdict],
        "rounds": rounds,
        "round": round,
        "response": text,
    }
    return Critique(**make_record_fields("critique", [name, round], prompt_text, **_PROVENANCE, **chain, **values, **more))


def make_revision(
    name, prompt_text, before, after, similarity, rejection_reason=RejectionReason.NONE, round=1, principle="harm"
):
    chain = {
        "response_id": ids.compute_id("response", name),
        "initial_response": before,
        "initial_finish_reason": FinishReason.STOP,
        "finish_reason": FinishReason.STOP,
    }
    values = {
        "previous_response": before,
        "response": after,
        "similarity": similarity,
        "rejection_reason": rejection_reason,
        "round": round,
        "critique": "c",
    }
    return Revision(
        **make_record_fields("revise", [name, round], prompt_text, **_PROVENANCE, **chain, **values, principle_id=principle)
    )


def make_judged_preference(name, prompt_text, a, b, forward, backward, principle="care", **more):
    """Return a pair that was judged by one principle in both orders."""
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
    position = {
        "position_gap": abs(forward - backward),
        "option_mass": 0.9,
        "position_flip": (forward > 0.5) != (backward > 0.5),
    }
    return make_preference(name, prompt_text, (forward + backward) / 2, **_PROVENANCE, **values, **position, **more)


def _make_unjudged_preference(name, prompt_text, outcome, principle="care"):
    values = {"response_a": "aa", "response_b": "b", "principle_id": principle, "outcome": outcome}
    return make_preference(name, prompt_text, None, **_PROVENANCE, **values)


def add_counted_run(database):
    """Add a small run whose statistics tests/engine/test_stats_views.py states, counted by hand."""
    database.add(*(make_prompt(text) for text in ("one", "two", "three", "four")))
    # Four initial responses under one principle: two flawed, one clean, one without a verdict.
    database.add(
        make_counted_critique("1", "one", Verdict.FLAWED, 0.9, "x" * 10),
        make_counted_critique("2", "two", Verdict.FLAWED, 0.7, "x" * 10),
        make_counted_critique(
            "3", "three", Verdict.CLEAN, 0.2, "xx", final=True, end_reason=EndReason.SATISFIED, final_response="xx"
        ),
        make_counted_critique("4", "four", Verdict.LOW_MASS, None, "x"),
    )
    # Three revisions: one is accepted and 4 characters longer, one is rejected and 2 shorter, one is a copy.
    end = {"final": True, "round": 1}
    database.add(
        make_revision("1", "one", "x" * 10, "y" * 14, 0.5),
        make_revision("2", "two", "x" * 10, "y" * 8, 0.1),
        make_revision("4", "four", "x", "x", 1.0, RejectionReason.COPY),
        make_counted_critique(
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
        make_counted_critique(
            "2", "two", Verdict.FLAWED, 0.6, "y" * 8, p_better=0.3, end_reason=EndReason.LOST, final_response="x" * 10, **end
        ),
    )
    # Five judgments by `care` (one refused, one position flip), two by `honest` (a tie and one without a label).
    first, second = (
        make_judged_preference("1", "one", "aaaa", "b", 0.9, 0.7),
        make_judged_preference("3", "three", "a", "bbbb", 0.2, 0.4),
    )
    database.add(
        first,
        make_judged_preference("2", "two", "aa", "b", 0.9, 0.3),
        second,
        make_judged_preference("4", "four", "aaa", "b", 0.8, 0.6),
        _make_unjudged_preference("5", "four", Outcome.REFUSED),
        make_judged_preference("6", "one", "a", "b", 0.6, 0.4, principle="honest"),
        _make_unjudged_preference("7", "two", Outcome.LOW_MASS, principle="honest"),
    )
    # A human label agrees with the first and overrides the second; a file holds the flipped pair with its responses swapped.
    database.add(
        make_human_label("1", first, 1.0),
        make_human_label("2", second, 1.0),
        make_demonstration("shown", "five", source="helpful"),
    )
    values = {"response_a": "b", "response_b": "aa", "label_source": LabelSource.HUMAN, "pairing": "human"}
    database.add(make_preference("file", "two", 0.0, **values))


def make_grades(*responses):
    """Return the refusal grades of all completions of the responses."""
    stage = GradeStage([RefusalGrader()], [COMPLETION], load_constitution("default"))
    return [grade for grades in require_results(stage(responses)) for grade in grades]
