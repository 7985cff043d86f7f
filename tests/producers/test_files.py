"""File producer: each kind of invalid line is reported with its number; no valid line is lost or published twice."""

import io
import json
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.bus.read import read_values
from engine.errors import UsageError, WriterFenced
from producers.files import (
    SHIPPED_PROMPTS_PATH,
    FileProducer,
    assign_purpose,
    assign_split,
    count_shipped_prompts,
    format_report,
)
from producers.parse import RowError, parse_prompt
from producers.rows import compute_content_hash
from schemas.codec import decode_record
from schemas.records import ChatMessage, Prompt, Purpose, Split


def read_prompts(bus):
    return [decode_record(value, Prompt) for value in read_values(bus, "prompts")]


def read_contents(bus):
    return sorted(p.messages[-1].content for p in read_prompts(bus))


def to_line(value):
    return (value if isinstance(value, bytes) else json.dumps(value).encode()) + b"\n"


VALID = [
    "a plain string",
    {"prompt": "an object"},
    {
        "messages": [
            {"role": "user", "content": "hi"},
            {"role": "assistant", "content": "yes?"},
            {"role": "user", "content": "several"},
        ]
    },
    {
        "messages": [{"role": "system", "content": "be kind"}, {"role": "user", "content": "messages"}],
        "source": "s",
        "tags": ["t"],
    },
]
INVALID = [
    (b"{not json", "not JSON"),
    (b'"caf\xe9"', "not UTF-8"),
    ({"prompt": ""}, "empty prompt"),
    ({"prompt": "   "}, "empty prompt"),
    ({"prompt": "x" * 200}, "200 characters"),
    ({"prompt": 5}, "neither a string"),
    ({"text": "x"}, 'no "prompt"'),
    ([1, 2], "neither"),
    ({"messages": []}, "list of messages"),
    ({"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}, "last message"),
    ({"messages": [{"role": "robot", "content": "x"}]}, "role"),
    ({"prompt": "x", "tags": "t"}, "tags"),
    ({"prompt": "x", "source": ""}, "source"),
    (b'"\\ud800"', "surrogate"),
    (b"[" * 100_000, "nested"),
]


def test_file_producer_accepts_every_valid_form(bus, tmp_path):
    file = tmp_path / "p.jsonl"
    file.write_bytes(b"\xef\xbb\xbf" + b"".join(to_line(value) for value in VALID) + b"\n\n")
    assert FileProducer(bus, "r").publish(str(file)).num_published == 4
    prompts = {p.messages[-1].content: p for p in read_prompts(bus)}
    assert set(prompts) == {"a plain string", "an object", "several", "messages"}
    assert len(prompts["several"].messages) == 3 and prompts["messages"].tags == ["t"] and prompts["messages"].source == "s"
    assert prompts["an object"].origin == "p.jsonl:2"


@pytest.mark.parametrize(("invalid", "reason"), INVALID, ids=[reason for _, reason in INVALID])
def test_file_producer_reports_an_invalid_line_and_publishes_the_others(bus, tmp_path, invalid, reason):
    file = tmp_path / "p.jsonl"
    file.write_bytes(to_line("before") + to_line(invalid) + to_line("after"))
    report = FileProducer(bus, "r", max_chars=100).publish(str(file))
    assert [number for number, _ in report.bad_rows] == [2] and reason in report.bad_rows[0][1]
    assert read_contents(bus) == ["after", "before"]


@pytest.mark.parametrize(
    ("kind", "row", "reason"),
    [
        ("preferences", {"prompt": "p", "chosen": "\u200b", "rejected": "no"}, "chosen has an empty response"),
        ("preferences", {"prompt": "p", "chosen": "yes", "rejected": "yes\n"}, "both responses are the same"),
        (
            "preferences",
            {"prompt": "p", "response_a": "yes", "response_b": "\ufeff", "p_a": 0.2},
            "response_b has an empty response",
        ),
        (
            "preferences",
            {"prompt": "p", "chosen": "yes", "rejected": "<think>No?</think>no"},
            "rejected contains what looks like",
        ),
        ("demonstrations", {"prompt": "p", "completion": "\u2800"}, "has an empty response"),
        ("demonstrations", {"prompt": "p", "completion": "<think>Yes?</think>yes"}, "the completion contains what looks like"),
        ("demonstrations", {"prompt": "p", "completion": "Yes?\n</think>\n\nyes"}, "the completion contains what looks like"),
    ],
)
def test_unusable_responses_are_not_imported(bus, tmp_path, kind, row, reason):
    file = tmp_path / "p.jsonl"
    file.write_bytes(to_line(row))
    report = FileProducer(bus, "r", kind=kind).publish(str(file))
    ((number, found),) = report.bad_rows
    assert (number, report.num_published) == (1, 0) and reason in found


def test_strict_producer_stops_at_the_first_invalid_line_and_keeps_the_lines_before_it(bus, tmp_path):
    file = tmp_path / "p.jsonl"
    file.write_bytes(to_line("one") + to_line("two") + to_line(b"{") + to_line("four"))
    messages = []
    for _ in range(2):  # the second call does not skip the invalid line
        with pytest.raises(UsageError, match="row 3") as raised:
            FileProducer(bus, "r", strict=True).publish(str(file))
        messages.append(raised.value.why)
    assert read_contents(bus) == ["one", "two"]
    assert messages[0].endswith("; published before this: 2 prompts") and "published" not in messages[1]
    file.write_bytes(to_line("one") + to_line("two") + to_line("three") + to_line("four"))
    report = FileProducer(bus, "r", strict=True).publish(str(file))
    assert (report.num_published, report.num_duplicates) == (2, 2) and read_contents(bus) == ["four", "one", "three", "two"]


def test_error_for_a_utf16_file_names_the_conversion_command(bus, tmp_path):
    file = tmp_path / "p.jsonl"
    file.write_text('"x"\n', encoding="utf-16")
    with pytest.raises(UsageError, match="iconv"):
        FileProducer(bus, "r").publish(str(file))


@pytest.mark.parametrize(
    ("start", "what"),
    [
        (b"PK\x03\x04", "ZIP archive or an Excel file"),
        (b"\x28\xb5\x2f\xfd", "Zstandard"),
        (b"BZh91AY", "bzip2"),
        (b"\xfd7zXZ\x00", "xz"),
    ],
)
def test_unsupported_file_is_one_error(bus, tmp_path, start, what):
    file = tmp_path / "p.jsonl"
    file.write_bytes(start + b"\n" * 9)
    with pytest.raises(UsageError, match=what):
        FileProducer(bus, "r").publish(str(file))


def test_columns_without_effect_are_reported_once_and_counted(bus, tmp_path):
    file, reported = tmp_path / "p.jsonl", []
    file.write_bytes(to_line({"prompt": "one", "id": 1}) + to_line({"prompt": "two", "id": 2, "note": "n"}))
    producer = FileProducer(bus, "r", on_unread_columns=lambda number, names: reported.append((number, names)))
    report = producer.publish(str(file))
    assert reported == [(1, ["id"]), (2, ["note"])] and report.unread_columns == {"id": 2, "note": 1}
    assert "columns without effect: id (2 rows), note (1 row)" in list(format_report(report, str(file)))


def test_file_with_other_column_names_is_read_again_after_they_are_named(bus, tmp_path):
    file = tmp_path / "p.jsonl"
    file.write_bytes(to_line({"question": "one"}))
    assert len(FileProducer(bus, "r").publish(str(file)).bad_rows) == 1
    report = FileProducer(bus, "r", columns={"prompt": "question"}).publish(str(file))
    assert (report.num_published, report.num_already_read) == (1, 0) and read_contents(bus) == ["one"]
    assert FileProducer(bus, "r", columns={"prompt": "question"}).publish(str(file)).num_already_read == 1


def test_report_counts_the_rows_that_an_earlier_call_read(bus, tmp_path):
    file = tmp_path / "p.jsonl"
    file.write_bytes(to_line("one") + to_line(b"{"))
    assert "; its first" not in "".join(format_report(FileProducer(bus, "r").publish(str(file)), str(file)))
    assert "its first 2 rows were read by an earlier call, which published 1" in "".join(
        format_report(FileProducer(bus, "r").publish(str(file)), str(file))
    )


def test_row_that_was_too_long_is_read_again_with_a_larger_limit(bus, tmp_path):
    file = tmp_path / "p.jsonl"
    file.write_bytes(to_line("a long prompt"))
    assert len(FileProducer(bus, "r", max_chars=3).publish(str(file)).bad_rows) == 1
    assert FileProducer(bus, "r", max_chars=300).publish(str(file)).num_published == 1


def test_producer_rejects_a_missing_file(bus):
    with pytest.raises(UsageError, match="cannot read"):
        FileProducer(bus, "r").publish("/nowhere/p.jsonl")


def test_producer_publishes_a_file_once_and_only_the_new_rows_of_a_grown_file(bus, tmp_path):
    file = tmp_path / "p.jsonl"
    file.write_bytes(b"".join(to_line(f"p{n}") for n in range(1200)))
    assert FileProducer(bus, "r").publish(str(file)).num_published == 1200
    assert FileProducer(bus, "r").publish(str(file)).num_published == 0
    with file.open("ab") as stream:
        stream.write(to_line("new"))
    report = FileProducer(bus, "r").publish(str(file))
    assert (report.num_published, report.num_duplicates) == (1, 1200)
    assert FileProducer(bus, "r", epoch=1).publish(str(file)).num_published == 1201
    assert FileProducer(bus, "another run").publish(str(file)).num_published == 1201


def test_interrupted_producer_continues_after_the_last_commit(bus, tmp_path, monkeypatch):
    file = tmp_path / "p.jsonl"
    file.write_bytes(b"".join(to_line(f"p{n:04}") for n in range(1500)))
    real_commit, remaining = FileProducer.commit, [2]

    def commit(self, *arguments):
        if not remaining[0]:
            raise KeyboardInterrupt
        remaining[0] -= 1
        return real_commit(self, *arguments)

    monkeypatch.setattr(FileProducer, "commit", commit)
    with pytest.raises(KeyboardInterrupt):
        FileProducer(bus, "r").publish(str(file))
    assert len(read_prompts(bus)) == 1000
    monkeypatch.setattr(FileProducer, "commit", real_commit)
    assert FileProducer(bus, "r").publish(str(file)).num_published == 500
    assert read_contents(bus) == [f"p{n:04}" for n in range(1500)]


def test_producer_reads_standard_input(bus, monkeypatch):
    stdin = io.TextIOWrapper(io.BytesIO(to_line("from stdin") + to_line("from stdin") + to_line(b"{")))
    monkeypatch.setattr(sys, "stdin", stdin)
    report = FileProducer(bus, "r").publish("-")
    assert (report.num_published, report.num_duplicates, len(report.bad_rows)) == (1, 1, 1) and read_contents(bus) == [
        "from stdin"
    ]


@given(st.binary(max_size=100))
def test_every_line_parses_to_a_prompt_or_raises_row_error(data):
    try:
        assert parse_prompt(data, source="s", max_chars=50).messages
    except RowError as error:
        assert str(error)


def test_split_is_stable_and_has_the_eval_fraction(bus, tmp_path):
    dialogues = [[ChatMessage(role="user", content=f"p{n}")] for n in range(5000)]
    splits = [assign_split(messages, 0.1) for messages in dialogues]
    assert 0.08 < splits.count(Split.EVAL) / 5000 < 0.12
    assert assign_split(dialogues[1], 0.0) is Split.TRAIN
    file = tmp_path / "p.jsonl"
    file.write_bytes(b"".join(to_line(f"p{n}") for n in range(50)))
    for run, epoch in (("r", 0), ("r", 1), ("another run", 2)):
        FileProducer(bus, run, epoch=epoch, eval_fraction=0.5).publish(str(file))
    splits_by_prompt = {(p.messages[0].content, p.split) for p in read_prompts(bus)}
    assert len(read_prompts(bus)) == 150 and len(splits_by_prompt) == 50 and len({split for _, split in splits_by_prompt}) == 2


def test_purpose_has_the_rl_fraction_and_does_not_depend_on_epoch_or_split(bus, tmp_path):
    dialogues = [[ChatMessage(role="user", content=f"p{n}")] for n in range(5000)]
    purposes = [assign_purpose(messages, 0.8) for messages in dialogues]
    assert 0.78 < purposes.count(Purpose.RL) / 5000 < 0.82 and set(purposes) == {Purpose.RL, Purpose.REWARD}
    held_out = [p for p, messages in zip(purposes, dialogues, strict=True) if assign_split(messages, 0.2) is Split.EVAL]
    assert 0.75 < held_out.count(Purpose.RL) / len(held_out) < 0.85
    assert assign_purpose(dialogues[0], 0.0) is Purpose.ANY
    file = tmp_path / "p.jsonl"
    file.write_bytes(b"".join(to_line(f"p{n}") for n in range(20)))
    for epoch in (0, 1):
        FileProducer(bus, "r", epoch=epoch, rl_fraction=0.8).publish(str(file))
    pairs = {(prompt.messages[0].content, prompt.purpose) for prompt in read_prompts(bus)}
    assert len(read_prompts(bus)) == 40 and len(pairs) == 20
    FileProducer(bus, "undivided").publish(str(file))
    assert {prompt.purpose for prompt in read_prompts(bus) if prompt.run_id == "undivided"} == {Purpose.ANY}


def test_prompts_with_labels_of_people_are_never_for_rl(bus, tmp_path):
    file = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"p{n}", "chosen": "a", "rejected": "b"} for n in range(10)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    FileProducer(bus, "r", kind="preferences", publish_prompts=True, rl_fraction=0.9).publish(str(file))
    assert {prompt.purpose for prompt in read_prompts(bus)} == {Purpose.REWARD}


def test_shipped_prompts_are_distinct_and_half_of_them_are_red_team():
    lines = SHIPPED_PROMPTS_PATH.read_bytes().splitlines()
    parsed = [parse_prompt(text, source="", max_chars=1000) for text in lines]
    assert len(parsed) == count_shipped_prompts() >= 64
    assert len({p.messages for p in parsed}) == len(parsed)
    for end in (24, 40, 48, len(parsed)):
        assert sum(p.source == "red-team" for p in parsed[:end]) == end // 2


def test_second_producer_of_a_file_fences_the_first_one_with_a_clear_error(bus, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('"One?"\n{bad\n')
    first = FileProducer(bus, "r")
    name = f"produce.{first.make_start_offset(str(path), compute_content_hash(str(path)), 1, None).record_id}"
    fenced = FileProducer(bus, "r", on_bad_row=lambda number, reason: bus.open_writer(name).close())
    with pytest.raises(WriterFenced, match=r"another producer of .*a\.jsonl has started in run r") as error:
        fenced.publish(str(path))
    assert len(str(error.value).splitlines()) == 3 and "--instance" not in str(error.value) and read_contents(bus) == []
    assert first.publish(str(path)).num_published == 1
