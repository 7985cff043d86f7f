"""Load a grader from a Python file: `grade.graders = ["refusal", "my_grader.py"]` (docs/extending.md).

The file defines NAME, VERSION and a function `grade(texts)`. The function gets a list of GradedText and returns one GradeResult
for each text.
"""

from __future__ import annotations

import importlib.util
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from consumers.graders.interface import GradedText, GradeResult
from engine.errors import UsageError
from engine.models.interface import Result
from schemas.records import ModelRef

_NAME_PATTERN = re.compile(r"[a-z][a-z0-9_-]{0,39}")


@dataclass(frozen=True)
class CustomGrader:
    """A grader of a user. An error in its function is an error of the record."""

    name: str
    version: str
    function: Callable[[Sequence[GradedText]], Sequence[GradeResult]]
    model: ModelRef | None = None

    def grade(self, texts: Sequence[GradedText]) -> list[Result[list[GradeResult]]]:
        """Return one grade for each text. Raise TypeError or ValueError if the function returns something else."""
        results = list(self.function(texts))
        if len(results) != len(texts):
            raise ValueError(f"the grader {self.name} returned {len(results)} results for {len(texts)} responses")
        for result in results:
            if not isinstance(result, GradeResult):
                raise TypeError(f"the grader {self.name} returned {type(result).__name__} in place of a GradeResult")
            if result.score is not None and not math.isfinite(result.score):
                raise ValueError(f"the grader {self.name} returned the score {result.score}")
        return [[result] for result in results]


def load_grader(path: str, reserved_names: Sequence[str]) -> CustomGrader:
    """Import a grader file. Raise UsageError if the file, its name, its version or its function is missing or invalid."""
    file = Path(path)
    if not file.is_file():
        raise UsageError(f"there is no file {path}", "grade.graders names it", "correct grade.graders")
    spec = importlib.util.spec_from_file_location(f"charter_grader_{file.stem}", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    name, version, function = (getattr(module, key, None) for key in ("NAME", "VERSION", "grade"))
    if not isinstance(name, str) or not _NAME_PATTERN.fullmatch(name) or name in reserved_names:
        raise UsageError(
            f"{path}: NAME cannot be {name!r}",
            f"it must be lower case letters, digits, - and _, and none of {', '.join(reserved_names)}",
            'write, for example, NAME = "my-grader"',
        )
    if not isinstance(version, str) or not version:
        raise UsageError(f"{path}: VERSION cannot be {version!r}", "it must be a text", 'write, for example, VERSION = "1"')
    if not callable(function):
        raise UsageError(f"{path} has no function grade(texts)", "the grade stage calls it", "see docs/extending.md")
    return CustomGrader(name, version, function)
