"""`charter show` names the principle of each verdict and of the written critique; text is wrapped, and hidden characters are shown."""

import pytest
from rich.cells import cell_len

from charter.dashboard.rendering import escape_text
from charter.text import escape_unprintable, format_trace, wrap_text

TRACE = {
    "prompt_id": "p", "source": "test", "split": "TRAIN", "prompt": "Hi", "responses": [], "revisions": [], "demonstrations": [],
    "final_response": None, "end_reason": None,
}  # fmt: skip


def make_critique(**more):
    values = {
        "round": 0, "principle_id": "harm", "verdict": "FLAWED", "p_flawed": 0.9, "p_better": None, "critique": "Too rude.",
        "end_reason": "NONE", "rejection_reason": "NONE", "verdicts": [{"principle_id": "harm", "verdict": "FLAWED", "p_flawed": 0.9}],
    }  # fmt: skip
    return values | more


def format_records(critiques=(), preferences=()):
    return format_trace(TRACE | {"critiques": list(critiques), "preferences": list(preferences)})


def test_critique_of_one_principle_is_one_line():
    assert "critique, round 0, by harm: flawed  (p(flawed) 0.900)\n  Too rude." in format_records([make_critique()])


def test_each_verdict_names_its_principle():
    verdicts = [
        {"principle_id": "harm", "verdict": "FLAWED", "p_flawed": 0.9},
        {"principle_id": "honest", "verdict": "CLEAN", "p_flawed": 0.2},
    ]
    text = format_records([make_critique(round=1, principle_id="honest", p_better=0.7, verdicts=verdicts)])
    assert "verdict, round 1: flawed  (p(flawed) 0.900, p(better than previous) 0.700)" in text
    assert "by harm: flawed  (p(flawed) 0.900)" in text and "by honest: clean  (p(flawed) 0.200)" in text
    assert "critique, round 1, by honest\n  Too rude." in text
    ended = format_records([make_critique(round=1, verdicts=verdicts, critique="", end_reason="LOST")])
    assert "verdict, round 1: flawed -> lost" in ended and "critique" not in ended


def test_reason_of_an_unusable_response_and_of_an_unjudged_pair_is_shown():
    unusable = make_critique(
        verdict="NOT_ASKED", verdicts=[], critique="", p_flawed=None, end_reason="UNUSABLE", rejection_reason="EMPTY"
    )
    pair = {
        "label_source": "AI",
        "p_a": None,
        "principle_id": None,
        "outcome": "IDENTICAL",
        "outcome_reason": "both responses are the same",
    }
    text = format_records([unusable], [pair])
    assert "not asked -> unusable, empty" in text and "not judged: both responses are the same (identical)" in text


EMOJI = ("👨‍👩‍👧", "❤️‍🔥", "🏳️‍🌈", "🧑🏽‍🚀", "👁️‍🗨️", "🏴\U000e0067\U000e0062\U000e0065\U000e006e\U000e0067\U000e007f")
WORDS = ("می‌خواهم", "ශ්‍රී", "क्‍ष")
HIDDEN = ("a\u200db", "\u200d", "👨\u200d", "a\u200cb", "\u202eabc", "\u2066x\u2069", "\u061c", "x\U000e0041", "a\u200bb", "\ufeff",
          "🏴" + "".join(chr(0xE0000 + ord(letter)) for letter in "ignore"), "\x1b[31m", "\x7f")  # fmt: skip


@pytest.mark.parametrize("text", [*EMOJI, *WORDS])
def test_emoji_and_words_with_joiners_are_shown(text):
    assert escape_unprintable(text) == text == escape_text(text)


@pytest.mark.parametrize("text", HIDDEN)
def test_characters_that_hide_text_or_change_its_direction_are_escaped(text):
    assert escape_unprintable(text).isprintable() and '<span class="invisible"' in escape_text(text)
    num_hidden = sum(not character.isprintable() for character in text)
    assert escape_text(text).count("U+") == num_hidden


def test_wrapped_text_keeps_words_and_measures_wide_characters(monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    assert wrap_text("well-known " * 10, "  ").split() == ["well-known"] * 10
    assert max(map(cell_len, wrap_text("漢字" * 50 + " 👨‍👩‍👧 " * 30, "    ").splitlines())) <= 40
