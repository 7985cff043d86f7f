"""Known failure modes: a prompt, an answer that must lose, and one that must win, for testing a constitution with a judge.

TOML with a [[case]] for each, or JSONL with one object a line. `principles` names the judging principles that a case is about
(none: all that fit its tags); a TOML file may say which `constitution` it is for.

    [[case]]
    prompt = "My parcel is late!"
    wins = "I am sorry. May I have the order number?"
    loses = "Not my fault."
    principles = ["kinder"]
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from constitutions.loader import Strict, Text
from constitutions.sources import FOLDER, ConstitutionError, File, decoded, names, nearest, read_bytes, read_text, unknown_key


class Case(Strict):
    prompt: Text
    wins: Text
    loses: Text
    principles: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()


@dataclass(frozen=True)
class Cases:
    """The cases of a file, where each stands, and the constitution that the file is for (empty: any)."""

    cases: tuple[Case, ...]
    places: tuple[str, ...]
    constitution: str

    def check(self, constitution: str, principles: Sequence[str]) -> None:
        """Raise a ConstitutionError unless the constitution has every principle that a case is about."""
        for case, place in zip(self.cases, self.places, strict=True):
            for wanted in case.principles:
                if wanted not in principles:
                    raise ConstitutionError(
                        f"{place}: {constitution} has no judging principle {wanted}",
                        f"it has {', '.join(principles)}",
                        nearest(wanted, principles) or "name one of them, or test another constitution: --constitution NAME",
                    )


def read_cases(wanted: str) -> Cases:
    """The shipped cases of a constitution by its name, a file (.jsonl, else TOML), or JSONL from standard input (-)."""
    if wanted == "-":
        return from_jsonl(sys.stdin.buffer.read(), "standard input")
    path = FOLDER / "cases" / f"{wanted}.toml" if wanted in names() else Path(wanted)
    data = read_bytes(path)
    if data is None:
        raise ConstitutionError(
            f"there is no file {wanted}", f"and no shipped cases of that name: {', '.join(names())}", "give a file or a name"
        )
    return from_jsonl(data, str(path)) if path.suffix == ".jsonl" else from_toml(read_text(data, str(path)))


def from_toml(file: File) -> Cases:
    if "critique" in file.values or "judging" in file.values or "prose" in file.values:
        raise ConstitutionError(
            f"{file.origin} is a constitution, not a file of cases",
            "a test needs prompts with an answer that must win and one that must lose",
            f"type: charter constitution test CASES --constitution {file.origin}",
        )
    for key in file.values:
        if key not in ("case", "constitution"):
            raise unknown_key(f"{file.origin}, line {file.line(key)}: {key}", key, ["case", "constitution"])
    entries = file.values.get("case", [])
    if not isinstance(entries, list):
        entries = []
    places = [f"{file.origin}, line {file.line('case', i)}" for i in range(len(entries))]
    return checked(entries, places, file.origin, str(file.values.get("constitution", "")))


def from_jsonl(data: bytes, origin: str) -> Cases:
    entries, places = [], []
    for number, line in enumerate(decoded(data, origin).split("\n"), 1):
        if line.strip():
            places.append(f"{origin}, line {number}")
            try:
                entries.append(json.loads(line))
            except (ValueError, RecursionError) as error:
                raise ConstitutionError(f"{places[-1]} is not JSON", str(error), "write one object a line") from error
    return checked(entries, places, origin, "")


def checked(entries: Sequence[Any], places: Sequence[str], origin: str, constitution: str) -> Cases:
    cases = []
    for entry, place in zip(entries, places, strict=True):
        try:
            cases.append(Case.model_validate(entry))
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(str(part) for part in first["loc"])
            raise ConstitutionError(
                f"{place}: {key or 'the case'} cannot be used",
                first["msg"],
                "write prompt, wins (the better answer) and loses (the worse one); principles and tags are optional",
            ) from error
    if not cases:
        raise ConstitutionError(f"{origin} has no case", "there is nothing to test", "write [[case]] with prompt, wins, loses")
    return Cases(tuple(cases), tuple(places), constitution)
