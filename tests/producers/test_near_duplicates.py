"""Near-duplicates: precision and recall on planted duplicates, and the index that follows the topic."""

import importlib.util
import json

import pytest

from benchmarks.near_duplicates import load_texts, measure
from engine.erasures import ErasedPrompts
from engine.errors import UsageError
from engine.worker import to_producer_record
from producers.files import FileProducer, format_report
from producers.near_duplicates import (
    Conflict,
    KnownPrompt,
    NearDuplicateIndex,
    PromptHistory,
    extract_features,
    join_messages,
    require_minhash,
)
from schemas.records import ChatMessage, Split
from tests.support.respond_worker import make_prompt

TEXT = "How do I repair the flat tire of an old bicycle?"
NEAR = "How do I repair the flat tire of my old bicycle?"
OTHER = "Which birds can be seen in a park in winter?"


def make_known(prompt_id="a"):
    return KnownPrompt(prompt_id, "", Split.TRAIN, is_of_run=True)


def publish(bus, text, run="r", **fields):
    bus.publish([to_producer_record(make_prompt(text, run).model_copy(update=fields))])


def find(history, text, split=Split.TRAIN, epoch=None):
    found = history.find_conflict([ChatMessage(role="user", content=text)], split, epoch)
    return found and found[0]


def test_planted_duplicates_are_found_and_different_prompts_are_not():
    results = list(measure(load_texts(), 0.6))
    assert all(result.recall > 0.9 and result.precision == 1.0 for result in results), results
    assert sum(result.num_found for result in results) / sum(result.num_texts for result in results) > 0.95
    assert sum(result.num_missed for result in results) <= 0.01 * sum(result.num_above for result in results)


def test_threshold_of_one_finds_only_the_same_words():
    index = NearDuplicateIndex(1.0)
    index.add(TEXT, make_known())
    assert index.find(TEXT.upper()) and not index.find(NEAR)


@pytest.mark.parametrize(
    ("text", "near", "other"),
    [
        (
            "自転車のタイヤを直す方法を教えてください",
            "自転車のタイヤを直す方法を教えて下さい",
            "冬の公園で見られる鳥は何ですか",
        ),
        ("Как починить шину старого велосипеда дома?", "Как починить шину старого велосипеда?", "Какие птицы живут в парке?"),
        ("?!", " ?! ", "!!!"),
    ],
)
def test_texts_of_other_scripts_and_without_words_are_compared(text, near, other):
    index = NearDuplicateIndex(0.6)
    index.add(text, make_known())
    assert index.find(near) and not index.find(other)


def test_features_are_words_and_word_pairs():
    assert extract_features("The cat, the CAT!") == ["the", "cat", "the cat", "cat the"]
    messages = [ChatMessage(role=role, content=role) for role in ("system", "user", "assistant", "user")]
    assert join_messages(messages) == "user\nassistant\nuser"


def test_history_follows_the_topic_and_is_rebuilt_from_it(bus):
    history = PromptHistory(bus, "r", 0.6)
    history.refresh()
    assert find(history, NEAR) is None
    publish(bus, TEXT)
    publish(bus, TEXT)  # a second record of a prompt
    history.refresh()
    for current in (history, PromptHistory(bus, "r", 0.6)):
        current.refresh()
        assert find(current, NEAR) is Conflict.DUPLICATE and find(current, OTHER) is None
        assert len(current.index.prompts) == 1 and current.count_waiting({}) == 2
        assert current.count_waiting(bus.end_offsets(["prompts"])) == 0


def test_erased_prompts_and_invalid_records_are_not_in_the_history(bus):
    publish(bus, TEXT)
    prompt_id = make_prompt(TEXT).prompt_id
    bus.erase_values(["prompts"], [prompt_id.encode()])
    bus.publish([to_producer_record(make_prompt(OTHER)).__class__("prompts", b"k", b"no record")])
    history = PromptHistory(bus, "r", 0.6)
    history.refresh()
    assert history.index.prompts == [] and not ErasedPrompts(bus).prompt_ids


@pytest.mark.parametrize(
    ("run", "split", "new_split", "expected"),
    [
        ("r", Split.TRAIN, Split.TRAIN, Conflict.DUPLICATE),
        ("r", Split.EVAL, Split.EVAL, Conflict.DUPLICATE),
        ("r", Split.EVAL, Split.TRAIN, Conflict.CONTAMINATION),
        ("other", Split.EVAL, Split.TRAIN, Conflict.CONTAMINATION),
        ("other", Split.TRAIN, Split.EVAL, Conflict.CONTAMINATION),
        ("other", Split.SUITE, Split.TRAIN, Conflict.CONTAMINATION),
        ("other", Split.SUITE, Split.EVAL, Conflict.CONTAMINATION),
        ("other", Split.TRAIN, Split.TRAIN, None),
        ("other", Split.EVAL, Split.EVAL, None),
    ],
)
def test_near_duplicates_never_straddle_training_and_evaluation(bus, run, split, new_split, expected):
    publish(bus, TEXT, run, split=split)
    history = PromptHistory(bus, "r", 0.6)
    history.refresh()
    assert find(history, NEAR, new_split) is expected


def test_missing_package_is_an_error_with_the_command_that_installs_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError) as error:
        require_minhash("type: pip install rensa")
    assert len(str(error.value).splitlines()) == 3


# Files


def produce(bus, path, rows, *, run="r", **options):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    history = PromptHistory(bus, run, 0.6) if options.pop("checks", True) else None
    return FileProducer(bus, run, history=history, eval_fraction=0.0, **options).publish(str(path))


def test_file_producer_drops_and_counts_near_duplicates(bus, tmp_path):
    dropped = []
    rows = [TEXT, OTHER, NEAR, TEXT]
    report = produce(bus, tmp_path / "a.jsonl", rows, on_conflict=lambda *found: dropped.append(found))
    assert (report.num_published, report.num_duplicates, dict(report.conflicts)) == (2, 1, {Conflict.DUPLICATE: 1})
    assert [(number, conflict, known.origin) for number, conflict, known in dropped] == [(3, Conflict.DUPLICATE, "a.jsonl:1")]
    assert next(iter(format_report(report, "a.jsonl"))) == (
        "2 prompts published from a.jsonl, 1 duplicate skipped, 1 near-duplicate dropped"
    )
    assert produce(bus, tmp_path / "b.jsonl", [NEAR, "Name a river in Chile."]).num_published == 1  # near the other file
    # Without the check, the rows that the check dropped are published.
    assert produce(bus, tmp_path / "a.jsonl", rows, checks=False).num_published == 1


def test_file_producer_drops_prompts_near_an_evaluation_prompt_of_another_run(bus, tmp_path):
    publish(bus, TEXT, "evaluation", split=Split.SUITE)
    report = produce(bus, tmp_path / "a.jsonl", [NEAR, OTHER])
    assert (report.num_published, dict(report.conflicts)) == (1, {Conflict.CONTAMINATION: 1})
    assert "1 dropped because they are near a prompt of an evaluation suite or of the other split" in next(
        iter(format_report(report, "a.jsonl"))
    )


def test_another_epoch_of_the_same_prompts_is_no_duplicate(bus, tmp_path):
    produce(bus, tmp_path / "a.jsonl", [TEXT, OTHER])
    assert produce(bus, tmp_path / "a.jsonl", [TEXT, NEAR], epoch=1).num_published == 1  # NEAR is near TEXT of epoch 1
