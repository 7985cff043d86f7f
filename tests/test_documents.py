"""The documents against the code: commands parse, queries run, settings and constitutions load, files exist."""

import itertools
import re
import shlex
import tomllib
from contextlib import suppress
from pathlib import Path

import click
import pytest

from charter.cli import load_command
from constitutions.loader import parse_constitution
from engine.budget import parse_prices
from engine.settings import Settings, iter_settings, load_settings
from engine.store import Store
from producers.recipe import parse_recipe
from tests.support.waiting import HANG_S

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXT = "\n".join(path.read_text(encoding="utf-8") for path in DOCUMENTS)
FENCED = re.findall(r"^```(\w*)\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)
BLOCKS = "\n".join(text for language, text in FENCED if not language)
COMMANDS = re.findall(r"^charter (.+)$", BLOCKS, re.MULTILINE)
SETTINGS = {f"{section}.{key}" for section, key, _ in iter_settings()}


def arguments(command):
    """Return the arguments that a shell would pass: without comments, and only those of the first command."""
    return list(itertools.takewhile(lambda word: word not in ("&&", "|", "<", ">", ">>"), shlex.split(command, comments=True)))


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_parse(command):
    verb, *rest = arguments(command)
    with suppress(click.exceptions.Exit):  # an option such as --defaults prints and exits
        load_command(verb).make_context(verb, rest)


def test_queries_run(tmp_path):
    store = Store(tmp_path / "charter.duckdb")
    store.create_schema()
    queries = [arguments(command)[1] for command in COMMANDS if command.startswith('sql "')]
    assert len(queries) >= 5
    with store.open_read_session(limit_s=HANG_S) as session:
        for query in queries:
            assert session(query).columns


def test_settings_exist():
    sections = "|".join(Settings.model_fields)
    named = set(re.findall(rf"`((?:{sections})\.(?!(?:py|jsonl)\b)[a-z_]+)\b", TEXT)) | set(
        re.findall(r'--set "?([a-z][^= ]+)=', TEXT)
    )
    assert len(named) >= 5
    assert named <= SETTINGS


TABLES = [text for language, text in FENCED if language == "toml"]


@pytest.mark.parametrize("text", TABLES)
def test_toml_loads_as_settings_a_constitution_or_a_recipe(text, tmp_path):
    values = tomllib.loads(text)
    if set(values) <= set(Settings.model_fields):
        (tmp_path / "charter.toml").write_text(text, encoding="utf-8")
        settings, _ = load_settings(file=tmp_path / "charter.toml", environment={})
        parse_prices(settings.budget.prices)
    elif "kinds" in values:
        assert parse_recipe(text, "the documents").name == values["name"]
    elif "name" in values:
        assert parse_constitution(text, "the documents").name == values["name"]


def test_files_exist():
    named = set(re.findall(r"`((?:schemas|constitutions|engine|producers|consumers|trainer|charter|docs)/[^`*]*)`", TEXT))
    assert len(named) >= 5
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []


def test_link_targets_exist():
    links = [(page, link) for page in DOCUMENTS for link in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8"))]
    assert len(links) >= 5
    assert [(page.name, link) for page, link in links if not (page.parent / link).exists()] == []


def test_make_targets_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    named = set(re.findall(r"(?:^\$ |`)make ([a-z-]+)", TEXT, re.MULTILINE))
    assert {"demo", "test"} <= named <= targets


def test_tutorial_matches_its_script():
    script = (ROOT / "docs" / "tutorial.sh").read_text(encoding="utf-8")
    page = (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")
    commands = re.findall(
        r"^(charter .+)$", "\n".join(re.findall(r"^```\n(.*?)^```", page, re.MULTILINE | re.DOTALL)), re.MULTILINE
    )
    ran = [line.removeprefix("try ").removeprefix("say ") for line in script.splitlines()]
    assert [
        command
        for command in commands
        if command not in ran and not command.startswith(("charter show", "charter run", "charter init"))
    ] == []
    for text in re.findall(r"^```toml\n(.*?)^```", page, re.MULTILINE | re.DOTALL):
        assert all(part in script for part in text.strip().split("\n\n"))
