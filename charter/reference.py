"""The reference pages, written from the code: `python -m charter.reference` makes docs/configuration.md and docs/cli.md.

A test compares them, so that a setting or a verb cannot come without its line in the documents.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import annotated_types as bounds
import click
from pydantic import PositiveInt
from pydantic.fields import FieldInfo

from charter.cli import SECTIONS, load_command
from engine.settings import PRESETS, iter_settings

DOCS = Path(__file__).parent.parent / "docs"

_CONFIGURATION_INTRO = """# Settings

Every setting, from `engine/settings.py` (written by `python -m charter.reference`). A file sets them by table and key
(`charter.toml` in the working folder, or `--config FILE`); the environment beats it (`respond.num_completions` is
`CHARTER_RESPOND__NUM_COMPLETIONS`), and the command line beats both (`--set respond.num_completions=4`). Lists are JSON or separated by commas
in the last two. An unknown name is an error that names the nearest one.

```
charter config
charter config --defaults > charter.toml
charter config --json
```

The first shows every value in this folder and where it came from. A recipe chosen by name (`critique.preset`, `judge.preset`)
fills in the keys that nobody set: see [recipes](#recipes).
"""

_CLI_INTRO = """# Verbs

Every verb of `charter`, from its own help (written by `python -m charter.reference`).

Verbs that read have `--json`: JSON on standard output. A file named `-` is standard input. `charter completion bash`, `zsh` or
`fish` prints what completes verbs and options in that shell.

| exit code | meaning |
|---|---|
| 0 | done |
| 1 | it ran, and something is not as it should be: rows refused, a check that failed, a stage that stopped |
| 2 | the command or a setting is wrong; nothing was done |
| 3 | something outside is away (broker, database held, model server); the same command works once it is back |
| 130 | stopped with Ctrl-C before it was done |

An error is three lines: what, why, what to type. Verbs that work on a run share these options:

"""


def _format_field_type(field: FieldInfo) -> str:
    """The type in words, with the values or the range that are allowed."""
    of = get_args(field.annotation)[0] if get_origin(field.annotation) is list else field.annotation
    if get_origin(of) is Literal:
        choices = ", ".join(f"`{json.dumps(value)}`" for value in get_args(of))
        return choices if of is field.annotation else f"list of {choices}"
    names = {str: "text", int: "whole number", float: "number", bool: "true or false"}
    names |= {list[str]: "list of texts", list[PositiveInt]: "list of whole numbers above 0"}
    limits = [limit for limit in map(_format_bound, field.metadata) if limit]
    return " ".join([names[field.annotation], *([", ".join(limits)] if limits else [])])  # type: ignore[index]


def _format_bound(bound: Any) -> str:
    match bound:
        case bounds.Ge(value):
            return f">= {value}"
        case bounds.Gt(value):
            return f"> {value}"
        case bounds.Le(value):
            return f"<= {value}"
        case bounds.Lt(value):
            return f"< {value}"
        case bounds.MinLen():
            return "not empty"
    return ""


def _format_configuration_page() -> str:
    """docs/configuration.md: a table for each section, and what the recipes set."""
    parts = [_CONFIGURATION_INTRO]
    last = ""
    for section, key, field in iter_settings():
        if section != last:
            parts.append(f"\n## [{section}]\n\n| key | default | values | meaning |\n|---|---|---|---|\n")
            last = section
        default = json.dumps(field.default)
        parts.append(f"| `{key}` | `{default}` | {_format_field_type(field)} | {field.description} |\n".replace("||", "| |"))
    parts.append("\n## Recipes\n\n| recipe | sets |\n|---|---|\n")
    for section, recipes in PRESETS.items():
        for name, layer in recipes.items():
            values = [f"`{s}.{key} = {json.dumps(value)}`" for s, of_one in layer.items() for key, value in of_one.items()]
            parts.append(f"| `{section}.preset = {json.dumps(name)}` | {', '.join(values) or 'the defaults'} |\n")
    return "".join(parts)


def iter_commands(command: click.Command, name: str) -> Iterator[tuple[str, click.Command]]:
    """A verb, or the verbs below it."""
    if not isinstance(command, click.Group):
        yield name, command
        return
    for below in command.list_commands(click.Context(command)):
        yield from iter_commands(command.commands[below], f"{name} {below}")


def _list_options(command: click.Command) -> list[tuple[str, str]]:
    """What each option and argument is called, and its help."""
    context = click.Context(command)
    records = [record for param in command.get_params(context) if (record := param.get_help_record(context))]
    return [(said, " ".join(meaning.split())) for said, meaning in records if not said.endswith("--help")]


_COMMON_OPTIONS = [record for record in _list_options(load_command("run")) if record in _list_options(load_command("status"))]


def _format_options_table(records: list[tuple[str, str]]) -> str:
    rows = [f"| `{said}` | {meaning} |".replace("|  |", "| |") for said, meaning in records]
    return "\n".join(["| option | |", "|---|---|", *rows]) + "\n"


def _format_command(name: str, command: click.Command) -> str:
    """A verb's page: usage, what it does, examples, its options."""
    usage = command.get_usage(click.Context(command, info_name=f"charter {name}", max_content_width=200))
    text, _, examples = inspect.cleandoc(command.help or "").partition("\b\nExamples:\n")
    parts = [f"### {name}", f"    {usage.removeprefix('Usage: ')}", text.replace("\b\n", "").strip()]
    if examples:
        parts.append("```\n" + inspect.cleandoc(examples).strip() + "\n```")
    if own := [record for record in _list_options(command) if record not in _COMMON_OPTIONS]:
        parts.append(_format_options_table(own).strip())
    return "\n" + "\n\n".join(parts) + "\n"


def _format_cli_page() -> str:
    """docs/cli.md: every verb by section."""
    parts = [_CLI_INTRO, _format_options_table(_COMMON_OPTIONS)]
    for title, names in SECTIONS.items():
        parts.append(f"\n## {title}\n")
        parts += [_format_command(name, command) for verb in names for name, command in iter_commands(load_command(verb), verb)]
    return "".join(parts)


PAGES = {"configuration.md": _format_configuration_page, "cli.md": _format_cli_page}


def main() -> None:
    for name, written in PAGES.items():
        (DOCS / name).write_text(written(), encoding="utf-8")


if __name__ == "__main__":
    main()
