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

from constitutions.loader import BasePrinciple, Constitution, CritiquePrinciple, JudgePrinciple, ProseParagraph

_DUPLICATE_SIMILARITY = 0.75  # share of the telling words that two texts have in common
_NEGATION_PATTERN = re.compile(
    r"\b(no|not|never|nobody|nothing|none|nor|without|less|fewer|avoid\w*|refus\w*|declin\w*|forbid\w*|hold\w* back|cannot"
    r"|\w+n't)\b"
)
# Where a text pushes towards holding back, and what pulls the other way.
_HARM_PATTERN = re.compile(
    r"\b(harm|hurt\w*|danger\w*|crim\w*|illegal\w*|weapon\w*|attack\w*|violen\w*|abus\w*|unsafe|toxic\w*|offen[cs]\w*|private|privacy)\b"
)
_OVER_REACTION_PATTERN = re.compile(
    r"\b(preach\w*|lectur\w*|morali[sz]\w*|accus\w*|blam\w*|needless\w*|refus\w*|evasive\w*|over-?(cautious|react\w*)"
    r"|brush\w*[ -]off)\b"
)
_BALANCE_PATTERN = re.compile(
    r"\b(keep\w*|useful\w*|helpful\w*|offer\w*|kind\w*|friendl\w*|warm\w*|harmless|instead|lawful way|still|what is sure)\b"
)


@dataclass(frozen=True)
class LintFinding:
    """One thing that a rule found: in which file and line, about which principle, and what to do."""

    rule: str
    file: str
    line: int
    principle: str
    what: str
    fix: str


@dataclass(frozen=True)
class _PrincipleText:
    """A principle as the rules read it: what it looks for, and what it asks to do (of a question and of prose the same)."""

    part: str
    principle: BasePrinciple
    problem: str
    request: str

    @property
    def full_text(self) -> str:
        return self.problem if self.problem == self.request else f"{self.problem} {self.request}"


def _extract_text(principle: BasePrinciple) -> _PrincipleText:
    if isinstance(principle, CritiquePrinciple):
        return _PrincipleText("critique", principle, principle.critique_prompt.lower(), principle.revision_prompt.lower())
    if isinstance(principle, JudgePrinciple):
        return _PrincipleText("judge", principle, principle.judge_prompt.lower(), principle.judge_prompt.lower())
    assert isinstance(principle, ProseParagraph)
    return _PrincipleText("prose", principle, principle.text.lower(), principle.text.lower())


def lint_constitution(constitution: Constitution) -> list[LintFinding]:
    """Everything that the rules find, in the order of the file's lines."""
    lists: Sequence[Sequence[BasePrinciple]] = (
        (constitution.prose,) if constitution.prose else (constitution.critique, constitution.judge)
    )
    found = list(_find_missing_parts(constitution))
    for principles in lists:
        texts = [_extract_text(principle) for principle in principles]
        for rule in (_find_duplicates, _find_one_sided, _find_unguarded):
            found += [_make_finding(constitution, rule_name, words, what, fix) for rule_name, words, what, fix in rule(texts)]
    return sorted(found, key=lambda finding: (finding.file, finding.line, finding.rule))


_RuleMatches = Iterator[tuple[str, _PrincipleText, str, str]]


def _make_finding(constitution: Constitution, rule: str, principle_text: _PrincipleText, what: str, fix: str) -> LintFinding:
    place = constitution.find_location(principle_text.part, principle_text.principle.id)
    file, line = (place.origin, place.find_line("id")) if place else (constitution.name, 1)
    return LintFinding(rule, file, line, principle_text.principle.id, what, fix)


def _find_missing_parts(constitution: Constitution) -> Iterator[LintFinding]:
    first = constitution.find_location("prose" if constitution.prose else "critique", constitution.critique[0].id)
    file = first.origin if first else constitution.name

    def missing(what: str, fix: str, principle: str = "") -> LintFinding:
        return LintFinding("missing-part", file, 1, principle, what, fix)

    if not constitution.description.strip():
        yield missing("there is no description", "say in one line what it is for: description = ...")
    if not constitution.examples:
        yield missing("there is no worked example, which small critics need", "add an [[examples]] table")
    for part, principles in (("critique", constitution.critique), ("judge", constitution.judge)):
        if all(principle.tags for principle in principles):
            yield missing(
                f"every {part} principle has tags, so that a prompt without one of them is taken to match all",
                "add a principle without tags",
            )
    if constitution.prose or constitution.judge_with == "all":
        return
    for principle in constitution.judge:
        if "?" not in principle.judge_prompt:
            words = _extract_text(principle)
            yield _make_finding(
                constitution, "missing-part", words, "the question asks nothing", "ask which answer is better, and at what"
            )


def _find_duplicates(texts: Sequence[_PrincipleText]) -> _RuleMatches:
    """Two principles with one name, or with nearly the same telling words."""
    usual = _find_common_words([words.full_text for words in texts])
    for i, words in enumerate(texts):
        for earlier in texts[:i]:
            other = earlier.principle.id
            if words.principle.name.lower() == earlier.principle.name.lower():
                yield "duplicate", words, f"it has the name of {other}", "give one of them another name"
            elif _compute_similarity(words.full_text, earlier.full_text, usual) >= _DUPLICATE_SIMILARITY:
                yield "duplicate", words, f"it says nearly the same as {other}", "leave one out, or say what sets them apart"


def _find_one_sided(texts: Sequence[_PrincipleText]) -> _RuleMatches:
    """A list of two or more that only forbids, or only asks for."""
    if len(texts) < 2:
        return
    if not any(_has_positive_request(words.request) for words in texts):
        fix = "add a principle that says what a good answer does"
        yield "only-donts", texts[0], f"every {texts[0].part} principle forbids, none asks for something", fix
    if not any(_NEGATION_PATTERN.search(words.full_text) for words in texts):
        fix = "add a principle that says what an answer must not do"
        yield "only-dos", texts[0], f"every {texts[0].part} principle asks for something, none forbids", fix


def _find_unguarded(texts: Sequence[_PrincipleText]) -> _RuleMatches:
    """Principles that push towards holding back, in a list where nothing speaks against preaching or needless refusal."""
    if any(_OVER_REACTION_PATTERN.search(words.problem) for words in texts):
        return
    for words in texts:
        pushes = _HARM_PATTERN.search(words.problem) or not _has_positive_request(words.request)
        if pushes and not _BALANCE_PATTERN.search(words.full_text):
            yield (
                "over-reaction",
                words,
                f"it rewards holding back, and no {words.part} principle speaks against preaching or needless refusal",
                "say what a good answer keeps (... and keep what is useful), or add a principle against over-reaction",
            )


def _has_positive_request(request: str) -> bool:
    """Whether a part of the sentence asks for something, beside what it forbids."""
    clauses = re.split(r"[,;:.?!]|\b(?:and|but|while)\b", request)
    return any(len(clause.split()) > 1 and not _NEGATION_PATTERN.search(clause) for clause in clauses)


def _split_words(text: str) -> list[str]:
    return re.findall(r"\w+", text)


def _find_common_words(texts: Sequence[str]) -> set[str]:
    """The words that most principles of a list have: they say nothing about any of them."""
    counts = Counter(word for text in texts for word in set(_split_words(text)))
    return {word for word, count in counts.items() if len(texts) > 3 and count > len(texts) / 2}


def _compute_similarity(a: str, b: str, common_words: set[str]) -> float:
    """How alike two texts are in their telling words, from 0 to 1."""
    one, other = ([word for word in _split_words(text) if word not in common_words] for text in (a, b))
    return SequenceMatcher(None, one, other, autojunk=False).ratio() if one and other else float(a == b)
