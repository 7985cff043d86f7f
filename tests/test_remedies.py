"""Every `charter ...` command in a string of the code is a command that exists, with its options and required parameters.

Errors end with a command to type, and docstrings show examples. The test parses each command with click without running it.
Parts of f-strings and words in CAPITALS are placeholders for values.
"""

import ast
import re
from pathlib import Path

import click
import pytest

from charter.cli import cli
from engine.settings import iter_settings

ROOT = Path(__file__).parent.parent
PACKAGES = ("charter", "engine", "trainer", "consumers", "producers", "constitutions", "schemas")
SETTINGS = {f"{section}.{key}" for section, key, _ in iter_settings()}
# A token is quoted or has no punctuation that ends a command in a sentence or in a shell.
TOKEN = re.compile(r""" ('[^']*'|"[^"]*"|(?:[^\s`'";,|&<>()]|"[^"]*")+)""")


def read_text(node):
    """Return the text of a string literal; the formatted parts of an f-string become VALUE."""
    if isinstance(node, ast.JoinedStr):
        return "".join(read_text(part) for part in node.values)
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else ""
    return "VALUE"


def iter_literals(node):
    """Yield (line, text) of every string literal below a node; the constants in an f-string are part of it."""
    if isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str)):
        yield node.lineno, read_text(node)
        return
    for child in ast.iter_child_nodes(node):
        yield from iter_literals(child)


def find_commands(text):
    """Yield (words after `charter`, is_complete) for each command in a text.

    A command after a colon or on a new line is complete: a reader types exactly this text. Elsewhere a text may
    only mention a command (`charter backup`), without its required parameters.
    """
    for match in re.finditer(r"(?:(?<=^)|(?<=: )|(?<=[\s`(]))charter(?= [a-z-])", text, re.MULTILINE):
        words, position = [], match.end()
        while token := TOKEN.match(text, position):
            words.append(re.sub(r"\.+$", "", token[1]))
            position = token.end()
        before = text[: match.start()]
        yield words, bool(re.search(r"(\n|: )\s*$", before))


def check_command(words, is_complete):
    """Raise ValueError unless the command exists, and its options; a complete one has its required parameters too."""
    command, rest = cli, list(words)
    while isinstance(command, click.Group) and rest and not rest[0].startswith("-"):
        subcommand = command.get_command(click.Context(command), rest[0])
        if subcommand is None:
            if command is cli or (is_complete and not rest[0].isupper()):
                raise ValueError(f"there is no command {rest[0]}")
            return
        command = subcommand
        rest.pop(0)
    options = {name: p for p in command.params if isinstance(p, click.Option) for name in (*p.opts, *p.secondary_opts)}
    used_options, values = set(), []
    while rest:
        name, _, value = rest.pop(0).partition("=") if rest[0].startswith("--") else (rest.pop(0), "", "")
        if not name.startswith("-") or name == "-":
            values.append(name)
            continue
        if name in ("-h", "--help", "--version"):
            return
        if name not in options:
            raise ValueError(f"{command.name} has no option {name}")
        used_options.add(option := options[name])
        if not option.is_flag and not value:
            if not rest and not is_complete:
                return
            if not rest:
                raise ValueError(f"{name} has no value")
            value = rest.pop(0)
        check_value(option, value)
    if not is_complete:
        return
    for parameter in command.params:
        if isinstance(parameter, click.Option) and parameter.required and parameter not in used_options:
            raise ValueError(f"{command.name} lacks {parameter.opts[0]}")
    arguments = [p for p in command.params if isinstance(p, click.Argument)]
    if len(values) < sum(max(1, p.nargs) for p in arguments if p.required):
        raise ValueError(f"{command.name} lacks {', '.join(p.human_readable_name for p in arguments)}")
    if all(p.nargs > 0 for p in arguments) and len(values) > sum(p.nargs for p in arguments):
        raise ValueError(f"{command.name} takes no {values[-1]}")


def check_value(option, value):
    """Raise ValueError if a choice or the name of a setting does not exist."""
    value = value.strip("'\"")
    is_literal = value.islower() and not value.endswith(".py")
    if isinstance(option.type, click.Choice) and is_literal and value not in option.type.choices:
        raise ValueError(f"{option.opts[0]} cannot be {value}")
    key = value.partition("=")[0]
    if "--set" in option.opts and key.islower() and key not in SETTINGS:
        raise ValueError(f"there is no setting {key}")


def collect_commands():
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            for line, text in iter_literals(ast.parse(path.read_text(encoding="utf-8"))):
                for words, is_complete in find_commands(text):
                    yield f"{path.relative_to(ROOT)}:{line}", words, is_complete


def test_every_command_in_a_string_of_the_code_parses():
    problems, count = [], 0
    for location, words, is_complete in collect_commands():
        count += 1
        try:
            check_command(words, is_complete)
        except ValueError as error:
            problems.append(f"{location}: charter {' '.join(words)}: {error}")
    assert problems == []
    assert count > 100


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("type: charter replay --from judge", "lacks --stage"),
        ("type: charter replay --stage jugde", "cannot be jugde"),
        ("type: charter policy resume --quickly", "no option --quickly"),
        ("type: charter policy resumes", "no command resumes"),
        ("see `charter sttus`", "no command sttus"),
        ("type: charter show", "lacks"),
        ("type: charter status live", "takes no live"),
        ("type: charter run --set judge.nothing=1", "no setting judge.nothing"),
    ],
)
def test_commands_that_do_not_parse_are_found(text, problem):
    ((words, is_complete),) = find_commands(text)
    with pytest.raises(ValueError, match=problem):
        check_command(words, is_complete)


@pytest.mark.parametrize(
    "text",
    [
        "type: charter replay --stage judge",
        "narrow it, or allow more: charter sql --timeout-s 60 '...'",
        "a folder that charter backup has written",
        "type: charter produce FILE    (a JSONL file)",
        f"type: charter policy resume {'VALUE'}",
        'type: charter run --set "models.judge=http://localhost:8000/v1#MODEL"',
    ],
)
def test_commands_that_parse_are_accepted(text):
    for words, is_complete in find_commands(text):
        check_command(words, is_complete)
