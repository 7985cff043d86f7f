"""Test cases for a constitution and a judge. A case has a prompt, a response that must win and a response that must lose.

A case file is TOML with one [[case]] table per case, or JSONL with one object per line. `principles` lists the judge principles
that a case tests. If this list is empty, the case tests all principles that match its tags. In a TOML file, the key
`constitution` can name the constitution of the cases.

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

from constitutions.loader import NonEmptyStr, StrictModel
from constitutions.sources import (
    CONSTITUTIONS_FOLDER,
    ConstitutionError,
    ConstitutionFile,
    decode_utf8,
    list_shipped_constitutions,
    make_unknown_key_error,
    parse_toml,
    read_file_bytes,
    suggest_nearest,
)


class ConstitutionCase(StrictModel):
    """One test case: the judge must prefer `wins` to `loses`."""

    prompt: NonEmptyStr
    wins: NonEmptyStr
    loses: NonEmptyStr
    principles: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()


@dataclass(frozen=True)
class CaseFile:
    """The cases of a file, and the location of each case. If `constitution` is empty, the file is for any constitution."""

    cases: tuple[ConstitutionCase, ...]
    locations: tuple[str, ...]
    constitution: str

    def check_principles(self, constitution: str, principle_ids: Sequence[str]) -> None:
        """Raise ConstitutionError if a case names a principle that the constitution does not have."""
        for case, location in zip(self.cases, self.locations, strict=True):
            for principle_id in case.principles:
                if principle_id not in principle_ids:
                    raise ConstitutionError(
                        f"{location}: {constitution} has no judge principle {principle_id}",
                        f"its judge principles are {', '.join(principle_ids)}",
                        suggest_nearest(principle_id, principle_ids)
                        or "name one of them, or test another constitution: --constitution NAME",
                    )


def read_cases(name_or_path: str) -> CaseFile:
    """Read test cases. `name_or_path` is a shipped constitution, a TOML or .jsonl file, or - for JSONL from standard input."""
    if name_or_path == "-":
        return _parse_jsonl_cases(sys.stdin.buffer.read(), "standard input")
    path = (
        CONSTITUTIONS_FOLDER / "cases" / f"{name_or_path}.toml"
        if name_or_path in list_shipped_constitutions()
        else Path(name_or_path)
    )
    data = read_file_bytes(path)
    if data is None:
        raise ConstitutionError(
            f"there is no file {name_or_path}",
            f"shipped cases exist only for: {', '.join(list_shipped_constitutions())}",
            "give a file or one of these names",
        )
    return _parse_jsonl_cases(data, str(path)) if path.suffix == ".jsonl" else _parse_toml_cases(parse_toml(data, str(path)))


def _parse_toml_cases(file: ConstitutionFile) -> CaseFile:
    if "critique" in file.values or "judge" in file.values or "prose" in file.values:
        raise ConstitutionError(
            f"{file.origin} is a constitution, not a case file",
            "a test needs prompts with a response that must win and a response that must lose",
            f"type: charter constitution test CASES --constitution {file.origin}",
        )
    for key in file.values:
        if key not in ("case", "constitution"):
            raise make_unknown_key_error(f"{file.origin}, line {file.find_line(key)}: {key}", key, ["case", "constitution"])
    entries = file.values.get("case", [])
    if not isinstance(entries, list):
        entries = []
    locations = [f"{file.origin}, line {file.find_line('case', i)}" for i in range(len(entries))]
    return _validate_cases(entries, locations, file.origin, str(file.values.get("constitution", "")))


def _parse_jsonl_cases(data: bytes, origin: str) -> CaseFile:
    entries, locations = [], []
    for number, line in enumerate(decode_utf8(data, origin).split("\n"), 1):
        if line.strip():
            locations.append(f"{origin}, line {number}")
            try:
                entries.append(json.loads(line))
            except (ValueError, RecursionError) as error:
                raise ConstitutionError(f"{locations[-1]} is not JSON", str(error), "write one object per line") from error
    return _validate_cases(entries, locations, origin, "")


def _validate_cases(entries: Sequence[Any], locations: Sequence[str], origin: str, constitution: str) -> CaseFile:
    cases = []
    for entry, location in zip(entries, locations, strict=True):
        try:
            cases.append(ConstitutionCase.model_validate(entry))
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(str(part) for part in first["loc"])
            raise ConstitutionError(
                f"{location}: {key or 'the case'} cannot be used",
                first["msg"],
                "write prompt, wins (the better response) and loses (the worse response); principles and tags are optional",
            ) from error
    if not cases:
        raise ConstitutionError(f"{origin} has no case", "there is nothing to test", "add [[case]] with prompt, wins and loses")
    return CaseFile(tuple(cases), tuple(locations), constitution)
