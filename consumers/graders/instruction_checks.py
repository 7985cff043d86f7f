"""The 25 verifiable instructions of IFEval (Zhou et al. 2023): each class checks in code whether a text follows one of them.

The parameters have the names of the data set. `is_followed` gets a text with "\\n" as line ending. What counts as a word, a
paragraph, a section and so on is what the published implementation counts, so that rates can be compared: keywords are found
inside longer words, forbidden words are whole words, only "," is a comma and only the straight quotation mark wraps a text.

The checks differ from the published implementation where its result does not follow from the instruction:

1. Sentences are counted by rules and not by a model that must be downloaded. The number of a list item ends no sentence.
2. A keyword is a text and not a regular expression. A letter can be any character, such as "#".
3. A text without a detectable language does not follow an instruction about its language. Text in capital letters is lowered
   before its language is detected, because the detector ignores words in capital letters.
4. A horizontal rule ("---") and an empty bullet point are not bullet points, and several empty lines end one paragraph.
5. NaN is not JSON.
6. The marks of the first word of a paragraph, such as ":", are not part of the word.
"""

from __future__ import annotations

import json
import re
import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from engine.languages import LANGUAGES, detect_language


def _reject_guesses(value: object) -> object:
    """Reject numbers that are written as text, and booleans. Pydantic would convert them."""
    if isinstance(value, str | bool):
        raise ValueError(f"must be a number, not {value!r}")
    return value


def _require_visible(text: str) -> str:
    if not text.strip():
        raise ValueError("must not be empty")
    return unicodedata.normalize("NFC", text.strip())


def _require_language(code: str) -> str:
    if code not in LANGUAGES:
        raise ValueError(f"must be one of {', '.join(LANGUAGES)}")
    return code


Count = Annotated[int, BeforeValidator(_reject_guesses), Field(ge=0)]
Position = Annotated[int, BeforeValidator(_reject_guesses), Field(ge=1)]
Text = Annotated[str, AfterValidator(_require_visible)]
Texts = Annotated[list[Text], Field(min_length=1)]
Relation = Literal["less than", "at least"]
Language = Annotated[str, AfterValidator(_require_language)]


class Instruction(BaseModel, ABC):
    """One verifiable instruction with its parameters. `id` is its name in the data set."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: ClassVar[str]
    needs_language: ClassVar[bool] = False

    @abstractmethod
    def is_followed(self, text: str) -> bool:
        """Return whether the text follows the instruction."""


def _compare(count: int, relation: Relation, limit: int) -> bool:
    return count < limit if relation == "less than" else count >= limit


class KeywordsExist(Instruction):
    id = "keywords:existence"
    keywords: Texts

    def is_followed(self, text: str) -> bool:
        return all(_count_occurrences(keyword, text) for keyword in self.keywords)


class KeywordFrequency(Instruction):
    id = "keywords:frequency"
    keyword: Text
    frequency: Count
    relation: Relation

    def is_followed(self, text: str) -> bool:
        return _compare(_count_occurrences(self.keyword, text), self.relation, self.frequency)


class ForbiddenWords(Instruction):
    id = "keywords:forbidden_words"
    forbidden_words: Texts

    def is_followed(self, text: str) -> bool:
        return not any(re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text, re.IGNORECASE) for word in self.forbidden_words)


class LetterFrequency(Instruction):
    id = "keywords:letter_frequency"
    letter: Annotated[str, Field(min_length=1, max_length=1)]
    let_frequency: Count
    let_relation: Relation

    def is_followed(self, text: str) -> bool:
        return _compare(text.lower().count(self.letter.lower()), self.let_relation, self.let_frequency)


def _count_occurrences(keyword: str, text: str) -> int:
    return len(re.findall(re.escape(keyword), text, re.IGNORECASE))


class ResponseLanguage(Instruction):
    id = "language:response_language"
    needs_language = True
    language: Language

    def is_followed(self, text: str) -> bool:
        detected = detect_language(text)
        return detected == self.language or (self.language == "zh" and detected.startswith("zh-"))


class NumberOfSentences(Instruction):
    id = "length_constraints:number_sentences"
    num_sentences: Count
    relation: Relation

    def is_followed(self, text: str) -> bool:
        return _compare(count_sentences(text), self.relation, self.num_sentences)


class NumberOfParagraphs(Instruction):
    """Paragraphs are separated by `***`. A separator may also stand before the first and after the last one."""

    id = "length_constraints:number_paragraphs"
    num_paragraphs: Count

    def is_followed(self, text: str) -> bool:
        return _count_parts(text, "***") == self.num_paragraphs


class NumberOfWords(Instruction):
    id = "length_constraints:number_words"
    num_words: Count
    relation: Relation

    def is_followed(self, text: str) -> bool:
        return _compare(len(re.findall(r"\w+", text)), self.relation, self.num_words)


class FirstWordOfParagraph(Instruction):
    """Paragraphs are separated by empty lines. Their number must be exact."""

    id = "length_constraints:nth_paragraph_first_word"
    num_paragraphs: Count
    nth_paragraph: Position
    first_word: Text

    def is_followed(self, text: str) -> bool:
        paragraphs = [paragraph for paragraph in re.split(r"\n[^\S\n]*\n", text) if paragraph.strip()]
        if len(paragraphs) != self.num_paragraphs or self.nth_paragraph > len(paragraphs):
            return False
        first = re.match(r"""\s*["'“‘«]*([\w-]+)""", paragraphs[self.nth_paragraph - 1])
        return first is not None and first[1].lower() == self.first_word.lower()


class NumberOfPlaceholders(Instruction):
    id = "detectable_content:number_placeholders"
    num_placeholders: Count

    def is_followed(self, text: str) -> bool:
        return len(re.findall(r"\[.*?\]", text)) >= self.num_placeholders


class Postscript(Instruction):
    id = "detectable_content:postscript"
    postscript_marker: Text

    def is_followed(self, text: str) -> bool:
        known = {"P.S.": r"p\.\s?s\.", "P.P.S": r"p\.\s?p\.\s?s"}
        pattern = known.get(self.postscript_marker, re.escape(self.postscript_marker))
        return re.search(pattern, text, re.IGNORECASE) is not None


class NumberOfBullets(Instruction):
    id = "detectable_format:number_bullet_lists"
    num_bullets: Count

    def is_followed(self, text: str) -> bool:
        lines = [line.strip() for line in text.split("\n")]
        rules = re.compile(r"(?:-\s*){3,}|(?:\*\s*){3,}")
        bullets = [line for line in lines if re.match(r"-|\*[^*]", line) and not rules.fullmatch(line)]
        return len(bullets) == self.num_bullets


_ANSWERS = ("My answer is yes.", "My answer is no.", "My answer is maybe.")


class ConstrainedResponse(Instruction):
    id = "detectable_format:constrained_response"

    def is_followed(self, text: str) -> bool:
        return any(answer in text for answer in _ANSWERS)


class NumberOfHighlights(Instruction):
    """A highlight is a text between single or double asterisks on one line."""

    id = "detectable_format:number_highlighted_sections"
    num_highlights: Count

    def is_followed(self, text: str) -> bool:
        found = [*re.findall(r"\*([^\n*]*)\*", text), *re.findall(r"\*\*([^\n*]*)\*\*", text)]
        return sum(bool(highlight.strip()) for highlight in found) >= self.num_highlights


class MultipleSections(Instruction):
    """A section begins with the marker and a number, such as "Section 1"."""

    id = "detectable_format:multiple_sections"
    section_spliter: Text
    num_sections: Count

    def is_followed(self, text: str) -> bool:
        return len(re.findall(rf"{re.escape(self.section_spliter)}\s?\d+", text)) >= self.num_sections


class JsonFormat(Instruction):
    """The text is JSON, alone or in one Markdown code block."""

    id = "detectable_format:json_format"

    def is_followed(self, text: str) -> bool:
        body = re.sub(r"^```(?:json)?|```$", "", text.strip(), flags=re.IGNORECASE).strip()
        try:
            json.loads(body, parse_int=str, parse_constant=_reject_constant)
        except (ValueError, RecursionError):
            return False
        return True


def _reject_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


class Title(Instruction):
    """A title is a text in double angle brackets on one line."""

    id = "detectable_format:title"

    def is_followed(self, text: str) -> bool:
        return any(title.strip("<> \t") for title in re.findall(r"<<([^\n]+)>>", text))


class TwoResponses(Instruction):
    """Two different responses are separated by six asterisks."""

    id = "combination:two_responses"

    def is_followed(self, text: str) -> bool:
        responses = [part.strip() for part in text.split("******") if part.strip()]
        return _count_parts(text, "******") == 2 and responses[0] != responses[1]


class RepeatPrompt(Instruction):
    id = "combination:repeat_prompt"
    prompt_to_repeat: Text

    def is_followed(self, text: str) -> bool:
        return text.strip().lower().startswith(self.prompt_to_repeat.lower())


class EndPhrase(Instruction):
    id = "startend:end_checker"
    end_phrase: Text

    def is_followed(self, text: str) -> bool:
        return text.strip().strip('"').lower().endswith(self.end_phrase.lower())


class Quotation(Instruction):
    id = "startend:quotation"

    def is_followed(self, text: str) -> bool:
        stripped = text.strip()
        return len(stripped) > 1 and stripped[0] == stripped[-1] == '"'


class CapitalWordFrequency(Instruction):
    """A hyphenated word is one word. "I" and "A" are words in capital letters."""

    id = "change_case:capital_word_frequency"
    capital_frequency: Count
    capital_relation: Relation

    def is_followed(self, text: str) -> bool:
        words = re.findall(r"\w+(?:[-'’.]\w+)*", text)
        return _compare(sum(word.isupper() for word in words), self.capital_relation, self.capital_frequency)


class EnglishCapital(Instruction):
    id = "change_case:english_capital"
    needs_language = True

    def is_followed(self, text: str) -> bool:
        return text.isupper() and detect_language(text) == "en"


class EnglishLowercase(Instruction):
    id = "change_case:english_lowercase"
    needs_language = True

    def is_followed(self, text: str) -> bool:
        return text.islower() and detect_language(text) == "en"


class NoComma(Instruction):
    id = "punctuation:no_comma"

    def is_followed(self, text: str) -> bool:
        return "," not in text


INSTRUCTIONS: dict[str, type[Instruction]] = {
    instruction.id: instruction
    for instruction in (
        KeywordsExist, KeywordFrequency, ForbiddenWords, LetterFrequency, ResponseLanguage, NumberOfSentences, NumberOfParagraphs,
        NumberOfWords, FirstWordOfParagraph, NumberOfPlaceholders, Postscript, NumberOfBullets, ConstrainedResponse,
        NumberOfHighlights, MultipleSections, JsonFormat, Title, TwoResponses, RepeatPrompt, EndPhrase, Quotation,
        CapitalWordFrequency, EnglishCapital, EnglishLowercase, NoComma,
    )
}  # fmt: skip


def _count_parts(text: str, separator: str) -> int:
    """Return the number of parts between separators. A blank part counts only between two separators, as -1 for the whole text."""
    parts = [part.strip() for part in text.split(separator)]
    inner, outer = parts[1:-1], [parts[0], parts[-1]] if len(parts) > 1 else parts
    return -1 if "" in inner else len(inner) + sum(bool(part) for part in outer)


# A text may end after these words, but a sentence never ends after a title.
_TITLES = frozenset(("mr", "mrs", "ms", "dr", "prof", "st", "mt", "gen", "col", "sgt", "capt", "lt", "rev", "hon", "fr"))
_ABBREVIATIONS = frozenset(
    (
        "e.g", "i.e", "etc", "vs", "cf", "viz", "al", "approx", "fig", "no", "vol", "pp", "ed", "eds", "dept", "est", "jr", "sr",
        "inc", "ltd", "co", "corp", "ave", "blvd", "rd", "a.m", "p.m", "u.s", "u.k", "u.n", "e.u", "d.c", "ph.d", "b.a", "m.a",
        "jan", "feb", "mar", "apr", "jun", "jul", "aug", "sep", "sept", "oct", "nov", "dec",
    )
)  # fmt: skip
_SENTENCE_END = re.compile(r"""(?:[.!?…]+["'”’»)\]*_]*(?=\s|$)|[。！？।॥؟۔።]+["'”’»」』)\]*_]*)""")
_LIST_MARKER = re.compile(r"[\s>#*_(-]*(?:\d+|[A-Za-z]|[ivxIVX]+)")


def count_sentences(text: str) -> int:
    """Return the number of sentences. A sentence ends with a mark; a last text without a mark counts as a sentence."""
    count, start = 0, 0
    for end in _SENTENCE_END.finditer(text):
        sentence = text[start : end.start()]
        if re.search(r"\w", sentence) and not _continues(sentence, end[0], text[end.end() :].lstrip()[:1]):
            count, start = count + 1, end.end()
    return count + bool(re.search(r"\w", text[start:]))


def _continues(sentence: str, mark: str, next_character: str) -> bool:
    """Return whether a mark that is followed by white space does not end the sentence."""
    if not next_character:
        return False
    if mark.startswith(("..", "…")):
        return next_character.islower()
    if not mark.startswith("."):
        return False
    word = re.split(r"""[\s("'“‘\[]""", sentence)[-1]
    if _LIST_MARKER.fullmatch(sentence.rpartition("\n")[2]):
        return True
    if word.lower() in _TITLES:
        return True
    if word.lower() in _ABBREVIATIONS:
        return not next_character.isupper()
    return re.fullmatch(r"[A-Z](?:\.[A-Z])*", word) is not None and word != "I"  # initials


def make_loose_variants(text: str) -> Sequence[str]:
    """Return the text and the variants of the loose measure: without the first line, the last line or both, and without asterisks."""
    lines = text.split("\n")
    cuts = [text, "\n".join(lines[1:]).strip(), "\n".join(lines[:-1]).strip(), "\n".join(lines[1:-1]).strip()]
    return list(dict.fromkeys([*cuts, *(cut.replace("*", "") for cut in cuts)]))
