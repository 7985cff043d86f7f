"""Public forms of rows: each is read with its whole meaning, or refused with a reason. No column is dropped without a word."""

import csv
import json

import pytest

from engine.errors import UsageError
from engine.progress import WorkProgress
from producers.parse import RowError, parse_demonstration, parse_preference, parse_prompt
from producers.rows import read_rows

QUESTION, GOOD, BAD, SYSTEM = "Where may I moor?", "At the west quay.", "Anywhere you like.", "Answer for the harbor."


def user(text=QUESTION):
    return {"role": "user", "content": text}


def assistant(text=GOOD, **fields):
    return {"role": "assistant", "content": text, **fields}


def system(text=SYSTEM):
    return {"role": "system", "content": text}


def share_gpt(*messages):
    names = {"user": "human", "assistant": "gpt", "system": "system"}
    return [{"from": names[message["role"]], "value": message["content"]} for message in messages]


def read(parse, row, **columns):
    return parse(row, source="s", max_chars=2000, columns=columns)


def to_pairs(parsed):
    return [(message.role, message.content) for message in parsed.messages]


ONE_TURN = [("user", QUESTION)]
WITH_SYSTEM = [("system", SYSTEM), ("user", QUESTION)]
EARLIER = [user("Hello"), assistant("Good day.")]
LONGER = [("user", "Hello"), ("assistant", "Good day."), ("user", QUESTION)]
RESPONSES = {"chosen": GOOD, "rejected": BAD}

PREFERENCES = {
    "TRL, explicit prompt": ({"prompt": [user()], "chosen": [assistant()], "rejected": [assistant(BAD)]}, ONE_TURN),
    "TRL, with system": ({"prompt": [system(), user()], "chosen": [assistant()], "rejected": [assistant(BAD)]}, WITH_SYSTEM),
    "TRL, implicit prompt": (
        {"chosen": [system(), user(), assistant()], "rejected": [system(), user(), assistant(BAD)]}, WITH_SYSTEM
    ),
    "implicit prompt of several turns": (
        {"chosen": [*EARLIER, user(), assistant()], "rejected": [*EARLIER, user(), assistant(BAD)]}, LONGER
    ),
    "axolotl, system column": ({"system": SYSTEM, "prompt": QUESTION, **RESPONSES}, WITH_SYSTEM),
    "axolotl, system column and whole dialogues": (
        {"system": SYSTEM, "prompt": QUESTION, "chosen": [user(), assistant()], "rejected": [user(), assistant(BAD)]}, WITH_SYSTEM
    ),
    "empty system column": ({"system": "", "prompt": QUESTION, **RESPONSES}, ONE_TURN),
    "empty system message": ({"prompt": [system(""), user()], **RESPONSES}, ONE_TURN),
    "axolotl, messages and single messages": (
        {"messages": [*EARLIER, user()], "chosen": assistant(), "rejected": assistant(BAD)}, LONGER
    ),
    "LLaMA-Factory, ShareGPT": (
        {
            "conversations": share_gpt(*EARLIER, user()),
            "chosen": share_gpt(assistant())[0],
            "rejected": share_gpt(assistant(BAD))[0],
        },
        LONGER,
    ),
    "LLaMA-Factory, Alpaca": (
        {"instruction": "Where may I", "input": "moor?", "system": SYSTEM, **RESPONSES},
        [("system", SYSTEM), ("user", "Where may I\nmoor?")],
    ),
    "Alpaca with history": ({"instruction": QUESTION, "input": "", "history": [["Hello", "Good day."]], **RESPONSES}, LONGER),
    "OpenOrca, system_prompt": ({"system_prompt": SYSTEM, "prompt": QUESTION, **RESPONSES}, WITH_SYSTEM),
    "system_message": ({"system_message": SYSTEM, "messages": [user()], **RESPONSES}, WITH_SYSTEM),
    "Dolly, context": (
        {"instruction": "Where may I", "context": "moor?", **RESPONSES}, [("user", "Where may I\nmoor?")],
    ),
    "context that the prompt contains": ({"context": "moor", "prompt": QUESTION, **RESPONSES}, ONE_TURN),
    "number of turns": ({"turns": 1, "prompt": QUESTION, **RESPONSES}, ONE_TURN),
    "scores that agree with the label": ({"prompt": QUESTION, **RESPONSES, "score_chosen": 8.5, "score_rejected": 3}, ONE_TURN),
    "WildChat, conversation": ({"conversation": [*EARLIER, user()], **RESPONSES}, LONGER),
    "role model": ({"prompt": [user("Hello"), {"role": "model", "content": "Good day."}, user()], **RESPONSES}, LONGER),
    "OpenAI": (
        {
            "input": {"messages": [system(), user()], "tools": [], "parallel_tool_calls": True},
            "preferred_output": [assistant()],
            "non_preferred_output": [assistant(BAD)],
        },
        WITH_SYSTEM,
    ),
    "redundant prompt and messages columns": (
        {
            "prompt": "Hello",
            "messages": [*EARLIER, user(), assistant()],
            "chosen": [*EARLIER, user(), assistant()],
            "rejected": [*EARLIER, user(), assistant(BAD)],
        },
        LONGER,
    ),
    "JSON strings": (
        {"prompt": json.dumps([system(), user()]), "chosen": json.dumps([assistant()]), "rejected": json.dumps(assistant(BAD))},
        WITH_SYSTEM,
    ),
    "JSON strings of whole dialogues, content first": (
        {
            "prompt": QUESTION,
            "chosen": json.dumps([{"content": QUESTION, "role": "user"}, {"content": GOOD, "role": "assistant"}]),
            "rejected": json.dumps(share_gpt(user(), assistant(BAD))),
        },
        ONE_TURN,
    ),
    "struct of lists": (
        {"prompt": {"role": ["system", "user"], "content": [SYSTEM, QUESTION]}, **RESPONSES}, WITH_SYSTEM
    ),
    "developer message and text parts": (
        {"prompt": [{"role": "developer", "content": [{"type": "text", "text": SYSTEM}]}, user()], **RESPONSES}, WITH_SYSTEM
    ),
    "transcript without the leading blank line": ({"prompt": f"Human: {QUESTION}\n\nAssistant:", **RESPONSES}, ONE_TURN),
    "transcript with CRLF": (
        {"prompt": f"\r\n\r\nHuman: Hello\r\n\r\nAssistant: Good day.\r\n\r\nHuman: {QUESTION}\r\n\r\nAssistant:", **RESPONSES},
        LONGER,
    ),
    "transcript and the rest of its last line": (
        {"prompt": f"\n\nHuman: {QUESTION}\n\nAssistant:", "chosen": f" {GOOD}", "rejected": f" {BAD}\n"}, ONE_TURN
    ),
    "prompt and whole transcripts": (
        {
            "prompt": QUESTION,
            "chosen": f"\n\nHuman: {QUESTION}\n\nAssistant: {GOOD}",
            "rejected": f"Human: {QUESTION}\r\n\r\nAssistant: {BAD}",
        },
        ONE_TURN,
    ),
    "transcripts with a system column": (
        {
            "system": SYSTEM,
            "chosen": f"\n\nHuman: {QUESTION}\n\nAssistant: {GOOD}",
            "rejected": f"\n\nHuman: {QUESTION}\n\nAssistant: {BAD}",
        },
        WITH_SYSTEM,
    ),
}  # fmt: skip


@pytest.mark.parametrize(("row", "messages"), PREFERENCES.values(), ids=PREFERENCES)
def test_public_form_of_a_comparison_is_read(row, messages):
    parsed = read(parse_preference, row)
    assert to_pairs(parsed) == messages and (parsed.response_a, parsed.response_b) == (GOOD, BAD)
    assert to_pairs(read(parse_prompt, row)) == messages
    demonstration = read(parse_demonstration, row)
    assert to_pairs(demonstration) == messages and demonstration.completion == GOOD


DEMONSTRATIONS = {
    "OpenAI": {"messages": [system(), user(), assistant(weight=1)]},
    "ShareGPT": {"conversations": share_gpt(system(), user(), assistant())},
    "ShareGPT with a system column": {"conversations": share_gpt(user(), assistant()), "system": SYSTEM, "tools": "[]"},
    "Alpaca": {"instruction": QUESTION, "input": "", "output": GOOD, "system": SYSTEM},
    "Self-Instruct": {"instruction": QUESTION, "input": "<noinput>", "output": GOOD, "system": SYSTEM},
    "Dolly": {"instruction": QUESTION, "context": "", "response": GOOD, "system": SYSTEM, "category": "open_qa"},
    "KTO, desirable": {"prompt": [system(), user()], "completion": [assistant()], "label": True},
    "messages as JSON": {"messages": json.dumps([system(), user(), assistant()])},
    "prompt, completion and messages": {"prompt": QUESTION, "messages": [system(), user(), assistant()]},
    "Parquet, null in each struct": {
        "messages": [m | {"tool_calls": None, "name": None} for m in (system(), user(), assistant())], "tools": None
    },
}  # fmt: skip


@pytest.mark.parametrize("row", DEMONSTRATIONS.values(), ids=DEMONSTRATIONS)
def test_public_form_of_a_demonstration_is_read(row):
    parsed = read(parse_demonstration, row)
    assert to_pairs(parsed) == WITH_SYSTEM and parsed.completion == GOOD


CALL = {"tool_calls": [{"type": "function", "function": {"name": "tide", "arguments": "{}"}}]}
REFUSED_PREFERENCES = {
    "no prompt": ({"question": QUESTION, **RESPONSES}, "columns question, chosen, rejected"),
    "texts without a prompt": (RESPONSES, 'no "prompt"'),
    "TRL, implicit prompt in plain texts": ({"chosen": QUESTION + GOOD, "rejected": QUESTION + BAD}, 'no "prompt"'),
    "two prompts": ({"prompt": "Other?", "messages": [user()], **RESPONSES}, "another prompt"),
    "two dialogue columns": ({"messages": [user()], "conversations": share_gpt(user("x")), **RESPONSES}, "conversations"),
    "two system messages": ({"system": "Be rude.", "prompt": [system(), user()], **RESPONSES}, "several system"),
    "dialogues that differ in the system message": (
        {"chosen": [system(), user(), assistant()], "rejected": [system("Be rude."), user(), assistant(BAD)]}, "several system"
    ),
    "dialogue with a third response": ({"messages": [user(), assistant("x")], **RESPONSES}, "neither of the two"),
    "both forms": ({"prompt": QUESTION, **RESPONSES, "response_a": GOOD, "response_b": BAD, "p_a": 1}, "both"),
    "p of the other form": ({"prompt": QUESTION, **RESPONSES, "p_a": 0.2}, "both"),
    "tool call in a response": (
        {"prompt": QUESTION, "chosen": [assistant(**CALL)], "rejected": [assistant(BAD)]}, r"chosen\[1\] uses a tool"
    ),
    "tool call in the prompt": ({"prompt": [user(), assistant(**CALL), user()], **RESPONSES}, r"prompt\[2\] uses a tool"),
    "tool result": ({"prompt": [user(), {"role": "tool", "content": "3"}, user()], **RESPONSES}, "uses a tool"),
    "function call of ShareGPT": (
        {"conversations": [{"from": "human", "value": "x"}, {"from": "function_call", "value": "{}"}], **RESPONSES}, "uses a tool"
    ),
    "tools": ({"prompt": QUESTION, "tools": [{"type": "function"}], **RESPONSES}, '"tools" is not supported'),
    "tools of OpenAI": (
        {"input": {"messages": [user()], "tools": [{"x": 1}]}, "preferred_output": [assistant()],
         "non_preferred_output": [assistant(BAD)]}, '"tools" is not supported',
    ),
    "context beside a prompt": ({"prompt": QUESTION, "context": "The west quay is free.", **RESPONSES}, "--column context="),
    "context as a list": ({"prompt": QUESTION, "context": ["The west quay is free."], **RESPONSES}, "--column instruction=NAME"),
    "context and input": ({"instruction": QUESTION, "input": "x", "context": "y", **RESPONSES}, 'both "input" and "context"'),
    "question beside a template": ({"prompt": "Answer the question.", "question": QUESTION, **RESPONSES}, '"question" may be'),
    "documents": ({"prompt": QUESTION, "documents": [{"text": "x"}], **RESPONSES}, '"documents" may be'),
    "persona": ({"prompt": QUESTION, "persona": "A pilot.", **RESPONSES}, '"persona" may be'),
    "another name of the system message": ({"prompt": QUESTION, "sys": SYSTEM, **RESPONSES}, "--column system=sys"),
    "capital letter in a name": ({"prompt": QUESTION, "System Prompt": SYSTEM, **RESPONSES}, '"System Prompt" may be'),
    "context in capitals": ({"prompt": QUESTION, "Context": "The quay is free.", **RESPONSES}, "--column Context="),
    "system and system_prompt": ({"system": SYSTEM, "system_prompt": "x", "prompt": QUESTION, **RESPONSES}, 'both "system"'),
    "system message after the first": ({"prompt": [user("Hello"), system(), user()], **RESPONSES}, "not the first message"),
    "scores that contradict the label": (
        {"prompt": QUESTION, **RESPONSES, "score_chosen": 3.0, "score_rejected": "8.5"}, "3 is not above"
    ),
    "scores of a tie": ({"prompt": QUESTION, **RESPONSES, "chosen-rating": 5, "rejected-rating": 5}, "label is uncertain"),
    "negative margin": ({"prompt": QUESTION, **RESPONSES, "margin": "-0.5"}, "below 0"),
    "false label": ({"prompt": QUESTION, **RESPONSES, "label": 0}, '"label" is false'),
    "missing value as text": ({"prompt": QUESTION, "chosen": "nan", "rejected": BAD}, "missing value"),
    "missing input as text": ({"instruction": QUESTION, "input": "None", **RESPONSES}, "missing value"),
    "images in a message": ({"prompt": [user() | {"images": ["x.png"]}], **RESPONSES}, "only text"),
    "invisible prompt": ({"prompt": "\u200b", **RESPONSES}, "empty prompt"),
    "empty last message": ({"messages": [*EARLIER, user(" ")], **RESPONSES}, "empty prompt"),
    "role of a tool response": ({"prompt": [user(), {"role": "tool_response", "content": "3"}, user()], **RESPONSES}, "uses a tool"),
    "id of a tool call": ({"prompt": [user(), user() | {"tool_call_id": "1"}], **RESPONSES}, "uses a tool"),
    "tool call in a text": (
        {"prompt": QUESTION, "chosen": '<tool_call>\n{"name": "tide"}\n</tool_call>', "rejected": BAD}, "mark of a tool"
    ),
    "list of tools in the system message": ({"system": "Use these.\n<tools>[]</tools>", "prompt": QUESTION, **RESPONSES}, "mark of a"),
    "image": ({"prompt": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "x"}]}], **RESPONSES}, "text part"),
    "Python list as text": ({"prompt": str([user()]), **RESPONSES}, "not JSON"),
    "cut JSON": ({"prompt": json.dumps([user()])[:-3], **RESPONSES}, "not JSON"),
    "messages as plain text": ({"messages": QUESTION, **RESPONSES}, "not a list of messages"),
    "unknown role": ({"prompt": [{"role": "robot", "content": "x"}], **RESPONSES}, "needs a role"),
    "unknown role as JSON": ({"prompt": json.dumps([{"role": "robot", "content": "x"}]), **RESPONSES}, "needs a role"),
    "input without instruction": ({"prompt": "Translate", "input": "hafen", **RESPONSES}, '"input" without'),
    "list of two outputs": ({"instruction": QUESTION, "output": [GOOD, BAD]}, "needs"),
    "speaker name without a second message": ({"prompt": f"Human: {QUESTION}", **RESPONSES}, "only one message"),
    "transcript with single line ends": ({"prompt": f"\n\nHuman: {QUESTION}\nAssistant:", **RESPONSES}, "no blank line"),
    "text before a transcript": ({"prompt": f"Be kind.\n\nHuman: {QUESTION}\n\nAssistant:", **RESPONSES}, "header of a response"),
    "rendered prompt": ({"prompt": f"<|im_start|>user\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n", **RESPONSES}, "header"),
    "rendered prompt without the last header": ({"prompt": f"<s>[INST] {QUESTION}", **RESPONSES}, "header of a message"),
    "header before the response": (
        {"prompt": QUESTION, "chosen": f"<|im_start|>assistant\n{GOOD}", "rejected": BAD}, "header of a message"
    ),
    "rendered response": ({"prompt": QUESTION, "chosen": GOOD + "<|im_end|>\n", "rejected": BAD + "<|im_end|>\n"}, "end token"),
    "prompt in front of each response": (
        {"prompt": QUESTION * 2, "chosen": QUESTION * 2 + GOOD, "rejected": QUESTION * 2 + BAD}, "begin with the prompt"
    ),
    "two responses in a row": ({"chosen": [user(), assistant(), assistant()], "rejected": [user(), assistant(BAD)]}, "more than one"),
    "response of another role": ({"prompt": QUESTION, "chosen": [user("x")], "rejected": [assistant(BAD)]}, "another prompt"),
    "system message at the end": ({"chosen": [user(), system()], "rejected": [user(), assistant(BAD)]}, "not the first"),
}  # fmt: skip


@pytest.mark.parametrize(("row", "reason"), REFUSED_PREFERENCES.values(), ids=REFUSED_PREFERENCES)
def test_ambiguous_comparison_is_refused_with_the_reason(row, reason):
    with pytest.raises(RowError, match=reason):
        read(parse_preference, row)


REFUSED_DEMONSTRATIONS = {
    "undesirable (KTO)": ({"prompt": QUESTION, "completion": BAD, "label": False}, '"label" is false'),
    "undesirable (LLaMA-Factory, CSV)": ({"instruction": QUESTION, "output": BAD, "kto_tag": "false"}, '"kto_tag" is false'),
    "label of another kind": ({"prompt": QUESTION, "completion": GOOD, "label": "safe"}, "neither true nor false"),
    "weight 0": ({"messages": [user(), assistant(weight=0)]}, '"weight" excludes'),
    "train false": ({"messages": [user(), assistant(train=False)]}, '"train" excludes'),
    "weight 0 as text": ({"messages": [user(), assistant(weight="0.0")]}, '"weight" excludes'),
    "weight between 0 and 1": ({"messages": [user(), assistant(weight=0.5)]}, "not 1 or true"),
    "beginning of a response": ({"messages": [user(), assistant(prefix=True)]}, '"prefix" marks the beginning'),
    "tool call": ({"messages": [user(), assistant(**CALL)]}, "uses a tool"),
    "two completions": ({"prompt": QUESTION, "completion": GOOD, "chosen": BAD}, "both"),
    "another ending": ({"messages": [user(), assistant(BAD)], "completion": GOOD}, "another response"),
    "no completion": ({"prompt": QUESTION, "output": GOOD}, "columns prompt, output"),
    "prompt in front of the completion": ({"prompt": QUESTION * 2, "completion": QUESTION * 2 + GOOD}, "begins with the prompt"),
}  # fmt: skip


@pytest.mark.parametrize(("row", "reason"), REFUSED_DEMONSTRATIONS.values(), ids=REFUSED_DEMONSTRATIONS)
def test_ambiguous_demonstration_is_refused_with_the_reason(row, reason):
    with pytest.raises(RowError, match=reason):
        read(parse_demonstration, row)


@pytest.mark.parametrize(
    "text",
    [
        '{"name": "x"} as YAML?',
        "[1, 2, 3]",
        '[{"name": "x"}]',
        "[draft] Where?",
        "{x}",
        '[{"from": "Ayr", "to": "Oban", "value": 3}]',
    ],
)
def test_text_that_only_begins_like_json_stays_a_text(text):
    assert to_pairs(read(parse_prompt, {"prompt": text})) == [("user", text)]
    assert read(parse_demonstration, {"prompt": "q", "completion": text}).completion == text


def test_named_columns_are_read_and_other_columns_are_reported():
    row = {"question": QUESTION, "prompt": "a template", "chosen": GOOD, "rejected": BAD, "id": 7, "note": None}
    parsed = read(parse_preference, row, prompt="question")
    assert to_pairs(parsed) == ONE_TURN and parsed.unread_columns == ("id", "prompt")
    with pytest.raises(RowError, match='no "prompt"'):  # `prompt` is not read in place of the named column
        read(parse_preference, {"prompt": QUESTION, **RESPONSES}, prompt="question")


def test_context_is_joined_with_a_named_question():
    row = {"question": "Where may I", "context": "moor?", **RESPONSES}
    assert to_pairs(read(parse_preference, row, instruction="question")) == [("user", "Where may I\nmoor?")]


def test_ignored_columns_do_not_matter_and_a_given_probability_decides():
    row = {"prompt": QUESTION, **RESPONSES, "context": "x", "score_chosen": 1, "score_rejected": 2}
    assert read(parse_preference, row, context="", score_chosen="").p_a == 1.0
    assert read(parse_preference, row | {"p_chosen": 0.4}, context="").p_a == 0.4


def test_tool_mark_in_a_question_is_a_text():
    assert to_pairs(read(parse_prompt, {"prompt": "What does this mean?\n<tool_call>"}))[0][0] == "user"


def test_column_without_a_name_is_ignored():
    row = {"prompt": QUESTION, "completion": GOOD, "tools": [{"x": 1}], "label": "safe"}
    assert read(parse_demonstration, row, tools="", label="").completion == GOOD


def test_message_fields_without_effect_are_reported():
    row = {"messages": [user() | {"name": "Ann"}, assistant(reasoning_content="The west quay is free.")]}
    parsed = read(parse_demonstration, row)
    assert parsed.unread_columns == ("name (in a message)", "reasoning_content (in a message)")


def test_responses_of_a_row_have_no_effect_on_prompts():
    assert read(parse_prompt, {"prompt": QUESTION, **RESPONSES}).unread_columns == ("chosen", "rejected")


# CSV and JSON arrays


def write_csv(path, *lines):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(lines)
    return str(path)


def test_csv_fields_are_parsed_like_json_fields(tmp_path):
    dialogue = json.dumps([system(), user()])
    path = write_csv(
        tmp_path / "p.csv",
        ["messages", "chosen", "rejected", "p_chosen", "id"],
        [dialogue, GOOD, 'two\nlines, "quoted"', "0.8", "7"],
    )
    ((number, row),) = read_rows(path)
    parsed = read(parse_preference, row)
    assert (number, to_pairs(parsed), parsed.p_a, parsed.unread_columns) == (1, WITH_SYSTEM, 0.8, ("id",))
    assert parsed.response_b == 'two\nlines, "quoted"'


@pytest.mark.parametrize(
    ("content", "reasons"),
    [
        (b"prompt,chosen\na,b,c\nd,e\n", ["3 fields, but the header has 2", None]),
        (b"prompt,chosen\ncaf\xe9,x\nd,e\n", ["not UTF-8", None]),
        (b'prompt,chosen\na,b\n"c,d\n', [None, "cannot be read from here on"]),
        (b"prompt,chosen\n\n,x\n", ['no "prompt"']),
        (b"\xef\xbb\xbfprompt\r\na\r\n", [None]),
        (b"", []),
    ],
)
def test_csv_row_that_is_not_understood_is_refused(tmp_path, content, reasons):
    path = tmp_path / "p.csv"
    path.write_bytes(content)
    found = [get_reason(row) for _, row in read_rows(str(path))]
    assert len(found) == len(reasons)
    assert all(reason is None if part is None else part in reason for reason, part in zip(found, reasons, strict=True))


def get_reason(row):
    """Return the reason why a row is not a prompt, or None if it is one."""
    try:
        read(parse_prompt, row)
    except RowError as error:
        return str(error)
    return None


@pytest.mark.parametrize(
    ("content", "columns", "error"),
    [
        ("category,source\nx,y\n", {}, "no column with a prompt"),
        ("prompt;chosen\nx;y\n", {}, "separated by semicolons"),
        ("prompt,chosen\nx,y\n", {"prompt": "question"}, "no column 'question'"),
        ("prompt,prompt\nx,y\n", {}, "two columns of one name"),
    ],
)
def test_csv_header_that_is_not_understood_is_an_error(tmp_path, content, columns, error):
    path = tmp_path / "p.csv"
    path.write_text(content)
    with pytest.raises(UsageError, match=error):
        list(read_rows(str(path), columns=columns))


def test_large_json_array_is_read_in_chunks_and_damage_ends_it(tmp_path, monkeypatch):
    monkeypatch.setattr("producers.rows._ARRAY_CHUNK_CHARS", 7)
    path = tmp_path / "p.json"
    values = [{"prompt": f"é {n}", "tags": ["a"]} for n in range(50)]
    path.write_text(json.dumps(values, ensure_ascii=False, indent=1), encoding="utf-8")
    assert [row for _, row in read_rows(str(path))] == values
    path.write_text(json.dumps(values)[:-20])
    *rows, last = [row for _, row in read_rows(str(path))]
    assert rows == values[:-1] and isinstance(last, RowError)


@pytest.mark.parametrize("content", ['{"prompt": "x", "prompt": "y"}\n"z"\n', '[{"prompt": "x", "prompt": "y"}, "z"]'])
def test_object_with_one_name_twice_is_refused(tmp_path, content):
    path = tmp_path / "p.json"
    path.write_text(content)
    reasons = [get_reason(row) for _, row in read_rows(str(path))]
    assert reasons == ['an object has the name "prompt" twice', None]


def test_progress_has_the_rows_and_the_share_of_the_file(tmp_path):
    path, progress = tmp_path / "p.jsonl", WorkProgress()
    path.write_text("".join(f'"prompt {n:04}"\n' for n in range(5000)))
    shares = [progress.get_share() for _ in read_rows(str(path), progress=progress)]
    assert progress.num_done == 5000 and shares == sorted(shares) and shares[-1] == 1.0 and 0.4 < shares[2500] < 0.7
