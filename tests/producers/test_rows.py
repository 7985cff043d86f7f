"""File formats: each format gives the same rows; arbitrary bytes give rows or RowErrors, and no other exception."""

import csv
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
from producers import rows as rows_module
from producers.parse import ROW_PARSERS, RowError, parse_demonstration, parse_preference, parse_prompt
from producers.rows import compute_content_hash, read_rows

VALUES = [
    {"prompt": "one", "source": None, "tags": ["t"]},
    {"prompt": "two", "source": "s", "tags": None},
    {"prompt": "three\nlines", "source": None, "tags": []},
]


def format_csv(values, delimiter=","):
    """Return CSV with a header. Lists are JSON, as other tools write them."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, list(values[0]), delimiter=delimiter)
    writer.writeheader()
    for value in values:
        writer.writerow({name: json.dumps(item) if isinstance(item, list) else item for name, item in value.items()})
    return buffer.getvalue().encode()


def write_rows(folder, name, values=VALUES):
    """Write the values in the format of the file name; return the path."""
    path = folder / name
    text = b"".join(json.dumps(value).encode() + b"\n" for value in values)
    if ".json" in name and ".jsonl" not in name:
        text = json.dumps(values, indent=2).encode()
    elif ".csv" in name or ".tsv" in name:
        text = format_csv(values, "," if ".csv" in name else "\t")
    table = pa.Table.from_pylist(values)
    if name.endswith(".gz"):
        path.write_bytes(gzip.compress(text))
    elif name.endswith(".parquet"):
        parquet.write_table(table, path)
    elif name.endswith(".arrow"):
        with pa.ipc.new_file(path, table.schema) as file:
            file.write_table(table)
    elif name.endswith(".arrows"):
        with pa.ipc.new_stream(path, table.schema) as file:
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


FORMATS = [
    "a.jsonl", "a.jsonl.gz", "a.json", "a.json.gz", "a.csv", "a.csv.gz", "a.tsv", "a.parquet", "a.arrow", "a.arrows", "misnamed",
    "saved", "folder",
]  # fmt: skip


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_rows(tmp_path, name):
    path = write_rows(tmp_path, name)
    prompts = [(number, parse_prompt(row, source="default", max_chars=99)) for number, row in read_rows(str(path))]
    assert [(n, prompt.messages[0].content, prompt.source, prompt.tags) for n, prompt in prompts] == [
        (1, "one", "default", ("t",)), (2, "two", "s", ()), (3, "three\nlines", "default", ()),
    ]  # fmt: skip
    assert [number for number, _ in read_rows(str(path), 2, 2)] == [2]
    assert len(compute_content_hash(str(path))) == 64


def test_data_set_with_several_splits_is_rejected(tmp_path):
    import datasets

    part = datasets.Dataset.from_list(VALUES)
    datasets.DatasetDict({"train": part, "test": part}).save_to_disk(tmp_path / "both")
    with pytest.raises(UsageError, match=r"several splits: train, test[^$]*both/train"):
        compute_content_hash(str(tmp_path / "both"))
    assert len(list(read_rows(str(tmp_path / "both" / "train")))) == 3
    write_rows(tmp_path, "folder")
    shutil.copy(tmp_path / "folder" / "train-00000-of-00002.parquet", tmp_path / "folder" / "test-00000-of-00001.parquet")
    with pytest.raises(UsageError, match="several splits: test, train"):
        compute_content_hash(str(tmp_path / "folder"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="no data"):
        compute_content_hash(str(tmp_path / "empty"))


def test_truncated_gzip_file_gives_its_intact_rows_and_then_a_row_error(tmp_path):
    text = b"".join(json.dumps(f"prompt {n} {hash(str(n))}").encode() + b"\n" for n in range(5000))
    path = tmp_path / "truncated.jsonl.gz"
    path.write_bytes(gzip.compress(text)[:-20_000])
    rows = [row for _, row in read_rows(str(path))]
    assert len(rows) > 500 and isinstance(rows[-1], RowError) and "damaged" in str(rows[-1])
    assert not any(isinstance(row, RowError) for row in rows[:-1])


def test_overlong_line_is_skipped(tmp_path, monkeypatch):
    monkeypatch.setattr(rows_module, "MAX_LINE_BYTES", 100)
    path = tmp_path / "long.jsonl"
    path.write_bytes(b'"before"\n"' + b"x" * 1050 + b'"\n"after"\n')
    first, second, third = (row for _, row in read_rows(str(path)))
    assert (first, third) == (b'"before"', b'"after"') and "longer than 100" in str(second)


MAGIC_BYTES = [b"PAR1", b"ARROW1", b"\xff\xff\xff\xff", b"\x1f\x8b", b""]


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(start=st.sampled_from(MAGIC_BYTES), data=st.binary(max_size=200))
def test_arbitrary_bytes_give_rows_or_row_errors(tmp_path, start, data):
    path = tmp_path / "any"
    path.write_bytes(start + data)
    parse_as_every_kind(path)


def parse_as_every_kind(path):
    """Parse each row as each kind: it parses or raises RowError. The file as a whole may raise CharterError."""
    try:
        compute_content_hash(str(path))
        rows = list(read_rows(str(path)))
    except CharterError:
        return
    for _, row in rows:
        for parse in ROW_PARSERS.values():
            try:
                parse(row, source="s", max_chars=1000)
            except RowError as error:
                assert str(error)


@pytest.fixture(scope="module")
def intact_files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("intact")
    values = [{"prompt": f"p{n}", "chosen": "c" * n, "rejected": "r", "tags": ["t"] * n, "source": "s"} for n in range(20)]
    names = ("a.jsonl.gz", "a.json", "a.csv", "a.parquet", "a.arrow")
    return {name: write_rows(folder, name, values).read_bytes() for name in names}


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_files_give_rows_or_row_errors(tmp_path, intact_files, data):
    name = data.draw(st.sampled_from(sorted(intact_files)))
    content = bytearray(intact_files[name])
    for _ in range(data.draw(st.integers(0, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path / name
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    parse_as_every_kind(path)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(sorted(rows_module.ROW_COLUMNS)) | st.text(), inner)
    ),
    max_leaves=12,
)
ROLE = st.sampled_from(["user", "assistant", "system", "human", "gpt", "tool", "robot"])
MESSAGE = st.fixed_dictionaries(
    {}, optional={"role": ROLE, "content": st.text(max_size=9), "from": ROLE, "value": JSON, "weight": JSON, "tool_calls": JSON}
)
MESSAGES = st.lists(MESSAGE, max_size=4) | st.lists(MESSAGE, max_size=4).map(json.dumps) | MESSAGE
TRANSCRIPT = st.lists(st.sampled_from(["\n\nHuman: ", "\n\nAssistant: ", "a: b", "\n", " ", "Human"]), max_size=8).map("".join)
FIELD = MESSAGES | TRANSCRIPT | JSON
ROW = st.dictionaries(st.sampled_from(sorted(rows_module.ROW_COLUMNS)), FIELD, max_size=6)


@settings(max_examples=300, deadline=None)
@given(row=ROW, kind=st.sampled_from(sorted(ROW_PARSERS)))
def test_every_value_parses_or_raises_row_error(row, kind):
    try:
        parsed = ROW_PARSERS[kind](row, source="s", max_chars=1000)
    except RowError as error:
        assert str(error)
    else:
        assert parsed.messages[-1].role == "user" and all(message.content.strip() for message in parsed.messages)


# Dialogues


def format_hh_transcript(*messages):
    return "".join(f"\n\n{speaker}: {text}" for speaker, text in messages)


EARLIER_MESSAGES = (("Human", "Can you help: me?"), ("Assistant", "Yes.\n\nHere is how:\n\n1. Human error: avoid it."))
PROMPT_MESSAGES = (*EARLIER_MESSAGES, ("Human", "An Assistant: what is it?\nHuman: a word."))


def test_speaker_marker_splits_only_at_the_beginning_of_a_paragraph():
    row = {
        "chosen": format_hh_transcript(*PROMPT_MESSAGES, ("Assistant", "A helper: like me.")),
        "rejected": format_hh_transcript(*PROMPT_MESSAGES, ("Assistant", "No: idea.")),
    }
    parsed = parse_preference(row, source="s", max_chars=999)
    assert [message.content for message in parsed.messages] == [text for _, text in PROMPT_MESSAGES]
    assert [message.role for message in parsed.messages] == ["user", "assistant", "user"]
    assert (parsed.response_a, parsed.response_b, parsed.p_a) == ("A helper: like me.", "No: idea.", 1.0)
    assert parse_prompt(row, source="s", max_chars=999).messages == parsed.messages
    demonstration = parse_demonstration(row, source="s", max_chars=999)
    assert (demonstration.messages, demonstration.completion) == (parsed.messages, "A helper: like me.")


@given(texts=st.lists(st.text(alphabet="abHumanAssit: \n.", min_size=1).map(str.strip).filter(bool), min_size=2, max_size=6))
def test_transcript_round_trips(texts):
    texts = [text for text in texts if len(split_by_speaker(text)) == 1] or ["x"]
    messages = [("Human" if n % 2 == 0 else "Assistant", text) for n, text in enumerate(texts)]
    prompt_messages = messages if messages[-1][0] == "Human" else messages[:-1]
    row = {
        "chosen": format_hh_transcript(*prompt_messages, ("Assistant", "yes")),
        "rejected": format_hh_transcript(*prompt_messages, ("Assistant", "no")),
    }
    parsed = parse_preference(row, source="s", max_chars=9999)
    assert [message.content for message in parsed.messages] == [text for _, text in prompt_messages]


def split_by_speaker(text):
    from producers.parse import SPEAKER_PATTERN

    return SPEAKER_PATTERN.split(f"x\n\n{text}")


def test_consecutive_messages_of_one_role_are_joined_without_the_empty_ones():
    messages = (("Human", "one"), ("Assistant", ""), ("Human", "two"), ("Assistant", "three"), ("Assistant", "four"))
    demonstration = parse_demonstration({"chosen": format_hh_transcript(*messages)}, source="s", max_chars=99)
    assert [message.content for message in demonstration.messages] == [
        "one\n\ntwo"
    ] and demonstration.completion == "three\n\nfour"


def test_plain_prompt_with_speaker_names_is_one_message():
    (message,) = parse_prompt({"prompt": "As a Human: what is an Assistant: a robot?"}, source="s", max_chars=99).messages
    assert message.content == "As a Human: what is an Assistant: a robot?"
    prompt = parse_prompt(
        {"prompt": format_hh_transcript(("Human", "hi"), ("Assistant", "yes?"), ("Human", "go")) + "\n\nAssistant:"},
        source="s",
        max_chars=99,
    )
    assert [message.content for message in prompt.messages] == ["hi", "yes?", "go"]


def make_user_message(text):
    return {"role": "user", "content": text}


def make_assistant_message(text):
    return {"role": "assistant", "content": text}


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "q", "chosen": "good", "rejected": "bad"},
        {
            "prompt": [make_user_message("q")],
            "chosen": [make_assistant_message("good")],
            "rejected": [make_assistant_message("bad")],
        },
        {
            "prompt": "q",
            "chosen": [make_user_message("q"), make_assistant_message("good")],
            "rejected": [make_user_message("q"), make_assistant_message("bad")],
        },
        {
            "chosen": [make_user_message("q"), make_assistant_message("good")],
            "rejected": [make_user_message("q"), make_assistant_message("bad")],
        },
        {"prompt": "q", "response_a": "good", "response_b": "bad", "p_a": 1},
    ],
)
def test_parse_preference_accepts_every_form(row):
    parsed = parse_preference(row, source="s", max_chars=99)
    assert (parsed.messages[0].content, parsed.response_a, parsed.response_b, parsed.p_a) == ("q", "good", "bad", 1.0)


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "q", "completion": "yes"},
        {"messages": [make_user_message("q"), make_assistant_message("yes")]},
        {"prompt": [make_user_message("q")], "completion": [make_assistant_message("yes")]},
    ],
)
def test_parse_demonstration_accepts_every_form(row):
    demonstration = parse_demonstration(row, source="s", max_chars=99)
    assert (demonstration.messages[0].content, demonstration.completion, demonstration.is_complete) == ("q", "yes", True)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "q", "chosen": "x"}, "needs"),
        ({"prompt": "q", "response_a": "x", "response_b": "y"}, '"p_a"'),
        ({"prompt": "q", "response_a": "x", "response_b": "y", "p_a": 1.5}, "probability"),
        ({"prompt": "q", "response_a": "x", "response_b": "y", "p_a": True}, "probability"),
        ({"prompt": "q", "response_a": "x", "response_b": "y", "p_a": float("nan")}, "probability"),
        ({"prompt": "q", "chosen": "x", "rejected": "x"}, "the same"),
        ({"prompt": "q", "chosen": "x", "rejected": " "}, "empty response"),
        ({"prompt": "q", "chosen": "x" * 999, "rejected": "y"}, "characters"),
        (
            {"prompt": "q", "chosen": [make_user_message("other"), make_assistant_message("x")], "rejected": "y"},
            "another prompt",
        ),
        (
            {
                "chosen": format_hh_transcript(("Human", "q"), ("Assistant", "x")),
                "rejected": format_hh_transcript(("Human", "p"), ("Assistant", "x")),
            },
            "different prompts",
        ),
        (
            {"chosen": format_hh_transcript(("Assistant", "x")), "rejected": format_hh_transcript(("Assistant", "y"))},
            "no user message",
        ),
        ({"chosen": "well" + format_hh_transcript(("Human", "q")), "rejected": "y"}, "before the first"),
    ],
)
def test_parse_preference_reports_the_reason_for_an_invalid_row(row, reason):
    with pytest.raises(RowError, match=reason):
        parse_preference(row, source="s", max_chars=500)


def test_speaker_pattern_is_linear_in_blank_lines():
    text = "\n\nHuman: q" + "\n" * 200_000 + "x"
    assert parse_prompt({"prompt": text}, source="s", max_chars=10**6).messages[0].content.startswith("q")


def test_standard_input_is_read_as_lines(monkeypatch):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b'\xef\xbb\xbf"one"\n\n"two"')))
    assert list(read_rows("-")) == [(1, b'"one"'), (3, b'"two"')]
