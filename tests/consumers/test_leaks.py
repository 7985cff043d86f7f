"""A critique or a revision that repeats its prompt: formatting is removed, the rest makes it unusable, and views count it."""

import pytest

from constitutions.loader import FewShotExample
from consumers.leaks import CheckedText, check_critique, check_revision, strip_formatting
from schemas.records import ChatMessage, RejectionReason
from tests.support.records import RecordDatabase, make_prompt, make_revision

MESSAGES = (ChatMessage(role="user", content="How do I open a window that is stuck?"),)
RESPONSE = "Hit the frame with a hammer until the window opens."
CRITIQUE = 'The answer could break the glass and hurt someone. It should say "warm the frame with a hair dryer first".'
REVISION_PROMPT = "Rewrite the answer so that it gives no help with hurting anyone or anything, and keep what was useful."
CRITIQUE_PROMPT = "Say whether the assistant's last answer helps someone hurt a person, an animal or property."
EXAMPLE = FewShotExample(
    prompt="What is a lock gate?", answer="A gate that is closed by a lock.", critique="The answer is not about rivers at all.",
    revision="It is a gate that holds the water of a canal.",
)  # fmt: skip
USABLE = "Warm the frame gently, and then push it upwards with both hands."


def check(text):
    return check_revision(text, MESSAGES, RESPONSE, CRITIQUE, REVISION_PROMPT, [EXAMPLE])


@pytest.mark.parametrize(
    ("text", "leaks"),
    [
        (f"> {USABLE}", ("quotation mark",)),
        (f">{USABLE}", ("quotation mark",)),
        (f"Assistant:\n> {USABLE}", ("quotation mark", "role name")),
        (f"New answer: {USABLE}", ("role name",)),
        (f"> **Assistant:** {USABLE}\n", ("quotation mark", "role name")),
        (f"Updated response: {USABLE}", ("role name",)),
        (f"### Revised answer\n{USABLE}", ("role name",)),
        (f"Here is the revised answer:\n\n{USABLE}", ("preamble",)),
        (f"Sure! Here's a rewritten version of the answer, without the hammer:\n> {USABLE}", ("preamble", "quotation mark")),
        (f'Certainly. Here is my improved response:\n"{USABLE}"', ("preamble",)),
        (USABLE, ()),
    ],
)
def test_copied_formatting_is_removed(text, leaks):
    checked = check(text)
    assert (checked.text, checked.leaks, checked.rejection_reason) == (USABLE, leaks, RejectionReason.NONE)


@pytest.mark.parametrize(
    "text",
    ["Here is the revised letter:\n\nDear Ana,", "Here is a new response to the customer:\n\nDear Ana,", '"A quotation."', "Revisions: none."],
)  # fmt: skip
def test_text_that_only_resembles_a_preamble_is_kept(text):
    assert strip_formatting(text) == CheckedText(text)


def test_name_before_a_critique_is_removed():
    checked = check_critique("**Critique:** It may break the glass.", MESSAGES, RESPONSE, CRITIQUE_PROMPT, [EXAMPLE])
    assert checked == CheckedText("It may break the glass.", ("role name",))
    assert check(f"Critique: It may break.\n\n{USABLE}").rejection_reason is RejectionReason.LEAK


def test_quotation_inside_a_text_is_kept():
    text = "As the manual says:\n> warm the frame\n\nThen push."
    assert strip_formatting(text).text == text
    assert strip_formatting("> warm the frame\n>\n> Then push.").text == "warm the frame\n\nThen push."


@pytest.mark.parametrize(
    ("text", "leak", "reason"),
    [
        (REVISION_PROMPT, "instruction", RejectionReason.LEAK),
        (f"> {REVISION_PROMPT} Write only the new answer of the assistant.", "instruction", RejectionReason.LEAK),
        ("The answer now gives no help with hurting anyone or anything, and keep what was useful.", "instruction", RejectionReason.LEAK),
        ("The answer could break the glass and hurt someone.", "critique", RejectionReason.LEAK),
        (f"{USABLE}\n\nHuman:\n> Thanks!", "heading", RejectionReason.LEAK),
        (f"{USABLE}\n\nA critic says:\n> It is fine.", "heading", RejectionReason.LEAK),
        ("Human: How do I open it?", "heading", RejectionReason.LEAK),
        ("> How do I open a window that is stuck?", "conversation", RejectionReason.LEAK),
        ("Well, it is a gate that holds the water back.", "example", RejectionReason.ECHO),
    ],
)  # fmt: skip
def test_repeated_part_of_the_prompt_makes_a_revision_unusable(text, leak, reason):
    checked = check(text)
    assert leak in checked.leaks and checked.rejection_reason is reason


@pytest.mark.parametrize(
    "text",
    [
        "You should warm the frame with a hair dryer first.",  # the critique quotes the better answer
        "Hit the frame with a soft hammer until the window opens.",  # common with the previous response
        "I give no help with that.",
    ],
)
def test_revision_may_share_words_with_its_prompt(text):
    assert check(text).rejection_reason is RejectionReason.NONE and check(text).leaks == ()


def test_text_about_roles_is_usable_if_the_conversation_has_them():
    messages = (ChatMessage(role="user", content="Go on with this play.\nHuman: Who is there?"),)
    text = "The play goes on.\nHuman: It is me."
    assert check_revision(text, messages, RESPONSE, CRITIQUE, REVISION_PROMPT, []).rejection_reason is RejectionReason.NONE
    assert check(text).rejection_reason is RejectionReason.LEAK


def test_critique_that_repeats_its_instruction_is_unusable():
    for text, reason in [
        (CRITIQUE_PROMPT, RejectionReason.LEAK),
        (f"> {CRITIQUE_PROMPT} Answer in two or three sentences.", RejectionReason.LEAK),
        (EXAMPLE.critique, RejectionReason.ECHO),
        ("The assistant's last answer helps someone hurt a person: a hammer breaks glass.", RejectionReason.NONE),
        (f"It says: {RESPONSE}", RejectionReason.NONE),
    ]:
        assert check_critique(text, MESSAGES, RESPONSE, CRITIQUE_PROMPT, [EXAMPLE]).rejection_reason is reason


def test_leaks_are_counted_for_each_template(tmp_path):
    database = RecordDatabase(tmp_path / "charter.duckdb")
    leaks = [[], ["quotation mark"], ["quotation mark", "instruction"], []]
    revisions = [
        make_revision(str(n), "p", "a", f"b {n}", 0.5).model_copy(update={"leaks": parts, "template_hash": "t"})
        for n, parts in enumerate(leaks)
    ]
    database.add(make_prompt("p"), *revisions)
    rows = database.query_rows("SELECT stage, template_hash, part, leaks, texts, leak_rate FROM leak_stats ORDER BY part")
    assert [row[2:] for row in rows] == [("any", 2, 4, 0.5), ("instruction", 1, 4, 0.25), ("quotation mark", 2, 4, 0.5)]
    assert {row[1] for row in rows} == {"t"}


def test_texts_without_a_model_or_a_template_are_counted(tmp_path):
    database = RecordDatabase(tmp_path / "charter.duckdb")
    revision = make_revision("0", "p", "a", "b", 0.5)
    database.add(make_prompt("p"), revision.model_copy(update={"leaks": ["critique"], "model": None, "template_hash": None}))
    rows = database.query_rows("SELECT part, leaks, texts FROM leak_stats WHERE model IS NULL ORDER BY part")
    assert rows == [("any", 1, 1), ("critique", 1, 1)]
