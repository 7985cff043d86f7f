"""Tables with aligned wide characters, independent of the terminal's width unless they are printed to it; CSV and JSON."""

import csv
import io
import json
import os
import pty
import subprocess
import sys

import click
import pytest
from click.testing import CliRunner
from rich.cells import cell_len

from charter.cli import VERBS, load_command
from charter.console import format_csv, format_rows, format_table, output_options, print_rows

COLUMNS = ["name", "count", "text"]
ROWS = [["日本語のテキスト", 3, "a"], ["🙂 emoji", 12_345, "b" * 30], ["plain", None, "c"]]
READ_COMMANDS = {
    "status": [""], "show": [""], "sql": [""], "doctor": [""], "config": [""], "policy": ["", "list"],
    "batches": ["", "list", "show", "rebuild"], "constitution": ["list", "show", "lint", "diff", "test", "ablate"],
    "eval": ["agreement"], "runs": ["", "list", "compare"], "dlq": ["", "list", "show"], "topics": ["", "list", "describe", "lag"],
}  # fmt: skip


def test_columns_are_aligned_in_terminal_cells():
    header, _, *lines = format_table(COLUMNS, ROWS).splitlines()
    starts = {cell_len(line[: line.index(text)]) for line, text in zip(lines, ("a", "bbb", "c"), strict=True)}
    assert starts == {cell_len(header[: header.index("text")])}
    ends = {cell_len(line[: line.index(text) + len(text)]) for line, text in zip(lines, (" 3", "12345", "-"), strict=True)}
    assert ends == {cell_len(header[: header.index("count") + len("count")])}


@pytest.mark.parametrize("width", ["20", "80", "300"])
def test_width_has_no_effect_without_a_terminal(monkeypatch, width):
    monkeypatch.setenv("COLUMNS", width)
    lines = format_table(COLUMNS, ROWS).splitlines()
    assert len(lines) == 2 + len(ROWS) and "b" * 30 in lines[3]


def test_cells_are_wrapped_on_a_narrow_terminal():
    code = "from charter.console import format_table; print(format_table(['x', 'y'], [['a' * 50, 'b' * 50]]))"
    main, other = pty.openpty()
    with subprocess.Popen([sys.executable, "-c", code], stdout=other, env=os.environ | {"COLUMNS": "40"}) as process:
        os.close(other)
        text = b""
        while chunk := _read(main):
            text += chunk
        process.wait()
    os.close(main)
    lines = text.decode().splitlines()
    assert max(map(len, lines)) <= 40 and text.count(b"a") == 50 and text.count(b"b") == 50


def _read(descriptor):
    try:
        return os.read(descriptor, 10_000)
    except OSError:  # the other end is closed
        return b""


def test_long_texts_are_printed_as_blocks():
    text = format_rows(["id", "text"], [[1, "x" * 61], [2, "short"]])
    assert text.splitlines() == ["--- row 1", "id: 1", "text: " + "x" * 61, "--- row 2", "id: 2", "text: short"]


def test_markup_is_printed_and_not_interpreted():
    assert "[red]not red[/red]" in format_table(["x"], [["[red]not red[/red]"]])


def test_csv_round_trips():
    rows = [["a,b", 'say "hi"', None, [1, {"k": "v"}]], ["line\nbreak", "", 1.5, []]]
    header, *lines = csv.reader(io.StringIO(format_csv(["w", "x", "y", "z"], rows)))
    assert (
        header == ["w", "x", "y", "z"]
        and lines[0][:3] == ["a,b", 'say "hi"', ""]
        and json.loads(lines[0][3]) == [1, {"k": "v"}]
    )
    assert lines[1] == ["line\nbreak", "", "1.5", "[]"]


def test_rows_are_printed_in_each_format():
    @click.command()
    @output_options
    def command(output):
        print_rows(["a", "b"], [(1, None), (2, "x")], output)

    run = CliRunner().invoke
    assert json.loads(run(command, ["--json"]).output) == [{"a": 1, "b": None}, {"a": 2, "b": "x"}]
    assert run(command, ["--csv"]).output == "a,b\n1,\n2,x\n"
    assert run(command, []).output.splitlines()[0].split() == ["a", "b"]


@pytest.mark.parametrize(("verb", "name"), [(verb, name) for verb, names in READ_COMMANDS.items() for name in names])
def test_every_command_that_reads_prints_csv_and_json(verb, name):
    command = load_command(verb)
    options = {option for param in (command.commands[name] if name else command).params for option in param.opts}
    assert {"--json", "--csv"} <= options and set(READ_COMMANDS) <= set(VERBS)
