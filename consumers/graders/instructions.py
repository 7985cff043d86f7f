"""Grade whether a response follows the verifiable instructions of its prompt, as in IFEval (Zhou et al. 2023).

The instructions are in `suite_item.instructions`: a JSON list of {"id": ..., "kwargs": {...}}. A response whose prompt has no
instructions gets no grade. The label is `follows` if the response follows all instructions, and else `fails`. The score is the
fraction of the instructions that it follows. `details` has the strict and the loose measure: `strict` and `loose` are 1 if all
instructions are followed, `followed_strict` and `followed_loose` are numbers of instructions, and `instructions` is their number.
The loose measure also accepts the response without its first line, without its last line and without asterisks.

A blank response follows nothing. If an instruction is not known or has wrong parameters, there is no score.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Sequence
from functools import lru_cache

from pydantic import ValidationError

from consumers.graders.instruction_checks import INSTRUCTIONS, Instruction, make_loose_variants
from consumers.graders.interface import GradedText, GradeResult
from engine.eligibility import is_blank
from engine.models.interface import Result
from schemas.records import FinishReason, ModelRef, Outcome

FOLLOWS, FAILS = "follows", "fails"


class InstructionsGrader:
    """Checks verifiable instructions. See the module docstring."""

    name = "instructions"
    version = "1"
    model: ModelRef | None = None

    def grade(self, texts: Sequence[GradedText]) -> list[Result[list[GradeResult]]]:
        """Return one grade for each text, or none for a text without instructions."""
        return [[_grade_text(text)] if text.suite_item and text.suite_item.instructions else [] for text in texts]


@lru_cache(maxsize=4096)
def parse_instructions(instructions: str) -> tuple[Instruction, ...]:
    """Return the instructions of a JSON list of {"id": ..., "kwargs": {...}}.

    A parameter that is null counts as missing. Raises ValueError, with the reason, if the JSON, an id or a parameter is wrong.
    """
    try:
        items = json.loads(instructions)
    except ValueError as error:
        raise ValueError(f"the instructions are not JSON: {error}") from error
    if not isinstance(items, list) or not items:
        raise ValueError("the instructions are not a list with at least one instruction")
    return tuple(_parse_instruction(item) for item in items)


def _parse_instruction(item: object) -> Instruction:
    if not isinstance(item, dict) or not isinstance(item.get("id"), str):
        raise ValueError(f"the instruction {json.dumps(item)[:100]} has no id")
    kwargs = item.get("kwargs") or {}
    if item["id"] not in INSTRUCTIONS:
        raise ValueError(f"the instruction {item['id']!r} is not known")
    if not isinstance(kwargs, dict):
        raise ValueError(f"the kwargs of the instruction {item['id']!r} are not an object")
    try:
        return INSTRUCTIONS[item["id"]].model_validate({name: value for name, value in kwargs.items() if value is not None})
    except ValidationError as error:
        raise ValueError(f"the instruction {item['id']!r} has wrong parameters: {_describe(error)}") from error


def _describe(error: ValidationError) -> str:
    return "; ".join(f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}" for problem in error.errors())


def _grade_text(text: GradedText) -> GradeResult:
    assert text.suite_item is not None
    if text.finish_reason is FinishReason.REFUSED:
        return GradeResult(outcome=Outcome.WITHHELD, outcome_reason="a filter of the server withheld the response")
    try:
        instructions = parse_instructions(text.suite_item.instructions)
    except ValueError as error:
        return GradeResult(outcome=Outcome.UNPARSEABLE, outcome_reason=str(error))
    response = unicodedata.normalize("NFC", text.text.replace("\r\n", "\n"))
    strict = [_is_followed(instruction, response) for instruction in instructions]
    variants = make_loose_variants(response)
    loose = [
        followed or any(_is_followed(instruction, variant) for variant in variants)
        for instruction, followed in zip(instructions, strict, strict=True)
    ]
    details = {
        "strict": float(all(strict)),
        "loose": float(all(loose)),
        "instructions": float(len(instructions)),
        "followed_strict": float(sum(strict)),
        "followed_loose": float(sum(loose)),
    }
    return GradeResult(FOLLOWS if all(strict) else FAILS, sum(strict) / len(strict), details=details)


def _is_followed(instruction: Instruction, text: str) -> bool:
    return not is_blank(text) and instruction.is_followed(text)
