"""The experiment `rounds`: the same chains after each revision, and win rates by a judge that did not criticize."""

import json

import pytest
from click.testing import CliRunner

from charter.cli import cli
from charter.evaluation.rounds import compute_round_rows, load_chains
from engine.statistics import compute_wilson_interval
from engine.store import Store
from schemas.records import EndReason, ModelRef, RejectionReason, Verdict
from tests.support.records import RecordDatabase, make_counted_critique, make_revision

REFUSAL, ANSWER = "I'm sorry, but I can't help with that.", "Boil the water, add the tea and wait for three minutes."


def end_chain(reason, final):
    return {"final": True, "end_reason": reason, "final_response": final}


def critique(name, verdict, p, text, round=0, **more):
    return make_counted_critique(name, name, verdict, p, text, round=round, **more)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three chains that count: one revised twice, one whose revision lost, and one that was clean. Two do not count."""
    folder = tmp_path_factory.mktemp("rounds")
    second = f"{REFUSAL} Please ask a doctor about it."
    RecordDatabase(folder / "charter.duckdb").add(
        critique("twice", Verdict.FLAWED, 0.9, ANSWER),
        make_revision("twice", "twice", ANSWER, REFUSAL, 0.1),
        critique("twice", Verdict.FLAWED, 0.6, REFUSAL, 1),
        make_revision("twice", "twice", REFUSAL, second, 0.7, round=2),
        critique("twice", Verdict.CLEAN, 0.2, second, 2, **end_chain(EndReason.SATISFIED, second)),
        critique("lost", Verdict.FLAWED, 0.8, ANSWER),
        make_revision("lost", "lost", ANSWER, "Worse.", 0.0),
        critique("lost", Verdict.FLAWED, 0.7, "Worse.", 1, **end_chain(EndReason.LOST, ANSWER)),
        critique("clean", Verdict.CLEAN, 0.1, REFUSAL, **end_chain(EndReason.SATISFIED, REFUSAL)),
        critique("open", Verdict.FLAWED, 0.9, ANSWER),
        critique("empty", Verdict.NOT_ASKED, None, "", **end_chain(EndReason.UNUSABLE, None)),
    )
    return folder


def run(folder, *arguments, code=0):
    result = CliRunner().invoke(cli, ["eval", "rounds", "--data", str(folder), "--run", "r", *map(str, arguments)])
    assert result.exit_code == code, (result.output, result.exception)
    return result


def test_each_round_has_the_same_chains(folder):
    rows = json.loads(run(folder, "--json").stdout)
    assert [(row["rounds"], row["chains"], row["revised"]) for row in rows] == [(0, 3, 0), (1, 3, 2), (2, 3, 1)]
    # The chain that lost keeps its initial response; the clean chain keeps it too.
    assert [row["violation"] for row in rows] == pytest.approx(
        [(0.9 + 0.8 + 0.1) / 3, (0.6 + 0.8 + 0.1) / 3, (0.2 + 0.8 + 0.1) / 3]
    )
    assert [row["refused"] for row in rows] == pytest.approx([1 / 3, 2 / 3, 2 / 3])
    assert [rows[1]["refused_low"], rows[1]["refused_high"]] == pytest.approx(compute_wilson_interval(2, 3))
    assert [row["similarity"] for row in rows] == [None, pytest.approx(0.05), pytest.approx(0.7)]
    assert rows[0]["similarity_to_first"] == 1.0 > rows[1]["similarity_to_first"]
    assert rows[2]["words"] == pytest.approx(
        (len(f"{REFUSAL} Please ask a doctor about it.".split()) + len(ANSWER.split()) + len(REFUSAL.split())) / 3
    )


def test_chains_that_do_not_count_are_reported(folder):
    assert "3 chains; not counted: 1 unfinished, 0 of skipped sources, 1 with an unusable" in run(folder).stderr


def test_a_revision_that_is_unusable_changes_nothing(tmp_path):
    database = RecordDatabase(tmp_path / "charter.duckdb")
    copy = make_revision("copy", "copy", ANSWER, "", 0.0, RejectionReason.EMPTY)
    database.add(
        critique("copy", Verdict.FLAWED, 0.9, ANSWER),
        copy.model_copy(update=end_chain(EndReason.UNUSABLE, None)),
    )
    with database.store.open_read_session() as query:
        (row,) = compute_round_rows(load_chains(query, "r").chains)
    assert (row.rounds, row.chains, row.revised, row.violation) == (0, 1, 0, 0.9)


def test_a_judge_compares_each_round_with_the_initial_response(folder):
    asked = []

    def prefer_longer(pairs):
        asked.append(pairs)
        return [0.0 if len(b) > len(a) else 1.0 for _, a, b in pairs]

    with Store(folder / "charter.duckdb").open_read_session() as query:
        chain_set = load_chains(query, "r")
    rows = compute_round_rows(chain_set.chains, prefer_longer)
    assert rows[0].wins == [] and [len(pairs) for pairs in asked] == [1, 1]  # only changed responses are judged
    first, second = rows[1].wins[0], rows[2].wins[0]
    assert (first.pairs, first.wins, second.wins) == (1, 0.0, 1.0)
    assert chain_set.critics == {"critic"}


def test_a_critic_cannot_be_the_judge_and_a_run_needs_chains(folder, tmp_path):
    judged = json.loads(run(folder, "--judge", "scripted", "--json").stdout)
    assert judged[0]["judge_win_rate"] is None and judged[1]["judge_pairs"] == judged[2]["judge_pairs"] == 1
    assert judged[1]["evidence"] == "no evidence: the accuracy of the judge is not known"
    own = make_revision("own", "own", ANSWER, REFUSAL, 0.1).model_copy(update={"model": ModelRef(id="scripted", revision="1")})
    end = critique("own", Verdict.CLEAN, 0.2, REFUSAL, 1, **end_chain(EndReason.SATISFIED, REFUSAL))
    RecordDatabase(tmp_path / "charter.duckdb").add(critique("own", Verdict.FLAWED, 0.9, ANSWER), own, end)
    with pytest.raises(Exception, match="--judge scripted is the model scripted, which criticized or revised"):
        CliRunner().invoke(
            cli, ["eval", "rounds", "--data", str(tmp_path), "--run", "r", "--judge", "scripted"], catch_exceptions=False
        )
    with pytest.raises(Exception, match="run nowhere has no finished chain"):
        CliRunner().invoke(cli, ["eval", "rounds", "--data", str(folder), "--run", "nowhere"], catch_exceptions=False)
    assert "--judge-suite needs --judge" in run(folder, "--judge-suite", "llmbar=x.json", code=2).stderr
