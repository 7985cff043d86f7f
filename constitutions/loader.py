"""Loading a constitution: a TOML file with two lists of principles, one for critique and revision, one for judging.

A constitution has a name, a semantic version and a content hash over everything that can change a label (not over comments
or layout). Principles have stable ids. A principle is drawn from a hash of a seed, so the same record draws the same
principle in every process. What is wrong with a file is a `ConstitutionError` that says where.

    name = "example"                 [[critique]]                     [[judging]]
    version = "1.0.0"                id = "no-harm"                   id = "less-harm"
    description = "..."              name = "No harm"                 name = "Less harm"
                                     critique = "Say whether ..."     question = "Which answer ...?"
                                     revision = "Rewrite ..."
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
import tomllib
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

FOLDER = Path(__file__).parent
Text = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]
Slug = Annotated[str, StringConstraints(pattern=r"^[a-z0-9]+(-[a-z0-9]+)*$")]
SEMVER = r"^\d+\.\d+\.\d+$"


class ConstitutionError(ValueError):
    """What is wrong with a constitution, where, and what to do."""

    exit_code = 2

    def __init__(self, what: str, why: str, fix: str) -> None:
        super().__init__(what, why, fix)
        self.what, self.why, self.fix = what, why, fix

    def __str__(self) -> str:
        return "\n".join(line for line in (self.what, self.why, self.fix) if line)


class Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Drawn(Strict):
    """What can be drawn: it has a weight, and the tags it is for (none: every prompt)."""

    id: Slug
    name: Text
    weight: float = Field(1.0, gt=0)
    tags: tuple[str, ...] = ()


class Principle(Drawn):
    """For critique and revision."""

    critique: Text
    revision: Text


class JudgingPrinciple(Drawn):
    """For comparing two answers."""

    question: Text


class Example(Strict):
    """A worked example, shown before a critique or a revision."""

    prompt: Text
    answer: Text
    critique: Text
    revision: Text


D = TypeVar("D", bound=Drawn)


class Constitution(Strict):
    """A checked constitution. `judge_with` "all" puts every judging principle into one question."""

    name: Slug
    version: Annotated[str, StringConstraints(pattern=SEMVER)]
    description: str = ""
    selection: Literal["random", "rotation"] = "random"
    judge_with: Literal["one", "all"] = "one"
    critique: tuple[Principle, ...] = Field(min_length=1)
    judging: tuple[JudgingPrinciple, ...] = Field(min_length=1)
    examples: tuple[Example, ...] = ()
    text: str = Field("", exclude=True, repr=False)

    @cached_property
    def hash(self) -> str:
        """SHA-256 of the content, without comments and layout."""
        content = json.dumps(self.model_dump(mode="json"), sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(content.encode()).hexdigest()

    def critique_principle(self, seed: int, number: int, tags: Sequence[str] = ()) -> Principle:
        """The principle of round `number` (from 0) of a chain."""
        if self.selection == "rotation":
            fitting = applicable(self.critique, tags)
            return fitting[number % len(fitting)]
        return draw(self.critique, seed, tags)

    def judging_principle(self, seed: int, tags: Sequence[str] = ()) -> JudgingPrinciple:
        """The principle that judges a pair."""
        return draw(self.judging, seed, tags)


def applicable(principles: Sequence[D], tags: Sequence[str]) -> Sequence[D]:
    """The principles for a prompt with these tags; all of them when none fits."""
    fitting = [p for p in principles if not p.tags or set(p.tags) & set(tags)]
    return fitting or principles


def draw(principles: Sequence[D], seed: int, tags: Sequence[str]) -> D:
    """A weighted draw that depends on nothing but the seed (a hash: the same in every process and Python)."""
    fitting = applicable(principles, tags)
    point = int.from_bytes(hashlib.blake2b(str(seed).encode(), digest_size=8).digest(), "big") / 2**64
    left = point * sum(p.weight for p in fitting)
    for principle in fitting:
        left -= principle.weight
        if left < 0:
            return principle
    return fitting[-1]


def names() -> list[str]:
    """The shipped constitutions."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def load(name_or_path: str | Path) -> Constitution:
    """A shipped constitution by name, or a file by path; raises ConstitutionError."""
    wanted = str(name_or_path)
    path = FOLDER / f"{wanted}.toml" if wanted in names() else Path(wanted)
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConstitutionError(f"{path} is not UTF-8", str(error), "save it as UTF-8") from error
    except OSError as error:
        near = difflib.get_close_matches(wanted, names(), n=1, cutoff=0.4)
        raise ConstitutionError(
            f"there is no constitution {wanted!r}",
            f"neither a file nor one of the shipped ones: {', '.join(names())}",
            f"did you mean {near[0]}?" if near else "give the path of a TOML file, or one of these names",
        ) from error
    return parse(text, str(path))


def parse(text: str, origin: str) -> Constitution:
    """A constitution from TOML text; `origin` is what error messages call it."""
    try:
        values = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise ConstitutionError(f"{origin} is not TOML", str(error) or "nested too deeply", "mend that line") from error
    try:
        constitution = Constitution(**values | {"text": text})
    except (ValidationError, TypeError) as error:
        raise explained(error, text, origin) from error
    for part in ("critique", "judging"):
        check_unique(part, [p.id for p in getattr(constitution, part)], text, origin)
    return constitution


def explained(error: Exception, text: str, origin: str) -> ConstitutionError:
    """The first thing that is wrong, with its line, its principle and the nearest valid name."""
    if not isinstance(error, ValidationError):
        return ConstitutionError(f"{origin} is no constitution", str(error), "see constitutions/default.toml")
    first = error.errors()[0]
    place = [part for part in first["loc"] if part != "text"]
    key = str(place[-1]) if place else ""
    where = f"{origin}, line {line_of(text, place)}: {'.'.join(str(part) for part in place)}"
    if first["type"] == "missing":
        return ConstitutionError(f"{where} is missing", f"a constitution needs it: {key}", f"add: {key} = ...")
    if first["type"] == "extra_forbidden":
        near = difflib.get_close_matches(key, allowed(place), n=1, cutoff=0.4)
        fix = f"did you mean {near[0]}?" if near else f"allowed here: {', '.join(allowed(place))}"
        return ConstitutionError(f"{where} is unknown", "there is no such key", fix)
    return ConstitutionError(where, first["msg"], f"mend the value of {key}")


def allowed(place: Sequence[Any]) -> list[str]:
    inner: dict[str, type[Strict]] = {"critique": Principle, "judging": JudgingPrinciple, "examples": Example}
    model: type[Strict] = inner.get(str(place[0]), Constitution) if len(place) > 1 else Constitution
    return [name for name in model.model_fields if name != "text"]


def line_of(text: str, place: Sequence[Any]) -> int:
    """The line of a key: of the n-th [[table]], and in it of the key, as far as the file has them."""
    lines, start = text.splitlines(), 0
    if len(place) > 1 and isinstance(place[1], int):
        tables = [i for i, line in enumerate(lines) if re.match(rf"\s*\[\[\s*{re.escape(str(place[0]))}\s*\]\]", line)]
        start = tables[place[1]] if place[1] < len(tables) else 0
    key = re.escape(str(place[-1])) if place else "$"
    for i in range(start, len(lines)):
        if re.match(rf"\s*(\[\[?\s*)?{key}\b", lines[i]):
            return i + 1
        if i > start and start and lines[i].lstrip().startswith("["):
            break
    return start + 1


def check_unique(part: str, ids: Sequence[str], text: str, origin: str) -> None:
    for i, name in enumerate(ids):
        if name in ids[:i]:
            raise ConstitutionError(
                f"{origin}, line {line_of(text, [part, i, 'id'])}: two {part} principles have the id {name}",
                "ids name principles in every record, so each must be its own",
                "give one of them another id",
            )
