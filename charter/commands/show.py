"""`charter show`: show the trace of one prompt."""

from __future__ import annotations

import click

from charter.connect import open_store
from charter.console import common_options, output_options, print_records
from charter.lookup import find_erased_prompt_ids, find_prompt_ids
from charter.text import format_trace
from engine.errors import UsageError
from engine.settings import Settings


@click.command()
@click.argument("identifier", metavar="ID")
@output_options
@common_options
def show(settings: Settings, identifier: str, output: str) -> None:
    """Show the trace of one prompt.

    The trace has the responses, critiques, revisions and labels of the prompt. ID is the id of the prompt or of one of these
    records. A unique prefix of the id is sufficient.

    \b
    Examples:
      charter show 3f2a
      charter show 3f2a --json
    """
    store = open_store(settings)
    prompt_ids = find_prompt_ids(store, identifier)
    if not prompt_ids and (erased := find_erased_prompt_ids(store, identifier)):
        raise UsageError(
            f"prompt {erased[0]} was erased",
            "charter erase deleted the prompt and all records made from it",
            f"for the time and the reason, type: charter sql \"from erasures where prompt_id = '{erased[0]}'\"",
        )
    if len(prompt_ids) != 1:
        raise UsageError(
            f"{identifier!r} matches {len(prompt_ids) or 'no'} prompts",
            "an id or id prefix must match the records of exactly one prompt",
            "type: charter sql 'select prompt_id, prompt from traces limit 10'",
        )
    rows = store.query_dicts("SELECT * FROM traces WHERE prompt_id = ?", prompt_ids)
    if output:
        print_records(rows, output)
    else:
        click.echo(format_trace(rows[0]))


COMMAND = show
