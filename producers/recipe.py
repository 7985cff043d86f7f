"""Load a recipe for generated prompts from a TOML file.

A recipe lists the kinds of prompts that are sampled: what a kind asks for, topics, and examples that show the model what is meant. The
examples are the seeds: some of them are in each request. A shipped recipe is in producers/recipes/. docs/sources.md describes the
keys.

    name = "example"              [[kinds]]                                  [kinds.examples]
    version = "1.0.0"             id = "how-to"                              en = ["How do I ...?", ...]
    red_team_fraction = 0.5       red_team = false
    languages = { en = 1.0 }      instruction = "..."
                                  topics = ["..."]

An error in a file is a UsageError with the file and the line. The examples of red-team kinds must pass the filter
`operational_detail`, because a model continues in the way of its examples.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from constitutions.sources import ConstitutionError, ConstitutionFile, parse_toml, read_file_bytes, suggest_nearest
from engine.errors import UsageError
from engine.languages import LANGUAGES
from producers.operational_detail import NAME, find_operational_detail

RECIPES_FOLDER = Path(__file__).with_name("recipes")
RED_TEAM, BENIGN = "red-team", "benign"  # the sources of generated prompts, as of the shipped prompts


def _require_language(code: str) -> str:
    if code not in LANGUAGES:
        raise ValueError(f"the language must be one of {', '.join(LANGUAGES)}")
    return code


NonEmptyStr = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]
Slug = Annotated[str, StringConstraints(pattern=r"^[a-z0-9]+(-[a-z0-9]+)*$")]
Language = Annotated[str, AfterValidator(_require_language)]
Weight = Annotated[float, Field(gt=0, le=1e6)]


class _StrictModel(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Kind(_StrictModel):
    """A kind of prompts. `tags` become the tags of its prompts. `examples` has a list for each language of the recipe."""

    id: Slug
    red_team: bool
    instruction: NonEmptyStr
    topics: tuple[NonEmptyStr, ...] = Field(min_length=1)
    examples: dict[Language, tuple[NonEmptyStr, ...]]
    weight: Weight = 1.0
    tags: tuple[NonEmptyStr, ...] = ()

    @property
    def source(self) -> str:
        return RED_TEAM if self.red_team else BENIGN


class Recipe(_StrictModel):
    """A valid recipe.

    `red_team_fraction` is the fraction of requests for red-team kinds, and `languages` are the relative frequencies of the
    languages. `few_shot` is the number of examples in a request, and `prompts_per_request` is the number of prompts that it asks
    for. A longer prompt than `max_chars` is rejected.
    """

    name: Slug
    version: Annotated[str, StringConstraints(pattern=r"^\d+\.\d+\.\d+$")]
    description: str = ""
    red_team_fraction: float = Field(ge=0, le=1)
    languages: dict[Language, Weight] = Field(min_length=1)
    few_shot: int = Field(3, ge=1, le=20)
    prompts_per_request: int = Field(4, ge=1, le=50)
    max_chars: int = Field(300, ge=10)
    kinds: tuple[Kind, ...] = Field(min_length=1)

    @property
    def hash(self) -> str:
        """The hash of everything that can change a request. Comments, layout and the description do not count."""
        content = json.dumps(self.model_dump(exclude={"description"}), sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(content.encode()).hexdigest()

    @model_validator(mode="after")
    def _check_parts(self) -> Recipe:
        known = [kind.id for kind in self.kinds]
        if twice := next((name for name in known if known.count(name) > 1), None):
            raise ValueError(f"two kinds have the id {twice}")
        for is_red_team, needed in ((True, self.red_team_fraction > 0), (False, self.red_team_fraction < 1)):
            if needed and not any(kind.red_team is is_red_team for kind in self.kinds):
                value = str(is_red_team).lower()
                raise ValueError(f"red_team_fraction = {self.red_team_fraction:g} needs a kind with red_team = {value}")
        for kind in self.kinds:
            self._check_examples(kind)
        return self

    def _check_examples(self, kind: Kind) -> None:
        if unused := next((code for code in kind.examples if code not in self.languages), None):
            raise ValueError(f"the kind {kind.id} has examples in {unused}, which is not in languages")
        for code in self.languages:
            if len(kind.examples.get(code, ())) < self.few_shot:
                raise ValueError(f"the kind {kind.id} has fewer examples in {code} than few_shot = {self.few_shot}")
        for texts in kind.examples.values():
            for text in texts:
                if texts.count(text) > 1:
                    raise ValueError(f"the kind {kind.id} has the example {text!r} twice")
                if "\n" in text:
                    why = "a request is a list with one prompt per line"
                    raise ValueError(f"an example of the kind {kind.id} has several lines; {why}")
                if kind.red_team and (detail := find_operational_detail(text)):
                    raise ValueError(
                        f"an example of the red-team kind {kind.id} does not pass the filter {NAME}: it has {detail}"
                    )

    def list_examples(self) -> list[str]:
        return [text for kind in self.kinds for texts in kind.examples.values() for text in texts]


@dataclass(frozen=True)
class RequestPlan:
    """What one request to the model asks for. `seed` is the seed from which everything was drawn."""

    kind: Kind
    topic: str
    language: str
    examples: tuple[str, ...]
    seed: int


def plan_request(recipe: Recipe, seed: int) -> RequestPlan:
    """Draw the kind, the topic, the language and the examples of a request. The result depends only on the recipe and the seed."""
    source = random.Random(seed)
    is_red_team = source.random() < recipe.red_team_fraction
    kinds = [kind for kind in recipe.kinds if kind.red_team is is_red_team]
    kind = source.choices(kinds, [kind.weight for kind in kinds])[0]
    language = source.choices(list(recipe.languages), list(recipe.languages.values()))[0]
    topic = source.choice(kind.topics)
    return RequestPlan(kind, topic, language, tuple(source.sample(kind.examples[language], recipe.few_shot)), seed)


# Reading


def list_shipped_recipes() -> list[str]:
    return sorted(path.stem for path in RECIPES_FOLDER.glob("*.toml"))


def load_recipe(name_or_path: str) -> Recipe:
    """Load a shipped recipe by name, or a file by its path. Raise UsageError."""
    shipped = list_shipped_recipes()
    path = RECIPES_FOLDER / f"{name_or_path}.toml" if name_or_path in shipped else Path(name_or_path)
    data = read_file_bytes(path)
    if data is None:
        raise UsageError(
            f"there is no recipe {name_or_path!r}",
            f"it is not a file, and the shipped recipes are: {', '.join(shipped)}",
            suggest_nearest(name_or_path, shipped) or "give the path of a TOML file, or one of these names: --recipe NAME",
        )
    return parse_recipe(data, str(path))


def parse_recipe(data: str | bytes, origin: str) -> Recipe:
    """Load a recipe from TOML text. `origin` is its name in error messages. Raise UsageError."""
    try:
        file = parse_toml(data, origin)
    except ConstitutionError as error:  # the error of any file that is not UTF-8 or not TOML
        why = error.why if "constitution" not in error.why else "a recipe is a TOML file in UTF-8 of at most 1 MiB"
        raise UsageError(error.what, why, error.fix) from error
    try:
        return Recipe.model_validate(file.values)
    except ValidationError as error:
        raise _explain_error(error, file) from error


def _explain_error(error: ValidationError, file: ConstitutionFile) -> UsageError:
    """Return a UsageError for the first problem. A misspelled key can also cause an error about a missing key, so it comes first."""
    first = min(error.errors(), key=lambda details: details["type"] != "extra_forbidden")
    why = _PYDANTIC_MESSAGES.get(first["type"], first["msg"].removeprefix("Value error, "))
    if not first["loc"]:  # a check of the whole recipe
        return UsageError(f"{file.origin} is not a recipe", why, "see docs/sources.md, or producers/recipes/default.toml")
    key_path = [part for part in first["loc"] if part != "[key]"]
    key = str(next(part for part in reversed(key_path) if isinstance(part, str)))
    is_in_list = len(key_path) > 1 and isinstance(key_path[1], int)
    place = key_path if is_in_list else key_path[:1]  # the other tables are usually written in one line
    where = f"{file.origin}, line {file.find_line(*place)}: {'.'.join(map(str, key_path))}"
    if first["type"] == "missing":
        return UsageError(f"{where} is missing", f"a recipe requires the key {key}", f"add: {key} = ...")
    if first["type"] == "extra_forbidden":
        allowed = _list_keys(key_path)
        fix = suggest_nearest(key, allowed) or f"allowed here: {', '.join(allowed)}"
        return UsageError(f"{where} is unknown", "there is no such key", fix)
    return UsageError(f"{where} cannot be {_shorten(first['input'])}", why, f"fix the value of {key}")


# Replacements for messages of pydantic that use Python terms.
_PYDANTIC_MESSAGES = {
    "dict_type": "it must be a table, such as { en = 1.0 }",
    "tuple_type": "it must be a list",
    "string_type": "it must be a string",
    "string_too_short": "it is empty",
    "string_pattern_mismatch": "its format is invalid: an id has lower-case words with hyphens, and a version three numbers",
    "too_short": "it must have at least one entry",
    "model_type": "it must be a table",
}


def _list_keys(key_path: Sequence[Any]) -> list[str]:
    model: type[_StrictModel] = Kind if len(key_path) > 1 else Recipe
    return list(model.model_fields)


def _shorten(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


LANGUAGE_NAMES: Mapping[str, str] = {
    "af": "Afrikaans", "ar": "Arabic", "bg": "Bulgarian", "bn": "Bengali", "ca": "Catalan", "cs": "Czech", "cy": "Welsh",
    "da": "Danish", "de": "German", "el": "Greek", "en": "English", "es": "Spanish", "et": "Estonian", "fa": "Persian",
    "fi": "Finnish", "fr": "French", "gu": "Gujarati", "he": "Hebrew", "hi": "Hindi", "hr": "Croatian", "hu": "Hungarian",
    "id": "Indonesian", "it": "Italian", "ja": "Japanese", "kn": "Kannada", "ko": "Korean", "lt": "Lithuanian", "lv": "Latvian",
    "mk": "Macedonian", "ml": "Malayalam", "mr": "Marathi", "ne": "Nepali", "nl": "Dutch", "no": "Norwegian", "pa": "Punjabi",
    "pl": "Polish", "pt": "Portuguese", "ro": "Romanian", "ru": "Russian", "sk": "Slovak", "sl": "Slovenian", "so": "Somali",
    "sq": "Albanian", "sv": "Swedish", "sw": "Swahili", "ta": "Tamil", "te": "Telugu", "th": "Thai", "tl": "Tagalog",
    "tr": "Turkish", "uk": "Ukrainian", "ur": "Urdu", "vi": "Vietnamese", "zh": "Chinese", "zh-cn": "Simplified Chinese",
    "zh-tw": "Traditional Chinese",
}  # fmt: skip
