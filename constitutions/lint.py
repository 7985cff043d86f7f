"""What a constitution that loads may still do wrong: duplicates, missing parts, one-sidedness, no guard against over-reaction.

The rules look at words, in English, and so can err in both directions: a finding is a question to the author. What each rule
looks for and why is in `docs/constitutions.md`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher

from constitutions.loader import Constitution, Drawn, JudgingPrinciple, Paragraph, Principle

ALIKE = 0.75  # share of the telling words that two texts have in common
NEGATION = re.compile(
    r"\b(no|not|never|nobody|nothing|none|nor|without|less|fewer|avoid\w*|refus\w*|declin\w*|forbid\w*|hold\w* back|cannot"
    r"|\w+n't)\b"
)
# Where a text pushes towards holding back, and what pulls the other way.
HARM = re.compile(
    r"\b(harm|hurt\w*|danger\w*|crim\w*|illegal\w*|weapon\w*|attack\w*|violen\w*|abus\w*|unsafe|toxic\w*|offen[cs]\w*|private|privacy)\b"
)
OVER_REACTION = re.compile(
    r"\b(preach\w*|lectur\w*|morali[sz]\w*|accus\w*|blam\w*|needless\w*|refus\w*|evasive\w*|over-?(cautious|react\w*)"
    r"|brush\w*[ -]off)\b"
)
KEEPS = re.compile(
    r"\b(keep\w*|useful\w*|helpful\w*|offer\w*|kind\w*|friendl\w*|warm\w*|harmless|instead|lawful way|still|what is sure)\b"
)


@dataclass(frozen=True)
class Finding:
    """One thing that a rule found: in which file and line, about which principle, and what to do."""

    rule: str
    file: str
    line: int
    principle: str
    what: str
    fix: str


@dataclass(frozen=True)
class Words:
    """A principle as the rules read it: what it looks for, and what it asks to do (of a question and of prose the same)."""

    part: str
    principle: Drawn
    fault: str
    request: str

    @property
    def whole(self) -> str:
        return self.fault if self.fault == self.request else f"{self.fault} {self.request}"


def words_of(principle: Drawn) -> Words:
    if isinstance(principle, Principle):
        return Words("critique", principle, principle.critique.lower(), principle.revision.lower())
    if isinstance(principle, JudgingPrinciple):
        return Words("judging", principle, principle.question.lower(), principle.question.lower())
    assert isinstance(principle, Paragraph)
    return Words("prose", principle, principle.text.lower(), principle.text.lower())


def lint(constitution: Constitution) -> list[Finding]:
    """Everything that the rules find, in the order of the file's lines."""
    lists: Sequence[Sequence[Drawn]] = (
        (constitution.prose,) if constitution.prose else (constitution.critique, constitution.judging)
    )
    found = list(missing_parts(constitution))
    for principles in lists:
        texts = [words_of(principle) for principle in principles]
        for rule in (duplicates, one_sided, unguarded):
            found += [at(constitution, rule_name, words, what, fix) for rule_name, words, what, fix in rule(texts)]
    return sorted(found, key=lambda finding: (finding.file, finding.line, finding.rule))


Found = Iterator[tuple[str, Words, str, str]]


def at(constitution: Constitution, rule: str, words: Words, what: str, fix: str) -> Finding:
    place = constitution.place(words.part, words.principle.id)
    file, line = (place.origin, place.line("id")) if place else (constitution.name, 1)
    return Finding(rule, file, line, words.principle.id, what, fix)


def missing_parts(constitution: Constitution) -> Iterator[Finding]:
    first = constitution.place("prose" if constitution.prose else "critique", constitution.critique[0].id)
    file = first.origin if first else constitution.name

    def missing(what: str, fix: str, principle: str = "") -> Finding:
        return Finding("missing-part", file, 1, principle, what, fix)

    if not constitution.description.strip():
        yield missing("there is no description", "say in one line what it is for: description = ...")
    if not constitution.examples:
        yield missing("there is no worked example, which small critics need", "add an [[examples]] table")
    for part, principles in (("critique", constitution.critique), ("judging", constitution.judging)):
        if all(principle.tags for principle in principles):
            yield missing(
                f"every {part} principle has tags, so that a prompt without one of them is taken to match all",
                "add a principle without tags",
            )
    if constitution.prose or constitution.judge_with == "all":
        return
    for principle in constitution.judging:
        if "?" not in principle.question:
            words = words_of(principle)
            yield at(
                constitution, "missing-part", words, "the question asks nothing", "ask which answer is better, and at what"
            )


def duplicates(texts: Sequence[Words]) -> Found:
    """Two principles with one name, or with nearly the same telling words."""
    usual = stock([words.whole for words in texts])
    for i, words in enumerate(texts):
        for earlier in texts[:i]:
            other = earlier.principle.id
            if words.principle.name.lower() == earlier.principle.name.lower():
                yield "duplicate", words, f"it has the name of {other}", "give one of them another name"
            elif alike(words.whole, earlier.whole, usual) >= ALIKE:
                yield "duplicate", words, f"it says nearly the same as {other}", "leave one out, or say what sets them apart"


def one_sided(texts: Sequence[Words]) -> Found:
    """A list of two or more that only forbids, or only asks for."""
    if len(texts) < 2:
        return
    if not any(asks_for(words.request) for words in texts):
        fix = "add a principle that says what a good answer does"
        yield "only-donts", texts[0], f"every {texts[0].part} principle forbids, none asks for something", fix
    if not any(NEGATION.search(words.whole) for words in texts):
        fix = "add a principle that says what an answer must not do"
        yield "only-dos", texts[0], f"every {texts[0].part} principle asks for something, none forbids", fix


def unguarded(texts: Sequence[Words]) -> Found:
    """Principles that push towards holding back, in a list where nothing speaks against preaching or needless refusal."""
    if any(OVER_REACTION.search(words.fault) for words in texts):
        return
    for words in texts:
        pushes = HARM.search(words.fault) or not asks_for(words.request)
        if pushes and not KEEPS.search(words.whole):
            yield (
                "over-reaction",
                words,
                f"it rewards holding back, and no {words.part} principle speaks against preaching or needless refusal",
                "say what a good answer keeps (... and keep what is useful), or add a principle against over-reaction",
            )


def asks_for(request: str) -> bool:
    """Whether a part of the sentence asks for something, beside what it forbids."""
    clauses = re.split(r"[,;:.?!]|\b(?:and|but|while)\b", request)
    return any(len(clause.split()) > 1 and not NEGATION.search(clause) for clause in clauses)


def telling(text: str) -> list[str]:
    return re.findall(r"\w+", text)


def stock(texts: Sequence[str]) -> set[str]:
    """The words that most principles of a list have: they say nothing about any of them."""
    counts = Counter(word for text in texts for word in set(telling(text)))
    return {word for word, count in counts.items() if len(texts) > 3 and count > len(texts) / 2}


def alike(a: str, b: str, usual: set[str]) -> float:
    """How alike two texts are in their telling words, from 0 to 1."""
    one, other = ([word for word in telling(text) if word not in usual] for text in (a, b))
    return SequenceMatcher(None, one, other, autojunk=False).ratio() if one and other else float(a == b)
