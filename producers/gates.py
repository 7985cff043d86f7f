"""Decide whether a text that a model sampled is published as a prompt. The first gate that fails is the reason.

unfinished            the model reached its token limit before the line ended
outside_list          the line is not an item of the list that the model wrote, such as "Here are eight questions:"
operational_detail    a red-team prompt with details that would help to carry out harm (producers/operational_detail.py)
leaked_instruction    the text repeats the instruction of the request, or begins with a label such as "Topic:"
not_a_request         fewer than three words, an answer ("Sure, here is", "I'm sorry, but"), or nothing that asks for something
invalid               a row of a file with this text would be refused (producers/parse.py), e.g. because of a chat template's mark
too_long              longer than `max_chars`
wrong_language        the language is not the one that the request asked for
erased                the prompt was erased (`charter erase`)
duplicate             near an example of the recipe, or near a prompt that the run already has (producers/near_duplicates.py)
contamination         near a prompt on the other side of the split: training or evaluation

The check for requests needs words of the language. Charter has them for English and German; in other languages it only rejects
short texts and answers. The counts of the reasons also have `withheld` (a filter of the model server withheld the response),
`failed_request` (the model cannot answer the request), `empty` (a response without a text) and `over_limit` (not needed).
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from enum import StrEnum

from engine.languages import compute_language_probability
from engine.words import measure_copying, split_words
from producers.near_duplicates import Conflict, NearDuplicateIndex, PromptHistory, extract_features
from producers.operational_detail import find_operational_detail
from producers.parse import PromptRow, RowError, parse_prompt
from producers.recipe import RequestPlan
from schemas import ids
from schemas.records import Split


class Rejection(StrEnum):
    """Why a sampled text is not published. See the module docstring."""

    UNFINISHED = "unfinished"
    OUTSIDE_LIST = "outside_list"
    LEAKED_INSTRUCTION = "leaked_instruction"
    NOT_A_REQUEST = "not_a_request"
    INVALID = "invalid"
    TOO_LONG = "too_long"
    WRONG_LANGUAGE = "wrong_language"
    OPERATIONAL_DETAIL = "operational_detail"
    ERASED = "erased"
    DUPLICATE = "duplicate"
    CONTAMINATION = "contamination"
    WITHHELD = "withheld"
    FAILED_REQUEST = "failed_request"
    EMPTY = "empty"
    OVER_LIMIT = "over_limit"


@dataclass(frozen=True)
class Rejected:
    """A rejected text. `detail` says more about the reason, or is empty."""

    text: str
    reason: Rejection
    detail: str = ""


_MIN_WORDS = 3
_MAX_COPIED_FRACTION, _MAX_COPIED_RUN = 0.5, 10  # as of the instruction in consumers/leaks.py
_LANGUAGE_PRIOR, _MIN_LANGUAGE_PROBABILITY = 0.5, 0.1
_LABEL = re.compile(
    r"\W*(?:topics?|messages?|user|human|assistant|ai|examples?|prompts?|questions?|requests?|answers?|language|note|thema|frage"
    r"|nachricht|antwort|beispiel)\W{0,3}\d*\s*[:：]",
    re.IGNORECASE,
)
_ANSWER = re.compile(
    r"\W*(?:sure\b|certainly\b|of course\b|absolutely\b|here (?:is|are)\b|here's\b|i(?:'|’)m sorry\b|i am sorry\b|sorry,|as an ai\b"
    r"|i(?:'|’)m an ai\b|i can(?:'|’)t\b|i cannot\b|unfortunately\b|the answer is\b|yes[,.]|no[,.]|natürlich\b|gerne\b|hier (?:ist|sind)\b"
    r"|es tut mir leid\b|als ki\b|leider\b|ja[,.]|nein[,.])",
    re.IGNORECASE,
)
# Words that begin a clause of a request, and phrases anywhere in it.
_OPENINGS: dict[str, str] = {
    "en": r"advise|analy[sz]e|answer|ask|brainstorm|build|calculate|check|choose|classify|compare|complete|compose|continue|convert"
    r"|convince|correct|count|create|debate|define|describe|design|discuss|draft|draw|edit|estimate|evaluate|explain|fill|find|finish"
    r"|fix|generate|give|guess|guide|help|identify|imagine|improve|insult|invent|just|let|lie|list|make|mock|name|offer|organi[sz]e"
    r"|outline|paraphrase|persuade|pick|plan|play|please|praise|predict|prepare|pretend|promise|propose|prove|provide|put|rank|rate|read"
    r"|recite|recommend|remind|rephrase|replace|respond|rewrite|say|show|simplify|solve|sort|speak|spread|start|suggest|summari[sz]e"
    r"|support|talk|teach|tell|think|threaten|translate|trick|try|turn|use|warn|write"
    r"|what|which|who|whom|whose|when|where|why|how|is|are|was|were|do|does|did|can|could|would|will|should|may|am|has|have",
    "de": r"ändere|antworte|bau|baue|begründe|berechne|beschreib|beschreibe|bitte|denk|denke|entwirf|erfinde|erkläre|erklär|erzähl"
    r"|erzähle|finde|formuliere|führe|gib|hilf|korrigiere|lies|mach|mache|nenn|nenne|ordne|plane|prüfe|rate|sag|sage|schlag|schlage"
    r"|schreib|schreibe|sei|sing|spiel|spiele|stell|stelle|such|suche|tu|übersetz|übersetze|verbessere|vergleiche|vervollständige|zähl"
    r"|zähle|zeig|zeige|was|welche|welcher|welches|wer|wen|wem|wessen|wann|wo|warum|wieso|weshalb|wie|woher|wohin|ist|sind|kann|kannst"
    r"|können|könntest|könnten|darf|soll|sollte|muss|hast|haben|gibt|würdest",
}
_PHRASES: dict[str, str] = {
    "en": r"help me|tell me|give me|show me|teach me|(?:can|could|would|will) you|please|i need|i want|i(?:'|’)d like|i would like"
    r"|i(?:'|’)m looking for|how (?:do|can|could|to|should|would)|what (?:is|are|should|can)|i wonder",
    "de": r"hilf mir|sag mir|gib mir|zeig mir|bitte|ich brauche|ich will|ich möchte|ich hätte gern|ich suche|kannst du|können sie",
}
_REQUESTS = {
    code: re.compile(
        rf"(?:^|[.,:;!?]\s+(?:and |then |now |und |dann )?)\W*(?:{opening})\b|\b(?:{_PHRASES[code]})\b|[?？]", re.IGNORECASE
    )
    for code, opening in _OPENINGS.items()
}


def is_request(text: str, language: str) -> bool:
    """Return whether a text asks for something. In a language without word lists, any text is a request that is no answer."""
    if len([word for word in extract_features(text) if " " not in word and word[0].isalpha()]) < _MIN_WORDS or _ANSWER.match(
        text
    ):
        return False
    pattern = _REQUESTS.get(language)
    return pattern is None or bool(pattern.search(text))


def repeats_instruction(text: str, instruction: str) -> bool:
    """Return whether a text repeats a large part of the instruction of its request, or begins with a label."""
    if _LABEL.match(text) or split_words(text) == split_words(instruction):
        return True
    fraction, run = measure_copying(text, instruction, set())
    return fraction >= _MAX_COPIED_FRACTION or run >= _MAX_COPIED_RUN


def is_in_language(text: str, language: str) -> bool:
    return compute_language_probability(text, language, _LANGUAGE_PRIOR) >= _MIN_LANGUAGE_PROBABILITY


@dataclass(frozen=True)
class PromptGates:
    """Checks sampled texts. `examples` is the index of the examples of the recipe."""

    history: PromptHistory
    examples: NearDuplicateIndex
    max_chars: int

    def check(self, text: str, plan: RequestPlan, instruction: str, erased_prompt_ids: Collection[str]) -> PromptRow | Rejected:
        """Return the prompt of a text that passes the gates of its content, or the reason why it does not pass."""
        if plan.kind.red_team and (detail := find_operational_detail(text)):
            # The text must not be in a log or on a terminal either.
            return Rejected("", Rejection.OPERATIONAL_DETAIL, f"it has {detail}; the text is not shown")
        if repeats_instruction(text, instruction):
            return Rejected(text, Rejection.LEAKED_INSTRUCTION)
        if not is_request(text, plan.language):
            return Rejected(text, Rejection.NOT_A_REQUEST)
        if len(text) > self.max_chars:
            return Rejected(text, Rejection.TOO_LONG, f"{len(text)} characters; the limit is {self.max_chars}")
        row = {"prompt": text, "tags": list(plan.kind.tags)}
        try:
            parsed = parse_prompt(row, source=plan.kind.source, max_chars=self.max_chars)
        except RowError as error:
            return Rejected(text, Rejection.INVALID, str(error))
        if not is_in_language(text, plan.language):
            return Rejected(text, Rejection.WRONG_LANGUAGE, f"the request asked for {plan.language}")
        if ids.compute_prompt_id(parsed.messages) in erased_prompt_ids:
            return Rejected(text, Rejection.ERASED)
        if self.examples.find(text):
            return Rejected(text, Rejection.DUPLICATE, "it is near an example of the recipe")
        return parsed

    def check_conflict(self, text: str, parsed: PromptRow, split: Split) -> Rejected | None:
        """Return why the prompt may not be published together with the earlier prompts, or None."""
        conflict = self.history.find_conflict(parsed.messages, split)
        if conflict is None:
            return None
        reason = Rejection.CONTAMINATION if conflict[0] is Conflict.CONTAMINATION else Rejection.DUPLICATE
        return Rejected(text, reason, f"it is near {conflict[1].origin or conflict[1].prompt_id}")
