"""Loading a constitution: TOML with two lists of principles, one for critique and revision, one for judging, or prose.

A constitution has a name, a semantic version and a content hash over everything that can change a label (not over comments
or layout). Principles have stable ids. What is wrong with a file is a `ConstitutionError` that says where.

    name = "example"                 [[critique]]                     [[judge]]
    version = "1.0.0"                id = "no-harm"                   id = "less-harm"
    description = "..."              name = "No harm"                 name = "Less harm"
                                     critique_prompt = "Say whether ..."     judge_prompt = "Which answer ...?"
                                     revision_prompt = "Rewrite ..."

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
    CONSTITUTIONS_FOLDER,
    ConstitutionError,
    ConstitutionFile,
    MergedConstitution,
    SourceLocation,
    escape_braces,
    list_shipped_constitutions,
    make_unknown_key_error,
    merge_includes,
    parse_toml,
    read_constitution_file,
    suggest_nearest,
)

__all__ = [
    "CONSTITUTIONS_FOLDER",
    "Constitution",
    "ConstitutionError",
    "list_shipped_constitutions",
    "load_constitution",
    "parse_constitution",
]

NonEmptyStr = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]
Slug = Annotated[str, StringConstraints(pattern=r"^[a-z0-9]+(-[a-z0-9]+)*$")]
_SEMVER_PATTERN = r"^\d+\.\d+\.\d+$"
PRINCIPLE_LISTS = ("critique", "judge")
ALL_PRINCIPLES_ID = "all"  # stands in records where a principle's id would


class StrictModel(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


def _require_not_reserved(principle_id: str) -> str:
    if principle_id == ALL_PRINCIPLES_ID:
        raise ValueError("records say `all` where all principles were asked in one question")
    return principle_id


class BasePrinciple(StrictModel):
    """What can be drawn: it has a weight, and the tags it is for (none: every prompt)."""

    id: Annotated[Slug, AfterValidator(_require_not_reserved)]
    name: NonEmptyStr
    weight: float = Field(1.0, gt=0, le=1e6)
    tags: tuple[str, ...] = ()


class CritiquePrinciple(BasePrinciple):
    """For critique and revision."""

    critique_prompt: NonEmptyStr
    revision_prompt: NonEmptyStr


class JudgePrinciple(BasePrinciple):
    """For comparing two answers."""

    judge_prompt: NonEmptyStr


class ProseParagraph(BasePrinciple):
    """A principle in prose. Priority 1 comes before 2: where two paragraphs disagree, the first of them counts."""

    priority: int = Field(ge=1, le=1000)
    text: NonEmptyStr


class FewShotExample(StrictModel):
    """A worked example, shown before a critique or a revision."""

    prompt: NonEmptyStr
    answer: NonEmptyStr
    critique: NonEmptyStr
    revision: NonEmptyStr


# How a paragraph is put to the critic, to the reviser and to the judge.
_PROSE_CRITIQUE_TEMPLATE = (
    "A principle of the assistant says: {text}\n\nSay whether the assistant's last answer goes against it."
)
_PROSE_REVISION_TEMPLATE = "Rewrite the answer so that it follows this principle: {text}"
_PROSE_PRECEDENCE_TEMPLATE = "\n\nWhere that would go against what matters more, this comes first: {names}."
_PROSE_JUDGE_TEMPLATE = "Which answer follows this principle better? {text}"
_ALL_PRINCIPLES_TEMPLATE = "Judge by all of these principles together:\n{lines}\nWhich answer follows them better?"
PRIORITIZED_PRINCIPLES_TEMPLATE = (
    "Judge by all of these principles together, the most important first:\n{lines}\n"
    "Where they disagree, the one further up counts. Which answer follows them better?"
)

D = TypeVar("D", bound=BasePrinciple)


class Constitution(StrictModel):
    """A checked constitution. `judge_with` "all" puts every judging principle into one question.

    `text` is TOML that needs no other file. Of a prose constitution `critique` and `judge` are made from its paragraphs.
    """

    name: Slug
    version: Annotated[str, StringConstraints(pattern=_SEMVER_PATTERN)]
    description: str = ""
    selection: Literal["sample", "rotate"] = "sample"
    judge_with: Literal["one", "all"] = "one"
    critique: tuple[CritiquePrinciple, ...] = Field(min_length=1)
    judge: tuple[JudgePrinciple, ...] = Field(min_length=1)
    prose: tuple[ProseParagraph, ...] = ()
    examples: tuple[FewShotExample, ...] = ()
    text: str = Field("", exclude=True, repr=False)
    _locations: dict[tuple[str, str], SourceLocation] = PrivateAttr(default_factory=dict)

    @cached_property
    def hash(self) -> str:
        """SHA-256 of the content, without comments and layout."""
        values = _rename_for_hash(self.model_dump(mode="json"))
        if self.prose:
            values["asked"] = self.combined_judge_prompt
        else:
            del values["prose"]  # so that constitutions older than prose keep their hash
        content = json.dumps(values, sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(content.encode()).hexdigest()

    @property
    def combined_judge_prompt(self) -> str:
        """Every judging principle in one question, prose in the order of its priorities."""
        if self.prose:
            lines = "\n".join(f"{number}. {p.name}: {p.text}" for number, p in enumerate(self.prose, 1))
            return PRIORITIZED_PRINCIPLES_TEMPLATE.format(lines=lines)
        return _ALL_PRINCIPLES_TEMPLATE.format(lines="\n".join(f"- {principle.judge_prompt}" for principle in self.judge))

    def select_critique_principle(
        self, seed: int, round_index: int, tags: Sequence[str] = (), selection: str = ""
    ) -> CritiquePrinciple:
        """The principle of round `number` (from 0) of a chain; `selection` stands in for the constitution's own."""
        if (selection or self.selection) == "rotate":
            fitting = filter_by_tags(self.critique, tags)
            return fitting[round_index % len(fitting)]
        return _sample_principle(self.critique, seed, tags)

    def sample_judge_principle(self, seed: int, tags: Sequence[str] = ()) -> JudgePrinciple:
        """The principle that judges a pair."""
        return _sample_principle(self.judge, seed, tags)

    def sample_judge_principles(self, seed: int, tags: Sequence[str] = (), num_principles: int = 1) -> Sequence[JudgePrinciple]:
        """The principles that judge a pair: one drawn by weight, or k different ones (as many as there are), drawn evenly."""
        if num_principles == 1:
            return [self.sample_judge_principle(seed, tags)]
        return sorted(filter_by_tags(self.judge, tags), key=lambda p: _draw_exponential(seed, p))[:num_principles]

    def with_single_judge_principle(self, principle_id: str) -> Constitution:
        """This constitution with one judging principle, asked alone."""
        (only,) = (p for p in self.judge if p.id == principle_id)
        values = self.model_dump() | {"judge": [only], "judge_with": "one", "prose": ()}
        return Constitution(**values)

    def find_location(self, part: str, principle_id: str) -> SourceLocation | None:
        """Where a principle (or a paragraph) stands in the files."""
        return self._locations.get((part, principle_id))

    def without_principles(self, principle_ids: Sequence[str]) -> Constitution:
        """This constitution without some principles, under a name that says so; raises ConstitutionError."""
        there = list(dict.fromkeys(p.id for p in (*self.critique, *self.judge)))
        for wanted in principle_ids:
            if wanted not in there:
                fix = suggest_nearest(wanted, there) or f"type: charter constitution show {self.name}"
                raise ConstitutionError(f"{self.name} has no principle {wanted}", f"it has {', '.join(there)}", fix)
        values = to_toml_values(self) | {"name": "-".join([self.name, "without", *principle_ids])}
        for part in (*PRINCIPLE_LISTS, "prose"):
            if part in values:
                values[part] = [entry for entry in values[part] if entry["id"] not in principle_ids]
                if not values[part]:
                    raise ConstitutionError(
                        f"without {', '.join(principle_ids)} {self.name} has no {part} principle left",
                        "a stage needs one to work by",
                        "leave one of them in",
                    )
        return parse_constitution(render_toml(values), values["name"])


# Drawing


# The names that fields had when hashes were first written: a hash identifies content, and record ids contain it.
_HASHED_NAMES = {"judge": "judging", "critique_prompt": "critique", "revision_prompt": "revision", "judge_prompt": "question"}
_HASHED_SELECTIONS = {"sample": "random", "rotate": "rotation"}


def _rename_for_hash(values: Any) -> Any:
    """Return the dumped fields under the names that the hash is computed from."""
    if isinstance(values, dict):
        renamed = {_HASHED_NAMES.get(name, name): _rename_for_hash(value) for name, value in values.items()}
        if "selection" in renamed:
            renamed["selection"] = _HASHED_SELECTIONS[renamed["selection"]]
        return renamed
    return [_rename_for_hash(value) for value in values] if isinstance(values, list) else values


def filter_by_tags(principles: Sequence[D], tags: Sequence[str]) -> Sequence[D]:
    """The principles for a prompt with these tags; all of them when none fits."""
    fitting = [p for p in principles if not p.tags or set(p.tags) & set(tags)]
    return fitting or principles


def _sample_principle(principles: Sequence[D], seed: int, tags: Sequence[str]) -> D:
    """A weighted draw that depends on nothing but the seed and the ids (the same in every process and Python).

    Each principle draws the time until its turn, exponential with its weight as the rate, from a hash of seed and id; the
    first one is taken. So a principle that is added or left out moves only the draws that are its own, and two versions of a
    constitution can be compared record by record (rendezvous hashing: Thaler and Ravishankar 1998).
    """

    return min(filter_by_tags(principles, tags), key=lambda p: _draw_exponential(seed, p) / p.weight)


def _draw_exponential(seed: int, principle: BasePrinciple) -> float:
    """A draw from the exponential distribution with rate 1 that hangs on the seed and the principle's id alone."""
    drawn = hashlib.blake2b(f"{seed}/{principle.id}".encode(), digest_size=8).digest()
    return -math.log((int.from_bytes(drawn, "big") + 0.5) / 2**64)


# Reading


def load_constitution(name_or_path: str | Path) -> Constitution:
    """A shipped constitution by name, or a file by path; raises ConstitutionError."""
    return _build_constitution(read_constitution_file(str(name_or_path)))


def parse_constitution(text: str | bytes, origin: str) -> Constitution:
    """A constitution from TOML text; `origin` is what error messages call it."""
    return _build_constitution(parse_toml(text, origin))


def _build_constitution(file: ConstitutionFile) -> Constitution:
    gathered = merge_includes(file)
    values = dict(gathered.values)
    try:
        if "text" in values:  # it is the model's own, not the file's
            raise make_unknown_key_error(f"{file.origin}, line {file.find_line('text')}: text", "text", _list_allowed_keys([]))
        if "prose" in values:
            values = _expand_prose(values, gathered)
        constitution = Constitution(**values | {"text": file.text})
    except (ValidationError, TypeError) as error:
        raise _explain_error(error, gathered) from error
    for part in () if constitution.prose else PRINCIPLE_LISTS:
        _check_unique_ids(part, [p.id for p in getattr(constitution, part)], gathered)
    for (part, index), place in gathered.locations.items():
        if part != "examples":
            constitution._locations[part, str(gathered.values[part][index]["id"])] = place
    if file.values.get("include"):
        constitution = constitution.model_copy(update={"text": render_toml(to_toml_values(constitution))})
    return constitution


class _ProseSection(StrictModel):
    prose: tuple[ProseParagraph, ...] = Field(min_length=1)


def _expand_prose(values: Mapping[str, Any], gathered: MergedConstitution) -> dict[str, Any]:
    """The values of a prose constitution, its paragraphs in order and put into the words of the two lists."""
    for part in PRINCIPLE_LISTS:
        if part in values:
            origin, _, line = gathered.locate([part, 0])
            raise ConstitutionError(
                f"{origin}, line {line}: prose and a {part} list in one constitution",
                "prose makes both lists itself",
                f"write [[prose]] or [[{part}]]; two constitutions can be two files",
            )
    paragraphs = _ProseSection(prose=values["prose"]).prose
    _check_unique_ids("prose", [p.id for p in paragraphs], gathered)
    ordered = sorted(paragraphs, key=lambda p: p.priority)
    lists: dict[str, list[dict[str, Any]]] = {"critique": [], "judge": []}
    for paragraph in ordered:
        above = ", ".join(p.name for p in ordered if p.priority < paragraph.priority)
        drawn = {name: getattr(paragraph, name) for name in BasePrinciple.model_fields}
        revision = _PROSE_REVISION_TEMPLATE.format(text=paragraph.text) + (
            _PROSE_PRECEDENCE_TEMPLATE.format(names=above) if above else ""
        )
        lists["critique"].append(
            drawn | {"critique_prompt": _PROSE_CRITIQUE_TEMPLATE.format(text=paragraph.text), "revision_prompt": revision}
        )
        lists["judge"].append(drawn | {"judge_prompt": _PROSE_JUDGE_TEMPLATE.format(text=paragraph.text)})
    return {"judge_with": "all", **values, "prose": ordered, **lists}


def _check_unique_ids(part: str, ids: Sequence[str], gathered: MergedConstitution) -> None:
    """Raise a ConstitutionError if an id stands twice; `ids` are in the order of the files."""
    for i, name in enumerate(ids):
        if name in ids[:i]:
            origin, _, line = gathered.locate([part, i, "id"])
            first, _, there = gathered.locate([part, ids.index(name), "id"])
            raise ConstitutionError(
                f"{origin}, line {line}: two {part} principles have the id {name}; the other is {first}, line {there}",
                "ids name principles in every record, so each must be its own",
                "give one of them another id",
            )


def _explain_error(error: Exception, gathered: MergedConstitution) -> ConstitutionError:
    """The first thing that is wrong, with its line, its principle and the nearest valid name."""
    if not isinstance(error, ValidationError):
        return ConstitutionError(
            f"{gathered.main_file.origin} is no constitution", str(error), "see constitutions/default.toml"
        )
    # A misspelt key is told before the key that is missing because of it.
    first = min(error.errors(), key=lambda one: one["type"] != "extra_forbidden")
    why = _PYDANTIC_MESSAGES.get(first["type"], first["msg"].removeprefix("Value error, "))
    origin, place, line = gathered.locate(first["loc"])
    key = str(place[-1]) if place else ""
    where = f"{origin}, line {line}: {'.'.join(str(part) for part in place)}"
    if first["type"] == "missing":
        fix = f"add [[{key}]] tables, or include a file that has some" if key in PRINCIPLE_LISTS else f"add: {key} = ..."
        return ConstitutionError(f"{where} is missing", f"a constitution needs it: {key}", fix)
    if first["type"] == "extra_forbidden":
        return make_unknown_key_error(where, key, _list_allowed_keys(place))
    if first["type"] == "too_short":
        why = "a stage needs at least one principle to work by"
        return ConstitutionError(f"{where} is an empty list", why, f"add [[{key}]] tables, or include a file that has some")
    malformed = first["type"] == "string_pattern_mismatch"
    fix = f"write {_FORMAT_HINTS[key]}" if malformed and key in _FORMAT_HINTS else f"mend the value of {key}"
    return ConstitutionError(f"{where} cannot be {_shorten_repr(first['input'])}", why, fix)


# What pydantic says in words of Python.
_PYDANTIC_MESSAGES = {
    "string_too_short": "it is empty",
    "tuple_type": "it must be a list",
    "string_pattern_mismatch": "it has another form",
}
_FORMAT_HINTS = {
    "version": 'three numbers: version = "1.0.0"',
    "name": 'lower-case words with hyphens: name = "my-constitution"',
    "id": 'lower-case words with hyphens: id = "no-lecture"',
}


def _shorten_repr(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def _list_allowed_keys(key_path: Sequence[Any]) -> list[str]:
    inner: dict[str, type[StrictModel]] = {
        "critique": CritiquePrinciple,
        "judge": JudgePrinciple,
        "prose": ProseParagraph,
        "examples": FewShotExample,
    }
    if len(key_path) > 1:
        return list(inner[str(key_path[0])].model_fields)
    return [*(name for name in Constitution.model_fields if name != "text"), "include", "terms"]


# Writing


def to_toml_values(constitution: Constitution) -> dict[str, Any]:
    """What a file that says the same holds: prose or lists, nothing that is at its default."""
    parts = ("prose", "examples") if constitution.prose else (*PRINCIPLE_LISTS, "examples")
    head = ("name", "version", "description", "selection", "judge_with")
    dumped = constitution.model_dump(mode="json", exclude_defaults=True)
    values = {key: dumped[key] for key in (*head, *parts) if key in dumped}
    if constitution.prose:
        values["judge_with"] = constitution.judge_with  # prose has another default
    return values


def render_toml(values: Mapping[str, Any]) -> str:
    """TOML of such values: parsed again it is the same constitution, with the same hash."""
    head = [f"{key} = {_format_toml_value(value)}" for key, value in values.items() if not isinstance(value, list)]
    tables = [
        "\n".join([f"\n[[{part}]]", *(f"{key} = {_format_toml_value(_escape_value(value))}" for key, value in entry.items())])
        for part, entries in values.items()
        if isinstance(entries, list)
        for entry in entries
    ]
    return "\n".join([*head, *tables]) + "\n"


def _escape_value(value: Any) -> Any:
    return escape_braces(value) if isinstance(value, str) else value


def _format_toml_value(value: Any) -> str:
    if isinstance(value, str):  # a JSON string is a TOML basic string, but for the one control character that JSON leaves
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return f"[{', '.join(_format_toml_value(item) for item in value)}]" if isinstance(value, list) else repr(value)
