"""Split texts into words, and measure how much of a text is copied from another one."""

from __future__ import annotations

import re

_NGRAM_SIZE = 5


def split_words(text: str) -> list[str]:
    """Return the words of a text, in lower case and without punctuation."""
    return re.findall(r"\w+", text.lower())


def extract_ngrams(text: str) -> set[tuple[str, ...]]:
    """Return the word n-grams of a text, in lower case and without punctuation."""
    words = split_words(text)
    return {tuple(words[i : i + _NGRAM_SIZE]) for i in range(len(words) - _NGRAM_SIZE + 1)}


def measure_copying(text: str, source: str, allowed: set[tuple[str, ...]]) -> tuple[float, int]:
    """Return the fraction of a text's words that are in n-grams of the source, and the largest number of such words in a row.

    N-grams in `allowed` are not counted.
    """
    words, copied = split_words(text), extract_ngrams(source) - allowed
    is_copied = [False] * len(words)
    for i in range(len(words) - _NGRAM_SIZE + 1):
        if tuple(words[i : i + _NGRAM_SIZE]) in copied:
            is_copied[i : i + _NGRAM_SIZE] = [True] * _NGRAM_SIZE
    longest = run = 0
    for word_is_copied in is_copied:
        run = run + 1 if word_is_copied else 0
        longest = max(longest, run)
    return sum(is_copied) / max(1, len(words)), longest
