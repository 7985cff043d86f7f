"""Give the grades of a response's completions to its completions in a random order: the control of an arm that trains on grades.

The grades of a group keep their values, so the control differs from its arm only in which completion has which grade.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

from consumers.graders.interface import GradedText, GradeResult

_Grade = Callable[[Sequence[GradedText]], list[GradeResult]]
_FILE = '''"""The grades of {module} in a random order within each response."""

from benchmarks.arms.graders import {module}
from benchmarks.arms.graders.shuffle import shuffle_grades

NAME = "shuffled-" + {module}.NAME
VERSION = {module}.VERSION + "-seed-{seed}"
grade = shuffle_grades({module}.grade, {seed})
'''


def shuffle_grades(grade: _Grade, seed: int) -> _Grade:
    """Return a function that grades with `grade` and permutes the grades of each group (one response) by a hash of the seed.

    The stage grades all completions of a response in one call, so a group is always whole.
    """

    def grade_shuffled(texts: Sequence[GradedText]) -> list[GradeResult]:
        grades, places = grade(texts), defaultdict[str, list[int]](list)
        for place, text in enumerate(texts):
            places[text.group].append(place)
        shuffled = list(grades)
        for group, of_group in places.items():
            sources = random.Random(f"{seed}/{group}").sample(of_group, len(of_group))
            for place, source in zip(of_group, sources, strict=True):
                shuffled[place] = grades[source]
        return shuffled

    return grade_shuffled


def write_shuffled_grader(folder: Path, module: str, seed: int) -> Path:
    """Write the grader file of the control with a seed. Return its path."""
    path = folder / f"shuffled_{module}.py"
    path.write_text(_FILE.format(module=module, seed=seed))
    return path
