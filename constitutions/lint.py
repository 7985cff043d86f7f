"""Lint rules for valid constitutions.

The rules find duplicates and missing parts. They also find one-sided lists, and lists without a principle against
over-reaction. The rules match English words. A finding can therefore be wrong, and the rules can miss a problem. The author
decides about each finding. `docs/constitutions.md` describes the rules and their reasons.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher

from constitutions.loader import BasePrinciple, Constitution, CritiquePrinciple, JudgePrinciple, ProseParagraph

_DUPLICATE_SIMILARITY = 0.75  # two principles are duplicates if their distinctive words have at least this similarity
_NEGATION_PATTERN = re.compile(
    r"\b(no|not|never|nobody|nothing|none|nor|without|less|fewer|avoid\w*|refus\w*|declin\w*|forbid\w*|hold\w* back|cannot"
    r"|\w+n't)\b"
)
# These patterns match words about harm, words about over-reaction, and words that balance a request for restraint.
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
    """A finding of a rule: its file and line, the principle, the problem (`what`) and the fix."""

    rule: str
    file: str
    line: int
    principle: str
    what: str
    fix: str


@dataclass(frozen=True)
class _PrincipleText:
    """The text of a principle: the problem that it describes, and what it requests.

    For judge principles and prose, `problem` and `request` are the same text.
    """

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
    """Return the findings of all rules, sorted by file and line."""
    lists: Sequence[Sequence[BasePrinciple]] = (
        (constitution.prose,) if constitution.prose else (constitution.critique, constitution.judge)
    )
    findings = list(_find_missing_parts(constitution))
    for principles in lists:
        texts = [_extract_text(principle) for principle in principles]
        for rule in (_find_duplicates, _find_one_sided, _find_unguarded):
            findings += [_make_finding(constitution, name, text, what, fix) for name, text, what, fix in rule(texts)]
    return sorted(findings, key=lambda finding: (finding.file, finding.line, finding.rule))


_RuleMatches = Iterator[tuple[str, _PrincipleText, str, str]]


def _make_finding(constitution: Constitution, rule: str, principle_text: _PrincipleText, what: str, fix: str) -> LintFinding:
    location = constitution.find_location(principle_text.part, principle_text.principle.id)
    file, line = (location.origin, location.find_line("id")) if location else (constitution.name, 1)
    return LintFinding(rule, file, line, principle_text.principle.id, what, fix)


def _find_missing_parts(constitution: Constitution) -> Iterator[LintFinding]:
    """Find a missing description, missing examples, lists in which all principles have tags, and judge prompts without "?"."""
    first = constitution.find_location("prose" if constitution.prose else "critique", constitution.critique[0].id)
    file = first.origin if first else constitution.name

    def make_finding(what: str, fix: str, principle: str = "") -> LintFinding:
        return LintFinding("missing-part", file, 1, principle, what, fix)

    if not constitution.description.strip():
        yield make_finding("there is no description", "describe its purpose in one line: description = ...")
    if not constitution.examples:
        yield make_finding("there is no worked example, but small critics need examples", "add an [[examples]] table")
    for part, principles in (("critique", constitution.critique), ("judge", constitution.judge)):
        if all(principle.tags for principle in principles):
            yield make_finding(
                f"every {part} principle has tags, so a prompt without a matching tag gets all principles",
                "add a principle without tags",
            )
    if constitution.prose or constitution.judge_with == "all":
        return
    for principle in constitution.judge:
        if "?" not in principle.judge_prompt:
            text = _extract_text(principle)
            yield _make_finding(
                constitution,
                "missing-part",
                text,
                "the judge_prompt has no question",
                "ask which answer is better, and by which criterion",
            )


def _find_duplicates(texts: Sequence[_PrincipleText]) -> _RuleMatches:
    """Find two principles with the same name, or with almost the same distinctive words."""
    common_words = _find_common_words([text.full_text for text in texts])
    for i, text in enumerate(texts):
        for earlier in texts[:i]:
            other = earlier.principle.id
            if text.principle.name.lower() == earlier.principle.name.lower():
                yield "duplicate", text, f"it has the same name as {other}", "give one of them another name"
            elif _compute_similarity(text.full_text, earlier.full_text, common_words) >= _DUPLICATE_SIMILARITY:
                yield "duplicate", text, f"it is almost the same as {other}", "remove one of them, or make the difference clear"


def _find_one_sided(texts: Sequence[_PrincipleText]) -> _RuleMatches:
    """Find a list of two or more principles that all forbid something, or all request something."""
    if len(texts) < 2:
        return
    if not any(_has_positive_request(text.request) for text in texts):
        fix = "add a principle that describes what a good answer does"
        yield (
            "only-donts",
            texts[0],
            f"every {texts[0].part} principle forbids something, and no principle requests something",
            fix,
        )
    if not any(_NEGATION_PATTERN.search(text.full_text) for text in texts):
        fix = "add a principle that describes what an answer must not do"
        yield (
            "only-dos",
            texts[0],
            f"every {texts[0].part} principle requests something, and no principle forbids something",
            fix,
        )


def _find_unguarded(texts: Sequence[_PrincipleText]) -> _RuleMatches:
    """Find principles that reward restraint, in a list without a principle against preaching or needless refusal."""
    if any(_OVER_REACTION_PATTERN.search(text.problem) for text in texts):
        return
    for text in texts:
        rewards_restraint = _HARM_PATTERN.search(text.problem) or not _has_positive_request(text.request)
        if rewards_restraint and not _BALANCE_PATTERN.search(text.full_text):
            yield (
                "over-reaction",
                text,
                f"it rewards restraint, and no {text.part} principle forbids preaching or needless refusal",
                'state what a good answer keeps, as in "and keep what is useful", or add a principle against over-reaction',
            )


def _has_positive_request(request: str) -> bool:
    """Return whether a clause of the text requests something instead of forbidding it."""
    clauses = re.split(r"[,;:.?!]|\b(?:and|but|while)\b", request)
    return any(len(clause.split()) > 1 and not _NEGATION_PATTERN.search(clause) for clause in clauses)


def _split_words(text: str) -> list[str]:
    return re.findall(r"\w+", text)


def _find_common_words(texts: Sequence[str]) -> set[str]:
    """Return the words that occur in most of the texts. These words do not distinguish principles."""
    counts = Counter(word for text in texts for word in set(_split_words(text)))
    return {word for word, count in counts.items() if len(texts) > 3 and count > len(texts) / 2}


def _compute_similarity(a: str, b: str, common_words: set[str]) -> float:
    """Return the similarity of the distinctive words of two texts, from 0 to 1."""
    words_a, words_b = ([word for word in _split_words(text) if word not in common_words] for text in (a, b))
    return SequenceMatcher(None, words_a, words_b, autojunk=False).ratio() if words_a and words_b else float(a == b)
