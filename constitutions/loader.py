"""Loading a constitution: TOML with two lists of principles, one for critique and revision, one for judging, or prose.

A constitution has a name, a semantic version and a content hash over everything that can change a label (not over comments
or layout). Principles have stable ids. What is wrong with a file is a `ConstitutionError` that says where.

    name = "example"                 [[critique]]                     [[judging]]
    version = "1.0.0"                id = "no-harm"                   id = "less-harm"
    description = "..."              name = "No harm"                 name = "Less harm"
                                     critique = "Say whether ..."     question = "Which answer ...?"
                                     revision = "Rewrite ..."

A prose constitution has [[prose]] paragraphs (id, name, priority, text) instead of the lists; the critic reads them one at a
time, each with what comes before it, the judge all at once in the order of their priorities. `include` takes the entries of
other files in, [terms] names words that {placeholders} in the texts stand for. `docs/constitutions.md` has it in full.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PrivateAttr, StringConstraints, ValidationError

from constitutions.sources import (
    FOLDER,
    ConstitutionError,
    File,
    Gathered,
    Place,
    escaped,
    gather,
    names,
    nearest,
    read_file,
    read_text,
    unknown_key,
)

__all__ = ["FOLDER", "Constitution", "ConstitutionError", "load", "names", "parse"]

Text = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]
Slug = Annotated[str, StringConstraints(pattern=r"^[a-z0-9]+(-[a-z0-9]+)*$")]
SEMVER = r"^\d+\.\d+\.\d+$"
LISTS = ("critique", "judging")
ALL_ID = "all"  # stands in records where a principle's id would


class Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


def not_reserved(principle_id: str) -> str:
    if principle_id == ALL_ID:
        raise ValueError("records say `all` where all principles were asked in one question")
    return principle_id


class Drawn(Strict):
    """What can be drawn: it has a weight, and the tags it is for (none: every prompt)."""

    id: Annotated[Slug, AfterValidator(not_reserved)]
    name: Text
    weight: float = Field(1.0, gt=0, le=1e6)
    tags: tuple[str, ...] = ()


class Principle(Drawn):
    """For critique and revision."""

    critique: Text
    revision: Text


class JudgingPrinciple(Drawn):
    """For comparing two answers."""

    question: Text


class Paragraph(Drawn):
    """A principle in prose. Priority 1 comes before 2: where two paragraphs disagree, the first of them counts."""

    priority: int = Field(ge=1, le=1000)
    text: Text


class Example(Strict):
    """A worked example, shown before a critique or a revision."""

    prompt: Text
    answer: Text
    critique: Text
    revision: Text


# How a paragraph is put to the critic, to the reviser and to the judge.
PROSE_CRITIQUE = "A principle of the assistant says: {text}\n\nSay whether the assistant's last answer goes against it."
PROSE_REVISION = "Rewrite the answer so that it follows this principle: {text}"
PROSE_BEFORE = "\n\nWhere that would go against what matters more, this comes first: {names}."
PROSE_QUESTION = "Which answer follows this principle better? {text}"
ALL = "Judge by all of these principles together:\n{lines}\nWhich answer follows them better?"
ALL_BY_PRIORITY = (
    "Judge by all of these principles together, the most important first:\n{lines}\n"
    "Where they disagree, the one further up counts. Which answer follows them better?"
)

D = TypeVar("D", bound=Drawn)


class Constitution(Strict):
    """A checked constitution. `judge_with` "all" puts every judging principle into one question.

    `text` is TOML that needs no other file. Of a prose constitution `critique` and `judging` are made from its paragraphs.
    """

    name: Slug
    version: Annotated[str, StringConstraints(pattern=SEMVER)]
    description: str = ""
    selection: Literal["random", "rotation"] = "random"
    judge_with: Literal["one", "all"] = "one"
    critique: tuple[Principle, ...] = Field(min_length=1)
    judging: tuple[JudgingPrinciple, ...] = Field(min_length=1)
    prose: tuple[Paragraph, ...] = ()
    examples: tuple[Example, ...] = ()
    text: str = Field("", exclude=True, repr=False)
    _places: dict[tuple[str, str], Place] = PrivateAttr(default_factory=dict)

    @cached_property
    def hash(self) -> str:
        """SHA-256 of the content, without comments and layout."""
        values = self.model_dump(mode="json")
        if self.prose:
            values["asked"] = self.whole_question
        else:
            del values["prose"]  # so that constitutions older than prose keep their hash
        content = json.dumps(values, sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(content.encode()).hexdigest()

    @property
    def whole_question(self) -> str:
        """Every judging principle in one question, prose in the order of its priorities."""
        if self.prose:
            lines = "\n".join(f"{number}. {p.name}: {p.text}" for number, p in enumerate(self.prose, 1))
            return ALL_BY_PRIORITY.format(lines=lines)
        return ALL.format(lines="\n".join(f"- {principle.question}" for principle in self.judging))

    def critique_principle(self, seed: int, number: int, tags: Sequence[str] = (), selection: str = "") -> Principle:
        """The principle of round `number` (from 0) of a chain; `selection` stands in for the constitution's own."""
        if (selection or self.selection) == "rotation":
            fitting = applicable(self.critique, tags)
            return fitting[number % len(fitting)]
        return draw(self.critique, seed, tags)

    def judging_principle(self, seed: int, tags: Sequence[str] = ()) -> JudgingPrinciple:
        """The principle that judges a pair."""
        return draw(self.judging, seed, tags)

    def judging_principles(self, seed: int, tags: Sequence[str] = (), k: int = 1) -> Sequence[JudgingPrinciple]:
        """The principles that judge a pair: one drawn by weight, or k different ones (as many as there are), drawn evenly."""
        if k == 1:
            return [self.judging_principle(seed, tags)]
        return sorted(applicable(self.judging, tags), key=lambda p: point(seed, p))[:k]

    def judging_by(self, principle_id: str) -> Constitution:
        """This constitution with one judging principle, asked alone."""
        (only,) = (p for p in self.judging if p.id == principle_id)
        values = self.model_dump() | {"judging": [only], "judge_with": "one", "prose": ()}
        return Constitution(**values)

    def place(self, part: str, principle_id: str) -> Place | None:
        """Where a principle (or a paragraph) stands in the files."""
        return self._places.get((part, principle_id))

    def without(self, left_out: Sequence[str]) -> Constitution:
        """This constitution without some principles, under a name that says so; raises ConstitutionError."""
        there = list(dict.fromkeys(p.id for p in (*self.critique, *self.judging)))
        for wanted in left_out:
            if wanted not in there:
                fix = nearest(wanted, there) or f"type: charter constitution show {self.name}"
                raise ConstitutionError(f"{self.name} has no principle {wanted}", f"it has {', '.join(there)}", fix)
        values = as_values(self) | {"name": "-".join([self.name, "without", *left_out])}
        for part in (*LISTS, "prose"):
            if part in values:
                values[part] = [entry for entry in values[part] if entry["id"] not in left_out]
                if not values[part]:
                    raise ConstitutionError(
                        f"without {', '.join(left_out)} {self.name} has no {part} principle left",
                        "a stage needs one to work by",
                        "leave one of them in",
                    )
        return parse(render(values), values["name"])


# Drawing


def applicable(principles: Sequence[D], tags: Sequence[str]) -> Sequence[D]:
    """The principles for a prompt with these tags; all of them when none fits."""
    fitting = [p for p in principles if not p.tags or set(p.tags) & set(tags)]
    return fitting or principles


def draw(principles: Sequence[D], seed: int, tags: Sequence[str]) -> D:
    """A weighted draw that depends on nothing but the seed and the ids (the same in every process and Python).

    Each principle draws the time until its turn, exponential with its weight as the rate, from a hash of seed and id; the
    first one is taken. So a principle that is added or left out moves only the draws that are its own, and two versions of a
    constitution can be compared record by record (rendezvous hashing: Thaler and Ravishankar 1998).
    """

    return min(applicable(principles, tags), key=lambda p: point(seed, p) / p.weight)


def point(seed: int, principle: Drawn) -> float:
    """A draw from the exponential distribution with rate 1 that hangs on the seed and the principle's id alone."""
    drawn = hashlib.blake2b(f"{seed}/{principle.id}".encode(), digest_size=8).digest()
    return -math.log((int.from_bytes(drawn, "big") + 0.5) / 2**64)


# Reading


def load(name_or_path: str | Path) -> Constitution:
    """A shipped constitution by name, or a file by path; raises ConstitutionError."""
    return built(read_file(str(name_or_path)))


def parse(text: str | bytes, origin: str) -> Constitution:
    """A constitution from TOML text; `origin` is what error messages call it."""
    return built(read_text(text, origin))


def built(file: File) -> Constitution:
    gathered = gather(file)
    values = dict(gathered.values)
    try:
        if "text" in values:  # it is the model's own, not the file's
            raise unknown_key(f"{file.origin}, line {file.line('text')}: text", "text", allowed([]))
        if "prose" in values:
            values = with_lists(values, gathered)
        constitution = Constitution(**values | {"text": file.text})
    except (ValidationError, TypeError) as error:
        raise explained(error, gathered) from error
    for part in () if constitution.prose else LISTS:
        check_unique(part, [p.id for p in getattr(constitution, part)], gathered)
    for (part, index), place in gathered.places.items():
        if part != "examples":
            constitution._places[part, str(gathered.values[part][index]["id"])] = place
    if file.values.get("include"):
        constitution = constitution.model_copy(update={"text": render(as_values(constitution))})
    return constitution


class Prose(Strict):
    prose: tuple[Paragraph, ...] = Field(min_length=1)


def with_lists(values: Mapping[str, Any], gathered: Gathered) -> dict[str, Any]:
    """The values of a prose constitution, its paragraphs in order and put into the words of the two lists."""
    for part in LISTS:
        if part in values:
            origin, _, line = gathered.located([part, 0])
            raise ConstitutionError(
                f"{origin}, line {line}: prose and a {part} list in one constitution",
                "prose makes both lists itself",
                f"write [[prose]] or [[{part}]]; two constitutions can be two files",
            )
    paragraphs = Prose(prose=values["prose"]).prose
    check_unique("prose", [p.id for p in paragraphs], gathered)
    ordered = sorted(paragraphs, key=lambda p: p.priority)
    lists: dict[str, list[dict[str, Any]]] = {"critique": [], "judging": []}
    for paragraph in ordered:
        above = ", ".join(p.name for p in ordered if p.priority < paragraph.priority)
        drawn = {name: getattr(paragraph, name) for name in Drawn.model_fields}
        revision = PROSE_REVISION.format(text=paragraph.text) + (PROSE_BEFORE.format(names=above) if above else "")
        lists["critique"].append(drawn | {"critique": PROSE_CRITIQUE.format(text=paragraph.text), "revision": revision})
        lists["judging"].append(drawn | {"question": PROSE_QUESTION.format(text=paragraph.text)})
    return {"judge_with": "all", **values, "prose": ordered, **lists}


def check_unique(part: str, ids: Sequence[str], gathered: Gathered) -> None:
    """Raise a ConstitutionError if an id stands twice; `ids` are in the order of the files."""
    for i, name in enumerate(ids):
        if name in ids[:i]:
            origin, _, line = gathered.located([part, i, "id"])
            first, _, there = gathered.located([part, ids.index(name), "id"])
            raise ConstitutionError(
                f"{origin}, line {line}: two {part} principles have the id {name}; the other is {first}, line {there}",
                "ids name principles in every record, so each must be its own",
                "give one of them another id",
            )


def explained(error: Exception, gathered: Gathered) -> ConstitutionError:
    """The first thing that is wrong, with its line, its principle and the nearest valid name."""
    if not isinstance(error, ValidationError):
        return ConstitutionError(f"{gathered.main.origin} is no constitution", str(error), "see constitutions/default.toml")
    # A misspelt key is told before the key that is missing because of it.
    first = min(error.errors(), key=lambda one: one["type"] != "extra_forbidden")
    why = SAID.get(first["type"], first["msg"].removeprefix("Value error, "))
    origin, place, line = gathered.located(first["loc"])
    key = str(place[-1]) if place else ""
    where = f"{origin}, line {line}: {'.'.join(str(part) for part in place)}"
    if first["type"] == "missing":
        fix = f"add [[{key}]] tables, or include a file that has some" if key in LISTS else f"add: {key} = ..."
        return ConstitutionError(f"{where} is missing", f"a constitution needs it: {key}", fix)
    if first["type"] == "extra_forbidden":
        return unknown_key(where, key, allowed(place))
    if first["type"] == "too_short":
        why = "a stage needs at least one principle to work by"
        return ConstitutionError(f"{where} is an empty list", why, f"add [[{key}]] tables, or include a file that has some")
    malformed = first["type"] == "string_pattern_mismatch"
    fix = f"write {FORMS[key]}" if malformed and key in FORMS else f"mend the value of {key}"
    return ConstitutionError(f"{where} cannot be {shortened(first['input'])}", why, fix)


# What pydantic says in words of Python.
SAID = {
    "string_too_short": "it is empty",
    "tuple_type": "it must be a list",
    "string_pattern_mismatch": "it has another form",
}
FORMS = {
    "version": 'three numbers: version = "1.0.0"',
    "name": 'lower-case words with hyphens: name = "my-constitution"',
    "id": 'lower-case words with hyphens: id = "no-lecture"',
}


def shortened(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def allowed(place: Sequence[Any]) -> list[str]:
    inner: dict[str, type[Strict]] = {
        "critique": Principle,
        "judging": JudgingPrinciple,
        "prose": Paragraph,
        "examples": Example,
    }
    if len(place) > 1:
        return list(inner[str(place[0])].model_fields)
    return [*(name for name in Constitution.model_fields if name != "text"), "include", "terms"]


# Writing


def as_values(constitution: Constitution) -> dict[str, Any]:
    """What a file that says the same holds: prose or lists, nothing that is at its default."""
    parts = ("prose", "examples") if constitution.prose else (*LISTS, "examples")
    head = ("name", "version", "description", "selection", "judge_with")
    dumped = constitution.model_dump(mode="json", exclude_defaults=True)
    values = {key: dumped[key] for key in (*head, *parts) if key in dumped}
    if constitution.prose:
        values["judge_with"] = constitution.judge_with  # prose has another default
    return values


def render(values: Mapping[str, Any]) -> str:
    """TOML of such values: parsed again it is the same constitution, with the same hash."""
    head = [f"{key} = {toml(value)}" for key, value in values.items() if not isinstance(value, list)]
    tables = [
        "\n".join([f"\n[[{part}]]", *(f"{key} = {toml(literal(value))}" for key, value in entry.items())])
        for part, entries in values.items()
        if isinstance(entries, list)
        for entry in entries
    ]
    return "\n".join([*head, *tables]) + "\n"


def literal(value: Any) -> Any:
    return escaped(value) if isinstance(value, str) else value


def toml(value: Any) -> str:
    if isinstance(value, str):  # a JSON string is a TOML basic string, but for the one control character that JSON leaves
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return f"[{', '.join(toml(item) for item in value)}]" if isinstance(value, list) else repr(value)
