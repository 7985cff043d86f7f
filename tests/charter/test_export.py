"""Export of training data without held-out rows, dataset cards with provenance, and human labels."""

import json
import math
import re
from collections import Counter
from contextlib import closing

import pyarrow as pa
import pytest
from click.testing import CliRunner

from charter.cli import cli
from charter.connect import connect_bus, open_store
from charter.export import dataset
from charter.pipeline import make_host
from engine.errors import UsageError
from engine.instances import ServiceLease
from engine.settings import load_settings
from schemas.records import EndReason, LabelSource, ModelRef, Outcome, Split
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
from tests.support.waiting import wait_until

HOSTILE = "</script> | `x` \x1b[31m\u202e {{}} \U0001f600 " + "long " * 500
HELD_OUT = {"split": Split.EVAL}


@pytest.fixture
def database(tmp_path):
    """Return a database of trained and held-out prompts, with hostile text and missing labels."""
    database = RecordDatabase(tmp_path / "data" / "charter.duckdb")
    database.add(make_prompt("one"), make_prompt("two"), make_prompt("out", **HELD_OUT))
    database.add(
        make_chain_end("one", "one"),
        make_chain_end("two", "two").model_copy(update={"final_response": HOSTILE}),
        make_chain_end("out", "out", **HELD_OUT),
    )
    database.add(
        make_chain_end("bad", "two").model_copy(update={"end_reason": EndReason.UNUSABLE}), make_demonstration("shown", "one")
    )
    first, second = make_preference("one", "one", 0.8), make_preference("two", "two", 0.3)
    database.add(first, second, make_preference("tie", "two", 0.5), make_preference("out", "out", 0.9, **HELD_OUT))
    database.add(make_preference("none", "one", None, outcome=Outcome.LOW_MASS), make_human_label("1", second, 1.0))
    return database


def run_command(tmp_path, *arguments, code=0, stdin=None):
    done = CliRunner().invoke(cli, [*map(str, arguments), "--data", str(tmp_path / "data")], input=stdin)
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == code, done.output
    return done.output


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


def test_every_format_equals_its_view(database, tmp_path):
    assert "train: 3 rows" in run_command(tmp_path, "export", "sft", tmp_path / "sft")
    assert {row["completion"][0]["content"] for row in lines(tmp_path / "sft/data/train.jsonl")} == {
        "one final",
        HOSTILE,
        "shown answer",
    }
    assert [row["completion"][0]["content"] for row in lines(tmp_path / "sft/data/eval.jsonl")] == ["out final"]

    run_command(tmp_path, "export", "preference", tmp_path / "pairs")
    rows = {row["chosen"][0]["content"]: row for row in lines(tmp_path / "pairs/data/train.jsonl")}
    assert set(rows) == {"one a", "two a"}  # "two" has its human label, not the judge's 0.3; a tie has no preferred response
    assert rows["one a"]["p_chosen"] == pytest.approx(0.8) and rows["one a"]["rejected"][0]["content"] == "one b"
    assert (rows["two a"]["p_chosen"], rows["two a"]["label_source"]) == (1.0, "HUMAN")
    assert rows["one a"]["prompt"] == [{"role": "user", "content": "one"}]

    run_command(tmp_path, "export", "kto", tmp_path / "kto")
    expected = {row["completion"][0]["content"]: row["label"] for row in lines(tmp_path / "kto/data/train.jsonl")}
    assert expected == {"one a": True, "one b": False, "two a": True, "two b": False}


def test_pages_cover_all_rows(database, tmp_path, monkeypatch):
    single_page = read_lines(tmp_path, "whole")
    monkeypatch.setattr(dataset, "PAGE_SIZE", 1)
    assert read_lines(tmp_path, "by one") == single_page
    assert read_lines(tmp_path, "two", "--limit", "2") == single_page[:2]
    assert read_lines(tmp_path, "source", "--source", "test") == single_page


def read_lines(tmp_path, name, *more):
    run_command(tmp_path, "export", "sft", tmp_path / name, *more)
    return lines(tmp_path / name / "data" / "train.jsonl")


_TRL_TRAINERS = [
    ("sft", "SFT", {}), ("openai", "SFT", {}), ("preference", "Reward", {}), ("preference", "DPO", {}), ("kto", "KTO", {}),
    ("prompts", "GRPO", {"num_generations": 2}), ("prompts", "RLOO", {"num_generations": 2}),
]  # fmt: skip
FORMS_WITH_TWO_SPLITS = [name for name, form in dataset.EXPORT_FORMATS.items() if len(form.split_views) == 2]


@pytest.fixture(scope="module")
def chat_tokenizer(tiny):
    """Return the tokenizer of the tiny model with a template, which TRL needs for conversations."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny)
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'][0] + ':' + m['content'] + ' ' }}{% endfor %}{% if add_generation_prompt %}a:{% endif %}"
    return tokenizer


@pytest.mark.parametrize(("form", "name", "options"), _TRL_TRAINERS)
def test_trainers_of_trl_accept_the_export(database, tmp_path, tiny, chat_tokenizer, form, name, options):
    """Each trainer reads the rows with their roles, and computes its first loss."""
    import trl
    from datasets import load_dataset
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    as_parquet = ["--parquet"] if name in ("DPO", "RLOO") else []
    run_command(tmp_path, "export", form, tmp_path / "out", *as_parquet)
    rows = load_dataset(str(tmp_path / "out"), cache_dir=str(tmp_path / "cache"))["train"]
    options = {
        "per_device_train_batch_size": 2,
        "max_steps": 1,
        "use_cpu": True,
        "report_to": [],
        "save_strategy": "no",
    } | options
    config = getattr(trl, f"{name}Config")(output_dir=str(tmp_path / "trl"), disable_tqdm=True, **options)
    if name == "Reward":
        model = AutoModelForSequenceClassification.from_pretrained(tiny, num_labels=1)
    else:
        model = AutoModelForCausalLM.from_pretrained(tiny)
    rewards = (
        {"reward_funcs": lambda completions, **_: [float(len(c[0]["content"])) for c in completions]}
        if form == "prompts"
        else {}
    )
    trainer = getattr(trl, f"{name}Trainer")(
        model=model, args=config, train_dataset=rows, processing_class=chat_tokenizer, **rewards
    )
    trainer.train()
    assert trainer.state.global_step == 1 and math.isfinite(trainer.state.log_history[-1]["train_loss"])


def test_conversations_have_only_what_openai_accepts(database, tmp_path):
    run_command(tmp_path, "export", "openai", tmp_path / "out")
    rows = lines(tmp_path / "out/data/train.jsonl")
    assert {tuple(row) for row in rows} == {("messages",)} and len(rows) == 3
    assert rows[0]["messages"] == [{"role": "user", "content": "one"}, {"role": "assistant", "content": "one final"}]
    card = (tmp_path / "out/README.md").read_text(encoding="utf-8")
    assert "supervised fine-tuning at OpenAI" in card and "helpful" not in card and "| train |" in card


def test_each_prompt_is_exported_once_in_one_split(database, tmp_path):
    again = make_prompt("one").model_copy(update={"record_id": "00000000-0000-0000-0000-000000000009", "epoch": 1})
    suite = make_prompt("suite", split=Split.SUITE)
    database.add(again, suite)
    output = run_command(tmp_path, "export", "prompts", tmp_path / "out")
    assert "1 (prompt of an evaluation suite)" in output
    by_split = {split: lines(tmp_path / f"out/data/{split}.jsonl") for split in ("train", "eval")}
    assert [row["prompt"][0]["content"] for row in by_split["train"]] == ["one", "two"]
    assert [row["prompt"][0]["content"] for row in by_split["eval"]] == ["out"]
    card = (tmp_path / "out/README.md").read_text(encoding="utf-8")
    assert card.count("None: the rows are prompts without responses.") == 2 and "Label certainty" not in card


@pytest.mark.parametrize("more", [(), ("--parquet",)])
def test_datasets_loads_the_new_rows_of_a_folder_that_is_exported_again(database, tmp_path, more):
    """`datasets` has a cache. Another folder of the same name must not be loaded from it, either."""
    from datasets import load_dataset

    def load_counts(folder):
        return {split: len(rows) for split, rows in load_dataset(str(folder), cache_dir=str(tmp_path / "cache")).items()}

    run_command(tmp_path, "export", "preference", tmp_path / "out", "--limit", "1", *more)
    assert load_counts(tmp_path / "out")["train"] == 1
    run_command(tmp_path, "export", "preference", tmp_path / "out", "--force", *more)
    num_rows = load_counts(tmp_path / "out")["train"]
    assert num_rows > 1
    run_command(tmp_path, "export", "preference", tmp_path / "b" / "out", "--limit", "1", *more)
    assert (load_counts(tmp_path / "b" / "out")["train"], load_counts(tmp_path / "out")["train"]) == (1, num_rows)


@pytest.mark.parametrize("form", FORMS_WITH_TWO_SPLITS)
@pytest.mark.parametrize("more", [(), ("--parquet",)])
def test_splits_with_columns_that_are_null_in_one_of_them_load(tmp_path, form, more):
    """The train split has labels and demonstrations of people, who have no principle, no policy and no judge."""
    from datasets import Features, load_dataset

    database = RecordDatabase(tmp_path / "data" / "charter.duckdb")
    database.add(make_prompt("one"), make_prompt("out", **HELD_OUT))
    database.add(make_preference("person", "one", 1.0, label_source=LabelSource.HUMAN), make_demonstration("person", "one"))
    judged = judgement("judge", "out", "aa", "b", 0.9, 0.7).model_copy(update=HELD_OUT | {"policy_version": 3})
    database.add(
        judged, make_chain_end("out", "out", **HELD_OUT).model_copy(update={"principle_id": "kind", "policy_version": 3})
    )
    run_command(tmp_path, "export", form, tmp_path / "out", *more)
    loaded = load_dataset(str(tmp_path / "out"), cache_dir=str(tmp_path / "cache"))
    if "principle_id" in loaded["train"].column_names:
        (train,), (test,) = {row["principle_id"] for row in loaded["train"]}, {row["principle_id"] for row in loaded["test"]}
        assert train is None and test
        assert loaded["test"][0]["policy_version"] == 3 and loaded["train"][0]["policy_version"] is None
    # The declared types are the types of the Parquet file, so both files load with the same columns.
    assert loaded["train"].features == loaded["test"].features
    assert loaded["train"].features == Features.from_arrow_schema(pa.schema(list(dataset.EXPORT_FORMATS[form].columns.items())))
    assert form == "openai" or loaded["train"][0]["created_at"].year >= 2026


def test_contrast_pairs_have_a_separate_export(tmp_path):
    database = RecordDatabase(tmp_path / "data" / "charter.duckdb")
    contrast = {"label_source": LabelSource.CONTRAST, "pairing": "contrast"}
    database.add(make_preference("judged", "one", 0.7), make_preference("c", "one", 1.0, **contrast))
    preference = run_command(tmp_path, "export", "preference", tmp_path / "pairs")
    assert [row["chosen"][0]["content"] for row in lines(tmp_path / "pairs" / "data" / "train.jsonl")] == ["judged a"]
    assert "1 (contrast pair: export contrast)" in preference
    result = run_command(tmp_path, "export", "contrast", tmp_path / "contrast")
    (row,) = lines(tmp_path / "contrast" / "data" / "train.jsonl")
    assert (row["chosen"][0]["content"], row["rejected"][0]["content"], row["p_chosen"]) == ("c a", "c b", 1.0)
    assert row["label_source"] == "CONTRAST" and "1 (label of a judge or a person: export preference)" in result


def test_kto_leaves_out_labels_that_are_nearly_ties(tmp_path):
    """A hard label of p = 0.486 is noise. p = 0.4 and p = 0.6 have exactly the smallest margin."""
    labels = {"near": 0.486, "far": 0.4, "other": 0.6, "sure": 0.98, "tie": 0.5}
    database = RecordDatabase(tmp_path / "data" / "charter.duckdb")
    database.add(*(make_preference(name, name, p_a) for name, p_a in labels.items()))
    output = run_command(tmp_path, "export", "kto", tmp_path / "kto")
    assert "train: 6 rows" in output and "1 label left out, because their margin |p - 0.5| is below 0.1" in output
    rows = {row["completion"][0]["content"]: row["label"] for row in lines(tmp_path / "kto/data/train.jsonl")}
    assert rows == {"far a": False, "far b": True, "other a": True, "other b": False, "sure a": True, "sure b": False}
    card = (tmp_path / "kto" / "README.md").read_text(encoding="utf-8")
    assert "| margin below 0.1: nearly a tie | 1 |" in card and "| tie: no response is preferred | 1 |" in card
    assert "| train | 3 | 0.100 | 0.100 | 0.480 | 0 | 0 | 0 | - |" in card
    output = run_command(tmp_path, "export", "kto", tmp_path / "all", "--min-margin", "0")
    assert "train: 8 rows" in output and "1 of 4 labels have a margin below 0.1 (to leave them out: --min-margin 0.1)" in output
    output = run_command(tmp_path, "export", "preference", tmp_path / "pairs", "--min-margin", "0.1")
    assert "train: 3 rows" in output and "1 label left out" in output
    with pytest.raises(UsageError, match=r"4 \(margin below"):
        run_command(tmp_path, "export", "kto", tmp_path / "none", "--min-margin", "0.5")
    with pytest.raises(UsageError, match="sft has no --min-margin"):
        run_command(tmp_path, "export", "sft", tmp_path / "none", "--min-margin", "0.1")


def test_card_states_flips_and_margins(tmp_path):
    database = RecordDatabase(tmp_path / "data" / "charter.duckdb")
    flip = judgement("flip", "one", "aa", "b", 0.9, 0.3).model_copy(update={"position_flip": True})
    database.add(flip, judgement("same", "two", "aa", "b", 0.9, 0.7), make_preference("person", "three", 1.0))
    assert "1 of 3 labels have a margin below 0.1" not in run_command(tmp_path, "export", "preference", tmp_path / "pairs")
    card = (tmp_path / "pairs" / "README.md").read_text(encoding="utf-8")
    assert "| train | 3 | 0.100 | 0.300 | 0.500 | 0 | 2 | 1 | 50.0% |" in card


def test_card_describes_provenance_and_exclusions(database, tmp_path):
    run_command(tmp_path, "export", "preference", tmp_path / "pairs")
    card = (tmp_path / "pairs" / "README.md").read_text(encoding="utf-8")
    assert "| train | test | HUMAN | 1 |" in card and "| train | test | AI | 1 |" in card and "| eval | test | AI | 1 |" in card
    assert "| tie: no response is preferred | 1 |" in card
    assert "| replaced by a human label | 1 |" in card and re.search(r"gave no label: LOW\\_MASS \| 1 \|", card)
    run_command(tmp_path, "export", "sft", tmp_path / "sft")
    assert "| chain ended UNUSABLE | 1 |" in (tmp_path / "sft" / "README.md").read_text(encoding="utf-8")


def test_run_exports_labels_that_an_earlier_run_created(tmp_path):
    """A replay with the same labels exports them, and the card names the models of the responses and labels."""
    database = RecordDatabase(tmp_path / "data" / "charter.duckdb")
    answered = make_response("p").model_copy(update={"model": ModelRef(id="policy", revision="1")})
    first, second = (judgement(name, "p", "aa", "b", 0.9, 0.7, response_id=answered.record_id) for name in ("one", "two"))
    database.add(make_prompt("p"), answered, first, second, first.model_copy(update={"run_id": "again"}))
    run_command(tmp_path, "export", "preference", tmp_path / "again", "--run", "again")
    (row,) = lines(tmp_path / "again/data/train.jsonl")
    assert row["record_id"] == first.record_id
    assert (row["constitution"], row["constitution_hash"]) == ("default 1.0.0", "c0ffee")
    card = (tmp_path / "again" / "README.md").read_text(encoding="utf-8")
    assert "| respond | policy (1) | 1 |" in card and "| judge | critic (v) | 1 |" in card
    assert "| default 1.0.0 | c0ffee |" in card
    with pytest.raises(UsageError, match="nothing to export"):
        run_command(tmp_path, "export", "preference", tmp_path / "none", "--run", "absent")


def test_override_during_an_export_removes_no_label(database):
    """The export uses the labels at its start: either the judge's label or its override, never neither."""
    form = dataset.EXPORT_FORMATS["preference"]
    choice, pages = dataset.select_commits(database.store, form, dataset.ExportSelection(), None)
    database.add(make_human_label("2", make_preference("one", "one", 0.8), 0.0))
    assert "one a" not in {
        row["response_a"] for row in database.query_records("SELECT response_a FROM preference_pairs WHERE label_source = 'AI'")
    }
    rows = list(dataset.read_rows(database.store, form.source_view, pages["train"]))
    assert [row["commit_seq"] for row in rows] == pages["train"][0] and pages["train"][0][-1] <= choice.max_commit_seq
    assert {row["response_a"]: row["p_a"] for row in rows}["one a"] == 0.8


@pytest.mark.parametrize(("forward", "backward", "shown"), [(0.9, 0.7, (0.9, 0.7)), (0.1, 0.3, (0.7, 0.9))])
def test_exported_probabilities_refer_to_the_chosen_response(tmp_path, forward, backward, shown):
    """The probabilities of both orders refer to the chosen response, which may be response_a or response_b."""
    RecordDatabase(tmp_path / "data" / "charter.duckdb").add(
        make_prompt("p"), judgement("j", "p", "aa", "b", forward, backward)
    )
    run_command(tmp_path, "export", "preference", tmp_path / "pairs")
    (row,) = lines(tmp_path / "pairs/data/train.jsonl")
    assert row["chosen"][0]["content"] == ("aa" if forward > 0.5 else "b") and row["p_chosen"] == pytest.approx(0.8)
    assert (row["p_chosen_shown_first"], row["p_chosen_shown_second"]) == pytest.approx(shown)


def test_existing_files_are_not_overwritten(database, tmp_path):
    run_command(tmp_path, "export", "sft", tmp_path / "out")
    with pytest.raises(UsageError, match="--force"):
        run_command(tmp_path, "export", "sft", tmp_path / "out")
    run_command(tmp_path, "export", "kto", tmp_path / "out", "--force")
    assert "label" in lines(tmp_path / "out/data/train.jsonl")[0]
    (tmp_path / "mine" / "data").mkdir(parents=True)
    (tmp_path / "mine" / "README.md").write_text("somebody's own data set")
    with pytest.raises(UsageError, match="an export did not write this folder"):
        run_command(tmp_path, "export", "sft", tmp_path / "mine", "--force")
    assert (tmp_path / "mine" / "README.md").read_text() == "somebody's own data set"
    with pytest.raises(UsageError, match="nothing to export"):
        run_command(tmp_path, "export", "sft", tmp_path / "empty", "--source", "absent")
    assert not (tmp_path / "empty").exists() and not list(tmp_path.glob(".*"))


# Human labels


def wait_for_labels(tmp_path, count):
    """Run the sink until `count` human labels are stored and return the database."""
    settings, _ = load_settings({"data.folder": str(tmp_path / "data"), "models.policy": "scripted"}, environment={})
    bus, store = connect_bus(settings), open_store(settings)
    sql = "SELECT count(*) FROM preferences WHERE label_source = 'HUMAN' AND stage = 'label'"
    with make_host(settings, bus, [], sink=True) as host:
        wait_until(lambda: store.query(sql).rows == [(count,)], host)
    bus.close()
    return store


@pytest.fixture
def labeled(tmp_path):
    """Publish three results of a judge: no label, an unsure label, a sure label."""
    database = RecordDatabase(tmp_path / "data" / "charter.duckdb")
    labels = (
        make_preference("sure", "x", 0.9),
        make_preference("unsure", "x", 0.45),
        make_preference("no", "x", None, outcome=Outcome.TIMEOUT),
    )
    database.add(make_prompt("x"), *labels)
    return {name: label.record_id for name, label in zip(("sure", "unsure", "no"), labels, strict=True)}


def test_human_label_is_a_new_record_that_overrides(labeled, tmp_path):
    assert "1 label published" in run_command(tmp_path, "label", labeled["sure"][:13], "--prefer", "b")
    labels = [{"record_id": labeled["no"], "prefer": "a"}, {"record_id": labeled["unsure"], "prefer": "tie"}, {"prefer": "a"}]
    output = run_command(
        tmp_path, "label", "-", stdin="".join(json.dumps(line) + "\n" for line in labels).encode() + b"caf\xe9\n", code=1
    )
    assert "line 3" in output and "line 4" in output and "2 labels published; 2 lines are invalid" in output
    store = wait_for_labels(tmp_path, 3)
    standing = "FROM preferences SEMI JOIN preference_pairs USING (record_id)"
    stands = dict(store.query(f"SELECT parent_ids[1]::VARCHAR, p_a {standing}").rows)
    assert stands == {labeled["sure"]: 0.0, labeled["no"]: 1.0, labeled["unsure"]: 0.5}
    assert store.query("SELECT count(*) FROM preferences WHERE label_source = 'AI'").rows == [(3,)]
    assert run_command(tmp_path, "label", labeled["sure"], "--prefer", "a") and run_command(
        tmp_path, "label", labeled["sure"], "--prefer", "b"
    )
    store = wait_for_labels(tmp_path, 5)  # changed twice: the newest label applies, although the same value was given before
    assert store.query(f"SELECT p_a {standing} WHERE parent_ids[1] = ?", [labeled["sure"]]).rows == [(0.0,)]


def test_an_export_says_that_labels_are_only_on_the_log(labeled, tmp_path):
    wait_for_labels(tmp_path, 0)
    assert "not exported" not in run_command(tmp_path, "export", "preference", tmp_path / "before")
    output = run_command(tmp_path, "label", labeled["sure"], "--prefer", "b")
    assert "1 label published; to add it to the database, type: charter run" in output
    output = run_command(tmp_path, "export", "preference", tmp_path / "pairs")
    assert "not exported: some records are on the log, but not in the database yet (preferences)" in output
    with closing(ServiceLease(tmp_path / "data", "sink")):  # a sink that runs will read them
        assert "not exported" not in run_command(tmp_path, "export", "preference", tmp_path / "during")
    wait_for_labels(tmp_path, 1)
    assert "not exported" not in run_command(tmp_path, "export", "preference", tmp_path / "after")


def test_interactive_labeling_starts_with_the_least_certain_and_hides_the_order(labeled, tmp_path):
    output = run_command(tmp_path, "label", "--count", "2", stdin="1\nw\n2\n")
    assert output.index("no a") < output.index("unsure a") and "sure a" not in output.replace("unsure a", "")
    assert "2 labels published" in output
    store = wait_for_labels(tmp_path, 2)
    rows = store.query("SELECT response_a, p_a FROM preferences WHERE label_source = 'HUMAN' ORDER BY response_a").rows
    order = {name: output.index(f"{name} a") < output.index(f"{name} b") for name in ("no", "unsure")}
    assert dict(rows) == {"no a": float(order["no"]), "unsure a": float(not order["unsure"])}
    assert "0 labels published" in run_command(tmp_path, "label", stdin="s\n")
    assert "0 labels published" in run_command(tmp_path, "label", stdin="q\n")


def test_interrupted_labeling_keeps_the_labels_given(labeled, tmp_path):
    """End of input (Ctrl-D); Ctrl-C raises the same exception."""
    assert "1 label published" in run_command(tmp_path, "label", stdin="1\n")
    assert wait_for_labels(tmp_path, 1).query("SELECT count(*) FROM preferences WHERE label_source = 'HUMAN'").rows == [(1,)]


def test_labeling_shows_only_pairs_of_the_run(labeled, tmp_path):
    assert "no pairs without a human label" in run_command(tmp_path, "label", "--run", "absent")
    assert "pair 1 of 3" in run_command(tmp_path, "label", "--run", "r", stdin="q\n")


def test_hostile_text_is_escaped_and_long_text_truncated(tmp_path):
    database = RecordDatabase(tmp_path / "data" / "charter.duckdb")
    database.add(
        make_prompt("x"), make_preference("p", "x", 0.5, response_a=HOSTILE, response_b="\n".join(map(str, range(100))))
    )
    output = run_command(tmp_path, "label", stdin="q\n")
    assert "\x1b" not in output and "\u202e" not in output and "(60 more lines; type w to show them)" in output


def test_id_prefix_must_match_one_label(tmp_path):
    labels = [make_preference(f"p{number}", "x", 0.5) for number in range(17)]  # two of the ids begin with the same digit
    RecordDatabase(tmp_path / "data" / "charter.duckdb").add(make_prompt("x"), *labels)
    common = Counter(label.record_id[0] for label in labels).most_common(1)[0][0]
    for named, match in (("zzz", "matches no label"), ("", "matches no label"), (common, "more than one")):
        with pytest.raises(UsageError, match=match):
            run_command(tmp_path, "label", named, "--prefer", "a")


def test_pair_that_cannot_be_compared_gets_no_human_label(tmp_path):
    pairs = [
        make_preference("same", "x", 0.85, response_a="yes", response_b="yes "),
        make_preference("empty", "x", None, outcome=Outcome.EMPTY, response_b="\n"),
    ]
    RecordDatabase(tmp_path / "data" / "charter.duckdb").add(make_prompt("x"), *pairs)
    output = run_command(tmp_path, "label", stdin="1\n")
    assert "2 pairs are not shown" in output and "no pairs without a human label" in output
    for pair, reason in zip(pairs, ("both responses are the same", "response B has no visible text"), strict=True):
        with pytest.raises(UsageError, match=reason):
            run_command(tmp_path, "label", pair.record_id, "--prefer", "a")
    line = json.dumps({"record_id": pairs[0].record_id, "prefer": "a"})
    assert "line 1: the pair" in run_command(tmp_path, "label", "-", stdin=line.encode(), code=1)
    with pytest.raises(UsageError, match="nothing to export") as caught:
        run_command(tmp_path, "export", "preference", tmp_path / "exported")
    assert {"1 (pair cannot be compared: IDENTICAL)", "1 (pair cannot be compared: EMPTY)"} <= set(
        caught.value.why.partition("left out: ")[2].split(", ")
    )


def test_invalid_label_options_raise_usage_errors(labeled, tmp_path):
    assert "--prefer" in run_command(tmp_path, "label", labeled["sure"], code=2)
    assert "ID" in run_command(tmp_path, "label", "--prefer", "a", code=2)
