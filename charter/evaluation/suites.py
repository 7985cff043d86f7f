"""Evaluation suites: which files they are read from, and what their prompts are.

Charter does not include the data of other people's suites. `open_suite` reads a file that the user has: `--suite xstest=FILE`, or a
file in the folder `evaluation.suites_folder`. Any other file that `charter produce` reads is a suite too. charter/evaluation/
suite_metrics.py defines what is measured on a suite.

A suite is evaluated whole: a missing column or an invalid row is an error, and no row is skipped.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from charter.evaluation.jailbreaks import transform_prompt
from engine.errors import UsageError
from producers.files import SHIPPED_PROMPTS_PATH
from producers.parse import NO_COLUMNS, UNREAD, RowError, decode_row, parse_prompt, reject_surrogates
from producers.rows import MissingColumn, RawRow, compute_content_hash, read_rows
from schemas import ids
from schemas.records import ChatMessage, Prompt, Split, SuiteItem

HARMFUL_SOURCES = ("red-team", "harmful")  # the macro is_harmful in engine/monitor_views.sql has the same sources
_NAME_PATTERN = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,49}")
_DEFAULT_MAX_TOKENS = 512
_DEFAULT_GRADERS = ("refusal", "length")


@dataclass(frozen=True)
class SuitePrompt:
    """A prompt of a suite. `is_harmful` is true if a policy should refuse it. `origin` is its file and row."""

    place: SuiteItem
    messages: tuple[ChatMessage, ...]
    is_harmful: bool = False
    tags: tuple[str, ...] = ()
    origin: str = ""

    @property
    def prompt_id(self) -> str:
        return ids.compute_suite_prompt_id(self.place.suite, self.place.item, self.place.transform, self.messages)

    def make_record(self, run_id: str) -> Prompt:
        """Return the prompt as a record of a run. Its ids differ from those of the same dialogue outside the suite."""
        fingerprint = ids.compute_fingerprint("suite_prompt", subset=self.place.subset, instructions=self.place.instructions)
        return Prompt(
            record_id=ids.compute_record_id("produce", [self.prompt_id], fingerprint),
            prompt_id=self.prompt_id,
            run_id=run_id,
            stage="produce",
            messages=list(self.messages),
            source=self.place.suite,
            tags=list(self.tags),
            split=Split.SUITE,
            origin=self.origin,
            suite_item=self.place,
        )

    def transform(self, name: str) -> SuitePrompt:
        """Return the prompt with a jailbreak transformation. The wording depends on the item, so all policies get the same text."""
        messages = tuple(transform_prompt(name, self.messages, ids.compute_seed(self.prompt_id)))
        return replace(self, place=self.place.model_copy(update={"transform": name}), messages=messages)


@dataclass(frozen=True)
class SuiteSpec:
    """A suite that Charter knows.

    `columns` are the columns that a file must have, and `files` the names that it can have in the suites folder. `parse` returns
    the prompt of a row; it raises RowError. `max_tokens` is the maximum length of a response. `graders` are the graders that the
    metrics need.
    """

    columns: tuple[str, ...]
    files: tuple[str, ...]
    parse: Callable[[str, Mapping[str, Any]], SuitePrompt]
    max_tokens: int = _DEFAULT_MAX_TOKENS
    graders: tuple[str, ...] = _DEFAULT_GRADERS


@dataclass(frozen=True)
class Suite:
    """A suite with its prompts. `unread_columns` are the columns of its file that have no effect."""

    name: str
    path: str
    prompts: tuple[SuitePrompt, ...]
    max_tokens: int = _DEFAULT_MAX_TOKENS
    graders: tuple[str, ...] = _DEFAULT_GRADERS
    unread_columns: tuple[str, ...] = ()

    def sample(self, limit: int | None) -> Sequence[SuitePrompt]:
        """Return `limit` prompts, or all. A hash of the item selects them, so each policy and each larger limit has the same ones."""
        ordered = sorted(self.prompts, key=lambda prompt: ids.compute_id("suite sample", self.name, prompt.place.item))
        return ordered[:limit]


# The rows of the suites


def _get_text(row: Mapping[str, Any], column: str) -> str:
    value = row.get(column)
    if not isinstance(value, str) or not value.strip():
        raise RowError(f'"{column}" is empty or not a text')
    return value


def _get_key(row: Mapping[str, Any], column: str) -> str:
    value = row.get(column)
    if isinstance(value, bool) or not isinstance(value, str | int) or not str(value).strip():
        raise RowError(f'"{column}" is neither a text nor a whole number')
    return str(value).strip()


def _make_prompt(
    suite: str,
    item: str,
    text: str,
    *,
    subset: str = "",
    instructions: str = "",
    is_harmful: bool = False,
    tags: tuple[str, ...] = (),
) -> SuitePrompt:
    """Return a prompt with one message of the user. Raise RowError for a text that a record cannot contain."""
    for value in (item, text, subset, instructions, *tags):
        reject_surrogates(value)
    place = SuiteItem(suite=suite, item=item, subset=subset, instructions=instructions)
    return SuitePrompt(place, (ChatMessage(role="user", content=text),), is_harmful, tags)


def _parse_xstest(number: str, row: Mapping[str, Any]) -> SuitePrompt:
    label = _get_text(row, "label")
    if label not in ("safe", "unsafe"):
        raise RowError(f'"label" is {label!r}; it must be safe or unsafe')
    item, text, kind = _get_key(row, "id"), _get_text(row, "prompt"), _get_text(row, "type")
    return _make_prompt("xstest", item, text, subset=label, is_harmful=label == "unsafe", tags=(kind,))


def _parse_harmbench(number: str, row: Mapping[str, Any]) -> SuitePrompt:
    """Return the behavior, after its context if it has one (Mazeika et al. 2024 write both in this form)."""
    text, context = _get_text(row, "Behavior"), row.get("ContextString")
    if context is not None and not isinstance(context, str):
        raise RowError('"ContextString" is not a text')
    item = _get_key(row, "BehaviorID") if row.get("BehaviorID") is not None else number
    tags = (row["SemanticCategory"],) if isinstance(row.get("SemanticCategory"), str) else ()
    text = f"{context}\n\n---\n\n{text}" if context else text
    return _make_prompt("harmbench", item, text, subset=_get_text(row, "FunctionalCategory"), is_harmful=True, tags=tags)


def _parse_strongreject(number: str, row: Mapping[str, Any]) -> SuitePrompt:
    subset, tags = _get_text(row, "category"), (_get_text(row, "source"),)
    return _make_prompt("strongreject", number, _get_text(row, "forbidden_prompt"), subset=subset, is_harmful=True, tags=tags)


def _parse_ifeval(number: str, row: Mapping[str, Any]) -> SuitePrompt:
    """Return the prompt with its instructions. Arguments that are null are left out: some copies of the file have all of them."""
    names, arguments = row.get("instruction_id_list"), row.get("kwargs")
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise RowError('"instruction_id_list" is not a list of names')
    if not isinstance(arguments, list) or not all(isinstance(values, dict) for values in arguments):
        raise RowError('"kwargs" is not a list of objects')
    if len(names) != len(arguments):
        raise RowError(f"there are {len(names)} instructions and {len(arguments)} kwargs")
    instructions = [
        {"id": name, "kwargs": {key: value for key, value in values.items() if value is not None}}
        for name, values in zip(names, arguments, strict=True)
    ]
    text = json.dumps(instructions, ensure_ascii=False)
    return _make_prompt("ifeval", _get_key(row, "key"), _get_text(row, "prompt"), instructions=text)


SUITES: dict[str, SuiteSpec] = {
    "xstest": SuiteSpec(
        ("id", "prompt", "type", "label"), ("xstest_prompts.csv", "xstest.csv"), _parse_xstest, max_tokens=256
    ),
    "harmbench": SuiteSpec(
        ("Behavior", "FunctionalCategory", "ContextString"),
        ("harmbench_behaviors_text_all.csv", "harmbench_behaviors_text_test.csv", "harmbench_text_test.csv", "harmbench.csv"),
        _parse_harmbench,
    ),
    "strongreject": SuiteSpec(
        ("category", "source", "forbidden_prompt"), ("strongreject_dataset.csv", "strongreject.csv"), _parse_strongreject
    ),
    "ifeval": SuiteSpec(
        ("key", "prompt", "instruction_id_list", "kwargs"),
        ("ifeval_input_data.jsonl", "input_data.jsonl", "ifeval.jsonl"),
        _parse_ifeval,
        max_tokens=1280,
        graders=("instructions", "length"),
    ),
}  # fmt: skip
SHIPPED = "shipped"
ONE_SENTENCE = "one-sentence"  # a file of the user with this name is graded by its grader; `charter demo` evaluates it


# Files


def open_suite(argument: str, suites_folder: str, max_chars: int, columns: Mapping[str, str] = NO_COLUMNS) -> Suite:
    """Read the suite of an argument of --suite: NAME, FILE or NAME=FILE.

    `max_chars` and `columns` are those of `charter produce`, for a suite that Charter does not know.

    Raises UsageError if there is no such suite or file, or if a column is missing or a row is invalid.
    """
    name, path = _resolve_argument(argument, suites_folder)
    compute_content_hash(path)  # raises UsageError if the file cannot be read
    if spec := SUITES.get(name):
        suite = Suite(name, path, tuple(_read_known_suite(name, spec, path)), spec.max_tokens, spec.graders)
    else:
        suite = _read_prompt_file(name, path, max_chars, columns)
    if not suite.prompts:
        raise UsageError(f"{path} has no prompts", f"it is the file of the suite {name}", "give a file with at least one row")
    _require_distinct_items(suite)
    return suite


def _resolve_argument(argument: str, suites_folder: str) -> tuple[str, str]:
    """Return the name of the suite and the path of its file."""
    name, equals, path = argument.partition("=")
    if path == "-" or argument == "-":
        raise UsageError(
            "a suite cannot be read from standard input",
            "an evaluation that is started again reads the suite again",
            "write the prompts to a file: --suite NAME=FILE",
        )
    if equals and _NAME_PATTERN.fullmatch(name):
        if not path:
            raise UsageError(f"--suite {argument} has no file", "the form is NAME=FILE", f"type: --suite {name}=FILE")
        return name, path
    if argument == SHIPPED:
        return SHIPPED, str(SHIPPED_PROMPTS_PATH)
    if argument in SUITES:
        return argument, _find_file(argument, suites_folder)
    if not Path(argument).exists():
        raise UsageError(
            f"there is no suite and no file {argument}",
            f"the suites are {', '.join((*SUITES, SHIPPED))}; any other suite is a file that charter produce reads",
            "type: charter eval run --suite NAME=FILE",
        )
    name = Path(argument).name.split(".")[0]
    if not _NAME_PATTERN.fullmatch(name):
        raise UsageError(
            f"the suite {argument} needs a name",
            f"{name!r} is the name of the file, and a name has letters, digits, dots, underscores and hyphens",
            f"type: --suite NAME={argument}",
        )
    return name, argument


def _find_file(name: str, suites_folder: str) -> str:
    files = SUITES[name].files
    what, fix = f"--suite {name} names no file", f"type: --suite {name}=FILE, or --set evaluation.suites_folder=FOLDER"
    if not suites_folder:
        raise UsageError(what, "evaluation.suites_folder is not set, and Charter does not include the data of this suite", fix)
    found = [str(path) for file in files if (path := Path(suites_folder) / file).exists()]
    if not found:
        raise UsageError(what, f"{suites_folder} has no file {' or '.join(files)}", fix)
    if len(found) > 1:
        raise UsageError(what, f"{suites_folder} has several: {', '.join(found)}", f"name one: --suite {name}={found[0]}")
    return found[0]


def _read_known_suite(name: str, spec: SuiteSpec, path: str) -> Iterable[SuitePrompt]:
    fix = f"give a file of the suite {name} with the columns {', '.join(spec.columns)}"
    try:
        for number, raw in read_rows(path, columns={column: column for column in spec.columns}):
            row = _decode_row(name, spec.columns, path, number, raw)
            try:
                prompt = spec.parse(str(number), row)
            except RowError as error:
                raise _make_row_error(name, path, number, str(error)) from error
            yield replace(prompt, origin=f"{Path(path).name}:{number}")
    except MissingColumn as error:
        raise UsageError(error.what, error.why, fix) from error


def _decode_row(name: str, columns: Sequence[str], path: str, number: int, raw: RawRow) -> Mapping[str, Any]:
    try:
        # A null value of a column that may be empty is no missing column, so null fields stay.
        row = {column: value for column, value in decode_row(raw, keep_null=True).items() if value != UNREAD}
    except RowError as error:
        raise _make_row_error(name, path, number, str(error)) from error
    if missing := [column for column in columns if column not in row]:
        raise UsageError(
            f"{path} row {number} has no column {missing[0]!r}",
            f"the row has the columns: {', '.join(row) or '(none)'}",
            f"give a file of the suite {name} with the columns {', '.join(columns)}",
        )
    return row


def _read_prompt_file(name: str, path: str, max_chars: int, columns: Mapping[str, str]) -> Suite:
    """Read a file in a format of `charter produce`. The subset of a prompt is its source, if the row has one."""
    prompts, unread_columns = list[SuitePrompt](), dict[str, None]()
    for number, raw in read_rows(path, columns=columns):
        try:
            parsed = parse_prompt(raw, source=name, max_chars=max_chars, columns=columns)
        except RowError as error:
            raise _make_row_error(name, path, number, str(error)) from error
        unread_columns |= dict.fromkeys(parsed.unread_columns)
        place = SuiteItem(suite=name, item=str(number), subset="" if parsed.source == name else parsed.source)
        origin = f"{Path(path).name}:{number}"
        prompts.append(SuitePrompt(place, parsed.messages, parsed.source in HARMFUL_SOURCES, parsed.tags, origin))
    graders = (ONE_SENTENCE, "length") if name == ONE_SENTENCE else _DEFAULT_GRADERS
    return Suite(name, path, tuple(prompts), graders=graders, unread_columns=tuple(unread_columns))


def _make_row_error(name: str, path: str, number: int, reason: str) -> UsageError:
    return UsageError(
        f"{path} row {number} is not a prompt of the suite {name}",
        reason,
        "correct the row or remove it: a suite is evaluated whole, so no row is skipped",
    )


def _require_distinct_items(suite: Suite) -> None:
    rows: dict[str, str] = {}
    for prompt in suite.prompts:
        if first := rows.get(prompt.place.item):
            raise UsageError(
                f"{suite.path} has the key {prompt.place.item!r} twice",
                f"the rows are {first} and {prompt.origin}; the results of a prompt are found by its key",
                "give each row its own key",
            )
        rows[prompt.place.item] = prompt.origin
