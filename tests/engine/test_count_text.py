"""Counts with their noun and verb."""

import pytest

from engine.text import format_count


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ((1, "rows"), "1 row"),
        ((0, "rows"), "0 rows"),
        ((1200, "dead letters", "are"), "1,200 dead letters are"),
        ((1, "records", "belong"), "1 record belongs"),
        ((1, "queries", "were"), "1 query was"),
        ((1, "completions", "have"), "1 completion has"),
        ((1, "processes"), "1 process"),
        ((1, "batches"), "1 batch"),
        ((1, "duplicates"), "1 duplicate"),
    ],
)
def test_noun_and_verb_agree_with_the_count(arguments, text):
    assert format_count(*arguments) == text
