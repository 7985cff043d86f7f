"""Measure how well near-duplicates are found: precision and recall on planted duplicates of the shipped prompts.

Each prompt is edited in seven ways, and each edited text is looked up in an index of all prompts. A text is found if the match is the
prompt that it was made from; any other match is a false one. The table also has the similarity of the most similar pair of two
different prompts, and the share of pairs above the threshold that MinHash misses.

    python -m benchmarks.near_duplicates [--threshold 0.6]
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

from producers.files import DEMONSTRATIONS_PATH, SHIPPED_PROMPTS_PATH
from producers.near_duplicates import KnownPrompt, NearDuplicateIndex, extract_features
from producers.parse import parse_prompt
from producers.recipe import load_recipe
from producers.rows import read_rows
from schemas.records import Split

EDITS = (
    "case and punctuation",
    "words before",
    "words after",
    "word inserted",
    "word deleted",
    "word replaced",
    "words swapped",
)


@dataclass(frozen=True)
class EditResult:
    """The results for one edit. `num_above` edited texts are at or above the threshold, and `num_missed` of them were not found."""

    edit: str
    num_texts: int
    num_found: int
    num_false: int
    num_above: int
    num_missed: int

    @property
    def recall(self) -> float:
        return self.num_found / self.num_texts

    @property
    def precision(self) -> float:
        return self.num_found / max(1, self.num_found + self.num_false)


def load_texts() -> list[str]:
    """Return different prompts in our own words: those that come with Charter and the examples of the default recipe."""
    paths = (SHIPPED_PROMPTS_PATH, DEMONSTRATIONS_PATH, SHIPPED_PROMPTS_PATH.with_name("customers.jsonl"))
    rows = [row for path in paths for _, row in read_rows(str(path))]
    prompts = [parse_prompt(row, source="", max_chars=10_000).messages[-1].content for row in rows]
    return [*prompts, *load_recipe("default").list_examples()]


def edit_text(text: str, edit: str, source: random.Random) -> str:
    """Return a text with one small edit."""
    words = text.split()
    place = source.randrange(1, len(words) - 1)
    if edit == "case and punctuation":
        return text.upper().rstrip("?.") + " !"
    if edit == "words before":
        return f"Please tell me: {text}"
    if edit == "words after":
        return f"{text} Thanks a lot!"
    if edit == "words swapped":
        words[place], words[place + 1] = words[place + 1], words[place]
        return " ".join(words)
    replacement = {"word inserted": [words[place], "really"], "word deleted": [], "word replaced": ["something"]}[edit]
    return " ".join([*words[:place], *replacement, *words[place + 1 :]])


def compute_similarity(a: str, b: str) -> float:
    first, second = set(extract_features(a)), set(extract_features(b))
    return len(first & second) / len(first | second)


def measure(texts: Sequence[str], threshold: float, seed: int = 0) -> Iterator[EditResult]:
    """Yield the result of each edit."""
    index = NearDuplicateIndex(threshold)
    for number, text in enumerate(texts):
        index.add(text, KnownPrompt(str(number), "", Split.TRAIN, is_of_run=True))
    source = random.Random(seed)
    for edit in EDITS:
        num_found = num_false = num_above = num_missed = 0
        for number, text in enumerate(texts):
            edited = edit_text(text, edit, source)
            matches = [match.prompt_id for match in index.find(edited)]
            is_found = str(number) in matches
            is_above = compute_similarity(text, edited) >= threshold
            num_found += is_found
            num_false += len(matches) - is_found
            num_above += is_above
            num_missed += is_above and not is_found
        yield EditResult(edit, len(texts), num_found, num_false, num_above, num_missed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threshold", type=float, default=0.6)
    threshold = parser.parse_args().threshold
    texts = load_texts()
    print(f"{len(texts)} prompts, threshold {threshold:g}\n")
    print(f"{'edit':<22}{'recall':>8}{'precision':>11}{'missed by MinHash':>20}")
    results = list(measure(texts, threshold))
    for result in results:
        print(
            f"{result.edit:<22}{result.recall:>8.3f}{result.precision:>11.3f}{f'{result.num_missed} of {result.num_above}':>20}"
        )
    total = EditResult("all", *(sum(getattr(r, name) for r in results) for name in list(EditResult.__dataclass_fields__)[1:]))
    print(f"{'all':<22}{total.recall:>8.3f}{total.precision:>11.3f}{f'{total.num_missed} of {total.num_above}':>20}")
    similarity, a, b = max((compute_similarity(a, b), a, b) for a, b in combinations(texts, 2))
    print(f"\nmost similar pair of different prompts, {similarity:.2f}:\n  {a}\n  {b}")


if __name__ == "__main__":
    main()
