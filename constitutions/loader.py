"""Load a constitution from a TOML file. The file has two lists of principles (critique and judge) or paragraphs of prose.

A constitution has a name, a semantic version and a content hash. The hash covers everything that can change a label. Comments
and layout do not change the hash. Principles have stable ids. An error in a file raises a `ConstitutionError` with the file and
line.

    name = "example"                 [[critique]]                     [[judge]]
    version = "1.0.0"                id = "no-harm"                   id = "less-harm"
    description = "..."              name = "No harm"                 name = "Less harm"
                                     critique_prompt = "Say whether ..."     judge_prompt = "Which answer ...?"
                                     revision_prompt = "Rewrite ..."

A prose constitution has [[prose]] paragraphs (id, name, priority, text) instead of the lists. The critic gets one paragraph at
a time, with the names of the paragraphs that have precedence. The judge gets all paragraphs in the order of their priorities.
`include` adds the entries of other files. [terms] defines the texts that replace {placeholders}. See `docs/constitutions.md`.
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
ALL_PRINCIPLES_ID = "all"  # the principle_id of a record whose question contains all principles


class StrictModel(BaseModel):
    """The base class of all entries. Entries are immutable and reject unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")


def _require_not_reserved(principle_id: str) -> str:
    if principle_id == ALL_PRINCIPLES_ID:
        raise ValueError("the id `all` is reserved, because records use it for a question with all principles")
    return principle_id


class BasePrinciple(StrictModel):
    """The fields of every principle. A higher `weight` increases the probability that the principle is sampled.

    The principle applies only to prompts with one of its `tags`. A principle without tags applies to all prompts.
    """

    id: Annotated[Slug, AfterValidator(_require_not_reserved)]
    name: NonEmptyStr
    weight: float = Field(1.0, gt=0, le=1e6)
    tags: tuple[str, ...] = ()


class CritiquePrinciple(BasePrinciple):
    """A principle for critique and revision."""

    critique_prompt: NonEmptyStr
    revision_prompt: NonEmptyStr


class JudgePrinciple(BasePrinciple):
    """A principle for comparing two responses."""

    judge_prompt: NonEmptyStr


class ProseParagraph(BasePrinciple):
    """A principle in prose. If two paragraphs conflict, the paragraph with the lower `priority` number has precedence."""

    priority: int = Field(ge=1, le=1000)
    text: NonEmptyStr


class FewShotExample(StrictModel):
    """An example that is shown in the prompts for critiques and revisions."""

    prompt: NonEmptyStr
    answer: NonEmptyStr
    critique: NonEmptyStr
    revision: NonEmptyStr


# The prompts for a paragraph: critique, revision and judging.
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
    """A valid constitution. If `judge_with` is "all", one question contains all judge principles.

    `targets` names what the principles change on purpose: the length of responses, or how often they refuse. The monitor for
    reward hacking does not check these. `targets` does not change a label, so the hash does not contain it.

    `text` is the TOML text after the includes are resolved. In a prose constitution, `critique` and `judge` are derived from
    the paragraphs.
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
    targets: tuple[Literal["length", "refusal"], ...] = ()
    text: str = Field("", exclude=True, repr=False)
    _locations: dict[tuple[str, str], SourceLocation] = PrivateAttr(default_factory=dict)

    @cached_property
    def hash(self) -> str:
        """The SHA-256 of the content, without comments and layout."""
        values = _rename_for_hash(self.model_dump(mode="json", exclude={"targets"}))
        if self.prose:
            values["asked"] = self.combined_judge_prompt
        else:
            del values["prose"]  # the hash of constitutions without prose must not change
        content = json.dumps(values, sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(content.encode()).hexdigest()

    @property
    def combined_judge_prompt(self) -> str:
        """The question that contains all judge principles. Paragraphs of prose are in the order of their priorities."""
        if self.prose:
            lines = "\n".join(f"{number}. {p.name}: {p.text}" for number, p in enumerate(self.prose, 1))
            return PRIORITIZED_PRINCIPLES_TEMPLATE.format(lines=lines)
        return _ALL_PRINCIPLES_TEMPLATE.format(lines="\n".join(f"- {principle.judge_prompt}" for principle in self.judge))

    def select_critique_principle(
        self, seed: int, round_index: int, tags: Sequence[str] = (), selection: str = ""
    ) -> CritiquePrinciple:
        """Select the critique principle of a round. The first round is 0. `selection` overrides the constitution's setting."""
        if (selection or self.selection) == "rotate":
            matching = filter_by_tags(self.critique, tags)
            return matching[round_index % len(matching)]
        return _sample_principle(self.critique, seed, tags)

    def sample_judge_principle(self, seed: int, tags: Sequence[str] = ()) -> JudgePrinciple:
        """Sample one judge principle for a pair, with a probability proportional to its weight."""
        return _sample_principle(self.judge, seed, tags)

    def sample_judge_principles(self, seed: int, tags: Sequence[str] = (), num_principles: int = 1) -> Sequence[JudgePrinciple]:
        """Sample judge principles for a pair. A single principle is sampled by weight. Two or more principles are
        sampled uniformly."""
        if num_principles == 1:
            return [self.sample_judge_principle(seed, tags)]
        return sorted(filter_by_tags(self.judge, tags), key=lambda p: _draw_exponential(seed, p))[:num_principles]

    def sample_critique_principles(self, seed: int, tags: Sequence[str], num_principles: int) -> Sequence[CritiquePrinciple]:
        """Sample different critique principles uniformly."""
        return sorted(filter_by_tags(self.critique, tags), key=lambda p: _draw_exponential(seed, p))[:num_principles]

    def with_single_judge_principle(self, principle_id: str) -> Constitution:
        """Return this constitution with only one judge principle."""
        (principle,) = (p for p in self.judge if p.id == principle_id)
        values = self.model_dump() | {"judge": [principle], "judge_with": "one", "prose": ()}
        return Constitution(**values)

    def find_location(self, part: str, principle_id: str) -> SourceLocation | None:
        """Return the location of a principle or paragraph in the files."""
        return self._locations.get((part, principle_id))

    def without_principles(self, principle_ids: Sequence[str]) -> Constitution:
        """Return this constitution without some principles. The new name contains the ids of the removed principles.

        Raise ConstitutionError if a principle is unknown or if no principle remains in a list.
        """
        known_ids = list(dict.fromkeys(p.id for p in (*self.critique, *self.judge)))
        for principle_id in principle_ids:
            if principle_id not in known_ids:
                fix = suggest_nearest(principle_id, known_ids) or f"type: charter constitution show {self.name}"
                raise ConstitutionError(f"{self.name} has no principle {principle_id}", f"it has {', '.join(known_ids)}", fix)
        values = to_toml_values(self) | {"name": "-".join([self.name, "without", *principle_ids])}
        for part in (*PRINCIPLE_LISTS, "prose"):
            if part in values:
                values[part] = [entry for entry in values[part] if entry["id"] not in principle_ids]
                if not values[part]:
                    raise ConstitutionError(
                        f"without {', '.join(principle_ids)} {self.name} has no {part} principle left",
                        "a stage needs at least one principle",
                        "keep one of them",
                    )
        return parse_constitution(render_toml(values), values["name"])


# Sampling


# Field name in the code -> field name in the hash. The names in the hash must never change, because record ids depend on it.
_HASHED_NAMES = {"judge": "judging", "critique_prompt": "critique", "revision_prompt": "revision", "judge_prompt": "question"}
_HASHED_SELECTIONS = {"sample": "random", "rotate": "rotation"}


def _rename_for_hash(values: Any) -> Any:
    """Rename fields and selections to the names that the hash uses."""
    if isinstance(values, dict):
        renamed = {_HASHED_NAMES.get(name, name): _rename_for_hash(value) for name, value in values.items()}
        if "selection" in renamed:
            renamed["selection"] = _HASHED_SELECTIONS[renamed["selection"]]
        return renamed
    return [_rename_for_hash(value) for value in values] if isinstance(values, list) else values


def filter_by_tags(principles: Sequence[D], tags: Sequence[str]) -> Sequence[D]:
    """Return the principles that apply to a prompt with these tags. If no principle applies, return all principles."""
    matching = [p for p in principles if not p.tags or set(p.tags) & set(tags)]
    return matching or principles


def _sample_principle(principles: Sequence[D], seed: int, tags: Sequence[str]) -> D:
    """Sample a principle by weight. The result depends only on the seed, the ids and the weights, not on the process.

    Each principle has a pseudorandom number from the exponential distribution whose rate is the weight. The number is computed
    from a hash of the seed and the id. The principle with the smallest number is selected. If a principle is added or removed,
    only the samples that select this principle change. Two versions of a constitution can therefore be compared record by
    record. Source: rendezvous hashing (Thaler and Ravishankar 1998).
    """
    return min(filter_by_tags(principles, tags), key=lambda p: _draw_exponential(seed, p) / p.weight)


def _draw_exponential(seed: int, principle: BasePrinciple) -> float:
    """Return a sample from the exponential distribution with rate 1.

    The sample depends only on the seed and the principle id.
    """
    digest = hashlib.blake2b(f"{seed}/{principle.id}".encode(), digest_size=8).digest()
    return -math.log((int.from_bytes(digest, "big") + 0.5) / 2**64)


# Reading


def load_constitution(name_or_path: str | Path) -> Constitution:
    """Load a shipped constitution by name, or a file by path. Raise ConstitutionError."""
    return _build_constitution(read_constitution_file(str(name_or_path)))


def parse_constitution(text: str | bytes, origin: str) -> Constitution:
    """Load a constitution from TOML text. `origin` is its name in error messages. Raise ConstitutionError."""
    return _build_constitution(parse_toml(text, origin))


def _build_constitution(file: ConstitutionFile) -> Constitution:
    merged = merge_includes(file)
    values = dict(merged.values)
    try:
        if "text" in values:  # `text` is a field of the class, but not a key of the file
            raise make_unknown_key_error(f"{file.origin}, line {file.find_line('text')}: text", "text", _list_allowed_keys([]))
        if "prose" in values:
            values = _expand_prose(values, merged)
        constitution = Constitution(**values | {"text": file.text})
    except (ValidationError, TypeError) as error:
        raise _explain_error(error, merged) from error
    for part in () if constitution.prose else PRINCIPLE_LISTS:
        _check_unique_ids(part, [p.id for p in getattr(constitution, part)], merged)
    for (part, index), location in merged.locations.items():
        if part != "examples":
            constitution._locations[part, str(merged.values[part][index]["id"])] = location
    if file.values.get("include"):
        constitution = constitution.model_copy(update={"text": render_toml(to_toml_values(constitution))})
    return constitution


class _ProseSection(StrictModel):
    prose: tuple[ProseParagraph, ...] = Field(min_length=1)


def _expand_prose(values: Mapping[str, Any], merged: MergedConstitution) -> dict[str, Any]:
    """Return the values of a prose constitution with both lists, which are derived from the paragraphs in order of priority."""
    for part in PRINCIPLE_LISTS:
        if part in values:
            origin, _, line = merged.locate([part, 0])
            raise ConstitutionError(
                f"{origin}, line {line}: a constitution with prose cannot have a {part} list",
                "both lists are derived from the prose",
                f"use either [[prose]] or [[{part}]], or two files",
            )
    paragraphs = _ProseSection(prose=values["prose"]).prose
    _check_unique_ids("prose", [p.id for p in paragraphs], merged)
    ordered = sorted(paragraphs, key=lambda p: p.priority)
    lists: dict[str, list[dict[str, Any]]] = {"critique": [], "judge": []}
    for paragraph in ordered:
        preceding = ", ".join(p.name for p in ordered if p.priority < paragraph.priority)
        fields = {name: getattr(paragraph, name) for name in BasePrinciple.model_fields}
        revision = _PROSE_REVISION_TEMPLATE.format(text=paragraph.text) + (
            _PROSE_PRECEDENCE_TEMPLATE.format(names=preceding) if preceding else ""
        )
        lists["critique"].append(
            fields | {"critique_prompt": _PROSE_CRITIQUE_TEMPLATE.format(text=paragraph.text), "revision_prompt": revision}
        )
        lists["judge"].append(fields | {"judge_prompt": _PROSE_JUDGE_TEMPLATE.format(text=paragraph.text)})
    return {"judge_with": "all", **values, "prose": ordered, **lists}


def _check_unique_ids(part: str, ids: Sequence[str], merged: MergedConstitution) -> None:
    """Raise ConstitutionError if two entries have the same id. `ids` are in the order of the entries."""
    for i, name in enumerate(ids):
        if name in ids[:i]:
            origin, _, line = merged.locate([part, i, "id"])
            first_origin, _, first_line = merged.locate([part, ids.index(name), "id"])
            raise ConstitutionError(
                f"{origin}, line {line}: two {part} principles have the id {name}; the other is in {first_origin}, line {first_line}",
                "ids identify principles in records, so they must be unique",
                "give one of them another id",
            )


def _explain_error(error: Exception, merged: MergedConstitution) -> ConstitutionError:
    """Return a ConstitutionError for the first problem, with its location and a fix."""
    if not isinstance(error, ValidationError):
        return ConstitutionError(
            f"{merged.main_file.origin} is not a constitution", str(error), "see constitutions/default.toml"
        )
    # A misspelled key can also cause an error about a missing key. Report the misspelled key.
    first = min(error.errors(), key=lambda details: details["type"] != "extra_forbidden")
    why = _PYDANTIC_MESSAGES.get(first["type"], first["msg"].removeprefix("Value error, "))
    origin, key_path, line = merged.locate(first["loc"])
    key = str(key_path[-1]) if key_path else ""
    where = f"{origin}, line {line}: {'.'.join(str(part) for part in key_path)}"
    if first["type"] == "missing":
        fix = f"add [[{key}]] tables, or include a file with such tables" if key in PRINCIPLE_LISTS else f"add: {key} = ..."
        return ConstitutionError(f"{where} is missing", f"a constitution requires the key {key}", fix)
    if first["type"] == "extra_forbidden":
        return make_unknown_key_error(where, key, _list_allowed_keys(key_path))
    if first["type"] == "too_short":
        why = "a stage needs at least one principle"
        return ConstitutionError(f"{where} is an empty list", why, f"add [[{key}]] tables, or include a file with such tables")
    is_malformed = first["type"] == "string_pattern_mismatch"
    fix = f"write {_FORMAT_HINTS[key]}" if is_malformed and key in _FORMAT_HINTS else f"fix the value of {key}"
    return ConstitutionError(f"{where} cannot be {_shorten_repr(first['input'])}", why, fix)


# Replacements for messages of pydantic that use Python terms.
_PYDANTIC_MESSAGES = {
    "string_too_short": "it is empty",
    "tuple_type": "it must be a list",
    "string_pattern_mismatch": "its format is invalid",
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
    """Return the values of a TOML file with the content of this constitution. Default values are omitted."""
    parts = ("prose", "examples") if constitution.prose else (*PRINCIPLE_LISTS, "examples")
    head = ("name", "version", "description", "selection", "judge_with", "targets")
    dumped = constitution.model_dump(mode="json", exclude_defaults=True)
    values = {key: dumped[key] for key in (*head, *parts) if key in dumped}
    if constitution.prose:
        values["judge_with"] = constitution.judge_with  # the default is different for prose, so the value must be in the file
    return values


def render_toml(values: Mapping[str, Any]) -> str:
    """Return values as TOML text. If this text is loaded, the constitution and its hash are the same."""
    head = [f"{key} = {_format_toml_value(value)}" for key, value in values.items() if not _is_table_list(value)]
    tables = [
        "\n".join([f"\n[[{part}]]", *(f"{key} = {_format_toml_value(_escape_value(value))}" for key, value in entry.items())])
        for part, entries in values.items()
        if _is_table_list(entries)
        for entry in entries
    ]
    return "\n".join([*head, *tables]) + "\n"


def _is_table_list(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(entry, dict) for entry in value)


def _escape_value(value: Any) -> Any:
    return escape_braces(value) if isinstance(value, str) else value


def _format_toml_value(value: Any) -> str:
    if isinstance(value, str):  # a JSON string is a valid TOML string if U+007F is escaped
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return f"[{', '.join(_format_toml_value(item) for item in value)}]" if isinstance(value, list) else repr(value)
