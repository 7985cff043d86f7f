"""Generate docs/configuration.md and docs/cli.md from the code: `python -m charter.reference`.

A test compares the pages with the code. After a new setting or verb is added, the pages must be generated again.
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
from engine.settings import METHOD_DEFAULTS, PRESETS, iter_settings

DOCS = Path(__file__).parent.parent / "docs"

_CONFIGURATION_INTRO = """# Settings

This page lists every setting. `python -m charter.reference` generates it from `engine/settings.py`.

Charter reads settings from three sources. A later source overrides an earlier source:

1. a TOML file: `charter.toml` in the working folder, or `--config FILE`;
2. environment variables: `respond.num_completions` is `CHARTER_RESPOND__NUM_COMPLETIONS`;
3. the command line: `--set respond.num_completions=4`.

`charter init NAME` creates a folder with a `charter.toml`. Only the file of the working folder is read, not the files of its
parent folders; if only a parent folder has a `charter.toml`, a message says that it is not used. Relative paths in the file are
relative to the working folder.

In an environment variable and on the command line, a list is JSON or comma-separated values. An unknown name is an error, and the
error suggests the nearest name.

```
charter config
charter config --defaults > charter.toml
charter config --json
```

`charter config` prints each value and its origin. `charter config --defaults` prints a complete file with comments. A preset
(`critique.preset`, `judge.preset`) sets the keys that no other source sets: see [Presets](#presets).
"""

_CLI_INTRO = """# Command line

This page lists every verb of `charter`. `python -m charter.reference` generates it from the help of the commands.

Verbs that read have `--json` and `--csv`, which print to standard output. A file named `-` is standard input.
If standard input is closed, a command that reads it exits with code 2.
`eval "$(_CHARTER_COMPLETE=bash_source charter)"` enables completion in bash; use `zsh_source` or `fish_source` in the other shells.

| exit code | meaning |
|---|---|
| 0 | success |
| 1 | the command ran and reports a problem: rejected rows, a failed check, a stopped stage |
| 2 | the command or a setting is wrong; nothing was changed |
| 3 | a dependency (broker, database, model server, disk) is unreachable, busy or full; run the same command again when it is available, or use `--wait` |
| 130 | stopped with Ctrl-C, or standard input ended before a question was answered |
| 141 | the reader of the output has closed it, such as `head` in a pipe; nothing is printed |

An error is three lines: what happened, why, what to type. All verbs have these options:

"""


def _format_field_type(field: FieldInfo) -> str:
    """Return the type of a setting, with the allowed values or range."""
    item_type = get_args(field.annotation)[0] if get_origin(field.annotation) is list else field.annotation
    if get_origin(item_type) is Literal:
        choices = ", ".join(f"`{json.dumps(value)}`" for value in get_args(item_type))
        return choices if item_type is field.annotation else f"list of {choices}"
    names = {str: "string", int: "integer", float: "number", bool: "boolean"}
    names |= {list[str]: "list of strings", list[PositiveInt]: "list of integers > 0"}
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
    """Return docs/configuration.md: one table per section, and the values of the presets."""
    parts = [_CONFIGURATION_INTRO]
    previous_section = ""
    for section, key, field in iter_settings():
        if section != previous_section:
            parts.append(f"\n## [{section}]\n\n| key | default | values | meaning |\n|---|---|---|---|\n")
            previous_section = section
        default = json.dumps(field.default)
        parts.append(f"| `{key}` | `{default}` | {_format_field_type(field)} | {field.description} |\n".replace("||", "| |"))
    parts.append("\n## Presets\n\n| preset | sets |\n|---|---|\n")
    recipes = [(f"{section}.preset", name, layer) for section, presets in PRESETS.items() for name, layer in presets.items()]
    recipes += [("train.rl_method", name, layer) for name, layer in METHOD_DEFAULTS.items()]
    for key, name, layer in recipes:
        values = [f"`{table}.{key} = {json.dumps(value)}`" for table, keys in layer.items() for key, value in keys.items()]
        parts.append(f"| `{key} = {json.dumps(name)}` | {', '.join(values) or 'the defaults'} |\n")
    return "".join(parts)


def iter_commands(command: click.Command, name: str) -> Iterator[tuple[str, click.Command]]:
    """Yield (full name, command) for a verb. For a group, yield each subcommand."""
    if not isinstance(command, click.Group):
        yield name, command
        return
    for subcommand in command.list_commands(click.Context(command)):
        yield from iter_commands(command.commands[subcommand], f"{name} {subcommand}")


def _list_options(command: click.Command) -> list[tuple[str, str]]:
    """Return the declaration and the help of each option."""
    context = click.Context(command)
    records = [record for param in command.get_params(context) if (record := param.get_help_record(context))]
    return [(option, " ".join(meaning.split())) for option, meaning in records if not option.endswith("--help")]


# Two unrelated verbs share only the options of `common_options`.
_COMMON_OPTIONS = [record for record in _list_options(load_command("run")) if record in _list_options(load_command("status"))]


def _format_options_table(records: list[tuple[str, str]]) -> str:
    rows = [f"| `{option}` | {meaning} |".replace("|  |", "| |") for option, meaning in records]
    return "\n".join(["| option | meaning |", "|---|---|", *rows]) + "\n"


def _format_command(name: str, command: click.Command) -> str:
    """Return the section of a verb: usage, description, examples and options."""
    usage = command.get_usage(click.Context(command, info_name=f"charter {name}", terminal_width=200, max_content_width=200))
    description, _, examples = inspect.cleandoc(command.help or "").partition("\b\nExamples:\n")
    parts = [f"### {name}", f"    {usage.removeprefix('Usage: ')}", description.replace("\b\n", "").strip()]
    if examples:
        parts.append("```\n" + inspect.cleandoc(examples).strip() + "\n```")
    if options := [record for record in _list_options(command) if record not in _COMMON_OPTIONS]:
        parts.append(_format_options_table(options).strip())
    return "\n" + "\n\n".join(parts) + "\n"


def _format_cli_page() -> str:
    """Return docs/cli.md: all verbs by section."""
    parts = [_CLI_INTRO, _format_options_table(_COMMON_OPTIONS)]
    for title, names in SECTIONS.items():
        parts.append(f"\n## {title}\n")
        parts += [_format_command(name, command) for verb in names for name, command in iter_commands(load_command(verb), verb)]
    return "".join(parts)


PAGES = {"configuration.md": _format_configuration_page, "cli.md": _format_cli_page}


def main() -> None:
    """Write both pages to docs/."""
    for name, format_page in PAGES.items():
        (DOCS / name).write_text(format_page(), encoding="utf-8")


if __name__ == "__main__":
    main()
