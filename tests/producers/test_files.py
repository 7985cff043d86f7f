"""Producers: every kind of bad line is said with its number, and nothing that was fine is lost or doubled."""

import io
import json
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.bus.read import read_values
from engine.errors import UsageError
from producers.files import SHIPPED_PROMPTS_PATH, FileProducer, assign_split, count_shipped_prompts, format_report
from producers.parse import RowError, parse_prompt
from schemas.codec import decode_record
from schemas.records import ChatMessage, Prompt, Split


def published(bus):
    return [decode_record(value, Prompt) for value in read_values(bus, "prompts")]


def texts(bus):
    return sorted(p.messages[-1].content for p in published(bus))


def line(value):
    return (value if isinstance(value, bytes) else json.dumps(value).encode()) + b"\n"


GOOD = [
    "a plain string",
    {"prompt": "an object"},
    {
        "messages": [
            {"role": "user", "content": "hi"},
            {"role": "assistant", "content": "yes?"},
            {"role": "user", "content": "turns"},
        ]
    },
    {
        "messages": [{"role": "system", "content": "be kind"}, {"role": "user", "content": "messages"}],
        "source": "s",
        "tags": ["t"],
    },
]
BAD = [
    (b"{not json", "not JSON"),
    (b'"caf\xe9"', "not UTF-8"),
    ({"prompt": ""}, "empty prompt"),
    ({"prompt": "   "}, "empty prompt"),
    ({"prompt": "x" * 200}, "200 characters"),
    ({"prompt": 5}, "role"),
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


def test_every_good_form_is_taken(bus, tmp_path):
    file = tmp_path / "p.jsonl"
    file.write_bytes(b"\xef\xbb\xbf" + b"".join(line(g) for g in GOOD) + b"\n\n")
    assert FileProducer(bus, "r").publish(str(file)).num_published == 4
    found = {p.messages[-1].content: p for p in published(bus)}
    assert set(found) == {"a plain string", "an object", "turns", "messages"}
    assert len(found["turns"].messages) == 3 and found["messages"].tags == ["t"] and found["messages"].source == "s"
    assert found["an object"].origin == "p.jsonl:2"


@pytest.mark.parametrize(("bad", "why"), BAD, ids=[why for _, why in BAD])
def test_a_bad_line_is_said_and_its_neighbours_are_kept(bus, tmp_path, bad, why):
    file = tmp_path / "p.jsonl"
    file.write_bytes(line("before") + line(bad) + line("after"))
    report = FileProducer(bus, "r", max_chars=100).publish(str(file))
    assert [number for number, _ in report.bad_rows] == [2] and why in report.bad_rows[0][1]
    assert texts(bus) == ["after", "before"]


def test_strict_stops_at_the_first_and_keeps_what_was_before(bus, tmp_path):
    file = tmp_path / "p.jsonl"
    file.write_bytes(line("one") + line("two") + line(b"{") + line("four"))
    for _ in range(2):  # and again: it does not slip past the bad line the second time
        with pytest.raises(UsageError, match="line 3"):
            FileProducer(bus, "r", strict=True).publish(str(file))
    assert texts(bus) == ["one", "two"]
    file.write_bytes(line("one") + line("two") + line("three") + line("four"))
    report = FileProducer(bus, "r", strict=True).publish(str(file))
    assert (report.num_published, report.num_duplicates) == (2, 2) and texts(bus) == ["four", "one", "three", "two"]


def test_a_utf16_file_says_how_to_convert_it(bus, tmp_path):
    file = tmp_path / "p.jsonl"
    file.write_text('"x"\n', encoding="utf-16")
    with pytest.raises(UsageError, match="iconv"):
        FileProducer(bus, "r").publish(str(file))


def test_a_json_array_says_how_to_convert_it(bus, tmp_path):
    file = tmp_path / "p.json"
    file.write_text('[{"prompt": "x"}]')
    with pytest.raises(UsageError, match="jq -c"):
        FileProducer(bus, "r").publish(str(file))


def test_a_file_that_was_read_before_says_so(bus, tmp_path):
    file = tmp_path / "p.jsonl"
    file.write_bytes(line("one") + line(b"{"))
    assert "; its first" not in "".join(format_report(FileProducer(bus, "r").publish(str(file)), str(file)))
    assert "its first 2 rows were read before" in "".join(format_report(FileProducer(bus, "r").publish(str(file)), str(file)))


def test_an_absent_file_says_so(bus):
    with pytest.raises(UsageError, match="cannot read"):
        FileProducer(bus, "r").publish("/nowhere/p.jsonl")


def test_the_same_file_twice_publishes_once_and_a_grown_one_what_is_new(bus, tmp_path):
    file = tmp_path / "p.jsonl"
    file.write_bytes(b"".join(line(f"p{n}") for n in range(1200)))
    assert FileProducer(bus, "r").publish(str(file)).num_published == 1200
    assert FileProducer(bus, "r").publish(str(file)).num_published == 0
    with file.open("ab") as more:
        more.write(line("new"))
    report = FileProducer(bus, "r").publish(str(file))
    assert (report.num_published, report.num_duplicates) == (1, 1200)
    assert FileProducer(bus, "r", epoch=1).publish(str(file)).num_published == 1201
    assert FileProducer(bus, "another run").publish(str(file)).num_published == 1201


def test_a_producer_that_fails_half_way_goes_on_where_it_stopped(bus, tmp_path, monkeypatch):
    file = tmp_path / "p.jsonl"
    file.write_bytes(b"".join(line(f"p{n:04}") for n in range(1500)))
    real, left = FileProducer.commit, [2]

    def commit(self, *arguments):
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        return real(self, *arguments)

    monkeypatch.setattr(FileProducer, "commit", commit)
    with pytest.raises(KeyboardInterrupt):
        FileProducer(bus, "r").publish(str(file))
    assert len(published(bus)) == 1000
    monkeypatch.setattr(FileProducer, "commit", real)
    assert FileProducer(bus, "r").publish(str(file)).num_published == 500
    assert texts(bus) == [f"p{n:04}" for n in range(1500)]


def test_standard_input(bus, monkeypatch):
    stdin = io.TextIOWrapper(io.BytesIO(line("from stdin") + line("from stdin") + line(b"{")))
    monkeypatch.setattr(sys, "stdin", stdin)
    report = FileProducer(bus, "r").publish("-")
    assert (report.num_published, report.num_duplicates, len(report.bad_rows)) == (1, 1, 1) and texts(bus) == ["from stdin"]


@given(st.binary(max_size=100))
def test_any_line_is_a_prompt_or_a_bad_line(data):
    try:
        assert parse_prompt(data, source="s", max_chars=50).messages
    except RowError as error:
        assert str(error)


def test_the_split_is_the_same_everywhere_and_about_right(bus, tmp_path):
    dialogues = [[ChatMessage(role="user", content=f"p{n}")] for n in range(5000)]
    splits = [assign_split(messages, 0.1) for messages in dialogues]
    assert 0.08 < splits.count(Split.EVAL) / 5000 < 0.12
    assert assign_split(dialogues[1], 0.0) is Split.TRAIN
    file = tmp_path / "p.jsonl"
    file.write_bytes(b"".join(line(f"p{n}") for n in range(50)))
    for run, epoch in (("r", 0), ("r", 1), ("another run", 2)):
        FileProducer(bus, run, epoch=epoch, eval_fraction=0.5).publish(str(file))
    sides = {(p.messages[0].content, p.split) for p in published(bus)}
    assert len(published(bus)) == 150 and len(sides) == 50 and len({split for _, split in sides}) == 2


def test_the_shipped_prompts_are_enough_different_and_half_and_half():
    lines = SHIPPED_PROMPTS_PATH.read_bytes().splitlines()
    parsed = [parse_prompt(text, source="", max_chars=1000) for text in lines]
    assert len(parsed) == count_shipped_prompts() >= 64
    assert len({p.messages for p in parsed}) == len(parsed)
    for end in (24, 40, 48, len(parsed)):
        assert sum(p.source == "red-team" for p in parsed[:end]) == end // 2
