"""Training data out: what trainers read, nothing held out among it, a card that says where it came from; labels by people."""

import json
import re
from collections import Counter

import pytest
from click.testing import CliRunner

from charter.cli import cli
from charter.connect import connect_bus, open_store
from charter.export import dataset
from charter.pipeline import make_host
from engine.errors import UsageError
from engine.settings import load_settings
from schemas.records import EndReason, ModelRef, Outcome, Split
from tests.support.records import (
    RecordDatabase,
    make_chain_end,
    make_demonstration,
    make_human_label,
    make_preference,
    make_prompt,
    make_response,
)
from tests.support.records import make_judged_preference as judgement

HOSTILE = "</script> | `x` \x1b[31m\u202e {{}} \U0001f600 " + "long " * 500
HELD_OUT = {"split": Split.EVAL}


@pytest.fixture
def world(tmp_path):
    """Chains, labels and demonstrations of trained and held-out prompts, with a hostile text and labels that were none."""
    world = RecordDatabase(tmp_path / "data" / "charter.duckdb")
    world.add(make_prompt("one"), make_prompt("two"), make_prompt("out", **HELD_OUT))
    world.add(
        make_chain_end("one", "one"),
        make_chain_end("two", "two").model_copy(update={"final_response": HOSTILE}),
        make_chain_end("out", "out", **HELD_OUT),
    )
    world.add(
        make_chain_end("bad", "two").model_copy(update={"end_reason": EndReason.UNUSABLE}), make_demonstration("shown", "one")
    )
    first, second = make_preference("one", "one", 0.8), make_preference("two", "two", 0.3)
    world.add(first, second, make_preference("tie", "two", 0.5), make_preference("out", "out", 0.9, **HELD_OUT))
    world.add(make_preference("none", "one", None, outcome=Outcome.LOW_MASS), make_human_label("1", second, 1.0))
    return world


def call(tmp_path, *arguments, code=0, stdin=None):
    done = CliRunner().invoke(cli, [*map(str, arguments), "--data", str(tmp_path / "data")], input=stdin)
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == code, done.output
    return done.output


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


def test_every_form_is_what_the_views_say(world, tmp_path):
    assert "train: 3 rows" in call(tmp_path, "export", "sft", tmp_path / "sft")
    assert {row["completion"][0]["content"] for row in lines(tmp_path / "sft/data/train.jsonl")} == {
        "one final",
        HOSTILE,
        "shown answer",
    }
    assert [row["completion"][0]["content"] for row in lines(tmp_path / "sft/data/eval.jsonl")] == ["out final"]

    call(tmp_path, "export", "preference", tmp_path / "pairs")
    rows = {row["chosen"][0]["content"]: row for row in lines(tmp_path / "pairs/data/train.jsonl")}
    assert set(rows) == {"one a", "two a"}  # of "two" the person's word stands, not the judge's 0.3; a tie has no winner
    assert rows["one a"]["p_chosen"] == pytest.approx(0.8) and rows["one a"]["rejected"][0]["content"] == "one b"
    assert (rows["two a"]["p_chosen"], rows["two a"]["label_source"]) == (1.0, "HUMAN")
    assert rows["one a"]["prompt"] == [{"role": "user", "content": "one"}]

    call(tmp_path, "export", "kto", tmp_path / "kto")
    wanted = {row["completion"][0]["content"]: row["label"] for row in lines(tmp_path / "kto/data/train.jsonl")}
    assert wanted == {"one a": True, "one b": False, "two a": True, "two b": False}


def test_pages_meet(world, tmp_path, monkeypatch):
    whole = lines_of(tmp_path, "whole")
    monkeypatch.setattr(dataset, "PAGE_SIZE", 1)
    assert lines_of(tmp_path, "by one") == whole
    assert lines_of(tmp_path, "two", "--limit", "2") == whole[:2]
    assert lines_of(tmp_path, "source", "--source", "test") == whole


def lines_of(tmp_path, name, *more):
    call(tmp_path, "export", "sft", tmp_path / name, *more)
    return lines(tmp_path / name / "data" / "train.jsonl")


@pytest.mark.parametrize("form", dataset.EXPORT_FORMATS)
@pytest.mark.parametrize("more", [(), ("--parquet",)])
def test_datasets_and_trl_read_it(world, tmp_path, form, more):
    from datasets import load_dataset
    from trl.data_utils import is_conversational, maybe_unpair_preference_dataset

    call(tmp_path, "export", form, tmp_path / "out", *more)
    found = load_dataset(str(tmp_path / "out"), cache_dir=str(tmp_path / "cache"))
    assert set(found) == {"train", "test"}
    row = found["train"][0]
    assert is_conversational(row) and row["prompt"][-1]["role"] == "user"
    needed = {"sft": {"completion"}, "preference": {"chosen", "rejected"}, "kto": {"completion", "label"}}[form]
    assert needed | {"prompt", "record_id"} <= set(row)
    if form == "preference":
        columns = [name for name in found["train"].column_names if name not in ("prompt", "chosen", "rejected")]
        assert len(maybe_unpair_preference_dataset(found["train"].remove_columns(columns))) == 2 * len(found["train"])


def test_the_card_says_where_it_came_from_and_what_is_left_out(world, tmp_path):
    call(tmp_path, "export", "preference", tmp_path / "pairs")
    card = (tmp_path / "pairs" / "README.md").read_text(encoding="utf-8")
    assert "| train | test | HUMAN | 1 |" in card and "| train | test | AI | 1 |" in card and "| eval | test | AI | 1 |" in card
    assert "| tie: no response is preferred | 1 |" in card
    assert "| replaced by a human label | 1 |" in card and re.search(r"gave no label: LOW\\_MASS \| 1 \|", card)
    call(tmp_path, "export", "sft", tmp_path / "sft")
    assert "| chain ended UNUSABLE | 1 |" in (tmp_path / "sft" / "README.md").read_text(encoding="utf-8")


def test_a_run_has_what_another_had_made_before(tmp_path):
    """A replay that comes to the same labels exports them, and the card names the models that answered and judged."""
    world = RecordDatabase(tmp_path / "data" / "charter.duckdb")
    answered = make_response("p").model_copy(update={"model": ModelRef(id="policy", revision="1")})
    one, two = (judgement(name, "p", "aa", "b", 0.9, 0.7, response_id=answered.record_id) for name in ("one", "two"))
    world.add(make_prompt("p"), answered, one, two, one.model_copy(update={"run_id": "again"}))
    call(tmp_path, "export", "preference", tmp_path / "again", "--run", "again")
    (row,) = lines(tmp_path / "again/data/train.jsonl")
    assert row["record_id"] == one.record_id
    assert (row["constitution"], row["constitution_hash"]) == ("default 1.0.0", "c0ffee")
    card = (tmp_path / "again" / "README.md").read_text(encoding="utf-8")
    assert "| respond | policy (1) | 1 |" in card and "| judge | critic (v) | 1 |" in card
    assert "| default 1.0.0 | c0ffee |" in card
    with pytest.raises(UsageError, match="nothing to export"):
        call(tmp_path, "export", "preference", tmp_path / "none", "--run", "absent")


def test_an_override_that_comes_meanwhile_takes_no_label_away(world):
    """What is exported is settled at the start: the judge's label, whose successor is not in it, or the successor."""
    form = dataset.EXPORT_FORMATS["preference"]
    choice, pages = dataset.select_commits(world.store, form, dataset.ExportSelection(), None)
    world.add(make_human_label("2", make_preference("one", "one", 0.8), 0.0))
    assert "one a" not in {
        row["response_a"] for row in world.query_records("SELECT response_a FROM preference_pairs WHERE label_source = 'AI'")
    }
    found = list(dataset.read_rows(world.store, form.source_view, pages["train"]))
    assert [row["commit_seq"] for row in found] == pages["train"][0] and pages["train"][0][-1] <= choice.max_commit_seq
    assert {row["response_a"]: row["p_a"] for row in found}["one a"] == 0.8


@pytest.mark.parametrize(("forward", "backward", "shown"), [(0.9, 0.7, (0.9, 0.7)), (0.1, 0.3, (0.7, 0.9))])
def test_the_orders_probabilities_are_of_the_chosen_answer(tmp_path, forward, backward, shown):
    """Shown first and second: of the chosen answer, whichever of the two it is."""
    RecordDatabase(tmp_path / "data" / "charter.duckdb").add(
        make_prompt("p"), judgement("j", "p", "aa", "b", forward, backward)
    )
    call(tmp_path, "export", "preference", tmp_path / "pairs")
    (row,) = lines(tmp_path / "pairs/data/train.jsonl")
    assert row["chosen"][0]["content"] == ("aa" if forward > 0.5 else "b") and row["p_chosen"] == pytest.approx(0.8)
    assert (row["p_chosen_shown_first"], row["p_chosen_shown_second"]) == pytest.approx(shown)


def test_what_is_there_is_kept(world, tmp_path):
    call(tmp_path, "export", "sft", tmp_path / "out")
    with pytest.raises(UsageError, match="--force"):
        call(tmp_path, "export", "sft", tmp_path / "out")
    call(tmp_path, "export", "kto", tmp_path / "out", "--force")
    assert "label" in lines(tmp_path / "out/data/train.jsonl")[0]
    (tmp_path / "mine" / "data").mkdir(parents=True)
    (tmp_path / "mine" / "README.md").write_text("somebody's own data set")
    with pytest.raises(UsageError, match="charter export did not write it"):
        call(tmp_path, "export", "sft", tmp_path / "mine", "--force")
    assert (tmp_path / "mine" / "README.md").read_text() == "somebody's own data set"
    with pytest.raises(UsageError, match="nothing to export"):
        call(tmp_path, "export", "sft", tmp_path / "empty", "--source", "absent")
    assert not (tmp_path / "empty").exists() and not list(tmp_path.glob(".*"))


# Labels by people


def given(tmp_path, count):
    """The database once the sink has written so many labels by people."""
    settings, _ = load_settings({"data.folder": str(tmp_path / "data"), "models.policy": "scripted"}, environment={})
    bus, store = connect_bus(settings), open_store(settings)
    sql = "SELECT count(*) FROM preferences WHERE label_source = 'HUMAN' AND stage = 'label'"
    with make_host(settings, bus, [], sink=True) as host:
        while store.query(sql).rows != [(count,)]:
            assert not host.failure_event.wait(0.05)
    bus.close()
    return store


@pytest.fixture
def judged(tmp_path):
    """Three labels of a judge: none, unsure, sure."""
    world = RecordDatabase(tmp_path / "data" / "charter.duckdb")
    labels = (
        make_preference("sure", "x", 0.9),
        make_preference("unsure", "x", 0.45),
        make_preference("no", "x", None, outcome=Outcome.TIMEOUT),
    )
    world.add(make_prompt("x"), *labels)
    return {name: label.record_id for name, label in zip(("sure", "unsure", "no"), labels, strict=True)}


def test_a_persons_word_is_a_new_record_that_stands(judged, tmp_path):
    assert "1 label published" in call(tmp_path, "label", judged["sure"][:13], "--prefer", "b")
    answers = [{"record_id": judged["no"], "prefer": "a"}, {"record_id": judged["unsure"], "prefer": "tie"}, {"prefer": "a"}]
    said = call(
        tmp_path, "label", "-", stdin="".join(json.dumps(line) + "\n" for line in answers).encode() + b"caf\xe9\n", code=1
    )
    assert "line 3" in said and "line 4" in said and "2 labels published; 2 lines are invalid" in said
    store = given(tmp_path, 3)
    standing = "FROM preferences SEMI JOIN preference_pairs USING (record_id)"
    stands = dict(store.query(f"SELECT parent_ids[1]::VARCHAR, p_a {standing}").rows)
    assert stands == {judged["sure"]: 0.0, judged["no"]: 1.0, judged["unsure"]: 0.5}
    assert store.query("SELECT count(*) FROM preferences WHERE label_source = 'AI'").rows == [(3,)]
    assert call(tmp_path, "label", judged["sure"], "--prefer", "a") and call(tmp_path, "label", judged["sure"], "--prefer", "b")
    store = given(tmp_path, 5)  # thought again, twice: the last word stands, though it was said before
    assert store.query(f"SELECT p_a {standing} WHERE parent_ids[1] = ?", [judged["sure"]]).rows == [(0.0,)]


def test_the_interview_asks_for_the_least_certain_first_and_hides_the_order(judged, tmp_path):
    said = call(tmp_path, "label", "--count", "2", stdin="1\nw\n2\n")
    assert said.index("no a") < said.index("unsure a") and "sure a" not in said.replace("unsure a", "")
    assert "2 labels published" in said
    store = given(tmp_path, 2)
    rows = store.query("SELECT response_a, p_a FROM preferences WHERE label_source = 'HUMAN' ORDER BY response_a").rows
    shown = {name: said.index(f"{name} a") < said.index(f"{name} b") for name in ("no", "unsure")}
    assert dict(rows) == {"no a": float(shown["no"]), "unsure a": float(not shown["unsure"])}
    assert "0 labels published" in call(tmp_path, "label", stdin="s\n")
    assert "0 labels published" in call(tmp_path, "label", stdin="q\n")


def test_an_interview_that_is_broken_off_keeps_what_was_given(judged, tmp_path):
    """The end of the input, as Ctrl-D types it; Ctrl-C comes as the same exception."""
    assert "1 label published" in call(tmp_path, "label", stdin="1\n")
    assert given(tmp_path, 1).query("SELECT count(*) FROM preferences WHERE label_source = 'HUMAN'").rows == [(1,)]


def test_only_pairs_of_a_run_are_asked_for(judged, tmp_path):
    assert "no pairs without a human label" in call(tmp_path, "label", "--run", "absent")
    assert "pair 1 of 3" in call(tmp_path, "label", "--run", "r", stdin="q\n")


def test_a_hostile_text_is_inert_and_a_long_one_is_cut(tmp_path):
    world = RecordDatabase(tmp_path / "data" / "charter.duckdb")
    world.add(make_prompt("x"), make_preference("p", "x", 0.5, response_a=HOSTILE, response_b="\n".join(map(str, range(100)))))
    said = call(tmp_path, "label", stdin="q\n")
    assert "\x1b" not in said and "\u202e" not in said and "(60 more lines: w)" in said


def test_an_id_names_one_label(tmp_path):
    labels = [make_preference(f"p{number}", "x", 0.5) for number in range(17)]  # two of them begin with the same digit
    RecordDatabase(tmp_path / "data" / "charter.duckdb").add(make_prompt("x"), *labels)
    common = Counter(label.record_id[0] for label in labels).most_common(1)[0][0]
    for named, match in (("zzz", "matches no label"), ("", "matches no label"), (common, "more than one")):
        with pytest.raises(UsageError, match=match):
            call(tmp_path, "label", named, "--prefer", "a")


def test_what_is_typed_wrongly_is_said(judged, tmp_path):
    assert "--prefer" in call(tmp_path, "label", judged["sure"], code=2)
    assert "ID" in call(tmp_path, "label", "--prefer", "a", code=2)
