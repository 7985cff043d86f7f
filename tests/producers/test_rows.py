"""What files hold: every format gives the same rows, and any bytes give rows or bad rows, never another exception."""

import gzip
import io
import json
import shutil

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from engine.errors import CharterError, UsageError
from producers import rows as reading
from producers.parse import ROW_PARSERS, RowError, parse_demonstration, parse_preference, parse_prompt
from producers.rows import compute_content_hash, read_rows

VALUES = [
    {"prompt": "one", "source": None, "tags": ["t"]},
    {"prompt": "two", "source": "s", "tags": None},
    {"prompt": "three\nlines", "source": None, "tags": []},
]


def write(folder, name, values=VALUES):
    """The values in a format; returns the path to give."""
    path = folder / name
    text = b"".join(json.dumps(value).encode() + b"\n" for value in values)
    table = pa.Table.from_pylist(values)
    if name.endswith(".gz"):
        path.write_bytes(gzip.compress(text))
    elif name.endswith(".parquet"):
        parquet.write_table(table, path)
    elif name.endswith(".arrow"):
        with pa.ipc.new_file(path, table.schema) as file:
            file.write_table(table)
    elif name == "saved":
        import datasets

        datasets.Dataset.from_list(values).save_to_disk(path, num_shards=2)
    elif name == "folder":
        path.mkdir()
        parquet.write_table(table.slice(0, 1), path / "train-00000-of-00002.parquet")
        parquet.write_table(table.slice(1), path / "train-00001-of-00002.parquet")
    else:
        path.write_bytes(text)
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.parquet", "a.arrow", "misnamed", "saved", "folder"])
def test_every_format_has_the_same_rows(tmp_path, name):
    path = write(tmp_path, name)
    found = [(number, parse_prompt(row, source="default", max_chars=99)) for number, row in read_rows(str(path))]
    assert [(n, asked.messages[0].content, asked.source, asked.tags) for n, asked in found] == [
        (1, "one", "default", ("t",)), (2, "two", "s", ()), (3, "three\nlines", "default", ()),
    ]  # fmt: skip
    assert [number for number, _ in read_rows(str(path), 2, 2)] == [2]
    assert len(compute_content_hash(str(path))) == 64


def test_the_splits_of_a_data_set_are_not_mixed(tmp_path):
    import datasets

    part = datasets.Dataset.from_list(VALUES)
    datasets.DatasetDict({"train": part, "test": part}).save_to_disk(tmp_path / "both")
    with pytest.raises(UsageError, match=r"several splits: train, test[^$]*both/train"):
        compute_content_hash(str(tmp_path / "both"))
    assert len(list(read_rows(str(tmp_path / "both" / "train")))) == 3
    write(tmp_path, "folder")
    shutil.copy(tmp_path / "folder" / "train-00000-of-00002.parquet", tmp_path / "folder" / "test-00000-of-00001.parquet")
    with pytest.raises(UsageError, match="several splits: test, train"):
        compute_content_hash(str(tmp_path / "folder"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="no data"):
        compute_content_hash(str(tmp_path / "empty"))


def test_a_cut_gzip_file_gives_what_is_whole_and_says_where_it_ends(tmp_path):
    text = b"".join(json.dumps(f"prompt {n} {hash(str(n))}").encode() + b"\n" for n in range(5000))
    path = tmp_path / "cut.jsonl.gz"
    path.write_bytes(gzip.compress(text)[:-20_000])
    found = [row for _, row in read_rows(str(path))]
    assert len(found) > 500 and isinstance(found[-1], RowError) and "damaged" in str(found[-1])
    assert not any(isinstance(row, RowError) for row in found[:-1])


def test_an_endless_line_is_skipped_not_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "MAX_LINE_BYTES", 100)
    path = tmp_path / "long.jsonl"
    path.write_bytes(b'"before"\n"' + b"x" * 1050 + b'"\n"after"\n')
    first, second, third = (row for _, row in read_rows(str(path)))
    assert (first, third) == (b'"before"', b'"after"') and "longer than 100" in str(second)


DAMAGED = [b"PAR1", b"ARROW1", b"\xff\xff\xff\xff", b"\x1f\x8b", b""]


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(start=st.sampled_from(DAMAGED), data=st.binary(max_size=200))
def test_any_bytes_are_rows_or_bad_rows(tmp_path, start, data):
    path = tmp_path / "any"
    path.write_bytes(start + data)
    read_as_everything(path)


def read_as_everything(path):
    """Each row as each kind: it is one, or a BadRow; a file as a whole may be refused with an error for a person."""
    try:
        compute_content_hash(str(path))
    except CharterError:
        return
    for _, row in read_rows(str(path)):
        for parse in ROW_PARSERS.values():
            try:
                parse(row, source="s", max_chars=1000)
            except RowError as error:
                assert str(error)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    values = [{"prompt": f"p{n}", "chosen": "c" * n, "rejected": "r", "tags": ["t"] * n, "source": "s"} for n in range(20)]
    return [write(folder, name, values).read_bytes() for name in ("a.jsonl.gz", "a.parquet", "a.arrow")]


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_files_are_rows_or_bad_rows(tmp_path, whole, data):
    content = bytearray(data.draw(st.sampled_from(whole)))
    for _ in range(data.draw(st.integers(0, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path / "damaged"
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    read_as_everything(path)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(sorted(reading.ROW_COLUMNS)) | st.text(), inner)
    ),
    max_leaves=12,
)
TURNS = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "system"]), "content": st.text(max_size=9)})
)
TRANSCRIPT = st.lists(st.sampled_from(["\n\nHuman: ", "\n\nAssistant: ", "a: b", "\n", " ", "Human"]), max_size=8).map("".join)
FIELD = TURNS | TRANSCRIPT | JSON
ROW = st.dictionaries(st.sampled_from(sorted(reading.ROW_COLUMNS)), FIELD, max_size=6)


@settings(max_examples=300, deadline=None)
@given(row=ROW, kind=st.sampled_from(sorted(ROW_PARSERS)))
def test_any_value_is_a_good_row_or_a_bad_one(row, kind):
    try:
        parsed = ROW_PARSERS[kind](row, source="s", max_chars=1000)
    except RowError as error:
        assert str(error)
    else:
        assert parsed.messages[-1].role == "user" and all(message.content.strip() for message in parsed.messages)


# Dialogues


def hh(*messages):
    return "".join(f"\n\n{who}: {text}" for who, text in messages)


BEFORE = (("Human", "Can you help: me?"), ("Assistant", "Yes.\n\nHere is how:\n\n1. Human error: avoid it."))
ASKED = (*BEFORE, ("Human", "An Assistant: what is it?\nHuman: a word."))


def test_only_a_marker_at_the_beginning_of_a_paragraph_splits():
    row = {"chosen": hh(*ASKED, ("Assistant", "A helper: like me.")), "rejected": hh(*ASKED, ("Assistant", "No: idea."))}
    parsed = parse_preference(row, source="s", max_chars=999)
    assert [message.content for message in parsed.messages] == [text for _, text in ASKED]
    assert [message.role for message in parsed.messages] == ["user", "assistant", "user"]
    assert (parsed.response_a, parsed.response_b, parsed.p_a) == ("A helper: like me.", "No: idea.", 1.0)
    assert parse_prompt(row, source="s", max_chars=999).messages == parsed.messages
    shown = parse_demonstration(row, source="s", max_chars=999)
    assert (shown.messages, shown.completion) == (parsed.messages, "A helper: like me.")


@given(texts=st.lists(st.text(alphabet="abHumanAssit: \n.", min_size=1).map(str.strip).filter(bool), min_size=2, max_size=6))
def test_a_dialogue_comes_back_as_it_was_written(texts):
    texts = [text for text in texts if len(reading_markers(text)) == 1] or ["x"]
    messages = [("Human" if n % 2 == 0 else "Assistant", text) for n, text in enumerate(texts)]
    asked = messages if messages[-1][0] == "Human" else messages[:-1]
    row = {"chosen": hh(*asked, ("Assistant", "yes")), "rejected": hh(*asked, ("Assistant", "no"))}
    parsed = parse_preference(row, source="s", max_chars=9999)
    assert [message.content for message in parsed.messages] == [text for _, text in asked]


def reading_markers(text):
    from producers.parse import SPEAKER_PATTERN

    return SPEAKER_PATTERN.split(f"x\n\n{text}")


def test_turns_of_one_role_in_a_row_are_joined_and_empty_ones_left_out():
    messages = (("Human", "one"), ("Assistant", ""), ("Human", "two"), ("Assistant", "three"), ("Assistant", "four"))
    shown = parse_demonstration({"chosen": hh(*messages)}, source="s", max_chars=99)
    assert [message.content for message in shown.messages] == ["one\n\ntwo"] and shown.completion == "three\n\nfour"


def test_a_plain_prompt_that_talks_of_humans_is_one_turn():
    (message,) = parse_prompt({"prompt": "Human: what is an Assistant: a robot?"}, source="s", max_chars=99).messages
    assert message.content == "Human: what is an Assistant: a robot?"
    asked = parse_prompt(
        {"prompt": hh(("Human", "hi"), ("Assistant", "yes?"), ("Human", "go")) + "\n\nAssistant:"}, source="s", max_chars=99
    )
    assert [message.content for message in asked.messages] == ["hi", "yes?", "go"]


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "q", "chosen": "good", "rejected": "bad"},
        {"prompt": [user("q")], "chosen": [assistant("good")], "rejected": [assistant("bad")]},
        {"prompt": "q", "chosen": [user("q"), assistant("good")], "rejected": [user("q"), assistant("bad")]},
        {"chosen": [user("q"), assistant("good")], "rejected": [user("q"), assistant("bad")]},
        {"prompt": "q", "response_a": "good", "response_b": "bad", "p_a": 1},
    ],
)
def test_every_form_of_a_comparison(row):
    parsed = parse_preference(row, source="s", max_chars=99)
    assert (parsed.messages[0].content, parsed.response_a, parsed.response_b, parsed.p_a) == ("q", "good", "bad", 1.0)


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "q", "completion": "yes"},
        {"messages": [user("q"), assistant("yes")]},
        {"prompt": [user("q")], "completion": [assistant("yes")]},
    ],
)
def test_every_form_of_a_demonstration(row):
    shown = parse_demonstration(row, source="s", max_chars=99)
    assert (shown.messages[0].content, shown.completion, shown.is_complete) == ("q", "yes", True)


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ({"prompt": "q", "chosen": "x"}, "neither"),
        ({"prompt": "q", "response_a": "x", "response_b": "y"}, '"p_a"'),
        ({"prompt": "q", "response_a": "x", "response_b": "y", "p_a": 1.5}, "probability"),
        ({"prompt": "q", "response_a": "x", "response_b": "y", "p_a": True}, "probability"),
        ({"prompt": "q", "response_a": "x", "response_b": "y", "p_a": float("nan")}, "probability"),
        ({"prompt": "q", "chosen": "x", "rejected": "x"}, "the same"),
        ({"prompt": "q", "chosen": "x", "rejected": " "}, "empty answer"),
        ({"prompt": "q", "chosen": "x" * 999, "rejected": "y"}, "characters"),
        ({"prompt": "q", "chosen": [user("other"), assistant("x")], "rejected": "y"}, "another prompt"),
        ({"chosen": hh(("Human", "q"), ("Assistant", "x")), "rejected": hh(("Human", "p"), ("Assistant", "x"))}, "same prompt"),
        ({"chosen": hh(("Assistant", "x")), "rejected": hh(("Assistant", "y"))}, "no message of the user"),
        ({"chosen": "well" + hh(("Human", "q")), "rejected": "y"}, "before the first"),
    ],
)
def test_what_is_no_comparison_says_why(row, why):
    with pytest.raises(RowError, match=why):
        parse_preference(row, source="s", max_chars=500)


def test_a_page_of_blank_lines_is_read_in_one_go():
    text = "\n\nHuman: q" + "\n" * 200_000 + "x"
    assert parse_prompt({"prompt": text}, source="s", max_chars=10**6).messages[0].content.startswith("q")


def test_standard_input_is_lines(monkeypatch):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b'\xef\xbb\xbf"one"\n\n"two"')))
    assert list(read_rows("-")) == [(1, b'"one"'), (3, b'"two"')]
