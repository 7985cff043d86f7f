"""Find what a critic repeats from its prompt instead of writing a critique or a revision.

Small models copy parts of the prompt template. Such text must not become training data. What is only formatting is removed:
quotation marks (`> `) and the name of a role before the text. Any other part of the prompt makes the text unusable (LEAK), unless
the text has it in common with the conversation or the previous response. The record names the leaked parts, and the view
`leak_stats` counts them for each template:

quotation mark   lines begin with `> `; removed
role name        the text begins with `Assistant:`, `New answer:`, or, in a critique, `Critique:`; removed
preamble         the text begins with `Here is the revised answer:`; removed
heading          a later line is a heading of the template, such as `Human:` or `A critic says:`
instruction      half of the words, or ten words in a row, are from the instruction
critique         half of the words, or 25 words in a row, are from the critique; a text that the critique quotes is not counted
conversation     the text is a message of the conversation
example          five words in a row of a revision are from a few-shot example (the reason is ECHO)
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from constitutions.loader import FewShotExample
from consumers import templates
from engine.notices import NOTICES
from engine.words import extract_ngrams, measure_copying, split_words
from schemas.records import ChatMessage, RejectionReason

_MAX_COPIED_FRACTION = 0.5
_MAX_COPIED_CRITIQUE_FRACTION = 0.8  # a critique names the problem in the words of its instruction
_MAX_INSTRUCTION_RUN = 10
_MAX_CRITIQUE_RUN = 25
_QUOTE_MARK = re.compile(r"[ \t]*>[ \t]?")
_REVISED = "(?:new|revised|rewritten|updated|improved|corrected)"
_ROLE_NAME = re.compile(
    rf"\s*[*_#\"]*(?:Assistant|(?:The |Your |My )?{_REVISED} (?:answer|response)|Revision|Rewrite)[*_]*:[*_\"]*\s*"
    rf"|\s*(?:\#+[ \t]*|\*\*){_REVISED} (?:answer|response)(?:\*\*)?[ \t]*\n\s*",  # a heading
    re.IGNORECASE,
)
_CRITIQUE_NAME = re.compile(r"\s*[*_#\"]*Critique[*_]*:[*_\"]*\s*", re.IGNORECASE)
# "Sure! Here is the revised answer:" The text after it may be in quotation marks.
_PREAMBLE = re.compile(
    r"\s*(?:(?:Sure|Certainly|Of course|Absolutely|Okay)[!,.]?\s+)?[*_\"]*Here(?:'s|’s| is) (?:the|a|my|your|an) "
    rf"{_REVISED} (?:version of (?:the|my|your) (?:(?:last|previous|original) )?)?(?:answer|response)"
    r"(?:,? (?:that|which|with|without|of the assistant)\b[^\n:]{0,80})?:[*_\"]*\s*",
    re.IGNORECASE,
)
_QUOTED_TEXT = re.compile(r"\s*(?:\"([^\"]+)\"|“([^“”]+)”)\s*")
_HEADING = re.compile(
    r"^[ \t>*_#]*(?:(?:Human|Assistant|Critique|A critic says|New answer|A conversation|Two possible answers)[*_]*:|An example\.[ \t]*$)",
    re.MULTILINE,
)
_QUOTED_WORDS = re.compile(r"[\"“][^\"“”]+[\"”]|^[ \t]*>.*$", re.MULTILINE)


@dataclass(frozen=True)
class CheckedText:
    """A text without copied formatting, the names of the leaked parts, and the reason why the text is unusable, or NONE."""

    text: str
    leaks: tuple[str, ...] = ()
    rejection_reason: RejectionReason = RejectionReason.NONE

    def add_leak(self, part: str, reason: RejectionReason = RejectionReason.NONE) -> CheckedText:
        first_reason = self.rejection_reason if self.rejection_reason is not RejectionReason.NONE else reason
        return replace(self, leaks=(*self.leaks, part), rejection_reason=first_reason)


def strip_formatting(text: str) -> CheckedText:
    """Remove quotation marks, role names and preambles before the text. Quotations inside a text are kept."""
    leaks, stripped = set(), text.strip()
    while True:
        lines, before = stripped.split("\n"), stripped
        if _QUOTE_MARK.match(lines[0]):
            leaks.add("quotation mark")
            stripped = "\n".join(
                _QUOTE_MARK.sub("", line, count=1) if _QUOTE_MARK.match(line) else line for line in lines
            ).strip()
        if match := _PREAMBLE.match(stripped):
            leaks.add("preamble")
            stripped = stripped[match.end() :]
            if quoted := _QUOTED_TEXT.fullmatch(stripped):
                stripped = quoted[1] or quoted[2]
        if match := _ROLE_NAME.match(stripped):
            leaks.add("role name")
            stripped = stripped[match.end() :]
        if stripped == before:
            return CheckedText(stripped, tuple(sorted(leaks)))


def check_revision(
    text: str,
    messages: Sequence[ChatMessage],
    previous_response: str,
    critique: str,
    revision_prompt: str,
    examples: Sequence[FewShotExample],
) -> CheckedText:
    """Check a revision against everything that its prompt contained."""
    checked = _check_frame(text, messages, previous_response)
    new_ngrams = extract_ngrams(checked.text) - extract_ngrams(previous_response)
    if any(new_ngrams & (extract_ngrams(example.revision) | extract_ngrams(example.answer)) for example in examples):
        checked = checked.add_leak("example", RejectionReason.ECHO)
    allowed = _extract_allowed_ngrams(messages, previous_response)
    fraction, run = measure_copying(checked.text, f"{revision_prompt} {templates.REVISION_INSTRUCTION}", allowed)
    if fraction >= _MAX_COPIED_FRACTION or run >= _MAX_INSTRUCTION_RUN:
        checked = checked.add_leak("instruction", RejectionReason.LEAK)
    fraction, run = measure_copying(checked.text, _QUOTED_WORDS.sub(" . ", critique), allowed)
    if fraction >= _MAX_COPIED_FRACTION or run >= _MAX_CRITIQUE_RUN:
        checked = checked.add_leak("critique", RejectionReason.LEAK)
    return checked


def check_critique(
    text: str, messages: Sequence[ChatMessage], response: str, critique_prompt: str, examples: Sequence[FewShotExample]
) -> CheckedText:
    """Check a critique against everything that its prompt contained. A critique may quote the response."""
    name = _CRITIQUE_NAME.match(text)
    checked = _check_frame(text[name.end() :] if name else text, messages, response)
    if name:
        checked = checked.add_leak("role name")
    allowed = _extract_allowed_ngrams(messages, response)
    for part, source, reason in (
        ("instruction", f"{critique_prompt} {templates.CRITIQUE_INSTRUCTION}", RejectionReason.LEAK),
        ("example", " ".join(example.critique for example in examples), RejectionReason.ECHO),
    ):
        if measure_copying(checked.text, source, allowed)[0] >= _MAX_COPIED_CRITIQUE_FRACTION:
            checked = checked.add_leak(part, reason)
    return checked


def _check_frame(text: str, messages: Sequence[ChatMessage], response: str) -> CheckedText:
    """Remove formatting, and check a text against the headings of the template and the messages of the conversation."""
    checked = strip_formatting(text)
    own_headings = {
        match[0].strip() for content in (*(m.content for m in messages), response) for match in _HEADING.finditer(content)
    }
    if any(match[0].strip() not in own_headings for match in _HEADING.finditer(checked.text)):
        checked = checked.add_leak("heading", RejectionReason.LEAK)
    words = split_words(checked.text)
    if words and any(message.role != "assistant" and split_words(message.content) == words for message in messages):
        checked = checked.add_leak("conversation", RejectionReason.LEAK)
    return checked


def _extract_allowed_ngrams(messages: Sequence[ChatMessage], response: str) -> set[tuple[str, ...]]:
    return extract_ngrams(response).union(*(extract_ngrams(message.content) for message in messages))


def report_leaks(stage: str, model_id: str, checked: CheckedText) -> None:
    """Report the parts of a prompt that a model repeated."""
    for part in checked.leaks:
        NOTICES.report(
            "leak",
            f"{stage}: {part}",
            f"{model_id} repeats a part of its prompt ({part}) in the stage {stage}: marks and names are removed, other repetitions "
            "make the text unusable (view leak_stats)",
        )
