"""`charter init`: create a folder with settings, a constitution and prompts."""

from __future__ import annotations

import shlex
from pathlib import Path

import click

from charter.project_folder import create_project_folder


@click.command()
@click.argument("folder", metavar="NAME", type=click.Path(path_type=Path))
@click.option("--traceback", is_flag=True, expose_value=False, help="Print the Python traceback of an error.")
def init(folder: Path) -> None:
    """Create a folder with settings, a constitution and prompts.

    The folder NAME gets a charter.toml, a commented constitution.toml and a prompts.jsonl. All commands that run in this folder
    use this charter.toml. The folder has its own data, so its first policy is the base model.

    \b
    Examples:
      charter init library
      cd library && charter produce prompts.jsonl && charter run --until-done
    """
    for path in create_project_folder(folder):
        click.echo(f"wrote {path}")
    click.echo(
        f"next: cd {shlex.quote(str(folder))} && charter constitution lint && charter produce prompts.jsonl && charter run"
    )


COMMAND = init
