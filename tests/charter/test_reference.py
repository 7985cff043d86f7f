"""The reference pages are up to date, and all commands follow one grammar."""

from pathlib import Path

import click
import pytest

import charter.commands
from charter import reference
from charter.cli import SECTIONS, VERBS, cli, load_command

ALL = [(name, command) for verb in VERBS for name, command in reference.iter_commands(load_command(verb), verb)]
READ = ("status", "show", "sql", "doctor", "config", "runs list", "dlq list", "dlq show", "topics list", "topics lag")


@pytest.mark.parametrize("page", reference.PAGES)
def test_generated_pages_are_up_to_date(page):
    written = (reference.DOCS / page).read_text(encoding="utf-8")
    assert written == reference.PAGES[page](), "type: python -m charter.reference"


def test_every_command_is_in_one_section_with_the_first_sentence_of_its_help():
    commands = Path(charter.commands.__file__).parent
    files = {path.stem.partition("_")[0] for path in commands.glob("[a-z]*.py")}  # eval_judge.py is a part of eval
    assert sorted(VERBS) == sorted(files)
    for verbs in SECTIONS.values():
        for verb, text in verbs.items():
            assert load_command(verb).get_short_help_str(200) == text, verb


@pytest.mark.parametrize(("name", "command"), ALL)
def test_every_command_has_help(name, command):
    assert command.help and command.short_help is None
    assert len(command.get_short_help_str(200)) <= 64, "the first sentence is one line of --help, in 80 columns"
    assert all(param.help for param in command.params if isinstance(param, click.Option)), "an option without a meaning"


@pytest.mark.parametrize("name", READ)
def test_commands_that_read_have_json(name):
    command = dict(ALL)[name]
    assert any("--json" in param.opts for param in command.params)


def test_help_fits_eighty_columns():
    text = cli.get_help(click.Context(cli, info_name="charter", terminal_width=80))
    assert max(map(len, text.splitlines())) <= 80
    assert not [line for line in text.partition("Start:")[2].splitlines() if line.endswith("...")]
