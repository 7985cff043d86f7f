"""`charter config`: print every setting, its value and its origin."""

from __future__ import annotations

import click

from charter.console import common_options, format_table, output_options, print_rows
from engine.settings import Settings, format_settings_file, iter_settings


def _print_defaults(context: click.Context, _: click.Parameter, value: bool) -> None:
    """Print the settings file. The current settings are not loaded, so that this works if they are wrong."""
    if value and not context.resilient_parsing:
        click.echo(format_settings_file(), nl=False)
        context.exit()


@click.command()
@click.option(
    "--defaults",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_print_defaults,
    help="Print a charter.toml with every key, its default and its meaning.",
)
@output_options
@common_options
def config(settings: Settings, origins: dict[str, str], output: str) -> None:
    """Print every setting, its value and its origin.

    The origin is "default", a preset, the settings file, an environment variable or the command line.

    \b
    Examples:
      charter config
      charter config --defaults > charter.toml
      CHARTER_RESPOND__NUM_COMPLETIONS=4 charter config --json
    """
    rows = [(f"{s}.{k}", getattr(getattr(settings, s), k), origins[f"{s}.{k}"], f.description) for s, k, f in iter_settings()]
    columns = ["setting", "value", "origin", "meaning"]
    if output:
        print_rows(columns, rows, output)
    else:
        click.echo(format_table(columns, rows))  # `print_rows` would print blocks, because some values are long


COMMAND = config
