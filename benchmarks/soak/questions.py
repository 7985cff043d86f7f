"""A program in place of the language model that generates prompts. It writes questions of the small language, with details.

The small language has only some thousand questions, and the gate for near-duplicates accepts a few hundred of them. So each
question gets a sentence with four details, such as "It is rusty, and Nora needs it in the cellar in May.". The small language model
answers such a question, because the question itself is in its language. Of 30,000 questions, the gate then accepts about four
fifths.

One line of twenty is an answer in place of a question, and one of twenty repeats the line before, so that the gates have something
to reject. The model writes other texts for the same request in each process, as a language model on a server may do. So if an index
were published twice, its prompts would differ, and the checks would find them.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from secrets import token_hex

from benchmarks.learning.language import write_question
from engine.models.interface import LOCAL_CAPABILITIES, Generation, GenerationRequest, ModelCapabilities, OptionScores

_REQUEST = re.compile(
    r"(?P<instruction>.*?)\. They are about: (?P<thing>\w+)\.\nWrite a numbered list of (?P<count>\d+) ", re.DOTALL
)
_NEXT_NUMBER = re.compile(r"(\d+)\.$")
_FAULT_RATE = 0.05
_ANSWER = "Sure, here is another one."
_DETAILS = (
    "It is {state}, and {name} needs it in the {place} {time}.",
    "{name} saw it in the {place}, {state} and ready {time}.",
    "The {state} one from the {place} is for {name} {time}.",
    "In the {place} it became {state}, which {name} noticed {time}.",
)
# fmt: off
_NAMES = (
    "Ada", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gus", "Hana", "Ivo", "Jana", "Kai", "Lea", "Max", "Nora", "Otto", "Pia", "Quin", "Rosa",
    "Sam", "Tia", "Udo", "Vera", "Wim", "Xena", "Yuri", "Zoe", "Amir", "Bela", "Carl", "Dora", "Emil", "Fay", "Gwen", "Hugo", "Inga",
    "Jack", "Kira", "Lars", "Mona", "Nils",
)
_PLACES = (
    "garden", "kitchen", "cellar", "attic", "hall", "yard", "school", "shop", "barn", "church", "park", "market", "office", "station",
    "harbor", "bakery", "stable", "library", "theater", "museum",
)
_STATES = (
    "red", "blue", "green", "white", "black", "brown", "heavy", "broken", "wooden", "wet", "cheap", "narrow", "rusty", "round", "dusty",
    "soft",
)
_TIMES = (
    "today", "tonight", "tomorrow", "soon", "on Monday", "on Tuesday", "on Friday", "on Sunday", "in May", "in June", "next week",
    "next month", "at noon", "at six", "before dinner", "after lunch",
)
# fmt: on


@dataclass(frozen=True)
class QuestionModel:
    """Writes the lists that the generator of prompts asks for."""

    id: str = "programmatic-questions"
    revision: str = "1"
    capabilities: ModelCapabilities = LOCAL_CAPABILITIES
    process: str = field(default_factory=lambda: token_hex(8))

    def generate(
        self,
        batch: Sequence[GenerationRequest],
        *,
        num_completions: int = 1,
        temperature: float = 1.0,
        top_p: float = 1.0,
        max_tokens: int = 256,
        max_thinking_tokens: int = 0,
    ) -> list[list[Generation]]:
        return [[Generation(self.write_list(request), "stop")] for request in batch]

    def score_options(self, batch: Sequence[GenerationRequest], options: Sequence[str]) -> list[OptionScores]:
        # The interface of a model has this method. The generator of prompts does not call it.
        raise NotImplementedError("The programmatic model of questions only writes questions.")

    def write_list(self, request: GenerationRequest) -> str:
        """Return the rest of a list. The number of the first line is in the prefill."""
        found, next_number = _REQUEST.match(request.messages[-1].content), _NEXT_NUMBER.search(request.prefill)
        if not found or not next_number:
            raise ValueError(f"this is not a request for prompts: {request.messages[-1].content[:200]!r}")
        rng = random.Random(f"{request.seed}/{self.process}")
        is_harmful, first = "somebody else" in found["instruction"], int(next_number[1])
        lines: list[str] = []
        for _ in range(first, int(found["count"]) + 1):
            fault = rng.random()
            if fault < _FAULT_RATE:
                lines.append(_ANSWER)
            elif lines and fault < 2 * _FAULT_RATE:
                lines.append(lines[-1])
            else:
                lines.append(_write_prompt(rng, found["thing"], is_harmful=is_harmful))
        return "\n".join([f" {lines[0]}", *(f"{number}. {line}" for number, line in enumerate(lines[1:], first + 1))])


def _write_prompt(rng: random.Random, thing: str, *, is_harmful: bool) -> str:
    question = write_question(rng, thing, is_harmful=is_harmful)
    details = rng.choice(_DETAILS).format(
        state=rng.choice(_STATES), name=rng.choice(_NAMES), place=rng.choice(_PLACES), time=rng.choice(_TIMES)
    )
    return f"{question.text} {details}"
